"""Which calls the fused kernels take, and which are torch's own."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from pyfused.backends import cpu

# Sizes at which ATen's operator is the faster one: rows of (classes up to, elements below). Small
# calls cost more than their work, an autograd.Function alone as much as all of ATen's. Between 16
# and some 500 classes ATen's softmax fills its vectors as well as the kernels do, and float16 takes
# a second pass in the backward; there the kernels pay once outputs outgrow recycled memory.
# Measured as forward + backward, 2 threads, x86-64-v4; the last row is for all further classes.
_ANY = math.inf
ATEN_BELOW: dict[str, dict[torch.dtype, tuple[tuple[float, int], ...]]] = {
    "cross_entropy": {
        torch.float32: (
            (15, 1 << 12),
            (24, 1 << 16),
            (64, 1 << 20),
            (511, 1 << 19),
            (_ANY, 1 << 17),
        ),
        torch.float64: ((24, 1 << 13), (_ANY, 1 << 17)),
        torch.bfloat16: ((24, 1 << 12), (127, 1 << 22), (511, 1 << 20), (_ANY, 1 << 18)),
        torch.float16: ((24, 1 << 13), (_ANY, 1 << 23)),
    },
    # (N, C, d1, ..., dk): ATen, too, has vectors along the positions there.
    "cross_entropy_kdim": {
        torch.float32: ((4, 1 << 22), (_ANY, 1 << 18)),
        torch.float64: ((4, 1 << 21), (_ANY, 1 << 17)),
        torch.bfloat16: ((_ANY, 1 << 17),),
        torch.float16: ((_ANY, 1 << 17),),
    },
    "mse_loss": {
        torch.float32: ((_ANY, 1 << 17),),
        torch.float64: ((_ANY, 1 << 16),),
        torch.bfloat16: ((_ANY, 1 << 15),),
        torch.float16: ((_ANY, 1 << 18),),
    },
    "relu": {
        torch.float32: ((_ANY, 1 << 23),),
        torch.float64: ((_ANY, 1 << 21),),
        torch.bfloat16: ((_ANY, 1 << 17),),
        torch.float16: ((_ANY, 1 << 24),),
    },
}

# Most calls with small tensors need not look further. A call without elements is one of them.
_ALWAYS_BELOW = {
    op: min(below for rows in dtypes.values() for _, below in rows)
    for op, dtypes in ATEN_BELOW.items()
}

SMALL = "ATen is faster at this size"
_PLAIN = (Tensor, Parameter)
_INDEX_DTYPES = (torch.int64, torch.uint8)


def reason_for_torch(
    op: str, input: Tensor, target: Tensor | None = None, weight: Tensor | None = None
) -> str | None:
    """Why torch's own operator takes a call, None where a fused kernel does.

    Fused is first-order reverse mode on plain dense CPU tensors of the kernels' dtypes.
    """
    if type(input) not in _PLAIN:
        return f"input is a {type(input).__name__}"
    if aten_is_faster(op, input):
        return SMALL
    return (
        _active_mode()
        or _unsupported("input", input)
        or (target is not None and _unsupported("target", target, op == "cross_entropy"))
        or (weight is not None and _unsupported("weight", weight))
        or (weight is not None and weight.requires_grad and "weight requires grad")
        or (op == "cross_entropy" and input.shape[1:2] == (1,) and "one class")
        or None
    )


def aten_is_faster(op: str, input: Tensor) -> bool:
    """Whether ``ATEN_BELOW`` gives a call of this size to ATen; one without elements always is."""
    elements = input.numel()
    if elements < _ALWAYS_BELOW[op]:
        return True
    if op == "cross_entropy" and input.dim() > 2:
        op = "cross_entropy_kdim"
    classes = input.shape[min(1, input.dim() - 1)] if input.dim() else 1
    for most, below in ATEN_BELOW[op].get(input.dtype, ()):
        if classes <= most:
            return elements < below
    return False


def _active_mode() -> str | None:
    if torch.compiler.is_compiling():
        return "torch.compile"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace"
    if torch._C._are_functorch_transforms_active():
        return "torch.func"
    if forward_ad._current_level >= 0:
        return "forward-mode AD"
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return "a torch dispatch or function mode"
    return None


def _unsupported(name: str, tensor: Tensor, indices: bool = False) -> str | None:
    if type(tensor) not in _PLAIN:
        return f"{name} is a {type(tensor).__name__}"
    if not tensor.is_cpu:
        return f"{name} is on {tensor.device}"
    if tensor.layout is not torch.strided:
        return f"{name} has layout {tensor.layout}"
    if tensor.dtype not in cpu.DTYPES and not (indices and tensor.dtype in _INDEX_DTYPES):
        return f"{name} has dtype {tensor.dtype}"
    if tensor.is_neg() or tensor._is_zerotensor():
        return f"{name} is lazy"
    return None
