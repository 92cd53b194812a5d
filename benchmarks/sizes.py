"""Where the kernels are faster than ATen: `sizes` measures and writes it, `sweep` tries it out."""

from __future__ import annotations

import math
import random
import re
import subprocess
import sys
import textwrap
import time
from argparse import Namespace
from collections.abc import Iterator
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from unittest import mock

import cases
import torch
from cases import ACTIVATIONS, DTYPES, OPS, SOFTMAX, Case, ratios
from pairs import cells
from report import machine, machine_info, measured, tabulated
from rich.progress import track
from torch.nn import functional as F

import pyfused.functional
from pyfused.ops import dispatch
from pyfused.ops.operators import OPERATORS
from pyfused.ops.pointwise_loss import PointwiseLoss
from pyfused.ops.sizes import ATEN_BELOW

Shape = tuple[int, ...]
Table = dict[str, dict[torch.dtype, dispatch.Bands]]

FILE = Path(__file__).parents[1] / "pyfused/ops/sizes.py"
MEASURED = re.compile(r'(?s)(?<=forward and with backward on\n).*?(?=""")')
TABLE = re.compile(r"(?s)(?<=\]\] = \{\n).*(?=\}\n\Z)")
SMALLEST, LARGEST = 1 << 10, 1 << 24  # elements
FAR = 1 << 22  # what is faster from some size on is so here, too
SECONDS = 0.04  # a measurement; what decides is measured again, for longer
MARGIN = 0.03
ALLOWED = 0.6e-3  # milliseconds that a call costs beyond torch's where it goes to ATen
SUFFIXES = {cases.TRAINING: "", cases.FORWARD: "_forward"}
# Where an operator has classes, how many: each stands for those above the one before.
CLASSES = {
    **dict.fromkeys(SOFTMAX, (8, 32, 128, 512, 4096, 32000)),
    "cross_entropy": (8, 15, 24, 64, 256, 32000),
    "cross_entropy_kdim": (2, 21, 256),
    "nll_loss": (10, 1000),
    "multi_margin_loss": (3, 8, 16, 1000),
}
CALLED, PATCHED, COMPILED = "called", "patched", "compiled"
ALL_THREADS = torch.get_num_threads()


@lru_cache(maxsize=1)
def drawn_and_checked(case: Case) -> cases.Arguments:
    arguments = cases.draw(case)
    if case.elements <= FAR:  # larger ones, of the same kernels, take seconds
        cases.assert_correct(case, arguments)
    return arguments


def both(case: Case, mode: str, how: str = CALLED) -> list[cases.Timer]:
    """Of torch's operator and of pyfused's."""
    arguments, operators = drawn_and_checked(case), (cases.TORCH, pyfused.functional)
    if how == PATCHED:
        with pyfused.patch():
            ours = cases.step(cases.Torch(), case, arguments, mode)
        (theirs,) = cases.timers_of([cases.step(cases.TORCH, case, arguments, mode)])
        return [theirs, partial(timed_patched, ours)]
    if how == COMPILED:
        torch._dynamo.reset()  # else the second shape compiles for all
        operators = tuple(map(cases.Compiled, operators))
    return cases.timers_of([cases.step(each, case, arguments, mode) for each in operators])


def timed_patched(step: cases.Step, calls: int) -> float:
    with pyfused.patch():
        step()  # the first call after a patch fills the interpreter's caches
        return cases.timed(step, calls)


# ---- sizes ---------------------------------------------------------------------------------------


def keys(op: str) -> list[str]:
    """An operator's keys in the table: k-dimensional logits and losses of elements have one."""
    each = isinstance(OPERATORS[op], PointwiseLoss)
    return [op, *[key for key in CLASSES if key == f"{op}_kdim"], *[f"{op}_none"] * each]


def shape(key: str, classes: int, elements: int) -> Shape:
    if key not in CLASSES:
        return (elements,)
    positions = elements // classes
    return (2, classes, positions // 2) if key.endswith("_kdim") else (positions, classes)


def case_of(op: str, key: str, dtype: torch.dtype, classes: int, elements: int) -> Case:
    reduction = "none" if key.endswith("_none") else "mean"
    return Case(op, shape(key, classes, elements), dtype, reduction=reduction)


def faster(case: Case, mode: str, had: bool) -> bool:
    """Whether the kernels are faster than ATen, on one thread and on all.

    Where they had the case, they lose it only if they are slower in every one of several
    measurements, each longer than the last; where they did not, they have to be faster in every
    one. So noise leaves an entry as it is.
    """
    for threads in sorted({1, ALL_THREADS}):
        torch.set_num_threads(threads)
        for factor in cases.LONGER:
            low, _, high = ratios(*cases.measure(both(case, mode), factor * SECONDS, fewest=5))
            if had and high >= 1 - MARGIN:
                break  # not slower on so many threads
            if not had and low <= 1 + MARGIN:
                return False
        else:
            if had:
                return False
    return True


def threshold(op: str, key: str, dtype: torch.dtype, classes: int, mode: str, old: int) -> int:
    """From how many elements on the kernels take a call."""
    smallest = max(SMALLEST, 1 << classes.bit_length())
    found = min(max(old, smallest), 2 * LARGEST)

    def won(elements: int, had: bool) -> bool:
        return faster(case_of(op, key, dtype, classes, elements), mode, had)

    try:
        if found < FAR and not won(FAR, had=True):
            found = 2 * FAR
        while found <= LARGEST and not won(found, had=found >= old):
            found *= 2
        while smallest < found <= old and won(found // 2, had=False):
            found //= 2
    except NotImplementedError:  # torch's
        return 0
    # The table knows of smaller ones, with fewer classes.
    return min(found, old) if found == smallest else found


def banded(found: dict[int, int]) -> dispatch.Bands:
    """Thresholds by class as bands: neighbours with the same one share it."""
    bands: list[tuple[float, int]] = []
    for classes, below in found.items():
        if bands and bands[-1][1] == below:
            bands.pop()
        bands.append((classes, below))
    return *bands[:-1], (math.inf, bands[-1][1])


def below(bands: dispatch.Bands, classes: int) -> int:
    return next((elements for most, elements in bands if classes <= most), 0)


def raised(*rows: dispatch.Bands) -> dispatch.Bands:
    """The most that any of the rows leaves to ATen."""
    limits = sorted({most for bands in rows for most, _ in bands})
    return banded({most: max(below(bands, most) for bands in rows) for most in limits})


def of_families(table: Table) -> Table:
    """Rows for operators without any, by class: the largest of a class's operators."""
    found: Table = {}
    for op, declared in OPERATORS.items():
        for key, suffix in ((op, ""), (f"{op}_forward", "_forward")):
            family = found.setdefault(type(declared).__name__ + suffix, {})
            for dtype, bands in table.get(key, {}).items():
                largest = max((below for _, below in (*family.get(dtype, ()), *bands)))
                family[dtype] = ((math.inf, largest),)
    return {key: rows for key, rows in found.items() if rows}


def written(table: Table, further: bool) -> str:
    """The file with another table, and with what it was measured on, perhaps as a further one."""

    def row(bands: dispatch.Bands) -> str:
        cells = [
            f"({'ANY' if most == math.inf else int(most)}, "
            f"{f'1 << {below.bit_length() - 1}' if below else 0})"
            for most, below in bands
        ]
        return f"({', '.join(cells)}{',' * (len(cells) == 1)})"

    lines = []
    for key, rows in table.items():
        lines += [f'"{key}": {{', *(f"{d}: {row(bands)}," for d, bands in rows.items()), "},"]
    text = FILE.read_text(encoding="utf-8")
    where = f"{machine(measured(machine_info()))}."
    if further and (found := MEASURED.search(text)):
        before = " ".join(found[0].split()).rstrip(".").split(", and on ")
        where = ", and on ".join([*(each for each in before if each != where.rstrip(".")), where])
    text = MEASURED.sub(lambda _: f"{textwrap.fill(where, 100)}\n", text)
    text = TABLE.sub(lambda _: "\n".join(lines), text)
    ruff = [sys.executable, "-m", "ruff", "format", "--stdin-filename", FILE]
    text = subprocess.check_output(ruff, input=text, text=True)
    names: dict[str, object] = {}
    exec(text, names)
    assert names["ATEN_BELOW"] == table  # what replaces the file can be imported
    return text


def sizes(options: Namespace) -> None:
    """Move each entry where the kernels are slower from it on, or faster below it."""
    cases.settle_allocator()
    dispatch.bands.cache_clear()  # rows may have gone
    old = {key: dict(dtypes) for key, dtypes in ATEN_BELOW.items()}
    new: Table = {}
    for op in OPS:
        for key, mode in product(keys(op), SUFFIXES):
            name = key + SUFFIXES[mode]
            new[name] = {}
            for dtype in DTYPES.values():
                if rows := dispatch.bands(OPERATORS[op], key, mode == cases.TRAINING, dtype):
                    new[name][dtype] = rows
    asked = [
        (op, key, mode, name)
        for op in options.op or OPS
        for key in keys(op)
        for name in options.dtype or DTYPES
        for mode in SUFFIXES
    ]
    with (
        mock.patch.dict(ATEN_BELOW, clear=True),
        mock.patch.dict(dispatch._ALWAYS_BELOW, clear=True),
    ):
        dispatch.bands.cache_clear()  # from here on the kernels take every call
        for op, key, mode, name in track(asked, "Measuring", transient=True):
            kind, dtype = key + SUFFIXES[mode], DTYPES[name]
            before = new[kind].get(dtype, ())
            found = banded(
                {
                    classes: threshold(op, key, dtype, classes, mode, below(before, classes))
                    for classes in CLASSES.get(key, (1,))
                }
            )
            new[kind][dtype] = raised(before, found) if options.raise_only else found
            if new[kind][dtype] != old.get(kind, {}).get(dtype):
                print(f"{kind} {name}: {before} becomes {new[kind][dtype]}", flush=True)
    dispatch.bands.cache_clear()
    torch.set_num_threads(ALL_THREADS)  # as the file says
    if not options.dry_run:
        known = {kind: rows for kind, rows in new.items() if rows}
        table = known | of_families(known)
        FILE.write_text(written(table, options.raise_only), encoding="utf-8")


# ---- sweep ---------------------------------------------------------------------------------------


# The lengths of rows in attention, detection, segmentation and language models.
LENGTHS = ((64, 4096), (80, 1200), (19, 150), (2, 64), (10_000, 130_000))


def between(low: float, high: float, draw: random.Random) -> int:
    """As many of each order of magnitude."""
    return round(math.exp(draw.uniform(math.log(low), math.log(high))))


def split(elements: int, dims: int, draw: random.Random) -> Shape:
    """About so many elements in so many dimensions."""
    sizes = []
    for _ in range(dims - 1):
        sizes.append(between(1, max(2, elements), draw))
        elements = max(1, elements // sizes[-1])
    return (*sizes, elements)


def drawn(op: str, dtype: torch.dtype, count: int, draw: random.Random) -> Iterator[Case]:
    """Random shapes, reductions and values."""
    for _ in range(count):
        elements, reduction = between(1 << 6, 1 << 24, draw), "mean"
        spread, masked = 1.0, None
        if op in (*SOFTMAX, *ACTIVATIONS, "cross_entropy"):
            spread = draw.choice((1.0, 1.0, 20.0, 100.0))
        if op in (*SOFTMAX, "cross_entropy"):
            masked = draw.choice((None, None, None, -math.inf, -1e4, -95.0))
        shape = split(elements, draw.randint(1, 4), draw)
        if op in (*SOFTMAX, *CLASSES):
            length = between(*draw.choice(LENGTHS), draw)
            rows = max(1, elements // length)
            shape = (*split(rows, draw.randint(1, 3), draw), length)
            if op not in SOFTMAX:
                shape = (rows, length)
            if op == "cross_entropy" and draw.random() < 0.3:
                n = between(1, 16, draw)
                shape = (n, length, max(1, rows // n))
        if op not in (*SOFTMAX, *ACTIVATIONS, "multilabel_soft_margin_loss"):  # a loss of each row
            reduction = draw.choice(("mean", "mean", "none"))
        yield Case(op, shape, dtype, reduction=reduction, masked=masked, spread=spread)


def edges(op: str, dtype: torch.dtype) -> Iterator[Case]:
    """The smallest that the kernels take: those that have the least to win."""
    for key in keys(op):
        for most, elements in ATEN_BELOW.get(key, {}).get(dtype, ()):
            if elements:
                yield case_of(op, key, dtype, int(min(most, 1 << 10)), elements)


def slower(times: cases.Times, margin: float) -> bool:
    """Beyond the spread, by the minima, too, and by more than a call that ATen takes may cost."""
    theirs, ours = (min(each) for each in times)
    return ratios(*times)[2] < margin and ours > max(theirs / margin, theirs + ALLOWED)


def sweep(options: Namespace) -> None:
    """Times both, of calls of random shapes, and lists those that are slower than torch's."""
    cases.settle_allocator()
    how = options.how
    ops = [op for op in options.op or OPS if how != PATCHED or hasattr(F, op)]
    seed = random.randrange(1 << 16) if options.seed is None else options.seed
    print(f"--seed {seed}")
    draw = random.Random(seed)
    points = [
        (case, mode, threads)
        for op in ops
        for name in options.dtype or ("float32", "bfloat16")
        for case in (*drawn(op, DTYPES[name], options.shapes, draw), *edges(op, DTYPES[name]))
        for mode in cases.MODES
        for threads in options.threads
    ]
    draw.shuffle(points)  # a noisy minute spoils no one operator
    found = []
    until = time.perf_counter() + options.minutes * 60
    for case, mode, threads in track(points, "Measuring", transient=True):
        if time.perf_counter() > until:
            print(f"out of time after {len(found)} of {len(points)} calls")
            break
        torch.set_num_threads(threads)
        try:
            timers = both(case, mode, how)
            times = cases.remeasured(timers, options.seconds, options.margin, fewest=4)
        except NotImplementedError:  # torch's
            continue
        found.append((case, mode, threads, times))
    found.sort(key=lambda each: ratios(*each[3])[1])
    rows = [
        [case.name, mode, str(threads), *cells(times), f"{min(times[0]) / min(times[1]):.2f}"]
        for case, mode, threads, times in found
        if slower(times, options.margin)
    ]
    names = ["case", "mode", "threads", "torch, ms", "pyfused, ms", "ratio", "of minima"]
    print(tabulated(names, rows, names=2))
    print(f"{len(rows)} of {len(found)} calls are slower than torch's beyond the spread")
    sys.exit(bool(rows))
