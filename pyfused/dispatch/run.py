"""Runs a call by a fused kernel, or by torch's operator with a reason.

If ``PYFUSED_BACKEND`` is set, kernels run for tensors of any size.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from numbers import Real
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from pyfused import checks
from pyfused.backends import DTYPES, takes_triton, unsupported_device
from pyfused.dispatch import reasons, report, sizes
from pyfused.dispatch.operator import Operand, Operator, Options, Tensors, requires_grad
from pyfused.dispatch.reasons import FUSED, SMALL
from pyfused.dispatch.signature import PLAIN, layout_reason, signature, with_specs
from pyfused.dispatch.sizes import is_small
from pyfused.torch_internals import (
    _checkpoints,
    fell_back_in_checkpoint,
    functorch_is_active,
    is_exporting,
    never_traced,
)
from pyfused.types import TENSORS, Number, TensorSpec, UnknownSizeError, VocabShard

_INDEX_DTYPES = (torch.int64, torch.uint8)
_CONVERTED_DTYPES = (*_INDEX_DTYPES, torch.bool, torch.int8, torch.int16, torch.int32)


def run(op: Any, tensors: Tensors, options: Options, shard: VocabShard | None = None) -> Tensor:
    """Returns an operator's result, from a fused kernel or from torch's operator.

    Args:
        shard: The classes of this process, if a process group shards them.
    """
    if shard is not None:
        return _run_on_shard(op, tensors, options, shard)  # type: ignore[no-any-return]
    if is_dynamo_compiling():
        return _run_compiled(op, tensors, options)  # type: ignore[no-any-return]
    reason, kernel, launched = decide(op, tensors, options)
    if report.active:
        kernel = report.counted(op, tensors, reason, kernel)
    if kernel is not None:
        return kernel(tensors, launched)  # type: ignore[no-any-return]
    if reason is not SMALL:
        report_fallback(op, tensors, str(reason))
    return op.by_torch(tensors, options)  # type: ignore[no-any-return]


@never_traced
def _run_on_shard(op: Any, tensors: Tensors, options: Options, shard: VocabShard) -> Any:
    """Returns the result of a call with this process' classes, in compiled programs, too.

    Raises:
        RuntimeError: Transforms of torch.func or forward-mode AD are active.
    """
    tensors, local = op.checked_on_shard(tensors, options, shard)
    reason, kernel, launched = decide(op, tensors, options, local)
    if report.active:
        kernel = report.counted(op, tensors, reason, kernel)
    if kernel is not None:
        return kernel(tensors, launched)
    if reason in ("torch.func", "forward-mode AD"):  # collectives have no derivatives for them
        raise RuntimeError(f"{op.name}: expected no {reason} with a shard, got a call in it")
    reasons.log_once(op.name, str(reason))
    return op.torch_on_shard(tensors, options, local)


def _run_compiled(op: Any, tensors: Tensors, options: Options) -> Any:
    """Returns the result of a call that Dynamo traces: torch's, or a head's custom operator."""
    if _compiler_reason(op, tensors, options) is not None:
        report.add_traced(op.name)
        return op.by_torch(tensors, options)
    return op.compiled(tensors, options)


# ---- decisions -----------------------------------------------------------------------------------


# The reason why torch executes the call, or None; the function that executes it, given tensors and
# options, or None; and the options that this function takes.
Decision = tuple[str | None, Callable[[Tensors, Options], Any] | None, Options]


MOST_PLANS = 4096  # per operator
_planned = WeakSet[Operator]()  # the operators that have plans


def forget_plans() -> None:
    for op in _planned:
        op.plans.clear()


def keep_plan(op: Operator, key: Any, plan: Any) -> None:
    """Caches a plan on its operator; a full cache drops its older half."""
    plans = op.plans
    if len(plans) >= MOST_PLANS:
        for old in [*plans][: MOST_PLANS // 2]:
            plans.pop(old, None)
    plans[key] = plan
    _planned.add(op)


def decide(
    op: Any, tensors: Tensors, options: Options, shard: Any = None, by_size: bool = False
) -> Decision:
    """Decides whether a kernel runs a call; decisions are cached by signature.

    Args:
        shard: The classes of this process, for a call that has been checked. All processes have to
            decide alike, so neither sizes nor layouts decide.
        by_size: As in `signature`.
    """
    if shard is None and is_small(op, tensors, options):
        return SMALL, None, options
    signed = signature(op, tensors, options, by_size)
    if isinstance(signed, str):
        return signed, None, options
    if _checkpoints and fell_back_in_checkpoint():
        return "a torch dispatch or function mode in the checkpoint's forward pass", None, options
    key, options = signed
    if shard is not None:
        key = *key, shard
    decision = op.plans.get(key)
    if decision is None:
        decision = _planned_decision(op, key, shard, by_size)
        keep_plan(op, key, decision)
    if decision is _BY_SIZE:
        return decide(op, tensors, options, shard, by_size=True)
    reason, kernel = decision
    return reason, kernel, options


_BY_SIZE: Any = object()  # the decision depends on sizes that the key does not have


def _planned_decision(op: Any, key: Any, shard: Any, by_size: bool) -> Any:
    """Returns the reason and the plan for a key, _BY_SIZE if sizes are invalid or coincide."""
    planned = with_specs(op, key)
    try:
        if shard is not None:
            return None, op.plan(*planned, shard)
        if reason := _planned_reason(op, *planned):
            return reason, None
        if reason := _invalid(op, *planned):
            return (reason, None) if by_size else _BY_SIZE
        return None, op.plan(*planned)
    except (UnknownSizeError, *checks.ERRORS):
        if by_size:
            raise
        return _BY_SIZE


# ---- reasons to fall back ------------------------------------------------------------------------


def fallback_reason(op: Operator, tensors: Tensors, options: Options) -> str | None:
    """Returns why torch's operator computes a call, None if a kernel does."""
    if is_dynamo_compiling():
        return _compiler_reason(op, tensors, options)
    return decide(op, tensors, options)[0]


def _planned_reason(op: Operator, tensors: Tensors, options: Options) -> str | None:
    """Returns the reason for a plan, from specs of tensors or from a compiler's tensors."""
    input = tensors[0]
    for operand, tensor in zip(op.all_operands, tensors, strict=True):
        if tensor is None and operand.optional:
            continue
        if reason := unsupported(operand, tensor, input):
            return reason
    return None if op.fallback_reason is None else op.fallback_reason(*tensors, options)


def _invalid(op: Operator, tensors: Tensors, options: Options) -> str | None:
    """Returns why no kernel takes the layouts and the options of a call: they may be invalid."""
    try:
        op.check(tensors, options)
    except checks.ERRORS as error:
        return str(error)
    return None


def unsupported(operand: Operand, tensor: Any, input: Any) -> str | None:
    """Returns why the kernels for the input's device do not support a tensor, or None."""
    name = operand.name
    if not isinstance(tensor, TENSORS):
        is_number = operand.number and isinstance(tensor, (Number, Real))
        return None if is_number else f"{name} is a {type(tensor).__name__}"
    is_traced = is_dynamo_compiling() and type(tensor) in PLAIN
    has_spec = is_traced or isinstance(tensor, TensorSpec)
    if not has_spec and (reason := layout_reason(name, tensor)):
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
    if statically_known_true(_head_elements(*tensors[:2]) < limits[int(takes_triton(tensors[0]))]):
        return "torch.compile: Inductor is faster at this size"
    if functorch_is_active():
        return "torch.func"
    for name, option in zip(op.fields, options, strict=True):
        if isinstance(option, Tensor):
            return f"torch.compile: {name} is a tensor"
    return _planned_reason(op, tensors, options)


# ---- fallbacks -----------------------------------------------------------------------------------


def _head_elements(input: Tensor, weight: Tensor) -> Any:
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
    if not (isinstance(input, Tensor) and isinstance(weight, Tensor)):
        return
    elements = _head_elements(input, weight)
    if type(elements) is not int:  # comparing a symbolic size would restrict a traced program
        return
    megabytes = elements * input.element_size() >> 20
    if megabytes >= 32 and reasons.first_time(op.name, f"logits: {reason}"):
        message = f"pyfused: {op.name}: torch's operators need {megabytes} MiB for the logits: "
        if reason.endswith(" requires grad"):
            reason += ". Detach it if it needs no gradient"
        warnings.warn(message + reason, RuntimeWarning, stacklevel=reasons.stacklevel())
