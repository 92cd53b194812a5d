"""The base class of operators. ``pyfused/ops/operators.py`` holds the declarations.

A call of an operator consists of tensors and options, a NamedTuple, which ``functional.py`` makes
from the arguments of torch's function. Options that are numbers are arguments of a kernel; the
others, such as the reduction, select one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from pyfused import checks
from pyfused.dispatch.originals import F
from pyfused.layout import broadcast_numel
from pyfused.types import OPTIONS, Choice, Gradients, Scalar

# Each is a Tensor or None; or a float, for an operand that may be a number.
Tensors = Sequence[Any]
Needs = Sequence[bool]
Forward = tuple[Any, Tensors, Gradients]  # the output, the tensors to save, and the gradients
Options = Any  # the NamedTuple of an operator; () for an operator without options


class Operand(NamedTuple):
    """A tensor argument.

    Attributes:
        low, high: The bounds of the values that tests, benchmarks and pages draw.
        differentiated: Whether the kernels compute its gradient.
        optional: Whether it may be None.
        indices: Whether it may hold class indices or other integers.
        sign: Whether its values are -1 and 1.
        number: Whether it may be a float instead of a tensor.
        converts: Whether it may be a bool or integer tensor, which kernels take as floats.
        has_rows: Whether its leading dimensions may be the input's.
    """

    name: str
    low: float = -math.inf
    high: float = math.inf
    differentiated: bool = True
    optional: bool = False
    indices: bool = False
    sign: bool = False
    number: bool = False
    converts: bool = False
    has_rows: bool = True


TOKEN_WEIGHT = Operand("token_weight", differentiated=False, optional=True, converts=True)
DENOMINATOR = Operand(
    "denominator", differentiated=False, optional=True, converts=True, has_rows=False
)
FACTORS = TOKEN_WEIGHT, DENOMINATOR


@dataclass(eq=False, kw_only=True, repr=False)
class Operator(ABC):
    """Declares an operator.

    Attributes:
        name: The name of pyfused's function, torch's function and the kernel.
        module: The name of the module in ``torch.nn`` and ``pyfused.nn``.
        operands: The tensors of a call, the input first.
        factors: The tensors that follow: the factor of each row, and the divisor of a mean.
        numbers: The options that are numbers, in the order of the kernel's parameters.
        choices: The other options, or their names. Those with their own kernels come first, the
            reduction last.
        options: Makes the options of a call from keywords. It is declared as their NamedTuple
            class, or None to make one of the numbers and the choices.
        torch: Takes the tensors of a call, one by one, and the options, and computes the result by
            torch's operators.
        reference: Takes the inputs of a kernel and the options, and computes the result by torch's
            operators, which can be differentiated; by default ``torch``.
        reason: Takes the tensors of a call, one by one, and the options, and returns why kernels do
            not support the shapes and dtypes, None if they do.
        check_shapes: Takes the same, and raises for shapes and dtypes that neither kernels nor
            ``torch`` support; None if `reason` looks at them.
        extends_torch: Takes the same, and returns whether the call uses an argument that torch's
            function lacks; None if it lacks none.
        finish: Takes the output of a kernel, its inputs, the options of the call, and all but the
            last size of the first tensor, and returns the result; None if that is the output.
        family: The name of the row of sizes.py for operators without their own row; by default the
            name of the class.

        in_torch: Whether torch has a function of this name.
        asks_size: Whether dispatch asks for the size of a call. Otherwise the function that makes
            the call has asked, and a small call is torch's, with the arguments as they came.
        all_operands: The operands and the factors.
        names: The names of the arguments.
        fields: The names of the options; the numbers come first.
        parameters: A formula's parameters: the numbers, and the choices with their own kernels.
        invalid_options: Takes the options of a call, one by one, and returns why no kernel takes
            them, None if one does.
        compared: The index of each number with ``compared_with``, and of its operand.
        broadcast: The indices of the tensors that broadcast with the input.
        is_linear: Whether the size of a call is the number of a linear layer's outputs.
        least: The smallest number of elements for which a kernel runs, on GPUs and on CPUs.
        num_differentiable: The number of a kernel's inputs that may need a gradient; they come
            first.
    """

    name: str
    module: str
    operands: tuple[Operand, ...] = (Operand("input"),)
    factors: tuple[Operand, ...] = ()
    numbers: tuple[Scalar, ...] = ()
    choices: tuple[Any, ...] = ()
    options: Any = None
    torch: Callable[..., Any] = field(default=None)  # type: ignore[assignment]
    reference: Callable[..., Any] = field(default=None)  # type: ignore[assignment]
    reason: Callable[..., str | None] | None = None
    check_shapes: Callable[..., None] | None = None
    extends_torch: Callable[..., bool] | None = None
    finish: Callable[[Any, Tensors, Options, Sequence[int]], Any] | None = None
    family: str = ""

    in_torch: bool = field(init=False)
    asks_size: bool = field(init=False)
    all_operands: tuple[Operand, ...] = field(init=False)
    names: tuple[str, ...] = field(init=False)
    fields: tuple[str, ...] = field(init=False)
    parameters: tuple[Scalar | Choice, ...] = field(init=False)
    invalid_options: Callable[..., str | None] = field(init=False)
    compared: tuple[tuple[int, int], ...] = field(init=False)
    num_differentiable: int = field(init=False, default=1)
    broadcast: tuple[int, ...] = field(init=False, default=())
    is_linear: bool = field(init=False)
    least: tuple[int, int] = field(init=False, default=(0, 0))

    def __post_init__(self) -> None:
        self._declare_options()
        self.parameters = *self.numbers, *[choice for choice in self.choices if choice.values]
        if self.reference is None:
            self.reference = self.torch
        self.in_torch = hasattr(F, self.name)
        self.all_operands = *self.operands, *self.factors
        self.names = *[operand.name for operand in self.all_operands], *self.fields
        self.invalid_options = lru_cache(maxsize=256, typed=True)(self._invalid_options)
        pairs = [(i, number.compared_with) for i, number in enumerate(self.numbers)]
        self.compared = tuple([(i, self.names.index(name)) for i, name in pairs if name])
        self.family = self.family or type(self).__name__
        self.is_linear = "linear_weight" in self.names
        self.asks_size = self.is_linear or not self.in_torch

    # ---- options ---------------------------------------------------------------------------------

    def _declare_options(self) -> None:
        """Sets the numbers, the choices and the class of the options, which follow each other."""
        kind: Any = self.options
        if kind is None:
            self.choices = tuple([Choice(x) if isinstance(x, str) else x for x in self.choices])
            names = [option.name for option in (*self.numbers, *self.choices)]
            kind = namedtuple("Options", names, rename=True)  # type: ignore[misc, no-redef]
            self.fields = tuple(names)
        else:
            self.fields = kind._fields
            self.numbers = tuple([OPTIONS[name] for name in self.fields if name in OPTIONS])
            names = [*self.fields[len(self.numbers) :]]
            assert OPTIONS.keys().isdisjoint(names)
            self.choices = tuple([Choice(x, of_torch=x == "torch_options") for x in names])
        self.options = partial(kind.__new__, kind)  # takes half of the time of calling the class

    def _invalid_options(self, *options: Any) -> str | None:
        for scalar, value in zip(self.numbers, options, strict=False):
            is_valid = scalar.optional
            if value is not None:
                value = scalar.low if scalar.clamped and not value > scalar.low else value
                is_valid = scalar.low <= value <= scalar.high
                is_valid = is_valid and (value > 0 or not scalar.positive)
            if not is_valid:
                return f"{scalar.name} is {value!r}"
        return checks.reason(self.check_choices, self.options(*options))

    def check_choices(self, options: Options) -> None:
        """Raises for invalid options that are not numbers."""
        for choice, value in zip(self.choices, options[len(self.numbers) :], strict=True):
            if choice.values:
                checks.choice(choice.name, value, choice.values)

    # ---- sizes -----------------------------------------------------------------------------------

    def needs_gradient(self, tensors: Tensors) -> bool:
        """Returns whether a call needs the gradient of an operand."""
        for operand, x in zip(self.operands, tensors, strict=False):
            if operand.differentiated and getattr(x, "requires_grad", False):
                return grad_enabled()
        return False

    def elements(self, tensors: Tensors) -> int:
        """Returns the number of elements of the logits, or of the broadcast operands."""
        if self.is_linear and isinstance(tensors[1], Tensor):
            input, linear_weight = tensors[:2]
            rows, classes = input.shape[:-1].numel(), linear_weight.shape[:-1].numel()
            return rows * classes if input.numel() else 0
        return broadcast_numel([tensors[0], *[tensors[index] for index in self.broadcast]])

    # ---- calls -----------------------------------------------------------------------------------

    def unsupported(self, tensors: Tensors, options: Options) -> str | None:
        """Returns why no kernel supports the shapes and dtypes of a call, None if one does."""
        if self.reason is not None and (reason := self.reason(*tensors, options)):
            return reason
        check = self.check_shapes
        return None if check is None else checks.reason(check, *tensors, options)

    def prepare(self, tensors: Tensors, options: Options) -> Tensors:  # noqa: ARG002
        """Returns the inputs of a kernel: the tensors in the form that kernels take."""
        return tensors

    @abstractmethod
    def forward(self, inputs: Tensors, options: Options, needs: Needs) -> Forward:
        """Computes the output, the tensors to save, and the gradients of the first inputs.

        The gradients are () if backward computes them. If the output is a tuple, only its first
        item is differentiable.

        Args:
            needs: Whether each of the first inputs needs a gradient.
        """

    @abstractmethod
    def backward(
        self, saved: Tensors, options: Options, needs: Needs, grad_output: Tensor
    ) -> Gradients:
        """Computes the gradients of the first inputs from the saved tensors."""

    @abstractmethod
    def reference_backward(
        self, saved: Tensors, options: Options, needs: Needs, grad_output: Tensor
    ) -> Gradients:
        """Computes the same gradients by torch's operators, so that they are differentiable."""

    def by_torch(self, tensors: Tensors, options: Options) -> Any:
        """Returns the result of torch's operators, which raise their errors for invalid arguments.

        Raises:
            IndexError, RuntimeError, TypeError, ValueError: torch lacks the function or an option,
                and an argument is invalid.
        """
        extends = self.extends_torch is not None and self.extends_torch(*tensors, options)
        if extends or not self.in_torch:
            self.check_call(tensors, options)
        return self.torch(*tensors, options)

    # ---- checks ----------------------------------------------------------------------------------

    def check_call(self, tensors: Tensors, options: Options) -> None:
        self.check_types(tensors, options)
        if self.check_shapes is not None:
            self.check_shapes(*tensors, options)
        self.check_values(tensors, options)

    def check_values(self, tensors: Tensors, options: Options) -> None:  # noqa: B027
        """Raises for invalid values of tensors, unless reading them would synchronise a device."""

    def check_types(self, tensors: Tensors, options: Options) -> None:
        """Raises for arguments of other types, and for numbers and words that are not valid."""
        for operand, x in zip(self.operands, tensors, strict=False):
            if x is not None or not operand.optional:
                checks.tensor(operand.name, x, operand.number)
        for scalar, value in zip(self.numbers, options, strict=False):
            checks.bounded(scalar, value)
        self.check_choices(options)


def grad_enabled() -> bool:
    """Returns whether autograd records calls; it does not in inference mode, even in grad mode."""
    if not torch.is_grad_enabled():
        return False
    return is_dynamo_compiling() or not torch.is_inference_mode_enabled()  # Dynamo cannot trace it


def needs_grad(tensors: Tensors) -> tuple[bool, ...]:
    """Returns whether each tensor of a call needs a gradient."""
    if not grad_enabled():
        return (False,) * len(tensors)
    return tuple([getattr(x, "requires_grad", False) for x in tensors])


def gradients_in_forward(reduction: str, dtype: torch.dtype) -> bool:
    """Returns whether the forward pass of a loss computes the gradients, which backward scales.

    The operands are in the cache then. float16 is excluded, as its gradients underflow without the
    factor of GradScaler in grad_output.
    """
    return reduction != "none" and dtype is not torch.float16


def requires_grad(x: Any) -> bool:
    """Returns whether a call has to be differentiable with respect to an argument."""
    return getattr(x, "requires_grad", False) and grad_enabled()
