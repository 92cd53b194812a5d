"""Strides change where values lie, never what comes out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from calls import TORCH as F
from calls import Case, every_case
from compare import FLOATS, HALF, assert_matches_torch
from conftest import KernelCalls
from layouts import LAYOUTS, SAME_VALUES, Layout
from samples import ACTIVATIONS, LOSSES, SAMPLES, Loss, every_activation, every_loss
from torch import Tensor

from pyfused import functional
from pyfused.backends import layout as layouts
from pyfused.functional import cross_entropy
from pyfused.ops.activation import Activation

close = torch.testing.assert_close

every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
SHAPES = [(5,), (7, 5), (70, 3), (3, 130), (6, 5, 1), (2, 5, 3), (2, 3, 70), (3, 4, 2, 5)]
SHAPES += [(7, 3, 1, 1), (2, 3, 2, 1, 5)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def logits_and_target(shape: tuple[int, ...], kind: str) -> tuple[Tensor, Tensor]:
    class_dim = min(len(shape) - 1, 1)
    logits = torch.randn(shape) * 3
    if kind == "probabilities":
        return logits, torch.randn(shape).softmax(class_dim)
    target = torch.randint(shape[class_dim], shape[:class_dim] + shape[class_dim + 1 :])
    if target.dim():
        target.view(-1)[0] = -100
    return logits, target


@every_shape
@every_layout
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


def test_a_row_of_one_position_is_one_of_many() -> None:
    """The kernels take several positions at a time, but of the same outer one."""
    for shape in ((6, 5), (6, 5, 1), (6, 5, 1, 1)):
        logits = torch.empty(shape)
        assert layouts.positions(logits) == (1, 6, 5)
        assert layouts.strides_of(logits) == (0, 5, 1)


@every_shape
@every_layout
def test_target(layout: Layout, shape: tuple[int, ...], target_kind: str, reduction: str) -> None:
    logits, target = logits_and_target(shape, target_kind)
    target = layout(target)
    if target_kind == "probabilities":
        target.requires_grad_()
    logits.requires_grad_()
    assert_matches_torch(cross_entropy, F.cross_entropy, logits, target, reduction=reduction)


@every_layout
def test_logits_and_probabilities_laid_out_differently(layout: Layout, reduction: str) -> None:
    for other in LAYOUTS.values():
        logits, target = logits_and_target((3, 4, 2, 5), "probabilities")
        logits, target = layout(logits).requires_grad_(), other(target).requires_grad_()
        assert_matches_torch(cross_entropy, F.cross_entropy, logits, target, reduction=reduction)


@pytest.mark.parametrize("layout", ["every_second", "misaligned", "one_element_expanded"])
def test_class_weights(layout: str, target_kind: str, reduction: str) -> None:
    for shape in ((7, 5), (2, 5, 3), (3, 130)):
        logits, target = logits_and_target(shape, target_kind)
        weight = LAYOUTS[layout](torch.rand(shape[1]))
        options = {"reduction": reduction, "label_smoothing": 0.1}
        logits.requires_grad_()
        assert_matches_torch(cross_entropy, F.cross_entropy, logits, target, weight, **options)


@every_loss
@every_layout
@pytest.mark.parametrize("shape", [(5,), (7, 5), (2, 3, 70), (3, 4, 2, 5)], ids=str)
def test_pointwise_losses(
    loss: Loss,
    layout: Layout,
    shape: tuple[int, ...],
    reduction: str,
    kernel_calls: KernelCalls,
) -> None:
    options: dict[str, Any] = loss.parameters | {"reduction": reduction}
    cancels = SAMPLES[loss.op.name].cancels
    for other in LAYOUTS.values():
        given = loss.draw(shape, requiring=(), scale=0.25 if cancels else 1.0)
        first, *others = given
        given |= {name: other(given[name]) for name in others} | {first: layout(given[first])}
        for name in loss.differentiated:
            given[name].requires_grad_()
        assert_matches_torch(loss.ours, loss.reference, **given, **options)
        if loss.takes_weight:
            given["weight"] = other(loss.weight(shape))
            assert_matches_torch(loss.ours, loss.reference, **given, **options)
    assert kernel_calls[loss.kernel] >= (1 + loss.takes_weight) * len(LAYOUTS)


@every_activation
@every_shape
@every_layout
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
def test_activations(
    op: Activation,
    layout: Layout,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    kernel_calls: KernelCalls,
) -> None:
    x = layout(torch.randn(shape).to(dtype))
    rounded = dtype in HALF and SAMPLES[op.name].rounds
    # Where elements share memory, the sums of their gradients cancel; of rounded ones not alike.
    x.requires_grad_(not (rounded and layout is LAYOUTS["overlapping_windows"]))
    assert_matches_torch(getattr(functional, op.name), op.reference, x, widened=False)
    assert kernel_calls[op.name] == 1


@every_layout
@every_case
def test_upstream_gradients(case: Case, layout: Layout) -> None:
    """The gradient from above has strides of its own."""
    x = torch.randn(6, 5, requires_grad=True)
    ours, of_torch = case.ours(x), case.reference(x)
    above = layout(torch.randn(6, 5))
    if ours.dim() == 1:
        above = above[:, 0] if above.stride(0) else above[0, :1].expand(6)
    elif not ours.dim():
        above = above[0, 0]
    # torch's gelu takes a library that cannot describe windows which overlap
    close(torch.autograd.grad(ours, x, above), torch.autograd.grad(of_torch, x, above.contiguous()))


@pytest.mark.parametrize("layout", SAME_VALUES.values(), ids=SAME_VALUES.keys())
@every_shape
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


@pytest.mark.parametrize("layout", ["contiguous", "classes_innermost", "transposed"])
@every_activation
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
