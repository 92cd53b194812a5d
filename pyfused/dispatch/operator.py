"""The base class of operators. ``pyfused/ops/operators.py`` holds the declarations."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import functional as F

from pyfused import checks
from pyfused.dispatch.originals import original
from pyfused.layout import broadcast_numel
from pyfused.torch_internals import legacy_reduction
from pyfused.types import VocabOptions

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}  # at::Reduction

Arguments = tuple[Any, ...]  # all arguments of torch's function except `inplace`, by position


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
    enforced: type[Exception] | None = None


class Scalar(NamedTuple):
    """A numeric argument, which may be a tensor of one element.

    Attributes:
        default: The default of a function that torch lacks. If torch's function has no default, an
            example value.
        low, high: The bounds of valid values, inclusive.
        positive: Whether 0 is excluded.
        optional: Whether it may be None, which kernels receive as NaN.
        flag: Whether it is a bool; each value has its own kernel.
        words: The valid values if it is a string; each has its own kernel.
        special: A value with its own, faster kernel; None if there is none.
    """

    name: str
    default: Any = None
    low: float = -math.inf
    high: float = math.inf
    positive: bool = False
    optional: bool = False
    flag: bool = False
    words: tuple[str, ...] = ()
    special: float | None = None

    @property
    def cases(self) -> tuple[Any, ...]:
        """Returns the values that have their own kernel; None stands for all other numbers."""
        if self.flag or self.words:
            return self.words or (False, True)
        return (None,) if self.special is None else (None, self.special)

    def fits(self, value: Any) -> bool:
        """Returns whether a value is a number within the bounds, or one of the words."""
        if self.words:
            return value in self.words
        in_bounds = isinstance(value, (int, float)) and self.low <= value <= self.high
        return in_bounds and not (self.positive and value <= 0)


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
        tensor_names: The names of arguments and options that are tensors. A tensor elsewhere holds
            a number.
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
    tensor_names: tuple[str, ...] = field(init=False)
    broadcast: tuple[int, ...] = field(init=False, default=())
    is_linear: bool = field(init=False)
    strategy: ClassVar[str] = "element by element"
    options: ClassVar[type[VocabOptions] | None] = None

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
        names_of_operands = [operand.name for operand in self.operands]
        self.tensor_names = *names_of_operands, "token_weight", "denominator"
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
            last: The arguments after the operands and the scalars, with their defaults.
        """
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        defaults = {scalar.name: scalar.default for scalar in self.scalars} | last
        parameters = [inspect.Parameter(operand.name, kind) for operand in self.operands]
        parameters += [inspect.Parameter(n, kind, default=v) for n, v in defaults.items()]

        def definition(*args: Any, **kwargs: Any) -> Tensor:
            kwargs = defaults | dict(zip(self.arguments, args, strict=False)) | kwargs
            for operand in self.operands:
                checks.tensor(operand.name, kwargs.get(operand.name))
            arguments = tuple([kwargs[name] for name in self.arguments])
            self.check_scalars(arguments)
            return compute(*arguments)

        definition.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return definition

    def bind(self, *args: Any, **kwargs: Any) -> Arguments:
        """Returns the arguments in the order that `call` expects."""
        return args + tuple([kwargs[name] for name in self.arguments[len(args) :]])

    def kernel_of(self, values: Sequence[Any]) -> tuple[str, tuple[Any, ...]]:
        """Returns the name of the kernel for these values of the scalars, and its numbers."""
        name, numbers = self.name, list[Any]()
        for scalar, value in zip(self.scalars, values, strict=True):
            if scalar.flag:
                name += f"_{scalar.name}" if value else ""
            elif scalar.words:
                name += f"_{value}" if value != scalar.words[0] else ""
            elif type(value) in (int, float) and value == scalar.special:
                name += f"_{scalar.name}_{scalar.special:g}"
            else:
                numbers.append(value)
        return name, tuple(numbers)

    def cases(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields the name of each kernel, and the values of the scalars that it is for."""
        names = [scalar.name for scalar in self.scalars]
        for values in product(*(scalar.cases for scalar in self.scalars)):
            yield self.kernel_of(values)[0], dict(zip(names, values, strict=True))

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
    def plan(self, arguments: Arguments, inplace: bool) -> Callable[[Arguments], Any]:
        """Checks types, shapes and options, and returns the plan of a signature.

        Args:
            arguments: The arguments of the call, with a TensorSpec instead of each tensor.
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
            if not (scalar.flag or scalar.words or (scalar.optional and arguments[index] is None)):
                name, _, low, high, positive, *_ = scalar
                checks.scalar(name, arguments[index], low, high, positive)

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
        return "some logits at a time" if self.is_linear else self.strategy


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
