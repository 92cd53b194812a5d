"""The sizes from which kernels are used, and the measurement of a machine's sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import python

import pyfused
from pyfused.adopt import tune
from pyfused.dispatch import sizes
from pyfused.dispatch.reasons import SMALL
from pyfused.ops.elementwise import MSE_LOSS
from pyfused.ops.operators import OPERATORS

pytestmark = [pytest.mark.cpu, pytest.mark.thresholds]
FIRST, SECOND = 1 << 10, 1 << 12


def runs_torch(op: str, *arguments: Any, **options: Any) -> bool:
    return pyfused.explain(op, *arguments, **options).backend == "torch"


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "limits", lambda op, cpu, dtype=None: (FIRST, SECOND))


@pytest.mark.parametrize(("reduction", "limit"), [("mean", FIRST), ("none", SECOND)])
def test_the_second_limit_of_unreduced_losses(reduction: str, limit: int) -> None:
    for elements in (limit - 1, limit):
        x = torch.zeros(elements)
        assert runs_torch("mse_loss", x, x, reduction=reduction) == (elements < limit)


@pytest.mark.parametrize("classes", [sizes.FEW, sizes.FEW + 1])
def test_the_second_limit_of_few_classes(classes: int) -> None:
    x, is_few = torch.zeros(-(-FIRST // classes), classes), classes == sizes.FEW
    assert runs_torch("cross_entropy", x, torch.zeros(len(x)).long()) == is_few
    assert runs_torch("softmax", x, 1) == is_few
    assert runs_torch("softmax", x.t(), -2) == is_few
    assert not runs_torch("softmax", x.t().contiguous(), -2)  # torch vectorises over columns


@pytest.mark.parametrize("needs_grad", [False, True])
def test_the_second_limit_of_calls_without_gradients(needs_grad: bool) -> None:
    x = torch.zeros(FIRST, requires_grad=needs_grad)
    rows, target = x.view(-1, 64), torch.zeros(FIRST // 64, dtype=torch.int64)
    assert runs_torch("gelu", x) != needs_grad
    assert not runs_torch("gelu", x, approximate="tanh")
    assert runs_torch("nll_loss", rows, target) != needs_grad
    with torch.no_grad():
        assert runs_torch("gelu", x)
        assert runs_torch("nll_loss", rows, target)


def test_few_classes_of_half_precision() -> None:
    for classes, expected in ((2 * sizes.FEW + 1, True), (2 * sizes.FEW + 2, False)):
        x = torch.zeros(-(-FIRST // classes), classes, dtype=torch.bfloat16)
        assert runs_torch("cross_entropy", x, torch.zeros(len(x)).long()) == expected


def test_empty_calls_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "FORCED", "cpu")
    for elements in (0, 1):
        x = torch.zeros(elements)
        assert runs_torch("mse_loss", x, x) == (elements == 0)


TUNED = [name for name in OPERATORS if any(sizes.ON_CPU.get(name, ())) and name not in sizes.LINEAR]


@pytest.mark.parametrize("name", TUNED)
@pytest.mark.parametrize("second", [False, True])
def test_steps_of_the_operator_are_measured(name: str, second: bool) -> None:
    op = OPERATORS[name]
    step = tune.call_of(op, 1 << 6, second)
    for function in (tune.torch_function(op), getattr(tune.functional, name)):
        step(function)  # raises if the arguments do not match the operator


def test_measured_sizes_are_stored_for_this_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sizes.tuned(sizes.MACHINE) == {}
    monkeypatch.setattr(tune, "limit", lambda _op, second: 7 + second)
    tune.main(["mse_loss"])
    assert capsys.readouterr().err == "[1/1] mse_loss: 7 and 8\n"
    monkeypatch.setattr(tune, "limit", lambda _op, second: 5 + second)
    tune.main(["l1_loss"])
    expected = {"mse_loss": (7, 8), "l1_loss": (5, 6)}
    assert sizes.tuned(sizes.MACHINE) == expected
    assert sizes.tuned("another") == {}
    monkeypatch.setattr(sizes, "MACHINE", "another")
    tune.main(["mse_loss"])
    assert sizes.tuned("another") == {"mse_loss": (5, 6)}
    assert len(json.loads(sizes.tuned_file().read_text())) == 2
    for text in ("", "[]", "{}", '{"another": 3}', '{"another": {"mse_loss": 4}}'):
        sizes.tuned_file().write_text(text)
        assert sizes.tuned("another") == {}


# ---- GPUs ----------------------------------------------------------------------------------------


def stub_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulates a GPU: kernels run on CPU tensors, and the clock counts its readings."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(tune, "unsupported_triton", lambda: None)
    readings = iter(range(1000))
    measured = tune.tune_gpu
    stub = lambda: measured("cpu", lambda: None, lambda: next(readings) * 1e-3)  # noqa: E731
    monkeypatch.setattr(tune, "tune_gpu", stub)
    monkeypatch.setattr(tune, "_COPIED", 1 << 20)


def test_host_time_and_bandwidth_of_a_gpu_are_measured_and_stored(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    stub_gpu(monkeypatch)
    for function in (sizes.gpu, sizes.limits):
        function.cache_clear()
    try:
        assert sizes.gpu() == sizes.Gpu()  # nothing has been measured
        sizes.gpu.cache_clear()
        monkeypatch.setattr(tune, "tune", lambda _: {})
        tune.main([])
        # 50 calls in 1 ms; 50 copies that read and write 2^20 bytes, in 1 ms
        assert sizes.gpu() == (20, 105)
        assert sizes.limits(MSE_LOSS, False) == (1 << 17, 1 << 17)  # from 2.1 MB / 32 bytes on
        (machine,) = {*json.loads(sizes.tuned_file().read_text())} - {sizes.MACHINE}
        assert machine.startswith(f"a GPU, torch {torch.__version__}, Triton ")
    finally:
        for function in (sizes.gpu, sizes.limits):
            function.cache_clear()


def test_explain_names_the_numbers_that_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(sizes, "gpu", lambda: sizes.Gpu(20, 100))
    sizes.limits.cache_clear()
    try:
        x = torch.empty(100, 65, device="meta")  # neither CPU nor GPU, but dispatched like a GPU's
        target = torch.empty(100, dtype=torch.int64, device="meta")
        by_numbers = "(20 us for a call on the host, 100 GB/s on the GPU)"
        for logits, limit in ((x, 65_536), (x[:, :64], 16_384)):
            reason = pyfused.explain("cross_entropy", logits, target).reason
            assert reason == f"{SMALL}: kernels run from {limit:,} elements {by_numbers}"
        reason = pyfused.explain("margin_ranking_loss", x, x, x).reason
        assert reason == f"{SMALL}: kernels run from 16,384 elements"
        assert pyfused.explain("relu", x).reason == SMALL
    finally:
        sizes.limits.cache_clear()


def test_a_user_without_a_home() -> None:
    child = python(
        """
        import os, pwd
        for name in ("HOME", "XDG_CACHE_HOME"):
            os.environ.pop(name, None)
        pwd.getpwuid = {}.__getitem__  # raises KeyError
        import pyfused
        """
    )
    assert child.returncode == 0, child.stderr
