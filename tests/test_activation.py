"""relu means what torch's means: NaN passed on, the gradient read from the output, in place too."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compare import FLOATS, assert_matches_torch, evaluate
from conftest import KernelCalls
from torch import Tensor

from pyfused.functional import relu

INF, NAN = float("inf"), float("nan")
SIZES = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1000, 4097]


def bits(x: Tensor) -> Tensor:
    """What tells -0.0 from 0.0 and one NaN from none."""
    return torch.stack([x.nan_to_num(nan=5.0).double(), x.signbit().double() * ~x.isnan()])


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradient_are_exactly_torchs(
    size: int, dtype: torch.dtype, kernel_calls: KernelCalls
) -> None:
    x = torch.randn(size).to(dtype).requires_grad_()
    got, expected = evaluate(relu, x), evaluate(F.relu, x)
    assert torch.equal(got.value, expected.value)
    assert torch.equal(got.gradients[0], expected.gradients[0])
    assert got.gradients[0].dtype == dtype
    assert kernel_calls["relu"] == kernel_calls["relu_backward"] == 1


@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("repeats", [1, 3, 20])
def test_nan_infinities_and_signed_zeros(dtype: torch.dtype, repeats: int, inplace: bool) -> None:
    special = torch.tensor([NAN, -NAN, INF, -INF, 0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, 1.0])
    x = special.to(dtype).repeat(repeats)
    expected = F.relu(x)
    assert torch.equal(bits(relu(x.clone(), inplace)), bits(expected))


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
def test_gradient_at_the_edges(dtype: torch.dtype) -> None:
    """Where the output is NaN the gradient passes, at zero it is 0 even for a NaN from above."""
    points = torch.tensor([NAN, -1.0, -0.0, 0.0, 1.0, INF, -INF, 1e-45]).to(dtype)
    upstreams = torch.tensor([2.0, NAN, INF, -0.0]).to(dtype)
    x = points.repeat_interleave(4).requires_grad_()
    upstream = upstreams.repeat(8)
    (got,) = torch.autograd.grad(relu(x), x, upstream)
    (expected,) = torch.autograd.grad(F.relu(x), x, upstream)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
def test_in_place_writes_into_its_argument(dtype: torch.dtype) -> None:
    x = torch.randn(100).to(dtype)
    expected, version = F.relu(x), x._version
    got = relu(x, inplace=True)
    assert got is x
    assert torch.equal(x, expected)
    assert x._version > version


def test_in_place_within_a_graph(kernel_calls: KernelCalls) -> None:
    x = torch.randn(100, requires_grad=True)
    hidden = x * 2
    y = relu(hidden, inplace=True)
    assert y is hidden
    assert not y.is_leaf
    upstream = torch.randn(100)
    (got,) = torch.autograd.grad(y, x, upstream)
    (expected,) = torch.autograd.grad(F.relu(x * 2), x, upstream)
    assert torch.equal(got, expected)
    assert kernel_calls["relu"] == 1


def test_in_place_on_a_view_reaches_its_base() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    base = x * 1
    relu(base[:, 1:3], inplace=True)
    expected = x * 1
    F.relu(expected[:, 1:3], inplace=True)
    assert torch.equal(base, expected)
    upstream = torch.randn(4, 6)
    assert torch.equal(
        torch.autograd.grad(base, x, upstream)[0], torch.autograd.grad(expected, x, upstream)[0]
    )


def test_in_place_over_what_another_backward_needs_is_torchs_error() -> None:
    x = torch.randn(10, requires_grad=True)
    needed = x.exp()
    y = needed * 2
    relu(needed, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_in_place_on_strided_memory_leaves_the_gaps_alone() -> None:
    memory = torch.randn(8, 10)
    before = memory.clone()
    view = memory[1::2, ::3]
    assert relu(view, inplace=True) is view
    assert torch.equal(memory[1::2, ::3], F.relu(before[1::2, ::3]))
    memory[1::2, ::3] = before[1::2, ::3]
    assert torch.equal(memory, before)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
def test_integers(dtype: torch.dtype, inplace: bool) -> None:
    x = torch.randint(-9 if dtype.is_signed else 0, 9, (50,)).to(dtype)
    expected = F.relu(x)
    got = relu(x, inplace)
    assert got.dtype == dtype
    assert torch.equal(got, expected)
    assert (got is x) == inplace


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
def test_scalars_and_nothing(shape: tuple[int, ...], inplace: bool) -> None:
    x = torch.randn(shape, requires_grad=True)
    assert_matches_torch(lambda x: relu(x * 1, inplace), lambda x: F.relu(x * 1, inplace), x)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
def test_autocast_changes_nothing(autocast: torch.dtype, dtype: torch.dtype) -> None:
    x = torch.randn(20).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=autocast):
        assert_matches_torch(relu, F.relu, x)


@pytest.mark.thresholds
@pytest.mark.parametrize("size", [0, 1, 10, 1000, 100_000])
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
def test_where_small_inputs_may_go_to_torch(size: int, inplace: bool) -> None:
    x = torch.randn(size, requires_grad=True)
    assert_matches_torch(lambda x: relu(x * 1, inplace), lambda x: F.relu(x * 1, inplace), x)
