"""Losses of a linear layer's output, without all logits in memory.

    for rows, classes in blocks:
        logits = input[rows] @ weight[classes].T + bias[classes]
        grad_logits = step(logits, rows, classes)
        grad_input[rows] += grad_logits @ weight[classes]
        grad_weight[classes] += grad_logits.T @ input[rows]
        grad_bias[classes] += grad_logits.sum(0)

Each loss has its own step. ``chunk_sizes.py`` chooses the numbers of rows and classes of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from pyfused import checks
from pyfused.backends import Backend, backend_of
from pyfused.dispatch.autograd import autocast_dtype, in_autocast_dtype
from pyfused.dispatch.operator import LEADING_DIMS, Options, Tensors
from pyfused.dispatch.plan import Forward
from pyfused.layout import accumulate_dtype, specs_of_layouts, with_leading_dims
from pyfused.ops import definitions, metrics
from pyfused.ops.chunk_sizes import CLASSES_GPU, TILE, rows_at_once, state_block_size, tile_size
from pyfused.ops.elementwise import SOFTCAP
from pyfused.ops.rows import (
    UINT8_TARGET,
    CrossEntropyOfRows,
    LogitRows,
    Passes,
    Planned,
    RowLoss,
    RowState,
    metrics_state,
)
from pyfused.ops.shards import ShardedRows, class_range
from pyfused.types import (
    STATE_FIELDS,
    ClassRange,
    Gradients,
    Head,
    Outputs,
    RowOptions,
)

# ---- the loop ------------------------------------------------------------------------------------

NONE = (False, False, False)  # no gradients of a layer

# Computes the gradient of a block's logits, which may overwrite them, or returns None. It takes the
# logits, and the slices of their rows and classes.
Step = Callable[[Tensor, slice, slice], Tensor | None]


def over_blocks(
    backend: Backend,
    layer: Sequence[Any],
    dtype: torch.dtype,
    size: tuple[int, int],
    needs: Sequence[bool],
    step: Step,
    *,
    counts: Tensor | None = None,
    filter_below: Tensor | None = None,
    memory: Tensor | None = None,
    backwards: bool = False,
    pads: bool = False,
) -> Gradients:
    """Runs the loop over the blocks of a layer's logits, and returns the layer's gradients.

    Blocks share their memory. All rows of the first classes come first. The gradients have the
    dtypes of the input, the weight and the bias. Sums over blocks are accumulated in float32, or in
    float64 for float64.

    Args:
        layer: The input (N, D), the weight (C, D), and the bias (C) or None.
        dtype: The dtype of the matrix products.
        size: The numbers of rows and classes of a block.
        needs: Whether the input, the weight and the bias need a gradient.
        counts: (N), whether each row counts; None if all rows do. For other rows, the gradient of
            the logits is 0, and the weight's gradient uses 0 for the features, which may be NaN.
        filter_below: The products skip columns in which all gradients are smaller. A scalar, or one
            threshold for each row; None to include all columns.
        memory: Holds the logits of the first block, and is overwritten by the next ones. None
            allocates it.
        backwards: Whether the blocks of rows come in reverse order.
        pads: Whether to add classes of weight 0 on GPUs, if a block has all classes. In half
            precision, products whose sizes are no multiples of 8 take several times as long.
    """
    input, weight, bias = layer
    (n, total), wide = (input.shape[0], weight.shape[0]), accumulate_dtype(dtype)
    rows, classes = max(1, min(size[0], n)), max(1, min(size[1], total))
    pads = pads and backend.ASYNCHRONOUS and dtype.itemsize == 2 and classes == total
    padding = -total % CLASSES_GPU if pads else 0
    grad_input = grad_weight = grad_bias = None
    logits: Any = None
    gradient: Any = None
    sums: Any = None
    if needs[0]:
        grad_input = backend.empty(input.shape, dtype if classes == total else wide, input)
    if needs[1]:
        is_sum = classes == total and n > rows
        shape = total + padding, weight.shape[1]
        grad_weight = backend.empty(shape, wide if is_sum else weight.dtype, input)
    if needs[2] and bias is not None:
        grad_bias = bias.new_zeros(bias.shape, dtype=wide)
    is_computed = memory is not None
    if memory is None:
        memory = backend.empty((rows * (classes + padding),), dtype, input)
    starts = range(0, n, rows)
    for first_class in range(0, total, classes):
        columns = slice(first_class, min(first_class + classes, total))
        w = prepared_weight(weight[columns], dtype)
        b = None if bias is None else bias[columns].to(dtype)
        if padding:
            w = torch.constant_pad_nd(w, (0, 0, 0, padding))
            b = None if b is None else torch.constant_pad_nd(b, (0, padding))
        for start in reversed(starts) if backwards else starts:
            block = slice(start, min(start + rows, n))
            x = input[block].to(dtype)
            logits = memory[: x.shape[0] * w.shape[0]].view(x.shape[0], w.shape[0])
            if not is_computed:
                linear(x, w, b, logits)
            is_computed = False
            gradient = step(logits[:, :total] if padding else logits, block, columns)
            if gradient is None:
                continue
            if grad_bias is not None:
                grad_bias[columns] += gradient.sum(0, dtype=wide)
            if padding:
                if gradient.data_ptr() != logits.data_ptr():
                    logits[:, :total] = gradient
                logits[:, total:] = 0
                gradient = logits
            factor, large = w, None
            if filter_below is not None:
                threshold = filter_below[block] if filter_below.dim() else filter_below
                large = large_columns(gradient, threshold)
                if large is not None:
                    gradient, factor = gradient[:, large], w[large]
            if grad_input is not None:
                out, beta = grad_input[block], float(first_class > 0)
                for part in parts_to_convert(factor, dtype):
                    backend.add_product(out, gradient[:, part], factor[part].to(dtype), beta)
                    beta = 1.0
            if grad_weight is None:
                continue
            if counts is not None:
                x = x.where(counts[block].unsqueeze(-1), 0)
            out = grad_weight[first_class : first_class + w.shape[0]]
            is_first, is_last = start == 0, block.stop == n
            if is_first:
                sums = out if out.dtype is wide or is_last else backend.empty(out.shape, wide, x)
            if large is None:
                backend.add_product(sums, gradient.t(), x, float(not is_first))
            else:
                sums = sums.zero_() if is_first else sums
                sums.index_add_(0, large, torch.mm(gradient.t(), x).to(sums.dtype))
            if is_last and sums.data_ptr() != out.data_ptr():
                out.copy_(sums)
    logits = gradient = memory = sums = None  # frees memory for the conversions
    if padding and grad_weight is not None:
        grad_weight = grad_weight[:total]
    gradients: list[Any] = [grad_input, grad_weight, grad_bias]
    for i, x in enumerate((input, weight, bias)):
        gradient = gradients[i]
        if gradient is not None and gradient.dtype is not x.dtype:
            gradients[i] = backend.empty(gradient.shape, x.dtype, gradient).copy_(gradient)
    return tuple(gradients)


# ---- rows that count -----------------------------------------------------------------------------


def rows_that_count(valid: Tensor, backend: Backend) -> tuple[Tensor | None, Tensor | None]:
    """Returns the indices of the rows to compute, and whether each of these counts.

    Either is None for all rows. All rows are computed if reading the mask would synchronise, and if
    no row counts.

    Args:
        valid: Whether each row is valid.
    """
    if backend.ASYNCHRONOUS:
        return None, valid
    rows = valid.nonzero().flatten()
    if rows.shape[0] == valid.shape[0]:
        return None, None
    return (rows, None) if rows.shape[0] else (None, valid)


def take_rows(values: Any, rows: Tensor | None, dim: int = 0) -> Any:
    """Returns the values of these rows, or of all rows for None."""
    return values if values is None or rows is None else values.index_select(dim, rows)


def spread_rows(values: Any, rows: Tensor | None, total: int, dim: int = 0) -> Any:
    """Scatters the values of some rows to a tensor of all rows; other rows are 0."""
    if values is None or rows is None:
        return values
    shape = list(values.shape)
    shape[dim] = total
    return values.new_zeros(shape).index_copy_(dim, rows, values)


# ---- the state of rows ---------------------------------------------------------------------------


class HeadRows:
    """The rows of a layer's logits; see `rows.RowSource`.

    On CPUs, rows without a valid target are skipped.

    Args:
        head: Describes the layer by tensors or TensorSpecs.
        dtype: The dtype of the matrix products.
        size: Returns the numbers of rows and classes of a block, given the number of rows.
        needs: Whether the input, the weight and the bias need a gradient.
    """

    layer: ClassVar[int] = 3

    def __init__(
        self,
        backend: Backend,
        head: Head,
        dtype: torch.dtype,
        classes: ClassRange,
        size: Callable[[int], tuple[int, int]],
        needs: Sequence[bool],
    ) -> None:
        self.backend, self.classes, self.size, self.needs = backend, classes, size, needs
        self.dtype, self.columns = dtype, head.columns

    def rows(
        self, tensors: Tensors, ignore_index: int
    ) -> tuple[Tensors, Tensor, Tensor | None, Tensor | None]:
        """Returns the layer of the rows to compute, their targets, and `rows_that_count`."""
        input, weight, bias, target, _ = tensors
        n = input.shape[:-1].numel()
        input, target = input.reshape(n, -1), target.flatten()
        rows, counts = rows_that_count(target != ignore_index, self.backend)
        if rows is not None:
            input, target = take_rows(input, rows), take_rows(target, rows)
        return (input, weight, bias), target.contiguous(), rows, counts

    def range_of(self, classes: slice) -> ClassRange:
        """Returns the range of a block's classes among all classes."""
        return ClassRange(self.classes.first + classes.start, self.classes.total)

    def state(
        self,
        tensors: Tensors,
        options: RowOptions,
        fields: int = STATE_FIELDS,
        results: int = 0,  # noqa: ARG002
        keeps_logits: bool = False,
    ) -> RowState:
        layer, labels, rows, _ = self.rows(tensors, options.ignore_index)
        target, class_weight = tensors[3:]
        state = labels.new_empty((fields, labels.shape[0]), dtype=torch.float64)
        kept: Tensor | None = None

        def step(logits: Tensor, block: slice, classes: slice) -> None:
            nonlocal kept
            if keeps_logits and logits.shape[1] == self.columns:
                kept = logits.as_strided((logits.shape[0] * logits.stride(0),), (1,))
            of_rows = options, logits, labels[block], class_weight, state[:, block]
            range_of = self.range_of(classes)
            self.backend.row_state(*of_rows, range_of, continues=classes.start > 0)

        size = self.size(layer[0].shape[0])
        over = self.backend, layer, self.dtype, size, NONE, step
        over_blocks(*over, backwards=True, pads=True)
        state = spread_rows(state, rows, target.numel(), 1)
        return state.view(fields, *target.shape), None, kept

    def gradients(
        self,
        tensors: Tensors,
        options: RowOptions,
        state: Tensor,
        grad_results: Tensor,
        logits: Tensor | None = None,
        filter_below: Tensor | None = None,
    ) -> Gradients:
        layer, labels, rows, counts = self.rows(tensors, options.ignore_index)
        input, *_, class_weight = tensors
        n = input.shape[:-1].numel()
        state, grad_results = (
            take_rows(values.reshape(-1, n), rows, 1).contiguous()
            for values in (state, grad_results)
        )

        def step(logits: Tensor, block: slice, classes: slice) -> Tensor:
            of_rows = options, logits, labels[block], class_weight, state[:, block]
            range_of = self.range_of(classes)
            return self.backend.row_gradients(*of_rows, range_of, grad_results[:, block], logits)

        over = self.backend, layer, self.dtype, self.size(layer[0].shape[0]), self.needs, step
        below = filter_below
        if below is not None and below.dim():
            below = take_rows(below, rows)
        gradients = over_blocks(*over, counts=counts, filter_below=below, memory=logits, pads=True)
        grad_input, *others = gradients
        if grad_input is not None:
            grad_input = spread_rows(grad_input, rows, n).view(input.shape)
        return grad_input, *others


# ---- losses of blocks of rows --------------------------------------------------------------------


class HeadLoss(RowLoss):
    """A loss of a linear layer's output, computed in blocks of rows with all classes.

    Kernels compute the rows that count; `arrange` returns the operands with one dimension of rows.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.row_operands = [i for i, operand in enumerate(self.all_operands) if operand.has_rows]

    dynamic = LEADING_DIMS

    def rows_at_once(self, tensors: Tensors, options: Options) -> Callable[[int], int]:
        """Returns the number of rows of a block, as a function of the number of rows.

        The number is 0 if the loss has to be computed from blocks of classes.
        """
        raise NotImplementedError

    def block_kernel(
        self, backend: Backend, tensors: Tensors, planned: Any, outputs: Outputs
    ) -> Callable[..., Any]:
        """Returns the function that computes a block, whose gradient may overwrite its logits.

        It takes the logits; the operands after the layer, the mask of rows that count or None, and
        the gradient of the loss or None for ones; and the options. It returns the loss of each row
        or their sum; the gradients of the logits and the target; and the state of each row for
        metrics. Each may be None.

        Args:
            tensors: The layouts of the tensors of a call.
            planned: The options for planning, with the reduction "none" or "sum".
        """
        raise NotImplementedError

    def before_blocks(self, backend: Backend, tensors: Tensors, options: Options) -> Tensors:  # noqa: ARG002
        """Returns the tensors of the rows to compute in the form that blocks take."""
        return tensors

    def valid_rows(
        self, backend: Backend, tensors: Tensors, _: Options
    ) -> tuple[Tensor | None, Tensor | None]:
        """Returns the indices of the rows to compute, and whether each of these rows counts.

        Either is None for all rows.
        """
        weight = tensors[-2]
        return (None, None) if weight is None else rows_that_count(weight != 0, backend)

    def block_passes(self, call: Planned, by_classes: Passes | None = None) -> Passes:
        """Returns the passes that compute blocks of rows with all classes.

        Args:
            by_classes: The passes for calls in which no block has all classes.
        """
        specs, planned, _, needs, in_forward = call
        backend, count = backend_of(specs[0]), len(self.all_operands)
        wide, rows_of = accumulate_dtype(self.input_dtype(specs)), self.rows_at_once(specs, planned)
        dtype = self.product_dtype(specs)
        is_mean, unreduced = planned.reduction == "mean", planned.reduction == "none"
        filters, has_rows = getattr(planned, "filter_eps", 0) != 0, self.row_operands
        # Of the operands after the layer, the mask of rows that count, and grad_output.
        are_rows = [*[i in has_rows for i in range(3, count)], True, unreduced]
        if is_mean:  # divided here
            planned = planned._replace(reduction="sum", denominator=None)
        block_needs = any(needs[:3]), *needs[3:]
        compute_loss = self.block_kernel(
            backend, specs, planned, Outputs(True, block_needs if in_forward else (), True)
        )
        compute_gradients = self.block_kernel(
            backend, specs, planned, Outputs(False, block_needs, True)
        )

        def compute(
            tensors: Tensors, options: Options, compute: Any, needs: Any, grad_output: Tensor | None
        ) -> tuple[Tensor | None, Gradients, Tensor | None] | None:
            n = tensors[0].shape[0]
            rows, counts = self.valid_rows(backend, tensors, options)
            if rows is not None:
                pairs = enumerate(tensors)
                tensors = [take_rows(x, rows) if i in has_rows else x for i, x in pairs]
            input, weight, bias, *operands = self.before_blocks(backend, tensors, options)
            total = input.shape[0]
            size = rows_of(total)
            if size == 0:
                return None
            divisor = self.divisor(tensors, options, counts is None) if is_mean else None
            ones = input.new_ones((), dtype=wide)
            if unreduced:
                grad_output = take_rows(grad_output, rows)
            elif needs and divisor is not None:
                grad_output = ones if grad_output is None else grad_output
                grad_output = (grad_output / divisor).to(wide)
            below = None
            if filters and needs:
                below = options.filter_eps * (ones if grad_output is None else grad_output.abs())
            # Kernels are prepared for contiguous tensors; hooks may have changed saved tensors.
            values = zip((*operands, counts, grad_output), are_rows, strict=True)
            operands = [
                x.contiguous() if x is not None and (is_row or x.dim() < 2) else x
                for x, is_row in values
            ]
            losses, states, grad_targets = parts = [list[Tensor](), list[Tensor](), list[Tensor]()]

            def step(logits: Tensor, block: slice, _: slice) -> Tensor | None:
                values = operands
                if size < total:
                    pairs = zip(values, are_rows, strict=True)
                    values = [x[block] if is_row and x is not None else x for x, is_row in pairs]
                loss, (gradient, grad_target), state = compute(logits, values, options)
                for part, value in zip(parts, (loss, state, grad_target), strict=True):
                    if value is not None:
                        part.append(value)
                return gradient  # type: ignore[no-any-return]

            over = backend, (input, weight, bias), dtype, (size, weight.shape[0]), needs[:3] or NONE
            grad_input, grad_weight, grad_bias = over_blocks(
                *over, step, counts=counts, filter_below=below, pads=True
            )
            loss = joined(losses, unreduced)
            if loss is not None:
                loss = (loss if divisor is None else loss / divisor).to(wide)
            loss = spread_rows(loss, rows, n) if unreduced else loss
            state = spread_rows(torch.cat(states, 1), rows, n, 1) if states else None
            grad_target = spread_rows(joined(grad_targets, True), rows, n)
            gradients = spread_rows(grad_input, rows, n), grad_weight, grad_bias, grad_target
            return loss, gradients[: len(needs)], state

        def forward(tensors: Tensors, options: Options) -> Forward:
            computed = compute(tensors, options, compute_loss, needs if in_forward else (), None)
            if computed is None:
                assert by_classes is not None
                return by_classes[0](tensors, options)
            loss, gradients, state = computed
            if state is None:
                return loss, tensors, gradients
            return (loss, state), (*tensors, state), gradients

        def backward(saved: Tensors, options: Options, grad_output: Tensor) -> Gradients:
            computed = compute(saved[:count], options, compute_gradients, needs, grad_output)
            if computed is None:
                assert by_classes is not None
                return by_classes[1](saved, options, grad_output)
            return computed[1]

        return forward, backward


def joined(parts: Sequence[Tensor], unreduced: bool) -> Tensor | None:
    """Returns the concatenation of the parts, or their sum in float64; None for no parts."""
    if len(parts) < 2:
        return parts[0] if parts else None
    return torch.cat([*parts]) if unreduced else torch.stack([*parts]).sum(dtype=torch.float64)


# ---- linear cross-entropy ------------------------------------------------------------------------


@dataclass(eq=False, kw_only=True, repr=False)
class LinearCrossEntropy(CrossEntropyOfRows, HeadLoss):
    """Cross-entropy of a linear layer's output: cross_entropy(linear(input), target)."""

    reference = staticmethod(definitions.head_cross_entropy)

    def check(self, tensors: Tensors, options: Options) -> None:
        super().check(tensors, options)
        checks.class_indices(tensors[1].shape[0], tensors[3], options.ignore_index)

    def input_dtype(self, tensors: Tensors) -> torch.dtype:
        dtype, target = in_autocast_dtype(tensors[0]).dtype, tensors[3]
        return torch.promote_types(dtype, target.dtype) if target.is_floating_point() else dtype

    def arrangement(self, call: Planned) -> Any:
        tensors, _, shard, *_ = call
        indices, classes = not tensors[3].is_floating_point(), class_range(tensors[:3], shard).total
        check = None if is_dynamo_compiling() else backend_of(tensors[0]).check_class_indices
        casts, dtype = in_autocast_dtype(tensors[0]) is not tensors[0], self.input_dtype(tensors)

        def arrange(tensors: Tensors, options: Options) -> Tensors:
            input, linear_weight, linear_bias, target, weight, token_weight, denominator = tensors
            if indices:
                target = target if target.dtype is torch.int64 else target.to(torch.int64)
                if check is not None:
                    check(target, classes, options.ignore_index)
            if not token_weight is denominator is None:
                token_weight, denominator = definitions.factors(token_weight, denominator, dtype)
            input = in_autocast_dtype(input) if casts else input
            if input.dim() == 2:
                return input, linear_weight, linear_bias, target, weight, token_weight, denominator
            head = Head(input, linear_weight, linear_bias, target, weight)
            head, token_weight = head.as_rows(token_weight)
            return *head, token_weight, denominator

        return arrange

    def result_dtype(self, tensors: Tensors, options: Options) -> torch.dtype:
        """Returns the dtype of the loss."""
        if options.loss_dtype is not None:
            return options.loss_dtype  # type: ignore[no-any-return]
        (input, *_), target = tensors, tensors[3]
        dtype = autocast_dtype(input.dtype, input.device)
        return torch.promote_types(dtype, target.dtype) if target.is_floating_point() else dtype

    def finish(self, call: Planned) -> Any:
        tensors, options, *_ = call
        dtype, with_metrics = self.result_dtype(tensors, options), options.with_metrics
        wide, ignore_index = self.loss_dtype(tensors, options), options.ignore_index
        if tensors[0].dim() == 2 and dtype is wide and not with_metrics:
            return None

        def finish(results: Any, tensors: Tensors) -> Any:
            leading = tensors[0].shape[:-1]
            loss, state = results if with_metrics else (results, None)
            loss = with_leading_dims(loss, leading).to(dtype)
            if state is None:
                return loss
            target = Head(*tensors[:5]).as_rows(None)[0].target
            target = target if target.is_floating_point() else target.to(torch.int64)
            values = metrics.of_state(state, target, ignore_index, wide)
            return loss, metrics.Metrics(*[with_leading_dims(x, leading) for x in values])

        return finish

    def passes(self, call: Planned) -> Passes:
        tensors, options, shard, needs, _ = call
        backend, head, layer = backend_of(tensors[0]), self.head(tensors), tensors[:3]
        classes, budget = class_range(layer, shard), options.memory_budget
        dtype, features = self.product_dtype(tensors), head.input.shape[-1]
        size = state_block_size(head, dtype, budget, backend)
        if shard is None:  # the loss needs its gradients, too
            size = lambda n: tile_size((n, features), dtype, budget, backend)  # noqa: E731
        source: Any = HeadRows(backend, head, dtype, classes, size, needs)
        if shard is not None:
            source = ShardedRows(source, shard, layer, options.with_metrics, needs)
            return self.state_passes(source, call)
        by_classes = self.state_passes(source, call, keeps_logits=False)
        return self.block_passes(call, by_classes)

    def head(self, tensors: Tensors) -> Head:
        """Returns the layer and its targets, with the input's dtype under autocast."""
        return Head(in_autocast_dtype(tensors[0]), *tensors[1:5])

    def rows_at_once(self, tensors: Tensors, options: Options) -> Callable[[int], int]:
        head, dtype, budget = self.head(tensors), self.product_dtype(tensors), options.memory_budget
        return rows_at_once(
            head, dtype, budget, backend_of(head.input), options.softcap is not None
        )

    def valid_rows(
        self, backend: Backend, tensors: Tensors, options: Any
    ) -> tuple[Tensor | None, Tensor | None]:
        *_, target, _, token_weight, _ = tensors
        counts = definitions.counted(target, options.ignore_index, token_weight)
        computed = counts
        if options.with_metrics:  # rows of weight 0 also have metrics
            computed = definitions.counted(target, options.ignore_index, None)
        rows = mask = None
        if computed is not None:
            rows, mask = rows_that_count(computed, backend)
        if computed is not counts and counts is not None:
            mask = take_rows(counts, rows)
        return rows, mask

    def block_kernel(
        self, backend: Backend, specs: Tensors, planned: Any, outputs: Outputs
    ) -> Callable[..., Any]:
        kernel, dtype = None, self.product_dtype(specs)
        source = LogitRows(backend, ClassRange(0, specs[1].shape[0]))
        fields, with_metrics = self.state_fields(planned), planned.with_metrics and outputs.loss
        caps, is_soft = planned.softcap is not None, specs[3].is_floating_point()

        def compute(logits: Tensor, operands: Sequence[Any], options: Options) -> Any:
            nonlocal kernel
            target, weight, token_weight, _, counts, grad_output = operands
            x, state = logits, None
            if caps:
                x, cap_backward = capped(backend, logits, options.softcap, rounds=True)
            if is_soft and target.dtype is not dtype:
                target = target.to(dtype)
            if with_metrics:
                state = metrics_state(source, x, target, options, fields)
            tensors = x, target, weight, token_weight, None
            if kernel is None:
                *layouts, of_grad = specs_of_layouts((*tensors, grad_output), 1)
                kernel = backend.cross_entropy(layouts, planned, outputs, of_grad)
            loss, gradients = kernel(tensors, options, grad_output)
            gradient, grad_target = gradients
            if caps and gradient is not None:
                gradient = cap_backward(gradient)
                if counts is not None:  # 0 times NaN is NaN
                    gradient.masked_fill_(~counts.unsqueeze(-1), 0)
            return loss, (gradient, grad_target), state

        return compute

    def strategy_of(self, tensors: Tensors, options: Options) -> str:
        n = tensors[0].shape[:-1].numel()
        rows = self.rows_at_once(tensors, options)(n)
        if not rows:
            return "blocks of classes"
        return "all logits at once" if rows >= n else f"blocks of {rows} rows"

    def loss_shape(self, tensors: Tensors) -> tuple[int, ...]:
        return (tensors[0].shape[0],)  # len would specialise a dynamic size


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


def capped(
    backend: Backend, logits: Tensor, softcap: float | None, rounds: bool = False
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Returns softcap * tanh(logits / softcap), and its backward function.

    The backward function converts the gradient of the result to the gradient of the logits. Without
    a softcap, the result is the logits themselves, and the backward function the identity.

    Args:
        rounds: Whether the result has the logits' dtype rather than the accumulation dtype.
    """
    if softcap is None:
        return logits, lambda gradient: gradient
    wide = logits if rounds else logits.to(accumulate_dtype(logits.dtype))
    forward, backward = backend.activation(SOFTCAP.kernels["softcap"], wide)
    cap = (softcap,)
    return forward(wide, cap), lambda gradient: backward(gradient, wide, cap).to(logits.dtype)


def prepared_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Converts a weight to the dtype of the products, unless they convert it in parts."""
    in_parts = weight.shape[0] > TILE and weight.dtype.itemsize < dtype.itemsize
    return weight if in_parts else weight.to(dtype)


def parts_to_convert(weight: Tensor, dtype: torch.dtype) -> Sequence[slice]:
    """Returns the parts of the classes in which a product converts a weight to its dtype.

    A weight of half precision that has to be converted to float32 is converted in small parts,
    because a copy of all classes would take more memory than the logits of a few rows.
    """
    if weight.dtype is dtype:
        return (slice(None),)
    return [slice(first, first + TILE) for first in range(0, weight.shape[0], TILE)]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    for classes in parts_to_convert(weight, x.dtype):
        w = weight[classes].to(x.dtype).t()
        if bias is None:
            torch.mm(x, w, out=out[:, classes])
        else:
            torch.addmm(bias[classes], x, w, out=out[:, classes])


MAX_LARGE = 0.5  # the largest fraction of a block's columns that is worth copying


def large_columns(gradient: Tensor, threshold: Tensor) -> Tensor | None:
    """Returns the indices of the columns with an element of at least the threshold, or NaN.

    Uses the largest of several thresholds. Returns None (all columns) if skipping would save
    little.
    """
    bound = float(threshold.max())
    low, high = gradient.aminmax(dim=0)
    columns = (~((high < bound) & (low > -bound))).nonzero().flatten()
    return columns if len(columns) < MAX_LARGE * len(low) else None
