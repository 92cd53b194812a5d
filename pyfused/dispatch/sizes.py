"""The sizes from which a call is dispatched to a kernel, in elements.

A kernel costs a few microseconds more per call than torch's operator and saves some nanoseconds per
element: many if torch runs several operators, few if torch is limited by memory bandwidth. Each
operator has one of five sizes from which a kernel is clearly faster on AMD EPYC, with AVX-512 and
with AVX2. The largest sizes are for outputs whose pages torch gets from the system.

``python -m pyfused tune`` measures the limits of a machine, which then replace these.
"""

from __future__ import annotations

import json
import os
import sys
from functools import cache
from pathlib import Path

import torch

from pyfused import backends
from pyfused.backends import cpu
from pyfused.dispatch.operator import Arguments, Operator
from pyfused.dispatch.signature import PLAIN

NEVER = sys.maxsize
FORCED = backends.FORCED  # the backend that runs for all sizes, None by default
OF_LOGITS = ("cross_entropy", "log_probs", "kl_div_with_logits")
LINEAR = ("linear_cross_entropy", "linear_log_probs", "linear_kl_div", "linear_topk_kl_div")
COMPOSED = ("rmse_loss", "multilabel_soft_margin_loss")
SMALL, MEDIUM, LARGE, HUGE, PAGES = 1 << 14, 1 << 17, 1 << 19, 1 << 22, 1 << 24
Limits = tuple[int, int]


def _rows(first: int, second: int, names: str) -> dict[str, Limits]:
    return dict.fromkeys(names.split(), (first, second))


# The second limit applies to unreduced losses, which write one more output; to activations without
# a gradient; and to losses over few classes, because torch does not vectorise rows that are shorter
# than a vector. The row of a family applies to operators without their own row. VECTOR is in bytes.
VECTOR = 64 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 32
FEW = VECTOR // 4 - 1  # classes in float32; twice as many in half precision
ON_CPU = {
    **_rows(0, 0, "gaussian_nll_loss hinge_embedding_loss log_cosh_loss sigmoid_focal_loss"),
    **_rows(0, 0, "log_probs kl_div_with_logits multilabel_soft_margin_loss quantile_loss"),
    **_rows(0, 0, "cosine_embedding_loss softcap softsign"),
    **_rows(0, SMALL, "triplet_margin_loss hinge_loss"),
    **_rows(SMALL, MEDIUM, "binary_cross_entropy binary_cross_entropy_with_logits kl_div"),
    **_rows(SMALL, MEDIUM, "margin_ranking_loss multilabel_margin_loss"),
    **_rows(SMALL, MEDIUM, "poisson_nll_loss soft_margin_loss"),
    **_rows(1 << 10, 1 << 10, "LongFormula"),  # 3 to 4 times as fast as torch from this size on
    **_rows(SMALL, SMALL, f"Activation Formula {' '.join(LINEAR)}"),  # elements of heads are logits
    **_rows(SMALL, PAGES, "gelu"),
    **_rows(MEDIUM, SMALL, "cross_entropy log_softmax"),
    **_rows(MEDIUM, MEDIUM, "ClassLoss logsigmoid"),
    **_rows(MEDIUM, NEVER, "multi_margin_loss"),
    **_rows(MEDIUM, PAGES, "PointwiseLoss"),
    **_rows(LARGE, PAGES, "Composed"),
    **_rows(LARGE, MEDIUM, "silu Gated"),
    **_rows(LARGE, SMALL, "softmax"),
    **_rows(HUGE, MEDIUM, "sigmoid"),
    **_rows(PAGES, PAGES, "relu leaky_relu relu6 hardtanh threshold hardsigmoid hardswish"),
    **_rows(PAGES, PAGES, "hardshrink softshrink prelu glu"),
    **_rows(PAGES, NEVER, "nll_loss"),
}
# In half precision torch processes the same number of bytes per second, so limits double. The
# kernels convert float16 in a separate step. Over classes torch is slower. torch's gelu calls
# oneDNN.
HALVES = {torch.bfloat16: 2, torch.float16: 8}
ON_CPU_OF_HALVES = {
    **_rows(MEDIUM, SMALL, "cross_entropy log_softmax softmax"),
    **_rows(SMALL, NEVER, "gelu"),
}

# Limits on GPUs, measured on an H100 in float32 with backward. The host had a slow CPU: launching a
# step of mse_loss took 150 us with torch and 400 us with pyfused. torch's activations reach the
# memory bandwidth. Its nll_loss takes 1.6 us per thousand rows for any number of classes.
FEW_ON_GPU = 64
ON_GPU = {
    **_rows(0, 0, f"log_probs {' '.join(LINEAR)}"),
    **_rows(SMALL, SMALL, "sigmoid_focal_loss Formula LongFormula"),
    **_rows(HUGE, HUGE, "gaussian_nll_loss"),
    **_rows(1 << 25, 1 << 25, "l1_loss softmax log_softmax"),
    **_rows(1 << 26, 1 << 26, "mse_loss smooth_l1_loss huber_loss"),
    **_rows(1 << 26, 1 << 21, "cross_entropy"),
    **_rows(1 << 27, 1 << 21, "nll_loss"),
    **_rows(NEVER, NEVER, "Activation"),
}
_DEFAULT = PAGES, PAGES

# In compiled programs, on CPUs and on GPUs: the sizes from which a call becomes a custom operator,
# which Inductor cannot fuse with its neighbours. Operators without a row stay torch's functions.
# Heads avoid materialising the logits. For logits and large losses on CPUs, a kernel moves less
# memory than Inductor's code, which allocates its outputs. A custom operator costs about 30 us per
# pass. No compiled call has been measured on a GPU: from 2^24 logits on, launching should take no
# longer than the kernels, which are 1.1 to 2.5 times as fast as Inductor's code
# (benchmarks/results/nvidia-h100-80gb-hbm3/table.md).
COMPILED = {
    **_rows(0, 0, " ".join(LINEAR)),
    **_rows(0, 0, "multilabel_margin_loss"),  # torch's graph counts labels past the end
    **_rows(1 << 18, 1 << 24, " ".join(OF_LOGITS)),
    **_rows(PAGES, NEVER, "mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy"),
    **_rows(PAGES, NEVER, "binary_cross_entropy_with_logits kl_div poisson_nll_loss"),
    **_rows(PAGES, NEVER, "gaussian_nll_loss soft_margin_loss hinge_embedding_loss hinge_loss"),
    **_rows(PAGES, NEVER, "margin_ranking_loss quantile_loss log_cosh_loss sigmoid_focal_loss"),
    **_rows(PAGES, NEVER, "triplet_margin_loss cosine_embedding_loss nll_loss multi_margin_loss"),
    **_rows(PAGES, NEVER, " ".join(COMPOSED)),  # their parts are dispatched separately
}

MACHINE = f"{cpu.capability}, torch {torch.__version__}"


def tuned_file() -> Path:
    """Returns the file that ``python -m pyfused tune`` writes.

    ``Path.home()`` raises an error for users without a home directory, for example in containers.
    """
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111
    return Path(caches, "pyfused", "sizes.json")


def tuned() -> dict[str, Limits]:
    """Returns the limits measured on this machine, {} if there are none."""
    try:
        results = json.loads(tuned_file().read_text(encoding="utf-8"))
        limits = results["limits"] if results["machine"] == MACHINE else {}
        return {name: (int(first), int(second)) for name, (first, second) in limits.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


@cache
def cpu_limits() -> dict[str, Limits]:
    """Returns the table for CPUs, updated by the limits measured on this machine.

    Their file is read when a size first matters, not when pyfused is imported.
    """
    return ON_CPU | tuned()


@cache
def limits(op: Operator, cpu: bool, dtype: torch.dtype = torch.float32) -> Limits:
    """Returns the limits of an operator or its family, on CPUs or GPUs."""
    if cpu and dtype in HALVES and op.name in ON_CPU_OF_HALVES:
        return ON_CPU_OF_HALVES[op.name]
    table = cpu_limits() if cpu else ON_GPU
    names = op.name, op.family, *[kind.__name__ for kind in type(op).__mro__]
    first, second = next((table[name] for name in names if name in table), _DEFAULT)
    factor = HALVES.get(dtype, 1) if cpu else 1
    return factor * first, factor * second


def is_small(op: Operator, arguments: Arguments, elements: int | None = None) -> bool:
    """Returns whether a call is dispatched to torch's operator because it is small or empty.

    It is not called while compiling, because the program would depend on the size.

    Args:
        elements: The number of elements of the call, None to compute it.
    """
    input = arguments[0]
    if elements is None:
        if type(input) not in PLAIN or input.is_nested:
            return False
        elements = input.numel()
        if type(elements) is not int:  # torch.jit.trace returns a tensor
            return False
        if op.broadcast:
            other = arguments[op.broadcast[0]]
            if type(other) not in PLAIN or other.is_nested or other.shape != input.shape:
                elements = op.elements(arguments)
        elif op.is_linear:
            elements = op.elements(arguments)
    if elements == 0 or FORCED is not None:
        return elements == 0
    on_cpu = input.is_cpu
    first, second = limits(op, on_cpu, input.dtype)
    if (elements < first) == (elements < second):  # the common case
        return elements < first
    few = VECTOR // min(input.element_size(), 4) - 1 if on_cpu else FEW_ON_GPU
    return elements < (second if op.takes_second_limit(arguments, few) else first)
