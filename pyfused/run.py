"""Counts calls that are dispatched, and compares some of them with torch's operators.

``python -m pyfused run script.py`` and :func:`pyfused.report` print what is counted here.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad
from torch.nn import Parameter

from pyfused.ops import custom_operators, dispatch
from pyfused.ops.activation import Activation
from pyfused.ops.composed import Composed
from pyfused.ops.declaration import Arguments, Operator
from pyfused.ops.pointwise_loss import TensorLoss
from pyfused.patch import patch
from pyfused.startup.sitecustomize import Calls, Counts

SHARE = 0.003  # of the program's time that comparisons of an operator may take, beside BEGINNING
BEGINNING = 0.25  # seconds, so that calls of a short program are compared as well
MOST = 1 << 24  # elements of a compared call; one of more is cut, for the sake of memory
SHORT = 0.01  # seconds; a shorter call is measured twice, and the better time counts


class Counting:
    """Counts, from :meth:`start` to :meth:`stop`, what :func:`pyfused.ops.dispatch.call` does.

    A program never sees an error of counting. No mode counts, as torch's operators would take the
    calls while one is active.

    Args:
        counts: What is counted.
        compare: Compare a call whenever there are a quarter more of its kind, whatever that takes.
            By default that is when there are twice as many, while there is time.
    """

    def __init__(self, counts: Counts, compare: bool = False) -> None:
        self.counts, self.compare = counts, compare
        self.began, self.spent = perf_counter(), defaultdict[str, float](float)
        self.plan_of, self.is_small = dispatch.plan_of, dispatch.is_small
        self.compute = custom_operators.compute

    def start(self) -> None:
        self._replace(self._plan_of, self._is_small, self._compute)

    def stop(self) -> None:
        self._replace(self.plan_of, self.is_small, self.compute)

    def _replace(self, plan_of: Any, is_small: Any, compute: Any) -> None:
        for module, name, function in (
            (dispatch, "plan_of", plan_of),
            (dispatch, "is_small", is_small),
            (sys.modules["pyfused.patch"], "is_small", is_small),  # its name is the function's, too
            (custom_operators, "compute", compute),
        ):
            setattr(module, name, function)

    def _is_small(self, op: Operator, arguments: Arguments) -> bool:
        if self.is_small(op, arguments):
            self.counts.small[op.name] += 1
            return True
        return False

    def _plan_of(self, op: Operator, arguments: Arguments, inplace: bool) -> dispatch.Plan:
        plan = self.plan_of(op, arguments, inplace)
        try:
            self._count(plan, op, arguments, inplace)
        except Exception as error:
            self.counts.failed[op.name] = repr(error)
        return plan

    def _compute(self, op: str, function: Any, given: Arguments, *backward: Any) -> Any:
        self.counts.compiled[op] += not backward
        return self.compute(op, function, given, *backward)

    def _count(
        self, plan: dispatch.Plan, op: Operator, arguments: Arguments, inplace: bool
    ) -> None:
        if plan.run is None:
            if not dispatch.compiler_traces():
                self.counts.left[op.name, str(plan.reason)] += 1
            return
        elements = _elements(op, arguments)
        if type(elements) is not int or dispatch.compiler_traces():  # of torch.jit.trace, a tensor
            return
        needs_grad = torch.is_grad_enabled() and any(
            isinstance(value, Tensor) and value.requires_grad for value in arguments
        )
        calls = self.counts.kernels[op.name, elements.bit_length(), needs_grad]
        calls.count += 1
        calls.elements += elements
        if elements > calls.largest:
            calls.largest = elements
        if calls.count >= calls.due:
            self._compare_if_time(calls, op, arguments, inplace)

    # ---- compared with torch ----

    def _compare_if_time(
        self, calls: Calls, op: Operator, arguments: Arguments, inplace: bool
    ) -> None:
        start = perf_counter()
        if self.spent[op.name] > SHARE * (start - self.began) + BEGINNING and not self.compare:
            return  # until there is time
        calls.due = max(calls.count + 1, calls.count * (1.25 if self.compare else 2))
        if _can_be_repeated(op, arguments, inplace):
            try:
                calls.repeats.append(self._times(op, arguments, inplace, not calls.repeats))
            except Exception:
                calls.due = math.inf
        seconds = perf_counter() - start
        self.spent[op.name] += seconds
        self.counts.spent += seconds

    def _times(
        self, op: Operator, arguments: Arguments, inplace: bool, first: bool
    ) -> tuple[float, float]:
        """Returns the seconds an element that the call takes with pyfused and with torch.

        The program sees nothing of it: the tensors are detached, none is overwritten, and no random
        number is drawn.
        """
        given = _cut(op, arguments)
        elements = _elements(op, given)
        if elements > 4 * MOST:
            raise MemoryError("a call that cannot be cut")
        run = self.plan_of(op, given, inplace).run
        assert run is not None
        torch_function: Callable[..., Any] = op.aten_ if inplace else op.aten
        if first:  # a kernel's first time takes new memory, and starts threads
            _seconds(run, given, inplace)
        ours, theirs = (
            _best(function, given, inplace)
            for function in (run, lambda arguments: torch_function(*arguments))
        )
        return ours / elements, theirs / elements


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
        and dispatch._active_mode() is None
        and torch._C._current_graph_task_id() == -1  # no backward pass is running
        and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        and not torch.is_anomaly_enabled()
        and not torch._C._autograd._profiler_enabled()
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


def _best(function: Callable[[Arguments], Any], given: Arguments, inplace: bool) -> float:
    seconds = _seconds(function, given, inplace)
    return min(seconds, _seconds(function, given, inplace)) if seconds < SHORT else seconds


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


# ---- who counts ----------------------------------------------------------------------------------


def start(counts: Counts, compare: bool) -> None:
    """Patches this process and counts, until it ends."""
    Counting(counts, compare).start()
    patch().__enter__()


class Report:
    """What :func:`pyfused.report` returns: its ``str`` and ``repr`` are the table."""

    def __init__(self, compare: bool) -> None:
        self._counts = Counts()
        self._counting = Counting(self._counts, compare)
        self._seconds = 0.0

    def __enter__(self) -> Report:
        self._began = perf_counter()
        self._counting.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._counting.stop()
        self._seconds += perf_counter() - self._began

    def __repr__(self) -> str:
        return self._counts.summary([self._seconds - self._counts.spent])


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
