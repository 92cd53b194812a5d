"""What processes with sharded classes exchange: what they call, and differentiable sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


def gathered(tensor: Tensor, group: Any) -> Tensor:
    """Returns the tensors of all processes of a group, stacked in the order of their ranks."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor, group)
    return torch.stack(parts)


# ---- calls of the same function ------------------------------------------------------------------


class Call(NamedTuple):
    """What a process tells the others of its group before a call.

    Attributes:
        is_valid: Whether it accepts its arguments. All other numbers are 0 if it does not.
        first: The first of its classes.
        size: How many classes it has.
        total: The number of all classes, -1 where it does not know that.
        needs: 0 without grad mode, 1 if nothing requires grad, 2 if the weight or the bias does, 3
            if the input does.
        common: A checksum of the function, its options, and the shapes of tensors without shards.
        targets: A checksum of the targets.
    """

    is_valid: int = 0
    first: int = 0
    size: int = 0
    total: int = 0
    needs: int = 0
    common: int = 0
    targets: int = 0


def classes_of_all(calls: Sequence[Call]) -> int:
    """Returns the number of all classes. If calls do not fit, each process raises the same."""
    invalid = [rank for rank, call in enumerate(calls) if not call.is_valid]
    if invalid:
        raise RuntimeError(
            "shard: expected valid arguments in every process of the group, got an error in those "
            f"of ranks {invalid}"
        )
    if len({call.common for call in calls}) > 1:
        raise ValueError(
            "shard: expected the same function, options, dtypes and shapes in every process of the "
            "group, got different ones"
        )
    if len({call.targets for call in calls}) > 1:
        raise ValueError(
            "target: expected the same targets in every process of the group, got different ones"
        )
    totals = sorted({call.total for call in calls} - {-1}) or [sum(call.size for call in calls)]
    if len(totals) > 1:
        raise ValueError(f"shard: expected one number of all classes, got {totals}")
    total, ranges = totals[0], [(call.first, call.first + call.size) for call in calls]
    parts = sorted((first, end) for first, end in ranges if end > first)
    adjoin = [0, *[end for _, end in parts]] == [*[first for first, _ in parts], total]
    if not adjoin or min(ranges)[0] < 0 or max(ranges)[1] > total:
        found = ", ".join(f"[{first}, {end})" for first, end in ranges)
        raise ValueError(
            f"shard: expected each class of [0, {total}) in one process of the group, got {found}"
        )
    needs = {call.needs for call in calls}
    if 0 in needs and max(needs) > 1:
        raise RuntimeError("shard: expected grad mode in every process of the group, or in none")
    return total


def all_need_gradients(calls: Sequence[Call]) -> bool:
    """Returns whether each process has to take part in the backward pass of the others.

    Their gradients of the input are added up. With ``create_graph`` they exchange more.
    """
    needs = {call.needs for call in calls}
    return 3 in needs or needs == {1, 2}


# ---- sums that autograd differentiates -----------------------------------------------------------


class Sum(torch.autograd.Function):
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
        return Copy.apply(grad_output, ctx.group), None


class Copy(torch.autograd.Function):
    """What all processes have, for different uses, whose gradients its gradient is the sum of."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return Sum.apply(grad_output, ctx.group), None
