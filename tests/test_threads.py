"""The same bits for every number of threads and every run; other Python threads go on meanwhile."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from compare import FLOATS, evaluate
from conftest import KERNELS
from torch import Tensor

from pyfused.backends import cpu
from pyfused.functional import cross_entropy, mse_loss, relu

# Far beyond what one thread is left to do alone, and no multiple of any block.
ROWS, COLUMNS = (1031, 700), (70_003, 10)
Threads = Callable[[int], None]


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
        evaluate(mse_loss, logits, probabilities, reduction=reduction),
        evaluate(
            mse_loss, logits, probabilities, reduction=reduction, weight=torch.rand(shape).to(dtype)
        ),
        evaluate(relu, logits),
    ]
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


def call_ending_in(kernel: str) -> Tensor:
    x = torch.randn(4096, 1024)
    if kernel == "cross_entropy":
        return cross_entropy(x, torch.randint(1024, (4096,)))
    if kernel == "mse_loss":
        return mse_loss(x, torch.randn(4096, 1024))
    if kernel == "relu":
        return relu(x)
    return torch.autograd.grad(relu(x.requires_grad_()), x, torch.ones_like(x))[0]


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_gil_is_released_within(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the kernel runs, and nothing else, another Python thread makes progress.

    With a switch interval this long, a thread that waits for the GIL gets it only from one that
    lets it go of its own accord, and between the event and the end of the loop only the kernel can.
    """
    run, progress = getattr(cpu.native, kernel), []

    def until_progress(*args: Any, **kwargs: Any) -> Any:
        start = threading.Event()
        waiting = threading.Thread(target=lambda: (start.wait(), progress.append(True)))
        interval = sys.getswitchinterval()
        waiting.start()
        sys.setswitchinterval(1000.0)
        try:
            start.set()
            for _ in range(50):
                result = run(*args, **kwargs)
                if progress:
                    break
            progress.append("seen" if progress else "not seen")
        finally:
            sys.setswitchinterval(interval)
            waiting.join()
        return result

    monkeypatch.setattr(cpu.native, kernel, until_progress)
    call_ending_in(kernel)
    assert progress == [True, "seen"]
