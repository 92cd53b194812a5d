"""The margin of losses of cosines: it lowers the target's, so that classes stay apart.

A function of the logits that is composed with any loss. A loss without it loses no time by it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyfused import checks
from pyfused.layout import accumulate_dtype, logit_at


def additive_margin(input: Tensor, target: Tensor, margin: float, kind: str) -> Tensor:
    """Returns logits whose target is cos - m (CosFace), or cos(angle + m) (ArcFace)."""
    checks.additive_margin(input, target, margin, kind)
    index, cosine, in_range = logit_at(input, target)
    cosine = cosine.to(accumulate_dtype(input.dtype))
    lowered = cosine - margin if kind == "cosface" else _added_to_angle(cosine, margin)
    lowered = lowered.where(in_range, cosine).to(input.dtype)
    dim = min(input.dim() - 1, 1)
    return input.scatter(dim, index, lowered.unsqueeze(dim))


def _added_to_angle(cosine: Tensor, margin: float) -> Tensor:
    """cos(angle + margin). At an angle of 0 the sine has no slope: the smallest one stands in."""
    cosine = cosine.clamp(-1, 1)
    sine = (1 - cosine * cosine).clamp(min=torch.finfo(cosine.dtype).eps).sqrt()
    return cosine * math.cos(margin) - sine * math.sin(margin)
