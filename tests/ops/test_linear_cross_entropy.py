"""linear_cross_entropy compared with cross_entropy of all logits, and its loop over blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import products
from conftest import KernelCalls, backend
from grid import grid
from torch import Tensor

import pyfused
from pyfused import functional as fused
from pyfused.backends import cpu


@pytest.mark.parametrize("count", [60, 0])
@pytest.mark.parametrize("wanted", ["input", "head", "bias", None])
@pytest.mark.parametrize(
    "function",
    [fused.linear_cross_entropy, pytest.param(fused.linear_log_probs, marks=pytest.mark.cpu)],
)
def test_no_unnecessary_matrix_products(function: Any, wanted: str | None, count: int) -> None:
    """No products are computed for ignored rows, except on asynchronous devices.

    If all rows are ignored, one is computed.
    """
    shapes = {"input": (90, 6), "head": (70, 6), "bias": (70,)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    target, rows = torch.randint(70, (90,)), 90 if backend.ASYNCHRONOUS else count or 1
    target[: 90 - count] = -100
    tensors["head"][0, 0] = math.nan  # also where all rows are ignored
    if wanted:
        tensors[wanted].requires_grad_()
    input, head, bias = tensors.values()
    with products() as found:
        result = function(input, head, target, linear_bias=bias, memory_budget=1 << 20)
        if wanted:
            getattr(result, "log_probability", result).sum().backward()
    gradient = {"input": [(rows, 70, 6)], "head": [(70, rows, 6)]}
    assert found == [(rows, 6, 70), *gradient.get(str(wanted), [])]
    assert input.grad is None or not input.grad[: 90 - count].any()


@pytest.mark.parametrize("rows", [12, 6])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"token_weight": 0.5}])
def test_logits_no_larger_than_the_weight_are_kept(
    rows: int, reduction: str, options: dict[str, Any]
) -> None:
    """Unreduced losses keep the logits, and others their gradient. Backward may run twice."""
    input, head = (torch.randn(n, 6, requires_grad=True) for n in (rows, 70))
    leaves, target = (input, head), torch.randint(0, 70, (rows,))
    grad = torch.rand(rows if reduction == "none" else ())
    options = options | {"reduction": reduction}
    if "token_weight" in options:
        options["token_weight"] = torch.full((rows,), 0.5)
    best = fused.cross_entropy(input @ head.t(), target, **options)
    with products() as forward:
        loss = fused.linear_cross_entropy(*leaves, target, **options)
    with products() as backward:
        torch.autograd.grad(loss, leaves, grad, retain_graph=True)
    expected_counts = (1, 2) if rows == 6 else {"none": (1, 3), "mean": (3, 0)}[reduction]
    assert (len(forward), len(backward)) == expected_counts
    with torch.autograd.graph.save_on_cpu():
        hooked = fused.linear_cross_entropy(*leaves, target, **options)
    for factor, retain_graph in ((1, True), (math.inf, True), (1, False)):
        expected, *others = (
            torch.autograd.grad(x, leaves, factor * grad, retain_graph=retain_graph)
            for x in (best, loss, hooked)
        )
        for got in others:
            torch.testing.assert_close(got, expected, equal_nan=True)


@pytest.mark.cpu
@pytest.mark.parametrize("rows", [4, 6])
def test_logits_of_half_weights_in_float32_are_kept_if_they_are_no_larger(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "product_dtype", lambda _: torch.float32)
    leaves = [torch.randn(n, 8, dtype=torch.bfloat16, requires_grad=True) for n in (rows, 70)]
    loss = fused.linear_cross_entropy(*leaves, torch.arange(rows), loss_dtype=torch.float32)
    sizes = [x.numel() * x.element_size() for x in loss.grad_fn.saved_tensors]
    assert (rows * 70 * 4 in sizes) == (rows == 4)  # the weight has 70 * 8 * 2 bytes


@pytest.mark.parametrize("wanted", [0, 1])
def test_gradients_of_few_rows_are_no_larger_than_needed(wanted: int) -> None:
    """A loss of few rows keeps the gradient of its logits only if the weight needs one."""
    leaves = torch.randn(4, 6), torch.randn(70, 6)
    leaves[wanted].requires_grad_()
    loss = fused.linear_cross_entropy(*leaves, torch.arange(4))
    sizes = [x.numel() for x in loss.grad_fn.saved_tensors]
    assert (4 * 70 in sizes) == wanted


@pytest.mark.parametrize("classes", [2, 40], ids=["rows", "blocks"])
def test_weight_gradients_are_summed_in_float32(classes: int) -> None:
    """Each of many rows adds less than half precision can resolve."""
    n = 4096 if backend is cpu else 512
    input = torch.ones(n, 1, dtype=torch.bfloat16)
    head = torch.zeros(classes, 1, dtype=torch.bfloat16, requires_grad=True)
    target = torch.zeros(n, dtype=torch.int64)
    expected = torch.full((classes, 1), 1 / classes)
    expected[0] -= 1
    budget = 64 if backend is cpu else 1024
    fused.linear_cross_entropy(input, head, target, memory_budget=budget).backward()
    torch.testing.assert_close(head.grad, expected.bfloat16())


# Positions of the largest logit or a NaN, for logits that are computed in blocks of classes.
BLOCKS: dict[str, Callable[[Tensor], Tensor]] = {
    "far from the first": lambda row: torch.cat([row[:64], row[64:] * 8 + 1e8]),
    "ties": lambda row: row.index_fill(0, torch.tensor([63, 64, 190]), 50.0),
    "first masked": lambda row: row.index_fill(0, torch.arange(130), -math.inf),
    "last masked": lambda row: row.index_fill(0, torch.arange(60, 192), -math.inf),
    "all masked": lambda row: row * 0 - math.inf,
    "nan first": lambda row: row.index_fill(0, torch.tensor([5, 150]), math.nan),
    "nan last": lambda row: row.index_fill(0, torch.tensor([191]), math.nan),
}


@pytest.mark.interpreted
@grid(kind=BLOCKS, label=[0, 63, 191], options=[{}, {"label_smoothing": 0.1, "weight": True}])
def test_blocks_of_classes_equal_whole_rows(
    kind: str, label: int, options: dict[str, Any], kernel_calls: KernelCalls
) -> None:
    """Losses, metrics and gradients; products with one feature of 1 are exact."""
    row, target = BLOCKS[kind](3 * torch.randn(192)), torch.tensor([label])
    if "weight" in options:
        options = options | {"weight": torch.rand(192)}
    logits, head = row[None].clone().requires_grad_(), row[:, None].clone().requires_grad_()
    expected = fused.cross_entropy_with_metrics(logits, target, **options, scale=0.5)
    budget = 1 if backend is cpu else 64 * 4  # bytes: blocks of 64 classes
    kernel_calls.clear()
    got = fused.linear_cross_entropy_with_metrics(
        torch.ones(1, 1), head, target, **options, scale=0.5, memory_budget=budget
    )
    assert kernel_calls["row_state"] > 1
    torch.testing.assert_close((got[0], *got[1]), (expected[0], *expected[1]), equal_nan=True)
    (gradient,), (best,) = (
        torch.autograd.grad(loss, leaf) for loss, leaf in ((got[0], head), (expected[0], logits))
    )
    torch.testing.assert_close(gradient.t(), best, equal_nan=True)


# ---- products ------------------------------------------------------------------------------------


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", ["half", "float32"])
def test_dtypes_of_products(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "HALF_PRODUCTS", dtype)
    target = torch.randint(0, 1000, (200,))
    tensors = [torch.randn(n, 64).bfloat16() for n in (200, 1000)]
    explanation = pyfused.explain("linear_cross_entropy", *tensors, target)
    assert (explanation.products is torch.float32) is (dtype == "float32")
    assert str(explanation).endswith(f"cpu: products in {explanation.products}")


# ---- block sizes ---------------------------------------------------------------------------------


@pytest.mark.cpu
def test_the_number_of_logits_per_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """All logits are computed at once if they take no more memory than a block and a sum."""
    monkeypatch.setattr(cpu, "HALF_PRODUCTS", "half")

    def logits(dtype: torch.dtype, rows: int = 3000, **options: Any) -> tuple[int, int]:
        input, head = torch.zeros(rows, 512, dtype=dtype), torch.zeros(4000, 512, dtype=dtype)
        with products() as found:
            fused.linear_cross_entropy(input, head, torch.zeros(rows).long(), **options)
        return found[0][0], found[0][2]

    assert logits(torch.float32) == logits(torch.bfloat16) == (512, 4000)
    assert logits(torch.float32, rows=1030) == (512, 4000)
    assert logits(torch.bfloat16, rows=1030) == (1030, 4000)
    assert logits(torch.bfloat16, memory_budget=1 << 20) == (131, 4000)
    assert logits(torch.bfloat16, memory_budget=1 << 17)[1] < 4000
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert logits(torch.float32, rows=1030) == (1030, 4000)


# ---- the memory of a fallback --------------------------------------------------------------------


@pytest.mark.cpu
def test_only_valid_calls_warn_about_the_memory_of_their_logits() -> None:
    input, head, target = torch.ones(1024, 1), torch.ones(8192, 1), torch.zeros(1024).long()
    learnt = torch.tensor(3.0, requires_grad=True)
    for options in ({"reduction": "avg"}, {"label_smoothing": 1.5}, {"memory_budget": -1}):
        with pytest.raises((RuntimeError, ValueError), match=next(iter(options))):  # no warning
            fused.linear_cross_entropy(input, head, target, softcap=learnt, **options)
    with pytest.warns(RuntimeWarning, match="need 32 MiB for the logits: softcap is a tensor"):
        fused.linear_cross_entropy(input, head, target, softcap=learnt)
