"""Tests of the benchmarks: training steps, shapes of the sweep, and reports."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import KernelCalls

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import cases
import report
import sweep
from cases import TORCH, Case, assert_correct, draw


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


# ---- reports -------------------------------------------------------------------------------------


def test_a_report_can_be_read(tmp_path: Path) -> None:
    peers = {"torch": report.Peer(2.0, 1.0, (1.5, 2.0, 2.5)), "copy": report.Peer(1, 2, (1, 1, 1))}
    rows = [report.row(Case("relu", (100,)), mode, peers, peak=1.25) for mode in cases.MODES]
    rows += [report.row(Case("mse_loss", (100,), headline=True), cases.TRAINING, {})]
    report.write_csv(tmp_path / "results.csv", [report.cells(row) for row in rows])
    assert [report.row_of(cells) for cells in report.read_csv(tmp_path / "results.csv")] == rows
