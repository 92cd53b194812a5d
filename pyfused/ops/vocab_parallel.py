"""Losses over classes that are shared out among processes: the checks, and the autograd functions.

A row takes three numbers of communication: the largest of the processes' log-sum-exps, and the sums
of their exponentials and of q_c x_c.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyfused import checks
from pyfused.backends import backend_of
from pyfused.layout import accumulate_dtype
from pyfused.ops.chunk_sizes import tile_of
from pyfused.ops.chunked import (
    Wanted,
    gradients_by_blocks,
    loss_of_sums,
    sums_by_blocks,
    sums_of_block,
    weight_of_targets,
)
from pyfused.ops.declaration import Operand
from pyfused.ops.dispatch import SMALL, unsupported
from pyfused.ops.gradients import autocast_dtype
from pyfused.ops.log_probs import VALUES, Call, LogProbsOfLogits
from pyfused.ops.operators import LINEAR_LOG_PROBS, LOG_PROBS
from pyfused.types import (
    CrossEntropyOptions,
    Head,
    HeadOptions,
    LogProbsOptions,
    Statistics,
    VocabShard,
    Want,
)


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
) -> Tensor:
    """Of logits of this process' classes."""
    classes = shard.vocab.classes
    _check(input, (*input.shape[:1], classes, *input.shape[2:]), target, weight, options)
    options = checks.normalized(options)
    apply: Callable[..., Tensor] = VocabParallelCrossEntropy.apply
    return _as(apply(input, target, weight, options, shard), input, options)


def linear_cross_entropy(head: Head, options: HeadOptions, shard: Shard) -> Tensor:
    """Of a layer with the rows of this process' classes."""
    input, linear_weight, linear_bias, target, weight = head
    checks.linear_cross_entropy(head._replace(weight=None), options)
    _check(input, (len(input), shard.vocab.classes), target, weight, options)
    _supported(input, {"linear_weight": linear_weight, "linear_bias": linear_bias})
    options = checks.normalized(options)
    apply: Callable[..., Tensor] = VocabParallelLinearCrossEntropy.apply
    return _as(apply(*head, options, shard), input, options)


# ---- what a call has to be -----------------------------------------------------------------------


def shard_of(group: Any, first: int, classes: int | None, own: int) -> Shard:
    if classes is None:
        shares = torch.tensor(own)
        if dist.get_backend(group) == "nccl":
            shares = shares.cuda()
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
    given = {
        "input": input,
        "target": target,
        "weight": weight,
        "token_weight": options.token_weight,
    }
    _supported(input, given)
    if target.is_cpu:
        checks.class_indices(logits[1], target, options.ignore_index)


def _supported(input: Tensor, given: dict[str, Tensor | None]) -> None:
    for name, tensor in given.items():
        operand = Operand(name, indices=name == "target", differentiated=name != "weight")
        reason = None if tensor is None else unsupported(operand, tensor, input, False)
        if reason is not None and reason is not SMALL:
            raise RuntimeError(
                f"{name}: expected a tensor that the kernels take, got one where {reason}"
            )


def _as(loss: Tensor, input: Tensor, options: CrossEntropyOptions) -> Tensor:
    return loss.to(options.loss_dtype or autocast_dtype(input.dtype, input.device))


# ---- loss and gradient ---------------------------------------------------------------------------


def _of_all(own: Tensor, target_logits: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
    """The log-sum-exp over all processes' classes, and the sum of their q_c x_c."""
    high = own.clone()
    dist.all_reduce(high, dist.ReduceOp.MAX, shard.group)
    pivot = high.where(high > -torch.inf, 0)  # so that a NaN is the only way to a NaN
    sums = torch.stack([(own - pivot).exp(), target_logits])
    dist.all_reduce(sums, group=shard.group)
    return pivot + sums[0].log(), sums[1]


def _reduced(
    each: Tensor, target: Tensor, weight: Tensor | None, options: CrossEntropyOptions
) -> tuple[Tensor, Tensor | float]:
    """The loss, and what a mean divides by."""
    each = each.where(target != options.ignore_index, 0)
    if options.reduction == "none":
        return each, 1.0
    if options.reduction == "sum":
        return each.sum(), 1.0
    divisor = options.denominator
    if divisor is None:
        divisor = weight_of_targets(target, weight, options)
    return each.sum() / divisor, divisor


def _grad_of_rows(grad_output: Tensor, divisor: Tensor | float, target: Tensor) -> Tensor:
    """The gradient of each row's loss."""
    return (grad_output.double() / divisor).expand(target.shape)


class VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: CrossEntropyOptions,
        shard: Shard,
    ) -> Tensor:
        target, backend = target.to(torch.int64), backend_of(input)
        own = input.new_full((target.numel(),), -torch.inf, dtype=torch.float64)
        target_logits = torch.zeros_like(own)
        if input.numel():
            given = backend, input, target, weight, options, shard.vocab
            target_logits = sums_of_block(*given, Statistics(own))
        lse, target_logits = _of_all(own, target_logits, shard)
        shape = target.shape
        each = loss_of_sums(options, target, weight, lse.view(shape), target_logits.view(shape))
        loss, ctx.divisor = _reduced(each, target, weight, options)
        ctx.options, ctx.shard, ctx.backend = options, shard, backend
        ctx.save_for_backward(input, target, weight, lse)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, target, weight, lse = ctx.saved_tensors
        options = replace(ctx.options, reduction="none", denominator=None)
        grad_output = _grad_of_rows(grad_output, ctx.divisor, target)
        gradient = torch.empty_like(input)
        if input.numel():
            want = Want(False, (True, False))
            vocab = ctx.shard.vocab._replace(lse=lse)
            given = input, target, weight, options, want, grad_output, vocab
            gradient = ctx.backend.cross_entropy(*given)[1][0]
        return gradient, None, None, None, None


class VocabParallelLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        options: HeadOptions,
        shard: Shard,
    ) -> Tensor:
        head = Head(input, linear_weight, linear_bias, target.to(torch.int64), weight)
        ctx.backend = backend_of(input)
        ctx.tile = tile_of(head, options, ctx.backend)
        own, target_logits = sums_by_blocks(ctx.backend, head, options, ctx.tile, shard.vocab)
        lse, target_logits = _of_all(own, target_logits, shard)
        each = loss_of_sums(options, head.target, weight, lse, target_logits)
        loss, ctx.divisor = _reduced(each, head.target, weight, options)
        ctx.options, ctx.shard = options, shard
        ctx.save_for_backward(*head, lse)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, lse = ctx.saved_tensors
        head, shard = Head(*tensors), ctx.shard.vocab._replace(lse=lse)
        grad_output = _grad_of_rows(grad_output, ctx.divisor, head.target)
        wanted = Wanted(*ctx.needs_input_grad[:3])
        given = head, ctx.options, ctx.tile, wanted, shard, grad_output
        grad_input, *found = gradients_by_blocks(ctx.backend, *given)
        if grad_input is not None:
            dist.all_reduce(grad_input, group=ctx.shard.group)
        return grad_input, *found[:2], *[None] * 4


# ---- log-probabilities ---------------------------------------------------------------------------


def log_probs(tensors: Sequence[Any], options: LogProbsOptions, shard: Shard) -> Tensor:
    """Log-probabilities, entropies and log-sum-exps, of the tensors of one of two operators."""
    input, *others, target = tensors
    op = LINEAR_LOG_PROBS if others else LOG_PROBS
    op.check_shapes((*tensors, options))
    classes = shard.vocab.classes
    logits = (len(input), classes) if others else (len(input), classes, *input.shape[2:])
    _check(input, logits, target, None, CrossEntropyOptions(options.ignore_index, "none"))
    _supported(input, dict(zip(("linear_weight", "linear_bias"), others, strict=False)))
    apply: Callable[..., Tensor] = VocabParallelLogProbs.apply
    values = apply(op, options, shard, *tensors[:-1], target.to(torch.int64))
    return values.to(accumulate_dtype(input.dtype))


def _values_of_all(values: Tensor, shard: Shard) -> Tensor:
    """Those over all processes' classes."""
    own, total, weighted, target_logit = values[3:]
    pivot = own.clone()
    dist.all_reduce(pivot, dist.ReduceOp.MAX, shard.group)
    pivot = pivot.where(pivot > -torch.inf, 0)
    by = (own - pivot).where(total > 0, 0)  # total: the sum of exp(x - own), 0 of no class
    sums = torch.stack([total, weighted + by * total]) * by.exp()
    sums = torch.cat([sums, target_logit[None]])
    dist.all_reduce(sums, group=shard.group)
    total, weighted, target_logit = sums
    log_total = total.log()
    log_p, entropy = target_logit - pivot - log_total, log_total - weighted / total
    results = log_p.clamp(max=0), entropy.clamp(min=0), pivot + log_total
    return torch.stack([*results, pivot, total, weighted, target_logit])


class VocabParallelLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, op: LogProbsOfLogits, options: LogProbsOptions, shard: Shard, *tensors: Any
    ) -> Tensor:
        target = tensors[-1]
        if op.classes(tensors):
            values, _ = op.values(Call(tensors, options, shard.vocab))
        else:
            values = target.new_zeros((VALUES, *target.shape), dtype=torch.float64)
            values[3] = -torch.inf
        values = _values_of_all(values, shard).where(target != options.ignore_index, 0)
        ctx.op, ctx.options, ctx.shard = op, options, shard
        ctx.save_for_backward(*tensors, values)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, values = ctx.saved_tensors
        wanted = Wanted(*ctx.needs_input_grad[3:-1])
        call = Call(tensors, ctx.options, ctx.shard.vocab)
        if ctx.op.classes(tensors):
            found = ctx.op.gradients(call, wanted, values, grad_output)
        else:
            found = tuple(None if x is None else torch.zeros_like(x) for x in tensors[:-1])
        if len(found) > 1 and wanted.input:
            dist.all_reduce(found[0], group=ctx.shard.group)
        return None, None, None, *found, None


# ---- DTensor -------------------------------------------------------------------------------------


class Local(NamedTuple):
    """What a process has of a call with DTensors."""

    target: Tensor
    weight: Tensor | None
    options: CrossEntropyOptions
    shard: Shard


def local_of(input: Any, target: Any, weight: Any, options: CrossEntropyOptions) -> Local | None:
    """Of logits whose classes are shared out along one dimension of their mesh; else None."""
    from torch.distributed import tensor as dtensor

    mesh, dims = input.device_mesh, [i for i, p in enumerate(input.placements) if p.is_shard()]
    everywhere = (dtensor.Replicate(),) * mesh.ndim
    if (
        len(dims) != 1
        or input.dim() < 2
        or input.placements
        != tuple(dtensor.Shard(1) if i in dims else dtensor.Replicate() for i in range(mesh.ndim))
    ):
        return None
    given: list[Any] = []
    for tensor in (target, weight, options.token_weight):
        if isinstance(tensor, dtensor.DTensor):
            if tensor.placements != everywhere:
                return None
            tensor = tensor.to_local()
        given.append(tensor)
    (dim,), classes = dims, input.shape[1]
    first = -(-classes // mesh.size(dim)) * mesh.get_local_rank(dim)
    shard = Shard(mesh.get_group(dim), VocabShard(min(classes, first), classes))
    return Local(given[0], given[1], replace(options, token_weight=given[2]), shard)


def of_dtensor(input: Any, local: Local) -> Tensor:
    """A loss that every process has."""
    from torch.distributed.tensor import DTensor, Replicate

    loss = cross_entropy(input.to_local(), *local)
    everywhere = [Replicate()] * input.device_mesh.ndim
    return DTensor.from_local(loss, input.device_mesh, everywhere, run_check=False)
