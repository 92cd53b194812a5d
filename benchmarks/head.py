"""A language model's head and loss: bare products, torch's two ways, and linear_cross_entropy.

    python benchmarks/head.py            measures, and fills docs/language-models.md
    python benchmarks/head.py --quick    the smallest case alone, in the terminal

Forward and backward in one process by turns, new outputs and their freeing included. The peak is
what a process takes beyond the arguments and what it returns.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from measure import by_turns, quartiles, ratios, settle_allocator, timed
from memory import growth
from report import fill, machine, machine_info, slug, spread, tabulated
from rich.progress import Progress
from torch import Tensor

import pyfused.functional

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "language-models.md"
# Tokens, features, classes.
CASES = ((1024, 512, 32_000), (2048, 256, 128_256), (2048, 1024, 32_000))
CURVE = (4_000, 8_000, 16_000, 32_000, 64_000, 128_000)  # classes of 1024 tokens, 256 features
COLOURS = {"torch": "#0072B2", "torch, in chunks": "#009E73", "pyfused": "#D55E00"}
ROUNDS = 5


class Given:
    def __init__(self, tokens: int, features: int, classes: int) -> None:
        generator = torch.Generator().manual_seed(0)
        randn = partial(torch.randn, generator=generator)
        self.input = randn(tokens, features).requires_grad_()
        self.head = (randn(classes, features) / features**0.5).requires_grad_()
        self.target = torch.randint(0, classes, (tokens,), generator=generator)
        self.half = self.target.clone()
        self.half[torch.randperm(tokens, generator=generator)[: tokens // 2]] = -100
        self.logits = tokens * classes * 4  # bytes

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, (self.input, self.head))

    def bare(self) -> tuple[Tensor, ...]:
        """The products without which there are no gradients, of logits that happen to be there."""
        x, w = self.input.detach(), self.head.detach()
        logits = x @ w.t()
        return logits @ w, logits.t() @ x

    def reference(self) -> tuple[Tensor, ...]:
        return self.gradients(F.cross_entropy(F.linear(self.input, self.head), self.target))

    def in_chunks(self) -> tuple[Tensor, ...]:
        options = torch.nn.LinearCrossEntropyOptions()
        given = self.input, self.head, self.target
        return self.gradients(F.linear_cross_entropy(*given, options=options))

    def ours(self, target: Tensor | None = None, share: int | None = None) -> tuple[Tensor, ...]:
        target = self.target if target is None else target
        budget = None if share is None else self.logits // share
        loss = pyfused.functional.linear_cross_entropy(
            self.input, self.head, target, memory_budget=budget
        )
        return self.gradients(loss)

    def ways(self) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
        return {
            "three products": self.bare,
            "torch": self.reference,
            "torch, in chunks": self.in_chunks,
            "pyfused": self.ours,
            "pyfused, a 16th of the logits": partial(self.ours, share=16),
            "pyfused, half ignored": lambda: self.ours(self.half),
        }


def check(given: Given) -> None:
    """torch's gradients, before anything is timed."""
    for share in (None, 16):
        for ours, of_torch in zip(given.ours(share=share), given.reference(), strict=True):
            torch.testing.assert_close(
                ours, of_torch, rtol=1e-3, atol=1e-5 * float(of_torch.abs().max())
            )


def peak(way: str, case: tuple[int, ...]) -> int:
    """Bytes beyond the arguments and the gradients, in a process of its own."""
    command = [sys.executable, __file__, "--peak", way, *map(str, case)]
    # glibc would keep what is freed, and take it for the next call unseen.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return int(done.stdout)


def print_peak(way: str, case: tuple[int, ...]) -> None:
    given = Given(*case)
    held: list[Any] = []
    call = given.ways()[way]
    returned = 4 * (given.input.numel() + given.head.numel())
    print(growth(lambda _: held.append(call()) or held.clear()) - returned)


def measure(case: tuple[int, ...], progress: Progress) -> list[list[str]]:
    settle_allocator()
    given = Given(*case)
    check(given)
    ways = given.ways()
    bar = progress.add_task(str(case), total=ROUNDS * len(ways))

    def clock(call: Callable[[], object]) -> float:
        progress.advance(bar)
        return timed(call, 1)

    times = dict(
        zip(ways, by_turns([partial(clock, way) for way in ways.values()], ROUNDS), strict=True)
    )
    rows = []
    for way, taken in times.items():
        share = "" if way == "three products" else f"{peak(way, case) / given.logits:.2f}"
        rows.append(
            [
                f"({', '.join(map(str, case))})",
                way,
                f"{1e3 * quartiles(taken)[1]:.0f} ms",
                spread(ratios(taken, times["three products"])),
                spread(ratios(times["torch"], taken)),
                share,
            ]
        )
    return rows


def draw(progress: Progress) -> Figure:
    """Peak memory against the number of classes."""
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes: Axes = figure.subplots()
    bar = progress.add_task("memory", total=len(COLOURS) * len(CURVE))
    for way, colour in COLOURS.items():
        taken = []
        for classes in CURVE:
            taken.append(peak(way, (1024, 256, classes)) / 2**20)
            progress.advance(bar)
        axes.plot(CURVE, taken, "o-", color=colour, label=way)
    axes.plot(
        CURVE, [classes * 4 / 2**10 for classes in CURVE], ":", color="black", label="the logits"
    )
    axes.set(
        xlabel="classes",
        ylabel="MiB beyond arguments and gradients",
        title="Head and loss of 1,024 tokens, float32, forward and backward",
        ylim=(0, None),
    )
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the first case, and no file")
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print_peak(options.peak[0], tuple(map(int, options.peak[1:])))
        return
    with Progress(transient=True) as progress:
        cases = CASES[:1] if options.quick else CASES
        rows = [row for case in cases for row in measure(case, progress)]
        columns = ["tokens, features, classes", "", "time", "of three products"]
        columns += ["times as fast as torch", "peak / logits"]
        table = tabulated(columns, rows, names=2)
        if not options.quick:
            found = {
                "machine_info": machine_info(),
                "datetime": datetime.now(timezone.utc).isoformat(),
            }
            folder = ROOT / "benchmarks" / "results" / slug(found)
            folder.mkdir(parents=True, exist_ok=True)
            draw(progress).savefig(folder / "head-memory.png", dpi=110)
            fill(PAGE, f"{machine(found)}. Medians, and in brackets quartiles.\n\n{table}")
    print(table)


if __name__ == "__main__":
    main()
