"""Train a LightningModule, unchanged and converted by pyfused.convert().

    python examples/with_lightning.py

Needs `pip install '.[integrations]'`.
"""

from __future__ import annotations

import lightning
import torch
from common import require_equal
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pyfused

STEPS = 40
TOLERANCE = 1e-4


class Classifier(lightning.LightningModule):
    """A LightningModule that does not use pyfused."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 10))
        self.criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        input, target = batch
        loss = self.criterion(self.model(input), target)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def train(convert: bool, steps: int) -> list[float]:
    """Returns the loss of each step."""
    torch.manual_seed(0)
    classifier = Classifier()
    if convert:
        pyfused.convert(classifier)
    input = torch.randn(256, 16)
    loader = DataLoader(TensorDataset(input, input[:, :10].argmax(1)), batch_size=32)
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        accumulate_grad_batches=2,
    )
    trainer.fit(classifier, loader)
    return classifier.losses


def main() -> None:
    curves = [train(convert, STEPS) for convert in (False, True)]
    print(f"last loss {curves[1][-1]:.4f}")
    require_equal(*curves, TOLERANCE)


if __name__ == "__main__":
    main()
