"""Row losses: row sources, forward and backward passes.

An operator has a source of rows and a loss. If a block of logits has all classes of its rows, a
kernel computes the loss and the gradient of the block in one pass. Otherwise the source computes
the state of each row, the loss follows from the state, and the source computes the gradients from
the state and the gradients of its results. A state is a float64 tensor (fields, rows); ``types.py``
names the fields. The sources are `LogitRows`, ``heads.HeadRows`` and ``shards.ShardedRows``.
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
from pyfused.backends import Backend, backend_of
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
    grad_enabled,
    gradients_in_forward,
    needs_grad,
)
from pyfused.layout import accumulate_dtype, feature_rows
from pyfused.ops import custom_operators, definitions
from pyfused.ops.chunk_sizes import HeadSizes, head_sizes
from pyfused.ops.collectives import LocalShard
from pyfused.ops.head_loop import ALL_ROWS, Rows, rows_that_count
from pyfused.ops.shards import class_range, local_shard, sharded_results
from pyfused.types import (
    SMOOTH,
    STATE_FIELDS,
    ClassRange,
    Gradients,
    RowOptions,
    VocabShard,
    outputs_of,
)

# ---- sources -------------------------------------------------------------------------------------


# The state, of shape (fields, *target.shape); its first fields in the accumulation dtype, or None;
# and logits that the backward pass may overwrite, or None.
RowState = tuple[Tensor, Tensor | None, Tensor | None]


@dataclass(eq=False)
class LogitRows:
    """A source of rows: logits (C), (N, C) or (N, C, d1, ..., dk).

    Other sources have the same methods.

    Attributes:
        classes: The range of classes that the logits belong to.
    """

    backend: Backend
    classes: ClassRange

    def state(
        self,
        tensors: Tensors,
        options: RowOptions,
        fields: int = STATE_FIELDS,
        results: int = 0,
        keeps_logits: bool = False,  # noqa: ARG002
    ) -> RowState:
        """Computes the state of each row.

        Args:
            tensors: The logits, or the input, weight and bias of a layer; the target, int64 or
                None; and the weights of all classes in the accumulation dtype, or None.
            fields: The number of fields of a state.
            results: How many of the first fields are also returned in the accumulation dtype, if
                the kernel computes the logits of all classes at once. One has the target's shape.
            keeps_logits: Whether logits that have been computed may be returned.
        """
        logits, target, weight = tensors
        rows = logits if logits.dim() == 2 and logits.stride(1) == 1 else as_rows(logits)
        out = None
        shape = rows.shape[:1] if target is None else target.shape
        state = rows.new_empty((fields, *shape), dtype=torch.float64)
        if results:
            shape = (results, *shape) if results > 1 else shape
            dtype = torch.float64 if rows.dtype is torch.float64 else torch.float32
            out = rows.new_empty(shape, dtype=dtype)
        target = None if target is None else target.contiguous()
        self.backend.row_state(options, rows, target, weight, state, self.classes, out)
        return state, out, None

    def gradients(
        self,
        tensors: Tensors,
        options: RowOptions,
        state: Tensor,
        grad_results: Tensor,
        logits: Tensor | None = None,
        filter_below: Tensor | None = None,  # noqa: ARG002
    ) -> Gradients:
        """Computes the gradients of the logits, or of the input, weight and bias of a layer.

        Args:
            tensors, options: As in `state`.
            state: The state over all classes.
            grad_results: The gradients of the first 1, 3 or 4 of the log-probability, the entropy,
                the log-sum-exp and the weighted sum of logits, of shape (results, *target.shape).
            logits: The logits that `state` returned; they are overwritten.
            filter_below: As in `HeadLoop.run`.
        """
        input, target, weight = tensors
        rows = input if input.dim() == 2 and input.stride(1) == 1 else as_rows(input)
        out = logits
        # Hooks for saved tensors may have changed their layouts.
        target = None if target is None else target.contiguous()
        weight, state = None if weight is None else weight.contiguous(), state.contiguous()
        if rows is not input:
            leading = grad_results.shape[: grad_results.dim() + 1 - state.dim()]
            grad_results = grad_results.reshape(*leading, -1)
            out = rows if rows.data_ptr() != input.data_ptr() else None
        of_rows = options, rows, target, weight, state, self.classes, grad_results, out
        gradient = self.backend.row_gradients(*of_rows)
        if rows is not input:
            dim = min(input.dim() - 1, 1)
            gradient = gradient.view(input.movedim(dim, -1).shape).movedim(-1, dim)
        return (gradient,)


def as_rows(logits: Tensor) -> Tensor:
    """Returns logits (C), (N, C) or (N, C, d1, ..., dk) as rows of contiguous classes."""
    return feature_rows(logits if logits.dim() < 3 else logits.movedim(1, -1))


# ---- losses --------------------------------------------------------------------------------------


class RowLoss:
    """A loss of rows with factors.

    The last two tensors of a call are the factor of each row and the divisor of a mean, or None.
    """

    def rows(self, tensors: Tensors, options: Options, backend: Backend) -> Rows:  # noqa: ARG002
        """Returns the rows to compute."""
        token_weight = tensors[-2]
        return ALL_ROWS if token_weight is None else rows_that_count(token_weight != 0, backend)

    def prepared(self, tensors: Tensors, backend: Backend) -> Tensors:  # noqa: ARG002
        """Returns the tensors of the rows to compute in the form that blocks take."""
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
        return tensors[0].shape[0] if weights is None else weights.sum(dtype=torch.float64)

    def weights(self, tensors: Tensors, options: Options, all_count: bool) -> Tensor | None:  # noqa: ARG002
        """Returns the weights of the rows in the default divisor, None for ones."""
        return None

    def filter_below(self, options: Options, grad_output: Tensor) -> Tensor | None:
        """Returns the argument ``filter_below`` of `HeadLoop.run`.

        Args:
            grad_output: The gradient of the sum of the losses, or of the loss of each row.
        """
        return options.filter_eps * grad_output.abs() if options.filter_eps else None


# ---- operators -----------------------------------------------------------------------------------


@dataclass(eq=False, kw_only=True, repr=False)
class RowOperator(Operator):
    """An operator of rows of logits, which may be the output of a linear layer.

    The forward pass computes the gradients of a reduced loss if it has all classes of a row.
    Otherwise the backward pass recomputes the logits. It also does so for float16, because
    gradients would underflow without grad_output.

    Attributes:
        check_arguments: Raises for invalid shapes, dtypes and options.
        loss: Computes the result and its gradients.
        reference: Computes the result by torch's operators, from arranged tensors. NaN in rows that
            do not count does not reach gradients. By default ``torch``.
        student: The number of differentiated tensors, which come first.
        target: The index of the target, -1 if there is none.
        flattens: Whether kernels take rows with one leading dimension.
    """

    check_arguments: Callable[..., None]
    loss: Any = None
    reference: Callable[..., Any] | None = None
    factors: ClassVar[tuple[Operand, ...]] = FACTORS
    flattens: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check = self.check_arguments
        self.reference = self.reference or self.torch
        self.student = sum(operand.differentiated for operand in self.operands)
        self.inputs = [i for i, x in enumerate(self.operands) if x.name.endswith("input")]
        self.target = self.names.index("target") if "target" in self.names else -1

    def layer(self, tensors: Tensors) -> Tensors:
        """Returns the logits, or the input, the weight and the bias of a layer."""
        return tensors[:3] if self.is_linear else tensors[:1]

    def check_values(self, tensors: Tensors, options: Options) -> None:
        if self.factors:
            checks.factors(*tensors[-2:])
        if self.target >= 0:
            total = class_range(self.layer(tensors)).total
            checks.class_indices(total, tensors[self.target], options.ignore_index)

    check_choices = staticmethod(checks.row_choices)

    # ---- calls -----------------------------------------------------------------------------------

    def fused(self, tensors: Tensors, options: Options, shard: LocalShard | None = None) -> Any:
        inputs, device = self.arranged(tensors, options, shard), tensors[0].device.type
        if self.is_linear and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                result = compute(self, inputs, options, self.student, shard)
        else:
            result = compute(self, inputs, options, self.student, shard)
        return self.finished(result, tensors, options, shard)

    def arranged(
        self, tensors: Tensors, options: Options, shard: LocalShard | None = None
    ) -> Tensors:
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
                total = class_range(self.layer(tensors), shard).total
                backend = backend_of(tensors[0])
                backend.check_class_indices(arranged[at], total, options.ignore_index)
        if self.factors and not arranged[-1] is arranged[-2] is None:
            dtype = self.input_dtype(arranged)
            arranged[-2], arranged[-1] = definitions.factors(arranged[-2], arranged[-1], dtype)
        if self.flattens and arranged[0].dim() != 2:
            arranged = self.flattened(arranged)
        return arranged

    def overwritten(self, saved: Tensors, options: Options, shard: Any) -> int | None:  # noqa: ARG002
        index = len(self.all_operands) + 1  # of the logits that `state_forward` has kept
        return index if len(saved) > index else None

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

    def finished(
        self,
        result: Any,
        tensors: Tensors,  # noqa: ARG002
        options: Options,  # noqa: ARG002
        shard: LocalShard | None = None,  # noqa: ARG002
    ) -> Any:
        """Returns the result of a call, from the output for its arranged tensors."""
        return result

    def in_forward(self, tensors: Tensors, options: Options, needs: Needs) -> bool:
        """Returns whether the forward pass computes the gradients, if it has all classes."""
        reduction = getattr(options, "reduction", "none")
        return True in needs and gradients_in_forward(reduction, self.input_dtype(tensors))

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

    # ---- definitions -----------------------------------------------------------------------------

    def define(
        self,
        saved: Tensors,
        options: Options,
        needs: Needs,
        grad_output: Tensor,
        shard: LocalShard | None = None,
    ) -> Gradients:
        """Computes the gradients of a call by torch's operators, in a wide dtype."""
        wide = self.wide_dtype(saved) if shard is None else torch.float64
        student, others = saved[: self.student], saved[self.student : len(self.all_operands)]

        def definition(*student: Tensor | None) -> Tensor:
            tensors = _cast((*student, *others), wide)
            if shard is None:
                result = self.defined(tensors, options)
            else:
                result = self.defined_on_shard(tensors, options, shard)
            return result.to(grad_output.dtype).reshape(grad_output.shape)

        return differentiate(definition, student, needs, grad_output)

    def defined(self, tensors: Tensors, options: Options) -> Tensor:
        """Returns the result without metrics, computed by torch's operators."""
        assert self.reference is not None
        if getattr(options, "with_metrics", False):
            options = options._replace(with_metrics=False)
        if getattr(options, "inplace", False):
            options = options._replace(inplace=False)
        result: Tensor = self.reference(*tensors, options)
        return result

    # ---- compiled programs -----------------------------------------------------------------------

    def compiled(self, tensors: Tensors, options: Options) -> Any:
        """Returns the result of a head in a compiled program, from its custom operator."""
        self.check_options(options)
        self.check_arguments(*tensors, options)
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

    # ---- shards ----------------------------------------------------------------------------------

    def checked_on_shard(
        self, tensors: Tensors, options: Options, shard: VocabShard
    ) -> tuple[Tensors, LocalShard]:
        """Checks a call with this process' classes, and returns its tensors and its classes.

        In grad mode, all processes take part in backward, because any of them may need gradients.
        """
        local, input = local_shard(self, tensors, options, shard), tensors[0]
        if grad_enabled() and not input.requires_grad:
            tensors = input.detach().requires_grad_(), *tensors[1:]
        return tensors, local

    def torch_on_shard(self, tensors: Tensors, options: Options, shard: LocalShard) -> Any:
        """Returns the result of a checked call, computed by torch's operators, for modes.

        Raises:
            RuntimeError: The call has metrics, which only kernels compute.
        """
        if getattr(options, "with_metrics", False):
            expected = "no torch dispatch or function mode around a call with a shard and metrics"
            raise RuntimeError(f"{self.name}: expected {expected}, got one")
        arranged = self.arranged(tensors, options, shard)
        with without_autocast(tensors[0].device.type):
            result = self.defined_on_shard(_cast(arranged, torch.float64), options, shard)
        return self.finished(result.to(self.wide_dtype(arranged)), tensors, options, shard)

    def defined_on_shard(self, tensors: Tensors, options: Options, shard: LocalShard) -> Tensor:
        """Returns the result without metrics over all classes, computed by torch's operators."""
        inputs = [*tensors, None], options
        if self.factors:
            inputs = self.loss.inputs(tensors, options, False)
        smooth = self.loss.fields(options) > SMOOTH
        results = sharded_results(*inputs, shard, smooth)
        result: Tensor = self.loss.of_results(results, tensors, options, shard.classes.total)
        return result


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
    inplace: bool = False,
) -> Forward:
    """Returns the forward pass of a kernel that computes a loss and its gradients.

    Args:
        dtype: The dtype of the loss, None for the kernels' accumulation dtype.
        inplace: Whether the gradient of the input overwrites the input.
    """
    in_forward = True in needs and gradients_in_forward(options.reduction, tensors[0].dtype)
    outputs = outputs_of(True, tuple(needs) if in_forward else (), inplace, dtype)
    loss, gradients = kernel(tensors, options, outputs)
    if dtype is not None and loss is not None and loss.dtype is not dtype:
        loss = loss.to(dtype)
    return loss, tensors, gradients if in_forward else ()


def state_forward(
    op: RowOperator,
    source: Any,
    tensors: Tensors,
    options: Options,
    needs: Needs,
    dtype: torch.dtype | None = None,
    *,
    results: int = 0,
    keeps_logits: bool = True,
) -> Forward:
    """Returns the forward pass of a loss that is computed from the state of each row.

    Args:
        op: Its loss computes the result from states, as `cross_entropy.CrossEntropyLoss` does, and,
            if a call has factors, also the inputs of the source and the gradients of its results.
        source: A `LogitRows` or another source of rows.
        dtype: The dtype of the result, None for the accumulation dtype.
        results: As in `LogitRows.state`.
        keeps_logits: Whether to keep logits that have been computed for the backward pass.
    """
    loss, inputs, of_rows = op.loss, [*tensors, None], options
    if op.factors:
        inputs, of_rows = loss.inputs(tensors, options, options.with_metrics)
    keeps = keeps_logits and True in needs
    state, result, logits = source.state(inputs, of_rows, loss.fields(options), results, keeps)
    if result is None:
        # Users may change the result in place, so it does not share the state's memory.
        result = loss.of_results(state, tensors, options, source.classes.total)
        result = result.to(dtype or op.wide_dtype(tensors), copy=True)
    saved = *tensors, state, logits
    return (result, state) if options.with_metrics else result, saved, ()


def state_backward(
    op: RowOperator,
    source: Any,
    saved: Tensors,
    options: Options,
    needs: Needs,
    grad_output: Tensor,
) -> Gradients:
    """Returns the backward pass of `state_forward`."""
    loss, count = op.loss, len(op.all_operands)
    tensors, (state, logits) = saved[:count], (*saved[count:], None)[:2]
    inputs, of_rows, grads, below = [*tensors, None], options, grad_output, None
    if op.factors:
        inputs, of_rows = loss.inputs(tensors, options, False)
        total = source.classes.total
        grads, below = loss.grad_results(state, tensors, options, total, grad_output)
    gradients = source.gradients(inputs, of_rows, state, grads, logits, below)
    return *gradients, *[None] * (len(needs) - len(gradients))
