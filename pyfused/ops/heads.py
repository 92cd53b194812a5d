"""Loops over blocks of a linear layer's logits, without all logits in memory.

    for block in blocks(layer):         # logits = input[rows] @ weight[classes].T + bias[classes]
        grad_logits = step(block)
        sums.add(block, grad_logits)    # grad_input[rows] += grad_logits @ weight[classes]
                                        # grad_weight[classes] += grad_logits.T @ input[rows]
                                        # grad_bias[classes] += grad_logits.sum(0)

Each loss has its own step: cross-entropy, a divergence, or log-probabilities. ``chunk_sizes.py``
chooses the numbers of rows and classes of a block.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import InitVar, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfused.backends import Backend
from pyfused.backends.protocol import LossKernel, LossResult
from pyfused.layout import accumulate_dtype, layouts
from pyfused.ops.chunk_sizes import product_dtype
from pyfused.ops.elementwise import SOFTCAP
from pyfused.ops.row_state import RowInputs, RowState
from pyfused.types import ClassRange, Gradients, Head, Outputs

# ---- the loop ------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """A linear layer and its input, whose logits are computed by blocks.

    Attributes:
        input: (N, D).
        weight: (C, D).
        bias: (C), or None.
        dtype: The dtype of the matrix products.
        size: The numbers of rows and classes of a block.
        counts: (N), whether each row counts; None if all rows count. For other rows, the gradient
            of the logits is 0, and the weight's gradient uses 0 instead of the features, which may
            be NaN.
    """

    backend: Backend
    input: Tensor
    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    size: tuple[int, int]
    counts: Tensor | None = None


class Block(NamedTuple):
    """The logits of some rows and classes, and the factors of their matrix product.

    Attributes:
        input: The rows of the layer's input, in the dtype of the product.
        weight: The rows of the weight for these classes, in the same dtype.
    """

    logits: Tensor
    input: Tensor
    weight: Tensor
    rows: slice
    classes: slice


def blocks(
    layer: Layer, *, backwards: bool = False, memory: Tensor | None = None
) -> Iterator[Block]:
    """Yields blocks of logits, which share their memory: all rows of the first classes first.

    Args:
        backwards: Whether the blocks of rows come in reverse order.
        memory: Holds the logits of the first block, and is overwritten by the next ones. None
            allocates it.
    """
    backend, input, weight, bias, dtype, size, _ = layer
    n, all_classes = input.shape[0], weight.shape[0]
    rows, classes = max(1, min(size[0], n)), max(1, min(size[1], all_classes))
    is_computed = memory is not None
    if memory is None:
        memory = backend.empty((rows * classes,), dtype, input)
    for first in range(0, all_classes, classes):
        class_slice = slice(first, min(first + classes, all_classes))
        w = weight[class_slice].to(dtype)
        b = None if bias is None else bias[class_slice].to(dtype)
        starts = range(0, n, rows)
        for start in reversed(starts) if backwards else starts:
            row_slice = slice(start, min(start + rows, n))
            x = input[row_slice].to(dtype)
            logits = memory[: x.shape[0] * w.shape[0]].view(x.shape[0], w.shape[0])
            if not is_computed:
                linear(x, w, b, logits)
            is_computed = False
            yield Block(logits, x, w, row_slice, class_slice)


class LayerGradients:
    """Accumulates the gradients of a layer over blocks, whose rows come in ascending order.

    Args:
        needs: Whether the input, the weight and the bias need a gradient.
    """

    def __init__(self, layer: Layer, needs: Sequence[bool]) -> None:
        backend, input, weight, bias, dtype, size, _ = layer
        self.layer, self.sum_dtype = layer, accumulate_dtype(dtype)
        self.input: Tensor | None = None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.sums: Any = None  # of the products of the current block of classes
        all_rows, all_classes = input.shape[0] <= size[0], weight.shape[0] <= size[1]
        if needs[0]:
            self.input = backend.empty(input.shape, dtype if all_classes else self.sum_dtype, input)
        if needs[1]:
            one_product = all_rows and weight.dtype is dtype
            sum_dtype = weight.dtype if one_product or not all_classes else self.sum_dtype
            self.weight = backend.empty(weight.shape, sum_dtype, input)
        if needs[2] and bias is not None:
            self.bias = bias.new_zeros(bias.shape, dtype=self.sum_dtype)

    def add(self, block: Block, grad_logits: Tensor, columns: Tensor | None = None) -> None:
        """Adds the products of the gradient of a block's logits with its weight and its input.

        Args:
            columns: The indices of the classes to include, None for all.
        """
        _, x, weight, rows, classes = block
        backend, counts = self.layer.backend, self.layer.counts
        if self.bias is not None:
            self.bias[classes] += grad_logits.sum(0, dtype=self.sum_dtype)
        if columns is not None:
            grad_logits, weight = grad_logits[:, columns], weight[columns]
        if self.input is not None:
            beta = float(classes.start > 0)
            backend.add_product(self.input[rows], grad_logits, weight, beta)
        if self.weight is None:
            return
        if counts is not None:
            x = x.where(counts[rows].unsqueeze(-1), 0)
        first, last = rows.start == 0, rows.stop == self.layer.input.shape[0]
        out = self.weight[classes]
        if first:
            in_place = out.dtype is self.sum_dtype or (last and out.dtype is grad_logits.dtype)
            self.sums = out if in_place else backend.empty(out.shape, self.sum_dtype, x)
        if columns is None:
            backend.add_product(self.sums, grad_logits.t(), x, float(not first))
        else:
            sums = self.sums.zero_() if first else self.sums
            sums.index_add_(0, columns, torch.mm(grad_logits.t(), x).to(sums.dtype))
        if last and self.sums.data_ptr() != out.data_ptr():
            out.copy_(self.sums)

    def converted(self) -> Gradients:
        """Returns the gradients of the input, the weight and the bias, after all blocks.

        They have the dtypes of these tensors.
        """
        backend, *tensors = self.layer[:4]
        gradients: list[Any] = [self.input, self.weight, self.bias]
        for i, (total, x) in enumerate(zip(gradients, tensors, strict=True)):
            if total is not None and x is not None and total.dtype is not x.dtype:
                gradients[i] = backend.empty(total.shape, x.dtype, total).copy_(total)
        return tuple(gradients)


def over_blocks(
    layer: Layer,
    needs: Sequence[bool],
    step: Callable[[Block], Tensor | None],
    filter_below: Tensor | None = None,
    memory: Tensor | None = None,
) -> Gradients:
    """Runs the loop over the blocks of a layer's logits, and returns the layer's gradients.

    Args:
        needs: As in `LayerGradients`.
        step: Computes the gradient of a block's logits, which may overwrite them, or None.
        filter_below: The products skip columns in which all gradients are smaller. A scalar, or one
            threshold for each row; None to include all columns.
        memory: As in `blocks`.
    """
    sums = LayerGradients(layer, needs)

    def add(block: Block) -> None:
        grad_logits = step(block)
        if grad_logits is not None:
            columns = None
            if filter_below is not None:
                threshold = filter_below[block.rows] if filter_below.dim() else filter_below
                columns = large_columns(grad_logits, threshold)
            sums.add(block, grad_logits, columns)

    deque(map(add, blocks(layer, memory=memory)), maxlen=0)
    return sums.converted()  # after the memory of the logits has been freed


def loss_over_rows(
    layer: Layer,
    needs: Sequence[bool],
    step: Callable[..., tuple[Tensor | None, Tensor | None]],
    row_tensors: Sequence[Tensor | None],
    filter_below: Tensor | None = None,
) -> LossResult:
    """Returns the loss and the layer's gradients, computed by blocks of rows with all classes.

    The loss is a sum in float64, or a tensor with the loss of each row. The gradients come from
    `LayerGradients`, or are () if ``needs`` is empty.

    Args:
        step: Takes the block, and the block's rows of ``row_tensors``. Returns the loss and the
            gradient of the logits, each None if not needed. It may overwrite the logits.
        row_tensors: Tensors of all rows, scalars, or None.
        filter_below: As in `over_blocks`.
    """
    losses = list[Tensor]()

    def block_step(block: Block) -> Tensor | None:
        rows = [x[block.rows] if x is not None and x.dim() else x for x in row_tensors]
        loss, grad_logits = step(block, *rows)
        if loss is not None:
            losses.append(loss)
        return grad_logits

    gradients = over_blocks(layer, needs or (False,) * 3, block_step, filter_below)
    gradients = gradients if needs else ()
    if len(losses) < 2:
        return losses[0] if losses else None, gradients
    unreduced = losses[0].dim() > 0
    loss = torch.cat(losses) if unreduced else torch.stack(losses).sum(dtype=torch.float64)
    return loss, gradients


MOST_PREPARED = 64


def kept(prepare: Callable[..., LossKernel]) -> Callable[..., LossResult]:
    """Returns a function that runs a kernel, prepared at the first call with these layouts.

    On CPUs, calls differ in the number of rows, because ignored rows are skipped.

    Args:
        prepare: Prepares the kernel for tensors, outputs and grad_output.

    Returns:
        A function of the tensors, the options, the outputs, and grad_output or None.
    """
    launches: dict[Any, LossKernel] = {}

    def run(
        tensors: Sequence[Any], options: Any, outputs: Outputs, grad_output: Tensor | None
    ) -> LossResult:
        key = outputs, layouts((*tensors, grad_output))
        launch = launches.get(key)
        if launch is None:
            if len(launches) >= MOST_PREPARED:
                launches.clear()
            launch = launches[key] = prepare(tensors, outputs, grad_output)
        return launch(tensors, options, grad_output)

    return run


# ---- valid rows ----------------------------------------------------------------------------------


def rows_that_count(valid: Tensor, backend: Backend) -> tuple[Tensor | None, Tensor | None]:
    """Returns the indices of the rows to compute, or None for all, and the mask of `Layer`.

    All rows are computed if reading the mask would synchronise, and if no row counts.

    Args:
        valid: Whether each target of a row is valid, of shape (N, ...).
    """
    counts = valid.flatten(1).any(1) if valid.dim() > 1 else valid
    if backend.ASYNCHRONOUS:
        return None, counts
    rows = counts.nonzero().flatten()
    if rows.shape[0] == counts.shape[0]:
        return None, None
    return (rows, None) if rows.shape[0] else (None, counts)


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


@dataclass(eq=False)
class HeadRows:
    """The rows of a layer's logits, one for each target, planned once for a signature.

    On CPUs, rows without a valid target are skipped.

    Attributes:
        head: Describes the layer by tensors or TensorSpecs; autocast has been applied to the input.
        options: The options of the kernels, whose numbers are not used.
        classes: The range of the layer's classes.
        fields: The number of fields of a state.
        size: Returns the numbers of rows and classes of a block, given the number of rows.
        needs: Whether the input, the weight and the bias need a gradient.
    """

    backend: Backend
    head: InitVar[Head]
    options: Any
    classes: ClassRange
    fields: int
    size: Callable[[int], tuple[int, int]]
    needs: Sequence[bool]

    def __post_init__(self, head: Head) -> None:
        self.dtype, self.columns = product_dtype(head, self.backend), head.columns
        self.positions = head.linear_weight.shape[1:-1].numel()

    def layer(self, inputs: RowInputs) -> tuple[Layer, Tensor, Tensor | None, int]:
        """Returns the layer of the rows to compute, their targets, their indices and N."""
        layer: list[Any] = [None if x is None else x.detach() for x in inputs[0]]
        input, weight, bias = layer
        n, features = input.shape[:-1].numel(), input.shape[-1]
        input, target = input.reshape(n, features), inputs[1].reshape(n, self.positions)
        valid, counts = rows_that_count(target != self.options.ignore_index, self.backend)
        input, target = take_rows(input, valid), take_rows(target, valid)
        bias = None if bias is None else bias.movedim(0, -1).flatten()
        weight = weight.movedim(0, -2).reshape(self.columns, -1)  # contiguous classes per target
        options = bias, self.dtype, self.size(input.shape[0]), counts
        labels = target.flatten().contiguous()
        return Layer(self.backend, input, weight, *options), labels, valid, n

    def per_target(self, block: Block) -> tuple[Tensor, slice, ClassRange]:
        """Returns a block's logits with a row per target, the targets' slice, and the classes."""
        targets = slice(block.rows.start * self.positions, block.rows.stop * self.positions)
        first, total = self.classes
        logits = block.logits.view(targets.stop - targets.start, -1)
        return logits, targets, ClassRange(first + block.classes.start, total)

    def state(self, inputs: RowInputs, keeps_logits: bool = False) -> RowState:
        """Computes the state of each target.

        Args:
            keeps_logits: Whether the logits of the first block are returned. They are None if the
                block does not have all classes.
        """
        (_, target, weight, options), fields = inputs, self.fields
        layer, labels, valid, n = self.layer(inputs)
        state = labels.new_empty((fields, labels.shape[0]), dtype=torch.float64)
        for block in blocks(layer, backwards=True):
            logits, targets, classes = self.per_target(block)
            settings = self.options, classes, fields, 0, block.classes.start > 0
            launch = self.backend.row_state(logits, *settings)
            launch(options, logits, labels[targets], weight, state[:, targets])
        state = spread_rows(state.view(fields, -1, self.positions), valid, n, 1)
        keeps_logits = keeps_logits and block.logits.shape[1] == self.columns
        return (
            state.view(fields, *target.shape),
            None,
            block.logits.view(-1) if keeps_logits else None,
        )

    def gradients(
        self,
        inputs: RowInputs,
        state: Tensor,
        grad_results: Tensor,
        logits: Tensor | None = None,
        filter_below: Tensor | None = None,
    ) -> Gradients:
        """Computes the gradients of the layer's input, weight and bias.

        Args:
            state: The state over all classes.
            grad_results: The gradients of the first 1, 3 or 4 results, of shape
                (results, *target.shape), in float64.
            logits: The logits that `state` returned; they are overwritten.
            filter_below: As in `over_blocks`, for all rows of the input.
        """
        (input, linear_weight, *_), _, weight, options = inputs
        layer, labels, valid, n = self.layer(inputs)
        state, grad_results = (
            take_rows(values.reshape(values.shape[0], n, -1), valid, 1).flatten(1).contiguous()
            for values in (state, grad_results)
        )

        def step(block: Block) -> Tensor:
            logits, targets, classes = self.per_target(block)
            launch = self.backend.row_gradients(logits, self.options, classes, len(grad_results))
            states = state[:, targets], grad_results[:, targets]
            launch(options, logits, labels[targets], weight, *states, logits)
            return block.logits

        below = take_rows(filter_below, valid)
        gradients = over_blocks(layer, self.needs, step, below, logits)
        grad_input, grad_weight, grad_bias = gradients
        if grad_input is not None:
            grad_input = spread_rows(grad_input, valid, n).view(input.shape)
        classes = *linear_weight.shape[1:-1], linear_weight.shape[0]
        if grad_weight is not None:
            grad_weight = grad_weight.view(*classes, -1).movedim(-2, 0)
        if grad_bias is not None:
            grad_bias = grad_bias.view(classes).movedim(-1, 0)
        return grad_input, grad_weight, grad_bias


# ---- softcap -------------------------------------------------------------------------------------


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


# ---- products ------------------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


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
