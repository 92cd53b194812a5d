"""Targets and weights of rows; deterministic sums in float64; multiplication in place.

    count    out = sum_i [t_i counts] weight[t_i] token_weight_i          reads 8 bytes per target
    scale    x *= factor                                reads and writes x; nothing if factor is 1

Each program stores one partial sum. The last program of each group to arrive adds up the sums of
its group, and the last group adds up the sums of all groups. The order is fixed, so results are
bitwise reproducible. In the machine code for sm_90 with one warp per program (not measured), the
last program executes 100 instructions after its arrival, or 250 with several groups. Each of its
one or two sums waits for memory once, for 8 independent loads per thread. Several groups add a
memory fence and an atomic operation.

torch: weight[t[(t != ignore_index) & (0 <= t) & (t < classes)]].sum(), x.mul_(factor)
"""

from __future__ import annotations

import triton
import triton.language as tl

GROUP = tl.constexpr(256)  # programs that share an arrival counter


@triton.jit
def arrives_last(counter, arrivals):
    """Returns whether a program is the last to arrive at a counter, which then becomes 0 again."""
    tl.debug_barrier()
    # Releases this program's partial sum, and acquires the partial sums of earlier arrivals.
    last = tl.atomic_add(counter, 1, sem="acq_rel") == arrivals - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def store_sum(out, parts, n):
    total = tl.zeros([GROUP], tl.float64)
    for start in range(0, n, GROUP):
        i = start + tl.arange(0, GROUP)
        # bypasses L1, which may hold stale values
        total += tl.load(parts + i, mask=i < n, other=0.0, cache_modifier=".cg")
    A: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    tl.store(out, tl.sum(total).to(A))


@triton.jit
def add_up(part, reduced):
    """Adds up the partial sums of all programs.

    reduced: the sum, of any dtype. With several programs, also the partial sums of programs and of
        groups, and zeroed counters: one for all groups and one for each group. Without counters,
        the partial sums are only stored.
    """
    out = reduced[0]
    if len(reduced) == 1:
        tl.store(out, part.to(tl.float32) if out.dtype.element_ty == tl.bfloat16 else part)
    else:
        parts, programs = reduced[1], tl.num_programs(0)
        tl.store(parts + tl.program_id(0), part)
        if len(reduced) == 3:
            groups, group = tl.cdiv(programs, GROUP), tl.program_id(0) // GROUP
            first = group * GROUP
            members = tl.minimum(programs - first, GROUP)
            if arrives_last(reduced[2] + 1 + group, members):
                if groups == 1:
                    store_sum(out, parts + first, members)
                else:
                    store_sum(parts + programs + group, parts + first, members)
                    if arrives_last(reduced[2], groups):
                        store_sum(out, parts + programs, groups)


@triton.jit
def loss_of_rows(value, scale, valid, invalid):
    """Returns value * scale; 0 in other rows, NaN in invalid rows if invalid is not None."""
    otherwise = 0.0 if invalid is None else tl.where(invalid, float("nan"), 0.0)
    return tl.where(valid, value, otherwise) * scale


@triton.jit
def store_loss(loss, value, scale, rows, in_bounds, valid, invalid, UNREDUCED: tl.constexpr):
    """Stores the loss of each row, or this program's partial sum by `add_up`."""
    if loss is not None:
        value = loss_of_rows(value, scale, valid, invalid)
        if UNREDUCED:
            tl.store(loss + rows, value, mask=in_bounds)
        else:
            add_up(tl.sum(tl.where(in_bounds, value, 0.0)), loss)


# ---- targets, weights and scales of rows ---------------------------------------------------------


@triton.jit
def read_target(targets, rows, in_bounds, classes):
    """Returns the class index, whether it is valid, and whether it is out of range.

    Raising an error for an index out of range would require a synchronisation with the GPU. The
    loss of such a row is NaN, its gradient zero. If the class indices are None, all rows are valid.

    targets: class indices, weight, token_weight and ignore_index; the first three may be None.
    """
    label, counted, valid = tl.full(rows.shape, -1, tl.int64), in_bounds, in_bounds
    if targets[0] is not None:
        label = tl.load(targets[0] + rows, mask=in_bounds, other=targets[3])
        counted = in_bounds & (label != targets[3])
        valid = counted & (label >= 0) & (label < classes)
    return label, valid, counted & (valid == 0)


@triton.jit
def class_weight(weight, c, classes, first_class):
    """Returns the class weights of a tile as a row; 1 if weight is None."""
    row = 1.0
    if weight is not None:
        row = tl.load(weight + first_class + c, mask=c < classes, other=0.0)[None, :]
    return row


@triton.jit
def weight_at(weight, i, mask, A: tl.constexpr):
    """Returns the weights at indices i, 1 if weight is None; 0 outside of the mask."""
    value = tl.where(mask, 1.0, 0.0)
    if weight is not None:
        value = tl.load(weight + i, mask=mask, other=0.0)
    return value.to(A)


@triton.jit
def gradient_scale(scale, grad_output, rows, mask, UNREDUCED: tl.constexpr):
    """Returns scale * grad_output, which has an element for each row if UNREDUCED, else one."""
    if grad_output is not None:
        if UNREDUCED:
            scale *= tl.load(grad_output + rows, mask=mask, other=0.0)
        else:
            scale *= tl.load(grad_output)
    return scale


@triton.jit
def counted_weights(targets, i, n, classes):
    """Returns the weights of targets i in the denominator of a mean; 0 if ignored or invalid."""
    label, valid, _ = read_target(targets, i, i < n, classes)
    counted = weight_at(targets[1], label, valid, tl.float64)
    if targets[2] is not None:
        counted *= weight_at(targets[2], i, valid, tl.float64)
    return counted


@triton.jit
def mean_divisor(denominator, targets, n, classes):
    """Returns the denominator, or the total weight of all n targets if it is the target.

    If there are few targets, this takes less time than another kernel launch.
    """
    if denominator.dtype.is_ptr() and denominator.dtype.element_ty == tl.int64:
        total = tl.zeros([256], tl.float64)  # a larger block would need more registers
        for start in range(0, n, 256):
            total += counted_weights(targets, start + tl.arange(0, 256), n, classes)
        denominator = tl.sum(total)
    return denominator


@triton.jit
def divided(weight, denominator):
    """Returns weight / denominator; the denominator is None, a number or a pointer."""
    if denominator is not None:
        if denominator.dtype.is_ptr():
            denominator = tl.load(denominator)
        # Like torch's mean, a mean of total weight 0 is NaN, also if the sum is not 0.
        weight /= tl.where(denominator == 0, float("nan"), denominator.to(weight.dtype))
    return weight


@triton.jit
def read_rows(targets, denominator, rows, in_bounds, classes, A: tl.constexpr):
    """Returns the results of `read_target`, the target's weight or 1, and the factor of the loss.

    Rows of weight 0 are not valid.
    """
    label, valid, invalid = read_target(targets, rows, in_bounds, classes)
    weight = 1.0
    if targets[0] is not None and targets[1] is not None:
        weight = weight_at(targets[1], label, valid, A)
    scale = weight_at(targets[2], rows, valid | invalid, A)
    if targets[2] is not None:
        valid = valid & (scale != 0.0)
    return label, valid, invalid, weight, divided(scale, denominator)


# ---- kernels -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["classes"])
def count_kernel(targets, counted, n, classes, BLOCK: tl.constexpr):
    """Computes the denominator of a mean, the sum of the weights of all targets.

    counted: the tensors that `add_up` takes.
    """
    total = tl.zeros([BLOCK], tl.float64)
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, step):
        total += counted_weights(targets, start + tl.arange(0, BLOCK), n, classes)
    add_up(tl.sum(total), counted)


@triton.jit
def scale_kernel(x, factor, n, BLOCK: tl.constexpr):
    """Computes x *= factor in float32, or in float64 if x is float64; 0 times NaN is 0."""
    factor = tl.load(factor).to(tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32)
    if factor != 1.0:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, step):
            i = start + tl.arange(0, BLOCK)
            value = tl.load(x + i, mask=i < n).to(factor.dtype)
            tl.store(x + i, tl.where(value == 0, value, value * factor), mask=i < n)
