"""Embedding losses: each row of features of two or three tensors is reduced to a few sums.

    triplet   loss = max(0, margin + |u| - |v|),  u = x - y + eps, v = x - z + eps, w = y - z + eps
              with SWAP, |v| is replaced by min(|v|, |w|); |u| is the 2-norm with EUCLIDEAN, else
              the 1-norm
              dloss/dx = u' - v', dloss/dy = -u', dloss/dz = v',    u'_i = u_i / |u| or sign u_i
              if |w| is the minimum, dloss/dx = u', dloss/dy = -u' - w', dloss/dz = w'
    cosine    loss = 1 - cos for target 1, max(0, cos - margin) for target -1, 0 for others
              cos = x.y / sqrt(X Y),    X = x.x + 1e-12, Y = y.y + 1e-12
              dcos/dx = y / sqrt(X Y) - cos x / X,    dcos/dy = x / sqrt(X Y) - cos y / Y

Shapes: (n, D) with contiguous features. Bytes: each input is read once, and a second time for
gradients, mostly from cache; each gradient is written once. The kernels take tuples of the inputs,
of their row strides and of the gradients, which may be None. INCLUSIVE: whether the derivative of
max(0, excess) at 0 is 1.

torch: F.triplet_margin_loss(x, y, z, margin=..., p=..., eps=..., swap=...)
       F.cosine_embedding_loss(x, y, target, margin=...)
"""

from __future__ import annotations

import triton
import triton.language as tl

from .program import root, sign
from .reductions import divided, store_loss, weight_at
from .rows import class_block, contiguous_rows, load_tile, number, row_block, store_rows

EPS = tl.constexpr(9.999999960041972e-13)  # 1e-12 rounded to float32, as in torch


@triton.jit
def size(u, mask, EUCLIDEAN: tl.constexpr):
    return tl.where(mask, u * u if EUCLIDEAN else tl.abs(u), 0.0)


@triton.jit
def distance(sums, EUCLIDEAN: tl.constexpr):
    total = tl.sum(sums, 1)
    return root(total) if EUCLIDEAN else total


@triton.jit
def factor(distance, slope, EUCLIDEAN: tl.constexpr):
    """Returns the factor of a distance's gradient: slope, divided by the 2-norm if EUCLIDEAN."""
    if EUCLIDEAN:
        slope = tl.where(distance == 0.0, 0.0, slope / distance)
    return slope[:, None]


@triton.jit
def derivative(u, EUCLIDEAN: tl.constexpr):
    return u if EUCLIDEAN else sign(u)  # 0 for NaN, as in torch


@triton.jit
def differences(x_rows, y_rows, z_rows, c, mask, eps):
    """Returns u, v and w of a tile of features."""
    x = load_tile(x_rows, c, mask, 0.0)
    y = load_tile(y_rows, c, mask, 0.0)
    z = load_tile(z_rows, c, mask, 0.0)
    return x - y + eps, x - z + eps, y - z + eps


@triton.jit(do_not_specialize=["denominator"])
def triplet_margin_kernel(
    inputs,
    grad_output,
    denominator,
    loss,
    gradients,
    n,
    features,
    strides,
    numbers,
    INCLUSIVE: tl.constexpr,
    EUCLIDEAN: tl.constexpr,
    SWAP: tl.constexpr,
    UNREDUCED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNITS: tl.constexpr,
):
    A: tl.constexpr = tl.float64 if inputs[0].dtype.element_ty == tl.float64 else tl.float32
    _, rows, in_bounds, _, features = row_block(n, features, ROWS, UNITS)
    scale = divided(weight_at(grad_output, rows, in_bounds, A), denominator)
    x_rows = contiguous_rows(inputs[0], rows, strides[0], UNITS)
    y_rows = contiguous_rows(inputs[1], rows, strides[1], UNITS)
    z_rows = contiguous_rows(inputs[2], rows, strides[2], UNITS)
    eps = number(numbers[1], A)
    uu = tl.zeros([ROWS, BLOCK], A)
    vv = tl.zeros([ROWS, BLOCK], A)
    ww = tl.zeros([ROWS, BLOCK], A)
    for start in range(0, features, BLOCK):
        c, mask = class_block(start, features, in_bounds, BLOCK)
        u, v, w = differences(x_rows, y_rows, z_rows, c, mask, eps)
        uu += size(u, mask, EUCLIDEAN)
        vv += size(v, mask, EUCLIDEAN)
        ww += size(w, mask, EUCLIDEAN)
    u_norm = distance(uu, EUCLIDEAN)
    v_norm = distance(vv, EUCLIDEAN)
    w_norm = distance(ww, EUCLIDEAN) if SWAP else v_norm
    nearest = tl.where((v_norm < w_norm) | (v_norm != v_norm), v_norm, w_norm)  # NaN if either is
    excess = number(numbers[0], A) + u_norm - nearest
    if gradients[0] is not None or gradients[1] is not None or gradients[2] is not None:
        active = excess >= 0.0 if INCLUSIVE else excess > 0.0
        slope = tl.where(active, scale, 0.0)
        half = tl.where(v_norm == w_norm, 0.5 * slope, slope) if SWAP else slope
        by_u = factor(u_norm, slope, EUCLIDEAN)
        by_v = factor(v_norm, tl.where(v_norm > w_norm, 0.0, half), EUCLIDEAN)
        by_w = factor(w_norm, tl.where(v_norm < w_norm, 0.0, half), EUCLIDEAN)
        for start in range(0, features, BLOCK):
            c, mask = class_block(start, features, in_bounds, BLOCK)
            u, v, w = differences(x_rows, y_rows, z_rows, c, mask, eps)
            of_u = by_u * derivative(u, EUCLIDEAN)
            of_v = by_v * derivative(v, EUCLIDEAN)
            store_rows(gradients[0], rows, features, c, mask, of_u - of_v, UNITS)
            if SWAP:
                of_w = by_w * derivative(w, EUCLIDEAN)
                of_u += of_w
                of_v += of_w
            store_rows(gradients[1], rows, features, c, mask, -of_u, UNITS)
            store_rows(gradients[2], rows, features, c, mask, of_v, UNITS)
    value = tl.where(excess < 0.0, 0.0, excess)
    store_loss(loss, value, scale, rows, in_bounds, in_bounds, None, UNREDUCED)


@triton.jit(do_not_specialize=["denominator"])
def cosine_embedding_kernel(
    inputs,
    grad_output,
    denominator,
    loss,
    gradients,
    n,
    features,
    strides,
    numbers,
    INCLUSIVE: tl.constexpr,
    UNREDUCED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNITS: tl.constexpr,
):
    A: tl.constexpr = tl.float64 if inputs[0].dtype.element_ty == tl.float64 else tl.float32
    _, rows, in_bounds, _, features = row_block(n, features, ROWS, UNITS)
    scale = divided(weight_at(grad_output, rows, in_bounds, A), denominator)
    x_rows = contiguous_rows(inputs[0], rows, strides[0], UNITS)
    y_rows = contiguous_rows(inputs[1], rows, strides[1], UNITS)
    label = tl.load(inputs[2] + rows.to(tl.int64) * strides[2], mask=in_bounds, other=0.0)
    xy = tl.zeros([ROWS, BLOCK], A)
    xx = tl.zeros([ROWS, BLOCK], A)
    yy = tl.zeros([ROWS, BLOCK], A)
    for start in range(0, features, BLOCK):
        c, mask = class_block(start, features, in_bounds, BLOCK)
        x = load_tile(x_rows, c, mask, 0.0)
        y = load_tile(y_rows, c, mask, 0.0)
        xy += x * y
        xx += x * x
        yy += y * y
    of_x = tl.sum(xx, 1) + EPS
    of_y = tl.sum(yy, 1) + EPS
    norms = root(of_x) * root(of_y)  # root(of_x * of_y) could overflow
    cosine = tl.sum(xy, 1) / norms
    excess = cosine - number(numbers[0], A)
    if gradients[0] is not None or gradients[1] is not None:
        active = excess >= 0.0 if INCLUSIVE else excess > 0.0
        other = tl.where((label == -1.0) & active, scale, 0.0)
        slope = tl.where(label == 1.0, -scale, other)
        across = (slope / norms)[:, None]
        by_x = (slope * cosine / of_x)[:, None]
        by_y = (slope * cosine / of_y)[:, None]
        for start in range(0, features, BLOCK):
            c, mask = class_block(start, features, in_bounds, BLOCK)
            x = load_tile(x_rows, c, mask, 0.0)
            y = load_tile(y_rows, c, mask, 0.0)
            store_rows(gradients[0], rows, features, c, mask, across * y - by_x * x, UNITS)
            store_rows(gradients[1], rows, features, c, mask, across * x - by_y * y, UNITS)
    above = tl.where((label != -1.0) | (excess < 0.0), 0.0, excess)
    value = tl.where(label == 1.0, 1.0 - cosine, above)
    store_loss(loss, value, scale, rows, in_bounds, in_bounds, None, UNREDUCED)
