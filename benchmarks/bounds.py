"""What bounds a case: beside torch and pyfused, an autograd.Function that only moves the bytes.

    python benchmarks/bounds.py
    python benchmarks/bounds.py relu '(1024, 32000)'

It reads the input once and writes each output once, into memory such as the kernels' outputs have,
and computes nothing; what else an operator has to read is left out. No kernel is faster: torch
divided by it is what pyfused can reach at most.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from cases import ACTIVATIONS, CASES, MODES, TORCH, Case, draw, step, training_step
from measure import Quartiles, by_turns, plan, quartiles, ratios, settle_allocator, timed
from rich.console import Console
from rich.table import Table
from torch import Tensor

import pyfused.functional
from pyfused.backends import cpu

SECONDS = 1.5


def copied(source: Tensor) -> Tensor:
    """A copy in memory such as the kernels' outputs have."""
    return cpu.empty_like(source).copy_(source)


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


def measure(case: Case) -> tuple[list[float], list[Quartiles]]:
    """Milliseconds of torch, pyfused and the bound; torch's by pyfused's, and by the bound's."""
    arguments = draw(case)
    steps = [step(o, case, arguments, MODES[-1]) for o in (TORCH, pyfused.functional)]
    bound = Activation if case.op in ACTIVATIONS else Loss
    steps.append(training_step(lambda input, *_, **__: bound.apply(input), arguments))
    rounds, calls = plan(steps, SECONDS)
    times = by_turns([partial(timed, call, calls) for call in steps], rounds)
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
