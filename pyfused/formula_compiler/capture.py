"""Copies a formula's function, with the functions that it calls.

A formula keeps what its names stand for when it is defined: numbers, strings, tuples of these,
functions of torch and math, other formulas and Python functions, also through modules, classes,
closures and functools.partial. Kernels are traced from the copy, and calls that torch computes run
it, so binding a name to another object later changes neither.

Objects that may change, such as lists and tensors, are errors, and so are attributes that a program
has set in torch.Tensor.
"""

from __future__ import annotations

import builtins
import dis
import math
from collections.abc import Iterator, Sequence
from functools import cache, partial
from inspect import getattr_static
from numbers import Number
from types import (
    CellType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MethodDescriptorType,
    ModuleType,
    NoneType,
)
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
    *("reversed", "round", "sorted", "str", "sum", "tuple", "zip"),
)
_CONSTANTS = (Number, str, NoneType, torch.dtype)
_GLOBALS = "LOAD_GLOBAL", "LOAD_NAME"
_RULE = (
    "A formula reads only its arguments, numbers, strings, elementwise functions of torch and "
    "math, and Python functions that do the same"
)


class Capture:
    """Copies functions.

    Args:
        formula: The class of formulas, which functions may call.

    Attributes:
        formulas: The formulas that the functions call.
        copies: The copies of functions.
    """

    def __init__(self, formula: Any) -> None:
        self.formula, self.formulas = formula, list[Any]()
        self.copies = dict[FunctionType, FunctionType]()

    def copy(self, function: Any) -> FunctionType:
        """Returns a copy of a function, without its defaults, that keeps what its names stand for.

        Raises:
            UntraceableError: A name stands for an object that may change.
        """
        if not isinstance(function, FunctionType):
            raise UntraceableError(f"expected a Python function, got a {type(function).__name__}")
        code = function.__code__
        names: dict[str, Any] = {"__builtins__": {"__import__": __import__}}  # torch imports
        cells = {name: CellType() for name in code.co_freevars}
        copy = self.copies[function] = FunctionType(code, names, closure=(*cells.values(),))
        copy.__module__, copy.__qualname__ = function.__module__, function.__qualname__
        kept, value = dict[str, Any](), None
        try:
            for name, is_attribute in _reads(code, code.co_freevars):
                if not is_attribute:
                    if name not in kept:
                        kept[name] = self.kept(name, _value(function, name))
                    value = kept[name]
                elif _is_added(name):
                    raise UntraceableError(f"it reads torch.Tensor.{name}, which is not torch's")
                else:  # an attribute of a module is kept now, even if no trace reads it yet
                    value = getattr(value, name, None) if isinstance(value, _Names) else None
        except UntraceableError as error:
            del self.copies[function]
            raise UntraceableError(f"{function.__name__}: {error}") from None
        for name, value in kept.items():
            if name in cells:
                cells[name].cell_contents = value
            else:
                names[name] = value
        return copy

    def kept(self, path: str, value: Any) -> Any:
        """Returns what a copy has in place of a value.

        Args:
            path: Its name, such as "torch.nn.functional.relu".
        """
        value = _unpatched(value)
        if _is_constant(value):
            return value
        if value is type:
            return _type_of
        if isinstance(value, FunctionType) and _library(value) not in ("torch", "pyfused"):
            if value not in self.copies:
                copy = self.copy(value)
                positional, named = value.__defaults__, value.__kwdefaults__
                copy.__defaults__, copy.__kwdefaults__ = self.arguments(
                    f"a default of {path}", positional or (), named or {}
                )
            return self.copies[value]
        if id(value) in _known():
            return value
        if isinstance(value, self.formula):
            self.formulas.append(value)
            return value.__call__  # without its attributes, which may change
        if isinstance(value, partial):
            function = self.kept(path, value.func)
            args, named = self.arguments(f"an argument of {path}", value.args, value.keywords)
            return partial(function, *args, **named)
        if isinstance(value, (ModuleType, type)):
            return _Names(path, value, self)
        message = f"it reads {path}"
        if not callable(value):
            message += (
                f", a {type(value).__name__}, which may change; pass it as an argument, or assign "
                "its numbers to names first"
            )
        raise UntraceableError(f"{message}. {_RULE}")

    def arguments(
        self, path: str, args: Sequence[Any], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns what a copy has in place of positional and keyword arguments."""
        return (
            tuple([self.kept(path, x) for x in args]),
            {name: self.kept(path, x) for name, x in named.items()},
        )


class _Names(ModuleType):
    """Replaces a module or class, and keeps the attributes that are read."""

    def __init__(self, path: str, owner: Any, capture: Capture) -> None:
        super().__init__(path)
        self.__owner, self.__capture = owner, capture

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__owner, name)
        try:
            value = self.__capture.kept(f"{self.__name__}.{name}", value)
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


def _reads(code: CodeType, free: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Yields the names that a function and those inside it read, and whether each is an attribute.

    Args:
        free: The names of the function's closure.

    Raises:
        UntraceableError: The function imports or assigns a name of another scope, or compares the
            identity of two values, which may be one operand in one call and two in another.
    """
    before = ""
    for each in dis.get_instructions(code):
        op, name = each.opname, each.argval
        if op in _GLOBALS or (op == "LOAD_DEREF" and name in free):
            yield name, False
        elif op.endswith(("_ATTR", "_METHOD")):
            yield name, True
        elif op in ("IMPORT_NAME", "STORE_GLOBAL") or (op == "STORE_DEREF" and name in free):
            raise UntraceableError(f"it imports or assigns {name}; do so outside")
        elif op == "IS_OP" and before not in (*_GLOBALS, "LOAD_ATTR", "LOAD_CONST"):
            raise UntraceableError("it compares two values by 'is'; only constants may follow 'is'")
        if isinstance(name, CodeType):
            yield from _reads(name, free)
        before = op


@cache
def _known() -> dict[int, Any]:
    """Returns the functions and classes that a formula may read, by id; traces check their use."""
    known = [x for name, x in vars(builtins).items() if name in _BUILTINS]
    known += [*vars(math).values(), partial, torch.Tensor, torch.finfo, torch.no_grad]
    known += [torch.full, torch.ones, torch.scalar_tensor, torch.tensor, torch.zeros]
    known += F.hardsigmoid, F.hardswish, F.sigmoid, F.tanh
    for functions in get_overridable_functions().values():
        known += functions
    by_id = {id(x): x for x in map(_unpatched, known)}
    for names in (vars(torch), vars(F)):  # functions in place
        pairs = [(x, names.get(name[:-1])) for name, x in names.items() if name.endswith("_")]
        by_id |= {id(x): x for x, function in pairs if id(function) in by_id}
    return by_id


def _library(function: FunctionType) -> str:
    """Returns the name of the top-level package that defines a function."""
    return str(function.__globals__.get("__name__")).partition(".")[0]


def _is_added(name: str) -> bool:
    """Returns whether the program has set an attribute of torch.Tensor."""
    value = getattr_static(torch.Tensor, name, None)
    if isinstance(value, FunctionType):
        return _library(value) != "torch"
    return not isinstance(value, (GetSetDescriptorType, MethodDescriptorType, NoneType))


def _unpatched(function: Any) -> Any:
    """Returns torch's function for one that pyfused.patch has replaced."""
    if isinstance(function, FunctionType) and _library(function) == "pyfused":
        return getattr(function, "__wrapped__", function)
    return function


def _type_of(value: Any) -> type:
    """Returns the type of an object that is not a tensor: operands may be Parameters."""
    if isinstance(value, torch.Tensor):
        refuse("it asks for the type of a tensor, which may differ between calls")
    return type(value)


def _is_constant(value: Any) -> bool:
    """Returns whether a value cannot change."""
    return isinstance(value, _CONSTANTS) or (
        isinstance(value, tuple) and all(map(_is_constant, value))
    )
