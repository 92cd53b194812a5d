"""Compares torch and pyfused.

Implements run.py's commands busy, allocators, overhead and formulas.
Implementations that cannot share a process run in worker processes, which take turns.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from statistics import median, quantiles
from types import SimpleNamespace
from typing import Any

import cases
import torch
from cases import CASES, HEADLINES, OPS, TORCH, TRAINING, Case, Step, draw, step, timers_of
from report import ROOT, spread, tabulated
from rich.progress import track
from torch.nn import functional

import pyfused.functional


def cells(times: cases.Times) -> list[str]:
    """Returns table cells: the median times of two timers, and their ratio."""
    return [*(f"{median(each):,.4g}" for each in times), spread(cases.ratios(*times))]


# ---- load on the same cores ----------------------------------------------------------------------

PROCESSES_PER_CORE, MEAN_SECONDS = 4, 20e-3


def compute_and_sleep() -> None:
    """Computes and sleeps for random times, like a data loader, until the parent process ends."""
    draw, parent = random.Random(os.getpid()), os.getppid()
    while os.getppid() == parent:
        until = time.perf_counter() + draw.expovariate(1 / MEAN_SECONDS)
        while time.perf_counter() < until:
            pass
        time.sleep(draw.expovariate(1 / MEAN_SECONDS))


def start_load() -> None:
    """Starts two load processes per core, which run until this process ends."""
    for _ in range(PROCESSES_PER_CORE * (os.cpu_count() or 1)):
        multiprocessing.get_context("fork").Process(target=compute_and_sleep, daemon=True).start()


def busy(options: Namespace) -> None:
    """Times torch and pyfused under load: medians and 90th percentiles."""
    cases.settle_allocator()
    start_load()
    rows = []
    for case in track(cases.chosen(HEADLINES, options.k), "Measuring", transient=True):
        arguments = draw(case)
        cases.assert_correct(case, arguments)
        steps = [step(o, case, arguments) for o in (TORCH, pyfused.functional)]
        times = cases.measure(timers_of(steps), options.seconds, fewest=60)
        theirs, ours = (quantiles(each, n=10)[-1] for each in times)
        tails = [f"{theirs:,.4g}", f"{ours:,.4g}", f"{theirs / ours:.2f}"]
        rows.append([case.name, *cells(times), *tails])
    names = ["torch, ms", "pyfused, ms", "ratio", "torch, 90th", "pyfused, 90th", "ratio, 90th"]
    print(tabulated(["forward+backward, under load", *names], rows, names=1))


# ---- workers -------------------------------------------------------------------------------------

# The previous worker's threads spin for about a millisecond before they sleep.
HANDOVER_SECONDS = 3e-3


class Worker:
    """A Python process that answers requests, one line of JSON each, until its input is closed."""

    def __init__(self, *command: str | Path, **variables: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, **variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, *question: Any) -> Any:
        print(json.dumps(question), file=self.process.stdin, flush=True)
        assert self.process.stdout
        return json.loads(self.process.stdout.readline() or sys.exit("a worker ended"))


def worker_of(library: str, folder: Path = ROOT, **variables: str) -> Worker:
    """Starts a process that times the operators of torch, or of the pyfused in a folder.

    Args:
        library: "torch" or "pyfused", followed by ", keep" to call ``pyfused.memory.keep()``.
    """
    return Worker(__file__, folder, library, PYTHONPATH=str(folder), **variables)


def work(folder: Path, library: str) -> None:
    """Reads a case's name, a mode and a number of calls per line; prints their time in seconds."""
    assert Path(pyfused.__file__).is_relative_to(folder.resolve()), pyfused.__file__
    if ", keep" in library:
        pyfused.memory.keep()
    cases.settle_allocator()
    operators = pyfused.functional if library.startswith("pyfused") else TORCH
    known = {case.name: case for case in CASES if hasattr(operators, case.op)}

    @lru_cache(maxsize=1)
    def prepared(case: Case, mode: str) -> Step:
        if pyfused.memory.stats().keeps:  # returns what the case before has freed
            pyfused.memory.keep(False)
            pyfused.memory.keep()
        arguments = draw(case)
        cases.assert_correct(case, arguments, operators)
        return step(operators, case, arguments, mode)

    for line in sys.stdin:  # until the parent process ends
        name, mode, calls = json.loads(line)
        call = prepared(known[name], mode)
        time.sleep(HANDOVER_SECONDS)
        print(cases.timed(call, calls), flush=True)


# ---- allocators ----------------------------------------------------------------------------------

LARGE = 32 << 20  # bytes; glibc maps and unmaps blocks from this size on
# The libraries, as `worker_of` takes them, with variables of the environment. The first is the
# baseline.
SETTINGS: dict[str, dict[str, str]] = {
    "torch": {},
    "torch, THP": {"THP_MEM_ALLOC_ENABLE": "1"},
    "torch, keep": {},
    "pyfused, PYFUSED_RECYCLE=0": {"PYFUSED_RECYCLE": "0"},
    "pyfused": {},
    "pyfused, keep, PYFUSED_RECYCLE=0": {"PYFUSED_RECYCLE": "0"},
    "pyfused, keep": {},
}


def allocators(options: Namespace) -> None:
    """Times large cases with each allocator setting, to measure the cost of new memory."""
    families = ("cross_entropy", "mse_loss", "relu")  # one operator of each family
    large = [case for case in cases.chosen(HEADLINES, options.k) if case.bytes >= LARGE]
    if not options.all:
        large = [case for case in large if case.op in families]
    workers = {name: worker_of(name, **variables) for name, variables in SETTINGS.items()}
    found: list[dict[str, Any]] = []
    for case in track(large, transient=True):
        timers = [partial(worker.ask, case.name, TRAINING) for worker in workers.values()]
        times = cases.measure(timers, options.seconds)
        for name, taken in zip(workers, times, strict=True):
            ms, ratio = median(taken), cases.ratios(times[0], taken)
            found.append({"case": case.name, "setting": name, "ms": ms, "ratio": ratio})
            print(f"{case.name}, {name}: {ms:.3g} ms, {spread(ratio)}", flush=True)
    rows = [[e["case"], e["setting"], f"{e['ms']:.3g}", spread(e["ratio"])] for e in found]
    print(tabulated(["case", "setting", "ms", "times as fast as torch"], rows, names=2))
    if options.json:
        options.json.write_text(json.dumps({"allocators": found}, indent=1), encoding="utf-8")


# ---- the overhead of a call ----------------------------------------------------------------------


def overhead(options: Namespace) -> None:
    """Prints how much longer calls of 80 elements take than torch's."""
    torch.set_num_threads(1)
    rows = []
    for op in (op for op in OPS if any(part in op for part in options.k)):
        arguments = draw(Case(op, (8, 10)))
        timers = timers_of(
            [small_call(each, op, arguments) for each in (TORCH, pyfused.functional)]
        )
        if hasattr(functional, op):
            timers.append(partial(patched, op, arguments))
        first, *others = cases.interleaved(timers, options.rounds, calls=200)
        more = [[b - a for a, b in zip(first, each, strict=True)] for each in others]
        ns = [f"{1e6 * median(each):,.0f}" for each in (first, *more)]
        rows.append([op, *ns, *[""] * (3 - len(ns))])
    names = ["one thread", "torch, ns", "pyfused, extra ns", "patched, extra ns"]
    print(tabulated(names, rows, names=1))


def small_call(owner: Any, op: str, arguments: cases.Arguments) -> Callable[[], Any]:
    function, input = getattr(owner, op), arguments.input.detach()
    return lambda: function(input, *arguments.others, **arguments.options)


def patched(op: str, arguments: cases.Arguments, calls: int) -> float:
    with pyfused.patch():
        return cases.timed(small_call(functional, op, arguments), calls)


# ---- users' formulas -----------------------------------------------------------------------------


def formulas(options: Namespace) -> None:
    """Compares the formulas of `examples/formulas.py` with eager and compiled torch.

    Some are also compared with hand-written kernels. Small tensors, which fit into cache, run on
    one thread; large tensors run on all threads.
    """
    sys.path.append(str(ROOT / "examples"))
    from formulas import FORMULAS, HAND_WRITTEN

    threads = torch.get_num_threads()
    for elements, count in ((1 << 18, 1), (1 << 25, threads)):
        torch.set_num_threads(count)
        rows = []
        for name, formula in (FORMULAS | HAND_WRITTEN).items():
            if any(part in name for part in options.k):
                rows.append([name, *of_formula(formula, name, elements, options.seconds)])
        names = [f"{elements:,}, {count} threads", "torch, ms", "formula, ms", "ratio"]
        names += ["torch.compile / formula", "by hand, ms", "formula / by hand"]
        print(tabulated(names, rows, names=1))


def of_formula(formula: Any, name: str, elements: int, seconds: float) -> list[str]:
    operands = [torch.rand(elements) for _ in formula.op.variables]
    if name != "generalized_cross_entropy":  # its input is a probability
        operands[0] = torch.randn(elements)
    grad_output = None if formula.loss else torch.randn(elements)
    arguments = cases.Arguments(operands[0].requires_grad_(), (*operands[1:],), {}, grad_output)

    def unfused(*operands: torch.Tensor) -> torch.Tensor:
        each = formula.function(*operands)
        return each.mean() if formula.loss else each

    by_hand = getattr(pyfused.functional, name, None) if formula.loss else None
    torch.compiler.reset()  # otherwise the second size would compile with dynamic shapes
    functions = [unfused, formula, torch.compile(unfused)]
    if by_hand is not None:
        functions.append(partial(by_hand, reduction="mean"))
    ways = [SimpleNamespace(**{name: function}) for function in functions]
    case = Case(name, (elements,))
    if elements <= cases.M:  # checking larger tensors takes seconds
        cases.assert_correct(case, arguments, ours=ways[1], theirs=ways[0])
    times = cases.measure(timers_of([step(way, case, arguments) for way in ways]), seconds, 5)
    found = [*cells(times[:2]), spread(cases.ratios(times[2], times[1]))]
    if by_hand is not None:
        found += [f"{median(times[3]):,.4g}", spread(cases.ratios(times[1], times[3]))]
    return [*found, *[""] * (6 - len(found))]


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[2])
