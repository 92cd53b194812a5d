"""nll_loss, multi_margin_loss, multilabel_margin_loss and cross_entropy with gamma."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import interpreter
import pytest
import torch
from compare import FLOATS, Errors, evaluate, exactly, widen
from conftest import ISAS, KernelCalls
from grid import grid
from samples import labels, target_indices
from torch import Tensor
from torch.nn import functional as F

from pyfused import functional as fused

close = torch.testing.assert_close
REDUCTIONS = ["none", "mean", "sum"]
WEIGHTED = [False, True]
# Rows of few classes, of many, and of more than a chunk; contiguous positions.
SHAPES = [(7,), (6, 5), (7, 300), (3, 2100), (2, 21, 5, 7), (300, 3), (4, 1), (2, 150, 9)]
if interpreter.ON:
    SHAPES = [(7,), (6, 5), (3, 300), (2, 90), (2, 21, 5, 3), (40, 3), (4, 1), (1, 150, 9)]


def scores(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return (2 * torch.randn(shape)).to(dtype).requires_grad_()


def weight_of(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return (0.5 + torch.rand(shape[min(1, len(shape) - 1)])).to(dtype)


def targets(name: str, shape: tuple[int, ...]) -> Tensor:
    """Draws targets for a loss, some of them ignored or repeated if the loss supports this."""
    if name != "multilabel_margin_loss":
        return target_indices(shape, ignored=name != "multi_margin_loss")
    target, size = labels(shape), shape[-1]
    rows = target.view(-1, size)
    rows[-1] = torch.arange(size).roll(3)
    rows[-1, size // 2] = -1
    rows[0, : size // 2] = 1
    return target


def focal(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    gamma: float = 2.0,
) -> Tensor:
    """Computes the focal loss by its textbook definition."""
    missing = -torch.expm1(-F.cross_entropy(input, target, reduction="none"))
    loss = missing**gamma * F.cross_entropy(input, target, weight, reduction="none")
    if reduction == "none":
        return loss
    total = F.nll_loss(torch.full_like(input, -1), target, weight, reduction="sum")
    return loss.sum() / (total if reduction == "mean" else 1)


LOSSES: dict[str, tuple[str, dict[str, Any], Callable[..., Tensor]]] = {
    "nll_loss": ("nll_loss", {}, F.nll_loss),
    "focal_2": ("cross_entropy", {"gamma": 2.0}, focal),
    "focal_half": ("cross_entropy", {"gamma": 0.5}, focal),
    "margin": ("multi_margin_loss", {"p": 1, "margin": 1.0}, F.multi_margin_loss),
    "margin_squared": ("multi_margin_loss", {"p": 2, "margin": 0.5}, F.multi_margin_loss),
    "multilabel": ("multilabel_margin_loss", {}, F.multilabel_margin_loss),
}


@pytest.mark.interpreted
@grid(loss=LOSSES, shape=SHAPES, dtype=FLOATS, reduction=REDUCTIONS, weighted=WEIGHTED, isa=ISAS)
def test_as_accurate_as_torch(
    loss: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    weighted: bool,
    reduction: str,
    isa: str,
    kernel_calls: KernelCalls,
) -> None:
    name, options, of_torch = LOSSES[loss]
    shape = shape[:2] if "margin" in name else shape
    if shape == (4, 1) and name == "cross_entropy":
        pytest.skip("calls with one class run torch's operator")
    x, target = scores(shape, dtype), targets(name, shape)
    given: dict[str, Any] = options | {"reduction": reduction}
    if weighted and name != "multilabel_margin_loss":
        given["weight"] = weight_of(shape, dtype)
    got = evaluate(getattr(fused, name), x, target, **given)
    assert kernel_calls[name] == (2 if reduction == "none" or dtype is torch.float16 else 1)
    theirs, exact = (
        evaluate(of_torch, x, target, convert=convert, **given) for convert in (widen, exactly)
    )
    errors = Errors()
    errors.add_outcome(got, theirs, exact)
    # In float64, torch's results are the reference, and sum in another order.
    # torch's own float64 result has up to one rounding per term of its sums.
    errors.check(roundings=512 if dtype is torch.float64 else 4)


@pytest.mark.parametrize("gamma", [2.0, 0.5])
def test_gamma_with_probabilities_of_one_and_zero(gamma: float) -> None:
    """(1 - p)^gamma is 0 for p = 1; exponentials underflow for p near 0."""
    x = torch.tensor([[200.0, 0.0, -50.0], [-300.0, 0.0, 1.0]]).requires_grad_()
    target = torch.tensor([0, 0])
    got = evaluate(fused.cross_entropy, x, target, gamma=gamma)
    wide = evaluate(focal, x, target, gamma=gamma, convert=exactly)
    close(got.value, wide.value.float())
    gradient = wide.gradients[0].float().nan_to_num(0.0)  # NaN from torch's 0 ** gamma
    close(got.gradients[0], gradient)


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


def test_the_gradient_of_rmse_at_0() -> None:
    x = torch.randn(6, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(fused.rmse_loss(x, x.detach(), eps=1e-12), x)
    assert torch.equal(gradient, torch.zeros(6, 5))


def test_gamma_with_only_ignored_targets() -> None:
    x = torch.randn(40, requires_grad=True)
    fused.sigmoid_focal_loss(x, torch.zeros(40), ignore_index=0, reduction="mean").backward()
    assert x.grad is not None
    assert not x.grad.any()


@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss", "multi_margin_loss"])
def test_class_weights_under_autocast(name: str) -> None:
    """Autocast casts weights in half precision, and leaves float64 unchanged, which is an error."""
    x, target, weight = scores((6, 5)).bfloat16(), torch.arange(6) % 5, torch.linspace(0.5, 1.5, 5)
    ours, of_torch = getattr(fused, name), getattr(F, name)
    with torch.autocast("cpu", torch.bfloat16):
        expected = of_torch(x, target, weight=weight)
        torch.testing.assert_close(ours(x, target, weight=weight), expected, rtol=0.02, atol=0.02)
        for function in (of_torch, ours):
            with pytest.raises(RuntimeError):
                function(x, target, weight=weight.double())
