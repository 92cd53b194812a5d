"""Activations: one formula each, shared by all element types and layouts.

    forward   y = f(x)          reads x, writes y
    backward  dx = f'(y) dy     reads y and dy, writes dx

Shapes: operands are seen as rows x columns with strides; outputs are dense. Bytes: as above, once.

torch: F.relu(x), F.leaky_relu(x, slope), F.sigmoid(x), F.tanh(x), F.silu(x), F.gelu(x)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import launch
from .arithmetic import Operand, exp_nonpositive, polynomial, reach, read, sigmoid, tanh


@triton.jit
def relu(x, _p, _exact):
    """NaN and -0.0 pass."""
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def relu_backward(grad_output, output, _p, _exact):
    """The gradient passes where the output is NaN."""
    return tl.where(output <= 0.0, 0.0, grad_output)


@triton.jit
def leaky_relu(x, slope, _exact):
    return tl.where(x > 0.0, x, x * slope)


@triton.jit
def leaky_relu_backward(grad_output, output, slope, _exact):
    """The output has the input's sign, as the slope is not negative."""
    return tl.where(output > 0.0, grad_output, grad_output * slope)


@triton.jit
def sigmoid_of(x, _p, EXACT: tl.constexpr):
    return sigmoid(x, EXACT)


@triton.jit
def sigmoid_backward(grad_output, output, _p, _exact):
    return grad_output * (1.0 - output) * output


@triton.jit
def tanh_of(x, _p, EXACT: tl.constexpr):
    return tanh(x, EXACT)


@triton.jit
def tanh_backward(grad_output, output, _p, _exact):
    return grad_output * (1.0 - output * output)


@triton.jit
def capped(x, cap, EXACT: tl.constexpr):
    share = x / cap if EXACT else x * (1.0 / cap)
    return tanh(share, EXACT)


@triton.jit
def softcap(x, cap, EXACT: tl.constexpr):
    return cap * capped(x, cap, EXACT)


@triton.jit
def softcap_backward(grad_output, x, cap, EXACT: tl.constexpr):
    y = capped(x, cap, EXACT)
    return grad_output * (1.0 - y * y)


@triton.jit
def silu(x, _p, EXACT: tl.constexpr):
    return x * sigmoid(x, EXACT)


@triton.jit
def silu_backward(grad_output, x, _p, EXACT: tl.constexpr):
    y = sigmoid(x, EXACT)
    return grad_output * (y * (1.0 + x * (1.0 - y)))


@triton.jit
def normal_below(x, EXACT: tl.constexpr):
    """The share of the standard normal distribution below x.

    Where it is not exact, by a polynomial of the logarithm of that below -|x|: to 6e-6 of its own
    size near 0, where a result counts most, and 2e-4 at -13.
    """
    if EXACT:
        share = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
    else:
        size = tl.abs(x)
        logarithm = polynomial(
            tl.where(size > 16.0, 16.0, size),
            (
                -2.1101136393752995e-09,
                1.52696358668436e-07,
                -4.8365363909397274e-06,
                8.887462172424421e-05,
                -0.0010631720069795847,
                0.008865238167345524,
                -0.05447637662291527,
                -0.45810529589653015,
                -1.151343822479248,
                -0.9999914765357971,
            ),
        )
        tail = tl.exp2(logarithm)
        share = tl.where(x < 0.0, tail, 1.0 - tail)
    return share


@triton.jit
def gelu(x, _p, EXACT: tl.constexpr):
    return x * normal_below(x, EXACT)


@triton.jit
def gelu_backward(grad_output, x, _p, EXACT: tl.constexpr):
    density = 0.3989422804014327 * exp_nonpositive(-0.5 * x * x, EXACT)
    return grad_output * (normal_below(x, EXACT) + x * density)


@triton.jit
def gelu_tanh_share(x, EXACT: tl.constexpr):
    """(1 + tanh(u)) / 2 = sigmoid(2 u)"""
    return sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x), EXACT)


@triton.jit
def gelu_tanh(x, _p, EXACT: tl.constexpr):
    return x * gelu_tanh_share(x, EXACT)


@triton.jit
def gelu_tanh_backward(grad_output, x, _p, EXACT: tl.constexpr):
    y = gelu_tanh_share(x, EXACT)
    slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    return grad_output * (y + x * (y * (1.0 - y) * slope))


class Formula(NamedTuple):
    forward: Any
    backward: Any


FORMULAS = {
    "relu": Formula(relu, relu_backward),
    "leaky_relu": Formula(leaky_relu, leaky_relu_backward),
    "sigmoid": Formula(sigmoid_of, sigmoid_backward),
    "tanh": Formula(tanh_of, tanh_backward),
    "softcap": Formula(softcap, softcap_backward),
    "silu": Formula(silu, silu_backward),
    "gelu": Formula(gelu, gelu_backward),
    "gelu_tanh": Formula(gelu_tanh, gelu_tanh_backward),
}


@triton.jit
def activation_kernel(
    operands,
    out,
    n,
    columns,
    p: tl.float64,
    FORMULA: tl.constexpr,
    EXACT: tl.constexpr,
    A: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = FORMULA(*operands, p, EXACT), element by element; out may be an operand's memory."""
    i = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    p = tl.full([], p, A)
    x = read(operands[0], i, columns, mask, A)
    if len(operands) == 1:
        value = FORMULA(x, p, EXACT)
    else:
        value = FORMULA(x, read(operands[1], i, columns, mask, A), p, EXACT)
    tl.store(out + i, value, mask=mask)


@triton.jit(do_not_specialize=["blocks"])
def scale_kernel(
    tensor, factor, n, blocks, A: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr
):
    """tensor *= factor, blocks by turns; where the factor is 1 the tensor is not even read."""
    by = tl.load(factor).to(A)
    if by != 1.0:
        for block in range(tl.program_id(0).to(INDEX), blocks, tl.num_programs(0)):
            i = block * BLOCK + tl.arange(0, BLOCK)
            scaled = tl.load(tensor + i, mask=i < n).to(A) * by
            tl.store(tensor + i, scaled, mask=i < n)


def activation(
    formula: str,
    columns: int | None,
    parameter: float,
    operands: list[tuple[torch.Tensor, int, int]],
    out: torch.Tensor,
) -> None:
    """Launches out = f(*operands, parameter), forward of one operand and backward of two.

    Operands are as in `Operand`, out is dense.
    """
    n, elements = out.numel(), launch.POINTWISE[out.element_size()]
    activation_kernel[(launch.cdiv(n, elements.block),)](
        tuple(Operand(*operand) for operand in operands),
        out,
        n,
        columns,
        parameter,
        FORMULAS[formula][len(operands) - 1],
        EXACT=out.element_size() > 2,
        A=launch.accumulate_type(out.dtype),
        INDEX=launch.index_type(*reach(columns, operands)),
        BLOCK=elements.block,
        **launch.options(elements.threads),
    )


def scale(tensor: torch.Tensor, factor: torch.Tensor) -> None:
    """Launches tensor *= factor."""
    n, elements = tensor.numel(), launch.POINTWISE[tensor.element_size()]
    blocks = launch.cdiv(n, elements.block)
    scale_kernel[(min(blocks, launch.MOST_PROGRAMS),)](
        tensor,
        factor,
        n,
        blocks,
        A=launch.accumulate_type(tensor.dtype),
        INDEX=launch.index_type(n),
        BLOCK=elements.block,
        **launch.options(elements.threads),
    )
