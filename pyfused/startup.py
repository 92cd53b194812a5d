"""What Python runs as ``sitecustomize`` in each process of ``python -m pyfused run``.

It stands in a folder of that run's, to which child processes bring their counts. torch and pyfused
are imported when the program imports either: many a child process needs neither.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import shutil
import sys
import time
from collections import Counter
from multiprocessing import util
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
FIRST = os.environ.get("PYFUSED_RUN")  # the process that prints
COUNTS: dict[str, Counter[str]] = {
    "pyfused: calls and the paths they took": Counter(),
    "losses and activations that pyfused does not have": Counter(),
}


def leave() -> None:
    """Where a process ends: a child brings its counts, and the first prints all."""
    if str(os.getpid()) == FIRST:
        for file in FOLDER.glob("*.json"):
            for title, counts in json.loads(file.read_text()).items():
                COUNTS[title].update(counts)
        shutil.rmtree(FOLDER, ignore_errors=True)
        print(summary(), file=sys.stderr)
    elif any(COUNTS.values()) and FOLDER.exists():
        file = FOLDER / f"{os.getpid()}-{time.time_ns()}"
        file.write_text(json.dumps(COUNTS))
        file.rename(file.with_suffix(".json"))
    forget()


def forget() -> None:
    for counts in COUNTS.values():
        counts.clear()


def summary() -> str:
    lines: list[str] = []
    for title, counts in COUNTS.items():
        if counts or not lines:
            table = [f"{count:>9,}  {name}" for name, count in counts.most_common()]
            lines += [title, *(table or ["     none"])]
    return "\n".join(lines)


class AfterTorch:
    """Finds torch and pyfused as others do, and starts counting once both have been imported."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in ("torch", "pyfused"):
            return None
        found = (f.find_spec(name, path, target) for f in sys.meta_path if f is not cls)
        spec: Any = next((spec for spec in found if spec and spec.loader), None)
        if spec is not None:
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (execute(module), cls.after(name))
        return spec

    @staticmethod
    def after(name: str) -> None:
        if name == "pyfused":
            importlib.import_module("pyfused.run").start(*COUNTS.values())
        else:
            with contextlib.suppress(ImportError):  # a child may be another Python
                importlib.import_module("pyfused")  # which may be what imports torch


if __name__ == "sitecustomize":
    # The program is to find sys.path and sitecustomize as they are without this one.
    sys.path[:] = [entry for entry in sys.path if entry != str(FOLDER)]
    this = sys.modules.pop(__name__)
    try:
        importlib.import_module(__name__)
    except ImportError as error:
        if error.name != __name__:
            raise
    sys.modules.setdefault(__name__, this)
    sys.meta_path.insert(0, AfterTorch)
    atexit.register(leave)  # the first, and so the last to be called
    if str(os.getpid()) != FIRST:
        util.Finalize(None, leave, exitpriority=0)
    # multiprocessing's forked children forget what was registered, and skip atexit.
    os.register_at_fork(after_in_child=forget)
    util.register_after_fork(leave, lambda _: util.Finalize(None, leave, exitpriority=0))
