"""Cross-entropy of a linear layer's logits that never exist as a whole: the loops.

How many rows or classes a chunk has is decided in `chunk_sizes.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pyfused.backends import Backend, backend_of, cross_entropy_once
from pyfused.layout import accumulate_dtype
from pyfused.ops.chunk_sizes import FIXED_ROWS, chunk_of_states, product_dtype
from pyfused.ops.row_state import as_rows, state_of_logits, state_of_metrics
from pyfused.types import (
    STATE_FIELDS,
    ClassRange,
    Gradients,
    Head,
    HeadOptions,
    Outputs,
    RowOptions,
)


class GradientsNeeded(NamedTuple):
    """Which tensors of a linear layer with a loss need a gradient."""

    input: bool = False
    linear_weight: bool = False
    linear_bias: bool = False
    target: bool = False

    def logits(self) -> bool:
        return self.input or self.linear_weight or self.linear_bias


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
            own = weight.dtype if once or not all_columns else self.sums
            self.weight = backend.empty(weight.shape, own, input)
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

    def like(self, tensors: Sequence[Tensor | None]) -> Gradients:
        """Returns the sums in the shapes and dtypes of the layer's tensors, after all chunks."""

        def like(found: Tensor | None, tensor: Tensor | None) -> Tensor | None:
            if found is None or tensor is None:
                return None
            if found.dtype is not tensor.dtype:
                found = self.backend.empty(found.shape, tensor.dtype, found).copy_(found)
            return found.reshape(tensor.shape)

        return tuple(map(like, (self.input, self.weight, self.bias), tensors))


def counted_rows(target: Tensor, ignored: int, backend: Backend) -> Tensor | None:
    """Returns the rows with a target that is not ignored, or None for all of them.

    Others are left out where nobody waits for that, unless none is left then.
    """
    if backend.ASYNCHRONOUS:
        return None
    counts = target != ignored
    rows = (counts.flatten(1).any(1) if counts.dim() > 1 else counts).nonzero().flatten()
    return rows if 0 < len(rows) < len(target) else None


def spread(values: Tensor, kept: Tensor | None, n: int, others: int = 0) -> Tensor:
    """Returns the values of all n rows: zeros, or ``others``, for those left out."""
    if kept is None:
        return values
    return values.new_full((n, *values.shape[1:]), others).index_copy_(0, kept, values)


def of_all_rows(found: Gradients, kept: Tensor | None, n: int) -> Gradients:
    """Returns the gradients with that of the input spread over all rows."""
    return (None if found[0] is None else spread(found[0], kept, n), *found[1:])


# ---- by rows -------------------------------------------------------------------------------------


def by_rows(
    backend: Backend,
    head: Head,
    options: HeadOptions,
    rows: int,
    want_loss: bool,
    needed: GradientsNeeded,
    grad_output: Tensor | None,
) -> tuple[Tensor | None, Gradients, Tensor | None]:
    """Returns loss and gradients, where needed, and with metrics the state of the rows.

    The loss is a sum in float64, or one for each row.

    Args:
        grad_output: The loss's gradient, of the loss's shape; None stands for ones.
    """
    *_, target, weight = head
    dtype, each = product_dtype(head, backend), options.reduction == "none"
    options = replace(options, reduction="none" if each else "sum", denominator=None)
    grad_target = torch.empty_like(target) if needed.target else None
    outputs = Outputs(want_loss, (needed.logits(), needed.target) if any(needed) else (), True)
    shape = head.linear_weight.shape[:-1]
    layer, size = _layer(head), (rows, head.columns)
    gradients = LayerGradients(backend, layer, dtype, size, needed)
    states = []

    def add(chunk: Chunk) -> Tensor | None:
        logits, here = chunk.output, chunk.rows
        targets = target[here].to(dtype) if target.is_floating_point() else target[here]
        capped = cap(backend, logits, options.softcap).view(-1, *shape)
        if options.with_metrics:
            states.append(state_of_metrics(backend, capped, targets, options))
        of_rows = grad_output[here] if grad_output is not None and each else grad_output
        loss, (_, of_target) = cross_entropy_once(
            backend, capped, targets, weight, _of_rows(options, here), outputs, of_rows
        )
        if grad_target is not None:
            assert of_target is not None
            grad_target[here] = of_target
        if needed.logits():
            gradient = uncap(backend, capped.view_as(logits), logits, options.softcap)
            least = None
            if options.filter_eps:
                least = gradient.new_ones(()) if of_rows is None else of_rows
                least = options.filter_eps * least.abs()
            gradients.add(chunk, gradient, classes_that_count(gradient, least))
        return loss

    losses = [add(chunk) for chunk in chunks(backend, layer, dtype, size)]
    state = torch.cat(states, 1) if states else None
    return joined(losses, each), (*gradients.like(head), grad_target), state


def _layer(head: Head) -> Layer:
    """Returns the layer with one output for each class at each of the positions d1, ..., dk."""
    bias = None if head.linear_bias is None else head.linear_bias.flatten()
    return Layer(head.input, head.linear_weight.flatten(0, -2), bias)


def joined(losses: list[Tensor | None], each: bool) -> Tensor | None:
    """Returns the losses of chunks of rows as one tensor, None where they are not wanted."""
    parts = [loss for loss in losses if loss is not None]
    if not parts:
        return None
    return torch.cat(parts) if each else torch.stack(parts).sum(dtype=torch.float64)


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
    tensors: Sequence[Any],
    options: StateOptions,
    weight: Tensor | None = None,
    keeps: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Returns the state of each target, of shape (fields, *target.shape).

    Returns also, if it ``keeps`` them, the logits of the first rows for the backward pass, where
    they have all classes.

    Args:
        tensors: Logits, or input, weight and bias of a layer; and the target last.
        weight: One factor for each of all classes, in the accumulation dtype, or None.
    """
    target, rows, fields = tensors[-1], options.rows, options.fields
    backend = backend_of(target)
    if len(tensors) == 2:
        given = *tensors, rows, options.classes, fields, weight
        return state_of_logits(backend, *given).view(fields, *target.shape), None
    counted, output = _counted_part(tensors, options, backend), None
    layer, labels, kept, *_ = counted
    state = labels.new_empty((fields, len(labels)), dtype=torch.float64)
    for chunk in counted.chunks(options, backend, backwards=True):
        logits, here, classes = counted.of_chunk(chunk, options)
        given = logits, labels[here], rows, state[:, here], classes, weight
        backend.row_state(*given, continues=chunk.columns.start > 0)
        output = chunk.output
    if kept is not None:
        n, of_rows = tensors[0].shape[:-1].numel(), state.view(fields, len(kept), -1)
        state = state.new_zeros((fields, n, of_rows.shape[2])).index_copy_(1, kept, of_rows)
    state = state.view(fields, *target.shape)
    if output is None or not keeps or output.shape[1] < len(layer.weight):
        return state, None
    return state, output.view(-1)


def gradients_of(
    tensors: Sequence[Any],
    options: StateOptions,
    needed: GradientsNeeded,
    state: Tensor,
    grad_results: Tensor,
    kept: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    least: Tensor | None = None,
) -> Gradients:
    """Returns the gradients of all tensors but the target.

    Args:
        tensors, options, weight: As in ``state_of``.
        state: Of all classes.
        grad_results: The gradients of the first of log-probability, entropy, log-sum-exp and the
            weighted sum of the logits, of shape (1, 3 or 4, *target.shape), in float64.
        kept: The logits that ``state_of`` has kept, whose memory is overwritten.
        least: The least gradient of a logit of each row that counts in products; None if all do.
    """
    if len(tensors) == 2:
        given = *tensors, options, state, grad_results, weight
        return (gradient_of_logits(backend_of(state), *given),)
    input, linear_weight, *_ = tensors
    backend, n = backend_of(input), input.shape[:-1].numel()
    counted = _counted_part(tensors, options, backend)
    layer, labels, rows, size, dtype, _ = counted
    pair = [x.reshape(len(x), n, -1) for x in (state, grad_results)]
    state, grad_results = (_flat(x if rows is None else x[:, rows]) for x in pair)
    least = least if least is None or rows is None else least[rows]
    sums = LayerGradients(backend, layer, dtype, size, needed)

    def add(chunk: Chunk) -> None:
        logits, here, classes = counted.of_chunk(chunk, options)
        given = logits, labels[here], options.rows, state[:, here], grad_results[:, here]
        backend.row_gradients(*given, classes, logits, weight)
        bound = None if least is None else least[chunk.rows]
        sums.add(chunk, chunk.output, classes_that_count(chunk.output, bound))

    for _ in map(add, counted.chunks(options, backend, memory=kept)):
        pass  # and holds no chunk when it is through
    of_input, of_weight, of_bias = sums.like(layer)
    shape = *linear_weight.shape[1:-1], len(linear_weight)
    return (
        None if of_input is None else spread(of_input, rows, n).view(input.shape),
        None if of_weight is None else of_weight.view(*shape, -1).movedim(-2, 0),
        None if of_bias is None else of_bias.view(shape).movedim(-1, 0),
    )


def gradient_of_logits(
    backend: Backend,
    logits: Tensor,
    target: Tensor,
    options: StateOptions,
    state: Tensor,
    grad_results: Tensor,
    weight: Tensor | None = None,
) -> Tensor:
    """Returns the gradient of logits (C), (N, C) or (N, C, d1, ..., dk); see `gradients_of`."""
    rows = as_rows(logits)
    copied = rows.data_ptr() != logits.data_ptr()
    out = rows if copied else backend.empty(rows.shape, rows.dtype, rows)
    given = rows, target.flatten().contiguous(), options.rows, _flat(state), _flat(grad_results)
    backend.row_gradients(*given, options.classes, out, weight)
    if logits.dim() == 2:
        return out
    dim = min(logits.dim() - 1, 1)
    return out.view(logits.movedim(dim, -1).shape).movedim(-1, dim)


def _flat(values: Tensor) -> Tensor:
    """Returns results of rows, with any dimensions, as the kernels take them."""
    if values.dim() == 2 and values.is_contiguous():
        return values
    return values.reshape(values.shape[0], -1).contiguous()


class _CountedPart(NamedTuple):
    """The rows of a call that are not ignored.

    Attributes:
        layer: The classes at one of the positions d1, ..., dk are neighbours.
        labels: The targets, flat.
        rows: The indices of the rows in the whole layer, None for all.
        size: Rows and columns of a chunk.
        dtype: The dtype of the products.
        positions: The number of targets of a row, d1 * ... * dk.
    """

    layer: Layer
    labels: Tensor
    rows: Tensor | None
    size: tuple[int, int]
    dtype: torch.dtype
    positions: int

    def chunks(self, options: StateOptions, backend: Backend, **others: Any) -> Iterator[Chunk]:
        given = backend, self.layer, self.dtype, self.size
        return chunks(*given, fixed_sizes=options.fixed_sizes, **others)

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
    if rows is not None:
        input, target = input[rows], target[rows]
    head = Head(input, weight, bias, target, None)
    bias = None if bias is None else bias.detach().movedim(0, -1).flatten()
    layer = Layer(input, weight.movedim(0, -2).reshape(head.columns, -1), bias)
    size = options.size or chunk_of_states(
        head, options.memory_budget, options.fixed_sizes, backend
    )
    labels, positions = target.flatten().contiguous(), weight.shape[1:-1].numel()
    return _CountedPart(layer, labels, rows, size, product_dtype(head, backend), positions)


# ---- softcap -------------------------------------------------------------------------------------


def cap(backend: Backend, logits: Tensor, softcap: float | None) -> Tensor:
    """Returns softcap * tanh(logits / softcap), or the logits where there is no softcap."""
    if softcap is None:
        return logits
    capped: Tensor = backend.activation("softcap", logits, (softcap,))[0](logits)
    return capped


def uncap(backend: Backend, gradient: Tensor, logits: Tensor, softcap: float | None) -> Tensor:
    """Returns the gradient of the logits, given that of the capped ones."""
    if softcap is None:
        return gradient
    uncapped: Tensor = backend.activation("softcap", logits, (softcap,))[1](gradient, logits)
    return uncapped


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


def _of_rows(options: HeadOptions, here: slice) -> HeadOptions:
    if options.token_weight is None:
        return options
    return replace(options, token_weight=options.token_weight[here])
