"""Activations: one formula each, shared by all element types and layouts.

    forward     y = f(x)              reads x, writes y
    backward    dx = f'(x) dy         reads dy and, as f saves it, x or y; writes dx

Shapes: all of one shape. Operands may be strided or broadcast, outputs are dense.
Bytes: each operand is read once, each output written once.

A formula takes its operands, three parameters p, q and r, and EXACT, which is False where the
result is rounded to half precision.

torch: F.relu(x), F.leaky_relu(x, slope), F.sigmoid(x), F.tanh(x), F.silu(x), F.gelu(x)
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import exp_nonpositive, polynomial, read, sigmoid, tanh


@triton.jit
def relu(x, _p, _q, _r, _exact):
    """NaN and -0.0 pass."""
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def relu_backward(grad_output, output, _p, _q, _r, _exact):
    """The gradient passes where the output is NaN."""
    return tl.where(output <= 0.0, 0.0, grad_output)


@triton.jit
def leaky_relu(x, slope, _q, _r, _exact):
    return tl.where(x > 0.0, x, x * slope)


@triton.jit
def leaky_relu_backward(grad_output, output, slope, _q, _r, _exact):
    """The output has the input's sign, as the slope is not negative."""
    return tl.where(output > 0.0, grad_output, grad_output * slope)


@triton.jit
def sigmoid_of(x, _p, _q, _r, EXACT: tl.constexpr):
    return sigmoid(x, EXACT)


@triton.jit
def sigmoid_backward(grad_output, output, _p, _q, _r, _exact):
    return grad_output * (1.0 - output) * output


@triton.jit
def tanh_of(x, _p, _q, _r, EXACT: tl.constexpr):
    return tanh(x, EXACT)


@triton.jit
def tanh_backward(grad_output, output, _p, _q, _r, _exact):
    return grad_output * (1.0 - output * output)


@triton.jit
def tanh_of_ratio(x, cap, EXACT: tl.constexpr):
    ratio = x / cap if EXACT else x * (1.0 / cap)
    return tanh(ratio, EXACT)


@triton.jit
def softcap(x, cap, _q, _r, EXACT: tl.constexpr):
    return cap * tanh_of_ratio(x, cap, EXACT)


@triton.jit
def softcap_backward(grad_output, x, cap, _q, _r, EXACT: tl.constexpr):
    y = tanh_of_ratio(x, cap, EXACT)
    return grad_output * (1.0 - y * y)


@triton.jit
def silu(x, _p, _q, _r, EXACT: tl.constexpr):
    return x * sigmoid(x, EXACT)


@triton.jit
def silu_backward(grad_output, x, _p, _q, _r, EXACT: tl.constexpr):
    y = sigmoid(x, EXACT)
    return grad_output * (y * (1.0 + x * (1.0 - y)))


@triton.jit
def normal_cdf(x, EXACT: tl.constexpr):
    """The cumulative distribution function of the standard normal distribution.

    Unless EXACT by a polynomial that approximates log2 of the tail below -|x|: to a relative error
    of 6e-6 near 0, where results are large, and 2e-4 at -13.
    """
    if EXACT:
        cdf = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
    else:
        size = tl.abs(x)
        log2_tail = polynomial(
            tl.where(size > 16.0, 16.0, size),
            (-2.11011364e-09, 1.52696359e-07, -4.83653639e-06, 8.88746217e-05, -0.00106317201,
             0.00886523817, -0.0544763766, -0.458105296, -1.15134382, -0.999991477),
        )  # fmt: skip
        tail = tl.exp2(log2_tail)
        cdf = tl.where(x < 0.0, tail, 1.0 - tail)
    return cdf


@triton.jit
def gelu(x, _p, _q, _r, EXACT: tl.constexpr):
    return x * normal_cdf(x, EXACT)


@triton.jit
def gelu_backward(grad_output, x, _p, _q, _r, EXACT: tl.constexpr):
    density = 0.3989422804014327 * exp_nonpositive(-0.5 * x * x, EXACT)
    return grad_output * (normal_cdf(x, EXACT) + x * density)


@triton.jit
def tanh_cdf(x, EXACT: tl.constexpr):
    """(1 + tanh(u)) / 2 = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x**3)"""
    return sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x), EXACT)


@triton.jit
def gelu_tanh(x, _p, _q, _r, EXACT: tl.constexpr):
    return x * tanh_cdf(x, EXACT)


@triton.jit
def gelu_tanh_backward(grad_output, x, _p, _q, _r, EXACT: tl.constexpr):
    y = tanh_cdf(x, EXACT)
    slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    return grad_output * (y + x * (y * (1.0 - y) * slope))


FORMULAS = {
    "relu": (relu, relu_backward),
    "leaky_relu": (leaky_relu, leaky_relu_backward),
    "sigmoid": (sigmoid_of, sigmoid_backward),
    "tanh": (tanh_of, tanh_backward),
    "softcap": (softcap, softcap_backward),
    "silu": (silu, silu_backward),
    "gelu": (gelu, gelu_backward),
    "gelu_tanh": (gelu_tanh, gelu_tanh_backward),
}


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
    """out = FORMULA(x, p, q, r), or FORMULA(grad_output, x, p, q, r); out may alias x."""
    exact: tl.constexpr = x.dtype.element_ty.primitive_bitwidth > 16
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    saved = read(x, 0, i, n, columns, strides)
    dtype: tl.constexpr = saved.dtype
    p, q, r = tl.full([], p, dtype), tl.full([], q, dtype), tl.full([], r, dtype)
    if grad_output is None:
        value = FORMULA(saved, p, q, r, exact)
    else:
        value = FORMULA(read(grad_output, 1, i, n, columns, strides), saved, p, q, r, exact)
    tl.store(out + i, value, mask=i < n)
