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
from .arithmetic import Operand, exp_nonpositive, reach, read, sigmoid, tanh


@triton.jit
def relu(x, _p):
    """NaN and -0.0 pass."""
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def relu_backward(grad_output, output, _p):
    """The gradient passes where the output is NaN."""
    return tl.where(output <= 0.0, 0.0, grad_output)


@triton.jit
def leaky_relu(x, slope):
    return tl.where(x > 0.0, x, x * slope)


@triton.jit
def leaky_relu_backward(grad_output, output, slope):
    """The output has the input's sign, as the slope is not negative."""
    return tl.where(output > 0.0, grad_output, grad_output * slope)


@triton.jit
def sigmoid_of(x, _p):
    return sigmoid(x)


@triton.jit
def sigmoid_backward(grad_output, output, _p):
    return grad_output * (1.0 - output) * output


@triton.jit
def tanh_of(x, _p):
    return tanh(x)


@triton.jit
def tanh_backward(grad_output, output, _p):
    return grad_output * (1.0 - output * output)


@triton.jit
def softcap(x, cap):
    return cap * tanh(x / cap)


@triton.jit
def softcap_backward(grad_output, x, cap):
    y = tanh(x / cap)
    return grad_output * (1.0 - y * y)


@triton.jit
def silu(x, _p):
    return x * sigmoid(x)


@triton.jit
def silu_backward(grad_output, x, _p):
    y = sigmoid(x)
    return grad_output * (y * (1.0 + x * (1.0 - y)))


@triton.jit
def normal_below(x):
    """The share of the standard normal distribution below x."""
    return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)


@triton.jit
def gelu(x, _p):
    return x * normal_below(x)


@triton.jit
def gelu_backward(grad_output, x, _p):
    density = 0.3989422804014327 * exp_nonpositive(-0.5 * x * x)
    return grad_output * (normal_below(x) + x * density)


@triton.jit
def gelu_tanh_share(x):
    """(1 + tanh(u)) / 2 = sigmoid(2 u)"""
    return sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def gelu_tanh(x, _p):
    return x * gelu_tanh_share(x)


@triton.jit
def gelu_tanh_backward(grad_output, x, _p):
    y = gelu_tanh_share(x)
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
    A: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = FORMULA(*operands, p), element by element; out may be an operand's memory."""
    i = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    p = tl.full([], p, A)
    x = read(operands[0], i, columns, mask, A)
    if len(operands) == 1:
        value = FORMULA(x, p)
    else:
        value = FORMULA(x, read(operands[1], i, columns, mask, A), p)
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
