"""Activations match torch for NaN, signed zeros, gradients at kinks, and in place."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from catalogue import overwrites
from compare import DEVICE, FLOATS
from conftest import KernelCalls
from grid import grid
from layouts import SAME_VALUES
from samples import ACTIVATIONS, SAMPLES
from torch import Tensor
from torch_reference import torch_function

import pyfused
from pyfused import functional as fused
from pyfused.ops.activation import Activation

INF, NAN = float("inf"), float("nan")
IN_TORCH = "sigmoid", "tanh"  # in-place variants are torch.sigmoid_ and torch.tanh_
OVERWRITING = [op for op in ACTIVATIONS if overwrites(op)]
close = torch.testing.assert_close


def ours(op: Activation, inplace: bool = False) -> Callable[[Tensor], Tensor]:
    if not inplace:
        return partial(getattr(fused, op.name), **op.required)
    if not overwrites(op):
        pytest.skip("torch has no in-place variant")
    if op.name in IN_TORCH:
        return patched(op)
    return partial(getattr(fused, op.name), **op.required, inplace=True)


def patched(op: Activation) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        with pyfused.patch():
            return of_torch(op, True)(x)

    return call


def of_torch(op: Activation, inplace: bool = False) -> Callable[[Tensor], Tensor]:
    if inplace and op.name in IN_TORCH:
        return lambda x: getattr(torch, f"{op.name}_")(x)
    return partial(torch_function(op), **op.required, **({"inplace": True} if inplace else {}))


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
    """Returns x in float64, because torch's vectorised gelu is wrong for inf and 3e38."""
    return x.detach().double().requires_grad_() if op.saves == "input" else x


# ---- special values ------------------------------------------------------------------------------


@pytest.mark.interpreted
@grid(op=ACTIVATIONS, dtype=FLOATS, repeats=[1, 3, 20], inplace=[False, False, True, True])
def test_nan_infinities_and_signed_zeros(
    op: Activation, dtype: torch.dtype, repeats: int, inplace: bool
) -> None:
    x = torch.tensor([NAN, -NAN, 1.0, *extremes(dtype)], dtype=dtype).repeat(repeats)
    wide = x if inplace and op.saves == "input" else widest(op, x)  # torch overwrites the input
    got, expected = ours(op, inplace)(x.clone()), of_torch(op)(wide).to(dtype)
    tolerance = {"rtol": 0.0, "atol": 0.0}
    if SAMPLES[op.name].rounds:
        eps, normal = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
        tolerance = {"rtol": 2 * eps, "atol": 16 * eps * normal}  # softcap scales a rounding error
        rounded_to_zero = (got == 0) & (expected == 0) & (x != 0)  # either sign
        got = got.where(~rounded_to_zero, expected)
    if op.name in ("softcap", "elu", "selu", "celu"):
        subnormal = (expected != 0) & (expected.abs() < torch.finfo(dtype).tiny)
        assert (got[subnormal].abs() <= expected[subnormal].abs()).all()  # may be flushed to 0
        got = got.where(~subnormal, expected)
    if DEVICE != "cpu" and op.name == "relu":  # torch's relu(-0.0) is 0.0 on GPUs
        got = got + 0.0
    close(bits(got), bits(expected), **tolerance)


@pytest.mark.interpreted
@grid(op=ACTIVATIONS, dtype=FLOATS)
def test_gradients_at_kinks_and_infinities(op: Activation, dtype: torch.dtype) -> None:
    """Compares gradients at kinks, and with NaN and infinite grad_output."""
    points = torch.tensor([NAN, -1.0, 1.0, *extremes(dtype)], dtype=dtype)
    grad_outputs = torch.tensor([2.0, NAN, INF, -0.0]).to(dtype)
    x = points.repeat_interleave(4).requires_grad_()
    grad_output = grad_outputs.repeat(len(points))
    (got,) = torch.autograd.grad(ours(op)(x), x, grad_output)
    wide = widest(op, x)
    (expected,) = torch.autograd.grad(of_torch(op)(wide), wide, grad_output.to(wide.dtype))
    expected = expected.to(dtype)
    if op.name == "hardsigmoid":
        pytest.skip("torch's slope is 1 / 6 rounded to float32") if dtype is torch.float64 else None
    roundings = 0 if not SAMPLES[op.name].rounds else 8 if SAMPLES[op.name].cancels else 4
    tolerance = {"rtol": roundings * torch.finfo(dtype).eps, "atol": 0}
    close(got, expected, **tolerance, equal_nan=True)


@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
def test_negative_slopes_fall_back_to_torch(inplace: bool, kernel_calls: KernelCalls) -> None:
    x = torch.randn(50, requires_grad=True)
    outcomes: list[Any] = []
    for functional in (pyfused.functional, torch.nn.functional):
        y = functional.leaky_relu(x * 1, -0.5, inplace)
        try:
            outcomes.append((y, torch.autograd.grad(y.sum(), x)))
        except RuntimeError as error:
            outcomes.append(str(error))
    assert not kernel_calls.total()
    assert inplace == isinstance(outcomes[1], str)
    close(*outcomes) if not inplace else None
    assert not inplace or outcomes[0] == outcomes[1]


# ---- in place ------------------------------------------------------------------------------------


@grid(op=OVERWRITING, dtype=[*FLOATS, torch.int64])
def test_in_place_writes_into_its_argument(op: Activation, dtype: torch.dtype) -> None:
    x = (4 * torch.randn(100)).to(dtype)
    try:
        expected = of_torch(op, inplace=True)(x.clone())
    except RuntimeError as error:  # not supported for integers
        with pytest.raises(type(error)):
            ours(op, inplace=True)(x)
        return
    version = x._version
    got = ours(op, inplace=True)(x)
    assert got is x
    assert torch.equal(x, expected)
    assert x._version > version


VIEWS = {"rows": slice(1, 3), "columns": (slice(None), slice(1, 3))}


@grid(op=OVERWRITING, view=VIEWS)
def test_in_place_on_a_view_reaches_its_base(op: Activation, view: str) -> None:
    x = torch.randn(4, 6, requires_grad=True)
    bases = []
    for operator in (ours(op, inplace=True), of_torch(op, inplace=True)):
        base = x * 1
        operator(base[VIEWS[view]])
        bases.append(base)
    close(*bases)
    grad_output = torch.randn(4, 6)
    close(*(torch.autograd.grad(base, x, grad_output)[0] for base in bases))


@grid(op=OVERWRITING)
def test_in_place_on_a_tensor_saved_for_backward_raises_torchs_error(op: Activation) -> None:
    x = torch.randn(10, requires_grad=True)
    needed = x.exp()
    y = needed * 2
    ours(op, inplace=True)(needed)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@grid(op=ACTIVATIONS)
def test_results_may_be_changed_in_place_if_torch_allows_it(op: Activation) -> None:
    outcomes: list[Any] = []
    for operator in (ours(op), of_torch(op)):
        x = torch.linspace(-8, 8, 50).requires_grad_()
        y = operator(x)
        y += 1
        try:
            outcomes.append(torch.autograd.grad(y.sum(), x)[0])
        except RuntimeError:
            outcomes.append(None)
    close(*outcomes)


@grid(op=OVERWRITING)
def test_in_place_on_strided_memory_does_not_write_between_elements(op: Activation) -> None:
    memory = torch.randn(8, 10)
    before = memory.clone()
    view = memory[1::2, ::3]
    assert ours(op, inplace=True)(view) is view
    close(memory[1::2, ::3], of_torch(op)(before[1::2, ::3]))
    memory[1::2, ::3] = before[1::2, ::3]
    assert torch.equal(memory, before)


# ---- fallbacks -----------------------------------------------------------------------------------


@grid(op=ACTIVATIONS, layout=["contiguous", "classes_innermost", "transposed"])
def test_activations_keep_the_layout_of_dense_memory(op: Activation, layout: str) -> None:
    x = SAME_VALUES[layout](torch.randn(2, 8, 4, 3))
    assert ours(op)(x).stride() == of_torch(op)(x).stride()
