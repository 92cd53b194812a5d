"""Times typical uses on a GPU: one kernel of each family, memory and launches of calls, calls of
all sizes, host time, and a language model's head.

Each command writes its table after every row, in case of a later failure.
"""

from __future__ import annotations

import contextlib
import re
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from types import SimpleNamespace
from typing import Any

import cases
import torch
from cases import BF16, Case, HeadCase, M, Step, interleaved, ratios
from gpu import Clock, Table, peak
from report import spread
from torch import Tensor
from torch._inductor import config as inductor_config

from pyfused import functional as fused
from pyfused.dispatch import sizes
from pyfused.ops.operators import OPERATORS

WARM_UP = 3


# ---- one kernel of each family -------------------------------------------------------------------

FAMILIES = (
    Case("mse_loss", (700, 600)),
    Case("gaussian_nll_loss", (700, 600), BF16),
    Case("cross_entropy", (256, 1000)),
    Case("cross_entropy", (64, 128_256), BF16),
    Case("cross_entropy", (4, 21, 64, 64)),
    Case("cross_entropy", (256, 1000), probabilities=True),
    Case("triplet_margin_loss", (256, 128)),
    Case("cosine_embedding_loss", (256, 128)),
    Case("log_softmax", (256, 1000)),
    Case("gelu", (700, 600)),
)
SMOKE_CALLS = 3  # the first call uses Triton's launcher, later calls a prepared launch


def smoke_row(name: str, call: Step, check: Callable[[Any], None]) -> list[str]:
    """Times calls on the host, and checks their results."""
    seconds = []
    for _ in range(SMOKE_CALLS):
        started = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - started)
        check(result)
    return [name, "correct", f"{seconds[0]:.2f}", f"{1e6 * seconds[-1]:.0f}"]


def smoke_rows(case: Case, device: str) -> list[list[str]]:
    arguments = cases.draw(case, device)
    call = partial(cases.evaluate, getattr(fused, case.op), arguments)
    with sizes.every_size():
        return [smoke_row(case.name, call, lambda _: cases.assert_correct(case, arguments))]


def smoke_head_rows(device: str) -> list[list[str]]:
    rows = []
    for loss, steps in HeadCase(256, 64, 1000, device=device).implementations().items():
        check = partial(assert_near, steps["torch"]())
        rows.append(smoke_row(f"linear {loss} (256, 64, 1000) float32", steps["pyfused"], check))
    return rows


def assert_near(expected: Sequence[Tensor], results: Sequence[Tensor]) -> None:
    assert all(norm_error(*pair) <= 1e-3 for pair in zip(results, expected, strict=True))


def norm_error(result: Tensor, expected: Tensor) -> float:
    """Returns the norm of the error, relative to the norm of the expected result."""
    return float((result.float() - expected.float()).norm() / expected.float().norm())


def gpu_smoke(options: Namespace) -> None:
    description = (
        "Forward and backward, compared with torch: host time of the first call in seconds, "
        "including compilation, and of the third call in microseconds."
    )
    table = Table(options, description, ["case", "", "first, s", "third, us"], names=2)
    for case in FAMILIES[:2] if options.trial else FAMILIES:
        table.add(case.name, partial(smoke_rows, case, table.device))
    table.add("heads", lambda: smoke_head_rows(table.device))
    if table.errors:
        sys.exit(1)


# ---- time, memory and launches -------------------------------------------------------------------

ROWS = (4096, 8192, 16_384, 32_768)
MANY_CLASSES = ((8388, 32_000), (8192, 50_257), (2092, 128_256))
KERNEL_CASES = (
    *(Case("cross_entropy", (n, 1000), BF16) for n in ROWS),
    *(Case("cross_entropy", shape, BF16) for shape in MANY_CLASSES),
    Case("cross_entropy", (16, 21, 512, 512)),
    *(Case(op, (8388, 32_000), BF16) for op in ("log_softmax", "softmax")),
    *(Case(op, (64 * M,), BF16) for op in ("binary_cross_entropy", "sigmoid_focal_loss", "kl_div")),
)
PROFILED = 5  # calls


def launches(call: Step) -> str:
    """Returns each kernel that a call launches, and its time in microseconds."""
    with torch.profiler.profile() as profiler:
        for _ in range(PROFILED):
            call()
        torch.cuda.synchronize()
    times: dict[str, list[float]] = {}
    for event in profiler.events() or ():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            name = re.split(r"[<(]", event.name)[0].split("::")[-1]
            times.setdefault(name, []).append(event.time_range.elapsed_us())
    return ", ".join(
        f"{len(each) / PROFILED:g} {name} {sum(each) / PROFILED:.1f}"
        for name, each in times.items()
    )


def kernel_rows(case: Case, clock: Clock, device: str, rounds: int) -> list[list[str]]:
    arguments = cases.draw(case, device)
    try:
        cases.assert_correct(case, arguments)
        correct = "correct"
    except AssertionError as error:
        correct = " ".join(str(error).split())[:120]
    operators = {"pyfused": fused, "torch": cases.TORCH}
    if case.op == "cross_entropy" and len(case.shape) == 2 and device == "cuda":
        with contextlib.suppress(ImportError):
            from liger_kernel.transformers.functional import liger_cross_entropy

            operators["Liger"] = SimpleNamespace(cross_entropy=liger_cross_entropy)
    copies = dict.fromkeys(operators, arguments)
    if "Liger" in copies:  # overwrites the logits with their gradient
        copies["Liger"] = replace(arguments, input=arguments.input.detach().clone())
    steps = {name: cases.step(operators[name], case, copies[name]) for name in operators}
    steps["copy"] = cases.copy_step(case, cases.TRAINING, device)
    timers = [clock.timer(step, small=False) for step in steps.values()]
    interleaved(timers, 1, WARM_UP)
    times = dict(zip(steps, interleaved(timers, rounds, 1), strict=True))
    ours = times.pop("pyfused")
    relative = {name: spread(ratios(each, ours)) for name, each in times.items()}
    leaves = [cases.step(operators[name], case, arguments) for name in ("pyfused", "torch")]
    memory = [f"{peak(step) / 2**30:.3g}" for step in leaves]
    kernels = launches(steps["pyfused"]) if device == "cuda" else ""
    peers = [relative.get(name, "") for name in ("torch", "Liger", "copy")]
    return [[case.name, correct, f"{median(ours):.4g}", *peers, *memory, kernels]]


def gpu_kernels(options: Namespace) -> None:
    description = (
        "Forward and backward. Time of torch, Liger and a copy / time of pyfused; peak memory of "
        "a call; number and microseconds of each kernel that a call launches."
    )
    columns = ["case", "", "ms", "torch", "Liger", "share of a copy", "GiB", "GiB, torch"]
    table = Table(options, description, [*columns, "launches"], names=2)
    clock, rounds = Clock(table.device), 3 if options.trial else 15
    tiny = (Case("softmax", (4, 10), BF16), Case("cross_entropy", (4, 10), BF16))
    with sizes.every_size():
        for case in cases.chosen(tiny if options.trial else KERNEL_CASES, options.k):
            table.add(case.name, partial(kernel_rows, case, clock, table.device, rounds))


# ---- calls of all sizes --------------------------------------------------------------------------

SIZES = tuple(1 << n for n in range(8, 27, 2))
CLASSES = 1000
SIZED = (
    *("mse_loss", "l1_loss", "smooth_l1_loss", "binary_cross_entropy_with_logits", "kl_div"),
    *("gaussian_nll_loss", "cross_entropy", "log_softmax"),
    *("softmax", "gelu", "silu", "tanh", "relu", "mish"),
)


def shape_of(op: str, elements: int) -> tuple[int, ...]:
    """Returns a one-dimensional shape, or for losses over classes, rows of 1,000 classes."""
    of_rows = (*cases.SOFTMAX, "cross_entropy")
    return (max(1, elements // CLASSES), CLASSES) if op in of_rows else (elements,)


def times_of(op: str, elements: int, clock: Clock, device: str, rounds: int) -> cases.Times:
    """Returns the times of a step, in milliseconds, with torch's operator and with the kernel."""
    case = Case(op, shape_of(op, elements))
    arguments = cases.draw(case, device)
    cases.assert_correct(case, arguments)
    steps = [cases.step(operators, case, arguments) for operators in (cases.TORCH, fused)]
    timers = [clock.timer(step, small=True) for step in steps]
    interleaved(timers, 1, WARM_UP)
    return interleaved(timers, rounds, max(1, min(50, (16 * M) // elements)))


MIN_SPEEDUP = 0.95  # a smaller difference is noise


def size_rows(op: str, clock: Clock, device: str, rounds: int) -> list[list[str]]:
    with sizes.every_size():  # also small calls run kernels
        times = [times_of(op, elements, clock, device, rounds) for elements in SIZES]
    speedups = [median(of_torch) / median(of_pyfused) for of_torch, of_pyfused in times]
    slower = [size for size, speedup in zip(SIZES, speedups, strict=True) if speedup < MIN_SPEEDUP]
    larger = [size for size in SIZES if size > max(slower, default=0)]
    host = [f"{1e3 * median(each):.0f}" for each in reversed(times[0])]
    faster_from = f"2^{larger[0].bit_length() - 1}" if larger else "never"
    limit = sizes.limits(OPERATORS[op], torch.device(device, 0)).from_elements
    limit_shown = "never" if limit == sizes.NEVER else f"2^{limit.bit_length() - 1}"
    return [[op, *host, faster_from, limit_shown, *(f"{speedup:.2f}" for speedup in speedups)]]


def gpu_sizes(options: Namespace) -> None:
    description = (
        "Forward and backward in float32, in a loop: microseconds of the smallest call, the size "
        "from which the kernel is faster, the size from which it runs by default, and torch's time "
        "divided by pyfused's for each size."
    )
    columns = ["operator", "pyfused", "torch", "faster from", "runs from"]
    columns += [f"2^{size.bit_length() - 1}" for size in SIZES]
    table = Table(options, description, columns, names=1)
    clock, rounds = Clock(table.device), 3 if options.trial else 11
    for op in SIZED[:2] if options.trial else SIZED:
        table.add(op, partial(size_rows, op, clock, table.device, rounds))


# ---- host time -----------------------------------------------------------------------------------

HOST_CALLS = 50  # their launches fit into the GPU's queue


def host_rows(op: str, device: str, rounds: int) -> list[list[str]]:
    """Times the host: in small calls, kernels take less time than launching them."""
    case = Case(op, shape_of(op, 4 * CLASSES))
    arguments = cases.draw(case, device)

    def timer(operators: Any) -> cases.Timer:
        step = cases.step(operators, case, arguments)
        wait = torch.cuda.synchronize if device == "cuda" else torch.cpu.synchronize

        def seconds(calls: int) -> float:
            wait()
            return cases.timed(step, calls)

        return seconds

    with sizes.every_size():
        timers = [timer(operators) for operators in (cases.TORCH, fused)]
        interleaved(timers, 1, WARM_UP)
        of_torch, of_pyfused = interleaved(timers, rounds, HOST_CALLS)
    medians = [f"{1e3 * median(times):.1f}" for times in (of_torch, of_pyfused)]
    return [[op, *medians, spread(ratios(of_pyfused, of_torch))]]


def gpu_host(options: Namespace) -> None:
    description = "Host time in microseconds, forward and backward of 4,000 elements."
    columns = ["operator", "torch", "pyfused", "pyfused / torch"]
    table = Table(options, description, columns, names=1)
    for op in SIZED[:2] if options.trial else SIZED:
        table.add(op, partial(host_rows, op, table.device, 3 if options.trial else 11))


# ---- a language model's head ---------------------------------------------------------------------

HEADS = ((8192, 4096, 128_256), (8 * 1024, 1024, 151_936), (16_384, 2048, 32_000))
MAX_NORM_ERROR = 2.0**-5  # of bfloat16 gradients


def peers_of(case: HeadCase) -> dict[str, Step]:
    """Returns the implementations of other packages that are installed."""
    peers: dict[str, Step] = {}
    head = case.input, case.head, case.target
    with contextlib.suppress(ImportError):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger

        peers["Liger"] = lambda: case.gradients(liger(*head))
    with contextlib.suppress(ImportError):
        from cut_cross_entropy import linear_cross_entropy as cut

        peers["cut-cross-entropy"] = lambda: case.gradients(cut(*head))
    with contextlib.suppress(ImportError):
        from quack.linear_cross_entropy import chunked_linear_cross_entropy as quack

        peers["quack"] = lambda: case.gradients(quack(*head))
    peers["torch.compile"] = case.compiled()
    if hasattr(inductor_config, "auto_chunker"):
        peers["torch.compile, auto_chunker"] = case.compiled(**{"auto_chunker.enable": True})
    return peers


def budgets_of(case: HeadCase) -> dict[str, Step]:
    """Returns pyfused with memory budgets, given by the number of classes of a block."""
    classes, column = case.head.shape[0], case.input.nbytes // case.input.shape[1]
    blocks = {"1/64 of the classes": classes // 64}
    blocks |= {"6,144 classes": 6144, "6,103 classes": 6103}  # a multiple of 64, and none
    return {
        f"pyfused, memory for {name}": partial(case.ours, memory_budget=size * column)
        for name, size in blocks.items()
    }


def error_of(step: Step, expected: tuple[Tensor, ...] | None) -> str:
    """Runs an implementation; returns its error or difference from torch, "" if it is correct."""
    try:
        results: Any = step()
    except Exception as error:  # an error of another package, or out of memory
        return f"{type(error).__name__}: {error}".splitlines()[0][:120]
    for pair in zip(results, expected or (), strict=expected is not None):
        if not (error := norm_error(*pair)) <= MAX_NORM_ERROR:
            return f"relative error of the norm: {error:.3f}"
    return ""


def head_rows(
    shape: tuple[int, ...], loss: str, clock: Clock, device: str, rounds: int
) -> list[list[str]]:
    case = HeadCase(*shape, dtype=BF16, device=device)
    steps: dict[str, Step] = {**case.implementations()[loss]}
    if loss == "cross-entropy":
        steps |= budgets_of(case) | peers_of(case)
    expected, errors = steps["torch"](), {}
    for name, step in steps.items():
        is_comparable = "products" not in name and "ignored" not in name
        errors[name] = error_of(step, expected if is_comparable else None)
    del expected
    steps = {name: step for name, step in steps.items() if not errors[name]}
    peaks = {name: peak(step) / 2**30 for name, step in steps.items()}
    timers = [clock.timer(step, small=False) for step in steps.values()]
    interleaved(timers, 1, 1)
    times = dict(zip(steps, interleaved(timers, rounds, 1), strict=True))
    products, of_torch, *_ = times.values()

    def cells(name: str) -> list[str]:
        if name not in times:
            return [errors[name], "", "", ""]
        relative = ratios(times[name], products), ratios(of_torch, times[name])
        return [f"{median(times[name]):.4g}", f"{peaks[name]:.2f}", *map(spread, relative)]

    return [[f"({', '.join(map(str, shape))})", loss, name, *cells(name)] for name in errors]


LOSSES = ("cross-entropy", "log-probabilities", "KL divergence")


def gpu_heads(options: Namespace) -> None:
    description = "bfloat16, forward and backward. GiB: peak of the memory that a call allocates."
    columns = ["tokens, features, classes", "loss", "", "ms", "GiB", "time / products"]
    table = Table(options, description, [*columns, "times as fast as torch"], names=3)
    clock, rounds = Clock(table.device), 3 if options.trial else 7
    for loss in LOSSES:  # cross-entropy of all sizes first
        for shape in [(64, 16, 400)] if options.trial else HEADS:
            rows = partial(head_rows, shape, loss, clock, table.device, rounds)
            table.add(f"{loss} {shape}", rows)
