"""A call of every operator in each way that takes a path of its own through autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyfused import functional as fused

CLASSES = torch.tensor([1, 0, 4, -100, 2, 2])
PROBABILITIES = torch.linspace(-2, 2, 30).reshape(6, 5).softmax(1)
OTHER = torch.linspace(-3, 1, 30).reshape(6, 5)
WEIGHT = torch.linspace(0.5, 2, 30).reshape(6, 5)


@dataclass
class Case:
    """`run(pyfused.functional or torch.nn.functional, x)` for an x of shape (6, 5)."""

    run: Callable[[Any, Tensor], Tensor]

    def ours(self, x: Tensor) -> Tensor:
        return self.run(fused, x)

    def torchs(self, x: Tensor) -> Tensor:
        return self.run(F, x)


def cases() -> dict[str, Case]:
    made: dict[str, Case] = {"relu": Case(lambda f, x: f.relu(x))}
    made["relu_inplace"] = Case(lambda f, x: f.relu(x * 1, inplace=True))
    for r in ("none", "mean", "sum"):
        made |= {
            f"index_{r}": Case(lambda f, x, r=r: f.cross_entropy(x, CLASSES, reduction=r)),
            f"smoothed_{r}": Case(
                lambda f, x, r=r: f.cross_entropy(
                    x, CLASSES, WEIGHT[0], reduction=r, label_smoothing=0.1
                )
            ),
            f"probabilities_{r}": Case(
                lambda f, x, r=r: f.cross_entropy(x, PROBABILITIES, reduction=r)
            ),
            f"to_probabilities_{r}": Case(lambda f, x, r=r: f.cross_entropy(OTHER, x, reduction=r)),
            f"mse_{r}": Case(lambda f, x, r=r: f.mse_loss(x, OTHER, reduction=r)),
            f"mse_weighted_{r}": Case(
                lambda f, x, r=r: f.mse_loss(OTHER, x, reduction=r, weight=WEIGHT)
            ),
        }
    return made


CASES = cases()
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
