"""Cross-entropy of logits x with a class index t or class probabilities y, and its gradients.

    lse        = log sum_c exp(x_c)
    q_c        = (1 - smoothing) w_t [c = t] + smoothing / C w_c            class index
    q_c        = w_c ((1 - smoothing) y_c + smoothing / C)                  class probabilities
    loss       = sum_c q_c (lse - x_c) + z_loss lse^2
    dloss/dx_c = p_c (sum_k q_k + 2 z_loss lse) - q_c,                      p_c = exp(x_c - lse)
    dloss/dy_c = (1 - smoothing) w_c (lse - x_c)
    nll_loss   = -w_t x_t, with gradient -w_t [c = t]                       log-probabilities x

w are the class weights. x is scale times the logits, so their gradient is scale dloss/dx. With
gamma (class index, no smoothing), the loss is w_t (1 - p_t)^gamma nll with nll = lse - x_t, and
dloss/dx_c is w_t (p_c - [c = t]) times the derivative d/dnll of (1 - p_t)^gamma nll.
The loss and the gradient of a row are multiplied by `token_weight` and divided by `denominator`.

Shapes: see `rows.py`; row outer_index * inner + inner_index has one target.
Bytes: `row_kernel` reads logits once and writes the gradient once. `two_pass_kernel` reads logits
twice and probabilities three times, mostly from cache after the first time; it loads unaligned rows
in aligned vectors, which took 0.84 times the time in a trial with 50,257 bfloat16 classes.
`nll_kernel` reads and writes one element per row.

torch: F.cross_entropy(x, t, w, ignore_index=..., label_smoothing=..., reduction=...)
       F.nll_loss(x, t, w, ignore_index=..., reduction=...)
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import exp_nonpositive, log, tanh
from .reductions import (
    add_up,
    class_weight,
    gradient_scale,
    loss_of_rows,
    mean_divisor,
    read_rows,
    store_loss,
)
from .rows import (
    DROP,
    aligned_part,
    class_block,
    contiguous_rows,
    finite_or_zero,
    first_pass,
    load_scaled,
    load_tile,
    multiple,
    row_block,
    scalar,
    store_tile,
    strided_rows,
)


@triton.jit
def focal(nll, gamma):
    """Returns (1 - p)^gamma with p = exp(-nll), and d/dnll of (1 - p)^gamma nll."""
    half = tanh(0.5 * tl.where(nll < 0.0, 0.0, nll))
    miss = 2.0 * half / (1.0 + half)  # 1 - p without cancellation
    power = exp_nonpositive(gamma * log(miss))
    ratio = tl.where(miss > 0.0, nll / miss, 1.0)
    p = 1.0 - miss
    return power, power * (1.0 + tl.where(p > 0.0, gamma * p * ratio, 0.0))  # 0 * inf is NaN


@triton.jit
def index_terms(
    target_logit, maximum, log_total, target_weight, smoothing, gamma, z_loss, FOCAL: tl.constexpr
):
    """Returns the loss, q_t of the gradient, and dloss/dlse, all without smoothing."""
    index_weight = scalar(1.0 - smoothing, target_weight.dtype) * target_weight
    nll = maximum - target_logit + log_total
    loss = index_weight * nll
    if FOCAL:
        power, derivative = focal(nll, scalar(gamma, nll.dtype))
        loss *= power
        index_weight *= derivative
    squared, slope = squared_lse(maximum + log_total, z_loss)
    return loss + squared, index_weight, index_weight + slope


@triton.jit
def squared_lse(lse, z_loss):
    """Returns z_loss lse^2 and its derivative d/dlse; 0 if z_loss is 0, even for infinite lse."""
    weight = scalar(z_loss, lse.dtype)
    lse = tl.where(z_loss > 0.0, lse, 0.0)
    return weight * lse * lse, 2.0 * weight * lse


# ---- rows that fit into registers ----------------------------------------------------------------


@triton.jit(do_not_specialize=["denominator", "ignore_index"])
def row_kernel(
    logits,
    target,
    weight,
    token_weight,
    denominator,
    grad_output,
    loss,
    gradients,
    n,
    classes,
    strides,
    ignore_index,
    smoothing: tl.float64,
    gamma: tl.float64,
    z_loss: tl.float64,
    logit_scale: tl.float64,
    FOCAL: tl.constexpr,
    SCALED: tl.constexpr,
    DENSE: tl.constexpr,
    EACH: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Computes the loss of class indices for n rows of at most BLOCK contiguous classes.

    With STAGES > 1 there are fewer programs than tiles of rows: each loads the rows of its next
    tiles while it computes one.

    strides: the row strides of logits and of their gradient, gradients[0].
    FOCAL, SCALED: whether gamma is not 0, and whether logit_scale is not 1.
    DENSE: whether there is label smoothing.
    """
    A: tl.constexpr = tl.float64 if logits.dtype.element_ty == tl.float64 else tl.float32
    EXACT: tl.constexpr = logits.dtype.element_ty.primitive_bitwidth > 16
    grad, classes = gradients[0], multiple(classes, UNITS[1])
    if denominator is not None:
        denominator = mean_divisor(
            denominator, target, weight, token_weight, n, ignore_index, classes
        )
    smoothing, by = scalar(smoothing, A), scalar(logit_scale, A) if SCALED else None
    smooth_weight = smoothing / classes
    c = tl.arange(0, BLOCK)
    mask = (c < classes)[None, :]
    losses = tl.zeros([ROWS], A)
    stored = tl.zeros([ROWS], tl.int1)  # rows whose gradient is stored, except at the target
    of_target, at_target = losses, tl.zeros([ROWS], tl.int64)
    for tile in tl.range(tl.program_id(0), tl.cdiv(n, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = tile * ROWS + tl.arange(0, ROWS)
        in_bounds = rows < n
        label, valid, invalid, target_weight, scale = read_rows(
            target, weight, token_weight, denominator, rows, in_bounds, classes, ignore_index, A
        )
        x_rows = contiguous_rows(logits, rows, strides[0], UNITS)
        if STAGES > 1:  # loads do not wait for the targets
            x = load_tile(x_rows, c, mask & in_bounds[:, None], -float("inf"), by)
            x = tl.where(valid[:, None], x, -float("inf"))
        else:
            x = load_tile(x_rows, c, mask & valid[:, None], -float("inf"), by)
        target_logit = load_scaled(x_rows[0] + label, valid, 0.0, by)

        maximum = finite_or_zero(tl.max(x, 1))
        x -= maximum[:, None]
        e = exp_nonpositive(x, EXACT)
        total = tl.sum(e, 1)
        log_total = tl.log(total)
        value, index_weight, slope = index_terms(
            target_logit, maximum, log_total, target_weight, smoothing, gamma, z_loss, FOCAL
        )
        if DENSE:
            distance = tl.sum(tl.where(mask, -x, 0.0), 1) + classes * log_total
            value += smooth_weight * distance
            slope += smoothing
        if grad is not None:
            if STAGES > 1:  # after the barriers of the sums
                tl.store(grad + at_target, of_target, mask=stored)
            grad_scale = gradient_scale(scale, grad_output, rows, valid, EACH)
            grad_scale = tl.where(valid, grad_scale * by if SCALED else grad_scale, 0.0)
            factor = tl.where(valid, slope * grad_scale / total, 0.0)
            gradient = e * factor[:, None]
            of_target = exp_nonpositive(target_logit - maximum, EXACT) * factor
            of_target -= index_weight * grad_scale
            if DENSE:
                gradient -= (smooth_weight * grad_scale)[:, None]
                of_target -= smooth_weight * grad_scale
            if STAGES == 1:  # inplace: threads read the target logit before it is overwritten
                tl.debug_barrier()
            to = contiguous_rows(grad, rows, strides[1], UNITS)
            store_tile(to, c, mask & in_bounds[:, None], gradient)
            at_target, stored = rows.to(tl.int64) * strides[1] + label, valid
        value = loss_of_rows(value, scale, valid, invalid)
        if EACH and loss is not None:
            tl.store(loss + rows, value, mask=in_bounds)
        losses += tl.where(in_bounds, value, 0.0)
    if grad is not None:
        tl.debug_barrier()
        tl.store(grad + at_target, of_target, mask=stored)
    if loss is not None and not EACH:
        add_up(tl.sum(losses), loss)


# ---- long rows, other strides, class probabilities -----------------------------------------------


@triton.jit
def weights_of_classes(y_rows, weight, c, mask, classes, smoothing):
    """Returns q_c without the [c = t] term, where y_rows is None; 0 outside of the mask."""
    q = smoothing / classes
    if y_rows is not None:
        q += (1.0 - smoothing) * load_tile(y_rows, c, mask, 0.0)
    return tl.where(mask, q * class_weight(weight, c, classes, 0), 0.0)


@triton.jit(do_not_specialize=["denominator", "ignore_index"])
def two_pass_kernel(
    logits,
    target,
    weight,
    token_weight,
    denominator,
    grad_output,
    loss,
    gradients,
    inner,
    classes,
    strides,
    ignore_index,
    smoothing: tl.float64,
    gamma: tl.float64,
    z_loss: tl.float64,
    logit_scale: tl.float64,
    FOCAL: tl.constexpr,
    SCALED: tl.constexpr,
    DENSE: tl.constexpr,
    EACH: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Computes the loss of class indices or class probabilities, for any strides.

    gradients: of logits and of probabilities, each a tensor or None.
    strides: the outer, inner and class strides of logits and their gradient, and of probabilities
        and their gradient.
    FOCAL, SCALED: as in `row_kernel`.
    DENSE: whether q_c may be nonzero for every class, because of smoothing or probabilities.
    VECTOR: the elements of 16 bytes, to load unaligned rows in aligned vectors; 0 for other rows.
        Needs contiguous classes, one outer index, ROWS = 1, class indices, no smoothing, and the
        same row stride in logits and gradient.
    """
    A: tl.constexpr = tl.float64 if logits.dtype.element_ty == tl.float64 else tl.float32
    EXACT: tl.constexpr = logits.dtype.element_ty.primitive_bitwidth > 16
    INDICES: tl.constexpr = target.dtype.element_ty == tl.int64
    smoothing, z_loss = scalar(smoothing, A), scalar(z_loss, A)
    by = scalar(logit_scale, A) if SCALED else None
    grad, grad_target = gradients
    outer, lanes, in_bounds, inner, classes = row_block(inner, classes, ROWS, UNITS)
    rows = outer * inner + lanes
    indices = target if INDICES else None
    y_rows = None if INDICES else strided_rows(target, outer, lanes, strides, 6, UNITS)
    n = tl.num_programs(0) // tl.cdiv(inner, ROWS) * inner
    if denominator is not None:
        denominator = mean_divisor(
            denominator, indices, weight, token_weight, n, ignore_index, classes
        )
    label, valid, invalid, target_weight, scale = read_rows(
        indices, weight, token_weight, denominator, rows, in_bounds, classes, ignore_index, A
    )
    label, edges = label.to(tl.int32), None
    if VECTOR:  # pointers and class indices are relative to the row's first aligned vector
        start = tl.program_id(0).to(tl.int64) * strides[1]
        first, before, classes, edge, at_edge = aligned_part(start, classes, VECTOR)
        logits, label, outer, lanes = logits + first, label - before, outer * 0, lanes * 0
        if grad is not None:
            grad += first
    x_rows = strided_rows(logits, outer, lanes, strides, 0, UNITS)
    if INDICES:
        of_target = x_rows[0] + label.to(tl.int64) * x_rows[1]
        target_logit = load_scaled(of_target, valid, 0.0, by)
    read = valid if ROWS == 1 else in_bounds  # a mask per row would prevent vectorised loads
    if VECTOR:
        edges = load_tile(x_rows, edge, at_edge & read[:, None], -float("inf"), by)
    maximum, total = first_pass(x_rows, classes, read, BLOCK, by, edges)
    log_total = tl.log(total)
    if INDICES:
        value, index_weight, slope = index_terms(
            target_logit, maximum, log_total, target_weight, smoothing, gamma, z_loss, FOCAL
        )
    else:
        value, slope = squared_lse(maximum + log_total, z_loss)
    if INDICES and DENSE and weight is None:
        slope += smoothing
    elif DENSE and grad is not None:
        sums = tl.zeros([ROWS, BLOCK], A)
        for start in range(0, classes, BLOCK):
            c, mask = class_block(start, classes, in_bounds, BLOCK)
            sums += weights_of_classes(y_rows, weight, c, mask, classes, smoothing)
        slope += tl.sum(sums, 1)
    if DENSE or grad is not None:
        target_scale = gradient_scale(scale, grad_output, rows, in_bounds, EACH)
        grad_scale = target_scale * by if SCALED else target_scale
        factor = slope * grad_scale / total
        of_label = (index_weight * grad_scale)[:, None] if INDICES else None
        distance = tl.zeros([ROWS, BLOCK], A)
        tl.debug_barrier()  # inplace: wait for the loads before overwriting
        if VECTOR:
            of_edges = exp_nonpositive(edges - maximum[:, None], EXACT) * factor[:, None]
            of_edges -= tl.where(edge[None, :] == label[:, None], of_label, 0.0)
            of_edges = tl.where(valid[:, None], of_edges, 0.0)
            store_tile(strided_rows(grad, outer, lanes, strides, 3, UNITS), edge, at_edge, of_edges)
        for start in range(0, classes, BLOCK):
            c, mask = class_block(start, classes, in_bounds, BLOCK)
            x = load_tile(x_rows, c, mask & read[:, None], 0.0, by, DROP) - maximum[:, None]
            of_weights = 0.0
            if DENSE:
                q = weights_of_classes(y_rows, weight, c, mask, classes, smoothing)
                neg_log_p = log_total[:, None] - x
                distance += tl.where(mask, q * neg_log_p, 0.0)
                of_weights = q * grad_scale[:, None]
            gradient = exp_nonpositive(x, EXACT) * factor[:, None] - of_weights
            if INDICES:
                is_target = c[None, :] == label[:, None]
                gradient -= tl.where(is_target, of_label, 0.0)
            if INDICES or token_weight is not None:
                gradient = tl.where(valid[:, None], gradient, 0.0)
            if grad is not None:
                to = strided_rows(grad, outer, lanes, strides, 3, UNITS)
                store_tile(to, c, mask, gradient, DROP)
            if grad_target is not None:
                share = (1.0 - smoothing) * class_weight(weight, c, classes, 0)
                to = strided_rows(grad_target, outer, lanes, strides, 9, UNITS)
                gradient = neg_log_p * share * target_scale[:, None]
                store_tile(to, c, mask, tl.where(valid[:, None], gradient, 0.0))
        value += tl.sum(distance, 1)
    store_loss(loss, value, scale, rows, in_bounds, valid, invalid, EACH)


# ---- log-probabilities ---------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n", "ignore_index"])
def nll_kernel(
    x,
    target,
    weight,
    denominator,
    grad_output,
    loss,
    grad,
    n,
    inner,
    classes,
    x_strides,
    grad_strides,
    ignore_index,
    EACH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Computes nll_loss of n = outer * inner rows, for any strides; grad is filled with zeros."""
    A: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_bounds = rows < n
    if denominator is not None:
        denominator = mean_divisor(denominator, target, weight, None, n, ignore_index, classes)
    label, valid, invalid, target_weight, scale = read_rows(
        target, weight, None, denominator, rows, in_bounds, classes, ignore_index, A
    )
    outer, lanes = rows // inner, rows % inner
    if loss is not None:
        offsets = outer * x_strides[0] + lanes * x_strides[1] + label * x_strides[2]
        value = -target_weight * tl.load(x + offsets, mask=valid, other=0.0).to(A)
        store_loss(loss, value, scale, rows, in_bounds, valid, invalid, EACH)
    if grad is not None:
        offsets = outer * grad_strides[0] + lanes * grad_strides[1] + label * grad_strides[2]
        grad_scale = gradient_scale(scale, grad_output, rows, valid, EACH)
        tl.store(grad + offsets, -target_weight * grad_scale, mask=valid)
