"""If torch lacks a private attribute, calls fall back to torch, and nothing raises."""

from __future__ import annotations

import importlib.util
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import pyfused
from pyfused import functional as fused
from pyfused import torch_internals

SOURCE = Path(torch_internals.__file__)
REQUIRED = re.findall(r'_required\(\s*"([\w.]+)"', SOURCE.read_text())


def test_this_version_has_all_attributes() -> None:
    assert len(REQUIRED) > 10
    assert torch_internals.MISSING is None


@pytest.mark.parametrize("path", REQUIRED)
def test_missing_attributes_are_named(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve = pkgutil.resolve_name

    def of_another_version(name: str) -> Any:
        if name == path:
            raise AttributeError(name)
        return resolve(name)

    monkeypatch.setattr(pkgutil, "resolve_name", of_another_version)
    spec = importlib.util.spec_from_file_location("internals_of_another_torch", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    other = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(other)
    assert path == other.MISSING
    assert other.active_mode() == f"this version of torch lacks {path}"
    assert not other.compiler_traces()


def test_calls_fall_back_without_required_attributes(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5)
    expected = torch.autograd.grad(F.mse_loss(x, y), x)
    assert pyfused.explain("mse_loss", x, y).backend != "torch"
    monkeypatch.setattr(torch_internals, "MISSING", "torch._C.something")
    assert pyfused.explain("mse_loss", x, y).reason == (
        "this version of torch lacks torch._C.something"
    )
    assert torch.equal(torch.autograd.grad(fused.mse_loss(x, y), x)[0], expected[0])
