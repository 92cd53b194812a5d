"""Every target of `make help` is run by CI or tried here."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [
    *(pytest.mark.cpu, pytest.mark.slow),
    pytest.mark.skipif(not [*ROOT.glob(".venv/.build*")], reason="make would build pyfused"),
]
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
CI = [ROOT / ".ci/run", *(ROOT / ".github/workflows").glob("*.yml")]
BY_CI = {
    *re.findall(r"\bmake ([a-z0-9-]+)", "\n".join(file.read_text("utf-8") for file in CI)),
    *("setup", "build"),  # which others need
}
# Each takes seconds, and writes to ignored folders only.
TRIALS = {
    "help": (),
    "test-torch": ("TORCH=trial", "PYTEST_ARGS=-n 0 tests/contract/test_calls.py -k few"),
    "bench-steps": ("BENCH_ARGS=--trial --rounds 2 --ways patch --only U-Net",),
    "bench-sweep": ("SWEEP_ARGS=--op relu --shapes 1 --seconds 0.001 --threads 1 --margin 0",),
}
# Other tests call what these run, or their part is in CI.
OTHERS = {
    "demo": ("demo-quick, and test_examples.py",),
    "formulas": ("test_contributing.py", "OP=mse_loss"),
    "test-interpreter": ("the second half of test",),
    "test-full": ("test, with all combinations of parameters",),
    "gpu-check": ("test_benchmarks.py, without a GPU", "OUT=folder"),
    "bench": ("bench-quick, with all cases",),
    "bench-quick": ("test_benchmarks.py, cases and reports",),
    "bench-threads": ("test_benchmarks.py",),
    "bench-busy": ("test_benchmarks.py; it needs minutes",),
    "bench-compare": ("test_benchmarks.py; it needs another build", "BASE=main"),
    "sizes": ("test_machine_code.py",),
    "wheels": ("the workflow of wheels, by tools/wheels.py and cibuildwheel",),
    "test-wheel": ("test_packaging.py; it downloads torch", "WHEEL=file"),
    "test-aarch64": ("nothing: it needs qemu and Debian's packages for ARM64",),
}


def make(*arguments: str, folder: Path = ROOT) -> str:
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "PYTEST"))}
    done = subprocess.run(
        ["make", *arguments], cwd=folder, env=variables, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_target_is_run_or_named() -> None:
    targets = re.findall(r"^([a-z0-9-]+):.*## ", MAKEFILE, re.MULTILINE)
    assert sorted([*BY_CI & {*targets}, *TRIALS, *OTHERS, "clean"]) == sorted(targets)


@pytest.mark.parametrize("target", TRIALS)
def test_trial(target: str, request: pytest.FixtureRequest) -> None:
    folder = ROOT / ".venv/torch-trial"  # an empty folder stands for another version of torch
    folder.mkdir(exist_ok=True)
    request.addfinalizer(folder.rmdir)
    make(target, *TRIALS[target])


@pytest.mark.parametrize("target", OTHERS)
def test_dry_run(target: str) -> None:
    """The target's prerequisites and variables exist."""
    assert ".venv/bin/" in make("--dry-run", target, *OTHERS[target][1:], "PYTHON=.venv/bin/python")


def test_clean_removes_what_was_built(tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_text(MAKEFILE, "utf-8")
    built = [tmp_path / name for name in ("build/a", "pyfused/_cpu.so", "tests/__pycache__/a")]
    kept = [
        tmp_path / name for name in ("pyfused/nn.py", "kernels/a", "examples/a", "benchmarks/a")
    ]
    for file in (*built, *kept):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    make("clean", folder=tmp_path)
    assert not any(file.exists() for file in built)
    assert all(file.exists() for file in kept)
