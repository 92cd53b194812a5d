"""The divergence between student logits x and teacher logits y, and its gradient.

    p = softmax(scale x), q = softmax(scale y), m = beta q + (1 - beta) p
    beta 0     loss = sum_c q_c s_c,                                 s_c = log q_c - log p_c
               dloss/dx_c = scale (p_c - q_c)
    beta 1     loss = sum_c p_c r_c,                                 r_c = log p_c - log q_c
               dloss/dx_c = scale p_c (r_c - loss)
    otherwise  loss = sum_c beta q_c s_c + (1 - beta) p_c r_c,       r_c = log p_c - log m_c
               dloss/dx_c = (1 - beta) scale p_c (r_c - sum_k p_k r_k),   s_c = log q_c - log m_c

0 log 0 is 0. The loss and the gradient of a row are multiplied by its token weight, and divided by
the denominator of a mean.

Shapes: (n, C) with contiguous classes. Bytes: x and y are read twice, or three times for the
gradient with beta > 0, mostly from cache after the first time; the gradient is written once.

torch: F.kl_div(F.log_softmax(x, -1), F.log_softmax(y, -1), log_target=True) for beta 0
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import exp_nonpositive, log
from .reductions import divided, gradient_scale, store_loss, weight_at
from .rows import class_block, contiguous_rows, first_pass, load_tile, number, row_block, store_rows

FORWARD, REVERSE, MIXTURE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def log_softmax(logits, c, mask, EXACT: tl.constexpr, scale):
    """Returns probabilities and their logarithms; 0 and -inf outside of the mask.

    logits: the rows, and the results of `first_pass`.
    """
    rows, state = logits
    maximum, total = state
    x = load_tile(rows, c, mask, -float("inf"), scale) - maximum[:, None]
    return exp_nonpositive(x, EXACT) * (1.0 / total)[:, None], x - log(total)[:, None]


@triton.jit
def terms(student, teacher, c, mask, beta, KIND: tl.constexpr, EXACT: tl.constexpr, scale):
    """Returns p, q, s and r of a tile; 0 for probabilities outside of the mask."""
    p, log_p = log_softmax(student, c, mask, EXACT, scale)
    q, log_q = log_softmax(teacher, c, mask, EXACT, scale)
    s, r = log_q - log_p, log_p - log_q
    if KIND == MIXTURE:
        low = tl.full([], -1e30, log_p.dtype)  # -inf - -inf would be NaN
        difference = tl.where(log_p < low, low, log_p) - tl.where(log_q < low, low, log_q)
        ratio = exp_nonpositive(-tl.abs(difference), EXACT)
        more = difference >= 0.0
        of_m = tl.where(more, 1.0 - beta + beta * ratio, beta + (1.0 - beta) * ratio)
        log_of_m = log(of_m, EXACT=EXACT)
        s = tl.where(more, -difference, 0.0) - log_of_m
        r = tl.where(more, 0.0, difference) - log_of_m
    return p, q, s, r


@triton.jit(do_not_specialize=["denominator"])
def kl_div_kernel(
    student,
    teacher,
    token_weight,
    denominator,
    grad_output,
    loss,
    grad,
    n,
    classes,
    strides,
    numbers,
    KIND: tl.constexpr,
    UNREDUCED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Computes the divergence of n rows and its gradient; grad may alias student.

    strides: the row strides of student, teacher and grad.
    numbers: beta, and the scale of the logits or None.
    """
    A: tl.constexpr = tl.float64 if student.dtype.element_ty == tl.float64 else tl.float32
    EXACT: tl.constexpr = student.dtype.element_ty.primitive_bitwidth > 16
    _, rows, in_bounds, _, classes = row_block(n, classes, ROWS, UNITS)
    beta, scale = number(numbers[0], A), None if numbers[1] is None else number(numbers[1], A)
    loss_scale = weight_at(token_weight, rows, in_bounds, A)
    counted = in_bounds & (loss_scale != 0.0)
    loss_scale = divided(loss_scale, denominator)
    read = counted if ROWS == 1 else in_bounds  # a mask per row would prevent vectorised loads
    x_rows = contiguous_rows(student, rows, strides[0], UNITS)
    y_rows = contiguous_rows(teacher, rows, strides[1], UNITS)
    of_x = x_rows, first_pass(x_rows, classes, read, BLOCK, scale)
    of_y = y_rows, first_pass(y_rows, classes, read, BLOCK, scale)
    grad_scale = loss_scale if scale is None else loss_scale * scale
    grad_scale = gradient_scale(grad_scale, grad_output, rows, in_bounds, UNREDUCED)
    of_teacher, of_student = tl.zeros([ROWS, BLOCK], A), tl.zeros([ROWS, BLOCK], A)
    tl.debug_barrier()  # inplace: all threads have finished the first pass
    for start in range(0, classes, BLOCK):
        c, mask = class_block(start, classes, in_bounds, BLOCK)
        p, q, s, r = terms(of_x, of_y, c, mask & read[:, None], beta, KIND, EXACT, scale)
        of_teacher += tl.where(q == 0.0, 0.0, q * s)
        of_student += tl.where(p == 0.0, 0.0, p * r)
        if KIND == FORWARD:
            gradient = tl.where(counted[:, None], (p - q) * grad_scale[:, None], 0.0)
            store_rows(grad, rows, strides[2], c, mask, gradient, UNITS)
    value = tl.sum(of_teacher, 1)
    if KIND != FORWARD:
        mean = tl.sum(of_student, 1)
        share = 1.0 if KIND == REVERSE else 1.0 - beta
        value = mean if KIND == REVERSE else beta * value + share * mean
        if grad is not None:
            for start in range(0, classes, BLOCK):
                c, mask = class_block(start, classes, in_bounds, BLOCK)
                p, q, s, r = terms(of_x, of_y, c, mask & read[:, None], beta, KIND, EXACT, scale)
                gradient = p * (r - mean[:, None]) * (share * grad_scale)[:, None]
                gradient = tl.where(counted[:, None] & (p != 0.0), gradient, 0.0)
                store_rows(grad, rows, strides[2], c, mask, gradient, UNITS)
    store_loss(loss, value, loss_scale, rows, in_bounds, counted, None, UNREDUCED)
