"""Cross-entropy over a vocabulary that is shared out among processes, some classes each.

No logits are gathered. A row takes three numbers of communication: the largest of the processes'
log-sum-exps, and the sums of their exponentials and of what the row aims at. The gradient of logits
takes none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyfused import checks
from pyfused.backends import Among, CrossEntropyOptions, Head, Measures, Want
from pyfused.ops.chunked import (
    Wanted,
    each_of_sums,
    gradients_by_blocks,
    sums_by_blocks,
    sums_of_block,
    tile_of,
    weight_of_targets,
)
from pyfused.ops.declaration import Operand
from pyfused.ops.dispatch import SMALL, backend_of, unsupported
from pyfused.ops.gradients import autocast_dtype

__all__ = ["vocab_parallel_cross_entropy", "vocab_parallel_linear_cross_entropy"]


class Shard(NamedTuple):
    """Which classes this process has, of how many."""

    group: Any
    first: int
    classes: int


def vocab_parallel_cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    vocab_start: int,
    vocab_size: int | None = None,
    group: Any = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    denominator: float | Tensor | None = None,
    loss_dtype: torch.dtype | None = None,
) -> Tensor:
    """:func:`pyfused.functional.cross_entropy` of logits of which each process has some classes.

    Every process of the group calls it, with its own classes and the same targets, and has the loss
    of all. Its gradient is that of its own logits.

    Args:
        input: Logits of this process' classes, of shape (N, C_own) or (N, C_own, d1, ..., dk). The
            shares may differ.
        target: Class indices in [0, C) or ``ignore_index``, of shape (N) or (N, d1, ..., dk).
        vocab_start: The first of this process' classes among all.
        vocab_size: C, the number of all classes. None adds up the shares, with a number more of
            communication.
        group: A process group of :mod:`torch.distributed`; None for all processes.
        weight: One factor for each of all classes, of shape (C).
        ignore_index, reduction, label_smoothing, z_loss, token_weight, denominator, loss_dtype: As
            in :func:`pyfused.functional.cross_entropy`.

    Returns:
        The loss in nats, the same in every process.

    Raises:
        IndexError: A class index is out of range.
        ValueError: The share of classes does not lie within all of them, or an option does not fit.
        RuntimeError: Shapes or dtypes do not fit, or no kernel takes such tensors.
    """
    options = CrossEntropyOptions(
        ignore_index, reduction, label_smoothing, 0.0, z_loss, token_weight, denominator, loss_dtype
    )
    checks.tensor("input", input)
    if input.dim() < 2:
        raise RuntimeError(f"input: expected shape (N, C, ...), got {tuple(input.shape)}")
    shard = _shard(group, vocab_start, vocab_size, input.shape[1])
    _check(input, (*input.shape[:1], shard.classes, *input.shape[2:]), target, weight, options)
    apply: Callable[..., Tensor] = VocabParallelCrossEntropy.apply
    loss = apply(input, target, weight, options, shard)
    return _as(loss, input, options)


def vocab_parallel_linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    vocab_start: int,
    vocab_size: int | None = None,
    group: Any = None,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    memory_budget: int | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    token_weight: Tensor | None = None,
    denominator: float | Tensor | None = None,
    loss_dtype: torch.dtype | None = None,
) -> Tensor:
    """:func:`pyfused.functional.linear_cross_entropy` with some rows of the weight a process.

    Every process of the group calls it with the same input and targets. The input's gradient is
    added up over the processes, so that each has all of it.

    Args:
        input: (N, D).
        linear_weight: The weight of this process' classes, of shape (C_own, D).
        linear_bias: Their bias, of shape (C_own), or None.
        memory_budget, softcap: As in :func:`pyfused.functional.linear_cross_entropy`.
        target, vocab_start, vocab_size, group, weight, ignore_index, reduction: As in
            :func:`vocab_parallel_cross_entropy`.
        label_smoothing, z_loss, token_weight, denominator, loss_dtype: Likewise.

    Returns:
        The loss in nats, the same in every process.

    Raises:
        IndexError, RuntimeError, ValueError: As in :func:`vocab_parallel_cross_entropy`.
    """
    options = CrossEntropyOptions(
        ignore_index, reduction, label_smoothing, 0.0, z_loss, token_weight, denominator, loss_dtype
    )
    checks.tensor("linear_weight", linear_weight)
    shard = _shard(group, vocab_start, vocab_size, len(linear_weight))
    head = Head(input, linear_weight, linear_bias, target, None, softcap)
    checks.linear_cross_entropy(head, options, memory_budget)
    _check(input, (len(input), shard.classes), target, weight, options)
    _supported(input, {"linear_weight": linear_weight, "linear_bias": linear_bias})
    tensors = input, linear_weight, linear_bias, target, weight
    apply: Callable[..., Tensor] = VocabParallelLinearCrossEntropy.apply
    loss = apply(*tensors, softcap, options, shard, memory_budget)
    return _as(loss, input, options)


# ---- what a call has to be -----------------------------------------------------------------------


def _shard(group: Any, first: int, classes: int | None, own: int) -> Shard:
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
    return Shard(group, first, classes)


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


def _of_all(own: Tensor, aimed: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
    """The log-sum-exp over all processes' classes, and the sum of what they aim at."""
    high = own.clone()
    dist.all_reduce(high, dist.ReduceOp.MAX, shard.group)
    pivot = high.where(high > -torch.inf, 0)  # so that a NaN is the only way to a NaN
    sums = torch.stack([(own - pivot).exp(), aimed])
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


def _upstream(grad_output: Tensor, divisor: Tensor | float, target: Tensor) -> Tensor:
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
        aimed = torch.zeros_like(own)
        if input.numel():
            among = Among(shard.first, shard.classes)
            given = backend, input, target, weight, options, among
            aimed = sums_of_block(*given, Measures(own))
        lse, aimed = _of_all(own, aimed, shard)
        shape = target.shape
        each = each_of_sums(options, target, weight, lse.view(shape), aimed.view(shape))
        loss, ctx.divisor = _reduced(each, target, weight, options)
        ctx.options, ctx.shard, ctx.backend = options, shard, backend
        ctx.save_for_backward(input, target, weight, lse)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, target, weight, lse = ctx.saved_tensors
        options = ctx.options._replace(reduction="none", denominator=None)
        upstream = _upstream(grad_output, ctx.divisor, target)
        gradient = torch.empty_like(input)
        if input.numel():
            want, among = Want(False, (True, False)), Among(ctx.shard.first, ctx.shard.classes, lse)
            given = input, target, weight, options, want, upstream, among
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
        softcap: float | None,
        options: CrossEntropyOptions,
        shard: Shard,
        memory_budget: int | None,
    ) -> Tensor:
        head = Head(input, linear_weight, linear_bias, target.to(torch.int64), weight, softcap)
        ctx.tile, ctx.backend = tile_of(head, memory_budget), backend_of(input)
        own, aimed = sums_by_blocks(ctx.backend, head, options, ctx.tile, *shard[1:])
        lse, aimed = _of_all(own, aimed, shard)
        each = each_of_sums(options, head.target, weight, lse, aimed)
        loss, ctx.divisor = _reduced(each, head.target, weight, options)
        ctx.options, ctx.shard, ctx.softcap = options, shard, softcap
        ctx.save_for_backward(*head[:5], lse)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, lse = ctx.saved_tensors
        head = Head(*tensors)._replace(softcap=ctx.softcap)
        upstream = _upstream(grad_output, ctx.divisor, head.target)
        wanted = Wanted(*ctx.needs_input_grad[:3])
        given = ctx.backend, head, ctx.options, ctx.tile, wanted, lse, upstream
        grad_input, *found = gradients_by_blocks(*given, *ctx.shard[1:])
        if grad_input is not None:
            dist.all_reduce(grad_input, group=ctx.shard.group)
        return grad_input, *found[:2], *[None] * 6
