"""Packages pyfused for the Hugging Face kernel hub, from which `kernels` and transformers load.

    python tools/hub.py dist/hub      writes the input folder of kernel-builder, and build variants

tools/hub/ is the template. The package is copied to torch-ext/ without its commands and callbacks,
and with relative imports, because the hub imports each version under another name. build/ has the
same content as kernel-builder's output: a copy for each backend, with metadata.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEMPLATE = ROOT / "tools/hub"
COMMANDS = {"__main__.py", "adopt/report.py", "adopt/run.py"}
CALLBACKS = {f"integrations/{name}.py" for name in ("__init__", "lightning", "transformers")}
LEFT_OUT = {"__init__.py", "adopt/trl.py"} | COMMANDS | CALLBACKS
BYTECODE = shutil.ignore_patterns("__pycache__")


def relative(source: str, depth: int) -> str:
    """Makes the imports of a module relative; the module is `depth` folders below the package."""
    lines = source.split("\n")
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        if any(re.match(r"pyfused\b", name) for name in names):
            dots, line = "." * (depth + 1), lines[node.lineno - 1]
            line = re.sub(r"\bimport pyfused\.(\w+) as", rf"from {dots} import \1 as", line)
            line = re.sub(r"\bfrom pyfused\b\.?", f"from {dots}", line)
            assert "pyfused" not in line, f"no relative form of {line!r}"
            lines[node.lineno - 1] = line
    return "\n".join(lines)


def write(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(TEMPLATE, folder, ignore=BYTECODE)
    shutil.copy(ROOT / "LICENSE", folder)
    package = folder / "torch-ext/pyfused"
    shutil.copytree(ROOT / "kernels", package / "kernels", ignore=BYTECODE)
    source = ROOT / "pyfused"
    for path in source.rglob("*.py"):
        name = path.relative_to(source)
        if name.as_posix() not in LEFT_OUT:
            text = relative(path.read_text(encoding="utf-8"), depth=len(name.parts) - 1)
            (package / name).parent.mkdir(exist_ok=True)
            (package / name).write_text(text, encoding="utf-8")
    build(folder, package)


def build(folder: Path, package: Path) -> None:
    settings = re.findall(r"^([\w-]+) = (.+)$", (folder / "build.toml").read_text(), re.MULTILINE)
    general = {key: json.loads(value) for key, value in settings}  # each TOML value is valid JSON
    files = sorted(path for path in package.rglob("*") if path.is_file())
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:7]
    for backend in general["backends"]:
        variant = folder / f"build/torch-{backend}"
        shutil.copytree(package, variant)
        metadata = {
            "name": general["name"],
            "id": f"_{general['name']}_{backend}_{digest}",
            "version": general["version"],
            "license": general["license"],
            "python-depends": [],
            "backend": {"type": backend},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the output folder; an earlier output is deleted")
    folder = parser.parse_args().folder
    if folder.exists() and not (folder / "build.toml").exists():
        sys.exit(f"folder: expected a new folder or an earlier output, got {folder}")
    write(folder)
    print(f"written to {folder}")
