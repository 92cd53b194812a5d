"""Trains the GPT of `make demo`, for the chart at the top of README.md: `python docs/curves.py`.

torch and pyfused take turns, each in a process of its own. `python docs/gallery.py` draws it.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("benchmarks", "examples")]

import demo
import gpt
import report
from rich.progress import Progress


def main() -> None:
    found = report.measured(report.machine_info())
    job, steps = demo.train_gpt(gpt.STEPS, Progress(disable=True))
    assert job.equal, job.difference
    vocabulary = int(job.rows[0].values["torch"])
    rows = [
        {"way": way, **asdict(step), "classes": vocabulary, "machine": report.machine(found)}
        for way, run in steps.items()
        for step in run
    ]
    report.write_csv(report.RESULTS / report.slug(found) / "demo.csv", rows)


if __name__ == "__main__":
    main()
