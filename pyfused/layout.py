"""Shapes, strides and layouts of the tensors that kernels read and write."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

Strides = tuple[int, int, int]  # the strides of outer rows, of inner rows and of classes


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which kernels accumulate for tensors of a dtype."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def common_dtype(*tensors: Any) -> torch.dtype:
    """Returns the dtype to which torch promotes tensors; other arguments are ignored."""
    return reduce(torch.promote_types, [x.dtype for x in tensors if isinstance(x, Tensor)])


def contiguous_in(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.to(dtype).contiguous() for tensor in tensors]


def broadcast_with(shape: Sequence[Any], other: Sequence[Any], expands: bool = False) -> bool:
    """Returns whether a shape broadcasts with another one, or expands to it."""
    pairs = zip(reversed(other), reversed(shape), strict=False)
    # Dynamo evaluates `b in (a, 1)` as False if only one of the sizes is symbolic.
    fits = all(b is a or b == a or b == 1 or (a == 1 and not expands) for a, b in pairs)
    return fits and not (expands and len(shape) > len(other))


def broadcast_numel(operands: Sequence[Any]) -> int:
    """Returns the number of elements of the operands' broadcast shape, ignoring nested tensors."""
    if len(operands) == 1:
        return int(operands[0].numel())
    shapes = [x.shape for x in operands if isinstance(x, Tensor) and not x.is_nested]
    if shapes and shapes.count(shapes[0]) == len(shapes):
        return shapes[0].numel()
    return math.prod(map(max, zip_longest(*map(reversed, shapes), fillvalue=1)))


def row_sizes(input: Tensor) -> tuple[int, int, int]:
    """Returns the sizes of (N, C, d1, ..., dk): outer rows, inner rows and classes."""
    if input.dim() == 2:
        return 1, *input.shape
    if input.dim() == 1:
        return 1, 1, input.shape[0]
    outer, classes, *others = input.shape
    inner = math.prod(others)
    return (1, outer, classes) if inner == 1 else (outer, inner, classes)


def feature_rows(tensor: Tensor) -> Tensor:
    """Returns (..., D) as a matrix with contiguous features, copied if necessary."""
    if tensor.dim() != 2:
        tensor = tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def loss_shape(input: Tensor, reduction: str) -> tuple[int, ...]:
    """Returns the shape of the loss of logits (N, C, d1, ..., dk)."""
    if reduction != "none":
        return ()
    return input.shape[:-1] if input.dim() < 3 else input.shape[:1] + input.shape[2:]


def class_targets(target: Tensor, shape: Sequence[int]) -> Tensor:
    """Returns class indices as int64, in the shape of the losses; probabilities are unchanged.

    Checks accept uint8, and the shape (1,) instead of ().
    """
    if target.dtype is torch.int64 and target.shape == shape:
        return target
    return target if target.is_floating_point() else target.long().reshape(tuple(shape))


def with_leading_dims(results: Tensor, leading: Sequence[int]) -> Tensor:
    """Reshapes the results of rows to the input's leading dimensions; scalars are unchanged."""
    if len(leading) == 1 or not results.dim():
        return results
    return results.reshape((*leading, *results.shape[1:]))


def logit_at(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gather index and logit of one class per row, and whether it is in range.

    If the class is out of range, index and logit belong to an arbitrary class.
    """
    dim = min(logits.dim() - 1, 1)
    index, classes = class_targets(index, loss_shape(logits, "none")), logits.shape[dim]
    clamped = index.clamp(0, classes - 1).unsqueeze(dim)
    return clamped, logits.gather(dim, clamped).squeeze(dim), (index >= 0) & (index < classes)


def strides_of(tensor: Tensor) -> Strides | None:
    """Returns the strides of (N, C, d1, ..., dk); None if d1, ..., dk have no common stride."""
    stride = tensor.stride()
    if len(stride) == 1:
        return 0, 0, stride[0]
    if len(stride) == 2 or math.prod(tensor.shape[2:]) == 1:
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
    """Returns the tensor, or a copy if kernels cannot use its strides, and its sizes and strides.

    The classes are along ``dim``; the dimensions before it are outer rows, and the dimensions after
    it are inner rows.
    """
    shape, length = tensor.shape, tensor.shape[dim]
    outer, inner = math.prod(shape[:dim]), math.prod(shape[dim + 1 :])
    if tensor.is_contiguous():  # the common case; making a view takes longer than a small kernel
        strides: tuple[int, ...] = length * inner, inner, 1
    else:
        tensor = tensor.reshape(outer, length, inner)
        strides = tensor.stride()
    if inner == 1:
        return tensor, (1, outer, length), (0, strides[0], strides[1])
    return tensor, (outer, inner, length), (strides[0], strides[2], strides[1])


def class_layout(tensor: Tensor) -> tuple[Tensor, Strides, torch.memory_format, Strides]:
    """Returns how kernels read a tensor (N, C, d1, ..., dk) and write its gradient.

    Returns:
        The tensor, or a contiguous copy if kernels cannot use its strides; its strides; the memory
        format of the gradient, for ``torch.empty_like``; and the strides of the gradient.
    """
    strides: Any = strides_of(tensor)
    if strides is None:
        tensor = tensor.contiguous()
        strides = strides_of(tensor)
    if tensor.is_contiguous():
        return tensor, strides, torch.preserve_format, strides
    grad, memory_format = torch.empty_like(tensor, device="meta"), torch.preserve_format
    grad_strides: Any = strides_of(grad)
    if grad_strides is None:
        grad_strides, memory_format = strides_of(grad.contiguous()), torch.contiguous_format
    return tensor, strides, memory_format, grad_strides


def dense_operand(operands: Sequence[Tensor]) -> Tensor:
    """Returns the first dense operand, or a copy of the first operand.

    Kernels read operands and write outputs in the memory order of this tensor.
    """
    for operand in operands:
        if is_dense(operand):
            return operand
    return operands[0].clone()  # in its memory order


def is_dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or torch.empty_like(tensor).stride() == tensor.stride()


def have_one_order(tensors: Sequence[Tensor]) -> bool:
    """Returns whether torch writes the elementwise results of tensors in the order of the first.

    They are contiguous, and may broadcast; or they have one shape, and the same order of strides.
    """
    if all([x.is_contiguous() for x in tensors]):  # noqa: C419 a generator is slower
        return True
    orders = {_memory_order(x) for x in tensors}
    return len(orders) == 1 and None not in orders and len({x.shape for x in tensors}) == 1


def _memory_order(tensor: Tensor) -> tuple[int, ...] | None:
    """Returns the dimensions in the order of their strides, None if two strides are equal or 0."""
    pairs = zip(tensor.stride(), tensor.shape, strict=True)
    steps = {stride: dim for dim, (stride, size) in enumerate(pairs) if size > 1}
    if 0 in steps or len(steps) < sum(size > 1 for size in tensor.shape):
        return None
    return tuple([steps[stride] for stride in sorted(steps)])


def in_rows(
    order: Tensor, tensors: Sequence[Any]
) -> tuple[Sequence[Any], int | None, tuple[int, ...] | None]:
    """Describes tensors as rows x columns in the memory order of ``order``, which is dense.

    Returns:
        The tensors, or copies of those that have no such strides; the number of columns; and two
        strides for each tensor, of rows and of columns. The last two are None if all tensors are
        dense.
    """
    if order.is_contiguous():
        steps = [int(x is None or x.is_contiguous()) for x in tensors]
        if all(steps):
            return tensors, None, None
        if all(step or not any(x.stride()) for x, step in zip(tensors, steps, strict=True)):
            return tensors, order.numel(), tuple([step for step in steps for _ in range(2)])
    stride = order.stride()
    if all(tensor is None or tensor.stride() == stride for tensor in tensors):
        return tensors, None, None
    groups: list[tuple[int, list[int]]] = []  # (size, stride of each tensor)
    for dim in sorted(range(order.dim()), key=order.stride, reverse=True):
        size, strides = order.shape[dim], [(order if x is None else x).stride(dim) for x in tensors]
        if size == 1:
            continue
        if groups and groups[-1][1] == [step * size for step in strides]:
            size *= groups.pop()[0]
        groups.append((size, strides))
    if not groups or (len(groups) == 1 and set(groups[0][1]) == {1}):
        return tensors, None, None
    if len(groups) > 2:
        copies = [
            x
            if x is None or x.stride() == stride
            else torch.empty_like(order, dtype=x.dtype).copy_(x)
            for x in tensors
        ]
        return copies, None, None
    (columns, column_strides), (_, row_strides) = groups[-1], groups[0]
    pairs = zip(row_strides, column_strides, strict=True)
    return tensors, columns, tuple([stride for pair in pairs for stride in pair])
