"""Behaviour that docs/compatibility.md and docs/losses.md describe."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor

import pyfused
from pyfused import functional as F
from pyfused.adopt.lazy_logits import LazyLogits
from pyfused.backends import cpu
from pyfused.dispatch.sizes import COMPILED, converted_limit
from pyfused.ops.operators import LINEAR_CROSS_ENTROPY, OPERATORS

pytestmark = [pytest.mark.cpu, pytest.mark.thresholds]
ROOT = Path(__file__).parents[2]
INF, NAN = math.inf, math.nan


def gradient_of(function: Callable[..., Tensor], x: Tensor, *others: Any, **options: Any) -> Tensor:
    leaf = x.clone().requires_grad_()
    function(leaf, *others, **options).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def test_gelu_of_infinities() -> None:
    x = torch.full((1 << 24,), INF, requires_grad=True)
    assert F.gelu(x).isposinf().all()
    for y in (F.gelu(-x), TF.gelu(-x), torch.autograd.grad(F.gelu(-x).sum(), x)[0]):
        assert y.isnan().all()
    assert torch.equal(F.gelu(x[:-1]).isnan(), TF.gelu(x[:-1]).isnan())
    if cpu.capability == "x86-64-v4":
        assert TF.gelu(x).isnan().all()


def test_positions_of_nan() -> None:
    x, nan = torch.randn(1 << 17), torch.full((1 << 17,), NAN)
    for name in ("elu", "selu", "celu"):
        for position in (0, 5, len(x) - 1):
            alone = x.clone()
            alone[position] = NAN
            found = gradient_of(getattr(F, name), alone)[position]
            everywhere = gradient_of(getattr(F, name), nan)
            assert torch.equal(found.isnan(), everywhere[0].isnan())
            assert everywhere.isnan().all() or torch.equal(everywhere, found.expand_as(x))


def test_infinite_gradients_from_above() -> None:
    x, y = torch.zeros(1 << 17), torch.ones(1 << 17)
    scaled = lambda f: lambda *a: f(*a) * INF  # noqa: E731
    ours, theirs = (gradient_of(scaled(f.margin_ranking_loss), y, x, y) for f in (F, TF))
    assert ours.isnan().all()
    assert not theirs.any()


@pytest.mark.skipif(not cpu.RECYCLES, reason="memory is recycled on Linux only")
def test_the_storage_of_a_large_gradient() -> None:
    with pytest.raises(RuntimeError, match="resize"):
        gradient_of(F.relu, torch.randn(1 << 24)).untyped_storage().resize_(0)


def test_gradients_of_celu_in_float64() -> None:
    x = torch.linspace(-3, 1, 1 << 20, dtype=torch.float64)
    exact = (x / 0.1).exp().clamp(max=1)
    ours, theirs = (gradient_of(f.celu, x, alpha=0.1) for f in (F, TF))
    assert ((ours - exact) / exact).abs().max() < 1e-14
    assert 1e-7 < ((theirs - exact) / exact).abs().max() < 2e-6


def test_operators_without_kernels() -> None:
    """The page names every loss and activation of torch that no kernel computes."""
    page = (ROOT / "docs/losses.md").read_text("utf-8")
    names = set(re.findall(r"`(\w+)`", page[page.index("## Operators without kernels") :]))
    modules = {op.module for op in OPERATORS.values()}
    torchs = (torch.nn.modules.activation, torch.nn.modules.loss)
    missing = {name for module in torchs for name in module.__all__ if name not in modules}
    of_functions = {x.replace("_", ""): x for x in dir(TF) if not x.endswith("_")}
    functions = {of_functions[name.lower()] for name in missing if name.lower() in of_functions}
    assert len(functions) > 10
    assert functions | {"gumbel_softmax"} <= names
    assert all(getattr(F, name) is getattr(TF, name) for name in functions)


def test_sizes_that_change_a_call() -> None:
    """The numbers of the page, and of docs/compile.md."""
    page, compiled = (
        (ROOT / f"docs/{n}.md").read_text("utf-8") for n in ("compatibility", "compile")
    )
    logits = converted_limit(LINEAR_CROSS_ENTROPY, torch.empty(0))
    assert f"{logits:,} logits" in page
    model = pyfused.convert(torch.nn.Sequential(torch.nn.Linear(4, 128)), head="0")
    for tokens in (logits // 128 - 1, logits // 128):
        lazy = isinstance(model(torch.ones(tokens, 4)), LazyLogits)
        assert lazy == (tokens * 128 >= logits)
    assert "32 MiB of gradient" in page
    assert cpu.RECYCLED_BYTES == 32 << 20
    for limit in COMPILED[LINEAR_CROSS_ENTROPY.name]:
        assert f"{limit:,}" in compiled

    for classes in (10, 1000):  # a small call, and a kernel
        x = torch.full((256, classes), NAN)
        x[1:] = 0.0
        target = torch.ones(256, dtype=torch.int64)
        target[0] = -100
        is_zero = not gradient_of(F.cross_entropy, x, target)[0].any()
        assert is_zero == (classes == 1000)
