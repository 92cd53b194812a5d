"""softmax and log_softmax match torch, along any dimension with any strides."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import interpreter
import numpy as np
import pytest
import torch
from catalogue import Call
from check_calls import check_valid_call
from compare import FLOATS, Errors, extended, random_grad_output
from conftest import ISAS, KernelCalls
from grid import grid
from torch.nn import functional as F

from pyfused import functional as fused
from pyfused.ops.operators import OPERATORS

INF, NAN = float("inf"), float("nan")
NAMES = "softmax", "log_softmax"

# Contiguous and strided rows, with sizes within a tile, a group, a block of groups, a chunk and a
# cached row, and larger.
SHAPES: list[tuple[tuple[int, ...], int]] = [
    *(((7,), 0), ((1,), -1), ((5, 2), 1), ((130, 33), 1), ((3, 127), -1), ((3, 129), -1)),
    *(((37, 16), 1), ((900, 37), 1), ((19, 256), 1), ((9, 512), 1), ((19, 1000), 1)),
    *(((2, 1025), 1), ((2, 9000), 1), ((2, 3, 4, 65), 3), ((2, 21, 7, 9), 1), ((2, 150, 9), 1)),
    *(((300, 40), 0), ((40, 3, 5), -3), ((4, 1, 6), 1)),
]
if interpreter.ON:
    SHAPES = [(shape, dim) for shape, dim in SHAPES if math.prod(shape) < 2000]


@pytest.mark.interpreted
@grid(name=NAMES, case=SHAPES, dtype=FLOATS, isa=ISAS)
def test_as_accurate_as_torch(
    name: str, case: tuple[Any, int], dtype: torch.dtype, isa: str, kernel_calls: KernelCalls
) -> None:
    shape, dim = case
    errors = Errors()
    for scale in (1, 20):
        x = (scale * torch.randn(shape)).to(dtype).requires_grad_()
        grad_output = random_grad_output(shape).to(x)
        got, expected = (getattr(functional, name)(x, dim) for functional in (fused, F))
        assert got.is_contiguous()
        wide = extended(x)
        shifted = wide - wide.max(dim, keepdims=True)
        lse = np.log(np.exp(shifted).sum(dim, keepdims=True))
        exact = shifted - lse if name == "log_softmax" else np.exp(shifted - lse)
        errors.add("value", got, expected, exact)
        gradients = [torch.autograd.grad(y, x, grad_output)[0] for y in (got, expected)]
        y, dy = extended(got), extended(grad_output)  # exact gradient of the rounded output
        if name == "softmax":
            ideal = y * (dy - (dy * y).sum(dim, keepdims=True))
            term = float(abs(y * dy).max())
        else:
            subtracted = np.exp(y) * dy.sum(dim, keepdims=True)
            ideal = dy - subtracted
            term = float(max(abs(dy).max(), abs(subtracted).max()))
        errors.add("gradient", *gradients, ideal, term)
    errors.check(roundings=4 if dtype == torch.float64 else 2)
    assert kernel_calls == {name: 2, f"{name}_backward": 2}


@pytest.mark.interpreted
@grid(name=NAMES, dtype=FLOATS, classes=[5, 200], dim=[0, 0, 1, 1])
def test_infinities_and_nan(name: str, dtype: torch.dtype, classes: int, dim: int) -> None:
    x = torch.randn(4, classes)
    x[0] = -INF
    x[1, 2], x[2, 3], x[3, :4] = INF, NAN, -INF
    masked = torch.randn(4, classes).index_fill(1, torch.tensor(1), -INF)
    for input in (x.to(dtype), masked.to(dtype).requires_grad_()):
        check_valid_call(Call(OPERATORS[name], {"input": input, "dim": dim}))


@pytest.mark.cpu
@grid(classes=[5, 60, 300, 1100, 9000], dim=[0, 1], dtype=FLOATS, isa=ISAS, count=[1, 2])
def test_subnormal_results(
    classes: int, dim: int, dtype: torch.dtype, isa: str, count: int, threads: Callable[[int], None]
) -> None:
    """Probabilities may be subnormal, as in torch; gradients are flushed to 0."""
    threads(count)
    least = torch.finfo(dtype if dtype in (torch.float64, torch.bfloat16) else torch.float32).tiny
    x = torch.linspace(1.2, 0.9, 70)[:, None] * np.log(least) + torch.rand(70, classes)
    x[:, 0] = 0  # all other classes are masked
    x = x.to(dtype).movedim(1, dim).requires_grad_()
    y = fused.softmax(x, dim)
    exact, eps = x.detach().double().softmax(dim), torch.finfo(dtype).eps
    least_bit = torch.finfo(dtype).tiny * eps
    assert ((y.double() - exact).abs() <= 8 * eps * exact + least_bit).all()
    (gradient,) = torch.autograd.grad(y, x, torch.rand(y.shape).to(dtype))
    if isa != "generic":  # subnormal numbers are not flushed in this build
        assert not ((gradient != 0) & (gradient.double().abs() < least)).any()
    assert torch.tensor(1e-30) * 1e-10 > 0  # torch's denormals are not flushed
