"""`python -m pyfused run` runs a program as Python does, but patched, and reports its calls."""

from __future__ import annotations

import itertools
import json
import re
import zipapp
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fused_always
from processes import CompletedProcess, process, python

import pyfused
from pyfused import functional as F
from pyfused import memory
from pyfused.dispatch import report as reports

NO_KERNEL = (
    r"pyfused: no kernel ran, in \d+(\.\d+)? s\n"
    r"calls that are too small for every kernel are torch's, and are not counted\n"
)
CAN_KEEP = memory.why_not_kept() is None
KEPT = "pyfused: freed memory was kept; --no-keep returns it to the system\n" * CAN_KEEP

pytestmark = pytest.mark.thresholds


def counts(stderr: str) -> dict[str, int]:
    """Returns the number of calls per operator in the summary."""
    lines = re.findall(r"^([\w.]+) +([\d,]+) +[\d,]+$", stderr, re.MULTILINE)
    return {name: int(number.replace(",", "")) for name, number in lines}


def run_program(
    *arguments: str, folder: Path, code: str = "", **environment: str
) -> CompletedProcess[str]:
    """Runs the command, by default on a script with this code, where torch is imported already."""
    (folder / "script.py").write_text(code)
    program = f"""
        import atexit, os, runpy, sys, threading
        os.chdir({str(folder)!r})
        sys.path.insert(0, os.getcwd())
        sys.argv = ["pyfused", "run", *{arguments!r}, *["script.py"] * {bool(code)}]
        try:
            runpy._run_module_as_main("pyfused", alter_argv=False)
        finally:
            threading._shutdown()  # as at the end of an unforked process
            atexit._run_exitfuncs()
    """
    return python(program, **environment)


# ---- running programs ----------------------------------------------------------------------------

SHOW = """
import atexit, pickle, sys, typing
class Mine: value: "Mine"
atexit.register(pickle.dumps, Mine())
assert type(pickle.loads(pickle.dumps(Mine()))) is typing.get_type_hints(Mine)["value"] is Mine
print(__name__, __file__, __doc__, __spec__ and __spec__.name, sys.argv, sys.path[0])
"""
PROGRAMS = "{}/show.py a --b -h -- --steps", "{}/link.py -m", "{}/app a", "{}/app.zip"


@pytest.mark.parametrize("command", [*PROGRAMS, "-m pack.show a -m"])
def test_programs_run_as_with_python(command: str, tmp_path: Path) -> None:
    for file in ("show.py", "pack/show.py", "app/__main__.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(SHOW)
    (tmp_path / "link.py").symlink_to("pack/show.py")
    zipapp.create_archive(tmp_path / "app", tmp_path / "app.zip")
    given = command.format(tmp_path).split()
    expected, got = process(*given, cwd=tmp_path), run_program(*given, folder=tmp_path)
    assert expected.returncode == got.returncode == 0, got.stderr
    assert len(expected.stdout.splitlines()) == 1
    assert got.stdout == expected.stdout
    assert re.fullmatch(NO_KERNEL + KEPT, got.stderr)


def test_a_program_that_does_not_exist(tmp_path: Path) -> None:
    done = run_program("a.py", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith("error: program: expected a file or folder, got 'a.py'\n")


PROGRAM = """
import atexit, multiprocessing, os, sys, threading
from torch import ones
from torch.nn.functional import hinge_embedding_loss  # the program is read after the patch
X = ones(1 << 15)
class Result:
    def __init__(self): self.is_patched = hasattr(hinge_embedding_loss, "__wrapped__")
def call(results):
    hinge_embedding_loss(X, X)
    results.put(Result())
if __name__ == "__main__":
    hinge_embedding_loss(X, X)
    threading.Timer(0.1, lambda: hinge_embedding_loss(X, X)).start()
    atexit.register(print, "at exit", file=sys.stderr)
    print(Result().is_patched, flush=True)
    for context in map(multiprocessing.get_context, CHILDREN):
        results = context.Queue()
        child = context.Process(target=call, args=(results,))
        child.start()
        print(results.get().is_patched)
        child.join()
    END
"""


@pytest.mark.parametrize(
    ("end", "rank", "code", "calls", "children"),
    [
        ("sys.exit(3)", "0", 3, 2, ()),
        ("os._exit(4)", "0", 4, 0, ()),
        ("os.fork() and os.wait()", "0", 0, 2, ()),
        ("pass", "1", 0, 0, ()),
        pytest.param("pass", "0", 0, 2, ("spawn", "fork"), marks=pytest.mark.slow),
    ],
)
def test_the_first_rank_prints_the_report_last(
    end: str, rank: str, code: int, calls: int, children: Any, tmp_path: Path
) -> None:
    program = PROGRAM.replace("CHILDREN", repr(children)).replace("END", end)
    done = run_program(folder=tmp_path, code=program, RANK=rank, OMP_NUM_THREADS="1")
    _, _, report = done.stderr.partition("at exit\n")
    assert done.stdout == "True\n" + "False\nTrue\n" * bool(children), done.stderr
    assert done.returncode == code
    assert counts(report) == ({"hinge_embedding_loss": calls} if calls else {})
    assert done.stderr.count("kernels took ") == bool(report) == (calls > 0)


def test_programs_that_import_patch_or_move(tmp_path: Path) -> None:
    """Programs may import pyfused, patch, and count in a nested block; formulas are counted."""
    code = """
import os
os.chdir("/")
assert os.path.samefile(os.path.dirname(__file__), FOLDER)
import pyfused, torch
x = torch.ones(1 << 15)
with pyfused.patch(), pyfused.report() as report:
    torch.nn.functional.hinge_embedding_loss(x, x)
pyfused.patch()
pyfused.unpatch()
torch.nn.functional.hinge_embedding_loss(x, x)
torch.nn.functional.relu(torch.ones(2))
@pyfused.activation
def double(input): return 2 * input
double(torch.ones(1 << 20))
print(report)
"""
    done = run_program(folder=tmp_path, code=code.replace("FOLDER", repr(str(tmp_path))))
    assert counts(done.stdout) == {"hinge_embedding_loss": 1}, done.stderr
    assert counts(done.stderr) == {"hinge_embedding_loss": 2, "__main__.double": 1}


KEEPS = "from pyfused import memory; print(memory.stats().keeps); memory.keep(False)"


@pytest.mark.parametrize("options", [(), ("--no-keep",)])
def test_freed_memory_is_kept_until_the_program_ends_it(options: Any, tmp_path: Path) -> None:
    done = run_program(*options, folder=tmp_path, code=KEEPS)
    assert done.stdout == f"{CAN_KEEP and not options}\n", done.stderr
    assert re.fullmatch(NO_KERNEL, done.stderr)


def test_nothing_is_printed_to_stdout_if_stderr_is_closed(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("import sys; sys.stderr = None; print(42)")
    done = process("-m", "pyfused", "run", "script.py", cwd=tmp_path)
    assert done.stdout == "42\n"


# ---- reports -------------------------------------------------------------------------------------

X = torch.randn(6, 5)


def test_reports_may_end_in_any_order_and_be_read_before(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, found, x = pyfused.report(), pyfused.report(), [], X.clone().requires_grad_()
    for name in ("clock", "perf_counter"):  # advance by one second per reading
        monkeypatch.setattr(reports, name, itertools.count().__next__)
    with fused_always():
        for end in (first.__enter__, second.__enter__, first.__exit__, second.__exit__):
            end()
            F.relu(x).sum().backward()
            F.relu(X[:2])
            F.relu(X.long())
            found.append(json.loads(json.dumps(second.to_dict())))
    assert counts(str(first)) == counts(str(second)) == {"relu": 4}
    assert found[-1]["operators"] == {"relu": {"calls": 4, "largest_input": 30}}
    assert found[-1]["left_to_torch"] == {"relu": {"input has dtype torch.int64": 2}}
    assert [each["seconds"] for each in found] == [0, 1, 3, 4]
    assert [each["kernel_seconds"] for each in found] == [0, 3, 6, 6]  # three kernels each time


def test_fallbacks_are_counted_but_no_small_call() -> None:
    functional = torch.nn.functional
    with pyfused.patch(), pyfused.report() as report:
        functional.mse_loss(torch.zeros(5), torch.ones(5))
        functional.cross_entropy(torch.zeros(4096, 16), torch.zeros(4096).long())
        functional.l1_loss(torch.zeros(1 << 20), torch.zeros(1 << 20, dtype=torch.int64))
    found = report.to_dict()
    assert found["left_to_torch"] == {"l1_loss": {"target has dtype torch.int64": 1}}
    assert not found["operators"]
    assert "left to torch: l1_loss (1: target has dtype torch.int64)" in repr(report)
    assert re.search(NO_KERNEL, repr(report) + "\n")


@pytest.mark.usefixtures("compiled_always")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_calls_are_counted() -> None:
    def loss(x: torch.Tensor) -> torch.Tensor:
        return F.linear_cross_entropy(x, X[:4], torch.zeros(6).long()) + F.mse_loss(x, X.flip(0))

    step = torch.compile(loss, fullgraph=True, backend="aot_eager")
    step(X.clone().requires_grad_()).backward()
    with pyfused.report() as report:
        step(X.clone().requires_grad_()).backward()
    assert report.to_dict()["compiled"] == {"linear_cross_entropy": 1}
    assert report.to_dict()["kernel_seconds"] > 0
    assert "in compiled programs: " in str(report)


def test_a_report_without_kernels_says_what_it_has_seen(tmp_path: Path) -> None:
    code = """
import torch
from torch.nn.functional import mse_loss as loss
import pyfused
from pyfused import functional as F
with pyfused.report() as report, pyfused.patch():
    for _ in range(2):
        torch.compile(lambda x: loss(F.silu(x), x), backend="aot_eager")(torch.ones(1 << 20))
print(report)
"""
    done = process("-W", "ignore", "-c", code, cwd=tmp_path)
    compiled, bound = done.stdout.splitlines()[2:]
    assert compiled == "so are calls in compiled programs: silu", done.stderr
    assert bound == "so are calls through names bound before the patch: __main__.loss"


class Number(int):
    """A number whose sum is computed by Python, so that threads may switch in between."""

    def __add__(self, other: int) -> Number:
        return Number(int(self) + other)


@pytest.mark.usefixtures("switching")
def test_threads_that_count_and_read_at_once() -> None:
    def count(_: int) -> None:
        for _ in range(500):
            reports.count_compiled("op")
            report.to_dict()

    with pyfused.report() as report, ThreadPoolExecutor(8) as pool:
        report._compiled["op"] = Number()
        list(pool.map(count, range(8)))
    assert report.to_dict()["compiled"] == {"op": 4000}
