"""Additive margins, which lower the target's cosine so that a loss separates the classes further.

A margin is a function of the logits, which composes with any loss over classes:

    CosFace:  cos(angle) - margin
    ArcFace:  cos(angle + margin)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyfused import checks
from pyfused.layout import accumulate_dtype, logit_at


def additive_margin(input: Tensor, target: Tensor, margin: float, kind: str) -> Tensor:
    """Returns the logits with the margin applied to the target logits."""
    checks.additive_margin(input, target, margin, kind)
    index, cosine, in_range = logit_at(input, target)
    cosine = cosine.to(accumulate_dtype(input.dtype))
    lowered = cosine - margin if kind == "cosface" else _cos_of_sum(cosine, margin)
    lowered = lowered.where(in_range, cosine).to(input.dtype)
    dim = min(input.dim() - 1, 1)
    return input.scatter(dim, index, lowered.unsqueeze(dim))


def _cos_of_sum(cosine: Tensor, margin: float) -> Tensor:
    """Returns cos(angle + margin). The sine is at least eps, as its derivative at 0 is infinite."""
    cosine = cosine.clamp(-1, 1)
    sine = (1 - cosine * cosine).clamp(min=torch.finfo(cosine.dtype).eps).sqrt()
    return cosine * math.cos(margin) - sine * math.sin(margin)
