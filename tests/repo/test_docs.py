"""The documents' written parts are current, and their code, links and file names are correct."""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
import torch.nn.functional as TF

sys.path.append(str(Path(__file__).parents[2] / "docs"))

import charts
import pages
from entries import EXAMPLES

import pyfused
from pyfused import functional as F
from pyfused import memory
from pyfused.adopt.lazy_logits import LazyLogits
from pyfused.backends import cpu
from pyfused.dispatch.sizes import COMPILED, converted_limit
from pyfused.ops.operators import LINEAR_CROSS_ENTROPY, OPERATORS

pytestmark = [pytest.mark.cpu, pytest.mark.thresholds]
ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FOLDERS = "csrc", "kernels", "tests", "benchmarks", "tools"
TEXTS = {
    path.relative_to(ROOT).as_posix(): path.read_text("utf-8")
    for path in (*pages.PAGES, *[ROOT / f"{folder}/README.md" for folder in FOLDERS],
                 ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md")
}  # fmt: skip


# ---- code, links and names of files --------------------------------------------------------------


BLOCKS = {
    f"{page}-{number}": code
    for page, text in TEXTS.items()
    if page != "docs/tutorial.md"  # its blocks need each other, and are those of a notebook
    for number, code in enumerate(re.findall(r"(?ms)^ *```python\n(.*?)^ *```", text))
}


@pytest.fixture
def quiet_afterwards() -> Iterator[None]:
    yield
    logging.getLogger("pyfused").setLevel(logging.NOTSET)
    memory.keep(False)


@pytest.mark.usefixtures("quiet_afterwards")
@pytest.mark.parametrize("code", BLOCKS.values(), ids=BLOCKS)
def test_block_runs(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It prints the comments that follow a call of print, whatever the processor is."""
    exec(compile(code, "README.md", "exec"), {})
    comments = re.findall(r"^print\(.*\n((?:# .*\n)+)", code, re.MULTILINE)
    expected = [line.removeprefix("# ") for text in comments for line in text.splitlines()]
    printed = iter(general(capsys.readouterr().out).splitlines())
    assert all(general(line) in printed for line in expected)


def general(text: str) -> str:
    """Removes the instruction set and the number of threads, which depend on the machine."""
    return re.sub(r"cpu x86-64-v\d|cpu generic|\d+ threads?", "*", text)


@pytest.mark.parametrize("page", TEXTS)
def test_links_and_named_files_exist(page: str) -> None:
    folders = "csrc|kernels|pyfused|tests|benchmarks|tools|examples|docs"
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", TEXTS[page])
    paths = [(ROOT / page).parent / link for link in links]
    paths += [ROOT / n for n in re.findall(rf"`((?:{folders})/[\w/.-]+\.\w+)`", TEXTS[page])]
    assert [path for path in paths if not path.exists()] == []


# ---- written parts -------------------------------------------------------------------------------


def test_written_parts_are_current() -> None:
    assert not pages.outdated(), "run python docs/pages.py"


@pytest.mark.parametrize("name", charts.DRAWN)
def test_committed_charts_are_current(name: str) -> None:
    text = (DOCS / "charts" / f"{name}.svg").read_text("utf-8")
    drawn = charts.rendered(charts.DRAWN[name](), name)
    version = f"matplotlib=={matplotlib.__version__} "
    if name in ("formulas", "tutorial") or version not in (ROOT / "constraints.txt").read_text():
        # Curves and coordinates may differ in the last digits.
        assert all(title in text for title in re.findall(r"<text[^>]*>([^<]+)</text>", drawn))
    else:
        assert drawn == text, "run python docs/pages.py"


@pytest.mark.parametrize("name", OPERATORS)
def test_an_example_runs_and_calls_the_operator(name: str) -> None:
    assert re.search(rf"\bF\.{name}\(", EXAMPLES[name])
    exec(compile(pages.example(name), name, "exec"), {})


@pytest.mark.parametrize("name", pages.NOTEBOOKS)
def test_a_notebook_is_current_and_runs(name: str) -> None:
    text = (ROOT / f"examples/{name}.ipynb").read_text("utf-8")
    assert text == pages.notebook(name), "run python docs/pages.py"
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert cells
    names: dict[str, Any] = {}
    for cell in cells:
        with redirect_stdout(StringIO()) as printed:
            exec(compile("".join(cell["source"]), name, "exec"), names)
        for output in cell["outputs"]:
            assert printed.getvalue().split() == "".join(output["text"]).split()


# ---- behaviour that docs/compatibility.md and docs/losses.md describe ---------------------------


def test_operators_without_kernels() -> None:
    """The page names every loss and activation of torch that no kernel computes."""
    page = TEXTS["docs/losses.md"]
    names = set(re.findall(r"`(\w+)`", page[page.index("## Operators without kernels") :]))
    modules = {op.module for op in OPERATORS.values()}
    torchs = (torch.nn.modules.activation, torch.nn.modules.loss)
    missing = {name for module in torchs for name in module.__all__ if name not in modules}
    of_functions = {x.replace("_", ""): x for x in dir(TF) if not x.endswith("_")}
    functions = {of_functions[name.lower()] for name in missing if name.lower() in of_functions}
    assert len(functions) > 10
    assert functions | {"gumbel_softmax"} <= names
    assert all(getattr(F, name) is getattr(TF, name) for name in functions)


def test_sizes_that_change_a_call() -> None:
    """The numbers of the page, and of docs/compile.md."""
    page, compiled = TEXTS["docs/compatibility.md"], TEXTS["docs/compile.md"]
    logits = converted_limit(LINEAR_CROSS_ENTROPY, torch.empty(0))
    assert f"{logits:,} logits" in page
    model = pyfused.convert(torch.nn.Sequential(torch.nn.Linear(4, 128)), head="0")
    for tokens in (logits // 128 - 1, logits // 128):
        lazy = isinstance(model(torch.ones(tokens, 4)), LazyLogits)
        assert lazy == (tokens * 128 >= logits)
    assert "32 MiB of gradient" in page
    assert cpu.RECYCLED_BYTES == 32 << 20
    for limit in COMPILED[LINEAR_CROSS_ENTROPY.name]:
        assert f"{limit:,}" in compiled


@pytest.mark.parametrize("classes", [10, 1000], ids=["by torch", "by a kernel"])
def test_an_ignored_row_of_nan(classes: int) -> None:
    x = torch.zeros(256, classes).index_fill(0, torch.tensor(0), math.nan).requires_grad_()
    target = torch.ones(256, dtype=torch.int64).index_fill(0, torch.tensor(0), -100)
    (gradient,) = torch.autograd.grad(F.cross_entropy(x, target), x)
    assert gradient[0].isnan().any() == (classes == 10)
