"""The benchmarks: `python benchmarks/run.py COMMAND`, and `COMMAND --help`.

This file imports neither torch nor pyfused, as `gpu-check` builds pyfused first.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
FOUND = ROOT / ".benchmarks"
# A command of this file, or the module and the name of another, which needs torch and pyfused.
Command = Callable[[argparse.Namespace], None] | str


# ---- the suite and its report --------------------------------------------------------------------


def suite(*arguments: str) -> list[Path]:
    """Run the benchmarks in torch's default setting and with huge pages, each in a process."""
    FOUND.mkdir(exist_ok=True)
    files = []
    for name, value in (("default", "0"), ("huge-pages", "1")):
        files.append(FOUND / f"{name}.json")
        pytest = [sys.executable, "-m", "pytest", HERE, "--benchmark-json", files[-1], *arguments]
        variables = {**os.environ, "THP_MEM_ALLOC_ENABLE": value}
        subprocess.run(pytest, env=variables, cwd=ROOT, check=True)
    return files


def report(options: argparse.Namespace) -> None:
    if options.json:
        importlib.import_module("report").write(options.json, options.results)
        return
    if options.threads:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)  # the processes below start with it
    files, allocators = suite(), FOUND / "allocators.json"
    subprocess.run([sys.executable, __file__, "allocators", "--json", allocators], check=True)
    pages = None if options.threads else ROOT
    importlib.import_module("report").write(files, options.results, allocators, pages)


def quick(options: argparse.Namespace) -> None:
    files = suite(*(["-k", options.k] if options.k else ["-m", "quick"]))
    importlib.import_module("report").write(files, FOUND)


def memory(options: argparse.Namespace) -> None:
    pytest = [sys.executable, "-m", "pytest", HERE / "test_memory.py", "-k", options.k]
    subprocess.run(pytest, cwd=ROOT, check=True)


# ---- gpu-check -----------------------------------------------------------------------------------

SECONDS = 570  # for all of it
BENCHMARK_SECONDS, LAUNCH_SECONDS, USE_SECONDS = 180, 100, 60  # no case starts after these


@dataclass(frozen=True)
class Step:
    name: str
    command: Sequence[str | Path]
    seconds: float  # at most
    needed: bool = False  # by all further steps


def without_gpu() -> str | None:
    """Returns why nothing can be checked here."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    return None if torch.cuda.is_available() else "torch sees no GPU"


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
    sys.path.append(str(ROOT / "tests"))
    from shared import SHARED

    python, run = sys.executable, (sys.executable, __file__)
    pip = (python, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation")
    plugins = ["-p", "no:cacheprovider", "-p", "no:randomly", "-p", "no:benchmark"]
    pytest = (python, "-m", "pytest", "-q", *plugins)
    # Most of a test's time is Triton's compiler.
    workers = ("-n", str(min(12, os.cpu_count() or 1)))
    parallel = (*pytest, *workers) if importlib.util.find_spec("xdist") else pytest
    shared = [ROOT / "tests" / name for name in SHARED]
    gpu = (*run, "gpu", out / "gpu.json", "--seconds", str(BENCHMARK_SECONDS))
    launch = (*run, "gpu-launch", out / "launch.md", "--seconds", str(LAUNCH_SECONDS))
    used = {
        name: (*run, f"gpu-{name}", out / f"{name}.md", "--seconds", str(USE_SECONDS))
        for name in ("sizes", "heads", "training")
    }
    variants = (*run, "gpu-variants", out / "variants.md", "--seconds", str(USE_SECONDS))
    written = (*run, "report", "--json", out / "gpu.json", "--results", out / "results")
    found = [
        Step("build", (*pip, "--upgrade", "--target", out / "site", ROOT), 150, needed=True),
        Step("gpu tests", (*parallel, ROOT / "tests/gpu/test_cuda.py"), 120),
        Step("sizes", used.pop("sizes"), USE_SECONDS + 30),
        Step("gpu-variants", variants, USE_SECONDS + 30),
        *(Step(name, command, USE_SECONDS + 30) for name, command in used.items()),
        Step("shared tests", (*parallel, *shared), 240),
        Step("benchmarks", gpu, BENCHMARK_SECONDS + 60),
        Step("report", written, 30),
        Step("launch choices", launch, LAUNCH_SECONDS + 40),
    ]
    if sanitizer := shutil.which("compute-sanitizer"):
        one = ROOT / "tests/gpu/test_cuda.py::test_every_kernel_runs"
        command = (sanitizer, "--error-exitcode", "9", *pytest, one)
        found.append(Step("compute-sanitizer", command, 90))
    return found


def run_step(step: Step, out: Path, seconds: float, variables: dict[str, str]) -> str:
    """Returns what became of a step; its output is in a log of its name."""
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
                cwd=out,  # in the checkout, Python would import the package that is not built
                check=False,
            ).returncode
            result = "passed" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            result = "out of time"
    return f"{result}, {time.perf_counter() - started:.0f} s, {log.name}"


def targets(found: dict[str, Any]) -> list[str]:
    """Returns the figures to reach, each with how many of its cases reach it."""
    rows = [benchmark["extra_info"] for benchmark in found["benchmarks"]]
    rows = [row for row in rows if row["mode"] == "forward+backward"]
    large = [row for row in rows if row["headline"]]
    cross_entropy = [row for row in large if row["op"] == "cross_entropy"]
    others = [row for row in large if row["op"] != "cross_entropy"]
    many = [row for row in cross_entropy if row["classes"] >= 32_000]
    lines = []
    for what, least, peer, chosen in (
        ("other operators, share of the copy's bandwidth", 0.9, "copy", others),
        ("cross_entropy, share of the copy's bandwidth", 0.85, "copy", cross_entropy),
        ("times as fast as torch.compile", 1.0, "torch.compile", rows),
        ("times as fast as Liger", 1.0, "liger", rows),
        ("times as fast as eager torch from 32000 classes on", 3.0, "torch", many),
    ):
        values = [row["peers"][peer]["ratio"][1] for row in chosen if peer in row["peers"]]
        good, worst = sum(value >= least for value in values), min(values, default=0.0)
        counted = f"{good} of {len(values)} cases reach {least}, the worst {worst:.2f}"
        lines.append(f"- {what}: {counted if values else 'not measured'}")
    # softmax and softcap return as much again.
    losses = [row for row in large if row["op"] not in ("softmax", "softcap")]
    peaks = [row["peak_gradients"] for row in losses if row["peak_gradients"] is not None]
    peak = f"{max(peaks):.2f} (to reach: 1)" if peaks else "not measured"
    lines.append(f"- peak memory beyond the inputs, in gradients: {peak}")
    return [*lines, *(f"- left out: {case}" for case in found["left_out"])]


def gpu_check(options: argparse.Namespace) -> None:
    """Build, test and time the Triton kernels on this machine's GPU, in under 10 minutes.

    Needs no network: torch, Triton, pytest, setuptools and a C++ compiler are there. All that is
    found lies in the folder, also when a step fails.
    """
    if reason := without_gpu():
        sys.exit(f"gpu-check needs a GPU: {reason}")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    until = time.perf_counter() + SECONDS
    variables = environment(out)
    results: list[str] = []
    chosen = [
        step for step in steps(out) if step.needed or step.name in (options.steps or [step.name])
    ]
    for step in chosen:
        left = until - time.perf_counter()
        result = run_step(step, out, left, variables) if left > 5 else "not run: out of time"
        results.append(f"- {step.name}: {result}")
        print(results[-1], flush=True)
        summary = ["# gpu-check", "", *results]
        if (out / "gpu.json").exists():
            found = json.loads((out / "gpu.json").read_text(encoding="utf-8"))
            summary += ["", "## To reach", "", *targets(found)]
        (out / "summary.md").write_text("\n".join(summary) + "\n", encoding="utf-8")
        if step.needed and not result.startswith("passed"):
            break
    print((out / "summary.md").read_text())
    sys.exit(not all(": passed" in result for result in results))


# ---- the command line ----------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    named, declared = (argparse.ArgumentParser(add_help=False) for _ in range(2))
    named.add_argument("-k", nargs="+", default=[""], help="names with one of these in them")
    declared.add_argument("--op", nargs="+", help="these operators alone")
    declared.add_argument("--dtype", nargs="+", help="these dtypes alone")

    def command(
        name: str, function: Command, words: str, *parents: argparse.ArgumentParser
    ) -> Callable[..., Any]:
        form = argparse.ArgumentDefaultsHelpFormatter
        made = commands.add_parser(
            name, help=words, description=words, parents=parents, formatter_class=form
        )
        made.set_defaults(function=function)
        return made.add_argument

    add = command("report", report, "time all cases, and write benchmarks/results")
    add("--json", type=Path, nargs="+", help="report these measurements instead")
    add("--results", type=Path, default=HERE / "results", help="the folder")
    add("--threads", type=int, help="how many; docs/ stays as it is then")
    add = command("quick", quick, "time the headline cases, and report in .benchmarks")
    add("-k", metavar="EXPRESSION", help="pytest's: these cases instead")
    add = command("memory", memory, "measure what torch and pyfused take at their peaks")
    add("-k", metavar="EXPRESSION", default="", help="pytest's: these cases alone")

    add = command("busy", "pairs.busy", "time the headline cases beside other work", named)
    add("--seconds", type=float, default=10, help="for a case")
    add = command("compare", "pairs.compare", "time a revision and the working tree", named)
    add("base", help="a git revision")
    add("--seconds", type=float, default=0.7, help="for a case and mode")
    add("--margin", type=float, default=0.95, help="a ratio below is slower")
    add("--busy", action="store_true", help="beside other work")
    add = command("allocators", "pairs.allocators", "time large cases by allocator", named)
    add("--seconds", type=float, default=12, help="for a case")
    add("--json", type=Path, help="where the report is to find it")
    words = "time programs under torch.compile, with torch's operators and with pyfused's"
    add = command("compiled", "pairs.compiled", words, named)
    add("--seconds", type=float, default=3, help="for a case and mode")
    words = "time what a call of 80 elements costs beyond torch's"
    add = command("overhead", "pairs.overhead", words, named)
    add("--rounds", type=int, default=101, help="of 200 calls each")

    words = "time formulas of one's own beside torch, compiled torch and kernels written by hand"
    add = command("formulas", "pairs.formulas", words, named)
    add("--seconds", type=float, default=2, help="for a formula and size")

    words = "time calls of random shapes; exits with 1 where one is slower than torch's"
    add = command("sweep", "sweep.sweep", words, declared)
    add("--threads", nargs="+", type=int, default=[1, 2], help="how many")
    add("--seconds", type=float, default=0.08, help="for a call")
    add("--margin", type=float, default=0.95, help="a ratio below is slower")
    add("--shapes", type=int, default=6, help="how many for an operator and a dtype")
    add("--minutes", type=float, default=20, help="at most")
    add("--seed", type=int, help="draw the shapes of another run again")
    add("--how", choices=("called", "patched", "compiled"), default="called", help="pyfused is")

    words = "time a language model's head and loss, and write docs/language-models.md"
    add = command("head", "head.head", words)
    add("--quick", action="store_true", help="the first case, and write nothing")
    words = "time training steps of the examples' GPT in float32 and under bfloat16 autocast"
    add = command("steps", "steps.steps", words)
    add("--rounds", type=int, default=9, help="of a step each")
    add("--cpu", action="store_true", help="CPU time of one thread, for a machine with other work")
    words = "measure what linear_cross_entropy's filter_eps gains and costs, on a trained model"
    add = command("filter-eps", "head.filter_eps", words)
    add("--steps", type=int, default=600, help="for how many to train")

    for name, module, words in (
        ("gpu", "gpu", "time the cases on a GPU"),
        ("gpu-launch", "gpu", "time launch choices"),
        ("gpu-variants", "gpu_variants", "time variants of kernels beside the shipped ones"),
        ("gpu-sizes", "gpu_use", "time calls of every size on a GPU"),
        ("gpu-heads", "gpu_use", "time a language model's head and loss on a GPU"),
        ("gpu-training", "gpu_use", "time a training step of GPT-2 on a GPU"),
    ):
        add = command(name, f"{module}.{name.replace('-', '_')}", words, named)
        add("file", type=Path, help="where to write what was found")
        add("--seconds", type=float, default=240, help="start no case after these")
        add("--trial", action="store_true", help="cases of microseconds, on the CPU")
    add = command("gpu-check", gpu_check, "build, test and time the kernels on a GPU")
    add("out", type=Path, help="the folder for what is found")
    add("--steps", nargs="+", metavar="NAME", help="these steps alone, after the build")
    return parser


def main() -> None:
    options = parser().parse_args()
    function = options.function
    if isinstance(function, str):
        module, name = function.split(".")
        function = getattr(importlib.import_module(module), name)
    function(options)


if __name__ == "__main__":
    main()
