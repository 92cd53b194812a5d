"""The pages of the documentation: plots, tables and examples, and that no operator is missing."""

from __future__ import annotations

import inspect
import json
import pkgutil
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from conftest import KernelCalls

sys.path.append(str(Path(__file__).parents[1] / "docs"))

import gallery
import pages
from entries import ENTRIES, EXAMPLES

import pyfused.functional
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


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if entry.formula])
def test_formulas_can_be_typeset(name: str) -> None:
    mathml = pytest.importorskip("docutils.utils.math.latex2mathml")
    formula = mathml.tex2mathml(ENTRIES[name].formula, as_block=True)
    assert "merror" not in formula
    assert any(f"<mi>{x}</mi>" in formula for x in "xpa")  # an input


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
        ".. autofunction:: pyfused.functional.cross_entropy_with_metrics\n",
        ".. autoclass:: pyfused.nn.CrossEntropyLoss\n",
        "{py:func}`torch.nn.functional.cross_entropy`",
    ):
        assert part in page
    assert "mse_loss" not in page
    assert "torch has no operator of this name." in pages.page("quantile_loss")


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
