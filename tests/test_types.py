"""Type checking: a user's program passes mypy --strict."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).with_name("typed_program.py")


def mypy(program: Path) -> str:
    command = ["-m", "mypy", "--strict", "--config-file=", "--follow-imports=silent"]
    done = subprocess.run(
        [sys.executable, *command, str(program)],
        env={**os.environ, "MYPYPATH": str(PROGRAM.parents[1])},
        text=True,
        capture_output=True,
        check=False,
    )
    return done.stdout


def test_a_users_program_has_types(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    assert mypy(PROGRAM).startswith("Success")
    wrong = tmp_path / "program.py"
    text = PROGRAM.read_text("utf-8")
    wrong.write_text(text + 'F.mse_loss(x, "target")\nF.pad(x, 1.5)\nnn.CrossEntropyLoss(gama=1)\n')
    assert mypy(wrong).count(": error: ") == 3


def test_star_imports_have_types(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    program = tmp_path / "program.py"
    program.write_text(
        "from torch import tensor\nfrom pyfused.functional import *\nfrom pyfused.nn import *\n"
        "reveal_type(relu(tensor(1.0)))\nreveal_type(ReLU())\n"
    )
    found = mypy(program)
    assert 'type is "torch._tensor.Tensor"' in found, found
    assert 'type is "pyfused.nn.ReLU"' in found, found


def test_modules_have_types(tmp_path: Path) -> None:
    """mypy --strict rejects subclasses of untyped classes."""
    pytest.importorskip("mypy")
    names = [name for name, value in vars(torch.nn).items() if inspect.isclass(value)]
    others = {
        "DataParallel",
        "LinearCrossEntropyOptions",
    }  # generic, or in newer versions only
    classes = [f"class Of{name}(nn.{name}): ...\n" for name in names if name not in others]
    program = tmp_path / "program.py"
    program.write_text("".join(["from pyfused import nn\n", *classes]))
    found = mypy(program)
    assert found.startswith("Success"), found
