"""Custom operators for torch.compile, which cannot trace into the kernels.

Importing this module registers them, which takes longer than importing the rest of pyfused, so
`custom_operator` imports it when a compiler first asks for one.

Each operator has two: ``name`` computes the result and ``name_backward`` the gradients, because a
custom operator must not return what it saved. Both run the functions of the operator's plan. Their
arguments are the tensors, the numbers and the case of a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyfused.dispatch import run as dispatch
from pyfused.dispatch.operator import Arguments, Case, Numbers, Tensors
from pyfused.dispatch.originals import torch_alone
from pyfused.dispatch.plan import Plan
from pyfused.dispatch.signature import signature, spec_of
from pyfused.dispatch.sizes import COMPILED
from pyfused.layout import is_dense
from pyfused.ops import custom_operators
from pyfused.ops.class_loss import ClassLoss, MultiMarginLoss
from pyfused.ops.custom_operators import NAMESPACE, TORCH_OPS
from pyfused.ops.log_probs import LogProbsOperator
from pyfused.ops.operators import OPERATORS
from pyfused.ops.pointwise_loss import TensorLoss
from pyfused.ops.row_loss import RowLoss
from pyfused.ops.vocab_operator import VocabOperator
from pyfused.types import Gradients

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
# The types of the parts of a case; the others are bool.
_TYPES = {
    "reduction": "str",
    "remainder": "str",
    "ignore_index": "int",
    "p": "int",
    "memory_budget": "int?",
    "loss_dtype": "ScalarType?",
}


class CompiledOperator:
    """The custom operators of an operator.

    They take the values of the schema: the tensors, numbers and case of a call in one tuple. The
    tensors that may need gradients come first.

    Attributes:
        differentiable: The number of these tensors.
        in_forward: Whether the forward operator takes ``needs``, too, and returns a tuple: the
            result, the gradients of its sum, and the state of the rows if the operator has one.
        state: The index of the state among the results, None if the operator has no state. The
            backward operator takes the state as its last value before ``needs``.
    """

    def __init__(self, op: Any) -> None:
        self.op, self.name = op, op.name
        self.differentiable = sum(operand.differentiated for operand in op.operands)
        self.in_forward = isinstance(op, RowLoss)
        self.state: int | None = None
        if isinstance(op, LogProbsOperator):
            self.differentiable, self.state = len(op.operands) - 1, 0
        elif isinstance(op, RowLoss):
            self.differentiable = op.student
            self.state = -1 if op.state_fields(op.options()) else None

    def register(self) -> None:
        values = ", ".join(_schema(self.op))
        needs = f"bool[{self.differentiable}] needs"
        gradients = ", ".join(["Tensor"] * self.differentiable)
        state = "" if self.state is None else ", Tensor state"
        backward = f"{self.name}_backward"
        if self.in_forward:
            results = gradients if self.state is None else f"{gradients}, Tensor"
            _LIBRARY.define(f"{self.name}({values}, {needs}) -> (Tensor, {results})")
        else:
            _LIBRARY.define(f"{self.name}({values}) -> Tensor")
        _LIBRARY.define(
            f"{backward}(Tensor grad_output, {values}{state}, {needs}) -> ({gradients})"
        )
        for name, kernel, fake in (
            (self.name, self.run, self.fake),
            (backward, self.run_backward, self.fake_backward),
        ):
            for device in ("CPU", "CUDA"):
                _LIBRARY.impl(name, kernel, device)
            torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
        torch.library.register_autograd(
            f"{NAMESPACE}::{self.name}", self.backward, setup_context=self.save, lib=_LIBRARY
        )

    # ---- the call and its plan -------------------------------------------------------------------

    def call_of(self, values: Sequence[Any]) -> tuple[Tensors, Numbers, Case]:
        """Returns the tensors, numbers and case of a call, given the values of the schema."""
        tensors, numbers, case = self.op.split(tuple(values))
        return tensors, numbers, (*case, *[None] * sum(part.of_torch for part in self.op.case))

    def plan(
        self, tensors: Tensors, numbers: Numbers, case: Case, needs: Sequence[bool]
    ) -> tuple[Plan, Numbers]:
        """Returns the plan of the call's signature, kept with the plans of eager calls.

        Also returns the numbers for kernels.

        Args:
            needs: Whether each of the first tensors needs a gradient.
        """
        signed = signature(self.op, tensors, numbers, case, False)
        key = None  # if a mode is active, for example
        if not isinstance(signed, str):
            key, numbers = (*signed[0], "compiled", *needs), signed[1]
        plan: Plan | None = dispatch.find_plan(key)
        if plan is None:
            results = {"results": 0} if isinstance(self.op, LogProbsOperator) else {}
            specs: list[Any] = [spec_of(x) for x in tensors]
            for i, need in enumerate(needs):
                if specs[i] is not None:
                    specs[i] = replace(specs[i], requires_grad=need)
            for i, operand in enumerate(self.op.operands):
                # Class weights may differ in dtype under autocast, which is disabled here.
                if operand.name == "weight" and specs[i] is not None:
                    specs[i] = replace(specs[i], dtype=specs[0].dtype)
            arguments = self.op.arguments_of(specs, self.op.cases(numbers), case)
            with torch.enable_grad():  # the compiler disables it, and says which are needed
                plan = self.op.plan(arguments, False, **results)
            if key is not None:
                dispatch.keep_plan(key, plan)
        return plan, numbers

    def arguments(self, values: Sequence[Any]) -> Arguments:
        """Returns the arguments as the operator's methods for planning take them."""
        return self.op.arguments_of(*self.call_of(values))  # type: ignore[no-any-return]

    def gradients(
        self, values: Sequence[Any], needs: Sequence[bool], grad_output: Tensor, define: bool
    ) -> Gradients:
        """Returns the gradients, from the backward kernel or from torch's definition.

        Args:
            values: The values of the schema, followed by the state if the operator has one.
            define: The gradients are torch's and can be differentiated.
        """
        state = None
        if self.state is not None:
            *values, state = values
        tensors, numbers, case = self.call_of(values)
        plan, numbers = self.plan(tensors, numbers, case, needs)
        saved = tensors if plan.arrange is None else plan.arrange(tensors, numbers)
        if isinstance(self.op, RowLoss):
            saved = *saved, state
        elif isinstance(self.op, LogProbsOperator):
            saved = *saved, state, None  # without logits of the forward pass
        if isinstance(self.op, MultiMarginLoss) and grad_output.dim():
            grad_output = grad_output.flatten()
        return (plan.define if define else plan.backward)(saved, numbers, grad_output)

    # ---- kernels, and the layouts of their results -----------------------------------------------

    def run(self, *values: Any) -> Any:
        return custom_operators.compute(self.name, self._run, values)

    def _run(self, values: Sequence[Any]) -> Any:
        needs: Sequence[bool] = (False,) * self.differentiable
        if self.in_forward:
            *values, needs = values
        tensors, numbers, case = self.call_of(values)
        plan, numbers = self.plan(tensors, numbers, case, needs)
        arranged = tensors if plan.arrange is None else plan.arrange(tensors, numbers)
        output, saved, gradients = plan.forward(arranged, numbers)
        if not self.in_forward:
            # The dtype of other results depends on autocast, so that the caller converts them.
            finishes = not isinstance(self.op, VocabOperator) and plan.finish is not None
            return plan.finish(output, tensors) if finishes else output  # type: ignore[misc]
        loss, state = output if isinstance(output, tuple) else (output, None)
        if any(needs) and not gradients:
            gradients = plan.backward(saved, numbers, loss.new_ones(()))
        results = [loss, *self.dense_gradients(gradients, values)]
        if self.state is not None:
            results.append(
                self.op.fake_state(self.arguments(values)).zero_() if state is None else state
            )
        return tuple(results)

    def run_backward(self, grad_output: Tensor, *values: Any) -> Any:
        return custom_operators.compute(self.name, self._run_backward, grad_output, values)

    def _run_backward(self, grad_output: Tensor, values: Sequence[Any]) -> Any:
        *values, needs = values
        gradients = self.gradients(values, needs, grad_output, define=False)
        return _packed(self.dense_gradients(gradients, values))

    def fake(self, *values: Any) -> Any:
        if not self.in_forward:
            return self.op.fake(self.arguments(values))
        arguments = self.arguments(values[:-1])
        state = [] if self.state is None else [self.op.fake_state(arguments)]
        return self.op.fake(arguments), *self.fake_gradients(values, values[-1]), *state

    def fake_backward(self, _grad_output: Tensor, *values: Any) -> Any:
        return _packed(self.fake_gradients(values, values[-1]))

    def fake_gradients(self, values: Sequence[Any], needs: Sequence[bool]) -> list[Tensor]:
        return [
            values[0].new_empty(0) if tensor is None or not need else _empty_dense(tensor)
            for tensor, need in zip(values, needs, strict=False)
        ]

    def dense_gradients(self, gradients: Gradients, values: Sequence[Any]) -> list[Tensor]:
        """Returns gradients with the layouts of `fake_gradients`, and empty tensors for None."""
        gradients = gradients or (None,) * self.differentiable
        return [
            values[0].new_empty(0) if gradient is None else _dense_like(gradient, tensor)
            for gradient, tensor in zip(gradients, values[: self.differentiable], strict=False)
        ]

    # ---- autograd --------------------------------------------------------------------------------

    def save(self, ctx: Any, inputs: Arguments, output: Any) -> None:
        values, results, gradients = inputs, (output,), ()
        if self.in_forward:
            ctx.mark_non_differentiable(*output[1:])
            values, results = inputs[:-1], output
            gradients = output[1 : self.differentiable + 1] if any(inputs[-1]) else ()
        if self.state is not None:
            values = *values, results[self.state]
        tensors = [value if isinstance(value, Tensor) else None for value in values]
        ctx.save_for_backward(*tensors, *gradients)
        ctx.values = [None if isinstance(value, Tensor) else value for value in values]
        ctx.inputs = len(inputs)

    def backward(self, ctx: Any, grad_output: Tensor, *_: Tensor) -> Gradients:
        saved, count = ctx.saved_tensors, len(ctx.values)
        pairs = zip(saved[:count], ctx.values, strict=True)
        values = [value if tensor is None else tensor for tensor, value in pairs]
        needs = ctx.needs_input_grad[: self.differentiable]
        gradients: Any
        if torch.is_grad_enabled():
            with torch_alone:
                gradients = self.gradients(values, needs, grad_output, define=True)
            pairs = zip(gradients, values, strict=False)
            gradients = [x if x is None else x.reshape(like.shape) for x, like in pairs]
        elif saved[count:]:
            gradients = [gradient * grad_output for gradient in saved[count:]]
        else:
            gradients = getattr(TORCH_OPS, f"{self.name}_backward")(grad_output, *values, needs)
            gradients = gradients if self.differentiable > 1 else (gradients,)
        pairs = zip(gradients, needs, strict=False)
        gradients = [gradient if need else None for gradient, need in pairs]
        return *gradients, *[None] * (ctx.inputs - len(gradients))


def _packed(gradients: list[Tensor]) -> Tensor | list[Tensor]:
    return gradients if len(gradients) > 1 else gradients[0]


def _empty_dense(tensor: Tensor) -> Tensor:
    """Returns an empty tensor with the tensor's order of dimensions, or contiguous if not dense."""
    preserve = torch.preserve_format if is_dense(tensor) else torch.contiguous_format
    return torch.empty_like(tensor, memory_format=preserve)


def _dense_like(gradient: Tensor, tensor: Tensor) -> Tensor:
    """Returns the gradient of a tensor with the strides that `_empty_dense` gives it."""
    gradient = gradient.reshape(tensor.shape)
    if gradient.stride() == tensor.stride():
        return gradient
    empty = _empty_dense(tensor)
    return gradient if gradient.stride() == empty.stride() else empty.copy_(gradient)


def _schema(op: Any) -> list[str]:
    tensors = [f"{'Tensor?' if x.optional else 'Tensor'} {x.name}" for x in op.operands]
    factors = [f"Tensor? {x.name}_tensor" for x in op.factors]
    numbers = [f"{'float?' if x.optional else 'float'} {x.name}" for x in op.numbers]
    case = []
    for choice in op.case:
        if not choice.of_torch:
            is_word = choice.values and isinstance(choice.values[0], str)
            case.append(f"{'str' if is_word else _TYPES.get(choice.name, 'bool')} {choice.name}")
    return [*tensors, *factors, *numbers, *case]


for _op in OPERATORS.values():
    kinds = TensorLoss, ClassLoss, RowLoss, LogProbsOperator
    if isinstance(_op, kinds) and _op.name in COMPILED:
        CompiledOperator(_op).register()
