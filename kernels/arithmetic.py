"""What the kernels of all families share: exponentials, and operands read by strides."""

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
def log1p_unit(x):
    """log(1 + x) for x in [0, 1]: 2 artanh(s) with s = x / (2 + x), a series in s * s."""
    s = x / (2.0 + x)
    z = s * s
    p = tl.zeros_like(x)
    terms: tl.constexpr = 17 if x.dtype == tl.float64 else 8
    for k in tl.static_range(terms):
        p = p * z + 1.0 / (2 * (terms - k) + 1)
    return 2.0 * s + 2.0 * s * (z * p)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), of either sign."""
    u = exp_nonpositive(tl.where(x < 0.0, x, -x))
    large = 1.0 / (1.0 + u)
    return tl.where(x < 0.0, u * large, large)


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
