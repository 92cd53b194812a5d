"""Finds what a formula reads from outside: global variables, closures and modules' attributes.

Kernels keep the values that these had during tracing. Numbers and other constants are part of the
key of a trace, so a changed number leads to a new trace. Objects whose contents may change, such as
lists and tensors, are refused.
"""

from __future__ import annotations

import dis
from collections.abc import Callable, Iterator
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType, NoneType
from typing import Any

import torch

_CONSTANTS = (bool, int, float, complex, str, bytes, NoneType, torch.dtype)
_LIBRARIES = ("torch", "pyfused", "numpy", "math")  # what they define does not change


class Outside:
    """The constants and functions that functions read from outside, including through others.

    Raises:
        RuntimeError: A function reads something whose contents may change.
    """

    def __init__(self, *functions: Any) -> None:
        self._sources: list[Callable[[], Any]] = []
        self._seen = set[CodeType]()
        for function in functions:
            self._visit(function)

    def values(self) -> tuple[Any, ...]:
        """Returns the current constants, with their types, and functions."""
        values = [source() for source in self._sources]
        return *values, *map(type, values)  # as 1, 1.0 and True are equal

    def _visit(self, function: Any) -> None:
        if not isinstance(function, FunctionType):
            raise RuntimeError(f"expected a Python function, got a {type(function).__name__}")
        if function.__code__ in self._seen:
            return
        self._seen.add(function.__code__)
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        for code in _with_inner(function.__code__):
            module = None  # that the previous instruction has loaded
            for each in dis.get_instructions(code):
                name, source = each.argval, None
                if each.opname == "LOAD_GLOBAL" and name in function.__globals__:
                    source = partial(function.__globals__.get, name)
                elif each.opname == "LOAD_DEREF" and name in cells:
                    source = partial(getattr, cells[name], "cell_contents", None)
                elif each.opname in ("LOAD_ATTR", "LOAD_METHOD") and module is not None:
                    source = partial(getattr, module, name, None)
                elif each.opname == "IMPORT_NAME" and name.partition(".")[0] not in _LIBRARIES:
                    raise RuntimeError(f"it imports {name}; import it outside of the formula")
                if each.opname != "EXTENDED_ARG":
                    module = None if source is None else self._read(name, source)

    def _read(self, name: str, source: Callable[[], Any]) -> ModuleType | None:
        """Adds what an instruction reads from outside; returns a module."""
        value = source()
        if isinstance(value, ModuleType):
            return value
        if not _is_of_library(value):
            self._accept(name, value)
            self._sources.append(source)
        return None

    def _accept(self, name: str, value: Any) -> None:
        """Visits the functions of a value; raises for objects whose contents may change."""
        if isinstance(value, tuple):
            for each in value:
                self._accept(name, each)
        elif isinstance(value, FunctionType) and not _is_of_library(value):
            for each in (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()):
                self._accept(f"the defaults of {name}", each)
            self._visit(value)
        elif (functions := getattr(value, "functions_of_formula", None)) is not None:
            for function in functions:
                self._visit(function)
        elif not (isinstance(value, _CONSTANTS) or _is_of_library(value)):
            raise RuntimeError(
                f"it reads {name} from outside, a {type(value).__name__}, whose contents may "
                "change; pass tensors as operands and numbers as parameters"
            )


def _is_of_library(value: Any) -> bool:
    if isinstance(value, BuiltinFunctionType):  # a bound method may depend on its object
        return isinstance(value.__self__, (ModuleType, type, NoneType))
    if isinstance(value, torch.nn.Module) or not callable(value):
        return False
    if hasattr(value, "functions_of_formula"):
        return False
    named = value if isinstance(value, (type, FunctionType)) else type(value)
    return str(named.__module__).partition(".")[0] in _LIBRARIES


def _with_inner(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _with_inner(constant)
