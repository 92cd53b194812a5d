"""Runs a call by a fused kernel, or by torch's operator with a reason.

If ``PYFUSED_BACKEND`` is set, kernels run for tensors of any size.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import lru_cache
from numbers import Integral
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from pyfused import backends, checks
from pyfused.backends import DTYPES, cpu, takes_triton, unsupported_device
from pyfused.dispatch import reasons, report, sizes
from pyfused.dispatch.operator import Operator, Options, Tensors, requires_grad
from pyfused.dispatch.reasons import FUSED, SMALL
from pyfused.dispatch.sizes import is_small
from pyfused.torch_internals import (
    PLAIN,
    active_mode,
    functorch_is_active,
    has_names,
    is_batched,
    is_exporting,
    is_functorch_wrapped,
    is_lazy_clone,
    is_zero_tensor,
)

_INDICES = (torch.int64, torch.uint8)
_CONVERTED = (*_INDICES, torch.bool, torch.int8, torch.int16, torch.int32)
_NUMBERS = frozenset((float, NoneType))
_CHOICES = frozenset((str, bool, int, float, torch.dtype, NoneType))


def run(op: Any, tensors: Tensors, options: Options, small: bool | None = None) -> Tensor:
    """Returns an operator's result, from a fused kernel or from torch's operator.

    Args:
        small: What `left_to_torch` has returned.
    """
    if is_dynamo_compiling():
        return _run_compiled(op, tensors, options)  # type: ignore[no-any-return]
    fused, converted = decide(op, tensors, options, small)
    reason = fused if isinstance(fused, str) else None
    if report.active:
        fused = report.counted(op, tensors, options, reason, fused)
    if reason is None:
        return fused(tensors, converted)  # type: ignore[no-any-return]
    if reason is not SMALL:
        report_fallback(op, tensors, options, reason)
    return op.by_torch(tensors, options)  # type: ignore[no-any-return]


def _run_compiled(op: Any, tensors: Tensors, options: Options) -> Any:
    """Returns the result of a call that Dynamo traces: torch's, or a head's custom operator."""
    if _compiler_reason(op, tensors, options) is not None:
        report.add_traced(op.name)
        return op.by_torch(tensors, options)
    return op.compiled(tensors, options)


# ---- reasons to fall back ------------------------------------------------------------------------


def fallback_reason(op: Operator, tensors: Tensors, options: Options) -> str | None:
    """Returns why torch's operator computes a call, None if a kernel does."""
    if is_dynamo_compiling():
        return _compiler_reason(op, tensors, options)
    method, _ = decide(op, tensors, options)
    return method if isinstance(method, str) else None


def decide(
    op: Operator, tensors: Tensors, options: Options, small: bool | None = None
) -> tuple[Any, Options]:
    """Returns how a call is computed: a method of the operator, or why torch computes it.

    Also returns the options of the method, in which numbers are floats.
    """
    if small or (small is None and is_small(op, tensors, options)):
        return SMALL, options
    if reason := active_mode() or unsupported(op.all_operands, tensors, tensors[0]):
        return reason, options
    count = len(op.numbers)
    are_floats = not count or _NUMBERS.issuperset(map(type, options[:count]))
    if op.compared or not (are_floats and _CHOICES.issuperset(map(type, options[count:]))):
        options = _converted(op, options, tensors)
        if isinstance(options, str):
            return options, ()
    return op.invalid_options(*options) or op.method_of(tensors, options), options


def unsupported(
    operands: Sequence[Any], tensors: Sequence[Any], input: Any = None, is_traced: bool = False
) -> str | None:
    """Returns why the kernels for the input's device do not take a tensor, None if they take all.

    Args:
        operands: The operands, or other declared arguments, that have these values.
        input: The first tensor of the call; None to look only at how tensors are stored.
        is_traced: Whether Dynamo traces the call: how tensors are stored is unknown, and comparing
            a size would restrict the program.
    """
    is_forced = backends.FORCED is not None or cpu.MISSING is not None
    for operand, x in zip(operands, tensors, strict=True):
        if x is None and operand.optional:
            continue
        name = operand.name
        if type(x) not in PLAIN:
            if operand.number and type(x) is float:
                continue
            return f"{name} is a {type(x).__name__}"
        if not is_traced:
            if x.layout is not torch.strided:
                return f"{name} has layout {x.layout}"
            if x.is_neg() or is_zero_tensor(x):
                return f"{name} is lazily negated or zero"
            if x.is_nested:
                return f"{name} is nested"
            if has_names is not None and has_names(x):
                return f"{name} has named dimensions"
            if is_functorch_wrapped(x):
                return f"{name} is used outside of its torch.func transform"
            if is_batched(x):
                return f"{name} is batched"
            if is_lazy_clone(x):  # reading its address would copy it
                return f"{name} is a lazy clone"
        if input is None:
            continue
        are_on_gpus = is_forced or not x.is_cpu or not input.is_cpu
        if are_on_gpus and (reason := unsupported_device(name, x, input)):
            return reason
        dtype = x.dtype
        if dtype not in DTYPES:
            others = _CONVERTED if operand.converts else _INDICES if operand.indices else ()
            if dtype not in others:
                return f"{name} has dtype {dtype}"
        if x.requires_grad and not operand.differentiated and requires_grad(x):
            return f"{name} requires grad"
    return None


# ---- options -------------------------------------------------------------------------------------


def _converted(op: Operator, options: Options, tensors: Tensors) -> Options | str:
    """Returns the options of a kernel, in which numbers are floats, or why there are none.

    A number that is compared with an operand is rounded to its dtype.
    """
    count = len(op.numbers)
    numbers, choices = options[:count], options[count:]
    converted = list[Any]()
    for scalar, value in zip(op.numbers, numbers, strict=True):
        if value is not None and not checks.is_number(value):
            kind = "tensor" if isinstance(value, Tensor) else type(value).__name__
            return f"{scalar.name} is a {kind}"
        if isinstance(value, Integral) and not -(1 << 63) <= int(value) < 1 << 63:
            return f"{scalar.name} is an int of more than 64 bits"
        converted.append(None if value is None else float(value))
    for choice, value in zip(op.choices, choices, strict=True):
        is_integer = isinstance(value, Integral) and not isinstance(value, bool)
        if choice.of_torch:
            value = None
        elif type(value) not in _CHOICES and not is_integer:
            return f"{choice.name} is a {type(value).__name__}"
        converted.append(int(value) if is_integer else value)
    for i, operand in op.compared:
        dtype = getattr(tensors[operand], "dtype", None)
        if converted[i] is not None and dtype in DTYPES:
            converted[i] = _rounded(converted[i], dtype)
    return op.options(*converted)


@lru_cache(maxsize=256)
def _rounded(number: float, dtype: torch.dtype) -> float:
    return torch.tensor(number, dtype=dtype, device="cpu").item()


# ---- programs that are compiled ------------------------------------------------------------------


def _compiler_reason(op: Operator, tensors: Tensors, options: Options) -> str | None:
    """Returns why a compiled call stays torch's function, None if it becomes a custom operator."""
    limits = sizes.COMPILED.get(op.name)
    if limits is None:
        return FUSED
    if is_exporting():
        return "torch.export: exported programs contain only torch's operators"
    # Imported late because it is slow to import; the compiler has imported it already.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    # An unknown size counts as large: a guard would restrict the sizes of the program.
    if statically_known_true(head_elements(*tensors[:2]) < limits[int(takes_triton(tensors[0]))]):
        return "torch.compile: Inductor is faster at this size"
    if functorch_is_active():
        return "torch.func"
    for name, option in zip(op.fields, options, strict=True):
        if isinstance(option, Tensor):
            return f"torch.compile: {name} is a tensor"
    if reason := unsupported(op.all_operands, tensors, tensors[0], is_traced=True):
        return reason
    return None if op.fallback_reason is None else op.fallback_reason(*tensors, options)


# ---- fallbacks -----------------------------------------------------------------------------------


def head_elements(input: Tensor, weight: Tensor) -> Any:
    """Returns the number of a head's logits, which may be symbolic."""
    return math.prod((*input.shape[:-1], *weight.shape[:-1]))


def report_fallback(op: Operator, tensors: Tensors, options: Options, reason: str) -> None:
    """Logs once that a call falls back to torch's operator, and warns if its logits are large.

    Logits of 32 MiB or more are large: kernels would need a quarter of that, or 16 MiB. A call with
    invalid arguments computes none.
    """
    reasons.log_once(op.name, reason)
    if not op.is_linear:
        return
    input, weight = tensors[:2]
    if any(type(x) not in PLAIN or x.is_nested for x in (input, weight)):
        return  # they may have no shape
    elements = head_elements(input, weight)
    if type(elements) is not int:  # comparing a symbolic size would restrict a traced program
        return
    megabytes = elements * input.element_size() >> 20
    if megabytes < 32 or checks.reason(op.check_call, tensors, options) is not None:
        return
    if reasons.first_time(op.name, f"logits: {reason}"):
        message = f"pyfused: {op.name}: torch's operators need {megabytes} MiB for the logits: "
        if reason.endswith(" requires grad"):
            reason += ". Detach it if it needs no gradient"
        warnings.warn(message + reason, RuntimeWarning, stacklevel=reasons.stacklevel())
