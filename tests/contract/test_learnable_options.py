"""Numeric options that are tensors: torch's definition computes the call and their gradients."""

from __future__ import annotations

import inspect

import pytest
import torch
from catalogue import EXAMPLES, SHAPE
from compare import flattened
from conftest import KernelCalls
from torch import Tensor

from pyfused import functional as fused

# The values to try. A default, such as a temperature of 1, must not select a path without gradient.
VALUES: dict[str, tuple[float, ...]] = {
    "beta": (0.4,), "denominator": (5.0,), "gamma": (1.5, 0.0), "margin": (0.3,),
    "scale": (1.3, 1.0), "softcap": (2.0,), "teacher_softcap": (2.0,), "temperature": (1.3, 1.0),
    "token_weight": (0.7,), "z_loss": (0.1, 0.0),
}  # fmt: skip
NAMES = [
    *("cross_entropy", "linear_cross_entropy", "log_probs", "linear_log_probs", "additive_margin"),
    *("kl_div_with_logits", "linear_kl_div", "linear_topk_kl_div"),
]
CASES = [
    (name, option, value)
    for name in NAMES
    for option in inspect.signature(getattr(fused, name)).parameters
    for value in VALUES.get(option, ())
]


@pytest.mark.parametrize(("name", "option", "value"), CASES)
def test_options_that_are_tensors(
    name: str, option: str, value: float, kernel_calls: KernelCalls
) -> None:
    """Compares the gradient with a one-sided difference, as some options must not be negative."""
    of_margin = name == "additive_margin"
    call = EXAMPLES["cross_entropy" if of_margin else name].call(torch.float64)
    given = {name: x.detach() for name, x in call.tensors.items()}
    if of_margin:
        given["input"].tanh_()

    def loss(x: Tensor | float) -> Tensor:
        result = flattened(getattr(fused, name)(**given | {option: x}))[0]
        return (result * torch.linspace(1, 2, result.numel()).double().view_as(result)).sum()

    shape, step = SHAPE[:1] if option == "token_weight" else (), 1e-6
    x = torch.full(shape, value, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(x), x)
    kernel_calls.clear()
    losses = [loss(x.detach() + k * step) for k in range(3)]
    assert bool(kernel_calls) == (option in ("token_weight", "denominator"))
    slope = (4 * losses[1] - 3 * losses[0] - losses[2]) / (2 * step)
    torch.testing.assert_close(gradient.sum(), slope, rtol=1e-6, atol=1e-6)
    assert gradient.any()
    if not shape:
        torch.testing.assert_close(losses[0], loss(value))


@pytest.mark.cpu
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_beta_is_not_learned_where_the_divergence_jumps(beta: float) -> None:
    x, learned = torch.zeros(1, 3), torch.tensor(beta, requires_grad=True)
    with pytest.raises(ValueError, match=r"beta: expected a number in \(0.0, 1.0\) to be learned"):
        fused.kl_div_with_logits(x, x, beta=learned)
