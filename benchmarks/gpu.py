"""Compares the Triton kernels with torch, torch.compile and Liger on a GPU, and times alternative
block sizes and numbers of warps ("launch choices").

Calls are interleaved and timed with CUDA events; the L2 cache is overwritten before each call. For
comparison, a copy moves the minimum number of bytes that the call has to read and write. Its time
divided by pyfused's is the fraction of the copy's bandwidth that pyfused reaches.
"""

from __future__ import annotations

import contextlib
import json
import platform
import subprocess
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
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
from cases import BF16, EMBEDDINGS, F32, MODES, POINTWISE, Arguments, Case, M, Step, Timer, step
from report import Found, Row, machine, measured, peer, row, tabulated

import pyfused.functional

ROUNDS, WARM_UP = 30, 3
SMALL, CALLS = 1 << 20, 100  # below SMALL elements, overhead dominates: time CALLS calls at once
VOCABULARIES = tuple((2**28 // c, c) for c in (1024, 4096, 16_384, 32_000, 128_256, 262_144))
TINY = (Case("cross_entropy", (8, 10)), Case("mse_loss", (100,)))
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


def installed(package: str) -> str:
    """Returns the version of a package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def peers_of(case: Case) -> dict[str, Any]:
    """Returns eager and compiled torch, and Liger if it supports the case."""
    peers: dict[str, Any] = {"torch": cases.TORCH, "torch.compile": cases.Compiled()}
    plain = case.op == "cross_entropy" and len(case.shape) == 2 and not case.probabilities
    if plain and case.reduction == "mean":
        with contextlib.suppress(ImportError):
            from liger_kernel.transformers.functional import liger_cross_entropy

            peers["liger"] = SimpleNamespace(cross_entropy=liger_cross_entropy)
    return peers


class Clock:
    """Times calls: large ones one by one with events after flushing L2, small ones as a batch."""

    SLEEP = 2_000_000  # cycles (1 ms) in which the host queues the launches of a call

    def __init__(self, device: str) -> None:
        self.gpu = device == "cuda"
        if self.gpu:
            size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
            self.flushed = torch.empty(size, dtype=torch.uint8, device=device)

    def timer(self, call: Step, small: bool) -> Timer:
        return partial(self.at_once if small or not self.gpu else self.by_events, call)

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
        wait = torch.cuda.synchronize if self.gpu else torch.cpu.synchronize
        wait()
        started = time.perf_counter()
        cases.repeat(call, calls)
        wait()
        return time.perf_counter() - started


def peak(call: Step) -> int:
    """Returns the peak GPU memory of a call in bytes, without its arguments."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_gradients(call: Step, arguments: Arguments) -> float | None:
    """Returns the peak GPU memory of a call, in multiples of the input's gradient."""
    return peak(call) / arguments.input.nbytes if arguments.input.is_cuda else None


def measure(case: Case, mode: str, arguments: Arguments, clock: Clock) -> Row:
    steps: dict[str, Step] = {}
    for name, operators in peers_of(case).items():
        copied = arguments
        if name == "liger":  # overwrites the logits with their gradient
            copied = replace(copied, input=copied.input.detach().clone().requires_grad_())
        steps[name] = step(operators, case, copied, mode)
    small = case.elements < SMALL
    if not small:
        steps["copy"] = cases.copy_step(case, mode, arguments.input.device.type)
    steps["pyfused"] = step(pyfused.functional, case, arguments, mode)
    timers = [clock.timer(call, small) for call in steps.values()]
    for timer in timers:
        timer(WARM_UP)
    calls = CALLS if small else 1
    times = dict(zip(steps, cases.interleaved(timers, ROUNDS, calls), strict=True))
    ours = times.pop("pyfused")
    peers = {name: peer(taken, ours) for name, taken in times.items()}
    first = step(pyfused.functional, case, arguments, mode)  # a new leaf, without a gradient
    return row(case, mode, peers, peak_gradients(first, arguments))


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.check_output(command, text=True).split()[0]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def measured_on(device: str) -> Found:
    gpu = device == "cuda"
    info = {
        "gpu": torch.cuda.get_device_name() if gpu else "none",
        "driver": driver() if gpu else "none",
        "torch": torch.__version__,
        "triton": installed("triton"),
        "liger": installed("liger-kernel"),
        "python": platform.python_version(),
        "system": platform.system(),
    }
    return measured(info)


def run(wanted: Sequence[Case], device: str, seconds: float, file: Path) -> None:
    """Measures the cases, and saves the results after each one, in case of a later failure."""
    until, clock = time.perf_counter() + seconds, Clock(device)
    found = {**measured_on(device), "benchmarks": [], "memory": [], "left_out": []}
    for case in wanted:
        try:
            if time.perf_counter() > until:
                raise TimeoutError("out of time")
            torch.compiler.reset()
            arguments = cases.draw(case, device)
            cases.assert_correct(case, arguments)
            for mode in MODES if case.headline else MODES[1:]:
                result = measure(case, mode, arguments, clock)
                found["benchmarks"].append({"extra_info": asdict(result)})
                ms = result.peers["torch"].pyfused_ms
                print(f"{result.case}, {mode}: {ms:.4g} ms", flush=True)
        except Exception as error:  # continue with the other cases
            found["left_out"].append(f"{case.name}: {type(error).__name__}: {error}"[:500])
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def gpu(options: Namespace) -> None:
    wanted = cases.chosen(TINY if options.trial else CASES, options.k)
    run(wanted, "cpu" if options.trial else "cuda", options.seconds, options.file)


class Table:
    """A table in a file, which is rewritten with every new row."""

    def __init__(
        self, options: Namespace, description: str, columns: Sequence[str], names: int
    ) -> None:
        self.device = "cpu" if options.trial else "cuda"
        self.file: Path = options.file
        self.until = time.perf_counter() + options.seconds
        self.head = f"{machine(measured_on(self.device))}. {description}"
        self.columns, self.names = columns, names
        self.rows: list[list[str]] = []
        self.errors = 0

    def add(self, name: str, row: Callable[[], list[list[str]]]) -> None:
        """Adds the rows of a measurement, or its error."""
        try:
            if time.perf_counter() > self.until:
                raise TimeoutError("out of time")
            rows = row()
        except Exception as error:  # continue with the other rows
            self.errors += 1
            message = f"{type(error).__name__}: {error}".splitlines()[0][:120]
            rows = [[name, message, *[""] * (len(self.columns) - 2)]]
        self.rows += rows
        table = tabulated(self.columns, self.rows, names=self.names)
        self.file.write_text(f"{self.head}\n\n{table}\n", encoding="utf-8")
        for each in rows:
            print(" | ".join(each), flush=True)


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
NEIGHBOURS = {
    f"{name} {word}": (name, factor)
    for name, (word, factor) in product(("rows", "block", "threads"), (("/ 2", 0.5), ("x 2", 2.0)))
}


def changed(choice: Any, classes: int, name: str, factor: float) -> Any:
    """Returns a neighbour of a choice, or the choice itself if there is none."""
    from pyfused.kernels import launch

    if (name == "rows" and not classes) or (
        name == "block" and classes and choice.whole_row and factor > 1
    ):
        return choice  # the kernel has no rows, or the block already holds a whole row
    least = launch.warp_size() if name == "threads" else 1
    value = max(least, int(getattr(choice, name) * factor))
    choice = choice._replace(**{name: min(value, 1024) if name == "threads" else value})
    return choice._replace(whole_row=choice.block >= classes)


@contextlib.contextmanager
def choosing(
    caches: dict[str, Any], change: Callable[[Any, int], Any] = lambda choice, _: choice
) -> Iterator[list[Any]]:
    """Replaces the launch choices of all kernels in this context.

    Args:
        caches: The cached functions of the backend, which hold the choices; {} for the first call.
        change: Returns the replacement of a choice, given the choice and the number of classes.
    """
    from pyfused.backends import triton

    choose, made = triton.choose, []

    def choose_other(itemsize: int, classes: int = 0, *args: Any, **kwargs: Any) -> Any:
        choice = change(choose(itemsize, classes, *args, **kwargs), classes)
        made.append((choice, classes))
        return choice

    if not caches:
        cached = {n: f for n, f in vars(triton).items() if hasattr(f, "cache_clear")}
        own = {n: f.__wrapped__ for n, f in cached.items() if f.__module__ == triton.__name__}
        own["_elementwise_kernel"] = triton._new_elementwise_kernel
        caches.update({name: lru_cache(None)(function) for name, function in own.items()})
    with mock.patch.multiple(triton, choose=choose_other, **caches):
        yield made


def measure_choice(case: Case, arguments: Arguments, clock: Clock, rounds: int) -> list[str]:
    """Returns a table row: case, choice, median time, and relative times of its neighbours."""
    operator = getattr(pyfused.functional, case.op)
    variants: dict[str, tuple[Any, ...]] = {"": ({},)}
    with choosing(*variants[""]) as made:
        expected = cases.evaluate(operator, arguments)
    cells: dict[str, str] = dict.fromkeys(NEIGHBOURS, "")
    for neighbour, (name, factor) in NEIGHBOURS.items():
        try:
            variant = {}, partial(changed, name=name, factor=factor)
            with choosing(*variant) as others:
                got = cases.evaluate(operator, arguments)
            if others == made:
                continue
            for ours, right in zip(got, expected, strict=True):
                cases.assert_close(ours, right, ours.dtype)
            variants[neighbour] = variant
        except Exception as error:  # out of resources, or wrong results: reported in the table
            cells[neighbour] = type(error).__name__
    timer = clock.timer(step(pyfused.functional, case, arguments), small=False)

    def timed_with(variant: tuple[Any, ...], calls: int) -> float:
        with choosing(*variant):
            return timer(calls)

    timers = [partial(timed_with, variant) for variant in variants.values()]
    cases.interleaved(timers, 1, WARM_UP)
    ms, *others = map(median, cases.interleaved(timers, rounds, 1))
    ratios = [f"{other / ms:.2f}" for other in others]
    cells |= dict(zip([*variants][1:], ratios, strict=True))
    rows, block, threads, *_ = made[0][0]
    return [case.name, f"{rows} x {block}, {threads}", f"{ms:.4g}", *cells.values()]


def gpu_launch(options: Namespace) -> None:
    description = "Time of a neighbour / time of the choice: above 1, the choice is faster."
    columns = ["case", "rows x block, threads", "ms", *NEIGHBOURS]
    table = Table(options, description, columns, names=2)
    clock, rounds = Clock(table.device), 3 if options.trial else ROUNDS

    def row_of(case: Case) -> list[list[str]]:
        arguments = cases.draw(case, table.device)
        cases.assert_correct(case, arguments)
        return [measure_choice(case, arguments, clock, rounds)]

    for case in cases.chosen(TINY if options.trial else LAUNCH_CASES, options.k):
        table.add(case.name, partial(row_of, case))
