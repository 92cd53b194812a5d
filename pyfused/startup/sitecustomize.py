"""What Python runs as ``sitecustomize`` in each process of ``python -m pyfused run``.

``PYFUSED_RUN`` names the process that prints, and the file to which its child processes append
their counts; without that variable nothing is done. torch and pyfused are imported when the program
imports either: many a child process needs neither.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import sys
import time
from collections import Counter, defaultdict
from multiprocessing import util
from pathlib import Path
from typing import Any, BinaryIO

VARIABLE = "PYFUSED_RUN"
# The first process, which prints; the first line of the file that takes the counts; how many calls
# are compared, "sample" or "compare"; and the file's path.
RUN = os.environ.get(VARIABLE, "").split(" ", 3)
SMALL = "ATen is faster at this size"


class Calls:
    """Calls of one operator's kernels, alike in size and in whether gradients are needed.

    Attributes:
        largest: The elements of the largest input, or of a linear layer's logits.
        count: How many calls there were.
        elements: Those of all their inputs.
        repeats: For each call that was made again, by pyfused and by torch: the seconds an element
            of both, forward and backward.
        due: The number of the next call to compare.
    """

    due: int | float = 1

    def __init__(self) -> None:
        self.largest = self.count = self.elements = 0
        self.repeats: list[tuple[float, float]] = []

    def add(self, largest: int, count: int, elements: int, repeats: list[Any]) -> None:
        self.largest = max(self.largest, largest)
        self.count += count
        self.elements += elements
        self.repeats += repeats


class Counts:
    """Holds what is counted in a process.

    Attributes:
        kernels: Calls that take a kernel, by operator, bits of the size, and whether gradients are
            needed.
        small: Calls that are left to torch for their size, by operator.
        left: Those that are for another reason, by operator and reason.
        compiled: Calls of kernels in compiled programs, by operator.
        failed: Errors of counting.
        spent: The seconds that comparisons took.
    """

    def __init__(self) -> None:
        self.kernels: defaultdict[tuple[str, int, bool], Calls] = defaultdict(Calls)
        self.small: Counter[str] = Counter()
        self.left: Counter[tuple[str, str]] = Counter()
        self.compiled: Counter[str] = Counter()
        self.failed: dict[str, str] = {}
        self.spent = 0.0

    def __bool__(self) -> bool:
        return bool(self.kernels or self.small or self.left or self.compiled)

    def as_json(self, seconds: float) -> str:
        kernels = [(key, list(vars(calls).values())) for key, calls in self.kernels.items()]
        for _, values in kernels:
            values[4:] = []  # when the next call is due
        left = list(self.left.items())
        return json.dumps([seconds, kernels, self.small, left, self.compiled])

    def add(self, kernels: Any, small: Any, left: Any, compiled: Any) -> None:
        for key, (largest, count, elements, repeats) in kernels:
            self.kernels[tuple(key)].add(largest, count, elements, repeats)
        self.small.update(small)
        self.left.update({tuple(key): count for key, count in left})
        self.compiled.update(compiled)

    # ---- the summary ----

    def per_element(self, op: str, bits: int, needs_grad: bool) -> tuple[float, float] | None:
        """Returns the median seconds of pyfused and torch, of this kind or the nearest compared."""
        compared = [key for key, calls in self.kernels.items() if key[0] == op and calls.repeats]
        if not compared:
            return None
        nearest = min(compared, key=lambda key: (key[2] != needs_grad, abs(key[1] - bits)))
        ours, theirs = (
            sorted(column)[(len(column) - 1) // 2]
            for column in zip(*self.kernels[nearest].repeats, strict=True)
        )
        return ours, theirs

    def rows(self) -> list[Row]:
        """Returns a row for each operator with kernels, the one that took longest first."""
        found: dict[str, Row] = {}
        for (op, bits, needs_grad), calls in self.kernels.items():
            row = found.setdefault(op, Row(op))
            seconds = self.per_element(op, bits, needs_grad)
            row.count += calls.count
            row.largest = max(row.largest, calls.largest)
            row.compared += len(calls.repeats)
            if seconds:
                row.ours += calls.elements * seconds[0]
                row.theirs += calls.elements * seconds[1]
        return sorted(found.values(), key=lambda row: -row.theirs)

    def summary(self, processes: list[float]) -> str:
        """Returns what the calls were worth, in lines.

        Args:
            processes: How long each process ran that made any.
        """
        if self.failed:
            return "\n".join(f"not counted: {op}: {error}" for op, error in self.failed.items())
        if not self:
            return "pyfused: no calls of its losses and activations"
        ran = time_of(sum(processes))
        if len(processes) > 1:
            ran += f" in {len(processes)} processes"
        rows = self.rows()
        if not (rows or self.left or self.compiled):
            size = f"the size of all calls ({sum(self.small.values()):,})"
            return f"pyfused: nothing gained: ATen is faster at {size}, in {ran}"
        lines = table(rows) if rows else []
        left = [f"{op} ({count:,}: {reason})" for (op, reason), count in self.left.most_common()]
        left += [f"{op} ({count:,}: {SMALL})" for op, count in self.small.most_common()]
        if left:
            lines.append(f"left to torch: {', '.join(left)}")
        if not (rows or self.compiled):
            return "\n".join((*lines, f"pyfused: nothing gained: no kernel ran, in {ran}"))
        unknown = [f"{row.op} ({row.count:,})" for row in rows if not row.compared]
        unknown += [f"{op} ({count:,}, compiled)" for op, count in self.compiled.most_common()]
        if unknown:
            lines.append(f"not compared: {', '.join(unknown)}")
        if compared := sum(row.compared for row in rows):
            least = "at least " if unknown else ""
            ours, theirs = (
                time_of(sum(getattr(row, whose) for row in rows)) for whose in ("ours", "theirs")
            )
            lines.append(
                f"pyfused's kernels took {least}{ours} of {ran}; torch's operators would have "
                f"taken {least}{theirs} (estimated from calls that both made again: {compared:,})"
            )
        return "\n".join(lines)


class Row:
    """The calls of one operator's kernels, of all sizes together."""

    def __init__(self, op: str) -> None:
        self.op, self.count, self.largest, self.compared = op, 0, 0, 0
        self.ours = self.theirs = 0.0


def table(rows: list[Row]) -> list[str]:
    lines = [("operator", "calls", "largest input", "pyfused", "torch")]
    for row in rows:
        times = (time_of(row.ours), time_of(row.theirs)) if row.compared else ("-", "-")
        lines.append((row.op, f"{row.count:,}", f"{row.largest:,}", *times))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if k else cell.ljust(width)
            for k, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]


def time_of(seconds: float) -> str:
    digits = 0 if seconds >= 10 else 1 if seconds >= 1 else 3
    return f"{seconds:,.{digits}f} s"


# ---- the processes of a run ----------------------------------------------------------------------

COUNTS = Counts()
began = time.perf_counter()


def name_file(path: str, descriptor: int, compare: bool) -> None:
    """Makes this process the first of a run, and this file the one that takes the counts."""
    RUN[:] = str(os.getpid()), os.urandom(16).hex(), "compare" if compare else "sample", path
    os.write(descriptor, f"{RUN[1]}\n".encode())
    os.environ[VARIABLE] = " ".join(RUN)


def open_file() -> BinaryIO | None:
    """Returns the file of the counts, where a line can be read or appended, or None.

    It is known by its first line: another file may have its name by then, or another process the
    number of the first.
    """
    with contextlib.suppress(OSError, ValueError):
        _, token, _, path = RUN
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_APPEND), "r+b", buffering=0)
        if file.readline() == f"{token}\n".encode():
            return file
        file.close()
    return None


def leave() -> None:
    """Appends the counts of a child that ends to the file; the first process prints all."""
    seconds = time.perf_counter() - began - COUNTS.spent
    with contextlib.suppress(Exception):  # the program is to end as it does by itself
        if RUN[0] == str(os.getpid()):
            processes = [seconds] if COUNTS else []
            for brought, *counts in taken():
                COUNTS.add(*counts)
                processes.append(brought)
            print(COUNTS.summary(processes), file=sys.stderr)
        elif COUNTS and (file := open_file()):
            line = COUNTS.as_json(seconds)
            with file:
                file.write(f"{line}\n".encode())  # one write, as other children append, too
    forget()


def taken() -> list[list[Any]]:
    """Returns what the children have brought, and removes their file."""
    file = open_file()
    if file is None:
        return []
    with file:
        lines = file.readlines()
    with contextlib.suppress(OSError):  # on Linux it has lost its name already
        Path(RUN[3]).unlink()
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def forget() -> None:
    global began
    began = time.perf_counter()
    COUNTS.__init__()  # type: ignore[misc]


# ---- where it starts -----------------------------------------------------------------------------


class AfterTorch:
    """Finds torch and pyfused as others do, and starts counting once both have been imported."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in ("torch", "pyfused"):
            return None
        found = (f.find_spec(name, path, target) for f in sys.meta_path if f is not cls)
        spec: Any = next((spec for spec in found if spec and spec.loader), None)
        if spec is not None:
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (execute(module), cls.after(name))
        return spec

    @staticmethod
    def after(name: str) -> None:
        try:
            if name == "pyfused":
                importlib.import_module("pyfused.run").start(COUNTS, RUN[2] == "compare")
            else:
                importlib.import_module("pyfused")  # which may be what imports torch
        except ModuleNotFoundError:  # a child may be another Python
            pass
        except Exception as error:
            print(f"pyfused: run: torch is not patched: {error!r}", file=sys.stderr)


def start() -> None:
    sys.meta_path.insert(0, AfterTorch)
    atexit.register(leave)  # the first, and so the last to be called
    if RUN[0] != str(os.getpid()):
        util.Finalize(None, leave, exitpriority=0)
    # multiprocessing's forked children forget what was registered, and skip atexit.
    if hasattr(os, "register_at_fork"):  # not on Windows
        os.register_at_fork(after_in_child=forget)
    util.register_after_fork(leave, lambda _: util.Finalize(None, leave, exitpriority=0))


if __name__ == "sitecustomize":
    # The program is to find sys.path and sitecustomize as they are without this one.
    folder = str(Path(__file__).parent)
    sys.path[:] = [entry for entry in sys.path if entry != folder]
    this = sys.modules.pop(__name__)
    try:
        importlib.import_module(__name__)
    except ImportError as error:
        if error.name != __name__:
            raise
    sys.modules.setdefault(__name__, this)
    if VARIABLE in os.environ:
        start()
