"""Makes torch's functions call pyfused's."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import ContextDecorator
from functools import partial
from types import BuiltinFunctionType, FunctionType
from typing import Any, TypeVar, overload

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import functional as F

from pyfused import functional
from pyfused.dispatch import originals, report
from pyfused.dispatch.sizes import COMPILED
from pyfused.ops.operators import OPERATORS
from pyfused.torch_internals import forget_functions, script_as_builtin

Function = TypeVar("Function", bound=Callable[..., Any])
Functions = Mapping[str, Callable[..., Any]]

_log = logging.getLogger("pyfused")


# ---- patched functions ---------------------------------------------------------------------------


def _patched(name: str) -> Callable[..., Any]:
    """Returns pyfused's function with the name, signature, documentation and errors of torch's."""
    ours = getattr(functional, name)
    function = FunctionType(ours.__code__, vars(functional), name, ours.__defaults__)
    function.__kwdefaults__ = ours.__kwdefaults__
    original = getattr(originals.F, name)
    if name in COMPILED:  # called by name, it would become a custom operator
        function = _original_if_compiled(name, original, function)
    functools.update_wrapper(function, original)
    function.__module__, function.__qualname__ = F.__name__, name  # pickles refer to torch
    # torch.jit.script compiles what this returns, or the operator of a built-in.
    vars(function)["__prepare_scriptable__"] = lambda: _SOURCES.get(name, original)
    script_as_builtin(function, original)
    return function


def _original_if_compiled(name: str, original: Any, ours: Any) -> Any:
    def function(*args: Any, **kwargs: Any) -> Any:
        is_traced = is_dynamo_compiling() and report.add_traced(name)
        return (original if is_traced else ours)(*args, **kwargs)

    return function


# torch.jit.script compiles an attribute of a module from its source, which built-ins do not have.


def _gelu(input: Tensor, approximate: str = "none") -> Tensor:
    return torch.ops.aten.gelu(input, approximate=approximate)  # type: ignore[no-any-return]


def _logsigmoid(input: Tensor) -> Tensor:
    return torch.ops.aten.log_sigmoid(input)  # type: ignore[no-any-return]


def _softplus(input: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    return torch.ops.aten.softplus(input, beta, threshold)  # type: ignore[no-any-return]


_SOURCES = {"gelu": _gelu, "logsigmoid": _logsigmoid, "softplus": _softplus}
_NAMES = [name for name in OPERATORS if hasattr(originals.F, name)]
_UNPATCHED = {name: getattr(originals.F, name) for name in _NAMES}
_PATCHED = {name: _patched(name) for name in _NAMES}
_NAME_OF = {f: name for functions in (_UNPATCHED, _PATCHED) for name, f in functions.items()}


def _name_of(value: Any) -> str | None:
    """Returns the name of a function that is replaced, patched or not, None for other values."""
    is_function = isinstance(value, (FunctionType, BuiltinFunctionType))
    return _NAME_OF.get(value) if is_function else None


# ---- torch's modules -----------------------------------------------------------------------------


def _defaults(init: Any) -> tuple[Any, ...]:
    return getattr(init, "__defaults__", None) or ()


# The constructors of torch.nn.Transformer and its layers, whose default activation is relu.
_WITH_DEFAULTS: list[Any] = [
    init
    for module in vars(torch.nn).values()
    if any(map(_name_of, _defaults(init := getattr(module, "__init__", None))))
]


def _set_defaults(functions: Functions) -> None:
    for init in _WITH_DEFAULTS:
        init.__defaults__ = tuple([functions.get(_name_of(x) or "", x) for x in _defaults(init)])


_torchs_state: Any = torch.nn.Module.__getstate__


@functools.wraps(_torchs_state)
def _state(module: torch.nn.Module) -> dict[str, Any]:
    """Returns the attributes of a module, with the current functions instead of earlier ones.

    A module may store a patched function and be pickled after `unpatch`, or the reverse. pickle
    refers to functions by name, and raises an error for a function that is no longer found.
    """
    attributes = _torchs_state(module)
    return {key: getattr(F, _name_of(x) or "", x) for key, x in attributes.items()}


# ---- patch and unpatch ---------------------------------------------------------------------------

_lock = threading.RLock()
# The calls of patch() without unpatch(), and the active ``with`` blocks of all threads.
_calls: set[Patch] = set()
_blocks: list[Patch] = []
_is_patched = _is_changing = False


class Patch(ContextDecorator):
    """The result of :func:`pyfused.patch`, a context manager and decorator."""

    def __enter__(self) -> Patch:
        _update(partial(_blocks.append, self), partial(_blocks.remove, self))
        _calls.discard(self)
        return self

    def __exit__(self, *error: object) -> None:
        # If other code has replaced a function, the patch stays until `unpatch`.
        _update(partial(_blocks.remove, self), partial(_calls.add, self))

    def __call__(self, function: Function) -> Function:
        if not callable(function) or isinstance(function, (torch.nn.Module, type)):
            hint = ". To convert a module, call pyfused.convert(model)"
            raise TypeError(
                f"function: expected a function, got {_describe(function)}"
                + hint * isinstance(function, torch.nn.Module)
            )
        kinds = inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction
        if any(is_kind(function) for is_kind in kinds):
            raise TypeError(
                f"function: expected a function, got the coroutine or generator {function!r}. Use "
                "'with pyfused.patch():' around the calls in it"
            )
        if self in _calls:
            _update(partial(_calls.discard, self), partial(_calls.add, self))
        return super().__call__(function)


@overload
def patch() -> Patch: ...
@overload
def patch(function: Function) -> Function: ...
def patch(function: Any = None) -> Any:
    """Makes torch's losses and activations call pyfused's.

    The patch replaces functions of :mod:`torch.nn.functional`, such as ``cross_entropy`` and
    ``gelu``. It reaches what calls them through this module: torch's modules and most libraries. It
    does not reach names that were imported before, by ``from torch.nn.functional import ...``, nor
    built-ins such as ``torch.relu`` and ``Tensor.relu``. Errors are torch's, and pickles refer to
    torch only. In programs that are compiled, also by ``torch.jit.script``, patched functions are
    torch's.

    Besides, it replaces ``relu`` as the default activation of ``torch.nn.Transformer`` and its
    layers, and ``torch.nn.Module.__getstate__``, so that modules that store a function can be
    pickled. The latter stays after :func:`unpatch`.

    - ``patch()`` lasts until :func:`unpatch`; a second call changes nothing.
    - ``with patch():`` lasts for the block. Blocks nest.
    - ``@patch`` and ``@patch()`` last for each call of the function.

    The patch affects all threads. It ends when all calls and blocks have ended.

    Raises:
        RuntimeError: Other code has replaced one of the functions. Nothing has been changed.
        TypeError: The decorated function is a coroutine or a generator.
    """
    if function is not None:
        return Patch()(function)
    if _calls:
        _log.info("patch: already active")
    new = Patch()
    _update(partial(_calls.add, new), partial(_calls.discard, new))
    return new


def unpatch() -> None:
    """Ends all calls of :func:`patch` and restores torch's functions.

    Raises:
        RuntimeError: ``patch()`` was not called, or other code has replaced one of the functions
            since. Nothing has been changed.
    """
    calls = _calls.copy()
    if not calls:
        inside = "; 'with patch()' ends with its block" if _blocks else ""
        raise RuntimeError(f"unpatch() called without patch(){inside}")
    _update(partial(_calls.difference_update, calls), partial(_calls.update, calls))


def _update(change: Callable[[], Any], undo: Callable[[], Any]) -> None:
    """Changes the calls or the blocks, and patches torch while there are any.

    Raises:
        RuntimeError: Other code has replaced a function. Nothing has been changed.
    """
    _renew_lock_in_children()
    with _lock:
        change()
        try:
            _apply()
        except BaseException:
            undo()
            raise


def _apply() -> None:
    global _is_patched, _is_changing
    while bool(_calls or _blocks) is not _is_patched:
        if _is_changing:  # a finalizer or a signal handler has interrupted this loop
            return
        _is_changing = True
        try:
            if _is_patched:
                _replace("unpatch", "pyfused", _PATCHED, _UNPATCHED)
            else:
                _replace("patch", "torch", _UNPATCHED, _PATCHED)
            _is_patched = not _is_patched
        finally:
            _is_changing = False


@functools.cache
def _renew_lock_in_children() -> None:
    """Gives child processes a new lock, as a thread of the parent may hold its lock."""

    def renew() -> None:
        global _lock, _is_patched, _is_changing
        name = _NAMES[0]
        _lock, _is_patched = threading.RLock(), getattr(F, name, None) is _PATCHED[name]
        _is_changing = False

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=renew)


def _replace(caller: str, package: str, current: Functions, new: Functions) -> None:
    """Sets the functions of torch.nn.functional, unless other code has replaced one of them."""
    for name, function in current.items():
        found = getattr(F, name, None)
        if found is not function:
            raise RuntimeError(
                f"{caller}: expected {package}'s function at torch.nn.functional.{name}, got "
                f"{_describe(found)}. Undo the other patch first"
            )
    if torch.nn.Module.__getstate__ is _torchs_state:  # it stays: see `_state`
        torch.nn.Module.__getstate__ = _state  # type: ignore[method-assign]
    _set_defaults(new)
    vars(F).update(new)  # at once: an interrupt cannot leave some of them patched
    if new is _UNPATCHED:
        forget_functions()
    if _names_not_patched not in report.reasons_of_torch:
        report.reasons_of_torch.append(_names_not_patched)


_UNPATCHED_IDS = {id(function) for function in _UNPATCHED.values()}
_SHOWN = 8


def _names_not_patched() -> str:
    """Returns a line for reports with the names of torch's functions in the user's modules."""
    found = [
        f"{module}.{name}"
        for module, namespace in [*sys.modules.items()]
        if module.partition(".")[0] not in ("__mp_main__", "pyfused", "torch")
        for name, value in [*getattr(namespace, "__dict__", {}).items()]
        if id(value) in _UNPATCHED_IDS
    ]
    if not found:
        return ""
    more = [f"{len(found) - _SHOWN} more"] * (len(found) > _SHOWN)
    names = ", ".join([*found[:_SHOWN], *more])
    return f"so are calls by names that were bound without the patch: {names}"


def _describe(function: Any) -> str:
    code = getattr(function, "__code__", None)
    where = f"{code.co_filename}:{code.co_firstlineno}" if code else type(function).__name__
    return f"{getattr(function, '__qualname__', function)} ({where})"
