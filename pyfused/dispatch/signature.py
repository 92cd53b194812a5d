"""The signature of a call: everything that its plan depends on. Values of tensors are excluded."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from pyfused import backends
from pyfused.dispatch.operator import Operator, Options, Tensors, requires_grad
from pyfused.torch_internals import (
    active_mode,
    any_autocast,
    has_names,
    is_functorch_wrapped,
    is_lazy_clone,
    is_zero_tensor,
)
from pyfused.types import NUMBER, OPTIONS, DynamicSize, TensorSpec

PLAIN = (Tensor, Parameter)
_KINDS = frozenset((str, bool, int, torch.dtype, NoneType))
_FLOATS = frozenset((float, NoneType))
_STRIDED = torch.strided
_CASES, _CHOICES, _DYNAMIC_DIMS, _FIRST_TENSOR = 2, 3, 5, 6  # indices into a key


def signature(op: Operator, tensors: Tensors, options: Options) -> tuple[Any, Options] | str:
    """Returns the key of a call's plan and the options of its launch, or why it has no plan.

    The key has the case of each number, the other options, the layout of each tensor and whether it
    requires grad, grad mode, autocast and the default dtype. The layouts of contiguous tensors, and
    of tensors whose strides a kernel reads when it starts, do not have the sizes that a plan does
    not depend on. In the options of the launch, numbers are floats.
    """
    if type(tensors[0]) not in PLAIN:
        return f"input is a {type(tensors[0]).__name__}"
    if mode := active_mode():
        return mode
    count = len(op.numbers)
    numbers, choices = options[:count], options[count:]
    if not _FLOATS.issuperset(map(type, numbers)):
        floats = as_floats(op, numbers)
        if isinstance(floats, str):
            return floats
        numbers, options = floats, op.options(*floats, *choices)
    cases = op.cases(numbers)
    if isinstance(cases, str):
        return cases
    kinds = tuple(map(type, choices))  # as True is equal to 1
    if not _KINDS.issuperset(kinds):
        integers = _with_integers(op, choices)
        if isinstance(integers, str):
            return integers
        choices, options = integers, op.options(*numbers, *integers)
    grad = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    key: list[Any] = [grad, torch.get_default_dtype(), cases, choices, kinds, 0]
    operands, leading, dims, broadcasts, any_strides = op.all_operands, None, 0, False, False
    for i, x in enumerate(tensors):
        if x is None:
            key.append(x)
            continue
        kind = type(x)
        if kind is not Tensor and kind is not Parameter:
            if kind is not float or not operands[i].number:
                return f"{operands[i].name} is a {kind.__name__}"
            dims = _make_static(key, tensors) if dims > 0 and operands[i].has_rows else dims
            key.append(NUMBER)
            continue
        if (  # the conditions of layout_reason, without a call for each tensor
            x.layout is not _STRIDED
            or x.is_neg()
            or is_zero_tensor(x)
            or x.is_nested
            or (has_names is not None and has_names(x))
            or is_functorch_wrapped(x)
            or is_lazy_clone(x)
        ):
            return str(layout_reason(operands[i].name, x))
        shape = x.shape
        if i == 0:
            any_strides = op.reads_strides and x.is_cpu and backends.FORCED != "triton"
        if i == 0 and (any_strides or x.is_contiguous()):
            most, others, before_dim = op.dynamic
            dims, broadcasts = min(most, len(shape) - others), others == 0
            if before_dim:
                dim = options.dim
                dims = min(dims, dim % len(shape)) if dims > 0 and type(dim) is int else 0
            dims = key[_DYNAMIC_DIMS] = 0 if 0 in shape else dims
        if dims > 0 and operands[i].has_rows:
            rows, kept = shape, ()
            if len(shape) != dims:
                sizes = tuple(shape)  # a slice of a torch.Size takes longer
                rows, kept = sizes[:dims], sizes[dims:]
            leading = leading or rows
            # Shapes with more dimensions than an elementwise input's broadcast.
            is_dynamic = i == 0 or any_strides or x.is_contiguous()
            if is_dynamic and rows == leading and not (kept and broadcasts):
                key.append((x.dtype, kept, None, x.device, x.requires_grad))
                continue
            dims = _make_static(key, tensors)
        elif dims > 0 and not x.is_contiguous():
            dims = _make_static(key, tensors)
        key.append((x.dtype, shape, x.stride(), x.device, x.requires_grad))
    if any_autocast() and not tensors[0].is_meta:  # torch raises for the device "meta"
        device = tensors[0].device.type
        key += torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return tuple(key), options


def _make_static(key: list[Any], tensors: Tensors) -> int:
    """Adds all sizes to the layouts of a key, and returns its number of dynamic dimensions, 0."""
    key[_FIRST_TENSOR:] = [
        (x.dtype, x.shape, x.stride(), x.device, x.requires_grad) if isinstance(x, Tensor) else kept
        for x, kept in zip(tensors, key[_FIRST_TENSOR:], strict=False)
    ]
    key[_DYNAMIC_DIMS] = 0
    return 0


def as_floats(op: Operator, numbers: Sequence[Any]) -> tuple[Any, ...] | str:
    """Converts the numbers of a call to floats, or returns why one of them cannot be converted.

    The value of a tensor of one element is read, unless it needs a gradient or is on a GPU, where
    reading synchronises. torch's own functions never take a number that requires grad.
    """
    floats = list[Any]()
    for scalar, value in zip(op.numbers, numbers, strict=True):
        name = scalar.name
        if isinstance(value, Tensor):
            is_ours = OPTIONS.get(name) is scalar and name != "label_smoothing"
            is_constant = not (requires_grad(value) if is_ours else value.requires_grad)
            is_readable = value.is_cpu and is_constant and value.numel() == 1
            if not is_readable or layout_reason(name, value) is not None:
                return f"{name} is a tensor"
            value = value.detach()  # torch warns if a number that requires grad is converted
        elif value is not None and not isinstance(value, (float, int, Real)):
            return f"{name} is a {type(value).__name__}"
        floats.append(None if value is None else float(value))
    return tuple(floats)


def _with_integers(op: Operator, choices: Sequence[Any]) -> tuple[Any, ...] | str:
    """Converts integers of other libraries, or returns why an option has no plan."""
    converted = list[Any]()
    for choice, value in zip(op.choices, choices, strict=True):
        is_integer = isinstance(value, Integral) and not isinstance(value, bool)
        if choice.of_torch:
            value = None
        elif type(value) not in _KINDS and not is_integer:
            return f"{choice.name} is a {type(value).__name__}"
        converted.append(int(value) if is_integer else value)
    return tuple(converted)


def with_specs(op: Operator, key: Any) -> tuple[list[Any], Options]:
    """Returns the layouts of the tensors of a key, and the options for planning.

    A TensorSpec has only the properties that the key has, so a plan cannot depend on others.
    """
    leading = tuple([DynamicSize() for _ in range(key[_DYNAMIC_DIMS])])
    specs = list[Any]()
    for layout in key[_FIRST_TENSOR : _FIRST_TENSOR + len(op.all_operands)]:
        if type(layout) is tuple:
            dtype, shape, strides, *others = layout
            shape = (*leading, *shape) if strides is None else shape
            layout = TensorSpec(dtype, shape, strides, *others)
        specs.append(layout)
    return specs, op.options(*key[_CASES], *key[_CHOICES])


def spec_of(x: Any) -> Any:
    """Returns a spec with all sizes of a tensor, None for None, and NUMBER for a number."""
    if not isinstance(x, Tensor):
        return None if x is None else NUMBER
    return TensorSpec(x.dtype, x.shape, x.stride(), x.device, x.requires_grad)


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
    if has_names is not None and has_names(tensor):
        return f"{name} has named dimensions"
    if is_functorch_wrapped(tensor):
        return f"{name} is used outside of its torch.func transform"
    if is_lazy_clone(tensor):  # reading its address would copy it
        return f"{name} is a lazy clone"
    return None
