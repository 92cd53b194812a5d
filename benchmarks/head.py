"""Times a language model's head and loss: bare matrix products, torch and pyfused.

Times include forward and backward and the allocation of outputs. Calls are interleaved in one
process: first with torch's defaults, then with ``pyfused.memory.keep()``. Peak memory is without
`keep`, and excludes arguments and results.
"""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import report
import torch
from cases import (
    DTYPES,
    HeadCase,
    Step,
    Times,
    interleaved,
    ratios,
    settle_allocator,
    timers_of,
)
from report import spread, tabulated
from rich.progress import track

import pyfused.functional
import pyfused.memory

# (tokens, features, classes), and the dtype
CASES = (
    ((1024, 512, 32_000), "float32"),
    ((256, 768, 50_257), "float32"),
    ((256, 768, 8_000), "bfloat16"),
    ((2048, 256, 128_256), "float32"),
)
ROUNDS = 5


def peak_growth(call: Callable[[Any], object], argument: Callable[[], Any] = lambda: None) -> int:
    """Returns by how many bytes the second of two calls raises the peak memory of this process."""
    call(argument())
    gc.collect()
    pyfused.memory.release()  # reused memory would not be counted
    prepared = argument()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    call(prepared)
    return status("VmHWM") - before


def status(key: str) -> int:
    match = re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert match
    return int(match[1]) << 10


def implementations(case: HeadCase) -> dict[str, dict[str, Step]]:
    """Returns the implementations of each loss, and for cross-entropy also compiled torch.

    In half precision, only those of cross-entropy: torch's other losses are too inexact to compare.
    """
    found: dict[str, dict[str, Step]] = {**case.implementations()}
    found["cross-entropy"]["torch.compile"] = case.compiled()
    if case.input.dtype is not torch.float32:
        return {"cross-entropy": found["cross-entropy"]}
    return found


def check(loss: str, case: HeadCase, steps: dict[str, Step]) -> None:
    """Raises an error if gradients differ from torch's."""
    rtol, atol = (1e-3, 1e-5) if case.input.dtype is torch.float32 else (2.0**-6, 2.0**-7)
    if loss == "KL divergence":  # torch's gradient has errors of 1e-4 of its largest element
        atol = 2e-4
    _, reference, *others = (step for name, step in steps.items() if "ignored" not in name)
    for step in others:
        for pair in zip(step(), reference(), strict=True):
            largest = float(pair[1].abs().max())
            torch.testing.assert_close(*pair, rtol=rtol, atol=atol * largest)


def peak(loss: str, implementation: str, shape: tuple[int, ...], dtype: str) -> int:
    """Returns the peak memory without arguments and gradients, measured in a new process."""
    command = [sys.executable, __file__, loss, implementation, dtype, *map(str, shape)]
    # By default, glibc caches freed memory and reuses it, so the peak would not grow.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    return int(subprocess.check_output(command, env=environment))


def times_of(steps: dict[str, Step]) -> Times:
    timers = timers_of([*steps.values()])
    interleaved(timers, 1, 1)
    return interleaved(timers, ROUNDS, 1)


def measure(shape: tuple[int, ...], dtype: str) -> list[list[str]]:
    torch.compiler.reset()  # else the next sizes would compile with dynamic shapes
    case = HeadCase(*shape, dtype=DTYPES[dtype])
    name_of_case, rows = f"({', '.join(map(str, shape))}), {dtype}", []
    for loss, steps in implementations(case).items():
        check(loss, case, steps)
        default = times_of(steps)
        with pyfused.memory.keep():
            kept = times_of(steps)
        for name, times, times_kept in zip(steps, default, kept, strict=True):
            memory = ""
            if "products" not in name:
                memory = f"{peak(loss, name, shape, dtype) / case.logits:.2f}"
            rows.append(
                [
                    name_of_case,
                    loss,
                    name,
                    f"{median(times):.0f} ms",
                    spread(ratios(times, default[0])),
                    spread(ratios(default[1], times)),
                    f"{median(times_kept):.0f} ms",
                    spread(ratios(kept[1], times_kept)),
                    memory,
                ]
            )
    return rows


COLUMNS = (
    *("tokens, features, classes, dtype", "loss", "", "time", "time / products"),
    *("times as fast as torch", "time with `keep`", "times as fast as torch, both with `keep`"),
    "peak / logits",
)


def head(options: Namespace) -> None:
    settle_allocator()
    cases = CASES[:1] if options.quick else CASES
    rows = [row for case in track(cases, "Measuring", transient=True) for row in measure(*case)]
    table = tabulated(COLUMNS, rows, names=3)
    print(table)
    if not options.quick:
        results = report.measured(report.machine_info())
        caption = f"{report.machine(results)}. Medians, and in brackets quartiles."
        report.write_table(report.RESULTS / report.slug(results) / "heads.md", caption, table)


if __name__ == "__main__":
    loss, implementation, dtype, *sizes = sys.argv[1:]
    case, kept = HeadCase(*map(int, sizes), dtype=DTYPES[dtype]), []
    call = implementations(case)[loss][implementation]
    growth = peak_growth(lambda _: kept.append(call()) or kept.clear())
    print(growth - case.input.nbytes - case.head.nbytes)
