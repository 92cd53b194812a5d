"""pyfused.functional and pyfused.nn have all public names of torch's modules, with types."""

from __future__ import annotations

import inspect
import sys
import typing
from pathlib import Path
from types import ModuleType

import pytest
import torch
from processes import process, python

import pyfused

pytestmark = pytest.mark.cpu
BOTH = [
    pytest.param(pyfused.functional, torch.nn.functional, id="functional"),
    pytest.param(pyfused.nn, torch.nn, id="nn"),
]
both = pytest.mark.parametrize(("ours", "theirs"), BOTH)


@both
def test_other_names_come_from_torch(ours: ModuleType, theirs: ModuleType) -> None:
    names = {name for name in dir(theirs) if not name.startswith("_")}
    for name in names - {*ours.__all__, "functional"}:
        assert getattr(ours, name) is getattr(theirs, name), name
    for name in ours.__all__:
        assert getattr(ours, name).__module__ == ours.__name__
    assert dir(ours) == sorted(names | {*ours.__all__})


def test_type_hints_can_be_evaluated() -> None:
    functions = [getattr(pyfused.functional, name) for name in pyfused.functional.__all__]
    modules = [getattr(pyfused.nn, name) for name in pyfused.nn.__all__]
    others = [getattr(pyfused, name) for name in ("convert", "explain", "patch", "report")]
    for function in (*functions, *others, *(f for m in modules for f in (m.__init__, m.forward))):
        typing.get_type_hints(function)  # raises for a name that exists for type checkers only


@both
@pytest.mark.parametrize("name", ["conv5d", "_NormBase"])
def test_an_unknown_name(ours: ModuleType, theirs: ModuleType, name: str) -> None:
    assert not hasattr(theirs, name)
    with pytest.raises(AttributeError, match=f"module '{ours.__name__}' has no attribute '{name}'"):
        getattr(ours, name)


def test_names_of_the_package() -> None:
    assert all(hasattr(pyfused, name) for name in pyfused.__all__)
    code = "import pyfused; print(pyfused.functional.cross_entropy.__name__)"
    assert python(code).stdout == "cross_entropy\n"
    assert sys.modules["pyfused.functional"] is pyfused.functional


# ---- types ---------------------------------------------------------------------------------------

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
    cache = f"--cache-dir={root / '.mypy_cache'}"
    done = process(*command, cache, *programs, cwd=tmp_path, MYPYPATH=str(root))
    found = [line.partition(":")[0] for line in done.stdout.splitlines() if ": error: " in line]
    assert found == ["wrong.py"] * 3, done.stdout
    assert 'type is "torch._tensor.Tensor"' in done.stdout, done.stdout
    assert 'type is "pyfused.nn.ReLU"' in done.stdout, done.stdout
