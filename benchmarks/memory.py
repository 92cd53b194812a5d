"""How much memory a call takes at its peak, beyond its arguments: in a process of its own.

    python benchmarks/memory.py "torch" 0

prints the bytes that an implementation takes for the forward and backward pass of a case.
"""

from __future__ import annotations

import gc
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import BF16, Case, Compiled, M, draw
from torch import Tensor
from torch.nn import functional as F

import pyfused.functional
import pyfused.memory

CASES = (
    Case("cross_entropy", (1024, 32000)),
    Case("cross_entropy", (1024, 32000), BF16),
    Case("cross_entropy", (8, 21, 256, 256)),
    Case("mse_loss", (32 * M,)),
    Case("relu", (32 * M,)),
)
IMPLEMENTATIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "torch": (F, {}),
    "torch.compile": (Compiled(), {}),
    "pyfused": (pyfused.functional, {}),
    "pyfused, inplace=True": (pyfused.functional, {"inplace": True}),
}


def growth(call: Callable[[Any], object], argument: Callable[[], Any] = lambda: None) -> int:
    """The growth of this process's peak by a call, in bytes; its second, as the first sets up."""
    call(argument())
    gc.collect()
    pyfused.memory.release()  # what it left would not be counted when it is used again
    given = argument()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    call(given)
    return _status("VmHWM") - before


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found
    return int(found[1]) << 10


def taken(case: Case, implementation: str) -> int:
    operators, options = IMPLEMENTATIONS[implementation]
    arguments = draw(case)

    def call(input: Tensor) -> tuple[Tensor, ...]:
        value = getattr(operators, case.op)(
            input, *arguments.others, **arguments.options, **options
        )
        return torch.autograd.grad(value, input, arguments.grad_output)

    return growth(call, lambda: arguments.input * 1)


def measure(case: Case, implementation: str) -> int:
    """`taken`, by a new process."""
    command = [sys.executable, __file__, implementation, str(CASES.index(case))]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    print(taken(CASES[int(sys.argv[2])], sys.argv[1]))
