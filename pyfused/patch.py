"""Makes code that calls torch's functions take pyfused's."""

from __future__ import annotations

import functools
import inspect
import logging
import sys
import threading
from collections.abc import Callable, Iterable
from types import ModuleType, TracebackType
from typing import Any, NamedTuple, TypeVar, overload

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from pyfused import functional
from pyfused.ops.dispatch import compiler_traces

Function = TypeVar("Function", bound=Callable[..., Any])

_log = logging.getLogger("pyfused")
_ERRORS = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)


class Site(NamedTuple):
    """A name that is replaced, and what torch has there."""

    path: str
    owner: Any
    name: str
    torchs: Any

    def now(self) -> Any:
        return getattr(self.owner, self.name)

    def put(self, function: Any) -> None:
        setattr(self.owner, self.name, function)

    def put_back(self) -> None:
        if self.owner is Tensor:
            delattr(self.owner, self.name)  # inherited from its base, and so found there again
        else:
            setattr(self.owner, self.name, self.torchs)

    def is_torchs(self) -> bool:
        if self.now() is not self.torchs or (self.owner is Tensor and self.name in vars(Tensor)):
            return False
        # What stood there already when pyfused was imported may have been someone's, too.
        return getattr(self.torchs, "__globals__", vars(F)) is vars(F)


_SITES = (
    *(Site(f"torch.nn.functional.{op}", F, op, getattr(F, op)) for op in functional.__all__),
    Site("torch.relu", torch, "relu", torch.relu),
    Site("torch.Tensor.relu", Tensor, "relu", Tensor.relu),
)


def _parameters(module: ModuleType, name: str) -> Iterable[str]:
    return inspect.signature(getattr(module, name)).parameters


def _redirect(site: Site) -> Callable[..., Any]:
    """A function that calls pyfused's, with torch's name, documentation and errors."""
    name, torchs = site.name, site.torchs
    only_input = site.owner is not F  # torch.relu has no inplace
    extra = set(_parameters(functional, name)) - set(_parameters(F, name))

    def call(*args: Any, **kwargs: Any) -> Any:
        # Subclasses and modes know torch's functions by their identity; the compiler's do not care.
        overridden = has_torch_function(args) or (
            kwargs and has_torch_function((*kwargs.values(),))
        )
        if overridden and not compiler_traces():
            return handle_torch_function(torchs, (*args, *kwargs.values()), *args, **kwargs)
        if (only_input and len(args) + len(kwargs) != 1) or not extra.isdisjoint(kwargs):
            return torchs(*args, **kwargs)
        try:
            return getattr(functional, name)(*args, **kwargs)
        except _ERRORS as error:
            ours = error
        torchs(*args, **kwargs)  # raises torch's own error, if it is one of the arguments
        raise ours

    functools.update_wrapper(call, torchs)
    # Not torch's address: models that hold the function are pickled by it, and the compiler keeps
    # what it made of torch's functions, on disk and by address.
    call.__module__, call.__qualname__ = __name__, site.path.replace(".", "_")
    globals()[call.__qualname__] = call
    return call


_REDIRECTS = {site: _redirect(site) for site in _SITES}


# ---- who wants the sites replaced ----------------------------------------------------------------

_lock = threading.RLock()
_calls: set[Patch] = set()  # by a call of patch(), until unpatch()
_blocks = 0  # entered and not left, in all threads together
_installed = False


class Patch:
    """What :func:`patch` returns: to be ignored, or entered by ``with``, or used as decorator."""

    def __enter__(self) -> Patch:
        global _blocks
        with _lock:
            _install()
            _blocks += 1
            _calls.discard(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        global _blocks
        with _lock:
            _blocks -= 1
            _remove_unless_wanted()

    def __call__(self, function: Function) -> Function:
        with _lock:
            _calls.discard(self)
            _remove_unless_wanted()
        return patch(function)


@overload
def patch() -> Patch: ...
@overload
def patch(function: Function) -> Function: ...
def patch(function: Any = None) -> Any:
    """Makes calls of torch's cross_entropy, mse_loss and relu take pyfused's.

    Replaced are the names in :mod:`torch.nn.functional`, :func:`torch.relu` and
    ``torch.Tensor.relu``: whoever looks them up from now on gets pyfused's, torch's own modules and
    losses deep in a library too. Whoever looked before, as ``from torch import relu`` does, keeps
    torch's. Errors are torch's own.

    - ``patch()`` lasts until :func:`unpatch`; a second call changes nothing.
    - ``with patch():`` lasts for the block. Blocks nest.
    - ``@patch`` and ``@patch()`` last for each call of the function.

    What is replaced is replaced for all threads, until the last that wants it has ended.

    Raises:
        RuntimeError: Someone else has replaced one of the names. Nothing has been changed.
        TypeError: What is decorated is a coroutine or a generator, which leave and come back.
    """
    if function is None:
        asked = Patch()
        with _lock:
            if _calls:
                _log.info("patch: in effect already")
            _install()
            _calls.add(asked)
        return asked
    if not callable(function):
        raise TypeError(f"function: expected a function, got {type(function).__name__}")
    kinds = inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction
    if any(is_kind(function) for is_kind in kinds):
        raise TypeError(
            f"function: expected one that returns before others run, got {function!r}, a coroutine "
            "or generator. Use 'with pyfused.patch():' around what it calls."
        )

    @functools.wraps(function)
    def patched(*args: Any, **kwargs: Any) -> Any:
        with patch():
            return function(*args, **kwargs)

    return patched


def unpatch() -> None:
    """Ends what calls of :func:`patch` began: torch's names hold torch's own functions again.

    Raises:
        RuntimeError: There was no such call, or someone else has since replaced one of the names.
            Nothing has been changed.
    """
    with _lock:
        if not _calls:
            raise RuntimeError(
                "unpatch: expected a call of patch() before"
                + (", got 'with patch()', which ends with its block" if _blocks else ", got none")
            )
        before = set(_calls)
        _calls.clear()
        try:
            _remove_unless_wanted()
        except RuntimeError:
            _calls.update(before)
            raise


def _install() -> None:
    global _installed
    if _installed:
        return
    for site in _SITES:
        if not site.is_torchs():
            raise RuntimeError(
                f"patch: expected torch's own function at {site.path}, got "
                f"{_describe(site.now())}. Undo that patch first."
            )
    table = _compilers_table()
    if table:
        table()  # before the names are pyfused's
    for site, redirect in _REDIRECTS.items():
        site.put(redirect)
    _installed = True


def _remove_unless_wanted() -> None:
    global _installed
    if _calls or _blocks or not _installed:
        return
    for site, redirect in _REDIRECTS.items():
        if site.now() is not redirect:
            raise RuntimeError(
                f"unpatch: expected pyfused's function at {site.path}, got "
                f"{_describe(site.now())}. Undo that patch first."
            )
    for site in _SITES:
        site.put_back()
    _installed = False
    table = _compilers_table()
    if table and not table().keys().isdisjoint(_REDIRECTS.values()):
        table.cache_clear()  # learnt while the names were pyfused's


def _describe(function: Any) -> str:
    code = getattr(function, "__code__", None)
    where = f"{code.co_filename}:{code.co_firstlineno}" if code else type(function).__name__
    return f"{getattr(function, '__qualname__', function)} ({where})"


def _compilers_table() -> Any:
    """What torch.compile learns, once and by name, of torch's functions; None before its use."""
    rules = sys.modules.get("torch._dynamo.trace_rules")
    return rules and rules.get_torch_obj_rule_map
