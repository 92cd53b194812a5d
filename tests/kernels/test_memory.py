"""Measures the peak memory of calls, without arguments and results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from processes import python

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc"
)

MIB = 1 << 20
SIZE = 40 * MIB  # bytes of the logits; large compared to other allocations
SLACK = 5 * MIB

# `measured()` prints the growth of the peak over the resident memory before the call. It makes the
# call twice, because the first call also makes persistent allocations.
PREAMBLE = """
import ctypes, gc, re
from pathlib import Path
import torch
import pyfused
from pyfused import functional as F

torch.set_num_threads(1)
# Freed blocks of this size return to the system. glibc would raise the size after a large block.
M_MMAP_THRESHOLD = -3
ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)

def resident(key):
    return int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10

def measured(name, call, leaves=()):
    for before in (None, resident("VmRSS")):
        gc.collect()
        pyfused.memory.release()
        if before is not None:
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            before = resident("VmRSS")
        call()
        for x in leaves:
            x.grad = None
    print(name, resident("VmHWM") - before)

rows, classes = 64, (40 << 20) // 64 // 4
leaf = torch.randn(rows, classes, requires_grad=True)
target = torch.randint(classes, (rows,))
grad_output = torch.randn(rows, classes)
other = grad_output.clone().requires_grad_()
inputs = [(leaf.detach(), grad_output), (leaf, grad_output), (leaf, other)]
options = {"mean": {}, "smoothed": {"label_smoothing": 0.1}, "sum": {"reduction": "sum"}}
for name, options in options.items():
    measured(name, lambda: F.cross_entropy(leaf, target, **options).backward(), [leaf])
measured("no gradient", lambda: F.cross_entropy(leaf.detach(), target))
for wanted, (x, y) in enumerate(inputs):
    step = lambda: F.mse_loss(x, y).backward() if wanted else F.mse_loss(x, y)
    measured(f"mse_loss-{wanted}", step, [x, y])
measured("relu", lambda: F.relu(leaf).backward(grad_output), [leaf])
del leaf, grad_output, other, inputs, x, y

rows, classes = 1280, 16384  # 80 MiB of logits
x, w = torch.randn(rows, 8, requires_grad=True), torch.randn(classes, 8, requires_grad=True)
target, teacher = torch.randint(classes, (rows,)), (torch.randn(rows, 4), torch.randn(classes, 4))
heads = {
    "linear_cross_entropy": lambda: F.linear_cross_entropy(x, w, target),
    "linear_log_probs": lambda: F.linear_log_probs(x, w, target).log_probability.sum(),
    "linear_kl_div": lambda: F.linear_kl_div(x, w, *teacher),
}
for name, head in heads.items():
    measured(name, lambda: head().backward(), [x, w])
"""


@pytest.fixture(scope="module")
def growth() -> dict[str, int]:
    """Returns the bytes that each call needs, measured in one process."""
    done = python(PREAMBLE)
    assert done.returncode == 0, done.stderr
    return {name: int(size) for name, size in re.findall(r"(.+) (-?\d+)\n", done.stdout)}


# The number of tensors of the logits' size that a call allocates.
TENSORS = {
    "mean": 1,
    "smoothed": 1,
    "sum": 1,
    "no gradient": 0,
    "mse_loss-0": 0,
    "mse_loss-1": 1,
    "mse_loss-2": 2,
    "relu": 2,  # its output and the gradient
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_call_only_allocates_its_results(name: str, growth: dict[str, int]) -> None:
    assert abs(growth[name] - TENSORS[name] * SIZE) < SLACK


@pytest.mark.parametrize("op", ["linear_cross_entropy", "linear_log_probs", "linear_kl_div"])
def test_a_head_needs_a_quarter_of_the_logits(op: str, growth: dict[str, int]) -> None:
    """linear_kl_div also has the logits of the teacher."""
    logits = 2 * SIZE * (2 if op == "linear_kl_div" else 1)
    assert growth[op] < logits / 4 + SLACK
