"""Elementwise activations: y = f(x), with the gradient computed from x or from y."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyfused.backends import backend_of
from pyfused.dispatch.autograd import differentiate
from pyfused.dispatch.operator import (
    Forward,
    Needs,
    Operator,
    Options,
    Tensors,
)
from pyfused.dispatch.originals import F
from pyfused.formula_compiler import trace
from pyfused.formula_compiler.kernel import Kernel, Method, variant_name, variants
from pyfused.types import Gradients


@dataclass(eq=False, kw_only=True, repr=False)
class Activation(Operator):
    """An elementwise function of one tensor.

    Attributes:
        formula: The function in torch's operators, of the input and each option.
        gradient: The gradient of the input, given grad_output, the saved tensor and each option.
            None derives it from the formula, if the input is saved.
        contiguous: Whether torch's result is contiguous even if the input is not.
        saves: The tensor that the gradient is computed from, "input" or "output", as in torch.
    """

    formula: Callable[..., Tensor]
    gradient: Callable[..., Tensor] | None = None
    saves: str = "input"
    contiguous: bool = False

    def __post_init__(self) -> None:
        if self.gradient is None and self.saves != "input":
            raise TypeError(f"{self.name}: expected a gradient with saves={self.saves!r}, got None")
        function = getattr(F, self.name, self.formula)
        if self.torch is None:
            self.torch = lambda input, options: function(input, *options)
        super().__post_init__()

    def prepare(self, tensors: Tensors, options: Options) -> Tensors:  # noqa: ARG002
        return (tensors[0].contiguous(),) if self.contiguous else tensors

    def forward(self, inputs: Tensors, options: Options, _needs: Needs) -> Forward:
        (x,), kernel = inputs, self.kernels[variant_name(self.name, self.parameters, options)]
        output = backend_of(x).activation(kernel, x, options)
        return output, (output if self.saves == "output" else x,), ()

    def backward(
        self, saved: Tensors, options: Options, _needs: Needs, grad_output: Tensor
    ) -> Gradients:
        (x,), kernel = saved, self.kernels[variant_name(self.name, self.parameters, options)]
        return (backend_of(x).activation_backward(kernel, grad_output, x, options),)

    def reference_backward(
        self, saved: Tensors, options: Options, _needs: Needs, grad_output: Tensor
    ) -> Gradients:
        if self.saves == "input":
            function = lambda input: self.torch(input, options)  # noqa: E731
            return differentiate(function, saved, (True,), grad_output)
        assert self.gradient is not None
        return (self.gradient(grad_output, *saved, *options),)

    @cached_property
    def kernels(self) -> dict[str, Kernel]:
        """Returns the kernels by name, one for each combination of flags and words."""
        cases = variants(self.name, self.parameters)
        return {name: Kernel(name, case, self._trace_kernel) for name, case in cases}

    def _trace_kernel(self, kernel: Kernel) -> list[Method]:
        """Traces the forward and the backward function of one element."""

        def forward(leaves: list[Tensor], case: list[Any], _: Tensor) -> list[Tensor | None]:
            return [self.formula(*leaves, *case)]

        def backward(leaves: list[Tensor], case: list[Any], _: Tensor) -> list[Tensor | None]:
            grad_output, saved = leaves
            if self.gradient is not None:
                return [self.gradient(grad_output, saved, *case)]
            return trace.gradients_of(self.formula(saved, *case), [saved], grad_output)

        saved, dtype = "x" if self.saves == "input" else "y", torch.float64
        return [
            Method(["x"], *kernel.expressions(forward, [dtype])),
            Method(["grad_output", saved], *kernel.expressions(backward, [dtype] * 2)),
        ]
