"""The state of rows of logits, and the loss and the metrics that follow from it.

A state is a float64 tensor (fields, rows); ``types.py`` names the fields. A kernel computes it, and
continues it with further classes; another kernel computes gradients from it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyfused.backends import Backend, cross_entropy_once
from pyfused.layout import accumulate_dtype
from pyfused.types import (
    LOG_P,
    LSE,
    MAXIMUM,
    METRICS_FIELDS,
    PIVOT,
    SMOOTH,
    SMOOTHING_FIELDS,
    STATE_FIELDS,
    ClassRange,
    CrossEntropyOptions,
    LogProbsOptions,
    Outputs,
    RowOptions,
    VocabOptions,
)


def fields_of(options: CrossEntropyOptions) -> int:
    """Returns how many fields of a state the loss, and the metrics where wanted, need."""
    if options.label_smoothing:
        return SMOOTHING_FIELDS
    return METRICS_FIELDS if options.with_metrics else STATE_FIELDS


def state_of_nothing(fields: int, target: Tensor) -> Tensor:
    """Returns the state of rows without any classes."""
    state = target.new_zeros((fields, *target.shape), dtype=torch.float64)
    state[[PIVOT, *[MAXIMUM] * (fields > MAXIMUM)]] = -torch.inf
    return state


def as_rows(logits: Tensor) -> Tensor:
    """Returns logits (C), (N, C) or (N, C, d1, ..., dk) as rows of contiguous classes."""
    if logits.dim() == 2 and logits.stride(1) == 1:
        return logits
    rows = logits.movedim(min(logits.dim() - 1, 1), -1)
    rows = rows.reshape(rows.shape[:-1].numel(), rows.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def state_of_logits(
    backend: Backend,
    logits: Tensor,
    target: Tensor | None,
    options: RowOptions,
    classes: ClassRange,
    fields: int = STATE_FIELDS,
    weight: Tensor | None = None,
) -> Tensor:
    """Returns the state of each row of logits (C), (N, C) or (N, C, d1, ..., dk)."""
    rows = as_rows(logits)
    target = None if target is None else target.flatten().contiguous()
    state = rows.new_empty((fields, rows.shape[0]), dtype=torch.float64)
    backend.row_state(rows, target, options, state, classes, weight)
    return state


def state_of_metrics(
    backend: Backend, logits: Tensor, target: Tensor, options: CrossEntropyOptions
) -> Tensor:
    """Returns the state of each row, with ``sum_c target_c log p_c`` beside class probabilities."""
    dim = min(logits.dim() - 1, 1)
    rows, classes = (
        RowOptions(options.ignore_index, options.scale),
        ClassRange(0, logits.shape[dim]),
    )
    if not target.is_floating_point():
        return state_of_logits(backend, logits, target, rows, classes, METRICS_FIELDS)
    state = state_of_logits(backend, logits, None, rows, classes, METRICS_FIELDS)
    plain = CrossEntropyOptions(reduction="none", scale=options.scale)
    loss, _ = cross_entropy_once(backend, logits.detach(), target.detach(), None, plain, Outputs())
    assert loss is not None
    state[LOG_P] = -loss.flatten()
    return state


def fields_of_log_probs(options: LogProbsOptions) -> int | slice:
    """Returns the index of log-probabilities, or of them with entropies and log-sum-exps."""
    return LOG_P if options.alone else slice(LSE + 1)


# ---- cross-entropy -------------------------------------------------------------------------------


def loss_of_state(
    state: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: CrossEntropyOptions,
    classes: int,
) -> Tensor:
    """Returns the loss of each row: ``sum_c q_c (lse - x_c) + z_loss lse^2``, in float64.

    Args:
        state: Of all classes, the rows in the shape of the target; autograd may differentiate.
        weight: One factor for each of all classes, in the accumulation dtype, or None.
        classes: The number of all classes.
    """
    smoothing, one_hot = options.label_smoothing, _one_hot(target, weight, options)
    loss = -one_hot * state[LOG_P]
    if smoothing:
        total = _sum_of_weights(weight, classes)
        loss = loss + smoothing / classes * (total * state[LSE] - state[SMOOTH])
    if options.z_loss:
        loss = loss + options.z_loss * state[LSE].square()
    if options.token_weight is not None:
        loss = loss * options.token_weight
    return loss.where(target != options.ignore_index, 0)


def gradients_of_loss(
    state: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: CrossEntropyOptions,
    classes: int,
    grad_output: Tensor,
) -> Tensor:
    """Returns the gradients of the state's results, as kernels take them.

    Args:
        grad_output: The gradient of each row's loss.
    """
    if options.token_weight is not None:
        grad_output = grad_output * options.token_weight
    grad_output = grad_output.double().where(target != options.ignore_index, 0)
    smoothing, one_hot = options.label_smoothing, _one_hot(target, weight, options)
    gradients = state.new_zeros((4 if smoothing else 3, *target.shape))
    gradients[LOG_P] = -one_hot * grad_output
    of_lse = 2 * options.z_loss * state[LSE] if options.z_loss else 0.0
    if smoothing:
        of_lse = of_lse + smoothing / classes * _sum_of_weights(weight, classes)
        gradients[3] = -smoothing / classes * grad_output
    gradients[LSE] = of_lse * grad_output
    return gradients


def _one_hot(target: Tensor, weight: Tensor | None, options: CrossEntropyOptions) -> Tensor | float:
    """Returns the part of a target's probability that smoothing leaves, times its class weight."""
    rest = 1 - options.label_smoothing
    return rest if weight is None else rest * _target_weight(target, weight, options)


def _sum_of_weights(weight: Tensor | None, classes: int) -> Tensor | float:
    return float(classes) if weight is None else weight.double().sum()


def weight_of_targets(
    target: Tensor, weight: Tensor | None, options: CrossEntropyOptions
) -> Tensor:
    """Returns the denominator of a mean: the weight of the targets that count, in float64."""
    counted = (target != options.ignore_index).double()
    if weight is not None:
        counted *= _target_weight(target, weight, options)
    if options.token_weight is not None:
        counted *= options.token_weight
    return counted.sum()


def denominator_of(options: VocabOptions, counted: float | Tensor) -> float | Tensor:
    """Returns what the sum of the losses is divided by, given the weight of those that count."""
    if options.reduction != "mean":
        return 1.0
    given = counted if options.denominator is None else options.denominator
    return given.reshape(()) if isinstance(given, Tensor) else given


def _target_weight(target: Tensor, weight: Tensor, options: CrossEntropyOptions) -> Tensor:
    """Returns the class weight of each target in float64, any number for one that is ignored."""
    label = target.where(target != options.ignore_index, 0).clamp(0, len(weight) - 1)
    return weight.double()[label]


def accumulated(weight: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Returns class weights as the kernels of logits of a dtype take them."""
    return None if weight is None else weight.detach().to(accumulate_dtype(dtype)).contiguous()
