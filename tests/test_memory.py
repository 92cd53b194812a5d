"""How much memory a call takes beyond its arguments and results, at its peak."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from processes import python

linux_only = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc"
)

MIB = 1 << 20
SIZE = 64 * MIB  # of the logits: large beside what a process allocates by the way
SLACK = 8 * MIB

# `measured()` runs the call twice, so that what is set up once is there, and prints the growth of
# the peak over what was resident before the second call.
PREAMBLE = """
import gc, re
from pathlib import Path
import torch
import pyfused
from pyfused import functional as F

torch.set_num_threads(1)

def resident(key):
    return int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10

def measured(call):
    call()
    gc.collect()
    pyfused.memory.release()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    call()
    print(resident("VmHWM") - before)

rows, classes = 64, (64 << 20) // 64 // 4
leaf = torch.randn(rows, classes, requires_grad=True)
target = torch.randint(classes, (rows,))
"""


def run(code: str, **environment: str) -> str:
    done = python(PREAMBLE + textwrap.dedent(code), **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def growth(code: str) -> int:
    return int(run(code))


@linux_only
@pytest.mark.parametrize("options", ["", ", label_smoothing=0.1", ", reduction='sum'"])
def test_cross_entropy_takes_one_gradient(options: str) -> None:
    code = f"""
    def call():
        leaf.grad = None
        F.cross_entropy(leaf, target{options}).backward()
        leaf.grad = None
    measured(call)
    """
    taken = growth(code)
    assert SIZE - SLACK < taken < SIZE + SLACK


@linux_only
def test_without_a_gradient_nothing() -> None:
    code = """
    measured(lambda: F.cross_entropy(leaf.detach(), target))
    """
    assert growth(code) < SLACK


@linux_only
def test_in_place_nothing() -> None:
    """The logits are made within the call: they are all that it takes."""
    code = """
    bias = torch.zeros(classes, requires_grad=True)
    def call():
        F.cross_entropy(leaf.detach() + bias, target, inplace=True).backward()
    measured(call)
    """
    assert SIZE - SLACK < growth(code) < SIZE + SLACK


@linux_only
@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_mse_loss_takes_the_gradients_that_are_wanted(wanted: int) -> None:
    code = f"""
    input, target = (torch.randn(rows, classes).requires_grad_(i < {wanted}) for i in range(2))
    def call():
        input.grad = target.grad = None
        loss = F.mse_loss(input, target)
        if {wanted}:
            loss.backward()
        input.grad = target.grad = None
    measured(call)
    """
    taken = growth(code)
    assert wanted * SIZE - SLACK < taken < wanted * SIZE + SLACK


@linux_only
def test_relu_takes_output_and_gradient() -> None:
    code = """
    grad_output = torch.randn(rows, classes)
    def call():
        leaf.grad = None
        F.relu(leaf).backward(grad_output)
        leaf.grad = None
    measured(call)
    """
    assert 2 * SIZE - SLACK < growth(code) < 2 * SIZE + SLACK
