"""Activations: one formula each, shared by all element types and layouts.

    forward   y = f(x)          reads x, writes y
    backward  dx = f'(y) dy     reads y and dy, writes dx

Shapes: operands are seen as rows x columns with strides; outputs are dense. Bytes: as above, once.

torch: F.relu(x), F.sigmoid(x)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import launch
from .arithmetic import Operand, reach, read, sigmoid


@triton.jit
def relu(x):
    """NaN and -0.0 pass."""
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def relu_backward(grad_output, output):
    """The gradient passes where the output is NaN."""
    return tl.where(output <= 0.0, 0.0, grad_output)


@triton.jit
def sigmoid_backward(grad_output, output):
    return grad_output * (1.0 - output) * output


FORMULAS = {
    "relu": relu,
    "relu_backward": relu_backward,
    "sigmoid": sigmoid,
    "sigmoid_backward": sigmoid_backward,
}


@triton.jit
def activation_kernel(
    operands,
    out,
    n,
    columns,
    FORMULA: tl.constexpr,
    A: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = FORMULA(*operands), element by element; out may be an operand's memory."""
    i = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    x = read(operands[0], i, columns, mask, A)
    if len(operands) == 1:
        value = FORMULA(x)
    else:
        value = FORMULA(x, read(operands[1], i, columns, mask, A))
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
    operands: list[tuple[torch.Tensor, int, int]],
    out: torch.Tensor,
) -> None:
    """Launches out = FORMULAS[formula](*operands); operands as in `Operand`, out is dense."""
    n, elements = out.numel(), launch.POINTWISE[out.element_size()]
    activation_kernel[(triton.cdiv(n, elements.block),)](
        tuple(Operand(*operand) for operand in operands),
        out,
        n,
        columns,
        FORMULAS[formula],
        A=launch.accumulate_type(out.dtype),
        INDEX=launch.index_type(*reach(columns, operands)),
        BLOCK=elements.block,
        **launch.options(elements.threads),
    )


def scale(tensor: torch.Tensor, factor: torch.Tensor) -> None:
    """Launches tensor *= factor."""
    n, elements = tensor.numel(), launch.POINTWISE[tensor.element_size()]
    blocks = triton.cdiv(n, elements.block)
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
