"""Losses of scores beside classes: their declaration, and what computes them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from pyfused import checks
from pyfused.backends import Backend, backend_of
from pyfused.layout import is_dense, layouts
from pyfused.ops import TORCH_OPS
from pyfused.ops.declaration import Arguments, Operator, reduction_of
from pyfused.ops.dispatch import is_compiled
from pyfused.ops.gradients import apply, autocast_dtype, differentiate, gradients_in_forward
from pyfused.types import (
    CrossEntropyOptions,
    Gradients,
    MarginOptions,
    NllOptions,
    Outputs,
)

Tensors = tuple[Any, ...]  # the input, the target and the weights of the classes
Launch = Callable[..., tuple[Tensor | None, Gradients]]


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
        tensors = given[:3]
        arranged = self.arranged(tensors)
        if needs is None:
            needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors]
        return ClassLossPlan(
            op=self,
            backend=backend_of(arranged[0]),
            options=given.options,
            dtype=self.dtype_of(given._replace(input=arranged[0])),
            needs=tuple(needs[:2]),
            inplace=inplace,
            arranges=any(new is not old for new, old in zip(arranged, tensors, strict=True)),
            now=gradients_in_forward(given.options.reduction, arranged[0])
            and (is_dense(arranged[0]) or not inplace),
        )

    def dtype_of(self, given: ClassLossArguments) -> torch.dtype:
        """Returns the dtype of the loss."""
        return autocast_dtype(given.input.dtype, given.input.device)

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
class ClassLossPlan:
    """Computes the calls of one signature.

    Gradients of a scalar loss are computed by the forward pass, while each row of scores is in
    cache. Exceptions are float16, which keeps them from underflowing only with grad_output, and a
    gradient that is to take memory with gaps, which could not be scaled later.

    Attributes:
        options: The options without their tensors, which every call brings.
        dtype: The dtype of the loss.
        needs: Whether the input and the target need a gradient.
        inplace: The gradient of the input takes its memory.
        arranges: The kernels do not take the tensors as they are given.
        now: The forward pass computes the gradients.
        launches: The prepared kernels: that of the forward pass by None, and one for each layout of
            grad_output.
    """

    op: ClassLoss
    backend: Backend
    options: Any
    dtype: torch.dtype
    needs: tuple[bool, ...]
    inplace: bool
    arranges: bool
    now: bool
    launches: dict[Any, Launch] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.name = self.op.name
        self.denominator: float | None = None  # where it is a number
        if isinstance(self.options, CrossEntropyOptions):
            self.denominator = self.options.denominator  # type: ignore[assignment]
            if isinstance(self.denominator, Tensor):
                self.denominator = None
            self.options = replace(
                self.options, token_weight=None, denominator=None, with_metrics=False
            )

    def run(self, tensors: Tensors) -> Tensor:
        """Returns the loss.

        Args:
            tensors: The input, the target, the weight, token_weight and the denominator, if that is
                a tensor.
        """
        if self.arranges:
            tensors = *self.op.arranged(tensors[:3]), *tensors[3:]
        if True in self.needs:
            loss: Tensor = apply(self, *tensors)
        else:
            loss = self.forward(None, tensors)
        return loss if loss.dtype is self.dtype else loss.to(self.dtype)

    def forward(self, ctx: Any, tensors: Sequence[Any]) -> Tensor:
        launch = self.launches.get(None)
        if launch is None:
            outputs = Outputs(True, self.needs if ctx and self.now else (), self.inplace)
            launch = self.launches[None] = self.prepared(tensors, outputs)
        loss, gradients = self.launched(launch, tensors, None)
        if ctx is not None:
            ctx.save_for_backward(*tensors)
            ctx.gradients = gradients if self.now else None
            ctx.overwritten = self.inplace and self.now
        assert loss is not None
        return loss

    def backward(self, ctx: Any, grad_output: Tensor) -> Gradients:
        tensors = _saved(ctx)
        if self.inplace:
            increment_version(tensors[0])
            ctx.overwritten = True
        return self.gradients(tensors, grad_output)

    def gradients(self, tensors: Tensors, grad_output: Tensor) -> Gradients:
        """Returns the gradients of the input and the target, where they are needed."""
        key = layouts(*tensors[:4], grad_output)
        launch = self.launches.get(key)
        if launch is None:
            outputs = Outputs(False, self.needs, self.inplace)
            launch = self.launches[key] = self.prepared(tensors, outputs, grad_output)
        return self.launched(launch, tensors, grad_output)[1]

    def prepared(
        self, tensors: Sequence[Any], outputs: Outputs, grad_output: Tensor | None = None
    ) -> Launch:
        input, target, weight, token_weight, _ = tensors
        options = self.options
        if token_weight is not None:
            options = replace(options, token_weight=token_weight)
        prepare: Callable[..., Launch] = getattr(self.backend, self.op.name)
        return prepare(input, target, weight, options, outputs, grad_output)

    def launched(
        self, launch: Launch, tensors: Sequence[Any], grad_output: Tensor | None
    ) -> tuple[Tensor | None, Gradients]:
        *given, denominator = tensors
        denominator = self.denominator if denominator is None else denominator
        return launch(*given, denominator, grad_output)

    def define(self, ctx: Any, grad_output: Tensor) -> Gradients:
        input, target, weight, token_weight, denominator = _saved(ctx)
        options = self.options
        if isinstance(options, CrossEntropyOptions):
            denominator = self.denominator if denominator is None else denominator
            options = replace(options, token_weight=token_weight, denominator=denominator)
        given = ClassLossArguments(input, target, weight, options)
        return gradients_of_definition(self.op, given, self.needs, grad_output)


def _saved(ctx: Any) -> Tensors:
    if ctx.overwritten:
        raise RuntimeError(
            "inplace: expected False for create_graph=True or a second backward pass, got True, "
            "and the gradient has taken the logits' memory"
        )
    saved: Tensors = ctx.saved_tensors
    return saved


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

    def plan(self, arguments: Arguments, inplace: bool) -> Callable[[Arguments], Any]:
        return self.compiled if is_compiled(arguments[0]) else super().plan(arguments, inplace)

    def compiled(self, arguments: Arguments) -> Tensor:
        """Returns the loss in a compiled program, of any size and reduction.

        torch's own is wrong there: it counts what follows the end of a row of labels.
        """
        input, target, _, options = self.checked(arguments)
        input = input.to(autocast_dtype(input.dtype, input.device))
        operator = TORCH_OPS.multilabel_margin_loss
        loss: Tensor = operator(input, target, None, None, options.reduction)
        return loss
