"""Measures the peak memory of torch and pyfused, each in its own process, on Linux."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from cases import BF16, TORCH, Case, Compiled, M, draw
from report import machine, machine_info, measured, write_csv
from timing import status
from torch import Tensor

from pyfused import functional, memory

CASES = (
    Case("cross_entropy", (1024, 32000)),
    Case("cross_entropy", (1024, 32000), BF16),
    Case("cross_entropy", (8, 21, 256, 256)),
    Case("mse_loss", (32 * M,)),
    Case("relu", (32 * M,)),
)
IMPLEMENTATIONS: dict[str, Any] = {
    "torch": TORCH,
    "torch.compile": Compiled(),
    "pyfused": functional,
}


def write(folder: Path) -> None:
    """Writes the peaks of forward and backward into memory.csv of a folder, and prints them."""
    rows, where = [], {"machine": machine(measured(machine_info()))}
    for index, case in enumerate(CASES):
        for name in IMPLEMENTATIONS:
            command = [sys.executable, __file__, name, str(index)]
            found = int(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            print(f"{case.name}, {name}: {found / 2**20:,.0f} MiB at the peak", flush=True)
            row = {"case": case.name, "implementation": name, "bytes": found}
            rows.append(row | {"input_bytes": case.bytes} | where)
    write_csv(folder / "memory.csv", rows)


def peak(case: Case, implementation: str) -> int:
    """Returns by how many bytes the second of two calls raises the peak of this process."""
    function, arguments = getattr(IMPLEMENTATIONS[implementation], case.op), draw(case)

    def call(input: Tensor) -> None:
        value = function(input, *arguments.others, **arguments.options)
        torch.autograd.grad(value, input, arguments.grad_output)

    call(arguments.input * 1)
    gc.collect()
    memory.release()  # reused memory would not be counted
    prepared = arguments.input * 1
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    call(prepared)
    return status("VmHWM") - before


if __name__ == "__main__":
    print(peak(CASES[int(sys.argv[2])], sys.argv[1]))
