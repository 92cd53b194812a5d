"""Activations as one autograd function over the fused kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfused.backends import Backend
from pyfused.backends.layout import is_dense
from pyfused.ops.dispatch import backend_of
from pyfused.ops.gradients import first_order


class Formula(NamedTuple):
    """An activation: its kernel's name, and its gradient from the output in torch's own terms."""

    kernel: str
    gradient: Callable[[Tensor, Tensor], Tensor]


RELU = Formula(
    "relu", lambda grad_output, output: torch.ops.aten.threshold_backward(grad_output, output, 0)
)


def better_in_torch(input: Tensor) -> bool:
    """Whether torch's own operator is to overwrite ``input``.

    It has the errors for what must not be overwritten, takes any strides, and there is no new
    memory for a kernel to save unless a gradient follows.
    """
    wants_grad = torch.is_grad_enabled() and input.requires_grad
    return not wants_grad or input.is_leaf or input._is_view() or not is_dense(input)


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
        if not first_order(grad_output):
            gradient = ctx.formula.gradient(grad_output, output)
        else:
            gradient = ctx.backend.activation_backward(ctx.formula.kernel, grad_output, output)
        return None, None, gradient, None
