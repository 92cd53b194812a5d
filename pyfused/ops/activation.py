"""Activations: their declaration, and what computes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Any

import torch
from torch import Tensor

from pyfused import checks
from pyfused.backends import backend_of
from pyfused.dispatch.autograd import differentiate
from pyfused.dispatch.operator import Arguments, Operator
from pyfused.dispatch.plan import Forward, Plan, Tensors, needs_grad
from pyfused.formulas import trace
from pyfused.formulas.kernel import Kernel, Method
from pyfused.layout import is_dense
from pyfused.torch_internals import built_in
from pyfused.types import Kernels


@dataclass(eq=False, kw_only=True, repr=False)
class Activation(Operator):
    """A function of each element.

    Attributes:
        formula: The function in torch's terms, of the input and the scalars.
        gradient: The input's gradient, from the output's, what forward saves, and the scalars. None
            for what torch's rules make of the formula of a saved input.
        checks: Whether torch's Python function raises for scalars that its built-in one takes.
        overwrites: Whether torch has it in place.
        saves: What the gradient is computed from. The output is the better one where it will do:
            then the input's memory can go, or be the output's.
    """

    formula: Callable[..., Tensor]
    gradient: Callable[..., Tensor] | None = None
    saves: str = "output"
    built_in: tuple[str, ...] = ("input",)
    checks: bool = False
    overwrites: bool = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.aten_ = self.reference_
        if self.definition is None and not self.checks:
            self.aten = _built_in(self.name, self.reference)
            self.aten_ = _built_in(f"{self.name}_", self.reference_)
        if self.reference_ is self.reference:  # which knows no `inplace`
            self.reference_ = self.aten_
        self.overwrites = self.aten_ is not self.reference
        if self.scalars and self.fallback_reason is None:
            self.fallback_reason = self._unfit_scalar

    def _unfit_scalar(self, *arguments: Any) -> str | None:
        for place, scalar in self.scalar_places:
            if not scalar.fits(arguments[place]):
                return f"{scalar.name} is {arguments[place]!r}"
        return None

    def takes_second_limit(self, arguments: Arguments, few: int) -> bool:  # noqa: ARG002
        """Returns whether no gradient follows; one that oneDNN computes for torch has no tanh."""
        return self.is_forward_alone(arguments) and "tanh" not in arguments[1:]

    def gradient_in_torch(self, grad_output: Tensor, saved: Tensor, *options: Any) -> Tensor:
        """Returns the gradient where no kernel is: torch's function has one of its input."""
        if self.saves == "output":
            assert self.gradient is not None
            return self.gradient(grad_output, saved, *options)
        function = lambda input: self.reference(input, *options)  # noqa: E731
        (gradient,) = differentiate(function, (saved,), (True,), grad_output)
        assert gradient is not None
        return gradient

    def plan(self, arguments: Arguments, inplace: bool) -> Plan:
        input, *options = arguments
        name, numbers = self.kernel_of([arguments[place] for place, _ in self.scalar_places])
        kernel = self.kernels[name]
        backend, parameters = backend_of(input), tuple(map(float, numbers))
        return plan_of_activation(
            self,
            input,
            options,
            lambda x: backend.activation(kernel, x, parameters, inplace),
            inplace,
        )

    @cached_property
    def kernels(self) -> dict[str, Kernel]:
        """Returns the kernels by name: one for each choice of flags and words."""
        kernels = {}
        for values in product(*(scalar.cases for scalar in self.scalars)):
            name, _ = self.kernel_of(values)
            case = dict(zip([scalar.name for scalar in self.scalars], values, strict=True))
            kernels[name] = Kernel(name, case, self._trace_kernel)
        return kernels

    def _trace_kernel(self, kernel: Kernel) -> list[Method]:
        """Traces the forward and the backward function of an element."""

        def forward(leaves: list[Tensor], numbers: list[Tensor], _: Tensor) -> list[Tensor | None]:
            return [self.formula(*leaves, *kernel.scalars(numbers))]

        def backward(leaves: list[Tensor], numbers: list[Tensor], _: Tensor) -> list[Tensor | None]:
            (grad_output, saved), scalars = leaves, kernel.scalars(numbers)
            if self.gradient is not None:
                return [self.gradient(grad_output, saved, *scalars)]
            return trace.gradients_of(self.formula(saved, *scalars), [saved], grad_output)

        saved = "y" if self.saves == "output" else "x"
        return [
            Method(["x"], *kernel.expressions(forward, 1)),
            Method(["grad_output", saved], *kernel.expressions(backward, 2)),
        ]

    def check(self, arguments: Arguments) -> None:
        checks.tensor("input", arguments[0])

    def inplace_fallback_reason(self, input: Any) -> str | None:
        """torch has the errors for what must not be overwritten, and takes any strides.

        Unless a gradient follows, from the output, there is no new memory for a kernel to save,
        either.
        """
        wants_grad = torch.is_grad_enabled() and input.requires_grad
        keeps = self.saves == "output" and wants_grad and not input.is_leaf_or_view
        if not keeps or not is_dense(input.empty()):
            return "overwriting saves no memory to a kernel"
        return None


def _built_in(name: str, reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Returns the function without the cost of Python's, where there is one."""
    function: Callable[..., Tensor] = getattr(torch, name, None) or built_in(name, reference)
    return function


def plan_of_activation(
    op: Any,
    input: Any,
    options: Sequence[Any],
    prepare: Callable[[Tensor], Kernels],
    inplace: bool = False,
    dtype: torch.dtype | None = None,
) -> Plan:
    """Returns the plan of an activation or a softmax: backward reads the output or the input alone.

    Args:
        options: The arguments beside the input, which torch's gradient takes.
        prepare: Returns the forward kernel and the backward kernel for an input of this layout.
        dtype: What the input is converted to before, None if it stays as it is.
    """
    kernels: list[Kernels] = []
    saves_output = op.saves == "output"

    def forward(tensors: Tensors) -> Forward:
        (input,) = tensors
        if not kernels:
            kernels.append(prepare(input))
        output = kernels[0][0](input)
        return output, (output if saves_output else input,), ()

    return Plan(
        name=op.name,
        backend=backend_of(input),
        needs=needs_grad((input,)),
        arrange=lambda arguments: arguments[:1] if dtype is None else (arguments[0].to(dtype),),
        forward=forward,
        backward=lambda saved, grad_output: (kernels[0][1](grad_output, saved[0]),),
        define=lambda saved, grad_output: (op.gradient_in_torch(grad_output, saved[0], *options),),
        inplace="output" if inplace else "",
    )
