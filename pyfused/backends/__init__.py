"""Chooses the backend for a tensor: C++ kernels on CPUs, Triton kernels on GPUs.

The environment variable ``PYFUSED_BACKEND`` overrides the choice: ``cpu``, ``triton`` (also for CPU
tensors if ``TRITON_INTERPRET=1``), or ``torch`` to use no kernels.
"""

from __future__ import annotations

import os
import subprocess
from functools import cache

import torch
from torch import Tensor

from pyfused.backends import cpu
from pyfused.backends.protocol import Backend as Backend
from pyfused.backends.versions import unsupported_triton
from pyfused.torch_internals import called_while_tracing

DTYPES = tuple(cpu.DTYPES)  # the dtypes that the kernels of all devices support

FORCED = os.environ.get("PYFUSED_BACKEND") or None
if FORCED not in (None, "cpu", "triton", "torch"):
    raise ImportError(f"PYFUSED_BACKEND: expected cpu, triton or torch, got {FORCED!r}")
if FORCED == "cpu" and cpu.MISSING:
    raise ImportError(f"PYFUSED_BACKEND: expected triton or torch, as {cpu.MISSING}, got 'cpu'")


def backend_of(input: Tensor) -> Backend:
    """Returns the backend for a tensor for which :func:`unsupported_device` returns None."""
    if input.is_cpu and FORCED != "triton":
        return cpu
    from pyfused.backends import triton  # imported at its first use

    return triton


def takes_triton(input: Tensor) -> bool:
    """Returns whether Triton kernels are used for tensors of this device."""
    return input.is_cuda or FORCED == "triton"


def unsupported_device(name: str, tensor: Tensor, input: Tensor) -> str | None:
    """Returns why no kernel supports the tensor's device together with the input's, or None.

    Raises:
        RuntimeError: ``PYFUSED_BACKEND`` names a backend that does not support the device.
    """
    if FORCED is None and tensor.is_cpu and input.is_cpu:
        return cpu.MISSING
    if FORCED == "torch":
        return "PYFUSED_BACKEND is torch"
    if tensor.device != input.device or not (tensor.is_cpu or tensor.is_cuda):
        return f"{name} is on {tensor.device}"
    if tensor.is_cpu and FORCED != "triton":
        return None
    if FORCED == "cpu":
        raise RuntimeError(f"PYFUSED_BACKEND: cpu cannot run on {tensor.device}")
    missing: str | None = without_triton(tensor.device)
    if missing and FORCED == "triton":
        raise RuntimeError(f"PYFUSED_BACKEND: triton cannot run on {tensor.device}: {missing}")
    return missing


@called_while_tracing  # Dynamo cannot trace the lookup of Triton's version
def without_triton(device: torch.device) -> str | None:
    """Returns why the Triton kernels cannot run on a device, None if they can."""
    return _without_triton(device)


@cache
def _without_triton(device: torch.device) -> str | None:
    if reason := unsupported_triton():
        return reason
    if device.type == "cpu":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted else "CPU tensors need TRITON_INTERPRET=1"
    if not torch.cuda.is_available():  # fake CUDA tensors on a machine without a GPU
        return "no GPU is available"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "Triton compiles for compute capability 8.0 and later"
    try:
        from triton.runtime import driver

        driver.active.get_current_target()  # compiles a C module into Triton's cache folder
    except (ImportError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
        # There is no C compiler, or the cache folder is not writable.
        return f"Triton cannot start: {error}"
    return None
