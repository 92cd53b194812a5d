"""Losses of scores beside classes: their declaration, and what computes them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from pyfused import checks
from pyfused.backends import backend_of
from pyfused.dispatch.autograd import apply, autocast_dtype, differentiate, gradients_in_forward
from pyfused.dispatch.custom_operators import custom_operator
from pyfused.dispatch.operator import Arguments, Operator, reduction_of
from pyfused.dispatch.plan import Launch, LossPlan
from pyfused.layout import is_dense
from pyfused.types import (
    TENSORS,
    CrossEntropyOptions,
    Gradients,
    MarginOptions,
    NllOptions,
    Outputs,
)

Tensors = tuple[Any, ...]  # the input, the target and the weights of the classes


class ClassLossArguments(NamedTuple):
    """The arguments of a call, as checked and as the kernels take them."""

    input: Tensor
    target: Tensor
    weight: Tensor | None
    options: Any  # CrossEntropyOptions, NllOptions or MarginOptions


@dataclass(eq=False, kw_only=True, repr=False)
class ClassLoss(Operator):
    """A loss of each row of scores beside a class index, or beside probabilities of the classes."""

    def takes_second_limit(self, arguments: Arguments, few: int) -> bool:
        return checks.classes_of(arguments[0]) <= few

    @abstractmethod
    def read(self, arguments: Arguments) -> ClassLossArguments:
        """Returns the arguments that kernels take, as they were given."""

    def tensors(self, arguments: Arguments) -> Tensors:
        """Returns the tensors among the arguments, but for those in the options."""
        return arguments[:3]

    def checked(self, arguments: Arguments) -> ClassLossArguments:
        """Raises for types, shapes, dtypes and options; class indices are checked by the kernel."""
        given = self.read(arguments)
        checks.reduction(given.options.reduction)
        getattr(checks, self.name)(*given)
        return given

    def plan(self, arguments: Arguments, inplace: bool) -> Callable[[Arguments], Any]:
        plan = self.planned(arguments, inplace)
        return lambda arguments: plan.run((*self.tensors(arguments), None, None))

    def planned(
        self, arguments: Arguments, inplace: bool, needs: Sequence[bool] | None = None
    ) -> ClassLossPlan:
        """Checks a call, and returns the plan of its signature.

        Args:
            needs: Whether the input and the target need a gradient, where that is not for autograd
                to say.
        """
        given = self.checked(arguments)
        input: Any = given.input
        options, (dtype, arranges) = given.options, self.arrangement(given)
        if needs is None:
            grad = torch.is_grad_enabled()
            needs = [grad and tensor.requires_grad for tensor in given[:2]]
        return ClassLossPlan(
            op=self,
            backend=backend_of(input),
            options=options,
            result=self.dtype_of(given, dtype),
            needs=tuple(needs),
            inplace=inplace,
            arranges=arranges,
            now=gradients_in_forward(options.reduction, dtype)
            and (not inplace or is_dense(input.empty())),
        )

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


@dataclass(eq=False, kw_only=True)
class ClassLossPlan(LossPlan):
    """Computes the calls of one signature.

    The tensors are the input, the target, the weight, token_weight, and the denominator where that
    is a tensor.

    Attributes:
        options: The options without their tensors, which every call brings.
        arranges: The kernels do not take the tensors as they are given.
    """

    op: ClassLoss
    options: Any
    arranges: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        options = self.options
        if isinstance(options, CrossEntropyOptions):
            number = None if isinstance(options.denominator, TENSORS) else options.denominator
            self.options = replace(
                options, token_weight=None, denominator=number, with_metrics=False
            )

    def run(self, tensors: Sequence[Any]) -> Tensor:
        if self.arranges:
            tensors = *self.op.arranged(tuple(tensors[:3])), *tensors[3:]
        loss: Tensor = apply(self, *tensors) if True in self.needs else self.forward(None, tensors)
        return loss if loss.dtype is self.result else loss.to(self.result)

    def backward(self, ctx: Any, grad_output: Tensor) -> Gradients:
        tensors = _saved(ctx)
        if self.inplace:
            increment_version(tensors[0])
            ctx.overwritten = True
        return self.gradients(tensors, grad_output)

    def prepared(
        self, tensors: Sequence[Any], outputs: Outputs, grad_output: Tensor | None
    ) -> Launch:
        input, target, weight, token_weight, _ = tensors
        options = self.options
        if token_weight is not None:
            options = replace(options, token_weight=token_weight)
        prepare: Callable[..., Launch] = getattr(self.backend, self.op.name)
        return prepare(input, target, weight, options, outputs, grad_output)

    def define(self, ctx: Any, grad_output: Tensor) -> Gradients:
        input, target, weight, token_weight, denominator = _saved(ctx)
        options = self.options
        if isinstance(options, CrossEntropyOptions):
            given = options.denominator if denominator is None else denominator
            options = replace(options, token_weight=token_weight, denominator=given)
        arguments = ClassLossArguments(input, target, weight, options)
        return gradients_of_definition(self.op, arguments, self.needs, grad_output)


def _saved(ctx: Any) -> Tensors:
    if ctx.overwritten:
        raise RuntimeError(
            "inplace: expected False for create_graph=True or a second backward pass, got True, "
            "and the gradient has taken the logits' memory"
        )
    tensors: Tensors = ctx.saved_tensors[: ctx.first_gradient]
    return tensors


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
        return arguments[0], arguments[1], arguments[4]

    def arrangement(self, given: ClassLossArguments) -> tuple[torch.dtype, bool]:
        return given.input.dtype, True

    def arranged(self, tensors: Tensors) -> Tensors:
        input, target, weight = tensors
        target = target if target.dtype is torch.int64 else target.to(torch.int64)
        return input.reshape(-1, input.shape[-1]), target.reshape(-1), weight

    def plan(self, arguments: Arguments, inplace: bool) -> Callable[[Arguments], Any]:
        run = super().plan(arguments, inplace)

        def shaped(arguments: Arguments) -> Tensor:
            loss: Tensor = run(arguments)
            return loss.reshape(self.loss_shape(arguments)) if loss.dim() else loss

        return shaped

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
        return arguments[0], arguments[1], None

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
