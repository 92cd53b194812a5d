"""Sums over a whole tensor, in float64 and in a fixed order, and a multiplication in place.

    sum      out = sum_i parts_i                                            reads 8 bytes a part
    count    out = sum_i [t_i counts] weight[t_i] token_weight_i            reads 8 bytes a target
    scale    x *= factor                                reads and writes x; nothing if factor is 1

A loss with a reduction takes two launches: each program of its kernel stores one partial sum, and
one program of `sum_kernel` adds them up. The order never changes, so neither do the bits.

torch: parts.sum(), weight[t[(t != ignore_index) & (0 <= t) & (t < classes)]].sum(), x.mul_(factor)
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import read_target


@triton.jit(do_not_specialize=["n"])
def sum_kernel(parts, out, n, BLOCK: tl.constexpr):
    """out[k] = the sum of the k-th of as many contiguous shares as there are programs."""
    share = tl.cdiv(n, tl.num_programs(0))
    first = tl.program_id(0).to(tl.int64) * share
    last = tl.minimum(first + share, n)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(first, last, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(parts + i, mask=i < last, other=0.0).to(tl.float64)
    tl.store(out + tl.program_id(0), tl.sum(total))


@triton.jit
def target_weights(target, weight, token_weight, i, n, ignore_index, classes):
    """Returns what targets i add to the denominator of a mean: 0 if ignored or invalid."""
    _, valid, _, counted = read_target(target, weight, i, i < n, classes, ignore_index)
    counted = counted.to(tl.float64)
    if token_weight is not None:
        counted *= tl.load(token_weight + i, mask=valid, other=0.0).to(tl.float64)
    return counted


@triton.jit(do_not_specialize=["ignore_index", "classes"])
def count_kernel(
    target, weight, token_weight, parts, n, ignore_index, classes, BLOCK: tl.constexpr
):
    """parts[k] = the weight of program k's targets, for the denominator of a mean."""
    total = tl.zeros([BLOCK], tl.float64)
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, step):
        i = start + tl.arange(0, BLOCK)
        total += target_weights(target, weight, token_weight, i, n, ignore_index, classes)
    tl.store(parts + tl.program_id(0), tl.sum(total))


@triton.jit
def scale_kernel(x, factor, n, BLOCK: tl.constexpr):
    """x *= factor, computed in float32, or in float64 for float64."""
    factor = tl.load(factor).to(tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32)
    if factor != 1.0:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, step):
            i = start + tl.arange(0, BLOCK)
            scaled = tl.load(x + i, mask=i < n).to(factor.dtype) * factor
            tl.store(x + i, scaled, mask=i < n)
