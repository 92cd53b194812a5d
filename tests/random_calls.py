"""A random call of an operator, with any of its arguments, from a seed."""

from __future__ import annotations

import inspect
import math
import random
from dataclasses import dataclass
from typing import Any

import torch
from compare import FLOATS, HALF
from conftest import backend
from layouts import LAYOUTS, SAME_VALUES, Layout
from samples import draw
from torch import Tensor

from pyfused import functional as fused
from pyfused.backends import cpu
from pyfused.layout import loss_shape
from pyfused.ops.activation import Activation
from pyfused.ops.declaration import TOKEN_WEIGHT, Operator, reduction_of
from pyfused.ops.distillation import Divergence
from pyfused.ops.operators import (
    CROSS_ENTROPY,
    LINEAR_CROSS_ENTROPY,
    LINEAR_LOG_PROBS,
    LOG_PROBS,
    MULTI_MARGIN_LOSS,
    NLL_LOSS,
)
from pyfused.ops.softmax import Softmax

LINEAR = (LINEAR_CROSS_ENTROPY, LINEAR_LOG_PROBS)
OF_INDICES = (LINEAR_LOG_PROBS, LOG_PROBS, MULTI_MARGIN_LOSS, NLL_LOSS)  # alone
OF_CLASSES = (CROSS_ENTROPY, LINEAR_CROSS_ENTROPY, *OF_INDICES)
ROUNDED = ("softcap", "scale")  # logits that are rounded to their dtype before the loss
OPTIONS: dict[str, list[Any]] = {
    name: values
    for names, values in (
        ("alpha negative_slope quantile z_loss", [0.0, 0.125, 1.0]),
        ("approximate", ["none", "tanh"]),
        ("beta cap delta margin scale softcap temperature", [n / 8 for n in range(1, 16)]),
        ("denominator", [3.0, torch.tensor(3.0), torch.tensor([2.5]).double()]),
        ("dim", [*range(-5, 5)]),
        ("dtype loss_dtype", [*FLOATS]),
        ("eps", [1e-3, 0.5]),
        ("filter_eps", [0.0]),
        ("full log_input log_target reduce squared", [False, True]),
        ("deterministic_rows return_entropy return_lse", [False, True]),
        ("gamma", [1.0, 1.5, 2.0, 3.5]),  # below 1, torch's gradient where p = 1 is NaN
        ("ignore_index", [0, 1, 255, -1]),
        ("inplace with_metrics", [True]),  # the latter is another function
        ("label_smoothing", [0.1, 0.9, 0.1, 0.9, 1.0, 1.5]),
        ("memory_budget", [1, 1000, 10000]),
        ("p", [1, 2]),
        ("reduction", ["none", "mean", "sum"] * 4 + ["batchmean"]),
        ("remainder", ["bucket", "ignore"]),
    )
    for name in names.split()
}
LEFT_OUT = ("_stacklevel", "options", "size_average")


@dataclass
class Call:
    op: Operator
    given: dict[str, Any]
    layout: Layout  # of the grad_output, and of what is overwritten
    seed: int

    def __str__(self) -> str:
        told = {n: repr(x) for n, x in self.given.items()}
        for name, x in self.given.items():
            if isinstance(x, Tensor) and x.numel() > 2:
                grad = ", requires_grad" * x.requires_grad
                told[name] = f"<{str(x.dtype)[6:]} {tuple(x.shape)}, strides {x.stride()}{grad}>"
        return f"{self.op.name}({', '.join(f'{name}={x}' for name, x in told.items())})"


class Random(random.Random):
    def once_in(self, n: int) -> bool:
        return self.random() < 1 / n


def random_call(op: Operator, seed: int, elements: int) -> Call:
    """Of tensors with at most so many elements; the same otherwise."""
    rng = Random(seed)
    torch.manual_seed(seed)
    dtype = rng.choice(FLOATS)
    operands = {operand.name: operand for operand in op.operands}
    names = [*inspect.signature(getattr(fused, op.name)).parameters]
    if isinstance(op, Divergence):
        operands["token_weight"] = TOKEN_WEIGHT
    if op in (CROSS_ENTROPY, LINEAR_CROSS_ENTROPY):
        operands["token_weight"] = TOKEN_WEIGHT
        names.append("with_metrics")
    options = {
        name: rng.choice(OPTIONS[name])
        for name in names
        if name not in (*operands, *LEFT_OUT)
        and (name in ("dim", "reduction") or rng.once_in(12 if name in (*ROUNDED, "reduce") else 4))
    }
    if options.keys() & {*ROUNDED, "reduce"} or (op is LINEAR_CROSS_ENTROPY and dtype in HALF):
        options.pop("with_metrics", None)  # rounded logits have ties of their own
    if options.get("reduction") == "batchmean":
        options.pop("reduce", None)  # torch takes both, and divides what it does not sum
    if reduction_of(None, options.get("reduce"), options.get("reduction", "mean")) != "mean":
        options.pop("denominator", None)
    if options.get("negative_slope") == 0.0:
        options["negative_slope"] = -0.5
        options.pop("inplace", None)  # nor has torch that
    if op in OF_CLASSES:
        found = of_classes(rng, elements, op, options)
    elif isinstance(op, Divergence):
        found = of_predictions(rng, elements)
    elif isinstance(op, (Activation, Softmax)):
        x = torch.randn(shape_of(rng, elements, rng.randint(0, 4))) * rng.choice([1.0, 8.0])
        if x.numel() and rng.once_in(4):
            x.view(-1)[torch.randint(x.numel(), (3,))] = math.nan
        if isinstance(op, Softmax) and not rng.once_in(20):  # else it may have no such dimension
            options["dim"] = options["dim"] % max(x.dim(), 1) - x.dim() * (options["dim"] < 0)
        found = {"input": x}
    else:
        found = of_elements(rng, elements, op, options)
    layouts = [*(SAME_VALUES if "inplace" in options else LAYOUTS).values()]
    given: dict[str, Any] = {}
    for name, operand in operands.items():
        alike = op in (*LINEAR, MULTI_MARGIN_LOSS) or isinstance(op, Divergence)
        mixed = given and not alike and rng.once_in(20)
        x = found[name]
        if operand.optional and not rng.once_in(3):
            continue
        if isinstance(x, Tensor):
            if x.is_floating_point():
                x = x.to(rng.choice(FLOATS) if mixed else dtype)
            x = rng.choice(layouts)(x) if x.numel() else x
            if operand.differentiated and x.is_floating_point() and x.frac().any():  # no counts
                x.requires_grad_(not rng.once_in(4))
        given[name] = x
    if "linear_weight" in given and given["linear_weight"].stride(0) == 0:
        options.pop("with_metrics", None)  # all classes have the same logit, but for rounding
    return Call(op, given | options, rng.choice(layouts), seed)


def shape_of(rng: Random, elements: int, dims: int) -> list[int]:
    """Any dimension may be the long one."""
    shape = []
    for _ in range(dims):
        most = min(elements, 9) if rng.once_in(2) else elements
        shape.append(0 if rng.once_in(50) else 1 + int(rng.random() * most))
        elements //= max(shape[-1], 1)
    return rng.sample(shape, dims)


def of_classes(
    rng: Random, elements: int, op: Operator, options: dict[str, Any]
) -> dict[str, Tensor]:
    shape = shape_of(rng, elements, rng.choice([1, 2] if op is MULTI_MARGIN_LOSS else [1, 2, 3, 4]))
    of_class = len(shape) > 1
    if shape[of_class] == 1 and not rng.once_in(8):
        shape[of_class] = 5  # of one class the operator is torch's
    if op is MULTI_MARGIN_LOSS:  # torch's mean over nothing is what was in memory
        shape = [max(n, 1) for n in shape]
    classes = shape[of_class]
    logits = torch.randn(shape) * rng.choice([1.0, 8.0])
    target, rows = torch.rand(shape), loss_shape(logits, "none")
    if op in OF_INDICES or not rng.once_in(3):
        target = torch.randint(max(classes, 1), rows)
        if op is not MULTI_MARGIN_LOSS:
            ignored = torch.rand(rows) < rng.choice([0.0, 0.3, 0.3, 1.0])
            target[ignored] = options.get("ignore_index", -100)
            if len(shape) == 2 and target.byte().equal(target) and rng.once_in(4):
                target = target.byte()
        if target.numel() and backend is cpu and rng.once_in(30) and classes < 256:
            target.view(-1)[-1] = classes  # which raises; a GPU's loss is NaN
    if target.is_floating_point() or "label_smoothing" in options:
        options.pop("gamma", None)
    if target.is_floating_point():
        options.pop("ignore_index", None)
    if classes == 1:
        options.pop("loss_dtype", None)  # torch computes in it
    if not options.keys() & {*ROUNDED, "gamma"} and logits.numel() and classes > 1:
        logits += 1e4 if rng.once_in(6) else 0.0
        if rng.once_in(4):  # metrics of inf are NaN, as the loss is
            statistics = "with_metrics" in options or op is LOG_PROBS
            special = [-math.inf, math.nan, math.inf][: 3 - statistics]
            logits.view(-1)[torch.randint(logits.numel(), (3,))] = rng.choice(special)
    features, columns = rng.randint(1, 20), shape[of_class:]
    return {
        "input": torch.randn(*shape[:of_class], features) if op in LINEAR else logits,
        "logits": logits,
        "linear_weight": torch.randn(*columns, features) / features**0.5,
        "target": target,
        "linear_bias": torch.randn(columns),
        "weight": torch.rand(classes) + 0.1,
        "token_weight": torch.rand(rows).sub(0.2).clamp(min=0),
    }


def of_predictions(rng: Random, elements: int) -> dict[str, Tensor]:
    """Of a student and a teacher, for every kind of divergence."""
    *rows, classes = shape_of(rng, elements, rng.choice([1, 2, 3]))
    classes = 5 if classes == 1 else classes  # of one the value is 0, and torch's a rounding error
    features, k = rng.randint(1, 20), rng.randint(1, max(classes // 2, 1))
    log_probs, indices = torch.randn(*rows, max(classes, 1)).log_softmax(-1).topk(k)
    return {
        "logits": torch.randn(*rows, classes) * rng.choice([1.0, 8.0]),
        "teacher_logits": torch.randn(*rows, classes),
        "input": torch.randn(*rows, features),
        "linear_weight": torch.randn(classes, features) / features**0.5,
        "linear_bias": torch.randn(classes),
        "teacher_input": torch.randn(*rows, features),
        "teacher_linear_weight": torch.randn(classes, features) / features**0.5,
        "teacher_linear_bias": torch.randn(classes),
        "teacher_indices": indices,
        "teacher_log_probs": log_probs - 0.01,  # what they add up to stays below 1 when rounded
        "token_weight": torch.rand(rows).sub(0.2).clamp(min=0),
    }


def of_elements(
    rng: Random, elements: int, op: Operator, options: dict[str, Any]
) -> dict[str, Any]:
    shape, scale = shape_of(rng, elements, rng.randint(0, 4)), rng.choice([1 / 16, 1 / 4, 1.0])
    found: dict[str, Any] = {}
    for operand in op.operands:
        own = tuple(shape)
        if rng.once_in(6):  # it broadcasts
            own = tuple(rng.choice([1, n]) for n in shape)[rng.randint(0, len(shape)) :]
        x = draw(operand, own, scale=scale)
        if found and operand.low == 0 and rng.once_in(2):
            x = x.round()  # labels, counts
        if not found and options.get("log_input") is False:
            x = x.abs()
        found[operand.name] = 0.5 if operand.number and rng.once_in(4) else x
    return found
