"""Kernels of declared formulas: a C++ function, printed ahead of time, or traced programs.

A formula is traced as a user's is, and simplified by the same rules, but without the rewrites for
stability: it is computed as it is written. ``make formulas`` prints C++ from the expressions ahead
of time; Triton is printed from the programs when a GPU first runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from pyfused.formulas.program import Expressions, Program, compiled
from pyfused.formulas.trace import Function, expressions_of, isolated


class Method(NamedTuple):
    """A function of operands; the outputs of a loss are its value and its gradients."""

    operands: list[str]
    expressions: Expressions
    outputs: list[int]


@dataclass(eq=False)
class Kernel:
    """The formula of an operator for one choice of its flags and words.

    Attributes:
        name: The name of the C++ kernel.
        case: The value of each scalar of the operator, None for a parameter of the kernel.
        trace: Traces the formula: one method of a loss, forward and backward of an activation.
    """

    name: str
    case: dict[str, Any]
    trace: Callable[[Kernel], list[Method]]

    @property
    def parameters(self) -> list[str]:
        return [name for name, value in self.case.items() if value is None]

    @cached_property
    def methods(self) -> list[Method]:
        return self.trace(self)

    @cached_property
    def programs(self) -> list[Program]:
        """Returns the program of each method, for all its outputs."""
        return [
            compiled(self.name, e, outputs, [True] * len(outputs), len(self.parameters))
            for _, e, outputs in self.methods
        ]

    def scalars(self, parameters: Sequence[Any]) -> list[Any]:
        """Returns the operator's scalars: the values of the case, and the parameters."""
        remaining = iter(parameters)
        return [next(remaining) if value is None else value for value in self.case.values()]

    def expressions(self, function: Function, operands: int) -> tuple[Expressions, list[int]]:
        """Returns the expressions of a function of operands, parameters and the scale."""
        values = [0.5] * len(self.parameters)
        return isolated(expressions_of, function, operands, values, False)
