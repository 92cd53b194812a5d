"""Losses that use the kernel of another loss."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from compare import FLOATS, HALF, assert_matches_torch
from conftest import KernelCalls
from grid import grid
from torch import Tensor
from torch.nn import functional as F

from pyfused import functional as fused


@grid(dtype=FLOATS, weight=[None, (3, 5)], reduction=["none", "mean", "sum"])
def test_losses_made_of_another_loss(
    dtype: torch.dtype, weight: tuple[int, ...] | None, reduction: str, kernel_calls: KernelCalls
) -> None:
    x, y = torch.randn(3, 5).to(dtype).requires_grad_(), torch.rand(3, 5).to(dtype)
    given: dict[str, Any] = {"reduction": reduction}
    given["weight"] = None if weight is None else torch.rand(weight).to(dtype)

    def rmse_loss(x: Tensor, y: Tensor, **given: Any) -> Tensor:
        return (F.mse_loss(x, y, **given) + 0.5).sqrt()

    eps = torch.tensor([0.5]).double()
    assert_matches_torch(partial(fused.rmse_loss, eps=eps), rmse_loss, x, y, **given)
    assert "mse_loss" in kernel_calls


@pytest.mark.parametrize("dtype", HALF)
def test_losses_made_of_another_loss_do_not_overflow(dtype: torch.dtype) -> None:
    x, zero = torch.full((2, 60_000), 300.0).to(dtype), torch.zeros(2, 60_000).to(dtype)
    assert fused.rmse_loss(x, zero) == 300


X, Y = torch.linspace(-2, 2, 15).view(3, 5), torch.linspace(0, 1, 15).view(3, 5)


@grid(path=["kernels", "torch"], name=["cross_entropy", "linear_cross_entropy", "linear_log_probs"])
def test_classes_in_uint8_are_not_ignored(name: str, path: str) -> None:
    """In uint8, -100 is 156, which is a class."""
    index, options = torch.arange(150, 160), dict[str, Any](temperature=2.0)
    if path == "torch":  # torch's operators compute the call
        options["temperature"] = torch.tensor(2.0, requires_grad=True)
    args = torch.randn(10, 256), torch.randn(256, 256)
    args = args if name.startswith("linear") else args[:1]
    found = [getattr(fused, name)(*args, x, **options) for x in (index, index.to(torch.uint8))]
    torch.testing.assert_close(found[1], found[0])
