"""Runs the benchmarks: `python benchmarks/run.py COMMAND`; see `COMMAND --help`.

This file does not import torch or pyfused, because `gpu-check` builds pyfused first.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
OUTPUT = ROOT / ".benchmarks"
# A function of this file, or the "module.name" of a function that needs torch and pyfused.
Command = Callable[[argparse.Namespace], None] | str


# ---- the suite and its report --------------------------------------------------------------------


def suite(*arguments: str) -> list[Path]:
    """Runs the benchmarks with torch's default, with huge pages, and with `memory.keep`."""
    OUTPUT.mkdir(exist_ok=True)
    files = []
    default = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
    huge_pages = default | {"THP_MEM_ALLOC_ENABLE": "1"}
    keep = default | {"BENCHMARK_KEEP": "1"}
    for name, variables in (("default", default), ("huge-pages", huge_pages), ("keep", keep)):
        files.append(OUTPUT / f"{name}.json")
        pytest = [sys.executable, "-m", "pytest", HERE, "--benchmark-json", files[-1], *arguments]
        subprocess.run(pytest, env=variables, cwd=ROOT, check=True)
    return files


def report(options: argparse.Namespace) -> None:
    if options.json:
        importlib.import_module("report").write(options.json, options.results)
        return
    if options.threads:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)  # inherited by the processes below
    files, allocators = suite(), OUTPUT / "allocators.json"
    subprocess.run([sys.executable, __file__, "allocators", "--json", allocators], check=True)
    importlib.import_module("report").write(files, options.results, allocators)


def quick(options: argparse.Namespace) -> None:
    files = suite(*(["-k", options.k] if options.k else ["-m", "quick"]))
    importlib.import_module("report").write(files, OUTPUT)


def memory(options: argparse.Namespace) -> None:
    pytest = [sys.executable, "-m", "pytest", HERE / "test_memory.py", "-k", options.k]
    subprocess.run(pytest, cwd=ROOT, check=True)


# ---- gpu-check -----------------------------------------------------------------------------------

MINUTES = 9.5  # the default time limit of gpu-check
TEST_PACKAGES = ("hypothesis", "mpmath", "numpy", "pytest")


@dataclass(frozen=True)
class Step:
    name: str
    command: Sequence[str | Path]
    seconds: float  # the time limit
    needed: bool = False  # whether a failure ends the run
    packages: Sequence[str] = ()  # required by the step


def without_gpu() -> str | None:
    """Returns why the GPU kernels cannot be tested on this machine, or None."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    return None if torch.cuda.is_available() else "torch sees no GPU"


def environment(out: Path, site: Path) -> dict[str, str]:
    """Returns variables to import the package in `site`, and torch's pybind11 if it is missing."""
    path = [site]
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


def steps(out: Path, built: bool = False) -> list[Step]:
    """Returns the steps, the most valuable first, because the time limit may skip later ones.

    Args:
        built: Whether the package has been built.
    """
    sys.path.append(str(ROOT / "tests"))
    from shared import SHARED

    python, run = sys.executable, (sys.executable, __file__)
    pip = (python, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation")
    plugins = ["-p", "no:cacheprovider", "-p", "no:randomly", "-p", "no:benchmark"]
    pytest = (python, "-m", "pytest", "-q", *plugins)
    # Triton's compiler takes most of a test's time.
    workers = ("-n", str(min(12, os.cpu_count() or 1)))
    parallel = (*pytest, *workers) if importlib.util.find_spec("xdist") else pytest
    files = [ROOT / "tests" / name for name in SHARED]
    shared = ("--maxfail=60", "--tb=short", *files)  # a step out of time reports no failure

    def measured(name: str, command: str, file: str, seconds: int) -> Step:
        """Returns a step that starts no new case after some time, and gets 30 seconds more."""
        return Step(name, (*run, command, out / file, "--seconds", str(seconds)), seconds + 30)

    written = (*run, "report", "--json", out / "gpu.json", "--results", out / "results")
    build = Step("build", (*pip, "--upgrade", "--target", out / "site", ROOT), 150, needed=True)
    training = "--only", "GPT-2 small bfloat16"
    chosen = [
        *([] if built else [build]),
        measured("smoke", "gpu-smoke", "smoke.md", 60),
        Step("gpu tests", (*parallel, ROOT / "tests/gpu/test_cuda.py"), 120, False, TEST_PACKAGES),
        measured("kernels", "gpu-kernels", "kernels.md", 60),
        measured("heads", "gpu-heads", "heads.md", 60),
        Step("training", (*run, "steps", out / "steps.csv", *training), 150),
        measured("sizes", "gpu-sizes", "sizes.md", 45),
        measured("host time", "gpu-host", "host.md", 20),
        Step("shared tests", (*parallel, *shared), 240, False, TEST_PACKAGES),
        measured("benchmarks", "gpu", "gpu.json", 180),
        Step("report", written, 30),
        measured("launch choices", "gpu-launch", "launch.md", 100),
    ]
    if sanitizer := shutil.which("compute-sanitizer"):
        one = ROOT / "tests/gpu/test_cuda.py::test_every_kernel_runs"
        command = (sanitizer, "--error-exitcode", "9", *pytest, one)
        chosen.append(Step("compute-sanitizer", command, 90, False, TEST_PACKAGES))
    return chosen


def run_step(step: Step, out: Path, seconds: float, variables: dict[str, str]) -> str:
    """Runs a step; returns its outcome. Its output is written to a log file with its name."""
    if missing := [name for name in step.packages if not importlib.util.find_spec(name)]:
        return f"not run: {', '.join(missing)} missing; pip install {' '.join(missing)}"
    if seconds < 5:
        return "not run: out of time"
    log = out / f"{step.name.replace(' ', '-')}.log"
    started = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(
            list(map(str, step.command)),
            stdout=file,
            stderr=subprocess.STDOUT,
            env=variables,
            cwd=out,  # the package in the checkout has no compiled modules
            start_new_session=True,
        )
        try:
            code = process.wait(min(step.seconds, seconds))
            result = "passed" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with pytest's workers, which use the GPU
            process.wait()
            result = "out of time"
    return f"{result}, {time.perf_counter() - started:.0f} s, {log.name}"


def targets(results: dict[str, Any]) -> list[str]:
    """Returns the performance targets, each with the number of cases that reach it."""
    rows = [benchmark["extra_info"] for benchmark in results["benchmarks"]]
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
    # softmax and softcap also return a tensor of the input's size.
    losses = [row for row in large if row["op"] not in ("softmax", "softcap")]
    peaks = [row["peak_gradients"] for row in losses if row["peak_gradients"] is not None]
    peak = f"{max(peaks):.2f} (target: 1)" if peaks else "not measured"
    lines.append(f"- peak memory beyond the inputs, in gradients: {peak}")
    return [*lines, *(f"- left out: {case}" for case in results["left_out"])]


def gpu_check(options: argparse.Namespace) -> None:
    """Builds, tests and times the Triton kernels on this machine's GPU.

    Needs torch, Triton, setuptools, a C++ compiler, and for tests TEST_PACKAGES, but no network.
    Each step writes its results when it ends. If a step other than the build fails, the others run.
    """
    if reason := without_gpu():
        sys.exit(f"gpu-check needs a GPU: {reason}")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    until = time.perf_counter() + 60 * options.minutes
    variables = environment(out, (options.site or out / "site").resolve())
    results: list[str] = []
    chosen = [
        step
        for step in steps(out, options.site is not None)
        if step.needed or step.name in (options.steps or [step.name])
    ]
    for step in chosen:
        result = run_step(step, out, until - time.perf_counter(), variables)
        results.append(f"- {step.name}: {result}")
        print(results[-1], flush=True)
        summary = ["# gpu-check", "", *results]
        if (out / "gpu.json").exists():
            measured = json.loads((out / "gpu.json").read_text(encoding="utf-8"))
            summary += ["", "## Targets", "", *targets(measured)]
        (out / "summary.md").write_text("\n".join(summary) + "\n", encoding="utf-8")
        if step.needed and not result.startswith("passed"):
            break
    print((out / "summary.md").read_text())
    sys.exit(not all(": passed" in result for result in results))


# ---- the command line ----------------------------------------------------------------------------


class Commands:
    """The commands, whose functions are called with the parsed options."""

    def __init__(self) -> None:
        self.parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
        self.commands = self.parser.add_subparsers(metavar="COMMAND", required=True)
        self.named, self.declared = (argparse.ArgumentParser(add_help=False) for _ in range(2))
        self.named.add_argument("-k", nargs="+", default=[""], help="select by parts of names")
        self.declared.add_argument("--op", nargs="+", help="select operators")
        self.declared.add_argument("--dtype", nargs="+", help="select dtypes")
        self.add_suite()
        self.add_comparisons()
        self.add_models()
        self.add_gpu()

    def command(
        self, name: str, function: Command, words: str, *parents: argparse.ArgumentParser
    ) -> Callable[..., Any]:
        """Adds a command, and returns the function that adds an argument to it."""
        form = argparse.ArgumentDefaultsHelpFormatter
        made = self.commands.add_parser(
            name, help=words, description=words, parents=parents, formatter_class=form
        )
        made.set_defaults(function=function)
        return made.add_argument

    def add_suite(self) -> None:
        add = self.command("report", report, "time all cases, and write benchmarks/results")
        add("--json", type=Path, nargs="+", help="report these results instead of measuring")
        add("--results", type=Path, default=HERE / "results", help="the output folder")
        add("--threads", type=int, help="the number of threads")
        add = self.command("quick", quick, "time the headline cases, and report in .benchmarks")
        add("-k", metavar="EXPRESSION", help="select other cases, as in pytest")
        add = self.command("memory", memory, "measure the peak memory of torch and pyfused")
        add("-k", metavar="EXPRESSION", default="", help="select cases, as in pytest")

    def add_comparisons(self) -> None:
        named, command = self.named, self.command
        add = command("busy", "pairs.busy", "time the headline cases under load", named)
        add("--seconds", type=float, default=10, help="time per case")
        words = "compare the kernels of a revision and of the working tree"
        add = command("compare", "revisions.compare", words, named)
        add("base", help="a git revision, or a folder with its build")
        add("--all", action="store_true", help="time and list all calls, to see which are faster")
        add("--minutes", type=float, default=5, help="the time limit, without the build")
        words = "time large cases with each allocator setting"
        add = command("allocators", "pairs.allocators", words, named)
        add("--seconds", type=float, default=12, help="time per case")
        add("--json", type=Path, help="also write the results to this file, for the report")
        add("--all", action="store_true", help="all operators, not one of each family")
        words = "measure the overhead of calls on 80 elements, compared with torch"
        add = command("overhead", "pairs.overhead", words, named)
        add("--rounds", type=int, default=101, help="rounds of 200 calls")
        words = "compare users' formulas with eager and compiled torch, and hand-written kernels"
        add = command("formulas", "pairs.formulas", words, named)
        add("--seconds", type=float, default=2, help="time per formula and size")
        words = "time calls of random shapes; exit with 1 if any is slower than in torch"
        add = command("sweep", "sweep.sweep", words, self.declared)
        add("--threads", nargs="+", type=int, default=[1, 2], help="the numbers of threads")
        add("--seconds", type=float, default=0.08, help="time per call")
        add("--margin", type=float, default=0.95, help="smaller ratios count as slower")
        add("--shapes", type=int, default=6, help="shapes per operator and dtype")
        add("--minutes", type=float, default=20, help="the time limit")
        add("--layouts", action="store_true", help="slices, transposed and other strided tensors")
        add("--seed", type=int, help="the seed of another run, to repeat its shapes")
        ways = ("called", "patched")
        add("--how", choices=ways, default="called", help="how calls are made")

    def add_models(self) -> None:
        command = self.command
        words = "time a language model's head and loss, and write heads.md in benchmarks/results/"
        add = command("head", "head.head", words)
        add("--quick", action="store_true", help="time only the first case, and write no file")
        words = "time training steps of several models: torch, compiled, and with pyfused"
        add = command("steps", "steps.steps", words)
        add("file", type=Path, nargs="?", help="the output file; by default in benchmarks/results/")
        add("--rounds", type=int, default=5, help="steps per model and way")
        add("--cpu", action="store_true", help="measure CPU time on one thread, for a busy machine")
        add("--only", default="", help="models whose name contains this; writes no file")
        add("--ways", nargs="+", help="only these ways; writes no file")
        add("--seconds", type=float, default=3600, help="start no new model after this time")
        add("--trial", action="store_true", help="run tiny models, to test the command")
        words = "time calls and steps with 1, 2, 4, ... threads, and write threads.md (3 minutes)"
        add = command("threads", "threads.threads", words)
        add("--results", type=Path, default=HERE / "results", help="the folder of the machines")
        add("--seconds", type=float, default=165, help="start no new measurement after this time")
        add("--serial", action="store_true", help="only print the time outside of parallel regions")
        add("--trial", action="store_true", help="run tiny cases, to test the command")

    def add_gpu(self) -> None:
        for name, module, words in (
            ("gpu", "gpu", "time the cases on a GPU"),
            ("gpu-launch", "gpu", "time the chosen block sizes and warps, and their neighbours"),
            ("gpu-smoke", "gpu_use", "run one kernel of each family, and compare it with torch"),
            ("gpu-kernels", "gpu_use", "measure time, memory and launches of calls on a GPU"),
            ("gpu-sizes", "gpu_use", "time calls of all sizes on a GPU"),
            ("gpu-host", "gpu_use", "measure the host time of calls on a GPU"),
            ("gpu-heads", "gpu_use", "time a language model's head and loss on a GPU"),
        ):
            function = f"{module}.{name.replace('-', '_')}"
            add = self.command(name, function, words, self.named)
            add("file", type=Path, help="the output file")
            add("--seconds", type=float, default=240, help="start no new case after this time")
            add("--trial", action="store_true", help="run tiny cases on the CPU, as a test")
        add = self.command("gpu-check", gpu_check, "build, test and time the kernels on a GPU")
        add("out", type=Path, help="the output folder")
        add("--site", type=Path, help="a folder with the built package; nothing is built")
        add("--steps", nargs="+", metavar="NAME", help="run only these steps after the build")
        add("--minutes", type=float, default=MINUTES, help="the time limit")


def main() -> None:
    options = Commands().parser.parse_args()
    function = options.function
    if isinstance(function, str):
        module, name = function.split(".")
        function = getattr(importlib.import_module(module), name)
    function(options)


if __name__ == "__main__":
    main()
