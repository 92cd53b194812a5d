"""torch's own functions, also while :func:`pyfused.patch` has given theirs other code."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache, update_wrapper
from types import FunctionType
from typing import Any

from torch import Tensor


@cache
def original(function: Callable[..., Any]) -> Callable[..., Tensor]:
    """Returns a Python function over the code that it has now; a built-in has no other.

    Its globals are torch's, so that subclasses and modes see torch's function. So it may call other
    functions that are patched, as ``selu`` calls ``torch.selu``: call it within `torch_alone`.
    """
    if not isinstance(function, FunctionType):
        return function
    copy = FunctionType(function.__code__, function.__globals__, argdefs=function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    update_wrapper(copy, function)
    # The compiler puts torch's functions into graphs, and would read the copy: warnings stop it.
    copy._torchdynamo_inline = function  # type: ignore[attr-defined]
    return copy


class TorchAlone(threading.local):
    """Entered while torch's definition of an operator is computed.

    Patched functions are torch's meanwhile: a definition that called one would come back to the
    operator that it defines, or compute a part of it by another operator's kernel.
    """

    depth = 0
    needed = False  # from the first patch on, in all threads

    def __enter__(self) -> None:
        self.depth += 1

    def __exit__(self, *error: object) -> None:
        self.depth -= 1


torch_alone = TorchAlone()
