"""Losses that torch does not have, in its terms: what is computed where no kernel does it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyfused import checks
from pyfused.backends import CrossEntropyOptions, Head, Shaping
from pyfused.ops import metrics
from pyfused.ops.declaration import reduction_of
from pyfused.ops.originals import original
from pyfused.ops.shaping import scaled_with_margin

_cross_entropy = original(F.cross_entropy)
_linear_cross_entropy = (  # from torch 2.13 on
    original(F.linear_cross_entropy) if hasattr(F, "linear_cross_entropy") else None
)


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
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    denominator: float | Tensor | None = None,
    loss_dtype: torch.dtype | None = None,
    return_metrics: bool = False,
) -> Any:
    beyond = gamma, z_loss, token_weight, denominator, loss_dtype
    if return_metrics:
        options = CrossEntropyOptions(ignore_index, reduction, label_smoothing, *beyond)
        legacy = size_average, ignore_index, reduce, reduction, label_smoothing
        loss = cross_entropy(input, target, weight, *legacy, *beyond)
        return loss, metrics.of_logits(input, target, options)
    if beyond == (0, 0, None, None, None):
        return _cross_entropy(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    reduction = reduction_of(size_average, reduce, reduction)
    options = CrossEntropyOptions(ignore_index, reduction, label_smoothing, *beyond)
    checks.reduction(reduction)
    checks.cross_entropy(input, target, weight, options)
    dim = 0 if input.dim() == 1 else 1
    input = input if loss_dtype is None else input.to(loss_dtype)
    weight = weight if weight is None or loss_dtype is None else weight.to(loss_dtype)
    if gamma:
        log_probability = F.log_softmax(input, dim)
        focused = log_probability * (-log_probability.expm1()) ** gamma
        each = F.nll_loss(focused, target, weight, None, ignore_index, None, "none")
    else:
        each = _cross_entropy(
            input, target, weight, None, ignore_index, None, "none", label_smoothing
        )
    each = each + z_loss * input.logsumexp(dim).reshape(each.shape) ** 2 if z_loss else each
    each = each if loss_dtype is None else each.to(loss_dtype)
    counts = torch.ones_like(each)
    if not target.is_floating_point():
        live = target.reshape(each.shape) != ignore_index
        if weight is not None:
            counts = weight[target.where(target != ignore_index, 0).long()].reshape(each.shape)
        counts, each = counts.to(each.dtype).where(live, 0), each.where(live, 0)
    if token_weight is not None:
        token_weight = token_weight.to(each.dtype).reshape(each.shape)
        each, counts = each * token_weight, counts * token_weight
    if reduction != "mean":
        return each if reduction == "none" else each.sum()
    if isinstance(denominator, Tensor):
        denominator = denominator.reshape(()).to(each.dtype)
    return each.sum() / (counts.sum() if denominator is None else denominator)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    memory_budget: int | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    token_weight: Tensor | None = None,
    denominator: float | Tensor | None = None,
    loss_dtype: torch.dtype | None = None,
    margin: float = 0.0,
    margin_kind: str = "cosface",
    scale: float = 1.0,
    filter_eps: float = 0.0,
    return_metrics: bool = False,
) -> Any:
    beyond = z_loss, token_weight, denominator, loss_dtype
    plain = beyond == (0, None, None, None) and not return_metrics
    plain = plain and softcap is None and not margin and scale == 1
    if plain and _linear_cross_entropy is not None:
        return _linear_cross_entropy(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            options=options,
        )
    ignore_index = -100 if ignore_index is None else ignore_index
    given = CrossEntropyOptions(ignore_index, reduction, label_smoothing, 0.0, *beyond)
    shaping = Shaping(softcap, margin, margin_kind, scale)
    head = Head(input, linear_weight, linear_bias, target, weight, shaping)
    checks.linear_cross_entropy(head, given, memory_budget, filter_eps)
    return of_logits(head, given, return_metrics)


def of_logits(head: Head, options: CrossEntropyOptions, return_metrics: bool = False) -> Any:
    """Cross-entropy of a linear layer's output, from all of it."""
    input, linear_weight, linear_bias, target, weight, shaping = head
    bias = None if linear_bias is None else linear_bias.flatten()
    logits = F.linear(input, linear_weight.flatten(0, -2), bias)
    logits = logits.reshape(*input.shape[:-1], *linear_weight.shape[:-1])
    if shaping.margin or shaping.scale != 1:
        logits = scaled_with_margin(logits, target, shaping)
    logits = logits if shaping.softcap is None else softcap(logits, shaping.softcap)
    options_of_call = options._asdict() | {"return_metrics": return_metrics}
    return cross_entropy(logits, target, weight, **options_of_call)


def softcap(input: Tensor, cap: float = 30.0) -> Tensor:
    checks.bounded("cap", cap, positive=True)
    return cap * (input / cap).tanh()


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
