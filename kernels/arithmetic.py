"""What the kernels of all families share: exponentials, logarithms, operands read by strides.

What is rounded to half precision does without the last digits of float32: it is not EXACT.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


@triton.jit
def exp_nonpositive(x, EXACT: tl.constexpr = True):
    """exp(x) for x <= 89 to 2 ULP in float32, where exp2 alone would be x * 2**-24 off."""
    if x.dtype == tl.float64:
        power = tl.exp(x)
    elif EXACT:
        x = tl.where(x < -150.0, -150.0, x)  # exp(-150) is 0; NaN passes
        high = x * 1.4426950408889634
        # What the product was rounded by, and the digits of log2(e) that float32 has no room for.
        low = tl.fma(x, 1.4426950408889634, -high) + x * 1.9259629911266175e-08
        power = tl.exp2(high) * (1.0 + low * 0.6931471805599453)
    else:
        power = tl.exp2(x * 1.4426950408889634)
    return power


@triton.jit
def exp(x):
    """exp(x) to 2 ULP in float32."""
    if x.dtype != tl.float64:
        x = tl.where(x > 89.0, 89.0, x)
    return exp_nonpositive(x)


@triton.jit
def reciprocal(x, EXACT: tl.constexpr = True):
    """1 / x to 1 ULP in float32, for 2**-100 <= x <= 2**100: half of what a division takes."""
    if x.dtype == tl.float64:
        y = 1.0 / x
    else:
        root = tl.rsqrt(x)
        y = root * root
        if EXACT:
            y = tl.fma(y, tl.fma(-x, y, 1.0), y)
    return y


@triton.jit
def polynomial(x, coefficients: tl.constexpr):
    """Those of the highest power first."""
    value = tl.full([], coefficients[0], x.dtype)
    for k in tl.static_range(1, len(coefficients)):
        value = value * x + coefficients[k]
    return value


@triton.jit
def tanh(x, EXACT: tl.constexpr = True):
    """Of small |x| by an odd polynomial, else 1 - 2 / (1 + exp(2 |x|)); to 2 ULP in float32."""
    size = tl.abs(x)
    if x.dtype == tl.float64:
        y = -2.0 * size
        series = tl.full([], 1.0, x.dtype)
        for k in tl.static_range(18, 1, -1):
            series = 1.0 + series * y * (1.0 / k)
        m = tl.where(y > -0.7, y * series, tl.exp(y) - 1.0)
        size = -m / (2.0 + m)
    else:
        z = x * x
        small = polynomial(
            z,
            (
                -0.005717049818485975,
                0.02065059170126915,
                -0.053743500262498856,
                0.13331490755081177,
                -0.3333328366279602,
            ),
        )
        e = exp_nonpositive(-2.0 * size, EXACT)
        large = 1.0 - 2.0 * e * reciprocal(1.0 + e, EXACT)
        size = tl.where(size < 0.625, size + size * z * small, large)
    return tl.where(x == 0.0, x, tl.where(x < 0.0, -size, size))  # -0.0 stays what it is


@triton.jit
def _exponent(u):
    """k of u = m 2**k, 2/3 <= m < 4/3, 23 bits up: where a float32 has it."""
    return (u.to(tl.int32, bitcast=True) - 0x3F2AAAAB) & -0x800000


@triton.jit
def _log_of(u, f, k):
    """log(u) where u = (1 + f) 2**k and f is exact, k 23 bits up; infinite of 0, NaN below it."""
    rest = polynomial(
        f,
        (
            -0.1331174373626709,
            0.14006227254867554,
            -0.12078148871660233,
            0.14000825583934784,
            -0.1668950319290161,
            0.20010770857334137,
            -0.24999506771564484,
            0.3333320915699005,
            -0.5,
        ),
    )
    log = k.to(tl.float32) * 8.262958294867817e-08 + (f * f * rest + f)  # log(2) / 2**23
    return tl.where((u > 0.0) & (u < float("inf")), log, u - tl.abs(tl.rsqrt(u)))


@triton.jit
def log(x):
    """To 1 ULP in float32, where a GPU's own may be 2**-22 off, however small the logarithm."""
    if x.dtype == tl.float64:
        log = tl.log(x)
    else:
        subnormal = x < 1.1754943508222875e-38
        u = tl.where(subnormal, x * 8388608.0, x)
        k = _exponent(u)
        f = (u.to(tl.int32, bitcast=True) - k).to(tl.float32, bitcast=True) - 1.0
        log = _log_of(u, f, k - tl.where(subnormal, 23 << 23, 0))
    return log


@triton.jit
def log_of_1_plus(x):
    """log(1 + x) for -1 <= x <= 1, however small: what 1 + x was rounded by is not lost."""
    u = 1.0 + x
    if x.dtype == tl.float64:
        log = tl.where(u > 0.0, tl.log(u) + (x - (u - 1.0)) / u, tl.log(u))
    else:
        k = _exponent(u)
        scale = (0x3F800000 - k).to(tl.float32, bitcast=True)  # 2**-k
        log = _log_of(u, x * scale + (scale - 1.0), k)
    return log


@triton.jit
def log1p(y):
    """log(1 + y) for 0 <= y <= 1, however small; to 2 ULP in float32."""
    if y.dtype == tl.float64:
        rounded = 1.0 + y
        log = tl.log(rounded) + (y - (rounded - 1.0)) / rounded
    else:
        rest = polynomial(
            y,
            (
                -0.0032440251670777798,
                0.01985146291553974,
                -0.05695953592658043,
                0.10603655129671097,
                -0.15305592119693756,
                0.1967593878507614,
                -0.24954134225845337,
                0.3332996368408203,
                -0.4999990165233612,
            ),
        )
        log = y * y * rest + y
    return log


@triton.jit
def sigmoid(x, EXACT: tl.constexpr = True):
    """1 / (1 + exp(-x)), without overflow."""
    z = exp_nonpositive(-tl.abs(x), EXACT)
    return tl.where(x < 0.0, z, 1.0) * reciprocal(1.0 + z, EXACT)


class Operand(NamedTuple):
    """A tensor seen as rows x columns; a stride of 0 makes one element stand for several."""

    data: Any
    row: int
    column: int


@triton.jit
def read(operand, i, columns, mask, A: tl.constexpr):
    """Elements i in row-major order as A; columns is None where rows follow on one another."""
    if columns is None:
        offsets = i * operand.column
    else:
        offsets = (i // columns) * operand.row + (i % columns) * operand.column
    return tl.load(operand.data + offsets, mask=mask, other=0.0).to(A)


def reach(columns: int | None, operands: Any) -> list[int]:
    """How far the last element of each operand lies from its first, or a little further."""
    given = [operand for operand in operands if operand is not None]
    n = given[0][0].numel()
    if columns is None:
        return [n, *(n * column for _, _, column in given)]
    return [n, *(n // columns * row + columns * column for _, row, column in given)]
