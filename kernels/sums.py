"""Sums on the device in a fixed order: of parts of a loss, and of the targets that count.

Each program adds up its own elements in float64, and a last one what the others found. Triton
compiles anew for numbers of 1 and for multiples of 16, unless told that nothing is gained by it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import launch


@triton.jit(do_not_specialize=["length", "n"])
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


@triton.jit(do_not_specialize=["blocks", "ignore_index", "classes"])
def count_kernel(
    target, weight, token_weight, out, n, blocks, ignore_index, classes, BLOCK: tl.constexpr
):
    """The weight of the targets that count, blocks of them by turns: what a mean divides by."""
    lanes = tl.zeros([BLOCK], tl.float64)
    for block in range(tl.program_id(0).to(tl.int64), blocks, tl.num_programs(0)):
        i = block * BLOCK + tl.arange(0, BLOCK)
        hit = tl.load(target + i, mask=i < n, other=-1)
        live = (i < n) & (hit != ignore_index) & (hit >= 0) & (hit < classes)
        counts = tl.where(live, 1.0, 0.0).to(tl.float64)
        if weight is not None:
            counts *= tl.load(weight + hit, mask=live, other=0.0).to(tl.float64)
        if token_weight is not None:
            counts *= tl.load(token_weight + i, mask=live, other=0.0).to(tl.float64)
        lanes += counts
    tl.store(out + tl.program_id(0), tl.sum(lanes))


def count(
    target: torch.Tensor,
    weight: torch.Tensor | None,
    token_weight: torch.Tensor | None,
    ignore_index: int,
    classes: int,
) -> torch.Tensor:
    """The denominator of a mean, on the device: one float64."""
    n = target.numel()
    blocks = triton.cdiv(n, launch.COUNT.block)
    parts = target.new_empty(min(blocks, launch.MOST_COUNTERS), dtype=torch.float64)
    count_kernel[(parts.numel(),)](
        target,
        weight,
        token_weight,
        parts,
        n,
        blocks,
        ignore_index,
        classes,
        BLOCK=launch.COUNT.block,
        **launch.options(launch.COUNT.threads),
    )
    return parts if parts.numel() == 1 else sum_parts(parts, parts.new_empty(()))
