"""Weights, masks and divisors of any dtype, in every function that takes one.

The mean of 70,000 rows divides by the sum of their weights. In half precision, a sum of 70,000 ones
is infinite or rounded, and so is its product with a small number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from catalogue import Call, Example, Function
from check_calls import check_call
from compare import FLOATS, outcome
from samples import declared
from torch import Tensor
from torch.nn import functional as F

from pyfused import functional as fused
from pyfused.dispatch.operator import Operator
from pyfused.ops.operators import CROSS_ENTROPY, LINEAR_CROSS_ENTROPY, NLL_LOSS, OPERATORS

ROWS = 70_000
DTYPES = *FLOATS, torch.bool, torch.uint8, torch.int64
pytestmark = pytest.mark.cpu  # large for the interpreter


def weighted(op: Operator, name: str, dtype: torch.dtype, soft: bool) -> tuple[Call, Call]:
    """Returns a call with a weight of a dtype, and the same call in float64.

    Weights of rows are 0 or 1; half of them are 0.

    Args:
        soft: Whether the target is probabilities.
    """
    call = Example(op, "", {"reduction": "mean"}, (name,), soft).call(torch.float32, (ROWS, 3))
    weight = call.given[name]
    weight = torch.arange(weight.numel()).view(weight.shape) % 2
    call.given[name] = weight.to(dtype)
    wide = {n: x.double() if x.is_floating_point() else x for n, x in call.tensors.items()}
    wide = {n: x.detach().requires_grad_(n in call.leaves) for n, x in wide.items()}
    return call, replace(call, given=call.given | wide | {name: weight.double()})


def step(call: Call, function: Function = Call.ours) -> list[Tensor]:
    """Returns the loss and the gradients, for the grad_output of a scaled loss."""
    loss = function(call)
    gradients = torch.autograd.grad(loss, [*call.leaves.values()], loss.new_tensor(64.0))
    return [loss.detach(), *gradients]


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
    call, exact = weighted(op, name, dtype, soft)
    expected = step(exact, Call.reference)
    compare(step(call), expected)
    if name == "token_weight":  # an argument that torch lacks
        compare(step(call, Call.reference), expected)


def compare(found: list[Tensor], expected: list[Tensor]) -> None:
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=2e-5, atol=1e-5 * float(y.abs().max()))


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_rows_of_weight_0_may_be_nan_if_metrics_are_computed(softcap: float | None) -> None:
    """Metrics read all rows, but the loss of a row of weight 0 is 0."""
    logits, weight = torch.randn(5, 7), torch.tensor([0.0, 1, 0, 1, 1])
    logits[0] = math.nan
    target, options = torch.arange(5), {"softcap": softcap, "token_weight": weight}
    for reduction in ("none", "mean", "sum"):
        given: dict[str, Any] = options | {"reduction": reduction}
        loss, _ = fused.cross_entropy_with_metrics(logits, target, **given)
        expected = fused.cross_entropy(logits.nan_to_num(), target, **given)
        torch.testing.assert_close(loss, expected)


# ---- dtypes of class weights ---------------------------------------------------------------------


SIZES = [(60, 30), pytest.param((6, 20), marks=pytest.mark.thresholds, id="small")]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("op", "soft"),
    [*product((CROSS_ENTROPY, LINEAR_CROSS_ENTROPY), (False, True)), (NLL_LOSS, False)],
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_dtypes_of_class_weights(op: Operator, soft: bool, autocast: bool, size: Any) -> None:
    """Compares the results with torch's, for all dtypes of the arguments."""
    targets, weights = FLOATS if soft else [torch.int64], (*FLOATS, None)
    for dtype, of_target, of_weight in product(FLOATS, targets, weights):
        call = Example(op, "", {}, ("weight",) if of_weight else (), soft).call(dtype, size)
        for name, kind in (("target", of_target), ("weight", of_weight)):
            if kind is not None:
                x = call.given[name]
                call.given[name] = x.detach().to(kind).requires_grad_(x.requires_grad)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            check_call(call)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["cross_entropy", "linear_cross_entropy"])
def test_class_weights_are_at_most_as_wide_as_the_loss(name: str, size: tuple[int, int]) -> None:
    target, factors = torch.randint(size[1], size[:1]), 0.5 + torch.rand(size[1])
    operands = torch.randn(size[0], 4), torch.randn(size[1], 4)
    if name == "cross_entropy":
        operands = (F.linear(*operands),)
    promote = torch.promote_types
    for dtype, of_weight, loss_dtype in product(FLOATS, FLOATS, FLOATS):
        args, weight = [x.to(dtype) for x in operands], factors.to(of_weight)
        options = {"weight": weight, "loss_dtype": loss_dtype}
        loss = outcome(partial(getattr(fused, name), *args, target, **options))
        is_between = promote(dtype, of_weight) is of_weight
        is_between &= promote(of_weight, loss_dtype) is loss_dtype
        if dtype is not of_weight and not is_between:
            assert isinstance(loss, RuntimeError)
            continue
        logits = args[0].double() if len(args) == 1 else F.linear(*[x.double() for x in args])
        exact = F.cross_entropy(logits, target, weight.double())
        assert loss.dtype is loss_dtype
        eps = torch.finfo(loss_dtype).eps + (name != "cross_entropy") * torch.finfo(dtype).eps / 8
        assert (loss - exact).abs() <= max(2e-6, eps) * exact
