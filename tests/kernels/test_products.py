"""The dtype in which CPUs multiply half-precision matrices, which is measured."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from compare import Recording
from processes import process

from pyfused import functional as fused
from pyfused.backends import cpu

pytestmark = pytest.mark.cpu


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "HALF_PRODUCTS", None)
    monkeypatch.setattr(cpu, "_measured", {})


def seconds(ratio: float, compute: partial[Any]) -> float:
    """Returns the time of a product, which takes `ratio` times as long in half precision."""
    compute()
    return 1.0 if compute.args[0].dtype is torch.float32 else ratio


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ratio", [0.2, 1.9, 2.1, 250.0])
def test_float32_has_to_be_twice_as_fast(
    ratio: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "least_seconds", partial(seconds, ratio))
    expected = torch.float32 if ratio > 2 else dtype
    assert cpu.product_dtype(dtype) is cpu.product_dtype(dtype) is expected
    assert cpu.product_dtype(torch.float64) is torch.float64


AUTOCAST, META = partial(torch.autocast, "cpu", torch.bfloat16), partial(torch.device, "meta")


@pytest.mark.parametrize("state", [AUTOCAST, META, Recording, torch.inference_mode])
def test_the_state_of_the_first_call_has_no_effect(
    state: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(compute: partial[Any]) -> float:
        product = compute()
        assert (product.device.type, product.dtype) == ("cpu", compute.args[0].dtype)
        assert not torch.is_autocast_enabled("cpu")
        return 1.0

    monkeypatch.setattr(cpu, "least_seconds", check)
    with state() as mode:
        assert cpu.product_dtype(torch.bfloat16) is torch.bfloat16
    assert not getattr(mode, "seen", None)


@pytest.mark.parametrize(
    ("flags", "name", "value", "default"),
    [
        (torch.backends.mkldnn, "enabled", False, True),
        (torch.backends.mkldnn.matmul, "fp32_precision", "bf16", "ieee"),
        (torch.backends, "fp32_precision", "bf16", "bf16"),  # products inherit it
    ],
)
def test_the_flags_of_the_first_call_have_no_effect(
    flags: Any, name: str, value: Any, default: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    monkeypatch.setattr(cpu, "least_seconds", lambda _: found.append(getattr(flags, name)) or 1.0)
    before, of_products = getattr(flags, name), torch.backends.mkldnn.matmul.fp32_precision
    with torch.backends.__allow_nonbracketed_mutation():  # importing torch's tests forbids it
        setattr(flags, name, value)
        try:
            cpu.product_dtype(torch.bfloat16)
            assert getattr(flags, name) == value
        finally:
            setattr(flags, name, before)
    assert torch.backends.mkldnn.matmul.fp32_precision == of_products
    assert {*found} == {default}


def test_two_first_calls_get_one_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    ratios = iter([0.5, 5.0] * 100)

    def slow(compute: partial[Any]) -> float:
        time.sleep(1e-3)
        return seconds(next(ratios), compute)

    monkeypatch.setattr(cpu, "least_seconds", slow)
    with ThreadPoolExecutor(2) as executor:
        first, second = executor.map(cpu.product_dtype, [torch.bfloat16] * 2)
    assert first is second


def test_products_are_measured_on_one_thread(threads: Any) -> None:
    """The number of threads stays, also for threads that start meanwhile."""
    x = torch.randn(1 << 20)

    def regions(run: Any = lambda compute: compute()) -> int:
        cpu.native.measure_regions(True)
        try:
            run(lambda: fused.softplus(x))
            return int(cpu.native.measured_regions()[0])
        finally:
            cpu.native.measure_regions(False)

    threads(3)
    if cpu.native.runtime_file:
        assert regions() == 1
    assert regions(cpu.native.on_one_thread) == 0
    with ThreadPoolExecutor(1) as executor:
        found = cpu.native.on_one_thread(executor.submit(torch.get_num_threads).result)
    assert found == torch.get_num_threads() == 3
    with pytest.raises(ZeroDivisionError):
        cpu.native.on_one_thread(lambda: 1 / 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "start", ["threading.Thread(target=train).start()", "atexit.register(train)"]
)
def test_the_first_head_may_run_while_the_process_ends(start: str) -> None:
    found = process("-c", f"""
import atexit, threading, time, torch
from pyfused.functional import linear_cross_entropy

def train():
    time.sleep(0.5)  # the main thread has ended
    x = torch.randn(600, 16).bfloat16()
    weight = torch.randn(1000, 16).bfloat16().requires_grad_()
    linear_cross_entropy(x, weight, torch.randint(1000, (600,))).backward()
    print(weight.grad.shape)

{start}
""", PYFUSED_HALF_PRODUCTS="")  # fmt: skip
    assert found.stdout == "torch.Size([1000, 16])\n", found.stderr
