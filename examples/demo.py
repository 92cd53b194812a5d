"""Train the examples with torch and with pyfused; print and plot the comparison.

    python examples/demo.py            three minutes on two idle cores
    python examples/demo.py --quick    a minute

Exits with 1 if the loss curves of an example differ by more than its tolerance.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import common
import gpt
import small_models
import torch
from common import STYLES, announce, draw_bars, largest_difference, track
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table
from small_models import Task

import pyfused.nn

MODULES = {"torch": torch.nn, "pyfused": pyfused.nn}
COLOURS = {name: STYLES[name][0] for name in gpt.IMPLEMENTATIONS}

T = TypeVar("T")


@dataclass
class Row:
    """A row of the table: the values of the implementations."""

    label: str
    values: dict[str, float]
    form: str
    ratio: bool = False


@dataclass
class Job:
    """The results of an example for each implementation."""

    title: str
    losses: dict[str, list[float]]
    tolerance: float
    rows: list[Row]
    note: str = ""

    @property
    def difference(self) -> float:
        first, *others = self.losses.values()
        return max(largest_difference(first, losses) for losses in others)

    @property
    def equal(self) -> bool:
        return self.difference <= self.tolerance


def timed(losses: Iterator[float]) -> Iterator[tuple[float, float]]:
    """Yields each step's loss and its time in milliseconds."""
    started = time.perf_counter()
    for loss in losses:
        yield loss, 1e3 * (time.perf_counter() - started)
        started = time.perf_counter()


def take_turns(title: str, runs: dict[str, Iterator[T]], steps: int) -> dict[str, list[T]]:
    """Runs the steps of all runs alternately; other load then affects all of them alike."""
    # The first steps take longer: they start the processes.
    taken = {name: [next(run)] for name, run in track(runs.items(), f"{title}, first steps")}
    for name, run in track([*runs.items()] * (steps - 1), title):
        taken[name].append(next(run))
    assert all(next(run, None) is None for run in runs.values())  # which ends the processes
    return taken


def train_small(task: Task) -> Job:
    models = {name: task.build(nn) for name, nn in MODULES.items()}
    losses = {name: getattr(nn, task.loss)() for name, nn in MODULES.items()}
    runs = {name: timed(task.train(models[name], losses[name])) for name in MODULES}
    taken = take_turns(task.title, runs, task.steps)
    curves = {name: [loss for loss, _ in run] for name, run in taken.items()}
    step_ms = {name: statistics.median(ms for _, ms in run) for name, run in taken.items()}
    rows = [Row("whole step", step_ms, "{:.3f} ms", ratio=True)]
    scores = {name: task.test(model) for name, model in models.items()}
    for label, (form, _) in task.scores.items():
        rows.append(Row(label, {name: known[label] for name, known in scores.items()}, form))
    note = "so small that torch's operators run"
    return Job(task.title, curves, small_models.TOLERANCE, rows, note)


def train_gpt(steps: int) -> list[tuple[Job, dict[str, list[gpt.Step]]]]:
    """Returns the results by default, and with `pyfused.memory.keep()`."""
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder, "tokens.pt")
        vocabulary = gpt.load(tokens)["vocabulary"]
        runs = {
            f"{name}, keep" if keep else name: gpt.train_in_a_process(name, tokens, steps, keep)
            for keep in (False, True)
            for name in COLOURS
        }
        taken = take_turns("GPT", runs, steps)
    default = {name: taken[name] for name in COLOURS}
    kept = {name: taken[f"{name}, keep"] for name in COLOURS}
    return [
        (summarise("GPT", default, vocabulary), default),
        (summarise("GPT with keep", kept, vocabulary), kept),
    ]


def summarise(title: str, taken: dict[str, list[gpt.Step]], vocabulary: int) -> Job:
    losses = {name: [step.loss for step in run] for name, run in taken.items()}
    entries = dict.fromkeys(taken, vocabulary)
    job = Job(title, losses, gpt.TOLERANCE, [Row("vocabulary", entries, "{:,}")])
    held_out = {
        name: [step.held_out_loss for step in run if step.held_out_loss is not None][-1]
        for name, run in taken.items()
    }
    job.rows.append(Row("held-out loss", held_out, "{:.4f}"))
    for label, attribute in {"head and loss": "loss_ms", "whole step": "step_ms"}.items():
        times = {
            name: statistics.median(getattr(step, attribute) for step in run)
            for name, run in taken.items()
        }
        job.rows.append(Row(label, times, "{:.1f} ms", ratio=True))
    peaks = {name: run[-1].peak_mib for name, run in taken.items()}
    known = {name: peak for name, peak in peaks.items() if peak is not None}
    if len(known) == len(peaks):
        job.rows.append(Row("peak memory", known, "{:,.0f} MiB", ratio=True))
    return job


def tabulate(jobs: list[Job]) -> Table:
    caption = (
        "pyfused: its loss of all logits\n"
        "pyfused, linear: linear_cross_entropy, which stores a block of them\n"
        "ratio: torch / pyfused; equal: the largest difference between the loss curves"
    )
    table = Table("", *COLOURS, "ratio", "equal", caption=caption)
    for column in table.columns[1:]:
        column.justify = "right"
    for job in jobs:
        steps = len(job.losses["torch"])
        table.add_row(f"[bold]{job.title}[/], {steps:,} steps{job.note and ','} {job.note}")
        last = [f"{job.losses[name][-1]:.6f}" if name in job.losses else "" for name in COLOURS]
        verdict = "[green]yes[/]" if job.equal else "[bold red]NO[/]"
        table.add_row("last loss", *last, "", f"{verdict}, {job.difference:.0e}")
        for row in job.rows:
            known = row.values
            values = [row.form.format(known[name]) if name in known else "" for name in COLOURS]
            ratios = [f"{known['torch'] / known[name]:.2f}x" for name in known if name != "torch"]
            table.add_row(row.label, *values, ", ".join(ratios) if row.ratio else "")
        table.add_section()
    return table


def conclude(default: Job, kept: Job) -> str:
    """Returns the two lines that follow from the training of the GPT."""
    rows = {row.label: row.values for row in default.rows}
    step, loss, peak = (rows.get(x) for x in ("whole step", "head and loss", "peak memory"))
    kept_step = next(row.values for row in kept.rows if row.label == "whole step")
    assert step is not None
    assert loss is not None
    name = "pyfused, linear"
    memory = f", {peak[name] / peak['torch']:.2f} of torch's memory" if peak else ""
    faster, with_keep = (times["torch"] / times[name] for times in (step, kept_step))
    return (
        f"{name}: {faster:.1f} times as fast ({with_keep:.1f} with keep){memory}.\nIts head takes"
        f" {loss[name] / loss['pyfused']:.2f} of pyfused's time with all logits, for less memory."
    )


def draw_curves(axes: Axes, job: Job, loss: str, window: int = 1) -> None:
    """Plots the mean loss of each window of steps."""
    # A thin line is drawn over a broad one: both are visible where they agree.
    for (name, losses), width in zip(job.losses.items(), (5, 2.5, 1.2), strict=False):
        steps = range(window, len(losses) + 1, window)
        means = [statistics.fmean(losses[step - window : step]) for step in steps]
        axes.plot(steps, means, color=COLOURS[name], linewidth=width, label=name)
    xlabel = "step" if window == 1 else f"step (means of {window})"
    axes.set(title=f"{job.title}, training loss", xlabel=xlabel, ylabel=loss)


def draw(small_jobs: list[Job], gpt_runs: list[tuple[Job, dict[str, list[gpt.Step]]]]) -> Figure:
    figure = Figure(figsize=(13, 8), layout="constrained")
    upper = ["gpt"] * 4 + ["digits"] * 2 + ["diabetes"] * 2
    panels = figure.subplot_mosaic([upper, ["time"] * 5 + ["memory"] * 3])
    versions = f"torch {torch.__version__} and pyfused {pyfused.__version__}"
    figure.suptitle(f"{versions}, from the same seeds, on {common.threads()}")
    digits_job, diabetes_job, _ = small_jobs
    (gpt_job, gpt_steps), (_, kept_steps) = gpt_runs

    draw_curves(panels["gpt"], gpt_job, "cross-entropy (nats per token)")
    for (name, run), size in zip(gpt_steps.items(), (11, 7, 4), strict=True):
        held_out = {n: step.held_out_loss for n, step in enumerate(run, 1) if step.held_out_loss}
        panels["gpt"].plot(
            list(held_out),
            list(held_out.values()),
            "o",
            color=COLOURS[name],
            markersize=size,
            markeredgecolor="black",
            label=f"{name}, held-out loss",
        )
    draw_curves(panels["digits"], digits_job, "cross-entropy (nats per image)", window=20)
    panels["digits"].set_yscale("log")
    draw_curves(panels["diabetes"], diabetes_job, "mean squared error (target variances)")

    settings = {"by default": gpt_steps, "with keep": kept_steps}
    times = {
        f"{part},\n{setting}": {
            name: [getattr(step, attribute) for step in run] for name, run in steps.items()
        }
        for part, attribute in (("head and loss", "loss_ms"), ("whole step", "step_ms"))
        for setting, steps in settings.items()
    }
    draw_bars(panels["time"], times)
    title = "GPT, time per step (ratio: torch / pyfused)"
    panels["time"].set(title=title, ylabel="milliseconds (median and middle half)")
    peaks = {
        setting: {name: [run[-1].peak_mib or 0.0] for name, run in steps.items()}
        for setting, steps in settings.items()
    }
    if all(peak for known in peaks.values() for (peak,) in known.values()):
        draw_bars(panels["memory"], peaks)
        panels["memory"].set(title="GPT, peak memory of the process", ylabel="MiB")
    else:
        panels.pop("memory").remove()

    for name, axes in panels.items():
        if name in ("gpt", "digits", "diabetes"):
            axes.legend()
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="About three minutes on two cores, with --quick one.",
    )
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo", "pyfused-demo.png"),
        help="the output file of the plot (default: %(default)s)",
    )
    arguments = parser.parse_args()

    announce(parser)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a second thread slows down steps this short
    epochs = 5 if arguments.quick else small_models.EPOCHS
    tasks = small_models.digits(epochs), small_models.diabetes(), small_models.sum_of_two()
    small_jobs = [train_small(task) for task in tasks]
    torch.set_num_threads(threads)
    gpt_runs = train_gpt(8 if arguments.quick else gpt.STEPS)

    console = common.console()
    jobs = [*small_jobs, *(job for job, _ in gpt_runs)]
    console.print(tabulate(jobs))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    draw(small_jobs, gpt_runs).savefig(arguments.output, dpi=150)
    console.print(f"drawn in {arguments.output}")
    console.print(conclude(*jobs[-2:]), highlight=False)

    different = [job.title for job in jobs if not job.equal]
    if different:
        sys.exit(f"the loss curves differ by more than the tolerance: {', '.join(different)}")


if __name__ == "__main__":
    main()
