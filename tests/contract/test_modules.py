"""The modules are subclasses of torch's modules with another forward."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pyfused
from pyfused import functional as fused_functional
from pyfused import nn as fused
from pyfused.ops.operators import OPERATORS

pytestmark = pytest.mark.thresholds
W = torch.linspace(0.5, 1.5, 5)
OF_TORCH = [name for name in OPERATORS if hasattr(nn.functional, name)]
MODULES: list[tuple[str, dict[str, Any]]] = [
    *((OPERATORS[name].module, {}) for name in OF_TORCH if "linear" not in name),
    ("CrossEntropyLoss", {"weight": W, "ignore_index": 2, "reduction": "none"}),
    ("CrossEntropyLoss", {"label_smoothing": 0.1}),
    ("NLLLoss", {"weight": W, "ignore_index": 2}),
    ("ReLU", {"inplace": True}),
    ("Softmax", {"dim": 1}),
    ("SmoothL1Loss", {"beta": 0.5, "reduction": "sum"}),
]


def assert_same_signature(ours: Callable[..., Any], theirs: Callable[..., Any]) -> None:
    """Compares names, defaults and kinds; additional parameters are keyword-only."""
    found = []
    for function in (ours, theirs):
        parameters = inspect.signature(function).parameters.values()
        by_name = inspect.Parameter.VAR_KEYWORD  # a module passes **kwargs to its function
        found.append([(p.name, p.default, p.kind) for p in parameters if p.kind is not by_name])
    extra = [parameter for parameter in found[0] if parameter not in found[1]]
    assert not extra or "cross_entropy" in ours.__name__ or "CrossEntropy" in ours.__name__
    assert all(kind is inspect.Parameter.KEYWORD_ONLY for *_, kind in extra)
    assert [parameter for parameter in found[0] if parameter not in extra] == found[1]


@pytest.mark.parametrize(("name", "options"), MODULES)
def test_modules_only_override_forward(name: str, options: dict[str, Any]) -> None:
    ours, theirs = getattr(fused, name)(**options), getattr(nn, name)(**options)
    assert isinstance(ours, type(theirs))
    assert repr(ours) == f"pyfused.{theirs!r}"
    assert_same_signature(type(ours), type(theirs))
    parameters = [inspect.signature(module.forward).parameters for module in (ours, theirs)]
    assert list(parameters[0]) == list(parameters[1])
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())


class Function:
    """Has ``__torch_function__`` without being a tensor, and returns the function it receives."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return function


class Subclass(Tensor):
    """Returns the function that it receives."""

    __torch_function__ = Function.__torch_function__


OTHER_INPUTS = 3.5, None, np.ones(3), [[1.0]], Function(), torch.ones(3).as_subclass(Subclass)


@pytest.mark.parametrize(("name", "options"), MODULES)
def test_inputs_that_are_not_plain_tensors(name: str, options: dict[str, Any]) -> None:
    """They meet the same function of torch, or the same type of error, also if converted."""

    def outcome(module: nn.Module, *inputs: Any) -> Any:
        try:
            return module(*inputs)
        except Exception as error:
            return type(error)

    ours, theirs = getattr(fused, name)(**options), getattr(nn, name)(**options)
    count = sum(p.default is p.empty for p in inspect.signature(theirs.forward).parameters.values())
    converted = pyfused.convert(nn.Sequential(copy.deepcopy(theirs)))[0]
    for input in OTHER_INPUTS:
        inputs = (input,) * count
        expected = outcome(theirs, *inputs)
        assert outcome(ours, *inputs) is expected
        assert outcome(converted, *inputs) is expected


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in OPERATORS
        if not hasattr(nn.functional, name)  # and options that are attributes of the module
        and "temperature" not in parameters(getattr(fused_functional, name))
    ],
)
def test_modules_that_torch_lacks_have_the_options_of_the_function(name: str) -> None:
    op = OPERATORS[name]
    tensors = [operand.name for operand in op.operands if not operand.optional or operand.number]
    options = parameters(getattr(fused_functional, name))
    expected = [
        p.replace(default="mean") if p.name == "reduction" else p
        for p in options.values()
        if p.name not in tensors
    ]
    accepted = parameters(getattr(fused, op.module)).values()
    assert [p for p in accepted if "VAR" not in p.kind.name] == expected
    assert sorted(parameters(getattr(fused, op.module)().forward)) == sorted(tensors)


@pytest.mark.parametrize("name", OF_TORCH)
def test_functional_signatures_match_torch(name: str) -> None:
    built_in = {  # built-ins without a signature
        "gelu": lambda input, *, approximate="none": None,
        "softplus": lambda input, beta=1, threshold=20: None,
        "logsigmoid": lambda input: None,
    }
    of_torch = built_in.get(name, getattr(nn.functional, name))
    assert_same_signature(getattr(fused_functional, name), of_torch)


@pyfused.activation
def swish(input: Tensor, *, beta: float = 1.0) -> Tensor:
    return input * torch.sigmoid(beta * input)


X = torch.linspace(-1, 1, 30, dtype=torch.float64).view(6, 5)
TARGET, HEAD = torch.arange(6) % 5, {"in_features": 5, "num_classes": 5}
LEARNABLE: list[tuple[Callable[..., nn.Module], tuple[Tensor, ...], str]] = [
    (fused.CrossEntropyLoss, (X, TARGET), "temperature"),
    (partial(fused.LinearLogProbs, **HEAD), (X, TARGET), "softcap"),
    (fused.Softcap, (X,), "cap"),
    (swish.module, (X,), "beta"),
]


@pytest.mark.parametrize(("make", "tensors", "option"), LEARNABLE)
def test_parameters_among_the_options_belong_to_the_module(
    make: Callable[..., nn.Module], tensors: tuple[Tensor, ...], option: str
) -> None:
    parameter = nn.Parameter(torch.tensor(0.75))
    module = make(**{option: parameter}).double()
    assert dict(module.named_parameters())[option] is parameter
    assert f"{option}=" in repr(module)
    result = module(*tensors)
    (result[0] if isinstance(result, tuple) else result).sum().backward()
    assert parameter.grad is not None


@pytest.mark.parametrize("name", ["weight", "token_weight"])
@pytest.mark.parametrize("head", [{}, HEAD], ids=["logits", "head"])
def test_weights_move_with_the_module(name: str, head: dict[str, int]) -> None:
    weight = torch.linspace(0, 1, 6)[: 5 if name == "weight" else 6]
    kind: Any = fused.LinearCrossEntropyLoss if head else fused.CrossEntropyLoss
    moved = kind(**head, **{name: weight}).double()
    torch.testing.assert_close(moved.state_dict()[name], weight.double())
    assert moved(X, TARGET).dtype == torch.float64
    assert getattr(moved.to("meta"), name).is_meta


@pytest.mark.parametrize(
    ("name", "arguments", "unknown"),
    [
        ("KLDivWithLogitsLoss", {}, "token_weight"),
        ("LinearKLDivLoss", {}, "dim"),
        ("LinearLogProbs", HEAD, "dim"),
        ("CrossEntropyLoss", {}, "memory_budget"),
        ("LinearCrossEntropyLoss", HEAD, "gamma"),
    ],
)
def test_modules_refuse_unknown_options(name: str, arguments: dict[str, Any], unknown: str) -> None:
    message = rf"{name}\(\) got an unexpected keyword argument '{unknown}'"
    with pytest.raises(TypeError, match=message):
        getattr(fused, name)(**arguments, **{unknown: 1})
