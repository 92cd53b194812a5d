"""Writes tables and charts into pages, made from declarations and measurements.

`python docs/gallery.py` writes them, and `make docs` checks them. docs/entries.py has the text
about each operator. The pictures show the output of the kernels.
"""

from __future__ import annotations

import inspect
import io
import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
from entries import ENTRIES, GALLERY, Curve, Entry
from matplotlib import rc_context, rcParams
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from torch import Tensor

import pyfused
import pyfused.functional
from pyfused.dispatch.operator import Operator
from pyfused.dispatch.sizes import (
    ALWAYS,
    DEFAULT_ON_CPU,
    LOGITS,
    NEVER,
    ON_CPU,
    Limits,
    _row,
    limits_of,
)
from pyfused.ops.operators import OPERATORS

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("benchmarks", "examples")]

import report
import steps
from formulas import FORMULAS
from palette import SERIES, STYLES
from report import Row
from steps import KEEP

POINTS = 401
COLOURS = [colour for colour, _ in SERIES]
DOCS = Path(__file__).parent
README = DOCS.parent / "README.md"
CHARTS = DOCS / "charts"
INK, INK_ON_BLACK = "#0d0e0f", "#e8e8e8"  # colours of text and axes
WIDTH = 5.2  # of charts, in inches: their text is readable on a phone
H100 = report.RESULTS / "nvidia-h100-80gb-hbm3"


# ---- values of the kernels ----------------------------------------------------------------------


def evaluate(name: str, entry: Entry, curve: Curve) -> tuple[Tensor, Tensor, Tensor]:
    """Returns points, and the value and the gradient that the kernels compute at each."""
    x = torch.linspace(entry.low, entry.high, POINTS)
    return x, *_call(name, curve, x)


def _call(name: str, curve: Curve, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    others = [torch.full_like(x, other, requires_grad=False) for other in curve.others]
    input = torch.stack([x, *others], 1) if others else x
    input = input[:, None] if "linear_weight" in curve.options else input
    rest = [
        torch.full_like(x, value, dtype=torch.int64, requires_grad=False)
        if isinstance(value, int)
        else torch.full_like(input, value, requires_grad=False)
        for value in curve.arguments
    ]
    options = dict(curve.options)
    if "reduction" in inspect.signature(getattr(pyfused.functional, name)).parameters:
        options["reduction"] = "mean" if x.numel() == 1 else "none"
    path = pyfused.explain(name, input, *rest, **options)
    if path.backend == "torch":
        raise RuntimeError(f"the gallery must show the output of kernels, not torch's: {path}")
    value = getattr(pyfused.functional, name)(input, *rest, **options)
    value = value[0] if isinstance(value, tuple) else value
    drawn = value[:, 0] if value.dim() > x.dim() else value  # an activation over classes
    (gradient,) = torch.autograd.grad(drawn, x, torch.ones_like(drawn))
    return drawn.detach(), gradient


# ---- pictures ------------------------------------------------------------------------------------


def picture(name: str, entry: Entry) -> str:
    """Draws value and gradient of an operator as SVG, "" if it has no curves."""
    if not entry.curves:
        return ""
    figure = Figure(figsize=(WIDTH, 2.3), layout="constrained")
    value, gradient = figure.subplots(1, 2)
    for index, curve in enumerate(entry.curves):
        x, values, gradients = evaluate(name, entry, curve)
        # Thinner lines are drawn over thicker ones: both are visible where they agree.
        style = {"color": COLOURS[index], "linewidth": 0.6 + 0.7 * (len(entry.curves) - index)}
        value.plot(x, values, label=curve.label, **style)
        gradient.plot(x, gradients, **style)
    value.set_title("value", fontsize=10)
    gradient.set_title("gradient", fontsize=10)
    figure.supxlabel(entry.axis, fontsize=9)
    labels = [curve.label for curve in entry.curves]
    if any(labels):
        columns = len(labels) if sum(map(len, labels)) <= 40 else 2
        figure.legend(loc="outside upper center", ncols=columns, frameon=False, fontsize=9)
    return svg(figure, f"Value and gradient of {name}")


# Formulas with a target other than 0 or a bounded input: the target, the lowest and highest x.
_DRAWN: dict[str, tuple[Any, float, float]] = {
    "tweedie": (1.0, -3.0, 3.0),
    "asymmetric": (1.0, -6.0, 6.0),
    "generalized_cross_entropy": (None, 0.02, 1.0),
}


def formulas() -> Figure:
    """Draws value and gradient of each formula of the examples."""
    figure = Figure(figsize=(WIDTH, 8), layout="constrained")
    panels = figure.subplots(len(FORMULAS) // 2, 2).flat
    for panel, (name, formula) in zip(panels, FORMULAS.items(), strict=True):
        target, low, high = _DRAWN.get(name, (0.0, -6.0, 6.0))
        x = torch.linspace(low, high, POINTS).requires_grad_()
        operands = [x, torch.full_like(x, target)] if len(formula.op.variables) > 1 else [x]
        each = formula(*operands, **({"reduction": "none"} if formula.loss else {}))
        (gradient,) = torch.autograd.grad(each.sum(), x)
        panel.plot(x.detach(), each.detach(), color=COLOURS[0], label="value")
        panel.plot(x.detach(), gradient, color=COLOURS[1], linewidth=1, label="gradient")
        panel.set_title(name.replace("_", " "), fontsize=9)
    labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(*labels, loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return _with_grid(figure)


def ratios() -> Figure:
    """Draws the speed-up of each operator over torch, in descending order."""
    rows = measured()
    names = sorted(rows, key=lambda name: rows[name].peers["torch"].ratio[1])
    figure = Figure(figsize=(WIDTH, 1.2 + 0.15 * len(names)), layout="constrained")
    axes = figure.subplots()
    for peer, label in (
        ("torch", "eager torch"),
        ("torch, keep", "both with keep"),
        ("torch.compile, keep", "compiled, both with keep"),
    ):
        colour, marker = STYLES[peer]
        known = [name for name in names if peer in _compared(rows[name])]
        if not known:  # else it is in the legend
            continue
        medians = [rows[name].peers[peer].ratio[1] for name in known]
        places = [names.index(name) for name in known]
        axes.plot(medians, places, marker, color=colour, markersize=5, label=label)
    finish_ratios(axes)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.tick_params(axis="x", top=True, labeltop=True)  # the chart is tall
    axes.set_xlabel("time of torch / time of pyfused", fontsize=9)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return _with_grid(figure)


def gain() -> Figure:
    """Draws the speed-up of a call over torch by its size, with and without `keep`."""
    figure = Figure(figsize=(WIDTH, 5.6), layout="constrained")
    panels = figure.subplots(2, sharex=True)
    table = _of_cpus("gain")[-1]
    for keep, axes in enumerate(panels):
        shown = [cells for cells in table if cells["keep"] == str(keep)]
        limit_of = {cells["op"]: int(cells["limit"]) for cells in shown}
        rows = [report.row_of(cells) for cells in shown]
        for index, (op, limit) in enumerate(limit_of.items()):
            # When these figures were measured, torch computed these operators with `keep`.
            if keep and limit == LOGITS:
                continue
            known = [row for row in rows if row.op == op and row.elements >= limit]
            elements = [row.elements for row in known]
            low, median, high = zip(*(row.peers["torch"].ratio for row in known), strict=True)
            colour, marker = SERIES[index]
            axes.fill_between(elements, low, high, color=colour, alpha=0.2, linewidth=0)
            label = f"{op}, 1,000 classes" if op == "cross_entropy" else op
            style = {"color": colour, "ls": "-", "markersize": 4}
            axes.plot(elements, median, marker, label=label, **style)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.axhline(1, color=INK, linewidth=1)
        label_ratios(axes.yaxis)
        axes.set_ylabel("time of torch / of pyfused", fontsize=9)
        axes.set_title("both with keep" if keep else "torch's defaults", fontsize=10)
    exponents = range(15, 26)
    axes.set_xticks([2**n for n in exponents], [f"$2^{{{n}}}$" for n in exponents])
    axes.set_xlabel("elements of the input, from the smallest that runs a kernel", fontsize=9)
    labels = panels[0].get_legend_handles_labels()
    figure.legend(*labels, loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return _with_grid(figure)


def _cpu_heads() -> dict[str, dict[str, list[str]]]:
    """Returns the rows of heads with cross-entropy on a CPU, by sizes and implementation."""
    found: dict[str, dict[str, list[str]]] = {}
    for cells in _markdown_rows(_cpu_heads_file()):
        if cells[1] == "cross-entropy":
            found.setdefault(cells[0], {})[cells[2]] = cells
    return found


def _cpu_heads_file() -> Path:
    """Returns the newest table of heads on a CPU."""
    files = [file for file in report.RESULTS.glob("*/heads.md") if file.parent != H100]
    return max(sorted(files), key=lambda file: _date(_caption(file)))


# Ways to compute a head with cross-entropy: their names in measurements of CPUs and of GPUs.
WAYS = {
    "eager torch": ("torch", "torch"),
    "torch.compile": ("torch.compile", "torch.compile"),
    "torch.compile, auto_chunker": (None, "torch.compile, auto_chunker"),
    "torch, in chunks": ("torch, in chunks", None),
    "Liger": (None, "Liger"),
    "cut-cross-entropy": (None, "cut-cross-entropy"),
    "pyfused, of logits": ("pyfused, cross_entropy of logits",) * 2,
    "pyfused": ("pyfused", "pyfused"),
    (QUARTER := "pyfused, a quarter"): ("pyfused, memory_budget of a quarter",) * 2,
    "pyfused, a 16th": ("pyfused, memory_budget of a 16th",) * 2,
}
LARGE_CPU, LARGE_GPU = "(1024, 512, 32000), float32", "(8192, 4096, 128256)"


def _of_ways(found: dict[str, Any], index: int) -> dict[str, Any]:
    """Returns the measurements of these ways on a CPU (index 0) or a GPU (1), by shown name."""
    return {name: found[names[index]] for name, names in WAYS.items() if names[index] in found}


def heads() -> Figure:
    """Draws time and peak memory of a linear layer and its cross-entropy on a CPU."""
    shown = _of_ways(_cpu_heads()[LARGE_CPU], 0)
    del shown[QUARTER]  # the default budget of this size
    times = [_spread(row[4]) for row in shown.values()]
    peaks = [float(row[-1]) for row in shown.values()]
    return _time_and_peak([*shown], times, peaks, "peak memory / size of the logits")


def gpu() -> Figure:
    """Draws time and peak memory of the same on an H100, for the sizes of Llama 3 8B."""
    shown = _of_ways(_gpu_heads()["cross-entropy"][LARGE_GPU], 1)
    times = [spread for _, _, spread in shown.values()]
    peaks = [gib for _, gib, _ in shown.values()]
    return _time_and_peak([*shown], times, peaks, "peak memory, GiB")


def _spread(cell: str) -> tuple[float, float, float]:
    """Returns the lower quartile, the median and the upper quartile in a cell of a table."""
    middle, low, high = map(float, re.findall(r"[\d.]+", cell))
    return low, middle, high


def trade() -> str:
    """Returns the table of time and peak memory of these ways, on a CPU and on an H100."""
    on_cpu = _of_ways(_cpu_heads()[LARGE_CPU], 0)
    on_gpu = _of_ways(_gpu_heads()["cross-entropy"][LARGE_GPU], 1)
    lines = []
    for name in WAYS:
        if name in ("torch.compile, auto_chunker", "pyfused, of logits"):
            continue  # close to other rows
        row, (ms, gib, _) = on_cpu.get(name), on_gpu.get(name, (None,) * 3)
        times = [row[column].removesuffix(" ms") for column in (3, 6)] if row else []
        cells = [*times, row[-1]] if row else ["n/a"] * 3
        cells = ["the default", "", ""] if name == QUARTER else cells
        cells += [f"{ms:.3g}", f"{gib:.2f}"] if ms else ["n/a"] * 2
        lines.append([f"`{name}`" if name.startswith("torch.compile") else name, *cells])
    columns = ["", "CPU, ms", "with `keep`", "peak / logits", "H100, ms", "peak, GiB"]
    return report.tabulated(columns, lines, names=1)


def head_summary() -> str:
    """Returns the speed-up and the memory of heads on a CPU, compared with eager torch."""
    lines = []
    for sizes, ways in _cpu_heads().items():
        ours = ways["pyfused"]
        speeds = [_rounded(*_spread(ours[column])) for column in (5, 7)]
        memory = float(ours[-1]) / float(ways["torch"][-1])
        lines.append([sizes, *speeds, f"{memory:.2f}"])
    columns = ["tokens, features, classes, dtype", "speed-up", "both with `keep`", "peak / torch's"]
    table = report.tabulated(columns, lines, names=1)
    return f"{table}\n\n*{NOISE} {_short(_caption(_cpu_heads_file()))}*"


def curves() -> Figure:
    """Draws the training of `make demo`'s GPT: losses, time of a step, and peak memory."""
    rows = _of_cpus("demo")[-1]
    ways = dict.fromkeys(row["way"] for row in rows)
    by_way = {way: [row for row in rows if row["way"] == way] for way in ways}
    names = [way for way in ways if not way.endswith(KEEP)]
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    grid = figure.add_gridspec(2, 2)
    losses, times, peaks = map(figure.add_subplot, (grid[0, :], grid[1, 0], grid[1, 1]))
    for name, width in zip(names, (5, 2.5, 1.2), strict=True):  # all remain visible
        values = [float(row["loss"]) for row in by_way[name]]
        style = {"color": STYLES[name][0], "linewidth": width, "label": name}
        losses.plot(range(1, len(values) + 1), values, **style)
    losses.set_title("training loss, nats per token", fontsize=10)
    losses.set_xlabel("step", fontsize=9)
    losses.legend(frameon=False, fontsize=9)
    groups = {"torch's defaults": ""} | ({"keep": KEEP} if len(ways) > len(names) else {})
    for place, suffix in enumerate(groups.values()):
        for index, name in enumerate(names):
            run, x = by_way[name + suffix], place + 0.27 * (index - 1)
            low, ms, high = quantiles([float(row["step_ms"]) for row in run])
            gib, style = float(run[-1]["peak_mib"]) / 2**10, {"color": STYLES[name][0]}
            bar = times.bar(x, ms, 0.27, yerr=[[ms - low], [high - ms]], ecolor=INK, **style)
            times.bar_label(bar, [f"{ms:.0f}"], padding=3, fontsize=9)
            peaks.bar_label(peaks.bar(x, gib, 0.27, **style), fmt="%.2f", padding=3, fontsize=8)
    titles = {times: "ms for a step, with quartiles", peaks: "peak of the process, GiB"}
    for axes, title in titles.items():
        axes.set_xticks(range(len(groups)), groups)
        axes.margins(y=0.15)
        axes.set_title(title, fontsize=10)
    return figure


def curves_machine() -> str:
    """Returns the caption of this picture."""
    (row, *_) = _of_cpus("demo")[-1]
    return (
        f"*`make demo`: a GPT of 4 layers and {int(row['classes']):,} classes, trained with torch,"
        f" `pyfused.functional`, and its `linear_cross_entropy`. {_short(row['machine'])}*"
    )


def tutorial() -> Figure:
    """Returns the figure that the tutorial draws."""
    names: dict[str, Any] = {}
    text = (DOCS / "tutorial.md").read_text(encoding="utf-8")
    with redirect_stdout(io.StringIO()):
        exec("\n".join(code for code, _ in CELL.findall(text)), names)
    for line, (colour, _) in zip(names["axes"].lines, SERIES, strict=False):
        line.set_color(colour)
    return _with_grid(names["figure"])


def _time_and_peak(
    names: Sequence[str],
    times: Sequence[tuple[float, float, float]],
    peaks: Sequence[float],
    of_peaks: str,
) -> Figure:
    """Draws horizontal bars in the colours of the implementations.

    Args:
        times: Quartiles of the times, divided by the time of the matrix products.
        of_peaks: The title of the panel of peaks.
    """
    figure = Figure(figsize=(WIDTH, 2 * (0.9 + 0.25 * len(names))), layout="constrained")
    colours = [STYLES[name.removeprefix("eager ").partition(",")[0]][0] for name in names]
    medians = [middle for _, middle, _ in times]
    errors = [[middle - low for low, middle, _ in times], [high - x for _, x, high in times]]
    title = "time / time of products, with quartiles"
    panels = (title, medians, errors), (of_peaks, peaks, None)
    for axes, (title, values, spread) in zip(figure.subplots(2), panels, strict=True):
        bars = axes.barh(names, values, xerr=spread, ecolor=INK, color=colours)
        axes.bar_label(bars, [f"{value:.2f}" for value in values], padding=3, fontsize=9)
        axes.margins(x=0.15)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("less is better", fontsize=9)
        axes.invert_yaxis()
    return figure


def _with_grid(figure: Figure) -> Figure:
    for axes in figure.axes:
        axes.grid(color=INK, alpha=0.15, linewidth=0.6)
    return figure


def _of_cpus(name: str) -> list[list[dict[str, str]]]:
    """Returns the tables of CPUs in files of this name, the newest last."""
    files = [file for file in report.RESULTS.glob(f"*/{name}.csv") if file.parent != H100]
    tables = map(report.read_csv, sorted(files))
    return sorted(tables, key=lambda table: (_date(table[0]["machine"]), len(table)))


def _date(machine: str) -> str:
    return re.findall(r"\d{4}-\d\d-\d\d", machine)[0]


def _compared(row: Row) -> list[str]:
    """Returns the peers of a case, without those with `keep` if torch computed its calls then."""
    by_torch = _limits(OPERATORS[row.op]).from_elements == LOGITS
    return [peer for peer in row.peers if not (by_torch and peer.endswith(KEEP))]


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


def rendered(figure: Figure, title: str) -> str:
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
    text = rendered(figure, path.stem)
    path.with_suffix(".svg").write_text(text, encoding="utf-8")
    dark = text.replace(INK, INK_ON_BLACK)
    path.with_name(f"{path.stem}-dark.svg").write_text(dark, encoding="utf-8")


def svg(figure: Figure, title: str) -> str:
    """Returns a figure as an HTML element in the colour of the surrounding text."""
    text = rendered(_with_grid(figure), title)
    text = text[text.index("<svg") :]
    text = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', _OPENING.format(title), text, count=1)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", text)
    text = text.replace(INK, "currentColor")
    return re.sub(r"\s*\n\s*", " ", text)  # a blank line would end the element


_OPENING = (
    r'<svg viewBox="\1" role="img" aria-label="{}" xmlns="http://www.w3.org/2000/svg"'
    r' xmlns:xlink="http://www.w3.org/1999/xlink">'
)

# ---- pages ---------------------------------------------------------------------------------------


def measured() -> dict[str, Row]:
    """Returns the largest case of each operator, forward and backward, in the newest report."""
    return {name: row for name, (row, _) in _newest().items()}


def machines() -> str:
    """Returns the machines and versions of these measurements."""
    return " ".join({_short(machine): None for _, machine in _newest().values()})


@cache
def _newest() -> dict[str, tuple[Row, str]]:
    """Returns the rows of `measured`, each with its machine."""
    largest: dict[str, tuple[Row, str]] = {}
    for table in _of_cpus("results"):
        newer: dict[str, Row] = {}
        for row in map(report.row_of, table):
            if row.mode == "forward+backward" and "torch" in row.peers:
                first = newer.setdefault(row.op, row)
                newer[row.op] = max(first, row, key=lambda row: (row.headline, row.elements))
        largest |= {name: (row, table[0]["machine"]) for name, row in newer.items()}
    return {name: pair for name, pair in largest.items() if name in OPERATORS}


def row_of(name: str, rows: dict[str, Row]) -> str:
    """Returns the row of an operator in the page of its group."""
    entry, op = ENTRIES[name], OPERATORS[name]
    return "\n".join(
        (
            '<div class="entry"><div>\n',
            entry.formula and f"```{{math}}\n{entry.formula}\n```\n",
            f"{entry.use}\n",
            f"[`F.{name}`, `nn.{op.module}`](../operators/{name}.md)\n",
            f"{_ratio(rows.get(name))}\n",
            f"</div>\n{picture(name, entry)}\n</div>\n",
        )
    )


def _ratio(row: Row | None) -> str:
    """Returns a sentence with the speed-ups of a case, and the size from which a kernel runs."""
    if row is None:
        return ""
    text = f"**{_certain(*row.peers['torch'].ratio):.1f} times** as fast as eager torch"
    others = ("torch, keep", "if both run with `keep`"), ("torch.compile", "as compiled torch")
    for peer, name in others:
        if peer in _compared(row):
            text += f", {_certain(*row.peers[peer].ratio):.1f} times {name}"
    text += f", for {row.case.removeprefix(row.op).strip()}"
    smallest = limits_of(OPERATORS[row.op], torch.float32, torch.device("cpu"), 2)[0]
    if smallest > ALWAYS:
        text += f". Kernels run from {words(smallest)} elements on"
    return f"{text}."


def shown() -> dict[str, list[str]]:
    """Returns the declared operators of each group that is not empty."""
    groups = {
        group: [name for name in entries if name in OPERATORS] for group, entries in GALLERY.items()
    }
    return {group: names for group, names in groups.items() if names}


LEGEND = (
    "In the formulas, x is the input and t the target. The pictures show the output of the kernels."
    " Speed-ups are forward and backward, for the largest size that was"
    " [measured](../is-it-for-you.md) on CPUs; smaller inputs gain less."
)


def slug(group: str) -> str:
    return group.lower().replace(" ", "-")


def group_page(group: str) -> str:
    """Returns the page of a group, below which the sidebar lists the pages of its operators."""
    names, rows = shown()[group], measured()
    toctree = "\n".join(f"../operators/{name}" for name in names)
    return "\n".join(
        (
            f"# {group}\n\n{LEGEND}\n\n{machines()}\n",
            *(f"## {name}\n\n{row_of(name, rows)}" for name in names),
            f"```{{toctree}}\n:hidden:\n\n{toctree}\n```\n",
        )
    )


def readme() -> str:
    """Returns README.md as the first page of the site."""
    text = README.read_text(encoding="utf-8").replace("](CONTRIBUTING.md", "](../CONTRIBUTING.md")
    text = text.replace("](CHANGELOG.md", "](../CHANGELOG.md")
    return re.sub(r'(\]\(|srcset="|src=")docs/', r"\1", text)


def operators() -> str:
    """Returns the table of the operators with kernels."""
    rows = [[group, ", ".join(f"`{n}`" for n in names)] for group, names in shown().items()]
    return report.tabulated(["group", "functions"], rows, names=2)


SIZES = report.RESULTS / "smallest-inputs.md"


def all_sizes() -> str:
    """Returns the file with the smallest inputs of all operators."""
    legend = (
        "The smallest inputs that run a kernel on CPUs with one or two threads, in float32"
        ' elements. "Few classes" are contiguous, and at most 15, without AVX-512 at most 7.'
    )
    return f"{legend}\n\n{sizes()}\n"


def _limits(op: Operator) -> Limits:
    """Returns the limits of an operator in float32, with two threads."""
    return _row(ON_CPU, op, DEFAULT_ON_CPU)


def smallest() -> str:
    """Returns the operators that have the same smallest input on CPUs, in the order of sizes."""
    by_size: dict[int, list[str]] = {}
    for name, op in OPERATORS.items():
        size = _limits(op).from_elements
        by_size.setdefault(size, []).append(f"`{name}`")
    rows = [[words(size), ", ".join(names)] for size, names in sorted(by_size.items())]
    return report.tabulated(["elements", "operators"], rows, names=2)


def sizes(*operators: str) -> str:
    """Returns a table of the smallest inputs that run a kernel on CPUs."""
    columns = ["elements", "few classes", "without gradient", "unreduced"]
    found = {f"`{name}`": _limits(OPERATORS[name]) for name in operators or OPERATORS}
    used = [i for i in range(4) if any(row[i] is not None for row in found.values())]
    rows = [[name, *[words(row[i]) for i in used]] for name, row in found.items()]
    return report.tabulated(["operator", *[columns[i] for i in used]], rows, names=1)


def words(limit: int | None) -> str:
    if limit is None:
        return ""
    return {ALWAYS: "any", NEVER: "none"}.get(limit, f"{limit:,}")


PEERS = {
    "torch, keep": "eager torch with `keep`",
    "torch.compile, keep": "`torch.compile` with `keep`",
    "torch": "eager torch",
    "torch, THP": "eager torch with huge pages (`THP_MEM_ALLOC_ENABLE=1`)",
    "torch.compile": "`torch.compile`",
}


def _losses(table: list[dict[str, str]]) -> dict[str, list[float]]:
    """Returns the speed-ups of the large losses in a table over each peer."""
    rows = [row for row in map(report.row_of, table) if row.op in OPERATORS]
    rows = [row for row in rows if row.headline and row.mode == "forward+backward"]
    rows = [row for row in rows if row.op.endswith(("loss", "entropy", "kl_div", "logits"))]
    return {
        peer: [_certain(*row.peers[peer].ratio) for row in rows if peer in row.peers]
        for peer in PEERS
    }


def headline() -> str:
    """Returns the speed-up of large losses over each way to run torch, on each processor."""
    newest = {table[0]["machine"].partition(",")[0]: table for table in _of_cpus("results")}
    found = {name: _losses(table) for name, table in reversed(newest.items())}
    lines = [
        [shown, *(_middle_and_range(ratios[peer]) for ratios in found.values())]
        for peer, shown in PEERS.items()
    ]
    table = report.tabulated(["compared with", *found], lines, names=1)
    caption = " ".join(
        f"{len(ratios['torch'])} losses: {_short(newest[name][0]['machine'])}"
        for name, ratios in found.items()
    )
    return f"{table}\n\n*Medians and ranges over large losses. {caption}*"


def _middle_and_range(ratios: Sequence[float]) -> str:
    if not ratios:
        return "n/a"
    middle = median(ratios)
    return f"{middle:.1f} ({_range(ratios)})" if middle < 10 else f"{middle:.0f} ({_range(ratios)})"


ALL_WAYS = {
    "torch, keep": "`keep`",
    "convert": "`convert`",
    "convert, keep": "`keep`, `convert`",
    "torch.compile": "`torch.compile`",
    "torch.compile, keep": "`torch.compile`, `keep`",
    "convert, torch.compile": "`torch.compile`, `convert`",
}
SHORTEST = 10.0  # milliseconds; shorter steps vary more between processes than between ways
NOISE = "1.0: no measurable difference."
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


HEAD_GPU = "(8192, 1024, 151936)"
COMPILED_GPU = "linear_cross_entropy, torch.compile"


def _gains() -> list[Gain]:
    """Returns the training steps of README.md, and a head alone on an H100."""
    found = _newest_steps()
    names = [next(name for name in found if name.startswith(start)) for start, *_ in GAINS]
    rows = {row["way"]: row for row in report.read_csv(H100 / "steps.csv")}
    on_gpu = "convert", COMPILED_GPU, f"{CONVERTED[-1]}; compiled: `linear_cross_entropy`"
    ways = "torch", "torch.compile", "pyfused"
    ms, gib, _ = zip(*map(_gpu_heads()["cross-entropy"][HEAD_GPU].get, ways), strict=True)
    tokens, features, classes = map(int, re.findall(r"\d+", HEAD_GPU))
    head = f"a head alone, {classes:,} classes, H100", f"bfloat16, {tokens} x {features}"
    return [
        *(_gain(found[name], *gain[1:]) for name, gain in zip(names, GAINS, strict=True)),
        _gain(rows, *on_gpu, on=", H100"),
        Gain(*head, "`linear_cross_entropy`", (*ms, math.nan), gib),
    ]


def _gain(
    rows: dict[str, dict[str, str]], eager: str, compiled: str, line: str, on: str = ""
) -> Gain:
    row = rows[eager]
    ways = "torch.compile", eager, compiled
    ms = [float(each) for each in (row["torch, ms"], *(rows[way]["ms"] for way in ways))]
    peaks = row["torch, peak"], rows["torch.compile"]["peak"], row["peak"]
    gib = [int(peak) / 2**30 for peak in peaks]
    return Gain(row["model"] + on, "{dtype}, {batch}".format_map(row), line, ms, gib)


def gains() -> str:
    """Returns the table of README.md: times and peaks of training steps."""
    lines, rows = [], _gains()
    for name, sizes, line, ms, gib in rows:
        times = (_ms(ms[way]) for way in (0, 2, 1, 3))
        peaks = (f"{gib[way]:.2f}" for way in (0, 2))
        lines.append([f"{name}, {sizes}", line, *times, *peaks])
    pairs = ("eager step, ms", "compiled step, ms", "eager peak, GiB")
    columns = [cell for pair in pairs for cell in (f"{pair}: torch", "with pyfused")]
    columns = ["model, dtype, batch", "line", *columns]
    table = report.tabulated(columns, lines, names=2)
    found = _newest_steps()
    names = [name for start, *_ in GAINS for name in found if name.startswith(start)]
    *_, on_gpu, _ = _short(report.read_csv(H100 / "steps.csv")[0]["machine"]).split(", ")
    batch = "Batch: samples, sequences x tokens, images x width, or tokens x features."
    gib = rows[-1].gib[1]
    head = f"For the head alone: without operands; compiled torch {gib:.2f} GiB."
    note = f"Medians; peaks without libraries. {head} {batch}"
    return f"{table}\n\n*{note} {_machines(names, found)} H100: {on_gpu}.*"


def _ms(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def training() -> Figure:
    """Draws times and peaks of the same models, in proportion to eager torch's."""
    gains = _gains()
    figure = Figure(figsize=(WIDTH, 0.8 + 0.52 * len(gains)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    ways = "torch", "torch.compile", "pyfused"
    for index, way in enumerate(ways):
        label = ("eager torch", "compiled torch", "with pyfused, eager")[index]
        rows = [row + 0.27 * (index - 1) for row in range(len(gains))]
        times = [_ms(gain.ms[index]) for gain in gains], [gain.ms for gain in gains]
        peaks = [f"{gain.gib[index]:.2f}" for gain in gains], [gain.gib for gain in gains]
        for axes, (texts, values) in zip(panels, (times, peaks), strict=True):
            shares = [each[index] / each[0] for each in values]
            bars = axes.barh(rows, shares, 0.25, color=STYLES[way][0], label=label)
            axes.bar_label(bars, texts, padding=2, fontsize=8)
    for axes, title in zip(panels, ("time of a step, ms", "peak memory, GiB"), strict=True):
        axes.set_title(title, fontsize=10)
        axes.set_xticks([])
        axes.margins(x=0.2)
    names = [gain.model.replace(", ", ",\n") for gain in gains]
    panels[0].set_yticks(range(len(gains)), names)
    panels[0].invert_yaxis()
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return figure


def all_steps() -> str:
    """Returns the table of all training steps that were measured."""
    found = _newest_steps()
    ways = {way: name for way, name in ALL_WAYS.items() if any(way in r for r in found.values())}
    lines = [
        [name, f"{_eager(rows):,.0f}", *(_cell(rows, way) for way in ways), *_peaks(rows)]
        for name, rows in found.items()
    ]
    peaks = (f"peak, GiB: {way}" for way in ("eager torch", "`keep`", "`convert`"))
    columns = ["model, dtype, batch", "eager torch, ms", *ways.values(), *peaks]
    caption = (
        f"*Speed-up over eager torch, medians of ratios. {NOISE} {_machines([*found], found)}*"
    )
    return f"{report.tabulated(columns, lines, names=1)}\n\n{caption}"


def _newest_steps() -> dict[str, dict[str, dict[str, str]]]:
    """Returns the newest training steps of each model on a CPU, by way."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for table in _of_cpus("steps"):
        found |= _steps(table)
    return {name: rows for name, rows in found.items() if _eager(rows) > SHORTEST}


def _steps(table: list[dict[str, str]]) -> dict[str, dict[str, dict[str, str]]]:
    """Returns the newest training steps of each model and dtype in a file, by way."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for row in table:
        name = f"{row['model']}, {row['dtype']}, {row['batch']}"
        found.setdefault(name, {})[row["way"]] = row
    return found


def _eager(rows: dict[str, dict[str, str]]) -> float:
    return float(rows["torch, keep"]["torch, ms"]) if "torch, keep" in rows else 0.0


def _cell(rows: dict[str, dict[str, str]], way: str) -> str:
    if way not in rows:
        return "n/a"
    return _rounded(*(float(rows[way][name]) for name in steps.RATIO))


def _certain(low: float, middle: float, high: float) -> float:
    """Returns the median of a ratio, 1 if its quartiles lie on both sides of 1."""
    return 1.0 if low < 1 < high else middle


def _rounded(low: float, middle: float, high: float) -> str:
    ratio = _certain(low, middle, high)
    return "1.0" if ratio == 1 else f"{ratio:.2f}"


def _peaks(rows: dict[str, dict[str, str]]) -> list[str]:
    """Returns the peak memory with eager torch, with `keep`, and with `convert`."""
    kept = rows["torch, keep"]
    peaks = kept["torch, peak"], kept["peak"], rows.get("convert", {}).get("peak")
    return [f"{int(peak) / 2**30:.2f}" if peak else "n/a" for peak in peaks]


def _machines(names: Sequence[str], found: dict[str, dict[str, dict[str, str]]]) -> str:
    """Returns the machines of training steps, each once, with its models from the second on."""
    by_machine: dict[str, list[str]] = {}
    for name in names:
        machine = next(iter(found[name].values()))["machine"]
        by_machine.setdefault(_short(machine), []).append(name.partition(",")[0])
    first, *others = by_machine
    return " ".join([first, *(f"{', '.join(by_machine[each])}: {each}" for each in others)])


def _short(machine: str) -> str:
    """Returns processor, cores, threads, version of torch and date of a machine."""
    words = re.split("[,;.] ", machine)
    kept = (
        word for word in words[1:] if re.match(r"torch |CPU time|\d{4}-|\d+ (cores|threads?)", word)
    )
    return f"{', '.join([words[0], *kept])}."


def _markdown_rows(file: Path) -> list[list[str]]:
    """Returns the rows of a table of Markdown, without its heading."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return [re.split(r" *\| *", line)[1:-1] for line in lines if line.startswith("|")][2:]


def _caption(file: Path) -> str:
    """Returns the first line of a table's file: the machine, versions and date."""
    return file.read_text(encoding="utf-8").partition("\n")[0]


def _gpu_heads() -> dict[str, dict[str, dict[str, Any]]]:
    """Returns milliseconds, GiB and the time in products, by loss, sizes and implementation."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for sizes, loss, way, ms, gib, ratio, _ in _markdown_rows(H100 / "heads.md"):
        measured = float(ms), float(gib), _spread(ratio)
        found.setdefault(loss, {}).setdefault(sizes, {})[way] = measured
    return found


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
    """Returns the table of heads with cross-entropy on the H100."""
    lines = [
        [sizes, *(f"{ways[way][0]:.3g}, {ways[way][1]:.2f}" for way in GPU_HEADS)]
        for sizes, ways in _gpu_heads()["cross-entropy"].items()
    ]
    table = report.tabulated(["tokens, features, classes", *GPU_HEADS.values()], lines, names=1)
    return f"{table}\n\n*{_short(_caption(H100 / 'heads.md'))}*"


def gpu_steps() -> str:
    """Returns the training steps on the H100."""
    rows = report.read_csv(H100 / "steps.csv")
    (first, *_) = rows
    each = [("eager torch", first["torch, ms"], first["torch, peak"])]
    each += [(f"`{row['way']}`", row["ms"], row["peak"]) for row in rows]
    lines = [[way, f"{float(ms):.1f}", f"{int(peak) / 2**30:.1f}"] for way, ms, peak in each]
    title = f"{first['model']}, {first['batch']} {first['unit']}, {first['dtype']} autocast, AdamW"
    table = report.tabulated([f"a training step of {title}", "ms", "GiB"], lines, names=1)
    return f"{table}\n\n*{_short(first['machine'])}*"


def recommender() -> str:
    """Returns the table of a recommender's training steps."""
    file = next(report.RESULTS.glob("*/recommender.md"))
    by_loss: dict[str, list[str]] = {}
    columns = [""]
    for items, loss, ms, _, mib in _markdown_rows(file):
        if (column := f"{items} items, ms") not in columns:
            columns += [column, "peak, GiB"]
        by_loss.setdefault(loss, []).extend((f"{int(ms):,}", f"{int(mib) / 2**10:.2f}"))
    lines = [[loss, *cells] for loss, cells in by_loss.items()]
    return f"{report.tabulated(columns, lines, names=1)}\n\n*{_short(_caption(file))}*"


def keep_peaks() -> str:
    """Returns how `keep` changes peaks, without and with glibc's variable."""
    file = next(report.RESULTS.glob("*/keep.md"))
    lines = [[model, *map("{:.1f}".format, ratios)] for model, *ratios in _keep_ratios(file)]
    columns = ["peak with `keep`, times the peak without", "glibc 2.36", "with the variable"]
    kept = next(iter(_newest_steps().values()))["torch, keep"]  # the recommender, as in the file
    ratio = int(kept["peak"]) / int(kept["torch, peak"])
    other = f"The first number was {ratio:.1f} on the machine of the training steps."
    return f"{report.tabulated(columns, lines, names=1)}\n\n*{_short(_caption(file))} {other}*"


def _keep_ratios(file: Path) -> list[tuple[str, float, float]]:
    rows = ((model, *map(float, peaks)) for model, *peaks in _markdown_rows(file))
    return [(model, kept / plain, tuned / least) for model, plain, kept, least, tuned in rows]


def _range(values: Sequence[float]) -> str:
    return " to ".join(f"{x:.1f}" if x < 10 else f"{x:.0f}" for x in (min(values), max(values)))


def gpu_summary() -> str:
    """Returns the gain of losses, heads and steps on the H100, in sentences."""
    sentences = []
    losses = _markdown_rows(H100 / "large.md")
    for title, chosen in (
        ("`cross_entropy` of 268 million logits is", True),
        ("Other losses of 67 million elements are", False),
    ):
        rows = [row for row in losses if row[0].startswith("cross_entropy") == chosen]
        eager, compiled = (_range([float(row[column]) for row in rows]) for column in (2, 3))
        sentences.append(
            f"{title} {eager} times as fast as eager torch, {compiled} times as compiled."
        )
    heads = _gpu_heads()
    for title, loss in (
        ("Heads with cross-entropy", "cross-entropy"),
        ("Log-probabilities of heads", "log-probabilities"),
        ("KL divergences of heads", "KL divergence"),
    ):
        for way, name in (("torch", "eager torch"), ("torch.compile", "compiled torch")):
            pairs = [(ways[way], ways["pyfused"]) for ways in heads[loss].values() if way in ways]
            if pairs:
                times = _range([theirs[0] / ours[0] for theirs, ours in pairs])
                memory = [ours[1] / theirs[1] for theirs, ours in pairs]
                sentences.append(
                    f"{title}: {times} times as fast as {name}, with {min(memory):.2f} to"
                    f" {max(memory):.2f} of the memory."
                )
    return "On an H100, forward and backward, without host time:\n\n" + "\n".join(
        f"- {each}" for each in sentences
    )


# Parts of README.md and of docs/*.md, which `python docs/gallery.py` writes, as it writes charts.
WRITTEN = {
    "gains": gains,
    "curves machine": curves_machine,
    "operators": operators,
    "sizes": smallest,
    "headline": headline,
    "recommender": recommender,
    "keep": keep_peaks,
    "steps": all_steps,
    "machines": lambda: f"*{machines()}*",
    "gain machine": lambda: f"*{_short(_of_cpus('gain')[-1][0]['machine'])}*",
    "head summary": head_summary,
    "trade": trade,
    "gpu heads": gpu_heads,
    "gpu steps": gpu_steps,
    "gpu summary": gpu_summary,
}
DRAWN = {
    "training": training,
    "ratios": ratios,
    "gain": gain,
    "formulas": formulas,
    "heads": heads,
    "gpu": gpu,
    "curves": curves,
    "tutorial": tutorial,
}
PART = re.compile(r"(?s)(<!-- written: ([\w ]+) -->\n).*?(?=<!-- end -->)")
PICTURE = re.compile(
    r'(?s)<picture>\s*<source[^>]*srcset="(.*?)">\s*<img alt="(.*?)" src="(.*?)">\s*</picture>'
)


NOTEBOOKS = ("tutorial", "pretraining", "distillation")
# A block of Python, and the block of text below it, which is its output.
CELL = re.compile(r"(?s)```python\n(.*?)\n```(?:\n\n```text\n(.*?)```)?")


def notebook(page: str) -> str:
    """Returns a page as a Jupyter notebook: its blocks of Python are the cells of code."""
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    text = re.sub(r"\n.*\]\(\.\./examples/\w+\.ipynb\).*\n", "", text)  # the link to the notebook
    text = PICTURE.sub("", re.sub(r"\]\((?=[\w-]+\.md)", "](../docs/", text))
    cells: list[dict[str, Any]] = []
    for index, part in enumerate(CELL.split(text)):
        lines = (part or "").strip().splitlines(keepends=True)
        if not lines:
            continue
        cell = {"cell_type": "markdown", "id": f"{page}-{index}", "metadata": {}, "source": lines}
        if index % 3 == 1:
            cell |= {"cell_type": "code", "execution_count": None, "outputs": []}
        if index % 3 == 2:
            cells[-1]["outputs"] = [{"name": "stdout", "output_type": "stream", "text": lines}]
        else:
            cells.append(dict(sorted(cell.items())))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    found = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(found, indent=1) + "\n"


HOMEPAGE = re.findall(
    'Homepage = "(.*)"', (DOCS.parent / "pyproject.toml").read_text(encoding="utf-8")
)[0]
PAGES = (README, *sorted(DOCS.glob("*.md")))


def current(page: str) -> str:
    """Returns a page with its written parts up to date."""
    return PART.sub(lambda match: f"{match[1]}\n{WRITTEN[match[2]]()}\n\n", page)


def outdated() -> list[str]:
    """Returns the files whose written parts are not up to date."""
    files = [page for page in PAGES if (text := _read(page)) != current(text)]
    files += [SIZES] if _read(SIZES) != all_sizes() else []
    return [str(file.relative_to(DOCS.parent)) for file in files]


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def fill(_app: object, page: str, source: list[str]) -> None:
    """Prepares a page for the site as Sphinx reads it.

    README.md is the first page, whose sidebar has the pages that index.md lists. Pictures become
    images of the theme, and links to files outside of docs/ lead to the repository.
    """
    if page == "index":
        source[0] = f"---\nhide-toc: true\n---\n{readme()}\n{_toctrees(source[0])}"
    if page == "losses":
        source[0] = f"{_linked(source[0])}\n{_toctree(map('groups/{}'.format, map(slug, shown())))}"
    images = r"![\2](\3){.only-light}\n![\2](\1){.only-dark}"
    source[0] = PICTURE.sub(images, source[0])
    up = re.escape("../" * (1 + page.count("/")))
    outside = re.compile(rf"\]\({up}([\w/.-]+\.(?:md|py|cpp|h|csv))\b")
    source[0] = outside.sub(rf"]({HOMEPAGE}/blob/main/\1", source[0])


def _toctrees(index: str) -> str:
    """Returns a part of the sidebar for each heading of index.md, with the pages below it."""
    parts = re.findall(r"(?ms)^## (.*?)\n(.*?)(?=^## |\Z)", index)
    return "\n".join(_toctree(re.findall(r"\]\((.*?)\.md\)", p), title) for title, p in parts)


def _toctree(pages: Iterable[str], caption: str = "") -> str:
    listed = "\n".join(pages)
    title = f":caption: {caption}\n" * bool(caption)
    return f"```{{toctree}}\n:hidden:\n{title}\n{listed}\n```\n"


def _linked(page: str) -> str:
    """Returns losses.md with links to the pages of groups and of operators in its table."""
    for group, names in shown().items():
        page = page.replace(f"| {group} |", f"| [{group}](groups/{slug(group)}.md) |")
        for name in names:
            page = page.replace(f"| `{name}`", f"| [`{name}`](operators/{name}.md)", 1)
            page = page.replace(f", `{name}`", f", [`{name}`](operators/{name}.md)", 1)
    return page


def main() -> None:
    for page in PAGES:
        page.write_text(current(_read(page)), encoding="utf-8")
    SIZES.write_text(all_sizes(), encoding="utf-8")
    for name in NOTEBOOKS:
        file = DOCS.parent / "examples" / f"{name}.ipynb"
        file.write_text(notebook(name), encoding="utf-8")
    CHARTS.mkdir(exist_ok=True)
    for name, draw in DRAWN.items():
        save(draw(), CHARTS / name)


if __name__ == "__main__":
    main()
