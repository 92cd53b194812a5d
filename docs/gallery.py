"""Fills pages with content made from declarations: groups of operators, ratios and sizes.

docs/entries.py has the text about each operator. The pictures show the output of the kernels.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from entries import ENTRIES, GALLERY, Curve, Entry
from matplotlib.figure import Figure
from torch import Tensor

import pyfused
import pyfused.functional
from pyfused.dispatch.sizes import FEW, NEVER, limits
from pyfused.ops.operators import OPERATORS

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("benchmarks", "examples")]

import report
from formulas import FORMULAS
from palette import SERIES, STYLES
from report import Row

POINTS = 401
COLOURS = [colour for colour, _ in SERIES]


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
        torch.tensor(value).expand(len(x), -1)  # the labels of a row
        if isinstance(value, tuple)
        else torch.full_like(x, value, dtype=torch.int64, requires_grad=False)
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
    figure = Figure(figsize=(5.2, 2.3), layout="constrained")
    value, gradient = figure.subplots(1, 2)
    for index, curve in enumerate(entry.curves):
        x, values, gradients = evaluate(name, entry, curve)
        # Thinner lines are drawn over thicker ones, so that both are visible where they agree.
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


def formulas() -> str:
    """Draws value and gradient of each formula of the examples as SVG."""
    figure = Figure(figsize=(5.2, 8), layout="constrained")
    panels = figure.subplots(len(FORMULAS) // 2, 2).flat
    for panel, (name, formula) in zip(panels, FORMULAS.items(), strict=True):
        target, low, high = _DRAWN.get(name, (0.0, -6.0, 6.0))
        x = torch.linspace(low, high, POINTS).requires_grad_()
        operands = [x, torch.full_like(x, target)] if len(formula.op.variables) > 1 else [x]
        each = formula(*operands, **({"reduction": "none"} if formula.op.loss else {}))
        (gradient,) = torch.autograd.grad(each.sum(), x)
        panel.plot(x.detach(), each.detach(), color=COLOURS[0], label="value")
        panel.plot(x.detach(), gradient, color=COLOURS[1], linewidth=1, label="gradient")
        panel.set_title(name.replace("_", " "), fontsize=9)
    labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(*labels, loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return svg(figure, "Value and gradient of ten formulas")


def ratios(rows: dict[str, Row]) -> str:
    """Draws the speed-up of each operator over torch, in descending order, as SVG."""
    names = sorted(rows, key=lambda name: rows[name].peers["torch"].ratio[1])
    figure = Figure(figsize=(5.2, 1.2 + 0.15 * len(names)), layout="constrained")
    axes = figure.subplots()
    for peer, label in (
        ("torch", "eager torch"),
        ("torch, THP", "with huge pages"),
        ("torch.compile", "compiled"),
    ):
        colour, marker = STYLES[peer]
        known = [name for name in names if peer in rows[name].peers]
        if not known:  # else it is in the legend
            continue
        medians = [rows[name].peers[peer].ratio[1] for name in known]
        places = [names.index(name) for name in known]
        axes.plot(medians, places, marker, color=colour, markersize=5, label=label)
    report.finish_ratios(axes)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.tick_params(axis="x", top=True, labeltop=True)  # the chart is tall
    axes.set_xlabel("time of torch / time of pyfused", fontsize=9)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return svg(figure, "Time of torch divided by time of pyfused, operator by operator")


def gain() -> str:
    """Draws the speed-up of a call over torch, by its size, as SVG."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    rows = newest_gain()["gain"]
    for index, op in enumerate(dict.fromkeys(row["op"] for row in rows)):
        known = [row for row in rows if row["op"] == op]
        elements = [row["elements"] for row in known]
        low, median, high = zip(*(row["ratio"] for row in known), strict=True)
        colour, marker = SERIES[index]
        axes.fill_between(elements, low, high, color=colour, alpha=0.2, linewidth=0)
        label = f"{op}, 1,000 classes" if op == "cross_entropy" else op
        axes.plot(elements, median, marker, ls="-", color=colour, markersize=4, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.axhline(1, color=report.INK, linewidth=1)
    report.label_ratios(axes.yaxis)
    ticks = elements[::2]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xlabel("elements of the input", fontsize=9)
    axes.set_ylabel("time of torch / time of pyfused", fontsize=9)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return svg(figure, "Time of torch divided by time of pyfused, over the size of the input")


def newest_gain() -> report.Found:
    files = report.RESULTS.glob("*/gain.json")
    return max(
        (json.loads(file.read_text(encoding="utf-8")) for file in files),
        key=lambda found: found["datetime"],
    )


def svg(figure: Figure, title: str) -> str:
    """Returns a figure as an HTML element in the colour of the surrounding text."""
    for axes in figure.axes:
        axes.grid(color=report.INK, alpha=0.15, linewidth=0.6)
    text = report.svg(figure, title)
    text = text[text.index("<svg") :]
    text = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', _OPENING.format(title), text, count=1)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", text)
    text = text.replace(report.INK, "currentColor")
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
    found = {report.machine(found): None for _, found in _newest().values()}
    return "; ".join(found)


def _newest() -> dict[str, tuple[Row, report.Found]]:
    reports = [report.load([path]) for path in report.RESULTS.glob("*/results.json")]
    largest: dict[str, tuple[Row, report.Found]] = {}
    for found in sorted(reports, key=lambda found: found["datetime"]):
        if "gpu" in found["machine_info"]:
            continue
        newer: dict[str, Row] = {}
        for row in report.rows_of(found):
            if row.mode == "forward+backward" and "torch" in row.peers:
                first = newer.setdefault(row.op, row)
                newer[row.op] = max(first, row, key=lambda row: (row.headline, row.elements))
        largest |= {name: (row, found) for name, row in newer.items()}
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
            f"torch / pyfused: {_ratio(rows.get(name))}\n",
            f"</div>\n{picture(name, entry)}\n</div>\n",
        )
    )


def _ratio(row: Row | None) -> str:
    if row is None:
        return "-"
    eager, compiled = row.peers["torch"], row.peers.get("torch.compile")
    text = f"**{eager.ratio[1]:.1f}**"
    if compiled is not None:
        text += f", compiled {compiled.ratio[1]:.1f}"
    return f"{text}, for {row.case.removeprefix(row.op).strip()}"


def shown() -> dict[str, list[str]]:
    """Returns the declared operators of each group that is not empty."""
    groups = {
        group: [name for name in entries if name in OPERATORS] for group, entries in GALLERY.items()
    }
    return {group: names for group, names in groups.items() if names}


LEGEND = (
    "In the formulas, x is the input and t the target. The pictures show the output of the kernels."
    ' "torch / pyfused" is the time of eager torch divided by pyfused\'s, forward and backward, for'
    ' the largest size that was [measured](../benchmarks.md) on CPUs; "compiled" is the same for'
    " `torch.compile`. A ratio above 1 means that pyfused is faster."
)


def slug(group: str) -> str:
    return group.lower().replace(" ", "-")


def group_page(group: str) -> str:
    """Returns the page of a group, below which the sidebar lists the pages of its operators."""
    names, rows = shown()[group], measured()
    toctree = "\n".join(f"../operators/{name}" for name in names)
    return "\n".join(
        (
            f"# {group}\n\n{LEGEND}\n\nMeasured on: {machines()}.\n",
            *(f"## {name}\n\n{row_of(name, rows)}" for name in names),
            f"```{{toctree}}\n:hidden:\n\n{toctree}\n```\n",
        )
    )


def groups() -> str:
    """Returns the entries of a toctree."""
    return "\n".join(f"groups/{slug(group)}" for group in shown())


def covered() -> str:
    return "\n".join(
        f"- [{group}](groups/{slug(group)}.md): "
        + ", ".join(f"[{name}](operators/{name}.md)" for name in names)
        for group, names in shown().items()
    )


def sizes(*operators: str) -> str:
    """Returns a table of the smallest inputs that run a kernel on CPUs."""
    special = f"unreduced losses, up to {FEW} classes, activations without gradients"
    columns = ["operator", "elements", special]
    rows = [
        [f"`{name}`", *map(words, limits(op, True))]
        for name, op in OPERATORS.items()
        if name in (operators or OPERATORS)
    ]
    if all(first == second for _, first, second in rows):
        columns, rows = columns[:2], [row[:2] for row in rows]
    return report.tabulated(columns, rows, names=1)


def words(limit: int) -> str:
    return "none" if limit == NEVER else f"{limit:,}" if limit else "any"


# Functions whose results replace these comments in pages.
FILLED = {
    "<!-- groups -->": groups,
    "<!-- ratios -->": lambda: ratios(measured()),
    "<!-- covered -->": covered,
    "<!-- machines -->": machines,
    "<!-- sizes -->": sizes,
    "<!-- gain -->": gain,
    "<!-- formulas -->": formulas,
    "<!-- gain machine -->": lambda: report.machine(newest_gain()),
}


def fill(_app: object, _page: str, source: list[str]) -> None:
    """Fills a page as Sphinx reads it."""
    for comment, text in FILLED.items():
        if comment in source[0]:
            source[0] = source[0].replace(comment, text())
