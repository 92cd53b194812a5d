"""Activations: one kernel, specialized by the formula, for all dtypes and layouts.

    forward     y = f(x)              reads x, writes y
    backward    dx = f'(x) dy         reads dy and the saved tensor, x or y; writes dx

Shapes: all tensors have one shape. Operands may be strided or broadcast; outputs are dense.
Bytes: each operand is read once, each output is written once.

`program.py` generates the formulas; a backward formula takes dy and the saved tensor.

torch: F.relu(x), F.leaky_relu(x, slope), F.sigmoid(x), F.tanh(x), F.silu(x), F.gelu(x)
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import read


@triton.jit
def activation_kernel(
    x,
    grad_output,
    out,
    n,
    columns,
    strides,
    p: tl.float64,
    q: tl.float64,
    r: tl.float64,
    FORMULA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Computes out = FORMULA(x), or FORMULA(grad_output, x), with parameters p, q and r.

    out may alias x.
    """
    exact: tl.constexpr = x.dtype.element_ty.primitive_bitwidth > 16
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    saved = read(x, 0, i, n, columns, strides)
    numbers = tl.full([], p, tl.float64), tl.full([], q, tl.float64), tl.full([], r, tl.float64)
    first, second = saved, None
    if grad_output is not None:
        first, second = read(grad_output, 1, i, n, columns, strides), saved
    one = tl.full([], 1.0, tl.float32)
    value, _, _, _, _ = FORMULA(first, second, None, None, numbers, None, one, exact)
    tl.store(out + i, value, mask=i < n)
