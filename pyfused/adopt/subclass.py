"""Replaces members of other libraries' modules by changing their class to a subclass."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import new_class
from typing import Any

from pyfused.torch_internals import skip_frames

MARK = "_converted_by_pyfused"  # an attribute of modules; copies and saved models keep it
MembersOf = Callable[[Any], dict[str, Any]]  # returns the members of a class's subclass


class ConvertedModule:
    """The first base of the subclasses, which pickle cannot import."""

    _original: Any
    _members_of: Any

    def __init_subclass__(cls) -> None:
        """Does not call the method of the original class, which may register its subclasses."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Reduces the module as its original class does, and appends the change of its class."""
        kind: Any = type(self)
        # Another object with the same attributes, because a thread may call this one meanwhile.
        original = object.__new__(kind._original)
        object.__setattr__(original, "__dict__", vars(self))
        try:
            function, args, *state = original.__reduce_ex__(protocol)
        finally:
            original.__class__ = ConvertedModule  # which has no finaliser
        return _restored, (function, args, kind._original, kind._members_of), *state

    def __prepare_scriptable__(self) -> Any:
        """Raises when torch.jit.script begins to compile the module."""
        raise RuntimeError(
            "torch.jit.script: expected a model without conversions of pyfused.convert, got a "
            f"converted {type(self).__name__}. Call pyfused.revert(model)"
        )


def _restored(function: Any, args: Any, kind: Any, members_of: MembersOf) -> Any:
    """Returns a module whose class is the subclass again, for pickle and copy."""
    module = function(*args)
    is_original = type(module) is kind
    if is_original:
        object.__setattr__(module, "__class__", _subclass(kind, members_of))
    return module


@cache
def _subclass(kind: Any, members_of: MembersOf) -> Any:
    """Returns a subclass of the same ``__name__``, with the members ``members_of(kind)``."""
    members = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    members["__qualname__"] += " (converted by pyfused)"  # in the representation of the class
    members |= {"_original": kind, "_members_of": staticmethod(members_of), **members_of(kind)}
    if forward := members.get("forward"):
        # Dynamo counts recompilations, and skips code that it failed to compile, per code object.
        forward.__code__ = forward.__code__.replace()
        skip_frames(forward, and_calls=False)
    return new_class(kind.__name__, (ConvertedModule, kind), {}, lambda body: body.update(members))


def fuse(module: Any, members_of: MembersOf, mark: Any) -> None:
    """Changes the class of a module to a subclass, and marks the module."""
    vars(module)[MARK] = mark
    if not isinstance(module, ConvertedModule):
        kind: Any = type(module)
        module.__class__ = _subclass(kind, members_of)


def is_fused(module: Any, members_of: MembersOf) -> bool:
    return isinstance(module, ConvertedModule) and type(module)._members_of is members_of


def unfuse(module: Any) -> None:
    """Restores the class of a module, unless a wrapper has made another subclass of it."""
    vars(module).pop(MARK, None)
    module.__class__ = vars(type(module)).get("_original", type(module))
