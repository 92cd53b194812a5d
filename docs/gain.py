"""Measures the speed-up by size for docs/is-it-for-you.md: `python docs/gain.py`.

Calls of torch and pyfused, forward and backward, are interleaved. Calls below the size limits of
kernels run torch's operators.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import cases
import report

import pyfused.functional

# The sizes of the other dimensions; the first dimension grows.
OPERATORS: dict[str, tuple[int, ...]] = {
    "cross_entropy": (1000,),
    "binary_cross_entropy_with_logits": (),
    "mse_loss": (),
    "gelu": (),
    "relu": (),
}
ELEMENTS = [1 << exponent for exponent in range(11, 27, 2)]
SECONDS = 0.3


def measure(op: str, others: tuple[int, ...], elements: int) -> dict[str, object]:
    case = cases.Case(op, (max(1, elements // (others or (1,))[0]), *others))
    arguments = cases.draw(case)
    cases.assert_correct(case, arguments)
    both = [cases.step(each, case, arguments) for each in (cases.TORCH, pyfused.functional)]
    timers = cases.timers_of(both)
    found = report.peer(*cases.measure(timers, SECONDS, fewest=9))
    row = {"case": case.name, "op": op, "elements": case.elements}
    return row | {"ms": found.ms, "pyfused_ms": found.pyfused_ms, "ratio": found.ratio}


def main() -> None:
    cases.settle_allocator()
    found = report.measured(report.machine_info())
    found["gain"] = []
    for op, others in OPERATORS.items():
        for elements in ELEMENTS:
            found["gain"].append(measure(op, others, elements))
            print(found["gain"][-1], flush=True)
    folder = report.RESULTS / report.slug(found)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gain.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
