"""Pointwise losses as one autograd function over the fused kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pyfused.backends import cpu
from pyfused.ops.gradients import autocast_dtype, differentiate, first_order, scale


class Formula(NamedTuple):
    """A loss: the name of its kernel, and torch's own definition without a reduction."""

    kernel: str
    definition: Callable[[Tensor, Tensor], Tensor]


SQUARED_ERROR = Formula("squared_error", lambda x, t: F.mse_loss(x, t, reduction="none"))


def fused(
    formula: Formula, input: Tensor, target: Tensor, weight: Tensor | None, reduction: str
) -> Tensor:
    """The loss of tensors that the kernels take and whose shapes broadcast."""
    dtype = torch.promote_types(input.dtype, target.dtype)
    denominator = 1.0
    if weight is None:
        dtype = autocast_dtype(dtype)
    else:
        dtype = torch.promote_types(dtype, weight.dtype)
        if reduction == "mean":
            denominator = weight.sum(dtype=torch.float64).item()
    input, target = torch.broadcast_tensors(input.to(dtype), target.to(dtype))
    if weight is not None:
        weight = weight.to(dtype).expand(input.shape)
    elif reduction == "mean":
        denominator = float(input.numel())
    if torch.is_grad_enabled() and (input.requires_grad or target.requires_grad):
        loss: Tensor = PointwiseLoss.apply(formula, input, target, weight, reduction, denominator)
    else:
        loss, _ = evaluate(formula, input, target, weight, reduction, denominator)
    return loss


def evaluate(
    formula: Formula,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    denominator: float,
    want_grad_input: bool = False,
    want_grad_target: bool = False,
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    """The loss in the input's dtype, and the gradients for an upstream gradient of one."""
    loss, *gradients = cpu.pointwise_loss(
        formula.kernel,
        input,
        target,
        weight,
        denominator,
        want_each=reduction == "none",
        want_reduced=reduction != "none",
        want_grad_input=want_grad_input,
        want_grad_target=want_grad_target,
    )
    assert loss is not None
    return loss.to(input.dtype), (gradients[0], gradients[1])


class PointwiseLoss(torch.autograd.Function):
    """The gradients are computed by the forward pass, while the operands are in cache.

    Except where the upstream gradient is needed first: one that differs from element to element,
    or one that keeps float16 gradients from underflowing.
    """

    @staticmethod
    def forward(
        ctx: Any,
        formula: Formula,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        reduction: str,
        denominator: float,
    ) -> Tensor:
        ctx.formula, ctx.denominator = formula, denominator
        ctx.save_for_backward(input, target, weight)
        now = reduction != "none" and input.dtype is not torch.float16
        loss, gradients = evaluate(
            formula,
            input,
            target,
            weight,
            reduction,
            denominator,
            want_grad_input=now and ctx.needs_input_grad[1],
            want_grad_target=now and ctx.needs_input_grad[2],
        )
        ctx.gradients = gradients if now else None
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1:3]
        if not first_order(grad_output):
            input, target, weight = ctx.saved_tensors

            def definition(input: Tensor, target: Tensor) -> Tensor:
                loss: Tensor = ctx.formula.definition(input, target) / ctx.denominator
                return loss if weight is None else loss * weight

            upstream = grad_output.expand_as(input)
            gradients = differentiate(definition, (input, target), wanted, upstream)
        elif ctx.gradients is None:
            input, target, weight = ctx.saved_tensors
            gradients = cpu.pointwise_loss(
                ctx.formula.kernel,
                input,
                target,
                weight,
                ctx.denominator,
                grad_output.expand_as(input),
                want_each=False,
                want_reduced=False,
                want_grad_input=wanted[0],
                want_grad_target=wanted[1],
            )[1:]
        else:
            gradients, ctx.gradients = ctx.gradients, None
            scale(gradients, grad_output)
        return None, *gradients, None, None, None
