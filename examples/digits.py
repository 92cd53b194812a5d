"""Train an MLP on handwritten digits, with torch.nn and with pyfused.nn.

    python examples/digits.py

Both start from the same seed, so the losses of all steps must agree within rounding.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from types import ModuleType

import torch
from common import require_equal
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

import pyfused.nn

EPOCHS, BATCH = 20, 50
# Rounding errors accumulate over the steps.
TOLERANCE = 1e-4


def load() -> list[Tensor]:
    """Returns training images, test images, training labels and test labels."""
    images, labels = load_digits(return_X_y=True)
    tensors = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    return train_test_split(*tensors, random_state=0, stratify=labels)


def build(nn: ModuleType) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(64, 128),
        nn.ReLU(),
        torch.nn.Linear(128, 64),
        nn.ReLU(),
        torch.nn.Linear(64, 10),
    )


def train(
    model: torch.nn.Module, criterion: torch.nn.Module, images: Tensor, labels: Tensor, epochs: int
) -> Iterator[float]:
    """Yields the loss of each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(BATCH):
            optimizer.zero_grad()
            loss = criterion(model(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            yield loss.item()


@torch.no_grad()
def accuracy(model: torch.nn.Module, images: Tensor, labels: Tensor) -> float:
    return (model(images).argmax(1) == labels).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="default: %(default)s")
    epochs = parser.parse_args().epochs

    images, test_images, labels, test_labels = load()
    curves = []
    for nn in (torch.nn, pyfused.nn):
        model = build(nn)
        losses = list(train(model, nn.CrossEntropyLoss(), images, labels, epochs))
        correct = accuracy(model, test_images, test_labels)
        print(f"{nn.__name__:<10}  last loss {losses[-1]:.6f}  test accuracy {correct:.2%}")
        curves.append(losses)
    require_equal(*curves, TOLERANCE)


if __name__ == "__main__":
    main()
