"""Definitions, in torch's operators, of functions that torch lacks, for calls without a kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyfused import checks
from pyfused.dispatch.autograd import autocast_dtype
from pyfused.dispatch.operator import requires_grad
from pyfused.dispatch.originals import F
from pyfused.layout import (
    accumulate_dtype,
    class_targets,
    common_dtype,
    loss_shape,
    with_leading_dims,
)
from pyfused.ops import metrics
from pyfused.ops.pointwise_loss import reduced
from pyfused.types import CrossEntropyOptions, Head, LogProbsOptions


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    denominator: Tensor | None,
    options: CrossEntropyOptions,
) -> Any:
    if options.with_metrics:
        loss_options = options._replace(with_metrics=False)
        factors = weight, token_weight, denominator
        loss = masked_cross_entropy(input, target, *factors, loss_options)
        dtype = accumulate_dtype(operand_dtype(input, target, weight))
        input = _scaled(input.to(dtype), options)
        return loss, metrics.from_logits(input, target, options.ignore_index)
    ignore_index, label_smoothing = options.ignore_index, options.label_smoothing
    if token_weight is denominator is None and options.is_plain():
        others = None, ignore_index, None, options.reduction, label_smoothing
        return F.cross_entropy(input, target, weight, *others)
    if isinstance(options.label_smoothing, Tensor) and options.label_smoothing.requires_grad:
        raise TypeError("label_smoothing: expected a float, got a Tensor that requires grad")
    soft, result_dtype = target.is_floating_point(), dtype_of_loss(options, input, target, weight)
    target = class_targets(target, loss_shape(input, "none"))
    wide = accumulate_dtype(operand_dtype(input, target, weight))
    dtype = torch.promote_types(wide, result_dtype)
    options, dim = widened(options, denominator, dtype), 0 if input.dim() == 1 else 1
    input = without_ignored(input, target, ignore_index, token_weight)
    x = _scaled(input.to(dtype), options)
    log_p, shape = x.log_softmax(dim), loss_shape(x, "none")
    weights = None if weight is None else weight.to(dtype)
    weighted, target_weight, is_valid, divisors = log_p, None, None, None
    if weights is not None:
        weighted = log_p * weights.view(-1, *[1] * (x.dim() - dim - 1))
    if soft:
        target = without_ignored(target, target, ignore_index, token_weight).to(dtype)
        if options.label_smoothing > 0:  # as torch does: a class of target 0 may have x_c = -inf
            smoothing, classes = options.label_smoothing, x.shape[dim] or 1
            target = target * (1 - smoothing) + smoothing / classes
            options = options._replace(label_smoothing=0.0)
        at_target = (target * weighted).sum(dim)
    else:
        at_target = -F.nll_loss(log_p, target, None, None, ignore_index, None, "none")
        is_valid = target != ignore_index
        divisors = target_weights(target, weights, ignore_index, dtype)
        target_weight = None if weights is None else divisors
    smooth = weighted.sum(dim) if options.label_smoothing > 0 else None
    has_z_loss = isinstance(options.z_loss, Tensor) or options.z_loss
    lse = x.logsumexp(dim) if has_z_loss else None
    loss = row_losses(at_target, smooth, lse, target_weight, options, x.shape[dim])
    if is_valid is not None:
        loss = loss.where(is_valid, 0)
        if token_weight is not None:  # infinity times 0 is NaN
            token_weight = token_weight.reshape(shape).where(is_valid, 0)
    return reduced_rows(loss, token_weight, options, divisors).to(result_dtype)


def dtype_of_loss(options: Any, input: Any, target: Any, weight: Any) -> torch.dtype:
    """Returns the dtype of a loss of logits or log-probabilities: `loss_dtype`, or torch's.

    torch promotes class probabilities with the logits and the class weight. With class indices, the
    loss has the logits' dtype.
    """
    if (dtype := getattr(options, "loss_dtype", None)) is not None:
        return dtype  # type: ignore[no-any-return]
    dtype = input.dtype
    if target.dtype is not torch.int64 and target.is_floating_point():
        dtype = common_dtype(input, target, weight)
    return dtype if dtype is torch.float32 else autocast_dtype(dtype, input.device)


def operand_dtype(input: Any, target: Any, weight: Any) -> torch.dtype:
    """Returns the dtype in which kernels take the logits and class probabilities.

    Kernels multiply by weights in float32, so a float32 weight does not widen half precision.
    """
    if not target.is_floating_point():
        return input.dtype  # type: ignore[no-any-return]
    common = common_dtype(input, target, weight)
    return common if common is torch.float64 else common_dtype(input, target)


def masked_cross_entropy(input: Tensor, target: Tensor, *others: Any) -> Any:
    """Returns `cross_entropy`, without gradients of NaN in ignored rows."""
    input = without_ignored(input, target, others[-1].ignore_index)
    return cross_entropy(input, target, *others)


def reduced_rows(
    loss: Tensor, token_weight: Tensor | None, options: Any, divisors: Tensor | None = None
) -> Tensor:
    """Multiplies the losses of rows by the token weights, and reduces them.

    Args:
        divisors: The weights of the rows in the default divisor of a mean, None for ones.
    """
    if token_weight is not None:
        is_constant = not requires_grad(token_weight)
        token_weight = token_weight.reshape(loss.shape).to(loss.dtype)
        loss = loss * token_weight
        if is_constant:  # NaN times 0 is NaN
            loss = loss.where(token_weight != 0, 0)
        divisors = token_weight if divisors is None else divisors * token_weight
    if options.reduction == "none":
        return loss
    if options.reduction == "sum":
        return loss.sum()
    divisor = options.denominator
    if divisor is None:
        divisor = loss.numel()
        if divisors is not None:  # a mean of total weight 0 is NaN, as torch's
            total = divisors.sum().to(loss.dtype)
            divisor = total.where(total != 0, torch.nan)
    mean: Tensor = loss.sum() / divisor
    return mean


def factors(token_weight: Any, denominator: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """Checks the token weights and the denominator of a call, and returns them for kernels.

    They have the accumulation dtype of the operands or a wider one. In half precision, their
    products and sums would overflow or be rounded.
    """
    checks.factors(token_weight, denominator)
    wide = accumulate_dtype(dtype)
    if token_weight is not None:
        token_weight = token_weight.to(torch.promote_types(token_weight.dtype, wide))
    if denominator is not None:
        exact = wide if denominator.is_floating_point() else torch.float64
        denominator = denominator.reshape(()).to(torch.promote_types(denominator.dtype, exact))
    return token_weight, denominator


def row_losses(
    log_p: Tensor,
    smooth: Tensor | None,
    lse: Tensor | None,
    target_weight: Tensor | None,
    options: CrossEntropyOptions,
    classes: int,
) -> Tensor:
    """Returns the cross-entropy of each row.

    With class weights w, label smoothing s, and target y or target probabilities q:

        (1 - s) w_y focal(-log p_y) - s / C sum_c w_c log p_c + z_loss lse^2

    Args:
        log_p: log p_y, or sum_c q_c w_c log p_c.
        smooth: sum_c w_c log p_c, or None if s is 0.
        lse: The log-sum-exp of the logits, or None if z_loss is 0.
        target_weight: w_y, or None for 1.
        classes: The number of classes C.
    """
    if isinstance(options.gamma, Tensor) or options.gamma:
        log_p = -_focal(-log_p, options.gamma)
    log_p_factor, smooth_factor, squared_lse_factor = row_coefficients(
        target_weight, options, classes
    )
    loss: Tensor = log_p_factor * log_p
    loss = loss if smooth is None else loss + smooth_factor * smooth
    return loss if lse is None else loss + squared_lse_factor * lse.square()


def row_coefficients(
    target_weight: Tensor | None, options: CrossEntropyOptions, classes: int
) -> tuple[Any, float, Any]:
    """Returns the coefficients of log p_y, sum_c w_c log p_c and lse^2 in the loss of a row."""
    smoothing = max(0.0, options.label_smoothing)
    log_p_factor: Any = smoothing - 1
    smooth_factor = -smoothing / (classes or 1)  # without classes, a sum is 0
    log_p_factor = log_p_factor if target_weight is None else log_p_factor * target_weight
    return log_p_factor, smooth_factor, options.z_loss


def target_weights(
    target: Tensor, weight: Tensor | None, ignore_index: int, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Returns the class weight of each target, 0 for ignored targets."""
    valid = target != ignore_index
    if weight is None:
        return valid.to(dtype)
    label = target.where(valid, 0).long().clamp(0, len(weight) - 1)
    return weight.to(dtype)[label].where(valid, 0)


def widened(options: Any, denominator: Tensor | None, dtype: torch.dtype) -> Any:
    """Returns options whose tensors, and the denominator if it is one, are scalars of a dtype."""
    if denominator is not None:
        options = options._replace(denominator=denominator)
    return options._make([x.reshape(()).to(dtype) if isinstance(x, Tensor) else x for x in options])


def _focal(nll: Tensor, gamma: float | Tensor) -> Tensor:
    """Returns (1 - p) ** gamma * nll of p = exp(-nll).

    At 0 and at infinity, some of the derivative's factors are infinite, but not the derivative.
    """
    between = (nll > 0) & (nll < torch.inf)
    x = nll.where(between, 1)
    return (x * (-(-x).expm1()) ** gamma).where(between, nll).masked_fill(nll <= 0, 0)


def without_ignored(
    input: Tensor, target: Tensor, ignore_index: int, token_weight: Tensor | None = None
) -> Tensor:
    """Fills logits of rows that do not count with 0, because NaN in them would reach gradients."""
    counts = counted(target, ignore_index, token_weight)
    if counts is None:
        return input
    if counts.dim() != input.dim() - 1:
        counts = counts.reshape(loss_shape(input, "none"))
    return input.masked_fill(~counts.unsqueeze(min(input.dim() - 1, 1)), 0)


def counted(target: Tensor, ignore_index: int, token_weight: Tensor | None) -> Tensor | None:
    """Returns whether each target is neither ignored nor of weight 0; None if all count.

    If the weight requires grad, rows of weight 0 count, because their loss is its gradient.
    """
    # uint8 would wrap the index: class 156 is not -100.
    counts = None if target.is_floating_point() else target.long() != ignore_index
    if token_weight is None or requires_grad(token_weight):
        return counts
    weighted = token_weight != 0
    return weighted if counts is None else counts & weighted.reshape(counts.shape)


def _scaled(logits: Tensor, options: CrossEntropyOptions) -> Tensor:
    """Applies the softcap, scale and temperature to logits."""
    logits = logits if options.softcap is None else softcap(logits, options.softcap)
    scale = options.scale / options.temperature
    return logits if not isinstance(scale, Tensor) and scale == 1 else logits * scale


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    denominator: Tensor | None,
    options: CrossEntropyOptions,
) -> Any:
    if isinstance(input, Tensor):
        checks.same_device(input, linear_weight=linear_weight, linear_bias=linear_bias)
    head = Head(input, linear_weight, linear_bias, target, weight)
    ignore_index = options.ignore_index
    if is_head_of_torch(input, token_weight, denominator, options):
        is_default = type(ignore_index) is int and ignore_index == -100
        return F.linear_cross_entropy(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=weight,
            reduction=options.reduction,
            ignore_index=None if is_default else ignore_index,
            label_smoothing=options.label_smoothing,
            options=options.torch_options,
        )
    return head_cross_entropy(*head, token_weight, denominator, options)


def is_head_of_torch(
    input: Any, token_weight: Any, denominator: Any, options: CrossEntropyOptions
) -> bool:
    """Returns whether torch has the head: from torch 2.13 on, for one or two dimensions."""
    is_plain = token_weight is denominator is None and options.is_plain()
    has_rows = isinstance(input, Tensor) and input.dim() > 2
    return is_plain and not has_rows and hasattr(F, "linear_cross_entropy")


def head_cross_entropy(*call: Any) -> Any:
    """Returns `linear_cross_entropy` of valid arguments, computed from all logits."""
    *operands, token_weight, denominator, options = call
    head, leading = Head(*operands), operands[0].shape[:-1] or (1,)
    shape = *head.input.shape[:-1], *head.linear_weight.shape[1:-1]
    head = head._replace(target=class_targets(head.target, shape))
    if len(leading) > 1:
        head, token_weight = head.as_rows(token_weight)
    counts = counted(head.target, options.ignore_index, token_weight)
    logits = head_logits(*head[:3], counts)
    loss_options = options._replace(with_metrics=False)
    loss = cross_entropy(logits, *head[3:], token_weight, denominator, loss_options)
    loss = with_leading_dims(loss, leading)
    if not options.with_metrics:
        return loss
    if token_weight is not None:  # rows of weight 0 also have metrics
        logits = head_logits(head.input.detach(), *head[1:3])
    dtype = accumulate_dtype(operand_dtype(logits, *head[3:]))
    logits = _scaled(logits.to(dtype), options)
    fields = metrics.from_logits(logits, head.target, options.ignore_index)
    return loss, metrics.Metrics(*(with_leading_dims(x, leading) for x in fields))


def head_logits(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, counts: Tensor | None = None
) -> Tensor:
    """Returns the logits of a linear layer.

    Args:
        counts: Whether each target counts; the inputs of other rows may be NaN. None if all do.
    """
    if counts is not None:
        dims = max(input.dim() - 1, 1)
        counts = counts if counts.dim() <= dims else counts.flatten(dims).any(-1)
        input = input.where(counts.unsqueeze(-1), 0)
    bias = None if linear_bias is None else linear_bias.flatten()
    logits: Tensor = F.linear(input, linear_weight.flatten(0, -2), bias)
    return logits.reshape(*input.shape[:-1], *linear_weight.shape[:-1])


def log_probs(logits: Tensor, target: Tensor, options: LogProbsOptions) -> Any:
    """Returns the log-probability of each target, stacked with entropy and log-sum-exp.

    With metrics it returns a tuple of this tensor, whether the target has the largest logit, and
    the mean logit.
    """
    dim, dtype = min(logits.dim() - 1, 1), accumulate_dtype(logits.dtype)
    options = widened(options, None, dtype)
    target = class_targets(target, loss_shape(logits, "none"))
    valid = target != options.ignore_index
    x = logits.to(dtype).where(valid.unsqueeze(dim), 0)  # NaN would reach gradients
    x = (x if options.softcap is None else softcap(x, options.softcap)) / options.temperature
    log_p = x.log_softmax(dim)
    at_target = log_p.gather(dim, target.where(valid, 0).unsqueeze(dim)).squeeze(dim)
    if options.alone:
        results = at_target.where(valid, 0)
    else:
        p = log_p.exp()
        entropy = -(p * log_p.where(p != 0, 0)).sum(dim)
        results = torch.stack(
            [result.where(valid, 0) for result in (at_target, entropy, metrics.log_sum_exp(x, dim))]
        )
    if not options.with_metrics:
        return results
    x = x.detach()
    is_top1 = (x.argmax(dim) == target) & valid
    return results, is_top1, x.mean(dim).where(valid, 0)


def linear_log_probs(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    options: LogProbsOptions,
) -> Any:
    head, _ = Head(input, linear_weight, linear_bias, target, None).as_rows(None)
    counts = counted(head.target, options.ignore_index, None)
    results = log_probs(head_logits(*head[:3], counts), head.target, options)
    results, *metrics = results if options.with_metrics else (results,)
    leading = *input.shape[:-1], *linear_weight.shape[1:-1]
    results = results.reshape((*results.shape[: not options.alone], *leading))
    return (results, *[x.reshape(leading) for x in metrics]) if metrics else results


def softcap(input: Tensor, cap: float = 30.0) -> Tensor:
    return cap * (input / cap).tanh()


def sigmoid_focal_loss(
    inputs: Tensor, targets: Tensor, weight: Tensor | None, options: Any
) -> Tensor:
    alpha, gamma, ignore_index, reduction = options
    if targets.shape != inputs.shape:
        expected = f"the shape of inputs, {tuple(inputs.shape)}"
        raise ValueError(f"targets: expected {expected}, got {tuple(targets.shape)}")
    if isinstance(ignore_index, Tensor) and targets.is_floating_point():
        ignore_index = ignore_index.to(targets.dtype)
    valid = None if ignore_index is None else targets.ne(ignore_index)
    if valid is not None:  # others may be NaN
        inputs, targets = (x.where(valid, 0) for x in (inputs, targets))
    result_dtype = autocast_dtype(common_dtype(inputs, targets, weight), inputs.device)
    dtype = accumulate_dtype(result_dtype)
    inputs, targets = (x.to(dtype) if x.is_floating_point() else x for x in (inputs, targets))
    alpha, gamma = (x.to(dtype) if isinstance(x, Tensor) else x for x in (alpha, gamma))
    error = inputs.sigmoid() * (1 - targets) + (-inputs).sigmoid() * targets
    loss: Tensor = F.binary_cross_entropy_with_logits(inputs, targets, reduction="none")
    loss = loss * error.where(error != 0, 1) ** gamma  # the loss is 0 where this is
    if alpha >= 0:
        loss = loss * (alpha * targets + (1 - alpha) * (1 - targets))
    loss = loss if weight is None else loss * weight
    loss = loss if valid is None else loss.where(valid, 0)
    if reduction == "mean" and valid is not None:
        loss = loss.sum() / valid.sum()
    else:
        loss = reduced(loss, reduction)
    return loss.to(result_dtype)
