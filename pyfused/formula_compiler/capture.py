"""Copies a formula's function, with the functions that it calls.

A formula reads its arguments, literals, functions and constants of torch and math, and Python
functions that follow the same rule, also through modules, classes and functools.partial. The names
are looked up once, when the formula is defined. The copy keeps what they stood for; kernels are
traced from the copy, and calls that torch computes run it. So binding a name to another object
later changes neither.
"""

from __future__ import annotations

import builtins
import dis
import math
from collections.abc import Iterator, Sequence
from functools import cache, partial
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, ModuleType, NoneType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import get_overridable_functions

from pyfused.formula_compiler.program import UntraceableError

_BUILTINS = (
    *("abs", "all", "any", "bool", "dict", "divmod", "enumerate", "filter", "float", "int"),
    *("isinstance", "iter", "len", "list", "map", "max", "min", "next", "pow", "range"),
    *("reversed", "round", "sorted", "str", "sum", "tuple", "type", "zip"),
)
_CONSTANTS = (bool, int, float, str, NoneType)  # defaults of functions that a formula calls
_NUMBERS = (math.pi, math.e, math.tau, math.inf, math.nan)
_RULE = (
    "A formula reads only its arguments, literals, elementwise functions of torch and math, and "
    "Python functions that do the same"
)


class _Read(NamedTuple):
    """An object that a function reads."""

    path: str  # the names in the code, such as "torch.nn.functional.relu"
    root: Any  # the object of the first name
    value: Any

    @property
    def name(self) -> str:
        return self.path.partition(".")[0]


class Capture:
    """Copies functions.

    Args:
        formula: The class of formulas, which functions may call.

    Attributes:
        formulas: The formulas that the functions call.
    """

    def __init__(self, formula: type) -> None:
        self._formula, self.formulas = formula, list[Any]()
        self._copies = dict[FunctionType, FunctionType]()

    def copy(self, function: Any) -> FunctionType:
        """Returns a copy of a function that calls copies of other functions.

        Raises:
            UntraceableError: The function reads something else.
        """
        if not isinstance(function, FunctionType):
            raise UntraceableError(f"expected a Python function, got a {type(function).__name__}")
        if function in self._copies:  # which calls itself
            return self._copies[function]
        code, names = function.__code__, {"__builtins__": builtins.__dict__}
        cells = {name: CellType() for name in code.co_freevars}
        kept = FunctionType(code, names, function.__name__, closure=(*cells.values(),))
        kept.__defaults__ = function.__defaults__
        kept.__kwdefaults__ = function.__kwdefaults__ and dict(function.__kwdefaults__)
        kept.__module__, kept.__qualname__ = function.__module__, function.__qualname__
        self._copies[function] = kept
        values = dict[str, Any]()
        for line, read in _reads(function):
            value, (first, *attributes) = self._kept(function, line, read), read.path.split(".")
            if not attributes or _is_library(read.root):
                values[first] = read.root if attributes else value
                continue
            # A module or class of the user; the copy has only the values that are read.
            module = values.setdefault(first, ModuleType(first))
            for name in attributes[:-1]:
                module = vars(module).setdefault(name, ModuleType(name))
            setattr(module, attributes[-1], value)
        for name, value in values.items():
            if name in cells:
                cells[name].cell_contents = value
            else:
                names[name] = value
        return kept

    def _kept(self, function: FunctionType, line: int, read: _Read) -> Any:
        """Returns what the copy of a function has in place of a value that it reads."""
        path, _, value = read
        if _is_known(read):
            return value
        if isinstance(value, self._formula):
            self.formulas.append(value)
            return value
        if isinstance(value, partial):
            called = self._kept(function, line, _Read(path, value.func, value.func))
            _check_constants(function, line, path, (*value.args, *value.keywords.values()))
            return partial(called, *value.args, **value.keywords)
        if _is_followed(value):
            defaults = *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()
            _check_constants(function, line, path, defaults)
            return self.copy(value)
        message = f"it reads {path}"
        if not callable(value) and not isinstance(value, ModuleType):
            message += f", a {type(value).__name__}; pass it as an argument with a default"
        raise _refusal(function, line, f"{message}. {_RULE}")


def _check_constants(function: FunctionType, line: int, path: str, values: Sequence[Any]) -> None:
    """Raises an error if a value that a function is called with may change."""
    if wrong := [x for x in values if not isinstance(x, _CONSTANTS)]:
        message = f"{path} has a default that may change, a {type(wrong[0]).__name__}"
        raise _refusal(function, line, message)


def _refusal(function: FunctionType, line: int, message: str) -> UntraceableError:
    return UntraceableError(f"line {line} of {function.__code__.co_filename}: {message}")


@cache
def _functions_of_torch() -> frozenset[Any]:
    """Returns the functions and methods of tensors, which a trace records or refuses."""
    known: set[Any] = {partial, torch.Tensor, torch.finfo, torch.no_grad}
    known.update(map(_unpatched, (F.hardsigmoid, F.hardswish, F.sigmoid, F.tanh)))
    known |= {torch.full, torch.ones, torch.scalar_tensor, torch.tensor, torch.zeros}
    for functions in get_overridable_functions().values():
        known.update(map(_unpatched, functions))
    for names in (vars(torch), vars(F)):
        in_place = [name for name in names if name.endswith("_") and names.get(name[:-1]) in known]
        known.update([names[name] for name in in_place])
    return frozenset(known)


def _unpatched(function: Any) -> Any:
    """Returns torch's function for one that pyfused.patch has replaced."""
    names = getattr(function, "__globals__", {})
    is_patched = names.get("__package__") == "pyfused"
    return getattr(function, "__wrapped__", function) if is_patched else function


def _is_known(read: _Read) -> bool:
    """Returns whether a value is a function, a class or a constant of torch, math or Python."""
    path, root, value = read
    name = path.partition(".")[0]
    if getattr(builtins, name, None) is root:
        return name in _BUILTINS or (isinstance(root, type) and issubclass(root, Exception))
    if isinstance(value, BuiltinFunctionType) and value.__self__ is math:
        return True
    if isinstance(value, (float, torch.dtype)):
        return _is_library(root) or any(value is number for number in _NUMBERS)
    try:
        return _unpatched(value) in _functions_of_torch()
    except TypeError:  # not hashable
        return False


def _is_followed(value: Any) -> bool:
    """Returns whether a value is a Python function that neither torch nor pyfused defines."""
    if not isinstance(value, FunctionType):
        return False
    return _library(value.__globals__.get("__name__")) not in ("torch", "pyfused")


def _is_library(root: Any) -> bool:
    """Returns whether an object is torch, math, numpy, one of their modules, or torch.Tensor."""
    if isinstance(root, ModuleType):
        return _library(root.__name__) in ("math", "numpy", "torch")
    return root is torch.Tensor


def _library(module: Any) -> str:
    return str(module).partition(".")[0]


def _reads(function: FunctionType) -> Iterator[tuple[int, _Read]]:
    """Yields what a function and the functions inside it read by name, with the line."""
    closure = function.__closure__ or ()
    cells = dict(zip(function.__code__.co_freevars, closure, strict=True))
    for code in _with_inner(function.__code__):
        lines, line, read = dict(dis.findlinestarts(code)), code.co_firstlineno, None
        for each in dis.get_instructions(code):
            op, name = each.opname, each.argval
            if read is not None and op not in ("EXTENDED_ARG", "CACHE"):
                if op.endswith(("_ATTR", "_METHOD")):
                    read = _attribute(function, line, read, name)
                    continue
                yield line, read
                read = None
            line = lines.get(each.offset) or line
            if op in ("LOAD_GLOBAL", "LOAD_NAME") or (op == "LOAD_DEREF" and name in cells):
                value = _value(function, line, name, cells)
                read = _Read(name, value, value)
            elif op in ("IMPORT_NAME", "STORE_GLOBAL") or (op == "STORE_DEREF" and name in cells):
                raise _refusal(function, line, f"it imports or assigns {name}; do so outside")


def _value(function: FunctionType, line: int, name: str, cells: dict[str, CellType]) -> Any:
    """Returns what a name outside of a function stands for."""
    try:
        if name in cells:
            return cells[name].cell_contents
        names = function.__globals__
        return names[name] if name in names else getattr(builtins, name)
    except (AttributeError, ValueError):  # ValueError: an empty cell
        raise _refusal(function, line, f"name {name!r} is not defined") from None


def _attribute(function: FunctionType, line: int, read: _Read, name: str) -> _Read:
    """Returns the attribute of a module or a class."""
    path, missing = f"{read.path}.{name}", object()
    if not isinstance(read.value, (ModuleType, type)):
        message = f"it uses the attribute {path}; pass it as an argument with a default. {_RULE}"
        raise _refusal(function, line, message)
    value = getattr(read.value, name, missing)
    if value is missing:
        raise _refusal(function, line, f"{read.path} has no attribute {name!r}")
    return _Read(path, read.root, value)


def _with_inner(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _with_inner(constant)
