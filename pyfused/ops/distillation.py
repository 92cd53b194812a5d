"""Divergences of a student's predictions p from a teacher's q: of logits, of heads, of a top k.

    beta = 0:      KL(q || p) = sum_c q_c (log q_c - log p_c)
    beta = 1:      KL(p || q)
    0 < beta < 1:  beta KL(q || m) + (1 - beta) KL(p || m),  m = beta q + (1 - beta) p

The definitions compute all logits with torch's operators. The kernels of linear layers compute the
logits of both models by blocks of rows, overwrite the student's with their gradient, and multiply
it into the gradients of the layer. For a teacher's top k, the kernels of row states are used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyfused import checks
from pyfused.backends import Backend
from pyfused.backends.protocol import LossKernel, LossResult
from pyfused.dispatch.autograd import in_autocast_dtype
from pyfused.dispatch.operator import Arguments, Tensors
from pyfused.dispatch.plan import Plan, gradients_in_forward, loss_passes
from pyfused.layout import accumulate_dtype
from pyfused.ops import definitions
from pyfused.ops.chunk_sizes import rows_in_budget
from pyfused.ops.heads import (
    Block,
    Layer,
    LossArgs,
    LossStep,
    capped,
    linear,
    loss_over_rows,
    rows_that_count,
)
from pyfused.ops.row_loss import Results, RowLoss
from pyfused.ops.row_state import logits_state, loss_denominator
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
    options: DivergenceOptions = DivergenceOptions(),  # noqa: B008 never changed
) -> Tensor:
    checks.kl_div_with_logits(logits, teacher_logits, options)
    log_p = _log_softmax(_masked(logits, options), options, options.softcap)
    log_q = _log_softmax(_masked(teacher_logits, options), options, options.teacher_softcap)
    return _reduced(divergence(log_p, log_q, options.beta), logits, options)


def linear_kl_div(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    teacher_input: Tensor,
    teacher_linear_weight: Tensor,
    teacher_linear_bias: Tensor | None,
    options: DivergenceOptions = DivergenceOptions(),  # noqa: B008 never changed
) -> Tensor:
    student = input, linear_weight, linear_bias
    teacher = teacher_input, teacher_linear_weight, teacher_linear_bias
    checks.linear_kl_div(*student, *teacher, options)
    logits = F.linear(_masked(input, options), *student[1:])
    return kl_div_with_logits(logits, F.linear(*teacher), options)


def linear_topk_kl_div(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    teacher_indices: Tensor,
    teacher_log_probs: Tensor,
    options: DivergenceOptions = DivergenceOptions(),  # noqa: B008 never changed
) -> Tensor:
    layer, classes = (linear_weight, linear_bias), len(linear_weight)
    checks.linear_topk_kl_div(input, *layer, teacher_indices, teacher_log_probs, options)
    checks.topk_indices(teacher_indices.reshape(-1, teacher_indices.shape[-1]), classes)
    log_q = _masked(teacher_log_probs, options, -math.log(classes))
    checks.topk_log_probs(log_q)
    log_p = _log_softmax(F.linear(_masked(input, options), *layer), options, options.softcap)
    rest = log_p.scatter(-1, teacher_indices, -torch.inf).logsumexp(-1, keepdim=True)
    log_q = log_q.to(log_p.dtype)
    pair = _with_rest(log_p.gather(-1, teacher_indices), rest, log_q, options, classes)
    return _reduced(divergence(*pair, options.beta), input, options)


def _masked(rows: Tensor, options: DivergenceOptions, value: float = 0.0) -> Tensor:
    """Fills rows of weight 0 with a value, as NaN times 0 would be NaN.

    If the weight requires grad, its gradient is the loss of these rows.
    """
    weight = options.token_weight
    if weight is None or weight.requires_grad:
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

    The multiple has no effect on the gradient of the logits, as sum_c p_c is constant.
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
    return F.log_softmax(logits / options.temperature, -1)


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


def _reduced(loss: Tensor, input: Tensor, options: DivergenceOptions) -> Tensor:
    weight, loss = options.token_weight, loss.to(accumulate_dtype(input.dtype))
    if weight is not None:
        loss = loss * weight.to(loss.dtype)
    if weight is not None and not weight.requires_grad:
        loss = loss.where(weight != 0, 0)
    if options.reduction == "none":
        return loss
    total_weight = loss.numel() if weight is None else weight.to(loss.dtype).sum()
    denominator = loss_denominator(options, total_weight)
    return loss.sum() / torch.as_tensor(denominator, dtype=loss.dtype, device=loss.device)


# ---- the operator --------------------------------------------------------------------------------


@dataclass(eq=False, kw_only=True, repr=False)
class Divergence(RowLoss):
    """The divergence of a student's predictions from a teacher's.

    Attributes:
        kernels: Computes the divergence of each row, or their sum, and the gradients that are
            needed, of two-dimensional operands. Takes the arguments of `compute_rows`. For logits,
            `divergence_kernel`.
    """

    kernels: Callable[..., Any]
    options = DivergenceOptions
    strategy = "row by row"

    def check(self, arguments: Arguments) -> None:
        super().check(arguments)
        if self.operands[-2].indices:
            indices = arguments[-3]
            checks.topk_indices(indices.reshape(-1, indices.shape[-1]), len(arguments[1]))
            checks.topk_log_probs(_masked(arguments[-2], arguments[-1], -torch.inf))

    def to_rows(self, tensors: Tensors, options: DivergenceOptions) -> tuple[Any, ...]:  # noqa: ARG002
        token_weight, denominator = checks.factors(*tensors[-2:])
        tensors = list(tensors[:-2])
        for i, operand in enumerate(self.operands):
            if operand.name.endswith("input"):
                tensors[i] = in_autocast_dtype(tensors[i])
            if i in self.row_operands:
                tensors[i] = tensors[i].reshape(-1, tensors[i].shape[-1])
        token_weight = None if token_weight is None else token_weight.flatten()
        denominator = None if denominator is None else denominator.reshape(())  # from (1)
        return *tensors, token_weight, denominator

    def valid_rows(
        self,
        backend: Backend,
        tensors: Sequence[Any],  # noqa: ARG002
        options: DivergenceOptions,
    ) -> tuple[Tensor | None, Tensor | None]:
        weight = options.token_weight
        return (None, None) if weight is None else rows_that_count(weight != 0, backend)

    def total_weight(self, tensors: Sequence[Any], options: DivergenceOptions) -> float | Tensor:
        weight = options.token_weight
        return len(tensors[0]) if weight is None else weight.sum(dtype=torch.float64)

    def kernels_divide(self, *_: Any) -> bool:
        return self.kernels is linear_kernels

    def compute_rows(self, tensors: Sequence[Any], args: LossArgs) -> Results:
        options = args.options
        if options.reduction == "mean":
            denominator = loss_denominator(options, self.total_weight(tensors, options))
            args = args._replace(options=replace(options, denominator=denominator))
        return *self.kernels(tensors, args), None


class LogitsDivergence(Divergence):
    """The divergence of logits."""

    def plan(self, arguments: Arguments, inplace: bool) -> Plan:
        plan = super().plan(arguments, inplace)
        options = self.checked_options(arguments)
        prepare = partial(self.kernels, plan.backend, options)
        in_forward = gradients_in_forward(options.reduction, arguments[0].dtype)
        forward, backward = loss_passes(prepare, plan.needs, in_forward)

        def finish(loss: Tensor, tensors: Tensors) -> Any:
            return self.finish(loss, tensors, options)

        return replace(plan, forward=forward, backward=backward, finish=finish)


# ---- kernels -------------------------------------------------------------------------------------


def divergence_kernel(
    backend: Backend,
    options: DivergenceOptions,
    tensors: Sequence[Any],
    outputs: Outputs,
    grad_output: Tensor | None,
) -> LossKernel:
    """Prepares the divergence of logits; if these have softcaps or two dtypes, in each call."""
    prepare, (logits, teacher_logits, *_) = backend.kl_div_with_logits, tensors
    dtype = logits.dtype
    if options.softcap is None is options.teacher_softcap and dtype is teacher_logits.dtype:
        return prepare(tensors, options, outputs, grad_output)

    def launch(
        tensors: Sequence[Any], numbers: Sequence[Any], grad_output: Tensor | None = None
    ) -> LossResult:
        logits, teacher_logits, token_weight, *others = tensors
        _, softcap, _, _, teacher_softcap = numbers
        student, cap_backward = capped(backend, logits, softcap)
        teacher, _ = capped(backend, teacher_logits, teacher_softcap)
        common = torch.promote_types(student.dtype, teacher.dtype)
        x, y = student.to(common), teacher.to(common)
        capped_outputs = outputs._replace(inplace=outputs.inplace or student is not logits)
        tensors = x, y, token_weight, *others
        kernel = prepare(tensors, options, capped_outputs, grad_output)
        loss, (gradient,) = kernel(tensors, numbers, grad_output)
        loss = None if loss is None else loss.to(accumulate_dtype(dtype))
        if gradient is not None:
            gradient = cap_backward(gradient.to(student.dtype))
            if softcap is not None and token_weight is not None:  # NaN times 0 is NaN
                gradient.masked_fill_((token_weight == 0).unsqueeze(-1), 0)
        return loss, (gradient,)

    return launch


def linear_kernels(tensors: Sequence[Any], args: LossArgs) -> LossResult:
    """Computes the divergence of a student's head from a teacher's, and the student's gradients."""
    *_, input, weight, bias = tensors
    backend = args.backend
    dtype = backend.product_dtype(input.dtype)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)

    def step(block: Block, args: LossArgs) -> tuple[Tensor | None, Tensor | None]:
        _, options, outputs, grad_output, *_ = args
        teacher_logits = backend.empty(block.logits.shape, dtype, block.logits)
        linear(input[block.rows].to(dtype), weight, bias, teacher_logits)
        tensors = block.logits, teacher_logits, *options.plan_tensors()
        kernel = divergence_kernel(backend, options, tensors, outputs, grad_output)
        loss, (gradient,) = kernel(tensors, options.numbers(), grad_output)
        return loss, gradient

    teacher_bytes = dtype.itemsize * (1 if args.options.teacher_softcap is None else 3)
    return _by_rows(tensors, args, step, teacher_bytes)


def topk_kernels(tensors: Sequence[Any], args: LossArgs) -> LossResult:
    """Computes the divergence of a student's head from a teacher's top k, and the gradients."""
    _, weight, _, indices, log_probs = tensors
    invalid = checks.topk_indices(indices, len(weight))[:, None]
    checks.topk_log_probs(_masked(log_probs, args.options, -torch.inf))
    if args.backend.ASYNCHRONOUS:  # an error would synchronise, so the loss of the row is NaN
        log_probs = log_probs.masked_fill(invalid, torch.nan)
        indices = indices.masked_fill(invalid, 0)

    def step(block: Block, args: LossArgs) -> tuple[Tensor | None, Tensor | None]:
        logits, cap_backward = capped(args.backend, block.logits, args.options.softcap)
        loss, gradient = _topk(logits, indices[block.rows], log_probs[block.rows], args)
        return loss, None if gradient is None else cap_backward(gradient)

    return _by_rows(tensors, args, step)


def _by_rows(
    tensors: Sequence[Any], args: LossArgs, step: LossStep, teacher_bytes: int = 0
) -> LossResult:
    """Computes the divergence and the gradients by blocks of rows.

    Args:
        step: As in `loss_over_rows`, for a block of the student's logits.
        teacher_bytes: The bytes that ``step`` allocates for each of the student's logits.
    """
    (input, weight, bias, *_), (backend, options, *_) = tensors, args
    n, dtype = len(input), backend.product_dtype(input.dtype)
    cap_bytes = 0 if options.softcap is None else 3 * accumulate_dtype(dtype).itemsize
    bytes_per_logit = dtype.itemsize + cap_bytes + teacher_bytes
    given = n, weight.shape, options.memory_budget, dtype, backend, bytes_per_logit
    rows = max(1, min(n, rows_in_budget(*given)))
    layer = Layer(_masked(input, options), (weight,), bias, dtype)
    loss, gradients = loss_over_rows(layer, rows, args, step)
    return loss, gradients[:3]


def _topk(
    logits: Tensor, indices: Tensor, log_q: Tensor, args: LossArgs
) -> tuple[Tensor | None, Tensor | None]:
    """Computes the divergence of k + 1 classes, the last of which is the sum of all others.

    With the gradient g of the k + 1 log-probabilities, and its sum s, the gradient of the logit x_c
    is g_c - s p_c for one of the k classes, and (g_rest - s p_rest) exp(x_c - lse_rest) for others.
    """
    backend, options, outputs, grad_output, *_ = args
    n, classes = logits.shape
    rows, class_range = RowOptions(scale=1 / options.temperature), ClassRange(0, classes)
    if logits.dtype is torch.float64:
        logits -= logits.amax(1, keepdim=True)  # to round the log-sum-exp less
    topk_logits = logits.gather(1, indices).double() * rows.scale
    logits.scatter_(1, indices, -torch.inf)
    state, _ = logits_state(backend, logits, rows, class_range)(rows.numbers, logits, None)
    lse_rest = state[LSE]
    lse = torch.logaddexp(topk_logits.logsumexp(1), lse_rest)[:, None]
    log_p_rest = lse_rest[:, None] - lse
    log_p, log_q = _with_rest(topk_logits - lse, log_p_rest, log_q.double(), options, classes)
    loss, weight = divergence(log_p, log_q, options.beta), options.token_weight
    if weight is not None:
        loss = (loss * weight).where(weight != 0, 0)
    factor = torch.ones_like(loss) if weight is None else weight
    loss = loss if options.reduction == "none" else loss.sum()
    if not outputs.gradients:
        return loss, None
    if grad_output is not None:
        factor = (factor * grad_output).where(factor != 0, 0)
    p, k = log_p.exp(), indices.shape[1]
    gradient = _gradient_by_log_p(log_p, log_q, options.beta) * factor[:, None]
    gradient = gradient.where(factor[:, None] != 0, 0)
    total = gradient.sum(1, keepdim=True)
    grad_results = state.new_zeros(len(RESULTS), n)
    grad_results[LSE] = gradient[:, k:].sum(1) - (total * log_p_rest.exp()).squeeze(1)
    no_rest = state[SUM] == 0
    for field, value in ((PIVOT, 0), (ENTROPY, 0), (SUM, 1)):  # against divisions by 0
        state[field].masked_fill_(no_rest, value)
    launch = backend.row_gradients(logits, rows, class_range, len(RESULTS))
    launch(rows.numbers, logits, None, None, state, grad_results, logits)
    grad_topk = (gradient[:, :k] - total * p[:, :k]) * rows.scale
    logits.scatter_(1, indices, grad_topk.to(logits.dtype))
    return loss, logits
