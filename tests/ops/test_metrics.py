"""Metrics of the targets, computed in the same pass as the loss."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from compare import FLOATS
from conftest import ISAS, KernelCalls, backend
from grid import grid
from torch import Tensor

from pyfused import functional as fused
from pyfused.backends import cpu
from pyfused.ops.metrics import from_logits

close = torch.testing.assert_close
MANY = 40_000 if backend is cpu else 2_000  # more classes than a tile, in several programs


SPECIAL: dict[str, Callable[[Tensor], Tensor]] = {
    "ties": lambda row: row.index_fill(0, torch.tensor([2, 5]), 50.0),
    "equal": lambda row: row * 0 + 3,
    "masked": lambda row: row.index_fill(0, torch.tensor([0, 2, 4]), -torch.inf),
    "one left": lambda row: (row * 0 - torch.inf).index_fill(0, torch.tensor([3]), 1.0),
    "certain": lambda row: row.index_fill(0, torch.tensor([4]), 1e4),
    "nan": lambda row: row.index_fill(0, torch.tensor([4, 5]), torch.nan),
    "nan behind inf": lambda row: row.index_fill(0, torch.tensor([5]), torch.nan).index_fill(
        0, torch.tensor([1]), torch.inf
    ),
    "inf": lambda row: row.index_fill(0, torch.tensor([4]), torch.inf),
    "nothing": lambda row: row * 0 - torch.inf,
}


@pytest.mark.interpreted
@grid(name=SPECIAL, classes=[6, 91, 400, 3000, MANY], isa=ISAS)
def test_special_logits(name: str, classes: int, isa: str, kernel_calls: KernelCalls) -> None:
    """Metrics follow torch's argmax and logsumexp: the first of ties, and NaN above all numbers."""
    input = torch.full((2, classes), -3.0)
    input[1, classes - 6 :] = SPECIAL[name](torch.linspace(-1, 1, 6))
    if name == "nothing":
        input[1] = -torch.inf
    target = torch.tensor([0, classes - 3])
    _, metrics = fused.cross_entropy_with_metrics(input, target, z_loss=0.125)
    assert kernel_calls["cross_entropy"] == 1
    exact = input.double()
    lse, log_p = exact.logsumexp(1).float(), exact.log_softmax(1)
    entropy = torch.special.entr(log_p.exp()).sum(1).float()
    assert metrics.prediction.equal(input.argmax(1))
    assert metrics.correct.equal(input.argmax(1) == target)
    if "inf" not in name:  # else it is NaN, like the loss
        close(metrics.log_sum_exp, lse, equal_nan=True)
    found = metrics.log_probability, metrics.entropy
    close(found, (log_p[[0, 1], target].float(), entropy), equal_nan=True)


LAYOUTS: dict[str, Callable[[], torch.Tensor]] = {
    "few classes": lambda: torch.randn(203, 10),
    "columns": lambda: torch.randn(10, 203).t(),
    "images": lambda: torch.randn(3, 50, 7, 9),
    "few positions": lambda: torch.randn(1, 701, 2),
    "one position": lambda: torch.randn(2000, 1).t()[:, :1001],
    "sliced rows": lambda: torch.randn(9, 800)[:, ::2],
}


@pytest.mark.interpreted
@grid(name=LAYOUTS, dtype=FLOATS, isa=ISAS)
def test_layouts(name: str, dtype: torch.dtype, isa: str) -> None:
    """One kernel computes the loss and the metrics; of ties, the first class counts."""
    input = LAYOUTS[name]().mul(4).round().div(4).to(dtype)  # with ties
    target = torch.randint(-1, input.shape[1], input.select(1, 0).shape)
    loss, found = fused.cross_entropy_with_metrics(input, target, ignore_index=-1)
    close(loss, fused.cross_entropy(input, target, ignore_index=-1))
    expected = from_logits(input.double(), target, -1)
    for x, y in zip(found, expected, strict=True):
        close(x, y.to(x.dtype), rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("small", [False, pytest.param(True, marks=pytest.mark.thresholds)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_ignored_rows_and_scaled_logits(dtype: torch.dtype, small: bool) -> None:
    """Scaled logits are not rounded."""
    input, target = torch.randn(6, 5).to(dtype), torch.tensor([0, 1, 2, -100, 4, 0])
    input[3, 0] = 5.0  # the prediction is the class that stands for an ignored target
    found = fused.cross_entropy_with_metrics(input, target, temperature=0.7)[1]
    assert [x[3].item() for x in found] == [0, 0, -100, False, 0]
    exact = fused.cross_entropy_with_metrics(input.double(), target, temperature=0.7)[1]
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    assert [x.dtype for x in found if x.is_floating_point()] == [wide] * 3
    assert not any(x.requires_grad for x in found)
    for x, y in zip(found, exact, strict=True):
        close(x, y.to(x.dtype), rtol=3e-6, atol=3e-6)
