"""What an operator declares, of whichever family; ``operators.py`` holds the declarations."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import functional as F

from pyfused import checks
from pyfused.dispatch.originals import original
from pyfused.layout import broadcast_numel
from pyfused.torch_internals import legacy_reduction
from pyfused.types import TENSORS, Options

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}  # as torch's built-in functions count them

Arguments = tuple[Any, ...]  # of a call: all that torch's function takes, by position


class Operand(NamedTuple):
    """A tensor among the arguments, or None where it is optional.

    Attributes:
        low, high: Between which its values have a meaning.
        differentiated: Whether the kernels compute its gradient.
        optional: It may be None.
        indices: It may hold class indices, or other integers.
        labels: It holds several class indices for each row, which end at the first -1.
        sign: Its values are -1 and 1.
        number: It may be a float, which stands for a tensor full of it.
        enforced: What torch raises for other values, on CPUs, None where it does not look.
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
    """A number among the arguments, in its bounds; a tensor of one element may hold it.

    Attributes:
        default: Of a function that torch does not have; where torch's has no default, a value to
            try it with.
        optional: None is as good as a number that is none.
        positive: It is more than 0.
        flag: It is no number, but as good as True or False, and each has a kernel.
        words: It is no number, but one of these, and each has a kernel.
        special: A number that has a kernel, which is the faster one.
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
        """Returns the values that have a kernel, and None for a number."""
        if self.flag or self.words:
            return self.words or (False, True)
        return (None,) if self.special is None else (None, self.special)

    def fits(self, value: Any) -> bool:
        """Returns whether it is a number in the bounds, or one of the words."""
        if self.words:
            return value in self.words
        inside = isinstance(value, (int, float)) and self.low <= value <= self.high
        return inside and not (self.positive and value <= 0)


TOKEN_WEIGHT = Operand("token_weight", differentiated=False, optional=True)


@dataclass(eq=False, kw_only=True, repr=False)
class Operator(ABC):
    """What is known of an operator. Whatever else has to know it asks here.

    Attributes:
        name: Ours, torch's and the kernel's.
        module: The module's name, in ``torch.nn`` and in ``pyfused.nn``.
        operands: The tensors, the input first.
        scalars: The numbers, in the order in which the formula takes them.
        fallback_reason: Why torch's operator takes a call, None where the kernel does.
        definition: The operator in torch's terms, where torch has none of this name.
        built_in: What has to be given to the functions of this name that torch has built in, by
            position or name; empty where these are no functions for users.

        reference, reference_: torch's function, whatever pyfused.patch puts in its place, and as it
            overwrites the input.
        aten, aten_: The same on the shortest way, where no subclass or mode is to see the call.
        arguments: The names of what the function takes, but for ``inplace``, in its order.
        defaults: Of the arguments but for the input.
        scalar_places: Where the scalars stand among the arguments, each beside its scalar.
        others: The tensors but for the input, likewise.
        broadcast: Where the tensors stand that the input broadcasts with.
        counts_logits: The size of a call is that of a linear layer's output.
        strategy: How CPU kernels go through an input, in words.
        options: The class of the options, which are then the last argument.
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
    aten: Callable[..., Tensor] = field(init=False)
    aten_: Callable[..., Tensor] = field(init=False)
    arguments: tuple[str, ...] = field(init=False)
    defaults: Arguments = field(init=False)
    scalar_places: tuple[tuple[int, Scalar], ...] = field(init=False)
    others: tuple[tuple[int, Operand], ...] = field(init=False)
    broadcast: tuple[int, ...] = field(init=False, default=())
    counts_logits: bool = field(init=False)
    strategy: ClassVar[str] = "element by element"
    options: ClassVar[type[Options] | None] = None

    def __post_init__(self) -> None:
        self.reference = self.definition or original(getattr(F, self.name))
        self.reference_ = self.aten = self.aten_ = self.reference
        names = parameters_of(self.reference)
        if "inplace" in names:
            self.reference_ = partial(self.reference, inplace=True)
        self.arguments = tuple(name for name in names if name != "inplace")
        self.defaults = tuple(names[name] for name in self.arguments[1:])
        self.scalar_places = tuple((self.arguments.index(s.name), s) for s in self.scalars)
        self.counts_logits = "linear_weight" in self.arguments
        reduces = "reduction" in self.arguments
        self._reduction = self.arguments.index("reduction") if reduces else None
        self.others = tuple((self.arguments.index(o.name), o) for o in self.operands[1:])

    def bind(self, *arguments: Any, **by_name: Any) -> Arguments:
        """Returns the arguments as `call` takes them, from torch's function or from pyfused's."""
        return arguments + tuple([by_name[name] for name in self.arguments[len(arguments) :]])

    def kernel_of(self, values: Sequence[Any]) -> tuple[str, tuple[Any, ...]]:
        """Returns the name of the kernel for values of the scalars, and its numbers."""
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

    @property
    def required(self) -> dict[str, Any]:
        """Returns a value to try of each scalar that callers have to give."""
        places = self.scalar_places
        return {s.name: s.default for place, s in places if self.defaults[place - 1] is ...}

    @property
    def family(self) -> str:
        """Returns the row of the table of sizes for an operator that has none of its own."""
        return type(self).__name__

    def takes_second_limit(self, arguments: Arguments, few: int) -> bool:  # noqa: ARG002
        """Returns whether the second limit of the table of sizes is for a call.

        Args:
            few: Up to so many classes there are few.
        """
        return self._reduction is not None and bool(arguments[self._reduction] == "none")

    def is_forward_alone(self, arguments: Arguments) -> bool:
        """Returns whether no gradient follows a call."""
        places = (0, *(place for place, operand in self.others if operand.differentiated))
        return not torch.is_grad_enabled() or not any(
            isinstance(arguments[place], TENSORS) and arguments[place].requires_grad
            for place in places
        )

    def elements(self, arguments: Arguments) -> int:
        """Returns how many elements a call computes: those of the logits, or of all operands."""
        if self.counts_logits and isinstance(arguments[1], Tensor):
            input, linear_weight = arguments[:2]
            rows, classes = input.shape[:-1].numel(), linear_weight.shape[:-1].numel()
            return rows * classes if input.numel() else 0
        return broadcast_numel([arguments[0], *[arguments[place] for place in self.broadcast]])

    @abstractmethod
    def plan(self, arguments: Arguments, inplace: bool) -> Callable[[Arguments], Any]:
        """Checks types, shapes and options, and returns what computes calls of this signature.

        Args:
            arguments: Those of the call, with a TensorSpec in place of each tensor.
        """

    def compiled(self, arguments: Arguments) -> Any:
        """Returns the result within a program that is being compiled."""
        raise NotImplementedError

    @abstractmethod
    def check(self, arguments: Arguments) -> None:
        """Raises for arguments that are wrong, values included; torch's operator has raised."""

    def check_scalars(self, arguments: Arguments) -> None:
        for place, scalar in self.scalar_places:
            if not (scalar.flag or scalar.words or (scalar.optional and arguments[place] is None)):
                name, _, low, high, positive, *_ = scalar
                checks.scalar(name, arguments[place], low, high, positive)

    def give_up(self, input: Tensor) -> None:  # noqa: B027 most have nothing to prepare
        """Prepares an input whose memory a call is to take."""

    def inplace_fallback_reason(self, input: Tensor) -> str | None:  # noqa: ARG002
        """Returns why torch's operator is to overwrite the input, None where a kernel is."""
        return None

    def local_of(self, arguments: Arguments) -> Any:  # noqa: ARG002
        """Returns this process' part of DTensors that the kernels take, None of other tensors."""
        return None

    def strategy_of(self, arguments: Arguments) -> str:  # noqa: ARG002
        """Returns how a CPU kernel goes through the arguments of a call, in words."""
        return "some logits at a time" if self.counts_logits else self.strategy


def parameters_of(function: Any) -> dict[str, Any]:
    """Returns a Python function's parameters with their defaults, or `...`.

    A function that someone has wrapped has those of the function within, and one with a
    ``__signature__`` those of that. `inspect.signature` would take 0.1 ms.
    """
    if signature := getattr(function, "__signature__", None):
        given = signature.parameters.values()
        return {p.name: ... if p.default is p.empty else p.default for p in given}
    function = inspect.unwrap(function)
    code, by_place = function.__code__, function.__defaults__ or ()
    names = code.co_varnames[: code.co_argcount]
    found = dict.fromkeys(names, ...) | dict(zip(reversed(names), reversed(by_place), strict=False))
    for name in code.co_varnames[code.co_argcount :][: code.co_kwonlyargcount]:
        found[name] = (function.__kwdefaults__ or {}).get(name, ...)
    return found


def reduction_of(
    size_average: bool | None, reduce: bool | None, reduction: str, warn: bool = True
) -> str:
    """Returns the reduction of a loss, where two deprecated arguments take precedence."""
    if size_average is None and reduce is None:
        return reduction
    if not is_dynamo_compiling():  # which cannot trace torch's function, nor a warning
        return legacy_reduction(size_average, reduce, warn)
    if reduce is not None and not reduce:
        return "none"
    return "mean" if size_average is None or size_average else "sum"
