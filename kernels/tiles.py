"""Tiles of positions x classes: (N, C, d1, ..., dk), or any shape with classes along one dimension.

Positions are numbered outer by outer, and of each outer one inner by inner. A program has some that
follow on one another, and reads and writes tiles of theirs, whichever of the two lies side by side
in memory. `constants` is a tuple with the fields of `Layout`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import launch
from .arithmetic import exp_nonpositive

Viewed = tuple[torch.Tensor, tuple[int, int, int]]  # and its strides


class View(NamedTuple):
    """A tensor's memory, and its strides."""

    data: Any
    outer: int
    inner: int
    classes: int


class Layout(NamedTuple):
    """What a kernel is compiled for."""

    A: Any  # the type that is computed in
    INDEX: Any  # that of offsets along the classes
    COLUMNS: Any  # positions lie side by side, rather than classes
    UNIT: Any  # what lies side by side begins, and ends, at multiples of so many elements
    POSITIONS: Any  # of a program
    CLASSES: Any  # of a tile
    EXACT: Any  # exponentials to 2 ULP, rather than as the GPU has them


class Block(NamedTuple):
    """The positions of a program."""

    outer: Any
    inner: Any
    flat: Any
    present: Any


@triton.jit
def in_units(n, constants):
    """The size or stride itself, as a multiple that Triton sees: by itself it sees those of 16."""
    if constants.UNIT == 1 or constants.UNIT == 16:
        return n
    return n // constants.UNIT * constants.UNIT


@triton.jit
def block_of(size, program, constants):
    """Those of a program, of `size` inner ones."""
    blocks = (size - 1) // constants.POSITIONS + 1  # tl.cdiv would overflow at 2**31
    outer = (program // blocks).to(tl.int64)
    lanes = tl.arange(0, constants.POSITIONS)
    inner = (program % blocks).to(tl.int64) * constants.POSITIONS + lanes
    if constants.COLUMNS:
        size = in_units(size, constants)
    return Block(outer, inner, outer * size + inner, inner < size)


@triton.jit
def whole_row(classes, constants):
    """Where the classes end, in units where they lie side by side."""
    if constants.COLUMNS:
        return classes
    return in_units(classes, constants)


@triton.jit
def place(view, at, c, constants):
    """Pointers to positions x classes."""
    rows = view.data + at.outer * in_units(view.outer, constants)
    if constants.COLUMNS:
        columns = c * in_units(view.classes, constants)
        return (rows + at.inner * view.inner)[:, None] + columns[None, :]
    rows += at.inner * in_units(view.inner, constants)
    return rows[:, None] + (c * view.classes)[None, :]


@triton.jit
def read_tile(view, at, present, c, last, other, constants):
    mask = present[:, None] & (c < last)[None, :]
    return tl.load(place(view, at, c, constants), mask=mask, other=other).to(constants.A)


@triton.jit
def pivot_of(high):
    """While all is -inf the pivot is 0, so that a NaN is the only way to a NaN."""
    return tl.where(high == -float("inf"), 0.0, high)


@triton.jit
def exp_shifted(x, constants):
    """exp(x), x <= 0. What is rounded to half precision does without the last digits of float32."""
    if constants.EXACT:
        return exp_nonpositive(x)
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def add_exponentials(high, total, x, constants):
    """Takes a tile into the largest element so far and the sum of exp(x - pivot)."""
    higher = tl.maximum(high, tl.max(x, 1))
    pivot = pivot_of(higher)
    total *= exp_shifted(high - pivot, constants)
    return higher, total + tl.sum(exp_shifted(x - pivot[:, None], constants), 1)


def viewed(given: Viewed | None) -> View | None:
    return given and View(given[0], *given[1])


def layout(
    sizes: tuple[int, int, int], views: list[View], kind: str = ""
) -> tuple[Layout, launch.Tile]:
    """What to compile for, and how large tiles are.

    Args:
        sizes: Outer and inner positions, and classes.
        views: The one whose memory decides, and the others.
        kind: See `launch.tile`.
    """
    return _layout(sizes, views[0].data.dtype, tuple([view[1:] for view in views]), kind)


@functools.lru_cache(maxsize=4096)
def _layout(
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
    strides: tuple[tuple[int, int, int], ...],
    kind: str,
) -> tuple[Layout, launch.Tile]:
    (_, inner, classes), (_, inner_stride, class_stride) = sizes, strides[0]
    columns, size = inner > 1 and inner_stride < class_stride, dtype.itemsize
    unit = launch.unit(
        inner if columns else classes,
        *(outer for outer, _, _ in strides),
        *(each[2] if columns else each[1] for each in strides),
    )
    tile = launch.tile(size, inner, classes, columns, kind or ("short" if unit * size < 16 else ""))
    return Layout(
        A=launch.accumulate_type(dtype),
        INDEX=launch.index_type(classes, *(classes * each[2] for each in strides)),
        COLUMNS=columns,
        UNIT=unit,
        POSITIONS=tile.positions,
        CLASSES=tile.classes,
        EXACT=size > 2,
    ), tile


Constants = Any  # a Layout, or a tuple with its fields


@functools.cache
def compiled_in(constants: Constants) -> Constants:
    """As Triton takes them: the very same ones for the same call, which it compares faster."""
    return type(constants)(*map(tl.constexpr, constants))
