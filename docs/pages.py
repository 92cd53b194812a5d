"""Writes parts of the pages: `python docs/pages.py` writes tables and charts into docs/*.md and
README.md, and conf.py writes pages of operators and groups for Sphinx.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import charts
import report
import tables
import torch
from charts import CELL, DOCS
from entries import ENTRIES, EXAMPLES

import pyfused.functional
from pyfused.ops.operators import OPERATORS

README = DOCS.parent / "README.md"
PAGES = (README, *sorted(DOCS.glob("*.md")))
HOMEPAGE = re.findall('Homepage = "(.*)"', (DOCS.parent / "pyproject.toml").read_text("utf-8"))[0]
PART = re.compile(r"(?s)(<!-- written: (\w+) -->\n).*?(?=<!-- end -->)")
PICTURE = re.compile(
    r'(?s)<picture>\s*<source[^>]*srcset="(.*?)">\s*<img alt="(.*?)" src="(.*?)">\s*</picture>'
)

# ---- pages of operators and groups ---------------------------------------------------------------

IMPORTS = "import torch\nimport pyfused.functional as F\n"
SHARED = (
    "Dtypes, activations, reductions, errors and fallback are described for"
    " [all functions](../reference.md#functions-and-modules)."
)


def example(name: str) -> str:
    """Returns a program that calls the operator and prints its loss, if it has one."""
    code = EXAMPLES[name].strip()
    if re.search(r"^loss = ", code, re.MULTILINE):
        code = f"torch.manual_seed(0)\n{code}\nloss.backward()\nprint(loss)"
    elif re.search(r"^y = ", code, re.MULTILINE):
        code += "\ny.sum().backward()"
    return f"{IMPORTS}\n{code}\n"


def output(program: str) -> str:
    """Returns the output of a program as a block of the page."""
    with redirect_stdout(StringIO()) as printed:
        exec(compile(program, "example", "exec"), {})
    return f"```text\n{printed.getvalue()}```\n" if printed.getvalue() else ""


def in_torch(name: str) -> str:
    module = OPERATORS[name].module
    if not hasattr(torch.nn.functional, name):
        return "torch has no operator of this name."
    function = f"{{py:func}}`torch.nn.functional.{name}`"
    return f"In torch: {function}, {{py:class}}`torch.nn.{module}`."


def measured(name: str) -> str:
    """Returns the measurements of an operator on each machine."""
    parts = []
    for path in sorted(report.RESULTS.glob("*/results.csv")):
        found = report.read_csv(path)
        rows = [report.row_of(cells) for cells in found if cells["op"] == name]
        if rows:
            parts.append(f"{found[0]['machine']}:\n\n{report.markdown(rows)}")
    if not parts:
        if name.startswith("linear_") or name in ("log_probs", "kl_div_with_logits"):
            return (
                "[Language models](../language-models.md) compares time and peak memory of heads"
                " with torch's and with bare matrix products."
            )
        return "This operator was not measured."
    method = (
        "Times are medians; brackets contain the quartiles of the ratio. A ratio above 1 means that"
        " pyfused is faster. The [README of the benchmarks](../../benchmarks/README.md) describes"
        " the method."
    )
    summary = "<details>\n<summary>Times on each machine</summary>"  # long on a phone
    return "\n\n".join([method, summary, *parts, "</details>"])


def page(name: str) -> str:
    entry, module = ENTRIES[name], OPERATORS[name].module
    picture = charts.picture(name, entry)
    functions = [n for n in (name, f"{name}_with_metrics") if n in pyfused.functional.__all__]
    documented = [f".. autofunction:: pyfused.functional.{n}" for n in functions]
    documented.append(f".. autoclass:: pyfused.nn.{module}")
    return "\n".join(
        (
            f"# {name}\n",
            f"{entry.use}\n",
            entry.formula and f"```{{math}}\n{entry.formula}\n```\n",
            picture and f'<div class="picture">\n{picture}\n</div>\n',
            f"{in_torch(name)}\n",
            f"## Example\n\n```python\n{example(name)}```\n",
            f"[Download this example]({name}.py)\n",
            output(example(name)),
            "## Reference\n\n```{eval-rst}\n" + "\n\n".join(documented) + "\n```\n",
            f"{SHARED}\n",
            f"## Measurements\n\n{measured(name)}\n",
            "The smallest inputs that run a kernel on CPUs, in float32 elements:\n",
            f"{tables.sizes(name)}\n",
        )
    )


LEGEND = (
    "In the formulas, x is the input and t the target. The pictures show the output of the kernels."
)


def group_page(group: str) -> str:
    """Returns the page of a group, below which the sidebar lists the pages of its operators."""
    parts = [f"# {group}\n\n{LEGEND}\n"]
    for name in tables.groups()[group]:
        entry = ENTRIES[name]
        parts += [
            f'## {name}\n\n<div class="entry"><div>\n',
            entry.formula and f"```{{math}}\n{entry.formula}\n```\n",
            f"{entry.use}\n",
            f"[`F.{name}`, `nn.{OPERATORS[name].module}`](../operators/{name}.md)\n",
            f"</div>\n{charts.picture(name, entry)}\n</div>\n",
        ]
    return "\n".join([*parts, _toctree(f"../operators/{name}" for name in tables.groups()[group])])


def slug(group: str) -> str:
    return group.lower().replace(" ", "-")


def write() -> None:
    """Writes pages and the inventory before Sphinx reads them; deletes pages of lost operators."""
    groups = {slug(group): group_page(group) for group in tables.groups()}
    for name, texts in (("operators", {op: page(op) for op in OPERATORS}), ("groups", groups)):
        folder = DOCS / name
        folder.mkdir(exist_ok=True)
        for file in folder.glob("*.*"):
            if file.stem not in texts:
                file.unlink()
        for stem, text in texts.items():
            (folder / f"{stem}.md").write_text(text, encoding="utf-8")
            if stem in OPERATORS:
                (folder / f"{stem}.py").write_text(example(stem), encoding="utf-8")
    (DOCS / INVENTORY).write_text(inventory(), encoding="utf-8")


# Other torch objects that pages link to: the name, its kind and its page.
LINKED = """
torch mod torch
torch.Tensor class tensors
torch.distributed mod distributed
torch.dtype class tensor_attributes
torch.maximum function generated/torch.maximum
torch.nn.Linear class generated/torch.nn.Linear
torch.nn.Module class generated/torch.nn.Module
torch.nn.functional mod nn.functional
torch.nn.modules.module.Module class generated/torch.nn.Module
"""
INVENTORY = "operators/torch.inv"


def inventory() -> str:
    """Returns the torch objects that pages link to, as Sphinx's first format, which is text."""
    rows = LINKED.split("\n")[1:-1]
    for op in OPERATORS.values():
        if op.name == "linear_cross_entropy" or hasattr(torch.nn.functional, op.name):
            for kind, name in ("function", f"functional.{op.name}"), ("class", op.module):
                rows.append(f"torch.nn.{name} {kind} generated/torch.nn.{name}")
    header = ["# Sphinx inventory version 1", "# Project: PyTorch", "# Version: stable"]
    return "\n".join([*header, *(f"{row}.html" for row in sorted(rows)), ""])


# ---- pages as Sphinx reads them ------------------------------------------------------------------


def fill(_app: object, page: str, source: list[str]) -> None:
    """Prepares a page for the site as Sphinx reads it.

    README.md is the first page, whose sidebar has the pages that index.md lists. Pictures become
    images of the theme, and links to files outside of docs/ lead to the repository.
    """
    text = source[0]
    if page == "index":
        readme = re.sub(
            r"\]\((CONTRIBUTING|CHANGELOG)\.md", r"](../\1.md", README.read_text("utf-8")
        )
        readme = re.sub(r'(\]\(|srcset="|src=")docs/', r"\1", readme)
        parts = re.findall(r"(?ms)^## (.*?)\n(.*?)(?=^## |\Z)", text)
        trees = (_toctree(re.findall(r"\]\((.*?)\.md\)", part), title) for title, part in parts)
        text = "\n".join(["---\nhide-toc: true\n---", readme, *trees])
    if page == "losses":
        for group, names in tables.groups().items():
            text = text.replace(f"| {group} |", f"| [{group}](groups/{slug(group)}.md) |")
            for name in names:
                text = text.replace(f"| `{name}`", f"| [`{name}`](operators/{name}.md)", 1)
                text = text.replace(f", `{name}`", f", [`{name}`](operators/{name}.md)", 1)
        text += f"\n{_toctree(f'groups/{slug(group)}' for group in tables.groups())}"
    text = PICTURE.sub(r"![\2](\3){.only-light}\n![\2](\1){.only-dark}", text)
    up = re.escape("../" * (1 + page.count("/")))
    outside = rf"\]\({up}([\w/.-]+\.(?:md|py|cpp|h|csv))\b"
    source[0] = re.sub(outside, rf"]({HOMEPAGE}/blob/main/\1", text)


def _toctree(pages: Iterable[str], caption: str = "") -> str:
    title = f":caption: {caption}\n" * bool(caption)
    return "```{toctree}\n:hidden:\n" + title + "\n" + "\n".join(pages) + "\n```\n"


# ---- docstrings ----------------------------------------------------------------------------------


def returns(_app: Any, _what: str, _name: str, _object: Any, _: Any, lines: list[str]) -> None:
    """Keeps Napoleon from taking words before a colon, below "Returns:", for a type."""
    for index, line in enumerate(lines[:-1]):
        if line.strip() == "Returns:":
            text = lines[index + 1].lstrip()
            lines[index + 1] = lines[index + 1].removesuffix(text) + f": {text}"


# ---- parts that are committed --------------------------------------------------------------------

NOTEBOOKS = ("tutorial", "pretraining", "distillation")


def notebook(page: str) -> str:
    """Returns a page as a Jupyter notebook: its blocks of Python are the cells of code."""
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    text = re.sub(r"\n.*\]\(\.\./examples/\w+\.ipynb\).*\n", "", text)  # the link to the notebook
    text = PICTURE.sub("", re.sub(r"\]\((?=[\w-]+\.md)", "](../docs/", text))
    cells: list[dict[str, Any]] = []
    for index, part in enumerate(CELL.split(text)):
        lines = (part or "").strip().splitlines(keepends=True)
        if not lines:
            continue
        cell = {"cell_type": "markdown", "id": f"{page}-{index}", "metadata": {}, "source": lines}
        if index % 3 == 1:
            cell |= {"cell_type": "code", "execution_count": None, "outputs": []}
        if index % 3 == 2:
            cells[-1]["outputs"] = [{"name": "stdout", "output_type": "stream", "text": lines}]
        else:
            cells.append(dict(sorted(cell.items())))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    found = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(found, indent=1) + "\n"


def files() -> dict[Path, str]:
    """Returns the text of each committed file that is written, with its parts up to date."""

    def current(match: re.Match[str]) -> str:
        return f"{match[1]}\n{tables.WRITTEN[match[2]]()}\n\n"

    return {page: PART.sub(current, page.read_text("utf-8")) for page in PAGES}


def outdated() -> list[str]:
    """Returns the names of files whose written parts are not up to date."""
    return [file.name for file, text in files().items() if file.read_text("utf-8") != text]


def main() -> None:
    for file, text in files().items():
        file.write_text(text, encoding="utf-8")
    for name in NOTEBOOKS:
        file = DOCS.parent / "examples" / f"{name}.ipynb"
        file.write_text(notebook(name), encoding="utf-8")
    charts.write()


if __name__ == "__main__":
    main()
