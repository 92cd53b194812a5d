"""Losses that torch does not have, in its terms: what is computed where no kernel does it."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from pyfused import checks
from pyfused.backends import CrossEntropyOptions
from pyfused.ops.torchs import original

_cross_entropy = original(F.cross_entropy)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    gamma: float = 0.0,
) -> Tensor:
    if gamma == 0:
        return _cross_entropy(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    checks.cross_entropy(
        input, target, weight, CrossEntropyOptions(ignore_index, reduction, label_smoothing, gamma)
    )
    log_probability = F.log_softmax(input, 0 if input.dim() == 1 else 1)
    focused = log_probability * (-log_probability.expm1()) ** gamma
    return F.nll_loss(focused, target, weight, size_average, ignore_index, reduce, reduction)


def quantile_loss(
    input: Tensor, target: Tensor, quantile: float = 0.5, reduction: str = "mean"
) -> Tensor:
    checks.parameter("quantile", quantile, 0.0, 1.0, False)
    difference = target - input
    return _reduced(torch.maximum(quantile * difference, (quantile - 1) * difference), reduction)


def rmse_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    weight: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    checks.parameter("eps", eps, 0.0, math.inf, False)
    loss = F.mse_loss(input, target, reduction=reduction, weight=weight)  # type: ignore[call-arg]
    return (loss + eps).sqrt()


def log_cosh_loss(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    size = (input - target).abs()
    return _reduced(size + F.softplus(-2 * size) - math.log(2), reduction)


def hinge_loss(
    input: Tensor,
    target: Tensor,
    margin: float = 1.0,
    squared: bool = False,
    reduction: str = "mean",
) -> Tensor:
    slack = (margin - target * input).clamp(min=0)
    return _reduced(slack * slack if squared else slack, reduction)


def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float = 0.25,
    gamma: float = 2,
    reduction: str = "none",
    weight: Tensor | None = None,
    ignore_index: float | None = None,
) -> Tensor:
    checks.parameter("alpha", alpha, -math.inf, 1.0, False)
    checks.parameter("gamma", gamma, 0.0, math.inf, False)
    counts = torch.ones_like(targets) if ignore_index is None else targets.ne(ignore_index)
    targets = targets.where(counts.bool(), 0)
    positive = inputs.sigmoid()
    wrong = positive * (1 - targets) + (1 - positive) * targets
    each = F.binary_cross_entropy_with_logits(inputs, targets, reduction="none") * wrong**gamma
    if alpha >= 0:
        each = each * (alpha * targets + (1 - alpha) * (1 - targets))
    each = (each if weight is None else each * weight).where(counts.bool(), 0)
    return each.sum() / counts.sum() if reduction == "mean" else _reduced(each, reduction)


def _reduced(each: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return each
    checks.reduction(reduction)
    return each.mean() if reduction == "mean" else each.sum()
