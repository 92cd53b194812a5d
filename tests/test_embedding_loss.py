"""triplet_margin_loss and cosine_embedding_loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import interpreter
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compare import FLOATS
from conftest import KernelCalls
from grid import grid
from torch import Tensor

import pyfused
from pyfused import functional as fused

SHAPES = ((5,), (7, 2), (40, 17), (3, 1030), (40, 64))[: 3 if interpreter.ON else 5]
Extended = np.ndarray[Any, np.dtype[np.longdouble]]


# ---- definitions in long double ------------------------------------------------------------------


def triplet(
    x: Extended, y: Extended, z: Extended, p: int, eps: float, swap: bool, margin: float
) -> tuple[Extended, ...]:
    def distance(a: Extended, b: Extended) -> tuple[Extended, Extended]:
        u = a - b + eps
        if p == 1:
            return abs(u).sum(-1), np.sign(u)
        length = np.sqrt((u * u).sum(-1))
        return length, u / length[..., None]

    (near, by_near), (far, by_far), (other, by_other) = map(distance, (x, x, y), (y, z, z))
    nearer = (other < far) if swap else np.zeros_like(far, dtype=bool)
    loss = np.maximum(margin + near - np.where(nearer, other, far), 0)
    active, nearer = (loss > 0)[..., None], nearer[..., None]
    of_far, of_other = np.where(nearer, 0, by_far), np.where(nearer, by_other, 0)
    gradients = by_near - of_far, -by_near - of_other, of_far + of_other
    return loss, *(gradient * active for gradient in gradients)


def cosine(x: Extended, y: Extended, target: Extended, margin: float) -> tuple[Extended, ...]:
    target = target[..., None]
    dot, xx, yy = ((a * b).sum(-1, keepdims=True) for a, b in ((x, y), (x, x), (y, y)))
    xx, yy = xx + np.float32(1e-12), yy + np.float32(1e-12)
    cos = dot / np.sqrt(xx * yy)
    slope = np.where(target == 1, -1, np.where((target == -1) & (cos > margin), 1, 0))
    loss = np.where(target == 1, 1 - cos, np.where(target == -1, np.maximum(cos - margin, 0), 0))
    norms = np.sqrt(xx * yy)
    return loss[..., 0], slope * (y / norms - cos * x / xx), slope * (x / norms - cos * y / yy)


CASES: dict[str, tuple[str, Callable[..., Any], dict[str, Any]]] = {
    **{
        f"triplet-p{p}{'-swap' * swap}": (
            "triplet_margin_loss",
            triplet,
            {"p": p, "swap": swap, "margin": 0.75, "eps": 0.125},
        )
        for p, swap in product((1, 2), (False, True))
    },
    "cosine": ("cosine_embedding_loss", cosine, {"margin": 0.125}),
}
ROUNDINGS = {"triplet_margin_loss": 6, "cosine_embedding_loss": 12}  # at the largest magnitude


@pytest.mark.interpreted
@grid(case=CASES, dtype=FLOATS, shape=SHAPES, reduction=["none", "mean", "sum"])
def test_values_and_gradients(
    case: str, dtype: torch.dtype, shape: tuple[int, ...], reduction: str, kernel_calls: KernelCalls
) -> None:
    name, define, options = CASES[case]
    is_triplet = name == "triplet_margin_loss"
    tensors = [torch.randn(shape).to(dtype) for _ in range(2 + is_triplet)]
    target = [] if is_triplet else [torch.randint(-1, 2, shape[:-1])]
    grad_output = torch.randn(shape[:-1] if reduction == "none" else ()).to(dtype)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    loss = getattr(fused, name)(*leaves, *target, reduction=reduction, **options)
    gradients = torch.autograd.grad(loss, leaves, grad_output)
    assert kernel_calls[name] == 1 + (reduction == "none" or dtype is torch.float16)
    wide = [t.detach().double().numpy().astype(np.longdouble) for t in (*tensors, *target)]
    each, *exact = define(*wide, **options)
    rows = each.size if reduction == "mean" else 1
    expected = each if reduction == "none" else each.sum() / rows
    factor = grad_output.double().numpy()[..., None] / rows
    accumulate = torch.float64 if dtype is torch.float64 else torch.float32
    eps = torch.finfo(accumulate).eps
    # Distances and cosines are rounded before a subtraction that may cancel.
    size = 2 * math.sqrt(shape[-1]) * (math.sqrt(shape[-1]) if options.get("p") == 1 else 1) + 2
    terms = 1 if reduction != "sum" else each.size
    for got, precise, scale in (
        (loss, expected, size * terms),
        *((g, e * factor, float(abs(factor).max())) for g, e in zip(gradients, exact, strict=True)),
    ):
        assert got.dtype is dtype
        precise = torch.from_numpy(np.asarray(precise, np.float64))
        # A gradient is rounded twice; the interpreter rounds towards zero.
        allowed = ROUNDINGS[name] * eps * scale + 2 * torch.finfo(dtype).eps * precise.abs()
        allowed = allowed + torch.finfo(dtype).smallest_normal
        excess = (got.double() - precise).abs() - allowed
        assert excess.max() <= 0, f"{excess.max()} of {precise.abs().max()}"


# ---- special values ------------------------------------------------------------------------------

SPECIAL = torch.tensor([*product((0.0, 1.0, 2.0, 3.0, math.nan, math.inf, -math.inf), repeat=2)])


def results(function: Callable[..., Tensor], tensors: list[Tensor], *rest: Tensor) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    loss = function(*leaves, *rest)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]


def assert_equals_torch(name: str, tensors: list[Tensor], *rest: Tensor, **options: Any) -> None:
    given = {"reduction": "none", **options}
    both = (
        results(partial(getattr(module, name), **given), tensors, *rest) for module in (fused, F)
    )
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


# ---- shapes and dtypes ---------------------------------------------------------------------------


@grid(
    shapes=[
        ((4, 3), (1, 3), (4, 3)),
        ((4, 1, 3), (1, 5, 3), (1, 1, 3)),
        ((2, 3, 4),) * 3,
        ((3,),) * 3,
    ]
)
def test_broadcasting_triplets(shapes: tuple[Any, ...], kernel_calls: KernelCalls) -> None:
    tensors = [torch.randn(shape) for shape in shapes]
    assert_equals_torch("triplet_margin_loss", tensors)
    assert_equals_torch("triplet_margin_loss", tensors, reduction="mean")
    assert kernel_calls["triplet_margin_loss"] == 3


@grid(dtype=[torch.float64, torch.float32, torch.float16, torch.int64])
def test_targets_are_compared_in_their_dtype(dtype: torch.dtype) -> None:
    first, second = torch.randn(2, 6, 5)
    target = torch.tensor([1, -1, 0, 1 + 1e-9, -1 - 1e-9, 3], dtype=torch.float64).to(dtype)
    assert_equals_torch("cosine_embedding_loss", [first, second], target)
    assert_equals_torch("cosine_embedding_loss", [first.double(), second.double()], target)


REASONS: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "p": ((torch.ones(2, 3),) * 3, {"p": 3}, "p is neither 1 nor 2"),
    "features": (
        (torch.ones(2, 3), torch.ones(2, 1), torch.ones(2, 3)),
        {},
        "the inputs differ in the number of features",
    ),
    "no dimension": ((torch.ones(()),) * 3, {}, "the inputs differ in the number of dimensions"),
}


@grid(case=REASONS)
def test_fallbacks_and_their_reasons(case: str, kernel_calls: KernelCalls) -> None:
    arguments, options, reason = REASONS[case]
    said = pyfused.explain("triplet_margin_loss", *arguments, **options)
    assert said.backend == "torch"
    assert said.reason.startswith(reason)
    got = fused.triplet_margin_loss(*arguments, **options)
    assert torch.equal(got, F.triplet_margin_loss(*arguments, **options))
    assert not kernel_calls.total()


X = torch.ones(2, 3)
ERRORS: dict[str, tuple[str, tuple[Tensor, ...], dict[str, Any], str]] = {
    "margin": ("triplet_margin_loss", (X, X, X), {"margin": 0.0}, "margin: expected a positive"),
    "dimensions": (
        "triplet_margin_loss",
        (X, X[0], X),
        {},
        "positive: expected as many dimensions",
    ),
    "features": ("triplet_margin_loss", (X, X, X[:, :2]), {}, "negative: expected a shape that"),
    "targets": ("cosine_embedding_loss", (X, X, X), {}, "target: expected shape"),
    "rows": ("cosine_embedding_loss", (X, X, torch.ones(3)), {}, "target: expected a shape that"),
    "pairs": ("cosine_embedding_loss", (X, X[:, :2], X[:, 0]), {}, "input2: expected a shape that"),
    "reduction": ("cosine_embedding_loss", (X, X, X[:, 0]), {"reduction": "max"}, "reduction: "),
}


@grid(case=ERRORS)
def test_errors_have_torchs_type_and_name_the_argument(case: str) -> None:
    name, tensors, options, message = ERRORS[case]
    with pytest.raises((RuntimeError, ValueError), match=message) as ours:
        getattr(fused, name)(*tensors, **options)
    with pytest.raises((RuntimeError, ValueError)) as theirs:
        getattr(F, name)(*tensors, **options)
    assert ours.type is theirs.type
