"""Counts the calls of pyfused's operators, and estimates the time that their kernels save."""

from __future__ import annotations

import math
import threading
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from pyfused import torch_internals
from pyfused.dispatch import reasons
from pyfused.dispatch import run as dispatch
from pyfused.dispatch.operator import Case, Numbers, Operator, Tensors
from pyfused.dispatch.originals import torch_alone
from pyfused.dispatch.run import decide  # the original function, which counts nothing
from pyfused.dispatch.signature import PLAIN
from pyfused.ops import custom_operators

BUDGET = 0.25  # seconds for re-running calls of an operator
MOST = 1 << 24  # elements of a re-run call; for a larger call, only the first rows are re-run
NOISE = 0.25  # the smallest relative deviation assumed, because few samples may agree by chance


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

    def estimates(self) -> list[float]:
        """Returns the seconds with pyfused and with torch, and the error of their difference."""
        ours, theirs = zip(*self.times, strict=True)
        error = _error_of_median(ours) + _error_of_median(theirs)
        return [self.elements * seconds for seconds in (_median(ours), _median(theirs), error)]


def _median(values: Sequence[float]) -> float:
    ordered, middle = sorted(values), len(values) // 2  # importing statistics takes milliseconds
    return (ordered[middle] + ordered[-1 - middle]) / 2


def _error_of_median(times: Sequence[float]) -> float:
    """Returns about two standard errors; two deviations are three median absolute deviations."""
    middle = _median(times)
    deviation = _median([abs(time - middle) for time in times])
    return max(3 * deviation, NOISE * middle) / math.sqrt(len(times))


Call = tuple[Tensors, Numbers, Case]


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
        self._seconds = 0.0  # of the blocks that have ended
        self._began: float | None = None  # the start of the current block
        self._first_call: float | None = None  # the seconds until the first call

    def __enter__(self) -> Report:
        global _reports, _uncounted
        self._began = _clock()
        with _changes:
            if not _reports:
                _uncounted = dispatch.decide, dispatch.is_small, custom_operators.compute
                dispatch.decide, dispatch.is_small = _decide, _is_small
                custom_operators.compute = _compute
            _reports = (*_reports, self)
        return self

    def __exit__(self, *error: object) -> None:
        global _reports
        with _changes:
            _reports = tuple([report for report in _reports if report is not self])
            if not _reports:
                dispatch.decide, dispatch.is_small, custom_operators.compute = _uncounted
        if torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()  # include the time of launched kernels
        self._seconds, self._began = self._elapsed(), None

    def _elapsed(self) -> float:
        """Returns the seconds of all blocks, without the time of comparisons."""
        return self._seconds + (0.0 if self._began is None else _clock() - self._began)

    def _add(self, counter: Counter[Any], key: Any) -> None:
        self._note_first_call()
        counter[key] += 1

    def _note_first_call(self) -> None:
        if self._first_call is None:
            self._first_call = self._elapsed()

    def _count(self, op: Operator, call: Call, decision: dispatch.Decision) -> None:
        (tensors, _, _), (reason, kernel, _) = call, decision
        if kernel is None:
            self._add(self._fallbacks, (op.name, str(reason)))
            return
        self._note_first_call()
        needs_grad = torch.is_grad_enabled() and any(
            isinstance(x, Tensor) and x.requires_grad for x in tensors
        )
        elements = op.elements(tensors)
        calls = self._kernels[op.name, elements.bit_length(), needs_grad]
        calls.count += 1
        calls.elements += elements
        calls.largest = max(calls.largest, elements)
        if calls.count >= calls.due and self._comparing[op.name] <= self._budget:
            self._comparing[op.name] += _compare(op, call, calls)

    # ---- the result ----

    def to_dict(self) -> dict[str, Any]:
        """Returns the counts and the estimates, for logging; ``json`` can write them.

        Returns:
            ``seconds``: the time of the block, without comparisons; ``seconds_from_first_call``:
            the same without the program's start. ``saved_seconds``: the time saved by the compared
            operators, negative if pyfused was slower, and ``saved_error``: its uncertainty; both
            are None if no call was compared. ``operators``: for each operator whose kernels ran,
            ``calls``, ``largest_input`` in elements, ``compared`` calls, ``pyfused_seconds`` and
            ``torch_seconds``. ``left_to_torch``: the number of calls by operator and reason.
            ``compiled``: the number of calls in compiled programs by operator.
        """
        seconds = self._elapsed()
        operators: dict[str, dict[str, Any]] = {}
        times: dict[str, list[float]] = {}  # with pyfused, with torch, and the error
        for op in dict.fromkeys(op for op, *_ in self._kernels):
            kinds = [calls for key, calls in self._kernels.items() if key[0] == op]
            operators[op] = {
                "calls": sum(calls.count for calls in kinds),
                "largest_input": max(calls.largest for calls in kinds),
                "compared": sum(len(calls.times) for calls in kinds),
                "pyfused_seconds": None,
                "torch_seconds": None,
            }
            compared = [calls for calls in kinds if calls.times]
            if compared:
                # Other sizes are assumed to take the same time per element.
                known = sum(calls.elements for calls in compared)
                scale = sum(calls.elements for calls in kinds) / max(known, 1)
                estimates = zip(*[calls.estimates() for calls in compared], strict=True)
                times[op] = [scale * sum(each) for each in estimates]
        # An estimate includes a backward pass for each call that may have one, even if none ran.
        part = min(1.0, seconds / max(sum(ours for ours, _, _ in times.values()), 1e-9))
        saved = error = 0.0
        for op, estimate in times.items():
            ours, theirs, error_of_op = [part * each for each in estimate]
            operators[op] |= {"pyfused_seconds": ours, "torch_seconds": theirs}
            saved, error = saved + theirs - ours, error + error_of_op
        slowest = sorted(operators, key=lambda op: -(operators[op]["torch_seconds"] or 0.0))
        left: defaultdict[str, dict[str, int]] = defaultdict(dict)
        for (op, reason), count in self._left_to_torch():
            left[op][reason] = count
        return {
            "seconds": seconds,
            "seconds_from_first_call": seconds - (self._first_call or 0.0),
            "saved_seconds": saved if times else None,
            "saved_error": error if times else None,
            "operators": {op: operators[op] for op in slowest},
            "left_to_torch": dict(left),
            "compiled": dict(self._compiled),
        }

    def _left_to_torch(self) -> list[tuple[tuple[str, str], int]]:
        """Returns operators with reasons, and numbers of calls; small calls come last."""
        small = [((op, reasons.SMALL), count) for op, count in self._small.most_common()]
        return self._fallbacks.most_common() + small

    def __repr__(self) -> str:
        results = self.to_dict()
        rows, ran = results["operators"], time_of(results["seconds"])
        if not (rows or self._fallbacks or self._compiled):
            if not self._small:
                return "pyfused: no losses or activations were called"
            calls = f"all calls ({self._small.total():,})"
            return f"pyfused: no speed-up: {calls} were too small for a kernel, in {ran}"
        lines = table(rows) if rows else []
        left = [f"{op} ({n:,}: {reason})" for (op, reason), n in self._left_to_torch()]
        if left:
            lines.append(f"left to torch: {', '.join(left)}")
        compared = [row for row in rows.values() if row["compared"]]
        unknown = [f"{op} ({row['calls']:,})" for op, row in rows.items() if not row["compared"]]
        unknown += [f"{op} ({n:,}, compiled)" for op, n in self._compiled.most_common()]
        if unknown:
            lines.append(f"not compared: {', '.join(unknown)}")
        if not (rows or self._compiled):
            lines.append(f"pyfused: no speed-up: no kernel ran, in {ran}")
        if compared:
            least = "at least " if unknown else ""
            ours, theirs, count = (
                sum(row[key] for row in compared)
                for key in ("pyfused_seconds", "torch_seconds", "compared")
            )
            lines.append(
                f"kernels took {least}{time_of(ours)} of {ran}; torch's operators would have taken "
                f"{least}{time_of(theirs)} (estimated by re-running calls with both: {count:,})"
            )
            lines.append(_verdict(results))
        return "\n".join(lines)


def _verdict(results: dict[str, Any]) -> str:
    saved, seconds = results["saved_seconds"], results["seconds"]
    if abs(saved) < max(results["saved_error"], 0.005 * seconds, 0.0005):
        return "pyfused made no measurable difference"
    if saved < 0:
        return (
            f"pyfused was slower by about {time_of(-saved)}: run python -m pyfused tune, or do "
            "not use it for this program"
        )
    share = f"{saved / (seconds + saved):.0%}"
    verdict = f"pyfused saved about {time_of(saved)} of {time_of(seconds + saved)} ({share})"
    from_first_call = f"{saved / (results['seconds_from_first_call'] + saved):.0%}"
    if from_first_call != share:
        verdict += f", or {from_first_call} of the time since the first call"
    return verdict


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    lines = [("operator", "calls", "largest input", "pyfused", "torch")]
    for op, row in rows.items():
        ours, theirs = (
            "-" if seconds is None else time_of(seconds)
            for seconds in (row["pyfused_seconds"], row["torch_seconds"])
        )
        lines.append((op, f"{row['calls']:,}", f"{row['largest_input']:,}", ours, theirs))
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    return ["  ".join((line[0].ljust(first), *map(str.rjust, line[1:], others))) for line in lines]


def time_of(seconds: float) -> str:
    digits = 0 if seconds >= 10 else 1 if seconds >= 1 else 3
    return f"{seconds:,.{digits}f} s"


# ---- hooks in dispatch ---------------------------------------------------------------------------

# A mode cannot count calls, because calls fall back to torch while a mode is active.
_reports: tuple[Report, ...] = ()  # the reports of current blocks
_changes = threading.Lock()  # held while _reports changes
_uncounted: tuple[Any, ...] = ()  # the functions that the hooks replace


def _is_small(op: Operator, tensors: Tensors, case: Case, elements: int | None = None) -> bool:
    is_small: bool = _uncounted[1](op, tensors, case, elements)
    if is_small:
        for report in _reports:
            report._add(report._small, op.name)
    return is_small


def _compute(name: str, function: Any, *values: Any) -> Any:
    if not name.endswith("_backward"):
        for report in _reports:
            report._add(report._compiled, name)
    return _uncounted[2](name, function, *values)


def _decide(op: Operator, tensors: Tensors, numbers: Numbers, case: Case) -> dispatch.Decision:
    decision: dispatch.Decision = _uncounted[0](op, tensors, numbers, case)
    if not torch_internals.compiler_traces():
        for report in _reports:
            report._count(op, (tensors, numbers, case), decision)
    return decision


# ---- a call that is re-run -----------------------------------------------------------------------


_comparing = threading.Lock()  # overlapping comparisons could not be subtracted
_compared = 0.0  # the seconds that all comparisons have taken


def _clock() -> float:
    """Returns seconds that exclude comparisons, including comparisons of other reports."""
    return perf_counter() - _compared


def _compare(op: Operator, call: Call, calls: Calls) -> float:
    """Re-runs a call with both, unless another thread does; returns the seconds that this took."""
    global _compared
    if not _comparing.acquire(blocking=False):
        return 0.0
    start = perf_counter()
    try:
        calls.due = 2 * calls.count
        if _can_be_repeated(op, call[0]):
            calls.times.append(_times(op, *call))
    except Exception:  # for example, out of memory
        calls.due = math.inf
    finally:
        seconds = perf_counter() - start
        _compared += seconds
        _comparing.release()
    return seconds


def _can_be_repeated(op: Operator, tensors: Tensors) -> bool:
    """Returns whether no hook, mode, profiler or CUDA graph would observe a repeated call."""
    present = [x for x in tensors if isinstance(x, Tensor)]
    input = tensors[0]
    on_gpu = input.is_cuda and not torch.cuda.is_current_stream_capturing()
    return (
        0 < op.elements(tensors) <= MOST * math.prod(input.shape[:1])
        and (input.is_cpu or on_gpu)
        and all(type(x) in PLAIN for x in present)
        and torch_internals.active_mode() is None
        and not torch_internals.is_observed()
    )


def _times(op: Operator, tensors: Tensors, numbers: Numbers, case: Case) -> tuple[float, float]:
    """Returns the seconds per element of a call with pyfused and with torch.

    The tensors are detached and not overwritten, so the program's results do not change.
    """
    elements, rows = op.elements(tensors), math.prod(tensors[0].shape[:1])
    if elements > MOST:
        kept = math.ceil(rows * MOST / elements)
        tensors = [
            x[:kept] if isinstance(x, Tensor) and x.shape[:1] == (rows,) else x for x in tensors
        ]
        elements = op.elements(tensors)
    _, kernel, floats = decide(op, tensors, numbers, case)
    assert kernel is not None
    torch_function = op.fast or op.torch
    with warnings.catch_warnings(), torch_alone:
        warnings.simplefilter("ignore")
        # The first run includes allocating memory and starting threads.
        ours = min(_seconds(lambda operands: kernel(operands, floats), tensors) for _ in range(2))
        theirs = min(
            _seconds(lambda operands: torch_function(*operands, *numbers, *case), tensors)
            for _ in range(2)
        )
    return ours / elements, theirs / elements


def _seconds(function: Callable[[Tensors], Any], tensors: Tensors) -> float:
    """Returns the seconds that the forward and the backward pass take."""
    tensors = [
        x.detach().requires_grad_(x.requires_grad and torch.is_grad_enabled())
        if isinstance(x, Tensor)
        else x
        for x in tensors
    ]
    leaves = [x for x in tensors if isinstance(x, Tensor) and x.requires_grad]
    wait: Callable[[], Any] = torch.cuda.synchronize if tensors[0].is_cuda else int

    def timed(call: Callable[[], Any]) -> tuple[float, Any]:
        wait()
        start = perf_counter()
        result = call()
        wait()
        return perf_counter() - start, result

    seconds, result = timed(lambda: function(tensors))
    if leaves:
        grad_output = torch.ones_like(result)
        backward = partial(torch.autograd.grad, result, leaves, grad_output, allow_unused=True)
        seconds += timed(backward)[0]
    return seconds


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
