"""Recycles the memory of large outputs on CPU.

New memory is expensive: the operating system zeroes each page at its first write, which takes
longer than most kernels take to compute its contents. So gradients, unreduced losses and
activations of 32 MiB or more reuse blocks that earlier outputs have freed.

The environment variable ``PYFUSED_RECYCLE`` configures this for a process: ``0`` switches it off,
and a number above 1 is the limit in bytes.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

from pyfused.backends import cpu

__all__ = ["Stats", "recycle", "release", "stats"]

_DEFAULT_LIMIT = 1 / 4  # of the machine's memory


class Stats(NamedTuple):
    """The state of recycling.

    Attributes:
        in_use: Bytes of the blocks that hold tensors.
        free: Bytes of the free blocks.
        limit: The maximum number of bytes of free blocks; 0 if recycling is off.
        hits: The number of large outputs, since the process started, that reused a free block.
        misses: The number of large outputs, since the process started, that took new memory.
    """

    in_use: int
    free: int
    limit: int
    hits: int
    misses: int


_limit = 0


def recycle(enabled: bool = True, *, limit: int | None = None) -> None:
    """Reuses the memory of earlier large outputs on CPU; on by default on Linux.

    A freed block stays mapped, and its pages are released with ``MADV_FREE``: the operating system
    reclaims them when it needs memory. Until then they count as resident memory of the process, up
    to ``limit``. An output reuses a free block of its size or up to an eighth larger. If the
    address space is limited (``RLIMIT_AS``), blocks are unmapped immediately.

    The storage of such a tensor cannot be resized: ``resize_`` to more elements and
    ``untyped_storage().resize_`` raise torch's ``RuntimeError``, as they do for tensors made from
    NumPy arrays. torch's profiler does not count its memory.

    Args:
        enabled: False switches recycling off and unmaps the free blocks; every large output then
            takes new memory, which is up to twice as slow.
        limit: The maximum number of bytes of free blocks; the oldest are unmapped first. By default
            a quarter of the machine's memory, or of the control group's limit if that is less.

    Raises:
        RuntimeError: ``enabled`` is True and the system is not Linux.
        TypeError, ValueError: ``limit`` is not a positive int, or is passed with ``enabled=False``.
    """
    global _limit
    if limit is not None:
        if not isinstance(limit, int) or isinstance(limit, bool):
            raise TypeError(f"limit: expected an int, got {type(limit).__name__} {limit!r}")
        if limit <= 0:
            raise ValueError(f"limit: expected a positive number of bytes, got {limit}")
        if not enabled:
            raise ValueError(f"limit: expected None with enabled=False, got {limit}")
    if cpu.RECYCLES:
        _limit = (_default_limit() if limit is None else limit) if enabled else 0
        cpu.native.recycler_limit(_limit)
    elif enabled:
        raise RuntimeError("enabled: expected False on systems other than Linux, got True")


def release() -> int:
    """Returns the memory of all free blocks to the system; later large outputs take new memory.

    Returns:
        The number of bytes.
    """
    return int(cpu.native.recycler_release()) if cpu.RECYCLES else 0


def stats() -> Stats:
    """Returns how much memory is in use and free, and how often an output reused a block."""
    if not cpu.RECYCLES:
        return Stats(0, 0, 0, 0, 0)
    in_use, free, hits, misses = cpu.native.recycler_stats()
    return Stats(in_use, free, _limit, hits, misses)


def _default_limit() -> int:
    """Returns a fraction of the memory, or 0 if the system counts unused mappings as used."""
    if _number(Path("/proc/sys/vm/overcommit_memory")) == 2:
        return 0
    return int(physical_memory() * _DEFAULT_LIMIT)


@cache
def physical_memory() -> int:
    """Returns the bytes of memory that the process may use, 0 if the number is unknown.

    This is the machine's memory, or the limit of a control group if that is less.
    """
    names = getattr(os, "sysconf_names", {})
    if not {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= names.keys():
        return 0
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *_group_limits()])


def _group_limits() -> list[int]:
    """Returns the limits in bytes of the process's control groups and their parents."""
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
    except (OSError, ValueError):  # no such file, or "max"
        return None


def _configure() -> None:
    value = os.environ.get("PYFUSED_RECYCLE", "1")
    if not value.isdecimal():
        raise ImportError(f"PYFUSED_RECYCLE: expected 0 or a number of bytes, got {value!r}")
    if cpu.RECYCLES:
        recycle(value != "0", limit=int(value) if int(value) > 1 else None)


_configure()
