"""torch's own functions, also while :func:`pyfused.patch` has given theirs other code."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, update_wrapper
from types import FunctionType
from typing import Any

from torch import Tensor


@cache
def original(function: Callable[..., Any]) -> Callable[..., Tensor]:
    """Returns a Python function over the code that it has now; a built-in has no other.

    Its globals are torch's, so that subclasses and modes see torch's function. One that calls a
    built-in which is patched, as ``sigmoid`` does, comes back to its caller: take the built-in.
    """
    if not isinstance(function, FunctionType):
        return function
    copy = FunctionType(function.__code__, function.__globals__, argdefs=function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    update_wrapper(copy, function)
    # The compiler puts torch's functions into graphs, and would read the copy: warnings stop it.
    copy._torchdynamo_inline = function  # type: ignore[attr-defined]
    return copy
