"""Cross-entropy of a linear layer's output, without that output: the operator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyfused import checks
from pyfused.backends import backend_of, cross_entropy_once
from pyfused.dispatch.autograd import in_autocast_dtype
from pyfused.dispatch.call import is_compiled
from pyfused.dispatch.operator import Arguments, parameters_of
from pyfused.layout import accumulate_dtype, of_leading
from pyfused.ops import definitions
from pyfused.ops import shards as vocab_parallel
from pyfused.ops.chunk_sizes import product_dtype, rows_at_once, tile_of
from pyfused.ops.chunked import (
    Chunk,
    ChunkResults,
    CountedRows,
    Layer,
    LossArguments,
    StateOptions,
    by_rows,
    capped,
    counted_rows,
    gradients_of,
    state_of,
)
from pyfused.ops.cross_entropy import options_fallback_reason
from pyfused.ops.metrics import Metrics, of_state
from pyfused.ops.row_loss import Computed, RowLoss
from pyfused.ops.row_state import (
    accumulated,
    fields_of,
    gradients_of_loss,
    loss_of_state,
    state_of_metrics,
    weight_of_targets,
)
from pyfused.ops.shards import ShardedOperator
from pyfused.types import ClassRange, Head, HeadOptions, Outputs, VocabShard

# Before torch 2.13 there is none to patch.
_OF_TORCH = tuple(parameters_of(getattr(F, "linear_cross_entropy", lambda: None)))


@dataclass(eq=False, kw_only=True, repr=False)
class LinearCrossEntropy(RowLoss, ShardedOperator):
    """Cross-entropy of a linear layer's output."""

    options = HeadOptions

    def bind(self, *arguments: Any, **by_name: Any) -> Arguments:
        named = dict(zip(_OF_TORCH, arguments, strict=False)) | by_name
        if named.get("ignore_index") is None:
            named["ignore_index"] = -100
        torch_options = named.pop("options", None)
        tensors = [named.pop(operand.name, None) for operand in self.operands]
        return *tensors, torch_options, HeadOptions(**named)

    def fused(self, arguments: Arguments, inplace: bool) -> Any:  # noqa: ARG002
        head, options = _checked(arguments)
        options = checks.normalized(options)
        dtype = _dtype_of_loss(head, options)
        without_autocast, (input,) = in_autocast_dtype(head.input.device.type, head[:1])
        head = head._replace(input=input)
        if not is_compiled(head.input):
            self.check_indices(head, options)
        leading = head.input.shape[:-1]
        head, options = head.as_rows(options)
        if not head.target.is_floating_point():
            head = head._replace(target=head.target.to(torch.int64))
        with without_autocast:
            loss, state = self.run(head, options)
        loss = of_leading(loss, leading)
        of_call = loss if loss.dtype is dtype else loss.to(dtype)
        if not options.with_metrics:
            return of_call
        metrics = of_state(state, head.target, options.ignore_index, loss.dtype)
        return of_call, Metrics(*(of_leading(each, leading) for each in metrics))

    def of_classes(self, arguments: Arguments, classes: ClassRange, shard: VocabShard) -> Any:
        head, options = _head_of(arguments)
        options = replace(options, loss_dtype=_dtype_of_loss(head, options))
        without_autocast, (input,) = in_autocast_dtype(head.input.device.type, head[:1])
        with without_autocast:
            tensors = input, *head[1:4]
            return vocab_parallel.cross_entropy(tensors, head.weight, options, classes, shard)

    def check_shapes(self, arguments: Arguments, classes: int) -> None:
        checks.linear_cross_entropy(*_head_of(arguments), False, classes)

    def check(self, arguments: Arguments) -> None:
        head, options = _checked(arguments)
        checks.class_indices(len(head.linear_weight), head.target, options.ignore_index)

    def strategy_of(self, arguments: Arguments) -> str:
        head, options = _head_of(arguments)
        head, options = head.as_rows(options)
        _, (input,) = in_autocast_dtype(head.input.device.type, head[:1])
        rows = rows_at_once(head._replace(input=input), options, backend_of(input))
        if not rows:
            return "logits of some classes at a time"
        return "all logits at once" if rows >= len(input) else f"logits of {rows} rows at a time"

    def losses(self, tensors: Sequence[Any]) -> tuple[int, ...]:
        return tensors[0].shape[0], *tensors[1].shape[1:-1]  # len would fix a dynamic size

    def fields(self, options: HeadOptions) -> int:
        return fields_of(options)

    def check_indices(self, tensors: Sequence[Any], options: HeadOptions) -> None:
        _, linear_weight, _, target, _ = tensors
        if not target.is_floating_point():
            classes, backend = len(linear_weight), backend_of(target)
            backend.check_class_indices(target.to(torch.int64), classes, options.ignore_index)

    def loss_dtype(self, tensors: Sequence[Any]) -> torch.dtype:
        head = Head(*tensors)
        return accumulate_dtype(product_dtype(head, backend_of(head.input)))

    def counted(self, arguments: LossArguments) -> tuple[CountedRows, float | Tensor]:
        (*_, target, weight), options = arguments.tensors, arguments.options
        if not target.is_floating_point():
            rows = counted_rows(target, options.ignore_index, arguments.backend)
            return rows, weight_of_targets(target, weight, options)
        token_weight = options.token_weight
        total = target[:, 0].numel() if token_weight is None else token_weight.double().sum()
        return CountedRows(len(target)), total

    def compute_rows(self, arguments: LossArguments) -> Computed:
        head = Head(*arguments.tensors)
        rows = rows_at_once(head, arguments.options, arguments.backend)
        return _by_rows(arguments, head, rows) if rows else _by_classes(arguments, head)

    def in_torch(self, tensors: Sequence[Any], options: HeadOptions) -> Tensor:
        dtype = self.loss_dtype(tensors)

        def widened(tensor: Any) -> Any:
            floating = isinstance(tensor, Tensor) and tensor.is_floating_point()
            return tensor.to(dtype) if floating else tensor

        plain = replace(options, with_metrics=False)
        loss: Tensor = definitions.of_logits(Head(*map(widened, tensors)), plain)
        return loss


def linear_cross_entropy_fallback_reason(
    input: Tensor,
    linear_weight: Tensor,
    *others: Any,
) -> str | None:
    """Returns why torch's operator is the one for these arguments."""
    if not input.dim() or linear_weight.dim() < 2:
        return "input or linear_weight has too few dimensions"
    return options_fallback_reason(input, others[-1])


def _head_of(arguments: Arguments) -> tuple[Head, HeadOptions]:
    *tensors, _, options = arguments
    return Head(*tensors), options


def _checked(arguments: Arguments) -> tuple[Head, HeadOptions]:
    head, options = _head_of(arguments)
    checks.linear_cross_entropy(head, options)
    return head, options


def _dtype_of_loss(head: Head, options: HeadOptions) -> torch.dtype:
    if options.loss_dtype is not None:
        return options.loss_dtype
    dtype, target = head.input.dtype, head.target
    if dtype is not torch.float64 and torch.is_autocast_enabled(head.input.device.type):
        dtype = torch.float32
    return torch.promote_types(dtype, target.dtype) if target.is_floating_point() else dtype


# ---- loss and gradients --------------------------------------------------------------------------


def _by_rows(arguments: LossArguments, head: Head, rows: int) -> Computed:
    """Returns the results from all logits of some rows at a time."""
    backend, _, _, outputs, *_ = arguments
    target, classes = head.target, head.linear_weight.shape[:-1]
    dtype = product_dtype(head, backend)
    *of_layer, of_target = outputs.gradients or (False,) * 4
    of_logits = Outputs(outputs.loss, (any(of_layer), of_target), True)
    grad_target = torch.empty_like(target) if of_target else None
    states = []

    def of_chunk(chunk: Chunk, part: LossArguments) -> ChunkResults:
        options, grad_output = part.options, part.grad_output
        targets = target[chunk.rows]
        targets = targets.to(dtype) if targets.is_floating_point() else targets
        logits, uncapped = capped(backend, chunk.output, options.softcap, rounds=True)
        of_classes = logits.view(-1, *classes)
        if options.with_metrics:
            state = state_of_metrics(backend, of_classes, targets, options)
            states.append(state.flatten(1))
        loss, (gradient, of_targets) = cross_entropy_once(
            backend, of_classes, targets, head.weight, options, of_logits, grad_output
        )
        if grad_target is not None and of_targets is not None:
            grad_target[chunk.rows] = of_targets
        if gradient is None:
            return ChunkResults(loss)
        least = None
        if options.filter_eps:
            least = logits.new_ones(()) if grad_output is None else grad_output
            least = options.filter_eps * least.abs()
        return ChunkResults(loss, uncapped(gradient.view_as(logits)), least)

    bias = None if head.linear_bias is None else head.linear_bias.flatten()
    layer = Layer(head.input, head.linear_weight.flatten(0, -2), bias)
    loss, gradients = by_rows(arguments, layer, dtype, rows, of_chunk)
    pairs = zip(gradients, head[:3], strict=True)
    in_shape = [None if x is None or like is None else x.view_as(like) for x, like in pairs]
    state = torch.cat(states, 1).unflatten(1, (len(target), *classes[1:])) if states else None
    return Computed(loss, (*in_shape, grad_target) if outputs.gradients else (), state)


def _by_classes(arguments: LossArguments, head: Head) -> Computed:
    """Returns the results from logits of some classes at a time.

    The gradients need the state of all classes, so that they are left to the backward pass.
    """
    backend, _, options, outputs, grad_output, state = arguments
    dtype, classes = product_dtype(head, backend), len(head.linear_weight)
    weight, tile = accumulated(head.weight, dtype), tile_of(head, options, backend)
    by_tiles = StateOptions(options.rows, ClassRange(0, classes), fields_of(options), (tile, tile))
    if state is None:
        state, _ = state_of(backend, head[:4], by_tiles, weight)
        loss = loss_of_state(state, head.target, weight, options, classes)
        loss = loss if options.reduction == "none" else loss.sum(dtype=torch.float64)
        return Computed(loss, (), state)
    assert grad_output is not None
    grad_output = grad_output.expand(len(head.target))
    grad_results = gradients_of_loss(state, head.target, weight, options, classes, grad_output)
    least = options.filter_eps * grad_output.abs() if options.filter_eps else None
    given = backend, head[:4], by_tiles, outputs.gradients, state, grad_results
    gradients = gradients_of(*given, weight=weight, least=least)
    return Computed(None, (*gradients, None))
