"""Softmax and its logarithm as one autograd function over the fused kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pyfused import checks
from pyfused.backends import DTYPES, Backend, backend_of
from pyfused.ops.declaration import Arguments, Operator
from pyfused.ops.gradients import autocast_dtype, second_order, without_functorch


@dataclass(eq=False, kw_only=True, repr=False)
class Softmax(Operator):
    """A function of all elements along one dimension."""

    built_in: tuple[str, ...] = ("input", "dim")

    def __post_init__(self) -> None:
        super().__post_init__()
        built_in = getattr(torch, self.name)

        def aten(input: Tensor, dim: int | None, stacklevel: int, dtype: Any) -> Tensor:
            if dim is None:
                # Behind this function and `call`: who called `pyfused.functional`'s.
                dim = F._get_softmax_dim(  # type: ignore[attr-defined]
                    self.name, input.dim(), stacklevel + 2
                )
            output: Tensor = built_in(input, dim, dtype=dtype)
            return output

        self.aten = self.aten_ = aten

    def size_key(self, arguments: Arguments) -> tuple[str, int]:
        input, dim, *_ = arguments
        try:
            return self.name, input.size(dim) if type(dim) is int else 1
        except IndexError:  # none of the input's
            return self.name, 1

    def fused(self, arguments: Arguments, inplace: bool) -> Tensor:  # noqa: ARG002
        input, dim, _, dtype = arguments
        if dtype is None:
            dtype = input.dtype if input.is_cpu else autocast_dtype(input.dtype, input.device)
        input = input if input.dtype is dtype else input.to(dtype)
        call = SoftmaxCall(self.name, backend_of(input), dim % input.dim())
        if torch.is_grad_enabled() and input.requires_grad:
            output: Tensor = _apply(call, input)
        else:
            output = call.backend.softmax(call.name, input, call.dim)
        return output

    def check(self, arguments: Arguments) -> None:
        checks.tensor("input", arguments[0])
        checks.dim(arguments[1], arguments[0])

    def strategy(self, input: Tensor) -> str:  # noqa: ARG002
        return "row by row, or several rows at a time"


def not_along_one_dimension(
    input: Tensor, dim: int | None, _stacklevel: int, dtype: torch.dtype | None
) -> str | None:
    """Why torch's operator is the one for these arguments."""
    if type(dim) is not int:
        return "dim is not given" if dim is None else f"dim is a {type(dim).__name__}"
    if not -input.dim() <= dim < input.dim():
        return "dim is none of the input's"
    return None if dtype is None or dtype in DTYPES else f"dtype is {dtype}"


class SoftmaxCall(NamedTuple):
    """What a kernel takes beside tensors."""

    name: str
    backend: Backend
    dim: int


class SoftmaxFunction(torch.autograd.Function):
    """Saves the output, and no other tensor."""

    @staticmethod
    def forward(ctx: Any, call: SoftmaxCall, input: Tensor) -> Tensor:
        output: Tensor = call.backend.softmax(call.name, input, call.dim)
        ctx.call = call
        ctx.save_for_backward(output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor]:
        (output,), call = ctx.saved_tensors, ctx.call
        if second_order(call.name, grad_output):
            gradient = getattr(torch, f"_{call.name}_backward_data")
            return None, gradient(grad_output, output, call.dim, output.dtype)
        return None, call.backend.softmax_backward(call.name, grad_output, output, call.dim)


_apply = without_functorch(SoftmaxFunction)
