"""The custom operators of heads, which torch.compile puts into its graphs.

Each head has two: ``name`` computes the result and ``name_backward`` the gradients, because a
custom operator must not return what it saved. Both call the methods of the operator. Their
arguments are the tensors and the options of a call, with the tensors that may need gradients first.
They are registered when pyfused is imported, as saved programs call them by name.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyfused.dispatch import report
from pyfused.dispatch.operator import Operator, Options, Tensors
from pyfused.layout import is_dense
from pyfused.types import Gradients

PACKAGE = __name__.partition(".")[0]
# The namespace contains the version, because the compiler caches programs on disk by the names of
# their operators.
_VERSION = getattr(sys.modules.get(PACKAGE), "__version__", "")
NAMESPACE = "_".join([PACKAGE, *re.findall(r"\w+", _VERSION)])
TORCH_OPS = getattr(torch.ops, NAMESPACE)
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
# The types of the options that are not numbers; the others are bool. The compiler specialises a
# program to the value of an int, but not of a SymInt.
_TYPES = {
    "reduction": "str",
    "remainder": "str",
    "ignore_index": "SymInt",
    "memory_budget": "SymInt?",
    "loss_dtype": "ScalarType?",
}


def compute(name: str, function: Callable[..., Any], *values: Any) -> Any:
    """Computes a custom operator of this name."""
    if not name.endswith("_backward"):
        report.count_compiled(name)
    return report.timed(function, *values)


def call(op: Operator, tensors: Tensors, options: Options, needs: Sequence[bool]) -> Any:
    """Calls the custom operator of a head.

    Args:
        needs: Whether to compute the gradient of each of the first tensors in the forward pass.

    Returns:
        The result; the gradients of its sum, empty tensors for those that are not computed; and the
        state of the rows, an empty tensor if there is none.
    """
    pairs = zip(op.fields, options, strict=True)
    values = [value for name, value in pairs if name != "torch_options"]
    return getattr(TORCH_OPS, op.name)(*tensors, *values, needs)


class CustomOperator:
    """Registers the two custom operators of a head.

    They take the values of the schema, and ``needs``: whether each of the tensors that may need a
    gradient needs one.
    """

    def __init__(self, op: Any) -> None:
        self.op, self.name, schema = op, op.name, _schema(op)
        self.count, self.num_differentiable = len(schema), op.num_differentiable
        gradients, needs = (
            ["Tensor"] * op.num_differentiable,
            f"bool[{self.num_differentiable}] needs",
        )
        self.define(
            op.name, [*schema, needs], ["Tensor", *gradients, "Tensor"], self.run, self.fake
        )
        schema = ["Tensor grad_output", *schema, "Tensor state", needs]
        passes = self.run_backward, self.fake_backward
        self.define(f"{op.name}_backward", schema, gradients, *passes)
        torch.library.register_autograd(
            f"{NAMESPACE}::{op.name}", self.backward, setup_context=self.save, lib=_LIBRARY
        )

    def define(self, name: str, schema: list[str], results: list[str], run: Any, fake: Any) -> None:
        _LIBRARY.define(f"{name}({', '.join(schema)}) -> ({', '.join(results)})")
        for device in ("CPU", "CUDA"):
            _LIBRARY.impl(name, lambda *values: compute(name, run, *values), device)
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)

    # ---- the call --------------------------------------------------------------------------------

    def call_of(self, values: Sequence[Any]) -> tuple[Tensors, Options]:
        """Returns the tensors and the options of a call."""
        count = len(self.op.all_operands)
        return values[:count], self.op.options(*values[count : self.count])

    def prepared(self, values: Sequence[Any]) -> tuple[Tensors, Options]:
        """Returns the tensors that the operator's kernels take, and the options."""
        tensors, options = self.call_of(values)
        return self.op.prepare(tensors, options), options

    def gradients(
        self, values: Sequence[Any], needs: Sequence[bool], grad_output: Tensor, define: bool
    ) -> Gradients:
        """Returns the gradients, from the backward kernel or from torch's definition.

        Args:
            values: The values of the schema, followed by the state.
            define: Whether to compute gradients by torch's definition, which is differentiable.
        """
        (tensors, options), state = self.prepared(values), values[self.count]
        saved = (*tensors, state) if state.numel() else tensors
        if define:
            return self.op.reference_backward(saved, options, needs, grad_output)  # type: ignore[no-any-return]
        if not tensors[0].numel():  # a number of rows that was unknown while tracing
            return _zeros(values, needs)
        return self.op.backward(saved, options, needs, grad_output)  # type: ignore[no-any-return]

    # ---- kernels, and the layouts of their results -----------------------------------------------

    def run(self, *values: Any) -> Any:
        op, needs = self.op, values[-1]
        tensors, options = self.prepared(values)
        saved = tensors
        if tensors[0].numel():
            result, saved, gradients = op.forward(tensors, options, needs)
            result = result[0] if isinstance(result, tuple) else result
            if any(needs) and not gradients:
                gradients = op.backward(saved, options, needs, result.new_ones(()))
        else:
            result = op.defined(tensors, options).to(op.fake(tensors, options)[0].dtype)
            gradients = _zeros(values, needs)
        state, *_ = *saved[len(tensors) :], None
        if state is None:
            state = op.fake(*self.call_of(values))[1].zero_()
        # The dtype of the finished result depends on autocast, so the caller finishes it.
        return result, *self.dense_gradients(gradients, values), state

    def run_backward(self, grad_output: Tensor, *values: Any) -> Any:
        gradients = self.gradients(values, values[-1], grad_output, define=False)
        return tuple(self.dense_gradients(gradients, values))

    def fake(self, *values: Any) -> Any:
        tensors, options = self.call_of(values)
        result, state = self.op.fake(tensors, options)
        return result, *self.fake_gradients(values, values[-1]), state

    def fake_backward(self, _grad_output: Tensor, *values: Any) -> Any:
        return tuple(self.fake_gradients(values, values[-1]))

    def fake_gradients(self, values: Sequence[Any], needs: Sequence[bool]) -> list[Tensor]:
        return [
            values[0].new_empty(0) if tensor is None or not need else _empty_dense(tensor)
            for tensor, need in zip(values, needs, strict=False)
        ]

    def dense_gradients(self, gradients: Gradients, values: Sequence[Any]) -> list[Tensor]:
        """Returns gradients with the layouts of `fake_gradients`, and empty tensors for None."""
        gradients = gradients or (None,) * self.num_differentiable
        return [
            values[0].new_empty(0) if gradient is None else _dense_like(gradient, tensor)
            for gradient, tensor in zip(gradients, values[: self.num_differentiable], strict=False)
        ]

    # ---- autograd --------------------------------------------------------------------------------

    def save(self, ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        _, *gradients, state = output
        ctx.mark_non_differentiable(*output[1:])
        values = *inputs[:-1], state
        tensors = [value if isinstance(value, Tensor) else None for value in values]
        ctx.save_for_backward(*tensors, *(gradients if any(inputs[-1]) else ()))
        ctx.values = [None if isinstance(value, Tensor) else value for value in values]

    def backward(self, ctx: Any, grad_output: Tensor, *_: Tensor) -> Gradients:
        saved, count = ctx.saved_tensors, len(ctx.values)
        pairs = zip(saved[:count], ctx.values, strict=True)
        values = [value if tensor is None else tensor for tensor, value in pairs]
        needs = ctx.needs_input_grad[: self.num_differentiable]
        gradients: Any
        if torch.is_grad_enabled():
            gradients = self.gradients(values, needs, grad_output, define=True)
            pairs = zip(gradients, values, strict=False)
            gradients = [x if x is None else x.reshape(like.shape) for x, like in pairs]
        elif saved[count:]:
            # Rows that do not count have gradients of 0, also if grad_output is infinite or NaN.
            gradients = [torch.where(x == 0, x, x * grad_output) for x in saved[count:]]
        else:
            gradients = getattr(TORCH_OPS, f"{self.name}_backward")(grad_output, *values, needs)
        pairs = zip(gradients, needs, strict=False)
        gradients = [gradient if need else None for gradient, need in pairs]
        return *gradients, *[None] * (count - len(gradients))


def _zeros(values: Sequence[Any], needs: Sequence[bool]) -> Gradients:
    """Returns gradients of 0 for the first values."""
    pairs = zip(values, needs, strict=False)
    return tuple([torch.zeros_like(x) if need else None for x, need in pairs])


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
    types = ["Tensor?" if x.optional else "Tensor" for x in op.operands]
    tensors = [f"{kind} {x.name}" for kind, x in zip(types, op.operands, strict=True)]
    factors = [f"Tensor? {x.name}_tensor" for x in op.factors]
    numbers = [f"{'float?' if x.optional else 'float'} {x.name}" for x in op.numbers]
    choices = [f"{_TYPES.get(x.name, 'bool')} {x.name}" for x in op.choices if not x.of_torch]
    return [*tensors, *factors, *numbers, *choices]
