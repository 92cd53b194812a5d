"""Writes docs/operators/, a page for each operator, and docs/groups/, a page for each group.

docs/entries.py has the formula, the sentence, the picture's curves and the example.
"""

from __future__ import annotations

import inspect
import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import gallery
import report
import torch
from entries import ENTRIES, EXAMPLES

import pyfused.functional
from pyfused.dispatch.sizes import LINEAR
from pyfused.ops.operators import OPERATORS

IMPORTS = "import torch\nimport pyfused.functional as F\n"
SHARED = (
    "Dtypes, activations, reductions, errors and fallback are described for"
    " [all functions](../reference.md#functions-and-modules)."
)


METHOD = "The [README of the benchmarks](../../benchmarks/README.md) describes the method."


def example(name: str) -> str:
    """Returns a program that calls the operator and prints its loss, if it has one."""
    code = EXAMPLES[name].strip()
    if not re.search(r"^loss = ", code, re.MULTILINE):
        return f"{IMPORTS}\n{code}\n"
    return f"{IMPORTS}\ntorch.manual_seed(0)\n{code}\nprint(loss)\n"


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
    tables = []
    for path in sorted(report.RESULTS.glob("*/results.csv")):
        found = report.read_csv(path)
        rows = [report.row_of(cells) for cells in found if cells["op"] == name]
        if rows:
            tables.append(f"{found[0]['machine']}:\n\n{report.markdown(rows)}")
    if not tables:
        if name in (*LINEAR, "cross_entropy", "log_probs", "kl_div_with_logits"):
            return (
                "[Language models](../language-models.md) compares time and peak memory of heads"
                " with torch's and with bare matrix products."
            )
        return (
            "This operator is newer than the latest report."
            f' `make bench BENCH_ARGS="quick -k {name}"` measures it on your machine. {METHOD}'
        )
    method = (
        "Times are medians; brackets contain the quartiles of the ratio. A ratio above 1 means that"
        f" pyfused is faster. {METHOD}"
    )
    return f"{method}\n\n{folded('Times on each machine', *tables)}"


def folded(title: str, *parts: str) -> str:
    """Returns Markdown that a reader opens by a click, because it is long on a phone."""
    return "\n\n".join([f"<details>\n<summary>{title}</summary>", *parts, "</details>"])


def page(name: str) -> str:
    entry, module = ENTRIES[name], OPERATORS[name].module
    functions = [n for n in (name, f"{name}_with_metrics") if n in pyfused.functional.__all__]
    documented = [f".. autofunction:: pyfused.functional.{n}" for n in functions]
    documented.append(f".. autoclass:: pyfused.nn.{module}")
    sizes = gallery.sizes(name)
    return "\n".join(
        (
            f"# {name}\n",
            f"{entry.use}\n",
            entry.formula and f"```{{math}}\n{entry.formula}\n```\n",
            f'<div class="picture">\n{gallery.picture(name, entry)}\n</div>\n',
            f"{in_torch(name)}\n",
            f"## Example\n\n```python\n{example(name)}```\n",
            f"[Download this example]({name}.py)\n",
            output(example(name)),
            "## Reference\n\n```{eval-rst}\n" + "\n\n".join(documented) + "\n```\n",
            f"{SHARED}\n",
            f"## Measurements\n\n{measured(name)}\n",
            f"The smallest inputs that run a kernel on CPUs, in float32 elements:\n\n{sizes}\n",
        )
    )


def write(app: Any) -> None:
    """Writes the pages before Sphinx looks for them, and deletes pages of removed operators."""
    groups = {gallery.slug(group): gallery.group_page(group) for group in gallery.shown()}
    for name, texts in (("operators", {op: page(op) for op in OPERATORS}), ("groups", groups)):
        folder = Path(app.srcdir, name)
        folder.mkdir(exist_ok=True)
        for file in folder.glob("*.*"):
            if file.stem not in texts:
                file.unlink()
        for stem, text in texts.items():
            (folder / f"{stem}.md").write_text(text, encoding="utf-8")
            if stem in OPERATORS:
                (folder / f"{stem}.py").write_text(example(stem), encoding="utf-8")


# ---- docstrings ----------------------------------------------------------------------------------

ARGUMENT = re.compile(r"    (\w+(?:, \w+)*): (.*)")


def arguments(
    _app: Any, _what: str, _name: str, documented: Any, _options: Any, lines: list[str]
) -> None:
    """Turns the section "Args:" into a table with the defaults, before Napoleon makes it a list."""
    if "Args:" not in lines:
        return
    start = lines.index("Args:")
    rest = range(start + 1, len(lines))
    end = next((n for n in rest if lines[n] and not lines[n].startswith(" ")), len(lines))
    parameters = inspect.signature(documented).parameters
    table = [".. list-table::", "   :header-rows: 1", "   :widths: 22 13 65", ""]
    table += ["   * - argument", "     - default", "     - meaning"]
    for line in lines[start + 1 : end]:
        if match := ARGUMENT.fullmatch(line):
            names = match[1].split(", ")
            table.append(f"   * - {', '.join(f'``{name}``' for name in names)}")
            table.append(f"     - {_default(parameters, names)}")
            table.append(f"     - {match[2]}")
        else:  # continues the previous row; the docstring indents it by 8
            table.append(line and f"       {line[8:]}")
    lines[start:end] = [*table, ""]


def _default(parameters: Any, names: list[str]) -> str:
    defaults = {parameters[name].default for name in names if name in parameters}
    if len(defaults) != 1 or inspect.Parameter.empty in defaults:
        return ""
    return f"``{defaults.pop()!r}``"


def returns(_app: Any, _what: str, _name: str, _object: Any, _: Any, lines: list[str]) -> None:
    """Keeps Napoleon from taking words before a colon, below "Returns:", for a type."""
    for index, line in enumerate(lines[:-1]):
        if line.strip() == "Returns:":
            text = lines[index + 1].lstrip()
            lines[index + 1] = lines[index + 1].removesuffix(text) + f": {text}"
