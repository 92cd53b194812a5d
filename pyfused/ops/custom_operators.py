"""Access to the custom operators that torch.compile sees, which are registered at first use."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import torch

PACKAGE = __name__.partition(".")[0]
# The namespace contains the package's name, because a process may hold a second copy of the package
# from the kernel hub, which has another name. It contains the version, because the compiler caches
# programs on disk by the names of their operators.
_VERSION = getattr(sys.modules.get(PACKAGE), "__version__", "")
NAMESPACE = "_".join([PACKAGE, *re.findall(r"\w+", _VERSION)])
TORCH_OPS = getattr(torch.ops, NAMESPACE)


def custom_operator(name: str) -> Any:
    """Returns a custom operator.

    The first call registers all of them, which takes longer than importing the rest of pyfused.
    """
    from pyfused.ops import compiled  # noqa: F401 Dynamo traces no import_module

    return getattr(TORCH_OPS, name)


def compute(op: str, function: Callable[..., Any], *arguments: Any) -> Any:  # noqa: ARG001
    """Computes the result of a custom operator of this name; ``run`` replaces it to count calls."""
    return function(*arguments)
