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
