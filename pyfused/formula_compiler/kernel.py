"""Kernels of formulas: C++ generated ahead of time, or traced programs.

Formulas that pyfused declares are traced like users' formulas. ``make formulas`` generates C++ from
the expressions. Triton code is generated from the programs at their first use on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from typing import Any, NamedTuple

import torch

from pyfused.formula_compiler.program import Expressions, Program, compiled
from pyfused.formula_compiler.trace import Function, expressions_of
from pyfused.types import NUMBER, Choice, Outputs, Scalar

Parameter = Scalar | Choice


class Method(NamedTuple):
    """A traced function of operands; the outputs of a loss are its value and its gradients."""

    operands: list[str]
    expressions: Expressions
    outputs: list[int]


@dataclass(eq=False)
class Kernel:
    """The formula of an operator for one combination of its choices.

    Attributes:
        name: The name of the C++ kernel.
        case: The case of each parameter of the formula; NUMBER if it is one of the kernel.
        trace: Traces the formula. A loss has one method; an activation has forward and backward.
        exact: Whether the formula is a user's, which is computed as it is written.
    """

    name: str
    case: dict[str, Any]
    trace: Callable[[Kernel], list[Method]]
    exact: bool = False

    def __post_init__(self) -> None:
        self.program = cache(self._program)

    @cached_property
    def parameters(self) -> list[str]:
        return [name for name, value in self.case.items() if value is NUMBER]

    @cached_property
    def methods(self) -> list[Method]:
        return self.trace(self)

    @cached_property
    def programs(self) -> list[Program]:
        """Returns a program for each method, which computes all its outputs."""
        parameters = len(self.parameters)
        return [
            compiled(self.name, e, results, Outputs(True, (True,) * (len(results) - 1)), parameters)
            for _, e, results in self.methods
        ]

    def _program(self, outputs: Outputs) -> Program:
        """Returns the program that computes these outputs of a loss."""
        ((_, e, results),) = self.methods
        return compiled(self.name, e, results, outputs, len(self.parameters))

    def expressions(
        self, function: Function, dtypes: Sequence[torch.dtype]
    ) -> tuple[Expressions, list[int]]:
        """Traces a function of operands, the case and the scale; returns its expressions."""
        return expressions_of(function, dtypes, self.case, self.exact)


def variant_name(name: str, parameters: Sequence[Parameter], values: Sequence[Any]) -> str:
    """Returns the name of an operator's kernel for these values of its parameters."""
    for parameter, value in zip(parameters, values, strict=False):
        if isinstance(parameter, Scalar):
            name += f"_{parameter.name}_{value:g}" if value in parameter.special else ""
        elif isinstance(parameter.values[0], bool):
            name += f"_{parameter.name}" if value else ""
        else:
            name += f"_{value}" if value != parameter.values[0] else ""
    return name


def variants(name: str, parameters: Sequence[Parameter]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the name of each kernel of an operator, and the case of each parameter."""
    names = [parameter.name for parameter in parameters]
    for values in product(*[x.cases if isinstance(x, Scalar) else x.values for x in parameters]):
        yield variant_name(name, parameters, values), dict(zip(names, values, strict=True))
