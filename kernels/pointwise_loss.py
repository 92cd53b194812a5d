"""Losses that compare operands element by element: one formula each.

    loss       = reduce(w f(x, t)),  reduce: each, or sum / denominator
    dloss/dx   = u w df/dx,          dloss/dt = u w df/dt,   u = upstream gradient / denominator

Shapes: x, t, what else a formula takes, w and u are of one shape, seen as rows x columns with strides; outputs are dense.
Bytes: x, t (and w, where given) are read once, the gradients that are wanted written once.

torch: F.mse_loss(x, t, reduction="mean", weight=w)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import launch
from .arithmetic import Operand, exp_nonpositive, log1p_unit, reach, read, sigmoid
from .sums import sum_parts


# A formula's value is that of x, t and a third operand (x again where it has none); p and q are its
# parameters. The gradients, one for each operand, come multiplied by `scale`.


@triton.jit
def mse_loss(x, t, _, p, q):
    return (x - t) * (x - t)


@triton.jit
def mse_loss_gradients(x, t, _, p, q, scale):
    """Divided by the denominator before they can overflow."""
    gradient = 2.0 * scale * (x - t)
    return gradient, -gradient, x


@triton.jit
def smooth_l1_loss(x, t, _, beta, q):
    size = tl.abs(x - t)
    return tl.where(size >= beta, size - beta / 2.0, size * size / beta / 2.0)


@triton.jit
def smooth_l1_loss_gradients(x, t, _, beta, q, scale):
    d = x - t
    sign = tl.where(d > 0.0, 1.0, tl.where(d < 0.0, -1.0, 0.0))
    gradient = scale * tl.where((tl.abs(d) >= beta) | (beta == 0.0), sign, d / beta)
    return gradient, -gradient, x


@triton.jit
def softplus(x):
    return log1p_unit(exp_nonpositive(tl.where(x < 0.0, x, -x))) + tl.where(x < 0.0, 0.0, x)


@triton.jit
def binary_cross_entropy_with_logits(x, t, _, p, q):
    return (1.0 - t) * x + softplus(-x)


@triton.jit
def binary_cross_entropy_with_logits_gradients(x, t, _, p, q, scale):
    return scale * (sigmoid(x) - t), -scale * x, x


@triton.jit
def binary_cross_entropy_with_logits_pos_weight(x, t, pos, p, q):
    return (1.0 - t) * x + ((pos - 1.0) * t + 1.0) * softplus(-x)


@triton.jit
def binary_cross_entropy_with_logits_pos_weight_gradients(x, t, pos, p, q, scale):
    grad_x = (pos * t + 1.0 - t) * sigmoid(x) - pos * t
    return scale * grad_x, scale * (pos * softplus(-x) - softplus(x)), x


@triton.jit
def gaussian_nll_loss(x, t, v, full, eps):
    v = tl.where(v < eps, eps, v)
    constant = tl.where(full != 0.0, 0.91893853320467274, 0.0)
    return (tl.log(v) + (x - t) * (x - t) / v) / 2.0 + constant


@triton.jit
def gaussian_nll_loss_gradients(x, t, v, full, eps, scale):
    v = tl.where(v < eps, eps, v)
    d = x - t
    gradient = scale * (2.0 * d) / v / 2.0
    return gradient, -gradient, scale * ((1.0 - d * (d / v)) / v / 2.0)


class Operands(NamedTuple):
    input: Operand
    target: Operand
    other: Operand | None
    weight: Operand | None
    upstream: Operand | None  # the loss's gradient; None stands for ones
    denominator: torch.Tensor | None  # of one element, beside what `scale` holds
    parameters: torch.Tensor | None  # two of them, where only the GPU knows


class Outputs(NamedTuple):
    """None where not wanted."""

    each: torch.Tensor | None
    parts: torch.Tensor | None
    grad_input: torch.Tensor | None
    grad_target: torch.Tensor | None
    grad_other: torch.Tensor | None


@triton.jit(do_not_specialize=["blocks"])
def pointwise_loss_kernel(
    operands,
    outputs,
    n,
    blocks,
    columns,
    scale: tl.float64,
    p: tl.float64,
    q: tl.float64,
    VALUE: tl.constexpr,
    GRADIENTS: tl.constexpr,
    A: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Blocks of elements by turns, so that a program leaves one part of the sum."""
    program = tl.program_id(0)
    scale = tl.full([], scale, A)
    if operands.denominator is not None:
        scale /= tl.load(operands.denominator).to(A)
    p = tl.full([], p, A)
    q = tl.full([], q, A)
    if operands.parameters is not None:
        p = tl.load(operands.parameters).to(A)
        q = tl.load(operands.parameters + 1).to(A)
    lanes = tl.zeros([BLOCK], A)
    for block in range(program.to(INDEX), blocks, tl.num_programs(0)):
        i = block * BLOCK + tl.arange(0, BLOCK)
        mask = i < n
        x = read(operands.input, i, columns, mask, A)
        t = read(operands.target, i, columns, mask, A)
        other = x
        if operands.other is not None:
            other = read(operands.other, i, columns, mask, A)
        value = VALUE(x, t, other, p, q)
        grad_x, grad_t, grad_other = GRADIENTS(x, t, other, p, q, scale)
        if operands.weight is not None:
            weight = read(operands.weight, i, columns, mask, A)
            value *= weight
            grad_x *= weight
            grad_t *= weight
            grad_other *= weight
        if operands.upstream is not None:
            upstream = read(operands.upstream, i, columns, mask, A)
            grad_x *= upstream
            grad_t *= upstream
            grad_other *= upstream
        if outputs.parts is not None:
            lanes += tl.where(mask, value, 0.0)
        if outputs.each is not None:
            tl.store(outputs.each + i, value, mask=mask)
        if outputs.grad_input is not None:
            tl.store(outputs.grad_input + i, grad_x, mask=mask)
        if outputs.grad_target is not None:
            tl.store(outputs.grad_target + i, grad_t, mask=mask)
        if outputs.grad_other is not None:
            tl.store(outputs.grad_other + i, grad_other, mask=mask)
    if outputs.parts is not None:
        tl.store(outputs.parts + program, tl.sum(lanes))


class Formula(NamedTuple):
    value: Any
    gradients: Any


FORMULAS = {
    "mse_loss": Formula(mse_loss, mse_loss_gradients),
    "smooth_l1_loss": Formula(smooth_l1_loss, smooth_l1_loss_gradients),
    "binary_cross_entropy_with_logits": Formula(
        binary_cross_entropy_with_logits, binary_cross_entropy_with_logits_gradients
    ),
    "binary_cross_entropy_with_logits_pos_weight": Formula(
        binary_cross_entropy_with_logits_pos_weight,
        binary_cross_entropy_with_logits_pos_weight_gradients,
    ),
    "gaussian_nll_loss": Formula(gaussian_nll_loss, gaussian_nll_loss_gradients),
}


def pointwise_loss(
    formula: Formula,
    columns: int | None,
    operands: list[tuple[torch.Tensor, int, int] | None],
    parameters: tuple[float | torch.Tensor, ...],
    denominator: float | torch.Tensor,
    each: torch.Tensor | None,
    loss: torch.Tensor | None,
    gradients: tuple[torch.Tensor | None, ...],
) -> None:
    """Launches what the outputs that are not None take.

    Operands as in `Operands`, up to the upstream gradient; a gradient for each of the first three.
    """
    x = operands[0][0]
    elements = launch.POINTWISE[x.element_size()]
    programs = blocks = triton.cdiv(x.numel(), elements.block)
    known = not isinstance(denominator, torch.Tensor)
    scale, counted = (1 / denominator, None) if known else (1.0, denominator)
    numbers, table = (*parameters, 0.0, 0.0)[:2], None
    if any(isinstance(number, torch.Tensor) for number in numbers):
        table = torch.stack(
            [torch.as_tensor(number, dtype=torch.float64, device=x.device) for number in numbers]
        )
        numbers = 0.0, 0.0
    parts = None
    if loss is not None:
        programs = min(blocks, launch.MOST_PROGRAMS)
        parts = loss.new_empty(programs)
    pointwise_loss_kernel[(programs,)](
        Operands(*(o and Operand(*o) for o in operands), counted, table),
        Outputs(each, parts, *gradients),
        x.numel(),
        blocks,
        columns,
        scale,
        *numbers,
        *formula,
        A=launch.accumulate_type(x.dtype),
        INDEX=launch.index_type(*reach(columns, operands)),
        BLOCK=elements.block,
        **launch.options(elements.threads),
    )
    if parts is not None:
        sum_parts(parts, loss, counted, scale)
