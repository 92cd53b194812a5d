"""Whether a call takes a fused kernel or torch's own operator, and why.

With ``PYFUSED_BACKEND`` set the kernels take tensors of any size.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import Parameter
from torch.overrides import has_torch_function

from pyfused import checks
from pyfused.backends import DTYPES, takes_triton, unsupported_device
from pyfused.dispatch import reasons, sizes
from pyfused.dispatch.operator import Arguments, Operand, Operator
from pyfused.dispatch.originals import TorchAlone, torch_alone
from pyfused.dispatch.reasons import FUSED, SMALL, say_once
from pyfused.torch_internals import (
    _checkpoints,
    active_mode,
    any_autocast,
    functorch_is_active,
    is_functorch_wrapped,
    is_lazy_clone,
    is_view,
    is_zero_tensor,
    left_in_checkpoint,
    traces_compiler,
)
from pyfused.types import TENSORS, Options, TensorSpec

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
            reason, run = _compiled_plan(op, arguments, inplace)
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
        # A checkpoint ends its recomputation by an exception.
        if patched is None or type(error).__module__ == "torch.utils.checkpoint":
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
        if not hasattr(type(input), "_node"):  # of deferred logits, whose loss is fused after all
            say_once(op.name, str(reason))
        if op.name in sizes.LINEAR:
            _warn_of_logits(op, arguments, str(reason))
        if patched is not None and not isinstance(input, Tensor):
            return patched(*given)
        if has_torch_function(arguments):
            reference = op.reference_ if inplace else op.reference
            shown = True
    try:
        alone = shown or not TorchAlone.needed or (reason is SMALL and op.definition is None)
        if alone or is_dynamo_compiling():
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

    A plan is made from the signature and from nothing else, so it never depends on something that
    the key lacks. It stays until there are too many.
    """
    key = signature(op, arguments, inplace)
    if key is None:
        return _plan_without_key(op, arguments, inplace)
    if _checkpoints and left_in_checkpoint():
        return Plan("a torch dispatch or function mode in the checkpoint's forward pass", None)
    plan = _plans.get(key)
    if plan is None:
        plan = _new_plan(op, described(arguments, key), inplace)
        if len(_plans) >= MOST_PLANS:
            _plans.clear()
        _plans[key] = plan
    return plan


def _new_plan(op: Operator, specs: Arguments, inplace: bool) -> Plan:
    tensors = _numbers_in_tensors(op, specs)
    if tensors and all(map(_is_readable, tensors.values())):
        return Plan(None, lambda given: call(op, _with_python_numbers(op, given), inplace))
    reason = _reason(op, specs, inplace, compiling=False)
    return Plan(reason, None if reason else op.plan(specs, inplace))


def _numbers_in_tensors(op: Operator, arguments: Arguments) -> dict[str, Any]:
    pairs = named(op, arguments).items()
    return {k: x for k, x in pairs if isinstance(x, TENSORS) and k not in _tensors_of(op)}


def _is_readable(number: Any) -> bool:
    return number.is_cpu and not number.requires_grad and bool(number.numel() == 1)


def _plan_without_key(op: Operator, arguments: Arguments, inplace: bool) -> Plan:
    """Returns the plan of a call with numbers of another library, or of what torch computes."""
    if is_traced(arguments[0]):
        return _compiled_plan(op, arguments, inplace)
    reason = _reason_for_no_plan(op, arguments)
    if reason is not None:
        return Plan(reason, None)
    if op.local_of(arguments) is not None:
        return Plan(None, op.of_dtensors)  # type: ignore[attr-defined]
    numbers = _with_python_numbers(op, arguments)
    if signature(op, numbers, inplace) is None:
        return Plan(_unknown_kind(op, numbers), None)
    return Plan(None, lambda _: call(op, numbers, inplace))


def _compiled_plan(op: Operator, arguments: Arguments, inplace: bool) -> Plan:
    """Returns how a call goes into a program that is being compiled."""
    reason = reason_beside_size(op, arguments, inplace)
    return Plan(reason, None if reason else op.compiled)


def signature(op: Operator, arguments: Arguments, inplace: bool) -> tuple[Any, ...] | None:
    """Returns the key of a call's plan, or None where the arguments have no plan as they are.

    It holds the operator, the layout of each tensor and whether it requires grad, every other
    argument, grad mode and autocast.
    """
    if type(arguments[0]) not in _PLAIN or active_mode() is not None:
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
        elif kind in _KEYS:
            key.append((kind, value))
        else:
            return None
    if inplace:
        input = arguments[0]
        key.append(input.is_leaf or is_view(input))
    if any_autocast():
        device = arguments[0].device.type
        key += torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return tuple(key)


def described(arguments: Arguments, key: Sequence[Any]) -> Arguments:
    """Returns the arguments with what the key of a call holds of each tensor in place of it."""
    entries = iter(key[3:])

    def spec(value: Any) -> Any:
        entry = next(entries)
        return TensorSpec(*entry) if isinstance(value, Tensor) else value

    specs = [spec(value) for value in arguments if not isinstance(value, Options)]
    if isinstance(arguments[-1], Options):
        specs.append(options := copy(arguments[-1]))
        vars(options).update({name: spec(value) for name, value in vars(options).items()})
    if key[1]:  # in place
        specs[0] = replace(specs[0], is_leaf_or_view=next(entries))
    return tuple(specs)


def _reason_for_no_plan(op: Operator, arguments: Arguments) -> str | None:
    """Returns which mode or tensor keeps a call from a plan."""
    input, local = arguments[0], None
    if type(input) not in _PLAIN:
        local = op.local_of(arguments)
        if local is None:
            return f"input is a {type(input).__name__}"
    reason = active_mode()
    if reason or local is not None:
        return reason
    for name, tensor in named(op, arguments).items():
        if isinstance(tensor, Tensor) and (reason := _unplannable(name, tensor)):
            return reason
    return None


def _unplannable(name: str, tensor: Tensor) -> str | None:
    """Returns why a tensor is not described by its layout."""
    if type(tensor) not in _PLAIN:
        return f"{name} is a {type(tensor).__name__}"
    if tensor.layout is not torch.strided:
        return f"{name} has layout {tensor.layout}"
    if tensor.is_neg() or is_zero_tensor(tensor):
        return f"{name} is lazy"
    if tensor.is_nested:
        return f"{name} is nested"
    if is_functorch_wrapped(tensor):
        return f"{name} has left torch.func"
    if is_lazy_clone(tensor):  # whose address cannot be had without the copy
        return f"{name} is a lazy clone"
    return None


def named(op: Operator, arguments: Arguments) -> dict[str, Any]:
    """Returns the arguments by name, options among them."""
    given = dict(zip(op.arguments, arguments, strict=True))
    for options in [value for value in arguments if isinstance(value, Options)]:
        given |= vars(options)
    return given


def _tensors_of(op: Operator) -> tuple[str, ...]:
    """Returns the names of arguments and options that may be tensors; others are numbers."""
    return *[operand.name for operand in op.operands], "token_weight", "denominator"


def _with_python_numbers(op: Operator, arguments: Arguments) -> Arguments:
    """Returns the arguments with Python's numbers in place of NumPy's and of 0-d tensors.

    A tensor that requires grad, or whose value only a GPU knows, stays one. Options of torch's own
    function are left out.
    """
    tensors, operands = _tensors_of(op), [operand.name for operand in op.operands]
    flags = [scalar.name for scalar in op.scalars if scalar.flag]

    def number(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            plain = name not in tensors and type(value) in _PLAIN
            return value.item() if plain and _is_readable(value) else value
        if name in flags:
            return bool(value)
        if name == "torch_options":
            return None
        if isinstance(value, bool) or name in operands:
            return value
        if isinstance(value, Integral):
            return int(value)
        return float(value) if isinstance(value, Real) else value

    numbers = [number(*pair) for pair in zip(op.arguments, arguments, strict=True)]
    if isinstance(options := numbers[-1], Options):
        numbers[-1] = options = copy(options)
        vars(options).update({name: number(name, value) for name, value in vars(options).items()})
    return tuple(numbers)


def _unknown_kind(op: Operator, arguments: Arguments) -> str:
    """Returns which argument has no place in a signature."""
    for name, value in named(op, arguments).items():
        if isinstance(value, Tensor) and name not in _tensors_of(op):
            return f"{name} is a tensor"
        if not (value is None or isinstance(value, (Tensor, Options, str, float, *_KEYS))):
            return f"{name} is a {type(value).__name__}"
    return "an argument has no plan"


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
    if is_compiled(arguments[0]):
        reason = _left_to_compiler(op, arguments)
        return reason or _reason(op, arguments, inplace, compiling=True)
    numbers = _with_python_numbers(op, arguments)
    key = signature(op, numbers, inplace)
    if key is None:
        return _plan_without_key(op, numbers, inplace).reason
    return _reason(op, described(numbers, key), inplace, compiling=False)


def _reason(op: Operator, arguments: Arguments, inplace: bool, compiling: bool) -> str | None:
    """Returns why torch's operator takes a call of plain tensors, whatever its size.

    Args:
        arguments: Tensors in a program that is being compiled; otherwise what a plan may know.
    """
    input = arguments[0]
    for name in _numbers_in_tensors(op, arguments) if not compiling else ():
        return f"{name} is a tensor"
    reason = _unsupported(op.operands[0], input, input)
    for place, operand in op.others:
        tensor = arguments[place]
        if reason is None and not (tensor is None and operand.optional):
            if compiling and type(tensor) not in _PLAIN and not is_traced(tensor):
                reason = f"{operand.name} is a {type(tensor).__name__}"
            reason = reason or _unsupported(operand, tensor, input)
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
    """Returns whether this thread compiles."""
    return is_dynamo_compiling() or traces_compiler()


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
    if functorch_is_active():
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


def unsupported(operand: Operand, tensor: Any, input: Any) -> str | None:
    """Returns why the kernels for the input's device do not take a tensor, None where they do."""
    if isinstance(tensor, TensorSpec) or is_compiled(tensor):
        return _unsupported(operand, tensor, input)
    return _unplannable(operand.name, tensor) or _unsupported(operand, tensor, input)


def _unsupported(operand: Operand, tensor: Any, input: Any) -> str | None:
    """Returns why the kernels do not take a tensor of such a layout, None where they do."""
    name = operand.name
    if not isinstance(tensor, TENSORS):
        number = operand.number and type(tensor) is float
        return None if number else f"{name} is a {type(tensor).__name__}"
    if reason := unsupported_device(name, tensor, input):
        return reason
    if tensor.dtype not in DTYPES and not (operand.indices and tensor.dtype in _INDEX_DTYPES):
        return f"{name} has dtype {tensor.dtype}"
    if not operand.differentiated and tensor.requires_grad:
        return f"{name} requires grad"
    return SMALL if tensor is not input and tensor.numel() == 0 else None  # it broadcasts
