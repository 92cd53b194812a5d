"""Losses of rows that may count for nothing: linear cross-entropy and divergences."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyfused.backends import Backend, backend_of
from pyfused.dispatch.autograd import differentiate, without_autocast
from pyfused.dispatch.operator import Arguments, Operator
from pyfused.dispatch.plan import Forward, Plan, gradients_in_forward, needs_grad
from pyfused.layout import accumulate_dtype
from pyfused.ops.custom_operators import custom_operator
from pyfused.ops.heads import spread_rows, take_rows
from pyfused.ops.row_state import denominator_of
from pyfused.types import TENSORS, Gradients, Options, Outputs

# The loss, None where it is not asked for; the gradients, or (); and the state of each row that
# metrics or the backward pass need, None if none do.
Results = tuple[Tensor | None, Gradients, Tensor | None]


@dataclass(eq=False, kw_only=True, repr=False)
class RowLoss(Operator):
    """A loss of rows, of which those that count for nothing are left out.

    Gradients of a scalar are computed by the forward pass, where all classes of a row are at hand.
    Otherwise the backward pass recomputes the logits. So it does for float16, whose gradient would
    underflow without grad_output.

    Attributes:
        student: How many of its tensors are differentiated: these come first.
        check_arguments: Raises for types, shapes, dtypes and options that do not fit.
        options: The class of its options, the fields of which the custom operator takes.
    """

    student: int
    check_arguments: Callable[..., None]
    options: ClassVar[type[Options]]

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [operand.name.removeprefix("teacher_") for operand in self.operands]
        layers = "linear_weight", "linear_bias", "weight"
        self.with_rows = [i for i, name in enumerate(names) if name not in layers]

    @abstractmethod
    def check_call(self, arguments: Arguments) -> Options:
        """Raises for types, shapes and options that do not fit; returns the options to compute."""

    @abstractmethod
    def arranged(self, arguments: Arguments) -> tuple[Any, ...]:
        """Returns the operands as rows, and token_weight and denominator if they are tensors."""

    @abstractmethod
    def finished(self, results: Any, arguments: Arguments) -> Any:
        """Returns the result of a call, given its loss and its state."""

    @abstractmethod
    def counted(
        self, backend: Backend, tensors: Sequence[Any], options: Any
    ) -> tuple[Tensor | None, float | Tensor]:
        """Returns the rows that count, None for all, and the weight that a mean divides by."""

    @abstractmethod
    def compute_rows(
        self,
        backend: Backend,
        tensors: Sequence[Any],
        options: Any,
        outputs: Outputs,
        grad_output: Tensor | None,
        state: Tensor | None,
    ) -> Results:
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

    def define(
        self, tensors: Sequence[Any], options: Any, needs: Sequence[bool], grad_output: Tensor
    ) -> Gradients:
        """Returns the gradients from torch's definition, which can be differentiated."""

        def definition(*differentiated: Any) -> Tensor:
            return self.in_torch((*differentiated, *tensors[self.student :]), options)

        return differentiate(definition, tensors[: self.student], needs, grad_output)

    def plan(
        self,
        arguments: Arguments,
        inplace: bool,  # noqa: ARG002
        needs: tuple[bool, ...] | None = None,
    ) -> Plan:
        """Checks a call, and returns the plan of its signature.

        Args:
            needs: Whether each of the student's tensors needs a gradient; None to ask autograd.
        """
        numbers, count = without_tensors(self.check_call(arguments)), len(self.operands)
        if needs is None:
            needs = needs_grad(arguments[: self.student])
        backend, device = backend_of(arguments[0]), arguments[0].device.type

        def arrange(arguments: Arguments) -> Sequence[Any]:
            self.check_indices(arguments[:count], numbers)
            return self.arranged(arguments)

        def forward(tensors: Sequence[Any]) -> Forward:
            options = with_tensors(numbers, *tensors[count:])
            now = True in needs and gradients_in_forward(options.reduction, tensors[0].dtype)
            outputs = Outputs(True, needs if now else ())
            with without_autocast(device):
                loss, gradients, state = self.compute(backend, tensors[:count], options, outputs)
            return (loss, state), (*tensors, state), gradients

        def backward(saved: Sequence[Any], grad_output: Tensor) -> Gradients:
            *others, state = saved[count:]
            options, outputs = with_tensors(numbers, *others), Outputs(False, needs)
            given = backend, saved[:count], options, outputs, grad_output, state
            return self.compute(*given)[1]

        def define(saved: Sequence[Any], grad_output: Tensor) -> Gradients:
            options = with_tensors(numbers, *saved[count:-1])
            return self.define(saved[:count], options, needs, grad_output)

        return Plan(
            name=self.name,
            backend=backend,
            needs=needs,
            arrange=arrange,
            forward=forward,
            backward=backward,
            define=define,
            finish=self.finished,
        )

    def compiled(self, arguments: Arguments) -> Any:
        options = self.check_call(arguments)
        *tensors, token_weight, denominator = self.arranged(arguments)
        options = with_tensors(options, token_weight, denominator)
        now = gradients_in_forward(options.reduction, tensors[0].dtype)
        wanted = [now and need for need in needs_grad(tensors[: self.student])]
        with without_autocast(tensors[0].device.type):
            loss, *others = custom_operator(self.name)(*tensors, *options.values(), wanted)
        return self.finished((loss, others[-1]), arguments)

    def fake(self, arguments: Arguments) -> Tensor:
        """Returns an empty tensor like the loss that the custom operator returns."""
        tensors, reduction = arguments[: len(self.operands)], arguments[-1].reduction
        shape = self.losses(tensors) if reduction == "none" else ()
        empty: Tensor = tensors[0].new_empty(shape, dtype=self.loss_dtype(tensors))
        return empty

    def fake_state(self, arguments: Arguments) -> Tensor:
        """Returns an empty tensor like the state of the rows that it returns."""
        tensors = arguments[: len(self.operands)]
        shape = self.fields(arguments[-1]), *self.losses(tensors)
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
        """Returns the results of a call.

        Args:
            outputs: Whether the loss, and which of the tensors' gradients, are computed.
            grad_output: The loss's gradient, of the loss's shape; None stands for ones.
            state: What the forward pass has returned, for the gradients.
        """
        each, total = options.reduction == "none", len(tensors[0])
        rows, weight = self.counted(backend, tensors, options)
        denominator = denominator_of(options, weight)
        if each:
            grad_output = take_rows(grad_output, rows)
        elif outputs.gradients:
            if grad_output is None:
                grad_output = tensors[0].new_ones((), dtype=torch.float64)
            grad_output = grad_output / denominator
        options = replace(
            options,
            reduction="none" if each else "sum",
            denominator=None,
            token_weight=take_rows(options.token_weight, rows),
        )
        counted = [take_rows(x, rows) if i in self.with_rows else x for i, x in enumerate(tensors)]
        state = take_rows(state, rows, 1)
        loss, gradients, state = self.compute_rows(
            backend, counted, options, outputs, grad_output, state
        )
        if loss is not None:
            loss = spread_rows(loss, rows, total) if each else loss / denominator
            loss = loss.to(self.loss_dtype(tensors))
        if gradients:
            gradients = spread_rows(gradients[0], rows, total), *gradients[1:]
        return loss, gradients, spread_rows(state, rows, total, 1)


def without_tensors(options: Any) -> Any:
    """Returns the options of a signature: those that are no tensors."""
    return replace(options, **dict.fromkeys(options.tensors()))


def with_tensors(options: Any, token_weight: Tensor | None, denominator: Tensor | None) -> Any:
    """Returns the options of a call."""
    if token_weight is None and denominator is None:
        return options
    denominator = options.denominator if denominator is None else denominator
    return replace(options, token_weight=token_weight, denominator=denominator)


def tensors_of(options: Any) -> tuple[Tensor | None, Tensor | None]:
    """Returns token_weight and denominator, each None if it is no tensor."""
    denominator = options.denominator
    return options.token_weight, denominator if isinstance(denominator, TENSORS) else None
