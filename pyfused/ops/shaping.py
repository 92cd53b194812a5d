"""What is done to logits before their loss: a margin at the target's, a scale, a cap.

Composed of what there is, a pass over the logits each, so that a loss which is not asked for it
loses no time by it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyfused import checks
from pyfused.backends import Backend, Shaping
from pyfused.backends.layout import accumulate_dtype, logit_at


def penalized(cosine: Tensor, margin: float, kind: str) -> Tensor:
    """A target's cosine with its margin: cos - m (CosFace), or cos(theta + m) (ArcFace)."""
    if kind == "cosface":
        return cosine - margin
    cosine = cosine.clamp(-1, 1)
    return cosine * math.cos(margin) - _sine(cosine) * math.sin(margin)


def slope_of_penalized(cosine: Tensor, margin: float, kind: str) -> Tensor:
    """Its derivative, as autograd has it."""
    if kind == "cosface":
        return torch.ones_like(cosine)
    sloping = 1 - cosine * cosine > torch.finfo(cosine.dtype).eps
    slope = math.cos(margin) + (cosine / _sine(cosine)).where(sloping, 0) * math.sin(margin)
    return slope.where(cosine.abs() <= 1, 0)


def _sine(cosine: Tensor) -> Tensor:
    """Where the angle is 0 its sine has no slope; one next to it stands for it there."""
    return (1 - cosine * cosine).clamp(min=torch.finfo(cosine.dtype).eps).sqrt()


def scaled_with_margin(input: Tensor, target: Tensor, shaping: Shaping) -> Tensor:
    """The logits but for the cap, as autograd differentiates them."""
    checks.shaping(shaping)
    if not shaping.margin:
        return input * shaping.scale
    checks.target_of_margin(input, target)
    at, own, _ = logit_at(input, target)
    own = own.to(accumulate_dtype(input.dtype))
    moved = penalized(own, shaping.margin, shaping.margin_kind) * shaping.scale
    dim = min(input.dim() - 1, 1)
    return (input * shaping.scale).scatter_(dim, at, moved.to(input.dtype).unsqueeze(dim))


class Shaped(NamedTuple):
    """Logits as the loss takes them, and what their gradient is made of.

    Attributes:
        capped: What the loss is of.
        logits: The same before the cap, in the memory that was given.
        at: Of each target the place among these classes, with a margin.
        slope: What the margin multiplies its gradient by.
    """

    capped: Tensor
    logits: Tensor
    at: Tensor | None
    slope: Tensor | None


def shape(
    backend: Backend, shaping: Shaping, logits: Tensor, target: Tensor, first_class: int = 0
) -> Shaped:
    """Overwrites logits of shape (N, C, ...), those of some classes from the first on."""
    at = slope = None
    if shaping.margin:
        at, own, inside = logit_at(logits, target - first_class)
        own = own.to(accumulate_dtype(logits.dtype))
        given = own, shaping.margin, shaping.margin_kind
        slope = slope_of_penalized(*given).where(inside, 1).unsqueeze(1)
        moved = penalized(*given).where(inside, own)
        logits.scatter_(1, at, moved.to(logits.dtype).unsqueeze(1))
    if shaping.scale != 1:
        logits *= shaping.scale
    capped = logits
    if shaping.softcap is not None:
        capped = backend.activation("softcap", logits, shaping.softcap)
    return Shaped(capped, logits, at, slope)


def gradient_of(backend: Backend, shaping: Shaping, shaped: Shaped, gradient: Tensor) -> Tensor:
    """That of the logits as they were, from that of the capped ones, which it overwrites."""
    if shaping.softcap is not None:
        gradient = backend.activation_backward("softcap", gradient, shaped.logits, shaping.softcap)
    if shaping.scale != 1:
        gradient *= shaping.scale
    if shaped.at is not None and shaped.slope is not None:
        own = gradient.gather(1, shaped.at) * shaped.slope
        gradient.scatter_(1, shaped.at, own.to(gradient.dtype))
    return gradient
