"""Communication between processes with vocabulary shards: checks of calls, differentiable sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


def communication_device(group: Any, *values: Any) -> torch.device:
    """Returns the device of a group's tensors: a GPU for NCCL, else the device of the first tensor.

    A process without a valid tensor has to take part in the exchange, too.
    """
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda")
    return next((x.device for x in values if isinstance(x, Tensor)), torch.device("cpu"))


def gathered(tensor: Tensor, group: Any) -> Tensor:
    """Gathers the tensors of all processes of a group, stacked in the order of ranks."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor, group)
    return torch.stack(parts)


# ---- calls of the same function ------------------------------------------------------------------


class Call(NamedTuple):
    """Describes the call of one process, for the other processes of its group.

    Attributes:
        is_valid: Whether the arguments are valid. All other fields are 0 if they are not.
        first: The index of the first class.
        size: The number of classes.
        total: The number of all classes, -1 if the process does not know it.
        needs: 0 without grad mode, 1 if no tensor requires grad, 2 if the weight or the bias does,
            3 if the input does.
        common: A checksum of the function, the options, and the shapes of tensors that are not
            sharded.
        targets: A checksum of the targets.
    """

    is_valid: int = 0
    first: int = 0
    size: int = 0
    total: int = 0
    needs: int = 0
    common: int = 0
    targets: int = 0


def total_classes(calls: Sequence[Call]) -> int:
    """Returns the number of all classes. All processes raise the same error if calls disagree."""
    invalid = [rank for rank, call in enumerate(calls) if not call.is_valid]
    if invalid:
        raise RuntimeError(
            "shard: expected valid arguments in every process of the group, got invalid ones in "
            f"ranks {invalid}"
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
        raise ValueError(
            f"shard: expected the same total number of classes in every process, got {totals}"
        )
    total, ranges = totals[0], [(call.first, call.first + call.size) for call in calls]
    shards = sorted((first, end) for first, end in ranges if end > first)
    adjacent = [0, *[end for _, end in shards]] == [*[first for first, _ in shards], total]
    if not adjacent or min(ranges)[0] < 0 or max(ranges)[1] > total:
        got = ", ".join(f"[{first}, {end})" for first, end in ranges)
        raise ValueError(
            f"shard: expected each class of [0, {total}) in exactly one process, got {got}"
        )
    needs = {call.needs for call in calls}
    if 0 in needs and max(needs) > 1:
        raise RuntimeError(
            "shard: expected grad mode to be on in all processes of the group, or in none"
        )
    return total


def all_need_gradients(calls: Sequence[Call]) -> bool:
    """Returns whether every process has to take part in the backward pass of the others.

    The gradients of the input are summed over processes, and ``create_graph`` needs more sums.
    """
    needs = {call.needs for call in calls}
    return 3 in needs or needs == {1, 2}


# ---- differentiable sums -------------------------------------------------------------------------


class Sum(torch.autograd.Function):
    """Sums a tensor over processes; each summand gets the gradient of the sum.

    torch's functional collectives differentiate the sum of the losses of all processes, and so sum
    the gradients in backward. All processes have the same loss here, which counts once.
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
    """Returns a tensor that all processes share; the gradients of its uses are summed over them."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return Sum.apply(grad_output, ctx.group), None
