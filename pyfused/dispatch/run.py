"""Runs a call by a fused kernel, or by torch's operator with a reason.

If ``PYFUSED_BACKEND`` is set, kernels run for tensors of any size.
"""

from __future__ import annotations

import math
import warnings
from functools import lru_cache
from numbers import Integral, Real
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from pyfused import backends
from pyfused.backends import DTYPES, cpu, takes_triton, unsupported_device
from pyfused.dispatch import reasons, report, sizes
from pyfused.dispatch.operator import Operand, Operator, Options, Tensors, requires_grad
from pyfused.dispatch.reasons import FUSED, SMALL, layout_reason
from pyfused.dispatch.sizes import is_small
from pyfused.torch_internals import (
    PLAIN,
    active_mode,
    any_autocast,
    functorch_is_active,
    has_names,
    is_batched,
    is_exporting,
    is_functorch_wrapped,
    is_lazy_clone,
    is_zero_tensor,
    never_traced,
)
from pyfused.types import OPTIONS, VocabShard

_INDEX_DTYPES = (torch.int64, torch.uint8)
_CONVERTED_DTYPES = (*_INDEX_DTYPES, torch.bool, torch.int8, torch.int16, torch.int32)
_NUMBERS = frozenset((float, NoneType))
_CHOICES = frozenset((str, bool, int, float, torch.dtype, NoneType))
_STRIDED = torch.strided


def run(op: Any, tensors: Tensors, options: Options, shard: VocabShard | None = None) -> Tensor:
    """Returns an operator's result, from a fused kernel or from torch's operator.

    Args:
        shard: The classes of this process, if a process group shards them.
    """
    if shard is not None:
        return _run_on_shard(op, tensors, options, shard)  # type: ignore[no-any-return]
    if is_dynamo_compiling():
        return _run_compiled(op, tensors, options)  # type: ignore[no-any-return]
    reason, converted, is_uniform = decide(op, tensors, options)
    fused = op.fused_uniform if is_uniform else op.fused
    if report.active:
        fused = report.counted(op, tensors, options, reason, fused)
    if reason is None:
        return fused(tensors, converted)  # type: ignore[no-any-return]
    if reason is not SMALL:
        report_fallback(op, tensors, reason)
    return op.by_torch(tensors, options)  # type: ignore[no-any-return]


@never_traced
def _run_on_shard(op: Any, tensors: Tensors, options: Options, shard: VocabShard) -> Any:
    """Returns the result of a call with this process' classes, in compiled programs, too.

    All processes have to decide alike, so neither sizes nor layouts decide.

    Raises:
        RuntimeError: Transforms of torch.func or forward-mode AD are active.
    """
    tensors, local = op.checked_on_shard(tensors, options, shard)
    reason, converted, fused = active_mode(), _converted(op, options, tensors), op.fused
    if reason is None and isinstance(converted, str):
        reason = converted
    if report.active:
        fused = report.counted(op, tensors, options, reason, fused, local)
    if reason is None:
        return fused(tensors, converted, local)
    if reason in ("torch.func", "forward-mode AD"):  # collectives have no derivatives for them
        raise RuntimeError(f"{op.name}: expected no {reason} with a shard, got a call in it")
    reasons.log_once(op.name, reason)
    return op.torch_on_shard(tensors, options, local)


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
    return decide(op, tensors, options)[0]


def decide(op: Any, tensors: Tensors, options: Options) -> tuple[str | None, Options, bool]:
    """Returns why torch's operator computes a call, None if a kernel does.

    Also returns the options of the kernel, in which numbers are floats, and whether kernels take
    the tensors as they are; see `Operator.uniform`.
    """
    if is_small(op, tensors, options):
        return SMALL, options, False
    input = tensors[0]
    if type(input) not in PLAIN:
        return f"input is a {type(input).__name__}", options, False
    if mode := active_mode():
        return mode, options, False
    on_cpu = backends.FORCED is None and input.is_cpu and cpu.MISSING is None
    dtype, uniform = input.dtype, op.uniform
    for i, x in enumerate(tensors):
        operand = op.all_operands[i]
        if x is None and operand.optional:
            continue
        is_usual = (  # the conditions of `unsupported`, without a call for each tensor
            type(x) in PLAIN
            and x.layout is _STRIDED
            and (x.dtype in DTYPES or (operand.indices and x.dtype is torch.int64))
            and not (x.is_neg() or is_zero_tensor(x) or x.is_nested)
            and (has_names is None or not has_names(x))
            and not (is_functorch_wrapped(x) or is_batched(x) or is_lazy_clone(x))
            and (x.is_cpu if on_cpu else unsupported_device(operand.name, x, input) is None)
            and (operand.differentiated or not x.requires_grad)
            and (i == 0 or x.numel())
        )
        if not is_usual and (reason := unsupported(operand, x, input)):
            return reason, options, False
        if uniform and i and (i >= uniform or x.dtype is not dtype or x.shape != input.shape):
            uniform = 0
    converted, count = options, len(op.numbers)
    are_floats = _NUMBERS.issuperset(map(type, options[:count]))
    if op.compared or not (are_floats and _CHOICES.issuperset(map(type, options[count:]))):
        converted = _converted(op, options, tensors)
        if isinstance(converted, str):
            return converted, options, False
    reason = op.invalid_options(*converted)
    if uniform and not any_autocast():
        return reason, converted, True
    return reason or op.misfit(tensors, converted), converted, False


def unsupported(operand: Operand, tensor: Any, input: Any) -> str | None:
    """Returns why the kernels for the input's device do not support a tensor, or None."""
    name = operand.name
    if not isinstance(tensor, Tensor):
        is_float = isinstance(tensor, Real) if is_dynamo_compiling() else type(tensor) is float
        is_number = operand.number and is_float
        return None if is_number else f"{name} is a {type(tensor).__name__}"
    is_traced = is_dynamo_compiling() and type(tensor) in PLAIN
    if not is_traced and (reason := layout_reason(name, tensor)):
        return reason
    if reason := unsupported_device(name, tensor, input):
        return reason
    others = _CONVERTED_DTYPES if operand.converts else _INDEX_DTYPES if operand.indices else ()
    if tensor.dtype not in (*DTYPES, *others):
        return f"{name} has dtype {tensor.dtype}"
    if not operand.differentiated and requires_grad(tensor):
        return f"{name} requires grad"
    if is_traced:
        return None  # a comparison would restrict the sizes of the program
    return SMALL if tensor is not input and tensor.numel() == 0 else None  # it broadcasts


# ---- options -------------------------------------------------------------------------------------


def _converted(op: Operator, options: Options, tensors: Tensors) -> Options | str:
    """Returns the options of a kernel, in which numbers are floats, or why there are none.

    A number that is compared with an operand is rounded to its dtype.

    The value of a tensor of one element is read, unless it needs a gradient or is on a GPU, where
    reading synchronises. torch's own functions never take a number that requires grad.
    """
    count = len(op.numbers)
    numbers, choices = options[:count], options[count:]
    converted = list[Any]()
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
    for operand, tensor in zip(op.all_operands, tensors, strict=True):
        if tensor is None and operand.optional:
            continue
        if reason := unsupported(operand, tensor, tensors[0]):
            return reason
    return None if op.fallback_reason is None else op.fallback_reason(*tensors, options)


# ---- fallbacks -----------------------------------------------------------------------------------


def head_elements(input: Tensor, weight: Tensor) -> Any:
    """Returns the number of a head's logits, which may be symbolic."""
    return math.prod((*input.shape[:-1], *weight.shape[:-1]))


def report_fallback(op: Operator, tensors: Tensors, reason: str) -> None:
    """Logs once that a call falls back to torch's operator, and warns if its logits are large.

    Logits of 32 MiB or more are large: kernels would need a quarter of that, or 16 MiB.
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
    if megabytes >= 32 and reasons.first_time(op.name, f"logits: {reason}"):
        message = f"pyfused: {op.name}: torch's operators need {megabytes} MiB for the logits: "
        if reason.endswith(" requires grad"):
            reason += ". Detach it if it needs no gradient"
        warnings.warn(message + reason, RuntimeWarning, stacklevel=reasons.stacklevel())
