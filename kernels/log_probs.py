"""The log-probability of a class t of each row, the row's entropy and log-sum-exp, their gradient.

    x_c     = SCALE z_c, or with a CAP  SCALE CAP tanh(z_c / CAP)
    lse     = log sum_c exp(x_c)
    log_p   = x_t - lse
    entropy = lse - sum_c p_c x_c,                                          p_c = exp(x_c - lse)
    dz_c    = (p_c (g_lse - g_log_p - g_entropy (log p_c + entropy)) + g_log_p [c = t]) dx_c/dz_c

The g are the gradients of the three results. Shapes: logits z are n rows of contiguous classes,
which may be some of all classes. What there is of each row is float64, n of each value at a stride.
Bytes: each kernel reads the logits once; the second writes the gradient once.

torch: log_softmax(x, 1) and what follows from it
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import exp_nonpositive, tanh
from .rows import (
    DROP,
    block_of_rows,
    finite_or_zero,
    load_scaled,
    multiple,
    pointers,
    row_starts,
    scalar,
)


@triton.jit
def read_label(target, rows, in_bounds, classes, first_class, vocabulary, ignore_index):
    """The target among these classes, whether it is one, is any class, or is out of range."""
    label = tl.load(target + rows, mask=in_bounds, other=ignore_index)
    counted = in_bounds & (label != ignore_index)
    valid = counted & (label >= 0) & (label < vocabulary)
    label -= first_class
    return label, valid & (label >= 0) & (label < classes), valid, counted & (valid == 0)


@triton.jit
def load_logits(at, mask, A: tl.constexpr, CAP: tl.constexpr, SCALE: tl.constexpr):
    """x and dx/dz; x is -inf outside of the mask."""
    slope = scalar(SCALE, A)
    if CAP > 0.0:
        t = tanh(tl.load(at, mask=mask, other=0.0, eviction_policy=DROP).to(A) / scalar(CAP, A))
        x = tl.where(mask, scalar(CAP * SCALE, A) * t, -float("inf"))
        slope *= (1.0 - t) * (1.0 + t)
    else:
        x = load_scaled(at, mask, -float("inf"), A, SCALE, DROP)
    return x, slope


@triton.jit(do_not_specialize=["first_class", "ignore_index"])
def log_probs_kernel(
    logits,
    target,
    values,
    n,
    classes,
    strides,
    first_class,
    vocabulary,
    ignore_index,
    CAP: tl.constexpr,
    SCALE: tl.constexpr,
    CONTINUES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CLASS_UNIT: tl.constexpr = 1,
):
    """values: log_p, entropy, lse, pivot, sum of e = exp(x - pivot), sum of e (x - pivot), x_t.

    CONTINUES: from the values, which are those of the classes before these.
    strides: of the rows of logits, and from one value of a row to the next.
    """
    A: tl.constexpr = tl.float64 if logits.dtype.element_ty == tl.float64 else tl.float32
    classes = multiple(classes, CLASS_UNIT)
    _, rows, in_bounds = block_of_rows(n, ROWS)
    label, here, valid, invalid = read_label(
        target, rows, in_bounds, classes, first_class, vocabulary, ignore_index
    )
    starts = row_starts(logits, 0, rows, 0, strides[0], 1, CLASS_UNIT)
    at, step = values + rows.to(tl.int64), strides[1]
    maximum = tl.full([ROWS], -float("inf"), A)
    total = tl.zeros([ROWS, BLOCK], A)  # by lane, so that lanes are added up once
    weighted = tl.zeros([ROWS, BLOCK], A)
    target_logit, _ = load_logits(starts + label, here, A, CAP, SCALE)
    target_logit = tl.where(here, target_logit.to(tl.float64), 0.0)
    if CONTINUES:
        first = (tl.arange(0, BLOCK) == 0)[None, :]
        maximum = tl.load(at + 3 * step, mask=in_bounds, other=0.0).to(A)
        old = tl.load(at + 4 * step, mask=in_bounds, other=0.0).to(A)
        total = tl.where(first, old[:, None], total)
        old = tl.load(at + 5 * step, mask=in_bounds, other=0.0).to(A)
        weighted = tl.where(first, old[:, None], weighted)
        old_logit = tl.load(at + 6 * step, mask=in_bounds, other=0.0)
        target_logit = tl.where(here, target_logit, old_logit)
    for start in range(0, classes, BLOCK):
        c = start + tl.arange(0, BLOCK)
        mask = in_bounds[:, None] & (c < classes)[None, :]
        x, _slope = load_logits(pointers(starts, c, 1, 1), mask, A, CAP, SCALE)
        higher = tl.maximum(maximum, tl.max(x, 1))
        pivot = finite_or_zero(higher)
        by = tl.where(maximum == -float("inf"), 0.0, maximum - pivot)
        decay = exp_nonpositive(maximum - pivot)[:, None]
        weighted = (weighted + by[:, None] * total) * decay
        y = x - pivot[:, None]
        e = exp_nonpositive(y)
        total = total * decay + e
        weighted += tl.where(e == 0.0, 0.0, e * y)
        maximum = higher
    total_of_row = tl.sum(total, 1).to(tl.float64)
    weighted_of_row = tl.sum(weighted, 1).to(tl.float64)
    pivot_of_row = finite_or_zero(maximum).to(tl.float64)
    log_total = tl.log(total_of_row)
    log_p = target_logit - pivot_of_row - log_total
    entropy = log_total - weighted_of_row / total_of_row
    # Rounding would take the logarithm of a probability above 0; a NaN stays.
    log_p = tl.where(invalid, float("nan"), tl.where(log_p > 0.0, 0.0, log_p))
    entropy = tl.where(entropy < 0.0, 0.0, entropy)
    counted = valid | invalid
    tl.store(at, tl.where(counted, log_p, 0.0), mask=in_bounds)
    tl.store(at + step, tl.where(counted, entropy, 0.0), mask=in_bounds)
    tl.store(at + 2 * step, tl.where(counted, pivot_of_row + log_total, 0.0), mask=in_bounds)
    tl.store(at + 3 * step, maximum.to(tl.float64), mask=in_bounds)
    tl.store(at + 4 * step, total_of_row, mask=in_bounds)
    tl.store(at + 5 * step, weighted_of_row, mask=in_bounds)
    tl.store(at + 6 * step, target_logit, mask=in_bounds)


@triton.jit(do_not_specialize=["first_class", "ignore_index"])
def log_probs_backward_kernel(
    logits,
    target,
    values,
    grad_results,
    grad,
    n,
    classes,
    strides,
    first_class,
    vocabulary,
    ignore_index,
    CAP: tl.constexpr,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CLASS_UNIT: tl.constexpr = 1,
):
    """strides: of the rows of logits and of grad; of values and of grad_results."""
    A: tl.constexpr = tl.float64 if logits.dtype.element_ty == tl.float64 else tl.float32
    EXACT: tl.constexpr = logits.dtype.element_ty.primitive_bitwidth > 16
    classes = multiple(classes, CLASS_UNIT)
    _, rows, in_bounds = block_of_rows(n, ROWS)
    label, here, valid, _ = read_label(
        target, rows, in_bounds, classes, first_class, vocabulary, ignore_index
    )
    starts = row_starts(logits, 0, rows, 0, strides[0], 1, CLASS_UNIT)
    to = row_starts(grad, 0, rows, 0, strides[1], 1, CLASS_UNIT)
    value, gradient_at = values + rows.to(tl.int64), grad_results + rows.to(tl.int64)
    g_log_p = tl.load(gradient_at, mask=valid, other=0.0)
    g_entropy = tl.load(gradient_at + strides[3], mask=valid, other=0.0)
    g_lse = tl.load(gradient_at + 2 * strides[3], mask=valid, other=0.0)
    entropy = tl.load(value + strides[2], mask=valid, other=0.0)
    pivot = tl.load(value + 3 * strides[2], mask=valid, other=0.0).to(A)
    total = tl.load(value + 4 * strides[2], mask=valid, other=1.0)
    # p_c = exp(x_c - pivot) / total, and log p_c = (x_c - pivot) - log(total)
    a = ((g_lse - g_log_p - g_entropy * (entropy - tl.log(total))) / total).to(A)[:, None]
    b = (-g_entropy / total).to(A)[:, None]
    for start in range(0, classes, BLOCK):
        c = start + tl.arange(0, BLOCK)
        mask = in_bounds[:, None] & (c < classes)[None, :]
        x, slope = load_logits(pointers(starts, c, 1, 1), mask, A, CAP, SCALE)
        y = x - pivot[:, None]
        e = exp_nonpositive(y, EXACT)
        gradient = tl.where(e == 0.0, 0.0, e * (a + b * y))
        is_target = here[:, None] & (c[None, :] == label[:, None])
        gradient = tl.where(is_target, gradient + g_log_p.to(A)[:, None], gradient) * slope
        gradient = tl.where(valid[:, None], gradient, 0.0)
        tl.store(pointers(to, c, 1, 1), gradient, mask=mask, eviction_policy=DROP)
