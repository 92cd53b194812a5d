"""Cross-entropy of logits and class indices or class probabilities, with its gradients.

    lse     = log sum_c exp(x_c) = pivot + log sum_c exp(x_c - pivot),   pivot = max_c x_c
    q_c     = level weight_c (slope y_c + offset) + spike [c = target]     what the row aims at
    loss    = sum_c q_c (lse - x_c)
    dloss/dx_c = p_c sum_k q_k - q_c,    p_c = exp(x_c - lse)
    dloss/dy_c = level slope weight_c (lse - x_c)

    class index:   level = smoothing / C,  slope = 0,  offset = 1,  spike = (1 - smoothing) weight_t
    probabilities: level = 1 - smoothing,  slope = 1,  offset = smoothing / C / level,  spike = 0
    (smoothing 1:  level = 1 / C,          slope = 0,  offset = 1)

Shapes: as in `tiles.py`.
Bytes: logits are read once where all classes are held, else twice, and each gradient that is
wanted is written once. Where positions are few and classes many, several programs share a position.

A class index that is neither in [0, C) nor ignored gives a loss of NaN and a gradient of zero: a
GPU cannot raise without a wait, and an assertion in a kernel would take the whole context down.

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
from .sums import add_up, counting
from .tiles import (
    View,
    add_exponentials,
    block_of,
    by_lane,
    columns_of,
    exp_shifted,
    exponentials_of,
    mask_of,
    no_sums,
    of_all_lanes,
    opened,
    pivot_of,
    read,
    read_tiles,
    unknown_zero,
    whole_row,
    write,
    write_rows,
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
def pick(inputs, scalars, program, constants):
    """The positions of a program.

    Those that count for nothing are not read further, unless that would take apart what a thread
    loads at once.
    """
    block = block_of(inputs.logits, inputs.inner, program, constants)
    outer, inner, flat, lanes, present, shift = block
    hit = tl.full([constants.POSITIONS], -1, tl.int64)
    spike = tl.zeros([constants.POSITIONS], constants.A)
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
def read_aim(inputs, scalars, at, c, k: tl.constexpr, last, constants):
    """q / level but for the spike, where that differs from class to class."""
    mask = mask_of(at, at.read, c, k, last, constants)
    aim = tl.where(mask, tl.full([], scalars.offset, constants.A), 0.0)
    if inputs.probabilities is not None:
        y = read(inputs.probabilities, at, at.read, c, k, last, 0.0, constants)
        aim += y.to(constants.A) * constants.SLOPE
    if inputs.weight is not None:
        aim *= weight_of(inputs, at, c, last, constants)
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
            for k in tl.static_range(constants.TILES):
                c = columns_of(start, k, constants)
                aim = read_aim(inputs, scalars, at, c, k, last, constants)
                aimed += tl.sum(by_lane(aim, constants), 2)
    high, total = of_all_lanes(high, total, constants)
    return Sums(high, total, tl.sum(aimed, 1))


@triton.jit
def sum_tiles(inputs, tiles, aims, constants):
    """The same of classes that are held."""
    high, total = exponentials_of(tiles, inputs.classes, constants)
    aimed = tl.zeros_like(total)
    if constants.AIMS:
        for k in tl.static_range(constants.TILES):
            aimed += tl.sum(aims[k], 1)
    return Sums(high, total, aimed)


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
    if constants.PACKED or (constants.TILES > 1 and constants.UNIFORM):
        pivot += unknown_zero(inputs.classes, 2)
    return pivot[:, None]


@triton.jit
def distance_of(at, sums, shifted, aim, c, k: tl.constexpr, last, constants):
    """Of each lane, its part of a tile's sum_c q_c (lse - x_c) / level, but for the spike.

    Where all q_c are the same, of sum_c pivot - x_c.
    """
    distance = -shifted
    if constants.AIMS:
        distance = (distance + tl.log(sums.total)[:, None]) * aim
    distance = tl.where(mask_of(at, at.present, c, k, last, constants), distance, 0.0)
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
    gradient = exp_shifted(shifted, constants) * factor[:, None]
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


@triton.jit
def finish_own(inputs, outputs, scalars, at, sums, own, constants):
    """Writes the gradient at the targets, one store a position rather than a choice a class."""
    if outputs.grad_logits is not None and inputs.target is not None and not constants.WALKED:
        factor = factor_of(inputs, scalars, at, sums, constants)
        gradient = exp_shifted(own.logit - pivot_of(sums.high), constants) * factor
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
    entropy = tl.zeros([constants.POSITIONS], constants.A)
    leader = tl.full([constants.POSITIONS], 2 * FAR, tl.int64)
    return Found(entropy, leader, no_sums(constants))


@triton.jit
def finish_tile(
    inputs, outputs, scalars, at, sums, found, x, pivot, aim, c, k: tl.constexpr, last, constants
):
    """Adds what a tile has to what was found, and writes its gradients.

    Those of logits whose lanes have rows of their own are left to `write_rows`.
    """
    entropy, leader, distance = found
    if outputs.entropy is not None:
        measured = measure(at, sums, x, c, constants)
        entropy += measured[0]
        leader = tl.minimum(leader, measured[1])
    if constants.UNIFORM or constants.AIMS:
        distance += distance_of(at, sums, x - pivot, aim, c, k, last, constants)
    if outputs.grad_logits is not None and not constants.WIDTH:
        gradient = gradient_of(inputs, scalars, at, sums, x - pivot, aim, c, constants)
        write(outputs.grad_logits, at, gradient, c, k, last, constants)
    if outputs.grad_probabilities is not None:
        gradient = gradient_of_probabilities(
            inputs, scalars, at, sums, x - pivot, c, last, constants
        )
        write(outputs.grad_probabilities, at, gradient, c, k, last, constants)
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
        losses = tl.zeros([constants.POSITIONS], tl.float64)
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
    aims = ()
    if constants.AIMS:
        for k in tl.static_range(constants.TILES):
            c = columns_of(0, k, constants)
            aims += (read_aim(inputs, scalars, at, c, k, last, constants),)
    if inputs.lse is None:
        sums = sum_tiles(inputs, tiles, aims, constants)
    else:
        sums = given_sums(inputs, at, constants)
        if constants.INPLACE and constants.CLUSTER:  # whose programs no sum has brought together
            own = Own(together(own.logit, constants), own.here)
    sums = with_own_logit(sums, own, constants)
    loss = spike_loss(inputs, scalars, at, sums, own, constants)
    at = focused(scalars, at, sums, constants)
    found = nothing_found(constants)
    pivot = gradients_pivot(inputs, sums, constants)
    if constants.INPLACE:
        tl.debug_barrier()  # no thread is to read a logit that another has overwritten
    gradients = ()
    for k in tl.static_range(constants.TILES):
        c = columns_of(0, k, constants)
        x = opened(tiles[k], inputs.classes, 2, constants)
        aim = None
        if constants.AIMS:
            aim = aims[k]
        found = finish_tile(
            inputs, outputs, scalars, at, sums, found, x, pivot, aim, c, k, last, constants
        )
        if constants.WIDTH and outputs.grad_logits is not None:
            gradients += (gradient_of(inputs, scalars, at, sums, x - pivot, aim, c, constants),)
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
    losses = tl.zeros([constants.POSITIONS], tl.float64)
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
    pivot = gradients_pivot(inputs, sums, constants)
    reads = constants.UNIFORM or constants.AIMS or outputs.grad_logits is not None
    if reads or outputs.entropy is not None:
        for start in range(first, last, constants.TILES * constants.CLASSES):
            tiles = read_logits(inputs, at, start, last, constants)
            if constants.INPLACE:
                tl.debug_barrier()
            for k in tl.static_range(constants.TILES):
                c = columns_of(start, k, constants)
                aim = None
                if constants.AIMS:
                    aim = read_aim(inputs, scalars, at, c, k, last, constants)
                x = tiles[k].to(constants.A)
                found = finish_tile(
                    inputs, outputs, scalars, at, sums, found, x, pivot, aim, c, k, last, constants
                )
    classes, splits = last - tl.maximum(first, at.shift), shares.splits
    return finish(
        inputs, outputs, scalars, at, sums, own, found, loss, classes, part, splits, constants
    )
