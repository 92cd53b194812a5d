"""The same values in memory of many shapes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Layout = Callable[[Tensor], Tensor]


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def transposed(x: Tensor) -> Tensor:
    """All dimensions in the opposite order in memory."""
    order = tuple(range(x.dim()))[::-1]
    return x.permute(order).contiguous().permute(order)


def classes_innermost(x: Tensor) -> Tensor:
    """channels_last, for any number of dimensions from 2 up."""
    return x if x.dim() < 2 else x.movedim(1, -1).contiguous().movedim(-1, 1)


def every_second(x: Tensor) -> Tensor:
    """Every second element of the last dimension of something larger."""
    if not x.dim():
        return x
    memory = x.new_zeros((*x.shape[:-1], 2 * x.shape[-1]))
    memory[..., ::2] = x
    return memory[..., ::2]


def rows_apart(x: Tensor) -> Tensor:
    """A slice of every dimension but the last: rows with gaps between them."""
    if not x.dim():
        return x
    memory = x.new_zeros([3 * n + 1 for n in x.shape[:-1]] + [x.shape[-1] + 5])
    window = (*(slice(1, 3 * n, 3) for n in x.shape[:-1]), slice(2, 2 + x.shape[-1]))
    memory[window] = x
    return memory[window]


def misaligned(x: Tensor) -> Tensor:
    """Starts one element after an aligned address."""
    memory = x.new_zeros(x.numel() + 1)
    view = memory[1:].view(x.shape)
    view.copy_(x)
    return view


def last_dimensions_swapped(x: Tensor) -> Tensor:
    """(N, C, d1, d2) with d1 innermost: no single stride runs through the positions."""
    return x if x.dim() < 3 else x.transpose(-1, -2).contiguous().transpose(-1, -2)


def batch_innermost(x: Tensor) -> Tensor:
    return x if x.dim() < 2 else x.movedim(0, -1).contiguous().movedim(-1, 0)


SAME_VALUES: dict[str, Layout] = {
    layout.__name__: layout
    for layout in (
        contiguous,
        transposed,
        classes_innermost,
        every_second,
        rows_apart,
        misaligned,
        last_dimensions_swapped,
        batch_innermost,
    )
}


def first_row_expanded(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape) if x.dim() else x


def first_column_expanded(x: Tensor) -> Tensor:
    return x[..., :1].expand(x.shape) if x.dim() else x


def one_element_expanded(x: Tensor) -> Tensor:
    return x.reshape(-1)[:1].view([1] * x.dim()).expand(x.shape) if x.numel() else x


def overlapping_windows(x: Tensor) -> Tensor:
    """Rows that share elements, as unfold gives them."""
    if x.dim() != 2:
        return x
    return torch.cat([x.reshape(-1), x.reshape(-1)]).as_strided(x.shape, (1, 1))


REPEATING: dict[str, Layout] = {
    layout.__name__: layout
    for layout in (
        first_row_expanded,
        first_column_expanded,
        one_element_expanded,
        overlapping_windows,
    )
}
LAYOUTS = SAME_VALUES | REPEATING
