"""triplet_margin_loss and cosine_embedding_loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import FLOATS
from conftest import KernelCalls
from grid import grid
from torch import Tensor

from pyfused import functional as fused
from pyfused.formula_compiler import trace

# ---- special values ------------------------------------------------------------------------------

SPECIAL = torch.tensor([*product((0.0, 1.0, 2.0, 3.0, math.nan, math.inf, -math.inf), repeat=2)])


def results(function: Callable[..., Tensor], tensors: list[Tensor], *rest: Tensor) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    loss = function(*leaves, *rest)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]


def assert_equals_torch(name: str, tensors: list[Tensor], *rest: Tensor, **options: Any) -> None:
    given = {"reduction": "none", **options}
    both = [results(partial(getattr(f, name), **given), tensors, *rest) for f in (fused, F)]
    for got, expected in zip(*both, strict=True):
        torch.testing.assert_close(got, expected, equal_nan=True)


@pytest.mark.interpreted
@grid(p=[1, 2], swap=[False, True])
def test_triplets_at_special_values(p: int, swap: bool, kernel_calls: KernelCalls) -> None:
    """Distances of 0, ties, a loss of exactly 0, NaN and infinities give torch's gradients."""
    tensors = [SPECIAL[torch.randint(len(SPECIAL), (500,))].double() for _ in range(3)]
    assert_equals_torch("triplet_margin_loss", tensors, p=p, swap=swap, eps=0.0)
    assert kernel_calls["triplet_margin_loss"] == 2


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


@grid(dtype=[*FLOATS, torch.int64, torch.int8, torch.uint8, torch.bool])
def test_targets_are_compared_in_their_dtype(dtype: torch.dtype) -> None:
    first, second = torch.randn(2, 6, 5)
    target = torch.tensor([1, -1, 0, 1 + 1e-9, -1 - 1e-9, 3], dtype=torch.float64).to(dtype)
    assert_equals_torch("cosine_embedding_loss", [first, second], target)
    assert_equals_torch("cosine_embedding_loss", [first.double(), second.double()], target)
