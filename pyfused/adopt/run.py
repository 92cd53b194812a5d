"""Counts the calls of pyfused's operators, and estimates the time that their kernels save.

``python -m pyfused run train.py`` and :func:`pyfused.report` print the results.
"""

from __future__ import annotations

import atexit
import math
import os
import runpy
import sys
import threading
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from traceback import walk_tb
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfused import torch_internals
from pyfused.adopt.patch import patch
from pyfused.dispatch import call as dispatch
from pyfused.dispatch import reasons
from pyfused.dispatch.call import decide  # the original, which does not count
from pyfused.dispatch.operator import Arguments, Operator
from pyfused.dispatch.originals import torch_alone
from pyfused.dispatch.signature import PLAIN
from pyfused.ops import custom_operators

BUDGET = 0.25  # seconds for re-running calls of an operator
MOST = 1 << 24  # elements of a call that is re-run; of a larger call, only the first rows


@dataclass
class Calls:
    """Calls of one operator's kernels, of similar size, with or without gradients.

    Attributes:
        count: The number of calls.
        largest: The number of elements of the largest call's input, or of a linear layer's logits.
        elements: The number of elements of all calls together.
        times: The seconds per element with pyfused and with torch, for each call that was re-run.
        due: The number of the next call to re-run.
    """

    count: int = 0
    largest: int = 0
    elements: int = 0
    times: list[tuple[float, float]] = field(default_factory=list)
    due: float = 1


class Row(NamedTuple):
    """The calls of one operator's kernels, of all sizes; the times are estimates."""

    op: str
    calls: int
    largest: int
    compared: int
    pyfused: float
    torch: float


class Report:
    """The result of :func:`pyfused.report`; its ``str`` and ``repr`` are the table."""

    def __init__(self, compare: bool = False) -> None:
        self._budget = math.inf if compare else BUDGET
        # Keys: the operator, bits of the size, and whether gradients are needed.
        self._kernels: defaultdict[tuple[str, int, bool], Calls] = defaultdict(Calls)
        self._small: Counter[str] = Counter()  # calls that were too small for a kernel
        self._fallbacks: Counter[tuple[str, str]] = Counter()  # by operator and other reason
        self._compiled: Counter[str] = Counter()  # calls of kernels in compiled programs
        self._comparing: defaultdict[str, float] = defaultdict(float)  # seconds, by operator
        self._seconds, self._began = 0.0, perf_counter()
        self._lock = threading.Lock()  # of the thread that compares

    # A mode could not count, because calls fall back to torch while a mode is active.
    def __enter__(self) -> Report:
        self._began = perf_counter()
        self._uncounted = dispatch.decide, dispatch.is_small, custom_operators.compute
        dispatch.decide, dispatch.is_small = self._decide, self._is_small
        custom_operators.compute = self._compute
        return self

    def __exit__(self, *error: object) -> None:
        dispatch.decide, dispatch.is_small, custom_operators.compute = self._uncounted
        if torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()  # include the time of launched kernels
        self._seconds += perf_counter() - self._began

    def _is_small(self, op: Operator, arguments: Arguments, elements: int | None = None) -> bool:
        is_small = self._uncounted[1](op, arguments, elements)
        if is_small:
            self._small[op.name] += 1
        return is_small

    def _compute(self, op: str, function: Any, *arguments: Any) -> Any:
        if len(arguments) == 1:  # a backward pass has more
            self._compiled[op] += 1
        return self._uncounted[2](op, function, *arguments)

    def _decide(self, op: Operator, arguments: Arguments, inplace: bool) -> dispatch.Decision:
        plan = self._uncounted[0](op, arguments, inplace)
        if torch_internals.compiler_traces():
            return plan
        if plan.run is None:
            self._fallbacks[op.name, str(plan.reason)] += 1
        else:
            self._count(op, arguments)
        return plan

    def _count(self, op: Operator, arguments: Arguments) -> None:
        needs_grad = torch.is_grad_enabled() and any(
            isinstance(value, Tensor) and value.requires_grad for value in arguments
        )
        elements = op.elements(arguments)
        calls = self._kernels[op.name, elements.bit_length(), needs_grad]
        calls.count += 1
        calls.elements += elements
        calls.largest = max(calls.largest, elements)
        if calls.count < calls.due or self._comparing[op.name] > self._budget:
            return
        if not self._lock.acquire(blocking=False):  # times that overlap cannot be subtracted
            return
        calls.due = 2 * calls.count
        start = perf_counter()
        if _can_be_repeated(op, arguments):
            try:
                calls.times.append(_times(op, arguments))
            except Exception:  # for example, out of memory
                calls.due = math.inf
        self._comparing[op.name] += perf_counter() - start
        self._lock.release()

    # ---- the table ----

    def _rows(self, ran: float) -> list[Row]:
        """Returns a row for each operator whose kernels ran, the slowest first."""
        rows = []
        for op in dict.fromkeys(op for op, *_ in self._kernels):
            kinds = [calls for key, calls in self._kernels.items() if key[0] == op]
            compared = [calls for calls in kinds if calls.times]
            times = [0.0, 0.0]
            for calls in compared:
                for i, seconds in enumerate(zip(*calls.times, strict=True)):
                    median = sorted(seconds)[(len(seconds) - 1) // 2]
                    times[i] += calls.elements * median
            # Other sizes are assumed to take the same time per element.
            known = sum(calls.elements for calls in compared)
            scale = sum(calls.elements for calls in kinds) / max(known, 1)
            rows.append(
                Row(
                    op,
                    sum(calls.count for calls in kinds),
                    max(calls.largest for calls in kinds),
                    sum(len(calls.times) for calls in kinds),
                    *(scale * seconds for seconds in times),
                )
            )
        # An estimate includes a backward pass for each call that may have one, even if none ran.
        part = min(1.0, ran / max(sum(row.pyfused for row in rows), 1e-9))
        rows = [row._replace(pyfused=part * row.pyfused, torch=part * row.torch) for row in rows]
        return sorted(rows, key=lambda row: -row.torch)

    def __repr__(self) -> str:
        seconds = self._seconds - sum(self._comparing.values())
        rows, ran = self._rows(seconds), time_of(seconds)
        if not (rows or self._fallbacks or self._compiled):
            if not self._small:
                return "pyfused: no losses or activations were called"
            calls = f"all calls ({self._small.total():,})"
            return f"pyfused: no speed-up: {calls} were too small for a kernel, in {ran}"
        lines = table(rows) if rows else []
        left = [f"{op} ({n:,}: {reason})" for (op, reason), n in self._fallbacks.most_common()]
        left += [f"{op} ({n:,}: {reasons.SMALL})" for op, n in self._small.most_common()]
        if left:
            lines.append(f"left to torch: {', '.join(left)}")
        unknown = [f"{row.op} ({row.calls:,})" for row in rows if not row.compared]
        unknown += [f"{op} ({n:,}, compiled)" for op, n in self._compiled.most_common()]
        if unknown:
            lines.append(f"not compared: {', '.join(unknown)}")
        if not (rows or self._compiled):
            lines.append(f"pyfused: no speed-up: no kernel ran, in {ran}")
        if compared := sum(row.compared for row in rows):
            least = "at least " if unknown else ""
            ours, theirs = sum(row.pyfused for row in rows), sum(row.torch for row in rows)
            saved = theirs - ours
            lines.append(
                f"kernels took {least}{time_of(ours)} of {ran}; torch's operators would have taken "
                f"{least}{time_of(theirs)} (estimated by re-running calls with both: {compared:,})"
            )
            if saved > 0.0005:
                without = seconds + saved
                share = f"{time_of(saved)} of {time_of(without)} ({saved / without:.0%})"
                lines.append(f"pyfused saved about {share}")
            elif saved < -0.0005:
                lines.append(
                    f"pyfused was slower by about {time_of(-saved)}: run python -m pyfused tune, "
                    "or do not use it for this program"
                )
            else:
                lines.append("pyfused made no measurable difference")
        return "\n".join(lines)


def table(rows: Sequence[Row]) -> list[str]:
    lines = [("operator", "calls", "largest input", "pyfused", "torch")]
    for row in rows:
        times = (time_of(row.pyfused), time_of(row.torch)) if row.compared else ("-", "-")
        lines.append((row.op, f"{row.calls:,}", f"{row.largest:,}", *times))
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    return ["  ".join((line[0].ljust(first), *map(str.rjust, line[1:], others))) for line in lines]


def time_of(seconds: float) -> str:
    digits = 0 if seconds >= 10 else 1 if seconds >= 1 else 3
    return f"{seconds:,.{digits}f} s"


# ---- a call that is re-run -----------------------------------------------------------------------


def _rows(arguments: Arguments) -> int:
    return math.prod(arguments[0].shape[:1])


def _can_be_repeated(op: Operator, arguments: Arguments) -> bool:
    """Returns whether no hook, mode, profiler or CUDA graph would observe a repeated call."""
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    on_gpu = tensors[0].is_cuda and not torch.cuda.is_current_stream_capturing()
    return (
        0 < op.elements(arguments) <= MOST * _rows(arguments)
        and (tensors[0].is_cpu or on_gpu)
        and all(type(tensor) in PLAIN for tensor in tensors)
        and torch_internals.active_mode() is None
        and not torch_internals.is_observed()
    )


def _times(op: Operator, arguments: Arguments) -> tuple[float, float]:
    """Returns the seconds per element of a call with pyfused and with torch.

    The tensors are detached and not overwritten, so the program's results do not change.
    """
    elements, rows = op.elements(arguments), _rows(arguments)
    if elements > MOST:
        kept = math.ceil(rows * MOST / elements)
        arguments = tuple(
            value[:kept] if isinstance(value, Tensor) and value.shape[:1] == (rows,) else value
            for value in arguments
        )
        elements = op.elements(arguments)
    kernel = decide(op, arguments, False).run
    assert kernel is not None
    with warnings.catch_warnings(), torch_alone:
        warnings.simplefilter("ignore")
        # The first run includes allocating memory and starting threads.
        ours = min(_seconds(kernel, arguments) for _ in range(2))
        theirs = min(_seconds(lambda given: op.builtin(*given), arguments) for _ in range(2))
    return ours / elements, theirs / elements


def _seconds(function: Callable[[Arguments], Any], arguments: Arguments) -> float:
    """Returns the seconds that the forward and the backward pass take."""
    arguments = tuple(
        value.detach().requires_grad_(value.requires_grad and torch.is_grad_enabled())
        if isinstance(value, Tensor)
        else value
        for value in arguments
    )
    leaves = [value for value in arguments if isinstance(value, Tensor) and value.requires_grad]
    wait: Callable[[], Any] = torch.cuda.synchronize if arguments[0].is_cuda else int

    def timed(call: Callable[[], Any]) -> tuple[float, Any]:
        wait()
        start = perf_counter()
        result = call()
        wait()
        return perf_counter() - start, result

    seconds, result = timed(lambda: function(arguments))
    if leaves:
        grad_output = torch.ones_like(result)
        backward = partial(torch.autograd.grad, result, leaves, grad_output, allow_unused=True)
        seconds += timed(backward)[0]
    return seconds


# ---- public functions ----------------------------------------------------------------------------


def report(compare: bool = False) -> Report:
    """Counts the calls of pyfused's operators in a ``with`` block, and compares some with torch's.

    It gives the same report as ``python -m pyfused run``, for example in a notebook::

        with pyfused.patch(), pyfused.report() as report:
            train()
        print(report)

    Args:
        compare: Compares more calls, without a time limit, for better estimates.
    """
    return Report(compare)


def run(program: str, arguments: Sequence[str], module: bool, compare: bool) -> None:
    """Runs a program as ``python`` does, with torch patched, and prints a report to stderr.

    If ``torchrun`` starts several processes, all are patched, and rank 0 counts and prints.

    Args:
        program: The path of a script, a folder or an archive, or the name of a module.
        module: Whether ``program`` is the name of a module.
        compare: Compares more calls, for better estimates.
    """
    report, process = Report(compare), os.getpid()

    def end() -> None:
        if os.getpid() == process:  # not in a forked child
            report.__exit__()
            ranks = int(os.environ.get("WORLD_SIZE", "1"))
            if ranks > 1:
                print(f"pyfused: rank 0 of {ranks}:", file=sys.stderr)
            print(report, file=sys.stderr)

    patch().__enter__()  # also for threads and exit handlers that outlive the program
    if os.environ.get("RANK", "0") == "0":
        report.__enter__()
        atexit.register(end)  # registered first, so called last
    sys.argv[:] = program, *arguments
    try:
        if module:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            path = Path(program)
            if not getattr(sys.flags, "safe_path", sys.flags.isolated):  # -m has added a folder
                sys.path[:1] = [] if path.is_dir() else [str(path.resolve().parent)]
            runpy.run_path(str(path.absolute()), run_name="__main__")
    except (ImportError, OSError) as error:
        *_, (frame, _) = walk_tb(error.__traceback__)
        if frame.f_globals["__name__"] != "runpy":  # the program had started
            raise
        atexit.unregister(end)
        if isinstance(error, ImportError):
            sys.exit(f"{sys.executable}: {error}")
        reason = f"[Errno {error.errno}] {error.strerror}"
        print(f"{sys.executable}: can't open file {error.filename!r}: {reason}", file=sys.stderr)
        sys.exit(2)
