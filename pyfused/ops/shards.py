"""Results from the state of rows for autograd, with the classes sharded among processes or not."""

from __future__ import annotations

import sys
import zlib
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pyfused import checks
from pyfused.backends import DTYPES, backend_of
from pyfused.dispatch.autograd import autocast_dtype, differentiate, without_autocast
from pyfused.dispatch.call import unsupported
from pyfused.dispatch.operator import Arguments, Operand, Operator
from pyfused.dispatch.plan import Forward, Plan, needs_grad
from pyfused.dispatch.reasons import SMALL
from pyfused.layout import accumulate_dtype
from pyfused.ops import definitions, metrics
from pyfused.ops.collectives import Call, Copy, Sum, all_need_gradients, classes_of_all, gathered
from pyfused.ops.heads import StateOptions, gradients_of, state_of
from pyfused.ops.metrics import Metrics
from pyfused.ops.row_state import (
    accumulated,
    denominator_of,
    fields_of,
    gradient_of_logits,
    loss_of_state,
    results_of,
    state_of_logits,
    state_of_nothing,
    weight_of_targets,
)
from pyfused.torch_internals import graph_is_retained
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
    VocabShard,
)

# ---- what a call has to be -----------------------------------------------------------------------


_CONSTANTS = ("weight", "token_weight", "denominator")  # the kernels compute no gradient of these


def _unsupported(given: Mapping[str, Any]) -> tuple[str, str] | None:
    """Returns the name of a tensor that the kernels do not take, and the reason.

    Args:
        given: Arguments, the first of which is the input.
    """
    input = next(iter(given.values()))
    for name, tensor in given.items():
        if isinstance(tensor, Tensor):
            operand = Operand(name, indices=name == "target", differentiated=name not in _CONSTANTS)
            reason = unsupported(operand, tensor, input)
            if reason is not None and reason is not SMALL:
                return name, reason
    return None


# The options that processes may have for themselves, as these change no communication and no loss.
_MAY_DIFFER = ("alone", "deterministic_rows", "filter_eps", "memory_budget")


def _described(value: Any) -> Any:
    """Returns what an argument of one process has to have in common with those of the others."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    return float(value) if isinstance(value, Real) else str(value)


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
        maxima, indices = gathered(state[MAXIMUM : INDEX + 1], group).unbind(1)
        leads = (maxima == maxima.amax(0)) | maxima.isnan()
        state[MAXIMUM], state[INDEX] = maxima.amax(0), indices.where(leads, torch.inf).amin(0)
    log_total = state[SUM].log()
    state[LOG_P] = (state[TARGET_LOGIT] - pivot - log_total).clamp(max=0)
    state[LSE] = pivot + log_total
    state[ENTROPY] = (log_total - state[WEIGHTED] / state[SUM]).clamp(min=0) if entropy else 0
    return state


def plan_of_state(
    name: str,
    tensors: Sequence[Any],
    options: StateOptions,
    shard: VocabShard | None,
    *,
    entropy: bool = True,
    results: int = 0,
    needs: tuple[bool, ...] | None = None,
    arrange: Callable[[Arguments], Sequence[Any]] = tuple,
) -> Plan:
    """Returns the plan of the state of rows, of which each process may have some classes, or none.

    The plan's tensors are the logits, or the input, weight and bias of a layer; the target; and the
    weight of the classes. The logits of a layer's first rows are saved for the backward pass, which
    overwrites them and recomputes the others; all of them where the graph is retained.

    Args:
        tensors: Logits, or the input, weight and bias of a layer.
        options: How the state of this process' classes is computed.
        shard: What this process has of all classes, None for all.
        entropy: As in `_merged`.
        results: How many of the first fields are returned, in the accumulation dtype; 0 for the
            whole state.
        needs: Whether each of the tensors needs a gradient, where autograd does not know.
        arrange: As in `Plan`; by default the arguments are the plan's tensors.
    """
    backend, dtype = backend_of(tensors[0]), accumulate_dtype(tensors[0].dtype)
    needs = needs_grad(tensors) if needs is None else needs
    of_logits, saves = len(tensors) == 1, True in needs
    has_classes = shard is None or tensors[not of_logits].numel() > 0
    rows, classes, fields, *_ = options
    launches: dict[Any, Callable[..., Any]] = {}  # by the strides of logits; None is forward's

    def forward(tensors: Sequence[Any]) -> Forward:
        *given, target, weight = tensors
        found, kept = None, None
        if not has_classes:
            state = state_of_nothing(fields, target)
        elif of_logits:
            launch = launches.get(None)
            if launch is None:
                count = results if shard is None else 0  # of some classes they are none
                launch = state_of_logits(backend, given[0], rows, classes, fields, count)
                launches[None] = launch
            state, found = launch(*given, target, weight)
        else:
            with without_autocast(target.device.type):
                state, kept = state_of(backend, (*given, target), options, weight, saves)
        if shard is not None:
            state = _merged(state, shard.group, entropy)
            state = state.where(target != rows.ignore_index, 0)
        if found is None:
            found = results_of(state, results).to(dtype) if results else state
        return found, (*tensors, state, kept), ()

    def backward(saved: Sequence[Any], grad_output: Tensor) -> Gradients:
        *tensors, weight, state, kept = saved
        if kept is not None and (graph_is_retained() or not kept.is_contiguous()):
            kept = None  # it would be overwritten
        gradients: Gradients
        if not has_classes:
            pairs = zip(tensors, needs, strict=False)
            gradients = tuple([torch.zeros_like(x) if need else None for x, need in pairs])
        elif of_logits:
            grad_results = grad_output if results else _of_results(grad_output, state)
            strides = tensors[0].stride()  # which hooks for saved tensors may change
            launch = launches.get(strides)
            if launch is None:
                count = results or len(grad_results)
                launch = gradient_of_logits(backend, tensors[0], rows, classes, count)
                launches[strides] = launch
            gradients = (launch(*tensors, weight, state, grad_results),)
        else:
            grad_results = _of_results(grad_output, state)
            given = backend, tensors, options, needs, state, grad_results, kept
            gradients = gradients_of(*given, weight=weight)
        if shard is not None and not of_logits and gradients[0] is not None:
            dist.all_reduce(gradients[0], group=shard.group)
        return gradients

    def define(saved: Sequence[Any], grad_output: Tensor) -> Gradients:
        *layer, target, weight, state = saved[: len(tensors) + 3]
        pivot, grad_results = _pivot(state[PIVOT]), _of_results(grad_output, state)

        def definition(*layer: Tensor | None) -> Tensor:
            found = _results_in_torch(layer, target, weight, pivot, options, shard)
            return found[: len(grad_results)]

        return differentiate(definition, layer, needs, grad_results)

    return Plan(
        name=name,
        backend=backend,
        needs=needs,
        arrange=arrange,
        forward=forward,
        backward=backward,
        define=define,
    )


def _results_in_torch(
    layer: Sequence[Tensor | None],
    target: Tensor,
    weight: Tensor | None,
    pivot: Tensor,
    options: StateOptions,
    shard: VocabShard | None,
) -> Tensor:
    """Returns the fields of a state that have gradients, from all logits of this process.

    The logits of ignored targets are 0, as NaN among them would reach the gradients.
    """
    rows, (first, _) = options.rows, options.classes
    x, *parameters = [None if each is None else each.double() for each in layer]
    assert x is not None
    dim = x.dim() - 1 if parameters else min(x.dim() - 1, 1)
    if parameters:
        x = x if shard is None else Copy.apply(x, shard.group)
        x = definitions.head_logits(x, *parameters)  # type: ignore[arg-type]
    x = x if rows.softcap is None else definitions.softcap(x, rows.softcap)
    counted = target != rows.ignore_index
    x = (x.movedim(dim, -1) * rows.scale).where(counted.unsqueeze(-1), 0)
    is_target = torch.arange(x.shape[-1], device=x.device) + first == target.unsqueeze(-1)
    shifted = x - pivot.unsqueeze(-1)
    exponentials = shifted.exp()
    terms = [exponentials, exponentials * shifted.where(exponentials != 0, 0)]
    terms.append(x.where(is_target, 0))
    if options.fields > SMOOTH:
        terms.append(x if weight is None else x * weight.double()[first:][: x.shape[-1]])
    sums = torch.stack([term.sum(-1) for term in terms])
    sums = sums if shard is None else Sum.apply(sums, shard.group)
    total, weighted, target_logit, *smooth = sums
    log_total = total.log()
    lse = pivot + log_total
    found = torch.stack([target_logit - lse, log_total - weighted / total, lse, *smooth])
    return found.where(counted, 0)


def _of_results(grad_output: Tensor, state: Tensor) -> Tensor:
    """Returns the gradients of the fields that have one, as kernels take them."""
    if grad_output.dim() < state.dim():
        grad_output = grad_output.unsqueeze(0)
    elif len(grad_output) > SMOOTH:
        grad_output = grad_output[[*RESULTS, SMOOTH]]
    elif len(grad_output) > len(RESULTS):
        grad_output = grad_output[: len(RESULTS)]
    return grad_output.double()


def cross_entropy(
    tensors: Sequence[Any],
    weight: Tensor | None,
    options: CrossEntropyOptions,
    classes: ClassRange,
    shard: VocabShard | None,
) -> Any:
    """Returns the loss, beside metrics where the options ask for them, from the state of rows.

    Args:
        tensors: Logits and target, or input, weight and bias of a layer and the target, each with
            this process' classes.
        shard: Which these are; None for all.
    """
    *layer, target = tensors
    input, options = layer[0], checks.normalized(options)
    budget = getattr(options, "memory_budget", None)
    of_state = StateOptions(options.rows, classes, fields_of(options), memory_budget=budget)
    weight, target = accumulated(weight, input.dtype), target.to(torch.int64)
    entropy = options.with_metrics
    plan = plan_of_state("cross_entropy", layer, of_state, shard, entropy=entropy)
    state = plan((*layer, target, weight))
    loss = loss_of_state(state, target, weight, options, classes.total)
    if options.reduction != "none":
        counted = weight_of_targets(target, weight, options)
        loss = loss.sum() / denominator_of(options, counted)
    loss = loss.to(options.loss_dtype or autocast_dtype(input.dtype, input.device))
    if not options.with_metrics:
        return loss
    dtype = accumulate_dtype(input.dtype)
    return loss, metrics.of_state(state, target, options.ignore_index, dtype)


# ---- operators -----------------------------------------------------------------------------------


@dataclass(eq=False, kw_only=True, repr=False)
class ShardedOperator(Operator):
    """An operator of logits, whose classes may be sharded among processes."""

    check_arguments: Callable[..., None]

    @abstractmethod
    def of_classes(self, arguments: Arguments, classes: ClassRange, shard: VocabShard) -> Any:
        """Returns the result of checked arguments, which have this process' classes."""

    @property
    def by_class(self) -> tuple[tuple[str, ...], int]:
        """Returns the names of the tensors whose classes are sharded, and their dimension."""
        linear = ("linear_weight", "linear_bias"), 0
        return linear if self.counts_logits else (self.arguments[:1], 1)

    def of_shard(self, arguments: Arguments, shard: VocabShard) -> Any:
        """Returns the result of arguments that have this process' classes.

        The processes exchange what they have first. Then all of them raise, or all of them make the
        same collectives, in the backward pass too.
        """
        if not isinstance(shard, VocabShard):
            raise TypeError(f"shard: expected a VocabShard, got {type(shard).__name__}")
        if dist.get_rank(shard.group) < 0:
            raise ValueError("shard: expected a group that this process is a member of")
        input = arguments[0]
        try:
            own = self.call_of(arguments, shard)
        except Exception:
            device = getattr(input, "device", None)
            gathered(torch.tensor(Call(), device=device), shard.group)  # and the others raise, too
            raise
        calls = [Call(*numbers) for numbers in gathered(own, shard.group).tolist()]
        shard = shard._replace(classes=classes_of_all(calls))
        if all_need_gradients(calls) and not input.requires_grad:
            arguments = input.detach().requires_grad_(), *arguments[1:]
        return self.of_checked(arguments, shard)

    def call_of(self, arguments: Arguments, shard: VocabShard) -> Tensor:
        """Checks the arguments of this process, and returns the numbers of its `Call`."""
        given = dict(zip(self.arguments, arguments, strict=True))
        names, dim = self.by_class
        first, total, _ = shard
        checks.number("first", first, (int, Integral), "an int")
        if total is not None:
            checks.number("classes", total, (int, Integral), "an int")
            checks.bounded("classes", total)
        elif isinstance(weight := given.get("weight"), Tensor):
            total = weight.numel()
        self.check_part(given, total)
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        needs = [tensor.requires_grad for tensor in tensors.values()]
        common = {k: value for k, value in tensors.items() if k not in names}
        common |= {k: v for k, v in vars(given["options"]).items() if k not in _MAY_DIFFER}
        described = [(name, _described(value)) for name, value in common.items()]
        target = given["target"].flatten()
        autocast = torch.is_autocast_enabled(target.device.type)
        call = Call(
            is_valid=1,
            first=int(first),
            size=given[names[0]].shape[dim],
            total=-1 if total is None else int(total),
            needs=1 + any(needs) + needs[0] if torch.is_grad_enabled() else 0,
            common=zlib.crc32(repr((self.name, autocast, described)).encode()),
        )
        numbers = torch.tensor(call, device=target.device)
        index = torch.arange(1, len(target) + 1, device=target.device)
        numbers[-1] = (target * index).sum()  # not as a number of Python: a GPU is not waited for
        return numbers

    def check_part(self, given: dict[str, Any], total: int | None) -> None:
        """Raises for arguments that are wrong whatever the other processes have."""
        options, target, ((name, *_), dim) = given["options"], given["target"], self.by_class
        checks.tensor(name, given[name])
        shape = tuple(given[name].shape)
        if len(shape) < 2:
            expected = "(N, C, ...)" if dim else "(C, D)"
            raise RuntimeError(f"{name}: expected shape {expected}, got {shape}")
        checks.tensor("target", target)
        if target.is_floating_point():
            raise RuntimeError(f"target: expected class indices, got {target.dtype}")
        checks.reduction(options.reduction)
        if getattr(options, "gamma", 0):
            raise ValueError(f"gamma: expected 0.0 beside a shard, got {options.gamma}")
        self.check_shapes((*given.values(),), max(1, shape[dim]) if total is None else total)
        if found := _unsupported(given | options.tensors()):
            name, reason = found
            raise RuntimeError(
                f"{name}: expected a tensor that the kernels take, got one where {reason}"
            )

    def of_checked(self, arguments: Arguments, shard: VocabShard) -> Any:
        """Returns the result of checked arguments, given which classes of how many these are."""
        target, options = (arguments[self.arguments.index(k)] for k in ("target", "options"))
        assert shard.classes is not None
        if target.is_cpu:
            checks.class_indices(shard.classes, target, options.ignore_index)
        return self.of_classes(arguments, ClassRange(shard.first, shard.classes), shard)

    def check_shapes(self, arguments: Arguments, classes: int) -> None:
        """Raises for shapes, dtypes or options that do not fit, given the number of all classes."""
        input, *others = arguments
        shape = *input.shape[:1], classes, *input.shape[2:]
        self.check_arguments(input.new_empty(()).expand(shape), *others)

    def of_dtensors(self, arguments: Arguments) -> Any:
        """Returns the result of DTensors, of which every process has some classes."""
        local = self.local_of(arguments)
        given = dict(zip(self.arguments, local.arguments, strict=True))
        self.check_part(given, local.shard.classes)
        return local.whole(self.of_checked(local.arguments, local.shard))

    def local_of(self, arguments: Arguments) -> Any:
        """Returns this process' part, where classes are sharded along one dimension of a mesh.

        Every process has all of the other tensors, plain ones or replicated DTensors, but for the
        input of a layer: a plain one may be part of a batch, beside a weight sharded by FSDP. Else
        None, as where the kernels do not take this process' tensors.
        """
        input = arguments[0]
        if type(input) is Tensor or not is_dtensor(input):  # first: any call comes here
            return None
        linear, (names, dim) = self.counts_logits, self.by_class
        by_class = arguments[linear]
        if type(by_class) is not type(input) or by_class.dtype not in DTYPES:
            return None
        if by_class.dim() < 2 or (linear and (input.dim() < 2 or by_class.dim() > 2)):
            return None
        from torch.distributed import tensor as dtensor

        given = dict(zip(self.arguments, arguments, strict=True))
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
        if _unsupported(given):
            return None
        if among:
            given["options"] = replace(options, **{name: given.pop(name) for name in among})
        classes, of_mesh = by_class.shape[dim], placements.index(part)
        first = -(-classes // mesh.size(of_mesh)) * mesh.get_local_rank(of_mesh)
        shard = VocabShard(min(classes, first), classes, mesh.get_group(of_mesh))
        return LocalShard(tuple(given.values()), shard, mesh)


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
