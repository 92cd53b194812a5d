"""How much memory a call takes beyond its arguments and results, at its peak."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from processes import python

from pyfused import memory

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


# ---- keep_pages ----------------------------------------------------------------------------------

FAULTS = """
import resource
import pyfused.memory
{keep}
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
x = torch.randn(16 << 20)
def calls():
    for _ in range(6):
        torch.add(x, 1)
calls()  # until freed blocks lie where the next ones fit
calls()
before = faults()
calls()
print(faults() - before)
"""

glibc_only = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not shutil.which("ldd"), reason="for glibc"
)


@glibc_only
def test_kept_pages_are_not_faulted_in_again() -> None:
    kept = int(run(FAULTS.format(keep="pyfused.memory.keep_pages()")))
    given_back = int(run(FAULTS.format(keep="")))
    assert kept < given_back / 2


@glibc_only
def test_another_malloc_is_said_to_be_one(tmp_path: Path) -> None:
    source, library = tmp_path / "other.c", tmp_path / "other.so"
    source.write_text(
        "#include <stddef.h>\n"
        "extern void* __libc_malloc(size_t);\n"
        "void* malloc(size_t size) { return __libc_malloc(size); }\n"
    )
    compiler = shutil.which("cc") or pytest.skip("no C compiler")
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    code = """
    import pyfused.memory
    try:
        pyfused.memory.keep_pages()
    except RuntimeError as error:
        print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "expected glibc's malloc, got another" in said.stdout


def test_no_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ctypes.CDLL

    def without_glibc(name: str | None) -> ctypes.CDLL:
        if name is None:
            return real(None)
        raise OSError(name)

    monkeypatch.setattr(memory.ctypes, "CDLL", without_glibc)
    with pytest.raises(RuntimeError, match="expected glibc, which this system does not have"):
        memory.keep_pages()
