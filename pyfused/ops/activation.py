"""Activations as one autograd function over the fused kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfused.backends import Backend
from pyfused.ops.dispatch import backend_of
from pyfused.ops.gradients import second_order


class Formula(NamedTuple):
    """An activation: its kernel's name, and its gradient from the output in torch's own terms."""

    kernel: str
    gradient: Callable[[Tensor, Tensor], Tensor]


RELU = Formula(
    "relu", lambda grad_output, output: torch.ops.aten.threshold_backward(grad_output, output, 0)
)


def fused(formula: Formula, input: Tensor, inplace: bool) -> Tensor:
    """The activation of a tensor that the kernels take."""
    backend = backend_of(input)
    if torch.is_grad_enabled() and input.requires_grad:
        output: Tensor = Activation.apply(backend, formula, input, inplace)
    else:
        output = backend.activation(formula.kernel, input)
    return output


class Activation(torch.autograd.Function):
    """Saves the output alone, so that the input's memory can go or be the output's."""

    @staticmethod
    def forward(
        ctx: Any, backend: Backend, formula: Formula, input: Tensor, inplace: bool
    ) -> Tensor:
        output: Tensor = backend.activation(formula.kernel, input, inplace=inplace)
        if inplace:
            ctx.mark_dirty(input)
        ctx.backend, ctx.formula = backend, formula
        ctx.save_for_backward(output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (output,) = ctx.saved_tensors
        if second_order(ctx.formula.kernel, grad_output):
            gradient = ctx.formula.gradient(grad_output, output)
        else:
            gradient = ctx.backend.activation_backward(ctx.formula.kernel, grad_output, output)
        return None, None, gradient, None
