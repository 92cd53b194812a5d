"""Cross-entropy of a linear layer's output, without all logits in memory:

loss = cross_entropy(input @ linear_weight.T + linear_bias, target)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from pyfused import checks
from pyfused.backends import Backend, backend_of
from pyfused.backends.protocol import LossResult
from pyfused.dispatch.autograd import autocast_dtype, in_autocast_dtype
from pyfused.dispatch.operator import REDUCTIONS, Options, Tensors
from pyfused.dispatch.originals import F
from pyfused.dispatch.reasons import SMALL
from pyfused.dispatch.run import fall_back, is_compiled
from pyfused.layout import accumulate_dtype, with_leading_dims
from pyfused.ops import definitions, shards
from pyfused.ops.chunk_sizes import product_dtype, rows_at_once, tile_size
from pyfused.ops.collectives import LocalShard
from pyfused.ops.cross_entropy import UINT8_TARGET
from pyfused.ops.heads import (
    Block,
    HeadRows,
    Layer,
    capped,
    kept,
    loss_over_rows,
    rows_that_count,
    take_rows,
)
from pyfused.ops.metrics import Metrics, of_state
from pyfused.ops.row_loss import LossArgs, Results, RowLoss
from pyfused.ops.row_state import (
    counted_target,
    kernel_weight,
    loss_denominator,
    metrics_state,
    state_fields,
    state_loss,
    state_loss_gradients,
    total_weight,
)
from pyfused.ops.shards import ShardedOperator
from pyfused.torch_internals import built_in
from pyfused.types import ClassRange, CrossEntropyOptions, Head, Outputs


@dataclass(eq=False, kw_only=True, repr=False)
class LinearCrossEntropy(RowLoss, ShardedOperator):
    """Cross-entropy of a linear layer's output."""

    has_state = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.fast = self.compute_small
        self.linear = built_in("linear", F.linear)
        self.built_in_loss = built_in("cross_entropy_loss", F.cross_entropy)

    def compute_small(
        self,
        input: Tensor,
        linear_weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        token_weight: Tensor | None,
        denominator: Tensor | None,
        options: CrossEntropyOptions,
    ) -> Any:
        """Returns the result of a small call, without the definition's checks in common cases."""
        number, smoothing = REDUCTIONS.get(options.reduction), options.label_smoothing
        if (
            not token_weight is denominator is None
            or not options.memory_budget is options.torch_options is None
            or not options.is_plain()
            or type(smoothing) not in (float, int)
            or type(options.filter_eps) is not float
            or options.filter_eps != 0.0
            or number is None
            or has_torch_function((input, linear_weight, bias, target, weight))
            or not (input.is_cpu and linear_weight.is_cpu and target.dtype is torch.int64)
            or not (input.dim() == 2 and target.shape == input.shape[:1])
            or linear_weight.shape[1:] != input.shape[1:]
            or not (bias is None or (bias.is_cpu and bias.shape == linear_weight.shape[:1]))
        ):
            tensors = input, linear_weight, bias, target, weight, token_weight, denominator
            return fall_back(self, SMALL, tensors, options)
        logits = self.linear(input, linear_weight, bias)
        return self.built_in_loss(logits, target, weight, number, options.ignore_index, smoothing)

    def kernel_options(self, options: CrossEntropyOptions) -> CrossEntropyOptions:
        return checks.normalized(options)

    def to_rows(self, tensors: Tensors, options: CrossEntropyOptions) -> tuple[Any, ...]:
        input, *layer, target, weight, token_weight, denominator = tensors
        if not target.is_floating_point():
            target, classes = target.to(torch.int64), layer[0].shape[0]
            if not is_compiled(input):
                backend_of(target).check_class_indices(target, classes, options.ignore_index)
        token_weight, denominator = checks.factors(token_weight, denominator)
        head = Head._make((in_autocast_dtype(input), *layer, target, weight))
        head, token_weight = head.as_rows(token_weight)
        return *head, token_weight, denominator

    def finish(self, options: CrossEntropyOptions, results: Any, tensors: Tensors) -> Any:
        (loss, state), input, target = results, tensors[0], tensors[3]
        leading, dtype = input.shape[:-1], loss.dtype
        loss = with_leading_dims(loss, leading).to(_result_dtype(input, target, options))
        if not options.with_metrics or state is None:
            return loss
        target = Head(*tensors[: len(self.operands)]).as_rows(None)[0].target
        target = target if target.is_floating_point() else target.to(torch.int64)
        metrics = of_state(state, target, options.ignore_index, dtype)
        return loss, Metrics(*(with_leading_dims(x, leading) for x in metrics))

    def compute_shard(self, tensors: Tensors, options: Options, shard: LocalShard) -> Any:
        input, *layer, target = tensors[:4]
        options = options._replace(loss_dtype=_result_dtype(input, target, options))
        head = in_autocast_dtype(input), *layer, target
        plan = shards.cross_entropy_plan(head, options, shard)
        return plan((*head, *tensors[4:]), options)

    def check_shapes(self, tensors: Tensors, options: Options, classes: int) -> None:
        self.check_arguments(*tensors, options, classes)

    def check(self, tensors: Tensors, options: Options) -> None:
        super().check(tensors, options)
        checks.class_indices(tensors[1].shape[0], tensors[3], options.ignore_index)

    def strategy_of(self, tensors: Tensors, options: Options) -> str:
        head = Head._make((in_autocast_dtype(tensors[0]), *tensors[1:5]))
        n = head.input.shape[:-1].numel()
        capped, backend = options.softcap is not None, backend_of(head.input)
        rows = rows_at_once(head, options.memory_budget, backend, capped)(n)
        if not rows:
            return "blocks of classes"
        return "all logits at once" if rows >= n else f"blocks of {rows} rows"

    def loss_shape(self, tensors: Sequence[Any]) -> tuple[int, ...]:
        return tensors[0].shape[0], *tensors[1].shape[1:-1]  # len would specialise a dynamic size

    def state_fields(self, options: CrossEntropyOptions) -> int:
        return state_fields(options)

    def loss_dtype(self, tensors: Sequence[Any]) -> torch.dtype:
        dtype, target = tensors[0].dtype, tensors[3]
        if target.is_floating_point():
            dtype = torch.promote_types(dtype, target.dtype)
        return accumulate_dtype(dtype)

    def valid_rows(
        self,
        backend: Backend,
        tensors: Sequence[Any],
        token_weight: Tensor | None,
        options: CrossEntropyOptions,
    ) -> tuple[Tensor | None, Tensor | None]:
        target, ignore_index = tensors[3], options.ignore_index
        if target.is_floating_point():
            if token_weight is None or not options.with_metrics:
                return super().valid_rows(backend, tensors, token_weight, options)
            rows, valid = None, token_weight != 0
        else:
            valid = counted_target(target, token_weight, ignore_index) != ignore_index
            if token_weight is None or not options.with_metrics:
                return rows_that_count(valid, backend)
            rows, _ = rows_that_count(target != ignore_index, backend)
        # Rows of weight 0 also have metrics.
        counts = valid.flatten(1).any(1) if valid.dim() > 1 else valid
        return rows, take_rows(counts, rows)

    def total_weight(
        self,
        tensors: Sequence[Any],
        token_weight: Tensor | None,
        options: CrossEntropyOptions,
    ) -> float | Tensor:
        *_, target, weight = tensors
        if not target.is_floating_point():
            return total_weight(target, weight, token_weight, options)
        return target[:, 0].numel() if token_weight is None else token_weight.double().sum()

    def prepare(
        self, backend: Backend, tensors: Sequence[Any], options: CrossEntropyOptions
    ) -> tuple[Callable[..., Results], bool]:
        head = Head(*tensors)
        head = head._replace(input=in_autocast_dtype(head.input))
        limits = options.memory_budget, backend, options.softcap is not None
        dtype, rows_of = product_dtype(head, backend), rows_at_once(head, *limits)
        divides = rows_of(head.input.shape[:-1].numel()) > 0
        if options.reduction != "none" and not divides:
            options = options._replace(reduction="sum")
        kernel = kept(lambda tensors, *outputs: backend.cross_entropy(tensors, options, *outputs))

        def compute(tensors: Sequence[Any], args: LossArgs) -> Results:
            n, options = tensors[0].shape[0], args.options
            rows, is_mean = rows_of(n), options.reduction == "mean"
            if not (rows or is_mean):
                return _by_classes(backend, dtype, tensors, args)
            rows = max(1, rows)
            if is_mean and (rows < n or options.filter_eps):
                # Otherwise the kernel counts the targets of the only block.
                default = self.total_weight(tensors, args.token_weight, options)
                args = args.divided_by(loss_denominator(options, args.denominator, default))
            return _by_rows(backend, dtype, kernel, rows, tensors, args)

        return compute, divides

    def definition_loss(self, tensors: Sequence[Any], options: CrossEntropyOptions) -> Tensor:
        dtype = self.loss_dtype(tensors)

        def widen(tensor: Any) -> Any:
            floating = isinstance(tensor, Tensor) and tensor.is_floating_point()
            return tensor.to(dtype) if floating else tensor

        *operands, token_weight, denominator = tensors
        head, options = Head(*map(widen, operands)), options._replace(with_metrics=False)
        loss: Tensor = definitions.head_cross_entropy(head, token_weight, denominator, options)
        return loss


def linear_cross_entropy_fallback_reason(
    input: Tensor, linear_weight: Tensor, _bias: Any, target: Tensor, *rest: Any
) -> str | None:
    """Returns why torch's operator has to compute these arguments, None if a kernel can."""
    if not input.dim() or linear_weight.dim() < 2:
        return "input or linear_weight has too few dimensions"
    weight, *_, options = rest
    smoothes = weight is not None and options.label_smoothing != 0
    if target.dtype is torch.uint8 and (linear_weight.dim() > 2 or smoothes):
        return UINT8_TARGET
    return None


def _result_dtype(input: Tensor, target: Tensor, options: CrossEntropyOptions) -> torch.dtype:
    if options.loss_dtype is not None:
        return options.loss_dtype
    dtype = autocast_dtype(input.dtype, input.device)
    return torch.promote_types(dtype, target.dtype) if target.is_floating_point() else dtype


# ---- loss and gradients --------------------------------------------------------------------------


def _by_rows(
    backend: Backend,
    dtype: torch.dtype,
    kernel: Callable[..., LossResult],
    rows: int,
    tensors: Sequence[Any],
    args: LossArgs,
) -> Results:
    """Computes the results by blocks of rows with all classes."""
    input, linear_weight, bias, target, weight = tensors
    options, token_weight, denominator, outputs, grad_output, _, counts = args
    classes, needs, states = linear_weight.shape[:-1], outputs.gradients, list[Tensor]()
    grad_target = torch.empty_like(target) if needs and needs[3] else None
    block_needs = (any(needs[:3]), needs[3]) if needs else ()
    block_outputs = Outputs(outputs.loss, block_needs, inplace=True)

    def step(
        block: Block, targets: Tensor, token_weight: Tensor | None, grad_output: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        targets = targets.to(dtype) if targets.is_floating_point() else targets
        capped_logits, cap_backward = capped(backend, block.logits, options.softcap, rounds=True)
        logits = capped_logits.view(-1, *classes)
        if options.with_metrics:
            state = metrics_state(backend, logits, targets, options, state_fields(options))
            states.append(state.flatten(1))
        operands = logits, targets, weight, token_weight, denominator
        loss, (grad_logits, grad_targets) = kernel(operands, options, block_outputs, grad_output)
        if grad_target is not None and grad_targets is not None:
            grad_target[block.rows] = grad_targets
        if grad_logits is None:
            return loss, None
        gradient = cap_backward(grad_logits.view_as(capped_logits))
        if options.softcap is not None and counts is not None:  # 0 times NaN is NaN
            gradient.masked_fill_(~counts[block.rows].unsqueeze(-1), 0)
        return loss, gradient

    filter_below = None
    if options.filter_eps:
        scale = input.new_ones(()) if grad_output is None else grad_output.abs()
        divisor = args.divisor if options.reduction == "mean" else 1.0
        filter_below = options.filter_eps * scale / divisor
    matrix, bias = linear_weight.flatten(0, -2), None if bias is None else bias.flatten()
    layer = Layer(backend, input, matrix, bias, dtype, (rows, matrix.shape[0]), counts)
    row_tensors = target, token_weight, grad_output
    loss, gradients = loss_over_rows(layer, needs, step, row_tensors, filter_below)
    state = torch.cat(states, 1).unflatten(1, (target.shape[0], *classes[1:])) if states else None
    if not gradients:
        return loss, (), state
    pairs = zip(gradients, tensors[:3], strict=True)
    grad_layer = [None if x is None or t is None else x.view_as(t) for x, t in pairs]
    return loss, (*grad_layer, grad_target), state


def _by_classes(
    backend: Backend, dtype: torch.dtype, tensors: Sequence[Any], args: LossArgs
) -> Results:
    """Computes the results by blocks of classes.

    The gradients need the state over all classes, so the backward pass computes them.
    """
    options, token_weight, _, outputs, grad_output, state, _ = args
    *layer, target, class_weight = tensors
    counted = counted_target(target, token_weight, options.ignore_index)
    classes = layer[1].shape[0]
    weight, fields = kernel_weight(class_weight, dtype), state_fields(options)
    size = tile_size(layer[0].shape, dtype, options.memory_budget, backend)
    of_rows = options.of_rows()
    settings = of_rows, ClassRange(0, classes), fields, lambda _: size, outputs.gradients
    rows = HeadRows(backend, Head(*tensors), *settings)
    if state is None:
        with_metrics = target if options.with_metrics else counted
        state, *_ = rows.state((layer, with_metrics, weight, of_rows))
        loss = state_loss(state, counted, weight, token_weight, options, classes)
        loss = loss if options.reduction == "none" else loss.sum(dtype=torch.float64)
        return loss, (), state
    assert grad_output is not None
    grad_output = grad_output.expand(target.shape[0])
    weights = weight, token_weight
    grad_results = state_loss_gradients(state, counted, *weights, options, classes, grad_output)
    filter_below = options.filter_eps * grad_output.abs() if options.filter_eps else None
    inputs = layer, counted, weight, of_rows
    gradients = rows.gradients(inputs, state, grad_results, filter_below=filter_below)
    return None, (*gradients, None), state
