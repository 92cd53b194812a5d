"""Metrics of logits and targets, which the kernels compute with the loss in one pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyfused.layout import accumulate_dtype, class_targets, logit_at, loss_shape


class Metrics(NamedTuple):
    """Metrics of each target, in the shape of class indices; none of them requires grad.

    Floating-point metrics are float32, or float64 for float64 logits or class probabilities, and 0
    for ignored targets.

    Attributes:
        log_probability: ``input[target] - log_sum_exp``, in nats, without smoothing or weights;
            with class probabilities ``sum_c target_c * log p_c``.
        log_sum_exp: ``log sum_c exp(input_c)``; NaN if a logit is inf.
        prediction: The first class with the largest logit, int64; ``ignore_index`` where the target
            is ignored.
        correct: Whether the prediction is the target, or the target's most probable class; False
            where the target is ignored.
        entropy: ``-sum_c p_c * log p_c``, in nats.
    """

    log_probability: Tensor
    log_sum_exp: Tensor
    prediction: Tensor
    correct: Tensor
    entropy: Tensor


def from_results(results: Tensor, target: Tensor, ignore_index: int, dtype: torch.dtype) -> Metrics:
    """Returns the metrics for a target of any shape.

    Args:
        results: The fields METRICS of each row, which are 0 for rows that are ignored.
    """
    *fields, index = results.detach().reshape(len(results), -1)
    fields = [x.to(dtype, copy=True) for x in fields]
    return _from_rows(fields, index.long(), target, ignore_index)


def log_sum_exp(input: Tensor, dim: int) -> Tensor:
    """Returns the log-sum-exp; as in the kernels, it is NaN if an element is inf."""
    return input.masked_fill(input == torch.inf, torch.nan).logsumexp(dim)


def from_logits(input: Tensor, target: Tensor, ignore_index: int) -> Metrics:
    """Returns the metrics of logits, computed by torch's operators."""
    dim, dtype = min(input.dim() - 1, 1), accumulate_dtype(input.dtype)
    input, target = input.detach().to(dtype), target.detach()
    lse = log_sum_exp(input, dim)
    log_p = input - lse.unsqueeze(dim)
    entropy = torch.special.entr(log_p.exp()).sum(dim)
    if target.is_floating_point():
        log_p = (target * log_p).sum(dim)
    else:
        target = class_targets(target, lse.shape)
        log_p, valid = logit_at(input, target)[1] - lse, target != ignore_index
        log_p, entropy, lse = (x.where(valid, 0) for x in (log_p, entropy, lse))
    results = [x.flatten() for x in (log_p, entropy, lse)]
    return _from_rows(results, input.argmax(dim).flatten(), target, ignore_index)


def _from_rows(
    results: list[Tensor], prediction: Tensor, target: Tensor, ignore_index: int
) -> Metrics:
    """Returns the metrics, given the log-probability, entropy and log-sum-exp of each row."""
    if target.is_floating_point():
        label = target.argmax(min(target.dim() - 1, 1)).flatten()
        valid = torch.ones_like(label, dtype=torch.bool)
        shape = loss_shape(target, "none")
    else:
        label, shape = target.flatten(), target.shape
        valid = label != ignore_index
    log_p, entropy, lse = results
    correct = (prediction == label) & valid
    fields = log_p, lse, prediction.where(valid, ignore_index), correct, entropy
    return Metrics(*[x.reshape(shape) for x in fields])
