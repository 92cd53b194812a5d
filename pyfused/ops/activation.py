"""Activations as one autograd function over the fused kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyfused import checks
from pyfused.backends import Backend
from pyfused.backends.layout import dense, is_dense
from pyfused.ops.declaration import Arguments, Operator
from pyfused.ops.dispatch import backend_of
from pyfused.ops.gradients import second_order, without_functorch


@dataclass(eq=False, kw_only=True, repr=False)
class Activation(Operator):
    """A function of each element.

    Attributes:
        gradient: The input's gradient in torch's own terms, from the output's, what forward saves,
            and the parameters.
        saves: What the gradient is computed from. The output is the better one where it will do:
            then the input's memory can go, or be the output's.
    """

    gradient: Callable[..., Tensor]
    saves: str = "output"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.aten = getattr(torch, self.name)
        self.aten_ = getattr(torch, f"{self.name}_")
        if self.torchs_ is self.torchs:  # which knows no `inplace`
            self.torchs_ = self.aten_

    def fused(self, arguments: Arguments, inplace: bool) -> Tensor:
        input = arguments[0]
        backend = backend_of(input)
        parameters = tuple(map(float, arguments[1:])) if self.parameters else ()
        if torch.is_grad_enabled() and input.requires_grad:
            output: Tensor = _apply(backend, self, input, parameters, inplace)
        else:
            output = backend.activation(self.name, input, parameters)
        return output

    def check(self, arguments: Arguments) -> None:
        checks.tensor("input", arguments[0])

    def against_inplace(self, input: Tensor) -> str | None:
        """torch has the errors for what must not be overwritten, and takes any strides.

        Unless a gradient follows there is no new memory for a kernel to save, either.
        """
        wants_grad = torch.is_grad_enabled() and input.requires_grad
        if not wants_grad or input.is_leaf or input._is_view() or not is_dense(input):
            return "overwriting saves no memory to a kernel"
        return None


class ActivationFunction(torch.autograd.Function):
    """Saves the output or the input, and no other tensor."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: Backend,
        op: Activation,
        input: Tensor,
        parameters: tuple[float, ...],
        inplace: bool,
    ) -> Tensor:
        output: Tensor = backend.activation(op.name, input, parameters, inplace=inplace)
        if inplace:
            ctx.mark_dirty(input)
        ctx.backend, ctx.op, ctx.parameters = backend, op, parameters
        ctx.save_for_backward(output if op.saves == "output" else input)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (saved,) = ctx.saved_tensors
        op, parameters = ctx.op, ctx.parameters
        if second_order(op.name, grad_output):
            gradient = op.gradient(grad_output, saved, *parameters)
        else:
            gradient = ctx.backend.activation_backward(
                op.name, grad_output, dense(saved), parameters
            )
        return None, None, gradient, None, None


_apply = without_functorch(ActivationFunction)
