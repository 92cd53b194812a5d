"""The options that cross_entropy adds to torch's, such as z_loss, softcap and denominator."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from catalogue import TORCH
from compare import FLOATS, HALF, Errors, evaluate, exactly, operators_of_torch
from conftest import ISAS, KernelCalls, backend
from grid import grid
from samples import target_indices, target_probabilities
from torch import Tensor

from pyfused import VocabShard
from pyfused import functional as fused
from pyfused.backends import cpu
from pyfused.ops.operators import CROSS_ENTROPY
from pyfused.types import CrossEntropyOptions

SHAPES = ((6, 5), (3, 300), (7,), (2, 4, 3, 5), (2, 150, 3))


def reference(input: Tensor, target: Tensor, **options: Any) -> Tensor:
    """Computes the loss by its textbook definition."""
    z_loss, scale = options.pop("z_loss", 0.0), options.pop("scale", 1.0)
    scale, cap = scale / options.pop("temperature", 1.0), options.pop("softcap", None)
    token_weight, divisor = options.pop("token_weight", None), options.pop("denominator", None)
    reduction = options.pop("reduction", "mean")
    input = scale * (input if cap is None else cap * torch.tanh(input / cap))
    dim = 0 if input.dim() == 1 else 1
    each = torch.nn.functional.cross_entropy(input, target, reduction="none", **options)
    counts, weight = torch.ones_like(each), options.get("weight")
    each = each + z_loss * input.logsumexp(dim) ** 2
    if not target.is_floating_point():
        valid = target != options.get("ignore_index", -100)
        if weight is not None:
            counts = weight[target.where(valid, 0)]
        each, counts = each.where(valid, 0), counts.where(valid, 0)
    if token_weight is not None:
        each, counts = each * token_weight, counts * token_weight
    if reduction == "none":
        return each
    if reduction == "sum":
        return each.sum()
    return each.sum() / (counts.sum() if divisor is None else divisor)


def arguments(
    shape: tuple[int, ...], dtype: torch.dtype, is_soft: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draws input, target, weight and token_weight."""
    input = (4 * torch.randn(shape)).to(dtype).requires_grad_()
    target = target_indices(shape)
    weight, token_weight = torch.rand(shape[min(len(shape) - 1, 1)]) + 0.5, torch.rand(target.shape)
    if is_soft:
        target = target_probabilities(shape, dtype).requires_grad_()
    return input, target, weight.to(dtype), token_weight


OPTIONS: dict[str, dict[str, Any]] = {
    "z_loss": {"z_loss": 0.1},
    "scale": {"scale": 3.0},
    "denominator": {"denominator": 7},
    "all_none": {"z_loss": 0.1, "scale": 3.0, "reduction": "none", "label_smoothing": 0.2},
    "all_sum": {"z_loss": 0.1, "reduction": "sum"},
    "all_mean": {"z_loss": 0.01, "scale": 0.4, "denominator": torch.tensor(3)},
    "temperature": {"temperature": 2.5, "scale": 2.0},
}
CAPPED: dict[str, dict[str, Any]] = {
    "mean": {"softcap": 3.0},
    "none": {"softcap": 5.0, "temperature": 0.5, "reduction": "none", "label_smoothing": 0.2},
    "sum": {"softcap": 5.0, "scale": 3.0, "reduction": "sum", "z_loss": 0.1},
    "denominator": {"softcap": 2.0, "denominator": torch.tensor(3), "label_smoothing": 0.1},
}


@pytest.mark.interpreted
@grid(shape=SHAPES, dtype=FLOATS, options=CAPPED.values())
def test_capped_logits(
    shape: tuple[int, ...], dtype: torch.dtype, options: dict[str, Any], kernel_calls: KernelCalls
) -> None:
    """Computed from the row state, without materialising capped logits."""
    input, target, weight, token_weight = arguments(shape, dtype, False)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    rounding = max(1e-5, torch.finfo(dtype).eps)
    for weights in ({}, {"weight": weight, "token_weight": token_weight}):
        got = evaluate(fused.cross_entropy, input, target, **options, **weights, loss_dtype=wide)
        expected = evaluate(reference, input, target, convert=exactly, **options, **weights)
        torch.testing.assert_close(got.value.double(), expected.value, rtol=1e-5, atol=1e-5)
        (gradient,), (best,) = got.gradients, expected.gradients
        torch.testing.assert_close(gradient.double(), best, rtol=rounding, atol=rounding)
    assert kernel_calls == {"row_state": 2, "row_gradients": 2}
    loss, metrics = fused.cross_entropy_with_metrics(input, target, **options)
    torch.testing.assert_close(loss, fused.cross_entropy(input, target, **options))
    _, best = TORCH.cross_entropy_with_metrics(input.detach().double(), target, **options)
    log_p = metrics.log_probability.double()
    torch.testing.assert_close(log_p, best.log_probability, rtol=rounding, atol=rounding)
    assert torch.equal(metrics.prediction, best.prediction) or dtype in HALF


@pytest.mark.cpu
def test_capped_logits_with_unsupported_options() -> None:
    """Probabilities, focal loss and second derivatives fall back to torch's operators."""
    x = torch.randn(4, 30, dtype=torch.float64, requires_grad=True)
    target, probabilities = torch.tensor([3, -100, 7, 1]), torch.rand(4, 30).double()
    loss = fused.cross_entropy(x, target, softcap=2.0, gamma=1.5)
    torch.testing.assert_close(loss, fused.cross_entropy(fused.softcap(x, 2.0), target, gamma=1.5))
    got = fused.cross_entropy(x, probabilities, softcap=2.0)
    torch.testing.assert_close(got, reference(x, probabilities, softcap=2.0))
    for options in ({}, {"label_smoothing": 0.1, "z_loss": 0.1}):
        assert torch.autograd.gradgradcheck(
            lambda x, options=options: fused.cross_entropy(x, target, softcap=2.0, **options), x
        )
    with pytest.raises(IndexError, match="target: expected class indices"):
        fused.cross_entropy(x, torch.full((4,), 30), softcap=2.0)


@grid(
    shape=[(6, 5), (6, 300), (6, 5000), (2, 150, 3)],
    dtype=HALF,
    probabilities=[False, False, True, True],
    isa=ISAS,
)
def test_scaled_logits_are_not_rounded(
    shape: tuple[int, ...], dtype: torch.dtype, probabilities: bool, isa: str
) -> None:
    """Scaled logits are float32 for any input dtype, as is a loss with that loss_dtype."""
    input = (torch.rand(shape) * 2 - 1).to(dtype).requires_grad_()
    target = input.detach().argmax(1)
    if probabilities:
        target = torch.nn.functional.one_hot(target, shape[1]).movedim(-1, 1).to(dtype)
    options: dict[str, Any] = {"scale": 30.0, "reduction": "none"}
    loss = fused.cross_entropy(input, target, loss_dtype=torch.float32, **options)
    exact = input.detach().double().requires_grad_()
    expected = reference(
        exact, target.double() if probabilities else target, scale=30.0, reduction="none"
    )
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


@grid(shape=SHAPES, dtype=FLOATS, probabilities=[False, True, True, False])
def test_as_accurate_as_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype, probabilities: bool, kernel_calls: KernelCalls
) -> None:
    input, target, weight, token_weight = arguments(shape, dtype, probabilities)
    both = {"weight": weight, "token_weight": token_weight}
    combinations: list[dict[str, Tensor]] = [both, {}, *({name: both[name]} for name in both)]
    errors = Errors()
    for options, weights in product(OPTIONS.values(), combinations[: 4 if backend is cpu else 1]):
        given = options | weights
        got = evaluate(fused.cross_entropy, input, target, **given)
        native = evaluate(reference, input, target, **given)
        exact = evaluate(reference, input, target, convert=exactly, **given)
        errors.add_outcome(got, native, exact)
    errors.check(roundings=32 if dtype is torch.float64 else 2)
    assert kernel_calls["cross_entropy"] > 0


@pytest.mark.interpreted
def test_token_weight_of_zero_and_of_ignored_targets() -> None:
    token_weight = torch.zeros(6)
    for classes in (79, 5):  # two passes and one in the interpreter
        input, target, _, _ = arguments((6, classes), torch.float32, False)
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
    """A process describes its call to the others; no description of other options is equal."""
    changes: list[dict[str, Any]] = [
        {},
        *({"scale": scale} for scale in (2.0, 3.0)),
        *({"reduction": reduction} for reduction in ("sum", "none")),
        *({"token_weight": torch.ones(3, dtype=dtype)} for dtype in FLOATS[:2]),
        *({"softcap": 2.0}, {"temperature": 2.0}, {"label_smoothing": 0.1}, {"z_loss": 0.1}),
        *({"ignore_index": 1}, {"denominator": 2.0}, {"loss_dtype": torch.float64}),
    ]
    shard, target, found = VocabShard(0, 8), torch.zeros(3, dtype=torch.int64), []
    for options in changes:
        arguments = torch.zeros(3, 4), target, None, CrossEntropyOptions(**options)
        first, again = (CROSS_ENTROPY.describe_call(arguments, shard, True) for _ in range(2))
        assert first == again
        found.append(first)
    assert len({*found}) == len(changes)
