"""Compares experimental variants of the Triton kernels with the current ones, to find faster ones.

The results of a variant are compared with torch in float32 before it is timed. Only GPU time is
measured: a sleep kernel runs until the host has launched all kernels of the call.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any
from unittest import mock

import cases
import torch
import triton
import triton.language as tl
from cases import BF16, F32, Arguments, Case, M, interleaved, ratios
from gpu import Clock, Table, choosing
from report import spread
from torch import Tensor

from pyfused import functional as fused
from pyfused.dispatch import sizes
from pyfused.kernels import launch
from pyfused.kernels.rows import DROP, KEEP, finite_or_zero, multiple
from pyfused.types import CrossEntropyOptions, Outputs

LOG2E = tl.constexpr(1.4426950408889634)
Variant = Callable[[], tuple[Tensor, Tensor]]  # returns the loss and the gradient


# ---- cross-entropy: the mean over n contiguous rows, and its gradient ----------------------------


@triton.jit
def optimisation_barrier(x):
    """Returns x; the compiler then keeps no float32 copy of x in registers."""
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2
    )


@triton.jit
def half_row_kernel(
    logits, target, parts, grad, n, classes, KEPT: tl.constexpr, BLOCK: tl.constexpr
):
    """A persistent kernel that keeps the first KEPT classes of a row in registers, in their dtype.

    It reads only the other classes twice. For sm_90 and bfloat16, 65,536 kept classes and 512
    threads take 124 registers without spills (Triton 3.7.1; not run on a GPU).
    """
    classes = multiple(classes, 16)
    kept = tl.arange(0, KEPT)
    value = 0.0
    for row in range(tl.program_id(0), n, tl.num_programs(0)):
        start = tl.cast(row, tl.int64) * classes
        label = tl.load(target + row)
        target_logit = tl.load(logits + start + label).to(tl.float32)
        x = optimisation_barrier(tl.load(logits + start + kept))
        maximum = tl.max(x.to(tl.float32), 0)
        x = optimisation_barrier(x)
        total = tl.sum(tl.exp2((x.to(tl.float32) - finite_or_zero(maximum)) * LOG2E), 0)
        totals = tl.zeros([BLOCK], tl.float32)
        for first in range(KEPT, classes, BLOCK):
            c = first + tl.arange(0, BLOCK)
            y = tl.load(
                logits + start + c, mask=c < classes, other=-float("inf"), eviction_policy=KEEP
            ).to(tl.float32)
            higher = tl.maximum(maximum, tl.max(y, 0))
            pivot = finite_or_zero(higher)
            decay = tl.exp2((maximum - pivot) * LOG2E)
            total *= decay
            totals = totals * decay + tl.exp2((y - pivot) * LOG2E)
            maximum = higher
        maximum, sum_exp = finite_or_zero(maximum), total + tl.sum(totals, 0)
        value += (maximum - target_logit + tl.log(sum_exp)) / n
        factor = 1.0 / (sum_exp * n)
        tl.debug_barrier()
        for first in range(KEPT, classes, BLOCK):
            c = first + tl.arange(0, BLOCK)
            y = tl.load(logits + start + c, mask=c < classes, other=0.0, eviction_policy=DROP)
            gradient = tl.exp2((y.to(tl.float32) - maximum) * LOG2E) * factor
            tl.store(grad + start + c, gradient, mask=c < classes, eviction_policy=DROP)
        x = optimisation_barrier(x)
        gradient = tl.exp2((x.to(tl.float32) - maximum) * LOG2E) * factor
        tl.store(grad + start + kept, gradient, eviction_policy=DROP)
        tl.debug_barrier()
        target_gradient = tl.exp2((target_logit - maximum) * LOG2E) * factor - 1.0 / n
        tl.store(grad + start + label, target_gradient)
    tl.store(parts + tl.program_id(0), value)


@triton.jit
def long_row_kernel(
    logits, target, parts, grad, n, classes, BLOCK: tl.constexpr, STAGES: tl.constexpr
):
    """A persistent kernel that reads rows twice, the second time in reverse order, to hit L2."""
    classes = multiple(classes, 16)
    value = 0.0
    for row in range(tl.program_id(0), n, tl.num_programs(0)):
        start = tl.cast(row, tl.int64) * classes
        label = tl.load(target + row)
        target_logit = tl.load(logits + start + label).to(tl.float32)
        maximum = -float("inf")
        total = tl.zeros([BLOCK], tl.float32)
        for first in tl.range(0, classes, BLOCK, num_stages=STAGES):
            c = first + tl.arange(0, BLOCK)
            x = tl.load(
                logits + start + c, mask=c < classes, other=-float("inf"), eviction_policy=KEEP
            ).to(tl.float32)
            higher = tl.maximum(maximum, tl.max(x, 0))
            pivot = finite_or_zero(higher)
            total = total * tl.exp2((maximum - pivot) * LOG2E) + tl.exp2((x - pivot) * LOG2E)
            maximum = higher
        maximum, sum_exp = finite_or_zero(maximum), tl.sum(total, 0)
        value += (maximum - target_logit + tl.log(sum_exp)) / n
        factor = 1.0 / (sum_exp * n)
        blocks = tl.cdiv(classes, BLOCK)
        for k in tl.range(0, blocks, num_stages=STAGES):
            c = (blocks - 1 - k) * BLOCK + tl.arange(0, BLOCK)
            mask = c < classes
            x = tl.load(logits + start + c, mask=mask, other=0.0, eviction_policy=DROP)
            gradient = tl.exp2((x.to(tl.float32) - maximum) * LOG2E) * factor
            gradient -= tl.where(c == label.to(tl.int32), 1.0 / n, 0.0)
            tl.store(grad + start + c, gradient, mask=mask, eviction_policy=DROP)
    tl.store(parts + tl.program_id(0), value)


def launched(
    kernel: Any, x: Tensor, target: Tensor, programs: int, **options: Any
) -> tuple[Tensor, Tensor]:
    n, classes = x.shape
    programs = min(n, programs)
    grad, parts = torch.empty_like(x), x.new_empty(programs, dtype=F32)
    kernel[(programs,)](x, target, parts, grad, n, classes, **options)
    return parts.sum(), grad


def current(x: Tensor, target: Tensor, choice: launch.Choice | None = None) -> Variant:
    """Returns the current kernels, optionally with other block sizes and warps."""
    from pyfused.backends import triton as backend

    options = CrossEntropyOptions(-100, "mean", denominator=float(len(x)))
    outputs = Outputs(True, (True, False))
    with choosing({}, lambda default, _: choice or default):
        tensors = x, target, None, None, None
        prepared = backend.cross_entropy(tensors, options, outputs)

    def run() -> tuple[Tensor, Tensor]:
        loss, (grad, _) = prepared(tensors, options.numbers())
        return loss, grad

    return run


def cross_entropy_variants(x: Tensor, target: Tensor, trial: bool) -> dict[str, Variant]:
    """Returns the current kernels, and the variants for this number of classes."""
    classes = x.shape[1]
    sms = 3 if trial else torch.cuda.get_device_properties(x.device).multi_processor_count
    variants: dict[str, Variant] = {"current": current(x, target)}
    if classes <= 32_768:
        block = launch.power_of_2(classes)
        for stages, name in ((1, "one program per row"), (2, "1 row ahead"), (3, "2 rows ahead")):
            choice = launch.Choice(1, block, min(512, max(32, block // 32)), stages=stages)
            variants[name] = current(x, target, choice)
        return variants
    if classes % 16:
        return variants
    for threads, block in ((1024, 16_384), (1024, 32_768)):
        choice = launch.Choice(1, block, threads, whole_row=False)
        variants[f"current, {threads} threads, {block} classes"] = current(x, target, choice)
    for programs, stages in ((sms, 1), (sms, 3), (sms * 3 // 4, 3), (sms // 2, 3)):
        options = {"BLOCK": 16_384, "STAGES": stages, "num_warps": 16}
        variants[f"{programs} programs, {stages} stages"] = partial(
            launched, long_row_kernel, x, target, programs, **options
        )
    if not trial:  # the interpreter does not support inline PTX
        # Keeps the classes in 64 registers of each thread.
        options = {"KEPT": 65_536, "BLOCK": 8192, "num_warps": 16}
        variants["half of a row in registers"] = partial(
            launched, half_row_kernel, x, target, sms, **options
        )
    return variants


# ---- pointwise losses ----------------------------------------------------------------------------


def evaluate(
    case: Case, arguments: Arguments, plans: dict[Any, Any], vectors: int = 1, threads: int = 256
) -> Any:
    """Evaluates a call whose kernels have other tile sizes; `plans` is its cache of plans."""

    def other_tile(choice: launch.Choice, _: int) -> launch.Choice:
        return choice._replace(block=8 * vectors * threads, threads=threads)

    with choosing(plans, other_tile), mock.patch.object(sizes, "FORCED", "every size"):
        return cases.evaluate(getattr(fused, case.op), arguments)


def pointwise_variants(case: Case, arguments: Arguments) -> dict[str, Variant]:
    changes: dict[str, dict[str, int]] = {
        "current": {},
        "2 vectors, 128 threads": {"vectors": 2, "threads": 128},
        "2 vectors": {"vectors": 2},
    }
    return {name: partial(evaluate, case, arguments, {}, **c) for name, c in changes.items()}


# ---- the table -----------------------------------------------------------------------------------

ROUNDS, WARM_UP = 15, 2
SIMPLE = ("smooth_l1_loss", "margin_ranking_loss", "hinge_embedding_loss")
CASES = (
    Case("cross_entropy", (8388, 32_000), BF16),
    Case("cross_entropy", (5340, 50_257), BF16),  # GPT-2's vocabulary: most rows are unaligned
    Case("cross_entropy", (2092, 128_256), BF16),
    Case("cross_entropy", (1024, 262_144), BF16),
    *(Case(op, (64 * M,), BF16) for op in ("sigmoid_focal_loss", "binary_cross_entropy", "kl_div")),
    *(Case(op, (64 * M,), BF16) for op in SIMPLE),
)
TINY = (
    Case("cross_entropy", (7, 48), BF16),
    Case("cross_entropy", (2, 32_784), BF16),
    Case("cross_entropy", (3, 32_787), BF16),
    *(Case(op, (100,), BF16) for op in ("sigmoid_focal_loss", "smooth_l1_loss")),
)


class LongClock(Clock):
    SLEEP = 8_000_000  # cycles (4 ms); launching a call takes less


def compared(
    case: Case, name: str, variants: dict[str, Variant], expected: Any, table: Table, rounds: int
) -> list[list[str]]:
    """Returns the table row of a variant, after comparing its results with torch in float32."""
    variant = variants[name]
    for result, reference in zip(variant(), expected, strict=True):
        cases.assert_close(result.float(), reference, BF16)
    clock = LongClock(table.device)
    copy = cases.copy_step(case, cases.TRAINING, table.device)
    calls: list[Any] = [variants["current"], copy, variant]
    timers = [clock.timer(call, small=False) for call in calls]
    if name == SHORT_SLEEP:
        timers[-1] = Clock(table.device).timer(variant, small=False)
    interleaved(timers, 1, WARM_UP)
    current_times, copy_times, times = interleaved(timers, rounds, 1)
    relative = spread(ratios(times, current_times)), spread(ratios(copy_times, times))
    return [[case.name, name, f"{median(times):.4g}", *relative]]


SHORT_SLEEP = "current, the GPU sleeps for 1 ms"


def gpu_variants(options: Namespace) -> None:
    description = (
        "Forward and backward. Time of a variant / time of the current kernel: below 1, the "
        f"variant is faster. If '{SHORT_SLEEP}' is slower, the call is bound by the host."
    )
    columns = ["case", "variant", "ms", "variant / current", "share of a copy"]
    table, rounds = Table(options, description, columns, names=2), 3 if options.trial else ROUNDS
    for case in cases.chosen(TINY if options.trial else CASES, options.k):
        arguments = cases.draw(case, table.device)
        expected = cases.evaluate(getattr(cases.TORCH, case.op), arguments.to(F32))
        if case.op == "cross_entropy":
            logits = arguments.input.detach()
            variants = cross_entropy_variants(logits, *arguments.others, options.trial)
        else:
            variants = pointwise_variants(case, arguments)
            variants[SHORT_SLEEP] = variants["current"]
        for name in variants:
            rows = partial(compared, case, name, variants, expected, table, rounds)
            table.add(f"{case.name}: {name}", rows)
