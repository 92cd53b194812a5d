"""Chooses block sizes and warps from the number of classes and the element size; launches kernels.

Choices with a time were measured on an H100 (80 GB HBM3). `make gpu-compile` checks that no kernel
spills registers.
"""

from __future__ import annotations

import functools
from itertools import repeat
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.runtime import JITFunction, driver

from ..backends.versions import is_tested
from ..torch_internals import triton_specializer
from .program import parts_of

specialize = triton_specializer() if is_tested(triton.__version__) else None
# Arguments are not const; they are specialized by value and by alignment.
SPECIALIZED = repeat(False), repeat(True), repeat(True)


class Choice(NamedTuple):
    """A program's tile of `rows` x `block` elements, and its number of threads."""

    rows: int
    block: int
    threads: int
    whole_row: bool = True  # the tile holds all classes, so they are read once
    units: tuple[int, int] = (1, 1)  # the alignment of inner indices and of classes; see `rows.py`
    vector: int = 0  # elements of an aligned vector, to load unaligned rows; 0 for other rows
    stages: int = 1  # with more, one program per multiprocessor loads stages - 1 tiles ahead


def choose(
    itemsize: int,
    classes: int = 0,
    inner: int = 1,
    *,
    tensors: int = 1,
    inner_contiguous: bool = False,
    most_threads: int = 512,
    once: bool = False,
    shared: int = 0,
) -> Choice:
    """Returns the tile of a program.

    Args:
        itemsize: Bytes per element of the input.
        classes: Number of classes; 0 for elementwise kernels.
        inner: Number of inner indices; see `rows.py`.
        tensors: Number of tiles kept in registers at the same time.
        most_threads: Maximum number of threads that keep a whole row in registers.
        once: Whether each element is needed only once, because there is no gradient.
        shared: Bytes of shared memory to load tiles ahead; see `resources`.
        inner_contiguous: Whether inner indices are contiguous in memory instead of classes.
    """
    vector = 16 // itemsize  # vector width of a 16-byte load
    if not classes:
        # Two vector loads per operand and thread: the second overlaps with computing on the first.
        # In half precision, one vector and more threads take 0.89 to 1.01 times the time.
        return Choice(1, 2 * vector * 128, 128 if itemsize > 2 else 256)
    # Elements per thread: 32 hide memory latency and leave enough registers for the computation.
    # float64 values need two registers each, and float64 functions need more temporaries.
    each = (32 if itemsize < 8 else 8) // tensors
    if inner_contiguous:
        # Each thread has as many rows as one vector load, so class sums need no shuffles.
        threads = min(128, max(32, power_of_2(inner) // vector))
        rows = min(threads * vector, power_of_2(inner))
        block = min(power_of_2(classes), max(1, each // vector))
        return Choice(rows, block, threads, block >= classes)
    block = power_of_2(classes)
    if block <= 16 * each:
        # Several rows per program, with half as many elements per thread: 0.67 times the time at
        # 10 float32 classes, 0.64 times at 100.
        return Choice(16 * each // block, block, 32)
    if block <= most_threads * each:
        return Choice(1, block, max(32, block // each))
    if once:
        return Choice(1, 128 * each, 128, whole_row=False)  # 0.79 times the time of one block
    if itemsize == 2 and tensors == 1 and block <= 1024 * each:
        # 0.81 times the time of two passes; 0.85 of that with two tiles loaded ahead.
        stages = min(3, 1 + shared // (block * itemsize))
        return Choice(1, block, 512, stages=stages)
    # Longer rows are read twice. With fewer resident programs, L2 keeps more of their rows until
    # the second pass. Larger blocks would waste more of the last block in shorter rows.
    threads = 256 if classes <= 65_536 else 512
    return Choice(1, threads * each, threads, whole_row=False)


def power_of_2(n: int) -> int:
    """Returns the smallest power of 2 that is at least n."""
    return 1 << (n - 1).bit_length()


class Launch:
    """A kernel with fixed constexpr arguments, which are the last parameters of the kernel.

    Triton binds, specializes and hashes the arguments of every launch, in about 15 Python calls. So
    only the first launch of each specialization uses Triton's launcher; later launches call the
    compiled kernel directly. Under Triton's interpreter, with launch hooks, or with an untested
    release of Triton, all launches use Triton's launcher.
    """

    def __init__(self, kernel: Any, choice: Choice, **constants: Any) -> None:
        tile = {name.upper(): value for name, value in choice._asdict().items()}
        constants |= {name: tile[name] for name in tile if name in kernel.arg_names}
        self.kernel, self.choice, self.constants = kernel, choice, constants
        self.compiles = isinstance(kernel, JITFunction) and specialize is not None
        if self.compiles:
            self.last = [constants[each.name] for each in kernel.params if each.is_constexpr]
        self.compiled: dict[Any, Any] = {}  # holds a reference, or Triton would unload the kernel

    def __call__(self, programs: int, *arguments: Any) -> None:
        """Launches a one-dimensional grid on the device of the first argument.

        The first argument is a tensor or a tuple of tensors.
        """
        first = arguments[0]
        index = (first[0] if isinstance(first, tuple) else first).get_device()
        if index >= 0 and index != driver.active.get_current_device():
            with torch.cuda.device(index):
                self(programs, *arguments)
            return
        if not self.compiles or has_hooks():
            self.by_triton(programs, arguments)
            return
        active = driver.active
        device = index if index >= 0 else active.get_current_device()
        target = backend(device)
        key = device, *map(specialize, repeat(target), arguments, *SPECIALIZED)
        compiled = self.compiled.get(key)
        if compiled is None:
            compiled = self.by_triton(programs, arguments)
            if compiled is not None:
                self.compiled[key] = compiled
            return
        grid_and_stream = programs, 1, 1, active.get_current_stream(device)
        kernel = compiled.function, compiled.packed_metadata
        compiled.run(*grid_and_stream, *kernel, None, None, None, *arguments, *self.last)

    def by_triton(self, programs: int, arguments: tuple[Any, ...]) -> Any:
        warps = max(1, self.choice.threads // warp_size())
        options = {"num_warps": warps, "enable_fp_fusion": True}
        return self.kernel[(programs,)](*arguments, **self.constants, **options)


def encoded(numbers: tuple[float | None, ...]) -> tuple[Any, ...]:
    """Encodes the numbers of a float64 kernel, because Triton passes floats in tuples as float32.

    `rows.number` decodes them.
    """
    return tuple([None if number is None else parts_of((number,)) for number in numbers])


def has_hooks() -> bool:
    """Returns whether Triton calls hooks at each launch."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


@functools.cache
def backend(device: int) -> Any:  # noqa: ARG001 the cache depends on it
    """Returns Triton's compiler backend for the current device.

    It decides how arguments are specialized.
    """
    from triton.compiler import make_backend

    return make_backend(driver.active.get_current_target())


def warp_size() -> int:
    """Returns the threads per warp of the current device: 32 on NVIDIA GPUs, 32 or 64 on AMD's."""
    return 32 if knobs.runtime.interpret else int(driver.active.get_current_target().warp_size)


@functools.cache
def resources(device: int) -> tuple[int, int]:
    """Returns the multiprocessors of a GPU, and their shared memory in bytes, or 0.

    Only NVIDIA GPUs load to shared memory asynchronously. Without a GPU, returns an H100's.
    """
    if not knobs.runtime.interpret and driver.active.get_current_target().backend != "cuda":
        return 1, 0
    if not torch.cuda.is_available():
        return 132, 232_448
    properties = torch.cuda.get_device_properties(None if device < 0 else device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin


def on_default_stream(device: torch.device) -> bool:
    """Returns whether kernels are launched on the default stream of a GPU."""
    if knobs.runtime.interpret:
        return False
    return driver.active.get_current_stream(device.index) == 0  # type: ignore[no-any-return]
