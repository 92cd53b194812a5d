"""Losses over classes: NLL, the margin losses, and the base class of cross-entropy.

nll_loss:                -w_y x_y
multi_margin_loss:       sum_{c != y} w_y max(0, margin - x_y + x_c)^p / C
multilabel_margin_loss:  sum_{y in labels} sum_{c not in labels} max(0, 1 - x_y + x_c) / C
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfused import checks
from pyfused.backends import Backend, backend_of
from pyfused.backends.protocol import LossKernel
from pyfused.dispatch.autograd import autocast_dtype, differentiate
from pyfused.dispatch.operator import Arguments, Operator, reduction_of
from pyfused.dispatch.plan import (
    Plan,
    Tensors,
    gradients_in_forward,
    loss_passes,
    needs_grad,
)
from pyfused.layout import accumulate_dtype, is_dense
from pyfused.ops.custom_operators import custom_operator
from pyfused.types import Gradients, MarginOptions, Outputs, VocabOptions


class ClassLossArguments(NamedTuple):
    """The arguments that checks and kernels take."""

    input: Tensor
    target: Tensor
    weight: Tensor | None
    options: Any  # VocabOptions or MarginOptions


@dataclass(eq=False, kw_only=True, repr=False)
class ClassLoss(Operator):
    """A loss of rows of scores, given a class index or class probabilities for each row.

    Attributes:
        check_arguments: Raises for invalid types, shapes, dtypes and options.
        kernel: Returns a backend's function that prepares the kernel.
    """

    check_arguments: Callable[..., None]
    kernel: Callable[[Backend], Callable[..., LossKernel]]

    def takes_second_limit(self, arguments: Arguments, few: int) -> bool:
        return checks.classes_of(arguments[0]) <= few

    @abstractmethod
    def read(self, arguments: Arguments) -> ClassLossArguments:
        """Parses the arguments of torch's function."""

    def tensors(self, arguments: Arguments) -> Tensors:
        """Returns the tensors of the plan, before `arranged`."""
        return *arguments[:3], None, None

    def checked(self, arguments: Arguments) -> ClassLossArguments:
        """Raises for invalid types, shapes, dtypes and options. Kernels check class indices."""
        parsed = self.read(arguments)
        checks.reduction(parsed.options.reduction)
        self.check_arguments(*parsed)
        return parsed

    def plan(
        self, arguments: Arguments, inplace: bool, needs: tuple[bool, ...] | None = None
    ) -> Plan:
        """Checks a call, and returns the plan of its signature.

        The plan's tensors are input, target, weight, token_weight and denominator, each a tensor or
        None.

        Args:
            needs: Whether the input and the target need a gradient; None to ask autograd.
        """
        parsed = self.checked(arguments)
        input: Any = parsed.input
        target, options = parsed.target, parsed.options
        dtype, converts = self.arrangement(parsed)
        if needs is None:
            needs = needs_grad((input, target))
        needs += (False,) * (2 - len(needs))
        backend, result_dtype = backend_of(input), self.result_dtype(parsed, dtype)
        numbers, reduction = self.without_tensors(options), options.reduction
        in_forward = gradients_in_forward(reduction, dtype)
        if inplace and not is_dense(input.empty()):  # backward could not scale the gradient
            in_forward = False

        def arrange(arguments: Arguments) -> Tensors:
            tensors = self.tensors(arguments)
            return (*self.arranged(tensors[:3]), *tensors[3:]) if converts else tensors

        def prepare(tensors: Tensors, outputs: Outputs, grad_output: Any) -> LossKernel:
            options = self.with_tensors(numbers, tensors)
            return self.kernel(backend)(*tensors[:3], options, outputs, grad_output)

        def define(tensors: Tensors, grad_output: Tensor) -> Gradients:
            input, target, weight, *_ = tensors
            options = self.with_tensors(numbers, tensors)
            arguments = ClassLossArguments(input, target, weight, options)
            return definition_gradients(self, arguments, needs, grad_output)

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
            finish=None if kernel_dtype is result_dtype else lambda loss, _: loss.to(result_dtype),
            inplace="gradient" if inplace else "",
        )

    def compiled(self, arguments: Arguments) -> Any:
        return custom_operator(self.name)(*arguments)

    def fake(self, arguments: Arguments) -> Tensor:
        """Returns an empty tensor like the result of the custom operator, which is reduced."""
        empty: Tensor = arguments[0].new_empty(())
        return empty

    def without_tensors(self, options: Any) -> Any:
        """Returns the options of a signature, with None in place of tensors."""
        return options

    def with_tensors(self, options: Any, tensors: Tensors) -> Any:  # noqa: ARG002
        """Returns the options with the tensors of a call."""
        return options

    def result_dtype(self, parsed: ClassLossArguments, dtype: torch.dtype) -> torch.dtype:
        """Returns the dtype of the result, given the dtype in which kernels take the input."""
        return autocast_dtype(dtype, parsed.input.device)

    def arrangement(self, parsed: ClassLossArguments) -> tuple[torch.dtype, bool]:
        """Returns the dtype in which kernels take the input, and whether `arranged` is needed."""
        is_row = parsed.input.dim() == 1
        return parsed.input.dtype, parsed.target.dtype is not torch.int64 or is_row

    def arranged(self, tensors: Tensors) -> Tensors:
        """Converts the target to int64 indices of the loss's shape."""
        input, target, weight = tensors
        target = target if target.dtype is torch.int64 else target.to(torch.int64)
        return input, target.reshape(()) if input.dim() == 1 else target, weight

    def define(self, parsed: ClassLossArguments) -> Tensor:
        """Returns the loss, computed by torch's operators."""
        input, target, weight, options = parsed
        return self.reference(input, target, weight=weight, **options._asdict())

    def check(self, arguments: Arguments) -> None:
        input, target, _, options = self.checked(arguments)
        ignore_index = getattr(options, "ignore_index", None)
        lowest = -1 if self.operands[1].labels else 0
        checks.class_indices(checks.classes_of(input), target, ignore_index, lowest)


def definition_gradients(
    op: ClassLoss, parsed: ClassLossArguments, needs: Sequence[bool], grad_output: Tensor
) -> Gradients:
    """Returns the gradients of torch's operator, which are differentiable."""
    dtype, weight = grad_output.dtype, parsed.weight

    def definition(input: Tensor, target: Tensor) -> Tensor:
        input = input.to(dtype)
        target = target.to(dtype) if target.is_floating_point() else target
        wide_weight = None if weight is None else weight.to(dtype)
        return op.define(ClassLossArguments(input, target, wide_weight, parsed.options))

    return differentiate(definition, parsed[:2], needs, grad_output)


# ---- losses of class indices ---------------------------------------------------------------------


@dataclass(eq=False, kw_only=True, repr=False)
class NllLoss(ClassLoss):
    """The negative log-likelihood of log-probabilities."""

    strategy = "one element of a row"

    def takes_second_limit(self, arguments: Arguments, few: int) -> bool:  # noqa: ARG002
        """Returns whether no gradient is needed: forward only reads one element of each row."""
        return self.needs_no_gradient(arguments)

    def read(self, arguments: Arguments) -> ClassLossArguments:
        input, target, weight, size_average, ignore_index, reduce, reduction = arguments
        reduction = reduction_of(size_average, reduce, reduction)
        options = VocabOptions(ignore_index=ignore_index, reduction=reduction)
        return ClassLossArguments(input, target, weight, options)

    def define(self, parsed: ClassLossArguments) -> Tensor:
        input, target, weight, options = parsed
        return self.reference(
            input,
            target,
            weight,
            ignore_index=options.ignore_index,
            reduction=options.reduction,
        )


@dataclass(eq=False, kw_only=True, repr=False)
class MultiMarginLoss(ClassLoss):
    """The multi-class margin loss of rows of scores."""

    strategy = "row by row"

    def takes_second_limit(self, arguments: Arguments, few: int) -> bool:  # noqa: ARG002
        """Returns whether rows are shorter than a vector of any width."""
        return super().takes_second_limit(arguments, 15)

    def read(self, arguments: Arguments) -> ClassLossArguments:
        input, target, p, margin, weight, size_average, reduce, reduction = arguments
        reduction = reduction_of(size_average, reduce, reduction)
        return ClassLossArguments(input, target, weight, MarginOptions(p, margin, reduction))

    def tensors(self, arguments: Arguments) -> Tensors:
        return arguments[0], arguments[1], arguments[4], None, None

    def arrangement(self, parsed: ClassLossArguments) -> tuple[torch.dtype, bool]:
        return parsed.input.dtype, True

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
        """Returns the shape of the unreduced loss."""
        shape: torch.Size = arguments[1].shape
        return shape


@dataclass(eq=False, kw_only=True, repr=False)
class MultilabelMarginLoss(MultiMarginLoss):
    """The margin loss of rows with several labels, which end at the first -1."""

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

    def define(self, parsed: ClassLossArguments) -> Tensor:
        return self.reference(parsed.input, parsed.target, reduction=parsed.options.reduction)

    def compiled(self, arguments: Arguments) -> Tensor:
        """Returns the loss in a compiled program, for any size and reduction.

        torch's decomposition is wrong: it includes the labels after the first -1.
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
