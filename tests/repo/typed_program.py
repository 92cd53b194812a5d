"""A user's program, which test_names.py checks with mypy --strict, and does not run."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import assert_type

import pyfused
import pyfused.functional as F
from pyfused import VocabShard, nn
from pyfused.vocab_parallel import vocab_parallel_cross_entropy


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.head = nn.Conv2d(3, 8, 3), nn.GELU(), nn.Linear(8, 10)
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.1)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        hidden: Tensor = self.act(self.conv(x)).mean((2, 3))
        loss: Tensor = self.loss(self.head(hidden), target)
        return loss


@pyfused.loss
def charbonnier(input: Tensor, target: Tensor, eps: float = 1e-3) -> Tensor:
    return ((input - target) ** 2 + eps**2).sqrt()


def step(x: Tensor, target: Tensor) -> float:
    with pyfused.patch():
        return F.cross_entropy(x, target, ignore_index=0).item()


x, target = torch.randn(4, 10, requires_grad=True), torch.randint(10, (4,))
assert_type(F.cross_entropy(x, target, reduction="sum"), Tensor)
assert_type(F.pad(x, (1, 1)), Tensor)
assert_type(F.log_probs(x, target, return_entropy=True).entropy, Tensor)
assert_type(F.log_probs(x, target, return_metrics=True).is_top1, Tensor)
assert_type(F.linear_cross_entropy(x, torch.randn(7, 10), target % 7), Tensor)
assert_type(pyfused.convert(Model()), Model)
assert_type(step(x, target), float)
assert_type(pyfused.explain("relu", x).backend, str)
assert_type(vocab_parallel_cross_entropy(x, target, VocabShard(first=0)), Tensor)
charbonnier(x, x.detach()).backward()
with pyfused.report() as report:
    print(report)
