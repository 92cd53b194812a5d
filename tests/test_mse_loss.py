"""mse_loss means what torch's means: values, shapes, dtypes, warnings, NaN and infinities."""

from __future__ import annotations

import warnings
from itertools import product
from typing import Any

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from compare import FLOATS, assert_as_accurate, assert_matches_torch, evaluate, exactly
from conftest import KernelCalls
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pyfused.functional import mse_loss
from pyfused.ops.pointwise_loss import result_dtype

INF, NAN = float("inf"), float("nan")
SHAPES = [(), (1,), (7,), (8,), (3, 5), (2, 3, 17), (2, 1, 3, 2)]
BROADCAST = pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")


def pair(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    make = lambda: (torch.randn(shape, dtype=dtype) * 4).requires_grad_()  # noqa: E731
    return make(), make()


def test_the_reference_is_torch_in_float64(reduction: str) -> None:
    for shape, weighted in product(SHAPES, (False, True)):
        input, target = pair(shape, torch.float64)
        weight = torch.rand(shape, dtype=torch.float64).requires_grad_() if weighted else None
        options = {"weight": weight, "reduction": reduction}
        spec = evaluate(reference.mse_loss, input, target, **options)
        torchs = evaluate(F.mse_loss, input, target, **options)
        tight = {"rtol": 1e-13, "atol": 1e-14}
        torch.testing.assert_close(spec.value, torchs.value, **tight)
        torch.testing.assert_close(spec.gradients, torchs.gradients, **tight)


def test_four_rows_by_hand() -> None:
    predicted = torch.tensor([[2.5], [7.0], [10.0], [16.0]], requires_grad=True)
    wanted = torch.tensor([[3.0], [7.0], [11.0], [15.0]])
    assert torch.equal(
        mse_loss(predicted, wanted, reduction="none"), torch.tensor([[0.25], [0], [1], [1]])
    )
    assert mse_loss(predicted, wanted, reduction="sum").item() == 2.25
    loss = mse_loss(predicted, wanted)
    assert loss.item() == 2.25 / 4
    loss.backward()
    by_hand = 2 * (predicted.detach().numpy() - wanted.numpy()) / 4
    assert predicted.grad is not None
    np.testing.assert_array_equal(predicted.grad.numpy(), by_hand)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_shapes_and_options_against_torch(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    weighted: bool,
    reduction: str,
    kernel_calls: KernelCalls,
) -> None:
    input, target = pair(shape, dtype)
    weight = torch.rand(shape).to(dtype) if weighted else None
    assert_matches_torch(mse_loss, F.mse_loss, input, target, weight=weight, reduction=reduction)
    assert kernel_calls["mse_loss"]


@pytest.mark.parametrize("requiring", ["input", "target", "both", "neither"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_gradients_to_those_that_ask(
    requiring: str, weighted: bool, reduction: str, kernel_calls: KernelCalls
) -> None:
    input, target = pair((3, 5))
    input.requires_grad_(requiring in ("input", "both"))
    target.requires_grad_(requiring in ("target", "both"))
    weight = torch.rand(3, 5) if weighted else None
    got = assert_matches_torch(
        mse_loss, F.mse_loss, input, target, weight=weight, reduction=reduction
    )
    assert len(got.gradients) == {"both": 2, "neither": 0}.get(requiring, 1)
    assert kernel_calls["mse_loss"]


def test_gradient_to_the_weight(reduction: str) -> None:
    input, target = pair((3, 5))
    weight = torch.rand(3, 5, requires_grad=True)
    assert_matches_torch(mse_loss, F.mse_loss, input, target, weight=weight, reduction=reduction)


BROADCASTS = [
    ((3, 5), (5,)),
    ((5,), (3, 5)),
    ((3, 1), (1, 5)),
    ((3, 5), ()),
    ((), (3, 5)),
    ((2, 3, 17), (3, 1)),
    ((4, 1), (4,)),
    ((0, 3), (1, 3)),
    ((1, 3), (0, 3)),
]


@BROADCAST
@pytest.mark.parametrize("shapes", BROADCASTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_broadcasting(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], dtype: torch.dtype, reduction: str
) -> None:
    input, _ = pair(shapes[0], dtype)
    target, _ = pair(shapes[1], dtype)
    assert_matches_torch(mse_loss, F.mse_loss, input, target, reduction=reduction)
    weight = torch.rand(input.shape).to(dtype)
    assert_matches_torch(mse_loss, F.mse_loss, input, target, weight=weight, reduction=reduction)


@BROADCAST
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("shapes", BROADCASTS[:-2], ids=str)
def test_broadcasting_in_half_precision(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], dtype: torch.dtype
) -> None:
    """Differences of one sign, so that summing over the expanded dimensions cancels nothing."""
    input = (torch.rand(shapes[0]) + 2).to(dtype).requires_grad_()
    target = torch.rand(shapes[1]).to(dtype).requires_grad_()
    got = evaluate(mse_loss, input, target)
    exact = evaluate(F.mse_loss, input, target, convert=exactly)
    for ours, expected in zip(
        (got.value, *got.gradients), (exact.value, *exact.gradients), strict=True
    ):
        assert ours.dtype == dtype
        tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 0.0}
        torch.testing.assert_close(ours, expected.to(dtype), **tolerance)


def test_broadcasting_warns_as_torch_does_at_the_callers_line() -> None:
    input, target = torch.randn(3, 5), torch.randn(5)
    caught = []
    for function in (mse_loss, F.mse_loss):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always", UserWarning)
            function(input, target)
        assert len(seen) == 1
        caught.append((seen[0].category, str(seen[0].message), seen[0].filename))
    assert caught[0] == caught[1]
    assert caught[0][2] == __file__


PROMOTED = [*FLOATS, torch.int64, torch.uint8, torch.bool]

DIFFERENTIATED = pytest.mark.skipif(
    torch.__version__ < "2.12", reason="torch 2.11 has no gradient of mse_loss across dtypes"
)


@DIFFERENTIATED
@pytest.mark.parametrize("target_dtype", PROMOTED, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("input_dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
def test_type_promotion(
    input_dtype: torch.dtype, target_dtype: torch.dtype, reduction: str
) -> None:
    """torch's dtype; nearer to the exact value than torch where torch rounds on the way."""
    input = torch.randn(3, 5).to(input_dtype).requires_grad_()
    target = torch.randn(3, 5).abs().to(target_dtype)
    target.requires_grad_(target_dtype.is_floating_point)
    weight = torch.tensor([1, 0, 2, 1, 3]).expand(3, 5)
    cases: list[tuple[Tensor, Tensor, Tensor | None]] = [
        (input, target, None),
        (target, input, None),
    ]
    if target_dtype != torch.bool:  # torch's weighted loss subtracts with `-`: no booleans
        cases += [(input, target, weight.to(dtype)) for dtype in (*FLOATS, torch.int64)]
    for one, other, weight_ in cases:
        options = {"weight": weight_, "reduction": reduction}
        got = evaluate(mse_loss, one, other, **options)
        torchs = evaluate(F.mse_loss, one, other, **options)
        exact = evaluate(reference.mse_loss, one, other, convert=exactly, **options)
        assert_as_accurate(got.value, torchs.value, exact.value)
        for gradients in zip(got.gradients, torchs.gradients, exact.gradients, strict=True):
            assert_as_accurate(*gradients)


@BROADCAST
@DIFFERENTIATED
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64], ids=["float64", "int64"])
def test_a_scalar_target_promotes_as_in_torch(dtype: torch.dtype, reduction: str) -> None:
    input, _ = pair((3, 5))
    target = torch.tensor(2, dtype=dtype)
    assert_matches_torch(mse_loss, F.mse_loss, input, target, reduction=reduction)


@pytest.mark.parametrize("weight_dtype", [torch.int64, torch.bool], ids=["int64", "bool"])
def test_integers_with_a_weight(weight_dtype: torch.dtype, reduction: str) -> None:
    input, target = torch.randint(9, (3, 5)), torch.randint(9, (3, 5))
    weight = torch.randint(1, 3, (3, 5)).to(weight_dtype)
    assert_matches_torch(mse_loss, F.mse_loss, input, target, weight=weight, reduction=reduction)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("size", [6, 6 * 7, 6 * 50])
def test_special_values_come_out_as_torchs(dtype: torch.dtype, size: int, reduction: str) -> None:
    special = torch.tensor([1.0, NAN, INF, -INF, -0.0, 3e38]).to(dtype)
    input = special.repeat(size // 6).requires_grad_()
    target = special.repeat_interleave(size // 6).requires_grad_()
    assert_matches_torch(mse_loss, F.mse_loss, input, target, reduction=reduction)


@pytest.mark.parametrize("value", [0.0, -1.0, NAN, INF], ids=str)
def test_unusual_weights(value: float, reduction: str) -> None:
    input, target = pair((3, 5))
    weight = torch.ones(3, 5)
    weight[1, 2:] = value
    assert_matches_torch(mse_loss, F.mse_loss, input, target, weight=weight, reduction=reduction)
    weight[:] = value
    assert_matches_torch(mse_loss, F.mse_loss, input, target, weight=weight, reduction=reduction)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0, 2)], ids=str)
def test_no_elements(shape: tuple[int, ...], reduction: str) -> None:
    input, target = pair(shape)
    for weight in (None, torch.rand(shape)):
        assert_matches_torch(
            mse_loss, F.mse_loss, input, target, weight=weight, reduction=reduction
        )


def test_the_same_tensor_as_input_and_target(reduction: str) -> None:
    x = torch.randn(3, 5, requires_grad=True)
    loss = mse_loss(x, x, reduction=reduction).sum()
    loss.backward()
    assert loss.item() == 0.0
    assert x.grad is not None
    assert torch.equal(x.grad, torch.zeros(3, 5))


LEGACY = [(a, b) for a in (None, True, False) for b in (None, True, False) if (a, b) != (None,) * 2]


@pytest.mark.parametrize(("size_average", "reduce"), LEGACY)
def test_size_average_and_reduce_warn_and_work(
    size_average: bool | None, reduce: bool | None
) -> None:
    input, target = pair((4, 5))
    options: dict[str, Any] = {"size_average": size_average, "reduce": reduce}
    with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
        got = mse_loss(input, target, **options)
    with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
        torch.testing.assert_close(got, F.mse_loss(input, target, **options))


def test_the_arguments_by_position() -> None:
    input, target = pair((6, 5))
    weight = torch.rand(6, 5)
    assert_matches_torch(mse_loss, F.mse_loss, input, target, None, None, "sum", weight)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_autocast_gives_torchs_dtypes(
    autocast: torch.dtype, dtype: torch.dtype, weighted: bool, reduction: str
) -> None:
    input, target = pair((4, 5), dtype)
    weight = torch.rand(4, 5).to(dtype) if weighted else None
    options = {"weight": weight, "reduction": reduction}
    with torch.autocast("cpu", dtype=autocast):
        got = evaluate(mse_loss, input, target, **options)
        expected = evaluate(F.mse_loss, input, target, **options)
    assert got.value.dtype == expected.value.dtype
    exact = evaluate(reference.mse_loss, input, target, convert=exactly, **options)
    tolerance = {"rtol": 2 * torch.finfo(got.value.dtype).eps, "atol": 1e-6}
    torch.testing.assert_close(got.value, exact.value.to(got.value.dtype), **tolerance)
    for gradient, exact_gradient in zip(got.gradients, exact.gradients, strict=True):
        assert gradient.dtype == dtype
        tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6}
        torch.testing.assert_close(gradient, exact_gradient.to(dtype), **tolerance)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_result_dtypes_are_torchs(device: str, autocast: bool, reduction: str) -> None:
    """Those of fake tensors, which need no device."""
    before = torch.is_autocast_enabled(device)
    torch.set_autocast_enabled(device, autocast)
    try:
        for dtypes in product(FLOATS, FLOATS, (None, *FLOATS)):
            with FakeTensorMode():
                given = [
                    dtype and torch.empty(2, 3, dtype=dtype, device=device) for dtype in dtypes
                ]
                expected = F.mse_loss(*given[:2], reduction=reduction, weight=given[2]).dtype
            assert result_dtype(*dtypes, torch.device(device)) is expected, dtypes
    finally:
        torch.set_autocast_enabled(device, before)


@pytest.mark.thresholds
@pytest.mark.parametrize("shape", [(), (1,), (100,), (5000,), (300, 500)], ids=str)
def test_where_small_inputs_may_go_to_torch(shape: tuple[int, ...], reduction: str) -> None:
    input, target = pair(shape)
    assert_matches_torch(mse_loss, F.mse_loss, input, target, reduction=reduction)
