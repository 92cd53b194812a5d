"""Losses over classes: an autograd function over the fused kernels, and what compilers see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.compiler import is_dynamo_compiling
from torch.nn import functional as F

from pyfused import checks
from pyfused.backends import Backend, CrossEntropyOptions, Gradients, Want, cpu
from pyfused.backends.layout import accumulate_dtype, empty_viewed, is_dense, loss_shape, viewed
from pyfused.ops import inductor
from pyfused.ops.declaration import Arguments, Operator, reduction_of
from pyfused.ops.dispatch import backend_of, is_traced
from pyfused.ops.gradients import (
    autocast_dtype,
    backward,
    differentiate,
    gradients_ahead,
    without_functorch,
)
from pyfused.ops.torchs import original

_torchs = original(F.cross_entropy)
Saved = tuple[Tensor, Tensor, Tensor | None]


@dataclass(eq=False, kw_only=True, repr=False)
class CrossEntropy(Operator):
    """A loss of each row of logits beside a class index, or beside probabilities of the classes."""

    def fused(self, arguments: Arguments, inplace: bool) -> Tensor:
        input, target, weight, options = self._read(arguments)
        checks.reduction(options.reduction)
        checks.cross_entropy(input, target, weight, options.ignore_index, options.label_smoothing)
        if target.is_floating_point():
            common = torch.promote_types(input.dtype, target.dtype)
            if weight is not None:
                common = torch.promote_types(common, weight.dtype)
            input, target = input.to(common), target.to(common)
        else:
            target = target if target.dtype is torch.int64 else target.to(torch.int64)
            target = target.reshape(()) if input.dim() == 1 else target
        backend = backend_of(input)
        if is_dynamo_compiling() or is_traced(input):
            loss: Tensor | None = torch.ops.pyfused.cross_entropy(input, target, weight, *options)
        elif torch.is_grad_enabled() and (input.requires_grad or target.requires_grad):
            loss = _apply(backend, input, target, weight, options, inplace)
        else:
            loss, _ = backend.cross_entropy(input, target, weight, options, Want())
        assert loss is not None
        dtype = autocast_dtype(input.dtype, input.device)
        return loss if loss.dtype is dtype else loss.to(dtype)

    def check(self, arguments: Arguments) -> None:
        input, target, weight, options = self._read(arguments)
        checks.reduction(options.reduction)
        checks.cross_entropy(input, target, weight, options.ignore_index, options.label_smoothing)
        checks.class_indices(input, target, options.ignore_index)

    def _read(
        self, arguments: Arguments
    ) -> tuple[Tensor, Tensor, Tensor | None, CrossEntropyOptions]:
        input, target, weight, size_average, ignore_index, reduce, reduction, smoothing = arguments
        reduction = reduction_of(size_average, reduce, reduction)
        return input, target, weight, CrossEntropyOptions(ignore_index, reduction, smoothing)

    def give_up(self, input: Tensor) -> None:
        """Marks logits whose gradient may overwrite them as changed, for whoever saved them."""
        compiling = is_dynamo_compiling()  # whose gradient has memory of its own
        if torch.is_grad_enabled() and input.requires_grad and not compiling:
            checks.overwritable(input)
            increment_version(input)

    def manner(self, input: Tensor) -> str:
        return "rows in L2" if cpu.takes_rows(input) else "positions side by side"


class CrossEntropyFunction(torch.autograd.Function):
    """The gradients are computed by the forward pass, while each row of logits is in cache.

    Except where the upstream gradient is needed first: one that differs from row to row, or one
    that keeps float16 gradients from underflowing. Or where the gradient could not be scaled by it
    later, as it is to lie in memory with gaps.
    """

    @staticmethod
    def forward(
        ctx: Any,
        backend: Backend,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: CrossEntropyOptions,
        inplace: bool,
    ) -> Tensor | None:
        ctx.backend, ctx.options, ctx.inplace = backend, options, inplace
        ctx.save_for_backward(input, target, weight)
        now = gradients_ahead(options.reduction, input)
        now = now and (is_dense(input) or not inplace)
        want = Want(True, ctx.needs_input_grad[1:3] if now else (), inplace)
        loss, gradients = backend.cross_entropy(input, target, weight, options, want)
        ctx.gradients = gradients if now else None
        ctx.overwritten = inplace and now
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Gradients:
        return (
            None,
            *backward("cross_entropy", ctx, grad_output, _kernel, _definition),
            None,
            None,
            None,
        )


_apply = without_functorch(CrossEntropyFunction)


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
    want = Want(False, ctx.needs_input_grad[1:3], ctx.inplace)
    if ctx.inplace:
        increment_version(input)
        ctx.overwritten = True
    found: tuple[Tensor | None, Gradients] = ctx.backend.cross_entropy(
        input, target, weight, ctx.options, want, grad_output
    )
    return found[1]


def _definition(ctx: Any, grad_output: Tensor) -> Gradients:
    return _of_definition(_saved(ctx), ctx.options, ctx.needs_input_grad[1:3], grad_output)


def _of_definition(
    saved: Saved, options: CrossEntropyOptions, wanted: Sequence[bool], grad_output: Tensor
) -> Gradients:
    input, target, weight = saved
    dtype = grad_output.dtype

    def definition(input: Tensor, target: Tensor) -> Tensor:
        return _torchs(
            input.to(dtype),
            target.to(dtype) if target.is_floating_point() else target,
            None if weight is None else weight.to(dtype),
            **options._asdict(),
        )

    return differentiate(definition, (input, target), wanted, grad_output)


# ---- custom operators, which only a compiler sees ------------------------------------------------

# The gradient is computed by the backward pass: a custom operator may not hand over what it saved.
# Inductor may multiply what it saved in place, so inductor.py puts cross_entropy_ahead for the two.
_ARGUMENTS = (
    "Tensor input, Tensor target, Tensor? weight, "
    "int ignore_index, str reduction, float label_smoothing"
)
_LIBRARY = torch.library.Library("pyfused", "FRAGMENT")
_LIBRARY.define(f"cross_entropy({_ARGUMENTS}) -> Tensor")
_LIBRARY.define(
    f"cross_entropy_backward(Tensor grad_output, {_ARGUMENTS}, bool[2] wanted) -> (Tensor, Tensor)"
)
_LIBRARY.define(f"cross_entropy_ahead({_ARGUMENTS}, bool[2] wanted) -> (Tensor, Tensor, Tensor)")


def _loss(input: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> Tensor:
    loss, _ = cpu.cross_entropy(input, target, weight, CrossEntropyOptions(*options), Want())
    assert loss is not None
    return loss


def _gradients(
    grad_output: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, *options: Any
) -> Gradients:
    want = Want(False, tuple(options[-1]))
    arguments = input, target, weight, CrossEntropyOptions(*options[:-1])
    _, gradients = cpu.cross_entropy(*arguments, want, grad_output)
    return _filled(gradients, input)


def _loss_and_gradients(
    input: Tensor, target: Tensor, weight: Tensor | None, *options: Any
) -> tuple[Tensor | None, ...]:
    want = Want(True, tuple(options[-1]))
    arguments = input, target, weight, CrossEntropyOptions(*options[:-1])
    loss, gradients = cpu.cross_entropy(*arguments, want)
    return loss, *_filled(gradients, input)


def _filled(gradients: Gradients, input: Tensor) -> Gradients:
    """An operator returns no None."""
    return tuple(input.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _fake_loss(input: Tensor, _target: Tensor, _weight: Tensor | None, *options: Any) -> Tensor:
    inductor.register()
    shape = loss_shape(input, CrossEntropyOptions(*options).reduction)
    return input.new_empty(shape, dtype=accumulate_dtype(input.dtype))


def _fake_gradients(
    _grad_output: Tensor, input: Tensor, target: Tensor, _weight: Tensor | None, *options: Any
) -> Gradients:
    return tuple(
        empty_viewed(viewed(of)[0])[0] if want else input.new_empty(0)
        for of, want in zip((input, target), options[-1], strict=True)
    )


def _fake_loss_and_gradients(input: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    return _fake_loss(input, *rest[:-1]), *_fake_gradients(input, input, *rest)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    input, target, weight, *options = inputs
    ctx.options = CrossEntropyOptions(*options)
    ctx.save_for_backward(input, target, weight)


def _backward(ctx: Any, grad_output: Tensor) -> Gradients:
    wanted = ctx.needs_input_grad[:2]
    if torch.is_grad_enabled():
        gradients = _of_definition(ctx.saved_tensors, ctx.options, wanted, grad_output)
    else:
        operator = torch.ops.pyfused.cross_entropy_backward
        gradients = operator(grad_output, *ctx.saved_tensors, *ctx.options, wanted)
    given = (gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))
    return *given, *[None] * 4


for _name, _kernels, _fake in (
    ("cross_entropy", _loss, _fake_loss),
    ("cross_entropy_backward", _gradients, _fake_gradients),
    ("cross_entropy_ahead", _loss_and_gradients, _fake_loss_and_gradients),
):
    _LIBRARY.impl(_name, _kernels, "CPU")
    torch.library.register_fake(f"pyfused::{_name}", _fake, lib=_LIBRARY)
torch.library.register_autograd(
    "pyfused::cross_entropy", _backward, setup_context=_save, lib=_LIBRARY
)
