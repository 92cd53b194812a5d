"""Keeps torch's original functions available while :func:`pyfused.patch` is in effect."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from functools import cache, update_wrapper
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyfused.dispatch import reasons
from pyfused.torch_internals import trace_instead

Function = TypeVar("Function", bound=Callable[..., Any])


class _Warnings:
    """Python's ``warnings`` for copies of torch's functions: a warning names the user's line."""

    @staticmethod
    def warn(message: str, category: Any = None, stacklevel: int = 1) -> None:  # noqa: ARG004
        warnings.warn(message, category, reasons.stacklevel())


@cache
def original(function: Callable[..., Any]) -> Callable[..., Tensor]:
    """Returns a copy of a Python function with its current code; returns built-ins unchanged.

    The copy shares torch's globals, because subclasses and modes have to see torch's function. It
    may therefore call other patched functions, for example ``torch.selu`` in ``selu``: call it
    within `torch_alone`.
    """
    if not isinstance(function, FunctionType):
        return function
    names = function.__globals__
    if "warnings" in function.__code__.co_names:
        names = names | {"warnings": _Warnings}
    copy = _copied(function, names)
    # The compiler puts torch's functions into graphs, but it would trace the copy.
    trace_instead(copy, function)
    return copy


class _Functional:
    """torch.nn.functional, unaffected by :func:`pyfused.patch`."""

    def __getattr__(self, name: str) -> Any:
        function = original(getattr(torch.nn.functional, name))
        setattr(self, name, function)
        return function


F = _Functional()


def redirected(function: Function, **names: Any) -> Function:
    """Returns a copy of a Python function in which some global names have other values."""
    assert isinstance(function, FunctionType)
    names = function.__globals__ | names
    del names["__name__"]  # else the compiler would read globals from the module
    return _copied(function, names)  # type: ignore[return-value]


def _copied(function: FunctionType, names: dict[str, Any]) -> FunctionType:
    """Returns a copy of a function with other global names."""
    copy = FunctionType(function.__code__, names, argdefs=function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    update_wrapper(copy, function)
    return copy


class TorchAlone(threading.local):
    """A context in which patched functions call torch's code, for definitions of operators.

    Without it, a definition that calls a patched function would recurse into its own operator, or
    compute a part of the result by another operator's kernel.
    """

    depth = 0
    needed = False  # True in all threads after the first patch

    def __enter__(self) -> None:
        self.depth += 1

    def __exit__(self, *error: object) -> None:
        self.depth -= 1


torch_alone = TorchAlone()
