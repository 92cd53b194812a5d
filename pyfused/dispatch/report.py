"""Counts the calls of pyfused's operators, and the time that their kernels take."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from pyfused.dispatch import reasons
from pyfused.dispatch.operator import Operator, Options, Tensors
from pyfused.locks import fork_safe_lock
from pyfused.torch_internals import called_while_tracing, compiler_traces

active: list[Report] = []  # the reports whose blocks have not ended
clock = perf_counter  # read before and after a kernel
traced: set[str] = set()  # the operators whose calls torch.compile has left to torch
reasons_of_torch: list[Callable[[], str]] = []  # return further lines for reports without kernels
_lock = fork_safe_lock()  # held while counts change


class Report:
    """The result of :func:`pyfused.report`; its ``str`` and ``repr`` are the table."""

    def __init__(self) -> None:
        self._ran: dict[str, dict[str, int]] = {}  # by operator, as in to_dict()
        self._left = Counter[tuple[str, str]]()  # by operator and reason
        self._compiled = Counter[str]()  # by operator
        self._kernel_seconds = self._seconds = 0.0

    def __enter__(self) -> Report:
        with _lock:
            active.append(self)
            self._seconds -= perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        with _lock:
            if self not in active:
                message = "report: the block was left without being entered, or left twice"
                raise RuntimeError(message)
            active.remove(self)
            self._seconds += perf_counter()

    def to_dict(self) -> dict[str, Any]:
        """Returns the counts and times, for logging; ``json`` can write them.

        Returns:
            ``seconds``: the time of the block. ``kernel_seconds``: the time in calls of kernels,
            forward and backward; on GPUs, the host's. ``operators``: for each operator whose
            kernels ran, ``calls`` and ``largest_input`` in elements. ``left_to_torch``: the number
            of dispatched calls by operator and reason. ``compiled``: the number of calls in
            compiled programs by operator.
        """
        with _lock:
            left: dict[str, dict[str, int]] = {}
            for (op, reason), count in self._left.most_common():
                left.setdefault(op, {})[reason] = count
            rows = sorted(self._ran.items(), key=lambda row: -row[1]["calls"])
            return {
                "seconds": self._seconds + perf_counter() * active.count(self),
                "kernel_seconds": self._kernel_seconds,
                "operators": {op: dict(row) for op, row in rows},
                "left_to_torch": left,
                "compiled": dict(self._compiled),
            }

    def _add_call(self, op: str, elements: int) -> None:
        row = self._ran.setdefault(op, {"calls": 0, "largest_input": 0})
        row["calls"] += 1
        row["largest_input"] = max(row["largest_input"], elements)

    def _add_left(self, op: str, reason: str) -> None:
        self._left[op, reason] += 1

    def _add_compiled(self, op: str) -> None:
        self._compiled[op] += 1

    def _add_seconds(self, seconds: float) -> None:
        self._kernel_seconds += seconds

    def __repr__(self) -> str:
        found = self.to_dict()
        ran, left, compiled = (found[name] for name in ("operators", "left_to_torch", "compiled"))
        lines = [f"{'operator':<32}{'calls':>12}{'largest input':>16}"] if ran else []
        lines += [f"{op:<32}{n['calls']:>12,}{n['largest_input']:>16,}" for op, n in ran.items()]
        texts = [f"{op} ({n:,}: {why})" for op, counts in left.items() for why, n in counts.items()]
        if texts:  # small calls last
            texts.sort(key=lambda text: text.endswith(f"{reasons.SMALL})"))
            lines.append(f"left to torch: {', '.join(texts)}")
        if compiled:
            texts = [f"{op} ({count:,})" for op, count in compiled.items()]
            lines.append(f"in compiled programs: {', '.join(texts)}")
        times = found["kernel_seconds"], found["seconds"]
        taken, whole = (f"{x:,.{0 if x >= 10 else 1 if x >= 1 else 3}f} s" for x in times)
        took = f"kernels took {taken} of {whole}"
        lines.append(took if ran or compiled else f"pyfused: no kernel ran, in {whole}")
        lines.append("calls that are too small for every kernel are torch's, and are not counted")
        if not ran and not compiled:
            if traced:
                lines.append(f"so are calls in compiled programs: {', '.join(sorted(traced))}")
            lines += filter(None, [reason() for reason in reasons_of_torch])
        return "\n".join(lines)


def report() -> Report:
    """Counts the calls of pyfused's operators in a ``with`` block, and the time in their kernels.

    Calls that are too small for every kernel are torch's from their first line, and not counted.
    ``python -m pyfused run`` prints the same report::

        with pyfused.patch(), pyfused.report() as report:
            train()
        print(report)
    """
    return Report()


class _Recording(threading.local):
    calls: list[tuple[Any, ...]] | None = None


_recording = _Recording()


@contextmanager
def recorded() -> Iterator[list[tuple[Any, ...]]]:
    """Records the calls that this thread dispatches, as arguments of `explanation_of`."""
    before, calls = _recording.calls, list[tuple[Any, ...]]()
    _recording.calls = calls
    try:
        with Report():
            yield calls
    finally:
        _recording.calls = before


# ---- what dispatch calls while reports are active ------------------------------------------------


def count_call(op: Operator, tensors: Tensors, options: Options, reason: str | None) -> None:
    """Counts a call that is dispatched.

    Args:
        reason: Why torch computes the call, None if a kernel does.
    """
    if compiler_traces():
        add_traced(op.name)
    elif not reasons.reported_later(op, tensors):
        if (calls := _recording.calls) is not None:
            calls.append((op, tensors, options, reason))
        if reason is None:
            _record(Report._add_call, op.name, op.elements(tensors))
        else:
            _record(Report._add_left, op.name, reason)


@called_while_tracing
def add_traced(name: str) -> None:
    """Records that torch.compile leaves a call of an operator to torch."""
    traced.add(name)


def count_compiled(name: str) -> None:
    """Counts a call of a custom operator in a compiled program."""
    _record(Report._add_compiled, name)


def timed(kernel: Callable[..., Any], *args: Any) -> Any:
    """Calls a kernel, and adds its time, unless torch.compile traces it."""
    if compiler_traces():
        return kernel(*args)
    start = clock()
    try:
        return kernel(*args)
    finally:
        count_seconds(clock() - start)


def count_seconds(seconds: float) -> None:
    """Adds the time of a kernel."""
    _record(Report._add_seconds, seconds)


def _record(add: Callable[..., None], *values: Any) -> None:
    with _lock:
        for report in active:
            add(report, *values)
