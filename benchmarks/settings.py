"""How a process gets memory: what a user can choose by environment variables, and no code.

Each setting is measured in a process of its own, torch and pyfused alike.
"""

from __future__ import annotations

import os
from ctypes.util import find_library

VARIABLE = "BENCHMARK_SETTING"
JEMALLOC = find_library("jemalloc")

# By the name that reports give them.
SETTINGS: dict[str, dict[str, str]] = {
    "as it comes": {},
    # c10's own switch: large blocks at multiples of 2 MiB, of huge pages.
    "THP": {"THP_MEM_ALLOC_ENABLE": "1"},
    # As PyTorch's tuning guide sets it.
    "jemalloc": {
        "LD_PRELOAD": JEMALLOC or "",
        "MALLOC_CONF": "oversize_threshold:1,background_thread:true,metadata_thp:auto,"
        "dirty_decay_ms:9000000000,muzzy_decay_ms:9000000000",
    },
    # What pyfused.memory.keep_pages() asks glibc for.
    "kept pages": {
        "MALLOC_MMAP_THRESHOLD_": "4294967296",
        "MALLOC_TRIM_THRESHOLD_": "42949672960",
        "MALLOC_TOP_PAD_": "1073741824",
    },
}
CURRENT = os.environ.get(VARIABLE, "as it comes")
AS_IT_COMES, KEEPS_PAGES = CURRENT == "as it comes", CURRENT == "kept pages"


def available() -> list[str]:
    """The settings that this machine has; says which it has not."""
    if JEMALLOC is None:
        print("left out: jemalloc, which is not installed (Debian's package is libjemalloc2)")
    return [name for name in SETTINGS if name != "jemalloc" or JEMALLOC]


def environment(name: str) -> dict[str, str]:
    return {**os.environ, VARIABLE: name, **SETTINGS[name]}


def torch_in(name: str) -> str:
    """What reports call eager torch there."""
    return "torch" if name == "as it comes" else f"torch, {name}"
