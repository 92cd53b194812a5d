"""Counts the calls of pyfused's operators, and the time that their kernels take."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

from pyfused import torch_internals
from pyfused.dispatch import reasons
from pyfused.dispatch import run as dispatch
from pyfused.dispatch.autograd import Fused
from pyfused.dispatch.operator import Operator, Tensors
from pyfused.ops import custom_operators


class Report:
    """The result of :func:`pyfused.report`; its ``str`` and ``repr`` are the table."""

    def __init__(self) -> None:
        self._calls: Counter[str] = Counter()  # of kernels, by operator
        self._largest: dict[str, int] = {}  # elements of the largest of these calls
        self._left: Counter[tuple[str, str]] = Counter()  # by operator and reason
        self._compiled: Counter[str] = Counter()  # calls of kernels in compiled programs
        self._kernel_seconds = 0.0
        self._seconds = 0.0  # of the blocks that have ended
        self._began: float | None = None  # the start of the current block

    def __enter__(self) -> Report:
        global _reports
        try:
            with _lock:
                _reports = (*_reports, self)
                _install()
            self._began = perf_counter()
            return self
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        global _reports
        self._seconds, self._began = self._elapsed(), None
        with _lock:
            _reports = tuple([report for report in _reports if report is not self])
            if not _reports:
                _remove()

    def _elapsed(self) -> float:
        return self._seconds + (0.0 if self._began is None else perf_counter() - self._began)

    # ---- the result ----

    def to_dict(self) -> dict[str, Any]:
        """Returns the counts and times, for logging; ``json`` can write them.

        Returns:
            ``seconds``: the time of the block. ``kernel_seconds``: the time in calls of kernels,
            forward and backward; on GPUs, the host's. ``operators``: for each operator whose
            kernels ran, ``calls`` and ``largest_input`` in elements. ``left_to_torch``: the number
            of calls by operator and reason. ``compiled``: the number of calls in compiled programs
            by operator.
        """
        left: dict[str, dict[str, int]] = {}
        for (op, reason), count in self._left_to_torch():
            left.setdefault(op, {})[reason] = count
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
        return sorted(self._left.most_common(), key=lambda entry: entry[0][1] == reasons.SMALL)

    def __repr__(self) -> str:
        results, left = self.to_dict(), self._left_to_torch()
        rows, compiled, ran = results["operators"], results["compiled"], time_of(results["seconds"])
        if not (rows or left or compiled):
            return "pyfused: no losses or activations were called"
        if not (rows or compiled) and {reason for (_, reason), _ in left} == {reasons.SMALL}:
            calls = f"all calls ({self._left.total():,})"
            return f"pyfused: no kernel ran: {calls} were too small for one, in {ran}"
        lines = table(rows) if rows else []
        if left:
            entries = [f"{op} ({n:,}: {reason})" for (op, reason), n in left]
            lines.append(f"left to torch: {', '.join(entries)}")
        if compiled:
            entries = [f"{op} ({n:,})" for op, n in compiled.items()]
            lines.append(f"in compiled programs: {', '.join(entries)}")
        took = f"kernels took {time_of(results['kernel_seconds'])} of {ran}"
        lines.append(took if rows or compiled else f"pyfused: no kernel ran, in {ran}")
        return "\n".join(lines)


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    lines = [("operator", "calls", "largest input")]
    lines += [(op, f"{row['calls']:,}", f"{row['largest_input']:,}") for op, row in rows.items()]
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    return ["  ".join((line[0].ljust(first), *map(str.rjust, line[1:], others))) for line in lines]


def time_of(seconds: float) -> str:
    digits = 0 if seconds >= 10 else 1 if seconds >= 1 else 3
    return f"{seconds:,.{digits}f} s"


# ---- hooks in dispatch ---------------------------------------------------------------------------

# A mode cannot count calls, because calls fall back to torch while a mode is active.
_reports: tuple[Report, ...] = ()  # the reports of current blocks
_lock = threading.RLock()  # held while _reports and the hooks change
_replaced: dict[str, Any] = {}  # the functions that the hooks replace


def _is_small(op: Operator, tensors: Tensors, *rest: Any) -> bool:
    is_small: bool = _replaced["is_small"](op, tensors, *rest)
    if is_small:
        for report in _reports:
            report._left[op.name, reasons.SMALL] += 1
    return is_small


def _decide(op: Operator, tensors: Tensors, *rest: Any) -> dispatch.Decision:
    reason, kernel, options = decision = _replaced["decide"](op, tensors, *rest)
    if torch_internals.compiler_traces():
        return decision  # type: ignore[no-any-return]
    for report in _reports:
        if kernel is None:
            report._left[op.name, str(reason)] += 1
        else:
            report._calls[op.name] += 1
            largest = report._largest.get(op.name, 0)
            report._largest[op.name] = max(largest, op.elements(tensors))
    return reason, kernel and partial(_timed, kernel), options


def _compute(name: str, function: Any, *values: Any) -> Any:
    if not name.endswith("_backward"):
        for report in _reports:
            report._compiled[name] += 1
    return _timed(_replaced["compute"], name, function, *values)


def _backward(*args: Any) -> Any:
    return _timed(_replaced["backward"], *args)


def _timed(function: Callable[..., Any], *args: Any) -> Any:
    start = perf_counter()
    try:
        return function(*args)
    finally:
        seconds = perf_counter() - start
        for report in _reports:
            report._kernel_seconds += seconds


_HOOKS: tuple[tuple[Any, str, Any], ...] = (
    (dispatch, "is_small", _is_small),
    (dispatch, "decide", _decide),
    (custom_operators, "compute", _compute),
    (Fused, "backward", _backward),
)


def _install() -> None:
    for owner, name, hook in _HOOKS:
        if getattr(owner, name) is not hook:
            _replaced[name] = getattr(owner, name)
            setattr(owner, name, staticmethod(hook) if isinstance(owner, type) else hook)


def _remove() -> None:
    for owner, name, hook in _HOOKS:
        if getattr(owner, name) is hook:
            replaced = _replaced[name]
            setattr(owner, name, staticmethod(replaced) if isinstance(owner, type) else replaced)


def report() -> Report:
    """Counts the calls of pyfused's operators in a ``with`` block, and the time in their kernels.

    It gives the same report as ``python -m pyfused run``, for example in a notebook::

        with pyfused.patch(), pyfused.report() as report:
            train()
        print(report)
    """
    return Report()
