"""Large cases in every setting of settings.py, torch's and pyfused's, in processes that take turns.

    python benchmarks/allocators.py
    python benchmarks/allocators.py --json FILE

What is new memory, and what gets rid of it? pyfused is timed without recycling too. Ratios are to
eager torch with the allocator as it comes, the time of each round's neighbours.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from cases import CASES, MODES, Case
from measure import by_turns, plan, ratios
from rich.console import Console
from rich.progress import track
from rich.table import Table
from settings import available, environment
from sides import Side, ended_after

SECONDS = 12
LARGE = 32 << 20  # bytes: from here on glibc maps every block anew
FAMILIES = ("cross_entropy", "mse_loss", "relu")  # each by one operator
NO_RECYCLING = {"PYFUSED_RECYCLE": "0"}


def ways() -> dict[str, Side]:
    """A process for each; the first is what the others are compared with."""
    settings = available()
    of_torch = {f"torch, {name}": Side("torch", environment=environment(name)) for name in settings}
    plain, kept = environment("as it comes"), environment("kept pages")
    return of_torch | {
        "pyfused, PYFUSED_RECYCLE=0": Side("pyfused", environment=plain | NO_RECYCLING),
        "pyfused, as it comes": Side("pyfused", environment=plain),
        "pyfused, kept pages": Side("pyfused", environment=kept | NO_RECYCLING),
    }


def measure(sides: dict[str, Side], case: Case) -> list[dict[str, Any]]:
    rounds, calls = plan(
        sides.values(),
        SECONDS,
        clock=lambda side, calls: side.seconds(case, MODES[-1], calls),
    )
    clocks = [partial(side.seconds, case, MODES[-1], calls) for side in sides.values()]
    times = dict(zip(sides, by_turns(clocks, rounds), strict=True))
    first = next(iter(times.values()))
    return [
        {
            "case": case.name,
            "way": way,
            "ms": 1e3 * median(taken) / calls,
            "ratio": ratios(first, taken),
        }
        for way, taken in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where the report is to find it")
    parser.add_argument("-k", default="", help="only the cases whose name has this in it")
    options = parser.parse_args()
    large = [
        case
        for case in CASES
        if case.headline and case.op in FAMILIES and options.k in case.name
        if case.elements * case.dtype.itemsize >= LARGE
    ]
    sides = ways()
    with ended_after(*sides.values()):
        shown = track(large, "Measuring", transient=True)
        found = [entry for case in shown for entry in measure(sides, case)]
    table = Table("case", "way", title="forward+backward of large tensors")
    for name in ("ms", "times as fast as torch, as it comes"):
        table.add_column(name, justify="right")
    for entry in found:
        ratio = "{1:.2f} ({0:.2f} to {2:.2f})".format(*entry["ratio"])
        table.add_row(entry["case"], entry["way"], f"{entry['ms']:.3g}", ratio)
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    if options.json:
        options.json.write_text(json.dumps({"allocators": found}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
