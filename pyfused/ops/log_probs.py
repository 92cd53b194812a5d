"""Log-probabilities of class indices, entropies and log-sum-exps, of logits or of a linear layer.

Inside, the three are the first values of one float64 tensor of shape (7, *target.shape), so that a
call has one result and one gradient; ``functional.py`` takes it apart. From the other four the
kernels continue with further classes, and compute gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from pyfused.ops.gradients import backward, differentiate, in_autocast_dtype, without_functorch
from pyfused.types import Gradients, Head, HeadOptions, LogProbsOptions, VocabShard

VALUES = 7  # of each row


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
    rows = values if type(values).__name__ == "DTensor" else values[:3].unbind()
    log_p, entropy, lse = (rows[i] for i in range(3))
    return LogProbs(log_p, entropy if return_entropy else None, lse if return_lse else None)


class Call(NamedTuple):
    """The tensors are those with a gradient, and the target last; the shard is of all classes."""

    tensors: Sequence[Any]
    options: LogProbsOptions
    shard: VocabShard


# ---- of logits -----------------------------------------------------------------------------------


@dataclass(eq=False, kw_only=True, repr=False)
class LogProbsOfLogits(Operator):
    def bind(self, *_: Any, **by_name: Any) -> Arguments:
        names = LogProbsOptions.__dataclass_fields__.keys() & by_name.keys()
        options = LogProbsOptions(**{name: by_name[name] for name in names})
        return *(by_name.get(operand.name) for operand in self.operands), options

    def fused(self, arguments: Arguments, inplace: bool) -> Tensor:  # noqa: ARG002
        if (local := self.local_of(arguments)) is not None:
            *tensors, options = local.arguments
            found = vocab_parallel.log_probs(self, tensors, options, local.shard)
            return local.whole(found)  # type: ignore[no-any-return]
        self.check(arguments)
        *tensors, target, options = arguments
        tensors.append(target.to(torch.int64))
        if is_compiled(tensors[0]):
            values = getattr(torch.ops.pyfused, self.name)(*tensors, *options.values())
        elif torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            values = _apply(self, options, *tensors)
        else:
            values, _ = self.values(self.call(tensors, options))
        return values.to(accumulate_dtype(tensors[0].dtype))  # type: ignore[no-any-return]

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

    def call(self, tensors: Sequence[Any], options: LogProbsOptions) -> Call:
        """Of all classes."""
        return Call(tensors, options, VocabShard(0, self.classes(tensors)))

    def values(self, call: Call, keeps: bool = False) -> tuple[Tensor, list[Tensor]]:  # noqa: ARG002
        """Those of each target and, if it ``keeps`` it, what the backward pass may use."""
        (logits, target), options, shard = call
        rows, labels = _as_rows(logits.detach()), target.flatten().contiguous()
        values = rows.new_empty((VALUES, len(rows)), dtype=torch.float64)
        backend_of(logits).log_probs(rows, labels, options, values, shard)
        return values.view(VALUES, *target.shape), []

    def gradients(
        self,
        call: Call,
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
        dim = min(logits.dim() - 1, 1)
        return (out.view(logits.movedim(dim, -1).shape).movedim(-1, dim),)

    def define(self, call: Call, wanted: Sequence[bool], grad_output: Tensor) -> Gradients:
        """The gradients in torch's own terms, themselves differentiable."""
        *differentiated, target = call.tensors

        def definition(*given: Tensor | None) -> Tensor:
            wide = (None if tensor is None else tensor.to(grad_output.dtype) for tensor in given)
            return self.reference(*wide, target, call.options)

        return differentiate(definition, differentiated, wanted, grad_output[:3])


def _as_rows(logits: Tensor) -> Tensor:
    """Logits (C), (N, C) or (N, C, d1, ..., dk) as rows of contiguous classes."""
    rows = logits.movedim(min(logits.dim() - 1, 1), -1)
    rows = rows.reshape(-1, rows.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _flat(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1).contiguous()


class LogProbsFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: LogProbsOfLogits, options: LogProbsOptions, *tensors: Any) -> Tensor:
        values, ctx.kept = op.values(op.call(tensors, options), keeps=True)
        ctx.op, ctx.options, ctx.gradients = op, options, None
        ctx.save_for_backward(*tensors, values)
        return values

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        found = backward(ctx.op.name, ctx, grad_output, _kernel, _definition)
        return None, None, *found, None


_apply = without_functorch(LogProbsFunction)


def _kernel(ctx: Any, grad_output: Tensor) -> Gradients:
    *tensors, values = ctx.saved_tensors
    wanted, call = Wanted(*ctx.needs_input_grad[2:-1]), ctx.op.call(tensors, ctx.options)
    return ctx.op.gradients(call, wanted, values, grad_output, ctx.kept)  # type: ignore[no-any-return]


def _definition(ctx: Any, grad_output: Tensor) -> Gradients:
    call = ctx.op.call(ctx.saved_tensors[:-1], ctx.options)
    return ctx.op.define(call, ctx.needs_input_grad[2:-1], grad_output)  # type: ignore[no-any-return]


# ---- of a linear layer ---------------------------------------------------------------------------


@dataclass(eq=False, kw_only=True, repr=False)
class LinearLogProbs(LogProbsOfLogits):
    """The logits of the first rows stay for the backward pass, which makes the others once more."""

    def fused(self, arguments: Arguments, inplace: bool) -> Tensor:
        *tensors, target, options = arguments
        without_autocast, tensors = in_autocast_dtype(target.device.type, tensors)
        with without_autocast:
            return super().fused((*tensors, target, options), inplace)

    def check_shapes(self, arguments: Arguments) -> None:
        checks.linear_log_probs(*arguments)

    def classes(self, tensors: Sequence[Tensor]) -> int:
        return len(tensors[1])

    def strategy(self, input: Tensor) -> str:  # noqa: ARG002
        return "some logits at a time"

    def values(self, call: Call, keeps: bool = False) -> tuple[Tensor, list[Tensor]]:
        backend, target = backend_of(call.tensors[0]), call.tensors[-1]
        layer, labels, kept, size, dtype = _part(call, backend)
        values, output = target.new_empty((VALUES, len(labels)), dtype=torch.float64), None
        fixed = call.options.deterministic_rows
        for chunk in chunks(backend, layer, dtype, size, backwards=True, fixed_sizes=fixed):
            logits, targets, shard = _by_target(chunk, call)
            given = logits, labels[targets], call.options, values[:, targets], shard
            backend.log_probs(*given, continues=chunk.columns.start > 0)
            output = chunk.output
        if kept is not None:
            n, of_rows = call.tensors[0].shape[:-1].numel(), values.view(VALUES, len(kept), -1)
            values = values.new_zeros((VALUES, n, of_rows.shape[2])).index_copy_(1, kept, of_rows)
        values = values.view(VALUES, *target.shape)
        if output is None or not keeps or output.shape[1] < len(layer.weight):
            return values, []
        return values, [output.view(-1)]

    def gradients(
        self,
        call: Call,
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


def _part(call: Call, backend: Backend) -> _Part:
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


def _by_target(chunk: Chunk, call: Call) -> tuple[Tensor, slice, VocabShard]:
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
