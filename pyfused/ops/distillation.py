"""Divergences of a student's predictions p from a teacher's q, for logits, heads and a top k.

    beta = 0:      KL(q || p) = sum_c q_c (log q_c - log p_c)
    beta = 1:      KL(p || q)
    0 < beta < 1:  beta KL(q || m) + (1 - beta) KL(p || m),  m = beta q + (1 - beta) p

The definitions compute all logits with torch's operators. For linear layers, a loop over blocks of
rows computes the logits of both models, overwrites the student's logits with their gradient, and
multiplies it into the gradients of the layer. A teacher's top k uses the kernels of row states.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyfused import checks
from pyfused.backends import backend_of
from pyfused.backends.protocol import LossResult
from pyfused.dispatch.operator import Needs, Options, Tensors, requires_grad
from pyfused.dispatch.originals import F
from pyfused.layout import accumulate_dtype
from pyfused.ops import definitions
from pyfused.ops.head_loop import HeadLoop, Layer, multiply, prepared
from pyfused.ops.heads import BlockResult, HeadBlocks, cap_backward, capped
from pyfused.ops.row_sources import LogitRows
from pyfused.ops.rows import KernelPass, RowLoss, RowOperator
from pyfused.types import (
    ENTROPY,
    LSE,
    PIVOT,
    RESULTS,
    SUM,
    ClassRange,
    DivergenceOptions,
    Outputs,
    RowOptions,
)

# ---- definitions ---------------------------------------------------------------------------------


def kl_div_with_logits(
    logits: Tensor,
    teacher_logits: Tensor,
    token_weight: Tensor | None,
    denominator: Tensor | None,
    options: DivergenceOptions,
) -> Tensor:
    options = definitions.widened(options, denominator, accumulate_dtype(logits.dtype))
    log_p = _log_softmax(_masked(logits, token_weight), options, options.softcap)
    log_q = _log_softmax(_masked(teacher_logits, token_weight), options, options.teacher_softcap)
    loss = divergence(log_p, log_q, options.beta).to(accumulate_dtype(logits.dtype))
    return definitions.reduced_rows(loss, token_weight, options)


def linear_kl_div(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    teacher_input: Tensor,
    teacher_linear_weight: Tensor,
    teacher_linear_bias: Tensor | None,
    token_weight: Tensor | None,
    denominator: Tensor | None,
    options: DivergenceOptions,
) -> Tensor:
    student = input, linear_weight, linear_bias
    teacher = teacher_input, teacher_linear_weight, teacher_linear_bias
    logits = F.linear(_masked(input, token_weight), *student[1:])
    teacher_logits = F.linear(_masked(teacher_input, token_weight), *teacher[1:])
    return kl_div_with_logits(logits, teacher_logits, token_weight, denominator, options)


def linear_topk_kl_div(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    teacher_indices: Tensor,
    teacher_log_probs: Tensor,
    token_weight: Tensor | None,
    denominator: Tensor | None,
    options: DivergenceOptions,
) -> Tensor:
    layer, classes = (linear_weight, linear_bias), linear_weight.shape[0]
    log_q = _masked(teacher_log_probs, token_weight, -math.log(classes))
    options = definitions.widened(options, denominator, accumulate_dtype(input.dtype))
    logits = _masked(F.linear(_masked(input, token_weight), *layer), token_weight)
    log_p = _log_softmax(logits, options, options.softcap)
    others = log_p.scatter(-1, teacher_indices, -torch.inf)
    is_empty = (others == -torch.inf).all(-1, keepdim=True)  # a gradient of NaN
    rest = others.where(~is_empty, 0).logsumexp(-1, keepdim=True).where(~is_empty, -torch.inf)
    log_q = log_q.to(log_p.dtype)
    pair = _with_rest(log_p.gather(-1, teacher_indices), rest, log_q, options, classes)
    loss = divergence(*pair, options.beta).to(accumulate_dtype(input.dtype))
    return definitions.reduced_rows(loss, token_weight, options)


def _masked(rows: Tensor, weight: Tensor | None, value: float = 0.0) -> Tensor:
    """Fills rows of weight 0 with a value, because NaN times 0 would be NaN.

    If the weight requires grad, these rows are kept, because their loss is its gradient.
    """
    if weight is None or requires_grad(weight):
        return rows
    return rows.where(weight.unsqueeze(-1) != 0, value)


def divergence(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """Returns the divergence of the student's p from the teacher's q; 0 log 0 is 0."""
    dtype = torch.promote_types(log_p.dtype, log_q.dtype)
    log_p, log_q = log_p.to(dtype), log_q.to(dtype)
    if beta == 0:
        return _kl_div(log_q, log_p)
    if beta == 1:
        return _kl_div(log_p, log_q)
    low = torch.finfo(log_p.dtype).min / 4  # logaddexp(-inf, -inf) has a gradient of NaN
    log_p, log_q = log_p.clamp(min=low), log_q.clamp(min=low)
    log_m = _log_mixture(log_p, log_q, beta)
    return beta * _kl_div(log_q, log_m) + (1 - beta) * _kl_div(log_p, log_m)


def _log_mixture(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    if beta == 1:
        return log_q
    log, log1p = (torch.log, torch.log1p) if isinstance(beta, Tensor) else (math.log, math.log1p)
    return torch.logaddexp(log_q + log(beta), log_p + log1p(-beta))


def _gradient_by_log_p(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """Returns d/dlog_p of the divergence, for beta > 0 up to a multiple of p.

    The multiple has no effect on the gradient of the logits, because sum_c p_c is constant.
    """
    if beta == 0:
        return -log_q.exp()
    p, factor = log_p.exp(), 1 - beta if beta < 1 else 1.0
    return factor * (p * (log_p - _log_mixture(log_p, log_q, beta))).where(p != 0, 0)


def _kl_div(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp()
    mask = p != 0
    return (p * (log_p.where(mask, 0) - log_q.where(mask, 0))).sum(-1)


def _log_softmax(logits: Tensor, options: DivergenceOptions, cap: float | None) -> Tensor:
    logits = logits.to(accumulate_dtype(logits.dtype))
    logits = logits if cap is None else definitions.softcap(logits, cap)
    log_p: Tensor = F.log_softmax(logits / options.temperature, -1)
    return log_p


def _with_rest(
    log_p: Tensor, rest: Tensor, log_q: Tensor, options: DivergenceOptions, classes: int
) -> tuple[Tensor, Tensor]:
    """Appends the remaining classes, as one class, to the log-probabilities of the top k.

    If k is the number of classes, the remainder would be a rounding error, whose divergence from 0
    is infinite, so it is left out.

    Args:
        rest: The student's log-probability of the remaining classes, of shape (..., 1).
    """
    if options.remainder == "ignore" or log_q.shape[-1] == classes:
        return log_p, log_q
    q_rest = (1 - log_q.double().exp().sum(-1, keepdim=True)).clamp(min=0)
    return torch.cat((log_p, rest), -1), torch.cat((log_q, q_rest.log().to(log_q.dtype)), -1)


# ---- the losses ----------------------------------------------------------------------------------


class DivergenceLoss(RowLoss):
    """The divergence of a student from a teacher: of logits, or of linear layers."""

    def finish(self, output: Any, _: Tensors, options: Options, leading: Sequence[int]) -> Any:
        return output.reshape(leading) if options.reduction == "none" else output

    def bytes_per_logit(self, tensors: Tensors, options: Options) -> int:
        """Returns the bytes that a block needs for each of the teacher's logits."""
        dtype = backend_of(tensors[3]).product_dtype(tensors[3].dtype)
        return (1 if options.teacher_softcap is None else 3) * dtype.itemsize

    def prepared(self, tensors: Tensors, options: Options, rows: int) -> Tensors:
        """Replaces the denominator by the memory of a block of the teacher's logits.

        With a softcap, the memory of a block of the student's capped logits follows. glibc before
        2.39 would not reuse the memory of one block for the next.
        """
        input, *student, teacher_input, weight, bias, token_weight, _ = tensors
        dtype = backend_of(input).product_dtype(teacher_input.dtype)
        teacher = Layer(teacher_input.to(dtype), weight, bias)
        teacher_layer = teacher.input, *prepared(teacher, slice(None), dtype)
        dtypes = [dtype] if options.softcap is None else [dtype, accumulate_dtype(input.dtype)]
        shape, empty = (rows * weight.shape[0],), backend_of(input).empty
        memory = [empty(shape, each, input) for each in dtypes]
        return _masked(input, token_weight), *student, *teacher_layer, token_weight, *memory

    def block(
        self, logits: Tensor, inputs: Tensors, grad_output: Any, options: Options, outputs: Outputs
    ) -> BlockResult:
        input, weight, bias, token_weight, *memory = inputs
        teacher_logits, *others = [x[: logits.numel()].view(logits.shape) for x in memory]
        multiply(input, weight, bias, teacher_logits)
        tensors = logits, teacher_logits, token_weight, None
        loss, (gradient,) = divergence_kernel(tensors, options, outputs, grad_output, *others)
        return BlockResult(loss, (gradient, None))


class TopKLoss(DivergenceLoss):
    """The divergence of a student's linear layer from a teacher's top k."""

    keeps_logits = False

    def check_values(self, tensors: Tensors) -> None:
        self.check(tensors)

    def check(self, tensors: Tensors) -> Tensor:
        """Returns whether each row has an invalid index, and raises if reading them is possible."""
        _, weight, _, indices, log_probs, token_weight, _ = tensors
        invalid = checks.topk_indices(indices.reshape(-1, indices.shape[-1]), weight.shape[0])
        checks.topk_log_probs(_masked(log_probs, token_weight, -torch.inf))
        return invalid[:, None]

    def bytes_per_logit(self, _tensors: Tensors, _options: Options) -> int:
        return 0

    def prepared(self, tensors: Tensors, _options: Options, _rows: int) -> Tensors:
        input, weight, bias, indices, log_probs, token_weight, denominator = tensors
        invalid = self.check(tensors)
        if backend_of(input).ASYNCHRONOUS:  # raising would synchronise, so the row's loss is NaN
            log_probs = log_probs.masked_fill(invalid, torch.nan)
            indices = indices.masked_fill(invalid, 0)
        input = _masked(input, token_weight)
        return input, weight, bias, indices, log_probs, token_weight, denominator

    def block(
        self, logits: Tensor, inputs: Tensors, grad_output: Any, options: Options, outputs: Outputs
    ) -> BlockResult:
        x, saved = capped(logits, options.softcap)
        loss, gradient = _topk(x, inputs, grad_output, options, bool(outputs.gradients))
        if gradient is not None:
            gradient = cap_backward(gradient, saved, options.softcap).to(logits.dtype)
        return BlockResult(loss, (gradient, None))


# ---- passes --------------------------------------------------------------------------------------


def linear_divergence_pass(
    op: RowOperator, inputs: Tensors, options: Options, needs: Needs
) -> HeadBlocks:
    dtype = inputs[0].dtype
    sizes = op.head_sizes(inputs, options, dtype)
    cap_bytes = 0 if options.softcap is None else 3 * accumulate_dtype(sizes.dtype).itemsize
    bytes_per_logit = op.loss.bytes_per_logit(inputs, options)
    sizes = replace(sizes, bytes_per_logit=sizes.dtype.itemsize + cap_bytes + bytes_per_logit)
    loop = HeadLoop(sizes.backend, sizes.dtype, sizes.row_blocks, needs)
    return HeadBlocks(op, loop, inputs, options, dtype)


def divergence_pass(*_: Any) -> KernelPass:
    return KernelPass(divergence_kernel)


# ---- kernels -------------------------------------------------------------------------------------


def divergence_kernel(
    tensors: Sequence[Any],
    options: DivergenceOptions,
    outputs: Outputs,
    grad_output: Tensor | None = None,
    capped_memory: Tensor | None = None,
) -> LossResult:
    """Computes the divergence of logits, which may have softcaps and two dtypes.

    Args:
        capped_memory: Memory for the capped logits of the student, or None to allocate it.
    """
    logits, teacher_logits, token_weight, *others = tensors
    backend, dtype, softcap = backend_of(logits), logits.dtype, options.softcap
    if softcap is None is options.teacher_softcap and dtype is teacher_logits.dtype:
        return backend.kl_div_with_logits(tensors, options, outputs, grad_output)
    inplace, (student, saved) = outputs.inplace, capped(logits, softcap, out=capped_memory)
    out = teacher_logits if inplace else None
    teacher, _ = capped(teacher_logits, options.teacher_softcap, out=out)
    common = torch.promote_types(student.dtype, teacher.dtype)
    outputs = outputs._replace(inplace=inplace or student is not logits)
    inputs = student.to(common), teacher.to(common), token_weight, *others
    loss, gradients = backend.kl_div_with_logits(inputs, options, outputs, grad_output)
    loss, (gradient,) = None if loss is None else loss.to(accumulate_dtype(dtype)), gradients
    if gradient is not None:
        gradient = cap_backward(gradient.to(student.dtype), saved, softcap, inplace)
        gradient = gradient.to(dtype)
        if softcap is not None and token_weight is not None:  # NaN times 0 is NaN
            gradient.masked_fill_((token_weight == 0).unsqueeze(-1), 0)
    return loss, (gradient,)


def _topk(
    logits: Tensor,
    operands: Sequence[Any],
    grad_output: Tensor | None,
    options: DivergenceOptions,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Computes the divergence of k + 1 classes, the last of which is the sum of all others.

    With the gradient g of the k + 1 log-probabilities, and its sum s, the gradient of the logit x_c
    is g_c - s p_c for one of the k classes, and (g_rest - s p_rest) exp(x_c - lse_rest) for others.
    """
    indices, log_q, weight, _ = operands
    (n, classes), scale = logits.shape, 1 / options.temperature
    row_options = RowOptions(scale=scale)
    source = LogitRows(logits, None, None, row_options, ClassRange(0, classes))
    if logits.dtype is torch.float64:
        logits -= logits.amax(1, keepdim=True)  # reduces the rounding error of the log-sum-exp
    topk_logits = logits.gather(1, indices).double() * scale
    logits.scatter_(1, indices, -torch.inf)
    state, *_ = source.state()
    lse_rest = state[LSE]
    lse = torch.logaddexp(topk_logits.logsumexp(1), lse_rest)[:, None]
    log_p_rest = lse_rest[:, None] - lse
    log_p, log_q = _with_rest(topk_logits - lse, log_p_rest, log_q.double(), options, classes)
    loss = divergence(log_p, log_q, options.beta)
    if weight is not None:
        loss = (loss * weight).where(weight != 0, 0)
    factor = torch.ones_like(loss) if weight is None else weight
    loss = loss if options.reduction == "none" else loss.sum()
    if not needs_gradient:
        return loss, None
    if grad_output is not None:
        factor = (factor * grad_output).where(factor != 0, 0)
    counts, k = factor[:, None] != 0, indices.shape[1]  # other rows may be NaN
    p, p_rest = (log.exp().where(counts, 0) for log in (log_p, log_p_rest))
    gradient = _gradient_by_log_p(log_p, log_q, options.beta) * factor[:, None]
    gradient = gradient.where(counts, 0)
    no_rest = state[SUM] == 0
    gradient[:, k:].masked_fill_(no_rest[:, None], 0)
    total = gradient.sum(1, keepdim=True)
    grad_results = state.new_zeros(len(RESULTS), n)
    grad_results[LSE] = gradient[:, k:].sum(1) - (total * p_rest).squeeze(1)
    for field, value in ((PIVOT, 0), (ENTROPY, 0), (SUM, 1)):  # avoids division by 0
        state[field].masked_fill_(no_rest, value)
    source.gradients(state, grad_results, logits)
    grad_topk = (gradient[:, :k] - total * p[:, :k]) * scale
    logits.scatter_(1, indices, grad_topk.to(logits.dtype))
    return loss, logits
