"""Fused counterparts of ``torch.nn.functional``: same names, arguments, results and errors.

The following applies to all functions; docstrings describe only what is specific to a function.
For the other arguments, see torch's function of the same name.

Dtypes
    float32, float64, bfloat16 and float16. Half precision is computed in float32 and rounded once.
    Results have torch's dtype: losses promote mixed dtypes, and most return float32 under autocast.

Activations
    The ``input`` of an activation may have any shape, and the result has its shape and dtype.
    ``inplace=True`` calls torch's in-place operator, which writes the result to ``input``.

Reductions
    ``reduction="none"`` returns one loss for each element of the broadcast shape, or for each row
    of classes or features; ``"sum"`` adds the losses up; ``"mean"`` divides the sum by their
    number, and is NaN if there are none. ``size_average`` and ``reduce`` are torch's deprecated
    arguments for the same purpose. Log-likelihoods, entropies and divergences are in nats.

Numeric options
    If a numeric option is a tensor, of shape (), torch's operators compute the call; kernels take
    ``option.item()``.

Errors
    The errors of calls that torch has are torch's. Functions and options that torch lacks raise a
    TypeError for an argument that is not a tensor or not a number, and a RuntimeError or ValueError
    for an invalid shape, dtype or option, which names the argument, what was expected and what was
    passed. The kernels check class indices: on CPUs, an index out of range raises an IndexError. On
    GPUs, where the check would synchronise, the loss of its row is NaN and the gradient is zero.

Fallback
    A call falls back to torch's operator for second derivatives, forward-mode AD, ``torch.func``,
    tensor subclasses, other devices and dtypes, and sizes at which torch is faster. If torch has no
    such operator, a definition composed of torch's operators is used. :func:`pyfused.explain`
    reports whether a call falls back, and why.

Other names, such as ``conv2d``, are torch's functions.
"""

# mypy: disable-error-code="no-any-return, comparison-overlap"
# The functions of torch that are called have the type Any; arguments are None in any combination.

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from typing_extensions import Unpack

from pyfused import checks
from pyfused.dispatch.autograd import autocast_dtype
from pyfused.dispatch.originals import F
from pyfused.dispatch.run import run
from pyfused.dispatch.sizes import torch_computes
from pyfused.layout import common_dtype
from pyfused.ops import elementwise, operators
from pyfused.ops import margin as margins
from pyfused.ops.cross_entropy import split_factors
from pyfused.ops.log_probs import LogProbs, named
from pyfused.ops.metrics import Metrics
from pyfused.types import (
    Approximate,
    FusedOptions,
    MarginKind,
    Reduction,
    ReductionOfKlDiv,
    Remainder,
    Scalar,
)

if TYPE_CHECKING:
    # Types of names that __getattr__ returns; torch's other names have the type Any.
    from torch.nn.functional import avg_pool2d as avg_pool2d
    from torch.nn.functional import batch_norm as batch_norm
    from torch.nn.functional import conv1d as conv1d
    from torch.nn.functional import conv2d as conv2d
    from torch.nn.functional import cosine_similarity as cosine_similarity
    from torch.nn.functional import dropout as dropout
    from torch.nn.functional import embedding as embedding
    from torch.nn.functional import group_norm as group_norm
    from torch.nn.functional import interpolate as interpolate
    from torch.nn.functional import layer_norm as layer_norm
    from torch.nn.functional import linear as linear
    from torch.nn.functional import max_pool2d as max_pool2d
    from torch.nn.functional import normalize as normalize
    from torch.nn.functional import one_hot as one_hot
    from torch.nn.functional import pad as pad
    from torch.nn.functional import rms_norm as rms_norm
    from torch.nn.functional import scaled_dot_product_attention as scaled_dot_product_attention

_OTHERS = (
    *("additive_margin", "cross_entropy_with_metrics", "linear_cross_entropy_with_metrics"),
    "rmse_loss",
)
_NAMES = sorted([*operators.OPERATORS, *_OTHERS])
# Defaults of arguments that torch lacks. Identity shows that an argument was not passed: comparing
# a tensor would read its value.
_ZERO, _ONE = 0.0, 1.0
if not TYPE_CHECKING:  # without __all__, type checkers export the functions of this file
    __all__ = _NAMES


def __getattr__(name: str) -> Any:
    if name.startswith("_") or not hasattr(torch.nn.functional, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(torch.nn.functional, name)


def __dir__() -> list[str]:
    of_torch = (name for name in dir(torch.nn.functional) if not name.startswith("_"))
    return sorted({*_NAMES, *of_torch})


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    *,
    gamma: float = _ZERO,
    z_loss: float = _ZERO,
    scale: float = _ONE,
    softcap: float | None = None,
    temperature: float = _ONE,
    token_weight: Tensor | None = None,
    denominator: float | Tensor | None = None,
    loss_dtype: torch.dtype | None = None,
) -> Tensor:
    """Returns the cross-entropy between logits and class indices or class probabilities.

    With ``lse`` the log-sum-exp of a row of logits and ``q`` its target distribution, smoothed by
    ``label_smoothing`` and weighted by ``weight``, the loss of the row is
    ``sum_c q_c * (lse - input_c)``. torch lacks the arguments after ``label_smoothing``.

    Args:
        input: Logits, of shape (C), (N, C) or (N, C, d1, ..., dk).
        target: Class indices in [0, C) or ``ignore_index``, of shape (), (N) or (N, d1, ..., dk),
            int64 or uint8; or class probabilities of the input's shape and any floating dtype.
        weight: A factor for each class, of shape (C). For class indices it has the input's dtype,
            or a wider one up to ``loss_dtype``.
        ignore_index: Rows with this target have loss and gradient 0, and the mean excludes them.
        reduction: ``"mean"`` divides by the sum of ``weight[target]`` over the rows that are not
            ignored; for class probabilities, by the number of rows.
        label_smoothing: The fraction of the target, 0.0 to 1.0, that is spread over all classes.
        gamma: Multiplies the loss of a row by ``(1 - p) ** gamma``, where ``p`` is the probability
            of the target: focal loss (Lin et al. 2017, arXiv 1708.02002). Requires class indices
            without smoothing. With ``log_p = log_softmax(input, 1)``, the loss is::

                nll_loss(log_p * (-log_p.expm1()) ** gamma, target, weight)

        z_loss: Adds ``z_loss * lse ** 2`` to the loss of a row, which keeps the logits from
            drifting (Chowdhery et al. 2022, arXiv 2204.02311).
        scale: Multiplies the logits, without copying them. Losses over cosines use about 64
            (:func:`additive_margin`).
        softcap: Replaces the logits with ``softcap * tanh(input / softcap)`` before scaling, like
            :func:`softcap` but without copying them.
        temperature: Divides the logits; the inverse of ``scale``.
        token_weight: A factor for the loss of each row, of the shape of class indices. The mean
            divides by the sum of ``token_weight * weight[target]``.
        denominator: Replaces the divisor of ``"mean"``, for example with the number of valid
            targets in all micro-batches or processes: a positive number, or a tensor of one
            element, where 0 gives inf or NaN. Must be None for other reductions.
        loss_dtype: The dtype of the loss. With half-precision logits, ``torch.float32`` returns the
            loss of ``input.float()`` without making this copy; a bfloat16 loss near 36 would be
            rounded to a multiple of 0.25.

    Returns:
        The loss, of the input's dtype, promoted with the probabilities' and their weight's dtype;
        or float32 under autocast, or ``loss_dtype``.

    Raises:
        IndexError: A class index is out of range; the message has the index and its position.
        RuntimeError, ValueError: A shape, dtype or option is invalid.
    """
    op = operators.CROSS_ENTROPY
    if (
        torch_computes(op, (input,), size_average, reduce, reduction=reduction)
        and softcap is token_weight is denominator is loss_dtype is None
        and gamma is z_loss is _ZERO
        and scale is temperature is _ONE
    ):
        others = size_average, ignore_index, reduce, reduction, label_smoothing
        return F.cross_entropy(input, target, weight, *others)
    if size_average is not None or reduce is not None:
        raise TypeError(
            "size_average, reduce: expected None with arguments that torch lacks, got "
            f"{size_average} and {reduce}; pass reduction"
        )
    tensor, number = (denominator, None) if isinstance(denominator, Tensor) else (None, denominator)
    options = op.options(
        denominator=number,
        softcap=softcap,
        temperature=temperature,
        gamma=gamma,
        z_loss=z_loss,
        scale=scale,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction=reduction,
        loss_dtype=loss_dtype,
    )
    return run(op, (input, target, weight, token_weight, tensor), options)


def cross_entropy_with_metrics(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    gamma: float = 0.0,
    **options: Unpack[FusedOptions],
) -> tuple[Tensor, Metrics]:
    """Returns :func:`cross_entropy` and metrics of each target, from one pass over the logits.

    Args:
        input, target, weight, ignore_index, reduction, label_smoothing, gamma: As in
            :func:`cross_entropy`.
        options: The other keyword arguments of :func:`cross_entropy`.

    Returns:
        The loss, and the :class:`~pyfused.ops.metrics.Metrics` of the capped and scaled logits:
        log-probability, log-sum-exp, prediction, whether the prediction is correct, and entropy.
    """
    op = operators.CROSS_ENTROPY
    factors, others = split_factors("cross_entropy_with_metrics", options)
    loss_options = op.options(
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        gamma=gamma,
        with_metrics=True,
        **others,
    )
    return run(op, (input, target, weight, *factors), loss_options)


def additive_margin(
    input: Tensor, target: Tensor, margin: float = 0.35, kind: MarginKind = "cosface"
) -> Tensor:
    """Lowers the cosine of each target by a margin, which separates the classes.

    torch has no such function. CosFace is::

        cross_entropy(additive_margin(cosines, target), target, scale=64.0)

    Args:
        input: Cosines of the angles between embeddings and classes, of shape (C), (N, C) or
            (N, C, d1, ..., dk) and any floating dtype.
        target: Class indices, of shape (), (N) or (N, d1, ..., dk), int64 or uint8. Rows whose
            index is not in [0, C), such as ``ignore_index``, are unchanged.
        margin: 0.0 or more; an angle in radians for ``"arcface"``.
        kind: ``"cosface"`` for ``cosine - margin`` (Wang et al. 2018, arXiv 1801.09414),
            ``"arcface"`` for ``cos(angle + margin)`` (Deng et al. 2019, arXiv 1801.07698).

    Returns:
        A new tensor like ``input``.
    """
    return margins.additive_margin(input, target, margin, kind)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    memory_budget: int | None = None,
    softcap: float | None = None,
    z_loss: float = _ZERO,
    scale: float = _ONE,
    temperature: float = _ONE,
    token_weight: Tensor | None = None,
    denominator: float | Tensor | None = None,
    loss_dtype: torch.dtype | None = None,
) -> Tensor:
    """Returns :func:`cross_entropy` of a linear layer's output, in blocks of logits.

    torch's function of the same name returns the same result::

        cross_entropy(linear(input, linear_weight, linear_bias), target, ...)

    The logits of each block of rows are computed, reduced to losses and turned into gradients while
    they are in cache. With a small ``memory_budget``, or if not all rows fit and the CPU has no
    instructions for the half-precision dtype, logits are computed for blocks of classes, and the
    backward pass recomputes them. Weight gradients are accumulated in float32, even in half
    precision. On CPUs, the products skip ignored rows.

    Args:
        input: The layer's input, of shape (..., D): torch's (D) and (N, D), or a model's (B, T, D).
        linear_weight: The layer's weight, of the input's dtype and shape (C, D). A weight of shape
            (C, d1, ..., dk, D), for logits of shape (C, d1, ..., dk) in each row of the input,
            falls back to torch's operators, which compute all logits.
        target: Class indices in [0, C) or ``ignore_index``, of shape (...) or (..., d1, ..., dk),
            int64 or uint8; or class probabilities of shape (..., C) or (..., C, d1, ..., dk) and
            any floating dtype.
        linear_bias: The layer's bias, of the input's dtype and shape (C) or (C, d1, ..., dk).
        weight: As in :func:`cross_entropy`.
        reduction: As in :func:`cross_entropy`. With ``"none"``, backward recomputes the logits,
            unless they are kept because they take no more memory than the weight.
        ignore_index: As in :func:`cross_entropy`; None means -100.
        label_smoothing: As in :func:`cross_entropy`.
        options: torch's ``LinearCrossEntropyOptions``, used only if the call falls back to torch's
            operator.
        memory_budget: Limits the bytes of the logits that exist at once, down to blocks of 16 rows
            and 64 classes. The default on CPUs is a quarter of the logits, half of the weight or
            16 MiB, whichever is most, but at most 512 rows; or all rows if they are at most twice
            as many, or if in half precision they take no more memory than such a block and a
            float32 sum of the weight's gradient. It affects only rounding.
        softcap, z_loss, scale, temperature, token_weight, denominator, loss_dtype: As in
            :func:`cross_entropy`.

    Returns:
        As in :func:`cross_entropy`.
    """
    op = operators.LINEAR_CROSS_ENTROPY
    small = not is_dynamo_compiling() and torch_computes(op, (input, linear_weight))
    is_soft = isinstance(target, Tensor) and target.is_floating_point()
    if (
        (small or (ignore_index is not None and is_soft))  # torch's function raises an error then
        and softcap is token_weight is denominator is loss_dtype is memory_budget is None
        and z_loss is _ZERO
        and scale is temperature is _ONE
        # torch has the function from 2.13 on, for inputs of one or two dimensions.
        and hasattr(F, op.name)
        and isinstance(input, Tensor)
        and input.dim() < 3
        and isinstance(linear_weight, Tensor)
        and linear_weight.device == input.device
        and (linear_bias is None or getattr(linear_bias, "device", None) == input.device)
    ):
        return F.linear_cross_entropy(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            options=options,
        )
    for name, x in (("input", input), ("linear_weight", linear_weight)):
        if not isinstance(x, Tensor) and not hasattr(x, "__torch_function__"):
            checks.tensor(name, x)  # torch's error names neither the argument nor the type
    tensor, number = (denominator, None) if isinstance(denominator, Tensor) else (None, denominator)
    tensors = input, linear_weight, linear_bias, target, weight, token_weight, tensor
    loss_options = op.options(
        denominator=number,
        softcap=softcap,
        temperature=temperature,
        z_loss=z_loss,
        scale=scale,
        label_smoothing=label_smoothing,
        ignore_index=-100 if ignore_index is None else ignore_index,
        reduction=reduction,
        memory_budget=memory_budget,
        loss_dtype=loss_dtype,
        torch_options=options,
    )
    return run(op, tensors, loss_options, any_size=not small)


def linear_cross_entropy_with_metrics(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    memory_budget: int | None = None,
    **options: Unpack[FusedOptions],
) -> tuple[Tensor, Metrics]:
    """Returns :func:`linear_cross_entropy` and metrics of each target, from one pass.

    Args:
        input, linear_weight, target, linear_bias, weight, ignore_index, reduction: As in
            :func:`linear_cross_entropy`.
        label_smoothing, memory_budget: As in :func:`linear_cross_entropy`.
        options: The other keyword arguments of :func:`linear_cross_entropy`.

    Returns:
        The loss, and the :class:`~pyfused.ops.metrics.Metrics` of the layer's capped and scaled
        output, as in :func:`cross_entropy_with_metrics`.
    """
    op = operators.LINEAR_CROSS_ENTROPY
    factors, others = split_factors("linear_cross_entropy_with_metrics", options)
    tensors = input, linear_weight, linear_bias, target, weight, *factors
    loss_options = op.options(
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        with_metrics=True,
        memory_budget=memory_budget,
        **others,
    )
    return run(op, tensors, loss_options)


def log_probs(
    logits: Tensor,
    target: Tensor,
    *,
    dim: int | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    temperature: float = 1.0,
    return_entropy: bool = False,
    return_lse: bool = False,
    return_metrics: bool = False,
) -> LogProbs:
    """Returns each target's log-probability and, on request, its row's entropy and log-sum-exp.

    With ``x = logits / temperature``, or ``softcap * tanh(logits / softcap) / temperature``, and
    ``p = exp(x - lse)``, they are ``x[target] - lse``, ``lse - sum_c p_c x_c`` and
    ``lse = log sum_c exp(x_c)``. All three are differentiable, in any combination, and come from
    one pass over the logits. On CPUs, a row's results do not depend, bit for bit, on the other
    rows, the number of threads, or whether gradients are needed. torch has no such function.

    Args:
        logits: Of shape (C) or (N, C), or of any shape with ``dim``.
        target: Class indices in [0, C) or ``ignore_index``, of the logits' shape without the class
            dimension, int64 or uint8.
        dim: The class dimension, required if logits have more than two dimensions: -1 for a
            language model's (B, T, C), 1 for (N, C, d1, ..., dk) as in torch's cross-entropy.
        ignore_index: The results and the gradient of rows with this target are 0.
        softcap: Replaces the logits with ``softcap * tanh(logits / softcap)``; None for no cap.
        temperature: Divides the (capped) logits.
        return_entropy, return_lse: Whether to return the entropy, and the log-sum-exp.
        return_metrics: Whether to return ``is_top1`` and ``mean_logit``, which have no gradient.

    Returns:
        A :class:`~pyfused.ops.log_probs.LogProbs`, in nats, of the target's shape; float64 for
        float64 logits, otherwise float32. Items that were not requested are None.
    """
    op, alone = operators.LOG_PROBS, not (return_entropy or return_lse)
    tensors = checks.classes_at(1, "logits", logits, dim), target
    options = op.options(
        softcap=softcap,
        temperature=temperature,
        ignore_index=ignore_index,
        alone=alone,
        with_metrics=return_metrics,
    )
    values = run(op, tensors, options)
    if alone and not return_metrics:
        return LogProbs(values)
    return named(values, alone, return_entropy, return_lse, return_metrics)


def linear_log_probs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    temperature: float = 1.0,
    return_entropy: bool = False,
    return_lse: bool = False,
    return_metrics: bool = False,
    memory_budget: int | None = None,
) -> LogProbs:
    """Returns :func:`log_probs` of a linear layer's output, in blocks of logits.

    The forward pass computes blocks of logits, and the backward pass recomputes them. On CPUs,
    ignored rows are skipped.

    Args:
        input, linear_weight: As in :func:`linear_cross_entropy`.
        target: Class indices, as in :func:`linear_cross_entropy`.
        linear_bias: The layer's bias, of shape (C) or (C, d1, ..., dk).
        ignore_index, softcap, temperature: As in :func:`log_probs`.
        return_entropy, return_lse, return_metrics: As in :func:`log_probs`.
        memory_budget: As in :func:`linear_cross_entropy`. Within the budget, logits of the first
            rows may be kept for the backward pass.

    Returns:
        As in :func:`log_probs`.
    """
    op, alone = operators.LINEAR_LOG_PROBS, not (return_entropy or return_lse)
    options = op.options(
        softcap=softcap,
        temperature=temperature,
        ignore_index=ignore_index,
        memory_budget=memory_budget,
        alone=alone,
        with_metrics=return_metrics,
    )
    values = run(op, (input, linear_weight, linear_bias, target), options)
    if alone and not return_metrics:
        return LogProbs(values)
    return named(values, alone, return_entropy, return_lse, return_metrics)


def kl_div_with_logits(
    logits: Tensor,
    teacher_logits: Tensor,
    *,
    dim: int | None = None,
    beta: float = 0.0,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
    token_weight: Tensor | None = None,
    denominator: float | Tensor | None = None,
    teacher_requires_grad: bool = False,
) -> Tensor:
    """Returns the divergence of a student's predictions from a teacher's, for distillation.

    Let p and q be the softmax of the student's and the teacher's logits divided by the temperature,
    and m = beta q + (1 - beta) p. The loss of a token is

    - for ``beta=0.0``, forward KL(q || p), the sum of ``q (log q - log p)`` over the classes
      (Hinton et al. 2015, arXiv 1503.02531),
    - for ``beta=1.0``, reverse KL(p || q), the sum of ``p (log p - log q)``,
    - in between, ``beta KL(q || m) + (1 - beta) KL(p || m)``, the generalised Jensen-Shannon
      divergence of GKD (Agarwal et al. 2024, arXiv 2306.13649), which tends to 0 at both ends.

    0 log 0 is 0. The loss is not multiplied by the square of the temperature. torch has no such
    function. With ``x = logits / temperature`` and ``y = teacher_logits / temperature``, forward KL
    is::

        kl_div(
            log_softmax(x, -1), log_softmax(y, -1), log_target=True, reduction="none"
        ).sum(-1)

    Args:
        logits: The student's logits, of shape (C) or (N, C), or of any shape with ``dim``.
        teacher_logits: The teacher's logits, of the same shape and any floating dtype.
        dim: The class dimension, as in :func:`log_probs`. The other dimensions are tokens.
        beta: 0.0 to 1.0.
        softcap, teacher_softcap: Replaces the student's or the teacher's logits with
            ``softcap * tanh(logits / softcap)``; None for no cap.
        temperature: Divides the (capped) logits of both.
        reduction: ``"mean"`` divides by the number of tokens, or by the sum of ``token_weight``.
            For logits (N, C) it equals ``"batchmean"`` of :func:`kl_div`.
        token_weight: A nonnegative factor for the loss of each token, or a mask, of the tokens'
            shape. Tokens of weight 0 are not read and have no gradient; their logits may be NaN.
        denominator: Replaces the divisor of ``"mean"``, as in :func:`cross_entropy`.
        teacher_requires_grad: By default, the teacher is constant and gets no gradient, even if its
            tensors require grad. If True, it gets one if they do, and torch's operators compute
            the loss.

    Returns:
        The loss: a scalar, or of the tokens' shape for ``"none"``; float64 for float64 logits,
        otherwise float32.
    """
    if dim is not None or (isinstance(logits, Tensor) and logits.dim() > 2):
        logits = checks.classes_at(-1, "logits", logits, dim)
    if dim is not None or (isinstance(teacher_logits, Tensor) and teacher_logits.dim() > 2):
        teacher_logits = checks.classes_at(-1, "teacher_logits", teacher_logits, dim)
    tensor, number = (denominator, None) if isinstance(denominator, Tensor) else (None, denominator)
    teacher_logits = _teacher(teacher_logits, teacher_requires_grad)
    op = operators.KL_DIV_WITH_LOGITS
    options = op.options(
        denominator=number,
        softcap=softcap,
        temperature=temperature,
        beta=beta,
        teacher_softcap=teacher_softcap,
        reduction=reduction,
    )
    return run(op, (logits, teacher_logits, token_weight, tensor), options)


def _teacher(tensor: Any, requires_grad: bool) -> Any:
    """Returns a teacher's tensor, detached unless ``requires_grad``."""
    is_detached = isinstance(tensor, Tensor) and tensor.requires_grad and not requires_grad
    return tensor.detach() if is_detached else tensor


def linear_kl_div(
    input: Tensor,
    linear_weight: Tensor,
    teacher_input: Tensor,
    teacher_linear_weight: Tensor,
    *,
    linear_bias: Tensor | None = None,
    teacher_linear_bias: Tensor | None = None,
    beta: float = 0.0,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
    token_weight: Tensor | None = None,
    denominator: float | Tensor | None = None,
    memory_budget: int | None = None,
    teacher_requires_grad: bool = False,
) -> Tensor:
    """Returns :func:`kl_div_with_logits` of two linear layers, in blocks of logits.

    The logits of both models are computed for blocks of rows and turned into gradients. Weight
    gradients are accumulated in float32, even in half precision.

    Args:
        input, linear_weight, linear_bias: The student's input and layer, of shapes (..., D), (C, D)
            and (C).
        teacher_input, teacher_linear_weight, teacher_linear_bias: The teacher's input and layer, of
            shapes (..., E), (C, E) and (C). E and the dtype may differ from the student's.
        beta, softcap, teacher_softcap, temperature, reduction, denominator: As in
            :func:`kl_div_with_logits`.
        token_weight: As in :func:`kl_div_with_logits`, of shape (...). On CPUs, the products skip
            tokens of weight 0.
        teacher_requires_grad: As in :func:`kl_div_with_logits`. If True, and the teacher's tensors
            require grad, as a head's weight does by default, torch's operators compute all logits.
        memory_budget: Limits the bytes of the logits of both models that exist at once, down to one
            row of each. The default is as in :func:`linear_cross_entropy`.

    Returns:
        As in :func:`kl_div_with_logits`.
    """
    tensor, number = (denominator, None) if isinstance(denominator, Tensor) else (None, denominator)
    head = teacher_input, teacher_linear_weight, teacher_linear_bias
    teacher = [_teacher(x, teacher_requires_grad) for x in head]
    student, op = (input, linear_weight, linear_bias), operators.LINEAR_KL_DIV
    options = op.options(
        denominator=number,
        softcap=softcap,
        temperature=temperature,
        beta=beta,
        teacher_softcap=teacher_softcap,
        reduction=reduction,
        memory_budget=memory_budget,
    )
    return run(op, (*student, *teacher, token_weight, tensor), options)


def linear_topk_kl_div(
    input: Tensor,
    linear_weight: Tensor,
    teacher_indices: Tensor,
    teacher_log_probs: Tensor,
    *,
    linear_bias: Tensor | None = None,
    beta: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    remainder: Remainder = "bucket",
    reduction: Reduction = "mean",
    token_weight: Tensor | None = None,
    denominator: float | Tensor | None = None,
    memory_budget: int | None = None,
    teacher_requires_grad: bool = False,
) -> Tensor:
    """Returns :func:`linear_kl_div` from a teacher's k most probable classes, saved beforehand.

    Args:
        teacher_indices: k distinct classes for each token, of shape (..., k), int64.
        teacher_log_probs: Their log-probabilities, computed with the same temperature, of shape
            (..., k) and any floating dtype. The other classes have the remaining probability.
        beta: As in :func:`kl_div_with_logits`; 0.0 with ``remainder="ignore"``.
        softcap, temperature: The student's logits are ``softcap * tanh(logits / softcap)``, divided
            by the temperature.
        remainder: ``"bucket"`` treats all other classes as one, with the remaining probability of
            the student and the teacher; with ``beta=1.0``, the loss is infinite if the teacher's
            remaining probability is 0. ``"ignore"`` sums ``q (log q - log p)`` over the k classes
            only; the sum may be negative. p is normalised over all classes.
        input, linear_weight, linear_bias, reduction, token_weight: As in :func:`linear_kl_div`.
        denominator, memory_budget, teacher_requires_grad: As in :func:`linear_kl_div`.

    Returns:
        As in :func:`kl_div_with_logits`.

    Raises:
        IndexError: A class index is out of range.
        ValueError: The classes of a token are not distinct, one of its ``teacher_log_probs`` is
            above 0, or their probabilities sum to more than 1, beyond rounding. On GPUs, the loss
            of a token with invalid indices is NaN instead.
    """
    tensor, number = (denominator, None) if isinstance(denominator, Tensor) else (None, denominator)
    teacher = [_teacher(x, teacher_requires_grad) for x in (teacher_indices, teacher_log_probs)]
    student, op = (input, linear_weight, linear_bias), operators.LINEAR_TOPK_KL_DIV
    options = op.options(
        denominator=number,
        softcap=softcap,
        temperature=temperature,
        beta=beta,
        reduction=reduction,
        memory_budget=memory_budget,
        remainder=remainder,
    )
    return run(op, (*student, *teacher, token_weight, tensor), options)


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Returns the negative log-likelihood of class indices, ``-weight[target] * input[target]``.

    :func:`cross_entropy` fuses this loss with :func:`log_softmax`.
    """
    op = operators.NLL_LOSS
    if torch_computes(op, (input,), size_average, reduce, reduction=reduction):
        return F.nll_loss(input, target, weight, size_average, ignore_index, reduce, reduction)
    return run(
        op,
        (input, target, weight),
        op.options(ignore_index=ignore_index, reduction=reduction),
    )


def triplet_margin_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float = 1.0,
    p: float = 2,
    eps: float = 1e-6,
    swap: bool = False,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Returns the triplet loss: anchors should be closer to positives than to negatives.

    With ``d(x, y) = ||x - y + eps||_p``, the loss of a row is
    ``max(0, margin + d(anchor, positive) - d(anchor, negative))``. Kernels support a
    ``p`` of 1 and of 2.
    """
    op = operators.TRIPLET_MARGIN_LOSS
    if torch_computes(op, (anchor, positive, negative), size_average, reduce, reduction=reduction):
        return F.triplet_margin_loss(
            anchor, positive, negative, margin, p, eps, swap, size_average, reduce, reduction
        )
    return run(
        op,
        (anchor, positive, negative),
        op.options(margin=margin, p=p, eps=eps, swap=swap, reduction=reduction),
    )


def cosine_embedding_loss(
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Returns the loss of pairs of embeddings whose cosine should be large or small.

    With ``cos = x1 . x2 / sqrt((x1 . x1 + 1e-12) (x2 . x2 + 1e-12))``, the loss of a row is
    ``1 - cos`` for target 1, ``max(0, cos - margin)`` for target -1, and 0 for other targets.
    """
    op = operators.COSINE_EMBEDDING_LOSS
    if torch_computes(op, (input1, input2, target), size_average, reduce, reduction=reduction):
        return F.cosine_embedding_loss(
            input1, input2, target, margin, size_average, reduce, reduction
        )
    return run(op, (input1, input2, target), op.options(margin=margin, reduction=reduction))


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """Returns the squared error, ``weight * (input - target) ** 2``.

    Args:
        input: Predictions, of any shape.
        target: Ground truth, of a shape that broadcasts with the input's; torch warns if the shapes
            differ.
        reduction: ``"mean"`` divides by the number of elements, or by the sum of ``weight``.
        weight: A factor for each element, of the input's shape.
    """
    op = elementwise.MSE_LOSS
    if torch_computes(op, (input, target), size_average, reduce, reduction=reduction):
        return F.mse_loss(input, target, size_average, reduce, reduction, weight)
    return run(op, (input, target, weight), op.options(reduction=reduction))


def l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """Returns the absolute error, ``weight * |input - target|``.

    The gradient is 0 where input and target are equal.
    """
    op = elementwise.L1_LOSS
    if torch_computes(op, (input, target), size_average, reduce, reduction=reduction):
        return F.l1_loss(input, target, size_average, reduce, reduction, weight)
    return run(op, (input, target, weight), op.options(reduction=reduction))


def smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
    beta: float = 1.0,
) -> Tensor:
    """Returns the absolute error, or the squared error where it is small.

    With ``d = |input - target|``, the loss of an element is ``d ** 2 / (2 * beta)`` where
    ``d < beta``, else ``d - beta / 2``.
    """
    op = elementwise.SMOOTH_L1_LOSS
    if torch_computes(op, (input, target), size_average, reduce, reduction=reduction):
        return F.smooth_l1_loss(input, target, size_average, reduce, reduction, beta)
    return run(op, (input, target), op.options(beta=beta, reduction=reduction))


def huber_loss(
    input: Tensor,
    target: Tensor,
    reduction: Reduction = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> Tensor:
    """Returns the absolute error, or the squared error where it is small.

    With ``d = |input - target|``, the loss of an element is ``weight`` times ``d ** 2 / 2`` where
    ``d < delta``, else ``delta * (d - delta / 2)``: ``delta`` times :func:`smooth_l1_loss`.
    """
    op = elementwise.HUBER_LOSS
    if torch_computes(op, (input, target), reduction=reduction):
        return F.huber_loss(input, target, reduction, delta, weight)
    return run(op, (input, target, weight), op.options(delta=delta, reduction=reduction))


def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Returns the cross-entropy between probabilities of two classes.

    The loss of an element is ``-weight * (target * log(input) + (1 - target) * log(1 - input))``,
    where logarithms are at least -100.

    Raises:
        RuntimeError: A probability is out of range (on GPUs its loss is NaN instead), ``weight``
            requires grad, or autocast is enabled on a GPU; use
            :func:`binary_cross_entropy_with_logits` then.
    """
    op = elementwise.BINARY_CROSS_ENTROPY
    if torch_computes(op, (input, target), size_average, reduce, reduction=reduction):
        return F.binary_cross_entropy(input, target, weight, size_average, reduce, reduction)
    return run(op, (input, target, weight), op.options(reduction=reduction))


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    """Returns the cross-entropy between logits and probabilities of two classes.

    With ``p = pos_weight``, the loss of an element is
    ``weight * -(p * target * log_sigmoid(input) + (1 - target) * log_sigmoid(-input))``.

    Returns:
        The loss, of the target's dtype, or float32 under autocast.

    Raises:
        RuntimeError: A weight requires grad.
    """
    op = elementwise.BINARY_CROSS_ENTROPY_WITH_LOGITS
    if torch_computes(op, (input, target), size_average, reduce, reduction=reduction):
        return F.binary_cross_entropy_with_logits(
            input, target, weight, size_average, reduce, reduction, pos_weight
        )
    return run(op, (input, target, weight, pos_weight), op.options(reduction=reduction))


def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: ReductionOfKlDiv = "mean",
    log_target: bool = False,
) -> Tensor:
    """Returns the Kullback-Leibler divergence of log-probabilities from a target distribution.

    The divergence of an element is ``target * (log(target) - input)``, or 0 where the target is 0.
    """
    op = elementwise.KL_DIV
    if torch_computes(op, (input, target), size_average, reduce, reduction=reduction):
        return F.kl_div(input, target, size_average, reduce, reduction, log_target)
    return run(op, (input, target), op.options(log_target, reduction))


def poisson_nll_loss(
    input: Tensor,
    target: Tensor,
    log_input: bool = True,
    full: bool = False,
    size_average: bool | None = None,
    eps: float = 1e-8,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Returns the negative log-likelihood of counts under Poisson distributions.

    The loss of an element is ``exp(input) - target * input``, or, if ``log_input`` is False,
    ``input - target * log(input + eps)``. ``full`` adds Stirling's approximation of
    ``log(target!)`` where the target is more than 1. Elsewhere it adds nothing to the target's
    gradient; torch, and so a small call, returns NaN at targets of 0 or less.
    """
    op = elementwise.POISSON_NLL_LOSS
    if torch_computes(op, (input, target), size_average, reduce, reduction=reduction):
        return F.poisson_nll_loss(
            input, target, log_input, full, size_average, eps, reduce, reduction
        )
    return run(
        op,
        (input, target),
        op.options(eps=eps, log_input=log_input, full=full, reduction=reduction),
    )


def gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: Reduction = "mean",
) -> Tensor:
    """Returns the negative log-likelihood of targets under Gaussian distributions.

    With ``v = max(var, eps)``, the loss of an element is
    ``(log(v) + (input - target) ** 2 / v) / 2``; ``var`` gets the gradient of ``v``.

    Raises:
        ValueError: A variance is negative (on GPUs its loss is NaN instead), or the shape of
            ``var`` is invalid.
    """
    op = elementwise.GAUSSIAN_NLL_LOSS
    if torch_computes(op, (input, target, var), reduction=reduction):
        return F.gaussian_nll_loss(input, target, var, full, eps, reduction)
    return run(op, (input, target, var), op.options(eps=eps, full=full, reduction=reduction))


def soft_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Returns the logistic loss for the classes -1 and 1, ``log(1 + exp(-target * input))``.

    Unlike torch's operator, it stays finite where the exponential overflows.
    """
    op = elementwise.SOFT_MARGIN_LOSS
    if torch_computes(op, (input, target), size_average, reduce, reduction=reduction):
        return F.soft_margin_loss(input, target, size_average, reduce, reduction)
    return run(op, (input, target), op.options(reduction=reduction))


def hinge_embedding_loss(
    input: Tensor,
    target: Tensor,
    margin: float = 1.0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Returns the distance of similar pairs, and the hinge loss of dissimilar pairs.

    The loss of an element is ``input`` where the target is 1 and ``max(0, margin - input)`` where
    it is -1. For other targets it is the sum of both.
    """
    op = elementwise.HINGE_EMBEDDING_LOSS
    if torch_computes(op, (input, target), size_average, reduce, reduction=reduction):
        return F.hinge_embedding_loss(input, target, margin, size_average, reduce, reduction)
    return run(op, (input, target), op.options(margin=margin, reduction=reduction))


def margin_ranking_loss(
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Returns the ranking loss of pairs of scores; the target says which should be higher.

    The loss of an element is ``max(0, -target * (input1 - input2) + margin)``.
    """
    op = elementwise.MARGIN_RANKING_LOSS
    if torch_computes(op, (input1, input2, target), size_average, reduce, reduction=reduction):
        return F.margin_ranking_loss(
            input1, input2, target, margin, size_average, reduce, reduction
        )
    return run(op, (input1, input2, target), op.options(margin=margin, reduction=reduction))


def quantile_loss(
    input: Tensor, target: Tensor, quantile: float = 0.5, reduction: Reduction = "mean"
) -> Tensor:
    """Returns the pinball loss, which weights errors above and below the target differently.

    Its mean is minimised by the given quantile of the targets (Koenker and Bassett 1978). Where
    input and target are equal, the gradient is the mean of the gradients on both sides, as for
    :func:`torch.maximum`. torch has no such loss; it is equivalent to::

        d = target - input
        torch.maximum(quantile * d, (quantile - 1) * d)

    Args:
        input: Predictions, of any shape.
        target: Ground truth, of a shape that broadcasts with the input's.
        quantile: The fraction of the targets that should be below the input, 0.0 to 1.0.
    """
    op = elementwise.QUANTILE_LOSS
    return run(op, (input, target), op.options(quantile=quantile, reduction=reduction))


def log_cosh_loss(input: Tensor, target: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Returns the logarithm of the hyperbolic cosine of the error.

    It is close to half the squared error where the error is small, to the absolute error minus
    log(2) where it is large, and smooth in between. torch has no such loss; it is equivalent to::

        d = (input - target).abs()
        d + F.softplus(-2 * d) - math.log(2)

    Args:
        input, target: As in :func:`quantile_loss`.
    """
    op = elementwise.LOG_COSH_LOSS
    return run(op, (input, target), op.options(reduction=reduction))


def hinge_loss(
    input: Tensor,
    target: Tensor,
    margin: float = 1.0,
    squared: bool = False,
    reduction: Reduction = "mean",
) -> Tensor:
    """Returns the loss of a support vector machine for the classes -1 and 1.

    torch has no such loss; it is equivalent to::

        (margin - target * input).clamp(min=0)  # ** 2 if squared

    Args:
        input: Scores, of any shape.
        target: The classes, -1 or 1, of a shape that broadcasts with the input's.
        margin: Scores with the correct sign that are at least this far from 0 have no loss.
        squared: Whether to square the loss.
    """
    op = elementwise.HINGE_LOSS
    options = op.options(margin=margin, squared=squared, reduction=reduction)
    return run(op, (input, target), options)


def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float = 0.25,
    gamma: float = 2,
    reduction: Reduction = "none",
    *,
    weight: Tensor | None = None,
    ignore_index: float | None = None,
) -> Tensor:
    """Returns the focal loss: binary cross-entropy that gives well-classified elements less weight.

    With ``p = sigmoid(inputs)`` and ``u = p * (1 - targets) + (1 - p) * targets``, the loss of an
    element is its binary cross-entropy times ``u ** gamma``, and times ``alpha`` for the positive
    class and ``1 - alpha`` for the negative class (Lin et al. 2017, arXiv 1708.02002). The result
    equals ``torchvision.ops.sigmoid_focal_loss``; torch has no such loss.

    Args:
        inputs: Logits, of any shape.
        targets: Probabilities of the positive class, usually 0.0 or 1.0, of the inputs' shape and
            dtype.
        alpha: The weight of the positive class, 0.0 to 1.0; a negative number disables weighting.
        gamma: 0.0 or more; 0.0 gives binary cross-entropy.
        reduction: ``"mean"`` divides by the number of elements that are not ignored.
        weight: A factor for each element, of a shape that broadcasts to the inputs'.
        ignore_index: Elements with this target have loss and gradient 0. It is rounded to the
            targets' dtype.
    """
    op = elementwise.SIGMOID_FOCAL_LOSS
    options = op.options(alpha=alpha, gamma=gamma, ignore_index=ignore_index, reduction=reduction)
    return run(op, (inputs, targets, weight), options)


def rmse_loss(
    input: Tensor,
    target: Tensor,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Returns the square root of the mean squared error, which has the unit of the target.

    torch has no such loss; it is equivalent to the following, in float32 for half precision::

        (mse_loss(input, target, reduction=reduction, weight=weight) + eps).sqrt()

    Args:
        input, target, weight: As in :func:`mse_loss`.
        reduction: The reduction of the squares, as in :func:`mse_loss`.
        eps: Added before taking the root, whose gradient is NaN if the loss and ``eps`` are 0.
    """
    checks.bounded(Scalar("eps", low=0.0), eps)
    checks.tensor("input", input)
    checks.tensor("target", target)
    if weight is not None:
        checks.tensor("weight", weight)
    dtype = autocast_dtype(common_dtype(input, target, weight), input.device)
    tensors: Any = map(_without_halves, (input, target, weight))
    input, target, weight = tensors
    loss = mse_loss(input, target, reduction=reduction, weight=weight)
    return (loss + eps).sqrt().to(dtype)


def _without_halves(tensor: Tensor | None) -> Tensor | None:
    """Converts half precision to float32, so that a function of the loss is rounded once."""
    halves = tensor is not None and tensor.dtype in (torch.bfloat16, torch.float16)
    return tensor.float() if halves else tensor  # type: ignore[union-attr]


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """Returns ``max(input, 0)``; NaN stays NaN."""
    op = elementwise.RELU
    if inplace is not False or torch_computes(op, (input,)):
        return F.relu(input, inplace)
    return run(op, (input,), ())


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """Returns ``input`` where it is positive, elsewhere ``negative_slope * input``."""
    op = elementwise.LEAKY_RELU
    if inplace is not False or torch_computes(op, (input,)):
        return F.leaky_relu(input, negative_slope, inplace)
    return run(op, (input,), op.options(negative_slope=negative_slope))


def tanh(input: Tensor) -> Tensor:
    """Returns the hyperbolic tangent."""
    op = elementwise.TANH
    if torch_computes(op, (input,)):
        return F.tanh(input)
    return run(op, (input,), ())


def softcap(input: Tensor, cap: float = 30.0) -> Tensor:
    """Returns ``cap * tanh(input / cap)``, which is between ``-cap`` and ``cap``.

    Small values hardly change. Some language models cap their logits in this way (Gemma 2, arXiv
    2408.00118). torch has no such function.

    Args:
        cap: More than 0; others raise a ValueError.
    """
    op = elementwise.SOFTCAP
    return run(op, (input,), op.options(cap=cap))


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """Returns ``input * sigmoid(input)``, also known as swish.

    If ``inplace`` is True and a gradient is needed, torch's operator runs, and copies the input.
    """
    op = elementwise.SILU
    if inplace is not False or torch_computes(op, (input,)):
        return F.silu(input, inplace)
    return run(op, (input,), ())


def gelu(input: Tensor, *, approximate: Approximate = "none", **others: Any) -> Tensor:
    """Returns ``input`` times the standard normal distribution function at ``input``.

    At infinity, the result is this product: inf for inf and NaN for -inf; both gradients are NaN.
    Small calls run torch's operator. On x86, it uses oneDNN for float32 and bfloat16 without
    approximation, which also returns NaN for inf, and inf above half of the largest number.

    Args:
        approximate: ``"none"``, or ``"tanh"`` for
            ``input * (1 + tanh(sqrt(2 / pi) * (input + 0.044715 * input ** 3))) / 2``; others
            raise a RuntimeError.
        others: torch's other arguments, such as ``out``; torch's operator runs.
    """
    op = elementwise.GELU
    if others or torch_computes(op, (input,)):
        return F.gelu(input, approximate=approximate, **others)
    return run(op, (input,), op.options(approximate=approximate))


def sigmoid(input: Tensor) -> Tensor:
    """Returns ``1 / (1 + exp(-input))``."""
    op = elementwise.SIGMOID
    if torch_computes(op, (input,)):
        return F.sigmoid(input)
    return run(op, (input,), ())


def elu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """Returns ``input`` where it is positive, elsewhere ``alpha * (exp(input) - 1)``."""
    op = elementwise.ELU
    if inplace is not False or torch_computes(op, (input,)):
        return F.elu(input, alpha, inplace)
    return run(op, (input,), op.options(alpha=alpha))


def selu(input: Tensor, inplace: bool = False) -> Tensor:
    """Returns 1.0507 times :func:`elu` with ``alpha`` 1.6733, which keeps mean and variance."""
    op = elementwise.SELU
    if inplace is not False or torch_computes(op, (input,)):
        return F.selu(input, inplace)
    return run(op, (input,), ())


def celu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """Returns ``input`` where it is positive, elsewhere ``alpha * (exp(input / alpha) - 1)``."""
    op = elementwise.CELU
    if inplace is not False or torch_computes(op, (input,)):
        return F.celu(input, alpha, inplace)
    return run(op, (input,), op.options(alpha=alpha))


def mish(input: Tensor, inplace: bool = False) -> Tensor:
    """Returns ``input * tanh(log(1 + exp(input)))``."""
    op = elementwise.MISH
    if inplace is not False or torch_computes(op, (input,)):
        return F.mish(input, inplace)
    return run(op, (input,), ())


def softplus(input: Tensor, beta: float = 1.0, threshold: float = 20.0, **others: Any) -> Tensor:
    """Returns ``log(1 + exp(beta * input)) / beta``."""
    op = elementwise.SOFTPLUS
    if others or torch_computes(op, (input,)):
        return F.softplus(input, beta, threshold, **others)
    return run(op, (input,), op.options(beta=beta, threshold=threshold))


def logsigmoid(input: Tensor, **others: Any) -> Tensor:
    """Returns ``-log(1 + exp(-input))``.

    Args:
        others: As in :func:`gelu`.
    """
    op = elementwise.LOGSIGMOID
    if others or torch_computes(op, (input,)):
        return F.logsigmoid(input, **others)
    return run(op, (input,), ())


def softsign(input: Tensor) -> Tensor:
    """Returns ``input / (1 + abs(input))``."""
    op = elementwise.SOFTSIGN
    if torch_computes(op, (input,)):
        return F.softsign(input)
    return run(op, (input,), ())


def tanhshrink(input: Tensor) -> Tensor:
    """Returns ``input - tanh(input)``."""
    op = elementwise.TANHSHRINK
    if torch_computes(op, (input,)):
        return F.tanhshrink(input)
    return run(op, (input,), ())


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Returns ``silu(gate) * up``, the gated activation of most language models.

    torch has no such function. Only the inputs are saved; backward recomputes the activation.

    Args:
        gate, up: Tensors that broadcast.

    Returns:
        A tensor of the broadcast shape and the promoted dtype.
    """
    return run(elementwise.SWIGLU, (gate, up), ())


def geglu(gate: Tensor, up: Tensor, approximate: Approximate = "none") -> Tensor:
    """Returns ``gelu(gate, approximate) * up``, a variant of :func:`swiglu`.

    Args:
        gate, up: As in :func:`swiglu`.
        approximate: As in :func:`gelu`.
    """
    op = elementwise.GEGLU
    return run(op, (gate, up), op.options(approximate=approximate))


def reglu(gate: Tensor, up: Tensor) -> Tensor:
    """Returns ``relu(gate) * up``, a variant of :func:`swiglu`.

    Args:
        gate, up: As in :func:`swiglu`.
    """
    return run(elementwise.REGLU, (gate, up), ())


def softmax(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Returns ``exp(input)`` divided by its sum along ``dim``, without overflow.

    Args:
        input: Logits, of any shape.
        dim: The dimension along which the results add up to 1. Omitting it is deprecated.
        _stacklevel: The stack level of torch's deprecation warning.
        dtype: The dtype to which the input is converted first.

    Returns:
        A contiguous tensor of the input's shape; NaN along ``dim`` if all values are -inf or any
        value is inf.

    Raises:
        IndexError: The input has no dimension ``dim``.
    """
    op = operators.SOFTMAX
    if dim is None and isinstance(input, Tensor):
        return F.softmax(input, dim, _stacklevel + 1, dtype)  # warns, and names the caller's line
    if torch_computes(op, (input,), dim=dim):
        return F.softmax(input, dim, _stacklevel, dtype)
    return run(op, (input,), op.options(dim=dim, dtype=dtype))


def log_softmax(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Returns the logarithm of :func:`softmax`: ``input`` minus its log-sum-exp along ``dim``.

    Args:
        input, dim, _stacklevel, dtype: As in :func:`softmax`, which raises the same errors.

    Returns:
        As in :func:`softmax`.
    """
    op = operators.LOG_SOFTMAX
    if dim is None and isinstance(input, Tensor):
        return F.log_softmax(
            input, dim, _stacklevel + 1, dtype
        )  # warns, and names the caller's line
    if torch_computes(op, (input,), dim=dim):
        return F.log_softmax(input, dim, _stacklevel, dtype)
    return run(op, (input,), op.options(dim=dim, dtype=dtype))
