"""Train three small models with torch.nn and with pyfused.nn.

    python examples/small_models.py

One classifies handwritten digits, one predicts the progression of diabetes in a year from ten
measurements of a patient, and one learns to add two numbers. Calls as small as theirs run torch's
operators. Both implementations start from the same seed, and the losses of all steps must agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType

import torch
from common import require_equal
from sklearn import datasets
from sklearn.model_selection import train_test_split
from torch import Tensor

import pyfused.nn

EPOCHS, STEPS = 20, 1500  # of the digits, and of the regressions
TOLERANCE = 1e-4  # rounding errors accumulate over the steps


@dataclass(frozen=True)
class Task:
    """Data, a network of linear layers, and how it is trained and tested.

    Attributes:
        data: Training inputs, test inputs, training targets, test targets.
        scores: The form of each test score, and the function of test outputs and test targets.
    """

    title: str
    data: list[Tensor]
    widths: tuple[int, ...]
    loss: str
    epochs: int
    batch: int
    rate: float
    momentum: float
    scores: dict[str, tuple[str, Callable[[Tensor, Tensor], float]]]

    @property
    def steps(self) -> int:
        return self.epochs * -(-len(self.data[0]) // self.batch)

    def build(self, nn: ModuleType) -> torch.nn.Module:
        torch.manual_seed(0)
        pairs = pairwise(self.widths)
        layers = [layer for pair in pairs for layer in (torch.nn.Linear(*pair), nn.ReLU())]
        return torch.nn.Sequential(*layers[:-1])

    def train(self, model: torch.nn.Module, criterion: torch.nn.Module) -> Iterator[float]:
        """Yields the loss of each step."""
        inputs, _, targets, _ = self.data
        generator, parameters = torch.Generator().manual_seed(0), model.parameters()
        optimizer = torch.optim.SGD(parameters, lr=self.rate, momentum=self.momentum)
        for _ in range(self.epochs):
            for batch in torch.randperm(len(inputs), generator=generator).split(self.batch):
                optimizer.zero_grad()
                loss = criterion(model(inputs[batch]), targets[batch])
                loss.backward()
                optimizer.step()
                yield loss.item()

    @torch.no_grad()
    def test(self, model: torch.nn.Module) -> dict[str, float]:
        _, inputs, _, targets = self.data
        outputs = model(inputs)
        return {name: score(outputs, targets) for name, (_, score) in self.scores.items()}


def accuracy(outputs: Tensor, labels: Tensor) -> float:
    return (outputs.argmax(1) == labels).double().mean().item()


def variance_explained(outputs: Tensor, targets: Tensor) -> float:
    """Returns R squared: 1 for exact predictions, 0 if each prediction is the mean."""
    return 1 - ((outputs - targets).square().mean() / targets.var(correction=0)).item()


def digits(epochs: int = EPOCHS) -> Task:
    images, labels = datasets.load_digits(return_X_y=True)
    tensors = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    data = train_test_split(*tensors, random_state=0, stratify=labels)
    scores = {"test accuracy": ("{:.2%}", accuracy)}
    return Task(
        "Digits", data, (64, 128, 64, 10), "CrossEntropyLoss", epochs, 50, 0.05, 0.9, scores
    )


def diabetes(steps: int = STEPS) -> Task:
    patients, progression = datasets.load_diabetes(return_X_y=True)
    columns = torch.tensor(patients), torch.tensor(progression)[:, None]
    standardised = [((x - x.mean(0)) / x.std(0)).float() for x in columns]
    data = train_test_split(*standardised, random_state=0)
    scores = {"test R squared": ("{:.4f}", variance_explained)}
    return Task("Diabetes", data, (10, 8, 1), "MSELoss", steps, len(data[0]), 0.005, 0.0, scores)


def sum_of_two(steps: int = STEPS) -> Task:
    numbers = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
    sums = numbers.sum(1, keepdim=True)
    scores = {
        f"{first:g} + {second:g}": ("{:.4f}", lambda outputs, _, row=row: outputs[row].item())
        for row, (first, second) in enumerate(numbers.tolist())
    }
    data = [numbers, numbers, sums, sums]
    return Task("Sum of two", data, (2, 8, 1), "MSELoss", steps, 4, 0.005, 0.0, scores)


def main() -> None:
    for task in (digits(), diabetes(), sum_of_two()):
        print(task.title)
        curves = []
        for nn in (torch.nn, pyfused.nn):
            model = task.build(nn)
            curves.append(list(task.train(model, getattr(nn, task.loss)())))
            found = (f"{n} {task.scores[n][0].format(x)}" for n, x in task.test(model).items())
            print(f"{nn.__name__:<10}  last loss {curves[-1][-1]:.6f}  {'  '.join(found)}")
        require_equal(*curves, TOLERANCE)


if __name__ == "__main__":
    main()
