"""Compares experimental variants of the Triton kernels with the current ones, to find faster ones.

The results of a variant are compared with torch in float32 before it is timed. Only GPU time is
measured: a sleep kernel runs until the host has launched all kernels of the call.
"""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import Callable, Iterator
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
from pyfused.formula_compiler.program import Program
from pyfused.kernels import launch, program
from pyfused.kernels.arithmetic import polynomial
from pyfused.kernels.rows import DROP, KEEP, finite_or_zero, multiple
from pyfused.types import CrossEntropyOptions, Outputs

LOG2E, LOG_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
Variant = Callable[[], tuple[Tensor, Tensor]]  # returns the loss and the gradient


# ---- cross-entropy: the mean over n contiguous rows, and its gradient ----------------------------


@triton.jit
def hidden(x, HIDE: tl.constexpr):
    """Returns x behind an optimisation barrier, so that no float32 copy is kept in registers."""
    if HIDE:
        x = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2
        )
    return x


@triton.jit
def persistent_kernel(
    logits,
    target,
    parts,
    grad,
    n,
    classes,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    PACKED: tl.constexpr,
    LATE_TARGET: tl.constexpr,
):
    """A persistent kernel: each program loops over every num_programs-th row, and has at least one.

    STAGES: if 2 or more, cp.async loads the next rows to shared memory while one is computed.
    PACKED: whether a row is kept in its dtype, and its exponentials are recomputed.
    LATE_TARGET: whether the target's gradient is stored after the row, instead of comparing each
        class with the target. The barriers of the next row's sums separate the two stores.
    """
    classes = multiple(classes, 16)
    c = tl.arange(0, BLOCK)
    mask = c < classes
    value, last, change = 0.0, grad, 0.0
    for row in tl.range(tl.program_id(0), n, tl.num_programs(0), num_stages=STAGES):
        start = tl.cast(row, tl.int64) * classes
        label = tl.load(target + row)
        x = tl.load(logits + start + c, mask=mask, other=-float("inf"))
        target_logit = tl.load(logits + start + label).to(tl.float32)
        maximum = finite_or_zero(tl.max(x.to(tl.float32), 0))
        x = hidden(x, PACKED)
        e = tl.exp2((x.to(tl.float32) - maximum) * LOG2E)
        total = tl.sum(e, 0)
        if LATE_TARGET and row >= tl.num_programs(0):
            tl.store(last, change)
        nll = maximum - target_logit + tl.log(total)
        value += nll / n
        if PACKED:
            e = tl.exp2((hidden(x, True).to(tl.float32) - maximum) * LOG2E)
        gradient = e * (1.0 / (total * n))
        if not LATE_TARGET:
            gradient -= tl.where(c == label.to(tl.int32), 1.0 / n, 0.0)
        tl.store(grad + start + c, gradient, mask=mask)
        last, change = grad + start + label, (tl.exp2(-nll * LOG2E) - 1.0) / n
    if LATE_TARGET:
        tl.debug_barrier()
        tl.store(last, change)
    tl.store(parts + tl.program_id(0), value)


@triton.jit
def long_row_kernel(
    logits, target, parts, grad, n, classes, BLOCK: tl.constexpr, STAGES: tl.constexpr
):
    """A persistent kernel that reads rows twice, the second time backwards, to hit L2."""
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


@triton.jit
def unaligned_row_kernel(
    logits, target, parts, grad, n, classes, BLOCK: tl.constexpr, UNIT: tl.constexpr
):
    """Computes one row, which may begin at any element, by one program.

    Blocks of whole vectors of UNIT elements are aligned. The elements before the first and after
    the last vector are in one more tile.
    """
    start = tl.program_id(0).to(tl.int64) * classes
    end = start + classes
    first, last = (start + UNIT - 1) // UNIT * UNIT, end // UNIT * UNIT
    at_target = start + tl.load(target + tl.program_id(0))
    target_logit = tl.load(logits + at_target).to(tl.float32)
    i = tl.arange(0, 2 * UNIT)
    edge = tl.where(i < UNIT, start + i, last + i - UNIT)
    mask = edge < tl.where(i < UNIT, first, end)
    at_edges = tl.load(logits + edge, mask=mask, other=-float("inf")).to(tl.float32)
    maximum = tl.max(at_edges, 0)
    of_edges = tl.sum(tl.exp2((at_edges - finite_or_zero(maximum)) * LOG2E), 0)
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(first, last, BLOCK):
        c = tl.multiple_of(k, UNIT) + tl.arange(0, BLOCK)
        x = tl.load(logits + c, mask=c < last, other=-float("inf"), eviction_policy=KEEP)
        x = x.to(tl.float32)
        higher = tl.maximum(maximum, tl.max(x, 0))
        pivot = finite_or_zero(higher)
        factor = tl.exp2((maximum - pivot) * LOG2E)
        of_edges *= factor
        total = total * factor + tl.exp2((x - pivot) * LOG2E)
        maximum = higher
    maximum, sum_exp = finite_or_zero(maximum), tl.sum(total, 0) + of_edges
    tl.store(parts + tl.program_id(0), (maximum - target_logit + tl.log(sum_exp)) / n)
    scale = 1.0 / (sum_exp * n)
    gradient = tl.exp2((at_edges - maximum) * LOG2E) * scale
    gradient -= tl.where(edge == at_target, 1.0 / n, 0.0)
    tl.store(grad + edge, gradient, mask=mask)
    for k in range(first, last, BLOCK):
        c = tl.multiple_of(k, UNIT) + tl.arange(0, BLOCK)
        x = tl.load(logits + c, mask=c < last, other=0.0, eviction_policy=DROP).to(tl.float32)
        of_block = tl.exp2((x - maximum) * LOG2E) * scale
        of_block -= tl.where(c == at_target, 1.0 / n, 0.0)
        tl.store(grad + c, of_block, mask=c < last, eviction_policy=DROP)


def launched(
    kernel: Any, x: Tensor, target: Tensor, programs: int, **options: Any
) -> tuple[Tensor, Tensor]:
    n, classes = x.shape
    programs = min(n, programs)
    grad, parts = torch.empty_like(x), x.new_empty(programs, dtype=F32)
    kernel[(programs,)](x, target, parts, grad, n, classes, **options)
    return parts.sum(), grad


def shipped(x: Tensor, target: Tensor, choice: launch.Choice | None = None) -> Variant:
    """Returns the current kernels, optionally with other block sizes and warps."""
    from pyfused.backends import triton as backend

    options = CrossEntropyOptions(-100, "mean", denominator=float(len(x)))
    outputs = Outputs(True, (True, False))
    with choosing({}, lambda shipped, _: choice or shipped):
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
    variants: dict[str, Variant] = {"shipped": shipped(x, target)}
    if classes <= 32_768:
        block = launch.power_of_2(classes)
        flags = {"BLOCK": block, "num_warps": min(16, max(1, block // 1024))}
        for name, programs, chosen in (
            ("persistent, 1 program an SM", sms, (1, False, False)),
            ("persistent, loads ahead", sms, (2, False, False)),
            ("persistent, loads ahead, target late", sms, (2, False, True)),
            ("persistent, loads 2 ahead, target late", sms, (3, False, True)),
            ("packed, 1 program an SM, loads ahead, target late", sms, (2, True, True)),
            ("packed, 2 programs an SM, target late", 2 * sms, (1, True, True)),
        ):
            if trial and chosen[1]:
                continue  # the interpreter does not support inline PTX
            options = {
                **flags,
                **dict(zip(("STAGES", "PACKED", "LATE_TARGET"), chosen, strict=True)),
            }
            if programs > sms:
                options["maxnreg"] = 64
            variants[name] = partial(launched, persistent_kernel, x, target, programs, **options)
        return variants
    if classes % 16:
        for threads in (256, 512):
            options = {"BLOCK": 32 * threads, "UNIT": 16 // x.element_size()}
            variants[f"aligned vectors, {threads} threads"] = partial(
                launched,
                unaligned_row_kernel,
                x,
                target,
                len(x),
                num_warps=threads // 32,
                **options,
            )
        return variants
    for threads, block in ((1024, 16_384), (1024, 32_768)):
        choice = launch.Choice(1, block, threads, whole_row=False)
        variants[f"shipped, {threads} threads, {block} classes"] = shipped(x, target, choice)
    for programs, stages in ((sms, 1), (sms, 3), (sms * 3 // 4, 3), (sms // 2, 3)):
        options = {"BLOCK": 16_384, "STAGES": stages, "num_warps": 16}
        variants[f"{programs} programs, {stages} stages"] = partial(
            launched, long_row_kernel, x, target, programs, **options
        )
    return variants


# ---- pointwise losses: functions that are accurate enough for half precision ---------------------


@triton.jit
def fast_exp(x, EXACT: tl.constexpr = False):
    """Returns exp(x) with a relative error of 6e-6."""
    return tl.exp2(x * LOG2E)


@triton.jit
def log2(x):
    """Returns log2(x) by the GPU's instruction; tl.log2 compiles to about 30 instructions."""
    if INTERPRETED:
        y = tl.log2(x)
    else:
        y = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return y


@triton.jit
def near_1(f):
    """Returns log(1 + f) to 7e-6 for |f| <= 1/8, where the GPU's instruction is inaccurate."""
    return f * polynomial(f, (-0.25316338, 0.33649129, -0.49998862, 0.99999381))


@triton.jit
def fast_log(x):
    """Returns log(x) with a relative error of 7e-6."""
    f = x - 1.0
    return tl.where(tl.abs(f) < 0.125, near_1(f), log2(x) * LOG_2)


@triton.jit
def fast_log1p(x):
    """Returns log(1 + x) with a relative error of 7e-6."""
    return tl.where(tl.abs(x) < 0.125, near_1(x), log2(1.0 + x) * LOG_2)


@triton.jit
def fast_softplus(x):
    """Returns log(1 + exp(x)) with a relative error of 2e-5."""
    y = tl.exp2(-tl.abs(x) * LOG2E)
    rest = polynomial(
        y, (-0.0238691248, 0.101222217, -0.210048631, 0.325206659, -0.499361362, 0.999991598)
    )
    return tl.where(x > 0.0, x, 0.0) + y * rest


@triton.jit
def fast_reciprocal(x, EXACT: tl.constexpr = False):
    root = tl.rsqrt(x)
    return root * root


FAST = {
    "exp": fast_exp,
    "exp_nonpositive": fast_exp,
    "log": fast_log,
    "log1p": fast_log1p,
    "softplus": fast_softplus,
    "reciprocal": fast_reciprocal,
}


@contextlib.contextmanager
def planning(
    plans: dict[Any, Any], fast: bool = False, vectors: int = 2, threads: int = 128
) -> Iterator[None]:
    """Replaces functions or tiles of the kernels in this context; `plans` is its cache of plans."""
    made: dict[int, Any] = {}

    def kernel(formula: Program, *_: Any) -> Any:
        if id(formula) not in made:
            with mock.patch.multiple(program, **FAST):
                made[id(formula)] = program.formula_of(formula)
        return made[id(formula)]

    def other_tile(choice: launch.Choice, _: int) -> launch.Choice:
        return choice._replace(block=choice.block * vectors * threads // 256, threads=threads)

    printing = mock.patch.object(Program, "kernel", kernel) if fast else contextlib.nullcontext()
    every_size = mock.patch.object(sizes, "FORCED", "every size")
    with choosing(plans, other_tile), every_size, printing:
        yield


def evaluate(case: Case, arguments: Arguments, plans: dict[Any, Any], **options: Any) -> Any:
    with planning(plans, **options):
        return cases.evaluate(getattr(fused, case.op), arguments)


def pointwise_variants(case: Case, arguments: Arguments) -> dict[str, Variant]:
    changes: dict[str, dict[str, Any]] = {
        "shipped": {},
        "4 vectors a thread": {"vectors": 4},
        "1 vector, 256 threads": {"vectors": 1, "threads": 256},
        "256 threads": {"threads": 256},
    }
    if case.op not in SIMPLE:
        fast = {f"fast functions, {name}": {"fast": True, **c} for name, c in changes.items()}
        changes |= {name.replace(", shipped", ""): c for name, c in fast.items()}
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
    case: Case, name: str, variants: dict[str, Variant], right: Any, table: Table, rounds: int
) -> list[list[str]]:
    """Returns the table row of a variant, after comparing its results with torch in float32."""
    variant = variants[name]
    for got, expected in zip(variant(), right, strict=True):
        cases.assert_close(got.float(), expected, BF16)
    clock = LongClock(table.device)
    timed: list[Any] = [variants["shipped"], cases.copy_step(case, cases.TRAINING, table.device)]
    timers = [clock.timer(call, small=False) for call in (*timed, variant)]
    if name == SHORT_SLEEP:
        timers[-1] = Clock(table.device).timer(variant, small=False)
    interleaved(timers, 1, WARM_UP)
    base, copied, taken = interleaved(timers, rounds, 1)
    ratio, share = ratios(taken, base), ratios(copied, taken)
    return [[case.name, name, f"{median(taken):.4g}", spread(ratio), spread(share)]]


SHORT_SLEEP = "shipped, the GPU sleeps for 1 ms"


def gpu_variants(options: Namespace) -> None:
    words = (
        "Forward and backward. Time of a variant divided by that of the shipped kernel: below 1 "
        f"the variant is faster. The host limits a call for which '{SHORT_SLEEP}' is slower."
    )
    columns = ["case", "variant", "ms", "variant / shipped", "share of a copy"]
    table, rounds = Table(options, words, columns, names=2), 3 if options.trial else ROUNDS
    for case in cases.chosen(TINY if options.trial else CASES, options.k):
        arguments = cases.draw(case, table.device)
        right = cases.evaluate(getattr(cases.TORCH, case.op), arguments.to(F32))
        if case.op == "cross_entropy":
            given = arguments.input.detach(), *arguments.others, options.trial
            variants = cross_entropy_variants(*given)
        else:
            variants = pointwise_variants(case, arguments)
            variants[SHORT_SLEEP] = variants["shipped"]
        for name in variants:
            row = partial(compared, case, name, variants, right, table, rounds)
            table.add(f"{case.name}: {name}", row)
