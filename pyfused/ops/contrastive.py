"""Contrastive losses of embeddings, without the logits of all pairs in memory.

With the logits z_ij = scale a_i . b_j of N pairs:

    softmax:  loss_i = (lse_j z_ij + lse_j z_ji) / 2 - z_ii
    sigmoid:  loss_i = sum_j softplus(s_ij (z_ij + bias)),  s_ij = -1 if i = j else 1

The softmax form computes each block of logits twice: first for the states of all rows and columns,
then for the gradients. It treats columns as rows of the transposed block. The sigmoid form computes
the loss and the gradient of a block in one pass. The gradient of the scale comes from autograd,
which differentiates scale * a.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from pyfused import checks
from pyfused.backends import Backend, backend_of
from pyfused.dispatch.autograd import in_autocast_dtype
from pyfused.dispatch.operator import Operand, Options, Tensors
from pyfused.dispatch.plan import needs_grad
from pyfused.layout import accumulate_dtype
from pyfused.ops.chunk_sizes import SQUARE_GPU, TILE, rows_in_budget, tile_size
from pyfused.ops.elementwise import SOFT_MARGIN_LOSS
from pyfused.ops.heads import Block, Layer, blocks, loss_over_rows, over_blocks
from pyfused.ops.pointwise_loss import reduced
from pyfused.ops.row_loss import LossArgs, Results, RowLoss
from pyfused.types import (
    LOG_P,
    STATE_FIELDS,
    ClassRange,
    Outputs,
    RowOptions,
)


def contrastive_loss(
    a: Tensor,
    b: Tensor,
    bias: float | Tensor | None,
    scale: float | Tensor,
    options: Options,
) -> Tensor:
    checks.contrastive_loss(a, b, bias, scale, options)
    logits = F.linear(a * _scalar(scale), b)
    logits, n = logits.to(accumulate_dtype(logits.dtype)), a.shape[0]
    if bias is None:
        both, target = (logits, logits.t()), torch.arange(n, device=a.device)
        rows, columns = (F.cross_entropy(z, target, reduction="none") for z in both)
        return reduced((rows + columns) / 2, options.reduction)
    sign = 2 * torch.eye(n, dtype=logits.dtype, device=a.device) - 1
    return reduced(-F.logsigmoid(sign * (logits + _scalar(bias))).sum(1), options.reduction)


def _scalar(number: float | Tensor) -> float | Tensor:
    """Returns a tensor without dimensions, which does not promote dtypes, or a float."""
    return number.reshape(()) if isinstance(number, Tensor) else number


@dataclass(eq=False, kw_only=True, repr=False)
class Contrastive(RowLoss):
    """A loss of the products of all pairs of embeddings.

    Kernels take the scaled embeddings a, the embeddings b, and the bias as a tensor or None.
    """

    factors: ClassVar[tuple[Operand, ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.is_linear = True

    def gradients_needed(self, tensors: Tensors) -> tuple[bool, ...]:
        needs_a, needs_b, needs_bias, needs_scale = needs_grad(tensors)
        return needs_a or needs_scale, needs_b, needs_bias

    def to_rows(self, tensors: Tensors, options: Options) -> tuple[Any, ...]:  # noqa: ARG002
        a, b, bias, scale = tensors
        a = in_autocast_dtype(a)
        x = a.to(backend_of(a).product_dtype(a.dtype)) * _scalar(scale)
        if bias is not None:
            dtype = accumulate_dtype(x.dtype)
            bias = (x.new_ones((), dtype=dtype) * _scalar(bias)).to(dtype)
        return x, b, bias, None, None, None

    def definition_loss(self, tensors: Sequence[Any], options: Options) -> Tensor:
        (x, b, bias, _), dtype = tensors, accumulate_dtype(tensors[0].dtype)
        return contrastive_loss(x.to(dtype), b.to(dtype), bias, 1.0, options)

    def prepare(
        self, backend: Backend, tensors: Sequence[Any], *_: Any
    ) -> tuple[Callable[..., Results], bool]:
        return partial(_softmax if tensors[2] is None else _sigmoid, backend), True


def _softmax(backend: Backend, tensors: Sequence[Any], args: LossArgs) -> Results:
    """Computes the loss of rows and columns, and its gradients, in square blocks of logits.

    The gradients of a block and its transpose are added in the accumulation dtype, then rounded.
    """
    (x, b, *_), options, outputs, grad_output = (
        tensors,
        args.options,
        args.outputs,
        args.grad_output,
    )
    n, wide, target = len(x), accumulate_dtype(x.dtype), torch.arange(len(x), device=x.device)
    # Larger blocks need fewer thread synchronisations, which are slow on a busy machine, and fewer
    # launches on a GPU.
    size = (SQUARE_GPU if backend.ASYNCHRONOUS else TILE * 3 // 2,) * 2
    if options.memory_budget is not None:  # the other half is for the transposed block
        size = tile_size(x.shape, x.dtype, options.memory_budget // 2, backend)
    layer = Layer(backend, x, b, None, x.dtype, size)
    plain = RowOptions()
    states = x.new_empty((2, STATE_FIELDS, n), dtype=torch.float64)

    def directions(
        block: Block, dtype: torch.dtype
    ) -> tuple[tuple[Tensor, Tensor, slice, ClassRange], ...]:
        """Returns a block and its transpose, each with the states, rows and range of classes."""
        rows, columns, transposed = block.rows, block.classes, block.logits.t()
        # The transpose of a single row is contiguous, but must not share its memory.
        empty = transposed.new_empty(transposed.shape, dtype=dtype)
        return (
            (block.logits.to(dtype), states[0], rows, ClassRange(columns.start, n)),
            (empty.copy_(transposed), states[1], columns, ClassRange(rows.start, n)),
        )

    for block in blocks(layer):
        for logits, state, rows, classes in directions(block, x.dtype):
            continues = classes.first > 0
            launch = backend.row_state(logits, plain, classes, STATE_FIELDS, 0, continues)
            launch(plain, logits, target[rows], None, state[:, rows])
    loss = reduced(-states[:, LOG_P].mean(0), options.reduction)
    if not outputs.gradients:
        return loss, (), None
    factor = -0.5 / n if options.reduction == "mean" else -0.5
    if grad_output is None:
        grad_log_p = states.new_full((), factor).expand(n)
    else:
        grad_log_p = (grad_output.double() * factor).expand(n)

    def step(block: Block) -> Tensor:
        of_rows, of_columns = (
            backend.row_gradients(logits, plain, classes, 1)(
                plain, logits, target[rows], None, state[:, rows], grad_log_p[rows], logits
            )
            for logits, state, rows, classes in directions(block, wide)
        )
        return of_rows.add_(of_columns.t()).to(x.dtype)

    memory = block.logits.view(-1) if n <= min(size) else None  # reuses a single block's logits
    return loss, over_blocks(layer, outputs.gradients, step, memory=memory), None


def _sigmoid(backend: Backend, tensors: Sequence[Any], args: LossArgs) -> Results:
    """Computes the loss of each pair, and its gradients, in blocks of rows with all columns."""
    (x, b, bias, _), options, outputs = tensors, args.options, args.outputs
    n, dtype, wide = len(x), x.dtype, bias.dtype
    bytes_per_logit = dtype.itemsize + 2 * wide.itemsize
    limits = n, b.shape, options.memory_budget, dtype, backend, bytes_per_logit
    size = max(1, min(n, rows_in_budget(*limits))), b.shape[0]
    grad_bias = torch.zeros_like(bias, dtype=torch.float64)
    kernel_options = SOFT_MARGIN_LOSS.options(reduction=options.reduction)
    kernel_outputs = Outputs(outputs.loss, (bool(outputs.gradients), False))
    divisor = (lambda _: n) if options.reduction == "mean" else None

    def step(block: Block, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        z = block.logits.to(wide).add_(bias)
        z.diagonal(block.rows.start).neg_()
        operands = z, z.new_full((), -1.0).expand_as(z)
        launch = SOFT_MARGIN_LOSS.prepared(
            backend, operands, None, kernel_options, kernel_outputs, divisor, None
        )
        loss, (gradient, _) = launch(operands, kernel_options)
        loss = loss.sum(1) if loss is not None and loss.dim() else loss
        if gradient is not None:
            if grad is not None:
                gradient.mul_(grad.to(wide).unsqueeze(-1))
            gradient.diagonal(block.rows.start).neg_()
            grad_bias.add_(gradient.sum(dtype=torch.float64))
            gradient = gradient.to(dtype)
        return loss, gradient

    layer = Layer(backend, x, b, None, dtype, size)
    loss, gradients = loss_over_rows(layer, outputs.gradients, step, (args.grad_output,))
    if gradients:
        gradients = *gradients[:2], grad_bias.to(wide) if outputs.gradients[2] else None
    return loss, gradients, None
