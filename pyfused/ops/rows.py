"""Operators of rows of logits, and their forward and backward passes.

If a block of logits has all classes of its rows, a kernel computes the loss and the gradient of the
block in one pass. Otherwise a source of ``row_sources.py`` computes the state of each row, the loss
follows from the state, and the source computes the gradients from the state and the gradients of
its results.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from pyfused import checks
from pyfused.backends import backend_of
from pyfused.backends.protocol import LossResult
from pyfused.dispatch.autograd import compute, differentiate, in_autocast_dtype, without_autocast
from pyfused.dispatch.operator import (
    FACTORS,
    Forward,
    Needs,
    Operand,
    Operator,
    Options,
    Tensors,
    gradients_in_forward,
    needs_grad,
)
from pyfused.layout import accumulate_dtype
from pyfused.ops import custom_operators, definitions
from pyfused.ops.chunk_sizes import HeadSizes, head_sizes
from pyfused.ops.head_loop import ALL_ROWS, HeadLoop, Rows, rows_that_count
from pyfused.ops.row_sources import HeadRows, LogitRows, class_range
from pyfused.types import Gradients, outputs_of

# ---- losses --------------------------------------------------------------------------------------


class RowLoss:
    """A loss of rows with factors.

    The last two tensors of a call are the factor of each row and the divisor of a mean, or None.

    Attributes:
        keeps_logits: Whether `block` leaves the logits as they are if it computes no gradient.
    """

    keeps_logits: ClassVar[bool] = True

    def rows(self, tensors: Tensors, _: Options) -> Rows:
        """Returns the rows to compute."""
        token_weight = tensors[-2]
        if token_weight is None:
            return ALL_ROWS
        return rows_that_count(token_weight != 0, backend_of(token_weight))

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

    The forward pass computes the gradients of a reduced loss if it has all classes of a row. If a
    layer has fewer rows than features, it keeps the gradient of the logits, which is smaller than
    that of the weight. Otherwise the backward pass recomputes the logits. It also does so for
    float16, because gradients would underflow without grad_output.

    Attributes:
        loss: Computes the result and its gradients, from states of rows, as
            `cross_entropy.CrossEntropyLoss` does, or in blocks of rows with all classes.
        reference: Computes the result by torch's operators, from arranged tensors. NaN in rows that
            do not count does not reach gradients. By default ``torch``.
        student: The number of differentiated tensors, which come first.
        target: The index of the target, -1 if there is none.
        layer: The indices of the logits, or of the input, weight and bias of a layer.
        flattens: Whether kernels take rows with one leading dimension.
        tiles: Whether states of rows are computed only if a block cannot have all classes.
    """

    loss: Any = None
    reference: Callable[..., Any] | None = None
    factors: ClassVar[tuple[Operand, ...]] = FACTORS
    flattens: ClassVar[bool] = False
    tiles: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.reference = self.reference or self.torch
        self.student = sum(operand.differentiated for operand in self.operands)
        self.inputs = [i for i, x in enumerate(self.operands) if x.name.endswith("input")]
        self.target = self.names.index("target") if "target" in self.names else -1
        self.layer = slice(3 if self.is_linear else 1)

    def check_values(self, tensors: Tensors, options: Options) -> None:
        if self.factors:
            checks.factors(*tensors[-2:])
        if self.target >= 0:
            total = class_range(tensors[self.layer]).total
            checks.class_indices(total, tensors[self.target], options.ignore_index)

    check_choices = staticmethod(checks.row_choices)

    # ---- calls -----------------------------------------------------------------------------------

    def fused(self, tensors: Tensors, options: Options) -> Any:
        inputs, device = self.arranged(tensors, options), tensors[0].device.type
        if self.is_linear and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                result = compute(self, inputs, options, self.student)
        else:
            result = compute(self, inputs, options, self.student)
        return self.finished(result, tensors, options)

    def arranged(self, tensors: Tensors, options: Options) -> Tensors:
        """Returns the tensors in the form that kernels take.

        Raises for invalid values, unless reading them synchronises.
        """
        arranged, at = list(tensors), self.target
        if self.is_linear:
            for i in self.inputs:
                arranged[i] = in_autocast_dtype(arranged[i])
        if at >= 0 and not arranged[at].is_floating_point():
            if arranged[at].dtype is not torch.int64:
                arranged[at] = arranged[at].to(torch.int64)
            if not is_dynamo_compiling():
                total = class_range(tensors[self.layer]).total
                backend = backend_of(tensors[0])
                backend.check_class_indices(arranged[at], total, options.ignore_index)
        if self.factors and not arranged[-1] is arranged[-2] is None:
            dtype = self.input_dtype(arranged)
            arranged[-2], arranged[-1] = definitions.factors(arranged[-2], arranged[-1], dtype)
        if self.flattens and arranged[0].dim() != 2:
            arranged = self.flattened(arranged)
        return arranged

    def flattened(self, tensors: list[Any]) -> list[Any]:
        """Flattens the leading dimensions of an input (..., D) and of the tensors with its rows."""
        leading = tensors[0].shape[:-1]
        pairs = zip(self.all_operands, tensors, strict=True)
        return [
            x.reshape(math.prod(leading), *x.shape[len(leading) :])
            if operand.has_rows and x is not None
            else x
            for operand, x in pairs
        ]

    def finished(self, result: Any, *_: Any) -> Any:
        """Returns the result of a call, from the output for its arranged tensors."""
        return result

    def fake(self, tensors: Tensors, options: Options) -> tuple[Tensor, Tensor]:
        """Returns empty tensors like the result and the state that a custom operator returns."""
        shape = tensors[0].shape[:-1] if options.reduction == "none" else ()
        dtype = self.wide_dtype(tensors)
        return tensors[0].new_empty(shape, dtype=dtype), tensors[0].new_empty(0)

    def input_dtype(self, tensors: Tensors) -> torch.dtype:
        """Returns the dtype in which kernels take the input, given arranged tensors."""
        return tensors[0].dtype  # type: ignore[no-any-return]

    def wide_dtype(self, tensors: Tensors) -> torch.dtype:
        """Returns the dtype in which kernels accumulate."""
        return accumulate_dtype(self.input_dtype(tensors))

    def head_sizes(self, tensors: Tensors, options: Options) -> HeadSizes:
        """Returns the sizes of the blocks of a layer's logits."""
        backend = backend_of(tensors[0])
        dtype = backend.product_dtype(self.input_dtype(tensors))
        converts = dtype is not tensors[0].dtype
        limits: Any = tensors[1].shape, dtype, backend, options.memory_budget
        return head_sizes(*limits, None, converts)

    # ---- passes --------------------------------------------------------------------------

    def source(
        self, tensors: Tensors, options: Options, needs: Needs, all_rows: bool = False
    ) -> Any:
        """Returns the source of the rows of a call's logits, or of its layer's.

        Args:
            tensors: The arranged tensors of the call, or the saved ones, which begin with them.
            all_rows: Whether to include rows of weight 0.
        """
        tensors, layer = tensors[: len(self.all_operands)], tensors[self.layer]
        target, weight, row_options = self.loss.inputs(tensors, options, all_rows)
        inputs = target, weight, row_options, class_range(layer)
        if self.is_linear:
            sizes, backend = self.head_sizes(tensors, options), backend_of(tensors[0])
            size = sizes.tile if self.tiles else sizes.state_blocks
            return HeadRows(HeadLoop(backend, sizes.dtype, size, needs), layer, *inputs)
        return LogitRows(layer[0], *inputs)

    def blocks(self, _tensors: Tensors, _options: Options, _needs: Needs) -> Any:
        """Returns the `heads.HeadBlocks` of a layer's logits, None if they lack classes."""

    def forward(self, tensors: Tensors, options: Options, needs: Needs) -> Forward:
        if (blocks := self.blocks(tensors, options, needs)) is None:
            return self.state_forward(tensors, options, needs, keeps_logits=False)
        keeps = self.loss.keeps_logits and True in needs
        needed: Needs = ()
        if True in needs and gradients_in_forward(options.reduction, self.input_dtype(tensors)):
            needed, keeps = needs, needs[1] and True not in needs[3:]
        (loss, gradients, state, prediction), kept = blocks.compute(needed, keeps=keeps)
        saved = tensors if state is kept is None else (*tensors, state, kept)
        result = loss if state is prediction is None else (loss, state, prediction)
        return result, saved, gradients

    def state_forward(
        self,
        tensors: Tensors,
        options: Options,
        needs: Needs,
        *,
        dtype: torch.dtype | None = None,
        results: int = 0,
        keeps_logits: bool = True,
    ) -> Forward:
        """Computes the forward pass of a loss from the state of each row.

        Args:
            dtype: The dtype of the result, None for the accumulation dtype.
            results: As in `LogitRows.state`.
            keeps_logits: Whether to keep logits that have been computed for the backward pass.
        """
        loss, keeps = self.loss, keeps_logits and True in needs
        source = self.source(tensors, options, needs, all_rows=options.with_metrics)
        state, result, logits = source.state(loss.fields(options), results, keeps)
        if result is None:
            # Users may change the result in place, so it does not share the state's memory.
            result = loss.result_from(state, tensors, options, source.classes.total)
            result = result.to(dtype or self.wide_dtype(tensors), copy=True)
        saved = *tensors, state, logits
        with_state = options.with_metrics or getattr(options, "with_prediction", False)
        return (result, state) if with_state else result, saved, ()

    def backward(
        self, saved: Tensors, options: Options, needs: Needs, grad_output: Tensor
    ) -> Gradients:
        count = len(self.all_operands)
        tensors, (state, kept) = saved[:count], (*saved[count:], None, None)[:2]
        if blocks := self.blocks(tensors, options, needs):
            in_forward = gradients_in_forward(options.reduction, self.input_dtype(tensors))
            if in_forward and kept is not None:
                return blocks.gradients(needs, kept, grad_output)  # type: ignore[no-any-return]
            return blocks.compute(needs, grad_output, kept)[0].gradients  # type: ignore[no-any-return]
        source = self.source(saved, options, needs)
        call = tensors, options, source.classes.total, grad_output
        gradients = source.gradients(state, self.loss.grad_results(state, *call), kept)
        return *gradients, *[None] * (len(needs) - len(gradients))

    # ---- definitions -----------------------------------------------------------------------------

    def define(
        self, saved: Tensors, options: Options, needs: Needs, grad_output: Tensor
    ) -> Gradients:
        """Computes the gradients of a call by torch's operators, in a wide dtype."""
        wide = self.wide_dtype(saved)
        student, others = saved[: self.student], saved[self.student : len(self.all_operands)]

        def definition(*student: Tensor | None) -> Tensor:
            tensors = _cast((*student, *others), wide)
            result = self.defined(tensors, options)
            return result.to(grad_output.dtype).reshape(grad_output.shape)

        return differentiate(definition, student, needs, grad_output)

    def defined(self, tensors: Tensors, options: Options) -> Tensor:
        """Returns the result without metrics, computed by torch's operators."""
        assert self.reference is not None
        if getattr(options, "with_metrics", False):
            options = options._replace(with_metrics=False)
        result: Tensor = self.reference(*tensors, options)
        return result

    # ---- compiled programs -----------------------------------------------------------------------

    def compiled(self, tensors: Tensors, options: Options) -> Any:
        """Returns the result of a head in a compiled program, from its custom operator."""
        self.check_types(tensors, options)
        assert self.check_shapes is not None
        self.check_shapes(*tensors, options)
        arranged = list(self.arranged(tensors, options))
        for i, operand in enumerate(self.operands):  # custom operators check dtypes
            if operand.name.endswith(("_weight", "_bias")):
                arranged[i] = in_autocast_dtype(arranged[i])
        reduction = getattr(options, "reduction", "none")
        in_forward = gradients_in_forward(reduction, arranged[0].dtype)
        needs = [in_forward and need for need in needs_grad(arranged[: self.student])]
        with without_autocast(arranged[0].device.type):
            result, *_, state = custom_operators.call(self, arranged, options, needs)
        result = (result, state) if getattr(options, "with_metrics", False) else result
        return self.finished(result, tensors, options)


def _cast(tensors: Tensors, dtype: torch.dtype) -> list[Any]:
    """Casts the floating-point tensors of a call."""
    return [x.to(dtype) if x is not None and x.is_floating_point() else x for x in tensors]


# ---- passes --------------------------------------------------------------------------------------


def loss_forward(
    kernel: Callable[..., LossResult],
    tensors: Tensors,
    options: Options,
    needs: Needs,
    dtype: torch.dtype | None = None,
) -> Forward:
    """Returns the forward pass of a kernel that computes a loss and its gradients.

    Args:
        dtype: The dtype of the loss, None for the kernels' accumulation dtype.
    """
    in_forward = True in needs and gradients_in_forward(options.reduction, tensors[0].dtype)
    outputs = outputs_of(True, tuple(needs) if in_forward else (), False, dtype)
    loss, gradients = kernel(tensors, options, outputs)
    if dtype is not None and loss is not None and loss.dtype is not dtype:
        loss = loss.to(dtype)
    return loss, tensors, gradients if in_forward else ()
