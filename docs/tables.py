"""The tables of README.md and of docs/*.md, made from declarations and measurements."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from entries import GALLERY

from pyfused.dispatch.operator import Operator
from pyfused.dispatch.sizes import ALWAYS, LOGITS, NEVER, Limits, limits_of
from pyfused.ops.operators import OPERATORS

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("benchmarks", "examples")]

from report import RESULTS, Row, read_csv, row_of, tabulated
from steps import KEEP, RATIO

Cells = dict[str, str]  # a row of a CSV file
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


def short(machine: str) -> str:
    """Returns processor, cores, threads, version of torch and date of a machine."""
    first, *words = re.split("[,;.] ", machine)
    known = re.compile(r"torch |CPU time|\d{4}-|\d+ (cores|threads?)")
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


def newest_steps() -> dict[str, dict[str, Cells]]:
    """Returns the newest training steps of each model on a CPU, by way."""
    found: dict[str, dict[str, Cells]] = {}
    for table in cpu_tables("steps"):
        newer: dict[str, dict[str, Cells]] = {}
        for row in table:
            newer.setdefault("{model}, {dtype}, {batch}".format_map(row), {})[row["way"]] = row
        found |= newer
    # Shorter steps vary more between processes than between ways.
    kept = {name: ways for name, ways in found.items() if KEPT[0] in ways}
    return {n: ways for n, ways in kept.items() if float(ways[KEPT[0]]["torch, ms"]) > SHORTEST}


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

NOISE = "1.0: no measurable difference."


def certain(low: float, middle: float, high: float) -> float:
    """Returns the median of a ratio, 1 if its quartiles lie on both sides of 1."""
    return 1.0 if low < 1 < high else middle


def rounded(low: float, middle: float, high: float) -> str:
    ratio = certain(low, middle, high)
    return "1.0" if ratio == 1 else f"{ratio:.2f}"


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
    newest = {table[0]["machine"].partition(",")[0]: table for table in cpu_tables("results")}
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
ON_GPU = "convert", "linear_cross_entropy, torch.compile"
LINE_ON_GPU = f"{CONVERTED[-1]}; compiled: `linear_cross_entropy`"
HEAD_ON_GPU = "(8192, 1024, 151936)"


class Gain(NamedTuple):
    """A row of README.md.

    Attributes:
        ms: Times of eager and of compiled torch, then of pyfused; NaN if not measured.
        gib: Peaks of eager torch, of compiled torch, and of eager pyfused.
    """

    model: str
    sizes: str
    line: str
    ms: Sequence[float]
    gib: Sequence[float]


def gain(ways: dict[str, Cells], eager: str, compiled: str, line: str, on: str = "") -> Gain:
    row, by_compiler = ways[eager], ways["torch.compile"]
    times = row["torch, ms"], by_compiler["ms"], row["ms"], ways[compiled]["ms"]
    peaks = row["torch, peak"], by_compiler["peak"], row["peak"]
    sizes = "{dtype}, {batch}".format_map(row)
    return Gain(row["model"] + on, sizes, line, *numbers(times, [int(x) / 2**30 for x in peaks]))


def numbers(*columns: Sequence[Any]) -> list[list[float]]:
    return [[*map(float, column)] for column in columns]


def training_gains() -> list[Gain]:
    """Returns the training steps of README.md, and a head alone on an H100."""
    found = newest_steps()
    models = [
        (found[name], *ways) for start, *ways in GAINS for name in found if name.startswith(start)
    ]
    on_gpu = {row["way"]: row for row in read_csv(H100 / "steps.csv")}
    heads = h100_heads()[HEAD_ON_GPU]
    ms, gib, _ = zip(*(heads[way] for way in ("torch", "torch.compile", "pyfused")), strict=True)
    tokens, features, classes = map(int, re.findall(r"\d+", HEAD_ON_GPU))
    head = f"a head alone, {classes:,} classes, H100", f"bfloat16, {tokens} x {features}"
    return [
        *(gain(*model) for model in models),
        gain(on_gpu, *ON_GPU, LINE_ON_GPU, ", H100"),
        Gain(*head, "`linear_cross_entropy`", *numbers([*ms, math.nan], gib)),
    ]


def step_machines(found: dict[str, dict[str, Cells]]) -> str:
    """Returns the machines of training steps, each once, with its models from the second on."""
    by_machine: dict[str, list[str]] = {}
    for name, ways in found.items():
        by_machine.setdefault(short(ways[KEPT[0]]["machine"]), []).append(name.partition(",")[0])
    first, *others = by_machine
    return " ".join([first, *(f"{', '.join(by_machine[each])}: {each}" for each in others)])


def gains() -> str:
    """Returns the table of README.md: times and peaks of training steps."""
    lines = [
        [
            *(f"{row.model}, {row.sizes}", row.line),
            *(milliseconds(row.ms[way]) for way in (0, 2, 1, 3)),
            *(f"{row.gib[way]:.2f}" for way in (0, 2)),
        ]
        for row in training_gains()
    ]
    pairs = ("eager step, ms", "compiled step, ms", "eager peak, GiB")
    columns = [cell for pair in pairs for cell in (f"{pair}: torch", "with pyfused")]
    table = tabulated(["model, dtype, batch", "line", *columns], lines, names=2)
    *_, on_gpu, _ = short(read_csv(H100 / "steps.csv")[0]["machine"]).split(", ")
    batch = "Batch: samples, sequences x tokens, images x width, or tokens x features."
    _, compiled, _ = training_gains()[-1].gib
    head = f"For the head alone: without operands; compiled torch {compiled:.2f} GiB."
    note = f"Medians; peaks without libraries. {head} {batch}"
    starts = tuple(start for start, *_ in GAINS)
    shown = {name: ways for name, ways in newest_steps().items() if name.startswith(starts)}
    return f"{table}\n\n*{note} {step_machines(shown)} H100: {on_gpu}.*"


def steps() -> str:
    """Returns all training steps that were measured on a CPU."""
    found, lines = newest_steps(), []
    for name, rows in found.items():
        kept = rows[KEPT[0]]
        speeds = [
            rounded(*(float(rows[way][x]) for x in RATIO)) if way in rows else "n/a" for way in WAYS
        ]
        peaks = kept["torch, peak"], kept["peak"], rows.get("convert", {}).get("peak")
        gib = [f"{int(peak) / 2**30:.2f}" if peak else "n/a" for peak in peaks]
        lines.append([name, f"{float(kept['torch, ms']):,.0f}", *speeds, *gib])
    columns = ["model, dtype, batch", "eager torch, ms", *WAYS.values()]
    columns += [f"peak, GiB: {way}" for way in ("eager torch", "`keep`", "`convert`")]
    note = f"Speed-up over eager torch, medians of ratios. {NOISE} {step_machines(found)}"
    return f"{tabulated(columns, lines, names=1)}\n\n*{note}*"


# ---- on a GPU ------------------------------------------------------------------------------------

GPU_HEADS = {
    "three products": "three products",
    "pyfused": "pyfused",
    "torch": "torch",
    "torch.compile": "`torch.compile`",
    "pyfused, memory_budget of a 16th": "pyfused, a 16th",
    "Liger": "Liger",
    "cut-cross-entropy": "cut-cross-entropy",
}


def gpu_heads() -> str:
    """Returns heads with cross-entropy on the H100."""
    lines = [
        [sizes, *(f"{float(ways[way][0]):.3g}, {ways[way][1]}" for way in GPU_HEADS)]
        for sizes, ways in h100_heads().items()
    ]
    table = tabulated(["tokens, features, classes", *GPU_HEADS.values()], lines, names=1)
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
WRITTEN: dict[str, Any] = {
    "gains": gains,
    "operators": operators,
    "sizes": smallest,
    "headline": headline,
    "steps": steps,
    "gpu heads": gpu_heads,
    "gpu steps": gpu_steps,
}
