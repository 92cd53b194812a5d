"""Multi-class and multi-label hinge losses, and their gradients.

    z_c  = max(0, margin - x_t + x_c)
    loss = weight_t / C sum_{c != t} z_c^p,    p = 1 or 2
    dloss/dx_c = weight_t / C p z_c^(p - 1) [z_c > 0],    dloss/dx_t = -(the sum of these)

With several targets t per row, terminated by -1, every class c that is not a target is compared
with every target:

    z_tc = max(0, 1 - x_t + x_c)
    loss = 1 / C sum_t sum_{c not in targets} z_tc
    dloss/dx_c = 1 / C sum_t [z_tc > 0],    dloss/dx_t = -1 / C sum_c [z_tc > 0]

Shapes: x is (n, C), contiguous; targets are (n), or contiguous (n, C). Bytes: x and the targets are
read once, the gradient is written once.

torch: F.multi_margin_loss(x, t, p=..., margin=..., weight=..., reduction=...)
       F.multilabel_margin_loss(x, t, reduction=...)
"""

from __future__ import annotations

import triton
import triton.language as tl

from .reductions import divided, gradient_scale, read_target, row_weight, store_loss
from .rows import (
    class_block,
    contiguous_rows,
    load_scaled,
    load_tile,
    pointers,
    row_block,
    scalar,
    store_rows,
)


@triton.jit(do_not_specialize=["denominator"])
def multi_margin_kernel(
    x,
    target,
    weight,
    denominator,
    grad_output,
    loss,
    grad,
    n,
    classes,
    margin: tl.float64,
    SQUARED: tl.constexpr,
    EACH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNITS: tl.constexpr,
):
    A: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    _, rows, in_bounds, _, classes = row_block(n, classes, ROWS, UNITS)
    label, valid, invalid, target_weight = read_target(target, weight, rows, in_bounds, classes, -1)
    invalid = in_bounds & (valid == 0)  # there is no ignore_index
    scale = divided(row_weight(None, rows, in_bounds, A), denominator)
    x_rows = contiguous_rows(x, rows, classes, UNITS)
    slack = scalar(margin, A) - load_scaled(x_rows[0] + label, valid, 0.0)
    share = target_weight.to(A) / classes
    factor = share * gradient_scale(scale, grad_output, rows, valid, EACH)
    factor = tl.where(valid, factor, 0.0) * (2.0 if SQUARED else 1.0)
    losses = tl.zeros([ROWS, BLOCK], A)
    slopes = tl.zeros([ROWS, BLOCK], A)
    for start in range(0, classes, BLOCK):
        c, mask = class_block(start, classes, in_bounds, BLOCK)
        z = load_tile(x_rows, c, mask & valid[:, None], -float("inf")) + slack[:, None]
        z = tl.where((z > 0.0) & (c[None, :] != label[:, None]), z, 0.0)  # 0 for NaN, as in torch
        slope = z if SQUARED else tl.where(z > 0.0, 1.0, 0.0).to(A)
        losses += z * z if SQUARED else z
        slopes += slope
        store_rows(grad, rows, classes, c, mask, slope * factor[:, None], UNITS)
    if grad is not None:
        # The row's gradient is stored, with 0 at the target; overwrite that.
        tl.debug_barrier()
        to = contiguous_rows(grad, rows, classes, UNITS)
        tl.store(to[0] + label, -tl.sum(slopes, 1) * factor, mask=valid)
    value = share * tl.sum(losses, 1)
    store_loss(loss, value, scale, rows, in_bounds, valid, invalid, EACH)


@triton.jit(do_not_specialize=["denominator"])
def multilabel_margin_kernel(
    x,
    target,
    denominator,
    grad_output,
    loss,
    grad,
    n,
    classes,
    EACH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Computes the loss of several targets per row.

    Rows are kept in registers, because the gradient of a target is a sum over all classes.
    """
    A: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    _, rows, in_bounds, _, classes = row_block(n, classes, ROWS, UNITS)
    x_rows = contiguous_rows(x, rows, classes, UNITS)
    targets = contiguous_rows(target, rows, classes, UNITS)
    c, mask = class_block(0, classes, in_bounds, BLOCK)
    label = tl.load(pointers(targets, c), mask=mask, other=-1)
    wrong = (label < -1) | (label >= classes)
    invalid = tl.max(wrong.to(tl.int32), 1) > 0
    end = tl.min(tl.where(label < 0, c[None, :], classes), 1)
    end = tl.where(invalid, 0, end)
    most = tl.max(end, 0)
    is_target = mask == 0
    for k in range(most):
        t = tl.load(targets[0] + k, mask=k < end, other=-1)
        is_target |= c[None, :] == t[:, None]
    z = tl.where(is_target, -float("inf"), load_tile(x_rows, c, mask, 0.0))
    losses = tl.zeros([ROWS, BLOCK], A)
    slopes = tl.zeros([ROWS, BLOCK], A)
    for k in range(most):
        t = tl.load(targets[0] + k, mask=k < end, other=-1)
        slack = 1.0 - load_scaled(x_rows[0] + t, k < end, float("inf"))
        above = z + slack[:, None] > 0.0  # False for NaN, as in torch
        losses += tl.where(above, z + slack[:, None], 0.0)
        slope = tl.where(above, 1.0, 0.0).to(A)
        slopes += slope - tl.where(c[None, :] == t[:, None], tl.sum(slope, 1)[:, None], 0.0)
    scale = divided(row_weight(None, rows, in_bounds, A), denominator)
    factor = gradient_scale(scale, grad_output, rows, in_bounds, EACH) / classes
    store_rows(grad, rows, classes, c, mask, slopes * factor[:, None], UNITS)
    value = tl.sum(losses, 1) / classes
    store_loss(loss, value, scale, rows, in_bounds, in_bounds & (invalid == 0), invalid, EACH)
