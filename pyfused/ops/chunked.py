"""A linear layer's logits that never exist as a whole: the loops of its losses.

How many rows or classes a chunk has is decided in `chunk_sizes.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pyfused.backends import Backend
from pyfused.layout import accumulate_dtype
from pyfused.ops.chunk_sizes import FIXED_ROWS, chunk_of_states, product_dtype
from pyfused.ops.elementwise import SOFTCAP
from pyfused.types import (
    STATE_FIELDS,
    ClassRange,
    Gradients,
    Head,
    Outputs,
    RowOptions,
)

# ---- chunks --------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """Input (N, D), weight (C, D), and bias (C) or None."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None


class Chunk(NamedTuple):
    """Some outputs of a layer, and the matrices that they are the product of."""

    output: Tensor
    input: Tensor
    weight: Tensor
    rows: slice
    columns: slice


def chunks(
    backend: Backend,
    layer: Layer,
    dtype: torch.dtype,
    size: tuple[int, int],
    *,
    backwards: bool = False,
    memory: Tensor | None = None,
    fixed_sizes: bool = False,
) -> Iterator[Chunk]:
    """Yields the outputs of all rows for some columns, then for the next ones, in the same memory.

    Args:
        dtype: The dtype of the products.
        size: Rows and columns of a chunk.
        backwards: The last rows come first.
        memory: Has the first chunk's outputs already, and takes those of the others.
        fixed_sizes: The bits of a row's outputs do not depend on the batch.
    """
    input, weight, bias = layer
    n, classes = len(input), len(weight)
    rows, columns = max(1, min(size[0], n)), max(1, min(size[1], classes))
    product, computed = _linear_in_fixed_sizes if fixed_sizes else linear, memory is not None
    if memory is None:
        memory = backend.empty((rows * columns,), dtype, input)
    for first in range(0, classes, columns):
        of_columns = slice(first, min(first + columns, classes))
        w = weight[of_columns].to(dtype)
        b = None if bias is None else bias[of_columns].to(dtype)
        starts = range(0, n, rows)
        for start in reversed(starts) if backwards else starts:
            of_rows = slice(start, min(start + rows, n))
            x = input[of_rows].to(dtype)
            output = memory[: len(x) * len(w)].view(len(x), len(w))
            if not computed:
                product(x, w, b, output)
            computed = False
            yield Chunk(output, x, w, of_rows, of_columns)


class LayerGradients:
    """The gradients of a layer, added up over chunks, of which rows come in order.

    Args:
        dtype: The dtype of the products.
        size: Rows and columns of a chunk.
        needed: Whether the input, the weight and the bias need a gradient.
    """

    def __init__(
        self,
        backend: Backend,
        layer: Layer,
        dtype: torch.dtype,
        size: tuple[int, int],
        needed: Sequence[bool],
    ) -> None:
        self.backend, self.layer, self.sums = backend, layer, accumulate_dtype(dtype)
        self.input: Tensor | None = None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        input, weight, bias = layer
        all_rows, all_columns = len(input) <= size[0], 0 < len(weight) <= size[1]
        if needed[0]:
            self.input = backend.empty(input.shape, dtype if all_columns else self.sums, input)
            self.input = self.input if all_columns else self.input.zero_()
        if needed[1]:
            once = all_rows and weight.dtype is dtype
            sums = weight.dtype if once or not all_columns else self.sums
            self.weight = backend.empty(weight.shape, sums, input)
        if needed[2] and bias is not None:
            self.bias = bias.new_zeros(len(bias), dtype=self.sums)

    def add(self, chunk: Chunk, gradient: Tensor, kept: Tensor | None = None) -> None:
        """Multiplies the gradient of a chunk's outputs with its weight and its input.

        Args:
            kept: The columns that count, None for all.
        """
        _, x, weight, rows, columns = chunk
        if self.bias is not None:
            self.bias[columns] += gradient.sum(0, dtype=self.sums)
        if kept is not None:
            gradient, weight = gradient[:, kept], weight[kept]
        if self.input is not None:
            to = self.input[rows]
            self.backend.add_product(to, gradient, weight, float(columns.start > 0))
        if self.weight is None:
            return
        to, first, last = self.weight[columns], rows.start == 0, rows.stop == len(self.layer.input)
        if first:
            in_place = to.dtype is self.sums or (last and to.dtype is gradient.dtype)
            self.part = to if in_place else self.backend.empty(to.shape, self.sums, x)
        if kept is None:
            self.backend.add_product(self.part, gradient.t(), x, float(not first))
        else:
            part = self.part.zero_() if first else self.part
            part.index_add_(0, kept, torch.mm(gradient.t(), x).to(part.dtype))
        if last and self.part.data_ptr() != to.data_ptr():
            to.copy_(self.part)

    def like(self, layer: Layer) -> Gradients:
        """Returns the sums in the dtypes of the layer's tensors, after all chunks."""

        def like(total: Tensor | None, tensor: Tensor | None) -> Tensor | None:
            if total is None or tensor is None or total.dtype is tensor.dtype:
                return total
            converted: Tensor = self.backend.empty(total.shape, tensor.dtype, total)
            return converted.copy_(total)

        return tuple(map(like, (self.input, self.weight, self.bias), layer))


class CountedRows(NamedTuple):
    """Which of all rows are computed: those whose target counts.

    Attributes:
        total: The number of all rows.
        indices: Those that count, None for all.
    """

    total: int
    indices: Tensor | None = None

    def take(self, values: Any, dim: int = 0) -> Any:
        """Returns the values of the rows that count."""
        kept = values is None or self.indices is None
        return values if kept else values.index_select(dim, self.indices)

    def spread(self, values: Any, dim: int = 0) -> Any:
        """Returns the values of all rows: zeros for those that do not count."""
        if values is None or self.indices is None:
            return values
        shape = list(values.shape)
        shape[dim] = self.total
        return values.new_zeros(shape).index_copy_(dim, self.indices, values)


def counted_rows(target: Tensor, ignored: int, backend: Backend) -> CountedRows:
    """Returns the rows with a target that is not ignored.

    All rows count where finding that out would synchronise, and where none has a target.
    """
    if backend.ASYNCHRONOUS:
        return CountedRows(len(target))
    counts = target != ignored
    rows = (counts.flatten(1).any(1) if counts.dim() > 1 else counts).nonzero().flatten()
    return CountedRows(len(target), rows if 0 < len(rows) < len(target) else None)


class ChunkResults(NamedTuple):
    """Holds the results of a chunk of logits.

    Attributes:
        gradient: The logits' gradient, which may have taken their memory.
        least: The least gradient of a logit of each row that counts in products; None if all do.
    """

    loss: Tensor | None = None
    gradient: Tensor | None = None
    least: Tensor | None = None


def over_chunks(
    backend: Backend,
    layer: Layer,
    dtype: torch.dtype,
    size: tuple[int, int],
    needed: Sequence[bool],
    of_chunk: Callable[[Chunk], ChunkResults],
    **how: Any,
) -> tuple[list[Tensor | None], Gradients]:
    """Returns the losses of all chunks, and the gradients of the layer that follow from them.

    Args:
        dtype, size, how: As in ``chunks``.
        needed: Whether the input, the weight and the bias need a gradient.
    """
    gradients = LayerGradients(backend, layer, dtype, size, needed)

    def add(chunk: Chunk) -> Tensor | None:
        loss, gradient, least = of_chunk(chunk)
        if gradient is not None:
            gradients.add(chunk, gradient, classes_that_count(gradient, least))
        return loss

    losses = [add(chunk) for chunk in chunks(backend, layer, dtype, size, **how)]
    return losses, gradients.like(layer)


class LossArguments(NamedTuple):
    """What a loss of rows, or its gradients, are computed from.

    Attributes:
        outputs: Whether the loss, and which of the tensors' gradients, are wanted.
        grad_output: The loss's gradient, of the loss's shape; None stands for ones.
        state: What the call for the loss has returned, for the gradients.
    """

    backend: Backend
    tensors: Sequence[Any]
    options: Any
    outputs: Outputs = Outputs()
    grad_output: Tensor | None = None
    state: Tensor | None = None


def by_rows(
    arguments: LossArguments,
    layer: Layer,
    dtype: torch.dtype,
    rows: int,
    of_chunk: Callable[[Chunk, LossArguments], ChunkResults],
) -> tuple[Tensor | None, Gradients]:
    """Returns the loss and the layer's gradients, from all logits of some rows at a time.

    The loss is a sum in float64, or one for each row.

    Args:
        of_chunk: Takes the arguments with the options and grad_output of the chunk's rows.
    """
    options, factor = arguments.options, arguments.grad_output
    weight, each = options.token_weight, options.reduction == "none"

    def of_rows(chunk: Chunk) -> ChunkResults:
        part = options
        if weight is not None:
            part = replace(options, token_weight=weight[chunk.rows])
        of_part = factor[chunk.rows] if each and factor is not None else factor
        return of_chunk(chunk, arguments._replace(options=part, grad_output=of_part))

    size, needed = (rows, len(layer.weight)), arguments.outputs.gradients[:3] or (False,) * 3
    losses, gradients = over_chunks(arguments.backend, layer, dtype, size, needed, of_rows)
    parts = [loss for loss in losses if loss is not None]
    if not parts:
        return None, gradients
    return torch.cat(parts) if each else torch.stack(parts).sum(dtype=torch.float64), gradients


# ---- the state of rows ---------------------------------------------------------------------------


class StateOptions(NamedTuple):
    """What the state of the rows of logits, or of a layer's output, is computed by.

    Attributes:
        rows: How the rows are read.
        classes: The logits' classes among all.
        fields: How many fields a state has.
        size: Rows and columns of a chunk of the layer's logits; None for the default.
        memory_budget: Bytes for the logits that exist at once; None for the default.
        fixed_sizes: Logits come from matrix products of one size.
    """

    rows: RowOptions
    classes: ClassRange
    fields: int = STATE_FIELDS
    size: tuple[int, int] | None = None
    memory_budget: int | None = None
    fixed_sizes: bool = False


def state_of(
    backend: Backend,
    tensors: Sequence[Any],
    options: StateOptions,
    weight: Tensor | None = None,
    keeps: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Returns the state of each target, of shape (fields, *target.shape).

    Returns also, if it ``keeps`` them, the logits of the first rows for the backward pass, where
    they have all classes.

    Args:
        tensors: Input, weight and bias of a layer, and the target.
        weight: One factor for each of all classes, in the accumulation dtype, or None.
    """
    target, rows, fields = tensors[-1], options.rows, options.fields
    part, output = _counted_part(tensors, options, backend), None
    state = part.labels.new_empty((fields, len(part.labels)), dtype=torch.float64)
    for chunk in chunks(
        *(backend, part.layer, part.dtype, part.size),
        backwards=True,
        fixed_sizes=options.fixed_sizes,
    ):
        logits, targets, classes = part.of_chunk(chunk, options)
        launch = backend.row_state(logits, rows, classes, fields, 0, chunk.columns.start > 0)
        launch(logits, part.labels[targets], weight, state[:, targets])
        output = chunk.output
    state = part.rows.spread(state.view(fields, -1, part.positions), dim=1).view(
        fields, *target.shape
    )
    if output is None or not keeps or output.shape[1] < len(part.layer.weight):
        return state, None
    return state, output.view(-1)


def gradients_of(
    backend: Backend,
    tensors: Sequence[Any],
    options: StateOptions,
    needed: Sequence[bool],
    state: Tensor,
    grad_results: Tensor,
    kept: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    least: Tensor | None = None,
) -> Gradients:
    """Returns the gradients of a layer's input, weight and bias.

    Args:
        tensors, options, weight: As in ``state_of``.
        state: Of all classes.
        grad_results: The gradients of the first of log-probability, entropy, log-sum-exp and the
            weighted sum of the logits, of shape (1, 3 or 4, *target.shape), in float64.
        kept: The logits that ``state_of`` has kept, whose memory is overwritten.
        least: The least gradient of a logit of each row that counts in products; None if all do.
    """
    input, linear_weight, *_ = tensors
    n = input.shape[:-1].numel()
    part = _counted_part(tensors, options, backend)
    state, grad_results = (
        part.rows.take(values.reshape(len(values), n, -1), 1).flatten(1).contiguous()
        for values in (state, grad_results)
    )
    least = part.rows.take(least)

    def of_chunk(chunk: Chunk) -> ChunkResults:
        logits, targets, classes = part.of_chunk(chunk, options)
        launch = backend.row_gradients(logits, options.rows, classes, len(grad_results))
        of_rows = weight, state[:, targets], grad_results[:, targets]
        launch(logits, part.labels[targets], *of_rows, logits)
        return ChunkResults(
            gradient=chunk.output, least=None if least is None else least[chunk.rows]
        )

    _, (of_input, of_weight, of_bias) = over_chunks(
        *(backend, part.layer, part.dtype, part.size, needed, of_chunk),
        memory=kept,
        fixed_sizes=options.fixed_sizes,
    )
    shape = *linear_weight.shape[1:-1], len(linear_weight)
    return (
        None if of_input is None else part.rows.spread(of_input).view(input.shape),
        None if of_weight is None else of_weight.view(*shape, -1).movedim(-2, 0),
        None if of_bias is None else of_bias.view(shape).movedim(-1, 0),
    )


class _CountedPart(NamedTuple):
    """The rows of a call that are not ignored.

    Attributes:
        layer: The classes at one of the positions d1, ..., dk are neighbours.
        labels: The targets, flat.
        rows: Which these are of the whole layer's.
        size: Rows and columns of a chunk.
        dtype: The dtype of the products.
        positions: The number of targets of a row, d1 * ... * dk.
    """

    layer: Layer
    labels: Tensor
    rows: CountedRows
    size: tuple[int, int]
    dtype: torch.dtype
    positions: int

    def of_chunk(self, chunk: Chunk, options: StateOptions) -> tuple[Tensor, slice, ClassRange]:
        """Returns the logits of each target, which targets these are, and of which classes."""
        targets = slice(chunk.rows.start * self.positions, chunk.rows.stop * self.positions)
        classes = options.classes._replace(first=options.classes.first + chunk.columns.start)
        return chunk.output.view(len(chunk.input) * self.positions, -1), targets, classes


def _counted_part(tensors: Sequence[Any], options: StateOptions, backend: Backend) -> _CountedPart:
    input, weight, bias, target = tensors
    input, weight = input.detach().reshape(-1, input.shape[-1]), weight.detach()
    target = target.reshape(len(input), -1)
    rows = counted_rows(target, options.rows.ignore_index, backend)
    input, target = rows.take(input), rows.take(target)
    head = Head(input, weight, bias, target, None)
    bias = None if bias is None else bias.detach().movedim(0, -1).flatten()
    layer = Layer(input, weight.movedim(0, -2).reshape(head.columns, -1), bias)
    size = options.size or chunk_of_states(
        head, options.memory_budget, options.fixed_sizes, backend
    )
    labels, positions = target.flatten().contiguous(), weight.shape[1:-1].numel()
    return _CountedPart(layer, labels, rows, size, product_dtype(head, backend), positions)


# ---- softcap -------------------------------------------------------------------------------------


def capped(
    backend: Backend, logits: Tensor, softcap: float | None, rounds: bool = False
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Returns softcap * tanh(logits / softcap), and a function of its gradient.

    The function returns the gradient of the logits. Without a softcap nothing is changed.

    Args:
        rounds: The values are in the logits' dtype, and not in that of the accumulation.
    """
    if softcap is None:
        return logits, lambda gradient: gradient
    wide = logits if rounds else logits.to(accumulate_dtype(logits.dtype))
    forward, backward = backend.activation(SOFTCAP.kernels["softcap"], wide, (softcap,))
    return forward(wide), lambda gradient: backward(gradient, wide).to(logits.dtype)


# ---- products ------------------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


FIXED_COLUMNS = 2048  # of a product whose size is not to depend on the batch
ALIGNMENT = 64  # bytes


def _linear_in_fixed_sizes(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Computes the outputs of a row so that their bits depend on this row and the layer alone.

    Every product has the same size, layout and alignment, whatever the batch: rows and features are
    copied to one block, which has zeros, or rows of an earlier product, in the rest. Features fill
    multiples of 16, so that all rows are aligned.
    """
    features, padding = x.shape[1], -x.shape[1] % 16
    for first in range(0, len(weight), FIXED_COLUMNS):
        columns = slice(first, first + FIXED_COLUMNS)
        w = F.pad(weight[columns], (0, padding)) if padding else weight[columns]
        if not w.is_contiguous() or w.data_ptr() % ALIGNMENT:
            w = w.clone(memory_format=torch.contiguous_format)
        b = None if bias is None else bias[columns]
        rows = _rows_of_product(
            *(x.device, x.dtype, *w.shape, b is not None),
            *(torch.get_num_threads(), torch.get_float32_matmul_precision()),
        )
        block, product = x.new_zeros(rows, w.shape[1]), x.new_empty(rows, len(w))
        for row in range(0, len(x), rows):
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
    """FIXED_ROWS if a product computes each of so many rows alike, and otherwise 1.

    That is tried at the first use, with copies of one row, as no library promises it. A single row
    is always computed alike, only slower.

    Args:
        _settings: What else the library's choice of an algorithm may depend on.
    """
    random = functools.partial(
        torch.randn, generator=torch.Generator(device).manual_seed(0), device=device, dtype=dtype
    )
    weight, of_bias = random(classes, features), random(classes) if bias else None
    product = weight.new_empty(FIXED_ROWS, classes)
    for _ in range(8):  # another order of few features may give the same bits
        linear(random(1, features).repeat(FIXED_ROWS, 1), weight, of_bias, product)
        if not torch.equal(product, product[:1].expand_as(product)):
            return 1
    return FIXED_ROWS


MOST_KEPT = 0.5  # of a block's classes; more are not worth their copies


def classes_that_count(gradient: Tensor, least: Tensor | None) -> Tensor | None:
    """Returns the columns of a block of gradients where any is at least as large as ``least``.

    None stands for all: without ``least``, the largest of which counts, or where too few classes
    would be left out.
    """
    if least is None:
        return None
    bound = float(least.max())
    low, high = gradient.aminmax(dim=0)
    kept = (~((high < bound) & (low > -bound))).nonzero().flatten()  # a NaN counts
    return kept if len(kept) < MOST_KEPT * len(low) else None
