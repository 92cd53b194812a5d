"""`pyfused.memory.keep` retains the memory that a process frees; `keep(False)` restores glibc."""

from __future__ import annotations

import ctypes
import math
import os
import random
import shutil
import subprocess
import textwrap
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import process, python, resident

from pyfused import memory

glibc = pytest.mark.skipif(memory.why_not_kept() is not None, reason=str(memory.why_not_kept()))
MIB = 1 << 20


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    memory.keep(False)
    assert not memory.stats().keeps


# ---- calls and blocks ----------------------------------------------------------------------------


def assert_setting(enabled: bool, trim_every: float | None) -> None:
    assert memory.stats().keeps is memory.pages_are_kept() is enabled
    assert [vars(x)["_args"][0] for x in trimming()] == [trim_every] * bool(enabled and trim_every)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallinfo2"):  # from glibc 2.33 on
        libc.mallinfo2.restype = memory._MallocInfo
        arena, *_, mapped = libc.mallinfo2().sizes[:5]
        size = 33 * MIB if enabled else arena + 33 * MIB  # larger than any free block
        block = torch.empty(size, dtype=torch.uint8)
        assert (libc.mallinfo2().sizes[4] == mapped) is enabled, len(block)


@glibc
@pytest.mark.parametrize("seed", range(5))
def test_the_last_call_decides_and_blocks_restore(seed: int) -> None:
    rng = random.Random(seed)

    def act(depth: int) -> None:
        for _ in range(3):
            setting = rng.choice([(False, None), (True, None), (True, 60), (True, 600.0)])
            before = memory._active
            with ThreadPoolExecutor(1) as pool:  # in any thread
                call = pool.submit(memory.keep, setting[0], trim_every=setting[1]).result()
            assert_setting(*setting)
            if rng.random() < 0.5:
                with call:
                    if depth:
                        act(depth - 1)
                assert_setting(*before)

    act(2)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_call_is_one_block(enabled: bool) -> None:
    block = memory.keep(enabled)
    with pytest.raises(RuntimeError, match="keep: the block was left without being entered"):
        block.__exit__(None, None, None)
    with pytest.raises(StopIteration), block:
        raise StopIteration
    with pytest.raises(RuntimeError, match="or left twice"):
        block.__exit__(None, None, None)
    with pytest.raises(RuntimeError, match="expected one block for each call"), block:
        pass


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        *[("enabled", x, "enabled: expected a bool, got") for x in (None, 1, "yes")],
        *[("trim_every", x, "a number of seconds or None, got") for x in ("30", True)],
        *[("trim_every", x, "positive .* got") for x in (0, -1.0, math.inf, math.nan)],
    ],
)
def test_arguments_are_checked(name: str, value: Any, expected: str) -> None:
    error = ValueError if "positive" in expected else TypeError
    with pytest.raises(error, match=f"{expected} .*{value}"):
        memory.keep(**{name: value})


# ---- pages and processes -------------------------------------------------------------------------


def freed(mib: int = 256) -> int:
    """Returns the bytes that stay in memory after a block was freed."""
    before = resident()
    block = torch.ones(mib * MIB // 4)
    assert resident() - before > 0.9 * mib * MIB or memory.stats().keeps
    del block
    return resident() - before


def trimming() -> list[threading.Thread]:
    """Returns the threads that trim the heap; one that is ending has no arguments any more."""
    found = [(x, vars(x).get("_args")) for x in threading.enumerate() if x.name == "keep"]
    return [x for x, arguments in found if arguments and not arguments[1].is_set()]


def run(code: str) -> None:
    """Runs code that uses this file in a new process."""
    names = "import gc, time\nfrom processes import left\nfrom test_keep import *\n"
    names += "torch.set_num_threads(1)\n"  # others do not survive a fork
    done = python(names + textwrap.dedent(code))
    assert done.returncode == 0, done.stderr


@glibc
def test_pages_are_kept_and_returned() -> None:
    """Without the call, and after the block, large blocks are returned when they are freed."""
    run("""
    assert not memory.stats().keeps and freed() < 8 * MIB
    with memory.keep(): pass
    assert freed(33) < 8 * MIB and freed(31) > 25 * MIB, "glibc's thresholds are restored"
    memory.trim()
    start, used = resident(), torch.ones(MIB)
    with memory.keep(trim_every=None):
        assert freed() > 250 * MIB and not trimming()
        assert freed(192) < 8 * MIB, "the next block reuses the pages"
        with left(128 * MIB):
            try: torch.ones(256 * MIB)
            except RuntimeError as error: assert "memory" in str(error)
            else: raise AssertionError
        assert memory.trim() and resident() < start + 16 * MIB and memory.stats().keeps
        freed()
    assert resident() < start + 16 * MIB and freed() < 8 * MIB
    memory.keep(trim_every=0.2)
    (thread,) = trimming()
    freed()
    for _ in range(100):
        time.sleep(0.1)
        if resident() < start + 16 * MIB: break
    assert resident() < start + 16 * MIB and (used == 1).all() and thread.daemon
    memory.keep(False)
    thread.join(10)
    assert not thread.is_alive()
    """)


@glibc
def test_a_forked_child_starts_with_glibcs_settings() -> None:
    """It releases its copy of the free memory, and may leave the blocks of its parent."""
    run("""
    memory.keep()
    block = memory.keep()
    block.__enter__()
    freed()
    assert resident() > 256 * MIB
    used = torch.arange(MIB)
    if (child := os.fork()) == 0:
        assert resident() < 256 * MIB and not memory.stats().keeps and not trimming()
        block.__exit__(None, None, None)
        assert not memory.stats().keeps and (used == torch.arange(MIB)).all()
        assert freed(400) < 8 * MIB, "more than any free block of the heap"
        with memory.keep():
            assert freed(400) > 390 * MIB and len(trimming()) == 1
        os._exit(17)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17
    assert resident() > 256 * MIB and memory.stats().keeps
    """)


# ---- where the environment or another allocator decides ------------------------------------------

ALLOCATOR = """
#include <errno.h>
#include <stddef.h>
void *__libc_malloc(size_t), *__libc_memalign(size_t, size_t);
void *malloc(size_t size) { return __libc_malloc(size); }
int posix_memalign(void **block, size_t alignment, size_t size) {
  return (*block = __libc_memalign(alignment, size)) ? 0 : ENOMEM;
}
"""


def library(name: str) -> str:
    """Returns the path of an allocator's library, "" if it is not installed."""
    paths = [Path(path) for path in ("/usr/lib", "/usr/lib64", "/usr/local/lib")]
    return next((str(file) for path in paths for file in path.glob(f"**/lib{name}.so.*")), "")


TRIM, JEMALLOC = {"MALLOC_TRIM_THRESHOLD_": "34359738368"}, {"LD_PRELOAD": library("jemalloc")}
# The environment, whether it keeps pages, and what decides instead of `keep`.
SETTINGS: dict[str, tuple[dict[str, str], bool, str]] = {
    "glibc": ({"GLIBC_TUNABLES": "glibc.malloc.perturb=0"}, False, ""),
    "threshold": (TRIM | {"MALLOC_MMAP_THRESHOLD_": "4294967296"}, True, "MALLOC_"),
    "no maps": (TRIM | {"MALLOC_MMAP_MAX_": "0"}, True, "MALLOC_MMAP_MAX_, MALLOC_TRIM_THRESHOLD_"),
    "tunables": ({"GLIBC_TUNABLES": "a=0:glibc.malloc.mmap_max=9999"}, False, "GLIBC_TUNABLES"),
    "a library": ({"LD_PRELOAD": "built"}, False, "liballocator.so"),
    "tcmalloc": ({"LD_PRELOAD": library("tcmalloc_minimal")}, True, "tcmalloc"),
    "jemalloc": (JEMALLOC | {"MALLOC_CONF": "dirty_decay_ms:-1"}, True, "jemalloc"),
    "jemalloc, no decay": (JEMALLOC | {"MALLOC_CONF": "dirty_decay_ms:0"}, False, "jemalloc"),
}
DECISION = """
import warnings
from pyfused import memory
with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    for step in (None, memory.keep, lambda: memory.keep(False)):
        if step: step()
        print(memory.stats().pages_are_kept)
for warning in found:
    assert warning.category is RuntimeWarning and warning.filename == "<string>"
    print(warning.message)
"""


@glibc
@pytest.mark.skipif(not shutil.which("cc"), reason="needs a compiler")
@pytest.mark.parametrize("name", SETTINGS)
def test_stats_say_whether_freed_pages_are_kept(name: str, tmp_path: Path) -> None:
    variables, kept, decides = SETTINGS[name]
    if variables.get("LD_PRELOAD") == "":
        pytest.skip("the allocator is not installed")
    if variables.get("LD_PRELOAD") == "built":
        source, built = tmp_path / "allocator.c", tmp_path / "liballocator.so"
        source.write_text(ALLOCATOR)
        subprocess.run(["cc", "-shared", "-fPIC", "-o", built, source], check=True)
        variables = {"LD_PRELOAD": str(built)}
    # A new process, because malloc reads its variables at the start.
    done = process("-c", DECISION, **variables)
    assert done.returncode == 0, done.stderr
    *seen, message = done.stdout.split("\n", 3)
    assert seen == [str(kept), str(kept or not decides), str(kept)]
    state = f"freed memory is {'kept without it' if kept else 'not kept'}"
    assert ("nothing has changed" in message) is bool(decides)
    assert decides in message
    assert message.strip().endswith(state if decides else "")


@glibc
def test_a_variable_that_malloc_has_not_read_has_no_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    memory.why_not_kept.cache_clear()
    assert memory.why_not_kept() is None
    assert f"glibc {memory.stats().glibc}" == os.confstr("CS_GNU_LIBC_VERSION")


@glibc
def test_memory_that_glibc_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as that of mimalloc, which torch's wheels for ARM64 contain."""
    monkeypatch.setattr(memory, "_used", lambda: 100 * MIB)
    monkeypatch.setattr(memory, "why_not_kept", memory.why_not_kept.__wrapped__)
    message = (
        r"torch's memory does not come from glibc.*MIMALLOC_PURGE_DELAY=-1 .*; freed memory is"
    )
    with pytest.warns(RuntimeWarning, match=message):
        memory.keep()
    assert not memory.stats().keeps
    assert not memory.stats().pages_are_kept


def test_other_c_libraries_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_libc", lambda: None)
    monkeypatch.setattr(memory, "why_not_kept", memory.why_not_kept.__wrapped__)
    with pytest.warns(RuntimeWarning, match="keep: nothing has changed: .* not glibc"):
        memory.keep()
    assert not memory.stats().keeps
