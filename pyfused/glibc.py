"""The version of glibc, and the tunables with which ``python -m pyfused run`` starts.

It imports nothing else of pyfused and no torch, which takes a second.
"""

from __future__ import annotations

import os
import sys
from itertools import takewhile

# Before 2.39, glibc puts what it has cut off an aligned block into caches of small blocks, and not
# back to the block when that is freed (https://sourceware.org/bugzilla/show_bug.cgi?id=30723).
# These tunables switch the caches off. glibc reads them when a process starts.
TUNABLES = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"
_FIRST_WITHOUT = (2, 39)


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
    """Replaces the process, unless the tunables gain nothing or the environment has others."""
    arguments, command = sys.argv[2:], sys.orig_argv
    module = command[command.index("-m") + 1] if "-m" in command else None
    keeps = "--no-keep" not in takewhile(lambda argument: argument.startswith("-"), arguments)
    if module == __package__ and keeps and needs_tunables() and sys.executable:
        os.environ["GLIBC_TUNABLES"] = TUNABLES
        os.execv(sys.executable, command)
