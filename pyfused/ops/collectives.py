"""Communication between processes with vocabulary shards."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pyfused.types import ClassRange


def reduced(tensor: Tensor, group: Any, operation: str = "SUM") -> Tensor:
    """Overwrites a tensor with its sum, or another reduction, over the processes of a group."""
    dist.all_reduce(tensor, getattr(dist.ReduceOp, operation), group)
    return tensor


def gathered(tensor: Tensor, group: Any) -> Tensor:
    """Gathers the tensors of all processes of a group, stacked in the order of ranks."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor, group)
    return torch.stack(parts)


class LocalShard(NamedTuple):
    """The classes of this process, in a call whose arguments are valid.

    Attributes:
        classes: The first class of this process, and the number of all classes.
        group_reference: A weak reference to the process group, because plans outlive groups that
            are destroyed; None for all processes.
    """

    classes: ClassRange
    group_reference: Any

    @property
    def group(self) -> Any:
        if self.group_reference is None:
            return None
        group = self.group_reference()
        if group is None:
            raise RuntimeError("shard: expected a process group, got one that was destroyed")
        return group


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
