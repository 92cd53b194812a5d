"""Says which way a call would go, and why."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import pyfused.functional as functional
from pyfused.backends import backend_of
from pyfused.ops.declaration import Arguments, Operator
from pyfused.ops.dispatch import reason_for_torch
from pyfused.ops.operators import OPERATORS


class Explanation(NamedTuple):
    """The way of a call: in fields, and as ``str`` in words.

    Attributes:
        op: The operator's name in :mod:`pyfused.functional`.
        backend: ``"torch"``, or whose kernels: ``"cpu"`` or ``"triton"``.
        reason: Why it is torch's operator, or what the kernel makes of the arguments.
        isa: The instruction set of a CPU kernel.
        threads: The most threads that a CPU kernel uses.
    """

    op: str
    backend: str
    reason: str
    isa: str | None = None
    threads: int | None = None

    def __str__(self) -> str:
        if self.backend != "cpu":
            return f"{self.op}: {self.backend}: {self.reason}"
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{self.op}: {self.backend} {self.isa}, {self.reason}, {threads}"


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Says which backend a call of an operator takes, and why, without making the call.

    It is asked of the code that decides for the call itself, so the two agree: here and now, with
    the modes that are active and the number of threads that is set. A fused call's gradient is
    fused, too; under ``create_graph`` it is torch's, which only the backward pass can know.

    Args:
        op: The name of a function in :mod:`pyfused.functional`; or a function of that name,
            torch's or pyfused's.
        args, kwargs: The call's arguments.

    Raises:
        ValueError: There is no such operator.
        TypeError: The operator does not take these arguments.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in OPERATORS:
        raise ValueError(f"op: expected one of {', '.join(OPERATORS)}, got {name}")
    bound = inspect.signature(getattr(functional, name)).bind(*args, **kwargs)
    bound.apply_defaults()
    values = dict(bound.arguments)
    inplace, operator = values.pop("inplace", False), OPERATORS[name]
    return path_of(operator, operator.bind(**values), inplace)


def path_of(op: Operator, arguments: Arguments, inplace: bool) -> Explanation:
    """The same, of a call as :func:`pyfused.ops.dispatch.call` has it."""
    input = arguments[0]
    reason = reason_for_torch(op, arguments, inplace)
    if reason is not None:
        return Explanation(op.name, "torch", reason)
    return Explanation(op.name, *backend_of(input).describe(input, op.strategy))
