"""The same bits for every number of threads and every run; other Python threads go on meanwhile."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from compare import FLOATS, evaluate
from samples import ACTIVATIONS, FIRST, LOSSES, arguments
from torch import Tensor

from pyfused import functional
from pyfused.backends import cpu
from pyfused.functional import cross_entropy
from pyfused.ops.activation import Activation
from pyfused.ops.declaration import Operator
from pyfused.ops.dispatch import call
from pyfused.ops.operators import LOG_SOFTMAX, SOFTMAX

REDUCTIONS = ("none", "mean", "sum")
# Far beyond what one thread is left to do alone, and no multiple of any block.
ROWS, COLUMNS = (1031, 700), (70_003, 10)
Threads = Callable[[int], None]


def given(op: Operator, x: Tensor) -> tuple[Any, ...]:
    return arguments(op, x) if isinstance(op, Activation) else (x, 1, 3, None)


def results(shape: tuple[int, int], dtype: torch.dtype, reduction: str) -> Iterator[Tensor]:
    torch.manual_seed(7)
    rows, classes = shape
    logits = (torch.randn(shape) * 5).to(dtype).requires_grad_()
    target = torch.randint(classes, (rows,))
    target[::7] = -100
    probabilities = torch.rand(shape).to(dtype).requires_grad_()
    weight = torch.rand(classes).to(dtype)
    outcomes = [
        evaluate(cross_entropy, logits, target, reduction=reduction),
        evaluate(cross_entropy, logits, target, weight, reduction=reduction, label_smoothing=0.1),
        evaluate(cross_entropy, logits, probabilities, weight, reduction=reduction),
        evaluate(cross_entropy, logits.view(1, *shape).mT, target.view(1, -1), reduction=reduction),
        evaluate(cross_entropy, logits, target, weight, reduction=reduction, gamma=2.0),
        evaluate(functional.nll_loss, logits, target, weight, reduction=reduction),
        evaluate(functional.multi_margin_loss, logits, target.clamp(0), reduction=reduction),
    ]
    turn = REDUCTIONS.index(reduction)
    if turn == 0:  # activations have none
        outcomes += [
            evaluate(lambda x, op=op: call(op, given(op, x)), logits)
            for op in (*ACTIVATIONS, SOFTMAX, LOG_SOFTMAX)
        ]
    # The losses by turns, so that each sees every reduction in one dtype or another.
    for loss in LOSSES[(turn + FLOATS.index(dtype)) % 3 :: 3]:
        options: dict[str, Any] = loss.parameters | {"reduction": reduction}
        outcomes.append(evaluate(loss.ours, **loss.draw(shape, dtype), **options))
        if loss.takes_weight:
            options["weight"] = loss.weight(shape, dtype)
            outcomes.append(evaluate(loss.ours, **loss.draw(shape, dtype), **options))
    for outcome in outcomes:
        yield outcome.value
        yield from outcome.gradients


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", [ROWS, COLUMNS], ids=["rows", "columns"])
def test_bitwise_equal_for_every_number_of_threads(
    shape: tuple[int, int], dtype: torch.dtype, reduction: str, threads: Threads
) -> None:
    threads(1)
    expected = list(results(shape, dtype, reduction))
    for count in (2, 3, 5, 2):
        threads(count)
        for got, wanted in zip(results(shape, dtype, reduction), expected, strict=True):
            assert torch.equal(got, wanted)


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
    """For each kernel what prepares a call of it alone, and returns the call."""
    shape = (4096, 1024)

    def backward(op: Operator) -> Callable[[], Any]:
        x = torch.randn(shape, requires_grad=True)
        output, grad_output = call(op, given(op, x)), torch.ones(shape)
        return lambda: torch.autograd.grad(output, x, grad_output)

    made: dict[str, Callable[[], Callable[[], Any]]] = {
        "cross_entropy": lambda: partial(
            cross_entropy, torch.randn(shape), torch.randint(1024, (4096,))
        )
    }
    for loss in FIRST:
        made[loss.kernel] = lambda loss=loss: partial(loss.ours, **loss.draw(shape, requiring=()))
    for name in ("nll_loss", "multi_margin_loss"):
        made[name] = lambda name=name: partial(
            getattr(functional, name), torch.randn(shape), torch.randint(1024, (4096,))
        )
    for op in (*ACTIVATIONS, SOFTMAX, LOG_SOFTMAX):
        made[op.name] = lambda op=op: partial(call, op, given(op, torch.randn(shape)))
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
