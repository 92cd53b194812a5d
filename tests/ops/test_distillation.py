"""Divergences of a student from a teacher, for logits, heads and a teacher's top k."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compare import exactly, products
from conftest import KernelCalls
from torch import Tensor

from pyfused import explain
from pyfused import functional as fused
from pyfused.backends import cpu

N, D, E, C, K = 7, 6, 5, 150, 9


OPS = ["kl_div_with_logits", "linear_kl_div", "linear_topk_kl_div"]


every_operator = pytest.mark.parametrize("op", OPS)


def given(op: str) -> dict[str, Any]:
    """Returns the tensors of a call; the student's require grad."""
    logits, teacher_logits = (2 * torch.randn(2, N, C)).unbind()
    if op == "kl_div_with_logits":
        return {"logits": logits.requires_grad_(), "teacher_logits": teacher_logits}
    shapes = {"input": (N, D), "linear_weight": (C, D), "linear_bias": (C,)}
    head: dict[str, Any] = {name: torch.randn(n).requires_grad_() for name, n in shapes.items()}
    if op == "linear_topk_kl_div":
        log_probs, indices = teacher_logits.log_softmax(-1).topk(K)
        return head | {"teacher_indices": indices, "teacher_log_probs": log_probs}
    shapes = {"input": (N, E), "linear_weight": (C, E), "linear_bias": (C,)}
    return head | {f"teacher_{name}": torch.randn(n) for name, n in shapes.items()}


@pytest.mark.cpu
@pytest.mark.parametrize("op", ["linear_kl_div", "linear_topk_kl_div"])
def test_no_unnecessary_matrix_products(op: str) -> None:
    """No products are computed for tokens of weight 0 and for gradients that are not needed."""
    arguments, weight = given(op), torch.ones(N)
    rows, weight[:3] = N - 3, 0
    frozen = {name: tensor.detach() for name, tensor in arguments.items()}
    logits = [(rows, D, C), *[(rows, E, C)] * (op == "linear_kl_div")]
    for name, gradient in (("input", (rows, C, D)), ("linear_weight", (C, rows, D))):
        with products() as found:
            leaf = {name: arguments[name]}
            getattr(fused, op)(**frozen | leaf, token_weight=weight).backward()
        assert sorted({*found}) == sorted([*logits, gradient])
        assert found.count(gradient) == 1
    with products() as found, torch.no_grad():
        getattr(fused, op)(**arguments, token_weight=weight)
    assert sorted({*found}) == sorted(logits)


@every_operator
def test_a_teacher_is_a_constant_by_default(op: str, kernel_calls: KernelCalls) -> None:
    arguments = given(op)
    name = [name for name in arguments if name.startswith("teacher")][-1]
    expected = getattr(fused, op)(**arguments, beta=0.5)
    leaf = arguments[name].requires_grad_()
    kernel_calls.clear()
    loss = getattr(fused, op)(**arguments, beta=0.5)
    assert kernel_calls.total()
    torch.testing.assert_close(loss, expected)
    assert torch.autograd.grad(loss, leaf, allow_unused=True) == (None,)
    explanation = explain(op, **arguments, teacher_requires_grad=True)
    assert explanation.reason == f"{name} requires grad"
    assert explain(op, **arguments).backend != "torch"
    wide = {n: exactly(x.detach()) for n, x in arguments.items()}

    def of_teacher(teacher: Tensor) -> Tensor:
        given = wide | {name: teacher}
        return getattr(fused, op)(**given, beta=0.5, teacher_requires_grad=True)

    assert torch.autograd.gradcheck(of_teacher, wide[name].requires_grad_(), fast_mode=True)


# ---- a teacher's top k ---------------------------------------------------------------------------


@pytest.mark.cpu
def test_blocks_of_capped_logits_share_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block needs the logits of student and teacher, and the student's capped logits."""
    results: list[Tensor] = []  # keeps their memory from being used again
    for name in ("activation", "activation_backward"):
        kernel = getattr(cpu, name)
        record = lambda *args, kernel=kernel: results.append(kernel(*args)) or results[-1]  # noqa: E731
        monkeypatch.setattr(cpu, name, record)
    options = {"softcap": 3.0, "teacher_softcap": 3.0, "memory_budget": 8 * C}
    fused.linear_kl_div(**given("linear_kl_div"), **options).backward()
    assert len(results) > 9
    assert len({x.data_ptr() for x in results}) == 3


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0])
def test_rounded_log_probabilities(dtype: torch.dtype, scale: float) -> None:
    """The probabilities of all classes may sum to more than 1 by several roundings."""
    log_probs, indices = (scale * torch.randn(N, C)).log_softmax(-1).sort()
    arguments = given("linear_topk_kl_div") | {"teacher_indices": indices}
    for rounded in (log_probs.to(dtype), log_probs.to(dtype).float()):
        loss = fused.linear_topk_kl_div(**arguments | {"teacher_log_probs": rounded})
        assert loss.isfinite()
