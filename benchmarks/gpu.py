"""Compares the Triton kernels with torch, torch.compile and other packages on a GPU.

Each measurement of `MEASUREMENTS` writes its file after every row, in case of a later failure.
Calls are interleaved and timed with CUDA events; the L2 cache is overwritten before each call. A
copy moves the minimum number of bytes that the call has to read and write: its time divided by
pyfused's is the fraction of the copy's bandwidth that pyfused reaches.
"""

from __future__ import annotations

import contextlib
import platform
import re
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from importlib import metadata
from itertools import product
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest import mock

import cases
import torch
from cases import BF16, EMBEDDINGS, F32, MODES, POINTWISE, TRAINING, Case, M, step
from report import Row, machine, markdown, measured, peer, row, save, spread, tabulated
from timing import Step, Timer, interleaved, ratios, repeat, timed
from torch import Tensor
from torch._inductor import config as inductor_config
from torch.nn import functional as F

import pyfused
from pyfused import functional as fused
from pyfused.dispatch.sizes import every_size

ROUNDS, WARM_UP = 30, 3
SMALL, CALLS = 1 << 20, 100  # below SMALL elements, overhead dominates: time CALLS calls at once
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the CPU only to test this file
Rows = list[list[str]]


class Table:
    """A table in a file, which is rewritten with every new row."""

    def __init__(
        self, options: Namespace, description: str, columns: Sequence[str], names: int
    ) -> None:
        self.file: Path = options.file
        self.until = time.perf_counter() + options.seconds
        self.head = f"{machine(measured(info()))}. {description}"
        self.columns, self.names = columns, names
        self.rows: Rows = []
        self.errors = 0

    def add(self, name: str, rows_of: Callable[[], Rows]) -> None:
        """Adds the rows of a measurement, or its error."""
        try:
            if time.perf_counter() > self.until:
                raise TimeoutError("out of time")
            rows = rows_of()
        except Exception as error:  # continue with the other rows
            self.errors += 1
            rows = [[name, described(error), *[""] * (len(self.columns) - 2)]]
        self.rows += rows
        table = tabulated(self.columns, self.rows, names=self.names)
        self.file.write_text(f"{self.head}\n\n{table}\n", encoding="utf-8")
        for each in rows:
            print(" | ".join(each), flush=True)


def described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:120]


def info() -> dict[str, Any]:
    versions = {found.name: found.version for found in metadata.distributions()}
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    on_gpu = DEVICE == "cuda"
    return {
        "gpu": torch.cuda.get_device_name() if on_gpu else "none",
        "driver": subprocess.check_output(command, text=True).split()[0] if on_gpu else "none",
        "torch": torch.__version__,
        "triton": versions.get("triton", "not installed"),
        "liger": versions.get("liger-kernel", "not installed"),
        "python": platform.python_version(),
        "system": platform.system(),
    }


# ---- time and memory of a call -------------------------------------------------------------------


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


class Clock:
    """Times calls: large ones one by one with events after flushing L2, small ones as a batch."""

    SLEEP = 2_000_000  # cycles (1 ms) in which the host queues the launches of a call

    def __init__(self) -> None:
        if DEVICE == "cuda":
            size = 2 * torch.cuda.get_device_properties(DEVICE).L2_cache_size
            self.flushed = torch.empty(size, dtype=torch.uint8, device=DEVICE)

    def timer(self, call: Step, small: bool = False) -> Timer:
        return partial(self.at_once if small or DEVICE == "cpu" else self.by_events, call)

    def by_events(self, call: Step, calls: int) -> float:
        seconds = 0.0
        for _ in range(calls):
            started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(self.SLEEP)  # without it, the GPU would idle between launches
            self.flushed.zero_()
            started.record()
            call()
            ended.record()
            ended.synchronize()
            seconds += started.elapsed_time(ended) / 1e3
        return seconds

    def at_once(self, call: Step, calls: int) -> float:
        synchronize()
        started = time.perf_counter()
        repeat(call, calls)
        synchronize()
        return time.perf_counter() - started


def on_host(call: Step, calls: int) -> float:
    synchronize()
    return timed(call, calls)


def peak(call: Step) -> int:
    """Returns the peak GPU memory of a call in bytes, without its arguments."""
    if DEVICE == "cpu":
        return 0
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    synchronize()
    return torch.cuda.max_memory_allocated() - before


def peers_of(case: Case) -> dict[str, Any]:
    """Returns eager and compiled torch, and Liger if it supports the case."""
    peers: dict[str, Any] = {"torch": cases.TORCH, "torch.compile": cases.Compiled()}
    plain = case.op == "cross_entropy" and len(case.shape) == 2 and not case.probabilities
    if DEVICE == "cuda" and plain and case.reduction == "mean":
        with contextlib.suppress(ImportError):
            from liger_kernel.transformers.functional import liger_cross_entropy

            peers["liger"] = SimpleNamespace(cross_entropy=liger_cross_entropy)
    return peers


def measure(case: Case, mode: str, clock: Clock, peers: dict[str, Any], rounds: int) -> Row:
    """Times a case and its peers, and measures the peak memory of pyfused."""
    arguments = cases.draw(case, DEVICE)
    steps: dict[str, Step] = {}
    for name, operators in peers.items():
        copied = arguments
        if name == "liger":  # overwrites the logits with their gradient
            copied = replace(copied, input=copied.input.detach().clone().requires_grad_())
        steps[name] = step(operators, case, copied, mode)
    small = case.elements < SMALL
    if not small:
        steps["copy"] = cases.copy_step(case, mode, DEVICE)
    steps["pyfused"] = step(fused, case, arguments, mode)
    timers = [clock.timer(call, small) for call in steps.values()]
    interleaved(timers, 1, WARM_UP)
    times = dict(zip(steps, interleaved(timers, rounds, CALLS if small else 1), strict=True))
    ours = times.pop("pyfused")
    first = step(fused, case, arguments, mode)  # a new leaf, without a gradient
    gradients = peak(first) / arguments.input.nbytes if DEVICE == "cuda" else None
    return row(case, mode, {name: peer(each, ours) for name, each in times.items()}, gradients)


# ---- one kernel of each family -------------------------------------------------------------------

TINY = (Case("cross_entropy", (8, 10)), Case("mse_loss", (100,)))
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


def smoke_rows(case: Case) -> Rows:
    arguments = cases.draw(case, DEVICE)
    call = partial(cases.evaluate, getattr(fused, case.op), arguments)
    with every_size():
        return [smoke_row(case.name, call, lambda _: cases.assert_correct(case, arguments))]


def smoke_head_rows() -> Rows:
    def check(expected: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        assert all(norm_error(*pair) <= 1e-3 for pair in zip(results, expected, strict=True))

    sizes = 256, 64, 1000
    return [
        smoke_row(
            f"linear {loss} {sizes} float32", ways["pyfused"], partial(check, ways["torch"]())
        )
        for loss, ways in head(*sizes, dtype=F32).items()
    ]


def smoke(options: Namespace) -> None:
    description = (
        "Forward and backward, compared with torch: host time of the first call in seconds, "
        "including compilation, and of the third call in microseconds."
    )
    table = Table(options, description, ["case", "", "first, s", "third, us"], names=2)
    for case in FAMILIES[:2] if options.trial else FAMILIES:
        table.add(case.name, partial(smoke_rows, case))
    table.add("heads", smoke_head_rows)
    if table.errors:
        sys.exit(1)


# ---- the cases of a report, and their launches ---------------------------------------------------

VOCABULARIES = tuple((2**28 // c, c) for c in (1024, 4096, 16_384, 32_000, 128_256, 262_144))
LARGE = tuple((op, (64 * M,)) for op in (*POINTWISE, "softcap"))  # others use ATen
CASES = (
    *(Case("cross_entropy", s, t, headline=True) for s in VOCABULARIES for t in (BF16, F32)),
    *(Case(op, shape, dtype, headline=True) for op, shape in LARGE for dtype in (BF16, F32)),
    *TINY,
    Case("relu", (100,)),
    Case("cross_entropy", (8192, 32_000), BF16, weight=True, smoothing=0.1),
    Case("cross_entropy", (8192, 32_000), BF16, probabilities=True),
    Case("cross_entropy", (8192, 32_000), BF16, reduction="none"),
    Case("cross_entropy", (8192, 32_000), BF16, ignored=0.5),
    Case("cross_entropy", (16, 262_144), BF16),
    Case("cross_entropy", (8192, 50_257), BF16),
    Case("cross_entropy", (1 << 22, 10)),
    Case("cross_entropy", (16, 21, 512, 512)),
    *(Case("softmax", (2**28 // c, c), dtype) for c in (64, 4096, 32_000) for dtype in (BF16, F32)),
    Case("cross_entropy", (1 << 20, 100), BF16),
)


def report(options: Namespace) -> None:
    """Writes results.csv, which also has torch.compile, into a folder with the GPU's name."""
    until, clock, rows = time.perf_counter() + options.seconds, Clock(), []
    for case in cases.chosen(TINY if options.trial else CASES, options.k):
        torch.compiler.reset()
        modes = MODES if case.headline else MODES[1:]
        try:
            if time.perf_counter() > until:
                raise TimeoutError("out of time")
            cases.assert_correct(case, cases.draw(case, DEVICE))
            rows += [measure(case, mode, clock, peers_of(case), ROUNDS) for mode in modes]
            save(rows, measured(info()), options.file)
            print(markdown(rows[-len(modes) :]), flush=True)
        except Exception as error:  # continue with the other cases
            print(f"left out: {case.name}: {described(error)}", flush=True)


KERNEL_CASES = (
    *(Case("cross_entropy", (n, 1000), BF16) for n in (4096, 8192, 16_384, 32_768)),
    *(Case("cross_entropy", s, BF16) for s in ((8388, 32_000), (8192, 50_257), (2092, 128_256))),
    Case("cross_entropy", (16, 21, 512, 512)),
    *(Case(op, (8388, 32_000), BF16) for op in ("log_softmax", "softmax")),
    *(Case(op, (64 * M,), BF16) for op in ("binary_cross_entropy", "sigmoid_focal_loss", "kl_div")),
)
PROFILED = 5  # calls


def launches(call: Step) -> str:
    """Returns each kernel that a call launches, and its time in microseconds."""
    if DEVICE == "cpu":
        return ""
    with torch.profiler.profile() as profiler:
        repeat(call, PROFILED)
        synchronize()
    times: dict[str, list[float]] = {}
    for event in profiler.events() or ():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            name = re.split(r"[<(]", event.name)[0].split("::")[-1]
            times.setdefault(name, []).append(event.time_range.elapsed_us())
    return ", ".join(
        f"{len(each) / PROFILED:g} {name} {sum(each) / PROFILED:.1f}"
        for name, each in times.items()
    )


def kernel_rows(case: Case, clock: Clock, rounds: int) -> Rows:
    arguments = cases.draw(case, DEVICE)
    with every_size():
        cases.assert_correct(case, arguments)
        peers = peers_of(case)
        del peers["torch.compile"]
        found = measure(case, TRAINING, clock, peers, rounds).peers
        steps = [step(operators, case, arguments) for operators in (fused, cases.TORCH)]
        memory = [f"{peak(each) / 2**30:.3g}" for each in steps]
        kernels = launches(steps[0])
    shown = [spread(found[n].ratio) if n in found else "" for n in ("torch", "liger", "copy")]
    return [[case.name, "correct", f"{found['torch'].pyfused_ms:.4g}", *shown, *memory, kernels]]


def kernels(options: Namespace) -> None:
    description = (
        "Forward and backward. Time of torch, Liger and a copy / time of pyfused; peak memory of "
        "a call; number and microseconds of each kernel that a call launches."
    )
    columns = ["case", "", "ms", "torch", "Liger", "share of a copy", "GiB", "GiB, torch"]
    table = Table(options, description, [*columns, "launches"], names=2)
    clock, rounds = Clock(), 3 if options.trial else 15
    for case in cases.chosen(TINY if options.trial else KERNEL_CASES, options.k):
        table.add(case.name, partial(kernel_rows, case, clock, rounds))


# ---- calls of all sizes, and host time -----------------------------------------------------------

SIZES = tuple(1 << n for n in range(8, 27, 2))
CLASSES = 1000
SIZED = (
    *("mse_loss", "l1_loss", "smooth_l1_loss", "binary_cross_entropy_with_logits", "kl_div"),
    *("gaussian_nll_loss", "cross_entropy", "log_softmax"),
    *("softmax", "gelu", "silu", "tanh", "relu", "mish"),
)
MIN_SPEEDUP = 0.95  # a smaller difference is noise
HOST_CALLS = 50  # their launches fit into the GPU's queue


def sized(op: str, elements: int) -> Case:
    """Returns a case with one dimension, or for losses over classes, rows of 1,000 classes."""
    has_rows = op in (*cases.SOFTMAX, "cross_entropy")
    return Case(op, (max(1, elements // CLASSES), CLASSES) if has_rows else (elements,))


def size_rows(op: str, clock: Clock, rounds: int) -> Rows:
    speedups, host, by_kernel = [], [], []
    for elements in SIZES:
        case = sized(op, elements)
        arguments = cases.draw(case, DEVICE)
        call = op, arguments.input, *arguments.others
        if pyfused.explain(*call, **arguments.options).backend != "torch":
            by_kernel.append(elements)
        with every_size():  # also small calls run kernels
            cases.assert_correct(case, arguments)
            steps = [step(operators, case, arguments) for operators in (cases.TORCH, fused)]
            timers = [clock.timer(each, small=True) for each in steps]
            interleaved(timers, 1, WARM_UP)
            calls = max(1, min(50, (16 * M) // elements))
            theirs, ours = map(median, interleaved(timers, rounds, calls))
        speedups.append(theirs / ours)
        host = host or [f"{1e3 * each:.0f}" for each in (ours, theirs)]
    slower = [size for size, each in zip(SIZES, speedups, strict=True) if each < MIN_SPEEDUP]
    faster = [size for size in SIZES if size > max(slower, default=0)]
    limits = (
        f"2^{found[0].bit_length() - 1}" if found else "never" for found in (faster, by_kernel)
    )
    return [[op, *host, *limits, *(f"{each:.2f}" for each in speedups)]]


def sizes(options: Namespace) -> None:
    description = (
        "Forward and backward in float32, in a loop: microseconds of the smallest call, the size "
        "from which the kernel is faster, the size from which it runs by default, and torch's time "
        "divided by pyfused's for each size."
    )
    columns = ["operator", "pyfused", "torch", "faster from", "runs from"]
    columns += [f"2^{size.bit_length() - 1}" for size in SIZES]
    table = Table(options, description, columns, names=1)
    clock, rounds = Clock(), 3 if options.trial else 11
    for op in SIZED[:2] if options.trial else SIZED:
        table.add(op, partial(size_rows, op, clock, rounds))


def host_rows(op: str, rounds: int) -> Rows:
    """Times the host: in small calls, kernels take less time than launching them."""
    case = sized(op, 4 * CLASSES)
    arguments = cases.draw(case, DEVICE)
    with every_size():
        steps = [step(operators, case, arguments) for operators in (cases.TORCH, fused)]
        timers = [partial(on_host, each) for each in steps]
        interleaved(timers, 1, WARM_UP)
        theirs, ours = interleaved(timers, rounds, HOST_CALLS)
    medians = [f"{1e3 * median(times):.1f}" for times in (theirs, ours)]
    return [[op, *medians, spread(ratios(ours, theirs))]]


def host(options: Namespace) -> None:
    description = "Host time in microseconds, forward and backward of 4,000 elements."
    columns = ["operator", "torch", "pyfused", "pyfused / torch"]
    table = Table(options, description, columns, names=1)
    for op in SIZED[:2] if options.trial else SIZED:
        table.add(op, partial(host_rows, op, 3 if options.trial else 11))


# ---- a language model's head ---------------------------------------------------------------------

HEADS = ((8192, 4096, 128_256), (8 * 1024, 1024, 151_936), (16_384, 2048, 32_000))
MAX_NORM_ERROR = 2.0**-5  # of bfloat16 gradients
Gradients = tuple[Tensor, ...]
Ways = dict[str, Callable[[], Gradients]]


def head(tokens: int, features: int, classes: int, dtype: torch.dtype = BF16) -> dict[str, Ways]:
    """Returns for each loss the ways to compute the gradients of the input and of the weight.

    The first way computes the matrix products alone, and the second one is torch's.
    """
    generator = torch.Generator(DEVICE).manual_seed(0)
    here: dict[str, Any] = {"generator": generator, "device": DEVICE}
    randn = partial(torch.randn, dtype=dtype, **here)
    x = randn(tokens, features).requires_grad_()
    weight = (randn(classes, features) / features**0.5).requires_grad_()
    teacher = randn(tokens, features), randn(classes, features) / features**0.5
    target = torch.randint(classes, (tokens,), **here)
    half_ignored = target.clone()
    half_ignored[torch.randperm(tokens, **here)[: tokens // 2]] = -100
    column, all_logits = tokens * dtype.itemsize, tokens * classes * dtype.itemsize  # bytes
    grad_outputs = [randn(tokens) for _ in range(3)]

    def gradients(*results: Tensor) -> Gradients:
        given = None
        if len(results) > 1:
            pairs = zip(grad_outputs, results, strict=True)
            given = [grad_output.to(result.dtype) for grad_output, result in pairs]
        return torch.autograd.grad(results, (x, weight), given)

    def products() -> Gradients:
        logits = x.detach() @ weight.detach().t()
        return logits @ weight.detach(), logits.t() @ x.detach()

    def four_products() -> Gradients:
        F.linear(*teacher)
        return products()

    def loss(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight), target)

    def gradients_of(
        function: Callable[..., Tensor], target: Tensor = target, **options: Any
    ) -> Any:
        return lambda: gradients(function(x, weight, target, **options))

    def compiled(**options: Any) -> Any:
        return gradients_of(torch.compile(loss, options=options, dynamic=False))

    def torch_log_probs() -> Gradients:
        logits, indices = F.linear(x, weight), target[:, None]
        log_p = logits.log_softmax(1)
        of_target = log_p.gather(1, indices)
        lse, entropy = logits.gather(1, indices) - of_target, -(log_p.exp() * log_p).sum(1)
        return gradients(of_target.squeeze(1), entropy, lse.squeeze(1))

    def log_probs() -> Gradients:
        options = {"return_entropy": True, "return_lse": True}
        return gradients(*fused.linear_log_probs(x, weight, target, **options)[:3])

    def torch_divergence() -> Gradients:
        log_p, log_q = (F.linear(*each).log_softmax(1) for each in ((x, weight), teacher))
        return gradients(F.kl_div(log_p, log_q, reduction="batchmean", log_target=True))

    linear = fused.linear_cross_entropy
    parts = {"a quarter": 4, "a 16th": 16, "a 64th": 64}
    budgets = {name: all_logits // part for name, part in parts.items()}
    budgets |= {"6,144 classes": 6144 * column, "6,103 classes": 6103 * column}  # a multiple of 64
    cross_entropy = {
        "three products": products,
        "torch": gradients_of(loss),
        "torch.compile": compiled(),
        "pyfused, cross_entropy of logits": gradients_of(
            lambda x, weight, target: fused.cross_entropy(F.linear(x, weight), target)
        ),
        "pyfused": gradients_of(linear),
        **{
            f"pyfused, memory_budget of {n}": gradients_of(linear, memory_budget=b)
            for n, b in budgets.items()
        },
        "pyfused, half ignored": gradients_of(linear, half_ignored),
    }
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        chunks = torch.nn.LinearCrossEntropyOptions()
        cross_entropy["torch, in chunks"] = gradients_of(F.linear_cross_entropy, options=chunks)
    if hasattr(inductor_config, "auto_chunker"):
        cross_entropy["torch.compile, auto_chunker"] = compiled(**{"auto_chunker.enable": True})
    with contextlib.suppress(ImportError):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        cross_entropy["Liger"] = gradients_of(liger_fused_linear_cross_entropy)
    with contextlib.suppress(ImportError):
        from cut_cross_entropy import linear_cross_entropy as cut_cross_entropy

        cross_entropy["cut-cross-entropy"] = gradients_of(cut_cross_entropy)
    with contextlib.suppress(ImportError):
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        cross_entropy["quack"] = gradients_of(chunked_linear_cross_entropy)
    return {
        "cross-entropy": cross_entropy,
        "log-probabilities": {
            "three products": products,
            "torch": torch_log_probs,
            "pyfused": log_probs,
        },
        "KL divergence": {
            "four products": four_products,
            "torch": torch_divergence,
            "pyfused": lambda: gradients(fused.linear_kl_div(x, weight, *teacher)),
        },
    }


def norm_error(result: Tensor, expected: Tensor) -> float:
    """Returns the norm of the error, relative to the norm of the expected result."""
    return float((result.float() - expected.float()).norm() / expected.float().norm())


def error_of(way: Callable[[], Gradients], expected: Gradients | None) -> str:
    """Runs a way; returns its error or its difference from the expected result, "" if correct."""
    try:
        results = way()
    except Exception as error:  # an error of another package, or out of memory
        return described(error)
    for pair in zip(results, expected or results, strict=True):
        if not (error := norm_error(*pair)) <= MAX_NORM_ERROR:
            return f"relative error of the norm: {error:.3f}"
    return ""


def head_rows(shape: tuple[int, ...], loss: str, clock: Clock, rounds: int) -> Rows:
    ways = head(*shape)[loss]
    expected, errors = ways["torch"](), {}
    for name, way in ways.items():
        is_comparable = "products" not in name and "ignored" not in name
        errors[name] = error_of(way, expected if is_comparable else None)
    del expected
    ways = {name: way for name, way in ways.items() if not errors[name]}
    peaks = {name: peak(way) / 2**30 for name, way in ways.items()}
    timers = [clock.timer(way) for way in ways.values()]
    interleaved(timers, 1, 1)
    times = dict(zip(ways, interleaved(timers, rounds, 1), strict=True))
    products, by_torch, *_ = times.values()

    def cells(name: str) -> list[str]:
        if name not in times:
            return [errors[name], "", "", ""]
        relative = ratios(times[name], products), ratios(by_torch, times[name])
        return [f"{median(times[name]):.4g}", f"{peaks[name]:.2f}", *map(spread, relative)]

    return [[f"({', '.join(map(str, shape))})", loss, name, *cells(name)] for name in errors]


def heads(options: Namespace) -> None:
    description = "bfloat16, forward and backward. GiB: peak of the memory that a call allocates."
    columns = ["tokens, features, classes", "loss", "", "ms", "GiB", "time / products"]
    table = Table(options, description, [*columns, "times as fast as torch"], names=3)
    clock, rounds = Clock(), 3 if options.trial else 7
    shapes = [(64, 16, 400)] if options.trial else HEADS
    for loss, shape in product(("cross-entropy", "log-probabilities", "KL divergence"), shapes):
        table.add(f"{loss} {shape}", partial(head_rows, shape, loss, clock, rounds))


# ---- launch choices ------------------------------------------------------------------------------

LAUNCH_CASES = (
    Case("cross_entropy", (262_144, 1000), BF16),
    Case("cross_entropy", (65_536, 4096), BF16),
    Case("cross_entropy", (8192, 32_000), BF16),
    Case("cross_entropy", (16, 21, 512, 512)),
    Case("mse_loss", (64 * M,), BF16),
    Case("softcap", (64 * M,), BF16),
    Case("softmax", (65_536, 4096), BF16),
    Case("cross_entropy", (8192, 32_000), BF16, probabilities=True),
    Case("cross_entropy", (8192, 32_000), BF16, weight=True, smoothing=0.1),
    Case("cross_entropy", (1 << 22, 10)),
    Case("softmax", (8192, 32_000), BF16),
    *(Case(op, (1 << 20, 256)) for op in EMBEDDINGS),
)
# Neighbours of a choice have half or twice its rows, its block size or its threads.
NEIGHBOURS = tuple(product(("rows", "block", "threads"), (0.5, 2.0)))


def changed(name: str, factor: float, choice: Any, classes: int) -> Any:
    """Returns a neighbour of a choice, or the choice itself if there is none."""
    from pyfused.kernels import launch

    holds_a_row = name == "block" and classes and choice.whole_row and factor > 1
    if holds_a_row or (name == "rows" and not classes):
        return choice
    least, most = (launch.warp_size(), 1024) if name == "threads" else (1, 1 << 30)
    value = min(max(least, int(getattr(choice, name) * factor)), most)
    choice = choice._replace(**{name: value})
    return choice._replace(whole_row=choice.block >= classes)


class Launches:
    """Replaces the launch choices of all kernels in a context, and records them in `made`."""

    def __init__(self, change: Callable[[Any, int], Any]) -> None:
        from pyfused.backends import triton

        self.made: list[tuple[Any, int]] = []
        choose = triton.choose

        def choose_other(itemsize: int, classes: int = 0, *args: Any, **kwargs: Any) -> Any:
            choice = change(choose(itemsize, classes, *args, **kwargs), classes)
            self.made.append((choice, classes))
            return choice

        # The backend's cached functions hold the choices.
        cached = {n: f for n, f in vars(triton).items() if hasattr(f, "cache_clear")}
        own = {n: f.__wrapped__ for n, f in cached.items() if f.__module__ == triton.__name__}
        own["_elementwise_kernel"] = triton._new_elementwise_kernel
        self.names = {name: lru_cache(None)(function) for name, function in own.items()}
        self.names["choose"] = choose_other
        self.module = triton

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        with mock.patch.multiple(self.module, **self.names):
            return function(*arguments)


def launch_rows(case: Case, neighbour: tuple[str, float], clock: Clock, rounds: int) -> Rows:
    arguments = cases.draw(case, DEVICE)
    both = Launches(lambda choice, _: choice), Launches(partial(changed, *neighbour))
    evaluate = partial(cases.evaluate, getattr(fused, case.op), arguments)
    results = [each.run(evaluate) for each in both]
    if both[0].made == both[1].made:
        return []
    for expected, got in zip(*results, strict=True):
        cases.assert_close(got, expected, got.dtype)
    timer = clock.timer(step(fused, case, arguments))
    timers = [partial(each.run, timer) for each in both]
    interleaved(timers, 1, WARM_UP)
    ours, theirs = interleaved(timers, rounds, 1)
    rows, block, threads, *_ = both[0].made[0][0]
    choice = f"{rows} x {block}, {threads}", f"{median(ours):.4g}"
    return [[case.name, "{} x {:g}".format(*neighbour), *choice, spread(ratios(theirs, ours))]]


def launch(options: Namespace) -> None:
    description = "Time of a neighbour / time of the choice: above 1, the choice is faster."
    columns = ["case", "neighbour", "rows x block, threads", "ms", "neighbour / choice"]
    table = Table(options, description, columns, names=3)
    clock, rounds = Clock(), 3 if options.trial else ROUNDS
    chosen = cases.chosen(TINY if options.trial else LAUNCH_CASES, options.k)
    for case, neighbour in product(chosen, NEIGHBOURS):
        name = "{}, {} x {:g}".format(case.name, *neighbour)
        table.add(name, partial(launch_rows, case, neighbour, clock, rounds))


MEASUREMENTS = {f.__name__: f for f in (smoke, kernels, heads, sizes, host, report, launch)}


def gpu(options: Namespace) -> None:
    MEASUREMENTS[options.name](options)
