"""Losses over classes that are shared out among processes: the checks, and the autograd functions.

A row takes three numbers of communication: the largest of the processes' log-sum-exps, and the sums
of their exponentials and of q_c x_c. Metrics take five of each process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyfused import checks
from pyfused.backends import DTYPES, Backend, backend_of
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
from pyfused.ops.declaration import Arguments, Operand, Operator
from pyfused.ops.dispatch import SMALL, unsupported
from pyfused.ops.gradients import autocast_dtype
from pyfused.ops.log_probs import VALUES, Call, LogProbsOfLogits
from pyfused.ops.metrics import MergedStatistics, Metrics, RowStatistics
from pyfused.types import (
    CrossEntropyOptions,
    Gradients,
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
    loss, *metrics = VocabParallelCrossEntropy.apply(checks.normalized(options), shard, *tensors)
    input = tensors[0]
    assert input is not None
    loss = loss.to(options.loss_dtype or autocast_dtype(input.dtype, input.device))
    return (loss, Metrics(*metrics)) if metrics else loss


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


# ---- loss and gradient ---------------------------------------------------------------------------


def _largest_of_all(own: Tensor, shard: Shard) -> Tensor:
    """Of all processes, or 0 for -inf and NaN, so that a NaN is the only way to a NaN."""
    largest = own.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, shard.group)
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


class VocabParallelCrossEntropy(torch.autograd.Function):
    """Of logits, whose layer is None, or of a layer."""

    @staticmethod
    def forward(
        ctx: Any, options: CrossEntropyOptions, shard: Shard, *tensors: Any
    ) -> tuple[Tensor, ...]:
        head = Head(*tensors)
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
        ctx.options, ctx.shard = options, shard
        ctx.divisor = _divisor(target, head.weight, options)
        loss = each if options.reduction == "none" else each.sum() / ctx.divisor
        ctx.save_for_backward(*head, lse)
        if merged is None:
            return (loss,)
        dtype = accumulate_dtype(head.input.dtype)
        metrics = _statistics_of_all(merged, shard).metrics(target, options.ignore_index, dtype)
        ctx.mark_non_differentiable(*metrics)
        return loss, *metrics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, *_of_metrics: Any) -> tuple[Tensor | None, ...]:
        *tensors, lse = ctx.saved_tensors
        head, options = Head(*tensors), ctx.options
        input, _, _, target, weight = head
        backend, shard = backend_of(input), ctx.shard.vocab._replace(lse=lse)
        grad_output = (grad_output.double() / ctx.divisor).expand(target.shape)
        found: Gradients
        if isinstance(options, HeadOptions):
            wanted = Wanted(*ctx.needs_input_grad[2:5])
            given = head, options, tile_of(head, options, backend), wanted, shard, grad_output
            found = gradients_by_blocks(backend, *given)[:3]
            if found[0] is not None:
                dist.all_reduce(found[0], group=ctx.shard.group)
        elif input.numel():
            options = replace(options, reduction="none", denominator=None)
            want = Want(False, (True, False))
            of_logits = input, target, weight, options, want, grad_output, shard
            found = backend.cross_entropy(*of_logits)[1][0], None, None
        else:
            found = torch.empty_like(input), None, None
        return None, None, *found, None, None


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
    given = op, options, shard, *tensors[:-1], target.to(torch.int64)
    values: Tensor = VocabParallelLogProbs.apply(*given)
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
            found = ctx.op.gradients(call, wanted, values, grad_output, [])
        else:
            found = tuple(None if x is None else torch.zeros_like(x) for x in tensors[:-1])
        if len(found) > 1 and wanted.input:
            dist.all_reduce(found[0], group=ctx.shard.group)
        return None, None, None, *found, None


# ---- DTensor -------------------------------------------------------------------------------------


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
        from torch.distributed.tensor import DTensor, Replicate

        everywhere = [Replicate()] * self.mesh.ndim
        return DTensor.from_local(found, self.mesh, everywhere, run_check=False)


def local_of(op: Operator, arguments: Arguments) -> Local | None:
    """Of logits, or of a layer, whose classes are shared out along one dimension of a mesh.

    Every process has all of the other tensors, plain ones or replicated DTensors, but for the input
    of a layer: a plain one may be part of a batch, beside a weight sharded by FSDP. Else None.
    """
    input = arguments[0]
    if type(input).__name__ != "DTensor":  # first: any call comes here
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
    if hasattr(options, "token_weight"):
        given["token_weight"] = options.token_weight
    for name, tensor in given.items():
        if isinstance(tensor, dtensor.DTensor):
            expected = placements if name in names else (whole,) * mesh.ndim
            if (tensor.device_mesh, tensor.placements) != (mesh, expected):
                return None
            given[name] = tensor.to_local()
        elif name in names and tensor is not None:
            return None
    if "token_weight" in given:
        given["options"] = replace(options, token_weight=given.pop("token_weight"))
    classes, of_mesh = by_class.shape[dim], placements.index(part)
    first = -(-classes // mesh.size(of_mesh)) * mesh.get_local_rank(of_mesh)
    shard = Shard(mesh.get_group(of_mesh), VocabShard(min(classes, first), classes))
    return Local(tuple(given.values()), shard, mesh)
