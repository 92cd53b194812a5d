"""Runs the benchmarks: `python benchmarks/run.py COMMAND`; see `COMMAND --help`.

This file does not import torch or pyfused, because `gpu-check` builds pyfused first.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parent
# A function of this file, or the "module.name" of a function that needs torch and pyfused.
Command = Callable[[argparse.Namespace], None] | str


# ---- the cases and their report ------------------------------------------------------------------


def report(options: argparse.Namespace) -> None:
    """Times the cases with torch's default, with huge pages, and with `memory.keep`."""
    module = importlib.import_module("report")
    chosen = ["-k", options.k] if options.k else ["-m", "quick"] if options.quick else []
    module.OUTPUT.mkdir(exist_ok=True)
    default = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
    variables = {"default": {}, "huge-pages": {"THP_MEM_ALLOC_ENABLE": "1"}}
    variables["keep"] = {"BENCHMARK_KEEP": "1"}
    for threads in options.threads or [None]:
        files = []
        count = {"OMP_NUM_THREADS": str(threads)} if threads else {}
        for name, added in variables.items():
            files.append(module.OUTPUT / f"{name}.json")
            pytest = [sys.executable, "-m", "pytest", HERE, "--benchmark-json", files[-1], *chosen]
            subprocess.run(pytest, env=default | count | added, cwd=ROOT, check=True)
        folder = module.write(files, module.OUTPUT)
    if not chosen and sys.platform == "linux":
        importlib.import_module("peaks").write(folder)


# ---- gpu-check -----------------------------------------------------------------------------------

MINUTES = 9.5  # the default time limit of gpu-check


class Step(NamedTuple):
    name: str
    command: Sequence[str | Path]
    seconds: float  # the time limit


def environment(out: Path, site: Path) -> dict[str, str]:
    """Returns variables to import the package in `site`, and torch's pybind11 if it is missing."""
    path = [site]
    if importlib.util.find_spec("pybind11") is None:
        shim = out / "shim"
        shim.mkdir(exist_ok=True)
        code = "from torch.utils.cpp_extension import include_paths\n"
        code += "def get_include():\n    return include_paths()[0]\n"
        (shim / "pybind11.py").write_text(code)
        path.append(shim)
    before = os.environ.get("PYTHONPATH")
    joined = os.pathsep.join([*map(str, path), *([before] if before else [])])
    return {**os.environ, "PYTHONPATH": joined, "PYFUSED_TEST_DEVICE": "cuda"}


def build(site: Path) -> Step:
    pip = (sys.executable, "-m", "pip", "install", "--no-index", "--no-deps")
    command = (*pip, "--no-build-isolation", "--upgrade", "--target", site, ROOT)
    return Step("build", command, 150)


def steps(out: Path) -> list[Step]:
    """Returns the steps, the most valuable first, because the time limit may skip later ones."""
    sys.path.append(str(ROOT / "tests"))
    from shared import SHARED

    run = sys.executable, __file__
    plugins = ["-p", "no:cacheprovider", "-p", "no:randomly", "-p", "no:benchmark"]
    pytest = (sys.executable, "-m", "pytest", "-q", *plugins)
    # Triton's compiler takes most of a test's time.
    workers = ("-n", str(min(12, os.cpu_count() or 1)))
    parallel = (*pytest, *workers) if importlib.util.find_spec("xdist") else pytest
    files = [ROOT / "tests" / name for name in SHARED]
    shared = ("--maxfail=60", "--tb=short", *files)  # a step out of time reports no failure

    def measured(name: str, measurement: str, file: str, seconds: int) -> Step:
        """Returns a step that starts no new case after some time, and gets 30 seconds more."""
        command = *run, "gpu", measurement, out / file, "--seconds", str(seconds)
        return Step(name, command, seconds + 30)

    training = "--only", "GPT-2 small bfloat16"
    chosen = [
        Step("gpu tests", (*parallel, ROOT / "tests/gpu/test_cuda.py"), 120),
        measured("heads", "heads", "heads.md", 60),
        measured("benchmarks", "report", "results", 180),
        Step("training", (*run, "steps", out / "steps.csv", *training), 150),
        measured("sizes", "sizes", "sizes.md", 45),
        Step("shared tests", (*parallel, *shared), 240),
    ]
    if sanitizer := shutil.which("compute-sanitizer"):
        one = ROOT / "tests/gpu/test_cuda.py::test_every_kernel_runs"
        command = (sanitizer, "--error-exitcode", "9", *pytest, one)
        chosen.append(Step("compute-sanitizer", command, 90))
    return chosen


def run_step(step: Step, out: Path, seconds: float, variables: dict[str, str]) -> str:
    """Runs a step; returns its outcome. Its output is written to a log file with its name."""
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


def gpu_check(options: argparse.Namespace) -> None:
    """Builds, tests and times the Triton kernels on this machine's GPU.

    Needs torch, Triton, setuptools, a C++ compiler, and for tests the packages that docs/gpu.md
    lists, but no network. If a step other than the build fails, the others run.
    """
    import torch

    if not torch.cuda.is_available():
        sys.exit("gpu-check needs a GPU: torch sees none")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    until = time.perf_counter() + 60 * options.minutes
    site = (options.site or out / "site").resolve()
    chosen = [step for step in steps(out) if step.name in (options.steps or step.name)]
    variables, results = environment(out, site), list[str]()
    for step in [*([] if options.site else [build(site)]), *chosen]:
        result = run_step(step, out, until - time.perf_counter(), variables)
        results.append(f"- {step.name}: {result}")
        print(results[-1], flush=True)
        (out / "summary.md").write_text("\n".join(["# gpu-check", "", *results, ""]))
        if step.name == "build" and not result.startswith("passed"):
            break
    sys.exit(not all(": passed" in result for result in results))


# ---- the command line ----------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = main.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, function: Command, words: str) -> Callable[..., Any]:
        """Adds a command, and returns the function that adds an argument to it."""
        form = argparse.ArgumentDefaultsHelpFormatter
        made = commands.add_parser(name, help=words, description=words, formatter_class=form)
        made.set_defaults(function=function)
        return made.add_argument

    add = command("report", report, "time all cases, and write a folder of .benchmarks/")
    add("--quick", action="store_true", help="only the headline cases")
    add("-k", metavar="EXPRESSION", help="select cases, as in pytest")
    add("--threads", type=int, nargs="+", help="the numbers of threads, each with its report")

    add = command("steps", "steps.steps", "time training steps of models, with torch and pyfused")
    add("file", type=Path, nargs="?", help="the output file; by default in .benchmarks/")
    add("--rounds", type=int, default=5, help="steps per model and way")
    add("--cpu", action="store_true", help="measure CPU time on one thread, for a busy machine")
    add("--only", default="", help="models whose name contains this")
    add("--ways", nargs="+", help="only these ways")
    add("--seconds", type=float, default=3600, help="start no new model after this time")

    add = command("compare", "revisions.compare", "compare a revision with the working tree")
    add("base", help="a git revision, or a folder with its build")
    add("-k", nargs="+", default=[""], help="select by parts of names")
    add("--all", action="store_true", help="time and list all calls, to see which are faster")
    add("--minutes", type=float, default=5, help="the time limit, without the build")

    add = command("sweep", "sweep.sweep", "find random calls that are slower than torch's")
    add("--op", nargs="+", help="select operators")
    add("--dtype", nargs="+", help="select dtypes")
    add("--threads", nargs="+", type=int, default=[1, 2], help="the numbers of threads")
    add("--seconds", type=float, default=0.08, help="time per call")
    add("--margin", type=float, default=0.95, help="smaller ratios count as slower")
    add("--shapes", type=int, default=6, help="shapes per operator and dtype")
    add("--minutes", type=float, default=20, help="the time limit")
    add("--layouts", action="store_true", help="slices, transposed and other strided tensors")
    add("--seed", type=int, help="the seed of another run, to repeat its shapes")

    add = command("gpu", "gpu.gpu", "measure the kernels on a GPU")
    add("name", choices=("report", "heads", "sizes"), help="what is measured")
    add("file", type=Path, help="the output file; for report, the output folder")
    add("-k", nargs="+", default=[""], help="select cases by parts of names")
    add("--seconds", type=float, default=240, help="start no new case after this time")

    add = command("gpu-check", gpu_check, "build, test and time the kernels on a GPU")
    add("out", type=Path, help="the output folder")
    add("--site", type=Path, help="a folder with the built package; nothing is built")
    add("--steps", nargs="+", metavar="NAME", help="run only these steps after the build")
    add("--minutes", type=float, default=MINUTES, help="the time limit")
    return main


def main() -> None:
    options = parser().parse_args()
    function = options.function
    if isinstance(function, str):
        module, name = function.split(".")
        function = getattr(importlib.import_module(module), name)
    function(options)


if __name__ == "__main__":
    main()
