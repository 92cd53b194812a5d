"""The signature of a call: everything that its plan depends on. Values of tensors are excluded."""

from __future__ import annotations

from dataclasses import replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from pyfused.dispatch.operator import Arguments, Numbers, Operator
from pyfused.torch_internals import (
    active_mode,
    any_autocast,
    has_names,
    is_functorch_wrapped,
    is_lazy_clone,
    is_view,
    is_zero_tensor,
)
from pyfused.types import Scalar, TensorSpec

PLAIN = (Tensor, Parameter)
_CONSTANTS = (bool, int, torch.dtype)  # True is equal to 1, so the type is part of the key
_FLOATS = frozenset((float, type(None)))


def signature(op: Operator, arguments: Arguments, inplace: bool) -> tuple[Any, Numbers] | None:
    """Returns the key of a call's plan and the call's numbers, or None if the call has no key.

    The key has the operator, the layout of each tensor and whether it requires grad, the cases of
    the numbers, all other arguments, grad mode, autocast and the default dtype. A call has no key
    if `no_signature_reason` returns a reason.

    Raises:
        RuntimeError, TypeError, ValueError: A number is invalid.
    """
    if type(arguments[0]) not in PLAIN or active_mode() is not None:
        return None
    grad = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    key: list[Any] = [op, inplace, grad, torch.get_default_dtype()]
    numbers: list[Any] = []
    if op.options is not None:
        arguments = (*arguments[: len(op.operands)], *vars(arguments[-1]).values())
    for value, scalar in zip(arguments, op.scalar_at, strict=True):
        kind = type(value)
        if kind is Tensor or kind is Parameter:
            if scalar is not None:
                numbers.append(None if scalar.tensor else value)
                if not scalar.tensor:
                    continue
            if (  # the conditions of layout_reason, without a call for each tensor
                value.layout is not torch.strided
                or value.is_neg()
                or is_zero_tensor(value)
                or value.is_nested
                or has_names(value)
                or is_functorch_wrapped(value)
                or is_lazy_clone(value)
            ):
                return None
            shape, stride = value.shape, value.stride()
            key.append((value.dtype, shape, stride, value.device, value.requires_grad))
        elif scalar is not None:
            numbers.append(value)
        elif value is None or kind is str:
            key.append(value)
        elif kind in _CONSTANTS:
            key.append((kind, value))
        elif kind is float:  # an invalid argument
            key.append((kind, str(value)))
        elif isinstance(value, Integral):
            key.append((int, int(value)))
        else:
            return None
    if not _FLOATS.issuperset(map(type, numbers)) and not as_floats(op, numbers):
        return None
    values = tuple(numbers)
    cases = op.cases(values)
    if type(cases) is str:
        return None
    key.append(cases)
    if inplace:
        input = arguments[0]
        key.append(input.is_leaf or is_view(input))
    if any_autocast() and not arguments[0].is_meta:  # torch raises for the device "meta"
        device = arguments[0].device.type
        key += torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return tuple(key), values


def flat(op: Operator, arguments: Arguments) -> Arguments:
    """Returns the operands and the fields of options, or all arguments of an operator without.

    The options of torch's function, which kernels ignore, are left out.
    """
    if op.options is None:
        return arguments
    return *arguments[: len(op.operands)], *arguments[-1].values()


def numbers_of(op: Operator, arguments: Arguments) -> Numbers:
    """Returns the numbers among valid arguments."""
    pairs = [
        (x, s) for x, s in zip(flat(op, arguments), op.scalar_at, strict=True) if s is not None
    ]
    numbers = [None if s.tensor and isinstance(x, Tensor) else x for x, s in pairs]
    as_floats(op, numbers)
    return tuple(numbers)


def as_floats(op: Operator, numbers: list[Any]) -> bool:
    """Converts the numbers of a call to floats; returns whether all could be converted.

    A tensor is read if it has one element, unless it requires grad or is on a GPU, where reading
    synchronises.
    """
    for i, (scalar, value) in enumerate(zip(op.numbers, numbers, strict=True)):
        if number_reason(op, scalar, value):
            return False
        numbers[i] = None if value is None else op.to_number(value)
    return True


def number_reason(op: Operator, scalar: Scalar, value: Any) -> str | None:
    """Returns why a value is not a number that kernels can use, None if it is one or None."""
    if isinstance(value, Tensor):
        readable = value.is_cpu and not value.requires_grad and value.numel() == 1
        is_number = readable and layout_reason(scalar.name, value) is None
        return None if is_number else f"{scalar.name} is a tensor"
    is_operand = any(operand.name == scalar.name for operand in op.operands)
    if value is None or isinstance(value, float if is_operand else op.number_types):
        return None
    return f"{scalar.name} is a {type(value).__name__}"


def with_specs(op: Operator, arguments: Arguments, numbers: Numbers, inplace: bool) -> Arguments:
    """Returns the arguments for planning: layouts of tensors, and cases of numbers.

    A TensorSpec has what `signature` reads of a tensor, so a plan cannot depend on anything else.
    """
    cases, values = iter(op.cases(numbers)), list[Any]()
    for value, scalar in zip(flat(op, arguments), op.scalar_at, strict=True):
        case = None if scalar is None else next(cases)
        if isinstance(value, Tensor):
            is_number = scalar is not None and not scalar.tensor
            spec = TensorSpec(
                value.dtype, value.shape, value.stride(), value.device, value.requires_grad
            )
            values.append(case if is_number else spec)
        elif scalar is not None:
            values.append(case)
        else:
            is_integer = isinstance(value, Integral) and not isinstance(value, bool)
            values.append(int(value) if is_integer else value)
    if inplace:
        is_leaf_or_view = arguments[0].is_leaf or is_view(arguments[0])
        values[0] = replace(values[0], is_leaf_or_view=is_leaf_or_view)
    if op.options is None:
        return tuple(values)
    count = len(op.operands)
    return *values[:count], *[None] * (len(arguments) - count - 1), op.options(*values[count:])


# ---- calls without a signature -------------------------------------------------------------------


def no_signature_reason(op: Operator, arguments: Arguments) -> str | None:
    """Returns why a call without a signature falls back to torch's operator.

    None means that a kernel may run, for the local shards of DTensors.
    """
    kind = type(arguments[0])
    if kind not in PLAIN and op.local_shard_of(arguments) is None:
        return f"input is a {kind.__name__}"
    reason = active_mode()
    if reason or kind not in PLAIN:
        return reason
    for name, value, scalar in zip(op.names, flat(op, arguments), op.scalar_at, strict=True):
        if scalar is not None and not (scalar.tensor and isinstance(value, Tensor)):
            reason = number_reason(op, scalar, value)
        elif isinstance(value, Tensor):
            reason = layout_reason(name, value)
        elif not isinstance(value, (str, float, Integral, torch.dtype, type(None))):
            reason = f"{name} is a {type(value).__name__}"
        if reason is not None:
            return reason
    cases = op.cases(numbers_of(op, arguments))
    return cases if isinstance(cases, str) else None


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
    if has_names(tensor):
        return f"{name} has named dimensions"
    if is_functorch_wrapped(tensor):
        return f"{name} has left torch.func"
    if is_lazy_clone(tensor):  # reading its address would copy it
        return f"{name} is a lazy clone"
    return None
