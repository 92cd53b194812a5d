"""The launch of cross-entropy's kernels: what they are compiled for, how many, on what.

One kernel where all classes are held, else one or two that read twice. A mean over class
indices counts them first. Where programs are many, or form clusters, another kernel adds up their
parts of a loss: for that each would wait at its end, which costs more than a launch.
"""

from __future__ import annotations

from typing import Any

import torch

from . import launch
from .cross_entropy import (
    FAR,
    Constants,
    Inputs,
    Outputs,
    Scalars,
    Shares,
    one_read_kernel,
    split_kernel,
    two_read_kernel,
)
from .sums import count, sum_parts, total
from .tiles import Viewed, layout, viewed


def terms(smoothing: float, classes: int, follows: bool) -> tuple[float, float, float]:
    """Level, offset and share of the equations above; follows: the aim is that of probabilities."""
    uniform = smoothing / classes
    if follows:
        return 1 - smoothing, uniform / (1 - smoothing), 0.0
    return uniform, 1.0, 1 - smoothing


def run(
    inputs: Inputs,
    outputs: Outputs,
    shares: Shares,
    scalars: Scalars,
    constants: Constants,
    programs: int,
    options: dict[str, Any],
) -> None:
    """Launches one kernel that reads once, or one or two that read twice."""
    grid = (programs,)
    if constants.HELD:
        one_read_kernel[grid](inputs, outputs, *scalars, constants, **options)
        return
    if shares.sums is not None:
        most = launch.power_of_2(launch.SPLIT.positions)
        split_kernel[grid](inputs, shares, *scalars, constants, ALL=most, **options)
    powers = launch.power_of_2(shares.splits)
    two_read_kernel[grid](inputs, outputs, shares, *scalars, constants, SPLITS=powers, **options)


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
    views = [viewed(given) for given in (logits, probabilities, grad_logits, grad_probabilities)]
    smoothing = max(0.0, options.label_smoothing)
    follows, dense = target is None and smoothing < 1, target is None or smoothing > 0
    aims = dense and (target is None or weight is not None)
    aimed = None
    if lse is not None and dense and weight is not None:
        aimed = weight.sum(dtype=torch.float64)
    own_lse, *measured = measures or (None, None, None)
    plain = grad_logits is not None and measured[0] is None
    kind = "dense" if aims else "short" if not plain else "smoothed" if dense else ""
    compiled, tile = layout(sizes, [view for view in views if view is not None], kind)
    columns = classes + (tile.loaded - 1 if compiled.SHIFTED else 0)
    splits, length = launch.splits(positions, columns, tile)
    programs = outer * launch.cdiv(inner, tile.positions) * splits
    sums = None
    if splits > 1 and lse is None:
        sums = logits[0].new_empty(
            3, positions * splits, dtype=launch.accumulate_dtype(logits[0].dtype)
        )
    denominator, scale = None, 1.0
    counts_first = mean and sums is not None and target is not None and options.denominator is None
    if counts_first:
        denominator = target.new_empty((), dtype=torch.float64)
    elif mean:
        denominator, scale = mean_by(target, weight, token_weight, options, positions, all_classes)

    each_out = parts = added = None
    if loss is not None and each:
        each_out = loss if splits == 1 else loss.new_empty(positions, splits)
    elif loss is not None and (tile.cluster > 1 or programs > launch.MOST_PROGRAMS):
        parts = loss.new_empty(programs)
    elif loss is not None:
        added = total(loss, programs)
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
            inner,
            classes,
            first_class,
            all_classes,
        ),
        Outputs(each_out, added, parts, own_lse, *measured_parts, *views[2:]),
        Shares(splits, length, sums, positions * splits, denominator if counts_first else None),
        Scalars(
            *terms(smoothing, all_classes, follows),
            scale,
            float(options.gamma),
            float(options.z_loss),
        ),
        Constants(
            *compiled,
            SLOPE=float(follows),
            UNIFORM=dense and not aims,
            AIMS=aims,
            INPLACE=grad_logits is logits,
            CLUSTER=tile.cluster > 1,
            FOCAL=options.gamma > 0,
            SQUARES=options.z_loss > 0,
        ),
        programs,
        launch.options(tile.threads, tile.cluster, tile.registers),
    )
    if parts is not None:
        sum_parts(parts, loss, denominator, scale)
    if each_out is not None and splits > 1:
        torch.sum(each_out, 1, out=loss.view(positions))
    entropy, prediction = measured
    if entropy is not None:
        if splits > 1:
            torch.sum(measured_parts[0], 1, out=entropy)
            torch.amin(measured_parts[1], 1, out=prediction)
        prediction.sub_(FAR.value * (prediction >= FAR.value))
