"""cross_entropy(inplace=True) overwrites the logits with their gradient, or raises."""

from __future__ import annotations

from typing import Any

import interpreter
import pytest
import torch
from conftest import ISAS, KernelCalls
from grid import grid
from samples import target_indices, target_probabilities
from torch import Tensor

from pyfused.functional import cross_entropy

SHAPES = [(5,), (70, 10), (6, 127), (6, 128), (2, 3, 5, 7), (2, 130, 40)]
SHAPES += [] if interpreter.ON else [(3, 2049), (2, 4097)]
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def logits_of(leaf: Tensor) -> Tensor:
    """Returns logits that are a result of a graph, in new memory."""
    return leaf * 1


def backward(
    leaf: Tensor, target: Tensor, *, inplace: bool, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the logits, and the gradients at the node that computed them and at the leaf."""
    logits = logits_of(leaf)
    seen: list[Tensor] = []
    logits.register_hook(seen.append)
    loss = cross_entropy(logits, target, inplace=inplace, **options)
    (gradient,) = torch.autograd.grad(loss, leaf, torch.linspace(1, 2, loss.numel()).view_as(loss))
    return logits, seen[0], gradient


@pytest.mark.interpreted
@grid(
    shape=SHAPES,
    dtype=FLOATS,
    reduction=["none", "mean", "sum"],
    smoothing=[0.0, 0.1],
    target_kind=["index", "index", "probabilities", "probabilities"],
    isa=ISAS,
)
def test_the_gradient_overwrites_the_logits(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    smoothing: float,
    reduction: str,
    target_kind: str,
    isa: str,
) -> None:
    leaf = (torch.randn(shape) * 3).to(dtype).requires_grad_()
    is_index = target_kind == "index"
    target = target_indices(shape) if is_index else target_probabilities(shape, dtype)
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}
    _, apart, expected = backward(leaf, target, inplace=False, **options)
    logits, taken, got = backward(leaf, target, inplace=True, **options)
    assert taken.data_ptr() == logits.data_ptr() != apart.data_ptr()
    assert torch.equal(got, expected)


@pytest.mark.parametrize("shape", [(20, 10), (4, 300), (2, 5, 6)], ids=str)
def test_both_gradients(shape: tuple[int, ...]) -> None:
    """The target's gradient is computed before the logits are overwritten."""
    leaf = torch.randn(shape, requires_grad=True)
    target = torch.randn(shape).softmax(1).requires_grad_()
    weight = torch.rand(shape[1])
    gradients = []
    for inplace in (False, True):
        loss = cross_entropy(logits_of(leaf), target, weight, inplace=inplace)
        gradients.append(torch.autograd.grad(loss, (leaf, target)))
    assert all(map(torch.equal, *gradients))


@pytest.mark.interpreted
@grid(dtype=FLOATS, reduction=["none", "mean", "sum"], isa=ISAS)
def test_logits_with_gaps_between_them(dtype: torch.dtype, reduction: str, isa: str) -> None:
    """The gradient overwrites the logits; the gaps belong to other tensors."""
    for rows, classes in ((70, 20), (6, 97)):  # in one tile, and in several
        target, end = torch.randint(classes, (rows,)), classes + 3
        leaf = torch.randn(rows, classes + 14).to(dtype).requires_grad_()
        found = []
        for inplace in (False, True):
            whole = logits_of(leaf)
            loss = cross_entropy(whole[:, 3:end], target, reduction=reduction, inplace=inplace)
            grad_output = torch.linspace(3, 4, loss.numel()).view_as(loss)
            found.append(torch.autograd.grad(loss, leaf, grad_output))
        assert torch.equal(whole[:, end:], leaf[:, end:])
        assert torch.equal(whole[:, :3], leaf[:, :3])
        assert torch.equal(whole[:, 3:end], found[1][0][:, 3:end])
        torch.testing.assert_close(found[1], found[0], rtol=4 * torch.finfo(dtype).eps, atol=0)


def test_without_gradients_nothing_is_overwritten() -> None:
    logits = torch.randn(6, 300)
    before, version = logits.clone(), logits._version
    cross_entropy(logits, torch.randint(300, (6,)), inplace=True)
    with torch.no_grad():
        cross_entropy(logits.requires_grad_(), torch.randint(300, (6,)), inplace=True)
    assert torch.equal(logits, before)
    assert logits._version == version


def overlapping(leaf: Tensor) -> Tensor:
    return logits_of(leaf).view(-1).as_strided((5, 8), (4, 1))


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda leaf: leaf, "a leaf,"),
        (lambda leaf: leaf.view(10, 6), "a view of a leaf,"),
        (lambda leaf: logits_of(leaf)[:1].expand(6, 10), "share memory"),
        (overlapping, "share memory"),
    ],
    ids=["leaf", "view of a leaf", "expanded", "overlapping"],
)
def test_logits_that_must_not_be_overwritten(make: Any, what: str) -> None:
    leaf = torch.randn(6, 10, requires_grad=True)
    before = leaf.detach().clone()
    input = make(leaf)
    with pytest.raises(RuntimeError, match=f"inplace: expected False.*{what}"):
        cross_entropy(input, torch.zeros(len(input), dtype=torch.int64), inplace=True)
    assert torch.equal(leaf, before)


@pytest.mark.thresholds
def test_errors_are_raised_at_every_size() -> None:
    """Small calls raise them too, although kernels do not run: wrong programs fail early."""
    leaf = torch.randn(2, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="inplace"):
        cross_entropy(leaf, torch.tensor([0, 1]), inplace=True)
    exponential = leaf.exp()
    loss = cross_entropy(exponential, torch.tensor([0, 1]), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_autograd_detects_overwritten_saved_logits(reduction: str, dtype: torch.dtype) -> None:
    """Another operator saves them before the loss, or before backward overwrites them."""
    leaf = torch.randn(6, 10, dtype=dtype, requires_grad=True)
    options: dict[str, Any] = {"reduction": reduction, "inplace": True}
    target, changed = torch.randint(10, (6,)), "modified by an inplace operation"
    loss = cross_entropy(leaf.exp(), target, **options)
    with pytest.raises(RuntimeError, match=changed):
        loss.sum().backward()
    logits = logits_of(leaf)
    square = logits * logits
    loss = cross_entropy(logits, target, **options)
    with pytest.raises(RuntimeError, match=changed):
        (loss.sum() + square.sum()).backward()
    if reduction == "mean" and dtype == torch.float32:
        return  # the forward pass has overwritten them
    logits = logits_of(leaf)
    loss = cross_entropy(logits, target, **options)
    square = logits * logits
    loss.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=changed):
        square.sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_backward_pass(reduction: str, kernel_calls: KernelCalls) -> None:
    leaf = torch.randn(6, 10, requires_grad=True)
    target = torch.randint(10, (6,))
    loss = cross_entropy(logits_of(leaf), target, reduction=reduction, inplace=True).sum()
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    if reduction == "none":  # the first pass has overwritten the logits
        with pytest.raises(RuntimeError, match=r"inplace: expected False.*second backward pass"):
            loss.backward()
    else:
        assert torch.equal(torch.autograd.grad(loss, leaf)[0], first)
    assert kernel_calls["cross_entropy"] > 0


def test_second_derivatives_raise() -> None:
    leaf = torch.randn(6, 10, requires_grad=True)
    loss = cross_entropy(logits_of(leaf), torch.randint(10, (6,)), inplace=True)
    with pytest.raises(RuntimeError, match="inplace: expected False for create_graph=True"):
        torch.autograd.grad(loss, leaf, create_graph=True)


def test_a_softcap_leaves_the_logits() -> None:
    logits = logits_of(torch.randn(6, 128, requires_grad=True))
    before = logits.clone()
    cross_entropy(logits, target_indices((6, 128)), softcap=5.0, inplace=True).backward()
    assert torch.equal(logits, before)
