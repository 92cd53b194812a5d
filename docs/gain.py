"""Measures the speed-up by size for docs/is-it-for-you.md: `python docs/gain.py`.

Calls of torch and pyfused, forward and backward, are interleaved: first with torch's defaults, then
with ``pyfused.memory.keep()``. Calls below the size limits of kernels run torch's operators; each
row records the limit.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import cases
import report

import pyfused.functional
import pyfused.memory
from pyfused.dispatch.sizes import limits
from pyfused.ops import operators

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


def measure(op: str, others: tuple[int, ...], elements: int) -> report.Row:
    case = cases.Case(op, (max(1, elements // (others or (1,))[0]), *others))
    arguments = cases.draw(case)
    cases.assert_correct(case, arguments)
    both = [cases.step(each, case, arguments) for each in (cases.TORCH, pyfused.functional)]
    timers = cases.timers_of(both)
    found = report.peer(*cases.measure(timers, SECONDS, fewest=9))
    return report.row(case, cases.TRAINING, {"torch": found})


def limit(op: str) -> int:
    """Returns the number of elements from which a kernel runs by default."""
    return limits(operators.OPERATORS[op], 2).from_elements


def main() -> None:
    cases.settle_allocator()
    found = report.measured(report.machine_info())
    file, rows = report.RESULTS / report.slug(found) / "gain.csv", []
    limit_of = {op: limit(op) for op in OPERATORS}  # without `keep`, which changes some of them
    for keep in (False, True):
        pyfused.memory.keep(keep)
        for op, others in OPERATORS.items():
            for elements in ELEMENTS:
                row = report.cells(measure(op, others, elements))
                also = {"keep": int(keep), "limit": limit_of[op]}
                rows.append(row | also | {"machine": report.machine(found)})
                print(rows[-1], flush=True)
    report.write_csv(file, rows)


if __name__ == "__main__":
    main()
