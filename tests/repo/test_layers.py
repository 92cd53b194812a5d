"""Imports follow the order of the package's layers, without cycles."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pyfused

LAYERS = (  # each layer may import from itself and from earlier layers
    ("types", "layout", "torch_internals", "glibc"),
    ("checks",),
    ("formula_compiler",),
    ("kernels",),
    ("backends",),
    ("memory",),
    ("dispatch",),
    ("ops",),
    ("functional", "nn", "formula"),
    ("adopt",),
    ("__init__",),
    ("__main__",),
)
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}
ROOT = Path(__file__).parents[2]


def imports(in_functions: bool) -> dict[str, set[str]]:
    """Returns the modules that each module imports, optionally also within functions."""
    files = {
        ".".join((folder, *file.relative_to(ROOT / where).with_suffix("").parts)): file
        for where, folder in (("pyfused", "pyfused"), ("kernels", "pyfused.kernels"))
        for file in (ROOT / where).rglob("*.py")
        if "kernels" not in file.relative_to(ROOT / where).parts
    }
    modules = {name.removesuffix(".__init__") if name.count(".") > 1 else name for name in files}
    found = {}
    for name, file in files.items():
        package, targets = name.rsplit(".", 1)[0], set()
        tree = ast.parse(file.read_text())
        later = {n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
        for node in ast.walk(tree):
            if node in later and not in_functions:
                continue
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = f"{package}.{node.module or ''}" if node.level else node.module or ""
                base = base.strip(".")
                for alias in node.names:
                    whole = f"{base}.{alias.name}"
                    targets.add(whole if whole in modules else base)
        own = name.removesuffix(".__init__") if name.count(".") > 1 else name
        found[own] = {target for target in targets if target in modules} - {own}
    return found


def level(module: str) -> int:
    return LEVELS[module.split(".")[1]]


def test_imports_follow_the_layers_without_cycles() -> None:
    graph = imports(in_functions=True)
    assert len(graph) > 50
    assert pyfused.__name__ == "pyfused"
    up = [f"{a} imports {b}" for a, of in graph.items() for b in of if level(b) > level(a)]
    assert not up, "\n".join(sorted(up))
    TopologicalSorter(imports(in_functions=False)).prepare()  # raises for a cycle
