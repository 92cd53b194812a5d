"""Random calls of every operator, with any of its arguments, compared with torch in float64.

Hypothesis draws options, shapes, strides, dtypes and values together, which finds combinations that
other tests do not have. `HYPOTHESIS_PROFILE=search pytest tests/test_fuzz.py` draws 5000 calls of
each operator.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import grid
import interpreter
import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from layouts import SAME_VALUES
from processes import python
from random_calls import ERRORS, Call, check_call, forward, ours, random_call, run
from torch import Tensor

from pyfused.adopt.explain import explain
from pyfused.dispatch.operator import Operator
from pyfused.ops.operators import CROSS_ENTROPY, OPERATORS

SIZES = [10, 300] if interpreter.ON else [10, 3000]  # the maximum number of elements
SEEDS = st.integers(0, 2**32)
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using a target size:UserWarning"),
    pytest.mark.filterwarnings("ignore:size_average and reduce:UserWarning"),
]
WITHOUT_PRODUCTS = {name: op for name, op in OPERATORS.items() if not op.is_linear}
every_operator = pytest.mark.parametrize("op", OPERATORS.values(), ids=OPERATORS)


@every_operator
def test_call(op: Operator) -> None:
    """The call depends on one seed and the size, because hypothesis often repeats other draws."""

    @settings(max_examples=settings().max_examples * (5 if op is CROSS_ENTROPY else 1))
    @given(SEEDS, st.sampled_from(SIZES))
    def check(seed: int, elements: int) -> None:
        call = random_call(op, seed, elements)
        note(str(call))
        check_call(call)

    check()


@every_operator
def test_modifying_an_argument_before_backward(op: Operator) -> None:
    """Backward raises, or computes the gradients of the old values."""

    @settings(max_examples=settings().max_examples // 4)
    @given(SEEDS, st.sampled_from(SIZES), st.booleans())
    def check(seed: int, elements: int, after_a_backward: bool) -> None:
        call = random_call(op, seed, elements, SAME_VALUES)
        call.given.pop("inplace", None)
        note(str(call))
        try:
            expected = backward(call, after_a_backward)()
        except ERRORS:
            return
        gradients = backward(call, after_a_backward)
        tensors = [x for x in call.given.values() if isinstance(x, Tensor)]
        changed = random.Random(seed).choice(tensors)
        note(f"changed: {changed.dtype} {tuple(changed.shape)}")
        with torch.no_grad():
            changed.copy_(1 - changed if changed.is_floating_point() else changed.flip(0))
        try:
            found = gradients()
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)  # noqa: PT017
            return
        assert_identical(found, expected)

    check()


def backward(call: Call, again: bool) -> Callable[[], Sequence[Tensor]]:
    """Runs the backward pass, or a second one, which may round differently."""
    _, gradients = forward(call, ours)
    if again:
        gradients()
    return gradients


@pytest.mark.cpu
@pytest.mark.parametrize("op", WITHOUT_PRODUCTS.values(), ids=WITHOUT_PRODUCTS)
def test_threads(op: Operator, threads: Callable[[int], None]) -> None:
    """Results do not depend on the number of threads.

    Excludes torch's operators, and sums of gradients of broadcast operands.
    """

    @settings(max_examples=settings().max_examples // 8)
    @given(SEEDS, st.sampled_from([2, 3, 5]))
    def check(seed: int, number: int) -> None:
        call = random_call(op, seed, 150_000)  # one thread per 32,768 elements
        note(str(call))
        try:
            threads(1)
            expected = run(call, ours)
            threads(number)
            if not takes_kernel(call):
                return
            results, gradients = forward(call, ours)
            largest = max(x.numel() for x in call.given.values() if isinstance(x, Tensor))
            for i, (got, one) in enumerate(zip([*results, *gradients()], expected, strict=True)):
                if i < len(results) or got.numel() == largest:
                    assert_identical([got], [one])
        except ERRORS:
            return

    check()


def takes_kernel(call: Call) -> bool:
    given = {name: value for name, value in call.given.items() if name != "with_metrics"}
    if given.get("inplace"):
        given["input"] = given["input"] * 1  # not a leaf
    return explain(call.op.name, **given).backend != "torch"


def assert_identical(got: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close([*got], [*expected], rtol=0, atol=0, equal_nan=True)


@pytest.mark.cpu
@pytest.mark.slow
def test_threads_with_small_stacks() -> None:
    """A stack overflow would end the process, which prints its last call."""
    done = python(
        f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import threading, warnings
        from concurrent.futures import ThreadPoolExecutor

        import torch
        from conftest import fused_always
        from random_calls import ERRORS, ours, random_call, run
        from pyfused.ops.operators import OPERATORS

        warnings.simplefilter("ignore")
        torch.set_num_threads(2)
        threading.stack_size(128 << 10)
        with fused_always(), ThreadPoolExecutor(1) as pool:
            for op in OPERATORS.values():
                for seed in range({500 if grid.FULL else 20}):
                    call = random_call(op, seed, 3000)
                    print(f"seed {{seed}}: {{call}}", flush=True)
                    try:
                        pool.submit(run, call, ours).result()
                    except ERRORS:
                        pass
        """,
        OMP_STACKSIZE="128K",
    )
    assert done.returncode == 0, (done.returncode, done.stdout[-1000:], done.stderr[-1000:])
