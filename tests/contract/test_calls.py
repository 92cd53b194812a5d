"""Counts the Python functions that a call runs, and bounds the memory that it leaves behind."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import torch
from catalogue import SOME, Call, Example, every_family
from compare import python_calls
from conftest import KernelCalls
from processes import python
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from pyfused import functional as fused
from pyfused.torch_internals import _SavedTensor, save_apart

CLASSES = torch.tensor([1, 0, 4, -100, 2, 2])
OTHER = torch.linspace(-3, 1, 30).reshape(6, 5)


# ---- caches --------------------------------------------------------------------------------------


@every_family
def test_caches_are_bounded(example: Example) -> None:
    """Memory does not grow with the number of shapes, and of values of a number."""

    calls = [example.call(shape=(n, 5)) for n in range(1, 330)]
    for n, call in enumerate(calls):
        numbers = [name for name, x in call.given.items() if type(x) is float]
        call.given |= dict.fromkeys(numbers, 0.1 + n / 1e4)

    def memory_after(some: list[Call]) -> int:
        for call in some:
            call.ours()
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    gc.freeze()  # collecting the objects of earlier tests would take long
    tracemalloc.start()
    try:
        before = memory_after(calls[:270])  # fills the caches
        # An entry of a cache takes up to 0.5 KB, and its table may be resized meanwhile.
        assert memory_after(calls[270:]) - before < 1 << 16
    finally:
        tracemalloc.stop()
        gc.unfreeze()


# ---- overhead of a call --------------------------------------------------------------------------


# The maximum number of functions of pyfused per step.
CALLS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "mse_loss": (lambda x: fused.mse_loss(x, OTHER), 26),
    "cross_entropy": (lambda x: fused.cross_entropy(x, CLASSES), 30),
    "softcap": (lambda x: fused.cross_entropy(x, CLASSES, softcap=5.0), 70),
    "nll_loss": (lambda x: fused.nll_loss(x, CLASSES), 41),
    "gelu": (lambda x: fused.gelu(x).sum(), 25),
    "softmax": (lambda x: fused.softmax(x, 1).sum(), 25),
    "log_probs": (lambda x: fused.log_probs(x, CLASSES)[0].sum(), 51),
    "kl_div_with_logits": (lambda x: fused.kl_div_with_logits(x, OTHER), 47),
    "linear_cross_entropy": (lambda x: fused.linear_cross_entropy(x, OTHER, CLASSES), 83),
    "linear_log_probs": (lambda x: fused.linear_log_probs(x, OTHER, CLASSES)[0].sum(), 100),
}


@pytest.mark.cpu
@pytest.mark.parametrize("name", CALLS)
def test_a_step_calls_few_python_functions(name: str) -> None:
    call, most = CALLS[name]
    x = torch.randn(6, 5, requires_grad=True)
    most += 5 * (save_apart is _SavedTensor)  # functions for torch 2.11
    assert python_calls(lambda: call(x).backward(), "pyfused") <= most


@pytest.mark.cpu
@pytest.mark.slow
def test_first_calls_do_not_import_the_compiler() -> None:
    """torch's Python definitions for meta tensors would import sympy, which takes 0.4 s."""
    found = python("""
        import sys
        from catalogue import EXAMPLES
        from conftest import fused_always
        from pyfused.ops.elementwise import SOFTSIGN

        SOFTSIGN.kernels["softsign"].programs  # traces
        with fused_always():
            for example in EXAMPLES.values():
                example.call().ours().sum().backward()
        print("sympy" in sys.modules)
        """)
    assert found.stdout == "False\n", found.stderr


def test_recomputation_uses_the_same_path(kernel_calls: KernelCalls) -> None:
    """The forward pass falls back because of a mode, which is not active in the recomputation."""
    x = torch.randn(6, 5, requires_grad=True)
    step = lambda x: fused.cross_entropy(2 * x, CLASSES)  # noqa: E731
    (expected,) = torch.autograd.grad(step(x), x)
    ran = kernel_calls["cross_entropy"]
    with FlopCounterMode(display=False):
        loss = checkpoint(step, x, use_reentrant=False)
    loss.backward()
    assert kernel_calls["cross_entropy"] == ran
    torch.testing.assert_close(x.grad, expected)
    checkpoint(step, x, use_reentrant=False).backward()  # runs without the mode
    assert kernel_calls["cross_entropy"] == ran + 2


INTEGERS = [(e, name) for e in SOME.values() for name, x in e.options.items() if type(x) is int]


@pytest.mark.parametrize(("example", "name"), INTEGERS, ids=lambda x: getattr(x, "id", x))
def test_integers_of_numpy(example: Example, name: str) -> None:
    call = example.call()
    number = np.int64(call.given[name])
    assert torch.equal(call.ours(**{name: number}), call.ours())
