"""Cross-entropy of logits that never exist as a whole: a linear layer's, some at a time.

Two ways through the matrix of logits. By rows, each with all of its classes, at three matrix
products: the logits, and the gradients of input and weight. Or by blocks of classes, at four, as
the log-sum-exp of all has to be known before a gradient is: then no sum over rows is ever rounded
to half precision, and what is held at once can be as small as one likes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pyfused.backends import (
    Backend,
    CrossEntropyOptions,
    Gradients,
    Head,
    Measures,
    VocabShard,
    Want,
    cpu,
)
from pyfused.backends.layout import accumulate_dtype
from pyfused.ops.metrics import Blocks, Measured
from pyfused.ops.shaping import gradient_of, shape


class Wanted(NamedTuple):
    """Whose gradients are."""

    input: bool = False
    linear_weight: bool = False
    linear_bias: bool = False
    target: bool = False

    def logits(self) -> bool:
        return self.input or self.linear_weight or self.linear_bias


# ---- how much at once ----------------------------------------------------------------------------

# Rows of logits at a time: of (1024, 512, 32000), with 64 the gradients take 1.6 times as long as
# with 512, with 128 1.3, with 256 1.1 times.
MOST_ROWS = 512
# Fewer rows than these cost more than the fourth product of the way by blocks.
LEAST_ROWS = 96
SMALL = 16 << 20  # bytes that are not worth saving
TILE = 1024  # rows, and classes, of a block


def product_dtype(head: Head) -> torch.dtype:
    """What matrices are multiplied in.

    A CPU without instructions for it multiplies half precision 3 to 250 times slower than float32.
    """
    dtype = head.input.dtype
    if head.target.is_floating_point():
        dtype = torch.promote_types(dtype, head.target.dtype)
    if not head.input.is_cpu or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    return dtype if dtype is torch.bfloat16 and MULTIPLIES_BFLOAT16 else torch.float32


MULTIPLIES_BFLOAT16 = bool(
    torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
)


def rows_at_once(head: Head, memory_budget: int | None) -> int:
    """Rows of logits that fit the budget; 0 where blocks of classes are the better way."""
    n, dtype = len(head.input), product_dtype(head)
    row = head.columns * dtype.itemsize * (1 if head.shaping.softcap is None else 3)
    rows = min(max(n * row // 4, SMALL) // row, MOST_ROWS)
    if memory_budget is not None:
        rows = memory_budget // row
    if not head.takes_blocks():
        return max(1, min(n, rows))
    widened = head.input.is_cpu and dtype is not head.input.dtype
    return 0 if widened or rows < min(n, LEAST_ROWS) else min(n, rows)


def tile_of(head: Head, memory_budget: int | None) -> int:
    """Rows and classes of a block, whose logits fit the budget with what they are made of."""
    tile, size, features = TILE, product_dtype(head).itemsize, head.input.shape[1]
    if memory_budget is not None:
        while tile > 16 and size * tile * (tile + 3 * features) > memory_budget:
            tile //= 2
    return tile


# ---- by rows -------------------------------------------------------------------------------------


def by_rows(
    backend: Backend,
    head: Head,
    options: CrossEntropyOptions,
    rows: int,
    want_loss: bool,
    wanted: Wanted,
    grad_output: Tensor | None,
    filter_eps: float,
    measured: Measured | None = None,
) -> tuple[Tensor | None, Gradients]:
    """Loss and gradients, each where wanted; the loss is a sum in float64, or one a position.

    Args:
        grad_output: The loss's gradient, of the loss's shape; None stands for ones.
        filter_eps: See `_classes_that_count`.
        measured: Where to write what is measured, None where nothing is.
    """
    input, linear_weight, linear_bias, target, weight, shaping = head
    n, dtype, each = len(input), product_dtype(head), options.reduction == "none"
    options = options._replace(reduction="none" if each else "sum", denominator=None)
    flat = linear_weight.reshape(head.columns, -1).to(dtype)
    bias = None if linear_bias is None else linear_bias.reshape(-1).to(dtype)
    memory = _empty((rows, head.columns), dtype, input)
    grad_input = _empty(input.shape, dtype, input) if wanted.input else None
    sums = accumulate_dtype(dtype)
    grad_weight = _empty(flat.shape, sums, input) if wanted.linear_weight else None
    grad_bias = input.new_zeros(head.columns, dtype=sums) if wanted.linear_bias else None
    grad_target = torch.empty_like(target) if wanted.target else None
    want = Want(want_loss, (wanted.logits(), wanted.target) if any(wanted) else (), True)
    of_row = linear_weight.shape[1:-1].numel()
    losses = []
    for first in range(0, n, rows):
        here = slice(first, min(first + rows, n))
        x, logits = input[here].to(dtype), memory[: here.stop - first]
        _linear(x, flat, bias, logits)
        targets = target[here].to(dtype) if target.is_floating_point() else target[here]
        shaped = shape(backend, shaping, logits.view(-1, *linear_weight.shape[:-1]), targets)
        if measured is not None:
            now = slice(here.start * of_row, here.stop * of_row)
            measures = measured.at(now).before(
                backend, shaped.capped, targets, options.ignore_index
            )
            want = want._replace(measures=measures)
        of_rows = grad_output[here] if grad_output is not None and each else grad_output
        loss, (_, of_target) = backend.cross_entropy(
            shaped.capped, targets, weight, _of_rows(options, here), want, of_rows
        )
        losses.append(loss)
        if wanted.logits():
            logits = gradient_of(backend, shaping, shaped, shaped.capped).view_as(logits)
            _add_products(
                (logits, flat, x),
                _classes_that_count(logits, of_rows, filter_eps),
                None if grad_input is None else (grad_input[here], False),
                None if grad_weight is None else (grad_weight, first > 0),
            )
        if grad_target is not None:
            assert of_target is not None
            grad_target[here] = of_target
        if grad_bias is not None:
            grad_bias += logits.sum(0, dtype=sums)
    found = None
    if want_loss:
        parts = [loss for loss in losses if loss is not None]
        found = torch.cat(parts) if each else torch.stack(parts).sum(dtype=torch.float64)
    return found, (
        _as(grad_input, input),
        _as(grad_weight, linear_weight),
        _as(grad_bias, linear_bias),
        grad_target,
    )


# ---- by blocks of classes ------------------------------------------------------------------------


def sums_by_blocks(
    backend: Backend,
    head: Head,
    options: CrossEntropyOptions,
    tile: int,
    first_class: int = 0,
    classes: int | None = None,
    blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor]:
    """The log-sum-exp of each row, and the sum of its ``q_c x_c``; in float64.

    Args:
        first_class, classes: Where the head's classes stand among all.
        blocks: What takes in what else is measured, None where nothing is.
    """
    input, _, _, target, weight, shaping = head
    classes = len(head.linear_weight) if classes is None else classes
    lse = input.new_full((len(input),), -torch.inf, dtype=torch.float64)
    target_logits = torch.zeros_like(lse)
    for logits, _, here, first in _tiles(head, tile):
        vocab_shard = VocabShard(first_class + first, classes)
        logits = shape(backend, shaping, logits, target[here], vocab_shard.first).capped
        block = Measured.empty(len(logits), logits)
        measures = Measures(*block[1:]) if blocks else Measures(block.log_sum_exp)
        part = sums_of_block(backend, logits, target[here], weight, options, vocab_shard, measures)
        if blocks:
            blocks.add(here, logits, target[here], vocab_shard.first, measures)
        torch.logaddexp(lse[here], measures.log_sum_exp, out=lse[here])
        target_logits[here] += part
    return lse, target_logits


def sums_of_block(
    backend: Backend,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: CrossEntropyOptions,
    vocab_shard: VocabShard,
    measures: Measures,
) -> Tensor:
    """Measures logits that are there, and returns the sum of the ``q_c x_c``; one a position.

    The loss over some of the classes is that sum, but for its sign, where the log-sum-exp is taken
    for 0.
    """
    plain = CrossEntropyOptions(options.ignore_index, "none", options.label_smoothing)
    given = logits, target, weight, plain
    backend.cross_entropy(*given, Want(False, measures=measures), None, vocab_shard)
    vocab_shard = vocab_shard._replace(lse=torch.zeros_like(measures.log_sum_exp))
    part, _ = backend.cross_entropy(*given, Want(), None, vocab_shard)
    assert part is not None
    return -part.flatten().double()


def each_of_sums(
    options: CrossEntropyOptions,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    target_logits: Tensor,
) -> Tensor:
    """The loss of each row, in float64: sum_c q_c lse - sum_c q_c x_c."""
    target_sum: Tensor | float = 1.0
    if weight is not None:
        smoothing, own = max(0.0, options.label_smoothing), _own_weight(target, weight, options)
        target_sum = smoothing * weight.double().mean() + (1 - smoothing) * own
    loss = target_sum * lse - target_logits
    if options.z_loss:
        loss = loss + options.z_loss * lse.square()
    if options.token_weight is not None:
        loss = loss * options.token_weight
    return loss.where(target != options.ignore_index, 0)


def gradients_by_blocks(
    backend: Backend,
    head: Head,
    options: CrossEntropyOptions,
    tile: int,
    wanted: Wanted,
    lse: Tensor,
    grad_output: Tensor,
    filter_eps: float = 0.0,
    first_class: int = 0,
    classes: int | None = None,
) -> Gradients:
    """Those of the sum of ``grad_output`` times the loss of each row.

    Args:
        lse: The log-sum-exp of all classes, in float64.
        filter_eps: See `_classes_that_count`.
        first_class, classes: Where the head's classes stand among all.
    """
    input, linear_weight, linear_bias, target, weight, shaping = head
    sums, own_classes = accumulate_dtype(input.dtype), len(linear_weight)
    classes = own_classes if classes is None else classes
    want = Want(False, (True, False), True)
    options = options._replace(reduction="none", denominator=None)
    grad_input = input.new_zeros(input.shape, dtype=sums) if wanted.input else None
    grad_weight = _empty(linear_weight.shape, input.dtype, input) if wanted.linear_weight else None
    grad_bias = input.new_zeros(own_classes, dtype=sums) if wanted.linear_bias else None
    part = None
    for logits, (x, of_classes), here, first in _tiles(head, tile):
        vocab_shard = VocabShard(first_class + first, classes, lse[here])
        given = target[here], weight, _of_rows(options, here), want, grad_output[here], vocab_shard
        shaped = shape(backend, shaping, logits, target[here], vocab_shard.first)
        backend.cross_entropy(shaped.capped, *given)
        logits = gradient_of(backend, shaping, shaped, shaped.capped)
        block = slice(first, first + len(of_classes))
        if grad_bias is not None:
            grad_bias[block] += logits.sum(0, dtype=sums)
        if grad_weight is not None and (part is None or here.start == 0):
            part = _empty(of_classes.shape, sums, input)
        _add_products(
            (logits, of_classes, x),
            _classes_that_count(logits, grad_output[here], filter_eps),
            None if grad_input is None else (grad_input[here], True),
            None if part is None else (part, here.start > 0),
        )
        if grad_weight is not None and part is not None and here.stop == len(input):
            grad_weight[block] = part
    return _as(grad_input, input), grad_weight, _as(grad_bias, linear_bias), None


def _tiles(head: Head, tile: int) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor], slice, int]]:
    """Logits, what they are the product of, their rows and their first class."""
    input, linear_weight, linear_bias, *_ = head
    n, classes, dtype = len(input), len(linear_weight), product_dtype(head)
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
    """What a mean divides by: the weight of the targets that are not ignored, in float64."""
    share = (target != options.ignore_index).double()
    if weight is not None:
        share *= _own_weight(target, weight, options)
    if options.token_weight is not None:
        share *= options.token_weight
    return share.sum()


def _own_weight(target: Tensor, weight: Tensor, options: CrossEntropyOptions) -> Tensor:
    """That of each target's class, in float64; of one that is none, any."""
    own = target.where(target != options.ignore_index, 0).clamp(0, len(weight) - 1)
    return weight.double()[own]


# ---- products ------------------------------------------------------------------------------------


def _empty(shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    if like.is_cpu:
        return cpu.empty(shape, dtype)
    return torch.empty(shape, dtype=dtype, device=like.device)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


# Of a block, more than which are not worth their copies.
MOST_KEPT = 0.5


def _classes_that_count(
    gradient: Tensor, grad_output: Tensor | None, filter_eps: float
) -> Tensor | None:
    """The columns of a block of the logits' gradient where it is at least ``filter_eps``.

    That is times the largest ``grad_output`` of the block. None stands for all: where nothing is to
    be left out, or not enough, or a GPU would have to be waited for.
    """
    if not filter_eps or not gradient.is_cpu:
        return None
    least = filter_eps if grad_output is None else filter_eps * float(grad_output.abs().max())
    low, high = gradient.aminmax(dim=0)
    kept = (~((high < least) & (low > -least))).nonzero().flatten()  # a NaN counts
    return kept if len(kept) < MOST_KEPT * len(low) else None


def _add_products(
    block: tuple[Tensor, Tensor, Tensor],
    kept: Tensor | None,
    to_input: tuple[Tensor, bool] | None,
    to_weight: tuple[Tensor, bool] | None,
) -> None:
    """What a block of the logits' gradient makes of its classes' weight and its rows' input.

    Args:
        to_input, to_weight: Where to, and whether it is added to what is there.
    """
    gradient, of_classes, x = block
    if kept is not None:
        gradient, of_classes = gradient[:, kept], of_classes[kept]
    if to_input is not None:
        _add_product(to_input[0], gradient, of_classes, to_input[1])
    if to_weight is None:
        return
    to, add = to_weight
    if kept is None:
        _add_product(to, gradient.t(), x, add)
    else:
        to = to if add else to.zero_()
        to.index_add_(0, kept, torch.mm(gradient.t(), x).to(to.dtype))


def _add_product(to: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """``to = a @ b``, or ``to += a @ b``, in the dtype of ``to``."""
    if to.dtype is a.dtype:
        torch.addmm(to, a, b, beta=float(add), out=to)
    elif to.is_cuda:
        torch.ops.aten.addmm.dtype_out(to, a, b, to.dtype, beta=float(add), out=to)
    elif add:
        to += torch.mm(a, b)
    else:
        to.copy_(torch.mm(a, b))


def _of_rows(options: CrossEntropyOptions, here: slice) -> CrossEntropyOptions:
    if options.token_weight is None:
        return options
    return options._replace(token_weight=options.token_weight[here])


def _as(gradient: Tensor | None, of: Tensor | None) -> Tensor | None:
    if gradient is None or of is None:
        return None
    return gradient.reshape(of.shape).to(of.dtype)
