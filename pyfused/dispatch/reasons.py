"""Reasons to fall back to torch's operator, and their log."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from pyfused import backends
from pyfused.backends import DTYPES, cpu, unsupported_device
from pyfused.dispatch.operator import requires_grad
from pyfused.torch_internals import (
    PLAIN,
    has_names,
    is_batched,
    is_functorch_wrapped,
    is_lazy_clone,
    is_zero_tensor,
)

SMALL = "torch is faster at this size"
FUSED = "torch.compile: Inductor fuses it with its neighbours"
_log = logging.getLogger("pyfused")
lazy_classes: set[type] = set()  # of tensors on which torch's functions are dispatched again
_reported: dict[tuple[str, str], object] = {}
_INDICES = (torch.int64, torch.uint8)
_CONVERTED = (*_INDICES, torch.bool, torch.int8, torch.int16, torch.int32)
_OURS_AND_TORCHS = (f"{__name__.partition('.')[0]}.", "torch.")


def reported_later(op: Any, tensors: Sequence[Any]) -> bool:
    """Returns whether torch's function, which computes a call, is dispatched and reported again."""
    return op.in_torch and type(tensors[0]) in lazy_classes


def first_time(op: str, reason: str) -> bool:
    """Returns whether this is the first call with this operator and this reason."""
    mark = object()
    return _reported.setdefault((op, reason), mark) is mark  # atomic


def log_once(op: str, reason: str) -> None:
    """Logs why a call falls back to torch's operator, once and at level INFO."""
    if is_dynamo_compiling() or not _log.isEnabledFor(logging.INFO):
        return
    if first_time(op, reason):
        _log.info("%s: torch: %s", op, reason)


def warn_once(op: str, reason: str, message: str) -> None:
    """Warns once for an operator and a reason, at the first frame outside pyfused and torch."""
    if first_time(op, reason):
        warnings.warn(message, RuntimeWarning, stacklevel=stacklevel())


def stacklevel() -> int:
    """Returns the stacklevel of the first frame outside pyfused's and torch's modules."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and str(frame.f_globals.get("__name__", __name__)).startswith(
        _OURS_AND_TORCHS
    ):
        frame, level = frame.f_back, level + 1
    return level


def unsupported(
    operands: Sequence[Any], tensors: Sequence[Any], input: Any = None, is_traced: bool = False
) -> str | None:
    """Returns why the kernels for the input's device do not take a tensor, None if they take all.

    Args:
        operands: The operands, or other declared arguments, that have these values.
        input: The first tensor of the call; None to look only at how tensors are stored.
        is_traced: Whether Dynamo traces the call: how tensors are stored is unknown, and comparing
            a size would restrict the program.
    """
    is_forced = backends.FORCED is not None or cpu.MISSING is not None
    for operand, x in zip(operands, tensors, strict=True):
        if x is None and operand.optional:
            continue
        name = operand.name
        if type(x) not in PLAIN:
            if operand.number and type(x) is float:
                continue
            return f"{name} is a {type(x).__name__}"
        if not is_traced:
            if x.layout is not torch.strided:
                return f"{name} has layout {x.layout}"
            if x.is_neg() or is_zero_tensor(x):
                return f"{name} is lazily negated or zero"
            if x.is_nested:
                return f"{name} is nested"
            if has_names is not None and has_names(x):
                return f"{name} has named dimensions"
            if is_functorch_wrapped(x):
                return f"{name} is used outside of its torch.func transform"
            if is_batched(x):
                return f"{name} is batched"
            if is_lazy_clone(x):  # reading its address would copy it
                return f"{name} is a lazy clone"
        if input is None:
            continue
        are_on_gpus = is_forced or not x.is_cpu or not input.is_cpu
        if are_on_gpus and (reason := unsupported_device(name, x, input)):
            return reason
        dtype = x.dtype
        if dtype not in DTYPES:
            others = _CONVERTED if operand.converts else _INDICES if operand.indices else ()
            if dtype not in others:
                return f"{name} has dtype {dtype}"
        if x.requires_grad and not operand.differentiated and requires_grad(x):
            return f"{name} requires grad"
    return None
