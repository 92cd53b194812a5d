"""Cross-entropy of a linear layer's logits that never exist as a whole: the loops.

How many rows or classes a chunk has is decided in `chunk_sizes.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfused.backends import Backend
from pyfused.layout import accumulate_dtype
from pyfused.ops.chunk_sizes import product_dtype
from pyfused.ops.metrics import MergedStatistics, RowStatistics
from pyfused.types import (
    CrossEntropyOptions,
    Gradients,
    Head,
    HeadOptions,
    Statistics,
    VocabShard,
    Want,
)


class Wanted(NamedTuple):
    """Which gradients are."""

    input: bool = False
    linear_weight: bool = False
    linear_bias: bool = False
    target: bool = False

    def logits(self) -> bool:
        return self.input or self.linear_weight or self.linear_bias


# ---- by rows -------------------------------------------------------------------------------------


def by_rows(
    backend: Backend,
    head: Head,
    options: HeadOptions,
    rows: int,
    want_loss: bool,
    wanted: Wanted,
    grad_output: Tensor | None,
    statistics: RowStatistics | None = None,
) -> tuple[Tensor | None, Gradients]:
    """Loss and gradients, each where wanted; the loss is a sum in float64, or one a row.

    Args:
        grad_output: The loss's gradient, of the loss's shape; None stands for ones.
        statistics: Where to write them, None where they are not wanted.
    """
    *_, target, weight = head
    dtype, each = product_dtype(head, backend), options.reduction == "none"
    options = replace(options, reduction="none" if each else "sum", denominator=None)
    grad_target = torch.empty_like(target) if wanted.target else None
    want = Want(want_loss, (wanted.logits(), wanted.target) if any(wanted) else (), True)
    shape = head.linear_weight.shape[:-1]

    def of_chunk(logits: Tensor, here: slice) -> OfChunk:
        targets = target[here].to(dtype) if target.is_floating_point() else target[here]
        capped = _cap(backend, logits, options.softcap).view(-1, *shape)
        wants = want
        if statistics is not None:
            per_row = shape[1:].numel()
            part = statistics.at(slice(here.start * per_row, here.stop * per_row))
            wants = want._replace(statistics=part.before(backend, capped, targets, options))
        of_rows = grad_output[here] if grad_output is not None and each else grad_output
        loss, (_, of_target) = backend.cross_entropy(
            capped, targets, weight, _of_rows(options, here), wants, of_rows
        )
        if grad_target is not None:
            assert of_target is not None
            grad_target[here] = of_target
        if not wanted.logits():
            return loss, None, None
        gradient = _uncap(backend, capped.view_as(logits), logits, options.softcap)
        return loss, gradient, _classes_that_count(gradient, of_rows, options.filter_eps)

    losses, gradients = linear_by_rows(backend, head[:3], dtype, rows, wanted, of_chunk)
    return _joined(losses, each), (*gradients, grad_target)


# Of a chunk of logits the loss, the gradient, which may have their memory, and the classes where
# that counts; each None where there is none, and the last for all classes.
OfChunk = tuple[Tensor | None, Tensor | None, Tensor | None]


def linear_by_rows(
    backend: Backend,
    layer: Sequence[Any],
    dtype: torch.dtype,
    rows: int,
    wanted: Sequence[bool],
    of_chunk: Callable[[Tensor, slice], OfChunk],
) -> tuple[list[Tensor | None], Gradients]:
    """Losses of a linear layer's output, a chunk of rows at a time, and the layer's gradients.

    Args:
        layer: Input, weight and bias or None.
        dtype: That of the output.
        wanted: Which gradients are; others than the layer's are not looked at.
        of_chunk: From some rows of the output, and which rows these are.
    """
    input, linear_weight, linear_bias = layer
    n, flat, sums = len(input), linear_weight.flatten(0, -2).to(dtype), accumulate_dtype(dtype)
    bias = None if linear_bias is None else linear_bias.flatten().to(dtype)
    memory = backend.empty((rows, len(flat)), dtype, input)
    grad_input = backend.empty(input.shape, dtype, input) if wanted[0] else None
    grad_weight = backend.empty(flat.shape, sums, input) if wanted[1] else None
    grad_bias = input.new_zeros(len(flat), dtype=sums) if wanted[2] else None
    losses = []
    for first in range(0, n, rows):
        here = slice(first, min(first + rows, n))
        x, logits = input[here].to(dtype), memory[: here.stop - first]
        _linear(x, flat, bias, logits)
        loss, gradient, kept = of_chunk(logits, here)
        losses.append(loss)
        if gradient is None:
            continue
        _add_products(
            backend,
            (gradient, flat, x),
            kept,
            None if grad_input is None else (grad_input[here], False),
            None if grad_weight is None else (grad_weight, first > 0),
        )
        if grad_bias is not None:
            grad_bias += gradient.sum(0, dtype=sums)
    layers = (grad_input, input), (grad_weight, linear_weight), (grad_bias, linear_bias)
    return losses, tuple(_as(gradient, of) for gradient, of in layers)


def _joined(losses: list[Tensor | None], each: bool) -> Tensor | None:
    """The losses of chunks of rows as one tensor, None where they are not wanted."""
    parts = [loss for loss in losses if loss is not None]
    if not parts:
        return None
    return torch.cat(parts) if each else torch.stack(parts).sum(dtype=torch.float64)


# ---- by blocks of classes ------------------------------------------------------------------------


def sums_by_blocks(
    backend: Backend,
    head: Head,
    options: HeadOptions,
    tile: int,
    shard: VocabShard,
    statistics: MergedStatistics | None = None,
) -> tuple[Tensor, Tensor]:
    """The log-sum-exp of each row, and the sum of its ``q_c x_c``; in float64.

    Args:
        shard: The head's classes among all.
        statistics: What merges other statistics of the blocks, None where they are not wanted.
    """
    input, target = head.input, head.target
    lse = input.new_full((len(input),), -torch.inf, dtype=torch.float64)
    target_logits = torch.zeros_like(lse)
    for logits, _, here, first in _tiles(backend, head, tile):
        block = shard._replace(first=shard.first + first)
        logits = _cap(backend, logits, options.softcap)
        every = RowStatistics.empty(len(logits), logits)
        of_block = Statistics(*every[1:]) if statistics else Statistics(every.log_sum_exp)
        part = sums_of_block(backend, logits, target[here], head.weight, options, block, of_block)
        if statistics:
            statistics.add(here, logits, target[here], block.first, of_block, options.scale)
        torch.logaddexp(lse[here], of_block.log_sum_exp, out=lse[here])
        target_logits[here] += part
    return lse, target_logits


def sums_of_block(
    backend: Backend,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: CrossEntropyOptions,
    shard: VocabShard,
    statistics: Statistics,
) -> Tensor:
    """Computes statistics of logits that are there, and returns the sum of ``q_c x_c`` of each row.

    The loss over some of the classes, with 0 for the log-sum-exp, is that sum times -1.
    """
    plain = CrossEntropyOptions(
        options.ignore_index, "none", options.label_smoothing, scale=options.scale
    )
    given = logits, target, weight, plain
    backend.cross_entropy(*given, Want(False, statistics=statistics), None, shard)
    shard = shard._replace(lse=torch.zeros_like(statistics.log_sum_exp))
    part, _ = backend.cross_entropy(*given, Want(), None, shard)
    assert part is not None
    return -part.flatten().double()


def loss_of_sums(
    options: CrossEntropyOptions,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    target_logits: Tensor,
) -> Tensor:
    """The loss of each row, in float64: sum_c q_c lse - sum_c q_c x_c + z_loss lse^2."""
    target_sum: Tensor | float = 1.0
    if weight is not None:
        smoothing, target_weight = options.label_smoothing, _target_weight(target, weight, options)
        target_sum = smoothing * weight.double().mean() + (1 - smoothing) * target_weight
    loss = target_sum * lse - target_logits
    if options.z_loss:
        loss = loss + options.z_loss * lse.square()
    if options.token_weight is not None:
        loss = loss * options.token_weight
    return loss.where(target != options.ignore_index, 0)


def gradients_by_blocks(
    backend: Backend,
    head: Head,
    options: HeadOptions,
    tile: int,
    wanted: Wanted,
    shard: VocabShard,
    grad_output: Tensor,
) -> Gradients:
    """Those of the sum of ``grad_output`` times the loss of each row.

    Args:
        shard: The head's classes among all, with the log-sum-exp of all.
    """
    input, linear_weight, linear_bias, target, weight = head
    sums, classes = accumulate_dtype(input.dtype), len(linear_weight)
    assert shard.lse is not None
    want = Want(False, (True, False), True)
    options = replace(options, reduction="none", denominator=None)
    grad_input = input.new_zeros(input.shape, dtype=sums) if wanted.input else None
    grad_weight = None
    if wanted.linear_weight:
        grad_weight = backend.empty(linear_weight.shape, input.dtype, input)
    grad_bias = input.new_zeros(classes, dtype=sums) if wanted.linear_bias else None
    part = None
    for logits, (x, of_classes), here, first in _tiles(backend, head, tile):
        block = VocabShard(shard.first + first, shard.classes, shard.lse[here])
        of_rows, capped = grad_output[here], _cap(backend, logits, options.softcap)
        given = target[here], weight, _of_rows(options, here), want, of_rows, block
        backend.cross_entropy(capped, *given)
        gradient = _uncap(backend, capped, logits, options.softcap)
        of_block = slice(first, first + len(of_classes))
        if grad_bias is not None:
            grad_bias[of_block] += gradient.sum(0, dtype=sums)
        if grad_weight is not None and (part is None or here.start == 0):
            part = backend.empty(of_classes.shape, sums, input)
        _add_products(
            backend,
            (gradient, of_classes, x),
            _classes_that_count(gradient, of_rows, options.filter_eps),
            None if grad_input is None else (grad_input[here], True),
            None if part is None else (part, here.start > 0),
        )
        if grad_weight is not None and part is not None and here.stop == len(input):
            grad_weight[of_block] = part
    return _as(grad_input, input), grad_weight, _as(grad_bias, linear_bias), None


def _tiles(
    backend: Backend, head: Head, tile: int
) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor], slice, int]]:
    """Logits, the matrices they are the product of, their rows and their first class."""
    input, linear_weight, linear_bias, *_ = head
    n, classes, dtype = len(input), len(linear_weight), product_dtype(head, backend)
    memory = input.new_empty(min(tile, n) * min(tile, classes), dtype=dtype)
    for first in range(0, classes, tile):
        of_classes = linear_weight[first : first + tile].to(dtype)
        bias = None if linear_bias is None else linear_bias[first : first + tile].to(dtype)
        for row in range(0, n, tile):
            here = slice(row, min(row + tile, n))
            x = input[here].to(dtype)
            size = len(x) * len(of_classes)
            logits = memory[:size].view(len(x), len(of_classes))
            _linear(x, of_classes, bias, logits)
            yield logits, (x, of_classes), here, first


def weight_of_targets(
    target: Tensor, weight: Tensor | None, options: CrossEntropyOptions
) -> Tensor:
    """The denominator of a mean: the weight of the targets that are not ignored, in float64."""
    counted = (target != options.ignore_index).double()
    if weight is not None:
        counted *= _target_weight(target, weight, options)
    if options.token_weight is not None:
        counted *= options.token_weight
    return counted.sum()


def _target_weight(target: Tensor, weight: Tensor, options: CrossEntropyOptions) -> Tensor:
    """The class weight of each target, in float64; any number for one that is ignored."""
    label = target.where(target != options.ignore_index, 0).clamp(0, len(weight) - 1)
    return weight.double()[label]


# ---- softcap -------------------------------------------------------------------------------------


def _cap(backend: Backend, logits: Tensor, softcap: float | None) -> Tensor:
    """The logits themselves where there is no softcap."""
    return logits if softcap is None else backend.activation("softcap", logits, (softcap,))


def _uncap(backend: Backend, gradient: Tensor, logits: Tensor, softcap: float | None) -> Tensor:
    """The gradient of the logits, given that of the capped ones."""
    if softcap is None:
        return gradient
    return backend.activation_backward("softcap", gradient, logits, (softcap,))


# ---- products ------------------------------------------------------------------------------------


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


MOST_KEPT = 0.5  # of a block's classes; more are not worth their copies


def _classes_that_count(
    gradient: Tensor, grad_output: Tensor | None, filter_eps: float
) -> Tensor | None:
    """The columns of a block of gradients where any is at least ``filter_eps * grad_output``.

    None stands for all: where nothing is to be left out, or too little.
    """
    if not filter_eps:
        return None
    least = filter_eps if grad_output is None else filter_eps * float(grad_output.abs().max())
    low, high = gradient.aminmax(dim=0)
    kept = (~((high < least) & (low > -least))).nonzero().flatten()  # a NaN counts
    return kept if len(kept) < MOST_KEPT * len(low) else None


def _add_products(
    backend: Backend,
    block: tuple[Tensor, Tensor, Tensor],
    kept: Tensor | None,
    to_input: tuple[Tensor, bool] | None,
    to_weight: tuple[Tensor, bool] | None,
) -> None:
    """Multiplies a block of gradients of logits with its classes' weight and its rows' input.

    Args:
        to_input, to_weight: Where the products go, and whether they are added to what is there.
    """
    gradient, of_classes, x = block
    if kept is not None:
        gradient, of_classes = gradient[:, kept], of_classes[kept]
    if to_input is not None:
        backend.add_product(to_input[0], gradient, of_classes, float(to_input[1]))
    if to_weight is None:
        return
    to, add = to_weight
    if kept is None:
        backend.add_product(to, gradient.t(), x, float(add))
    else:
        to = to if add else to.zero_()
        to.index_add_(0, kept, torch.mm(gradient.t(), x).to(to.dtype))


def _of_rows(options: HeadOptions, here: slice) -> HeadOptions:
    if options.token_weight is None:
        return options
    return replace(options, token_weight=options.token_weight[here])


def _as(gradient: Tensor | None, of: Tensor | None) -> Tensor | None:
    if gradient is None or of is None:
        return None
    return gradient.reshape(of.shape).to(of.dtype)
