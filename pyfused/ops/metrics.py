"""Metrics of logits and targets, computed by the pass over the logits that computes the loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyfused.layout import accumulate_dtype, logit_at, loss_shape
from pyfused.types import ENTROPY, INDEX, LOG_P, LSE


class Metrics(NamedTuple):
    """Metrics of each target, in the shape of class indices; none of them requires grad.

    Numbers are float32, or float64 with logits of float64, and 0 where the target is ignored.

    Attributes:
        log_probability: ``input[target] - log_sum_exp``, in nats, without smoothing or weights;
            with class probabilities their mean of it, ``sum_c target_c * log p_c``.
        log_sum_exp: ``log sum_c exp(input_c)``.
        prediction: The class with the largest logit, the first of several, int64; ``ignore_index``
            where the target is ignored.
        correct: Whether that is the target, or the most probable class of the target; False where
            it is ignored.
        entropy: Of the predicted distribution: ``-sum_c p_c * log p_c``, in nats.
    """

    log_probability: Tensor
    log_sum_exp: Tensor
    prediction: Tensor
    correct: Tensor
    entropy: Tensor


def of_state(state: Tensor, target: Tensor, ignore_index: int, dtype: torch.dtype) -> Metrics:
    """Returns the metrics that follow from the state of rows, of a target in any shape."""
    state = state.detach().reshape(len(state), -1)
    found = state[LOG_P], state[LSE], state[ENTROPY], state[INDEX].long()
    return _of_rows(*found, target, ignore_index, dtype)


def of_logits(input: Tensor, target: Tensor, ignore_index: int) -> Metrics:
    """Returns the metrics of logits as torch computes them."""
    dim, dtype = min(input.dim() - 1, 1), accumulate_dtype(input.dtype)
    input, target = input.detach().to(dtype), target.detach()
    lse = input.logsumexp(dim)
    log_p = input - lse.unsqueeze(dim)
    entropy = torch.special.entr(log_p.exp()).sum(dim)
    if target.is_floating_point():
        log_p = (target * log_p).sum(dim)
    else:
        target = target.long().reshape(lse.shape)
        log_p = logit_at(input, target)[1] - lse
    found = log_p.flatten(), lse.flatten(), entropy.flatten(), input.argmax(dim).flatten()
    return _of_rows(*found, target, ignore_index, dtype)


def _of_rows(
    log_p: Tensor,
    lse: Tensor,
    entropy: Tensor,
    prediction: Tensor,
    target: Tensor,
    ignore_index: int,
    dtype: torch.dtype,
) -> Metrics:
    if target.is_floating_point():
        label = target.argmax(min(target.dim() - 1, 1)).flatten()
        valid = torch.ones_like(label, dtype=torch.bool)
        shape = loss_shape(target, "none")
    else:
        label, shape = target.flatten(), target.shape
        valid = label != ignore_index
    log_p, lse, entropy = (each.where(valid, 0).to(dtype) for each in (log_p, lse, entropy))
    correct = (prediction == label) & valid
    found = log_p, lse, prediction.where(valid, ignore_index), correct, entropy
    return Metrics(*[each.reshape(shape) for each in found])
