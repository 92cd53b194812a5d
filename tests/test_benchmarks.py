"""Tests of the benchmarks: training steps, shapes of the sweep, and reports."""

from __future__ import annotations

import importlib
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import KernelCalls
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import cases
import report
import run
import sweep
from cases import TORCH, TRAINING, Case, assert_correct, draw, step

from pyfused.dispatch import sizes
from pyfused.ops.operators import CROSS_ENTROPY


def test_each_step_frees_the_previous_gradient() -> None:
    seen: list[tuple[Tensor, Tensor | None]] = []

    def relu(input: Tensor, **_: object) -> Tensor:
        seen.append((input, input.grad))
        return input.relu()

    case = Case("relu", (100,))
    arguments = draw(case)
    one, other = (step(SimpleNamespace(relu=relu), case, arguments, TRAINING) for _ in range(2))
    one()
    other()
    one()
    (first, _), (second, _), (again, gradient) = seen
    assert first is again
    assert gradient is None  # the step frees it before the call
    assert first is not second
    assert first.data_ptr() == second.data_ptr() == arguments.input.data_ptr()
    assert first.grad is not None
    assert second.grad is not None
    assert arguments.input.grad is None


def test_wrong_results_are_not_timed() -> None:
    case = Case("relu", (100,))
    wrong = SimpleNamespace(relu=lambda input: TORCH.relu(input) * 1.01)
    assert_correct(case, draw(case), TORCH)
    with pytest.raises(AssertionError, match="not close"):
        assert_correct(case, draw(case), wrong)


# ---- the sweep -----------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["cross_entropy", "softmax", "mse_loss", "relu"])
def test_a_seed_repeats_the_calls(op: str) -> None:
    one, other = (list(sweep.drawn(op, torch.float32, 30, random.Random(3))) for _ in range(2))
    assert one == other
    dims = {len(case.shape) for case in one}
    assert dims == {"cross_entropy": {2, 3}, "softmax": {2, 3, 4}}.get(op, {1, 2, 3, 4})
    assert {case.reduction for case in one} == (
        {"mean", "none"} if "loss" in op or "entropy" in op else {"mean"}
    )
    assert len({case.elements for case in one}) > 20


@pytest.mark.thresholds
@pytest.mark.parametrize("how", [sweep.CALLED, sweep.PATCHED])
def test_a_sweep_times_torch_and_the_kernels(how: str, kernel_calls: KernelCalls) -> None:
    case = Case("sigmoid", (1 << 22,))
    sweep.drawn_and_checked(case)
    theirs, ours = sweep.both(case, cases.FORWARD, how)
    kernel_calls.clear()
    theirs(1)
    assert not kernel_calls
    ours(1)
    assert kernel_calls["sigmoid"]


def test_a_sweep_includes_the_smallest_calls_with_kernels() -> None:
    many, few = sizes.limits(CROSS_ENTROPY, True)
    swept = {case.shape[1]: case for case in sweep.edges("cross_entropy", torch.float32)}
    assert many <= swept[1000].elements < many + 1000
    assert few <= swept[sizes.FEW].elements < few + sizes.FEW
    assert {case.reduction for case in sweep.edges("mse_loss", torch.float32)} == {"mean", "none"}
    (embeddings,) = sweep.edges("triplet_margin_loss", torch.float32)
    assert embeddings.elements == sizes.cpu_limits()["triplet_margin_loss"][1]
    assert len(embeddings.shape) == 2


# ---- reports -------------------------------------------------------------------------------------


def test_results_are_separated_by_instruction_set() -> None:
    for file in report.RESULTS.glob("*/results.json"):
        assert file.parent.name == report.slug(report.load([file]))


COMMANDS = (
    *("report", "quick", "memory", "busy", "compare HEAD", "allocators", "compiled", "overhead"),
    *("sweep", "head", "steps", "filter-eps", "gpu gpu.json", "gpu-launch launch.md"),
    "gpu-check folder",
)


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_has_its_function(words: str) -> None:
    function = run.parser().parse_args(words.split()).function
    if isinstance(function, str):
        module, name = function.split(".")
        function = getattr(importlib.import_module(module), name)
    assert callable(function)
