"""Block sizes and threads, as tables: data, so that nobody waits for a search at a first call.

Nothing here has been measured yet: the reasons are arithmetic, and what `make gpu-model` predicts.
`make gpu-compile` shows that no row spills registers, `make gpu-check` measures them on a GPU.
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


class Elements(NamedTuple):
    """Elements that a program takes at a time, and its threads."""

    block: int
    threads: int


# Element by element, by bytes of an element: of each operand two loads of 16 bytes a lane, in
# float64 as many. Twice as many, and a weighted loss spills on one target.
POINTWISE = {2: Elements(2048, 128), 4: Elements(1024, 128), 8: Elements(512, 128)}
# Programs of a kernel that sums, or that may have nothing to do: some waves on any GPU of today,
# and so few partial sums that they are added up in a microsecond or two.
MOST_PROGRAMS = 4096
# Adding up partial sums: so many a program.
SUM = Elements(4096, 256)
# Counting targets, 8 bytes each: two loads of 16 bytes a lane, at most so many programs by turns.
COUNT = Elements(1024, 256)
MOST_COUNTERS = 256


class Row(NamedTuple):
    """How cross-entropy takes inputs of up to `most` classes."""

    most: float
    elements: int  # a program holds at a time
    positions: int  # at least, of these, so that lanes lie along positions
    threads: int
    stay: int = 0  # programs on a multiprocessor, which load the next row ahead; 0: one for each


# Classes side by side, class indices without smoothing, by bytes of an element. Up to the last row
# but one a row of logits is held in registers, 32 of them a lane (16 in float64). Up to 1,024 of
# them are a warp's, which waits for no other; few classes share it, so that it has enough to do.
# The largest of half precision fill a multiprocessor with one program: it stays, and loads the next
# row meanwhile, for which float32 has no registers left, nor have two programs of half that size.
# Beyond, a row is read twice, in chunks of 16 elements a lane, by programs so small that several
# are under way on each multiprocessor.
CLASSES_INNER = {
    2: (
        Row(1024, 1024, 1, 32),
        Row(4096, 4096, 1, 128),
        Row(8192, 8192, 1, 256),
        Row(16384, 16384, 1, 512),
        Row(32768, 32768, 1, 1024, 1),
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
CLASSES_INNER[4] = tuple(row._replace(stay=0) for row in CLASSES_INNER[2])

# With smoothing a lane takes twice the registers, so that beyond 4,096 classes a row in registers
# would leave one or two programs to a multiprocessor: it is read twice.
UNIFORM_CLASSES_INNER = {
    size: tuple(row for row in rows if row.most <= 4096 or row.most == ANY)
    for size, rows in CLASSES_INNER.items()
}

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

# Positions side by side, (N, C, d1, ..., dk): a warp's lanes lie along them, 8 bytes each, and a
# lane walks over the classes of its own, 8 at a time: no lane waits for another.
POSITIONS_INNER = {
    2: (Row(ANY, 1024, 128, 32),),
    4: (Row(ANY, 512, 64, 32),),
    8: (Row(ANY, 256, 32, 32),),
}


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
    threads: int
    stay: int


def tile(itemsize: int, inner: int, classes: int, positions_inner: bool, kind: str = "") -> Tile:
    """From the tables, cut to inputs that are smaller.

    Args:
        kind: ``"dense"`` where what is aimed at is held beside the logits, ``"uniform"`` where it
            is the same for all classes.
    """
    tables = {"dense": DENSE_CLASSES_INNER, "uniform": UNIFORM_CLASSES_INNER}
    table = POSITIONS_INNER if positions_inner else tables.get(kind, CLASSES_INNER)
    row = next(row for row in table[itemsize] if classes <= row.most)
    padded = triton.next_power_of_2(classes)
    positions = max(row.positions, row.elements // padded)
    positions = min(positions, triton.next_power_of_2(inner))
    return Tile(positions, min(padded, max(1, row.elements // positions)), row.threads, row.stay)


def splits(positions: int, classes: int, chunk: int) -> tuple[int, int]:
    """Over how many programs the classes of each position are spread, and how many each takes."""
    if positions >= SPLIT.positions or classes < 2 * SPLIT.classes or classes <= chunk:
        return 1, classes
    wanted = min(classes // SPLIT.classes, max(1, SPLIT.programs // positions))
    length = triton.cdiv(triton.cdiv(classes, wanted), chunk) * chunk
    return triton.cdiv(classes, length), length


def options(threads: int, stay: int = 0) -> dict[str, Any]:
    """What Triton is told of every launch; products may become part of additions, as in C++.

    Args:
        stay: Programs that have to fit on a multiprocessor together.
    """
    told = {"num_warps": max(1, threads // _warp_size()), "enable_fp_fusion": True}
    if stay and _warp_size() == 32 and not knobs.runtime.interpret:
        told["maxnreg"] = 65_536 // (threads * stay)
    return told


@functools.cache
def may_stay() -> bool:
    """Where the compiler finds registers for the next row: on Hopper; elsewhere it spills some."""
    return knobs.runtime.interpret or driver.active.get_current_target().arch == 90


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if knobs.runtime.interpret:
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


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
    """What all of these are multiples of: 2, 4 or 8; 1 where Triton finds out by itself.

    It looks whether a number is a multiple of 16, and else loads element by element.
    """
    common = math.gcd(16, *lengths)
    return common if common < 16 else 1


def index_type(*reaches: int) -> tl.dtype:
    """What holds any of these offsets, and the block that the last of them may lie in."""
    return tl.int32 if max(reaches) < 2**31 - 2**20 else tl.int64
