"""Train two regressions with MSELoss, with torch.nn and with pyfused.nn.

    python examples/regression.py

The first predicts the progression of diabetes in a year from ten measurements of a patient. The
second is a minimal network that learns to add two numbers. Both implementations start from the same
seed, so the losses of all steps must agree within rounding.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from types import ModuleType

import torch
from common import require_equal
from sklearn import datasets
from sklearn.model_selection import train_test_split
from torch import Tensor

import pyfused.nn

HIDDEN = 8
LEARNING_RATE = 0.005
STEPS = 1500
# Rounding errors accumulate over the steps.
TOLERANCE = 1e-4

SUM_INPUTS = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
SUM_TARGETS = torch.tensor([[3.0], [7.0], [11.0], [15.0]])


def load_diabetes() -> list[Tensor]:
    """Returns training inputs, test inputs, training targets and test targets, standardised."""
    patients, progression = datasets.load_diabetes(return_X_y=True)
    columns = torch.tensor(patients), torch.tensor(progression)[:, None]
    standardised = [((x - x.mean(0)) / x.std(0)).float() for x in columns]
    return train_test_split(*standardised, random_state=0)


def build(nn: ModuleType, inputs: int) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(inputs, HIDDEN),
        nn.ReLU(),
        torch.nn.Linear(HIDDEN, 1),
    )


def train(
    model: torch.nn.Module, criterion: torch.nn.Module, inputs: Tensor, targets: Tensor, steps: int
) -> Iterator[float]:
    """Trains on all rows in each step, and yields the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = criterion(model(inputs), targets)
        loss.backward()
        optimizer.step()
        yield loss.item()


@torch.no_grad()
def variance_explained(model: torch.nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """Returns R squared: 1 for exact predictions, 0 if each prediction is the mean."""
    return 1 - ((model(inputs) - targets).square().mean() / targets.var(correction=0)).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="default: %(default)s")
    steps = parser.parse_args().steps

    print("Diabetes, progression in a year from ten measurements")
    patients, test_patients, targets, test_targets = load_diabetes()
    curves = []
    for nn in (torch.nn, pyfused.nn):
        model = build(nn, inputs=10)
        losses = list(train(model, nn.MSELoss(), patients, targets, steps))
        explained = variance_explained(model, test_patients, test_targets)
        print(f"{nn.__name__:<10}  last loss {losses[-1]:.6f}  test R squared {explained:.4f}")
        curves.append(losses)
    require_equal(*curves, TOLERANCE)

    print("\nThe sum of two numbers")
    curves = []
    for nn in (torch.nn, pyfused.nn):
        model = build(nn, inputs=2)
        losses = list(train(model, nn.MSELoss(), SUM_INPUTS, SUM_TARGETS, steps))
        print(f"{nn.__name__:<10}  last loss {losses[-1]:.6f}")
        print("  input       target  prediction")
        rows = torch.cat([SUM_INPUTS, SUM_TARGETS, model(SUM_INPUTS)], dim=1)
        for *row, target, prediction in rows.tolist():
            print(f"  {row!s:<10}  {target:>6.1f}  {prediction:>10.4f}")
        curves.append(losses)
    require_equal(*curves, TOLERANCE)


if __name__ == "__main__":
    main()
