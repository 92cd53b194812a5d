"""The signature of a call: everything that its plan depends on. Values of tensors are excluded."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import count
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
_CASES, _CHOICES, _FIRST_TENSOR = 2, 3, 6  # indices into a key


def signature(
    op: Operator, tensors: Tensors, options: Options, by_size: bool = False
) -> tuple[Any, Options] | str:
    """Returns the key of a call's plan and the options of its launch, or why it has no plan.

    The key has the case of each number, the other options, the layout of each tensor and whether it
    requires grad, grad mode, autocast and the default dtype. In the options of the launch, numbers
    are floats.

    Kernels read most sizes when they start, on CPUs also the strides. Such a size is replaced by
    the first dimension of the input that has this size, as a negative number: -1 for the first
    dimension. So equal sizes remain equal, and different sizes remain different.

    Args:
        by_size: Whether the key has all sizes and strides.
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
    if op.compared:
        numbers = _as_compared(op, tensors, numbers)
        options = op.options(*numbers, *choices)
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
    key: list[Any] = [grad, torch.get_default_dtype(), cases, choices, kinds, by_size]
    operands, shape, of_input, fixed, dims, on_gpu = op.all_operands, None, None, None, 0, False
    for i, x in enumerate(tensors):
        if x is None:
            key.append(x)
            continue
        kind = type(x)
        if kind is not Tensor and kind is not Parameter:
            if kind is not float or not operands[i].number:
                return f"{operands[i].name} is a {kind.__name__}"
            if on_gpu and dims and operands[i].has_rows:
                return signature(op, tensors, options, by_size=True)
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
        if i == 0 and not by_size and 0 not in x.shape:
            shape, dims = x.shape, x.dim()
            fixed = op.fixed if dims else None
            if fixed is not None:
                fixed = options.dim if fixed == "dim" else fixed
                fixed = min(fixed, dims - 1) % dims if type(fixed) is int else None
            on_gpu = not x.is_cpu or backends.FORCED == "triton"
            of_input = _sizes_in_key(shape, shape, fixed, on_gpu)
        if on_gpu and dims and not x.is_contiguous():
            return signature(op, tensors, options, by_size=True)
        if dims and operands[i].has_rows:
            sizes = of_input
            if x.shape != shape:
                sizes = _sizes_in_key(x.shape, shape, fixed, on_gpu)
            if sizes is None:
                return signature(op, tensors, options, by_size=True)
            key.append((x.dtype, sizes, None, x.device, x.requires_grad))
        else:
            key.append((x.dtype, x.shape, x.stride(), x.device, x.requires_grad))
    if any_autocast() and not tensors[0].is_meta:  # torch raises for the device "meta"
        device = tensors[0].device.type
        key += torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return tuple(key), options


@lru_cache(maxsize=4096)
def _sizes_in_key(
    sizes: torch.Size, shape: torch.Size, fixed: int | None, on_gpu: bool
) -> tuple[int, ...] | None:
    """Returns the sizes of an operand in a key; those of 1 remain, because they broadcast.

    On GPUs, kernels read only the sizes before the fixed dimension when they start. The result is
    None if these sizes are not the input's.

    Args:
        shape: The shape of the input.
        fixed: The dimension of the input, and of operands with as many, whose size remains.
    """
    rows = tuple(shape[:fixed] if on_gpu else shape)
    leading = tuple(sizes[:fixed] if on_gpu else sizes)
    if on_gpu and leading != rows:
        return None
    kept = fixed if len(sizes) == len(shape) else None
    names: dict[int, int] = {}
    for dim, size in enumerate(rows):
        if dim != fixed and size > 1:
            names.setdefault(size, -1 - dim)
    named = [n if dim == kept else names.get(n, n) for dim, n in enumerate(leading)]
    return *named, *sizes[len(leading) :]


def as_floats(op: Operator, numbers: Sequence[Any]) -> tuple[Any, ...] | str:
    """Converts the numbers of a call to floats, or returns why one of them cannot be converted.

    The value of a tensor of one element is read, unless it needs a gradient or is on a GPU, where
    reading synchronises. torch's own functions never take a number that requires grad.
    """
    floats = list[Any]()
    for scalar, value in zip(op.numbers, numbers, strict=True):
        name = scalar.name
        if isinstance(value, Tensor):
            if type(value) not in PLAIN:
                return f"{name} is a {type(value).__name__}"
            is_ours = OPTIONS.get(name) is scalar and name != "label_smoothing"
            is_constant = not (requires_grad(value) if is_ours else value.requires_grad)
            is_readable = value.is_cpu and is_constant and value.numel() == 1
            if not is_readable or layout_reason(name, value) is not None:
                return f"{name} is a tensor"
            value = value.detach()  # torch warns if a number that requires grad is converted
        elif value is not None and not isinstance(value, (float, int, Real)):
            return f"{name} is a {type(value).__name__}"
        elif isinstance(value, Integral) and not -(1 << 63) <= int(value) < 1 << 63:
            return f"{name} is an int of more than 64 bits"
        floats.append(None if value is None else float(value))
    return tuple(floats)


def _as_compared(op: Operator, tensors: Tensors, numbers: Sequence[Any]) -> tuple[Any, ...]:
    """Rounds the numbers that are compared with an operand to the dtype of the operand."""
    rounded = list(numbers)
    for i, operand in op.compared:
        dtype = getattr(tensors[operand], "dtype", None)
        if rounded[i] is not None and dtype in backends.DTYPES:
            rounded[i] = _rounded(rounded[i], dtype)
    return tuple(rounded)


@lru_cache(maxsize=256)
def _rounded(number: float, dtype: torch.dtype) -> float:
    return torch.tensor(number, dtype=dtype, device="cpu").item()


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
    layouts = key[_FIRST_TENSOR : _FIRST_TENSOR + len(op.all_operands)]
    sizes = {n for layout in layouts if type(layout) is tuple for n in layout[1]}
    stand_ins = (n for n in count(2) if n not in sizes)
    dynamic = {n: DynamicSize(next(stand_ins)) for n in sizes if n < 0}
    specs = list[Any]()
    for layout in layouts:
        if type(layout) is tuple:
            dtype, shape, strides, *others = layout
            if strides is None:
                shape = tuple([dynamic.get(n, n) for n in shape])
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
