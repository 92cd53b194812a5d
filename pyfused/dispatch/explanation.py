"""Reports the path that a call takes, and why."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.compiler import is_dynamo_compiling

from pyfused.backends import backend_of
from pyfused.dispatch.operator import Operator, Options, Tensors
from pyfused.dispatch.reasons import SMALL
from pyfused.dispatch.run import fallback_reason
from pyfused.dispatch.sizes import is_small, why_small

BY_SHARDS = "each process computes its classes"


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


def path_of(op: Operator, tensors: Tensors, options: Options) -> Explanation:
    """Returns the path that :func:`pyfused.dispatch.run.run` would choose for a call."""
    is_small_call = not is_dynamo_compiling() and is_small(op, tensors, options)
    reason = SMALL if is_small_call else fallback_reason(op, tensors, options)
    return explanation_of(op, tensors, options, reason)


def explanation_of(
    op: Operator, tensors: Tensors, options: Options, reason: str | None
) -> Explanation:
    """Returns the path of a call, given the reason why torch computes it, None for a kernel."""
    if reason is not None:
        reason = why_small(op, tensors, options) if reason is SMALL else reason
        return Explanation(op.name, "torch", reason)
    return by_kernel(op.name, tensors[0], op.strategy_of(tensors, options))


def by_kernel(op: str, input: Tensor, strategy: str) -> Explanation:
    return Explanation(op, *backend_of(input).describe(input, strategy))
