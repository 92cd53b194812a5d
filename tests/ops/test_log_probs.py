"""log_probs and linear_log_probs: special values, memory, and independence of rows."""

from __future__ import annotations

from typing import Any

import interpreter
import pytest
import torch
from conftest import backend
from grid import FULL
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyfused import functional as fused
from pyfused.backends import cpu

every_operator = pytest.mark.parametrize("op", ["log_probs", "linear_log_probs"])


def draw(op: str, rows: int = 12, classes: int = 70) -> dict[str, Tensor]:
    """Returns the tensors of a call; a third of the targets are ignored."""
    target = torch.randint(0, classes, (rows,))
    target[1::3] = -100
    if op == "log_probs":
        return {"logits": (3 * torch.randn(rows, classes)).requires_grad_(), "target": target}
    shapes = {"input": (rows, 6), "linear_weight": (classes, 6), "linear_bias": (classes,)}
    drawn = {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items()}
    return drawn | {"target": target}


def all_results(op: str, **given: Any) -> fused.LogProbs:
    return getattr(fused, op)(**given, return_entropy=True, return_lse=True)


@every_operator
def test_results_that_were_not_requested(op: str) -> None:
    found = getattr(fused, op)(**draw(op))
    assert found[1:] == (None,) * 4
    found = getattr(fused, op)(**draw(op), return_lse=True, return_metrics=True)
    assert found.entropy is None
    assert found.log_sum_exp.requires_grad
    assert not found.mean_logit.requires_grad


def test_the_dimension_of_the_classes() -> None:
    """Language models' logits (B, T, C) require dim; the results equal those of rows."""
    tensors = draw("log_probs")
    logits, target = tensors["logits"].detach().view(3, 4, 70), tensors["target"].view(3, 4)
    expected = [x.view(3, 4) for x in all_results("log_probs", **tensors)[:3]]
    for moved, dim in ((logits, -1), (logits.movedim(-1, 0), 0)):
        got = all_results("log_probs", logits=moved, target=target, dim=dim)
        torch.testing.assert_close([*got[:3]], expected)


# ---- independence of rows ------------------------------------------------------------------------

ROWS, CLASSES = (9, 150) if interpreter.ON else (9, 3500)


def bits(results: Any) -> Tensor:
    return torch.stack([x.detach() for x in results[:3]]).view(torch.int32)


@pytest.mark.cpu
@settings(max_examples=40 if FULL else 15)
@given(
    classes=st.integers(1, CLASSES),
    rows=st.integers(1, ROWS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    shaping=st.sampled_from([{}, {"temperature": 0.6}, {"softcap": 5.0}]),
    threads=st.integers(1, 4),
    shift=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_a_row_does_not_depend_on_other_rows(
    classes: int, rows: int, dtype: Any, shaping: Any, threads: int, shift: int, seed: int
) -> None:
    torch.manual_seed(seed)
    logits = (torch.randn(rows, classes) * torch.rand(rows, 1) * 30).to(dtype)
    target = torch.randint(0, classes, (rows,))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = bits(all_results("log_probs", logits=logits, target=target, **shaping))
    finally:
        torch.set_num_threads(before)
    memory = torch.empty(rows * classes + shift, dtype=dtype)[shift:].view(rows, classes)
    order = torch.randperm(rows)
    leaf = memory.copy_(logits[order]).requires_grad_()  # other memory, with gradients
    moved = bits(all_results("log_probs", logits=leaf, target=target[order], **shaping))
    assert torch.equal(moved, whole[:, order])
    row = int(order[0])
    alone = all_results("log_probs", logits=logits[row], target=target[row], **shaping)
    assert torch.equal(bits(alone), whole[:, row])


@pytest.mark.cpu
@settings(max_examples=30 if FULL else 10)
@given(
    classes=st.integers(1, 2600),
    rows=st.integers(1, 40),
    budget=st.sampled_from([None, 1, 20_000, 300_000, 40_000_000]),
    seed=st.integers(0, 99),
)
def test_chunks_are_bitwise_equal(classes: int, rows: int, budget: int | None, seed: int) -> None:
    """Matrix products with one feature of 1 are exact."""
    torch.manual_seed(seed)
    head = (torch.randn(classes, 1) * 8).requires_grad_()
    input, target = torch.ones(rows, 1), torch.randint(0, classes, (rows,))
    target[torch.rand(rows) < 0.3] = -100
    expected = bits(all_results("log_probs", logits=input @ head.t(), target=target))
    given = {"input": input, "linear_weight": head, "target": target, "memory_budget": budget}
    found = all_results("linear_log_probs", **given)
    assert torch.equal(bits(found), expected)


# ---- arguments -----------------------------------------------------------------------------------


@pytest.mark.interpreted
@every_operator
@pytest.mark.parametrize("label", [70, -1])
def test_a_class_index_out_of_range(op: str, label: int) -> None:
    tensors = draw(op)
    tensors["target"][3] = label
    if backend is not cpu:  # the device is asynchronous
        found = getattr(fused, op)(**tensors).log_probability
        assert found.isnan().tolist() == [i == 3 for i in range(12)]
        return
    with pytest.raises(IndexError, match=rf"target: .*\[0, 70\).*got {label} at position \(3,\)"):
        getattr(fused, op)(**tensors)
    frozen = {name: x.detach() for name, x in tensors.items()}
    with pytest.raises(IndexError), torch.autograd.forward_ad.dual_level():  # the definition
        getattr(fused, op)(**frozen)
