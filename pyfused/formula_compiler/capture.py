"""Copies a formula's function, with the functions that it calls.

A formula reads its arguments, literals, functions and constants of torch and math, and Python
functions that follow the same rule, also through modules, classes and functools.partial. The copy
keeps what names stand for when the formula is defined, and what attributes of modules and classes
are when they are first read. Kernels are traced from the copy, and calls that torch computes run
it, so binding a name to another object later changes neither.

A name of another object is an error. An attribute that is another object, such as a number of the
user's module, makes a trace fail, because a kernel would keep its value; calls that torch computes
read its value of that moment.
"""

from __future__ import annotations

import builtins
import dis
import math
from collections.abc import Iterator, Sequence
from functools import cache, partial
from types import CellType, CodeType, FunctionType, ModuleType, NoneType
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import get_overridable_functions

from pyfused.formula_compiler.program import UntraceableError
from pyfused.formula_compiler.trace import refuse

_BUILTINS = (
    *[name for name in vars(builtins) if name.endswith(("Error", "Exception"))],
    *("abs", "all", "any", "bool", "dict", "divmod", "enumerate", "filter", "float", "int"),
    *("isinstance", "iter", "len", "list", "map", "max", "min", "next", "pow", "range"),
    *("reversed", "round", "sorted", "str", "sum", "tuple", "type", "zip"),
)
_DEFAULTS = (bool, int, float, str, NoneType)  # of functions that a formula calls
_NUMBERS = (math.pi, math.e, math.tau, math.inf, math.nan)
_RULE = (
    "A formula reads only its arguments, literals, elementwise functions of torch and math, and "
    "Python functions that do the same"
)


class Capture:
    """Copies functions.

    Args:
        formula: The class of formulas, which functions may call.

    Attributes:
        formulas: The formulas that the functions call.
    """

    def __init__(self, formula: Any) -> None:
        self.formula, self.formulas = formula, list[Any]()

    def copy(self, function: Any, copies: dict[Any, FunctionType]) -> FunctionType:
        """Returns a copy of a function that calls copies of other functions.

        Args:
            copies: The copies of the functions that call this one.

        Raises:
            UntraceableError: The function reads a name of another object.
        """
        if not isinstance(function, FunctionType):
            raise UntraceableError(f"expected a Python function, got a {type(function).__name__}")
        if function in copies:
            return copies[function]
        code = function.__code__
        names: dict[str, Any] = {"__builtins__": {"__import__": __import__}}  # torch imports
        cells = {name: CellType() for name in code.co_freevars}
        copy = copies[function] = FunctionType(code, names, closure=(*cells.values(),))
        copy.__defaults__ = function.__defaults__
        copy.__kwdefaults__ = function.__kwdefaults__ and dict(function.__kwdefaults__)
        copy.__module__, copy.__qualname__ = function.__module__, function.__qualname__
        try:
            for name in dict.fromkeys((*cells, *_globals_read(code))):
                value = self.kept(name, _value(function, name), None, copies)
                if name in cells:
                    cells[name].cell_contents = value
                else:
                    names[name] = value
        except UntraceableError as error:
            raise UntraceableError(f"{function.__name__}: {error}") from None
        return copy

    def kept(self, path: str, value: Any, owner: Any, copies: dict[Any, FunctionType]) -> Any:
        """Returns what a copy has in place of a value.

        Args:
            path: Its name, such as "torch.nn.functional.relu".
            owner: The module or class of which it is an attribute, or None.
        """
        value = _unpatched(value)
        if id(value) in _known() or _is_constant(value, owner):
            return value
        if isinstance(value, self.formula):
            self.formulas.append(value)
            return value.__call__  # without its attributes, which may change
        if isinstance(value, partial):
            _check_constants(path, (*value.args, *value.keywords.values()))
            called = self.kept(path, value.func, None, copies)
            return partial(called, *value.args, **value.keywords)
        if _is_followed(value):
            defaults = *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()
            _check_constants(path, defaults)
            if attributes := vars(value).keys() - {"__wrapped__"}:
                raise UntraceableError(f"{path} has attributes that may change: {min(attributes)}")
            return self.copy(value, copies)
        if isinstance(value, (ModuleType, type)):
            return _Names(path, value, self)
        message = f"it reads {path}"
        if not callable(value):
            message += f", a {type(value).__name__}; pass it as an argument with a default"
        raise UntraceableError(f"{message}. {_RULE}")


class _Names(ModuleType):
    """Replaces a module or class, and keeps the attributes that may be read."""

    def __init__(self, path: str, owner: Any, capture: Capture) -> None:
        super().__init__(path)
        self.__owner, self.__capture = owner, capture

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__owner, name)
        try:
            value = self.__capture.kept(f"{self.__name__}.{name}", value, self.__owner, {})
        except UntraceableError as error:
            refuse(str(error))
        else:
            setattr(self, name, value)
        return value

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        refuse(f"it calls {self.__name__}. {_RULE}")
        return self.__owner(*arguments, **named)


def _value(function: FunctionType, name: str) -> Any:
    """Returns what a name outside of a function stands for."""
    closure = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    try:
        if (cell := dict(closure).get(name)) is not None:
            return cell.cell_contents
        return (vars(builtins) | function.__globals__)[name]
    except (KeyError, ValueError):  # ValueError: the name is not bound yet
        raise UntraceableError(f"name {name!r} is not defined") from None


def _globals_read(code: CodeType) -> Iterator[str]:
    """Yields the names of globals that a function and those inside it read.

    Raises:
        UntraceableError: The function imports or assigns a name of another scope.
    """
    for each in dis.get_instructions(code):
        op, name = each.opname, each.argval
        if op in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield name
        is_nonlocal = op == "STORE_DEREF" and name in code.co_freevars
        if is_nonlocal or op in ("IMPORT_NAME", "STORE_GLOBAL"):
            raise UntraceableError(f"it imports or assigns {name}; do so outside")
        if isinstance(name, CodeType):
            yield from _globals_read(name)


@cache
def _known() -> dict[int, Any]:
    """Returns functions and classes that a formula may read, by id; a trace looks at their use."""
    known = [x for name, x in vars(builtins).items() if name in _BUILTINS]
    known += filter(callable, vars(math).values())
    known += [partial, torch.Tensor, torch.finfo, torch.no_grad]
    known += [torch.full, torch.ones, torch.scalar_tensor, torch.tensor, torch.zeros]
    known += F.hardsigmoid, F.hardswish, F.sigmoid, F.tanh
    for functions in get_overridable_functions().values():
        known += functions
    by_id = {id(x): x for x in map(_unpatched, known)}
    for names in (vars(torch), vars(F)):  # functions in place
        pairs = [(x, names.get(name[:-1])) for name, x in names.items() if name.endswith("_")]
        by_id |= {id(x): x for x, function in pairs if id(function) in by_id}
    return by_id


def _unpatched(function: Any) -> Any:
    """Returns torch's function for one that pyfused.patch has replaced."""
    if isinstance(function, FunctionType) and function.__globals__.get("__package__") == "pyfused":
        return getattr(function, "__wrapped__", function)
    return function


def _is_constant(value: Any, owner: Any) -> bool:
    """Returns whether a value is a number of torch, math or numpy, or a dtype of torch."""
    library = getattr(owner, "__name__", "").partition(".")[0]
    is_library = library in ("math", "numpy", "torch") or any(value is x for x in _NUMBERS)
    return is_library and isinstance(value, (float, torch.dtype))


def _is_followed(value: Any) -> bool:
    """Returns whether a value is a Python function that neither torch nor pyfused defines."""
    if not isinstance(value, FunctionType):
        return False
    return str(value.__globals__.get("__name__")).partition(".")[0] not in ("torch", "pyfused")


def _check_constants(path: str, values: Sequence[Any]) -> None:
    """Raises an error if a value that a function is called with may change."""
    if wrong := [x for x in values if not isinstance(x, _DEFAULTS)]:
        kind = type(wrong[0]).__name__
        raise UntraceableError(f"{path} has a default that may change, a {kind}")
