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

from pyfused.backends import Backend, cross_entropy_once
from pyfused.layout import accumulate_dtype
from pyfused.ops.chunk_sizes import product_dtype
from pyfused.ops.metrics import MergedStatistics, RowStatistics
from pyfused.types import (
    CrossEntropyOptions,
    Gradients,
    Head,
    HeadOptions,
    Statistics,
    VocabShard,
    Want,
)


class Wanted(NamedTuple):
    """Which gradients are."""

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
    """All rows of some columns after all of others, in the same memory.

    Args:
        dtype: That of the products.
        size: Rows and columns of a chunk.
        backwards: The last rows come first.
        memory: What has the first chunk's outputs, and takes the others'.
        fixed_sizes: The bits of a row's outputs do not depend on the batch.
    """
    input, weight, bias = layer
    n, classes = len(input), len(weight)
    rows, columns = max(1, min(size[0], n)), max(1, min(size[1], classes))
    product, there = _linear_in_fixed_sizes if fixed_sizes else linear, memory is not None
    if memory is None:
        memory = backend.empty((rows * columns,), dtype, input)
    for first in range(0, classes, columns):
        of_chunk = slice(first, min(first + columns, classes))
        w = weight[of_chunk].to(dtype)
        b = None if bias is None else bias[of_chunk].to(dtype)
        starts = range(0, n, rows)
        for start in reversed(starts) if backwards else starts:
            here = slice(start, min(start + rows, n))
            x = input[here].to(dtype)
            output = memory[: len(x) * len(w)].view(len(x), len(w))
            if not there:
                product(x, w, b, output)
            there = False
            yield Chunk(output, x, w, here, of_chunk)


class LayerGradients:
    """The gradients of a layer, added up over chunks, of which rows come in order.

    Args:
        dtype: That of the products.
        size: Rows and columns of a chunk.
        wanted: Which gradients are; others than the layer's are not looked at.
    """

    def __init__(
        self,
        backend: Backend,
        layer: Layer,
        dtype: torch.dtype,
        size: tuple[int, int],
        wanted: Sequence[bool],
    ) -> None:
        self.backend, self.layer, self.sums = backend, layer, accumulate_dtype(dtype)
        self.input: Tensor | None = None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        input, weight, bias = layer
        all_rows, all_columns = len(input) <= size[0], 0 < len(weight) <= size[1]
        if wanted[0]:
            self.input = backend.empty(input.shape, dtype if all_columns else self.sums, input)
            self.input = self.input if all_columns else self.input.zero_()
        if wanted[1]:
            once = all_rows and weight.dtype is dtype
            own = weight.dtype if once or not all_columns else self.sums
            self.weight = backend.empty(weight.shape, own, input)
        if wanted[2] and bias is not None:
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
        """In the shapes and dtypes of the layer's tensors; best when no chunk is there any more."""

        def like(found: Tensor | None, tensor: Tensor | None) -> Tensor | None:
            if found is None or tensor is None:
                return None
            if found.dtype is not tensor.dtype:
                found = self.backend.empty(found.shape, tensor.dtype, found).copy_(found)
            return found.reshape(tensor.shape)

        return tuple(map(like, (self.input, self.weight, self.bias), tensors))


def counted_rows(target: Tensor, ignored: int, backend: Backend) -> Tensor | None:
    """The rows with a target that is not ignored, or None for all of them.

    Others are left out where nobody waits for that, unless none is left then.
    """
    if backend.ASYNCHRONOUS:
        return None
    counts = target != ignored
    rows = (counts.flatten(1).any(1) if counts.dim() > 1 else counts).nonzero().flatten()
    return rows if 0 < len(rows) < len(target) else None


def spread(values: Tensor, kept: Tensor | None, n: int, others: int = 0) -> Tensor:
    """Those of all n rows: zeros, or what is given, for those left out."""
    if kept is None:
        return values
    return values.new_full((n, *values.shape[1:]), others).index_copy_(0, kept, values)


def of_all_rows(found: Gradients, kept: Tensor | None, n: int) -> Gradients:
    """Of the gradients the input's is one of rows."""
    return (None if found[0] is None else spread(found[0], kept, n), *found[1:])


# ---- by rows -------------------------------------------------------------------------------------


def by_rows(
    backend: Backend,
    head: Head,
    options: HeadOptions,
    rows: int,
    want_loss: bool,
    wanted: Wanted,
    grad_output: Tensor | None,
    statistics: RowStatistics | None = None,
) -> tuple[Tensor | None, Gradients]:
    """Loss and gradients, each where wanted; the loss is a sum in float64, or one a row.

    Args:
        grad_output: The loss's gradient, of the loss's shape; None stands for ones.
        statistics: Where to write them, None where they are not wanted.
    """
    *_, target, weight = head
    dtype, each = product_dtype(head, backend), options.reduction == "none"
    options = replace(options, reduction="none" if each else "sum", denominator=None)
    grad_target = torch.empty_like(target) if wanted.target else None
    want = Want(want_loss, (wanted.logits(), wanted.target) if any(wanted) else (), True)
    shape = head.linear_weight.shape[:-1]
    layer, size = _layer(head), (rows, head.columns)
    gradients = LayerGradients(backend, layer, dtype, size, wanted)

    def add(chunk: Chunk) -> Tensor | None:
        logits, here = chunk.output, chunk.rows
        targets = target[here].to(dtype) if target.is_floating_point() else target[here]
        capped = _cap(backend, logits, options.softcap).view(-1, *shape)
        wants = want
        if statistics is not None:
            per_row = shape[1:].numel()
            part = statistics.at(slice(here.start * per_row, here.stop * per_row))
            wants = want._replace(statistics=part.before(backend, capped, targets, options))
        of_rows = grad_output[here] if grad_output is not None and each else grad_output
        loss, (_, of_target) = cross_entropy_once(
            backend, capped, targets, weight, _of_rows(options, here), wants, of_rows
        )
        if grad_target is not None:
            assert of_target is not None
            grad_target[here] = of_target
        if wanted.logits():
            gradient = _uncap(backend, capped.view_as(logits), logits, options.softcap)
            kept = _classes_that_count(gradient, of_rows, options.filter_eps)
            gradients.add(chunk, gradient, kept)
        return loss

    losses = [add(chunk) for chunk in chunks(backend, layer, dtype, size)]
    return joined(losses, each), (*gradients.like(head), grad_target)


def _layer(head: Head) -> Layer:
    """With one column for each class at each of the positions d1, ..., dk."""
    bias = None if head.linear_bias is None else head.linear_bias.flatten()
    return Layer(head.input, head.linear_weight.flatten(0, -2), bias)


def joined(losses: list[Tensor | None], each: bool) -> Tensor | None:
    """The losses of chunks of rows as one tensor, None where they are not wanted."""
    parts = [loss for loss in losses if loss is not None]
    if not parts:
        return None
    return torch.cat(parts) if each else torch.stack(parts).sum(dtype=torch.float64)


# ---- by blocks of classes ------------------------------------------------------------------------


def sums_by_blocks(
    backend: Backend,
    head: Head,
    options: HeadOptions,
    tile: int,
    shard: VocabShard,
    statistics: MergedStatistics | None = None,
) -> tuple[Tensor, Tensor]:
    """The log-sum-exp of each row, and the sum of its ``q_c x_c``; in float64.

    Args:
        shard: The head's classes among all.
        statistics: What merges other statistics of the blocks, None where they are not wanted.
    """
    input, target = head.input, head.target
    lse = input.new_full((len(input),), -torch.inf, dtype=torch.float64)
    target_logits = torch.zeros_like(lse)
    dtype, size = product_dtype(head, backend), (tile, tile)
    for chunk in chunks(backend, _layer(head), dtype, size):
        here, block = chunk.rows, shard._replace(first=shard.first + chunk.columns.start)
        logits = _cap(backend, chunk.output, options.softcap)
        every = RowStatistics.empty(len(logits), logits)
        of_block = Statistics(*every[1:]) if statistics else Statistics(every.log_sum_exp)
        part = sums_of_block(backend, logits, target[here], head.weight, options, block, of_block)
        if statistics:
            statistics.add(here, logits, target[here], block.first, of_block, options.scale)
        torch.logaddexp(lse[here], of_block.log_sum_exp, out=lse[here])
        target_logits[here] += part
    return lse, target_logits


def sums_of_block(
    backend: Backend,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: CrossEntropyOptions,
    shard: VocabShard,
    statistics: Statistics,
) -> Tensor:
    """Computes statistics of logits that are there, and returns the sum of ``q_c x_c`` of each row.

    The loss over some of the classes, with 0 for the log-sum-exp, is that sum times -1.
    """
    plain = CrossEntropyOptions(
        options.ignore_index, "none", options.label_smoothing, scale=options.scale
    )
    given = logits, target, weight, plain
    cross_entropy_once(backend, *given, Want(False, statistics=statistics), None, shard)
    shard = shard._replace(lse=torch.zeros_like(statistics.log_sum_exp))
    part, _ = cross_entropy_once(backend, *given, Want(), None, shard)
    assert part is not None
    return -part.flatten().double()


def loss_of_sums(
    options: CrossEntropyOptions,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    target_logits: Tensor,
) -> Tensor:
    """The loss of each row, in float64: sum_c q_c lse - sum_c q_c x_c + z_loss lse^2."""
    target_sum: Tensor | float = 1.0
    if weight is not None:
        smoothing, target_weight = options.label_smoothing, _target_weight(target, weight, options)
        target_sum = smoothing * weight.double().mean() + (1 - smoothing) * target_weight
    loss = target_sum * lse - target_logits
    if options.z_loss:
        loss = loss + options.z_loss * lse.square()
    if options.token_weight is not None:
        loss = loss * options.token_weight
    return loss.where(target != options.ignore_index, 0)


def gradients_by_blocks(
    backend: Backend,
    head: Head,
    options: HeadOptions,
    tile: int,
    wanted: Wanted,
    shard: VocabShard,
    grad_output: Tensor,
) -> Gradients:
    """Those of the sum of ``grad_output`` times the loss of each row.

    Args:
        shard: The head's classes among all, with the log-sum-exp of all.
    """
    assert shard.lse is not None
    want = Want(False, (True, False), True)
    options = replace(options, reduction="none", denominator=None)
    layer, dtype = _layer(head), product_dtype(head, backend)
    gradients = LayerGradients(backend, layer, dtype, (tile, tile), wanted)
    for chunk in chunks(backend, layer, dtype, (tile, tile)):
        logits, here = chunk.output, chunk.rows
        block = VocabShard(shard.first + chunk.columns.start, shard.classes, shard.lse[here])
        of_rows, capped = grad_output[here], _cap(backend, logits, options.softcap)
        given = head.target[here], head.weight, _of_rows(options, here), want, of_rows, block
        cross_entropy_once(backend, capped, *given)
        gradient = _uncap(backend, capped, logits, options.softcap)
        kept = _classes_that_count(gradient, of_rows, options.filter_eps)
        gradients.add(chunk, gradient, kept)
    return *gradients.like(head), None


def weight_of_targets(
    target: Tensor, weight: Tensor | None, options: CrossEntropyOptions
) -> Tensor:
    """The denominator of a mean: the weight of the targets that are not ignored, in float64."""
    counted = (target != options.ignore_index).double()
    if weight is not None:
        counted *= _target_weight(target, weight, options)
    if options.token_weight is not None:
        counted *= options.token_weight
    return counted.sum()


def _target_weight(target: Tensor, weight: Tensor, options: CrossEntropyOptions) -> Tensor:
    """The class weight of each target, in float64; any number for one that is ignored."""
    label = target.where(target != options.ignore_index, 0).clamp(0, len(weight) - 1)
    return weight.double()[label]


# ---- softcap -------------------------------------------------------------------------------------


def _cap(backend: Backend, logits: Tensor, softcap: float | None) -> Tensor:
    """The logits themselves where there is no softcap."""
    return (
        logits if softcap is None else backend.activation("softcap", logits, (softcap,))[0](logits)
    )


def _uncap(backend: Backend, gradient: Tensor, logits: Tensor, softcap: float | None) -> Tensor:
    """The gradient of the logits, given that of the capped ones."""
    if softcap is None:
        return gradient
    return backend.activation("softcap", logits, (softcap,))[1](gradient, logits)


# ---- products ------------------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


# The size of a product where it is not to depend on the batch. A library takes rows in groups of 4,
# 6, 8 or 16 and may add the features up in another order for the rows that remain.
FIXED_ROWS, FIXED_COLUMNS = 96, 2048
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


def _classes_that_count(
    gradient: Tensor, grad_output: Tensor | None, filter_eps: float
) -> Tensor | None:
    """The columns of a block of gradients where any is at least ``filter_eps * grad_output``.

    None stands for all: where nothing is to be left out, or too little.
    """
    if not filter_eps:
        return None
    least = filter_eps if grad_output is None else filter_eps * float(grad_output.abs().max())
    low, high = gradient.aminmax(dim=0)
    kept = (~((high < least) & (low > -least))).nonzero().flatten()  # a NaN counts
    return kept if len(kept) < MOST_KEPT * len(low) else None


def _of_rows(options: HeadOptions, here: slice) -> HeadOptions:
    if options.token_weight is None:
        return options
    return replace(options, token_weight=options.token_weight[here])
