"""The documents' written parts are current, and their code, links and file names are correct."""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor

sys.path.append(str(Path(__file__).parents[2] / "docs"))

import charts
import pages
import tables
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
MOST_WORDS = 22_000
FOLDERS = "csrc", "kernels", "tests", "benchmarks", "tools"
TEXTS = {
    path.relative_to(ROOT).as_posix(): path.read_text("utf-8")
    for path in (*pages.PAGES, *[ROOT / f"{folder}/README.md" for folder in FOLDERS],
                 ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md")
}  # fmt: skip
every_page = pytest.mark.parametrize("page", TEXTS)
CONTRIBUTING = TEXTS["CONTRIBUTING.md"]


def test_the_pages_are_short() -> None:
    words = sum(len(text.split()) for name, text in TEXTS.items() if name != "CHANGELOG.md")
    assert words <= MOST_WORDS, "remove what another page says, or what its readers do not need"


# ---- code, links and names of files --------------------------------------------------------------


def blocks(language: str, text: str) -> list[tuple[str, str]]:
    """Returns the indent and the code of each block of code."""
    return re.findall(rf"(?ms)^( *)```{language}\n(.*?)^ *```", text)


BLOCKS = {
    f"{page}-{number}": code
    for page, text in TEXTS.items()
    if page != "docs/tutorial.md"  # its blocks need each other, and are those of a notebook
    for number, (_, code) in enumerate(blocks("python", text))
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


@every_page
def test_links_and_named_files_exist(page: str) -> None:
    folders = "csrc|kernels|pyfused|tests|benchmarks|tools|examples|docs"
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", TEXTS[page])
    paths = [(ROOT / page).parent / link for link in links]
    paths += [ROOT / n for n in re.findall(rf"`((?:{folders})/[\w/.-]+\.\w+)`", TEXTS[page])]
    assert [path for path in paths if not path.exists()] == []


@pytest.mark.parametrize(("indent", "code"), blocks("py", CONTRIBUTING))
def test_excerpts_are_parts_of_the_sources(indent: str, code: str) -> None:
    files = (*ROOT.glob("pyfused/**/*.py"), *ROOT.glob("tests/*.py"))
    code = re.sub(f"^{indent}", "", code, flags=re.MULTILINE)
    assert any(code in file.read_text("utf-8") for file in files)


def test_the_files_of_an_option_of_cross_entropy_are_named() -> None:
    section = TEXTS["csrc/README.md"].partition("## Adding an option to a loss over classes")[2]
    named = set(re.findall(r"`([\w/]+\.\w+)`", section.partition("\n## ")[0]))
    patterns = "pyfused/**/*.py", "kernels/*.py", "csrc/*.[hc]*"
    files = [path for pattern in patterns for path in ROOT.glob(pattern)]
    advice = r"z_loss(?!=\.)"
    using = {path for path in files if re.search(advice, path.read_text("utf-8"))}
    assert {path.relative_to(ROOT).as_posix() for path in using} <= named


def test_files_of_the_layout_exist() -> None:
    _, layout, *_ = re.split(r"```(?:text)?\n", CONTRIBUTING, maxsplit=2)
    folders = re.findall(r"^(\w+)/", layout, re.MULTILINE)
    existing = {path.name for folder in folders for path in (ROOT / folder).rglob("*.*")}
    assert {*re.findall(r"\w+\.(?:py|md)\b", layout)} <= existing


# ---- written parts -------------------------------------------------------------------------------


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
    assert tables.rounded(tables.certain(*quartiles)) == shown


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
    for cell in json.loads(text)["cells"]:
        for link in re.findall(r"\]\(([^)#:]+)", "".join(cell["source"])):
            assert (ROOT / "examples" / link).exists(), link


# ---- behaviour that docs/compatibility.md and docs/losses.md describe ---------------------------

INF, NAN = math.inf, math.nan


def gradient_of(function: Callable[..., Tensor], x: Tensor, *others: Any, **options: Any) -> Tensor:
    leaf = x.clone().requires_grad_()
    function(leaf, *others, **options).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def test_gelu_of_infinities() -> None:
    x = torch.full((1 << 24,), INF, requires_grad=True)
    assert F.gelu(x).isposinf().all()
    for y in (F.gelu(-x), TF.gelu(-x), torch.autograd.grad(F.gelu(-x).sum(), x)[0]):
        assert y.isnan().all()
    assert torch.equal(F.gelu(x[:-1]).isnan(), TF.gelu(x[:-1]).isnan())
    if cpu.capability == "x86-64-v4":
        assert TF.gelu(x).isnan().all()


@pytest.mark.parametrize("name", ["elu", "selu", "celu"])
@pytest.mark.parametrize("position", [0, 5, -1])
def test_positions_of_nan(name: str, position: int) -> None:
    x, nan = torch.randn(1 << 17), torch.full((1 << 17,), NAN)
    x[position] = NAN
    found, everywhere = (gradient_of(getattr(F, name), each) for each in (x, nan))
    assert torch.equal(found[position].isnan(), everywhere[0].isnan())
    assert everywhere.isnan().all() or torch.equal(everywhere, found[position].expand_as(x))


def test_infinite_gradients_from_above() -> None:
    x, y = torch.zeros(1 << 17), torch.ones(1 << 17)
    scaled = lambda f: lambda *a: f(*a) * INF  # noqa: E731
    ours, theirs = (gradient_of(scaled(f.margin_ranking_loss), y, x, y) for f in (F, TF))
    assert ours.isnan().all()
    assert not theirs.any()


@pytest.mark.skipif(not cpu.RECYCLES, reason="memory is recycled on Linux only")
def test_the_storage_of_a_large_gradient() -> None:
    with pytest.raises(RuntimeError, match="resize"):
        gradient_of(F.relu, torch.randn(1 << 24)).untyped_storage().resize_(0)


def test_gradients_of_celu_in_float64() -> None:
    x = torch.linspace(-3, 1, 1 << 20, dtype=torch.float64)
    exact = (x / 0.1).exp().clamp(max=1)
    ours, theirs = (gradient_of(f.celu, x, alpha=0.1) for f in (F, TF))
    assert ((ours - exact) / exact).abs().max() < 1e-14
    assert 1e-7 < ((theirs - exact) / exact).abs().max() < 2e-6


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
    x = torch.full((256, classes), NAN)
    x[1:] = 0.0
    target = torch.ones(256, dtype=torch.int64)
    target[0] = -100
    assert (not gradient_of(F.cross_entropy, x, target)[0].any()) == (classes == 1000)
