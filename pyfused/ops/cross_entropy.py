"""Cross-entropy of logits, of a linear layer's output, and of log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyfused import checks
from pyfused.backends import Backend, backend_of, cpu, takes_triton
from pyfused.dispatch.operator import Forward, Needs, Options, Tensors
from pyfused.dispatch.reasons import SMALL
from pyfused.layout import accumulate_dtype, class_targets, loss_shape, with_leading_dims
from pyfused.ops import definitions, metrics
from pyfused.ops.head_loop import ALL_ROWS, HeadLoop, Rows, rows_that_count
from pyfused.ops.heads import BlockResult, HeadBlocks, HeadResult, cap_backward, capped
from pyfused.ops.row_sources import LogitRows, class_range
from pyfused.ops.rows import KernelPass, RowLoss, RowOperator, StatePass
from pyfused.types import (
    LOG_P,
    LSE,
    MAXIMUM,
    METRICS,
    METRICS_FIELDS,
    SMOOTH,
    SMOOTHING_FIELDS,
    STATE_FIELDS,
    SUM,
    CrossEntropyOptions,
    FusedOptions,
    Outputs,
    RowOptions,
)

UINT8_TARGET = "target has dtype torch.uint8, which torch does not support here"

# ---- the loss ------------------------------------------------------------------------------------


class CrossEntropyLoss(RowLoss):
    """Cross-entropy, from states of rows or in blocks of rows with all classes.

    The tensors of a call are the logits, or a layer's input, weight and bias; the target; the
    weight of each class; and the factors.
    """

    def finish(self, output: Any, inputs: Tensors, options: Options, _: Sequence[int]) -> Any:
        if not options.with_metrics:
            return output
        loss, *found = output
        if len(found) == 1:  # the state of each row
            (state,), input, target = found, *inputs[:2]
            dtype = accumulate_dtype(input.dtype)
            found = metrics.from_results(state[[*METRICS]], target, options.ignore_index, dtype)
        return loss, metrics.Metrics(*found)

    # ---- from states of rows: see `rows.StatePass` -----------------------------------------------

    def fields(self, options: Options) -> int:
        if options.label_smoothing != 0:
            return SMOOTHING_FIELDS
        return METRICS_FIELDS if options.with_metrics or options.with_prediction else STATE_FIELDS

    def inputs(
        self, tensors: Tensors, options: Options, all_rows: bool
    ) -> tuple[Tensor, Tensor | None, RowOptions]:
        """Returns the target, the class weight and the options that a source of rows takes.

        Args:
            all_rows: Whether to include rows of weight 0.
        """
        input, *_, target, weight, token_weight, _ = tensors
        if weight is not None:
            weight = weight.detach().to(accumulate_dtype(input.dtype)).contiguous()
        if token_weight is not None and not all_rows:  # the logits of rows of weight 0 may be NaN
            target = target.masked_fill(token_weight == 0, options.ignore_index)
        return target, weight, options.row_options()

    def result_from(
        self, state: Tensor, tensors: Tensors, options: Options, classes: int
    ) -> Tensor:
        """Returns the loss in float64.

        Args:
            state: The state of each row.
            classes: The number of all classes.
        """
        token_weight, log_p, lse, smooth = tensors[-2], state[LOG_P], state[LSE], None
        counts, target_weight, total = self.row_weights(tensors, options, classes)
        if options.label_smoothing > 0:
            smooth = state[SMOOTH] - state[SUM].log() * total  # sum_c w_c log p_c
        terms = log_p, smooth, lse if options.z_loss else None
        loss = definitions.row_losses(*terms, target_weight, options, classes)
        loss = (loss if token_weight is None else loss * token_weight).where(counts, 0)
        if options.reduction == "none":
            return loss
        loss = loss.sum()
        return loss / self.divisor(tensors, options) if options.reduction == "mean" else loss

    def grad_results(
        self, state: Tensor, tensors: Tensors, options: Options, classes: int, grad_output: Tensor
    ) -> Tensor:
        grad, token_weight = grad_output.double(), tensors[-2]
        grad = grad / self.divisor(tensors, options) if options.reduction == "mean" else grad
        counts, target_weight, total = self.row_weights(tensors, options, classes)
        grad = (grad if token_weight is None else grad * token_weight).where(counts, 0)
        coefficients = definitions.row_coefficients(target_weight, options, classes)
        log_p_factor, smooth_factor, squared_lse_factor = coefficients
        gradients = state.new_zeros((4 if state.shape[0] > SMOOTH else 3, *grad.shape))
        gradients[LOG_P] = log_p_factor * grad
        if squared_lse_factor:
            gradients[LSE] = 2 * squared_lse_factor * state[LSE] * grad
        if smooth_factor:
            gradients[LSE] -= smooth_factor * total * grad
            gradients[3] = smooth_factor * grad
        return gradients

    def row_weights(
        self, tensors: Tensors, options: Options, classes: int
    ) -> tuple[Tensor, Tensor | None, Any]:
        """Returns which rows count, the class weight of each target, and the sum of all weights.

        The class weight is None for 1.
        """
        *_, target, weight, token_weight, _ = tensors
        counts, target_weight, total = target != options.ignore_index, None, classes
        if token_weight is not None:
            counts &= token_weight != 0
        if weight is not None:
            target_weight = definitions.target_weights(target, weight, options.ignore_index)
            total = weight.double().sum() if options.label_smoothing > 0 else classes
        return counts, target_weight, total

    # ---- in blocks of rows with all classes: see `heads.HeadBlocks` -----------------------------

    def weights(self, tensors: Tensors, options: Options, all_count: bool) -> Tensor | None:
        *_, target, weight, token_weight, _ = tensors
        if target.is_floating_point() or (all_count and weight is token_weight is None):
            return None
        if weight is None:
            return target != options.ignore_index  # type: ignore[no-any-return]
        return definitions.target_weights(target, weight, options.ignore_index)

    def rows(self, tensors: Tensors, options: Options, backend: Backend) -> Rows:
        *_, target, _, token_weight, _ = tensors
        counts = definitions.counted(target, options.ignore_index, token_weight)
        computed = counts
        if options.with_metrics and token_weight is not None:  # rows of weight 0 also have metrics
            computed = definitions.counted(target, options.ignore_index, None)
        rows = ALL_ROWS if computed is None else rows_that_count(computed, backend)
        if computed is not counts and counts is not None:
            rows = rows._replace(counts=rows.take(counts))
        return rows

    def block(
        self, logits: Tensor, inputs: Tensors, grad_output: Any, options: Options, outputs: Outputs
    ) -> BlockResult:
        (target, weight, token_weight, _), backend = inputs, backend_of(logits)
        x, saved = capped(logits, options.softcap, rounds=True)
        if target.is_floating_point():
            target = target.to(logits.dtype)
        state = prediction = written = None
        if outputs.loss and options.with_metrics:
            state = metrics_state(x, target, options, self.fields(options))
        if outputs.loss and options.with_prediction:
            if options.softcap is None and backend.predicts(x):
                prediction = written = x.new_empty((2, len(x)), dtype=torch.float64)
            else:
                prediction = torch.stack([each.double() for each in logits.max(1)])
        tensors = x, target, weight, token_weight, None
        loss, gradients = backend.cross_entropy(tensors, options, outputs, grad_output, written)
        gradient, grad_target = gradients
        if options.softcap is not None and gradient is not None:
            gradient = cap_backward(gradient, saved, options.softcap)
        return BlockResult(loss, (gradient, grad_target), state, prediction)

    def prediction_from(self, state: Tensor, options: Options) -> Tensor:
        """Returns the largest logit of each row and its class, given the state of each row."""
        maximum, index = state[MAXIMUM:SMOOTH]
        is_scaled = options.softcap is not None or options.scale != 1
        if is_scaled and backend_of(state).ASYNCHRONOUS:  # it is that of scaled, capped logits
            index = torch.full_like(index, -1)
        return torch.stack([maximum, index])


def split_factors(
    function: str, keywords: Mapping[str, Any]
) -> tuple[tuple[Any, Any], dict[str, Any]]:
    """Returns token_weight and the denominator if it is a tensor, and the other keywords."""
    checks.keywords(function, keywords, FusedOptions.__annotations__)
    options = dict(keywords)
    token_weight, denominator = options.pop("token_weight", None), None
    if isinstance(options.get("denominator"), Tensor):
        denominator = options.pop("denominator")
    return (token_weight, denominator), options


def empty_metrics(tensors: Tensors, options: CrossEntropyOptions) -> metrics.Metrics | None:
    """Returns tensors for the metrics of each target, which the loss's kernel writes.

    Returns None if it cannot: it computes none of rows of weight 0, and none of scaled logits.
    """
    input, target, _, token_weight, _ = tensors
    is_scaled = options.scale / options.temperature != 1
    has_factors = token_weight is not None or target.is_floating_point()
    if is_scaled or has_factors or backend_of(input).ASYNCHRONOUS:
        return None
    wide = accumulate_dtype(input.dtype)
    dtypes = wide, wide, torch.int64, torch.bool, wide
    return metrics.Metrics(*[target.new_empty(target.shape, dtype=dtype) for dtype in dtypes])


def metrics_state(
    logits: Tensor, target: Tensor, options: CrossEntropyOptions, fields: int
) -> Tensor:
    """Returns the state of rows of capped logits.

    For class probabilities, LOG_P is ``sum_c target_c log p_c``.
    """
    indices = not target.is_floating_point()
    row_options = options.row_options()._replace(softcap=None)
    inputs = target if indices else None, None, row_options, class_range((logits,))
    state, *_ = LogitRows(logits, *inputs).state(fields)
    if indices:
        return state
    plain = CrossEntropyOptions(reduction="none", scale=row_options.scale)
    tensors = logits.detach(), target.detach(), None, None, None
    loss, _ = backend_of(logits).cross_entropy(tensors, plain, Outputs())
    assert loss is not None
    state[LOG_P] = -loss.flatten()
    return state


# ---- logits --------------------------------------------------------------------------------------


@dataclass(eq=False, kw_only=True, repr=False)
class CrossEntropy(RowOperator):
    """Cross-entropy of logits and class indices, or probabilities of the classes."""

    def unsupported(self, tensors: Tensors, options: Options) -> str | None:
        input, target, weight, token_weight, denominator = tensors
        if not input.numel():
            return SMALL
        if (  # the common case, for which nothing else has to be checked
            target.dtype is torch.int64
            and weight is token_weight is denominator is options.softcap is None
            and input.dim() == 2
            and target.shape == input.shape[:1]
            and input.shape[1] > 1
        ):
            return None
        return super().unsupported(tensors, options)

    def prepare(self, tensors: Tensors, options: Options) -> Tensors:
        input, target, weight, token_weight, denominator = tensors
        if target.dtype is not torch.int64 and target.is_floating_point():
            dtype = definitions.operand_dtype(input, target, weight)
            input, target = input.to(dtype), target.to(dtype)
        elif target.dtype is not torch.int64 or input.dim() == 1:
            target = class_targets(target, loss_shape(input, "none"))
        if not token_weight is denominator is None:
            token_weight, denominator = definitions.factors(token_weight, denominator, input.dtype)
        if options.softcap is not None:  # other kernels check class indices
            total = checks.classes_of(input)
            backend_of(input).check_class_indices(target, total, options.ignore_index)
        return input, target, weight, token_weight, denominator


def cross_entropy_pass(
    op: CrossEntropy, inputs: Tensors, options: Options, _: Needs
) -> KernelPass | StatePass:
    """Returns the pass of a call: one kernel, or states, whose kernel supports a softcap."""
    dtype = definitions.dtype_of_loss(options, *inputs[:3])
    if options.softcap is not None:
        return StatePass(op, dtype)
    kernel = backend_of(inputs[0]).cross_entropy
    return MetricsPass(kernel, dtype) if options.with_metrics else KernelPass(kernel, dtype)


class MetricsPass(KernelPass):
    """Computes cross-entropy in one kernel, which also writes the metrics if it can."""

    def forward(self, inputs: Tensors, options: Options, needs: Needs) -> Forward:
        found = empty_metrics(inputs, options)
        kernel = self.kernel if found is None else partial(self.kernel, metrics=found)
        loss, saved, gradients = KernelPass(kernel, self.dtype).forward(inputs, options, needs)
        if found is None or found.log_sum_exp.amax().isnan():  # a logit is not finite
            state = metrics_state(inputs[0], inputs[1], options, METRICS_FIELDS)
            return (loss, state), saved, gradients
        return (loss, *found), saved, gradients


def cross_entropy_reason(
    input: Tensor, target: Tensor, weight: Tensor | None, *others: Any
) -> str | None:
    """Returns why torch's operator has to compute these arguments, None if a kernel can."""
    options = others[-1]
    if input.dim() > 1 and input.shape[1] == 1:
        return "one class"
    smoothes = weight is not None and options.label_smoothing != 0
    if target.dtype is torch.uint8 and (input.dim() > 2 or smoothes):
        return UINT8_TARGET
    if options.softcap is not None and (options.gamma != 0 or target.is_floating_point()):
        return "softcap with gamma or class probabilities"
    return None


# ---- a linear layer ------------------------------------------------------------------------------


class HeadCrossEntropyLoss(CrossEntropyLoss):
    """Cross-entropy of a linear layer's output: cross_entropy(linear(input), target)."""

    def input_dtype(self, inputs: Tensors) -> torch.dtype:
        return definitions.operand_dtype(inputs[0], *inputs[3:5])

    def finish(self, output: Any, inputs: Tensors, options: Options, leading: Sequence[int]) -> Any:
        dtype = definitions.dtype_of_loss(options, inputs[0], *inputs[3:5])
        results = output if isinstance(output, tuple) else (output,)
        loss, state, prediction, *_ = *results, None, None
        loss, found = with_leading_dims(loss, leading).to(dtype), None
        if options.with_metrics:
            fields, wide = state[[*METRICS]], accumulate_dtype(self.input_dtype(inputs))
            fields = metrics.from_results(fields, inputs[3], options.ignore_index, wide)
            found = metrics.Metrics(*[with_leading_dims(x, leading) for x in fields])
        if options.with_prediction:
            if prediction is None:
                prediction = self.prediction_from(state, options)
            return HeadResult(loss, found, prediction.reshape(2, *leading))
        return loss if found is None else (loss, found)

    def fake_shapes(self, inputs: Tensors, options: Options) -> tuple[Sequence[Any], Sequence[Any]]:
        rows = (inputs[0].shape[0],)  # len would specialise a dynamic size
        return rows if options.reduction == "none" else (), (self.fields(options), *rows)


def linear_cross_entropy_pass(
    op: RowOperator, inputs: Tensors, options: Options, needs: Needs
) -> Any:
    """Returns the pass of a call: blocks of rows, or states if a block cannot have all classes."""
    dtype = op.loss.input_dtype(inputs)
    sizes = row_sizes = op.head_sizes(inputs, options, dtype)
    if options.softcap is not None:  # a copy of the logits
        row_sizes = replace(sizes, bytes_per_logit=3 * sizes.dtype.itemsize)
    has_probabilities = inputs[3].is_floating_point()
    size = row_sizes.row_blocks if has_probabilities else row_sizes.loss_blocks
    loop = HeadLoop(sizes.backend, sizes.dtype, size, needs)
    blocks = HeadBlocks(op, loop, inputs, options, dtype)
    if blocks.size.classes is None:
        return blocks
    return StatePass(op, loop=replace(loop, size=sizes.tile))


def extends_head_of_torch(input: Any, *others: Any) -> bool:
    """Returns whether torch's function lacks an argument of a head; it ignores a budget."""
    *_, token_weight, denominator, options = others
    in_torch = definitions.is_head_of_torch(input, token_weight, denominator, options)
    return not in_torch or options.memory_budget is not None


def head_reason(input: Tensor, linear_weight: Tensor, *_: Any) -> str | None:
    """Returns why torch's operators have to compute the logits of a layer, None if a kernel can."""
    if not input.dim() or linear_weight.dim() < 2:
        return "input or linear_weight has too few dimensions"
    return "linear_weight has more than two dimensions" if linear_weight.dim() > 2 else None


def linear_cross_entropy_reason(
    input: Tensor, linear_weight: Tensor, _bias: Any, target: Tensor, *rest: Any
) -> str | None:
    """Returns why torch's operator has to compute these arguments, None if a kernel can."""
    if reason := head_reason(input, linear_weight):
        return reason
    weight, *_, options = rest
    if target.dtype is torch.uint8 and weight is not None and options.label_smoothing != 0:
        return UINT8_TARGET
    return None


# ---- log-probabilities ---------------------------------------------------------------------------


@dataclass(eq=False, kw_only=True, repr=False)
class NllLoss(RowOperator):
    """The negative log-likelihood of log-probabilities, ``-w_y x_y``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.num_differentiable = 2  # kernels return a gradient of the target, which is None

    def prepare(self, tensors: Tensors, options: Options) -> Tensors:  # noqa: ARG002
        input, target, weight = tensors
        return input, class_targets(target, loss_shape(input, "none")), weight, None, None


def nll_loss_pass(_op: RowOperator, inputs: Tensors, options: Options, _: Needs) -> KernelPass:
    return KernelPass(cpu.nll_loss, definitions.dtype_of_loss(options, *inputs[:3]))


def nll_loss_reason(input: Tensor, target: Tensor, weight: Tensor | None, *_: Any) -> str | None:
    """Returns why torch's operator has to compute these arguments, None if a kernel can."""
    if target.dtype is torch.uint8 and input.dim() > 2:
        return UINT8_TARGET
    if weight is not None and weight.dim() != 1:
        return "weight does not have one dimension"
    return "torch's kernel for GPUs moves as few bytes" if takes_triton(input) else None
