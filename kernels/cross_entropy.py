"""The kernels of cross-entropy and its gradients; `cross_entropy_terms.py` says what they compute.

Shapes: as in `tiles.py`.
Bytes: logits are read once where all classes are held, else twice, and each gradient that is
wanted is written once. Where positions are few and classes many, several programs share a position.

A class index that is neither in [0, C) nor ignored gives a loss of NaN and a gradient of zero: a
GPU cannot raise without a wait, and an assertion in a kernel would take the whole context down.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arithmetic import exp_nonpositive
from .cross_entropy_terms import (
    FAR,
    Own,
    Scalars,
    Sums,
    aim_of,
    dense_loss,
    distance_of,
    factor_of,
    focused,
    given_sums,
    gradient_of,
    gradient_of_probabilities,
    gradients_pivot,
    lse_of,
    own_logit,
    pick,
    place_of_hit,
    read_logits,
    read_probabilities,
    spike_loss,
    sum_classes,
    sum_tiles,
    with_own_logit,
)
from .sums import add_up, counting
from .tiles import (
    columns_of,
    no_sums,
    opened,
    pivot_of,
    whole_row,
    write,
    write_rows,
)


@triton.jit
def scale_of(inputs, scale, constants):
    """With what a mean is divided by."""
    scale = tl.full([], scale, tl.float64)
    if constants.COUNTED:
        counts = counting(
            inputs.target,
            inputs.weight,
            inputs.token_weight,
            tl.arange(0, constants.COUNTED),
            inputs.positions,
            inputs.ignore_index,
            inputs.all_classes,
        )
        scale /= tl.sum(counts)
    elif inputs.denominator is not None:
        scale /= tl.load(inputs.denominator)
    return scale


@triton.jit
def finish_own(inputs, outputs, scalars, at, sums, own, constants):
    """Writes the gradient at the targets, one store a position rather than a choice a class."""
    if outputs.grad_logits is not None and inputs.target is not None and not constants.WALKED:
        factor = factor_of(inputs, scalars, at, sums, constants)
        gradient = exp_nonpositive(own.logit - pivot_of(sums.high), constants.EXACT) * factor
        aim = tl.zeros_like(gradient)
        if constants.UNIFORM or constants.AIMS:
            aim += tl.full([], scalars.level, constants.A)
            if inputs.weight is not None:
                weight = inputs.weight + inputs.first_class + at.hit
                aim *= tl.load(weight, mask=own.here, other=0.0)
        gradient -= (aim + at.spike) * at.scale
        gradient = together(gradient, constants)  # the tile's gradients are there
        tl.store(place_of_hit(outputs.grad_logits, at), gradient, mask=own.here)


@triton.jit
def together(x, constants):
    """x, once all threads that share a tile have come so far."""
    if constants.CLUSTER:
        return tl.inline_asm_elementwise(
            "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned; mov.b32 $0, $1;",
            "=r,r",
            [x],
            dtype=tl.float32,
            is_pure=False,
            pack=1,
        )
    tl.debug_barrier()
    return x


@triton.jit
def measure(at, sums, x, c, constants):
    """Of a tile: sum_c exp(x_c - pivot) (pivot - x_c), and the first class that leads.

    That is the first NaN, or else the first with the largest logit, FAR on.
    """
    away = pivot_of(sums.high)[:, None] - x
    e = exp_nonpositive(-away)
    distance = tl.sum(tl.where(e == 0.0, 0.0, e * away), 1)
    none: tl.constexpr = 2**31 - 1 if tl.int32 == constants.INDEX else 2**40 - 1
    first = tl.min(tl.where(x == sums.high[:, None], c[None, :], none), 1).to(tl.int64)
    if constants.SHIFTED:  # all are -inf, as what is in front of them
        first = tl.maximum(first, at.shift)
    first_nan = tl.min(tl.where(x == x, none, c[None, :]), 1).to(tl.int64)
    return distance, tl.where(first_nan < none, first_nan, first + FAR)


@triton.jit
def store_measures(inputs, outputs, at, sums, entropy, leader, part, splits):
    entropy /= sums.total
    entropy += tl.where(part == tl.zeros_like(at.lanes), tl.log(sums.total), 0.0)
    out = (at.flat + at.lanes) * splits + part
    tl.store(outputs.entropy + out, tl.where(at.live, entropy, 0.0), mask=at.present)
    leader = tl.where(at.live, leader - at.shift + inputs.first_class, inputs.ignore_index)
    tl.store(outputs.prediction + out, leader, mask=at.present)


@triton.jit
def store_loss(inputs, outputs, scalars, at, sums, loss, part, splits, constants):
    """Stores what is wanted of each position, and returns their losses."""
    # Of programs that share a position the first.
    once = at.present & (part == tl.zeros_like(at.lanes))
    if outputs.lse is not None:
        lse = tl.where(at.live, lse_of(sums), 0.0)
        tl.store(outputs.lse + at.flat + at.lanes, lse, mask=once)
    if outputs.each is not None or outputs.total is not None:
        if constants.SQUARES:
            lse = lse_of(sums)
            square = tl.full([], scalars.z_loss, constants.A) * lse * lse
            loss += tl.where(once, square, 0.0)
        if inputs.token_weight is not None:
            loss *= tl.load(inputs.token_weight + at.flat + at.lanes, mask=at.present, other=0.0)
        loss = tl.where(at.live, loss, tl.where(at.wrong, float("nan"), 0.0))
        if outputs.each is not None:
            tl.store(outputs.each + (at.flat + at.lanes) * splits + part, loss, mask=at.present)
    return loss.to(tl.float64)


@triton.jit
def store_total(inputs, outputs, scale, divided, losses, constants):
    """Of all blocks of a program. Unless it was counted, the denominator is read anew, not held."""
    if outputs.total is not None:
        if constants.COUNTED:
            scale = divided
        add_up(outputs.total, tl.program_id(0), tl.sum(losses), scale, inputs.denominator)


class Found(NamedTuple):
    """In the tiles so far, of each position or lane."""

    entropy: Any
    leader: Any
    distance: Any


@triton.jit
def nothing_found(constants):
    entropy = tl.full([constants.POSITIONS], 0.0, constants.A)
    leader = tl.full([constants.POSITIONS], 2 * FAR, tl.int64)
    return Found(entropy, leader, no_sums(constants))


@triton.jit
def finish_tile(
    inputs, outputs, scalars, at, sums, found, x, aims, start, k: tl.constexpr, last, constants
):
    """Adds what a tile has to what was found, and writes its gradients.

    Those of logits whose lanes have rows of their own are left to `write_rows`. The aims are tiles
    of probabilities, if any.
    """
    entropy, leader, distance = found
    c = columns_of(start, k, constants)
    shifted = x - gradients_pivot(inputs, sums, constants)
    aim = None
    if constants.AIMS:
        aim = aim_of(inputs, scalars, at, aims, start, k, last, 2, constants)
    if outputs.entropy is not None:
        measured = measure(at, sums, x, c, constants)
        entropy += measured[0]
        leader = tl.minimum(leader, measured[1])
    if constants.UNIFORM or constants.AIMS:
        distance += distance_of(at, sums, shifted, aim, start, k, last, constants)
    if outputs.grad_logits is not None and not constants.WIDTH:
        gradient = gradient_of(inputs, scalars, at, sums, shifted, aim, c, constants)
        write(outputs.grad_logits, at, gradient, start, k, last, constants)
    if outputs.grad_probabilities is not None:
        gradient = gradient_of_probabilities(inputs, scalars, at, sums, shifted, c, last, constants)
        write(outputs.grad_probabilities, at, gradient, start, k, last, constants)
    return Found(entropy, leader, distance)


@triton.jit
def finish(inputs, outputs, scalars, at, sums, own, found, loss, classes, part, splits, constants):
    """After the last tile of that many classes; returns the losses."""
    if constants.UNIFORM or constants.AIMS:
        loss += dense_loss(scalars, sums, found.distance, classes, constants)
    finish_own(inputs, outputs, scalars, at, sums, own, constants)
    if outputs.entropy is not None:
        store_measures(inputs, outputs, at, sums, found.entropy, found.leader, part, splits)
    return store_loss(inputs, outputs, scalars, at, sums, loss, part, splits, constants)


@triton.jit(do_not_specialize=["blocks"])
def one_read_kernel(
    inputs,
    outputs,
    level: tl.float64,
    offset: tl.float64,
    share: tl.float64,
    scale: tl.float64,
    gamma: tl.float64,
    z_loss: tl.float64,
    blocks,
    constants: tl.constexpr,
):
    """Blocks of positions by turns, whose classes are held."""
    divided = scale_of(inputs, scale, constants)
    scalars = Scalars(level, offset, share, divided.to(constants.A), gamma, z_loss)
    if constants.TURNS:
        losses = tl.full([constants.POSITIONS], 0.0, tl.float64)
        for block in tl.range(
            tl.program_id(0), blocks, tl.num_programs(0), disable_licm=constants.ANEW
        ):
            losses += one_read(inputs, outputs, scalars, block, constants)
    else:
        losses = one_read(inputs, outputs, scalars, tl.program_id(0), constants)
    store_total(inputs, outputs, scale, divided, losses, constants)


@triton.jit
def one_read(inputs, outputs, scalars, block, constants):
    """A block of positions, in one or more tiles."""
    at = pick(inputs, scalars, block, constants)
    last = whole_row(at, inputs.classes, constants)
    tiles = read_logits(inputs, at, 0, last, constants)
    own = own_logit(inputs, at, 0, last, constants)
    probabilities = read_probabilities(inputs, at, 0, last, constants)
    if inputs.lse is None:
        sums = sum_tiles(inputs, scalars, at, tiles, probabilities, last, constants)
    else:
        sums = given_sums(inputs, at, constants)
        if constants.INPLACE and constants.CLUSTER:  # whose programs no sum has brought together
            own = Own(together(own.logit, constants), own.here)
    sums = with_own_logit(sums, own, constants)
    loss = spike_loss(inputs, scalars, at, sums, own, constants)
    at = focused(scalars, at, sums, constants)
    found = nothing_found(constants)
    if constants.INPLACE:
        tl.debug_barrier()  # no thread is to read a logit that another has overwritten
    gradients = ()
    for k in tl.static_range(constants.TILES):
        x = opened(tiles[k], inputs.classes, 2, constants)
        found = finish_tile(
            inputs, outputs, scalars, at, sums, found, x, probabilities, 0, k, last, constants
        )
        if constants.WIDTH and outputs.grad_logits is not None:
            c, shifted = columns_of(0, k, constants), x - gradients_pivot(inputs, sums, constants)
            gradients += (gradient_of(inputs, scalars, at, sums, shifted, None, c, constants),)
    if constants.WIDTH and outputs.grad_logits is not None:
        write_rows(outputs.grad_logits, at, gradients, last, constants)
    return finish(
        inputs, outputs, scalars, at, sums, own, found, loss, inputs.classes, 0, 1, constants
    )


class Shares(NamedTuple):
    """Which classes each program takes, where several share a position."""

    splits: int
    length: int
    sums: Any  # three planes of positions x splits


@triton.jit
def own_share(inputs, shares, scalars, block, constants):
    """Positions, which share of their classes a block has, and from where to where."""
    at = pick(inputs, scalars, block // shares.splits, constants)
    part = block % shares.splits
    first = tl.cast(part, constants.INDEX) * shares.length
    last = tl.minimum(first + shares.length, whole_row(at, inputs.classes, constants))
    return at, part, first, last


@triton.jit
def split_kernel(
    inputs,
    shares,
    level: tl.float64,
    offset: tl.float64,
    share: tl.float64,
    scale: tl.float64,
    gamma: tl.float64,
    z_loss: tl.float64,
    constants: tl.constexpr,
):
    """The first read of positions that programs share: the sums over one share."""
    scalars = Scalars(level, offset, share, scale, gamma, z_loss)
    at, part, first, last = own_share(inputs, shares, scalars, tl.program_id(0), constants)
    sums = sum_classes(inputs, scalars, at, first, last, constants)
    sums = with_own_logit(sums, own_logit(inputs, at, first, last, constants), constants)
    out = shares.sums + (at.flat + at.lanes) * shares.splits + part
    tl.store(out, sums.high, mask=at.present)
    plane = inputs.positions * shares.splits
    tl.store(out + plane, sums.total, mask=at.present)
    tl.store(out + 2 * plane, sums.aimed, mask=at.present)


@triton.jit
def merge(inputs, shares, at, SPLITS: tl.constexpr):
    """The sums of all shares, taken together in the same way by each program."""
    part = tl.arange(0, SPLITS)[None, :]
    mask = at.present[:, None] & (part < shares.splits)
    given = shares.sums + ((at.flat + at.lanes) * shares.splits)[:, None] + part
    plane = inputs.positions * shares.splits
    high = tl.load(given, mask=mask, other=-float("inf"))
    total = tl.load(given + plane, mask=mask, other=0.0)
    aimed = tl.load(given + 2 * plane, mask=mask, other=0.0)
    nothing = tl.zeros_like(at.spike)
    axis: tl.constexpr = None if high.shape[0] == 1 else 1
    highest = nothing + tl.max(high, axis)
    total *= exp_nonpositive(high - pivot_of(highest)[:, None])
    return Sums(highest, nothing + tl.sum(total, axis), nothing + tl.sum(aimed, axis))


@triton.jit(do_not_specialize=["blocks"])
def two_read_kernel(
    inputs,
    outputs,
    shares,
    level: tl.float64,
    offset: tl.float64,
    share: tl.float64,
    scale: tl.float64,
    gamma: tl.float64,
    z_loss: tl.float64,
    blocks,
    constants: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Blocks by turns of positions whose classes are not held."""
    divided = scale_of(inputs, scale, constants)
    scalars = Scalars(level, offset, share, divided.to(constants.A), gamma, z_loss)
    losses = tl.full([constants.POSITIONS], 0.0, tl.float64)
    for block in tl.range(
        tl.program_id(0), blocks, tl.num_programs(0), disable_licm=constants.ANEW
    ):
        losses += two_reads(inputs, outputs, shares, scalars, block, constants, SPLITS)
    store_total(inputs, outputs, scale, divided, losses, constants)


@triton.jit
def two_reads(inputs, outputs, shares, scalars, block, constants, SPLITS: tl.constexpr):
    """A block of positions, of each one share where several share them."""
    at, part, first, last = own_share(inputs, shares, scalars, block, constants)
    own = own_logit(inputs, at, first, last, constants)
    if inputs.lse is not None:
        sums = given_sums(inputs, at, constants)
    elif shares.sums is None:
        sums = sum_classes(inputs, scalars, at, first, last, constants)
        sums = with_own_logit(sums, own, constants)
    else:
        sums = merge(inputs, shares, at, SPLITS)
    loss = spike_loss(inputs, scalars, at, sums, own, constants)
    at = focused(scalars, at, sums, constants)
    found = nothing_found(constants)
    reads = constants.UNIFORM or constants.AIMS or outputs.grad_logits is not None
    if reads or outputs.entropy is not None:
        for start in range(first, last, constants.TILES * constants.CLASSES):
            tiles = read_logits(inputs, at, start, last, constants)
            aims = read_probabilities(inputs, at, start, last, constants)
            if constants.INPLACE:
                tl.debug_barrier()
            for k in tl.static_range(constants.TILES):
                x = tiles[k].to(constants.A)
                found = finish_tile(
                    inputs, outputs, scalars, at, sums, found, x, aims, start, k, last, constants
                )
    classes, splits = last - tl.maximum(first, at.shift), shares.splits
    return finish(
        inputs, outputs, scalars, at, sums, own, found, loss, classes, part, splits, constants
    )
