"""Tests `make gpu-check` and its benchmarks without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import interpreter
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import gpu_use  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402
import steps as training_steps  # noqa: E402
from cases import BF16, Case  # noqa: E402


def test_missing_requirements_are_reported_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["run.py", "gpu-check", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        run.main()
    assert ended.value.code == "gpu-check needs a GPU: torch sees no GPU"
    assert not (tmp_path / "out").exists()


def test_steps_name_files_that_exist(tmp_path: Path) -> None:
    steps = {step.name: step for step in run.steps(tmp_path)}
    command = steps["shared tests"].command
    files = [Path(word).name for word in command if str(word).startswith(f"{ROOT / 'tests'}")]
    assert files == [*interpreter.SHARED]
    for step in steps.values():
        for word in map(str, step.command):
            assert not word.startswith(str(ROOT)) or Path(word.partition("::")[0]).exists()


def test_a_failing_step_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = {"build": 0, "smoke": 1, "heads": 0, "late": 0}
    exits = {n: (sys.executable, "-c", f"raise SystemExit({code})") for n, code in codes.items()}
    steps = [run.Step(n, code, 60, needed=n == "build") for n, code in exits.items()]
    monkeypatch.setattr(run, "steps", lambda _: steps)
    monkeypatch.setattr(run, "without_gpu", lambda: None)
    monkeypatch.setattr(run, "environment", lambda _: {})
    readings = iter([0] * 10 + [60 * 2 - 4])  # the start, and three for each step that runs
    clock = SimpleNamespace(perf_counter=lambda: next(readings, 0))
    monkeypatch.setattr(run, "time", clock)
    with pytest.raises(SystemExit) as ended:
        run.gpu_check(Namespace(out=tmp_path, steps=None, minutes=2))
    assert ended.value.code
    lines = (tmp_path / "summary.md").read_text().splitlines()[2:]
    results = [line.split(": ")[1].split(",")[0] for line in lines]
    assert results == ["passed", "failed (1)", "passed", "not run"]


def test_failing_and_endless_steps_are_reported(tmp_path: Path) -> None:
    fail = run.Step("fail", (sys.executable, "-c", "print('why'); raise SystemExit(3)"), 60)
    child = f"import subprocess; subprocess.run(['{sys.executable}', '-c', 'while 1: print(1)'])"
    sleep = run.Step("sleep", (sys.executable, "-c", child), 1)
    assert run.run_step(fail, tmp_path, 60, {}).startswith("failed (3)")
    assert (tmp_path / "fail.log").read_text() == "why\n"
    assert run.run_step(sleep, tmp_path, 60, {}).startswith("out of time")
    size = (tmp_path / "sleep.log").stat().st_size
    time.sleep(0.1)
    assert (tmp_path / "sleep.log").stat().st_size == size  # its child has ended, too


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
    pictures = {"ratios.svg", "ratios-dark.svg"} if report.Figure else set()
    assert {file.name for file in folder.iterdir()} == {"table.md", "results.json"} | pictures
    table = (folder / "table.md").read_text()
    assert "share of a copy" in table
    assert "driver" in table


def test_targets_count_the_cases_that_reach_them(rehearsed: Path) -> None:
    found = json.loads(rehearsed.read_text())
    for benchmark in found["benchmarks"]:
        row = benchmark["extra_info"]
        row["peak_gradients"] = 1.0
        for name, peer in row["peers"].items():
            peer["ratio"] = [0.7, 0.8 if row["op"] == "mse_loss" else 1.2, 2.0]
            assert name in ("torch", "torch.compile", "copy")
    assert run.targets(found) == [
        "- other operators, share of the copy's bandwidth: 0 of 1 cases reach 0.9, the worst 0.80",
        "- cross_entropy, share of the copy's bandwidth: 1 of 1 cases reach 0.85, the worst 1.20",
        "- times as fast as torch.compile: 2 of 3 cases reach 1.0, the worst 0.80",
        "- times as fast as Liger: not measured",
        (
            "- times as fast as eager torch from 32000 classes on: "
            "0 of 1 cases reach 3.0, the worst 1.20"
        ),
        "- peak memory beyond the inputs, in gradients: 1.00 (to reach: 1)",
    ]


# ---- typical use ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["smoke", "sizes", "host", "heads"])
def test_benchmarks_of_typical_use(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_use, "SIZES", (256, 4096))
    monkeypatch.setattr(torch, "compile", lambda function: function)
    file = tmp_path / f"{name}.md"
    getattr(gpu_use, f"gpu_{name}")(Namespace(trial=True, seconds=60, file=file))
    head, _, columns, _, *rows = file.read_text().splitlines()
    assert torch.__version__ in head
    found = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert all(len(row) == columns.count("|") - 1 for row in found)
    ways = {name: ["mse_loss", "l1_loss"] for name in ("sizes", "host")}
    ways |= {"heads": ["three products", "torch"]}
    column = {"smoke": 1, "heads": 2}.get(name, 0)
    assert [row[column] for row in found][:2] == ways.get(name, ["correct", "correct"])
    ours = [row for row in found if "Liger" not in row]  # an installed Liger needs a GPU
    assert not any("Error" in cell for row in ours for cell in row)


def test_training_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each way trains like torch, or the command fails."""
    file = tmp_path / "steps.json"
    words = ["steps", str(file), "--trial", "--rounds", "2", "--cpu"]
    ways = ["convert", "linear_cross_entropy"]
    options = run.parser().parse_args([*words, "--ways", *ways])
    training_steps.steps(options)
    text = training_steps.table(json.loads(file.read_text("utf-8")))
    assert text in capsys.readouterr().out
    rows = [line for line in text.splitlines() if line.startswith(("| GPT ", "| U-Net "))]
    assert [row.count("n/a") for row in rows] == [0, 1, 0, 1]  # a U-Net has no linear head


def test_a_wrong_kernel_fails_the_smoke_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_use.fused, "mse_loss", torch.nn.functional.l1_loss)
    file = tmp_path / "smoke.md"
    with pytest.raises(SystemExit):
        gpu_use.gpu_smoke(Namespace(trial=True, seconds=60, file=file))
    found = [line.split(" | ")[1].split(":")[0] for line in file.read_text().splitlines()[4:]]
    assert found == ["AssertionError", *["correct"] * 4]


# ---- launch choices ------------------------------------------------------------------------------


def interpreted(command: str, file: Path) -> list[str]:
    """Returns the lines of a table that was measured in the interpreter."""
    pytest.importorskip("triton")
    subprocess.run(
        [sys.executable, ROOT / "benchmarks/run.py", command, file, "--trial"],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYFUSED_BACKEND": "triton"},
        check=True,
        capture_output=True,
    )
    return file.read_text().splitlines()


def test_launch_choices_in_the_interpreter(tmp_path: Path) -> None:
    rows = interpreted("gpu-launch", tmp_path / "launch.md")[-2:]
    assert [row.split(" (")[0] for row in rows] == ["| cross_entropy", "| mse_loss"]
    assert "Error" not in "".join(rows)


def test_variants_in_the_interpreter(tmp_path: Path) -> None:
    rows = interpreted("gpu-variants", tmp_path / "variants.md")[4:]
    assert len(rows) == 4 + 7 + 1 + 4 + 4
    assert "Error" not in "".join(rows)
