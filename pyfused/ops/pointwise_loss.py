"""Pointwise losses: one autograd function over the fused kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import mse_loss  # by name: pyfused.patch replaces it there

from pyfused.backends import Backend, Want
from pyfused.ops.dispatch import backend_of
from pyfused.ops.gradients import (
    Gradients,
    autocast_dtype,
    backward,
    differentiate,
    gradients_ahead,
)


class Formula(NamedTuple):
    """A loss: the name of its kernel, and torch's own definition without a reduction."""

    kernel: str
    definition: Callable[[Tensor, Tensor], Tensor]


MSE_LOSS = Formula("mse_loss", lambda x, t: mse_loss(x, t, reduction="none"))


def fused(
    formula: Formula, input: Tensor, target: Tensor, weight: Tensor | None, reduction: str
) -> Tensor:
    """The loss of tensors that the kernels take and whose shapes broadcast."""
    factors = None if weight is None else weight.dtype
    dtype = result_dtype(input.dtype, target.dtype, factors, input.device)
    input, target = torch.broadcast_tensors(input.to(dtype), target.to(dtype))
    denominator: float | Tensor = 1.0
    if reduction == "mean":
        denominator = float(input.numel()) if weight is None else weight.sum(dtype=torch.float64)
    if weight is not None:
        weight = weight.to(dtype).expand(input.shape)
    backend = backend_of(input)
    options = weight, reduction, denominator
    operands = input, target
    if torch.is_grad_enabled() and (input.requires_grad or target.requires_grad):
        loss: Tensor | None = PointwiseLoss.apply(backend, formula, *operands, *options)
    else:
        loss, _ = backend.pointwise_loss(formula.kernel, operands, (), *options, Want())
    assert loss is not None
    return loss.to(dtype)


def result_dtype(
    input: torch.dtype, target: torch.dtype, weight: torch.dtype | None, device: torch.device
) -> torch.dtype:
    """What torch computes the loss in and returns.

    Autocast widens torch's operator. A weighted loss is none, but is made of a power, and that is
    widened on GPUs alone.
    """
    dtype = torch.promote_types(input, target)
    if weight is None or device.type == "cuda":
        dtype = autocast_dtype(dtype, device)
    return dtype if weight is None else torch.promote_types(dtype, weight)


class PointwiseLoss(torch.autograd.Function):
    """The gradients are computed by the forward pass, while the operands are in cache.

    Except where the upstream gradient is needed first: one that differs from element to element,
    or one that keeps float16 gradients from underflowing.
    """

    @staticmethod
    def forward(
        ctx: Any,
        backend: Backend,
        formula: Formula,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        reduction: str,
        denominator: float | Tensor,
    ) -> Tensor | None:
        ctx.backend, ctx.formula = backend, formula
        ctx.reduction, ctx.denominator = reduction, denominator
        ctx.save_for_backward(input, target, weight)
        now = gradients_ahead(reduction, input)
        want = Want(True, ctx.needs_input_grad[2:4] if now else ())
        loss, gradients = backend.pointwise_loss(
            formula.kernel, (input, target), (), weight, reduction, denominator, want
        )
        ctx.gradients = gradients if now else None
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Gradients:
        op = ctx.formula.kernel
        return None, None, *backward(op, ctx, grad_output, _kernel, _definition), None, None, None


def _kernel(ctx: Any, grad_output: Tensor) -> Gradients:
    want = Want(False, ctx.needs_input_grad[2:4])
    input, target, weight = ctx.saved_tensors
    options = weight, ctx.reduction, ctx.denominator
    upstream = grad_output.expand_as(input)
    found: tuple[Tensor | None, Gradients] = ctx.backend.pointwise_loss(
        ctx.formula.kernel, (input, target), (), *options, want, upstream
    )
    return found[1]


def _definition(ctx: Any, grad_output: Tensor) -> Gradients:
    input, target, weight = ctx.saved_tensors

    def definition(input: Tensor, target: Tensor) -> Tensor:
        each: Tensor = ctx.formula.definition(input, target)
        loss: Tensor = (each / ctx.denominator).to(each.dtype)
        return loss if weight is None else loss * weight

    upstream = grad_output.expand_as(input)
    return differentiate(definition, (input, target), ctx.needs_input_grad[2:4], upstream)
