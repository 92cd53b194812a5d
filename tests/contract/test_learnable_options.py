"""Numeric options that are tensors: torch's definition computes the call and their gradients."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from catalogue import EXAMPLES, SHAPE
from conftest import KernelCalls
from torch import Tensor

from pyfused import functional as fused

N, _ = SHAPE

# The values to try. A default, such as a temperature of 1, must not select a path without gradient.
VALUES: dict[str, tuple[float, ...]] = {
    "beta": (0.4,), "denominator": (5.0,), "gamma": (1.5, 0.0), "margin": (0.3,),
    "scale": (1.3, 1.0), "softcap": (2.0,), "teacher_softcap": (2.0,), "temperature": (1.3, 1.0),
    "token_weight": (0.7,), "z_loss": (0.1, 0.0),
}  # fmt: skip


def tensors(name: str) -> dict[str, Tensor]:
    of_margin = name == "additive_margin"
    call = EXAMPLES["cross_entropy" if of_margin else name].call(torch.float64)
    found = {name: x.detach() for name, x in call.tensors.items()}
    return found | {"input": found["input"].tanh()} if of_margin else found


def loss_of(name: str, given: dict[str, Tensor] | None = None, **options: Any) -> Tensor:
    result = getattr(fused, name)(**(given or tensors(name)) | options)
    first: Tensor = result[0] if isinstance(result, tuple) else result
    return (first * torch.linspace(1, 2, first.numel()).double().view_as(first)).sum()


NAMES = [
    *("cross_entropy", "linear_cross_entropy", "log_probs", "linear_log_probs", "additive_margin"),
    *("kl_div_with_logits", "linear_kl_div", "linear_topk_kl_div"),
]


def number(option: str, value: float) -> Tensor:
    shape = (N,) if option == "token_weight" else ()
    return torch.full(shape, value, dtype=torch.float64, requires_grad=True)


def check_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Compares the gradient with a one-sided difference, as some options must not be negative."""
    (gradient,) = torch.autograd.grad(function(x), x)
    step = 1e-6
    with torch.no_grad():
        losses = [function(x + k * step) for k in range(3)]
    slope = (4 * losses[1] - 3 * losses[0] - losses[2]) / (2 * step)
    torch.testing.assert_close(gradient.sum(), slope, rtol=1e-6, atol=1e-6)
    assert gradient.any()


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        pytest.param(name, option, value, id=f"{name}-{option}={value:g}")
        for name in NAMES
        for option in inspect.signature(getattr(fused, name)).parameters
        for value in VALUES.get(option, ())
    ],
)
def test_options_that_are_tensors(
    name: str, option: str, value: float, kernel_calls: KernelCalls
) -> None:
    given, x = tensors(name), number(option, value)
    check_gradient(lambda x: loss_of(name, given, **{option: x}), x)
    kernel_calls.clear()
    loss = loss_of(name, given, **{option: x.detach()})
    assert bool(kernel_calls) == (option in ("token_weight", "denominator"))
    if option != "token_weight":
        torch.testing.assert_close(loss, loss_of(name, given, **{option: value}))


@pytest.mark.cpu
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_beta_is_not_learned_where_the_divergence_jumps(value: float) -> None:
    with pytest.raises(ValueError, match=r"beta: expected a number in \(0.0, 1.0\) to be learned"):
        loss_of("kl_div_with_logits", beta=number("beta", value))
