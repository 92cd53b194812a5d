"""Divergences of a student's predictions from a teacher's: of logits, of heads, of a top k.

A definition is the divergence in torch's terms, from all logits. The kernels' part goes chunk by
chunk of rows where the logits are a linear layer's: both models' logits of some rows are made, the
student's are turned into their gradient in place, and that is multiplied into the gradients of the
layer. Beside a teacher's top k, logits take the kernels of row states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyfused import checks
from pyfused.backends import Backend
from pyfused.dispatch.autograd import in_autocast_dtype
from pyfused.dispatch.operator import Arguments
from pyfused.layout import accumulate_dtype
from pyfused.ops import definitions
from pyfused.ops.chunk_sizes import rows_in_budget
from pyfused.ops.cross_entropy import options_fallback_reason
from pyfused.ops.heads import Block, Layer, capped, counted_rows, linear, loss_over_rows
from pyfused.ops.row_loss import Results, RowLoss, tensors_of
from pyfused.ops.row_state import denominator_of, state_of_logits
from pyfused.types import (
    ENTROPY,
    LSE,
    PIVOT,
    RESULTS,
    SUM,
    ClassRange,
    DivergenceOptions,
    Gradients,
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
    log_p = _log_softmax(_shown(logits, options), options, options.softcap)
    log_q = _log_softmax(_shown(teacher_logits, options), options, options.teacher_softcap)
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
    logits = F.linear(_shown(input, options), *student[1:])
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
    log_q = _shown(teacher_log_probs, options, -math.log(classes))
    checks.topk_log_probs(log_q)
    log_p = _log_softmax(F.linear(_shown(input, options), *layer), options, options.softcap)
    rest = log_p.scatter(-1, teacher_indices, -torch.inf).logsumexp(-1, keepdim=True)
    log_q = log_q.to(log_p.dtype)
    both = _with_rest(log_p.gather(-1, teacher_indices), rest, log_q, options, classes)
    return _reduced(divergence(*both, options.beta), input, options)


def _shown(rows: Tensor, options: DivergenceOptions, other: float = 0.0) -> Tensor:
    """Returns the rows, with other numbers where the weight is 0, as NaN times 0 is NaN."""
    weight = options.token_weight
    return rows if weight is None else rows.where(weight.unsqueeze(-1) != 0, other)


def divergence(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """Returns the divergence of the student's p from the teacher's q; 0 log 0 is 0."""
    dtype = torch.promote_types(log_p.dtype, log_q.dtype)
    log_p, log_q = log_p.to(dtype), log_q.to(dtype)
    if beta == 0:
        return _kl_div(log_q, log_p)
    if beta == 1:
        return _kl_div(log_p, log_q)
    low = torch.finfo(log_p.dtype).min / 4  # of -inf alone the gradient would be NaN
    log_p, log_q = log_p.clamp(min=low), log_q.clamp(min=low)
    log_m = _log_mixture(log_p, log_q, beta)
    return beta * _kl_div(log_q, log_m) + (1 - beta) * _kl_div(log_p, log_m)


def _log_mixture(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    if beta == 1:
        return log_q
    return torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))


def _slopes(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """Returns the derivative of the divergence by log p; for beta > 0 less a multiple of p.

    That changes no derivative by logits: the p that log p is normalized to add up to 1.
    """
    if beta == 0:
        return -log_q.exp()
    p, share = log_p.exp(), 1 - beta if beta < 1 else 1.0
    return share * (p * (log_p - _log_mixture(log_p, log_q, beta))).where(p != 0, 0)


def _kl_div(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp()
    counts = p != 0
    return (p * (log_p.where(counts, 0) - log_q.where(counts, 0))).sum(-1)


def _log_softmax(logits: Tensor, options: DivergenceOptions, cap: float | None) -> Tensor:
    logits = logits.to(accumulate_dtype(logits.dtype))
    logits = logits if cap is None else definitions.softcap(logits, cap)
    return F.log_softmax(logits / options.temperature, -1)


def _with_rest(
    log_p: Tensor, rest: Tensor, log_q: Tensor, options: DivergenceOptions, classes: int
) -> tuple[Tensor, Tensor]:
    """Returns both log-probabilities of the top k, and of the rest as one class.

    If k is all classes, that has none but a rounding error, which is infinitely far from 0.

    Args:
        rest: The student's, of shape (..., 1).
    """
    if options.remainder == "ignore" or log_q.shape[-1] == classes:
        return log_p, log_q
    left = (1 - log_q.double().exp().sum(-1, keepdim=True)).clamp(min=0)
    return torch.cat((log_p, rest), -1), torch.cat((log_q, left.log().to(log_q.dtype)), -1)


def _reduced(each: Tensor, input: Tensor, options: DivergenceOptions) -> Tensor:
    weight, each = options.token_weight, each.to(accumulate_dtype(input.dtype))
    if weight is not None:
        each = (each * weight.to(each.dtype)).where(weight != 0, 0)
    if options.reduction == "none":
        return each
    counted = each.numel() if weight is None else weight.to(each.dtype).sum()
    denominator = denominator_of(options, counted)
    return each.sum() / torch.as_tensor(denominator, dtype=each.dtype, device=each.device)


# ---- the operator --------------------------------------------------------------------------------


@dataclass(eq=False, kw_only=True, repr=False)
class Divergence(RowLoss):
    """The divergence of a student's predictions from a teacher's.

    Attributes:
        kernels: The divergence of each row or their sum, and the gradients where they are wanted,
            of operands of two dimensions. Takes what `compute_rows` takes but for the state.
    """

    kernels: Callable[..., tuple[Tensor | None, Gradients]]
    options = DivergenceOptions
    strategy = "row by row"

    def bind(self, *_: Any, **by_name: Any) -> Arguments:
        dim, has_gradient = by_name.pop("dim", None), by_name.pop("teacher_requires_grad", False)
        tensors = [by_name.pop(operand.name, None) for operand in self.operands]
        if self.student == 1:
            named = zip(self.operands, tensors, strict=True)
            tensors = [checks.classes_at(-1, operand.name, x, dim) for operand, x in named]
        for index in range(self.student, 0 if has_gradient else len(tensors)):
            if isinstance(tensors[index], Tensor) and tensors[index].requires_grad:
                tensors[index] = tensors[index].detach()
        return *tensors, DivergenceOptions(**by_name)

    def check(self, arguments: Arguments) -> None:
        for operand, value in zip(self.operands, arguments, strict=False):
            if value is not None or not operand.optional:
                checks.tensor(operand.name, value)
        self.check_call(arguments)
        if self.operands[-2].indices:
            indices = arguments[-3]
            checks.topk_indices(indices.reshape(-1, indices.shape[-1]), len(arguments[1]))
            checks.topk_log_probs(_shown(arguments[-2], arguments[-1], -torch.inf))

    def check_call(self, arguments: Arguments) -> DivergenceOptions:
        self.check_arguments(*arguments)
        options = arguments[-1]
        numbers = {"beta": float(options.beta), "temperature": float(options.temperature)}
        numbered: DivergenceOptions = replace(options, **numbers)
        return numbered

    def arranged(self, arguments: Arguments) -> tuple[Any, ...]:
        *tensors, options = arguments
        token_weight, denominator = tensors_of(options)
        checks.values_of_options(token_weight, denominator)
        device = tensors[0].device.type
        for i, operand in enumerate(self.operands):
            if operand.name.endswith("input"):
                (tensors[i],) = in_autocast_dtype(device, tensors[i])
            if i in self.with_rows:
                tensors[i] = tensors[i].reshape(-1, tensors[i].shape[-1])
        return *tensors, None if token_weight is None else token_weight.flatten(), denominator

    def finished(self, results: Any, arguments: Arguments) -> Tensor:
        loss: Tensor = results[0]
        return loss.reshape(arguments[0].shape[:-1]) if loss.dim() else loss

    def counted(
        self, backend: Backend, tensors: Sequence[Any], options: DivergenceOptions
    ) -> tuple[Tensor | None, float | Tensor]:
        weight, n = options.token_weight, len(tensors[0])
        total = n if weight is None else weight.sum(dtype=torch.float64)
        if weight is None or self.student == 1:
            return None, total
        return counted_rows(weight, 0, backend), total

    def compute_rows(
        self,
        backend: Backend,
        tensors: Sequence[Any],
        options: DivergenceOptions,
        outputs: Outputs,
        grad_output: Tensor | None,
        state: Tensor | None,  # noqa: ARG002 there is none
    ) -> Results:
        loss, gradients = self.kernels(backend, tensors, options, outputs, grad_output)
        return loss, gradients if outputs.gradients else (), None


def fallback_reason(input: Tensor, *arguments: Any) -> str | None:
    """Returns why torch's operators are the ones for these arguments."""
    return options_fallback_reason(input, arguments[-1])


# ---- what the kernels compute --------------------------------------------------------------------


def of_logits(
    backend: Backend,
    tensors: Sequence[Any],
    options: DivergenceOptions,
    outputs: Outputs,
    grad_output: Tensor | None,
) -> tuple[Tensor | None, Gradients]:
    """Returns the divergence of logits, and the gradient of the student's."""
    logits, teacher_logits = tensors
    loss, gradient = _of_rows(backend, logits, teacher_logits, options, outputs, grad_output)
    return loss, (gradient,)


def _of_rows(
    backend: Backend,
    logits: Tensor,
    teacher_logits: Tensor,
    options: DivergenceOptions,
    outputs: Outputs,
    grad_output: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Returns the divergence of rows of logits, and their gradient; capped ones are not rounded."""
    student, uncapped = capped(backend, logits, options.softcap)
    teacher, _ = capped(backend, teacher_logits, options.teacher_softcap)
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    if student is not logits:
        outputs = outputs._replace(inplace=True)
    loss, (gradient,) = backend.kl_div_with_logits(
        student.to(dtype), teacher.to(dtype), options, outputs, grad_output
    )
    return loss, None if gradient is None else uncapped(gradient.to(student.dtype))


def of_layers(
    backend: Backend,
    tensors: Sequence[Any],
    options: DivergenceOptions,
    outputs: Outputs,
    grad_output: Tensor | None,
) -> tuple[Tensor | None, Gradients]:
    """Returns the divergence of a student's head from a teacher's, and the student's gradients."""
    *_, input, weight, bias = tensors
    teacher_dtype = backend.product_dtype(input.dtype)
    weight, bias = weight.to(teacher_dtype), None if bias is None else bias.to(teacher_dtype)

    def step(block: Block, *given: Any) -> tuple[Tensor | None, Tensor | None]:
        teacher_logits = backend.empty(block.logits.shape, teacher_dtype, block.logits)
        linear(input[block.rows].to(teacher_dtype), weight, bias, teacher_logits)
        return _of_rows(backend, block.logits, teacher_logits, *given)

    more_bytes = teacher_dtype.itemsize * (1 if options.teacher_softcap is None else 3)
    return _by_rows(backend, tensors, options, outputs, grad_output, step, more_bytes)


def of_topk(
    backend: Backend,
    tensors: Sequence[Any],
    options: DivergenceOptions,
    outputs: Outputs,
    grad_output: Tensor | None,
) -> tuple[Tensor | None, Gradients]:
    """Returns the divergence of a student's head from a teacher's top k, and the gradients."""
    _, weight, _, indices, log_probs = tensors
    wrong = checks.topk_indices(indices, len(weight))[:, None]
    checks.topk_log_probs(_shown(log_probs, options, -torch.inf))
    if backend.ASYNCHRONOUS:  # an error would synchronise: the loss of such a row is NaN
        log_probs, indices = log_probs.masked_fill(wrong, torch.nan), indices.masked_fill(wrong, 0)

    def step(
        block: Block, options: DivergenceOptions, outputs: Outputs, grad_output: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        logits, uncapped = capped(backend, block.logits, options.softcap)
        teacher = indices[block.rows], log_probs[block.rows]
        loss, gradient = _topk(backend, logits, *teacher, options, outputs, grad_output)
        return loss, None if gradient is None else uncapped(gradient)

    return _by_rows(backend, tensors, options, outputs, grad_output, step)


def _by_rows(
    backend: Backend,
    tensors: Sequence[Any],
    options: DivergenceOptions,
    outputs: Outputs,
    grad_output: Tensor | None,
    step: Callable[..., tuple[Tensor | None, Tensor | None]],
    more_bytes: int = 0,
) -> tuple[Tensor | None, Gradients]:
    """Returns the divergence and the gradients, from the student's logits of some rows at a time.

    Args:
        step: Takes a block, and the options, outputs and grad_output of its rows.
        more_bytes: What ``step`` needs beside each of the student's logits.
    """
    input, weight, bias, *_ = tensors
    n, dtype = len(input), backend.product_dtype(input.dtype)
    of_cap = 0 if options.softcap is None else 3 * accumulate_dtype(dtype).itemsize
    row = len(weight) * (dtype.itemsize + of_cap + more_bytes)
    rows = max(1, min(n, rows_in_budget(n, row, options.memory_budget, dtype, backend)))
    of_logits = Outputs(outputs.loss, (True,) if outputs.gradients else (), True)

    def of_block(block: Block, token_weight: Any, grad_output: Any) -> Any:
        return step(block, replace(options, token_weight=token_weight), of_logits, grad_output)

    layer, needed = Layer(_shown(input, options), weight, bias), outputs.gradients or (False,) * 3
    given = backend, layer, dtype, rows, needed, options, grad_output
    return loss_over_rows(*given, of_block)


def _topk(
    backend: Backend,
    logits: Tensor,
    indices: Tensor,
    log_q: Tensor,
    options: DivergenceOptions,
    outputs: Outputs,
    grad_output: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Returns the divergence of k + 1 classes, the last of which stands for all others.

    Of the gradient by their log-probabilities, g, and its sum s, the gradient by the logit of one
    of the k is g_c - s p_c, and of any other (g_rest - s p_rest) exp(x_c - lse_rest).
    """
    n, classes = logits.shape
    rows, among = RowOptions(scale=1 / options.temperature), ClassRange(0, classes)
    if logits.dtype is torch.float64:
        logits -= logits.amax(1, keepdim=True)  # a smaller log-sum-exp is rounded to less
    chosen = logits.gather(1, indices).double() * rows.scale
    logits.scatter_(1, indices, -torch.inf)
    state, _ = state_of_logits(backend, logits, rows, among)(logits, None)
    lse_rest = state[LSE]
    lse = torch.logaddexp(chosen.logsumexp(1), lse_rest)[:, None]
    log_p_rest = lse_rest[:, None] - lse
    log_p, log_q = _with_rest(chosen - lse, log_p_rest, log_q.double(), options, classes)
    each, weight = divergence(log_p, log_q, options.beta), options.token_weight
    if weight is not None:
        each = (each * weight).where(weight != 0, 0)
    loss = each if options.reduction == "none" else each.sum()
    if not outputs.gradients:
        return loss, None
    factor = torch.ones_like(each) if weight is None else weight
    if grad_output is not None:
        factor = (factor * grad_output).where(factor != 0, 0)
    p, k = log_p.exp(), indices.shape[1]
    slopes = _slopes(log_p, log_q, options.beta) * factor[:, None]
    slopes = slopes.where(factor[:, None] != 0, 0)
    total = slopes.sum(1, keepdim=True)
    of_rest = slopes[:, k:].sum(1) - (total * log_p_rest.exp()).squeeze(1)
    nothing = state[SUM] == 0  # by which no gradient is divided
    for field, value in ((PIVOT, 0), (ENTROPY, 0), (SUM, 1)):
        state[field].masked_fill_(nothing, value)
    grad_results = state.new_zeros(len(RESULTS), n)
    grad_results[LSE] = of_rest
    prepare = backend.row_gradients
    prepare(logits, rows, among, len(RESULTS))(logits, None, None, state, grad_results, logits)
    of_chosen = (slopes[:, :k] - total * p[:, :k]) * rows.scale
    logits.scatter_(1, indices, of_chosen.to(logits.dtype))
    return loss, logits
