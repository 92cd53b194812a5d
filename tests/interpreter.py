"""The Triton kernels on CPU tensors, interpreted: PYFUSED_BACKEND=triton TRITON_INTERPRET=1.

The same tests hold for them. The interpreter takes milliseconds for each program of a kernel, so
tests are small, and so are the tiles here.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from shared import SHARED

from pyfused import backends

ON = backends.FORCED == "triton"
# The files of which every test runs interpreted; of the others in SHARED those that are marked so.
WHOLE = (
    *("test_contract.py", "test_fuzz.py", "test_totals.py"),
    *("test_arithmetic.py", "test_backends.py", "test_formula.py", "test_gated.py"),
)
# The files that are about something else than every backend.
OTHERS = sorted(
    path.name
    for path in Path(__file__).parent.iterdir()
    if (path.name.startswith("test_") or path.is_dir()) and path.name not in SHARED
)


def use_small_tiles() -> None:
    """So that few elements take several tiles and programs, and 65 classes or more two passes."""
    from pyfused.backends import triton as backend
    from pyfused.kernels import launch

    def choose(
        itemsize: int,
        classes: int = 0,
        inner: int = 1,
        *,
        tensors: int = 1,
        inner_contiguous: bool = False,
        most_threads: int = 512,
        once: bool = False,
    ) -> launch.Choice:
        if not classes:
            return launch.Choice(1, 32, 32)
        all_classes = launch.power_of_2(classes)
        if inner_contiguous:
            block = min(all_classes, 4)
            return launch.Choice(min(launch.power_of_2(inner), 16), block, 32, block >= classes)
        if all_classes <= 64:
            return launch.Choice(64 // all_classes, all_classes, 32)
        return launch.Choice(1, 64, 32, whole_row=False)

    launch.choose = backend.choose = choose
    backend.MOST_PROGRAMS, backend.MOST_PARTS, backend.COUNTED_BY_PROGRAMS = 30, 8, 16
    backend.MOST_ARRIVALS = 20


def interpret_faster() -> None:
    """Leaves out what takes most of the interpreter's time.

    It puts its own functions in the place of the language's in each call of a function: once a
    launch and module will do. And it looks for overflows, as a GPU does not, of sums and products
    of integers, which are small here.
    """
    from triton.runtime.interpreter import GridExecutor, InterpretedFunction, interpreter_builder

    interpreter_builder.options = replace(interpreter_builder.options, sanitize_overflow=False)
    launch, call, seen = GridExecutor.__call__, InterpretedFunction.__call__, set()

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> None:
        seen.clear()
        launch(self, *args, **kwargs)

    def call_patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__ in seen:
            return self.rewrite()(*args, **kwargs)
        seen.add(self.fn.__module__)
        return call(self, *args, **kwargs)

    GridExecutor.__call__, InterpretedFunction.__call__ = launch_anew, call_patched


def with_constants_of_bfloat16() -> None:
    """Which interpreters before Triton 3.9 lack."""
    from triton.language import bfloat16
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    if not hasattr(Builder, "get_bf16"):
        Builder.get_bf16 = lambda self, x: self.create_fp_trunc(self.get_fp32(x), bfloat16)


def with_negative_zero() -> None:
    """Which is a constant of 0 to the interpreter, where a parameter of a launch is -0.0."""
    from triton.language.semantic import TritonSemantic

    constant = TritonSemantic.scalar_constant

    def signed(self: Any, value: Any, dtype: Any) -> Any:
        made = constant(self, value, dtype)
        if isinstance(value, float) and value == 0:
            made.handle.data = np.copysign(made.handle.data, value)
        return made

    TritonSemantic.scalar_constant = signed


if ON:
    use_small_tiles()
    with_constants_of_bfloat16()
    with_negative_zero()
    interpret_faster()
    np.seterr(all="ignore")  # NaN and infinities are the kernels' business, as on a GPU
