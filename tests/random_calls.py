"""Random calls of an operator, with any of its arguments, and what they have to return."""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from compare import FLOATS, HALF
from conftest import backend
from layouts import LAYOUTS, SAME_VALUES, Layout, contiguous
from samples import draw
from torch import Tensor

from pyfused import functional as fused
from pyfused.backends import cpu
from pyfused.layout import loss_shape
from pyfused.ops.activation import Activation
from pyfused.ops.composed import Composed
from pyfused.ops.declaration import TOKEN_WEIGHT, Operator, reduction_of
from pyfused.ops.distillation import Divergence
from pyfused.ops.log_probs import LogProbsOfLogits
from pyfused.ops.operators import (
    CROSS_ENTROPY,
    KL_DIV_WITH_LOGITS,
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
EPS = torch.finfo(torch.float32).eps
ROUNDED = ("softcap",)  # logits that are rounded to their dtype before the loss
ERRORS = (IndexError, RuntimeError, TypeError, ValueError)
OPTIONS: dict[str, list[Any]] = {
    name: values
    for names, values in (
        ("alpha lambd negative_slope quantile z_loss", [0.0, 0.125, 1.0]),
        ("approximate", ["none", "tanh"]),
        ("beta cap delta margin scale softcap teacher_softcap", [n / 8 for n in range(1, 16)]),
        ("temperature", [n / 8 for n in range(1, 16)]),
        ("denominator", [3.0, torch.tensor(3.0), torch.tensor([2.5]).double()]),
        ("dim", [*range(-5, 5)]),
        ("dtype loss_dtype", [*FLOATS]),
        ("eps", [1e-3, 0.5]),
        ("filter_eps", [0.0]),
        ("full log_input log_target reduce size_average squared", [False, True]),
        ("deterministic_rows return_entropy return_lse", [False, True]),
        ("gamma", [1.0, 1.5, 2.0, 3.5]),  # below 1, torch's gradient where p = 1 is NaN
        ("ignore_index", [0, 1, 255, -1]),
        ("inplace with_metrics", [True]),  # the latter is another function
        ("label_smoothing", [0.1, 0.9, 0.1, 0.9, 1.0, 1.5]),
        ("memory_budget", [1, 1000, 10000]),
        ("max_val threshold", [0.5, 1.0, 2.0]),
        ("min_val", [-1.0, -0.25, 0.5]),
        ("p", [1, 2]),
        ("reduction", ["none", "mean", "sum"] * 4 + ["batchmean"]),
        ("remainder", ["bucket", "ignore"]),
    )
    for name in names.split()
}
LEFT_OUT = ("_stacklevel", "options", "shard", "teacher_requires_grad")
DEPRECATED = ("reduce", "size_average")


@dataclass
class Call:
    op: Operator
    given: dict[str, Any]
    layout: Layout = contiguous  # of the grad_output, and of what is overwritten
    seed: int = 0

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


def random_call(
    op: Operator, seed: int, elements: int, layouts: dict[str, Layout] = LAYOUTS
) -> Call:
    """Of tensors with at most so many elements, in one of the layouts; the same otherwise."""
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
        and (
            name in ("dim", "reduction")
            or rng.once_in(12 if name in (*ROUNDED, *DEPRECATED) else 4)
        )
    }
    if options.keys() & {*ROUNDED, *DEPRECATED} or (op is LINEAR_CROSS_ENTROPY and dtype in HALF):
        options.pop("with_metrics", None)  # rounded logits have ties of their own
    deprecated = options.get("size_average"), options.get("reduce")
    if reduction_of(*deprecated, options.get("reduction", "mean")) != "mean":
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
    if op in (LOG_PROBS, KL_DIV_WITH_LOGITS):
        of_language_model = isinstance(op, Divergence) or rng.once_in(2)
        options["dim"] = -1 if of_language_model else 1
        if found["logits"].dim() < 3:
            del options["dim"]
        elif op is LOG_PROBS and of_language_model:
            found["logits"] = found["logits"].movedim(1, -1)
    chosen = [*(SAME_VALUES if "inplace" in options else layouts).values()]
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
            x = rng.choice(chosen)(x) if x.numel() else x
            if operand.differentiated and x.is_floating_point() and x.frac().any():  # no counts
                x.requires_grad_(not rng.once_in(4))
        given[name] = x
    if "linear_weight" in given and given["linear_weight"].stride(0) == 0:
        options.pop("with_metrics", None)  # all classes have the same logit, but for rounding
    return Call(op, given | options, rng.choice(chosen), seed)


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
    token_weight = torch.rand(rows).sub(0.2).clamp(min=0)
    input = torch.randn(*shape[:of_class], features) if op in LINEAR else logits
    if op in LINEAR and of_class and rng.once_in(4):  # hidden states of more dimensions
        input, target, token_weight = (x.unsqueeze(1) for x in (input, target, token_weight))
    return {
        "input": input,
        "logits": logits,
        "linear_weight": torch.randn(*columns, features) / features**0.5,
        "target": target,
        "linear_bias": torch.randn(columns),
        "weight": torch.rand(classes) + 0.1,
        "token_weight": token_weight,
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
        if rng.once_in(4):  # it broadcasts
            own = tuple(rng.choice([1, n]) for n in shape)[rng.randint(0, len(shape)) :]
        x = draw(operand, own, scale=scale)
        if found and operand.low == 0 and rng.once_in(2):
            x = x.round()  # labels, counts
        if not found and options.get("log_input") is False:
            x = x.abs()
        found[operand.name] = 0.5 if operand.number and rng.once_in(4) else x
    return found


# ---- what a call has to return -------------------------------------------------------------------


def check_call(call: Call, function: Callable[..., Any] | None = None) -> None:
    """torch's values, gradients and dtypes, or an error where torch has one."""
    function = function or ours
    try:
        native = natively(call)
    except ERRORS:
        with pytest.raises(ERRORS):  # of several faults any may be named
            run(call, function)
        return
    results = (
        run(call, function),
        native,
        of_reference(call, torch.float64),
        tolerances(call, native),
    )
    for got, expected, exact, tolerance in zip(*results, strict=True):
        assert (got.dtype, got.shape) == (expected.dtype, exact.shape)
        if not got.is_floating_point():
            assert torch.equal(got, exact)
            continue
        info = torch.finfo(got.dtype)
        allowed = tolerance + 2 * info.eps * (exact.abs() + info.smallest_normal)
        if precision(call) > EPS:  # rounded on the way, by torch too
            allowed += 2 * largest(expected.double() - exact)
        near = ((got.double() - exact).abs() <= allowed) | (got == exact.to(got.dtype))
        overflow = exact.isfinite() & ~(got.isfinite() | expected.isfinite())
        right = near | (got == expected) | (got.isnan() & exact.isnan()) | overflow
        assert right.all(), f"{got[~right][:3]}, expected {exact[~right][:3]}"


def tolerances(call: Call, native: list[Tensor]) -> list[float]:
    """What arithmetic of the kernel's precision may lose, of each result, besides two roundings.

    That is a few times what torch in float32 loses, the most of four calls so that none is judged
    by luck, scaled to that precision. In float64 torch's sums are themselves off, and so are
    products of matrices in any dtype. Where all terms cancel, of one class for example, a rounding
    of a term is left.
    """
    linear = call.op.name.startswith("linear_")
    few = 64 if linear or precision(call) < EPS else 4
    mean = call.given.get("reduction") in ("mean", "batchmean")
    mean = mean and not call.given.keys() & {*DEPRECATED, "denominator"}
    lost = [EPS / max(native[-1].numel(), 1) if mean else EPS] * len(native)
    for factor in (1.0, 0.9, 0.7, 0.4):
        single = converted(call, torch.float32, factor)
        pairs = zip(run(single, reference), of_reference(single, torch.float64), strict=True)
        errors = [largest(x.double() - y.double()) + EPS * largest(y) for x, y in pairs]
        lost = [max(pair) for pair in zip(lost, errors, strict=True)]
    return [few * precision(call) / EPS * error for error in lost]


def largest(x: Tensor) -> float:
    return float(x[x.isfinite()].double().abs().max()) if x.isfinite().any() else 0.0


def precision(call: Call) -> float:
    """The epsilon of what is computed in, or of what is rounded to on the way."""
    tensors = [x for x in call.given.values() if isinstance(x, Tensor)]
    dtype = call.given.get("dtype", tensors[0].dtype)
    # softmax saves its rounded output; gradients of what is broadcast are sums of rounded ones.
    rounds = isinstance(call.op, Softmax) or getattr(call.op, "saves", "") == "output"
    rounds |= isinstance(call.op, Composed) or call.op.name.startswith("linear_")
    rounds |= bool(call.given.keys() & {*ROUNDED})
    of_classes = call.op in OF_CLASSES or isinstance(call.op, Divergence)
    rounds |= not of_classes and len({x.shape for x in tensors}) > 1
    if dtype in HALF and rounds:
        return torch.finfo(dtype).eps
    dtypes = {dtype, *(x.dtype for x in tensors if x.is_floating_point())}
    return torch.finfo(torch.float64).eps if dtypes == {torch.float64} else EPS


# ---- running a call ------------------------------------------------------------------------------


def run(call: Call, function: Callable[..., Any]) -> list[Tensor]:
    """What is returned, then the gradients."""
    results, gradients = forward(call, function)
    return [x.detach() for x in (*results, *gradients())]


def forward(
    call: Call, function: Callable[..., Any]
) -> tuple[list[Tensor], Callable[[], Sequence[Tensor]]]:
    """What is returned, and a backward pass, which can be called several times."""
    leaves = [x for x in call.given.values() if isinstance(x, Tensor) and x.requires_grad]
    found = function(call, **call.given)
    loss, *metrics = (found[0], *found[1]) if isinstance(found, tuple) else (found,)
    generator = torch.Generator().manual_seed(call.seed)
    grad_output = torch.randn(loss.shape, generator=generator, device="cpu").to(loss.device)
    grad_output = grad_output.bfloat16().to(loss.dtype)  # the same number in all dtypes
    grad_output = call.layout(grad_output) if grad_output.numel() else grad_output
    retain = not call.given.get("inplace")

    def gradients() -> Sequence[Tensor]:
        return torch.autograd.grad(loss, leaves, grad_output, retain) if leaves else ()

    return [loss, *metrics], gradients


def ours(call: Call, **given: Any) -> Any:
    if given.get("inplace"):
        given["input"] = call.layout(given["input"] * 1)  # no leaf
    name = call.op.name + "_with_metrics" * given.pop("with_metrics", False)
    found = getattr(fused, name)(**given)
    if not isinstance(call.op, LogProbsOfLogits):
        return found
    return torch.stack([result for result in found if result is not None])


def reference(call: Call, **given: Any) -> Any:
    given.pop("inplace", None)
    if getattr(given.get("target"), "dtype", None) is torch.uint8:  # not with all options
        given["target"] = given["target"].long()
    if call.op is CROSS_ENTROPY:
        x, target = given["input"], given["target"]
        if not target.is_floating_point():  # an ignored row's gradient is 0, of a NaN too
            counts = target.reshape(loss_shape(x, "none")) != given.get("ignore_index", -100)
            given["input"] = x.where(counts.unsqueeze(min(x.dim() - 1, 1)), 0)
    if isinstance(call.op, LogProbsOfLogits):
        wanted = [True, given.get("return_entropy", False), given.get("return_lse", False)]
        return call.op.reference(*call.op.bind(**given))[torch.tensor(wanted)]
    if call.op in (CROSS_ENTROPY, LINEAR_CROSS_ENTROPY) or isinstance(call.op, Divergence):
        return call.op.reference(*call.op.bind(**given))
    return call.op.reference(**given)


def natively(call: Call) -> list[Tensor]:
    """On what is contiguous, as not all of torch's operators take other strides."""
    dtype = next(iter(call.given.values())).dtype
    try:
        return of_reference(call)
    except NotImplementedError:  # a loss that torch does not have in half precision
        return [x.to(dtype) for x in of_reference(call, torch.float32)]


def of_reference(call: Call, dtype: torch.dtype | None = None) -> list[Tensor]:
    return run(converted(call, dtype), reference)


def converted(call: Call, dtype: torch.dtype | None = None, factor: float = 1.0) -> Call:
    """Contiguous, in a dtype if one is given, and what is differentiated times a factor."""
    first = call.given.get("dtype") if dtype else None  # softmax converts its input to it

    scaled = [operand.name for operand in call.op.operands if operand.differentiated]

    def convert(name: str, x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        y = x.detach().to(first or x.dtype).to(dtype or x.dtype).contiguous()
        return (y * factor if name in scaled else y).requires_grad_(x.requires_grad)

    given = {name: convert(name, x) for name, x in call.given.items()}
    given |= {name: None for name in ("dtype", "loss_dtype", "options") if dtype and name in given}
    return replace(call, given=given, layout=lambda x: call.layout(x).contiguous())
