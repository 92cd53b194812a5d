"""Importing pyfused defines functions and classes, and has no side effects."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import python

pytestmark = [pytest.mark.cpu, pytest.mark.thresholds]

IMPORT = """
import atexit, logging, os, signal, sys, threading, warnings
import torch
import torch._dynamo.config, torch._functorch.config, torch._inductor.config

CHANGES = ("subprocess.", "socket.", "shutil.", "tempfile.", "os.exec", "os.fork", "os.posix_spawn",
           "os.system", "os.putenv", "os.mkdir", "os.remove", "os.rename", "os.chdir", "os.kill")
changed = []

def audit_hook(event, arguments):
    is_bad = event.startswith(CHANGES)
    if event == "open":
        is_bad = str(arguments[0]).startswith(os.environ["HOME"])
    elif event in ("exec", "compile"):  # excludes the import system and decorators of Python
        is_bad = sys._getframe(1).f_globals["__name__"].startswith("pyfused")
    if is_bad:
        changed.append(f"{event} {arguments}")

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

before, modules = state(), {*sys.modules}
sys.addaudithook(audit_hook)
import pyfused
after = state()
changed += [key for key in before if before[key] != after[key]]
operators = [x for x in torch._C._dispatch_get_all_op_names() if x.startswith("pyfused_")]
assert any("linear_cross_entropy" in name for name in operators)  # for saved programs
pyfused.convert(torch.nn.ReLU())
hooks = sys.modules["torch.optim.optimizer"]._global_optimizer_pre_hooks
changed += [name for name in {*sys.modules} - {*modules, "torch.utils._device"}
            if not f"{name}.".startswith("pyfused.")] + [*map(repr, hooks)]
print(changed)
"""


def test_importing_has_no_side_effects(tmp_path: Path) -> None:
    """It reads no file of the user, calls neither exec nor compile, and loads no other package."""
    done = python(IMPORT, HOME=str(tmp_path), XDG_CACHE_HOME="")
    assert (done.stdout, done.stderr) == ("[]\n", "")


# ---- the order of imports ------------------------------------------------------------------------

LAYERS = (  # each layer may import from itself and from earlier layers
    ("types", "layout", "locks", "torch_internals"),
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
FILES = [*ROOT.glob("pyfused/*.py"), *ROOT.glob("pyfused/*/*.py"), *ROOT.glob("kernels/*.py")]


def imported(file: Path) -> Iterator[str]:
    """Yields the modules and subpackages of pyfused that a file imports, also within functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:  # kernels have relative imports
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (x.split(".")[1] for x in names if x.startswith("pyfused."))


@pytest.mark.parametrize("file", FILES, ids=[str(x.relative_to(ROOT)) for x in FILES])
def test_imports_follow_the_layers(file: Path) -> None:
    folder = file.relative_to(ROOT).parts[-2]
    level = LEVELS[file.stem if folder == "pyfused" else folder]
    names = {*imported(file)}
    assert [name for name in names if LEVELS.get(name, 0) > level] == []
