"""Losses of rows of logits, their operators, and the forward and backward passes of these.

An operator has a loss, and chooses a pass for each call. `KernelPass` computes a loss of logits in
one kernel. `heads.HeadBlocks` computes the loss and the gradient of a layer's logits in blocks of
rows with all classes. `StatePass` computes the state of each row, from which the loss follows, and
the gradients from the state and the gradients of its results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from pyfused import checks
from pyfused.backends import Backend, backend_of
from pyfused.backends.protocol import LossResult
from pyfused.dispatch.autograd import differentiate, in_autocast_dtype
from pyfused.dispatch.operator import (
    Forward,
    Needs,
    Operator,
    Options,
    Tensors,
    gradients_in_forward,
    needs_grad,
)
from pyfused.layout import accumulate_dtype, class_targets, loss_shape
from pyfused.ops import custom_operators, definitions
from pyfused.ops.chunk_sizes import HeadSizes, head_sizes
from pyfused.ops.head_loop import ALL_ROWS, HeadLoop, Rows, rows_that_count
from pyfused.ops.row_sources import HeadRows, LogitRows, class_range
from pyfused.types import Gradients, Outputs, outputs_of

# ---- losses --------------------------------------------------------------------------------------


class RowLoss:
    """A loss of rows.

    The last two tensors of a call of a loss with factors are the factor of each row and the divisor
    of a mean, or None.

    Attributes:
        keeps_logits: Whether `block` leaves the logits as they are if it computes no gradient.
    """

    keeps_logits: ClassVar[bool] = True

    def check_values(self, tensors: Tensors) -> None:
        """Raises for invalid values of the loss's own tensors."""

    def finish(
        self, output: Any, _inputs: Tensors, _options: Options, _leading: Sequence[int]
    ) -> Any:
        """Returns the result of a call, given the output of its pass and the inputs of the pass.

        The last argument has the leading dimensions of the call's first tensor.
        """
        return output

    def input_dtype(self, inputs: Tensors) -> torch.dtype:
        """Returns the dtype in which kernels take the logits or the layer's input."""
        return inputs[0].dtype  # type: ignore[no-any-return]

    def fake_shapes(self, inputs: Tensors, options: Options) -> tuple[Sequence[Any], Sequence[Any]]:
        """Returns the shapes of the result and the state that a custom operator returns."""
        return inputs[0].shape[:-1] if options.reduction == "none" else (), (0,)

    # ---- blocks of rows with all classes: see `heads.HeadBlocks` ---------------------------------

    def rows(self, tensors: Tensors, _: Options, backend: Backend) -> Rows:
        """Returns the rows to compute."""
        token_weight = tensors[-2]
        return ALL_ROWS if token_weight is None else rows_that_count(token_weight != 0, backend)

    def prepared(self, tensors: Tensors, _options: Options, _rows: int) -> Tensors:
        """Returns the tensors of the rows to compute in the form that blocks of rows take."""
        return tensors

    def divisor(self, tensors: Tensors, options: Options, all_count: bool = False) -> Any:
        """Returns the divisor of a mean, a number or a scalar tensor.

        Args:
            all_count: Whether all of these rows are known to count.
        """
        *_, token_weight, denominator = tensors
        if denominator is not None:
            return denominator
        if options.denominator is not None:
            return options.denominator
        weights = self.weights(tensors, options, all_count)
        if token_weight is not None:
            weights = token_weight if weights is None else weights * token_weight
        if weights is None:
            return tensors[0].shape[0]
        total = weights.sum(dtype=torch.float64)
        return total.where(total != 0, torch.nan)  # a mean of total weight 0 is NaN, as torch's

    def weights(self, _tensors: Tensors, _options: Options, _all_count: bool) -> Tensor | None:
        """Returns the weights of the rows in the default divisor, None for ones."""
        return None


# ---- operators -----------------------------------------------------------------------------------


@dataclass(eq=False, kw_only=True, repr=False)
class RowOperator(Operator):
    """An operator of rows of logits, which may be the output of a linear layer.

    Attributes:
        loss: The loss of the rows.
        choose_pass: Takes the operator, the inputs, the options and which inputs need a gradient;
            returns the pass that computes a call: an object with the methods `forward` and
            `backward` of operators.
        reference: Takes the inputs of a kernel, and the options. NaN in rows that do not count does
            not reach gradients.
        target: The index of the target, -1 if there is none.
        layer: The indices of the logits, or of the input, weight and bias of a layer.
        flattens: Whether kernels take rows with one leading dimension.
    """

    loss: Any
    choose_pass: Callable[..., Any]
    flattens: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.num_differentiable = sum(operand.differentiated for operand in self.operands)
        self.autocast_operands = [
            i for i, x in enumerate(self.operands) if x.name.endswith("input")
        ]
        self.target = self.names.index("target") if "target" in self.names else -1
        self.layer = slice(3 if self.is_linear else 1)
        self.row_operands = [i for i, x in enumerate(self.all_operands) if x.has_rows]
        self.finish = self.loss.finish

    check_choices = staticmethod(checks.row_choices)

    def check_values(self, tensors: Tensors, options: Options) -> None:
        if self.factors:
            checks.factors(*tensors[-2:])
        if self.target >= 0:
            total = class_range(tensors[self.layer]).total
            checks.class_indices(total, tensors[self.target], options.ignore_index)
        self.loss.check_values(tensors)

    # ---- calls -----------------------------------------------------------------------------------

    def prepare(self, tensors: Tensors, options: Options) -> Tensors:
        """Returns the tensors in the form that kernels take.

        Raises for invalid values, unless reading them synchronises.
        """
        inputs, at = list(tensors), self.target
        if self.is_linear:
            for i in self.autocast_operands:
                inputs[i] = in_autocast_dtype(inputs[i])
        if at >= 0 and not inputs[at].is_floating_point():
            if inputs[at].dtype is not torch.int64 or inputs[0].dim() == 1:
                inputs[at] = class_targets(inputs[at], self.target_shape(inputs[0]))
            if not is_dynamo_compiling():
                total = class_range(tensors[self.layer]).total
                backend = backend_of(tensors[0])
                backend.check_class_indices(inputs[at], total, options.ignore_index)
        if self.factors and not inputs[-1] is inputs[-2] is None:
            dtype = self.loss.input_dtype(inputs)
            inputs[-2], inputs[-1] = definitions.factors(inputs[-2], inputs[-1], dtype)
        if self.flattens and inputs[0].dim() != 2:
            inputs = self._flattened(inputs)
        return inputs

    def target_shape(self, input: Tensor) -> Sequence[int]:
        """Returns the shape of class indices, which is that of the losses."""
        return input.shape[:-1] if self.is_linear else loss_shape(input, "none")

    def _flattened(self, tensors: list[Any]) -> list[Any]:
        """Flattens the leading dimensions of an input (..., D) and of the tensors with its rows."""
        leading = tensors[0].shape[:-1]
        for i in self.row_operands:
            if (x := tensors[i]) is not None:
                tensors[i] = x.reshape(math.prod(leading), *x.shape[len(leading) :])
        return tensors

    def forward(self, inputs: Tensors, options: Options, needs: Needs) -> Forward:
        chosen = self.choose_pass(self, inputs, options, needs)
        return chosen.forward(inputs, options, needs)  # type: ignore[no-any-return]

    def backward(
        self, saved: Tensors, options: Options, needs: Needs, grad_output: Tensor
    ) -> Gradients:
        chosen = self.choose_pass(self, saved[: len(self.all_operands)], options, needs)
        return chosen.backward(saved, options, needs, grad_output)  # type: ignore[no-any-return]

    def backward_of_logits(
        self, saved: Tensors, options: Options, needs: Needs, grad_output: Tensor
    ) -> tuple[Any, ...]:
        """Returns a kept gradient of the logits of a layer, or what `backward` returns."""
        chosen = self.choose_pass(self, saved[: len(self.all_operands)], options, needs)
        kept = chosen.kept_gradient(saved, needs, grad_output)
        if kept is not None:
            return (kept,)
        return chosen.backward(saved, options, needs, grad_output)  # type: ignore[no-any-return]

    def wide_dtype(self, tensors: Tensors) -> torch.dtype:
        """Returns the dtype in which kernels accumulate."""
        return accumulate_dtype(self.loss.input_dtype(tensors))

    def head_sizes(self, tensors: Tensors, options: Options, dtype: torch.dtype) -> HeadSizes:
        """Returns the sizes of the blocks of a layer's logits.

        Args:
            dtype: The dtype in which kernels take the layer's input.
        """
        backend = backend_of(tensors[0])
        dtype = backend.product_dtype(dtype)
        converts = dtype is not tensors[0].dtype
        limits: Any = tensors[1].shape, dtype, backend, options.memory_budget
        return head_sizes(*limits, None, converts)

    # ---- definitions -----------------------------------------------------------------------------

    def reference_backward(
        self, saved: Tensors, options: Options, needs: Needs, grad_output: Tensor
    ) -> Gradients:
        """Computes the gradients of a call by torch's operators, in a wide dtype."""
        wide, count = self.wide_dtype(saved), self.num_differentiable
        differentiable, others = saved[:count], saved[count : len(self.all_operands)]

        def definition(*differentiable: Tensor | None) -> Tensor:
            result = self.defined(_cast((*differentiable, *others), wide), options)
            return result.to(grad_output.dtype).reshape(grad_output.shape)

        return differentiate(definition, differentiable, needs, grad_output)

    def defined(self, inputs: Tensors, options: Options) -> Tensor:
        """Returns the result without metrics, computed by torch's operators."""
        if getattr(options, "with_metrics", False):
            options = options._replace(with_metrics=False)
        result: Tensor = self.reference(*inputs, options)
        return result

    # ---- compiled programs -----------------------------------------------------------------------

    def compiled(self, tensors: Tensors, options: Options) -> Any:
        """Returns the result of a head in a compiled program, from its custom operator."""
        self.check_types(tensors, options)
        assert self.check_shapes is not None
        self.check_shapes(*tensors, options)
        inputs = list(self.prepare(tensors, options))
        for i, operand in enumerate(self.operands):  # custom operators check dtypes
            if operand.name.endswith(("_weight", "_bias")):
                inputs[i] = in_autocast_dtype(inputs[i])
        reduction = getattr(options, "reduction", "none")
        in_forward = gradients_in_forward(reduction, inputs[0].dtype)
        needs = [in_forward and need for need in needs_grad(inputs[: self.num_differentiable])]
        result, *_, state = custom_operators.call(self, inputs, options, needs)
        result = (result, state) if getattr(options, "with_metrics", False) else result
        return self.loss.finish(result, inputs, options, tensors[0].shape[:-1])

    def fake(self, inputs: Tensors, options: Options) -> tuple[Tensor, Tensor]:
        """Returns empty tensors like the result and the state that a custom operator returns."""
        result, state = self.loss.fake_shapes(inputs, options)
        input, dtype = inputs[0], self.wide_dtype(inputs)
        return input.new_empty(result, dtype=dtype), input.new_empty(state, dtype=torch.float64)


def _cast(tensors: Tensors, dtype: torch.dtype) -> list[Any]:
    """Casts the floating-point tensors of a call."""
    return [x.to(dtype) if x is not None and x.is_floating_point() else x for x in tensors]


# ---- passes --------------------------------------------------------------------------------------


@dataclass(eq=False)
class KernelPass:
    """Computes a loss of logits, and its gradients, by one kernel.

    Attributes:
        dtype: The dtype of the loss, None for the accumulation dtype.
    """

    kernel: Callable[..., LossResult]
    dtype: torch.dtype | None = None

    def forward(self, inputs: Tensors, options: Options, needs: Needs) -> Forward:
        in_forward = True in needs and gradients_in_forward(options.reduction, inputs[0].dtype)
        outputs = outputs_of(True, tuple(needs) if in_forward else (), False, self.dtype)
        loss, gradients = self.kernel(inputs, options, outputs)
        if self.dtype is not None and loss is not None and loss.dtype is not self.dtype:
            loss = loss.to(self.dtype)
        return loss, inputs, gradients if in_forward else ()

    def backward(
        self, saved: Tensors, options: Options, needs: Needs, grad_output: Tensor
    ) -> Gradients:
        return self.kernel(saved, options, Outputs(False, tuple(needs)), grad_output)[1]


@dataclass(eq=False)
class StatePass:
    """Computes the state of each row, and the loss from the states.

    Attributes:
        dtype: The dtype of the result, None for the accumulation dtype.
        results: As in `LogitRows.state`.
        loop: The loop over blocks of a layer's logits, None for logits.
        keeps_logits: Whether to keep logits that have been computed for the backward pass.
    """

    op: RowOperator
    dtype: torch.dtype | None = None
    results: int = 0
    loop: HeadLoop | None = None
    keeps_logits: bool = False

    def forward(self, inputs: Tensors, options: Options, needs: Needs) -> Forward:
        loss, keeps = self.op.loss, self.keeps_logits and True in needs
        source = self.source(inputs, options, all_rows=options.with_metrics)
        state, result, logits = source.state(loss.fields(options), self.results, keeps)
        if result is None:
            # Users may change the result in place, so it does not share the state's memory.
            result = loss.result_from(state, inputs, options, source.classes.total)
            result = result.to(self.dtype or self.op.wide_dtype(inputs), copy=True)
        with_state = options.with_metrics or getattr(options, "with_prediction", False)
        return (result, state) if with_state else result, (*inputs, state, logits), ()

    def backward(
        self, saved: Tensors, options: Options, needs: Needs, grad_output: Tensor
    ) -> Gradients:
        count = len(self.op.all_operands)
        inputs, (state, logits) = saved[:count], (*saved[count:], None)[:2]
        source = self.source(inputs, options)
        call = inputs, options, source.classes.total, grad_output
        grad_results = self.op.loss.grad_results(state, *call)
        gradients = source.gradients(state, grad_results, logits)
        return *gradients, *[None] * (len(needs) - len(gradients))

    def kept_gradient(self, *_: Any) -> None:
        """Returns None, as this pass keeps no gradient of the logits."""

    def source(self, inputs: Tensors, options: Options, all_rows: bool = False) -> Any:
        """Returns the source of the rows of a call's logits, or of its layer's.

        Args:
            all_rows: Whether to include rows of weight 0.
        """
        layer = inputs[self.op.layer]
        target, weight, row_options = self.op.loss.inputs(inputs, options, all_rows)
        rows = target, weight, row_options, class_range(layer)
        if self.loop is None:
            return LogitRows(layer[0], *rows)
        return HeadRows(self.loop, layer, *rows)
