"""The options that cross_entropy adds to torch's, such as z_loss, softcap and denominator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from catalogue import TORCH
from compare import FLOATS, HALF, operators_of_torch
from conftest import ISAS, KernelCalls
from grid import grid
from samples import target_indices
from torch.nn import functional as F

from pyfused import functional as fused
from pyfused.ops.operators import CROSS_ENTROPY
from pyfused.types import CrossEntropyOptions


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


@pytest.mark.interpreted
def test_token_weight_of_zero_and_of_ignored_targets() -> None:
    token_weight = torch.zeros(6)
    for classes in (79, 5):  # two passes and one in the interpreter
        input, target = torch.randn(6, classes, requires_grad=True), target_indices((6, classes))
        loss = fused.cross_entropy(input, target, token_weight=token_weight)
        assert loss.isnan()
        (gradient,) = torch.autograd.grad(loss, input)
        assert not gradient.any()
    assert fused.cross_entropy(input, target, token_weight=token_weight, reduction="sum") == 0
    token_weight = torch.ones(6)
    token_weight[target == -100] = torch.inf
    torch.testing.assert_close(
        fused.cross_entropy(input, target, token_weight=token_weight),
        fused.cross_entropy(input, target),
    )


def test_only_ignored_targets() -> None:
    """The mean over no targets equals torch's."""
    input = torch.randn(6, 5, requires_grad=True)
    target, none = torch.full((6,), -100), torch.tensor(0)
    for loss in (
        fused.cross_entropy(input, target, denominator=none),
        fused.linear_cross_entropy(input, torch.randn(7, 5), target, denominator=none),
        TORCH.cross_entropy(input, target, denominator=none),
    ):
        assert loss.isnan()
        (gradient,) = torch.autograd.grad(loss, input)
        assert not gradient.any()


@pytest.mark.thresholds
@pytest.mark.parametrize("n", [4, 4000])
@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1}])
def test_uint8_indices_that_torch_does_not_support(n: int, options: dict[str, Any]) -> None:
    """torch raises for images, and for a weight with label smoothing, at every size."""
    x, w, target = torch.randn(n, 5, 3, 2), torch.randn(5, 3, 2, 8), torch.randint(5, (n, 3, 2))
    target = target.to(torch.uint8)
    with pytest.raises(RuntimeError):
        fused.cross_entropy(x, target, **options)
    with pytest.raises(RuntimeError):
        fused.linear_cross_entropy(torch.randn(n, 8), w, target, **options)
    if not options:
        with pytest.raises(RuntimeError):
            fused.cross_entropy(x[..., 0, 0], target[:, 0, 0], torch.rand(5), label_smoothing=0.1)


@pytest.mark.thresholds
def test_the_size_of_a_head_is_its_number_of_logits(kernel_calls: KernelCalls) -> None:
    x, target = torch.randn(8, 4), torch.arange(8)
    for classes in (10, 4000):
        assert not kernel_calls
        fused.linear_cross_entropy(x, torch.randn(classes, 4), target)
    assert kernel_calls


@pytest.mark.cpu
def test_a_filter_that_skips_few_columns_copies_nothing() -> None:
    x, weight = (torch.randn(n, 8, requires_grad=True) for n in (30, 50))
    loss = fused.linear_cross_entropy(x, weight, torch.arange(30), filter_eps=1e-6)
    with operators_of_torch("aten::index_add_", "aten::index") as copies:
        loss.backward()
        fused.linear_cross_entropy(x, weight, torch.arange(30), filter_eps=1e-6)
    assert not copies


def test_processes_with_a_shard_compare_each_option() -> None:
    """Calls with different options have different descriptions, which processes exchange."""
    changes: list[dict[str, Any]] = [
        {},
        *({"scale": scale} for scale in (2.0, 3.0)),
        *({"reduction": reduction} for reduction in ("sum", "none")),
        *({"token_weight": torch.ones(3, dtype=dtype)} for dtype in FLOATS[:2]),
        *({"softcap": 2.0}, {"temperature": 2.0}, {"label_smoothing": 0.1}, {"z_loss": 0.1}),
        *({"ignore_index": 1}, {"denominator": 2.0}, {"loss_dtype": torch.float64}),
    ]
    target, found = torch.zeros(3, dtype=torch.int64), []
    for options in changes:
        arguments = torch.zeros(3, 4), target, None, CrossEntropyOptions(**options)
        first, again = (CROSS_ENTROPY.describe_call(arguments, 0, 4, 8) for _ in range(2))
        assert first == again
        found.append(first)
    assert len({*found}) == len(changes)


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


@pytest.mark.thresholds
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_a_lower_loss_dtype_rounds_the_loss_only(reduction: str) -> None:
    """torch's operators compute this small call."""
    input, target = torch.randn(6, 5, requires_grad=True), torch.tensor([0, 1, 2, 3, 4, 0])
    losses = [
        fused.cross_entropy(input, target, reduction=reduction, loss_dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert losses[1].equal(losses[0].bfloat16())
    wide, rounded = (torch.autograd.grad(loss.sum(), input)[0] for loss in losses)
    assert rounded.equal(wide)
