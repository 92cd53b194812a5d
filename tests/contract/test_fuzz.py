"""Random calls of every operator, with any of its arguments, compared with torch in float64.

Hypothesis draws options, shapes, strides, dtypes and values together, which covers combinations
that other tests lack. `HYPOTHESIS_PROFILE=search` draws 5000 calls of each operator.
"""

from __future__ import annotations

import interpreter
import pytest
from catalogue import random_call
from check_calls import check_call
from compare import DEVICE
from hypothesis import given, note, settings
from hypothesis import strategies as st

from pyfused.dispatch.operator import Operator
from pyfused.ops.operators import CROSS_ENTROPY, OPERATORS

SIZES = [10, 300] if interpreter.ON else [10, 3000]  # the maximum number of elements
SEEDS = st.integers(0, 2**32)
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using a target size:UserWarning"),
]


@pytest.mark.parametrize("op", OPERATORS.values(), ids=OPERATORS)
def test_call(op: Operator) -> None:
    """The call depends on one seed and the size, because hypothesis often repeats other draws."""

    if DEVICE != "cpu" and op.name == "nll_loss":
        pytest.skip("torch computes it on GPUs, and raises for some strides")

    @settings(max_examples=settings().max_examples * (5 if op is CROSS_ENTROPY else 1))
    @given(SEEDS, st.sampled_from(SIZES))
    def check(seed: int, elements: int) -> None:
        call = random_call(op, seed, elements)
        note(str(call))
        check_call(call)

    check()
