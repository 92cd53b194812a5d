"""Cross-entropy of a linear layer's output, without all logits in memory:

loss = cross_entropy(input @ linear_weight.T + linear_bias, target)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyfused import checks
from pyfused.backends import Backend, backend_of, cross_entropy_once
from pyfused.dispatch.autograd import autocast_dtype, in_autocast_dtype
from pyfused.dispatch.operator import Arguments, Tensors
from pyfused.dispatch.run import is_compiled
from pyfused.layout import accumulate_dtype, with_leading_dims
from pyfused.ops import definitions, shards
from pyfused.ops.chunk_sizes import product_dtype, rows_at_once, tile_size
from pyfused.ops.collectives import LocalShard
from pyfused.ops.heads import (
    Block,
    Layer,
    LayerStates,
    LossArgs,
    StateOptions,
    capped,
    loss_over_rows,
    rows_that_count,
    take_rows,
)
from pyfused.ops.metrics import Metrics, of_state
from pyfused.ops.row_loss import Results, RowLoss
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
from pyfused.types import Choice, ClassRange, CrossEntropyOptions, Head


@dataclass(eq=False, kw_only=True, repr=False)
class LinearCrossEntropy(RowLoss, ShardedOperator):
    """Cross-entropy of a linear layer's output."""

    options = CrossEntropyOptions
    has_state = True

    case: tuple[Any, ...] = (Choice("options", of_torch=True),)

    def compute_by_torch(self, *call: Any) -> Any:
        *operands, options = self.arguments_of(*self.split(call))
        return self.definition(*operands, call[-1], options)

    def checked_options(self, arguments: Arguments) -> CrossEntropyOptions:
        head, options = _head(arguments)
        self.check_arguments(head, options)
        return options

    def kernel_options(self, options: CrossEntropyOptions) -> CrossEntropyOptions:
        return checks.normalized(options)

    def to_rows(self, tensors: Tensors, options: CrossEntropyOptions) -> tuple[Any, ...]:
        *operands, token_weight, denominator = tensors
        head = Head(*operands)
        if not head.target.is_floating_point():
            target, classes = head.target.to(torch.int64), head.linear_weight.shape[0]
            head = head._replace(target=target)
            if not is_compiled(head.input):
                backend_of(target).check_class_indices(target, classes, options.ignore_index)
        factors = checks.factors(token_weight, denominator)
        head, token_weight = _rows(head, factors[0])
        return *head, token_weight, factors[1]

    def finish(
        self,
        loss: Tensor,
        tensors: Tensors,
        options: CrossEntropyOptions,
        state: Tensor | None = None,
    ) -> Any:
        head = Head(*tensors[: len(self.operands)])
        leading, loss_dtype = head.input.shape[:-1], loss.dtype
        loss = with_leading_dims(loss, leading).to(_result_dtype(head, options))
        if not options.with_metrics or state is None:
            return loss
        target = head.as_rows(None)[0].target
        target = target if target.is_floating_point() else target.to(torch.int64)
        metrics = of_state(state, target, options.ignore_index, loss_dtype)
        return loss, Metrics(*(with_leading_dims(x, leading) for x in metrics))

    def compute_shard(self, arguments: Arguments, shard: LocalShard) -> Any:
        head, options = _head(arguments)
        options = replace(options, loss_dtype=_result_dtype(head, options))
        tensors = in_autocast_dtype(head.input), *head[1:3], head.target
        return shards.cross_entropy(tensors, head.weight, options, shard)

    def check_shapes(self, arguments: Arguments, classes: int) -> None:
        self.check_arguments(*_head(arguments), classes)

    def check(self, arguments: Arguments) -> None:
        super().check(arguments)
        head, options = _head(arguments)
        checks.class_indices(head.linear_weight.shape[0], head.target, options.ignore_index)

    def strategy_of(self, arguments: Arguments) -> str:
        head, options = _head(arguments)
        head, _ = _rows(head, None)
        rows = rows_at_once(head, options, backend_of(head.input))
        if not rows:
            return "blocks of classes"
        all_rows = rows >= head.input.shape[0]
        return "all logits at once" if all_rows else f"blocks of {rows} rows"

    def loss_shape(self, tensors: Sequence[Any]) -> tuple[int, ...]:
        return tensors[0].shape[0], *tensors[1].shape[1:-1]  # len would specialise a dynamic size

    def state_fields(self, options: CrossEntropyOptions) -> int:
        return state_fields(options)

    def loss_dtype(self, tensors: Sequence[Any]) -> torch.dtype:
        head = Head(*tensors)
        return accumulate_dtype(product_dtype(head, backend_of(head.input)))

    def valid_rows(
        self, backend: Backend, tensors: Sequence[Any], options: CrossEntropyOptions
    ) -> tuple[Tensor | None, Tensor | None]:
        target, weight = tensors[-2], options.token_weight
        indices = not target.is_floating_point()
        if indices:
            valid = counted_target(target, options) != options.ignore_index
        elif weight is None:
            return None, None
        else:
            valid = weight != 0
        if weight is None or not options.with_metrics:
            return rows_that_count(valid, backend)
        # Rows of weight 0 have metrics, too.
        rows = None
        if indices:
            rows, _ = rows_that_count(target != options.ignore_index, backend)
        counts = valid.flatten(1).any(1) if valid.dim() > 1 else valid
        return rows, take_rows(counts, rows)

    def total_weight(self, tensors: Sequence[Any], options: CrossEntropyOptions) -> float | Tensor:
        *_, target, weight = tensors
        if not target.is_floating_point():
            return total_weight(target, weight, options)
        token_weight = options.token_weight
        return target[:, 0].numel() if token_weight is None else token_weight.double().sum()

    def kernels_divide(
        self, backend: Backend, tensors: Sequence[Any], options: CrossEntropyOptions
    ) -> bool:
        return rows_at_once(Head(*tensors), options, backend) > 0

    def compute_rows(self, tensors: Sequence[Any], args: LossArgs) -> Results:
        head, options = Head(*tensors), args.options
        if options.reduction != "mean" and not rows_at_once(head, options, args.backend):
            return _by_classes(head, args)
        rows = max(1, rows_at_once(head, options, args.backend))
        if options.reduction == "mean" and (rows < head.input.shape[0] or options.filter_eps):
            # Otherwise the kernel counts the targets of the only block.
            denominator = loss_denominator(options, self.total_weight(tensors, options))
            args = args._replace(options=replace(options, denominator=denominator))
        return _by_rows(head, rows, args)

    def definition_loss(self, tensors: Sequence[Any], options: CrossEntropyOptions) -> Tensor:
        dtype = self.loss_dtype(tensors)

        def widen(tensor: Any) -> Any:
            floating = isinstance(tensor, Tensor) and tensor.is_floating_point()
            return tensor.to(dtype) if floating else tensor

        options = replace(options, with_metrics=False)
        loss: Tensor = definitions.head_cross_entropy(Head(*map(widen, tensors)), options)
        return loss


def linear_cross_entropy_fallback_reason(
    input: Tensor, linear_weight: Tensor, *_: Any
) -> str | None:
    """Returns why torch's operator has to compute these arguments, None if a kernel can."""
    few = not input.dim() or linear_weight.dim() < 2
    return "input or linear_weight has too few dimensions" if few else None


def _head(arguments: Arguments) -> tuple[Head, CrossEntropyOptions]:
    *tensors, options = arguments
    return Head(*tensors), options


def _rows(head: Head, token_weight: Tensor | None) -> tuple[Head, Tensor | None]:
    """Returns the head and its token weights for rows (N, D), cast as autocast does."""
    return head._replace(input=in_autocast_dtype(head.input)).as_rows(token_weight)


def _result_dtype(head: Head, options: CrossEntropyOptions) -> torch.dtype:
    if options.loss_dtype is not None:
        return options.loss_dtype
    dtype, target = autocast_dtype(head.input.dtype, head.input.device), head.target
    return torch.promote_types(dtype, target.dtype) if target.is_floating_point() else dtype


# ---- loss and gradients --------------------------------------------------------------------------


def _by_rows(head: Head, rows: int, args: LossArgs) -> Results:
    """Computes the results by blocks of rows with all classes."""
    backend, options, outputs, grad_output, _, counts = args
    target, classes = head.target, head.linear_weight.shape[:-1]
    dtype, states = product_dtype(head, backend), list[Tensor]()
    needs_target = outputs.gradients[4:] == (True,)
    grad_target = torch.empty_like(target) if needs_target else None

    def step(block: Block, args: LossArgs) -> tuple[Tensor | None, Tensor | None]:
        _, options, outputs, grad_output, *_ = args
        targets = target[block.rows]
        targets = targets.to(dtype) if targets.is_floating_point() else targets
        capped_logits, cap_backward = capped(backend, block.logits, options.softcap, rounds=True)
        logits = capped_logits.view(-1, *classes)
        if options.with_metrics:
            fields = state_fields(options)
            state = metrics_state(backend, logits, targets, options, fields)
            states.append(state.flatten(1))
        loss, (grad_logits, grad_targets) = cross_entropy_once(
            backend, logits, targets, head.weight, options, outputs, grad_output
        )
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
        scale = head.input.new_ones(()) if grad_output is None else grad_output.abs()
        divisor = options.denominator if options.reduction == "mean" else 1.0
        filter_below = options.filter_eps * scale / divisor
    weight, bias, adapter_weight = head[1:4]
    weights = [x.flatten(0, -2) for x in (weight, adapter_weight) if x is not None]
    layer = Layer(head.input, weights, None if bias is None else bias.flatten(), dtype, counts)
    loss, gradients = loss_over_rows(layer, rows, args, step, filter_below)
    state = torch.cat(states, 1).unflatten(1, (target.shape[0], *classes[1:])) if states else None
    if not gradients:
        return loss, (), state
    pairs = zip(gradients, head[:4], strict=True)
    grad_layer = [None if x is None or t is None else x.view_as(t) for x, t in pairs]
    return loss, (*grad_layer, grad_target), state


def _by_classes(head: Head, args: LossArgs) -> Results:
    """Computes the results by blocks of classes.

    The gradients need the state over all classes, so the backward pass computes them.
    """
    backend, options, outputs, grad_output, state, _ = args
    target, classes = counted_target(head.target, options), head.linear_weight.shape[0]
    dtype = product_dtype(head, backend)
    weight = kernel_weight(head.weight, dtype)
    size = tile_size(head.input.shape, dtype, options.memory_budget, backend)
    state_options = StateOptions(options.rows, ClassRange(0, classes), state_fields(options), size)
    rows = head.target if state is None and options.with_metrics else target
    states = LayerStates(backend, head._replace(weight=weight, target=rows), state_options)
    if state is None:
        state, _ = states.state()
        loss = state_loss(state, target, weight, options, classes)
        loss = loss if options.reduction == "none" else loss.sum(dtype=torch.float64)
        return loss, (), state
    assert grad_output is not None
    grad_output = grad_output.expand(target.shape[0])
    grad_results = state_loss_gradients(state, target, weight, options, classes, grad_output)
    filter_below = options.filter_eps * grad_output.abs() if options.filter_eps else None
    needs = outputs.gradients
    gradients = states.gradients(needs, state, grad_results, filter_below=filter_below)
    return None, (*gradients, None), state
