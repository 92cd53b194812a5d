"""Importing pyfused defines functions and classes, and has no side effects."""

from __future__ import annotations

import ast
import json
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
from processes import python

import pyfused

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
        "operators of others": {name for name in torch._C._dispatch_get_all_op_names()
                                if not name.startswith("pyfused_")},
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
before, modules = state(), {*sys.modules}
sys.addaudithook(audit_hook)
import pyfused
recording = False
after = state()
changed += [key for key in before if before[key] != after[key]]
pyfused.convert(torch.nn.ReLU())
hooks = sys.modules["torch.optim.optimizer"]._global_optimizer_pre_hooks
changed += [name for name in {*sys.modules} - {*modules, "torch.utils._device"}
            if not f"{name}.".startswith("pyfused.")] + [*map(repr, hooks)]
json.dump({"opened": opened, "executed": executed, "changed": changed}, sys.stdout)
"""


def run_audited(code: str, home: Path) -> Any:
    process = python(AUDIT + code, HOME=str(home), XDG_CACHE_HOME="")
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_importing_has_no_side_effects(tmp_path: Path) -> None:
    """It reads no file of the user, calls neither exec nor compile, and loads no other package."""
    result = run_audited(IMPORT, tmp_path)
    assert any("pyfused" in path for path in result["opened"])  # pyfused's files
    assert not [path for path in result["opened"] if path.startswith(str(tmp_path))]
    assert (result["changed"], result["executed"]) == ([], [])


# ---- the order of imports ------------------------------------------------------------------------

LAYERS = (  # each layer may import from itself and from earlier layers
    ("types", "layout", "torch_internals"),
    ("checks",),
    ("formula_compiler",),
    ("kernels",),
    ("backends",),
    ("memory",),
    ("dispatch",),
    ("ops",),
    ("functional", "nn", "formula", "vocab_parallel"),
    ("adopt",),
    ("__init__",),
    ("__main__",),
)
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}
ROOT = Path(__file__).parents[2]


def imports(in_functions: bool) -> dict[str, set[str]]:
    """Returns the modules that each module imports, optionally also within functions."""
    files = {
        ".".join((folder, *file.relative_to(ROOT / where).with_suffix("").parts)): file
        for where, folder in (("pyfused", "pyfused"), ("kernels", "pyfused.kernels"))
        for file in (ROOT / where).rglob("*.py")
        if "kernels" not in file.relative_to(ROOT / where).parts
    }
    modules = {name.removesuffix(".__init__") if name.count(".") > 1 else name for name in files}
    found = {}
    for name, file in files.items():
        package, targets = name.rsplit(".", 1)[0], set()
        tree = ast.parse(file.read_text())
        later = {n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
        for node in ast.walk(tree):
            if node in later and not in_functions:
                continue
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = f"{package}.{node.module or ''}" if node.level else node.module or ""
                base = base.strip(".")
                for alias in node.names:
                    whole = f"{base}.{alias.name}"
                    targets.add(whole if whole in modules else base)
        own = name.removesuffix(".__init__") if name.count(".") > 1 else name
        found[own] = {target for target in targets if target in modules} - {own}
    return found


def level(module: str) -> int:
    return LEVELS[module.split(".")[1]]


def test_imports_follow_the_layers_without_cycles() -> None:
    graph = imports(in_functions=True)
    assert len(graph) > 50
    assert pyfused.__name__ == "pyfused"
    up = [f"{a} imports {b}" for a, of in graph.items() for b in of if level(b) > level(a)]
    assert not up, "\n".join(sorted(up))
    TopologicalSorter(imports(in_functions=False)).prepare()  # raises for a cycle
