"""Counts the calls of pyfused's operators, and compares some of them with torch's.

``python -m pyfused run train.py`` and :func:`pyfused.report` print what is counted here.
"""

from __future__ import annotations

import atexit
import math
import os
import runpy
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from traceback import walk_tb
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import grad
from torch.nn import Parameter

from pyfused import torch_internals
from pyfused.adopt.patch import patch
from pyfused.dispatch import call as dispatch
from pyfused.dispatch import reasons
from pyfused.dispatch.operator import Arguments, Operator
from pyfused.ops import custom_operators
from pyfused.ops.activation import Activation
from pyfused.ops.composed import Composed
from pyfused.ops.pointwise_loss import TensorLoss

SHARE = 0.003  # of the program's time that comparisons of an operator may take, beside BEGINNING
BEGINNING = 0.25  # seconds, so that calls of a short program are compared as well
MOST = 1 << 24  # elements of a compared call; one of more is cut, for the sake of memory
SHORT = 0.01  # seconds; a shorter call is measured twice, and the better time counts

plan_of = dispatch.plan_of  # which does not count


@dataclass
class Calls:
    """Calls of one operator's kernels, alike in size and in whether gradients are needed.

    Attributes:
        count: The number of calls.
        largest: The elements of the largest input, or of a linear layer's logits.
        elements: The elements of all inputs together.
        repeats: The seconds per element, of pyfused and of torch, of each call that was repeated.
        due: The number of the next call to compare.
    """

    count: int = 0
    largest: int = 0
    elements: int = 0
    repeats: list[tuple[float, float]] = field(default_factory=list)
    due: float = 1


class Row(NamedTuple):
    """The calls of one operator's kernels, of all sizes together; both times are estimates."""

    op: str
    calls: int
    largest: int
    compared: int
    ours: float
    theirs: float


class Report:
    """What :func:`pyfused.report` returns: its ``str`` and ``repr`` are the table.

    The program sees no error of counting; the table shows it. Counting is no mode, as torch's
    operators would take the calls while one is active.
    """

    def __init__(self, compare: bool = False) -> None:
        self._compare = compare  # more calls, whatever time that takes
        # By operator, bits of the size, and whether gradients are needed.
        self._kernels: defaultdict[tuple[str, int, bool], Calls] = defaultdict(Calls)
        self._small: Counter[str] = Counter()  # calls that are left to torch for their size
        self._left: Counter[tuple[str, str]] = Counter()  # by operator and another reason
        self._compiled: Counter[str] = Counter()  # calls of kernels in compiled programs
        self._failed: dict[str, str] = {}  # errors of counting
        self._comparing: defaultdict[str, float] = defaultdict(float)  # seconds, by operator
        self._seconds, self._began = 0.0, perf_counter()

    def __enter__(self) -> Report:
        self._began = perf_counter()
        self._uncounted = dispatch.plan_of, dispatch.is_small, custom_operators.compute
        self._replace(self._plan_of, self._is_small, self._compute)
        return self

    def __exit__(self, *error: object) -> None:
        self._replace(*self._uncounted)
        if torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()  # else the block seems to end where its kernels are launched
        self._seconds += perf_counter() - self._began

    @staticmethod
    def _replace(plan_of: Any, is_small: Any, compute: Any) -> None:
        for module, name, function in (
            (dispatch, "plan_of", plan_of),
            (dispatch, "is_small", is_small),
            (custom_operators, "compute", compute),
        ):
            setattr(module, name, function)

    # ---- counting ----

    def _is_small(self, op: Operator, arguments: Arguments) -> bool:
        if self._uncounted[1](op, arguments):
            self._small[op.name] += 1
            return True
        return False

    def _compute(self, op: str, function: Any, *arguments: Any) -> Any:
        if len(arguments) == 1:  # a backward pass has more
            self._compiled[op] += 1
        return self._uncounted[2](op, function, *arguments)

    def _plan_of(self, op: Operator, arguments: Arguments, inplace: bool) -> dispatch.Plan:
        plan = self._uncounted[0](op, arguments, inplace)
        try:
            self._count(plan, op, arguments, inplace)
        except Exception as error:
            self._failed[op.name] = repr(error)
        return plan

    def _count(
        self, plan: dispatch.Plan, op: Operator, arguments: Arguments, inplace: bool
    ) -> None:
        if torch_internals.compiler_traces():
            return
        if plan.run is None:
            self._left[op.name, str(plan.reason)] += 1
            return
        elements = _elements(op, arguments)
        if type(elements) is not int:  # a tensor, to torch.jit.trace
            return
        needs_grad = torch.is_grad_enabled() and any(
            isinstance(value, Tensor) and value.requires_grad for value in arguments
        )
        calls = self._kernels[op.name, elements.bit_length(), needs_grad]
        calls.count += 1
        calls.elements += elements
        calls.largest = max(calls.largest, elements)
        if calls.count < calls.due:
            return
        start = perf_counter()
        allowed = SHARE * (start - self._began) + BEGINNING
        if self._comparing[op.name] > allowed and not self._compare:
            return  # until there is time
        calls.due = max(calls.count + 1, calls.count * (1.25 if self._compare else 2))
        if _can_be_repeated(op, arguments, inplace):
            try:
                calls.repeats.append(_times(op, arguments, inplace, first=not calls.repeats))
            except Exception:
                calls.due = math.inf
        self._comparing[op.name] += perf_counter() - start

    # ---- the table ----

    def _rows(self, ran: float) -> list[Row]:
        """Returns a row for each operator with kernels, the one that took longest first."""
        rows = []
        for op in dict.fromkeys(op for op, *_ in self._kernels):
            kinds = {key[1:]: calls for key, calls in self._kernels.items() if key[0] == op}
            medians = {
                kind: [_median(column) for column in zip(*calls.repeats, strict=True)]
                for kind, calls in kinds.items()
                if calls.repeats
            }
            ours = theirs = 0.0
            for (bits, needs_grad), calls in kinds.items() if medians else ():
                nearest = min(medians, key=lambda k: (k[1] != needs_grad, abs(k[0] - bits)))
                ours += calls.elements * medians[nearest][0]
                theirs += calls.elements * medians[nearest][1]
            largest = max(calls.largest for calls in kinds.values())
            count = sum(calls.count for calls in kinds.values())
            compared = sum(len(calls.repeats) for calls in kinds.values())
            rows.append(Row(op, count, largest, compared, ours, theirs))
        # An estimate has a backward pass for each call that may have one, which may never have run.
        part = min(1.0, ran / max(sum(row.ours for row in rows), 1e-9))
        scaled = (row._replace(ours=part * row.ours, theirs=part * row.theirs) for row in rows)
        return sorted(scaled, key=lambda row: -row.theirs)

    def __repr__(self) -> str:
        if self._failed:
            return "\n".join(f"not counted: {op}: {error}" for op, error in self._failed.items())
        seconds = self._seconds - sum(self._comparing.values())
        rows, ran = self._rows(seconds), time_of(seconds)
        if not (rows or self._small or self._left or self._compiled):
            return "pyfused: no calls of its losses and activations"
        if not (rows or self._left or self._compiled):
            size = f"the size of all calls ({self._small.total():,})"
            return f"pyfused: nothing gained: ATen is faster at {size}, in {ran}"
        lines = table(rows) if rows else []
        left = [f"{op} ({count:,}: {reason})" for (op, reason), count in self._left.most_common()]
        left += [f"{op} ({count:,}: {reasons.SMALL})" for op, count in self._small.most_common()]
        if left:
            lines.append(f"left to torch: {', '.join(left)}")
        unknown = [f"{row.op} ({row.calls:,})" for row in rows if not row.compared]
        unknown += [f"{op} ({count:,}, compiled)" for op, count in self._compiled.most_common()]
        if unknown:
            lines.append(f"not compared: {', '.join(unknown)}")
        if not (rows or self._compiled):
            lines.append(f"pyfused: nothing gained: no kernel ran, in {ran}")
        if compared := sum(row.compared for row in rows):
            least = "at least " if unknown else ""
            ours, theirs = sum(row.ours for row in rows), sum(row.theirs for row in rows)
            loss = ours - theirs
            slower = f": pyfused was slower by {time_of(loss)}" if loss > 0.0005 else ""
            lines.append(
                f"pyfused's kernels took {least}{time_of(ours)} of {ran}; torch's operators would "
                f"have taken {least}{time_of(theirs)}{slower} "
                f"(estimated from calls that both made again: {compared:,})"
            )
        return "\n".join(lines)


def table(rows: Sequence[Row]) -> list[str]:
    lines = [("operator", "calls", "largest input", "pyfused", "torch")]
    for row in rows:
        times = (time_of(row.ours), time_of(row.theirs)) if row.compared else ("-", "-")
        lines.append((row.op, f"{row.calls:,}", f"{row.largest:,}", *times))
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    return ["  ".join((line[0].ljust(first), *map(str.rjust, line[1:], others))) for line in lines]


def _median(numbers: Sequence[float]) -> float:
    return sorted(numbers)[(len(numbers) - 1) // 2]


def time_of(seconds: float) -> str:
    digits = 0 if seconds >= 10 else 1 if seconds >= 1 else 3
    return f"{seconds:,.{digits}f} s"


# ---- a call that is repeated ---------------------------------------------------------------------


def _times(op: Operator, arguments: Arguments, inplace: bool, first: bool) -> tuple[float, float]:
    """Returns the seconds per element that a call takes with pyfused and with torch.

    The program sees nothing of it: the tensors are detached, none is overwritten, and no random
    number is drawn.
    """
    arguments = _cut(op, arguments)
    elements = _elements(op, arguments)
    if elements > 4 * MOST:
        raise MemoryError("a call that cannot be cut")
    torch_function: Callable[..., Any] = op.aten_ if inplace else op.aten
    run = plan_of(op, arguments, inplace).run
    assert run is not None
    if first:  # a kernel's first time takes new memory, and starts threads
        _seconds(run, arguments, inplace)
    found = []
    for function in (run, lambda arguments: torch_function(*arguments)):
        seconds = _seconds(function, arguments, inplace)
        again = _seconds(function, arguments, inplace) if seconds < SHORT else seconds
        found.append(min(seconds, again) / elements)
    return found[0], found[1]


def _can_be_repeated(op: Operator, arguments: Arguments, inplace: bool) -> bool:
    """Returns whether nobody sees it, neither a hook or mode nor who reads warnings."""
    named = dict(zip(op.arguments, arguments, strict=True))
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    pointwise = isinstance(op, (TensorLoss, Composed))
    captured = tensors[0].is_cuda and torch.cuda.is_current_stream_capturing()
    return (
        tensors[0].numel() > 0
        and all(type(tensor) in (Tensor, Parameter) for tensor in tensors)
        and (tensors[0].is_cpu or (tensors[0].is_cuda and not captured))
        and not (inplace and not isinstance(op, Activation))  # whose input holds a gradient then
        and not (pointwise and any(t.shape != tensors[0].shape for t in tensors[1:2]))
        and (named.get("size_average"), named.get("reduce")) == (None, None)
        and not (op.name == "kl_div" and named["reduction"] == "mean")
        and named.get("dim", 0) is not None
        and torch_internals.active_mode() is None
        and not torch_internals.is_observed()
    )


def _elements(op: Operator, arguments: Arguments) -> int:
    """Returns the number of elements of the input, or of a linear layer's logits."""
    return op.elements(arguments) if op.counts_logits else arguments[0].numel()


def _cut(op: Operator, arguments: Arguments) -> Arguments:
    """Returns the arguments, or those of the first rows if there are too many."""
    elements = _elements(op, arguments)
    if elements <= MOST:
        return arguments
    rows = len(arguments[0])
    kept = math.ceil(rows * MOST / elements)
    return tuple(
        value[:kept] if isinstance(value, Tensor) and value.shape[:1] == (rows,) else value
        for value in arguments
    )


def _seconds(function: Callable[[Arguments], Any], given: Arguments, inplace: bool) -> float:
    """Returns the seconds that the forward and the backward pass take."""
    arguments = [
        value.detach().requires_grad_(value.requires_grad and torch.is_grad_enabled())
        if isinstance(value, Tensor)
        else value
        for value in given
    ]
    leaves = [value for value in arguments if isinstance(value, Tensor) and value.requires_grad]
    if inplace:
        arguments[0] = arguments[0].clone()
    wait: Callable[[], Any] = torch.cuda.synchronize if arguments[0].is_cuda else int
    wait()
    start = perf_counter()
    result = function(tuple(arguments))
    if leaves:
        wait()
        forward = perf_counter() - start
        grad_output = torch.ones_like(result)
        wait()
        start = perf_counter() - forward
        grad(result, leaves, grad_output, allow_unused=True)
    wait()
    return perf_counter() - start


# ---- what counts ---------------------------------------------------------------------------------


def report(compare: bool = False) -> Report:
    """Counts the calls of pyfused's operators in a ``with`` block, and compares some with torch's.

    In a notebook it says what ``python -m pyfused run`` says of a program::

        with pyfused.patch(), pyfused.report() as report:
            train()
        print(report)

    Args:
        compare: Compare more calls, for better estimates.
    """
    return Report(compare)


def run(program: str, arguments: Sequence[str], module: bool, compare: bool) -> None:
    """Runs a program as ``python`` does, patched, and prints a report to stderr when it ends.

    Of the processes that ``torchrun`` starts, all are patched, and rank 0 counts and prints.

    Args:
        program: The path of a script, a folder or an archive, or the name of a module.
        module: Whether it is the name of a module.
        compare: Compare more calls, for better estimates.
    """
    report, process = Report(compare), os.getpid()

    def end() -> None:
        if os.getpid() == process:  # and no forked child
            report.__exit__()
            ranks = int(os.environ.get("WORLD_SIZE", "1"))
            if ranks > 1:
                print(f"pyfused: of {ranks} ranks, rank 0:", file=sys.stderr)
            print(report, file=sys.stderr)

    patch().__enter__()  # also for threads and exit handlers that outlive the program
    if os.environ.get("RANK", "0") == "0":
        report.__enter__()
        atexit.register(end)  # the first, and so the last to be called
    sys.argv[:] = program, *arguments
    try:
        if module:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            path = Path(program)
            if not getattr(sys.flags, "safe_path", sys.flags.isolated):  # where -m has put a folder
                sys.path[:1] = [] if path.is_dir() else [str(path.resolve().parent)]
            runpy.run_path(str(path.absolute()), run_name="__main__")
    except (ImportError, OSError) as error:
        *_, (frame, _) = walk_tb(error.__traceback__)
        if frame.f_globals["__name__"] != "runpy":  # else the program has not begun
            raise
        atexit.unregister(end)
        if isinstance(error, ImportError):
            sys.exit(f"{sys.executable}: {error}")
        reason = f"[Errno {error.errno}] {error.strerror}"
        print(f"{sys.executable}: can't open file {error.filename!r}: {reason}", file=sys.stderr)
        sys.exit(2)
