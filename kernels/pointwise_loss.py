"""Losses that compare input and target element by element: one formula each.

    loss   = reduce(w f(x, t)),       reduce: each element, or the sum / denominator
    grad_x = g w df/dx,               g = grad_output, / denominator
    grad_t = g w df/dt

Shapes: all of one shape. Operands may be strided or broadcast, outputs are dense.
Bytes: each operand and w are read once, each gradient that is wanted is written once.

A formula maps the operands, three parameters p, q and r, and scale = 1 / denominator to the loss
and the gradients, 0.0 for an operand that has none; the compiler drops what the kernel does not
store. It multiplies by scale before anything that may overflow.

torch: (w * F.mse_loss(x, t, reduction="none")).sum() / denominator
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import exp, log, log1p, read, reciprocal, sigmoid, softplus_nonpositive, tanh

# ---- formulas ------------------------------------------------------------------------------------


@triton.jit
def mse_loss(x, t, _p, _q, _r, scale):
    """torch: F.mse_loss(x, t)"""
    d = x - t
    gradient = 2.0 * scale * d
    return d * d, gradient, -gradient


@triton.jit
def smooth_l1_loss(x, t, beta, _q, _r, scale):
    """torch: F.smooth_l1_loss(x, t, beta=beta)

    It is F.l1_loss where beta is 0. The gradient of NaN is NaN, but 0 where beta is 0.
    """
    d = x - t
    size = tl.abs(d)
    ratio = size / beta
    loss = tl.where(size < beta, 0.5 * size * ratio, size - 0.5 * beta)
    rest = tl.where(beta > 0.0, scale * d, 0.0)
    sign = tl.where(d > 0.0, scale, tl.where(d < 0.0, -scale, rest))
    gradient = tl.where(size < beta, sign * ratio, sign)
    return loss, gradient, -gradient


@triton.jit
def l1_loss(x, t, _p, _q, _r, scale):
    """torch: F.l1_loss(x, t)"""
    gradient = tl.where(x > t, scale, tl.where(x < t, -scale, 0.0))
    return tl.abs(x - t), gradient, -gradient


@triton.jit
def huber_loss(x, t, delta, _q, _r, scale):
    """torch: F.huber_loss(x, t, delta=delta)"""
    d = x - t
    size = tl.abs(d)
    loss = tl.where(size < delta, 0.5 * size * size, delta * (size - 0.5 * delta))
    most = scale * delta
    gradient = tl.where(d <= -delta, -most, tl.where(d >= delta, most, scale * d))
    return loss, gradient, -gradient


@triton.jit
def log_sigmoid(x):
    return tl.where(x < 0.0, x, 0.0) - softplus_nonpositive(-tl.abs(x))


@triton.jit
def soft_margin_loss(x, t, _p, _q, _r, scale):
    """torch: F.soft_margin_loss(x, t), whose exp(-t x) overflows"""
    return -log_sigmoid(t * x), -t * sigmoid(-t * x) * scale, 0.0


@triton.jit
def hinge_embedding_loss(x, t, margin, _q, _r, scale):
    """torch: F.hinge_embedding_loss(x, t, margin), where t that is neither 1 nor -1 is both"""
    slack = margin - x
    loss = tl.where(t != 1.0, tl.where(slack < 0.0, 0.0, slack), 0.0)
    gradient = tl.where((t != 1.0) & (slack >= 0.0), -scale, 0.0)
    return loss + tl.where(t != -1.0, x, 0.0), gradient + tl.where(t != -1.0, scale, 0.0), 0.0


@triton.jit
def margin_ranking_loss(x, other, y, margin, _q, _r, scale):
    """torch: F.margin_ranking_loss(x, other, y, margin)"""
    slack = -y * (x - other) + margin
    factor = tl.where(slack >= 0.0, scale, 0.0)
    return tl.where(slack < 0.0, 0.0, slack), -y * factor, y * factor, (other - x) * factor


@triton.jit
def poisson_nll_loss(x, t, eps, _q, _r, scale):
    """torch: F.poisson_nll_loss(x, t, log_input=False, eps=eps)"""
    log_rate = log(x + eps)
    return x - t * log_rate, scale * (1.0 - t / (x + eps)), -scale * log_rate


@triton.jit
def poisson_nll_loss_log_input(x, t, _p, _q, _r, scale):
    """torch: F.poisson_nll_loss(x, t)"""
    rate = exp(x)
    return rate - t * x, scale * (rate - t), -scale * x


@triton.jit
def stirling(t):
    """Stirling's approximation of log(t!) and its derivative, from t = 1 on."""
    log_t = log(t)
    value = t * log_t - t + 0.5 * (1.8378770664093453 + log_t)  # log(2 pi)
    return tl.where(t <= 1.0, 0.0, value), tl.where(t <= 1.0, 0.0, log_t + 0.5 / t)


@triton.jit
def poisson_nll_loss_full(x, t, eps, _q, _r, scale):
    """torch: F.poisson_nll_loss(x, t, log_input=False, full=True, eps=eps)"""
    log_rate = log(x + eps)
    constant, slope = stirling(t)
    loss = x - t * log_rate + constant
    return loss, scale * (1.0 - t / (x + eps)), scale * (slope - log_rate)


@triton.jit
def poisson_nll_loss_log_input_full(x, t, _p, _q, _r, scale):
    """torch: F.poisson_nll_loss(x, t, full=True)"""
    rate = exp(x)
    constant, slope = stirling(t)
    return rate - t * x + constant, scale * (rate - t), scale * (slope - x)


@triton.jit
def kl_div(x, t, _p, _q, _r, scale):
    """torch: F.kl_div(x, t)"""
    log_t = log(t)
    loss = tl.where(t == 0.0, 0.0, t * log_t) - t * x
    return loss, -t * scale, scale * (log_t + t / t - x)


@triton.jit
def kl_div_log_target(x, t, _p, _q, _r, scale):
    """torch: F.kl_div(x, t, log_target=True)"""
    e = exp(t)
    loss = e * (t - x)
    return loss, -e * scale, (loss + e) * scale


@triton.jit
def at_least(x, least):
    return tl.where(x < least, least, x)  # unlike tl.maximum NaN passes


@triton.jit
def binary_cross_entropy(x, t, _p, _q, _r, scale):
    """torch: F.binary_cross_entropy(x, t), but NaN where t is no probability"""
    log_x, log_rest = log(x), log1p(-x)
    loss = (t - 1.0) * at_least(log_rest, -100.0) - t * at_least(log_x, -100.0)
    loss = tl.where((t >= 0.0) & (t <= 1.0), loss, float("nan"))
    variance = at_least((1.0 - x) * x, 1e-12)
    return loss, scale * (x - t) * reciprocal(variance), scale * (log_rest - log_x)


@triton.jit
def binary_cross_entropy_with_logits(x, t, _p, _q, _r, scale):
    """torch: F.binary_cross_entropy_with_logits(x, t)"""
    return (1.0 - t) * x - log_sigmoid(x), scale * (sigmoid(x) - t), -scale * x


@triton.jit
def binary_cross_entropy_with_logits_pos_weight(x, t, pos_weight, _p, _q, _r, scale):
    """torch: F.binary_cross_entropy_with_logits(x, t, pos_weight=pos_weight)"""
    log_p = log_sigmoid(x)
    loss = (1.0 - t) * x - (1.0 + (pos_weight - 1.0) * t) * log_p
    positive = pos_weight * t
    grad_x = scale * ((positive + 1.0 - t) * sigmoid(x) - positive)
    return loss, grad_x, scale * (log_sigmoid(-x) - pos_weight * log_p), 0.0


@triton.jit
def gaussian_nll_loss(x, t, var, full, eps, _r, scale):
    """torch: F.gaussian_nll_loss(x, t, var, full, eps); the clamp of var passes its gradient"""
    variance = tl.where(var < eps, eps, var)
    d = x - t
    constant = tl.where(full != 0.0, tl.full([], 0.9189385332046727, x.dtype), 0.0)  # log(2 pi) / 2
    loss = 0.5 * (log(variance) + d * d / variance) + constant
    grad_x = 2.0 * d * (0.5 * scale / variance)  # overflows where torch's does
    grad_var = (variance - d * d) / variance / variance * (0.5 * scale)
    return loss, grad_x, -grad_x, grad_var


@triton.jit
def quantile_loss(x, t, q, _q, _r, scale):
    """torch: torch.maximum(q * (t - x), (q - 1) * (t - x)), whose gradient is halved at a tie"""
    d = t - x
    equal = tl.where(d == 0.0, 0.5 - q, 1.0 - 2.0 * q)  # of NaN both, as of torch.maximum
    gradient = scale * tl.where(d > 0.0, -q, tl.where(d < 0.0, 1.0 - q, equal))
    return d * tl.where(t < x, q - 1.0, q), gradient, -gradient


@triton.jit
def log_cosh_loss(x, t, _p, _q, _r, scale):
    """log(cosh(d)) = |d| + softplus(-2 |d|) - log(2), d = x - t"""
    d = x - t
    size = tl.abs(d)
    gradient = scale * tanh(d)
    return size + (softplus_nonpositive(-2.0 * size) - 0.6931471805599453), gradient, -gradient


@triton.jit
def hinge_loss(x, t, margin, _q, _r, scale):
    """max(0, margin - t x)"""
    slack = margin - t * x
    return tl.where(slack < 0.0, 0.0, slack), -t * tl.where(slack >= 0.0, scale, 0.0), 0.0


@triton.jit
def hinge_loss_squared(x, t, margin, _q, _r, scale):
    """max(0, margin - t x) ** 2"""
    slack = margin - t * x
    positive = tl.where(slack < 0.0, 0.0, slack)
    return positive * positive, -t * tl.where(slack >= 0.0, 2.0 * scale * slack, 0.0), 0.0


@triton.jit
def sigmoid_focal_loss(x, t, alpha, gamma, ignored, scale):
    """torchvision: sigmoid_focal_loss(x, t, alpha, gamma); 0 where t is `ignored`

    (alpha t + (1 - alpha) (1 - t)) u**gamma ((1 - t) x + softplus(-x)), where p = sigmoid(x) and
    u = p (1 - t) + (1 - p) t. No factor of alpha where it is negative.
    """
    p, q = sigmoid(x), sigmoid(-x)
    u = p * (1.0 - t) + q * t
    power = u * u
    if gamma != 2.0:
        power = tl.where(gamma == 0.0, 1.0, exp(gamma * log(u)))
    factor = tl.where(alpha < 0.0, 1.0, alpha * t + (1.0 - alpha) * (1.0 - t))
    factor = tl.where(t == ignored, 0.0, factor)
    scale = tl.where(t == ignored, 0.0, scale)  # it is infinite if all targets are ignored
    loss = (1.0 - t) * x - log_sigmoid(x)
    ratio = tl.where(u > 0.0, p * q / u, 1.0)
    slope = (p - t) + gamma * loss * ratio * (1.0 - 2.0 * t)
    return factor * (loss * power), factor * scale * (power * slope), 0.0


FORMULAS = {
    formula.__name__: formula
    for formula in (
        mse_loss,
        smooth_l1_loss,
        l1_loss,
        huber_loss,
        soft_margin_loss,
        hinge_embedding_loss,
        margin_ranking_loss,
        poisson_nll_loss,
        poisson_nll_loss_log_input,
        poisson_nll_loss_full,
        poisson_nll_loss_log_input_full,
        kl_div,
        kl_div_log_target,
        binary_cross_entropy,
        binary_cross_entropy_with_logits,
        binary_cross_entropy_with_logits_pos_weight,
        gaussian_nll_loss,
        quantile_loss,
        log_cosh_loss,
        hinge_loss,
        hinge_loss_squared,
        sigmoid_focal_loss,
    )
}


# ---- the kernel of all of them -------------------------------------------------------------------


@triton.jit(do_not_specialize=["denominator"])
def pointwise_loss_kernel(
    x,
    t,
    third,
    weight,
    grad_output,
    loss,
    grad_x,
    grad_t,
    grad_third,
    fourth,
    grad_fourth,
    n,
    columns,
    strides,
    p: tl.float64,
    q: tl.float64,
    r: tl.float64,
    parameters,
    denominator,
    FORMULA: tl.constexpr,
    IS_PROGRAM: tl.constexpr,
    REDUCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Outputs that are None are not wanted; with REDUCE `loss` takes one partial sum a program.

    denominator: None for 1, an integer, or a pointer to a number that only the GPU knows.
    parameters: None, or a pointer to p, q and r where the GPU alone knows one of them; for a
        program, which takes up to four operands, what `parts_of` of `program.py` makes of its own.
    """
    dtype: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    divisor = tl.full([], 1.0, tl.float64)
    if denominator is not None:
        divisor *= tl.load(denominator) if denominator.dtype.is_ptr() else denominator
    scale = (1.0 / divisor).to(dtype)
    if parameters is not None and not IS_PROGRAM:
        p, q, r = tl.load(parameters), tl.load(parameters + 1), tl.load(parameters + 2)
    p, q, r = tl.full([], p, dtype), tl.full([], q, dtype), tl.full([], r, dtype)
    total = tl.zeros([BLOCK], dtype)
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, step):
        i = start + tl.arange(0, BLOCK)
        mask = i < n
        a = read(x, 0, i, n, columns, strides)
        b = read(t, 1, i, n, columns, strides)
        c = read(third, 2, i, n, columns, strides)
        w = read(weight, 3, i, n, columns, strides)
        g = read(grad_output, 4, i, n, columns, strides)
        by_fourth = None
        if IS_PROGRAM:
            d = read(fourth, 5, i, n, columns, strides)
            value, by_x, by_t, by_third, by_fourth = FORMULA(a, b, c, d, parameters, scale)
        elif third is None:
            value, by_x, by_t = FORMULA(a, b, p, q, r, scale)
            by_third = None
        else:
            value, by_x, by_t, by_third = FORMULA(a, b, c, p, q, r, scale)
        if weight is not None:
            value *= w
        if REDUCE:
            total += tl.where(mask, value, 0.0)
        elif loss is not None:
            tl.store(loss + i, value, mask=mask)
        store_gradient(grad_x, i, mask, by_x, w, g)
        store_gradient(grad_t, i, mask, by_t, w, g)
        store_gradient(grad_third, i, mask, by_third, w, g)
        store_gradient(grad_fourth, i, mask, by_fourth, w, g)
    if REDUCE:
        tl.store(loss + tl.program_id(0), tl.sum(total).to(tl.float64) / divisor)


@triton.jit
def store_gradient(out, i, mask, gradient, weight, grad_output):
    if out is not None:
        if weight is not None:
            gradient *= weight
        if grad_output is not None:
            gradient *= grad_output
        tl.store(out + i, gradient, mask=mask)
