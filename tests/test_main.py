"""`python -m pyfused`: what a bug report needs; and a script run under patch()."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyfused
from pyfused import __main__ as main
from pyfused.backends import cpu
from pyfused.ops.operators import OPERATORS


def run(**environment: str) -> dict[str, str]:
    output = subprocess.run(
        [sys.executable, "-m", "pyfused"],
        env=environment,
        check=True,
        text=True,
        capture_output=True,
    ).stdout
    return {line[:24].strip(): line[24:] for line in output.splitlines()}


def test_the_report_names_what_a_bug_report_needs() -> None:
    report = run()
    assert report["pyfused"] == pyfused.__version__
    assert report["python"] == platform.python_version()
    assert report["torch"].startswith(f"{torch.__version__}, ")
    assert re.fullmatch(r"(GCC|.*(Clang|LLVM)) \d+\.\d+.*|MSVC", report["compiler"])
    assert report["ISAs built"] == ", ".join(cpu.ISAS)
    assert report["ISAs supported"] == ", ".join(cpu.supported)
    assert report["ISA chosen"] == cpu.supported[-1]
    assert report["operators"] == ", ".join(OPERATORS)
    assert report["kernels"].startswith("cpu: C++ kernels")


@pytest.mark.parametrize("isa", cpu.supported)
def test_the_report_names_the_isa_that_was_asked_for(isa: str) -> None:
    report = run(PYFUSED_CPU_CAPABILITY=isa)
    assert report["PYFUSED_CPU_CAPABILITY"] == report["ISA chosen"] == isa


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists what a process has mapped")
def test_the_kernels_run_in_the_pool_of_torch() -> None:
    assert run()["OpenMP"].startswith("yes, torch's own pool (libgomp")


def test_a_package_that_is_absent_is_said_to_be() -> None:
    assert main.installed("no-such-package") == "not installed"


# ---- python -m pyfused run script.py -------------------------------------------------------------

SCRIPT = """
import pickle, sys, torch, torch.nn.functional as F, helper, warnings
from helper import gated
warnings.simplefilter("ignore")
assert __name__ == "__main__" and helper
x, target = torch.randn(4, 8), torch.zeros(4).long()
for _ in range(3):
    torch.nn.CrossEntropyLoss()(x, target)
F.relu(torch.zeros(1 << 23))
torch.relu_(torch.zeros(2))
for _ in range(12):
    F.cosine_embedding_loss(x, x, torch.ones(4))
torch.nn.Tanh()(x), torch.nn.TransformerEncoderLayer(8, 2, 8, activation=F.gelu).train()(x)
x.softmax(1), F.softmax(x, dim=1), torch.softmax(x, 1), F.leaky_relu(x, inplace=True)
assert "pyfused" not in str(pickle.dumps([F.gelu, F.mse_loss, torch.tanh, torch.Tensor.tanh]))
assert torch.jit.script(gated)(x).shape == x.shape
assert torch.compile(gated, fullgraph=True, backend="eager")(x).shape == x.shape
assert [n.name for n in torch.fx.symbolic_trace(gated).graph.nodes][1] == "gelu"
try:
    F.mse_loss(x)
except TypeError:
    pass
print(*sys.argv[1:])
"""

HELPER = """
import torch, torch.nn.functional as F
def gated(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x) * torch.tanh(x) + F.softplus(x) + F.silu(x)
"""


def plain_and_counted(
    script: str, folder: Path
) -> tuple[subprocess.CompletedProcess[str], subprocess.CompletedProcess[str]]:
    """A script run by itself, and by `python -m pyfused run`."""
    (folder / "helper.py").write_text(HELPER)
    (folder / "train.py").write_text(script)
    plain, counted = (
        subprocess.run(
            [sys.executable, *how, str(folder / "train.py"), "--steps", "5"],
            text=True,
            capture_output=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for how in ((), ("-m", "pyfused", "run"))
    )
    assert counted.returncode == plain.returncode
    assert counted.stdout == plain.stdout == "--steps 5\n"
    return plain, counted


@pytest.mark.parametrize("code", ["'a message'", "1 // 0"])
def test_a_script_ends_as_it_does_by_itself(code: str, tmp_path: Path) -> None:
    script = f"import sys, torch; torch.ones(2).relu(); print(*sys.argv[1:]); sys.exit({code})"
    plain, counted = plain_and_counted(script, tmp_path)
    assert plain.returncode == 1
    assert plain.stderr.splitlines()[-1] in counted.stderr
    assert "1  relu: torch: ATen is faster at this size" in counted.stderr


def test_a_script_runs_patched_and_its_calls_are_counted(tmp_path: Path) -> None:
    _, counted = plain_and_counted(SCRIPT, tmp_path)
    summary = [
        "pyfused: calls and the paths they took",
        "        3  cross_entropy: torch: ATen is faster at this size",
        "        3  softmax: torch: ATen is faster at this size",
        "        2  tanh: torch: ATen is faster at this size",
        f"        1  relu: cpu {cpu.supported[-1]}, element by element, 1 thread",
        "        1  relu: torch: ATen is faster at this size",
        "        1  gelu: torch: ATen is faster at this size",
        "        1  leaky_relu: torch: ATen is faster at this size",
        "        1  silu: torch: ATen is faster at this size",
        "losses and activations that pyfused does not have",
        "       12  torch.nn.functional.cosine_embedding_loss",
    ]
    assert "\n".join(summary) in counted.stderr
