"""Timing by turns, and what the times come to."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Step = Callable[[], None]
Quartiles = tuple[float, float, float]

# A batch of calls is long beside the timer's own cost, some 50 ns, and short beside a time slice.
BATCH_SECONDS = 1e-3
FEWEST_ROUNDS, MOST_ROUNDS = 19, 200
# What looks slow is measured again, for this many times longer.
LONGER = (1, 3, 9)


@dataclass(frozen=True)
class Peer:
    """How a peer did: milliseconds per call, beside pyfused's, and their ratio round by round."""

    ms: float
    pyfused_ms: float
    ratio: Quartiles


@dataclass(frozen=True)
class Row:
    """What one benchmark found. Times are medians."""

    case: str
    op: str
    mode: str
    headline: bool
    curve: str
    elements: int
    classes: int
    rounds: int
    calls_per_round: int
    peers: dict[str, Peer]
    peak_gradients: float | None = None  # memory beyond what was there, in gradients of the input


def settle_allocator() -> None:
    """Bring glibc's mmap threshold to where it ends up in any process that frees large tensors.

    It grows with each freed block, up to 32 MiB: else a case would depend on those before it.
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


def by_turns(clocks: Sequence[Callable[[], float]], rounds: int) -> list[list[float]]:
    """The times of each: one after the other in each round, and in the next from the other end."""
    times: list[list[float]] = [[] for _ in clocks]
    order = range(len(clocks))
    for turn in range(rounds):
        for index in order if turn % 2 else reversed(order):
            times[index].append(clocks[index]())
    return times


def plan(
    steps: Iterable[Any],
    seconds: float,
    fewest: int = FEWEST_ROUNDS,
    clock: Callable[[Any, int], float] = timed,
) -> tuple[int, int]:
    """How many rounds, and how many calls in each, fill the time."""
    once = []
    for step in steps:
        clock(step, 1)
        once.append(min(clock(step, 1) for _ in range(2)))
    calls = max(1, math.ceil(BATCH_SECONDS / max(once)))
    rounds = round(seconds / (calls * sum(once)))
    return min(max(rounds, fewest), MOST_ROUNDS), calls


def quartiles(values: Sequence[float]) -> Quartiles:
    low, median, high = statistics.quantiles(values, n=4)
    return low, median, high


def ninth_decile(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=10)[-1]


def ratios(theirs: Sequence[float], ours: Sequence[float]) -> Quartiles:
    """The quartiles of the ratios within a round: what slows the machine then slows both."""
    return quartiles([their / our for their, our in zip(theirs, ours, strict=True)])
