"""Reuses freed memory on CPU.

New memory is expensive: the operating system zeroes each page at its first write, which takes
longer than most kernels take to compute its contents. `keep` retains all memory that the process
frees. Without it, pyfused's gradients of 32 MiB or more reuse the memory of earlier ones, which is
called recycling. Results are not recycled, because programs may resize their storage to free it.

The environment variable ``PYFUSED_RECYCLE`` configures recycling: ``0`` switches it off, and a
number above 1 is the limit in bytes.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import warnings
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pyfused.backends import cpu
from pyfused.locks import fork_safe_lock

__all__ = ["Keep", "Stats", "keep", "recycle", "release", "stats", "trim"]


class Stats(NamedTuple):
    """The state of recycling and of :func:`keep`.

    Attributes:
        in_use: Bytes of the recycled blocks that hold tensors.
        free: Bytes of the free blocks.
        limit: The maximum number of bytes of free blocks; 0 if recycling is off.
        hits: The number of large gradients, since the process started, that reused a free block.
        misses: The number of large gradients, since the process started, that took new memory.
        keeps: Whether :func:`keep` is in effect.
        pages_are_kept: Whether the next block of 64 MiB reuses the pages of a freed one, because of
            :func:`keep`, or because another allocator or the environment decides. The latter is
            measured, once and in a few milliseconds.
        glibc: The version of glibc, None for other C libraries. :func:`keep` can triple a peak
            before 2.39, and raise it by 40 % since.
    """

    in_use: int
    free: int
    limit: int
    hits: int
    misses: int
    keeps: bool
    pages_are_kept: bool
    glibc: str | None


# ---- all memory of the process -------------------------------------------------------------------

_BLOCK = 64 << 20  # bytes of a block that is allocated to see where torch's memory comes from
# Parameters of glibc's mallopt, from malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_KEEP = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1}  # no block has its own mapping; the heap never shrinks
# glibc's defaults. It raises the thresholds up to these values while a program frees large blocks,
# but no longer after a parameter has been set.
_DEFAULTS = {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}
_VARIABLES = ("mmap_max", "mmap_threshold", "trim_threshold", "top_pad")  # have the same effect


class _Setting(NamedTuple):
    enabled: bool
    trim_every: float | None = None


_OFF = _Setting(False)
_active = _OFF
_lock = fork_safe_lock()  # held while malloc's parameters are set
_stop = threading.Event()  # ends the thread that returns free pages


class Keep:
    """The result of :func:`keep`, a context manager."""

    def __init__(self, before: Any) -> None:
        self._before, self._process, self._state = before, os.getpid(), "not entered"

    def __enter__(self) -> None:
        if self._state != "not entered":
            raise RuntimeError("keep: expected one block for each call, got another one")
        self._state = "active"

    def __exit__(self, *error: object) -> None:
        if self._state != "active":
            raise RuntimeError("keep: the block was left without being entered, or left twice")
        self._state = "left"
        if self._process == os.getpid():  # a forked child has glibc's settings
            _set(self._before)


def keep(enabled: bool = True, *, trim_every: float | None = 30.0) -> Keep:
    """Keeps the memory that the process frees, so that later tensors reuse its pages.

    By default, glibc's ``malloc`` returns large blocks to the system when they are freed, and each
    training step pays for new pages. From this call on, in all threads, blocks are taken from the
    heap, and the heap does not shrink. The process then holds the most memory that it has ever
    used, and more if blocks of many sizes fragment the heap. A daemon thread therefore returns the
    free pages every ``trim_every`` seconds, which makes one step slower. Call `keep` once, at the
    start of a program: it is a setting of the process, and the last call decides, in all threads.
    ``with keep():`` and ``with keep(False):`` restore at the end of the block what was set before.

    It sets two parameters of ``mallopt``: ``M_MMAP_MAX`` to 0 and ``M_TRIM_THRESHOLD`` to its
    maximum. Blocks of 64 MiB or more of other threads than the main one are not kept, because
    glibc's heaps for these threads are smaller. A child process of ``os.fork`` restores glibc's
    defaults and releases its copy of the free memory; it may call `keep` itself.

    Args:
        enabled: False ends an earlier call: it returns free memory to the system and restores
            glibc's defaults, with the largest thresholds that glibc chooses by itself: it returns
            blocks of 32 MiB or more when they are freed.
        trim_every: The number of seconds after which the thread returns the free pages, again and
            again. None for never: call :func:`trim`.

    Returns:
        A context manager for one block. Entering another one, or leaving one that was not entered,
        raises a RuntimeError.

    Raises:
        TypeError: ``enabled`` is not a bool, or ``trim_every`` is neither a number nor None.
        ValueError: ``trim_every`` is not positive, or not finite.

    Warns:
        RuntimeWarning: Nothing has changed, because torch's memory does not come from glibc's
            ``malloc``, which is measured, or because the environment configures it
            (``MALLOC_MMAP_MAX_``, ``GLIBC_TUNABLES``, and others). The message says whether freed
            memory is kept anyway.
    """
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled: expected a bool, got {type(enabled).__name__} {enabled!r}")
    if trim_every is not None:
        if not isinstance(trim_every, (int, float)) or isinstance(trim_every, bool):
            got = f"{type(trim_every).__name__} {trim_every!r}"
            raise TypeError(f"trim_every: expected a number of seconds or None, got {got}")
        if not 0 < trim_every <= threading.TIMEOUT_MAX:
            expected = f"a positive number of at most {threading.TIMEOUT_MAX:g} seconds, or None"
            raise ValueError(f"trim_every: expected {expected}, got {trim_every}")
    if enabled and (reason := why_not_kept()):
        state = "kept without it" if pages_are_kept() else "not kept"
        message = f"keep: nothing has changed: {reason}; freed memory is {state}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    call = Keep(_active)
    _set(_Setting(True, trim_every) if enabled else _OFF)
    return call


def trim() -> bool:
    """Returns the free pages of glibc's heaps to the system, as ``keep(trim_every=...)`` does.

    Returns:
        Whether any pages were returned; False if the C library is not glibc.
    """
    libc = _libc()
    return libc is not None and libc.malloc_trim(0) == 1


def pages_are_kept() -> bool:
    """Returns whether the next block of 64 MiB reuses the pages of a freed one.

    If :func:`keep` cannot set malloc's parameters, this is measured, once in a process.
    """
    return _active.enabled if why_not_kept() is None else _reuses_pages()


@cache
def _reuses_pages() -> bool:
    """Allocates, touches and frees a block a few times, and counts the page faults."""
    if _libc() is None:
        return False
    import resource

    # An allocator may return some freed pages from time to time, or use other pages at first. Later
    # blocks fit where the first one was, even if small blocks have taken a part of it.
    for number in range(8):
        block = _block(1 if number else 2)
        faults = -resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        ctypes.memset(block.data_ptr(), 0, block.nbytes())
        del block
        faults += resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        if number and faults < _BLOCK >> 22:  # half the number of its huge pages
            return True
    return False


def _block(count: int = 1) -> torch.UntypedStorage:
    """Returns a large block of torch's memory, whatever modes are active."""
    return torch.UntypedStorage(count * _BLOCK, device="cpu")


@cache
def why_not_kept() -> str | None:
    """Returns why `keep` cannot set the parameters of the process's malloc, None if it can."""
    libc = _libc()
    if libc is None:
        return "the C library is not glibc"
    library = _library_of(libc.posix_memalign)
    if library != _library_of(libc.gnu_get_libc_version):
        return f"malloc comes from {library}"
    if not _torch_uses_glibc():
        return (
            "torch's memory does not come from glibc's malloc. If it comes from mimalloc, as on "
            "ARM64, set MIMALLOC_PURGE_DELAY=-1 before the process starts"
        )
    variables = _environment()
    known = [f"MALLOC_{name.upper()}_" for name in _VARIABLES]
    names = [name for name in known if name in variables]
    # glibc may have replaced the colons in GLIBC_TUNABLES by the ends of variables.
    settings = ":".join((variables.get("GLIBC_TUNABLES", ""), *(f"{name}=" for name in variables)))
    if any(f"glibc.malloc.{name}=" in settings for name in _VARIABLES):
        names.append("GLIBC_TUNABLES")
    return f"the environment configures malloc; unset {', '.join(names)}" if names else None


class _MallocInfo(ctypes.Structure):
    """The result of mallinfo2; hblkhd and uordblks are at the indices 4 and 7."""

    _fields_ = [("sizes", ctypes.c_size_t * 10)]


def _used() -> int | None:
    """Returns the bytes of all blocks of glibc's malloc, None if it has no counters."""
    libc: Any = _libc()
    if not hasattr(libc, "mallinfo2"):  # before glibc 2.33
        return None
    libc.mallinfo2.restype = _MallocInfo
    sizes = libc.mallinfo2().sizes
    return int(sizes[4] + sizes[7])


def _torch_uses_glibc() -> bool:
    """Returns whether a block of torch's is counted by glibc; True without counters."""
    for _ in range(3):  # another thread may free memory meanwhile
        before = _used()
        block = _block()
        after = _used()
        del block
        if before is None or after is None or after - before > _BLOCK // 2:
            return True
    return False


def _set(setting: _Setting) -> None:
    """Sets malloc's parameters, and starts or ends the thread that returns free pages."""
    global _active, _stop
    if why_not_kept() is not None:
        return
    _restore_in_children()
    with _lock:
        if setting == _active:
            return
        if setting.enabled != _active.enabled:
            _set_parameters(_KEEP if setting.enabled else _DEFAULTS)
        _active = setting
        _stop.set()
        if not setting.enabled:
            trim()
        elif setting.trim_every is not None:
            _stop = threading.Event()
            arguments = setting.trim_every, _stop
            threading.Thread(target=_trim_every, args=arguments, name="keep", daemon=True).start()


def _set_parameters(parameters: dict[int, int]) -> None:
    for parameter, value in parameters.items():
        if _libc().mallopt(parameter, value) != 1:
            raise RuntimeError(f"mallopt({parameter}, {value}): expected 1, got 0")


def _trim_every(seconds: float, stop: threading.Event) -> None:
    while not stop.wait(seconds):
        trim()


@cache
def _restore_in_children() -> None:
    """Makes child processes restore glibc's defaults: they have no thread that returns pages.

    They also release their copies of free memory, which the parent writes again.
    """

    def restore() -> None:
        global _active, _stop
        if _active.enabled:
            _active, _stop = _OFF, threading.Event()
            _set_parameters(_DEFAULTS)
            trim()

    os.register_at_fork(after_in_child=restore)


@cache
def _libc() -> Any:
    """Returns the process's C library, None if it is not glibc."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "gnu_get_libc_version") else None


def _glibc_version() -> str | None:
    if (libc := _libc()) is None:
        return None
    libc.gnu_get_libc_version.restype = ctypes.c_char_p
    return str(libc.gnu_get_libc_version(), "ascii")


def _library_of(function: Any) -> str:
    """Returns the path of the library that defines a function."""
    info = (ctypes.c_char_p * 4)()  # Dl_info: the path, and three pointers that are not read
    _libc().dladdr(ctypes.cast(function, ctypes.c_void_p), info)
    return os.fsdecode(info[0] or b"an unknown library")


def _environment() -> dict[str, str]:
    """Returns the environment variables that the process started with, which malloc has read."""
    try:
        variables = os.fsdecode(Path("/proc/self/environ").read_bytes()).split("\0")
    except OSError:
        return dict(os.environ)
    return dict(variable.split("=", 1) for variable in variables if "=" in variable)


# ---- gradients of pyfused ------------------------------------------------------------------------

_limit = 0


def recycle(enabled: bool = True, *, limit: int | None = None) -> None:
    """Reuses the memory of earlier large gradients on CPU; on by default on Linux.

    A freed block stays mapped, and its pages are released with ``MADV_FREE``: the operating system
    reclaims them when it needs memory. Until then they count as resident memory of the process, up
    to ``limit``. A gradient reuses a free block of its size or up to an eighth larger. If the
    address space is limited (``RLIMIT_AS``), blocks are unmapped immediately.

    The storage of such a gradient, of 32 MiB or more, cannot be resized: ``resize_`` to more
    elements and ``untyped_storage().resize_`` raise torch's ``RuntimeError``, as they do for
    tensors made from NumPy arrays. torch's profiler does not count its memory. Results, such as
    activations and unreduced losses, are allocated by torch.

    Args:
        enabled: False switches recycling off and unmaps the free blocks; every large gradient then
            takes new memory, which is up to twice as slow.
        limit: The maximum number of bytes of free blocks; the oldest are unmapped first. By default
            a quarter of the machine's memory, or of the control group's limit if that is less.

    Raises:
        RuntimeError: ``enabled`` is True without the CPU kernels or on another system than Linux.
        TypeError: ``enabled`` is not a bool, or ``limit`` is not an int.
        ValueError: ``limit`` is not positive, or is passed with ``enabled=False``.
    """
    global _limit
    if not isinstance(enabled, bool):
        got = f"{type(enabled).__name__} {enabled!r}; pass a number of bytes as limit="
        raise TypeError(f"enabled: expected a bool, got {got}")
    if limit is not None:
        if not isinstance(limit, int) or isinstance(limit, bool):
            raise TypeError(f"limit: expected an int, got {type(limit).__name__} {limit!r}")
        if limit <= 0:
            raise ValueError(f"limit: expected a positive number of bytes, got {limit}")
        if not enabled:
            raise ValueError(f"limit: expected None with enabled=False, got {limit}")
    if cpu.RECYCLES:
        _limit = min(_default_limit() if limit is None else limit, sys.maxsize) if enabled else 0
        cpu.native.recycler_limit(_limit)
    elif enabled:
        raise RuntimeError("enabled: expected False without CPU kernels for Linux, got True")


def release() -> int:
    """Returns the memory of all free blocks to the system; later large gradients take new memory.

    Returns:
        The number of bytes.
    """
    return int(cpu.native.recycler_release()) if cpu.RECYCLES else 0


def stats() -> Stats:
    """Returns how much memory is in use and free, and how often a gradient reused a block."""
    in_use, free, hits, misses = cpu.native.recycler_stats() if cpu.RECYCLES else (0, 0, 0, 0)
    kept = _active.enabled, pages_are_kept()
    return Stats(in_use, free, _limit, hits, misses, *kept, _glibc_version())


def _default_limit() -> int:
    """Returns a quarter of the memory, or 0 if the system counts unused mappings as used."""
    if _number(Path("/proc/sys/vm/overcommit_memory")) == 2:
        return 0
    return physical_memory() // 4


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
    value = os.environ.get("PYFUSED_RECYCLE") or "1"
    if not value.isdecimal():
        raise ImportError(f"PYFUSED_RECYCLE: expected 0 or a number of bytes, got {value!r}")
    if cpu.RECYCLES:
        recycle(value != "0", limit=int(value) if int(value) > 1 else None)


_configure()
