"""What bounds a case: beside torch and pyfused, an autograd.Function that only moves the bytes.

    python benchmarks/bounds.py
    python benchmarks/bounds.py relu '(1024, 32000)'

It reads the input once and writes each output once, into memory as new as an operator's, with huge
pages, and computes nothing; what else an operator has to read is left out. No kernel is faster:
torch divided by it is what pyfused can reach at most.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from cases import ACTIVATIONS, CASES, MODES, Arguments, Case, draw, step
from measure import Quartiles, Step, by_turns, plan, quartiles, ratios, settle_allocator, timed
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import pyfused.functional

SECONDS = 1.5
HUGE, FRESH = 1 << 21, 32 << 20  # as csrc/memory.h
MADV_HUGEPAGE = 14
_libc = ctypes.CDLL(None)


def copied(source: Tensor) -> Tensor:
    """A copy in new memory."""
    copy = torch.empty_like(source)
    size = copy.numel() * copy.element_size()
    if size >= FRESH and hasattr(_libc, "madvise"):
        first, last = -(-copy.data_ptr() // HUGE) * HUGE, (copy.data_ptr() + size) // HUGE * HUGE
        _libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), MADV_HUGEPAGE)
    return copy.copy_(source)


class Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        ctx.save_for_backward(input)
        return copied(input)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        _ = ctx.saved_tensors
        return copied(grad_output)


class Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        ctx.gradient = copied(input)
        return input.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _grad_output: Tensor) -> Tensor:
        gradient: Tensor = ctx.gradient
        ctx.gradient = None
        return gradient


def bare(case: Case, arguments: Arguments) -> Callable[[], None]:
    function = Activation if case.op in ACTIVATIONS else Loss

    def forward_and_backward() -> None:
        arguments.input.grad = None
        function.apply(arguments.input).backward(arguments.upstream)

    return forward_and_backward


def measure(case: Case) -> tuple[list[float], list[Quartiles]]:
    """Milliseconds of torch, pyfused and the bound; torch's by pyfused's, and by the bound's."""
    arguments = draw(case)
    steps = [step(o, case, arguments, MODES[-1]) for o in (F, pyfused.functional)]
    steps.append(bare(case, arguments))
    rounds, calls = plan(steps, SECONDS)

    def fresh(call: Step) -> float:
        arguments.input.grad = None
        return timed(call, calls)

    times = by_turns([partial(fresh, call) for call in steps], rounds)
    ms = [1e3 * quartiles(all_)[1] / calls for all_ in times]
    return ms, [ratios(times[0], times[1]), ratios(times[0], times[2])]


def main() -> None:
    settle_allocator()
    table = Table("case", title="forward+backward, with torch's allocator as it comes")
    for name in ("torch, ms", "pyfused, ms", "bound, ms", "torch / pyfused", "torch / bound"):
        table.add_column(name, justify="right")
    for case in CASES:
        wanted = not sys.argv[1:] or any(part in case.name for part in sys.argv[1:])
        if not wanted or case.reduction != "mean":
            continue
        ms, both = measure(case)
        shown = [f"{median:.2f} ({low:.2f} to {high:.2f})" for low, median, high in both]
        table.add_row(case.name, *(f"{each:,.4g}" for each in ms), *shown)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


if __name__ == "__main__":
    main()
