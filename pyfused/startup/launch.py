"""The command ``python -m pyfused run``, which needs no torch: it becomes another Python."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from pyfused.startup import sitecustomize

COMPARE = "--compare"


def asked() -> list[str] | None:
    """Returns what this Python was given after ``-m pyfused run``, None if it was given another."""
    mine = sys.argv[:2] == ["-m", "run"] and sys.argv[2:] not in ([], ["-h"], ["--help"])
    if mine and sys.orig_argv[-len(sys.argv)] in ("pyfused", "-mpyfused"):
        return sys.argv[2:]
    return None


def run(arguments: list[str]) -> None:
    """Becomes ``python`` with these arguments, patched and counting, and so do its children.

    It prints what the calls took, to the standard error, when it ends.
    """
    compare = arguments[:1] == [COMPARE]
    arguments = arguments[compare:]
    flags = sys.flags.ignore_environment or sys.flags.no_site
    if flags or not _reads_environment(arguments):
        raise SystemExit("pyfused: run: expected a Python that reads PYTHONPATH, got -E, -I or -S")
    if sitecustomize.open_file() is None:  # else another run counts, as its child
        descriptor, path = tempfile.mkstemp(prefix="pyfused-run-")
        unnamed = Path(f"/proc/{os.getpid()}/fd/{descriptor}")
        if unnamed.exists():  # on Linux: the file ends with the last process that has it open
            Path(path).unlink()
            os.set_inheritable(descriptor, True)
            path = str(unnamed)
        sitecustomize.name_file(path, descriptor, compare)
        folder, others = Path(sitecustomize.__file__).parent, os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = f"{folder}{os.pathsep}{others}" if others else str(folder)
    # What python was given before "-m pyfused run".
    options = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv)]
    if options[-1:] == ["-m"]:
        options.pop()
    command = [sys.executable, *options, *arguments]
    if sys.platform != "win32":
        os.execv(sys.executable, command)
    # Windows cannot replace a process: the program is a child, and this one prints.
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the program answers it
    code = subprocess.call(command)
    sitecustomize.leave()
    sys.exit(code)


def _reads_environment(arguments: list[str]) -> bool:
    """Returns whether Python with these arguments reads PYTHONPATH and imports sitecustomize."""
    import getopt  # for this command alone

    try:
        options, _ = getopt.getopt(
            arguments, "bBdEhiIOPqRsSuvVxc:m:W:X:?", ["check-hash-based-pycs="]
        )
    except getopt.GetoptError:  # Python says what is wrong with them
        return True
    for option, _ in options:
        if option in ("-c", "-m"):  # what follows is the program's
            return True
        if option in ("-E", "-I", "-S"):
            return False
    return True
