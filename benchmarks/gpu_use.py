"""Times typical uses on a GPU: one kernel of each family, calls of all sizes, host time, a language
model's head, and a training step.

Each command writes its table after every row, so that a failure loses no results.
"""

from __future__ import annotations

import contextlib
import sys
import time
from argparse import Namespace
from functools import partial
from statistics import median
from typing import Any
from unittest import mock

import cases
import torch
from cases import BF16, Case, HeadCase, M, Step, interleaved, ratios
from gpu import Clock, Table, peak
from report import spread
from torch import Tensor
from torch.nn import functional as F

from pyfused import functional as fused
from pyfused.adopt.tune import tune_gpu
from pyfused.dispatch import sizes

WARM_UP = 3


# ---- one kernel of each family -------------------------------------------------------------------

FAMILIES = (
    Case("mse_loss", (700, 600)),
    Case("gaussian_nll_loss", (700, 600), BF16),
    Case("cross_entropy", (256, 1000)),
    Case("cross_entropy", (64, 128_256), BF16),
    Case("cross_entropy", (4, 21, 64, 64)),
    Case("cross_entropy", (256, 1000), probabilities=True),
    Case("nll_loss", (256, 1000)),
    Case("multi_margin_loss", (256, 1000)),
    Case("multilabel_margin_loss", (256, 1000)),
    Case("triplet_margin_loss", (256, 128)),
    Case("cosine_embedding_loss", (256, 128)),
    Case("log_softmax", (256, 1000)),
    Case("gelu", (700, 600)),
)
SMOKE_CALLS = 3  # Triton launches the first call, and a prepared launch the others


def smoke_row(case: Case, device: str) -> list[str]:
    seconds = []
    with mock.patch.object(sizes, "FORCED", "every size"):
        for _ in range(SMOKE_CALLS):
            arguments = cases.draw(case, device)
            started = time.perf_counter()
            cases.evaluate(getattr(fused, case.op), arguments)
            seconds.append(time.perf_counter() - started)
            cases.assert_correct(case, arguments)
    return [case.name, "correct", f"{seconds[0]:.2f}", f"{1e6 * seconds[-1]:.0f}"]


def smoke_head_rows(device: str) -> list[list[str]]:
    given, rows = HeadCase(256, 64, 1000, device=device), []
    for loss, ways in given.ways().items():
        expected, seconds = ways["torch"](), []
        for _ in range(SMOKE_CALLS):
            started = time.perf_counter()
            found = ways["pyfused"]()
            seconds.append(time.perf_counter() - started)
            for got, right in zip(found, expected, strict=True):
                assert (got - right).norm() <= 1e-3 * right.norm(), loss
        name = f"linear {loss} (256, 64, 1000) float32"
        rows.append([name, "correct", f"{seconds[0]:.2f}", f"{1e6 * seconds[-1]:.0f}"])
    return rows


def gpu_smoke(options: Namespace) -> None:
    words = (
        "Forward and backward, compared with torch: seconds on the host of the first call, with "
    )
    words += "compilation, and microseconds of the third."
    table = Table(options, words, ["case", "", "first, s", "third, us"], names=2)
    for case in FAMILIES[:2] if options.trial else FAMILIES:
        table.add(case.name, lambda case=case: [smoke_row(case, table.device)])  # type: ignore[misc]
    table.add("heads", lambda: smoke_head_rows(table.device))
    if table.errors:
        sys.exit(1)


# ---- calls of all sizes --------------------------------------------------------------------------

SIZES = tuple(1 << n for n in range(8, 27, 2))
CLASSES = 1000
SIZED = (
    *("mse_loss", "l1_loss", "smooth_l1_loss", "binary_cross_entropy_with_logits", "kl_div"),
    *("gaussian_nll_loss", "cross_entropy", "nll_loss", "multi_margin_loss", "log_softmax"),
    *("softmax", "gelu", "silu", "tanh", "relu", "mish"),
)


def shape_of(op: str, elements: int) -> tuple[int, ...]:
    """Returns a one-dimensional shape, or for losses over classes, rows of 1,000 classes."""
    of_rows = (*cases.SOFTMAX, "cross_entropy", "nll_loss", "multi_margin_loss")
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


LEAST_GAIN = 0.95  # a smaller difference is noise


def size_row(op: str, clock: Clock, device: str, rounds: int) -> list[str]:
    with mock.patch.object(sizes, "FORCED", "every size"):  # kernels for small calls, too
        found = [times_of(op, elements, clock, device, rounds) for elements in SIZES]
    gains = [median(theirs) / median(ours) for theirs, ours in found]
    slower = [size for size, gain in zip(SIZES, gains, strict=True) if gain < LEAST_GAIN]
    larger = [size for size in SIZES if size > max(slower, default=0)]
    host = [f"{1e3 * median(times):.0f}" for times in reversed(found[0])]
    faster_from = f"2^{larger[0].bit_length() - 1}" if larger else "never"
    return [op, *host, faster_from, *(f"{gain:.2f}" for gain in gains)]


def gpu_sizes(options: Namespace) -> None:
    words = (
        "Forward and backward in float32, call after call: microseconds of the smallest call, the "
        "size from which the kernel is faster, and torch's time divided by pyfused's for each size"
    )
    columns = ["operator", "pyfused", "torch", "faster from"]
    columns += [f"2^{size.bit_length() - 1}" for size in SIZES]
    table = Table(options, words, columns, names=1)
    clock, rounds = Clock(table.device), 3 if options.trial else 11
    for op in SIZED[:2] if options.trial else SIZED:
        table.add(op, lambda op=op: [size_row(op, clock, table.device, rounds)])  # type: ignore[misc]


# ---- host time -----------------------------------------------------------------------------------

HOST_CALLS = 50  # their launches fit into the GPU's queue


def host_row(op: str, device: str, rounds: int) -> list[str]:
    """Times the host alone: the kernels of small calls take the GPU less time."""
    case = Case(op, shape_of(op, 4 * CLASSES))
    arguments = cases.draw(case, device)

    def timer(operators: Any) -> cases.Timer:
        step = cases.step(operators, case, arguments)
        wait = torch.cuda.synchronize if device == "cuda" else torch.cpu.synchronize

        def seconds(calls: int) -> float:
            wait()
            return cases.timed(step, calls)

        return seconds

    with mock.patch.object(sizes, "FORCED", "every size"):
        timers = [timer(operators) for operators in (cases.TORCH, fused)]
        interleaved(timers, 1, WARM_UP)
        theirs, ours = interleaved(timers, rounds, HOST_CALLS)
    times = [f"{1e3 * median(taken):.1f}" for taken in (theirs, ours)]
    return [op, *times, spread(ratios(ours, theirs))]


def gpu_host(options: Namespace) -> None:
    words = "Microseconds of the host, forward and backward of 4,000 elements."
    if not options.trial:
        host_us, gb_per_s = tune_gpu()
        words += f" `python -m pyfused tune` measures {host_us} us and {gb_per_s} GB/s."
    table = Table(options, words, ["operator", "torch", "pyfused", "pyfused / torch"], names=1)
    for op in SIZED[:2] if options.trial else SIZED:
        row = partial(host_row, op, table.device, 3 if options.trial else 11)
        table.add(op, lambda row=row: [row()])  # type: ignore[misc]


# ---- a language model's head ---------------------------------------------------------------------

HEADS = ((8192, 4096, 128_256), (8 * 1024, 1024, 151_936), (16_384, 2048, 32_000))
NORM = 2.0**-5  # the allowed difference of bfloat16 gradients, relative to their norm


def peers_of(given: HeadCase) -> dict[str, Step]:
    """Returns the implementations of other packages that are installed."""
    peers: dict[str, Step] = {}
    head = given.input, given.head, given.target
    with contextlib.suppress(ImportError):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger

        peers["Liger"] = lambda: given.gradients(liger(*head))
    with contextlib.suppress(ImportError):
        from cut_cross_entropy import linear_cross_entropy as cut

        peers["cut-cross-entropy"] = lambda: given.gradients(cut(*head))
    with contextlib.suppress(ImportError):
        from quack.linear_cross_entropy import chunked_linear_cross_entropy as quack

        peers["quack"] = lambda: given.gradients(quack(*head))
    compiled = torch.compile(lambda *head: F.cross_entropy(F.linear(*head[:2]), head[2]))
    peers["torch.compile"] = lambda: given.gradients(compiled(*head))
    of_logits = torch.compile(lambda *head: fused.cross_entropy(F.linear(*head[:2]), head[2]))
    peers["pyfused's cross_entropy, torch.compile"] = lambda: given.gradients(of_logits(*head))
    return peers


def checked(way: Step, expected: tuple[Tensor, ...] | None) -> str:
    """Runs an implementation; returns its error or difference from torch, "" if it is correct."""
    try:
        found: Any = way()
    except Exception as error:  # another package's, or the memory is too small
        return f"{type(error).__name__}: {error}".splitlines()[0][:120]
    for got, right in zip(found, expected or (), strict=expected is not None):
        difference = (got.float() - right.float()).norm() / right.float().norm()
        if not difference <= NORM:
            return f"differs by {difference:.3f} of the norm"
    return ""


def head_rows(
    case: tuple[int, ...], loss: str, clock: Clock, device: str, rounds: int
) -> list[list[str]]:
    given = HeadCase(*case, dtype=BF16, device=device)
    ways = {n: way for n, way in given.ways()[loss].items() if "deterministic" not in n}
    if loss == "cross-entropy":
        ways |= peers_of(given)
    expected = ways["torch"]()
    uncompared = {name: "products" in name or "ignored" in name for name in ways}
    errors = {n: checked(way, None if uncompared[n] else expected) for n, way in ways.items()}
    del expected
    ways = {name: way for name, way in ways.items() if not errors[name]}
    peaks = {name: peak(way) / 2**30 for name, way in ways.items()}
    timers = [clock.timer(way, small=False) for way in ways.values()]
    interleaved(timers, 1, 1)
    times = dict(zip(ways, interleaved(timers, rounds, 1), strict=True))
    products, of_torch, *_ = times.values()

    def cells(name: str) -> list[str]:
        if name not in times:
            return [errors[name], "", "", ""]
        taken = times[name]
        compared = spread(ratios(taken, products)), spread(ratios(of_torch, taken))
        return [f"{median(taken):.4g}", f"{peaks[name]:.2f}", *compared]

    shape = f"({', '.join(map(str, case))})"
    return [[shape, loss, name, *cells(name)] for name in errors]


LOSSES = ("cross-entropy", "log-probabilities", "KL divergence")


def gpu_heads(options: Namespace) -> None:
    words = "bfloat16, forward and backward. GiB is the peak of what a call allocates."
    columns = ["tokens, features, classes", "loss", "", "ms", "GiB", "time / products"]
    table = Table(options, words, [*columns, "times as fast as torch"], names=3)
    clock, rounds = Clock(table.device), 3 if options.trial else 7
    for loss in LOSSES:  # cross-entropy of all sizes first
        for case in [(64, 16, 400)] if options.trial else HEADS:
            row = partial(head_rows, case, loss, clock, table.device, rounds)
            table.add(f"{loss} {case}", row)
