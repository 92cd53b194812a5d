"""The kernels, a module for each kind of device, and which of them a tensor takes.

CPU tensors take the C++ kernels and GPU tensors the Triton kernels. The environment variable
``PYFUSED_BACKEND`` names one of them for all: ``cpu``, ``triton`` (on CPU tensors too, where
``TRITON_INTERPRET=1``) or ``torch``, which is no kernel at all.
"""

from __future__ import annotations

import os
from functools import cache

import torch
from torch import Tensor

from pyfused.backends import cpu
from pyfused.backends.protocol import Backend as Backend
from pyfused.backends.protocol import LossResult
from pyfused.backends.versions import unsupported_triton
from pyfused.types import CrossEntropyOptions, Outputs, TensorSpec

DTYPES = tuple(cpu.DTYPES)  # those of the kernels, on all devices

FORCED = os.environ.get("PYFUSED_BACKEND") or None
if FORCED not in (None, "cpu", "triton", "torch"):
    raise ImportError(f"PYFUSED_BACKEND: expected cpu, triton or torch, got {FORCED!r}")
if FORCED == "cpu" and cpu.MISSING:
    raise ImportError(f"PYFUSED_BACKEND: expected triton or torch, as {cpu.MISSING}, got 'cpu'")


def backend_of(input: Tensor | TensorSpec) -> Backend:
    """Returns the kernels for a tensor that :func:`unsupported_device` gives no reason for."""
    if input.is_cpu and FORCED != "triton":
        return cpu
    from pyfused.backends import triton  # not before a GPU tensor asks for it

    return triton


def cross_entropy_once(
    backend: Backend,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: CrossEntropyOptions,
    outputs: Outputs,
    grad_output: Tensor | None = None,
) -> LossResult:
    """Prepares and launches the kernel once, for layouts that need not come again."""
    launch = backend.cross_entropy(input, target, weight, options, outputs, grad_output)
    denominator = options.denominator if isinstance(options.denominator, Tensor) else None
    tensors = input, target, weight, options.token_weight, denominator
    return launch(tensors, grad_output)


def takes_triton(input: Tensor | TensorSpec) -> bool:
    """Returns whether the Triton kernels are the ones for a tensor of this device."""
    return not input.is_cpu or FORCED == "triton"


def unsupported_device(
    name: str, tensor: Tensor | TensorSpec, input: Tensor | TensorSpec
) -> str | None:
    """Returns why no kernel runs on the device of a tensor beside an input, None where one does.

    Raises:
        RuntimeError: ``PYFUSED_BACKEND`` names a backend that cannot take tensors of this device.
    """
    if FORCED is None and tensor.is_cpu and input.is_cpu:
        return cpu.MISSING  # None, for most
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


def without_triton(device: torch.device) -> str | None:
    """Returns why the Triton kernels cannot run on a device, None where they can."""
    return _without_triton(device)


# As torch.compiler.assume_constant_result has it, which would import the compiler: Dynamo does not
# trace what asks for Triton's version.
without_triton._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _without_triton(device: torch.device) -> str | None:
    if reason := unsupported_triton():
        return reason
    if device.type == "cpu":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted else "that takes TRITON_INTERPRET=1"
    if not torch.cuda.is_available():  # to fake tensors, whose programs run elsewhere
        return "no GPU is available"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "Triton compiles for compute capability 8.0 and later"
    try:
        from triton.runtime import driver

        driver.active.get_current_target()  # compiles a module in C, into Triton's cache folder
    except Exception as error:  # no compiler, or a cache folder that cannot be written
        return f"Triton cannot start: {error}"
    return None
