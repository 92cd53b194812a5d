"""The documentation's committed parts are current, and its examples run."""

from __future__ import annotations

import json
import re
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib
import pytest

sys.path.append(str(Path(__file__).parents[2] / "docs"))

import charts
import pages
import tables
from entries import EXAMPLES

from pyfused.ops.operators import OPERATORS

pytestmark = pytest.mark.cpu
DOCS = Path(__file__).parents[2] / "docs"
README = DOCS.parent / "README.md"

MOST_WORDS, LONGEST_PAGE, LINES_OF_README = 15_500, 1_400, 92


def test_the_pages_are_short() -> None:
    """A page that grows first loses what another page says, or what only its authors need."""
    files = (*pages.PAGES, DOCS.parent / "CONTRIBUTING.md")
    words = {page.name: len(page.read_text("utf-8").split()) for page in files}
    shorten = f"shorten a page: {words}"
    assert max(words.values()) <= LONGEST_PAGE, shorten
    assert sum(words.values()) <= MOST_WORDS, shorten
    assert len(README.read_text("utf-8").splitlines()) <= LINES_OF_README


def test_written_parts_are_current() -> None:
    assert not pages.outdated(), "run python docs/pages.py"


def test_pages_show_every_table_and_chart() -> None:
    text = "".join(page.read_text("utf-8") for page in pages.PAGES)
    assert sorted(name for _, name in pages.PART.findall(text)) == sorted(tables.WRITTEN)
    assert {*re.findall(r"charts/(.*?\.svg)", text)} == {x.name for x in DOCS.glob("charts/*.svg")}


def test_the_index_lists_every_page() -> None:
    listed = re.findall(r"\]\((.*?\.md)\)", (DOCS / "index.md").read_text("utf-8"))
    pages = {page.name for page in DOCS.glob("*.md")} - {"index.md"}
    assert sorted(listed) == sorted({"../README.md", *pages})


@pytest.mark.parametrize(
    ("quartiles", "shown"), [((0.9, 1.2, 1.4), "1.0"), ((1.1, 1.2, 1.4), "1.20")]
)
def test_a_ratio_within_the_noise_is_no_speed_up(
    quartiles: tuple[float, float, float], shown: str
) -> None:
    assert tables.rounded(*quartiles) == shown


def test_the_table_of_losses_has_a_column_for_each_processor() -> None:
    names = {table[0]["machine"].partition(",")[0] for table in tables.cpu_tables("results")}
    head, *_ = tables.headline().splitlines()
    assert len(names) > 1
    assert names == set(head.strip("| ").split(" | ")[1:])


@pytest.mark.parametrize("name", charts.DRAWN)
def test_committed_charts_are_current(name: str) -> None:
    text = (DOCS / "charts" / f"{name}.svg").read_text("utf-8")
    pinned = (
        f"matplotlib=={matplotlib.__version__} " in (README.parent / "constraints.txt").read_text()
    )
    if (
        name in ("formulas", "tutorial") or not pinned
    ):  # curves and coordinates may differ in the last digits
        drawn = charts.rendered(charts.DRAWN[name](), name)
        titles = re.findall(r"<text[^>]*>([^<]+)</text>", drawn)
        assert all(title in text for title in titles)
    else:
        assert charts.rendered(charts.DRAWN[name](), name) == text, "run python docs/pages.py"


@pytest.mark.thresholds
@pytest.mark.parametrize("name", OPERATORS)
def test_an_example_runs_and_calls_the_operator(name: str) -> None:
    assert re.search(rf"\bF\.{name}\(", EXAMPLES[name])
    exec(compile(pages.example(name), name, "exec"), {})


@pytest.mark.thresholds
@pytest.mark.parametrize("name", pages.NOTEBOOKS)
def test_a_notebook_is_current_and_runs(name: str) -> None:
    text = (README.parent / f"examples/{name}.ipynb").read_text("utf-8")
    assert text == pages.notebook(name), "run python docs/pages.py"
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert cells
    names: dict[str, Any] = {}
    for cell in cells:
        with redirect_stdout(StringIO()) as printed:
            exec(compile("".join(cell["source"]), name, "exec"), names)
        for output in cell["outputs"]:
            assert printed.getvalue().split() == "".join(output["text"]).split()
    for cell in json.loads(text)["cells"]:
        for link in re.findall(r"\]\(([^)#:]+)", "".join(cell["source"])):
            assert (README.parent / "examples" / link).exists(), link
