"""Simplifies the expressions of a formula, and compiles them to programs that kernels run.

An expression is an index into :class:`Expressions`, which stores each distinct expression once and
applies rewrite rules when an expression is added.
"""

from __future__ import annotations

import ast
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, NamedTuple

from pyfused.types import Outputs

Node = tuple[str, tuple[Any, ...]]  # an operation and its arguments
Pattern = tuple[Any, ...] | str | float

OPERANDS, MOST_REGISTERS, MOST_CONSTANTS = 4, 64, 256  # the limits in csrc/program.h
# The slots of a program, numbered as in csrc/program.h; the first are the operands.
VALUE, GRADIENTS, REGISTERS = OPERANDS, OPERANDS + 1, 2 * OPERANDS + 1
CONSTANTS = REGISTERS + MOST_REGISTERS
_SCALAR_LEAVES = ("scale", "parameter", "literal")
_LEAVES = ("operand", *_SCALAR_LEAVES)
_COMMUTATIVE = ("add", "mul", "eq")
_COMPARISONS = ("lt", "le", "eq")
_MAKES_MASK = (*_COMPARISONS, "logical_not")  # the result is 0 or 1
_KEEPS_MASK = ("mul", "minimum", "maximum", "where")  # the result is 0 or 1 if the arguments are
_MODERATE = 60  # the largest exponent of moderate literals and parameters
_FOLDED: dict[str, Callable[..., float]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "neg": operator.neg,
    "abs": operator.abs,
    "div": operator.truediv,
    "eq": operator.eq,
    "lt": operator.lt,
    "le": operator.le,
}


class UntraceableError(TypeError):
    """Raised if a formula cannot be compiled to a kernel."""


# ---- rewrites ------------------------------------------------------------------------------------
# Letters match expressions: s, t and u match scalars (the same for all elements), except very large
# and very small literals; n matches literals; x matches non-scalars; other letters match anything.
# These rules change no value, also where an intermediate result overflows or is NaN, except for
# rounding and the signs of zeros in sums of gradients.
EXACT = """
neg(neg(a)) -> a
neg(mul(a, n)) -> mul(a, neg(n))
add(a, neg(b)) -> sub(a, b)
add(where(a, b, 0), where(a, 0, c)) -> where(a, b, c)
sub(a, 0) -> a
sub(a, neg(b)) -> add(a, b)
mul(a, 1) -> a
mul(a, -1) -> neg(a)
mul(neg(a), b) -> neg(mul(a, b))
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
pow(a, -2) -> mul(reciprocal(a), reciprocal(a))
"""
# These rules may avoid an overflow or a cancellation, so only pyfused's operators use them, whose
# values are torch's functions'. They never cause an overflow or an underflow: mul(mul(x, s), t) is
# rewritten only if mul(s, t) is known to be 0 or normal in float32.
ACCURATE = """
mul(mul(x, s), t) -> mul(x, mul(s, t))
mul(add(erf(div(a, 1.4142135623730951)), 1), 0.5) -> ndtr(a)
mul(add(erf(mul(a, 0.7071067811865476)), 1), 0.5) -> ndtr(a)
mul(exp(mul(mul(a, a), -0.5)), 0.3989422804014327) -> density(a)
"""


_REASSOCIATED = ("mul", "x", ("mul", "s", "t"))


class Rule(NamedTuple):
    """A rewrite rule: the pattern, its replacement, and whether it changes no value."""

    before: Any
    after: Pattern
    is_exact: bool


def _pattern(node: ast.expr) -> Pattern:
    if isinstance(node, ast.Call):
        return node.func.id, *map(_pattern, node.args)  # type: ignore[attr-defined]
    return node.id if isinstance(node, ast.Name) else float(ast.literal_eval(node))


def _rules(table: str, is_exact: bool) -> Iterator[Rule]:
    for line in table.strip().splitlines():
        before, after = (ast.parse(side.strip(), mode="eval").body for side in line.split("->"))
        yield Rule(_pattern(before), _pattern(after), is_exact)


RULES: dict[str, list[Rule]] = {}  # keyed by the operation of the pattern
for _rule in (*_rules(EXACT, True), *_rules(ACCURATE, False)):
    RULES.setdefault(_rule.before[0], []).append(_rule)
EXPONENTS = {rule.before[2] for rule in RULES["pow"]}  # exponents for which pow is rewritten


@cache
def _letters(pattern: Pattern) -> frozenset[str]:
    if isinstance(pattern, tuple):
        return frozenset().union(*map(_letters, pattern[1:]))
    return frozenset([pattern] if isinstance(pattern, str) else [])


def _is_moderate(value: float | None) -> bool:
    """Returns whether products of two such literals are normal float32 numbers; True for None."""
    return not value or 2.0**-_MODERATE <= abs(value) <= 2.0**_MODERATE


def _exact_reciprocal(value: float | None) -> float | None:
    """Returns 1 / value if value is a power of two and the result normal in float32, else None."""
    if value and math.frexp(value)[0] in (0.5, -0.5) and 2.0**-126 <= abs(value) <= 2.0**126:
        return 1 / value
    return None


class Expressions:
    """A set of distinct expressions; methods such as ``self.add(a, b)`` add one.

    Args:
        exact: Apply only the rewrites of ``EXACT``.

    Attributes:
        nodes: The operation and the arguments of each expression.
        scalars: Whether each expression has the same value for all elements.
        masks: Whether each expression is always 0 or 1.
    """

    def __init__(self, exact: bool) -> None:
        self.exact = exact
        self.nodes: list[Node] = []
        self.scalars: list[bool] = []
        self.masks: list[bool] = []
        self._indices: dict[Any, int] = {}

    def __getattr__(self, op: str) -> Callable[..., int]:
        return partial(self.make, op)

    def literal(self, value: float) -> int:
        return self._index("literal", (float(value),))

    def input(self, kind: str, k: int) -> int:
        """Returns the k-th "operand" or "parameter", or the "scale" of the gradients."""
        return self._index(kind, (k,))

    def make(self, op: str, *arguments: int) -> int:
        values = [self.value(argument) for argument in arguments]
        if op in _FOLDED and None not in values and (op, values[-1]) != ("div", 0.0):
            result = _FOLDED[op](*values)
            if not result or 2.0**-126 <= abs(result) < 2.0**127:  # normal in float32
                return self.literal(result)
        if op == "where" and values[0] is not None:
            return arguments[1] if values[0] else arguments[2]
        if op == "div" and (inverse := _exact_reciprocal(values[1])) is not None:
            return self.mul(arguments[0], self.literal(inverse))
        if op in _COMMUTATIVE:  # a canonical order, with scalars last
            arguments = tuple(sorted(arguments, key=lambda a: (self.scalars[a], a)))
        index = self._index(op, arguments)
        for rule in RULES.get(op, ()):
            if self.exact and not rule.is_exact:
                continue
            for letters in self._match(rule.before, index, {}):
                if rule.after == _REASSOCIATED and not self._is_normal(letters["s"], letters["t"]):
                    continue
                return self._build(rule.after, letters)
        return index

    def mask(self, index: int) -> int:
        """Returns 1 where an expression is nonzero or NaN, else 0."""
        return index if self.masks[index] else self.logical_not(self.eq(index, self.literal(0)))

    def scaled(self, index: int) -> int:
        """Returns a gradient times the scale; 0 stays 0 if the scale is infinite (empty mean)."""
        op, arguments = self.nodes[index]
        if self.value(index) == 0:
            return index
        if op == "where" and self.value(arguments[1]) == 0:
            return self.where(*arguments[:2], self.scaled(arguments[2]))
        return self.mul(index, self.input("scale", 0))

    def _is_normal(self, *factors: int) -> bool:
        """Returns whether a product of scalars is known to be 0 or a normal float32 number."""
        low = high = 0.0  # bounds of its exponent
        todo = [*factors]
        while todo:
            op, arguments = self.nodes[todo.pop()]
            if op in ("mul", "neg"):
                todo += arguments
            elif op == "parameter":  # numbers of pyfused's operators are moderate
                low, high = low - _MODERATE, high + _MODERATE
            elif op == "scale":  # 1 / (the number of elements)
                low -= 63
            elif op == "literal":
                exponent = math.log2(abs(arguments[0]) or 1.0)
                low, high = low + exponent, high + exponent
            else:
                return False
        return low > -126 and high < 127

    def value(self, index: int) -> float | None:
        """Returns the value of a literal, None for other expressions."""
        op, arguments = self.nodes[index]
        return arguments[0] if op == "literal" else None

    def _index(self, op: str, arguments: tuple[Any, ...]) -> int:
        key = (op, str(arguments[0])) if op == "literal" else (op, arguments)  # keeps -0.0 and 0.0
        index = self._indices.setdefault(key, len(self.nodes))
        if index == len(self.nodes):
            self.nodes.append((op, arguments))
            computed = op not in (*_LEAVES, "copy") and all(self.scalars[a] for a in arguments)
            self.scalars.append(op in _SCALAR_LEAVES or computed)
            parts = arguments[1:] if op == "where" else arguments
            preserved = op in _KEEPS_MASK and all(self.masks[part] for part in parts)
            is_bit = op == "literal" and arguments[0] in (0.0, 1.0)
            self.masks.append(op in _MAKES_MASK or preserved or is_bit)
        return index

    def _match(
        self, pattern: Pattern, index: int, letters: dict[str, int]
    ) -> Iterator[dict[str, int]]:
        """Yields the letters' expressions for each way in which an expression matches a pattern."""
        op, arguments = self.nodes[index]
        if isinstance(pattern, float):
            if str(self.value(index)) == str(pattern):  # 0.0 is not -0.0
                yield letters
        elif _letters(pattern) <= letters.keys():
            if self._build(pattern, letters) == index:
                yield letters
        elif isinstance(pattern, tuple):
            for order in (arguments, arguments[::-1])[: 1 + (op in _COMMUTATIVE)]:
                matches = [letters] if op == pattern[0] else []
                for part, argument in zip(pattern[1:], order, strict=False):
                    matches = [m for match in matches for m in self._match(part, argument, match)]
                yield from matches
        elif (
            (pattern not in "stu" or (self.scalars[index] and _is_moderate(self.value(index))))
            and (pattern != "n" or self.value(index) is not None)
            and (pattern != "x" or not self.scalars[index])
        ):
            yield {**letters, pattern: index}

    def _build(self, pattern: Pattern, letters: dict[str, int]) -> int:
        if isinstance(pattern, tuple):
            return self.make(pattern[0], *[self._build(part, letters) for part in pattern[1:]])
        return letters[pattern] if isinstance(pattern, str) else self.literal(pattern)


# ---- programs ------------------------------------------------------------------------------------

Line = tuple[str, int, tuple[int, ...]]  # the instruction, the result's slot, the arguments' slots


@dataclass(eq=False)
class Program:
    """Instructions on slots; see csrc/program.h.

    Attributes:
        name: The name of the formula.
        prologue: The instructions on scalars, which run once per call.
        body: The instructions on elements.
        constants: The scale of the gradients, the parameters and the literals, in this order.
        parameters: The number of parameters.
    """

    name: str
    prologue: list[Line]
    body: list[Line]
    constants: list[float]
    parameters: int
    _kernels: dict[Any, Any] = field(default_factory=dict)

    def kernel(self, key: Any, make: Callable[[Program], Any]) -> Any:
        """Returns the cached kernel for a key, which ``make`` builds from the program."""
        kernel = self._kernels.get(key)
        if kernel is None:
            kernel = self._kernels.setdefault(key, make(self))  # another thread may be first
        return kernel

    def names(self, operands: Sequence[str], constants: Sequence[str]) -> dict[int, str]:
        """Returns the name of each slot."""
        names = [*operands, *[""] * (OPERANDS - len(operands))]
        names += ["value", *(f"grad_{name}" for name in names)]
        names += [f"r{k}" for k in range(MOST_REGISTERS)]
        return dict(enumerate([*names, *constants]))

    def lines(self, operands: Sequence[str], parameters: Sequence[float]) -> list[str]:
        """Returns the instructions as text, one per line."""
        literals = self.constants[1 + self.parameters :]
        constants = ["scale", *[f"{value:g}" for value in (*parameters, *literals)]]
        for k, (_, out, _arguments) in enumerate(self.prologue):
            constants[out - CONSTANTS] = f"s{k}"
        names = self.names(operands, constants)
        return [
            f"{names[out]} = {op}({', '.join(names[a] for a in arguments)})"
            for op, out, arguments in (*self.prologue, *self.body)
        ]


def _in_order(nodes: Mapping[int, Node], outputs: Sequence[int]) -> dict[int, Node]:
    """Returns the nodes that the outputs depend on, in topological order."""
    ordered: dict[int, Node] = {}
    todo = list(reversed(outputs))
    while todo:
        op, arguments = nodes[todo[-1]]
        missing = [a for a in arguments if a not in ordered] if op not in _LEAVES else []
        if missing:
            todo += missing[::-1]
        else:
            index = todo.pop()
            ordered[index] = nodes[index]
    return ordered


def _fused(e: Expressions, outputs: Sequence[int]) -> dict[int, Node]:
    """Returns the instructions for the outputs, with pairs of operations fused.

    ``sigmoid`` and ``softplus`` of one argument share exp(-|a|), but stay two instructions, because
    one loop that computes both is not faster.
    """
    one = e.literal(1.0)
    nodes = _in_order(dict(enumerate(e.nodes)), outputs)
    uses = Counter(outputs)
    for op, arguments in nodes.values():
        if op not in _LEAVES:
            uses.update(arguments)

    # For each power, the base and the exponent minus 1, which appear in its derivative.
    powers = {k: (a[0], e.sub(a[1], one)) for k, (op, a) in nodes.items() if op == "pow"}

    def factors_of(index: int) -> tuple[int, ...]:
        fits = uses[index] == 1 and not e.scalars[index] and e.nodes[index][0] == "mul"
        return e.nodes[index][1] if fits else ()

    def instruction(index: int, op: str, arguments: tuple[Any, ...]) -> Node:
        if op == "logical_not":
            return "sub", (one, *arguments)
        if op in ("sigmoid", "softplus"):
            negated, inner = e.nodes[arguments[0]]
            size = inner[0] if negated == "neg" else arguments[0]
            suffix = "or_zero" if e.exact and op == "sigmoid" else "from"  # as torch, or accurate
            return f"{op}_{suffix}", (e.decay(size), *arguments)
        if e.scalars[index]:
            return op, arguments
        if op == "where" and e.nodes[arguments[0]][0] in _COMPARISONS:
            comparison, compared = e.nodes[arguments[0]]
            return f"where_{comparison}", (*compared, *arguments[1:])
        if op in ("add", "sub"):
            a, b = arguments
            if factors := factors_of(a):
                return ("muladd" if op == "add" else "mulsub"), (*factors, b)
            if factors := factors_of(b):
                return ("muladd" if op == "add" else "submul"), (*factors, a)
        if op == "pow":  # compilers do not vectorise loops that branch on a constant
            higher = [k for k, node in powers.items() if node == arguments and k != index]
            arguments = tuple([e.copy(a) if e.scalars[a] else a for a in arguments])
            return ("pow_less", (higher[0], *arguments)) if higher else (op, arguments)
        return op, arguments

    fused = {index: instruction(index, *node) for index, node in nodes.items()}
    return _in_order(dict(enumerate(e.nodes)) | fused, outputs)


def compiled(
    name: str, e: Expressions, results: Sequence[int], outputs: Outputs, parameters: int
) -> Program:
    """Compiles the requested outputs of a formula to a program.

    The instructions are a subset of those for all outputs, in the same order, and an output that
    other instructions read has a register. So if the program for all outputs fits into the
    registers and constants, each program for fewer outputs also fits.

    Args:
        results: The expressions of the value and of the gradient of each operand.

    Raises:
        UntraceableError: The program needs too many registers or constants.
    """
    needed = outputs.loss, *(outputs.gradients or (False,) * (len(results) - 1))
    pairs = enumerate(zip(results, needed, strict=True))
    written = {VALUE + k: index for k, (index, is_needed) in pairs if is_needed}
    nodes = _fused(e, results)
    kept = _in_order(nodes, [*written.values()])
    nodes = {index: node for index, node in nodes.items() if index in kept}
    last_use = {a: index for index, (op, args) in nodes.items() if op not in _LEAVES for a in args}
    result_slots = {index: slot for slot, index in reversed(written.items())}
    free = list(range(CONSTANTS - 1, REGISTERS - 1, -1))
    program = Program(name, [], [], [0.0] * (1 + parameters), parameters)
    slots: dict[int, int] = {}
    registers: dict[int, int] = {}
    for index, (op, arguments) in nodes.items():
        if op == "operand":
            slots[index] = arguments[0]
        elif op in ("scale", "parameter"):
            slots[index] = CONSTANTS + (op == "parameter") * (1 + arguments[0])
        elif e.scalars[index]:
            slots[index] = CONSTANTS + len(program.constants)
            program.constants.append(arguments[0] if op == "literal" else 0.0)
            if op != "literal":
                line = op, slots[index], tuple([slots[a] for a in arguments])
                program.prologue.append(line)
        else:
            argument_slots = tuple([slots[a] for a in arguments])
            ended = {a for a in arguments if last_use[a] == index}
            free += [registers[a] for a in ended if a in registers]
            if index in last_use:
                if not free:
                    raise UntraceableError("the formula has too many operations")
                registers[index] = free.pop()
            slots[index] = result_slots[index] if index in result_slots else registers[index]
            program.body.append((op, slots[index], argument_slots))
    for slot, index in written.items():
        if slots[index] != slot:
            program.body.append(("copy", slot, (slots[index],)))
    if len(program.constants) > MOST_CONSTANTS:
        raise UntraceableError("the formula has too many constants")
    return program
