"""Cross-entropy: an autograd function over the fused kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyfused import checks
from pyfused.backends import CrossEntropyOptions, Want, cpu
from pyfused.ops.gradients import (
    Gradients,
    autocast_dtype,
    backward,
    differentiate,
    gradients_ahead,
)


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
    def backward(ctx: Any, grad_output: Tensor) -> Gradients:
        return *backward(ctx, grad_output, _kernel, _definition), None, None


def _kernel(ctx: Any, grad_output: Tensor) -> Gradients:
    want = Want(False, *ctx.needs_input_grad[:2])
    input, target, weight = ctx.saved_tensors
    return cpu.cross_entropy(input, target, weight, ctx.options, want, grad_output)[1]


def _definition(ctx: Any, grad_output: Tensor) -> Gradients:
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
