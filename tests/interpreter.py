"""The Triton kernels on CPU tensors, interpreted: PYFUSED_BACKEND=triton TRITON_INTERPRET=1.

The same tests hold for them. The interpreter takes milliseconds for each program of a kernel, so
that tiles are small here: a few elements make several blocks, by turns, in every layout.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from shared import SHARED

from pyfused.ops import dispatch

ON = dispatch.FORCED == "triton"
# The files that are about something else than every backend.
OTHERS = sorted(
    path.name
    for path in Path(__file__).parent.iterdir()
    if (path.name.startswith("test_") or path.is_dir()) and path.name not in SHARED
)


GROUP, MOST_PROGRAMS = 4, 30
TABLES = "CLASSES_INNER", "FORWARD", "SHORT_CLASSES_INNER", "AIMED", "PAIRED", "DENSE_CLASSES_INNER"


def use_small_tiles() -> None:
    from pyfused.kernels import launch

    any_ = launch.ANY
    launch.POINTWISE = dict.fromkeys((2, 4, 8), launch.Elements(32, 32))
    launch.MOST_PROGRAMS = MOST_PROGRAMS
    launch.GROUP = GROUP
    launch.COUNT, launch.MOST_COUNTERS = launch.Elements(8, 32), 3
    few = launch.Row(4, 8, 1, 32, turns=False)
    classes = few, launch.Row(100, 32, 1, 32), launch.Row(any_, 64, 1, 32)
    launch.resident = lambda *_: 3
    launch.COUNTED = 16
    for table in TABLES:
        setattr(launch, table, dict.fromkeys((2, 4, 8), classes))
    held = launch.Row(4, 64, 16, 32), launch.Row(22, 64, 16, 128)
    launch.POSITIONS_INNER = dict.fromkeys((2, 4, 8), (*held, launch.Row(any_, 256, 16, 256)))
    launch.FEW = dict.fromkeys((2, 4), launch.Row(5, 80, 16, 32))
    launch.SPLIT = launch.Split(positions=4, classes=64, programs=12)


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


if ON:
    use_small_tiles()
    with_constants_of_bfloat16()
    interpret_faster()
    np.seterr(all="ignore")  # NaN and infinities are the kernels' business, as on a GPU


# Beyond the interpreter: it knows one thread, and takes a minute for a check of this size. No size
# is torch's where the backend is forced.
NOT_INTERPRETED = ("several_python_threads", "where_small_inputs", "1023", "1025", "2049")
