"""`python -m pyfused run` runs a program as Python does, but patched, and reports its calls."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import time
import warnings
import zipapp
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fused_always
from processes import python
from torch import Tensor
from torch.overrides import BaseTorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import pyfused
from pyfused import __main__ as main
from pyfused import functional as F
from pyfused.adopt import report as reports
from pyfused.dispatch import reasons

Done = subprocess.CompletedProcess[str]
SECONDS = 300  # long enough to end only a hang

pytestmark = pytest.mark.thresholds


def counts(stderr: str) -> dict[str, int]:
    """Returns the number of calls per operator in the summary, "calls" for a one-line summary."""
    lines = re.findall(r"^([\w.]+) +([\d,]+) +[\d,]+ ", stderr, re.MULTILINE)
    lines += re.findall(r"([\w.]+) \(([\d,]+)(?:: [^)]*|, compiled)?\)", stderr)
    found: Counter[str] = Counter()
    for name, number in lines:
        found[name] += int(number.replace(",", ""))
    return dict(found)


def plain(*arguments: str, folder: Path, **environment: str) -> Done:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        text=True,
        capture_output=True,
        check=False,
        timeout=SECONDS,
    )


COMMAND = """
import atexit, os, runpy, sys, threading
os.chdir({folder!r})
sys.path.insert(0, os.getcwd())
sys.argv = ["pyfused", "run", *{arguments!r}]
code = None
try:
    runpy._run_module_as_main("pyfused", alter_argv=False)
except SystemExit as end:
    code = end.code
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
except BaseException:
    sys.excepthook(*sys.exc_info())
    code = 1
threading._shutdown()  # as at the end of an unforked process
atexit._run_exitfuncs()
sys.exit(code)
"""


def counted(*arguments: str, folder: Path, **environment: str) -> Done:
    """Runs the command in a process that has imported torch already."""
    return python(COMMAND.format(folder=str(folder), arguments=arguments), **environment)


def script(folder: Path, code: str) -> str:
    path = folder / "script.py"
    path.write_text(code)
    return str(path)


# ---- running programs ----------------------------------------------------------------------------

SHOW = """
import atexit, pickle, sys, threading, typing
class Mine: value: "Mine"
def find(when):
    assert type(pickle.loads(pickle.dumps(Mine()))) is typing.get_type_hints(Mine)["value"] is Mine
    print(when)
find("in the program")
threading.Thread(target=lambda: threading.main_thread().join() or find("in a thread")).start()
atexit.register(find, "at exit")
print(__name__, __file__, __doc__, __spec__ and __spec__.name, sys.argv, sys.path[0])
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("pack", "app"):
        (tmp_path / name).mkdir()
    for file in ("show.py", "pack/show.py", "app/__main__.py"):
        (tmp_path / file).write_text(SHOW)
    (tmp_path / "link.py").symlink_to("pack/show.py")
    zipapp.create_archive(tmp_path / "app", tmp_path / "app.zip")
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        ["{0}/show.py", "a", "--b", "-h", "--", "--compare"],
        ["pack/show.py", "-m"],
        ["link.py"],
        ["{0}/app", "a"],
        ["app"],
        ["app.zip"],
        ["-m", "pack.show", "a", "-m"],
    ],
)
def test_programs_run_as_with_python(arguments: list[str], folder: Path) -> None:
    given = [argument.format(folder) for argument in arguments]
    expected = plain(*given, folder=folder)
    got = counted("--compare", *given, folder=folder)
    assert expected.returncode == got.returncode == 0, got.stderr
    assert len(expected.stdout.splitlines()) == 4
    assert got.stdout == expected.stdout
    assert got.stderr == "pyfused: no losses or activations were called\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["nowhere.py", "a"],
        ["pack"],
        ["-m", "nowhere"],
        ["-m", "pack"],
    ],
)
def test_errors_of_programs_that_cannot_run(arguments: list[str], folder: Path) -> None:
    expected = plain(*arguments, folder=folder)
    got = counted(*arguments, folder=folder)
    assert expected.returncode == got.returncode > 0
    assert got.stderr == expected.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--version"], 0, f"pyfused {pyfused.__version__}\n"),
        (["run", "--help"], 0, "usage: python -m pyfused run [-h] [--compare] [-m] program ..."),
        (["run"], 2, "error: the following arguments are required: program\n"),
        (["run", "--nowhere", "script.py"], 2, "error: unrecognized arguments: --nowhere"),
    ],
)
def test_messages_of_the_command(
    arguments: list[str],
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["pyfused/__main__.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == code
    assert words in "".join(capsys.readouterr())


ENDS = {
    "sys.exit()": (0, ""),
    "sys.exit(3)": (3, ""),
    "sys.exit('a message')": (1, "a message\n"),
    "raise ImportError('of the program')": (1, "ImportError: of the program\n"),
    "import nowhere": (1, "No module named 'nowhere'\n"),
    "open('nowhere')": (1, "No such file or directory: 'nowhere'\n"),
    "atexit.register(print, 'at exit', file=sys.stderr)": (0, "at exit\n"),
    "threading.Timer(0.1, relu).start()": (0, ""),
    "os._exit(4)": (4, None),
}


@pytest.mark.parametrize(("code", "end"), ENDS.items(), ids=ENDS.keys())
def test_exit_status_and_output_of_the_program(
    code: str, end: tuple[int, str | None], tmp_path: Path
) -> None:
    """The report is printed last."""
    start = (
        "import atexit, os, sys, threading, torch\ndef relu(): torch.relu(torch.ones(2))\nrelu()"
    )
    got = counted(script(tmp_path, f"{start}\n{code}\n"), folder=tmp_path)
    status, output = end
    assert got.returncode == status
    if output is None:
        assert got.stderr == ""
        return
    before, words, after = got.stderr.rpartition("pyfused: no speed-up: ")
    assert before.endswith(output)
    assert words
    assert f"({2 if 'relu' in code else 1})" in after


# ---- patching and counting -----------------------------------------------------------------------

SCRIPT = """
import pickle, sys, torch, torch.nn.functional as F, helper, warnings
from helper import gated
warnings.simplefilter("ignore")
assert __name__ == "__main__" and helper
x, target = torch.randn(4, 8), torch.zeros(4).long()
for _ in range(3):
    torch.nn.CrossEntropyLoss()(x, target)
F.tanh(torch.zeros(1 << 22))
torch.relu_(torch.zeros(2))
F.rrelu(x)
torch.nn.Tanh()(x), torch.nn.TransformerEncoderLayer(8, 2, 8, activation=F.gelu).train()(x)
x.softmax(1), F.softmax(x, dim=1), torch.softmax(x, 1), F.leaky_relu(x, inplace=True)
assert "pyfused" not in str(pickle.dumps([F.gelu, F.mse_loss, torch.tanh, torch.Tensor.tanh]))
assert torch.jit.script(gated)(x).shape == x.shape
assert torch.compile(gated, fullgraph=True, backend="eager")(x).shape == x.shape
assert [n.name for n in torch.fx.symbolic_trace(gated).graph.nodes][1] == "gelu"
try:
    F.mse_loss(x)
except TypeError:
    pass
print(*sys.argv[1:])
"""

HELPER = """
import torch, torch.nn.functional as F
def gated(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x) * torch.tanh(x) + F.rrelu(x) + F.silu(x)
"""


@pytest.mark.slow
def test_a_script_runs_patched_and_its_calls_are_counted(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text(HELPER)
    (tmp_path / "train.py").write_text(SCRIPT)
    done = plain("-m", "pyfused", "run", "train.py", "--steps", "5", folder=tmp_path)
    assert (done.returncode, done.stdout) == (0, "--steps 5\n"), done.stderr
    assert counts(done.stderr) == {
        "cross_entropy": 3,
        "softmax": 3,
        "tanh": 3,
        "relu": 1,
        "gelu": 1,
        "leaky_relu": 1,
        "silu": 1,
    }
    assert re.search(r"tanh +1 +4,194,304 +[\d.]+ s +[\d.]+ s\n", done.stderr)
    assert re.search(
        r"\nkernels took [\d.]+ s of [\d.]+ s; torch's .*\npyfused .*\n\Z", done.stderr
    )


def test_programs_that_import_patch_or_move(tmp_path: Path) -> None:
    """Programs may import pyfused, patch, and count in a nested block; formulas are counted."""
    path = script(
        tmp_path,
        """
import os
os.chdir("/")
assert os.path.samefile(os.path.dirname(__file__), FOLDER)
import pyfused, torch
with pyfused.patch(), pyfused.report() as report:
    torch.relu(torch.ones(2))
pyfused.patch()
pyfused.unpatch()
torch.relu(torch.ones(2))
@pyfused.activation
def double(input): return 2 * input
for size in (5, 5, 1 << 20): double(torch.ones(size))
print(report)
""".replace("FOLDER", repr(str(tmp_path))),
    )
    done = counted(Path(path).name, folder=tmp_path)
    assert counts(done.stdout) == {"calls": 1}, done.stderr
    # Small calls of a formula are not counted.
    assert counts(done.stderr) == {"relu": 2, "__main__.double": 1}


CHILDREN = """
import multiprocessing, os, sys, torch

def is_patched(*_):
    return torch.relu is not torch._C._VariableFunctions.relu

def spawned(queue):
    before = is_patched()
    import pyfused
    pyfused.patch()
    torch.relu(torch.ones(3))
    queue.put((before, is_patched()))

if __name__ == "__main__":
    torch.relu(torch.ones(3))
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=spawned, args=(queue,))
    child.start()
    print(queue.get(), flush=True)
    child.join()
    if not os.fork():
        torch.sigmoid(torch.ones(2))
        print(is_patched(), flush=True)
        sys.exit()
    os.wait()
"""


@pytest.mark.slow
def test_child_processes(tmp_path: Path) -> None:
    path = script(tmp_path, CHILDREN)
    done = plain("-W", "ignore", "-m", "pyfused", "run", path, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(False, True)\nTrue\n"
    assert done.stderr.count("pyfused: ") == 1
    assert counts(done.stderr) == {"calls": 1}


RANK = """
import os, sys, torch
torch.relu(torch.ones(3))
patched = torch.relu is not torch._C._VariableFunctions.relu
sys.stdout.write(f"{os.environ['RANK']} {patched}\\n")
"""


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_first_rank_prints(rank: str, tmp_path: Path) -> None:
    done = counted(script(tmp_path, RANK), folder=tmp_path, RANK=rank, WORLD_SIZE="2")
    assert done.stdout == f"{rank} True\n"
    assert counts(done.stderr) == ({} if rank == "1" else {"calls": 1})
    assert done.stderr.startswith("pyfused: rank 0 of 2:\n") == (rank == "0")


# ---- saved time ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_torchrun_starts_the_ranks(tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    path = script(tmp_path, RANK)
    done = plain(*launcher, "-m", "pyfused", "run", path, folder=tmp_path)
    assert sorted(done.stdout.splitlines()) == ["0 True", "1 True"], done.stderr
    assert counts(done.stderr) == {"calls": 1}


@pytest.fixture
def counted_here() -> Iterator[reports.Report]:
    """Counts the test's calls; calls that a kernel can compute run it and are compared."""
    with fused_always(), pyfused.report(compare=True) as report:
        yield report


X, TARGET = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "activation": lambda x: F.gelu(x, approximate="tanh"),
    "in place": lambda x: F.relu(x * 1, inplace=True),
    "loss": lambda x: F.cross_entropy(x, TARGET, torch.ones(5), ignore_index=1),
    "each": lambda x: F.mse_loss(x, X.flip(0), reduction="none"),
    "head": lambda x: F.linear_cross_entropy(x, X[:5], TARGET, softcap=3.0),
    "strided": lambda x: F.softmax(x.mT, 1),
}


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_repeated_call_is_compared_and_changes_nothing(
    call: Callable[[Tensor], Tensor], requires_grad: bool
) -> None:
    def results() -> tuple[Any, ...]:
        x = X.clone().requires_grad_(requires_grad)
        y = call(x)
        gradient = torch.autograd.grad(y.sum(), x)[0].tolist() if requires_grad else None
        return y.detach().tolist(), gradient, x._version, y._version, torch.get_rng_state().tolist()

    with fused_always():
        expected = results()
        with pyfused.report(compare=True) as report:
            assert results() == expected
    found = report.to_dict()
    if found["left_to_torch"]:  # relu in place always falls back
        assert call is CALLS["in place"]
        return
    ((row),) = found["operators"].values()
    assert (row["calls"], row["largest_input"], row["compared"]) == (1, 30, 1)
    assert min(row["pyfused_seconds"], row["torch_seconds"]) > 0


def within_checkpoint() -> None:
    x = X.clone().requires_grad_()
    checkpoint(lambda x: F.relu(x).exp(), x, use_reentrant=False).sum().backward()


def under(context: Callable[[], Any]) -> Callable[[], Any]:
    def call() -> None:
        with context():
            F.relu(X)

    return call


SEEN: dict[str, Callable[[], Any]] = {
    "checkpoint": within_checkpoint,
    "anomaly detection": under(lambda: torch.autograd.detect_anomaly(check_nan=False)),
    "mode": under(BaseTorchFunctionMode),
    "vmap": lambda: torch.func.vmap(F.relu)(X),
    "subclass": lambda: F.relu(X.as_subclass(type("Mine", (Tensor,), {}))),
    "another device": lambda: F.relu(X.to("meta")),
    "profiler": under(lambda: profile(activities=[ProfilerActivity.CPU])),
}


def compared(report: reports.Report) -> dict[str, int]:
    """Returns how many calls of each operator were compared."""
    return {op: row["compared"] for op, row in report.to_dict()["operators"].items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("call", SEEN.values(), ids=SEEN.keys())
def test_calls_are_not_repeated_if_that_is_visible(
    call: Callable[[], Any], counted_here: reports.Report
) -> None:
    call()
    assert compared(counted_here) or counted_here.to_dict()["left_to_torch"]
    assert not any(compared(counted_here).values())


WARNS: dict[str, Callable[[], Any]] = {
    "shapes": lambda: F.mse_loss(X, X[:1]),
    "kl_div": lambda: F.kl_div(X, X),
    "size_average": lambda: F.mse_loss(X, X, size_average=True),
    "softmax": lambda: F.softmax(X),
}


@pytest.mark.parametrize("call", WARNS.values(), ids=WARNS.keys())
def test_a_repeated_call_warns_once(call: Callable[[], Any], counted_here: reports.Report) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        call()
    assert len(seen) == 1
    assert all(compared(counted_here).values())


def test_large_calls_are_cut_or_not_repeated(
    counted_here: reports.Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Size] = []
    seconds = reports._seconds
    monkeypatch.setattr(reports, "MOST", 12)
    monkeypatch.setattr(
        reports, "_seconds", lambda f, given: (seen.append(given[0].shape), seconds(f, given))[1]
    )
    F.mse_loss(X, X)
    F.linear_cross_entropy(X, X[:4], TARGET % 4)
    assert set(seen) == {(3, 5)}
    assert compared(counted_here) == {"mse_loss": 1, "linear_cross_entropy": 1}
    seen.clear()
    F.relu(torch.ones(1, 60))
    assert not seen


def test_comparisons_that_fail(
    counted_here: reports.Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error is invisible and not retried; after an interrupt, other calls are compared."""
    attempts: list[Any] = []

    def fails(*_: Any) -> Any:
        attempts.append(error)
        raise error

    with monkeypatch.context() as context:
        context.setattr(reports, "_seconds", fails)
        error: BaseException = MemoryError()
        for _ in range(3):
            assert F.relu(X).equal(X.relu())
        assert len(attempts) == 1
        error = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            F.gelu(X)
    F.tanh(X)
    assert compared(counted_here) == {"relu": 0, "gelu": 0, "tanh": 1}


def test_reports_may_end_in_any_order() -> None:
    first, second = pyfused.report(), pyfused.report()
    with fused_always():
        for end in (first.__enter__, second.__enter__, first.__exit__, second.__exit__):
            end()
            F.relu(X)
    assert counts(str(first)) == counts(str(second)) == {"relu": 2}


@pytest.mark.parametrize("empty", [(0,), (5, 0, 0)])
def test_a_call_without_elements_is_counted(
    empty: tuple[int, ...], counted_here: reports.Report
) -> None:
    for _ in range(3):
        assert F.softmax(torch.empty(empty), -1).shape == empty
    assert counted_here.to_dict()["left_to_torch"] == {"softmax": {reasons.SMALL: 3}}


def test_comparisons_have_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count().__next__  # advances by one second per reading
    monkeypatch.setattr(reports, "perf_counter", clock)
    monkeypatch.setattr(reports, "BUDGET", 20)
    with fused_always(), pyfused.report() as limited, pyfused.report(compare=True) as unlimited:
        for _ in range(300):
            F.relu(X)
    # Calls 1, 2, 4, 8, ... are compared.
    assert 1 < compared(limited)["relu"] < compared(unlimited)["relu"] == 9


def test_small_calls_and_fallbacks_are_counted() -> None:
    with pyfused.patch(), pyfused.report() as report:
        for size in [5] * 90 + [7] * 10:
            torch.nn.functional.mse_loss(torch.zeros(size), torch.ones(size))
        torch.nn.functional.l1_loss(torch.zeros(1 << 20), torch.zeros(1 << 20, dtype=torch.int64))
    found = report.to_dict()
    assert found["left_to_torch"] == {
        "mse_loss": {reasons.SMALL: 100},
        "l1_loss": {"target has dtype torch.int64": 1},
    }
    assert not found["operators"]
    line = "left to torch: l1_loss (1: target has dtype torch.int64), mse_loss (100: "
    assert line in repr(report)


@pytest.mark.usefixtures("compiled_always")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_calls_are_counted() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x: Tensor) -> Tensor:
        head = F.linear_cross_entropy(x, X[:4], TARGET % 4)
        return F.cross_entropy(x, TARGET) + head + F.mse_loss(x, X.flip(0))

    step(X.clone().requires_grad_()).backward()
    with pyfused.report() as report:
        step(X.clone().requires_grad_()).backward()
    names = "cross_entropy", "linear_cross_entropy", "mse_loss"
    assert report.to_dict()["compiled"] == dict.fromkeys(names, 1)


Kinds = dict[tuple[str, int, bool], reports.Calls]
KERNELS: Kinds = {
    ("cross_entropy", 20, True): reports.Calls(
        1000, 1000, 10**6, [(2e-6, 9e-6), (1e-6, 8e-6), (1e-5, 1e-4)]
    ),
    ("relu", 20, True): reports.Calls(10, 1000, 10**4, [(1e-6, 1e-6)]),
    ("relu", 22, True): reports.Calls(10, 9000, 10**5),  # not compared
}
TANH: Kinds = {("tanh", 20, True): reports.Calls(1, 5, 5)}
HEADER = ["operator", "calls", "largest input", "pyfused", "torch"]


def summary(seconds: float, kernels: Kinds | None = None, **counted: Any) -> list[list[str]]:
    report = pyfused.report()
    report._seconds = seconds
    report._kernels.update(kernels or {})
    for name, found in counted.items():
        getattr(report, f"_{name}").update(found)
    return [re.split("  +", line) for line in str(report).splitlines()]


def test_the_summary_of_saved_time() -> None:
    assert summary(60.0, KERNELS, small={"relu": 1200}) == [
        HEADER,
        ["cross_entropy", "1,000", "1,000", "2.0 s", "9.0 s"],
        ["relu", "20", "9,000", "0.110 s", "0.110 s"],
        [f"left to torch: relu (1,200: {reasons.SMALL})"],
        [
            (
                "kernels took 2.1 s of 60 s; torch's operators would have taken 9.1 s "
                "(estimated by re-running calls with both: 4)"
            )
        ],
        ["pyfused saved about 7.0 s of 67 s (10%)"],
    ]


@pytest.mark.parametrize(
    ("times", "verdict"),
    [
        ([(1.0, 1.4)], "no measurable difference"),  # per element; 10 elements
        ([(1.0, 2.0)], "saved about"),
        ([(1.0, 1.4)] * 16, "saved about"),
        ([(1.0, 2.0), (3.0, 1.5)], "no measurable difference"),
        ([(1.4, 1.0)] * 16, "slower by about 4.0 s: run python -m pyfused tune, or do not use it"),
        ([(1.0, 1.04)] * 1000, "no measurable difference"),  # 0.4 s of 100 s
    ],
)
def test_a_verdict_needs_a_difference_above_the_spread_of_times(
    times: list[tuple[float, float]], verdict: str
) -> None:
    *_, (last,) = summary(100.0, {("relu", 20, True): reports.Calls(10, 1, 10, times)})
    assert verdict in last


def test_the_time_saved_is_also_given_without_the_start_of_the_program() -> None:
    report = pyfused.report()
    report._seconds, report._first_call = 60.0, 39.0
    report._kernels.update(KERNELS)
    assert str(report).endswith(
        "\npyfused saved about 7.0 s of 67 s (10%), or 25% of the time since the first call"
    )
    found = json.loads(json.dumps(report.to_dict()))
    assert found["seconds_from_first_call"] == 21.0
    assert found["saved_seconds"] == pytest.approx(7.0)
    assert 0 < found["saved_error"] < 7.0
    assert found["operators"]["relu"]["torch_seconds"] == pytest.approx(0.11)


def test_a_report_can_be_read_before_its_end() -> None:
    with fused_always(), pyfused.report() as report:
        time.sleep(0.01)
        F.relu(X)
        F.relu(X.long())
        found = report.to_dict()
    assert 0 < found["seconds_from_first_call"] < found["seconds"] - 0.01
    assert found["operators"]["relu"]["calls"] == 1
    assert found["left_to_torch"] == {"relu": {"input has dtype torch.int64": 1}}


def test_the_summary_has_no_total_without_comparisons() -> None:
    *_, unknown, last, _ = summary(60.0, {**KERNELS, **TANH}, compiled={"gelu": 3})
    assert unknown == ["not compared: tanh (1), gelu (3, compiled)"]
    assert last[0].startswith("kernels took at least 2.1 s of 60 s; torch's operators ")
    assert "would have taken at least 9.1 s" in last[0]
    assert summary(60.0, TANH)[1:] == [["tanh", "1", "5", "-", "-"], ["not compared: tanh (1)"]]


def test_the_summary_is_one_line_without_a_speed_up() -> None:
    nothing = "pyfused: no speed-up: "
    small = f"{nothing}all calls (1,200) were too small for a kernel, in 60 s"
    assert summary(60.0, small={"relu": 1200}) == [[small]]
    assert summary(0.0) == [["pyfused: no losses or activations were called"]]
    dtype = {("relu", "input has dtype torch.int64"): 1}
    left = "left to torch: relu (1: input has dtype torch.int64)"
    assert summary(60.0, fallbacks=dtype) == [[left], [f"{nothing}no kernel ran, in 60 s"]]
