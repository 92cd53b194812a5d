"""Losses that are another loss, and a little of torch's arithmetic on what it returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from pyfused import checks
from pyfused.dispatch.call import call, plan_of
from pyfused.dispatch.operator import Arguments, Operator
from pyfused.ops.pointwise_loss import PointwiseLoss


@dataclass(eq=False, kw_only=True, repr=False)
class Composed(Operator):
    """Autograd sees both parts.

    Attributes:
        of: The loss whose kernel does the work.
        given: Its arguments, from those of this one.
        finish: The result, from that loss and the arguments of this one.
    """

    of: PointwiseLoss
    given: Callable[..., Arguments]
    finish: Callable[..., Tensor]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.broadcast = (1,)  # the target

    def plan(self, arguments: Arguments, inplace: bool) -> Callable[[Arguments], Tensor]:
        self.check_scalars(arguments)

        def run(arguments: Arguments) -> Tensor:
            given = self.given(*arguments)
            kernel = plan_of(self.of, given, inplace).run
            loss = call(self.of, given) if kernel is None else kernel(given)
            return self.finish(loss, *arguments)

        return run

    def compiled(self, arguments: Arguments) -> Tensor:
        self.check_scalars(arguments)
        return self.finish(call(self.of, self.given(*arguments)), *arguments)

    def check(self, arguments: Arguments) -> None:
        self.check_scalars(arguments)
        for operand, value in zip(self.operands[:2], arguments, strict=False):
            checks.tensor(operand.name, value)
        checks.broadcasting(*arguments[:2])
        self.of.check(self.given(*arguments))
