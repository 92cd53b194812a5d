"""Sums on the device: the kernels of `reductions.py`, and their use in the losses."""

from __future__ import annotations

import math
from unittest.mock import Mock, patch

import pytest
import torch
from conftest import backend
from torch import Tensor

from pyfused.backends import cpu

if backend is cpu:
    pytest.skip("tests the Triton kernels", allow_module_level=True)

from pyfused import functional as fused
from pyfused.backends import triton
from pyfused.types import CrossEntropyOptions


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
    token_weight = torch.rand(n, dtype=torch.float64) if weighted & 2 else None
    weights = [torch.rand(7) if weighted & 1 else None, token_weight]
    with patch.object(triton, "COUNTED_BY_PROGRAMS", 0):
        targets = target, *weights, ignore_index
        got = triton._divisor(CrossEntropyOptions(), target, n, targets, None, 7)
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
    """There are more blocks than programs, and several partial sums."""
    x, target = torch.randn(2, 4999, dtype=torch.float64)
    torch.testing.assert_close(fused.mse_loss(x, target), (x - target).square().mean())
    torch.testing.assert_close(fused.mse_loss(x[:1], target[:1]), (x - target)[0].square())


def test_the_last_program_to_arrive_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counters are 0 again afterwards. torch adds up the partial sums of many programs."""
    counters, sums = torch.zeros(99, dtype=torch.int32), list[int]()
    add_up = Tensor.sum
    monkeypatch.setattr(triton, "_counters", lambda _: counters)
    monkeypatch.setattr(triton, "MOST_PROGRAMS", 1000)
    monkeypatch.setattr(triton, "MOST_ARRIVALS", 600)
    monkeypatch.setattr(Tensor, "sum", lambda parts: sums.append(parts.numel()) or add_up(parts))
    for programs in (22, 2, 256, 1, 257, 10, 600, 601):  # of 32 elements, in groups of 256 programs
        x, target = torch.randn(2, 32 * programs - 5, dtype=torch.float64)
        got = fused.mse_loss(x, target)
        assert got.item() == pytest.approx((x - target).square().mean().item(), rel=1e-14)
        assert not counters.any()
    assert sums == [601]


def test_the_sum_of_no_elements_is_zero() -> None:
    out = torch.full((), math.nan)
    triton._run(Mock(), 0, (), out, ())
    assert out.item() == 0


@pytest.mark.parametrize("default", [True, False])
def test_default_streams_share_counters(default: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared counters would belong to the memory pool of a CUDA graph, or to several graphs."""
    monkeypatch.setattr(triton, "on_default_stream", lambda _: default)
    first, second = (triton._counters(torch.device("cpu")) for _ in range(2))
    assert (first.data_ptr() == second.data_ptr()) is default
    assert not first.any()
