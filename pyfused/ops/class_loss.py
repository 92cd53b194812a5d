"""Losses of scores beside classes: an autograd function over the fused kernels."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from pyfused import checks
from pyfused.backends import Backend, backend_of
from pyfused.layout import is_dense
from pyfused.ops.declaration import Arguments, Operator, reduction_of
from pyfused.ops.gradients import (
    autocast_dtype,
    backward,
    differentiate,
    gradients_in_forward,
    without_functorch,
)
from pyfused.types import ClassLossOptions, Gradients, MarginOptions, NllOptions, Want

Saved = tuple[Tensor, Tensor, Tensor | None]


class Given(NamedTuple):
    """A call's arguments, as checked and as the kernels take them."""

    input: Tensor
    target: Tensor
    weight: Tensor | None
    options: Any  # the operator's ClassLossOptions


@dataclass(eq=False, kw_only=True, repr=False)
class ClassLoss(Operator):
    """A loss of each row of scores beside a class index, or beside probabilities of the classes."""

    def size_key(self, arguments: Arguments) -> tuple[str, int]:
        shape = arguments[0].shape
        classes = shape[1] if len(shape) > 1 else arguments[0].numel()
        return self.name + "_kdim" * (len(shape) > 2), classes

    @abstractmethod
    def read(self, arguments: Arguments) -> Given:
        """The arguments that kernels take, as they were given."""

    def checked(self, arguments: Arguments) -> Given:
        """Raises for types, shapes, dtypes and options; class indices are checked by the kernel."""
        given = self.read(arguments)
        checks.reduction(given.options.reduction)
        getattr(checks, self.name)(*given)
        return given

    def fused(self, arguments: Arguments, inplace: bool) -> Tensor:
        given = self.arranged(self.checked(arguments))
        return self.finished(given, self.run(given, Want(inplace=inplace)))

    def finished(self, given: Given, loss: Tensor) -> Tensor:
        dtype = self.dtype_of(given)
        return loss if loss.dtype is dtype else loss.to(dtype)

    def dtype_of(self, given: Given) -> torch.dtype:
        """The loss's."""
        return autocast_dtype(given.input.dtype, given.input.device)

    def arranged(self, given: Given) -> Given:
        """int64 indices in the shape of the losses."""
        target = given.target
        target = target if target.dtype is torch.int64 else target.to(torch.int64)
        return given._replace(target=target.reshape(()) if given.input.dim() == 1 else target)

    def define(self, given: Given) -> Tensor:
        """The loss in torch's terms."""
        input, target, weight, options = given
        return self.reference(input, target, weight=weight, **options._asdict())

    def run(self, given: Given, want: Want) -> Tensor:
        input, target, weight, options = given
        backend = backend_of(input)
        if torch.is_grad_enabled() and (input.requires_grad or target.requires_grad):
            loss: Tensor | None = _apply(self, backend, input, target, weight, options, want)
        else:
            kernel = getattr(backend, self.name)
            loss, _ = kernel(input, target, weight, options, want)
        assert loss is not None
        return loss

    def check(self, arguments: Arguments) -> None:
        given = self.checked(arguments)
        ignore_index = getattr(given.options, "ignore_index", None)
        checks.class_indices(checks.classes_of(given.input), given.target, ignore_index)


class ClassLossFunction(torch.autograd.Function):
    """The gradients are computed by the forward pass, while each row of scores is in cache.

    Except where grad_output is needed first: one that differs from row to row, or one
    that keeps float16 gradients from underflowing. Or where the gradient could not be scaled by it
    later, as it is to lie in memory with gaps.
    """

    @staticmethod
    def forward(
        ctx: Any,
        op: ClassLoss,
        backend: Backend,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: ClassLossOptions,
        want: Want,
    ) -> Tensor | None:
        ctx.op, ctx.backend, ctx.options, ctx.inplace = op, backend, options, want.inplace
        ctx.save_for_backward(input, target, weight)
        now = gradients_in_forward(options.reduction, input)
        now = now and (is_dense(input) or not want.inplace)
        want = want._replace(gradients=ctx.needs_input_grad[2:4] if now else ())
        loss: Tensor | None
        loss, gradients = getattr(backend, op.name)(input, target, weight, options, want)
        ctx.gradients = gradients if now else None
        ctx.overwritten = want.inplace and now
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Gradients:
        found = backward(ctx.op.name, ctx, grad_output, _kernel, _definition)
        return None, None, *found, None, None, None


_apply = without_functorch(ClassLossFunction)


def _saved(ctx: Any) -> Saved:
    if ctx.overwritten:
        raise RuntimeError(
            "inplace: expected False for create_graph=True or a second backward pass, got True, "
            "and the gradient has taken the logits' memory"
        )
    saved: Saved = ctx.saved_tensors
    return saved


def _kernel(ctx: Any, grad_output: Tensor) -> Gradients:
    input, target, weight = _saved(ctx)
    want = Want(False, ctx.needs_input_grad[2:4], ctx.inplace)
    if ctx.inplace:
        increment_version(input)
        ctx.overwritten = True
    kernel = getattr(ctx.backend, ctx.op.name)
    found: tuple[Tensor | None, Gradients] = kernel(
        input, target, weight, ctx.options, want, grad_output
    )
    return found[1]


def _definition(ctx: Any, grad_output: Tensor) -> Gradients:
    given = Given(*_saved(ctx), ctx.options)
    return gradients_of_definition(ctx.op, given, ctx.needs_input_grad[2:4], grad_output)


def gradients_of_definition(
    op: ClassLoss, given: Given, wanted: Sequence[bool], grad_output: Tensor
) -> Gradients:
    """The gradients of torch's own operator, themselves differentiable."""
    dtype, weight = grad_output.dtype, given.weight

    def definition(input: Tensor, target: Tensor) -> Tensor:
        input = input.to(dtype)
        target = target.to(dtype) if target.is_floating_point() else target
        as_dtype = None if weight is None else weight.to(dtype)
        return op.define(Given(input, target, as_dtype, given.options))

    return differentiate(definition, given[:2], wanted, grad_output)


# ---- losses of class indices alone ---------------------------------------------------------------


@dataclass(eq=False, kw_only=True, repr=False)
class NllLoss(ClassLoss):
    """Of log-probabilities."""

    def read(self, arguments: Arguments) -> Given:
        input, target, weight, size_average, ignore_index, reduce, reduction = arguments
        reduction = reduction_of(size_average, reduce, reduction)
        return Given(input, target, weight, NllOptions(ignore_index, reduction))

    def strategy(self, input: Tensor) -> str:  # noqa: ARG002
        return "one element of a row"


@dataclass(eq=False, kw_only=True, repr=False)
class MultiMarginLoss(ClassLoss):
    """Of scores, rows of classes."""

    def read(self, arguments: Arguments) -> Given:
        input, target, p, margin, weight, size_average, reduce, reduction = arguments
        reduction = reduction_of(size_average, reduce, reduction)
        return Given(input, target, weight, MarginOptions(p, margin, reduction))

    def arranged(self, given: Given) -> Given:
        rows = given.input.reshape(-1, given.input.shape[-1])
        return given._replace(input=rows, target=given.target.reshape(-1))

    def fused(self, arguments: Arguments, inplace: bool) -> Tensor:
        loss = super().fused(arguments, inplace)
        return loss.reshape(arguments[1].shape) if loss.dim() else loss

    def strategy(self, input: Tensor) -> str:  # noqa: ARG002
        return "row by row"
