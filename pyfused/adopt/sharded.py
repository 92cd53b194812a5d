"""Deferred logits of heads that torch.distributed shards.

All hooks of such a head are torch's own. Those before its ``forward`` run when it is called.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyfused.adopt.deferred import PLAIN, Family
from pyfused.functional import linear_cross_entropy
from pyfused.ops.shards import is_dtensor
from pyfused.torch_internals import (
    DisableTorchFunctionSubclass,
    fsdp_policy,
    run_forward_hooks,
    version_of,
)

# The packages of the hooks that a unit of FSDP2 and a plain layer may have.
HOOKS = "torch.distributed.fsdp.", "torch.distributed.tensor."


class _Sharded(Family):
    def __init__(self, call: Any, head: Any, hidden: Tensor) -> None:
        self.head = head
        super().__init__(call, hidden, head.weight, head.bias)

    def versions_now(self) -> Any:  # FSDP allocates the weight again, and DTensors have no address
        return [version_of(x) for x in self.inputs if x is not None]

    def is_full(self) -> bool:
        """Returns whether the head returns plain logits of all rows and classes."""
        return True


class _Unit(_Sharded):
    """The logits of a unit of ``fully_shard``, whose weight its hooks have gathered.

    FSDP's hooks after the ``forward`` run when the head's call ends. They free the weight, and let
    the gradients of the losses and of computed logits gather it again.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.results: list[Any] | None = []

    def logits(self) -> Any:
        logits, dtype = super().logits(), fsdp_policy(self.head).output_dtype
        return logits if dtype in (None, logits.dtype) else logits.to(dtype)

    def keep(self, *results: Any) -> None:
        if self.results is not None:
            self.results += results

    def close(self) -> None:
        results, self.results = self.results, None
        if results is not None:
            with DisableTorchFunctionSubclass():
                run_forward_hooks(self.head, self.inputs[:1], results)

    def forget(self) -> None:
        super().forget()
        self.results = None


class _Colwise(_Sharded):
    """The logits of a layer whose weight is a DTensor, with some of the classes in each process.

    The hooks after the ``forward`` run for computed logits.
    """

    def __init__(self, call: Any, head: Any, hidden: Any) -> None:
        local = hidden.full_tensor()
        super().__init__(call, head, local if type(local) in PLAIN else local.clone())
        self.finish = partial(run_forward_hooks, head, (hidden,))

    def linear(self, input: Tensor) -> Tensor:
        output: Tensor = self.finish(F.linear(self.replicate(input), *self.inputs[1:]))
        return output

    def loss(self, rows: Tensor, target: Tensor, **options: Any) -> Tensor:
        _, weight, bias = self.inputs
        rows, target = self.replicate(rows), self.replicate(target)
        loss: Any = linear_cross_entropy(rows, weight, target, linear_bias=bias, **options)
        full: Tensor = loss.full_tensor()
        return full

    def replicate(self, tensor: Tensor) -> Any:
        from torch.distributed.tensor import DTensor, Replicate

        mesh = self.head.weight.device_mesh
        return DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)

    def is_full(self) -> bool:
        hidden, weight, _ = self.inputs
        sizes = (weight.device_mesh.size(),) * (hidden.dim() - 1)
        with torch.no_grad():
            logits = self.linear(hidden.new_zeros(*sizes, hidden.shape[-1]))
        return type(logits) is Tensor and logits.shape == (*sizes, len(weight))


def layout_reason(head: Any, hidden: Any) -> str | None:
    """Returns why a layer with hooks has to compute its logits itself, None if it need not."""
    if not is_dtensor(hidden):
        return "its head has hooks"
    from torch.distributed.tensor import Replicate, Shard

    tensors = [x for x in (head.weight, head.bias) if x is not None]
    layout = hidden.device_mesh, (Shard(0),)
    if hidden.placements == (Replicate(),) and all(
        is_dtensor(x) and (x.device_mesh, x.placements) == layout for x in tensors
    ):
        return None
    return "its head is not sharded by classes over a mesh of one dimension"


def family(call: Any, head: Any, hidden: Any) -> _Sharded:
    """Returns the logits of a head whose hooks have returned these hidden states."""
    return (_Unit if fsdp_policy(head) else _Colwise)(call, head, hidden)
