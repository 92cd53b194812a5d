"""What Python runs as ``sitecustomize`` in each process of ``python -m pyfused run``.

It stands in a folder of that run's, to which child processes bring their counts. torch and pyfused
are imported when the program imports either: many a child process needs neither.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import shutil
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from multiprocessing import util
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
FIRST = os.environ.get("PYFUSED_RUN")  # the process that prints
KERNEL, SMALL = "kernel", "torch: ATen is faster at this size"  # paths


class Calls:
    """Calls of one operator that took one path, alike in size and in whether gradients are needed.

    Some of them are repeated, by pyfused and by torch, to compare the two.

    Attributes:
        largest: The elements of the largest input.
        count: How many calls there were.
        elements: Those of all their inputs.
        seconds: What the calls took; a backward pass comes later, and is not in it.
        repeats: Seconds an element, for each repeated call: of our backward pass, and of torch's
            forward and backward passes together.
        due: The number of the next call to repeat.
        cost: The seconds that the last repetition took.
        latest: The seconds of the latest call that was timed.
    """

    due: float = 2  # the first call of a kind starts threads, and takes new memory
    cost = latest = 0.0

    def __init__(self) -> None:
        self.largest = self.count = self.elements = 0
        self.seconds = 0.0
        self.repeats: list[tuple[float, float]] = []

    def __iter__(self) -> Iterator[Any]:
        return iter((self.largest, self.count, self.elements, self.seconds, self.repeats))

    def add(
        self, largest: int, count: int, elements: int, seconds: float, repeats: list[Any]
    ) -> None:
        self.largest = max(self.largest, largest)
        self.count += count
        self.elements += elements
        self.seconds += seconds
        self.repeats += repeats

    def with_backward(self) -> tuple[float, float | None]:
        """What all of them took, and what torch would have taken; None where none was repeated."""
        if not self.repeats:
            return self.seconds, None
        backward, by_torch = (
            sorted(column)[(len(column) - 1) // 2] for column in zip(*self.repeats, strict=True)
        )
        return self.seconds + self.elements * backward, self.elements * by_torch


Key = tuple[str, str, int, bool]  # operator, path, size, whether gradients are needed
CALLS: defaultdict[Key, Calls] = defaultdict(Calls)
OTHERS: Counter[str] = Counter()  # losses and activations that pyfused does not have
began = time.perf_counter()


def leave() -> None:
    """Where a process ends: a child brings its counts, and the first prints all."""
    seconds = time.perf_counter() - began
    if str(os.getpid()) == FIRST:
        processes = [seconds] if CALLS else []
        for file in FOLDER.glob("*.json"):
            brought = json.loads(file.read_text())
            for key, calls in brought["calls"]:
                CALLS[tuple(key)].add(*calls)
            OTHERS.update(brought["others"])
            processes += [brought["seconds"]] if brought["calls"] else []
        shutil.rmtree(FOLDER, ignore_errors=True)
        print(summary(processes), file=sys.stderr)
    elif (CALLS or OTHERS) and FOLDER.exists():
        file = FOLDER / f"{os.getpid()}-{time.time_ns()}"
        calls = [(key, list(calls)) for key, calls in CALLS.items()]
        file.write_text(json.dumps({"calls": calls, "others": OTHERS, "seconds": seconds}))
        file.rename(file.with_suffix(".json"))
    forget()


def forget() -> None:
    global began
    began = time.perf_counter()
    CALLS.clear()
    OTHERS.clear()


# ---- the summary ---------------------------------------------------------------------------------


class Row:
    """Of one operator and path, whatever the sizes."""

    def __init__(self, path: str) -> None:
        self.path, self.count, self.largest = path, 0, 0
        self.seconds = self.compared = self.by_torch = 0.0

    def add(self, calls: Calls) -> None:
        seconds, by_torch = calls.with_backward()
        self.count += calls.count
        self.largest = max(self.largest, calls.largest)
        self.seconds += seconds
        if not self.path.startswith(KERNEL):
            by_torch = seconds  # which is what ran
        if by_torch is not None:
            self.compared += seconds
            self.by_torch += by_torch

    @property
    def with_torch(self) -> float:
        """What torch would have taken, 0 where that is not known."""
        return self.seconds * self.by_torch / self.compared if self.compared else 0.0


def summary(processes: list[float]) -> str:
    """What the calls were worth.

    Args:
        processes: How long each process ran that made any.
    """
    found: dict[tuple[str, str], Row] = {}
    for (op, path, *_), calls in CALLS.items():
        found.setdefault((op, path), Row(path)).add(calls)
    rows, lines = found.values(), []
    total = sum(row.seconds for row in rows)
    took = f"{time_of(total)} of {time_of(sum(processes))}"
    if len(processes) > 1:
        took += f" in {len(processes)} processes"
    if not total:
        took = "a time that is measured on CPUs alone"
    if not found:
        last = "pyfused: no calls of its losses and activations"
    elif {row.path for row in rows} == {SMALL}:
        count = sum(row.count for row in rows)
        size = f"ATen is faster at the size of all {count:,} calls"
        last = f"pyfused: nothing gained: {size}, which took {took}"
    else:
        lines = table(found)
        last = f"losses and activations took {took}"
        if any(row.compared for row in rows if row.path.startswith(KERNEL)):
            with_torch = sum(row.with_torch or row.seconds for row in rows)
            last += f"; with torch {time_of(with_torch)}"
    if OTHERS:
        others = (f"{name} ({count:,})" for name, count in OTHERS.most_common())
        lines.append(f"not in pyfused: {', '.join(others)}")
    return "\n".join((*lines, last))


def table(found: dict[tuple[str, str], Row]) -> list[str]:
    lines = [("operator", "calls", "largest input", "path", "time", "with torch")]
    for (op, path), row in sorted(found.items(), key=lambda item: -item[1].seconds):
        times = time_of(row.seconds), time_of(row.with_torch)
        lines.append((op, f"{row.count:,}", f"{row.largest:,}", path, *times))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if title in ("operator", "path") else cell.rjust(width)
            for title, cell, width in zip(lines[0], line, widths, strict=True)
        )
        for line in lines
    ]


def time_of(seconds: float) -> str:
    digits = 0 if seconds >= 10 else 1 if seconds >= 1 else 3
    return f"{seconds:,.{digits}f} s" if seconds else "-"


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
        if name == "pyfused":
            importlib.import_module("pyfused.run").start(CALLS, OTHERS)
        else:
            with contextlib.suppress(ImportError):  # a child may be another Python
                importlib.import_module("pyfused")  # which may be what imports torch


if __name__ == "sitecustomize":
    # The program is to find sys.path and sitecustomize as they are without this one.
    sys.path[:] = [entry for entry in sys.path if entry != str(FOLDER)]
    this = sys.modules.pop(__name__)
    try:
        importlib.import_module(__name__)
    except ImportError as error:
        if error.name != __name__:
            raise
    sys.modules.setdefault(__name__, this)
    sys.meta_path.insert(0, AfterTorch)
    atexit.register(leave)  # the first, and so the last to be called
    if str(os.getpid()) != FIRST:
        util.Finalize(None, leave, exitpriority=0)
    # multiprocessing's forked children forget what was registered, and skip atexit.
    os.register_at_fork(after_in_child=forget)
    util.register_after_fork(leave, lambda _: util.Finalize(None, leave, exitpriority=0))
