"""Losses of embeddings, which are computed from distances or cosines between rows of features."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from pyfused import checks
from pyfused.backends import backend_of
from pyfused.dispatch.autograd import autocast_dtype, differentiate
from pyfused.dispatch.operator import (
    Forward,
    Needs,
    Operator,
    Options,
    Tensors,
    gradients_in_forward,
)
from pyfused.formula_compiler import trace
from pyfused.layout import accumulate_dtype, broadcast_with
from pyfused.types import EmbeddingOptions, Gradients, Outputs, outputs_of


def triplet_reason(
    anchor: Tensor, positive: Tensor, negative: Tensor, options: Options
) -> str | None:
    if options.p not in (1.0, 2.0):
        return "p is neither 1 nor 2"
    return _shape_reason(anchor, positive, negative)


def cosine_reason(input1: Tensor, input2: Tensor, target: Tensor, *_: Any) -> str | None:
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
class EmbeddingLoss(Operator):
    """A loss of rows of features: three inputs (..., D), or two and a target of 1 or -1 per row."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.has_target = self.operands[-1].sign
        self.num_differentiable = len(self.operands) - self.has_target
        self.broadcast = tuple(range(1, self.num_differentiable))

    def check_choices(self, options: Options) -> None:
        super().check_choices(options)
        checks.reduction(options.reduction)

    def prepare(self, tensors: Tensors, options: Options) -> Tensors:  # noqa: ARG002
        """Converts the inputs to one dtype, and broadcasts the rows."""
        inputs, device = tensors[: self.num_differentiable], tensors[0].device
        dtype = reduce(torch.promote_types, [autocast_dtype(x.dtype, device) for x in inputs])
        operands = [x if x.dtype is dtype else x.to(dtype) for x in inputs]
        if self.has_target:
            target, wide = tensors[-1], accumulate_dtype(dtype)
            # torch compares with -1, which is 255 in uint8, and other float64 must not round to 1.
            if target.dtype is not wide:
                target = (target == 1).to(wide) - (target == -1).to(wide)
            operands.append(target.unsqueeze(-1))
        leading = [x.shape[:-1] for x in operands]
        if leading.count(leading[0]) < len(leading):
            # Unlike torch.broadcast_shapes, this does not import torch's compiler.
            shape = torch.broadcast_tensors(*[x[..., :1] for x in operands])[0].shape[:-1]
            operands = [x.expand(*shape, -1) for x in operands]
        return operands

    def forward(self, inputs: Tensors, options: Options, needs: Needs) -> Forward:
        dtype, needed = inputs[0].dtype, tuple[bool, ...]()
        if True in needs and gradients_in_forward(options.reduction, dtype):
            needed = tuple(needs)
        loss, gradients = self._launch(inputs, options, outputs_of(True, needed, False, dtype))
        loss = loss if loss.dtype is dtype else loss.to(dtype)
        return loss, inputs, gradients if needed else ()

    def backward(
        self, saved: Tensors, options: Options, needs: Needs, grad_output: Tensor
    ) -> Gradients:
        grad_output = grad_output.expand(saved[0].shape[:-1])
        gradients: Gradients
        _, gradients = self._launch(saved, options, outputs_of(False, tuple(needs)), grad_output)
        return gradients

    def reference_backward(
        self, saved: Tensors, options: Options, needs: Needs, grad_output: Tensor
    ) -> Gradients:
        inputs = saved[: self.num_differentiable]
        target = [saved[-1].squeeze(-1)] if self.has_target else []
        definition = lambda *inputs: self.torch(*inputs, *target, options)  # noqa: E731
        return differentiate(definition, inputs, needs, grad_output)

    def _launch(
        self, inputs: Tensors, options: Options, outputs: Outputs, grad_output: Any = None
    ) -> Any:
        reduction = options.reduction
        divisor = inputs[0].shape[:-1].numel() if reduction == "mean" else None
        euclidean, swap = getattr(options, "p", 2.0) == 2.0, bool(getattr(options, "swap", False))
        flags = EmbeddingOptions(euclidean, swap, trace.clamp_is_inclusive())
        numbers = options.margin, getattr(options, "eps", 0.0)  # the cosine loss has none
        return backend_of(inputs[0]).embedding_loss(
            self.name, tuple(inputs), numbers, flags, reduction, outputs, divisor, grad_output
        )
