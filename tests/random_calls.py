"""Draws random calls of an operator, with any of its arguments, and checks their results."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import catalogue
import pytest
import torch
from catalogue import (
    DEPRECATED,
    OF_CLASSES,
    RANK,
    Call,
    declared,
    labels,
    operands,
    options,
    ours,
    predictions,
    values_of,
)
from compare import FLOATS, HALF
from conftest import backend
from layouts import LAYOUTS, SAME_VALUES, Layout
from samples import draw
from torch import Tensor

from pyfused.backends import cpu
from pyfused.dispatch.operator import Operator, reduction_of
from pyfused.layout import loss_shape
from pyfused.ops.activation import Activation
from pyfused.ops.class_loss import MultiMarginLoss
from pyfused.ops.composed import Composed
from pyfused.ops.contrastive import Contrastive
from pyfused.ops.distillation import Divergence
from pyfused.ops.elementwise import PRELU
from pyfused.ops.embedding import EmbeddingLoss
from pyfused.ops.operators import (
    CROSS_ENTROPY,
    KL_DIV_WITH_LOGITS,
    LINEAR_CROSS_ENTROPY,
    LOG_PROBS,
)
from pyfused.ops.pointwise_loss import Halves
from pyfused.ops.softmax import Softmax

EPS = torch.finfo(torch.float32).eps
ROUNDED = ("softcap",)  # the capped logits are rounded before the loss
# torch's gradient for NaN differs between vectorised elements and the remainder.
NAN_OF_VECTORS = (
    *("celu", "elu", "hardshrink", "hardswish"),
    *("hardtanh", "relu6", "selu", "softshrink"),
)
INEXACT_IN_TORCH = ("hardsigmoid",)  # torch's float64 slope is 1 / 6 rounded to float32
ERRORS = (IndexError, RuntimeError, TypeError, ValueError)


def copy(value: Any) -> Any:
    """Returns a copy of an option, so that a test may modify its tensors."""
    return value.clone() if isinstance(value, Tensor) else value


class Random(random.Random):
    def once_in(self, n: int) -> bool:
        return self.random() < 1 / n


def random_call(
    op: Operator, seed: int, elements: int, layouts: dict[str, Layout] = LAYOUTS
) -> Call:
    """Draws a call with tensors of at most `elements` elements; deterministic for a seed."""
    rng = Random(seed)
    torch.manual_seed(seed)
    dtype = rng.choice(FLOATS)
    if op.name in INEXACT_IN_TORCH:
        dtype = torch.float32
    given = {
        name: copy(rng.choice(values_of(op, name)))
        for name in options(op)
        if name in ("dim", "reduction") or rng.once_in(12 if name in (*ROUNDED, *DEPRECATED) else 4)
    }
    if given.keys() & {*ROUNDED, *DEPRECATED} or (op is LINEAR_CROSS_ENTROPY and dtype in HALF):
        given = without_metrics(given)  # rounding causes ties
    deprecated = given.get("size_average"), given.get("reduce")
    reduction = given.get("reduction", "mean")
    if deprecated != (None, None):
        reduction = reduction_of(*deprecated)
    if reduction != "mean":
        given.pop("denominator", None)
    if given.get("negative_slope") == 0.0:
        given["negative_slope"] = -0.5
        given.pop("inplace", None)  # torch lacks it, too
    if isinstance(op, OF_CLASSES):
        found = of_classes(rng, elements, op, given)
    elif isinstance(op, Divergence):
        *rows, classes = shape_of(rng, elements, rng.choice([1, 2, 3]))
        classes = 5 if classes == 1 else classes  # torch's value would be a rounding error
        k = rng.randint(1, max(classes // 2, 1))
        found = predictions((*rows, classes), rng.randint(1, 20), k)
        found["logits"] *= rng.choice([1.0, 8.0])
    elif isinstance(op, Contrastive):
        pairs, features = shape_of(rng, math.isqrt(elements), 1), shape_of(rng, 64, 1)
        found = operands(op, [*pairs, *features], given)  # elements are logits
    elif isinstance(op, EmbeddingLoss):
        shape = shape_of(rng, elements, rng.choice([1, 2, 2, 2 if op.has_target else 3]))
        if shape[-1] == 1:
            shape[-1] = 5  # with one feature, gradients cancel
        given["margin"] = (
            given.get("margin", 1.0) + 0.0137
        )  # exceeds any difference of a few features
        found = {
            name: x[:1] if x.dim() > 1 and rng.once_in(8) else x  # broadcasts
            for name, x in operands(op, shape, given).items()
        }
    elif isinstance(op, (Activation, Softmax)):
        found = of_one_shape(rng, elements, op, given)
    else:
        found = of_elements(rng, elements, op, given)
    if op in (LOG_PROBS, KL_DIV_WITH_LOGITS):
        of_language_model = isinstance(op, Divergence) or rng.once_in(2)
        given["dim"] = -1 if of_language_model else 1
        if found["logits"].dim() < 3:
            del given["dim"]
        elif op is LOG_PROBS and of_language_model:
            found["logits"] = found["logits"].movedim(1, -1)
    if "token_weight" in found:
        found["token_weight"] = found["token_weight"].sub(0.2).clamp(min=0)
    same = [*SAME_VALUES.values()]
    chosen = same if "inplace" in given else [*layouts.values()]
    tensors: dict[str, Any] = {}
    for name, operand in declared(op).items():
        alike = op.is_linear or isinstance(op, (MultiMarginLoss, Divergence))
        mixed = tensors and not alike and rng.once_in(20)
        x = found[name]
        if operand.optional and not rng.once_in(3):
            continue
        if name == "adapter_weight":  # its features are the last ones of the input
            tensors["linear_weight"] = tensors["linear_weight"].detach()[..., :-RANK]
            tensors["linear_weight"].requires_grad_(not rng.once_in(4))
        if isinstance(x, Tensor):
            if x.is_floating_point():
                x = x.to(rng.choice(FLOATS) if mixed else dtype)
            if x.numel():  # repeated classes are an error
                x = rng.choice(same if name == "teacher_indices" else chosen)(x)
            if operand.differentiated and x.is_floating_point() and x.frac().any():  # not integers
                x.requires_grad_(not rng.once_in(4))
        tensors[name] = x
    if "linear_weight" in tensors and tensors["linear_weight"].stride(0) == 0:
        given = without_metrics(given)  # all logits are equal up to rounding
    return Call(op, tensors | given, rng.choice(chosen), seed)


def without_metrics(given: dict[str, Any]) -> dict[str, Any]:
    return {n: x for n, x in given.items() if n not in ("with_metrics", "return_metrics")}


def shape_of(rng: Random, elements: int, dims: int) -> list[int]:
    """Draws a shape; any dimension may be the long one."""
    shape = []
    for _ in range(dims):
        most = min(elements, 9) if rng.once_in(2) else elements
        shape.append(0 if rng.once_in(50) else 1 + int(rng.random() * most))
        elements //= max(shape[-1], 1)
    return rng.sample(shape, dims)


def of_classes(
    rng: Random, elements: int, op: Operator, given: dict[str, Any]
) -> dict[str, Tensor]:
    margin = isinstance(op, MultiMarginLoss)
    shape = shape_of(rng, elements, rng.choice([1, 2] if margin else [1, 2, 3, 4]))
    of_class = len(shape) > 1
    if shape[of_class] == 1 and not rng.once_in(8):
        shape[of_class] = 5  # calls with one class fall back to torch
    if margin:  # torch returns uninitialised memory for an empty mean
        shape = [max(n, 1) for n in shape]
    classes = shape[of_class]
    soft = any(o.indices and o.differentiated for o in op.operands) and rng.once_in(3)
    found = operands(op, shape, given, soft, rng.randint(1, 20))
    if not soft:
        found["target"] = class_indices(rng, op, found["logits"], given)
    if soft or "label_smoothing" in given:
        given.pop("gamma", None)
    if soft:
        given.pop("ignore_index", None)
    if classes == 1:
        given.pop("loss_dtype", None)  # torch would compute in this dtype
    logits = found["logits"].mul_(rng.choice([0.5, 4.0]))
    if not given.keys() & {*ROUNDED, "gamma"} and logits.numel() and classes > 1:
        logits += 1e4 if rng.once_in(6) else 0.0
        if rng.once_in(4):  # metrics and loss of inf are NaN
            statistics = "with_metrics" in given or op is LOG_PROBS
            special = [-math.inf, math.nan, math.inf][: 3 - statistics]
            logits.view(-1)[torch.randint(logits.numel(), (3,))] = rng.choice(special)
    if "linear" in op.name and of_class and rng.once_in(4):  # hidden states with more dimensions
        for name in ("input", "target", "token_weight"):
            found[name] = found[name].unsqueeze(1)
    return found


def class_indices(rng: Random, op: Operator, logits: Tensor, given: dict[str, Any]) -> Tensor:
    """Draws class indices, some or all of which are ignored, or out of range."""
    classes, rows = logits.shape[logits.dim() > 1], loss_shape(logits, "none")
    target = torch.randint(max(classes, 1), rows)
    if op.operands[1].labels:
        target = labels(logits.shape)
    if not isinstance(op, MultiMarginLoss):
        ignored = torch.rand(rows) < rng.choice([0.0, 0.3, 0.3, 1.0])
        target[ignored] = given.get("ignore_index", -100)
        if logits.dim() == 2 and target.byte().equal(target) and rng.once_in(4):
            target = target.byte()
    if target.numel() and backend is cpu and rng.once_in(30) and classes < 256:
        target.view(-1)[-1] = classes  # raises on CPU, NaN on a GPU
    return target


def of_one_shape(
    rng: Random, elements: int, op: Operator, given: dict[str, Any]
) -> dict[str, Tensor]:
    shape = shape_of(rng, elements, rng.randint(0, 4))
    found = {o.name: torch.randn(shape) * rng.choice([1.0, 8.0]) for o in op.operands}
    x = found[op.operands[0].name]
    if x.numel() and op.name not in NAN_OF_VECTORS and rng.once_in(4):
        x.view(-1)[torch.randint(x.numel(), (3,))] = math.nan
    if isinstance(op, Softmax) and not rng.once_in(20):  # rarely a dimension that does not exist
        given["dim"] = given["dim"] % max(x.dim(), 1) - x.dim() * (given["dim"] < 0)
    return found


def of_elements(rng: Random, elements: int, op: Operator, given: dict[str, Any]) -> dict[str, Any]:
    shape, scale = shape_of(rng, elements, rng.randint(0, 4)), rng.choice([1 / 16, 1 / 4, 1.0])
    found: dict[str, Any] = {}
    if isinstance(op, Halves) and -len(shape) <= given.get("dim", -1) < len(shape):
        shape[given.get("dim", -1)] *= 2
    for operand in op.operands:
        own = tuple(shape)
        if op is PRELU and found:  # slopes of PReLU
            own = rng.choice([(), (1,), tuple(shape[1:2]), (3,)])
        elif rng.once_in(4) and len(op.operands) > 1:  # broadcasts
            own = tuple(rng.choice([1, n]) for n in shape)[rng.randint(0, len(shape)) :]
            shape = [*own] if op is PRELU else shape
        x = draw(operand, own, scale=scale)
        if found and operand.low == 0 and rng.once_in(2):
            x = x.round()  # integers: labels, counts
        if not found and given.get("log_input") is False:
            x = x.abs()
        found[operand.name] = 0.5 if operand.number and rng.once_in(4) else x
    return found


# ---- checks --------------------------------------------------------------------------------------


def check_call(call: Call, function: Callable[..., Any] | None = None) -> None:
    """Compares values, gradients and dtypes with torch, or expects an error if torch raises one."""
    function = function or ours
    try:
        native = natively(call)
    except ERRORS:
        with pytest.raises(ERRORS):  # if there are several errors, any may be raised
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
        if precision(call) > EPS:  # intermediate results are rounded, also by torch
            allowed += 2 * largest(expected.double() - exact)
        near = ((got.double() - exact).abs() <= allowed) | (got == exact.to(got.dtype))
        overflow = exact.isfinite() & ~(got.isfinite() | expected.isfinite())
        right = near | (got == expected) | (got.isnan() & exact.isnan()) | overflow
        assert right.all(), f"{got[~right][:3]}, expected {exact[~right][:3]}"


def tolerances(call: Call, native: list[Tensor]) -> list[float]:
    """Returns the absolute error allowed for each result, besides two roundings.

    This is a multiple of torch's float32 error, the largest of four calls, scaled to the kernel's
    precision. In float64, torch's sums have errors, too, as have matrix products in any dtype.
    Where all terms cancel, for example with one class, a rounding of each term remains.
    """
    linear = call.op.is_linear
    few = 64 if linear or precision(call) < EPS else 4
    mean = call.given.get("reduction") in ("mean", "batchmean")
    mean = mean and not call.given.keys() & {*DEPRECATED, "denominator"}
    lost = [EPS / max(native[-1].numel(), 1) if mean else EPS] * len(native)
    if isinstance(call.op, Composed):
        terms = max(x.numel() for x in call.given.values() if isinstance(x, Tensor))
        lost = [
            error * max(1, terms / max(x.numel(), 1)) for error, x in zip(lost, native, strict=True)
        ]
    if isinstance(call.op, Divergence):  # rows in which both agree leave a rounding error
        first, lost[0] = next(iter(call.given.values())), EPS
        if call.given.get("reduction") == "sum":
            lost[0] *= max(1, first.numel() // max(1, first.shape[call.given.get("dim", -1)]))
    for factor in (1.0, 0.9, 0.7, 0.4):
        single = converted(call, torch.float32, factor)
        pairs = zip(run(single, reference), of_reference(single, torch.float64), strict=True)
        errors = [largest(x.double() - y.double()) + EPS * largest(y) for x, y in pairs]
        lost = [max(pair) for pair in zip(lost, errors, strict=True)]
    if isinstance(call.op, MultiMarginLoss):  # torch sums sequentially
        terms = call.given["target"].numel() * EPS / 2
        lost = [max(e, terms * largest(x) / few) for e, x in zip(lost, native, strict=True)]
    return [few * precision(call) / EPS * error for error in lost]


def largest(x: Tensor) -> float:
    return float(x[x.isfinite()].double().abs().max()) if x.isfinite().any() else 0.0


def precision(call: Call) -> float:
    """Returns the epsilon of the dtype of the computation, or of rounded intermediate results."""
    tensors = [x for x in call.given.values() if isinstance(x, Tensor)]
    dtype = call.given.get("dtype", tensors[0].dtype)
    # softmax saves its rounded output; gradients of broadcast operands are sums of rounded terms.
    rounds = isinstance(call.op, Softmax) or getattr(call.op, "saves", "") == "output"
    rounds |= isinstance(call.op, Composed) or call.op.is_linear
    rounds |= bool(call.given.keys() & {"inplace", *ROUNDED})  # in place, the output is saved
    rounds |= (
        not isinstance(call.op, (*OF_CLASSES, Divergence)) and len({x.shape for x in tensors}) > 1
    )
    halves = [torch.finfo(x).eps for x in (dtype, *(x.dtype for x in tensors)) if x in HALF]
    if halves and rounds:  # kl_div computes log(target) in the target's dtype
        return max(halves)
    dtypes = {dtype, *(x.dtype for x in tensors if x.is_floating_point())}
    return torch.finfo(torch.float64).eps if dtypes == {torch.float64} else EPS


# ---- running a call ------------------------------------------------------------------------------


def run(call: Call, function: Callable[..., Any]) -> list[Tensor]:
    """Returns the results, followed by the gradients."""
    results, gradients = forward(call, function)
    return [x.detach() for x in (*results, *gradients())]


def forward(
    call: Call, function: Callable[..., Any]
) -> tuple[list[Tensor], Callable[[], Sequence[Tensor]]]:
    """Returns the results, and a function that runs backward and can be called repeatedly."""
    leaves = [x for x in call.given.values() if isinstance(x, Tensor) and x.requires_grad]
    found = function(call, **call.given)
    loss, *metrics = (found[0], *found[1]) if isinstance(found, tuple) else (found,)
    generator = torch.Generator().manual_seed(call.seed)
    grad_output = torch.randn(loss.shape, generator=generator, device="cpu").to(loss.device)
    grad_output = grad_output.bfloat16().to(loss.dtype)  # the same values in all dtypes
    grad_output = call.layout(grad_output) if grad_output.numel() else grad_output
    retain = not call.given.get("inplace")

    def gradients() -> Sequence[Tensor]:
        return torch.autograd.grad(loss, leaves, grad_output, retain) if leaves else ()

    return [loss, *metrics], gradients


def reference(call: Call, **given: Any) -> Any:
    """Calls torch's function, with logits of ignored rows set to 0 to avoid NaN gradients."""
    if call.op is CROSS_ENTROPY and not given["target"].is_floating_point():
        x, target = given["input"], given["target"]
        counts = target.reshape(loss_shape(x, "none")) != given.get("ignore_index", -100)
        given["input"] = x.where(counts.unsqueeze(min(x.dim() - 1, 1)), 0)
    return catalogue.reference(call, **given)


def natively(call: Call) -> list[Tensor]:
    """Calls torch with contiguous tensors, because some operators support no other strides."""
    dtype = next(iter(call.given.values())).dtype
    try:
        return of_reference(call)
    except NotImplementedError:  # torch lacks the loss in half precision
        return [x.to(dtype) for x in of_reference(call, torch.float32)]


def of_reference(call: Call, dtype: torch.dtype | None = None) -> list[Tensor]:
    return run(converted(call, dtype), reference)


def converted(call: Call, dtype: torch.dtype | None = None, factor: float = 1.0) -> Call:
    """Returns a contiguous call, optionally converted; differentiated tensors are scaled."""
    first = call.given.get("dtype") if dtype else None  # softmax converts its input to dtype

    scaled = [operand.name for operand in call.op.operands if operand.differentiated]

    def convert(name: str, x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        y = x.detach().to(first or x.dtype).to(dtype or x.dtype).contiguous()
        return (y * factor if name in scaled else y).requires_grad_(x.requires_grad)

    given = {name: convert(name, x) for name, x in call.given.items()}
    given |= {name: None for name in ("dtype", "loss_dtype", "options") if dtype and name in given}
    return replace(call, given=given, layout=lambda x: call.layout(x).contiguous())
