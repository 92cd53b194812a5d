"""Implements run.py's command compare: times the kernels of a revision and of the working tree.

A process of each times the same calls in turns, on one thread. A time is the minimum of the CPU
time in the kernels of many calls, which other programs on the machine change little. Calls that
appear slower are measured again in new processes, whose memory is arranged differently. The time
that calls take beside their kernels, in Python and in torch, is compared as a median of all.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any

import cases
import torch
from cases import ACTIVATIONS, BF16, EMBEDDINGS, F32, MODES, POINTWISE, SOFTMAX, TRAINING, Case
from report import OUTPUT, ROOT, tabulated
from rich.progress import track
from timing import Step, Worker, settle_allocator

import pyfused
from pyfused import functional as fused
from pyfused.backends import cpu
from pyfused.dispatch.sizes import every_size
from pyfused.ops.operators import OPERATORS

Call = tuple[Case, dict[str, Any]]  # a case, and further options

# ---- the calls -----------------------------------------------------------------------------------

SMALL, LARGE = 1 << 12, 1 << 17
ROWS = tuple((LARGE // classes, classes) for classes in (8, 512, 1 << 15))
OF_METRICS = (1024, 10_000), (65_536, 10), (8192, 100), (16_384, 64)
TRANSPOSED = "transposed", ""  # the input, and other tensors
SATURATED = 20.0  # the standard deviation of the input

GATED = cases.of_family("Gated")
ELEMENTWISE = (*POINTWISE, *ACTIVATIONS, *GATED, "rmse_loss")
# Operators that `cases.draw` does not know, and operators with the same arguments.
SAME_ARGUMENTS = {
    **dict.fromkeys(("log_probs", "additive_margin", "cross_entropy_with_metrics"), "nll_loss"),
    **dict.fromkeys((*GATED, "kl_div_with_logits", "rmse_loss"), "mse_loss"),
}
# Numbers for which there are further kernels.
NUMBERS = {"sigmoid_focal_loss": {"gamma": (2.0, 3.0)}, "triplet_margin_loss": {"p": (2.0, 1.0)}}


def cases_of(op: str) -> Iterator[Case]:
    if op in ELEMENTWISE:
        yield from (Case(op, (SMALL,)), Case(op, (LARGE,)), Case(op, (LARGE,), spread=SATURATED))
        if op in POINTWISE:
            yield Case(op, ROWS[1], layouts=TRANSPOSED)
            if any(operand.optional for operand in OPERATORS[op].operands):
                yield Case(op, (LARGE,), optional=True)
    elif op in EMBEDDINGS:
        yield from (Case(op, (n // 128, 128)) for n in (SMALL, LARGE))
    else:
        yield from (Case(op, (8, 512)), Case(op, ROWS[1], layouts=TRANSPOSED))
        yield from (Case(op, shape, spread=s) for shape in ROWS for s in (1.0, SATURATED))
    if op == "cross_entropy_with_metrics":
        yield from (Case(op, shape) for shape in OF_METRICS)
    if op in SOFTMAX:
        yield from (Case(op, (4, 64, 256), dim=1), Case(op, (LARGE // 16, 16), dim=0))
        yield Case(op, ROWS[1], masked=float("-inf"))
    if op in ("cross_entropy", "nll_loss"):
        yield from (Case(op, (4, 21, 768)), Case(op, (1, LARGE // 16, 16)))
        yield Case(op, ROWS[1], weight=True, ignored=0.5, reduction="none")
    if op == "cross_entropy":
        yield from (Case(op, shape, smoothing=0.1) for shape in ROWS)
        yield from (Case(op, shape, probabilities=True) for shape in (*ROWS, (4, 21, 768)))


def calls() -> dict[str, Call]:
    """Returns calls of all operators except heads and random ones, by name."""
    found = {}
    for op in sorted({*fused.__all__} & {*OPERATORS, *SAME_ARGUMENTS}):
        if op.startswith("linear_"):
            continue
        declared = getattr(OPERATORS.get(op), "choices", ())
        values = {choice.name: choice.values for choice in declared if choice.values}
        values |= NUMBERS.get(op, {})
        for chosen in itertools.product(*values.values()):
            options = dict(zip(values, chosen, strict=True))
            described = "".join(f", {name} {value}" for name, value in options.items())
            for case, dtype in itertools.product(cases_of(op), (F32, BF16)):
                case = replace(case, dtype=dtype)
                found[case.name + described] = case, options
    return found


def modes_of(case: Case) -> tuple[str, ...]:
    return MODES if case.elements > SMALL and case.spread == 1 else (TRAINING,)


def step_of(call: Call, mode: str) -> Step:
    """Returns a function that runs the forward pass of a call, or forward and backward."""
    case, options = call
    drawn = cases.draw(replace(case, op=SAME_ARGUMENTS.get(case.op, case.op)))
    if case.op not in SAME_ARGUMENTS:
        options = drawn.options | options
    function, leaf = getattr(fused, case.op), drawn.input.detach()
    leaf.requires_grad_(mode == TRAINING)

    def forward() -> torch.Tensor:
        result = function(leaf, *drawn.others, **options)
        return result[0] if isinstance(result, tuple) else result

    def forward_and_backward() -> None:
        leaf.grad = None
        result = forward()
        result.backward(grad_output if result.dim() else None)

    grad_output = torch.randn_like(forward().detach())
    return forward_and_backward if mode == TRAINING else forward


MILLISECONDS, TOGETHER = 2.0, 4  # the time of a call, and the calls, until it is the other's turn

# ---- processes -----------------------------------------------------------------------------------


class TimedModule:
    """The native module, whose functions add up their CPU time in milliseconds."""

    def __init__(self, native: Any) -> None:
        self.native, self.spent = native, 0.0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.native, name)
        if not callable(found):
            return found

        def call(*arguments: Any) -> Any:
            start = time.thread_time()
            result = found(*arguments)
            self.spent += 1e3 * (time.thread_time() - start)
            return result

        return call


def timed(step: Step, kernels: TimedModule) -> tuple[float, float]:
    """Returns the least milliseconds of three calls, or of as many as MILLISECONDS allow.

    The first number is the time in kernels, and the second the time beside them.
    """
    times: list[tuple[float, float]] = []
    while len(times) < 3 or sum(map(sum, times)) < MILLISECONDS:
        kernels.spent, start = 0.0, time.thread_time()
        step()
        total = 1e3 * (time.thread_time() - start)
        times.append((kernels.spent, total - kernels.spent))
    of_kernels, beside = map(min, zip(*times, strict=True))
    return of_kernels, beside


def work(folder: Path) -> None:
    """Answers requests: the least milliseconds of some calls, or the names of all."""
    cpu.native = kernels = TimedModule(cpu.native)
    assert Path(pyfused.__file__).is_relative_to(folder.resolve()), pyfused.__file__
    torch.set_num_threads(1)
    torch.manual_seed(0)
    settle_allocator()
    warnings.simplefilter("ignore")  # of kl_div, about its reduction
    known = calls()
    points = [(name, mode) for name, (case, _) in known.items() for mode in modes_of(case)]
    prepared = lru_cache(TOGETHER)(lambda name, mode: step_of(known[name], mode))
    with every_size():
        for line in sys.stdin:  # until the parent process ends
            request = json.loads(line)
            answer = [timed(prepared(*point), kernels) for point in request] or points
            print(json.dumps(answer), flush=True)


def built(revision: str) -> Path:
    """Extracts and builds a revision, unless that has been done."""
    verify = ["git", "rev-parse", "--verify", f"{revision}^{{commit}}"]
    done = subprocess.run(verify, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    commit = done.stdout.strip() or sys.exit(f"{revision} is no revision")
    folder = OUTPUT / "revisions" / commit
    if not (folder / ".built").exists():
        folder.mkdir(parents=True, exist_ok=True)
        archive = folder / "sources.tar"
        subprocess.run(["git", "archive", "--output", archive, commit], cwd=ROOT, check=True)
        shutil.unpack_archive(archive, folder)
        build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        subprocess.run(build, cwd=folder, check=True)
        (folder / ".built").touch()
    return folder


def pair(base: Path) -> list[Worker]:
    """Starts a process of each build, both on one core, because others may be slower."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    workers = [Worker(__file__, each, PYTHONPATH=str(each)) for each in (base, ROOT)]
    os.sched_setaffinity(0, cores)
    return workers


# ---- the comparison ------------------------------------------------------------------------------

SLOWER, CLEAR = 1.05, 1.02  # ratios of new and old time
ALLOWED = 0.5e-3  # milliseconds by which a kernel may be slower: calling one takes twice as long
ROUNDS = (3, 10)  # the fewest and the most for a call in a pair of processes
PAIRS = 3  # of processes: calls that appear slower are measured again in the next

Point = tuple[str, str]  # the name of a call, and a mode
Times = tuple[list[float], list[float]]  # of the revision and of the working tree, in each round
Found = dict[Point, Times]


def ratios(times: Times) -> tuple[float, float]:
    """Returns the ratio of the shortest times, and the median ratio of a round, in order.

    Programs on the same core disturb either. Both are 1 if the difference is ALLOWED.
    """
    old, new = times
    if min(new) - min(old) < ALLOWED:
        return 1.0, 1.0
    of_rounds = [b / a for a, b in zip(old, new, strict=True)]
    low, high = sorted((min(new) / min(old), median(of_rounds)))
    return low, high


def measure(
    workers: list[Worker], points: list[Point], found: Found, beside: Found, all_rounds: bool
) -> None:
    """Times calls by turns, each until it is clear that it is not slower."""
    for number in range(ROUNDS[1]):
        if not points:
            break
        for index in (0, 1) if number % 2 else (1, 0):
            for point, times in zip(points, workers[index].ask(*points), strict=True):
                for each, ms in zip((found, beside), times, strict=True):
                    each.setdefault(point, ([], []))[index].append(ms)
        if number + 1 >= ROUNDS[0] and not all_rounds:
            points = [point for point in points if ratios(found[point])[1] > CLEAR]


def compare(options: Namespace) -> None:
    """Times all calls, and lists those that are slower; exits with 1 if there are any."""
    base = Path(options.base) if Path(options.base).is_dir() else built(options.base)
    started = time.monotonic()
    workers = pair(base)
    of_base, of_tree = ([tuple(point) for point in worker.ask()] for worker in workers)
    both = sorted({*of_base} & {*of_tree})
    slower = [point for point in both if any(part in point[0] for part in options.k)]
    random.Random(0).shuffle(slower)  # spreads a noisy minute over all operators
    found, beside = Found(), Found()
    for number in range(PAIRS):
        workers = pair(base) if number else workers
        again, minutes = Found(), options.minutes * (1 if number else 2 / 3)
        starts = range(0, len(slower), TOGETHER)
        for start in track(starts, "Measuring", transient=True):
            if time.monotonic() > started + 60 * minutes:
                print(f"Out of time: {len(slower) - start} of {len(slower)} calls are not measured")
                break
            some = slower[start : start + TOGETHER]
            measure(workers, some, again, beside, options.all and not number)
        found |= again
        # A call that is not measured again stays in the list.
        limit = SLOWER if number else CLEAR
        slower = [each for each in slower if each in found and ratios(found[each])[0] > limit]
    rows = [
        [*point, *(f"{min(x):.4f}" for x in times), *(f"{x:.2f}" for x in ratios(times))]
        for point, times in sorted(found.items(), key=lambda each: -ratios(each[1])[0])
        if point in slower or options.all
    ]
    header = ["call", "mode", f"{options.base}, ms", "working tree, ms", "ratio, from", "to"]
    print(tabulated(header, rows, names=2))
    print(f"{len(slower)} of {len(found)} calls are slower than at {options.base} by 5 %")
    change = median([min(new) / min(old) for old, new in beside.values()])
    print(f"Outside of kernels, calls take {change:.2f} times as long (median)")
    sys.exit(bool(slower))


if __name__ == "__main__":
    work(Path(sys.argv[1]))
