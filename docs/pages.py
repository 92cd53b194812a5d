"""Writes docs/operators/: a page for each operator, from its declaration and its docstring.

docs/entries.py has the formula, the sentence, the picture's curves and the example.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import gallery
import report
import torch
from entries import ENTRIES, EXAMPLES

import pyfused.functional
from pyfused.dispatch.sizes import LINEAR, OF_LOGITS
from pyfused.ops.operators import OPERATORS

IMPORTS = "import torch\nimport pyfused.functional as F\n"
SHARED = (
    "Dtypes, reductions, in-place operation, errors and fall-back are those of"
    " [all functions](../reference.md#functions-and-modules)."
)


def example(name: str) -> str:
    """A program that calls the operator."""
    return f"{IMPORTS}\n{EXAMPLES[name].strip()}\n"


def in_torch(name: str) -> str:
    module = OPERATORS[name].module
    if not hasattr(torch.nn.functional, name):
        return "torch has no operator of this name."
    function = f"{{py:func}}`torch.nn.functional.{name}`"
    return f"In torch: {function}, {{py:class}}`torch.nn.{module}`."


def measured(name: str) -> str:
    """What each machine's report has of an operator, below the machine's name."""
    tables = []
    for path in sorted(report.RESULTS.glob("*/results.json")):
        found = report.load([path])
        rows = [row for row in report.rows_of(found) if row.op == name]
        if rows:
            tables.append(f"{report.machine(found)}:\n\n{report.markdown(rows)}")
    if not tables:
        if name in LINEAR + OF_LOGITS:
            return (
                "[Language models](../language-models.md) has times and peak memory of the heads of"
                " language models, beside torch's and those of three matrix products."
            )
        return (
            "No machine's report has this operator, which is newer than they are."
            f' `make bench-quick BENCH_ARGS="-k {name}"` measures it on yours, and'
            " [benchmarks](../benchmarks.md) describes the method."
        )
    method = (
        "Medians, and in brackets the quartiles of the ratio. A ratio above 1 says that pyfused is"
        " faster. [Benchmarks](../benchmarks.md) describes the method."
    )
    return "\n\n".join([*tables, method])


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
            "## Reference\n\n```{eval-rst}\n" + "\n\n".join(documented) + "\n```\n",
            f"{SHARED}\n",
            f"## Measured\n\n{measured(name)}\n",
            f"These are the smallest inputs that take a kernel on CPUs, in elements:\n\n{sizes}\n",
        )
    )


def write(app: Any) -> None:
    """Before Sphinx looks for pages."""
    folder = Path(app.srcdir, "operators")
    folder.mkdir(exist_ok=True)
    for stale in {file.stem for file in folder.glob("*.md")} - {*OPERATORS}:
        (folder / f"{stale}.md").unlink()
    for name in OPERATORS:
        (folder / f"{name}.md").write_text(page(name), encoding="utf-8")


# ---- docstrings ----------------------------------------------------------------------------------

ARGUMENT = re.compile(r"    (\w+(?:, \w+)*): (.*)")


def arguments(
    _app: Any, _what: str, _name: str, documented: Any, _options: Any, lines: list[str]
) -> None:
    """Turn the section "Args:" into a table with the defaults, before Napoleon makes it a list."""
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
        else:  # of the row before, 8 deep in the docstring
            table.append(line and f"       {line[8:]}")
    lines[start:end] = [*table, ""]


def _default(parameters: Any, names: list[str]) -> str:
    defaults = {parameters[name].default for name in names if name in parameters}
    if len(defaults) != 1 or inspect.Parameter.empty in defaults:
        return ""
    return f"``{defaults.pop()!r}``"


def returns(_app: Any, _what: str, _name: str, _object: Any, _: Any, lines: list[str]) -> None:
    """Else Napoleon takes what stands before a colon, in the line after "Returns:", for a type."""
    for index, line in enumerate(lines[:-1]):
        if line.strip() == "Returns:":
            text = lines[index + 1].lstrip()
            lines[index + 1] = lines[index + 1].removesuffix(text) + f": {text}"
