"""Block sizes and threads, as tables: data, so that nobody waits for a search at a first call.

Nothing here has been measured yet: the reasons are arithmetic, and what `make gpu-model` predicts.
`make gpu-compile` shows that no row spills more than a few registers, and `make gpu-check` measures
them on a GPU.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.runtime import driver

ANY = math.inf
LOAD = 16  # bytes of the widest
REGISTERS = 65_536  # of a multiprocessor


class Elements(NamedTuple):
    """Elements that a program takes at a time, and its threads."""

    block: int
    threads: int


# Element by element, by bytes of an element: of each operand two loads of 16 bytes a lane, in
# float64 as many. Twice as many, and a weighted loss spills on one target.
POINTWISE = {2: Elements(2048, 128), 4: Elements(1024, 128), 8: Elements(512, 128)}
# Programs of a kernel that sums, or that may have nothing to do: some waves on any GPU of today.
MOST_PROGRAMS = 4096
# Programs that add up their parts at a time; the last of them reads so many.
GROUP = 512
# Counting targets, 8 bytes each: two loads of 16 bytes a lane, at most so many programs by turns.
COUNT = Elements(1024, 256)
MOST_COUNTERS = 256
# So few targets each program of cross-entropy counts itself, which costs less than a launch.
COUNTED = 512


# Programs that take blocks by turns: as many as fit a GPU, so often, each with so many turns.
ROUNDS, TURNS = 4, 16


class Row(NamedTuple):
    """How cross-entropy takes inputs of up to `most` classes: held as one or more tiles, if any.

    By turns as many programs as a GPU runs at a time take blocks of positions, so that each waits
    but once for the others' losses. Else each has one block.
    """

    most: float
    elements: int  # of a tile
    positions: int  # at least, of these, so that lanes lie along positions; of 32 lanes
    threads: int
    cluster: int = 1  # programs that share them, through each other's memory
    registers: int = 64  # of a lane: no more than leave room for as many programs
    turns: bool = True


# Classes side by side, class indices, with gradients, by bytes of an element. Up to the last row
# but one a row of logits is held in registers. Up to 1,024 classes are a warp's, 32 of them a lane,
# which waits for no other. Longer ones of half precision are held packed, in tiles of one load of
# 16 bytes a lane. Beyond, a row is read twice, by programs as large as they come: so few rows are
# under way that the last cache still has what the second read asks for.
CLASSES_INNER = {
    2: (
        Row(1024, 1024, 1, 32),
        Row(4096, 512, 1, 64),
        Row(8192, 1024, 1, 128),
        Row(16384, 2048, 1, 256),
        Row(32768, 4096, 1, 512),
        Row(ANY, 8192, 1, 1024),
    ),
    4: (
        Row(1024, 1024, 1, 32),
        Row(4096, 512, 1, 128),
        Row(8192, 1024, 1, 256),
        Row(16384, 2048, 1, 512),
        Row(32768, 4096, 1, 1024),
        Row(ANY, 8192, 1, 1024),
    ),
    8: (
        Row(1024, 1024, 1, 128, registers=128),
        Row(2048, 2048, 1, 128, registers=128),
        Row(4096, 4096, 1, 256, registers=128),
        Row(8192, 8192, 1, 512, registers=128),
        Row(ANY, 2048, 1, 256, registers=128),
    ),
}

# The same, where programs form clusters: instead of one that fills a multiprocessor, and has
# nothing to do while it waits for its row, several that each leave room for others.
CLUSTERED = {
    2: (
        *CLASSES_INNER[2][:4],
        Row(32768, 4096, 1, 128, 4),
        Row(65536, 8192, 1, 128, 8),
        Row(131072, 16384, 1, 128, 16),
        Row(262144, 32768, 1, 256, 16),
        CLASSES_INNER[2][-1],
    ),
    4: (
        *CLASSES_INNER[4][:4],
        Row(32768, 4096, 1, 128, 8),
        Row(65536, 8192, 1, 128, 16),
        Row(131072, 32768, 1, 256, 16),
        Row(262144, 32768, 1, 512, 16),
        CLASSES_INNER[4][-1],
    ),
    8: CLASSES_INNER[8],
}

# A loss without gradients, for which a row is read once either way.
FORWARD = {
    2: (
        Row(1024, 1024, 1, 32, registers=48),
        Row(4096, 4096, 1, 128, registers=48),
        Row(ANY, 4096, 1, 256, registers=32),
    ),
    8: (*CLASSES_INNER[8][:3], Row(ANY, 2048, 1, 256)),
}
FORWARD[4] = FORWARD[2]

# Where only short rows are held: with measures, for which a lane takes many registers, and of rows
# that are loaded element by element.
SHORT_CLASSES_INNER = {
    size: tuple(
        row._replace(registers=(64 if row.most == ANY else 128) * (2 if size == 8 else 1))
        for row in rows
    )
    for size, rows in FORWARD.items()
}

# With probabilities or class weights: weights and probabilities take registers too, so that a
# lane holds half as many logits. Rows of 16384 would spill.
DENSE_CLASSES_INNER = {
    2: (
        Row(1024, 1024, 1, 64, registers=96),
        Row(4096, 4096, 1, 256, registers=80),
        Row(8192, 8192, 1, 512, registers=80),
        Row(ANY, 4096, 1, 512),
    ),
    4: (
        Row(1024, 1024, 1, 64, registers=112),
        Row(4096, 4096, 1, 256, registers=112),
        Row(8192, 8192, 1, 512, registers=112),
        Row(ANY, 4096, 1, 512),
    ),
    8: (
        Row(1024, 1024, 1, 128, registers=192),
        Row(2048, 2048, 1, 256, registers=128),
        Row(4096, 4096, 1, 512, registers=128),
        Row(ANY, 1024, 1, 256, registers=128),
    ),
}

# The same where two rows are held, as softmax's backward pass does, and programs form clusters.
PAIRED = {
    2: (
        *DENSE_CLASSES_INNER[2][:3],
        Row(16384, 2048, 1, 128, 2, 80),
        Row(32768, 4096, 1, 128, 4, 80),
        Row(65536, 8192, 1, 128, 8, 80),
        Row(131072, 16384, 1, 128, 16, 80),
        DENSE_CLASSES_INNER[2][-1],
    ),
    4: (
        *DENSE_CLASSES_INNER[4][:3],
        Row(16384, 2048, 1, 128, 4, 80),
        Row(32768, 4096, 1, 128, 8, 80),
        Row(65536, 8192, 1, 128, 16, 80),
        Row(131072, 16384, 1, 256, 16, 80),
        DENSE_CLASSES_INNER[4][-1],
    ),
    8: DENSE_CLASSES_INNER[8],
}

# With probabilities that begin where loads do, and no class weights: both rows are held in tiles,
# half precision packed.
AIMED = {
    2: (
        Row(1024, 256, 1, 32, registers=72),
        Row(4096, 1024, 1, 128),
        Row(8192, 2048, 1, 256),
        *(row._replace(registers=96) for row in PAIRED[2][3:-1]),
        DENSE_CLASSES_INNER[2][-1],
    ),
    4: (
        Row(1024, 1024, 1, 64, registers=80),
        Row(4096, 1024, 1, 256),
        Row(8192, 2048, 1, 512),
        *(row._replace(registers=96) for row in PAIRED[4][3:-1]),
        DENSE_CLASSES_INNER[4][-1],
    ),
    8: DENSE_CLASSES_INNER[8],
}

# Positions side by side, (N, C, d1, ..., dk): a warp's lanes lie along them, and a lane walks over
# the classes of its own, or those that its warp has of them. Few classes are held, of more 8 are
# read at a time (4 in float64).
POSITIONS_INNER = {
    2: (
        Row(24, 2048, 64, 32, registers=72, turns=False),
        Row(32, 2048, 64, 32, registers=96, turns=False),
        Row(160, 8192, 64, 128, registers=72),
        Row(ANY, 512, 64, 32),
    ),
    4: (
        Row(32, 2048, 64, 64, registers=80),
        Row(160, 16384, 64, 256, registers=80),
        Row(ANY, 512, 64, 32),
    ),
    8: (Row(ANY, 128, 32, 32),),
}

# And the registers of a lane that has class weights, probabilities or measures beside its logits,
# and so holds none.
BESIDE = {"aimed": 88, "dense": 88, "pair": 88, "short": 192}

# Where classes lie side by side, but are so few that a lane walks over its rows' own. A warp writes
# them through shared memory, in the order of memory.
FEW = dict.fromkeys((2, 4), Row(32, 1024, 32, 32))


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
    cluster: int
    registers: int
    turns: bool


def tile(
    itemsize: int, inner: int, classes: int, positions_inner: bool, unit: int, kind: str = ""
) -> Tile:
    """From the tables, cut to inputs that are smaller.

    Args:
        unit: What all rows, or columns, begin at multiples of.
        kind: ``"roomier"`` where rows that begin anywhere take more registers, ``"aimed"`` where
            probabilities are held beside the logits, ``"dense"`` where class weights are too,
            ``"forward"`` where no gradient is wanted, ``"short"`` where only short rows are to be
            held, ``"pair"`` where two rows are.
    """
    few, two = FEW.get(itemsize), kind in ("aimed", "dense", "pair")
    if few is not None and classes <= few.most and not positions_inner and not two:
        loaded = min(unit, LOAD // itemsize)
        tiles = cdiv(classes, loaded)
        positions = few.positions * _warp_size() // 32
        held = Tile(positions, loaded, loaded, tiles, True, True, *few[3:])
        return held._replace(registers=112) if kind == "short" else held
    aligned = unit * itemsize >= LOAD
    if not aligned and not positions_inner:
        kind = "dense" if two else "short"
    clusters = has_clusters()
    plain = CLUSTERED if clusters else CLASSES_INNER
    tables = {
        "": plain,
        "roomier": plain,
        "aimed": AIMED,
        "dense": DENSE_CLASSES_INNER,
        "pair": PAIRED,
        "forward": FORWARD,
        "short": SHORT_CLASSES_INNER,
    }
    rows = POSITIONS_INNER[itemsize] if positions_inner else tables[kind][itemsize]
    if positions_inner and kind in BESIDE:
        rows = (rows[-1]._replace(registers=BESIDE[kind]),)
    row = next(row for row in rows if classes <= row.most and (clusters or row.cluster == 1))
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


def with_ends(tile: Tile, dtype: torch.dtype, plain: bool) -> Tile:
    """For rows that begin anywhere, whose ends take registers."""
    least = 64
    if tile.threads == 32:
        half = dtype.itemsize == 2
        least = (64 if half else 72) if plain else (96 if half else 128)
    return tile._replace(registers=max(tile.registers, least))


def programs(blocks: int, tile: Tile, device: torch.device) -> int:
    """How many there are for so many blocks.

    Those that take them by turns come in rounds, where each still has many turns: else what fits
    less than counted would take as long again, and all would wait for the slowest.
    """
    if not tile.turns:
        return blocks
    room = resident(tile, device)
    return min(blocks, room * max(1, min(ROUNDS, blocks // (room * TURNS))))


def resident(tile: Tile, device: torch.device) -> int:
    """How many programs, or clusters of them, a GPU has room for at a time.

    A cluster lies within a group of multiprocessors, which has 16 of them, or some pairs more.
    """
    each = fit(tile.threads, tile.registers, most_threads(device))
    group = next(n for n in (1, 2, 16) if n == 16 or n * each % tile.cluster == 0)
    return max(1, multiprocessors(device) // group * (group * each // tile.cluster))


def fit(threads: int, registers: int, most: int = 2048) -> int:
    """How many programs a multiprocessor has room for, of at most so many threads.

    Each quarter of it has registers of its own, which its warps take by eights of each lane.
    """
    warps = min(most // 128, REGISTERS // 4 // (32 * cdiv(registers, 8) * 8)) * 4
    return min(32, warps * 32 // threads)


@functools.cache
def roomiest(threads: int, registers: int) -> int:
    """The most registers with which as many programs fit."""
    alike = (n for n in range(248, registers, -8) if fit(threads, n) == fit(threads, registers))
    return next(alike, registers)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """An H200's, where there is no GPU and kernels are compiled alone."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def most_threads(device: torch.device) -> int:
    """Of a multiprocessor; a data centre's, where there is no GPU."""
    if device.type != "cuda":
        return 2048
    return torch.cuda.get_device_properties(device).max_threads_per_multi_processor


def options(threads: int, cluster: int = 1, registers: int | None = None) -> dict[str, Any]:
    """What Triton is told of every launch; products may become part of additions, as in C++."""
    told = {"num_warps": max(1, threads // _warp_size()), "enable_fp_fusion": True}
    if cluster > 1:
        told["num_ctas"] = cluster
    if registers is not None and is_nvidia():
        told["maxnreg"] = roomiest(threads, registers)
    return told


CLUSTERS_COMPILE = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)


def has_clusters() -> bool:
    """Hopper, and the data centres' Blackwell, whose clusters are as large."""
    if knobs.runtime.interpret or not CLUSTERS_COMPILE:
        return False
    return driver.active.get_current_target().arch in (90, 100, 103)


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
