"""Cross-entropy: an autograd function over the fused kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyfused import checks
from pyfused.backends import CrossEntropyOptions, Want, cpu
from pyfused.ops.gradients import autocast_dtype, differentiate, first_order, gradients_ahead, scale


def fused(
    input: Tensor, target: Tensor, weight: Tensor | None, options: CrossEntropyOptions
) -> Tensor:
    """The loss of tensors that the kernels take."""
    checks.cross_entropy(input, target, weight, options)
    if target.is_floating_point():
        common = torch.promote_types(input.dtype, target.dtype)
        if weight is not None:
            common = torch.promote_types(common, weight.dtype)
        input, target = input.to(common), target.to(common)
    else:
        target = target.to(torch.int64)
        target = target.reshape(()) if input.dim() == 1 else target
    if torch.is_grad_enabled() and (input.requires_grad or target.requires_grad):
        loss: Tensor | None = CrossEntropy.apply(input, target, weight, options)
    else:
        loss, _ = cpu.cross_entropy(input, target, weight, options, Want())
    assert loss is not None
    return loss.to(autocast_dtype(input.dtype))


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
        options: CrossEntropyOptions,
    ) -> Tensor | None:
        ctx.options = options
        ctx.save_for_backward(input, target, weight)
        now = gradients_ahead(options.reduction, input)
        want = Want(True, now and ctx.needs_input_grad[0], now and ctx.needs_input_grad[1])
        loss, gradients = cpu.cross_entropy(input, target, weight, options, want)
        ctx.gradients = gradients if now else None
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if first_order(grad_output) and ctx.gradients is not None:
            gradients, ctx.gradients = ctx.gradients, None
            scale(gradients, grad_output)
        elif first_order(grad_output):
            input, target, weight = ctx.saved_tensors
            want = Want(False, *ctx.needs_input_grad[:2])
            _, gradients = cpu.cross_entropy(input, target, weight, ctx.options, want, grad_output)
        else:
            gradients = _differentiable_gradients(ctx, grad_output)
        return *gradients, None, None


def _differentiable_gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, target, weight = ctx.saved_tensors
    dtype = grad_output.dtype

    def definition(input: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(
            input.to(dtype),
            target.to(dtype) if target.is_floating_point() else target,
            None if weight is None else weight.to(dtype),
            **ctx.options._asdict(),
        )

    return differentiate(definition, (input, target), ctx.needs_input_grad[:2], grad_output)
