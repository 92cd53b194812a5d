"""Losses that compare input and target element by element: one formula each.

    loss       = reduce(w f(x, t)),  reduce: each, or sum / denominator
    dloss/dx   = u w df/dx,          dloss/dt = u w df/dt,   u = upstream gradient / denominator

Shapes: x, t, w and u are of one shape, seen as rows x columns with strides; outputs are dense.
Bytes: x, t (and w, where given) are read once, the gradients that are wanted written once.

torch: F.mse_loss(x, t, reduction="mean", weight=w)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import launch
from .arithmetic import Operand, reach, read
from .sums import sum_parts


@triton.jit
def mse_loss(x, t):
    return (x - t) * (x - t)


@triton.jit
def mse_loss_gradients(x, t, scale):
    """Divided by the denominator before they can overflow."""
    gradient = 2.0 * scale * (x - t)
    return gradient, -gradient


class Operands(NamedTuple):
    input: Operand
    target: Operand
    weight: Operand | None
    upstream: Operand | None  # the loss's gradient; None stands for ones
    denominator: torch.Tensor | None  # of one element, beside what `scale` holds


class Outputs(NamedTuple):
    """None where not wanted."""

    each: torch.Tensor | None
    parts: torch.Tensor | None
    grad_input: torch.Tensor | None
    grad_target: torch.Tensor | None


@triton.jit(do_not_specialize=["blocks"])
def pointwise_loss_kernel(
    operands,
    outputs,
    n,
    blocks,
    columns,
    scale: tl.float64,
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
    lanes = tl.zeros([BLOCK], A)
    for block in range(program.to(INDEX), blocks, tl.num_programs(0)):
        i = block * BLOCK + tl.arange(0, BLOCK)
        mask = i < n
        x = read(operands.input, i, columns, mask, A)
        t = read(operands.target, i, columns, mask, A)
        value = VALUE(x, t)
        grad_x, grad_t = GRADIENTS(x, t, scale)
        if operands.weight is not None:
            weight = read(operands.weight, i, columns, mask, A)
            value *= weight
            grad_x *= weight
            grad_t *= weight
        if operands.upstream is not None:
            upstream = read(operands.upstream, i, columns, mask, A)
            grad_x *= upstream
            grad_t *= upstream
        if outputs.parts is not None:
            lanes += tl.where(mask, value, 0.0)
        if outputs.each is not None:
            tl.store(outputs.each + i, value, mask=mask)
        if outputs.grad_input is not None:
            tl.store(outputs.grad_input + i, grad_x, mask=mask)
        if outputs.grad_target is not None:
            tl.store(outputs.grad_target + i, grad_t, mask=mask)
    if outputs.parts is not None:
        tl.store(outputs.parts + program, tl.sum(lanes))


class Formula(NamedTuple):
    value: Any
    gradients: Any


MSE_LOSS = Formula(mse_loss, mse_loss_gradients)


def pointwise_loss(
    formula: Formula,
    columns: int | None,
    operands: list[tuple[torch.Tensor, int, int] | None],
    denominator: float | torch.Tensor,
    each: torch.Tensor | None,
    loss: torch.Tensor | None,
    grad_input: torch.Tensor | None,
    grad_target: torch.Tensor | None,
) -> None:
    """Launches what the outputs that are not None take; operands as in `Operands`."""
    x = operands[0][0]
    elements = launch.POINTWISE[x.element_size()]
    programs = blocks = triton.cdiv(x.numel(), elements.block)
    known = not isinstance(denominator, torch.Tensor)
    scale, counted = (1 / denominator, None) if known else (1.0, denominator)
    parts = None
    if loss is not None:
        programs = min(blocks, launch.MOST_PROGRAMS)
        parts = loss.new_empty(programs)
    pointwise_loss_kernel[(programs,)](
        Operands(*(o and Operand(*o) for o in operands), counted),
        Outputs(each, parts, grad_input, grad_target),
        x.numel(),
        blocks,
        columns,
        scale,
        *formula,
        A=launch.accumulate_type(x.dtype),
        INDEX=launch.index_type(*reach(columns, operands)),
        BLOCK=elements.block,
        **launch.options(elements.threads),
    )
    if parts is not None:
        sum_parts(parts, loss, counted, scale)
