"""Random calls of every operator, with any of its arguments, against torch in float64.

The other files try what somebody thought of. Here hypothesis draws options, shapes, strides, dtypes
and values together; `HYPOTHESIS_PROFILE=search pytest tests/test_fuzz.py` draws 5000 calls of each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import interpreter
import pytest
import torch
from compare import HALF
from hypothesis import event, given, note, settings
from hypothesis import strategies as st
from random_calls import OF_CLASSES, ROUNDED, Call, random_call
from torch import Tensor

from pyfused import functional as fused
from pyfused.layout import loss_shape
from pyfused.ops.composed import Composed
from pyfused.ops.declaration import Operator
from pyfused.ops.distillation import Divergence
from pyfused.ops.log_probs import LogProbsOfLogits
from pyfused.ops.operators import CROSS_ENTROPY, LINEAR_CROSS_ENTROPY, OPERATORS
from pyfused.ops.softmax import Softmax

EPS = torch.finfo(torch.float32).eps
SIZES = [10, 300] if interpreter.ON else [10, 3000]  # elements at most
ERRORS = (IndexError, RuntimeError, TypeError, ValueError)


@pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")
@pytest.mark.filterwarnings("ignore:size_average and reduce:UserWarning")
@pytest.mark.parametrize("op", OPERATORS.values(), ids=OPERATORS)
def test_call(op: Operator) -> None:
    """All but the size comes from one seed: hypothesis repeats what it draws, in five of six."""

    @settings(max_examples=settings().max_examples * (5 if op is CROSS_ENTROPY else 1))
    @given(st.integers(0, 2**32), st.sampled_from(SIZES))
    def check(seed: int, elements: int) -> None:
        call = random_call(op, seed, elements)
        note(str(call))
        check_call(call)

    check()


def check_call(call: Call) -> None:
    """torch's values, gradients and dtypes, or an error where torch has one."""
    try:
        native = natively(call)
    except ERRORS as error:
        event(f"rejected: {type(error).__name__}")
        with pytest.raises(ERRORS):  # of several faults any may be named
            run(call, ours)
        return
    results = run(call, ours), native, of_reference(call, torch.float64), tolerances(call, native)
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
    mean = mean and not call.given.keys() & {"reduce", "denominator"}
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
    leaves = [x for x in call.given.values() if isinstance(x, Tensor) and x.requires_grad]
    found = function(call, **call.given)
    loss, *metrics = (found[0], *found[1]) if isinstance(found, tuple) else (found,)
    generator = torch.Generator().manual_seed(call.seed)
    grad_output = torch.randn(loss.shape, generator=generator, device="cpu").to(loss.device)
    grad_output = grad_output.bfloat16().to(loss.dtype)  # the same number in all dtypes
    grad_output = call.layout(grad_output) if grad_output.numel() else grad_output
    gradients = torch.autograd.grad(loss, leaves, grad_output) if leaves else ()
    return [x.detach() for x in (loss, *metrics, *gradients)]


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
    given |= {name: None for name in ("dtype", "loss_dtype") if dtype and name in given}
    return replace(call, given=given, layout=lambda x: call.layout(x).contiguous())
