"""Random calls of every operator, with any of its arguments, compared with torch in float64.

Hypothesis draws options, shapes, strides, dtypes and values together, which finds combinations that
other tests do not have. `HYPOTHESIS_PROFILE=search pytest tests/test_fuzz.py` draws 5000 calls of
each operator.
"""

from __future__ import annotations

from pathlib import Path

import grid
import interpreter
import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st
from processes import python
from random_calls import check_call, random_call

from pyfused.dispatch.operator import Operator
from pyfused.ops.operators import CROSS_ENTROPY, OPERATORS

SIZES = [10, 300] if interpreter.ON else [10, 3000]  # the maximum number of elements
SEEDS = st.integers(0, 2**32)
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using a target size:UserWarning"),
    pytest.mark.filterwarnings("ignore:size_average and reduce:UserWarning"),
]


@pytest.mark.parametrize("op", OPERATORS.values(), ids=OPERATORS)
def test_call(op: Operator) -> None:
    """The call depends on one seed and the size, because hypothesis often repeats other draws."""

    @settings(max_examples=settings().max_examples * (5 if op is CROSS_ENTROPY else 1))
    @given(SEEDS, st.sampled_from(SIZES))
    def check(seed: int, elements: int) -> None:
        call = random_call(op, seed, elements)
        note(str(call))
        check_call(call)

    check()


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
