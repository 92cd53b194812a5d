"""Strides change where values lie, never what comes out."""

from __future__ import annotations

import pytest
import torch
from catalogue import TORCH as F
from compare import assert_matches_torch
from conftest import KernelCalls
from grid import grid
from layouts import LAYOUTS, SAME_VALUES, Layout
from samples import ACTIVATIONS
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


@grid(op=ACTIVATIONS, layout=["contiguous", "classes_innermost", "transposed"])
def test_activations_keep_the_layout_of_dense_memory(op: Activation, layout: str) -> None:
    x = SAME_VALUES[layout](torch.randn(2, 8, 4, 3))
    found = getattr(functional, op.name)(x, **op.required)
    assert found.stride() == op.reference(x, **op.required).stride()


@pytest.mark.cpu
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_operands_in_rows_are_read_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that broadcast along rows or columns, and half of each row, are not copied."""
    copied: list[Tensor] = []
    copy = Tensor.copy_

    def counted(self: Tensor, source: Tensor) -> Tensor:
        copied.append(source)
        return copy(self, source)

    monkeypatch.setattr(Tensor, "copy_", counted)
    x, whole = torch.randn(70, 300), torch.randn(70, 600)
    of_rows, of_columns = torch.randn(70, 1), torch.randn(300)
    for other in (of_rows, of_columns, whole[:, 300:], whole[:, :300], torch.randn(1, 1)):
        for dtype in (torch.float32, torch.bfloat16):
            given = [t.to(dtype) for t in (x, other)]
            given[0].requires_grad_()
            assert_matches_torch(functional.huber_loss, F.huber_loss, *given, reduction="sum")
    assert not copied
    functional.huber_loss(x.T, whole[:, ::2].T)  # every other element
    assert len(copied) == 1
