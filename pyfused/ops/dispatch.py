"""Whether a call takes a fused kernel or torch's own operator, and why.

With ``PYFUSED_BACKEND`` set the kernels take tensors of any size.
"""

from __future__ import annotations

import logging
import math
import sys
import warnings
from collections.abc import Callable
from functools import cache
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
from pyfused.backends import DTYPES, FORCED, takes_triton, unsupported_device
from pyfused.ops.declaration import Arguments, Operand, Operator
from pyfused.ops.sizes import ATEN_BELOW
from pyfused.types import Options

# What a compiler follows into, to the custom operators that are called there.
OF_LOGITS = ("cross_entropy", "log_probs", "kl_div_with_logits")
LINEAR = (  # their logits are of another size
    *("linear_cross_entropy", "linear_log_probs", "linear_kl_div", "linear_topk_kl_div"),
)
COMPOSED = ("rmse_loss", "multilabel_soft_margin_loss")
FOLLOWED = (*OF_LOGITS, *LINEAR, *COMPOSED)

# The table of sizes.py for GPUs, float32 with backward: up to so many classes, elements below which
# ATen is faster. Measured on an H100 behind a slow processor, where torch launches a step of
# mse_loss in 150 us and pyfused in 400: a kernel pays where ATen's kernels take longer than that.
# ATen's activations reach the memory's bandwidth, so that none is faster. Its loss of class indices
# takes 1.6 us a thousand rows, whatever the number of classes.
Bands = tuple[tuple[float, int], ...]  # (length of rows up to, elements below)
NEVER = sys.maxsize
_ANY = math.inf
ATEN_BELOW_ON_GPU: dict[str, Bands] = {
    **dict.fromkeys(("relu", "leaky_relu", "sigmoid", "tanh", "silu", "gelu"), ((_ANY, NEVER),)),
    **dict.fromkeys(("mse_loss", "smooth_l1_loss", "huber_loss"), ((_ANY, 1 << 26),)),
    "l1_loss": ((_ANY, 1 << 25),),
    "cross_entropy": ((64, 1 << 21), (_ANY, 1 << 26)),
    "nll_loss": ((64, 1 << 21), (_ANY, 1 << 27)),
    "softmax": ((_ANY, 1 << 25),),
    "log_softmax": ((_ANY, 1 << 25),),
    "gaussian_nll_loss": ((_ANY, 1 << 22),),
    "sigmoid_focal_loss": ((_ANY, 1 << 14),),
    **dict.fromkeys((*LINEAR, "log_probs"), ((_ANY, 0),)),
}
_ON_GPU_ELSE: Bands = ((_ANY, 1 << 24),)

_NO_ROWS: dict[torch.dtype, Any] = {}


def operator_of(key: str) -> str:
    """Of a key of the table."""
    return key.removesuffix("_forward").removesuffix("_none").removesuffix("_kdim")


# Most calls with small tensors need not look further: elements below which ATen is faster at
# whatever is done with them, by operator and dtype; for the forward pass alone, and with gradients.
_ALWAYS_BELOW: dict[str, dict[torch.dtype, list[int]]] = {}
for _key, _rows in ({} if FORCED else ATEN_BELOW).items():
    _gradient = not _key.endswith("_forward")
    for _dtype, _bands in _rows.items():
        _least = _ALWAYS_BELOW.setdefault(operator_of(_key), {}).setdefault(_dtype, [NEVER] * 2)
        _least[_gradient] = min(_least[_gradient], *[elements for _, elements in _bands])

# Elements below which a compiled call is left to Inductor: a custom operator costs some 30 us a
# pass, and cross_entropy of (64, 1000) makes 0.83 times the speed. Most kernels are as fast as
# Inductor's code until this has to take new memory for its outputs, page by page, which glibc
# maps from 32 MiB on. They are faster earlier than that with exponentials, and where Inductor's
# loop over the backward is not vectorised. Measured by `benchmarks/run.py compiled`, forward +
# backward, 2 threads, x86-64-v4.
_NEW_MEMORY = 1 << 24
COMPILED_BELOW = {
    **dict.fromkeys(OF_LOGITS, 1 << 18),
    **dict.fromkeys((*LINEAR, *COMPOSED), 0),  # of what is composed, each part decides
    **dict.fromkeys(("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"), _NEW_MEMORY),
    **dict.fromkeys(("kl_div", "poisson_nll_loss", "binary_cross_entropy"), _NEW_MEMORY),
    **dict.fromkeys(("sigmoid", "silu", "gelu", "softmax", "log_softmax"), _NEW_MEMORY),
    "nll_loss": _NEW_MEMORY,
    **dict.fromkeys(("binary_cross_entropy_with_logits", "sigmoid_focal_loss"), 1 << 20),
    **dict.fromkeys(("soft_margin_loss", "log_cosh_loss", "gaussian_nll_loss"), 1 << 20),
    **dict.fromkeys(("tanh", "softcap"), 1 << 20),
    **dict.fromkeys(("hinge_loss", "hinge_embedding_loss", "multi_margin_loss"), 1 << 16),
    **dict.fromkeys(("margin_ranking_loss", "quantile_loss", "relu", "leaky_relu"), 1 << 16),
}
# The same of a graph without backward, where that is more: a loss without exponentials takes as
# long as reading its operands does.
COMPILED_FORWARD_BELOW = {
    **dict.fromkeys(("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"), NEVER),
    **dict.fromkeys(("kl_div", "poisson_nll_loss", "binary_cross_entropy", "nll_loss"), NEVER),
    **dict.fromkeys(("hinge_loss", "hinge_embedding_loss", "multi_margin_loss"), NEVER),
    **dict.fromkeys(("margin_ranking_loss", "quantile_loss"), NEVER),
    **dict.fromkeys(("relu", "leaky_relu"), _NEW_MEMORY),
}

SMALL = "ATen is faster at this size"
FUSED = "torch.compile: Inductor fuses it with its neighbours"
_PLAIN = (Tensor, Parameter)
_ERRORS = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)
_KEYS = (bool, int, torch.dtype)  # of arguments that are part of a signature as they are
_INDEX_DTYPES = (torch.int64, torch.uint8)
_log = logging.getLogger("pyfused")
_said: set[tuple[str, str]] = set()


def call(
    op: Operator,
    arguments: Arguments,
    inplace: bool = False,
    patched: Callable[..., Tensor] | None = None,
    given: Arguments = (),
) -> Tensor:
    """An operator's result, from a fused kernel or from torch's own operator.

    Args:
        arguments: All that torch's function takes but for ``inplace``.
        inplace: The result takes the input's memory; with a loss, the input's gradient does.
        patched, given: torch's function that was called where :func:`pyfused.patch` replaces it,
            and its arguments: it raises the errors, once.
    """
    input, ours = arguments[0], None
    try:
        reason, run = _SMALL if is_small(op, arguments) else plan_of(op, arguments, inplace)
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
    if reason is not SMALL:
        say_once(op.name, str(reason))
        if op.name in LINEAR:
            _warn_of_logits(op, arguments, str(reason))
        if patched is not None and not isinstance(input, Tensor):
            return patched(*given)
        if has_torch_function(arguments):
            reference = op.reference_ if inplace else op.reference
    try:
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


_SMALL = Plan(SMALL, None)
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
    reason, input = _reason_beside_size(op, arguments, inplace), arguments[0]
    if reason is not None:
        return Plan(reason, None)
    traced = is_dynamo_compiling() or (type(input) not in _PLAIN and is_traced(input))
    if traced and op.name not in FOLLOWED:
        operator = getattr(torch.ops.pyfused, op.name)
        return Plan(None, lambda arguments: operator(*arguments))
    return Plan(None, op.plan(arguments, inplace))


def signature(op: Operator, arguments: Arguments, inplace: bool) -> tuple[Any, ...] | None:
    """Returns what decides how a call is carried out, or None where that is decided for each call.

    These are the operator, the layout of each tensor and whether it requires grad, every other
    argument, grad mode and autocast.
    """
    if is_dynamo_compiling() or type(arguments[0]) not in _PLAIN or _active_mode() is not None:
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
    """Why torch's own operator takes a call, None where a fused kernel does.

    The kernels compute first derivatives, in reverse mode, of plain strided tensors on CPUs and
    GPUs.

    Raises:
        RuntimeError: ``PYFUSED_BACKEND`` names a backend that cannot take tensors of this device.
    """
    return SMALL if is_small(op, arguments) else _reason_beside_size(op, arguments, inplace)


def _reason_beside_size(op: Operator, arguments: Arguments, inplace: bool) -> str | None:
    input = arguments[0]
    compiling = is_dynamo_compiling()  # first: comparing sizes would make a graph depend on them
    if type(input) not in _PLAIN:
        compiling = is_traced(input)
        if not compiling:
            return op.subclass_fallback_reason(arguments) or _active_mode()
    reason = _left_to_compiler(op, arguments, inplace) if compiling else _active_mode()
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
    """Whether torch's operator takes a call for its size, whatever else is asked of it."""
    input = arguments[0]
    if is_dynamo_compiling() or type(input) not in _PLAIN:
        return False
    elements = input.numel()
    if type(elements) is not int:  # a tensor, to torch.jit.trace
        return False
    if op.broadcast and not input.is_nested:
        other = arguments[op.broadcast[0]]
        if type(other) not in _PLAIN or other.is_nested or other.shape != input.shape:
            elements = op.elements(arguments)
    least = _ALWAYS_BELOW.get(op.name, _NO_ROWS).get(input.dtype, (0, 0))[input.requires_grad]
    return elements < least or aten_is_faster(op, arguments, elements)


def is_traced(tensor: Tensor) -> bool:
    """Whether the compiler calls, with its own stand-in for a plain tensor, what it does not read.

    So it does with functions that it knows as torch's, which is how it came to know those that
    pyfused.patch had put there.
    """
    stands_in = type(tensor).__name__ in ("FakeTensor", "FunctionalTensor")
    return stands_in and compiler_traces()


def is_compiled(tensor: Tensor) -> bool:
    """Whether the call goes into a compiled program, in either of the compiler's ways."""
    return is_dynamo_compiling() or is_traced(tensor)


def compiler_traces() -> bool:
    """Whether this thread compiles; torch 2.12's ``is_compiling`` says so only within Dynamo."""
    return is_dynamo_compiling() or TracingContext.try_get() is not None


def say_once(op: str, reason: str) -> None:
    """Tells the logger, at level INFO, why an operator falls back to torch's."""
    if not is_dynamo_compiling() and _log.isEnabledFor(logging.INFO) and (op, reason) not in _said:
        _said.add((op, reason))
        _log.info("%s: torch: %s", op, reason)


def _warn_of_logits(op: Operator, arguments: Arguments, reason: str) -> None:
    """Warns once where torch's operators make so many logits that the kernels need less than half.

    The kernels' logits take a quarter of that, or 16 MiB.
    """
    input, weight = arguments[:2]
    if is_dynamo_compiling() or not (isinstance(input, Tensor) and isinstance(weight, Tensor)):
        return
    megabytes = math.prod((*input.shape[:-1], *weight.shape[:-1])) * input.element_size() >> 20
    if megabytes >= 32 and (op.name, f"logits: {reason}") not in _said:
        _said.add((op.name, f"logits: {reason}"))
        message = f"pyfused: {op.name}: torch's operators take {megabytes} MiB for the logits, as "
        if reason.endswith(" requires grad"):
            reason += ". Detach it if it needs no gradient"
        warnings.warn(message + reason, RuntimeWarning, stacklevel=4)


def _warn_once(op: str, error: Exception) -> None:
    if (op, type(error).__name__) not in _said:
        _said.add((op, type(error).__name__))
        message = f"pyfused: {op}: the result is torch's, as pyfused has raised {error!r}"
        warnings.warn(message, RuntimeWarning, stacklevel=4)


def aten_is_faster(op: Operator, arguments: Arguments, elements: int) -> bool:
    """Whether a table gives a call of this size to ATen; one without elements always is."""
    if elements == 0 or FORCED is not None:
        return elements == 0
    input: Tensor = arguments[0]
    key, length = op.size_key(arguments)
    if input.is_cpu:
        gradient = input.requires_grad and torch.is_grad_enabled()
        table = bands(op, key, gradient, input.dtype)
    else:
        table = ATEN_BELOW_ON_GPU.get(op.name, _ON_GPU_ELSE)
    for most, least in table:
        if length <= most:
            return elements < least
    return False


@cache
def bands(op: Operator, key: str, gradient: bool, dtype: torch.dtype) -> Bands:
    """The table's row for a kind of call, or of the nearest kind that was measured."""
    for suffix in ("",) if gradient else ("_forward", ""):
        for kind in (key, op.name, type(op).__name__):
            rows: Bands | None = ATEN_BELOW.get(kind + suffix, _NO_ROWS).get(dtype)
            if rows:
                return rows
    return ()


def _left_to_compiler(op: Operator, arguments: Arguments, inplace: bool) -> str | None:
    input = arguments[0]
    if torch.compiler.is_exporting():
        return "torch.export: a program of torch's operators runs without pyfused"
    if takes_triton(input):
        return "torch.compile: Inductor writes Triton kernels, too"
    if op.name not in COMPILED_BELOW:
        return FUSED
    # Imported by the compiler in any case, and slow to import.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    if statically_known_true(input.numel() < COMPILED_BELOW[op.name]):
        return "torch.compile: Inductor is faster at this size"
    if torch._C._are_functorch_transforms_active():
        return "torch.func"
    return None if op.name in FOLLOWED else _without_operator(op, arguments, inplace)


def _without_operator(op: Operator, arguments: Arguments, inplace: bool) -> str | None:
    """Why a compiled call takes no custom operator; these are for the calls that most are."""
    from pyfused.ops import inductor

    input, named = arguments[0], dict(zip(op.arguments, arguments, strict=True))
    warning = getattr(op, "warning", None)
    if inductor.unavailable:
        return "torch.compile: Inductor cannot replace operators"
    if inplace:
        return "torch.compile: inplace"
    if named.get("reduction") == "none" or named.get("reduce") is not None:
        return "torch.compile: Inductor fuses what follows an unreduced loss"
    if warning is not None and warning(arguments):
        return "torch.compile: a warning"
    if "reduction" in named and torch.is_autocast_enabled(input.device.type):
        return "torch.compile: autocast"
    if named.get("dtype") not in (None, input.dtype):
        return "torch.compile: dtype"
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
    """Whether a function mode is active, other than the one of ``torch.set_default_device``."""
    active = range(torch._C._len_torch_function_stack())
    return any(type(torch._C._get_function_stack_at(i)) is not DeviceContext for i in active)


def unsupported(operand: Operand, tensor: Any, input: Tensor, compiling: bool) -> str | None:
    """Why the kernels for the input's device do not take a tensor, None where they do."""
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
