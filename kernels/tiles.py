"""Tiles of positions x classes: (N, C, d1, ..., dk), or any shape with classes along one dimension.

Positions are numbered outer by outer, and of each outer one inner by inner. A program has some that
follow on one another, and reads and writes tiles of theirs, whichever of the two lies side by side
in memory. `constants` is a tuple with the fields of `Layout`.

Rows that are no multiple of 16 bytes begin anywhere within a lane's load. Where a program has one
of them, its tiles begin at the load that holds the row's first class, a `shift` in front of it: all
loads are whole, and what they have of the neighbours is dropped. Of the gradients only the elements
of the first and the last load are stored one by one.
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
    INDEX: Any  # that of offsets from a program's first element
    SEVERAL: Any  # outer positions, rather than one
    COLUMNS: Any  # positions lie side by side, rather than classes
    UNIT: Any  # what lies side by side begins, and ends, at multiples of so many elements
    POSITIONS: Any  # of a program
    CLASSES: Any  # of a tile
    TILES: Any  # so many tiles at a time
    HELD: Any  # which are all
    PACKED: Any  # and are held as they are in memory, two elements a register
    LOADED: Any  # classes of a position that a lane reads at a time
    SHIFTED: Any  # 0, or in how many of the last tiles a row may end, where they begin anywhere
    WALKED: Any  # a lane goes from class to class of its positions
    WIDTH: Any  # a power of 2 that holds them all, where such classes lie side by side, else 0
    ROW: Any  # how many there are, where rows follow on one another, else 0
    TURNS: Any  # a program has blocks of positions by turns, rather than one
    ANEW: Any  # and computes for each what they have in common, rather than hold it
    EXACT: Any  # exponentials to 2 ULP, rather than as the GPU has them


class Block(NamedTuple):
    """The positions of a program: inner and flat are the first one's, to which lanes are added."""

    outer: Any
    inner: Any
    flat: Any
    lanes: Any
    present: Any
    shift: Any  # columns of a tile in front of the first class


@triton.jit
def in_units(n, constants):
    """The size or stride itself, as a multiple that Triton sees: by itself it sees those of 16."""
    if constants.UNIT == 1 or constants.UNIT == 16:
        return n
    return n // constants.UNIT * constants.UNIT


@triton.jit
def block_of(view, size, program, constants):
    """Those of a program, of `size` inner ones."""
    outer = 0
    if constants.SEVERAL:
        blocks = (size - 1) // constants.POSITIONS + 1  # tl.cdiv would overflow at 2**31
        outer = tl.cast(program // blocks, tl.int64)
        program %= blocks
    inner = tl.cast(program, tl.int64) * constants.POSITIONS
    lanes = tl.arange(0, constants.POSITIONS)
    if constants.COLUMNS:
        size = in_units(size, constants)
    if constants.WALKED:  # many positions: compared in 32 bits
        present = lanes < tl.minimum(size - inner, constants.POSITIONS).to(tl.int32)
    else:
        present = inner + lanes < size
    shift = 0
    if constants.SHIFTED:
        offset = outer * view.outer + inner * view.inner
        shift = (offset % constants.LOADED).to(constants.INDEX)
    return Block(outer, inner, outer * size + inner, lanes, present, shift)


@triton.jit
def whole_row(at, classes, constants):
    """The column where the classes end, in units where they lie side by side."""
    if constants.COLUMNS:
        return classes
    if constants.ROW:
        return constants.ROW
    return at.shift + in_units(classes, constants)


@triton.jit
def columns_of(start, k: tl.constexpr, constants):
    """Those of the k-th tile from start on: the classes, but for the shift."""
    lanes = tl.arange(0, constants.CLASSES).to(constants.INDEX)
    return lanes + start + k * constants.CLASSES


@triton.jit
def mask_of(at, present, start, k: tl.constexpr, last, constants):
    """Of tiles that a lane walks over and holds, only the last may have fewer classes."""
    full: tl.constexpr = constants.TILES - (constants.CLASSES > 1)
    if constants.SHIFTED:
        if not constants.HELD:  # compared anew, rather than held since they were read
            start += unknown_zero(last, 2)
        mask = present[:, None] & between(at.shift, start, k, last, constants)
    elif constants.HELD and constants.WALKED and k < full:
        mask = tl.broadcast_to(present[:, None], [constants.POSITIONS, constants.CLASSES])
    else:
        mask = present[:, None] & (columns_of(start, k, constants) < last)[None, :]
    return mask


@triton.jit
def may_begin(k: tl.constexpr, constants):
    """Whether a row that is shifted may do so in the k-th tile."""
    return k == 0 or not constants.HELD


@triton.jit
def may_end(k: tl.constexpr, constants):
    return k >= constants.TILES - constants.SHIFTED or not constants.HELD


@triton.jit
def has_end(k: tl.constexpr, constants):
    return may_begin(k, constants) or may_end(k, constants)


@triton.jit
def up_to_load(column, constants):
    """The next column that a lane's load begins at."""
    return (column + constants.LOADED - 1) // constants.LOADED * constants.LOADED


@triton.jit
def between(first, start, k: tl.constexpr, last, constants):
    """The columns from first, if any, to last, of rows that are shifted.

    Of a lane's load each element's number is compared with the distance from its first one, which
    takes a register a tile. Columns, which all blocks have in common, would take one an element.
    """
    lanes: tl.constexpr = constants.CLASSES // constants.LOADED
    load = tl.arange(0, lanes).to(constants.INDEX) * constants.LOADED
    load += start + k * constants.CLASSES
    each = tl.arange(0, constants.LOADED).to(constants.INDEX)[None, :]
    mask = tl.full([lanes, constants.LOADED], True, tl.int1)
    if may_begin(k, constants) and first is not None:
        mask &= each >= (first - load)[:, None]
    if may_end(k, constants):
        mask &= each < (last - load)[:, None]
    return tl.reshape(mask, [1, constants.CLASSES])


@triton.jit
def place(view, at, c, constants):
    """Pointers to positions x classes."""
    first = view.data + at.outer * in_units(view.outer, constants)
    lanes = at.lanes.to(constants.INDEX)
    if constants.COLUMNS:
        first += at.inner * view.inner
        rows, columns = lanes * view.inner, c * in_units(view.classes, constants)
    else:
        step = in_units(view.inner, constants)
        if constants.ROW:
            step = constants.ROW
        first += at.inner * step
        rows, columns = lanes * step, c * view.classes
    if constants.SHIFTED:
        offset = at.outer * view.outer + at.inner * view.inner
        first = view.data + offset // constants.LOADED * constants.LOADED
    return (first + rows[:, None]) + columns[None, :]


@triton.jit
def read(view, at, present, start, k: tl.constexpr, last, other, constants):
    """As it is in memory."""
    source = place(view, at, columns_of(start, k, constants), constants)
    if constants.SHIFTED:
        end = up_to_load(last, constants)
        mask = present[:, None] & between(None, start, k, end, constants)
        x = tl.load(source, mask=mask, other=other)
        if has_end(k, constants):
            x = tl.where(between(at.shift, start, k, last, constants), x, other)
    else:
        mask = mask_of(at, present, start, k, last, constants)
        x = tl.load(source, mask=mask, other=other)
    return x


@triton.jit
def read_tiles(view, at, present, start, last, other, constants):
    """The next tiles, as they are in memory."""
    tiles = ()
    for k in tl.static_range(constants.TILES):
        tiles += (read(view, at, present, start, k, last, other, constants),)
    return tiles


@triton.jit
def write(view, at, value, start, k: tl.constexpr, last, constants):
    to = place(view, at, columns_of(start, k, constants), constants)
    if constants.SHIFTED:
        present = at.present[:, None]
        first = up_to_load(at.shift, constants)
        end = last // constants.LOADED * constants.LOADED
        whole = between(first, start, k, end, constants)
        tl.store(to, value, mask=present & whole)
        if has_end(k, constants):
            inside = between(at.shift, start, k, last, constants)
            tl.store(to, value, mask=present & inside & (whole == 0))
    else:
        tl.store(to, value, mask=mask_of(at, at.present, start, k, last, constants))


@triton.jit
def join_halves(tiles):
    """Of positions x lanes x n: half as many of 2 n."""
    half: tl.constexpr = len(tiles) // 2
    pairs = ()
    for k in tl.static_range(half):
        pair = tl.join(tiles[k], tiles[k + half])
        pairs += (tl.reshape(pair, [pair.shape[0], pair.shape[1], 2 * pair.shape[2]]),)
    return pairs


@triton.jit
def write_rows(view, at, tiles, last, constants):
    """All tiles at once, in the order of memory, where a lane has rows of its own."""
    kind: tl.constexpr = view.data.dtype.element_ty
    joined = ()
    for k in tl.static_range(constants.WIDTH // constants.CLASSES):
        if k < constants.TILES:
            tile = tiles[k].to(kind)
        else:
            tile = tl.full([constants.POSITIONS, constants.CLASSES], 0.0, kind)
        joined += (tl.reshape(tile, [constants.POSITIONS, constants.CLASSES, 1]),)
    for _ in tl.static_range(5):
        if len(joined) > 1:
            joined = join_halves(joined)
    rows = tl.reshape(tl.permute(joined[0], (0, 2, 1)), [constants.POSITIONS, constants.WIDTH])
    c = tl.arange(0, constants.WIDTH).to(constants.INDEX)
    mask = at.present[:, None] & (c < last)[None, :]
    tl.store(place(view, at, c, constants), rows, mask=mask)


@triton.jit
def unknown_zero(classes, turn: tl.constexpr):
    """0, of which no compiler knows: what is computed with it is computed anew, and not held."""
    return (classes < -turn).to(tl.int32)


@triton.jit
def opened(tile, classes, turn: tl.constexpr, constants):
    """In the type that is computed in. Each turn converts anew what is held packed."""
    if not constants.PACKED:
        x = tile.to(constants.A)
    elif tile.dtype == tl.bfloat16:
        zero = unknown_zero(classes, turn)
        x = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, $3; and.b32 $1, $2, $5;",
            "=r,=r,r,r,r,r,r",
            [tile, zero + 16, zero - 65536],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        x = tl.inline_asm_elementwise(
            "{ .reg .b32 x; .reg .b16 a, b; xor.b32 x, $2, $3; mov.b32 {a, b}, x; "
            "cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; }",
            "=r,=r,r,r,r",
            [tile, unknown_zero(classes, turn)],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    return x


@triton.jit
def pivot_of(high):
    """While all is -inf the pivot is 0, so that a NaN is the only way to a NaN."""
    return tl.where(high == -float("inf"), 0.0, high)


@triton.jit
def by_lane(tile, constants):
    """positions x classes as positions x lanes x what a lane reads at a time."""
    size: tl.constexpr = constants.LOADED
    return tl.reshape(tile, [constants.POSITIONS, constants.CLASSES // size, size])


@triton.jit
def no_sums(constants):
    """0 for each lane."""
    lanes: tl.constexpr = constants.CLASSES // constants.LOADED
    return tl.full([constants.POSITIONS, lanes], 0.0, constants.A)


@triton.jit
def add_exponentials(high, total, tiles, constants):
    """Takes tiles into each lane's largest element so far and its sum of exp(x - pivot)."""
    higher = high
    for k in tl.static_range(constants.TILES):
        higher = tl.maximum(higher, tl.max(by_lane(tiles[k].to(constants.A), constants), 2))
    pivot = pivot_of(higher)
    total *= exp_nonpositive(high - pivot, constants.EXACT)
    for k in tl.static_range(constants.TILES):
        x = by_lane(tiles[k].to(constants.A), constants)
        total += tl.sum(exp_nonpositive(x - pivot[:, :, None], constants.EXACT), 2)
    return higher, total


@triton.jit
def of_all_lanes(high, total, constants):
    """The same of each position."""
    highest = tl.max(high, 1)
    away = high - pivot_of(highest)[:, None]
    return highest, tl.sum(total * exp_nonpositive(away, constants.EXACT), 1)


@triton.jit
def exponentials_of(tiles, classes, constants):
    """The largest element and the sum of exp(x - pivot)."""
    tile = opened(tiles[0], classes, 0, constants)
    for k in tl.static_range(1, constants.TILES):
        tile = tl.maximum(tile, opened(tiles[k], classes, 0, constants))
    high = tl.max(tile, 1)
    pivot = pivot_of(high)[:, None]
    tile = exp_nonpositive(opened(tiles[0], classes, 1, constants) - pivot, constants.EXACT)
    for k in tl.static_range(1, constants.TILES):
        tile += exp_nonpositive(opened(tiles[k], classes, 1, constants) - pivot, constants.EXACT)
    return high, tl.sum(tile, 1)


def viewed(given: Viewed | None) -> View | None:
    return given and View(given[0], *given[1])


class Memory(NamedTuple):
    """What decides on a layout: of several tensors the first one's dtype, and where they lie."""

    device: torch.device
    dtype: torch.dtype
    strides: tuple[tuple[int, int, int], ...]
    in_loads: bool  # all begin at a multiple of a lane's widest load


def memory_of(views: list[View]) -> Memory:
    first = views[0].data
    in_loads = all(view.data.data_ptr() % launch.LOAD == 0 for view in views)
    return Memory(first.device, first.dtype, tuple([view[1:] for view in views]), in_loads)


@functools.lru_cache(maxsize=4096)
def layout(
    sizes: tuple[int, int, int], memory: Memory, kind: str = ""
) -> tuple[Layout, launch.Tile]:
    """What to compile for, and how large tiles are.

    Args:
        sizes: Outer and inner positions, and classes.
        memory: That of the tensor that decides, and of the others.
        kind: See `launch.tile`.
    """
    _, dtype, strides, in_loads = memory
    (outer, inner, classes), (_, inner_stride, class_stride) = sizes, strides[0]
    columns, size = inner > 1 and inner_stride < class_stride, dtype.itemsize
    unit = launch.unit(
        inner if columns else classes,
        *(each[0] for each in strides),
        *(each[2] if columns else each[1] for each in strides),
    )
    dense = all(each[1:] == (classes, 1) for each in strides)
    load, ends = launch.LOAD // size, 0
    alike = in_loads and len(set(strides)) == 1
    if alike and unit < load and class_stride == 1 and not columns:
        slack = load - 1
        tile = launch.tile(size, inner, classes + slack, columns, load, kind)
        if tile.positions == 1:
            most, least = (launch.cdiv(n, tile.classes) for n in (classes + slack, classes))
            ends = 1 + most - least
    if not ends:
        tile = launch.tile(size, inner, classes, columns, unit, kind)
    packed = size == 2 and tile.held and tile.tiles > 1
    packed &= not tile.walked or tile.threads > 32  # a lane that has all of them has few
    if ends:
        tile = launch.with_ends(tile, dtype, kind == "")
    return Layout(
        A=launch.accumulate_type(dtype),
        INDEX=launch.index_type(
            classes, *(tile.positions * each[1] + classes * each[2] for each in strides)
        ),
        SEVERAL=outer > 1,
        COLUMNS=columns,
        UNIT=unit,
        POSITIONS=tile.positions,
        CLASSES=tile.classes,
        TILES=tile.tiles,
        HELD=tile.held,
        PACKED=packed and launch.is_nvidia(),
        LOADED=tile.loaded,
        SHIFTED=ends,
        WALKED=tile.walked,
        WIDTH=launch.power_of_2(classes) if tile.walked and not columns else 0,
        ROW=classes if tile.walked and dense else 0,
        TURNS=tile.turns,
        ANEW=columns or kind in ("aimed", "dense"),  # whichever takes fewer registers
        EXACT=size > 2,
    ), tile
