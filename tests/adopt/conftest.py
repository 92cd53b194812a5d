"""Fixtures of converted heads."""

from __future__ import annotations

import pytest
from torch import Tensor

from pyfused.adopt.lazy_logits import HeadCall
from pyfused.dispatch import reasons


@pytest.fixture
def untold() -> None:
    """Lets each test receive the warnings that other tests have received."""
    reasons._reported.clear()


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Counts the losses that were computed without logits."""
    found: list[Tensor] = []
    loss = HeadCall.run
    monkeypatch.setattr(HeadCall, "run", lambda *a, **k: found.append(loss(*a, **k)) or found[-1])
    return found
