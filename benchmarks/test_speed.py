"""Times pyfused and its peers, interleaved, after checking that their results agree.

With THP_MEM_ALLOC_ENABLE=1, the only peer is torch with huge pages, and with BENCHMARK_KEEP=1, all
of them run under ``pyfused.memory.keep()``; both in forward+backward.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from functools import lru_cache, partial
from itertools import product
from typing import Any

import cases
import pytest
import torch
from cases import CASES, MODES, TORCH, TRAINING, Arguments, Case, step
from pytest_benchmark.fixture import BenchmarkFixture
from report import peer, row
from timing import plan, repeat, timed, timers_of

import pyfused.functional

HUGE_PAGES = os.environ.get("THP_MEM_ALLOC_ENABLE") == "1"
KEEP = os.environ.get("BENCHMARK_KEEP") == "1"
COMPILED = cases.Compiled()
PEERS: dict[str, Any] = {"torch": TORCH, "torch.compile": COMPILED}
if HUGE_PAGES:
    PEERS = {"torch, THP": TORCH}
elif KEEP:
    PEERS = {"torch, keep": TORCH, "torch.compile, keep": COMPILED}
SECONDS = 1.5
# In a virtual machine, the host may also have to allocate memory when it is first touched.
WARM_UP = 5


@lru_cache(maxsize=1)
def checked(case: Case) -> Arguments:
    torch.compiler.reset()  # else operators would compile with dynamic shapes
    arguments = cases.draw(case)
    cases.assert_correct(case, arguments)
    return arguments


def parameters() -> list[object]:
    found = []
    for case, mode in product(CASES, MODES[1:] if HUGE_PAGES or KEEP else MODES):
        marks = [pytest.mark.quick] if case.headline and mode == TRAINING else []
        found.append(pytest.param(case, mode, id=f"{case.name} {mode}", marks=marks))
    return found


@pytest.mark.parametrize(("case", "mode"), parameters())
def test_speed(benchmark: BenchmarkFixture, case: Case, mode: str) -> None:
    arguments = checked(case)
    ours = step(pyfused.functional, case, arguments, mode)
    peers = {name: step(operators, case, arguments, mode) for name, operators in PEERS.items()}
    if case.traffic(mode) and not (HUGE_PAGES or KEEP):
        peers["copy"] = cases.copy_step(case, mode)
    rounds, calls = plan(timers_of([ours, *peers.values()]), SECONDS)
    times: dict[str, list[float]] = {name: [] for name in peers}
    beside: dict[str, list[float]] = {name: [] for name in peers}  # pyfused after each peer
    *others, last = peers

    def time_the_peers() -> None:
        """Times pyfused after each peer; after the last one, the benchmark itself does."""
        for name in others:
            times[name].append(timed(peers[name], calls))
            beside[name].append(timed(ours, calls))
        times[last].append(timed(peers[last], calls))

    benchmark.group = case.name
    benchmark.pedantic(
        partial(repeat, ours, calls),
        setup=time_the_peers,
        rounds=rounds,
        warmup_rounds=WARM_UP,
    )
    if benchmark.stats is None:  # --benchmark-disable
        return
    beside[last] = [0.0] * WARM_UP + benchmark.stats.stats.data
    compared = {
        name: peer(*([1e3 * t / calls for t in of[name][WARM_UP:]] for of in (times, beside)))
        for name in peers
    }
    benchmark.extra_info.update(asdict(row(case, mode, compared)))
