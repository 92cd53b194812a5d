"""The version of glibc, and the tunables with which ``python -m pyfused run`` starts.

It imports nothing else of pyfused and no torch, which takes a second.
"""

from __future__ import annotations

import os
import re
import sys
from itertools import takewhile

# Before 2.39, glibc puts what it has cut off an aligned block into caches of small blocks, and not
# back to the block when that is freed (https://sourceware.org/bugzilla/show_bug.cgi?id=30723).
# These tunables switch the caches off. glibc reads them when a process starts.
TUNABLES = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"
_FIRST_WITHOUT = (2, 39)
_RESTARTED = "PYFUSED_RESTARTED"  # set in the environment of the new process until it has started


def version() -> str | None:
    """Returns the version of glibc, None for other C libraries."""
    if sys.platform != "linux":
        return None
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (OSError, ValueError):
        return None
    return version if name == "glibc" else None


def needs_tunables() -> bool:
    """Returns whether `memory.keep` raises the peak of a process less with the tunables."""
    found = version()
    if found is None or "GLIBC_TUNABLES" in os.environ:
        return False
    return tuple(map(int, found.split(".")[:2])) < _FIRST_WITHOUT


def restart() -> None:
    """Replaces the process, unless the tunables gain nothing or the environment has others.

    The new process removes them from its environment, because they slow down other programs.
    """
    if os.environ.pop(_RESTARTED, None):
        os.environ.pop("GLIBC_TUNABLES", None)
        return
    # Python's options end with -m and the module, in one word or two; sys.argv has -m for both.
    command, module = sys.orig_argv, sys.orig_argv[-len(sys.argv)]
    is_ours = re.fullmatch(f"(-[^m]*m)?{__package__}", module) is not None
    keeps = "--no-keep" not in takewhile(lambda word: word.startswith("-"), sys.argv[2:])
    if is_ours and keeps and needs_tunables() and sys.executable:
        os.environ.update({"GLIBC_TUNABLES": TUNABLES, _RESTARTED: "1"})
        os.execv(sys.executable, command)
