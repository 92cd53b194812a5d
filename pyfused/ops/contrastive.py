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

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyfused.backends import Backend, backend_of
from pyfused.backends.protocol import LossResult
from pyfused.dispatch.autograd import in_autocast_dtype
from pyfused.dispatch.operator import Forward, Needs, Operand, Options, Tensors
from pyfused.dispatch.originals import F
from pyfused.layout import accumulate_dtype
from pyfused.ops.chunk_sizes import SQUARE_GPU, TILE, BlockSize, HeadSizes
from pyfused.ops.elementwise import SOFT_MARGIN_LOSS
from pyfused.ops.head_loop import HeadLoop, Layer
from pyfused.ops.heads import joined
from pyfused.ops.pointwise_loss import reduced
from pyfused.ops.rows import RowOperator
from pyfused.types import (
    LOG_P,
    STATE_FIELDS,
    ClassRange,
    Gradients,
    Outputs,
    RowBlock,
    RowOptions,
)


def contrastive_loss(
    a: Tensor,
    b: Tensor,
    bias: float | Tensor | None,
    scale: float | Tensor,
    options: Options,
) -> Tensor:
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
class Contrastive(RowOperator):
    """A loss of the products of all pairs of embeddings.

    Kernels take the scaled embeddings a, the embeddings b, and the bias as a tensor or None.
    """

    factors: ClassVar[tuple[Operand, ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.is_linear, self.student = True, 3

    def input_dtype(self, tensors: Tensors) -> torch.dtype:
        a = tensors[0]
        return backend_of(a).product_dtype(a.dtype)

    def arranged(self, tensors: Tensors, *_: Any) -> Tensors:
        """Returns the scaled embeddings a, the embeddings b, and the bias as a tensor or None.

        Without a scale, a has been scaled.
        """
        a, b, bias, scale = tensors
        x = in_autocast_dtype(a)
        x = x.to(self.input_dtype((x,)))
        x = x if scale is None else x * _scalar(scale)
        if bias is not None:
            dtype = accumulate_dtype(x.dtype)
            bias = (x.new_ones((), dtype=dtype) * _scalar(bias)).to(dtype)
        return x, b, bias, None

    def loop(self, tensors: Tensors, options: Options, needs: Needs) -> HeadLoop:
        """Returns the loop over blocks of logits."""
        size = _square if tensors[2] is None else _rows
        backend, dtype = backend_of(tensors[0]), self.input_dtype(tensors)
        limits = tensors[1].shape[1], dtype, backend, options.memory_budget
        return HeadLoop(backend, dtype, lambda n: size(n, *limits), needs, pads=False)

    def forward(self, tensors: Tensors, options: Options, needs: Needs, *_: Any) -> Forward:
        compute = _softmax if tensors[2] is None else _sigmoid
        in_forward = self.in_forward(tensors, options, needs)
        loop = self.loop(tensors, options, needs)
        loss, gradients = compute(loop, tensors, options, in_forward)
        return loss, tensors, gradients

    def backward(
        self, saved: Tensors, options: Options, needs: Needs, grad_output: Tensor, *_: Any
    ) -> Gradients:
        compute = _softmax if saved[2] is None else _sigmoid
        return compute(self.loop(saved, options, needs), saved, options, True, grad_output)[1]


def _square(
    n: int, features: int, dtype: torch.dtype, backend: Backend, memory_budget: int | None
) -> BlockSize:
    """Returns the size of square blocks.

    Larger blocks need fewer thread synchronisations, which are slow on a busy machine, and fewer
    launches on a GPU.
    """
    if memory_budget is not None:  # the other half is for the transposed block
        return HeadSizes((n, features), dtype, backend, memory_budget // 2).tile(n)
    square = SQUARE_GPU if backend.ASYNCHRONOUS else TILE * 3 // 2
    return BlockSize(square, square)


def _rows(
    n: int, features: int, dtype: torch.dtype, backend: Backend, memory_budget: int | None
) -> BlockSize:
    """Returns the size of blocks of rows with all columns."""
    bytes_per_logit = dtype.itemsize + 2 * accumulate_dtype(dtype).itemsize
    return HeadSizes((n, features), dtype, backend, memory_budget, bytes_per_logit).row_blocks(n)


def _softmax(
    loop: HeadLoop,
    tensors: Tensors,
    options: Options,
    differentiates: bool,
    grad_output: Tensor | None = None,
) -> LossResult:
    """Computes the loss of rows and columns, and its gradients, in square blocks of logits.

    The gradients of a block and its transpose are added in the accumulation dtype, then rounded.
    """
    (x, b, *_), backend, wide = tensors, loop.backend, loop.wide
    n = x.shape[0]
    target, size = torch.arange(n, device=x.device), loop.size(n)
    has_one_block = n <= size.rows and n <= (size.classes or n)
    layer, plain = Layer(x, b, None), RowOptions()
    states = x.new_empty((2, STATE_FIELDS, n), dtype=torch.float64)
    memory: Tensor | None = None

    def directions(block: tuple[Tensor, slice, slice], dtype: torch.dtype) -> list[Any]:
        """Returns a block and its transpose, each with the states and the slice of its rows."""
        logits, rows, columns = block
        # The transpose of a single row is contiguous, but must not share its memory.
        transposed = logits.new_empty((logits.shape[1], logits.shape[0]), dtype=dtype)
        both = logits.to(dtype), transposed.copy_(logits.t())
        slices = (rows, columns), (columns, rows)
        return [
            (RowBlock(z, target[i], None, plain, ClassRange(j.start, n)), state[:, i], i)
            for z, state, (i, j) in zip(both, states, slices, strict=True)
        ]

    def state_step(*block: Any) -> None:
        nonlocal memory
        memory = block[0].view(-1) if has_one_block else None  # reuses its logits
        for rows, state, _ in directions(block, x.dtype):
            backend.row_state(rows, state, continues=rows.classes.first > 0)

    loop.run(layer, state_step)
    loss = reduced(-states[:, LOG_P].mean(0), options.reduction).to(wide)
    if not differentiates:
        return loss, ()
    factor = -0.5 / n if options.reduction == "mean" else -0.5
    grad_log_p = states.new_ones(()) if grad_output is None else grad_output.double()
    grad_log_p = (grad_log_p * factor).expand(n)

    def step(*block: Any) -> Tensor:
        by_rows, by_columns = [
            backend.row_gradients(rows, state, grad_log_p[i], rows.logits)
            for rows, state, i in directions(block, wide)
        ]
        return by_rows.add_(by_columns.t()).to(x.dtype)

    return loss, loop.run(layer, step, logits=memory)


def _sigmoid(
    loop: HeadLoop,
    tensors: Tensors,
    options: Options,
    differentiates: bool,
    grad_output: Tensor | None = None,
) -> LossResult:
    """Computes the loss of each pair, and its gradients, in blocks of rows with all columns."""
    (x, b, bias, _), reduction = tensors, options.reduction
    n, dtype, wide = x.shape[0], loop.dtype, loop.wide
    grad_bias = torch.zeros_like(bias, dtype=torch.float64)
    formula, losses = SOFT_MARGIN_LOSS.kernels["soft_margin_loss"], list[Tensor | None]()
    outputs = Outputs(grad_output is None, (differentiates, False))
    divisor = n if reduction == "mean" else None

    def step(logits: Tensor, rows: slice, _columns: slice) -> Tensor | None:
        z = logits.to(wide).add_(bias)
        z.diagonal(rows.start).neg_()
        operands = z, z.new_full((), -1.0).expand_as(z)
        loss, (gradient, _) = loop.backend.pointwise_loss(
            formula, operands, None, (), reduction, outputs, divisor
        )
        losses.append(loss if loss is None or not loss.dim() else loss.sum(1))
        if gradient is None:
            return None
        if grad_output is not None:
            grad = grad_output[rows] if grad_output.dim() else grad_output
            gradient.mul_(grad.to(wide).unsqueeze(-1))
        gradient.diagonal(rows.start).neg_()
        grad_bias.add_(gradient.sum(dtype=torch.float64))
        return gradient.to(dtype)

    grad_x, grad_b, _ = loop.run(Layer(x, b, None), step)
    loss = joined(losses, reduction == "none")
    loss = None if loss is None else loss.to(wide)
    if not differentiates:
        return loss, ()
    return loss, (grad_x, grad_b, grad_bias.to(wide) if loop.needs[2] else None)
