"""Softmax and log-softmax: exp(x - lse) and x - lse along one dimension."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyfused.backends import DTYPES, backend_of, cpu
from pyfused.dispatch import sizes
from pyfused.dispatch.autograd import autocast_dtype
from pyfused.dispatch.operator import Forward, Needs, Operator, Options, Tensors
from pyfused.dispatch.originals import F
from pyfused.layout import accumulate_dtype
from pyfused.types import Gradients


@dataclass(eq=False, kw_only=True, repr=False)
class Softmax(Operator):
    """Softmax or log-softmax along one dimension."""

    choices: tuple[Any, ...] = ("dim", "dtype")
    saves: ClassVar[str] = "output"

    def __post_init__(self) -> None:
        super().__post_init__()
        function = getattr(F, self.name)
        self.torch = lambda input, options: function(input, options.dim, dtype=options.dtype)

    def unsupported(self, tensors: Tensors, options: Options) -> str | None:
        (input,), (dim, dtype) = tensors, options
        if type(dim) is not int:
            return "dim is not given" if dim is None else f"dim is a {type(dim).__name__}"
        if not -input.dim() <= dim < input.dim():
            return "dim is out of range"
        is_strided = input.is_cpu and dim % input.dim() != input.dim() - 1
        by_avx2 = cpu.capability == "x86-64-v3" and sizes.FORCED is None
        if by_avx2 and is_strided and input.dtype is torch.bfloat16:
            # With AVX2, calls take 0.7 to 1.3 times as long as torch's; torch's code for AVX-512 is
            # even faster.
            return "the kernels for AVX2 are no faster along strided bfloat16 classes"
        return None if dtype is None or dtype in DTYPES else f"dtype is {dtype}"

    def prepare(self, tensors: Tensors, options: Options) -> Tensors:
        (input,), dtype = tensors, options.dtype
        if dtype is None:
            dtype = input.dtype if input.is_cpu else autocast_dtype(input.dtype, input.device)
        return tensors if input.dtype is dtype else (input.to(dtype),)

    def forward(self, inputs: Tensors, options: Options, _needs: Needs) -> Forward:
        (x,) = inputs
        output = backend_of(x).softmax(self.name, x, options.dim % x.dim())
        return output, (output,), ()

    def backward(
        self, saved: Tensors, options: Options, _needs: Needs, grad_output: Tensor
    ) -> Gradients:
        (y,) = saved
        return (backend_of(y).softmax_backward(self.name, grad_output, y, options.dim % y.dim()),)

    def reference_backward(
        self, saved: Tensors, options: Options, _needs: Needs, grad_output: Tensor
    ) -> Gradients:
        (output,), dim = saved, options.dim
        wide = accumulate_dtype(output.dtype)
        y, grad = output.to(wide), grad_output.to(wide)
        if self.name == "softmax":
            grad_input = y * (grad - (grad * y).sum(dim, keepdim=True))
        else:
            grad_input = grad - y.exp() * grad.sum(dim, keepdim=True)
        return (grad_input.to(output.dtype),)
