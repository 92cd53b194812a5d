"""Users' programs pass mypy --strict."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).with_name("typed_program.py")


def test_programs_have_types(tmp_path: Path) -> None:
    """mypy --strict rejects subclasses of untyped classes, and finds the wrong calls of a user."""
    pytest.importorskip("mypy")
    names = [name for name, value in vars(torch.nn).items() if inspect.isclass(value)]
    others = {"DataParallel", "LinearCrossEntropyOptions"}  # generic, or in newer versions only
    classes = [f"class Of{name}(nn.{name}): ...\n" for name in names if name not in others]
    wrong = 'F.mse_loss(x, "target")\nF.pad(x, 1.5)\nnn.CrossEntropyLoss(gama=1)\n'
    programs = {
        "user.py": PROGRAM.read_text("utf-8"),
        "wrong.py": PROGRAM.read_text("utf-8") + wrong,
        "modules.py": "".join(["from pyfused import nn\n", *classes]),
        "stars.py": "from torch import tensor\nfrom pyfused.functional import *\n"
        "from pyfused.nn import *\nreveal_type(relu(tensor(1.0)))\nreveal_type(ReLU())\n",
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
    root = PROGRAM.parents[2]
    command = ["-m", "mypy", "--strict", "--config-file=", "--follow-imports=silent"]
    done = subprocess.run(
        [sys.executable, *command, f"--cache-dir={root / '.mypy_cache'}", *programs],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(root)},
        text=True,
        capture_output=True,
        check=False,
    )
    found = [line.partition(":")[0] for line in done.stdout.splitlines() if ": error: " in line]
    assert found == ["wrong.py"] * 3, done.stdout
    assert 'type is "torch._tensor.Tensor"' in done.stdout, done.stdout
    assert 'type is "pyfused.nn.ReLU"' in done.stdout, done.stdout
