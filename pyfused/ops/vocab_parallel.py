"""Losses over classes that are shared out among processes: the checks, and the autograd functions.

A row takes three numbers of communication: the largest of the processes' log-sum-exps, and the sums
of their exponentials and of q_c x_c. Metrics take five of each process.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from pyfused import checks
from pyfused.backends import DTYPES, Backend, backend_of, cross_entropy_once
from pyfused.layout import accumulate_dtype
from pyfused.ops import definitions
from pyfused.ops.chunk_sizes import tile_of
from pyfused.ops.chunked import (
    Wanted,
    gradients_by_blocks,
    loss_of_sums,
    sums_by_blocks,
    sums_of_block,
    weight_of_targets,
)
from pyfused.ops.declaration import Arguments, Operand, Operator
from pyfused.ops.dispatch import SMALL, unsupported
from pyfused.ops.gradients import apply, autocast_dtype, differentiate, save, saved
from pyfused.ops.metrics import MergedStatistics, Metrics, RowStatistics
from pyfused.types import (
    LOG_PROB_VALUES,
    CrossEntropyOptions,
    Gradients,
    Head,
    HeadOptions,
    LogProbsCall,
    LogProbsOptions,
    Statistics,
    VocabShard,
    Want,
)

if TYPE_CHECKING:
    from pyfused.ops.log_probs import LogProbsOfLogits


class Shard(NamedTuple):
    """The group of processes, and which of all classes this process has."""

    group: Any
    vocab: VocabShard


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: CrossEntropyOptions,
    shard: Shard,
) -> Any:
    """Of logits of this process' classes; beside metrics where the options ask for them."""
    classes = shard.vocab.classes
    _check(input, (*input.shape[:1], classes, *input.shape[2:]), target, weight, options)
    return _run((input, None, None, target, weight), options, shard)


def linear_cross_entropy(head: Head, options: HeadOptions, shard: Shard) -> Any:
    """Of a layer with the rows of this process' classes; likewise."""
    input, linear_weight, linear_bias, target, weight = head
    checks.linear_cross_entropy(head._replace(weight=None), options)
    _check(input, (len(input), shard.vocab.classes), target, weight, options)
    _supported(input, {"linear_weight": linear_weight, "linear_bias": linear_bias})
    return _run(head, options, shard)


def _run(tensors: Sequence[Tensor | None], options: CrossEntropyOptions, shard: Shard) -> Any:
    loss, *metrics = apply(ShardedLossPlan(shard), *tensors, checks.normalized(options))
    input = tensors[0]
    assert input is not None
    loss = loss.to(options.loss_dtype or autocast_dtype(input.dtype, input.device))
    return (loss, Metrics(*metrics)) if metrics else loss


# ---- what a call has to be -----------------------------------------------------------------------


def shard_of(group: Any, first: int, classes: int | None, own: int, device: torch.device) -> Shard:
    if classes is None:
        shares = torch.tensor(own, device=device)
        dist.all_reduce(shares, group=group)
        classes = int(shares)
    if first < 0 or first + own > classes:
        raise ValueError(
            f"vocab_start: expected {own} classes within [0, {classes}), got those from {first} on"
        )
    return Shard(group, VocabShard(first, classes))


def _check(
    input: Tensor,
    logits: tuple[int, ...],
    target: Tensor,
    weight: Tensor | None,
    options: CrossEntropyOptions,
) -> None:
    checks.reduction(options.reduction)
    checks.tensor("target", target)
    if target.is_floating_point():
        raise RuntimeError(f"target: expected class indices, got {target.dtype}")
    checks.cross_entropy(input.new_empty(()).expand(logits), target, weight, options)
    _supported(input, {"input": input, "target": target, "weight": weight} | options.tensors())
    if target.is_cpu:
        checks.class_indices(logits[1], target, options.ignore_index)


_CONSTANTS = ("weight", "token_weight", "denominator")  # the kernels compute no gradient of these


def _unsupported(input: Tensor, given: Mapping[str, Tensor | None]) -> tuple[str, str] | None:
    """The name of a tensor that the kernels do not take, and the reason."""
    for name, tensor in given.items():
        operand = Operand(name, indices=name == "target", differentiated=name not in _CONSTANTS)
        reason = None if tensor is None else unsupported(operand, tensor, input, False)
        if reason is not None and reason is not SMALL:
            return name, reason
    return None


def _supported(input: Tensor, given: Mapping[str, Tensor | None]) -> None:
    if found := _unsupported(input, given):
        name, reason = found
        raise RuntimeError(
            f"{name}: expected a tensor that the kernels take, got one where {reason}"
        )


# ---- collectives that autograd differentiates ----------------------------------------------------


class _Sum(torch.autograd.Function):
    """The sum of what the processes have; the gradient of the sum is that of each summand.

    The functional collectives of torch differentiate the sum of all processes' losses, and so add
    up the gradients in the backward pass. All processes have the same loss here, which counts once.
    """

    @staticmethod
    def forward(ctx: Any, summand: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = summand.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return _Copy.apply(grad_output, ctx.group), None


class _Copy(torch.autograd.Function):
    """What all processes have, for different uses, whose gradients its gradient is the sum of."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(grad_output, ctx.group), None


# ---- loss and gradient ---------------------------------------------------------------------------


def _largest_of_all(own: Tensor, shard: Shard) -> Tensor:
    """Of all processes, or 0 for -inf and NaN, so that a NaN is the only way to a NaN."""
    largest = own.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, shard.group)
    return _pivot(largest)


def _pivot(largest: Tensor) -> Tensor:
    """What is subtracted before exponentials are taken; -inf less -inf would be NaN."""
    return largest.where(largest > -torch.inf, 0)


def _of_all(own: Tensor, target_logits: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
    """The log-sum-exp over all processes' classes, and the sum of their q_c x_c."""
    pivot = _largest_of_all(own, shard)
    sums = torch.stack([(own - pivot).exp(), target_logits])
    dist.all_reduce(sums, group=shard.group)
    return pivot + sums[0].log(), sums[1]


def _statistics_of_all(own: MergedStatistics, shard: Shard) -> RowStatistics:
    """Merged in the order of ranks, so that every process has the same bits."""
    numbers = torch.stack([*own.rows, own.largest])  # in float64, which has every class index
    parts = [torch.empty_like(numbers) for _ in range(dist.get_world_size(shard.group))]
    dist.all_gather(parts, numbers, shard.group)
    merged = MergedStatistics(numbers.shape[1], numbers)
    for *rows, largest in parts:
        merged.merge(slice(None), RowStatistics(*rows), largest)
    return merged.rows


def _reduced(
    each: Tensor, target: Tensor, weight: Tensor | None, options: CrossEntropyOptions
) -> Tensor:
    if options.reduction == "none":
        return each
    return each.sum() / _divisor(target, weight, options)


def _divisor(target: Tensor, weight: Tensor | None, options: CrossEntropyOptions) -> Tensor | float:
    """What the sum of the losses is divided by."""
    if options.reduction != "mean":
        return 1.0
    divisor = options.denominator
    return weight_of_targets(target, weight, options) if divisor is None else divisor


def _sums_of_logits(
    backend: Backend,
    head: Head,
    options: CrossEntropyOptions,
    shard: VocabShard,
    merged: MergedStatistics | None,
) -> tuple[Tensor, Tensor]:
    """As `sums_by_blocks`, of logits that are the head's input."""
    logits, target = head.input, head.target
    found = RowStatistics.empty(target.numel(), logits)
    if not logits.numel():
        return found.log_sum_exp.fill_(-torch.inf), found.target_logit.zero_()
    statistics = Statistics(*found[1:]) if merged else Statistics(found.log_sum_exp)
    given = logits, target, head.weight, options, shard, statistics
    target_logits = sums_of_block(backend, *given)
    if merged:
        merged.add(slice(None), logits, target, shard.first, statistics, options.scale)
    return found.log_sum_exp, target_logits


class ShardedLossPlan(NamedTuple):
    """Computes cross-entropy of logits, whose layer is None, or of a layer."""

    shard: Shard
    name: str = "vocab_parallel_cross_entropy"

    def forward(self, ctx: Any, arguments: Sequence[Any]) -> tuple[Tensor, ...]:
        *tensors, options = arguments
        head, shard = Head(*tensors), self.shard
        head = head._replace(target=head.target.to(torch.int64))
        target, backend = head.target, backend_of(head.input)
        merged = MergedStatistics(target.numel(), head.input) if options.with_metrics else None
        if isinstance(options, HeadOptions):
            tile = tile_of(head, options, backend)
            sums = sums_by_blocks(backend, head, options, tile, shard.vocab, merged)
        else:
            sums = _sums_of_logits(backend, head, options, shard.vocab, merged)
        lse, target_logits = _of_all(*sums, shard)
        of_rows = lse.view(target.shape), target_logits.view(target.shape)
        each = loss_of_sums(options, target, head.weight, *of_rows)
        loss = _reduced(each, target, head.weight, options)
        save(ctx, options, *head, lse)
        if merged is None:
            return (loss,)
        dtype = accumulate_dtype(head.input.dtype)
        metrics = _statistics_of_all(merged, shard).metrics(target, options.ignore_index, dtype)
        ctx.mark_non_differentiable(*metrics)
        return loss, *metrics

    def backward(self, ctx: Any, grad_output: Tensor) -> Gradients:
        (*tensors, lse), options = saved(ctx)
        head = Head(*tensors)
        input, _, _, target, weight = head
        backend, shard = backend_of(input), self.shard.vocab._replace(lse=lse)
        grad_output = (grad_output / _divisor(target, weight, options)).expand(target.shape)
        if isinstance(options, HeadOptions):
            wanted, tile = Wanted(*ctx.needs_input_grad[1:4]), tile_of(head, options, backend)
            found = gradients_by_blocks(backend, head, options, tile, wanted, shard, grad_output)
            if found[0] is not None:
                dist.all_reduce(found[0], group=self.shard.group)
            return found[:3]
        if not input.numel():
            return (torch.empty_like(input),)
        options = replace(options, reduction="none", denominator=None)
        want = Want(False, (True, False))
        given = input, target, weight, options, want, grad_output, shard
        return (cross_entropy_once(backend, *given)[1][0],)

    def define(self, ctx: Any, grad_output: Tensor) -> Gradients:
        (*tensors, lse), options = saved(ctx)
        *layer, target, weight = tensors

        def definition(*layer: Any) -> Tensor:
            head = Head._make((*layer, target, weight))
            return _loss_in_torch(head, options, lse, self.shard)

        return differentiate(definition, layer, ctx.needs_input_grad[1:4], grad_output)


def _loss_in_torch(head: Head, options: CrossEntropyOptions, lse: Tensor, shard: Shard) -> Tensor:
    """The loss from all logits of this process, in torch's terms.

    Args:
        lse: The log-sum-exp over all processes' classes, which keeps the exponentials in range.
    """
    *layer, target, weight = head
    x, target_prob = _logits_in_torch(layer, target, options, options.scale, shard)
    if options.label_smoothing:
        smoothing = options.label_smoothing
        target_prob = (1 - smoothing) * target_prob + smoothing / shard.vocab.classes
    if weight is not None:
        target_prob = target_prob * weight.double()[shard.vocab.first :][: x.shape[-1]]
    pivot = _pivot(lse.view(target.shape))
    exponentials = (x - pivot.unsqueeze(-1)).exp()
    target_logits = target_prob * x.where(target_prob != 0, 0)
    sums = torch.stack([exponentials.sum(-1), target_logits.sum(-1)])
    total, target_logit = _Sum.apply(sums, shard.group)
    each = loss_of_sums(options, target, weight, pivot + total.log(), target_logit)
    return _reduced(each, target, weight, options)


def _logits_in_torch(
    layer: Sequence[Tensor | None], target: Tensor, options: Any, factor: float, shard: Shard
) -> tuple[Tensor, Tensor]:
    """This process' logits and the one-hot targets, both in float64 with the classes last.

    The logits of ignored targets are 0, as NaN among them would reach the gradients.
    """
    x, linear_weight, linear_bias = (None if each is None else each.double() for each in layer)
    assert x is not None
    if linear_weight is not None:
        x = F.linear(_Copy.apply(x, shard.group), linear_weight, linear_bias)
    softcap = getattr(options, "softcap", None)
    x = x if softcap is None else definitions.softcap(x, softcap)
    x = (x.movedim(1, -1) * factor).where((target != options.ignore_index).unsqueeze(-1), 0)
    classes = torch.arange(x.shape[-1], device=x.device) + shard.vocab.first
    return x, (classes == target.unsqueeze(-1)).to(x.dtype)


# ---- log-probabilities ---------------------------------------------------------------------------


def log_probs(
    op: LogProbsOfLogits, tensors: Sequence[Any], options: LogProbsOptions, shard: Shard
) -> Tensor:
    """Log-probabilities, entropies and log-sum-exps, of the operator's tensors."""
    input, *others, target = tensors
    op.check_shapes((*tensors, options))
    classes = shard.vocab.classes
    logits = (len(input), classes) if others else (len(input), classes, *input.shape[2:])
    _check(input, logits, target, None, CrossEntropyOptions(options.ignore_index, "none"))
    _supported(input, dict(zip(("linear_weight", "linear_bias"), others, strict=False)))
    plan = ShardedLogProbsPlan(op, f"vocab_parallel_{op.name}", shard)
    values: Tensor = apply(plan, *tensors[:-1], target.to(torch.int64), options)
    return values.to(accumulate_dtype(input.dtype))


def _values_of_all(values: Tensor, shard: Shard) -> Tensor:
    """Those over all processes' classes."""
    own, total, weighted, target_logit = values[3:]
    pivot = _largest_of_all(own, shard)
    by = (own - pivot).where(total > 0, 0)  # total: the sum of exp(x - own), 0 of no class
    sums = torch.stack([total, weighted + by * total]) * by.exp()
    sums = torch.cat([sums, target_logit[None]])
    dist.all_reduce(sums, group=shard.group)
    total, weighted, target_logit = sums
    log_total = total.log()
    log_p, entropy = target_logit - pivot - log_total, log_total - weighted / total
    results = log_p.clamp(max=0), entropy.clamp(min=0), pivot + log_total
    return torch.stack([*results, pivot, total, weighted, target_logit])


class ShardedLogProbsPlan(NamedTuple):
    """Computes log-probabilities of logits, or of a layer."""

    op: LogProbsOfLogits
    name: str
    shard: Shard

    def forward(self, ctx: Any, arguments: Sequence[Any]) -> Tensor:
        *tensors, options = arguments
        target, shard = tensors[-1], self.shard
        if self.op.classes(tensors):
            values, _ = self.op.values(LogProbsCall(tensors, options, shard.vocab))
        else:
            values = target.new_zeros((LOG_PROB_VALUES, *target.shape), dtype=torch.float64)
            values[3] = -torch.inf
        values = _values_of_all(values, shard).where(target != options.ignore_index, 0)
        save(ctx, options, *tensors, values)
        return values

    def backward(self, ctx: Any, grad_output: Tensor) -> Gradients:
        (*tensors, values), options = saved(ctx)
        wanted = Wanted(*ctx.needs_input_grad[1:-2])
        call = LogProbsCall(tensors, options, self.shard.vocab)
        found: Gradients
        if self.op.classes(tensors):
            found = self.op.gradients(call, wanted, values, grad_output, [])
        else:
            found = tuple(None if x is None else torch.zeros_like(x) for x in tensors[:-1])
        if len(found) > 1 and wanted.input:
            dist.all_reduce(found[0], group=self.shard.group)
        return found

    def define(self, ctx: Any, grad_output: Tensor) -> Gradients:
        (*differentiated, target, values), options = saved(ctx)
        pivot = _pivot(values[3])

        def definition(*layer: Tensor | None) -> Tensor:
            layer += (None,) * (3 - len(layer))
            return _log_probs_in_torch(layer, target, options, pivot, self.shard)

        needs = ctx.needs_input_grad[1:-2]
        return differentiate(definition, differentiated, needs, grad_output[:3])


def _log_probs_in_torch(
    layer: Sequence[Tensor | None],
    target: Tensor,
    options: LogProbsOptions,
    pivot: Tensor,
    shard: Shard,
) -> Tensor:
    """The three results from all logits of this process, in torch's terms."""
    x, one_hot = _logits_in_torch(layer, target, options, 1 / options.temperature, shard)
    shifted = x - pivot.unsqueeze(-1)
    exponentials = shifted.exp()
    weighted = exponentials * shifted.where(exponentials != 0, 0)
    target_logits = one_hot * x.where(one_hot != 0, 0)
    parts = [part.sum(-1) for part in (exponentials, weighted, target_logits)]
    total, weighted, target_logit = _Sum.apply(torch.stack(parts), shard.group)
    log_total = total.log()
    lse = pivot + log_total
    found = torch.stack([target_logit - lse, log_total - weighted / total, lse])
    return found.where(target != options.ignore_index, 0)


# ---- DTensor -------------------------------------------------------------------------------------


def is_dtensor(tensor: Any) -> bool:
    """Whether it is torch's own DTensor, whose module is imported only by whoever makes one."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and type(tensor) is module.DTensor


class _ToLocal(torch.autograd.Function):
    """``DTensor.to_local`` with a differentiable gradient, which that of torch 2.11 has not."""

    @staticmethod
    def forward(ctx: Any, tensor: Any) -> Tensor:
        ctx.set_materialize_grads(False)  # zeros that autograd makes are no DTensors
        ctx.whole = tensor.device_mesh, tensor.placements, tensor.shape
        local: Tensor = tensor.to_local()
        return local.view_as(local)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> Any:
        return None if grad_output is None else _FromLocal.apply(grad_output, *ctx.whole)


class _FromLocal(torch.autograd.Function):
    """``DTensor.from_local``, likewise."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, mesh: Any, placements: Any, shape: torch.Size) -> Any:
        from torch.distributed.tensor import DTensor

        ctx.set_materialize_grads(False)
        ctx.whole = mesh, placements
        return DTensor.from_local(
            local.contiguous(),
            mesh,
            placements,
            run_check=False,
            shape=shape,
            stride=torch.empty(shape, device="meta").stride(),
        )

    @staticmethod
    def backward(ctx: Any, grad_output: Any) -> tuple[Tensor | None, None, None, None]:
        if grad_output is not None:
            grad_output = _ToLocal.apply(grad_output.redistribute(*ctx.whole))
        return grad_output, None, None, None


class Local(NamedTuple):
    """What a process has of a call with DTensors on a mesh."""

    arguments: Arguments
    shard: Shard
    mesh: Any

    def whole(self, found: Any) -> Any:
        """A result, which every process has, as the call returns it."""
        if isinstance(found, tuple):
            loss, metrics = found
            return self.whole(loss), Metrics(*map(self.whole, metrics))
        from torch.distributed.tensor import Replicate

        everywhere = (Replicate(),) * self.mesh.ndim
        return _FromLocal.apply(found, self.mesh, everywhere, found.shape)


def local_of(op: Operator, arguments: Arguments) -> Local | None:
    """Of logits, or of a layer, whose classes are shared out along one dimension of a mesh.

    Every process has all of the other tensors, plain ones or replicated DTensors, but for the input
    of a layer: a plain one may be part of a batch, beside a weight sharded by FSDP. Else None, as
    where the kernels do not take this process' tensors.
    """
    input = arguments[0]
    if type(input) is Tensor or not is_dtensor(input):  # first: any call comes here
        return None
    linear = op.arguments[1] == "linear_weight"
    by_class = arguments[linear]
    if type(by_class) is not type(input) or by_class.dtype not in DTYPES:
        return None
    if by_class.dim() < 2 or (linear and (input.dim(), by_class.dim()) != (2, 2)):
        return None
    from torch.distributed import tensor as dtensor

    given = dict(zip(op.arguments, arguments, strict=True))
    names, dim = (("linear_weight", "linear_bias"), 0) if linear else (op.arguments[:1], 1)
    mesh, placements = by_class.device_mesh, by_class.placements
    part, whole = dtensor.Shard(dim), dtensor.Replicate()
    if (placements.count(part), placements.count(whole)) != (1, mesh.ndim - 1):
        return None
    checks.tensor("target", given["target"])
    if given["target"].is_floating_point():
        return None
    options = given["options"]
    among = options.tensors()
    given |= among
    for name, tensor in given.items():
        if is_dtensor(tensor):
            expected = placements if name in names else (whole,) * mesh.ndim
            if (tensor.device_mesh, tensor.placements) != (mesh, expected):
                return None
            given[name] = _ToLocal.apply(tensor)
        elif name in names and tensor is not None:
            return None
    tensors = {name: tensor for name, tensor in given.items() if isinstance(tensor, Tensor)}
    if _unsupported(given[op.arguments[0]], tensors):
        return None
    if among:
        given["options"] = replace(options, **{name: given.pop(name) for name in among})
    classes, of_mesh = by_class.shape[dim], placements.index(part)
    first = -(-classes // mesh.size(of_mesh)) * mesh.get_local_rank(of_mesh)
    shard = Shard(mesh.get_group(of_mesh), VocabShard(min(classes, first), classes))
    return Local(tuple(given.values()), shard, mesh)
