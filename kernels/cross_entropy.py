"""Cross-entropy of logits x with class indices t or class probabilities y, and its gradients.

`row_terms.py` has the equations for class indices; x is scale times the logits, so their gradient
is scale dloss/dx. With class probabilities,

    q_c        = w_c ((1 - smoothing) y_c + smoothing / C)
    loss       = sum_c q_c (lse - x_c) + z_loss lse^2
    dloss/dx_c = p_c (sum_k q_k + 2 z_loss lse) - q_c,      p_c = exp(x_c - lse)
    dloss/dy_c = (1 - smoothing) w_c (lse - x_c)

The loss and the gradient of a row are multiplied by `token_weight` and divided by `denominator`.

Shapes: see `rows.py`; row outer_index * inner + inner_index has one target.
Bytes: `row_kernel` reads logits once and writes the gradient once. `two_pass_kernel` reads logits
twice and probabilities three times, mostly from cache after the first time; it loads unaligned rows
in aligned vectors, which took 0.84 times the time in a trial with 50,257 bfloat16 classes.

Arguments: `targets` are class indices, weight, token_weight and ignore_index; the first three may
be None. `numbers` are the options that `row_terms.py` describes. UNREDUCED: whether there is no
reduction. An argument that is None is not compiled.

torch: F.cross_entropy(x, t, w, ignore_index=..., label_smoothing=..., reduction=...)
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import exp_nonpositive
from .reductions import (
    add_up,
    class_weight,
    gradient_scale,
    loss_of_rows,
    mean_divisor,
    read_rows,
    store_loss,
)
from .row_terms import gradient, lse_terms, smoothing_terms, target_terms
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
    number,
    row_block,
    store_tile,
    strided_rows,
)

# ---- rows that fit into registers ----------------------------------------------------------------


@triton.jit(do_not_specialize=["denominator"])
def row_kernel(
    inputs,
    targets,
    denominator,
    grad_output,
    loss,
    gradients,
    n,
    classes,
    strides,
    numbers,
    UNREDUCED: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Computes the loss of class indices for n rows of at most BLOCK contiguous classes.

    With STAGES > 1 there are fewer programs than tiles of rows: each loads the rows of its next
    tiles while it computes one.

    Its arguments are those of `two_pass_kernel`, without probabilities.
    """
    logits, grad, classes = inputs[0], gradients[0], multiple(classes, UNITS[1])
    A: tl.constexpr = tl.float64 if logits.dtype.element_ty == tl.float64 else tl.float32
    EXACT: tl.constexpr = logits.dtype.element_ty.primitive_bitwidth > 16
    smoothing = None if numbers[0] is None else number(numbers[0], A)
    scale = None if numbers[3] is None else number(numbers[3], A)
    if denominator is not None:
        denominator = mean_divisor(denominator, targets, n, classes)
    c = tl.arange(0, BLOCK)
    mask = (c < classes)[None, :]
    losses = tl.zeros([ROWS], A)
    stored = tl.zeros([ROWS], tl.int1)  # rows whose gradient is stored, except at the target
    of_target, at_target = losses, tl.zeros([ROWS], tl.int64)
    for tile in tl.range(tl.program_id(0), tl.cdiv(n, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = tile * ROWS + tl.arange(0, ROWS)
        in_bounds = rows < n
        label, valid, invalid, target_weight, loss_scale = read_rows(
            targets, denominator, rows, in_bounds, classes, A
        )
        x_rows = contiguous_rows(logits, rows, strides[1], UNITS)
        if STAGES > 1:  # loads do not wait for the targets
            x = load_tile(x_rows, c, mask & in_bounds[:, None], -float("inf"), scale)
            x = tl.where(valid[:, None], x, -float("inf"))
        else:
            x = load_tile(x_rows, c, mask & valid[:, None], -float("inf"), scale)
        target_logit = load_scaled(x_rows[0] + label, valid, 0.0, scale)

        maximum = finite_or_zero(tl.max(x, 1))
        x -= maximum[:, None]
        e = exp_nonpositive(x, EXACT)
        total = tl.sum(e, 1)
        log_total = tl.log(total)
        value, slope, t = target_terms(
            maximum, log_total, target_logit, target_weight, targets[1], numbers
        )
        s = tl.zeros([ROWS], A)
        if smoothing is not None:
            sum_of_x = tl.sum(tl.where(mask, x, 0.0), 1)
            of_smoothing, share = smoothing_terms(sum_of_x, log_total, classes, smoothing)
            value += of_smoothing
        if grad is not None:
            if STAGES > 1:  # after the barriers of the sums
                tl.store(grad + at_target, of_target, mask=stored)
            grad_scale = gradient_scale(loss_scale, grad_output, rows, valid, UNREDUCED)
            grad_scale = tl.where(valid, grad_scale if scale is None else grad_scale * scale, 0.0)
            a = tl.where(valid, slope * grad_scale / total, 0.0)
            if smoothing is not None:
                s = share * grad_scale
            e_target = exp_nonpositive(target_logit - maximum, EXACT)
            of_target = gradient(e_target, a, s, t * grad_scale)
            if STAGES == 1:  # inplace: threads read the target logit before it is overwritten
                tl.debug_barrier()
            to = contiguous_rows(grad, rows, strides[4], UNITS)
            of_others = gradient(e, a[:, None], s[:, None], 0.0)
            store_tile(to, c, mask & in_bounds[:, None], of_others)
            at_target, stored = rows.to(tl.int64) * strides[4] + label, valid
        value = loss_of_rows(value, loss_scale, valid, invalid)
        if UNREDUCED and loss is not None:
            tl.store(loss + rows, value, mask=in_bounds)
        losses += tl.where(in_bounds, value, 0.0)
    if grad is not None:
        tl.debug_barrier()
        tl.store(grad + at_target, of_target, mask=stored)
    if loss is not None and not UNREDUCED:
        add_up(tl.sum(losses), loss)


# ---- long rows, other strides, class probabilities -----------------------------------------------


@triton.jit
def soft_targets(y_rows, weight, c, mask, classes, smoothing):
    """Returns q_c without the [c = t] term of class indices; 0 outside of the mask."""
    q = 0.0 if smoothing is None else smoothing / classes
    if y_rows is not None:
        y = load_tile(y_rows, c, mask, 0.0)
        q += y if smoothing is None else (1.0 - smoothing) * y
    return tl.where(mask, q * class_weight(weight, c, classes, 0), 0.0)


@triton.jit
def sum_of_soft_targets(
    y_rows, weight, in_bounds, classes, smoothing, A: tl.constexpr, BLOCK: tl.constexpr
):
    """Returns the sum of the `soft_targets` of each row."""
    sums = tl.zeros([in_bounds.shape[0], BLOCK], A)
    for start in range(0, classes, BLOCK):
        c, mask = class_block(start, classes, in_bounds, BLOCK)
        sums += soft_targets(y_rows, weight, c, mask, classes, smoothing)
    return tl.sum(sums, 1)


@triton.jit
def logit_gradient(y, c, s, terms, EXACT: tl.constexpr):
    """Returns the gradient of the logits of classes c, 0 in rows that are not valid.

    y, s: x_c - maximum, and the scaled `soft_targets`.
    terms: the label of each row, whether it is valid, a, and t or None.
    """
    label, valid, a, t = terms
    at_target = 0.0
    if t is not None:
        at_target = tl.where(c[None, :] == label[:, None], t[:, None], 0.0)
    dx = gradient(exp_nonpositive(y, EXACT), a[:, None], s, at_target)
    return tl.where(valid[:, None], dx, 0.0)


@triton.jit
def second_pass(rows, masks, state, scales, terms, weight, classes, numbers, BLOCK: tl.constexpr):
    """Stores the gradients; returns sum_c q_c (lse - x_c) with `soft_targets` q_c.

    rows: logits, probabilities, and their gradients; each but the first may be None.
    masks: which rows are in bounds, and of which logits are loaded.
    state: the maximum of each row, and the logarithm of its sum.
    scales: the factors of the gradients of logits and of probabilities.
    terms: see `logit_gradient`.
    """
    x_rows, y_rows, grad_rows, grad_y_rows = rows
    in_bounds, loaded = masks
    maximum, log_total = state
    A: tl.constexpr = maximum.dtype
    EXACT: tl.constexpr = x_rows[0].dtype.element_ty.primitive_bitwidth > 16
    smoothing = None if numbers[0] is None else number(numbers[0], A)
    scale = None if numbers[3] is None else number(numbers[3], A)
    distance = tl.zeros([in_bounds.shape[0], BLOCK], A)
    for start in range(0, classes, BLOCK):
        c, mask = class_block(start, classes, in_bounds, BLOCK)
        x = load_tile(x_rows, c, mask & loaded[:, None], 0.0, scale, DROP) - maximum[:, None]
        s = 0.0
        if y_rows is not None or smoothing is not None:
            q = soft_targets(y_rows, weight, c, mask, classes, smoothing)
            neg_log_p = log_total[:, None] - x
            distance += tl.where(mask, q * neg_log_p, 0.0)
            s = q * scales[0][:, None]
        if grad_rows is not None:
            store_tile(grad_rows, c, mask, logit_gradient(x, c, s, terms, EXACT), DROP)
        if grad_y_rows is not None:
            w = class_weight(weight, c, classes, 0)
            if smoothing is not None:
                w *= 1.0 - smoothing
            dy = neg_log_p * w * scales[1][:, None]
            store_tile(grad_y_rows, c, mask, tl.where(terms[1][:, None], dy, 0.0))
    return tl.sum(distance, 1)


@triton.jit(do_not_specialize=["denominator"])
def two_pass_kernel(
    inputs,
    targets,
    denominator,
    grad_output,
    loss,
    gradients,
    inner,
    classes,
    strides,
    numbers,
    UNREDUCED: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Computes the loss of class indices or class probabilities, for any strides.

    inputs, gradients: the logits and class probabilities, which are None with class indices, and
        their gradients or None.
    strides: the outer, inner and class strides of logits and their gradient, and of probabilities
        and their gradient.
    VECTOR: the elements of 16 bytes, to load unaligned rows in aligned vectors; 0 for other rows.
        Needs contiguous classes, one outer index, ROWS = 1, class indices, no smoothing, and the
        same row stride in logits and gradient.
    """
    logits, grad, weight = inputs[0], gradients[0], targets[1]
    A: tl.constexpr = tl.float64 if logits.dtype.element_ty == tl.float64 else tl.float32
    EXACT: tl.constexpr = logits.dtype.element_ty.primitive_bitwidth > 16
    INDICES: tl.constexpr = inputs[1] is None
    DENSE: tl.constexpr = not INDICES or numbers[0] is not None
    smoothing = None if numbers[0] is None else number(numbers[0], A)
    scale = None if numbers[3] is None else number(numbers[3], A)
    outer, lanes, in_bounds, inner, classes = row_block(inner, classes, ROWS, UNITS)
    rows = outer * inner + lanes
    y_rows, grad_rows, grad_y_rows, edges, t = None, None, None, None, None
    if not INDICES:
        y_rows = strided_rows(inputs[1], outer, lanes, strides, 6, UNITS)
    if gradients[1] is not None:
        grad_y_rows = strided_rows(gradients[1], outer, lanes, strides, 9, UNITS)
    if denominator is not None:
        n = tl.num_programs(0) // tl.cdiv(inner, ROWS) * inner
        denominator = mean_divisor(denominator, targets, n, classes)
    label, valid, invalid, target_weight, loss_scale = read_rows(
        targets, denominator, rows, in_bounds, classes, A
    )
    label = label.to(tl.int32)
    if VECTOR:  # pointers and class indices are relative to the row's first aligned vector
        start = tl.program_id(0).to(tl.int64) * strides[1]
        first, before, classes, edge, at_edge = aligned_part(start, classes, VECTOR)
        logits, label, outer, lanes = logits + first, label - before, outer * 0, lanes * 0
        if grad is not None:
            grad += first
    x_rows = strided_rows(logits, outer, lanes, strides, 0, UNITS)
    if grad is not None:
        grad_rows = strided_rows(grad, outer, lanes, strides, 3, UNITS)
    if INDICES:
        at_target = x_rows[0] + label.to(tl.int64) * x_rows[1]
        target_logit = load_scaled(at_target, valid, 0.0, scale)
    loaded = valid if ROWS == 1 else in_bounds  # a mask per row would prevent vectorised loads
    if VECTOR:
        edges = load_tile(x_rows, edge, at_edge & loaded[:, None], -float("inf"), scale)
    maximum, total = first_pass(x_rows, classes, loaded, BLOCK, scale, edges)
    log_total = tl.log(total)
    if INDICES:
        value, slope, t = target_terms(
            maximum, log_total, target_logit, target_weight, weight, numbers
        )
    else:
        value, slope = lse_terms(maximum + log_total, numbers)
    if DENSE and grad is not None and not (INDICES and weight is None):
        slope += sum_of_soft_targets(y_rows, weight, in_bounds, classes, smoothing, A, BLOCK)
    if DENSE or grad is not None:
        target_scale = gradient_scale(loss_scale, grad_output, rows, in_bounds, UNREDUCED)
        grad_scale = target_scale if scale is None else target_scale * scale
        a, t = slope * grad_scale / total, t * grad_scale if INDICES else None
        terms = label, valid, a, t
        tl.debug_barrier()  # inplace: wait for the loads before overwriting
        if VECTOR:
            of_edges = logit_gradient(edges - maximum[:, None], edge, 0.0, terms, EXACT)
            store_tile(grad_rows, edge, at_edge, of_edges)
        x, scales = (x_rows, y_rows, grad_rows, grad_y_rows), (grad_scale, target_scale)
        masks, state = (in_bounds, loaded), (maximum, log_total)
        distance = second_pass(x, masks, state, scales, terms, weight, classes, numbers, BLOCK)
        if DENSE:
            value += distance
    store_loss(loss, value, loss_scale, rows, in_bounds, valid, invalid, UNREDUCED)
