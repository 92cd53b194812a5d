"""Cross-entropy: what it has beyond other losses over classes, and what compilers see."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.compiler import is_dynamo_compiling

from pyfused import checks
from pyfused.backends import CrossEntropyOptions, Gradients, Want, cpu
from pyfused.backends.layout import accumulate_dtype, empty_viewed, loss_shape, viewed
from pyfused.ops import definitions, inductor, vocab_parallel
from pyfused.ops.class_loss import ClassLoss, Given, of_definition
from pyfused.ops.declaration import Arguments, reduction_of
from pyfused.ops.dispatch import backend_of, is_traced
from pyfused.ops.metrics import Measured


@dataclass(eq=False, kw_only=True, repr=False)
class CrossEntropy(ClassLoss):
    """Of logits, beside class indices or probabilities of the classes."""

    def read(self, arguments: Arguments) -> Given:
        input, target, weight, size_average, ignore_index, reduce, reduction, *rest = arguments
        reduction = reduction_of(size_average, reduce, reduction)
        options = CrossEntropyOptions(ignore_index, reduction, *rest[:-1])
        return Given(input, target, weight, options)

    def fused(self, arguments: Arguments, inplace: bool) -> Any:
        if (local := self._local_of(arguments)) is not None:
            return vocab_parallel.of_dtensor(arguments[0], local)
        if not arguments[-1]:
            return super().fused(arguments, inplace)
        given = self.arranged(self.checked(arguments))
        input, target, _, options = given
        measured = Measured.empty(math.prod(loss_shape(input, "none")), input)
        measures = measured.before(backend_of(input), input, target, options.ignore_index)
        loss = self.run(given, Want(inplace=inplace, measures=measures))
        metrics = measured.metrics(target, options, accumulate_dtype(arguments[0].dtype))
        return self.finished(given, loss), metrics

    def dtype_of(self, given: Given) -> torch.dtype:
        return given.options.loss_dtype or super().dtype_of(given)

    def arranged(self, given: Given) -> Given:
        input, target, weight, _ = given
        if not target.is_floating_point():
            return super().arranged(given)
        common = torch.promote_types(input.dtype, target.dtype)
        if weight is not None:
            common = torch.promote_types(common, weight.dtype)
        return given._replace(input=input.to(common), target=target.to(common))

    def run(self, given: Given, want: Want) -> Tensor:
        input, target, weight, options = given
        if is_dynamo_compiling() or is_traced(input):
            loss: Tensor = torch.ops.pyfused.cross_entropy(input, target, weight, *options[:3])
            return loss
        return super().run(given, want)

    def give_up(self, input: Tensor) -> None:
        """Marks logits whose gradient may overwrite them as changed, for whoever saved them."""
        compiling = is_dynamo_compiling()  # whose gradient has memory of its own
        if torch.is_grad_enabled() and input.requires_grad and not compiling:
            checks.overwritable(input)
            increment_version(input)

    def subclass_fallback_reason(self, arguments: Arguments) -> str | None:
        return None if self._local_of(arguments) else super().subclass_fallback_reason(arguments)

    def _local_of(self, arguments: Arguments) -> vocab_parallel.Local | None:
        """Of a DTensor whose classes are shared out."""
        if type(arguments[0]).__name__ != "DTensor" or arguments[-1]:
            return None
        input, target, weight, options = self.read(arguments)
        if target.is_floating_point() or options.gamma or input.dtype not in cpu.DTYPES:
            return None
        return vocab_parallel.local_of(input, target, weight, options)

    def strategy(self, input: Tensor) -> str:
        if type(input).__name__ == "DTensor":
            return "some classes a process"
        return "rows in L2" if cpu.takes_rows(input) else "positions side by side"


def cross_entropy_fallback_reason(input: Tensor, *arguments: Any) -> str | None:
    """Why torch's operator is the one for these arguments."""
    if input.dim() > 1 and input.shape[1] == 1:
        return "one class"
    *_, gamma, z_loss, token_weight, denominator, loss_dtype, return_metrics = arguments
    compiled = is_dynamo_compiling() or is_traced(input)
    plain = gamma == z_loss == 0 and token_weight is denominator is loss_dtype is None
    if compiled and (return_metrics or not plain):
        return "torch.compile: Inductor fuses what torch's cross_entropy has not"
    if isinstance(denominator, Tensor) and denominator.requires_grad:
        return "denominator requires grad"
    return None


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
        gradients = of_definition(
            definitions.cross_entropy, ctx.saved_tensors, ctx.options, wanted, grad_output
        )
    else:
        operator = torch.ops.pyfused.cross_entropy_backward
        gradients = operator(grad_output, *ctx.saved_tensors, *ctx.options[:3], wanted)
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
