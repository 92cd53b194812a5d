"""From how many elements on a kernel takes a call. Whatever depends on a call's size asks here.

A kernel's call costs some microseconds more than torch's, and each element gains some nanoseconds.
So each operator has the number of elements from which a kernel has clearly won, with a factor of
two as a margin: on AMD EPYC with AVX-512, on one thread, in float32, float64 and bfloat16, forward
alone and with backward. What torch computes by several operators is faster in one kernel at any
size. What torch computes as fast as memory can be read is not faster until the outputs are so large
that torch takes new memory from the system, page by page.

``python -m pyfused tune`` measures the numbers of a machine, which then take the place of these.
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
from pyfused.ops.declaration import Arguments, Operator

NEVER = sys.maxsize
FORCED = backends.FORCED  # a backend that takes calls of any size; None if none is forced
OF_LOGITS = ("cross_entropy", "log_probs", "kl_div_with_logits")
LINEAR = ("linear_cross_entropy", "linear_log_probs", "linear_kl_div", "linear_topk_kl_div")
COMPOSED = ("rmse_loss", "multilabel_soft_margin_loss")

Limits = tuple[int, int]


def _of(limits: Limits, *names: str) -> dict[str, Limits]:
    return dict.fromkeys(names, limits)


# On CPUs: the smallest calls that a kernel takes, in elements. The second number is for a loss of
# each element of pointwise losses, which is an output more; for calls without a gradient of
# activations of several tensors; for few classes where there are classes, as torch has no vectors
# for rows that do not fill one. Names of classes stand for operators without a row. VECTOR is what
# one holds, in bytes.
VECTOR = 64 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 32
FEW = VECTOR // 4 - 1  # classes; twice as many in half precision
ON_CPU = {
    **_of((0, 0), "gaussian_nll_loss", "hinge_embedding_loss", "log_cosh_loss"),
    **_of((0, 0), "log_probs", "kl_div_with_logits"),
    **_of((0, 0), "cosine_embedding_loss", "triplet_margin_loss"),
    **_of((0, 0), "multilabel_soft_margin_loss", "sigmoid_focal_loss", "softcap"),
    **_of((0, 1 << 13), "quantile_loss"),
    **_of((1 << 13, 1 << 16), "binary_cross_entropy", "binary_cross_entropy_with_logits", "kl_div"),
    **_of((1 << 13, 1 << 16), "hinge_loss", "margin_ranking_loss", "poisson_nll_loss"),
    **_of((1 << 13, 1 << 16), "soft_margin_loss"),
    **_of((1 << 16, 1 << 20), "l1_loss"),
    **_of((1 << 17, 1 << 23), "mse_loss", "huber_loss", "rmse_loss"),
    **_of((1 << 17, 1 << 24), "smooth_l1_loss"),
    **_of((1 << 17, 1 << 17), "PointwiseLoss", "ClassLoss", "Composed"),
    **_of((1 << 12, 1 << 12), "gelu"),
    **_of((1 << 15, 1 << 15), "tanh", "mish", "softsign", "tanhshrink"),
    **_of((1 << 19, 1 << 19), "silu", "Activation", "Gated"),
    **_of((1 << 21, 1 << 21), "sigmoid"),
    **_of((1 << 22, 1 << 23), "prelu"),
    **_of((1 << 23, 1 << 24), "glu"),
    **_of((1 << 24, 1 << 24), "relu", "leaky_relu", "relu6", "hardtanh", "threshold"),
    **_of((1 << 24, 1 << 24), "nll_loss"),
    **_of((1 << 24, 1 << 24), "hardsigmoid", "hardswish", "hardshrink", "softshrink"),
    **_of((1 << 16, 1 << 12), "cross_entropy"),
    **_of((1 << 17, 1 << 12), "log_softmax"),
    **_of((1 << 22, 1 << 12), "softmax"),
    **_of((1 << 16, NEVER), "multi_margin_loss"),
    **_of((1 << 15, 1 << 15), *LINEAR),  # logits
    **_of((1 << 14, 1 << 14), "Formula"),
    **_of((1 << 10, 1 << 10), "LongFormula"),
}
# torch computes float16 in float32, as fast as other dtypes, but the kernels convert it in a step
# of its own.
FLOAT16 = 8
# torch's softmax takes 1.1 to 10 times as long in these from so many elements on, of many classes.
_HALVES, SOFTMAX_OF_HALVES = (torch.bfloat16, torch.float16), 1 << 16

# On GPUs, measured on an H100 with float32 and backward, behind a slow processor, where torch
# launched a step of mse_loss in 150 us and pyfused in 400. ATen's activations reach the memory's
# bandwidth, so that none is faster. Its loss of class indices takes 1.6 us a thousand rows,
# whatever the number of classes.
FEW_ON_GPU = 64
ON_GPU = {
    **_of((NEVER, NEVER), "Activation"),
    **_of((1 << 26, 1 << 26), "mse_loss", "smooth_l1_loss", "huber_loss"),
    **_of((1 << 25, 1 << 25), "l1_loss", "softmax", "log_softmax"),
    **_of((1 << 26, 1 << 21), "cross_entropy"),
    **_of((1 << 27, 1 << 21), "nll_loss"),
    **_of((1 << 22, 1 << 22), "gaussian_nll_loss"),
    **_of((1 << 14, 1 << 14), "sigmoid_focal_loss", "Formula", "LongFormula"),
    **_of((0, 0), *LINEAR, "log_probs"),
}
_ELSE = 1 << 24, 1 << 24

# In compiled programs, with a backward pass and without one. A custom operator costs some 30 us a
# pass. Most kernels are as fast as Inductor's code until this has to take new memory for its
# outputs, which glibc maps from 32 MiB on. They are faster earlier than that with exponentials, and
# where Inductor's loop over the backward is not vectorised; a loss without exponentials takes as
# long as reading its operands does. Measured by `benchmarks/run.py compiled`, on the AMD EPYC.
_NEW_MEMORY = 1 << 24
COMPILED = {
    **_of((1 << 18, 1 << 18), *OF_LOGITS),
    **_of((0, 0), *LINEAR, *COMPOSED),  # of what is composed, each part decides
    **_of((_NEW_MEMORY, NEVER), "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "nll_loss"),
    **_of((_NEW_MEMORY, NEVER), "kl_div", "poisson_nll_loss", "binary_cross_entropy"),
    **_of((_NEW_MEMORY, _NEW_MEMORY), "sigmoid", "silu", "gelu", "softmax", "log_softmax"),
    **_of((1 << 20, 1 << 20), "binary_cross_entropy_with_logits", "sigmoid_focal_loss"),
    **_of((1 << 20, 1 << 20), "soft_margin_loss", "log_cosh_loss", "gaussian_nll_loss"),
    **_of((1 << 20, 1 << 20), "tanh", "softcap", "mish", "softsign", "tanhshrink"),
    **_of((_NEW_MEMORY, _NEW_MEMORY), "elu", "selu", "celu", "softplus", "logsigmoid"),
    **_of(
        (NEVER, NEVER), "swiglu", "geglu", "reglu", "glu", "prelu"
    ),  # fused with what is around them
    **_of((1 << 16, NEVER), "hinge_loss", "hinge_embedding_loss", "multi_margin_loss"),
    **_of((1 << 16, NEVER), "margin_ranking_loss", "quantile_loss"),
    **_of((_NEW_MEMORY, NEVER), "triplet_margin_loss", "cosine_embedding_loss"),
    **_of((1 << 16, _NEW_MEMORY), "relu", "leaky_relu", "relu6", "hardtanh", "threshold"),
    **_of((1 << 16, _NEW_MEMORY), "hardsigmoid", "hardswish", "hardshrink", "softshrink"),
}


# What `python -m pyfused tune` has measured, on this processor with these kernels.
FILE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "pyfused", "sizes.json")
MACHINE = f"{cpu.capability}, torch {torch.__version__}"


def tuned() -> dict[str, Limits]:
    """Returns the limits that were measured on this machine, none if there are no such."""
    try:
        kept = json.loads(FILE.read_text(encoding="utf-8"))
        of_machine = kept["limits"] if kept["machine"] == MACHINE else {}
        return {name: (int(first), int(second)) for name, (first, second) in of_machine.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


ON_CPU.update(tuned())


@cache
def limits(op: Operator, cpu: bool) -> Limits:
    """Returns the limits of an operator on CPUs or on GPUs: its own, or those of its family."""
    table, families = ON_CPU if cpu else ON_GPU, [kind.__name__ for kind in type(op).__mro__]
    found = [table[name] for name in (op.name, op.family, *families) if name in table]
    return found[0] if found else _ELSE


def torch_is_faster(op: Operator, arguments: Arguments, elements: int) -> bool:
    """Returns whether torch takes a call for its size; one without elements it always takes."""
    if elements == 0 or FORCED is not None:
        return elements == 0
    input: torch.Tensor = arguments[0]
    on_cpu = input.is_cpu
    pair = limits(op, on_cpu)
    if elements < pair[0] and elements < pair[1]:  # as most are, whatever follows
        return True
    if on_cpu and op.name == "softmax" and input.dtype in _HALVES:
        pair = min(pair[0], SOFTMAX_OF_HALVES), pair[1]
    elif on_cpu and input.dtype is torch.float16:
        elements //= FLOAT16
    if (elements < pair[0]) == (elements < pair[1]):
        return elements < pair[0]
    few = VECTOR // min(input.element_size(), 4) - 1 if on_cpu else FEW_ON_GPU
    return elements < pair[op.takes_second_limit(arguments, few)]
