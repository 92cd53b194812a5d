"""Log-probabilities of class indices, entropies and log-sum-exps, of logits or of a linear layer.

Inside, the three are the first values of one float64 tensor of shape (7, *target.shape), so that a
call has one result and one gradient; ``functional.py`` takes it apart. From the other four the
kernels continue with further classes, and compute gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfused import checks
from pyfused.backends import Backend, backend_of
from pyfused.layout import accumulate_dtype
from pyfused.ops import vocab_parallel
from pyfused.ops.chunk_sizes import TILE, product_dtype, rows_at_once
from pyfused.ops.chunked import (
    FIXED_ROWS,
    Chunk,
    Layer,
    LayerGradients,
    Wanted,
    chunks,
    counted_rows,
    spread,
)
from pyfused.ops.declaration import Arguments, Operator
from pyfused.ops.dispatch import is_compiled
from pyfused.ops.gradients import apply, differentiate, in_autocast_dtype
from pyfused.types import (
    LOG_PROB_VALUES,
    Gradients,
    Head,
    HeadOptions,
    LogProbsCall,
    LogProbsOptions,
    VocabShard,
)


class LogProbs(NamedTuple):
    """Of each target: float32, or float64 of float64; 0 where the target is ignored.

    Attributes:
        log_probability: ``log p_target``, in nats; never above 0.
        entropy: ``-sum_c p_c log p_c``, or None where it was not asked for.
        log_sum_exp: ``log sum_c exp(logit_c)``, or None where it was not asked for.
    """

    log_probability: Tensor
    entropy: Tensor | None = None
    log_sum_exp: Tensor | None = None


def named(values: Tensor, return_entropy: bool, return_lse: bool) -> LogProbs:
    # For unused results unbind's gradient makes plain zeros, which do not mix with DTensors.
    if vocab_parallel.is_dtensor(values):
        log_p, entropy, lse = values[0], values[1], values[2]
    else:
        log_p, entropy, lse = (values if values.shape[0] == 3 else values[:3]).unbind()
    return LogProbs(log_p, entropy if return_entropy else None, lse if return_lse else None)


# ---- of logits -----------------------------------------------------------------------------------


@dataclass(eq=False, kw_only=True, repr=False)
class LogProbsOfLogits(Operator):
    def bind(self, *_: Any, **by_name: Any) -> Arguments:
        names = LogProbsOptions.__dataclass_fields__.keys() & by_name.keys()
        options = LogProbsOptions(**{name: by_name[name] for name in names})
        return *(by_name.get(operand.name) for operand in self.operands), options

    def plan(self, arguments: Arguments, inplace: bool) -> Callable[[Arguments], Tensor]:  # noqa: ARG002
        if self.local_of(arguments) is not None:
            return self._over_shards
        if is_compiled(arguments[0]):
            return self._compiled
        self.check_shapes(arguments)
        *tensors, _, options = arguments
        needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors]
        asynchronous = backend_of(tensors[0]).ASYNCHRONOUS
        dtype = accumulate_dtype(tensors[0].dtype)
        shard = VocabShard(0, self.classes(tensors))
        return LogProbsPlan(self, self.name, options, shard, dtype, tuple(needs), asynchronous)

    def _over_shards(self, arguments: Arguments) -> Tensor:
        """Returns the results of DTensors, of which every process has some classes."""
        local = self.local_of(arguments)
        assert local is not None
        *tensors, options = local.arguments
        found = vocab_parallel.log_probs(self, tensors, options, local.shard)
        return local.whole(found)  # type: ignore[no-any-return]

    def _compiled(self, arguments: Arguments) -> Tensor:
        self.check(arguments)
        *tensors, target, options = arguments
        operator = getattr(torch.ops.pyfused, self.name)
        values: Tensor = operator(*tensors, target.to(torch.int64), *options.values())
        return values.to(accumulate_dtype(tensors[0].dtype))

    def local_of(self, arguments: Arguments) -> vocab_parallel.Local | None:
        return vocab_parallel.local_of(self, arguments)

    def check(self, arguments: Arguments) -> None:
        """Class indices where nobody waits for that; elsewhere NaN is what they give."""
        *tensors, target, options = arguments
        self.check_shapes(arguments)
        if not (is_compiled(tensors[0]) or backend_of(target).ASYNCHRONOUS):
            checks.class_indices(self.classes(tensors), target, options.ignore_index)

    def check_shapes(self, arguments: Arguments) -> None:
        checks.log_probs(*arguments)

    def classes(self, tensors: Sequence[Tensor]) -> int:
        return checks.classes_of(tensors[0])

    def strategy(self, input: Tensor) -> str:  # noqa: ARG002
        return "row by row"

    def call(self, tensors: Sequence[Any], options: LogProbsOptions) -> LogProbsCall:
        """Of all classes."""
        return LogProbsCall(tensors, options, VocabShard(0, self.classes(tensors)))

    def values(self, call: LogProbsCall, keeps: bool = False) -> tuple[Tensor, list[Tensor]]:  # noqa: ARG002
        """Those of each target and, if it ``keeps`` it, what the backward pass may use."""
        (logits, target), options, shard = call
        rows, labels = _as_rows(logits.detach()), target.flatten().contiguous()
        values = rows.new_empty((LOG_PROB_VALUES, rows.shape[0]), dtype=torch.float64)
        backend_of(logits).log_probs(rows, labels, options, values, shard)
        return values.view(LOG_PROB_VALUES, *target.shape), []

    def gradients(
        self,
        call: LogProbsCall,
        wanted: Wanted,  # noqa: ARG002 it is the only one
        values: Tensor,
        grad_values: Tensor,
        kept: list[Tensor],  # noqa: ARG002
    ) -> Gradients:
        """Those of all tensors but the target.

        Args:
            values: Of all classes.
            grad_values: Their gradients; only the results have one.
            kept: What the function ``values`` has returned beside them, which is taken out.
        """
        (logits, target), options, shard = call
        logits = logits.detach()
        rows, backend = _as_rows(logits), backend_of(logits)
        copied = rows.data_ptr() != logits.data_ptr()
        out = rows if copied else backend.empty(rows.shape, rows.dtype, rows)
        labels, pair = target.flatten().contiguous(), (_flat(values), _flat(grad_values[:3]))
        backend.log_probs_backward(rows, labels, options, *pair, shard, out)
        if logits.dim() == 2:
            return (out,)
        dim = min(logits.dim() - 1, 1)
        return (out.view(logits.movedim(dim, -1).shape).movedim(-1, dim),)

    def define(self, call: LogProbsCall, wanted: Sequence[bool], grad_output: Tensor) -> Gradients:
        """The gradients in torch's own terms, themselves differentiable."""
        *differentiated, target = call.tensors

        def definition(*given: Tensor | None) -> Tensor:
            wide = (None if tensor is None else tensor.to(grad_output.dtype) for tensor in given)
            return self.reference(*wide, target, call.options)

        return differentiate(definition, differentiated, wanted, grad_output[:3])


def _as_rows(logits: Tensor) -> Tensor:
    """Logits (C), (N, C) or (N, C, d1, ..., dk) as rows of contiguous classes."""
    if logits.dim() == 2 and logits.stride(1) == 1:
        return logits
    rows = logits.movedim(min(logits.dim() - 1, 1), -1)
    rows = rows.reshape(-1, rows.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _flat(values: Tensor) -> Tensor:
    return values.reshape(values.shape[0], -1).contiguous()


@dataclass(eq=False)
class LogProbsPlan:
    """Computes the calls of one signature.

    Attributes:
        shard: All classes.
        dtype: The dtype of the results.
        needs: The tensors that need a gradient.
        asynchronous: Reading class indices would synchronise with the device, so that one out of
            range gives NaN and no error.
    """

    op: LogProbsOfLogits
    name: str
    options: LogProbsOptions
    shard: VocabShard
    dtype: torch.dtype
    needs: tuple[bool, ...]
    asynchronous: bool

    def __call__(self, arguments: Arguments) -> Tensor:
        *tensors, target, _ = arguments
        if not self.asynchronous:
            checks.class_indices(self.shard.classes, target, self.options.ignore_index)
        target = target if target.dtype is torch.int64 else target.to(torch.int64)
        if True in self.needs:
            results: Tensor = apply(self, *tensors, target)
            return results
        return self.forward(None, (*tensors, target))

    def forward(self, ctx: Any, tensors: Sequence[Any]) -> Tensor:
        """Returns the first three values, which are the results."""
        values, kept = self.op.values(
            LogProbsCall(tensors, self.options, self.shard), ctx is not None
        )
        if ctx is not None:
            ctx.kept = kept
            ctx.save_for_backward(*tensors, values)
        return values[:3].to(self.dtype)

    def backward(self, ctx: Any, grad_output: Tensor) -> Gradients:
        *tensors, values = ctx.saved_tensors
        call, wanted = LogProbsCall(tensors, self.options, self.shard), Wanted(*self.needs)
        return self.op.gradients(call, wanted, values, grad_output.double(), ctx.kept)

    def define(self, ctx: Any, grad_output: Tensor) -> Gradients:
        call = LogProbsCall(ctx.saved_tensors[:-1], self.options, self.shard)
        return self.op.define(call, self.needs, grad_output.double())


# ---- of a linear layer ---------------------------------------------------------------------------


@dataclass(eq=False, kw_only=True, repr=False)
class LinearLogProbs(LogProbsOfLogits):
    """The logits of the first rows stay for the backward pass, which makes the others once more."""

    def plan(self, arguments: Arguments, inplace: bool) -> Callable[[Arguments], Tensor]:
        if not torch.is_autocast_enabled(arguments[-2].device.type):
            return super().plan(arguments, inplace)

        def run(arguments: Arguments) -> Tensor:
            *tensors, target, options = arguments
            without_autocast, tensors = in_autocast_dtype(target.device.type, tensors)
            given = *tensors, target, options
            with without_autocast:
                return super(LinearLogProbs, self).plan(given, inplace)(given)

        return run

    def check_shapes(self, arguments: Arguments) -> None:
        checks.linear_log_probs(*arguments)

    def classes(self, tensors: Sequence[Tensor]) -> int:
        return len(tensors[1])

    def strategy(self, input: Tensor) -> str:  # noqa: ARG002
        return "some logits at a time"

    def values(self, call: LogProbsCall, keeps: bool = False) -> tuple[Tensor, list[Tensor]]:
        backend, target = backend_of(call.tensors[0]), call.tensors[-1]
        layer, labels, kept, size, dtype = _part(call, backend)
        values, output = target.new_empty((LOG_PROB_VALUES, len(labels)), dtype=torch.float64), None
        fixed = call.options.deterministic_rows
        for chunk in chunks(backend, layer, dtype, size, backwards=True, fixed_sizes=fixed):
            logits, targets, shard = _by_target(chunk, call)
            given = logits, labels[targets], call.options, values[:, targets], shard
            backend.log_probs(*given, continues=chunk.columns.start > 0)
            output = chunk.output
        if kept is not None:
            n, of_rows = (
                call.tensors[0].shape[:-1].numel(),
                values.view(LOG_PROB_VALUES, len(kept), -1),
            )
            values = values.new_zeros((LOG_PROB_VALUES, n, of_rows.shape[2])).index_copy_(
                1, kept, of_rows
            )
        values = values.view(LOG_PROB_VALUES, *target.shape)
        if output is None or not keeps or output.shape[1] < len(layer.weight):
            return values, []
        return values, [output.view(-1)]

    def gradients(
        self,
        call: LogProbsCall,
        wanted: Wanted,
        values: Tensor,
        grad_values: Tensor,
        kept: list[Tensor],
    ) -> Gradients:
        input, linear_weight, *_ = call.tensors
        backend, n = backend_of(input), input.shape[:-1].numel()
        layer, labels, rows, size, dtype = _part(call, backend)
        pair = [x.reshape(len(x), n, -1) for x in (values, grad_values[:3])]
        values, grad_values = (_flat(x if rows is None else x[:, rows]) for x in pair)
        sums = LayerGradients(backend, layer, dtype, size, wanted)

        def add(chunk: Chunk) -> None:
            logits, targets, shard = _by_target(chunk, call)
            given = logits, labels[targets], call.options, values[:, targets]
            backend.log_probs_backward(*given, grad_values[:, targets], shard, out=logits)
            sums.add(chunk, chunk.output)

        each = chunks(
            *(backend, layer, dtype, size),
            memory=kept.pop() if kept else None,
            fixed_sizes=call.options.deterministic_rows,
        )
        for _ in map(add, each):
            pass  # and holds no chunk when it is through
        of_input, of_weight, of_bias = sums.like(layer)
        shape = *linear_weight.shape[1:-1], len(linear_weight)
        return (
            None if of_input is None else spread(of_input, rows, n).view(input.shape),
            None if of_weight is None else of_weight.view(*shape, -1).movedim(-2, 0),
            None if of_bias is None else of_bias.view(shape).movedim(-1, 0),
        )


class _Part(NamedTuple):
    """What of a call counts.

    Attributes:
        layer: The classes at one of the positions d1, ..., dk are neighbours.
        labels: Flat.
        rows: Those of the whole layer, None for all.
        size: Rows and columns of a chunk.
        dtype: That of the products.
    """

    layer: Layer
    labels: Tensor
    rows: Tensor | None
    size: tuple[int, int]
    dtype: torch.dtype


def _part(call: LogProbsCall, backend: Backend) -> _Part:
    input, weight, bias, target = call.tensors
    input, weight = input.detach().reshape(-1, input.shape[-1]), weight.detach()
    target = target.reshape(len(input), -1)
    rows = counted_rows(target, call.options.ignore_index, backend)
    if rows is not None:
        input, target = input[rows], target[rows]
    head = Head(input, weight, bias, target, None)
    bias = None if bias is None else bias.detach().movedim(0, -1).flatten()
    layer = Layer(input, weight.movedim(0, -2).reshape(head.columns, -1), bias)
    size, dtype = _chunk_size(head, call.options, backend), product_dtype(head, backend)
    return _Part(layer, target.flatten().contiguous(), rows, size, dtype)


def _by_target(chunk: Chunk, call: LogProbsCall) -> tuple[Tensor, slice, VocabShard]:
    """The logits of each target, which targets these are, and of which classes."""
    positions = call.tensors[1].shape[1:-1].numel()
    targets = slice(chunk.rows.start * positions, chunk.rows.stop * positions)
    shard = call.shard._replace(first=call.shard.first + chunk.columns.start)
    return chunk.output.view(len(chunk.input) * positions, -1), targets, shard


LEAST_ROWS_OF_TILE = 16  # of fewer, all classes at a time take as little memory


def _chunk_size(head: Head, options: LogProbsOptions, backend: Backend) -> tuple[int, int]:
    """All columns of some rows, or TILE classes of them.

    Results do not depend on where the classes are cut, as TILE is a multiple of kChunk.
    """
    budget, n = options.memory_budget, len(head.input)
    rows = rows_at_once(head, HeadOptions(memory_budget=budget), backend)
    if options.deterministic_rows:
        return max(1, rows // FIXED_ROWS) * FIXED_ROWS, head.columns
    if rows:
        return rows, head.columns
    if budget is None:
        return TILE, TILE
    itemsize = product_dtype(head, backend).itemsize
    rows = budget // (itemsize * TILE) - 3 * head.input.shape[1]
    if rows < LEAST_ROWS_OF_TILE:
        return max(1, min(n, budget // (itemsize * head.columns))), head.columns
    return min(rows, TILE), TILE
