"""Losses that torch lacks: their definitions equal textbook formulas in float64.

`test_contract.py` and `test_fuzz.py` compare the kernels with these definitions;
`test_contract_options.py` compares others with closed forms.
"""

from __future__ import annotations

from typing import Any

import catalogue
import pytest
import torch
from catalogue import EXAMPLES, Call, Example
from check_calls import run
from samples import OF_CLASSES
from torch import Tensor
from torch.nn import functional as F


def capped(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else cap * torch.tanh(logits / cap)


def layer(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None = None) -> Tensor:
    """Returns logits of shape (N, C, ...)."""
    logits = torch.tensordot(input, linear_weight, ([-1], [-1]))
    return logits if linear_bias is None else logits + linear_bias


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    gamma: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
    denominator: float | None = None,
    reduction: str = "mean",
    with_metrics: bool = False,
    **_: Any,  # options that do not change results in float64
) -> Any:
    logits = capped(input, softcap) * scale / temperature
    dim, options = min(logits.dim() - 1, 1), {"reduction": "none", "ignore_index": ignore_index}
    each = F.cross_entropy(logits, target, weight, label_smoothing=label_smoothing, **options)
    if gamma:
        each = each * (1 - torch.exp(-F.cross_entropy(logits, target, **options))) ** gamma
    each, counts = each + z_loss * logits.logsumexp(dim) ** 2, torch.ones_like(each)
    valid = counts.bool() if target.is_floating_point() else target != ignore_index
    if weight is not None and not target.is_floating_point():
        counts = weight[target.where(valid, 0)]
    if token_weight is not None:
        each, counts = each * token_weight, counts * token_weight
    each, counts = each.where(valid, 0), counts.where(valid, 0)
    divisor = counts.sum() if denominator is None else denominator
    loss = {"none": each, "sum": each.sum(), "mean": each.sum() / divisor}[reduction]
    return (loss, metrics(logits, target, valid, ignore_index)) if with_metrics else loss


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


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None = None,
    **options: Any,
) -> Any:
    return cross_entropy(layer(input, linear_weight, linear_bias), target, **options)


def contrastive_loss(
    a: Tensor,
    b: Tensor,
    scale: float = 1.0,
    bias: Any = None,
    reduction: str = "mean",
    memory_budget: int | None = None,
) -> Tensor:
    """Returns the loss of SigLIP if there is a bias, else that of CLIP."""
    logits, target = scale * a @ b.T, torch.arange(len(a))
    if bias is not None:
        each = -F.logsigmoid((2 * torch.eye(len(a)) - 1).to(a) * (logits + bias)).sum(1)
    else:
        both = logits, logits.T
        each = sum(F.cross_entropy(x, target, reduction="none") for x in both) / 2
    return each if reduction == "none" else getattr(each, reduction)()


def textbook(call: Call, **given: Any) -> Any:
    return globals()[call.op.name](**given)


CASES = [
    pytest.param(example, shape, id=f"{example.id}-{len(shape)}d")
    for example in EXAMPLES.values()
    if example.op.name in globals()
    for shape in ((6, 5), (2, 5, 3))
    if len(shape) == 2 or isinstance(example.op, OF_CLASSES)
]


@pytest.mark.cpu
@pytest.mark.parametrize(("example", "shape"), CASES)
def test_definitions_equal_textbook_formulas(example: Example, shape: tuple[int, ...]) -> None:
    call = example.call(torch.float64, shape)
    torch.testing.assert_close(run(call, catalogue.reference), run(call, textbook))
