"""Ten losses and activations from the literature as formulas to copy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import pyfused


@pyfused.loss
def wing(input: Tensor, target: Tensor, *, omega: float = 10.0, epsilon: float = 2.0) -> Tensor:
    """For facial landmarks; emphasises small errors. Feng et al. 2018, arXiv:1711.06753."""
    d = (input - target).abs()
    constant = omega - omega * torch.log1p(omega / epsilon)
    return torch.where(d < omega, omega * torch.log1p(d / epsilon), d - constant)


@pyfused.loss
def tweedie(input: Tensor, target: Tensor, *, power: float = 1.5) -> Tensor:
    """For nonnegative targets with many zeros, such as claims and rainfall.

    The input is the logarithm of the mean, as in LightGBM and XGBoost. Tweedie 1984.
    """
    fit = -target * torch.exp((1 - power) * input) / (1 - power)
    return fit + torch.exp((2 - power) * input) / (2 - power)


@pyfused.loss
def asymmetric(
    input: Tensor,
    target: Tensor,
    *,
    gamma_positive: float = 1.0,
    gamma_negative: float = 4.0,
    margin: float = 0.05,
) -> Tensor:
    """For multi-label data with few positives. Ridnik et al. 2021, arXiv:2009.14119."""
    probability = torch.sigmoid(input)
    negative = (probability - margin).clamp(min=0)
    of_positive = (1 - probability) ** gamma_positive * F.logsigmoid(input)
    of_negative = negative**gamma_negative * torch.log1p(-negative)
    return -target * of_positive - (1 - target) * of_negative


@pyfused.loss
def generalized_cross_entropy(input: Tensor, *, q: float = 0.7) -> Tensor:
    """For noisy labels. Zhang et al. 2018, arXiv:1805.07836.

    The input is the probability of the target class.
    """
    return (1 - input**q) / q


@pyfused.loss
def charbonnier(input: Tensor, target: Tensor, *, epsilon: float = 1e-3) -> Tensor:
    """For images: a smooth absolute error. Charbonnier et al. 1994."""
    return torch.sqrt((input - target) ** 2 + epsilon**2)


@pyfused.loss
def general_robust(
    input: Tensor, target: Tensor, *, alpha: float = 1.0, scale: float = 1.0
) -> Tensor:
    """Generalises the squared error (alpha 2), Charbonnier's (1) and Geman and McClure's (-2).

    Barron 2019, arXiv:1701.03077; alpha must not be 0 or 2.
    """
    b = abs(alpha - 2)
    squared = ((input - target) / scale) ** 2
    return b / alpha * ((squared / b + 1) ** (alpha / 2) - 1)


@pyfused.activation
def mish(input: Tensor) -> Tensor:
    """Misra 2019, arXiv:1908.08681."""
    return input * torch.tanh(F.softplus(input))


@pyfused.activation
def softplus(input: Tensor, *, beta: float = 1.0) -> Tensor:
    """A smooth ReLU; torch's function does not overflow like log(1 + exp(x)). Dugas et al. 2000."""
    return F.softplus(beta * input) / beta


@pyfused.activation
def hardswish(input: Tensor) -> Tensor:
    """For mobile networks. Howard et al. 2019, arXiv:1905.02244."""
    return input * (input + 3).clamp(0, 6) / 6


@pyfused.activation
def snake(input: Tensor, *, frequency: float = 1.0) -> Tensor:
    """For periodic data. Ziyin, Hartwig, Ueda 2020, arXiv:2006.08195."""
    return input + torch.sin(frequency * input) ** 2 / frequency


FORMULAS = {
    formula.__name__: formula
    for formula in (
        wing,
        tweedie,
        asymmetric,
        generalized_cross_entropy,
        charbonnier,
        general_robust,
        mish,
        softplus,
        hardswish,
        snake,
    )
}


# ---- losses that pyfused.functional also has -----------------------------------------------------


@pyfused.loss
def mse_loss(input: Tensor, target: Tensor) -> Tensor:
    return (input - target) ** 2


@pyfused.loss
def smooth_l1_loss(input: Tensor, target: Tensor, *, beta: float = 1.0) -> Tensor:
    d = (input - target).abs()
    return torch.where(d < beta, 0.5 * d * d / beta, d - 0.5 * beta)


@pyfused.loss
def binary_cross_entropy_with_logits(input: Tensor, target: Tensor) -> Tensor:
    return (1 - target) * input + F.softplus(-input)


@pyfused.loss
def sigmoid_focal_loss(
    inputs: Tensor, targets: Tensor, *, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """For object detection with much background. Lin et al. 2017, arXiv:1708.02002."""
    p = torch.sigmoid(inputs)
    cross_entropy = F.binary_cross_entropy_with_logits(inputs, targets, reduction="none")
    correct = p * targets + (1 - p) * (1 - targets)
    balance = alpha * targets + (1 - alpha) * (1 - targets)
    return balance * (1 - correct) ** gamma * cross_entropy


HAND_WRITTEN = {
    formula.__name__: formula
    for formula in (
        mse_loss,
        smooth_l1_loss,
        binary_cross_entropy_with_logits,
        sigmoid_focal_loss,
    )
}
