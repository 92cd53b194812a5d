"""Block sizes and threads, as tables: data, so that nobody waits for a search at a first call.

Nothing here has been measured yet: the reasons are arithmetic, and what `make gpu-model` predicts.
`make gpu-compile` shows that no row spills registers, `make gpu-check` measures them on a GPU.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton.language as tl
from triton import knobs
from triton.runtime import driver

ANY = math.inf
LOAD = 16  # bytes of the widest


class Elements(NamedTuple):
    """Elements that a program takes at a time, and its threads."""

    block: int
    threads: int


# Element by element, by bytes of an element: of each operand two loads of 16 bytes a lane, in
# float64 as many. Twice as many, and a weighted loss spills on one target.
POINTWISE = {2: Elements(2048, 128), 4: Elements(1024, 128), 8: Elements(512, 128)}
# Programs of a kernel that sums, or that may have nothing to do: some waves on any GPU of today. So
# many add up among themselves what they have found; of more each would wait at its end for longer
# than another kernel takes.
MOST_PROGRAMS = 4096
# Programs that add up their parts at a time; the last of them reads so many.
GROUP = 512
# Adding up the parts of a kernel whose programs cannot: so many a program.
SUM = Elements(4096, 256)
# Counting targets, 8 bytes each: two loads of 16 bytes a lane, at most so many programs by turns.
COUNT = Elements(1024, 256)
MOST_COUNTERS = 256


class Row(NamedTuple):
    """How cross-entropy takes inputs of up to `most` classes: held as one or more tiles, if any."""

    most: float
    elements: int  # of a tile
    positions: int  # at least, of these, so that lanes lie along positions; of 32 lanes
    threads: int
    cluster: int = 1  # programs that share them, through each other's memory
    registers: int | None = None  # of a lane, at most, where a compiler takes more than pays


# Classes side by side, class indices, with gradients, by bytes of an element. Up to the last row
# but one a row of logits is held in registers. Up to 1,024 classes are a warp's, 32 of them a lane,
# which waits for no other. Longer ones of half precision are held packed, in tiles of one load of
# 16 bytes a lane. Beyond, a row is read twice, in tiles of 16 elements a lane, by programs so small
# that several are under way on each multiprocessor.
CLASSES_INNER = {
    2: (
        Row(1024, 1024, 1, 32),
        Row(4096, 512, 1, 64),
        Row(8192, 1024, 1, 128),
        Row(16384, 2048, 1, 256),
        Row(32768, 4096, 1, 512),
        Row(ANY, 4096, 1, 256),
    ),
    4: (
        Row(1024, 1024, 1, 32),
        Row(4096, 512, 1, 128),
        Row(8192, 1024, 1, 256),
        Row(16384, 2048, 1, 512),
        Row(32768, 4096, 1, 1024),
        Row(ANY, 4096, 1, 256),
    ),
    8: (
        Row(1024, 1024, 1, 128),
        Row(2048, 2048, 1, 128),
        Row(4096, 4096, 1, 256),
        Row(8192, 8192, 1, 512),
        Row(ANY, 2048, 1, 256),
    ),
}

# The same, where programs form clusters: instead of one that fills a multiprocessor, and has
# nothing to do while it waits for its row, several that each leave room for others.
# Vocabularies of some 50,000 fill 12 to 13 tiles of programs of a warp each; of tiles twice as
# large a seventh would be empty.
CLUSTERED = {
    2: (
        *CLASSES_INNER[2][:4],
        Row(32768, 4096, 1, 128, 4, 56),
        Row(53248, 4096, 1, 32, 16, 80),
        Row(65536, 8192, 1, 128, 8, 56),
        Row(131072, 16384, 1, 128, 16, 56),
        Row(262144, 32768, 1, 256, 16),
        CLASSES_INNER[2][-1],
    ),
    4: (
        *CLASSES_INNER[4][:4],
        Row(32768, 4096, 1, 128, 8),
        Row(65536, 8192, 1, 128, 16),
        Row(131072, 32768, 1, 256, 16, 64),
        Row(262144, 32768, 1, 512, 16),
        CLASSES_INNER[4][-1],
    ),
    8: CLASSES_INNER[8],
}

# With smoothing, whose sums a lane takes beside its exponentials, or with the loss's gradient.
ROOMIER = {
    size: tuple(
        row._replace(registers=64 if row.threads > 32 else None) if row.cluster > 1 else row
        for row in rows
    )
    for size, rows in CLUSTERED.items()
}

# Where only short rows are held: with measures, for which a lane takes many registers; of rows that
# are loaded element by element; and of a loss without gradients, which reads a row once either way.
SHORT_CLASSES_INNER = {
    2: (Row(1024, 1024, 1, 32), Row(4096, 4096, 1, 128), Row(ANY, 4096, 1, 256)),
    8: (*CLASSES_INNER[8][:3], Row(ANY, 2048, 1, 256)),
}
SHORT_CLASSES_INNER[4] = SHORT_CLASSES_INNER[2]

# With probabilities or class weights: weights and probabilities take registers too, so that a
# lane holds half as many logits. Rows of 16384 would spill.
DENSE_CLASSES_INNER = {
    2: (
        Row(1024, 1024, 1, 64),
        Row(4096, 4096, 1, 256),
        Row(8192, 8192, 1, 512),
        Row(ANY, 4096, 1, 512),
    ),
    8: (
        Row(1024, 1024, 1, 128),
        Row(2048, 2048, 1, 256),
        Row(4096, 4096, 1, 512),
        Row(ANY, 1024, 1, 256),
    ),
}
DENSE_CLASSES_INNER[4] = DENSE_CLASSES_INNER[2]

# Positions side by side, (N, C, d1, ..., dk): a warp's lanes lie along them, and a lane walks over
# the classes of its own, or those that its warp has of them. Few classes are held, of more 8 are
# read at a time (4 in float64).
POSITIONS_INNER = {
    2: (Row(32, 2048, 64, 32), Row(ANY, 512, 64, 32)),
    4: (Row(32, 2048, 64, 64), Row(256, 16384, 64, 512), Row(ANY, 512, 64, 32)),
    8: (Row(ANY, 128, 32, 32),),
}


# Where classes lie side by side, but are so few that a lane walks over its rows' own. A warp writes
# them through shared memory, in the order of memory.
FEW = {2: Row(32, 2048, 64, 32), 4: Row(32, 2048, 64, 32)}


class Split(NamedTuple):
    """When the classes of a position are spread over programs, and over how many."""

    positions: int  # below so many programs, multiprocessors would stand idle
    classes: int  # a program has at least so many: two kernels have to pay
    programs: int  # to aim at: some for each multiprocessor


SPLIT = Split(positions=128, classes=16384, programs=512)


class Tile(NamedTuple):
    """What a program of cross-entropy takes at a time."""

    positions: int
    classes: int
    loaded: int  # of those, by a lane at once
    tiles: int  # so many at a time
    held: bool  # which are all
    walked: bool  # a lane goes from class to class of its positions
    threads: int
    cluster: int = 1
    registers: int | None = None


def tile(
    itemsize: int, inner: int, classes: int, positions_inner: bool, unit: int, kind: str = ""
) -> Tile:
    """From the tables, cut to inputs that are smaller.

    Args:
        unit: What all rows, or columns, begin at multiples of.
        kind: ``"roomier"`` where a lane takes more registers, ``"dense"`` where what is aimed at
            is held beside the logits, ``"short"`` where only short rows are to be held.
    """
    few = FEW.get(itemsize)
    if few is not None and classes <= few.most and not positions_inner and kind != "dense":
        loaded = min(unit, LOAD // itemsize)
        tiles = cdiv(classes, loaded)
        return Tile(few.positions, loaded, loaded, tiles, True, True, few.threads)
    aligned = unit * itemsize >= LOAD
    if not aligned and kind != "dense":
        kind = "short"
    tables = {
        "": CLUSTERED if has_clusters() else CLASSES_INNER,
        "roomier": ROOMIER if has_clusters() else CLASSES_INNER,
        "dense": DENSE_CLASSES_INNER,
        "short": SHORT_CLASSES_INNER,
    }
    rows = POSITIONS_INNER[itemsize] if positions_inner else tables[kind][itemsize]
    if positions_inner and kind == "dense":
        rows = rows[-1:]  # what is aimed at would take as many registers as the logits
    row = next(row for row in rows if classes <= row.most)
    lanes, padded = _warp_size(), power_of_2(classes)
    positions = row.positions * lanes // 32 if positions_inner else row.positions
    positions = min(max(positions, row.elements // padded), power_of_2(inner))
    at_a_time = max(1, row.elements // positions)
    taken = min(padded, max(1, row.threads // lanes) if positions_inner else at_a_time)
    tiles = cdiv(classes if row.most < ANY else min(classes, at_a_time), taken)
    held = taken * tiles >= classes
    loaded = 1 if positions_inner else min(taken, LOAD // itemsize) if aligned else taken
    return Tile(positions, taken, loaded, tiles, held, positions_inner, *row[3:])


# As Triton's, which take microseconds of the host.


def cdiv(n: int, size: int) -> int:
    """How many of that size hold n."""
    return -(-n // size)


def power_of_2(n: int) -> int:
    """The next from n on."""
    return 1 << (n - 1).bit_length()


def splits(positions: int, classes: int, tile: Tile) -> tuple[int, int]:
    """Over how many programs the classes of each position are spread, and how many each takes."""
    if tile.held or positions >= SPLIT.positions or classes < 2 * SPLIT.classes:
        return 1, classes
    wanted = min(classes // SPLIT.classes, max(1, SPLIT.programs // positions))
    length = cdiv(cdiv(classes, wanted), tile.classes) * tile.classes
    return cdiv(classes, length), length


def options(threads: int, cluster: int = 1, registers: int | None = None) -> dict[str, Any]:
    """What Triton is told of every launch; products may become part of additions, as in C++."""
    told = {"num_warps": max(1, threads // _warp_size()), "enable_fp_fusion": True}
    if cluster > 1:
        told["num_ctas"] = cluster
    if registers is not None:
        told["maxnreg"] = registers
    return told


def has_clusters() -> bool:
    """Hopper, and the data centres' Blackwell, whose clusters are as large."""
    return not knobs.runtime.interpret and driver.active.get_current_target().arch in (90, 100, 103)


def is_nvidia() -> bool:
    return not knobs.runtime.interpret and driver.active.get_current_target().backend == "cuda"


@functools.cache
def _warp_size() -> int:
    """32 on NVIDIA's GPUs, 32 or 64 on AMD's."""
    return 32 if knobs.runtime.interpret else int(driver.active.get_current_target().warp_size)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is computed in."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def accumulate_type(dtype: torch.dtype) -> tl.dtype:
    """The same, for Triton."""
    return tl.float64 if dtype is torch.float64 else tl.float32


def unit(*lengths: int) -> int:
    """The most that all of these are multiples of: 1, 2, 4, 8 or 16."""
    return math.gcd(16, *lengths)


def index_type(*reaches: int) -> tl.dtype:
    """What holds any of these offsets, and the block that the last of them may lie in."""
    return tl.int32 if max(reaches) < 2**31 - 2**20 else tl.int64
