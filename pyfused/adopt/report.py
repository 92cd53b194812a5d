"""Counts the calls of pyfused's operators, and the time that their kernels take."""

from __future__ import annotations

from collections import Counter
from threading import RLock
from time import perf_counter
from typing import Any

from pyfused.dispatch import observers, reasons
from pyfused.dispatch.observers import Observer
from pyfused.dispatch.operator import Operator, Options, Tensors


class Report(Observer):
    """The result of :func:`pyfused.report`; its ``str`` and ``repr`` are the table."""

    def __init__(self) -> None:
        self._calls: Counter[str] = Counter()  # of kernels, by operator
        self._largest: dict[str, int] = {}  # elements of the largest of these calls
        self._left: Counter[tuple[str, str]] = Counter()  # by operator and reason
        self._compiled: Counter[str] = Counter()  # calls of kernels in compiled programs
        self._kernel_seconds = 0.0
        self._seconds = 0.0  # of the blocks that have ended
        self._began: float | None = None  # the start of the current block
        self._lock = RLock()  # several threads may call kernels at once

    def __enter__(self) -> Report:
        observers.begin(self)
        self._began = perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        observers.end(self)
        self._seconds, self._began = self._elapsed(), None

    def _elapsed(self) -> float:
        return self._seconds + (0.0 if self._began is None else perf_counter() - self._began)

    # ---- what dispatch reports ----

    def decided(self, op: Operator, tensors: Tensors, options: Options, reason: str | None) -> None:  # noqa: ARG002
        elements = 0 if reason is not None else op.elements(tensors)
        with self._lock:
            if reason is not None:
                self._left[op.name, reason] += 1
                return
            self._calls[op.name] += 1
            self._largest[op.name] = max(self._largest.get(op.name, 0), elements)

    def compiled(self, name: str) -> None:
        with self._lock:
            self._compiled[name] += 1

    def took(self, seconds: float) -> None:
        with self._lock:
            self._kernel_seconds += seconds

    # ---- the result ----

    def to_dict(self) -> dict[str, Any]:
        """Returns the counts and times, for logging; ``json`` can write them.

        Returns:
            ``seconds``: the time of the block. ``kernel_seconds``: the time in calls of kernels,
            forward and backward; on GPUs, the host's. ``operators``: for each operator whose
            kernels ran, ``calls`` and ``largest_input`` in elements. ``left_to_torch``: the number
            of dispatched calls by operator and reason. ``compiled``: the number of calls in
            compiled programs by operator.
        """
        left: dict[str, dict[str, int]] = {}
        for (op, reason), count in self._left_to_torch():
            left.setdefault(op, {})[reason] = count
        with self._lock:
            return {
                "seconds": self._elapsed(),
                "kernel_seconds": self._kernel_seconds,
                "operators": {
                    op: {"calls": count, "largest_input": self._largest[op]}
                    for op, count in self._calls.most_common()
                },
                "left_to_torch": left,
                "compiled": dict(self._compiled),
            }

    def _left_to_torch(self) -> list[tuple[tuple[str, str], int]]:
        """Returns operators with reasons, and numbers of calls; small calls come last."""
        with self._lock:
            left = self._left.most_common()
        return sorted(left, key=lambda entry: entry[0][1] == reasons.SMALL)

    def __repr__(self) -> str:
        results, left = self.to_dict(), self._left_to_torch()
        rows, compiled, ran = results["operators"], results["compiled"], time_of(results["seconds"])
        lines = table(rows) if rows else []
        if left:
            entries = [f"{op} ({n:,}: {reason})" for (op, reason), n in left]
            lines.append(f"left to torch: {', '.join(entries)}")
        if compiled:
            entries = [f"{op} ({n:,})" for op, n in compiled.items()]
            lines.append(f"in compiled programs: {', '.join(entries)}")
        took = f"kernels took {time_of(results['kernel_seconds'])} of {ran}"
        lines.append(took if rows or compiled else f"pyfused: no kernel ran, in {ran}")
        lines.append("calls that are too small for every kernel are torch's, and are not counted")
        return "\n".join(lines)


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    lines = [("operator", "calls", "largest input")]
    lines += [(op, f"{row['calls']:,}", f"{row['largest_input']:,}") for op, row in rows.items()]
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    return ["  ".join((line[0].ljust(first), *map(str.rjust, line[1:], others))) for line in lines]


def time_of(seconds: float) -> str:
    digits = 0 if seconds >= 10 else 1 if seconds >= 1 else 3
    return f"{seconds:,.{digits}f} s"


def report() -> Report:
    """Counts the calls of pyfused's operators in a ``with`` block, and the time in their kernels.

    Calls that are too small for every kernel are torch's from their first line, and not counted.

    It gives the same report as ``python -m pyfused run``, for example in a notebook::

        with pyfused.patch(), pyfused.report() as report:
            train()
        print(report)
    """
    return Report()
