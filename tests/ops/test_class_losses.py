"""nll_loss, multilabel_soft_margin_loss and losses with gamma."""

from __future__ import annotations

import itertools
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


def test_multilabel_soft_margin_loss_warns_once_about_deprecated_arguments() -> None:
    x, y = torch.randn(3, 5), torch.rand(3, 5)
    with pytest.warns(UserWarning, match="size_average and reduce args") as warned:
        got = fused.multilabel_soft_margin_loss(x, y, size_average=False)
    assert len(warned) == 1
    close(got, F.multilabel_soft_margin_loss(x, y, reduction="sum"))


@grid(dtypes=itertools.permutations(FLOATS, 2), weight=[None, torch.float32, torch.float64])
def test_multilabel_soft_margin_loss_of_two_dtypes(
    dtypes: tuple[torch.dtype, torch.dtype], weight: torch.dtype | None
) -> None:
    """Computes in the wider dtype and returns torch's dtype."""
    first, second = dtypes
    x, y = torch.randn(64, 50).to(first), torch.rand(64, 50).to(second)
    w = None if weight is None else torch.rand(50).to(weight)
    got, of_torch = (f.multilabel_soft_margin_loss(x, y, w) for f in (fused, F))
    exact = F.multilabel_soft_margin_loss(x.double(), y.double(), None if w is None else w.double())
    assert got.dtype is of_torch.dtype
    eps = torch.finfo(got.dtype).eps
    assert (got - exact).abs() <= 2 * (of_torch - exact).abs() + 2 * eps * exact


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
OTHER_LABELS = [
    (X, Y[0]),
    (X, Y, Y[:, :1]),
    (X, (Y > 0.5).long()),
    (X[0, 0], Y[0, 0]),
    (X.long(), Y),
]


@pytest.mark.parametrize("given", OTHER_LABELS)
def test_labels_of_other_shapes_and_dtypes(given: tuple[Any, ...]) -> None:
    """torch's function computes them, or raises."""
    try:
        expected = F.multilabel_soft_margin_loss(*given)
    except (RuntimeError, IndexError) as error:
        with pytest.raises(type(error)):
            fused.multilabel_soft_margin_loss(*given)
    else:
        close(fused.multilabel_soft_margin_loss(*given), expected)


def test_the_gradient_of_rmse_at_0() -> None:
    x = torch.randn(6, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(fused.rmse_loss(x, x.detach(), eps=1e-12), x)
    assert torch.equal(gradient, torch.zeros(6, 5))


def test_gamma_with_only_ignored_targets() -> None:
    x = torch.randn(40, requires_grad=True)
    fused.sigmoid_focal_loss(x, torch.zeros(40), ignore_index=0, reduction="mean").backward()
    assert x.grad is not None
    assert not x.grad.any()


@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss"])
def test_class_weights_under_autocast(name: str) -> None:
    """Autocast casts weights in half precision, and leaves float64 unchanged, which is an error."""
    x, target = torch.randn(6, 5).bfloat16(), torch.arange(6) % 5
    weight = torch.linspace(0.5, 1.5, 5)
    ours, of_torch = getattr(fused, name), getattr(F, name)
    with torch.autocast("cpu", torch.bfloat16):
        expected = of_torch(x, target, weight=weight)
        torch.testing.assert_close(ours(x, target, weight=weight), expected, rtol=0.02, atol=0.02)
        for function in (of_torch, ours):
            with pytest.raises(RuntimeError):
                function(x, target, weight=weight.double())
