"""Computes an operator's results by torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

from compare import DEVICE

from pyfused import functional as fused
from pyfused.dispatch.operator import Operator, Options, Tensors
from pyfused.dispatch.originals import F


def by_torch(op: Operator, tensors: Tensors, options: Options, *_: Any, **__: Any) -> Any:
    """Replaces `pyfused.dispatch.run.run` by an operator's definition in torch's operators."""
    return op.by_torch(tensors, options)


def torch_function(op: Operator, name: str = "") -> Callable[..., Any]:
    """Returns torch's function, or pyfused's function running torch's operators.

    Args:
        name: The name of a function that torch lacks, if it differs from the operator's.
    """
    lost = DEVICE != "cpu" and op.name == "l1_loss"  # its weight, if a default device is set
    if hasattr(F, op.name) and not name and not lost:
        return getattr(F, op.name)  # type: ignore[no-any-return]
    return defined_by_torch(name or op.name)


def defined_by_torch(name: str) -> Callable[..., Any]:
    """Returns pyfused's function of this name, running definitions in torch's operators."""
    function = getattr(fused, name)
    names = {**vars(fused), "run": by_torch}
    copy = FunctionType(function.__code__, names, name, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def parameters(op: Operator) -> dict[str, Any]:
    """Returns the parameters of pyfused's function with their defaults."""
    given = inspect.signature(getattr(fused, op.name)).parameters.values()
    return {parameter.name: parameter.default for parameter in given}
