"""Pointwise losses and gated activations match torch, also for NaN, infinities and mixed dtypes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from catalogue import Call
from check_calls import check_call
from compare import (
    FLOATS,
    HALF,
    assert_accurate,
    assert_matches_torch,
    extended,
    operators_of_torch,
    torch_function,
)
from conftest import KernelCalls
from grid import grid
from samples import FIRST, GATED, LAYOUTS, LOSSES, SAMPLES, Loss
from torch import Tensor

from pyfused import functional as fused
from pyfused.backends import DTYPES
from pyfused.formula_compiler import trace
from pyfused.formula_compiler.program import Program
from pyfused.functional import gaussian_nll_loss
from pyfused.ops import definitions
from pyfused.ops.operators import OPERATORS
from pyfused.ops.pointwise_loss import PointwiseLoss
from pyfused.types import Outputs

INF, NAN = float("inf"), float("nan")
REDUCTIONS = ["none", "mean", "sum"]
close = torch.testing.assert_close


# ---- shapes --------------------------------------------------------------------------------------


@pytest.mark.cpu
@pytest.mark.thresholds
@pytest.mark.parametrize("name", ["hinge_embedding_loss", "poisson_nll_loss"])
@pytest.mark.parametrize("other", [(1 << 15, 1), (100_000, 32), (32,)])
@pytest.mark.parametrize("swapped", [False, True])
def test_broadcast_sizes(name: str, other: Any, swapped: bool, kernel_calls: KernelCalls) -> None:
    given = [torch.rand(32), torch.rand(other)][:: -1 if swapped else 1]
    close(getattr(fused, name)(*given), torch_function(OPERATORS[name])(*given))
    assert kernel_calls.total() == (len(other) > 1)


# ---- dtypes --------------------------------------------------------------------------------------

PROMOTED = [*FLOATS, torch.int64, torch.int8, torch.bool]
DIFFERENTIATED = pytest.mark.skipif(
    torch.__version__ < "2.12", reason="torch 2.11 cannot differentiate mse_loss of mixed dtypes"
)


OF_WEIGHTS = None, *FLOATS, torch.int64
WEIGHTED = [
    (loss, dtype) for loss in FIRST for dtype in OF_WEIGHTS[: 6 if loss.takes_weight else 1]
]


@DIFFERENTIATED
@grid(
    case=WEIGHTED, other=PROMOTED, dtype=FLOATS, reduction=REDUCTIONS, swapped=[False, False, True]
)
def test_type_promotion(case: Any, dtype: Any, other: Any, swapped: bool, reduction: str) -> None:
    loss, of_weight = case
    values = loss.draw((60, 5), torch.float64, leaves=())
    first_two = [operand.name for operand in loss.operands[:2]]
    dtypes = dict(zip(first_two[:: -1 if swapped else 1], (dtype, other), strict=True))
    given = {name: x.abs().to(dtypes.get(name, torch.float32)) for name, x in values.items()}
    for name, tensor in given.items():
        tensor.requires_grad_(tensor.is_floating_point() and name in loss.differentiated)
    if of_weight:
        given["weight"] = torch.tensor([1, 0, 2, 1, 3]).expand(60, 5).to(of_weight)
    check_call(Call(loss.op, given | loss.parameters | {"reduction": reduction}))


# ---- special values ------------------------------------------------------------------------------


@pytest.mark.interpreted
@grid(loss=LOSSES, dtype=FLOATS, size=[6, 6 * 7, 6 * 50], reduction=REDUCTIONS)
def test_special_values(loss: Loss, dtype: torch.dtype, size: int, reduction: str) -> None:
    special = torch.tensor(SAMPLES[loss.op.name].special).to(dtype)
    given = loss.draw((size,), dtype)
    values = (special.repeat(size // 6), special.repeat_interleave(size // 6))
    for operand, value in zip(loss.operands[:2], values, strict=True):
        if not operand.sign:
            given[operand.name] = value.requires_grad_(operand.name in loss.differentiated)
    if loss.parameters.get("full"):  # torch's gradient is NaN where the approximation is masked
        given["target"] = given["target"].detach()
    if "pos_weight" in given:  # torch's gradient is NaN where their product overflows
        given["pos_weight"] /= 2
    options = loss.parameters | {"reduction": reduction}
    assert_matches_torch(loss.ours, loss.reference, **given, **options)


@pytest.mark.interpreted
@grid(loss=[x for x in LOSSES if not hasattr(F, x.op.name)], dtype=[torch.float32, torch.bfloat16])
def test_no_intermediate_result_overflows(loss: Loss, dtype: torch.dtype) -> None:
    """Compares losses that torch lacks, whose formula may overflow, with their closed forms.

    Differences of two operands are finite.
    """
    info, cancels = torch.finfo(dtype), SAMPLES[loss.op.name].cancels
    sizes = [info.max / 2, 4 * info.max**0.5, info.max**0.5 / 4, 1.0, 0.0]
    pairs = torch.tensor([*sizes, *[-x for x in sizes]], dtype=dtype).repeat(2, len(sizes) * 2, 1)
    given = loss.draw(pairs[0].shape, dtype)
    for operand, value in zip(loss.bounded, (pairs[0], pairs[1].t()), strict=False):
        if not operand.sign and operand.high == INF:
            leaf = value.clamp(min=operand.low)
            given[operand.name] = leaf.requires_grad_(operand.name in loss.differentiated)
    got = loss.ours(**given, **loss.parameters, reduction="none")
    gradients = torch.autograd.grad(got.sum(), [given[name] for name in loss.differentiated])
    with np.errstate(all="ignore"):
        exact, *_ = loss.exact(given, "none", torch.ones_like(got))
    term = sum(abs(extended(x)) for x in given.values()) if cancels else 0
    for mine, best in zip((got, *gradients), exact.results, strict=True):
        assert_accurate(mine, best, 8 * info.eps * term + info.tiny, roundings=8, **given)


@grid(loss=[loss for loss in FIRST if loss.op.clamps])
def test_losses_that_clamp(loss: Loss, monkeypatch: pytest.MonkeyPatch) -> None:
    """The C++ kernels have torch 2.13's derivative at a bound; programs have the installed one."""
    monkeypatch.setattr(trace, "clamp_is_inclusive", lambda: False)
    source = loss.op.source
    monkeypatch.setattr(source, "find", source._find)
    outputs = Outputs(True, (True,) * len(loss.op.variables))
    numbers: list[Any] = [None if x.optional else 1.0 for x in loss.op.numbers]
    numbers += [x.values[0] for x in loss.op.choices if x.values]
    assert isinstance(source.find(numbers, len(loss.op.variables), outputs)[0], Program)
    assert_matches_torch(loss.ours, loss.reference, **loss.draw((300,), torch.float64))


@grid(
    loss=[loss for loss in FIRST if loss.takes_weight and hasattr(F, loss.op.name)],
    value=[0.0, -1.0, NAN, INF],
    reduction=REDUCTIONS,
)
@pytest.mark.parametrize("where", [(1, slice(2, None)), slice(None)], ids=["some", "all"])
def test_unusual_weights(loss: Loss, value: float, reduction: str, where: Any) -> None:
    given = loss.draw((3, 5)) | {"weight": loss.weight((3, 5))}
    given["weight"][where] = value
    assert_matches_torch(loss.ours, loss.reference, **given, reduction=reduction)


@pytest.mark.interpreted
@grid(dtype=FLOATS, reduction=REDUCTIONS)
def test_special_variances(dtype: torch.dtype, reduction: str, kernel_calls: KernelCalls) -> None:
    """Variances below eps are clamped, with gradients; the gradient of an infinite one is 0."""
    x, t = (torch.randn(40).to(dtype).requires_grad_() for _ in range(2))
    var = torch.cat([torch.linspace(0, 1, 39), torch.tensor([INF])]).to(dtype).requires_grad_()
    options = {"eps": 0.5, "reduction": reduction}
    assert_matches_torch(gaussian_nll_loss, F.gaussian_nll_loss, x, t, var, **options)
    assert kernel_calls["gaussian_nll_loss"]


# ---- broadcasting and memory ---------------------------------------------------------------------


@pytest.mark.cpu
@grid(layout=LAYOUTS, other=["contiguous", "transposed", "rows_apart", "first_row_expanded"])
@pytest.mark.parametrize("shape", [(70, 300), (6, 7, 8, 9)], ids=str)
def test_operands_are_not_copied(layout: str, other: str, shape: tuple[int, ...]) -> None:
    x = LAYOUTS[layout](torch.randn(shape)).requires_grad_()
    y = LAYOUTS[other](torch.randn(shape))
    fused.huber_loss(x, y).backward()  # planning uses meta tensors
    fused.gelu(x).backward(y)
    with operators_of_torch("aten::copy_") as found:
        torch.autograd.grad(fused.huber_loss(x, y), x)
        torch.autograd.grad(fused.gelu(x), x, y)
    assert not any(shapes[0] for shapes in found)  # scalars may be copied


SHAPES = (300, 130), (4, 40, 500), (3, 2, 20000), (20, 1000, 2), (90, 1, 257)


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@grid(layouts=itertools.product(("contiguous", "last_dimensions_swapped", "rows_apart"), repeat=3))
def test_strided_operands_of_several_blocks(layouts: Any, shape: Any, dtype: Any) -> None:
    """A block of 16,384 elements starts and ends within rows, has one row, or thousands."""
    same = [(torch.rand(shape) + 0.1).to(dtype).requires_grad_() for _ in range(3)]
    pairs = zip(layouts, same, strict=True)
    moved = [LAYOUTS[layout](x.detach()).requires_grad_() for layout, x in pairs]
    losses = [fused.gaussian_nll_loss(*each) for each in (same, moved)]
    close(*losses)  # the order of the sum depends on the strides
    gradients = map(torch.autograd.grad, losses, (same, moved))
    assert all(map(torch.equal, *gradients))


# ---- gated activations ---------------------------------------------------------------------------


@pytest.mark.interpreted
@grid(op=GATED)
def test_gated_activations_at_special_values(op: PointwiseLoss) -> None:
    special = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1.0, -2.0, 200.0, -200.0]).double()
    leaves = special.repeat(9).requires_grad_(), special.repeat_interleave(9).requires_grad_()
    assert_matches_torch(getattr(fused, op.name), torch_function(op), *leaves)


@pytest.mark.interpreted
@grid(
    ignored=[257, 2049, 0.1, torch.tensor(0.1), 7e4, math.nan],
    dtype=[torch.bfloat16, torch.float16, torch.float32],
    of_input=[torch.bfloat16, torch.float32, torch.float64],
    reduction=[*REDUCTIONS, "none"],
)
def test_ignored_targets_keep_their_dtype(
    ignored: Any, of_input: Any, dtype: torch.dtype, reduction: str
) -> None:
    x, target = torch.randn(40, dtype=of_input), (torch.rand(40) < 0.5).to(dtype)
    target[::2] = float(ignored)
    x[::4] = NAN  # ignored, too
    leaf, options = x.clone().requires_grad_(), {"ignore_index": ignored, "reduction": reduction}
    loss = fused.sigmoid_focal_loss(leaf, target, **options)
    if math.isnan(ignored):  # equals no target
        assert loss.isnan().any()
        return
    each = definitions.sigmoid_focal_loss(x[1::2], target[1::2], None, (0.25, 2.0, None, reduction))
    close(loss[1::2] if reduction == "none" else loss, each)
    assert reduction != "none" or not loss[::2].any()
    for create_graph in (False, True):  # by the kernel, and by the definition
        args = loss.sum(), leaf, None, True, create_graph
        assert not torch.autograd.grad(*args)[0][::2].any()


ORDERS: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: torch.rand(4, 5),
    "transposed": lambda: torch.rand(5, 4).t(),
    "columns of a transposed matrix": lambda: torch.rand(5, 6).t()[:4],
    "expanded": lambda: torch.rand(1, 1).expand(4, 5),
    "expanded rows": lambda: torch.rand(4, 1).expand(4, 5),
    "overlapping": lambda: torch.rand(9).unfold(0, 5, 1)[:4],
    "broadcast": lambda: torch.rand(4, 1),
}


@pytest.mark.interpreted
@grid(loss=FIRST)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_unreduced_losses_have_the_memory_order_of_torchs(loss: Loss) -> None:
    names = [operand.name for operand in loss.op.operands if not operand.optional]
    for orders in itertools.product(ORDERS, repeat=len(names)):
        given = {name: ORDERS[order]() for name, order in zip(names, orders, strict=True)}
        call = Call(loss.op, given | loss.parameters | {"reduction": "none"})
        try:
            expected = call.reference()
        except (RuntimeError, ValueError):  # some losses do not broadcast
            continue
        assert call.ours().stride() == expected.stride(), orders


# ---- losses made of another loss -----------------------------------------------------------------


@grid(dtype=FLOATS, weight=[None, (3, 5)], reduction=REDUCTIONS)
def test_losses_made_of_another_loss(
    dtype: torch.dtype, weight: tuple[int, ...] | None, reduction: str, kernel_calls: KernelCalls
) -> None:
    x, y = torch.randn(3, 5).to(dtype).requires_grad_(), torch.rand(3, 5).to(dtype)
    given = {"reduction": reduction, "weight": weight and torch.rand(weight).to(dtype)}

    def rmse_loss(x: Tensor, y: Tensor, **given: Any) -> Tensor:
        return (F.mse_loss(x, y, **given) + 0.5).sqrt()

    ours = partial(fused.rmse_loss, eps=torch.tensor(0.5).double())
    assert_matches_torch(ours, rmse_loss, x, y, **given)
    assert "mse_loss" in kernel_calls


@pytest.mark.parametrize("dtype", HALF)
def test_losses_made_of_another_loss_do_not_overflow(dtype: torch.dtype) -> None:
    x, zero = torch.full((2, 60_000), 300.0).to(dtype), torch.zeros(2, 60_000).to(dtype)
    assert fused.rmse_loss(x, zero) == 300
