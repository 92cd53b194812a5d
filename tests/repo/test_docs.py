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

import gain as gains
import gallery
import pages
from entries import EXAMPLES
from steps import RATIO

from pyfused.ops.operators import OPERATORS

pytestmark = pytest.mark.cpu
DOCS = Path(__file__).parents[2] / "docs"
README = DOCS.parent / "README.md"
KEEP = gallery.report.RESULTS / "amd-epyc-2-cores-x86-64-v3" / "keep.md"
EPYC = gallery.report.RESULTS / "amd-epyc-2-cores-x86-64-v4"

MOST_WORDS, LONGEST_PAGE, LINES_OF_README = 15_500, 1_400, 92


def test_the_pages_are_short() -> None:
    """A page that grows first loses what another page says, or what only its authors need."""
    files = (*gallery.PAGES, DOCS.parent / "CONTRIBUTING.md")
    words = {page.name: len(page.read_text("utf-8").split()) for page in files}
    shorten = f"shorten a page: {words}"
    assert max(words.values()) <= LONGEST_PAGE, shorten
    assert sum(words.values()) <= MOST_WORDS, shorten
    assert len(README.read_text("utf-8").splitlines()) <= LINES_OF_README


def test_written_parts_are_current() -> None:
    assert not gallery.outdated(), "run python docs/gallery.py"


def test_numbers_in_sentences_are_measured() -> None:
    steps = gallery._newest_steps()
    ratios = {name: [float(rows["torch, keep"][x]) for x in RATIO] for name, rows in steps.items()}
    keep = gallery._range([gallery._certain(*ratio) for ratio in ratios.values()])
    recommender = next(rows for name, rows in steps.items() if name.startswith("recommender"))
    fast, before, peak = (
        float(recommender["convert"][name]) for name in ("ratio, median", "torch, peak", "peak")
    )
    assert peak / before == pytest.approx(1 / 3, rel=0.1)
    _, _, eager, compiled = zip(*gallery._markdown_rows(EPYC / "formulas.md"), strict=True)
    peaks = max(tuned for *_, tuned in gallery._keep_ratios(KEEP))
    for page, words in (
        (README, f"{keep} times as fast, with up to {peaks:.1f} times the [peak]"),
        (DOCS / "memory.md", f"{keep} times as fast"),
        (README, f"{fast:.1f} times as fast in a third of the memory"),
        (DOCS / "formulas.md", f"{gallery._range(list(map(float, eager)))} times as fast"),
        (DOCS / "formulas.md", f"{gallery._range(list(map(float, compiled)))} times as compiled"),
    ):
        assert words in " ".join(page.read_text("utf-8").split())


def test_pages_show_every_table_that_is_written() -> None:
    text = "".join(page.read_text("utf-8") for page in gallery.PAGES)
    assert sorted(name for _, name in gallery.PART.findall(text)) == sorted(gallery.WRITTEN)


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
    assert gallery._rounded(*quartiles) == shown


def test_the_table_of_losses_has_a_column_for_each_processor() -> None:
    names = {table[0]["machine"].partition(",")[0] for table in gallery._of_cpus("results")}
    head, *_ = gallery.headline().splitlines()
    assert len(names) > 1
    assert names == set(head.strip("| ").split(" | ")[1:])


@pytest.mark.parametrize("name", gallery.DRAWN)
def test_committed_charts_are_current(name: str) -> None:
    text = (gallery.CHARTS / f"{name}.svg").read_text("utf-8")
    pinned = (
        f"matplotlib=={matplotlib.__version__} " in (README.parent / "constraints.txt").read_text()
    )
    if (
        name in ("formulas", "tutorial") or not pinned
    ):  # curves and coordinates may differ in the last digits
        drawn = gallery.rendered(gallery.DRAWN[name](), name)
        titles = re.findall(r"<text[^>]*>([^<]+)</text>", drawn)
        assert all(title in text for title in titles)
    else:
        assert gallery.rendered(gallery.DRAWN[name](), name) == text, "run python docs/gallery.py"


@pytest.mark.parametrize("op", gains.OPERATORS)
def test_the_chart_of_gains_has_the_current_sizes(op: str) -> None:
    rows = [row for row in gallery._of_cpus("gain")[-1] if row["op"] == op]
    assert {int(row["limit"]) for row in rows} == {gains.limit(op)}, "run python docs/gain.py"


@pytest.mark.thresholds
@pytest.mark.parametrize("name", OPERATORS)
def test_an_example_runs_and_calls_the_operator(name: str) -> None:
    assert re.search(rf"\bF\.{name}\(", EXAMPLES[name])
    exec(compile(pages.example(name), name, "exec"), {})


@pytest.mark.thresholds
@pytest.mark.parametrize("name", gallery.NOTEBOOKS)
def test_a_notebook_is_current_and_runs(name: str) -> None:
    text = (README.parent / f"examples/{name}.ipynb").read_text("utf-8")
    assert text == gallery.notebook(name), "run python docs/gallery.py"
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
