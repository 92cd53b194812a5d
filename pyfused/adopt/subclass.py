"""Replaces the ``forward`` of other libraries' modules by changing their class to a subclass."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from types import new_class
from typing import Any

MARK = "_converted_by_pyfused"  # an attribute of modules; copies and saved models keep it
ForwardOf = Callable[..., Callable[..., Any]]  # defined at module level, for pickle


class _Fused:
    """The first base of the subclasses. It defines their pickling: they cannot be imported."""

    _unfused: Any  # the original class
    _arguments: tuple[Any, ...]  # of `subclass`, after the original class

    def __init_subclass__(cls) -> None:
        """Does not call the method of the original class, which may register its subclasses."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Reduces the module as its original class does, and appends the change of its class."""
        kind: Any = type(self)
        self.__class__ = kind._unfused  # otherwise the result refers to the subclass
        try:
            reduced = self.__reduce_ex__(protocol)
        finally:
            self.__class__ = kind
        if isinstance(reduced, str):  # an object that is pickled as a global variable
            return reduced
        function, args, *state = reduced
        return _restored, (function, args, kind._unfused, kind._arguments), *state


def _restored(function: Any, args: Any, kind: Any, arguments: Any) -> Any:
    """Returns a module whose class is the subclass again, for pickle and copy."""
    module = function(*args)
    if type(module) is kind:
        fuse(module, *arguments)
    return module


@cache
def subclass(kind: Any, forward_of: ForwardOf, *arguments: Any) -> Any:
    """Returns a subclass of the same name, whose forward is ``forward_of(kind, *arguments)``.

    If this forward is a function named ``__call__``, it replaces the module's call, which runs
    hooks. Copies, replicas and loaded modules keep the subclass.
    """
    forward: Any = forward_of(kind, *arguments)
    # Dynamo counts recompilations, and skips code that it failed to compile, per code object.
    forward.__code__ = forward.__code__.replace()
    name = "__call__" if forward.__name__ == "__call__" else "forward"
    members = {name: forward, "_unfused": kind, "_arguments": (forward_of, *arguments)}
    return named(kind, members, _Fused, kind)


def named(kind: Any, members: dict[str, Any], *bases: Any) -> Any:
    """Returns a class with the name of another one."""
    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return new_class(kind.__name__, bases, {}, lambda body: body.update(names | members))


def fuse(module: Any, forward_of: ForwardOf, *arguments: Any) -> None:
    """Changes the class of a module to its fused subclass, and marks the module.

    The mark of a language model is the set of its warnings; other arguments clear it.
    """
    fused = subclass(_original(module), forward_of, *arguments)
    if type(module) is not fused or MARK not in vars(module):
        object.__setattr__(module, "__class__", fused)  # a module that is being copied is empty
        vars(module)[MARK] = set()


def is_fused(module: Any) -> bool:
    return isinstance(module, _Fused)


def is_marked(module: Any) -> bool:
    """Returns whether a module is converted; copies made by user code may lack the mark."""
    return is_fused(module) and MARK in vars(module)


def unfuse(module: Any) -> None:
    """Restores the class of a module, unless a wrapper has made another subclass of it."""
    delattr(module, MARK)
    vars(module).pop("pyfused_metrics", None)
    module.__class__ = _original(module)


def has_original_forward(module: Any) -> bool:
    """Returns whether a module's ``forward`` is the one that its class was defined with."""
    forward, defined_in = type(module).forward, sys.modules.get(type(module).__module__)
    return (
        "forward" not in vars(module)
        and defined_in is not None
        and getattr(forward, "__globals__", None) is vars(defined_in)
    )


def _original(module: Any) -> Any:
    return vars(type(module)).get("_unfused", type(module))
