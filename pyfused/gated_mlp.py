"""MLPs of transformers: their gated activation, act(gate_proj(x)) * up_proj(x), in one kernel.

A layer gets a subclass of its class, of the same name.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import cache, partial
from types import new_class
from typing import Any

from torch import Tensor

from pyfused import functional as F

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
    """Whether it computes no more than the product, of an activation that pyfused has gated."""
    kind: Any = type(module)
    return _is_product(kind) and _function_of(module) is not None


def fuse(module: Any) -> None:
    kind: Any = type(module)
    module.__class__ = _fused(kind)


@cache
def _is_product(kind: Any) -> bool:
    if not kind.__module__.startswith("transformers.") or hasattr(kind, "_unfused"):
        return False
    return _FORWARD.fullmatch(inspect.getsource(kind.forward)) is not None


def _function_of(module: Any) -> Callable[..., Tensor] | None:
    """The gated activation, None where someone looks at what is between, or has another forward."""
    act: Any = module.act_fn
    if "forward" in vars(module) or act._forward_hooks or act._forward_pre_hooks:
        return None
    if type(act).__name__ == "GELU":
        return partial(F.geglu, approximate=act.approximate)
    return _ACTIVATIONS.get(type(act).__name__)


@cache
def _fused(kind: Any) -> Any:
    """The subclass of a layer's class, which a copy, a replica and a loaded layer have as well."""

    def forward(layer: Any, x: Tensor) -> Any:
        function = _function_of(layer)
        if function is None:  # a hook was added since
            return kind.forward(layer, x)
        return layer.down_proj(function(layer.gate_proj(x), layer.up_proj(x)))

    def reduce(layer: Any, protocol: Any) -> Any:  # the subclass cannot be imported
        return _new, (kind,), *kind.__reduce_ex__(layer, protocol)[2:]

    members = {"forward": forward, "__reduce_ex__": reduce, "_unfused": kind}
    named = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return new_class(kind.__name__, (kind,), exec_body=lambda body: body.update(members | named))


def _new(kind: Any) -> Any:
    """A fused layer without attributes, which pickle and copy fill."""
    return kind.__new__(_fused(kind))
