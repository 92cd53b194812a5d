"""Memory layouts for tensors with the same values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Layout = Callable[[Tensor], Tensor]


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def transposed(x: Tensor) -> Tensor:
    """Reverses the order of the dimensions in memory."""
    order = tuple(range(x.dim()))[::-1]
    return x.permute(order).contiguous().permute(order)


def classes_innermost(x: Tensor) -> Tensor:
    """Returns a channels_last tensor, for 2 or more dimensions."""
    return x if x.dim() < 2 else x.movedim(1, -1).contiguous().movedim(-1, 1)


def every_second(x: Tensor) -> Tensor:
    """Returns a view of every second element in the last dimension of a larger tensor."""
    if not x.dim():
        return x
    memory = x.new_zeros((*x.shape[:-1], 2 * x.shape[-1]))
    memory[..., ::2] = x
    return memory[..., ::2]


def rows_apart(x: Tensor) -> Tensor:
    """Returns a slice of every dimension except the last: rows with gaps between them."""
    if not x.dim():
        return x
    memory = x.new_zeros([3 * n + 1 for n in x.shape[:-1]] + [x.shape[-1] + 5])
    window = (*(slice(1, 3 * n, 3) for n in x.shape[:-1]), slice(2, 2 + x.shape[-1]))
    memory[window] = x
    return memory[window]


def misaligned(x: Tensor) -> Tensor:
    """Returns a tensor whose data starts one element after an aligned address."""
    memory = x.new_zeros(x.numel() + 1)
    view = memory[1:].view(x.shape)
    view.copy_(x)
    return view


def last_dimensions_swapped(x: Tensor) -> Tensor:
    """Returns (N, C, d1, d2) with d1 innermost: the positions have no common stride."""
    return x if x.dim() < 3 else x.transpose(-1, -2).contiguous().transpose(-1, -2)


def batch_innermost(x: Tensor) -> Tensor:
    return x if x.dim() < 2 else x.movedim(0, -1).contiguous().movedim(-1, 0)


_SAME = (
    *(contiguous, transposed, classes_innermost, every_second, rows_apart, misaligned),
    *(last_dimensions_swapped, batch_innermost),
)
SAME_VALUES: dict[str, Layout] = {layout.__name__: layout for layout in _SAME}


def first_row_expanded(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape) if x.dim() else x


def first_column_expanded(x: Tensor) -> Tensor:
    return x[..., :1].expand(x.shape) if x.dim() else x


def one_element_expanded(x: Tensor) -> Tensor:
    return x.reshape(-1)[:1].view([1] * x.dim()).expand(x.shape) if x.numel() else x


def overlapping_windows(x: Tensor) -> Tensor:
    """Returns rows that share elements, as unfold returns them."""
    if x.dim() != 2:
        return x
    return torch.cat([x.reshape(-1), x.reshape(-1)]).as_strided(x.shape, (1, 1))


_REPEATING = first_row_expanded, first_column_expanded, one_element_expanded, overlapping_windows
REPEATING: dict[str, Layout] = {layout.__name__: layout for layout in _REPEATING}
LAYOUTS = SAME_VALUES | REPEATING
