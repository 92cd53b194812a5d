"""Importing pyfused defines functions and classes, and has no side effects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from processes import python

pytestmark = [pytest.mark.cpu, pytest.mark.thresholds]

AUDIT = """
import atexit, json, logging, os, signal, sys, threading, warnings
import torch
import torch._dynamo.config, torch._functorch.config, torch._inductor.config

CHANGES = ("subprocess.", "socket.", "shutil.", "tempfile.", "os.exec", "os.fork", "os.posix_spawn",
           "os.system", "os.putenv", "os.mkdir", "os.remove", "os.rename", "os.chdir", "os.kill")
opened, executed, changed = [], [], []
recording = True

def audit_hook(event, arguments):
    if not recording:
        return
    if event == "open":
        opened.append(str(arguments[0]))
    elif event.startswith(CHANGES):
        changed.append(f"{event} {arguments}")
    elif event in ("exec", "compile"):  # excludes the import system and decorators of Python
        caller = sys._getframe(1)
        if caller.f_globals["__name__"].startswith("pyfused"):
            executed.append(f"{event} in {caller.f_globals['__name__']}")

def state():
    return {
        "operators": torch._C._dispatch_get_all_op_names(),
        "settings": [getattr(torch, name).config.save_config().hex()
                     for name in ("compiler", "_dynamo", "_functorch", "_inductor")],
        "global state": [str(torch.get_default_dtype()), torch.get_num_threads(),
                    torch.are_deterministic_algorithms_enabled(), torch.get_rng_state().tolist()],
        "environment": dict(os.environ),
        "import system": [sys.argv, sys.path, *map(repr, (sys.meta_path, sys.path_hooks))],
        "exit handlers": atexit._ncallbacks(),
        "signals": [repr(signal.getsignal(number)) for number in signal.valid_signals()],
        "threads": threading.active_count(),
        "warnings": repr(warnings.filters),
        "logging": repr(logging.getLogger().handlers),
    }
"""
IMPORT = """
before = state()
sys.addaudithook(audit_hook)
import pyfused
recording = False
after = state()
changed += [key for key in before if before[key] != after[key]]
json.dump({"opened": opened, "executed": executed, "changed": changed}, sys.stdout)
"""


def run_audited(code: str, home: Path) -> Any:
    process = python(AUDIT + code, HOME=str(home), XDG_CACHE_HOME="")
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_importing_has_no_side_effects(tmp_path: Path) -> None:
    """It reads no file of the user, and calls neither exec nor compile."""
    result = run_audited(IMPORT, tmp_path)
    assert any("pyfused" in path for path in result["opened"])  # pyfused's files
    assert not [path for path in result["opened"] if path.startswith(str(tmp_path))]
    assert (result["changed"], result["executed"]) == ([], [])


OPERATORS = """
import pyfused
import pyfused.functional as F

def registered():
    return sum(name.startswith("pyfused_") for name in torch._C._dispatch_get_all_op_names())

x, input = torch.randn(300, 1000, requires_grad=True), torch.randn(300, 8, requires_grad=True)
target, weight = torch.zeros(300, dtype=torch.int64), torch.ones(1000, 8)
steps = {
    "F.cross_entropy": (x, lambda x: F.cross_entropy(x, target)),
    "torch.nn.functional": (x, lambda x: torch.nn.functional.cross_entropy(x, target)),
    "F.linear_cross_entropy": (input, lambda x: F.linear_cross_entropy(x, weight, target)),
    "F.log_probs": (x, lambda x: F.log_probs(x, target).log_probability.sum()),
    "F.rmse_loss": (x, lambda x: F.rmse_loss(x.repeat(64, 1), x.detach().repeat(64, 1) + 1)),
}
missing = []
with pyfused.patch():
    for x, step in steps.values():
        step(x).backward()
    before = registered()
    for name, (x, step) in steps.items():
        with pyfused.report() as report:
            torch.compile(step, backend="eager", fullgraph=True)(x).backward()
        missing += [] if "in compiled programs: " in str(report) else [name]
json.dump([before, registered() > 0, missing], sys.stdout)
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_operators_are_registered_when_first_compiled(tmp_path: Path) -> None:
    assert run_audited(OPERATORS, tmp_path) == [0, True, []]
