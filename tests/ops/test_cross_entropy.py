"""cross_entropy matches torch: values, shapes, dtypes, NaN and infinities."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import DEVICE, FLOATS, assert_matches_torch, evaluate, exactly
from conftest import ISAS
from grid import grid
from samples import target_indices, target_probabilities

from pyfused.functional import (
    cross_entropy,
    linear_cross_entropy,
    linear_log_probs,
    log_probs,
    log_softmax,
)

INF, NAN = float("inf"), float("nan")
KINDS = ["index", "probabilities"]
REDUCTIONS = ["none", "mean", "sum"]
SHAPES = [(5,), (6, 5), (3, 5, 4), (2, 5, 3, 4), (2, 3, 2, 1, 5)]
check = partial(assert_matches_torch, cross_entropy, F.cross_entropy)


def problem(shape: tuple[int, ...], kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """Draws logits that require grad, and a target of the given kind."""
    logits = torch.randn(shape, dtype=dtype) * 4
    if kind == "probabilities":
        return logits.requires_grad_(), target_probabilities(shape, dtype)
    return logits.requires_grad_(), target_indices(shape, ignored=False)


@grid(
    ignored=[-100, -1, 0, 2, 4, 7, 2**40, -(2**40)],
    reduction=REDUCTIONS,
    smoothing=[0.0, 0.1],
    weighted=[False, False, True, True],
)
def test_ignore_index(ignored: int, smoothing: float, weighted: bool, reduction: str) -> None:
    options = {"ignore_index": ignored, "reduction": reduction, "label_smoothing": smoothing}
    for shape in SHAPES[1:]:
        logits, target = problem(shape, "index")
        if DEVICE != "cpu" and abs(ignored) >> 31 and len(shape) > 2:
            continue  # torch's kernel reads 32-bit class indices
        target[torch.rand(target.shape) < 0.3] = ignored
        got = check(logits, target, torch.rand(shape[1]) if weighted else None, **options)
        assert not got.gradients[0].movedim(1, -1)[target == ignored].any()


@pytest.mark.parametrize("factor", [INF, NAN])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_of_ignored_rows_are_zero(
    reduction: str, dtype: torch.dtype, factor: float
) -> None:
    """grad_output scales the gradients of the forward pass, but 0 times NaN is NaN."""
    logits, target = problem((6, 5), "index", dtype)
    target[::2] = -100
    loss = cross_entropy(logits, target, reduction=reduction)
    for _ in range(2):
        (grad,) = torch.autograd.grad((factor * loss).sum(), logits, retain_graph=True)
        assert torch.equal(grad[::2], torch.zeros(3, 5, dtype=dtype))
        assert not grad[1::2].isfinite().any()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_mean_of_targets_whose_classes_have_weight_zero(smoothing: float) -> None:
    logits, target = problem((6, 5), "index")
    weight = torch.ones(5).index_fill(0, target, 0)
    check(logits, target, weight=weight, label_smoothing=smoothing)
    head = linear_cross_entropy(logits, torch.eye(5), target, weight=weight, label_smoothing=0.1)
    assert head.isnan()


@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize("smoothing", [0.5, 1.0])
def test_smoothed_probabilities_of_huge_logits(smoothing: float, shape: tuple[int, ...]) -> None:
    """The sum of all log-probabilities overflows, but not their mean."""
    logits = torch.zeros(shape)
    logits[:, ::2] = -1e38
    target = target_probabilities(shape)
    check(logits.requires_grad_(), target, label_smoothing=smoothing, reduction="none")
    assert cross_entropy(logits, target, label_smoothing=smoothing).isfinite()


@pytest.mark.interpreted
@grid(classes=[40, 300, 1100], dtype=FLOATS)
def test_losses_of_confident_rows_are_not_negative(classes: int, dtype: torch.dtype) -> None:
    """Their true losses are below 1e-15, so a rounding error decides about the sign."""
    target = torch.randint(classes, (8,))
    logits = torch.randn(8, classes).scatter_(1, target[:, None], 50 + torch.rand(8, 1)).to(dtype)
    soft_target = torch.softmax(logits + torch.rand(8, classes).to(dtype), 1)
    inputs = [logits, logits.float().view(2, 4, classes).movedim(-1, 1).contiguous()]
    losses = [cross_entropy(x, target.view(x[:, 0].shape), reduction="none") for x in inputs]
    losses += [cross_entropy(logits, soft_target, reduction="none"), -log_softmax(logits, 1)]
    found = log_probs(logits, target, return_entropy=True)
    of_head = linear_log_probs(logits, torch.eye(classes).to(dtype), target, return_entropy=True)
    losses += [-found[0], found.entropy, -of_head[0], of_head.entropy]
    assert min(loss.min() for loss in losses) >= 0


SPECIAL_ROWS = {
    "one_minus_infinity": [-INF, 0.5, 1.0, -2.0, 3.0],
    "only_one_finite": [-INF, 0.5, -INF, -INF, -INF],
    "all_minus_infinity": [-INF] * 5,
    "one_infinity": [0.5, INF, 1.0, -2.0, 3.0],
    "two_infinities": [INF, INF, 1.0, -2.0, 3.0],
    "both_infinities": [INF, -INF, 1.0, -2.0, 3.0],
    "one_nan": [0.5, NAN, 1.0, -2.0, 3.0],
    "nan_and_infinities": [INF, NAN, -INF, -2.0, 3.0],
    "all_nan": [NAN] * 5,
    "largest": [3e38, -3e38, 0.0, 1.0, 3e38],
    "equal": [7.0] * 5,
}


@pytest.mark.interpreted
@grid(row=SPECIAL_ROWS, dtype=FLOATS, reduction=REDUCTIONS, smoothing=[0.0, 0.1], kind=KINDS * 2)
def test_special_values(
    row: str, dtype: torch.dtype, smoothing: float, kind: str, reduction: str
) -> None:
    options: dict[str, Any] = {"reduction": reduction}
    for padding in (0, 3, 12, 60, 300):  # less than, about and more than a vector, and folded
        logits = torch.zeros(5, padding + 5)
        logits[:, padding:] = torch.tensor(SPECIAL_ROWS[row])
        logits, target = logits.to(dtype).requires_grad_(), torch.arange(5) + padding
        check(logits, target, **options)
        logits = logits.detach().T[None].contiguous().requires_grad_()  # classes not contiguous
        check(logits, target[None], **options)
    logits = torch.tensor([SPECIAL_ROWS[row]] * 5).requires_grad_()
    target = torch.eye(5) if kind == "probabilities" else torch.arange(5)
    for weight in (None, torch.tensor([0.5, 0.0, 2.0, 1.0, 3.0])):
        check(logits, target, weight, **options, label_smoothing=smoothing)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "middle": lambda x: x,
    "transposed": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "apart": lambda x: torch.stack([x, x], -1)[..., 0],
    "cut": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
}


@pytest.mark.cpu
@grid(
    shape=[(1, 2500, 2), (2, 301, 3), (1, 3001, 5), (1, 1100, 16), (1, 700, 44), (3, 40, 50)],
    dtype=FLOATS,
    layout=LAYOUTS,
    kind=KINDS,
    isa=ISAS,
    smoothing=[0.0, 0.1, 0.1],
)
def test_few_positions_beside_many_classes(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, kind: str, isa: str, smoothing: float
) -> None:
    """Several classes of a position share a vector, whichever the layout of each tensor is."""
    error = 20 * torch.finfo(dtype).eps
    for of_logits, of_target in ((layout, "middle"), ("middle", layout)):
        logits, target = problem(shape, kind, dtype)
        logits.data[0, 5:7, -1] = -1e4  # masked
        logits = LAYOUTS[of_logits](logits.detach()).requires_grad_()
        if kind == "probabilities":
            target = LAYOUTS[of_target](target).requires_grad_()
        else:
            target[0, 0] = -100
        for reduction in REDUCTIONS:
            weight = None if reduction == "none" else torch.rand(shape[1], dtype=dtype)
            args = logits, target, weight
            options = {"reduction": reduction, "label_smoothing": smoothing}
            got = evaluate(cross_entropy, *args, **options)
            exact = evaluate(F.cross_entropy, *args, convert=exactly, **options)
            close = partial(torch.testing.assert_close, rtol=error, atol=error)
            close(got.value.double(), exact.value)
            for ours, ideal in zip(got.gradients, exact.gradients, strict=True):
                close(ours.double(), ideal)


JUMPS = [5, 7, 10, 50, 87, 88, 89, 100, 130, 200, 300, 700, 750, 1500, 1e4, 1e9, 1e10, 1e30, 3e38]


@pytest.mark.cpu
@grid(isa=ISAS, dtype=[torch.float32, torch.float64], smoothing=[0.0, 0.0, 0.1, 0.1])
def test_a_much_larger_logit_late_in_a_row(smoothing: float, dtype: torch.dtype, isa: str) -> None:
    """The difference to earlier logits may overflow the exponent."""
    jumps = [jump for jump in JUMPS if jump < 1e9 or not smoothing]  # 1e9 is rounded too much
    logits = torch.randn(len(jumps), 3000, dtype=dtype)
    logits[:, 2000:2500] += torch.tensor(jumps, dtype=dtype)[:, None]
    for first in (0, 2000):  # far from the largest, and near it
        target = torch.randint(first, first + 500, (len(jumps),))
        check(logits.requires_grad_(), target, reduction="none", label_smoothing=smoothing)


@pytest.mark.cpu
@pytest.mark.parametrize("classes", [5000, 5008], ids="C{}".format)
def test_a_large_gradient_in_new_and_in_recycled_memory(classes: int) -> None:
    """Non-temporal stores are used if the pages are mapped and rows start at a cache line."""
    logits = torch.randn(840, classes, requires_grad=True)
    target = torch.randint(classes, (840,))
    expected = evaluate(F.cross_entropy, logits, target, convert=exactly)
    for _ in range(3):
        got = evaluate(cross_entropy, logits, target)
        gradient = got.gradients[0].double()
        torch.testing.assert_close(gradient, expected.gradients[0], rtol=1e-5, atol=0)


@grid(value=[NAN, INF, -INF, 0.0, -1.0, 5.0], reduction=REDUCTIONS)
def test_unusual_probabilities_and_weights(value: float, reduction: str) -> None:
    for smoothing in (0.0, 0.1):
        logits, target = problem((4, 5), "probabilities")
        target[1, 2] = value
        weight = torch.ones(5)
        options = {"reduction": reduction, "label_smoothing": smoothing}
        check(logits, target.requires_grad_(), weight, **options)
        weight[2] = value
        for kind in KINDS:
            check(*problem((4, 5), kind), weight, **options)


@pytest.mark.interpreted
@grid(shape=[(4, 0), (0,), (4, 0, 3)], reduction=REDUCTIONS, smoothing=[0.0, 0.1])
def test_no_classes(shape: tuple[int, ...], smoothing: float, reduction: str) -> None:
    logits = torch.empty(shape, requires_grad=True)
    options = {"reduction": reduction, "label_smoothing": smoothing}
    check(logits, torch.empty(shape), **options)
    if len(shape) < 3:  # with more dimensions, torch reports a shape mismatch
        ignored = torch.full(shape[:-1], -100)
        check(logits, ignored, **options)
        if DEVICE == "cpu":  # a device-side assert would break the CUDA context
            with pytest.raises(IndexError):
                cross_entropy(logits, torch.zeros_like(ignored), **options)


@grid(smoothing=[-1.0, -0.1, -0.0, NAN, True, False, 0, 1], target_kind=KINDS)
def test_smoothing_of_zero_and_below(smoothing: float, target_kind: str) -> None:
    check(*problem((4, 5), target_kind), label_smoothing=smoothing)


@grid(logits_dtype=FLOATS, target_dtype=FLOATS, reduction=REDUCTIONS)
def test_probabilities_of_another_dtype_promote(
    logits_dtype: torch.dtype, target_dtype: torch.dtype, reduction: str
) -> None:
    logits, target = problem((4, 5), "probabilities")
    logits = logits.detach().to(logits_dtype).requires_grad_()
    target = target.to(target_dtype).requires_grad_()
    for smoothing, weight in ((0.0, None), (0.1, None), (0.1, torch.rand(5))):
        check(logits, target, weight, reduction=reduction, label_smoothing=smoothing)
