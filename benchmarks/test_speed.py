"""Time pyfused and its peers, call beside call, on arguments that give equal results."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache, partial

import pytest
from cases import CASES, MODES, PEERS, Arguments, Case, assert_right, draw, step
from measure import Peer, Row, plan, ratios, repeat, timed
from pytest_benchmark.fixture import BenchmarkFixture

import pyfused.functional

SECONDS = 1.5
# In a virtual machine the host may have to find memory too, the first times that it is touched.
WARM_UP = 5


@lru_cache(maxsize=1)
def checked(case: Case) -> Arguments:
    arguments = draw(case)
    assert_right(case, arguments)
    return arguments


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=c.name, marks=[pytest.mark.quick] if c.headline else []) for c in CASES],
)
def test_speed(
    benchmark: BenchmarkFixture,
    record_property: Callable[[str, object], None],
    case: Case,
    mode: str,
) -> None:
    arguments = checked(case)
    ours = step(pyfused.functional, case, arguments, mode)
    peers = {name: step(operators, case, arguments, mode) for name, operators in PEERS.items()}
    times: dict[str, list[float]] = {name: [] for name in peers}
    rounds, calls = plan([ours, *peers.values()], SECONDS)

    def time_the_peers() -> None:
        for name, peer in peers.items():
            arguments.input.grad = None
            times[name].append(timed(peer, calls))
        arguments.input.grad = None

    benchmark.group = case.name
    benchmark.pedantic(
        partial(repeat, ours, calls), setup=time_the_peers, rounds=rounds, warmup_rounds=WARM_UP
    )
    if benchmark.stats is None:  # --benchmark-disable
        return
    pyfused_times = benchmark.stats.stats.data
    times = {name: all_[WARM_UP:] for name, all_ in times.items()}
    ms = {name: 1e3 * statistics.median(all_) / calls for name, all_ in times.items()}
    row = Row(
        case=case.name,
        mode=mode,
        headline=case.headline,
        rounds=rounds,
        calls_per_round=calls,
        pyfused_ms=1e3 * statistics.median(pyfused_times) / calls,
        peers={name: Peer(ms[name], ratios(times[name], pyfused_times)) for name in peers},
    )
    benchmark.extra_info.update(asdict(row))
    record_property("row", row)
