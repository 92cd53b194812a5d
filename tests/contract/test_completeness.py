"""Checks that each operator is complete, and names the missing steps; `make test` runs it first."""

from __future__ import annotations

import inspect
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from samples import LEFT_OUT, SAMPLES, values_of

import pyfused
from pyfused import functional, nn
from pyfused.dispatch.operator import TOKEN_WEIGHT, Operator
from pyfused.ops.activation import Activation
from pyfused.ops.operators import OPERATORS
from pyfused.ops.pointwise_loss import PointwiseLoss

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "docs"))
from entries import ENTRIES, GALLERY  # noqa: E402

pytestmark = pytest.mark.cpu
every_operator = pytest.mark.parametrize("op", OPERATORS.values(), ids=OPERATORS)
LOSSES = (ROOT / "docs/losses.md").read_text("utf-8")


def missing_steps(op: Operator) -> Iterator[str]:
    """Yields the missing steps of "Adding a loss or an activation" in CONTRIBUTING.md, in order."""
    if op.name not in vars(functional):
        yield f"2. pyfused/functional.py: add a function {op.name}"
    if op.module not in vars(nn):
        yield f"3. pyfused/nn.py: add a class {op.module}"
    is_printed = isinstance(op, (Activation, PointwiseLoss))
    if is_printed and op.name not in SAMPLES:
        yield f"4. tests/samples.py: add a row {op.name} to SAMPLES"
    elif is_printed and not SAMPLES[op.name].define:
        yield f"4. tests/samples.py: define the closed form of {op.name}, which torch does not have"
    kind = "activation" if isinstance(op, Activation) else "loss"
    words = {
        f"csrc/{kind}_formulas.inc": [f'X("{x}", ' for x in (op.kernels if is_printed else ())],
    }
    for file, needed in words.items():
        text = (ROOT / file).read_text("utf-8")
        if not all(word in text for word in needed):
            yield f"7. {file}: run make formulas"
    if f"`{op.name}`" not in LOSSES:
        yield f"8. docs/losses.md: run docs/pages.py, and add `{op.name}` to CHANGELOG.md"


@every_operator
def test_steps(op: Operator) -> None:
    if missing := list(missing_steps(op)):
        lines = "\n".join(missing)
        pytest.fail(f"{op.name}: missing steps of CONTRIBUTING.md:\n{lines}", pytrace=False)
    assert issubclass(getattr(nn, op.module), getattr(torch.nn, op.module, torch.nn.Module))


@every_operator
def test_entry_in_the_documentation(op: Operator) -> None:
    assert op.name in ENTRIES


@every_operator
def test_random_calls_have_values_of_each_argument(op: Operator) -> None:
    operands = [operand.name for operand in (*op.operands, TOKEN_WEIGHT)]
    arguments = inspect.signature(getattr(functional, op.name)).parameters
    for name in arguments.keys() - {*operands, *LEFT_OUT}:
        assert values_of(op, name)


def test_only_operators_are_listed() -> None:
    assert pyfused.functional is functional
    assert pyfused.nn is nn
    functions = filter(inspect.isfunction, vars(functional).values())
    written = [f.__name__ for f in functions if f.__module__ == functional.__name__]
    public = [name for name in written if not name.startswith("_")]
    assert sorted(functional.__all__) == sorted(public)
    classes = [value for value in vars(nn).values() if inspect.isclass(value)]
    defined = {cls.__name__ for cls in classes if cls.__module__ == nn.__name__}
    defined = {name for name in defined if not name.startswith("_")}
    assert defined == {*nn.__all__} == {*(op.module for op in OPERATORS.values()), *nn._OTHERS}
    assert len(ENTRIES) == sum(map(len, GALLERY.values()))


# ---- files generated from declarations -----------------------------------------------------------


@pytest.mark.skipif(
    f"torch=={torch.__version__.partition('+')[0]}\n" not in (ROOT / "constraints.txt").read_text(),
    reason="other versions of torch may decompose operators differently",
)
def test_generated_files_are_current() -> None:
    printed = runpy.run_path(str(ROOT / "tools" / "formulas.py"))["printed"]()
    for path, text in printed.items():
        assert path.read_text("utf-8") == text, f"{path.name}: run make formulas"


@every_operator
def test_function_has_the_parameters_of_the_declaration(op: Operator) -> None:
    accepted = inspect.signature(getattr(functional, op.name)).parameters.keys()
    (kind,) = op.options.args
    assert {*op.names} - kind._field_defaults.keys() - {"stacklevel"} <= accepted
