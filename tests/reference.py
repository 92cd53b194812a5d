"""The specification of cross-entropy as executable code.

`cross_entropy` is written in torch and evaluated in float64, with gradients from autograd. For
tests of float64, `extended_cross_entropy` computes value and gradient in NumPy's long double from
the closed form. `samples.py` has the definitions of other operators.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Extended = npt.NDArray[np.longdouble]


def reduce(loss: Tensor, reduction: str, denominator: Tensor | float) -> Tensor:
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / denominator


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Computes -sum_c weight_c q_c log softmax(input)_c, where q is the smoothed target."""
    class_dim = min(input.dim() - 1, 1)
    logits = input.double().movedim(class_dim, -1)
    classes = logits.shape[-1]
    weight = logits.new_ones(classes) if weight is None else weight.double()
    log_p = logits.log_softmax(-1)

    if target.is_floating_point():
        hard, counted = target.double().movedim(class_dim, -1), None
        denominator = logits.numel() / classes
    else:
        counted = target != ignore_index
        index = target.long().where(counted, 0)
        hard = torch.nn.functional.one_hot(index, classes).double()
        denominator = (weight[index] * counted).sum()

    q = (1 - label_smoothing) * hard + label_smoothing / classes
    loss = -(weight * q * log_p).sum(-1)
    return reduce(loss if counted is None else loss.where(counted, 0), reduction, denominator)


def extended_cross_entropy(
    logits: Extended,
    q: Extended,
    weight: Extended,
    denominator: Extended | float,
    grad_output: Extended,
) -> tuple[Extended, Extended]:
    """Returns the losses of (N, C) and the gradient, divided by the denominator.

    With W = sum_c weight_c q_c:  d loss / d logits_c = softmax_c W - weight_c q_c
    """
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    weighted = weight * q
    loss = -(weighted * log_p).sum(-1) / denominator
    gradient = np.exp(log_p) * weighted.sum(-1, keepdims=True) - weighted
    return loss, gradient * grad_output[..., None] / denominator


def extended(x: Tensor) -> Extended:
    return x.detach().double().cpu().numpy().astype(np.longdouble)
