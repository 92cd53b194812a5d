"""`pyfused.memory.keep` retains the memory that a process frees; `keep(False)` restores glibc."""

from __future__ import annotations

import ctypes
import math
import os
import random
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import python

import pyfused
from pyfused import memory

glibc = pytest.mark.skipif(
    memory.why_not_kept() is not None, reason=f"keep has no effect: {memory.why_not_kept()}"
)
MIB = 1 << 20

# `heap()` returns the bytes of the heap and of mapped blocks; `resident()` those in memory.
PREAMBLE = """
import ctypes, os, re, threading, traceback
from pathlib import Path
import torch
from pyfused import memory

class MallocInfo(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = MallocInfo
MIB = 1 << 20

def trimming():
    return [each for each in threading.enumerate() if each.name == "keep" and not ended(each)]

def ended(thread):
    return not thread._args[1].locked()

def heap():
    found = libc.mallinfo2()
    return found.arena, found.hblkhd

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10

def freed(mib=256):
    '''Allocates and frees a block; returns the bytes that the process retains of it.'''
    before = resident()
    block = torch.ones(mib * MIB // 4)
    assert resident() - before > 0.9 * mib * MIB or memory.stats().keeps
    del block
    return resident() - before
"""
has_mallinfo2 = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None) if sys.platform == "linux" else None, "mallinfo2"),
    reason="needs glibc 2.33 or later",
)


def run(code: str, **variables: str) -> str:
    done = python(PREAMBLE + textwrap.dedent(code), **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    memory.keep(False)
    assert not memory.stats().keeps


# ---- what it does --------------------------------------------------------------------------------


@glibc
@has_mallinfo2
def test_freed_blocks_are_kept_and_given_back() -> None:
    run("""
    assert freed() < 8 * MIB
    memory.keep()
    before, (arena, mapped) = resident(), heap()
    block = torch.ones(64 * MIB)
    assert heap()[0] > arena + 250 * MIB and heap()[1] == mapped
    del block
    assert resident() > before + 250 * MIB
    assert freed(192) < 8 * MIB, "the next block reuses the pages"
    memory.keep(False)
    assert resident() < before + 8 * MIB
    assert freed() < 8 * MIB, "large blocks are returned again"
    """)


@glibc
@has_mallinfo2
def test_the_default_thresholds_are_restored() -> None:
    """Blocks of less than 32 MiB come from the heap, larger ones are mapped.

    The smaller ones come last, because they leave free memory in the heap, which a larger one may
    reuse.
    """
    run("""
    memory.keep(); memory.keep(False)
    for mib, is_mapped in ((256, True), (33, True), (31, False), (16, False)):
        before = heap()[1]
        block = torch.empty(mib * MIB, dtype=torch.uint8)
        assert (heap()[1] > before) is is_mapped, mib
        del block
    """)


@glibc
def test_free_pages_are_returned_from_time_to_time() -> None:
    run("""
    import time
    memory.keep(trim_every=0.2)
    (thread,) = trimming()
    before, used = resident(), torch.ones(MIB)
    freed()
    for _ in range(100):
        time.sleep(0.1)
        if resident() < before + 16 * MIB:
            break
    assert resident() < before + 16 * MIB
    assert (used == 1).all() and memory.stats().keeps and thread.daemon
    memory.keep(False)
    thread.join(10)
    assert not thread.is_alive()
    memory.keep(trim_every=None)
    freed()
    assert not trimming() and resident() > before + 200 * MIB
    assert memory.trim() and resident() < before + 16 * MIB and memory.stats().keeps
    """)


@glibc
@has_mallinfo2
def test_parameters_follow_any_sequence_of_calls() -> None:
    """Compares `keep` with a model: the innermost block decides, without blocks the last call.

    A child starts with glibc's settings, and may leave the blocks of its parent.
    """
    draw = random.Random(0)
    run(f"""
    import random
    draw = random.Random({draw.random()})
    calls, blocks, inherited, unused, tensors = [], [], [], [], []

    def call():
        setting = draw.random() < 0.6, draw.choice([None, 60, 600.0])
        unused.append((memory.keep(setting[0], trim_every=setting[1]), setting))
        calls.append(unused[-1])

    def leave(entered):
        at = draw.randrange(len(entered))
        block = entered[at][0]
        del entered[max(i for i, each in enumerate(entered) if each[0] is block)]
        block.__exit__(None, None, None)

    def step():
        global calls, tensors
        kind = draw.randrange(9)
        if kind == 0:
            call()
        elif kind == 1:
            thread = threading.Thread(target=call); thread.start(); thread.join()
        elif kind == 2 and unused:
            chosen = draw.choice(unused)
            calls = [each for each in calls if each is not chosen]
            blocks.append(chosen)
            chosen[0].__enter__()
        elif kind == 3 and blocks:
            leave(blocks)
        elif kind == 4 and unused:
            unused.pop(draw.randrange(len(unused)))  # the call lasts
        elif kind == 5 and tensors:
            value, tensor = tensors.pop(draw.randrange(len(tensors)))
            assert (tensor == value).all()
        elif kind == 6 and inherited:
            leave(inherited)
        else:
            tensors = [*tensors[-5:], (number, torch.full((draw.randrange(1, 2 * MIB),), number))]
        keeps, every = (blocks or calls or [(None, (False, None))])[-1][1]
        assert memory.stats().keeps is memory.pages_are_kept() is keeps, (number, kind)
        periods = [thread._args[0] for thread in trimming()]
        assert periods == ([every] if keeps and every else []), (number, kind)
        arena, mapped = heap()
        size = 33 * MIB if keeps else arena + 33 * MIB  # larger than any free block
        probe = torch.empty(size, dtype=torch.uint8)
        assert (heap()[1] == mapped) is keeps, (number, kind)

    for number in range(400):
        if draw.random() < 0.03 and (child := os.fork()) == 0:
            inherited += blocks
            calls, blocks = [], []
            for number in range(20):
                step()
            os._exit(0)
        step()
    while True:
        try:
            assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
        except ChildProcessError:
            break
    """)


@glibc
def test_finalizers_and_signal_handlers() -> None:
    """They may end a block and call any function in the middle of another call."""
    run("""
    import faulthandler, gc, signal
    faulthandler.dump_traceback_later(60, exit=True)

    def block():
        with memory.keep(trim_every=None):
            yield

    def handler(*_):
        with memory.keep():
            memory.trim()

    signal.signal(signal.SIGALRM, handler)
    for n in range(1, 60):
        gc.disable()
        held = [block()]
        held.append(held)
        next(held[0])
        del held
        gc.set_threshold(n, 1, 1)
        gc.enable()
        signal.setitimer(signal.ITIMER_REAL, 1e-6 * n)
        memory.keep(trim_every=None)
        memory.keep(False)
    signal.setitimer(signal.ITIMER_REAL, 0)
    gc.collect()
    assert not memory.stats().keeps and not trimming()
    """)


@glibc
def test_blocks_end_after_errors() -> None:
    with pytest.raises(KeyError), memory.keep():
        {}["missing"]
    assert not memory.stats().keeps
    memory.keep()
    with memory.keep(False):
        assert not memory.stats().keeps
    assert memory.stats().keeps, "the call before the block is restored"


@pytest.mark.parametrize("enabled", [True, False])
def test_a_block_that_was_not_entered_cannot_be_left(enabled: bool) -> None:
    for entered in (False, True):
        block = memory.keep(enabled)
        if entered:
            with block:
                pass
        with pytest.raises(RuntimeError, match="keep: the block was left without being entered"):
            block.__exit__(None, None, None)
    memory.keep(False)
    assert not memory.stats().keeps
    with memory.keep():
        assert memory.stats().keeps is (memory.why_not_kept() is None)


@glibc
def test_only_an_explicit_call_keeps_memory() -> None:
    run("""
    import pyfused
    pyfused.convert(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU()))
    with pyfused.patch():
        torch.nn.functional.cross_entropy(torch.randn(512, 1000), torch.zeros(512).long())
    assert not memory.stats().keeps and not heap()[0] > 512 * MIB and freed() < 8 * MIB
    """)


@glibc
@pytest.mark.thresholds
def test_operators_that_only_save_new_memory_are_torchs() -> None:
    def backends() -> list[str]:
        x = torch.empty(1 << 24, requires_grad=True)
        mse_loss = "mse_loss", x, torch.empty(1 << 24)
        unreduced = pyfused.explain(*mse_loss, reduction="none")
        found = pyfused.explain("relu", x), unreduced, pyfused.explain(*mse_loss)
        return [each.backend for each in found]

    assert backends() == ["cpu", "cpu", "cpu"]
    with memory.keep():
        assert backends() == ["torch", "torch", "cpu"]
    assert backends() == ["cpu", "cpu", "cpu"]


# ---- threads and processes -----------------------------------------------------------------------


@glibc
def test_other_threads_compute_the_same_values() -> None:
    """Blocks of other threads, of which glibc keeps only some, and small ones of all threads."""

    def is_right(seed: int) -> bool:
        draw, right = random.Random(seed), True
        for _ in range(10):
            blocks = [torch.full((draw.choice((10, MIB, 4 * MIB)),), k) for k in range(4)]
            right &= all(bool((block == k).all()) for k, block in enumerate(blocks))
        return right

    with memory.keep(), ThreadPoolExecutor(4) as pool:
        assert all(pool.map(is_right, range(4)))


@glibc
def test_a_forked_child_releases_its_copy_of_the_free_memory() -> None:
    run("""
    memory.keep()
    freed()
    assert resident() > 256 * MIB
    used = torch.arange(MIB)
    child = os.fork()
    if child == 0:
        try:
            assert resident() < 256 * MIB and not memory.stats().keeps and not trimming()
            assert (used == torch.arange(MIB)).all()
            assert freed(400) < 8 * MIB, "more than any free block of the heap"
            with memory.keep():
                assert freed(400) > 390 * MIB and len(trimming()) == 1
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert resident() > 256 * MIB
    """)


@glibc
def test_too_little_memory_is_torchs_error_and_leaves_the_process_intact() -> None:
    run("""
    import resource
    memory.keep()
    freed(64)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 128 * MIB, resource.RLIM_INFINITY))
    try:
        torch.ones(256 * MIB)
    except RuntimeError as error:
        assert "memory" in str(error)
    else:
        raise AssertionError
    assert (torch.ones(8 * MIB) == 1).all()
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    assert (torch.ones(64 * MIB) == 1).all()
    """)


# ---- pages that are kept without it --------------------------------------------------------------


def library(name: str) -> str:
    """Returns the path of an allocator's library, "" if it is not installed."""
    paths = [Path(path) for path in ("/usr/lib", "/usr/lib64", "/usr/local/lib")]
    return next((str(file) for path in paths for file in path.glob(f"**/lib{name}.so.*")), "")


TCMALLOC, JEMALLOC = library("tcmalloc_minimal"), library("jemalloc")
TRIM = {"MALLOC_TRIM_THRESHOLD_": "34359738368"}
SETTINGS = {
    "glibc": (False, {}),
    "threshold": (True, {"MALLOC_MMAP_THRESHOLD_": "4294967296", **TRIM}),
    "low threshold": (False, {"MALLOC_MMAP_THRESHOLD_": "1048576"}),
    "no maps": (True, {"MALLOC_MMAP_MAX_": "0", **TRIM}),
    "tcmalloc": (True, {"LD_PRELOAD": TCMALLOC}),
    "jemalloc": (True, {"LD_PRELOAD": JEMALLOC, "MALLOC_CONF": "dirty_decay_ms:-1"}),
    "jemalloc, no decay": (False, {"LD_PRELOAD": JEMALLOC, "MALLOC_CONF": "dirty_decay_ms:0"}),
}
DECISION = """
import torch, warnings, pyfused
from pyfused import memory
x = torch.empty(1 << 24, requires_grad=True)
with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    for step in (None, memory.keep, lambda: memory.keep(False)):
        if step: step()
        kept = memory.stats().pages_are_kept
        path = pyfused.explain("relu", x)
        assert (path.backend == "torch") is kept
        assert path.reason.endswith("because the process keeps freed pages") is kept
        print(kept)
print(*[warning.message for warning in found])
"""


@glibc
@pytest.mark.thresholds
@pytest.mark.parametrize("name", SETTINGS)
def test_what_happens_decides_about_calls_that_save_page_faults(name: str) -> None:
    kept, variables = SETTINGS[name]
    if variables.get("LD_PRELOAD") == "":
        pytest.skip("the allocator is not installed")
    *seen, message = fresh(DECISION, **variables).split("\n", 3)
    can_keep = name == "glibc"
    assert seen == [str(kept), str(kept or can_keep), str(kept)]
    state = "" if can_keep else f"; freed memory is {'kept without it' if kept else 'not kept'}"
    assert message.strip().endswith(state)
    assert ("nothing has changed" in message) is not can_keep


@glibc
def test_stats_name_the_version_of_glibc() -> None:
    assert f"glibc {memory.stats().glibc}" == os.confstr("CS_GNU_LIBC_VERSION")


# ---- where it has no effect ----------------------------------------------------------------------

ALLOCATOR = """
#include <errno.h>
#include <stddef.h>
void *__libc_malloc(size_t), *__libc_memalign(size_t, size_t);
void *malloc(size_t size) { return __libc_malloc(size); }
int posix_memalign(void **block, size_t alignment, size_t size) {
  return (*block = __libc_memalign(alignment, size)) ? 0 : ENOMEM;
}
"""
REPORT = """
import warnings
from pyfused import memory
with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    with memory.keep():
        assert not memory.stats().keeps
    memory.keep(False)
(warning,) = found
assert warning.category is RuntimeWarning and warning.filename == "<string>"
print(warning.message)
"""


def fresh(code: str, **variables: str) -> str:
    """Returns the output of a new process, because malloc reads these variables at its start."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@glibc
@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
def test_another_allocator_is_named(tmp_path: Path) -> None:
    source, library = tmp_path / "allocator.c", tmp_path / "liballocator.so"
    source.write_text(ALLOCATOR)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    assert f"malloc comes from {library}" in fresh(REPORT, LD_PRELOAD=str(library))


@glibc
@pytest.mark.parametrize(
    ("name", "value", "decides"),
    [
        ("MALLOC_TRIM_THRESHOLD_", "1000000", True),
        ("GLIBC_TUNABLES", "glibc.malloc.mmap_max=0:glibc.malloc.arena_max=2", True),
        ("GLIBC_TUNABLES", "glibc.malloc.perturb=0", False),
    ],
)
def test_variables_of_the_environment_decide(name: str, value: str, decides: bool) -> None:
    found = fresh("from pyfused import memory; print(memory.why_not_kept())", **{name: value})
    assert (f"the environment configures malloc by {name}" in found) is decides
    assert (found == "None\n") is not decides


@glibc
def test_a_variable_that_malloc_has_not_read_has_no_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    memory.why_not_kept.cache_clear()
    assert memory.why_not_kept() is None


def test_other_systems_and_libraries_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    for system, libc in (("darwin", None), ("linux", object())):
        monkeypatch.setattr(sys, "platform", system)
        monkeypatch.setattr(ctypes, "CDLL", lambda _, libc=libc: libc)
        memory._libc.cache_clear()
        memory.why_not_kept.cache_clear()
        with pytest.warns(RuntimeWarning, match="keep: nothing has changed: .* not glibc"):
            memory.keep()
        assert not memory.stats().keeps
        memory.keep(False)
    monkeypatch.undo()
    memory._libc.cache_clear()
    memory.why_not_kept.cache_clear()


ARGUMENTS: tuple[tuple[dict[str, Any], type[Exception], str], ...] = (
    *[({"enabled": x}, TypeError, "enabled: expected a bool, got") for x in (None, 1, "yes")],
    ({"trim_every": "30"}, TypeError, "a number of seconds or None, got str '30'"),
    ({"trim_every": True}, TypeError, "a number of seconds or None, got bool True"),
    *[
        ({"trim_every": x}, ValueError, f"trim_every: expected a positive number .*got {x}")
        for x in (0, -1.0, math.inf, math.nan)
    ],
)


@pytest.mark.parametrize(("named", "error", "expected"), ARGUMENTS)
def test_arguments_are_checked(
    named: dict[str, Any], error: type[Exception], expected: str
) -> None:
    with pytest.raises(error, match=expected):
        memory.keep(**named)
