"""Makes torch's functions call pyfused's."""

from __future__ import annotations

import functools
import inspect
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ContextDecorator
from functools import cached_property
from operator import itemgetter
from types import BuiltinFunctionType, CodeType, MethodDescriptorType, MethodType, NoneType
from typing import Any, TypeVar, overload

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.fx import Proxy
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from pyfused import checks, functional
from pyfused.dispatch import run as dispatch
from pyfused.dispatch.operator import Operator, Options, Tensors, parameters_of
from pyfused.dispatch.originals import TorchAlone, original, torch_alone
from pyfused.dispatch.reasons import first_time, stacklevel
from pyfused.dispatch.sizes import COMPILED
from pyfused.ops.operators import OPERATORS
from pyfused.torch_internals import dynamo_table, register_with_jit, trace_instead

Function = TypeVar("Function", bound=Callable[..., Any])

_log = logging.getLogger("pyfused")
C_FUNCTIONS = (BuiltinFunctionType, MethodDescriptorType)


# ---- patched functions ---------------------------------------------------------------------------


class _Function:
    """A Python function of torch.nn.functional; patching replaces its code, not the object.

    The patch therefore affects names that were imported before, and pickles refer to torch. The new
    code has torch's parameters, file and line, because inspect and torch.jit.script read torch's
    source.
    """

    def __init__(self, op: Operator) -> None:
        self.path, self.name, self.op = f"torch.nn.functional.{op.name}", op.name, op
        self.function = getattr(F, op.name)
        self.traced, self.copy = getattr(functional, op.name), original(self.function)
        # Another library may have replaced it before pyfused was imported.
        is_torch = getattr(self.function, "__globals__", None) is vars(F)
        self.unpatched = self.function.__code__ if is_torch else None

    @cached_property
    def ours(self) -> Any:
        if self.unpatched is None:
            return None
        op, names, torch_function = self.op, list(parameters_of(self.function)), self.copy
        by_place = self.unpatched.co_argcount
        parameters = [name for name in names if name != "inplace"]
        deprecated = [i for i, name in enumerate(parameters) if name in ("size_average", "reduce")]
        pick, defaults = _picker(op, [name.lstrip("_") for name in parameters])

        level = parameters.index("_stacklevel") if "_stacklevel" in parameters else None

        def torch_call(arguments: Any, *inplace: Any, frames: int = 3) -> Any:
            """Calls torch's function; ``frames`` are between its frame and the user's."""
            if level is not None:
                arguments = (
                    *arguments[:level],
                    arguments[level] + frames,
                    *arguments[level + 1 :],
                )
            named = dict(zip(parameters[by_place:], arguments[by_place:], strict=True))
            return torch_function(*arguments[:by_place], *inplace, **named)

        def call(arguments: Any, *inplace: Any) -> Any:
            if has_torch_function(arguments) or is_dynamo_compiling() or torch_alone.depth:
                return torch_call(arguments, *inplace)
            if inplace and inplace[0]:
                with torch_alone:
                    return torch_call(arguments, *inplace)
            for i in deprecated:
                if arguments[i] is not None:
                    with torch_alone:
                        return torch_call(arguments)
            tensors, options = pick(arguments + defaults)
            if dispatch.is_small(op, tensors, options):
                if op.fast is not None:
                    return op.fast(*tensors, options)
                with torch_alone:
                    return torch_call(arguments)
            unbound = functools.partial(torch_call, arguments, frames=4)
            return _run(op, tensors, options, unbound)

        inplace = ", inplace" * ("inplace" in names)
        return code_calling(call, f"callee(({', '.join(parameters)},){inplace})", self.unpatched)

    def current(self) -> Any:
        return getattr(F, self.name)

    def has(self, code: Any) -> bool:
        is_installed = self.current() is self.function and code is not None
        return is_installed and self.function.__code__ is code

    def put(self, code: Any) -> None:
        # The compiler puts torch's functions into graphs by name, not by code. Functions
        # that may become custom operators are traced instead. The copy with torch's code must not
        # be traced, because its trace would lead back to this function.
        if self.op.name in COMPILED or self.function.__name__ != self.name:
            is_ours = code is self.ours
            trace_instead(self.function, self.traced if is_ours else None)
            trace_instead(self.copy, None if is_ours else self.function)
        self.function.__code__ = code


class StandIn(functools.partial[Any]):
    """Replaces a built-in of torch, and is equal to it.

    Dictionaries of functions, such as those in ``__torch_function__``, therefore find both. Like a
    built-in, it binds an instance only if it replaces a method.
    """

    __wrapped__: Any
    __name__: str
    __qualname__: str

    def __eq__(self, other: object) -> bool:
        function = other.__wrapped__ if isinstance(other, StandIn) else other
        return bool(function is self.__wrapped__)

    def __hash__(self) -> int:
        return hash(self.__wrapped__)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        if instance is None or not isinstance(self.__wrapped__, MethodDescriptorType):
            return self
        return MethodType(self, instance)

    def __reduce__(self) -> str:  # pickles by name, like a function
        return self.__qualname__


class _BuiltIn:
    """A built-in of torch or Tensor: it has no code, so patching replaces the attribute."""

    def __init__(self, owner: Any, op: Operator) -> None:
        self.owner, self.name, self.op = owner, op.name, op
        self.path = f"{'torch.Tensor' if owner is Tensor else owner.__name__}.{self.name}"
        self.unpatched = getattr(owner, self.name)

    @cached_property
    def ours(self) -> Any:
        op, torch_function = self.op, self.unpatched
        defaults = parameters_of(getattr(functional, op.name))
        first = [name for name, default in defaults.items() if default is ... or name == "dim"]
        method, needed, count = self.owner is Tensor, len(first), len(op.operands)
        by_name = [name for name in [*defaults][1:] if name != "inplace" and name[0] != "_"]
        by_place = (*first, *by_name[needed - 1 :]) if needed > 1 else first
        required, known = {*first}, {*first, *by_name}
        defaults |= {"stacklevel": defaults.get("_stacklevel")}

        def call(*args: Any, **kwargs: Any) -> Any:
            if has_torch_function((*args, *kwargs.values())):
                if any(isinstance(value, Proxy) for value in args):
                    # Graph passes compare functions with torch's attributes by identity.
                    return handle_torch_function(stand_in, args, *args, **kwargs)
                return torch_function(*args, **kwargs)
            if (
                is_dynamo_compiling()
                or torch_alone.depth
                or (len(args) >= needed and dispatch.is_small(op, args[:count], args[count:]))
            ):
                return torch_function(*args, **kwargs)
            bound = dict(zip(by_place, args, strict=False)) | kwargs
            once = len(bound) == len(args) + len(kwargs) and len(args) >= method
            if not (once and required.issubset(bound) and known.issuperset(bound)):
                return torch_function(*args, **kwargs)  # raises, or supports these arguments
            bound = defaults | bound
            tensors = tuple([bound[operand.name] for operand in op.all_operands])
            options = op.options(**{name: bound[name] for name in op.fields})
            unbound = functools.partial(torch_function, *args, **kwargs)
            if dispatch.is_small(op, tensors, options):
                return unbound()
            return _run(op, tensors, options, unbound)

        stand_in = StandIn(call)
        globals()[self.path.replace(".", "_")] = stand_in
        return functools.update_wrapper(stand_in, torch_function)

    def current(self) -> Any:
        return getattr(self.owner, self.name)

    def has(self, function: Any) -> bool:
        inherited = self.owner is not Tensor or self.name not in vars(Tensor)
        return self.current() is function and (inherited or function is self.ours)

    def put(self, function: Any) -> None:
        # Pickles refer to torch while the function is installed there.
        is_ours = function is self.ours
        owner = "torch" if self.owner is Tensor else self.owner.__name__
        self.ours.__module__ = owner if is_ours else __name__
        self.ours.__qualname__ = (
            self.path.removeprefix(f"{owner}.") if is_ours else self.path.replace(".", "_")
        )
        if self.owner is Tensor and function is self.unpatched:
            if self.name in vars(Tensor):
                delattr(self.owner, self.name)  # the base class has it
        else:
            setattr(self.owner, self.name, function)


def _picker(
    op: Operator, parameters: Sequence[str]
) -> tuple[Callable[[Any], Any], tuple[Any, ...]]:
    """Returns a function that picks the tensors and the options of a call from a tuple.

    The tuple holds the arguments of these names, followed by the second result: the defaults of the
    arguments that torch's function lacks.
    """
    given = ["torch_options" if name == "options" else name for name in parameters]
    absent = [name for name in op.names if name not in given]
    (kind,) = op.options.args
    index, count = [*given, *absent].index, len(op.all_operands)
    picked = [index(name) for name in op.names]
    picks = itemgetter(*picked) if len(picked) > 1 else itemgetter(slice(1))
    ignored = given.index("ignore_index") if op.is_linear else None  # None means -100

    def pick(arguments: tuple[Any, ...]) -> tuple[Tensors, Options]:
        if ignored is not None and arguments[ignored] is None:
            arguments = (*arguments[:ignored], -100, *arguments[ignored + 1 :])
        flat = picks(arguments)
        return flat[:count], op.options(*flat[count:])

    return pick, tuple([kind._field_defaults.get(name) for name in absent])


def _run(
    op: Operator,
    tensors: Tensors,
    options: Options,
    torch_call: Callable[[], Tensor],
) -> Tensor:
    """Returns the result of a kernel, or else of torch's function, which raises torch's errors.

    If pyfused's checks raise an error and torch does not, the result is torch's, and a warning
    reports the error once. Other errors pass through.
    """
    failure = None
    try:
        reason, kernel, options = dispatch.decide(op, tensors, options)
        if kernel is not None:
            return kernel(tensors, options)  # type: ignore[no-any-return]
        dispatch.report_fallback(op, tensors, str(reason))
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        if not checks.raised(error):
            raise
        failure = error
    # Called outside of `except`, to keep pyfused's error out of the context of torch's error.
    with torch_alone:
        result = torch_call()
    if failure is not None and first_time(op.name, type(failure).__name__):
        message = (
            f"pyfused: {op.name}: torch computed the result, because pyfused raised {failure!r}"
        )
        warnings.warn(message, RuntimeWarning, stacklevel=stacklevel())
    return result


def code_calling(callee: Callable[..., Any], call: str, torch_function: CodeType) -> CodeType:
    """Returns code that calls a function, with the parameters and source lines of torch's function.

    The callee is one of its constants, because its globals are torch's.

    Args:
        call: The source code that calls ``callee`` with the parameters of torch's function.
    """
    by_place = torch_function.co_varnames[: torch_function.co_argcount]
    by_name = torch_function.co_varnames[len(by_place) :][: torch_function.co_kwonlyargcount]
    parameters = ", ".join((*by_place, *("*",) * bool(by_name), *by_name))
    source = f"def {torch_function.co_name}({parameters}): callee = 'callee'; return {call}"
    module = compile(source, torch_function.co_filename, "exec")
    code = next(constant for constant in module.co_consts if isinstance(constant, CodeType))
    return code.replace(
        co_consts=tuple(
            callee if constant == "callee" else constant for constant in code.co_consts
        ),
        co_firstlineno=torch_function.co_firstlineno,
    )


def _sites() -> Iterator[_Function | _BuiltIn]:
    """Yields torch's functions for each operator: a Python function, and built-ins."""
    for op in OPERATORS.values():
        if not isinstance(getattr(F, op.name, None), (*C_FUNCTIONS, NoneType)):
            yield _Function(op)
        for owner in () if "reduction" in op.fields else (F, torch, Tensor):
            if isinstance(getattr(owner, op.name, None), C_FUNCTIONS):
                yield _BuiltIn(owner, op)


_SITES = (*_sites(),)
_TRACED_FUNCTIONS = [site.traced for site in _SITES if isinstance(site, _Function)]


# ---- patch and unpatch ---------------------------------------------------------------------------

_lock = threading.RLock()
# The calls of patch() without unpatch(), and the active ``with`` blocks of all threads.
Users = tuple[frozenset["Patch"], tuple["Patch", ...]]
_NOBODY: Users = frozenset(), ()
_users = _NOBODY
_installed = False


class Patch(ContextDecorator):
    """The result of :func:`pyfused.patch`, a context manager and decorator."""

    def __enter__(self) -> Patch:
        with _lock:
            calls, blocks = _users
            calls -= {self}
            _set_users((calls, (*blocks, self)), if_interrupted=(calls, blocks))
        return self

    def __exit__(self, *error: object) -> None:
        with _lock:
            calls, blocks = _users
            last = len(blocks) - 1 - blocks[::-1].index(self)
            users = calls, blocks[:last] + blocks[last + 1 :]
            _set_users(users, if_interrupted=users)

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
        with _lock:
            calls, blocks = _users
            users = calls - {self}, blocks
            _set_users(users, if_interrupted=users)
        return super().__call__(function)


@overload
def patch() -> Patch: ...
@overload
def patch(function: Function) -> Function: ...
def patch(function: Any = None) -> Any:
    """Makes torch's losses and activations call pyfused's.

    Functions of :mod:`torch.nn.functional` stay the same objects and get new code. This affects
    torch's modules, losses inside libraries, and names that were imported before. Activations that
    are built-ins of :mod:`torch` and :class:`torch.Tensor`, such as ``torch.relu``, ``torch.relu_``
    and ``Tensor.relu``, have no Python code, so the attributes are replaced; a name imported before
    by ``from torch import relu`` remains torch's. Errors are torch's, and pickles refer to torch
    only.

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
    new = Patch()
    with _lock:
        calls, blocks = _users
        if calls:
            _log.info("patch: already active")
        _set_users((calls | {new}, blocks), if_interrupted=_users)
    return new


def unpatch() -> None:
    """Ends all calls of :func:`patch` and restores torch's functions.

    Raises:
        RuntimeError: ``patch()`` was not called, or other code has replaced one of the functions
            since. Nothing has been changed.
    """
    with _lock:
        calls, blocks = _users
        if not calls:
            inside = "; 'with patch()' ends with its block" if blocks else ""
            raise RuntimeError(f"unpatch() called without patch(){inside}")
        users = frozenset[Patch](), blocks
        _set_users(users, if_interrupted=users)


def _expect(caller: str, package: str, function: Callable[[Any], Any]) -> None:
    """Raises if other code has replaced one of the package's functions."""
    for site in _SITES:
        if not site.has(function(site)):
            raise _ReplacedError(
                f"{caller}: expected {package}'s function at {site.path}, got "
                f"{_describe(site.current())}. Undo the other patch first"
            )


class _ReplacedError(RuntimeError):
    """Other code has replaced a function."""


def _set_users(users: Users, if_interrupted: Users) -> None:
    """Patches torch if it has users, or else restores it: all functions or none.

    Args:
        if_interrupted: The users if an error, such as a KeyboardInterrupt, ends this function.

    Raises:
        RuntimeError: Other code has replaced a function. Nothing has been changed.
    """
    global _users, _installed
    wanted = users != _NOBODY
    try:
        if wanted and not _installed:
            _expect("patch", "torch", lambda site: site.unpatched)
            TorchAlone.needed = True
            table = dynamo_table()
            if table:
                table()  # fills the compiler's table with torch's functions
            for site in _SITES:
                if isinstance(site, _BuiltIn):
                    register_with_jit(site.unpatched, site.ours)
                site.put(site.ours)
        elif _installed and not wanted:
            _expect("unpatch", "pyfused", lambda site: site.ours)
            _restore()
        _installed, _users = wanted, users
    except _ReplacedError:
        raise
    except BaseException:
        _users = if_interrupted
        if _users == _NOBODY:
            _restore()
            _installed = False
        raise


def _restore() -> None:
    for site in _SITES:
        site.put(site.unpatched)
    table = dynamo_table()
    # A stand-in is equal to torch's built-in, so it may stay in the table.
    if table and not table().keys().isdisjoint(_TRACED_FUNCTIONS):
        table.cache_clear()  # it was filled with pyfused's functions


def _describe(function: Any) -> str:
    code = getattr(function, "__code__", None)
    where = f"{code.co_filename}:{code.co_firstlineno}" if code else type(function).__name__
    return f"{getattr(function, '__qualname__', function)} ({where})"
