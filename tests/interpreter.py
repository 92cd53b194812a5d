"""Runs the Triton kernels on CPU tensors in the interpreter: PYFUSED_BACKEND=triton
TRITON_INTERPRET=1.

The interpreter takes milliseconds for each program of a kernel, so tests and tiles are small.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from shared import SHARED

from pyfused import backends

ON = backends.FORCED == "triton"
TESTS = Path(__file__).parent
# Files whose tests all run interpreted; other files of SHARED run tests marked `interpreted`.
WHOLE = (
    *("test_values.py", "test_fuzz.py"),
    *("test_arithmetic.py", "test_backends.py", "test_formula.py"),
)
# Files that do not apply to every backend.
OTHERS = sorted(
    path
    for path in (each.relative_to(TESTS).as_posix() for each in TESTS.rglob("test_*.py"))
    if path not in SHARED
)


def use_small_tiles() -> None:
    """Chooses small tiles: small tensors have several tiles, and 65 classes need two passes."""
    from pyfused.backends import triton as backend
    from pyfused.kernels import launch

    def choose(
        _: int, classes: int = 0, inner: int = 1, inner_contiguous: bool = False, **unused: Any
    ) -> launch.Choice:
        if not classes:
            return launch.Choice(1, 32, 32)
        all_classes = launch.power_of_2(classes)
        if inner_contiguous:
            block = min(all_classes, 4)
            return launch.Choice(min(launch.power_of_2(inner), 16), block, 32, block >= classes)
        if all_classes <= 64:
            stages = 2 if all_classes > 8 else 1
            return launch.Choice(64 // all_classes, all_classes, 32, stages=stages)
        return launch.Choice(1, 64, 32, whole_row=False)

    launch.choose = backend.choose = choose
    backend.resources = lambda _: (3, 0)
    backend.MOST_PROGRAMS, backend.MOST_ARRIVALS, backend.COUNTED_BY_PROGRAMS = 30, 20, 16


def interpret_faster() -> None:
    """Removes the slowest parts of the interpreter.

    The interpreter patches Triton's language for each function call, but once per launch and module
    suffices. It also checks integer sums and products for overflow, which cannot occur in these
    tests.
    """
    from triton.runtime.interpreter import GridExecutor, InterpretedFunction, interpreter_builder

    interpreter_builder.options = replace(interpreter_builder.options, sanitize_overflow=False)
    launch, call, seen = GridExecutor.__call__, InterpretedFunction.__call__, set()

    def launch_patched(self: Any, *args: Any, **kwargs: Any) -> None:
        seen.clear()
        launch(self, *args, **kwargs)

    def call_patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__ in seen:
            return self.rewrite()(*args, **kwargs)
        seen.add(self.fn.__module__)
        return call(self, *args, **kwargs)

    GridExecutor.__call__, InterpretedFunction.__call__ = launch_patched, call_patched


def with_constants_of_bfloat16() -> None:
    """Adds bfloat16 constants, which interpreters before Triton 3.9 lack."""
    from triton.language import bfloat16
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    if not hasattr(Builder, "get_bf16"):
        Builder.get_bf16 = lambda self, x: self.create_fp_trunc(self.get_fp32(x), bfloat16)


def with_negative_zero() -> None:
    """Preserves the sign of -0.0 in scalar constants, as launch parameters do on a GPU."""
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
    np.seterr(all="ignore")  # a GPU does not warn of NaN and infinities
