"""The options that cross_entropy adds to torch's, such as z_loss, softcap and denominator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compare import HALF
from conftest import ISAS, KernelCalls
from grid import grid
from torch.nn import functional as F

from pyfused import functional as fused


@grid(
    shape=[(6, 5), (6, 300), (6, 5000), (2, 150, 3)],
    dtype=HALF,
    probabilities=[False, False, True, True],
    isa=ISAS,
)
def test_scaled_logits_are_not_rounded(
    shape: tuple[int, ...], dtype: torch.dtype, probabilities: bool, isa: str
) -> None:
    """Scaled logits are float32 for any input dtype; so is the loss if loss_dtype is float32."""
    input = (torch.rand(shape) * 2 - 1).to(dtype).requires_grad_()
    target = input.detach().argmax(1)
    if probabilities:
        target = torch.nn.functional.one_hot(target, shape[1]).movedim(-1, 1).to(dtype)
    options: dict[str, Any] = {"scale": 30.0, "reduction": "none"}
    loss = fused.cross_entropy(input, target, loss_dtype=torch.float32, **options)
    exact = input.detach().double().requires_grad_()
    wide_target = target.double() if probabilities else target
    expected = F.cross_entropy(30 * exact, wide_target, reduction="none")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    (of_loss,) = torch.autograd.grad(loss.sum(), input)
    (of_expected,) = torch.autograd.grad(expected.sum(), exact)
    error = torch.finfo(dtype).eps
    torch.testing.assert_close(of_loss.double(), of_expected, rtol=error, atol=error)
    _, metrics = fused.cross_entropy_with_metrics(input, target, **options)
    torch.testing.assert_close(
        metrics.log_probability.double(), -expected.detach(), rtol=1e-5, atol=1e-5
    )
    assert (metrics.log_probability <= 0).all()
    assert metrics.correct.all()


@pytest.mark.cpu
@pytest.mark.thresholds
def test_the_size_of_a_head_is_its_number_of_logits(kernel_calls: KernelCalls) -> None:
    x, target = torch.randn(8, 4), torch.arange(8)
    for classes in (10, 70_000):
        assert not kernel_calls
        fused.linear_cross_entropy(x, torch.randn(classes, 4), target)
    assert kernel_calls


@pytest.mark.thresholds
@pytest.mark.parametrize("rows", [4, 8000])  # computed by torch and by a kernel
def test_an_ignored_row_with_an_infinite_factor(rows: int) -> None:
    x, target, factor = torch.randn(rows, 5), torch.arange(rows) % 5, torch.ones(rows)
    target[1], factor[1] = -100, torch.inf
    loss = fused.cross_entropy(x, target, token_weight=factor, denominator=3.0)
    torch.testing.assert_close(loss, F.cross_entropy(x, target, reduction="sum") / 3)


@pytest.mark.interpreted
@pytest.mark.parametrize("denominator", [3.5, 2.0**63, 2.0**64, 1e30])
def test_denominators_of_any_size(denominator: float) -> None:
    """A whole number may exceed 64 bits."""
    x, target = torch.randn(6, 5, requires_grad=True), torch.arange(6) % 5
    loss = fused.cross_entropy(x, target, denominator=denominator)
    exact = F.cross_entropy(x.double(), target, reduction="sum") / denominator
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    gradients = [torch.autograd.grad(value, x)[0] for value in (loss, exact)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=0)
