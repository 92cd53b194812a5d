"""Large gradients in recycled memory behave like other tensors; calls need little memory."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import process, python, resident
from torch import Tensor

from pyfused import functional as F
from pyfused import memory
from pyfused.backends import cpu

pytestmark = [pytest.mark.cpu, pytest.mark.skipif(not cpu.RECYCLES, reason="needs Linux")]
MIB = 1 << 20
ELEMENTS = 9 * MIB  # as float32, more than RECYCLED_BYTES
BLOCK = 4 * ELEMENTS  # bytes
ASAN = "asan" in os.environ.get("LD_PRELOAD", "")
no_asan = pytest.mark.skipif(ASAN, reason="AddressSanitizer changes the use of memory")
needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc")


@pytest.fixture(autouse=True)
def empty_cache() -> Iterator[None]:
    memory.recycle(limit=1 << 30)
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
    assert (freed.in_use, freed.free) == (before.in_use - BLOCK, BLOCK)
    second = output()
    assert second.data_ptr() == address
    assert memory.stats() == before._replace(hits=before.hits + 1)


def test_the_oldest_blocks_beyond_the_limit_are_released() -> None:
    outputs = [output(n * ELEMENTS) for n in (1, 2, 3)]
    memory.recycle(limit=4 * BLOCK)
    while outputs:
        outputs.pop()  # 3, 2, 1; the first is released for the others
    assert memory.stats().free == 3 * BLOCK
    hits = memory.stats().hits
    output(3 * ELEMENTS)
    assert memory.stats().hits == hits
    memory.recycle(limit=BLOCK - 1)
    memory.release()
    output()
    assert memory.stats().free == 0


def test_recycling_can_be_disabled_and_memory_released() -> None:
    kept = output()
    memory.recycle(False)
    before = memory.stats()
    output()
    assert memory.stats() == before
    del kept
    assert memory.stats() == before._replace(in_use=before.in_use - BLOCK)
    memory.recycle()
    output()
    assert memory.release() == BLOCK
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
    assert memory.stats().in_use == in_use - BLOCK


CALLS: dict[str, Callable[[Tensor], Any]] = {
    "relu": F.relu,
    "mish": F.mish,
    "softmax": lambda x: F.softmax(x.view(-1, 8), -1),
    "swiglu": lambda x: F.swiglu(x, x),
    "mse_loss": lambda x: F.mse_loss(x, x.detach(), reduction="none"),
    "cross_entropy": lambda x: F.cross_entropy(x.view(-1, 8), torch.zeros(len(x) // 8).long()),
}


@pytest.mark.parametrize("name", CALLS)
def test_results_can_be_resized_and_gradients_are_recycled(name: str) -> None:
    result = CALLS[name](torch.ones(ELEMENTS, requires_grad=True))
    before = memory.stats()
    values, storage = result.detach().clone(), result.untyped_storage()
    size = storage.size()
    storage.resize_(0)
    storage.resize_(size)
    result.data.copy_(values)
    result.sum().backward()
    after = memory.stats()
    assert after.hits + after.misses > before.hits + before.misses or name == "cross_entropy"
    assert after.in_use >= BLOCK


# ---- threads and processes -----------------------------------------------------------------------


def test_threads() -> None:
    def work(value: float) -> bool:
        x = torch.full((ELEMENTS,), value)
        return all(torch.equal(recycled(x), x) for _ in range(12))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, (1.0, 2.0, 3.0, 4.0)))
    assert memory.stats().in_use == 0
    assert memory.stats().hits > 0


def logits() -> Tensor:
    """Returns logits of 64 MiB, after a call that makes persistent allocations."""
    x = torch.randn(64, 1 << 18, requires_grad=True)
    F.cross_entropy(x[:1], torch.zeros(1, dtype=torch.int64)).backward()
    x.grad = None
    return x


def train(x: Tensor, elements: int, steps: int = 4) -> None:
    for _ in range(steps):
        F.cross_entropy(x, torch.zeros(64, dtype=torch.int64)).backward()
        x.grad = None
        torch.empty(elements).fill_(1)


def run(code: str, **environment: str) -> str:
    """Returns the output of code that uses this file, in a new process that forces kernels."""
    names = "from processes import left\nfrom test_recycle import *\n"
    names += "torch.set_num_threads(1)\nx = torch.ones(ELEMENTS)\n"
    done = python(names + textwrap.dedent(code), **{"PYFUSED_BACKEND": "cpu"} | environment)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


def test_a_forked_child_starts_with_no_free_block() -> None:
    run("""
        kept = recycled(x); recycled(x)
        assert memory.stats().free == BLOCK
        if child := os.fork():
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17
            assert memory.stats().free == BLOCK and kept.sum() == ELEMENTS
        else:
            assert memory.stats().free == 0
            kept.add_(1); recycled(x); del kept
            assert memory.stats().free == 2 * BLOCK
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
        print(resident("VmHWM"))
    """
    recycled, new = (int(run(code, PYFUSED_RECYCLE=asked)) for asked in ("1", "0"))
    assert recycled < new + 64 * MIB + 8 * MIB


FREED = "cpu.empty(x.shape, x.dtype, x).data_ptr()"


@pytest.mark.skipif(not ASAN, reason="make sanitize runs it")
@pytest.mark.parametrize(
    ("x", "n", "address", "error"),
    [
        ("torch.zeros(5)", 6, "x.data_ptr()", "heap-buffer-overflow"),
        ("torch.ones(9 << 20)", ELEMENTS, FREED, "use-after-poison"),
    ],
)
def test_errors_are_reported(x: str, n: int, address: str, error: str) -> None:
    """The kernels are instrumented, and free blocks are poisoned."""
    done = process("-c", f"""
import torch
from pyfused.backends import cpu
x = {x}
cpu.native.relu(0, {n}, {address}, x.data_ptr(), (0.0, 0.0, 0.0), 1, ())
""")  # fmt: skip
    assert done.returncode != 0
    assert error in done.stderr


@pytest.mark.parametrize("enabled", ["1GB", 1 << 30, 1, None])
def test_a_number_of_bytes_is_not_a_bool(enabled: Any) -> None:
    with pytest.raises(TypeError, match=r"enabled: expected a bool, got .*; pass .* as limit="):
        memory.recycle(enabled)


# ---- peak memory of calls, without arguments and results -----------------------------------------

SIZE = 40 * MIB  # bytes of the logits; large compared to other allocations
SLACK = 5 * MIB
# The number of tensors of SIZE bytes that a call allocates; a head's logits have twice as many. A
# head allocates a quarter of its logits, linear_kl_div also for the teacher. A weight of half
# precision is converted to float32 in parts.
TENSORS: dict[str, float] = {
    "mean": 1, "smoothed": 1, "sum": 1, "no gradient": 0,
    "mse_loss-0": 0, "mse_loss-1": 1, "mse_loss-2": 2,
    "relu": 2,  # its output and the gradient
    "linear_cross_entropy": 0.5, "linear_log_probs": 0.5, "linear_kl_div": 1,
    "half": 1.4,  # the gradient of the weight, and the logits
}  # fmt: skip


def print_growth(name: str, call: Callable[[], Any], leaves: Sequence[Tensor] = ()) -> None:
    """Prints the growth of the peak over the resident memory before a call.

    Makes the call twice, because the first call also makes persistent allocations.
    """
    for _ in range(2):
        gc.collect()
        memory.release()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = resident()
        call()
        for x in leaves:
            x.grad = None
    print(name, resident("VmHWM") - before)


def print_growth_of_calls() -> None:
    torch.set_num_threads(1)
    # Freed blocks of this size return to the system. glibc would raise the size after a large one.
    ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD
    x, y = (torch.randn(64, SIZE // 64 // 4, requires_grad=True) for _ in range(2))
    fixed, target = y.detach(), torch.randint(x.shape[1], (64,))
    options: dict[str, dict[str, Any]] = {
        "mean": {}, "smoothed": {"label_smoothing": 0.1}, "sum": {"reduction": "sum"},
    }  # fmt: skip
    for name, given in options.items():
        loss = partial(F.cross_entropy, x, target, **given)
        print_growth(name, lambda loss=loss: loss().backward(), [x])
    print_growth("no gradient", lambda: F.cross_entropy(x.detach(), target))
    print_growth("mse_loss-0", lambda: F.mse_loss(x.detach(), fixed))
    print_growth("mse_loss-1", lambda: F.mse_loss(x, fixed).backward(), [x])
    print_growth("mse_loss-2", lambda: F.mse_loss(x, y).backward(), [x, y])
    print_growth("relu", lambda: F.relu(x).backward(fixed), [x])
    rows, classes = 1280, 16384  # 80 MiB of logits
    head = [torch.randn(n, 8, requires_grad=True) for n in (rows, classes)]
    target, teacher = torch.randint(classes, (rows,)), [torch.randn(n, 4) for n in (rows, classes)]
    losses = {
        "linear_cross_entropy": lambda: F.linear_cross_entropy(*head, target),
        "linear_log_probs": lambda: F.linear_log_probs(*head, target).log_probability.sum(),
        "linear_kl_div": lambda: F.linear_kl_div(*head, *teacher),
    }
    for name, loss in losses.items():
        print_growth(name, lambda loss=loss: loss().backward(), head)
    cpu.HALF_PRODUCTS = "float32"
    half = [torch.randn(n, 20).half().requires_grad_() for n in (4, SIZE // 40)]
    print_growth("half", lambda: F.linear_cross_entropy(*half, target[:4]).backward(), half)


@pytest.fixture(scope="module")
def growth() -> dict[str, int]:
    """Returns the bytes that each call needs, measured in one process."""
    done = python("from test_recycle import print_growth_of_calls\nprint_growth_of_calls()")
    assert done.returncode == 0, done.stderr
    return {name: int(size) for name, size in re.findall(r"(.+) (-?\d+)\n", done.stdout)}


@no_asan
@needs_proc
@pytest.mark.parametrize("name", TENSORS)
def test_a_call_only_allocates_its_results(name: str, growth: dict[str, int]) -> None:
    least = 0 if "linear" in name else TENSORS[name]
    assert least * SIZE - SLACK < growth[name] < TENSORS[name] * SIZE + SLACK
