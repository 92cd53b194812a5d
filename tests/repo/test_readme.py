"""Python blocks, links, file names and commands in the documents are correct."""

from __future__ import annotations

import logging
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyfused import memory

FLAGS = re.MULTILINE | re.DOTALL
ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
PAGES += [f"{n}/README.md" for n in ("csrc", "kernels", "tests", "benchmarks", "tools")]
PAGES += [str(page.relative_to(ROOT)) for page in sorted(ROOT.glob("docs/*.md"))]
BLOCKS = [
    pytest.param(code, id=f"{page}-{number}")
    for page in PAGES
    if page != "docs/tutorial.md"  # its blocks need each other: test_docs.py runs them in one go
    for number, code in enumerate(
        re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text("utf-8"), FLAGS)
    )
]


@pytest.fixture(autouse=True)
def quiet_afterwards() -> Iterator[None]:
    yield
    logging.getLogger("pyfused").setLevel(logging.NOTSET)
    memory.keep(False)


@pytest.mark.thresholds
@pytest.mark.parametrize("code", BLOCKS)
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


COMMANDS = sorted(
    {
        line.partition("#")[0].strip()
        for page in PAGES
        for block in re.findall(r"^```sh\n(.*?)^```", (ROOT / page).read_text("utf-8"), FLAGS)
        for line in block.splitlines()
        if re.match(r"([A-Z_]+=\S+ )*make ", line)
    }
)


@pytest.mark.parametrize("command", COMMANDS)
def test_make_has_the_target(command: str) -> None:
    """CI runs the targets themselves."""
    dry = command.replace("make ", "make --dry-run ")
    subprocess.run(dry, shell=True, check=True, cwd=ROOT, capture_output=True)


@pytest.mark.parametrize("page", PAGES)
def test_links_have_targets(page: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text("utf-8"))
    assert all((ROOT / page).parent.joinpath(link).exists() for link in links)


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page: str) -> None:
    folders = "csrc|kernels|pyfused|tests|benchmarks|tools|examples|docs"
    text = (ROOT / page).read_text("utf-8")
    names = re.findall(rf"`((?:{folders})/[\w/.-]+\.\w+)`", text)
    assert all((ROOT / name).exists() for name in names)


CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
EXCERPTS = re.findall(r"^( *)```py\n(.*?)^ *```", CONTRIBUTING, FLAGS)


@pytest.mark.parametrize(("indent", "code"), EXCERPTS, ids=range(len(EXCERPTS)))
def test_excerpts_are_parts_of_the_sources(indent: str, code: str) -> None:
    files = (*ROOT.glob("pyfused/**/*.py"), *ROOT.glob("tests/*.py"))
    code = re.sub(f"^{indent}", "", code, flags=re.MULTILINE)
    assert any(code in file.read_text("utf-8") for file in files)


def test_the_files_of_an_option_of_cross_entropy_are_named() -> None:
    page = (ROOT / "csrc/README.md").read_text("utf-8")
    section = page.partition("## Adding an option to a loss over classes")[2]
    named = set(re.findall(r"`([\w/]+\.\w+)`", section.partition("\n## ")[0]))
    patterns = "pyfused/**/*.py", "kernels/*.py", "csrc/*.[hc]*"
    files = (path for pattern in patterns for path in ROOT.glob(pattern))
    texts = {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in files}
    using = {name for name, text in texts.items() if re.search(r"z_loss(?!=\.)", text)}  # no advice
    assert using <= named


def test_files_of_the_layout_exist() -> None:
    layout = CONTRIBUTING.partition("```text")[2].partition("```")[0]
    folders = [ROOT / name for name in re.findall(r"^(\w+)/", layout, re.MULTILINE)]
    existing = {path.name for folder in folders for path in folder.rglob("*.*")}
    assert {*re.findall(r"\w+\.(?:py|md)\b", layout)} <= existing
