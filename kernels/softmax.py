"""Softmax and its logarithm along the classes of each position, with their gradients.

    forward   softmax      y_c  = exp(x_c - lse),          lse = log sum_c exp(x_c)
              log_softmax  y_c  = x_c - lse
    backward  softmax      dx_c = y_c (dy_c - sum_k dy_k y_k)
              log_softmax  dx_c = dy_c - exp(y_c) sum_k dy_k

Shapes: as in `tiles.py`. Bytes: operands are read once where all classes are held, else twice,
and the result is written once.

torch: F.softmax(x, dim), F.log_softmax(x, dim)
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import launch
from .arithmetic import exp_nonpositive, log
from .tiles import (
    Viewed,
    add_exponentials,
    block_of,
    by_lane,
    exponentials_of,
    layout,
    memory_of,
    no_sums,
    of_all_lanes,
    opened,
    read,
    read_tiles,
    viewed,
    whole_row,
    write,
    write_rows,
)


@triton.jit
def normalized(x, high, total, LOGARITHM: tl.constexpr, constants):
    """Against the largest element itself, so that a row of nothing but -inf is NaN, as in torch."""
    if LOGARITHM:
        return (x - high[:, None]) - log(total)[:, None]
    return exp_nonpositive(x - high[:, None], constants.EXACT) / total[:, None]


@triton.jit
def forward_kernel(x, y, inner, classes, LOGARITHM: tl.constexpr, constants: tl.constexpr):
    at = block_of(x, inner, tl.program_id(0), constants)
    last = whole_row(at, classes, constants)
    if constants.HELD:
        tiles = read_tiles(x, at, at.present, 0, last, -float("inf"), constants)
        high, total = exponentials_of(tiles, classes, constants)
        rows = ()
        for k in tl.static_range(constants.TILES):
            value = opened(tiles[k], classes, 2, constants)
            value = normalized(value, high, total, LOGARITHM, constants)
            if constants.WIDTH:
                rows += (value,)
            else:
                write(y, at, value, 0, k, last, constants)
        if constants.WIDTH:
            write_rows(y, at, rows, last, constants)
    else:
        total = no_sums(constants)
        high = total - float("inf")
        for start in range(0, last, constants.TILES * constants.CLASSES):
            tiles = read_tiles(x, at, at.present, start, last, -float("inf"), constants)
            high, total = add_exponentials(high, total, tiles, constants)
        high, total = of_all_lanes(high, total, constants)
        for start in range(0, last, constants.TILES * constants.CLASSES):
            for k in tl.static_range(constants.TILES):
                value = read(x, at, at.present, start, k, last, -float("inf"), constants)
                value = normalized(value.to(constants.A), high, total, LOGARITHM, constants)
                write(y, at, value, start, k, last, constants)


@triton.jit
def summand(dy, y, LOGARITHM: tl.constexpr, constants):
    """Each lane's part of a tile of the sum over the classes."""
    if not LOGARITHM:
        dy *= y
    return tl.sum(by_lane(dy, constants), 2)


@triton.jit
def gradient(dy, y, total, LOGARITHM: tl.constexpr, constants):
    if LOGARITHM:
        return dy - exp_nonpositive(y, constants.EXACT) * total[:, None]
    return y * (dy - total[:, None])


@triton.jit
def read_pair(dy, y, at, start, k: tl.constexpr, last, constants):
    """The k-th tile of each."""
    dy_k = read(dy, at, at.present, start, k, last, 0.0, constants).to(constants.A)
    y_k = read(y, at, at.present, start, k, last, 0.0, constants).to(constants.A)
    return dy_k, y_k


@triton.jit
def backward_kernel(dy, y, dx, inner, classes, LOGARITHM: tl.constexpr, constants: tl.constexpr):
    at = block_of(y, inner, tl.program_id(0), constants)
    last = whole_row(at, classes, constants)
    total = no_sums(constants)
    if constants.HELD:
        upstream = read_tiles(dy, at, at.present, 0, last, 0.0, constants)
        output = read_tiles(y, at, at.present, 0, last, 0.0, constants)
        for k in tl.static_range(constants.TILES):
            dy_k = opened(upstream[k], classes, 1, constants)
            y_k = opened(output[k], classes, 1, constants)
            total += summand(dy_k, y_k, LOGARITHM, constants)
        total = tl.sum(total, 1)
        for k in tl.static_range(constants.TILES):
            dy_k = opened(upstream[k], classes, 2, constants)
            y_k = opened(output[k], classes, 2, constants)
            value = gradient(dy_k, y_k, total, LOGARITHM, constants)
            write(dx, at, value, 0, k, last, constants)
    else:
        for start in range(0, last, constants.TILES * constants.CLASSES):
            for k in tl.static_range(constants.TILES):
                dy_k, y_k = read_pair(dy, y, at, start, k, last, constants)
                total += summand(dy_k, y_k, LOGARITHM, constants)
        total = tl.sum(total, 1)
        for start in range(0, last, constants.TILES * constants.CLASSES):
            for k in tl.static_range(constants.TILES):
                dy_k, y_k = read_pair(dy, y, at, start, k, last, constants)
                value = gradient(dy_k, y_k, total, LOGARITHM, constants)
                write(dx, at, value, start, k, last, constants)


def softmax(
    logarithm: bool,
    sizes: tuple[int, int, int],
    input: Viewed,
    grad_output: Viewed | None,
    output: Viewed,
) -> None:
    """Launches the forward pass, or with a grad_output the backward pass, of which input is y."""
    outer, inner, classes = sizes
    given = (input, output) if grad_output is None else (grad_output, input, output)
    views = [view for tensor in given if (view := viewed(tensor)) is not None]
    constants, tile = layout(sizes, memory_of(views), "" if grad_output is None else "pair")
    kernel = forward_kernel if grad_output is None else backward_kernel
    registers = tile.registers if tile.cluster > 1 else None
    kernel[(outer * launch.cdiv(inner, tile.positions),)](
        *views,
        inner,
        classes,
        LOGARITHM=logarithm,
        constants=constants,
        **launch.options(tile.threads, tile.cluster, registers),
    )
