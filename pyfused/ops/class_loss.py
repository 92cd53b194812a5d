"""Losses of scores beside classes: their declaration, and what computes them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfused import checks
from pyfused.backends import Backend, backend_of
from pyfused.dispatch.autograd import autocast_dtype, differentiate
from pyfused.dispatch.operator import Arguments, Operator, reduction_of
from pyfused.dispatch.plan import (
    Launch,
    Plan,
    Tensors,
    gradients_in_forward,
    loss_passes,
    needs_grad,
)
from pyfused.layout import accumulate_dtype, is_dense
from pyfused.ops.custom_operators import custom_operator
from pyfused.types import Gradients, MarginOptions, NllOptions, Outputs


class ClassLossArguments(NamedTuple):
    """The arguments of a call, as checked and as the kernels take them."""

    input: Tensor
    target: Tensor
    weight: Tensor | None
    options: Any  # CrossEntropyOptions, NllOptions or MarginOptions


@dataclass(eq=False, kw_only=True, repr=False)
class ClassLoss(Operator):
    """A loss of each row of scores beside a class index, or beside probabilities of the classes.

    Attributes:
        check_arguments: Raises for types, shapes, dtypes and options that do not fit.
        kernel: Returns a backend's function that prepares the loss.
    """

    check_arguments: Callable[..., None]
    kernel: Callable[[Backend], Callable[..., Launch]]

    def takes_second_limit(self, arguments: Arguments, few: int) -> bool:
        return checks.classes_of(arguments[0]) <= few

    @abstractmethod
    def read(self, arguments: Arguments) -> ClassLossArguments:
        """Returns the arguments that kernels take, as they were given."""

    def tensors(self, arguments: Arguments) -> Tensors:
        """Returns the tensors of a call, in the order of the plan's."""
        return *arguments[:3], None, None

    def checked(self, arguments: Arguments) -> ClassLossArguments:
        """Raises for types, shapes, dtypes and options; class indices are checked by the kernel."""
        given = self.read(arguments)
        checks.reduction(given.options.reduction)
        self.check_arguments(*given)
        return given

    def plan(
        self, arguments: Arguments, inplace: bool, needs: tuple[bool, ...] | None = None
    ) -> Plan:
        """Checks a call, and returns the plan of its signature.

        The plan's tensors are the input, the target, the weight, token_weight and the denominator,
        each None where the call has no such tensor.

        Args:
            needs: Whether the input and the target need a gradient; None to ask autograd.
        """
        given = self.checked(arguments)
        input: Any = given.input
        target, options = given.target, given.options
        dtype, changes = self.arrangement(given)
        if needs is None:
            needs = needs_grad((input, target))
        needs += (False,) * (2 - len(needs))
        backend, result = backend_of(input), self.dtype_of(given, dtype)
        numbers, reduction = self.without_tensors(options), options.reduction
        in_forward = gradients_in_forward(reduction, dtype)
        if inplace and not is_dense(input.empty()):  # a gradient that cannot be scaled
            in_forward = False

        def arrange(arguments: Arguments) -> Tensors:
            tensors = self.tensors(arguments)
            return (*self.arranged(tensors[:3]), *tensors[3:]) if changes else tensors

        def prepare(tensors: Tensors, outputs: Outputs, grad_output: Any) -> Launch:
            options = self.with_tensors(numbers, tensors)
            return self.kernel(backend)(*tensors[:3], options, outputs, grad_output)

        def define(tensors: Tensors, grad_output: Tensor) -> Gradients:
            input, target, weight, *_ = tensors
            options = self.with_tensors(numbers, tensors)
            arguments = ClassLossArguments(input, target, weight, options)
            return gradients_of_definition(self, arguments, needs, grad_output)

        forward, backward = loss_passes(prepare, needs, in_forward, inplace)
        kernel_dtype = accumulate_dtype(dtype)
        return Plan(
            name=self.name,
            backend=backend,
            needs=needs,
            arrange=arrange,
            forward=forward,
            backward=backward,
            define=define,
            finish=None if kernel_dtype is result else lambda loss, _: loss.to(result),
            inplace="gradient" if inplace else "",
        )

    def compiled(self, arguments: Arguments) -> Any:
        return custom_operator(self.name)(*arguments)

    def fake(self, arguments: Arguments) -> Tensor:
        """Returns an empty tensor like the result of the custom operator, which is reduced."""
        empty: Tensor = arguments[0].new_empty(())
        return empty

    def without_tensors(self, options: Any) -> Any:
        """Returns the options that a plan keeps."""
        return options

    def with_tensors(self, options: Any, tensors: Tensors) -> Any:  # noqa: ARG002
        """Returns the options of a plan with the tensors of a call among them."""
        return options

    def dtype_of(self, given: ClassLossArguments, dtype: torch.dtype) -> torch.dtype:
        """Returns the dtype of the loss of logits that the kernels take in a dtype."""
        return autocast_dtype(dtype, given.input.device)

    def arrangement(self, given: ClassLossArguments) -> tuple[torch.dtype, bool]:
        """Returns the dtype in which the kernels take the input, and whether tensors change."""
        scalar = given.input.dim() == 1
        return given.input.dtype, given.target.dtype is not torch.int64 or scalar

    def arranged(self, tensors: Tensors) -> Tensors:
        """Returns the target as int64 indices in the shape of the losses, beside the others."""
        input, target, weight = tensors
        target = target if target.dtype is torch.int64 else target.to(torch.int64)
        return input, target.reshape(()) if input.dim() == 1 else target, weight

    def define(self, given: ClassLossArguments) -> Tensor:
        """Returns the loss as torch computes it."""
        input, target, weight, options = given
        return self.reference(input, target, weight=weight, **options._asdict())

    def check(self, arguments: Arguments) -> None:
        given = self.checked(arguments)
        ignore_index = getattr(given.options, "ignore_index", None)
        least = -1 if self.operands[1].labels else 0
        checks.class_indices(checks.classes_of(given.input), given.target, ignore_index, least)


def gradients_of_definition(
    op: ClassLoss, given: ClassLossArguments, wanted: Sequence[bool], grad_output: Tensor
) -> Gradients:
    """Returns the gradients of torch's own operator, themselves differentiable."""
    dtype, weight = grad_output.dtype, given.weight

    def definition(input: Tensor, target: Tensor) -> Tensor:
        input = input.to(dtype)
        target = target.to(dtype) if target.is_floating_point() else target
        as_dtype = None if weight is None else weight.to(dtype)
        return op.define(ClassLossArguments(input, target, as_dtype, given.options))

    return differentiate(definition, given[:2], wanted, grad_output)


# ---- losses of class indices alone ---------------------------------------------------------------


@dataclass(eq=False, kw_only=True, repr=False)
class NllLoss(ClassLoss):
    """The negative log-likelihood of log-probabilities."""

    strategy = "one element of a row"

    def takes_second_limit(self, arguments: Arguments, few: int) -> bool:  # noqa: ARG002
        """Returns whether no gradient follows: a forward pass reads an element of each row."""
        return self.is_forward_alone(arguments)

    def read(self, arguments: Arguments) -> ClassLossArguments:
        input, target, weight, size_average, ignore_index, reduce, reduction = arguments
        reduction = reduction_of(size_average, reduce, reduction)
        return ClassLossArguments(input, target, weight, NllOptions(ignore_index, reduction))


@dataclass(eq=False, kw_only=True, repr=False)
class MultiMarginLoss(ClassLoss):
    """The margin loss of scores, rows of classes."""

    strategy = "row by row"

    def takes_second_limit(self, arguments: Arguments, few: int) -> bool:  # noqa: ARG002
        """Returns whether there are few classes: shorter rows fill no vector of either width."""
        return super().takes_second_limit(arguments, 15)

    def read(self, arguments: Arguments) -> ClassLossArguments:
        input, target, p, margin, weight, size_average, reduce, reduction = arguments
        reduction = reduction_of(size_average, reduce, reduction)
        return ClassLossArguments(input, target, weight, MarginOptions(p, margin, reduction))

    def tensors(self, arguments: Arguments) -> Tensors:
        return arguments[0], arguments[1], arguments[4], None, None

    def arrangement(self, given: ClassLossArguments) -> tuple[torch.dtype, bool]:
        return given.input.dtype, True

    def arranged(self, tensors: Tensors) -> Tensors:
        input, target, weight = tensors
        target = target if target.dtype is torch.int64 else target.to(torch.int64)
        return input.reshape(-1, input.shape[-1]), target.reshape(-1), weight

    def plan(
        self, arguments: Arguments, inplace: bool, needs: tuple[bool, ...] | None = None
    ) -> Plan:
        plan = super().plan(arguments, inplace, needs)
        cast = plan.finish

        def finish(loss: Tensor, arguments: Arguments) -> Tensor:
            loss = loss if cast is None else cast(loss, arguments)
            return loss.reshape(self.loss_shape(arguments)) if loss.dim() else loss

        return replace(plan, finish=finish)

    def loss_shape(self, arguments: Arguments) -> torch.Size:
        """Returns the shape of the losses before they are reduced."""
        shape: torch.Size = arguments[1].shape
        return shape


@dataclass(eq=False, kw_only=True, repr=False)
class MultilabelMarginLoss(MultiMarginLoss):
    """The margin loss of rows with several targets, which end at the first -1."""

    def read(self, arguments: Arguments) -> ClassLossArguments:
        input, target, size_average, reduce, reduction = arguments
        reduction = reduction_of(size_average, reduce, reduction)
        return ClassLossArguments(input, target, None, MarginOptions(1, 1.0, reduction))

    def tensors(self, arguments: Arguments) -> Tensors:
        return arguments[0], arguments[1], None, None, None

    def arranged(self, tensors: Tensors) -> Tensors:
        input, target, _ = tensors
        classes = input.shape[-1]
        return input.reshape(-1, classes), target.reshape(-1, classes), None

    def loss_shape(self, arguments: Arguments) -> torch.Size:
        shape: torch.Size = arguments[0].shape
        return shape[:-1]

    def define(self, given: ClassLossArguments) -> Tensor:
        return self.reference(given.input, given.target, reduction=given.options.reduction)

    def compiled(self, arguments: Arguments) -> Tensor:
        """Returns the loss in a compiled program, of any size and reduction.

        torch's own is wrong there: it counts what follows the end of a row of labels.
        """
        input, target, _, options = self.checked(arguments)
        input = input.to(autocast_dtype(input.dtype, input.device))
        operator = custom_operator(self.name)
        loss: Tensor = operator(input, target, None, None, options.reduction)
        return loss

    def fake(self, arguments: Arguments) -> Tensor:
        unreduced = self.read(arguments).options.reduction == "none"
        empty: Tensor = arguments[0].new_empty(self.loss_shape(arguments) if unreduced else ())
        return empty
