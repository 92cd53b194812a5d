"""Cross-entropy of logits, of a linear layer's output, and of log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyfused.backends import Backend, backend_of, takes_triton
from pyfused.backends.protocol import LossKernel
from pyfused.dispatch.autograd import in_autocast_dtype
from pyfused.dispatch.operator import Operand, Options, Tensors
from pyfused.dispatch.plan import Forward, dynamic_dims, loss_passes
from pyfused.layout import (
    accumulate_dtype,
    specs_of_layouts,
    with_leading_dims,
)
from pyfused.ops import definitions, metrics
from pyfused.ops.chunk_sizes import BlockSize, kept
from pyfused.ops.head_loop import ALL_ROWS, HeadLoop, Rows, rows_that_count
from pyfused.ops.heads import BlockResult, HeadRows, RowBlocks, capped, row_source
from pyfused.ops.rows import (
    Layouts,
    LogitRows,
    Passes,
    RowLoss,
    RowOperator,
    state_passes,
)
from pyfused.ops.shards import class_range
from pyfused.types import (
    INDEX,
    LOG_P,
    LSE,
    METRICS_FIELDS,
    PREDICTION,
    SMOOTH,
    SMOOTHING_FIELDS,
    STATE_FIELDS,
    ClassRange,
    CrossEntropyOptions,
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

    # ---- from states of rows: see `rows.state_passes` --------------------------------------------

    def fields(self, options: Options) -> int:
        if options.label_smoothing != 0:
            return SMOOTHING_FIELDS
        return METRICS_FIELDS if options.with_metrics else STATE_FIELDS

    def inputs(
        self, tensors: Tensors, options: Options, all_rows: bool
    ) -> tuple[list[Any], RowOptions]:
        """Returns the tensors and the options that a source of rows takes.

        Args:
            all_rows: Whether to include rows of weight 0.
        """
        *layer, target, weight, token_weight, _ = tensors
        if weight is not None:
            weight = weight.detach().to(accumulate_dtype(layer[0].dtype)).contiguous()
        if token_weight is not None and not all_rows:  # the logits of rows of weight 0 may be NaN
            target = target.masked_fill(token_weight == 0, options.ignore_index)
        return [*layer, target, weight], options.of_rows()

    def of_results(
        self, results: Tensor, tensors: Tensors, options: Options, classes: int
    ) -> Tensor:
        """Returns the loss in float64.

        Args:
            results: The log-probability, the entropy and the log-sum-exp of each row, possibly
                followed by other fields. The weighted sum of the logits is the last one.
            classes: The number of all classes.
        """
        token_weight, log_p, lse, smooth = tensors[-2], results[LOG_P], results[LSE], None
        counts, target_weight, total = self.row_weights(tensors, options, classes)
        if options.label_smoothing > 0:
            smooth = results[-1] - lse * total  # sum_c w_c log p_c
        terms = log_p, smooth, lse if options.z_loss else None
        loss = definitions.row_losses(*terms, target_weight, options, classes)
        loss = (loss if token_weight is None else loss * token_weight).where(counts, 0)
        if options.reduction == "none":
            return loss
        loss = loss.sum()
        return loss / self.divisor(tensors, options) if options.reduction == "mean" else loss

    def grad_results(
        self, state: Tensor, tensors: Tensors, options: Options, classes: int, grad_output: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        grad, token_weight = grad_output.double(), tensors[-2]
        grad = grad / self.divisor(tensors, options) if options.reduction == "mean" else grad
        below = self.filter_below(options, grad)
        counts, target_weight, total = self.row_weights(tensors, options, classes)
        grad = (grad if token_weight is None else grad * token_weight).where(counts, 0)
        coefficients = definitions.row_coefficients(target_weight, options, classes)
        of_log_p, of_smooth, of_squared_lse = coefficients
        gradients = state.new_zeros((4 if state.shape[0] > SMOOTH else 3, *grad.shape))
        gradients[LOG_P] = of_log_p * grad
        if of_squared_lse:
            gradients[LSE] = 2 * of_squared_lse * state[LSE] * grad
        if of_smooth:
            gradients[LSE] -= of_smooth * total * grad
            gradients[3] = of_smooth * grad
        return gradients, below

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

    # ---- in blocks of rows: see `heads.RowBlocks` ------------------------------------------------

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
        if options.with_metrics:  # rows of weight 0 also have metrics
            computed = definitions.counted(target, options.ignore_index, None)
        rows = ALL_ROWS if computed is None else rows_that_count(computed, backend)
        if computed is not counts and counts is not None:
            rows = rows._replace(counts=rows.take(counts))
        return rows

    def kernel(
        self, backend: Backend, tensors: Tensors, options: Options, outputs: Outputs
    ) -> Callable[..., BlockResult]:
        kernel: LossKernel | None = None
        planned, caps = options, options.softcap is not None
        source = LogitRows(backend, ClassRange(0, tensors[1].shape[0]))
        fields = self.fields(planned) if planned.with_metrics and outputs.loss else 0
        predicts = planned.with_metrics == PREDICTION

        def compute(
            logits: Tensor,
            operands: Sequence[Any],
            counts: Tensor | None,
            grad_output: Tensor | None,
            options: Options,
        ) -> BlockResult:
            nonlocal kernel
            target, weight, token_weight, _ = operands
            x, state, prediction = logits, None, []
            if caps:
                x, cap_backward = capped(backend, logits, options.softcap, rounds=True)
            if target.is_floating_point():
                target = target.to(logits.dtype)
            if fields and predicts and backend.predicts(x):
                state = x.new_empty((1, len(x)), dtype=torch.int64)
                prediction = [state]
            elif fields:
                state = metrics_state(source, x, target, options, fields)
            tensors = x, target, weight, token_weight, None
            if kernel is None:
                *layouts, of_grad = specs_of_layouts((*tensors, grad_output), 1)
                kernel = backend.cross_entropy(layouts, planned, outputs, of_grad)
            loss, (gradient, grad_target) = kernel(tensors, options, grad_output, *prediction)
            if caps and gradient is not None:
                gradient = cap_backward(gradient)
                if counts is not None:  # 0 times NaN is NaN
                    gradient.masked_fill_(~counts.unsqueeze(-1), 0)
            return loss, (gradient, grad_target), state

        return compute


def metrics_state(
    source: LogitRows, logits: Tensor, target: Tensor, options: CrossEntropyOptions, fields: int
) -> Tensor:
    """Returns the state of rows of capped logits.

    For class probabilities, LOG_P is ``sum_c target_c log p_c``.
    """
    rows, indices = options.of_rows()._replace(softcap=None), not target.is_floating_point()
    state, *_ = source.state((logits, target if indices else None, None), rows, fields)
    if indices:
        return state
    scale = options.scale / options.temperature
    plain = CrossEntropyOptions(reduction="none", scale=scale)
    tensors = logits.detach(), target.detach(), None, None, None
    loss, _ = source.backend.cross_entropy(tensors, plain, Outputs())(tensors, plain)
    assert loss is not None
    state[LOG_P] = -loss.flatten()
    return state


# ---- logits --------------------------------------------------------------------------------------


@dataclass(eq=False, kw_only=True, repr=False)
class CrossEntropy(RowOperator):
    """Cross-entropy of logits and class indices, or probabilities of the classes."""

    fixed = 1

    def by_torch(self, tensors: Tensors, options: Options) -> Any:
        if not tensors[3] is tensors[4] is None or not options.is_plain():
            self.check_call(tensors, options)
        return self.torch(*tensors, options)

    def needs_state(self, layouts: Layouts) -> bool:
        """Returns whether only the kernels of row states support a call."""
        return layouts.shard is not None or layouts.options.softcap is not None

    def overwrites(self, layouts: Layouts) -> bool:
        """Returns whether the gradient of the logits overwrites them."""
        return layouts.options.inplace and not self.needs_state(layouts)

    def arrangement(self, layouts: Layouts) -> Any:
        tensors, _, shard, *_ = layouts
        inplace, check, dtype = self.overwrites(layouts), None, self.input_dtype(tensors)
        if self.needs_state(layouts):  # other kernels check class indices
            check = backend_of(tensors[0]).check_class_indices
        empty: list[Any] = [None if x is None else x.empty() for x in tensors[:3]]
        pairs = zip(empty, self.converted(*empty), strict=True)
        converts = any(x is not y for x, y in pairs)
        if not converts and tensors[3] is tensors[4] is check is None and not inplace:
            return None
        classes = class_range(tensors[:1], shard).total

        def arrange(tensors: Tensors, options: Options) -> Tensors:
            if inplace:
                definitions.prepare_inplace(tensors[0])
            *operands, token_weight, denominator = tensors
            if not token_weight is denominator is None:
                token_weight, denominator = definitions.factors(token_weight, denominator, dtype)
            if converts:
                operands = [*self.converted(*operands)]
            if check is not None:
                check(operands[1], classes, options.ignore_index)
            return *operands, token_weight, denominator

        return arrange

    def converted(self, input: Tensor, target: Tensor, weight: Tensor | None) -> Tensors:
        """Returns the operands in the dtypes and shapes that kernels take."""
        if not target.is_floating_point():
            return input, class_targets(input, target), weight
        dtype = definitions.operand_dtype(input, target, weight)
        return input.to(dtype), target.to(dtype), weight

    def passes(self, layouts: Layouts) -> Passes:
        tensors, options, _, needs, in_forward = layouts
        input, backend = tensors[0], backend_of(tensors[0])
        dtype = definitions.dtype_of_loss(options, *tensors[:3])
        source = row_source(self, layouts, options.with_metrics)
        if self.needs_state(layouts):
            return state_passes(self, source, layouts, dtype)
        inplace = self.overwrites(layouts)

        def prepare(tensors: Tensors, *outputs: Any) -> LossKernel:
            return backend.cross_entropy(tensors, options, *outputs)

        loss_dtype = None if dtype is self.wide_dtype(tensors) else dtype
        forward, backward = loss_passes(
            prepare, needs, in_forward, inplace, loss_dtype, dynamic_dims(input)
        )

        def forward_with_state(tensors: Tensors, options: Options) -> Forward:
            input, target, *_ = tensors
            state = metrics_state(source, input, target, options, METRICS_FIELDS)
            loss, saved, gradients = forward(tensors, options)
            return (loss, state), saved, gradients

        return Passes(forward_with_state if options.with_metrics else forward, backward, inplace)

    def input_dtype(self, tensors: Tensors) -> torch.dtype:
        return definitions.operand_dtype(*tensors[:3])

    def finish(self, layouts: Layouts) -> Any:
        tensors, options, *_ = layouts
        if not options.with_metrics:
            return None
        ignore_index, dtype = options.ignore_index, accumulate_dtype(tensors[0].dtype)

        def finish(results: Any, tensors: Tensors) -> tuple[Tensor, metrics.Metrics]:
            (loss, state), input, target = results, *tensors[:2]
            if not target.is_floating_point():
                target = class_targets(input, target)
            return loss, metrics.of_state(state, target, ignore_index, dtype)

        return finish

    def torch_on_shard(self, tensors: Tensors, options: Options, shard: Any) -> Tensor:
        dtype = definitions.dtype_of_loss(options, *tensors[:3])
        loss: Tensor = super().torch_on_shard(tensors, options, shard)
        return loss.to(dtype)

    def strategy_of(self, tensors: Tensors, options: Options) -> str:  # noqa: ARG002
        rows = backend_of(tensors[0]).supports_rows(tensors[0])
        return "row by row" if rows else "several rows at a time"


def class_targets(input: Tensor, target: Tensor) -> Tensor:
    """Returns class indices as int64, of the shape of the loss."""
    target = target if target.dtype is torch.int64 else target.to(torch.int64)
    return target.reshape(()) if input.dim() == 1 else target


def cross_entropy_fallback_reason(
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


@dataclass(eq=False, kw_only=True, repr=False)
class LinearCrossEntropy(RowOperator):
    """Cross-entropy of a linear layer's output: cross_entropy(linear(input), target)."""

    fixed = -1
    flattens = True

    def by_torch(self, tensors: Tensors, options: Options) -> Any:
        """Returns the result; torch's function does not check the budget and `filter_eps`."""
        in_torch = definitions.is_head_of_torch(tensors[0], tensors[5], tensors[6], options)
        if not in_torch or options.memory_budget is not None or options.filter_eps != 0:
            self.check_call(tensors, options)
        return self.torch(*tensors, options)

    def input_dtype(self, tensors: Tensors) -> torch.dtype:
        return definitions.operand_dtype(in_autocast_dtype(tensors[0]), *tensors[3:5])

    def finish(self, layouts: Layouts) -> Any:
        tensors, options, *_ = layouts
        logits, wide = in_autocast_dtype(tensors[0]), self.wide_dtype(tensors)
        dtype = definitions.dtype_of_loss(options, logits, *tensors[3:5])
        with_metrics, ignore_index = options.with_metrics, options.ignore_index
        if tensors[0].dim() == 2 and dtype is wide and not with_metrics:
            return None

        def finish(results: Any, tensors: Tensors) -> Any:
            leading = tensors[0].shape[:-1]
            loss, state = results if with_metrics else (results, None)
            loss = with_leading_dims(loss, leading).to(dtype)
            if state is None:
                return loss
            if with_metrics == PREDICTION:
                prediction = state[min(INDEX, len(state) - 1)].long()
                return loss, with_leading_dims(prediction, leading)
            target = tensors[3]
            if target.is_floating_point():
                target = target.reshape(-1, target.shape[-1])
            else:
                target = target.to(torch.int64).flatten()
            values = metrics.of_state(state, target, ignore_index, wide)
            return loss, metrics.Metrics(*[with_leading_dims(x, leading) for x in values])

        return finish

    def block_size(self, tensors: Tensors, options: Options) -> Callable[[int], BlockSize]:
        """Returns the size of blocks as a function of the number of rows."""
        sizes = self.head_sizes(tensors, options)
        if options.softcap is not None:  # a copy of the logits
            sizes = replace(sizes, bytes_per_logit=3 * sizes.dtype.itemsize)
        return kept(sizes.of_rows if tensors[3].is_floating_point() else sizes.of_losses)

    def passes(self, layouts: Layouts) -> Passes:
        tensors, options, shard, needs, _ = layouts
        if shard is not None:
            # With metrics, the forward pass also has rows of weight 0.
            keeps = not options.with_metrics or tensors[-2] is None
            source = row_source(self, layouts, options.with_metrics)
            return state_passes(self, source, layouts, keeps_logits=keeps)
        sizes = self.head_sizes(tensors, options)
        loop = partial(HeadLoop, backend_of(tensors[0]), sizes.dtype, needs=needs)
        rows = HeadRows(loop(sizes.tile), class_range(tensors[:3]))
        by_classes = state_passes(self, rows, layouts, keeps_logits=False)
        of_rows = loop(self.block_size(tensors, options))
        return RowBlocks(self, of_rows, layouts, by_classes).passes()

    def strategy_of(self, tensors: Tensors, options: Options) -> str:
        n = tensors[0].shape[:-1].numel()
        size = self.block_size(tensors, options)(n)
        if size.classes is not None:
            return "blocks of classes"
        return "all logits at once" if size.rows >= n else f"blocks of {size.rows} rows"

    def fake(self, tensors: Tensors, options: Options) -> tuple[Tensor, Tensor]:
        rows = (tensors[0].shape[0],)  # len would specialise a dynamic size
        dtype = self.wide_dtype(tensors)
        shape = rows if options.reduction == "none" else ()
        state = tensors[0].new_empty((self.loss.fields(options), *rows), dtype=torch.float64)
        return tensors[0].new_empty(shape, dtype=dtype), state


def head_fallback_reason(input: Tensor, linear_weight: Tensor, *_: Any) -> str | None:
    """Returns why torch's operators have to compute the logits of a layer, None if a kernel can."""
    if not input.dim() or linear_weight.dim() < 2:
        return "input or linear_weight has too few dimensions"
    return "linear_weight has more than two dimensions" if linear_weight.dim() > 2 else None


def linear_cross_entropy_fallback_reason(
    input: Tensor, linear_weight: Tensor, _bias: Any, target: Tensor, *rest: Any
) -> str | None:
    """Returns why torch's operator has to compute these arguments, None if a kernel can."""
    if reason := head_fallback_reason(input, linear_weight):
        return reason
    weight, *_, options = rest
    if target.dtype is torch.uint8 and weight is not None and options.label_smoothing != 0:
        return UINT8_TARGET
    return None


# ---- log-probabilities ---------------------------------------------------------------------------


@dataclass(eq=False, kw_only=True, repr=False)
class NllLoss(RowOperator):
    """The negative log-likelihood of log-probabilities, ``-w_y x_y``."""

    factors: ClassVar[tuple[Operand, ...]] = ()
    strategy = "one element of a row"
    fixed = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.student = 2  # kernels return a gradient of the target, which is None

    def arrangement(self, _: Layouts) -> Any:
        return _with_class_targets

    def passes(self, layouts: Layouts) -> Passes:
        (input, *_), options = layouts.tensors, layouts.options
        backend, dtype = backend_of(input), definitions.dtype_of_loss(options, *layouts.tensors)
        loss_dtype = None if dtype is accumulate_dtype(input.dtype) else dtype

        def prepare(tensors: Tensors, *outputs: Any) -> LossKernel:
            kernel: LossKernel = getattr(backend, self.name)(tensors, options, *outputs)
            return kernel

        dims, needs, in_forward = dynamic_dims(input), layouts.needs, layouts.in_forward
        return Passes(
            *loss_passes(prepare, needs, in_forward, loss_dtype=loss_dtype, dynamic_dims=dims)
        )


def nll_loss_fallback_reason(
    input: Tensor, target: Tensor, weight: Tensor | None, *_: Any
) -> str | None:
    """Returns why torch's operator has to compute these arguments, None if a kernel can."""
    if target.dtype is torch.uint8 and input.dim() > 2:
        return UINT8_TARGET
    if weight is not None and weight.dim() != 1:
        return "weight does not have one dimension"
    return "torch's kernel for GPUs moves as few bytes" if takes_triton(input) else None


def _with_class_targets(tensors: Tensors, _: Any) -> Tensors:
    input, target, weight = tensors
    return input, class_targets(input, target), weight, None, None
