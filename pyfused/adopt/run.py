"""Runs a program as ``python`` does, but patched: ``python -m pyfused run train.py``."""

from __future__ import annotations

import atexit
import builtins
import io
import os
import pkgutil
import runpy
import sys
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader, SourcelessFileLoader
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
    report, process, main = Report(), os.getpid(), ModuleType("__main__")

    def end() -> None:
        has_started = hasattr(main, "__file__")
        if has_started and os.getpid() == process:  # not in a forked child
            report.__exit__()
            ranks = int(os.environ.get("WORLD_SIZE", "1"))
            if ranks > 1:
                _print_error(f"pyfused: rank 0 of {ranks}:")
            _print_error(str(report))
            if keep:
                _print_error(_kept())

    if keep and not memory.why_not_kept():
        memory.keep()
    patch().__enter__()  # also for threads and exit handlers that outlive the program
    if os.environ.get("RANK", "0") == "0":
        report.__enter__()
        atexit.register(end)  # registered first, so called last
    # As with `python`, `__main__` remains until the process ends: threads and exit handlers that
    # outlive the program pickle its classes by name.
    for name, value in (("__annotations__", {}), ("__cached__", None)):
        if hasattr(sys.modules["__main__"], name):  # depends on the version of Python
            setattr(main, name, value)
    main.__builtins__ = builtins  # type: ignore[attr-defined]
    sys.modules["__main__"] = main
    sys.argv[:] = program, *arguments
    if module:
        runpy._run_module_as_main(program)  # type: ignore[attr-defined]
        return
    path = Path(program).absolute()
    has_main = pkgutil.get_importer(str(path)) is not None  # a folder or an archive
    if not getattr(sys.flags, "safe_path", sys.flags.isolated):  # -m has added a folder
        sys.path[:1] = [] if has_main else [str(path.resolve().parent)]
    if has_main:
        sys.path.insert(0, str(path))
        runpy._run_module_as_main("__main__", alter_argv=False)  # type: ignore[attr-defined]
        return
    try:
        with io.open_code(str(path)) as file:
            content = file.read()  # once: a pipe cannot be read again
    except OSError as error:
        reason = f"[Errno {error.errno}] {error.strerror}"
        _print_error(f"{sys.executable}: can't open file {str(path)!r}: {reason}")
        sys.exit(2)
    code = pkgutil.read_code(io.BytesIO(content))
    loader = SourceFileLoader if code is None else SourcelessFileLoader
    if code is None:
        code = compile(content, path, "exec", dont_inherit=True)
    main.__file__, main.__loader__ = str(path), loader("__main__", str(path))
    exec(code, vars(main))


def _print_error(line: str) -> None:
    if sys.stderr is not None:  # its descriptor was closed; print would write to stdout
        print(line, file=sys.stderr)


def _kept() -> str:
    """Returns a line of the report: whether freed memory is kept when the program ends."""
    stats, reason = memory.stats(), memory.why_not_kept()
    if stats.keeps:
        return "pyfused: freed memory was kept; --no-keep returns it to the system"
    if reason is None:
        return "pyfused: freed memory was not kept: the program has called keep(False)"
    state = "kept without keep()" if stats.pages_are_kept else "not kept"
    return f"pyfused: freed memory was {state}: {reason}"
