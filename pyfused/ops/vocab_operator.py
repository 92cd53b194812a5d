"""The base class of operators over a vocabulary. One object holds the options of a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

from pyfused.dispatch.operator import (
    DENOMINATOR,
    TOKEN_WEIGHT,
    Arguments,
    Case,
    Numbers,
    Operand,
    Tensors,
)
from pyfused.ops.custom_operators import CompiledOperator
from pyfused.types import OPTIONS, VocabOptions


@dataclass(eq=False, kw_only=True, repr=False)
class VocabOperator(CompiledOperator):
    """An operator of logits, whose numbers and case are the fields of its options.

    The methods for planning take the operands and the options.

    Attributes:
        definition: The definition in torch's operators, which takes the operands and the options.
        options: The class of the options.
    """

    definition: Callable[..., Any]
    options: ClassVar[type[VocabOptions]]
    factors: ClassVar[tuple[Operand, ...]] = (TOKEN_WEIGHT, DENOMINATOR)

    def __post_init__(self) -> None:
        fields = [name for name in self.options.__dataclass_fields__ if name != "token_weight"]
        self.numbers = tuple([OPTIONS[name] for name in fields if name in OPTIONS])
        self.case = (*[name for name in fields if name not in OPTIONS], *self.case)
        self.torch = self.compute_by_torch
        super().__post_init__()
        self.fields = (
            *[number.name for number in self.numbers],
            *[choice.name for choice in self.case if not choice.of_torch],
        )
        self.keywords = *self.names[: len(self.operands)], "options"  # of `arguments_of`

    def arguments_of(self, tensors: Tensors, numbers: Numbers, case: Case) -> Arguments:
        """Returns the operands and the options of a call."""
        count = len(self.operands)
        # Types are compared first, as isinstance with an abstract class takes a microsecond.
        floats = [
            x if x is None or type(x) is float or not isinstance(x, Real) else float(x)
            for x in numbers
        ]
        values = dict(zip(self.fields, (*floats, *case), strict=False))
        if self.factors:
            values["token_weight"], denominator = tensors[count:]
            if denominator is not None:
                values["denominator"] = denominator
        return *tensors[:count], self.options(**values)

    def call_of(
        self, operands: Sequence[Any], options: VocabOptions
    ) -> tuple[Tensors, Numbers, Case]:
        """Returns the tensors, numbers and case of a call with these options."""
        factors: tuple[Any, ...] = ()
        values = options.by_name()
        if self.factors:
            factors = options.plan_tensors()
            if factors[1] is not None:
                values["denominator"] = None
        in_order = tuple([values[name] for name in self.fields])
        return (*operands, *factors), in_order[: len(self.numbers)], in_order[len(self.numbers) :]

    def compute_by_torch(self, *call: Any) -> Any:
        """Returns the result by torch's operators, given tensors, numbers and case."""
        return self.definition(*self.arguments_of(*self.split(call)))
