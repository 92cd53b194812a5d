"""The benchmarks time correct results of all operators, and run without a GPU."""

from __future__ import annotations

import sys
from argparse import Namespace
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


def test_a_comparison_times_every_operator() -> None:
    timed = {case.op for case, _ in revisions.calls().values()}
    left_out = {name for name in fused.__all__ if name.startswith("linear_")}
    assert {*fused.__all__} == timed | left_out


def test_a_report_can_be_read(tmp_path: Path) -> None:
    peers = {"torch": report.Peer(2.0, 1.0, (1.5, 2.0, 2.5)), "copy": report.Peer(1, 2, (1, 1, 1))}
    rows = [report.row(Case("relu", (100,)), mode, peers, peak=1.25) for mode in cases.MODES]
    rows += [report.row(Case("mse_loss", (100,), headline=True), cases.TRAINING, {})]
    report.write_csv(tmp_path / "results.csv", [report.cells(row) for row in rows])
    assert [report.row_of(cells) for cells in report.read_csv(tmp_path / "results.csv")] == rows


def test_steps_name_files_that_exist(tmp_path: Path) -> None:
    steps = {step.name: step for step in run.steps(tmp_path)}
    command = steps["shared tests"].command
    files = [x.relative_to(ROOT / "tests").as_posix() for x in command if isinstance(x, Path)]
    assert files == [*interpreter.SHARED]
    for step in steps.values():
        for word in map(str, step.command):
            assert not word.startswith(str(ROOT)) or Path(word.partition("::")[0]).exists()


# ---- measurements on a GPU, which run on the CPU here --------------------------------------------


@pytest.fixture(autouse=True)
def few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ROUNDS": 3, "CALLS": 2, "SMALL": 1000, "SIZES": (256, 4096)}.items():
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def options(file: Path) -> Namespace:
    return Namespace(trial=True, seconds=60, file=file, k=[""])


def test_the_report_has_the_form_of_a_cpu_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = (
        Case("cross_entropy", (64, 32_000), BF16, headline=True),
        Case("mse_loss", (5000,), headline=True),
        Case("relu", (100,)),
    )
    monkeypatch.setattr(gpu, "TINY", cases)
    monkeypatch.setattr(gpu, "peers_of", lambda case: {"torch": TORCH, "torch.compile": TORCH})
    gpu.report(options(tmp_path))
    (file,) = tmp_path.glob("*/results.csv")
    rows = [report.row_of(cells) for cells in report.read_csv(file)]
    assert [row.op for row in rows] == ["cross_entropy"] * 2 + ["mse_loss"] * 2 + ["relu"]
    assert all(("copy" in row.peers) == (row.elements >= 1000) for row in rows)


@pytest.mark.parametrize("name", ["smoke", "kernels", "sizes", "host", "heads"])
def test_typical_use(name: str, tmp_path: Path) -> None:
    gpu.MEASUREMENTS[name](options(file := tmp_path / f"{name}.md"))
    head, _, columns, _, *rows = file.read_text().splitlines()
    assert torch.__version__ in head
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert {len(row) for row in cells} == {columns.count("|") - 1}
    column = {"smoke": 1, "kernels": 1, "heads": 2}.get(name, 0)
    first = {"sizes": ["mse_loss", "l1_loss"], "heads": ["three products", "torch"]}
    first["host"] = first["sizes"]
    assert [row[column] for row in cells][:2] == first.get(name, ["correct", "correct"])
    # An installed Liger needs a GPU.
    assert not any("Error" in cell for row in cells if "Liger" not in row for cell in row)
