"""Classes that are sharded among processes: the checks, and the state of rows of all classes."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from pyfused import checks
from pyfused.backends import DTYPES
from pyfused.layout import accumulate_dtype, of_leading
from pyfused.ops import definitions, metrics
from pyfused.ops.chunked import StateOptions, gradients_of, state_of
from pyfused.ops.declaration import Arguments, Operand, Operator
from pyfused.ops.dispatch import unsupported
from pyfused.ops.gradients import apply, autocast_dtype, differentiate
from pyfused.ops.metrics import Metrics
from pyfused.ops.reasons import SMALL
from pyfused.ops.row_state import (
    accumulated,
    denominator_of,
    fields_of,
    loss_of_state,
    results_of,
    state_of_nothing,
    weight_of_targets,
)
from pyfused.types import (
    ENTROPY,
    INDEX,
    LOG_P,
    LSE,
    MAXIMUM,
    PIVOT,
    RESULTS,
    SMOOTH,
    SUM,
    TARGET_LOGIT,
    WEIGHTED,
    ClassRange,
    CrossEntropyOptions,
    Gradients,
    Head,
    HeadOptions,
    LogProbsOptions,
    VocabShard,
)

# ---- what a call has to be -----------------------------------------------------------------------


def _class_range(name: str, tensor: Tensor, dim: int, shard: VocabShard) -> ClassRange:
    """Returns which of all classes this process has, along a dimension of a tensor.

    Args:
        name: The argument's, for errors.
    """
    checks.tensor(name, tensor)
    if not isinstance(shard, VocabShard):
        raise TypeError(f"shard: expected a VocabShard, got {type(shard).__name__}")
    if tensor.dim() < 2:
        expected = "(C, D)" if dim == 0 else "(N, C, ...)"
        raise RuntimeError(f"{name}: expected shape {expected}, got {tuple(tensor.shape)}")
    first, classes, group = shard
    here = tensor.shape[dim]
    if classes is None:
        total = torch.tensor(here, device=tensor.device)
        dist.all_reduce(total, group=group)
        classes = int(total)
    if first < 0 or first + here > classes:
        raise ValueError(
            f"shard: expected {here} classes within [0, {classes}), got those from {first} on"
        )
    return ClassRange(first, classes)


def _check(
    layer: Sequence[Tensor | None],
    target: Tensor,
    weight: Tensor | None,
    options: CrossEntropyOptions,
    classes: int,
) -> None:
    input, *parameters = layer
    assert input is not None
    positions = () if parameters else input.shape[2:]
    logits = *input.shape[:1], classes, *positions
    checks.reduction(options.reduction)
    checks.tensor("target", target)
    if target.is_floating_point():
        raise RuntimeError(f"target: expected class indices, got {target.dtype}")
    checks.cross_entropy(input.new_empty(()).expand(logits), target, weight, options)
    given = {"input": input, "target": target, "weight": weight} | options.tensors()
    given |= dict(zip(("linear_weight", "linear_bias"), parameters, strict=False))
    if found := _unsupported(input, given):
        name, reason = found
        raise RuntimeError(
            f"{name}: expected a tensor that the kernels take, got one where {reason}"
        )
    if target.is_cpu:
        checks.class_indices(classes, target, options.ignore_index)


_CONSTANTS = ("weight", "token_weight", "denominator")  # the kernels compute no gradient of these


def _unsupported(input: Tensor, given: Mapping[str, Tensor | None]) -> tuple[str, str] | None:
    """Returns the name of a tensor that the kernels do not take, and the reason."""
    for name, tensor in given.items():
        operand = Operand(name, indices=name == "target", differentiated=name not in _CONSTANTS)
        reason = None if tensor is None else unsupported(operand, tensor, input, False)
        if reason is not None and reason is not SMALL:
            return name, reason
    return None


# ---- collectives that autograd differentiates ----------------------------------------------------


class _Sum(torch.autograd.Function):
    """The sum of what the processes have; the gradient of the sum is that of each summand.

    The functional collectives of torch differentiate the sum of all processes' losses, and so add
    up the gradients in the backward pass. All processes have the same loss here, which counts once.
    """

    @staticmethod
    def forward(ctx: Any, summand: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = summand.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return _Copy.apply(grad_output, ctx.group), None


class _Copy(torch.autograd.Function):
    """What all processes have, for different uses, whose gradients its gradient is the sum of."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(grad_output, ctx.group), None


# ---- the state of all classes --------------------------------------------------------------------


def _pivot(largest: Tensor) -> Tensor:
    """Returns what is subtracted before exponentials are taken; -inf less -inf would be NaN."""
    return largest.where(largest > -torch.inf, 0)


def _merged(state: Tensor, group: Any, entropy: bool) -> Tensor:
    """Returns the state over all processes' classes, given that over this process' classes.

    Args:
        state: Is overwritten.
        entropy: Whether the entropy is wanted and, if the state has them, the maximum and its
            index. The index has the same bits in every process, as the sums do.
    """
    largest = state[PIVOT].clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    pivot = _pivot(largest)
    by = (state[PIVOT] - pivot).where(state[SUM] > 0, 0)  # without classes the sum is 0
    state[WEIGHTED] += by * state[SUM]
    state[SUM : WEIGHTED + 1] *= by.exp()
    fields = [SUM, *[WEIGHTED] * entropy, TARGET_LOGIT, *[SMOOTH] * (len(state) > SMOOTH)]
    sums = state[fields]
    dist.all_reduce(sums, group=group)
    state[fields], state[PIVOT] = sums, largest
    if entropy and len(state) > INDEX:
        numbers = state[MAXIMUM : INDEX + 1]
        parts = [torch.empty_like(numbers) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, numbers, group)
        maxima, indices = torch.stack(parts, 1)
        leads = (maxima == maxima.amax(0)) | maxima.isnan()
        state[MAXIMUM], state[INDEX] = maxima.amax(0), indices.where(leads, torch.inf).amin(0)
    log_total = state[SUM].log()
    state[LOG_P] = (state[TARGET_LOGIT] - pivot - log_total).clamp(max=0)
    state[LSE] = pivot + log_total
    state[ENTROPY] = (log_total - state[WEIGHTED] / state[SUM]).clamp(min=0) if entropy else 0
    return state


def _has_classes(tensors: Sequence[Any]) -> bool:
    logits, *layer = tensors[:-1]
    return bool(len(layer[0]) if layer else logits.numel())


class StatePlan(NamedTuple):
    """Computes the state of rows, of which each process may have some classes, or none.

    Attributes:
        options: What the state of this process' classes is computed by.
        shard: What this process has of all classes, None for all.
        entropy: As in `_merged`.
    """

    name: str
    options: StateOptions
    shard: VocabShard | None
    entropy: bool

    def forward(self, ctx: Any, tensors: Sequence[Any]) -> Tensor:
        *tensors, weight = tensors
        if _has_classes(tensors):
            state, _ = state_of(tensors, self.options, weight)
        else:
            state = state_of_nothing(self.options.fields, tensors[-1])
        if self.shard is not None:
            state = _merged(state, self.shard.group, self.entropy)
        state = state.where(tensors[-1] != self.options.rows.ignore_index, 0)
        ctx.save_for_backward(*tensors, weight, state)
        return state

    def backward(self, ctx: Any, grad_output: Tensor) -> Gradients:
        *tensors, weight, state = ctx.saved_tensors
        found: Gradients
        if _has_classes(tensors):
            needed = ctx.needs_input_grad[1 : len(tensors)]
            given = self.options, needed, state, self._of_results(grad_output)
            found = gradients_of(tensors, *given, weight=weight)
        else:
            found = tuple([None if x is None else torch.zeros_like(x) for x in tensors[:-1]])
        if len(found) > 1 and found[0] is not None:
            assert self.shard is not None  # only logits are not sharded
            dist.all_reduce(found[0], group=self.shard.group)
        return found

    def define(self, ctx: Any, grad_output: Tensor) -> Gradients:
        *layer, target, weight, state = ctx.saved_tensors
        pivot = _pivot(state[PIVOT])

        def definition(*layer: Tensor | None) -> Tensor:
            return self._results_in_torch(layer, target, weight, pivot)

        needs = ctx.needs_input_grad[1 : 1 + len(layer)]
        return differentiate(definition, layer, needs, self._of_results(grad_output))

    def _of_results(self, state: Tensor) -> Tensor:
        """Returns the fields that have a gradient."""
        return state[[*RESULTS, SMOOTH]] if len(state) > SMOOTH else state[: len(RESULTS)]

    def _results_in_torch(
        self, layer: Sequence[Tensor | None], target: Tensor, weight: Tensor | None, pivot: Tensor
    ) -> Tensor:
        """Returns these fields from all logits of this process, in torch's terms.

        The logits of ignored targets are 0, as NaN among them would reach the gradients.
        """
        rows, (first, _) = self.options.rows, self.options.classes
        x, *parameters = [None if each is None else each.double() for each in layer]
        if parameters:
            x = x if self.shard is None else _Copy.apply(x, self.shard.group)
            x = F.linear(x, *parameters)  # type: ignore[arg-type]
        assert x is not None
        x = x if rows.softcap is None else definitions.softcap(x, rows.softcap)
        counted = target != rows.ignore_index
        x = (x.movedim(1, -1) * rows.scale).where(counted.unsqueeze(-1), 0)
        is_target = torch.arange(x.shape[-1], device=x.device) + first == target.unsqueeze(-1)
        shifted = x - pivot.unsqueeze(-1)
        exponentials = shifted.exp()
        terms = [exponentials, exponentials * shifted.where(exponentials != 0, 0)]
        terms.append(x.where(is_target, 0))
        if self.options.fields > SMOOTH:
            terms.append(x if weight is None else x * weight.double()[first:][: x.shape[-1]])
        sums = torch.stack([term.sum(-1) for term in terms])
        sums = sums if self.shard is None else _Sum.apply(sums, self.shard.group)
        total, weighted, target_logit, *smooth = sums
        log_total = total.log()
        lse = pivot + log_total
        found = torch.stack([target_logit - lse, log_total - weighted / total, lse, *smooth])
        return found.where(counted, 0)


# ---- operators -----------------------------------------------------------------------------------


def cross_entropy(
    tensors: Sequence[Any],
    weight: Tensor | None,
    options: CrossEntropyOptions,
    shard: VocabShard | None,
) -> Any:
    """Returns the loss, beside metrics where the options ask for them, from the state of rows.

    Args:
        tensors: Logits and target, or input, weight and bias of a layer and the target, each with
            this process' classes.
        shard: Which these are; None for all, of logits that are checked.
    """
    *layer, target = tensors
    linear, leading = len(layer) > 1, layer[0].shape[:-1]
    if shard is None:
        total = checks.classes_of(layer[0])
        classes = ClassRange(0, total)
    else:
        given = ("linear_weight", layer[1], 0) if linear else ("input", layer[0], 1)
        classes = _class_range(*given, shard)
        if linear:
            head, of_head = Head._make((*tensors, None)), cast("HeadOptions", options)
            checks.linear_cross_entropy(head, of_head)
            head, options = head.as_rows(of_head)
            *layer, target = head[:4]
        if options.gamma:
            raise ValueError(f"gamma: expected 0.0 beside a shard, got {options.gamma}")
        _check(layer, target, weight, options, classes.total)
    options = checks.normalized(options)
    budget = getattr(options, "memory_budget", None)
    of_state = StateOptions(options.rows, classes, fields_of(options), memory_budget=budget)
    weight, target = accumulated(weight, layer[0].dtype), target.to(torch.int64)
    plan = StatePlan("cross_entropy", of_state, shard, options.with_metrics)
    state = apply(plan, *layer, target, weight)
    loss = loss_of_state(state, target, weight, options, classes.total)
    if options.reduction != "none":
        counted = weight_of_targets(target, weight, options)
        loss = loss.sum() / denominator_of(options, counted)
    input = layer[0]
    found = [loss.to(options.loss_dtype or autocast_dtype(input.dtype, input.device))]
    if options.with_metrics:
        of_rows = state.detach().reshape(len(state), -1), target, options.ignore_index
        found += metrics.of_state(*of_rows, accumulate_dtype(input.dtype))
    if linear:
        found = [of_leading(each, leading) for each in found]
    return (found[0], Metrics(*found[1:])) if options.with_metrics else found[0]


def log_probs(tensors: Sequence[Any], options: LogProbsOptions, shard: VocabShard) -> Tensor:
    """Returns log-probabilities, entropies and log-sum-exps of the operator's tensors."""
    *layer, target = tensors
    linear = len(layer) > 1
    name = "linear_" * linear + "log_probs"
    given = ("linear_weight", layer[1], 0) if linear else ("logits", layer[0], 1)
    classes = _class_range(*given, shard)
    getattr(checks, name)(*tensors, options)
    shape = target.shape
    if linear:
        layer[0], target = layer[0].reshape(-1, layer[0].shape[-1]), target.flatten()
    of_target = CrossEntropyOptions(options.ignore_index, "none")
    _check(layer, target, None, of_target, classes.total)
    budget, fixed = options.memory_budget, options.deterministic_rows
    of_state = StateOptions(options.rows, classes, memory_budget=budget, fixed_sizes=fixed)
    plan = StatePlan(name, of_state, shard, True)
    state: Tensor = apply(plan, *layer, target.to(torch.int64), None)
    results = results_of(state, options, accumulate_dtype(layer[0].dtype))
    return results.reshape(*results.shape[: not options.alone], *shape)


# ---- DTensor -------------------------------------------------------------------------------------


def is_dtensor(tensor: Any) -> bool:
    """Returns whether it is torch's DTensor, whose module only its users import."""
    module = sys.modules.get("torch.distributed.tensor")
    return type(tensor) is getattr(module, "DTensor", None)  # another thread may be importing it


class _ToLocal(torch.autograd.Function):
    """``DTensor.to_local`` with a differentiable gradient, which that of torch 2.11 has not."""

    @staticmethod
    def forward(ctx: Any, tensor: Any) -> Tensor:
        ctx.set_materialize_grads(False)  # zeros that autograd makes are no DTensors
        ctx.whole = tensor.device_mesh, tensor.placements, tensor.shape
        local: Tensor = tensor.to_local()
        return local.view_as(local)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> Any:
        return None if grad_output is None else _FromLocal.apply(grad_output, *ctx.whole)


class _FromLocal(torch.autograd.Function):
    """``DTensor.from_local``, likewise."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, mesh: Any, placements: Any, shape: torch.Size) -> Any:
        from torch.distributed.tensor import DTensor

        ctx.set_materialize_grads(False)
        ctx.whole = mesh, placements
        return DTensor.from_local(
            local.contiguous(),
            mesh,
            placements,
            run_check=False,
            shape=shape,
            stride=torch.empty(shape, device="meta").stride(),
        )

    @staticmethod
    def backward(ctx: Any, grad_output: Any) -> tuple[Tensor | None, None, None, None]:
        if grad_output is not None:
            grad_output = _ToLocal.apply(grad_output.redistribute(*ctx.whole))
        return grad_output, None, None, None


class LocalShard(NamedTuple):
    """The part that a process has of a call with DTensors on a mesh."""

    arguments: Arguments
    shard: VocabShard
    mesh: Any

    def whole(self, found: Any) -> Any:
        """Returns a result, which every process has, as the call returns it."""
        if isinstance(found, tuple):
            loss, metrics = found
            return self.whole(loss), Metrics(*map(self.whole, metrics))
        from torch.distributed.tensor import Replicate

        everywhere = (Replicate(),) * self.mesh.ndim
        return _FromLocal.apply(found, self.mesh, everywhere, found.shape)


def local_of(op: Operator, arguments: Arguments) -> LocalShard | None:
    """Returns the part of this process, where classes are sharded along one dimension of a mesh.

    Every process has all of the other tensors, plain ones or replicated DTensors, but for the input
    of a layer: a plain one may be part of a batch, beside a weight sharded by FSDP. Else None, as
    where the kernels do not take this process' tensors.
    """
    input = arguments[0]
    if type(input) is Tensor or not is_dtensor(input):  # first: any call comes here
        return None
    linear = op.arguments[1] == "linear_weight"
    by_class = arguments[linear]
    if type(by_class) is not type(input) or by_class.dtype not in DTYPES:
        return None
    if by_class.dim() < 2 or (linear and (input.dim() < 2 or by_class.dim() > 2)):
        return None
    from torch.distributed import tensor as dtensor

    given = dict(zip(op.arguments, arguments, strict=True))
    names, dim = (("linear_weight", "linear_bias"), 0) if linear else (op.arguments[:1], 1)
    mesh, placements = by_class.device_mesh, by_class.placements
    part, whole = dtensor.Shard(dim), dtensor.Replicate()
    if (placements.count(part), placements.count(whole)) != (1, mesh.ndim - 1):
        return None
    checks.tensor("target", given["target"])
    if given["target"].is_floating_point():
        return None
    options = given["options"]
    among = options.tensors()
    given |= among
    for name, tensor in given.items():
        if is_dtensor(tensor):
            expected = placements if name in names else (whole,) * mesh.ndim
            if (tensor.device_mesh, tensor.placements) != (mesh, expected):
                return None
            given[name] = _ToLocal.apply(tensor)
        elif name in names and tensor is not None:
            return None
    tensors = {name: tensor for name, tensor in given.items() if isinstance(tensor, Tensor)}
    if _unsupported(given[op.arguments[0]], tensors):
        return None
    if among:
        given["options"] = replace(options, **{name: given.pop(name) for name in among})
    classes, of_mesh = by_class.shape[dim], placements.index(part)
    first = -(-classes // mesh.size(of_mesh)) * mesh.get_local_rank(of_mesh)
    shard = VocabShard(min(classes, first), classes, mesh.get_group(of_mesh))
    return LocalShard(tuple(given.values()), shard, mesh)
