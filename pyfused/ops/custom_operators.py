"""The custom operators, which only a compiler sees: it cannot look into the kernels.

A loss is an operator of its tensors and of each field of its options, so that the schema follows
from these. Its gradients are an operator of their own, computed by the backward pass: a custom
operator must not hand over what it saved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from pyfused.backends import backend_of
from pyfused.layout import accumulate_dtype, empty_viewed, loss_shape, viewed
from pyfused.ops import inductor, linear_cross_entropy
from pyfused.ops.chunked import Wanted
from pyfused.ops.class_loss import gradients_of_definition
from pyfused.ops.operators import CROSS_ENTROPY
from pyfused.types import CrossEntropyOptions, Gradients, Head, HeadOptions, Want

Tensors = tuple[Any, ...]  # those of an operator's schema, of which some may be None

_LIBRARY = torch.library.Library("pyfused", "FRAGMENT")
_SCHEMA = {  # of the types of fields
    "int": "int",
    "int | None": "int?",
    "float": "float",
    "float | None": "float?",
    "float | Tensor | None": "float?",  # a compiled call has no tensor there
    "bool": "bool",
    "str": "str",
    "Tensor | None": "Tensor?",
    "torch.dtype | None": "ScalarType?",
}


@dataclass(frozen=True)
class CompiledLoss:
    """What the custom operators of a loss are made of.

    Attributes:
        tensors: The tensors' schema; those that may have gradients come first.
        differentiable: How many these are.
        options: The class of the options.
        loss: The loss, given tensors and options.
        gradients: The gradients, given tensors, options, which are wanted, and grad_output.
        definition: The same in torch's terms, differentiable.
        empty_loss, empty_gradient: Tensors like the loss, and like the gradient of a tensor.
    """

    name: str
    tensors: tuple[str, ...]
    differentiable: int
    options: type[CrossEntropyOptions]
    loss: Callable[[Tensors, Any], Tensor]
    gradients: Callable[[Tensors, Any, Sequence[bool], Tensor], Gradients]
    definition: Callable[[Tensors, Any, Sequence[bool], Tensor], Gradients]
    empty_loss: Callable[[Tensors, Any], Tensor]
    empty_gradient: Callable[[Tensor], Tensor]

    @property
    def arguments(self) -> list[str]:
        options = [f"{_SCHEMA[str(each.type)]} {each.name}" for each in fields(self.options)]
        return [*self.tensors, *options]

    def read(self, arguments: Sequence[Any]) -> tuple[Tensors, Any]:
        """Tensors and options from an operator's arguments."""
        n = len(self.tensors)
        return tuple(arguments[:n]), self.options(*arguments[n:])

    def empty_gradients(self, tensors: Tensors, wanted: Sequence[bool]) -> list[Tensor]:
        found = [
            self.empty_gradient(tensor) if want and tensor is not None else None
            for tensor, want in zip(tensors[: self.differentiable], wanted, strict=True)
        ]
        return _filled(tuple(found), tensors[0])

    def define(self) -> None:
        arguments, outputs = ", ".join(self.arguments), ", ".join(["Tensor"] * self.differentiable)
        wanted = f"bool[{self.differentiable}] wanted"
        backward = f"{self.name}_backward"
        _LIBRARY.define(f"{self.name}({arguments}) -> Tensor")
        _LIBRARY.define(f"{backward}(Tensor grad_output, {arguments}, {wanted}) -> ({outputs})")

        def run(*given: Any) -> Tensor:
            return self.loss(*self.read(given))

        def run_backward(grad_output: Tensor, *given: Any) -> list[Tensor]:
            found = self.gradients(*self.read(given[:-1]), given[-1], grad_output)
            return _filled(found, given[0])

        def fake(*given: Any) -> Tensor:
            inductor.register()
            return self.empty_loss(*self.read(given))

        def fake_backward(_: Tensor, *given: Any) -> list[Tensor]:
            return self.empty_gradients(self.read(given[:-1])[0], given[-1])

        for name, kernel, meta in (
            (self.name, run, fake),
            (backward, run_backward, fake_backward),
        ):
            _LIBRARY.impl(name, kernel, "CPU")
            torch.library.register_fake(f"pyfused::{name}", meta, lib=_LIBRARY)
        torch.library.register_autograd(
            f"pyfused::{self.name}", self.backward, setup_context=_save, lib=_LIBRARY
        )

    def backward(self, ctx: Any, grad_output: Tensor) -> Gradients:
        pairs = zip(ctx.saved_tensors, ctx.others, strict=True)
        given = [other if tensor is None else tensor for tensor, other in pairs]
        wanted = ctx.needs_input_grad[: self.differentiable]
        found: Sequence[Tensor | None]
        if torch.is_grad_enabled():
            found = self.definition(*self.read(given), wanted, grad_output)
        else:
            operator = getattr(torch.ops.pyfused, f"{self.name}_backward")
            found = operator(grad_output, *given, wanted)
        kept = [gradient if want else None for gradient, want in zip(found, wanted, strict=True)]
        return *kept, *[None] * (len(given) - len(kept))


def _filled(gradients: Gradients, input: Tensor) -> list[Tensor]:
    """An operator returns no None."""
    return [input.new_empty(0) if each is None else each for each in gradients]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    tensors = [value if isinstance(value, Tensor) else None for value in inputs]
    ctx.save_for_backward(*tensors)
    pairs = zip(inputs, tensors, strict=True)
    ctx.others = [value if tensor is None else None for value, tensor in pairs]


# ---- cross_entropy -------------------------------------------------------------------------------


def _loss(tensors: Tensors, options: CrossEntropyOptions) -> Tensor:
    input, target, weight = tensors
    loss, _ = backend_of(input).cross_entropy(input, target, weight, options, Want())
    assert loss is not None
    return loss


def _gradients(
    tensors: Tensors,
    options: CrossEntropyOptions,
    wanted: Sequence[bool],
    grad_output: Tensor,
) -> Gradients:
    input, target, weight = tensors
    want, kernel = Want(False, tuple(wanted)), backend_of(input).cross_entropy
    return kernel(input, target, weight, options, want, grad_output)[1]


def _empty_loss(tensors: Tensors, options: CrossEntropyOptions) -> Tensor:
    input: Tensor = tensors[0]
    shape = loss_shape(input, options.reduction)
    return input.new_empty(shape, dtype=accumulate_dtype(input.dtype))


cross_entropy = CompiledLoss(
    "cross_entropy",
    ("Tensor input", "Tensor target", "Tensor? weight"),
    2,
    CrossEntropyOptions,
    _loss,
    _gradients,
    lambda tensors, options, wanted, grad_output: gradients_of_definition(
        CROSS_ENTROPY, CROSS_ENTROPY.read((*tensors, options)), wanted, grad_output
    ),
    _empty_loss,
    lambda tensor: empty_viewed(viewed(tensor)[0])[0],
)
cross_entropy.define()


# Inductor may multiply what was saved in place, so inductor.py puts this operator for the two.
def _loss_and_gradients(*given: Any) -> list[Tensor]:
    (input, target, weight), options = cross_entropy.read(given[:-1])
    want, kernel = Want(True, tuple(given[-1])), backend_of(input).cross_entropy
    loss, found = kernel(input, target, weight, options, want)
    assert loss is not None
    return [loss, *_filled(found, input)]


def _fake_loss_and_gradients(*given: Any) -> list[Tensor]:
    tensors, options = cross_entropy.read(given[:-1])
    return [_empty_loss(tensors, options), *cross_entropy.empty_gradients(tensors, given[-1])]


_NAME = "cross_entropy_with_gradients"
_LIBRARY.define(
    f"{_NAME}({', '.join(cross_entropy.arguments)}, bool[2] wanted) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.impl(_NAME, _loss_and_gradients, "CPU")
torch.library.register_fake(f"pyfused::{_NAME}", _fake_loss_and_gradients, lib=_LIBRARY)

# ---- linear_cross_entropy ------------------------------------------------------------------------


def _loss_of_head(tensors: Tensors, options: HeadOptions) -> Tensor:
    head = Head(*tensors)
    linear_cross_entropy.check_indices(head, options)
    return linear_cross_entropy.compute(head, options).loss


def _empty_loss_of_head(tensors: Tensors, options: HeadOptions) -> Tensor:
    head = Head(*tensors)
    shape = linear_cross_entropy.loss_shape(head) if options.reduction == "none" else ()
    return head.input.new_empty(shape, dtype=linear_cross_entropy.loss_dtype(head))


CompiledLoss(
    "linear_cross_entropy",
    (
        "Tensor input",
        "Tensor linear_weight",
        "Tensor? linear_bias",
        "Tensor target",
        "Tensor? weight",
    ),
    4,
    HeadOptions,
    _loss_of_head,
    lambda tensors, options, wanted, grad_output: linear_cross_entropy.compute_gradients(
        Head(*tensors), options, Wanted(*wanted), grad_output
    ),
    lambda tensors, options, wanted, grad_output: linear_cross_entropy.gradients_of_definition(
        Head(*tensors), options, wanted, grad_output
    ),
    _empty_loss_of_head,
    lambda tensor: torch.empty_like(tensor, memory_format=torch.contiguous_format),
).define()
