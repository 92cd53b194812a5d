"""Fused counterparts of ``torch.nn``'s modules: subclasses, alike but for their ``forward``."""

from __future__ import annotations

import torch
from torch import Tensor

from pyfused import functional as F

__all__ = ["CrossEntropyLoss", "MSELoss", "ReLU"]


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """:class:`torch.nn.CrossEntropyLoss` over :func:`pyfused.functional.cross_entropy`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class MSELoss(torch.nn.MSELoss):
    """:class:`torch.nn.MSELoss` over :func:`pyfused.functional.mse_loss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(input, target, reduction=self.reduction)


class ReLU(torch.nn.ReLU):
    """:class:`torch.nn.ReLU` over :func:`pyfused.functional.relu`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(input, inplace=self.inplace)
