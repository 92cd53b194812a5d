"""Loops over blocks of a linear layer's logits, which are never in memory as a whole.

    for block in blocks(layer):         # logits = input[rows] @ weight[classes].T + bias[classes]
        grad_logits = step(block)
        sums.add(block, grad_logits)    # grad_input[rows] += grad_logits @ weight[classes]
                                        # grad_weight[classes] += grad_logits.T @ input[rows]
                                        # grad_bias[classes] += grad_logits.sum(0)

Each loss has its own step: cross-entropy, a divergence, or log-probabilities. ``chunk_sizes.py``
chooses the numbers of rows and classes of a block.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pyfused.backends import Backend
from pyfused.backends.protocol import LossResult
from pyfused.layout import accumulate_dtype
from pyfused.ops.chunk_sizes import fixed_rows, product_dtype, state_block_size
from pyfused.ops.elementwise import SOFTCAP
from pyfused.types import STATE_FIELDS, ClassRange, Gradients, Head, Outputs, RowOptions

# ---- the loop ------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """A linear layer and its input.

    Attributes:
        input: (N, D), or (N, D + r) with an adapter; its last r features are the adapter's.
        weights: The weight (C, D), followed by the weight (C, r) of an adapter if there is one.
            The adapter's output is added to the layer's.
        bias: (C), or None.
        dtype: The dtype of the matrix products.
        counts: (N), whether each row counts. If not, the gradient of its logits is 0, and its
            features, which may be NaN, are taken as 0 in the gradient of the weight. None if all
            rows count.
    """

    input: Tensor
    weights: Sequence[Tensor]
    bias: Tensor | None
    dtype: torch.dtype
    counts: Tensor | None = None

    def split(self, input: Tensor) -> Sequence[Tensor]:
        """Splits features, or their gradient, into the features of each weight."""
        if len(self.weights) == 1:
            return (input,)
        parts: Sequence[Tensor] = input.split([weight.shape[1] for weight in self.weights], 1)
        return parts


class Block(NamedTuple):
    """The logits of some rows and classes, and the matrices whose product they are.

    Attributes:
        inputs: The rows of the input, split into the features of each of the layer's weights.
        weights: The classes of each weight. Both have the dtype of the products.
    """

    logits: Tensor
    inputs: Sequence[Tensor]
    weights: Sequence[Tensor]
    rows: slice
    classes: slice


def blocks(
    backend: Backend,
    layer: Layer,
    size: tuple[int, int],
    *,
    backwards: bool = False,
    memory: Tensor | None = None,
    fixed_sizes: bool = False,
) -> Iterator[Block]:
    """Yields blocks of logits, which share their memory: all rows for some classes, then the next.

    Args:
        size: The numbers of rows and classes of a block.
        backwards: Whether the blocks of rows come in reverse order.
        memory: Holds the logits of the first block, and is overwritten by the next ones. None
            allocates it.
        fixed_sizes: Whether the bits of a row's logits are independent of the batch.
    """
    input, all_weights, bias, dtype, _ = layer
    n, all_classes = input.shape[0], all_weights[0].shape[0]
    rows, classes = max(1, min(size[0], n)), max(1, min(size[1], all_classes))
    product, is_computed = _linear_in_fixed_sizes if fixed_sizes else linear, memory is not None
    if memory is None:
        memory = backend.empty((rows * classes,), dtype, input)
    for first in range(0, all_classes, classes):
        class_slice = slice(first, min(first + classes, all_classes))
        weights = [weight[class_slice].to(dtype) for weight in all_weights]
        b = None if bias is None else bias[class_slice].to(dtype)
        starts = range(0, n, rows)
        for start in reversed(starts) if backwards else starts:
            row_slice = slice(start, min(start + rows, n))
            inputs = layer.split(input[row_slice].to(dtype))
            shape = inputs[0].shape[0], weights[0].shape[0]
            logits = memory[: shape[0] * shape[1]].view(shape)
            if not is_computed:
                product(inputs[0], weights[0], b, logits)
                for x, weight in zip(inputs[1:], weights[1:], strict=True):
                    backend.add_product(logits, x, weight.t(), 1.0)
            is_computed = False
            yield Block(logits, inputs, weights, row_slice, class_slice)


class LayerGradients:
    """Accumulates the gradients of a layer over blocks, whose rows come in ascending order.

    Args:
        size: The numbers of rows and classes of a block.
        needs: Whether the input, the weight, the bias and the adapter's weight need a gradient.
    """

    def __init__(
        self, backend: Backend, layer: Layer, size: tuple[int, int], needs: Sequence[bool]
    ) -> None:
        self.backend, self.layer, self.sum_dtype = backend, layer, accumulate_dtype(layer.dtype)
        self.input: Tensor | None = None
        self.bias: Tensor | None = None
        self.weights: list[Tensor | None] = [None] * len(layer.weights)
        self.sums = list(self.weights)  # of the products of the current block of classes
        input, weights, bias, dtype, _ = layer
        all_rows, all_classes = input.shape[0] <= size[0], weights[0].shape[0] <= size[1]
        if needs[0]:
            self.input = backend.empty(input.shape, dtype if all_classes else self.sum_dtype, input)
        for i, weight in enumerate(weights):
            if needs[3 if i else 1]:
                one_product = all_rows and weight.dtype is dtype
                sum_dtype = weight.dtype if one_product or not all_classes else self.sum_dtype
                self.weights[i] = backend.empty(weight.shape, sum_dtype, input)
        if needs[2] and bias is not None:
            self.bias = bias.new_zeros(len(bias), dtype=self.sum_dtype)

    def add(self, block: Block, grad_logits: Tensor, columns: Tensor | None = None) -> None:
        """Adds the products of the gradient of a block's logits with its weights and its inputs.

        Args:
            columns: The indices of the classes to include, None for all.
        """
        _, inputs, weights, rows, classes = block
        if self.bias is not None:
            self.bias[classes] += grad_logits.sum(0, dtype=self.sum_dtype)
        if columns is not None:
            grad_logits, weights = grad_logits[:, columns], [weight[columns] for weight in weights]
        if self.input is not None:
            for out, weight in zip(self.layer.split(self.input[rows]), weights, strict=True):
                self.backend.add_product(out, grad_logits, weight, float(classes.start > 0))
        counts = self.layer.counts
        if counts is not None and self.weights.count(None) < len(self.weights):
            inputs = [x.where(counts[rows].unsqueeze(-1), 0) for x in inputs]
        first, last = rows.start == 0, rows.stop == self.layer.input.shape[0]
        for i, (total, x) in enumerate(zip(self.weights, inputs, strict=True)):
            if total is None:
                continue
            out = total[classes]
            if first:
                in_place = out.dtype is self.sum_dtype or (last and out.dtype is grad_logits.dtype)
                empty = self.backend.empty
                self.sums[i] = out if in_place else empty(out.shape, self.sum_dtype, x)
            sums: Any = self.sums[i]
            if columns is None:
                self.backend.add_product(sums, grad_logits.t(), x, float(not first))
            else:
                sums = sums.zero_() if first else sums
                sums.index_add_(0, columns, torch.mm(grad_logits.t(), x).to(sums.dtype))
            if last and sums.data_ptr() != out.data_ptr():
                out.copy_(sums)

    def converted(self) -> Gradients:
        """Returns the gradients in the dtypes of the layer's tensors, after all blocks.

        These are the gradients of the input, the weight, the bias and the adapter's weight.
        """

        def convert(total: Tensor | None, tensor: Tensor | None) -> Tensor | None:
            if total is None or tensor is None or total.dtype is tensor.dtype:
                return total
            empty: Tensor = self.backend.empty(total.shape, tensor.dtype, total)
            return empty.copy_(total)

        input, weights, bias, *_ = self.layer
        totals = map(convert, self.weights, weights)
        weight, adapter_weight = (*totals, None)[:2]
        return convert(self.input, input), weight, convert(self.bias, bias), adapter_weight


def over_blocks(
    backend: Backend,
    layer: Layer,
    size: tuple[int, int],
    needs: Sequence[bool],
    step: Callable[[Block], Tensor | None],
    *,
    filter_below: Tensor | None = None,
    **options: Any,
) -> Gradients:
    """Runs the loop that all losses of a layer's logits share, and returns the layer's gradients.

    Args:
        size, options: As in `blocks`.
        needs: As in `LayerGradients`.
        step: Computes the gradient of a block's logits, which may overwrite them, or None.
        filter_below: Columns of gradients that are all smaller are left out of the products. A
            scalar, or one threshold for each row; None to include all columns.
    """
    sums = LayerGradients(backend, layer, size, needs)

    def add(block: Block) -> None:
        grad_logits = step(block)
        if grad_logits is not None:
            columns = None
            if filter_below is not None:
                threshold = filter_below[block.rows] if filter_below.dim() else filter_below
                columns = large_columns(grad_logits, threshold)
            sums.add(block, grad_logits, columns)

    deque(map(add, blocks(backend, layer, size, **options)), maxlen=0)
    return sums.converted()  # after the memory of the logits has been freed


class LossArgs(NamedTuple):
    """The arguments of a forward or backward pass of a loss over rows, besides its tensors.

    Attributes:
        options: The options, with the reduction "sum" or "none"; or "mean", as in the arguments of
            the backend, if the operator's kernels divide.
        outputs: The results to compute.
        grad_output: The gradient of the loss: a scalar, or one element per row if the reduction is
            "none". None for ones, or if the forward pass needs none.
        state: The state that the forward pass has returned, None if it has returned none.
        counts: As in `Layer`.
    """

    backend: Backend
    options: Any
    outputs: Outputs
    grad_output: Tensor | None
    state: Tensor | None = None
    counts: Tensor | None = None


# Computes the loss and the gradient of a block's logits, which it may overwrite, given the
# arguments for the block's rows.
LossStep = Callable[[Block, LossArgs], tuple[Tensor | None, Tensor | None]]


def loss_over_rows(
    layer: Layer, rows: int, args: LossArgs, step: LossStep, filter_below: Tensor | None = None
) -> LossResult:
    """Returns the loss and the layer's gradients, by blocks of rows with all classes.

    The loss is a sum in float64, or a tensor with the loss of each row. The gradients are those of
    `LayerGradients`, or () if the pass computes none.

    Args:
        rows: The number of rows of a block.
        args: Four of the gradients belong to the layer and come first. A step computes the gradient
            of the logits instead of these four, and the other gradients.
        filter_below: As in `over_blocks`.
    """
    backend, options, outputs, grad_output, *_ = args
    weight, unreduced, losses = options.token_weight, options.reduction == "none", list[Tensor]()
    needs = outputs.gradients
    block_needs = (any(needs[:4]), *needs[4:]) if needs else ()
    block_outputs = Outputs(outputs.loss, block_needs, inplace=True)

    def block_step(block: Block) -> Tensor | None:
        block_options, grad = options, grad_output
        if weight is not None:
            block_options = replace(options, token_weight=weight[block.rows])
        if unreduced and grad is not None:
            grad = grad[block.rows]
        loss, grad_logits = step(block, LossArgs(backend, block_options, block_outputs, grad))
        if loss is not None:
            losses.append(loss)
        return grad_logits

    loop = backend, layer, (rows, layer.weights[0].shape[0]), needs or (False,) * 4, block_step
    gradients = over_blocks(*loop, filter_below=filter_below)
    gradients = gradients if needs else ()
    if not losses:
        return None, gradients
    if len(losses) == 1:
        return losses[0], gradients
    loss = torch.cat(losses) if unreduced else torch.stack(losses).sum(dtype=torch.float64)
    return loss, gradients


# ---- valid rows ----------------------------------------------------------------------------------


def rows_that_count(valid: Tensor, backend: Backend) -> tuple[Tensor | None, Tensor | None]:
    """Returns the indices of the rows to compute, None for all, and which of these count.

    All rows are computed if reading the mask would synchronise, and if no row counts. The second
    result is a mask, as in `Layer`.

    Args:
        valid: Whether each target of a row is valid, of shape (N, ...).
    """
    counts = valid.flatten(1).any(1) if valid.dim() > 1 else valid
    if backend.ASYNCHRONOUS:
        return None, counts
    rows = counts.nonzero().flatten()
    if len(rows) == len(counts):
        return None, None
    return (rows, None) if len(rows) else (None, counts)


def take_rows(values: Any, rows: Tensor | None, dim: int = 0) -> Any:
    """Returns the values of these rows, or of all rows for None."""
    return values if values is None or rows is None else values.index_select(dim, rows)


def spread_rows(values: Any, rows: Tensor | None, total: int, dim: int = 0) -> Any:
    """Scatters the values of some rows to all rows, which are 0 otherwise."""
    if values is None or rows is None:
        return values
    shape = list(values.shape)
    shape[dim] = total
    return values.new_zeros(shape).index_copy_(dim, rows, values)


# ---- the state of rows ---------------------------------------------------------------------------


class StateOptions(NamedTuple):
    """Options of the state of the rows of logits, or of a layer's output.

    Attributes:
        rows: The options of the kernels.
        classes: The classes of these logits.
        fields: The number of fields of a state.
        size: The numbers of rows and classes of a block of a layer's logits, None for the default.
        memory_budget: Bytes for the logits in memory at once, None for the default.
        fixed_sizes: Whether the logits come from matrix products of one size.
    """

    rows: RowOptions
    classes: ClassRange
    fields: int = STATE_FIELDS
    size: tuple[int, int] | None = None
    memory_budget: int | None = None
    fixed_sizes: bool = False


class LayerStates:
    """Computes the states of the rows of a layer's logits, and gradients from them, by blocks.

    A row has the logits of one target. On CPUs, rows without a valid target are left out.

    Args:
        head: The layer, with class indices as targets, and the weights of all classes in the
            accumulation dtype, or None. A layer with an adapter has two-dimensional weights.
    """

    def __init__(self, backend: Backend, head: Head, options: StateOptions) -> None:
        self.backend, self.options, self.weight = backend, options, head.weight
        weight, bias = head.linear_weight.detach(), head.linear_bias
        self.shape, self.target_shape = head.input.shape, head.target.shape
        self.class_shape = *weight.shape[1:-1], weight.shape[0]
        self.n, self.positions = self.shape[:-1].numel(), weight.shape[1:-1].numel()
        input = head.input.detach().reshape(self.n, self.shape[-1])
        target = head.target.reshape(self.n, self.positions)
        ignore_index = options.rows.ignore_index
        self.valid, counts = rows_that_count(target != ignore_index, backend)
        input, target = take_rows(input, self.valid), take_rows(target, self.valid)
        self.labels = target.flatten().contiguous()
        size = options.memory_budget, options.fixed_sizes, backend
        self.size = options.size or state_block_size(head._replace(input=input), *size)
        bias = None if bias is None else bias.detach().movedim(0, -1).flatten()
        weight = weight.movedim(0, -2).reshape(head.columns, -1)  # classes of a position in a row
        weights = (weight,) if head.adapter_weight is None else (weight, head.adapter_weight)
        self.layer = Layer(input, weights, bias, product_dtype(head, backend), counts)

    def per_target(self, block: Block) -> tuple[Tensor, slice, ClassRange]:
        """Returns a block's logits with a row per target, the targets' slice, and the classes."""
        targets = slice(block.rows.start * self.positions, block.rows.stop * self.positions)
        first, total = self.options.classes
        logits = block.logits.view(targets.stop - targets.start, -1)
        return logits, targets, ClassRange(first + block.classes.start, total)

    def state(self, return_logits: bool = False) -> tuple[Tensor, Tensor | None]:
        """Computes the state of each target, of shape (fields, *target.shape), in float64.

        Args:
            return_logits: Whether the logits of the first block are returned, for the backward
                pass. They are None if the block does not have all classes.
        """
        rows, fields, fixed_sizes = self.options.rows, self.options.fields, self.options.fixed_sizes
        state = self.labels.new_empty((fields, len(self.labels)), dtype=torch.float64)
        loop = self.backend, self.layer, self.size
        for block in blocks(*loop, backwards=True, fixed_sizes=fixed_sizes):
            logits, targets, classes = self.per_target(block)
            continues = block.classes.start > 0
            launch = self.backend.row_state(logits, rows, classes, fields, 0, continues)
            launch(rows.numbers, logits, self.labels[targets], self.weight, state[:, targets])
        state = spread_rows(state.view(fields, -1, self.positions), self.valid, self.n, 1)
        has_all_classes = block.logits.shape[1] == self.layer.weights[0].shape[0]
        kept = block.logits.view(-1) if return_logits and has_all_classes else None
        return state.view(fields, *self.target_shape), kept

    def gradients(
        self,
        needs: Sequence[bool],
        state: Tensor,
        grad_results: Tensor,
        logits: Tensor | None = None,
        filter_below: Tensor | None = None,
    ) -> Gradients:
        """Computes the gradients of the layer's input, weight, bias and adapter's weight.

        Args:
            state: The state over all classes.
            grad_results: The gradients of log-probability, entropy, log-sum-exp and the weighted
                sum of the logits, or of the first 1 or 3 of these, in float64. The target's shape
                follows.
            logits: The logits that `state` has returned; they are overwritten.
            filter_below: As in `over_blocks`, for all rows of the input.
        """
        valid, n, rows = self.valid, self.n, self.options.rows
        state, grad_results = (
            take_rows(values.reshape(len(values), n, -1), valid, 1).flatten(1).contiguous()
            for values in (state, grad_results)
        )

        def step(block: Block) -> Tensor:
            logits, targets, classes = self.per_target(block)
            launch = self.backend.row_gradients(logits, rows, classes, len(grad_results))
            given = state[:, targets], grad_results[:, targets]
            launch(rows.numbers, logits, self.labels[targets], self.weight, *given, logits)
            return block.logits

        grad_input, grad_weight, grad_bias, grad_adapter = over_blocks(
            self.backend,
            self.layer,
            self.size,
            needs,
            step,
            filter_below=take_rows(filter_below, valid),
            memory=logits,
            fixed_sizes=self.options.fixed_sizes,
        )
        if grad_input is not None:
            grad_input = spread_rows(grad_input, valid, n).view(self.shape)
        if grad_weight is not None:
            grad_weight = grad_weight.view(*self.class_shape, -1).movedim(-2, 0)
        if grad_bias is not None:
            grad_bias = grad_bias.view(self.class_shape).movedim(-1, 0)
        return grad_input, grad_weight, grad_bias, grad_adapter


# ---- softcap -------------------------------------------------------------------------------------


def capped(
    backend: Backend, logits: Tensor, softcap: float | None, rounds: bool = False
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Returns softcap * tanh(logits / softcap), and its backward function.

    The function takes the gradient of the result and returns that of the logits. Without a softcap
    it returns the logits themselves and the identity.

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


# The columns of a product whose size does not depend on the batch; all on GPUs, to save launches.
FIXED_COLUMNS = 2048
ALIGNMENT = 64  # bytes


def _linear_in_fixed_sizes(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Computes logits such that the bits of a row depend only on this row and the layer.

    All products have the same size, layout and alignment for every batch. Rows are copied to a
    block, whose other rows hold zeros or rows of an earlier product, and features are padded to
    multiples of 16, which aligns all rows.
    """
    features, padding = x.shape[1], -x.shape[1] % 16
    settings = torch.get_num_threads(), torch.get_float32_matmul_precision()
    width = FIXED_COLUMNS if x.is_cpu else weight.shape[0]
    for first in range(0, weight.shape[0], width):
        columns = slice(first, first + width)
        w = F.pad(weight[columns], (0, padding)) if padding else weight[columns]
        if not w.is_contiguous() or w.data_ptr() % ALIGNMENT:
            w = w.clone(memory_format=torch.contiguous_format)
        b = None if bias is None else bias[columns]
        rows = _rows_of_product(x.device, x.dtype, *w.shape, b is not None, *settings)
        block, product = x.new_zeros(rows, w.shape[1]), x.new_empty(rows, len(w))
        for row in range(0, x.shape[0], rows):
            part = x[row : row + rows]
            block[: len(part), :features] = part
            linear(block, w, b, product)
            out[row : row + rows, columns] = product[: len(part)]


@functools.cache
def _rows_of_product(
    device: torch.device,
    dtype: torch.dtype,
    classes: int,
    features: int,
    bias: bool,
    *_settings: Any,
) -> int:
    """Returns the rows of a product that computes equal rows equally: `fixed_rows`, else 1.

    No library guarantees this, so it is tested with copies of one row at the first use. Products of
    single rows are always equal, but slower.

    Args:
        _settings: Settings on which the library's choice of an algorithm may depend.
    """
    random = functools.partial(
        torch.randn, generator=torch.Generator(device).manual_seed(0), device=device, dtype=dtype
    )
    weight, bias_values = random(classes, features), random(classes) if bias else None
    rows = fixed_rows(device)
    product = weight.new_empty(rows, classes)
    for _ in range(8):  # sums over few features may be equal in another order by chance
        linear(random(1, features).repeat(rows, 1), weight, bias_values, product)
        if not torch.equal(product, product[:1].expand_as(product)):
            return 1
    return rows


MAX_LARGE = 0.5  # the largest fraction of a block's columns that is worth copying


def large_columns(gradient: Tensor, threshold: Tensor) -> Tensor | None:
    """Returns the indices of the columns with an element of at least the threshold, or NaN.

    With several thresholds, the largest is used. Returns None, for all columns, if too few would be
    left out.
    """
    bound = float(threshold.max())
    low, high = gradient.aminmax(dim=0)
    columns = (~((high < bound) & (low > -bound))).nonzero().flatten()
    return columns if len(columns) < MAX_LARGE * len(low) else None
