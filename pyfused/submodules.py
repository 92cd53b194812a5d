"""Imports the submodules of ``pyfused.nn``: torch.nn's, with pyfused's classes and functions.

``from pyfused.nn.modules.loss import MSELoss`` imports pyfused's class, and
``from pyfused.nn.utils.rnn import pad_sequence`` imports torch's function.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

_PACKAGE = __name__.rpartition(".")[0]


def path() -> list[str]:
    """Returns the ``__path__`` of ``pyfused.nn``, for which the finder must be registered."""
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)  # before the finder of files, which would load a copy
    return []


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:  # noqa: ARG002
        known = name.startswith(f"{_PACKAGE}.nn.") and find_spec(_of_torch(name))
        return ModuleSpec(name, self, is_package=True) if known else None

    def exec_module(self, module: ModuleType) -> None:
        name, nn = module.__name__, sys.modules[f"{_PACKAGE}.nn"]
        original = import_module(_of_torch(name))
        names = {key: x for key, x in vars(original).items() if key not in vars(module)}
        replaced = {
            key: getattr(nn, key)
            for key, value in names.items()
            if key in nn.__all__ and value is getattr(torch.nn, key, None)
        }
        if original is torch.nn.functional:
            sys.modules[name] = nn.functional
        elif not replaced:
            sys.modules[name] = original
        else:
            vars(module).update(names | replaced)
            for key, value in names.items():
                if value is sys.modules.get(f"{original.__name__}.{key}"):
                    import_module(f"{name}.{key}")  # becomes an attribute of the module


def _of_torch(name: str) -> str:
    return f"torch{name.removeprefix(_PACKAGE)}"


_FINDER = _Finder()
