"""Time the wrapper's Python hop by hop, what a patched call costs more, and the import.

python benchmarks/hops.py
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from cases import Case, draw
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

import pyfused
from pyfused.backends import CrossEntropyOptions, Want, cpu
from pyfused.functional import cross_entropy, relu
from pyfused.ops import operators
from pyfused.ops.activation import Activation
from pyfused.ops.dispatch import reason_for_torch
from pyfused.ops.originals import original

ROUNDS, CALLS = 301, 200
Call = Callable[[], object]
Ways = dict[str, dict[str, Call]]

# Taken by the kernels, and as little work as that can be.
logits, label = torch.randn(1, 1 << 17), torch.zeros(1, dtype=torch.int64)
arguments = (logits, label, None, None, -100, None, "mean", 0.0)
options = CrossEntropyOptions(-100, "mean", 0.0)
x, target = torch.randn(8, 10), torch.zeros(8, dtype=torch.int64)


def patched_ways() -> Ways:
    """What a call of each operator costs more while patched, where ATen is the faster one."""
    names = {
        f"F.{name}": (F, name, op) for name, op in operators.OPERATORS.items() if hasattr(F, name)
    }
    for name, op in operators.OPERATORS.items():
        if isinstance(op, Activation) and hasattr(torch, name):
            names |= {
                f"torch.{name}": (torch, name, op),
                f"Tensor.{name}": (torch.Tensor, name, op),
            }
    ways: Ways = {}
    for place, (owner, name, op) in names.items():
        drawn = draw(Case(op.name, (8, 10)))
        tensors = drawn.input.detach(), *drawn.others
        of_torch = original(getattr(owner, name))
        with pyfused.patch():
            patched = original(getattr(owner, name))
        ways[f"{place}, 80 elements"] = {
            f"patched {place}": partial(patched, *tensors, **drawn.options),
            place: partial(of_torch, *tensors, **drawn.options),
        }
    return ways


# For each way its calls, from the outermost in: a hop costs what its call takes beyond the next.
WAYS: Ways = patched_ways() | {
    "relu, 80 elements": {
        "pyfused.functional.relu": lambda: relu(x),
        "torch.relu": lambda: torch.relu(x),
    },
    "cross_entropy, (8, 10)": {
        "pyfused.functional.cross_entropy": lambda: cross_entropy(x, target),
        "F.cross_entropy": lambda: F.cross_entropy(x, target),
    },
    "cross_entropy (1, 131072), fused": {
        "pyfused.functional.cross_entropy": lambda: cross_entropy(logits, label),
        "ops.cross_entropy.fused": lambda: operators.CROSS_ENTROPY.fused(arguments, False),
        "backends.cpu.cross_entropy": lambda: cpu.cross_entropy(
            logits, label, None, options, Want()
        ),
    },
    "the decision alone": {
        "reason_for_torch, 80 elements": lambda: reason_for_torch(operators.RELU, (x,)),
        "nothing": lambda: None,
    },
    "the decision alone, of a fused call": {
        "reason_for_torch, 131072 elements": lambda: reason_for_torch(
            operators.CROSS_ENTROPY, arguments
        ),
        "nothing": lambda: None,
    },
}


def nanoseconds(calls: list[Call]) -> list[list[float]]:
    """The times of each call, taken by turns."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for call, taken in zip(calls, times, strict=True):
            started = time.perf_counter_ns()
            for _ in range(CALLS):
                call()
            taken.append((time.perf_counter_ns() - started) / CALLS)
    return times


def import_milliseconds(turns: int = 15) -> list[float]:
    """What importing pyfused adds to importing torch, each time in a new process."""
    code = (
        "import time, torch; started = time.perf_counter(); import pyfused;"
        "print(1e3 * (time.perf_counter() - started))"
    )
    command = [sys.executable, "-c", code]
    return [
        float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        for _ in range(turns)
    ]


def main() -> None:
    torch.set_num_threads(1)
    table = Table("way", "call", title=f"one thread, medians of {ROUNDS} turns")
    for name in ("ns", "its own hop, ns"):
        table.add_column(name, justify="right")
    for way, calls in WAYS.items():
        times = nanoseconds(list(calls.values()))
        inner = [*times[1:], None]
        for (name, taken), within in zip(zip(calls, times, strict=True), inner, strict=True):
            pairs = zip(taken, within, strict=True) if within else ()
            own = f"{median(a - b for a, b in pairs):,.0f}" if within else ""
            table.add_row(way, name, f"{median(taken):,.0f}", own)
            way = ""
        table.add_section()
    Console(width=110).print(table)
    print(f"import pyfused, after torch: {median(import_milliseconds()):.1f} ms")


if __name__ == "__main__":
    main()
