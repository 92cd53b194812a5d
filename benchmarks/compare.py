"""Compares the kernels of a revision with those of the working tree: run.py's command compare.

A process of each times the same calls in turns, on one thread. A time is the minimum of the CPU
time of many calls, which other programs on the machine change little. Calls that appear slower are
measured again in new processes, whose memory is arranged differently.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cases
import torch
from cases import (
    ACTIVATIONS,
    BF16,
    EMBEDDINGS,
    F32,
    MODES,
    POINTWISE,
    SOFTMAX,
    TRAINING,
    Case,
    Step,
)
from pairs import Worker
from report import ROOT, tabulated
from rich.progress import track

import pyfused
from pyfused import functional as fused
from pyfused.dispatch.sizes import every_size
from pyfused.ops.operators import OPERATORS

Call = tuple[Case, dict[str, Any]]  # a case, and further options

# ---- the calls -----------------------------------------------------------------------------------

SMALL, LARGE = 1 << 12, 1 << int(os.environ.get("LG", "16"))
ROWS = tuple((LARGE // classes, classes) for classes in (8, 512, 1 << 15))
SATURATED = 20.0  # the standard deviation of the input

GATED = cases.of_family("Gated")
ELEMENTWISE = (*POINTWISE, *ACTIVATIONS, *GATED, "rmse_loss")
# Operators that `cases.draw` does not know, and operators with the same arguments.
SAME_ARGUMENTS = {
    **dict.fromkeys((*GATED, "kl_div_with_logits"), "contrastive_loss"),
    **dict.fromkeys(("log_probs", "additive_margin", "cross_entropy_with_metrics"), "nll_loss"),
    "rmse_loss": "mse_loss",
}
# Numbers for which there are further kernels.
NUMBERS = {"sigmoid_focal_loss": {"gamma": (2.0, 3.0)}, "triplet_margin_loss": {"p": (2.0, 1.0)}}


def cases_of(op: str) -> Iterator[Case]:
    if op in ELEMENTWISE:
        yield from (Case(op, (SMALL,)), Case(op, (LARGE,)), Case(op, (LARGE,), spread=SATURATED))
        if op in POINTWISE and any(operand.optional for operand in OPERATORS[op].operands):
            yield Case(op, (LARGE,), optional=True)
    elif op == "contrastive_loss":
        yield from (Case(op, (math.isqrt(n), 64)) for n in (SMALL, LARGE))
    elif op in EMBEDDINGS:
        yield from (Case(op, (n // 128, 128)) for n in (SMALL, LARGE))
    else:
        yield Case(op, (8, 512))
        yield from (Case(op, shape, spread=s) for shape in ROWS for s in (1.0, SATURATED))
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


# ---- processes -----------------------------------------------------------------------------------


def least(step: Step, seconds: float) -> float:
    """Returns the least CPU time of a call, of three calls or of as many as the time allows."""
    first = time.thread_time()
    times: list[float] = []
    while len(times) < 3 or time.thread_time() - first < seconds:
        start = time.thread_time()
        step()
        times.append(time.thread_time() - start)
    return min(times)


def work(folder: Path) -> None:
    """Answers requests: the names of calls, or the least milliseconds of one."""
    assert Path(pyfused.__file__).is_relative_to(folder.resolve()), pyfused.__file__
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cases.settle_allocator()
    known = calls()
    with every_size():
        for line in sys.stdin:  # until the parent process ends
            if request := json.loads(line):
                name, mode, seconds = request
                # Caches map physical pages, so each round has its own.
                ctypes.CDLL(None).malloc_trim(0)
                print(1e3 * least(step_of(known[name], mode), seconds), flush=True)
            else:
                print(json.dumps(list(known)), flush=True)


def built(revision: str) -> Path:
    """Extracts and builds a revision, unless that has been done."""
    commit = subprocess.run(
        ["git", "rev-parse", "--verify", f"{revision}^{{commit}}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout.strip() or sys.exit(f"{revision} is no revision")
    folder = ROOT / ".benchmarks" / "revisions" / commit
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
    return [Worker(__file__, each, PYTHONPATH=str(each)) for each in (base, ROOT)]


# ---- the comparison ------------------------------------------------------------------------------

SLOWER = 1.05  # the ratio of new and old time from which a call counts as slower
AGREEMENT = 1.02  # the ratio of the two shortest times, which shows that neither was disturbed
ROUNDS, SECONDS = (3, 12), 3e-3  # the fewest and most rounds for a call; the time of one
NEW_PROCESSES = 3

Times = list[list[float]]  # milliseconds of the revision and of the working tree, in each round


def settled(times: Times) -> bool:
    return all(len(each) > 1 and sorted(each)[1] < AGREEMENT * min(each) for each in times)


def ratio(times: Times) -> float:
    return min(times[1]) / min(times[0])


def measure(workers: list[Worker], times: Times, name: str, mode: str, rounds: int) -> None:
    """Times a call by turns, at least ROUNDS[0] times, until both of its times have settled."""
    for number in range(rounds):
        for index in (0, 1) if number % 2 else (1, 0):
            times[index].append(workers[index].ask(name, mode, SECONDS))
        if number + 1 >= ROUNDS[0] and settled(times):
            break


def compare(options: Namespace) -> None:
    """Times all calls, and lists those that are slower; exits with 1 if there are any."""
    base = Path(options.base) if Path(options.base).is_dir() else built(options.base)
    until = time.monotonic() + 60 * options.minutes
    workers = pair(base)
    known = [set(worker.ask()) for worker in workers]
    points = [
        (name, mode)
        for name in sorted(set.intersection(*known))
        for mode in MODES
        if any(part in name for part in options.k)
    ]
    random.Random(0).shuffle(points)  # spreads a noisy minute over all operators
    found: dict[tuple[str, str], Times] = {}
    for point in track(points, "Measuring", transient=True):
        if time.monotonic() > until - 15 * options.minutes:  # the rest is for the second look
            print(f"Out of time after {len(found)} of {len(points)} calls")
            break
        measure(workers, found.setdefault(point, [[], []]), *point, ROUNDS[1])
    suspected = [point for point, times in found.items() if ratio(times) > SLOWER]
    for _ in range(NEW_PROCESSES):
        workers = pair(base)
        for point in [each for each in suspected if ratio(found[each]) > SLOWER]:
            if time.monotonic() < until:
                measure(workers, found[point], *point, ROUNDS[1])
    slower = [p for p in suspected if ratio(found[p]) > SLOWER and settled(found[p])]
    faster = [p for p, times in found.items() if ratio(times) < 1 / SLOWER and settled(times)]
    rows = [
        [*point, *(f"{min(each):.4f}" for each in found[point]), f"{ratio(found[point]):.2f}"]
        for point in sorted((*slower, *faster), key=lambda point: -ratio(found[point]))
    ]
    header = ["call", "mode", f"{options.base}, ms", "working tree, ms", "ratio"]
    print(tabulated(header, rows, names=2))
    print(
        f"Slower by 5 %: {len(slower)} of {len(found)} calls; {len(suspected)} appeared to be at "
        f"first. Not settled, on a busy machine: {sum(not settled(x) for x in found.values())}"
    )
    sys.exit(bool(slower))


if __name__ == "__main__":
    work(Path(sys.argv[1]))
