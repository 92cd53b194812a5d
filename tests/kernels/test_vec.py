"""Accuracy of csrc/vec.h and exponentials.h on each instruction set."""

from __future__ import annotations

import ctypes
import os
import re
import runpy
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import grid
import mpmath
import numpy as np
import pytest
import torch
from setuptools import Distribution, Extension

from pyfused.backends import cpu

from distutils.core import run_setup  # isort: skip  # setuptools provides it for Python 3.12 and later

ROOT = Path(__file__).parents[2]
CHUNK = 1 << 20  # inputs per call
# The stride over float32 inputs; an odd one covers every pattern of the last bits.
STRIDE = 61 if grid.FULL else 3999
SIGN, INFINITY = 1 << 31, 0x7F80_0000  # bits of float32 numbers

Reference = Callable[[np.ndarray], np.ndarray]


class Vec:
    """tests/kernels/vec.cpp, compiled for one instruction set."""

    def __init__(self, path: str) -> None:
        self.library = ctypes.CDLL(path)

    def __call__(self, name: str, x: np.ndarray, to: type, piece: int | None = None) -> np.ndarray:
        """Evaluates ``name``, ``piece`` elements at a time, or all at once."""
        x, result = np.ascontiguousarray(x), np.empty(x.shape, to)
        addresses = (ctypes.c_void_p(array.ctypes.data) for array in (x, result))
        sizes = (ctypes.c_int64(size) for size in (x.size, piece or x.size))
        getattr(self.library, name)(*addresses, *sizes)
        return result


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Compiles like setup.py, with its compiler and flags."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        kernels: Distribution = run_setup("setup.py", stop_after="init")
        kernels.ext_modules = [
            Extension(
                module.name.rpartition(".")[2],
                ["tests/kernels/vec.cpp"],
                include_dirs=["csrc"],
                language="c++",
            )
            for module in kernels.ext_modules
        ]
        build = kernels.get_command_obj("build_ext")
        build.build_lib = build.build_temp = str(tmp_path_factory.mktemp("vec"))
        build.ensure_finalized()
        build.run()
    return {isa: build.get_ext_fullpath(f"_cpu_{isa.replace('-', '_')}") for isa in cpu.ISAS}


@pytest.fixture(params=cpu.supported)
def vec(request: pytest.FixtureRequest, paths: dict[str, str]) -> Vec:
    return Vec(paths[request.param])


def floats(bits: np.ndarray | list[int]) -> np.ndarray:
    return np.asarray(bits, np.uint32).view(np.float32)


# ---- exp and log ---------------------------------------------------------------------------------


class Row(NamedTuple):
    """The documented accuracy of a function: the largest error over all instruction sets."""

    name: str
    reference: Reference
    low: float
    high: float
    max_ulp: float
    growth: float = 0.0  # growth of the largest error with |x|
    least: float = 0.0  # errors of smaller results are in ULP of this number

    @property
    def dtype(self) -> type:
        return np.float32 if self.name.endswith("32") else np.float64

    def __str__(self) -> str:
        return self.name


def third_of_exp(x: np.ndarray) -> np.ndarray:
    return np.exp(x) * x.dtype.type(np.float32(1 / 3))


def softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(x.dtype.type(0), x)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def torch_sigmoid(x: np.ndarray, dtype: type) -> np.ndarray:
    """Returns the sigmoid, 0 where exp(-x) overflows in a dtype."""
    return np.where(x < -np.log(np.longdouble(np.finfo(dtype).max)), 0, sigmoid(x))


def rows(dtype: str, *given: tuple[Any, ...]) -> list[Row]:
    """Returns rows for the nonpositive and the nonnegative numbers of each range."""
    found = []
    for name, reference, low, high, *limits in given:
        parts = [(low, -0.0), (0.0, high)] if low < 0 < high else [(low, high)]
        found += [Row(f"{name}_{dtype}", reference, *part, *limits) for part in parts]
    return found


FLOAT32 = rows(
    "float32",
    ("exp", np.exp, -87.33, 7.0, 1.01),
    ("exponentials", np.exp, -87.33, -0.0, 1.9, 1 / 30),
    ("exponentials", np.exp, 0.0, 7.0, 2.0, 1 / 30),
    ("third_of_exponentials", third_of_exp, -85.0, -0.0, 3.2, 1 / 30),
    ("log_of", np.log, 2.0**-126, 2.0**127, 1.5),
    ("log1p_of", np.log1p, -1.0 + 2.0**-22, -(2.0**-126), 3.0),
    ("log1p_of", np.log1p, 0.0, 2.0**127, 3.0),
    ("exp_of", np.exp, -200.0, -0.0, 1.5),
    ("exp_of", np.exp, 0.0, 88.72, 1.01),
    ("softplus", softplus, -200.0, 100.0, 3.0),
    ("sigmoid", partial(torch_sigmoid, dtype=np.float32), -200.0, 100.0, 3.0),
    ("sigmoid_beside_softplus", sigmoid, -200.0, 100.0, 3.0),
    ("tanh_of", np.tanh, -100.0, 100.0, 3.0),
    ("expm1_of", np.expm1, -100.0, 88.72, 2.0, 0.0, 2.0**-126),
    ("sine", np.sin, 0.0, 8192.0, 2.5, 0.0, 2.0**-12),
    ("cosine", np.cos, -8192.0, -0.0, 2.5, 0.0, 2.0**-12),
    ("power", lambda x: x ** float(np.float32(0.7)), 2.0**-126, 2.0**127, 1.3),
    ("steep_power", lambda x: x ** float(np.float32(-12.3)), 1e-3, 1e5, 1.8),
)
FLOAT64 = rows(
    "float64",
    ("exp", np.exp, -708.0, 7.0, 1.0),
    ("log", np.log, 1.0, 2.0**60, 1.5, 0.0, 1.0),
    ("log_of", np.log, 2.0**-1022, 2.0**1023, 1.5),
    ("log1p_of", np.log1p, -1.0 + 2.0**-50, -(2.0**-1022), 3.0),
    ("log1p_of", np.log1p, 0.0, 2.0**1023, 3.0),
    ("exp_of", np.exp, -800.0, -0.0, 1.5),
    ("exp_of", np.exp, 0.0, 709.78, 1.0),
    ("softplus", softplus, -800.0, 800.0, 3.0),
    ("sigmoid", partial(torch_sigmoid, dtype=np.float64), -800.0, 800.0, 3.0),
    ("sigmoid_beside_softplus", sigmoid, -800.0, 800.0, 3.0),
    ("tanh_of", np.tanh, -100.0, 100.0, 3.0),
    ("expm1_of", np.expm1, -800.0, 709.78, 2.0, 0.0, 2.0**-1022),
    ("sine", np.sin, 0.0, 2.0**20, 2.5, 0.0, 2.0**-12),
    ("cosine", np.cos, -(2.0**20), -0.0, 2.5, 0.0, 2.0**-12),
)


def every_float32(row: Row, stride: int) -> Iterator[np.ndarray]:
    """Yields all float32 numbers in a range, or every stride-th, in chunks."""
    first, last = sorted(int(np.float32(end).view(np.uint32)) for end in (row.low, row.high))
    for chunk in range(first, last + 1, stride * CHUNK):
        stop = min(last + 1, chunk + stride * CHUNK)
        yield floats(np.arange(chunk, stop, stride, dtype=np.uint32))


def edges(row: Row) -> np.ndarray:
    """Returns numbers around exponents, steps of n in 2^n, and the ends of the range."""
    powers = np.exp2(np.arange(-1074.0, 61.0, 0.5))
    multiples = np.arange(2100.0) * np.log(2.0) / 2
    after_one = 1 + np.exp2(-np.arange(1.0, 53.0))
    magnitudes = np.concatenate([[row.low, row.high], powers, multiples, after_one])
    down, up = row.dtype(-np.inf), row.dtype(np.inf)
    x = np.copysign(magnitudes, row.low).astype(row.dtype)
    below, above = np.nextafter(x, down), np.nextafter(x, up)
    x = np.concatenate([x, below, above, np.nextafter(below, down), np.nextafter(above, up)])
    beyond = np.nextafter(row.dtype(row.low), down), np.nextafter(row.dtype(row.high), up)
    return x[(x >= beyond[0]) & (x <= beyond[1])]


def draws(row: Row) -> np.ndarray:
    """Draws float64 numbers, uniform and log-uniform."""
    random = np.random.default_rng(20)
    ends = np.maximum(np.abs([row.low, row.high]), 2.0**-60)
    magnitudes = np.exp2(random.uniform(*np.sort(np.log2(ends)), 500_000))
    evenly = random.uniform(row.low, row.high, 500_000)
    return np.concatenate([evenly, np.copysign(magnitudes, row.low)])


def ulps(x: np.ndarray, dtype: type) -> np.ndarray:
    """Returns the spacing of numbers in a dtype around each x."""
    spacing = np.ldexp(x.dtype.type(1), np.frexp(x)[1] - np.finfo(dtype).nmant - 1)
    return np.maximum(spacing, np.finfo(dtype).smallest_subnormal)


def largest_error(row: Row, vec: Vec, x: np.ndarray, piece: int | None = None) -> float:
    """Returns the largest error in ULP minus its growth; the reference is practically exact."""
    exact = row.reference(x.astype(np.float64 if row.dtype is np.float32 else np.longdouble))
    units = ulps(np.maximum(np.abs(exact), row.least), row.dtype)
    errors = np.abs(vec(row.name, x, row.dtype, piece) - exact) / units
    return float(np.max(errors - row.growth * np.abs(x)))


@pytest.mark.parametrize("row", FLOAT32 + FLOAT64, ids=str)
def test_error_within_the_range(row: Row, vec: Vec) -> None:
    if row in FLOAT64 and np.finfo(np.longdouble).nmant <= 52:
        pytest.skip("no reference: long double has the precision of double")
    chunks = every_float32(row, STRIDE) if row in FLOAT32 else [draws(row)]
    assert max(largest_error(row, vec, x) for x in chunks) <= row.max_ulp
    for piece in (None, 1):
        assert largest_error(row, vec, edges(row), piece) <= row.max_ulp


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["normal", "subnormal", "erf"])
def test_the_normal_distribution(name: str, dtype: type, vec: Vec) -> None:
    """The rounding error of x * x / 2 before the exponential grows with x, below -1."""
    low = -7 if name == "erf" else -15 if dtype is np.float32 else -39
    small = np.exp2(np.arange(-120.0, 0))
    x = np.concatenate([np.linspace(low, 9, 4001), np.linspace(-2, 2, 1001), -small, small])
    x, function = x.astype(dtype), mpmath.erf if name == "erf" else mpmath.ncdf
    with mpmath.workdps(30):
        exact = np.array([np.longdouble(mpmath.nstr(function(float(v)), 25)) for v in x])
    got = vec(f"{name}_{np.dtype(dtype)}", x, dtype)
    if name == "normal":  # 0 before products with gradients are subnormal
        exact[(exact < np.finfo(dtype).tiny * 2.0**19) & (got == 0)] = 0
    errors = np.abs(got - exact) / ulps(exact, dtype)
    grown = 0 if name == "erf" else np.where(x < -1, x.astype(float) ** 2 / 2, 0)
    assert np.max(errors - grown) <= (2.5 if name == "erf" else 5)
    edges = vec(f"{name}_{np.dtype(dtype)}", np.array([-np.inf, np.inf, np.nan], dtype), dtype)
    assert np.array_equal(edges, [-1 if name == "erf" else 0, 1, np.nan], equal_nan=True)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_log_of_special_and_subnormal_values(dtype: type, vec: Vec) -> None:
    name, info = f"log_of_{np.dtype(dtype).name}", np.finfo(dtype)
    special = np.array([0.0, -0.0, -1.0, -np.inf, np.nan, np.inf, 1.0] * 5, dtype)
    expected = np.array([-np.inf, -np.inf, np.nan, np.nan, np.nan, np.inf, 0.0] * 5, dtype)
    np.testing.assert_array_equal(vec(name, special, dtype), expected)
    subnormal = info.smallest_subnormal * np.arange(1, 5000, dtype=dtype)
    exact = np.log(subnormal.astype(np.longdouble))
    np.testing.assert_allclose(vec(name, subnormal, dtype), exact, 2e-7)


# ---- bfloat16 and float16 ------------------------------------------------------------------------

HALVES = np.arange(1 << 16, dtype=np.uint16)
WIDE = {
    half: torch.from_numpy(HALVES.view(np.int16)).view(getattr(torch, half)).float().numpy()
    for half in ("bfloat16", "float16")
}
INFINITE = {"bfloat16": 0x7F80, "float16": 0x7C00}
of_each_half = pytest.mark.parametrize("half", list(WIDE))
in_pieces = pytest.mark.parametrize("piece", [None, 1, 45], ids=["whole", "single", "some"])


@of_each_half
@in_pieces
def test_load_is_exact(half: str, piece: int | None, vec: Vec) -> None:
    got, expected = vec(f"load_{half}", HALVES, np.float32, piece), WIDE[half]
    nan = np.isnan(expected)
    assert np.isnan(got[nan]).all()
    assert np.array_equal(got[~nan].view(np.uint32), expected[~nan].view(np.uint32))


def roundable(half: str) -> Iterator[np.ndarray]:
    """Yields all numbers of a half precision, the midpoints and their neighbours, and others."""
    values = WIDE[half][: INFINITE[half]].astype(np.float64)
    values = np.append(values, 2 * values[-1] - values[-2])  # rounds to infinity
    middle = ((values[:-1] + values[1:]) / 2).astype(np.float32).view(np.uint32)
    exact = WIDE[half][: len(values)].view(np.uint32)
    dense = np.append(np.arange(0, INFINITY, 1009, dtype=np.uint32), np.uint32(INFINITY))
    magnitudes = np.concatenate([middle, middle - 1, middle + 1, exact, dense])
    yield floats(magnitudes)
    yield floats(magnitudes | SIGN)


@of_each_half
@in_pieces
def test_rounding_to_nearest(half: str, piece: int | None, vec: Vec) -> None:
    """Ties are rounded to even by a store, as by torch, and either way after scaling."""
    for x in roundable(half):
        rounded = torch.from_numpy(x).to(getattr(torch, half))
        expected = rounded.view(torch.int16).numpy().view(np.uint16)
        assert np.array_equal(vec(f"store_{half}", x, np.uint16, piece), expected)
        got = vec(f"scaled_{half}", x, np.uint16, piece)
        tie = got != expected
        errors = [np.abs(WIDE[half][y[tie]].astype(np.float64) - x[tie]) for y in (got, expected)]
        assert np.array_equal(*errors)
        assert np.array_equal(got >> 15, expected >> 15)


@of_each_half
@in_pieces
def test_nan_stays_nan(half: str, piece: int | None, vec: Vec) -> None:
    """NaN has any payload; truncating one in the low bits would give infinity."""
    got = vec(f"scaled_{half}", WIDE[half], np.uint16, piece)
    assert np.array_equal(np.isnan(WIDE[half][got]), np.isnan(WIDE[half]))
    assert np.isnan(WIDE[half][vec(f"times_nan_{half}", WIDE[half], np.uint16, piece)]).all()
    payloads = [1, 2, 0xFFF, 0x1000, 0xFFFF, 0x1_0000, 0x3F_FFFF, 0x40_0000, 0x7F_FFFF]
    x = floats([sign | INFINITY | payload for sign in (0, SIGN) for payload in payloads])
    assert np.isnan(WIDE[half][vec(f"store_{half}", x, np.uint16, piece)]).all()


# ---- vectorisation -------------------------------------------------------------------------------


@pytest.mark.large
def test_no_loop_calls_a_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop with a call is not vectorised, and takes 4 to 15 times as long."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    made = runpy.run_path(str(ROOT / "setup.py"))
    isa = next(iter(made["ISAS"].values()))
    compiler = [os.environ.get("CXX", "g++"), *f"{made['COMMON']['unix']} {isa['unix']}".split()]
    command = [compiler[0], "--version"]
    version = subprocess.run(command, capture_output=True, text=True, check=False)
    if "Free Software Foundation" not in version.stdout:
        pytest.skip("only GCC writes this report")
    report, out = tmp_path / "report", tmp_path / "out.o"
    more = [f"-fopt-info-vec-missed={report}", "-o", out]
    subprocess.run([*compiler, *more, "-c", ROOT / "csrc/pointwise_loss.cpp"], check=True)
    pattern = r"pointwise_loss.cpp:.*clobbers memory: .*operator\(\).*"
    assert re.findall(pattern, report.read_text()) == []
