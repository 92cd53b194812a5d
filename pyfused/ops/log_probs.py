"""Log-probabilities of class indices, entropies and log-sum-exps, of logits or of a linear layer.

Inside, the three are the first values of one float64 tensor of shape (7, *target.shape), so that a
call has one result and one gradient; ``functional.py`` takes it apart. From the other four the
kernels continue with further classes, and compute gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pyfused import checks
from pyfused.backends import Backend, backend_of
from pyfused.layout import accumulate_dtype
from pyfused.ops.chunk_sizes import TILE, product_dtype, rows_at_once
from pyfused.ops.chunked import Wanted, _add_products, _as, _linear
from pyfused.ops.declaration import Arguments, Operator
from pyfused.ops.dispatch import is_compiled
from pyfused.ops.gradients import backward, differentiate, without_functorch
from pyfused.ops.linear_cross_entropy import spread
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
    log_p, entropy, lse = values[:3].unbind()
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

    def values(self, call: Call, keeps: bool = False) -> tuple[Tensor, Tensor | None]:  # noqa: ARG002
        """Those of each target and, if it ``keeps`` it, what the backward pass may use."""
        (logits, target), options, shard = call
        rows, labels = _as_rows(logits.detach()), target.flatten().contiguous()
        values = rows.new_empty((VALUES, len(rows)), dtype=torch.float64)
        backend_of(logits).log_probs(rows, labels, options, values, shard)
        return values.view(VALUES, *target.shape), None

    def gradients(
        self,
        call: Call,
        wanted: Wanted,  # noqa: ARG002 it is the only one
        values: Tensor,
        grad_values: Tensor,
        kept: Tensor | None = None,  # noqa: ARG002
    ) -> Gradients:
        """Those of all tensors but the target.

        Args:
            values: Of all classes.
            grad_values: Their gradients; only the results have one.
            kept: What the function ``values`` has returned beside them.
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
    kept, ctx.kept = ctx.kept, None
    wanted, call = Wanted(*ctx.needs_input_grad[2:-1]), ctx.op.call(tensors, ctx.options)
    return ctx.op.gradients(call, wanted, values, grad_output, kept)  # type: ignore[no-any-return]


def _definition(ctx: Any, grad_output: Tensor) -> Gradients:
    call = ctx.op.call(ctx.saved_tensors[:-1], ctx.options)
    return ctx.op.define(call, ctx.needs_input_grad[2:-1], grad_output)  # type: ignore[no-any-return]


# ---- of a linear layer ---------------------------------------------------------------------------


@dataclass(eq=False, kw_only=True, repr=False)
class LinearLogProbs(LogProbsOfLogits):
    """The logits of the first rows stay for the backward pass, which makes the others once more."""

    def fused(self, arguments: Arguments, inplace: bool) -> Tensor:
        device = arguments[0].device.type
        if not torch.is_autocast_enabled(device):
            return super().fused(arguments, inplace)
        *tensors, target, options = arguments
        dtype = torch.get_autocast_dtype(device)
        cast = (None if tensor is None else tensor.to(dtype) for tensor in tensors)
        with torch.autocast(device, enabled=False):
            return super().fused((*cast, target, options), inplace)

    def check_shapes(self, arguments: Arguments) -> None:
        checks.linear_log_probs(*arguments)

    def classes(self, tensors: Sequence[Tensor]) -> int:
        return len(tensors[1])

    def strategy(self, input: Tensor) -> str:  # noqa: ARG002
        return "some logits at a time"

    def values(self, call: Call, keeps: bool = False) -> tuple[Tensor, Tensor | None]:
        whole, backend = _head(call.tensors), backend_of(call.tensors[0])
        head, counted = _counted(whole, call.options, backend)
        labels, kept = head.target.flatten(), None
        values = head.input.new_empty((VALUES, len(labels)), dtype=torch.float64)
        for chunk in _chunks(head, call, backend, backwards=True):
            logits, targets, block = chunk.by_target(), chunk.targets, chunk.shard
            given = logits, labels[targets], call.options, values[:, targets], block
            backend.log_probs(*given, continues=chunk.columns.start > 0)
            kept = chunk.logits
        if counted is not None:
            of_rows = values.view(VALUES, len(counted), -1)
            values = values.new_zeros((VALUES, *whole.target.shape))
            values.index_copy_(1, counted, of_rows)
        values = values.view(VALUES, *call.tensors[-1].shape)
        if kept is None or not keeps or kept.shape[1] < head.columns:
            return values, None
        return values, kept.view(-1)

    def gradients(
        self,
        call: Call,
        wanted: Wanted,
        values: Tensor,
        grad_values: Tensor,
        kept: Tensor | None = None,
    ) -> Gradients:
        whole, backend = _head(call.tensors), backend_of(call.tensors[0])
        head, counted = _counted(whole, call.options, backend)
        pair = [x.reshape(len(x), *whole.target.shape) for x in (values, grad_values[:3])]
        pair = [_flat(x if counted is None else x[:, counted]) for x in pair]
        labels = head.target.flatten()
        input, linear_weight, linear_bias, *_ = head
        sums = accumulate_dtype(input.dtype)
        grad_input = backend.empty(input.shape, sums, input) if wanted.input else None
        grad_weight, part = None, None
        if wanted.linear_weight:
            grad_weight = backend.empty((head.columns, input.shape[1]), input.dtype, input)
        grad_bias = input.new_zeros(head.columns, dtype=sums) if wanted.linear_bias else None
        for chunk in _chunks(head, call, backend, kept=kept):
            logits, targets, columns = chunk.by_target(), chunk.targets, chunk.columns
            of_chunk = pair[0][:, targets], pair[1][:, targets]
            given = logits, labels[targets], call.options, *of_chunk, chunk.shard
            backend.log_probs_backward(*given, out=logits)
            if grad_bias is not None:
                grad_bias[columns] += chunk.logits.sum(0, dtype=sums)
            if grad_weight is not None and chunk.rows.start == 0:
                part = grad_weight[columns]
                part = part if part.dtype is sums else backend.empty(part.shape, sums, input)
            _add_products(
                backend,
                (chunk.logits, chunk.weight, chunk.input),
                None,
                None if grad_input is None else (grad_input[chunk.rows], columns.start > 0),
                None if part is None else (part, chunk.rows.start > 0),
            )
            last = chunk.rows.stop == len(input)
            if grad_weight is not None and part is not None and last and sums is not input.dtype:
                grad_weight[columns] = part
        if grad_input is not None:
            grad_input = spread(grad_input, counted, len(whole.input))
        shape = *linear_weight.shape[1:-1], len(linear_weight), -1
        if grad_weight is not None:
            grad_weight = grad_weight.view(shape).movedim(-2, 0)
        if grad_bias is not None:
            grad_bias = grad_bias.view(shape[:-1]).movedim(-1, 0)
        return _as(grad_input, call.tensors[0]), grad_weight, _as(grad_bias, linear_bias)


def _head(tensors: Sequence[Any]) -> Head:
    """With input (N, D) and target (N, d1 * ... * dk)."""
    input, linear_weight, linear_bias, target = tensors
    input = input.detach().reshape(-1, input.shape[-1])
    target = target.reshape(len(input), -1).contiguous()
    bias = None if linear_bias is None else linear_bias.detach()
    return Head(input, linear_weight.detach(), bias, target, None)


LEAST_ROWS_OF_TILE = 16  # of fewer, all classes at a time take as little memory
FIXED_ROWS = 128  # of a product whose size is not to depend on the batch


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


class Chunk(NamedTuple):
    """Some logits of a head, and the matrices that they are the product of.

    A column is a class at one of the positions d1, ..., dk; all classes of a position are
    neighbours. A chunk without all columns is of a head with one position.
    """

    logits: Tensor
    input: Tensor
    weight: Tensor
    rows: slice
    columns: slice
    targets: slice  # of the rows, flat
    shard: VocabShard

    def by_target(self) -> Tensor:
        return self.logits.view(self.targets.stop - self.targets.start, -1)


def _chunks(
    head: Head,
    call: Call,
    backend: Backend,
    backwards: bool = False,
    kept: Tensor | None = None,
) -> Iterator[Chunk]:
    """All rows of some columns after all of others.

    Args:
        backwards: The last rows come first.
        kept: Memory that has the first chunk's logits, and takes the others'.
    """
    input, linear_weight, linear_bias, *_ = head
    n, positions = len(input), linear_weight.shape[1:-1].numel()
    rows, columns = _chunk_size(head, call.options, backend)
    dtype = product_dtype(head, backend)
    weights = linear_weight.movedim(0, -2).reshape(head.columns, -1)
    biases = None if linear_bias is None else linear_bias.movedim(0, -1).flatten()
    linear = _linear_in_fixed_sizes if call.options.deterministic_rows else _linear
    memory = kept
    if memory is None:
        memory = backend.empty((min(rows, n) * columns,), dtype, input)
    for first in range(0, head.columns, columns):
        of_chunk = slice(first, min(first + columns, head.columns))
        shard = call.shard._replace(first=call.shard.first + first)
        weight = weights[of_chunk].to(dtype)
        bias = None if biases is None else biases[of_chunk].to(dtype)
        starts = range(0, n, rows)
        for start in reversed(starts) if backwards else starts:
            here = slice(start, min(start + rows, n))
            x = input[here].to(dtype)
            logits = memory[: len(x) * len(weight)].view(len(x), len(weight))
            if kept is None:
                linear(x, weight, bias, logits)
            kept = None
            targets = slice(here.start * positions, here.stop * positions)
            yield Chunk(logits, x, weight, here, of_chunk, targets, shard)


def _linear_in_fixed_sizes(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """By products of FIXED_ROWS rows, the last of which are filled up with zeros.

    Features are filled up, too: MKL adds those of some rows up in another order if they are not a
    multiple of 4.
    """
    if padding := -x.shape[1] % 16:
        x, weight = F.pad(x, (0, padding)), F.pad(weight, (0, padding))
    for row in range(0, len(x), FIXED_ROWS):
        part, to = x[row : row + FIXED_ROWS], out[row : row + FIXED_ROWS]
        if missing := FIXED_ROWS - len(part):
            product = out.new_empty(FIXED_ROWS, len(weight))
            _linear(F.pad(part, (0, 0, 0, missing)), weight, bias, product)
            to.copy_(product[: len(part)])
        else:
            _linear(part, weight, bias, to)


def _counted(head: Head, options: LogProbsOptions, backend: Backend) -> tuple[Head, Tensor | None]:
    """The rows that count, and which these are, None for all.

    Ignored ones are left out where nobody waits for that, unless none is left then.
    """
    if backend.ASYNCHRONOUS:
        return head, None
    rows = (head.target != options.ignore_index).any(1).nonzero().flatten()
    if len(rows) in (0, len(head.target)):
        return head, None
    return head._replace(input=head.input[rows], target=head.target[rows]), rows
