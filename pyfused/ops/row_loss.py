"""Losses of rows, some of which may be ignored: linear cross-entropy and divergences."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyfused.backends import Backend, backend_of
from pyfused.dispatch.autograd import differentiate, in_autocast_dtype, without_autocast
from pyfused.dispatch.operator import Arguments, Numbers, Tensors
from pyfused.dispatch.plan import Forward, Plan, gradients_in_forward, needs_grad
from pyfused.layout import accumulate_dtype
from pyfused.ops.heads import LossArgs, spread_rows, take_rows
from pyfused.ops.row_state import loss_denominator
from pyfused.ops.vocab_operator import VocabOperator
from pyfused.types import Gradients, Outputs

# The loss, or None; the gradients, or (); and the state of each row if the metrics or the backward
# pass need it, or None.
Results = tuple[Tensor | None, Gradients, Tensor | None]


@dataclass(eq=False, kw_only=True, repr=False)
class RowLoss(VocabOperator):
    """A loss of rows. Kernels compute the rows that are not ignored.

    The forward pass computes the gradients of a reduced loss if it has all classes of a row.
    Otherwise the backward pass recomputes the logits, and for float16, too, as gradients would
    underflow without grad_output.

    Attributes:
        student: The number of differentiated tensors, which come first.
        check_arguments: Raises for invalid shapes, dtypes and options.
    """

    student: int
    check_arguments: Callable[..., None]
    in_forward = True

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [operand.name.removeprefix("teacher_") for operand in self.operands]
        weights = "linear_weight", "linear_bias", "adapter_weight", "weight"
        self.row_operands = [i for i, name in enumerate(names) if name not in weights]

    def check(self, arguments: Arguments) -> None:
        self.check_tensors(arguments)
        self.checked_options(arguments)

    def checked_options(self, arguments: Arguments) -> Any:
        """Raises for invalid shapes, dtypes and options; returns the options."""
        self.check_arguments(*arguments)
        return arguments[-1]

    def kernel_options(self, options: Any) -> Any:
        """Returns the options of a call as kernels take them."""
        return options

    @abstractmethod
    def to_rows(self, tensors: Tensors, options: Any) -> tuple[Any, ...]:
        """Returns the operands as rows, and token_weight and denominator if they are tensors.

        Raises for class indices out of range, unless reading them synchronises.

        Args:
            options: The options for planning.
        """

    def finish(
        self,
        loss: Tensor,
        tensors: Tensors,
        options: Any,  # noqa: ARG002
        state: Tensor | None = None,  # noqa: ARG002
    ) -> Any:
        """Returns the result of a call, given the loss and the state of each row, if any."""
        return loss.reshape(tensors[0].shape[:-1]) if loss.dim() else loss

    def valid_rows(
        self,
        backend: Backend,  # noqa: ARG002
        tensors: Sequence[Any],  # noqa: ARG002
        options: Any,  # noqa: ARG002
    ) -> tuple[Tensor | None, Tensor | None]:
        """Returns the indices of the rows to compute, and which count, as `rows_that_count`."""
        return None, None

    def total_weight(self, tensors: Sequence[Any], options: Any) -> float | Tensor:  # noqa: ARG002
        """Returns the default denominator of a mean."""
        rows: int = tensors[0].shape[0]
        return rows

    def kernels_divide(self, backend: Backend, tensors: Sequence[Any], options: Any) -> bool:  # noqa: ARG002
        """Returns whether `compute_rows` takes a mean, and divides its loss and gradients."""
        return False

    @abstractmethod
    def compute_rows(self, tensors: Sequence[Any], args: LossArgs) -> Results:
        """Returns the results of valid rows.

        The loss has one element per row, or is their sum, or their mean if `kernels_divide`.
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

    def plan(self, arguments: Arguments, inplace: bool) -> Plan:  # noqa: ARG002
        """Checks a call, and returns the plan of its signature."""
        planned, count = self.checked_options(arguments), len(self.operands)
        needs = self.gradients_needed(arguments)
        backend, device = backend_of(arguments[0]), arguments[0].device.type

        def options_of(numbers: Numbers, tensors: Sequence[Any]) -> Any:
            return self.kernel_options(planned.of_call(numbers, *tensors[count : count + 2]))

        def forward(tensors: Sequence[Any], numbers: Numbers) -> Forward:
            options = options_of(numbers, tensors)
            dtype = tensors[0].dtype
            in_forward = True in needs and gradients_in_forward(options.reduction, dtype)
            outputs = Outputs(True, needs if in_forward else ())
            with without_autocast(device):
                loss, gradients, state = self.compute(backend, tensors[:count], options, outputs)
            return (loss, state), (*tensors, state), gradients

        def backward(saved: Sequence[Any], numbers: Numbers, grad_output: Tensor) -> Gradients:
            options, outputs = options_of(numbers, saved), Outputs(False, needs)
            tensors, state = saved[:count], saved[-1]
            return self.compute(backend, tensors, options, outputs, grad_output, state)[1]

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
            arrange=lambda tensors, _: self.to_rows(tensors, planned),
            forward=forward,
            backward=backward,
            define=define,
            finish=lambda results, tensors: self.finish(results[0], tensors, planned, results[1]),
        )

    def compiled(self, arguments: Arguments) -> Any:
        checked = self.checked_options(arguments)
        options, (call, _, _) = self.kernel_options(checked), self.call_of(arguments[:-1], checked)
        *tensors, token_weight, _ = self.to_rows(call, checked)
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
        return self.finish(loss, call, checked, state)

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

    def compute(
        self,
        backend: Backend,
        tensors: Sequence[Any],
        options: Any,
        outputs: Outputs,
        grad_output: Tensor | None = None,
        state: Tensor | None = None,
    ) -> Results:
        """Returns the loss, the gradients and the state.

        Args:
            grad_output: The gradient of the loss, None for ones.
            state: The state that the forward pass has returned, if gradients are computed from it.
        """
        unreduced, total = options.reduction == "none", tensors[0].shape[0]
        rows, counts = self.valid_rows(backend, tensors, options)
        denominator: float | Tensor | None = None
        if unreduced:
            grad_output = take_rows(grad_output, rows)
        elif not self.kernels_divide(backend, tensors, options):
            if options.reduction == "mean":
                denominator = loss_denominator(options, self.total_weight(tensors, options))
            options = replace(options, reduction="sum", denominator=None)
            if outputs.gradients:
                if grad_output is None:
                    grad_output = tensors[0].new_ones((), dtype=torch.float64)
                grad_output = grad_output if denominator is None else grad_output / denominator
        if rows is not None:
            options = replace(options, token_weight=take_rows(options.token_weight, rows))
            state, indexed = take_rows(state, rows, 1), enumerate(tensors)
            tensors = [take_rows(x, rows) if i in self.row_operands else x for i, x in indexed]
        args = LossArgs(backend, options, outputs, grad_output, state, counts)
        loss, gradients, state = self.compute_rows(tensors, args)
        if loss is not None:
            if unreduced:
                loss = spread_rows(loss, rows, total)
            elif denominator is not None:
                loss = loss / denominator
            loss = loss.to(self.loss_dtype(tensors))
        if gradients and rows is not None:
            pairs = enumerate(gradients)
            gradients = tuple(
                [spread_rows(x, rows, total) if i in self.row_operands else x for i, x in pairs]
            )
        return loss, gradients, spread_rows(state, rows, total, 1)
