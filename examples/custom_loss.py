"""Train with a custom loss and a custom activation, and compare with torch's.

    python examples/custom_loss.py

MSELoss and SiLU are written as formulas, which are compiled to fused kernels. A network predicts
the progression of diabetes, once with them and once with torch's modules, from the same seed. The
losses of all steps must agree within rounding.
"""

from __future__ import annotations

import argparse
import os

# By default, formulas run unfused on tensors as small as these.
os.environ.setdefault("PYFUSED_BACKEND", "cpu")

import torch
from common import announce, require_equal, track
from small_models import STEPS, TOLERANCE, diabetes
from torch import Tensor

import pyfused


@pyfused.loss
def squared_error(input: Tensor, target: Tensor) -> Tensor:
    return (input - target) ** 2


@pyfused.activation
def swish(input: Tensor) -> Tensor:
    return input * torch.sigmoid(input)


def build(activation: torch.nn.Module, hidden: int = 8) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(10, hidden), activation, torch.nn.Linear(hidden, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="Seconds.")
    parser.add_argument("--steps", type=int, default=STEPS, help="default: %(default)s")
    steps = parser.parse_args().steps
    announce(parser)
    torch.set_num_threads(1)  # a second thread slows down steps this short

    print(swish.explain(), end="\n\n")
    task = diabetes(steps)
    targets = task.data[2]
    print(squared_error.explain(targets, targets), end="\n\n")
    curves = []
    for name, activation, criterion in (
        ("torch", torch.nn.SiLU(), torch.nn.MSELoss()),
        ("custom", swish.module(), squared_error.module(reduction="mean")),
    ):
        model = build(activation)
        losses = list(track(task.train(model, criterion), f"Diabetes, {name}", steps))
        explained = task.test(model)["test R squared"]
        print(f"{name:<10}  last loss {losses[-1]:.6f}  test R squared {explained:.4f}")
        curves.append(losses)
    require_equal(*curves, TOLERANCE)
    print("The two formulas train as torch's modules do, and each runs as one kernel.")
    print("Formulas of several operators gain most on large tensors: see docs/formulas.md.")


if __name__ == "__main__":
    main()
