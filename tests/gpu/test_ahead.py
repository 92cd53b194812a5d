"""Kernels compile for GPUs that are not here, without spills and with wide loads: some of them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import ahead

from pyfused.kernels import launch

QUICK = (
    "cross_entropy bfloat16 4096x8192",
    "cross_entropy float32 4096x4096 weight smoothing",
    "cross_entropy bfloat16 2x262144",
    "mse_loss float32",
    "relu bfloat16 backward",
)


@pytest.mark.parametrize("target", ahead.TARGETS)
def test_nothing_spills_and_loads_are_wide(target: str) -> None:
    found = ahead.compile_cases(target, QUICK)
    assert {kernel.kernel for kernel in found} >= {
        "one_read_kernel",
        "two_read_kernel",
        "split_kernel",
        "count_kernel",
        "sum_kernel",
        "pointwise_loss_kernel",
        "activation_kernel",
    }
    for kernel in found:
        assert not kernel.wrong, kernel
        assert kernel.registers > 0
        if kernel.kernel == "activation_kernel":
            assert kernel.store == 128


def compile_with(
    monkeypatch: pytest.MonkeyPatch, row: launch.Row, classes: int
) -> list[ahead.Compiled]:
    monkeypatch.setattr(launch, "CLASSES_INNER", {4: (row,)})
    case = ahead.cross_entropy_case((4096, classes), torch.float32, "forward")
    with ahead.Recorder(ahead.TARGETS["sm_90"]) as launched:
        case.run()
    return [ahead.inspect("sm_90", case, name, kernel) for name, kernel in launched]


def test_a_spill_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    row = launch.Row(launch.ANY, 32_768, 1, 64)
    assert "spills" in [kernel.wrong for kernel in compile_with(monkeypatch, row, 32_768)]


def test_narrow_loads_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    row = launch.Row(launch.ANY, 1024, 1, 128)
    assert "narrow loads" in [kernel.wrong for kernel in compile_with(monkeypatch, row, 1023)]
