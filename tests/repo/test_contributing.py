"""The steps of CONTRIBUTING.md for a loss, an activation and an option work in a copy."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from textwrap import dedent

import pytest
from processes import process

from pyfused.backends import cpu

ROOT = Path(__file__).parents[2]
pytestmark = [
    *(pytest.mark.cpu, pytest.mark.slow),
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git lists the files to copy"),
]
PAGE = (ROOT / "CONTRIBUTING.md").read_text("utf-8")


def apply(diff: str, folder: Path) -> None:
    """Edits a file; the lines without + of each part, separated by @@, are in it once."""
    name, _, lines = diff.partition("\n")
    path = folder / name.removeprefix("+++ ")
    text = path.read_text("utf-8")
    for part in lines.split("@@\n"):
        before, after = (re.sub(rf"(?m)^[{sign}].*\n|^[ +-]", "", part) for sign in "+-")
        assert text.count(f"\n{before}") == 1, diff
        text = text.replace(before, after)
    path.write_text(text, "utf-8")


def test_the_steps_add_operators_and_an_option(tmp_path: Path) -> None:
    files = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    objects = [str(path.relative_to(ROOT)) for path in ROOT.glob("build/editable-*/**/*.?")]
    for name in [*files, *objects]:  # with their times, so that only changed sources are compiled
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / name)
    (tmp_path / "pyfused" / "kernels").symlink_to(tmp_path / "kernels")  # as installed

    def run(*arguments: str) -> None:
        # The oldest instruction set compiles in a third of the time of the newest.
        oldest = {"PYFUSED_CPU_CAPABILITY": cpu.ISAS[0]}
        oldest["PYFUSED_ISAS"] = cpu.ISAS[0]
        done = process(*arguments, cwd=tmp_path, PYTHONPATH=str(tmp_path), **oldest)
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]

    for diff in re.findall(r"^ *```diff\n(.*?)^ *```", PAGE, re.MULTILINE | re.DOTALL):
        apply(dedent(diff), tmp_path)
    run("tools/formulas.py")  # make formulas
    run("setup.py", "--quiet", "build_ext", "--inplace")
    run("docs/pages.py")
    run("-m", "ruff", "format", "--check")  # make lint
    run("-m", "ruff", "check")
    # make test
    options = "-m", "pytest", "-qx", "-n", "0", "-p", "no:randomly"
    run(*options, "tests/contract/test_completeness.py")
    for selected in sorted(set(re.findall(r"`make test PYTEST_ARGS=\"-k ([^\"]*)\"`", PAGE))):
        run(*options, "--ignore", "tests/repo", "-k", selected.strip("'"))
