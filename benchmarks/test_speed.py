"""Time pyfused and its peers, call beside call, on arguments that give equal results."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache, partial

import pytest
import torch
from cases import (
    CASES,
    CURVES,
    MODES,
    PEERS,
    Arguments,
    Case,
    assert_right,
    draw,
    step,
)
from measure import Peer, Row, Step, plan, ratios, repeat, timed
from pytest_benchmark.fixture import BenchmarkFixture
from settings import AS_IT_COMES, KEEPS_PAGES

import pyfused.functional

SECONDS = {"": 1.5, "elements": 0.5, "classes": 0.5}
# In a virtual machine the host may have to find memory too, the first times that it is touched.
WARM_UP = 5


@lru_cache(maxsize=1)
def checked(case: Case) -> Arguments:
    torch.compiler.reset()  # or a compiled operator would become one for all shapes
    arguments = draw(case)
    assert_right(case, arguments)
    return arguments


def copying(arguments: Arguments) -> Step:
    """The memory's own speed: reads the input and writes as much, in memory that is warm."""
    source, destination = arguments.input.detach(), torch.empty_like(arguments.input)
    return lambda: destination.copy_(source)


def parameters() -> list[object]:
    """All where there is something to draw; else what README.md and the table show of a setting."""
    drawn = AS_IT_COMES or KEEPS_PAGES
    return [
        pytest.param(case, mode, id=f"{case.name} {mode}", marks=marks(case, mode))
        for case in (*CASES, *(CURVES if drawn else ()))
        for mode in MODES
        if mode == MODES[-1] or (drawn and not case.curve)
    ]


def marks(case: Case, mode: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.quick] if case.headline and mode == MODES[-1] else []


@pytest.mark.parametrize(("case", "mode"), parameters())
def test_speed(
    benchmark: BenchmarkFixture,
    record_property: Callable[[str, object], None],
    case: Case,
    mode: str,
) -> None:
    arguments = checked(case)
    ours = step(pyfused.functional, case, arguments, mode)
    peers = {
        name: step(operators, case, arguments, mode)
        for name, operators in PEERS.items()
        if not (case.curve and name == "torch.compile")
    }
    if KEEPS_PAGES:
        peers["copy"] = copying(arguments)
    times: dict[str, list[float]] = {name: [] for name in peers}
    beside: dict[str, list[float]] = {name: [] for name in peers}  # pyfused's, right after each
    rounds, calls = plan([ours, *peers.values()], SECONDS[case.curve])

    def time_the_peers() -> None:
        """Each is followed by pyfused: the last of them by the benchmark's own call."""
        *others, last = peers
        for name in others:
            times[name].append(timed(peers[name], calls))
            beside[name].append(timed(ours, calls))
        times[last].append(timed(peers[last], calls))

    benchmark.group = case.name
    benchmark.pedantic(
        partial(repeat, ours, calls), setup=time_the_peers, rounds=rounds, warmup_rounds=WARM_UP
    )
    if benchmark.stats is None:  # --benchmark-disable
        return
    beside[[*peers][-1]] = [0.0] * WARM_UP + benchmark.stats.stats.data
    if KEEPS_PAGES:  # a copy reads and writes the input's size once
        times["copy"] = [time * case.traffic(mode) / 2 for time in times["copy"]]
    row = Row(
        case=case.name,
        op=case.op,
        mode=mode,
        headline=case.headline,
        curve=case.curve,
        elements=case.elements,
        classes=case.shape[1] if case.op == "cross_entropy" else 1,
        rounds=rounds,
        calls_per_round=calls,
        peers={
            name: compared(times[name][WARM_UP:], beside[name][WARM_UP:], calls) for name in peers
        },
    )
    benchmark.extra_info.update(asdict(row))
    record_property("row", row)


def compared(theirs: list[float], ours: list[float], calls: int) -> Peer:
    ms, pyfused_ms = (1e3 * statistics.median(times) / calls for times in (theirs, ours))
    return Peer(ms, pyfused_ms, ratios(theirs, ours))
