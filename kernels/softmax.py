"""Softmax and its logarithm along the classes of each position, with their gradients.

    forward   softmax      y_c  = exp(x_c - lse),          lse = log sum_c exp(x_c)
              log_softmax  y_c  = x_c - lse
    backward  softmax      dx_c = y_c (dy_c - sum_k dy_k y_k)
              log_softmax  dx_c = dy_c - exp(y_c) sum_k dy_k

Shapes: as in `tiles.py`. Bytes: operands are read once where a tile holds all classes, else twice,
and the result is written once.

torch: F.softmax(x, dim), F.log_softmax(x, dim)
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import launch
from .arithmetic import log
from .tiles import (
    Viewed,
    add_exponentials,
    block_of,
    compiled_in,
    exp_shifted,
    layout,
    place,
    read_tile,
    viewed,
    whole_row,
)


@triton.jit
def write_tile(output, at, value, c, last, constants):
    mask = at.present[:, None] & (c < last)[None, :]
    tl.store(place(output, at, c, constants), value, mask=mask)


@triton.jit
def normalized(x, high, total, LOGARITHM: tl.constexpr, constants):
    """Against the largest element itself, so that a row of nothing but -inf is NaN, as in torch."""
    if LOGARITHM:
        return (x - high[:, None]) - log(total)[:, None]
    return exp_shifted(x - high[:, None], constants) / total[:, None]


@triton.jit
def forward_kernel(x, y, inner, classes, LOGARITHM: tl.constexpr, WHOLE: tl.constexpr, constants):
    """WHOLE: a tile holds all classes."""
    at = block_of(inner, tl.program_id(0), constants)
    last = whole_row(classes, constants)
    lanes = tl.arange(0, constants.CLASSES).to(constants.INDEX)
    total = tl.zeros([constants.POSITIONS], constants.A)
    high = total - float("inf")
    if WHOLE:
        tile = read_tile(x, at, at.present, lanes, last, -float("inf"), constants)
        high, total = add_exponentials(high, total, tile, constants)
        tile = normalized(tile, high, total, LOGARITHM, constants)
        write_tile(y, at, tile, lanes, last, constants)
    else:
        for start in range(0, last, constants.CLASSES):
            tile = read_tile(x, at, at.present, start + lanes, last, -float("inf"), constants)
            high, total = add_exponentials(high, total, tile, constants)
        for start in range(0, last, constants.CLASSES):
            c = start + lanes
            tile = read_tile(x, at, at.present, c, last, -float("inf"), constants)
            tile = normalized(tile, high, total, LOGARITHM, constants)
            write_tile(y, at, tile, c, last, constants)


@triton.jit
def sum_of(dy, y, LOGARITHM: tl.constexpr):
    if LOGARITHM:
        return tl.sum(dy, 1)
    return tl.sum(dy * y, 1)


@triton.jit
def gradient(dy, y, total, LOGARITHM: tl.constexpr, constants):
    if LOGARITHM:
        return dy - exp_shifted(y, constants) * total[:, None]
    return y * (dy - total[:, None])


@triton.jit
def backward_kernel(
    dy, y, dx, inner, classes, LOGARITHM: tl.constexpr, WHOLE: tl.constexpr, constants
):
    at = block_of(inner, tl.program_id(0), constants)
    last = whole_row(classes, constants)
    lanes = tl.arange(0, constants.CLASSES).to(constants.INDEX)
    total = tl.zeros([constants.POSITIONS], constants.A)
    if WHOLE:
        upstream = read_tile(dy, at, at.present, lanes, last, 0.0, constants)
        output = read_tile(y, at, at.present, lanes, last, 0.0, constants)
        total += sum_of(upstream, output, LOGARITHM)
        result = gradient(upstream, output, total, LOGARITHM, constants)
        write_tile(dx, at, result, lanes, last, constants)
    else:
        for start in range(0, last, constants.CLASSES):
            c = start + lanes
            upstream = read_tile(dy, at, at.present, c, last, 0.0, constants)
            total += sum_of(
                upstream, read_tile(y, at, at.present, c, last, 0.0, constants), LOGARITHM
            )
        for start in range(0, last, constants.CLASSES):
            c = start + lanes
            upstream = read_tile(dy, at, at.present, c, last, 0.0, constants)
            output = read_tile(y, at, at.present, c, last, 0.0, constants)
            result = gradient(upstream, output, total, LOGARITHM, constants)
            write_tile(dx, at, result, c, last, constants)


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
    constants, tile = layout(sizes, views, "" if grad_output is None else "dense")
    kernel = forward_kernel if grad_output is None else backward_kernel
    kernel[(outer * launch.cdiv(inner, tile.positions),)](
        *views,
        inner,
        classes,
        LOGARITHM=logarithm,
        WHOLE=classes <= tile.classes,
        constants=compiled_in(constants),
        **launch.options(tile.threads, tile.cluster),
    )
