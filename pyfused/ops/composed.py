"""Losses composed of another loss and torch's operators on its result, such as RMSE from MSE."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from pyfused import checks
from pyfused.dispatch.call import call, decide
from pyfused.dispatch.operator import Arguments, Numbers, Operator
from pyfused.ops.pointwise_loss import PointwiseLoss


@dataclass(eq=False, kw_only=True, repr=False)
class Composed(Operator):
    """A loss computed from another loss. Autograd records the call of the latter and `finish`.

    Attributes:
        of: The other loss, which has a kernel.
        given: Returns the arguments of the other loss, given the arguments of this one.
        finish: Returns the result, given the other loss and the arguments.
    """

    of: PointwiseLoss
    given: Callable[..., Arguments]
    finish: Callable[..., Tensor]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.broadcast = (1,)  # the target

    def plan(self, arguments: Arguments, inplace: bool) -> Callable[[Arguments, Numbers], Tensor]:  # noqa: ARG002
        def run(arguments: Arguments, _numbers: Numbers) -> Tensor:
            base_arguments = self.given(*arguments)
            _, kernel, numbers = decide(self.of, base_arguments, inplace)
            if kernel is None:
                loss = call(self.of, base_arguments)
            else:
                loss = kernel(base_arguments, numbers)
            return self.finish(loss, *arguments)

        return run

    def compiled(self, arguments: Arguments) -> Tensor:
        self.check_scalars(arguments)
        return self.finish(call(self.of, self.given(*arguments)), *arguments)

    def check(self, arguments: Arguments) -> None:
        self.check_scalars(arguments)
        super().check(arguments)
        checks.broadcasting(input=arguments[0], target=arguments[1])
        self.of.check(self.given(*arguments))
