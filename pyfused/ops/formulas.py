"""The formulas of declared operators as expressions and programs.

A formula is traced as one of a user is, and simplified by the same rules, but without the rewrites
for stability: it is written as it is to be computed. ``make formulas`` prints C++ of the
expressions ahead of time; a GPU prints Triton of a program when it first runs one.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any, NamedTuple

from torch import Tensor

from pyfused.formulas import trace
from pyfused.formulas.program import Expressions, Program, compiled
from pyfused.ops.activation import Activation
from pyfused.ops.operators import OPERATORS
from pyfused.ops.pointwise_loss import PointwiseLoss


class Method(NamedTuple):
    """A function of operands: ``outputs`` are expressions; of a loss, the value and gradients."""

    operands: list[str]
    expressions: Expressions
    outputs: list[int]


class Kernel(NamedTuple):
    """What one kernel computes: an operator, in one case of its flags and words.

    Attributes:
        case: A value for each scalar of the operator, None for a number, which is a parameter.
        operands: How many of a loss's operands are given.
    """

    op: Activation | PointwiseLoss
    case: tuple[Any, ...]
    operands: int

    @property
    def parameters(self) -> list[str]:
        pairs = zip(self.op.scalars, self.case, strict=True)
        return [scalar.name for scalar, value in pairs if value is None]

    def methods(self) -> list[Method]:
        """Returns what is traced: one method of a loss, forward and backward of an activation."""
        if isinstance(self.op, PointwiseLoss):
            return [self._loss(self.op)]
        return self._activation(self.op)

    def _scalars(self, numbers: list[Tensor]) -> list[Any]:
        left = iter(numbers)
        return [next(left) if value is None else value for value in self.case]

    def _loss(self, op: PointwiseLoss) -> Method:
        variables = op.variables[: self.operands]

        def run(leaves: list[Tensor], numbers: list[Tensor], scale: Tensor) -> list[Tensor | None]:
            scalars = self._scalars(numbers)
            value = op.formula(*leaves, *scalars)
            if op.gradient is None:
                gradients = trace.gradients_of(value, leaves, scale)
            else:
                gradients = [*op.gradient(*leaves, *scalars)]
            pairs = zip(gradients, variables, strict=True)
            return [value, *(g if variable.differentiated else None for g, variable in pairs)]

        e, (value, *gradients) = self._traced(run, self.operands)
        if op.gradient is not None:
            gradients = [e.scaled(gradient) for gradient in gradients]
        return Method([variable.name for variable in variables], e, [value, *gradients])

    def _activation(self, op: Activation) -> list[Method]:
        def forward(leaves: list[Tensor], numbers: list[Tensor], _: Tensor) -> list[Tensor | None]:
            return [op.formula(*leaves, *self._scalars(numbers))]

        def backward(leaves: list[Tensor], numbers: list[Tensor], _: Tensor) -> list[Tensor | None]:
            (grad_output, saved), scalars = leaves, self._scalars(numbers)
            if op.gradient is not None:
                return [op.gradient(grad_output, saved, *scalars)]
            return trace.gradients_of(op.formula(saved, *scalars), [saved], grad_output)

        saved = "y" if op.saves == "output" else "x"
        return [
            Method(["x"], *self._traced(forward, 1)),
            Method(["grad_output", saved], *self._traced(backward, 2)),
        ]

    def _traced(self, run: trace.Function, operands: int) -> tuple[Expressions, list[int]]:
        values = [0.5] * len(self.parameters)
        return trace.isolated(trace.expressions_of, run, operands, values, "STABLE")


@cache
def kernels() -> dict[str, Kernel]:
    """Returns the kernels of elementwise operators by their names."""
    found = {}
    for op in OPERATORS.values():
        if not isinstance(op, (Activation, PointwiseLoss)):
            continue
        for case in product(*(scalar.cases for scalar in op.scalars)):
            name, _ = op.kernel_of(case)
            if isinstance(op, Activation):
                found[name] = Kernel(op, case, 1)
                continue
            always = sum(not variable.optional for variable in op.variables)
            found[name] = Kernel(op, case, always)
            for count, variable in enumerate(op.variables[always:], always + 1):
                found[f"{name}_{variable.name}"] = Kernel(op, case, count)
    return found


@cache
def programs(name: str) -> list[Program]:
    """Returns the program of each method of a kernel, for all its outputs."""
    kernel = kernels()[name]
    return [
        compiled(name, e, outputs, [True] * len(outputs), len(kernel.parameters))
        for _, e, outputs in kernel.methods()
    ]
