"""Losses and log-probabilities of logits whose classes are sharded over a process group.

Each process computes the state of each row over its classes (``ops/row_sources.py``). The states
are merged by one maximum and three sums, and a fourth one for label smoothing: with the pivot
m = max_i m_i, SUM = sum_i exp(m_i - m) SUM_i, and TARGET_LOGIT = sum_i TARGET_LOGIT_i. The loss and
the gradients follow from the merged state, as in one process. Logits are not gathered, and their
gradient needs no communication; the gradient of a layer's input is summed over the processes.

All processes have to make the same calls, with the same targets, options, weights and shapes, and
their shards have to cover each class once. They may have different numbers of classes, or none.
Each process checks its arguments before it sends anything, except to sum up ``classes``. Mismatches
between processes are undefined, as for torch's collectives: results may be wrong, and processes may
hang. With the environment variable ``TORCH_DISTRIBUTED_DEBUG=DETAIL``, torch raises an error for
collectives that differ.

Calls have first derivatives only, and tensors are plain: pass ``dtensor.to_local()`` for a DTensor.
``create_graph=True``, other tensors, modes, forward-mode AD, and ``torch.func`` raise an error.
Compiled programs break their graph at a call.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import Unpack

from pyfused import checks
from pyfused.backends import backend_of
from pyfused.dispatch import report
from pyfused.dispatch.autograd import compute, in_autocast_dtype
from pyfused.dispatch.operator import Forward, Needs, Operand, Options, Tensors
from pyfused.dispatch.reasons import unsupported
from pyfused.layout import class_targets
from pyfused.ops import definitions, operators
from pyfused.ops.cross_entropy import split_factors
from pyfused.ops.head_loop import HeadLoop
from pyfused.ops.log_probs import LogProbs, named
from pyfused.ops.row_sources import HeadRows, LogitRows
from pyfused.torch_internals import active_mode, never_traced
from pyfused.types import (
    ENTROPY,
    LOG_P,
    LSE,
    MAXIMUM,
    PIVOT,
    SMOOTH,
    SUM,
    WEIGHTED,
    ClassRange,
    FusedOptions,
    Gradients,
    Reduction,
)

# ---- functions -----------------------------------------------------------------------------------


class VocabShard(NamedTuple):
    """The classes of this process, if a process group shards the vocabulary.

    Attributes:
        first: The index of the first class of this process.
        classes: The number of all classes; None for the sum over the processes, which synchronises
            a GPU. It is None in all processes, or in none.
        group: A process group of :mod:`torch.distributed`, None for all processes.
    """

    first: int
    classes: int | None = None
    group: Any = None


def vocab_parallel_cross_entropy(
    logits: Tensor,
    target: Tensor,
    shard: VocabShard,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    **options: Unpack[FusedOptions],
) -> Tensor:
    """Returns :func:`~pyfused.functional.cross_entropy` of logits with sharded classes.

    Args:
        logits: The logits of this process' classes, of shape (N, C).
        target: Indices into all classes, or ``ignore_index``, of shape (N), int64 or uint8.
        shard: The classes of this process.
        weight: A factor for each of all classes, in all processes.
        ignore_index, reduction, label_smoothing, options: As in
            :func:`~pyfused.functional.cross_entropy`, whose ``gamma`` is not supported. Of the
            numbers, only ``denominator`` may be a tensor.

    Returns:
        The loss over all classes, in each process, with the dtype of ``cross_entropy``. Each
        process gets the gradient of its logits.

    Raises:
        IndexError: On CPUs, a target is not the index of a class.
        TypeError, ValueError, RuntimeError: An argument is invalid, or no kernel supports it.
    """
    op = operators.CROSS_ENTROPY
    factors, others = split_factors("vocab_parallel_cross_entropy", options)
    loss_options = op.options(
        ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing, **others
    )
    return _run(op, [logits, target, weight, *factors], loss_options, shard)


def vocab_parallel_linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    shard: VocabShard,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    memory_budget: int | None = None,
    **options: Unpack[FusedOptions],
) -> Tensor:
    """Returns :func:`~pyfused.functional.linear_cross_entropy` of a layer with sharded classes.

    Args:
        input: The layer's input, of shape (..., D), the same in all processes. If it requires grad
            in one of them, it does in all, and all call backward, which sums its gradient.
        linear_weight: The weight of this process' classes, of shape (C, D) and the input's dtype.
        target: Indices into all classes, or ``ignore_index``, of shape (...), int64 or uint8.
        shard: The classes of this process.
        linear_bias: The bias of this process' classes, of shape (C) and the input's dtype.
        memory_budget: As in :func:`~pyfused.functional.linear_cross_entropy`.

    The other arguments, the result and the errors are as in :func:`vocab_parallel_cross_entropy`.
    """
    op = operators.LINEAR_CROSS_ENTROPY
    factors, others = split_factors("vocab_parallel_linear_cross_entropy", options)
    loss_options = op.options(
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        memory_budget=memory_budget,
        **others,
    )
    tensors = [input, linear_weight, linear_bias, target, weight, *factors]
    return _run(op, tensors, loss_options, shard)


def vocab_parallel_linear_log_probs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    shard: VocabShard,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    temperature: float = 1.0,
    return_entropy: bool = False,
    return_lse: bool = False,
    memory_budget: int | None = None,
) -> LogProbs:
    """Returns :func:`~pyfused.functional.linear_log_probs` of a layer with sharded classes.

    The layer, the target and the errors are as in :func:`vocab_parallel_linear_cross_entropy`, the
    other arguments and the result, which is over all classes, as in ``linear_log_probs``.
    """
    op, alone = operators.LINEAR_LOG_PROBS, not (return_entropy or return_lse)
    options = op.options(
        softcap=softcap,
        temperature=temperature,
        ignore_index=ignore_index,
        memory_budget=memory_budget,
        alone=alone,
    )
    values = _run(op, [input, linear_weight, linear_bias, target], options, shard)
    return named(values, alone, return_entropy, return_lse, False)


# ---- calls ---------------------------------------------------------------------------------------


@never_traced
def _run(op: Any, tensors: list[Any], options: Options, shard: VocabShard) -> Tensor:
    """Returns the result of a call over all classes, in the dtype of the operator's result.

    Args:
        op: The `rows.RowOperator` that computes the call in one process.
        tensors: The operator's tensors, with the classes of this process.
    """
    options, classes, size = _checked(op, tensors, options, shard)
    input = tensors[0]
    target = class_targets(tensors[op.target], op.target_shape(input))
    backend_of(input).check_class_indices(target, classes.total, options.ignore_index)
    tensors[op.target] = target
    if op.is_linear:
        tensors[0] = in_autocast_dtype(input)
    if op.factors:
        tensors[-2:] = definitions.factors(tensors[-2], tensors[-1], input.dtype)
        dtype = definitions.dtype_of_loss(options, tensors[0], target, None)
    else:
        dtype = op.wide_dtype(tensors)
    if report.active:
        report.count_call(op, tensors, options, None)
    call = _ShardedOperator(op, classes, size, shard.group, dtype), tensors, options
    result: Tensor = report.timed(compute, *call) if report.active else compute(*call)
    return result


def _checked(
    op: Any, tensors: Tensors, options: Options, shard: VocabShard
) -> tuple[Options, ClassRange, int]:
    """Checks a call, and communicates only after the checks that need no other process.

    Returns:
        The options, with numbers as floats; the classes of this process; and their number.
    """
    if not isinstance(shard, VocabShard):
        raise TypeError(f"shard: expected a VocabShard, got {type(shard).__name__}")
    first, classes, group = shard
    if dist.get_rank(group) < 0:
        raise ValueError("shard: expected a group that this process is a member of")
    checks.integer("first", first)
    if classes is not None:
        checks.integer("classes", classes)
    if mode := active_mode():
        raise RuntimeError(f"shard: expected no transform or mode, got {mode}")
    operands = op.all_operands if op.is_linear else (Operand("logits"), *op.all_operands[1:])
    for operand, x in zip(operands, tensors, strict=True):
        if x is not None or not operand.optional:
            checks.tensor(operand.name, x)
        if reason := unsupported((operand,), (x,), tensors[0]):
            raise RuntimeError(f"{operand.name}: expected a tensor that kernels take, but {reason}")
    for name, value in zip(op.fields, options, strict=True):
        if isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a number, got a Tensor")
    op.check_types(tensors, options)
    name, shape, dim = ("linear_weight", "(C, D)", 0) if op.is_linear else ("logits", "(N, C)", 1)
    local = tensors[1 - dim]
    if local.dim() != 2:
        raise RuntimeError(f"{name}: expected shape {shape}, got {tuple(local.shape)}")
    if not tensors[0].dim():
        raise RuntimeError("input: expected shape (..., D), got ()")
    check: Any = checks.linear_log_probs if op.is_linear else checks.log_probs
    check(*tensors[: op.target + 1], options)
    first, size = int(first), local.shape[dim]
    sizes = torch.full((), size, device=local.device)
    total = int(_reduced(sizes, group) if classes is None else classes)
    if not 0 <= first <= first + size <= total:
        expected = f"classes in [0, {total}) in every process"
        raise ValueError(f"shard: expected {expected}, got [{first}, {first + size})")
    if op.factors:
        input, (target, weight, token_weight, denominator) = tensors[0], tensors[op.target :]
        checks.class_options(input, target, weight, total, options)
        checks.row_factors(input, token_weight, denominator, target.shape, options)
    pairs = zip(op.numbers, options, strict=False)
    numbers = {scalar.name: float(value) for scalar, value in pairs if value is not None}
    return options._replace(**numbers), ClassRange(first, total), size


class _ShardedOperator:
    """An operator whose classes are sharded, with the methods that `autograd.compute` calls.

    Attributes:
        op: The operator of one process, whose loss gives the results and the gradients of a state.
        classes, size: The classes of this process, and their number.
        dtype: The dtype of the result.
    """

    def __init__(
        self, op: Any, classes: ClassRange, size: int, group: Any, dtype: torch.dtype
    ) -> None:
        self.op, self.name, self.classes = op, f"vocab_parallel_{op.name}", classes
        self.size, self.group, self.dtype = size, group, dtype
        self.num_differentiable, self.finish = 3 if op.is_linear else 1, None

    def prepare(self, tensors: Tensors, _: Options) -> Tensors:
        return tensors

    def rows(self, tensors: Tensors, options: Options, needs: Needs) -> tuple[Tensor, Any]:
        """Returns the targets, and the source of the rows, None if this process has no logits."""
        inputs: Any = *self.op.loss.inputs(tensors, options, False), self.classes
        layer, target = tensors[self.op.layer], inputs[0]
        if 0 in (self.size, target.numel()):
            return target, None
        if not self.op.is_linear:
            return target, LogitRows(layer[0], *inputs)
        sizes = self.op.head_sizes(tensors, options, self.op.loss.input_dtype(tensors))
        loop = HeadLoop(sizes.backend, sizes.dtype, sizes.state_blocks, needs)
        return target, HeadRows(loop, layer, *inputs)

    def forward(self, tensors: Tensors, options: Options, needs: Needs) -> Forward:
        loss, (target, source) = self.op.loss, self.rows(tensors, options, needs)
        fields, logits, weight_sum = loss.fields(options), None, self.size
        if source is None:
            state = target.new_zeros((fields, *target.shape), dtype=torch.float64)
            state[PIVOT] = -torch.inf
        else:
            state, _, logits = source.state(fields, 0, True in needs)
            if source.weight is not None:
                first = self.classes.first
                weight_sum = source.weight[first : first + self.size].sum(dtype=torch.float64)
        state = _merged(state, self.group, weight_sum).where(target != options.ignore_index, 0)
        result = loss.result_from(state, tensors, options, self.classes.total)
        # Users may change the result in place, so it does not share the state's memory.
        return result.to(self.dtype, copy=True), (*tensors, state, logits), ()

    def backward(
        self, saved: Tensors, options: Options, needs: Needs, grad_output: Tensor
    ) -> Gradients:
        *tensors, state, logits = saved
        call = tensors, options, self.classes.total, grad_output
        _, source = self.rows(tensors, options, needs)
        gradients: Gradients
        if source is None:
            pairs = zip(tensors, needs, strict=False)
            gradients = tuple([x.new_zeros(x.shape) if need else None for x, need in pairs])
        else:
            grad_results = self.op.loss.grad_results(state, *call)
            gradients = source.gradients(state, grad_results, logits)
        if self.op.is_linear and gradients[0] is not None:
            _reduced(gradients[0], self.group)
        return gradients

    def reference_backward(self, *_: Any) -> NoReturn:
        """Raises an error, as only kernels can compute the gradients."""
        expected = "a backward pass of first order, without modes or hooks that change tensors"
        got = "create_graph=True" if torch.is_grad_enabled() else "another one"
        raise RuntimeError(f"{self.name}: expected {expected}, got {got}")


# ---- the state of all classes --------------------------------------------------------------------


def _reduced(tensor: Tensor, group: Any, operation: str = "SUM") -> Tensor:
    """Overwrites a tensor with its sum, or another reduction, over the processes of a group."""
    dist.all_reduce(tensor, getattr(dist.ReduceOp, operation), group)
    return tensor


def _merged(state: Tensor, group: Any, weight_sum: Any) -> Tensor:
    """Merges the states of all processes of a group; the result is bitwise equal in all of them.

    Args:
        state: The state over this process' classes, which is overwritten.
        weight_sum: The sum of the weights of this process' classes, for SMOOTH.
    """
    largest = _reduced(state[PIVOT].clone(), group, "MAX")
    pivot = largest.where(largest != -torch.inf, 0)  # -inf - -inf would be NaN in exponents
    shift = (state[PIVOT] - pivot).where(state[SUM] > 0, 0)  # without classes the sum is 0
    state[WEIGHTED] += shift * state[SUM]
    state[SUM : WEIGHTED + 1] *= shift.exp()
    rise = largest.nan_to_num(0, 0, 0) - state[PIVOT].nan_to_num(0, 0, 0)
    state[SMOOTH:] -= rise * weight_sum
    sums = _reduced(torch.cat([state[SUM:MAXIMUM], state[SMOOTH:]]), group)
    state[PIVOT], state[SUM:MAXIMUM], state[SMOOTH:] = largest, sums[:3], sums[3:]
    total, weighted, target_logit = sums[:3]
    log_total = total.log()
    state[LOG_P] = (target_logit - pivot - log_total).clamp(max=0)
    state[ENTROPY] = (log_total - weighted / total).clamp(min=0)
    state[LSE] = pivot + log_total
    return state
