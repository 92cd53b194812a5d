"""Gated activations: values, gradients, saved tensors, and the MLPs of transformers."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import evaluate
from conftest import KernelCalls
from grid import grid
from samples import GATED
from torch import Tensor
from torch_reference import torch_function

import pyfused
from pyfused import functional
from pyfused.ops.pointwise_loss import Gated

close = torch.testing.assert_close
INF, NAN = float("inf"), float("nan")


@grid(op=GATED)
def test_special_values_match_torch(op: Gated) -> None:
    special = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1.0, -2.0, 200.0, -200.0]).double()
    gate, up = special.repeat(9), special.repeat_interleave(9)
    leaves = [gate.requires_grad_(), up.requires_grad_()]
    ours = evaluate(getattr(functional, op.name), *leaves)
    expected = evaluate(torch_function(op), *leaves)
    close(ours.value, expected.value, equal_nan=True)
    close(ours.gradients, expected.gradients, equal_nan=True)


@grid(op=GATED)
def test_only_inputs_are_saved(op: Gated) -> None:
    gate, up = (torch.randn(50, requires_grad=True) for _ in range(2))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        getattr(functional, op.name)(gate, up)
    assert {tensor.data_ptr() for tensor in saved} == {gate.data_ptr(), up.data_ptr()}


# ---- MLPs of transformers ------------------------------------------------------------------------


@pytest.mark.integrations
@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh", "relu"])
def test_the_mlps_of_transformers(act: str, kernel_calls: KernelCalls) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    config = LlamaConfig(hidden_size=32, intermediate_size=64, hidden_act=act)
    mlp, x = LlamaMLP(config), torch.randn(5, 32, requires_grad=True)
    expected = evaluate(mlp, x)
    assert "." in pyfused.plan_conversion(mlp).swapped
    pyfused.convert(mlp)
    assert type(mlp) is not LlamaMLP
    assert isinstance(mlp, LlamaMLP)
    name = {"silu": "swiglu", "relu": "reglu"}.get(act, "geglu_tanh")
    for layer in (mlp, copy.deepcopy(mlp), pickle.loads(pickle.dumps(mlp))):
        kernel_calls.clear()
        got = evaluate(layer, x)
        assert kernel_calls[name] == 2
        close(got.value, expected.value)
        close(got.gradients, expected.gradients)
    mlp.act_fn.register_forward_hook(lambda *_: None)
    kernel_calls.clear()
    close(evaluate(mlp, x).value, expected.value)
    assert not kernel_calls[name]
    assert "." in pyfused.revert(mlp)
    assert type(mlp) is LlamaMLP


def named(name: str, *bases: Any) -> Any:
    """Returns a module of a user's class with the name of a known activation."""
    return type(
        name, bases or (torch.nn.Module,), {"forward": lambda _, x: x * (1.7 * x).sigmoid()}
    )()


def replaced(layer: Any) -> None:
    layer.act_fn.forward = lambda x: 2 * x


OTHER_ACTIVATIONS: dict[str, Callable[[Any], None]] = {
    "class": lambda layer: setattr(layer, "act_fn", named("SiLU")),
    "class of transformers": lambda layer: setattr(layer, "act_fn", named("SiLUActivation")),
    "subclass": lambda layer: setattr(layer, "act_fn", named("GELU", torch.nn.GELU)),
    "forward": replaced,
    "forward of the layer": lambda layer: setattr(layer, "forward", torch.sigmoid),
}


@pytest.mark.integrations
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", OTHER_ACTIVATIONS)
def test_mlps_with_another_activation(name: str, when: str, kernel_calls: KernelCalls) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    mlp, x = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=64)), torch.randn(5, 32)
    if when == "after":
        pyfused.convert(mlp)
    OTHER_ACTIVATIONS[name](mlp)
    expected = copy.deepcopy(mlp)(x)
    assert "." not in pyfused.plan_conversion(mlp).swapped
    kernel_calls.clear()
    close(mlp(x), expected)
    assert not kernel_calls


@pytest.mark.integrations
@pytest.mark.parametrize("path", ["SiLUActivation", "LlamaMLP", "decorated LlamaMLP"])
def test_forwards_of_classes_that_were_replaced(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.activations
    from transformers.models.llama.modeling_llama import LlamaMLP

    kind: Any = LlamaMLP if "MLP" in path else transformers.activations.SiLUActivation
    original = kind.forward
    mlp = LlamaMLP(transformers.LlamaConfig(hidden_size=32, intermediate_size=64))
    assert "." in pyfused.plan_conversion(mlp).swapped

    def forward(self: Any, x: Tensor) -> Any:
        return 2 * original(self, x)

    wrap = functools.wraps(original) if "decorated" in path else lambda function: function
    monkeypatch.setattr(kind, "forward", wrap(forward))
    assert "." not in pyfused.plan_conversion(mlp).swapped
