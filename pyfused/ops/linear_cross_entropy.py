"""Cross-entropy of a linear layer's output, without that output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from pyfused import checks
from pyfused.backends import CrossEntropyOptions, Gradients, Head, Shaping
from pyfused.backends.layout import accumulate_dtype
from pyfused.ops import definitions
from pyfused.ops.chunked import (
    Wanted,
    by_rows,
    each_of_sums,
    gradients_by_blocks,
    product_dtype,
    rows_at_once,
    sums_by_blocks,
    tile_of,
    weight_of_targets,
)
from pyfused.ops.declaration import Arguments, Operator
from pyfused.ops.dispatch import FORCED, SMALL, backend_of, is_traced
from pyfused.ops.gradients import (
    backward,
    differentiate,
    gradients_ahead,
    without_functorch,
)
from pyfused.ops.metrics import Blocks, Measured, Metrics

# Logits below which torch is faster, which makes them all and takes no chunks.
SMALL_BELOW = 1 << 15


class Call(NamedTuple):
    """What a call has beside the tensors of its head."""

    options: CrossEntropyOptions
    memory_budget: int | None
    filter_eps: float
    return_metrics: bool = False


@dataclass(eq=False, kw_only=True, repr=False)
class LinearCrossEntropy(Operator):
    """Of a linear layer's output."""

    def fused(self, arguments: Arguments, inplace: bool) -> Any:  # noqa: ARG002
        head, call = _read(arguments)
        checks.linear_cross_entropy(head, *call[:3])
        device, dtype = head.input.device.type, _dtype_of_loss(head, call.options)
        autocast: AbstractContextManager[Any] = nullcontext()
        if torch.is_autocast_enabled(device):
            head = _cast(head, torch.get_autocast_dtype(device))
            autocast = torch.autocast(device, enabled=False)
        compiled = is_dynamo_compiling() or is_traced(head.input)
        if not compiled:
            _check_indices(head, call.options)
        lone = head.input.dim() == 1
        if lone:
            head, call = _as_batch(head, call)
        if not head.target.is_floating_point():
            head = head._replace(target=head.target.to(torch.int64))
        with autocast:
            loss, *metrics = _run(head, call)
        if lone:
            loss, *metrics = (found.reshape(()) for found in (loss, *metrics))
        loss = loss if loss.dtype is dtype else loss.to(dtype)
        return (loss, Metrics(*metrics)) if metrics else loss

    def check(self, arguments: Arguments) -> None:
        head, call = _read(arguments)
        checks.linear_cross_entropy(head, *call[:3])
        checks.class_indices(len(head.linear_weight), head.target, call.options.ignore_index)

    def strategy(self, input: Tensor) -> str:  # noqa: ARG002
        return "some logits at a time"


def linear_cross_entropy_fallback_reason(
    input: Tensor, linear_weight: Tensor, *rest: Any
) -> str | None:
    """Why torch's operator is the one for these arguments."""
    compiled = is_dynamo_compiling() or is_traced(input)
    if input.dim() not in (1, 2) or linear_weight.dim() < 2:
        return "input is neither (D) nor (N, D)"
    denominator, *_, return_metrics = rest[-7:]
    if compiled and return_metrics:
        return "torch.compile: metrics are Inductor's"
    if isinstance(denominator, Tensor):
        if compiled:
            return "torch.compile: denominator is a tensor"
        if denominator.requires_grad:
            return "denominator requires grad"
    if compiled or FORCED is not None:
        return None
    rows = input.shape[0] if input.dim() == 2 else 1
    return SMALL if rows * linear_weight[..., 0].numel() < SMALL_BELOW else None


def _read(arguments: Arguments) -> tuple[Head, Call]:
    input, linear_weight, target, linear_bias, weight, reduction, ignore_index, *rest = arguments
    label_smoothing, _, memory_budget, z_loss, softcap, *rest = rest
    token_weight, denominator, loss_dtype, margin, margin_kind, scale, *last = rest
    options = CrossEntropyOptions(
        -100 if ignore_index is None else ignore_index,
        reduction,
        label_smoothing,
        0.0,
        z_loss,
        token_weight,
        denominator,
        loss_dtype,
    )
    shaping = Shaping(softcap, margin, margin_kind, scale)
    head = Head(input, linear_weight, linear_bias, target, weight, shaping)
    return head, Call(options, memory_budget, *last)


def _check_indices(head: Head, options: CrossEntropyOptions) -> None:
    """Unless a GPU would have to be waited for, where the loss is NaN instead."""
    if head.target.is_cpu and not head.target.is_floating_point():
        checks.class_indices(len(head.linear_weight), head.target, options.ignore_index)


def _as_batch(head: Head, call: Call) -> tuple[Head, Call]:
    """One row as a batch of one."""
    options = call.options
    probabilities, token_weight = head.target.is_floating_point(), options.token_weight
    target = head.target[None] if probabilities else head.target.reshape(1)
    if token_weight is not None:
        options = options._replace(token_weight=token_weight.reshape(1))
    return head._replace(input=head.input[None], target=target), call._replace(options=options)


def _dtype_of_loss(head: Head, options: CrossEntropyOptions) -> torch.dtype:
    if options.loss_dtype is not None:
        return options.loss_dtype
    autocast = torch.is_autocast_enabled(head.input.device.type)
    dtype, target = torch.float32 if autocast else head.input.dtype, head.target
    return torch.promote_types(dtype, target.dtype) if target.is_floating_point() else dtype


def _cast(head: Head, dtype: torch.dtype) -> Head:
    bias = head.linear_bias
    return head._replace(
        input=head.input.to(dtype),
        linear_weight=head.linear_weight.to(dtype),
        linear_bias=None if bias is None else bias.to(dtype),
    )


def _run(head: Head, call: Call) -> tuple[Tensor, ...]:
    """The loss, and the metrics where they are wanted."""
    if is_dynamo_compiling() or is_traced(head.input):
        options = call.options
        rest = *options[:3], options.z_loss, options.token_weight, options.denominator
        given = *head[:5], *head.shaping, *rest, call.memory_budget, call.filter_eps
        return (torch.ops.pyfused.linear_cross_entropy(*given),)
    tensors = (tensor for tensor in head[:4] if tensor is not None)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _apply(call, *head)  # type: ignore[no-any-return]
    found = _loss(call, head)
    return found.loss, *found.metrics


# ---- loss and gradients --------------------------------------------------------------------------


class Targets(NamedTuple):
    """The rows that count, where others are left out, and what a mean divides by."""

    kept: Tensor | None
    denominator: float | Tensor


def _targets(head: Head, options: CrossEntropyOptions) -> Targets:
    """Ignored rows are left out where nobody waits for that, unless none is left then."""
    input, _, _, target, weight, _ = head
    token_weight = options.token_weight
    if target.is_floating_point():
        positions = target[:, 0].numel()
        counted = positions if token_weight is None else token_weight.sum(dtype=torch.float64)
        return Targets(None, _divisor(options, counted))
    kept = None
    if input.is_cpu:
        counts = target != options.ignore_index
        rows = counts if counts.dim() == 1 else counts.flatten(1).any(1)
        found = rows.nonzero().flatten()
        kept = found if 0 < len(found) < len(rows) else None
    return Targets(kept, _divisor(options, weight_of_targets(target, weight, options)))


def _divisor(options: CrossEntropyOptions, counted: float | Tensor) -> float | Tensor:
    if options.reduction != "mean":
        return 1.0
    given = counted if options.denominator is None else options.denominator
    return given.reshape(()) if isinstance(given, Tensor) else given


def _keep(
    head: Head, options: CrossEntropyOptions, kept: Tensor | None
) -> tuple[Head, CrossEntropyOptions]:
    if kept is None:
        return head, options
    if options.token_weight is not None:
        options = options._replace(token_weight=options.token_weight[kept])
    return head._replace(input=head.input[kept], target=head.target[kept]), options


def _spread(values: Tensor, kept: Tensor | None, n: int, others: int = 0) -> Tensor:
    """Those of all rows: zeros, or what is given, for those left out."""
    if kept is None:
        return values
    return values.new_full((n, *values.shape[1:]), others).index_copy_(0, kept, values)


def _of_all_rows(found: Gradients, kept: Tensor | None, n: int) -> Gradients:
    """Of the gradients the input's is one of rows."""
    return (None if found[0] is None else _spread(found[0], kept, n), *found[1:])


class Found(NamedTuple):
    """Attributes:
    lse: The log-sum-exp of each row, where a backward pass needs it.
    gradients: Where they are wanted now.
    metrics: Of all rows, or ().
    """

    loss: Tensor
    lse: Tensor | None
    gradients: Gradients | None
    metrics: Metrics | tuple[()]


def _loss(call: Call, head: Head, wanted: Wanted | None = None) -> Found:
    options, n, backend = call.options, len(head.input), backend_of(head.input)
    kept, denominator = _targets(head, options)
    part, options = _keep(head, options, kept)
    each, lse, gradients = options.reduction == "none", None, None
    rows = rows_at_once(part, call.memory_budget)
    measured = blocks = None
    loss: Tensor | None
    if rows:
        grad_output = None
        if wanted is not None:
            grad_output = _scalar(1.0, denominator, head)
        if call.return_metrics:
            measured = Measured.empty(math.prod(_shape_of_losses(part)), part.input)
        given = options, rows, True, wanted or Wanted(), grad_output, call.filter_eps, measured
        loss, found = by_rows(backend, part, *given)
        if wanted is not None:
            gradients = _of_all_rows(found, kept, n)
    else:
        tile = tile_of(part, call.memory_budget)
        if call.return_metrics:
            blocks = Blocks(len(part.input), part.input)
            measured = blocks.measured
        lse, target_logits = sums_by_blocks(backend, part, options, tile, blocks=blocks)
        loss = each_of_sums(options, part.target, part.weight, lse, target_logits)
        loss = loss if each else loss.sum(dtype=torch.float64)
    assert loss is not None
    loss = _spread(loss, kept, n) if each else loss / denominator
    assert loss is not None
    metrics: Metrics | tuple[()] = ()
    if measured is not None:
        metrics = _metrics(measured, part, options, kept, n)
    return Found(loss.to(_sums_dtype(head)), lse, gradients, metrics)


def _metrics(
    measured: Measured, part: Head, options: CrossEntropyOptions, kept: Tensor | None, n: int
) -> Metrics:
    found = measured.metrics(part.target, options, _sums_dtype(part))
    others = {"prediction": options.ignore_index}
    return Metrics(
        *(_spread(values, kept, n, others.get(name, 0)) for name, values in found._asdict().items())
    )


def _shape_of_losses(head: Head) -> tuple[int, ...]:
    return len(head.input), *head.linear_weight.shape[1:-1]


def _sums_dtype(head: Head) -> torch.dtype:
    return accumulate_dtype(product_dtype(head))


def _scalar(value: Tensor | float, denominator: Tensor | float, head: Head) -> Tensor:
    value = torch.as_tensor(value, dtype=torch.float64, device=head.input.device)
    return value / denominator


class LinearCrossEntropyFunction(torch.autograd.Function):
    """The gradients of a scalar are computed by the forward pass, where it goes by rows.

    Otherwise the backward pass makes the logits once more. So it does for float16, whose gradient
    would underflow without grad_output.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, *head: Any) -> tuple[Tensor, ...]:
        given = Head(*head)
        ahead = gradients_ahead(call.options.reduction, given.input)
        wanted = Wanted(*ctx.needs_input_grad[1:5]) if ahead else None
        loss, lse, ctx.gradients, metrics = _loss(call, given, wanted)
        ctx.call, ctx.shaping, ctx.backend = call, given.shaping, backend_of(given.input)
        ctx.save_for_backward(*given[:5], lse)
        ctx.mark_non_differentiable(*metrics)
        return loss, *metrics

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        found = backward("linear_cross_entropy", ctx, grad_output, _kernel, _definition)
        return None, *found, None, None


_apply = without_functorch(LinearCrossEntropyFunction)


def _saved(ctx: Any) -> tuple[Head, Tensor | None]:
    *tensors, lse = ctx.saved_tensors
    return Head(*tensors)._replace(shaping=ctx.shaping), lse


def _kernel(ctx: Any, grad_output: Tensor) -> Gradients:
    head, lse = _saved(ctx)
    return _gradients(ctx.call, head, Wanted(*ctx.needs_input_grad[1:5]), lse, grad_output)


def _gradients(
    call: Call, head: Head, wanted: Wanted, lse: Tensor | None, grad_output: Tensor
) -> Gradients:
    options, n, backend = call.options, len(head.input), backend_of(head.input)
    kept, denominator = _targets(head, options)
    part, options = _keep(head, options, kept)
    each = options.reduction == "none"
    grad_output = grad_output if each else _scalar(grad_output, denominator, head)
    grad_output = grad_output[kept] if each and kept is not None else grad_output
    rows = rows_at_once(part, call.memory_budget)
    if rows:
        given = options, rows, False, wanted, grad_output, call.filter_eps
        _, found = by_rows(backend, part, *given)
    else:
        tile = tile_of(part, call.memory_budget)
        if lse is None:
            lse, _ = sums_by_blocks(backend, part, options, tile)
        grad_output = grad_output.expand(len(lse))
        arguments = grad_output, call.filter_eps
        found = gradients_by_blocks(backend, part, options, tile, wanted, lse, *arguments)
    return _of_all_rows(found, kept, n)


def _definition(ctx: Any, grad_output: Tensor) -> Gradients:
    head, _ = _saved(ctx)
    return _of_definition(head, ctx.call.options, ctx.needs_input_grad[1:5], grad_output)


def _of_definition(
    head: Head, options: CrossEntropyOptions, wanted: Sequence[bool], grad_output: Tensor
) -> Gradients:
    """The gradients in torch's own terms, themselves differentiable."""

    def widened(tensor: Any) -> Any:
        floating = isinstance(tensor, Tensor) and tensor.is_floating_point()
        return tensor.to(grad_output.dtype) if floating else tensor

    def definition(*tensors: Any) -> Tensor:
        loss: Tensor = definitions.of_logits(Head(*map(widened, (*tensors, *head[4:]))), options)
        return loss

    return differentiate(definition, head[:4], wanted, grad_output)


# ---- custom operators, which only a compiler sees ------------------------------------------------

_ARGUMENTS = (
    "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight, "
    "float? softcap, float margin, str margin_kind, float scale, "
    "int ignore_index, str reduction, float label_smoothing, float z_loss, "
    "Tensor? token_weight, float? denominator, int? memory_budget, float filter_eps"
)
_LIBRARY = torch.library.Library("pyfused", "FRAGMENT")
_LIBRARY.define(f"linear_cross_entropy({_ARGUMENTS}) -> Tensor")
_LIBRARY.define(
    f"linear_cross_entropy_backward(Tensor grad_output, {_ARGUMENTS}, bool[4] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def _called(given: tuple[Any, ...]) -> tuple[Call, Head]:
    """From an operator's arguments."""
    head, shaping = given[:5], Shaping(*given[5:9])
    ignore_index, reduction, smoothing, *beyond, memory_budget, filter_eps = given[9:]
    options = CrossEntropyOptions(ignore_index, reduction, smoothing, 0.0, *beyond)
    return Call(options, memory_budget, filter_eps), Head(*head)._replace(shaping=shaping)


def _operator(*given: Any) -> Tensor:
    call, head = _called(given)
    _check_indices(head, call.options)
    return _loss(call, head).loss


def _operator_backward(grad_output: Tensor, *given: Any) -> tuple[Tensor, ...]:
    call, head = _called(given[:-1])
    found = _gradients(call, head, Wanted(*given[-1]), None, grad_output)
    return tuple(head.input.new_empty(0) if gradient is None else gradient for gradient in found)


def _fake(*given: Any) -> Tensor:
    call, head = _called(given)
    shape: Sequence[int] = ()
    if call.options.reduction == "none":
        shape = _shape_of_losses(head)
    return head.input.new_empty(shape, dtype=_sums_dtype(head))


def _fake_backward(_grad_output: Tensor, *given: Any) -> tuple[Tensor, ...]:
    _, head = _called(given[:-1])
    return tuple(
        torch.empty_like(of, memory_format=torch.contiguous_format)
        if want and of is not None
        else head.input.new_empty(0)
        for of, want in zip(head[:4], given[-1], strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.numbers = inputs[5:13], inputs[14:]
    ctx.save_for_backward(*inputs[:5], inputs[13])


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    *head, token_weight = ctx.saved_tensors
    before, after = ctx.numbers
    given = (*head, *before, token_weight, *after)
    wanted = ctx.needs_input_grad[:4]
    if torch.is_grad_enabled():
        call, of = _called(given)
        found: Sequence[Tensor | None] = _of_definition(of, call.options, wanted, grad_output)
    else:
        found = torch.ops.pyfused.linear_cross_entropy_backward(grad_output, *given, wanted)
    kept = (gradient if want else None for gradient, want in zip(found, wanted, strict=True))
    return *kept, *[None] * 13


_LIBRARY.impl("linear_cross_entropy", _operator, "CPU")
_LIBRARY.impl("linear_cross_entropy_backward", _operator_backward, "CPU")
torch.library.register_fake("pyfused::linear_cross_entropy", _fake, lib=_LIBRARY)
torch.library.register_fake("pyfused::linear_cross_entropy_backward", _fake_backward, lib=_LIBRARY)
torch.library.register_autograd(
    "pyfused::linear_cross_entropy", _backward, setup_context=_save, lib=_LIBRARY
)
