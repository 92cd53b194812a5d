"""Losses of rows of logits: the plan that they share, and those of logits.

A plan has a source of rows and a loss. If a block of logits has all classes of its rows, a kernel
computes the loss and the gradient of the block in one pass. Otherwise the source computes the state
of each row, the loss follows from the state, and the source computes the gradients from the state
and the gradients of its results. A state is a float64 tensor (fields, rows); ``types.py`` names the
fields. The sources are `LogitRows`, ``heads.HeadRows`` and ``shards.ShardedRows``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.compiler import is_dynamo_compiling

from pyfused import checks
from pyfused.backends import Backend, backend_of, takes_triton
from pyfused.backends.protocol import LossKernel
from pyfused.dispatch.autograd import (
    autocast_dtype,
    differentiate,
    in_autocast_dtype,
    without_autocast,
)
from pyfused.dispatch.operator import (
    FACTORS,
    FIRST_DIM,
    Operand,
    Options,
    Tensors,
    grad_enabled,
)
from pyfused.dispatch.plan import Forward, Plan, gradients_in_forward, loss_passes, needs_grad
from pyfused.dispatch.signature import PLAIN, spec_of
from pyfused.layout import accumulate_dtype, common_dtype, feature_rows, is_dense
from pyfused.ops import custom_operators, definitions, metrics
from pyfused.ops.collectives import LocalShard
from pyfused.ops.shards import ShardedOperator, ShardedRows, class_range, sharded_results
from pyfused.torch_internals import graph_is_retained
from pyfused.types import (
    LOG_P,
    LSE,
    METRICS_FIELDS,
    SMOOTH,
    SMOOTHING_FIELDS,
    STATE_FIELDS,
    ClassRange,
    CrossEntropyOptions,
    Gradients,
    Outputs,
    RowOptions,
)

# ---- sources -------------------------------------------------------------------------------------

# The state, of shape (fields, *target.shape); its first fields in the accumulation dtype, or None;
# and logits that the backward pass may overwrite, or None.
RowState = tuple[Tensor, Tensor | None, Tensor | None]


class RowSource(Protocol):
    """Computes the states of rows of logits, and gradients from states.

    Attributes:
        backend: The backend of the kernels.
        classes: The range of classes that the logits belong to.
        layer: The number of tensors that the logits are computed from: 1 or 3.
    """

    backend: Backend
    classes: ClassRange
    layer: int

    def state(
        self, tensors: Tensors, options: RowOptions, fields: int, results: int, keeps_logits: bool
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

    def gradients(
        self,
        tensors: Tensors,
        options: RowOptions,
        state: Tensor,
        grad_results: Tensor,
        logits: Tensor | None = None,
        filter_below: Tensor | None = None,
    ) -> Gradients:
        """Computes the gradients of the logits, or of the input, weight and bias of a layer.

        Args:
            tensors, options: As in `state`.
            state: The state over all classes.
            grad_results: The gradients of the first 1, 3 or 4 of the log-probability, the entropy,
                the log-sum-exp and the weighted sum of logits, of shape (results, *target.shape).
            logits: The logits that `state` returned; they are overwritten.
            filter_below: As in `heads.over_blocks`.
        """


@dataclass(eq=False)
class LogitRows:
    """The rows of logits (C), (N, C) or (N, C, d1, ..., dk)."""

    backend: Backend
    classes: ClassRange
    layer: ClassVar[int] = 1

    def state(
        self,
        tensors: Tensors,
        options: RowOptions,
        fields: int = STATE_FIELDS,
        results: int = 0,
        keeps_logits: bool = False,  # noqa: ARG002
    ) -> RowState:
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


def metrics_state(
    source: LogitRows, logits: Tensor, target: Tensor, options: CrossEntropyOptions, fields: int
) -> Tensor:
    """Returns the state of rows of capped logits.

    For class probabilities, LOG_P is ``sum_c target_c log p_c``.
    """
    rows, indices = options.of_rows()._replace(softcap=None), not target.is_floating_point()
    state, *_ = source.state((logits, target if indices else None, None), rows, fields)
    if indices:
        return state
    scale = options.scale / options.temperature
    plain = CrossEntropyOptions(reduction="none", scale=scale)
    tensors = logits.detach(), target.detach(), None, None, None
    loss, _ = source.backend.cross_entropy(tensors, plain, Outputs())(tensors, plain)
    assert loss is not None
    state[LOG_P] = -loss.flatten()
    return state


# ---- the plan ------------------------------------------------------------------------------------


class Planned(NamedTuple):
    """The signature of a call that is planned.

    Attributes:
        tensors: The layouts of the tensors of the call.
        options: The options for planning.
        shard: The classes of this process, None if it has all classes.
        needs: Whether each of the student's tensors needs a gradient.
        in_forward: Whether the forward pass computes the gradients, if it can.
    """

    tensors: Tensors
    options: Options
    shard: LocalShard | None = None
    needs: tuple[bool, ...] = ()
    in_forward: bool = False


# The forward and the backward pass of a `Plan`.
Passes = tuple[Callable[[Tensors, Any], Forward], Callable[[Tensors, Any, Tensor], Gradients]]


@dataclass(eq=False, kw_only=True, repr=False)
class RowLoss(ShardedOperator):
    """An operator of rows of logits, which may be the output of a linear layer.

    The forward pass computes the gradients of a reduced loss if it has all classes of a row.
    Otherwise the backward pass recomputes the logits. It also does so for float16, because
    gradients would underflow without grad_output.

    Attributes:
        check_arguments: Raises for invalid shapes, dtypes and options.
        student: The number of differentiated tensors, which come first.
    """

    check_arguments: Callable[..., None]
    factors: ClassVar[tuple[Operand, ...]] = FACTORS

    def __post_init__(self) -> None:
        super().__post_init__()
        self.student = sum(operand.differentiated for operand in self.operands)

    def check(self, tensors: Tensors, options: Options) -> None:
        self.check_tensors(tensors)
        self.check_arguments(*tensors, options)

    def arrangement(self, call: Planned) -> Any:
        """Returns the function `arrange` of a plan.

        It returns the tensors in the form that kernels take, and raises for invalid values, unless
        reading them synchronises.
        """
        raise NotImplementedError

    def passes(self, call: Planned) -> Passes:
        """Returns the forward and the backward pass of a plan."""
        raise NotImplementedError

    def define(
        self,
        tensors: Tensors,
        options: Options,
        shard: LocalShard | None,  # noqa: ARG002
        state: Tensor | None,  # noqa: ARG002
    ) -> Tensor:
        """Returns the result, computed by torch's operators from arranged tensors.

        Args:
            shard: The classes of this process, None if it has all classes.
            state: The state that the forward pass saved, None if it saved none.
        """
        result: Tensor = self.torch(*tensors, options)
        return result

    def finish(self, call: Planned) -> Any:  # noqa: ARG002
        """Returns the function `finish` of a plan, None if the result needs no change."""
        return None

    def input_dtype(self, tensors: Tensors) -> torch.dtype:
        """Returns the dtype in which kernels take the input."""
        input = in_autocast_dtype(tensors[0]) if self.is_linear else tensors[0]
        return input.dtype  # type: ignore[no-any-return]

    def product_dtype(self, tensors: Tensors) -> torch.dtype:
        """Returns the dtype of the matrix products of a linear layer."""
        best: torch.dtype = backend_of(tensors[0]).product_dtype(self.input_dtype(tensors))
        return best

    def total_weight(self, tensors: Tensors, options: Options, all_count: bool = False) -> Any:  # noqa: ARG002
        """Returns the default divisor of a mean.

        Args:
            all_count: Whether all of these rows are known to count.
        """
        token_weight = tensors[-2]
        return len(tensors[0]) if token_weight is None else token_weight.sum(dtype=torch.float64)

    def divisor(self, tensors: Tensors, options: Options, all_count: bool = False) -> Any:
        """Returns the divisor of a mean, a number or a scalar tensor."""
        if tensors[-1] is not None:
            return tensors[-1]
        if options.denominator is not None:
            return options.denominator
        return self.total_weight(tensors, options, all_count)

    def overwrites(self, call: Planned) -> bool:  # noqa: ARG002
        """Returns whether the gradient of the input overwrites the input."""
        return False

    def gradients_needed(self, tensors: Tensors) -> tuple[bool, ...]:
        """Returns whether each of the student's tensors needs a gradient."""
        return needs_grad(tensors[: self.student])

    def plan(self, tensors: Tensors, options: Options, shard: LocalShard | None = None) -> Plan:
        """Checks a call, and returns the plan of its signature.

        Args:
            shard: The classes of this process, for arguments that have been checked.
        """
        if shard is None:
            self.check_arguments(*tensors, options)
        needs, device = self.gradients_needed(tensors), tensors[0].device.type
        dtype, count = self.input_dtype(tensors), len(self.all_operands)
        in_forward = gradients_in_forward(getattr(options, "reduction", "none"), dtype)
        call = Planned(tensors, options, shard, needs, in_forward and True in needs)
        forward, backward = self.passes(call)
        if self.is_linear and device != "meta" and torch.is_autocast_enabled(device):
            forward = partial(_without_autocast, forward, device)
        wide = torch.float64 if shard is not None else accumulate_dtype(dtype)

        def define(saved: Tensors, options: Options, grad_output: Tensor) -> Gradients:
            student, others = saved[: self.student], saved[self.student : count]
            state = saved[count] if len(saved) > count else None

            def definition(*student: Tensor | None) -> Tensor:
                tensors = [
                    x if x is None or not x.is_floating_point() else x.to(wide)
                    for x in (*student, *others)
                ]
                result = self.define(tensors, options, shard, state)
                return result.to(grad_output.dtype).reshape(grad_output.shape)

            return differentiate(definition, student, needs, grad_output)

        return Plan(
            name=self.name,
            backend=backend_of(tensors[0]),
            needs=needs,
            arrange=self.arrangement(call),
            forward=forward,
            backward=backward,
            define=define,
            finish=self.finish(call),
            inplace=self.overwrites(call),
        )

    # ---- compiled programs -----------------------------------------------------------------------

    def compiled(self, tensors: Tensors, options: Options) -> Any:
        """Returns the result of a head in a compiled program, from its custom operator."""
        self.check_arguments(*tensors, options)
        call = Planned(tensors, options)
        arrange, finish = self.arrangement(call), self.finish(call)
        arranged = list(tensors if arrange is None else arrange(tensors, options))
        for i, operand in enumerate(self.operands):  # custom operators check dtypes
            if operand.name.endswith(("_weight", "_bias")):
                arranged[i] = in_autocast_dtype(arranged[i])
        reduction = getattr(options, "reduction", "none")
        in_forward = gradients_in_forward(reduction, arranged[0].dtype)
        needs = [in_forward and need for need in needs_grad(arranged[: self.student])]
        with without_autocast(arranged[0].device.type):
            result, *_, state = custom_operators.call(self, arranged, options, needs)
        result = (result, state) if getattr(options, "with_metrics", False) else result
        return result if finish is None else finish(result, tensors)

    def loss_shape(self, tensors: Tensors) -> tuple[int, ...]:
        """Returns the shape of the unreduced loss."""
        return tensors[0].shape[:-1]  # type: ignore[no-any-return]

    def loss_dtype(self, tensors: Tensors, options: Options) -> torch.dtype:  # noqa: ARG002
        """Returns the dtype of the result that a pass returns."""
        return accumulate_dtype(self.input_dtype(tensors))

    def fake(self, tensors: Tensors, options: Options) -> Tensor:
        """Returns an empty tensor like the result of the custom operator."""
        shape = self.loss_shape(tensors) if options.reduction == "none" else ()
        empty: Tensor = tensors[0].new_empty(shape, dtype=self.loss_dtype(tensors, options))
        return empty

    def fake_state(self, tensors: Tensors, options: Options) -> Tensor:  # noqa: ARG002
        """Returns an empty tensor like the state that the custom operator returns."""
        empty: Tensor = tensors[0].new_empty(0)
        return empty

    # ---- shards ----------------------------------------------------------------------------------

    def compute_shard(self, tensors: Tensors, options: Options, shard: LocalShard) -> Any:
        specs = [spec_of(x) for x in tensors]
        return self.plan(specs, options, shard)(tensors, options)


def _without_autocast(forward: Callable[..., Any], device: str, *call: Any) -> Any:
    with torch.autocast(device, enabled=False):
        return forward(*call)


class StateLoss(RowLoss):
    """An operator whose result can be computed from the state of each row."""

    @abstractmethod
    def state_fields(self, options: Options) -> int:
        """Returns the number of fields of a state."""

    @abstractmethod
    def of_state(self, state: Tensor, tensors: Tensors, options: Options, classes: int) -> Tensor:
        """Returns the result, computed from the state."""

    def row_inputs(self, tensors: Tensors, options: Options, all_rows: bool) -> Any:
        """Returns the tensors and the options that a `RowSource` takes.

        It also returns whether these are the tensors of `RowSource.gradients`.

        Args:
            all_rows: Whether to include rows of weight 0.
        """
        raise NotImplementedError

    def grad_results(
        self, state: Tensor, tensors: Tensors, options: Options, classes: int, grad_output: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the arguments grad_results and filter_below of `RowSource.gradients`."""
        raise NotImplementedError

    def fake_state(self, tensors: Tensors, options: Options) -> Tensor:
        shape = self.state_fields(options), *self.loss_shape(tensors)
        empty: Tensor = tensors[0].new_empty(shape, dtype=torch.float64)
        return empty

    def state_passes(
        self,
        source: RowSource,
        call: Planned,
        results: int = 0,
        keeps_logits: bool = True,
    ) -> Passes:
        """Returns the passes that compute the state of each row.

        Args:
            results: As in `RowSource.state`.
            keeps_logits: Whether to keep logits that have been computed for the backward pass.
        """
        specs, options, _, needs, _ = call
        count, fields = len(self.all_operands), self.state_fields(options)
        classes, with_metrics = source.classes.total, options.with_metrics
        keeps, dtype = keeps_logits and True in needs, self.loss_dtype(specs, options)
        has_factors = bool(self.factors)

        def forward(tensors: Tensors, options: Options) -> Forward:
            inputs, of_rows, alike = (*tensors, None), options, True
            if has_factors:
                inputs, of_rows, alike = self.row_inputs(tensors, options, with_metrics)
            state, result, logits = source.state(inputs, of_rows, fields, results, keeps and alike)
            if result is None:
                # Users may change the result in place, so it does not share the state's memory.
                result = self.of_state(state, tensors, options, classes).to(dtype, copy=True)
            return (result, state) if with_metrics else result, (*tensors, state, logits), ()

        def backward(saved: Tensors, options: Options, grad_output: Tensor) -> Gradients:
            tensors, (state, logits) = saved[:count], (*saved[count:], None)[:2]
            if logits is not None and (graph_is_retained() or not logits.is_contiguous()):
                logits = None  # they would be overwritten
            inputs, of_rows, grads, below = (*tensors, None), options, grad_output, None
            if has_factors:
                inputs, of_rows, _ = self.row_inputs(tensors, options, False)
                grads, below = self.grad_results(state, tensors, options, classes, grad_output)
            gradients = source.gradients(inputs, of_rows, state, grads, logits, below)
            return *gradients, *[None] * (len(needs) - len(gradients))

        return forward, backward


@dataclass(eq=False, kw_only=True, repr=False)
class NllLoss(RowLoss):
    """The negative log-likelihood of log-probabilities, ``-w_y x_y``."""

    factors: ClassVar[tuple[Operand, ...]] = ()
    strategy = "one element of a row"
    dynamic = FIRST_DIM

    def __post_init__(self) -> None:
        super().__post_init__()
        self.student = 2  # kernels return a gradient of the target, which is None

    def contiguous_classes(self, tensors: Tensors, _: Any) -> int:
        return checks.classes_of(tensors[0])

    def check(self, tensors: Tensors, options: Options) -> None:
        super().check(tensors, options)
        checks.class_indices(checks.classes_of(tensors[0]), tensors[1], options.ignore_index)

    def arrangement(self, _: Planned) -> Any:
        return _with_class_targets

    def passes(self, call: Planned) -> Passes:
        (input, *_), options = call.tensors, call.options
        backend, dtype = backend_of(input), autocast_dtype(input.dtype, input.device)
        loss_dtype = None if dtype is accumulate_dtype(input.dtype) else dtype

        def prepare(tensors: Tensors, *outputs: Any) -> LossKernel:
            kernel: LossKernel = getattr(backend, self.name)(tensors, options, *outputs)
            return kernel

        dims, needs, in_forward = input.dynamic_dims, call.needs, call.in_forward
        return loss_passes(prepare, needs, in_forward, loss_dtype=loss_dtype, dynamic_dims=dims)


def nll_loss_fallback_reason(
    input: Tensor, target: Tensor, weight: Tensor | None, *_: Any
) -> str | None:
    """Returns why torch's operator has to compute these arguments, None if a kernel can."""
    if target.dtype is torch.uint8 and input.dim() > 2:
        return UINT8_TARGET
    if weight is not None and weight.dim() != 1:
        return "weight does not have one dimension"
    return "torch's kernel for GPUs moves as few bytes" if takes_triton(input) else None


def _with_class_targets(tensors: Tensors, _: Any) -> Tensors:
    input, target, weight = tensors
    return input, class_targets(input, target), weight, None, None


def class_targets(input: Tensor, target: Tensor) -> Tensor:
    """Returns class indices as int64, of the shape of the loss."""
    target = target if target.dtype is torch.int64 else target.to(torch.int64)
    return target.reshape(()) if input.dim() == 1 else target


# ---- cross-entropy -------------------------------------------------------------------------------


UINT8_TARGET = "target has dtype torch.uint8, which torch does not support here"


class CrossEntropyOfRows(StateLoss):
    """Cross-entropy of logits, or of a linear layer's output.

    Attributes:
        reference: Computes the loss by torch's operators, from the tensors and the options of a
            call. NaN in rows that do not count does not reach gradients.
    """

    reference: ClassVar[Callable[..., Any]]

    def row_inputs(self, tensors: Tensors, options: Options, all_rows: bool) -> Any:
        *layer, target, weight, token_weight, _ = tensors
        if weight is not None:
            weight = weight.detach().to(accumulate_dtype(layer[0].dtype)).contiguous()
        rows = target
        if token_weight is not None and not all_rows:  # the logits of rows of weight 0 may be NaN
            rows = target.masked_fill(token_weight == 0, options.ignore_index)
        return (*layer, rows, weight), options.of_rows(), not all_rows or token_weight is None

    def state_fields(self, options: Options) -> int:
        if options.label_smoothing != 0:
            return SMOOTHING_FIELDS
        return METRICS_FIELDS if options.with_metrics else STATE_FIELDS

    def total_weight(self, tensors: Tensors, options: Options, all_count: bool = False) -> Any:
        *_, target, weight, token_weight, _ = tensors
        if target.is_floating_point():
            total = target[:, 0].numel()
            return total if token_weight is None else token_weight.sum(dtype=torch.float64)
        if all_count and weight is token_weight is None and target.dim() == 1:
            return target.shape[0]
        weights: Tensor = target != options.ignore_index
        if weight is not None:
            weights = definitions.target_weights(target, weight, options.ignore_index)
        weights = weights if token_weight is None else weights * token_weight
        return weights.sum(dtype=torch.float64)

    def of_state(self, state: Tensor, tensors: Tensors, options: Options, classes: int) -> Tensor:
        smooth = state[SMOOTH] if options.label_smoothing > 0 else None
        return self.of_results(state[LOG_P], state[LSE], smooth, tensors, options, classes)

    def row_weights(
        self, tensors: Tensors, options: Options, classes: int
    ) -> tuple[Tensor, Tensor | None, Any]:
        """Returns which rows count, the class weight of each target, and the sum of all weights.

        The class weight is None for 1.
        """
        *_, target, weight, token_weight, _ = tensors
        counts, of_target, total = target != options.ignore_index, None, classes
        if token_weight is not None:
            counts &= token_weight != 0
        if weight is not None:
            of_target = definitions.target_weights(target, weight, options.ignore_index)
            total = weight.double().sum() if options.label_smoothing > 0 else classes
        return counts, of_target, total

    def of_results(
        self,
        log_p: Tensor,
        lse: Tensor,
        smooth: Tensor | None,
        tensors: Tensors,
        options: Options,
        classes: int,
    ) -> Tensor:
        """Returns the loss, in float64.

        Args:
            smooth: The weighted sum of logits, None without smoothing.
        """
        token_weight = tensors[-2]
        counts, target_weight, total = self.row_weights(tensors, options, classes)
        smooth = None if smooth is None else smooth - lse * total  # sum_c w_c log p_c
        terms = log_p, smooth, lse if options.z_loss else None
        loss = definitions.row_losses(*terms, target_weight, options, classes)
        loss = (loss if token_weight is None else loss * token_weight).where(counts, 0)
        if options.reduction == "none":
            return loss
        loss = loss.sum()
        return loss / self.divisor(tensors, options) if options.reduction == "mean" else loss

    def define(
        self,
        tensors: Tensors,
        options: Options,
        shard: LocalShard | None = None,
        state: Tensor | None = None,
    ) -> Tensor:
        if shard is None or state is None:
            loss: Tensor = self.reference(*tensors, options._replace(with_metrics=False))
            return loss
        inputs, of_rows, _ = self.row_inputs(tensors, options, False)
        log_p, _, lse, *smooth = sharded_results(inputs, of_rows, shard, state)
        results = log_p, lse, smooth[0] if smooth else None
        return self.of_results(*results, tensors, options, shard.classes.total)

    def grad_results(
        self, state: Tensor, tensors: Tensors, options: Options, classes: int, grad_output: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        grad, token_weight = grad_output.double(), tensors[-2]
        grad = grad / self.divisor(tensors, options) if options.reduction == "mean" else grad
        below = options.filter_eps * grad.abs() if options.filter_eps else None
        counts, target_weight, total = self.row_weights(tensors, options, classes)
        grad = (grad if token_weight is None else grad * token_weight).where(counts, 0)
        coefficients = definitions.row_coefficients(target_weight, options, classes)
        of_log_p, of_smooth, of_squared_lse = coefficients
        gradients = state.new_zeros((4 if len(state) > SMOOTH else 3, *grad.shape))
        gradients[LOG_P] = of_log_p * grad
        if of_squared_lse:
            gradients[LSE] = 2 * of_squared_lse * state[LSE] * grad
        if of_smooth:
            gradients[LSE] -= of_smooth * total * grad
            gradients[3] = of_smooth * grad
        return gradients, below


@dataclass(eq=False, kw_only=True, repr=False)
class CrossEntropy(CrossEntropyOfRows):
    """Cross-entropy of logits and class indices, or probabilities of the classes."""

    dynamic = FIRST_DIM
    reference = staticmethod(definitions.masked_cross_entropy)

    def __post_init__(self) -> None:
        super().__post_init__()
        definition = self.torch

        def compute(input: Tensor, *rest: Any) -> Any:
            if rest[-1].inplace and type(input) in PLAIN and not is_dynamo_compiling():
                prepare_inplace(input)  # raises the errors that a kernel's call raises
            return definition(input, *rest)

        self.torch = compute

    def contiguous_classes(self, tensors: Tensors, _: Options) -> int:
        return checks.classes_of(tensors[0])

    def check(self, tensors: Tensors, options: Options) -> None:
        super().check(tensors, options)
        input, target, *_ = tensors
        checks.class_indices(checks.classes_of(input), target, options.ignore_index)

    def needs_state(self, call: Planned) -> bool:
        """Returns whether only the kernels of row states support a call."""
        return call.shard is not None or call.options.softcap is not None

    def overwrites(self, call: Planned) -> bool:
        return call.options.inplace and not self.needs_state(call)

    def arrangement(self, call: Planned) -> Any:
        tensors, _, shard, *_ = call
        inplace, check, dtype = self.overwrites(call), None, self.input_dtype(tensors)
        if self.needs_state(call):  # other kernels check class indices
            check = backend_of(tensors[0]).check_class_indices
        layouts: list[Any] = [None if x is None else x.empty() for x in tensors[:3]]
        pairs = zip(layouts, self.converted(*layouts), strict=True)
        converts = any(x is not y for x, y in pairs)
        if not converts and tensors[3] is tensors[4] is check is None and not inplace:
            return None
        classes = class_range(tensors[:1], shard).total

        def arrange(tensors: Tensors, options: Options) -> Tensors:
            if inplace:
                prepare_inplace(tensors[0])
            *operands, token_weight, denominator = tensors
            if not token_weight is denominator is None:
                token_weight, denominator = definitions.factors(token_weight, denominator, dtype)
            if converts:
                operands = [*self.converted(*operands)]
            if check is not None:
                check(operands[1], classes, options.ignore_index)
            return *operands, token_weight, denominator

        return arrange

    def converted(self, input: Tensor, target: Tensor, weight: Tensor | None) -> Tensors:
        """Returns the operands in the dtypes and shapes that kernels take."""
        if not target.is_floating_point():
            return input, class_targets(input, target), weight
        common = common_dtype(input, target, weight)
        return input.to(common), target.to(common), weight

    def passes(self, call: Planned) -> Passes:
        tensors, options, shard, needs, in_forward = call
        input, backend = tensors[0], backend_of(tensors[0])
        source: Any = LogitRows(backend, class_range(tensors[:1], shard))
        if shard is not None:
            source = ShardedRows(source, shard, tensors[:1], options.with_metrics, needs)
        if self.needs_state(call):
            return self.state_passes(source, call)
        inplace = self.overwrites(call)
        if inplace and not is_dense(input.empty()):  # backward could not scale the gradient
            in_forward = False

        def prepare(tensors: Tensors, *outputs: Any) -> LossKernel:
            return backend.cross_entropy(tensors, options, *outputs)

        dtype = self.loss_dtype(tensors, options)
        loss_dtype = None if dtype is accumulate_dtype(self.input_dtype(tensors)) else dtype
        forward, backward = loss_passes(
            prepare, needs, in_forward, inplace, loss_dtype, input.dynamic_dims
        )

        def forward_with_state(tensors: Tensors, options: Options) -> Forward:
            input, target, *_ = tensors
            state = metrics_state(source, input, target, options, METRICS_FIELDS)
            loss, saved, gradients = forward(tensors, options)
            return (loss, state), saved, gradients

        return forward_with_state if options.with_metrics else forward, backward

    def loss_dtype(self, tensors: Tensors, options: Options) -> torch.dtype:
        if options.loss_dtype is not None:
            return options.loss_dtype  # type: ignore[no-any-return]
        return autocast_dtype(self.input_dtype(tensors), tensors[0].device)

    def input_dtype(self, tensors: Tensors) -> torch.dtype:
        input, target, weight = tensors[:3]
        return common_dtype(input, target, weight) if target.is_floating_point() else input.dtype

    def finish(self, call: Planned) -> Any:
        tensors, options, *_ = call
        if not options.with_metrics:
            return None
        ignore_index, dtype = options.ignore_index, accumulate_dtype(tensors[0].dtype)

        def finish(results: Any, tensors: Tensors) -> tuple[Tensor, metrics.Metrics]:
            (loss, state), input, target = results, *tensors[:2]
            if not target.is_floating_point():
                target = class_targets(input, target)
            return loss, metrics.of_state(state, target, ignore_index, dtype)

        return finish

    def strategy_of(self, tensors: Tensors, options: Options) -> str:  # noqa: ARG002
        rows = backend_of(tensors[0]).supports_rows(tensors[0])
        return "row by row" if rows else "several rows at a time"


def prepare_inplace(input: Tensor) -> None:
    """Increments the version of logits that their gradient may overwrite."""
    if grad_enabled() and input.requires_grad:
        checks.overwritable(input)
        increment_version(input)


def cross_entropy_fallback_reason(
    input: Tensor, target: Tensor, weight: Tensor | None, *others: Any
) -> str | None:
    """Returns why torch's operator has to compute these arguments, None if a kernel can."""
    options = others[-1]
    if input.dim() > 1 and input.shape[1] == 1:
        return "one class"
    smoothes = weight is not None and options.label_smoothing != 0
    if target.dtype is torch.uint8 and (input.dim() > 2 or smoothes):
        return UINT8_TARGET
    if options.softcap is not None and (options.gamma != 0 or target.is_floating_point()):
        return "softcap with gamma or class probabilities"
    return None
