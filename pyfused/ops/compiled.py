"""The custom operators, which only a compiler sees: it cannot look into the kernels.

Importing this module registers them, which takes longer than importing the rest of pyfused. So
`custom_operator` imports it, when a compiler first asks for one.

An operator's schema follows from its declaration, or from the fields of its options. Its gradients
are an operator of their own, computed by the backward pass: a custom operator must not hand over
what it saved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyfused.backends import backend_of, cross_entropy_once
from pyfused.dispatch.autograd import differentiate
from pyfused.dispatch.operator import Arguments, Operator
from pyfused.dispatch.originals import torch_alone
from pyfused.dispatch.sizes import COMPILED
from pyfused.layout import accumulate_dtype, empty_viewed, is_dense, loss_shape, viewed
from pyfused.ops import custom_operators
from pyfused.ops.class_loss import ClassLoss, ClassLossArguments, gradients_of_definition
from pyfused.ops.custom_operators import NAMESPACE, TORCH_OPS
from pyfused.ops.log_probs import LogProbsOperator
from pyfused.ops.operators import CROSS_ENTROPY, MULTILABEL_MARGIN_LOSS, OPERATORS
from pyfused.ops.pointwise_loss import TensorLoss
from pyfused.ops.row_loss import RowLoss
from pyfused.types import (
    STATE_FIELDS,
    CrossEntropyOptions,
    Gradients,
    Options,
    Outputs,
)

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
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
_NO_DEFAULT = {"size_average": "bool?", "reduce": "bool?"}


@dataclass(frozen=True)
class CompiledOperator:
    """What the custom operators of an operator are made of.

    Their functions take the arguments in the order of the schema.

    Attributes:
        schema: The arguments' schema; the tensors that may have gradients come first.
        differentiable: How many these are.
        value: The result.
        gradients: The gradients, given arguments, which are wanted, and grad_output.
        definition: The same in torch's terms, differentiable.
        empty_value, empty_gradient: Tensors like the result, and like the gradient of a tensor.
        adds_output: The output that they are computed from, beside the arguments, of which it is
            then the last; None if there is none.
        in_forward: Whether the operator takes which gradients are wanted, too, and ``value``
            returns a list: the result, the gradients of its sum, and others, which have none.
        empty_others: Tensors like those.
    """

    name: str
    schema: Sequence[str]
    differentiable: int
    value: Callable[..., Any]
    gradients: Callable[[Arguments, Sequence[bool], Tensor], Gradients]
    definition: Callable[[Arguments, Sequence[bool], Tensor], Gradients]
    empty_gradient: Callable[[Tensor], Tensor]
    empty_value: Callable[[Arguments], Tensor]
    adds_output: int | None = None
    in_forward: bool = False
    empty_others: Sequence[Callable[[Arguments], Tensor]] = ()

    def empty_gradients(self, given: Arguments, wanted: Sequence[bool]) -> list[Tensor]:
        found = [
            self.empty_gradient(tensor) if want and tensor is not None else None
            for tensor, want in zip(given, wanted, strict=False)
        ]
        return _filled(tuple(found), given[0])

    def define(self) -> None:
        arguments, outputs = ", ".join(self.schema), ", ".join(["Tensor"] * self.differentiable)
        wanted = f"bool[{self.differentiable}] wanted"
        backward = f"{self.name}_backward"
        if self.in_forward:
            others = ", Tensor" * len(self.empty_others)
            results = f"(Tensor, {outputs}{others})"
            _LIBRARY.define(f"{self.name}({arguments}, {wanted}) -> {results}")
        else:
            _LIBRARY.define(f"{self.name}({arguments}) -> Tensor")
        if self.adds_output is not None:
            arguments += ", Tensor output"
        _LIBRARY.define(f"{backward}(Tensor grad_output, {arguments}, {wanted}) -> ({outputs})")

        def run(*given: Any) -> Any:
            if not self.in_forward:
                return custom_operators.compute(self.name, self.value, given)
            value = partial(self.value, wanted=given[-1])
            return tuple(custom_operators.compute(self.name, value, given[:-1]))

        def run_backward(grad_output: Tensor, *given: Any) -> Any:
            arguments = given[:-1], given[-1], grad_output
            found = custom_operators.compute(self.name, self.gradients, *arguments)
            return _packed(_filled(found, given[0]))

        def fake(*given: Any) -> Any:
            if not self.in_forward:
                return self.empty_value(given)
            arguments, wanted = given[:-1], given[-1]
            others = [empty(arguments) for empty in self.empty_others]
            gradients = self.empty_gradients(arguments, wanted)
            return self.empty_value(arguments), *gradients, *others

        def fake_backward(_: Tensor, *given: Any) -> Any:
            return _packed(self.empty_gradients(given[:-1], given[-1]))

        for name, kernel, meta in (
            (self.name, run, fake),
            (backward, run_backward, fake_backward),
        ):
            for device in ("CPU", "CUDA"):
                _LIBRARY.impl(name, kernel, device)
            torch.library.register_fake(f"{NAMESPACE}::{name}", meta, lib=_LIBRARY)
        torch.library.register_autograd(
            f"{NAMESPACE}::{self.name}", self.backward, setup_context=self.save, lib=_LIBRARY
        )

    def save(self, ctx: Any, inputs: Arguments, output: Any) -> None:
        given, outputs, gradients = inputs, (output,), ()
        if self.in_forward:
            ctx.mark_non_differentiable(*output[1:])
            given, outputs = inputs[:-1], output
            gradients = output[1 : self.differentiable + 1] if any(inputs[-1]) else ()
        given = given if self.adds_output is None else (*given, outputs[self.adds_output])
        tensors = [value if isinstance(value, Tensor) else None for value in given]
        ctx.save_for_backward(*tensors, *gradients)
        pairs = zip(given, tensors, strict=True)
        ctx.others = [value if tensor is None else None for value, tensor in pairs]

    def backward(self, ctx: Any, grad_output: Tensor, *_: Tensor) -> Gradients:
        saved, count = ctx.saved_tensors, len(ctx.others)
        pairs = zip(saved[:count], ctx.others, strict=True)
        given = tuple(other if tensor is None else tensor for tensor, other in pairs)
        wanted = ctx.needs_input_grad[: self.differentiable]
        found: Any
        if torch.is_grad_enabled():
            with torch_alone:
                found = self.definition(given, wanted, grad_output)
        elif saved[count:]:
            found = [gradient * grad_output for gradient in saved[count:]]
        else:
            found = getattr(TORCH_OPS, f"{self.name}_backward")(grad_output, *given, wanted)
            found = found if self.differentiable > 1 else (found,)
        kept = [gradient if want else None for gradient, want in zip(found, wanted, strict=True)]
        inputs = len(given) - (self.adds_output is not None) + self.in_forward
        return *kept, *[None] * (inputs - len(kept))


def _filled(gradients: Gradients, input: Tensor) -> list[Tensor]:
    """Returns gradients with an empty tensor for None, which an operator cannot return."""
    return [input.new_empty(0) if each is None else each for each in gradients]


def _packed(gradients: list[Tensor]) -> Tensor | list[Tensor]:
    return gradients if len(gradients) > 1 else gradients[0]


# ---- losses as they are declared -----------------------------------------------------------------


def _schema(op: Operator) -> list[str]:
    types = {s.name: "bool" if s.flag else "float?" if s.optional else "float" for s in op.scalars}
    types |= {s.name: "str" for s in op.scalars if s.words}
    types |= {o.name: "Tensor?" if o.optional else "Tensor" for o in op.operands}
    for name, default in zip(op.arguments[1:], op.defaults, strict=True):
        types.setdefault(name, _NO_DEFAULT.get(name, type(default).__name__))
    return [f"{types[name]} {name.lstrip('_')}" for name in op.arguments]


def _empty(like: Tensor) -> Tensor:
    """Returns a dense tensor, in the order of ``like`` where that is dense."""
    preserve = torch.preserve_format if is_dense(like) else torch.contiguous_format
    return torch.empty_like(like, memory_format=preserve)


def _of_loss(op: Any) -> CompiledOperator:
    def value(given: Arguments) -> Tensor:
        with torch.no_grad():
            result: Tensor = op.plan(given, False)(given)
        return result

    def gradients(given: Arguments, wanted: Sequence[bool], grad_output: Tensor) -> Gradients:
        found = _gradients_of_loss(op, given, wanted, grad_output)
        pairs = zip(given, found, strict=False)
        return tuple([None if each is None else _laid_out(each, like) for like, each in pairs])

    def definition(given: Arguments, wanted: Sequence[bool], grad_output: Tensor) -> Gradients:
        def loss(*tensors: Tensor) -> Tensor:
            result: Tensor = op.reference(*tensors, *given[len(wanted) :])
            return result

        return differentiate(loss, given[: len(wanted)], wanted, grad_output)

    def empty_value(given: Arguments) -> Tensor:
        empty: Tensor = given[0].new_empty(op.loss_shape(given) if _is_unreduced(op, given) else ())
        return empty

    return CompiledOperator(
        op.name,
        _schema(op),
        differentiable=sum(operand.differentiated for operand in op.operands),
        value=value,
        gradients=gradients,
        definition=definition,
        empty_value=empty_value,
        empty_gradient=_empty,
    )


def _is_unreduced(op: Any, given: Arguments) -> bool:
    """Returns whether the result is the losses of rows; all but one operator are called reduced."""
    return op is MULTILABEL_MARGIN_LOSS and op.read(given).options.reduction == "none"


def _laid_out(gradient: Tensor, like: Tensor) -> Tensor:
    """Returns a gradient with the strides that the compiler has been told."""
    if gradient.stride() == like.stride():
        return gradient
    empty = _empty(like)
    return gradient if gradient.stride() == empty.stride() else empty.copy_(gradient)


def _gradients_of_loss(
    op: Any, given: Arguments, wanted: Sequence[bool], grad_output: Tensor
) -> Gradients:
    """Computes the gradients of tensors that dispatch has found to be alike."""
    count = len(op._read(given)[0]) if isinstance(op, TensorLoss) else 2
    plan = op.plan(given, False, (*wanted, *[False] * (count - len(wanted))))
    if _is_unreduced(op, given):
        grad_output = grad_output.reshape(-1)
    gradients = plan.backward(plan.arrange(given), grad_output)
    pairs = zip(gradients[: len(wanted)], given, strict=False)
    return tuple([None if x is None else x.reshape(like.shape) for x, like in pairs])


for _op in OPERATORS.values():
    if (
        isinstance(_op, (TensorLoss, ClassLoss))
        and _op.name in COMPILED
        and _op is not CROSS_ENTROPY
    ):
        _of_loss(_op).define()

# ---- cross_entropy -------------------------------------------------------------------------------


def _fields(options: type[Options]) -> list[str]:
    return [f"{_SCHEMA[str(each.type)]} {each.name}" for each in fields(options)]


def _read_logits(given: Arguments) -> ClassLossArguments:
    input, target, weight, *options = given
    return ClassLossArguments(input, target, weight, CrossEntropyOptions(*options))


def _loss(given: Arguments) -> Tensor:
    loss, _ = cross_entropy_once(backend_of(given[0]), *_read_logits(given), Outputs())
    assert loss is not None
    return loss


def _gradients(given: Arguments, wanted: Sequence[bool], grad_output: Tensor) -> Gradients:
    outputs = Outputs(False, tuple(wanted))
    return cross_entropy_once(backend_of(given[0]), *_read_logits(given), outputs, grad_output)[1]


def _empty_loss(given: Arguments) -> Tensor:
    input, *_, options = _read_logits(given)
    shape = loss_shape(input, options.reduction)
    return input.new_empty(shape, dtype=accumulate_dtype(input.dtype))


cross_entropy = CompiledOperator(
    name="cross_entropy",
    schema=["Tensor input", "Tensor target", "Tensor? weight", *_fields(CrossEntropyOptions)],
    differentiable=2,
    value=_loss,
    gradients=_gradients,
    definition=lambda given, wanted, grad_output: gradients_of_definition(
        CROSS_ENTROPY, _read_logits(given), wanted, grad_output
    ),
    empty_value=_empty_loss,
    empty_gradient=lambda tensor: empty_viewed(viewed(tensor)[0])[0],
)
cross_entropy.define()

# ---- functions of a vocabulary -------------------------------------------------------------------


def _of_operands(op: Any, **family: Any) -> CompiledOperator:
    """Takes the operands as declared, and then the fields of the options."""
    tensors = [f"{'Tensor?' if each.optional else 'Tensor'} {each.name}" for each in op.operands]
    return CompiledOperator(
        name=op.name,
        schema=[*tensors, *_fields(op.options)],
        empty_gradient=lambda like: torch.empty_like(like, memory_format=torch.contiguous_format),
        **family,
    )


def _read(op: Any, given: Arguments) -> tuple[Arguments, Any, Arguments]:
    """Returns the tensors, the options, and the state where it follows them."""
    count = len(op.operands)
    last = count + len(fields(op.options))
    return given[:count], op.options(*given[count:last]), given[last:]


def _of_row_loss(op: RowLoss) -> CompiledOperator:
    def value(given: Arguments, wanted: Sequence[bool]) -> list[Tensor]:
        tensors, options, _ = _read(op, given)
        op.check_indices(tensors, options)
        outputs = Outputs(True, tuple(wanted) if any(wanted) else ())
        loss, found, state = op.compute(backend_of(tensors[0]), tensors, options, outputs)
        assert loss is not None
        if any(wanted) and not found:
            found = gradients((*given, state), wanted, loss.new_ones(()))
        results = [loss, *_filled(found or (None,) * op.student, given[0])]
        if empty_others:
            results.append(empty_state(given).zero_() if state is None else state)
        return results

    def gradients(given: Arguments, wanted: Sequence[bool], grad_output: Tensor) -> Gradients:
        tensors, options, state = _read(op, given)
        outputs = Outputs(False, tuple(wanted))
        return op.compute(backend_of(tensors[0]), tensors, options, outputs, grad_output, *state)[1]

    def definition(given: Arguments, wanted: Sequence[bool], grad_output: Tensor) -> Gradients:
        tensors, options, _ = _read(op, given)
        return op.define(tensors, options, wanted, grad_output)

    def empty_value(given: Arguments) -> Tensor:
        tensors, options, _ = _read(op, given)
        shape = op.losses(tensors) if options.reduction == "none" else ()
        empty: Tensor = given[0].new_empty(shape, dtype=op.loss_dtype(tensors))
        return empty

    def empty_state(given: Arguments) -> Tensor:
        tensors, options, _ = _read(op, given)
        shape = op.fields(options), *op.losses(tensors)
        empty: Tensor = given[0].new_empty(shape, dtype=torch.float64)
        return empty

    empty_others = [empty_state] * bool(op.fields(op.options()))
    return _of_operands(
        op,
        differentiable=op.student,
        value=value,
        gradients=gradients,
        definition=definition,
        empty_value=empty_value,
        in_forward=True,
        adds_output=-1 if empty_others else None,
        empty_others=empty_others,
    )


def _of_log_probs(op: LogProbsOperator) -> CompiledOperator:
    differentiable = len(op.operands) - 1

    def value(given: Arguments) -> Tensor:
        tensors, options, _ = _read(op, given)
        op.check((*tensors, options))
        plan = op.state_plan(tensors[:-1], options, results=0, needs=())
        state: Tensor = plan((*tensors, None))
        return state

    def gradients(given: Arguments, wanted: Sequence[bool], grad_output: Tensor) -> Gradients:
        tensors, options, (state,) = _read(op, given)
        plan = op.state_plan(tensors[:-1], options, results=0, needs=tuple(wanted))
        found = plan.backward((*tensors, None, state, None), grad_output)
        return tuple(None if each is None else each.contiguous() for each in found)

    def definition(given: Arguments, wanted: Sequence[bool], grad_output: Tensor) -> Gradients:
        tensors, options, (state,) = _read(op, given)
        plan = op.state_plan(tensors[:-1], options, results=0, needs=tuple(wanted))
        return plan.define((*tensors, None, state), grad_output)

    def empty_value(given: Arguments) -> Tensor:
        target: Tensor = given[differentiable]
        return target.new_empty((STATE_FIELDS, *target.shape), dtype=torch.float64)

    return _of_operands(
        op,
        differentiable=differentiable,
        value=value,
        gradients=gradients,
        definition=definition,
        empty_value=empty_value,
        adds_output=0,
    )


for _op in OPERATORS.values():
    if isinstance(_op, LogProbsOperator):
        _of_log_probs(_op).define()
    elif isinstance(_op, RowLoss):
        _of_row_loss(_op).define()
