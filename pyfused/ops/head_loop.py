"""The loop over blocks of a linear layer's logits.

    for rows, classes in blocks:
        logits = input[rows] @ weight[classes].T + bias[classes]
        grad_logits = step(logits, rows, classes)
        grad_input[rows] += grad_logits @ weight[classes]
        grad_weight[classes] += grad_logits.T @ input[rows]
        grad_bias[classes] += grad_logits.sum(0)

A loss gives the step. ``chunk_sizes.py`` chooses the sizes of the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfused.backends import Backend
from pyfused.dispatch.autograd import without_autocast
from pyfused.layout import accumulate_dtype
from pyfused.ops.chunk_sizes import CLASSES_GPU, TILE, BlockSize
from pyfused.torch_internals import graph_is_retained, saved_tensors_hooks
from pyfused.types import Gradients

# Computes the gradient of a block's logits, which may overwrite them, or returns None. It takes the
# logits, and the slices of their rows and classes.
Step = Callable[[Tensor, slice, slice], Tensor | None]


class Layer(NamedTuple):
    """The input (N, D), the weight (C, D), and the bias (C) or None of a linear layer."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None


@dataclass(eq=False)
class HeadLoop:
    """Runs the loop over the blocks of a layer's logits.

    Attributes:
        dtype: The dtype of the matrix products.
        size: Returns the size of a block, given the number of rows.
        needs: Whether the input, the weight and the bias need a gradient.
        pads: Whether to add classes of weight 0, if a block has all classes. On GPUs in half
            precision, products whose sizes are no multiples of 8 take several times as long.
    """

    backend: Backend
    dtype: torch.dtype
    size: Callable[[int], BlockSize]
    needs: Sequence[bool]

    def __post_init__(self) -> None:
        self.wide = accumulate_dtype(self.dtype)
        self.pads = self.backend.ASYNCHRONOUS and self.dtype.itemsize == 2

    def run(
        self,
        layer: Layer,
        step: Step,
        *,
        counts: Tensor | None = None,
        logits: Tensor | None = None,
        backwards: bool = False,
    ) -> Gradients:
        """Runs the loop, and returns the gradients of the layer if the steps return gradients.

        Blocks share their memory. All rows of the first classes come first.

        Args:
            counts: (N), whether each row counts; None if all rows do. For other rows, the gradient
                of the logits is 0, and the weight's gradient uses 0 for the features, which may be
                NaN.
            logits: The memory of the blocks, which holds the logits of the first one; None to
                allocate it. It is copied if another backward pass may read it.
            backwards: Whether the blocks of rows come in reverse order.
        """
        n, total, sums = layer.input.shape[0], layer.weight.shape[0], None
        rows_at_once, classes_at_once = self.size(n)
        rows_at_once = max(1, min(rows_at_once, n))
        classes_at_once = max(1, min(classes_at_once or total, total))
        padding = -total % CLASSES_GPU if self.pads and classes_at_once == total else 0
        memory, is_computed = logits, logits is not None
        if memory is not None and graph_is_retained():
            memory = memory.clone()
        if memory is None:
            size = rows_at_once * (classes_at_once + padding)
            memory = self.backend.empty((size,), self.dtype, layer.input)
        starts = range(0, n, rows_at_once)
        starts = starts[::-1] if backwards else starts
        with without_autocast(layer.input.device.type):
            for first in range(0, total, classes_at_once):
                classes = slice(first, min(first + classes_at_once, total))
                weight, bias = prepared(layer, classes, self.dtype, padding)
                for start in starts:
                    rows = slice(start, min(start + rows_at_once, n))
                    x = layer.input[rows].to(self.dtype)
                    logits = memory[: x.shape[0] * weight.shape[0]].view(
                        x.shape[0], weight.shape[0]
                    )
                    if not is_computed:
                        multiply(x, weight, bias, logits)
                    is_computed = False
                    gradient = step(logits[:, :total] if padding else logits, rows, classes)
                    if gradient is None:
                        continue
                    if padding:
                        gradient = pad_gradient(gradient, logits, total)
                    if sums is None:
                        sizes = rows_at_once, classes_at_once == total, padding
                        sums = Sums(self, layer, *sizes, counts)
                    sums.add(gradient, x, weight, rows, classes)
        logits = gradient = memory = None  # frees memory for the conversions
        return (None, None, None) if sums is None else sums.gradients()


class Sums:
    """The gradients of a layer, accumulated over blocks in float32, or in float64 for float64.

    A block of all classes has one sum for the weight, which is converted at the end. Otherwise each
    block of classes has its own sum, which is converted after its last rows.

    Attributes:
        input, weight, bias: The gradients, None for those that are not needed.
        part: The sum of the weight's gradient for the classes of the current block.
    """

    def __init__(
        self,
        loop: HeadLoop,
        layer: Layer,
        rows_at_once: int,
        has_all_classes: bool,
        padding: int,
        counts: Tensor | None,
    ) -> None:
        (input, weight, bias), needs, empty = layer, loop.needs, loop.backend.empty
        self.layer, self.loop, self.counts = layer, loop, counts
        n, columns = input.shape[0], weight.shape[0] + padding
        self.part: Any = None
        self.input: Any
        self.input = self.weight = self.bias = None
        if needs[0]:
            self.input = empty(input.shape, loop.dtype if has_all_classes else loop.wide, input)
        if needs[1]:
            dtype = loop.wide if has_all_classes and n > rows_at_once else weight.dtype
            self.weight = empty((columns, weight.shape[1]), dtype, input)
        if needs[2] and bias is not None:
            self.bias = bias.new_zeros(columns, dtype=loop.wide)

    def add(self, gradient: Tensor, x: Tensor, weight: Tensor, rows: slice, classes: slice) -> None:
        """Adds the products of a block.

        Args:
            gradient: The gradient of the block's logits.
            x: The features of the rows, in the dtype of the products.
            weight: The weight of the classes, as `prepared` returns it.
        """
        loop = self.loop
        columns = slice(classes.start, classes.start + weight.shape[0])
        if self.bias is not None:
            self.bias[columns] += gradient.sum(0, dtype=loop.wide)
        if self.input is not None:
            out, beta = self.input[rows], float(classes.start > 0)
            if weight.dtype is loop.dtype:
                loop.backend.add_product(out, gradient, weight, beta)
            else:
                for part in parts_to_convert(weight):
                    factor = weight[part].to(loop.dtype)
                    loop.backend.add_product(out, gradient[:, part], factor, beta)
                    beta = 1.0
        if self.weight is None:
            return
        if self.counts is not None:
            x = x.where(self.counts[rows].unsqueeze(-1), 0)
        out = self.weight[columns]
        is_first, is_last = rows.start == 0, rows.stop == self.layer.input.shape[0]
        if is_first:
            in_place = out.dtype is loop.wide or is_last
            self.part = out if in_place else loop.backend.empty(out.shape, loop.wide, x)
        loop.backend.add_product(self.part, gradient.t(), x, float(not is_first))
        if is_last and self.part.dtype is not out.dtype:
            out.copy_(self.part)

    def gradients(self) -> Gradients:
        """Returns the gradients in the dtypes of the input, the weight and the bias."""
        self.part = None
        if self.counts is not None and self.input is not None:  # the weight may have a NaN
            self.input.masked_fill_(~self.counts.unsqueeze(-1), 0)
        for name, like in zip(Layer._fields, self.layer, strict=True):
            gradient = getattr(self, name)
            if gradient is None or like is None:
                continue
            if gradient.shape[0] > like.shape[0]:  # padding
                gradient = gradient[: like.shape[0]]
            if gradient.dtype is not like.dtype:
                converted = self.loop.backend.empty(gradient.shape, like.dtype, gradient)
                gradient = converted.copy_(gradient)
            setattr(self, name, gradient)
        return self.input, self.weight, self.bias


# ---- products ------------------------------------------------------------------------------------


def prepared(
    layer: Layer, classes: slice, dtype: torch.dtype, padding: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Returns the weight and the bias of some classes in the dtype of the products.

    The weight keeps its dtype if the products convert it in parts.

    Args:
        padding: The number of classes of weight 0 to add.
    """
    weight, bias = layer.weight[classes], layer.bias
    if not (weight.shape[0] > TILE and weight.dtype.itemsize < dtype.itemsize):
        weight = weight.to(dtype)
    bias = None if bias is None else bias[classes].to(dtype)
    if padding:
        weight = torch.constant_pad_nd(weight, (0, 0, 0, padding))
        bias = None if bias is None else torch.constant_pad_nd(bias, (0, padding))
    return weight, bias


def parts_to_convert(weight: Tensor) -> Sequence[slice]:
    """Returns the parts of the classes in which a product converts a weight to its dtype.

    A weight of half precision that has to be converted to float32 is converted in small parts,
    because a copy of all classes would take more memory than the logits of a few rows.
    """
    return [slice(first, first + TILE) for first in range(0, weight.shape[0], TILE)]


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Writes ``x @ weight.T + bias`` to ``out``."""
    if weight.dtype is not x.dtype:
        for part in parts_to_convert(weight):
            part_bias = None if bias is None else bias[part]
            multiply(x, weight[part].to(x.dtype), part_bias, out[:, part])
    elif bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def hooks_are_active() -> bool:
    """Returns whether hooks for saved tensors are active: what they return is not overwritten."""
    return saved_tensors_hooks(True) is not None


def memory_of(logits: Tensor) -> Tensor:
    """Returns the memory of a block of all classes, with its padding, for `HeadLoop.run`."""
    return logits.as_strided((logits.shape[0] * logits.stride(0),), (1,))


def pad_gradient(gradient: Tensor, logits: Tensor, classes: int) -> Tensor:
    """Returns the gradient of logits with padding, which it overwrites; it is 0 in the padding."""
    if gradient.data_ptr() != logits.data_ptr():
        logits[:, :classes] = gradient
    logits[:, classes:] = 0
    return logits


# ---- rows that count -----------------------------------------------------------------------------


class Rows(NamedTuple):
    """The rows of a call that are computed.

    Attributes:
        indices: The indices of these rows, None for all rows.
        counts: Whether each of these rows counts; None if all do.
        total: The number of all rows, if there are indices.
    """

    indices: Tensor | None = None
    counts: Tensor | None = None
    total: int = 0

    def take(self, values: Any, dim: int = 0) -> Any:
        """Selects the computed rows from values of all rows; None remains None."""
        if values is None or self.indices is None:
            return values
        return values.index_select(dim, self.indices)

    def spread(self, values: Any, dim: int = 0) -> Any:
        """Scatters values of the computed rows to a tensor of all rows, filled with 0."""
        if values is None or self.indices is None:
            return values
        shape = list(values.shape)
        shape[dim] = self.total
        return values.new_zeros(shape).index_copy_(dim, self.indices, values)


ALL_ROWS = Rows()


def rows_that_count(valid: Tensor, backend: Backend) -> Rows:
    """Returns the rows to compute: those that count, or one row if none does.

    All rows are computed if reading the mask would synchronise.

    Args:
        valid: (N), whether each row counts.
    """
    if backend.ASYNCHRONOUS:
        return Rows(None, valid)
    (indices,), total = valid.nonzero(as_tuple=True), valid.shape[0]
    if indices.shape[0] == total:
        return ALL_ROWS
    if indices.shape[0] == 0:
        return Rows(indices.new_zeros(1), valid[:1], total)
    return Rows(indices, None, total)
