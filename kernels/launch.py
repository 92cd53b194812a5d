"""Block sizes and warps of every kernel, from the number of classes and the size of an element.

No GPU has measured these choices yet: each has an arithmetic reason, given beside it. `make
gpu-compile` shows that none of them spills, and `make gpu-check` times their neighbours on a GPU.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from triton import knobs
from triton.runtime import driver


class Choice(NamedTuple):
    """A program's tile of `rows` x `block` elements, and the threads that share it."""

    rows: int
    block: int
    threads: int
    whole_row: bool = True  # the tile holds all classes, so that they are read once

    def options(self) -> dict[str, Any]:
        """What Triton takes with every launch."""
        return {"num_warps": max(1, self.threads // warp_size()), "enable_fp_fusion": True}

    def tile(self) -> dict[str, Any]:
        """The same, with the constants of a kernel of `rows.py`."""
        return {"ROWS": self.rows, "BLOCK": self.block, **self.options()}


def choose(
    itemsize: int,
    classes: int = 0,
    inner: int = 1,
    *,
    tensors: int = 1,
    inner_contiguous: bool = False,
) -> Choice:
    """The tile of a program.

    Args:
        itemsize: Bytes of an element of the input.
        classes: Number of classes; 0 for kernels that work element by element.
        inner: Number of inner indices: see `rows.py`.
        tensors: How many tiles a thread keeps in registers at a time.
        inner_contiguous: Inner indices are contiguous in memory, (N, C, d1, ..., dk), not classes.
    """
    vector = 16 // itemsize  # elements of the widest load
    if not classes:
        # Two such loads of each operand, so that the second is under way while the first is used.
        return Choice(1, 2 * vector * 128, 128)
    # Elements of a thread: 32 hide the latency of memory and leave it registers to compute with.
    # Those of float64 are twice as wide, and its functions take more of them.
    each = (32 if itemsize < 8 else 8) // tensors
    if inner_contiguous:
        # A thread has as many rows as it can load at once, and so adds up their classes alone.
        threads = min(128, max(32, power_of_2(inner) // vector))
        rows = min(threads * vector, power_of_2(inner))
        block = min(power_of_2(classes), max(1, each // vector))
        return Choice(rows, block, threads, block >= classes)
    block = power_of_2(classes)
    if block <= 512 * each:
        # A warp has up to 1024 elements, of several rows if they are short, and needs no barrier.
        threads = max(32, block // each)
        return Choice(max(1, 32 * each // block), block, threads)
    # Longer rows are read twice, by programs small enough for several on a multiprocessor: others
    # load while one waits at its end.
    return Choice(1, 128 * each, 128, whole_row=False)


def power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n."""
    return 1 << (n - 1).bit_length()


@functools.cache
def warp_size() -> int:
    """Threads of a warp: 32 on NVIDIA GPUs, 32 or 64 on AMD GPUs."""
    return 32 if knobs.runtime.interpret else int(driver.active.get_current_target().warp_size)
