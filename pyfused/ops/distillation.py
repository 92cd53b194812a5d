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
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pyfused import checks
from pyfused.backends import Backend, backend_of
from pyfused.layout import accumulate_dtype
from pyfused.ops import TORCH_OPS, definitions
from pyfused.ops.chunk_sizes import rows_in_budget
from pyfused.ops.chunked import (
    Chunk,
    Layer,
    LayerGradients,
    cap,
    chunks,
    counted_rows,
    joined,
    linear,
    of_all_rows,
    spread,
    uncap,
)
from pyfused.ops.cross_entropy import options_fallback_reason
from pyfused.ops.declaration import Arguments, Operator
from pyfused.ops.dispatch import is_compiled
from pyfused.ops.gradients import (
    apply,
    differentiate,
    gradients_in_forward,
    in_autocast_dtype,
    save,
    saved,
    wanted_in_forward,
)
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

LossAndGradients = tuple[Tensor | None, Gradients]  # the loss is not divided yet

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
class Divergence(Operator):
    """The divergence of a student's predictions from a teacher's.

    Attributes:
        student: How many of the operands are the student's: these come first and have gradients.
        kernels: The divergence of each row or their sum, and the gradients where they are wanted,
            of operands of two dimensions.
    """

    student: int
    kernels: Callable[..., LossAndGradients]

    def has_tokens(self, place: int) -> bool:
        """Returns whether an operand has a row for each token."""
        return "linear_" not in self.operands[place].name

    def bind(self, *_: Any, **by_name: Any) -> Arguments:
        dim, has_gradient = by_name.pop("dim", None), by_name.pop("teacher_requires_grad", False)
        tensors = [by_name.pop(operand.name, None) for operand in self.operands]
        if self.student == 1:
            named = zip(self.operands, tensors, strict=True)
            tensors = [checks.classes_at(-1, operand.name, x, dim) for operand, x in named]
        for place, tensor in enumerate(tensors):
            if place >= self.student and isinstance(tensor, Tensor) and tensor.requires_grad:
                tensors[place] = tensor if has_gradient else tensor.detach()
        return *tensors, DivergenceOptions(**by_name)

    def check(self, arguments: Arguments) -> None:
        for operand, value in zip(self.operands, arguments, strict=False):
            if value is not None or not operand.optional:
                checks.tensor(operand.name, value)
        getattr(checks, self.name)(*arguments)
        if self.operands[-2].indices:
            indices = arguments[-3]
            checks.topk_indices(indices.reshape(-1, indices.shape[-1]), len(arguments[1]))
            checks.topk_log_probs(_shown(arguments[-2], arguments[-1], -torch.inf))

    def strategy(self, input: Tensor) -> str:  # noqa: ARG002
        return "row by row" if self.student == 1 else "some logits at a time"

    def fused(self, arguments: Arguments, inplace: bool) -> Tensor:  # noqa: ARG002
        getattr(checks, self.name)(*arguments)
        *tensors, options = arguments
        shape, device = tensors[0].shape[:-1], tensors[0].device.type
        inputs = [place for place, o in enumerate(self.operands) if o.name.endswith("input")]
        without_autocast, cast = in_autocast_dtype(device, [tensors[place] for place in inputs])
        for place, tensor in zip(inputs, cast, strict=True):
            tensors[place] = tensor
        tensors = [
            tensor.reshape(-1, tensor.shape[-1]) if self.has_tokens(place) else tensor
            for place, tensor in enumerate(tensors)
        ]
        weight = options.token_weight
        options = replace(
            options,
            beta=float(options.beta),
            temperature=float(options.temperature),
            token_weight=None if weight is None else weight.flatten(),
        )
        with without_autocast:
            loss = self._run(tensors, options)
        return loss.reshape(shape) if options.reduction == "none" else loss

    def _run(self, tensors: Sequence[Any], options: DivergenceOptions) -> Tensor:
        grad = torch.is_grad_enabled()
        needs = [grad and t is not None and t.requires_grad for t in tensors[: self.student]]
        if is_compiled(tensors[0]):
            operator = getattr(TORCH_OPS, self.name)
            wanted = wanted_in_forward(options.reduction, tensors[: self.student])
            loss: Tensor | None = operator(*tensors, *options.values(), wanted)[0]
        elif any(needs):
            plan = DivergencePlan(self, self.name, backend_of(tensors[0]), tuple(needs))
            loss = apply(plan, *tensors, options)
        else:
            loss, _ = self.compute(tensors, options, Outputs())
        assert loss is not None
        return loss

    def read(self, given: Arguments) -> tuple[Arguments, DivergenceOptions]:
        """Returns the arguments of the custom operator."""
        count = len(self.operands)
        return given[:count], DivergenceOptions(*given[count:])

    def compute(
        self,
        tensors: Sequence[Any],
        options: DivergenceOptions,
        outputs: Outputs,
        grad_output: Tensor | None = None,
    ) -> LossAndGradients:
        input, weight, each = tensors[0], options.token_weight, options.reduction == "none"
        backend, n, kept = backend_of(input), len(input), None
        counted = n if weight is None else weight.sum(dtype=torch.float64)
        denominator = denominator_of(options, counted)
        if not each and outputs.gradients:
            if grad_output is None:
                grad_output = input.new_ones((), dtype=torch.float64)
            grad_output = grad_output / denominator
        if weight is not None and self.student > 1:
            # Tokens of weight 0 are left out, where nobody waits for that.
            kept = counted_rows(weight, 0, backend)
            if kept is None:
                tensors = [_shown(input, options), *tensors[1:]]
            else:
                places = enumerate(tensors)
                tensors = [x[kept] if self.has_tokens(place) else x for place, x in places]
                options = replace(options, token_weight=weight[kept])
                grad_output = grad_output[kept] if each and grad_output is not None else grad_output
        loss, gradients = self.kernels(backend, tensors, options, outputs, grad_output)
        if loss is not None:
            loss = spread(loss, kept, n) if each else loss / denominator
            loss = loss.to(accumulate_dtype(input.dtype))
        return loss, of_all_rows(gradients, kept, n)

    def define(
        self,
        tensors: Sequence[Any],
        options: DivergenceOptions,
        wanted: Sequence[bool],
        grad_output: Tensor,
    ) -> Gradients:
        """Returns the gradients in torch's own terms, themselves differentiable."""
        teacher = tensors[self.student :]

        def definition(*student: Any) -> Tensor:
            return self.reference(*student, *teacher, options)

        return differentiate(definition, tensors[: self.student], wanted, grad_output)


def fallback_reason(input: Tensor, *arguments: Any) -> str | None:
    """Returns why torch's operators are the ones for these arguments."""
    return options_fallback_reason(input, arguments[-1])


class DivergencePlan(NamedTuple):
    """Computes calls that need gradients: those of a scalar in the forward pass."""

    op: Divergence
    name: str
    backend: Backend
    needs: tuple[bool, ...]

    def forward(self, ctx: Any, arguments: Sequence[Any]) -> Any:
        *tensors, options = arguments
        now = gradients_in_forward(options.reduction, tensors[0])
        outputs = Outputs(True, self.needs if now else ())
        loss, gradients = self.op.compute(tensors, options, outputs)
        ctx.gradients = gradients if now else None
        save(ctx, options, *tensors)
        return loss

    def backward(self, ctx: Any, grad_output: Tensor) -> Gradients:
        return self.op.compute(*saved(ctx), Outputs(False, self.needs), grad_output)[1]

    def define(self, ctx: Any, grad_output: Tensor) -> Gradients:
        return self.op.define(*saved(ctx), self.needs, grad_output)


# ---- what the kernels compute --------------------------------------------------------------------


def of_logits(
    backend: Backend,
    tensors: Sequence[Tensor],
    options: DivergenceOptions,
    outputs: Outputs,
    grad_output: Tensor | None,
) -> LossAndGradients:
    of_capped = partial(_of_capped, backend, tensors[1])
    return _capped(backend, tensors[0], of_capped, options, outputs, grad_output)


def _capped(
    backend: Backend,
    logits: Tensor,
    of_capped: Callable[..., LossAndGradients],
    options: DivergenceOptions,
    outputs: Outputs,
    grad_output: Tensor | None,
) -> LossAndGradients:
    """Returns the divergence, and the gradient of the logits, given those of capped logits."""
    if options.softcap is None:
        return of_capped(logits, options, outputs, grad_output)
    wide = logits.to(accumulate_dtype(logits.dtype))  # capped logits are not rounded
    capped, outputs = cap(backend, wide, options.softcap), outputs._replace(inplace=True)
    loss, (gradient,) = of_capped(capped, options, outputs, grad_output)
    if gradient is not None:
        gradient = uncap(backend, gradient, wide, options.softcap).to(logits.dtype)
    return loss, (gradient,)


def _of_capped(
    backend: Backend,
    teacher: Tensor,
    logits: Tensor,
    options: DivergenceOptions,
    outputs: Outputs,
    grad_output: Tensor | None,
) -> LossAndGradients:
    if options.teacher_softcap is not None:
        wide = teacher.to(accumulate_dtype(teacher.dtype))
        teacher = cap(backend, wide, options.teacher_softcap)
    dtype = torch.promote_types(logits.dtype, teacher.dtype)
    given = logits.to(dtype), teacher.to(dtype), options, outputs, grad_output
    loss, (gradient,) = backend.kl_div_with_logits(*given)
    return loss, (None if gradient is None else gradient.to(logits.dtype),)


def of_layers(
    backend: Backend,
    tensors: Sequence[Any],
    options: DivergenceOptions,
    outputs: Outputs,
    grad_output: Tensor | None,
) -> LossAndGradients:
    *layer, teacher_input, weight, bias = tensors
    dtype = backend.product_dtype(teacher_input.dtype)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)

    def of_chunk(logits: Tensor, here: slice, *rest: Any) -> LossAndGradients:
        teacher_logits = backend.empty(logits.shape, dtype, logits)
        linear(teacher_input[here].to(dtype), weight, bias, teacher_logits)
        return _of_capped(backend, teacher_logits, logits, *rest)

    more_bytes = dtype.itemsize + (0 if options.teacher_softcap is None else 2 * dtype.itemsize)
    return _by_rows(backend, Layer(*layer), of_chunk, more_bytes, options, outputs, grad_output)


def of_topk(
    backend: Backend,
    tensors: Sequence[Any],
    options: DivergenceOptions,
    outputs: Outputs,
    grad_output: Tensor | None,
) -> LossAndGradients:
    *layer, indices, log_probs = tensors
    wrong = checks.topk_indices(indices, len(layer[1]))[:, None]
    checks.topk_log_probs(_shown(log_probs, options, -torch.inf))
    if backend.ASYNCHRONOUS:  # nobody waits for an error: the loss of such a row is NaN
        log_probs, indices = log_probs.masked_fill(wrong, torch.nan), indices.masked_fill(wrong, 0)

    def of_chunk(logits: Tensor, here: slice, *rest: Any) -> LossAndGradients:
        return _topk(backend, logits, indices[here], log_probs[here], *rest)

    return _by_rows(backend, Layer(*layer), of_chunk, 0, options, outputs, grad_output)


def _by_rows(
    backend: Backend,
    layer: Layer,
    of_chunk: Callable[..., LossAndGradients],
    more_bytes: int,
    options: DivergenceOptions,
    outputs: Outputs,
    grad_output: Tensor | None,
) -> LossAndGradients:
    """Returns the divergence and the gradients, from the student's logits of some rows at a time.

    Args:
        of_chunk: From logits, the rows they are of, and options, Outputs and grad_output of these,
            the divergence and the logits' gradient, which may take their memory.
        more_bytes: What it needs beside each logit.
    """
    n, columns, each = len(layer.input), len(layer.weight), options.reduction == "none"
    dtype = backend.product_dtype(layer.input.dtype)
    capped = 0 if options.softcap is None else 3 * accumulate_dtype(dtype).itemsize
    row = columns * (dtype.itemsize + capped + more_bytes)
    size = max(1, min(n, rows_in_budget(n, row, options.memory_budget, dtype, backend)))
    wanted, weight = outputs.gradients or (False,) * 3, options.token_weight
    outputs = Outputs(outputs.loss, (True,) if any(wanted) else (), True)
    gradients = LayerGradients(backend, layer, dtype, (size, columns), wanted)

    def add(chunk: Chunk) -> Tensor | None:
        here = chunk.rows
        part = replace(options, token_weight=None if weight is None else weight[here])
        factor = grad_output[here] if each and grad_output is not None else grad_output

        def of_capped(logits: Tensor, *rest: Any) -> LossAndGradients:
            return of_chunk(logits, here, *rest)

        loss, (gradient,) = _capped(backend, chunk.output, of_capped, part, outputs, factor)
        if gradient is not None:
            gradients.add(chunk, gradient)
        return loss

    losses = [add(chunk) for chunk in chunks(backend, layer, dtype, (size, columns))]
    return joined(losses, each), gradients.like(layer)


def _topk(
    backend: Backend,
    logits: Tensor,
    indices: Tensor,
    log_q: Tensor,
    options: DivergenceOptions,
    outputs: Outputs,
    grad_output: Tensor | None,
) -> LossAndGradients:
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
    state = state_of_logits(backend, logits, None, rows, among)
    lse_rest = state[LSE]
    lse = torch.logaddexp(chosen.logsumexp(1), lse_rest)[:, None]
    log_p_rest = lse_rest[:, None] - lse
    log_p, log_q = _with_rest(chosen - lse, log_p_rest, log_q.double(), options, classes)
    each, weight = divergence(log_p, log_q, options.beta), options.token_weight
    if weight is not None:
        each = (each * weight).where(weight != 0, 0)
    loss = each if options.reduction == "none" else each.sum()
    if not outputs.gradients:
        return loss, (None,)
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
    backend.row_gradients(logits, None, rows, state, grad_results, among, logits)
    of_chosen = (slopes[:, :k] - total * p[:, :k]) * rows.scale
    logits.scatter_(1, indices, of_chosen.to(logits.dtype))
    return loss, (logits,)
