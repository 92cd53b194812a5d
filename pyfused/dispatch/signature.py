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
from pyfused.types import TensorSpec

PLAIN = (Tensor, Parameter)
_CONSTANTS = (bool, int, torch.dtype)  # True is equal to 1, so the type is part of the key
_FLOATS = frozenset((float, type(None)))


def signature(op: Operator, arguments: Arguments, inplace: bool) -> tuple[Any, Numbers] | str:
    """Returns the key of a call's plan and the call's numbers, or why the call has no plan.

    The key has the operator, the layout of each tensor and whether it requires grad, the cases of
    the numbers, all other arguments, grad mode, autocast and the default dtype.

    Raises:
        RuntimeError, TypeError, ValueError: A number is invalid.
    """
    if type(arguments[0]) not in PLAIN:
        return f"input is a {type(arguments[0]).__name__}"
    if mode := active_mode():
        return mode
    grad = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    key: list[Any] = [op, inplace, grad, torch.get_default_dtype()]
    numbers: list[Any] = []
    if op.options is not None:
        arguments = (*arguments[: len(op.operands)], *vars(arguments[-1]).values())
    for value, scalar, name in zip(arguments, op.scalar_at, op.names, strict=True):
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
                return str(layout_reason(name, value))
            shape, stride = value.shape, value.stride()
            key.append((value.dtype, shape, stride, value.device, value.requires_grad))
        elif scalar is not None:
            is_int = kind is int and op.takes_floats and not scalar.operand
            numbers.append(float(value) if is_int else value)
        elif value is None or kind is str:
            key.append(value)
        elif kind in _CONSTANTS:
            key.append((kind, value))
        elif kind is float:  # an invalid argument
            key.append((kind, str(value)))
        elif isinstance(value, Integral):
            key.append((int, int(value)))
        else:
            return f"{name} is a {kind.__name__}"
    if not _FLOATS.issuperset(map(type, numbers)) and (reason := as_floats(op, numbers)):
        return reason
    values = tuple(numbers)
    cases = op.cases(values)
    if isinstance(cases, str):
        return cases
    key.append(cases)
    if inplace:
        input = arguments[0]
        key.append(input.is_leaf or is_view(input))
    if any_autocast() and not arguments[0].is_meta:  # torch raises for the device "meta"
        device = arguments[0].device.type
        key += torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return tuple(key), values


def flat(op: Operator, arguments: Arguments) -> Arguments:
    """Returns the operands and the fields of the options, or all arguments without options.

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


def as_floats(op: Operator, numbers: list[Any]) -> str | None:
    """Converts the numbers of a call to floats; returns why a number cannot be converted, or None.

    A tensor is read if it has one element, unless it requires grad or is on a GPU, where reading
    synchronises.
    """
    for i, (scalar, value) in enumerate(zip(op.numbers, numbers, strict=True)):
        name = scalar.name
        if isinstance(value, Tensor):
            is_readable = value.is_cpu and not value.requires_grad and value.numel() == 1
            if not is_readable or layout_reason(name, value) is not None:
                return f"{name} is a tensor"
        elif value is None:
            continue
        elif not isinstance(value, float if scalar.operand else op.number_types):
            return f"{name} is a {type(value).__name__}"
        numbers[i] = op.to_number(value)
    return None


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


def layout_reason(name: str, tensor: Tensor) -> str | None:
    """Returns why a TensorSpec cannot describe a tensor, None if it can."""
    if type(tensor) not in PLAIN:
        return f"{name} is a {type(tensor).__name__}"
    if tensor.layout is not torch.strided:
        return f"{name} has layout {tensor.layout}"
    if tensor.is_neg() or is_zero_tensor(tensor):
        return f"{name} is lazily negated or zero"
    if tensor.is_nested:
        return f"{name} is nested"
    if has_names(tensor):
        return f"{name} has named dimensions"
    if is_functorch_wrapped(tensor):
        return f"{name} is used outside of its torch.func transform"
    if is_lazy_clone(tensor):  # reading its address would copy it
        return f"{name} is a lazy clone"
    return None
