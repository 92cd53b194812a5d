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

from pyfused.ops.operators import OPERATORS

pytestmark = pytest.mark.cpu
DOCS = Path(__file__).parents[2] / "docs"
README = DOCS.parent / "README.md"


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


# ---- numbers and claims of pages ----------------------------------------------------------------

# Numbers outside generated parts that no table has: constants of the source, and an example.
CONSTANTS = {
    "README.md": [],
    "docs/index.md": [],
    "docs/is-it-for-you.md": ["1.8 times"],
    "docs/gpu.md": ["200 us", "3,000 GB/s", "190 us", "2,984 GB/s", "100 to 170 us"],
}


@pytest.mark.parametrize("page", CONSTANTS)
def test_measurements_are_in_generated_parts(page: str) -> None:
    text = gallery.PART.sub("", (README.parent / page).read_text("utf-8"))
    text = re.sub(r"(?ms)^```.*?^```|\n", " ", text)
    found = re.findall(r"\d[\d.,]*(?: to [\d.,]+)? (?:times|%|ms|us|[KMG]i?B(?:/s)?)(?!\w)", text)
    assert sorted(found) == sorted(CONSTANTS[page])


STEPS = gallery._steps()
H100 = next(ways for name, ways in STEPS.items() if name.endswith("H100"))
ON_CPU = {name: ways for name, ways in STEPS.items() if ways is not H100}
HEADS = gallery._gpu_heads()["cross-entropy"]


def gain(name: str, *ways: str) -> float:
    """Returns the largest speed-up of these ways, of models whose name begins so."""
    rows = [rows for key, rows in STEPS.items() if key.startswith(name)]
    return max(float(each[way]["ratio, median"]) for each in rows for way in ways if way in each)


def test_sentences_about_the_demo() -> None:
    run = [row for row in gallery._of_cpus("demo")[-1] if row["way"] == "torch"]
    loss, step = (sum(float(row[column]) for row in run) for column in ("loss_ms", "step_ms"))
    says("README.md", "There, the head and its loss take most of a step")
    assert loss > 0.5 * step


def says(page: str, sentence: str) -> None:
    text = (README.parent / page).read_text("utf-8")
    assert sentence in re.sub(r"\s+", " ", re.sub(r"\]\([^)]*\)", "]", text))


def test_sentences_about_steps() -> None:
    says("docs/memory.md", "A peak grows if freed blocks do not fit the next ones")
    peaks = [int(r["peak"]) / int(r["torch, peak"]) for w in ON_CPU.values() for r in w.values()]
    assert min(peaks) < 0.95 < 1.05 < max(peaks)

    says("docs/is-it-for-you.md", "has nothing to do with kernels also speeds up most models")
    kept = [float(w["torch, keep"]["ratio, median"]) for w in ON_CPU.values() if "torch, keep" in w]
    assert sum(gain > 1 for gain in kept) > len(kept) / 2

    ours = "linear_cross_entropy", "convert"
    says("docs/is-it-for-you.md", "most with [`linear_cross_entropy`] or `convert`")
    for model in ("GPT-2", "one layer and the head of Llama", "BERT", "recommender"):
        assert gain(model, *ours) > max(1, gain(model, "patch"))
    says("docs/is-it-for-you.md", "which matters if a step takes less than a millisecond")
    assert gain("digits", *ours) < 1
    (digits,) = (ways for name, ways in STEPS.items() if name.startswith("digits"))
    assert float(digits["convert"]["torch, ms"]) < 1


def test_sentences_about_compiled_steps_on_gpus() -> None:
    says("docs/gpu.md", "each way to use pyfused was slower than `torch.compile` alone")
    says("docs/is-it-for-you.md", "Compiled training steps are slower with pyfused than without")
    compiled = {way: float(row["ms"]) for way, row in H100.items() if "torch.compile" in way}
    assert min(compiled, key=compiled.__getitem__) == "torch.compile"

    says("docs/gpu.md", "Heads with 4096 features: compiled torch took as long")
    theirs, ours = (HEADS["(8192, 4096, 128256)"][way] for way in ("torch.compile", "pyfused"))
    assert theirs == pytest.approx(ours, rel=0.03)
    says("docs/gpu.md", "Contrastive losses of 8,192 and 32,768 embeddings took as long as torch.")
    rows = [row for row in gallery._markdown_rows("kernels") if row[0].startswith("contrastive")]
    assert [float(row[3].split()[0]) for row in rows] == pytest.approx([1, 1], rel=0.05)
