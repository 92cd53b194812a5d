"""The pictures of a report: ratios by case, times against sizes, and memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from measure import Row

# From Okabe and Ito's palette, which every kind of colour vision tells apart.
MODES = {
    "forward+backward": {"color": "#D55E00", "marker": "o"},
    "forward": {"color": "#0072B2", "marker": "D"},
}
IMPLEMENTATIONS = {
    "torch": "#0072B2",
    "torch.compile": "#009E73",
    "pyfused": "#D55E00",
    "pyfused, inplace=True": "#E69F00",
}
Titled = tuple[Figure, str]


def ratios(rows: Sequence[Row], peers: Sequence[str]) -> Titled:
    cases = list(dict.fromkeys(row.case for row in rows))
    figure = Figure(figsize=(3 + 4.5 * len(peers), 2 + 0.36 * len(cases)), layout="constrained")
    panels = figure.subplots(1, len(peers), squeeze=False, sharey=True)[0]
    for axes, peer in zip(panels, peers, strict=True):
        _draw_ratios(axes, rows, cases, peer)
    return figure, "How many times faster pyfused is: median of the rounds, and their middle half"


def _draw_ratios(axes: Axes, rows: Sequence[Row], cases: Sequence[str], peer: str) -> None:
    for (mode, style), offset in zip(MODES.items(), (-0.17, 0.17), strict=True):
        for row in rows:
            if row.mode != mode or peer not in row.peers:
                continue
            low, median, high = row.peers[peer].ratio
            place = cases.index(row.case) + offset
            spread = [[median - low], [high - median]]
            axes.errorbar(median, place, xerr=spread, markersize=6, capsize=3, **style)
        axes.errorbar([], [], xerr=[], markersize=6, capsize=3, label=mode, **style)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlim(left=min(0.7, axes.get_xlim()[0]))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(cases)), cases)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_xlabel(f"time of {peer} / time of pyfused")
    axes.grid(axis="x", alpha=0.3)
    for place in range(0, len(cases), 2):
        axes.axhspan(place - 0.5, place + 0.5, color="black", alpha=0.04, linewidth=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)


def scaling(rows: Sequence[Row]) -> Titled:
    panels = {
        "cross_entropy, 1000 classes": ("cross_entropy", "elements"),
        "mse_loss": ("mse_loss", "elements"),
        "relu": ("relu", "elements"),
        "cross_entropy, 16 M elements": ("cross_entropy", "classes"),
    }
    figure = Figure(figsize=(13, 9), layout="constrained")
    for axes, (title, (op, curve)) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        points = [row for row in rows if (row.op, row.curve) == (op, curve)]
        if not points:  # where only some cases were asked for
            axes.set_axis_off()
            continue
        _draw_times(axes, sorted(points, key=lambda row: getattr(row, curve)), curve)
        axes.set_title(title, fontsize=10)
    return figure, "Forward + backward, float32: median times"


def _draw_times(axes: Axes, rows: Sequence[Row], curve: str) -> None:
    for peer, label, dashes in (
        ("torch", "as it comes", "-"),
        ("torch, kept pages", "kept pages", "--"),
    ):
        known = [row for row in rows if peer in row.peers]
        x = [getattr(row, curve) for row in known]
        theirs = [row.peers[peer].ms for row in known]
        ours = [row.peers[peer].pyfused_ms for row in known]
        for name, times in (("torch", theirs), ("pyfused", ours)):
            colour = IMPLEMENTATIONS[name]
            axes.plot(x, times, dashes, color=colour, marker=".", label=f"{name}, {label}")
    bounds = [row for row in rows if "copy" in row.peers]
    x = [getattr(row, curve) for row in bounds]
    copies = [row.peers["copy"].ms for row in bounds]
    axes.plot(x, copies, ":", color="black", label="a copy of as many bytes")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel(curve)
    axes.set_ylabel("milliseconds")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


def memory(found: Sequence[dict[str, Any]]) -> Titled:
    cases = list(dict.fromkeys(entry["case"] for entry in found))
    figure = Figure(figsize=(10, 1.5 + 0.9 * len(cases)), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(IMPLEMENTATIONS)
    for index, (name, colour) in enumerate(IMPLEMENTATIONS.items()):
        entries = [entry for entry in found if entry["implementation"] == name]
        places = [cases.index(entry["case"]) + (index - 1.5) * width for entry in entries]
        taken = [entry["bytes"] / entry["input_bytes"] for entry in entries]
        bars = axes.barh(places, taken, width, color=colour, label=name)
        axes.bar_label(bars, [f"{entry['bytes'] / 2**20:,.0f} MiB" for entry in entries], padding=3)
    axes.set_yticks(range(len(cases)), cases)
    axes.invert_yaxis()
    axes.set_xlabel("peak memory beyond the arguments / memory of the input")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False)
    return figure, "What a forward and backward pass takes at its peak"


def allocators(found: Sequence[dict[str, Any]]) -> Titled:
    """Milliseconds in each way to get memory, a panel for each case."""
    cases = list(dict.fromkeys(entry["case"] for entry in found))
    ways = list(dict.fromkeys(entry["way"] for entry in found))
    figure = Figure(figsize=(2.5 + 2.6 * len(cases), 1.5 + 0.34 * len(ways)), layout="constrained")
    panels = figure.subplots(1, len(cases), squeeze=False, sharey=True)[0]
    for axes, case in zip(panels, cases, strict=True):
        times = {entry["way"]: entry["ms"] for entry in found if entry["case"] == case}
        colours = [IMPLEMENTATIONS[way.partition(",")[0]] for way in ways]
        bars = axes.barh(ways, [times[way] for way in ways], color=colours)
        axes.bar_label(bars, [f"{times[way]:.3g}" for way in ways], padding=3, fontsize=8)
        axes.margins(x=0.2)
        axes.set_title(case, fontsize=8)
        axes.set_xlabel("milliseconds")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    return figure, "Forward + backward of large tensors, by where their memory comes from"
