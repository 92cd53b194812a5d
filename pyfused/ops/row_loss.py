"""Losses of rows that may count for nothing: what a linear layer's and a divergence's share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from pyfused.backends import Backend, backend_of
from pyfused.dispatch.autograd import (
    apply,
    differentiate,
    gradients_in_forward,
)
from pyfused.dispatch.call import is_compiled
from pyfused.dispatch.custom_operators import custom_operator
from pyfused.dispatch.operator import Arguments, Operator
from pyfused.layout import accumulate_dtype
from pyfused.ops.chunked import CountedRows, LossArguments
from pyfused.ops.row_state import denominator_of
from pyfused.types import Gradients, Options, Outputs


class Computed(NamedTuple):
    """The results of a call, or of the rows of it that count.

    Attributes:
        loss: None where it is not wanted. That of the rows that count is not divided yet.
        gradients: Those of the tensors that are differentiated, or ().
        state: The state of each row that metrics or the backward pass need, None if none do.
    """

    loss: Tensor | None
    gradients: Gradients = ()
    state: Tensor | None = None


@dataclass(eq=False, kw_only=True, repr=False)
class RowLoss(Operator):
    """A loss of rows, of which those that count for nothing are left out.

    Attributes:
        student: How many of its tensors are differentiated: these come first.
        options: The class of its options, the fields of which the custom operator takes.
    """

    student: int
    options: ClassVar[type[Options]]

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [operand.name.removeprefix("teacher_") for operand in self.operands]
        layers = "linear_weight", "linear_bias", "weight"
        self.with_rows = [i for i, name in enumerate(names) if name not in layers]

    @abstractmethod
    def counted(self, arguments: LossArguments) -> tuple[CountedRows, float | Tensor]:
        """Returns the rows that count, and the weight that a mean divides by."""

    @abstractmethod
    def compute_rows(self, arguments: LossArguments) -> Computed:
        """Returns the results of rows that all count; the loss is their sum, or one for each."""

    def loss_dtype(self, tensors: Sequence[Any]) -> torch.dtype:
        """Returns the dtype that the loss is computed in."""
        return accumulate_dtype(tensors[0].dtype)

    def losses(self, tensors: Sequence[Any]) -> tuple[int, ...]:
        """Returns the shape of the losses of rows."""
        return tensors[0].shape[:-1]  # type: ignore[no-any-return]

    def fields(self, options: Any) -> int:  # noqa: ARG002
        """Returns how many fields the state has, 0 if there is none."""
        return 0

    def check_indices(self, tensors: Sequence[Any], options: Any) -> None:
        """Raises for a class index out of range, where reading it does not wait for the device."""

    def in_torch(self, tensors: Sequence[Any], options: Any) -> Tensor:
        """Returns the loss as torch computes it."""
        loss: Tensor = self.reference(*tensors, options)
        return loss

    def define(self, arguments: LossArguments) -> Gradients:
        """Returns the gradients in torch's own terms, themselves differentiable."""
        _, tensors, options, outputs, grad_output, _ = arguments
        assert grad_output is not None

        def definition(*differentiated: Any) -> Tensor:
            return self.in_torch((*differentiated, *tensors[self.student :]), options)

        return differentiate(definition, tensors[: self.student], outputs.gradients, grad_output)

    def run(self, tensors: Sequence[Any], options: Any) -> tuple[Tensor, Tensor]:
        """Returns the loss of rows, and their state, if it has been computed."""
        grad, differentiated = torch.is_grad_enabled(), tensors[: self.student]
        needs = tuple([grad and x is not None and x.requires_grad for x in differentiated])
        if is_compiled(tensors[0]):
            now = gradients_in_forward(options.reduction, tensors[0].dtype)
            wanted = [now and need for need in needs]
            loss, *others = custom_operator(self.name)(*tensors, *options.values(), wanted)
            return loss, others[-1]
        backend = backend_of(tensors[0])
        if True in needs:
            plan = RowLossPlan(self, self.name, backend, needs)
            return apply(plan, *tensors, options)  # type: ignore[no-any-return]
        found: Any = self.compute(LossArguments(backend, tensors, options))
        return found.loss, found.state

    def compiled(self, arguments: Arguments) -> Any:
        return self.fused(arguments, False)

    def compute(self, arguments: LossArguments) -> Computed:
        """Returns the results of a call."""
        _, tensors, options, outputs, grad_output, state = arguments
        each = options.reduction == "none"
        rows, weight = self.counted(arguments)
        denominator = denominator_of(options, weight)
        if each:
            grad_output = rows.take(grad_output)
        elif outputs.gradients:
            if grad_output is None:
                grad_output = tensors[0].new_ones((), dtype=torch.float64)
            grad_output = grad_output / denominator
        of_rows = replace(
            options,
            reduction="none" if each else "sum",
            denominator=None,
            token_weight=rows.take(options.token_weight),
        )
        arguments = arguments._replace(
            tensors=[rows.take(x) if i in self.with_rows else x for i, x in enumerate(tensors)],
            options=of_rows,
            grad_output=grad_output,
            state=rows.take(state, 1),
        )
        loss, gradients, state = self.compute_rows(arguments)
        if loss is not None:
            loss = rows.spread(loss) if each else loss / denominator
            loss = loss.to(self.loss_dtype(tensors))
        if gradients:
            gradients = rows.spread(gradients[0]), *gradients[1:]
        return Computed(loss, gradients, rows.spread(state, dim=1))


class RowLossPlan(NamedTuple):
    """Computes calls that need gradients.

    Those of a scalar are computed by the forward pass, where all classes of a row are at hand.
    Otherwise the backward pass recomputes the logits. So it does for float16, whose gradient would
    underflow without grad_output.
    """

    op: RowLoss
    name: str
    backend: Backend
    needs: tuple[bool, ...]

    def forward(self, ctx: Any, arguments: Sequence[Any]) -> tuple[Tensor | None, ...]:
        *tensors, options = arguments
        now = gradients_in_forward(options.reduction, tensors[0].dtype)
        outputs = Outputs(True, self.needs if now else ())
        loss, gradients, state = self.op.compute(
            LossArguments(self.backend, tensors, options, outputs)
        )
        # Tensors among the options, too: a change in place of one raises, hooks for saved tensors
        # see all of them, and the graph holds no other reference to them.
        among = options.tensors()
        if gradients:
            ctx.first_gradient = len(tensors) + 1 + len(among)
        ctx.save_for_backward(*tensors, state, *among.values(), *gradients)
        ctx.options = replace(options, **dict.fromkeys(among)) if among else options
        ctx.names = tuple(among)
        if state is not None:
            ctx.mark_non_differentiable(state)
        return loss, state

    def backward(self, ctx: Any, grad_output: Tensor) -> Gradients:
        return self.op.compute(self._saved(ctx, grad_output)).gradients

    def define(self, ctx: Any, grad_output: Tensor) -> Gradients:
        return self.op.define(self._saved(ctx, grad_output))

    def _saved(self, ctx: Any, grad_output: Tensor) -> LossArguments:
        count, given = len(self.op.operands), ctx.saved_tensors[: ctx.first_gradient]
        tensors, state, options = given[:count], given[count], ctx.options
        if ctx.names:
            options = replace(options, **dict(zip(ctx.names, given[count + 1 :], strict=True)))
        outputs = Outputs(False, self.needs)
        return LossArguments(self.backend, tensors, options, outputs, grad_output, state)
