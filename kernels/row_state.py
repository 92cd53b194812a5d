"""The state of each row of logits z with a class index t, and gradients of results of the state.

    x_c      = scale z_c, or with a cap  scale cap tanh(z_c / cap)
    smooth   = sum_c w_c (x_c - pivot)

`row_terms.py` has the equations of the other results, and of the gradient with respect to x. In
smooth, an infinite pivot is replaced by 0.

Shapes: z has n rows of contiguous classes, which may be a range of all classes. A state is float64
and has a row of n elements for each field: log_p, entropy, lse, pivot, sum, weighted, x_t; with 9
fields also the maximum and its index; with 10 also smooth. Bytes: each kernel reads the logits
once; the second writes the gradient once.

Arguments: `targets` are class indices into all classes or None, class weights or None, None, and
ignore_index. `numbers` are the cap, scale times the cap, and the scale, each None without it.

torch: log_softmax(x, 1), and its entropy and logsumexp
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import exp_nonpositive, tanh
from .reductions import class_weight, read_target
from .row_terms import gradient, state_results, state_terms
from .rows import (
    DROP,
    class_block,
    contiguous_rows,
    finite_or_zero,
    load_scaled,
    number,
    pointers,
    row_block,
    store_rows,
)


@triton.jit
def load_logits(at, mask, numbers, A: tl.constexpr):
    """Returns x and dx/dz; x is -inf outside of the mask."""
    slope = tl.full([], 1.0, A) if numbers[2] is None else number(numbers[2], A)
    if numbers[0] is not None:
        t = tanh(load_scaled(at, mask, 0.0, None, DROP) / number(numbers[0], A))
        x = tl.where(mask, number(numbers[1], A) * t, -float("inf"))
        slope *= (1.0 - t) * (1.0 + t)
    else:
        x = load_scaled(at, mask, -float("inf"), None if numbers[2] is None else slope, DROP)
    return x, slope


@triton.jit
def first_of(best, index, classes):
    """Returns the largest logit of each row, NaN if there is one, and its first class."""
    is_nan = best != best
    has_nan = tl.max(is_nan.to(tl.int32), 1) > 0
    largest = tl.max(tl.where(is_nan, -float("inf"), best), 1)
    leads = tl.where(has_nan[:, None], is_nan, best == largest[:, None])
    index = tl.min(tl.where(leads, index, classes), 1)
    return tl.where(has_nan, float("nan"), largest), index


@triton.jit
def load_sum(at, in_bounds, zeros):
    """Returns a sum of each row over the preceding classes, in the first column of a tile."""
    return first_column(tl.load(at, mask=in_bounds).to(zeros.dtype)[:, None], zeros)


@triton.jit
def first_column(x, zeros):
    """Returns x in the first column of a tile."""
    return tl.where((tl.arange(0, zeros.shape[1]) == 0)[None, :], x, zeros)


@triton.jit
def smooth_pivot(maximum):
    return tl.where(tl.abs(maximum) == float("inf"), 0.0, maximum)


@triton.jit
def add_classes(maximum, total, weighted, x):
    """Returns the maximum of each row and the two sums of each column, with the classes x added."""
    higher = tl.maximum(maximum, tl.max(x, 1))
    pivot = finite_or_zero(higher)
    by = tl.where(maximum == -float("inf"), 0.0, maximum - pivot)
    decay = exp_nonpositive(maximum - pivot)[:, None]
    # Where decay is 0, the product may overflow.
    weighted = tl.where(decay == 0.0, 0.0, (weighted + by[:, None] * total) * decay)
    y = x - pivot[:, None]
    e = exp_nonpositive(y)
    return higher, total * decay + e, weighted + tl.where(e == 0.0, 0.0, e * y)


@triton.jit
def store_maximum(at, step, in_bounds, largest, index, preceding):
    """Stores the largest logit of each row and its index, unless that of preceding classes is."""
    if preceding is not None:
        old = tl.load(at + 7 * step, mask=in_bounds)
        stays = (old >= largest) | (old != old)
        largest = tl.where(stays, old, largest)
        index = tl.where(stays, tl.load(at + 8 * step, mask=in_bounds), index)
    tl.store(at + 7 * step, largest, mask=in_bounds)
    tl.store(at + 8 * step, index, mask=in_bounds)


@triton.jit(do_not_specialize=["preceding", "first_class"])
def row_state_kernel(
    logits,
    targets,
    state,
    results,
    preceding,
    n,
    classes,
    strides,
    first_class,
    vocabulary,
    numbers,
    FIELDS: tl.constexpr,
    RESULTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Computes the state of n rows.

    results: receives copies of the first RESULTS fields of the state.
    preceding: the number of preceding classes, whose state is continued, or None. With class
        weights and smooth, a pointer to the sum of their weights.
    strides: the row stride of logits, and the field stride of state.
    """
    A: tl.constexpr = tl.float64 if logits.dtype.element_ty == tl.float64 else tl.float32
    _, rows, in_bounds, _, classes = row_block(n, classes, ROWS, UNITS)
    label, valid, invalid = read_target(targets, rows, in_bounds, vocabulary)
    label -= first_class
    has_target = valid & (label >= 0) & (label < classes)
    x_rows = contiguous_rows(logits, rows, strides[0], UNITS)
    at, step = state + rows.to(tl.int64), strides[1]
    maximum = tl.full([ROWS], -float("inf"), A)
    total = tl.zeros([ROWS, BLOCK], A)  # per element of the tile, reduced after the loop
    weighted, smooth, weights = total, total, total
    best = tl.full([ROWS, BLOCK], -float("inf"), A)
    index = tl.zeros([ROWS, BLOCK], tl.int32)
    target_logit, _ = load_logits(x_rows[0] + label, has_target, numbers, A)
    target_logit = tl.where(has_target, target_logit.to(tl.float64), 0.0)
    if preceding is not None:
        if FIELDS > 9:
            weight_sum = preceding if targets[1] is None else tl.load(preceding)
            smooth = load_sum(at + 9 * step, in_bounds, total)
            weights = first_column(weight_sum.to(A), total)
        maximum = tl.load(at + 3 * step, mask=in_bounds).to(A)
        weighted = load_sum(at + 5 * step, in_bounds, total)
        total = load_sum(at + 4 * step, in_bounds, total)
        old_logit = tl.load(at + 6 * step, mask=in_bounds)
        target_logit = tl.where(has_target, target_logit, old_logit)
    for start in range(0, classes, BLOCK):
        c, mask = class_block(start, classes, in_bounds, BLOCK)
        x, _slope = load_logits(pointers(x_rows, c), mask, numbers, A)
        previous = smooth_pivot(maximum)
        maximum, total, weighted = add_classes(maximum, total, weighted, x)
        if FIELDS > 7:
            better = (x > best) | ((x != x) & (best == best))
            best = tl.where(better, x, best)
            index = tl.where(better, c[None, :], index)
        if FIELDS > 9:
            pivot = smooth_pivot(maximum)
            smooth += (previous - pivot)[:, None] * weights
            w = class_weight(targets[1], c, classes, first_class)
            smooth += tl.where(mask, w * (x - pivot[:, None]), 0.0)
            weights += tl.where(mask, w, 0.0)
    total_of_row, weighted_of_row = tl.sum(total, 1), tl.sum(weighted, 1)
    pivot_of_row = finite_or_zero(maximum).to(tl.float64)
    log_p, entropy, lse = state_results(pivot_of_row, total_of_row, weighted_of_row, target_logit)
    counted = valid | invalid
    log_p = tl.where(counted, tl.where(invalid, float("nan"), log_p), 0.0)
    entropy, lse = tl.where(counted, entropy, 0.0), tl.where(counted, lse, 0.0)
    target_logit = tl.where(invalid, float("nan"), target_logit)
    fields = (log_p, entropy, lse, maximum, total_of_row, weighted_of_row, target_logit)
    for k in tl.static_range(7):
        tl.store(at + k * step, fields[k], mask=in_bounds)
    for k in tl.static_range(RESULTS):
        tl.store(results + k * n + rows, fields[k], mask=in_bounds)
    if FIELDS > 7:
        largest, first = first_of(best, index, classes)
        first = (first_class + first).to(tl.float64)
        store_maximum(at, step, in_bounds, largest.to(tl.float64), first, preceding)
    if FIELDS > 9:
        smooth_of_row = tl.sum(smooth, 1).to(tl.float64)
        tl.store(at + 9 * step, tl.where(counted, smooth_of_row, 0.0), mask=in_bounds)


@triton.jit(do_not_specialize=["first_class"])
def row_gradients_kernel(
    logits,
    targets,
    state,
    grad_results,
    grad,
    n,
    classes,
    strides,
    first_class,
    vocabulary,
    numbers,
    RESULTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Computes the gradient of n rows of logits.

    grad_results: the gradients of the first RESULTS of log_p, entropy, lse and smooth.
    strides: the row stride of logits, the field stride of state, both strides of grad_results, and
        the row stride of grad.
    """
    A: tl.constexpr = tl.float64 if logits.dtype.element_ty == tl.float64 else tl.float32
    EXACT: tl.constexpr = logits.dtype.element_ty.primitive_bitwidth > 16
    _, rows, in_bounds, _, classes = row_block(n, classes, ROWS, UNITS)
    label, valid, _ = read_target(targets, rows, in_bounds, vocabulary)
    label = tl.where(valid, label - first_class, -1)
    x_rows = contiguous_rows(logits, rows, strides[0], UNITS)
    at, gradient_at = state + rows.to(tl.int64), grad_results + rows.to(tl.int64) * strides[3]
    g_log_p = tl.load(gradient_at, mask=valid).to(A)
    g_entropy, g_lse = tl.zeros_like(g_log_p), tl.zeros_like(g_log_p)
    if RESULTS > 1:
        g_entropy = tl.load(gradient_at + strides[2], mask=valid).to(A)
        g_lse = tl.load(gradient_at + 2 * strides[2], mask=valid).to(A)
    pivot = tl.load(at + 3 * strides[1], mask=valid).to(A)
    total = tl.load(at + 4 * strides[1], mask=valid, other=1.0).to(A)
    weighted = tl.load(at + 5 * strides[1], mask=valid).to(A)
    a, b = state_terms(g_log_p, g_entropy, g_lse, total, weighted)
    if RESULTS > 3:
        g_smooth = tl.load(gradient_at + 3 * strides[2], mask=valid).to(A)[:, None]
    for start in range(0, classes, BLOCK):
        c, mask = class_block(start, classes, in_bounds, BLOCK)
        x, slope = load_logits(pointers(x_rows, c), mask, numbers, A)
        y = x - pivot[:, None]
        y = tl.where(y < -1000.0, -1000.0, y)  # 0 * inf would be NaN; keeps NaN of a and b
        s, t = 0.0, tl.where(c[None, :] == label[:, None], -g_log_p[:, None], 0.0)
        if RESULTS > 3:
            s = -g_smooth * class_weight(targets[1], c, classes, first_class)
        of_x = gradient(exp_nonpositive(y, EXACT), a[:, None], s, t, b[:, None], y)
        of_logits = tl.where(valid[:, None], of_x * slope, 0.0)
        store_rows(grad, rows, strides[4], c, mask, of_logits, UNITS, DROP)
