"""Writes tables and plots from the results of pytest-benchmark, the GPU suite and allocators.

The output folder is benchmarks/results/<machine>. Tables of headline cases also go to docs/.
"""

from __future__ import annotations

import io
import json
import os
import platform
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from cases import TRAINING, Case, Quartiles, ratios

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from palette import STYLES

from pyfused.backends import cpu

try:
    from matplotlib import rc_context, rcParams
    from matplotlib.figure import Figure
    from matplotlib.text import Text
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
except ImportError:  # without matplotlib, no plots are drawn
    Figure = None
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
HEADLINE_PEERS = ("torch", "torch, THP", "torch.compile", "copy")  # in docs/benchmarks.md
KEY = {
    "torch": "eager, with the defaults of its allocator.",
    "torch, THP": "eager; torch and pyfused in a process with THP_MEM_ALLOC_ENABLE=1.",
    "torch.compile": "the operator alone, with Inductor's defaults; pyfused beside it is eager.",
    "pyfused, compiled": "pyfused's operator alone under torch.compile.",
    "copy": "of as many bytes as the case must move at least, between buffers that are used again."
    " Its time divided by pyfused's is the share; GB/s are these bytes by pyfused's time.",
}
BLOCK = re.compile(r"(?s)(?<=<!-- benchmark table -->\n).*?(?=<!-- end of benchmark table -->)")
Found = dict[str, Any]  # the JSON output of pytest-benchmark


@dataclass(frozen=True)
class Peer:
    """The result of a peer: milliseconds per call, pyfused's, and the ratio per round."""

    ms: float
    pyfused_ms: float
    ratio: Quartiles


@dataclass(frozen=True)
class Row:
    """The result of one benchmark. Times are medians."""

    case: str
    op: str
    mode: str
    headline: bool
    elements: int
    classes: int
    peers: dict[str, Peer]
    peak_gradients: float | None = None  # peak memory, in multiples of the input's gradient
    bytes: int = 0  # the minimum number of bytes read and written


def peer(theirs: Sequence[float], ours: Sequence[float]) -> Peer:
    return Peer(median(theirs), median(ours), ratios(theirs, ours))


def row(case: Case, mode: str, peers: dict[str, Peer], peak: float | None = None) -> Row:
    classes = case.shape[1] if case.op == "cross_entropy" else 1
    moved = case.traffic(mode) * case.bytes
    return Row(case.name, case.op, mode, case.headline, case.elements, classes, peers, peak, moved)


# ---- the machine ---------------------------------------------------------------------------------


def machine_info() -> dict[str, Any]:
    import cpuinfo  # installed with pytest-benchmark

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
    """Returns a description of the machine, with the date, for a report."""
    return {"machine_info": info, "datetime": datetime.now(timezone.utc).isoformat()}


def machine(found: Found) -> str:
    words = {"cores": "{} cores", "threads": "{} threads", "driver": "driver {}"}
    words |= {"torch": "torch {}", "triton": "Triton {}", "liger": "Liger {}"}
    words |= {"python": "Python {}"}
    info = found["machine_info"].items()
    described = [words.get(k, "{}").format(v) for k, v in info]
    described = ["1 thread" if each == "1 threads" else each for each in described]
    return ", ".join([*described, found["datetime"][:10]])


def slug(found: Found) -> str:
    """Returns the name of a machine's folder, which includes the kernels' instruction set."""
    info = found["machine_info"]
    if "gpu" in info:
        name = info["gpu"]
    else:
        threads = "" if info["threads"] == info["cores"] else f" {info['threads']} threads"
        name = f"{info['cpu']} {info['cores']} cores{threads} {info['isa']}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


# ---- tables --------------------------------------------------------------------------------------


def load(files: Sequence[Path]) -> Found:
    """Merges the results of several runs on one machine."""
    first, *others = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    for other in others:
        if other["machine_info"] != first["machine_info"]:
            sys.exit("the files come from different machines")
        first["benchmarks"] += other["benchmarks"]
        first["memory"] += other["memory"]
    return first


def rows_of(found: Found) -> list[Row]:
    """Returns one row for each case and mode, with the peers of all runs."""
    rows: dict[tuple[str, str], Row] = {}
    for benchmark in found["benchmarks"]:
        fields = benchmark["extra_info"]
        row = Row(**fields | {"peers": {n: Peer(**peer) for n, peer in fields["peers"].items()}})
        rows.setdefault((row.case, row.mode), row).peers.update(row.peers)
    return sorted(rows.values(), key=lambda row: row.case.split()[0])


def peers_of(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.peers))


def markdown(rows: Sequence[Row], peers: Sequence[str] = ()) -> str:
    """Returns a table with the times of pyfused and of the first peer, and ratios."""
    peers = peers or peers_of(rows)
    first = peers[0]
    several = len({row.mode for row in rows}) > 1
    columns = ["case", *["mode"] * several, "pyfused, ms", f"{first}, ms"]
    columns += ["share of a copy" if n == "copy" else f"{n} / pyfused" for n in peers]
    speeds = any(row.bytes for row in rows)
    columns += ["GB/s"] if speeds else []
    peaks = any(row.peak_gradients is not None for row in rows)
    columns += ["peak, gradients"] if peaks else []
    lines = []
    for row in rows:
        known = row.peers.get(first)
        cells = [row.case, *[row.mode] * several]
        cells += [f"{known.pyfused_ms:.3g}", f"{known.ms:.3g}"] if known else ["", ""]
        cells += [spread(row.peers[name].ratio) if name in row.peers else "" for name in peers]
        if speeds:
            known = row.peers.get("copy")  # present for memory-bound cases
            cells.append(f"{row.bytes / known.pyfused_ms / 1e6:.3g}" if known else "")
        if peaks:
            cells.append("" if row.peak_gradients is None else f"{row.peak_gradients:.2f}")
        lines.append(cells)
    return tabulated(columns, lines, names=1 + several)


def tabulated(columns: Sequence[str], rows: Sequence[Sequence[str]], names: int) -> str:
    head = [columns, ["---"] * names + ["---:"] * (len(columns) - names)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (*head, *rows))


def spread(ratio: Sequence[float]) -> str:
    return "{1:.2f} ({0:.2f} to {2:.2f})".format(*ratio)


def allocators_markdown(found: Sequence[Found]) -> str:
    """Returns a table of speed-ups over torch's default allocator, one row per allocator."""
    cases = list(dict.fromkeys(entry["case"] for entry in found))
    first, *others = dict.fromkeys(entry["setting"] for entry in found)
    by = {(entry["setting"], entry["case"]): entry for entry in found}
    rows = [[first, *(f"{by[first, case]['ms']:.3g} ms" for case in cases)]]
    rows += [[name, *(spread(by[name, case]["ratio"]) for case in cases)] for name in others]
    return tabulated(["", *cases], rows, names=1)


def fill(page: Path, table: str) -> None:
    """Replaces the table between the markers of a page."""
    text = page.read_text(encoding="utf-8")
    if not BLOCK.search(text):
        sys.exit(f"{page} has no block between the markers of the benchmark table")
    page.write_text(BLOCK.sub(lambda _: f"\n{table}\n\n", text), encoding="utf-8")


# ---- plots ---------------------------------------------------------------------------------------

USES_MEMORY = ("torch", "torch.compile", "pyfused", "pyfused, inplace=True")
INK, INK_ON_BLACK = "#0d0e0f", "#e8e8e8"  # colours of text and axes
WIDTH = 8  # inches; pages do not scale plots


def draw_ratios(rows: Sequence[Row], peers: Sequence[str]) -> Figure:
    """Plots one line per case, with the median and the quartiles of each peer's ratio."""
    several = len({row.mode for row in rows}) > 1
    names = [f"{row.case}, {row.mode}" if several else row.case for row in rows]
    figure = Figure(figsize=(WIDTH, 1.6 + 0.28 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for index, name in enumerate(peers):
        known = [(place, row) for place, row in enumerate(rows) if name in row.peers]
        places = [place + 0.18 * (index - (len(peers) - 1) / 2) for place, _ in known]
        ratios = [row.peers[name].ratio for _, row in known]
        colour, marker = STYLES[name]
        axes.hlines(places, [low for low, *_ in ratios], [high for *_, high in ratios], colour)
        middle = [median for _, median, _ in ratios]
        axes.plot(middle, places, marker, color=colour, markersize=4, label=name)
    for place in range(0, len(rows), 2):
        axes.axhspan(place - 0.5, place + 0.5, color=INK, alpha=0.06, linewidth=0)
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    finish_ratios(axes)
    # The chart is tall, so there is another axis at the top, and the legend is at the top.
    axes.tick_params(axis="x", top=True, labeltop=True)
    above = {"loc": "lower center", "bbox_to_anchor": (0.3, 1), "borderaxespad": 1.8}
    axes.legend(**above, ncols=len(peers), frameon=False)
    axes.grid(axis="x", color=INK, alpha=0.15, linewidth=0.6)
    figure.suptitle("Time of each divided by time of pyfused: median of the rounds, and quartiles")
    return figure


def finish_ratios(axes: Axes) -> None:
    """Draws a logarithmic axis of ratios, with a line at 1."""
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_xscale("log")
    axes.set_xlim(left=min(0.8, axes.get_xlim()[0]))
    label_ratios(axes.xaxis)


def label_ratios(axis: Axis) -> None:
    """Labels 1, 2 and 5 times each power of ten, as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}"))
    axis.set_minor_formatter(NullFormatter())


def draw_memory(found: Sequence[Found]) -> Figure:
    cases = list(dict.fromkeys(entry["case"] for entry in found))
    figure = Figure(figsize=(WIDTH, 1.5 + 0.8 * len(cases)), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(USES_MEMORY)
    for index, name in enumerate(USES_MEMORY):
        entries = [entry for entry in found if entry["implementation"] == name]
        places = [cases.index(entry["case"]) + (index - 1.5) * width for entry in entries]
        taken = [entry["bytes"] / entry["input_bytes"] for entry in entries]
        bars = axes.barh(places, taken, width, color=STYLES[name][0], label=name)
        sizes = [f"{entry['bytes'] / 2**20:,.0f} MiB" for entry in entries]
        axes.bar_label(bars, sizes, padding=3, fontsize=8)
    axes.set_yticks(range(len(cases)), cases)
    axes.invert_yaxis()
    axes.set_xlabel("peak memory beyond the arguments / memory of the input")
    finish(axes, "x", ncols=4)
    figure.suptitle("What a forward and backward pass takes at its peak")
    return figure


def draw_allocators(found: Sequence[Found]) -> Figure:
    """Plots the milliseconds with each allocator, one panel per case."""
    cases = list(dict.fromkeys(entry["case"] for entry in found))
    names = list(dict.fromkeys(entry["setting"] for entry in found))
    lines = -(-len(cases) // 2)
    size = WIDTH, 0.8 + lines * (0.7 + 0.22 * len(names))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(lines, 2, squeeze=False, sharey=True).flat
    for axes, case in zip(panels, cases, strict=False):
        times = {entry["setting"]: entry["ms"] for entry in found if entry["case"] == case}
        colours = [STYLES[name.partition(",")[0]][0] for name in names]
        bars = axes.barh(names, [times[name] for name in names], color=colours)
        axes.bar_label(bars, [f"{times[name]:.3g}" for name in names], padding=3, fontsize=8)
        axes.margins(x=0.15)
        axes.set_title(case, fontsize=9)
    for axes in list(figure.axes)[len(cases) :]:
        axes.remove()
    figure.axes[0].invert_yaxis()
    figure.suptitle("Milliseconds of a forward and backward pass, by allocator")
    return figure


def finish(axes: Axes, grid: Any, **legend: Any) -> None:
    axes.grid(axis=grid, color=INK, alpha=0.15, linewidth=0.6)
    axes.figure.legend(loc="outside lower center", frameon=False, **legend)


def svg(figure: Figure, title: str) -> str:
    """Renders a figure as SVG: transparent, with text as text, and deterministic."""
    for axes in figure.axes:
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(INK)
        axes.tick_params(colors=INK, labelsize=9)
    for text in figure.findobj(Text):
        text.set_color(INK)
    file = io.StringIO()
    options = {"svg.fonttype": "none", "svg.hashsalt": title, "svg.id": None}
    with rc_context({name: value for name, value in options.items() if name in rcParams}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return re.sub(r"(?s)\s*<metadata>.*?</metadata>", "", file.getvalue())


def save(figure: Figure, path: Path) -> None:
    """Writes NAME.svg for white backgrounds, and NAME-dark.svg for black backgrounds."""
    text = svg(figure, path.stem)
    path.with_suffix(".svg").write_text(text, encoding="utf-8")
    dark = text.replace(INK, INK_ON_BLACK)
    path.with_name(f"{path.stem}-dark.svg").write_text(dark, encoding="utf-8")


# ---- the report ----------------------------------------------------------------------------------


def write(
    files: Sequence[Path],
    results: Path = RESULTS,
    allocators: Path | None = None,
    pages: Path | None = None,
) -> None:
    """Writes a report; with `pages`, also the tables in docs/ of that folder."""
    found = load(files)
    if allocators:
        found |= json.loads(allocators.read_text(encoding="utf-8"))
    rows = rows_of(found)
    if not rows:
        sys.exit(f"no benchmark has succeeded: {found.get('left_out')}")
    folder = results / slug(found)
    folder.mkdir(parents=True, exist_ok=True)
    caption = f"{machine(found)}. Medians, and in brackets the quartiles of the ratio."
    known = peers_of(rows)
    key = "\n".join(f"- {name}: {text}" for name, text in KEY.items() if name in known)
    tables = [caption, markdown(rows), key]
    peers = [name for name in (*HEADLINE_PEERS, "liger") if name in known]
    headline = [row for row in rows if row.headline and row.mode == TRAINING]
    drawn: dict[str, Callable[[], Figure]] = {"ratios": lambda: draw_ratios(headline, peers)}
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
        where = textwrap.fill(machine(found), 90)
        figure.suptitle(f"{figure.get_suptitle()}\n{where}", fontsize=10)
        save(figure, folder / name)
    if pages:
        fill(pages / "docs/benchmarks.md", f"{caption}\n\n{markdown(headline, HEADLINE_PEERS)}")
    print(markdown(rows), f"written to {folder}", sep="\n\n")
