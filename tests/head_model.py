"""A small model with a head, its input and targets, for tests of converted heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

X, TARGET = torch.arange(64).view(4, 16) % 50, torch.arange(64) % 40
PLACES = TARGET.view(4, 16)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.emb, self.head = nn.Embedding(50, 8), nn.Linear(8, 40)
        self.bias = nn.Buffer(torch.linspace(-1, 1, 40)[None])

    def forward(self, x: Tensor, target: Tensor | None = None) -> Any:
        self.hidden: Tensor = 1 * self.emb(x)
        logits = self.head(self.hidden)
        return logits if target is None else (logits, F.cross_entropy(logits.flatten(0, 1), target))


def stepped(model: Any, **options: Any) -> None:
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(model.parameters(), 0.01, **options).step()
    model.zero_grad()
