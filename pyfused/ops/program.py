"""Programs: what the kernels run for a formula of the user's, simplified.

An expression is a number: the place of its operation and arguments in an :class:`Expressions`,
which has each once and rewrites it as it comes in. Some rewrites save work, such as ``x ** 2`` as
``x * x``. Others are stable where the formula is not: ``log(1 + exp(u))`` is ``softplus(u)``, which
does not overflow. They follow derivatives as well, so that these are stable, too.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pyfused.backends.cpu import native

OPERANDS = 4  # at most
_VALUE, _REGISTERS = OPERANDS, 2 * OPERANDS + 1  # places, as program.h counts them
_NO_INSTRUCTIONS = ("operand", "scale", "parameter", "literal")
_COMMUTATIVE = ("add", "mul", "eq")
_POSITIVE = ("exp", "sigmoid")  # by which a quotient may be multiplied without a change
_MOST_KERNELS = 1024
_FOLDED: dict[str, Callable[..., float]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "neg": operator.neg,
}


class TooLargeError(ValueError):
    """A program needs more registers or constants than the kernels have."""


class Expressions:
    """Expressions, each once; ``self.add(a, b)`` and the like make one."""

    def __init__(self) -> None:
        self.nodes: list[tuple[str, tuple[Any, ...]]] = []
        self._places: dict[tuple[str, tuple[Any, ...]], int] = {}
        self.scalars: list[bool] = []  # whether it is the same for all elements
        self.stabilized = False  # whether one is finite where torch's overflows

    def __getattr__(self, op: str) -> Callable[..., int]:
        def make(*arguments: int) -> int:
            return self.make(op, *arguments)

        return make

    def literal(self, value: float) -> int:
        return self._place("literal", (float(value),))

    def input(self, kind: str, k: int) -> int:
        """An "operand", a "parameter" or the "scale" of the gradients."""
        return self._place(kind, (k,))

    def make(self, op: str, *arguments: int) -> int:
        values = [self.value(argument) for argument in arguments]
        if op in _FOLDED and None not in values and not (op == "div" and not values[1]):
            return self.literal(_FOLDED[op](*values))
        if op in _COMMUTATIVE:  # scalars come last
            a, b = arguments
            if (self.scalars[a], a) > (self.scalars[b], b):
                arguments = b, a
        rewrite = _REWRITES.get(op)
        found = rewrite(self, *arguments) if rewrite else None
        return self._place(op, arguments) if found is None else found

    def _place(self, op: str, arguments: tuple[Any, ...]) -> int:
        key = (op, (str(arguments[0]),)) if op == "literal" else (op, arguments)  # -0.0 is not 0.0
        place = self._places.get(key)
        if place is None:
            place = self._places[key] = len(self.nodes)
            self.nodes.append((op, arguments))
            of_scalars = op not in _NO_INSTRUCTIONS and all(self.scalars[a] for a in arguments)
            self.scalars.append(op in ("scale", "parameter", "literal") or of_scalars)
        return place

    def value(self, place: int) -> float | None:
        op, arguments = self.nodes[place]
        return arguments[0] if op == "literal" else None

    def arguments(self, place: int, op: str) -> tuple[int, ...] | None:
        """The arguments, None of another operation."""
        found = self.nodes[place]
        return found[1] if found[0] == op else None

    def without(self, place: int, factor: int) -> int | None:
        """A product without one of its factors, None where it is none."""
        if place == factor:
            return self.literal(1.0)
        for left, right in _pairs(self.arguments(place, "mul")):
            rest = self.without(left, factor)
            if rest is not None:
                return self.make("mul", rest, right)
        return None

    def divisors(self, place: int) -> Iterator[tuple[int, int]]:
        """What a factor of a product is divided by, and the product without that."""
        if quotient := self.arguments(place, "div"):
            yield quotient[1], quotient[0]
        for left, right in _pairs(self.arguments(place, "mul")):
            for divisor, rest in self.divisors(left):
                yield divisor, self.make("mul", rest, right)

    def stable(self, place: int) -> int:
        self.stabilized = True
        return place

    def one_plus_exp(self, place: int) -> int | None:
        """u of 1 + exp(u)."""
        for power, one in _pairs(self.arguments(place, "add")):
            exponent = self.arguments(power, "exp")
            if exponent and self.value(one) == 1:
                return exponent[0]
        return None


def _pairs(arguments: tuple[int, ...] | None) -> Iterator[tuple[int, int]]:
    if arguments:
        yield arguments[0], arguments[1]
        yield arguments[1], arguments[0]


# ---- rewrites ------------------------------------------------------------------------------------


def _neg(e: Expressions, a: int) -> int | None:
    if inner := e.arguments(a, "neg"):
        return inner[0]
    if inner := e.arguments(a, "sub"):
        return e.sub(inner[1], inner[0])
    if (inner := e.arguments(a, "mul")) and e.value(inner[1]) is not None:
        return e.mul(inner[0], e.neg(inner[1]))
    return None


def _add(e: Expressions, a: int, b: int) -> int | None:
    if e.value(b) == 0:
        return a
    for one, other in ((a, b), (b, a)):
        if negative := e.arguments(other, "neg"):
            return e.sub(one, negative[0])
    first, second = e.arguments(a, "where"), e.arguments(b, "where")
    if first and second and first[0] == second[0]:  # of a mask one, and of its complement the other
        mask, *values = first
        if e.value(values[1]) == 0 and e.value(second[1]) == 0:
            return e.where(mask, values[0], second[2])
        if e.value(values[0]) == 0 and e.value(second[2]) == 0:
            return e.where(mask, second[1], values[1])
    return None


def _sub(e: Expressions, a: int, b: int) -> int | None:
    if e.value(b) == 0:
        return a
    if negative := e.arguments(b, "neg"):
        return e.add(a, negative[0])
    if (inner := e.arguments(b, "sigmoid")) and e.value(a) == 1:
        return e.stable(e.sigmoid(e.neg(inner[0])))
    if (inner := e.arguments(a, "sigmoid")) and e.value(b) == 1:
        return e.stable(e.neg(e.sigmoid(e.neg(inner[0]))))
    return None


def _mul(e: Expressions, a: int, b: int) -> int | None:
    if e.value(b) == 1:
        return a
    if e.value(b) == -1:
        return e.neg(a)
    if negative := e.arguments(a, "neg"):
        return e.neg(e.mul(negative[0], b))
    if negative := e.arguments(b, "neg"):
        return e.neg(e.mul(a, negative[0]))
    if e.scalars[b] and not e.scalars[a]:
        if (inner := e.arguments(a, "mul")) and e.scalars[inner[1]]:
            return e.mul(inner[0], e.mul(inner[1], b))
        if (inner := e.arguments(a, "where")) and e.scalars[inner[1]] and e.scalars[inner[2]]:
            return e.where(inner[0], e.mul(inner[1], b), e.mul(inner[2], b))
    for one, other in ((a, b), (b, a)):
        for divisor, undivided in e.divisors(one):
            rest = e.without(other, divisor) if e.nodes[divisor][0] in _POSITIVE else None
            if rest is not None:
                return e.stable(e.mul(undivided, rest))
        if exponent := e.arguments(other, "exp"):  # exp(u) sigmoid(-u) = sigmoid(u)
            rest = e.without(one, e.sigmoid(e.neg(exponent[0])))
            if rest is not None:
                return e.stable(e.mul(rest, e.sigmoid(exponent[0])))
    return None


def _div(e: Expressions, a: int, b: int) -> int | None:
    value = e.value(b)
    if value and math.frexp(value)[0] in (0.5, -0.5):  # a power of two: exact
        return e.mul(a, e.literal(1 / value))
    exponent = e.one_plus_exp(b)
    if exponent is not None:  # 1 / (1 + exp(u))
        return e.stable(e.mul(a, e.sigmoid(e.neg(exponent))))
    return e.reciprocal(b) if e.value(a) == 1 else None


def _reciprocal(e: Expressions, a: int) -> int | None:
    exponent = e.one_plus_exp(a)
    return None if exponent is None else e.stable(e.sigmoid(e.neg(exponent)))


def _log(e: Expressions, a: int) -> int | None:
    exponent = e.one_plus_exp(a)
    if exponent is not None:
        return e.stable(e.softplus(exponent))
    if inner := e.arguments(a, "sigmoid"):
        return e.stable(e.neg(e.softplus(e.neg(inner[0]))))
    return None


def _log1p(e: Expressions, a: int) -> int | None:
    inner = e.arguments(a, "exp")
    return e.stable(e.softplus(inner[0])) if inner else None


POWERS: dict[float | None, Callable[[Expressions, int], int]] = {  # of exponents
    0.0: lambda e, _: e.literal(1.0),
    1.0: lambda _, a: a,
    2.0: lambda e, a: e.mul(a, a),
    3.0: lambda e, a: e.mul(e.mul(a, a), a),
    4.0: lambda e, a: e.mul(e.mul(a, a), e.mul(a, a)),
    0.5: lambda e, a: e.sqrt(a),
    -0.5: lambda e, a: e.rsqrt(a),
    -1.0: lambda e, a: e.reciprocal(a),
    -2.0: lambda e, a: e.reciprocal(e.mul(a, a)),
}


def _pow(e: Expressions, a: int, b: int) -> int | None:
    make = POWERS.get(e.value(b))
    return make(e, a) if make else None


def _not(e: Expressions, a: int) -> int | None:
    inner = e.arguments(a, "not")
    return inner[0] if inner else None


def _where(e: Expressions, mask: int, a: int, b: int) -> int | None:
    if a == b:
        return a
    inner = e.arguments(mask, "not")
    return e.where(inner[0], b, a) if inner else None


_REWRITES: dict[str, Callable[..., int | None]] = {
    "neg": _neg,
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "div": _div,
    "reciprocal": _reciprocal,
    "log": _log,
    "log1p": _log1p,
    "pow": _pow,
    "not": _not,
    "where": _where,
}

# ---- programs ------------------------------------------------------------------------------------

Line = tuple[str, int, tuple[int, ...]]  # an instruction, the place of its result, its arguments'


@dataclass(eq=False)
class Program:
    """Instructions on places, as csrc/program.h has them, and what they make.

    Attributes:
        name: The formula's.
        prologue: Those on scalars.
        constants: Literals; the scale of the gradients and the parameters come first.
        has_value: Whether the value is among the outputs.
    """

    name: str
    prologue: tuple[Line, ...]
    body: tuple[Line, ...]
    constants: tuple[float, ...]
    parameters: int
    registers: int
    has_value: bool
    _kernels: dict[Any, Any] = field(default_factory=dict)

    def kernel(self, key: Any, make: Callable[[Program], Any]) -> Any:
        """What a backend makes of it, once for a key."""
        found = self._kernels.get(key)
        if found is None:
            if len(self._kernels) >= _MOST_KERNELS:
                self._kernels.clear()
            found = self._kernels[key] = make(self)
        return found

    def is_scalar(self, place: int) -> bool:
        return place >= _REGISTERS + self.registers

    def lines(self, operands: Sequence[str], parameters: Sequence[str]) -> list[str]:
        """In words, one instruction a line."""
        names = dict(enumerate(operands)) | {_VALUE: "value"}
        names |= {_VALUE + 1 + k: f"grad_{name}" for k, name in enumerate(operands)}
        names |= {_REGISTERS + k: f"r{k}" for k in range(self.registers)}
        first, given = _REGISTERS + self.registers, ("scale", *parameters)
        for k, value in enumerate(self.constants):
            names[first + k] = given[k] if k < len(given) else f"{value:g}"
        for k, (_, out, _arguments) in enumerate(self.prologue):
            names[out] = f"s{k}"
        return [
            f"{names[out]} = {op}({', '.join(names[a] for a in arguments)})"
            for op, out, arguments in (*self.prologue, *self.body)
        ]


class Lowered:
    """Expressions in the instructions of the kernels, pairs of them fused."""

    def __init__(self, e: Expressions, value: int, gradients: Sequence[int]) -> None:
        self.outputs, one = (value, *gradients), e.literal(1.0)
        self.nodes = [
            ("sub", (one, *arguments)) if op == "not" else (op, arguments)
            for op, arguments in e.nodes
        ]
        self._order: dict[int, float] = {}  # of an expression that is made after its first use
        self._share_decays(e)
        self.scalars = e.scalars
        alive = self._alive(self.outputs)
        uses = Counter(self.outputs)
        for place in alive:
            uses.update(self._arguments(place))
        for place in alive:
            if not self.scalars[place]:
                self.nodes[place] = self._fused(*self.nodes[place], uses)

    def _share_decays(self, e: Expressions) -> None:
        """Of sigmoid(u), sigmoid(-u), softplus(u) and softplus(-u) exp(-|u|) is computed once."""
        of_size: dict[int, list[int]] = {}
        for place in self._alive(self.outputs):
            op, arguments = self.nodes[place]
            if op in ("sigmoid", "softplus") and not e.scalars[place]:
                negative = e.arguments(arguments[0], "neg")
                of_size.setdefault((negative or arguments)[0], []).append(place)
        for size, places in of_size.items():
            if len(places) > 1:
                decay = e.make("decay", size)
                self.nodes.append(e.nodes[decay])
                self._order[decay] = places[0] - 0.5
                for place in places:
                    op, arguments = self.nodes[place]
                    self.nodes[place] = f"{op}_from", (decay, *arguments)

    def _arguments(self, place: int) -> tuple[int, ...]:
        op, arguments = self.nodes[place]
        return () if op in _NO_INSTRUCTIONS else arguments

    def _alive(self, outputs: Sequence[int]) -> list[int]:
        found, todo = set(), list(outputs)
        while todo:
            place = todo.pop()
            if place not in found:
                found.add(place)
                todo += self._arguments(place)
        return sorted(found, key=lambda place: self._order.get(place, place))

    def _fused(
        self, op: str, arguments: tuple[Any, ...], uses: Counter[int]
    ) -> tuple[str, tuple[Any, ...]]:
        def product(place: int) -> tuple[int, ...] | None:
            alone = uses[place] == 1 and not self.scalars[place]
            return self.nodes[place][1] if alone and self.nodes[place][0] == "mul" else None

        if op == "where" and self.nodes[arguments[0]][0] in ("lt", "le", "eq"):
            comparison, operands = self.nodes[arguments[0]]
            return f"where_{comparison}", (*operands, *arguments[1:])
        if op in ("add", "sub"):
            a, b = arguments
            if factors := product(a):
                return ("muladd" if op == "add" else "mulsub"), (*factors, b)
            if factors := product(b):
                return ("muladd" if op == "add" else "submul"), (*factors, a)
        return op, arguments

    def program(
        self, name: str, parameters: int, wants_value: bool, wanted: Sequence[bool]
    ) -> Program:
        """That of the wanted outputs; registers are free again after their last use.

        Raises:
            TooLargeError: There are not enough registers or constants.
        """
        wants = (wants_value, *wanted)
        outputs = {_VALUE + k: o for k, o in enumerate(self.outputs) if k < len(wants) and wants[k]}
        alive = self._alive([*outputs.values()])
        places: dict[int, int] = {}
        constants, scalars = [0.0] * (1 + parameters), [p for p in alive if self.scalars[p]]
        for place in scalars:
            op, arguments = self.nodes[place]
            if op in ("scale", "parameter"):
                places[place] = arguments[0] + 1 if op == "parameter" else 0
            else:
                places[place] = len(constants)
                constants.append(arguments[0] if op == "literal" else 0.0)
        body, registers = self._allocate(alive, outputs, places)
        first = _REGISTERS + registers
        if registers > native.program_registers or len(constants) > native.program_constants:
            raise TooLargeError("the formula has too many operations")

        def moved(place: int) -> int:
            return places[place] + first

        prologue = [
            (self.nodes[p][0], moved(p), tuple(map(moved, self.nodes[p][1])))
            for p in scalars
            if self.nodes[p][0] not in _NO_INSTRUCTIONS
        ]
        return Program(
            name,
            tuple(prologue),
            tuple([
                (op, out, tuple([moved(a) if scalar else a for scalar, a in arguments]))
                for op, out, arguments in body
            ]),
            tuple(constants),
            parameters,
            registers,
            wants_value,
        )  # fmt: skip

    def _allocate(
        self, alive: Sequence[int], outputs: dict[int, int], places: dict[int, int]
    ) -> tuple[list[tuple[str, int, list[tuple[bool, int]]]], int]:
        """The body, whose arguments that are scalars are expressions still, and its registers."""
        last: dict[int, int] = {}
        for place in alive:
            for argument in self._arguments(place):
                last[argument] = place
        written: dict[int, int] = {}  # expressions by the first output that they are
        for out, place in outputs.items():
            written.setdefault(place, out)
        body, free, registers = [], list[int](), 0

        def arguments_of(arguments: Sequence[int]) -> list[tuple[bool, int]]:
            return [(self.scalars[a], a if self.scalars[a] else places[a]) for a in arguments]

        for place in alive:
            op, arguments = self.nodes[place]
            if self.scalars[place]:
                continue
            if op == "operand":
                places[place] = arguments[0]
                continue
            read = arguments_of(arguments)
            for argument in set(arguments):
                in_register = not self.scalars[argument] and places[argument] >= _REGISTERS
                if in_register and last[argument] == place:
                    free.append(places[argument])
            if place in written:
                places[place] = written[place]
            elif free:
                places[place] = free.pop()
            else:
                places[place] = _REGISTERS + registers
                registers += 1
            body.append((op, places[place], read))
        for out, place in outputs.items():
            if self.scalars[place] or places[place] != out:
                body.append(("copy", out, arguments_of([place])))
        return body, registers
