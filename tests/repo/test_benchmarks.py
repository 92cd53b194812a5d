"""Benchmarks check results and time every operator; measurements on GPUs run, here on the CPU."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import interpreter
import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import gpu
import report
import revisions
import run
from cases import BF16, TORCH, Case, assert_correct, draw

import pyfused.functional as fused

ROOT = Path(__file__).parents[2]


def test_wrong_results_are_not_timed() -> None:
    case = Case("relu", (100,))
    wrong = SimpleNamespace(relu=lambda input: TORCH.relu(input) * 1.01)
    assert_correct(case, draw(case), TORCH)
    with pytest.raises(AssertionError, match="not close"):
        assert_correct(case, draw(case), wrong)


def test_a_comparison_times_every_operator() -> None:
    timed = {case.op for case, _ in revisions.calls().values()}
    left_out = {name for name in fused.__all__ if name.startswith("linear_")}
    assert {*fused.__all__} == timed | left_out


def test_steps_of_gpu_check_name_files_that_exist(tmp_path: Path) -> None:
    chosen = {step.name: step for step in run.steps(tmp_path)}
    command = chosen["shared tests"].command
    files = [x.relative_to(ROOT / "tests").as_posix() for x in command if isinstance(x, Path)]
    assert files == [*interpreter.SHARED]
    for step in chosen.values():
        for word in map(str, step.command):
            assert not word.startswith(str(ROOT)) or Path(word.partition("::")[0]).exists()


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
