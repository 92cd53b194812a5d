"""Random calls of every operator, with any of its arguments, compared with torch in float64.

Hypothesis draws options, shapes, strides, dtypes and values together, which covers combinations
that other tests lack. `HYPOTHESIS_PROFILE=search` draws 5000 calls of each operator.
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import interpreter
import pytest
import torch
from catalogue import Example, declared, pairs_of, random_call, share_memory
from check_calls import check_call
from compare import DEVICE
from conftest import KernelCalls
from hypothesis import given, note, settings
from hypothesis import strategies as st

from pyfused.dispatch.operator import Operator
from pyfused.ops.operators import CROSS_ENTROPY, OPERATORS

SIZES = [10, 300] if interpreter.ON else [10, 3000]  # the maximum number of elements
SEEDS = st.integers(0, 2**32)
pytestmark = [pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")]


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


SEVERAL = {name: op for name, op in OPERATORS.items() if pairs_of(op)}


@pytest.mark.parametrize("op", SEVERAL.values(), ids=SEVERAL)
def test_operands_that_share_memory(op: Operator) -> None:
    """Each pair of operands is one object, or views of one storage, if dtypes and shapes allow it.

    A check that is skipped because a tensor is another operand must not be needed for its role.
    """
    if DEVICE != "cpu" and op.name == "nll_loss":
        pytest.skip("torch computes it on GPUs, and raises for some strides")
    tried = Counter[tuple[str, ...]]()
    for shared in pairs_of(op):
        for seed in range(1 if interpreter.ON else 3):
            call = random_call(op, seed, SIZES[seed % 2], shared=shared)
            tried[call.shared] += 1
            check_call(call)
    operands = [operand.name for operand in op.operands if not operand.indices]
    assert tried.keys() >= {*itertools.combinations(operands, 2)}


@pytest.mark.cpu
@pytest.mark.slow
@pytest.mark.thresholds
@pytest.mark.parametrize("op", SEVERAL.values(), ids=SEVERAL)
def test_one_large_object_as_two_operands(op: Operator, kernel_calls: KernelCalls) -> None:
    """Kernels run at this size without being forced; two copies give the same results."""
    by_name = declared(op)
    for first, second, kind in pairs_of(op):
        optional = tuple([x for x in (first, second) if by_name[x].optional])
        soft = any(by_name[x].indices and by_name[x].differentiated for x in (first, second))
        call = Example(op, "", {}, optional, soft).call(torch.float32, (1024, 1024))
        if kind != "one object" or not share_memory(op, call.given, first, second, kind):
            continue
        for grad in {False, by_name[first].differentiated and by_name[second].differentiated}:
            x = call.given[first].detach().requires_grad_(grad)
            others = [y for name, y in call.leaves.items() if name not in (first, second)]
            leaves, found = others + [x] * grad, []
            for copies in ([x * 1] * 2, [x * 1, x * 1]):
                value = call.ours(**dict(zip((first, second), copies, strict=True)))
                options: Any = {"allow_unused": True, "materialize_grads": True}
                slopes = torch.autograd.grad(value.sum(), leaves, **options) if leaves else ()
                found.append((value.detach(), *slopes))
            torch.testing.assert_close(*found)
    assert kernel_calls or op.name in ("log_probs", "nll_loss")  # without such a pair
