"""Sums on the device in a fixed order: of parts of a loss, and of the targets that count.

The programs of a kernel add up what each of them has, without a launch of its own: the last of a
group to come adds up its group's parts, in float64, and the last of all groups their sums. Nothing
but the number of those that came is added atomically, so that the sum has the same order in every
run. Triton compiles anew for numbers of 1 and for multiples of 16, unless told that nothing is
gained by it.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import launch


class Total(NamedTuple):
    """Where the programs of a kernel add up."""

    out: Any  # of one element
    parts: Any  # one a program, and after them the sum of each group
    came: Any  # how many groups, and of each how many programs: 0 before and after
    GROUP: Any


@triton.jit
def add_up(total, program, part, scale, denominator):
    """out = scale / denominator * the sum of all programs' parts.

    A program's part is there before the program is counted, and is read past L1 after. Whoever is
    last leaves 0 behind, for the next kernel of the stream.
    """
    if total.came is None:  # one program
        finish(total, part, scale, denominator)
    else:
        tl.store(total.parts + program, part)
        sums = total.parts + tl.num_programs(0)
        group, groups = program // total.GROUP, (tl.num_programs(0) - 1) // total.GROUP + 1
        first = group * total.GROUP
        programs = tl.minimum(total.GROUP, tl.num_programs(0) - first)
        if tl.atomic_add(total.came + 1 + group, 1) == programs - 1:
            tl.store(total.came + 1 + group, 0)
            tl.store(sums + group, sum_of(total.parts + first, programs))
            if tl.atomic_add(total.came, 1) == groups - 1:
                tl.store(total.came, 0)
                finish(total, sum_of(sums, groups), scale, denominator)


@triton.jit
def finish(total, value, scale, denominator):
    value *= tl.full([], scale, tl.float64)
    if denominator is not None:
        value /= tl.load(denominator)
    tl.store(total.out, value)


@triton.jit
def sum_of(parts, n):
    """Of what other programs have written."""
    lanes = tl.zeros([128], tl.float64)
    for start in range(0, n, 128):
        i = start + tl.arange(0, 128)
        lanes += tl.load(parts + i, mask=i < n, other=0.0, cache_modifier=".cg").to(tl.float64)
    return tl.sum(lanes)


def total(out: torch.Tensor, programs: int) -> Total:
    """What that many programs need to add up their parts."""
    group = _constant(launch.GROUP)
    if programs == 1:
        return Total(out, None, None, group)
    groups = launch.cdiv(programs, launch.GROUP)
    parts = out.new_empty(programs + groups, dtype=torch.float64)
    return Total(out, parts, counters(out.device, groups + 1), group)


_constant = functools.cache(tl.constexpr)


def counters(device: torch.device, n: int) -> torch.Tensor:
    """n zeros, which kernels that follow on one another may share.

    Each stream has its own, as kernels of two may run together. A graph may run on any stream, and
    so has its own too, in its memory.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(n, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream
    return _counters(device, stream, launch.power_of_2(max(n, 1024)))


@functools.cache
def _counters(device: torch.device, _stream: int, n: int) -> torch.Tensor:
    return torch.zeros(n, dtype=torch.int32, device=device)


@triton.jit
def counting(target, weight, token_weight, i, n, ignore_index, classes):
    """What targets i count for in a mean."""
    hit = tl.load(target + i, mask=i < n, other=-1)
    live = (i < n) & (hit != ignore_index) & (hit >= 0) & (hit < classes)
    counts = tl.where(live, 1.0, 0.0).to(tl.float64)
    if weight is not None:
        counts *= tl.load(weight + hit, mask=live, other=0.0).to(tl.float64)
    if token_weight is not None:
        counts *= tl.load(token_weight + i, mask=live, other=0.0).to(tl.float64)
    return counts


@triton.jit(do_not_specialize=["blocks", "ignore_index", "classes"])
def count_kernel(
    target, weight, token_weight, total, n, blocks, ignore_index, classes, BLOCK: tl.constexpr
):
    """The weight of the targets that count, blocks of them by turns: what a mean divides by."""
    lanes = tl.zeros([BLOCK], tl.float64)
    for block in range(tl.program_id(0).to(tl.int64), blocks, tl.num_programs(0)):
        i = block * BLOCK + tl.arange(0, BLOCK)
        lanes += counting(target, weight, token_weight, i, n, ignore_index, classes)
    add_up(total, tl.program_id(0), tl.sum(lanes), 1.0, None)


def count(
    target: torch.Tensor,
    weight: torch.Tensor | None,
    token_weight: torch.Tensor | None,
    ignore_index: int,
    classes: int,
) -> torch.Tensor:
    """The denominator of a mean, on the device: one float64."""
    n, out = target.numel(), target.new_empty((), dtype=torch.float64)
    blocks = launch.cdiv(n, launch.COUNT.block)
    programs = min(blocks, launch.MOST_COUNTERS)
    count_kernel[(programs,)](
        target,
        weight,
        token_weight,
        total(out, programs),
        n,
        blocks,
        ignore_index,
        classes,
        BLOCK=launch.COUNT.block,
        **launch.options(launch.COUNT.threads),
    )
    return out
