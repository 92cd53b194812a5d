"""Times calls in turns, in this process or in several, and measures the memory of a process."""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

Step = Callable[[], object]
Timer = Callable[[int], float]  # makes a number of calls, and returns their time in seconds
Times = list[list[float]]
Quartiles = tuple[float, float, float]

# A batch of calls is long compared to the timer's cost (50 ns) and short compared to a time slice.
BATCH_SECONDS = 1e-3
MOST_ROUNDS = 200


def settle_allocator() -> None:
    """Raises glibc's mmap threshold to its maximum, 32 MiB.

    Freeing a block raises the threshold, so otherwise a case would depend on earlier cases.
    """
    for mib in (1, 4, 16, 31):
        torch.empty(mib << 20, dtype=torch.uint8).fill_(0)


def repeat(step: Step, calls: int) -> None:
    for _ in range(calls):
        step()


def timed(step: Step, calls: int) -> float:
    started = time.perf_counter()
    repeat(step, calls)
    return time.perf_counter() - started


def timers_of(steps: Sequence[Step]) -> list[Timer]:
    return [partial(timed, step) for step in steps]


def plan(timers: Sequence[Timer], seconds: float, fewest: int = 9) -> tuple[int, int]:
    """Returns the number of rounds that fit the time, and the number of calls per round."""
    once = []
    for timer in timers:
        timer(1)
        once.append(min(timer(1) for _ in range(2)))
    calls = max(1, math.ceil(BATCH_SECONDS / max(once)))
    rounds = round(seconds / (calls * sum(once)))
    return min(max(rounds, fewest), MOST_ROUNDS), calls


def interleaved(timers: Sequence[Timer], rounds: int, calls: int) -> Times:
    """Calls all timers in each round, in alternating order; returns milliseconds per call."""
    times: Times = [[] for _ in timers]
    order = range(len(timers))
    for turn in range(rounds):
        for index in order if turn % 2 else reversed(order):
            times[index].append(1e3 * timers[index](calls) / calls)
    return times


def ratios(theirs: Sequence[float], ours: Sequence[float]) -> Quartiles:
    """Returns the quartiles of the ratios per round; within a round, load affects both alike."""
    each = [their / our for their, our in zip(theirs, ours, strict=True)]
    low, median, high = statistics.quantiles(each, n=4)
    return low, median, high


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


def status(key: str) -> int:
    """Returns a size of this process in bytes: "VmRSS", or "VmHWM" for its peak."""
    match = re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert match
    return int(match[1]) << 10
