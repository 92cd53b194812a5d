"""Tensors as the kernels of every backend see them: strides that fit, or one copy that does."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor

Strides = tuple[int, int, int]  # of the outer index of a row, the inner index, and the class


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns what the kernels compute in for tensors of a dtype."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def contiguous_in(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.to(dtype).contiguous() for tensor in tensors]


def converts_in(dtype: torch.dtype, *tensors: Tensor | None) -> bool:
    """Returns whether ``contiguous_in`` makes another tensor of one of them."""
    return any(x is not None and not (x.dtype is dtype and x.is_contiguous()) for x in tensors)


def layouts(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Returns what a kernel is prepared for, which hooks for saved tensors may change."""
    return tuple([x if x is None else (x.dtype, x.shape, x.stride()) for x in tensors])


def broadcast_numel(operands: Sequence[Any]) -> int:
    """Returns how many elements the tensors among operands broadcast to; not nested ones."""
    if len(operands) == 1:
        return int(operands[0].numel())
    shapes = [x.shape for x in operands if isinstance(x, Tensor) and not x.is_nested]
    if shapes and shapes.count(shapes[0]) == len(shapes):
        return shapes[0].numel()
    return math.prod(map(max, zip_longest(*map(reversed, shapes), fillvalue=1)))


def row_sizes(input: Tensor) -> tuple[int, int, int]:
    """Returns the sizes of (N, C, d1, ..., dk): outer and inner rows, and classes."""
    if input.dim() == 2:
        return 1, *input.shape
    classes = input.shape[0 if input.dim() == 1 else 1]
    outer = 1 if input.shape[2:].numel() == 1 else input.shape[0]
    return outer, input.numel() // (outer * classes), classes


def feature_rows(tensor: Tensor) -> Tensor:
    """Returns (..., D) as rows of contiguous features, copied where they are not."""
    if tensor.dim() != 2:
        tensor = tensor.reshape(-1, tensor.shape[-1])
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def loss_shape(input: Tensor, reduction: str) -> tuple[int, ...]:
    """Returns the shape of the loss of logits (N, C, d1, ..., dk)."""
    if reduction != "none":
        return ()
    return input.shape[:-1] if input.dim() < 3 else input.shape[:1] + input.shape[2:]


def of_leading(found: Tensor, leading: Sequence[int]) -> Tensor:
    """Returns results of rows in the leading dimensions of the input; a scalar stays one."""
    rows = len(leading) == 1 or not found.dim()
    return found if rows else found.reshape((*leading, *found.shape[1:]))


def logit_at(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns, for one class of each row, its index for gather, its logit, and if it is in range.

    The index and the logit of a class out of range are those of another class.
    """
    dim = min(logits.dim() - 1, 1)
    index, classes = index.long().reshape(loss_shape(logits, "none")), logits.shape[dim]
    at = index.clamp(0, classes - 1).unsqueeze(dim)
    return at, logits.gather(dim, at).squeeze(dim), (index >= 0) & (index < classes)


def strides_of(tensor: Tensor) -> Strides | None:
    """Strides of (N, C, d1, ..., dk), None if no single stride leads along d1, ..., dk."""
    stride = tensor.stride()
    if len(stride) == 1:
        return 0, 0, stride[0]
    if len(stride) == 2 or tensor.shape[2:].numel() == 1:
        return 0, stride[0], stride[1]
    inner, size = 0, 1
    for length, step in zip(reversed(tensor.shape[2:]), reversed(stride[2:]), strict=True):
        if length == 1:
            continue
        if size == 1:
            inner = step
        elif step != inner * size:
            return None
        size *= length
    return stride[0], inner, stride[1]


def along(tensor: Tensor, dim: int) -> tuple[Tensor, tuple[int, int, int], Strides]:
    """Returns the tensor, copied if its strides do not fit, its sizes and its strides.

    The classes are along one dimension; the dimensions before and after it are the outer and the
    inner index of a row.
    """
    shape, length = tensor.shape, tensor.shape[dim]
    outer, inner = math.prod(shape[:dim]), math.prod(shape[dim + 1 :])
    if tensor.is_contiguous():  # as most are: a view takes longer than a small kernel
        strides: tuple[int, ...] = length * inner, inner, 1
    else:
        tensor = tensor.reshape(outer, length, inner)
        strides = tensor.stride()
    if inner == 1:
        return tensor, (1, outer, length), (0, strides[0], strides[1])
    return tensor, (outer, inner, length), (strides[0], strides[2], strides[1])


def viewed(tensor: Tensor) -> tuple[Tensor, Strides]:
    """Returns the tensor, copied once if its strides do not fit, and its strides."""
    strides = strides_of(tensor)
    if strides is None:
        tensor = tensor.contiguous()
        strides = strides_of(tensor)
        assert strides is not None
    return tensor, strides


def empty_viewed(
    like: Tensor, empty_like: Callable[..., Tensor] = torch.empty_like
) -> tuple[Tensor, Strides]:
    """Returns a new tensor laid out as ``like`` where that fits, and its strides."""
    empty = empty_like(like)
    strides = strides_of(empty)
    if strides is None:
        return viewed(empty_like(like, memory_format=torch.contiguous_format))
    return empty, strides


class ClassLayout(NamedTuple):
    """How kernels read tensors (N, C, d1, ..., dk) of one layout, and the layout of gradients.

    Attributes:
        copies: They read a contiguous copy, as no strides describe the tensor.
        strides: Of the tensor or the copy.
        grad: A gradient without memory.
        grad_strides: Of the gradient.
    """

    copies: bool
    strides: Strides
    grad: Tensor
    grad_strides: Strides


def class_layout(tensor: Tensor, inplace: bool = False) -> ClassLayout:
    """Returns the layout of a tensor and of its gradient, which may take the tensor's memory."""
    view, strides = viewed(tensor)
    grad, grad_strides = empty_viewed(view, partial(torch.empty_like, device="meta"))
    return ClassLayout(view is not tensor, strides, grad, strides if inplace else grad_strides)


class SoftmaxLayout(NamedTuple):
    """How kernels read inputs of one layout along a dimension, and the layout of the output.

    Attributes:
        copies: They read a contiguous copy.
        output: An output without memory, contiguous.
    """

    copies: bool
    sizes: tuple[int, int, int]
    strides: Strides
    output: Tensor
    output_strides: Strides


def softmax_layout(input: Tensor, dim: int) -> SoftmaxLayout:
    view, sizes, strides = along(input, dim)
    output = torch.empty(input.shape, dtype=input.dtype, device="meta")
    copies = view.data_ptr() != input.data_ptr()
    return SoftmaxLayout(copies, sizes, strides, output, along(output, dim)[2])


def dense_operand(operands: tuple[Tensor, ...]) -> tuple[Tensor, int | None]:
    """Returns the first dense operand and its index, or else a copy of the first and None.

    Operands are read, and outputs are written, in its order in memory.
    """
    for i, operand in enumerate(operands):
        if is_dense(operand):
            return operand, i
    return operands[0].contiguous(), None


def doubled(shape: Sequence[int], dim: int) -> list[int]:
    """Returns a shape with twice the size along a dimension."""
    return [*shape[:dim], 2 * shape[dim], *shape[dim + 1 :]]


def is_dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or torch.empty_like(tensor).stride() == tensor.stride()


def dense(tensor: Tensor) -> Tensor:
    return tensor if is_dense(tensor) else tensor.contiguous()


def in_rows(
    order: Tensor, tensors: Sequence[Tensor | None]
) -> tuple[list[int], int | None, tuple[int, ...] | None]:
    """Returns how a kernel reads tensors in the order in memory of ``order``, which is dense.

    Returns:
        The tensors to copy first, where rows x columns do not describe them; the number of columns
        and two strides a tensor, of its rows and its columns, or None and None if all are dense.
    """
    stride = order.stride()
    if all(tensor is None or tensor.stride() == stride for tensor in tensors):
        return [], None, None
    groups: list[tuple[int, list[int]]] = []  # a size, and a stride for each tensor
    for dim in sorted(range(order.dim()), key=order.stride, reverse=True):
        size, strides = order.shape[dim], [(order if x is None else x).stride(dim) for x in tensors]
        if size == 1:
            continue
        if groups and groups[-1][1] == [step * size for step in strides]:
            size *= groups.pop()[0]
        groups.append((size, strides))
    if not groups or (len(groups) == 1 and set(groups[0][1]) == {1}):
        return [], None, None
    if len(groups) > 2:
        pairs = enumerate(tensors)
        return [i for i, x in pairs if x is not None and x.stride() != stride], None, None
    (columns, of_columns), (_, of_rows) = groups[-1], groups[0]
    both = zip(of_rows, of_columns, strict=True)
    return [], columns, tuple([step for pair in both for step in pair])
