"""What cross-entropy computes, and what its kernels are given.

    lse     = log sum_c exp(x_c) = pivot + log sum_c exp(x_c - pivot),   pivot = max_c x_c
    q_c     = level weight_c (slope y_c + offset) + spike [c = target]     what the row aims at
    loss    = sum_c q_c (lse - x_c)
    dloss/dx_c = p_c sum_k q_k - q_c,    p_c = exp(x_c - lse)
    dloss/dy_c = level slope weight_c (lse - x_c)

    class index:   level = smoothing / C,  slope = 0,  offset = 1,  spike = (1 - smoothing) weight_t
    probabilities: level = 1 - smoothing,  slope = 1,  offset = smoothing / C / level,  spike = 0
    (smoothing 1:  level = 1 / C,          slope = 0,  offset = 1)

The logits may be those of some classes alone, a block of columns of a larger matrix. Then the loss
is the sum over these classes, with their own lse or with that of all classes, where it is given.

With z_loss the loss has z_loss lse^2 more, and dloss/dx_c has 2 z_loss lse p_c more.

Focal loss, of class indices without smoothing: with nll = lse - x_t and p = exp(-nll), the loss is
weight_t (1 - p)^gamma nll, and the gradients are those above times
(1 - p)^gamma + gamma (1 - p)^(gamma - 1) p nll.

torch: F.cross_entropy(x, target, weight, ignore_index=..., label_smoothing=..., reduction=...)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arithmetic import exp_nonpositive, log, tanh
from .tiles import (
    View,
    add_exponentials,
    block_of,
    by_lane,
    columns_of,
    exponentials_of,
    mask_of,
    no_sums,
    of_all_lanes,
    opened,
    pivot_of,
    read_tiles,
    unknown_zero,
)


class Inputs(NamedTuple):
    logits: View
    target: Any  # one class index a position, or None for
    probabilities: View | None  # one distribution a position
    weight: Any  # one for each of all classes, or None for ones
    token_weight: Any  # one a position, multiplies its loss, or None for ones
    lse: Any  # of all classes, one a position, or None where it is that of these
    aimed: Any  # with it, the weight of all classes
    upstream: Any  # the loss's gradient, None for ones
    upstream_step: int  # 1: one a position, 0: one for all
    denominator: Any  # of a mean, of one element, None for 1 or where programs count targets
    ignore_index: int
    positions: int
    inner: int
    classes: int
    first_class: int  # where they stand among
    all_classes: int


class Outputs(NamedTuple):
    """None where not wanted."""

    each: Any  # loss, its parts: one a position and split
    total: Any  # loss, a `Total`
    lse: Any  # of these classes, one a position
    entropy: Any  # its parts, one a position and split
    prediction: Any  # the first of these classes with the largest logit, FAR on: likewise
    grad_logits: View | None
    grad_probabilities: View | None


class Scalars(NamedTuple):
    level: Any
    offset: Any
    share: Any  # of the target's own class: 1 - smoothing
    scale: Any  # of gradients, beside upstream
    gamma: Any  # of focal loss
    z_loss: Any


class Constants(NamedTuple):
    """What a kernel is compiled for; the first ones are a `Layout`'s."""

    A: Any
    INDEX: Any
    SEVERAL: Any
    COLUMNS: Any
    UNIT: Any
    POSITIONS: Any
    CLASSES: Any
    TILES: Any
    HELD: Any
    PACKED: Any
    LOADED: Any
    SHIFTED: Any
    WALKED: Any
    WIDTH: Any
    ROW: Any
    TURNS: Any
    ANEW: Any
    EXACT: Any
    SLOPE: Any
    OFFSET: Any  # is not 0
    UNIFORM: Any  # every class is aimed at, not the target alone
    AIMS: Any  # and each class's aim is read
    COUNTED: Any  # a mean's targets, so many at most, which each program counts, or 0
    INPLACE: Any  # grad_logits are the logits' memory
    CLUSTER: Any  # programs share a tile
    FOCAL: Any  # gamma is not 0
    SQUARES: Any  # z_loss is not 0


FAR = tl.constexpr(1 << 40)  # more than there are classes


class Positions(NamedTuple):
    """Those of one program, what they aim at and what their gradients are multiplied by."""

    outer: Any
    inner: Any
    flat: Any
    lanes: Any
    present: Any
    shift: Any
    live: Any  # neither ignored nor out of range
    read: Any  # those whose classes are
    wrong: Any  # out of range
    hit: Any
    spike: Any
    scale: Any  # 0 where they are not live


class Sums(NamedTuple):
    """Over the classes of each position."""

    high: Any  # the largest logit
    total: Any  # of exp(x - pivot)
    aimed: Any  # of q / level, but for the spike; for focal loss the target's own logit


class Own(NamedTuple):
    """The logits of the targets, read before any program overwrites them."""

    logit: Any
    here: Any  # whether it is in these classes


@triton.jit
def pick(inputs, scalars, program, constants):
    """The positions of a program.

    Those that count for nothing are not read further, unless that would take apart what a thread
    loads at once.
    """
    block = block_of(inputs.logits, inputs.inner, program, constants)
    outer, inner, flat, lanes, present, shift = block
    hit = tl.full([constants.POSITIONS], -1, tl.int64)
    spike = tl.full([constants.POSITIONS], 0.0, constants.A)
    live = present
    wrong = hit >= 0
    if inputs.target is not None:
        target = tl.load(inputs.target + flat + lanes, mask=present, other=0)
        counts = present & (target != inputs.ignore_index)
        live = counts & (target >= 0) & (target < inputs.all_classes)
        wrong = counts & (live == 0)
        hit = target - inputs.first_class
        spike += tl.full([], scalars.share, constants.A)
        if inputs.weight is not None:
            spike *= tl.load(inputs.weight + target, mask=live, other=0.0)
    scale = scalars.scale + tl.zeros_like(spike)
    if inputs.upstream is not None:
        upstream = inputs.upstream + (flat + lanes) * inputs.upstream_step
        scale *= tl.load(upstream, mask=present, other=0.0)
    if inputs.token_weight is not None:
        scale *= tl.load(inputs.token_weight + flat + lanes, mask=present, other=0.0)
    scale = tl.where(live, scale, 0.0)
    read = live
    if constants.WALKED:
        read = present
    return Positions(
        outer, inner, flat, lanes, present, shift, live, read, wrong, hit, spike, scale
    )


@triton.jit
def read_logits(inputs, at, start, last, constants):
    return read_tiles(inputs.logits, at, at.read, start, last, -float("inf"), constants)


@triton.jit
def read_probabilities(inputs, at, start, last, constants):
    """The same of the probabilities, if any."""
    tiles = ()
    if inputs.probabilities is not None:
        tiles = read_tiles(inputs.probabilities, at, at.read, start, last, 0.0, constants)
    return tiles


@triton.jit
def aim_of(inputs, scalars, at, tiles, start, k: tl.constexpr, last, turn: tl.constexpr, constants):
    """q / level but for the spike, where that differs from class to class."""
    aim = tl.full([constants.POSITIONS, constants.CLASSES], 0.0, constants.A)
    if constants.OFFSET:
        mask = mask_of(at, at.read, start, k, last, constants)
        aim = tl.where(mask, tl.full([], scalars.offset, constants.A), 0.0)
    if inputs.probabilities is not None:
        aim += opened(tiles[k], inputs.classes, turn, constants) * constants.SLOPE
    if inputs.weight is not None:
        aim *= weight_of(inputs, at, columns_of(start, k, constants), last, constants)
    return aim


@triton.jit
def weight_of(inputs, at, c, last, constants):
    mask = c < last
    if constants.SHIFTED:
        mask &= c >= at.shift
    first = inputs.weight + inputs.first_class - at.shift
    return tl.load(first + c, mask=mask, other=0.0)[None, :]


@triton.jit
def lse_of(sums):
    return pivot_of(sums.high) + tl.log(sums.total)


@triton.jit
def given_sums(inputs, at, constants):
    """Those over all classes, as far as their lse tells."""
    lse = tl.load(inputs.lse + at.flat + at.lanes, mask=at.present, other=0.0)
    high = lse.to(constants.A)
    lacks = (lse - high.to(tl.float64)).to(constants.A)
    aimed = tl.zeros_like(high)
    if constants.AIMS:
        aimed += tl.load(inputs.aimed).to(constants.A)
    return Sums(high, 1.0 + tl.where(lacks == lacks, lacks, 0.0), aimed)


@triton.jit
def sum_classes(inputs, scalars, at, first, last, constants):
    """The first of two reads: sums over classes first to last."""
    total = no_sums(constants)
    aimed = total
    high = total - float("inf")
    for start in range(first, last, constants.TILES * constants.CLASSES):
        tiles = read_logits(inputs, at, start, last, constants)
        high, total = add_exponentials(high, total, tiles, constants)
        if constants.AIMS:
            probabilities = read_probabilities(inputs, at, start, last, constants)
            for k in tl.static_range(constants.TILES):
                aim = aim_of(inputs, scalars, at, probabilities, start, k, last, 1, constants)
                aimed += tl.sum(by_lane(aim, constants), 2)
    high, total = of_all_lanes(high, total, constants)
    return Sums(high, total, tl.sum(aimed, 1))


@triton.jit
def sum_tiles(inputs, scalars, at, tiles, probabilities, last, constants):
    """The same of classes that are held."""
    high, total = exponentials_of(tiles, inputs.classes, constants)
    aimed = no_sums(constants)
    if constants.AIMS:
        for k in tl.static_range(constants.TILES):
            aim = aim_of(inputs, scalars, at, probabilities, 0, k, last, 1, constants)
            aimed += tl.sum(by_lane(aim, constants), 2)
    return Sums(high, total, tl.sum(aimed, 1))


@triton.jit
def own_logit(inputs, at, first, last, constants):
    """Of targets in classes first to last; else 0."""
    column = at.hit + at.shift
    here = at.live & (column >= first) & (column < last)
    if inputs.target is None:
        return Own(tl.zeros_like(at.spike), here)
    x = tl.load(place_of_hit(inputs.logits, at), mask=here, other=0.0)
    return Own(x.to(constants.A), here)


@triton.jit
def place_of_hit(view, at):
    first = view.data + at.outer * view.outer + at.inner * view.inner
    return first + (at.lanes.to(tl.int64) * view.inner + at.hit * view.classes)


@triton.jit
def with_own_logit(sums, own, constants):
    """For focal loss, of which each program has to know it."""
    if not constants.FOCAL:
        return sums
    return Sums(sums.high, sums.total, own.logit)


@triton.jit
def spike_loss(inputs, scalars, at, sums, own, constants):
    """The target's own term of the loss, where the target is in these classes."""
    if inputs.target is None:
        return tl.zeros_like(at.spike)
    nll = (pivot_of(sums.high) - own.logit) + tl.log(sums.total)
    loss = at.spike * nll
    if constants.FOCAL:
        loss *= exp_nonpositive(tl.full([], scalars.gamma, constants.A) * log(missing(nll)))
    return tl.where(own.here, loss, 0.0)


@triton.jit
def missing(nll):
    """1 - p, p = exp(-nll), however close to 0: with tanh(nll / 2)."""
    half = tanh(0.5 * tl.where(nll < 0.0, 0.0, nll))
    return 2.0 * half / (1.0 + half)


@triton.jit
def focused(scalars, at, sums, constants):
    """The positions, with what focal loss multiplies their gradients by."""
    if not constants.FOCAL:
        return at
    nll = (pivot_of(sums.high) - sums.aimed) + tl.log(sums.total)
    gamma = tl.full([], scalars.gamma, constants.A)
    lacks = missing(nll)
    steepness = tl.where(lacks > 0.0, nll / lacks, 1.0)
    power = exp_nonpositive(gamma * log(lacks))
    factor = power * (1.0 + gamma * (1.0 - lacks) * steepness)
    spike = tl.where(at.live, at.spike * factor, 0.0)
    return Positions(
        at.outer,
        at.inner,
        at.flat,
        at.lanes,
        at.present,
        at.shift,
        at.live,
        at.read,
        at.wrong,
        at.hit,
        spike,
        at.scale,
    )


@triton.jit
def mass_of(inputs, scalars, at, sums, constants):
    """dloss/dlse: sum_c q_c, and what z_loss adds."""
    mass = at.spike
    if constants.SQUARES:
        mass += tl.full([], 2.0 * scalars.z_loss, constants.A) * lse_of(sums)
    level = tl.full([], scalars.level, constants.A)
    if constants.UNIFORM:
        mass += level * inputs.all_classes
    elif constants.AIMS:
        mass += level * sums.aimed
    return mass


@triton.jit
def factor_of(inputs, scalars, at, sums, constants):
    """What exp(x - pivot) is multiplied by for the gradient; 0 where nothing counts."""
    factor = mass_of(inputs, scalars, at, sums, constants) * at.scale / sums.total
    return tl.where(at.live, factor, 0.0)


@triton.jit
def gradients_pivot(inputs, sums, constants):
    """The pivot, but where exponentials are computed anew for the gradients, rather than held."""
    pivot = pivot_of(sums.high)
    if constants.PACKED or (constants.TILES > 1 and (constants.UNIFORM or constants.AIMS)):
        pivot += unknown_zero(inputs.classes, 2)
    return pivot[:, None]


@triton.jit
def distance_of(at, sums, shifted, aim, start, k: tl.constexpr, last, constants):
    """Of each lane, its part of a tile's sum_c q_c (lse - x_c) / level, but for the spike.

    Where all q_c are the same, of sum_c pivot - x_c.
    """
    distance = -shifted
    if constants.AIMS:
        distance += tl.log(sums.total)[:, None]
    distance = tl.where(mask_of(at, at.present, start, k, last, constants), distance, 0.0)
    if constants.AIMS:
        distance *= aim
    return tl.sum(by_lane(distance, constants), 2)


@triton.jit
def dense_loss(scalars, sums, distance, classes, constants):
    """The loss but for the target's own term, of the distances of all lanes."""
    distance = tl.sum(distance, 1)
    if constants.UNIFORM:
        distance += classes * tl.log(sums.total)
    return tl.full([], scalars.level, constants.A) * distance


@triton.jit
def gradient_of(inputs, scalars, at, sums, shifted, aim, c, constants):
    """That of a tile's logits, of x - pivot.

    Unless a lane has all classes the target's own is left to `finish_own`.
    """
    level = tl.full([], scalars.level, constants.A)
    factor = factor_of(inputs, scalars, at, sums, constants)
    gradient = exp_nonpositive(shifted, constants.EXACT) * factor[:, None]
    if constants.UNIFORM:
        gradient -= (level * at.scale)[:, None]
    elif constants.AIMS:
        gradient -= aim * (level * at.scale)[:, None]
    if constants.WALKED:
        if inputs.target is not None:
            spike = (at.spike * at.scale)[:, None]
            hits = c[None, :] == at.hit.to(constants.INDEX)[:, None]
            gradient -= tl.where(hits, spike, 0.0)
        gradient = tl.where(at.live[:, None], gradient, 0.0)
    return gradient


@triton.jit
def gradient_of_probabilities(inputs, scalars, at, sums, shifted, c, last, constants):
    gradient = tl.log(sums.total)[:, None] - shifted
    level = tl.full([], scalars.level, constants.A)
    gradient *= (level * constants.SLOPE * at.scale)[:, None]
    if inputs.weight is not None:
        gradient *= weight_of(inputs, at, c, last, constants)
    return gradient
