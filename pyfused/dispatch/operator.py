"""The base class of operators. ``pyfused/ops/operators.py`` holds the declarations."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import product
from numbers import Real
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import functional as F

from pyfused import checks
from pyfused.dispatch.originals import original
from pyfused.layout import broadcast_numel
from pyfused.torch_internals import legacy_reduction
from pyfused.types import NUMBER, OPTIONS, Scalar, VocabOptions

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}  # at::Reduction

Arguments = tuple[Any, ...]  # all arguments of torch's function except `inplace`, by position
Numbers = tuple[Any, ...]  # for each of `Operator.numbers` a float, or None


class Operand(NamedTuple):
    """A tensor argument.

    Attributes:
        low, high: The bounds of valid values.
        differentiated: Whether the kernels compute its gradient.
        optional: Whether it may be None.
        indices: Whether it may hold class indices or other integers.
        labels: Whether it holds several class indices for each row, which end at the first -1.
        sign: Whether its values are -1 and 1.
        number: Whether it may be a float instead of a tensor.
        converts: Whether it may be a bool or integer tensor, which kernels take as floats.
        enforced: The error that torch raises on CPUs for values out of bounds, None for no error.
    """

    name: str
    low: float = -math.inf
    high: float = math.inf
    differentiated: bool = True
    optional: bool = False
    indices: bool = False
    labels: bool = False
    sign: bool = False
    number: bool = False
    converts: bool = False
    enforced: type[Exception] | None = None


TOKEN_WEIGHT = Operand("token_weight", differentiated=False, optional=True)


@dataclass(eq=False, kw_only=True, repr=False)
class Operator(ABC):
    """Declares an operator.

    Attributes:
        name: The name of pyfused's function, torch's function and the kernel.
        module: The name of the module in ``torch.nn`` and ``pyfused.nn``.
        operands: The tensor arguments, the input first.
        scalars: The numeric arguments, in the formula's order.
        fallback_reason: Takes the arguments; returns why torch's operator has to compute the call,
            None if a kernel can.
        number_reason: The same for the numbers, which `fallback_reason` does not receive.
        definition: The definition in torch's operators, if torch has no function of this name.
        built_in: The arguments that torch's built-in functions of this name require; () if users
            do not call these.

        reference, reference_: torch's original function, unaffected by patches, and its in-place
            variant.
        builtin, builtin_: The same with the least overhead, for calls that no subclass or mode
            observes.
        arguments: The function's parameters in order, without ``inplace``.
        defaults: The defaults of the parameters after the input.
        indexed_operands, indexed_scalars: The index of each operand or scalar among the arguments,
            and the operand or scalar.
        names: The names of the arguments; with options, those of the operands and of the fields of
            the options.
        scalar_at: For each name the scalar if it is a number, or None.
        numbers: The scalars that are numbers, including those of the options, in this order.
        cases: Returns what a plan depends on, given the numbers of a call: None, a special value or
            NUMBER for each. Returns a reason to fall back, or raises an error, for invalid numbers.
        broadcast: The indices of the tensors that broadcast with the input.
        is_linear: Whether the size of a call is the number of a linear layer's outputs.
        strategy: Describes how CPU kernels traverse an input.
        options: The class of the options, if these are the last argument.
    """

    name: str
    module: str
    operands: tuple[Operand, ...] = (Operand("input"),)
    scalars: tuple[Scalar, ...] = ()
    fallback_reason: Callable[..., str | None] | None = None
    number_reason: Callable[..., str | None] | None = None
    definition: Callable[..., Tensor] | None = None
    built_in: tuple[str, ...] = ()

    reference: Callable[..., Tensor] = field(init=False)
    reference_: Callable[..., Tensor] = field(init=False)
    builtin: Callable[..., Tensor] = field(init=False)
    builtin_: Callable[..., Tensor] = field(init=False)
    arguments: tuple[str, ...] = field(init=False)
    defaults: Arguments = field(init=False)
    indexed_scalars: tuple[tuple[int, Scalar], ...] = field(init=False)
    indexed_operands: tuple[tuple[int, Operand], ...] = field(init=False)
    names: tuple[str, ...] = field(init=False)
    scalar_at: tuple[Scalar | None, ...] = field(init=False)
    numbers: tuple[Scalar, ...] = field(init=False)
    cases: Callable[[Any], tuple[Any, ...] | str] = field(init=False)
    broadcast: tuple[int, ...] = field(init=False, default=())
    is_linear: bool = field(init=False)
    strategy: ClassVar[str] = "element by element"
    options: ClassVar[type[VocabOptions] | None] = None
    number_types: ClassVar[tuple[type, ...]] = (Real,)
    takes_floats: ClassVar[bool] = True  # False if it takes integers as well

    def __post_init__(self) -> None:
        self.reference = self.definition or original(getattr(F, self.name))
        self.reference_ = self.builtin = self.builtin_ = self.reference
        names = parameters_of(self.reference)
        if "inplace" in names:
            self.reference_ = partial(self.reference, inplace=True)
        self.arguments = tuple(name for name in names if name != "inplace")
        self.defaults = tuple(names[name] for name in self.arguments[1:])
        index = self.arguments.index
        self.indexed_operands = tuple((index(operand.name), operand) for operand in self.operands)
        self.indexed_scalars = tuple((index(scalar.name), scalar) for scalar in self.scalars)
        numbers = {scalar.name: scalar for scalar in self.scalars if scalar.is_number}
        numbers |= {
            o.name: Scalar(o.name, optional=o.optional, tensor=True, operand=True)
            for o in self.operands
            if o.number
        }
        self.names = self.arguments
        if self.options is not None:
            self.names = self.arguments[: len(self.operands)]
        self.scalar_at = tuple([numbers.get(name) for name in self.names])
        if self.options is not None:
            fields = tuple(self.options.__dataclass_fields__)
            self.names += fields
            self.scalar_at += tuple([OPTIONS.get(name) for name in fields])
        self.numbers = tuple([scalar for scalar in self.scalar_at if scalar is not None])
        self.cases = lru_cache(maxsize=256)(self._cases)
        self.is_linear = "linear_weight" in self.arguments
        self._reduction = index("reduction") if "reduction" in self.arguments else None

    def reduction(self, arguments: Arguments, warn: bool = True) -> str:
        """Returns the reduction of a call, "none" for an operator without one."""
        by_name = dict(zip(self.arguments, arguments, strict=True))
        reduction: str = by_name.get("reduction", "none")
        if self.definition is not None:  # a user's formula may have parameters of these names
            return reduction
        return reduction_of(by_name.get("size_average"), by_name.get("reduce"), reduction, warn)

    def definition_of(self, compute: Callable[..., Tensor], **last: Any) -> Callable[..., Tensor]:
        """Returns a function for an operator that torch lacks.

        Args:
            compute: The function of all arguments.
            last: The arguments after the operands and the scalars, with their defaults. Optional
                operands follow them.
        """
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        required = [operand.name for operand in self.operands if not operand.optional]
        optional = {operand.name: None for operand in self.operands if operand.optional}
        defaults = {scalar.name: scalar.default for scalar in self.scalars} | last | optional
        parameters = [inspect.Parameter(name, kind) for name in required]
        parameters += [inspect.Parameter(n, kind, default=v) for n, v in defaults.items()]

        def definition(*args: Any, **kwargs: Any) -> Tensor:
            kwargs = defaults | dict(zip(self.arguments, args, strict=False)) | kwargs
            arguments = tuple([kwargs.get(name) for name in self.arguments])
            self.check_tensors(arguments)
            self.check_scalars(arguments)
            return compute(*arguments)

        definition.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return definition

    def bind(self, *args: Any, **kwargs: Any) -> Arguments:
        """Returns the arguments in the order that `call` expects."""
        return args + tuple([kwargs[name] for name in self.arguments[len(args) :]])

    def _cases(self, numbers: Numbers) -> tuple[Any, ...] | str:
        cases = list[Any]()
        for scalar, value in zip(self.numbers, numbers, strict=True):
            low, special, case = scalar.low, scalar.special, None
            is_valid = scalar.optional or scalar.tensor
            if value is not None:
                value = low if scalar.clamped and not value > low else value
                is_valid = low <= value <= scalar.high and (value > 0 or not scalar.positive)
                case = special[special.index(value)] if value in special else NUMBER
            if not is_valid and (reason := self.invalid_number(scalar, value)):
                return reason
            cases.append(case)
        if self.number_reason is not None and (reason := self.number_reason(*numbers)):
            return reason
        return tuple(cases)

    def to_number(self, value: Any) -> Any:
        """Converts a tensor of one element, or any number, for kernels."""
        return float(value)

    def invalid_number(self, scalar: Scalar, value: Any) -> str | None:
        """Raises an error for a number out of bounds, or returns the reason to fall back."""
        checks.scalar(scalar, value)
        return None

    def kernel_of(self, cases: Sequence[Any]) -> str:
        """Returns the name of the kernel for these cases of the scalars."""
        name = self.name
        for scalar, case in zip(self.scalars, cases, strict=True):
            if scalar.flag:
                name += f"_{scalar.name}" if case else ""
            elif scalar.words:
                name += f"_{case}" if case != scalar.words[0] else ""
            elif case in scalar.special:
                name += f"_{scalar.name}_{case:g}"
        return name

    def kernel_cases(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields the name of each kernel, and the cases of the scalars that it is for."""
        names = [scalar.name for scalar in self.scalars]
        for values in product(*(scalar.cases for scalar in self.scalars)):
            yield self.kernel_of(values), dict(zip(names, values, strict=True))

    @property
    def required(self) -> dict[str, Any]:
        """Returns an example value of each scalar without a default."""
        scalars = self.indexed_scalars
        return {s.name: s.default for index, s in scalars if self.defaults[index - 1] is ...}

    @property
    def family(self) -> str:
        """Returns the name of the row in the table of sizes for operators without their own row."""
        return type(self).__name__

    def takes_second_limit(self, arguments: Arguments, few: int) -> bool:  # noqa: ARG002
        """Returns whether the second limit of the table of sizes applies to a call.

        Args:
            few: The largest number of classes that counts as few.
        """
        return self._reduction is not None and bool(arguments[self._reduction] == "none")

    def runs_small_call(self, arguments: Arguments) -> bool:  # noqa: ARG002
        """Returns whether a kernel computes a call that is small enough for torch's operator."""
        return False

    def needs_no_gradient(self, arguments: Arguments) -> bool:
        """Returns whether a call needs no gradient."""
        return not grad_enabled() or not any(
            operand.differentiated and getattr(arguments[index], "requires_grad", False)
            for index, operand in self.indexed_operands
        )

    def elements(self, arguments: Arguments) -> int:
        """Returns the number of elements of the logits, or of the broadcast operands."""
        if self.is_linear and isinstance(arguments[1], Tensor):
            input, linear_weight = arguments[:2]
            rows, classes = input.shape[:-1].numel(), linear_weight.shape[:-1].numel()
            return rows * classes if input.numel() else 0
        return broadcast_numel([arguments[0], *[arguments[index] for index in self.broadcast]])

    @abstractmethod
    def plan(self, arguments: Arguments, inplace: bool) -> Callable[[Arguments, Numbers], Any]:
        """Checks types, shapes and options, and returns the plan of a signature.

        Args:
            arguments: The arguments of the call, with a TensorSpec instead of each tensor, and the
                case instead of each number.

        Returns:
            A function of the arguments of a call, and of its numbers as floats.
        """

    def compiled(self, arguments: Arguments) -> Any:
        """Returns the result of a call that is being compiled."""
        raise NotImplementedError

    def fake(self, arguments: Arguments) -> Tensor:
        """Returns an empty tensor like the result of the custom operator, by default a scalar."""
        empty: Tensor = arguments[0].new_empty(())
        return empty

    def check(self, arguments: Arguments) -> None:
        """Raises for invalid arguments, including values, after torch's operator has raised."""
        self.check_tensors(arguments)

    def check_tensors(self, arguments: Arguments) -> None:
        for index, operand in self.indexed_operands:
            if arguments[index] is not None or not operand.optional:
                number = float if operand.number else None
                checks.tensor(operand.name, arguments[index], number)

    def check_scalars(self, arguments: Arguments) -> None:
        for index, scalar in self.indexed_scalars:
            if scalar.is_number:
                self.invalid_number(scalar, arguments[index])

    def prepare_inplace(self, input: Tensor) -> None:  # noqa: B027 most have nothing to prepare
        """Prepares an input that a call is to overwrite."""

    def inplace_fallback_reason(self, input: Tensor) -> str | None:  # noqa: ARG002
        """Returns why torch's operator has to compute an in-place call, None if a kernel can."""
        return None

    def local_shard_of(self, arguments: Arguments) -> Any:  # noqa: ARG002
        """Returns this process' shard of a call with DTensors, None if there is none."""
        return None

    def strategy_of(self, arguments: Arguments) -> str:  # noqa: ARG002
        """Describes how a CPU kernel traverses the arguments of a call."""
        return "blocks of logits" if self.is_linear else self.strategy


def grad_enabled() -> bool:
    """Returns whether autograd records calls; it does not in inference mode, even in grad mode."""
    if not torch.is_grad_enabled():
        return False
    return is_dynamo_compiling() or not torch.is_inference_mode_enabled()  # Dynamo cannot trace it


def parameters_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Returns the parameters of a function with their defaults, `...` for no default."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: ... if p.default is p.empty else p.default for p in parameters}


def reduction_of(
    size_average: bool | None, reduce: bool | None, reduction: str, warn: bool = True
) -> str:
    """Returns the reduction of a loss; the two deprecated arguments take precedence."""
    if size_average is None and reduce is None:
        return reduction
    if not is_dynamo_compiling():  # Dynamo cannot trace torch's function, nor a warning
        return legacy_reduction(size_average, reduce, warn)
    if reduce is not None and not reduce:
        return "none"
    return "mean" if size_average is None or size_average else "sum"
