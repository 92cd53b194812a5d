"""Tests `make gpu-check` and its benchmarks without a GPU."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

import interpreter
import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import gpu_use  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402
from cases import BF16, Case  # noqa: E402


def test_steps_name_files_that_exist(tmp_path: Path) -> None:
    steps = {step.name: step for step in run.steps(tmp_path)}
    command = steps["shared tests"].command
    files = [x.relative_to(ROOT / "tests").as_posix() for x in command if isinstance(x, Path)]
    assert files == [*interpreter.SHARED]
    for step in steps.values():
        for word in map(str, step.command):
            assert not word.startswith(str(ROOT)) or Path(word.partition("::")[0]).exists()


@pytest.fixture
def rehearsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs the benchmarks on the CPU; their results have the same format as on a GPU."""
    for name, value in {"ROUNDS": 3, "CALLS": 2, "SMALL": 1000}.items():
        monkeypatch.setattr(gpu, name, value)
    peers = {"torch": torch.nn.functional, "torch.compile": torch.nn.functional}
    monkeypatch.setattr(gpu, "peers_of", lambda case: peers)
    file = tmp_path / "gpu.json"
    cases = (
        Case("cross_entropy", (64, 32_000), BF16, headline=True),
        Case("mse_loss", (5000,), headline=True),
        Case("relu", (100,)),
    )
    gpu.run(cases, "cpu", 60, file)
    return file


def test_the_report_has_the_form_of_a_cpu_report(rehearsed: Path, tmp_path: Path) -> None:
    found = json.loads(rehearsed.read_text())
    assert found["left_out"] == []
    rows = report.rows_of(found)
    assert [row.op for row in rows] == ["cross_entropy"] * 2 + ["mse_loss"] * 2 + ["relu"]
    assert all(("copy" in row.peers) == (row.elements >= 1000) for row in rows)
    report.write([rehearsed], tmp_path / "results")
    (folder,) = (tmp_path / "results").iterdir()
    assert {file.name for file in folder.iterdir()} == {"results.csv"}
    read = [report.row_of(cells) for cells in report.read_csv(folder / "results.csv")]
    assert [row.case for row in read] == [row.case for row in rows]


# ---- typical use ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["smoke", "kernels", "sizes", "host", "heads"])
def test_benchmarks_of_typical_use(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_use, "SIZES", (256, 4096))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    file = tmp_path / f"{name}.md"
    getattr(gpu_use, f"gpu_{name}")(Namespace(trial=True, seconds=60, file=file, k=[""]))
    head, _, columns, _, *rows = file.read_text().splitlines()
    assert torch.__version__ in head
    found = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert all(len(row) == columns.count("|") - 1 for row in found)
    ways = {name: ["mse_loss", "l1_loss"] for name in ("sizes", "host")}
    ways |= {"heads": ["three products", "torch"]}
    column = {"smoke": 1, "kernels": 1, "heads": 2}.get(name, 0)
    assert [row[column] for row in found][:2] == ways.get(name, ["correct", "correct"])
    ours = [row for row in found if "Liger" not in row]  # an installed Liger needs a GPU
    assert not any("Error" in cell for row in ours for cell in row)
