"""Derivatives that are torch's own definition: second ones, forward mode, `torch.func`, batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calls import Case, every_case, every_operator
from compare import Operator, evaluate_upstream
from torch import Tensor
from torch.autograd import forward_ad

# torch compiles its own forward-mode decompositions with torch.jit when they are first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

close = torch.testing.assert_close


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 5, requires_grad=True)


@every_operator
def test_double_backward(case: Case, x: Tensor) -> None:
    def penalty(operator: Operator) -> Tensor:
        value = operator(x)
        grad_output = torch.linspace(1, 2, value.numel()).view_as(value).requires_grad_()
        (first,) = torch.autograd.grad(value, x, grad_output, create_graph=True)
        assert first.requires_grad
        inputs = (x, grad_output)
        second = torch.autograd.grad(first.square().sum(), inputs, allow_unused=True)
        return torch.stack([g.sum() if g is not None else torch.zeros(()) for g in second])

    close(penalty(case.ours), penalty(case.reference))


@every_operator
def test_forward_mode(case: Case, x: Tensor) -> None:
    tangent = torch.randn(6, 5)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach(), tangent)
        got = forward_ad.unpack_dual(case.ours(dual)).tangent
        expected = forward_ad.unpack_dual(case.reference(dual)).tangent
        plain = case.ours(torch.ones(6, 5))
    close(got, expected)
    close(plain, case.reference(torch.ones(6, 5)))


@every_case
def test_torch_func(case: Case, x: Tensor) -> None:
    x = x.detach()
    tangent = torch.randn(6, 5)

    def of_total(transform: Any, operator: Operator) -> Any:
        try:
            return transform(lambda x: operator(x).sum())(x)
        except NotImplementedError:  # no second derivative of soft_margin_loss in forward mode
            return None

    for transform in (torch.func.grad, torch.func.hessian, torch.func.jacrev, torch.func.jacfwd):
        close(of_total(transform, case.ours), of_total(transform, case.reference))
    close(
        torch.func.jvp(case.ours, (x,), (tangent,)),
        torch.func.jvp(case.reference, (x,), (tangent,)),
    )
    close(torch.func.vjp(case.ours, x)[0], torch.func.vjp(case.reference, x)[0])


@every_operator
@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized:UserWarning")
def test_vmap(case: Case) -> None:
    batch = torch.randn(3, 6, 5)
    try:
        expected = torch.vmap(case.reference)(batch)
    except RuntimeError as error:  # torch looks at a variance's values
        assert "data-dependent" in str(error)  # noqa: PT017
        with pytest.raises(RuntimeError, match="vmap"):
            torch.vmap(case.ours)(batch)
        return
    close(torch.vmap(case.ours)(batch), expected)
    per_sample = torch.vmap(torch.func.grad(lambda x: case.ours(x).sum()))(batch)
    close(per_sample, torch.vmap(torch.func.grad(lambda x: case.reference(x).sum()))(batch))


@every_case
def test_batched_gradients(case: Case, x: Tensor) -> None:
    """is_grads_batched runs backward itself under vmap."""

    def jacobian(operator: Operator) -> Tensor:
        value = operator(x)
        upstreams = evaluate_upstream((4, *value.shape)).to(value)
        return torch.autograd.grad(value, x, upstreams, is_grads_batched=True)[0]

    close(jacobian(case.ours), jacobian(case.reference))
