"""Train small models with several losses, on data for which the choice of loss matters.

    python examples/losses.py
    python examples/losses.py --quick

The data are a line with outliers, rare positives, counts, and noise that is not constant. Each
model is trained with several losses from the same seed, and evaluated on test data. Losses that
torch has are also trained with torch; the losses of all steps must agree within rounding.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

# By default, torch's operators compute data as small as this.
os.environ.setdefault("PYFUSED_BACKEND", "cpu")

import common
import torch
from common import SERIES, announce, largest_difference, track
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from rich.table import Table
from sklearn import datasets, metrics
from sklearn.model_selection import train_test_split
from torch import Tensor

import pyfused.functional

STEPS, QUICK_STEPS = 400, 150
LEARNING_RATE = 0.01
# Rounding errors accumulate over the steps.
TOLERANCE = 1e-4
COLOURS = [colour for colour, _ in SERIES]
# The 80 % prediction interval: its quantiles, and its half width in standard deviations.
QUANTILES, DEVIATIONS = (0.1, 0.9), 1.2816


@dataclass(frozen=True)
class Choice:
    """A loss to train with, and a function that calls it with a model's output and target."""

    label: str
    function: str
    loss: Callable[[ModuleType, Tensor, Tensor], Tensor]

    @property
    def in_torch(self) -> bool:
        return hasattr(torch.nn.functional, self.function)


@dataclass(frozen=True)
class Experiment:
    """Data, a model, and losses to compare.

    Attributes:
        data: Training inputs, test inputs, training targets, test targets.
        outputs: The number of outputs of the model.
        hidden: The number of hidden units; 0 for a linear model.
        judge: Evaluates the outputs for the test inputs.
        draw: Plots the outputs for the test inputs.
    """

    title: str
    data: tuple[Tensor, Tensor, Tensor, Tensor]
    outputs: int
    hidden: int
    choices: tuple[Choice, ...]
    judge: Callable[[Experiment, Choice, Tensor], dict[str, str]]
    draw: Callable[[Axes, Experiment, dict[str, Tensor]], None]


@dataclass
class Result:
    """The result of training with one loss; torch_losses is None if torch lacks it."""

    choice: Choice
    losses: list[float]
    torch_losses: list[float] | None
    outputs: Tensor

    @property
    def difference(self) -> float:
        return largest_difference(self.torch_losses or self.losses, self.losses)


def train(
    functional: ModuleType, experiment: Experiment, choice: Choice, steps: int
) -> tuple[list[float], Tensor]:
    """Trains on all rows in each step; returns the losses, and the outputs for the test inputs."""
    inputs, test_inputs, targets, _ = experiment.data
    torch.manual_seed(0)
    features, hidden = inputs.shape[1], experiment.hidden
    layers = [torch.nn.Linear(hidden or features, experiment.outputs)]
    if hidden:
        layers = [torch.nn.Linear(features, hidden), torch.nn.Tanh(), *layers]
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = choice.loss(functional, model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        return losses, model(test_inputs)


def run(experiment: Experiment, steps: int) -> list[Result]:
    results = []
    for choice in track(experiment.choices, experiment.title):
        losses, outputs = train(pyfused.functional, experiment, choice, steps)
        of_torch = None
        if choice.in_torch:
            of_torch, _ = train(torch.nn.functional, experiment, choice, steps)
        results.append(Result(choice, losses, of_torch, outputs))
    return results


def a_feature(rows: int) -> tuple[Tensor, Tensor, torch.Generator]:
    """Returns a standardised feature, a linear function of it, and a generator for noise."""
    features, targets = datasets.make_regression(rows, n_features=1, random_state=0)
    columns = torch.tensor(features), torch.tensor(targets)
    x, y = ((column / column.std()).float() for column in columns)
    return x, y, torch.Generator().manual_seed(0)


def split(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(train_test_split(inputs, targets, random_state=0))


# ---- outliers ------------------------------------------------------------------------------------


def outliers() -> Experiment:
    """One in eight training targets is far too small, increasingly to the right."""
    x, y, generator = a_feature(1000)
    y += 0.2 * torch.randn(y.shape, generator=generator)
    inputs, test_inputs, targets, test_targets = split(x, y)
    wrong = torch.rand(targets.shape, generator=generator) < 0.25
    targets = torch.where(wrong & (inputs[:, 0] > 0), targets - 4, targets)
    return Experiment(
        "A line through outliers",
        (inputs, test_inputs, targets, test_targets),
        outputs=1,
        hidden=0,
        choices=(
            Choice("mse", "mse_loss", lambda f, out, y: f.mse_loss(out[:, 0], y)),
            Choice("l1", "l1_loss", lambda f, out, y: f.l1_loss(out[:, 0], y)),
            Choice(
                "smooth_l1, beta 0.5",
                "smooth_l1_loss",
                lambda f, out, y: f.smooth_l1_loss(out[:, 0], y, beta=0.5),
            ),
            Choice("huber, delta 1", "huber_loss", lambda f, out, y: f.huber_loss(out[:, 0], y)),
            Choice(
                "quantile 0.5",
                "quantile_loss",
                lambda f, out, y: f.quantile_loss(out[:, 0], y, quantile=0.5),
            ),
        ),
        judge=errors,
        draw=draw_lines,
    )


def errors(experiment: Experiment, _: Choice, outputs: Tensor) -> dict[str, str]:
    error = outputs[:, 0] - experiment.data[3]
    size = error.abs()
    return {
        "mean error": f"{size.mean():.3f}",
        "median error": f"{size.median():.3f}",
        "bias": f"{error.mean():+.3f}",
    }


def style(index: int, count: int) -> dict[str, Any]:
    """Returns the style of one of several lines, which are all visible where they agree.

    Thinner lines, with white edges, are drawn over broader ones.
    """
    width = 1.2 + 1.6 * (count - index - 1)
    edge = withStroke(linewidth=width + 0.6, foreground="white")
    return {"color": COLOURS[index], "linewidth": width, "path_effects": [edge]}


def draw_lines(axes: Axes, experiment: Experiment, outputs: dict[str, Tensor]) -> None:
    inputs, test_inputs, targets, _ = experiment.data
    axes.plot(inputs[:, 0], targets, ".", color="0.75", markersize=3)
    order = test_inputs[:, 0].argsort()
    for index, (label, out) in enumerate(outputs.items()):
        axes.plot(test_inputs[order, 0], out[order, 0], label=label, **style(index, len(outputs)))
    axes.set(xlabel="input", ylabel="target")


# ---- rare positives ------------------------------------------------------------------------------


def rare() -> Experiment:
    """One row in twenty is positive, and the classes overlap."""
    features, labels = datasets.make_classification(
        8000, 10, n_informative=4, weights=[0.95], class_sep=0.9, flip_y=0.01, random_state=2
    )
    data = split(torch.tensor(features).float(), torch.tensor(labels).float())
    positives = data[2].mean()
    rarity = (1 - positives) / positives
    return Experiment(
        "Rare positives",
        data,
        outputs=1,
        hidden=16,
        choices=(
            Choice(
                "bce_with_logits",
                "binary_cross_entropy_with_logits",
                lambda f, out, y: f.binary_cross_entropy_with_logits(out[:, 0], y),
            ),
            Choice(
                f"the same, pos_weight {rarity:.0f}",
                "binary_cross_entropy_with_logits",
                lambda f, out, y: f.binary_cross_entropy_with_logits(
                    out[:, 0], y, pos_weight=rarity
                ),
            ),
            Choice(
                "sigmoid_focal, alpha 0.75",
                "sigmoid_focal_loss",
                lambda f, out, y: f.sigmoid_focal_loss(
                    out[:, 0], y, alpha=0.75, gamma=2.0, reduction="mean"
                ),
            ),
            Choice("hinge", "hinge_loss", lambda f, out, y: f.hinge_loss(out[:, 0], 2 * y - 1)),
        ),
        judge=found,
        draw=draw_found,
    )


def shares(experiment: Experiment, outputs: Tensor) -> dict[str, float]:
    labels, found = experiment.data[3], outputs[:, 0] > 0
    return {
        "recall": metrics.recall_score(labels, found),
        "precision": metrics.precision_score(labels, found, zero_division=0),
        "F1": metrics.f1_score(labels, found),
    }


def found(experiment: Experiment, _: Choice, outputs: Tensor) -> dict[str, str]:
    return {name: f"{share:.1%}" for name, share in shares(experiment, outputs).items()}


def draw_found(axes: Axes, experiment: Experiment, outputs: dict[str, Tensor]) -> None:
    for index, (label, out) in enumerate(outputs.items()):
        of = shares(experiment, out)
        places = [place + 0.2 * index - 0.3 for place in range(len(of))]
        axes.bar(places, list(of.values()), 0.2, color=COLOURS[index], label=label)
    axes.set_xticks(range(len(of)), of)
    axes.set(ylabel="score on the test rows", ylim=(0, 1))


# ---- counts --------------------------------------------------------------------------------------


def counts() -> Experiment:
    """Targets are counts whose log-rate is linear in the input."""
    x, y, generator = a_feature(1000)
    return Experiment(
        "Counts",
        split(x, torch.poisson(y.exp(), generator)),
        outputs=1,
        hidden=0,
        choices=(
            Choice("mse", "mse_loss", lambda f, out, y: f.mse_loss(out[:, 0], y)),
            Choice(
                "poisson_nll",
                "poisson_nll_loss",
                lambda f, out, y: f.poisson_nll_loss(out[:, 0], y),
            ),
        ),
        judge=deviance,
        draw=draw_rates,
    )


def rates(choice: str, outputs: Tensor) -> Tensor:
    return outputs[:, 0].exp() if choice.startswith("poisson") else outputs[:, 0]


def deviance(experiment: Experiment, choice: Choice, outputs: Tensor) -> dict[str, str]:
    rate = rates(choice.label, outputs)
    deviance = metrics.mean_poisson_deviance(experiment.data[3], rate.clamp(min=1e-2))
    return {"deviance": f"{deviance:.2f}", "rates below 0": f"{(rate < 0).float().mean():.0%}"}


def draw_rates(axes: Axes, experiment: Experiment, outputs: dict[str, Tensor]) -> None:
    draw_lines(axes, experiment, {name: rates(name, out)[:, None] for name, out in outputs.items()})
    axes.set_ylim(-3, 20)


# ---- spread --------------------------------------------------------------------------------------


def spread() -> Experiment:
    """The noise grows from left to right."""
    x, y, generator = a_feature(2000)
    noise = 0.1 + torch.sigmoid(2 * x[:, 0])
    return Experiment(
        "Spread",
        split(x, y + noise * torch.randn(y.shape, generator=generator)),
        outputs=2,
        hidden=16,
        choices=(
            Choice("mse, one spread", "mse_loss", lambda f, out, y: f.mse_loss(out[:, 0], y)),
            Choice(
                "gaussian_nll",
                "gaussian_nll_loss",
                lambda f, out, y: f.gaussian_nll_loss(out[:, 0], y, out[:, 1].exp()),
            ),
            Choice(
                "quantile 0.1 and 0.9",
                "quantile_loss",
                lambda f, out, y: sum(
                    f.quantile_loss(out[:, place], y, quantile=quantile)
                    for place, quantile in enumerate(QUANTILES)
                ),
            ),
        ),
        judge=coverage,
        draw=draw_bands,
    )


def interval(experiment: Experiment, choice: str, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the bounds of the predicted 80 % interval."""
    first, second = outputs.unbind(1)
    if choice.startswith("quantile"):
        return first, second
    deviation = (second / 2).exp()
    if choice.startswith("mse"):  # predicts no interval: use the deviation of all errors
        deviation = (experiment.data[3] - first).std().expand_as(first)
    return first - DEVIATIONS * deviation, first + DEVIATIONS * deviation


def coverage(experiment: Experiment, choice: Choice, outputs: Tensor) -> dict[str, str]:
    _, inputs, _, targets = experiment.data
    low, high = interval(experiment, choice.label, outputs)
    inside = ((low < targets) & (targets < high)).float()
    left = inputs[:, 0] < 0
    return {
        "80 % interval holds": f"{inside.mean():.0%}",
        "left": f"{inside[left].mean():.0%}",
        "right": f"{inside[~left].mean():.0%}",
    }


def draw_bands(axes: Axes, experiment: Experiment, outputs: dict[str, Tensor]) -> None:
    _, inputs, _, targets = experiment.data
    axes.plot(inputs[:, 0], targets, ".", color="0.75", markersize=3)
    order = inputs[:, 0].argsort()
    for index, (label, out) in enumerate(outputs.items()):
        for edge, name in zip(interval(experiment, label, out), (label, None), strict=True):
            axes.plot(inputs[order, 0], edge[order], label=name, **style(index, len(outputs)))
    axes.set(xlabel="input", ylabel="target")


# ---- all experiments -----------------------------------------------------------------------------

EXPERIMENTS = (outliers, rare, counts, spread)


def tabulate(experiment: Experiment, results: list[Result]) -> Table:
    rows = [experiment.judge(experiment, result.choice, result.outputs) for result in results]
    table = Table("", *rows[0], "difference to torch", title=experiment.title, title_justify="left")
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify = "right"
    for result, row in zip(results, rows, strict=True):
        difference = "-" if result.torch_losses is None else f"{result.difference:.0e}"
        table.add_row(result.choice.label, *row.values(), difference)
    return table


def draw(found: list[tuple[Experiment, list[Result]]]) -> Figure:
    figure = Figure(figsize=(18, 9), layout="constrained")
    figure.suptitle(
        "Top: models trained with each loss; later lines are thinner, so that all remain visible.\n"
        "Bottom: training losses of torch (broad, pale) and of pyfused (thin) in the same colours; "
        "torch has no quantile, focal or hinge loss."
    )
    panels = figure.subplots(2, len(found), squeeze=False)
    for (experiment, results), (learnt, curves) in zip(found, panels.T, strict=True):
        experiment.draw(learnt, experiment, {r.choice.label: r.outputs for r in results})
        learnt.set_title(experiment.title)
        place = {"loc": "lower left", "bbox_to_anchor": (-0.05, 1.08), "ncols": 2}
        learnt.legend(**place, frameon=False, fontsize=9, columnspacing=1)
        for result, colour in zip(results, COLOURS, strict=False):
            if result.torch_losses is not None:
                curves.plot(result.torch_losses, color=colour, linewidth=6, alpha=0.3)
            curves.plot(result.losses, color=colour, linewidth=1.2)
        curves.set(xlabel="step", ylabel="training loss")
        for axes in (learnt, curves):
            axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="About 15 seconds, with --quick six."
    )
    parser.add_argument("--quick", action="store_true", help="fewer steps: seconds")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo", "losses.png"),
        help="the output file of the plot (default: %(default)s)",
    )
    arguments = parser.parse_args()
    announce(parser)
    torch.set_num_threads(1)  # a second thread slows down steps this short

    console, trained = common.console(), []
    for make in EXPERIMENTS:
        experiment = make()
        results = run(experiment, QUICK_STEPS if arguments.quick else STEPS)
        different = [r.choice.label for r in results if not r.difference <= TOLERANCE]
        if different:
            sys.exit(f"the loss curves differ by more than the tolerance: {', '.join(different)}")
        console.print(tabulate(experiment, results))
        trained.append((experiment, results))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    draw(trained).savefig(arguments.output, dpi=120)
    console.print(f"drawn in {arguments.output}")
    console.print("In every step, torch and pyfused have the same loss.")
    console.print("Which loss suits the data matters more: compare the rows of each table.")


if __name__ == "__main__":
    main()
