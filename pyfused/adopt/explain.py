"""Reports which backend a call is dispatched to, and why."""

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

import pyfused.functional as functional
import pyfused.nn as nn
from pyfused import checks
from pyfused.adopt.convert import FUSED
from pyfused.dispatch import observers
from pyfused.dispatch.explanation import (
    BY_SHARDS,
    Explanation,
    by_kernel,
    explanation_of,
    path_of,
)
from pyfused.dispatch.observers import Observer
from pyfused.dispatch.operator import Operator, Options, Tensors
from pyfused.dispatch.reasons import SMALL
from pyfused.dispatch.signature import PLAIN
from pyfused.dispatch.sizes import dispatching_small_calls
from pyfused.formula import Formula, FormulaModule
from pyfused.ops.activation import Activation
from pyfused.ops.operators import OPERATORS
from pyfused.ops.softmax import Softmax
from pyfused.torch_internals import active_mode

_LIBRARIES = ("None", "torch", "torchvision", __name__.partition(".")[0])


def explain(op: str | Callable[..., Any] | Module, *args: Any, **kwargs: Any) -> Explanation:
    """Returns which backend a call is dispatched to, and why, without making the call.

    It runs the same dispatch code as the call, with the active modes and number of threads. It
    cannot predict fallbacks that are decided during backward, for example for ``create_graph``.

    Args:
        op: The name of a function in :mod:`pyfused.functional`; a function of that name in torch or
            pyfused; a module of :mod:`pyfused.nn`, or one of ``torch.nn`` that
            :func:`pyfused.convert` replaces; a formula of :func:`pyfused.loss` or
            :func:`pyfused.activation`, or its module.
        args, kwargs: The call's arguments.

    Raises:
        ValueError: There is no such operator.
        TypeError: The arguments do not match the operator's parameters.
        Exception: The error of the call itself, if a CPU kernel runs or if only the size or a dtype
            prevents it.
    """
    if isinstance(op, FormulaModule):
        return explain(op.formula, *args, **nn.options_of(op), **kwargs)
    if isinstance(op, Formula):
        return path_of(*op.call_of(args, kwargs))
    if isinstance(op, Module):
        return _explain_module(op, *args, **kwargs)
    library = str(getattr(op, "__module__", None)).partition(".")[0]
    is_known = isinstance(op, str) or library in _LIBRARIES  # built-ins have no module
    name = op if isinstance(op, str) else getattr(op, "__name__", "")
    if not is_known or name not in functional.__all__:
        hint = _hint(name) if is_known else ""
        raise ValueError(f"op: expected a function of pyfused.functional, got {op!r}{hint}")
    function = getattr(functional, name)
    signature = inspect.signature(function)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        required = [p.name for p in signature.parameters.values() if p.default is p.empty]
        example = f"pyfused.explain({name!r}, {', '.join(required)})"
        raise TypeError(f"{name}: {error}. Pass the call's arguments: {example}") from None
    return _explained(name, bound.arguments, function, *args, **kwargs)


def _hint(name: str) -> str:
    """Returns the end of a message about a function that pyfused lacks."""
    if hasattr(torch.nn.functional, name) or hasattr(torch, name):
        return f". pyfused has no {name}: torch computes it"
    close = difflib.get_close_matches(name, functional.__all__, 1)
    return f". Did you mean {close[0]!r}?" if close else ""


def _reason_before_dispatch(name: str, arguments: Mapping[str, Any]) -> str | None:
    """Returns why a function calls torch's without dispatch, whatever the size."""
    if name in ("additive_margin", "AdditiveMargin"):
        return "a composition of torch's operators"
    if isinstance(OPERATORS.get(name), Activation) and arguments.get("inplace"):
        return "torch computes activations in place"
    if isinstance(OPERATORS.get(name), Softmax) and arguments.get("dim") is None:
        return "dim is not given"
    if not arguments.get("size_average") is arguments.get("reduce") is None:
        return "size_average and reduce are deprecated"
    return None


class _Explained(Exception):  # noqa: N818
    """Ends a call whose decision has been read."""


class _Explainer(Observer):
    """Ends the calls of this thread when they have been decided."""

    def __init__(self) -> None:
        self.thread = get_ident()

    def decided(self, op: Operator, tensors: Tensors, options: Options, reason: str | None) -> None:
        if get_ident() == self.thread:
            raise _Explained(op, tensors, options, reason)


def _explained(
    name: str, arguments: Mapping[str, Any], call: Callable[..., Any], *args: Any, **kwargs: Any
) -> Explanation:
    """Explains a call of a function of `functional`, which ends when it has been decided.

    Args:
        name: The name of the function.
        arguments: Its arguments by name, or the attributes of a module.
        call: The function, or the ``forward`` of the module.
    """
    if reason := _reason_before_dispatch(name, arguments):
        return Explanation(name, "torch", reason)
    if arguments.get("shard") is not None:
        op, input = name.removesuffix("_with_metrics"), [*args, *kwargs.values()][0]
        mode = active_mode()
        return Explanation(op, "torch", mode) if mode else by_kernel(op, input, BY_SHARDS)
    explainer = _Explainer()
    observers.begin(explainer)
    try:
        with dispatching_small_calls():
            call(*args, **kwargs)
    except _Explained as explained:
        op, tensors, options, reason = explained.args
    else:
        return Explanation(name, "torch", "torch's function computes these arguments")
    finally:
        observers.end(explainer)
    checks.tensor(op.operands[0].name, tensors[0])
    present = [x for x in tensors if isinstance(x, Tensor)]
    # torch checks the calls that kernels do not support, except for dtypes of indices.
    is_checked = reason is None or reason is SMALL or " has dtype " in reason
    if is_checked and all(type(x) in PLAIN and x.is_cpu for x in present):
        op.check(tensors, options)
    return explanation_of(op, tensors, options, reason)


def _explain_module(module: Module, *args: Any, **kwargs: Any) -> Explanation:
    """Explains a module's call."""
    if type(module) in FUSED:
        module = copy.copy(module)
        module.__class__ = FUSED[type(module)]
    forward: Any = type(module).forward
    if forward.__globals__ is not vars(nn):
        class_name = type(module).__name__
        is_torchs = type(module) is getattr(torch.nn, class_name, None)
        hint = f". pyfused has no {class_name}: torch computes it" if is_torchs else ""
        raise ValueError(f"op: expected a module of pyfused.nn, got {module}{hint}")
    kind = type(module).__name__
    name = next((op.name for op in OPERATORS.values() if op.module == kind), kind)
    options = {**vars(module), **getattr(module, "fused_options", {})}
    return _explained(name, options, partial(forward, module), *args, **kwargs)
