"""The negative log-likelihood of class indices t, given log-probabilities x.

    loss       = -weight_t x_t / denominator
    dloss/dx_c = -weight_t [c = t] grad_output / denominator

Shapes: x is (outer, classes, inner) with any strides. Bytes: one element per row is read, and one
element of the gradient is written, which has been filled with zeros.

torch: F.nll_loss(x, t, weight, ignore_index=..., reduction=...)
"""

from __future__ import annotations

import triton
import triton.language as tl

from .reductions import gradient_scale, read_rows, store_loss


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
    """Computes the loss and the gradient of n = outer * inner rows.

    x_strides, grad_strides: the outer, inner and class strides.
    """
    A: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_bounds = rows < n
    label, valid, invalid, target_weight, scale = read_rows(
        target, weight, None, denominator, rows, in_bounds, n, classes, ignore_index, A
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
