"""Processes that take turns: builds, libraries or allocators that cannot be had in one.

    python benchmarks/sides.py FOLDER pyfused

is one of them, with the pyfused of a folder. It answers each line, a case's name, a mode and a
number of calls, with the seconds that they took; with nan where it has no such operator.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from cases import CASES, MODES, TORCH, Case, draw, step
from measure import Step, repeat, settle_allocator, timed

ROOT = Path(__file__).parents[1]
WARM_UP = 2  # calls before the first that counts: the first of all sets up
# The threads of the one whose turn is over spin for about a millisecond before they sleep.
HANDOVER_SECONDS = 3e-3


class Side:
    """A process with torch's operators, or with the pyfused of a folder."""

    def __init__(
        self, library: str, folder: Path = ROOT, environment: Mapping[str, str] = os.environ
    ) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(folder), library],
            env={**environment, "PYTHONPATH": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def has(self, case: Case) -> bool:
        return not math.isnan(self.seconds(case, MODES[0], 0))

    def seconds(self, case: Case, mode: str, calls: int) -> float:
        """The time of so many calls, after the others' threads have gone to sleep."""
        assert self.process.stdin
        assert self.process.stdout
        print(json.dumps([case.name, mode, calls]), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"the process {self.process.args} ended")
        return float(answer)


@contextmanager
def ended_after(*sides: Side) -> Iterator[None]:
    try:
        yield
    finally:
        for side in sides:
            side.process.terminate()
            side.process.wait()


def work(folder: Path, library: str) -> None:
    import pyfused.functional

    assert Path(pyfused.__file__).is_relative_to(folder.resolve()), pyfused.__file__
    settle_allocator()
    operators = pyfused.functional if library == "pyfused" else TORCH

    known = {case.name: case for case in CASES if hasattr(operators, case.op)}

    @lru_cache(maxsize=1)
    def prepared(case: Case, mode: str) -> Step:
        one = step(operators, case, draw(case), mode)
        repeat(one, WARM_UP)
        return one

    for line in sys.stdin:
        name, mode, calls = json.loads(line)
        if not calls or name not in known:
            print(0.0 if name in known else math.nan, flush=True)
            continue
        one = prepared(known[name], mode)
        time.sleep(HANDOVER_SECONDS)
        print(timed(one, calls), flush=True)


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[2])
