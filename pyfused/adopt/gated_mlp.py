"""Computes the gated activation of transformers' MLPs, act(gate_proj(x)) * up_proj(x), fused."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from torch import Tensor

from pyfused import functional as F
from pyfused.adopt import subclass
from pyfused.torch_internals import has_hooks

_PRODUCT = r"self\.down_proj\(self\.act_fn\(self\.gate_proj\(x\)\) \* self\.up_proj\(x\)\)"
_FORWARD = re.compile(
    rf"\s*def forward\(self, x[^)]*\)[^:]*:\s+(return {_PRODUCT}|(\w+) = {_PRODUCT}\s+return \2)\s*"
)
_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "SiLU": F.swiglu,
    "SiLUActivation": F.swiglu,
    "GELUTanh": partial(F.geglu, approximate="tanh"),
    "PytorchGELUTanh": partial(F.geglu, approximate="tanh"),
    "ReLU": F.reglu,
}


def is_known(module: Any) -> bool:
    """Returns whether a layer computes only that product, with an activation that pyfused has."""
    kind: Any = type(module)
    return _is_product(kind) and _function_of(module) is not None


def fuse(module: Any) -> None:
    """Changes the class of a layer to its fused subclass."""
    subclass.fuse(module, _fused_forward)


@cache
def _is_product(kind: Any) -> bool:
    if not kind.__module__.startswith("transformers.") or hasattr(kind, "_unfused"):
        return False
    return _FORWARD.fullmatch(inspect.getsource(kind.forward)) is not None


def _function_of(module: Any) -> Callable[..., Tensor] | None:
    """Returns the gated activation, None if hooks or a replaced ``forward`` need its inputs."""
    act: Any = module.act_fn
    if "forward" in vars(module) or has_hooks(act):
        return None
    if type(act).__name__ == "GELU":
        return partial(F.geglu, approximate=act.approximate)
    return _ACTIVATIONS.get(type(act).__name__)


def _fused_forward(kind: Any) -> Any:
    """Returns the ``forward`` of a layer's subclass."""

    def forward(layer: Any, x: Tensor) -> Any:
        function = _function_of(layer)
        if function is None:  # a hook was added after the conversion
            return kind.forward(layer, x)
        return layer.down_proj(function(layer.gate_proj(x), layer.up_proj(x)))

    return forward
