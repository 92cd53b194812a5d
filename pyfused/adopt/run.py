"""Runs a program as ``python`` does, but patched: ``python -m pyfused run train.py``."""

from __future__ import annotations

import atexit
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from pyfused import memory
from pyfused.adopt.patch import patch
from pyfused.dispatch.report import Report


def run(program: str, arguments: Sequence[str], module: bool, keep: bool = True) -> None:
    """Runs a program with torch patched, and prints a report to stderr when the process ends.

    If ``torchrun`` starts several processes, all are patched, and rank 0 counts and prints.

    Args:
        program: The path of a script, a folder or an archive, or the name of a module.
        module: Whether ``program`` is the name of a module.
        keep: Whether to keep the memory that the program frees, if that is possible.
    """
    report, process = Report(), os.getpid()

    def end() -> None:
        if os.getpid() != process or sys.stderr is None:  # a forked child, or stderr is closed
            return
        report.__exit__()
        print(report, file=sys.stderr)
        if keep and memory.stats().keeps:
            text = "pyfused: freed memory was kept; --no-keep returns it to the system"
            print(text, file=sys.stderr)

    if keep and not memory.why_not_kept():
        memory.keep()
    patch().__enter__()  # a block: the program's calls of unpatch() do not end it
    if os.environ.get("RANK", "0") == "0":
        report.__enter__()
        atexit.register(end)  # registered first, so called last
    # Spawned processes pickle the program's classes as __mp_main__.Name. multiprocessing, already
    # imported by torch, has set this name to the __main__ before the program.
    main = ModuleType("__mp_main__")
    vars(main)["__getattr__"] = lambda name: getattr(sys.modules["__main__"], name)
    sys.modules["__mp_main__"] = main
    sys.argv[:] = program, *arguments
    if module:
        names = runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        path = Path(program)
        if not getattr(sys.flags, "safe_path", sys.flags.isolated):  # -m has added this folder
            sys.path[0] = str(path.resolve() if path.is_dir() else path.resolve().parent)
        names = runpy.run_path(str(path.absolute()), run_name="__main__")  # __file__ is absolute
    # Threads and atexit functions may still pickle the program's classes.
    vars(sys.modules["__main__"]).update(names)
