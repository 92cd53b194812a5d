"""Time a revision's pyfused and the working tree's, call beside call: what has a change moved?

    python benchmarks/compare.py main~3
    python benchmarks/compare.py main -k relu '(256, 1000)' --margin 0.9
    python benchmarks/compare.py main --busy

Each has a process of its own, and they take turns. Exits with 1 where the working tree is slower:
where the upper quartile of the revision's time divided by the tree's stays below the margin, in
every one of several measurements, each longer than the one before. On a busy machine medians and
90th percentiles are compared, and nothing is judged.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
import tempfile
from functools import partial
from pathlib import Path
from statistics import median

from cases import CASES, MODES, Case
from load import loaded
from measure import LONGER, Quartiles, by_turns, ninth_decile, plan, ratios
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sides import ROOT, Side, ended_after

FEWEST_BUSY = 100  # rounds, for a 90th percentile
Times = list[list[float]]


def built(folder: Path) -> Path:
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(build, cwd=folder, check=True)
    return folder


def extract(revision: str, folder: Path) -> Path:
    archive = folder / "base.tar"
    command = ["git", "archive", "--output", str(archive), revision]
    subprocess.run(command, cwd=ROOT, check=True)
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "base", filter="data")
    return folder / "base"


def measure(sides: tuple[Side, Side], case: Case, mode: str, seconds: float, fewest: int) -> Times:
    rounds, calls = plan(
        sides, seconds, fewest, clock=lambda side, calls: side.seconds(case, mode, calls)
    )
    return by_turns([partial(side.seconds, case, mode, calls) for side in sides], rounds)


def examine(
    sides: tuple[Side, Side], case: Case, mode: str, seconds: float, margin: float
) -> Quartiles:
    """Measure, and where the head looks slower measure longer, until it does not."""
    for factor in LONGER:
        found = ratios(*measure(sides, case, mode, factor * seconds, fewest=19))
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
    parser.add_argument("-k", nargs="+", default=[""], help="only names with one of these in them")
    parser.add_argument("--margin", type=float, default=0.95, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=0.7, help="a case, default: %(default)s")
    parser.add_argument("--busy", action="store_true", help="beside other work, see load.py")
    return parser.parse_args()


def main() -> None:
    options = parse()
    chosen = [
        (case, mode)
        for case in CASES
        for mode in MODES
        if any(part in f"{case.name} {mode}" for part in options.k)
    ]
    console = Console(width=None if sys.stdout.isatty() else 140)
    with tempfile.TemporaryDirectory() as folder:
        base = Side("pyfused", built(extract(options.base, Path(folder))))
        sides = base, Side("pyfused", built(ROOT))
        with ended_after(*sides), loaded(options.busy):
            both = [(case, mode) for case, mode in chosen if base.has(case)]
            shown = track(both, "Measuring", transient=True)
            if options.busy:
                busy = [
                    (case, mode, measure(sides, case, mode, options.seconds, FEWEST_BUSY))
                    for case, mode in shown
                ]
                console.print(tabulate_busy(busy, options.base))
                return
            found = [
                (case, mode, examine(sides, case, mode, options.seconds, options.margin))
                for case, mode in shown
            ]
    console.print(tabulate(found, options.base, options.margin))
    slower = sum(ratio[2] < options.margin for _, _, ratio in found)
    print(f"{slower} of {len(found)} are slower than at {options.base}, beyond the margin")
    sys.exit(slower > 0)


def tabulate(found: list[tuple[Case, str, Quartiles]], base: str, margin: float) -> Table:
    table = Table("case", "mode", f"{base} / working tree", "", title="Median and middle half")
    for case, mode, ratio in found:
        numbers = "{1:.2f} ({0:.2f} to {2:.2f})".format(*ratio)
        table.add_row(case.name, mode, numbers, verdict(ratio, margin))
    return table


def tabulate_busy(found: list[tuple[Case, str, Times]], base: str) -> Table:
    table = Table("case", "mode", title=f"{base} / working tree, beside other work")
    for name in ("at the median", "at the 90th percentile"):
        table.add_column(name, justify="right")
    for case, mode, (theirs, ours) in found:
        both = (f"{value(theirs) / value(ours):.2f}" for value in (median, ninth_decile))
        table.add_row(case.name, mode, *both)
    return table


if __name__ == "__main__":
    main()
