"""Modules of other libraries with another ``forward``: they get a subclass of their class."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import new_class
from typing import Any

MARK = "_converted_by_pyfused"  # on the module, so that copies and saved models can be reverted
ForwardOf = Callable[..., Callable[..., Any]]  # a function of a module, so that pickle finds it


@cache
def subclass(kind: Any, forward_of: ForwardOf, *arguments: Any) -> Any:
    """Returns the subclass of a class, of the same name, with ``forward_of(kind, *arguments)``.

    A copy, a replica and a loaded module have it as well.
    """

    def reduce(module: Any, protocol: Any) -> Any:  # the subclass cannot be imported
        return _new, (kind, forward_of, *arguments), *kind.__reduce_ex__(module, protocol)[2:]

    forward = forward_of(kind, *arguments)
    members = {"forward": forward, "__reduce_ex__": reduce, "_unfused": kind}
    named = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return new_class(kind.__name__, (kind,), exec_body=lambda body: body.update(members | named))


def _new(kind: Any, *given: Any) -> Any:
    """Returns a module without attributes, which pickle and copy fill."""
    return kind.__new__(subclass(kind, *given))


def fuse(module: Any, forward_of: ForwardOf, *arguments: Any) -> None:
    """Gives a module the subclass of its class."""
    kind: Any = type(module)
    module.__class__ = subclass(kind, forward_of, *arguments)


def is_fused(module: Any) -> bool:
    return hasattr(type(module), "_unfused")


def unfuse(module: Any) -> None:
    module.__class__ = type(module)._unfused
