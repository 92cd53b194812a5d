"""Runs a call by a fused kernel, or by torch's operator with a reason.

If ``PYFUSED_BACKEND`` is set, kernels run for tensors of any size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from numbers import Integral
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from pyfused import checks
from pyfused.backends import DTYPES, takes_triton
from pyfused.dispatch import reasons, report, sizes
from pyfused.dispatch.autograd import compute
from pyfused.dispatch.operator import Operator, Options, Tensors
from pyfused.dispatch.reasons import FUSED, SMALL, unsupported
from pyfused.torch_internals import PLAIN, active_mode, functorch_is_active, is_exporting

_FLOATS = frozenset((float, NoneType))
_PLAIN_OPTIONS = frozenset((str, bool, int, float, torch.dtype, NoneType))


def run(
    op: Any,
    tensors: Tensors,
    options: Options,
    any_size: bool = False,
    compute: Callable[..., Any] = compute,
) -> Any:
    """Returns an operator's result, from a fused kernel or from torch's operator.

    Args:
        any_size: Whether a kernel computes small calls, too. Functions that torch has decide about
            the size before.
        compute: Computes a call by a kernel, given the operator, the tensors and the options.
    """
    if is_dynamo_compiling():
        return _run_compiled(op, tensors, options)
    count = len(op.numbers)
    is_plain = _FLOATS.issuperset(map(type, options[:count]))
    is_plain = is_plain and _PLAIN_OPTIONS.issuperset(map(type, options[count:]))
    kernel_options, reason = options, None
    if op.asks_size and not any_size and isinstance(tensors[0], Tensor):
        reduction, dim = getattr(options, "reduction", None), getattr(options, "dim", 1)
        if sizes.torch_computes(op, tensors, None, None, reduction, dim):
            reason = SMALL
    if reason is None and (op.compared or not is_plain):
        kernel_options, reason = _converted(op, tensors, options)
    reason = reason or _reason(op, tensors, kernel_options)
    if report.active:
        report.count_call(op, tensors, options, reason)
    if reason is None:
        call = op, tensors, kernel_options
        return report.timed(compute, *call) if report.active else compute(*call)
    if reason is not SMALL:
        report_fallback(op, tensors, options, reason)
    return op.by_torch(tensors, options)


def _run_compiled(op: Any, tensors: Tensors, options: Options) -> Any:
    """Returns the result of a call that Dynamo traces: torch's, or a head's custom operator."""
    if _compiler_reason(op, tensors, options) is not None:
        report.add_traced(op.name)
        return op.by_torch(tensors, options)
    return op.compiled(tensors, options)


# ---- reasons to fall back ------------------------------------------------------------------------


def fallback_reason(op: Operator, tensors: Tensors, options: Options) -> str | None:
    """Returns why torch's operator computes a call of any size, None if a kernel does."""
    if is_dynamo_compiling():
        return _compiler_reason(op, tensors, options)
    options, reason = _converted(op, tensors, options)
    return reason or _reason(op, tensors, options)


def _reason(op: Operator, tensors: Tensors, options: Options) -> str | None:
    """Returns why torch's operator computes a call, None if a kernel takes these options."""
    return (
        active_mode()
        or unsupported(op.all_operands, tensors, tensors[0])
        or op.invalid_options(*options)
        or op.unsupported(tensors, options)
    )


# ---- options -------------------------------------------------------------------------------------


def _converted(op: Operator, tensors: Tensors, options: Options) -> tuple[Options, str | None]:
    """Returns the options that kernels take, and why they do not take one, None if they do.

    Numbers become floats, and other integers ints. A number that is compared with an operand is
    rounded to its dtype.
    """
    count, converted = len(op.numbers), list[Any]()
    for scalar, value in zip(op.numbers, options[:count], strict=True):
        if value is not None and not checks.is_number(value):
            kind = "tensor" if isinstance(value, Tensor) else type(value).__name__
            return options, f"{scalar.name} is a {kind}"
        if isinstance(value, Integral) and not -(1 << 63) <= int(value) < 1 << 63:
            return options, f"{scalar.name} is an int of more than 64 bits"
        converted.append(None if value is None else float(value))
    for choice, value in zip(op.choices, options[count:], strict=True):
        is_plain = type(value) in _PLAIN_OPTIONS
        if not (choice.of_torch or is_plain or isinstance(value, Integral)):
            return options, f"{choice.name} is a {type(value).__name__}"
        converted.append(None if choice.of_torch else value if is_plain else int(value))
    for i, operand in op.compared:
        dtype = getattr(tensors[operand], "dtype", None)
        if converted[i] is not None and dtype in DTYPES:
            converted[i] = _rounded(converted[i], dtype)
    return op.options(*converted), None


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
    return None if op.reason is None else op.reason(*tensors, options)


# ---- fallbacks -----------------------------------------------------------------------------------


def head_elements(input: Tensor, weight: Tensor) -> Any:
    """Returns the number of a head's logits, which may be symbolic."""
    return math.prod((*input.shape[:-1], *weight.shape[:-1]))


def report_fallback(op: Operator, tensors: Tensors, options: Options, reason: str) -> None:
    """Logs once that a call falls back to torch's operator, and warns if its logits are large.

    Logits of 32 MiB or more are large: kernels would need a quarter of that, or 16 MiB. A call with
    invalid arguments computes none.
    """
    if reasons.reported_later(op, tensors):
        return
    reasons.log_once(op.name, reason)
    if not op.is_linear:
        return
    input, weight = tensors[:2]
    if any(type(x) not in PLAIN or x.is_nested or x.is_meta for x in (input, weight)):
        return  # they may have no shape, or no memory
    elements = head_elements(input, weight)
    if type(elements) is not int:  # comparing a symbolic size would restrict a traced program
        return
    megabytes = elements * input.element_size() >> 20
    if megabytes < 32 or checks.reason(op.check_call, tensors, options) is not None:
        return
    hint = ". Detach it if it needs no gradient" if reason.endswith(" requires grad") else ""
    message = f"pyfused: {op.name}: torch's operators need {megabytes} MiB for the logits: {reason}"
    reasons.warn_once(op.name, f"logits: {reason}", message + hint)
