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
from typing import Any

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

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def test_missing_requirements_are_reported_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["run.py", "gpu-check", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        run.main()
    assert ended.value.code == "gpu-check needs a GPU: torch sees no GPU"
    assert not (tmp_path / "out").exists()


@no_gpu
def test_make_passes_its_arguments(tmp_path: Path) -> None:
    made = subprocess.run(
        ["make", "gpu-check", f"OUT={tmp_path}", f"PYTHON={sys.executable}"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
    )
    assert made.returncode
    assert made.stderr.splitlines()[0] == "gpu-check needs a GPU: torch sees no GPU"


def test_steps_name_files_that_exist(tmp_path: Path) -> None:
    steps = run.steps(tmp_path)
    names = ["build", "smoke", "gpu tests", "sizes", "host time", "heads", "variants", "training"]
    names += ["shared tests", "benchmarks", "report", "launch choices"]
    assert [step.name for step in steps][: len(names)] == names
    command = steps[names.index("shared tests")].command
    assert [Path(word).name for word in command if "/tests/" in str(word)] == [*interpreter.SHARED]
    for step in steps:
        for word in map(str, step.command):
            if word.startswith(str(ROOT)):
                assert Path(word.partition("::")[0]).exists()


def test_steps_are_selected_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "without_gpu", lambda: None)
    monkeypatch.setattr(run, "environment", lambda _: {})
    monkeypatch.setattr(run, "run_step", lambda *_: "passed")
    monkeypatch.setattr(sys, "argv", ["run.py", "gpu-check", str(tmp_path), "--steps", "heads"])
    with pytest.raises(SystemExit) as ended:
        run.main()
    assert not ended.value.code
    done = [line for line in (tmp_path / "summary.md").read_text().splitlines() if "passed" in line]
    assert done == ["- build: passed", "- heads: passed"]


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
    results = {line.removeprefix("- ").split(": ")[0]: line.split(": ")[1] for line in lines}
    words = ["passed", "failed (1)", "passed", "not run"]
    assert [result.split(",")[0] for result in results.values()] == words
    steps[0] = run.Step("build", exits["smoke"], 60, needed=True)
    with pytest.raises(SystemExit):
        run.gpu_check(Namespace(out=tmp_path, steps=None, minutes=2))
    assert len((tmp_path / "summary.md").read_text().splitlines()) == 3


def test_a_step_names_the_packages_that_it_lacks(tmp_path: Path) -> None:
    step = run.Step("tests", (sys.executable, "-c", ""), 60, packages=("pytest", "no_such_package"))
    result = "not run: no_such_package missing; pip install no_such_package"
    assert run.run_step(step, tmp_path, 60, {}) == result
    page = (ROOT / "docs/gpu.md").read_text()
    assert all(package in page for package in run.TEST_PACKAGES)


def test_a_report_of_no_benchmark_says_so(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    gpu.run((Case("relu", (100,)),), "cpu", -1, file)
    with pytest.raises(SystemExit, match=r"no benchmark has succeeded: .*out of time"):
        report.write([file], tmp_path / "results")
    lines = run.targets(json.loads(file.read_text()))
    assert all("not measured" in line for line in lines[:-1])


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


def test_the_tests_for_a_gpu_are_skipped_without_one() -> None:
    command = [sys.executable, "-m", "pytest", "-q", ROOT / "tests/gpu/test_cuda.py"]
    if not torch.cuda.is_available():
        ran = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
        assert ran.returncode == 0, ran.stdout
        assert " skipped" in ran.stdout.splitlines()[-1]
        assert "passed" not in ran.stdout.splitlines()[-1]


@pytest.fixture
def rehearsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs the benchmarks on the CPU; their results have the same format as on a GPU."""
    monkeypatch.setattr(gpu, "ROUNDS", 3)
    monkeypatch.setattr(gpu, "CALLS", 2)
    monkeypatch.setattr(gpu, "SMALL", 1000)
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


def test_results_have_a_row_for_each_case_and_mode(rehearsed: Path) -> None:
    found = json.loads(rehearsed.read_text())
    assert found["left_out"] == []
    rows = report.rows_of(found)
    assert [(row.op, row.mode) for row in rows] == [
        ("cross_entropy", "forward"),
        ("cross_entropy", "forward+backward"),
        ("mse_loss", "forward"),
        ("mse_loss", "forward+backward"),
        ("relu", "forward+backward"),
    ]
    assert all(("copy" in row.peers) == (row.elements >= 1000) for row in rows)


def test_a_failing_case_is_omitted_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("not torch's value")

    monkeypatch.setattr(gpu.cases, "assert_correct", fail)
    file = tmp_path / "gpu.json"
    gpu.run((Case("relu", (100,)),), "cpu", 60, file)
    left_out = json.loads(file.read_text())["left_out"]
    assert left_out == ["relu (100) float32: AssertionError: not torch's value"]
    gpu.run((Case("relu", (100,)),), "cpu", -1, file)
    left_out = json.loads(file.read_text())["left_out"]
    assert left_out == ["relu (100) float32: TimeoutError: out of time"]


@pytest.mark.parametrize("drawn", [True, False], ids=["", "without matplotlib"])
def test_the_report_has_the_form_of_a_cpu_report(
    drawn: bool, rehearsed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not drawn:
        monkeypatch.setattr(report, "Figure", None)
    report.write([rehearsed], tmp_path / "results")
    (folder,) = (tmp_path / "results").iterdir()
    pictures = {"ratios.svg", "ratios-dark.svg"} if drawn else set()
    expected = {"table.md", "results.json"} | pictures
    assert {file.name for file in folder.iterdir()} == expected
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
    assert [line.split(" | ")[1].split(":")[0] for line in file.read_text().splitlines()[4:]] == [
        "AssertionError",
        "correct",
        *["correct"] * 3,
    ]


def test_a_failing_head_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(gpu_use, "LOSSES", ("cross-entropy",))
    wrong = lambda given: {"fails": fail, "wrong": lambda: given.products()}  # noqa: E731
    monkeypatch.setattr(gpu_use, "peers_of", wrong)
    file = tmp_path / "heads.md"
    gpu_use.gpu_heads(Namespace(trial=True, seconds=60, file=file))
    rows = [line.strip("| ").split(" | ")[2:4] for line in file.read_text().splitlines()[4:]]
    assert len(rows) == 8
    assert rows[-2] == ["fails", "RuntimeError: out of memory"]
    assert rows[-1][1].startswith("differs by ")


def test_failing_and_late_measurements_have_a_row(tmp_path: Path) -> None:
    options = Namespace(trial=True, seconds=60, file=tmp_path / "table.md")
    table = gpu.Table(options, "Words.", ["case", "time", "ratio"], names=1)
    table.add("one", lambda: [][0])
    table.until = 0
    table.add("two", list)
    *_, one, two = options.file.read_text().splitlines()
    assert one.startswith("| one | IndexError: list index out of range |")
    assert two.startswith("| two | TimeoutError: out of time |")


# ---- launch choices ------------------------------------------------------------------------------


class FakeClock:
    """Returns a time that depends on the launch choice: 1 ms, less with 64 threads."""

    def __init__(self) -> None:
        self.chosen: list[Any] = []

    def call(self, *_: Any) -> tuple[torch.Tensor, ...]:
        """An operator whose result is wrong with half the rows."""
        choose = sys.modules["pyfused.backends.triton"].choose
        self.chosen.append(choose(2, 1000, 4096))
        if self.chosen[-1].threads > 64:
            raise RuntimeError("out of resources")
        return (torch.tensor(self.chosen[-1].rows >= 2, dtype=torch.float32),)

    def timer(self, call: Any, **_: bool) -> Any:
        def seconds(calls: int) -> float:
            call()
            return 0.5 if self.chosen[-1].threads == 32 else 1.0

        return seconds


def test_neighbours_of_a_choice_are_timed_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from pyfused.backends import triton
    from pyfused.kernels import launch

    clock = FakeClock()
    monkeypatch.setattr(triton, "choose", lambda *_, **__: launch.Choice(2, 1024, 64))
    monkeypatch.setattr(launch, "warp_size", lambda: 32)
    monkeypatch.setattr(gpu.cases, "evaluate", clock.call)
    monkeypatch.setattr(gpu.cases, "assert_correct", lambda *_: None)
    monkeypatch.setattr(gpu, "step", lambda *_: clock.call)
    monkeypatch.setattr(gpu, "Clock", lambda device: clock)
    monkeypatch.setattr(gpu, "TINY", (Case("cross_entropy", (4096, 1000), BF16),))
    file = tmp_path / "launch.md"
    gpu.gpu_launch(Namespace(trial=True, seconds=60, k=[""], file=file))
    row = file.read_text().splitlines()[-1]
    assert row.split(" | ")[1:] == [
        "2 x 1024, 64",
        "1000",
        "AssertionError",  # half the rows
        "1.00",
        "1.00",  # two passes
        "",
        "0.50",  # half the threads
        "RuntimeError |",
    ]
    two_passes = launch.Choice(2, 512, 64, whole_row=False)
    assert two_passes in clock.chosen


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
