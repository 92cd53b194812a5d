"""The custom operators that torch.compile sees: their namespace, and when they are registered."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import torch

PACKAGE = __name__.partition(".")[0]
# Where the custom operators of this copy of the package are registered. The package's name is in it
# because a process may hold two copies, one of them loaded from the kernel hub under another name.
# The version is in it because the compiler keeps programs on disk by the names of their operators.
_VERSION = getattr(sys.modules.get(PACKAGE), "__version__", "")
NAMESPACE = "_".join([PACKAGE, *re.findall(r"\w+", _VERSION)])
TORCH_OPS = getattr(torch.ops, NAMESPACE)


def custom_operator(name: str) -> Any:
    """Returns the custom operator of a compiled call.

    The first call registers all of them, which takes longer than importing the rest of pyfused.
    """
    from pyfused.ops import compiled  # noqa: F401 Dynamo follows an import, but no import_module

    return getattr(TORCH_OPS, name)


def compute(op: str, function: Callable[..., Any], *arguments: Any) -> Any:  # noqa: ARG001
    """Returns the result of an operator's custom operator; run.py puts a counter here."""
    return function(*arguments)
