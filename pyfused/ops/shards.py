"""Rows whose classes are sharded over processes, and calls with such rows.

Each process computes the state over its classes. States merge by one maximum and a few sums: with
the pivot m = max_i m_i, SUM = sum_i exp(m_i - m) SUM_i, and TARGET_LOGIT = sum_i TARGET_LOGIT_i.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pyfused import checks
from pyfused.dispatch.operator import Operand, Options, Tensors
from pyfused.dispatch.reasons import SMALL
from pyfused.dispatch.run import unsupported
from pyfused.ops import definitions
from pyfused.ops.collectives import Copy, LocalShard, Sum, gathered, reduced
from pyfused.types import (
    ENTROPY,
    INDEX,
    LOG_P,
    LSE,
    MAXIMUM,
    PIVOT,
    SMOOTH,
    SUM,
    TARGET_LOGIT,
    WEIGHTED,
    ClassRange,
    Gradients,
    RowOptions,
    Scalar,
    VocabShard,
)

# ---- the state of all classes --------------------------------------------------------------------


def _pivot(largest: Tensor) -> Tensor:
    """Returns the largest logit, or 0 for -inf, as -inf - -inf would be NaN in exponents."""
    return largest.where(largest != -torch.inf, 0)


def _merged(state: Tensor, group: Any, entropy: bool, weight_sum: Any) -> Tensor:
    """Merges the states of all processes of a group; the result is bitwise equal in all of them.

    Fields are selected one by one, because a list as index synchronises a GPU.

    Args:
        state: The state over this process' classes, which is overwritten.
        entropy: Whether the entropy, and the maximum and its index if any, are merged.
        weight_sum: The sum of the weights of this process' classes, for SMOOTH.
    """
    fields = [SUM, *[WEIGHTED] * entropy, TARGET_LOGIT, *[SMOOTH] * (len(state) > SMOOTH)]
    largest = reduced(state[PIVOT].clone(), group, "MAX")
    pivot = _pivot(largest)
    shift = (state[PIVOT] - pivot).where(state[SUM] > 0, 0)  # without classes the sum is 0
    state[WEIGHTED] += shift * state[SUM]
    state[SUM : WEIGHTED + 1] *= shift.exp()
    if len(state) > SMOOTH:
        rise = largest.nan_to_num(0, 0, 0) - state[PIVOT].nan_to_num(0, 0, 0)
        state[SMOOTH] -= rise * weight_sum
    sums = reduced(torch.stack([state[field] for field in fields]), group)
    for field, total in zip([PIVOT, *fields], [largest, *sums], strict=True):
        state[field] = total
    if entropy and len(state) > INDEX:
        maxima, indices = gathered(state[MAXIMUM : INDEX + 1], group).unbind(1)
        is_largest = (maxima == maxima.amax(0)) | maxima.isnan()
        state[MAXIMUM], state[INDEX] = maxima.amax(0), indices.where(is_largest, torch.inf).amin(0)
    merged = state[SUM], state[WEIGHTED], state[TARGET_LOGIT]
    log_p, row_entropy, state[LSE] = definitions.row_results(pivot, *merged)
    state[LOG_P] = log_p.clamp(max=0)
    state[ENTROPY] = row_entropy.clamp(min=0) if entropy else 0
    return state


def class_range(layer: Sequence[Any], shard: LocalShard | None = None) -> ClassRange:
    """Returns the classes of logits, or of the input, weight and bias of a layer."""
    if shard is not None:
        return shard.classes
    if len(layer) > 1:
        return ClassRange(0, layer[1].shape[0])
    return ClassRange(0, layer[0].shape[min(layer[0].dim() - 1, 1)])


@dataclass(eq=False)
class ShardedRows:
    """The rows of logits whose classes are sharded over processes; see `row_sources.LogitRows`.

    Attributes:
        source: The rows of this process' classes.
        layer: The logits, or a layer's input, weight and bias.
        target: The target of each row.
        entropy: As in `_merged`.
        needs: Whether the tensors of the layer need a gradient.
    """

    source: Any
    shard: LocalShard
    layer: Sequence[Any]
    target: Tensor
    entropy: bool
    needs: Sequence[bool]

    def __post_init__(self) -> None:
        self.classes = self.source.classes
        sizes = self.layer[0].shape
        if len(self.layer) > 1:
            sizes = [n for x in self.layer[:2] for n in x.shape[:-1]]
        self.is_empty = 0 in sizes

    def state(
        self, fields: int, _results: int, keeps_logits: bool
    ) -> tuple[Tensor, None, Tensor | None]:
        """Computes the states over all classes."""
        target, logits = self.target, None
        if self.is_empty:
            state = empty_state(fields, target)
        else:
            state, _, logits = self.source.state(fields, 0, keeps_logits)
        weight, size = self.source.weight, class_range(self.layer).total
        if weight is not None:
            size = weight[self.classes.first :][:size].sum(dtype=torch.float64)
        state = _merged(state, self.shard.group, self.entropy, size)
        return state.where(target != self.source.options.ignore_index, 0), None, logits

    def gradients(self, *arguments: Any) -> Gradients:
        """Computes the gradients, and sums the gradient of a layer's input over processes."""
        gradients: Gradients
        if self.is_empty:
            pairs = zip(self.layer, self.needs, strict=False)
            gradients = tuple([torch.zeros_like(x) if need else None for x, need in pairs])
        else:
            gradients = self.source.gradients(*arguments)
        if len(self.layer) > 1 and gradients[0] is not None:
            reduced(gradients[0], self.shard.group)
        return gradients


def empty_state(fields: int, target: Tensor) -> Tensor:
    """Returns the state of rows without classes."""
    state = target.new_zeros((fields, *target.shape), dtype=torch.float64)
    for index in (PIVOT, *[MAXIMUM] * (fields > MAXIMUM)):  # a list as index synchronises
        state[index] = -torch.inf
    return state


def sharded_results(
    layer: Sequence[Any],
    target: Tensor,
    weight: Tensor | None,
    options: RowOptions,
    shard: LocalShard,
    smooth: bool,
) -> Tensor:
    """Computes the fields of a state by torch's operators, from all local logits.

    There are STATE_FIELDS fields, and SMOOTH if ``smooth``; they can be differentiated.
    Rows of ignored targets are filled with 0, as NaN in them would reach the gradients.

    Args:
        layer: The logits, or a layer's input, weight and bias.
        smooth: Whether the last field is SMOOTH.
    """
    (x, *parameters), (first, _), group = layer, shard.classes, shard.group
    x = x.double()
    dim = x.dim() - 1 if parameters else min(x.dim() - 1, 1)
    valid = target != options.ignore_index
    if parameters:
        x = definitions.head_logits(Copy.apply(x, group), parameters[0], parameters[1], valid)
    x = x.movedim(dim, -1).where(valid.unsqueeze(-1), 0)
    x = x if options.softcap is None else definitions.softcap(x, options.softcap)
    x = options.scale * x
    largest = x.detach().amax(-1) if x.shape[-1] else x.new_full(target.shape, -torch.inf)
    pivot = _pivot(reduced(largest, group, "MAX"))
    is_target = torch.arange(x.shape[-1], device=x.device) + first == target.unsqueeze(-1)
    shifted = x - pivot.unsqueeze(-1)
    exponentials = shifted.exp()
    weighted = exponentials * shifted.where(exponentials != 0, 0)
    terms = [exponentials, weighted, x.where(is_target, 0)]
    if smooth:
        weights = 1 if weight is None else weight.double()[first:][: x.shape[-1]]
        terms.append(shifted * weights)
    sums = Sum.apply(torch.stack([term.sum(-1) for term in terms]), group)
    results = torch.stack([*definitions.row_results(pivot, *sums[:3]), pivot, *sums])
    return results.where(valid, 0)


# ---- calls ---------------------------------------------------------------------------------------


def local_shard(op: Any, tensors: Tensors, options: Options, shard: VocabShard) -> LocalShard:
    """Checks a call with this process' classes, and returns their range and the group.

    Args:
        op: A `rows.RowOperator`.
    """
    if not isinstance(shard, VocabShard):
        raise TypeError(f"shard: expected a VocabShard, got {type(shard).__name__}")
    (first, total, group), device = shard, tensors[0].device
    if dist.get_rank(group) < 0:
        raise ValueError("shard: expected a group that this process is a member of")
    by_name = {operand.name: x for operand, x in zip(op.all_operands, tensors, strict=True)}
    name, dim = ("linear_weight", 0) if op.is_linear else (op.names[0], 1)
    checks.integer("first", first)
    if total is not None:
        checks.integer("classes", total)
        checks.bounded(Scalar("classes", low=0.0), total)
    elif isinstance(weight := by_name.get("weight"), Tensor):
        total = weight.numel()
    check_local(op, by_name, options, name, dim, total)
    first, size = int(first), by_name[name].shape[dim]
    total = int(reduced(torch.full((), size, device=device), group) if total is None else total)
    if not 0 <= first <= first + size <= total:
        expected = f"classes in [0, {total}) in every process"
        raise ValueError(f"shard: expected {expected}, got [{first}, {first + size})")
    return LocalShard(ClassRange(first, total), group)


def check_local(
    op: Any, tensors: dict[str, Any], options: Options, name: str, dim: int, total: int | None
) -> None:
    """Raises for arguments that are invalid for any arguments of the other processes.

    Args:
        tensors: The tensors of the call by name.
        name: The name of the tensor with sharded classes.
        dim: The dimension of its classes.
        total: The number of all classes, None if this process does not know it.
    """
    target, values = tensors["target"], (*tensors.values(),)
    op.check_types(values, options)
    shape = tuple(tensors[name].shape)
    if len(shape) < 2:
        expected = "(N, C, ...)" if dim else "(C, D)"
        raise RuntimeError(f"{name}: expected shape {expected}, got {shape}")
    if target.is_floating_point():
        raise RuntimeError(f"target: expected class indices, got {target.dtype}")
    if getattr(options, "gamma", 0) != 0:
        raise ValueError(f"gamma: expected 0.0 with a shard, got {options.gamma}")
    classes = max(1, shape[dim]) if total is None else total
    if op.is_linear:
        op.check_shapes(*values, options, classes)
    else:
        input, *others = values
        shape = *input.shape[:1], classes, *input.shape[2:]
        op.check_shapes(input.new_empty(()).expand(shape), *others, options)
    numbers = [Operand(name, differentiated=False) for name in op.fields]  # some may be tensors
    for operand, x in zip((*op.all_operands, *numbers), (*values, *options), strict=True):
        reason = unsupported((operand,), (x,), values[0]) if isinstance(x, Tensor) else None
        if reason is not None and reason is not SMALL:
            expected = "a tensor that the kernels support with a shard"
            raise RuntimeError(f"{operand.name}: expected {expected}, but {reason}")
