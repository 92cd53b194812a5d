"""Sums over a whole tensor, in float64 and in a fixed order, and a multiplication in place.

    sum      out = sum_i parts_i                                            reads 8 bytes a part
    count    out = sum_i [t_i counts] weight[t_i] token_weight_i            reads 8 bytes a target
    scale    x *= factor                                reads and writes x; nothing if factor is 1

Each program stores one partial sum. The last program to arrive adds them up in the order of the
programs, which never changes, so neither do the bits. In large calls `sum_kernel` does that, as the
programs would wait for the counter.

torch: parts.sum(), weight[t[(t != ignore_index) & (0 <= t) & (t < classes)]].sum(), x.mul_(factor)
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import read_target, row_scale


@triton.jit
def sum_of_parts(parts, first, last, BLOCK: tl.constexpr):
    """Returns the sum of parts[first:last]; L1 may hold what other programs have overwritten."""
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(first, last, BLOCK):
        i = start + tl.arange(0, BLOCK)
        part = tl.load(parts + i, mask=i < last, other=0.0, cache_modifier=".cg")
        total += part.to(tl.float64)
    return tl.sum(total)


@triton.jit(do_not_specialize=["n"])
def sum_kernel(parts, out, n, BLOCK: tl.constexpr):
    """out[k] = the sum of the k-th of as many contiguous shares as there are programs."""
    share = tl.cdiv(n, tl.num_programs(0))
    first = tl.program_id(0).to(tl.int64) * share
    total = sum_of_parts(parts, first, tl.minimum(first + share, n), BLOCK)
    tl.store(out + tl.program_id(0), total)


@triton.jit
def add_up(part, reduced):
    """Stores a program's part of a sum. The last program to arrive adds up the parts of all.

    reduced: The sum, the parts, and a counter that is 0 at the launch; without a counter no
        program adds up.
    """
    parts = reduced[1]
    tl.store(parts + tl.program_id(0), part)
    if len(reduced) > 2:
        programs = tl.num_programs(0)
        tl.debug_barrier()
        # It releases the part and acquires those of the programs before.
        if tl.atomic_add(reduced[2], 1, sem="acq_rel") == programs - 1:
            tl.store(reduced[0], sum_of_parts(parts, 0, programs, 1024))


@triton.jit
def store_loss(loss, value, scale, rows, in_bounds, valid, invalid, EACH: tl.constexpr):
    """Stores the loss of each row, or the part of a sum that `add_up` takes."""
    value = tl.where(valid, value, tl.where(invalid, float("nan"), 0.0)) * scale
    if EACH:
        tl.store(loss + rows, value, mask=in_bounds)
    else:
        add_up(tl.sum(tl.where(in_bounds, value, 0.0)), loss)


@triton.jit
def target_weights(target, weight, token_weight, i, n, ignore_index, classes):
    """Returns what targets i add to the denominator of a mean: 0 if ignored or invalid."""
    _, valid, _, counted = read_target(target, weight, i, i < n, classes, ignore_index)
    counted = counted.to(tl.float64)
    if token_weight is not None:
        counted *= tl.load(token_weight + i, mask=valid, other=0.0).to(tl.float64)
    return counted


@triton.jit
def read_rows(
    target,
    weight,
    row_weight,
    denominator,
    rows,
    in_bounds,
    inner,
    classes,
    ignore_index,
    A: tl.constexpr,
):
    """Returns what `read_target` and `row_scale` give for rows of class indices.

    The denominator may also be the class indices, whose weights each program then adds up itself:
    of few that takes less time than the launch of another kernel.
    """
    label, valid, invalid, target_weight = read_target(
        target, weight, rows, in_bounds, classes, ignore_index
    )
    if denominator is not None:
        if denominator.dtype.is_ptr() and denominator.dtype.element_ty == tl.int64:
            n = tl.num_programs(0) // tl.cdiv(inner, rows.shape[0]) * inner
            total = tl.zeros([1024], tl.float64)
            for start in range(0, n, 1024):
                i = start + tl.arange(0, 1024)
                total += target_weights(target, weight, row_weight, i, n, ignore_index, classes)
            denominator = tl.sum(total)
    scale = row_scale(row_weight, denominator, rows, valid | invalid, A)
    return label, valid, invalid, target_weight.to(A), scale


@triton.jit(do_not_specialize=["ignore_index", "classes"])
def count_kernel(
    target, weight, token_weight, counted, n, ignore_index, classes, BLOCK: tl.constexpr
):
    """Computes the weight of all targets, the denominator of a mean; `add_up` takes `counted`."""
    total = tl.zeros([BLOCK], tl.float64)
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, step):
        i = start + tl.arange(0, BLOCK)
        total += target_weights(target, weight, token_weight, i, n, ignore_index, classes)
    add_up(tl.sum(total), counted)


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
