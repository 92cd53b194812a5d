"""Checks that a new operator is complete; `pytest -k name_of_it` names missing parts."""

from __future__ import annotations

import inspect
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from catalogue import LEFT_OUT, values_of
from samples import SAMPLES

import pyfused
from pyfused import functional, nn
from pyfused.dispatch.operator import TOKEN_WEIGHT, Operator, parameters_of
from pyfused.ops.activation import Activation
from pyfused.ops.composed import Composed
from pyfused.ops.operators import OPERATORS
from pyfused.ops.pointwise_loss import PointwiseLoss

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs"))
import gallery  # noqa: E402
from entries import ENTRIES, GALLERY  # noqa: E402

pytestmark = pytest.mark.cpu
every_operator = pytest.mark.parametrize("op", OPERATORS.values(), ids=OPERATORS)
README = (ROOT / "README.md").read_text("utf-8")


@every_operator
def test_public_function_and_module(op: Operator) -> None:
    assert op.name in functional.__all__
    assert op.name in vars(functional)
    assert op.module in vars(nn), f"pyfused/nn.py: expected a class {op.module}"
    assert issubclass(getattr(nn, op.module), getattr(torch.nn, op.module, torch.nn.Module))


@every_operator
def test_entry_in_the_changelog(op: Operator) -> None:
    assert f"`{op.name}`" in (ROOT / "CHANGELOG.md").read_text("utf-8")


@every_operator
def test_entry_in_the_documentation(op: Operator) -> None:
    assert op.name in ENTRIES
    assert op.name in [name for names in gallery.shown().values() for name in names]


@every_operator
def test_samples_for_tests(op: Operator) -> None:
    """A family's tests need a definition, and test_fuzz.py needs values of each argument."""
    assert op.name in SAMPLES or not isinstance(op, (Activation, PointwiseLoss))
    operands = [operand.name for operand in (*op.operands, TOKEN_WEIGHT)]
    arguments = inspect.signature(getattr(functional, op.name)).parameters
    for name in arguments.keys() - {*operands, *LEFT_OUT}:
        assert values_of(op, name)


def test_only_operators_are_listed() -> None:
    assert pyfused.functional is functional
    assert pyfused.nn is nn
    with_metrics = ["cross_entropy_with_metrics", "linear_cross_entropy_with_metrics"]
    assert sorted(functional.__all__) == sorted([*OPERATORS, "additive_margin", *with_metrics])
    classes = [value for value in vars(nn).values() if inspect.isclass(value)]
    defined = {cls.__name__ for cls in classes if cls.__module__ == nn.__name__}
    assert defined == {*nn.__all__} == {*(op.module for op in OPERATORS.values()), "AdditiveMargin"}
    names = README[README.index("## Operators") : README.index("`make docs` writes a page")]
    assert sorted(re.findall(r"`(\w+)`", names)) == sorted(OPERATORS)
    assert len(ENTRIES) == sum(map(len, GALLERY.values()))


# ---- files generated from declarations -----------------------------------------------------------


@pytest.mark.skipif(
    f"torch=={torch.__version__.partition('+')[0]}\n" not in (ROOT / "constraints.txt").read_text(),
    reason="another torch may decompose its operators otherwise",
)
def test_generated_files_are_current() -> None:
    printed = runpy.run_path(str(ROOT / "tools" / "formulas.py"))["printed"]()
    for path, text in printed.items():
        assert path.read_text("utf-8") == text, f"{path.name}: run make formulas"


@every_operator
def test_generated_files_contain_the_operator(op: Operator) -> None:
    """Names the operator that is missing in a generated file."""
    kernels = op.kernels if isinstance(op, (Activation, PointwiseLoss)) else {}
    words = {
        "csrc/formulas.inc": [f'X("{name}", ' for name in kernels],
        "README.md": [f"`{op.name}`"],
        "docs/torch-objects.inv": [f".{op.name} "] * hasattr(torch.nn.functional, op.name),
    }
    for file, needed in words.items():
        text = (ROOT / file).read_text("utf-8")
        assert all(word in text for word in needed), f"{file}: run make formulas"


@every_operator
def test_function_has_the_arguments_of_its_declaration(op: Operator) -> None:
    """Arguments have the order and the defaults of torch's function, or of the declaration."""
    accepted = parameters_of(getattr(functional, op.name))
    accepted.pop("inplace", None)
    if isinstance(op, (Activation, PointwiseLoss, Composed)):
        assert tuple(accepted) == op.arguments
        assert tuple(accepted.values())[1:] == op.defaults
