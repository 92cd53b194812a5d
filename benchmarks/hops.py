"""Time the wrapper's Python hop by hop, what a patched call costs more, and the import.

python benchmarks/hops.py
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

import pyfused
from pyfused.backends import CrossEntropyOptions, Want, cpu
from pyfused.functional import cross_entropy, mse_loss, relu
from pyfused.ops import operators
from pyfused.ops.dispatch import reason_for_torch

ROUNDS, CALLS = 301, 200
Call = Callable[[], object]

x, target, other = torch.randn(8, 10), torch.zeros(8, dtype=torch.int64), torch.randn(8, 10)
# Taken by the kernels, and as little work as that can be.
logits, label = torch.randn(1, 1 << 17), torch.zeros(1, dtype=torch.int64)
arguments = (logits, label, None, None, -100, None, "mean", 0.0)
options, torchs = CrossEntropyOptions(-100, "mean", 0.0), (F.relu, F.cross_entropy, F.mse_loss)
aten, method = torch.relu, torch.Tensor.relu
with pyfused.patch():
    patched = (F.relu, F.cross_entropy, F.mse_loss)
    patched_aten, patched_method = torch.relu, torch.Tensor.relu


# For each way its calls, from the outermost in: a hop costs what its call takes beyond the next.
WAYS: dict[str, dict[str, Call]] = {
    "torch.relu, 80 elements": {
        "patched torch.relu": lambda: patched_aten(x),
        "pyfused.functional.relu": lambda: relu(x),
        "torch.relu": lambda: aten(x),
    },
    "Tensor.relu, 80 elements": {
        "patched Tensor.relu": lambda: patched_method(x),
        "Tensor.relu": lambda: method(x),
    },
    "F.relu, 80 elements": {
        "patched F.relu": lambda: patched[0](x),
        "pyfused.functional.relu": lambda: relu(x),
        "F.relu": lambda: torchs[0](x),
    },
    "F.cross_entropy, (8, 10)": {
        "patched F.cross_entropy": lambda: patched[1](x, target),
        "pyfused.functional.cross_entropy": lambda: cross_entropy(x, target),
        "F.cross_entropy": lambda: torchs[1](x, target),
    },
    "F.mse_loss, 80 elements": {
        "patched F.mse_loss": lambda: patched[2](x, other),
        "pyfused.functional.mse_loss": lambda: mse_loss(x, other),
        "F.mse_loss": lambda: torchs[2](x, other),
    },
    "cross_entropy (1, 131072), fused": {
        "patched F.cross_entropy": lambda: patched[1](logits, label),
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
