"""The hinge of each class that comes within a margin of the target's, as in a multi-class SVM.

    z_c  = max(0, margin - x_t + x_c)
    loss = weight_t / C sum_{c != t} z_c^p,    p = 1 or 2
    dloss/dx_c = weight_t / C p z_c^(p - 1) [z_c > 0],    dloss/dx_t = -(the sum of these)

Shapes: x is (N, C). Bytes: x is read once and the gradient written once.

A class index that is not in [0, C) gives a loss of NaN and a gradient of zero.

torch: F.multi_margin_loss(x, target, p=..., margin=..., weight=..., reduction=...)
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from . import launch
from .sums import add_up, total
from .tiles import View, block_of, columns_of, layout, mask_of, memory_of, place, read, whole_row


@triton.jit
def multi_margin_kernel(
    x,
    target,
    weight,
    upstream,
    upstream_step,
    each,
    total,
    gradient,
    rows,
    classes,
    margin: tl.float64,
    scale: tl.float64,
    SQUARED: tl.constexpr,
    constants: tl.constexpr,
):
    at = block_of(x, rows, tl.program_id(0), constants)
    last = whole_row(at, classes, constants)
    hit = tl.load(target + at.inner + at.lanes, mask=at.present, other=-1)
    live = at.present & (hit >= 0) & (hit < classes)
    own = tl.load(x.data + (at.inner + at.lanes) * x.inner + hit * x.classes, mask=live, other=0.0)
    slack = tl.full([], margin, constants.A) - own.to(constants.A)
    share = tl.zeros_like(slack) + 1.0
    if weight is not None:
        share = tl.load(weight + hit, mask=live, other=0.0)
    share /= classes
    factor = share * tl.full([], scale, constants.A)
    if upstream is not None:
        factor *= tl.load(
            upstream + (at.inner + at.lanes) * upstream_step, mask=at.present, other=0.0
        )
    if SQUARED:
        factor *= 2.0
    losses = tl.zeros_like(slack)
    slopes = tl.zeros_like(slack)
    for start in range(0, last, constants.TILES * constants.CLASSES):
        for k in tl.static_range(constants.TILES):
            c = columns_of(start, k, constants)
            others = mask_of(at, at.present, start, k, last, constants) & (
                c[None, :] != at.shift + hit[:, None]
            )
            z = read(x, at, live, start, k, last, 0.0, constants).to(constants.A)
            z += slack[:, None]
            z = tl.where(others & live[:, None] & (z > 0.0), z, 0.0)  # NaN is nothing, as in torch
            if SQUARED:
                slope = z
                losses += tl.sum(z * z, 1)
            else:
                slope = tl.where(z > 0.0, 1.0, 0.0).to(constants.A)
                losses += tl.sum(z, 1)
            if gradient is not None:
                slopes += tl.sum(slope, 1)
                to = place(gradient, at, c, constants)
                tl.store(to, slope * factor[:, None], mask=others)
    if gradient is not None:
        to = gradient.data + (at.inner + at.lanes) * gradient.inner + hit * gradient.classes
        tl.store(to, -slopes * factor, mask=live)
    if each is not None or total is not None:
        value = tl.where(live, share * losses, tl.where(at.present, float("nan"), 0.0))
        if each is not None:
            tl.store(each + at.inner + at.lanes, value, mask=at.present)
        else:
            add_up(total, tl.program_id(0), tl.sum(value), scale, None)


def multi_margin_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    options: Any,
    upstream: torch.Tensor | None,
    loss: torch.Tensor | None,
    grad_input: torch.Tensor | None,
) -> None:
    """Computes the outputs that are not None, of a contiguous input."""
    rows, classes = input.shape
    each, scale = options.reduction == "none", 1.0
    if options.reduction == "mean":
        scale = 1.0 / rows
    x = View(input, rows * classes, classes, 1)
    constants, tile = layout((1, rows, classes), memory_of([x]), "dense")
    programs = launch.cdiv(rows, tile.positions)
    multi_margin_kernel[(programs,)](
        x,
        target,
        weight,
        upstream,
        int(each),
        loss if each else None,
        None if each or loss is None else total(loss, programs),
        None if grad_input is None else x._replace(data=grad_input),
        rows,
        classes,
        float(options.margin),
        scale,
        SQUARED=options.p == 2,
        constants=constants,
        **launch.options(tile.threads),
    )
