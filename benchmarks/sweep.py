"""Look for calls that pyfused makes slower than torch, over sizes, classes, dtypes and threads.

    python benchmarks/sweep.py
    python benchmarks/sweep.py --op relu --dtype bfloat16 --threads 2 --seconds 1 --all

A call counts as slower where the upper quartile of torch's time divided by pyfused's stays below
the tolerance in every one of several measurements, each longer than the one before. Exits with 1
where one does.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from cases import BF16, F16, F32, F64, MODES, SOFTMAX, TORCH, Case, M, draw, step
from measure import (
    LONGER,
    Quartiles,
    by_turns,
    plan,
    quartiles,
    ratios,
    settle_allocator,
    timed,
)
from rich.console import Console
from rich.progress import track
from rich.table import Table

import pyfused.functional
from pyfused.ops.dispatch import aten_is_faster
from pyfused.ops.operators import OPERATORS
from pyfused.ops.sizes import ATEN_BELOW

drawn = lru_cache(maxsize=1)(draw)  # what is measured again is drawn once
DTYPES = {"float32": F32, "float64": F64, "bfloat16": BF16, "float16": F16}
ELEMENTS = (1, 64, 4096, 1 << 14, 1 << 16, 1 << 18, M, 4 * M, 32 * M)
CLASSES = (2, 10, 24, 64, 500, 1000, 32000, 262144)
LOGITS = (1 << 12, 1 << 16, 1 << 19, 1 << 22, 1 << 24)
ROWS = (*SOFTMAX, "nll_loss", "multi_margin_loss")
IMAGES = ((1, 2, 16, 16), (2, 21, 32, 32), (4, 10, 64, 64), (2, 21, 256, 256), (1, 150, 256, 256))


@dataclass(frozen=True)
class Point:
    case: Case
    threads: int


@dataclass(frozen=True)
class Finding:
    point: Point
    torch_ms: float
    pyfused_ms: float
    ratio: Quartiles


def shapes(op: str, dtype: torch.dtype) -> Iterator[tuple[int, ...]]:
    """From one element to 32 M; for cross_entropy to 100 million, 262,144 classes, K dimensions."""
    if op == "cross_entropy":
        yield 1, 1
        yield 4096, 1
        yield 100_000, 1000
        for classes in CLASSES:
            yield 1, classes
            yield from ((n // classes, classes) for n in LOGITS if n >= 2 * classes)
        yield from IMAGES
    elif op in ROWS:
        for classes in CLASSES:
            yield from ((n // classes, classes) for n in LOGITS if n >= classes)
    else:
        yield from ((elements,) for elements in ELEMENTS)
    yield from handovers(op, dtype)


def handovers(op: str, dtype: torch.dtype) -> Iterator[tuple[int, ...]]:
    """The smallest calls that the kernels take: those that have the least to win."""
    fewest = 2
    for most, below in ATEN_BELOW[op][dtype]:
        if op == "cross_entropy":
            for classes in (fewest, min(most, 2 * fewest)):
                yield math.ceil(below / classes), int(classes)
            fewest = int(min(most + 1, below))
        elif op in ROWS:
            yield from ((math.ceil(below / classes), classes) for classes in CLASSES[:-1])
        else:
            yield (below,)


def points(ops: Sequence[str], dtypes: Sequence[str], threads: Sequence[int]) -> list[Point]:
    found = [
        Point(Case(op, shape, DTYPES[dtype]), count)
        for op in ops
        for dtype in dtypes
        for shape in dict.fromkeys(shapes(op, DTYPES[dtype]))
        for count in threads
    ]
    random.Random(0).shuffle(found)  # a noisy minute spoils no one operator
    return found


def measure(point: Point, seconds: float) -> Finding:
    torch.set_num_threads(point.threads)
    arguments = drawn(point.case)
    steps = [step(o, point.case, arguments, MODES[-1]) for o in (TORCH, pyfused.functional)]
    rounds, calls = plan(steps, seconds, fewest=4)
    times = by_turns([partial(timed, call, calls) for call in steps], rounds)
    torch_ms, pyfused_ms = (1e3 * quartiles(all_)[1] / calls for all_ in times)
    return Finding(point, torch_ms, pyfused_ms, ratios(*times))


def examine(point: Point, seconds: float, tolerance: float) -> Finding:
    """Measure, and where pyfused looks slower measure longer, until it does not."""
    for factor in LONGER:
        finding = measure(point, factor * seconds)
        if finding.ratio[1] >= tolerance:
            break
    return finding


def tabulate(findings: Sequence[Finding], tolerance: float) -> Table:
    table = Table("case", title="forward+backward, the slowest beside torch first")
    for name in ("threads", "torch, us", "pyfused, us", "torch / pyfused", "taken by"):
        table.add_column(name, justify="right")
    for column in table.columns:
        column.no_wrap = True
    for finding in findings:
        case, (low, median, high) = finding.point.case, finding.ratio
        colour = "red" if high < tolerance else "yellow" if median < tolerance else "default"
        aten = aten_is_faster(case.op, torch.empty((), dtype=case.dtype).expand(case.shape))
        table.add_row(
            case.name,
            str(finding.point.threads),
            f"{1e3 * finding.torch_ms:,.1f}",
            f"{1e3 * finding.pyfused_ms:,.1f}",
            f"[{colour}]{median:.2f} ({low:.2f} to {high:.2f})[/]",
            "ATen" if aten else "pyfused",
        )
    return table


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", nargs="+", choices=list(OPERATORS), default=list(OPERATORS))
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seconds", type=float, default=0.08, help="a case, default: %(default)s")
    parser.add_argument("--tolerance", type=float, default=0.95, help="default: %(default)s")
    parser.add_argument(
        "--rows", type=int, default=20, help="how many to print, default: %(default)s"
    )
    parser.add_argument("--all", action="store_true", help="print every row")
    return parser.parse_args()


def main() -> None:
    options = parse()
    settle_allocator()
    grid = points(options.op, options.dtype, options.threads)
    findings = [
        examine(point, options.seconds, options.tolerance)
        for point in track(grid, "Measuring", transient=True)
    ]
    findings.sort(key=lambda finding: finding.ratio[1])
    shown = findings if options.all else findings[: options.rows]
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(tabulate(shown, options.tolerance))
    slower = sum(finding.ratio[2] < options.tolerance for finding in findings)
    print(f"{slower} of {len(findings)} cases are slower than torch beyond the spread")
    sys.exit(slower > 0)


if __name__ == "__main__":
    main()
