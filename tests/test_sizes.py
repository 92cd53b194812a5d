"""The sizes from which kernels are used, and the measurement of a machine's own sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import python
from torch import Tensor

from pyfused.adopt import tune
from pyfused.dispatch import sizes
from pyfused.dispatch.operator import Operator
from pyfused.ops.elementwise import GELU, MSE_LOSS, QUANTILE_LOSS
from pyfused.ops.operators import (
    CROSS_ENTROPY,
    LINEAR_CROSS_ENTROPY,
    NLL_LOSS,
    OPERATORS,
    SOFTMAX,
)

pytestmark = [pytest.mark.cpu, pytest.mark.thresholds]
MSE = None, None, "mean", None
MSE_NONE = None, None, "none", None
FIRST, SECOND = 1 << 10, 1 << 12


def is_torchs(op: Operator, x: Tensor, *others: Any) -> bool:
    return sizes.is_small(op, (x, *others), x.numel())


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "limits", lambda op, cpu, dtype=None: (FIRST, SECOND))


def test_the_second_limit_of_unreduced_losses() -> None:
    for elements, options, expected in (
        (FIRST - 1, MSE, True),
        (FIRST, MSE, False),
        (FIRST, MSE_NONE, True),
        (SECOND - 1, MSE_NONE, True),
        (SECOND, MSE_NONE, False),
    ):
        x = torch.zeros(elements)
        assert is_torchs(MSE_LOSS, x, x, *options) == expected


@pytest.mark.parametrize("classes", [sizes.FEW, sizes.FEW + 1])
def test_the_second_limit_of_few_classes(classes: int) -> None:
    x = torch.zeros(-(-FIRST // classes), classes)
    assert is_torchs(CROSS_ENTROPY, x) == (classes == sizes.FEW)
    assert is_torchs(SOFTMAX, x, 1, 3, None) == (classes == sizes.FEW)
    assert is_torchs(SOFTMAX, x.t(), -2, 3, None) == (classes == sizes.FEW)
    assert not is_torchs(SOFTMAX, x.t().contiguous(), -2, 3, None)  # torch vectorises over columns


def test_limits_of_half_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    mse = sizes.limits(MSE_LOSS, True)
    for dtype, factor in sizes.HALVES.items():
        assert sizes.limits(MSE_LOSS, True, dtype) == (factor * mse[0], factor * mse[1])
        assert sizes.limits(MSE_LOSS, False, dtype) == sizes.limits(MSE_LOSS, False)
        assert sizes.limits(SOFTMAX, True, dtype) == sizes.ON_CPU_OF_HALVES["softmax"]


@pytest.mark.parametrize("needs_grad", [False, True])
def test_the_second_limit_of_calls_without_gradients(needs_grad: bool) -> None:
    x = torch.zeros(FIRST, requires_grad=needs_grad)
    assert is_torchs(GELU, x, "none") != needs_grad
    assert not is_torchs(GELU, x, "tanh")
    rows = x.view(-1, 64)
    assert is_torchs(NLL_LOSS, rows) != needs_grad
    with torch.no_grad():
        assert is_torchs(GELU, x, "none")
        assert is_torchs(NLL_LOSS, rows)


def test_few_classes_of_half_precision() -> None:
    for classes, expected in ((2 * sizes.FEW + 1, True), (2 * sizes.FEW + 2, False)):
        x = torch.zeros(-(-FIRST // classes), classes, dtype=torch.bfloat16)
        assert is_torchs(CROSS_ENTROPY, x) == expected


def test_a_linear_layer_counts_its_logits() -> None:
    x, weight = torch.zeros(3, 8), torch.zeros(5, 8)
    assert LINEAR_CROSS_ENTROPY.elements((x, weight)) == 15
    assert LINEAR_CROSS_ENTROPY.elements((x[:0], weight)) == 0


def test_empty_calls_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "FORCED", "cpu")
    for elements in (0, 1):
        x = torch.zeros(elements)
        assert is_torchs(MSE_LOSS, x, x, *MSE) == (elements == 0)


def test_families_are_defaults_of_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.delitem(sizes.cpu_limits(), "quantile_loss")
    sizes.limits.cache_clear()
    try:
        assert sizes.limits(QUANTILE_LOSS, True) == sizes.ON_CPU["PointwiseLoss"]
        assert all(
            sizes.limits(op, on_cpu) for op in OPERATORS.values() for on_cpu in (True, False)
        )
    finally:
        sizes.limits.cache_clear()


@pytest.mark.parametrize("faster_from", [1 << 10, 1 << 17, 1 << 25])
def test_the_limit_of_a_machine_is_found_by_bisection(
    monkeypatch: pytest.MonkeyPatch, faster_from: int
) -> None:
    tried: list[int] = []

    def wins(_op: Operator, elements: int, _second: bool) -> bool:
        tried.append(elements)
        return elements >= faster_from

    monkeypatch.setattr(tune, "wins", wins)
    assert tune.limit(MSE_LOSS, second=False) == faster_from
    assert len(tried) <= 4


TUNED = [name for name in OPERATORS if any(sizes.ON_CPU.get(name, ())) and name not in sizes.LINEAR]


@pytest.mark.parametrize("name", TUNED)
@pytest.mark.parametrize("second", [False, True])
def test_steps_of_the_operator_are_measured(name: str, second: bool) -> None:
    op = OPERATORS[name]
    step = tune.call_of(op, 1 << 6, second)
    for function in (tune.torch_function(op), getattr(tune.functional, name)):
        step(function)  # raises if the arguments do not match the operator


def test_measured_sizes_are_stored_for_this_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert sizes.tuned() == {}
    monkeypatch.setattr(tune, "limit", lambda _op, second: 7 + second)
    tune.main(["mse_loss"])
    monkeypatch.setattr(tune, "limit", lambda _op, second: 5 + second)
    tune.main(["l1_loss"])
    kept = sizes.tuned()
    assert kept == {"mse_loss": (7, 7), "l1_loss": (5, 5)} | kept
    for text in ("", "[]", "{}", '{"machine": 3, "limits": 4}'):
        sizes.tuned_file().write_text(text)
        assert sizes.tuned() == {}
    other = json.dumps({"machine": "another", "limits": {"mse_loss": [1, 2]}})
    sizes.tuned_file().write_text(other)
    assert sizes.tuned() == {}


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
