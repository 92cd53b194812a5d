"""Losses of embeddings, which are computed from distances or cosines between rows of features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from pyfused.backends import backend_of
from pyfused.dispatch.autograd import autocast_dtype
from pyfused.dispatch.operator import Options, Tensors
from pyfused.formula_compiler import trace
from pyfused.layout import accumulate_dtype, broadcast_with
from pyfused.ops.pointwise_loss import Divisor, TensorLoss
from pyfused.types import EmbeddingOptions, Outputs


def rows(operands: Sequence[Tensor], *_: Any) -> Divisor:
    return operands[0].shape[:-1].numel()


def triplet_fallback_reason(
    anchor: Tensor, positive: Tensor, negative: Tensor, options: Options
) -> str | None:
    if options.p not in (1.0, 2.0):
        return "p is neither 1 nor 2"
    return _shape_reason(anchor, positive, negative)


def cosine_fallback_reason(input1: Tensor, input2: Tensor, target: Tensor, *_: Any) -> str | None:
    if target.dim() != input1.dim() - 1 or target.dim() > 1:
        return "target is not one element for each row of the inputs"
    return _shape_reason(input1, input2, target=target)


def _shape_reason(*inputs: Tensor, target: Tensor | None = None) -> str | None:
    """Returns why kernels do not support the shapes; all dimensions but the last broadcast."""
    shapes = [x.shape for x in inputs]
    if target is None and inputs[0].dim() and shapes.count(shapes[0]) == len(shapes):
        return None
    if not inputs[0].dim() or any(x.dim() != inputs[0].dim() for x in inputs):
        return "the inputs differ in the number of dimensions, or have none"
    if any(x.shape[-1] != inputs[0].shape[-1] for x in inputs):
        return "the inputs differ in the number of features"
    rows = [x.shape[:-1] for x in inputs] + ([] if target is None else [target.shape])
    fit = all(broadcast_with(a, b) for a, b in combinations(rows, 2))
    return None if fit else "the rows do not broadcast"


@dataclass(eq=False, kw_only=True, repr=False)
class EmbeddingLoss(TensorLoss):
    """A loss of rows of features: three inputs (..., D), or two and a target of 1 or -1 per row."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_shapes = None
        self.has_target = self.operands[-1].sign
        self.inputs = self.operands[: len(self.operands) - self.has_target]
        self.broadcast, self.uniform = tuple(range(1, len(self.inputs))), 0

    def by_operands(self, operands: Sequence[Tensor], options: Options) -> Tensor:
        if self.has_target:
            operands = *operands[:-1], operands[-1].squeeze(-1)
        return super().by_operands(operands, options)

    def _dtypes(
        self, tensors: Tensors, input: Tensor, _reduction: str
    ) -> tuple[torch.dtype, torch.dtype]:
        inputs = tensors[: len(self.inputs)]
        dtypes = [autocast_dtype(tensor.dtype, input.device) for tensor in inputs]
        dtype = reduce(torch.promote_types, dtypes)
        return dtype, dtype

    def arranged(
        self, operands: Sequence[Any], weight: Tensor | None, dtype: torch.dtype
    ) -> tuple[Sequence[Tensor], Tensor | None]:
        """Converts the operands to one dtype and broadcasts their rows."""
        dtypes = [dtype] * len(operands)
        if self.has_target:
            *inputs, target = operands
            dtypes[-1] = accumulate_dtype(dtype)
            # torch compares with -1, which is 255 in uint8, and other float64 must not round to 1.
            if target.dtype is not dtypes[-1]:
                target = (target == 1).to(dtypes[-1]) - (target == -1).to(dtypes[-1])
            operands = *inputs, target.unsqueeze(-1)
        operands = [x if x.dtype is d else x.to(d) for x, d in zip(operands, dtypes, strict=True)]
        leading = [x.shape[:-1] for x in operands]
        if leading.count(leading[0]) < len(leading):
            # Unlike torch.broadcast_shapes, this does not import torch's compiler.
            shape = torch.broadcast_tensors(*[x[..., :1] for x in operands])[0].shape[:-1]
            operands = [x.expand(*shape, -1) for x in operands]
        return operands, weight

    def launch(
        self, tensors: Tensors, options: Options, outputs: Outputs, grad_output: Any = None
    ) -> Any:
        (*operands, _, _), reduction = tensors, options.reduction
        divisor: Any = rows(operands) if reduction == "mean" else None
        euclidean, swap = getattr(options, "p", 2.0) == 2.0, bool(getattr(options, "swap", False))
        flags = EmbeddingOptions(euclidean, swap, trace.clamp_is_inclusive())
        numbers = options.margin, getattr(options, "eps", 0.0)  # the cosine loss has none
        return backend_of(operands[0]).embedding_loss(
            self.name, tuple(operands), numbers, flags, reduction, outputs, divisor, grad_output
        )

    def expanded(self, grad_output: Tensor, operands: Sequence[Tensor]) -> Tensor:
        return grad_output.expand(operands[0].shape[:-1])
