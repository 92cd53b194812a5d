"""Runs a script under :func:`pyfused.patch`, and counts: ``python -m pyfused run script.py``."""

from __future__ import annotations

import functools
import runpy
import sys
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
from pyfused.ops.torchs import original
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

    def call(op: Operator, arguments: Arguments, inplace: bool = False) -> Tensor:
        if compiler_traces():  # it is called while it is traced, and not when it runs
            return function(op, arguments, inplace)
        try:
            path = str(path_of(op, arguments, inplace))
        except (AttributeError, TypeError):
            return function(op, arguments, inplace)  # raises it, too
        result = function(op, arguments, inplace)
        paths[path] += 1
        return result

    return call


# ---- what pyfused does not have ------------------------------------------------------------------


def count_torchs(missing: Calls) -> None:
    """Makes torch's losses and activations count their calls, for the rest of the process.

    They stay the objects that they are, as under :func:`pyfused.patch`, where they are no
    built-ins. No mode counts: with one active pyfused's own operators would be torch's.
    """
    inside = threading.local()  # of the outermost call, which is the program's
    for owner, name in _places():
        torchs = getattr(owner, name)
        path = f"{'torch.Tensor' if owner is Tensor else owner.__name__}.{name}"
        call = _counting(path, original(torchs), missing, inside)
        if not isinstance(torchs, FunctionType):
            stands_for(torchs, call)
            call.__module__, _, call.__qualname__ = path.rpartition(".")
            if owner is Tensor:
                call.__module__, call.__qualname__ = "torch", f"Tensor.{name}"
            setattr(owner, name, call)
        elif torchs.__globals__ is vars(F):
            code = torchs.__code__
            by_place = code.co_varnames[: code.co_argcount]
            by_name = code.co_varnames[len(by_place) :][: code.co_kwonlyargcount]
            arguments = ", ".join((*by_place, *(f"{name}={name}" for name in by_name)))
            torchs.__code__ = code_calling(call, f"callee({arguments})", code)


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
    path: str, torchs: Callable[..., Any], missing: Calls, inside: threading.local
) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if compiler_traces() or getattr(inside, "call", False):
            return torchs(*args, **kwargs)
        inside.call = True
        try:
            result = torchs(*args, **kwargs)
        finally:
            inside.call = False
        missing[path] += 1
        return result

    return functools.update_wrapper(call, torchs)


# ---- the script ----------------------------------------------------------------------------------


def run(script: str, arguments: list[str]) -> None:
    """Runs a script as ``python script.py arguments`` would, and prints what its calls took.

    And which of torch's losses and activations it called that pyfused does not have. The summary
    goes to the standard error, also where the script raises or exits.
    """
    paths, missing = Calls(), Calls()
    dispatch.call = counted(paths)
    setattr(functional, "call", dispatch.call)  # noqa: B010 it is there by name
    count_torchs(missing)
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent.resolve())
    try:
        with patch():
            runpy.run_path(script, run_name="__main__")
    finally:
        print(summary(paths, missing), file=sys.stderr)


def summary(paths: Calls, missing: Calls) -> str:
    lines = ["pyfused: calls and the paths they took", *_table(paths)]
    if missing:
        lines += ["losses and activations that pyfused does not have", *_table(missing)]
    return "\n".join(lines)


def _table(calls: Calls) -> list[str]:
    lines = [f"{count:>9,}  {name}" for name, count in calls.most_common()]
    return lines or ["     none"]
