"""`python -m pyfused run`: the program runs as by itself, patched, and its calls are counted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import pyfused
from pyfused import __main__ as main
from pyfused import run
from pyfused.backends import cpu

Done = subprocess.CompletedProcess[str]
SECONDS = 120  # far beyond what it takes, so that only a hang is cut short
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def counts(stderr: str) -> dict[str, int]:
    """How often the summary says that each operator was called."""
    lines = re.findall(r"^ +([\d,]+)  ([\w.]+)", stderr, re.MULTILINE)
    found: dict[str, int] = {}
    for number, name in lines:
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


def counted(*arguments: str, folder: Path, stdin: str = "", **environment: str) -> Done:
    """By what the command calls, in a fork of this process, which has imported torch already."""
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
            sys.argv = ["pyfused/__main__.py", "run", *arguments]
            sys.orig_argv = [sys.executable, "-m", "pyfused", "run", *arguments]
            run.tempfile.tempdir = None
            main.main()
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
    assert summary != bool(list(tmp_path.glob("pyfused-run-*")))


def test_the_users_sitecustomize_and_path_are_as_without(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.mine = __name__, __file__")
    code = "import sitecustomize, sys; print(sys.mine, sys.path, sitecustomize.__file__)"
    expected = plain("-c", code, folder=tmp_path, PYTHONPATH=str(tmp_path))
    got = counted("-c", code, folder=tmp_path, PYTHONPATH=str(tmp_path))
    assert expected.returncode == got.returncode == 0
    assert got.stdout == expected.stdout


@pytest.mark.parametrize("flag", ["ignore_environment", "no_site"])
def test_a_python_that_cannot_be_reached(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {"ignore_environment": 0, "no_site": 0} | {flag: 1}
    monkeypatch.setattr(sys, "flags", SimpleNamespace(**flags))
    with pytest.raises(SystemExit, match="reads PYTHONPATH, got -E, -I or -S"):
        run.run(["script.py"])


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--version"], 0, f"pyfused {pyfused.__version__}\n"),
        (["run", "--help"], 0, "usage: python -m pyfused run (script | -m module | -c code | -)"),
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
F.relu(torch.zeros(1 << 23))
torch.relu_(torch.zeros(2))
for _ in range(12):
    F.cosine_embedding_loss(x, x, torch.ones(4))
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
    return F.gelu(x) * torch.tanh(x) + F.softplus(x) + F.silu(x)
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
        "tanh": 2,
        "relu": 2,
        "gelu": 1,
        "leaky_relu": 1,
        "silu": 1,
        "torch.nn.functional.cosine_embedding_loss": 12,
        "torch.nn.functional.softplus": 1,
    }
    assert f"relu: cpu {cpu.supported[-1]}" in done.stderr


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
    assert counts(done.stderr) == {"relu": 41_111, "sigmoid": 1, "tanh": 1}
    assert not list(tmp_path.glob("pyfused-run-*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [["torch.distributed.run", "--nproc-per-node", "2"], ["pyfused", "run"]]
)
def test_what_launches_processes(launcher: list[str], tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("import torch; torch.relu(torch.ones(2))")
    done = counted("-m", *launcher, "train.py", folder=tmp_path)
    count = 1 if "pyfused" in launcher else 2
    assert counts(done.stderr) == {"relu": count}


def test_a_thread_that_outlives_the_script_and_pyfused_imported_first(tmp_path: Path) -> None:
    code = """
import importlib.util, threading, time
importlib.util.find_spec("torch")
import pyfused, torch
def late(): time.sleep(0.2); torch.relu(torch.ones(2)); time.sleep(0.1); torch.relu(torch.ones(2))
threading.Thread(target=late).start()
"""
    done = counted("-c", code, folder=tmp_path)
    assert counts(done.stderr) == {"relu": 2}


def test_a_child_that_is_a_python_without_pyfused(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("")
    code = "import sys; sys.modules['pyfused'] = None; import torch; print(torch.__file__)"
    done = counted("-c", code, folder=tmp_path)
    assert done.stdout == f"{tmp_path}/torch.py\n"
    assert not counts(done.stderr)
