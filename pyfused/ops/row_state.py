"""The state of rows of logits, and the loss and the metrics that follow from it.

A state is a float64 tensor (fields, rows); ``types.py`` names the fields. A kernel computes it, and
continues it with further classes; another kernel computes gradients from it.
"""

from __future__ import annotations

from collections.abc import Callable

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
    options: RowOptions,
    classes: ClassRange,
    fields: int = STATE_FIELDS,
    results: int = 0,
) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Prepares the state of each row of logits (C), (N, C) or (N, C, d1, ..., dk).

    Returns:
        A function of logits of this layout, the target or None, and the weight of the classes. It
        returns the state, of shape (fields, *target.shape), and the first results of it in the
        accumulation dtype, None of 0: of the target's shape if it is one.
    """
    rows, dtype = as_rows(logits), accumulate_dtype(logits.dtype)
    launch = backend.row_state(rows, options, classes, fields, results)
    views, several = rows is not logits, (results,) * (results > 1)

    def run(
        logits: Tensor, target: Tensor | None, weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        rows = as_rows(logits) if views else logits
        shape = rows.shape[:1] if target is None else target.shape
        state = rows.new_empty((fields, *shape), dtype=torch.float64)
        found = rows.new_empty((*several, *shape), dtype=dtype) if results else None
        launch(rows, None if target is None else target.contiguous(), weight, state, found)
        return state, found

    return run


def gradient_of_logits(
    backend: Backend, logits: Tensor, options: RowOptions, classes: ClassRange, results: int
) -> Callable[..., Tensor]:
    """Prepares the gradient of such logits, given those of results of their state.

    Returns:
        A function of logits of this layout, the target, the weight of the classes, the state, and
        the gradients of the results, as ``state_of_logits`` returns these.
    """
    rows = as_rows(logits)
    launch: Callable[..., Tensor] = backend.row_gradients(rows, options, classes, results)
    views, copies = rows is not logits, rows.data_ptr() != logits.data_ptr()
    dim = min(logits.dim() - 1, 1)
    moved = logits.movedim(dim, -1).shape

    def run(
        logits: Tensor, target: Tensor, weight: Tensor | None, state: Tensor, grad_results: Tensor
    ) -> Tensor:
        target, state = target.contiguous(), state.contiguous()  # hooks may have changed these
        if not views:
            return launch(logits, target, weight, state, grad_results)
        rows, fields = as_rows(logits), grad_results.shape[: results > 1]
        given = target, weight, state, grad_results.reshape(*fields, -1)
        out = launch(rows, *given, rows if copies else None)
        return out.view(moved).movedim(-1, dim)

    return run


def state_of_metrics(
    backend: Backend, logits: Tensor, target: Tensor, options: CrossEntropyOptions
) -> Tensor:
    """Returns the state of each row, with ``sum_c target_c log p_c`` beside class probabilities."""
    dim = min(logits.dim() - 1, 1)
    rows, indices = RowOptions(options.ignore_index, options.scale), not target.is_floating_point()
    classes = ClassRange(0, logits.shape[dim])
    launch = state_of_logits(backend, logits, rows, classes, METRICS_FIELDS)
    state, _ = launch(logits, target if indices else None)
    if indices:
        return state
    plain = CrossEntropyOptions(reduction="none", scale=options.scale)
    loss, _ = cross_entropy_once(backend, logits.detach(), target.detach(), None, plain, Outputs())
    assert loss is not None
    state[LOG_P] = -loss.flatten()
    return state


def results_of(state: Tensor, count: int) -> Tensor:
    """Returns the log-probabilities of a state, or with them entropies and log-sum-exps."""
    return state[LOG_P] if count == 1 else state[:count]


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
