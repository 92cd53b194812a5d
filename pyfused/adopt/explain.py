"""Reports which backend a call is dispatched to, and why."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

import pyfused.functional as functional
import pyfused.nn as nn
from pyfused.adopt.convert import FUSED
from pyfused.dispatch.explanation import Explanation, explanation_of
from pyfused.dispatch.operator import Operator
from pyfused.dispatch.originals import F
from pyfused.formula import Formula, FormulaModule
from pyfused.ops.activation import Activation
from pyfused.ops.operators import OPERATORS
from pyfused.ops.softmax import Softmax

_LIBRARIES = ("None", "torch", "torchvision", __name__.partition(".")[0])  # None for built-ins
_OF_TORCH = [name for name in OPERATORS if hasattr(F, name)]
# Why functions call torch's without dispatch, whatever the size.
_WITHOUT_DISPATCH = {
    Activation: "torch computes activations in place",
    Softmax: "dim is not given",
    Operator: "some of the arguments are deprecated or invalid",
    object: "a composition of torch's operators",
}


def explain(op: str | Callable[..., Any] | Module, *args: Any, **kwargs: Any) -> Explanation:
    """Returns which backend a call is dispatched to, and why, without making the call.

    It asks the dispatch code of the call, with the active modes and number of threads. It cannot
    predict fallbacks that are decided during backward, for example for ``create_graph``.

    Args:
        op: The name of a function in :mod:`pyfused.functional`; a function of that name in torch or
            pyfused; a module of :mod:`pyfused.nn`, or one of ``torch.nn`` that
            :func:`pyfused.convert` replaces; a formula of :func:`pyfused.loss` or
            :func:`pyfused.activation`, or its module.
        args, kwargs: The call's arguments.

    Raises:
        ValueError: There is no such operator.
    """
    if isinstance(op, FormulaModule):
        return explain(op.formula, *args, **nn.options_of(op), **kwargs)
    if isinstance(op, Formula):
        return explanation_of(*op.call_of(args, kwargs))
    functions, call = _Functions(), None
    if isinstance(op, Module):
        if type(op) in FUSED:
            op = copy.copy(op)
            op.__class__ = FUSED[type(op)]
        forward, args = type(op).forward, (op, *args)
        if getattr(forward, "__globals__", None) is vars(nn):
            call = _with_globals(forward, F=functions)
    else:
        name = op if isinstance(op, str) else getattr(op, "__name__", "")
        library = str(getattr(op, "__module__", None)).partition(".")[0]
        if name in functional.__all__ and (op is name or library in _LIBRARIES):
            call = getattr(functions, name)
    if call is None:
        raise ValueError(
            "op: expected a function of pyfused.functional or a module of pyfused.nn, got "
            f"{op!r}. torch computes all others"
        )
    call(*args, **kwargs)
    return functions.explanation


class _Functions:
    """The functions of `functional`, with other globals: they explain a call and do not make it.

    Attributes:
        explanation: The explanation of the last call.
    """

    explanation: Explanation

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return _with_globals(
            getattr(functional, name),
            run=self._run,
            # Dispatch decides about sizes, and can say why.
            left_to_torch=lambda _op, _input, *legacy, **_: legacy[:2] not in ((), (None, None)),
            is_small=lambda *_: False,
            F=SimpleNamespace(**{name: partial(self._by_torch, name) for name in _OF_TORCH}),
            margins=SimpleNamespace(additive_margin=partial(self._by_torch, name)),
        )

    def _run(self, *call: Any) -> Tensor:
        self.explanation = explanation_of(*call)
        return torch.empty(3, 3)  # some functions unpack it, or compute their result from it

    def _by_torch(self, name: str, *_: Any, **__: Any) -> None:
        kinds = type(OPERATORS.get(name)).__mro__
        reason = next(_WITHOUT_DISPATCH[kind] for kind in kinds if kind in _WITHOUT_DISPATCH)
        self.explanation = Explanation(name, "torch", reason)


def _with_globals(function: Any, **names: Any) -> Callable[..., Any]:
    """Returns a copy of a function in which other objects have these global names."""
    namespace = {**function.__globals__, **names}
    copied = FunctionType(
        function.__code__, namespace, function.__name__, function.__defaults__, function.__closure__
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied
