"""nll_loss, multilabel_soft_margin_loss and losses with gamma."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from catalogue import TORCH
from compare import FLOATS, HALF, assert_matches_torch
from conftest import KernelCalls
from grid import grid
from torch import Tensor
from torch.nn import functional as F

from pyfused import functional as fused

close = torch.testing.assert_close


@pytest.mark.parametrize("gamma", [2.0, 0.5])
def test_gamma_with_probabilities_of_one_and_zero(gamma: float) -> None:
    """(1 - p)^gamma is 0 for p = 1; exponentials underflow for p near 0."""
    x = torch.tensor([[200.0, 0.0, -50.0], [-300.0, 0.0, 1.0]]).requires_grad_()
    target, wide = torch.tensor([0, 0]), x.detach().double().requires_grad_()
    each = F.cross_entropy(wide, target, reduction="none")
    expected = (each * (1 - (-each).exp()) ** gamma).mean()
    gradient = torch.autograd.grad(expected, wide)[0].nan_to_num(0.0)  # NaN from torch's 0 ** gamma
    for function in (fused.cross_entropy, TORCH.cross_entropy):
        loss = function(x, target, gamma=gamma)
        close(loss, expected.float())
        close(torch.autograd.grad(loss, x)[0], gradient.float())


# ---- losses that use the kernel of another loss --------------------------------------------------


@grid(dtype=FLOATS, weight=[None, (3, 5)], reduction=["none", "mean", "sum"])
def test_losses_made_of_another_loss(
    dtype: torch.dtype, weight: tuple[int, ...] | None, reduction: str, kernel_calls: KernelCalls
) -> None:
    x, y = torch.randn(3, 5).to(dtype).requires_grad_(), torch.rand(3, 5).to(dtype)
    given: dict[str, Any] = {"reduction": reduction}
    given["weight"] = None if weight is None else torch.rand(weight).to(dtype)
    ours, of_torch = (f.multilabel_soft_margin_loss for f in (fused, F))
    assert_matches_torch(ours, of_torch, x, y, **given)

    def rmse_loss(x: Tensor, y: Tensor, **given: Any) -> Tensor:
        return (F.mse_loss(x, y, **given) + 0.5).sqrt()

    eps = torch.tensor([0.5]).double()
    assert_matches_torch(partial(fused.rmse_loss, eps=eps), rmse_loss, x, y, **given)
    assert kernel_calls.keys() >= {"mse_loss", "binary_cross_entropy_with_logits"}


@pytest.mark.parametrize("dtype", HALF)
def test_losses_made_of_another_loss_do_not_overflow(dtype: torch.dtype) -> None:
    x, zero = torch.full((2, 60_000), 300.0).to(dtype), torch.zeros(2, 60_000).to(dtype)
    assert fused.rmse_loss(x, zero) == 300
    assert fused.multilabel_soft_margin_loss(x, zero, reduction="sum") == 600


X, Y = torch.linspace(-2, 2, 15).view(3, 5), torch.linspace(0, 1, 15).view(3, 5)
