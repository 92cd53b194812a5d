"""convert() replaces modules of exactly torch's classes in place, and revert() undoes it."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import KernelCalls
from torch import Tensor, nn

import pyfused


class MyReLU(nn.ReLU):
    """A subclass, which is not converted, because it may behave differently."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.activation = nn.ReLU(inplace=True)
        self.layers = nn.Sequential(
            nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 5), MyReLU(), self.activation
        )
        self.criterion = nn.CrossEntropyLoss(torch.linspace(0.5, 1.5, 5), label_smoothing=0.1)
        self.other = nn.MSELoss(reduction="sum")

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        output = self.layers(x)
        return self.criterion(output, target) + self.other(output, x)


pytestmark = pytest.mark.thresholds
X, TARGET = torch.linspace(-2, 2, 5 << 13).view(-1, 5), torch.arange(1 << 13) % 5
SWAPPED = ("activation", "layers.1", "criterion", "other")  # layers.4 is the activation


def types(model: nn.Module) -> list[type[nn.Module]]:
    return [type(module) for module in model.modules()]


def test_converted_and_unconverted_modules(kernel_calls: KernelCalls) -> None:
    model = Net()
    expected = model(X, TARGET)
    modules = list(model.modules())
    plan = pyfused.plan_conversion(model)
    assert plan.swapped == SWAPPED
    assert plan.left == (("layers.3", "MyReLU", "is a subclass of torch.nn.ReLU"),)
    assert str(plan).splitlines() == [
        "activation  ReLU              replaced by pyfused.nn.ReLU, but torch computes it in place",
        "layers.1    ReLU              replaced by pyfused.nn.ReLU",
        "layers.3    MyReLU            left: is a subclass of torch.nn.ReLU",
        "criterion   CrossEntropyLoss  replaced by pyfused.nn.CrossEntropyLoss",
        "other       MSELoss           replaced by pyfused.nn.MSELoss",
    ]
    assert types(model) == types(Net())
    assert pyfused.convert(model) is model
    assert all(now is then for now, then in zip(model.modules(), modules, strict=True))
    for name in SWAPPED:
        assert type(model.get_submodule(name)).__module__ == "pyfused.nn"
    torch.testing.assert_close(model(X, TARGET), expected)
    assert kernel_calls == {"cross_entropy": 1}  # torch is faster at the others' sizes


def test_attributes_are_preserved() -> None:
    model, seen = Net().double().eval(), []
    model.criterion.register_forward_hook(lambda *_: seen.append("hook"))
    model.criterion.note = "mine"
    before = [dict(vars(module)) for module in model.modules()]
    names = [name for name, _ in model.named_modules()]
    description, state = repr(model), copy.deepcopy(model.state_dict())
    pyfused.convert(model)
    for kind in ("CrossEntropyLoss(", "MSELoss(", " ReLU("):
        description = description.replace(kind, f" pyfused.{kind.strip()}".replace("  ", " "))
    assert repr(model).split() == description.split()
    assert [name for name, _ in model.named_modules()] == names
    assert not model.criterion.training
    assert model.criterion.weight.dtype == torch.float64
    model.load_state_dict(state)
    Net().double().load_state_dict(model.state_dict())
    model(X.double(), TARGET)
    assert seen == ["hook"]
    pyfused.revert(model)
    for module, was in zip(model.modules(), before, strict=True):
        assert vars(module).keys() == was.keys()
        assert all(vars(module)[key] is value for key, value in was.items())


def test_convert_is_idempotent_and_revert_only_undoes_it(caplog: pytest.LogCaptureFixture) -> None:
    model = Net()
    model.mine = pyfused.nn.ReLU()
    before = types(model)
    plan = pyfused.plan_conversion(model)
    assert ("mine", "ReLU", "is already a module of pyfused.nn") in plan.left
    with caplog.at_level(logging.INFO, "pyfused"):
        converted = types(pyfused.convert(model))
    assert f"replaced {len(SWAPPED)} modules (2 ReLU" in caplog.text
    again = pyfused.plan_conversion(model)
    assert again.swapped == ()
    assert {name for name, *_ in again.left} == {*SWAPPED, "layers.3", "mine"}
    assert "Nothing" not in str(again)
    assert types(pyfused.convert(model)) == converted  # a warning would be an error
    assert pyfused.revert(model) == plan.swapped == SWAPPED
    assert types(model) == before
    assert pyfused.revert(model) == ()


def with_forward(module: nn.Module) -> nn.Module:
    module.forward = torch.sigmoid  # type: ignore[method-assign]
    return module


OfTimm = type("GELU", (nn.Module,), {"__module__": "timm.layers.activations"})
WITHOUT = "has no counterpart in pyfused.nn"
LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "RReLU": (nn.RReLU, WITHOUT),
    "Mine": (type("Mine", (nn.modules.loss._Loss,), {}), WITHOUT),
    "HingeLoss": (pyfused.nn.HingeLoss, "is already a module of pyfused.nn"),
    "MyReLU": (MyReLU, "is a subclass of torch.nn.ReLU"),
    "GELU": (OfTimm, "is a class of timm.layers.activations, not torch.nn.GELU"),
    "ReLU": (lambda: with_forward(nn.ReLU()), "its forward was replaced"),
    "Tanh": (nn.Tanh, "its forward was replaced"),
    "RecursiveScriptModule": (lambda: torch.jit.script(nn.ReLU()), "is compiled by torch.jit"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", LEFT)
def test_losses_and_activations_that_are_left(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, reason = LEFT[name]
    monkeypatch.setattr(nn.Tanh, "forward", lambda _, x: x)
    model = nn.Sequential(nn.MultiheadAttention(2, 1), nn.Dropout(inplace=True), make(), nn.ReLU())
    plan = pyfused.plan_conversion(model)
    assert plan.swapped == ("3",)
    assert [(left.name, left.reason) for left in plan.left] == [("2", reason)]
    assert str(plan).splitlines()[0].split()[2:] == ["left:", *reason.split()]
    before = types(model)[:-1]
    assert types(pyfused.convert(model))[:-1] == before


def test_options_without_a_language_model() -> None:
    with pytest.warns(RuntimeWarning, match="memory_budget have no effect"):
        pyfused.convert(Net(), metrics=True)


def test_linear_layers_that_may_be_heads() -> None:
    """A possible head is the last layer, the only one of its size, or as long as an embedding."""
    layers = {
        "tokens": nn.EmbeddingBag(2000, 8),
        "tied": nn.Linear(8, 2000),
        "wide": nn.Linear(8, 5000),
        "narrow": nn.Linear(5000, 8),
        "recurrent": nn.Sequential(nn.Linear(8, 3000), nn.LSTM(3000, 8)),
        "projections": nn.Sequential(nn.Linear(8, 6000), nn.Linear(8, 6000)),
        "scores": nn.Linear(9, 6000),
        "body": nn.Sequential(nn.ReLU(), nn.Linear(8, 32000)),
    }
    plan = pyfused.plan_conversion(nn.ModuleDict(layers))
    assert str(plan).splitlines() == [
        "tied    Linear(8 -> 2000)   pass head='tied' to fuse it with its loss",
        "scores  Linear(9 -> 6000)   pass head='scores' to fuse it with its loss",
        "body.0  ReLU                replaced by pyfused.nn.ReLU",
        "body.1  Linear(8 -> 32000)  pass head='body.1' to fuse it with its loss",
    ]
    assert plan.left[2] == ("body.1", "Linear", "pass head='body.1' to fuse it with its loss")
    with pytest.warns(RuntimeWarning, match="tied may compute logits: pass head='tied'"):
        pyfused.convert(nn.ModuleDict(layers))
    layers["body"][1] = nn.Linear(8, 1000)
    assert "body.1" not in str(pyfused.plan_conversion(nn.ModuleDict(layers)))
    model = nn.Sequential(nn.Embedding(9000, 8), nn.Linear(8, 9000))
    row = "1  Linear(8 -> 9000)  pass head='1' to fuse it with its loss"
    assert str(pyfused.plan_conversion(model)) == row  # without "Nothing to convert"
    plan = pyfused.plan_conversion(model, head="1")
    assert str(plan) == ".  Sequential  replaced by linear_cross_entropy(8 -> 9000)"


@pytest.mark.parametrize("through", ["deepcopy", "pickle", "weights_only"])
def test_copies_are_converted_and_can_be_reverted(through: str) -> None:
    model = pyfused.convert(Net())
    if through == "weights_only":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        with torch.serialization.safe_globals([*types(model), set]):
            again = torch.load(file)
    else:
        again = copy.deepcopy(model) if through == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert types(again) == types(model)
    assert torch.equal(again(X, TARGET), model(X, TARGET))
    pyfused.revert(again)
    assert types(again) == types(Net())
    assert type(model.activation) is pyfused.nn.ReLU


# ---- unsupported models --------------------------------------------------------------------------


@pytest.mark.parametrize("function", [pyfused.convert, pyfused.plan_conversion, pyfused.revert])
def test_an_argument_that_is_not_a_module(function: Any) -> None:
    for wrong in (None, nn.ReLU, torch.ones(2)):
        with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got \w+"):
            function(wrong)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("head", ["head", None])
def test_a_converted_model_is_not_scripted(head: Any) -> None:
    model = nn.Sequential()
    model.add_module("head", nn.Linear(8, 40) if head else nn.ReLU())
    pyfused.convert(model, head=head)
    with pytest.raises(RuntimeError, match=r"torch.jit.script: expected .* pyfused.revert\(model"):
        torch.jit.script(model)
    pyfused.revert(model)
    torch.jit.script(model)


@pytest.mark.parametrize("where", ["whole", "part", "in place"])
def test_a_compiled_model_is_not_changed(where: str) -> None:
    model: Any = Net()
    if where == "part":
        model.layers = torch.compile(model.layers, backend="eager")
    elif where == "in place":
        model.layers.compile(backend="eager")
    else:
        model = torch.compile(model, backend="eager")
    before = types(model)
    name, call = {
        "whole": ("'.'", r"was compiled, model\._orig_mod"),
        "part": ("'layers'", r"was compiled, model\.layers\._orig_mod"),
        "in place": ("'layers'", "before compiling or sharding it"),
    }[where]
    for function in (pyfused.convert, pyfused.revert):
        with pytest.raises(ValueError, match=f"is not compiled yet, got .* at {name}.*{call}$"):
            function(model)
    assert types(model) == before
