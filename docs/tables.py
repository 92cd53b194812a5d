"""The tables of README.md and of docs/*.md, made from declarations and measurements."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from entries import GALLERY

from pyfused.dispatch.operator import Operator
from pyfused.dispatch.sizes import ALWAYS, LOGITS, NEVER, Limits, limits_of
from pyfused.ops.operators import OPERATORS

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("benchmarks", "examples")]

from report import RESULTS, Row, read_csv, row_of, tabulated
from steps import KEEP, RATIO

Cells = dict[str, str]  # a row of a CSV file
Measured = dict[str, dict[str, Cells]]  # by processor and way
H100 = RESULTS / "nvidia-h100-80gb-hbm3"


# ---- results -------------------------------------------------------------------------------------


def limits_on_cpu(op: Operator) -> Limits:
    """Returns the sizes from which an operator's kernels run, in float32 with two threads."""
    return limits_of(op.name, op.family, torch.float32, torch.device("cpu"), 2)


def cpu_tables(name: str) -> list[list[Cells]]:
    """Returns the tables of CPUs in files of this name, the newest last."""
    files = [file for file in RESULTS.glob(f"*/{name}.csv") if file.parent != H100]
    tables = map(read_csv, sorted(files))
    return sorted(tables, key=lambda table: (date(table[0]["machine"]), len(table)))


def date(machine: str) -> str:
    return re.findall(r"\d{4}-\d\d-\d\d", machine)[0]


def processor_of(row: Cells) -> str:
    return row["machine"].partition(",")[0]


def short(machine: str) -> str:
    """Returns processor, cores, threads, version of torch and date of a machine."""
    first, *words = re.split("[,;.] ", machine)
    known = re.compile(r"torch |CPU time|while |\d{4}-|\d+ (cores|threads?)")
    return f"{', '.join([first, *filter(known.match, words)])}."


def largest_cases() -> dict[str, Row]:
    """Returns the largest case, forward and backward, of each operator in its newest report."""
    found: dict[str, Row] = {}
    for table in cpu_tables("results"):
        newer: dict[str, Row] = {}
        for row in map(row_of, table):
            if row.op in OPERATORS and row.mode == "forward+backward" and "torch" in row.peers:
                first = newer.setdefault(row.op, row)
                newer[row.op] = max(first, row, key=lambda row: (row.headline, row.elements))
        found |= newer
    return found


def compared(row: Row) -> list[str]:
    """Returns the peers of a case, without those with `keep` if torch computed its calls then."""
    by_torch = limits_on_cpu(OPERATORS[row.op]).from_elements == LOGITS
    return [peer for peer in row.peers if not (by_torch and peer.endswith(KEEP))]


def newest_steps() -> dict[str, Measured]:
    """Returns the newest training steps of each model on each processor, by way."""
    found: dict[str, Measured] = {}
    for table in cpu_tables("steps"):
        processor, newer = processor_of(table[0]), dict[str, dict[str, Cells]]()
        for row in table:
            way = "convert, torch.compile" if row["way"] == COMPILED_BY_NAME else row["way"]
            newer.setdefault("{model}, {dtype}, {batch}".format_map(row), {})[way] = row
        for name, ways in newer.items():
            # Shorter steps vary more between processes than between ways.
            if KEPT[0] in ways and float(ways[KEPT[0]]["torch, ms"]) > SHORTEST:
                found.setdefault(name, {})[processor] = ways
    return found


def h100_heads() -> dict[str, dict[str, list[str]]]:
    """Returns the cells of heads with cross-entropy by sizes and implementation.

    The cells are milliseconds, GiB and the time divided by the time of the products.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for line in (H100 / "heads.md").read_text(encoding="utf-8").splitlines():
        sizes, loss, way, *cells = (re.split(r" *\| *", line)[1:-1] + [""] * 3)[:6]
        if loss == "cross-entropy":
            found.setdefault(sizes, {})[way] = cells
    return found


# ---- numbers -------------------------------------------------------------------------------------


def certain(low: float, middle: float, high: float) -> float:
    """Returns the median of a ratio, 1 if its quartiles lie on both sides of 1."""
    return 1.0 if low < 1 < high else middle


def rounded(ratio: float) -> str:
    return "1.0" if ratio == 1 else f"{ratio:.2f}"


def span(values: dict[str, float], shown: Callable[[float], str] = rounded) -> str:
    """Returns the range of a number over processors, and the processor if it is the only one."""
    if not values:
        return "n/a"
    low, high = shown(min(values.values())), shown(max(values.values()))
    (_, name, *_), *others = (processor.split() for processor in values)
    return (low if low == high else f"{low} to {high}") + f" ({name})" * (not others)


def milliseconds(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def middle_and_range(ratios: Sequence[float]) -> str:
    if not ratios:
        return "n/a"
    shown = [
        f"{x:.1f}" if x < 10 else f"{x:.0f}" for x in (median(ratios), min(ratios), max(ratios))
    ]
    return "{} ({} to {})".format(*shown)


# ---- operators -----------------------------------------------------------------------------------


def groups() -> dict[str, list[str]]:
    """Returns the declared operators of each group that is not empty."""
    found = {
        group: [name for name in names if name in OPERATORS] for group, names in GALLERY.items()
    }
    return {group: names for group, names in found.items() if names}


def operators() -> str:
    """Returns the operators with kernels."""
    rows = [[group, ", ".join(f"`{n}`" for n in names)] for group, names in groups().items()]
    return tabulated(["group", "functions"], rows, names=2)


def smallest() -> str:
    """Returns the operators that have the same smallest input on CPUs, in the order of sizes."""
    by_size: dict[int, list[str]] = {}
    for name, op in OPERATORS.items():
        by_size.setdefault(limits_on_cpu(op).from_elements, []).append(f"`{name}`")
    rows = [[words(size), ", ".join(names)] for size, names in sorted(by_size.items())]
    return tabulated(["elements", "operators"], rows, names=2)


def sizes(operator: str) -> str:
    """Returns the smallest inputs that run a kernel on CPUs, in float32 and with two threads."""
    columns = ["elements", "few classes", "without gradient", "unreduced"]
    limits = zip(columns, limits_on_cpu(OPERATORS[operator]), strict=False)
    known = {column: words(limit) for column, limit in limits if limit}
    return tabulated([*known], [[*known.values()]], names=0)


def words(limit: int) -> str:
    return {0: "", ALWAYS: "any", NEVER: "none"}.get(limit, f"{limit:,}")


PEERS = {
    "torch, keep": "eager torch with `keep`",
    "torch.compile, keep": "`torch.compile` with `keep`",
    "torch": "eager torch",
    "torch, THP": "eager torch with huge pages (`THP_MEM_ALLOC_ENABLE=1`)",
    "torch.compile": "`torch.compile`",
}


def headline() -> str:
    """Returns the speed-up of large losses over each way to run torch, on each processor."""
    newest = {processor_of(table[0]): table for table in cpu_tables("results")}
    columns, captions = {}, []
    for processor, table in reversed(newest.items()):
        rows = [row for row in map(row_of, table) if row.op in OPERATORS and row.headline]
        rows = [row for row in rows if row.op.endswith(("loss", "entropy", "kl_div", "logits"))]
        peers = [row.peers for row in rows if row.mode == "forward+backward"]
        columns[processor] = [
            [certain(*each[name].ratio) for each in peers if name in each] for name in PEERS
        ]
        captions.append(f"{len(peers)} losses: {short(table[0]['machine'])}")
    lines = [
        [shown, *map(middle_and_range, ratios)]
        for shown, *ratios in zip(PEERS.values(), *columns.values(), strict=True)
    ]
    table = tabulated(["compared with", *columns], lines, names=1)
    return f"{table}\n\n*Medians and ranges over large losses. {' '.join(captions)}*"


# ---- training steps ------------------------------------------------------------------------------

WAYS = {
    "torch, keep": "`keep`",
    "convert": "`convert`",
    "convert, keep": "`keep`, `convert`",
    "torch.compile": "`torch.compile`",
    "torch.compile, keep": "`torch.compile`, `keep`",
    "convert, torch.compile": "`torch.compile`, `convert`",
}
SHORTEST = 10.0  # milliseconds
# The rows of README.md: the beginning of a model's name, the ways to use pyfused in eager and in
# compiled programs, and their line.
CONVERTED = "convert", "convert, torch.compile", "`pyfused.convert(model)`"
KEPT = "torch, keep", "torch.compile, keep", "`pyfused.memory.keep()`"
GAINS = (
    ("recommender", *CONVERTED[:2], '`pyfused.convert(model, head="head")`'),
    ("GPT-2 small, float32", *CONVERTED),
    ("BERT", *CONVERTED),
    ("ResNet", *KEPT),
    ("U-Net", *KEPT),
)
COMPILED_BY_NAME = "linear_cross_entropy, torch.compile"
ON_GPU = "linear_cross_entropy", COMPILED_BY_NAME, "`linear_cross_entropy`"
NOTE = (
    "Speed-up over eager torch: medians, and their range over processors, or the only one that was"
    " measured. 1.0: no measurable difference. On the Xeon, the compiled programs called"
    " `linear_cross_entropy` instead of `convert`."
)


class Gain(NamedTuple):
    """Times and peaks of eager torch, compiled torch and eager pyfused."""

    model: str
    ms: Sequence[float]
    gib: Sequence[float]


def training_gains() -> list[Gain]:
    """Returns what a chart shows: each row of README.md on one processor."""
    gains = []
    for found, way, *_ in rows_of_readme():
        processor, ways = [*found.items()][-1]
        row, by_compiler = ways[way], ways["torch.compile"]
        times = [float(x) for x in (row["torch, ms"], by_compiler["ms"], row["ms"])]
        peaks = row["torch, peak"], by_compiler["peak"], row["peak"]
        name = row["model"] + ", H100" * ("H100" in processor)
        gains.append(Gain(name, times, [float(x) / 2**30 for x in peaks]))
    return gains


def rows_of_readme() -> list[tuple[Measured, str, str, str]]:
    """Returns the measurements of each row of README.md, its ways and its line."""
    names = newest_steps()
    found = [(names[x], *ways) for start, *ways in GAINS for x in names if x.startswith(start)]
    on_gpu = {row["way"]: row for row in read_csv(H100 / "steps.csv")}
    return [*found, ({"NVIDIA H100": on_gpu}, *ON_GPU)]


def title(row: Cells) -> str:
    """Returns the model, the dtype and the batch of a step."""
    batch = f"{row['batch']} {row['unit']}"
    if row["unit"] == "images":
        count, size = row["batch"].split(" x ")
        batch = f"{count} images of {size} x {size} pixels"
    return f"{row['model']}, {row['dtype']}, {batch}"


def speedups(found: Measured, ways: Iterable[str]) -> list[str]:
    """Returns the speed-up of each way over eager torch."""
    rows = [{each: x[way] for each, x in found.items() if way in x} for way in ways]
    return [
        span({each: certain(*(float(row[x]) for x in RATIO)) for each, row in by_processor.items()})
        for by_processor in rows
    ]


def machines_of_steps() -> str:
    """Returns the note of a table of training steps."""
    found = [ways[KEPT[0]] for each in newest_steps().values() for ways in each.values()]
    return " ".join(sorted({short(row["machine"]) for row in found}))


def gains() -> str:
    """Returns the table of README.md: speed-ups and peaks of training steps."""
    lines = []
    for found, way, compiled, line in rows_of_readme():
        rows = {processor: ways[way] for processor, ways in found.items()}
        peaks = {each: float(row["peak"]) / float(row["torch, peak"]) for each, row in rows.items()}
        speeds = speedups(found, (way, "torch.compile", compiled, KEPT[0]))
        lines.append([title(next(iter(rows.values()))), line, *speeds, span(peaks)])
    columns = ["model, dtype, batch", "line", "with the line", "`torch.compile`"]
    columns += ["`torch.compile` with the line", "torch with `keep`", "peak / eager torch's"]
    *_, on_gpu, _ = short(read_csv(H100 / "steps.csv")[0]["machine"]).split(", ")
    return f"{tabulated(columns, lines, names=2)}\n\n*{NOTE} {machines_of_steps()} H100: {on_gpu}.*"


def steps() -> str:
    """Returns all training steps that were measured on a CPU."""
    lines = []
    for found in newest_steps().values():
        kept = {processor: ways[KEPT[0]] for processor, ways in found.items()}
        converted = {each: ways["convert"] for each, ways in found.items() if "convert" in ways}
        columns = (kept, "torch, peak"), (kept, "peak"), (converted, "peak")
        lines.append(
            [
                title(next(iter(kept.values()))),
                span({each: float(row["torch, ms"]) for each, row in kept.items()}, milliseconds),
                *speedups(found, WAYS),
                *(
                    span({each: int(row[name]) / 2**30 for each, row in rows.items()})
                    for rows, name in columns
                ),
            ]
        )
    columns = ["model, dtype, batch", "eager torch, ms", *WAYS.values()]
    columns += [f"peak, GiB: {way}" for way in ("eager torch", "`keep`", "`convert`")]
    return f"{tabulated(columns, lines, names=1)}\n\n*{NOTE} {machines_of_steps()}*"


# ---- on a GPU ------------------------------------------------------------------------------------

GPU_HEADS = (
    *("three products", "pyfused", "torch", "torch.compile", "pyfused, memory_budget of a 16th"),
    *("Liger", "cut-cross-entropy"),
)


def gpu_heads() -> str:
    """Returns heads with cross-entropy on the H100."""
    lines = [
        [sizes, *(f"{float(ways[way][0]):.3g}, {ways[way][1]}" for way in GPU_HEADS)]
        for sizes, ways in h100_heads().items()
    ]
    table = tabulated(["tokens, features, classes", *GPU_HEADS], lines, names=1)
    caption, *_ = (H100 / "heads.md").read_text(encoding="utf-8").partition("\n")
    return f"{table}\n\n*{short(caption)}*"


def gpu_steps() -> str:
    """Returns the training steps on the H100."""
    rows = read_csv(H100 / "steps.csv")
    (first, *_) = rows
    each = [("eager torch", first["torch, ms"], first["torch, peak"])]
    each += [(f"`{row['way']}`", row["ms"], row["peak"]) for row in rows]
    lines = [[way, f"{float(ms):.1f}", f"{int(peak) / 2**30:.1f}"] for way, ms, peak in each]
    title = f"{first['model']}, {first['batch']} {first['unit']}, {first['dtype']} autocast, AdamW"
    table = tabulated([f"a training step of {title}", "ms", "GiB"], lines, names=1)
    return f"{table}\n\n*{short(first['machine'])}*"


# The parts of pages that `python docs/pages.py` writes.
PARTS = gains, operators, smallest, headline, steps, gpu_heads, gpu_steps
WRITTEN = {part.__name__: part for part in PARTS}
