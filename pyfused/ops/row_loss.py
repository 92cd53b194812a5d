"""Losses of rows that may count for nothing: what a linear layer's and a divergence's share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfused.backends import Backend, backend_of
from pyfused.layout import accumulate_dtype
from pyfused.ops import TORCH_OPS
from pyfused.ops.chunked import CountedRows, LossArguments
from pyfused.ops.declaration import Operator
from pyfused.ops.dispatch import is_compiled
from pyfused.ops.gradients import (
    apply,
    differentiate,
    gradients_in_forward,
    save,
    saved,
    wanted_in_forward,
)
from pyfused.ops.metrics import Metrics
from pyfused.ops.row_state import denominator_of
from pyfused.types import Gradients, Outputs


class Computed(NamedTuple):
    """The results of a call, or of the rows of it that count.

    Attributes:
        loss: None where it is not wanted. That of the rows that count is not divided yet.
        gradients: Those of the tensors that are differentiated, or ().
        state: The state of each row that the backward pass needs, None if it needs none.
        metrics: The metrics of each row, or ().
    """

    loss: Tensor | None
    gradients: Gradients = ()
    state: Tensor | None = None
    metrics: Sequence[Tensor] = ()


@dataclass(eq=False, kw_only=True, repr=False)
class RowLoss(Operator):
    """A loss of rows, of which those that count for nothing are left out.

    Attributes:
        student: How many of its tensors are differentiated: these come first.
    """

    student: int

    @abstractmethod
    def has_rows(self, index: int) -> bool:
        """Returns whether a tensor has an entry for each row."""

    @abstractmethod
    def counted(self, arguments: LossArguments) -> tuple[CountedRows, float | Tensor]:
        """Returns the rows that count, and the weight that a mean divides by."""

    @abstractmethod
    def compute_rows(self, arguments: LossArguments) -> Computed:
        """Returns the results of rows that all count; the loss is their sum, or one for each."""

    def loss_dtype(self, tensors: Sequence[Any]) -> torch.dtype:
        """Returns the dtype that the loss is computed in."""
        return accumulate_dtype(tensors[0].dtype)

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

    def run(self, tensors: Sequence[Any], options: Any) -> tuple[Tensor, ...]:
        """Returns the loss of rows, and the metrics where they are wanted."""
        differentiated = tensors[: self.student]
        if is_compiled(tensors[0]):
            wanted = wanted_in_forward(options.reduction, differentiated)
            loss, *others = getattr(TORCH_OPS, self.name)(*tensors, *options.values(), wanted)
            metrics = others[self.student : -1] if getattr(options, "with_metrics", False) else ()
            return loss, *metrics
        backend, grad = backend_of(tensors[0]), torch.is_grad_enabled()
        needs = tuple([grad and x is not None and x.requires_grad for x in differentiated])
        if True in needs:
            plan = RowLossPlan(self, self.name, backend, needs)
            return apply(plan, *tensors, options)  # type: ignore[no-any-return]
        computed = self.compute(LossArguments(backend, tensors, options))
        assert computed.loss is not None
        return computed.loss, *computed.metrics

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
        if grad_output is not None:
            arguments = arguments._replace(grad_output=grad_output)
        if rows.indices is not None:
            arguments = arguments._replace(
                tensors=[rows.take(x) if self.has_rows(i) else x for i, x in enumerate(tensors)],
                options=replace(options, token_weight=rows.take(options.token_weight)),
                state=rows.take(state, 1),
            )
        loss, gradients, state, metrics = self.compute_rows(arguments)
        if loss is not None:
            loss = rows.spread(loss) if each else loss / denominator
            loss = loss.to(self.loss_dtype(tensors))
        if gradients:
            gradients = rows.spread(gradients[0]), *gradients[1:]
        if metrics:
            others = [options.ignore_index * (name == "prediction") for name in Metrics._fields]
            metrics = Metrics(*map(rows.spread, metrics, others))
        return Computed(loss, gradients, rows.spread(state, dim=1), metrics)


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
        now = gradients_in_forward(options.reduction, tensors[0])
        outputs = Outputs(True, self.needs if now else ())
        loss, gradients, state, metrics = self.op.compute(
            LossArguments(self.backend, tensors, options, outputs)
        )
        ctx.gradients = gradients or None
        save(ctx, options, *tensors, state)
        if metrics:
            ctx.mark_non_differentiable(*metrics)
        return loss, *metrics

    def backward(self, ctx: Any, grad_output: Tensor) -> Gradients:
        return self.op.compute(self._saved(ctx, grad_output)).gradients

    def define(self, ctx: Any, grad_output: Tensor) -> Gradients:
        return self.op.define(self._saved(ctx, grad_output))

    def _saved(self, ctx: Any, grad_output: Tensor) -> LossArguments:
        (*tensors, state), options = saved(ctx)
        outputs = Outputs(False, self.needs)
        return LossArguments(self.backend, tensors, options, outputs, grad_output, state)
