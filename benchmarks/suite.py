"""Times the cases beside torch, torch.compile and a copy, and measures peak memory.

Implements run.py's commands suite and memory. With THP_MEM_ALLOC_ENABLE=1, the only peer is torch
with huge pages, in forward+backward.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import cases
import torch
from cases import BF16, CASES, HEADLINES, MODES, TORCH, TRAINING, Arguments, Case, M, step
from head import peak_growth
from report import Found, Row, machine_info, measured, peer, row
from rich.progress import track
from torch import Tensor

import pyfused.functional

HUGE_PAGES = os.environ.get("THP_MEM_ALLOC_ENABLE") == "1"
PEERS: dict[str, Any] = (
    {"torch, THP": TORCH} if HUGE_PAGES else {"torch": TORCH, "torch.compile": cases.Compiled()}
)
SECONDS = 1.5
# In a virtual machine, the host may have to allocate memory, too, when it is first touched.
WARM_UP = 5


def measure(case: Case, mode: str, arguments: Arguments) -> Row:
    ours = step(pyfused.functional, case, arguments, mode)
    peers = {name: step(operators, case, arguments, mode) for name, operators in PEERS.items()}
    if case.traffic(mode) and not HUGE_PAGES:
        peers["copy"] = cases.copy_step(case, mode)
    timers = cases.timers_of([each for peer in peers.values() for each in (peer, ours)])
    rounds, calls = cases.plan(timers, SECONDS)
    cases.interleaved(timers, WARM_UP, calls)
    times = cases.interleaved(timers, rounds, calls)
    compared = zip(peers, times[::2], times[1::2], strict=True)
    return row(case, mode, {name: peer(theirs, beside) for name, theirs, beside in compared})


def suite(options: Namespace) -> None:
    """Writes the results to a file; report.py makes tables and plots from it."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no compiler processes while timing
    cases.settle_allocator()
    found = {**measured(machine_info()), "benchmarks": [], "memory": []}
    modes = (TRAINING,) if HUGE_PAGES or options.headlines else MODES
    chosen = cases.chosen(HEADLINES if options.headlines else CASES, options.k)
    for case in track(chosen, "Measuring", transient=True):
        torch.compiler.reset()  # else operators would compile with dynamic shapes
        arguments = cases.draw(case)
        cases.assert_correct(case, arguments)
        for mode in modes:
            found["benchmarks"].append({"extra_info": asdict(measure(case, mode, arguments))})
    if not (HUGE_PAGES or options.headlines):
        found["memory"] = list(peaks(options.k))
    options.file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


# ---- peak memory ---------------------------------------------------------------------------------

MEMORY_CASES = (
    Case("cross_entropy", (1024, 32000)),
    Case("cross_entropy", (1024, 32000), BF16),
    Case("cross_entropy", (8, 21, 256, 256)),
    Case("mse_loss", (32 * M,)),
    Case("relu", (32 * M,)),
)
IMPLEMENTATIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "torch": (TORCH, {}),
    "torch.compile": (cases.Compiled(), {}),
    "pyfused": (pyfused.functional, {}),
    "pyfused, inplace=True": (pyfused.functional, {"inplace": True}),
}


def peaks(parts: list[str]) -> Iterator[Found]:
    """Yields the peak memory of each implementation, measured in its own process."""
    if not Path("/proc/self/clear_refs").exists():  # Linux only
        return
    for case, implementation in product(cases.chosen(MEMORY_CASES, parts), IMPLEMENTATIONS):
        if "inplace" in implementation and case.op != "cross_entropy":
            continue  # other losses lack the option
        command = [sys.executable, __file__, implementation, str(MEMORY_CASES.index(case))]
        taken = int(subprocess.check_output(command))
        print(f"{case.name}, {implementation}: {taken / 2**20:,.0f} MiB at the peak", flush=True)
        fields = {"case": case.name, "implementation": implementation}
        yield {**fields, "bytes": taken, "input_bytes": case.bytes}


def memory(options: Namespace) -> None:
    list(peaks(options.k))


def peak(case: Case, implementation: str) -> int:
    """Returns the peak memory of forward and backward in this process, in bytes."""
    operators, options = IMPLEMENTATIONS[implementation]
    arguments = cases.draw(case)
    function = partial(getattr(operators, case.op), **arguments.options, **options)

    def call(input: Tensor) -> tuple[Tensor, ...]:
        value = function(input, *arguments.others)
        return torch.autograd.grad(value, input, arguments.grad_output)

    return peak_growth(call, lambda: arguments.input * 1)


if __name__ == "__main__":
    print(peak(MEMORY_CASES[int(sys.argv[2])], sys.argv[1]))
