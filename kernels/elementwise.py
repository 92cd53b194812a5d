"""Pointwise losses and activations: one kernel, specialized by the formula.

    loss            reduce(w f(x, t)),    reduce: each element, or the sum / denominator
                    grad_x = g w df/dx,   g = grad_output, / denominator
                    grad_t = g w df/dt
    activation      y = f(x)
      its gradient  dx = f'(saved) dy,    a formula of dy and the saved tensor, x or y

Shapes: all tensors have one shape. Operands may be strided or broadcast; outputs are dense.
Bytes: each operand and w are read once, each output is written once.

A formula maps four operands, the parameters and scale = 1 / denominator to a value and the
gradient of each operand; the compiler eliminates outputs that are not stored. It multiplies by
scale before steps that may overflow. `program.py` generates it.

torch: (w * F.mse_loss(x, t, reduction="none")).sum() / denominator, or F.gelu(x)
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import widened
from .reductions import add_up


@triton.jit
def read(tensor, k: tl.constexpr, i, n, columns, strides):
    """Loads elements i of operand k as float32 or float64; 0 for i >= n; None if tensor is None.

    The operand is dense if columns is None. Otherwise it is rows x columns; `strides` has a pair
    of strides for each operand, which are 0 in broadcast dimensions.
    """
    value = None
    if tensor is not None:
        mask = i < n
        if columns is not None:
            i = i.to(n.dtype)  # 64-bit division only for 2**31 or more elements
            row, column = (i // columns).to(tl.int64), (i % columns).to(tl.int64)
            i = row * strides[2 * k] + column * strides[2 * k + 1]
        value = widened(tl.load(tensor + i, mask=mask, other=0.0))
    return value


@triton.jit(do_not_specialize=["denominator"])
def elementwise_kernel(
    operands,
    weight,
    grad_output,
    value,
    gradients,
    n,
    columns,
    strides,
    p: tl.float64,
    q: tl.float64,
    r: tl.float64,
    parts,
    denominator,
    FORMULA: tl.constexpr,
    UNREDUCED: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Computes the value and the gradients that are not None.

    operands, gradients: tuples of four, padded by None.
    value: UNREDUCED, the loss of each element, which may alias an operand; else the tensors that
        `add_up` takes.
    parts: the parameters after p, q and r, encoded by `parts_of`.
    denominator: None for 1, an integer, or a pointer to a number on the GPU.
    """
    dtype: tl.constexpr = tl.float64 if operands[0].dtype.element_ty == tl.float64 else tl.float32
    factor = tl.full([], 1.0, tl.float64)
    if denominator is not None:
        factor /= tl.load(denominator) if denominator.dtype.is_ptr() else denominator
    scale = factor.to(dtype)
    numbers = tl.full([], p, tl.float64), tl.full([], q, tl.float64), tl.full([], r, tl.float64)
    total = tl.zeros([BLOCK], dtype)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    stop, step = n, tl.num_programs(0).to(tl.int64) * BLOCK
    if UNREDUCED:  # there are as many programs as blocks
        stop, step = first + 1, BLOCK
    for start in range(first, stop, step):
        i = start + tl.arange(0, BLOCK)
        mask = i < n
        a = read(operands[0], 0, i, n, columns, strides)
        b = read(operands[1], 1, i, n, columns, strides)
        c = read(operands[2], 2, i, n, columns, strides)
        d = read(operands[3], 3, i, n, columns, strides)
        w = read(weight, 4, i, n, columns, strides)
        g = read(grad_output, 5, i, n, columns, strides)
        results = FORMULA(a, b, c, d, numbers, parts, scale, EXACT)
        if value is not None:
            weighted = results[0] if weight is None else results[0] * w
            if UNREDUCED:
                tl.store(value + i, weighted, mask=mask)
            else:
                total += tl.where(mask, weighted, 0.0)
        for k in tl.static_range(4):
            if gradients[k] is not None:
                gradient = results[k + 1] if weight is None else results[k + 1] * w
                gradient = gradient if grad_output is None else gradient * g
                tl.store(gradients[k] + i, gradient, mask=mask)
    if value is not None and not UNREDUCED:
        add_up(tl.sum(total).to(tl.float64) * factor, value)
