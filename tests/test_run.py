"""`python -m pyfused run`: the program runs as by itself, patched, and its calls are counted."""

from __future__ import annotations

import itertools
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import fused_always
from torch import Tensor
from torch.overrides import BaseTorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import pyfused
from pyfused import __main__ as main
from pyfused import functional as F
from pyfused import run
from pyfused.ops import TORCH_OPS, reasons
from pyfused.startup import launch
from pyfused.startup import sitecustomize as startup
from pyfused.types import CrossEntropyOptions, HeadOptions

Done = subprocess.CompletedProcess[str]
SECONDS = 120  # far beyond what it takes, so that only a hang is cut short
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def counts(stderr: str) -> dict[str, int]:
    """How often the summary says that each operator was called, "calls" where it is one line."""
    lines = re.findall(r"^([\w.]+) +([\d,]+) +[\d,]+ ", stderr, re.MULTILINE)
    lines += re.findall(r"([\w.]+) \(([\d,]+)(?:: [^)]*|, compiled)?\)", stderr)
    found: dict[str, int] = {}
    for name, number in lines:
        found[name] = found.get(name, 0) + int(number.replace(",", ""))
    return found


def plain(*arguments: str, folder: Path, stdin: str = "", **environment: str) -> Done:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=ENVIRONMENT | environment,
        input=stdin,
        text=True,
        capture_output=True,
        check=False,
        timeout=SECONDS,
    )


def counted(
    *arguments: str,
    folder: Path,
    stdin: str = "",
    before: Callable[[], Any] = int,
    **environment: str,
) -> Done:
    """By what the command calls, in a fork of this process, which has imported torch already.

    Args:
        before: What the fork calls first.
    """
    files = {name: folder / f"std{name}" for name in ("in", "out", "err")}
    files["in"].write_text(stdin)
    child = os.fork()
    if not child:
        try:
            os.dup2(os.open(files["in"], os.O_RDONLY), 0)
            for to, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(files[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), to)
            os.chdir(folder)
            os.environ.update(ENVIRONMENT | environment | {"TMPDIR": str(folder)})
            sys.argv = ["-m", "run", *arguments]
            sys.orig_argv = [sys.executable, "-m", "pyfused", "run", *arguments]
            launch.tempfile.tempdir = None
            sys.stderr = open(2, "w", buffering=1)  # noqa: SIM115 not what pytest put there
            before()
            launch.run(launch.asked() or [])
        except SystemExit as ended:
            os._exit(ended.code if isinstance(ended.code, int) else 1)
        finally:
            os._exit(99)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Done(arguments, code, files["out"].read_text(), files["err"].read_text())


pytestmark = [
    pytest.mark.thresholds,
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),  # exec follows
]

# ---- as by itself --------------------------------------------------------------------------------

SHOW = """
import sys
known = {name: globals().get(name) for name in ("__name__", "__file__", "__package__", "__doc__")}
print(known, __spec__ and __spec__.name, sys.argv, sys.path, sys.flags.optimize, __debug__)
print(sys.stdin.read())
"""
PROGRAMS = {
    "script": ["show.py", "a", "--b", "-h"],
    "in a folder": ["pack/show.py"],
    "folder": ["app", "a"],
    "module": ["-m", "pack.show", "a", "-m"],
    "code": ["-c", SHOW, "a", "-c"],
    "standard input": ["-", "a"],
    "options of Python": ["-O", "-W", "error", "show.py"],
    "no such file": ["nowhere.py", "a"],
    "no such module": ["-m", "nowhere"],
    "no such option": ["--nowhere"],
    "Python's version": ["--version"],
}


def assert_no_calls(got: str, expected: str, summary: bool) -> None:
    """What the program itself says, and then a summary without calls."""
    assert got.startswith(expected)
    said = got.removeprefix(expected)
    assert bool(said) == summary
    assert not counts(said)


@pytest.mark.parametrize("arguments", PROGRAMS.values(), ids=PROGRAMS.keys())
def test_a_program_is_run_as_python_runs_it(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "pack").mkdir()
    (tmp_path / "app").mkdir()
    for file in ("show.py", "pack/show.py", "app/__main__.py"):
        (tmp_path / file).write_text(SHOW)
    stdin = SHOW.replace("sys.stdin.read()", "'read'") if "-" in arguments else "typed"
    expected = plain(*arguments, folder=tmp_path, stdin=stdin)
    got = counted(*arguments, folder=tmp_path, stdin=stdin)
    assert (got.returncode, got.stdout) == (expected.returncode, expected.stdout)
    started = arguments[0] not in ("--version", "--nowhere")
    assert_no_calls(got.stderr, expected.stderr, started)


ENDS = {
    "sys.exit()": True,
    "sys.exit(3)": True,
    "sys.exit('a message')": True,
    "1 // 0": True,
    "raise KeyboardInterrupt": True,
    "atexit.register(print, 'at exit', file=sys.stderr)": True,
    "threading.Timer(0.1, print, ['late'], {'file': sys.stderr}).start()": True,
    "os._exit(4)": False,
    "os.kill(os.getpid(), signal.SIGTERM)": False,
    "os.kill(os.getpid(), signal.SIGKILL)": False,
}


@pytest.mark.parametrize(("code", "summary"), ENDS.items(), ids=ENDS.keys())
def test_a_program_ends_as_it_does_by_itself(code: str, summary: bool, tmp_path: Path) -> None:
    """The summary comes last."""
    script = f"import atexit, os, signal, sys, threading\ndef f():\n    {code}\nf()\n"
    (tmp_path / "ends.py").write_text(script)
    expected = plain("ends.py", folder=tmp_path)
    got = counted("ends.py", folder=tmp_path)
    assert got.returncode == expected.returncode
    assert_no_calls(got.stderr, expected.stderr, summary)
    assert not list(tmp_path.glob("pyfused-run-*"))


def without_proc() -> None:
    """As on a platform without /proc, where the file for the counts keeps its name."""
    launch.Path.exists = lambda _: False  # type: ignore[method-assign]


def on_windows() -> None:
    """As where a process cannot be replaced by another, nor forked."""
    without_proc()
    sys.platform = "win32"


WITHOUT_FORK = """
import os, random, sys
register = os.register_at_fork
del os.register_at_fork

class PutBack:  # torch needs it
    def find_spec(name, path=None, target=None):
        if name == "torch":
            os.register_at_fork = register

sys.meta_path.insert(0, PutBack)
"""
ONE_AND_A_CHILD = """
import os, subprocess, sys
sys.stdout.write(os.environ["PYFUSED_RUN"])
sys.stdout.flush()
code = "import torch; torch.tanh(torch.ones(2))"
subprocess.run([sys.executable, "-c", code], check=True)
exec(code)
sys.exit(5)
"""


@pytest.mark.parametrize("platform", [int, without_proc, on_windows])
def test_children_bring_their_counts_on_every_platform(
    platform: Callable[[], Any], tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_FORK)
    path = {"PYTHONPATH": str(tmp_path)} if platform is on_windows else {}
    done = counted("-c", ONE_AND_A_CHILD, folder=tmp_path, before=platform, **path)
    assert done.returncode == 5, done.stderr
    has_name = platform is not int or not Path("/proc").exists()
    assert ("pyfused-run-" in done.stdout) == has_name
    assert counts(done.stderr) == {"calls": 2}
    assert not list(tmp_path.glob("pyfused-run-*"))


def test_nothing_is_run_from_a_folder_that_others_could_make(tmp_path: Path) -> None:
    """A child that outlives the run still has the run's PYTHONPATH."""
    code = "import os; print(os.environ['PYTHONPATH'].split(os.pathsep)[0])"
    done = counted("-c", code, folder=tmp_path)
    folder = Path(done.stdout.strip())
    assert folder == Path(startup.__file__).parent
    assert {path.name for path in folder.glob("*.py")} == {
        "__init__.py",
        "launch.py",
        "sitecustomize.py",
    }


def test_a_path_without_a_run_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.mine = True")
    code = "import sys, torch; print(sys.mine, 'pyfused' in sys.modules)"
    paths = os.pathsep.join((str(Path(startup.__file__).parent), str(tmp_path)))
    done = plain("-c", code, folder=tmp_path, PYTHONPATH=paths)
    assert (done.stdout, done.stderr) == ("True False\n", "")


def one_call() -> startup.Counts:
    counts = startup.Counts()
    counts.kernels["relu", 10, True].add(1000, 1, 1000, [(1e-6, 8e-6)])
    return counts


def test_a_child_that_outlives_the_run_writes_to_no_file_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = tmp_path / "counts", tmp_path / "other"
    monkeypatch.setenv("PYFUSED_RUN", "")
    monkeypatch.setattr(startup, "RUN", [])
    monkeypatch.setattr(startup, "COUNTS", one_call())
    with path.open("wb") as file:
        startup.name_file(str(path), file.fileno(), False)
        startup.RUN[0] = "0"  # this process is another
        startup.leave()
        assert len(startup.taken()) == 1
    other.write_text("someone's")
    other.rename(path)
    assert startup.open_file() is None
    monkeypatch.setattr(startup, "COUNTS", one_call())
    startup.leave()
    assert path.read_text() == "someone's"


def test_the_users_sitecustomize_and_path_are_as_without(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.mine = __name__, __file__")
    code = "import sitecustomize, sys; print(sys.mine, sys.path, sitecustomize.__file__)"
    expected = plain("-c", code, folder=tmp_path, PYTHONPATH=str(tmp_path))
    got = counted("-c", code, folder=tmp_path, PYTHONPATH=str(tmp_path))
    assert expected.returncode == got.returncode == 0
    assert got.stdout == expected.stdout


CANNOT_BE_REACHED = "reads PYTHONPATH, got -E, -I or -S"


@pytest.mark.parametrize("flag", ["ignore_environment", "no_site"])
def test_a_python_that_cannot_be_reached(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {"ignore_environment": 0, "no_site": 0} | {flag: 1}
    monkeypatch.setattr(sys, "flags", SimpleNamespace(**flags))
    with pytest.raises(SystemExit, match=CANNOT_BE_REACHED):
        launch.run(["script.py"])


@pytest.mark.parametrize(
    ("arguments", "reached"),
    [
        (["-E", "script.py"], False),
        (["-OI", "script.py"], False),
        (["-W", "error", "-X", "dev", "--check-hash-based-pycs", "never", "-S", "-c", "1"], False),
        (["script.py", "-E"], True),
        (["-c", "code", "-I"], True),
        (["-mmodule", "-S"], True),
        (["--version", "-S"], True),
        (["-"], True),
    ],
)
def test_options_that_keep_python_from_the_patch(
    arguments: list[str], reached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_by: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, command: run_by.append(command))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(startup, "open_file", lambda: True)  # another run counts
    monkeypatch.setattr(launch.subprocess, "call", lambda _: 0)
    monkeypatch.setattr(startup, "leave", int)
    monkeypatch.setattr(launch.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit, match="0" if reached else CANNOT_BE_REACHED):
        launch.run(arguments)
    assert [command[-len(arguments) :] for command in run_by] == [arguments] * reached


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--version"], 0, f"pyfused {pyfused.__version__}\n"),
        (
            ["run", "--help"],
            0,
            "usage: python -m pyfused run [--compare] (script | -m module | -c code | -)",
        ),
        (["run"], 2, "python -m pyfused run: error: expected a program\n"),
    ],
)
def test_what_the_command_says_itself(
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


# ---- patched, and counted ------------------------------------------------------------------------

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
    assert re.search(r"pyfused's kernels took [\d.]+ s of [\d.]+ s; torch's .*\n\Z", done.stderr)


CHILDREN = """
import multiprocessing, os, subprocess, sys, torch
from torch.utils.data import DataLoader

def work(times):
    for _ in range(times):
        torch.nn.ReLU()(torch.ones(3))

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        work(10_000)
        return index

if __name__ == "__main__":
    work(1)
    for times, method in ((10, "fork"), (100, "spawn"), (1000, "forkserver")):
        child = multiprocessing.get_context(method).Process(target=work, args=(times,))
        child.start()
        child.join()
    list(DataLoader(Data(), num_workers=2, multiprocessing_context="fork"))
    code = "import torch; torch.tanh(torch.ones(2))"
    subprocess.run([sys.executable, "-c", code], check=True)
    if not os.fork():
        torch.sigmoid(torch.ones(2))
        sys.exit()
    os.wait()
"""


@pytest.mark.slow
def test_child_processes_are_patched_and_counted(tmp_path: Path) -> None:
    (tmp_path / "children.py").write_text(CHILDREN)
    done = counted("children.py", folder=tmp_path)
    assert counts(done.stderr) == {"calls": 41_113}
    assert " in 8 processes" in done.stderr
    assert not list(tmp_path.glob("pyfused-run-*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [["torch.distributed.run", "--nproc-per-node", "2"], ["pyfused", "run"]]
)
def test_what_launches_processes(launcher: list[str], tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("import torch; torch.relu(torch.ones(2))")
    done = counted("-m", *launcher, "train.py", folder=tmp_path)
    count = 1 if "pyfused" in launcher else 2
    assert counts(done.stderr) == {"calls": count}


def test_a_thread_that_outlives_the_script_and_pyfused_imported_first(tmp_path: Path) -> None:
    code = """
import importlib.util, threading, time
importlib.util.find_spec("torch")
import pyfused, torch
def late(): time.sleep(0.2); torch.relu(torch.ones(2)); time.sleep(0.1); torch.relu(torch.ones(2))
threading.Thread(target=late).start()
"""
    done = counted("-c", code, folder=tmp_path)
    assert counts(done.stderr) == {"calls": 2}


def test_a_child_that_is_a_python_without_pyfused(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("")
    code = "import sys; sys.modules['pyfused'] = None; import torch; print(torch.__file__)"
    done = counted("-c", code, folder=tmp_path)
    assert done.stdout == f"{tmp_path}/torch.py\n"
    assert not counts(done.stderr)


def test_a_program_runs_where_torch_cannot_be_patched(tmp_path: Path) -> None:
    code = "import os; os.environ['PYFUSED_CPU_CAPABILITY'] = 'none'; import torch; print(1)"
    done = counted("-c", code, folder=tmp_path)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
    assert "pyfused: run: torch is not patched: ImportError" in done.stderr


def test_calls_of_formulas_are_counted(tmp_path: Path) -> None:
    code = """
import pyfused, torch
@pyfused.activation
def double(input): return 2 * input
for size in (5, 5, 1 << 20): double(torch.ones(size))
"""
    done = counted("-c", code, folder=tmp_path)
    assert counts(done.stderr) == {"__main__.double": 1}  # those that are not small


# ---- what it was worth ---------------------------------------------------------------------------


@pytest.fixture
def counted_here() -> Iterator[startup.Counts]:
    """What is counted of the test's calls: each takes a kernel if one can, and is compared."""
    counting = run.Counting(startup.Counts(), compare=True)
    counting.start()
    with fused_always():
        yield counting.counts
    counting.stop()
    assert not counting.counts.failed


X, TARGET = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "activation": lambda x: F.gelu(x, approximate="tanh"),
    "in place": lambda x: F.relu(x * 1, inplace=True),
    "loss": lambda x: F.cross_entropy(x, TARGET, torch.ones(5), ignore_index=1),
    "each": lambda x: F.mse_loss(x, X.flip(0), reduction="none"),
    "head": lambda x: F.linear_cross_entropy(x, X[:5], TARGET, softcap=3.0),
    "composed": lambda x: F.rmse_loss(x, X.flip(0)),
    "strided": lambda x: F.softmax(x.mT, 1),
}


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_repeated_call_is_compared_and_changes_nothing(
    call: Callable[[Tensor], Tensor], requires_grad: bool, counted_here: startup.Counts
) -> None:
    def results() -> tuple[Any, ...]:
        x = X.clone().requires_grad_(requires_grad)
        y = call(x)
        gradient = torch.autograd.grad(y.sum(), x)[0].tolist() if requires_grad else None
        return y.detach().tolist(), gradient, x._version, y._version, torch.get_rng_state().tolist()

    got = results()
    if counted_here.left:  # relu in place, which saves a kernel nothing
        assert call is CALLS["in place"]
        return
    ((key, calls),) = counted_here.kernels.items()
    assert (key[2], calls.count, calls.largest, calls.elements) == (requires_grad, 1, 30, 30)
    ((ours, theirs),) = calls.repeats
    assert ours > 0
    assert theirs > 0
    calls.due = math.inf
    assert got == results()


def within_checkpoint() -> None:
    x = X.clone().requires_grad_()
    checkpoint(lambda x: F.relu(x).exp(), x, use_reentrant=False).sum().backward()


def under_anomaly_detection() -> None:
    with torch.autograd.detect_anomaly(check_nan=False):
        F.relu(X)


def under_a_mode() -> None:
    with BaseTorchFunctionMode():
        F.relu(X)


def under_a_profiler() -> None:
    with profile(activities=[ProfilerActivity.CPU]):
        F.relu(X)


SEEN = {
    "checkpoint": within_checkpoint,
    "anomaly detection": under_anomaly_detection,
    "mode": under_a_mode,
    "vmap": lambda: torch.func.vmap(F.relu)(X),
    "subclass": lambda: F.relu(X.as_subclass(type("Mine", (Tensor,), {}))),
    "another device": lambda: F.relu(X.to("meta")),
    "warning of shapes": lambda: F.mse_loss(X, X[:1]),
    "warning of kl_div": lambda: F.kl_div(X, X),
    "warning of size_average": lambda: F.mse_loss(X, X, size_average=True),
    "warning of softmax": lambda: F.softmax(X),
    "inplace loss": lambda: F.cross_entropy(X.clone().requires_grad_() * 1, TARGET, inplace=True),
    "profiler": under_a_profiler,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("call", SEEN.values(), ids=SEEN.keys())
def test_a_call_is_not_repeated_where_that_is_seen(
    call: Callable[[], Any], counted_here: startup.Counts
) -> None:
    call()
    assert counted_here
    assert not [calls.repeats for calls in counted_here.kernels.values() if calls.repeats]


def test_a_large_call_is_cut_and_one_that_cannot_be_is_not_repeated(
    counted_here: startup.Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Size] = []
    seconds = run._seconds
    monkeypatch.setattr(run, "MOST", 12)
    monkeypatch.setattr(
        run, "_seconds", lambda f, given, i: (seen.append(given[0].shape), seconds(f, given, i))[1]
    )
    F.mse_loss(X, X)
    F.linear_cross_entropy(X, X[:4], TARGET % 4)
    assert set(seen) == {(3, 5)}
    assert all(calls.repeats for calls in counted_here.kernels.values())
    seen.clear()
    F.relu(torch.ones(1, 60))
    assert not seen


def test_a_repetition_that_fails_is_not_seen_and_is_the_last(
    counted_here: startup.Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(run, "_seconds", fails)
    assert F.relu(X).equal(X.relu())
    (calls,) = counted_here.kernels.values()
    assert (calls.count, calls.repeats, calls.due) == (1, [], math.inf)


@pytest.mark.parametrize("empty", [(0,), (5, 0, 0)])
def test_a_call_without_elements_is_counted(
    empty: tuple[int, ...], counted_here: startup.Counts
) -> None:
    for _ in range(3):
        assert F.softmax(torch.empty(empty), -1).shape == empty
    assert counted_here.small["softmax"] == 3


def test_an_error_of_counting_is_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("of counting")

    monkeypatch.setattr(run, "_elements", fails)
    with fused_always(), pyfused.report() as report:
        assert F.relu(X).equal(X.relu())
    assert str(report) == "not counted: relu: RuntimeError('of counting')"


def test_comparisons_take_a_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count().__next__  # one second between any two readings
    monkeypatch.setattr(run, "SHARE", 0.1)
    monkeypatch.setattr(run, "BEGINNING", 1)
    monkeypatch.setattr(run, "perf_counter", clock)
    with fused_always(), pyfused.report() as report:
        for _ in range(3000):
            F.relu(X)
    (kind,) = report._counts.kernels.values()
    assert 3 < len(kind.repeats) < 12  # of the calls 1, 2, 4, 8, ...
    assert report._counts.spent <= 0.1 * clock() + 30


def test_small_calls_and_others_that_are_left_to_torch_are_counted() -> None:
    with pyfused.patch(), pyfused.report() as report:
        for size in [5] * 90 + [7] * 10:
            torch.nn.functional.mse_loss(torch.zeros(size), torch.ones(size))
        torch.nn.functional.l1_loss(torch.zeros(1 << 20), torch.zeros(1 << 20, dtype=torch.int64))
    counts = report._counts
    assert counts.small == {"mse_loss": 100}
    assert counts.left == {("l1_loss", "target has dtype torch.int64"): 1}
    assert not counts.kernels
    assert "left to torch: l1_loss (1: target has dtype torch.int64), mse_loss (100: " in repr(
        report
    )


def test_compiled_calls_are_counted(counted_here: startup.Counts) -> None:
    x = X.clone().requires_grad_()
    options, of_head = CrossEntropyOptions(), HeadOptions()
    TORCH_OPS.cross_entropy(x, TARGET, None, *options.values()).backward()
    head = x, X[:4], None, TARGET % 4, None
    wanted = [True, False, False, False]
    TORCH_OPS.linear_cross_entropy(*head, *of_head.values(), wanted)[0].backward()
    TORCH_OPS.mse_loss(x, X, None, None, "mean", None).backward()
    assert counted_here.compiled == {"cross_entropy": 1, "linear_cross_entropy": 1, "mse_loss": 1}


def test_the_report_of_a_block() -> None:
    x, target = torch.randn(64, 5000, requires_grad=True), torch.zeros(64).long()
    with pyfused.patch(), pyfused.report() as report:
        for _ in range(3):
            torch.nn.functional.cross_entropy(x, target).backward()
    torch.nn.functional.cross_entropy(x, target)  # which is not in the block
    with pyfused.patch():
        torch.nn.functional.cross_entropy(x, target)
    assert counts(str(report)) == {"cross_entropy": 3}
    assert "estimated from calls that both made again: 2)" in str(report)


def summary(
    *processes: float, kernels: Any = (), small: Any = (), left: Any = (), compiled: Any = ()
) -> list[list[str]]:
    found = startup.Counts()
    found.add(kernels, dict(small), left, dict(compiled))
    assert found.as_json(1.0).startswith("[1.0, [")
    return [re.split("  +", line) for line in found.summary([*processes]).splitlines()]


KERNELS = [
    (("cross_entropy", 20, True), (1000, 1000, 10**6, [(2e-6, 9e-6), (1e-6, 8e-6), (1e-5, 1e-4)])),
    (("relu", 20, True), (1000, 10, 10**4, [(1e-6, 1e-6)])),
    (("relu", 22, True), (9000, 10, 10**5, [])),  # as the nearest kind
]
HEADER = ["operator", "calls", "largest input", "pyfused", "torch"]


def test_the_summary_says_what_was_gained() -> None:
    assert summary(40.0, 20.0, kernels=KERNELS, small={"relu": 1200}) == [
        HEADER,
        ["cross_entropy", "1,000", "1,000", "2.0 s", "9.0 s"],
        ["relu", "20", "9,000", "0.110 s", "0.110 s"],
        [f"left to torch: relu (1,200: {startup.SMALL})"],
        [
            (
                "pyfused's kernels took 2.1 s of 60 s in 2 processes; torch's operators would have "
                "taken 9.1 s (estimated from calls that both made again: 4)"
            )
        ],
    ]


def test_the_summary_never_gives_a_total_of_what_was_not_compared() -> None:
    tanh = (("tanh", 20, True), (5, 1, 5, []))
    *_, unknown, last = summary(60.0, kernels=[*KERNELS, tanh], compiled={"gelu": 3})
    assert unknown == ["not compared: tanh (1), gelu (3, compiled)"]
    assert last[0].startswith("pyfused's kernels took at least 2.1 s of 60 s; torch's operators ")
    assert "would have taken at least 9.1 s" in last[0]
    assert summary(60.0, kernels=[tanh])[1:] == [
        ["tanh", "1", "5", "-", "-"],
        ["not compared: tanh (1)"],
    ]


def test_the_summary_is_one_line_where_nothing_is_gained() -> None:
    assert startup.SMALL == reasons.SMALL
    nothing = "pyfused: nothing gained: "
    small = f"{nothing}ATen is faster at the size of all calls (1,200), in 60 s"
    assert summary(60.0, small={"relu": 1200}) == [[small]]
    assert summary() == [["pyfused: no calls of its losses and activations"]]
    dtype = [(("relu", "input has dtype torch.int64"), 1)]
    left = "left to torch: relu (1: input has dtype torch.int64)"
    assert summary(60.0, left=dtype) == [[left], [f"{nothing}no kernel ran, in 60 s"]]


WARNS = """
import sys, warnings, torch.nn.functional as F, torch
x = torch.ones(2, 2)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    F.softmax(x); F.log_softmax(x); F.softmin(x); torch.nn.Softmax()(x)
print([(each.filename, each.lineno) for each in seen])
"""


def test_warnings_name_the_same_lines(tmp_path: Path) -> None:
    (tmp_path / "warns.py").write_text(WARNS)
    expected = plain("warns.py", folder=tmp_path)
    got = counted("warns.py", folder=tmp_path)
    assert expected.stdout.count("warns.py', 6") == 3
    assert got.stdout == expected.stdout
