"""Fit a skorch classifier with torch's criterion and with pyfused's.

    python examples/with_skorch.py

Needs `pip install '.[integrations]'`.
"""

from __future__ import annotations

import torch
from common import require_equal
from sklearn.datasets import load_digits
from skorch import NeuralNetClassifier

import pyfused.nn

EPOCHS = 10
TOLERANCE = 1e-4


def build(nn: object) -> torch.nn.Module:
    relu = nn.ReLU()
    return torch.nn.Sequential(torch.nn.Linear(64, 64), relu, torch.nn.Linear(64, 10))


def train(nn: object, epochs: int) -> list[float]:
    """Returns the loss of each batch."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    net = NeuralNetClassifier(
        build(nn), criterion=nn.CrossEntropyLoss, max_epochs=epochs, lr=0.1, verbose=0
    )
    net.fit((images / 16).astype("float32"), labels.astype("int64"))
    history = net.history[:, "batches", :, "train_loss"]
    return [loss for epoch in history for loss in epoch if loss is not None]


def main() -> None:
    curves = [train(nn, EPOCHS) for nn in (torch.nn, pyfused.nn)]
    print(f"last loss {curves[1][-1]:.4f}")
    require_equal(*curves, TOLERANCE)


if __name__ == "__main__":
    main()
