"""Cross-entropy of logits x beside a class index t or class probabilities y, and its gradients.

    lse        = log sum_c exp(x_c)
    q_c        = (1 - smoothing) w_t [c = t] + smoothing / C w_c            class index
    q_c        = w_c ((1 - smoothing) y_c + smoothing / C)                  class probabilities
    loss       = sum_c q_c (lse - x_c) + z_loss lse^2
    dloss/dx_c = p_c (sum_k q_k + 2 z_loss lse) - q_c,                      p_c = exp(x_c - lse)
    dloss/dy_c = (1 - smoothing) w_c (lse - x_c)

w are the class weights; x is SCALE times the logits, whose gradient is SCALE dloss/dx. With gamma
(class index, no smoothing) the loss is w_t (1 - p_t)^gamma nll, nll = lse - x_t, and dloss/dx_c is
w_t (p_c - [c = t]) times the derivative of that by nll.
Loss and gradient of a row are multiplied by `row_weight` and divided by `denominator`.

Shapes: as in `rows.py`; row outer_index * inner + inner_index has one target.
Bytes: `row_kernel` reads logits once and writes the gradient once; the other kernels read logits
twice, the second time mostly from cache.

A class index that is neither in [0, C) nor ignored gives a loss of NaN and a gradient of zero: an
error would have to wait for the GPU.

torch: F.cross_entropy(x, t, w, ignore_index=..., label_smoothing=..., reduction=...)
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import exp_nonpositive, log, tanh
from .reductions import read_rows, store_loss
from .rows import (
    DROP,
    block_of_rows,
    class_weight,
    finite_or_zero,
    first_pass,
    load_scaled,
    multiple,
    pointers,
    row_scale,
    row_starts,
    scalar,
)

# ---- what the kernels share ----------------------------------------------------------------------


@triton.jit
def focal(nll, GAMMA: tl.constexpr):
    """(1 - p)^gamma, p = exp(-nll), and the derivative of (1 - p)^gamma nll by nll."""
    half = tanh(0.5 * tl.where(nll < 0.0, 0.0, nll))
    miss = 2.0 * half / (1.0 + half)  # 1 - p, however close to 0
    power = exp_nonpositive(GAMMA * log(miss))
    ratio = tl.where(miss > 0.0, nll / miss, 1.0)
    return power, power * (1.0 + GAMMA * (1.0 - miss) * ratio)


@triton.jit
def index_terms(nll, lse, index_weight, z_loss, GAMMA: tl.constexpr):
    """Returns the loss without smoothing, the gradient's q_t, and dloss/dlse without smoothing."""
    loss = index_weight * nll
    if GAMMA > 0.0:
        power, derivative = focal(nll, GAMMA)
        loss *= power
        index_weight *= derivative
    squared, slope = squared_lse(lse, z_loss)
    return loss + squared, index_weight, index_weight + slope


@triton.jit
def squared_lse(lse, z_loss):
    """z_loss lse^2 and its derivative by lse, 0 without z_loss even if lse is infinite."""
    weight = scalar(z_loss, lse.dtype)
    lse = tl.where(z_loss > 0.0, lse, 0.0)
    return weight * lse * lse, 2.0 * weight * lse


# ---- rows that fit into registers ----------------------------------------------------------------


@triton.jit(do_not_specialize=["denominator", "ignore_index"])
def row_kernel(
    logits,
    target,
    weight,
    row_weight,
    denominator,
    loss,
    grad,
    n,
    classes,
    strides,
    ignore_index,
    smoothing: tl.float64,
    z_loss: tl.float64,
    GAMMA: tl.constexpr,
    SCALE: tl.constexpr,
    SMOOTHING: tl.constexpr,
    EACH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CLASS_UNIT: tl.constexpr = 1,
):
    """Computes the loss of class indices, of n contiguous rows of at most BLOCK classes.

    strides: of the rows of logits and of grad.
    """
    A: tl.constexpr = tl.float64 if logits.dtype.element_ty == tl.float64 else tl.float32
    classes = multiple(classes, CLASS_UNIT)
    _, rows, in_bounds = block_of_rows(n, ROWS)
    label, valid, invalid, target_weight, scale = read_rows(
        target, weight, row_weight, denominator, rows, in_bounds, n, classes, ignore_index, A
    )
    starts = row_starts(logits, 0, rows, 0, strides[0], 1, CLASS_UNIT)
    c = tl.arange(0, BLOCK)
    mask = (c < classes)[None, :]
    x = load_scaled(pointers(starts, c, 1, 1), mask & valid[:, None], -float("inf"), A, SCALE)
    target_logit = load_scaled(starts + label, valid, 0.0, A, SCALE)

    maximum = finite_or_zero(tl.max(x, 1))
    x -= maximum[:, None]
    e = exp_nonpositive(x, logits.dtype.element_ty.primitive_bitwidth > 16)
    total = tl.sum(e, 1)
    log_total = tl.log(total)
    index_weight = scalar(1.0 - smoothing, A) * target_weight
    value, index_weight, slope = index_terms(
        maximum - target_logit + log_total, maximum + log_total, index_weight, z_loss, GAMMA
    )
    smooth_weight = scalar(smoothing, A) / classes
    if SMOOTHING:
        distance = tl.sum(tl.where(mask, -x, 0.0), 1) + classes * log_total
        value += smooth_weight * distance
        slope += scalar(smoothing, A)
    if loss is not None:
        store_loss(loss, value, scale, rows, in_bounds, valid, invalid, EACH)
    if grad is not None:
        scale = tl.where(valid, scale * SCALE, 0.0)
        factor = tl.where(valid, slope * scale / total, 0.0)
        gradient = e * factor[:, None]
        if SMOOTHING:
            gradient -= (smooth_weight * scale)[:, None]
        is_target = c[None, :] == label.to(tl.int32)[:, None]
        gradient -= tl.where(is_target, (index_weight * scale)[:, None], 0.0)
        tl.debug_barrier()  # in place, all threads have read the target's logit before it changes
        to = row_starts(grad, 0, rows, 0, strides[1], 1, CLASS_UNIT)
        tl.store(pointers(to, c, 1, 1), gradient, mask=mask & in_bounds[:, None])


# ---- class indices otherwise: long rows, other strides -------------------------------------------


@triton.jit
def mean_weight(weight, classes, A: tl.constexpr, BLOCK: tl.constexpr):
    mean = tl.full([], 1.0, A)
    if weight is not None:
        total = tl.zeros([BLOCK], A)
        for start in range(0, classes, BLOCK):
            c = start + tl.arange(0, BLOCK)
            total += tl.load(weight + c, mask=c < classes, other=0.0)
        mean = tl.sum(total) / classes
    return mean


@triton.jit(do_not_specialize=["denominator", "ignore_index"])
def two_pass_kernel(
    logits,
    target,
    weight,
    row_weight,
    denominator,
    loss,
    grad,
    inner,
    classes,
    strides,
    ignore_index,
    smoothing: tl.float64,
    z_loss: tl.float64,
    GAMMA: tl.constexpr,
    SCALE: tl.constexpr,
    SMOOTHING: tl.constexpr,
    EACH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER_UNIT: tl.constexpr = 1,
    CLASS_UNIT: tl.constexpr = 1,
):
    """Computes the loss of class indices, of any strides and number of classes.

    strides: outer, inner and class stride of logits and of grad.
    """
    A: tl.constexpr = tl.float64 if logits.dtype.element_ty == tl.float64 else tl.float32
    EXACT: tl.constexpr = logits.dtype.element_ty.primitive_bitwidth > 16
    inner, classes = multiple(inner, INNER_UNIT), multiple(classes, CLASS_UNIT)
    outer, lanes, in_bounds = block_of_rows(inner, ROWS)
    rows = outer * inner + lanes
    label, valid, invalid, target_weight, scale = read_rows(
        target, weight, row_weight, denominator, rows, in_bounds, inner, classes, ignore_index, A
    )
    label = label.to(tl.int32)
    stride = strides[2]
    starts = row_starts(logits, outer, lanes, strides[0], strides[1], INNER_UNIT, CLASS_UNIT)
    target_logit = load_scaled(starts + label.to(tl.int64) * stride, valid, 0.0, A, SCALE)
    read = valid if ROWS == 1 else in_bounds  # a mask by row would take loads of many rows apart
    maximum, total = first_pass(
        starts, classes, stride, read, A, EXACT, INNER_UNIT, ROWS, BLOCK, SCALE
    )
    log_total = tl.log(total)
    index_weight = scalar(1.0 - smoothing, A) * target_weight
    value, index_weight, slope = index_terms(
        maximum - target_logit + log_total, maximum + log_total, index_weight, z_loss, GAMMA
    )
    if SMOOTHING:
        slope += scalar(smoothing, A) * mean_weight(weight, classes, A, max(BLOCK, 1024))
    if SMOOTHING or grad is not None:
        grad_scale = scale * SCALE
        factor = slope * grad_scale / total
        distance = tl.zeros([ROWS, BLOCK], A)
        tl.debug_barrier()  # in place, all threads have read the target's logit before it changes
        for start in range(0, classes, BLOCK):
            c = start + tl.arange(0, BLOCK)
            mask = in_bounds[:, None] & (c < classes)[None, :]
            at = pointers(starts, c, stride, INNER_UNIT)
            x = load_scaled(at, mask & read[:, None], 0.0, A, SCALE, DROP) - maximum[:, None]
            gradient = exp_nonpositive(x, EXACT) * factor[:, None]
            if SMOOTHING:
                q = scalar(smoothing, A) / classes * class_weight(weight, c, classes, 0, A)
                distance += tl.where(mask, q * (log_total[:, None] - x), 0.0)
                gradient -= q * grad_scale[:, None]
            if grad is not None:
                is_target = c[None, :] == label[:, None]
                gradient -= tl.where(is_target, (index_weight * grad_scale)[:, None], 0.0)
                gradient = tl.where(valid[:, None], gradient, 0.0)
                to = row_starts(grad, outer, lanes, strides[3], strides[4], INNER_UNIT, CLASS_UNIT)
                at = pointers(to, c, strides[5], INNER_UNIT)
                tl.store(at, gradient, mask=mask, eviction_policy=DROP)
        value += tl.sum(distance, 1)
    if loss is not None:
        store_loss(loss, value, scale, rows, in_bounds, valid, invalid, EACH)


# ---- class probabilities -------------------------------------------------------------------------


@triton.jit
def smoothed(
    y_starts,
    weight,
    c,
    mask,
    classes,
    class_stride,
    smoothing,
    A: tl.constexpr,
    INNER_UNIT: tl.constexpr,
):
    """q_c of class probabilities; 0 outside of the mask."""
    y = tl.load(pointers(y_starts, c, class_stride, INNER_UNIT), mask=mask, other=0.0).to(A)
    q = scalar(1.0 - smoothing, A) * y + scalar(smoothing, A) / classes
    return tl.where(mask, q * class_weight(weight, c, classes, 0, A), 0.0)


@triton.jit(do_not_specialize=["denominator"])
def probabilities_kernel(
    logits,
    target,
    weight,
    row_weight,
    denominator,
    loss,
    grad,
    grad_target,
    inner,
    classes,
    strides,
    smoothing: tl.float64,
    z_loss: tl.float64,
    SCALE: tl.constexpr,
    EACH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER_UNIT: tl.constexpr = 1,
    CLASS_UNIT: tl.constexpr = 1,
):
    """Computes the loss of class probabilities of the logits' shape, of any strides.

    strides: outer, inner and class stride of logits, target, grad and grad_target.
    """
    A: tl.constexpr = tl.float64 if logits.dtype.element_ty == tl.float64 else tl.float32
    EXACT: tl.constexpr = logits.dtype.element_ty.primitive_bitwidth > 16
    inner, classes = multiple(inner, INNER_UNIT), multiple(classes, CLASS_UNIT)
    outer, lanes, in_bounds = block_of_rows(inner, ROWS)
    rows = outer * inner + lanes
    scale = row_scale(row_weight, denominator, rows, in_bounds, A)
    x_starts = row_starts(logits, outer, lanes, strides[0], strides[1], INNER_UNIT, CLASS_UNIT)
    y_starts = row_starts(target, outer, lanes, strides[3], strides[4], INNER_UNIT, CLASS_UNIT)
    maximum, total = first_pass(
        x_starts, classes, strides[2], in_bounds, A, EXACT, INNER_UNIT, ROWS, BLOCK, SCALE
    )
    log_total = tl.log(total)
    value, slope = squared_lse(maximum + log_total, z_loss)
    if grad is not None:
        targets = tl.zeros([ROWS, BLOCK], A)
        for start in range(0, classes, BLOCK):
            c = start + tl.arange(0, BLOCK)
            mask = in_bounds[:, None] & (c < classes)[None, :]
            targets += smoothed(
                y_starts, weight, c, mask, classes, strides[5], smoothing, A, INNER_UNIT
            )
        slope += tl.sum(targets, 1)
    grad_scale = scale * SCALE
    factor = slope * grad_scale / total
    distance = tl.zeros([ROWS, BLOCK], A)
    tl.debug_barrier()  # in place, the first pass is over
    for start in range(0, classes, BLOCK):
        c = start + tl.arange(0, BLOCK)
        mask = in_bounds[:, None] & (c < classes)[None, :]
        at = pointers(x_starts, c, strides[2], INNER_UNIT)
        x = load_scaled(at, mask, 0.0, A, SCALE) - maximum[:, None]
        q = smoothed(y_starts, weight, c, mask, classes, strides[5], smoothing, A, INNER_UNIT)
        away = log_total[:, None] - x
        distance += tl.where(mask, q * away, 0.0)
        if grad is not None:
            gradient = exp_nonpositive(x, EXACT) * factor[:, None] - q * grad_scale[:, None]
            to = row_starts(grad, outer, lanes, strides[6], strides[7], INNER_UNIT, CLASS_UNIT)
            tl.store(pointers(to, c, strides[8], INNER_UNIT), gradient, mask=mask)
        if grad_target is not None:
            share = scalar(1.0 - smoothing, A) * class_weight(weight, c, classes, 0, A)
            to = row_starts(
                grad_target, outer, lanes, strides[9], strides[10], INNER_UNIT, CLASS_UNIT
            )
            tl.store(
                pointers(to, c, strides[11], INNER_UNIT), away * share * scale[:, None], mask=mask
            )
    if loss is not None:
        value += tl.sum(distance, 1)
        store_loss(loss, value, scale, rows, in_bounds, in_bounds, rows < 0, EACH)
