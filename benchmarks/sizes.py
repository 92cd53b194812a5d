"""Measure from which size on the kernels are faster than ATen, and write pyfused/ops/sizes.py.

    python benchmarks/sizes.py
    python benchmarks/sizes.py --op relu --dtype float32 bfloat16

Forward + backward beside torch's own operator, by turns, on one thread and on all. From the largest
size down, the kernels keep a size that they had unless they are slower, and get one that they had
not if they are faster: beyond the spread, in every one of several measurements. So noise leaves an
entry as it is. Entries that are not measured stay.
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import torch
from cases import OPS, SOFTMAX, Case
from measure import LONGER, settle_allocator
from report import machine, machine_info
from rich.progress import track
from sweep import DTYPES, Point, drawn, measure

import pyfused
from pyfused.ops import dispatch
from pyfused.ops.sizes import ATEN_BELOW

Rows = tuple[tuple[float, int], ...]

FILE = Path(__file__).parents[1] / "pyfused/ops/sizes.py"
MEASURED = re.compile(r'(?s)(?<=forward \+ backward on\n).*?(?=""")')
TABLE = re.compile(r"(?s)(?<=\]\] = \{\n).*(?=\}\n\Z)")
SMALLEST, LARGEST = 1 << 10, 1 << 24  # elements
SECONDS = 0.06  # a measurement; what decides is measured again, for longer
MARGIN = 0.03
# Where an operator has classes, how many: each stands for those above the one before.
CLASSES = {
    "cross_entropy": (2, 8, 15, 24, 32, 64, 256, 1000, 32000),
    "cross_entropy_kdim": (2, 21, 64, 256),
    "nll_loss": (10, 1000),
    "multi_margin_loss": (10, 1000),
}
COLUMNS = 256  # of what is taken along its rows

THREADS = sorted({1, torch.get_num_threads()})


def keys(op: str) -> list[str]:
    """An operator's keys in the table: logits of more than two dimensions have one of their own."""
    return [op] + [key for key in CLASSES if key == f"{op}_kdim"]


def shape(key: str, classes: int, elements: int) -> tuple[int, ...]:
    if key in SOFTMAX:
        return (max(1, elements // COLUMNS), COLUMNS)
    if key not in CLASSES:
        return (elements,)
    positions = elements // classes
    return (2, classes, positions // 2) if key.endswith("_kdim") else (positions, classes)


def sizes(classes: int, old: int) -> Iterator[int]:
    """Powers of two from the largest down to one position; every other one far from the old."""
    elements = LARGEST
    while elements >= max(SMALLEST, classes):
        yield elements
        elements //= 4 if old and elements >= 32 * old else 2


def below(rows: Rows, classes: int) -> int:
    """What the table says; an operator that is not in it has every size."""
    return next((below for most, below in rows if classes <= most), 0)


def kernels_keep(case: Case, had: bool) -> bool:
    """Whether the kernels are not slower than ATen, or where they did not have it, faster."""
    arguments = drawn(case)
    explained = pyfused.explain(case.op, arguments.input, *arguments.others, **arguments.options)
    assert explained.backend == "cpu", explained
    return all(not_slower(case, n) if had else faster(case, n) for n in THREADS)


def not_slower(case: Case, threads: int) -> bool:
    return any(
        measure(Point(case, threads), factor * SECONDS).ratio[2] >= 1 - MARGIN for factor in LONGER
    )


def faster(case: Case, threads: int) -> bool:
    return all(
        measure(Point(case, threads), factor * SECONDS).ratio[0] > 1 + MARGIN for factor in LONGER
    )


def threshold(op: str, key: str, dtype: torch.dtype, classes: int, old: int) -> int:
    """From how many elements on the kernels take a call."""
    found = 2 * LARGEST
    for elements in sizes(classes, old):
        case = Case(op, shape(key, classes, elements), dtype)
        try:
            keep = kernels_keep(case, had=elements >= old)
        except NotImplementedError:  # torch's
            return 0
        if not keep:
            return found
        found = elements
    return min(found, old or found)  # the table knows of smaller ones, with fewer classes


def banded(found: dict[int, int]) -> Rows:
    """Thresholds by class as rows: neighbours with the same one share it."""
    rows: list[tuple[float, int]] = []
    for classes, below in found.items():
        if rows and rows[-1][1] == below:
            rows.pop()
        rows.append((classes, below))
    return *rows[:-1], (math.inf, rows[-1][1])


def power_of_two(n: int) -> str:
    return f"1 << {n.bit_length() - 1}" if n else "0"


def written(table: dict[str, dict[torch.dtype, Rows]]) -> str:
    """The file with another table, and with what it was measured on."""
    now = datetime.now(timezone.utc).isoformat()
    found = {"machine_info": machine_info(), "datetime": now}
    where = textwrap.fill(f"{machine(found)}.", 100)
    lines = []
    for key, dtypes in table.items():
        lines.append(f'    "{key}": {{\n')
        for dtype, rows in dtypes.items():
            cells = [
                f"({'ANY' if most == math.inf else most}, {power_of_two(below)})"
                for most, below in rows
            ]
            last = "," if len(cells) == 1 else ""
            lines.append(f"        {dtype}: ({', '.join(cells)}{last}),\n")
        lines.append("    },\n")
    text = MEASURED.sub(lambda _: f"{where}\n", FILE.read_text(encoding="utf-8"))
    return TABLE.sub(lambda _: "".join(lines), text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", nargs="+", choices=OPS, default=OPS)
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--dry-run", action="store_true", help="say what would change, only")
    return parser.parse_args()


def main() -> None:
    options = parse()
    settle_allocator()
    old = {key: dict(dtypes) for key, dtypes in ATEN_BELOW.items()}
    new = {key: old.get(key, {}) | {} for op in OPS for key in keys(op)}
    for key in new:  # from here on the kernels take every call
        ATEN_BELOW[key] = dict.fromkeys(DTYPES.values(), ((math.inf, 0),))
        dispatch._ALWAYS_BELOW[key] = 0
    asked = [(op, key, name) for op in options.op for key in keys(op) for name in options.dtype]
    for op, key, name in track(asked, "Measuring", transient=True):
        dtype = DTYPES[name]
        before = old.get(key, {}).get(dtype, ())
        new[key][dtype] = banded(
            {
                classes: threshold(op, key, dtype, classes, below(before, classes))
                for classes in CLASSES.get(key, (1,))
            }
        )
        if new[key][dtype] != before:
            print(f"{key} {name}: {before} becomes {new[key][dtype]}", flush=True)
    torch.set_num_threads(THREADS[-1])  # as the file says
    if not options.dry_run:
        FILE.write_text(written(new), encoding="utf-8")
        subprocess.run([sys.executable, "-m", "ruff", "format", "--quiet", FILE], check=True)


if __name__ == "__main__":
    main()
