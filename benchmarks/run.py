"""Run the benchmarks in each setting of settings.py, in a process of its own, and write the report.

    python benchmarks/run.py
    python benchmarks/run.py --quick -m quick

What is not known here goes to pytest. --quick leaves the report in .benchmarks, beside what it is
made of; otherwise it goes to benchmarks/results, README.md and docs/memory.md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from settings import available, environment

HERE = Path(__file__).parent
ROOT = HERE.parent
FOUND = ROOT / ".benchmarks"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="no report but in .benchmarks")
    options, chosen = parser.parse_known_args()
    FOUND.mkdir(exist_ok=True)
    files = []
    for name in available():
        files.append(FOUND / f"{name.replace(' ', '-')}.json")
        pytest = [sys.executable, "-m", "pytest", HERE, "--benchmark-json", files[-1], *chosen]
        subprocess.run(pytest, env=environment(name), cwd=ROOT, check=True)
    report = [sys.executable, HERE / "report.py", *files]
    if options.quick:
        report += ["--results", FOUND]
    else:
        allocators = FOUND / "allocators.json"
        subprocess.run([sys.executable, HERE / "allocators.py", "--json", allocators], check=True)
        report += ["--allocators", allocators, "--readme", ROOT / "README.md"]
        report += ["--page", ROOT / "docs/memory.md"]
    subprocess.run(report, cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
