"""Block sizes and warps of every kernel, from the number of classes and the size of an element.

Measured on an H100 (80 GB HBM3), as far as times are given beside a choice. `make gpu-compile`
shows that none of them spills, and `make gpu-check` times their neighbours on a GPU.
"""

from __future__ import annotations

import functools
from itertools import repeat
from typing import Any, NamedTuple

import torch
from triton import knobs
from triton.compiler import make_backend
from triton.runtime import JITFunction, driver

try:
    from triton._C.libtriton import native_specialize_impl as specialize
except ImportError:  # a release of Triton that is not known yet
    specialize = None


# An argument is not constant, and its value and its alignment count.
SPECIALIZED = repeat(False), repeat(True), repeat(True)


class Choice(NamedTuple):
    """A program's tile of `rows` x `block` elements, and the threads that share it."""

    rows: int
    block: int
    threads: int
    whole_row: bool = True  # the tile holds all classes, so that they are read once

    def options(self) -> dict[str, Any]:
        """Returns what Triton takes with every launch."""
        return {"num_warps": max(1, self.threads // warp_size()), "enable_fp_fusion": True}


def choose(
    itemsize: int,
    classes: int = 0,
    inner: int = 1,
    *,
    tensors: int = 1,
    inner_contiguous: bool = False,
    most_threads: int = 512,
    once: bool = False,
) -> Choice:
    """Returns the tile of a program.

    Args:
        itemsize: Bytes of an element of the input.
        classes: Number of classes; 0 for kernels that work element by element.
        inner: Number of inner indices: see `rows.py`.
        tensors: How many tiles a thread keeps in registers at a time.
        most_threads: That hold a whole row in registers.
        once: No element is needed twice, as there is no gradient.
        inner_contiguous: Inner indices are contiguous in memory, (N, C, d1, ..., dk), not classes.
    """
    vector = 16 // itemsize  # elements of the widest load
    if not classes:
        # Two such loads of each operand, so that the second is under way while the first is used.
        return Choice(1, 2 * vector * 128, 128)
    # Elements of a thread: 32 hide the latency of memory and leave it registers to compute with.
    # Registers of float64 are twice as wide, and its functions take more of them.
    each = (32 if itemsize < 8 else 8) // tensors
    if inner_contiguous:
        # A thread has as many rows as it can load at once, and so adds up their classes alone.
        threads = min(128, max(32, power_of_2(inner) // vector))
        rows = min(threads * vector, power_of_2(inner))
        block = min(power_of_2(classes), max(1, each // vector))
        return Choice(rows, block, threads, block >= classes)
    block = power_of_2(classes)
    if block <= 16 * each:
        # Several rows, and half as many elements of a thread: of 10 float32 classes, 0.67 times
        # the time, of 100 classes 0.64 times.
        return Choice(16 * each // block, block, 32)
    if block <= most_threads * each:
        return Choice(1, block, max(32, block // each))
    if once:
        return Choice(1, 128 * each, 128, whole_row=False)  # 0.79 times the time of one block
    if itemsize == 2 and tensors == 1 and block <= 1024 * each:
        return Choice(1, block, 512)  # 0.81 times the time of two passes
    # Longer rows are read twice. The fewer programs share L2, the more of their rows it keeps until
    # the second time; larger blocks leave much of the last one empty where rows are not as long.
    threads = 256 if classes <= 65_536 else 512
    return Choice(1, threads * each, threads, whole_row=False)


def power_of_2(n: int) -> int:
    """Returns the smallest power of 2 that is at least n."""
    return 1 << (n - 1).bit_length()


class Launch:
    """A kernel with the constants of its launches, which come last among its parameters.

    Triton binds, specializes and hashes the arguments of every launch, in some 15 Python calls. So
    only the first launch of arguments that Triton specializes alike goes that way; later ones call
    what it has compiled. Triton's way also stays for its interpreter, and where hooks are set.
    """

    def __init__(self, kernel: Any, choice: Choice, **constants: Any) -> None:
        tile = {"ROWS": choice.rows, "BLOCK": choice.block}
        constants |= {name: size for name, size in tile.items() if name in kernel.arg_names}
        self.kernel, self.choice, self.constants = kernel, choice, constants
        self.compiles = isinstance(kernel, JITFunction) and specialize is not None
        if self.compiles:
            last = [parameter for parameter in kernel.params if parameter.is_constexpr]
            self.last = [constants.get(each.name, each.default) for each in last]
        self.compiled: dict[Any, Any] = {}  # Triton unloads a kernel that nobody refers to

    def __call__(self, programs: int, *arguments: Any) -> None:
        """Launches a grid of one dimension on the device of the first argument, a tensor."""
        index = arguments[0].get_device()
        if index >= 0 and index != driver.active.get_current_device():
            with torch.cuda.device(index):
                self(programs, *arguments)
            return
        enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        hooks = getattr(enter, "calls", enter) or getattr(leave, "calls", leave)
        if hooks or not self.compiles:
            self.by_triton(programs, arguments)
            return
        active = driver.active
        device = active.get_current_device()
        target = backend()
        key = device, *map(specialize, repeat(target), arguments, *SPECIALIZED)
        compiled = self.compiled.get(key)
        if compiled is None:
            compiled = self.by_triton(programs, arguments)
            if compiled is not None:
                self.compiled[key] = compiled
            return
        grid_and_stream = programs, 1, 1, active.get_current_stream(device)
        found = compiled.function, compiled.packed_metadata
        compiled.run(*grid_and_stream, *found, None, None, None, *arguments, *self.last)

    def by_triton(self, programs: int, arguments: tuple[Any, ...]) -> Any:
        return self.kernel[(programs,)](*arguments, **self.constants, **self.choice.options())


# Returns the launch of the same constants again, for calls that prepare none of their own.
prepared = functools.lru_cache(maxsize=4096)(Launch)


@functools.cache
def backend() -> Any:
    """Triton's compiler for the GPUs of this process, which says what it specializes."""
    return make_backend(driver.active.get_current_target())


@functools.cache
def warp_size() -> int:
    """Threads of a warp: 32 on NVIDIA GPUs, 32 or 64 on AMD GPUs."""
    return 32 if knobs.runtime.interpret else int(driver.active.get_current_target().warp_size)
