"""Tables and pictures of what pytest-benchmark, the GPU suite and the allocators' comparison found.

They go to benchmarks/results/<machine>, and the headline cases to the pages that show them.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from cases import FORWARD, TRAINING, Case, Quartiles, ratios

from pyfused.backends import cpu

try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
except ImportError:  # as on a machine with a GPU: there are no pictures then
    Figure = None
if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
HEADLINE_PEERS = ("torch", "torch, THP", "torch.compile")  # in the README
KEY = {
    "torch": "eager, with the defaults of its allocator.",
    "torch, THP": "eager; torch and pyfused in a process with THP_MEM_ALLOC_ENABLE=1.",
    "torch.compile": "the operator alone, with Inductor's defaults; pyfused beside it is eager.",
    "copy": "a copy of as many bytes as the case must move at least, between buffers that are used"
    " again. Its time divided by pyfused's is the share of the bandwidth that pyfused reaches.",
}
BLOCK = re.compile(r"(?s)(?<=<!-- benchmark table -->\n).*?(?=<!-- end of benchmark table -->)")
Found = dict[str, Any]  # the JSON of pytest-benchmark


@dataclass(frozen=True)
class Peer:
    """How a peer did: milliseconds per call, beside pyfused's, and their ratio round by round."""

    ms: float
    pyfused_ms: float
    ratio: Quartiles


@dataclass(frozen=True)
class Row:
    """What one benchmark found. Times are medians."""

    case: str
    op: str
    mode: str
    headline: bool
    elements: int
    classes: int
    peers: dict[str, Peer]
    peak_gradients: float | None = None  # memory beyond what was there, in gradients of the input


def peer(theirs: Sequence[float], ours: Sequence[float]) -> Peer:
    return Peer(median(theirs), median(ours), ratios(theirs, ours))


def row(case: Case, mode: str, peers: dict[str, Peer], peak: float | None = None) -> Row:
    classes = case.shape[1] if case.op == "cross_entropy" else 1
    return Row(case.name, case.op, mode, case.headline, case.elements, classes, peers, peak)


# ---- where it was measured -----------------------------------------------------------------------


def machine_info() -> dict[str, Any]:
    import cpuinfo  # comes with pytest-benchmark

    found = cpuinfo.get_cpu_info()
    brand = found.get("brand_raw") or found["arch"]
    return {
        "cpu": re.sub(r"\((R|TM)\)| CPU| @.*", "", brand).strip(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": cpu.capability,
        "compiler": cpu.native.compiler,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def measured(info: dict[str, Any]) -> Found:
    """What a report says of the machine and the day."""
    return {"machine_info": info, "datetime": datetime.now(timezone.utc).isoformat()}


def machine(found: Found) -> str:
    words = {"cores": "{} cores", "threads": "{} threads", "driver": "driver {}"}
    words |= {"torch": "torch {}", "triton": "Triton {}", "liger": "Liger {}"}
    words |= {"python": "Python {}"}
    info = found["machine_info"].items()
    return ", ".join([*(words.get(k, "{}").format(v) for k, v in info), found["datetime"][:10]])


def slug(found: Found) -> str:
    """The name of a machine's folder: the instruction set decides which kernels were measured."""
    info = found["machine_info"]
    name = info.get("gpu") or f"{info['cpu']} {info['cores']} cores {info['isa']}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


# ---- tables --------------------------------------------------------------------------------------


def load(files: Sequence[Path]) -> Found:
    """What the files found, which are runs on one machine."""
    first, *others = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    for other in others:
        if other["machine_info"] != first["machine_info"]:
            sys.exit("the files come from different machines")
        first["benchmarks"] += other["benchmarks"]
        first["memory"] += other["memory"]
    return first


def rows_of(found: Found) -> list[Row]:
    """One row for each case and mode, with the peers of every run."""
    rows: dict[tuple[str, str], Row] = {}
    for benchmark in found["benchmarks"]:
        fields = benchmark["extra_info"]
        row = Row(**fields | {"peers": {n: Peer(**peer) for n, peer in fields["peers"].items()}})
        rows.setdefault((row.case, row.mode), row).peers.update(row.peers)
    return sorted(rows.values(), key=lambda row: row.case.split()[0])


def peers_of(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.peers))


def markdown(rows: Sequence[Row], peers: Sequence[str] = ()) -> str:
    """A table of ratios, beside the times of pyfused and of the first peer."""
    peers = peers or peers_of(rows)
    first = peers[0]
    columns = ["case", "mode", "pyfused, ms", f"{first}, ms", *(f"{n} / pyfused" for n in peers)]
    peaks = any(row.peak_gradients is not None for row in rows)
    columns += ["peak, gradients"] if peaks else []
    lines = []
    for row in rows:
        known = row.peers.get(first)
        cells = [row.case, row.mode]
        cells += [f"{known.pyfused_ms:.3g}", f"{known.ms:.3g}"] if known else ["", ""]
        cells += [spread(row.peers[name].ratio) if name in row.peers else "" for name in peers]
        if peaks:
            cells.append("" if row.peak_gradients is None else f"{row.peak_gradients:.2f}")
        lines.append(cells)
    return tabulated(columns, lines, names=2)


def tabulated(columns: Sequence[str], rows: Sequence[Sequence[str]], names: int) -> str:
    head = [columns, ["---"] * names + ["---:"] * (len(columns) - names)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (*head, *rows))


def spread(ratio: Sequence[float]) -> str:
    return "{1:.2f} ({0:.2f} to {2:.2f})".format(*ratio)


def allocators_markdown(found: Sequence[Found]) -> str:
    """How many times as fast as torch by default; a row for each allocator."""
    cases = list(dict.fromkeys(entry["case"] for entry in found))
    first, *others = dict.fromkeys(entry["setting"] for entry in found)
    by = {(entry["setting"], entry["case"]): entry for entry in found}
    rows = [[first, *(f"{by[first, case]['ms']:.3g} ms" for case in cases)]]
    rows += [[name, *(spread(by[name, case]["ratio"]) for case in cases)] for name in others]
    return tabulated(["", *cases], rows, names=1)


def fill(page: Path, table: str) -> None:
    """Replace the table between the markers of a page."""
    text = page.read_text(encoding="utf-8")
    if not BLOCK.search(text):
        sys.exit(f"{page} has no block between the markers of the benchmark table")
    page.write_text(BLOCK.sub(lambda _: f"\n{table}\n\n", text), encoding="utf-8")


# ---- pictures ------------------------------------------------------------------------------------

# From Okabe and Ito's palette, which every kind of colour vision tells apart.
STYLES = ((TRAINING, "#D55E00", "o", -0.17), (FORWARD, "#0072B2", "D", 0.17))
COLOURS = {
    "torch": "#0072B2",
    "torch.compile": "#009E73",
    "pyfused": "#D55E00",
    "pyfused, inplace=True": "#E69F00",
}


def draw_ratios(rows: Sequence[Row], peers: Sequence[str]) -> Figure:
    cases = list(dict.fromkeys(row.case for row in rows))
    figure = Figure(figsize=(3 + 4.5 * len(peers), 2 + 0.36 * len(cases)), layout="constrained")
    panels = figure.subplots(1, len(peers), squeeze=False, sharey=True)[0]
    for axes, name in zip(panels, peers, strict=True):
        for mode, color, marker, offset in STYLES:
            known = [row for row in rows if row.mode == mode and name in row.peers]
            if not known:  # a legend names what is there
                continue
            ratios = [row.peers[name].ratio for row in known]
            places = [cases.index(row.case) + offset for row in known]
            axes.hlines(places, [low for low, *_ in ratios], [high for *_, high in ratios], color)
            axes.plot([middle for _, middle, _ in ratios], places, marker, color=color, label=mode)
        axes.axvline(1, color="black", linewidth=1)
        axes.set_xscale("log")
        axes.set_xlim(left=min(0.7, axes.get_xlim()[0]))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_yticks(range(len(cases)), cases)
        axes.set_ylim(len(cases) - 0.5, -0.5)
        axes.set_xlabel(f"time of {name} / time of pyfused")
        for place in range(0, len(cases), 2):
            axes.axhspan(place - 0.5, place + 0.5, color="black", alpha=0.04, linewidth=0)
        finish(axes, "x", loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    figure.suptitle("How many times faster pyfused is: median of the rounds, and quartiles")
    return figure


def draw_memory(found: Sequence[Found]) -> Figure:
    cases = list(dict.fromkeys(entry["case"] for entry in found))
    figure = Figure(figsize=(10, 1.5 + 0.9 * len(cases)), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(COLOURS)
    for index, (name, colour) in enumerate(COLOURS.items()):
        entries = [entry for entry in found if entry["implementation"] == name]
        places = [cases.index(entry["case"]) + (index - 1.5) * width for entry in entries]
        taken = [entry["bytes"] / entry["input_bytes"] for entry in entries]
        bars = axes.barh(places, taken, width, color=colour, label=name)
        axes.bar_label(bars, [f"{entry['bytes'] / 2**20:,.0f} MiB" for entry in entries], padding=3)
    axes.set_yticks(range(len(cases)), cases)
    axes.invert_yaxis()
    axes.set_xlabel("peak memory beyond the arguments / memory of the input")
    finish(axes, "x", loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4)
    figure.suptitle("What a forward and backward pass takes at its peak")
    return figure


def draw_allocators(found: Sequence[Found]) -> Figure:
    """Milliseconds with each allocator, a panel for each case."""
    cases = list(dict.fromkeys(entry["case"] for entry in found))
    names = list(dict.fromkeys(entry["setting"] for entry in found))
    figure = Figure(figsize=(2.5 + 2.6 * len(cases), 1.5 + 0.34 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(cases), squeeze=False, sharey=True)[0]
    for axes, case in zip(panels, cases, strict=True):
        times = {entry["setting"]: entry["ms"] for entry in found if entry["case"] == case}
        colours = [COLOURS[name.partition(",")[0]] for name in names]
        bars = axes.barh(names, [times[name] for name in names], color=colours)
        axes.bar_label(bars, [f"{times[name]:.3g}" for name in names], padding=3, fontsize=8)
        axes.margins(x=0.2)
        axes.set_title(case, fontsize=8)
        axes.set_xlabel("milliseconds")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.suptitle("Forward + backward of large tensors, by their allocator")
    return figure


def finish(axes: Axes, grid: Any, **legend: Any) -> None:
    axes.grid(axis=grid, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, **legend)


# ---- the report ----------------------------------------------------------------------------------


def write(
    files: Sequence[Path],
    results: Path = RESULTS,
    allocators: Path | None = None,
    pages: Path | None = None,
) -> None:
    """Write a report; with `pages`, also the tables of README.md and docs/memory.md below it."""
    found = load(files)
    if allocators:
        found |= json.loads(allocators.read_text(encoding="utf-8"))
    rows = rows_of(found)
    folder = results / slug(found)
    folder.mkdir(parents=True, exist_ok=True)
    caption = f"{machine(found)}. Medians, and in brackets the quartiles of the ratio."
    known = peers_of(rows)
    key = "\n".join(f"- {name}: {text}" for name, text in KEY.items() if name in known)
    tables = [caption, markdown(rows), key]
    peers = [name for name in (*HEADLINE_PEERS, "liger", "copy") if name in known]
    drawn: dict[str, Callable[[], Figure]] = {"ratios": lambda: draw_ratios(rows, peers)}
    if found["memory"]:
        drawn["memory"] = lambda: draw_memory(found["memory"])
    if "allocators" in found:
        drawn["allocators"] = lambda: draw_allocators(found["allocators"])
        table = allocators_markdown(found["allocators"])
        tables.append(f"How many times as fast as torch, forward + backward:\n\n{table}")
        if pages:
            fill(pages / "docs/memory.md", f"{caption}\n\n{table}")
    (folder / "table.md").write_text("\n\n".join(tables) + "\n", encoding="utf-8")
    (folder / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, draw in drawn.items() if Figure else ():
        figure = draw()
        figure.suptitle(f"{figure.get_suptitle()}\n{machine(found)}", fontsize=10)
        figure.savefig(folder / f"{name}.png", dpi=150)
    if pages:
        headline = [row for row in rows if row.headline and row.mode == TRAINING]
        fill(pages / "README.md", f"{caption}\n\n{markdown(headline, HEADLINE_PEERS)}")
    print(markdown(rows), f"written to {folder}", sep="\n\n")
