"""Reports which backend computes a call, and why."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

import torch.nn.functional
from torch.nn import Module

import pyfused.functional as functional
import pyfused.nn as nn
from pyfused.adopt.convert import REPLACEMENTS
from pyfused.dispatch.explanation import Explanation, explanation_of
from pyfused.dispatch.operator import Operator
from pyfused.dispatch.report import recorded
from pyfused.dispatch.sizes import why_small
from pyfused.formula import Formula, FormulaModule
from pyfused.ops.activation import Activation
from pyfused.ops.operators import OPERATORS
from pyfused.ops.softmax import Softmax

_LIBRARIES = ("None", "torch", "torchvision", __name__.partition(".")[0])  # None for built-ins


def explain(op: str | Callable[..., Any] | Module, *args: Any, **kwargs: Any) -> Explanation:
    """Makes a call, and returns which backend has computed it, and why.

    The result of the call is dropped. Fallbacks that are decided during backward, for example for
    ``create_graph``, are not among the reasons.

    Args:
        op: A function of :mod:`pyfused.functional`, or its name; a function of torch with such a
            name, which torch computes unless :func:`pyfused.patch` has replaced it; a module of
            :mod:`pyfused.nn`, or one of ``torch.nn`` that :func:`pyfused.convert` replaces; a
            formula of :func:`pyfused.loss` or :func:`pyfused.activation`, or its module.
        args, kwargs: The call's arguments.

    Raises:
        ValueError: There is no such operator.
        Exception: The call raises it.
    """
    call, name = _callable(op)
    if not isinstance(op, (str, Module, Formula)) and _library(op) != "pyfused":
        op(*args, **kwargs)
        reason = f"it is torch's own function; pass {name!r} to explain pyfused's"
        return Explanation(name, "torch", reason)
    with recorded() as calls:
        call(*args, **kwargs)
    if calls:
        return explanation_of(*calls[-1])
    formula = getattr(call, "formula", call)
    if isinstance(formula, Formula):
        return formula.explain_small(args, kwargs)
    operator = OPERATORS.get("mse_loss" if name == "rmse_loss" else name)
    reason = "a composition of torch's operators"
    if operator is not None:
        reason = _reason(operator, _arguments(call, name, args, kwargs))
    return Explanation(name, "torch", reason)


def _callable(op: Any) -> tuple[Callable[..., Any], str]:
    """Returns the function of pyfused that computes an operator, and its name."""
    if isinstance(op, (Formula, FormulaModule)):
        formula: Any = getattr(op, "formula", op)
        return op, formula.op.name
    if isinstance(op, Module):
        if type(op) in REPLACEMENTS:
            op = copy.copy(op)
            op.__class__ = REPLACEMENTS[type(op)]
        if getattr(type(op).forward, "__globals__", None) is vars(nn):
            names = {each.module: each.name for each in OPERATORS.values()}
            return op, names.get(type(op).__name__, "")
    else:
        name = op if isinstance(op, str) else getattr(op, "__name__", "")
        if name in functional.__all__ and (op is name or _library(op) in _LIBRARIES):
            return getattr(functional, name), name
    hint = ". torch computes all others"
    if isinstance(op, str) and not hasattr(torch.nn.functional, op):
        longer = [name for name in functional.__all__ if name.startswith(op)]
        close = longer or get_close_matches(op, functional.__all__)
        hint = f". Did you mean {' or '.join(close)}?" if close else ""
    raise ValueError(
        f"op: expected a function of pyfused.functional or a module of pyfused.nn, got {op!r}{hint}"
    )


def _library(function: Any) -> str:
    """Returns the package that defines a function, "pyfused" for a function of torch's patch."""
    where = function if hasattr(function, "__wrapped__") else None
    names = getattr(where, "__globals__", {}).get("__name__") or getattr(function, "__module__", "")
    return str(names).partition(".")[0]


def _arguments(call: Any, name: str, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a function by name; a module has some as attributes."""
    arguments = inspect.signature(getattr(functional, name)).bind_partial
    if isinstance(call, Module):
        return {**vars(call), **arguments(*args).arguments, **kwargs}
    bound = arguments(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def _reason(op: Operator, arguments: dict[str, Any]) -> str:
    """Returns why a function has called torch's without dispatch."""
    if arguments.get("size_average") is not None or arguments.get("reduce") is not None:
        return "some of the arguments are deprecated or invalid"
    if isinstance(op, Activation) and arguments.get("inplace"):
        return "torch computes activations in place"
    if isinstance(op, Softmax) and arguments.get("dim") is None:
        return "dim is not given"
    tensors = [arguments.get(operand.name) for operand in op.all_operands]
    return why_small(op, tensors, arguments.get("dim", 1))
