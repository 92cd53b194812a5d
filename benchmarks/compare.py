"""Time a revision's pyfused and the working tree's, call beside call: what has a change moved?

    python benchmarks/compare.py main~3
    python benchmarks/compare.py main -k relu --margin 0.9

Each has a process of its own, and they take turns. Exits with 1 where the working tree is slower:
where the upper quartile of the revision's time divided by the tree's stays below the margin, in
every one of several measurements, each longer than the one before.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from functools import lru_cache, partial
from pathlib import Path

from cases import CASES, MODES, Case, draw, step
from measure import LONGER, Quartiles, by_turns, plan, ratios, settle_allocator, timed
from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).parents[1]
# The threads of the one whose turn is over spin for about a millisecond before they sleep.
HANDOVER_SECONDS = 3e-3


class Side:
    """A process with the pyfused of a folder."""

    def __init__(self, folder: Path) -> None:
        build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        subprocess.run(build, cwd=folder, check=True)
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", str(folder)],
            env={**os.environ, "PYTHONPATH": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def seconds(self, case: int, mode: str, calls: int) -> float:
        """The time of so many calls, after the other's threads have gone to sleep."""
        assert self.process.stdin
        assert self.process.stdout
        print(case, mode, calls, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"the process with the pyfused of {self.process.args} ended")
        return float(answer)


def work(folder: Path) -> None:
    """Answers each line, a case's number, a mode and a number of calls, with the time they took."""
    import pyfused.functional

    assert Path(pyfused.__file__).is_relative_to(folder.resolve()), pyfused.__file__
    settle_allocator()

    drawn = lru_cache(maxsize=1)(draw)
    for line in sys.stdin:
        index, mode, calls = line.split()
        case = CASES[int(index)]
        given = drawn(case)
        one = step(pyfused.functional, case, given, mode)
        time.sleep(HANDOVER_SECONDS)
        given.input.grad = None
        print(timed(one, int(calls)), flush=True)
        given.input.grad = None


def extract(revision: str, folder: Path) -> Path:
    archive = folder / "base.tar"
    command = ["git", "archive", "--output", str(archive), revision]
    subprocess.run(command, cwd=ROOT, check=True)
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "base", filter="data")
    return folder / "base"


def measure(base: Side, head: Side, case: int, mode: str, seconds: float) -> Quartiles:
    rounds, calls = plan((base, head), seconds, clock=lambda s, calls: s.seconds(case, mode, calls))
    clocks = [partial(side.seconds, case, mode, calls) for side in (base, head)]
    return ratios(*by_turns(clocks, rounds))


def examine(
    base: Side, head: Side, case: int, mode: str, seconds: float, margin: float
) -> Quartiles:
    """Measure, and where the head looks slower measure longer, until it does not."""
    for factor in LONGER:
        found = measure(base, head, case, mode, factor * seconds)
        if found[2] >= margin:
            break
    return found


def verdict(ratio: Quartiles, margin: float) -> str:
    low, _, high = ratio
    if high < margin:
        return "[red]slower[/]"
    return "[green]faster[/]" if low > 1 else "slower within the margin" if high < 1 else ""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", help="a git revision")
    parser.add_argument("-k", default="", help="only the cases whose name has this in it")
    parser.add_argument("--margin", type=float, default=0.95, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=0.7, help="a case, default: %(default)s")
    return parser.parse_args()


def main() -> None:
    options = parse()
    chosen = [
        (index, mode)
        for index, case in enumerate(CASES)
        for mode in MODES
        if options.k in f"{case.name} {mode}"
    ]
    with tempfile.TemporaryDirectory() as folder:
        base, head = Side(extract(options.base, Path(folder))), Side(ROOT)
        found = [
            (CASES[index], mode, examine(base, head, index, mode, options.seconds, options.margin))
            for index, mode in track(chosen, "Measuring", transient=True)
        ]
        for side in (base, head):
            side.process.terminate()
    Console(width=None if sys.stdout.isatty() else 140).print(
        tabulate(found, options.base, options.margin)
    )
    slower = sum(ratio[2] < options.margin for _, _, ratio in found)
    print(f"{slower} of {len(found)} are slower than at {options.base}, beyond the margin")
    sys.exit(slower > 0)


def tabulate(found: list[tuple[Case, str, Quartiles]], base: str, margin: float) -> Table:
    table = Table("case", "mode", f"{base} / working tree", "", title="Median and middle half")
    for case, mode, ratio in found:
        numbers = "{1:.2f} ({0:.2f} to {2:.2f})".format(*ratio)
        table.add_row(case.name, mode, numbers, verdict(ratio, margin))
    return table


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(Path(sys.argv[2]))
    else:
        main()
