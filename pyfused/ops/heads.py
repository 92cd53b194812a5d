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

import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import InitVar, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pyfused.backends import Backend
from pyfused.backends.protocol import LossKernel, LossResult
from pyfused.layout import accumulate_dtype, layouts
from pyfused.ops.chunk_sizes import fixed_rows, product_dtype
from pyfused.ops.elementwise import SOFTCAP
from pyfused.ops.row_state import RowInputs, RowState
from pyfused.types import ClassRange, Gradients, Head, Outputs, VocabOptions

# ---- the loop ------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """A linear layer and its input, whose logits are computed by blocks.

    Attributes:
        input: (N, D), or (N, D + r) with an adapter; its last r features are the adapter's.
        weights: The weight (C, D), followed by the weight (C, r) of an adapter if there is one.
            The adapter's output is added to the layer's.
        bias: (C), or None.
        dtype: The dtype of the matrix products.
        size: The numbers of rows and classes of a block.
        counts: (N), whether each row counts; None if all rows count. For other rows, the gradient
            of the logits is 0, and the weight's gradient uses 0 instead of the features, which may
            be NaN.
        fixed_sizes: Whether the bits of a row's logits are independent of the batch.
    """

    backend: Backend
    input: Tensor
    weights: Sequence[Tensor]
    bias: Tensor | None
    dtype: torch.dtype
    size: tuple[int, int]
    counts: Tensor | None = None
    fixed_sizes: bool = False

    def split(self, input: Tensor) -> Sequence[Tensor]:
        """Splits features, or their gradient, into the features of each weight."""
        if len(self.weights) == 1:
            return (input,)
        parts: Sequence[Tensor] = input.split([weight.shape[1] for weight in self.weights], 1)
        return parts


class Block(NamedTuple):
    """The logits of some rows and classes, and the factors of their matrix product.

    Attributes:
        inputs: The rows of the input, split into the features of each of the layer's weights.
        weights: The rows of each weight for these classes. Inputs and weights have the dtype of the
            products.
    """

    logits: Tensor
    inputs: Sequence[Tensor]
    weights: Sequence[Tensor]
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
    backend, input, all_weights, bias, dtype, size, _, fixed_sizes = layer
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
        needs: Whether the input, the weight, the bias and the adapter's weight need a gradient.
    """

    def __init__(self, layer: Layer, needs: Sequence[bool]) -> None:
        backend, input, weights, bias, dtype, size, *_ = layer
        self.layer, self.sum_dtype = layer, accumulate_dtype(dtype)
        self.input: Tensor | None = None
        self.bias: Tensor | None = None
        self.weights: list[Tensor | None] = [None] * len(weights)
        self.sums = list(self.weights)  # of the products of the current block of classes
        all_rows, all_classes = input.shape[0] <= size[0], weights[0].shape[0] <= size[1]
        if needs[0]:
            self.input = backend.empty(input.shape, dtype if all_classes else self.sum_dtype, input)
        for i, weight in enumerate(weights):
            if needs[3 if i else 1]:
                one_product = all_rows and weight.dtype is dtype
                sum_dtype = weight.dtype if one_product or not all_classes else self.sum_dtype
                self.weights[i] = backend.empty(weight.shape, sum_dtype, input)
        if needs[2] and bias is not None:
            self.bias = bias.new_zeros(bias.shape, dtype=self.sum_dtype)

    def add(self, block: Block, grad_logits: Tensor, columns: Tensor | None = None) -> None:
        """Adds the products of the gradient of a block's logits with its weights and its inputs.

        Args:
            columns: The indices of the classes to include, None for all.
        """
        _, inputs, weights, rows, classes = block
        backend, counts = self.layer.backend, self.layer.counts
        if self.bias is not None:
            self.bias[classes] += grad_logits.sum(0, dtype=self.sum_dtype)
        if columns is not None:
            grad_logits, weights = grad_logits[:, columns], [weight[columns] for weight in weights]
        if self.input is not None:
            for out, weight in zip(self.layer.split(self.input[rows]), weights, strict=True):
                backend.add_product(out, grad_logits, weight, float(classes.start > 0))
        if counts is not None and self.weights.count(None) < len(self.weights):
            inputs = [x.where(counts[rows].unsqueeze(-1), 0) for x in inputs]
        first, last = rows.start == 0, rows.stop == self.layer.input.shape[0]
        for i, (total, x) in enumerate(zip(self.weights, inputs, strict=True)):
            if total is None:
                continue
            out = total[classes]
            if first:
                in_place = out.dtype is self.sum_dtype or (last and out.dtype is grad_logits.dtype)
                self.sums[i] = out if in_place else backend.empty(out.shape, self.sum_dtype, x)
            sums: Any = self.sums[i]
            if columns is None:
                backend.add_product(sums, grad_logits.t(), x, float(not first))
            else:
                sums = sums.zero_() if first else sums
                sums.index_add_(0, columns, torch.mm(grad_logits.t(), x).to(sums.dtype))
            if last and sums.data_ptr() != out.data_ptr():
                out.copy_(sums)

    def converted(self) -> Gradients:
        """Returns the gradients in the dtypes of the layer's tensors, after all blocks.

        These are the gradients of the input, the weight, the bias and the adapter's weight.
        """
        backend, input, weights, bias, *_ = self.layer
        gradients: list[Any] = [self.input, self.bias, *self.weights]
        for i, (total, x) in enumerate(zip(gradients, (input, bias, *weights), strict=True)):
            if total is not None and x is not None and total.dtype is not x.dtype:
                gradients[i] = backend.empty(total.shape, x.dtype, total).copy_(total)
        grad_input, grad_bias, grad_weight, *grad_adapter = gradients
        return grad_input, grad_weight, grad_bias, grad_adapter[0] if grad_adapter else None


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

    gradients = over_blocks(layer, needs or (False,) * 4, block_step, filter_below)
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
        A function of the tensors, the numbers, the outputs, and grad_output or None.
    """
    launches: dict[Any, LossKernel] = {}

    def run(
        tensors: Sequence[Any], numbers: Sequence[Any], outputs: Outputs, grad_output: Tensor | None
    ) -> LossResult:
        key = outputs, layouts(*tensors, grad_output)
        launch = launches.get(key)
        if launch is None:
            if len(launches) >= MOST_PREPARED:
                launches.clear()
            launch = launches[key] = prepare(tensors, outputs, grad_output)
        return launch(tensors, numbers, grad_output)

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
            A layer with an adapter has two-dimensional weights.
        options: The options of the kernels, whose numbers are not used.
        classes: The range of the layer's classes.
        fields: The number of fields of a state.
        size: Returns the numbers of rows and classes of a block, given the number of rows.
        needs: Whether the input, the weight, the bias and the adapter's weight need a gradient.
        fixed_sizes: As in `Layer`.
    """

    backend: Backend
    head: InitVar[Head]
    options: VocabOptions
    classes: ClassRange
    fields: int
    size: Callable[[int], tuple[int, int]]
    needs: Sequence[bool]
    fixed_sizes: bool = False

    def __post_init__(self, head: Head) -> None:
        self.dtype, self.columns = product_dtype(head, self.backend), head.columns
        self.positions = head.linear_weight.shape[1:-1].numel()

    def layer(self, inputs: RowInputs) -> tuple[Layer, Tensor, Tensor | None, int]:
        """Returns the layer of the rows to compute, their targets, their indices and N."""
        layer: list[Any] = [None if x is None else x.detach() for x in inputs[0]]
        input, weight, bias, *adapter = layer
        n, features = input.shape[:-1].numel(), input.shape[-1]
        input, target = input.reshape(n, features), inputs[1].reshape(n, self.positions)
        valid, counts = rows_that_count(target != self.options.ignore_index, self.backend)
        input, target = take_rows(input, valid), take_rows(target, valid)
        bias = None if bias is None else bias.movedim(0, -1).flatten()
        weight = weight.movedim(0, -2).reshape(self.columns, -1)  # contiguous classes per target
        weights = [weight, *[x for x in adapter if x is not None]]
        options = bias, self.dtype, self.size(input.shape[0]), counts, self.fixed_sizes
        labels = target.flatten().contiguous()
        return Layer(self.backend, input, weights, *options), labels, valid, n

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
        (_, target, weight, numbers), fields = inputs, self.fields
        layer, labels, valid, n = self.layer(inputs)
        state = labels.new_empty((fields, labels.shape[0]), dtype=torch.float64)
        for block in blocks(layer, backwards=True):
            logits, targets, classes = self.per_target(block)
            options = self.options, classes, fields, 0, block.classes.start > 0
            launch = self.backend.row_state(logits, *options)
            launch(numbers, logits, labels[targets], weight, state[:, targets])
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
        """Computes the gradients of the layer's input, weight, bias and adapter's weight.

        Args:
            state: The state over all classes.
            grad_results: The gradients of the first 1, 3 or 4 results, of shape
                (results, *target.shape), in float64.
            logits: The logits that `state` returned; they are overwritten.
            filter_below: As in `over_blocks`, for all rows of the input.
        """
        (input, linear_weight, *_), _, weight, numbers = inputs
        layer, labels, valid, n = self.layer(inputs)
        state, grad_results = (
            take_rows(values.reshape(values.shape[0], n, -1), valid, 1).flatten(1).contiguous()
            for values in (state, grad_results)
        )

        def step(block: Block) -> Tensor:
            logits, targets, classes = self.per_target(block)
            launch = self.backend.row_gradients(logits, self.options, classes, len(grad_results))
            states = state[:, targets], grad_results[:, targets]
            launch(numbers, logits, labels[targets], weight, *states, logits)
            return block.logits

        below = take_rows(filter_below, valid)
        gradients = over_blocks(layer, self.needs, step, below, logits)
        grad_input, grad_weight, grad_bias, grad_adapter = gradients
        if grad_input is not None:
            grad_input = spread_rows(grad_input, valid, n).view(input.shape)
        classes = *linear_weight.shape[1:-1], linear_weight.shape[0]
        if grad_weight is not None:
            grad_weight = grad_weight.view(*classes, -1).movedim(-2, 0)
        if grad_bias is not None:
            grad_bias = grad_bias.view(classes).movedim(-1, 0)
        return grad_input, grad_weight, grad_bias, grad_adapter


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


# The columns of a product of fixed size, on CPUs. On GPUs, all columns are used, to save launches.
FIXED_COLUMNS = 2048
ALIGNMENT = 64  # bytes


def _linear_in_fixed_sizes(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Computes logits such that the bits of a row depend only on this row and the layer.

    The products have the same size, layout and alignment for every batch. Rows are copied to a
    block, whose other rows hold zeros or rows of an earlier product. Features are padded to
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
    """Returns the number of rows of a product with equal results for equal rows: `fixed_rows` or 1.

    No library guarantees equal results, so the first use tests copies of one row. Products of
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
    for _ in range(8):  # sums over few features may agree in another order by chance
        linear(random(1, features).repeat(rows, 1), weight, bias_values, product)
        if not torch.equal(product, product[:1].expand_as(product)):
            return 1
    return rows


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
