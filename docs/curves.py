"""Trains the GPT of `make demo`, for a chart: `python docs/curves.py`.

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
from steps import KEEP


def main() -> None:
    found = report.measured(report.machine_info())
    runs = demo.train_gpt(gpt.STEPS)
    for job, _ in runs:
        assert job.equal, job.difference
    about = {"classes": int(job.rows[0].values["torch"]), "machine": report.machine(found)}
    rows = [
        {"way": way + suffix, **asdict(step), **about}
        for suffix, (_, ways) in zip(("", KEEP), runs, strict=True)
        for way, steps in ways.items()
        for step in steps
    ]
    report.write_csv(report.RESULTS / report.slug(found) / "demo.csv", rows)


if __name__ == "__main__":
    main()
