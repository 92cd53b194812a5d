"""Losses that compare input and target element by element: one formula each.

    loss       = reduce(w f(x, t)),  reduce: each, or sum / denominator
    dloss/dx   = u w df/dx,          dloss/dt = u w df/dt,   u = upstream gradient / denominator

Some formulas have a third operand. Shapes: operands, w and u are of one shape, seen as rows x
columns with strides; outputs are dense. Bytes: operands (and w, where given) are read once, the
gradients that are wanted written once.

A formula takes its operands, three parameters of which it names its own, and for gradients `scale`,
1 / denominator: so they are divided before they can overflow.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import launch
from .arithmetic import (
    Operand,
    exp,
    exp_nonpositive,
    log,
    log1p,
    log_of_1_plus,
    reach,
    read,
    reciprocal,
    sigmoid,
    tanh,
)
from .sums import Total, add_up, total

# ---- formulas ------------------------------------------------------------------------------------


@triton.jit
def mse_loss(x, t, _p, _q, _r):
    """torch: F.mse_loss(x, t)."""
    return (x - t) * (x - t)


@triton.jit
def mse_loss_gradients(x, t, _p, _q, _r, scale):
    gradient = 2.0 * scale * (x - t)
    return gradient, -gradient


@triton.jit
def smooth_l1_loss(x, t, beta, _q, _r):
    """torch: F.smooth_l1_loss(x, t, beta=beta); F.l1_loss(x, t) where beta is 0."""
    distance = tl.abs(x - t)
    return tl.where(distance < beta, 0.5 * distance * (distance / beta), distance - 0.5 * beta)


@triton.jit
def smooth_l1_loss_gradients(x, t, beta, _q, _r, scale):
    """Of NaN: NaN, but 0 where beta is 0."""
    d = x - t
    rest = tl.where(beta > 0.0, scale * d, 0.0)
    sign = tl.where(d > 0.0, scale, tl.where(d < 0.0, -scale, rest))
    distance = tl.abs(d)
    gradient = tl.where(distance < beta, sign * (distance / beta), sign)
    return gradient, -gradient


@triton.jit
def l1_loss(x, t, _p, _q, _r):
    """torch: F.l1_loss(x, t)."""
    return tl.abs(x - t)


@triton.jit
def l1_loss_gradients(x, t, _p, _q, _r, scale):
    gradient = tl.where(x > t, scale, tl.where(x < t, -scale, 0.0))
    return gradient, -gradient


@triton.jit
def huber_loss(x, t, delta, _q, _r):
    """torch: F.huber_loss(x, t, delta=delta)."""
    size = tl.abs(x - t)
    return tl.where(size < delta, 0.5 * size * size, delta * (size - 0.5 * delta))


@triton.jit
def huber_loss_gradients(x, t, delta, _q, _r, scale):
    d = x - t
    most = scale * delta
    gradient = tl.where(d <= -delta, -most, tl.where(d >= delta, most, scale * d))
    return gradient, -gradient


@triton.jit
def log_sigmoid(x):
    return tl.where(x < 0.0, x, 0.0) - log1p(exp_nonpositive(-tl.abs(x)))


@triton.jit
def soft_margin_loss(x, t, _p, _q, _r):
    """torch: F.soft_margin_loss(x, t). Where torch's exp(-t x) overflows, this does not."""
    return -log_sigmoid(t * x)


@triton.jit
def soft_margin_loss_gradients(x, t, _p, _q, _r, scale):
    return -t * sigmoid(-t * x) * scale, None


@triton.jit
def hinge_embedding_loss(x, t, margin, _q, _r):
    """torch: F.hinge_embedding_loss(x, t, margin). A target not of 1 and -1 counts as both."""
    far = margin - x
    unlike = tl.where(t != 1.0, tl.where(far < 0.0, 0.0, far), 0.0)
    return unlike + tl.where(t != -1.0, x, 0.0)


@triton.jit
def hinge_embedding_loss_gradients(x, t, margin, _q, _r, scale):
    unlike = tl.where((t != 1.0) & (margin - x >= 0.0), -scale, 0.0)
    return unlike + tl.where(t != -1.0, scale, 0.0), None


@triton.jit
def margin_ranking_loss(x, other, y, margin, _q, _r):
    """torch: F.margin_ranking_loss(x, other, y, margin)."""
    slack = -y * (x - other) + margin
    return tl.where(slack < 0.0, 0.0, slack)


@triton.jit
def margin_ranking_loss_gradients(x, other, y, margin, _q, _r, scale):
    factor = tl.where(-y * (x - other) + margin >= 0.0, scale, 0.0)
    return -y * factor, y * factor, (other - x) * factor


@triton.jit
def stirling(t):
    """Stirling's approximation of log(t!), from 1 on."""
    log_t = log(t)
    return tl.where(t <= 1.0, 0.0, t * log_t - t + 0.5 * (1.8378770664093453 + log_t))


@triton.jit
def stirling_slope(t):
    return tl.where(t <= 1.0, 0.0, log(t) + 0.5 / t)


@triton.jit
def poisson_nll_loss(x, t, eps, _q, _r):
    """torch: F.poisson_nll_loss(x, t, log_input=False, eps=eps)."""
    return x - t * log(x + eps)


@triton.jit
def poisson_nll_loss_gradients(x, t, eps, _q, _r, scale):
    return scale * (1.0 - t / (x + eps)), -scale * log(x + eps)


@triton.jit
def poisson_nll_loss_full(x, t, eps, _q, _r):
    """torch: F.poisson_nll_loss(x, t, log_input=False, full=True, eps=eps)."""
    return x - t * log(x + eps) + stirling(t)


@triton.jit
def poisson_nll_loss_full_gradients(x, t, eps, _q, _r, scale):
    return scale * (1.0 - t / (x + eps)), scale * (stirling_slope(t) - log(x + eps))


@triton.jit
def poisson_nll_loss_log_input(x, t, _eps, _q, _r):
    """torch: F.poisson_nll_loss(x, t)."""
    return exp(x) - t * x


@triton.jit
def poisson_nll_loss_log_input_gradients(x, t, _eps, _q, _r, scale):
    return scale * (exp(x) - t), -scale * x


@triton.jit
def poisson_nll_loss_log_input_full(x, t, _eps, _q, _r):
    """torch: F.poisson_nll_loss(x, t, full=True)."""
    return exp(x) - t * x + stirling(t)


@triton.jit
def poisson_nll_loss_log_input_full_gradients(x, t, _eps, _q, _r, scale):
    return scale * (exp(x) - t), scale * (stirling_slope(t) - x)


@triton.jit
def kl_div(x, t, _p, _q, _r):
    """torch: F.kl_div(x, t)."""
    return tl.where(t == 0.0, 0.0, t * log(t)) - t * x


@triton.jit
def kl_div_gradients(x, t, _p, _q, _r, scale):
    return -t * scale, scale * (log(t) + t / t - x)


@triton.jit
def kl_div_log_target(x, t, _p, _q, _r):
    """torch: F.kl_div(x, t, log_target=True)."""
    return exp(t) * (t - x)


@triton.jit
def kl_div_log_target_gradients(x, t, _p, _q, _r, scale):
    e = exp(t)
    return -e * scale, (e * (t - x) + e) * scale


@triton.jit
def bounded(log):
    return tl.where(log < -100.0, -100.0, log)


@triton.jit
def binary_cross_entropy(x, t, _p, _q, _r):
    """torch: F.binary_cross_entropy(x, t). A logarithm is -100 at least; NaN of no probability."""
    loss = (t - 1.0) * bounded(log_of_1_plus(-x)) - t * bounded(log(x))
    return tl.where((t >= 0.0) & (t <= 1.0), loss, float("nan"))


@triton.jit
def binary_cross_entropy_gradients(x, t, _p, _q, _r, scale):
    variance = (1.0 - x) * x
    variance = tl.where(variance < 1e-12, 1e-12, variance)
    return scale * (x - t) * reciprocal(variance), scale * (log_of_1_plus(-x) - log(x))


@triton.jit
def binary_cross_entropy_with_logits(x, t, _p, _q, _r):
    """torch: F.binary_cross_entropy_with_logits(x, t)."""
    return (1.0 - t) * x - log_sigmoid(x)


@triton.jit
def binary_cross_entropy_with_logits_gradients(x, t, _p, _q, _r, scale):
    return scale * (sigmoid(x) - t), -scale * x


@triton.jit
def binary_cross_entropy_with_logits_pos_weight(x, t, pos_weight, _p, _q, _r):
    """The same with pos_weight, which gets no gradient."""
    return (1.0 - t) * x - (1.0 + (pos_weight - 1.0) * t) * log_sigmoid(x)


@triton.jit
def binary_cross_entropy_with_logits_pos_weight_gradients(x, t, pos_weight, _p, _q, _r, scale):
    positive = pos_weight * t
    grad_x = scale * ((positive + 1.0 - t) * sigmoid(x) - positive)
    grad_t = scale * (log_sigmoid(-x) - pos_weight * log_sigmoid(x))
    return grad_x, grad_t, None


@triton.jit
def gaussian_nll_loss(x, t, var, full, eps, _r):
    """torch: F.gaussian_nll_loss(x, t, var, full, eps)."""
    variance = tl.where(var < eps, eps, var)
    constant = tl.where(full != 0.0, tl.full([], 0.9189385332046727, x.dtype), 0.0)
    return 0.5 * (log(variance) + (x - t) * (x - t) / variance) + constant


@triton.jit
def gaussian_nll_loss_gradients(x, t, var, _full, eps, _r, scale):
    """As in torch the clamp passes the gradient of var."""
    variance = tl.where(var < eps, eps, var)
    d = x - t
    grad_x = 2.0 * d * (0.5 * scale / variance)  # overflows where torch's does
    grad_var = (variance - d * d) / variance / variance * (0.5 * scale)
    return grad_x, -grad_x, grad_var


@triton.jit
def quantile_loss(x, t, q, _q, _r):
    """The larger of q (t - x) and (q - 1) (t - x); as torch.maximum, half of each where equal."""
    return (t - x) * tl.where(t < x, q - 1.0, q)


@triton.jit
def quantile_loss_gradients(x, t, q, _q, _r, scale):
    d = t - x
    equal = tl.where(d == 0.0, 0.5 - q, 1.0 - 2.0 * q)  # of NaN both, as of torch.maximum
    gradient = scale * tl.where(d > 0.0, -q, tl.where(d < 0.0, 1.0 - q, equal))
    return gradient, -gradient


@triton.jit
def log_cosh_loss(x, t, _p, _q, _r):
    """log(cosh(d)) = |d| + softplus(-2 |d|) - log(2), d = x - t."""
    size = tl.abs(x - t)
    return size + (log1p(exp_nonpositive(-2.0 * size)) - 0.6931471805599453)


@triton.jit
def log_cosh_loss_gradients(x, t, _p, _q, _r, scale):
    gradient = scale * tanh(x - t)
    return gradient, -gradient


@triton.jit
def hinge_loss(x, t, margin, _q, _r):
    """max(0, margin - t x)"""
    slack = margin - t * x
    return tl.where(slack < 0.0, 0.0, slack)


@triton.jit
def hinge_loss_gradients(x, t, margin, _q, _r, scale):
    return -t * tl.where(margin - t * x >= 0.0, scale, 0.0), None


@triton.jit
def hinge_loss_squared(x, t, margin, _q, _r):
    slack = hinge_loss(x, t, margin, _q, _r)
    return slack * slack


@triton.jit
def hinge_loss_squared_gradients(x, t, margin, _q, _r, scale):
    slack = margin - t * x
    return -t * tl.where(slack >= 0.0, 2.0 * scale * slack, 0.0), None


@triton.jit
def focal_factor(t, alpha, ignored):
    factor = tl.where(alpha < 0.0, 1.0, alpha * t + (1.0 - alpha) * (1.0 - t))
    return tl.where(t == ignored, 0.0, factor)


@triton.jit
def focal_power(u, gamma):
    power = u * u
    if gamma != 2.0:
        power = tl.where(gamma == 0.0, 1.0, exp(gamma * log(u)))
    return power


@triton.jit
def sigmoid_focal_loss(x, t, alpha, gamma, ignored):
    """As torchvision's, with p = sigmoid(x) and u = p (1 - t) + (1 - p) t, what is missing:
    (alpha t + (1 - alpha) (1 - t)) u^gamma ((1 - t) x + softplus(-x)).
    """
    u = sigmoid(x) * (1.0 - t) + sigmoid(-x) * t
    loss = ((1.0 - t) * x - log_sigmoid(x)) * focal_power(u, gamma)
    return focal_factor(t, alpha, ignored) * loss


@triton.jit
def sigmoid_focal_loss_gradients(x, t, alpha, gamma, ignored, scale):
    p, q = sigmoid(x), sigmoid(-x)
    u = p * (1.0 - t) + q * t
    ratio = tl.where(u > 0.0, p * q / u, 1.0)
    loss = (1.0 - t) * x - log_sigmoid(x)
    slope = (p - t) + gamma * loss * ratio * (1.0 - 2.0 * t)
    return focal_factor(t, alpha, ignored) * scale * (focal_power(u, gamma) * slope), None


class Formula(NamedTuple):
    value: Any
    gradients: Any


FORMULAS = {
    "mse_loss": Formula(mse_loss, mse_loss_gradients),
    "smooth_l1_loss": Formula(smooth_l1_loss, smooth_l1_loss_gradients),
    "l1_loss": Formula(l1_loss, l1_loss_gradients),
    "huber_loss": Formula(huber_loss, huber_loss_gradients),
    "soft_margin_loss": Formula(soft_margin_loss, soft_margin_loss_gradients),
    "hinge_embedding_loss": Formula(hinge_embedding_loss, hinge_embedding_loss_gradients),
    "poisson_nll_loss": Formula(poisson_nll_loss, poisson_nll_loss_gradients),
    "poisson_nll_loss_full": Formula(poisson_nll_loss_full, poisson_nll_loss_full_gradients),
    "poisson_nll_loss_log_input": Formula(
        poisson_nll_loss_log_input, poisson_nll_loss_log_input_gradients
    ),
    "poisson_nll_loss_log_input_full": Formula(
        poisson_nll_loss_log_input_full, poisson_nll_loss_log_input_full_gradients
    ),
    "kl_div": Formula(kl_div, kl_div_gradients),
    "kl_div_log_target": Formula(kl_div_log_target, kl_div_log_target_gradients),
    "margin_ranking_loss": Formula(margin_ranking_loss, margin_ranking_loss_gradients),
    "quantile_loss": Formula(quantile_loss, quantile_loss_gradients),
    "log_cosh_loss": Formula(log_cosh_loss, log_cosh_loss_gradients),
    "hinge_loss": Formula(hinge_loss, hinge_loss_gradients),
    "hinge_loss_squared": Formula(hinge_loss_squared, hinge_loss_squared_gradients),
    "sigmoid_focal_loss": Formula(sigmoid_focal_loss, sigmoid_focal_loss_gradients),
    "binary_cross_entropy": Formula(binary_cross_entropy, binary_cross_entropy_gradients),
    "binary_cross_entropy_with_logits": Formula(
        binary_cross_entropy_with_logits, binary_cross_entropy_with_logits_gradients
    ),
    "binary_cross_entropy_with_logits_pos_weight": Formula(
        binary_cross_entropy_with_logits_pos_weight,
        binary_cross_entropy_with_logits_pos_weight_gradients,
    ),
    "gaussian_nll_loss": Formula(gaussian_nll_loss, gaussian_nll_loss_gradients),
}


# ---- all of them ---------------------------------------------------------------------------------


class Operands(NamedTuple):
    variables: tuple[Operand, ...]  # the formula's operands
    weight: Operand | None
    upstream: Operand | None  # the loss's gradient; None stands for ones
    parameters: tuple[torch.Tensor | None, ...]  # three, each of one element, or None for a number
    denominator: torch.Tensor | None  # of one element, beside what `scale` holds


class Outputs(NamedTuple):
    """None where not wanted."""

    each: torch.Tensor | None
    total: Total | None
    gradients: tuple[torch.Tensor | None, ...]  # one for each operand


@triton.jit
def parameter(tensor, number, A: tl.constexpr):
    """The number, or what only the GPU knows."""
    value = tl.full([], number, A)
    if tensor is not None:
        value = tl.load(tensor).to(A)
    return value


@triton.jit(do_not_specialize=["blocks"])
def pointwise_loss_kernel(
    operands,
    outputs,
    n,
    blocks,
    columns,
    scale: tl.float64,
    p: tl.float64,
    q: tl.float64,
    r: tl.float64,
    VALUE: tl.constexpr,
    GRADIENTS: tl.constexpr,
    A: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Blocks of elements by turns, so that a program leaves one part of the sum."""
    program = tl.program_id(0)
    factor = tl.full([], scale, A)
    if operands.denominator is not None:
        factor /= tl.load(operands.denominator).to(A)
    p = parameter(operands.parameters[0], p, A)
    q = parameter(operands.parameters[1], q, A)
    r = parameter(operands.parameters[2], r, A)
    fours = tl.zeros([BLOCK // 4], A)  # of elements side by side: one register for what a lane has
    for block in range(program.to(INDEX), blocks, tl.num_programs(0)):
        i = block * BLOCK + tl.arange(0, BLOCK)
        mask = i < n
        x = read(operands.variables[0], i, columns, mask, A)
        t = read(operands.variables[1], i, columns, mask, A)
        if len(operands.variables) == 2:
            value = VALUE(x, t, p, q, r)
            gradients = GRADIENTS(x, t, p, q, r, factor)
        else:
            third = read(operands.variables[2], i, columns, mask, A)
            value = VALUE(x, t, third, p, q, r)
            gradients = GRADIENTS(x, t, third, p, q, r, factor)
        if operands.weight is not None:
            weight = read(operands.weight, i, columns, mask, A)
            value *= weight
        if operands.upstream is not None:
            upstream = read(operands.upstream, i, columns, mask, A)
        if outputs.total is not None:
            counted = tl.where(mask, value, 0.0)
            fours += tl.sum(tl.reshape(counted, [BLOCK // 4, 4]), 1)
        if outputs.each is not None:
            tl.store(outputs.each + i, value, mask=mask)
        for k in tl.static_range(len(outputs.gradients)):
            if outputs.gradients[k] is not None:
                gradient = gradients[k]
                if operands.weight is not None:
                    gradient *= weight
                if operands.upstream is not None:
                    gradient *= upstream
                tl.store(outputs.gradients[k] + i, gradient, mask=mask)
    if outputs.total is not None:
        add_up(outputs.total, program, tl.sum(fours), scale, operands.denominator)


def pointwise_loss(
    formula: str,
    columns: int | None,
    operands: list[tuple[torch.Tensor, int, int] | None],
    parameters: tuple[float | torch.Tensor, ...],
    denominator: float | torch.Tensor,
    each: torch.Tensor | None,
    loss: torch.Tensor | None,
    gradients: tuple[torch.Tensor | None, ...],
) -> None:
    """Launches what the outputs that are not None take.

    operands: the formula's, the weight and the upstream gradient, as in `Operand` or None.
    """
    *variables, weight, upstream = (o and Operand(*o) for o in operands)
    x = operands[0][0]
    elements = launch.POINTWISE[x.element_size()]
    programs = blocks = launch.cdiv(x.numel(), elements.block)
    known = not isinstance(denominator, torch.Tensor)
    scale, counted = (1 / denominator, None) if known else (1.0, denominator)
    three = (*parameters, 0.0, 0.0, 0.0)[:3]
    tensors = tuple(p if isinstance(p, torch.Tensor) else None for p in three)
    numbers = (0.0 if isinstance(p, torch.Tensor) else float(p) for p in three)
    if loss is not None:
        programs = min(blocks, launch.MOST_PROGRAMS)
    pointwise_loss_kernel[(programs,)](
        Operands(tuple(variables), weight, upstream, tensors, counted),
        Outputs(each, None if loss is None else total(loss, programs), gradients),
        x.numel(),
        blocks,
        columns,
        scale,
        *numbers,
        *FORMULAS[formula],
        A=launch.accumulate_type(x.dtype),
        INDEX=launch.index_type(*reach(columns, operands)),
        BLOCK=elements.block,
        **launch.options(elements.threads),
    )
