"""The same bits for every number of threads and every run; other Python threads go on meanwhile."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from compare import evaluate
from samples import ACTIVATIONS, FIRST
from torch import Tensor

from pyfused import functional
from pyfused.backends import cpu
from pyfused.dispatch.call import call
from pyfused.dispatch.operator import Operator
from pyfused.functional import cross_entropy
from pyfused.ops.operators import SOFTMAX

Threads = Callable[[int], None]


def arguments(op: Operator, x: Tensor) -> tuple[Any, ...]:
    return (x, 1, 3, None) if op is SOFTMAX else (x, *op.defaults)


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


def calls() -> dict[str, Callable[[], Callable[[], Any]]]:
    """For each kind of kernel what prepares a call of one alone, and returns the call."""
    shape = (4096, 1024)

    def backward(op: Operator) -> Callable[[], Any]:
        x = torch.randn(shape, requires_grad=True)
        output, grad_output = call(op, arguments(op, x)), torch.ones(shape)
        return lambda: torch.autograd.grad(output, x, grad_output)

    made: dict[str, Callable[[], Callable[[], Any]]] = {
        "cross_entropy": lambda: partial(
            cross_entropy, torch.randn(shape), torch.randint(1024, (4096,))
        )
    }
    loss = FIRST[0]
    made[loss.kernel] = lambda: partial(loss.ours, **loss.draw(shape, requiring=()))
    made["multilabel_margin_loss"] = lambda: partial(
        functional.multilabel_margin_loss, torch.randn(shape), torch.zeros(shape).long()
    )
    for name in ("nll_loss", "multi_margin_loss"):
        made[name] = lambda name=name: partial(
            getattr(functional, name), torch.randn(shape), torch.randint(1024, (4096,))
        )
    for op in (ACTIVATIONS[0], SOFTMAX):
        made[op.name] = lambda op=op: partial(call, op, arguments(op, torch.randn(shape)))
        made[f"{op.name}_backward"] = partial(backward, op)
    return made


class Native:
    """The extension, with `during` in place of each call of a kernel."""

    def __init__(self, native: Any, during: Callable[[Callable[[], Any]], Any]) -> None:
        self.native, self.during = native, during

    def __getattr__(self, name: str) -> Any:
        kernel = getattr(self.native, name)
        if isinstance(kernel, type) or not callable(kernel):
            return kernel
        return lambda *args: self.during(lambda: kernel(*args))


@pytest.mark.parametrize("prepare", calls().values(), ids=calls().keys())
def test_the_gil_is_released_within(
    prepare: Callable[[], Callable[[], Any]], monkeypatch: pytest.MonkeyPatch
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
    run = prepare()
    armed.set()
    run()
    assert progress == [True, "seen"]
