"""The signature of a call: everything that its plan depends on. Values of tensors are excluded."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from pyfused.dispatch.operator import Arguments, Operator
from pyfused.torch_internals import (
    active_mode,
    any_autocast,
    is_functorch_wrapped,
    is_lazy_clone,
    is_view,
    is_zero_tensor,
)
from pyfused.types import TENSORS, TensorSpec, VocabOptions

PLAIN = (Tensor, Parameter)
_CONSTANTS = (bool, int, torch.dtype)  # True is equal to 1, so the type is part of the key
_HASHED = (type(None), str, float, *_CONSTANTS)


def signature(op: Operator, arguments: Arguments, inplace: bool) -> tuple[Any, ...] | None:
    """Returns the key of a call's plan, or None if the call has none.

    The key has the operator, the layout of each tensor and whether it requires grad, all other
    arguments, grad mode, autocast and the default dtype. A call has no key if
    `no_signature_reason` returns a reason, or if its numbers have to be converted first.
    """
    if type(arguments[0]) not in PLAIN or active_mode() is not None:
        return None
    grad = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    key: list[Any] = [op, inplace, grad, torch.get_default_dtype()]
    if isinstance(arguments[-1], VocabOptions):
        arguments = (*arguments[:-1], *vars(arguments[-1]).values())
    for value in arguments:
        kind = type(value)
        if kind is Tensor or kind is Parameter:
            if (  # the conditions of layout_reason, without a call for each tensor
                value.layout is not torch.strided
                or value.is_neg()
                or is_zero_tensor(value)
                or value.is_nested
                or is_functorch_wrapped(value)
                or is_lazy_clone(value)
            ):
                return None
            shape, stride = value.shape, value.stride()
            key.append((value.dtype, shape, stride, value.device, value.requires_grad))
        elif value is None or kind is str:
            key.append(value)
        elif kind is float:  # 0.0 is equal to -0.0, and NaN is not equal to itself
            key.append(value if value and value == value else (kind, str(value)))
        elif kind in _CONSTANTS:
            key.append((kind, value))
        else:
            return None
    if inplace:
        input = arguments[0]
        key.append(input.is_leaf or is_view(input))
    if any_autocast() and not arguments[0].is_meta:  # torch raises for the device "meta"
        device = arguments[0].device.type
        key += torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return tuple(key)


def with_specs(op: Operator, arguments: Arguments, inplace: bool) -> Arguments:
    """Returns the arguments with a TensorSpec instead of each tensor, for planning.

    A TensorSpec has what `signature` reads of a tensor, so a plan cannot depend on anything else.
    """
    input, *specs = _with_values(
        arguments, [_spec(value) for value in named(op, arguments).values()]
    )
    if inplace:
        input = replace(input, is_leaf_or_view=arguments[0].is_leaf or is_view(arguments[0]))
    return input, *specs


def _spec(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    return TensorSpec(x.dtype, x.shape, x.stride(), x.device, x.requires_grad)


def named(op: Operator, arguments: Arguments) -> dict[str, Any]:
    """Returns the arguments by name, including the fields of options, which come last."""
    by_name = dict(zip(op.arguments, arguments, strict=True))
    if isinstance(arguments[-1], VocabOptions):
        by_name |= by_name.pop(op.arguments[-1]).by_name()
    return by_name


def _with_values(arguments: Arguments, values: list[Any]) -> Arguments:
    """Returns the arguments with other values, in the order of `named`."""
    if not isinstance(arguments[-1], VocabOptions):
        return tuple(values)
    count, options = len(arguments) - 1, copy(arguments[-1])
    vars(options).update(zip(vars(options), values[count:], strict=True))
    return *values[:count], options


# ---- calls without a signature -------------------------------------------------------------------


def no_signature_reason(op: Operator, arguments: Arguments) -> str | None:
    """Returns why a call without a signature falls back to torch's operator.

    None means that a kernel may run: for the local shards of DTensors, or for these arguments, in
    which numbers have been converted.
    """
    kind = type(arguments[0])
    if kind not in PLAIN and op.local_shard_of(arguments) is None:
        return f"input is a {kind.__name__}"
    reason = active_mode()
    if reason or kind not in PLAIN:
        return reason
    for name, value in named(op, arguments).items():
        if isinstance(value, Tensor):
            is_number = name not in op.tensor_names
            reason = layout_reason(name, value) or (f"{name} is a tensor" if is_number else None)
        elif type(value) not in _HASHED:
            reason = f"{name} is a {type(value).__name__}"
        if reason is not None:
            return reason
    return None


def layout_reason(name: str, tensor: Tensor) -> str | None:
    """Returns why a TensorSpec cannot describe a tensor, None if it can."""
    if type(tensor) not in PLAIN:
        return f"{name} is a {type(tensor).__name__}"
    if tensor.layout is not torch.strided:
        return f"{name} has layout {tensor.layout}"
    if tensor.is_neg() or is_zero_tensor(tensor):
        return f"{name} is lazy"
    if tensor.is_nested:
        return f"{name} is nested"
    if is_functorch_wrapped(tensor):
        return f"{name} has left torch.func"
    if is_lazy_clone(tensor):  # reading its address would copy it
        return f"{name} is a lazy clone"
    return None


# ---- numbers -------------------------------------------------------------------------------------


def numbers_in_tensors(op: Operator, arguments: Arguments) -> dict[str, Any]:
    """Returns the tensors, or their specs, that hold numbers, by name."""
    pairs = named(op, arguments).items()
    return {name: x for name, x in pairs if isinstance(x, TENSORS) and name not in op.tensor_names}


def is_readable(number: Any) -> bool:
    """Returns whether the value of a tensor can be used as a Python number.

    A tensor that requires grad has to stay a tensor, and reading a tensor on a GPU synchronises.
    """
    return number.is_cpu and not number.requires_grad and bool(number.numel() == 1)


def with_python_numbers(op: Operator, arguments: Arguments) -> Arguments:
    """Returns the arguments with NumPy numbers and one-element tensors as Python numbers.

    The options of torch's function are replaced by None.
    """
    pairs = named(op, arguments).items()
    return _with_values(arguments, [_number(op, name, value) for name, value in pairs])


def _number(op: Operator, name: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        is_number = name not in op.tensor_names and layout_reason(name, value) is None
        return value.item() if is_number and is_readable(value) else value
    if any(scalar.flag and scalar.name == name for scalar in op.scalars):
        return bool(value)
    if name == "torch_options":
        return None
    if isinstance(value, bool) or any(operand.name == name for operand in op.operands):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value
