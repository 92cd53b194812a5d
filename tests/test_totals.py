"""Sums on the device: the kernels of `reductions.py`, and their use in the losses."""

from __future__ import annotations

import math
from unittest.mock import patch

import pytest
import torch
from conftest import backend
from torch import Tensor

from pyfused.backends import cpu

if backend is cpu:
    pytest.skip("of Triton kernels", allow_module_level=True)

from pyfused import functional as fused
from pyfused.backends import triton


@pytest.fixture(autouse=True)
def parts_of_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "MOST_PARTS", 3000)


@pytest.mark.parametrize("n", [1, 2, 1024, 1025, 3000, 3001, 100_003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_sum(n: int, dtype: torch.dtype) -> None:
    """In one step or two, in float64 for any dtype of the partial sums."""
    parts = torch.randn(n, dtype=dtype)
    exact = math.fsum(parts.tolist())
    for out in (torch.empty(()), torch.empty((), dtype=torch.float64)):
        triton._add_up((out, parts))
        torch.testing.assert_close(out, torch.tensor(exact).to(out), rtol=0, atol=1e-6 * n**0.5)
    assert abs(out.item() - exact) <= 1e-12 * n**0.5


def test_sum_of_nan_and_infinity() -> None:
    parts, out = torch.ones(40_000, dtype=torch.float64), torch.empty(())
    for value in (math.inf, -math.inf, math.nan):
        parts[39_999] = value
        triton._add_up((out, parts))
        assert str(out.item()) == str(value)


def counted(target: Tensor, weights: list[Tensor | None], ignore_index: int) -> float:
    """Counts with torch's operators."""
    weight, token_weight = weights
    valid = (target != ignore_index) & (target >= 0) & (target < 7)
    counts = valid.double()
    if weight is not None:
        counts *= weight[target.where(valid, 0)]
    if token_weight is not None:
        counts *= token_weight.flatten()
    return counts.sum().item()


@pytest.mark.parametrize("n", [1, 5, 1025, 40_000, 400_000])
@pytest.mark.parametrize("weighted", range(4))
@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_count(n: int, weighted: int, ignore_index: int) -> None:
    """Ignored and out-of-range targets do not count."""
    target = torch.randint(-1, 9, (n,))
    target[::4] = -100
    weights = [
        torch.rand(7) if weighted & 1 else None,
        torch.rand(n, dtype=torch.float64) if weighted & 2 else None,
    ]
    got = triton._count(target, *weights, ignore_index, 7)
    assert (got.dtype, got.shape) == (torch.float64, ())
    assert got.item() == pytest.approx(counted(target, weights, ignore_index), rel=1e-12)


@pytest.mark.parametrize("factor", [1.0, 0.5, math.nan])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_scale(factor: float, dtype: torch.dtype) -> None:
    x = torch.randn(5000).to(dtype)
    expected = x * factor
    triton.scale_(x, torch.tensor(factor))
    torch.testing.assert_close(x, expected, rtol=0, atol=0, equal_nan=True)


def test_grid_stride_loops() -> None:
    """More blocks than programs, and several partial sums."""
    x, target = torch.randn(2, 4999, dtype=torch.float64)
    torch.testing.assert_close(fused.mse_loss(x, target), (x - target).square().mean())
    torch.testing.assert_close(fused.mse_loss(x[:1], target[:1]), (x - target)[0].square())


def test_the_last_program_to_arrive_adds_up() -> None:
    """If there are many programs, a second kernel adds up their sums."""
    for n in (700, 33, 320, 32, 640):  # 22 programs exceed the limit of arrivals
        x, target = torch.randn(2, n, dtype=torch.float64)
        with patch.object(triton, "SUM", wraps=triton.SUM) as launched:
            got = fused.mse_loss(x, target)
        assert got.item() == pytest.approx((x - target).square().mean().item(), rel=1e-14)
        assert launched.called == (n == 700)


def test_the_sum_of_no_elements_is_zero() -> None:
    out = torch.full((), math.nan)
    triton._add_up(triton._parts_of(out, 0, 0))
    assert out.item() == 0


def test_each_call_has_its_own_counter() -> None:
    """Shared counters would belong to the memory pool of a CUDA graph, or to several graphs."""
    first, second = (triton._parts_of(torch.empty(()), 4, 100) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert one.data_ptr() != other.data_ptr()
    assert second[2].tolist() == [0]
