"""The same bits for every number of threads and every run; other Python threads go on meanwhile."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from catalogue import EXAMPLES
from compare import evaluate

from pyfused.backends import cpu
from pyfused.functional import cross_entropy, relu

Threads = Callable[[int], None]


def test_more_threads_than_work(threads: Threads) -> None:
    threads(5)
    for rows in (1, 2, 3, 64, 65):
        logits = torch.randn(rows, 3, requires_grad=True)
        target = torch.randint(3, (rows,))
        got = evaluate(cross_entropy, logits, target)
        expected = evaluate(torch.nn.functional.cross_entropy, logits, target)
        torch.testing.assert_close(got.value, expected.value)
        torch.testing.assert_close(got.gradients, expected.gradients)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_out_of_range_target_is_found_by_whichever_thread(count: int, threads: Threads) -> None:
    threads(count)
    logits = torch.randn(70_003, 3, requires_grad=True)
    for position in (0, 40_000, 70_002):
        target = torch.zeros(70_003, dtype=torch.int64)
        target[position] = 3
        with pytest.raises(IndexError, match=rf"got 3 at position \({position},\)"):
            cross_entropy(logits, target)
    target[[5, 40_000, 70_002]] = torch.tensor([-1, 9, 3])
    with pytest.raises(IndexError, match=r"got -1 at position \(5,\)"):
        cross_entropy(logits, target)


EACH_KIND = (
    *("cross_entropy", "mse_loss", "multilabel_margin_loss", "nll_loss", "multi_margin_loss"),
    *("relu", "softmax"),
)
BACKWARD = "relu", "softmax"  # whose backward passes have kernels of their own


def prepared(name: str, backward: bool) -> Callable[[], Any]:
    """Returns a call of one kernel alone."""
    call = EXAMPLES[name].call(shape=(4096, 1024))
    if backward:
        value = call.ours()
        return partial(torch.autograd.grad, value, [*call.leaves.values()], torch.ones_like(value))
    return partial(call.ours, **{name: x.detach() for name, x in call.tensors.items()})


class Native:
    """The extension, with `during` in place of each call of a kernel."""

    def __init__(self, native: Any, during: Callable[[Callable[[], Any]], Any]) -> None:
        self.native, self.during = native, during

    def __getattr__(self, name: str) -> Any:
        kernel = getattr(self.native, name)
        if isinstance(kernel, type) or not callable(kernel):
            return kernel
        return lambda *args: self.during(lambda: kernel(*args))


@pytest.mark.parametrize(
    ("name", "backward"), [*((n, False) for n in EACH_KIND), *((n, True) for n in BACKWARD)]
)
def test_the_gil_is_released_within(
    name: str, backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the kernel runs, and nothing else, another Python thread makes progress.

    With a switch interval this long, a thread that waits for the GIL gets it only from one that
    lets it go of its own accord, and between the event and the end of the loop only the kernel can.
    """
    progress: list[Any] = []

    def until_progress(run: Callable[[], Any]) -> Any:
        start = threading.Event()
        waiting = threading.Thread(target=lambda: (start.wait(), progress.append(True)))
        interval = sys.getswitchinterval()
        waiting.start()
        sys.setswitchinterval(1000.0)
        try:
            start.set()
            for _ in range(2000):
                result = run()
                if progress:
                    break
            progress.append("seen" if progress else "not seen")
        finally:
            sys.setswitchinterval(interval)
            waiting.join()
        return result

    armed = threading.Event()
    native = Native(cpu.native, lambda run: until_progress(run) if armed.is_set() else run())
    monkeypatch.setattr(cpu, "native", native)
    run = prepared(name, backward)
    armed.set()
    run()
    assert progress == [True, "seen"]


def test_the_number_of_threads_is_the_one_of_the_call(
    threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the one of the call that was planned."""
    given: list[int] = []
    native = cpu.native
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "native", SimpleNamespace(**vars(native)))
        patch.setattr(cpu.native, "relu", lambda *a: (given.append(a[-1]), native.relu(*a)))
        for number in (1, 2):
            threads(number)
            relu(torch.randn(6, 5))
    assert given == [1, 2]
