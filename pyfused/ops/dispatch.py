"""Whether a call takes a fused kernel or torch's own operator, and why.

With ``PYFUSED_BACKEND`` set the kernels take tensors of any size.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _is_cow_tensor as is_lazy_clone  # type: ignore[attr-defined]
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._guards import TracingContext
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.nn import Parameter
from torch.overrides import has_torch_function
from torch.utils._device import DeviceContext

from pyfused import checks
from pyfused.backends import DTYPES, takes_triton, unsupported_device
from pyfused.ops import TORCH_OPS, reasons, sizes
from pyfused.ops.declaration import Arguments, Operand, Operator
from pyfused.ops.originals import torch_alone
from pyfused.ops.reasons import FUSED, SMALL, say_once
from pyfused.types import Options

# What a compiler follows into, to the custom operators that are called there.
FOLLOWED = (*sizes.OF_LOGITS, *sizes.LINEAR, *sizes.COMPOSED, "multilabel_margin_loss")
_PLAIN = (Tensor, Parameter)
_ERRORS = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)
_KEYS = (bool, int, torch.dtype)  # of arguments that are part of a signature as they are
_INDEX_DTYPES = (torch.int64, torch.uint8)


def call(
    op: Operator,
    arguments: Arguments,
    inplace: bool = False,
    patched: Callable[..., Tensor] | None = None,
    given: Arguments = (),
) -> Tensor:
    """Returns an operator's result, from a fused kernel or from torch's own operator.

    Args:
        arguments: All that torch's function takes but for ``inplace``.
        inplace: The result takes the input's memory; with a loss, the input's gradient does.
        patched, given: torch's function that was called where :func:`pyfused.patch` replaces it,
            and its arguments: it raises the errors, once.
    """
    input, ours = arguments[0], None
    try:
        if is_dynamo_compiling():
            reason, run = _plan(op, arguments, inplace)
        elif is_small(op, arguments):
            reason, run = SMALL, None
        else:
            reason, run = plan_of(op, arguments, inplace)
        if inplace and (reason is None or reason is SMALL):
            op.give_up(input)
        if run is not None:
            output: Tensor = run(arguments)
            return output
    except Exception as error:
        if patched is None:
            raise
        ours = error
    if ours is not None:
        assert patched is not None
        result = patched(*given)  # raises torch's error, if it is one of the arguments
        if inplace:  # the kernel may have overwritten what torch has read now
            raise ours
        _warn_once(op.name, ours)
        return result
    reference = op.aten_ if inplace else op.aten
    shown = False  # to subclasses and modes, whose own code may call what is patched
    if reason is not SMALL:
        say_once(op.name, str(reason))
        if op.name in sizes.LINEAR:
            _warn_of_logits(op, arguments, str(reason))
        if patched is not None and not isinstance(input, Tensor):
            return patched(*given)
        if has_torch_function(arguments):
            reference = op.reference_ if inplace else op.reference
            shown = True
    try:
        if shown or (reason is SMALL and op.definition is None) or is_dynamo_compiling():
            return reference(*arguments)
        with torch_alone:
            return reference(*arguments)
    except _ERRORS as error:
        if patched is None:
            _check(op, arguments, error)
        if patched in (None, reference) or not isinstance(error, TypeError):
            raise
    assert patched is not None
    return patched(*given)  # each of torch's functions has other words for a wrong type


class Plan(NamedTuple):
    """How calls of one signature are carried out: why by torch's operator, or by which function."""

    reason: str | None
    run: Callable[[Arguments], Any] | None


MOST_PLANS = 4096
_plans: dict[Any, Plan] = {}
forget_plans = _plans.clear


def plan_of(op: Operator, arguments: Arguments, inplace: bool) -> Plan:
    """Returns the plan of a call of any size: the one of its signature, or else a new one.

    A plan holds no tensor and no value of a tensor. It stays until there are too many; nothing else
    makes it stale, as what decides is in the signature or fixed when pyfused is imported.
    """
    key = signature(op, arguments, inplace)
    plan = _plans.get(key)
    if plan is None:
        plan = _plan(op, arguments, inplace)
        if key is not None and not any(
            isinstance(arguments[i], Tensor) for i, _ in op.scalar_places
        ):
            if len(_plans) >= MOST_PLANS:
                _plans.clear()
            _plans[key] = plan
    return plan


def _plan(op: Operator, arguments: Arguments, inplace: bool) -> Plan:
    reason, input = reason_beside_size(op, arguments, inplace), arguments[0]
    if reason is not None:
        return Plan(reason, None)
    traced = is_dynamo_compiling() or (type(input) not in _PLAIN and is_traced(input))
    if traced and op.name not in FOLLOWED:
        operator = getattr(TORCH_OPS, op.name)
        return Plan(None, lambda arguments: operator(*arguments))
    return Plan(None, op.plan(arguments, inplace))


def signature(op: Operator, arguments: Arguments, inplace: bool) -> tuple[Any, ...] | None:
    """Returns what decides how a call is carried out, or None where that is decided for each call.

    These are the operator, the layout of each tensor and whether it requires grad, every other
    argument, grad mode and autocast.
    """
    if type(arguments[0]) not in _PLAIN or _active_mode() is not None:
        return None
    key: list[Any] = [op, inplace, torch.is_grad_enabled()]
    if isinstance(arguments[-1], Options):
        arguments = (*arguments[:-1], *vars(arguments[-1]).values())
    for value in arguments:
        kind = type(value)
        if kind is Tensor or kind is Parameter:
            if (
                value.layout is not torch.strided
                or value.is_neg()
                or value._is_zerotensor()
                or value.is_nested
                or is_functorch_wrapped_tensor(value)
                or is_lazy_clone(value)
            ):
                return None
            key += value.dtype, value.shape, value.stride(), value.device, value.requires_grad
        elif value is None or kind is str:
            key.append(value)
        elif kind is float:
            key.append(value or str(value))  # 0.0 is equal to -0.0
        elif kind in _KEYS:
            key += kind, value
        else:
            return None
    if torch._C._is_any_autocast_enabled():
        device = arguments[0].device.type
        key += torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return tuple(key)


def _check(op: Operator, arguments: Arguments, error: Exception) -> None:
    """Raises what is to be said of a call that torch's operator has refused, in other words."""
    tensors = [(arguments[0], op.operands[0]), *((arguments[i], o) for i, o in op.others)]
    given = [(o.name, t, o.indices) for t, o in tensors if isinstance(t, Tensor)]
    if not isinstance(error, NotImplementedError):  # that one is of a dtype, layout or device
        checks.devices(given, error)
        op.check(arguments)
    checks.floating(given, error)


def reason_for_torch(op: Operator, arguments: Arguments, inplace: bool = False) -> str | None:
    """Returns why torch's own operator takes a call, None where a fused kernel does.

    The kernels compute first derivatives, in reverse mode, of plain strided tensors on CPUs and
    GPUs.

    Raises:
        RuntimeError: ``PYFUSED_BACKEND`` names a backend that cannot take tensors of this device.
    """
    if not is_dynamo_compiling() and is_small(op, arguments):
        return SMALL
    return reason_beside_size(op, arguments, inplace)


def reason_beside_size(op: Operator, arguments: Arguments, inplace: bool) -> str | None:
    input = arguments[0]
    compiling = is_dynamo_compiling()
    if type(input) not in _PLAIN:
        compiling = is_traced(input)
        if not compiling and op.local_of(arguments) is None:
            return f"input is a {type(input).__name__}"
        if not compiling:
            return _active_mode()
    reason = _left_to_compiler(op, arguments) if compiling else _active_mode()
    reason = reason or unsupported(op.operands[0], input, input, compiling)
    for place, operand in op.others:
        tensor = arguments[place]
        if reason is None and not (tensor is None and operand.optional):
            reason = unsupported(operand, tensor, input, compiling)
    if reason is None and op.fallback_reason is not None:
        reason = op.fallback_reason(*arguments)
    if reason is None and inplace:
        reason = op.inplace_fallback_reason(input)
    return reason


def is_small(op: Operator, arguments: Arguments) -> bool:
    """Returns whether torch's operator takes a call for its size, whatever else is asked of it.

    A compiler does not ask, as its program would depend on the size.
    """
    input = arguments[0]
    if type(input) not in _PLAIN or input.is_nested:
        return False
    elements = input.numel()
    if type(elements) is not int:  # a tensor, to torch.jit.trace
        return False
    if op.broadcast:
        other = arguments[op.broadcast[0]]
        if type(other) not in _PLAIN or other.is_nested or other.shape != input.shape:
            elements = op.elements(arguments)
    elif op.counts_logits:
        elements = op.elements(arguments)
    return sizes.torch_is_faster(op, arguments, elements)


def is_traced(tensor: Tensor) -> bool:
    """Returns whether the compiler calls code that it does not trace, with a fake tensor.

    So it does with functions that it knows as torch's, which is how it came to know those that
    pyfused.patch had put there.
    """
    stands_in = type(tensor).__name__ in ("FakeTensor", "FunctionalTensor")
    return stands_in and compiler_traces()


def is_compiled(tensor: Tensor) -> bool:
    """Returns whether the call goes into a compiled program, in either of the compiler's ways."""
    return is_dynamo_compiling() or is_traced(tensor)


def compiler_traces() -> bool:
    """Returns whether this thread compiles, which torch 2.12 tells only within Dynamo."""
    return is_dynamo_compiling() or TracingContext.try_get() is not None


def _warn_of_logits(op: Operator, arguments: Arguments, reason: str) -> None:
    """Warns once where torch's operators make so many logits that the kernels need less than half.

    The kernels' logits take a quarter of that, or 16 MiB.
    """
    input, weight = arguments[:2]
    if is_dynamo_compiling() or not (isinstance(input, Tensor) and isinstance(weight, Tensor)):
        return
    megabytes = math.prod((*input.shape[:-1], *weight.shape[:-1])) * input.element_size() >> 20
    if megabytes >= 32 and reasons.first_time(op.name, f"logits: {reason}"):
        message = f"pyfused: {op.name}: torch's operators take {megabytes} MiB for the logits, as "
        if reason.endswith(" requires grad"):
            reason += ". Detach it if it needs no gradient"
        warnings.warn(message + reason, RuntimeWarning, stacklevel=4)


def _warn_once(op: str, error: Exception) -> None:
    if reasons.first_time(op, type(error).__name__):
        message = f"pyfused: {op}: the result is torch's, as pyfused has raised {error!r}"
        warnings.warn(message, RuntimeWarning, stacklevel=4)


def _left_to_compiler(op: Operator, arguments: Arguments) -> str | None:
    """Returns why a compiled call is torch's function, None where it is a custom operator."""
    if torch.compiler.is_exporting():
        return "torch.export: a program of torch's operators runs without pyfused"
    input = arguments[0]
    limits = sizes.COMPILED.get(op.name)
    limit = sizes.NEVER if limits is None else limits[takes_triton(input)]
    if limit == sizes.NEVER:
        return FUSED
    # Imported by the compiler in any case, and slow to import.
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    # Of sizes that change, each side of the limit has its program. An unknown size is large.
    if limit and guard_or_false(input.numel() < limit):
        return "torch.compile: Inductor is faster at this size"
    if torch._C._are_functorch_transforms_active():
        return "torch.func"
    return None if op.name in FOLLOWED else _without_operator(op, arguments)


def _without_operator(op: Operator, arguments: Arguments) -> str | None:
    """Returns why a large loss takes no custom operator, which are made for common calls."""
    input, given = arguments[0], dict(zip(op.arguments, arguments, strict=True))
    warning = getattr(op, "warning", None)
    if op.is_forward_alone(arguments):
        return "torch.compile: Inductor is as fast without a gradient"
    if given.get("reduction") == "none" or given.get("reduce") is not None:
        return "torch.compile: Inductor fuses what follows an unreduced loss"
    if warning is not None and warning(arguments):
        return "torch.compile: a warning"
    if torch.is_autocast_enabled(input.device.type):
        return "torch.compile: autocast"
    for place, scalar in op.scalar_places:
        if isinstance(arguments[place], Tensor):
            return f"torch.compile: {scalar.name} is a tensor"
    for place, operand in op.others:
        tensor = arguments[place]
        if tensor is None or operand.indices:
            continue
        if not isinstance(tensor, Tensor):
            return f"torch.compile: {operand.name} is no tensor"
        if tensor.dtype is not input.dtype:
            return f"torch.compile: {operand.name} differs in dtype"
        if not operand.optional and tensor.shape != input.shape:
            return f"torch.compile: {operand.name} differs in shape"
    return None


def _active_mode() -> str | None:
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace"
    if torch._C._are_functorch_transforms_active():
        return "torch.func"
    if forward_ad._current_level >= 0:
        return "forward-mode AD"
    if torch._C._len_torch_dispatch_stack() or (
        torch._C._len_torch_function_stack() and _function_mode()
    ):
        return "a torch dispatch or function mode"
    return None


def _function_mode() -> bool:
    """Returns whether another function mode is active than that of a default device."""
    active = range(torch._C._len_torch_function_stack())
    return any(type(torch._C._get_function_stack_at(i)) is not DeviceContext for i in active)


def unsupported(operand: Operand, tensor: Any, input: Tensor, compiling: bool) -> str | None:
    """Returns why the kernels for the input's device do not take a tensor, None where they do."""
    name, plain = operand.name, type(tensor) in _PLAIN
    if not plain and not is_traced(tensor):
        number = operand.number and type(tensor) is float
        return None if number else f"{name} is a {type(tensor).__name__}"
    if reason := unsupported_device(name, tensor, input):
        return reason
    if tensor.layout is not torch.strided:
        return f"{name} has layout {tensor.layout}"
    if tensor.dtype not in DTYPES and not (operand.indices and tensor.dtype in _INDEX_DTYPES):
        return f"{name} has dtype {tensor.dtype}"
    # The dispatcher makes a lazy tensor whole on the way to a compiler's custom operator.
    if plain and not compiling:
        if tensor.is_neg() or tensor._is_zerotensor():
            return f"{name} is lazy"
        if tensor.is_nested:
            return f"{name} is nested"
        if is_functorch_wrapped_tensor(tensor):
            return f"{name} has left torch.func"
        if is_lazy_clone(tensor):  # whose address cannot be had without the copy
            return f"{name} is a lazy clone"
    if not operand.differentiated and tensor.requires_grad:
        return f"{name} requires grad"
    return SMALL if tensor is not input and tensor.numel() == 0 else None  # it broadcasts
