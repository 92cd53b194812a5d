"""Losses of rows, some of which may be ignored: linear cross-entropy and divergences."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from pyfused.backends import Backend, backend_of
from pyfused.dispatch.autograd import differentiate, in_autocast_dtype, without_autocast
from pyfused.dispatch.operator import FACTORS, Operand, Options, Tensors
from pyfused.dispatch.plan import Forward, Plan, gradients_in_forward, needs_grad
from pyfused.layout import accumulate_dtype
from pyfused.ops.custom_operators import CompiledOperator
from pyfused.ops.heads import rows_that_count, spread_rows, take_rows
from pyfused.ops.row_state import loss_denominator
from pyfused.types import Gradients, Outputs

# The loss, or None; the gradients, or (); and the state of each row, or None if neither the metrics
# nor the backward pass need it.
Results = tuple[Tensor | None, Gradients, Tensor | None]


class LossArgs(NamedTuple):
    """The arguments of a forward or backward pass of a loss over rows, except its tensors.

    Attributes:
        options: The options of the call.
        token_weight: The factor of each row's loss, or None.
        denominator: The divisor of a mean, if it is a tensor.
        grad_output: The gradient of the loss: a scalar, or one element per row if the reduction is
            "none". None for ones, or in a forward pass without gradients.
        state: The state that the forward pass returned, or None.
        counts: As in `Layer`.
    """

    options: Any
    token_weight: Tensor | None
    denominator: Tensor | None
    outputs: Outputs
    grad_output: Tensor | None
    state: Tensor | None
    counts: Tensor | None

    @property
    def divisor(self) -> float | Tensor:
        """Returns the denominator of a mean, a number or a tensor."""
        return self.options.denominator if self.denominator is None else self.denominator

    def divided_by(self, divisor: float | Tensor) -> LossArgs:
        """Returns the arguments with another denominator of a mean."""
        if isinstance(divisor, Tensor):
            return self._replace(denominator=divisor)
        return self._replace(options=self.options._replace(denominator=divisor), denominator=None)


@dataclass(eq=False, kw_only=True, repr=False)
class RowLoss(CompiledOperator):
    """A loss of rows. Kernels compute the rows that are not ignored.

    The forward pass computes the gradients of a reduced loss if it has all classes of a row.
    Otherwise the backward pass recomputes the logits. It also does so for float16, because
    gradients would underflow without grad_output.

    Attributes:
        student: The number of differentiated tensors, which come first.
        check_arguments: Raises for invalid shapes, dtypes and options.
    """

    student: int
    check_arguments: Callable[..., None]
    factors: ClassVar[tuple[Operand, ...]] = FACTORS
    in_forward = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.row_operands = [i for i, operand in enumerate(self.operands) if operand.has_rows]

    def check(self, tensors: Tensors, options: Options) -> None:
        self.check_tensors(tensors)
        self.check_arguments(*tensors, options)

    def kernel_options(self, options: Any) -> Any:
        """Returns the options of a call in the form that kernels take."""
        return options

    @abstractmethod
    def to_rows(self, tensors: Tensors, options: Options) -> tuple[Any, ...]:
        """Returns the operands as rows, and token_weight and denominator if they are tensors.

        Raises for class indices out of range, unless reading them synchronises.
        """

    def finish(self, options: Options, results: Any, tensors: Tensors) -> Any:  # noqa: ARG002
        """Returns the result of a call.

        Args:
            options: The options for planning.
            results: The loss, or a tuple of the loss and the state of each row, or None.
        """
        loss = results[0] if isinstance(results, tuple) else results
        return loss.reshape(tensors[0].shape[:-1]) if loss.dim() else loss

    def valid_rows(
        self,
        backend: Backend,
        tensors: Sequence[Any],  # noqa: ARG002
        token_weight: Tensor | None,
        options: Any,  # noqa: ARG002
    ) -> tuple[Tensor | None, Tensor | None]:
        """Returns the results of `rows_that_count` for these rows."""
        return (None, None) if token_weight is None else rows_that_count(token_weight != 0, backend)

    def total_weight(
        self,
        tensors: Sequence[Any],
        token_weight: Tensor | None,
        options: Any,  # noqa: ARG002
    ) -> float | Tensor:
        """Returns the default denominator of a mean."""
        rows: int = tensors[0].shape[0]
        return rows if token_weight is None else token_weight.sum(dtype=torch.float64)

    @abstractmethod
    def prepare(
        self, backend: Backend, tensors: Sequence[Any], options: Any
    ) -> tuple[Callable[..., Results], bool]:
        """Prepares the computation of valid rows for the calls of one signature.

        Args:
            tensors: The operands for planning.
            options: The options for planning.

        Returns:
            A function of the operands as rows and `LossArgs`, and whether this function divides the
            loss and the gradients of a mean. Otherwise it returns a sum.
        """

    def loss_dtype(self, tensors: Sequence[Any]) -> torch.dtype:
        """Returns the dtype in which the loss is computed."""
        return accumulate_dtype(tensors[0].dtype)

    def loss_shape(self, tensors: Sequence[Any]) -> tuple[int, ...]:
        """Returns the shape of the unreduced loss."""
        return tensors[0].shape[:-1]  # type: ignore[no-any-return]

    def state_fields(self, options: Any) -> int:  # noqa: ARG002
        """Returns the number of fields of the state, 0 without a state."""
        return 0

    def definition_loss(self, tensors: Sequence[Any], options: Options) -> Tensor:
        """Returns the loss of the operands and the factors, computed by torch's operators."""
        loss: Tensor = self.torch(*tensors, options)
        return loss

    def gradients_needed(self, tensors: Tensors) -> tuple[bool, ...]:
        """Returns whether each of the student's tensors needs a gradient."""
        return needs_grad(tensors[: self.student])

    def plan(self, tensors: Tensors, options: Options) -> Plan:
        """Checks a call, and returns the plan of its signature."""
        self.check_arguments(*tensors, options)
        count, operands = len(self.operands), tensors[: len(self.operands)]
        needs, backend = self.gradients_needed(tensors), backend_of(tensors[0])
        reduction, loss_dtype = options.reduction, self.loss_dtype(operands)
        unreduced = reduction == "none"
        compute_rows, divides = self.prepare(backend, operands, options)
        with_gradients, gradients_alone = Outputs(True, needs), Outputs(False, needs)
        device = tensors[0].device.type

        def compute(
            tensors: Sequence[Any],
            options: Options,
            outputs: Outputs,
            grad_output: Tensor | None = None,
            state: Tensor | None = None,
        ) -> Results:
            options = self.kernel_options(options)
            tensors, (token_weight, denominator) = tensors[:count], tensors[count : count + 2]
            rows, counts = self.valid_rows(backend, tensors, token_weight, options)
            divisor: float | Tensor | None = None
            if unreduced:
                grad_output = take_rows(grad_output, rows)
            elif not divides:
                if reduction == "mean":
                    total_weight = self.total_weight(tensors, token_weight, options)
                    divisor = loss_denominator(options, denominator, total_weight)
                options, denominator = options._replace(reduction="sum", denominator=None), None
                if outputs.gradients:
                    if grad_output is None:
                        grad_output = tensors[0].new_ones((), dtype=torch.float64)
                    grad_output = grad_output if divisor is None else grad_output / divisor
            total = tensors[0].shape[0]
            if rows is not None:
                token_weight, state = take_rows(token_weight, rows), take_rows(state, rows, 1)
                indexed = enumerate(tensors)
                tensors = [take_rows(x, rows) if i in self.row_operands else x for i, x in indexed]
            factors = token_weight, denominator
            args = LossArgs(options, *factors, outputs, grad_output, state, counts)
            loss, gradients, state = compute_rows(tensors, args)
            if loss is not None:
                if unreduced:
                    loss = spread_rows(loss, rows, total)
                elif divisor is not None:
                    loss = loss / divisor
                loss = loss.to(loss_dtype)
            if rows is None:
                return loss, gradients, state
            pairs = enumerate(gradients)
            spread = [
                spread_rows(x, rows, total) if i in self.row_operands else x for i, x in pairs
            ]
            return loss, tuple(spread), spread_rows(state, rows, total, 1)

        def forward(tensors: Sequence[Any], options: Options) -> Forward:
            in_forward = True in needs and gradients_in_forward(reduction, tensors[0].dtype)
            outputs = with_gradients if in_forward else Outputs()
            loss, gradients, state = compute(tensors, options, outputs)
            return (loss, state), (*tensors, state), gradients

        def forward_without_autocast(tensors: Sequence[Any], options: Options) -> Forward:
            with torch.autocast(device, enabled=False):
                return forward(tensors, options)

        def backward(saved: Sequence[Any], options: Options, grad_output: Tensor) -> Gradients:
            return compute(saved, options, gradients_alone, grad_output, saved[-1])[1]

        def define(saved: Sequence[Any], options: Options, grad_output: Tensor) -> Gradients:
            student, others = saved[: self.student], saved[self.student : len(self.all_operands)]

            def definition(*student: Any) -> Tensor:
                return self.definition_loss((*student, *others), options)

            return differentiate(definition, student, needs, grad_output)

        return Plan(
            name=self.name,
            backend=backend,
            needs=needs,
            arrange=self.to_rows,
            forward=forward_without_autocast if torch.is_autocast_enabled(device) else forward,
            backward=backward,
            define=define,
            finish=partial(self.finish, options),
        )

    def compiled(self, tensors: Tensors, options: Options) -> Any:
        self.check_arguments(*tensors, options)
        rows = self.to_rows(tensors, options)
        operands = [  # custom operators check dtypes
            in_autocast_dtype(x) if operand.name.endswith(("_weight", "_bias")) else x
            for operand, x in zip(self.operands, rows, strict=False)
        ]
        in_forward = gradients_in_forward(options.reduction, operands[0].dtype)
        needs = [in_forward and need for need in needs_grad(operands[: self.student])]
        call = *operands, *rows[len(operands) :][: len(self.factors)]
        with without_autocast(operands[0].device.type):
            loss, *_, state = self.custom_operator(call, self.kernel_options(options), needs)
        return self.finish(options, (loss, state), tensors)

    def saved(self, tensors: Tensors, state: Any) -> Tensors:
        return *tensors, state

    def fake(self, tensors: Tensors, options: Options) -> Tensor:
        """Returns an empty tensor like the loss that the custom operator returns."""
        shape = self.loss_shape(tensors) if options.reduction == "none" else ()
        empty: Tensor = tensors[0].new_empty(shape, dtype=self.loss_dtype(tensors))
        return empty

    def fake_state(self, tensors: Tensors, options: Options) -> Tensor:
        """Returns an empty tensor like the state that the custom operator returns."""
        shape = self.state_fields(options), *self.loss_shape(tensors)
        empty: Tensor = tensors[0].new_empty(shape, dtype=torch.float64)
        return empty
