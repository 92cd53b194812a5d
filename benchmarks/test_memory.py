"""Measures the peak memory of torch and pyfused, each in its own process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BF16, TORCH, Case, Compiled, M, draw
from conftest import MEMORY
from timing import peak_growth
from torch import Tensor

import pyfused.functional

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
    "pyfused": pyfused.functional,
}


@pytest.mark.skipif("THP_MEM_ALLOC_ENABLE" in os.environ, reason="measured without huge pages")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_memory(pytestconfig: pytest.Config, case: Case, implementation: str) -> None:
    command = [sys.executable, __file__, implementation, str(CASES.index(case))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = {
        "case": case.name,
        "implementation": implementation,
        "bytes": int(done.stdout),
        "input_bytes": case.bytes,
    }
    pytestconfig.stash.setdefault(MEMORY, []).append(found)


def peak(case: Case, implementation: str) -> int:
    """Returns the peak memory of forward and backward in this process, in bytes."""
    function, arguments = getattr(IMPLEMENTATIONS[implementation], case.op), draw(case)

    def call(input: Tensor) -> tuple[Tensor, ...]:
        value = function(input, *arguments.others, **arguments.options)
        return torch.autograd.grad(value, input, arguments.grad_output)

    return peak_growth(call, lambda: arguments.input * 1)


if __name__ == "__main__":
    print(peak(CASES[int(sys.argv[2])], sys.argv[1]))
