"""Cross-entropy of a linear layer's output, without that output: the operator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pyfused import checks
from pyfused.backends import Backend, backend_of
from pyfused.layout import accumulate_dtype, of_leading
from pyfused.ops import TORCH_OPS, definitions, vocab_parallel
from pyfused.ops.chunk_sizes import product_dtype, rows_at_once, tile_of
from pyfused.ops.chunked import (
    GradientsNeeded,
    StateOptions,
    by_rows,
    counted_rows,
    gradients_of,
    of_all_rows,
    spread,
    state_of,
)
from pyfused.ops.cross_entropy import options_fallback_reason
from pyfused.ops.declaration import Arguments, Operator, parameters_of
from pyfused.ops.dispatch import is_compiled
from pyfused.ops.gradients import (
    apply,
    differentiate,
    gradients_in_forward,
    in_autocast_dtype,
    save,
    saved,
    wanted_in_forward,
)
from pyfused.ops.metrics import Metrics, of_state
from pyfused.ops.row_state import (
    accumulated,
    denominator_of,
    fields_of,
    gradients_of_loss,
    loss_of_state,
    weight_of_targets,
)
from pyfused.types import ClassRange, Gradients, Head, HeadOptions

# Before torch 2.13 there is none to patch.
_OF_TORCH = tuple(parameters_of(getattr(F, "linear_cross_entropy", lambda: None)))


@dataclass(eq=False, kw_only=True, repr=False)
class LinearCrossEntropy(Operator):
    """Cross-entropy of a linear layer's output."""

    def bind(self, *arguments: Any, **by_name: Any) -> Arguments:
        given = dict(zip(_OF_TORCH, arguments, strict=False)) | by_name
        if given.get("ignore_index") is None:
            given["ignore_index"] = -100
        torch_options = given.pop("options", None)
        tensors = [given.pop(operand.name, None) for operand in self.operands]
        return *tensors, HeadOptions(**given), torch_options

    def fused(self, arguments: Arguments, inplace: bool) -> Any:  # noqa: ARG002
        if (local := self.local_of(arguments)) is not None:
            head, options = _head_of(local.arguments)
            shard = local.shard
            return local.whole(vocab_parallel.cross_entropy(head[:4], head.weight, options, shard))
        head, options = _checked(arguments)
        options = checks.normalized(options)
        dtype = _dtype_of_loss(head, options)
        without_autocast, (input,) = in_autocast_dtype(head.input.device.type, head[:1])
        head = head._replace(input=input)
        if not is_compiled(head.input):
            check_indices(head, options)
        leading = head.input.shape[:-1]
        head, options = head.as_rows(options)
        if not head.target.is_floating_point():
            head = head._replace(target=head.target.to(torch.int64))
        with without_autocast:
            loss, *metrics = _run(head, options)
        loss, *metrics = (of_leading(found, leading) for found in (loss, *metrics))
        loss = loss if loss.dtype is dtype else loss.to(dtype)
        return (loss, Metrics(*metrics)) if metrics else loss

    def local_of(self, arguments: Arguments) -> vocab_parallel.LocalShard | None:
        return vocab_parallel.local_of(self, arguments)

    def check(self, arguments: Arguments) -> None:
        head, options = _checked(arguments)
        checks.class_indices(len(head.linear_weight), head.target, options.ignore_index)

    def strategy(self, input: Tensor) -> str:  # noqa: ARG002
        return "some logits at a time"

    def strategy_of(self, arguments: Arguments) -> str:
        head, options = _head_of(arguments)
        head, options = head.as_rows(options)
        _, (input,) = in_autocast_dtype(head.input.device.type, head[:1])
        rows = rows_at_once(head._replace(input=input), options, backend_of(input))
        if not rows:
            return "logits of some classes at a time"
        return "all logits at once" if rows >= len(input) else f"logits of {rows} rows at a time"


def linear_cross_entropy_fallback_reason(
    input: Tensor,
    linear_weight: Tensor,
    _target: Tensor,
    _linear_bias: Tensor | None,
    _weight: Tensor | None,
    options: HeadOptions,
    _torch_options: Any,
) -> str | None:
    """Returns why torch's operator is the one for these arguments."""
    if not input.dim() or linear_weight.dim() < 2:
        return "input or linear_weight has too few dimensions"
    return options_fallback_reason(input, options)


def _head_of(arguments: Arguments) -> tuple[Head, HeadOptions]:
    input, linear_weight, target, linear_bias, weight, options, _ = arguments
    return Head(input, linear_weight, linear_bias, target, weight), options


def _checked(arguments: Arguments) -> tuple[Head, HeadOptions]:
    head, options = _head_of(arguments)
    checks.linear_cross_entropy(head, options)
    return head, options


def check_indices(head: Head, options: HeadOptions) -> None:
    """Raises for a class index out of range, where reading it does not wait for the device."""
    if not (backend_of(head.input).ASYNCHRONOUS or head.target.is_floating_point()):
        checks.class_indices(len(head.linear_weight), head.target, options.ignore_index)


def _dtype_of_loss(head: Head, options: HeadOptions) -> torch.dtype:
    if options.loss_dtype is not None:
        return options.loss_dtype
    autocast = torch.is_autocast_enabled(head.input.device.type)
    dtype, target = torch.float32 if autocast else head.input.dtype, head.target
    return torch.promote_types(dtype, target.dtype) if target.is_floating_point() else dtype


def _run(head: Head, options: HeadOptions) -> tuple[Tensor, ...]:
    """Returns the loss, and the metrics where they are wanted."""
    if is_compiled(head.input):
        wanted = wanted_in_forward(options.reduction, head[:4])
        found = TORCH_OPS.linear_cross_entropy(*head, *options.values(), wanted)
        return found[0], *(found[5:-1] if options.with_metrics else ())
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in head[:4]]
    if any(needs):
        plan = LinearCrossEntropyPlan(backend_of(head.input), GradientsNeeded(*needs))
        return apply(plan, *head, options)  # type: ignore[no-any-return]
    found = compute(head, options)
    return found.loss, *found.metrics


# ---- loss and gradients --------------------------------------------------------------------------


class Targets(NamedTuple):
    """The rows that count, where others are left out, and what a mean divides by."""

    kept: Tensor | None
    denominator: float | Tensor


def _targets(head: Head, options: HeadOptions, backend: Backend) -> Targets:
    """Ignored rows are left out where nobody waits for that, unless none is left then."""
    target, token_weight = head.target, options.token_weight
    if target.is_floating_point():
        rows = target[:, 0].numel()
        counted = rows if token_weight is None else token_weight.sum(dtype=torch.float64)
        return Targets(None, denominator_of(options, counted))
    kept = counted_rows(target, options.ignore_index, backend)
    return Targets(kept, denominator_of(options, weight_of_targets(target, head.weight, options)))


def _keep(head: Head, options: HeadOptions, kept: Tensor | None) -> tuple[Head, HeadOptions]:
    if kept is None:
        return head, options
    if options.token_weight is not None:
        options = replace(options, token_weight=options.token_weight[kept])
    return head._replace(input=head.input[kept], target=head.target[kept]), options


class Computed(NamedTuple):
    """Holds the results of a call.

    Attributes:
        state: The state of each row, where gradients need it: by blocks of classes.
        gradients: The gradients, where they are needed at once.
        metrics: The metrics of all rows, or ().
    """

    loss: Tensor
    state: Tensor | None
    gradients: Gradients | None
    metrics: Metrics | tuple[()]


def compute(head: Head, options: HeadOptions, needed: GradientsNeeded | None = None) -> Computed:
    """Returns the loss and, where needed, the gradients of a scalar loss, and the metrics."""
    n, backend = len(head.input), backend_of(head.input)
    kept, denominator = _targets(head, options, backend)
    part, part_options = _keep(head, options, kept)
    each, state, gradients = options.reduction == "none", None, None
    rows = rows_at_once(part, options, backend)
    metrics: Metrics | tuple[()] = ()
    if rows:
        grad_output = None if needed is None else _scalar(1.0, denominator, head)
        given = part_options, rows, True, needed or GradientsNeeded(), grad_output
        loss, of_part, found = by_rows(backend, part, *given)
        assert loss is not None
        loss = spread(loss, kept, n) if each else loss
        gradients = None if needed is None else of_all_rows(of_part, kept, n)
        if found is not None:
            of_kept = of_state(found, part.target, options.ignore_index, loss_dtype(part))
            others = {"prediction": options.ignore_index}
            metrics = Metrics(
                *(spread(m, kept, n, others.get(name, 0)) for name, m in of_kept._asdict().items())
            )
    else:
        weight = accumulated(head.weight, product_dtype(head, backend))
        state, _ = state_of(head[:4], _state_options(part, options, backend), weight)
        classes = len(head.linear_weight)
        loss = loss_of_state(state, head.target, weight, options, classes)
        loss = loss if each else loss.sum(dtype=torch.float64)
        if options.with_metrics:
            metrics = of_state(state, head.target, options.ignore_index, loss_dtype(head))
    loss = loss if each else loss / denominator
    return Computed(loss.to(loss_dtype(head)), state, gradients, metrics)


def _state_options(head: Head, options: HeadOptions, backend: Backend) -> StateOptions:
    tile, classes = tile_of(head, options, backend), ClassRange(0, len(head.linear_weight))
    return StateOptions(options.rows, classes, fields_of(options), (tile, tile))


def loss_shape(head: Head) -> tuple[int, ...]:
    """Returns the shape of the losses of the rows."""
    return len(head.input), *head.linear_weight.shape[1:-1]


def loss_dtype(head: Head) -> torch.dtype:
    """Returns the dtype that the loss is computed in."""
    return accumulate_dtype(product_dtype(head, backend_of(head.input)))


def _scalar(value: Tensor | float, denominator: Tensor | float, head: Head) -> Tensor:
    value = torch.as_tensor(value, dtype=torch.float64, device=head.input.device)
    return value / denominator


class LinearCrossEntropyPlan(NamedTuple):
    """Computes calls that need gradients.

    The gradients of a scalar are computed by the forward pass, where it goes by rows. Otherwise the
    backward pass recomputes the logits. So it does for float16, whose gradient would underflow
    without grad_output.
    """

    backend: Backend
    needs: GradientsNeeded
    name: str = "linear_cross_entropy"

    def forward(self, ctx: Any, arguments: Sequence[Any]) -> tuple[Tensor, ...]:
        *tensors, options = arguments
        head = Head(*tensors)
        now = gradients_in_forward(options.reduction, head.input)
        loss, state, ctx.gradients, metrics = compute(head, options, self.needs if now else None)
        save(ctx, options, *head, state)
        ctx.mark_non_differentiable(*metrics)
        return loss, *metrics

    def backward(self, ctx: Any, grad_output: Tensor) -> Gradients:
        (*head, state), options = saved(ctx)
        return compute_gradients(Head(*head), options, self.needs, grad_output, state)

    def define(self, ctx: Any, grad_output: Tensor) -> Gradients:
        (*head, _), options = saved(ctx)
        return gradients_of_definition(Head(*head), options, self.needs, grad_output)


def compute_gradients(
    head: Head,
    options: HeadOptions,
    needed: GradientsNeeded,
    grad_output: Tensor,
    state: Tensor | None,
) -> Gradients:
    n, backend = len(head.input), backend_of(head.input)
    kept, denominator = _targets(head, options, backend)
    part, part_options = _keep(head, options, kept)
    each = options.reduction == "none"
    grad_output = grad_output if each else _scalar(grad_output, denominator, head)
    rows = rows_at_once(part, options, backend)
    if rows:
        grad_output = grad_output[kept] if each and kept is not None else grad_output
        _, found, _ = by_rows(backend, part, part_options, rows, False, needed, grad_output)
        return of_all_rows(found, kept, n)
    assert state is not None
    weight = accumulated(head.weight, product_dtype(head, backend))
    grad_output = grad_output.expand(n)
    of_loss = head.target, weight, options, len(head.linear_weight), grad_output
    grad_results = gradients_of_loss(state, *of_loss)
    least = options.filter_eps * grad_output.abs() if options.filter_eps else None
    given = _state_options(part, options, backend), needed, state, grad_results
    return *gradients_of(head[:4], *given, weight=weight, least=least), None


def gradients_of_definition(
    head: Head, options: HeadOptions, wanted: Sequence[bool], grad_output: Tensor
) -> Gradients:
    """Returns the gradients in torch's own terms, themselves differentiable."""
    options = replace(options, with_metrics=False)

    def widened(tensor: Any) -> Any:
        floating = isinstance(tensor, Tensor) and tensor.is_floating_point()
        return tensor.to(grad_output.dtype) if floating else tensor

    def definition(*tensors: Any) -> Tensor:
        loss: Tensor = definitions.of_logits(Head(*map(widened, (*tensors, head.weight))), options)
        return loss

    return differentiate(definition, head[:4], wanted, grad_output)
