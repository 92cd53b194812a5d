"""Softmax and log-softmax over the classes of each row, and their gradients.

    forward   softmax      y_c  = exp(x_c - lse),          lse = log sum_c exp(x_c)
              log_softmax  y_c  = x_c - lse
    backward  softmax      dx_c = y_c (dy_c - sum_k dy_k y_k)
              log_softmax  dx_c = dy_c - exp(y_c) sum_k dy_k

Shapes: see `rows.py`. Bytes: operands are read once if a tile holds all classes, else twice, the
second time mostly from cache; the result is written once.

torch: F.softmax(x, dim), F.log_softmax(x, dim)
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import exp_nonpositive, log
from .rows import DROP, class_block, first_pass, load_tile, row_block, store_tile, strided_rows


@triton.jit
def normalize(x, maximum, total, LOGARITHM: tl.constexpr, EXACT: tl.constexpr):
    if LOGARITHM:
        return (x - maximum[:, None]) - log(total)[:, None]
    return exp_nonpositive(x - maximum[:, None], EXACT, SUBNORMAL=True) / total[:, None]


@triton.jit
def softmax_kernel(
    x,
    y,
    inner,
    classes,
    x_strides,
    y_strides,
    LOGARITHM: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Computes y = softmax(x), or log_softmax(x); strides are outer, inner and class strides."""
    EXACT: tl.constexpr = x.dtype.element_ty.primitive_bitwidth > 16
    outer, lanes, in_bounds, inner, classes = row_block(inner, classes, ROWS, UNITS)
    x_rows = strided_rows(x, outer, lanes, x_strides, 0, UNITS)
    y_rows = strided_rows(y, outer, lanes, y_strides, 0, UNITS)
    if WHOLE_ROW:
        c, mask = class_block(0, classes, in_bounds, BLOCK)
        row = load_tile(x_rows, c, mask, -float("inf"))
        maximum = tl.max(row, 1)
        total = tl.sum(exp_nonpositive(row - maximum[:, None], EXACT), 1)
        store_tile(y_rows, c, mask, normalize(row, maximum, total, LOGARITHM, EXACT))
    else:
        maximum, total = first_pass(x_rows, classes, in_bounds, BLOCK)
        for start in range(0, classes, BLOCK):
            c, mask = class_block(start, classes, in_bounds, BLOCK)
            part = load_tile(x_rows, c, mask, 0.0, 1.0, DROP)
            store_tile(y_rows, c, mask, normalize(part, maximum, total, LOGARITHM, EXACT))


@triton.jit
def gradient(dy, y, total, LOGARITHM: tl.constexpr, EXACT: tl.constexpr):
    if LOGARITHM:
        return dy - exp_nonpositive(y, EXACT) * total[:, None]
    return y * (dy - total[:, None])


@triton.jit
def softmax_backward_kernel(
    dy,
    y,
    dx,
    inner,
    classes,
    strides,
    LOGARITHM: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Computes dx from dy and y, which share their outer, inner and class strides."""
    A: tl.constexpr = tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32
    EXACT: tl.constexpr = y.dtype.element_ty.primitive_bitwidth > 16
    outer, lanes, in_bounds, inner, classes = row_block(inner, classes, ROWS, UNITS)
    dy_rows = strided_rows(dy, outer, lanes, strides, 0, UNITS)
    y_rows = strided_rows(y, outer, lanes, strides, 0, UNITS)
    dx_rows = strided_rows(dx, outer, lanes, strides, 0, UNITS)
    if WHOLE_ROW:
        c, mask = class_block(0, classes, in_bounds, BLOCK)
        dy_row = load_tile(dy_rows, c, mask, 0.0)
        y_row = load_tile(y_rows, c, mask, 0.0)
        total = tl.sum(dy_row if LOGARITHM else dy_row * y_row, 1)
        store_tile(dx_rows, c, mask, gradient(dy_row, y_row, total, LOGARITHM, EXACT))
    else:
        sums = tl.zeros([ROWS, BLOCK], A)
        for start in range(0, classes, BLOCK):
            c, mask = class_block(start, classes, in_bounds, BLOCK)
            dy_part = load_tile(dy_rows, c, mask, 0.0)
            y_part = load_tile(y_rows, c, mask, 0.0)
            sums += dy_part if LOGARITHM else dy_part * y_part
        total = tl.sum(sums, 1)
        for start in range(0, classes, BLOCK):
            c, mask = class_block(start, classes, in_bounds, BLOCK)
            dy_part = load_tile(dy_rows, c, mask, 0.0)
            y_part = load_tile(y_rows, c, mask, 0.0)
            store_tile(dx_rows, c, mask, gradient(dy_part, y_part, total, LOGARITHM, EXACT))
