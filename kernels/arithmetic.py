"""What the kernels of all families share: exponentials, logarithms, operands read by strides."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


@triton.jit
def exp_nonpositive(x):
    """exp(x) for x <= 0 to 2 ULP in float32, where exp2 alone would be x * 2**-24 off."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    x = tl.where(x < -150.0, -150.0, x)  # exp(-150) is 0; NaN passes
    high = x * 1.4426950408889634
    # What the product was rounded by, and the digits of log2(e) that float32 has no room for.
    low = tl.fma(x, 1.4426950408889634, -high) + x * 1.9259629911266175e-08
    return tl.exp2(high) * (1.0 + low * 0.6931471805599453)


@triton.jit
def exp(x):
    """exp(x) to 2 ULP in float32: the smaller of two powers whose quotient or product it is."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    small = exp_nonpositive(tl.where(x < 0.0, x, -x))
    return tl.where(x > 87.0, tl.exp(x), tl.where(x > 0.0, 1.0 / small, small))


@triton.jit
def tanh(x):
    """tanh(|x|) = -m / (2 + m), m = exp(-2 |x|) - 1: of small |x| by its series."""
    y = -2.0 * tl.abs(x)
    terms: tl.constexpr = 18 if x.dtype == tl.float64 else 9
    series = tl.full([], 1.0, x.dtype)
    for k in tl.static_range(terms, 1, -1):
        series = 1.0 + series * y * (1.0 / k)
    m = tl.where(y > -0.7, y * series, exp_nonpositive(y) - 1.0)
    size = -m / (2.0 + m)
    return tl.where(x == 0.0, x, tl.where(x < 0.0, -size, size))  # -0.0 stays what it is


@triton.jit
def log_of_1_plus(x):
    """log(1 + x): what 1 + x was rounded by is put right."""
    u = 1.0 + x
    return tl.where(u > 0.0, log(u) + (x - (u - 1.0)) / u, log(u))


@triton.jit
def _twice_atanh(s):
    """For |s| <= 1/3, to float32's precision: the series up to s**15."""
    z = s * s
    series = 1.0 / 13 + z * (1.0 / 15)
    series = 1.0 / 7 + z * (1.0 / 9 + z * (1.0 / 11 + z * series))
    return 2.0 * (s + s * z * (1.0 / 3 + z * (1.0 / 5 + z * series)))


@triton.jit
def log1p(y):
    """log(1 + y) for 0 <= y <= 1, however small."""
    if y.dtype == tl.float64:
        rounded = 1.0 + y
        return tl.log(rounded) + (y - (rounded - 1.0)) / rounded
    return _twice_atanh(y / (2.0 + y))


@triton.jit
def log(x):
    """Around 1, too, where a GPU's own in float32 is 2**-22 off, however small the logarithm."""
    if x.dtype == tl.float64:
        return tl.log(x)
    return tl.where((x > 0.5) & (x < 2.0), _twice_atanh((x - 1.0) / (x + 1.0)), tl.log(x))


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), without overflow."""
    z = exp_nonpositive(-tl.abs(x))
    return tl.where(x < 0.0, z, 1.0) / (1.0 + z)


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
