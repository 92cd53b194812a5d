"""`pyfused.memory.keep` retains the memory that a process frees; `keep(False)` restores glibc."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

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
import ctypes, os, re, threading
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
def test_free_pages_are_returned_from_time_to_time() -> None:
    run("""
    import time
    memory._SECONDS = 0.2
    memory.keep()
    (thread,) = [each for each in threading.enumerate() if each.name == "keep"]
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
    """)


@glibc
@has_mallinfo2
def test_the_default_thresholds_are_restored() -> None:
    """Blocks of less than 32 MiB come from the heap, larger ones are mapped."""
    run("""
    memory.keep(); memory.keep(False)
    for mib, is_mapped in ((16, False), (31, False), (33, True), (256, True)):
        before = heap()[1]
        block = torch.empty(mib * MIB, dtype=torch.uint8)
        assert (heap()[1] > before) is is_mapped, mib
        del block
    """)


@glibc
@has_mallinfo2
def test_parameters_follow_any_sequence_of_calls() -> None:
    """Compares `keep` with a model of its calls, and tensors with their values."""
    draw = random.Random(0)
    run(f"""
    import random
    draw = random.Random({draw.random()})
    calls, open_blocks, unused, tensors = set(), [], [], []
    for number in range(400):
        kind = draw.randrange(8)
        if kind == 0:
            unused.append(memory.keep()); calls.add(unused[-1])
        elif kind == 1:
            memory.keep(False); calls.clear()
        elif kind == 2 and unused:
            block = draw.choice(unused)
            calls.discard(block); block.__enter__(); open_blocks.append(block)
        elif kind == 3 and open_blocks:
            open_blocks.pop(draw.randrange(len(open_blocks))).__exit__(None, None, None)
        elif kind == 4:
            thread = threading.Thread(target=lambda: calls.add(memory.keep())); thread.start()
            thread.join()
        elif kind == 5 and tensors:
            value, tensor = tensors.pop(draw.randrange(len(tensors)))
            assert (tensor == value).all()
        else:
            tensors.append((number, torch.full((draw.randrange(1, 2 * MIB),), number)))
            tensors = tensors[-6:]
        assert memory.stats().keeps is bool(calls or open_blocks), (number, kind)
        arena, mapped = heap()
        size = 33 * MIB if memory.stats().keeps else arena + 33 * MIB  # larger than any free block
        probe = torch.empty(size, dtype=torch.uint8)
        assert (heap()[1] == mapped) is memory.stats().keeps, number
        del probe
    """)


@glibc
def test_blocks_nest_and_end_after_errors() -> None:
    with memory.keep():
        with memory.keep():
            pass
        assert memory.stats().keeps
    assert not memory.stats().keeps
    with pytest.raises(KeyError), memory.keep():
        {}["missing"]
    assert not memory.stats().keeps
    memory.keep()
    with memory.keep():
        pass
    assert memory.stats().keeps, "the call before the block lasts"
    with memory.keep():
        memory.keep(False)
        assert memory.stats().keeps, "the block lasts"
    assert not memory.stats().keeps


@glibc
def test_blocks_of_several_threads_overlap() -> None:
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with memory.keep():
            entered.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with memory.keep():
        thread.start()
        entered.wait()
    assert memory.stats().keeps
    leave.set()
    thread.join()
    assert not memory.stats().keeps


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

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(40):
            blocks = [torch.full((draw.choice((10, MIB, 4 * MIB)),), k) for k in range(4)]
            assert all((block == k).all() for k, block in enumerate(blocks))

    errors: list[BaseException] = []

    def caught(seed: int) -> None:
        try:
            work(seed)
        except BaseException as error:
            errors.append(error)

    with memory.keep():
        threads = [threading.Thread(target=caught, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors


@glibc
def test_a_forked_child_releases_its_copy_of_the_free_memory() -> None:
    run("""
    memory.keep()
    freed()
    assert resident() > 256 * MIB
    used = torch.arange(MIB)
    child = os.fork()
    if child == 0:
        fits = resident() < 256 * MIB and memory.stats().keeps
        fits = fits and bool((used == torch.arange(MIB)).all())
        with memory.keep():  # the lock is free
            pass
        freed()
        os._exit(not (fits and resident() > 256 * MIB))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert resident() > 256 * MIB
    """)


@glibc
@pytest.mark.parametrize("first", ["keep", "loader"])
def test_workers_of_a_loader(first: str) -> None:
    """Workers that were forked before and after the call return the same batches."""
    run(f"""
    class Data(torch.utils.data.Dataset):
        def __len__(self): return 64
        def __getitem__(self, i): return torch.full((MIB // 4,), i)

    loader = torch.utils.data.DataLoader(
        Data(), 8, num_workers=2, persistent_workers=True, multiprocessing_context="fork"
    )
    steps = [memory.keep, lambda: next(iter(loader))]
    for step in steps if {first!r} == "keep" else reversed(steps):
        step()
    for _ in range(2):
        seen = sorted(int(x) for batch in loader for x in batch[:, 0])
        assert seen == list(range(64))
    del loader
    """)


@glibc
def test_shared_tensors_and_recycled_outputs_are_unaffected() -> None:
    run("""
    from pyfused.functional import relu
    shared = torch.zeros(MIB).share_memory_()
    with memory.keep():
        other = torch.ones(MIB).share_memory_()
        outputs = [relu(torch.full((9 * MIB,), float(k))) for k in range(3)]
    memory.keep(False)
    assert (shared == 0).all() and (other == 1).all()
    assert all((output == k).all() for k, output in enumerate(outputs))
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


def reported(**variables: str) -> str:
    """Returns the warning of a new process, because malloc reads these variables at its start."""
    done = subprocess.run(
        [sys.executable, "-c", REPORT],
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
    assert f"malloc comes from {library}" in reported(LD_PRELOAD=str(library))


@glibc
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MALLOC_MMAP_MAX_", "0"),
        ("MALLOC_TRIM_THRESHOLD_", "1000000"),
        ("GLIBC_TUNABLES", "glibc.malloc.mmap_max=0:glibc.malloc.arena_max=2"),
    ],
)
def test_variables_of_the_environment_decide(name: str, value: str) -> None:
    assert f"the environment configures malloc by {name}" in reported(**{name: value})


@glibc
def test_variables_that_malloc_has_not_read_or_that_set_something_else_have_no_effect(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code = "from pyfused import memory; print(memory.why_not_kept())"
    for name, value in (("MALLOC_ARENA_MAX", "2"), ("GLIBC_TUNABLES", "glibc.malloc.perturb=0")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, name: value},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == "None\n"
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


@pytest.mark.parametrize("enabled", [None, 1, "yes"])
def test_enabled_has_to_be_a_bool(enabled: object) -> None:
    with pytest.raises(TypeError, match="enabled: expected a bool, got"):
        pyfused.memory.keep(enabled)  # type: ignore[arg-type]
