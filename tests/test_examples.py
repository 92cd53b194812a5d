"""The examples run, learn, and give the same losses with torch as with pyfused.

`make demo-quick` runs all of them at full size.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import pyfused.functional
import pyfused.nn

pytest.importorskip("sklearn")
pytest.importorskip("tokenizers")


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    # Nets as small as these gain nothing from a second, and wait long for it on a busy machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def example(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.mark.parametrize("name", ["digits", "regression", "gpt", "demo"])
def test_help(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "demo":
        pytest.importorskip("matplotlib")
        pytest.importorskip("rich")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as stopped:
        example(name).main()
    assert stopped.value.code == 0
    assert f"usage: {name}.py" in capsys.readouterr().out


def test_digits_learns_with_equal_losses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["digits.py", "--epochs", "3"])
    example("digits").main()
    accuracies = [line.split()[-1] for line in capsys.readouterr().out.splitlines()[:2]]
    assert accuracies[0] == accuracies[1]
    assert float(accuracies[1].rstrip("%")) > 80


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_digits_fails_where_the_losses_differ(
    factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    class WrongLoss(torch.nn.CrossEntropyLoss):
        def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return factor * super().forward(input, target)

    monkeypatch.setattr(sys, "argv", ["digits.py", "--epochs", "1"])
    monkeypatch.setattr(pyfused.nn, "CrossEntropyLoss", WrongLoss)
    with pytest.raises(SystemExit, match="differ by more than the tolerance"):
        example("digits").main()


def test_smallest_net_learns_the_sum() -> None:
    regression = example("regression")
    model = regression.build(pyfused.nn, inputs=2)
    inputs, targets = regression.SUM_INPUTS, regression.SUM_TARGETS
    steps = regression.train(model, pyfused.nn.MSELoss(), inputs, targets, regression.STEPS)
    assert list(steps)[-1] < 1e-3
    torch.testing.assert_close(model(inputs), targets, rtol=0, atol=0.05)


def test_gpt_trains_with_equal_losses(tmp_path: Path) -> None:
    gpt = example("gpt")
    path = tmp_path / "tokens.pt"
    tokens = torch.arange(1000) % 50
    torch.save({"training": tokens, "held_out": tokens, "vocabulary": 50}, path)
    runs = [list(gpt.train(F, path, 5)) for F in (torch.nn.functional, pyfused.functional)]
    torch_losses, losses = ([step.loss for step in run] for run in runs)
    assert losses == pytest.approx(torch_losses, rel=1e-5)
    assert losses[-1] < losses[0]
    for step in runs[1]:
        assert 0 < step.loss_ms < step.step_ms
