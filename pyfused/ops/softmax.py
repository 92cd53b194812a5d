"""Softmax and log-softmax: exp(x - lse) and x - lse along one dimension."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyfused import checks
from pyfused.backends import DTYPES, backend_of
from pyfused.dispatch.autograd import autocast_dtype
from pyfused.dispatch.operator import Arguments, Case, Operator, Tensors
from pyfused.dispatch.originals import F
from pyfused.dispatch.plan import Plan
from pyfused.layout import accumulate_dtype
from pyfused.ops.activation import activation_plan


@dataclass(eq=False, kw_only=True, repr=False)
class Softmax(Operator):
    """Softmax or log-softmax along one dimension."""

    case: tuple[Any, ...] = ("dim", "dtype", "stacklevel")
    built_in: tuple[str, ...] = ("input", "dim")
    saves: ClassVar[str] = "output"
    strategy = "row by row, or several rows at a time"

    def __post_init__(self) -> None:
        super().__post_init__()
        function, built_in_function = getattr(F, self.name), getattr(torch, self.name)

        def compute(input: Tensor, dim: int | None, dtype: Any, stacklevel: int) -> Tensor:
            # There are four more frames between torch's function and the user's code.
            output: Tensor = function(input, dim, stacklevel + 4, dtype)
            return output

        def fast(input: Tensor, dim: int | None, dtype: Any, stacklevel: int) -> Tensor:
            output: Tensor
            if dim is None:
                output = function(input, dim, stacklevel + 3, dtype)
            else:
                output = built_in_function(input, dim, dtype=dtype)
            return output

        self.torch = self.torch_ = compute
        self.fast = fast

    def contiguous_classes(self, tensors: Tensors, case: Case) -> int:
        (input,), dim = tensors, case[0]
        valid = type(dim) is int and -input.dim() <= dim < input.dim()
        return input.shape[dim] if valid and input.stride(dim) == 1 else sys.maxsize

    def dynamic_dims(self, input: Tensor, case: Case) -> int:
        dim = case[0]
        return dim % input.dim() if type(dim) is int and input.dim() else 0

    def gradient_in_torch(self, grad_output: Tensor, output: Tensor, dim: int, *_: Any) -> Tensor:
        y, grad = (x.to(accumulate_dtype(output.dtype)) for x in (output, grad_output))
        if self.name == "softmax":
            grad_input = y * (grad - (grad * y).sum(dim, keepdim=True))
        else:
            grad_input = grad - y.exp() * grad.sum(dim, keepdim=True)
        return grad_input.to(output.dtype)

    def plan(self, arguments: Arguments) -> Plan:
        input, dim, dtype, _ = arguments
        if dtype is None:
            dtype = input.dtype if input.is_cpu else autocast_dtype(input.dtype, input.device)
        dim, backend, kernel = dim % input.dim(), backend_of(input), self.name
        return activation_plan(
            self,
            input,
            lambda _: (dim,),
            lambda x: backend.softmax(kernel, x, dim),
            dtype=None if input.dtype is dtype else dtype,
        )

    def check(self, arguments: Arguments) -> None:
        super().check(arguments)
        checks.dim(arguments[1], arguments[0])


def softmax_fallback_reason(
    input: Tensor, dim: int | None, dtype: torch.dtype | None, _stacklevel: int
) -> str | None:
    """Returns why torch's operator has to compute these arguments, None if a kernel can."""
    if type(dim) is not int:
        return "dim is not given" if dim is None else f"dim is a {type(dim).__name__}"
    if not -input.dim() <= dim < input.dim():
        return "dim is out of range"
    return None if dtype is None or dtype in DTYPES else f"dtype is {dtype}"
