"""Runs calls of an operator, and compares their results with torch in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import catalogue
import pytest
import torch
from catalogue import ROUNDED, Call, ours
from compare import DEVICE, HALF, assert_accurate, largest
from samples import is_divergence
from torch import Tensor

from pyfused.layout import loss_shape
from pyfused.ops.operators import CROSS_ENTROPY
from pyfused.ops.rows import RowOperator
from pyfused.ops.softmax import Softmax

EPS = torch.finfo(torch.float32).eps
ERRORS = (IndexError, RuntimeError, TypeError, ValueError)


def check_call(call: Call) -> None:
    """Compares values, gradients and dtypes with torch; if torch raises, expects an error."""
    try:
        natively(call)
    except ERRORS:
        with pytest.raises(ERRORS):  # if there are several errors, any may be raised
            run(call, ours)
    else:
        check_valid_call(call)


def check_valid_call(call: Call) -> None:
    """Compares values, gradients and dtypes with torch."""
    native, exact = natively(call), of_reference(call, torch.float64)
    results = run(call, ours), native, exact, errors_of_torch(call, native, exact)
    for i, (got, of_torch, best, error) in enumerate(zip(*results, strict=True)):
        assert got.dtype == of_torch.dtype
        if got.is_floating_point():
            assert_accurate(got, best, error, roundings=2, native=of_torch, result=f"result {i}")
        else:
            assert torch.equal(got, best)


def errors_of_torch(call: Call, native: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Returns the absolute error allowed for each result, in addition to two roundings.

    This is a multiple of torch's float32 error, the largest of four calls, scaled to the kernel's
    precision. torch's sums in float64 and matrix products in any dtype also have errors. If all
    terms cancel, for example with one class, a rounding error of each term remains.
    """
    linear = call.op.is_linear
    few = 64 if linear or precision(call) < EPS else 4
    mean = call.given.get("reduction") in ("mean", "batchmean")
    mean = mean and "denominator" not in call.given
    lost = [EPS / max(native[-1].numel(), 1) if mean else EPS] * len(native)
    if is_divergence(call.op):  # equal rows leave a rounding error
        lost = [x / min(1.0, float(call.given.get("temperature", 1.0))) for x in lost]
        first, lost[0] = next(iter(call.given.values())), EPS
        if call.given.get("reduction") == "sum" or "denominator" in call.given:
            lost[0] *= max(1, first.numel() // max(1, first.shape[call.given.get("dim", -1)]))
    for factor in (1.0, 0.9, 0.7, 0.4):
        single = converted(call, torch.float32, factor)
        pairs = zip(run(single, reference), of_reference(single, torch.float64), strict=True)
        errors = [largest(x.double() - y.double()) + EPS * largest(y) for x, y in pairs]
        if call.shared:  # the gradients of one tensor, and the terms of a loss, may cancel
            errors = [max(*errors, EPS * max(map(largest, native)))] * len(native)
        lost = [max(pair) for pair in zip(lost, errors, strict=True)]
    allowed = [few * precision(call) / EPS * error for error in lost]
    if precision(call) > EPS:  # intermediate results are rounded, also by torch
        pairs = zip(native, exact, strict=True)
        rounded = [2 * largest(x.double() - y.double()) for x, y in pairs]
        allowed = [x + y for x, y in zip(allowed, rounded, strict=True)]
    return allowed


def precision(call: Call) -> float:
    """Returns the epsilon of the dtype of the computation, or of rounded intermediate results."""
    tensors = [x for x in call.given.values() if isinstance(x, Tensor)]
    dtype = call.given.get("dtype", tensors[0].dtype)
    # softmax saves its rounded output; gradients of broadcast operands are sums of rounded terms.
    rounds = isinstance(call.op, Softmax) or getattr(call.op, "saves", "") == "output"
    rounds |= call.op.is_linear or bool(call.given.keys() & {*ROUNDED}) or bool(call.shared)
    rounds |= not isinstance(call.op, RowOperator) and len({x.shape for x in tensors}) > 1
    halves = [torch.finfo(x).eps for x in (dtype, *(x.dtype for x in tensors)) if x in HALF]
    if halves and rounds:  # kl_div computes log(target) in the target's dtype
        return max(halves)
    if halves and DEVICE != "cpu":
        return 2e-5  # that of the functions for half precision in kernels/arithmetic.py
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

    def gradients() -> Sequence[Tensor]:
        return torch.autograd.grad(loss, leaves, grad_output, True) if leaves else ()

    return [loss, *metrics], gradients


def reference(call: Call, **given: Any) -> Any:
    """Calls torch's function, with logits of ignored rows set to 0 to avoid NaN gradients."""
    if call.op is CROSS_ENTROPY and not given["target"].is_floating_point():
        x, target = given["input"], given["target"]
        counts = target.reshape(loss_shape(x, "none")) != given.get("ignore_index", -100)
        given["input"] = x.where(counts.unsqueeze(min(x.dim() - 1, 1)), 0)
        if DEVICE != "cpu" and x.dim() == 1 and given.get("reduction") != "none":
            # On GPUs, torch's mean of one ignored row is 0 instead of NaN.
            given |= {"input": given["input"][None], "target": target.reshape(1)}
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

    # One object remains one object, whose gradient is the sum over all its uses.
    once = {id(x): convert(name, x) for name, x in reversed(call.given.items())}
    given = {name: once[id(x)] for name, x in call.given.items()}
    given |= {name: None for name in ("dtype", "loss_dtype", "options") if dtype and name in given}
    return replace(call, given=given, layout=lambda x: call.layout(x).contiguous())
