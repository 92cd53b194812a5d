"""Softmax and its logarithm: their declaration, and what computes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyfused import checks
from pyfused.backends import DTYPES, backend_of
from pyfused.ops.declaration import Arguments, Operator
from pyfused.ops.gradients import apply, autocast_dtype
from pyfused.types import Gradients, Kernels


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

    def takes_second_limit(self, arguments: Arguments, few: int) -> bool:
        """Returns whether rows are short; torch has vectors where positions are contiguous."""
        input, dim, *_ = arguments
        of_input = type(dim) is int and -input.dim() <= dim < input.dim()
        return of_input and input.shape[dim] <= few and input.stride(dim) == 1

    def plan(self, arguments: Arguments, inplace: bool) -> SoftmaxPlan:  # noqa: ARG002
        input, dim, _, dtype = arguments
        if dtype is None:
            dtype = input.dtype if input.is_cpu else autocast_dtype(input.dtype, input.device)
        needs_grad = torch.is_grad_enabled() and input.requires_grad
        dim = dim % input.dim()
        like = input if input.dtype is dtype else torch.empty_like(input, dtype=dtype)
        kernels = backend_of(input).softmax(self.name, like, dim)
        return SoftmaxPlan(self.name, dim, dtype, needs_grad, kernels)

    def check(self, arguments: Arguments) -> None:
        checks.tensor("input", arguments[0])
        checks.dim(arguments[1], arguments[0])

    def strategy(self, input: Tensor) -> str:  # noqa: ARG002
        return "row by row, or several rows at a time"


def not_along_one_dimension(
    input: Tensor, dim: int | None, _stacklevel: int, dtype: torch.dtype | None
) -> str | None:
    """Returns why torch's operator is the one for these arguments."""
    if type(dim) is not int:
        return "dim is not given" if dim is None else f"dim is a {type(dim).__name__}"
    if not -input.dim() <= dim < input.dim():
        return "dim is none of the input's"
    return None if dtype is None or dtype in DTYPES else f"dtype is {dtype}"


@dataclass(eq=False)
class SoftmaxPlan:
    """Computes the calls of one signature. Backward reads the output, and no other tensor."""

    name: str
    dim: int
    dtype: torch.dtype
    needs_grad: bool
    kernels: Kernels

    def __call__(self, arguments: Arguments) -> Tensor:
        input = arguments[0]
        input = input if input.dtype is self.dtype else input.to(self.dtype)
        if self.needs_grad:
            output: Tensor = apply(self, input)
            return output
        return self.kernels[0](input)

    def forward(self, ctx: Any, tensors: Sequence[Tensor]) -> Tensor:
        output = self.kernels[0](tensors[0])
        ctx.save_for_backward(output)
        return output

    def backward(self, ctx: Any, grad_output: Tensor) -> Gradients:
        return (self.kernels[1](grad_output, ctx.saved_tensors[0]),)

    def define(self, ctx: Any, grad_output: Tensor) -> Gradients:
        (output,) = ctx.saved_tensors
        gradient = getattr(torch, f"_{self.name}_backward_data")
        return (gradient(grad_output, output, self.dim, output.dtype),)
