"""Fuses the gated activation of MLPs that compute ``down_proj(act_fn(gate_proj(x)) * up_proj(x))``.

`convert` finds them by their values: for a small random input, the module's ``forward`` and the
fused one have to give the same result.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, Module

from pyfused import functional as F
from pyfused.adopt import subclass
from pyfused.adopt.subclass import MARK
from pyfused.torch_internals import has_hooks

_geglu_tanh = partial(F.geglu, approximate="tanh")
_FUNCTIONS: tuple[Callable[..., Tensor], ...] = F.swiglu, F.geglu, _geglu_tanh, F.reglu
_PROJECTIONS = "gate_proj", "up_proj", "down_proj"
# Raised by a forward or an activation that does not accept such an input.
_ERRORS = (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError)


def function_of(module: Any) -> Callable[..., Tensor] | None:
    """Returns the gated activation of an MLP, None if it is no MLP of this kind."""
    projections: list[Any] = [getattr(module, name, None) for name in _PROJECTIONS]
    activation = getattr(module, "act_fn", None)
    if isinstance(module, subclass.Fused) or not isinstance(activation, Module):
        return None
    parts = [module, activation, *projections]
    if any(type(x) is not Linear or type(x.weight) is not torch.nn.Parameter for x in projections):
        return None
    if any(has_hooks(part) or "forward" in vars(part) for part in parts):
        return None
    weight = projections[0].weight
    parameters = inspect.signature(module.forward).parameters.values()
    required = [each for each in parameters if each.default is each.empty]
    if weight.is_meta or len(required) != 1:
        return None
    grid = torch.linspace(-9, 9, 99, dtype=torch.float64, device=weight.device)
    x = torch.randn(1, 3, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    try:
        with torch.no_grad(), torch.random.fork_rng():
            found, expected = activation(grid.clone()), module(x)
            for function in _FUNCTIONS:
                if _equal(found, function(grid, torch.ones_like(grid)), torch.float32) and _equal(
                    expected, _product(module, function, x), weight.dtype
                ):
                    return function
    except _ERRORS:
        return None
    return None


def _product(module: Any, function: Callable[..., Tensor], x: Tensor) -> Tensor:
    result: Tensor = module.down_proj(function(module.gate_proj(x), module.up_proj(x)))
    return result


def _equal(value: Any, expected: Tensor, dtype: torch.dtype) -> bool:
    """Returns whether two results are equal but for rounding to a dtype."""
    if not isinstance(value, Tensor) or value.shape != expected.shape:
        return False
    error, largest = (value - expected).abs().max(), expected.abs().max()
    return bool(error <= 8 * torch.finfo(dtype).eps * largest)


def _forward_of(kind: Any) -> Any:
    """Returns the fused ``forward`` of a class of MLPs."""

    def forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        activation, function = vars(layer).get(MARK, (None, None))
        if layer.act_fn is not activation or has_hooks(activation) or args or kwargs:
            return kind.forward(layer, x, *args, **kwargs)
        if "forward" in vars(activation):
            return kind.forward(layer, x)
        return _product(layer, function, x)

    return forward


def fuse(module: Any, function: Callable[..., Tensor]) -> None:
    """Makes an MLP use a gated activation."""
    subclass.fuse(module, _forward_of, (module.act_fn, function))
