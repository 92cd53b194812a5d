"""A linear layer's logits that never exist as a whole: one loop over blocks of them.

    for block in blocks(layer):         # logits = input[rows] @ weight[classes].T + bias
        gradient = step(block)          # of the loss by these logits
        sums.add(block, gradient)       # gradient @ weight, gradient.T @ input, gradient.sum(0)

A step is the loss's own part: cross-entropy, a divergence, log-probabilities. ``chunk_sizes.py``
decides how many rows and classes a block has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pyfused.backends import Backend
from pyfused.layout import accumulate_dtype
from pyfused.ops.chunk_sizes import FIXED_ROWS, chunk_of_states, product_dtype
from pyfused.ops.elementwise import SOFTCAP
from pyfused.types import STATE_FIELDS, ClassRange, Gradients, Head, RowOptions

# ---- the loop ------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """Input (N, D), weight (C, D), and bias (C) or None."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None


class Block(NamedTuple):
    """The logits of some rows and classes, and the matrices that they are the product of."""

    logits: Tensor
    input: Tensor
    weight: Tensor
    rows: slice
    classes: slice


def blocks(
    backend: Backend,
    layer: Layer,
    dtype: torch.dtype,
    size: tuple[int, int],
    *,
    backwards: bool = False,
    memory: Tensor | None = None,
    fixed_sizes: bool = False,
) -> Iterator[Block]:
    """Yields the logits of all rows for some classes, then for the next ones, in the same memory.

    Args:
        dtype: The dtype of the products.
        size: Rows and classes of a block.
        backwards: The last rows come first.
        memory: Holds the logits of the first block already, and takes those of the others.
        fixed_sizes: The bits of a row's logits do not depend on the batch.
    """
    input, weight, bias = layer
    n, all_classes = len(input), len(weight)
    rows, classes = max(1, min(size[0], n)), max(1, min(size[1], all_classes))
    product, computed = _linear_in_fixed_sizes if fixed_sizes else linear, memory is not None
    if memory is None:
        memory = backend.empty((rows * classes,), dtype, input)
    for first in range(0, all_classes, classes):
        of_classes = slice(first, min(first + classes, all_classes))
        w = weight[of_classes].to(dtype)
        b = None if bias is None else bias[of_classes].to(dtype)
        starts = range(0, n, rows)
        for start in reversed(starts) if backwards else starts:
            of_rows = slice(start, min(start + rows, n))
            x = input[of_rows].to(dtype)
            logits = memory[: len(x) * len(w)].view(len(x), len(w))
            if not computed:
                product(x, w, b, logits)
            computed = False
            yield Block(logits, x, w, of_rows, of_classes)


class LayerGradients:
    """The gradients of a layer, added up over blocks, of which rows come in order.

    Args:
        dtype: The dtype of the products.
        size: Rows and classes of a block.
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
        all_rows, all_classes = len(input) <= size[0], 0 < len(weight) <= size[1]
        if needed[0]:
            self.input = backend.empty(input.shape, dtype if all_classes else self.sums, input)
            self.input = self.input if all_classes else self.input.zero_()
        if needed[1]:
            once = all_rows and weight.dtype is dtype
            sums = weight.dtype if once or not all_classes else self.sums
            self.weight = backend.empty(weight.shape, sums, input)
        if needed[2] and bias is not None:
            self.bias = bias.new_zeros(len(bias), dtype=self.sums)

    def add(self, block: Block, gradient: Tensor, kept: Tensor | None = None) -> None:
        """Multiplies the gradient of a block's logits with its weight and its input.

        Args:
            kept: The classes that count, None for all.
        """
        _, x, weight, rows, classes = block
        if self.bias is not None:
            self.bias[classes] += gradient.sum(0, dtype=self.sums)
        if kept is not None:
            gradient, weight = gradient[:, kept], weight[kept]
        if self.input is not None:
            to = self.input[rows]
            self.backend.add_product(to, gradient, weight, float(classes.start > 0))
        if self.weight is None:
            return
        to, first, last = self.weight[classes], rows.start == 0, rows.stop == len(self.layer.input)
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

    def in_dtypes_of(self, layer: Layer) -> Gradients:
        """Returns the sums in the dtypes of the layer's tensors, after all blocks."""

        def converted(total: Tensor | None, tensor: Tensor | None) -> Tensor | None:
            if total is None or tensor is None or total.dtype is tensor.dtype:
                return total
            empty: Tensor = self.backend.empty(total.shape, tensor.dtype, total)
            return empty.copy_(total)

        return tuple(map(converted, (self.input, self.weight, self.bias), layer))


def over_blocks(
    backend: Backend,
    layer: Layer,
    dtype: torch.dtype,
    size: tuple[int, int],
    needed: Sequence[bool],
    step: Callable[[Block], Tensor | None],
    *,
    filter_below: Tensor | None = None,
    **options: Any,
) -> Gradients:
    """Returns the gradients of a layer: the loop that all losses of its logits share.

    Args:
        dtype, size, options: As in `blocks`.
        needed: Whether the input, the weight and the bias need a gradient.
        step: Returns the gradient of a block's logits, which may take their memory, or None.
        filter_below: The least gradient of a logit that products count, a number or one for each
            row; None if they count all.
    """
    sums = LayerGradients(backend, layer, dtype, size, needed)
    for block in blocks(backend, layer, dtype, size, **options):
        gradient = step(block)
        if gradient is not None:
            kept = None
            if filter_below is not None:
                least = filter_below[block.rows] if filter_below.dim() else filter_below
                kept = classes_that_count(gradient, least)
            sums.add(block, gradient, kept)
    return sums.in_dtypes_of(layer)


# Returns the loss and the gradient of a block, given token_weight and grad_output of its rows.
LossStep = Callable[[Block, Any, Any], tuple[Tensor | None, Tensor | None]]


def loss_over_rows(
    backend: Backend,
    layer: Layer,
    dtype: torch.dtype,
    rows: int,
    needed: Sequence[bool],
    options: Any,
    grad_output: Tensor | None,
    step: LossStep,
    **filtered: Any,
) -> tuple[Tensor | None, Gradients]:
    """Returns the loss and the layer's gradients, from all logits of some rows at a time.

    The loss is a sum in float64, or one for each row.

    Args:
        options: Its token_weight is that of all rows.
        grad_output: One number, or one for each row if the reduction is "none".
    """
    weight, each, losses = options.token_weight, options.reduction == "none", list[Tensor]()

    def of_block(block: Block) -> Tensor | None:
        of_rows = None if weight is None else weight[block.rows]
        factor = grad_output[block.rows] if each and grad_output is not None else grad_output
        loss, gradient = step(block, of_rows, factor)
        if loss is not None:
            losses.append(loss)
        return gradient

    size = rows, len(layer.weight)
    gradients = over_blocks(backend, layer, dtype, size, needed, of_block, **filtered)
    if not losses:
        return None, gradients
    return torch.cat(losses) if each else torch.stack(losses).sum(dtype=torch.float64), gradients


# ---- rows that count -----------------------------------------------------------------------------


def counted_rows(target: Tensor, ignored: int, backend: Backend) -> Tensor | None:
    """Returns the indices of the rows with a target that is not ignored, None for all rows.

    All rows count where finding that out would synchronise, and where none has a target.
    """
    if backend.ASYNCHRONOUS:
        return None
    counts = target != ignored
    rows = (counts.flatten(1).any(1) if counts.dim() > 1 else counts).nonzero().flatten()
    return rows if 0 < len(rows) < len(target) else None


def take_rows(values: Any, rows: Tensor | None, dim: int = 0) -> Any:
    """Returns the values of these rows, all for None."""
    return values if values is None or rows is None else values.index_select(dim, rows)


def spread_rows(values: Any, rows: Tensor | None, total: int, dim: int = 0) -> Any:
    """Returns the values of all rows, given those of some: the others are zeros."""
    if values is None or rows is None:
        return values
    shape = list(values.shape)
    shape[dim] = total
    return values.new_zeros(shape).index_copy_(dim, rows, values)


# ---- the state of rows ---------------------------------------------------------------------------


class StateOptions(NamedTuple):
    """How the state of the rows of logits, or of a layer's output, is computed.

    Attributes:
        rows: How the rows are read.
        classes: The logits' classes among all.
        fields: How many fields a state has.
        size: Rows and classes of a block of the layer's logits; None for the default.
        memory_budget: Bytes for the logits that exist at once; None for the default.
        fixed_sizes: Logits come from matrix products of one size.
    """

    rows: RowOptions
    classes: ClassRange
    fields: int = STATE_FIELDS
    size: tuple[int, int] | None = None
    memory_budget: int | None = None
    fixed_sizes: bool = False


class _CountedPart(NamedTuple):
    """The rows of a layer that are not ignored, and how their logits are computed.

    Attributes:
        layer: The classes at one of the positions d1, ..., dk are neighbours.
        labels: The targets, flat.
        indices: Which rows of the whole layer these are, None for all.
        size: Rows and classes of a block.
        dtype: The dtype of the products.
        positions: The number of targets of a row, d1 * ... * dk.
    """

    layer: Layer
    labels: Tensor
    indices: Tensor | None
    size: tuple[int, int]
    dtype: torch.dtype
    positions: int

    def of_block(self, block: Block, options: StateOptions) -> tuple[Tensor, slice, ClassRange]:
        """Returns the logits of each target, which targets these are, and of which classes."""
        targets = slice(block.rows.start * self.positions, block.rows.stop * self.positions)
        classes = options.classes._replace(first=options.classes.first + block.classes.start)
        return block.logits.view(len(block.input) * self.positions, -1), targets, classes


def _counted_part(tensors: Sequence[Any], options: StateOptions, backend: Backend) -> _CountedPart:
    input, weight, bias, target = tensors
    input, weight = input.detach().reshape(-1, input.shape[-1]), weight.detach()
    target = target.reshape(len(input), -1)
    rows = counted_rows(target, options.rows.ignore_index, backend)
    input, target = take_rows(input, rows), take_rows(target, rows)
    head = Head(input, weight, bias, target, None)
    bias = None if bias is None else bias.detach().movedim(0, -1).flatten()
    layer = Layer(input, weight.movedim(0, -2).reshape(head.columns, -1), bias)
    size = options.size or chunk_of_states(
        head, options.memory_budget, options.fixed_sizes, backend
    )
    labels, positions = target.flatten().contiguous(), weight.shape[1:-1].numel()
    return _CountedPart(layer, labels, rows, size, product_dtype(head, backend), positions)


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
    part, logits = _counted_part(tensors, options, backend), None
    state = part.labels.new_empty((fields, len(part.labels)), dtype=torch.float64)
    loop = backend, part.layer, part.dtype, part.size
    for block in blocks(*loop, backwards=True, fixed_sizes=options.fixed_sizes):
        of_targets, targets, classes = part.of_block(block, options)
        launch = backend.row_state(of_targets, rows, classes, fields, 0, block.classes.start > 0)
        launch(of_targets, part.labels[targets], weight, state[:, targets])
        logits = block.logits
    n = target.numel() // max(part.positions, 1)
    state = spread_rows(state.view(fields, -1, part.positions), part.indices, n, 1)
    state = state.view(fields, *target.shape)
    if logits is None or not keeps or logits.shape[1] < len(part.layer.weight):
        return state, None
    return state, logits.view(-1)


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
    filter_below: Tensor | None = None,
) -> Gradients:
    """Returns the gradients of a layer's input, weight and bias.

    Args:
        tensors, options, weight: As in `state_of`.
        state: Of all classes.
        grad_results: The gradients of the first of log-probability, entropy, log-sum-exp and the
            weighted sum of the logits, of shape (1, 3 or 4, *target.shape), in float64.
        kept: The logits that `state_of` has kept, whose memory is overwritten.
        filter_below: As in `over_blocks`.
    """
    input, linear_weight, *_ = tensors
    n = input.shape[:-1].numel()
    part = _counted_part(tensors, options, backend)
    state, grad_results = (
        take_rows(values.reshape(len(values), n, -1), part.indices, 1).flatten(1).contiguous()
        for values in (state, grad_results)
    )

    def step(block: Block) -> Tensor:
        logits, targets, classes = part.of_block(block, options)
        launch = backend.row_gradients(logits, options.rows, classes, len(grad_results))
        of_rows = weight, state[:, targets], grad_results[:, targets]
        launch(logits, part.labels[targets], *of_rows, logits)
        return block.logits

    of_input, of_weight, of_bias = over_blocks(
        *(backend, part.layer, part.dtype, part.size, needed, step),
        filter_below=take_rows(filter_below, part.indices),
        memory=kept,
        fixed_sizes=options.fixed_sizes,
    )
    shape = *linear_weight.shape[1:-1], len(linear_weight)
    return (
        None if of_input is None else spread_rows(of_input, part.indices, n).view(input.shape),
        None if of_weight is None else of_weight.view(*shape, -1).movedim(-2, 0),
        None if of_bias is None else of_bias.view(shape).movedim(-1, 0),
    )


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


def classes_that_count(gradient: Tensor, least: Tensor) -> Tensor | None:
    """Returns the columns of a block of gradients where any is at least as large as ``least``.

    Of several the largest counts. None stands for all columns: where too few would be left out.
    """
    bound = float(least.max())
    low, high = gradient.aminmax(dim=0)
    kept = (~((high < bound) & (low > -bound))).nonzero().flatten()  # a NaN counts
    return kept if len(kept) < MOST_KEPT * len(low) else None
