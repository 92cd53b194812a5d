"""Reuses freed memory on CPU.

New memory is expensive: the operating system zeroes each page at its first write, which takes
longer than most kernels take to compute its contents. `keep` retains all memory that the process
frees. Without it, gradients, unreduced losses and activations of 32 MiB or more that pyfused
computes reuse blocks that earlier outputs have freed.

The environment variable ``PYFUSED_RECYCLE`` configures the latter for a process: ``0`` switches it
off, and a number above 1 is the limit in bytes.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from pyfused.backends import cpu

__all__ = ["Keep", "Stats", "keep", "recycle", "release", "stats"]

_DEFAULT_LIMIT = 1 / 4  # of the machine's memory


class Stats(NamedTuple):
    """The state of recycling and of :func:`keep`.

    Attributes:
        in_use: Bytes of the blocks that hold tensors.
        free: Bytes of the free blocks.
        limit: The maximum number of bytes of free blocks; 0 if recycling is off.
        hits: The number of large outputs, since the process started, that reused a free block.
        misses: The number of large outputs, since the process started, that took new memory.
        keeps: Whether :func:`keep` is in effect.
    """

    in_use: int
    free: int
    limit: int
    hits: int
    misses: int
    keeps: bool


# ---- all memory of the process -------------------------------------------------------------------

# Parameters of glibc's mallopt, from malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_KEEP = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1}  # no block has its own mapping; the heap never shrinks
# glibc's defaults. It raises the thresholds up to these values while a program frees large blocks,
# but no longer after a parameter has been set.
_DEFAULTS = {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}
# Free pages are returned this often. Otherwise sizes that change from step to step fragment the
# heap: with sequences of 64 to 512 tokens, a small GPT had 4.3 GiB after 400 steps instead of 1.7.
_SECONDS = 30.0
_VARIABLES = ("mmap_max", "mmap_threshold", "trim_threshold", "top_pad")  # set the same

_lock = threading.Lock()
# The calls of keep() that have not ended, and the number of active ``with`` blocks.
_calls: frozenset[Keep] = frozenset()
_blocks = 0
_ended = threading.Event()  # set when the last user of `keep` ends
on_change: list[Callable[[], None]] = []  # called when `keep` begins or ends to have an effect


class Keep:
    """The result of :func:`keep`, a context manager."""

    def __enter__(self) -> None:
        with _lock:
            _set_users(_calls - {self}, _blocks + 1)

    def __exit__(self, *error: object) -> None:
        with _lock:
            _set_users(_calls, _blocks - 1)


def keep(enabled: bool = True) -> Keep:
    """Keeps the memory that the process frees, so that later tensors reuse its pages.

    By default, glibc's ``malloc`` returns large blocks to the system when they are freed, and each
    training step pays for new pages. From this call on, in all threads, blocks are taken from the
    heap, and the heap does not shrink. The process then holds the most memory that it has ever
    used, and more if blocks of many sizes fragment the heap. A daemon thread therefore returns the
    free pages every 30 seconds, which makes one step slower. Call `keep` at the start of a program.
    ``with keep():`` lasts for the block.

    It sets two parameters of ``mallopt``: ``M_MMAP_MAX`` to 0 and ``M_TRIM_THRESHOLD`` to its
    maximum. Blocks of 64 MiB or more of other threads than the main one are not kept, because
    glibc's heaps for these threads are smaller. A child process of ``os.fork`` inherits the
    parameters, and releases its copy of the free memory.

    Args:
        enabled: False returns free memory to the system and restores glibc's defaults, with the
            largest thresholds that glibc chooses by itself: it returns blocks of 32 MiB or more
            when they are freed.

    Returns:
        A context manager: the call ends when the block ends.

    Raises:
        TypeError: ``enabled`` is not a bool.

    Warns:
        RuntimeWarning: Nothing has changed, because ``malloc`` is not glibc's, or because the
            environment configures it (``MALLOC_MMAP_MAX_``, ``GLIBC_TUNABLES``, and others).
    """
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled: expected a bool, got {type(enabled).__name__} {enabled!r}")
    if enabled and (reason := why_not_kept()):
        warnings.warn(f"keep: nothing has changed: {reason}", RuntimeWarning, stacklevel=2)
    new = Keep()
    with _lock:
        _set_users(_calls | {new} if enabled else frozenset(), _blocks)
    return new


@cache
def why_not_kept() -> str | None:
    """Returns why `keep` cannot set the parameters of the process's malloc, None if it can."""
    libc = _libc()
    if libc is None:
        return "the C library is not glibc"
    library = _library_of(libc.posix_memalign)
    if library != _library_of(libc.gnu_get_libc_version):
        return f"malloc comes from {library}"
    variables = _environment()
    known = [f"MALLOC_{name.upper()}_" for name in _VARIABLES]
    names = [name for name in known if name in variables]
    tunables = variables.get("GLIBC_TUNABLES", "")
    if any(f"glibc.malloc.{name}=" in tunables for name in _VARIABLES):
        names.append("GLIBC_TUNABLES")
    return f"the environment configures malloc by {', '.join(names)}" if names else None


def _set_users(calls: frozenset[Keep], blocks: int) -> None:
    """Sets the parameters for the first user of `keep`, and restores them after the last."""
    global _calls, _blocks, _ended
    was_kept, is_kept = bool(_calls or _blocks), bool(calls or blocks)
    _calls, _blocks = calls, blocks
    if is_kept is was_kept or why_not_kept():
        return
    libc: Any = _libc()
    for parameter, value in (_KEEP if is_kept else _DEFAULTS).items():
        if libc.mallopt(parameter, value) != 1:
            raise RuntimeError(f"mallopt({parameter}, {value}): expected 1, got 0")
    if is_kept:
        _trim_children()
        _ended = threading.Event()
        thread = threading.Thread(target=_trim, args=(_ended,), name="keep", daemon=True)
        thread.start()
    else:
        _ended.set()
        libc.malloc_trim(0)
    for function in on_change:
        function()


def _trim(ended: threading.Event) -> None:
    libc: Any = _libc()
    while not ended.wait(_SECONDS):
        libc.malloc_trim(0)


@cache
def _trim_children() -> None:
    """Makes child processes release their copies of free memory, which the parent writes again."""

    def trim() -> None:
        global _lock
        _lock = threading.Lock()
        if _calls or _blocks:
            libc: Any = _libc()
            libc.malloc_trim(0)

    os.register_at_fork(after_in_child=trim)


class _Library(ctypes.Structure):
    """``Dl_info``: the library that contains an address."""

    _fields_ = [
        ("path", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    ]


@cache
def _libc() -> Any:
    """Returns the process's C library, None if it is not glibc."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "gnu_get_libc_version") else None


def _library_of(function: Any) -> str:
    found = _Library()
    _libc().dladdr(ctypes.cast(function, ctypes.c_void_p), ctypes.byref(found))
    return os.fsdecode(found.path or b"an unknown library")


def _environment() -> dict[str, str]:
    """Returns the environment variables that the process started with, which malloc has read."""
    try:
        variables = os.fsdecode(Path("/proc/self/environ").read_bytes()).split("\0")
    except OSError:
        return dict(os.environ)
    return dict(variable.split("=", 1) for variable in variables if "=" in variable)


# ---- outputs of pyfused --------------------------------------------------------------------------

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
    in_use, free, hits, misses = cpu.native.recycler_stats() if cpu.RECYCLES else (0, 0, 0, 0)
    return Stats(in_use, free, _limit, hits, misses, bool(_calls or _blocks) and not why_not_kept())


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
