"""Reports which backend a call is dispatched to, and why."""

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from torch.nn import Module

import pyfused.functional as functional
import pyfused.nn as nn
from pyfused import checks
from pyfused.adopt.convert import FUSED
from pyfused.dispatch.explanation import BY_SHARDS, Explanation, by_kernel, path_of
from pyfused.dispatch.operator import Operator, Options, Tensors
from pyfused.dispatch.originals import redirected
from pyfused.dispatch.reasons import SMALL
from pyfused.dispatch.signature import PLAIN
from pyfused.formula import Formula, FormulaModule

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
        close = difflib.get_close_matches(op, functional.__all__, 1) if isinstance(op, str) else []
        hint = f". Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"op: expected a function of pyfused.functional, got {op!r}{hint}")
    function = getattr(functional, name)
    signature = inspect.signature(function)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        required = [p.name for p in signature.parameters.values() if p.default is p.empty]
        example = f"pyfused.explain({name!r}, {', '.join(required)})"
        raise TypeError(f"{name}: {error}. Pass the call's arguments: {example}") from None
    if name == "additive_margin":
        return Explanation(name, "torch", "a composition of torch's operators")
    try:
        redirected(function, run=_explain_run, in_place=_explain_in_place)(*args, **kwargs)
    except _Explained as explained:
        return explained.args[0]  # type: ignore[no-any-return]
    return Explanation(name, "torch", "size_average and reduce are deprecated")


class _Explained(Exception):  # noqa: N818
    """Ends a function of `functional` whose call has been explained."""


def _explain_run(op: Operator, tensors: Tensors, options: Options, shard: Any = None) -> None:
    """Explains a call in place of `run`, and raises the explanation."""
    if shard is not None:
        raise _Explained(by_kernel(op.name, tensors[0], BY_SHARDS))
    checks.tensor(op.operands[0].name, tensors[0])
    explanation = path_of(op, tensors, options)
    present = [x for x in tensors if isinstance(x, Tensor)]
    reason, by_torch = explanation.reason, explanation.backend == "torch"
    # torch checks the calls that kernels do not support, except for dtypes of indices.
    is_checked = not by_torch or reason.startswith(SMALL) or " has dtype " in reason
    if is_checked and all(type(x) in PLAIN and x.is_cpu for x in present):
        op.check(tensors, options)
    raise _Explained(explanation)


def _explain_in_place(op: Operator, *_: Any) -> None:
    raise _Explained(Explanation(op.name, "torch", "torch computes activations in place"))


def _explain_module(module: Module, *args: Any, **kwargs: Any) -> Explanation:
    """Explains a module's call, by running ``forward`` with an ``F`` whose functions explain."""
    if type(module) in FUSED:
        module = copy.copy(module)
        module.__class__ = FUSED[type(module)]
    forward: Any = type(module).forward
    if forward.__globals__ is not vars(nn):
        raise ValueError(f"op: expected a module of pyfused.nn, got {module}")
    explaining = SimpleNamespace(**{name: partial(explain, name) for name in functional.__all__})
    explanation: Explanation = redirected(forward, F=explaining)(module, *args, **kwargs)
    return explanation
