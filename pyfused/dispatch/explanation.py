"""Explains how a call would be computed: what dispatch decides about it, and why."""

from __future__ import annotations

from typing import NamedTuple

import torch

from pyfused.backends import backend_of, takes_triton
from pyfused.dispatch.autograd import in_autocast_dtype
from pyfused.dispatch.operator import Operator, Options, Tensors
from pyfused.dispatch.reasons import SMALL
from pyfused.dispatch.sizes import why_small


class Explanation(NamedTuple):
    """The path of a call, as fields or as ``str``.

    Attributes:
        op: The operator's name in :mod:`pyfused.functional`.
        backend: ``"torch"``, ``"cpu"`` for C++ kernels, or ``"triton"``.
        reason: Why torch's operator runs; None if a kernel does.
        products: The dtype in which a linear head multiplies matrices; None for other operators.
    """

    op: str
    backend: str
    reason: str | None = None
    products: torch.dtype | None = None

    def __str__(self) -> str:
        products = f"products in {self.products}" if self.products else None
        return ": ".join(filter(None, (self.op, self.backend, self.reason, products)))


def explanation_of(
    op: Operator, tensors: Tensors, options: Options, reason: str | None
) -> Explanation:
    """Explains how a call is computed.

    Args:
        reason: Why torch computes it, None if a kernel does.
    """
    if reason is not None:
        if reason is SMALL:
            reason = why_small(op, tensors, getattr(options, "dim", 1))
        return Explanation(op.name, "torch", reason)
    backend, products = "triton" if takes_triton(tensors[0]) else "cpu", None
    if op.is_linear:
        dtype = in_autocast_dtype(tensors[0]).dtype
        products = backend_of(tensors[0]).product_dtype(dtype)
    return Explanation(op.name, backend, None, products)
