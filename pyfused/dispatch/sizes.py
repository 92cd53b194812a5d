"""The sizes from which a call is dispatched to a kernel, in elements.

A kernel costs a few microseconds more per call than torch's operator and saves some nanoseconds per
element: many if torch runs several operators, few if torch is limited by memory bandwidth.

On CPUs, each operator has a size from which a kernel is faster with two threads on every processor
that was measured: AMD EPYC, with AVX-512 and with AVX2, and Intel Xeon. With more threads, these
sizes grow. They do not depend on strides: most kernels of strided operands gain from the same sizes
on, and the largest losses, such as silu's of expanded operands, remain at larger sizes.
On GPUs, the sizes follow from the bandwidth of the memory and the host's time for a call, which the
environment variable ``PYFUSED_HOST_US`` sets in microseconds.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.overrides import has_torch_function_unary

from pyfused import backends
from pyfused.backends import cpu, unsupported_device, without_triton
from pyfused.dispatch.operator import Operator, Tensors
from pyfused.dispatch.reasons import SMALL as SMALL_REASON
from pyfused.dispatch.report import add_traced
from pyfused.torch_internals import PLAIN, has_function_mode

FORCED = backends.FORCED  # the backend that runs for all sizes, None by default
LINEAR = ("linear_cross_entropy", "linear_log_probs", "linear_kl_div", "linear_topk_kl_div")
ALWAYS, NEVER = 1, sys.maxsize  # an empty call is below all limits
TINY, SMALL, MEDIUM, LARGE, LOGITS = (1 << n for n in (10, 14, 17, 19, 24))
# torch divides n elements among at most n / PER_THREAD threads. Until all threads have work, what a
# kernel saves per call does not grow with n; from there on, it is divided by the threads.
PER_THREAD = 1 << 15


class Limits(NamedTuple):
    """The sizes from which an operator's calls are dispatched to a kernel, in elements.

    Attributes:
        from_elements: The smallest size, except for few classes.
        few_classes: The size for rows of few contiguous classes, which torch does not vectorise; 0
            if their number does not matter. If it is set, `unreduced` is for few classes that are
            not contiguous.
        without_gradient: A larger size for calls without a gradient, where torch's forward pass is
            faster than its backward pass; 0 for the same size.
        unreduced: A larger size for losses that are not reduced, which write one more output; 0 for
            the same size.
    """

    from_elements: int
    few_classes: int = 0
    without_gradient: int = 0
    unreduced: int = 0

    def scaled(self, factor: int, threads: int) -> Limits:
        """Returns limits measured with two threads for others, times a factor, up to LOGITS."""

        def scale(limit: int) -> int:
            if not TINY <= limit < LOGITS:
                return limit
            grows = max(2, threads) if limit > 2 * PER_THREAD else 2
            return min(LOGITS, limit * factor * grows // 2)

        return Limits(*map(scale, self))

    def scaled_on_gpu(self, factor: float) -> Limits:
        """Returns limits for another GPU, host or dtype, as powers of two from SMALL on."""

        def scale(limit: int) -> int:
            if limit <= SMALL or limit == NEVER:
                return limit
            return max(SMALL, 1 << math.ceil(math.log2(limit * factor)))

        return Limits(*map(scale, self))


# The row of a family applies to operators without their own row. VECTOR is in bytes.
VECTOR = 64 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 32
ON_CPU: dict[str, Limits] = {
    "cosine_embedding_loss": Limits(ALWAYS, without_gradient=4 * SMALL, unreduced=4 * SMALL),
    "gaussian_nll_loss": Limits(2 * TINY, unreduced=SMALL),
    "hinge_embedding_loss": Limits(ALWAYS, without_gradient=2 * TINY, unreduced=2 * TINY),
    "hinge_loss": Limits(ALWAYS, without_gradient=SMALL, unreduced=2 * SMALL),
    "kl_div_with_logits": Limits(ALWAYS),
    "log_cosh_loss": Limits(ALWAYS),
    "log_probs": Limits(ALWAYS),
    "quantile_loss": Limits(ALWAYS),
    "sigmoid_focal_loss": Limits(ALWAYS),
    "softcap": Limits(4 * TINY),
    "softsign": Limits(2 * SMALL),
    "triplet_margin_loss": Limits(ALWAYS, without_gradient=4 * SMALL, unreduced=4 * SMALL),
    "LongFormula": Limits(TINY),  # 3 to 4 times as fast as torch from this size on
    "Formula": Limits(SMALL),
    **dict.fromkeys(LINEAR, Limits(2 * MEDIUM)),  # the elements of heads are logits
    "binary_cross_entropy": Limits(SMALL, without_gradient=MEDIUM, unreduced=MEDIUM),
    "binary_cross_entropy_with_logits": Limits(SMALL, without_gradient=MEDIUM, unreduced=MEDIUM),
    "kl_div": Limits(SMALL, without_gradient=MEDIUM, unreduced=MEDIUM),
    "margin_ranking_loss": Limits(SMALL, without_gradient=MEDIUM, unreduced=MEDIUM),
    "poisson_nll_loss": Limits(SMALL, without_gradient=MEDIUM, unreduced=MEDIUM),
    "soft_margin_loss": Limits(SMALL, without_gradient=MEDIUM, unreduced=MEDIUM),
    "gelu": Limits(LOGITS, without_gradient=NEVER),  # torch calls oneDNN
    "mish": Limits(SMALL),
    "Activation": Limits(MEDIUM),  # on an Intel Xeon, 0.75 times as fast as torch at 2^14
    "cross_entropy": Limits(MEDIUM, few_classes=SMALL, unreduced=8 * MEDIUM),
    "log_softmax": Limits(LARGE, few_classes=SMALL),
    "logsigmoid": Limits(MEDIUM),
    "l1_loss": Limits(MEDIUM, unreduced=LOGITS),
    "smooth_l1_loss": Limits(2 * MEDIUM, without_gradient=4 * MEDIUM, unreduced=NEVER),
    "PointwiseLoss": Limits(MEDIUM, without_gradient=4 * MEDIUM, unreduced=LOGITS),
    "softmax": Limits(2 * LARGE, few_classes=SMALL),
    "Gated": Limits(LARGE),
    "silu": Limits(2 * LARGE, without_gradient=4 * LARGE),
    "leaky_relu": Limits(LOGITS),
    "relu": Limits(LOGITS),
    "sigmoid": Limits(LOGITS),
    "tanh": Limits(LOGITS),  # on Intel's processors, torch calls MKL
    "nll_loss": Limits(LOGITS, without_gradient=NEVER),  # forward reads one element of each row
}
# In half precision torch processes the same number of bytes per second, so limits double. For
# float16 they grow more, because the kernels convert it in a separate step, which takes longer than
# they gain where torch is limited by memory bandwidth (LOGITS). torch's half-precision softmax,
# cross-entropy and tanh process fewer bytes per second, so their limits do not double.
HALVES = {torch.bfloat16: 2, torch.float16: 8}
ON_CPU_OF_HALVES: dict[str, Limits] = {
    "cross_entropy": Limits(MEDIUM, few_classes=SMALL, unreduced=8 * MEDIUM),
    "log_softmax": Limits(LARGE, few_classes=SMALL),
    "softmax": Limits(LARGE, few_classes=SMALL),
    "tanh": Limits(2 * MEDIUM),
}


def _host_us() -> float:
    value = os.environ.get("PYFUSED_HOST_US") or "200"
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        expected = "a positive number of microseconds"
        raise ImportError(f"PYFUSED_HOST_US: expected {expected}, got {value!r}")
    return number


# The limits on GPUs follow from the host's time for a call, forward and backward, and from the
# bandwidth of the memory. A slow host took 190 us. The time is rounded up, because limits that are
# too low make calls slower: with 60 us, calls took 1.2 to 1.8 times as long.
HOST_US = _host_us()


@cache
def gb_per_s(device: torch.device) -> float:
    """Returns the bandwidth of a GPU's memory, an H100's if the device does not tell it."""
    if device.type != "cuda" or without_triton(device):  # such as fake tensors
        return 3000.0
    from triton.testing import get_dram_gbps

    return get_dram_gbps(device.index) or 3000.0


# A kernel is faster if torch's kernels take longer on the GPU than launching ours takes on the
# host. Limits above SMALL are for float32, and for a GPU and a host like an H100's: in the host's
# time for a call, PASS elements are read or written. Each is divided by the number of passes in
# whose time torch's kernels run; with few classes, its nll_loss takes 1.6 us per thousand rows.
REFERENCE_US, REFERENCE_GB_PER_S, FEW_ON_GPU = 200, 3000, 64
PASS = 1000 * REFERENCE_US * REFERENCE_GB_PER_S // 4
ON_GPU: dict[str, Limits] = {
    # torch launches many kernels or synchronises, so its calls take longer on the host.
    "cosine_embedding_loss": Limits(ALWAYS),
    "gaussian_nll_loss": Limits(ALWAYS),
    "kl_div_with_logits": Limits(ALWAYS),
    "linear_cross_entropy": Limits(ALWAYS),
    "linear_kl_div": Limits(ALWAYS),
    "linear_log_probs": Limits(ALWAYS),
    "linear_topk_kl_div": Limits(ALWAYS),
    "log_probs": Limits(ALWAYS),
    "sigmoid_focal_loss": Limits(ALWAYS),
    "triplet_margin_loss": Limits(ALWAYS),
    # torch launches 13 to 23 kernels, which takes the host about as long as a call of pyfused.
    "Formula": Limits(SMALL),
    "LongFormula": Limits(SMALL),
    "hinge_embedding_loss": Limits(SMALL),
    "log_cosh_loss": Limits(SMALL),
    "margin_ranking_loss": Limits(SMALL),
    "quantile_loss": Limits(SMALL),
    "binary_cross_entropy_with_logits": Limits(PASS // 22),
    "cross_entropy": Limits(PASS // 8, few_classes=PASS // 50),
    "kl_div": Limits(PASS // 13),
    "l1_loss": Limits(PASS // 13),
    "log_softmax": Limits(PASS // 5),
    "softmax": Limits(PASS // 5),
    # torch's kernels reach the memory bandwidth.
    "Activation": Limits(NEVER),
}
DEFAULT_ON_CPU, DEFAULT_ON_GPU = Limits(LOGITS), Limits(PASS // 8)

# The head of a converted model takes about 0.4 ms longer per step than a call by name, so it needs
# so many times the logits. With 64, 256 and 768 features, a step took 1.04 to 1.44 times as long as
# torch's at 2^18 logits, 1.0 to 1.2 times at 2^19, and 0.87 to 1.06 times at 2^20.
CONVERTED = 4

# In compiled programs, on CPUs and on GPUs: the number of logits from which a call becomes a custom
# operator. All other operators are torch's functions, which Inductor fuses with their neighbours.
# Heads do not store all logits: on CPUs a training step took 2.1 times as long as Inductor's
# at 2^16 logits, 1.2 times at 2^18, and 0.8 times at 2^20, from where converted heads gain, too. A
# custom operator costs about 30 us per pass. On GPUs, launching should take no longer than the
# kernels from 2^24 logits on; the limit has not been measured.
COMPILED: dict[str, tuple[int, int]] = dict.fromkeys(LINEAR, (2 * LARGE, LOGITS))


def _row(table: dict[str, Limits], name: str, family: str, default: Limits) -> Limits:
    """Returns the limits of an operator or its family."""
    return table.get(name) or table.get(family) or default


@lru_cache(maxsize=1024)
def limits_of(
    name: str, family: str, dtype: torch.dtype, device: torch.device, threads: int
) -> Limits:
    """Returns the limits of an operator on a device; on CPUs, with a number of threads."""
    if device.type != "cpu":
        factor = HOST_US * gb_per_s(device) / (REFERENCE_US * REFERENCE_GB_PER_S)
        limits = _row(ON_GPU, name, family, DEFAULT_ON_GPU)
        return limits.scaled_on_gpu(factor * 4 / dtype.itemsize)
    if dtype in HALVES and name in ON_CPU_OF_HALVES:
        return ON_CPU_OF_HALVES[name].scaled(1, threads)
    factor = HALVES.get(dtype, 1)
    if name in LINEAR and factor > 1 and cpu.product_dtype(dtype) is torch.float32:
        factor = 1  # products take most of the time, and torch's are slower
    row = _row(ON_CPU, name, family, DEFAULT_ON_CPU)
    if dtype is torch.float16:
        row = Limits(*[NEVER if limit == LOGITS else limit for limit in row])
    return row.scaled(factor, threads)


def why_small(op: Operator, tensors: Tensors, dim: Any) -> str:
    """Returns why torch computes a small call, with the numbers that decide it on GPUs.

    No kernel computes calls on devices that are neither CPUs nor GPUs, of any size.
    """
    input = tensors[0]
    if reason := unsupported_device(op.names[0], input, input):
        return reason
    if input.is_cpu or not input.numel():
        return SMALL_REASON
    limits = limits_of(op.name, op.family, input.dtype, input.device, torch.get_num_threads())
    limit = (
        limits.few_classes if limits.few_classes and _are_few(input, dim) else limits.from_elements
    )
    if limit == NEVER:
        return SMALL_REASON
    reason = f"{SMALL_REASON}: kernels run from {limit:,} elements"
    if _row(ON_GPU, op.name, op.family, DEFAULT_ON_GPU).from_elements <= SMALL:
        return reason
    bandwidth = f"{gb_per_s(input.device):g} GB/s on the GPU"
    return f"{reason} ({HOST_US:g} us for a call on the host, {bandwidth})"


# ---- small calls ---------------------------------------------------------------------------------


def set_least(op: Operator) -> None:
    """Sets `least` to the smallest of an operator's limits, of all devices and dtypes."""
    on_cpu = _row(ON_CPU, op.name, op.family, DEFAULT_ON_CPU)
    least = min(filter(None, on_cpu + ON_CPU_OF_HALVES.get(op.name, on_cpu)))
    on_gpu = _row(ON_GPU, op.name, op.family, DEFAULT_ON_GPU).from_elements
    op.least = on_gpu if on_gpu == NEVER else min(SMALL, on_gpu), least


@contextmanager
def every_size() -> Iterator[None]:
    """Runs kernels for tensors of every size, for tests and benchmarks."""
    global FORCED
    before, FORCED = FORCED, FORCED or "every size"
    try:
        yield
    finally:
        FORCED = before


def torch_computes(
    op: Operator,
    tensors: Tensors,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str | None = None,
    dim: int | None = 1,
) -> bool:
    """Returns whether torch computes a call because it is small or empty, or cannot be dispatched.

    It computes calls in compiled programs, calls with the deprecated arguments, and calls whose
    input is not a tensor, for which it raises an error. Each function of ``functional.py`` that
    torch has asks this first, so that it adds little to the time of a small call. Tensor subclasses
    and function modes have to see torch's function and nothing else, so dispatch decides about
    them, whatever the size.

    Args:
        tensors: The tensors of the call; optional ones at the end may be omitted.
        reduction: The reduction of a loss.
        dim: The dimension of the classes.
    """
    if not size_average is reduce is None:
        return True
    if is_dynamo_compiling():
        add_traced(op.name)
        return True
    input = tensors[0]
    if type(input) not in PLAIN or (has_torch_function_unary(input) and has_function_mode()):
        return not isinstance(input, Tensor)  # such as a proxy of torch.fx, which records the call
    elements = input.numel()
    if type(elements) is not int:  # torch.jit.trace returns a tensor
        return False
    if op.is_linear:
        if type(tensors[1]) not in PLAIN or tensors[1].is_nested or input.is_nested:
            return False
        elements = op.elements(tensors)
    for i in op.broadcast:
        other = tensors[i]
        if type(other) not in PLAIN:
            if isinstance(other, Tensor):
                return False
        elif input.is_nested or other.is_nested or other.shape != input.shape:
            elements = op.elements(tensors)
            break
    if FORCED is not None:
        return not elements
    if elements < op.least[input.is_cpu]:
        return True
    limits = limits_of(op.name, op.family, input.dtype, input.device, torch.get_num_threads())
    if elements >= limits.from_elements and elements >= max(limits):
        return False
    if limits.few_classes:
        if not _are_few(input, dim):
            return elements < limits.from_elements
        if input.stride(dim) == 1 and (not input.is_cpu or dim % input.dim() == input.dim() - 1):
            return elements < limits.few_classes
    if elements < limits.from_elements or (reduction == "none" and elements < limits.unreduced):
        return True
    return elements < limits.without_gradient and not op.needs_gradient(tensors)


def _are_few(input: Tensor, dim: Any) -> bool:
    """Returns whether a dimension has so few classes that torch does not vectorise them."""
    if input.is_nested or type(dim) is not int:
        return False
    shape = input.shape
    if not -len(shape) <= dim < len(shape) or shape[dim] > FEW_ON_GPU:  # larger than on CPUs
        return False
    few = VECTOR // min(input.element_size(), 4) - 1 if input.is_cpu else FEW_ON_GPU
    return shape[dim] <= few and input.layout is torch.strided


def converted_limit(op: Operator, input: Tensor) -> int:
    """Returns the number of logits from which the head of a converted model gains."""
    if FORCED is not None:
        return 0
    limits = limits_of(op.name, op.family, input.dtype, input.device, torch.get_num_threads())
    return max(limits.from_elements, min(LOGITS, CONVERTED * limits.from_elements))
