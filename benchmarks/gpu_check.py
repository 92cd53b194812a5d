"""Build, test and time the Triton kernels on this machine's GPU: `make gpu-check OUT=folder`.

Needs no network: torch, Triton, pytest, setuptools and a C++ compiler are there. All that was found
lies under the folder, also when a step fails: a log of each step, summary.md, from the benchmarks
gpu.json, a table and, where matplotlib is there, a picture, and launch.md, which compares launch
choices with their neighbours. Under 10 minutes in all.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))

from shared import SHARED  # noqa: E402

SECONDS = 590  # for all of it
BENCHMARK_SECONDS, LAUNCH_SECONDS = 180, 100  # no case starts after these


@dataclass(frozen=True)
class Step:
    name: str
    command: Sequence[str | Path]
    seconds: float  # at most
    needed: bool = False  # by all further steps


def without_gpu() -> str | None:
    """Why nothing can be checked here."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    return None


def environment(out: Path) -> dict[str, str]:
    """The package comes from `out`. pybind11's headers come with torch, where it is missing."""
    path = [out / "site"]
    if subprocess.run([sys.executable, "-c", "import pybind11"], capture_output=True).returncode:
        shim = out / "shim"
        shim.mkdir(exist_ok=True)
        code = "from torch.utils.cpp_extension import include_paths\n"
        code += "def get_include():\n    return include_paths()[0]\n"
        (shim / "pybind11.py").write_text(code)
        path.append(shim)
    before = os.environ.get("PYTHONPATH")
    joined = os.pathsep.join([*map(str, path), *([before] if before else [])])
    return {**os.environ, "PYTHONPATH": joined, "PYFUSED_TEST_DEVICE": "cuda"}


def steps(out: Path) -> list[Step]:
    python = sys.executable
    pip = ("-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation")
    pytest = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly")
    shared = [ROOT / "tests" / name for name in SHARED]
    found = [
        Step("build", (python, *pip, "--target", out / "site", ROOT), 150, needed=True),
        Step("gpu tests", (*pytest, ROOT / "tests/gpu/test_cuda.py"), 120),
        Step(
            "benchmarks",
            (
                python,
                ROOT / "benchmarks/gpu.py",
                out / "gpu.json",
                "--seconds",
                str(BENCHMARK_SECONDS),
            ),
            BENCHMARK_SECONDS + 60,
        ),
        Step(
            "report",
            (python, ROOT / "benchmarks/report.py", out / "gpu.json", "--results", out / "results"),
            30,
        ),
        Step(
            "launch choices",
            (
                python,
                ROOT / "benchmarks/gpu_launch.py",
                out / "launch.md",
                "--seconds",
                str(LAUNCH_SECONDS),
            ),
            LAUNCH_SECONDS + 40,
        ),
        Step("shared tests", (*pytest, *shared), 240),
    ]
    if sanitizer := shutil.which("compute-sanitizer"):
        one = ROOT / "tests/gpu/test_cuda.py::test_every_kernel_runs"
        found.append(
            Step("compute-sanitizer", (sanitizer, "--error-exitcode", "9", *pytest, one), 90)
        )
    return found


def run(step: Step, out: Path, seconds: float, variables: dict[str, str]) -> str:
    """What became of a step; its output is in a log of its name."""
    log = out / f"{step.name.replace(' ', '-')}.log"
    started = time.perf_counter()
    with log.open("w") as file:
        try:
            code = subprocess.run(
                list(map(str, step.command)),
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=min(step.seconds, seconds),
                env=variables,
                cwd=ROOT,
                check=False,
            ).returncode
            result = "passed" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            result = "out of time"
    return f"{result}, {time.perf_counter() - started:.0f} s, {log.name}"


def goals(file: Path) -> list[str]:
    """The figures to reach, each with how many of its cases reach it."""
    found = json.loads(file.read_text())
    rows = [benchmark["extra_info"] for benchmark in found["benchmarks"]]

    def reached(what: str, least: float, values: list[float]) -> str:
        if not values:
            return f"- {what}: not measured"
        good = sum(value >= least for value in values)
        reach = f"{good} of {len(values)} cases reach {least}"
        return f"- {what}: {reach}, the worst {min(values):.2f}"

    def ratio(peer: str, *names: str, mode: str = "forward+backward") -> list[float]:
        return [
            row["peers"][peer]["ratio"][1]
            for row in rows
            if peer in row["peers"] and row["mode"] == mode and row["case"].startswith(names)
        ]

    large = [r for r in rows if r["headline"] and r["mode"] == "forward+backward"]
    vocabularies = [
        r["peers"]["torch"]["ratio"][1]
        for r in large
        if any(f", {c})" in r["case"] for c in ("32000", "128256", "262144"))
    ]
    copy = {r["case"]: r["peers"]["copy"]["ratio"][1] for r in large if "copy" in r["peers"]}
    peaks = [r["peak_gradients"] for r in large if r["peak_gradients"] is not None]
    lines = [
        reached(
            "mse_loss and relu, share of the copy's bandwidth",
            0.9,
            [v for case, v in copy.items() if not case.startswith("cross_entropy")],
        ),
        reached(
            "cross_entropy, share of the copy's bandwidth",
            0.85,
            [v for case, v in copy.items() if case.startswith("cross_entropy")],
        ),
        reached("times as fast as torch.compile", 1.0, ratio("torch.compile", "")),
        reached("times as fast as Liger", 1.0, ratio("liger", "")),
        reached("times as fast as eager torch from 32000 classes on", 3.0, vocabularies),
        f"- peak memory beyond the inputs, in gradients: {max(peaks):.2f} (to reach: 1)"
        if peaks
        else "- peak memory: not measured",
    ]
    return [*lines, *(f"- left out: {case}" for case in found["left_out"])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the folder for what is found")
    arguments = parser.parse_args()
    if reason := without_gpu():
        sys.exit(f"gpu-check needs a GPU: {reason}")
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    until = time.perf_counter() + SECONDS
    variables = environment(out)
    results: list[str] = []
    for step in steps(out):
        left = until - time.perf_counter()
        result = run(step, out, left, variables) if left > 5 else "not run: out of time"
        results.append(f"- {step.name}: {result}")
        print(results[-1], flush=True)
        summary = ["# gpu-check", "", *results]
        if (out / "gpu.json").exists():
            summary += ["", "## To reach", "", *goals(out / "gpu.json")]
        (out / "summary.md").write_text("\n".join(summary) + "\n", encoding="utf-8")
        if step.needed and not result.startswith("passed"):
            break
    print((out / "summary.md").read_text())
    sys.exit(not all(": passed" in result for result in results))


if __name__ == "__main__":
    main()
