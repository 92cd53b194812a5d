"""The sizes from which kernels are used."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pyfused
from pyfused.dispatch import sizes
from pyfused.dispatch.operator import Operator
from pyfused.dispatch.reasons import SMALL
from pyfused.ops.operators import OPERATORS

pytestmark = [pytest.mark.cpu, pytest.mark.thresholds]
FIRST, SECOND = 1 << 10, 1 << 12


def runs_torch(op: str, *arguments: Any, **options: Any) -> bool:
    return pyfused.explain(op, *arguments, **options).backend == "torch"


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The columns of a row that are set have another limit."""

    def other(op: Operator, *_: Any) -> sizes.Limits:
        row = sizes._row(sizes.ON_CPU, op) or sizes.Limits(0)
        return sizes.Limits(*[None if x is None else SECOND for x in row[:4]])._replace(
            from_elements=FIRST, least=FIRST, most=SECOND
        )

    monkeypatch.setattr(sizes, "_limits", other)
    for op in OPERATORS.values():
        monkeypatch.setattr(op, "limits", {})


@pytest.mark.parametrize(("reduction", "limit"), [("mean", FIRST), ("none", SECOND)])
def test_unreduced_losses(reduction: str, limit: int) -> None:
    for elements in (limit - 1, limit):
        x = torch.zeros(elements)
        assert runs_torch("mse_loss", x, x, reduction=reduction) == (elements < limit)


@pytest.mark.parametrize("classes", [sizes.FEW, sizes.FEW + 1])
def test_few_classes(classes: int) -> None:
    x, is_few = torch.zeros(-(-FIRST // classes), classes), classes == sizes.FEW
    assert runs_torch("cross_entropy", x, torch.zeros(len(x)).long()) == is_few
    assert runs_torch("softmax", x, 1) == is_few
    assert runs_torch("softmax", x.t(), -2) == is_few
    assert not runs_torch("softmax", x.t().contiguous(), -2)  # torch vectorises over columns


@pytest.mark.parametrize("needs_grad", [False, True])
def test_calls_without_gradients(needs_grad: bool) -> None:
    x = torch.zeros(FIRST, requires_grad=needs_grad)
    rows, target = x.view(-1, 64), torch.zeros(FIRST // 64, dtype=torch.int64)
    assert runs_torch("gelu", x) != needs_grad
    assert runs_torch("nll_loss", rows, target) != needs_grad
    with torch.no_grad():
        assert runs_torch("gelu", x)
        assert runs_torch("nll_loss", rows, target)


def test_the_least_and_the_largest_limit() -> None:
    row = sizes.Limits(sizes.MEDIUM, few_classes=sizes.SMALL, unreduced=sizes.NEVER).times(2)
    assert row[:4] == (2 * sizes.MEDIUM, 2 * sizes.SMALL, None, 2 * sizes.NEVER)
    assert (row.least, row.most) == (2 * sizes.SMALL, 2 * sizes.NEVER)
    assert sizes.Limits(sizes.ALWAYS, unreduced=sizes.SMALL).times(8).least == 0


def test_few_classes_of_half_precision() -> None:
    for classes, expected in ((2 * sizes.FEW + 1, True), (2 * sizes.FEW + 2, False)):
        x = torch.zeros(-(-FIRST // classes), classes, dtype=torch.bfloat16)
        assert runs_torch("cross_entropy", x, torch.zeros(len(x)).long()) == expected


def test_empty_calls_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "FORCED", "cpu")
    for elements in (0, 1):
        x = torch.zeros(elements)
        assert runs_torch("mse_loss", x, x) == (elements == 0)


# ---- GPUs ----------------------------------------------------------------------------------------


def test_explain_names_the_numbers_that_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(sizes, "HOST_US", 20.0)
    monkeypatch.setattr(sizes, "GB_PER_S", 100.0)
    for op in OPERATORS.values():
        monkeypatch.setattr(op, "limits", {})
    x = torch.empty(100, 65, device="meta")  # neither CPU nor GPU, but dispatched like a GPU's
    target = torch.empty(100, dtype=torch.int64, device="meta")
    by_numbers = "(20 us for a call on the host, 100 GB/s on the GPU)"
    for logits, limit in ((x, 65_536), (x[:, :64], 16_384)):
        reason = pyfused.explain("cross_entropy", logits, target).reason
        assert reason == f"{SMALL}: kernels run from {limit:,} elements {by_numbers}"
    reason = pyfused.explain("margin_ranking_loss", x, x, x).reason
    assert reason == f"{SMALL}: kernels run from 16,384 elements"
    assert pyfused.explain("relu", x).reason == SMALL


def test_every_size_is_undone() -> None:
    op = OPERATORS["mse_loss"]
    before = op.least
    with sizes.every_size():
        assert op.least == (0, 0)
        with sizes.dispatching_small_calls():
            pass
        assert op.least == (0, 0)
    assert op.least == before > (0, 0)
