"""What the examples share: progress, comparing runs, measuring memory, colours, drawing bars."""

from __future__ import annotations

import statistics
import sys
import threading
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SECONDS = 10  # between two lines of progress

T = TypeVar("T")


def announce(parser: ArgumentParser) -> None:
    """Prints what an example does, and about how long it takes."""
    print(parser.description, parser.epilog, flush=True)


def track(items: Iterable[T], title: str, total: int | None = None) -> Iterator[T]:
    """Yields the items, and shows how many are done, and for how long.

    If the output is not a terminal, lines replace the bar: after a second, then regularly.

    Args:
        total: The number of items; None for their length.
    """
    if total is None:
        assert isinstance(items, Sized)
        total = len(items)
    columns = TextColumn("{task.description:<26}"), BarColumn(), MofNCompleteColumn()
    elapsed, output, done = TimeElapsedColumn(), console(), threading.Event()
    with Progress(*columns, elapsed, console=output, auto_refresh=output.is_terminal) as progress:
        bar = progress.add_task(title, total=total)
        lines = threading.Thread(target=_print_lines, args=(progress.tasks[0], done), daemon=True)
        if not output.is_terminal:
            lines.start()
        try:
            for item in items:
                yield item
                progress.advance(bar)
        finally:
            done.set()


def _print_lines(task: Task, done: threading.Event) -> None:
    seconds = 1
    while not done.wait(seconds):
        seconds, steps = SECONDS, f"{task.completed:,.0f} of {task.total:,.0f}"
        print(f"{task.description}: {steps}, {task.elapsed:.0f} s", flush=True)


def largest_difference(losses: Sequence[float], others: Sequence[float]) -> float:
    """Returns the largest difference between two loss curves, relative to the largest loss."""
    first, second = torch.tensor([losses, others], dtype=torch.float64)
    return ((first - second).abs().max() / first.abs().max()).item()


def require_equal(losses: Sequence[float], others: Sequence[float], tolerance: float) -> None:
    """Ends the program if two loss curves differ by more than the tolerance, or are NaN."""
    difference = largest_difference(losses, others)
    print(f"largest difference between the loss curves: {difference:.1e} of the largest loss")
    if not difference <= tolerance:
        sys.exit(f"the loss curves differ by more than the tolerance, {tolerance:.0e}")


def threads() -> str:
    count = torch.get_num_threads()
    return "1 thread" if count == 1 else f"{count} threads"


def peak_memory() -> float | None:
    """Returns the peak memory of this process in MiB, None if the platform does not report it."""
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return _status("VmHWM")  # unlike ru_maxrss, not inherited from the parent process


def resident_memory() -> float | None:
    """Returns the memory of this process in MiB, None if the platform does not report it."""
    return _status("VmRSS")


def _status(key: str) -> float | None:
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) / 2**10
    return None


def console() -> Console:
    """Returns a console that is wide enough for tables if the output is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else 110)


# ---- colours -------------------------------------------------------------------------------------

# Each has a contrast of about 3 or more to white and to black, and the first five are
# distinguishable with colour blindness (adapted from Okabe and Ito). An implementation has the same
# colour in each plot.
BLUE, GREEN, ORANGE, PINK, YELLOW = "#2A86C7", "#009E73", "#D55E00", "#CC79A7", "#B8860B"
PURPLE, GREY = "#7B61C9", "#808080"

# The colour and the marker of each implementation that is compared.
STYLES = {
    "torch": (BLUE, "o"),
    "torch, keep": (PURPLE, "s"),
    "torch.compile": (GREEN, "D"),
    "torch.compile, keep": (GREEN, "D"),
    "pyfused": (ORANGE, "o"),
    "pyfused, linear": (PINK, "v"),
    "liger": (YELLOW, "v"),
    "Liger": (YELLOW, "v"),
    "cut-cross-entropy": (PINK, "s"),
    "copy": (GREY, "^"),
}

# The colours and markers of curves that are not implementations.
SERIES = ((BLUE, "o"), (ORANGE, "s"), (GREEN, "D"), (PINK, "^"), (YELLOW, "v"), (PURPLE, "P"))


def draw_bars(axes: Axes, groups: Mapping[str, Mapping[str, list[float]]]) -> None:
    """Draws medians as bars, with the interquartile range as a line, and a legend.

    Args:
        groups: The values of each bar, by group and implementation. Bars are labelled with
            the ratio of the first median of their group to their median.
    """
    labels, tallest = [], 0.0
    for place, (title, group) in enumerate(groups.items()):
        medians, width = [], 0.8 / len(group)
        for index, (name, values) in enumerate(group.items()):
            x = place + (index - (len(group) - 1) / 2) * width
            several = values if len(values) > 1 else values * 2
            low, median, high = statistics.quantiles(several, n=4)
            label = name if place == 0 else None
            axes.bar(x, median, width, color=STYLES[name][0], label=label)
            axes.plot([x, x], [low, high], color="black")
            above = {"textcoords": "offset points", "ha": "center"}
            axes.annotate(f"{median:,.0f}", (x, high), (0, 3), **above)
            medians.append(median)
            tallest = max(tallest, high)
        ratios = ", ".join(f"{medians[0] / median:.1f}" for median in medians[1:])
        labels.append(f"{title}\nratio {ratios}")
    axes.set_xticks(range(len(groups)), labels)
    axes.set_ylim(0, 1.3 * tallest)  # leaves room for labels and legend
    axes.legend(loc="upper center", ncols=3, columnspacing=1, handlelength=1, frameon=False)
