"""Pointwise losses: one kernel, specialized by the formula.

    loss   = reduce(w f(x, t)),       reduce: each element, or the sum / denominator
    grad_x = g w df/dx,               g = grad_output, / denominator
    grad_t = g w df/dt

Shapes: all tensors have one shape. Operands may be strided or broadcast; outputs are dense.
Bytes: each operand and w are read once, each needed gradient is written once.

A formula maps four operands, the parameters and scale = 1 / denominator to the loss and the
gradient of each operand; the compiler eliminates outputs that are not stored. It multiplies by
scale before steps that may overflow. `program.py` generates it.

torch: (w * F.mse_loss(x, t, reduction="none")).sum() / denominator
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import read
from .reductions import add_up


@triton.jit(do_not_specialize=["denominator"])
def pointwise_loss_kernel(
    x,
    t,
    third,
    weight,
    grad_output,
    loss,
    grad_x,
    grad_t,
    grad_third,
    fourth,
    grad_fourth,
    n,
    columns,
    strides,
    p: tl.float64,
    q: tl.float64,
    r: tl.float64,
    parts,
    denominator,
    FORMULA: tl.constexpr,
    REDUCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Computes the loss and the gradients that are not None.

    loss: a tensor of losses, or with REDUCE the tensors that `add_up` takes.
    parts: the parameters after p, q and r, encoded by `parts_of`.
    denominator: None for 1, an integer, or a pointer to a number on the GPU.
    """
    dtype: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    divisor = tl.full([], 1.0, tl.float64)
    if denominator is not None:
        divisor *= tl.load(denominator) if denominator.dtype.is_ptr() else denominator
    scale = (1.0 / divisor).to(dtype)
    numbers = tl.full([], p, tl.float64), tl.full([], q, tl.float64), tl.full([], r, tl.float64)
    total = tl.zeros([BLOCK], dtype)
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, step):
        i = start + tl.arange(0, BLOCK)
        mask = i < n
        a = read(x, 0, i, n, columns, strides)
        b = read(t, 1, i, n, columns, strides)
        c = read(third, 2, i, n, columns, strides)
        w = read(weight, 3, i, n, columns, strides)
        g = read(grad_output, 4, i, n, columns, strides)
        d = read(fourth, 5, i, n, columns, strides)
        value, by_x, by_t, by_third, by_fourth = FORMULA(a, b, c, d, numbers, parts, scale, True)
        if weight is not None:
            value *= w
        if REDUCE:
            total += tl.where(mask, value, 0.0)
        elif loss is not None:
            tl.store(loss + i, value, mask=mask)
        store_gradient(grad_x, i, mask, by_x, w, g)
        store_gradient(grad_t, i, mask, by_t, w, g)
        store_gradient(grad_third, i, mask, by_third, w, g)
        store_gradient(grad_fourth, i, mask, by_fourth, w, g)
    if REDUCE:
        add_up(tl.sum(total).to(tl.float64) / divisor, loss)


@triton.jit
def store_gradient(out, i, mask, gradient, weight, grad_output):
    if out is not None:
        if weight is not None:
            gradient *= weight
        if grad_output is not None:
            gradient *= grad_output
        tl.store(out + i, gradient, mask=mask)
