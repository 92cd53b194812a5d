"""Metrics of the targets, computed in the same pass as the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from compare import FLOATS
from conftest import ISAS, KernelCalls, backend
from grid import grid
from torch import Tensor

from pyfused import functional as fused
from pyfused.backends import cpu
from pyfused.functional import Metrics

MANY = (1, 40_000 if backend is cpu else 2_000)  # more classes than a tile, in several programs
close = torch.testing.assert_close
SHAPES = ((6, 5), (3, 300), (7,), (2, 4, 3, 5), (2, 150, 6), MANY)
Z_LOSS = 0.125


def metrics(logits: Tensor, target: Tensor, valid: Tensor, ignore_index: int) -> list[Tensor]:
    dim = min(logits.dim() - 1, 1)
    log_p, prediction = logits.log_softmax(dim), logits.argmax(dim)
    entropy = -(log_p.exp() * log_p).sum(dim)
    if target.is_floating_point():
        at_target, label = (target * log_p).sum(dim), target.argmax(dim)
    else:
        label = target.where(valid, 0)
        at_target = log_p.gather(dim, label.unsqueeze(dim)).squeeze(dim)
    numbers = [x.where(valid, 0) for x in (at_target, logits.logsumexp(dim), entropy)]
    correct = valid & (prediction == label)
    return [*numbers[:2], prediction.where(valid, ignore_index), correct, numbers[2]]


def exact(input: Tensor, target: Tensor) -> Metrics:
    valid = target == target if target.is_floating_point() else target != -100
    if target.is_floating_point():
        valid, target = valid.select(min(input.dim() - 1, 1), 0), target.double()
    return Metrics(*metrics(input.detach().double(), target, valid, -100))


def assert_metrics(got: Metrics, expected: Metrics, dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    error = 1e-12 if wide is torch.float64 else 3e-6
    for name, mine, best in zip(Metrics._fields, got, expected, strict=True):
        assert not mine.requires_grad
        if mine.is_floating_point():
            assert mine.dtype is wide, name
            close(mine.double(), best.double(), rtol=error, atol=error, equal_nan=True, msg=name)
        else:
            assert mine.tolist() == best.tolist(), name


def assert_same(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Compares up to a rounding, because compilers may contract sums and products differently."""
    epsilon = 2 * torch.finfo(got[0].dtype).eps
    close(got, expected, rtol=epsilon, atol=epsilon)


def case(shape: tuple[int, ...], dtype: torch.dtype, probabilities: bool) -> tuple[Tensor, Tensor]:
    dim = min(len(shape) - 1, 1)
    input = (4 * torch.randn(shape)).to(dtype).requires_grad_()
    if probabilities:
        return input, torch.randn(shape).softmax(dim).to(dtype)
    target = torch.randint(0, shape[dim], (*shape[:dim], *shape[dim + 1 :]))
    target.view(-1)[1::3] = -100
    target.view(-1)[0] = int(input.detach().argmax(dim).flatten()[0])
    return input, target


@pytest.mark.interpreted
@grid(
    shape=SHAPES,
    dtype=FLOATS,
    probabilities=[False, True],
    reduction=["mean", "mean", "none", "none"],
)
def test_metrics_of_cross_entropy(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    probabilities: bool,
    reduction: str,
    kernel_calls: KernelCalls,
) -> None:
    """Class indices are exact, in one pass, and metrics do not change the loss."""
    input, target = case(shape, dtype, probabilities)
    options: dict[str, Any] = {"reduction": reduction, "z_loss": Z_LOSS}
    loss, metrics = fused.cross_entropy_with_metrics(input, target, **options)
    assert kernel_calls["cross_entropy"] == 1 + probabilities
    assert_metrics(metrics, exact(input, target), dtype)
    plain = fused.cross_entropy(input, target, **options)
    above = torch.rand_like(loss)
    assert_same(*[(x, *torch.autograd.grad(x, input, above)) for x in (loss, plain)])


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
@grid(name=SPECIAL, classes=[6, 91, 400, 3000], isa=ISAS)
def test_special_logits(name: str, classes: int, isa: str) -> None:
    """Metrics follow torch's argmax and logsumexp: the first of ties, and NaN above all numbers."""
    input = torch.full((2, classes), -3.0)
    input[1, classes - 6 :] = SPECIAL[name](torch.linspace(-1, 1, 6))
    if name == "nothing":
        input[1] = -torch.inf
    target = torch.tensor([0, classes - 3])
    _, metrics = fused.cross_entropy_with_metrics(input, target, z_loss=Z_LOSS)
    lse, log_p = input.logsumexp(1), input.log_softmax(1)
    entropy = torch.special.entr(log_p.exp()).sum(1)
    assert metrics.prediction.tolist() == input.argmax(1).tolist()
    if "inf" not in name:  # else it is NaN, like the loss
        close(metrics.log_sum_exp, lse, equal_nan=True)
    found = metrics.log_probability, metrics.entropy
    close(found, (log_p[[0, 1], target], entropy), equal_nan=True)


@pytest.mark.thresholds
def test_metrics_of_a_small_call_do_not_round_scaled_logits() -> None:
    input, target = torch.randn(6, 5).bfloat16(), torch.tensor([0, 1, 2, 3, 4, 0])
    found = fused.cross_entropy_with_metrics(input, target, temperature=0.7)[1]
    assert_metrics(found, exact(input.double() / 0.7, target), input.dtype)
