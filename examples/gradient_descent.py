"""Minimise each loss over one weight, with a small, a medium and a large learning rate.

    python examples/gradient_descent.py    seconds

For some losses, the weight is the prediction, and the target is 0. For others, the weight is a
logit, to which the model or the loss applies a sigmoid (Poisson: exp), and one target in five is 1,
the others 0. The table lists all losses, and the plot shows eight of them. If the slope of a loss
is constant, steps do not shrink near the target. If a step overshoots to where the sigmoid is flat,
the gradient of the squared error vanishes; the gradient of cross-entropy does not.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("PYFUSED_BACKEND", "cpu")  # no fallback for small tensors

import common
import torch
from common import SERIES, announce, largest_difference, track
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

import pyfused.functional

STEPS = 10
RATES = "small rate", "medium rate", "large rate"
CLOSE = 0.02  # to the minimum of the loss, relative to the distance at the start
COLOURS = [colour for colour, _ in SERIES[:3]]
TOLERANCE = 1e-5
ZERO, ONE_IN_FIVE = (0.0,), (0.0, 0.0, 0.0, 0.0, 1.0)


@dataclass(frozen=True)
class Descent:
    """A loss to minimise.

    Attributes:
        rates: A small, a medium and a large learning rate.
        start, reach: The initial weight, and the limit of weights in the plot.
        before: The function applied to the weight before the loss.
        options: Other arguments of the loss; numbers in a tuple are more operands.
        signs: Whether targets are -1 and 1 instead of 0 and 1.
    """

    function: str
    rates: tuple[float, float, float]
    targets: tuple[float, ...] = ZERO
    start: float = 2.0
    reach: float = 3.0
    before: Callable[[Tensor], Tensor] | None = None
    operands: tuple[float, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    signs: bool = False

    @property
    def title(self) -> str:
        before = "" if self.before is None else f" of a {self.before.__name__}"
        return f"{self.function}{before}" + "".join(f", {k} {v:g}" for k, v in self.options.items())

    def loss(self, functional: ModuleType, weight: Tensor) -> Tensor:
        input = (weight if self.before is None else self.before(weight)).expand(len(self.targets))
        target = torch.tensor(self.targets)
        if self.signs:
            target = 2 * target - 1
        operands = (target, *(torch.full_like(target, value) for value in self.operands))
        function = getattr(functional, self.function)
        return function(input, *operands, **self.options, reduction="mean")


PREDICTIONS = (
    Descent("mse_loss", (0.03, 0.35, 1.08)),
    Descent("l1_loss", (0.03, 0.4, 3.5)),
    Descent("smooth_l1_loss", (0.05, 0.7, 3.0)),
    Descent("huber_loss", (0.1, 1.0, 6.0), options={"delta": 0.5}),
    Descent("log_cosh_loss", (0.05, 0.8, 4.0)),
    Descent("quantile_loss", (0.04, 0.6, 4.0), options={"quantile": 0.3}),
    Descent("gaussian_nll_loss", (0.1, 1.2, 4.3), operands=(2.0,)),
)
LOGITS = (
    Descent("mse_loss", (0.5, 12.0, 40.0), ONE_IN_FIVE, 4.0, 8.0, torch.sigmoid),
    Descent("binary_cross_entropy", (0.1, 3.0, 12.0), ONE_IN_FIVE, 4.0, 8.0, torch.sigmoid),
    Descent("binary_cross_entropy_with_logits", (0.1, 3.0, 12.0), ONE_IN_FIVE, 4.0, 8.0),
    Descent("sigmoid_focal_loss", (0.1, 4.0, 16.0), ONE_IN_FIVE, 4.0, 8.0, options={"gamma": 2.0}),
    Descent("soft_margin_loss", (0.1, 3.0, 12.0), ONE_IN_FIVE, 4.0, 8.0, signs=True),
    Descent("hinge_loss", (0.1, 1.2, 9.0), ONE_IN_FIVE, 4.0, 8.0, signs=True),
    Descent("poisson_nll_loss", (0.02, 0.4, 1.2), ONE_IN_FIVE, 1.5, 4.0),
)
DRAWN = tuple(PREDICTIONS[i] for i in (0, 1, 3, 5)), tuple(LOGITS[i] for i in (0, 2, 3, 5))


def descend(functional: ModuleType, descent: Descent, rate: float) -> list[tuple[float, float]]:
    """Returns the weight and the loss before each step, and after the last one."""
    weight = torch.tensor([descent.start], requires_grad=True)
    path = []
    for _ in range(STEPS + 1):
        loss = descent.loss(functional, weight)
        path.append((weight.item(), loss.item()))
        (gradient,) = torch.autograd.grad(loss, weight)
        with torch.no_grad():
            weight -= rate * gradient
    return path


def difference(descent: Descent, rate: float) -> float:
    """Returns the difference between torch's and pyfused's losses, 0 if torch lacks the loss."""
    if not hasattr(torch.nn.functional, descent.function):
        return 0.0
    paths = (descend(f, descent, rate) for f in (torch.nn.functional, pyfused.functional))
    return largest_difference(*([loss for _, loss in path] for path in paths))


def minimum(descent: Descent) -> tuple[float, float]:
    """Returns the weight with the smallest loss, and this loss."""
    with torch.no_grad():
        weights = torch.linspace(-descent.reach, descent.reach, 201)
        losses = [descent.loss(pyfused.functional, weight[None]).item() for weight in weights]
    return min(zip(weights.tolist(), losses, strict=True), key=lambda pair: pair[1])


def verdict(descent: Descent, path: list[tuple[float, float]]) -> str:
    """Returns whether the loss comes close to its minimum, and otherwise why not."""
    best, least = minimum(descent)
    (start, at_first), (_, last) = path[0], path[-1]
    if last - least <= CLOSE * (at_first - least):
        return "converges"
    crosses = any((weight - best) * (start - best) < 0 for weight, _ in path)
    return "overshoots" if crosses else "too slow"


def draw_descent(axes: Axes, descent: Descent, paths: list[list[tuple[float, float]]]) -> None:
    """Plots the weight over the steps for each rate, and the minimum of the loss."""
    axes.axhline(minimum(descent)[0], color="0.6", linestyle=":")
    for rate, path, colour in zip(descent.rates, paths, COLOURS, strict=True):
        label = f"{rate:g}\n{verdict(descent, path)}"
        axes.plot([weight for weight, _ in path], "o-", color=colour, label=label)
    axes.set_ylim(-descent.reach, descent.reach)
    axes.set_title(descent.title, loc="left", fontsize=11, pad=38)
    # Between the title and the lines, because some lines fill the plot.
    below_title = {"loc": "lower left", "bbox_to_anchor": (-0.02, 0.99)}
    narrow = {"fontsize": 9, "columnspacing": 1, "handlelength": 1}
    legend = axes.legend(**below_title, ncols=3, frameon=False, **narrow)
    legend.set_in_layout(False)  # else the axes would be as narrow as the legend allows
    axes.spines[["top", "right"]].set_visible(False)


def draw(paths: dict[str, list[list[tuple[float, float]]]]) -> Figure:
    figure = Figure(figsize=(15, 8), layout="constrained")
    figure.suptitle(
        f"{STEPS} steps of gradient descent with three learning rates; dotted: minimum of the loss"
    )
    rows = figure.subplots(2, len(DRAWN[0]), sharex=True, squeeze=False)
    for row, descents in zip(rows, DRAWN, strict=True):
        row[0].set_ylabel("weight")
        for axes, descent in zip(row, descents, strict=True):
            draw_descent(axes, descent, paths[descent.title])
    for axes in rows[-1]:
        axes.set_xlabel("step")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="Seconds.")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo", "gradient-descent.png"),
        help="the output file of the plot (default: %(default)s)",
    )
    arguments = parser.parse_args()
    announce(parser)
    torch.set_num_threads(1)  # a single weight needs no threads

    paths, different = {}, []
    table = Table(f"loss after {STEPS} steps", "at first", *RATES)
    for descent in track((*PREDICTIONS, *LOGITS), "Gradient descent"):
        paths[descent.title] = [
            descend(pyfused.functional, descent, rate) for rate in descent.rates
        ]
        values = [paths[descent.title][0][0][1], *(path[-1][1] for path in paths[descent.title])]
        table.add_row(descent.title, *(f"{value:.3f}" for value in values))
        if not max(difference(descent, rate) for rate in descent.rates) <= TOLERANCE:
            different.append(descent.title)
    table.columns[0].overflow = "fold"
    console = common.console()
    console.print(table)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    draw(paths).savefig(arguments.output, dpi=100)
    console.print(f"drawn in {arguments.output}")
    console.print("A weight takes the same path with torch and with pyfused.")
    console.print("Whether it reaches the minimum of a loss depends on the learning rate.")
    if different:
        sys.exit(f"the losses differ by more than the tolerance: {', '.join(different)}")


if __name__ == "__main__":
    main()
