"""The pages of the documentation: plots, tables and examples, and that no operator is missing."""

from __future__ import annotations

import inspect
import json
import pkgutil
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest
import torch
from conftest import KernelCalls

sys.path.append(str(Path(__file__).parents[1] / "docs"))

import gain
import gallery
import pages
from entries import ENTRIES, EXAMPLES

import pyfused.functional
from pyfused.dispatch.sizes import cpu_limits
from pyfused.ops.activation import Activation
from pyfused.ops.operators import OPERATORS

pytestmark = pytest.mark.cpu
DOCS = Path(__file__).parents[1] / "docs"
README = DOCS.parent / "README.md"
report = gallery.report
RESULTS = report.RESULTS
CURVES = [
    pytest.param(name, curve, id=f"{name}-{curve.label}")
    for name, entry in ENTRIES.items()
    if name in OPERATORS
    for curve in entry.curves
]


@pytest.mark.parametrize(("name", "curve"), CURVES)
def test_curves_are_computed_by_kernels(
    name: str, curve: gallery.Curve, kernel_calls: KernelCalls
) -> None:
    x, values, gradients = gallery.evaluate(name, ENTRIES[name], curve)
    assert kernel_calls.total() > 0
    assert x.shape == values.shape == gradients.shape
    assert values.isfinite().all()
    if name in ("hardshrink", "threshold"):
        return  # discontinuous
    # Between the points, a wrong gradient would deviate by more than a kink does.
    slopes, between = values.diff() / x.diff(), (gradients[1:] + gradients[:-1]) / 2
    assert (slopes - between).abs().mean() < 0.02 * max(1.0, gradients.abs().max().item())


def test_calls_that_fall_back_are_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = ENTRIES["mse_loss"]
    monkeypatch.setattr("pyfused.backends.FORCED", "torch")
    with pytest.raises(RuntimeError, match="not torch's: mse_loss: torch"):
        gallery.evaluate("mse_loss", entry, entry.curves[0])


def test_a_plot_is_a_single_html_element() -> None:
    picture = gallery.picture("relu", ENTRIES["relu"])
    assert "\n" not in picture  # Markdown would end the element at a blank line
    assert ElementTree.fromstring(picture).tag.endswith("svg")


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if entry.formula])
def test_formulas_can_be_typeset(name: str) -> None:
    mathml = pytest.importorskip("docutils.utils.math.latex2mathml")
    formula = mathml.tex2mathml(ENTRIES[name].formula, as_block=True)
    assert "merror" not in formula
    assert any(f"<mi>{x}</mi>" in formula for x in "xpa")  # an input


def test_ratios_come_from_the_newest_report() -> None:
    rows = gallery.measured()
    reports = [gallery.report.load([path]) for path in RESULTS.glob("*/results.json")]
    timed = [found for found in reports if found["benchmarks"]]
    newest = max(timed, key=lambda found: found["datetime"])
    for row in gallery.report.rows_of(newest):
        if row.case == rows[row.op].case and row.mode == "forward+backward":
            assert rows[row.op].peers["torch"] == row.peers["torch"]
    assert rows["mse_loss"].elements == 1 << 25
    assert rows["cross_entropy"].case == "cross_entropy (1024, 32000) float32"


def test_an_operator_without_measurements_has_a_dash() -> None:
    assert "torch / pyfused: -\n" in gallery.row_of("relu", {})


def test_the_legend_names_drawn_curves_only() -> None:
    peers = {peer for row in gallery.measured().values() for peer in row.peers}
    drawn = labels(gallery.ratios())
    assert "eager torch" in drawn
    assert ("with huge pages" in drawn) == ("torch, THP" in peers)


def labels(figure: Any) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_the_formulas_are_drawn_by_kernels(kernel_calls: KernelCalls) -> None:
    titles = [axes.get_title() for axes in gallery.formulas().axes]
    assert titles == [name.replace("_", " ") for name in gallery.FORMULAS]
    assert kernel_calls == {f"formulas.{name}": 2 for name in gallery.FORMULAS}


def test_the_plot_of_speed_up_by_size_has_all_operators() -> None:
    assert [label.split(",")[0] for label in labels(gallery.gain())] == [*gain.OPERATORS]
    found = gallery.newest_gain()
    assert {row["op"] for row in found["gain"]} == {*gain.OPERATORS}
    assert found["machine_info"]["cpu"] in gallery.WRITTEN["gain machine"]()


def test_each_ratio_names_its_machine() -> None:
    assert gallery.machines().count("torch 2") == gallery.machines().count(";") + 1


def test_sizes_are_listed() -> None:
    lines = gallery.sizes().splitlines()
    assert len(lines) == 2 + len(OPERATORS)
    (relu,) = (line for line in lines if line.startswith("| `relu` |"))
    assert f"| {cpu_limits()['relu'][0]:,} |" in relu
    assert gallery.sizes("linear_log_probs").splitlines()[0] == "| operator | elements |"
    assert "activations without gradients" in gallery.sizes("gelu")


def test_the_pages_have_all_markers() -> None:
    text = "".join(page.read_text("utf-8") for page in DOCS.glob("*.md"))
    assert all(comment in text for comment in gallery.FILLED)
    assert all(f"<!-- written: {name} -->" in text for name in gallery.WRITTEN)
    source = [text]
    gallery.fill(None, "", source)
    left = set(re.findall("<!--.*?-->", gallery.PART.sub("", source[0]), re.DOTALL))
    assert left == {"<!-- benchmark table -->", "<!-- end of benchmark table -->", "<!-- end -->"}
    assert "<picture>" not in source[0]
    assert source[0].count("{.only-light}") == source[0].count("{.only-dark}")


@pytest.mark.parametrize("page", [README, *sorted(DOCS.glob("*.md"))], ids=lambda page: page.name)
def test_committed_parts_are_current(page: Path) -> None:
    text = page.read_text("utf-8")
    assert gallery.current(text) == text, "run python docs/gallery.py"


@pytest.mark.parametrize("name", gallery.DRAWN)
def test_committed_charts_are_current(name: str) -> None:
    text = (gallery.CHARTS / f"{name}.svg").read_text("utf-8")
    pinned = (
        f"matplotlib=={matplotlib.__version__} " in (README.parent / "constraints.txt").read_text()
    )
    if name == "formulas" or not pinned:  # curves and coordinates may differ in the last digits
        titles = re.findall(r"<text[^>]*>([^<]+)</text>", report.svg(gallery.DRAWN[name](), name))
        assert all(title in text for title in titles)
    else:
        assert report.svg(gallery.DRAWN[name](), name) == text, "run python docs/gallery.py"


def test_pages_that_the_readme_links_to_are_complete() -> None:
    """They are read without building the documentation, so nothing may be filled in by a build."""
    linked = {*re.findall(r"\]\((docs/[\w-]+\.md)", README.read_text("utf-8"))}
    assert len(linked) > 8
    for page in linked:
        text = (README.parent / page).read_text("utf-8")
        filled = [*gallery.FILLED, "```{", "{.only-", "{py:", "Measured on ."]
        assert not [word for word in filled if word in text], page
        prose = re.sub(r"(?s)```.*?```|`[^`]*`", "", text)
        assert "$" not in prose, page


def test_every_operator_is_in_the_page_of_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "picture", lambda *_: "")
    text = "".join(gallery.group_page(group) for group in gallery.shown())
    assert all(f"## {name}\n" in text for name in OPERATORS)
    assert all(f"../operators/{name}\n" in text for name in OPERATORS)


# ---- a page for each operator --------------------------------------------------------------------


@pytest.mark.thresholds
@pytest.mark.parametrize("name", OPERATORS)
def test_an_example_runs_and_calls_the_operator(name: str) -> None:
    assert re.search(rf"\bF\.{name}\(", EXAMPLES[name])
    exec(compile(pages.example(name), name, "exec"), {})


def test_the_page_of_an_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "picture", lambda name, _: f"<svg>{name}</svg>")
    page = pages.page("cross_entropy")
    for part in (
        ENTRIES["cross_entropy"].formula,
        "<svg>cross_entropy</svg>",
        pages.example("cross_entropy"),
        "```text\ntensor(",
        ".. autofunction:: pyfused.functional.cross_entropy\n",
        ".. autofunction:: pyfused.functional.cross_entropy_with_metrics\n",
        ".. autoclass:: pyfused.nn.CrossEntropyLoss\n",
        "{py:func}`torch.nn.functional.cross_entropy`",
        "| cross_entropy (1024, 32000) float32 | forward+backward |",
        "| `cross_entropy` | 131,072 |",
    ):
        assert part in page
    assert "mse_loss" not in page
    machines = [gallery.report.load([path]) for path in RESULTS.glob("*/results.json")]
    assert all(gallery.report.machine(found) in page for found in machines if found["benchmarks"])


def test_the_page_of_an_operator_that_torch_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "picture", lambda *_: "")
    assert "torch has no operator of this name." in pages.page("quantile_loss")


def test_pages_of_removed_operators_are_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "page", lambda name: f"# {name}")
    monkeypatch.setattr(gallery, "group_page", lambda group: f"# {group}")
    (tmp_path / "operators").mkdir()
    (tmp_path / "operators/gone.md").touch()
    pages.write(SimpleNamespace(srcdir=tmp_path))
    assert {file.stem for file in tmp_path.glob("operators/*")} == {*OPERATORS}
    assert [*tmp_path.glob("groups/regression.md")]


def documented(input: int, scale: float = 2.0, *, name: str = "mean", other: str = "") -> None: ...


def test_arguments_are_converted_to_a_table() -> None:
    docstring = """What it does.

Args:
    input: Of any shape, and
        two lines::

            code

    scale: A factor.
    name, other: As elsewhere.

Returns:
    A number."""
    lines = docstring.splitlines()
    pages.arguments(None, "function", "documented", documented, None, lines)
    table = """\
   * - argument
     - default
     - meaning
   * - ``input``
     -\x20
     - Of any shape, and
       two lines::

           code

   * - ``scale``
     - ``2.0``
     - A factor.
   * - ``name``, ``other``
     -\x20
     - As elsewhere.
"""
    assert table in "\n".join(lines)
    assert lines[-2:] == ["Returns:", "    A number."]
    assert "Args:" not in lines


SHARED = {"reduction", "size_average", "reduce", "inplace"}  # described once, for all functions


def test_shared_arguments_are_described_once() -> None:
    described = pyfused.functional.__doc__ or ""
    assert all(f"``{name}" in described for name in SHARED)
    assert "The ``input`` of an activation" in described
    assert ".. automodule:: pyfused.functional\n" in (DOCS / "reference.md").read_text("utf-8")
    assert "](../reference.md#functions-and-modules)" in pages.page("relu")


@pytest.mark.parametrize("name", pyfused.functional.__all__)
def test_every_argument_is_in_the_table(name: str) -> None:
    """Fails if a section of the docstring has an unexpected form."""
    function = getattr(pyfused.functional, name)
    shared = SHARED | {"input"} if isinstance(OPERATORS.get(name), Activation) else SHARED
    lines = inspect.getdoc(function).splitlines()
    pages.arguments(None, "function", name, function, None, lines)
    cells = [cell for line in lines if line.startswith("   * - ") for cell in line.split(" - ")[1:]]
    described = set(re.findall(r"``(\w+)``", " ".join(cells)))
    parameters = {*inspect.signature(function).parameters}
    assert described | (shared & parameters) == parameters


# ---- links and plots -----------------------------------------------------------------------------


def test_the_inventory_of_torch_has_exactly_its_operators() -> None:
    lines = (DOCS / "torch-objects.inv").read_text("utf-8").splitlines()
    assert lines[0] == "# Sphinx inventory version 1"
    names = [line.split()[0] for line in lines[3:]]
    newer = {"torch.nn.functional.linear_cross_entropy", "torch.nn.LinearCrossEntropyLoss"}
    known = {*names} if hasattr(torch.nn, "LinearCrossEntropyLoss") else {*names} - newer
    assert all(pkgutil.resolve_name(name) is not None for name in known)
    for op in OPERATORS.values():
        if hasattr(torch.nn.functional, op.name):
            assert f"torch.nn.functional.{op.name}" in names
            assert f"torch.nn.{op.module}" in names


def test_plots_are_saved_for_both_themes(tmp_path: Path) -> None:
    figure = gallery.Figure()
    figure.subplots().plot([1, 2], label="line")
    gallery.report.save(figure, tmp_path / "picture")
    light, dark = ((tmp_path / f"picture{end}.svg").read_text() for end in ("", "-dark"))
    assert light.replace(gallery.report.INK, gallery.report.INK_ON_BLACK) == dark
    assert light != dark
    assert "fill: #ffffff" not in light
    ElementTree.fromstring(dark)


@pytest.mark.parametrize("page", ["README.md", "docs/memory.md", "docs/language-models.md"])
def test_plots_have_both_themes(page: str) -> None:
    text = (DOCS.parent / page).read_text("utf-8")
    pictures = re.findall(r"[\w./-]+\.(?:png|svg)", text)
    assert pictures
    assert all(picture.endswith(".svg") for picture in pictures)
    light = [picture for picture in pictures if not picture.endswith("-dark.svg")]
    assert {f"{picture.removesuffix('.svg')}-dark.svg" for picture in light} <= {*pictures}
    for picture in pictures:
        assert ((DOCS.parent / page).parent / picture).exists(), picture


@pytest.mark.thresholds
@pytest.mark.parametrize("name", gallery.NOTEBOOKS)
def test_a_notebook_is_current_and_runs(name: str) -> None:
    text = (README.parent / f"examples/{name}.ipynb").read_text("utf-8")
    assert text == gallery.notebook(name), "run python docs/gallery.py"
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert cells
    names: dict[str, Any] = {}
    for cell in cells:
        exec(compile("".join(cell["source"]), name, "exec"), names)
    for cell in json.loads(text)["cells"]:
        for link in re.findall(r"\]\(([^)#:]+)", "".join(cell["source"])):
            assert (README.parent / "examples" / link).exists(), link
