"""Activations as one autograd function over the fused kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfused import checks
from pyfused.backends import Backend, backend_of
from pyfused.layout import dense, is_dense
from pyfused.ops.declaration import Arguments, Operator
from pyfused.ops.gradients import second_order, without_functorch


@dataclass(eq=False, kw_only=True, repr=False)
class Activation(Operator):
    """A function of each element.

    Attributes:
        gradient: The input's gradient in torch's own terms, from the output's, what forward saves,
            and the arguments beside the input.
        formula: The kernel's name and its number, from the arguments beside the input, where these
            are more than none.
        overwrites: Whether torch has it in place.
        saves: What the gradient is computed from. The output is the better one where it will do:
            then the input's memory can go, or be the output's.
    """

    gradient: Callable[..., Tensor]
    formula: Callable[..., tuple[str, tuple[float, ...]]] | None = None
    saves: str = "output"
    built_in: tuple[str, ...] = ("input",)
    overwrites: bool = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.definition is None:
            self.aten = _built_in(self.name)
            self.aten_ = _built_in(f"{self.name}_")
        if self.reference_ is self.reference:  # which knows no `inplace`
            self.reference_ = self.aten_
        self.overwrites = self.aten_ is not self.reference

    def fused(self, arguments: Arguments, inplace: bool) -> Tensor:
        input = arguments[0]
        backend = backend_of(input)
        name, parameters = (self.name, ()) if self.formula is None else self.formula(*arguments[1:])
        if torch.is_grad_enabled() and input.requires_grad:
            call = ActivationCall(self, backend, name, parameters, arguments[1:])
            output: Tensor = _apply(call, input, inplace)
        else:
            output = backend.activation(name, input, parameters)
        return output

    def check(self, arguments: Arguments) -> None:
        checks.tensor("input", arguments[0])

    def inplace_fallback_reason(self, input: Tensor) -> str | None:
        """torch has the errors for what must not be overwritten, and takes any strides.

        Unless a gradient follows, from the output, there is no new memory for a kernel to save,
        either.
        """
        wants_grad = torch.is_grad_enabled() and input.requires_grad
        keeps = self.saves == "output" and wants_grad and not (input.is_leaf or input._is_view())
        if not keeps or not is_dense(input):
            return "overwriting saves no memory to a kernel"
        return None


def _built_in(name: str) -> Callable[..., Tensor]:
    function: Callable[..., Tensor] = getattr(torch, name, None) or getattr(torch._C._nn, name)
    return function


class ActivationCall(NamedTuple):
    """What a kernel takes beside tensors, and what torch's gradient does."""

    op: Activation
    backend: Backend
    name: str
    parameters: tuple[float, ...]
    options: Arguments


class ActivationFunction(torch.autograd.Function):
    """Saves the output or the input, and no other tensor."""

    @staticmethod
    def forward(ctx: Any, call: ActivationCall, input: Tensor, inplace: bool) -> Tensor:
        output: Tensor = call.backend.activation(call.name, input, call.parameters, inplace=inplace)
        if inplace:
            ctx.mark_dirty(input)
        ctx.call = call
        ctx.save_for_backward(output if call.op.saves == "output" else input)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (saved,) = ctx.saved_tensors
        call: ActivationCall = ctx.call
        if second_order(call.op.name, grad_output):
            gradient = call.op.gradient(grad_output, saved, *call.options)
        else:
            gradient = call.backend.activation_backward(
                call.name, grad_output, dense(saved), call.parameters
            )
        return None, gradient, None


_apply = without_functorch(ActivationFunction)
