"""The launch of cross-entropy's kernels: what they are compiled for, how many, on what.

One kernel where all classes are held, else one or two that read twice, of as many programs as a GPU
runs at a time, or some times as many: each has blocks of positions by turns, and the last one adds
up what all have found. A mean over class indices counts them first, or few of them in each program.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from . import launch
from .cross_entropy import Shares, one_read_kernel, split_kernel, two_read_kernel
from .cross_entropy_terms import FAR, Constants, Inputs, Outputs, Scalars
from .sums import count, total
from .tiles import Memory, Viewed, layout, memory_of, viewed


def terms(smoothing: float, classes: int, follows: bool) -> tuple[float, float, float]:
    """Level, offset and share of the equations above; follows: the aim is that of probabilities."""
    uniform = smoothing / classes
    if follows:
        return 1 - smoothing, uniform / (1 - smoothing), 0.0
    return uniform, 1.0, 1 - smoothing


class Asked(NamedTuple):
    """What decides on a plan, beside sizes and memory."""

    indices: bool  # rather than probabilities
    weighted: bool
    label_smoothing: float
    focal: bool
    squares: bool
    gradients: bool  # of logits
    measures: bool
    upstream: bool  # gradients are multiplied by the loss's
    counts: bool  # a mean over targets
    inplace: bool
    all_classes: int


class Plan(NamedTuple):
    """What all calls of the same sizes, memory and options have in common."""

    terms: tuple[float, float, float]
    dense: bool  # more than the target is aimed at
    splits: int  # programs that share the classes of a position
    length: int  # and how many each takes
    blocks: int  # of positions and splits
    programs: int  # that take them by turns
    constants: Constants
    options: dict[str, Any]


@functools.lru_cache(maxsize=4096)
def planned(sizes: tuple[int, int, int], memory: Memory, asked: Asked) -> Plan:
    outer, inner, classes = sizes
    smoothing = max(0.0, asked.label_smoothing)
    follows, dense = not asked.indices and smoothing < 1, not asked.indices or smoothing > 0
    aims = dense and (not asked.indices or asked.weighted)
    kind = "roomier" if dense or asked.upstream else ""
    if aims:
        kind = "dense" if asked.weighted else "aimed"
    elif asked.measures:
        kind = "short"
    elif not asked.gradients:
        kind = "forward"
    compiled, tile = layout(sizes, memory, kind)
    counted = launch.COUNTED if asked.counts and outer * inner <= launch.COUNTED else 0
    if counted or asked.focal or asked.squares:
        more = 32 if counted and tile.threads == 32 else 16
        most = launch.REGISTERS // tile.threads
        tile = tile._replace(registers=min(tile.registers + more, most))
    columns = classes + (tile.loaded - 1 if compiled.SHIFTED else 0)
    splits, length = launch.splits(outer * inner, columns, tile)
    blocks = outer * launch.cdiv(inner, tile.positions) * splits
    level, offset, share = terms(smoothing, asked.all_classes, follows)
    return Plan(
        (level, offset, share),
        dense,
        splits,
        length,
        blocks,
        launch.programs(blocks, tile, memory.device),
        Constants(
            **compiled._asdict(),
            SLOPE=float(follows),
            OFFSET=offset != 0,
            UNIFORM=dense and not aims,
            AIMS=aims,
            COUNTED=counted,
            INPLACE=asked.inplace,
            CLUSTER=tile.cluster > 1,
            FOCAL=asked.focal,
            SQUARES=asked.squares,
        ),
        launch.options(tile.threads, tile.cluster, tile.registers),
    )


def run(
    inputs: Inputs,
    outputs: Outputs,
    shares: Shares,
    scalars: Scalars,
    plan: Plan,
) -> None:
    """Launches one kernel that reads once, or one or two that read twice."""
    constants, blocks, options = plan.constants, plan.blocks, plan.options
    if constants.HELD:
        one_read_kernel[(plan.programs,)](inputs, outputs, *scalars, blocks, constants, **options)
        return
    if shares.sums is not None:
        split_kernel[(blocks,)](inputs, shares, *scalars, constants, **options)
    powers = launch.power_of_2(shares.splits)
    two_read_kernel[(plan.programs,)](
        inputs, outputs, shares, *scalars, blocks, constants, SPLITS=powers, **options
    )


def mean_by(
    target: torch.Tensor | None,
    weight: torch.Tensor | None,
    token_weight: torch.Tensor | None,
    options: Any,
    positions: int,
    classes: int,
) -> tuple[torch.Tensor | None, float]:
    """What a mean is divided by, where only the GPU knows it, and multiplied by."""
    given = options.denominator
    if isinstance(given, (int, float)):
        return None, 1 / given
    if given is not None:
        return given, 1.0
    if target is not None:
        return count(target, weight, token_weight, options.ignore_index, classes), 1.0
    if token_weight is not None:
        return token_weight.sum(dtype=torch.float64), 1.0
    return None, 1 / positions


def cross_entropy(
    sizes: tuple[int, int, int],
    logits: Viewed,
    target: torch.Tensor | None,
    probabilities: Viewed | None,
    weight: torch.Tensor | None,
    token_weight: torch.Tensor | None,
    options: Any,
    among: Any,
    upstream: torch.Tensor | None,
    loss: torch.Tensor | None,
    grad_logits: Viewed | None,
    grad_probabilities: Viewed | None,
    measures: Any,
) -> None:
    """Computes the outputs that are not None; grad_logits may be the logits."""
    outer, inner, classes = sizes
    first_class, all_classes, lse = among
    positions, each, mean = outer * inner, options.reduction == "none", options.reduction == "mean"
    own_lse, *measured = measures or (None, None, None)
    views = [viewed(given) for given in (logits, probabilities, grad_logits, grad_probabilities)]
    asked = Asked(
        target is not None,
        weight is not None,
        options.label_smoothing,
        options.gamma > 0,
        options.z_loss > 0,
        grad_logits is not None,
        measured[0] is not None,
        upstream is not None,
        mean and target is not None and options.denominator is None,
        grad_logits is logits,
        all_classes,
    )
    memory = memory_of([view for view in views if view is not None])
    plan = planned(sizes, memory, asked)
    splits = plan.splits
    sums = aimed = None
    if splits > 1 and lse is None:
        kind = launch.accumulate_dtype(memory.dtype)
        sums = logits[0].new_empty(3, positions * splits, dtype=kind)
    if lse is not None and plan.dense and weight is not None:
        aimed = weight.sum(dtype=torch.float64)
    denominator, scale = None, 1.0
    if mean and not plan.constants.COUNTED:
        denominator, scale = mean_by(target, weight, token_weight, options, positions, all_classes)

    each_out = added = None
    if loss is not None and each:
        each_out = loss if splits == 1 else loss.new_empty(positions, splits)
    elif loss is not None:
        added = total(loss, plan.programs)
    measured_parts = measured
    if splits > 1:
        measured_parts = [to if to is None else to.new_empty(positions, splits) for to in measured]
    run(
        Inputs(
            views[0],
            target,
            views[1],
            weight,
            token_weight,
            lse,
            aimed,
            upstream,
            int(each),
            denominator,
            options.ignore_index,
            positions,
            inner,
            classes,
            first_class,
            all_classes,
        ),
        Outputs(each_out, added, own_lse, *measured_parts, *views[2:]),
        Shares(splits, plan.length, sums),
        Scalars(*plan.terms, scale, float(options.gamma), float(options.z_loss)),
        plan,
    )
    if each_out is not None and splits > 1:
        torch.sum(each_out, 1, out=loss.view(positions))
    entropy, prediction = measured
    if entropy is not None:
        if splits > 1:
            torch.sum(measured_parts[0], 1, out=entropy)
            torch.amin(measured_parts[1], 1, out=prediction)
        prediction.sub_(FAR.value * (prediction >= FAR.value))
