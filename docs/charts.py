"""Draws the pictures of the pages; those of operators show the output of the kernels."""

from __future__ import annotations

import inspect
import io
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import tables
import torch
from common import SERIES, STYLES
from entries import Curve, Entry
from formulas import FORMULAS
from matplotlib import rc_context, rcParams
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from torch import Tensor

import pyfused
import pyfused.functional

POINTS = 401
COLOURS = [colour for colour, _ in SERIES]
DOCS = Path(__file__).parent
INK, INK_ON_BLACK = "#0d0e0f", "#e8e8e8"  # colours of text and axes
WIDTH = 5.2  # of charts, in inches: their text is readable on a phone
MARGIN = 0.15  # beside long labels, which may be wider in a browser than in matplotlib


# ---- operators -----------------------------------------------------------------------------------


def evaluate(name: str, entry: Entry, curve: Curve) -> tuple[Tensor, Tensor, Tensor]:
    """Returns points, and the value and the gradient that the kernels compute at each."""
    function = getattr(pyfused.functional, name)
    x = torch.linspace(*entry.axis[1:], POINTS).requires_grad_()
    others = [torch.full((POINTS,), other) for other in curve.others]
    input = torch.stack([x, *others], 1) if others else x
    rest = [
        torch.full((POINTS,) if isinstance(value, int) else input.shape, value)
        for value in curve.arguments
    ]
    options = dict(curve.options)
    if "reduction" in inspect.signature(function).parameters:
        options["reduction"] = "none"
    path = pyfused.explain(name, input, *rest, **options)
    if path.backend == "torch":
        raise RuntimeError(f"pictures must show the output of kernels, not torch's: {path}")
    value = function(input, *rest, **options)
    value = value[0] if isinstance(value, tuple) else value
    drawn = value[:, 0] if value.dim() > x.dim() else value  # an activation over classes
    (gradient,) = torch.autograd.grad(drawn, x, torch.ones_like(drawn))
    return x.detach(), drawn.detach(), gradient


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
    figure.supxlabel(entry.axis[0], fontsize=9)
    labels = [curve.label for curve in entry.curves]
    if any(labels):
        columns = len(labels) if sum(map(len, labels)) <= 40 else 2
        figure.legend(loc="outside upper center", ncols=columns, frameon=False, fontsize=9)
    return element(with_grid(figure), f"Value and gradient of {name}")


# ---- charts --------------------------------------------------------------------------------------

# Formulas with a target other than 0 or a bounded input: the target, the lowest and highest x.
DOMAINS: dict[str, tuple[Any, float, float]] = {
    "tweedie": (1.0, -3.0, 3.0),
    "asymmetric": (1.0, -6.0, 6.0),
    "generalized_cross_entropy": (None, 0.02, 1.0),
}


def formulas() -> Figure:
    """Draws value and gradient of each formula of the examples."""
    figure = Figure(figsize=(WIDTH, 8), layout="constrained")
    panels = figure.subplots(len(FORMULAS) // 2, 2).flat
    for panel, (name, formula) in zip(panels, FORMULAS.items(), strict=True):
        target, low, high = DOMAINS.get(name, (0.0, -6.0, 6.0))
        x = torch.linspace(low, high, POINTS).requires_grad_()
        operands = [x, torch.full_like(x, target)] if len(formula.op.variables) > 1 else [x]
        each = formula(*operands, **({"reduction": "none"} if formula.loss else {}))
        (gradient,) = torch.autograd.grad(each.sum(), x)
        panel.plot(x.detach(), each.detach(), color=COLOURS[0], label="value")
        panel.plot(x.detach(), gradient, color=COLOURS[1], linewidth=1, label="gradient")
        panel.set_title(name.replace("_", " "), fontsize=9)
    labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(*labels, loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return with_grid(figure)


def ratios() -> Figure:
    """Draws the speed-up of each operator over torch, in descending order."""
    rows = tables.largest_cases()
    names = sorted(rows, key=lambda name: rows[name].peers["torch"].ratio[1])
    figure = Figure(figsize=(WIDTH, 1.2 + 0.15 * len(names)))
    figure.set_layout_engine("constrained", w_pad=MARGIN)
    axes = figure.subplots()
    for peer, label in (
        ("torch", "eager torch"),
        ("torch, keep", "both with keep"),
        ("torch.compile, keep", "compiled, both with keep"),
    ):
        colour, marker = STYLES[peer]
        known = [name for name in names if peer in tables.compared(rows[name])]
        if not known:  # else it is in the legend
            continue
        medians = [rows[name].peers[peer].ratio[1] for name in known]
        places = [names.index(name) for name in known]
        axes.plot(medians, places, marker, color=colour, markersize=5, label=label)
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_xscale("log")
    axes.set_xlim(left=min(0.8, axes.get_xlim()[0]))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.tick_params(axis="x", top=True, labeltop=True)  # the chart is tall
    axes.set_xlabel("time of torch / time of pyfused", fontsize=9)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return with_grid(figure)


# The ways to compute a head that are drawn, and their names in the measurements.
HEADS = {
    "eager torch": "torch",
    "torch.compile": "torch.compile",
    "torch.compile, auto_chunker": "torch.compile, auto_chunker",
    "Liger": "Liger",
    "cut-cross-entropy": "cut-cross-entropy",
    "pyfused, of logits": "pyfused, cross_entropy of logits",
    "pyfused": "pyfused",
    "pyfused, a quarter": "pyfused, memory_budget of a quarter",
    "pyfused, a 16th": "pyfused, memory_budget of a 16th",
}


def gpu() -> Figure:
    """Draws time and peak memory of a head with the sizes of Llama 3 8B on an H100."""
    found = tables.h100_heads()["(8192, 4096, 128256)"]
    shown = {name: found[way] for name, way in HEADS.items() if way in found}
    quartiles = [[float(x) for x in re.findall(r"[\d.]+", cells[2])] for cells in shown.values()]
    medians = [middle for middle, *_ in quartiles]
    errors = [[mid - low for mid, low, _ in quartiles], [high - mid for mid, _, high in quartiles]]
    peaks = [float(cells[1]) for cells in shown.values()]
    figure = Figure(figsize=(WIDTH, 2 * (0.9 + 0.25 * len(shown))))
    figure.set_layout_engine("constrained", w_pad=MARGIN)
    colours = [STYLES[name.removeprefix("eager ").partition(",")[0]][0] for name in shown]
    for axes, title, values, spread in zip(
        figure.subplots(2),
        ("time / time of products, with quartiles", "peak memory, GiB"),
        (medians, peaks),
        (errors, None),
        strict=True,
    ):
        bars = axes.barh([*shown], values, xerr=spread, ecolor=INK, color=colours)
        axes.bar_label(bars, [f"{value:.2f}" for value in values], padding=3, fontsize=9)
        axes.margins(x=0.15)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("less is better", fontsize=9)
        axes.invert_yaxis()
    return figure


def training() -> Figure:
    """Draws times and peaks of the models of README.md, in proportion to eager torch's."""
    gains = tables.training_gains()
    figure = Figure(figsize=(WIDTH, 0.8 + 0.52 * len(gains)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    labels = "eager torch", "compiled torch", "with pyfused, eager"
    for index, way in enumerate(("torch", "torch.compile", "pyfused")):
        rows = [row + 0.27 * (index - 1) for row in range(len(gains))]
        times = [tables.milliseconds(gain.ms[index]) for gain in gains]
        peaks = [f"{gain.gib[index]:.2f}" for gain in gains]
        shares = [[g.ms[index] / g.ms[0] for g in gains], [g.gib[index] / g.gib[0] for g in gains]]
        for axes, values, texts in zip(panels, shares, (times, peaks), strict=True):
            bars = axes.barh(rows, values, 0.25, color=STYLES[way][0], label=labels[index])
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


# A block of Python, and the block of text below it, which is its output.
CELL = re.compile(r"(?s)```python\n(.*?)\n```(?:\n\n```text\n(.*?)```)?")


def tutorial() -> Figure:
    """Returns the figure that the tutorial draws."""
    names: dict[str, Any] = {}
    text = (DOCS / "tutorial.md").read_text(encoding="utf-8")
    with redirect_stdout(io.StringIO()):
        exec("\n".join(code for code, _ in CELL.findall(text)), names)
    for line, colour in zip(names["axes"].lines, COLOURS, strict=False):
        line.set_color(colour)
    return with_grid(names["figure"])


DRAWN = {f.__name__: f for f in (training, ratios, formulas, gpu, tutorial)}


# ---- files ---------------------------------------------------------------------------------------


def with_grid(figure: Figure) -> Figure:
    for axes in figure.axes:
        axes.grid(color=INK, alpha=0.15, linewidth=0.6)
    return figure


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


def write() -> None:
    """Writes NAME.svg for white backgrounds, and NAME-dark.svg for black backgrounds."""
    for name, draw in DRAWN.items():
        text = rendered(draw(), name)
        (DOCS / f"charts/{name}.svg").write_text(text, encoding="utf-8")
        dark = text.replace(INK, INK_ON_BLACK)
        (DOCS / f"charts/{name}-dark.svg").write_text(dark, encoding="utf-8")


OPENING = (
    r'<svg viewBox="\1" role="img" aria-label="{}" xmlns="http://www.w3.org/2000/svg"'
    r' xmlns:xlink="http://www.w3.org/1999/xlink">'
)


def element(figure: Figure, title: str) -> str:
    """Returns a figure as an HTML element in the colour of the surrounding text."""
    text = rendered(figure, title)
    text = text[text.index("<svg") :]
    text = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', OPENING.format(title), text, count=1)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", text)
    text = text.replace(INK, "currentColor")
    return re.sub(r"\s*\n\s*", " ", text)  # a blank line would end the element
