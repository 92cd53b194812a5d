"""The equations of losses over rows of logits x with a class index t; layouts are in other files.

    lse      = log sum_c exp(x_c) = pivot + log(sum),       sum = sum_c exp(x_c - pivot)
    nll      = lse - x_t = -log_p
    entropy  = log(sum) - weighted / sum,                   weighted = sum_c exp(x_c - pivot)
                                                                              (x_c - pivot)
    q_c      = (1 - smoothing) w_t [c = t] + smoothing / C w_c
    loss     = sum_c q_c (lse - x_c) + z_loss lse^2
    focal    = w_t (1 - p_t)^gamma nll + z_loss lse^2,      p_c = exp(x_c - lse)

w are the class weights; gamma needs smoothing = 0. Every gradient has the form

    dx_c     = e_c (a + b (x_c - pivot)) - s w_c - t [c = target],      e_c = exp(x_c - pivot)

with numbers a, b, s and t of the row. Options of a loss are in a tuple `numbers`: smoothing, gamma,
z_loss and the scale of the logits, each None without the option.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import exp_nonpositive, log, tanh
from .rows import number


@triton.jit
def focal(nll, gamma):
    """Returns (1 - p)^gamma with p = exp(-nll), and d/dnll of (1 - p)^gamma nll."""
    half = tanh(0.5 * tl.where(nll < 0.0, 0.0, nll))
    miss = 2.0 * half / (1.0 + half)  # 1 - p without cancellation
    power = exp_nonpositive(gamma * log(miss))
    ratio = tl.where(miss > 0.0, nll / miss, 1.0)
    p = 1.0 - miss
    return power, power * (1.0 + tl.where(p > 0.0, gamma * p * ratio, 0.0))  # 0 * inf is NaN


@triton.jit
def lse_terms(lse, numbers):
    """Returns z_loss lse^2, and its derivative d/dlse."""
    loss, slope = tl.zeros_like(lse), tl.zeros_like(lse)
    if numbers[2] is not None:
        z_loss = number(numbers[2], lse.dtype)
        loss, slope = z_loss * lse * lse, 2.0 * z_loss * lse
    return loss, slope


@triton.jit
def target_terms(pivot, log_total, target_logit, target_weight, weight, numbers):
    """Returns the loss of a class index and t, both without smoothing, and dloss/dlse.

    weight: the class weights. With them, dloss/dlse lacks smoothing / C sum_c w_c.
    """
    nll, t = pivot - target_logit + log_total, target_weight
    of_lse, slope = lse_terms(pivot + log_total, numbers)
    if numbers[0] is not None:
        smoothing = number(numbers[0], nll.dtype)
        t *= 1.0 - smoothing
        if weight is None:
            slope += smoothing
    loss = t * nll
    if numbers[1] is not None:
        power, derivative = focal(nll, number(numbers[1], nll.dtype))
        loss *= power
        t *= derivative
    return loss + of_lse, t + slope, t


@triton.jit
def smoothing_terms(sum_of_y, log_total, classes, smoothing):
    """Returns the smoothing's loss without class weights, and s; y_c is x_c - pivot."""
    s = smoothing / classes
    return s * (classes * log_total - sum_of_y), s


@triton.jit
def state_results(pivot, total, weighted, target_logit):
    """Returns log_p, entropy and lse, in float64."""
    log_total = log(total, tl.float64)
    log_p = target_logit - pivot - log_total
    entropy = log_total - weighted / total
    # Rounding could make the log-probability positive; NaN is kept.
    log_p = tl.where(log_p > 0.0, 0.0, log_p)
    return log_p, tl.where(entropy < 0.0, 0.0, entropy), pivot + log_total


@triton.jit
def state_terms(g_log_p, g_entropy, g_lse, total, weighted):
    """Returns a and b, given the gradients of `state_results`; t is -g_log_p."""
    return (g_lse - g_log_p + g_entropy * (weighted / total)) / total, -g_entropy / total


@triton.jit
def gradient(e, a, s, t, b=None, y=None):
    """Returns dx_c, given s w_c, t [c = target], and y = x_c - pivot."""
    return e * (a if b is None else a + b * y) - t - s
