"""Cross-entropy as an autograd function over the fused kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyfused import checks
from pyfused.backends import cpu
from pyfused.ops.gradients import autocast_dtype, differentiate, first_order, scale


def fused(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> Tensor:
    """``functional.cross_entropy`` on tensors that the kernels take."""
    checks.cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing)
    if target.is_floating_point():
        common = torch.promote_types(input.dtype, target.dtype)
        if weight is not None:
            common = torch.promote_types(common, weight.dtype)
        input, target = input.to(common), target.to(common)
    else:
        target = target.to(torch.int64)
        target = target.reshape(()) if input.dim() == 1 else target
    dtype = autocast_dtype(input.dtype)
    options = ignore_index, reduction, label_smoothing
    if torch.is_grad_enabled() and (input.requires_grad or target.requires_grad):
        loss: Tensor = CrossEntropy.apply(input, target, weight, *options)
    else:
        loss, _ = evaluate(input, target, weight, *options)
    return loss if loss.dtype is dtype else loss.to(dtype)


def evaluate(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    want_grad_input: bool = False,
    want_grad_target: bool = False,
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    """The loss in the accumulation dtype, and the gradients for an upstream gradient of ones."""
    loss, grad_input, grad_target, out_of_range = cpu.cross_entropy(
        input,
        target,
        weight,
        ignore_index,
        reduction,
        label_smoothing,
        want_loss=True,
        want_grad_input=want_grad_input,
        want_grad_target=want_grad_target,
    )
    if out_of_range >= 0:
        raise checks.target_out_of_range(input, target, ignore_index, out_of_range)
    assert loss is not None
    return loss, (grad_input, grad_target)


class CrossEntropy(torch.autograd.Function):
    """The gradients are computed by the forward pass, while each row of logits is in cache.

    Except where the upstream gradient is needed first: one that differs from row to row, or one
    that keeps float16 gradients from underflowing.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        reduction: str,
        label_smoothing: float,
    ) -> Tensor:
        ctx.options = ignore_index, reduction, label_smoothing
        ctx.save_for_backward(input, target, weight)
        now = reduction != "none" and input.dtype is not torch.float16
        wanted = (now and need for need in ctx.needs_input_grad[:2])
        loss, gradients = evaluate(input, target, weight, *ctx.options, *wanted)
        ctx.gradients = gradients if now else None
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if not first_order(grad_output):
            gradients = _differentiable_gradients(ctx, grad_output)
        elif ctx.gradients is None:
            input, target, weight = ctx.saved_tensors
            gradients = cpu.cross_entropy(
                input,
                target,
                weight,
                *ctx.options,
                grad_output,
                want_loss=False,
                want_grad_input=ctx.needs_input_grad[0],
                want_grad_target=ctx.needs_input_grad[1],
            )[1:3]
        else:
            gradients, ctx.gradients = ctx.gradients, None
            scale(gradients, grad_output)
        return *gradients, None, None, None, None


def _differentiable_gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, target, weight = ctx.saved_tensors
    ignore_index, reduction, label_smoothing = ctx.options
    dtype = grad_output.dtype

    def definition(input: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(
            input.to(dtype),
            target.to(dtype) if target.is_floating_point() else target,
            None if weight is None else weight.to(dtype),
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )

    return differentiate(definition, (input, target), ctx.needs_input_grad[:2], grad_output)
