"""The negative log-likelihood of class indices, of log-probabilities x.

    loss = -weight_t x_t        dloss/dx_c = -weight_t [c = t]

Shapes: as in `tiles.py`. Bytes: one element of a position is read; the gradient is cleared, and one
element of a position is written.

A class index that is neither in [0, C) nor ignored gives a loss of NaN and a gradient of zero.

torch: F.nll_loss(x, target, weight, ignore_index=..., reduction=...)
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from . import launch
from .sums import add_up, count, total
from .tiles import Viewed, viewed


@triton.jit
def nll_kernel(
    x,
    target,
    weight,
    upstream,
    upstream_step,
    denominator,
    each,
    total,
    gradient,
    n,
    inner,
    classes,
    ignore_index,
    A: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Losses, one a position or their total; gradients of targets that count."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    hit = tl.load(target + i, mask=mask, other=0)
    counts = mask & (hit != ignore_index)
    live = counts & (hit >= 0) & (hit < classes)
    factor = tl.zeros([BLOCK], A) - 1.0
    if weight is not None:
        factor *= tl.load(weight + hit, mask=live, other=0.0)
    if each is not None or total is not None:
        at = x.data + (i // inner) * x.outer + (i % inner) * x.inner + hit * x.classes
        value = factor * tl.load(at, mask=live, other=0.0).to(A)
        value = tl.where(live, value, tl.where(counts, float("nan"), 0.0))
        if each is not None:
            tl.store(each + i, value, mask=mask)
        else:
            add_up(total, tl.program_id(0), tl.sum(value), 1.0, denominator)
    if gradient is not None:
        if denominator is not None:
            factor /= tl.load(denominator).to(A)
        if upstream is not None:
            factor *= tl.load(upstream + i * upstream_step, mask=mask, other=0.0)
        at = gradient.data + (i // inner) * gradient.outer + (i % inner) * gradient.inner
        tl.store(at + hit * gradient.classes, factor, mask=live)


def nll_loss(
    sizes: tuple[int, int, int],
    input: Viewed,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    options: Any,
    upstream: torch.Tensor | None,
    loss: torch.Tensor | None,
    grad_input: Viewed | None,
) -> None:
    """Computes the outputs that are not None."""
    outer, inner, classes = sizes
    n, each, mean = outer * inner, options.reduction == "none", options.reduction == "mean"
    denominator = count(target, weight, None, options.ignore_index, classes) if mean else None
    programs = launch.cdiv(n, launch.COUNT.block)
    if grad_input is not None:
        grad_input[0].zero_()
    nll_kernel[(programs,)](
        viewed(input),
        target,
        weight,
        upstream,
        int(each),
        denominator,
        loss if each else None,
        None if each or loss is None else total(loss, programs),
        viewed(grad_input),
        n,
        inner,
        classes,
        options.ignore_index,
        A=launch.accumulate_type(input[0].dtype),
        BLOCK=launch.COUNT.block,
        **launch.options(launch.COUNT.threads),
    )
