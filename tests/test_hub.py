"""Tests the output of `make hub`: it works under any name, next to pyfused, and as a kernel."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BACKENDS = {"torch": {}, "triton": {"TRITON_INTERPRET": "1", "PYFUSED_BACKEND": "triton"}}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kernel") / "hub"
    runpy.run_path(str(ROOT / "tools/hub.py"))["write"](folder)
    return folder


def run(*arguments: str, folder: Path, **environment: str) -> str:
    """Runs Python in a folder without kernels/, which would hide the package of that name."""
    given = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1", **environment}
    command = [sys.executable, "-W", "ignore", *arguments]
    result = subprocess.run(
        command, cwd=folder, env=given, text=True, capture_output=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


IMPORTED = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("another", "__init__.py")
sys.modules["another"] = another = importlib.util.module_from_spec(spec)
spec.loader.exec_module(another)
assert not any(name.partition(".")[0] == "pyfused" for name in sys.modules)
import pyfused  # both at once: each has custom operators of its own
hidden, weight = torch.randn(8, 4), torch.randn(50, 4, requires_grad=True)
for package in (pyfused, another):
    step = package.functional.linear_cross_entropy
    loss = torch.compile(step, fullgraph=True, backend="aot_eager")
    loss(hidden, weight, torch.arange(8)).backward()
print(pyfused.functional.relu is not another.functional.relu, another.functional.__name__)
print(another.explain("cross_entropy", torch.randn(8, 50), torch.arange(8)).backend)
"""


@pytest.mark.parametrize("backend", BACKENDS)
def test_import_under_another_name_next_to_pyfused(backend: str, hub: Path) -> None:
    pytest.importorskip("triton")
    out = run("-c", IMPORTED, folder=hub / "build/torch-cpu", **BACKENDS[backend])
    assert out == f"True another.functional\n{backend}\n"


KERNELIZED = """
import sys, torch
from pathlib import Path
from kernels import LocalLayerRepository, Mode, kernelize, register_kernel_mapping
from kernels import use_kernel_forward_from_hub
from transformers import LlamaConfig
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP

use_kernel_forward_from_hub("SwiGLUMLP")(LlamaMLP)
use_kernel_forward_from_hub("SiLU")(SiLUActivation)  # transformers does the same for its kernels
layers = {"SwiGLUMLP": "SwiGLUMLP", "SiLU": "SiLU"}
register_kernel_mapping({
    name: {"cpu": LocalLayerRepository(repo_path=Path.cwd(), layer_name=layer)}
    for name, layer in layers.items()
})
mlp = LlamaMLP(LlamaConfig(hidden_size=8, intermediate_size=16, num_attention_heads=2))
x = torch.randn(4, 8)
expected = mlp(x)
kernelize(mlp, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cpu")
torch.testing.assert_close(mlp(x), expected)
print(mlp.forward.__func__.__module__.partition(".")[2], mlp.act_fn.forward.__func__.__qualname__)
"""


@pytest.mark.integrations
def test_its_layers_replace_those_of_transformers(hub: Path) -> None:
    assert run("-c", KERNELIZED, folder=hub) == "layers SiLU.forward\n"
