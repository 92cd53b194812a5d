"""additive_margin, the margin of cosines that cross_entropy scales."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compare import FLOATS, Errors, evaluate, exactly
from samples import target_indices
from torch import Tensor
from torch.nn import functional as F

from pyfused import functional as fused
from pyfused import nn

every_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
every_kind = pytest.mark.parametrize("kind", ["cosface", "arcface"])
SHAPES = ((6, 5), (3, 300), (7,), (2, 4, 3, 5))


def by_hand(
    input: Tensor, target: Tensor, margin: float, kind: str, scale: float = 1.0, **options: Any
) -> Tensor:
    """Computes the margin from angles, as in the papers."""
    dim = min(input.dim() - 1, 1)
    one_hot = F.one_hot(target.clamp(min=0), input.shape[dim]).bool().movedim(-1, dim)
    lowered = input - margin if kind == "cosface" else (input.acos() + margin).cos()
    return F.cross_entropy(scale * lowered.where(one_hot, input), target, **options)


def composed(
    input: Tensor, target: Tensor, margin: float, kind: str, scale: float = 1.0, **options: Any
) -> Tensor:
    lowered = fused.additive_margin(input, target, margin, kind)
    return fused.cross_entropy(lowered, target, scale=scale, **options)


def cosines(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Draws cosines and targets; some targets are ignored."""
    return (torch.rand(shape) * 1.8 - 0.9).to(dtype).requires_grad_(), target_indices(shape)


OPTIONS: tuple[dict[str, Any], ...] = (
    {"margin": 0.5, "scale": 16.0},
    {"margin": 0.35},
    {"margin": 0.5, "scale": 16.0, "reduction": "none", "label_smoothing": 0.1},
)


@every_dtype
@every_kind
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_composed_with_cross_entropy(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    (input, target), errors = cosines(shape, dtype), Errors()
    for options in OPTIONS:
        given = options | {"kind": kind}
        got = evaluate(composed, input, target, **given)
        native = evaluate(by_hand, input, target, **given)
        errors.add_outcome(got, native, evaluate(by_hand, input, target, convert=exactly, **given))
        assert got.value.dtype is dtype
    errors.check(roundings=16 if dtype is torch.float64 else 2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@every_kind
def test_gradients_of_both_orders(kind: str) -> None:
    input, target = cosines((4, 5), torch.float64)

    def logits(input: Tensor) -> Tensor:
        return nn.AdditiveMargin(0.4, kind)(input, target)

    assert torch.autograd.gradcheck(logits, input, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(logits, input)


@every_kind
def test_cosines_of_one(kind: str) -> None:
    """The derivative at an angle of 0 and cosines that rounding moves beyond 1 give no NaN."""
    input = torch.tensor([[1.0, 0.2], [-1.0, 0.2], [1 + 1e-6, 0.0]], requires_grad=True)
    target = torch.zeros(3, dtype=torch.int64)
    loss = composed(input, target, 0.5, kind, reduction="none")
    exact = input.detach().double().clamp(-1, 1)
    expected = by_hand(exact, target, 0.5, kind, reduction="none")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=0)
    (gradient,) = torch.autograd.grad(loss.sum(), input)
    assert gradient.isfinite().all()
