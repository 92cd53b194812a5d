"""Explains how a call would be computed: what dispatch decides about it, and why."""

from __future__ import annotations

from typing import Any, NamedTuple

from pyfused.backends import backend_of
from pyfused.dispatch.autograd import in_autocast_dtype
from pyfused.dispatch.operator import Operator, Options, Tensors
from pyfused.dispatch.reasons import SMALL
from pyfused.dispatch.sizes import why_small


class Explanation(NamedTuple):
    """The path of a call, as fields or as ``str``.

    Attributes:
        op: The operator's name in :mod:`pyfused.functional`.
        backend: ``"torch"``, ``"cpu"`` for C++ kernels, or ``"triton"``.
        reason: Why torch's operator runs, or how the kernel traverses the arguments.
        isa: The instruction set of a CPU kernel.
        threads: The maximum number of threads of a CPU kernel.
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


def explanation_of(
    op: Operator, tensors: Tensors, options: Options, reason: str | None, shard: Any = None
) -> Explanation:
    """Explains how a call is computed.

    Args:
        reason: Why torch computes it, None if a kernel does.
    """
    if reason is not None:
        if reason is SMALL:
            reason = why_small(op, tensors, options)
        return Explanation(op.name, "torch", reason)
    by_shards = "each process computes its classes"
    strategy = op.strategy_of(tensors, options) if shard is None else by_shards
    if op.is_linear:
        dtype = in_autocast_dtype(tensors[0]).dtype
        if (product := backend_of(tensors[0]).product_dtype(dtype)) is not dtype:
            strategy += f", products in {product} instead of {dtype}"
    return Explanation(op.name, *backend_of(tensors[0]).describe(tensors[0], strategy))
