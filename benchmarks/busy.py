"""torch and pyfused on a machine that has other work to do: see load.py.

    python benchmarks/busy.py
    python benchmarks/busy.py relu '(1024, 32000)'

Calls by turns, as ever, but they scatter: a call waits for the thread of its that was put aside. So
medians are compared, and the times that one call in ten exceeds.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from statistics import median

from cases import CASES, MODES, draw, step
from load import loaded
from measure import by_turns, ninth_decile, plan, settle_allocator, timed
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

import pyfused.functional

SECONDS, FEWEST = 10, 60
SETTLE_SECONDS = 1  # until the load is there


def main() -> None:
    settle_allocator()
    table = Table("case", title="forward+backward, milliseconds beside other work")
    for name in ("torch", "pyfused", "ratio", "torch, 90th", "pyfused, 90th", "ratio, 90th"):
        table.add_column(name, justify="right")
    for case in CASES:
        wanted = [part in case.name for part in sys.argv[1:]]
        if not (any(wanted) if wanted else case.headline):
            continue
        arguments = draw(case)
        steps = [step(o, case, arguments, MODES[-1]) for o in (F, pyfused.functional)]
        with loaded():
            time.sleep(SETTLE_SECONDS)
            rounds, calls = plan(steps, SECONDS, FEWEST)
            times = by_turns([partial(timed, call, calls) for call in steps], rounds)
        cells = []
        for value in (median, ninth_decile):
            of_torch, ours = (1e3 * value(taken) / calls for taken in times)
            cells += [f"{of_torch:,.3g}", f"{ours:,.3g}", f"{of_torch / ours:.2f}"]
        table.add_row(case.name, *cells)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


if __name__ == "__main__":
    main()
