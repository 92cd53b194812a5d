"""Where the kernels are faster than ATen: `sizes` measures and writes it, `sweep` tries it out."""

from __future__ import annotations

import math
import random
import re
import subprocess
import sys
import textwrap
from argparse import Namespace
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import cases
import torch
from cases import DTYPES, OPS, SOFTMAX, Case, ratios
from pairs import cells
from report import machine, machine_info, measured, tabulated
from rich.progress import track

import pyfused.functional
from pyfused.ops import dispatch
from pyfused.ops.sizes import ATEN_BELOW

Bands = tuple[tuple[float, int], ...]  # (classes up to, elements below which ATen is faster)
Shape = tuple[int, ...]
Table = dict[str, dict[torch.dtype, Bands]]

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
ALL_THREADS = torch.get_num_threads()
COLUMNS = 256  # of softmax, whose classes make no difference


@lru_cache(maxsize=1)
def both(case: Case) -> list[cases.Timer]:
    """Of torch's operator and of pyfused's."""
    arguments = cases.draw(case)
    cases.assert_correct(case, arguments)
    operators = cases.TORCH, pyfused.functional
    return cases.timers_of([cases.step(each, case, arguments) for each in operators])


# ---- sizes ---------------------------------------------------------------------------------------


def keys(op: str) -> list[str]:
    """An operator's keys in the table: logits of more than two dimensions have one of their own."""
    return [op] + [key for key in CLASSES if key == f"{op}_kdim"]


def shape(key: str, classes: int, elements: int) -> Shape:
    if key in SOFTMAX:
        return (max(1, elements // COLUMNS), COLUMNS)
    if key not in CLASSES:
        return (elements,)
    positions = elements // classes
    return (2, classes, positions // 2) if key.endswith("_kdim") else (positions, classes)


def tried(classes: int, old: int) -> Iterator[int]:
    """Powers of two from the largest down to one position; every other one far from the old."""
    elements = LARGEST
    while elements >= max(SMALLEST, classes):
        yield elements
        elements //= 4 if old and elements >= 32 * old else 2


def below(bands: Bands, classes: int) -> int:
    """What the table says; an operator that is not in it has every size."""
    return next((below for most, below in bands if classes <= most), 0)


def kernels_keep(case: Case, had: bool) -> bool:
    """Whether the kernels are not slower than ATen, or where they did not have it, faster.

    On one thread and on all, and in every one of several measurements, each longer than the last:
    so noise leaves an entry as it is.
    """
    for threads in sorted({1, ALL_THREADS}):
        torch.set_num_threads(threads)
        for factor in cases.LONGER:
            low, _, high = ratios(*cases.measure(both(case), factor * SECONDS, fewest=4))
            if had and high >= 1 - MARGIN:
                break  # not slower on so many threads
            if not had and low <= 1 + MARGIN:
                return False
        else:
            if had:
                return False
    return True


def threshold(op: str, key: str, dtype: torch.dtype, classes: int, old: int) -> int:
    """From how many elements on the kernels take a call."""
    found = 2 * LARGEST
    for elements in tried(classes, old):
        case = Case(op, shape(key, classes, elements), dtype)
        try:
            keep = kernels_keep(case, had=elements >= old)
        except NotImplementedError:  # torch's
            return 0
        if not keep:
            return found
        found = elements
    return min(found, old or found)  # the table knows of smaller ones, with fewer classes


def banded(found: dict[int, int]) -> Bands:
    """Thresholds by class as bands: neighbours with the same one share it."""
    bands: list[tuple[float, int]] = []
    for classes, below in found.items():
        if bands and bands[-1][1] == below:
            bands.pop()
        bands.append((classes, below))
    return *bands[:-1], (math.inf, bands[-1][1])


def written(table: Table) -> str:
    """The file with another table, and with what it was measured on."""

    def row(bands: Bands) -> str:
        cells = [
            f"({'ANY' if most == math.inf else int(most)}, "
            f"{f'1 << {below.bit_length() - 1}' if below else 0})"
            for most, below in bands
        ]
        return f"({', '.join(cells)}{',' * (len(cells) == 1)})"

    lines = []
    for key, rows in table.items():
        if rows:  # an operator that was never measured has no entry
            lines += [f'"{key}": {{', *(f"{d}: {row(bands)}," for d, bands in rows.items()), "},"]
    where = textwrap.fill(f"{machine(measured(machine_info()))}.", 100)
    text = MEASURED.sub(lambda _: f"{where}\n", FILE.read_text(encoding="utf-8"))
    text = TABLE.sub(lambda _: "\n".join(lines), text)
    ruff = [sys.executable, "-m", "ruff", "format", "--stdin-filename", FILE]
    return subprocess.check_output(ruff, input=text, text=True)


def sizes(options: Namespace) -> None:
    """Move each entry where the kernels are slower from it on, or faster below it."""
    cases.settle_allocator()
    old = {key: dict(dtypes) for key, dtypes in ATEN_BELOW.items()}
    new: Table = {key: dict(old.get(key, {})) for op in OPS for key in keys(op)}
    for key in new:  # from here on the kernels take every call
        ATEN_BELOW[key] = dict.fromkeys(DTYPES.values(), ((math.inf, 0),))
        dispatch._ALWAYS_BELOW[key] = 0
    asked = [
        (op, key, name)
        for op in options.op or OPS
        for key in keys(op)
        for name in options.dtype or DTYPES
    ]
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
    torch.set_num_threads(ALL_THREADS)  # as the file says
    if not options.dry_run:
        FILE.write_text(written(new), encoding="utf-8")


# ---- sweep ---------------------------------------------------------------------------------------


def shapes(
    op: str, dtype: torch.dtype, count: int, draw: random.Random
) -> Iterator[tuple[int, ...]]:
    """Random ones, and the smallest that the kernels take: those that have the least to win."""
    by_classes = op in (*SOFTMAX, *CLASSES)
    edges = [(most, below) for most, below in ATEN_BELOW[op][dtype] if below]
    for place in range(count + len(edges)):
        elements, classes = round(2 ** draw.uniform(0, 25)), round(2 ** draw.uniform(1, 18))
        if place >= count:
            most, elements = edges[place - count]
            classes = int(min(most, classes))
        rows = max(1, -(-elements // classes))
        if not by_classes:
            yield (elements,)
        elif op == "cross_entropy" and place < count and draw.random() < 0.3:
            yield (1, classes, rows) if draw.random() < 0.5 else (rows, classes, 1)
        else:
            yield (rows, classes)


def sweep(options: Namespace) -> None:
    """A call is slower where the upper quartile of the ratio stays below the margin."""
    cases.settle_allocator()
    seed = random.randrange(1 << 16) if options.seed is None else options.seed
    print(f"--seed {seed}")
    draw = random.Random(seed)
    points = [
        (Case(op, shape, DTYPES[name]), threads)
        for op in options.op or OPS
        for name in options.dtype or DTYPES
        for shape in shapes(op, DTYPES[name], options.shapes, draw)
        for threads in options.threads
    ]
    draw.shuffle(points)  # a noisy minute spoils no one operator
    found = []
    for case, threads in track(points, "Measuring", transient=True):
        torch.set_num_threads(threads)
        times = cases.remeasured(both(case), options.seconds, options.margin, fewest=4)
        found.append((case, threads, times))
    found.sort(key=lambda each: ratios(*each[2])[1])
    rows = []
    for case, threads, times in found[:20]:
        aten = dispatch.aten_is_faster(
            case.op, torch.empty((), dtype=case.dtype).expand(case.shape)
        )
        rows.append([case.name, "ATen" if aten else "pyfused", str(threads), *cells(times)])
    names = ["forward+backward", "taken by", "threads", "torch, ms", "pyfused, ms", "ratio"]
    print(tabulated(names, rows, names=2))
    slower = sum(ratios(*times)[2] < options.margin for *_, times in found)
    print(f"{slower} of {len(found)} calls are slower than torch's beyond the spread")
    sys.exit(slower > 0)
