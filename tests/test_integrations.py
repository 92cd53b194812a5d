"""transformers, Lightning and skorch: the same losses as without pyfused, step by step.

`make test-integrations` runs these; nothing is downloaded.
"""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import KernelCalls

import pyfused
import pyfused.nn

pytestmark = [
    pytest.mark.integrations,
    pytest.mark.filterwarnings("ignore"),  # theirs, of each other
]
STEPS = 12


@pytest.fixture(autouse=True)
def examples_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "disabled", True)


def example(name: str) -> ModuleType:
    return importlib.import_module(name)


def assert_equal_and_falling(losses: list[float], expected: list[float]) -> None:
    assert len(losses) >= STEPS
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["GPT-2", "BERT"])
def test_transformers_trainer(name: str, kernel_calls: KernelCalls) -> None:
    train = example("with_transformers").train
    expected = train(name, STEPS)
    assert not kernel_calls
    with pyfused.patch():
        losses = train(name, STEPS)
    assert_equal_and_falling(losses, expected)
    assert kernel_calls["cross_entropy"] >= STEPS


def test_lightning_trainer(kernel_calls: KernelCalls) -> None:
    train = example("with_lightning").train
    expected = train(False, STEPS)
    assert not kernel_calls
    assert_equal_and_falling(train(True, STEPS), expected)
    assert kernel_calls["cross_entropy"] >= STEPS
    assert kernel_calls["relu"] >= STEPS


def test_skorch_net(kernel_calls: KernelCalls) -> None:
    train = example("with_skorch").train
    expected = train(torch.nn, 2)
    assert not kernel_calls
    assert_equal_and_falling(train(pyfused.nn, 2), expected)
    assert kernel_calls["cross_entropy"] >= STEPS


@pytest.mark.parametrize("name", ["with_transformers", "with_lightning", "with_skorch"])
def test_the_example_runs(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = example(name)
    for length in ("STEPS", "EPOCHS"):
        monkeypatch.setattr(module, length, 3, raising=False)
    module.main()
    assert "largest difference between the loss curves" in capsys.readouterr().out
