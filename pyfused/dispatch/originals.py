"""torch's own functions, also while :func:`pyfused.patch` has given theirs other code."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache, update_wrapper
from types import FunctionType
from typing import Any

from torch import Tensor

from pyfused.torch_internals import trace_instead


@cache
def original(function: Callable[..., Any]) -> Callable[..., Tensor]:
    """Returns a copy of a Python function with its present code; a built-in is returned as it is.

    The globals are torch's, so that subclasses and modes see torch's function. It may therefore
    call other patched functions, as ``selu`` calls ``torch.selu``: call it within `torch_alone`.
    """
    if not isinstance(function, FunctionType):
        return function
    copy = FunctionType(function.__code__, function.__globals__, argdefs=function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    update_wrapper(copy, function)
    # The compiler puts torch's functions into graphs, but would trace the copy.
    trace_instead(copy, function)
    return copy


class TorchAlone(threading.local):
    """A context in which patched functions are torch's, for torch's definition of an operator.

    A definition that called a patched function would recurse into the operator that it defines, or
    compute a part of it by another operator's kernel.
    """

    depth = 0
    needed = False  # from the first patch on, in all threads

    def __enter__(self) -> None:
        self.depth += 1

    def __exit__(self, *error: object) -> None:
        self.depth -= 1


torch_alone = TorchAlone()
