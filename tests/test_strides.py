"""Strides change where values lie, never what comes out."""

from __future__ import annotations

import math
from typing import Any

import torch
from calls import TORCH as F
from calls import Case, every_case
from compare import assert_matches_torch
from conftest import KernelCalls
from grid import grid
from layouts import LAYOUTS, SAME_VALUES, Layout
from samples import ACTIVATIONS, LOSSES, SAMPLES, Loss
from torch import Tensor

from pyfused import functional
from pyfused import layout as layouts
from pyfused.functional import cross_entropy
from pyfused.ops.activation import Activation

close = torch.testing.assert_close

REDUCTIONS = ["none", "mean", "sum"]
SHAPES = [(5,), (7, 5), (70, 3), (3, 130), (6, 5, 1), (2, 5, 3), (2, 3, 70), (3, 4, 2, 5)]
SHAPES += [(7, 3, 1, 1), (2, 3, 2, 1, 5)]


def logits_and_target(shape: tuple[int, ...], kind: str) -> tuple[Tensor, Tensor]:
    class_dim = min(len(shape) - 1, 1)
    logits = torch.randn(shape) * 3
    if kind == "probabilities":
        return logits, torch.randn(shape).softmax(class_dim)
    target = torch.randint(shape[class_dim], shape[:class_dim] + shape[class_dim + 1 :])
    if target.dim():
        target.view(-1)[0] = -100
    return logits, target


@grid(
    layout=LAYOUTS.values(),
    shape=SHAPES,
    target_kind=["index", "probabilities"],
    reduction=REDUCTIONS,
)
def test_logits(
    layout: Layout,
    shape: tuple[int, ...],
    target_kind: str,
    reduction: str,
    kernel_calls: KernelCalls,
) -> None:
    logits, target = logits_and_target(shape, target_kind)
    logits = layout(logits).requires_grad_()
    for smoothing in (0.0, 0.1):
        options = {"reduction": reduction, "label_smoothing": smoothing}
        assert_matches_torch(cross_entropy, F.cross_entropy, logits, target, **options)
    assert kernel_calls["cross_entropy"] >= 2


def test_rows_of_a_batch_have_one_outer_index() -> None:
    """The kernels take several rows at a time, of the same outer index."""
    for shape in ((6, 5), (6, 5, 1), (6, 5, 1, 1)):
        logits = torch.empty(shape)
        assert layouts.row_sizes(logits) == (1, 6, 5)
        assert layouts.strides_of(logits) == (0, 5, 1)


@grid(
    loss=LOSSES,
    layout=LAYOUTS.values(),
    other=[*LAYOUTS.values()][1:],
    shape=[(5,), (7, 5), (2, 3, 70), (3, 4, 2, 5)],
    reduction=REDUCTIONS,
)
def test_pointwise_losses(
    loss: Loss,
    layout: Layout,
    other: Layout,
    shape: tuple[int, ...],
    reduction: str,
    kernel_calls: KernelCalls,
) -> None:
    options: dict[str, Any] = loss.parameters | {"reduction": reduction}
    given = loss.draw(shape, requiring=(), scale=0.25 if SAMPLES[loss.op.name].cancels else 1.0)
    first, *others = given
    given |= {name: other(given[name]) for name in others} | {first: layout(given[first])}
    for name in loss.differentiated:
        given[name].requires_grad_()
    if loss.takes_weight:
        given["weight"] = other(loss.weight(shape))
    assert_matches_torch(loss.ours, loss.reference, **given, **options)
    assert kernel_calls[loss.kernel]


@grid(op=ACTIVATIONS, layout=LAYOUTS.values(), shape=SHAPES, dtype=[torch.float32, torch.float64])
def test_activations(
    op: Activation,
    layout: Layout,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    kernel_calls: KernelCalls,
) -> None:
    x = layout(torch.randn(shape).to(dtype)).requires_grad_()
    assert_matches_torch(getattr(functional, op.name), op.reference, x, widened=False)
    assert kernel_calls[op.name] == 1


@every_case
def test_upstream_gradients(case: Case) -> None:
    """The gradient from above has strides of its own."""
    x = torch.randn(6, 5, requires_grad=True)
    for layout in LAYOUTS.values():
        ours, of_torch = case.ours(x), case.reference(x)
        above = layout(torch.randn(6, 5))
        if ours.dim() == 1:
            above = above[:, 0] if above.stride(0) else above[0, :1].expand(6)
        elif not ours.dim():
            above = above[0, 0]
        # torch's gelu takes a library that cannot describe windows which overlap
        expected = torch.autograd.grad(of_torch, x, above.contiguous())
        close(torch.autograd.grad(ours, x, above), expected)


@grid(layout=SAME_VALUES.values(), shape=SHAPES)
def test_a_view_that_works_on_torchs_result_works_on_ours(
    layout: Layout, shape: tuple[int, ...]
) -> None:
    """Where torch returns contiguous memory, `.view(-1)` has to go on working."""
    x = layout(torch.randn(shape))
    _, target = logits_and_target(shape, "index")
    calls: list[tuple[str, dict[str, Any]]] = [
        ("cross_entropy", {"input": x, "target": target, "reduction": "none"}),
        *((op.name, {"input": x}) for op in ACTIVATIONS),
    ]
    for loss in LOSSES:
        given = {n: layout(t) for n, t in loss.draw(shape, requiring=()).items()}
        calls.append((loss.op.name, given | loss.parameters | {"reduction": "none"}))
    for name, arguments in calls:
        if getattr(F, name)(**arguments).is_contiguous():
            assert getattr(functional, name)(**arguments).is_contiguous()


@grid(op=ACTIVATIONS, layout=["contiguous", "classes_innermost", "transposed"])
def test_activations_keep_the_layout_of_dense_memory(op: Activation, layout: str) -> None:
    x = SAME_VALUES[layout](torch.randn(2, 8, 4, 3))
    assert getattr(functional, op.name)(x).stride() == op.reference(x).stride() == x.stride()


def test_memory_is_not_read_or_written_beyond_the_view() -> None:
    """NaN all around a view: nothing of it in the results, and all of it still there."""
    memory = torch.full((9, 40), float("nan"))
    view = memory[2:7, 3:20]
    view.copy_(torch.randn(5, 17))
    logits = view.detach().requires_grad_()
    target = torch.randint(17, (5,))
    values = [
        cross_entropy(logits, target),
        cross_entropy(logits.T[None], torch.randint(17, (1, 5))),
        *(getattr(functional, op.name)(logits).sum() for op in ACTIVATIONS),
    ]
    for loss in LOSSES:
        first = loss.bounded[0]
        if math.isinf(first.low):
            given = loss.draw((5, 17), requiring=()) | {first.name: logits}
            values.append(loss.ours(**given, **loss.parameters, reduction="mean"))
    for value in values:
        assert bool(value.isfinite())
        (gradient,) = torch.autograd.grad(value, logits)
        assert bool(gradient.isfinite().all())
    assert int(memory.isnan().sum()) == 9 * 40 - 5 * 17
