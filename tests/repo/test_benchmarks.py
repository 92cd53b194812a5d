"""Tests of the benchmarks: shapes of the sweep, comparisons, reports and GPUs."""

from __future__ import annotations

import random
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import interpreter
import pytest
import torch
from conftest import KernelCalls

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import cases
import gpu
import report
import revisions
import run
import steps
import sweep
from cases import BF16, TORCH, Case, assert_correct, draw

import pyfused.functional as fused

ROOT = Path(__file__).parents[2]


def test_wrong_results_are_not_timed() -> None:
    case = Case("relu", (100,))
    wrong = SimpleNamespace(relu=lambda input: TORCH.relu(input) * 1.01)
    assert_correct(case, draw(case), TORCH)
    with pytest.raises(AssertionError, match="not close"):
        assert_correct(case, draw(case), wrong)


# ---- the sweep -----------------------------------------------------------------------------------


@pytest.mark.thresholds
def test_a_sweep_times_torch_and_the_kernels(kernel_calls: KernelCalls) -> None:
    case = Case("elu", (1 << 22,))
    sweep.drawn_and_checked(case)
    theirs, ours = sweep.timers_of_both(case, cases.FORWARD)
    kernel_calls.clear()
    theirs(1)
    assert not kernel_calls
    ours(1)
    assert kernel_calls["elu"]


@pytest.mark.thresholds
def test_a_sweep_adds_the_smallest_calls_that_run_kernels() -> None:
    for case in sweep.edges("mse_loss", cases.F32):
        half = replace(case, shape=(case.shape[0] // 2,))
        backends = [sweep.backend_of(each, draw(each)) for each in (half, case)]
        assert backends == ["torch", "a kernel"]


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


def test_a_comparison_times_columns_and_rows_of_metrics() -> None:
    timed = [case for case, _ in revisions.calls().values()]
    transposed = {case.op for case in timed if case.layouts == revisions.TRANSPOSED}
    assert {"mse_loss", "cross_entropy", "softmax", "cross_entropy_with_metrics"} <= transposed
    assert (65_536, 10) in {case.shape for case in timed if case.op == "cross_entropy_with_metrics"}


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


def test_steps_are_written_into_a_folder_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New results are published by copying that folder."""
    monkeypatch.setattr(steps, "OUTPUT", tmp_path)
    monkeypatch.setattr(steps, "CASES", steps.CASES[:1])
    monkeypatch.setattr(steps, "compare", lambda *_: [])
    defaults = {"file": None, "only": "", "ways": None, "rounds": 1, "cpu": False, "seconds": 60}
    steps.steps(Namespace(**defaults))
    assert [*tmp_path.glob("*/steps.csv")]


# ---- make gpu-check, without a GPU ---------------------------------------------------------------


def test_steps_name_files_that_exist(tmp_path: Path) -> None:
    chosen = {step.name: step for step in run.steps(tmp_path)}
    command = chosen["shared tests"].command
    files = [x.relative_to(ROOT / "tests").as_posix() for x in command if isinstance(x, Path)]
    assert files == [*interpreter.SHARED]
    for step in chosen.values():
        for word in map(str, step.command):
            assert not word.startswith(str(ROOT)) or Path(word.partition("::")[0]).exists()


# ---- measurements on a GPU, which run on the CPU here --------------------------------------------


@pytest.fixture(autouse=True)
def few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"ROUNDS": 3, "FEW_ROUNDS": 3, "CALLS": 2, "SMALL": 1000, "SIZES": (256, 4096)}
    few |= {"HEADS": [(64, 16, 400)], "SIZED": ["mse_loss", "l1_loss"]}
    for name, value in few.items():
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def options(file: Path) -> Namespace:
    return Namespace(seconds=60, file=file, k=[""])


def test_the_report_has_the_form_of_a_cpu_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = (
        Case("cross_entropy", (64, 32_000), BF16, headline=True),
        Case("mse_loss", (5000,), headline=True),
        Case("relu", (100,)),
    )
    monkeypatch.setattr(gpu, "CASES", cases)
    monkeypatch.setattr(gpu, "peers_of", lambda case: {"torch": TORCH, "torch.compile": TORCH})
    gpu.report(options(tmp_path))
    (file,) = tmp_path.glob("*/results.csv")
    rows = [report.row_of(cells) for cells in report.read_csv(file)]
    assert [row.op for row in rows] == ["cross_entropy"] * 2 + ["mse_loss"] * 2 + ["relu"]
    assert all(("copy" in row.peers) == (row.elements >= 1000) for row in rows)


@pytest.mark.parametrize(
    ("name", "column", "first"),
    [("sizes", 0, ["mse_loss", "l1_loss"]), ("heads", 2, ["three products", "torch"])],
)
def test_typical_use(name: str, column: int, first: list[str], tmp_path: Path) -> None:
    file = tmp_path / f"{name}.md"
    gpu.MEASUREMENTS[name](options(file))
    head, _, columns, _, *rows = file.read_text().splitlines()
    assert torch.__version__ in head
    found = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert all(len(row) == columns.count("|") - 1 for row in found)
    assert [row[column] for row in found][:2] == first
    ours = [row for row in found if "Liger" not in row]  # an installed Liger needs a GPU
    assert not any("rror" in cell for row in ours for cell in row)
