"""Programs: what the kernels run for a formula of the user's, simplified.

An expression is a number: the place of its operation and arguments in an :class:`Expressions`,
which has each once and rewrites it as it comes in, by a table. Derivatives are rewritten as well,
so that they are stable where the formula is.
"""

from __future__ import annotations

import ast
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

Node = tuple[str, tuple[Any, ...]]  # an operation and its arguments
Pattern = tuple[Any, ...] | str | float

OPERANDS, MOST_REGISTERS, MOST_CONSTANTS = 4, 64, 256  # as in csrc/program.h
# Places of a program, as program.h counts them: operands, and then these.
VALUE, GRADIENTS, REGISTERS = OPERANDS, OPERANDS + 1, 2 * OPERANDS + 1
CONSTANTS = REGISTERS + MOST_REGISTERS
_SCALAR_LEAVES = ("scale", "parameter", "literal")
_LEAVES = ("operand", *_SCALAR_LEAVES)
_COMMUTATIVE = ("add", "mul", "eq")
_COMPARISONS = ("lt", "le", "eq")
_MAKES_MASK = (*_COMPARISONS, "logical_not")  # whose results are 0 or 1
_MASK_TO_MASK = ("mul", "minimum", "maximum", "where")  # so are these of masks
_FOLDED: dict[str, Callable[..., float]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "neg": operator.neg,
}


class UntraceableError(TypeError):
    """A formula that no kernel can run, and why."""


# ---- rewrites ------------------------------------------------------------------------------------
# Letters stand for expressions: s, t and u for those that are the same for all elements, except for
# very large and very small literals, n for a literal, x for what differs, others for any.

SIMPLER = """
neg(neg(a)) -> a
neg(mul(a, n)) -> mul(a, neg(n))
add(a, 0) -> a
add(a, neg(b)) -> sub(a, b)
add(where(a, b, 0), where(a, 0, c)) -> where(a, b, c)
sub(a, 0) -> a
sub(a, neg(b)) -> add(a, b)
mul(a, 1) -> a
mul(a, -1) -> neg(a)
mul(neg(a), b) -> neg(mul(a, b))
mul(mul(x, s), t) -> mul(x, mul(s, t))
mul(where(a, s, t), u) -> where(a, mul(s, u), mul(t, u))
div(1, a) -> reciprocal(a)
div(neg(a), b) -> neg(div(a, b))
div(where(a, s, t), u) -> where(a, div(s, u), div(t, u))
exp(neg(abs(a))) -> decay(a)
logical_not(logical_not(a)) -> a
where(a, b, b) -> b
where(logical_not(a), b, c) -> where(a, c, b)
pow(a, 0) -> 1
pow(a, 1) -> a
pow(a, 2) -> mul(a, a)
pow(a, 3) -> mul(mul(a, a), a)
pow(a, 4) -> mul(mul(a, a), mul(a, a))
pow(a, 0.5) -> sqrt(a)
pow(a, -0.5) -> rsqrt(a)
pow(a, -1) -> reciprocal(a)
pow(a, -2) -> reciprocal(mul(a, a))
"""
# The same functions, but finite where these overflow or lose all digits.
STABLE = """
log(add(exp(a), 1)) -> softplus(a)
log1p(exp(a)) -> softplus(a)
log(sigmoid(a)) -> neg(softplus(neg(a)))
sub(1, sigmoid(a)) -> sigmoid(neg(a))
sub(sigmoid(a), 1) -> neg(sigmoid(neg(a)))
div(b, add(exp(a), 1)) -> mul(b, sigmoid(neg(a)))
reciprocal(add(exp(a), 1)) -> sigmoid(neg(a))
mul(exp(a), sigmoid(neg(a))) -> sigmoid(a)
mul(exp(a), mul(b, sigmoid(neg(a)))) -> mul(b, sigmoid(a))
mul(exp(a), div(b, exp(a))) -> b
mul(sigmoid(a), div(b, sigmoid(a))) -> b
mul(sigmoid(a), mul(c, div(b, sigmoid(a)))) -> mul(c, b)
mul(div(b, sigmoid(a)), mul(sigmoid(a), sigmoid(a))) -> mul(b, sigmoid(a))
mul(exp(a), mul(b, mul(c, sigmoid(neg(a))))) -> mul(b, mul(c, sigmoid(a)))
"""
# The normal distribution, whose tail 1 + erf loses.
NORMAL = """
mul(add(erf(div(a, 1.4142135623730951)), 1), 0.5) -> ndtr(a)
mul(add(erf(mul(a, 0.7071067811865476)), 1), 0.5) -> ndtr(a)
mul(exp(mul(mul(a, a), -0.5)), 0.3989422804014327) -> density(a)
"""


def _pattern(node: ast.expr) -> Pattern:
    if isinstance(node, ast.Call):
        return node.func.id, *map(_pattern, node.args)  # type: ignore[attr-defined]
    return node.id if isinstance(node, ast.Name) else float(ast.literal_eval(node))


def _letters(pattern: Pattern) -> set[str]:
    if isinstance(pattern, tuple):
        return set().union(*map(_letters, pattern[1:]))
    return {pattern} if isinstance(pattern, str) else set()


def _read(name: str) -> Iterator[tuple[Any, Pattern, str]]:
    for line in globals()[name].strip().splitlines():
        sides = [ast.parse(side.strip(), mode="eval").body for side in line.split("->")]
        yield *map(_pattern, sides), name  # type: ignore[misc]


def is_moderate(value: float | None) -> bool:
    """Returns whether products of two such literals are float32 numbers; None is no literal."""
    return not value or 2.0**-60 <= abs(value) <= 2.0**60


def _exact_reciprocal(value: float | None) -> float | None:
    """Returns the reciprocal of a power of two if it is a normal float32 number, else None."""
    if value and math.frexp(value)[0] in (0.5, -0.5) and 2.0**-126 <= abs(value) <= 2.0**126:
        return 1 / value
    return None


RULES: dict[str, list[tuple[Any, Pattern, str]]] = {}  # by operation
for _rule in (*_read("SIMPLER"), *_read("STABLE"), *_read("NORMAL")):
    RULES.setdefault(_rule[0][0], []).append(_rule)
EXPONENTS = {before[2] for before, *_ in RULES["pow"]}  # for which a power is something else


class Expressions:
    """Expressions, each once; ``self.add(a, b)`` and the like make one.

    Args:
        left_out: A table of rewrites that are not wanted.
    """

    def __init__(self, left_out: str = "") -> None:
        self.left_out = left_out
        self.nodes: list[Node] = []
        self.scalars: list[bool] = []  # whether it is the same for all elements
        self.masks: list[bool] = []  # whether it is 0 or 1
        self.stabilized = False  # whether one is finite where torch's overflows
        self._places: dict[Any, int] = {}

    def __getattr__(self, op: str) -> Callable[..., int]:
        return partial(self.make, op)

    def literal(self, value: float) -> int:
        return self._place("literal", (float(value),))

    def input(self, kind: str, k: int) -> int:
        """Returns an "operand", a "parameter" or the "scale" of the gradients."""
        return self._place(kind, (k,))

    def make(self, op: str, *arguments: int) -> int:
        values = [self.value(argument) for argument in arguments]
        if op in _FOLDED and None not in values:
            return self.literal(_FOLDED[op](*values))
        if op == "div" and (inverse := _exact_reciprocal(values[1])) is not None:
            return self.mul(arguments[0], self.literal(inverse))
        if op in _COMMUTATIVE:  # scalars come last
            arguments = tuple(sorted(arguments, key=lambda place: (self.scalars[place], place)))
        place = self._place(op, arguments)
        for before, after, table in RULES.get(op, ()):
            for found in self._match(before, place, {}) if table != self.left_out else ():
                self.stabilized |= table != "SIMPLER"
                return self._build(after, found)
        return place

    def mask(self, place: int) -> int:
        """1 where an expression is not 0, as NaN is not, and 0 elsewhere."""
        return place if self.masks[place] else self.logical_not(self.eq(place, self.literal(0)))

    def scaled(self, place: int) -> int:
        """Returns a gradient times the scale, which is infinite in the mean of nothing: 0 is 0."""
        op, arguments = self.nodes[place]
        if self.value(place) == 0:
            return place
        if op == "where" and self.value(arguments[1]) == 0:
            return self.where(*arguments[:2], self.scaled(arguments[2]))
        return self.mul(place, self.input("scale", 0))

    def value(self, place: int) -> float | None:
        op, arguments = self.nodes[place]
        return arguments[0] if op == "literal" else None

    def _place(self, op: str, arguments: tuple[Any, ...]) -> int:
        key = (op, str(arguments[0])) if op == "literal" else (op, arguments)  # -0.0 is not 0.0
        place = self._places.setdefault(key, len(self.nodes))
        if place == len(self.nodes):
            self.nodes.append((op, arguments))
            computed = op not in (*_LEAVES, "copy") and all(self.scalars[a] for a in arguments)
            self.scalars.append(op in _SCALAR_LEAVES or computed)
            parts = arguments[1:] if op == "where" else arguments
            preserved = op in _MASK_TO_MASK and all(self.masks[part] for part in parts)
            is_bit = op == "literal" and arguments[0] in (0.0, 1.0)
            self.masks.append(op in _MAKES_MASK or preserved or is_bit)
        return place

    def _match(
        self, pattern: Pattern, place: int, letters: dict[str, int]
    ) -> Iterator[dict[str, int]]:
        """Yields what the letters stand for, for each way in which an expression has a pattern."""
        op, arguments = self.nodes[place]
        if isinstance(pattern, float):
            if self.value(place) == pattern:
                yield letters
        elif _letters(pattern) <= letters.keys():
            if self._build(pattern, letters) == place:
                yield letters
        elif isinstance(pattern, tuple):
            for order in (arguments, arguments[::-1])[: 1 + (op in _COMMUTATIVE)]:
                found = [letters] if op == pattern[0] else []
                for part, argument in zip(pattern[1:], order, strict=False):
                    found = [more for each in found for more in self._match(part, argument, each)]
                yield from found
        elif (
            (pattern not in "stu" or (self.scalars[place] and is_moderate(self.value(place))))
            and (pattern != "n" or self.value(place) is not None)
            and (pattern != "x" or not self.scalars[place])
        ):
            yield {**letters, pattern: place}

    def _build(self, pattern: Pattern, letters: dict[str, int]) -> int:
        if isinstance(pattern, tuple):
            return self.make(pattern[0], *[self._build(part, letters) for part in pattern[1:]])
        return letters[pattern] if isinstance(pattern, str) else self.literal(pattern)


# ---- programs ------------------------------------------------------------------------------------

Line = tuple[str, int, tuple[int, ...]]  # an instruction, the place of its result, its arguments'


@dataclass(eq=False)
class Program:
    """Instructions on places, as csrc/program.h has them.

    Attributes:
        name: The formula's.
        prologue: Those on scalars.
        constants: Literals; the scale of the gradients and the parameters come first.
        parameters: How many there are.
    """

    name: str
    prologue: list[Line]
    body: list[Line]
    constants: list[float]
    parameters: int
    _kernels: dict[Any, Any] = field(default_factory=dict)

    def kernel(self, key: Any, make: Callable[[Program], Any]) -> Any:
        """Returns what a backend makes of it, once for a key."""
        kernel = self._kernels.get(key)
        if kernel is None:
            kernel = self._kernels.setdefault(key, make(self))  # another thread may have been first
        return kernel

    def names(self, operands: Sequence[str], constants: Sequence[str]) -> dict[int, str]:
        """Returns a name for each register, operand, gradient and constant, by its index."""
        names = [*operands, *[""] * (OPERANDS - len(operands))]
        names += ["value", *(f"grad_{name}" for name in names)]
        names += [f"r{k}" for k in range(MOST_REGISTERS)]
        return dict(enumerate([*names, *constants]))

    def lines(self, operands: Sequence[str], parameters: Sequence[float]) -> list[str]:
        """Returns the instructions in words, one for each line."""
        literals = self.constants[1 + self.parameters :]
        constants = ["scale", *[f"{value:g}" for value in (*parameters, *literals)]]
        for k, (_, out, _arguments) in enumerate(self.prologue):
            constants[out - CONSTANTS] = f"s{k}"
        names = self.names(operands, constants)
        return [
            f"{names[out]} = {op}({', '.join(names[a] for a in arguments)})"
            for op, out, arguments in (*self.prologue, *self.body)
        ]


def _needed(nodes: Mapping[int, Node], outputs: Sequence[int]) -> dict[int, Node]:
    """Returns what the outputs are computed from, each after its arguments."""
    found: dict[int, Node] = {}
    todo = list(reversed(outputs))
    while todo:
        op, arguments = nodes[todo[-1]]
        missing = [a for a in arguments if a not in found] if op not in _LEAVES else []
        if missing:
            todo += missing[::-1]
        else:
            place = todo.pop()
            found[place] = nodes[place]
    return found


def _fused(e: Expressions, outputs: Sequence[int]) -> dict[int, Node]:
    """Returns the instructions for the outputs: pairs are one; exp(-|a|) is computed once.

    ``sigmoid`` and ``softplus`` are two: one loop with both is not faster.
    """
    one = e.literal(1.0)
    nodes = _needed(dict(enumerate(e.nodes)), outputs)
    uses = Counter(outputs)
    for op, arguments in nodes.values():
        if op not in _LEAVES:
            uses.update(arguments)

    # For each power, the power with an exponent lower by 1, which is in its derivative.
    powers = {k: (a[0], e.sub(a[1], one)) for k, (op, a) in nodes.items() if op == "pow"}

    def product(place: int) -> tuple[int, ...]:
        alone = uses[place] == 1 and not e.scalars[place] and e.nodes[place][0] == "mul"
        return e.nodes[place][1] if alone else ()

    def instruction(place: int, op: str, arguments: tuple[Any, ...]) -> Node:
        if op == "logical_not":
            return "sub", (one, *arguments)
        if op in ("sigmoid", "softplus"):
            negated, inner = e.nodes[arguments[0]]
            size = inner[0] if negated == "neg" else arguments[0]
            return f"{op}_from", (e.decay(size), *arguments)
        if e.scalars[place]:
            return op, arguments
        if op == "where" and e.nodes[arguments[0]][0] in _COMPARISONS:
            comparison, compared = e.nodes[arguments[0]]
            return f"where_{comparison}", (*compared, *arguments[1:])
        if op in ("add", "sub"):
            a, b = arguments
            if factors := product(a):
                return ("muladd" if op == "add" else "mulsub"), (*factors, b)
            if factors := product(b):
                return ("muladd" if op == "add" else "submul"), (*factors, a)
        if op == "pow":  # the compiler vectorises no loop with conditions on a constant
            more = [k for k, node in powers.items() if node == arguments and k != place]
            arguments = tuple([e.copy(a) if e.scalars[a] else a for a in arguments])
            return ("pow_less", (more[0], *arguments)) if more else (op, arguments)
        return op, arguments

    fused = {place: instruction(place, *node) for place, node in nodes.items()}
    return _needed(dict(enumerate(e.nodes)) | fused, outputs)


def compiled(
    name: str, e: Expressions, outputs: Sequence[int], wanted: Sequence[bool], parameters: int
) -> Program:
    """Returns the program of the wanted outputs: the value, and the gradient of each operand.

    Its instructions are some of those for all outputs, in the same order, and what is both written
    and read again has a register in any case. So no program needs more registers or constants than
    the one for all outputs, and if that can be compiled, so can those for other wanted outputs.

    Raises:
        UntraceableError: There are not enough registers or constants.
    """
    found = {VALUE + k: o for k, (o, w) in enumerate(zip(outputs, wanted, strict=True)) if w}
    nodes = _fused(e, outputs)
    needed = _needed(nodes, [*found.values()])
    nodes = {place: node for place, node in nodes.items() if place in needed}
    last = {a: place for place, (op, given) in nodes.items() if op not in _LEAVES for a in given}
    written = {place: out for out, place in reversed(found.items())}
    free = list(range(CONSTANTS - 1, REGISTERS - 1, -1))
    program = Program(name, [], [], [0.0] * (1 + parameters), parameters)
    places: dict[int, int] = {}
    registers: dict[int, int] = {}
    for place, (op, arguments) in nodes.items():
        if op == "operand":
            places[place] = arguments[0]
        elif op in ("scale", "parameter"):
            places[place] = CONSTANTS + (op == "parameter") * (1 + arguments[0])
        elif e.scalars[place]:
            places[place] = CONSTANTS + len(program.constants)
            program.constants.append(arguments[0] if op == "literal" else 0.0)
            if op != "literal":
                line = op, places[place], tuple([places[a] for a in arguments])
                program.prologue.append(line)
        else:
            given = tuple([places[a] for a in arguments])
            ended = {a for a in arguments if last[a] == place}
            free += [registers[a] for a in ended if a in registers]
            if place in last:
                if not free:
                    raise UntraceableError("the formula has too many operations")
                registers[place] = free.pop()
            places[place] = written[place] if place in written else registers[place]
            program.body.append((op, places[place], given))
    for out, place in found.items():
        if places[place] != out:
            program.body.append(("copy", out, (places[place],)))
    if len(program.constants) > MOST_CONSTANTS:
        raise UntraceableError("the formula has too many constants")
    return program
