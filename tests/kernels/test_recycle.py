"""Large gradients in recycled memory behave like other tensors; calls need little memory."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import process, python
from torch import Tensor

from pyfused import functional, memory
from pyfused.backends import cpu

pytestmark = [pytest.mark.cpu, pytest.mark.skipif(not cpu.RECYCLES, reason="needs Linux")]
MIB = 1 << 20
ELEMENTS = 9 * MIB  # as float32, more than RECYCLED_BYTES
ROOM = 1 << 30
no_asan = pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer")
needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc")


@pytest.fixture(autouse=True)
def empty_cache() -> Iterator[None]:
    memory.recycle(limit=ROOM)
    memory.release()
    yield
    memory.recycle()
    memory.release()


def output(elements: int = ELEMENTS) -> Tensor:
    return recycled(torch.ones(elements))


def recycled(x: Tensor) -> Tensor:
    return cpu.empty_like(x).copy_(x)


# ---- blocks --------------------------------------------------------------------------------------


def test_the_next_output_reuses_freed_memory() -> None:
    first = output()
    address, before = first.data_ptr(), memory.stats()
    assert before.in_use >= ELEMENTS * 4
    del first
    freed = memory.stats()
    assert (freed.in_use, freed.free) == (before.in_use - 36 * MIB, 36 * MIB)
    second = output()
    assert second.data_ptr() == address
    assert memory.stats() == before._replace(hits=before.hits + 1)


@pytest.mark.parametrize(("factor", "fits"), [(1, True), (0.9, True), (0.85, False), (1.1, False)])
def test_a_block_is_reused_for_up_to_an_eighth_less(factor: float, fits: bool) -> None:
    elements = 10 * MIB
    del_me = output(elements)
    del del_me
    hits = memory.stats().hits
    output(int(elements * factor))
    assert memory.stats().hits == hits + fits


def test_blocks_that_are_not_kept() -> None:
    before = memory.stats()
    output(8 * MIB - 1)  # allocated by torch
    assert memory.stats() == before
    output(8 * MIB)
    assert memory.stats().misses == before.misses + 1
    memory.recycle(limit=36 * MIB - 1)
    memory.release()
    output()
    assert memory.stats().free == 0
    outputs = [output(n * ELEMENTS) for n in (1, 2, 3)]
    memory.recycle(limit=4 * 36 * MIB)
    while outputs:
        outputs.pop()  # 3, 2, 1; the first is released for the others
    assert memory.stats().free == 3 * 36 * MIB
    hits = memory.stats().hits
    kept = output(3 * ELEMENTS)
    assert memory.stats().hits == hits
    memory.recycle(False)
    before = memory.stats()
    assert before.free == 0
    output()
    assert memory.stats() == before
    del kept
    assert memory.stats() == before._replace(in_use=before.in_use - 3 * 36 * MIB)
    memory.recycle()
    output()
    assert memory.release() == 36 * MIB
    assert memory.stats().free == memory.release() == 0


def test_pages_of_free_blocks_are_reclaimable() -> None:
    """Free blocks are marked by MADV_FREE, so the kernel may reclaim their pages."""

    def lazily_free() -> int:
        rollup = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8")
        return int(re.findall(r"LazyFree: +(\d+)", rollup)[0]) << 10

    kept = output()
    before = lazily_free()
    del kept
    assert lazily_free() - before > 30 * MIB


# ---- use of recycled tensors ---------------------------------------------------------------------


READERS: dict[str, Callable[[Tensor], Any]] = {
    "view": lambda y: y[3:5],
    "NumPy": lambda y: y.numpy(),
    "graph": lambda y: y.requires_grad_().exp().grad_fn,
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_memory_is_in_use_until_the_last_reference_is_gone(read: Callable[[Tensor], Any]) -> None:
    reader, in_use = read(output()), memory.stats().in_use
    output(2 * ELEMENTS)
    assert memory.stats().in_use == in_use
    del reader
    assert memory.stats().in_use == in_use - 36 * MIB


def calls() -> dict[str, Callable[[Tensor], Any]]:
    logits, target = (ELEMENTS // 8, 8), torch.zeros(ELEMENTS // 8, dtype=torch.int64)
    return {
        "relu": functional.relu,
        "mish": functional.mish,
        "softmax": lambda x: functional.softmax(x.view(logits), -1),
        "swiglu": lambda x: functional.swiglu(x, x),
        "mse_loss": lambda x: functional.mse_loss(x, x.detach(), reduction="none"),
        "cross_entropy": lambda x: functional.cross_entropy(x.view(logits), target),
    }


@pytest.mark.parametrize("name", calls())
def test_results_can_be_resized_and_gradients_are_recycled(name: str) -> None:
    x = torch.ones(ELEMENTS, requires_grad=True)
    result = calls()[name](x)
    before = memory.stats()
    values, storage = result.detach().clone(), result.untyped_storage()
    size = storage.size()
    storage.resize_(0)
    storage.resize_(size)
    result.data.copy_(values)
    result.sum().backward()
    after = memory.stats()
    assert after.hits + after.misses > before.hits + before.misses or name == "cross_entropy"
    assert after.in_use >= ELEMENTS * 4


# ---- threads and processes -----------------------------------------------------------------------


def test_threads() -> None:
    def work(value: float) -> bool:
        x = torch.full((ELEMENTS,), value)
        return all(torch.equal(recycled(x), x) for _ in range(12))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, (1.0, 2.0, 3.0, 4.0)))
    assert memory.stats().in_use == 0
    assert memory.stats().hits > 0


# In new processes: 36 MiB in a tensor, and a training loop with a gradient of 64 MiB.
PREAMBLE = """
import os, re, torch
from pathlib import Path
from processes import left
from pyfused import memory
from pyfused.backends import cpu
from pyfused.functional import cross_entropy
torch.set_num_threads(1)
x = torch.ones(9 << 20)

def recycled(x):
    return cpu.empty_like(x).copy_(x)

def logits():
    x = torch.randn(64, 1 << 18, requires_grad=True)
    cross_entropy(x[:1], torch.zeros(1, dtype=torch.int64)).backward()
    x.grad = None
    return x

def train(x, elements, steps=4):
    for _ in range(steps):
        cross_entropy(x, torch.zeros(64, dtype=torch.int64)).backward()
        x.grad = None
        torch.empty(elements).fill_(1)
"""


def run(code: str, **environment: str) -> str:
    """Returns the output of code in a new process, which uses kernels for every size."""
    done = python(PREAMBLE + textwrap.dedent(code), **{"PYFUSED_BACKEND": "cpu"} | environment)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


def test_a_forked_child_starts_with_no_free_block() -> None:
    run("""
        kept = recycled(x); recycled(x)
        assert memory.stats().free == 36 << 20
        child = os.fork()
        if child:
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17
            assert memory.stats().free == 36 << 20
            assert kept.sum() == 9 << 20
        else:
            assert memory.stats().free == 0
            kept.add_(1); recycled(x); del kept
            assert memory.stats().free == 2 * 36 << 20
            os._exit(17)
    """)


def test_tensors_outlive_the_interpreter() -> None:
    code = """if True:
        import builtins, torch
        from pyfused.backends import cpu
        builtins.kept = cpu.empty_like(torch.ones(9 << 20))
        class Late:
            def __init__(self): self.tensor = cpu.empty_like(torch.ones(9 << 20))
            def __del__(self): self.tensor = None
        builtins.late = Late()
    """
    done = process("-c", code, PYFUSED_BACKEND="cpu")
    assert (done.returncode, done.stderr) == (0, "")


@no_asan
def test_no_memory_left() -> None:
    """Free blocks are released before an allocation fails; then torch raises its error."""
    printed = run("""
        memory.recycle(limit=1 << 40)
        larger = torch.ones(12 << 20)
        recycled(x)
        assert memory.stats().free
        with left(20 << 20):
            y = recycled(larger)  # fits after the free block is released
            assert memory.stats().free == 0 and y.sum() == 12 << 20
            try:
                recycled(larger)
            except RuntimeError as error:
                print(error)
            del y
            assert memory.stats().free == 0  # nothing is kept under a limit of the address space
    """)
    assert "not enough memory" in printed or "can't allocate memory" in printed


@no_asan
@needs_proc
def test_memory_of_training() -> None:
    """The address space suffices for one gradient, and the peak grows by one at most.

    The latter holds even if other memory of this size is needed while the gradient's block is free.
    """
    code = """
        x = logits()
        with left(112 << 20): train(x, 24 << 20)
        train(x, 16 << 20, 3)
        status = Path("/proc/self/status").read_text()
        print(int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) << 10)
    """
    recycled, new = (int(run(code, PYFUSED_RECYCLE=asked)) for asked in ("1", "0"))
    assert recycled < new + 64 * MIB + 8 * MIB


# ---- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("enabled", ["1GB", 1 << 30, 1, None])
def test_a_number_of_bytes_is_not_a_bool(enabled: Any) -> None:
    with pytest.raises(TypeError, match=r"enabled: expected a bool, got .*; pass .* as limit="):
        memory.recycle(enabled)


# ---- peak memory of calls, without arguments and results -----------------------------------------

SIZE = 40 * MIB  # bytes of the logits; large compared to other allocations
SLACK = 5 * MIB

# `measured()` prints the growth of the peak over the resident memory before the call. It makes the
# call twice, because the first call also makes persistent allocations.
MEASURED = """
import ctypes, gc, re
from pathlib import Path
import torch
import pyfused
from pyfused import functional as F

torch.set_num_threads(1)
# Freed blocks of this size return to the system. glibc would raise the size after a large block.
M_MMAP_THRESHOLD = -3
ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)

def resident(key):
    return int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10

def measured(name, call, leaves=()):
    for before in (None, resident("VmRSS")):
        gc.collect()
        pyfused.memory.release()
        if before is not None:
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            before = resident("VmRSS")
        call()
        for x in leaves:
            x.grad = None
    print(name, resident("VmHWM") - before)

rows, classes = 64, (40 << 20) // 64 // 4
leaf = torch.randn(rows, classes, requires_grad=True)
target = torch.randint(classes, (rows,))
grad_output = torch.randn(rows, classes)
other = grad_output.clone().requires_grad_()
inputs = [(leaf.detach(), grad_output), (leaf, grad_output), (leaf, other)]
options = {"mean": {}, "smoothed": {"label_smoothing": 0.1}, "sum": {"reduction": "sum"}}
for name, options in options.items():
    measured(name, lambda: F.cross_entropy(leaf, target, **options).backward(), [leaf])
measured("no gradient", lambda: F.cross_entropy(leaf.detach(), target))
for wanted, (x, y) in enumerate(inputs):
    step = lambda: F.mse_loss(x, y).backward() if wanted else F.mse_loss(x, y)
    measured(f"mse_loss-{wanted}", step, [x, y])
measured("relu", lambda: F.relu(leaf).backward(grad_output), [leaf])
del leaf, grad_output, other, inputs, x, y

rows, classes = 1280, 16384  # 80 MiB of logits
x, w = torch.randn(rows, 8, requires_grad=True), torch.randn(classes, 8, requires_grad=True)
target, teacher = torch.randint(classes, (rows,)), (torch.randn(rows, 4), torch.randn(classes, 4))
heads = {
    "linear_cross_entropy": lambda: F.linear_cross_entropy(x, w, target),
    "linear_log_probs": lambda: F.linear_log_probs(x, w, target).log_probability.sum(),
    "linear_kl_div": lambda: F.linear_kl_div(x, w, *teacher),
}
for name, head in heads.items():
    measured(name, lambda: head().backward(), [x, w])
"""


@pytest.fixture(scope="module")
def growth() -> dict[str, int]:
    """Returns the bytes that each call needs, measured in one process."""
    done = python(MEASURED)
    assert done.returncode == 0, done.stderr
    return {name: int(size) for name, size in re.findall(r"(.+) (-?\d+)\n", done.stdout)}


# The number of tensors of SIZE bytes that a call allocates; a head's logits have twice as many.
TENSORS: dict[str, float] = {
    "mean": 1, "smoothed": 1, "sum": 1, "no gradient": 0,
    "mse_loss-0": 0, "mse_loss-1": 1, "mse_loss-2": 2,
    "relu": 2,  # its output and the gradient
    "linear_cross_entropy": 0.5, "linear_log_probs": 0.5, "linear_kl_div": 1,
}  # fmt: skip


@no_asan
@needs_proc
@pytest.mark.parametrize("name", TENSORS)
def test_a_call_only_allocates_its_results(name: str, growth: dict[str, int]) -> None:
    """A head allocates a quarter of the logits, linear_kl_div also for the teacher."""
    least = 0 if "linear" in name else TENSORS[name]
    assert least * SIZE - SLACK < growth[name] < TENSORS[name] * SIZE + SLACK
