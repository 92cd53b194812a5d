"""Time the launch choice of each kind of kernel beside its neighbours, on a GPU.

    python benchmarks/gpu_launch.py launch.md       # a table, to commit

A neighbour has half or twice the rows, the block or the threads of what `launch.choose` chooses.
Half the block of a whole row makes two passes. Each is called in turn, and medians are compared.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from cases import BF16, Arguments, Case, M, assert_right, draw, evaluate, step
from gpu import WARM_UP, Clock, machine_info

import pyfused.functional
from pyfused.kernels import launch
from pyfused.kernels.launch import Choice

ROUNDS = 20
CASES = (
    Case("cross_entropy", (262_144, 1000), BF16),
    Case("cross_entropy", (65_536, 4096), BF16),
    Case("cross_entropy", (8192, 32_000), BF16),
    Case("cross_entropy", (16, 21, 512, 512)),
    Case("mse_loss", (64 * M,), BF16),
    Case("gelu", (64 * M,), BF16),
    Case("softmax", (65_536, 4096), BF16),
    Case("cross_entropy", (65_536, 4096)),
    Case("cross_entropy", (16_384, 16_384), BF16),
    Case("cross_entropy", (8192, 32_000), BF16, probabilities=True),
    Case("cross_entropy", (8192, 32_000), BF16, weight=True, smoothing=0.1),
    Case("cross_entropy", (1 << 22, 10)),
    Case("softmax", (8192, 32_000), BF16),
    Case("multi_margin_loss", (65_536, 4096)),
    Case("nll_loss", (65_536, 4096)),
)
TINY = (Case("cross_entropy", (8, 10)), Case("mse_loss", (100,)))
NEIGHBOURS = {
    f"{name} {word}": (name, factor)
    for name, (word, factor) in product(("rows", "block", "threads"), (("/ 2", 0.5), ("x 2", 2.0)))
}
Choices = list[tuple[Choice, int]]  # with the number of classes that it was for


@dataclass
class Measured:
    """A case: its first choice, the median of its time, and its neighbours' divided by that."""

    case: str
    choice: Choice
    ms: float
    neighbours: dict[str, float | str] = field(default_factory=dict)  # in words what failed


def changed(choice: Choice, classes: int, name: str, factor: float) -> Choice:
    """The neighbour; it is the choice itself where there is none."""
    if (name == "rows" and not classes) or (
        name == "block" and classes and choice.whole_row and factor > 1
    ):
        return choice  # kernels without rows, and nothing is to the right of a whole one
    least = launch.warp_size() if name == "threads" else 1
    value = max(least, int(getattr(choice, name) * factor))
    choice = choice._replace(**{name: min(value, 1024) if name == "threads" else value})
    return choice._replace(whole_row=choice.block >= classes)


@contextlib.contextmanager
def choosing(name: str = "", factor: float = 1.0) -> Iterator[Choices]:
    """While entered, all kernels are launched by a neighbour of their choice."""
    choose, chosen = launch.choose, []

    def choose_neighbour(itemsize: int, classes: int = 0, *args: Any, **kwargs: Any) -> Choice:
        choice = choose(itemsize, classes, *args, **kwargs)
        choice = changed(choice, classes, name, factor) if name else choice
        chosen.append((choice, classes))
        return choice

    launch.choose = choose_neighbour
    try:
        yield chosen
    finally:
        launch.choose = choose


def assert_alike(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        rtol, scale = max(1e-5, 2 * torch.finfo(ours.dtype).eps), theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-6 * scale)


def measure(case: Case, arguments: Arguments, clock: Clock) -> Measured:
    operator = getattr(pyfused.functional, case.op)
    with choosing() as chosen:
        expected = evaluate(operator, arguments)
    found = Measured(case.name, chosen[0][0], 0.0)
    variants = {"": ("", 1.0)}
    for neighbour, change in NEIGHBOURS.items():
        try:
            with choosing(*change) as others:
                got = evaluate(operator, arguments)
            if others == chosen:
                continue
            assert_alike(got, expected)
            variants[neighbour] = change
        except Exception as error:  # too large for the GPU, or wrong: the table says so
            found.neighbours[neighbour] = type(error).__name__
    call = step(pyfused.functional, case, arguments, "forward+backward")
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(WARM_UP + ROUNDS):
        for name, change in variants.items():
            with choosing(*change):
                ms = clock.of(call)
            if turn >= WARM_UP:
                times[name].append(ms)
    found.ms = median(times.pop(""))
    found.neighbours |= {name: median(each) / found.ms for name, each in times.items()}
    return found


def table(rows: Sequence[Measured], info: dict[str, Any]) -> str:
    """Ratios above 1 are slower than the choice."""

    def cell(value: float | str | None) -> str:
        return f"{value:.2f}" if isinstance(value, float) else value or ""

    lines = [
        f"{info['gpu']}, driver {info['driver']}, torch {info['torch']}, Triton {info['triton']}.",
        "Time of a neighbour divided by that of the choice: above 1 the choice is faster.",
        "",
        "| case | rows x block, threads | ms | " + " | ".join(NEIGHBOURS) + " |",
        "| --- | --- |" + " ---: |" * (1 + len(NEIGHBOURS)),
    ]
    for row in rows:
        cells = [cell(row.neighbours.get(name)) for name in NEIGHBOURS]
        choice = f"{row.choice.rows} x {row.choice.block}, {row.choice.threads}"
        lines.append(f"| {row.case} | {choice} | {row.ms:.4g} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def run(
    cases: Sequence[Case], device: str, clock: Clock, seconds: float, save: Callable[[str], object]
) -> None:
    """Measures case by case, and saves after each one, so that nothing is lost to a failure."""
    until, info = time.perf_counter() + seconds, machine_info(device)
    rows: list[Measured] = []
    for case in cases:
        if time.perf_counter() > until:
            print(f"{case.name}: left out, out of time")
            continue
        arguments = draw(case, device)
        assert_right(case, arguments)
        rows.append(measure(case, arguments, clock))
        save(table(rows, info))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path, help="where to write the table")
    parser.add_argument("--seconds", type=float, default=150, help="start no case after these")
    parser.add_argument("--match", default="", help="only cases whose name holds these words")
    parser.add_argument(
        "--device", default="cuda", choices=["cuda", "cpu"], help="cpu: to rehearse, interpreted"
    )
    parser.add_argument("--tiny", action="store_true", help="cases of microseconds, as a rehearsal")
    arguments = parser.parse_args()

    cases = [c for c in (TINY if arguments.tiny else CASES) if arguments.match in c.name]
    device, file = arguments.device, arguments.table
    run(cases, device, Clock(device), arguments.seconds, file.write_text)
    print(file.read_text())


if __name__ == "__main__":
    main()
