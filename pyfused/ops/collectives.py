"""Communication between processes with vocabulary shards: comparing calls, differentiable sums."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pyfused.types import ClassRange


def communication_device(group: Any, *values: Any) -> torch.device:
    """Returns the device of a group's tensors: a GPU for NCCL, else the device of the first tensor.

    It also returns one for a process without a valid tensor, which has to take part.
    """
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda")
    return next((x.device for x in values if isinstance(x, Tensor)), torch.device("cpu"))


def reduced(tensor: Tensor, group: Any, operation: str = "SUM") -> Tensor:
    """Overwrites a tensor with its sum, or another reduction, over the processes of a group."""
    dist.all_reduce(tensor, getattr(dist.ReduceOp, operation), group)
    return tensor


def gathered(tensor: Tensor, group: Any) -> Tensor:
    """Gathers the tensors of all processes of a group, stacked in the order of ranks."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor, group)
    return torch.stack(parts)


# ---- calls of the same function ------------------------------------------------------------------


class Call(NamedTuple):
    """Describes the call of one process, for the other processes of its group."""

    is_valid: int = 0  # whether the arguments are valid; the other fields are 0 if not
    first: int = 0  # the index of the first class
    size: int = 0  # the number of classes of this process
    total: int = 0  # the number of all classes, -1 if the process does not know it
    common: int = 0  # a checksum of everything else that has to be equal in all processes
    targets: int = 0  # a checksum of the targets


class LocalShard(NamedTuple):
    """The classes of this process, in a call whose arguments are valid."""

    classes: ClassRange  # the first class of this process, and the number of all classes
    group: Any


def compare_calls(call: Call, device: torch.device, group: Any) -> int:
    """Returns the number of all classes; all processes raise the same error if calls disagree."""
    calls = gathered(torch.tensor(call, device=device), group).tolist()
    valid, firsts, sizes, totals, common, targets = zip(*calls, strict=True)
    if ranks := [rank for rank, is_valid in enumerate(valid) if not is_valid]:
        expected = "valid arguments in every process of the group"
        raise RuntimeError(f"shard: expected {expected}, got invalid ones in ranks {ranks}")
    known = {*totals} - {-1}
    for name, what, values in (
        ("shard", "function, options, dtypes, shapes and grad mode", common),
        ("target", "targets", targets),
        ("shard", "total number of classes", known),
    ):
        if len({*values}) > 1:
            got = sorted(known) if values is known else "different ones"
            raise ValueError(f"{name}: expected the same {what} in every process, got {got}")
    total: int = known.pop() if known else sum(sizes)
    ranges = [(first, first + size) for first, size in zip(firsts, sizes, strict=True)]
    begins, ends = zip((total, 0), *ranges, strict=True)
    if sorted(begins) != sorted(ends):
        expected = f"each class of [0, {total}) in exactly one process"
        got = ", ".join(f"[{first}, {end})" for first, end in ranges)
        raise ValueError(f"shard: expected {expected}, got {got}")
    return total


# ---- differentiable sums -------------------------------------------------------------------------


class Sum(torch.autograd.Function):
    """Sums a tensor over processes; each summand gets the gradient of the sum.

    torch's functional collectives differentiate the sum of all processes' losses, so their backward
    sums gradients. With this function, all processes compute the same loss, which counts once.
    """

    @staticmethod
    def forward(ctx: Any, summand: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return reduced(summand.clone(memory_format=torch.contiguous_format), group)

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
