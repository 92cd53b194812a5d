"""Tests of the benchmarks: shapes of the sweep, comparisons, and reports."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import KernelCalls

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import cases
import report
import revisions
import sweep
from cases import TORCH, Case, assert_correct, draw

import pyfused.functional as fused


def test_wrong_results_are_not_timed() -> None:
    case = Case("relu", (100,))
    wrong = SimpleNamespace(relu=lambda input: TORCH.relu(input) * 1.01)
    assert_correct(case, draw(case), TORCH)
    with pytest.raises(AssertionError, match="not close"):
        assert_correct(case, draw(case), wrong)


# ---- the sweep -----------------------------------------------------------------------------------


@pytest.mark.thresholds
@pytest.mark.parametrize("how", [sweep.CALLED, sweep.PATCHED])
def test_a_sweep_times_torch_and_the_kernels(how: str, kernel_calls: KernelCalls) -> None:
    case = Case("elu", (1 << 22,))
    sweep.drawn_and_checked(case)
    theirs, ours = sweep.timers_of_both(case, cases.FORWARD, how)
    kernel_calls.clear()
    theirs(1)
    assert not kernel_calls
    ours(1)
    assert kernel_calls["elu"]


def test_a_sweep_draws_long_dimensions() -> None:
    draw = random.Random(0)
    for op in ("softmax", "cross_entropy"):
        drawn = [*sweep.long_dimensions(op, cases.F32, 200, draw)]
        assert {case.dim for case in drawn} == ({0, 1} if op == "softmax" else {-1})
        assert all(case.elements < 1.1 * sweep.LARGEST for case in drawn)
        rows = [case for case in drawn if case.shape[-1] >= 100_000]
        assert {case.layouts[0] for case in rows} == {"", "transposed"}
        assert {case.padded for case in drawn} == {True, False}


# ---- comparisons -------------------------------------------------------------------------------


def test_a_comparison_times_every_operator() -> None:
    timed = {case.op for case, _ in revisions.calls().values()}
    left_out = {name for name in fused.__all__ if name.startswith("linear_")}
    assert {*fused.__all__} == timed | left_out


@pytest.mark.parametrize(("slow", "result"), [(1.0, False), (1.1, True)])
def test_a_slower_call_is_named(slow: float, result: bool) -> None:
    old = [3.0, 1.0, 1.5, 1.02]
    low, high = revisions.ratios((old, [slow * ms for ms in old]))
    assert (low > revisions.SLOWER) == (high > revisions.CLEAR) == result


# ---- reports -------------------------------------------------------------------------------------


def test_a_report_can_be_read(tmp_path: Path) -> None:
    peers = {"torch": report.Peer(2.0, 1.0, (1.5, 2.0, 2.5)), "copy": report.Peer(1, 2, (1, 1, 1))}
    rows = [report.row(Case("relu", (100,)), mode, peers, peak=1.25) for mode in cases.MODES]
    rows += [report.row(Case("mse_loss", (100,), headline=True), cases.TRAINING, {})]
    report.write_csv(tmp_path / "results.csv", [report.cells(row) for row in rows])
    assert [report.row_of(cells) for cells in report.read_csv(tmp_path / "results.csv")] == rows
