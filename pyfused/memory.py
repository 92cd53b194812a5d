"""Large outputs on CPU take the memory of earlier ones that have been freed.

New memory is expensive: the operating system zeroes each page at its first write, which takes
longer than most kernels here take to compute what goes into it. So gradients, losses without
reduction and activations of 32 MiB or more reuse blocks that earlier ones have freed.

The environment variable ``PYFUSED_RECYCLE`` sets this for a process: ``0`` switches it off, a
larger number is the limit in bytes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from pyfused.backends import cpu

__all__ = ["Stats", "recycle", "release", "stats"]

_SHARE = 4  # free blocks may have one part in so many of the memory


class Stats(NamedTuple):
    """The state of recycling: bytes, and outputs counted since the start of the process.

    Attributes:
        in_use: Bytes of blocks that tensors are in.
        free: Bytes of blocks that wait for an output.
        limit: The most bytes that free blocks may have; 0 where nothing is recycled.
        hits: Large outputs that found a free block.
        misses: Large outputs that took a new one.
    """

    in_use: int
    free: int
    limit: int
    hits: int
    misses: int


_limit = 0


def recycle(enabled: bool = True, *, limit: int | None = None) -> None:
    """Lets large outputs on CPU take the memory of earlier ones; on by default, on Linux.

    A block that is freed stays mapped, and its pages are surrendered (``MADV_FREE``): the kernel
    takes them as soon as anyone needs memory. Until then they count as the process's own, so its
    resident memory looks larger than it is, by ``limit`` at most. An output takes a free block of
    its size, or of up to an eighth more. Where the address space is limited (``RLIMIT_AS``) blocks
    are given back at once.

    Such a tensor is like any other, but its storage cannot be resized: ``resize_`` to more elements
    and ``untyped_storage().resize_`` raise torch's ``RuntimeError``, as they do for tensors made
    from NumPy's arrays. torch's profiler does not count its memory.

    Args:
        enabled: False switches recycling off and gives the free blocks back; every large output
            takes new memory then, up to twice as slowly.
        limit: The most bytes of free blocks; those freed first go first. By default a quarter of
            the machine's memory, or of the control group's limit if that is less.

    Raises:
        RuntimeError: The system is not Linux, and ``enabled`` was asked for.
        TypeError, ValueError: ``limit`` is no positive int, or given with ``enabled=False``.
    """
    global _limit
    if limit is not None:
        if not isinstance(limit, int) or isinstance(limit, bool):
            raise TypeError(f"limit: expected an int, got {type(limit).__name__} {limit!r}")
        if limit <= 0:
            raise ValueError(f"limit: expected a positive number of bytes, got {limit}")
        if not enabled:
            raise ValueError(f"limit: expected none with enabled=False, got {limit}")
    if cpu.RECYCLES:
        _limit = (_default_limit() if limit is None else limit) if enabled else 0
        cpu.native.recycler_limit(_limit)
    elif enabled:
        raise RuntimeError("recycle: expected Linux, which this system is not")


def release() -> int:
    """Gives the memory of all free blocks back to the system.

    The next large outputs take new memory.

    Returns:
        The number of bytes given back.
    """
    return int(cpu.native.recycler_release()) if cpu.RECYCLES else 0


def stats() -> Stats:
    """Returns how much memory is in use and free, and how often an output found a free block."""
    if not cpu.RECYCLES:
        return Stats(0, 0, 0, 0, 0)
    in_use, free, hits, misses = cpu.native.recycler_stats()
    return Stats(in_use, free, _limit, hits, misses)


def _default_limit() -> int:
    """Returns a share of the memory, or 0 where the system charges for unused mappings."""
    if _number(Path("/proc/sys/vm/overcommit_memory")) == 2:
        return 0
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([memory, *_group_limits()]) // _SHARE


def _group_limits() -> list[int]:
    """Returns the limits in bytes of the process's control group and of those that hold it."""
    limits = []
    try:
        groups = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if controllers == "":
            root, name = Path("/sys/fs/cgroup"), "memory.max"
        elif "memory" in controllers.split(","):
            root, name = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
        else:
            continue
        folder = root / path.lstrip("/")
        limits += [_number(each / name) for each in (folder, *folder.parents)]
    return [limit for limit in limits if limit is not None]


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none, or "max"
        return None


def _as_asked() -> None:
    asked = os.environ.get("PYFUSED_RECYCLE", "1")
    if not asked.isdecimal():
        raise ImportError(f"PYFUSED_RECYCLE: expected 0 or a number of bytes, got {asked!r}")
    if cpu.RECYCLES:
        recycle(asked != "0", limit=int(asked) if int(asked) > 1 else None)


_as_asked()
