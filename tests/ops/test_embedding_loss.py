"""triplet_margin_loss, cosine_embedding_loss, and additive_margin for cosines of classes."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import FLOATS, Errors, assert_matches_torch, evaluate, exactly
from conftest import KernelCalls
from grid import grid
from samples import target_indices
from torch import Tensor

from pyfused import functional as fused
from pyfused.formula_compiler import trace

# ---- special values ------------------------------------------------------------------------------

SPECIAL = torch.tensor([*product((0.0, 1.0, 2.0, 3.0, math.nan, math.inf, -math.inf), repeat=2)])


def assert_equals_torch(name: str, tensors: list[Tensor], *rest: Tensor, **options: Any) -> None:
    given, leaves = {"reduction": "none", **options}, [x.requires_grad_() for x in tensors]
    assert_matches_torch(*(getattr(f, name) for f in (fused, F)), *leaves, *rest, **given)


@pytest.mark.interpreted
@grid(p=[1, 2], swap=[False, True])
def test_triplets_at_special_values(p: int, swap: bool, kernel_calls: KernelCalls) -> None:
    """Distances of 0, ties, a loss of exactly 0, NaN and infinities give torch's gradients."""
    tensors = [SPECIAL[torch.randint(len(SPECIAL), (500,))].double() for _ in range(3)]
    assert_equals_torch("triplet_margin_loss", tensors, p=p, swap=swap, eps=0.0)
    assert kernel_calls["triplet_margin_loss"]


@pytest.mark.interpreted
@grid(target=[1.0, -1.0, 0.0, math.nan], margin=[0.0, 0.5])
def test_cosines_at_special_values(target: float, margin: float) -> None:
    first, second = (SPECIAL[torch.randint(len(SPECIAL), (500,))].double() for _ in range(2))
    targets = torch.full((500,), target)
    assert_equals_torch("cosine_embedding_loss", [first, second], targets, margin=margin)


@pytest.mark.interpreted
@grid(inclusive=[True, False])
def test_a_loss_of_exactly_0(inclusive: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's derivative of clamp at a bound is 1, and from version 2.14 on 0."""
    monkeypatch.setattr(trace, "clamp_is_inclusive", lambda: inclusive)
    x, z = torch.zeros(4, 2), torch.full((4, 2), 2.0)
    y = torch.ones(4, 2, requires_grad=True)
    loss = fused.triplet_margin_loss(x, y, z, p=1, margin=2.0, eps=0.0, reduction="sum")
    assert torch.autograd.grad(loss, y)[0].tolist() == [[float(inclusive)] * 2] * 4
    a = torch.tensor([[1.0, 0.0]], requires_grad=True)
    loss = fused.cosine_embedding_loss(a, torch.tensor([[0.0, 1.0]]), torch.tensor([-1.0]))
    assert torch.autograd.grad(loss, a)[0][0, 1].item() == pytest.approx(float(inclusive))


# ---- shapes and dtypes ---------------------------------------------------------------------------


@pytest.mark.parametrize("of_input", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.int8, torch.uint8, torch.bool])
def test_targets_are_compared_in_their_dtype(dtype: torch.dtype, of_input: torch.dtype) -> None:
    target = torch.tensor([1, -1, 0, 1 + 1e-9, -1 - 1e-9, 3], dtype=torch.float64).to(dtype)
    operands = [torch.randn(6, 5, dtype=of_input) for _ in range(2)]
    assert_equals_torch("cosine_embedding_loss", operands, target)


# ---- additive margins ----------------------------------------------------------------------------

every_kind = pytest.mark.parametrize("kind", ["cosface", "arcface"])


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


@every_kind
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(6, 5), (3, 300), (7,), (2, 4, 3, 5)], ids=str)
def test_composed_with_cross_entropy(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    (input, target), errors = cosines(shape, dtype), Errors()
    for options in OPTIONS:
        given = options | {"kind": kind}
        got, native = (evaluate(f, input, target, **given) for f in (composed, by_hand))
        errors.add_outcome(got, native, evaluate(by_hand, input, target, convert=exactly, **given))
        assert got.value.dtype is dtype
    errors.check(roundings=16 if dtype is torch.float64 else 2)


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
