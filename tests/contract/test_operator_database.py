"""Calls from PyTorch's operator database, compared with torch.

`torch.testing._internal` lists valid and invalid calls. Values, gradients, warnings and errors must
be torch's. `--full` runs all of them; otherwise, each operator runs some.
"""

from __future__ import annotations

import inspect
import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from typing import Any

import grid
import hypothesis
import pytest
from catalogue import Call, ours
from check_calls import check_call, run
from compare import FLOATS, outcome
from torch import Tensor
from torch.nn import functional as F

from pyfused import functional as fused
from pyfused.dispatch.operator import Operator
from pyfused.ops.elementwise import POISSON_NLL_LOSS
from pyfused.ops.operators import OPERATORS

pytestmark = pytest.mark.cpu
IN_TORCH = {name: op for name, op in OPERATORS.items() if hasattr(F, name)}
every_operator = pytest.mark.parametrize("op", IN_TORCH.values(), ids=IN_TORCH)
# torch warns if it cannot compute in chunks; the kernels have no chunks.
CHUNKED = "linear_cross_entropy: ``options`` ignored"


@every_operator
def test_eager(op: Operator) -> None:
    found = samples(op)
    assert found
    for call in found if grid.FULL else found[:: len(found) // 8 + 1]:
        compare_with_torch(call)


@every_operator
def test_errors(op: Operator) -> None:
    for entry in database()[op.name]:
        for found in entry.error_inputs("cpu") if entry.error_inputs_func else ():
            compare_with_torch(call_of(op, found.sample_input))


# ---- the database --------------------------------------------------------------------------------


@cache
def database() -> dict[str, list[Any]]:
    """Returns torch's entries for each operator, by name.

    They are imported by tests only, because importing takes seconds and loads a hypothesis profile.
    """
    profile = hypothesis.settings.get_current_profile_name()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    hypothesis.settings.load_profile(profile)
    found = defaultdict(list)
    for entry in op_db:
        found[entry.name.removeprefix("nn.functional.")].append(entry)
    return found


@cache
def samples(op: Operator) -> list[Call]:
    """Returns samples in all dtypes alternately, or in one dtype."""
    turn, found = [*IN_TORCH].index(op.name), []
    for entry in database()[op.name]:
        dtypes = [dtype for dtype in FLOATS if dtype in entry.dtypes]
        for dtype in dtypes if grid.FULL or not dtypes else [dtypes[turn % len(dtypes)]]:
            given = entry.sample_inputs("cpu", dtype, requires_grad=True)
            found += [call_of(op, sample) for sample in given]
    return found


def call_of(op: Operator, sample: Any) -> Call:
    names = inspect.signature(getattr(fused, op.name)).parameters
    given = dict(zip(names, (sample.input, *sample.args), strict=False)) | sample.kwargs
    if op is POISSON_NLL_LOSS and given.get("full"):  # torch's gradient at 0 is 0 * inf
        given["target"] = given["target"].detach().clamp(min=0.1).requires_grad_()
    return Call(op, given)


# ---- checks --------------------------------------------------------------------------------------


def compare_with_torch(call: Call) -> None:
    """Compares results, warnings and the type of an error."""
    expected, expected_warnings = attempt(call, of_torch)
    got, warned = attempt(call, ours)
    if isinstance(expected, Exception):
        assert isinstance(got, type(expected)), f"{call}: {got!r}, expected {expected!r}"
        return
    assert isinstance(got, list), f"{call}: {got!r}"
    assert warned == expected_warnings, str(call)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            check_call(call)
        except Exception as error:
            raise AssertionError(f"{call}: {error}") from error


def attempt(call: Call, function: Callable[..., Any]) -> tuple[list[Tensor] | Exception, list[str]]:
    """Returns the results or the error, and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", CHUNKED)
        found = outcome(lambda: run(call, function))
    return found, [f"{each.category.__name__}: {each.message}" for each in caught]


def of_torch(call: Call, **given: Any) -> Any:
    return getattr(F, call.op.name)(**given)
