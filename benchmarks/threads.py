"""Times torch and pyfused with 1, 2, 4, ... threads, and what one thread does between regions.

Each case is first timed with torch's defaults, then with ``pyfused.memory.keep()``. Calls of torch
and pyfused are interleaved, and each frees its own gradients in its timed region.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest.mock import patch

import cases
import head
import report
import steps
import torch
from cases import Case, M, Step, Times
from report import ROOT, spread, tabulated
from rich.progress import track

import pyfused
import pyfused.functional
import pyfused.memory
from pyfused.backends import cpu
from pyfused.dispatch import sizes
from pyfused.ops import head_loop

SETTINGS = ("defaults", "keep")
FEWEST_COLUMNS = 16  # a machine with fewer cores has columns that are not measured
SECONDS = 0.2  # for a case, a setting and a number of threads
HEAD = (1024, 512, 32_000)


class Subject(NamedTuple):
    """What is timed.

    Attributes:
        prepare: Checks the results, and returns the implementations, first torch's and pyfused's.
        rounds: The number of rounds after one to warm up, None to choose it by `SECONDS`.
    """

    name: str
    prepare: Callable[[], dict[str, Step]]
    rounds: int | None = None


def of_operator(case: Case) -> Subject:
    def prepare() -> dict[str, Step]:
        arguments = cases.draw(case)
        cases.assert_correct(case, arguments)
        both = {"torch": cases.TORCH, "pyfused": pyfused.functional}
        return {name: cases.step(each, case, arguments) for name, each in both.items()}

    rounds = 4 if case.elements > 16 * M else None
    return Subject(f"{case.op} {case.shape}".replace(",)", ")"), prepare, rounds)


def of_head(*sizes: int) -> Subject:
    def prepare() -> dict[str, Step]:
        case = cases.HeadCase(*sizes)
        timed = {"torch": case.reference, "pyfused": case.ours, "products": case.products}
        head.check("cross-entropy", case, {"products": case.products, **timed})
        return timed

    return Subject(f"linear_cross_entropy {sizes}", prepare, rounds=3)


def of_model(case: steps.Case) -> Subject:
    def training(convert: bool) -> Callable[[], float]:
        torch.manual_seed(0)
        model = case.model(*case.sizes, *case.on_cpu)
        input, target = model.draw()
        if convert:
            pyfused.convert(model, head="head")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step() -> float:
            optimizer.zero_grad()
            loss = model(input, target)
            loss.backward()
            optimizer.step()
            return float(loss.detach())

        return step

    def prepare() -> dict[str, Step]:
        both = {"torch": training(convert=False), "pyfused": training(convert=True)}
        first, second = (step() for step in both.values())
        assert math.isclose(first, second, rel_tol=0.01), (first, second)
        return both

    return Subject(f"training step, {case.name}", prepare, rounds=2)


def subjects(trial: bool) -> list[Subject]:
    """Returns what is timed, training steps last because the time may end before them."""
    if trial:
        small = Case("cross_entropy", (8, 10)), Case("relu", (100,))
        return [*map(of_operator, small), of_head(8, 4, 10), of_model(steps.TRIAL[0])]
    by_name = {case.name: case for case in steps.CASES if case.dtype == "float32"}
    return [
        of_operator(Case("cross_entropy", (8192, 1000))),
        of_operator(Case("cross_entropy", (1024, 32_000))),
        of_operator(Case("cross_entropy", (65_536, 10))),
        of_operator(Case("softmax", (1024, 32_000))),
        *(of_operator(Case("mse_loss", (size,))) for size in (1 << 17, M, 1 << 25)),
        of_operator(Case("relu", (1 << 25,))),
        of_operator(Case("gelu", (1 << 25,))),
        of_head(*HEAD),
        of_model(by_name["recommender, 100,000 items"]),
        of_model(by_name["GPT-2 small"]),
    ]


# ---- the machine ---------------------------------------------------------------------------------


def cores() -> int:
    """Returns the number of cores that this process may use; hyperthreads are not counted."""
    siblings = set()
    for index in os.sched_getaffinity(0):
        file = Path(f"/sys/devices/system/cpu/cpu{index}/topology/thread_siblings_list")
        siblings.add(file.read_text(encoding="ascii") if file.exists() else index)
    return len(siblings)


def described(info: dict[str, Any]) -> str:
    nodes = len([*Path("/sys/devices/system/node").glob("node[0-9]*")])
    numa = f"{nodes} NUMA node{'s' * (nodes != 1)}" if nodes else "NUMA nodes unknown"
    others = f"load average {os.getloadavg()[0]:.1f} before the run"
    return f"{report.machine(report.measured(info))}, {numa}, {others}"


# ---- times ---------------------------------------------------------------------------------------


def times_of(subject: Subject, implementations: dict[str, Step], trial: bool) -> dict[str, Any]:
    timers = cases.timers_of([*implementations.values()])
    times: Times
    if subject.rounds is None:
        times = cases.measure(timers, 0 if trial else SECONDS, fewest=5)
    else:
        cases.interleaved(timers, 1, 1)
        times = cases.interleaved(timers, subject.rounds, 1)
    return dict(zip(implementations, times, strict=True))


Found = dict[tuple[str, str, int], dict[str, Any]]  # times by subject, setting and threads


def measure(chosen: list[Subject], counts: list[int], trial: bool, until: float) -> Found:
    found: Found = {}
    for subject in track(chosen, "Measuring", transient=True):
        if time.perf_counter() > until:
            break
        torch.set_num_threads(counts[-1])
        implementations = subject.prepare()
        for setting in SETTINGS:
            pyfused.memory.keep(setting == "keep")
            for count in reversed(counts):  # one thread takes longest
                if time.perf_counter() < until:
                    torch.set_num_threads(count)
                    times = times_of(subject, implementations, trial)
                    found[subject.name, setting, count] = times
        pyfused.memory.keep(False)
    return found


def table(found: Found, counts: list[int], columns: list[int]) -> str:
    rows = []
    for name, setting in dict.fromkeys(key[:2] for key in found):
        known = {n: found[name, setting, n] for n in counts if (name, setting, n) in found}
        lines: dict[str, dict[int, str]] = {}
        for way in next(iter(known.values())):
            ms = {n: median(times[way]) for n, times in known.items()}
            lines[f"{way}, ms"] = {n: f"{each:.3g}" for n, each in ms.items()}
        lines["torch / pyfused"] = {
            n: spread(cases.ratios(times["torch"], times["pyfused"])) for n, times in known.items()
        }
        for line, cells in lines.items():
            missing = {n: "out of time" if n in counts else "not measured" for n in columns}
            rows.append([name, setting, line, *(missing | cells).values()])
    heads = [f"{n} thread{'s' * (n > 1)}" for n in columns]
    return tabulated(["case", "pages", "", *heads], rows, names=3)


def draw(found: Found, columns: list[int], machine: str, file: Path) -> None:
    """Draws the speed-up over one thread, with `keep`."""
    sys.path.append(str(ROOT / "docs"))
    import gallery
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for name, setting, _ in found if setting == "keep"))
    height = math.ceil(len(names) / 2)
    figure = Figure(figsize=(gallery.WIDTH, 0.8 + 1.4 * height), layout="constrained")
    panels = figure.subplots(height, 2, sharex=True, sharey=True, squeeze=False).flatten()
    for name, axes in zip(names, panels, strict=False):
        known = {n: times for (*case, n), times in sorted(found.items()) if case == [name, "keep"]}
        for way, (colour, marker) in zip(("torch", "pyfused"), gallery.SERIES, strict=False):
            ms = [median(times[way]) for times in known.values()]
            speed_up = [median(known[min(known)][way]) / each for each in ms]
            axes.plot([*known], speed_up, marker, ls="-", color=colour, markersize=4, label=way)
        axes.plot(columns, columns, color=gallery.INK, alpha=0.3, linewidth=1)
        if max(columns) > max(known):
            axes.axvspan(max(known), max(columns), color=gallery.INK, alpha=0.08)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(columns, map(str, columns))
        axes.set_yticks(columns, map(str, columns))
        axes.set_title(name, fontsize=8)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    figure.supxlabel("threads; grey: not measured", fontsize=9)
    figure.supylabel("speed-up over one thread", fontsize=9)
    labels = panels[0].get_legend_handles_labels()
    title = machine.partition(", ")[0]
    figure.legend(*labels, title=title, loc="outside upper center", ncols=2, frameon=False)
    gallery.save(gallery._with_grid(figure), file)


# ---- one thread ----------------------------------------------------------------------------------


@contextlib.contextmanager
def products_timed() -> Iterator[list[float]]:
    """Yields a list whose element grows by the seconds that a head's matrix products take."""
    seconds = [0.0]

    def timed(function: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            started = time.perf_counter()
            function(*arguments)
            seconds[0] += time.perf_counter() - started

        return call

    with (
        patch.object(head_loop, "multiply", timed(head_loop.multiply)),
        patch.object(cpu, "add_product", timed(cpu.add_product)),
    ):
        yield seconds


def serial_share(step: Step, rounds: int) -> tuple[float, float]:
    """Returns the seconds of a step on one thread, and those outside of regions and products."""
    total, outside = [], []
    with products_timed() as products:
        for _ in range(rounds):
            cpu.native.measure_regions(True)
            products[0] = 0.0
            total.append(cases.timed(step, 1))
            outside.append(total[-1] - products[0] - cpu.native.measured_regions()[1])
    cpu.native.measure_regions(False)
    return min(total), min(outside)


def small_step_seconds() -> tuple[float, float]:
    """Returns the time of a small step of torch, and its time when the caches hold other data."""
    case = Case("cross_entropy", (8, 10))
    step = cases.step(cases.TORCH, case, cases.draw(case))
    source = torch.ones(8 * M)
    result = torch.empty_like(source)

    def after_copy() -> float:
        result.copy_(source)
        return cases.timed(step, 1)

    cases.repeat(step, 20)
    warm = min(cases.timed(step, 1) for _ in range(20))
    return warm, min(after_copy() for _ in range(20))


def serial(trial: bool) -> str:
    """Returns a table of the serial shares, and the speed-ups that Amdahl's law allows."""
    before = torch.get_num_threads()
    measured = [
        of_operator(Case("cross_entropy", (8192, 1000))),
        of_operator(Case("softmax", (8192, 1000))),
        of_operator(Case("mse_loss", (8 * M,))),
        of_operator(Case("relu", (8 * M,))),
        of_head(*HEAD),
    ]
    rows = []
    for subject in subjects(trial=True)[:3] if trial else measured:
        with sizes.every_size():  # torch's operator has no regions of pyfused
            step = subject.prepare()["pyfused"]
            torch.set_num_threads(1)
            for setting in SETTINGS:
                pyfused.memory.keep(setting == "keep")
                total, outside = serial_share(step, subject.rounds or 11)
                share = outside / total
                most = [1 / (share + (1 - share) / threads) for threads in (16, 64)]
                cells = f"{1e3 * total:.3g}", f"{1e6 * outside:,.0f}", f"{share:.1%}"
                rows.append([subject.name, setting, *cells, *(f"{each:.1f}" for each in most)])
            pyfused.memory.keep(False)
            torch.set_num_threads(before)
    columns = ["case", "pages", "one thread, ms", "outside, us", "share"]
    columns += ["16 threads, at most", "64 threads, at most"]
    torch.set_num_threads(1)
    warm, cold = (1e6 * seconds for seconds in small_step_seconds())
    torch.set_num_threads(before)
    return (
        "One thread: the least time outside of pyfused's parallel regions and torch's matrix "
        "products, and the largest speed-up over one thread that Amdahl's law allows. In single "
        "calls, most of it is Python's and autograd's, whose code and data a large kernel evicts "
        f"from the caches: torch's `cross_entropy` of (8, 10) takes {warm:.0f} us, and {cold:.0f} "
        f"us after a copy of 32 MiB.\n\n{tabulated(columns, rows, names=2)}"
    )


# ---- the command ---------------------------------------------------------------------------------


def threads(options: Namespace) -> None:
    until = time.perf_counter() + options.seconds
    cases.settle_allocator()
    before, available = torch.get_num_threads(), cores()
    info = report.machine_info() | {"cores": available, "threads": available}
    machine = described(info)
    counts = sorted({1 << n for n in range(available.bit_length())} | {available})
    columns = sorted({*counts, *(1 << n for n in range(FEWEST_COLUMNS.bit_length()))})
    shares = serial(options.trial)
    print(shares, flush=True)
    if options.serial:
        return
    chosen = subjects(options.trial)
    found = measure(chosen, counts, options.trial, until)
    torch.set_num_threads(before)
    timed = {key[:2] for key in found}
    every = [(subject.name, setting) for subject in chosen for setting in SETTINGS]
    late = "; ".join(", ".join(each) for each in every if each not in timed)
    text = f"{table(found, counts, columns)}\n\nOut of time: {late or 'nothing'}.\n\n{shares}"
    folder = options.results / report.slug(report.measured(info))
    caption = f"{machine}. Medians, forward and backward, and in brackets quartiles."
    report.write_table(folder / "threads.md", caption, text)
    draw(found, columns, machine, folder / "threads")
    print(text, f"written to {folder}", sep="\n\n")
