"""The state of rows of logits, from which losses and metrics follow.

A state is a float64 tensor (fields, rows); ``types.py`` names the fields. One kernel computes a
state and updates it with further classes; another computes gradients from it. With class weights w,
label smoothing s and target y, the cross-entropy is

    (1 - s) w_y (lse - x_y) + s / C sum_c w_c (lse - x_c) + z_loss lse^2
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyfused.backends import Backend
from pyfused.layout import accumulate_dtype, feature_rows
from pyfused.types import (
    INDEX,
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
    Gradients,
    Outputs,
)


def state_fields(options: CrossEntropyOptions) -> int:
    """Returns the number of fields that the loss and the requested metrics need."""
    if options.label_smoothing != 0:
        return SMOOTHING_FIELDS
    return METRICS_FIELDS if options.with_metrics else STATE_FIELDS


def empty_state(fields: int, target: Tensor) -> Tensor:
    """Returns the state of rows without classes."""
    state = target.new_zeros((fields, *target.shape), dtype=torch.float64)
    for index in (PIVOT, *[MAXIMUM] * (fields > MAXIMUM)):  # a list as index synchronises
        state[index] = -torch.inf
    return state


def as_rows(logits: Tensor) -> Tensor:
    """Returns logits (C), (N, C) or (N, C, d1, ..., dk) as rows of contiguous classes."""
    return feature_rows(logits if logits.dim() < 3 else logits.movedim(1, -1))


# The inputs of a row source: logits, or a layer's input, weight and bias; the target; the weights
# of all classes in the accumulation dtype, or None; and the options.
RowInputs = tuple[Sequence[Any], Any, Tensor | None, Any]
# The states of shape (fields, *target.shape), in float64; the first fields in the accumulation
# dtype, or None; and logits that the backward pass may overwrite, or None.
RowState = tuple[Tensor, Tensor | None, Tensor | None]


@dataclass(eq=False)
class LogitRows:
    """The rows of logits (C), (N, C) or (N, C, d1, ..., dk), planned once for a signature.

    Attributes:
        options: The options of the kernels, whose numbers are not used.
        classes: The range of classes that the logits belong to.
        fields: The number of fields of a state.
        results: How many of the first fields `state` also returns in the accumulation dtype. A
            single field has the target's shape.
        launches: The prepared kernels. The key is None for states, and the strides for gradients,
            because saved-tensor hooks may change strides.
    """

    backend: Backend
    options: Any
    classes: ClassRange
    fields: int = STATE_FIELDS
    results: int = 0
    launches: dict[Any, Any] = field(default_factory=dict)

    def state(self, inputs: RowInputs, _: bool = False) -> RowState:
        """Computes the state of each row."""
        (logits,), target, weight, options = inputs
        results, prepared = self.results, self.launches.get(None)
        if prepared is None:
            settings = self.options, self.classes, self.fields, results
            rows = as_rows(logits)
            launch = self.backend.row_state(rows, *settings)
            dtype = accumulate_dtype(logits.dtype)
            prepared = self.launches[None] = launch, rows is not logits, dtype
        launch, views, dtype = prepared
        rows = as_rows(logits) if views else logits
        shape = rows.shape[:1] if target is None else target.shape
        state, out = rows.new_empty((self.fields, *shape), dtype=torch.float64), None
        if results:
            shape = (results, *shape) if results > 1 else shape
            out = rows.new_empty(shape, dtype=dtype)
        launch(options, rows, None if target is None else target.contiguous(), weight, state, out)
        return state, out, None

    def gradients(
        self, inputs: RowInputs, state: Tensor, grad_results: Tensor, _: Tensor | None = None
    ) -> Gradients:
        """Computes the gradient of the logits.

        Args:
            state: The state over all classes.
            grad_results: The gradients of the first 1, 3 or 4 results, of shape
                (results, *target.shape); for a single result also of the target's shape.
        """
        (logits,), target, weight, options = inputs
        is_one = grad_results.dim() < state.dim()
        key = logits.stride(), 1 if is_one else grad_results.shape[0]
        prepared = self.launches.get(key)
        if prepared is None:
            rows = as_rows(logits)
            launch = self.backend.row_gradients(rows, self.options, self.classes, key[1])
            copies = rows.data_ptr() != logits.data_ptr()
            prepared = self.launches[key] = launch, rows is not logits, copies
        launch, views, copies = prepared
        # Hooks for saved tensors may have changed their layouts.
        target, state = target.contiguous(), state.contiguous()
        weight = None if weight is None else weight.contiguous()
        if not views:
            return (launch(options, logits, target, weight, state, grad_results),)
        rows, dim = as_rows(logits), min(logits.dim() - 1, 1)
        grad_rows = grad_results.reshape(*grad_results.shape[: not is_one], -1)
        out = launch(options, rows, target, weight, state, grad_rows, rows if copies else None)
        return (out.view(logits.movedim(dim, -1).shape).movedim(-1, dim),)


def metrics_state(
    backend: Backend,
    logits: Tensor,
    target: Tensor,
    options: CrossEntropyOptions,
    fields: int = METRICS_FIELDS,
) -> Tensor:
    """Returns the state of each row. For probabilities, LOG_P is ``sum_c target_c log p_c``."""
    dim = min(logits.dim() - 1, 1)
    rows = options.of_rows()._replace(softcap=None)  # the logits are capped
    indices = not target.is_floating_point()
    source = LogitRows(backend, rows, ClassRange(0, logits.shape[dim]), fields)
    state, *_ = source.state(((logits,), target if indices else None, None, rows))
    if indices:
        return state
    scale = options.scale / options.temperature
    plain = CrossEntropyOptions(reduction="none", scale=scale)
    tensors = logits.detach(), target.detach(), None, None, None
    loss, _ = backend.cross_entropy(tensors, plain, Outputs())(tensors, plain)
    assert loss is not None
    state[LOG_P] = -loss.flatten()
    return state


def state_results(state: Tensor, count: int) -> Tensor:
    """Returns the log-probabilities of a state for 1, or the first ``count`` fields."""
    return state[LOG_P] if count == 1 else state[:count]


def state_metrics(
    state: Tensor, target: Tensor, ignore_index: int, classes: int
) -> tuple[Tensor, Tensor]:
    """Returns whether the target is the first class with the largest logit, and the mean logit.

    Args:
        state: The state over all classes, with all fields.
        classes: The number of all classes.
    """
    state = state.detach()
    is_top1 = (state[INDEX] == target) & (target != ignore_index)
    return is_top1, state[SMOOTH] / classes


# ---- cross-entropy -------------------------------------------------------------------------------


def state_loss(
    state: Tensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    options: CrossEntropyOptions,
    classes: int,
) -> Tensor:
    """Returns the cross-entropy of each row, in float64.

    Args:
        state: The state over all classes, of shape (fields, *target.shape); may require grad.
        weight: The weights of all classes, in the accumulation dtype, or None.
        classes: The number of all classes.
    """
    of_log_p, of_lse, of_smooth = _factors(target, weight, options, classes)
    loss = of_log_p * state[LOG_P]
    if options.label_smoothing:
        loss = loss + (of_lse * state[LSE] + of_smooth * state[SMOOTH])
    if options.z_loss:
        loss = loss + options.z_loss * state[LSE].square()
    if token_weight is not None:
        loss = loss * token_weight
    return loss.where(target != options.ignore_index, 0)


def state_loss_gradients(
    state: Tensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    options: CrossEntropyOptions,
    classes: int,
    grad_output: Tensor,
) -> Tensor:
    """Returns the gradients of the state's results, given the gradient of each row's loss."""
    if token_weight is not None:
        grad_output = grad_output * token_weight
    grad_output = grad_output.double().where(target != options.ignore_index, 0)
    of_log_p, of_lse, of_smooth = _factors(target, weight, options, classes)
    gradients = state.new_zeros((4 if options.label_smoothing else 3, *target.shape))
    gradients[LOG_P] = of_log_p * grad_output
    if options.z_loss:
        of_lse = of_lse + 2 * options.z_loss * state[LSE]
    gradients[LSE] = of_lse * grad_output
    if options.label_smoothing:
        gradients[3] = of_smooth * grad_output
    return gradients


def _factors(
    target: Tensor, weight: Tensor | None, options: CrossEntropyOptions, classes: int
) -> tuple[Tensor | float, Tensor | float, float]:
    """Returns the coefficients of log-probability, log-sum-exp and weighted sum in a row's loss."""
    smoothing = options.label_smoothing
    if weight is None:
        return smoothing - 1, smoothing, -smoothing / classes
    of_log_p = (smoothing - 1) * _target_weight(target, weight, options)
    if not smoothing:  # 0 times an infinite weight would be NaN
        return of_log_p, 0.0, 0.0
    return of_log_p, smoothing / classes * weight.double().sum(), -smoothing / classes


def counted_target(target: Tensor, token_weight: Tensor | None, ignore_index: int) -> Tensor:
    """Returns class indices, with ignore_index for rows of weight 0, whose logits may be NaN."""
    return target if token_weight is None else target.masked_fill(token_weight == 0, ignore_index)


def total_weight(
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    options: CrossEntropyOptions,
) -> Tensor:
    """Returns the default denominator of a mean: the total weight of valid targets, in float64."""
    weights = (target != options.ignore_index).double()
    if weight is not None:
        weights *= _target_weight(target, weight, options)
    if token_weight is not None:
        weights *= token_weight
    return weights.sum()


def loss_denominator(
    options: Any, denominator: Tensor | None, default: float | Tensor
) -> float | Tensor:
    """Returns the divisor of the sum of the losses.

    Args:
        denominator: The denominator of a mean, if it is a tensor.
        default: The denominator if none is passed.
    """
    if options.reduction != "mean":
        return 1.0
    divisor = options.denominator if denominator is None else denominator
    divisor = default if divisor is None else divisor
    return divisor.reshape(()) if isinstance(divisor, Tensor) else divisor


def _target_weight(target: Tensor, weight: Tensor, options: CrossEntropyOptions) -> Tensor:
    """Returns the class weight of each target in float64, an arbitrary one for ignored targets."""
    label = target.where(target != options.ignore_index, 0).clamp(0, len(weight) - 1)
    return weight.double()[label]


def kernel_weight(weight: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Converts class weights to the form that kernels take for logits of a dtype."""
    return None if weight is None else weight.detach().to(accumulate_dtype(dtype)).contiguous()
