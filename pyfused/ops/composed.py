"""Losses composed of another loss and torch's operators on its result, such as RMSE from MSE."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from pyfused import checks
from pyfused.dispatch.operator import Arguments, Case, Numbers, Operator, Tensors
from pyfused.dispatch.run import decide, run
from pyfused.ops.pointwise_loss import PointwiseLoss


@dataclass(eq=False, kw_only=True, repr=False)
class Composed(Operator):
    """A loss computed from another loss. Autograd records the other loss and `finish`.

    Attributes:
        base: The other loss, which has a kernel.
        base_call: Takes the arguments; returns the tensors, numbers and case of the other loss.
        finish: Takes the other loss and the arguments; returns the result.
    """

    base: PointwiseLoss
    base_call: Callable[..., tuple[Tensors, Numbers, Case]]
    finish: Callable[..., Tensor]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.broadcast = (1,)  # the target

    def plan(self, arguments: Arguments, inplace: bool) -> Callable[[Tensors, Numbers], Tensor]:
        *_, case = self.split(arguments)

        def compute(tensors: Tensors, numbers: Numbers) -> Tensor:
            arguments = *tensors, *numbers, *case
            call = self.base_call(*arguments)
            _, kernel, base_numbers = decide(self.base, *call, inplace)
            loss = run(self.base, *call) if kernel is None else kernel(call[0], base_numbers)
            return self.finish(loss, *arguments)

        return compute

    def compiled(self, arguments: Arguments) -> Tensor:
        self.check_numbers(arguments)
        return self.finish(run(self.base, *self.base_call(*arguments)), *arguments)

    def check(self, arguments: Arguments) -> None:
        self.check_numbers(arguments)
        super().check(arguments)
        checks.broadcasts("target", arguments[1].shape, "input", arguments[0].shape)
        tensors, numbers, case = self.base_call(*arguments)
        self.base.check((*tensors, *numbers, *case))
