"""Weights, masks and divisors of any dtype, in every function that takes one.

The mean of 70,000 rows divides by the sum of their weights. In half precision, a sum of 70,000 ones
is infinite or rounded, and so is its product with a small number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from catalogue import Example, ours, reference
from check_calls import check_call, of_reference, run
from compare import FLOATS, assert_accurate, largest, outcome
from samples import declared

from pyfused import functional as fused
from pyfused.dispatch.operator import Operator
from pyfused.ops.operators import CROSS_ENTROPY, LINEAR_CROSS_ENTROPY, NLL_LOSS, OPERATORS

ROWS = 70_000
DTYPES = *FLOATS, torch.bool, torch.uint8, torch.int64
pytestmark = pytest.mark.cpu  # large for the interpreter


def cases() -> Iterator[Any]:
    for op in OPERATORS.values():
        for name in sorted({"token_weight", "weight"} & declared(op).keys()):
            of_classes = name == "weight" and any(o.indices for o in op.operands)
            converts = next(o for o in op.all_operands if o.name == name).converts
            dtypes = DTYPES if converts else FLOATS  # others are torch's
            for dtype in [torch.float32] if of_classes else dtypes:  # that of the logits
                yield pytest.param(op, name, dtype, False, id=f"{op.name}-{name}-{dtype}")
        if op.factors and any(o.indices and o.differentiated for o in op.operands):
            for dtype in DTYPES:
                yield pytest.param(op, "token_weight", dtype, True, id=f"{op.name}-soft-{dtype}")


@pytest.mark.parametrize(("op", "name", "dtype", "soft"), [*cases()])
def test_means_of_many_rows(op: Operator, name: str, dtype: torch.dtype, soft: bool) -> None:
    """Half of the weights of rows are 0, others are 1."""
    call = Example(op, "", {"reduction": "mean"}, (name,), soft).call(torch.float32, (ROWS, 3))
    weight = call.given[name]
    call.given[name] = (torch.arange(weight.numel()).view(weight.shape) % 2).to(dtype)
    exact = of_reference(call, torch.float64)
    functions = [ours, reference] if name == "token_weight" else [ours]  # torch lacks token_weight
    for function in functions:
        for got, best in zip(run(call, function), exact, strict=True):
            assert_accurate(got, best, 1e-5 * largest(best))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_rows_of_weight_0_may_be_nan_if_metrics_are_computed(
    softcap: float | None, reduction: str
) -> None:
    """Metrics read all rows, but the loss of a row of weight 0 is 0."""
    logits, weight = torch.randn(5, 7), torch.tensor([0.0, 1, 0, 1, 1])
    logits[0] = math.nan
    target, given = torch.arange(5), {"softcap": softcap, "reduction": reduction}
    loss, _ = fused.cross_entropy_with_metrics(logits, target, token_weight=weight, **given)
    expected = fused.cross_entropy(logits.nan_to_num(), target, token_weight=weight, **given)
    torch.testing.assert_close(loss, expected)


# ---- dtypes of class weights ---------------------------------------------------------------------


every_size = pytest.mark.parametrize(
    "size", [(60, 30), pytest.param((6, 20), marks=pytest.mark.thresholds, id="small")]
)
HEAD_AND_LOSS = CROSS_ENTROPY, LINEAR_CROSS_ENTROPY
TARGETS = [*product(HEAD_AND_LOSS, FLOATS), *product((*HEAD_AND_LOSS, NLL_LOSS), [torch.int64])]


def name_of(x: Any) -> str:
    return getattr(x, "name", str(x))


@every_size
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("of_weight", [*FLOATS, None])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("op", "of_target"), TARGETS, ids=name_of)
def test_dtypes_of_class_weights(
    op: Operator, of_target: Any, dtype: Any, of_weight: Any, autocast: bool, size: Any
) -> None:
    soft, optional = of_target is not torch.int64, ("weight",) if of_weight else ()
    call = Example(op, "", {}, optional, soft).call(dtype, size)
    for name, kind in (("target", of_target), ("weight", of_weight)):
        if kind is not None:
            x = call.given[name]
            call.given[name] = x.detach().to(kind).requires_grad_(x.requires_grad)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        check_call(call)


@every_size
@pytest.mark.parametrize(("dtype", "of_weight", "loss_dtype"), [*product(FLOATS, repeat=3)])
@pytest.mark.parametrize("op", HEAD_AND_LOSS, ids=name_of)
def test_class_weights_are_at_most_as_wide_as_the_loss(
    op: Operator, dtype: Any, of_weight: Any, loss_dtype: Any, size: Any
) -> None:
    call = Example(op, "", {"loss_dtype": loss_dtype}, ("weight",)).call(dtype, size)
    call.given["weight"] = call.given["weight"].to(of_weight)
    is_between = torch.promote_types(dtype, of_weight) is of_weight
    is_between &= torch.promote_types(of_weight, loss_dtype) is loss_dtype
    loss = outcome(call.ours)
    if dtype is of_weight or is_between:
        assert loss.dtype is loss_dtype
    else:
        assert isinstance(loss, RuntimeError)
    check_call(call)
