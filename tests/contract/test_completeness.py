"""Checks that each operator is complete, and names the missing steps; `make test` runs it first."""

from __future__ import annotations

import inspect
import runpy
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from samples import SAMPLES

from pyfused import functional, nn
from pyfused.dispatch.operator import Operator
from pyfused.ops.activation import Activation
from pyfused.ops.operators import OPERATORS
from pyfused.ops.pointwise_loss import PointwiseLoss

ROOT = Path(__file__).parents[2]
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
    file = f"csrc/{kind}_formulas.inc"
    text = (ROOT / file).read_text("utf-8")
    if is_printed and not all(f'X("{x}", ' in text for x in op.kernels):
        yield f"7. {file}: run make formulas"
    if f"`{op.name}`" not in LOSSES:
        yield f"8. docs/losses.md: run docs/pages.py, and add `{op.name}` to CHANGELOG.md"


@every_operator
def test_steps(op: Operator) -> None:
    if missing := list(missing_steps(op)):
        lines = "\n".join(missing)
        pytest.fail(f"{op.name}: missing steps of CONTRIBUTING.md:\n{lines}", pytrace=False)
    assert issubclass(getattr(nn, op.module), getattr(torch.nn, op.module, torch.nn.Module))


@pytest.mark.parametrize(
    ("module", "kind"), [(functional, inspect.isfunction), (nn, inspect.isclass)]
)
def test_all_public_names_are_listed(module: ModuleType, kind: Any) -> None:
    written = [
        x.__name__ for x in vars(module).values() if kind(x) and x.__module__ == module.__name__
    ]
    assert {*module.__all__} == {name for name in written if not name.startswith("_")}


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
