"""Activations match torch for NaN, signed zeros, gradients at kinks, and in place."""

from __future__ import annotations

import interpreter
import pytest
import torch
from compare import FLOATS, assert_accurate, parameters, torch_function
from conftest import KernelCalls
from grid import grid
from samples import ACTIVATIONS, SAMPLES
from torch import Tensor

from pyfused import functional as fused
from pyfused.ops.activation import Activation

INF, NAN = float("inf"), float("nan")
OVERWRITING = [op.name for op in ACTIVATIONS if "inplace" in parameters(op)]
close = torch.testing.assert_close


def bits(x: Tensor) -> Tensor:
    """Returns values that distinguish -0.0 from 0.0, and NaN from numbers."""
    return torch.stack([x.nan_to_num(nan=5.0).double(), x.signbit().double() * ~x.isnan()])


def extremes(dtype: torch.dtype) -> list[float]:
    """Returns zeros, infinities, and the smallest, subnormal and largest finite numbers."""
    info = torch.finfo(dtype)
    least = info.smallest_normal * info.eps
    sizes = [0.0, least, info.smallest_normal / 2, info.smallest_normal, info.max, INF]
    return [sign * size for size in sizes for sign in (1, -1)]


def widest(op: Activation, x: Tensor) -> Tensor:
    """Returns x on the CPU, because torch's kernels for GPUs treat NaN and -0.0 differently.

    It is float64 where torch's vectorised functions are wrong for inf and 3e38, as for gelu.
    """
    x = x.detach().cpu()
    return (x.double() if op.saves == "input" else x).requires_grad_()


# ---- special values ------------------------------------------------------------------------------


@pytest.mark.interpreted
@grid(op=ACTIVATIONS, dtype=FLOATS, repeats=[1, 3, 20])
def test_nan_infinities_and_signed_zeros(op: Activation, dtype: torch.dtype, repeats: int) -> None:
    x = torch.tensor([NAN, -NAN, 1.0, *extremes(dtype)], dtype=dtype).repeat(repeats)
    got, expected = getattr(fused, op.name)(x), torch_function(op)(widest(op, x)).to(x)
    tolerance = {"rtol": 0.0, "atol": 0.0}
    if SAMPLES[op.name].rounds:
        eps, normal = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
        tolerance = {"rtol": 2 * eps, "atol": 16 * eps * normal}  # softcap scales a rounding error
        rounded_to_zero = (got == 0) & (expected == 0) & (x != 0)  # either sign
        got = got.where(~rounded_to_zero, expected)
    subnormal = (expected != 0) & (expected.abs() < torch.finfo(dtype).tiny)
    if op.name in ("softcap", "elu", "selu", "celu"):
        largest = expected.abs() + torch.finfo(dtype).tiny * torch.finfo(dtype).eps
        assert (got.abs() <= largest)[subnormal].all()  # may be flushed to 0
        got = got.where(~subnormal, expected)
    if interpreter.ON and dtype is torch.bfloat16:  # Triton's interpreter rounds them wrongly
        got = got.where(~subnormal, expected)
    close(bits(got), bits(expected), **tolerance)


@pytest.mark.interpreted
@grid(op=ACTIVATIONS, dtype=FLOATS)
def test_gradients_at_kinks_and_infinities(op: Activation, dtype: torch.dtype) -> None:
    """Compares gradients at kinks, and with NaN and infinite grad_output."""
    points = torch.tensor([NAN, -1.0, 1.0, *extremes(dtype)], dtype=dtype)
    grad_outputs = torch.tensor([2.0, NAN, INF, -0.0]).to(dtype)
    x = points.repeat_interleave(4).requires_grad_()
    grad_output = grad_outputs.repeat(len(points))
    (got,) = torch.autograd.grad(getattr(fused, op.name)(x), x, grad_output)
    wide = widest(op, x)
    (expected,) = torch.autograd.grad(torch_function(op)(wide), wide, grad_output.to(wide))
    roundings = 0 if not SAMPLES[op.name].rounds else 8 if SAMPLES[op.name].cancels else 4
    assert_accurate(got, expected.to(x), 0, roundings, input=x, grad_output=grad_output)


# ---- in place ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OVERWRITING)
def test_in_place_is_torchs(name: str, kernel_calls: KernelCalls) -> None:
    """Values, gradients and errors are torch's; the function returns its argument."""
    outcomes = []
    for functional in (fused, torch.nn.functional):
        leaf = torch.linspace(-8, 8, 50).requires_grad_()
        x = leaf * 1
        y = getattr(functional, name)(x, inplace=True)
        assert y is x
        try:
            outcomes.append((y, torch.autograd.grad(y.sum(), leaf)))
        except RuntimeError as error:  # of the input, which the gradient needs
            outcomes.append((y, str(error)))
        with pytest.raises(RuntimeError, match="leaf"):
            getattr(functional, name)(leaf, inplace=True)
    close(*[outcome[0] for outcome in outcomes], rtol=0, atol=0)
    assert str(outcomes[0][1]) == str(outcomes[1][1])
    assert not kernel_calls.total()
