"""Losses of a linear layer's output, computed in one pass over blocks of rows with all classes.

``row_sources.HeadRows`` computes the states of rows, and the gradients from them, in blocks of any
size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfused.backends import backend_of
from pyfused.dispatch.operator import Forward, Needs, Options, Tensors, gradients_in_forward
from pyfused.layout import accumulate_dtype
from pyfused.ops.elementwise import SOFTCAP
from pyfused.ops.head_loop import HeadLoop, Layer, hooks_are_active, memory_of
from pyfused.ops.metrics import Metrics
from pyfused.ops.rows import RowOperator
from pyfused.torch_internals import graph_is_retained
from pyfused.types import Gradients, Outputs


class HeadResult(NamedTuple):
    """The result of a call with predictions.

    Attributes:
        metrics: None if they were not requested.
        prediction: A float64 tensor (2, ...) of the largest logit of each row, before softcap and
            scale, and its class, -1 if unknown.
    """

    loss: Tensor
    metrics: Metrics | None
    prediction: Tensor


class BlockResult(NamedTuple):
    """The result of a block of rows, or of all rows.

    Attributes:
        loss: The loss of each row, or their sum.
        gradients: Of the logits, which may overwrite them, and the target; of all rows, the
            gradients of the layer and the target.
        state: The states of the rows, for metrics.
        prediction: As in `HeadResult`.
    """

    loss: Tensor | None
    gradients: Gradients
    state: Tensor | None = None
    prediction: Tensor | None = None


class HeadBlocks:
    """The pass of a loss of a layer's output that computes blocks of rows with all classes.

    The forward pass computes the gradients of a reduced loss. If the gradient of the logits takes
    no more memory than the weight, it is kept instead of the gradients of the layer. For float16,
    and for losses that are not reduced, the backward pass recomputes the logits.

    Attributes:
        op: Has a `rows.RowLoss` with a method `block`, which takes the logits; the tensors of a
            call after the layer; the gradient of the loss, None for ones; the options of a call
            with the reduction "none" or "sum"; and the outputs.
        rows: The rows to compute.
        tensors: The tensors of these rows.
        size: The size of a block. If it does not have all classes, `compute` cannot be called.
    """

    def __init__(
        self,
        op: RowOperator,
        loop: HeadLoop,
        tensors: Tensors,
        options: Options,
        dtype: torch.dtype,
    ) -> None:
        """Takes a call, and the dtype in which kernels take the layer's input."""
        self.op, self.loop, self.options = op, loop, options
        self.has_gradients_in_forward = gradients_in_forward(options.reduction, dtype)
        self.rows = op.loss.rows(tensors, options, loop.backend)
        if self.rows.indices is not None:
            tensors = list(tensors)
            for i in op.row_operands:
                tensors[i] = self.rows.take(tensors[i])
        self.tensors, self.size = tensors, loop.size(tensors[0].shape[0])

    def forward(self, inputs: Tensors, _: Options, needs: Needs) -> Forward:
        keeps, needed = self.op.loss.keeps_logits and True in needs, tuple[bool, ...]()
        if True in needs and self.has_gradients_in_forward:
            needed, keeps = tuple(needs), needs[1] and True not in needs[3:]
        (loss, gradients, state, prediction), kept = self.compute(needed, keeps=keeps)
        saved = inputs if state is kept is None else (*inputs, state, kept)
        result = loss if state is prediction is None else (loss, state, prediction)
        return result, saved, gradients

    def backward(self, saved: Tensors, _: Options, needs: Needs, grad_output: Tensor) -> Gradients:
        if (gradient := self.kept_gradient(saved, needs, grad_output)) is not None:
            return gradient.products()
        kept = (*saved[len(self.op.all_operands) :], None, None)[1]
        kept = None if self.has_gradients_in_forward else kept
        return self.compute(needs, grad_output, kept)[0].gradients

    def kept_gradient(
        self, saved: Tensors, needs: Needs, grad_output: Tensor
    ) -> KeptGradient | None:
        """Returns the gradient of the logits that the forward pass has kept.

        Returns None if it has kept none, or if grad_output is infinite or NaN.
        """
        kept = (*saved[len(self.op.all_operands) :], None, None)[1]
        if kept is None or not self.has_gradients_in_forward:
            return None
        kept = kept.clone() if graph_is_retained() else kept
        is_scaled = self.loop.backend.scale_(kept, grad_output)
        return KeptGradient(self, needs, kept) if is_scaled else None

    def compute(
        self,
        needs: Needs,
        grad_output: Tensor | None = None,
        logits: Tensor | None = None,
        keeps: bool = False,
    ) -> tuple[BlockResult, Tensor | None]:
        """Returns the result of all rows, and a kept block.

        Args:
            needs: Whether each of the first tensors needs a gradient; () to compute none.
            grad_output: The gradient of the result in the backward pass, None in the forward pass.
            logits: The logits that the forward pass has kept, or None.
            keeps: Whether to keep a block for the backward pass, if it is the only one and takes
                no more memory than the weight: the logits, or if gradients are needed, the gradient
                of the logits instead of the gradients of the layer.
        """
        loss, rows, options = self.op.loss, self.rows, self.options
        is_mean, unreduced = options.reduction == "mean", options.reduction == "none"
        block_needs = (any(needs[:3]), *needs[3:]) if needs else ()
        outputs = Outputs(grad_output is None, block_needs, True)
        rows_at_once = min(self.size.rows, len(self.tensors[0]))
        input, weight, bias, *operands = loss.prepared(self.tensors, options, rows_at_once)
        divisor = loss.divisor(self.tensors, options, rows.counts is None) if is_mean else None
        grad_output = self._grad_of_rows(grad_output, divisor if needs else None)
        row_operands = self.op.row_operands[1:]  # without the input
        for i, x in enumerate(operands):  # hooks may have changed saved tensors
            if x is not None and (i + 3 in row_operands or x.dim() < 2):
                operands[i] = x.contiguous()
        if is_mean:
            options = options._replace(reduction="sum", denominator=None)
        kept: Tensor | None = None
        n, features = input.shape
        is_small = n * self.loop.dtype.itemsize <= features * weight.dtype.itemsize
        keeps = keeps and is_small and n <= self.size.rows and not hooks_are_active()
        results = list[Any]()
        sliced = row_operands if self.size.rows < n else []

        def step(logits: Tensor, block: slice, _: slice) -> Tensor | None:
            nonlocal kept
            part, grad = [*operands], grad_output
            for i in sliced:
                part[i - 3] = None if part[i - 3] is None else part[i - 3][block]
            grad = grad[block] if unreduced and grad is not None else grad
            result = loss.block(logits, part, grad, options, outputs)
            results.append(result)
            gradient = result.gradients[0]
            if gradient is not None and rows.counts is not None and options.softcap is not None:
                gradient.masked_fill_(~rows.counts[block].unsqueeze(-1), 0)  # 0 times NaN is NaN
            if not keeps:
                return gradient  # type: ignore[no-any-return]
            if gradient is not None and gradient.data_ptr() != logits.data_ptr():
                logits.copy_(gradient)
            kept = memory_of(logits)
            return None

        layer = Layer(input, weight, bias)
        sums = self.loop.run(layer, step, counts=rows.counts, logits=logits)
        return self.collected(results, sums, divisor, 0 if keeps else len(needs)), kept

    def _grad_of_rows(self, grad_output: Tensor | None, divisor: Any) -> Tensor | None:
        """Returns the gradient of the computed rows' losses, or of their sum; None for ones."""
        if self.options.reduction == "none":
            grad_output = self.rows.take(grad_output)
        if divisor is not None:
            wide = self.loop.wide
            grad = self.tensors[0].new_ones((), dtype=wide)
            grad_output = ((grad if grad_output is None else grad_output) / divisor).to(wide)
        return None if grad_output is None else grad_output.contiguous()

    def collected(
        self, results: Sequence[BlockResult], gradients: Gradients, divisor: Any, count: int
    ) -> BlockResult:
        """Returns the results of all rows.

        Args:
            results: The results of the blocks.
            gradients: The gradients of the layer.
            count: The number of gradients to return.
        """
        unreduced, rows = self.options.reduction == "none", self.rows
        result = results[0] if len(results) == 1 else joined(results, unreduced)
        loss, (_, grad_target), state, prediction = result
        if loss is not None:
            loss = (loss if divisor is None else loss / divisor).to(self.loop.wide)
        gradients = *gradients, grad_target
        if rows.indices is not None:
            loss = rows.spread(loss) if unreduced else loss
            state, prediction = rows.spread(state, 1), rows.spread(prediction, 1)
            gradients = rows.spread(gradients[0]), *gradients[1:3], rows.spread(grad_target)
        return BlockResult(loss, gradients[:count], state, prediction)


class KeptGradient(NamedTuple):
    """The gradient of the logits of the computed rows, before its products with the layer.

    Attributes:
        needs: Whether each of the first tensors of the call needs a gradient.
        memory: The gradient, with padding.
    """

    blocks: HeadBlocks
    needs: Needs
    memory: Tensor

    def rows(self) -> tuple[Tensor | None, Tensor]:
        """Returns the indices of the rows, None for all, and their gradient (n, C)."""
        input, weight, *_ = self.blocks.tensors
        gradient = self.memory.view(input.shape[0], -1)[:, : weight.shape[0]]
        return self.blocks.rows.indices, gradient

    def products(self) -> Gradients:
        """Returns the gradients of the first tensors of the call."""
        blocks, result = self.blocks, BlockResult(None, (None, None))
        layer, step = Layer(*blocks.tensors[:3]), lambda gradient, *_: gradient
        sums = blocks.loop.run(layer, step, counts=blocks.rows.counts, logits=self.memory)
        return blocks.collected([result], sums, None, len(self.needs)).gradients


def joined(results: Sequence[BlockResult], unreduced: bool) -> BlockResult:
    """Concatenates the results of blocks, except for sums of losses, which are added in float64."""
    losses, parts, states, predictions = zip(*results, strict=True)
    loss = losses[0]
    if loss is not None:
        loss = torch.cat(losses) if unreduced else torch.stack(losses).sum(dtype=torch.float64)
    grad_targets = [grad_target for _, grad_target in parts]
    grad_target = None if grad_targets[0] is None else torch.cat(grad_targets)
    records = [None if x[0] is None else torch.cat(x, 1) for x in (states, predictions)]
    return BlockResult(loss, (None, grad_target), *records)


# ---- capped logits -------------------------------------------------------------------------------


def capped(
    logits: Tensor, softcap: float | None, rounds: bool = False, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns softcap * tanh(logits / softcap), and the tensor that `cap_backward` takes.

    Without a softcap, both are the logits.

    Args:
        rounds: Whether the result has the logits' dtype rather than the accumulation dtype.
        out: Memory of the logits' shape, for a result of its dtype.
    """
    if softcap is None:
        return logits, logits
    wide = logits if rounds else logits.to(accumulate_dtype(logits.dtype))
    if out is not None and out.dtype is not wide.dtype:
        out = None
    return backend_of(wide).activation(SOFTCAP.kernels["softcap"], wide, (softcap,), out), wide


def cap_backward(
    gradient: Tensor, saved: Tensor, softcap: float | None, inplace: bool = False
) -> Tensor:
    """Returns the gradient of the logits, given the gradient of `capped`.

    Args:
        inplace: Whether the result may overwrite the saved tensor.
    """
    if softcap is None:
        return gradient
    kernel, out = SOFTCAP.kernels["softcap"], saved if inplace and saved.is_contiguous() else None
    return backend_of(saved).activation_backward(kernel, gradient, saved, (softcap,), out)
