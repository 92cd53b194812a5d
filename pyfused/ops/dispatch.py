"""Which calls the fused kernels take, on which backend, and which are torch's own.

CPU tensors take the C++ kernels and GPU tensors the Triton kernels. The environment variable
``PYFUSED_BACKEND`` names one of them for all: ``cpu``, ``triton`` (on CPU tensors too, where
``TRITON_INTERPRET=1``) or ``torch``, at any size. What no kernel takes stays torch's.
"""

from __future__ import annotations

import math
import os
from functools import cache
from importlib import util

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from pyfused.backends import Backend, cpu

FORCED = os.environ.get("PYFUSED_BACKEND") or None
if FORCED not in (None, "cpu", "triton", "torch"):
    raise ImportError(f"PYFUSED_BACKEND: expected cpu, triton or torch, got {FORCED!r}")

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

# The same for GPUs, in elements. Not measured yet: a launch from Python takes some 10 us, and so
# does an autograd.Function; in that time a GPU gets through about this much.
ATEN_BELOW_ON_GPU = {"cross_entropy": 1 << 16, "mse_loss": 1 << 20, "relu": 1 << 22}

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

    Fused is first-order reverse mode on plain dense CPU and GPU tensors of the kernels' dtypes.

    Raises:
        RuntimeError: ``PYFUSED_BACKEND`` names a backend that cannot take tensors of this device.
    """
    if type(input) not in _PLAIN:
        return f"input is a {type(input).__name__}"
    if aten_is_faster(op, input):
        return SMALL
    return (
        _active_mode()
        or _unsupported("input", input, input)
        or (target is not None and _unsupported("target", target, input, op == "cross_entropy"))
        or (weight is not None and _unsupported("weight", weight, input))
        or (weight is not None and weight.requires_grad and "weight requires grad")
        or (op == "cross_entropy" and input.shape[1:2] == (1,) and "one class")
        or None
    )


def aten_is_faster(op: str, input: Tensor) -> bool:
    """Whether a table gives a call of this size to ATen; one without elements always is."""
    elements = input.numel()
    if elements < _ALWAYS_BELOW[op]:
        return elements == 0 or FORCED is None
    if FORCED is not None:
        return False
    if not input.is_cpu:
        return elements < ATEN_BELOW_ON_GPU[op]
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


def backend_of(input: Tensor) -> Backend:
    """The kernels for a tensor that ``reason_for_torch`` has nothing against."""
    if input.is_cpu and FORCED != "triton":
        return cpu
    from pyfused.backends import triton  # not before a GPU tensor asks for it

    return triton


def _off_cpu(name: str, tensor: Tensor, input: Tensor) -> str | None:
    """What is against a tensor that is not, or not simply, one for the C++ kernels."""
    if FORCED == "torch":
        return "PYFUSED_BACKEND is torch"
    if tensor.device != input.device or not (tensor.is_cpu or tensor.is_cuda):
        return f"{name} is on {tensor.device}"
    if tensor.is_cpu and FORCED != "triton":
        return None
    if FORCED == "cpu":
        raise RuntimeError(f"PYFUSED_BACKEND: cpu cannot run on {tensor.device}")
    missing = without_triton(tensor.device)
    if missing and FORCED == "triton":
        raise RuntimeError(f"PYFUSED_BACKEND: triton cannot run on {tensor.device}: {missing}")
    return missing


@cache
def without_triton(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on a device, None where they can."""
    if util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cpu":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted else "that takes TRITON_INTERPRET=1"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "Triton compiles for compute capability 8.0 and later"
    return None


def _unsupported(name: str, tensor: Tensor, input: Tensor, indices: bool = False) -> str | None:
    if type(tensor) not in _PLAIN:
        return f"{name} is a {type(tensor).__name__}"
    simple = tensor.is_cpu and input.is_cpu and FORCED is None
    if not simple and (reason := _off_cpu(name, tensor, input)):
        return reason
    if tensor.layout is not torch.strided:
        return f"{name} has layout {tensor.layout}"
    if tensor.dtype not in cpu.DTYPES and not (indices and tensor.dtype in _INDEX_DTYPES):
        return f"{name} has dtype {tensor.dtype}"
    if tensor.is_neg() or tensor._is_zerotensor():
        return f"{name} is lazy"
    return None
