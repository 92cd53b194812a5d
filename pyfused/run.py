"""Runs a program under :func:`pyfused.patch`, and counts: ``python -m pyfused run script.py``."""

from __future__ import annotations

import functools
import os
import shutil
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyfused import functional
from pyfused.explain import path_of
from pyfused.ops import dispatch
from pyfused.ops.declaration import Arguments, Operator
from pyfused.ops.dispatch import compiler_traces
from pyfused.ops.operators import OPERATORS
from pyfused.ops.originals import original
from pyfused.patch import C_FUNCTIONS, code_calling, patch, stands_for

Calls = Counter[str]

_LOSSES = (
    *(name for name in dir(F) if name.endswith("_loss")),
    *("binary_cross_entropy", "binary_cross_entropy_with_logits", "kl_div", "linear_cross_entropy"),
)
_ACTIVATIONS = (
    *("celu", "elu", "gelu", "glu", "gumbel_softmax", "hardshrink", "hardsigmoid", "hardswish"),
    *("hardtanh", "leaky_relu", "log_softmax", "logsigmoid", "mish", "prelu", "relu6", "rrelu"),
    *("selu", "silu", "softmax", "softmin", "softplus", "softshrink", "softsign", "tanh"),
    *("tanhshrink", "threshold"),
)


def counted(paths: Calls) -> Callable[..., Tensor]:
    """:func:`pyfused.ops.dispatch.call`, which counts the path of each call."""
    function = dispatch.call

    def call(op: Operator, arguments: Arguments, inplace: bool = False, *patched: Any) -> Any:
        if compiler_traces():  # it is called while it is traced, and not when it runs
            return function(op, arguments, inplace, *patched)
        try:
            path = str(path_of(op, arguments, inplace))
        except (AttributeError, TypeError):
            return function(op, arguments, inplace, *patched)  # raises it, too
        result = function(op, arguments, inplace, *patched)
        paths[path] += 1
        return result

    return call


# ---- what pyfused does not have ------------------------------------------------------------------


def count_others(missing: Calls) -> None:
    """Makes torch's losses and activations count their calls, for the rest of the process.

    They stay the objects that they are, as under :func:`pyfused.patch`, where they are no
    built-ins. No mode counts: with one active pyfused's own operators would be torch's.
    """
    inside = threading.local()  # of the outermost call, which is the program's
    for owner, name in _places():
        torch_function = getattr(owner, name)
        path = f"{'torch.Tensor' if owner is Tensor else owner.__name__}.{name}"
        call = _counting(path, original(torch_function), missing, inside)
        if not isinstance(torch_function, FunctionType):
            stands_for(torch_function, call)
            call.__module__, _, call.__qualname__ = path.rpartition(".")
            if owner is Tensor:
                call.__module__, call.__qualname__ = "torch", f"Tensor.{name}"
            setattr(owner, name, call)
        elif torch_function.__globals__ is vars(F):
            code = torch_function.__code__
            by_place = code.co_varnames[: code.co_argcount]
            by_name = code.co_varnames[len(by_place) :][: code.co_kwonlyargcount]
            arguments = ", ".join((*by_place, *(f"{name}={name}" for name in by_name)))
            torch_function.__code__ = code_calling(call, f"callee({arguments})", code)


def _places() -> Iterator[tuple[Any, str]]:
    for name in _LOSSES:
        if name not in OPERATORS:
            yield F, name
    for owner in (F, torch, Tensor):
        for name in _ACTIVATIONS:
            for spelled in (name, f"{name}_"):
                is_one = isinstance(getattr(owner, spelled, None), (FunctionType, *C_FUNCTIONS))
                if name not in OPERATORS and is_one:
                    yield owner, spelled


def _counting(
    path: str, torch_function: Callable[..., Any], missing: Calls, inside: threading.local
) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if compiler_traces() or getattr(inside, "call", False):
            return torch_function(*args, **kwargs)
        inside.call = True
        try:
            result = torch_function(*args, **kwargs)
        finally:
            inside.call = False
        missing[path] += 1
        return result

    return functools.update_wrapper(call, torch_function)


# ---- the program ---------------------------------------------------------------------------------


def run(arguments: list[str]) -> None:
    """Becomes ``python`` with these arguments, patched and counting, and so do its children.

    It prints what the calls took, to the standard error, when it ends.
    """
    if sys.flags.ignore_environment or sys.flags.no_site:
        raise SystemExit("pyfused: run: expected a Python that reads PYTHONPATH, got -E, -I or -S")
    if "PYFUSED_RUN" not in os.environ:  # else another run counts, as its child
        folder = tempfile.mkdtemp(prefix="pyfused-run-")
        shutil.copy(Path(__file__).with_name("startup.py"), Path(folder, "sitecustomize.py"))
        path = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = folder + (f"{os.pathsep}{path}" if path else "")
        os.environ["PYFUSED_RUN"] = str(os.getpid())
    # What python was given before "-m pyfused run".
    options = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv) - 1]
    os.execv(sys.executable, [sys.executable, *options, *arguments])


def start(paths: Calls, missing: Calls) -> None:
    """Patches this process and counts, until it ends."""
    dispatch.call = counted(paths)
    setattr(functional, "call", dispatch.call)  # noqa: B010 it is there by name
    count_others(missing)
    patch().__enter__()
