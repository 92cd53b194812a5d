"""Losses of a linear layer's output, computed in blocks of logits.

`RowBlocks` computes a loss and its gradients in one pass, in blocks of rows with all classes.
`HeadRows` computes the states of rows, and the gradients from them, in blocks of any size. Both run
the loop of ``head_loop.py``, with steps of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyfused.backends import Backend, backend_of
from pyfused.dispatch.operator import Options, Tensors
from pyfused.dispatch.plan import Forward
from pyfused.layout import accumulate_dtype
from pyfused.ops.chunk_sizes import kept
from pyfused.ops.elementwise import SOFTCAP
from pyfused.ops.head_loop import HeadLoop, Layer, Rows, rows_that_count
from pyfused.ops.rows import Layouts, LogitRows, Passes, RowOperator, RowState
from pyfused.ops.shards import ShardedRows, class_range
from pyfused.types import STATE_FIELDS, ClassRange, Gradients, Outputs, RowOptions

# ---- states of rows ------------------------------------------------------------------------------


@dataclass(eq=False)
class HeadRows:
    """The rows of a layer's logits; see `rows.LogitRows`.

    On CPUs, rows without a valid target are skipped.
    """

    loop: HeadLoop
    classes: ClassRange

    def selected(self, tensors: Tensors, options: RowOptions) -> tuple[Layer, Tensor, Rows]:
        """Returns the layer of the rows to compute, their targets, and `rows_that_count`."""
        input, weight, bias, target, _ = tensors
        input, target = input.reshape(-1, input.shape[-1]), target.flatten()
        rows = rows_that_count(target != options.ignore_index, self.loop.backend)
        if rows.indices is not None:
            input, target = rows.take(input), rows.take(target)
        return Layer(input, weight, bias), target.contiguous(), rows

    def state(
        self,
        tensors: Tensors,
        options: RowOptions,
        fields: int = STATE_FIELDS,
        results: int = 0,  # noqa: ARG002
        keeps_logits: bool = False,
    ) -> RowState:
        (layer, target, rows), backend = self.selected(tensors, options), self.loop.backend
        state = target.new_empty((fields, target.shape[0]), dtype=torch.float64)
        class_weight, (first, total) = tensors[-1], self.classes
        kept: Tensor | None = None

        def step(logits: Tensor, block: slice, classes: slice) -> None:
            nonlocal kept
            if keeps_logits and logits.shape[1] == layer.weight.shape[0]:
                kept = logits.as_strided((logits.shape[0] * logits.stride(0),), (1,))
            of_rows = options, logits, target[block], class_weight, state[:, block]
            of_block = ClassRange(first + classes.start, total)
            backend.row_state(*of_rows, of_block, continues=classes.start > 0)

        self.loop.run(layer, step, backwards=True)  # the logits of the first rows come last
        if rows.indices is not None:
            state = rows.spread(state, 1)
        return state.view(fields, *tensors[3].shape), None, kept

    def gradients(
        self,
        tensors: Tensors,
        options: RowOptions,
        state: Tensor,
        grad_results: Tensor,
        logits: Tensor | None = None,
        filter_below: Tensor | None = None,
    ) -> Gradients:
        (layer, target, rows), backend = self.selected(tensors, options), self.loop.backend
        shape, class_weight, (first, total) = tensors[0].shape, tensors[-1], self.classes
        n = shape[:-1].numel()
        state, grad_results = state.reshape(-1, n), grad_results.reshape(-1, n)
        if rows.indices is not None:
            state, grad_results = rows.take(state, 1), rows.take(grad_results, 1)
            if filter_below is not None and filter_below.dim():
                filter_below = rows.take(filter_below)
        state, grad_results = state.contiguous(), grad_results.contiguous()

        def step(logits: Tensor, block: slice, classes: slice) -> Tensor:
            of_rows = options, logits, target[block], class_weight, state[:, block]
            of_block = ClassRange(first + classes.start, total)
            return backend.row_gradients(*of_rows, of_block, grad_results[:, block], logits)

        grad_input, *others = self.loop.run(
            layer, step, counts=rows.counts, filter_below=filter_below, logits=logits
        )
        if grad_input is not None:
            grad_input = rows.spread(grad_input).view(shape)
        return grad_input, *others


def row_source(op: RowOperator, layouts: Layouts, entropy: bool) -> Any:
    """Returns the source of the rows of logits, or of a layer.

    Args:
        entropy: Whether states over several shards need the entropy.
    """
    tensors, options, shard, needs, _ = layouts
    layer, backend = op.layer(tensors), backend_of(tensors[0])
    classes = class_range(layer, shard)
    source: Any = LogitRows(backend, classes)
    if op.is_linear:
        sizes = op.head_sizes(tensors, options)
        source = HeadRows(HeadLoop(backend, sizes.dtype, kept(sizes.of_states), needs), classes)
    return source if shard is None else ShardedRows(source, shard, layer, entropy, needs)


# ---- blocks of rows with all classes -------------------------------------------------------------


# The loss of each row of a block, or their sum; the gradients of the logits, which may overwrite
# them, and of the target; and the states of the rows, for metrics. Each may be None.
BlockResult = tuple[Tensor | None, Gradients, Tensor | None]


@dataclass(eq=False)
class RowBlocks:
    """Computes a loss, and its gradients, in blocks of rows with all classes.

    Attributes:
        op: Has a `rows.RowLoss` with a method `kernel`, which takes the backend, the layouts of the
            tensors of a call, the options for planning with the reduction "none" or "sum", and the
            outputs. It returns the function that computes a `BlockResult` from the logits; the
            tensors of the call after the layer; whether each row counts, None if all do; the
            gradient of the loss, None for ones; and the options of the call.
        by_classes: The passes for calls for which the loop has blocks of classes.
    """

    op: RowOperator
    loop: HeadLoop
    layouts: Layouts
    by_classes: Any = None

    def __post_init__(self) -> None:
        tensors, options, _, needs, self.in_forward = self.layouts
        self.is_mean, self.unreduced = (options.reduction == x for x in ("mean", "none"))
        self.loss, self.wide = self.op.loss, self.op.wide_dtype(tensors)
        self.count, self.filters = len(tensors), getattr(options, "filter_eps", 0) != 0
        self.has_rows = [operand.has_rows for operand in self.op.all_operands]
        self.row_operands = [i - 3 for i in range(3, self.count) if self.has_rows[i]]
        if self.is_mean:  # `compute` divides
            options = options._replace(reduction="sum", denominator=None)
        of_block = any(needs[:3]), *needs[3:]
        kernel = partial(self.loss.kernel, self.loop.backend, tensors, options)
        self.forward_kernel = kernel(Outputs(True, of_block if self.in_forward else (), True))
        self.backward_kernel = kernel(Outputs(False, of_block, True))

    def passes(self) -> Passes:
        return Passes(self.forward, self.backward)

    def forward(self, tensors: Tensors, options: Options) -> Forward:
        computed = self.compute(tensors, options, self.forward_kernel, None)
        if computed is None:
            return self.by_classes.forward(tensors, options)  # type: ignore[no-any-return]
        loss, gradients, state = computed
        gradients = gradients if self.in_forward else ()
        if state is None:
            return loss, tensors, gradients
        return (loss, state), (*tensors, state), gradients

    def backward(self, saved: Tensors, options: Options, grad_output: Tensor) -> Gradients:
        computed = self.compute(saved[: self.count], options, self.backward_kernel, grad_output)
        if computed is None:
            return self.by_classes.backward(saved, options, grad_output)  # type: ignore[no-any-return]
        return computed[1]

    def compute(
        self,
        tensors: Tensors,
        options: Options,
        kernel: Callable[..., BlockResult],
        grad_output: Tensor | None,
    ) -> tuple[Tensor | None, Gradients, Tensor | None] | None:
        """Returns the loss, the gradients, and the states of all rows for metrics.

        Returns None if the loop has blocks of classes.

        Args:
            grad_output: The gradient of the result in the backward pass, None in the forward pass.
        """
        rows = self.loss.rows(tensors, options, self.loop.backend)
        if rows.indices is not None:
            pairs = zip(tensors, self.has_rows, strict=True)
            tensors = [x if x is None or not has else rows.take(x) for x, has in pairs]
            grad_output = rows.take(grad_output) if self.unreduced else grad_output
        input, weight, bias, *operands = self.loss.prepared(tensors, self.loop.backend)
        size = self.loop.size(input.shape[0])
        if size.classes is not None:
            return None
        divisor = below = None
        if self.is_mean:
            divisor = self.loss.divisor(tensors, options, rows.counts is None)
        if self.in_forward or grad_output is not None:
            grad = input.new_ones((), dtype=self.wide) if grad_output is None else grad_output
            if divisor is not None:
                grad_output = grad = (grad / divisor).to(self.wide)
            below = self.loss.filter_below(options, grad) if self.filters else None
        for i, x in enumerate(operands):  # hooks may have changed saved tensors
            if x is not None and (i in self.row_operands or x.dim() < 2):
                operands[i] = x.contiguous()
        grad_output = None if grad_output is None else grad_output.contiguous()
        results, slices = list[Any](), size.rows < input.shape[0]

        def step(logits: Tensor, block: slice, _: slice) -> Tensor | None:
            part, counts, grad = operands, rows.counts, grad_output
            if slices:
                part = [*operands]
                for i in self.row_operands:
                    part[i] = None if part[i] is None else part[i][block]
                counts = None if counts is None else counts[block]
                grad = grad[block] if self.unreduced and grad is not None else grad
            loss, (gradient, grad_target), state = kernel(logits, part, counts, grad, options)
            results.append((loss, grad_target, state))
            return gradient

        layer = Layer(input, weight, bias)
        gradients = self.loop.run(layer, step, counts=rows.counts, filter_below=below)
        return self.collected(results, gradients, divisor, rows)

    def collected(
        self, results: Sequence[Any], gradients: Gradients, divisor: Any, rows: Rows
    ) -> tuple[Tensor | None, Gradients, Tensor | None]:
        """Returns the results of all rows.

        Args:
            results: The loss, the gradient of the target and the states of each block.
            gradients: The gradients of the layer.
        """
        losses, grad_targets, states = zip(*results, strict=True)
        loss = joined(losses, self.unreduced)
        if loss is not None:
            loss = (loss if divisor is None else loss / divisor).to(self.wide)
            loss = rows.spread(loss) if self.unreduced else loss
        state = None if states[0] is None else rows.spread(torch.cat(states, 1), 1)
        grad_target = None if grad_targets[0] is None else rows.spread(joined(grad_targets, True))
        grad_input, *others = gradients
        if rows.indices is not None:
            grad_input = rows.spread(grad_input)
        return loss, (grad_input, *others, grad_target)[: len(self.layouts.needs)], state


def joined(parts: Sequence[Any], unreduced: bool) -> Tensor | None:
    """Returns the concatenation of the parts, or their sum in float64; None if they are None."""
    if len(parts) < 2 or parts[0] is None:
        return parts[0]  # type: ignore[no-any-return]
    return torch.cat([*parts]) if unreduced else torch.stack([*parts]).sum(dtype=torch.float64)


# ---- capped logits -------------------------------------------------------------------------------


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
