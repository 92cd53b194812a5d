"""Replaces the ``forward`` of other libraries' modules: their class becomes a subclass of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import new_class
from typing import Any

MARK = "_converted_by_pyfused"  # on the module, so that copies and saved models can be reverted
ForwardOf = Callable[..., Callable[..., Any]]  # defined at module level, for pickle


@cache
def subclass(kind: Any, forward_of: ForwardOf, *arguments: Any) -> Any:
    """Returns a subclass of the same name, whose forward is ``forward_of(kind, *arguments)``.

    If that function is named ``__call__``, it replaces the module's call, which runs hooks.

    Copies, replicas and loaded modules keep the subclass.
    """

    def reduce(module: Any, protocol: Any) -> Any:  # the subclass cannot be imported
        return _new, (kind, forward_of, *arguments), *kind.__reduce_ex__(module, protocol)[2:]

    forward: Any = forward_of(kind, *arguments)
    # Dynamo counts recompilations, and skips code that it failed to compile, per code object.
    forward.__code__ = forward.__code__.replace()
    name = "__call__" if forward.__name__ == "__call__" else "forward"
    members = {name: forward, "__reduce_ex__": reduce, "_unfused": kind}
    named = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return new_class(kind.__name__, (kind,), exec_body=lambda body: body.update(members | named))


def _new(kind: Any, *given: Any) -> Any:
    """Returns a module without attributes, for pickle and copy."""
    return kind.__new__(subclass(kind, *given))


def fuse(module: Any, forward_of: ForwardOf, *arguments: Any) -> None:
    """Changes the class of a module to its fused subclass, and marks the module."""
    kind: Any = type(module)
    module.__class__ = subclass(kind, forward_of, *arguments)
    setattr(module, MARK, True)


def is_fused(module: Any) -> bool:
    return hasattr(type(module), "_unfused")


def unfuse(module: Any) -> None:
    """Restores the class of a module, unless a wrapper has made another subclass of it."""
    delattr(module, MARK)
    vars(module).pop("pyfused_metrics", None)
    module.__class__ = vars(type(module)).get("_unfused", type(module))
