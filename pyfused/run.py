"""Runs a script under :func:`pyfused.patch`, and counts: ``python -m pyfused run script.py``."""

from __future__ import annotations

import functools
import runpy
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyfused import functional
from pyfused.explain import explain
from pyfused.ops.dispatch import compiler_traces
from pyfused.patch import patch

Paths = Counter[str]


def counted(op: str, paths: Paths) -> Callable[..., Any]:
    """The operator, which counts the path of each call."""
    function = getattr(functional, op)

    def call(*args: Any, **kwargs: Any) -> Any:
        if compiler_traces():  # it is called while it is traced, and not when it runs
            return function(*args, **kwargs)
        try:
            path = str(explain(op, *args, **kwargs))
        except TypeError:
            return function(*args, **kwargs)  # raises it, too
        result = function(*args, **kwargs)
        paths[path] += 1
        return result

    return functools.update_wrapper(call, function)


def run(script: str, arguments: list[str]) -> None:
    """Runs a script as ``python script.py arguments`` would, and prints what its calls took.

    The summary goes to the standard error, also where the script raises or exits.
    """
    paths: Paths = Counter()
    for op in functional.__all__:
        setattr(functional, op, counted(op, paths))
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent.resolve())
    try:
        with patch():
            runpy.run_path(script, run_name="__main__")
    finally:
        print(summary(paths), file=sys.stderr)


def summary(paths: Paths) -> str:
    lines = [f"{count:>9,}  {path}" for path, count in paths.most_common()]
    return "\n".join(["pyfused: calls and the paths they took", *(lines or ["     none"])])
