"""Makes torch's functions call pyfused's."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

from torch.compiler import is_dynamo_compiling
from torch.nn import functional as F

from pyfused import functional
from pyfused.dispatch import originals, report
from pyfused.dispatch.sizes import COMPILED
from pyfused.locks import fork_safe_lock
from pyfused.ops.activation import Activation
from pyfused.ops.operators import OPERATORS
from pyfused.torch_internals import forget_functions

Functions = Mapping[str, Callable[..., Any]]


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
    vars(function)["__prepare_scriptable__"] = lambda: original  # torch.jit.script compiles this
    return function


def _original_if_compiled(name: str, original: Any, ours: Any) -> Any:
    def function(*args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            report.add_traced(name)
            return original(*args, **kwargs)
        return ours(*args, **kwargs)

    return function


# Modules keep activations as attributes, such as torch.nn.TransformerEncoderLayer. While another
# function had their name, these modules could not be pickled.
_NAMES = [x.name for x in OPERATORS.values() if x.in_torch and not isinstance(x, Activation)]
_UNPATCHED = {name: getattr(originals.F, name) for name in _NAMES}
_PATCHED = {name: _patched(name) for name in _NAMES}


# ---- patch and unpatch ---------------------------------------------------------------------------

_lock = fork_safe_lock()
_calls: frozenset[Patch] = frozenset()  # of patch(), without unpatch() or a block
_blocks = 0  # the number of active ``with`` blocks of all threads


class Patch:
    """The result of :func:`pyfused.patch`, a context manager."""

    _entered = 0  # the number of its active blocks

    def __enter__(self) -> Patch:
        with _lock:
            _set(_calls - {self}, _blocks + 1)
            self._entered += 1
        return self

    def __exit__(self, *error: object) -> None:
        with _lock:
            if not self._entered:
                raise RuntimeError("patch: the block was left without being entered, or left twice")
            self._entered -= 1
            _set(_calls | {self}, _blocks - 1)
            _set(_calls - {self}, _blocks)  # if this raises an error, unpatch() ends the call


def patch(function: None = None, /) -> Patch:
    """Makes torch's losses, softmax and log_softmax call pyfused's.

    The patch replaces functions of :mod:`torch.nn.functional`, such as ``cross_entropy``. It
    reaches what calls them through this module: torch's modules and most libraries. It does not
    reach names that were imported before, by ``from torch.nn.functional import ...``, nor built-ins
    such as ``torch.softmax`` and ``Tensor.softmax``. Activations stay torch's, because modules keep
    them as attributes and could not be pickled. Errors are torch's, and pickles refer to torch
    only. In programs that are compiled, also by ``torch.jit.script``, patched functions are
    torch's.

    - ``patch()`` lasts until :func:`unpatch`; a second call changes nothing.
    - ``with patch():`` lasts for the block. Blocks nest.

    The patch affects all threads. It ends when all calls and blocks have ended.

    Raises:
        RuntimeError: Other code has replaced one of the functions. Nothing has been changed.
        TypeError: An argument is passed: ``patch`` is not a decorator.
    """
    if function is not None:
        raise TypeError(
            f"patch: expected no argument, got {type(function).__name__}. Write 'with "
            "pyfused.patch():' in the function, and pyfused.convert(model) for a module"
        )
    new = Patch()
    with _lock:
        _set(_calls | {new}, _blocks)
    return new


def unpatch() -> None:
    """Ends all calls of :func:`patch` and restores torch's functions.

    Raises:
        RuntimeError: ``patch()`` was not called, or other code has replaced one of the functions
            since. Nothing has been changed.
    """
    with _lock:
        if not _calls:
            inside = "; 'with patch()' ends with its block" if _blocks else ""
            raise RuntimeError(f"unpatch() called without patch(){inside}")
        _set(frozenset(), _blocks)


def _set(calls: frozenset[Patch], blocks: int) -> None:
    """Sets the calls and the blocks, and patches torch while there are any. Needs the lock.

    Raises:
        RuntimeError: Other code has replaced a function. Nothing has been changed.
    """
    global _calls, _blocks
    before, after = bool(_calls or _blocks), bool(calls or blocks)
    if after and not before:
        _replace("patch", "torch", _UNPATCHED, _PATCHED)
    elif before and not after:
        _replace("unpatch", "pyfused", _PATCHED, _UNPATCHED)
    _calls, _blocks = calls, blocks


def _replace(caller: str, package: str, current: Functions, new: Functions) -> None:
    """Sets the functions of torch.nn.functional, unless other code has replaced one of them."""
    for name, function in current.items():
        found = getattr(F, name, None)
        if found is not function:
            raise RuntimeError(
                f"{caller}: expected {package}'s function at torch.nn.functional.{name}, got "
                f"{_describe(found)}. Undo the other patch first"
            )
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
    return f"so are calls through names bound before the patch: {names}"


def _describe(function: Any) -> str:
    code = getattr(function, "__code__", None)
    where = f"{code.co_filename}:{code.co_firstlineno}" if code else type(function).__name__
    return f"{getattr(function, '__qualname__', function)} ({where})"
