"""Kernels on several threads: errors, the GIL, and the number of threads."""

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

from pyfused.backends import cpu
from pyfused.functional import cross_entropy, softmax

Threads = Callable[[int], None]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_any_thread_detects_an_out_of_range_target(count: int, threads: Threads) -> None:
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
    assert logits._version == 0
    cross_entropy(logits, target.zero_())  # later calls are not affected


def test_threads_that_start_in_a_kernel_do_not_flush_subnormals(threads: Threads) -> None:
    small = torch.full((1 << 20,), 1e-300, dtype=torch.float64)
    threads(2)
    assert (small * 1e-15 != 0).all()
    threads(5)
    softmax(torch.zeros(4096, 1000), 1)
    assert (small * 1e-15 != 0).all()


FORWARD = [(name, False) for name in ("cross_entropy", "mse_loss", "nll_loss", "relu", "softmax")]
KERNELS = "cross_entropy", "mse_loss", "relu", "relu_backward", "softmax"
BACKWARD = ("relu", True), ("softmax", True)  # with separate backward kernels


@pytest.mark.parametrize(("name", "backward"), [*FORWARD, *BACKWARD])
def test_the_gil_is_released(name: str, backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another Python thread makes progress while the kernel runs.

    With a switch interval this long, a waiting thread gets the GIL only if it is released
    voluntarily, and only the kernel runs between the event and the end of the loop.
    """
    progress, call = list[Any](), EXAMPLES[name].call(shape=(4096, 1024))
    run: Callable[[], Any] = partial(call.ours, **{n: x.detach() for n, x in call.tensors.items()})
    if backward:
        value = call.ours()
        run = partial(torch.autograd.grad, value, [*call.leaves.values()], torch.ones_like(value))

    def until_progress(kernel: Callable[..., Any], *args: Any) -> Any:
        start = threading.Event()
        waiting = threading.Thread(target=lambda: (start.wait(), progress.append(True)))
        interval = sys.getswitchinterval()
        waiting.start()
        sys.setswitchinterval(1000.0)
        try:
            start.set()
            for _ in range(2000):
                result = kernel(*args)
                if progress:
                    break
            progress.append("seen" if progress else "not seen")
        finally:
            sys.setswitchinterval(interval)
            waiting.join()
        return result

    kernels = {x: partial(until_progress, getattr(cpu.native, x)) for x in KERNELS}
    monkeypatch.setattr(cpu, "native", SimpleNamespace(**vars(cpu.native) | kernels))
    run()
    assert progress == [True, "seen"]
