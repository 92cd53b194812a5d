"""Custom operators for torch.compile, which cannot trace into the kernels.

Each operator has two: ``name`` computes the result and ``name_backward`` the gradients, because a
custom operator must not return what it saved. Both run the functions of the operator's plan. Their
arguments are the tensors and the options of a call.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyfused.dispatch import run as dispatch
from pyfused.dispatch.operator import Operator, Options, Tensors
from pyfused.dispatch.originals import torch_alone
from pyfused.dispatch.plan import Plan
from pyfused.dispatch.signature import signature, spec_of, with_specs
from pyfused.layout import is_dense
from pyfused.torch_internals import run_while_tracing
from pyfused.types import Gradients

PACKAGE = __name__.partition(".")[0]
# The namespace contains the version, because the compiler caches programs on disk by the names of
# their operators.
_VERSION = getattr(sys.modules.get(PACKAGE), "__version__", "")
NAMESPACE = "_".join([PACKAGE, *re.findall(r"\w+", _VERSION)])
TORCH_OPS = getattr(torch.ops, NAMESPACE)
# The types of the options that are no numbers; the others are bool.
_TYPES = {
    "reduction": "str",
    "remainder": "str",
    "ignore_index": "int",
    "memory_budget": "int?",
    "loss_dtype": "ScalarType?",
}
_registered: dict[str, _CustomOperators] = {}
_registering = threading.Lock()


def compute(name: str, function: Callable[..., Any], *values: Any) -> Any:  # noqa: ARG001
    """Computes a custom operator of this name; ``report`` replaces it to count calls."""
    return function(*values)


class CompiledOperator(Operator):
    """An operator that compiled programs call as a custom operator.

    Attributes:
        in_forward: Whether the custom operator also returns the gradients of the sum of its result.
        has_state: Whether the last result is the state of the rows, which backward takes.
    """

    in_forward: ClassVar[bool] = False
    has_state: ClassVar[bool] = False

    def compiled(self, tensors: Tensors, options: Options) -> Any:
        return self.custom_operator(tensors, options)

    def custom_operator(self, tensors: Tensors, options: Options, *needs: Sequence[bool]) -> Any:
        """Calls the custom operator with the tensors and options of a call.

        Args:
            needs: As in `_CustomOperators`.
        """
        self._register()
        pairs = zip(self.fields, options, strict=True)
        values = [value for name, value in pairs if name != "torch_options"]
        return getattr(TORCH_OPS, self.name)(*tensors, *values, *needs)

    @run_while_tracing
    def _register(self) -> None:
        """Registers the custom operators at their first use, as this takes milliseconds."""
        with _registering:
            if self.name not in _registered:
                _registered[self.name] = _CustomOperators(self)

    def fake(self, tensors: Tensors, options: Options) -> Tensor:  # noqa: ARG002
        """Returns an empty tensor like the result of the custom operator, by default a scalar."""
        empty: Tensor = tensors[0].new_empty(())
        return empty

    def fake_state(self, tensors: Tensors, options: Options) -> Tensor:
        """Returns an empty tensor like the state that follows the gradients."""
        raise NotImplementedError


class _CustomOperators:
    """The custom operators of an operator.

    They take the values of the schema: the tensors and the options of a call, with the tensors that
    may need gradients first. If an operator computes gradients, ``needs`` follows:
    whether each of these tensors needs one.
    """

    def __init__(self, op: CompiledOperator) -> None:
        self.op, self.name, schema = op, op.name, _schema(op)
        self.count = len(schema)
        self.differentiable = sum(operand.differentiated for operand in op.operands)
        self.library = torch.library.Library(NAMESPACE, "FRAGMENT")
        gradients, needs = ["Tensor"] * self.differentiable, f"bool[{self.differentiable}] needs"
        results = ["Tensor", *gradients * op.in_forward, *["Tensor"] * op.has_state]
        forward = [*schema, *[needs] * op.in_forward]
        self.define(self.name, forward, results, self.run, self.fake)
        schema = ["Tensor grad_output", *schema, *["Tensor state"] * op.has_state, needs]
        passes = self.run_backward, self.fake_backward
        self.define(f"{self.name}_backward", schema, gradients, *passes)
        torch.library.register_autograd(
            f"{NAMESPACE}::{self.name}", self.backward, setup_context=self.save, lib=self.library
        )

    def define(self, name: str, schema: list[str], results: list[str], run: Any, fake: Any) -> None:
        self.library.define(f"{name}({', '.join(schema)}) -> ({', '.join(results)})")
        for device in ("CPU", "CUDA"):
            self.library.impl(name, lambda *values: compute(name, run, *values), device)
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=self.library)

    # ---- the call and its plan -------------------------------------------------------------------

    def planned(
        self, values: Sequence[Any], needs: Sequence[bool]
    ) -> tuple[Plan, Tensors, Options]:
        """Returns the plan of a call, the tensors that its forward pass takes, and the options.

        The plan is kept with the plans of eager calls.

        Args:
            needs: Whether each of the first tensors needs a gradient.
        """
        op = self.op
        tensors, options = self.call_of(values)
        signed = signature(op, tensors, options)
        key = None  # if a mode is active, for example
        if not isinstance(signed, str):
            key, options = (*signed[0], "compiled", *needs), signed[1]
        plan: Plan | None = op.plans.get(key)
        if plan is None:
            specs, planned = [spec_of(x) for x in tensors], options
            if key is not None:
                specs, planned = with_specs(op, key)
            for i, need in enumerate(needs):
                if specs[i] is not None:
                    specs[i] = replace(specs[i], requires_grad=need)
            for i, operand in enumerate(op.operands):
                # Class weights may differ in dtype under autocast, which is disabled here.
                if operand.name == "weight" and specs[i] is not None:
                    specs[i] = replace(specs[i], dtype=specs[0].dtype)
            with torch.enable_grad():  # the compiler disables grad mode; `needs` replaces it
                plan = op.plan(specs, planned)  # type: ignore[assignment]
            if key is not None:
                dispatch.keep_plan(op, key, plan)
        assert plan is not None
        return plan, tensors if plan.arrange is None else plan.arrange(tensors, options), options

    def call_of(self, values: Sequence[Any]) -> tuple[Tensors, Options]:
        """Returns the tensors and the options of a call."""
        count = len(self.op.all_operands)
        return values[:count], self.op.options(*values[count : self.count])

    def gradients(
        self, values: Sequence[Any], needs: Sequence[bool], grad_output: Tensor, define: bool
    ) -> Gradients:
        """Returns the gradients, from the backward kernel or from torch's definition.

        Args:
            values: The values of the schema, followed by the state if the operator has one.
            define: Whether to compute gradients by torch's definition, which is differentiable.
        """
        plan, tensors, options = self.planned(values, needs)
        saved = (*tensors, values[self.count]) if self.op.has_state else tensors
        return (plan.define if define else plan.backward)(saved, options, grad_output)

    # ---- kernels, and the layouts of their results -----------------------------------------------

    def run(self, *values: Any) -> Any:
        op = self.op
        needs = values[-1] if op.in_forward else (False,) * self.differentiable
        plan, tensors, options = self.planned(values, needs)
        output, saved, gradients = plan.forward(tensors, options)
        if not (op.in_forward or op.has_state):
            return output if plan.finish is None else plan.finish(output, values)
        # The dtype of the finished result depends on autocast, so the caller finishes it.
        results = [output[0] if isinstance(output, tuple) else output]
        if op.in_forward:
            if any(needs) and not gradients:
                gradients = plan.backward(saved, options, results[0].new_ones(()))
            results += self.dense_gradients(gradients, values)
        if op.has_state:
            has_state = len(saved) > len(tensors)
            empty = op.fake_state(*self.call_of(values))
            results.append(saved[len(tensors)] if has_state else empty.zero_())
        return tuple(results)

    def run_backward(self, grad_output: Tensor, *values: Any) -> Any:
        gradients = self.gradients(values, values[-1], grad_output, define=False)
        return _packed(self.dense_gradients(gradients, values))

    def fake(self, *values: Any) -> Any:
        op, call = self.op, self.call_of(values)
        results = [op.fake(*call)]
        if op.in_forward:
            results += self.fake_gradients(values, values[-1])
        if op.has_state:
            results.append(op.fake_state(*call))
        return tuple(results) if len(results) > 1 else results[0]

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

    def save(self, ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        op, values, gradients = self.op, inputs[: self.count], ()
        if op.in_forward or op.has_state:
            ctx.mark_non_differentiable(*output[1:])
        if op.in_forward and any(inputs[-1]):
            gradients = output[1 : self.differentiable + 1]
        if op.has_state:
            values = *values, output[-1]
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
    """Returns an empty tensor with the memory order of a dense tensor, else a contiguous one."""
    preserve = torch.preserve_format if is_dense(tensor) else torch.contiguous_format
    return torch.empty_like(tensor, memory_format=preserve)


def _dense_like(gradient: Tensor, tensor: Tensor) -> Tensor:
    """Returns the gradient of a tensor with the strides of `_empty_dense`."""
    gradient = gradient.reshape(tensor.shape)
    if gradient.stride() == tensor.stride():
        return gradient
    empty = _empty_dense(tensor)
    return gradient if gradient.stride() == empty.stride() else empty.copy_(gradient)


def _schema(op: Operator) -> list[str]:
    tensors = [f"{'Tensor?' if x.optional else 'Tensor'} {x.name}" for x in op.operands]
    factors = [f"Tensor? {x.name}_tensor" for x in op.factors]
    numbers = [f"{'float?' if x.optional else 'float'} {x.name}" for x in op.numbers]
    choices = [f"{_TYPES.get(x.name, 'bool')} {x.name}" for x in op.choices if not x.of_torch]
    return [*tensors, *factors, *numbers, *choices]
