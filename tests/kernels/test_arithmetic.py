"""Elementary functions and sums of the Triton kernels, compared with float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compare import DEVICE
from conftest import backend
from torch import Tensor

from pyfused.backends import cpu

if backend is cpu:
    pytest.skip("tests the Triton kernels", allow_module_level=True)

import interpreter
import triton
import triton.language as tl
from triton._C.libtriton import interpreter as operations
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from pyfused import functional as fused
from pyfused.kernels import arithmetic
from pyfused.kernels.program import formula_of
from pyfused.ops.elementwise import kernels
from pyfused.types import CrossEntropyOptions

BLOCK = 1 << 15


@pytest.fixture(autouse=True)
def fma_rounds_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds fma once, as a GPU does; interpreters before Triton 3.9 also round the product."""

    def fma(self: Any, x: Any, y: Any, z: Any) -> TensorHandle:
        exact = x.data.astype(np.float64) * y.data + z.data
        return TensorHandle(exact.astype(x.data.dtype), x.dtype)

    if interpreter.ON and not hasattr(operations, "fma_fp32"):
        monkeypatch.setattr(InterpreterBuilder, "create_fma", fma)


@triton.jit
def arithmetic_kernel(x, out, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, FUNCTION(tl.load(x + i)))


@triton.jit
def inexact_kernel(x, out, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, FUNCTION(tl.load(x + i), EXACT=False))


@triton.jit
def formula_kernel(x, grad_output, out, FORMULA: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    p, scale = tl.full([], 30.0, tl.float64), tl.full([], 1.0, tl.float32)
    first, second = tl.load(x + i).to(tl.float32), None
    if grad_output is not None:
        first, second = tl.load(grad_output + i).to(tl.float32), first
    value, _, _, _, _ = FORMULA(first, second, None, None, (p, p, p), None, scale, False)
    tl.store(out + i, value)


@triton.jit
def log_float64(x):
    return arithmetic.log(x, tl.float64)


def of(function: Any, x: Tensor, dtype: Any = None, kernel: Any = arithmetic_kernel) -> Tensor:
    out = torch.empty_like(x, dtype=dtype)
    kernel[(x.numel() // BLOCK,)](x, out, FUNCTION=function, BLOCK=BLOCK)
    return out


def ulps(got: Tensor, exact: Tensor, dtype: torch.dtype = torch.float32) -> float:
    """Returns the largest error in units in the last place of a dtype."""
    info = torch.finfo(dtype)
    unit = exact.abs().clamp(min=info.smallest_normal).log2().floor().exp2() * info.eps
    there = exact.abs() <= info.max
    return ((got.double() - exact).abs() / unit)[there].max().item()


def uniform(low: float, high: float) -> Tensor:
    return torch.rand(BLOCK, dtype=torch.float64).mul(high - low).add(low).float()


def sizes(low: float, high: float) -> Tensor:
    """Returns log-uniform magnitudes."""
    return uniform(math.log(low), math.log(high)).exp()


Function = Callable[[Tensor], Tensor]
# Function, torch's function, inputs, and the limit in ULP; a GPU's exp2 has up to 2 ULP itself.
CASES: dict[str, tuple[Any, Function, Function, float]] = {
    "exp": (arithmetic.exp, torch.exp, lambda: uniform(-44, 88.7), 4),
    "exp of large negative numbers": (arithmetic.exp, torch.exp, lambda: uniform(-87, -44), 8),
    "exp near 0": (arithmetic.exp, torch.exp, lambda: uniform(-1, 1), 3),
    "log": (arithmetic.log, torch.log, lambda: sizes(1e-38, 1e38), 1.5),
    "log near 1": (arithmetic.log, torch.log, lambda: uniform(0.5, 2), 1.5),
    "log next to 1": (arithmetic.log, torch.log, lambda: 1 + uniform(-1e-5, 1e-5), 1.5),
    "log of subnormal": (arithmetic.log, torch.log, lambda: sizes(1e-44, 1e-38), 1.5),
    "log1p": (arithmetic.log1p, torch.log1p, lambda: uniform(-1, 1), 2),
    "log1p of large numbers": (arithmetic.log1p, torch.log1p, lambda: sizes(1, 1e38), 2),
    "log1p near 0": (arithmetic.log1p, torch.log1p, lambda: sizes(1e-30, 1), 2),
    "log1p near -0": (arithmetic.log1p, torch.log1p, lambda: -sizes(1e-30, 1), 2),
    "softplus": (arithmetic.softplus_nonpositive, F.softplus, lambda: uniform(-80, 0), 8),
    "softplus near 0": (arithmetic.softplus_nonpositive, F.softplus, lambda: uniform(-1, 0), 3),
    "reciprocal": (arithmetic.reciprocal, torch.reciprocal, lambda: sizes(1e-30, 1e30), 1),
    "tanh": (arithmetic.tanh, torch.tanh, lambda: uniform(-10, 10), 3),
    "tanh near 0": (arithmetic.tanh, torch.tanh, lambda: sizes(1e-30, 1), 3),
}


@pytest.mark.parametrize(("function", "of_torch", "numbers", "most"), CASES.values(), ids=CASES)
def test_float32(function: Any, of_torch: Function, numbers: Any, most: float) -> None:
    x = numbers()
    assert ulps(of(function, x), of_torch(x.double())) <= most


@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if not name.startswith(("reciprocal", "tanh"))]
)
def test_functions_for_half_precision(name: str) -> None:
    function, of_torch, numbers, _ = CASES[name]
    x = numbers()
    got = of(function, x, kernel=inexact_kernel)
    torch.testing.assert_close(got.double(), of_torch(x.double()), rtol=2e-5, atol=2.0**-126)


def test_float64_logarithm_of_float32() -> None:
    x = sizes(1e-38, 1e38)
    got = of(log_float64, x, torch.float64)
    assert (got - x.double().log()).abs().max() <= 2**-24


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * torch.special.erfc(-x * math.sqrt(0.5))


def gelu_tanh(x: Tensor) -> Tensor:
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


IN_HALF: dict[str, Function] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softcap": lambda x: 30 * torch.tanh(x / 30),
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
}
half = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def every_number(dtype: torch.dtype) -> Tensor:
    """Returns all numbers of a dtype whose cubes are normal float32 numbers."""
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    return x.where((x.double().abs() < 1e12) & (x.double().abs() > 1e-37), 0)


def of_formula(name: str, x: Tensor, grad_output: Tensor | None = None) -> Tensor:
    """Returns the unrounded result of a formula."""
    out = torch.empty_like(x, dtype=torch.float32)
    program = kernels()[name].programs[grad_output is not None]
    formula = program.kernel("triton", formula_of)
    formula_kernel[(x.numel() // BLOCK,)](x, grad_output, out, FORMULA=formula, BLOCK=BLOCK)
    return out


@half
@pytest.mark.parametrize("name", IN_HALF)
def test_every_number_of_half_precision(name: str, dtype: torch.dtype) -> None:
    """Checks that the error is at most 1/20 of the spacing of half-precision numbers."""
    x = every_number(dtype)
    got, exact = of_formula(name, x).double(), IN_HALF[name](x.double())
    if DEVICE != "cpu":  # a GPU's exp2 flushes subnormal results to zero
        got = got.where(exact.abs() > 1e-36, exact)
    assert ulps(got, exact, dtype) <= 0.05


@half
@pytest.mark.parametrize("name", ["softcap", "silu", "gelu", "gelu_tanh"])
def test_every_slope_of_half_precision(name: str, dtype: torch.dtype) -> None:
    """Checks derivatives in the same way, except where terms cancel and two errors add up."""
    x = every_number(dtype)
    leaf = x.double().requires_grad_()
    (exact,) = torch.autograd.grad(IN_HALF[name](leaf).sum(), leaf)
    got = of_formula(name, x, torch.ones_like(x))
    some = exact.abs() > 0.05
    assert ulps(got[some], exact[some], dtype) <= 0.1
    torch.testing.assert_close(got[~some].double(), exact[~some], rtol=0, atol=3e-6)


# ---- sums ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 5, 1025, 40_000, 400_000])
@pytest.mark.parametrize("weighted", range(4))
@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_count(n: int, weighted: int, ignore_index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ignored and out-of-range targets do not count."""
    target = torch.randint(-1, 9, (n,))
    target[::4] = -100
    weight = torch.rand(7) if weighted & 1 else None
    token_weight = torch.rand(n, dtype=torch.float64) if weighted & 2 else None
    monkeypatch.setattr(backend, "COUNTED_BY_PROGRAMS", 0)
    targets = target, weight, token_weight, ignore_index
    got = backend._divisor(CrossEntropyOptions(), target, n, targets, None, 7)
    valid = (target != ignore_index) & (target >= 0) & (target < 7)
    expected = valid.double()
    expected *= 1 if weight is None else weight[target.where(valid, 0)]
    expected *= 1 if token_weight is None else token_weight
    assert (got.dtype, got.shape) == (torch.float64, ())
    assert got.item() == pytest.approx(expected.sum().item(), rel=1e-12)


def test_the_last_program_to_arrive_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counters are 0 again afterwards. torch adds up the partial sums of many programs."""
    counters, sums = torch.zeros(99, dtype=torch.int32), list[int]()
    add_up = Tensor.sum
    monkeypatch.setattr(backend, "_counters", lambda _: counters)
    monkeypatch.setattr(backend, "MOST_PROGRAMS", 1000)
    monkeypatch.setattr(backend, "MOST_ARRIVALS", 600)
    monkeypatch.setattr(Tensor, "sum", lambda parts: sums.append(parts.numel()) or add_up(parts))
    for programs in (22, 2, 256, 1, 257, 10, 600, 601):  # of 32 elements, in groups of 256 programs
        x, target = torch.randn(2, 32 * programs - 5, dtype=torch.float64)
        got = fused.mse_loss(x, target)
        assert got.item() == pytest.approx((x - target).square().mean().item(), rel=1e-14)
        assert not counters.any()
    assert sums == [601]


@pytest.mark.parametrize("default", [True, False])
def test_default_streams_share_counters(default: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared counters would belong to the memory pool of a CUDA graph, or to several graphs."""
    monkeypatch.setattr(backend, "on_default_stream", lambda _: default)
    first, second = (backend._counters(torch.device("cpu")) for _ in range(2))
    assert (first.data_ptr() == second.data_ptr()) is default
    assert not first.any()
