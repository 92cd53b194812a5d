"""From how many elements on a kernel takes a call. Whatever depends on a call's size asks here.

A kernel's call costs some microseconds more than torch's, and each element gains some nanoseconds:
many where torch computes by several operators, few where it is as fast as memory. So an operator
has one of five sizes, from which a kernel clearly wins on AMD EPYC, with AVX-512 and with AVX2. The
largest are for outputs that torch takes from the system page by page.

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
from pyfused.dispatch.operator import Arguments, Operator
from pyfused.dispatch.signature import PLAIN

NEVER = sys.maxsize
FORCED = backends.FORCED  # a backend that takes calls of any size; None if none is forced
OF_LOGITS = ("cross_entropy", "log_probs", "kl_div_with_logits")
LINEAR = ("linear_cross_entropy", "linear_log_probs", "linear_kl_div", "linear_topk_kl_div")
COMPOSED = ("rmse_loss", "multilabel_soft_margin_loss")
SMALL, MEDIUM, LARGE, HUGE, PAGES = 1 << 14, 1 << 17, 1 << 19, 1 << 22, 1 << 24
Limits = tuple[int, int]


def _of(first: int, second: int, names: str) -> dict[str, Limits]:
    return dict.fromkeys(names.split(), (first, second))


# The second limit is for a loss of each element, which is an output more; for activations without
# a gradient; for few classes where there are classes, as torch has no vectors for rows that do not
# fill one. A family stands for operators without a row. VECTOR is what one holds, in bytes.
VECTOR = 64 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 32
FEW = VECTOR // 4 - 1  # classes; twice as many in half precision
ON_CPU = {
    **_of(0, 0, "gaussian_nll_loss hinge_embedding_loss log_cosh_loss sigmoid_focal_loss"),
    **_of(0, 0, "log_probs kl_div_with_logits multilabel_soft_margin_loss quantile_loss"),
    **_of(0, 0, "cosine_embedding_loss softcap softsign"),
    **_of(0, SMALL, "triplet_margin_loss hinge_loss"),
    **_of(SMALL, MEDIUM, "binary_cross_entropy binary_cross_entropy_with_logits kl_div"),
    **_of(SMALL, MEDIUM, "margin_ranking_loss multilabel_margin_loss"),
    **_of(SMALL, MEDIUM, "poisson_nll_loss soft_margin_loss"),
    **_of(1 << 10, 1 << 10, "LongFormula"),  # a third to a quarter of torch's time from here on
    **_of(SMALL, SMALL, f"Activation Formula {' '.join(LINEAR)}"),  # a head's elements are logits
    **_of(SMALL, PAGES, "gelu"),
    **_of(MEDIUM, SMALL, "cross_entropy log_softmax"),
    **_of(MEDIUM, MEDIUM, "ClassLoss logsigmoid"),
    **_of(MEDIUM, NEVER, "multi_margin_loss"),
    **_of(MEDIUM, PAGES, "PointwiseLoss"),
    **_of(LARGE, PAGES, "Composed"),
    **_of(LARGE, MEDIUM, "silu Gated"),
    **_of(LARGE, SMALL, "softmax"),
    **_of(HUGE, MEDIUM, "sigmoid"),
    **_of(PAGES, PAGES, "relu leaky_relu relu6 hardtanh threshold hardsigmoid hardswish"),
    **_of(PAGES, PAGES, "hardshrink softshrink prelu glu"),
    **_of(PAGES, NEVER, "nll_loss"),
}
# In half precision torch computes as fast, of half the bytes; float16 the kernels convert in a step
# of its own. Where there are classes, torch is slower. Its gelu is oneDNN's.
HALVES = {torch.bfloat16: 2, torch.float16: 8}
ON_CPU_OF_HALVES = {
    **_of(MEDIUM, SMALL, "cross_entropy log_softmax softmax"),
    **_of(SMALL, NEVER, "gelu"),
}

# On GPUs, measured on an H100 with float32 and backward, behind a slow processor, where torch
# launched a step of mse_loss in 150 us and pyfused in 400. ATen's activations reach the memory's
# bandwidth. Its loss of class indices takes 1.6 us a thousand rows, of any number of classes.
FEW_ON_GPU = 64
ON_GPU = {
    **_of(0, 0, f"log_probs {' '.join(LINEAR)}"),
    **_of(SMALL, SMALL, "sigmoid_focal_loss Formula LongFormula"),
    **_of(HUGE, HUGE, "gaussian_nll_loss"),
    **_of(1 << 25, 1 << 25, "l1_loss softmax log_softmax"),
    **_of(1 << 26, 1 << 26, "mse_loss smooth_l1_loss huber_loss"),
    **_of(1 << 26, 1 << 21, "cross_entropy"),
    **_of(1 << 27, 1 << 21, "nll_loss"),
    **_of(NEVER, NEVER, "Activation"),
}
_ELSE = PAGES, PAGES

# In compiled programs, on CPUs and on GPUs: from how many elements on a call is a custom operator,
# to which Inductor is a wall. What is not here is torch's function, which Inductor fuses with its
# neighbours. Heads make no logits. Of logits and of large losses on CPUs, a kernel reads and writes
# less than Inductor's code, which takes new memory for its outputs; a custom operator costs some
# 30 us a pass. No compiled call has been measured on a GPU: from 2^24 logits on the launches should
# take no longer there than the kernels, which are 1.1 to 2.5 times as fast as Inductor's code
# (benchmarks/results/nvidia-h100-80gb-hbm3/table.md).
COMPILED = {
    **_of(0, 0, " ".join(LINEAR)),
    **_of(0, 0, "multilabel_margin_loss"),  # in a graph torch counts what follows the end of a row
    **_of(1 << 18, 1 << 24, " ".join(OF_LOGITS)),
    **_of(PAGES, NEVER, "mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy"),
    **_of(PAGES, NEVER, "binary_cross_entropy_with_logits kl_div poisson_nll_loss"),
    **_of(PAGES, NEVER, "gaussian_nll_loss soft_margin_loss hinge_embedding_loss hinge_loss"),
    **_of(PAGES, NEVER, "margin_ranking_loss quantile_loss log_cosh_loss sigmoid_focal_loss"),
    **_of(PAGES, NEVER, "triplet_margin_loss cosine_embedding_loss nll_loss multi_margin_loss"),
    **_of(PAGES, NEVER, " ".join(COMPOSED)),  # each part decides again
}

MACHINE = f"{cpu.capability}, torch {torch.__version__}"


def tuned_file() -> Path:
    """Returns the file in which ``python -m pyfused tune`` keeps what it has measured.

    For users without a home, as in containers, ``Path.home()`` would raise an error.
    """
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111
    return Path(caches, "pyfused", "sizes.json")


def tuned() -> dict[str, Limits]:
    """Returns the limits that were measured on this machine, none if there are no such."""
    try:
        kept = json.loads(tuned_file().read_text(encoding="utf-8"))
        of_machine = kept["limits"] if kept["machine"] == MACHINE else {}
        return {name: (int(first), int(second)) for name, (first, second) in of_machine.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


@cache
def cpu_limits() -> dict[str, Limits]:
    """Returns the table of CPUs, with what was measured on this machine in place of its rows.

    The first decision that depends on a size reads the file; importing pyfused does not.
    """
    return ON_CPU | tuned()


@cache
def limits(op: Operator, cpu: bool, dtype: torch.dtype = torch.float32) -> Limits:
    """Returns an operator's limits on CPUs or on GPUs: its own, or those of its family."""
    if cpu and dtype in HALVES and op.name in ON_CPU_OF_HALVES:
        return ON_CPU_OF_HALVES[op.name]
    table = cpu_limits() if cpu else ON_GPU
    families = [kind.__name__ for kind in type(op).__mro__]
    found = [table[name] for name in (op.name, op.family, *families) if name in table]
    first, second = found[0] if found else _ELSE
    factor = HALVES.get(dtype, 1) if cpu else 1
    return factor * first, factor * second


def is_small(op: Operator, arguments: Arguments, elements: int | None = None) -> bool:
    """Returns whether torch's operator takes a call for its size.

    It takes one without elements. A compiler does not ask: its program would depend on the size.

    Args:
        elements: How many elements the call computes, where that is known.
    """
    input = arguments[0]
    if elements is None:
        if type(input) not in PLAIN or input.is_nested:
            return False
        elements = input.numel()
        if type(elements) is not int:  # a tensor, to torch.jit.trace
            return False
        if op.broadcast:
            other = arguments[op.broadcast[0]]
            if type(other) not in PLAIN or other.is_nested or other.shape != input.shape:
                elements = op.elements(arguments)
        elif op.counts_logits:
            elements = op.elements(arguments)
    if elements == 0 or FORCED is not None:
        return elements == 0
    on_cpu = input.is_cpu
    first, second = limits(op, on_cpu, input.dtype)
    if (elements < first) == (elements < second):  # as most are, whatever follows
        return elements < first
    few = VECTOR // min(input.element_size(), 4) - 1 if on_cpu else FEW_ON_GPU
    return elements < (second if op.takes_second_limit(arguments, few) else first)
