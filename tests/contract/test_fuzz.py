"""Random calls of every operator, with any of its arguments, compared with torch in float64.

Hypothesis draws options, shapes, strides, dtypes and values together, which covers combinations
that other tests lack. `HYPOTHESIS_PROFILE=search` draws 5000 calls of each operator, and 250
sequences of 400 calls.
"""

from __future__ import annotations

import contextlib
import os
import random
import warnings
from typing import Any

import interpreter
import numpy as np
import pytest
import torch
from catalogue import (
    EXAMPLES,
    Call,
    Example,
    Shared,
    declared,
    ours,
    pairs_of,
    random_call,
    share_memory,
)
from check_calls import ERRORS, check_call, forward
from compare import DEVICE
from conftest import KernelCalls
from hypothesis import given, note, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import save_on_cpu

from pyfused.dispatch.operator import Operator
from pyfused.ops.operators import CROSS_ENTROPY, OPERATORS

SIZES = [10, 300] if interpreter.ON else [10, 3000]  # the maximum number of elements
SEARCHES = os.environ.get("HYPOTHESIS_PROFILE") == "search"
pytestmark = [pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")]


# On GPUs, torch computes nll_loss, and raises for some strides.
TRIED = {n: op for n, op in OPERATORS.items() if DEVICE == "cpu" or n != "nll_loss"}


@pytest.mark.parametrize("op", TRIED.values(), ids=TRIED)
def test_call(op: Operator) -> None:
    """The call depends on one seed and the size, because hypothesis often repeats other draws."""

    @settings(max_examples=settings().max_examples * (5 if op is CROSS_ENTROPY else 1))
    @given(st.integers(0, 2**32), st.sampled_from(SIZES))
    def check(seed: int, elements: int) -> None:
        call = random_call(op, seed, elements)
        note(str(call))
        check_call(call)

    check()


SHARED = {
    f"{op.name}-{'-'.join(pair)}": (op, pair) for op in TRIED.values() for pair in pairs_of(op)
}


@pytest.mark.parametrize("seed", range(1 if interpreter.ON else 3))
@pytest.mark.parametrize(("op", "shared"), SHARED.values(), ids=SHARED)
def test_operands_that_share_memory(op: Operator, shared: Shared, seed: int) -> None:
    """Each pair of operands is one object, or views of one storage, if dtypes and shapes allow it.

    A check that is skipped because a tensor is another operand must not be needed for its role.
    """
    call = random_call(op, seed, SIZES[seed % 2], shared=shared)
    if call.shared:  # test_call checks others
        check_call(call)


ONE_OBJECT = {name: case for name, case in SHARED.items() if "one object" in name}


@pytest.mark.cpu
@pytest.mark.slow
@pytest.mark.thresholds
@pytest.mark.parametrize(("op", "shared"), ONE_OBJECT.values(), ids=ONE_OBJECT)
def test_one_large_object_as_two_operands(
    op: Operator, shared: Shared, kernel_calls: KernelCalls
) -> None:
    """Kernels run at this size without being forced; two copies give the same results."""
    pair, by_name = shared[:2], declared(op)
    optional = tuple([x for x in pair if by_name[x].optional])
    soft = any(by_name[x].indices and by_name[x].differentiated for x in pair)
    call = Example(op, "", {}, optional, soft).call(torch.float32, (1024, 1024))
    if not share_memory(op, call.given, *shared):
        return
    for grad in {False, all(by_name[x].differentiated for x in pair)}:
        x = call.given[pair[0]].detach().requires_grad_(grad)
        others = [y for name, y in call.leaves.items() if name not in pair]
        leaves, found = others + [x] * grad, []
        for copies in ([x * 1] * 2, [x * 1, x * 1]):
            value = call.ours(**dict(zip(pair, copies, strict=True)))
            options: Any = {"allow_unused": True, "materialize_grads": True}
            slopes = torch.autograd.grad(value.sum(), leaves, **options) if leaves else ()
            found.append((value.detach(), *slopes))
        torch.testing.assert_close(*found)
    assert kernel_calls


# ---- sequences of calls --------------------------------------------------------------------------


MODES = {
    "": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "float16": lambda: torch.autocast("cpu", torch.float16),
    "device": lambda: torch.device("cpu"),  # same as torch.set_default_device
    "save_on_cpu": save_on_cpu,
}
NUMBERS = int, np.float64, np.float32, lambda x: torch.tensor(x, dtype=torch.float64), float


def draw(rng: random.Random) -> tuple[Call, str]:
    """Draws a call, in which numbers have any type, and a mode."""
    if rng.random() < 0.5:  # shares its layouts with other calls of the operator
        call = rng.choice([*EXAMPLES.values()]).call(shape=(rng.randrange(1, 12), 5))
    else:
        call = random_call(rng.choice([*OPERATORS.values()]), rng.randrange(1 << 32), 100)
    for name, x in call.given.items():
        if type(x) is float:
            call.given[name] = rng.choice(NUMBERS)(rng.choice([x, x, 0.0, 1.0, 2.0]))
        elif isinstance(x, Tensor) and name in call.leaves and rng.random() < 0.3:
            x.requires_grad_(False)
    return call, rng.choice([*MODES, "", "", ""])


def outcome(call: Call, mode: str) -> list[Tensor] | str:
    """Returns the results and the gradients, or the error."""
    with MODES[mode]():
        try:
            results, gradients = forward(call, ours)
            return [*results, *(gradients() if results[0].requires_grad else ())]
        except ERRORS as error:
            return f"{type(error).__name__}: {error}"


def compare_orders(seed: int, calls: int) -> int:
    """Compares the results of calls in two orders; returns the number of calls that raised.

    The second run has caches that have seen all calls.
    """
    rng, raised = random.Random(seed), 0
    drawn = [draw(rng) for _ in range(calls)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = [(each, outcome(*each)) for each in drawn]
        for (call, mode), found in rng.sample(results, len(results)):
            expected, note = outcome(call, mode), f"seed {seed}: {call}, mode {mode}"
            assert isinstance(found, str) == isinstance(expected, str), note
            if isinstance(found, str):
                assert found == expected, note
                raised += 1
                continue
            for x, y in zip(found, expected, strict=True):
                assert x.dtype is y.dtype, note
                torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True, msg=note)
    return raised


@pytest.mark.cpu
@pytest.mark.parametrize("seed", range(250 if SEARCHES else 3))
def test_results_do_not_depend_on_earlier_calls(seed: int) -> None:
    assert compare_orders(seed, 400) < 100
