"""Cross-entropy: an autograd function over the fused kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn import functional as F

from pyfused import checks
from pyfused.backends import Backend, CrossEntropyOptions, Want
from pyfused.ops.dispatch import backend_of
from pyfused.ops.gradients import (
    Gradients,
    autocast_dtype,
    backward,
    differentiate,
    gradients_ahead,
)


def fused(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: CrossEntropyOptions,
    inplace: bool,
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
    backend = backend_of(input)
    if torch.is_grad_enabled() and (input.requires_grad or target.requires_grad):
        loss: Tensor | None = CrossEntropy.apply(backend, input, target, weight, options, inplace)
    else:
        loss, _ = backend.cross_entropy(input, target, weight, options, Want())
    assert loss is not None
    return loss.to(autocast_dtype(input.dtype, input.device))


def give_up(input: Tensor) -> None:
    """Marks logits whose gradient may overwrite them as changed, for whoever saved them before."""
    if torch.is_grad_enabled() and input.requires_grad:
        checks.overwritable(input)
        increment_version(input)


class CrossEntropy(torch.autograd.Function):
    """The gradients are computed by the forward pass, while each row of logits is in cache.

    Except where the upstream gradient is needed first: one that differs from row to row, or one
    that keeps float16 gradients from underflowing.
    """

    @staticmethod
    def forward(
        ctx: Any,
        backend: Backend,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: CrossEntropyOptions,
        inplace: bool,
    ) -> Tensor | None:
        ctx.backend, ctx.options, ctx.inplace = backend, options, inplace
        ctx.save_for_backward(input, target, weight)
        now = gradients_ahead(options.reduction, input)
        want = Want(True, now and ctx.needs_input_grad[1], now and ctx.needs_input_grad[2], inplace)
        loss, gradients = backend.cross_entropy(input, target, weight, options, want)
        ctx.gradients = gradients if now else None
        ctx.overwritten = inplace and now
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Gradients:
        return None, *backward(ctx, grad_output, _kernel, _definition), None, None, None


def _saved(ctx: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    if ctx.overwritten:
        raise RuntimeError(
            "inplace: expected False for create_graph=True or a second backward pass, got True, "
            "and the gradient has taken the logits' memory"
        )
    saved: tuple[Tensor, Tensor, Tensor | None] = ctx.saved_tensors
    return saved


def _kernel(ctx: Any, grad_output: Tensor) -> Gradients:
    input, target, weight = _saved(ctx)
    want = Want(False, *ctx.needs_input_grad[1:3], ctx.inplace)
    if ctx.inplace:
        increment_version(input)
        ctx.overwritten = True
    found: tuple[Tensor | None, Gradients] = ctx.backend.cross_entropy(
        input, target, weight, ctx.options, want, grad_output
    )
    return found[1]


def _definition(ctx: Any, grad_output: Tensor) -> Gradients:
    input, target, weight = _saved(ctx)
    dtype = grad_output.dtype

    def definition(input: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(
            input.to(dtype),
            target.to(dtype) if target.is_floating_point() else target,
            None if weight is None else weight.to(dtype),
            **ctx.options._asdict(),
        )

    return differentiate(definition, (input, target), ctx.needs_input_grad[1:3], grad_output)
