"""The pages that are filled from the declarations: what is drawn, and that nothing is left out."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from conftest import KernelCalls

sys.path.append(str(Path(__file__).parents[1] / "docs"))

import gallery
from entries import ENTRIES

from pyfused.ops.operators import OPERATORS
from pyfused.ops.sizes import ATEN_BELOW

pytestmark = pytest.mark.cpu
DOCS = Path(__file__).parents[1] / "docs"
CURVES = [
    pytest.param(name, curve, id=f"{name}-{curve.label}")
    for name, entry in ENTRIES.items()
    if name in OPERATORS
    for curve in entry.curves
]


@pytest.mark.parametrize(("name", "curve"), CURVES)
def test_a_curve_is_what_the_kernels_compute(
    name: str, curve: gallery.Curve, kernel_calls: KernelCalls
) -> None:
    x, values, gradients = gallery.evaluate(name, ENTRIES[name], curve)
    assert kernel_calls.total() > 0
    assert x.shape == values.shape == gradients.shape
    assert values.isfinite().all()
    # Between the points: a gradient that were not the value's would stray by more than a kink does.
    slopes, between = values.diff() / x.diff(), (gradients[1:] + gradients[:-1]) / 2
    assert (slopes - between).abs().mean() < 0.02 * max(1.0, gradients.abs().max().item())


def test_a_call_that_is_left_to_torch_is_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = ENTRIES["mse_loss"]
    monkeypatch.setattr("pyfused.backends.FORCED", "torch")
    with pytest.raises(RuntimeError, match="not torch's: mse_loss: torch"):
        gallery.evaluate("mse_loss", entry, entry.curves[0])


def test_a_picture_is_one_element() -> None:
    picture = gallery.picture("relu", ENTRIES["relu"])
    assert "\n" not in picture  # Markdown would end the element at a blank line
    assert ElementTree.fromstring(picture).tag.endswith("svg")


@pytest.mark.parametrize("name", ENTRIES)
def test_a_formula_can_be_typeset(name: str) -> None:
    mathml = pytest.importorskip("docutils.utils.math.latex2mathml")
    formula = mathml.tex2mathml(ENTRIES[name].formula, as_block=True)
    assert "merror" not in formula
    assert "<mi>x</mi>" in formula or "<mi>p</mi>" in formula


def test_ratios_are_those_of_the_newest_report() -> None:
    rows = gallery.measured()
    newest = max(
        map(
            gallery.report.load, ([path] for path in gallery.report.RESULTS.glob("*/results.json"))
        ),
        key=lambda found: found["datetime"],
    )
    for row in gallery.report.rows_of(newest):
        if row.case == rows[row.op].case and row.mode == "forward+backward":
            assert rows[row.op].peers["torch"] == row.peers["torch"]
    assert rows["mse_loss"].elements == 1 << 25
    assert rows["cross_entropy"].case == "cross_entropy (1024, 32000) float32"


def test_an_operator_that_nobody_measured_has_a_dash() -> None:
    assert "torch / pyfused: -\n" in gallery.row_of("relu", {})


def test_the_legend_names_what_is_drawn_alone() -> None:
    rows = gallery.measured()
    peers = {peer for row in rows.values() for peer in row.peers}
    drawn = gallery.ratios(rows)
    assert "eager torch" in drawn
    assert ("with huge pages" in drawn) == ("torch, THP" in peers)


def test_the_machine_of_each_ratio_is_named() -> None:
    assert gallery.machines().count("torch 2") == gallery.machines().count(";") + 1


def test_sizes_are_listed() -> None:
    lines = gallery.sizes().splitlines()
    assert len(lines) == 2 + len(ATEN_BELOW)
    (relu,) = (line for line in lines if line.startswith("| `relu` |"))
    assert f"{ATEN_BELOW['relu'][torch.float32][0][1]:,}" in relu


def test_the_pages_have_every_comment_that_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "picture", lambda *_: "")
    pages = "".join(page.read_text("utf-8") for page in DOCS.glob("*.md"))
    assert all(comment in pages for comment in gallery.FILLED)
    source = [pages]
    gallery.fill(None, "", source)
    assert not any(comment in source[0] for comment in gallery.FILLED)
    assert all(f"### {name}\n" in source[0] for name in OPERATORS)
