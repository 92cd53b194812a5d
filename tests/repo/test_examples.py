"""The examples run and learn, with equal losses for torch and pyfused.

`make demo` runs all of them at full size.
"""

from __future__ import annotations

import importlib
import itertools
import json
import math
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from conftest import KernelCalls, fused_always

import pyfused.functional
import pyfused.nn

pytestmark = pytest.mark.thresholds
pytest.importorskip("sklearn")


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    monkeypatch.setenv("PYFUSED_BACKEND", "cpu")  # undone after a test, unlike in the examples


def example(name: str) -> ModuleType:
    return importlib.import_module(name)


def test_gpt_trains_with_equal_losses(tmp_path: Path) -> None:
    gpt = example("gpt")
    path = tmp_path / "tokens.pt"
    tokens = torch.arange(1000) % 50
    torch.save({"training": tokens, "held_out": tokens, "vocabulary": 50}, path)
    ways = (torch.nn.functional, False), (pyfused.functional, False), (pyfused.functional, True)
    runs = [list(gpt.train(F, path, 5, linear)) for F, linear in ways]
    torch_losses, losses, linear_losses = ([step.loss for step in run] for run in runs)
    assert losses == pytest.approx(torch_losses, rel=1e-5)
    assert linear_losses == pytest.approx(torch_losses, rel=1e-5)
    assert losses[-1] < losses[0]
    for step in runs[1]:
        assert 0 < step.loss_ms < step.step_ms


def test_grpo_raises_the_reward_with_equal_losses(
    kernel_calls: KernelCalls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["grpo.py", "--steps", "30"])
    example("grpo").main()  # exits if losses differ, or the reward does not rise
    assert kernel_calls["row_gradients"] >= 2 * 30
    assert "at the end" in capsys.readouterr().out


def test_distillation_has_equal_losses(
    tmp_path: Path, kernel_calls: KernelCalls, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Uses a text of few tokens with a learnable order."""
    tokens, path = torch.arange(1000) % 50, tmp_path / "tokens.pt"
    torch.save({"training": tokens, "held_out": tokens, "vocabulary": 50}, path)
    arguments = ["--tokens", str(path), "--steps", "8", "--teacher-steps", "8"]
    monkeypatch.setattr(sys, "argv", ["distillation.py", *arguments])
    with fused_always():  # like PYFUSED_BACKEND=cpu, which it sets before importing pyfused
        example("distillation").main()  # exits if losses differ, or the student does not learn
    printed = capsys.readouterr().out
    assert kernel_calls["kl_div_with_logits"] >= 8
    first, last = map(float, re.findall(r"(?m)^(?:teacher|student): .* loss (\S+)$", printed))
    assert first < last  # the teacher has improved


@pytest.mark.parametrize("way", ["torch", "pyfused"])
def test_a_recommender_learns(way: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    recommender = example("recommender")
    seconds = Mock(perf_counter=itertools.count().__next__)  # a step takes one, on any machine
    monkeypatch.setattr(recommender, "time", seconds)
    monkeypatch.setattr(sys, "stdin", ["1", "20", "20"])
    recommender.work(way, 1000)
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [result["steps"] for result in results] == [1, 21, 41]
    assert results[-1]["loss"] < math.log(1000) - 2  # that of guessing
    assert 0.3 < results[-1]["recall"] <= 1
