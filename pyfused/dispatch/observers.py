"""Observers of calls: `pyfused.report` counts them, and `pyfused.explain` reads a decision."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

from pyfused.dispatch import reasons
from pyfused.dispatch.operator import Operator, Options, Tensors
from pyfused.torch_internals import compiler_traces


class Observer:
    """Observes the calls of all threads, between `begin` and `end`."""

    def decided(self, op: Operator, tensors: Tensors, options: Options, reason: str | None) -> None:
        """Receives a call and why torch computes it, None if a kernel does."""

    def compiled(self, name: str) -> None:
        """Receives the name of a custom operator that a compiled program calls."""

    def took(self, seconds: float) -> None:
        """Receives the time of a kernel."""


active: tuple[Observer, ...] = ()
_lock = threading.RLock()


def begin(observer: Observer) -> None:
    global active
    with _lock:
        active = (*active, observer)


def end(observer: Observer) -> None:
    global active
    with _lock:
        active = tuple([x for x in active if x is not observer])


def observed(
    op: Operator,
    tensors: Tensors,
    options: Options,
    reason: str | None,
    kernel: Callable[..., Any] | None,
) -> Callable[..., Any] | None:
    """Tells the observers a decision, and returns the kernel with its time reported to them."""
    if compiler_traces() or reason in reasons.not_reported:
        return kernel
    for observer in active:
        observer.decided(op, tensors, options, reason)
    return None if kernel is None else partial(timed, kernel)


def timed(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function that runs a kernel, and tells its time to the observers."""
    start = perf_counter()
    try:
        return function(*args)
    finally:
        seconds = perf_counter() - start
        for observer in active:
            observer.took(seconds)
