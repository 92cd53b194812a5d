"""Which calls the fused kernels take, and which are torch's own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from pyfused.backends import cpu

# Below this many elements ATen's operator is the faster one: the call costs more than the work.
# Measured as forward + backward; an autograd.Function alone costs what ATen needs for them.
ATEN_BELOW = {"cross_entropy": 1, "mse_loss": 1, "relu": 1}

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
    if input.numel() < ATEN_BELOW[op]:
        return f"fewer than {ATEN_BELOW[op]} elements"
    return (
        _active_mode()
        or _unsupported("input", input)
        or (target is not None and _unsupported("target", target, op == "cross_entropy"))
        or (weight is not None and _unsupported("weight", weight))
        or (weight is not None and weight.requires_grad and "weight requires grad")
        or (op == "cross_entropy" and input.shape[1:2] == (1,) and "one class")
        or None
    )


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
