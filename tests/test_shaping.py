"""Margins, a scale and a cap of the logits, and gradients without classes that hardly count."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from compare import FLOATS, Errors, evaluate, exactly
from conftest import backend
from torch import Tensor
from torch.nn import functional as F

from pyfused import functional as fused
from pyfused.backends import cpu
from pyfused.ops import chunked

every_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
every_kind = pytest.mark.parametrize("kind", ["cosface", "arcface"])
SHAPES = ((6, 5), (3, 300), (7,), (2, 4, 3, 5))


def by_hand(input: Tensor, target: Tensor, **options: Any) -> Tensor:
    """As the papers write it, of angles."""
    margin, kind = options.pop("margin", 0.0), options.pop("margin_kind", "cosface")
    scale, cap = options.pop("scale", 1.0), options.pop("softcap", None)
    dim = min(input.dim() - 1, 1)
    hit = F.one_hot(target.clamp(min=0), input.shape[dim]).bool().movedim(-1, dim)
    moved = input - margin if kind == "cosface" else (input.acos() + margin).cos()
    logits = scale * moved.where(hit, input)
    logits = logits if cap is None else cap * (logits / cap).tanh()
    return F.cross_entropy(logits, target, **options)


def cosines(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """And targets, some of them ignored."""
    dim = min(len(shape) - 1, 1)
    input = (torch.rand(shape) * 1.8 - 0.9).to(dtype).requires_grad_()
    target = torch.randint(0, shape[dim], (*shape[:dim], *shape[dim + 1 :]))
    target.view(-1)[1::3] = -100
    return input, target


OPTIONS: tuple[dict[str, Any], ...] = (
    {"margin": 0.5, "scale": 16.0},
    {"margin": 0.35},
    {"scale": 0.25},
    {"margin": 0.5, "scale": 16.0, "softcap": 9.0, "reduction": "none", "label_smoothing": 0.1},
)


@every_dtype
@every_kind
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cross_entropy(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    input, target = cosines(shape, dtype)
    errors = Errors()
    for options in OPTIONS:
        given = options | {"margin_kind": kind}
        got = evaluate(fused.cross_entropy, input, target, **given)
        native = evaluate(by_hand, input, target, **given)
        exact = evaluate(by_hand, input, target, convert=exactly, **given)
        assert got.value.dtype is dtype
        errors.add("loss", got.value, native.value, exact.value)
        errors.add("gradient", got.gradients[0], native.gradients[0], exact.gradients[0])
    errors.check(roundings=16 if dtype is torch.float64 else 2)


@every_kind
@pytest.mark.parametrize("budget", [None, 1000], ids=["rows", "blocks"])
@pytest.mark.parametrize("positions", [(), (3,)], ids=["rows", "several a row"])
def test_linear_cross_entropy(kind: str, budget: int | None, positions: tuple[int, ...]) -> None:
    """Of rows and classes of length 1, whose products are cosines."""
    input = F.normalize(torch.randn(12, 8, dtype=torch.float64), dim=1).requires_grad_()
    head = F.normalize(torch.randn(40, *positions, 8, dtype=torch.float64), dim=-1)
    head.requires_grad_()
    target = torch.randint(0, 40, (12, *positions))
    target[1::3] = -100
    for options in OPTIONS:
        given = options | {"margin_kind": kind}
        got = fused.linear_cross_entropy(input, head, target, memory_budget=budget, **given)
        logits = (input @ head.flatten(0, -2).t()).view(12, 40, *positions)
        expected = by_hand(logits, target, **given)
        torch.testing.assert_close(got, expected)
        leaves, grad_output = (input, head), torch.rand_like(got)
        for mine, best in zip(
            torch.autograd.grad(got, leaves, grad_output),
            torch.autograd.grad(expected, leaves, grad_output),
            strict=True,
        ):
            torch.testing.assert_close(mine, best)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@every_kind
def test_gradients_of_both_orders(kind: str) -> None:
    input, target = cosines((4, 5), torch.float64)

    def loss(input: Tensor) -> Tensor:
        return fused.cross_entropy(input, target, margin=0.4, margin_kind=kind, scale=4.0)

    assert torch.autograd.gradcheck(loss, input, check_forward_ad=backend is cpu)
    assert torch.autograd.gradgradcheck(loss, input)


@every_kind
def test_at_the_ends_of_the_cosine(kind: str) -> None:
    """An angle of 0 has no slope; rounding takes a cosine beyond 1. Neither makes a NaN."""
    input = torch.tensor([[1.0, 0.2], [-1.0, 0.2], [1 + 1e-6, 0.0]], requires_grad=True)
    target = torch.zeros(3, dtype=torch.int64)
    given: dict[str, Any] = {"margin": 0.5, "margin_kind": kind, "reduction": "none"}
    loss = fused.cross_entropy(input, target, **given)
    exact = input.detach().double().clamp(-1, 1)
    torch.testing.assert_close(loss.double(), by_hand(exact, target, **given), rtol=1e-3, atol=0)
    (gradient,) = torch.autograd.grad(loss.sum(), input)
    assert gradient.isfinite().all()


def test_the_logits_stay_and_metrics_are_of_what_the_loss_is_of() -> None:
    input, target = cosines((6, 5), torch.float32)
    before = input.detach().clone()
    options: dict[str, Any] = {"margin": 0.3, "scale": 8.0}
    _, metrics = fused.cross_entropy(input, target, return_metrics=True, **options)
    assert torch.equal(input, before)
    each = fused.cross_entropy(input, target, reduction="none", **options)
    torch.testing.assert_close(-metrics.log_probability, each)


WRONG: tuple[tuple[dict[str, Any], type[Exception], str], ...] = (
    ({"margin": -0.1}, ValueError, "margin: expected a number from 0.0 up, got -0.1"),
    ({"margin": "1"}, TypeError, "margin: expected a float, got str '1'"),
    ({"scale": 0.0}, ValueError, "scale: expected a positive number, got 0.0"),
    (
        {"margin": 0.1, "margin_kind": "sphere"},
        ValueError,
        "margin_kind: expected 'cosface' or 'arcface', got 'sphere'",
    ),
    (
        {"margin": 0.1, "target": torch.rand(6, 5)},
        ValueError,
        "margin: expected 0.0 with a target of torch.float32",
    ),
    (
        {"margin": 0.1, "target": torch.zeros(7, dtype=torch.int64)},
        ValueError,
        r"target: expected class indices of shape \(6,\)",
    ),
    ({"margin": 0.1, "target": torch.full((6,), 5)}, IndexError, "got 5 at position"),
)


@pytest.mark.parametrize("linear", [False, True], ids=["cross_entropy", "linear_cross_entropy"])
@pytest.mark.parametrize(("wrong", "error", "told"), WRONG)
def test_bad_input(wrong: dict[str, Any], error: type[Exception], told: str, linear: bool) -> None:
    if backend is not cpu and error is IndexError:
        pytest.skip("a GPU cannot raise")
    input, target = cosines((6, 5), torch.float32)
    given = {"target": target} | wrong
    call = partial(fused.linear_cross_entropy, input, torch.eye(5))
    call = call if linear else partial(fused.cross_entropy, input)
    with pytest.raises(error, match=told):
        call(**given)


@pytest.mark.cpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@every_kind
def test_compiled(kind: str) -> None:
    input, target = cosines((6, 5), torch.float32)
    head = torch.randn(9, 5, requires_grad=True)
    options: dict[str, Any] = {"margin": 0.3, "margin_kind": kind, "scale": 4.0}

    def loss(input: Tensor) -> Tensor:
        of_logits = fused.cross_entropy(input, target, **options)
        return of_logits + fused.linear_cross_entropy(input / 9, head, target, **options)

    torch.compiler.reset()
    got, expected = torch.compile(loss, fullgraph=True)(input), loss(input)
    torch.testing.assert_close(got, expected)
    leaves = input, head
    for mine, best in zip(
        torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(mine, best)


# ---- classes left out of the gradients' products -------------------------------------------------


def confident(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Input, head and target of a model that is nearly sure, of few classes at a time."""
    head = 3 * torch.randn(400, 16)
    target = torch.arange(48) % 7
    input = head[target] + 0.3 * torch.randn(48, 16)
    return input.to(dtype).requires_grad_(), head.to(dtype).requires_grad_(), target


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("budget", [None, 3000], ids=["default", "blocks"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_filtered_gradients_are_off_by_less_than_is_said(
    reduction: str, budget: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    input, head, target = confident(dtype)
    kept: list[int] = []
    count = chunked._classes_that_count

    def counted(*given: Any) -> Tensor | None:
        found = count(*given)
        kept.append(given[0].shape[1] if found is None else len(found))
        return found

    monkeypatch.setattr(chunked, "_classes_that_count", counted)
    epsilon, leaves = 2.0**-6, (input, head)
    options: dict[str, Any] = {"memory_budget": budget, "reduction": reduction}
    exact = fused.linear_cross_entropy(input, head, target, **options)
    grad_output = torch.rand_like(exact)
    exactly = torch.autograd.grad(exact, leaves, grad_output)
    blocks, everything = len(kept), sum(kept)
    kept.clear()
    loss = fused.linear_cross_entropy(input, head, target, filter_eps=epsilon, **options)
    found = torch.autograd.grad(loss, leaves, grad_output)
    assert torch.equal(loss, exact)
    assert len(kept) == blocks
    assert sum(kept) < 0.3 * everything
    least = epsilon * float(grad_output.max()) / (len(target) if reduction == "mean" else 1)
    sums = head.detach().float().abs().sum(0), input.detach().float().abs().sum(0)
    rounding = torch.finfo(dtype).eps if dtype is torch.bfloat16 else 1e-6
    for mine, best, of_all in zip(found, exactly, sums, strict=True):
        off = (mine.float() - best.float()).abs()
        assert off.max() > 0
        assert (off <= least * of_all + rounding * (best.float().abs() + least)).all()


@pytest.mark.cpu
def test_nothing_is_filtered_where_all_counts() -> None:
    """Of random logits every class counts, and a NaN counts, too."""
    input, head = torch.randn(30, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    target = torch.randint(0, 50, (30,))
    plain = fused.linear_cross_entropy(input, head, target)
    loss = fused.linear_cross_entropy(input, head, target, filter_eps=1e-6)
    for mine, best in zip(
        torch.autograd.grad(loss, (input, head)),
        torch.autograd.grad(plain, (input, head)),
        strict=True,
    ):
        assert torch.equal(mine, best)
    gradient = torch.zeros(4, 10)
    gradient[2, 3], gradient[1, 5] = math.nan, -0.5
    assert chunked._classes_that_count(gradient, None, 0.1).tolist() == [3, 5]


@pytest.mark.parametrize(
    ("wrong", "error"), [(-0.5, ValueError), ("1", TypeError)], ids=["negative", "no number"]
)
def test_bad_filter(wrong: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="filter_eps: expected"):
        fused.linear_cross_entropy(
            torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2]), filter_eps=wrong
        )
