"""Losses of a linear layer's output, computed in blocks of logits.

`compute_blocks` computes a loss and its gradients in one pass, in blocks of rows with all classes.
`HeadRows` computes the states of rows, and the gradients from them, in blocks of any size. Both run
the loop of ``head_loop.py``, with steps of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyfused.backends import Backend, backend_of
from pyfused.dispatch.operator import Needs, Options, Tensors
from pyfused.layout import accumulate_dtype
from pyfused.ops.collectives import LocalShard
from pyfused.ops.elementwise import SOFTCAP
from pyfused.ops.head_loop import HeadLoop, Layer, Rows, rows_that_count
from pyfused.ops.rows import LogitRows, RowOperator, RowState
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


def row_source(
    op: RowOperator,
    tensors: Tensors,
    options: Options,
    needs: Needs,
    shard: LocalShard | None,
    entropy: bool,
) -> Any:
    """Returns the source of the rows of logits, or of a layer.

    Args:
        tensors: The arranged tensors of a call.
        entropy: Whether states over several shards need the entropy.
    """
    layer, backend = op.layer(tensors), backend_of(tensors[0])
    classes = class_range(layer, shard)
    source: Any = LogitRows(backend, classes)
    if op.is_linear:
        sizes = op.head_sizes(tensors, options)
        source = HeadRows(HeadLoop(backend, sizes.dtype, sizes.of_states, needs), classes)
    return source if shard is None else ShardedRows(source, shard, layer, entropy, needs)


# ---- blocks of rows with all classes -------------------------------------------------------------


# The loss of each row of a block, or their sum; the gradients of the logits, which may overwrite
# them, and of the target; and the states of the rows, for metrics. Each may be None.
BlockResult = tuple[Tensor | None, Gradients, Tensor | None]


def compute_blocks(
    op: RowOperator,
    loop: HeadLoop,
    tensors: Tensors,
    options: Options,
    needs: Needs,
    grad_output: Tensor | None = None,
) -> BlockResult | None:
    """Computes a loss, and its gradients, in blocks of rows with all classes.

    Returns the loss, the gradients, and the states of all rows for metrics; None if the loop has
    blocks of classes.

    Args:
        op: Has a `rows.RowLoss` with a method `block`, which takes the backend; the logits; the
            tensors of a call after the layer; whether each row counts, None if all do; the gradient
            of the loss, None for ones; the options of a call with the reduction "none" or "sum";
            and the outputs.
        grad_output: The gradient of the result in the backward pass, None in the forward pass.
    """
    is_mean, unreduced = (options.reduction == x for x in ("mean", "none"))
    backend, loss, wide = loop.backend, op.loss, op.wide_dtype(tensors)
    is_forward = grad_output is None
    differentiates = not is_forward or op.in_forward(tensors, options, needs)
    has_rows = [operand.has_rows for operand in op.all_operands]
    row_operands = [i for i, has in enumerate(has_rows[3:]) if has]
    rows = loss.rows(tensors, options, backend)
    if rows.indices is not None:
        pairs = zip(tensors, has_rows, strict=True)
        tensors = [x if x is None or not has else rows.take(x) for x, has in pairs]
        grad_output = rows.take(grad_output) if unreduced else grad_output
    input, weight, bias, *operands = loss.prepared(tensors, backend)
    size = loop.size(input.shape[0])
    if size.classes is not None:
        return None
    divisor = below = None
    if is_mean:
        divisor = loss.divisor(tensors, options, rows.counts is None)
    if differentiates:
        grad = input.new_ones((), dtype=wide) if grad_output is None else grad_output
        if divisor is not None:
            grad_output = grad = (grad / divisor).to(wide)
        if getattr(options, "filter_eps", 0) != 0:
            below = loss.filter_below(options, grad)
    for i, x in enumerate(operands):  # hooks may have changed saved tensors
        if x is not None and (i in row_operands or x.dim() < 2):
            operands[i] = x.contiguous()
    grad_output = None if grad_output is None else grad_output.contiguous()
    outputs = Outputs(is_forward, (any(needs[:3]), *needs[3:]) if differentiates else (), True)
    if is_mean:
        options = options._replace(reduction="sum", denominator=None)
    results, slices = list[Any](), size.rows < input.shape[0]

    def step(logits: Tensor, block: slice, _: slice) -> Tensor | None:
        part, counts, grad = operands, rows.counts, grad_output
        if slices:
            part = [*operands]
            for i in row_operands:
                part[i] = None if part[i] is None else part[i][block]
            counts = None if counts is None else counts[block]
            grad = grad[block] if unreduced and grad is not None else grad
        result = loss.block(backend, logits, part, counts, grad, options, outputs)
        of_loss, (gradient, grad_target), state = result
        results.append((of_loss, grad_target, state))
        return gradient  # type: ignore[no-any-return]

    layer = Layer(input, weight, bias)
    gradients = loop.run(layer, step, counts=rows.counts, filter_below=below)
    return _collected(results, gradients, divisor, rows, unreduced, wide, len(needs))


def _collected(
    results: Sequence[Any],
    gradients: Gradients,
    divisor: Any,
    rows: Rows,
    unreduced: bool,
    wide: torch.dtype,
    count: int,
) -> BlockResult:
    """Returns the results of all rows.

    Args:
        results: The loss, the gradient of the target and the states of each block.
        gradients: The gradients of the layer.
        wide: The dtype of the loss.
        count: The number of gradients.
    """
    losses, grad_targets, states = zip(*results, strict=True)
    loss = joined(losses, unreduced)
    if loss is not None:
        loss = (loss if divisor is None else loss / divisor).to(wide)
        loss = rows.spread(loss) if unreduced else loss
    state = None if states[0] is None else rows.spread(torch.cat(states, 1), 1)
    grad_target = None if grad_targets[0] is None else rows.spread(joined(grad_targets, True))
    grad_input, *others = gradients
    if rows.indices is not None:
        grad_input = rows.spread(grad_input)
    return loss, (grad_input, *others, grad_target)[:count], state


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
    kernel, cap = SOFTCAP.kernels["softcap"], (softcap,)

    def backward(gradient: Tensor) -> Tensor:
        return backend.activation_backward(kernel, gradient, wide, cap).to(logits.dtype)

    return backend.activation(kernel, wide, cap), backward
