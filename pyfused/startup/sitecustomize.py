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
from collections.abc import Iterator
from multiprocessing import util
from pathlib import Path
from typing import Any, BinaryIO

VARIABLE = "PYFUSED_RUN"
# The first process, which prints; the first line of the file that takes the counts; and its path.
RUN = os.environ.get(VARIABLE, "").split(" ", 2)
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


def name_file(path: str, descriptor: int) -> None:
    """Makes this process the first of a run, and this file the one that takes the counts."""
    RUN[:] = str(os.getpid()), os.urandom(16).hex(), path
    os.write(descriptor, f"{RUN[1]}\n".encode())
    os.environ[VARIABLE] = " ".join(RUN)


def open_file() -> BinaryIO | None:
    """The file that takes the counts, where a line can be read or appended; None after the run.

    It is known by its first line: another file may have its name by then, or another process the
    number of the first.
    """
    with contextlib.suppress(OSError, ValueError):
        _, token, path = RUN
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_APPEND), "r+b", buffering=0)
        if file.readline() == f"{token}\n".encode():
            return file
        file.close()
    return None


def leave() -> None:
    """Where a process ends: a child appends its counts to the file, and the first prints all."""
    seconds = time.perf_counter() - began
    with contextlib.suppress(Exception):  # the program is to end as it does by itself
        if RUN[0] == str(os.getpid()):
            processes = [seconds] if CALLS else []
            for brought in taken():
                for key, calls in brought["calls"]:
                    CALLS[tuple(key)].add(*calls)
                OTHERS.update(brought["others"])
                processes += [brought["seconds"]] if brought["calls"] else []
            print(summary(processes), file=sys.stderr)
        elif (CALLS or OTHERS) and (file := open_file()):
            calls = [(key, list(calls)) for key, calls in CALLS.items()]
            line = json.dumps({"calls": calls, "others": OTHERS, "seconds": seconds})
            with file:
                file.write(f"{line}\n".encode())  # one write, as other children append, too
    forget()


def taken() -> list[dict[str, Any]]:
    """What the children have brought; their file is removed."""
    file = open_file()
    if file is None:
        return []
    with file:
        lines = file.readlines()
    with contextlib.suppress(OSError):  # on Linux it has lost its name already
        Path(RUN[2]).unlink()
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def forget() -> None:
    global began
    began = time.perf_counter()
    CALLS.clear()
    OTHERS.clear()


# ---- the summary ---------------------------------------------------------------------------------


class Row:
    """The calls of one operator on one path, of all sizes together."""

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
        try:
            if name == "pyfused":
                importlib.import_module("pyfused.run").start(CALLS, OTHERS)
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
