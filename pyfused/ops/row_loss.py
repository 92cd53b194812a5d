"""Losses of rows, some of which may be ignored: linear cross-entropy and divergences."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfused.backends import Backend, backend_of
from pyfused.dispatch.autograd import differentiate, in_autocast_dtype, without_autocast
from pyfused.dispatch.operator import Arguments, Numbers, Tensors
from pyfused.dispatch.plan import Forward, Plan, gradients_in_forward, needs_grad
from pyfused.layout import accumulate_dtype
from pyfused.ops.heads import rows_that_count, spread_rows, take_rows
from pyfused.ops.row_state import loss_denominator
from pyfused.ops.vocab_operator import VocabOperator
from pyfused.types import Gradients, Outputs

# The loss, or None; the gradients, or (); and the state of each row, or None if neither the metrics
# nor the backward pass need it.
Results = tuple[Tensor | None, Gradients, Tensor | None]


class LossArgs(NamedTuple):
    """The arguments of a forward or backward pass of a loss over rows, except its tensors.

    Attributes:
        options: The options of the call, which the pass may change.
        grad_output: The gradient of the loss: a scalar, or one element per row if the reduction is
            "none". None for ones, or in a forward pass without gradients.
        state: The state that the forward pass returned, or None.
        counts: As in `Layer`.
    """

    options: Any
    outputs: Outputs
    grad_output: Tensor | None
    state: Tensor | None
    counts: Tensor | None


@dataclass(eq=False, kw_only=True, repr=False)
class RowLoss(VocabOperator):
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
    in_forward = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.row_operands = [i for i, operand in enumerate(self.operands) if operand.has_rows]

    def check(self, arguments: Arguments) -> None:
        self.check_tensors(arguments)
        self.checked_options(arguments)

    def checked_options(self, arguments: Arguments) -> Any:
        """Raises for invalid shapes, dtypes and options; returns the options."""
        self.check_arguments(*arguments)
        return arguments[-1]

    def kernel_options(self, options: Any) -> Any:
        """Returns the options of a call in the form that kernels take."""
        return options

    @abstractmethod
    def to_rows(self, options: Any, tensors: Tensors, _: Numbers = ()) -> tuple[Any, ...]:
        """Returns the operands as rows, and token_weight and denominator if they are tensors.

        Raises for class indices out of range, unless reading them synchronises.

        Args:
            options: The options for planning.
        """

    def finish(self, options: Any, results: Any, tensors: Tensors) -> Any:  # noqa: ARG002
        """Returns the result of a call.

        Args:
            options: The options for planning.
            results: The loss, or a tuple of the loss and the state of each row, or None.
        """
        loss = results[0] if isinstance(results, tuple) else results
        return loss.reshape(tensors[0].shape[:-1]) if loss.dim() else loss

    def valid_rows(
        self, backend: Backend, _: Sequence[Any], options: Any
    ) -> tuple[Tensor | None, Tensor | None]:
        """Returns the results of `rows_that_count` for these rows."""
        weight = options.token_weight
        return (None, None) if weight is None else rows_that_count(weight != 0, backend)

    def total_weight(self, tensors: Sequence[Any], options: Any) -> float | Tensor:
        """Returns the default denominator of a mean."""
        weight: Tensor | None = options.token_weight
        return tensors[0].shape[0] if weight is None else weight.sum(dtype=torch.float64)

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

    def definition_loss(self, tensors: Sequence[Any], options: Any) -> Tensor:
        """Returns the loss, computed by torch's operators."""
        loss: Tensor = self.definition(*tensors, options)
        return loss

    def gradients_needed(self, arguments: Arguments) -> tuple[bool, ...]:
        """Returns whether each of the student's tensors needs a gradient."""
        return needs_grad(arguments[: self.student])

    def plan(self, arguments: Arguments) -> Plan:
        """Checks a call, and returns the plan of its signature."""
        planned, count = self.checked_options(arguments), len(self.operands)
        needs, backend = self.gradients_needed(arguments), backend_of(arguments[0])
        unreduced, loss_dtype = planned.reduction == "none", self.loss_dtype(arguments[:count])
        compute_rows, divides = self.prepare(backend, arguments[:count], planned)
        with_gradients, gradients_alone = Outputs(True, needs), Outputs(False, needs)
        device = arguments[0].device.type

        def options_of(numbers: Numbers, tensors: Sequence[Any]) -> Any:
            return self.kernel_options(planned.of_call(numbers, *tensors[count : count + 2]))

        def compute(
            tensors: Sequence[Any],
            numbers: Numbers,
            outputs: Outputs,
            grad_output: Tensor | None = None,
            state: Tensor | None = None,
        ) -> Results:
            options, tensors = options_of(numbers, tensors), tensors[:count]
            rows, counts = self.valid_rows(backend, tensors, options)
            denominator: float | Tensor | None = None
            if unreduced:
                grad_output = take_rows(grad_output, rows)
            elif not divides:
                if options.reduction == "mean":
                    denominator = loss_denominator(options, self.total_weight(tensors, options))
                options.reduction, options.denominator = "sum", None
                if outputs.gradients:
                    if grad_output is None:
                        grad_output = tensors[0].new_ones((), dtype=torch.float64)
                    grad_output = grad_output if denominator is None else grad_output / denominator
            total = tensors[0].shape[0]
            if rows is not None:
                options.token_weight = take_rows(options.token_weight, rows)
                state, indexed = take_rows(state, rows, 1), enumerate(tensors)
                tensors = [take_rows(x, rows) if i in self.row_operands else x for i, x in indexed]
            args = LossArgs(options, outputs, grad_output, state, counts)
            loss, gradients, state = compute_rows(tensors, args)
            if loss is not None:
                if unreduced:
                    loss = spread_rows(loss, rows, total)
                elif denominator is not None:
                    loss = loss / denominator
                loss = loss.to(loss_dtype)
            if rows is None:
                return loss, gradients, state
            pairs = enumerate(gradients)
            spread = [
                spread_rows(x, rows, total) if i in self.row_operands else x for i, x in pairs
            ]
            return loss, tuple(spread), spread_rows(state, rows, total, 1)

        def forward(tensors: Sequence[Any], numbers: Numbers) -> Forward:
            in_forward = True in needs and gradients_in_forward(planned.reduction, tensors[0].dtype)
            outputs = with_gradients if in_forward else Outputs()
            loss, gradients, state = compute(tensors, numbers, outputs)
            return (loss, state), (*tensors, state), gradients

        def forward_without_autocast(tensors: Sequence[Any], numbers: Numbers) -> Forward:
            with torch.autocast(device, enabled=False):
                return forward(tensors, numbers)

        def backward(saved: Sequence[Any], numbers: Numbers, grad_output: Tensor) -> Gradients:
            return compute(saved, numbers, gradients_alone, grad_output, saved[-1])[1]

        def define(saved: Sequence[Any], numbers: Numbers, grad_output: Tensor) -> Gradients:
            options = options_of(numbers, saved)
            student, others = saved[: self.student], saved[self.student : count]

            def definition(*student: Any) -> Tensor:
                return self.definition_loss((*student, *others), options)

            return differentiate(definition, student, needs, grad_output)

        return Plan(
            name=self.name,
            backend=backend,
            needs=needs,
            arrange=partial(self.to_rows, planned),
            forward=forward_without_autocast if torch.is_autocast_enabled(device) else forward,
            backward=backward,
            define=define,
            finish=partial(self.finish, planned),
        )

    def compiled(self, arguments: Arguments) -> Any:
        checked = self.checked_options(arguments)
        options, (call, _, _) = self.kernel_options(checked), self.call_of(arguments[:-1], checked)
        *tensors, token_weight, _ = self.to_rows(checked, call)
        tensors = [  # custom operators check dtypes
            in_autocast_dtype(x) if operand.name.endswith(("_weight", "_bias")) else x
            for operand, x in zip(self.operands, tensors, strict=True)
        ]
        options = replace(options, token_weight=token_weight)  # the denominator is not a tensor
        in_forward = gradients_in_forward(options.reduction, tensors[0].dtype)
        needs = [in_forward and need for need in needs_grad(tensors[: self.student])]
        with without_autocast(tensors[0].device.type):
            call_tensors, numbers, case = self.call_of(tensors, options)
            loss, *_, state = self.custom_operator(*call_tensors, *numbers, *case, needs)
        return self.finish(checked, (loss, state), call)

    def saved(self, tensors: Tensors, state: Any) -> Tensors:
        return *tensors, state

    def fake(self, arguments: Arguments) -> Tensor:
        """Returns an empty tensor like the loss that the custom operator returns."""
        tensors, reduction = arguments[: len(self.operands)], arguments[-1].reduction
        shape = self.loss_shape(tensors) if reduction == "none" else ()
        empty: Tensor = tensors[0].new_empty(shape, dtype=self.loss_dtype(tensors))
        return empty

    def fake_state(self, arguments: Arguments) -> Tensor:
        """Returns an empty tensor like the state that the custom operator returns."""
        tensors = arguments[: len(self.operands)]
        shape = self.state_fields(arguments[-1]), *self.loss_shape(tensors)
        empty: Tensor = tensors[0].new_empty(shape, dtype=torch.float64)
        return empty
