"""Running out of memory and small thread stacks do not crash the process.

Each test runs in a new process, which a limit or a crash would end.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from catalogue import OF_FAMILIES, Example
from compare import FLOATS
from processes import python
from samples import has_classes
from torch import Tensor

import pyfused
from pyfused.backends import cpu

pytestmark = [pytest.mark.cpu, pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")]

STACK = 128 << 10
# Rows, columns of few classes, and many classes with contiguous positions.
SHAPES = ((3, 3000), (300, 5), (2, 60, 70))


@pyfused.loss
def formula(a: Tensor, b: Tensor) -> Tensor:
    terms = [torch.tanh(a * k) * torch.exp(-b * k) for k in range(1, 8)]
    return sum(terms[1:], terms[0])


def calls(
    examples: dict[str, Example], dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...]
) -> Iterator[Callable[[], Any]]:
    """Yields calls of the examples, and of a formula."""
    for example, shape in product(examples.values(), shapes):
        if len(shape) < 3 or has_classes(example.op):
            yield example.call(dtype, shape).ours
    x, other = (torch.randn(shapes[0]).to(dtype).requires_grad_() for _ in range(2))
    yield partial(formula, x, other)
    yield partial(formula, x, other, reduction="none")


def backward(loss: Tensor) -> None:
    loss.float().sum().backward()


def run_all() -> None:
    for isa in cpu.supported:
        cpu.native = cpu.load(isa)
        for dtype in FLOATS:  # the operators of a family have the same loops
            for loss in calls(OF_FAMILIES, dtype, SHAPES):
                backward(loss())


def test_threads_with_small_stacks() -> None:
    """Tries threads of Python and of OpenMP."""
    code = f"""
        import threading, torch
        from conftest import fused_always
        from test_limits import run_all
        torch.set_num_threads(2)
        threading.stack_size({STACK})
        thread = threading.Thread(target=lambda: (run_all(), print("survived")))
        with fused_always():
            thread.start()
            thread.join()
    """
    done = python(code, OMP_STACKSIZE=f"{STACK}B")
    assert (done.stdout, done.returncode) == ("survived\n", 0), done.stderr


# ---- memory --------------------------------------------------------------------------------------


def test_every_kernel_returns_or_raises_if_memory_runs_out() -> None:
    done = python("""
        import torch
        from conftest import fused_always
        from processes import left
        from catalogue import SOME
        from test_limits import backward, calls
        torch.set_num_threads(2)
        backward(torch.randn(1 << 20, requires_grad=True) * 2)  # starts torch's threads
        failed = 0
        with fused_always():
            every = [*calls(SOME, torch.float32, ((2, 1 << 18),))]
            for run in every:
                with left(0):
                    try:
                        backward(run())
                    except (MemoryError, RuntimeError):
                        failed += 1
            for run in every:
                run()
        # Memory that earlier calls have freed suffices for some.
        print("survived" if failed > len(every) / 2 else f"{failed} of {len(every)} raised")
    """)
    assert (done.stdout, done.returncode) == ("survived\n", 0), done.stderr
