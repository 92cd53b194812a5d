"""What the kernels of all families share: exponentials, reading operands, sums in a fixed order."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import launch


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


@triton.jit
def sum_kernel(parts, out, denominator, scale: tl.float64, length, n, BLOCK: tl.constexpr):
    """out[k] = scale / denominator * sum(parts[k * length : (k + 1) * length]), in float64."""
    first = tl.program_id(0).to(tl.int64) * length
    last = tl.minimum(first + length, n)
    lanes = tl.zeros([BLOCK], tl.float64)
    for start in range(first, last, BLOCK):
        i = start + tl.arange(0, BLOCK)
        lanes += tl.load(parts + i, mask=i < last, other=0.0).to(tl.float64)
    total = tl.sum(lanes) * tl.full([], scale, tl.float64)
    if denominator is not None:
        total /= tl.load(denominator)
    tl.store(out + tl.program_id(0), total)


def sum_parts(
    parts: torch.Tensor,
    out: torch.Tensor,
    denominator: torch.Tensor | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """Adds up as many parts for each element of out, in the same order in every run."""
    n, block = parts.numel(), launch.SUM.block
    options = launch.options(launch.SUM.threads)
    while out.numel() == 1 and n > block:
        sums = parts.new_empty(triton.cdiv(n, block), dtype=torch.float64)
        sum_kernel[(sums.numel(),)](parts, sums, None, 1.0, block, n, BLOCK=block, **options)
        parts, n = sums, sums.numel()
    length = n // out.numel()
    sum_kernel[(out.numel(),)](parts, out, denominator, scale, length, n, BLOCK=block, **options)
    return out
