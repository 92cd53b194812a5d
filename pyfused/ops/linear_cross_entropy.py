"""Cross-entropy of a linear layer's output, without that output: the operator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyfused import checks
from pyfused.backends import Backend, backend_of, cross_entropy_once
from pyfused.dispatch.autograd import in_autocast_dtype
from pyfused.dispatch.operator import Arguments, parameters_of
from pyfused.layout import accumulate_dtype, of_leading
from pyfused.ops import definitions, shards
from pyfused.ops.chunk_sizes import product_dtype, rows_at_once, tile_of
from pyfused.ops.cross_entropy import options_fallback_reason
from pyfused.ops.heads import (
    Block,
    Layer,
    StateOptions,
    capped,
    counted_rows,
    gradients_of,
    loss_over_rows,
    state_of,
)
from pyfused.ops.metrics import Metrics, of_state
from pyfused.ops.row_loss import Results, RowLoss, tensors_of
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

    def check_call(self, arguments: Arguments) -> HeadOptions:
        head, options = _head_of(arguments)
        self.check_arguments(head, options)
        normalized: HeadOptions = checks.normalized(options)
        return normalized

    def arranged(self, arguments: Arguments) -> tuple[Any, ...]:
        head, options = _head_of(arguments)
        checks.values_of_options(options.token_weight, options.denominator)
        (input,) = in_autocast_dtype(head.input.device.type, head.input)
        head, options = head._replace(input=input).as_rows(options)
        if not head.target.is_floating_point():
            head = head._replace(target=head.target.to(torch.int64))
        return *head, *tensors_of(options)

    def finished(self, results: Any, arguments: Arguments) -> Any:
        (loss, state), (head, options) = results, _head_of(arguments)
        leading, dtype = head.input.shape[:-1], _dtype_of_loss(head, options)
        wide, loss = loss.dtype, of_leading(loss, leading)
        loss = loss if loss.dtype is dtype else loss.to(dtype)
        if not options.with_metrics:
            return loss
        target = self.arranged(arguments)[3]
        metrics = of_state(state, target, options.ignore_index, wide)
        return loss, Metrics(*(of_leading(each, leading) for each in metrics))

    def of_classes(self, arguments: Arguments, classes: ClassRange, shard: VocabShard) -> Any:
        head, options = _head_of(arguments)
        options = replace(options, loss_dtype=_dtype_of_loss(head, options))
        tensors = *in_autocast_dtype(head.input.device.type, head.input), *head[1:4]
        return shards.cross_entropy(tensors, head.weight, options, classes, shard)

    def check_shapes(self, arguments: Arguments, classes: int) -> None:
        self.check_arguments(*_head_of(arguments), False, classes)

    def check(self, arguments: Arguments) -> None:
        head, options = _head_of(arguments)
        self.check_arguments(head, options)
        checks.class_indices(len(head.linear_weight), head.target, options.ignore_index)

    def strategy_of(self, arguments: Arguments) -> str:
        head, options = _head_of(arguments)
        head, options = head.as_rows(options)
        (input,) = in_autocast_dtype(head.input.device.type, head.input)
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

    def counted(
        self, backend: Backend, tensors: Sequence[Any], options: HeadOptions
    ) -> tuple[Tensor | None, float | Tensor]:
        *_, target, weight = tensors
        if not target.is_floating_point():
            rows = counted_rows(target, options.ignore_index, backend)
            return rows, weight_of_targets(target, weight, options)
        token_weight = options.token_weight
        return None, target[:, 0].numel() if token_weight is None else token_weight.double().sum()

    def compute_rows(
        self,
        backend: Backend,
        tensors: Sequence[Any],
        options: HeadOptions,
        outputs: Outputs,
        grad_output: Tensor | None,
        state: Tensor | None,
    ) -> Results:
        head = Head(*tensors)
        rows = rows_at_once(head, options, backend)
        if rows:
            return _by_rows(backend, head, options, outputs, grad_output, rows)
        return _by_classes(backend, head, options, outputs, grad_output, state)

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


def _dtype_of_loss(head: Head, options: HeadOptions) -> torch.dtype:
    if options.loss_dtype is not None:
        return options.loss_dtype
    dtype, target = head.input.dtype, head.target
    if dtype is not torch.float64 and torch.is_autocast_enabled(head.input.device.type):
        dtype = torch.float32
    return torch.promote_types(dtype, target.dtype) if target.is_floating_point() else dtype


# ---- loss and gradients --------------------------------------------------------------------------


def _by_rows(
    backend: Backend,
    head: Head,
    options: HeadOptions,
    outputs: Outputs,
    grad_output: Tensor | None,
    rows: int,
) -> Results:
    """Returns the results from all logits of some rows at a time."""
    target, classes = head.target, head.linear_weight.shape[:-1]
    dtype = product_dtype(head, backend)
    *of_layer, of_target = outputs.gradients or (False,) * 4
    of_logits = Outputs(outputs.loss, (any(of_layer), of_target), True)
    grad_target = torch.empty_like(target) if of_target else None
    states = []

    def step(
        block: Block, token_weight: Tensor | None, grad_output: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        of_block = replace(options, token_weight=token_weight)
        targets = target[block.rows]
        targets = targets.to(dtype) if targets.is_floating_point() else targets
        logits, uncapped = capped(backend, block.logits, options.softcap, rounds=True)
        of_classes = logits.view(-1, *classes)
        if options.with_metrics:
            state = state_of_metrics(backend, of_classes, targets, of_block)
            states.append(state.flatten(1))
        loss, (gradient, of_targets) = cross_entropy_once(
            backend, of_classes, targets, head.weight, of_block, of_logits, grad_output
        )
        if grad_target is not None and of_targets is not None:
            grad_target[block.rows] = of_targets
        return loss, None if gradient is None else uncapped(gradient.view_as(logits))

    filter_below = None
    if options.filter_eps:
        one = head.input.new_ones(()) if grad_output is None else grad_output.abs()
        filter_below = options.filter_eps * one
    bias = None if head.linear_bias is None else head.linear_bias.flatten()
    layer = Layer(head.input, head.linear_weight.flatten(0, -2), bias)
    loss, gradients = loss_over_rows(
        *(backend, layer, dtype, rows, of_layer, options, grad_output, step),
        filter_below=filter_below,
    )
    pairs = zip(gradients, head[:3], strict=True)
    in_shape = [None if x is None or like is None else x.view_as(like) for x, like in pairs]
    state = torch.cat(states, 1).unflatten(1, (len(target), *classes[1:])) if states else None
    return loss, (*in_shape, grad_target) if outputs.gradients else (), state


def _by_classes(
    backend: Backend,
    head: Head,
    options: HeadOptions,
    outputs: Outputs,
    grad_output: Tensor | None,
    state: Tensor | None,
) -> Results:
    """Returns the results from logits of some classes at a time.

    The gradients need the state of all classes, so that they are left to the backward pass.
    """
    dtype, classes = product_dtype(head, backend), len(head.linear_weight)
    weight, tile = accumulated(head.weight, dtype), tile_of(head, options, backend)
    by_tiles = StateOptions(options.rows, ClassRange(0, classes), fields_of(options), (tile, tile))
    if state is None:
        state, _ = state_of(backend, head[:4], by_tiles, weight)
        loss = loss_of_state(state, head.target, weight, options, classes)
        loss = loss if options.reduction == "none" else loss.sum(dtype=torch.float64)
        return loss, (), state
    assert grad_output is not None
    grad_output = grad_output.expand(len(head.target))
    grad_results = gradients_of_loss(state, head.target, weight, options, classes, grad_output)
    given = backend, head[:4], by_tiles, outputs.gradients, state, grad_results
    filter_below = options.filter_eps * grad_output.abs() if options.filter_eps else None
    gradients = gradients_of(*given, weight=weight, filter_below=filter_below)
    return None, (*gradients, None), state
