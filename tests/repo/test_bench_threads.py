"""Tests the benchmark of threads with tiny cases."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import threads as benchmark

pytestmark = [pytest.mark.cpu, pytest.mark.thresholds]


def options(folder: Path, seconds: float) -> Namespace:
    return Namespace(results=folder, seconds=seconds, serial=False, trial=True)


def tables(text: str) -> list[list[list[str]]]:
    """Returns the rows of each table, without the line below its head."""
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    split = [[line.strip("| ").split(" | ") for line in block] for block in blocks]
    return [[head, *rows] for head, _, *rows in split]


def test_times_by_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "cores", lambda: 2)
    before = torch.get_num_threads()
    benchmark.threads(options(tmp_path, seconds=60))
    assert torch.get_num_threads() == before
    (folder,) = tmp_path.iterdir()
    assert {file.name for file in folder.iterdir()} == {
        *("threads.md", "threads.svg", "threads-dark.svg")
    }
    text = (folder / "threads.md").read_text("utf-8")
    assert torch.__version__ in text
    assert "NUMA" in text
    assert "Out of time: nothing." in text
    (head, *rows), (_, *shares) = tables(text)
    assert head[3:] == ["1 thread", *(f"{n} threads" for n in (2, 4, 8, 16))]
    assert {row[1] for row in rows} == {"defaults", "keep"}
    assert all(row[5:] == ["not measured"] * 3 for row in rows)
    ms = [float(cell) for row in rows if row[2].endswith(", ms") for cell in row[3:5]]
    assert len(ms) == 2 * 2 * (4 * 2 + 1)
    assert min(ms) > 0
    assert all(0 < float(row[4].rstrip("%")) <= 100 for row in shares)


def test_measurements_that_are_out_of_time_are_named() -> None:
    found = {("relu", "keep", 2): {"torch": [2.0, 2.0], "pyfused": [1.0, 1.0]}}
    (_, *rows), *_ = tables(benchmark.table(found, [1, 2], [1, 2, 4]))
    assert [row[3:] for row in rows] == [
        ["out of time", "2", "not measured"],
        ["out of time", "1", "not measured"],
        ["out of time", "2.00 (2.00 to 2.00)", "not measured"],
    ]
