"""Fuses the gated activation of transformers' MLPs, act(gate_proj(x)) * up_proj(x)."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from pyfused import functional as F
from pyfused import nn
from pyfused.adopt import subclass
from pyfused.torch_internals import has_hooks

_PRODUCT = r"self\.down_proj\(self\.act_fn\(self\.gate_proj\(x\)\) \* self\.up_proj\(x\)\)"
_FORWARD = re.compile(
    rf"\s*def forward\(self, x[^)]*\)[^:]*:\s+(return {_PRODUCT}|(\w+) = {_PRODUCT}\s+return \2)\s*"
)
_geglu_tanh = partial(F.geglu, approximate="tanh")
_Functions = dict[Any, Callable[..., Tensor]]
_OF_TORCH: _Functions = {"SiLU": F.swiglu, "ReLU": F.reglu, "GELU": F.geglu}
_OF_TRANSFORMERS: _Functions = {
    "SiLUActivation": F.swiglu,
    "GELUTanh": _geglu_tanh,
    "PytorchGELUTanh": _geglu_tanh,
}


def is_known(module: Any) -> bool:
    """Returns whether a layer computes only this product, with an activation that pyfused has."""
    kind: Any = type(module)
    if not kind.__module__.startswith("transformers.") or subclass.is_fused(module):
        return False
    return (
        "forward" not in vars(module)
        and _is_product(kind.forward)
        and subclass.has_original_forward(module.act_fn)
        and _function_of(module, _functions()) is not None
    )


def fuse(module: Any) -> None:
    """Changes the class of a layer to its fused subclass."""
    subclass.fuse(module, _fused_forward)


@cache
def _is_product(forward: Any) -> bool:
    # inspect.getsource returns the source of the function below a decorator.
    is_decorated = hasattr(forward, "__wrapped__")
    return not is_decorated and _FORWARD.fullmatch(inspect.getsource(forward)) is not None


@cache
def _functions() -> _Functions:
    """Returns the gated activation of each class of activations, when transformers is imported."""
    activations = sys.modules["transformers.activations"]
    theirs = {getattr(activations, name, None): f for name, f in _OF_TRANSFORMERS.items()}
    return theirs | {getattr(of, name): f for name, f in _OF_TORCH.items() for of in (torch.nn, nn)}


def _function_of(module: Any, functions: Any) -> Callable[..., Tensor] | None:
    """Returns the gated activation, None if hooks or a replaced ``forward`` need its inputs."""
    act: Any = module.act_fn
    if "forward" in vars(act) or has_hooks(act):
        return None
    function: Callable[..., Tensor] | None = functions.get(type(act))
    return partial(F.geglu, approximate=act.approximate) if function is F.geglu else function


def _fused_forward(kind: Any) -> Any:
    """Returns the ``forward`` of a layer's subclass."""
    functions = _functions()

    def forward(layer: Any, x: Tensor) -> Any:
        function = _function_of(layer, functions)
        if function is None:  # the activation was changed after the conversion
            return kind.forward(layer, x)
        return layer.down_proj(function(layer.gate_proj(x), layer.up_proj(x)))

    return forward
