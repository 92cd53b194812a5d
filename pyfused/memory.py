"""What the allocator does with the memory of large tensors."""

from __future__ import annotations

import ctypes

__all__ = ["keep_pages"]

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_pages() -> None:
    """Asks glibc to keep the memory of freed tensors, for the whole process, and from now on.

    Otherwise every CPU tensor of 32 MiB or more is mapped anew when it is made and unmapped when it
    goes. The kernel then zeroes its pages one fault at a time, which can take longer than to
    compute what is in them; so it is for torch's operators as for pyfused's.

    What it costs: the process holds on to the most memory that it ever used, and free memory in
    pieces may not add up to the next large tensor. Nothing else in pyfused calls this.

    Raises:
        RuntimeError: The process does not allocate with glibc; nothing has been changed.
    """
    try:
        process, glibc = ctypes.CDLL(None), ctypes.CDLL("libc.so.6")
        mallopt = glibc.mallopt
    except (AttributeError, OSError, TypeError):
        raise RuntimeError("keep_pages: expected glibc, which this system does not have") from None
    if _address(process) != _address(glibc):
        raise RuntimeError(
            "keep_pages: expected glibc's malloc, got another that was loaded before it; "
            "it has settings of its own"
        )
    for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)):
        if not mallopt(parameter, value):
            raise RuntimeError(f"keep_pages: glibc refused mallopt({parameter}, {value})")


def _address(library: ctypes.CDLL) -> int | None:
    return ctypes.cast(library.malloc, ctypes.c_void_p).value
