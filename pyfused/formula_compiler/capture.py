"""Copies a formula's function, with the functions that it calls.

A formula reads its arguments, literals, functions and constants of torch and math, and Python
functions that follow the same rule, also through modules, classes and functools.partial. The copy
keeps what names stand for when the formula is defined, and what attributes of modules and classes
are when they are first read. Kernels are traced from the copy, and calls that torch computes run
it, so binding a name to another object later changes neither.

A name of another object is an error. An attribute that is another object, such as a number of the
user's module, makes a trace fail, because a kernel would keep its value; calls that torch computes
read its value of that moment.

Attributes of tensors cannot be kept, so their names must stand for what torch defines. If a program
sets one of them later, torch computes the calls.
"""

from __future__ import annotations

import builtins
import dis
import math
from collections.abc import Iterable, Iterator, Sequence, Set
from functools import cache, partial
from types import (
    BuiltinFunctionType,
    CellType,
    ClassMethodDescriptorType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodDescriptorType,
    ModuleType,
    NoneType,
    WrapperDescriptorType,
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
    *("reversed", "round", "sorted", "str", "sum", "tuple", "type", "zip"),
)
_DEFAULTS = (bool, int, float, str, NoneType)  # of functions that a formula calls
_NUMBERS = (math.pi, math.e, math.tau, math.inf)
_GLOBALS = "LOAD_GLOBAL", "LOAD_NAME"
_NATIVE = (
    *(BuiltinFunctionType, ClassMethodDescriptorType, GetSetDescriptorType, MemberDescriptorType),
    *(MethodDescriptorType, WrapperDescriptorType),
)
# Special methods that no operator or builtin in a formula calls.
_UNUSED = "__annotations__", "__deepcopy__", "__dir__", "__doc__", "__reduce_ex__", "__repr__"
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
        attributes: The names of the attributes that the functions read.
    """

    def __init__(self, formula: Any) -> None:
        self.formula, self.formulas, self.attributes = formula, list[Any](), set[str]()

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
            reads = list(_reads(code))
            self.check_attributes(name for name, is_global in reads if not is_global)
            for name in dict.fromkeys((*cells, *[name for name, is_global in reads if is_global])):
                value = self.kept(name, _value(function, name), copies)
                if name in cells:
                    cells[name].cell_contents = value
                else:
                    names[name] = value
        except UntraceableError as error:
            raise UntraceableError(f"{function.__name__}: {error}") from None
        return copy

    def kept(self, path: str, value: Any, copies: dict[Any, FunctionType]) -> Any:
        """Returns what a copy has in place of a value.

        Args:
            path: Its name, such as "torch.nn.functional.relu".
        """
        value = _unpatched(value)
        if isinstance(value, FunctionType):
            if attributes := vars(value).keys() - {"__wrapped__"}:
                raise UntraceableError(f"{path} has attributes that may change: {min(attributes)}")
            if id(value) in _known():
                self.check_attributes(value.__code__.co_names)
        if id(value) in _known() or _is_constant(value):
            return value
        if isinstance(value, self.formula):
            self.formulas.append(value)
            self.check_attributes(value.attributes)
            return value.__call__  # without its attributes, which may change
        if isinstance(value, partial):
            _check_constants(path, (*value.args, *value.keywords.values()))
            called = self.kept(path, value.func, copies)
            return partial(called, *value.args, **value.keywords)
        if _is_followed(value):
            defaults = *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()
            _check_constants(path, defaults)
            return self.copy(value, copies)
        if isinstance(value, (ModuleType, type)):
            return _Names(path, value, self)
        message = f"it reads {path}"
        if not callable(value):
            message += f", a {type(value).__name__}; pass it as an argument with a default"
        raise UntraceableError(f"{message}. {_RULE}")

    def check_attributes(self, names: Iterable[str]) -> None:
        """Adds names to the attributes that the functions read.

        Raises:
            UntraceableError: The program has set one of them in a class of torch.
        """
        self.attributes.update(names)
        if problem := replaced(self.attributes):
            raise UntraceableError(f"{problem}. {_RULE}")


class _Names(ModuleType):
    """Replaces a module or class, and keeps the attributes that may be read."""

    def __init__(self, path: str, owner: Any, capture: Capture) -> None:
        super().__init__(path)
        self.__owner, self.__capture = owner, capture

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__owner, name)
        try:
            value = self.__capture.kept(f"{self.__name__}.{name}", value, {})
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


def _reads(code: CodeType) -> Iterator[tuple[str, bool]]:
    """Yields the names that a function and those inside it read, and whether each is a global.

    The others are names of attributes; those of class patterns are constants.

    Raises:
        UntraceableError: The function imports or assigns a name of another scope, or compares the
            identity of two values, which may be one operand in one call and two in another.
    """
    before = ""
    for each in dis.get_instructions(code):
        op, name = each.opname, each.argval
        if op in _GLOBALS:
            yield name, True
        elif op.endswith(("_ATTR", "_METHOD")):
            yield name, False
        elif isinstance(name, tuple):
            yield from ((x, False) for x in name if isinstance(x, str))
        is_nonlocal = op == "STORE_DEREF" and name in code.co_freevars
        if is_nonlocal or op in ("IMPORT_NAME", "STORE_GLOBAL"):
            raise UntraceableError(f"it imports or assigns {name}; do so outside")
        if op == "IS_OP" and before not in (*_GLOBALS, "LOAD_ATTR", "LOAD_CONST"):
            raise UntraceableError("it compares two values by 'is'; only constants may follow 'is'")
        if isinstance(name, CodeType):
            yield from _reads(name)
        before = op


@cache
def _known() -> dict[int, Any]:
    """Returns functions and classes that a formula may read, by id; a trace looks at their use."""
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
    return {key: x for key, x in by_id.items() if _is_librarys(x)}  # programs may have added some


def _is_librarys(value: Any) -> bool:
    """Returns whether Python or torch defines a function, a class or an attribute of a class."""
    value = getattr(value, "fget", getattr(value, "__func__", value))  # of properties and methods
    if not isinstance(value, (FunctionType, type)):
        return isinstance(value, _NATIVE)
    modules = [str(value.__module__)]
    if isinstance(value, FunctionType):  # decorators of torch set __module__
        modules.append(str(value.__globals__.get("__name__")))
    return all(x.partition(".")[0] in ("builtins", "functools", "torch") for x in modules)


def _is_data(name: str, value: Any) -> bool:
    return name.startswith("__") and not callable(value)


# What torch defines in the classes that a formula reads as they are.
_AS_IMPORTED = {
    path: (vars(each), {k: x for k, x in vars(each).items() if _is_data(k, x) or _is_librarys(x)})
    for path, each in (("torch.Tensor", torch.Tensor), ("torch.no_grad", torch.no_grad))
}


def replaced(names: Set[str]) -> str | None:
    """Returns why functions may read what the program has set in torch's classes, or None.

    Args:
        names: The names of the attributes that the functions read.
    """
    for path, (now, before) in _AS_IMPORTED.items():
        if now == before:  # compares the objects
            continue
        for name in now.keys() | before:
            values = now.get(name), before.get(name)
            # Operators and builtins call special methods. Python itself sets data, when it pickles.
            is_called = name.startswith("__") and name not in _UNUSED and any(map(callable, values))
            if (name in names or is_called) and values[0] is not values[1]:
                return f"it reads {path}.{name}, which is not torch's own"
    return None


def _unpatched(function: Any) -> Any:
    """Returns torch's function for one that pyfused.patch has replaced."""
    if isinstance(function, FunctionType) and function.__globals__.get("__package__") == "pyfused":
        return getattr(function, "__wrapped__", function)
    return function


def _is_constant(value: Any) -> bool:
    """Returns whether a value is a number of torch, math and numpy, or a dtype of torch."""
    is_number = isinstance(value, float) and (value in _NUMBERS or math.isnan(value))
    return is_number or isinstance(value, torch.dtype)


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
