"""Fused counterparts of ``torch.nn.functional``: same names, arguments, results and errors.

A call that the fused kernels do not take (second derivatives, forward-mode AD, ``torch.func``,
tensor subclasses, other devices and dtypes, sizes at which ATen is faster) goes to torch's own
operator. A function that has no counterpart here, such as ``conv2d``, is torch's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyfused import checks
from pyfused.ops import custom_operators as custom_operators  # defines what torch.compile calls
from pyfused.ops import margin as margins
from pyfused.ops.declaration import reduction_of
from pyfused.ops.dispatch import call
from pyfused.ops.elementwise import (
    BINARY_CROSS_ENTROPY,
    BINARY_CROSS_ENTROPY_WITH_LOGITS,
    CELU,
    ELU,
    GAUSSIAN_NLL_LOSS,
    GEGLU,
    GELU,
    GLU,
    HARDSHRINK,
    HARDSIGMOID,
    HARDSWISH,
    HARDTANH,
    HINGE_EMBEDDING_LOSS,
    HINGE_LOSS,
    HUBER_LOSS,
    KL_DIV,
    L1_LOSS,
    LEAKY_RELU,
    LOG_COSH_LOSS,
    LOGSIGMOID,
    MARGIN_RANKING_LOSS,
    MISH,
    MSE_LOSS,
    MULTILABEL_SOFT_MARGIN_LOSS,
    POISSON_NLL_LOSS,
    PRELU,
    QUANTILE_LOSS,
    REGLU,
    RELU,
    RELU6,
    RMSE_LOSS,
    SELU,
    SIGMOID,
    SIGMOID_FOCAL_LOSS,
    SILU,
    SMOOTH_L1_LOSS,
    SOFT_MARGIN_LOSS,
    SOFTCAP,
    SOFTPLUS,
    SOFTSHRINK,
    SOFTSIGN,
    SWIGLU,
    TANH,
    TANHSHRINK,
    THRESHOLD,
)
from pyfused.ops.log_probs import LogProbs, named
from pyfused.ops.metrics import Metrics
from pyfused.ops.operators import (
    COSINE_EMBEDDING_LOSS,
    CROSS_ENTROPY,
    KL_DIV_WITH_LOGITS,
    LINEAR_CROSS_ENTROPY,
    LINEAR_KL_DIV,
    LINEAR_LOG_PROBS,
    LINEAR_TOPK_KL_DIV,
    LOG_PROBS,
    LOG_SOFTMAX,
    MULTI_MARGIN_LOSS,
    MULTILABEL_MARGIN_LOSS,
    NLL_LOSS,
    SOFTMAX,
    TRIPLET_MARGIN_LOSS,
)
from pyfused.types import (
    Approximate,
    CrossEntropyOptions,
    FusedOptions,
    HeadOptions,
    LogProbsOptions,
    MarginKind,
    Reduction,
    ReductionOfKlDiv,
    Remainder,
    VocabShard,
)

if TYPE_CHECKING:
    # What __getattr__ finds, with its types; type checkers take other names of torch for Any.
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
    from typing_extensions import Unpack

__all__ = [
    "additive_margin",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "celu",
    "cosine_embedding_loss",
    "cross_entropy",
    "cross_entropy_with_metrics",
    "elu",
    "gaussian_nll_loss",
    "geglu",
    "gelu",
    "glu",
    "hardshrink",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "hinge_embedding_loss",
    "hinge_loss",
    "huber_loss",
    "kl_div",
    "kl_div_with_logits",
    "l1_loss",
    "leaky_relu",
    "linear_cross_entropy",
    "linear_cross_entropy_with_metrics",
    "linear_kl_div",
    "linear_log_probs",
    "linear_topk_kl_div",
    "log_cosh_loss",
    "log_probs",
    "log_softmax",
    "logsigmoid",
    "margin_ranking_loss",
    "mish",
    "mse_loss",
    "multi_margin_loss",
    "multilabel_margin_loss",
    "multilabel_soft_margin_loss",
    "nll_loss",
    "poisson_nll_loss",
    "prelu",
    "quantile_loss",
    "reglu",
    "relu",
    "relu6",
    "rmse_loss",
    "selu",
    "sigmoid",
    "sigmoid_focal_loss",
    "silu",
    "smooth_l1_loss",
    "soft_margin_loss",
    "softcap",
    "softmax",
    "softplus",
    "softshrink",
    "softsign",
    "swiglu",
    "tanh",
    "tanhshrink",
    "threshold",
    "triplet_margin_loss",
]


# For type checkers, too: a star import would clash with the functions defined here.
def __getattr__(name: str) -> Any:
    if name.startswith("_") or not hasattr(torch.nn.functional, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(torch.nn.functional, name)


def __dir__() -> list[str]:
    of_torch = (name for name in dir(torch.nn.functional) if not name.startswith("_"))
    return sorted({*__all__, *of_torch})


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
    gamma: float = 0.0,
    z_loss: float = 0.0,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    token_weight: Tensor | None = None,
    denominator: float | Tensor | None = None,
    loss_dtype: torch.dtype | None = None,
    inplace: bool = False,
    shard: VocabShard | None = None,
) -> Tensor:
    """Cross-entropy between logits and class indices or class probabilities.

    With ``lse`` the log-sum-exp of a row of logits and ``q`` its target distribution, smoothed by
    ``label_smoothing`` and weighted by ``weight``, the loss of the row is
    ``sum_c q_c * (lse - input_c)``, as defined by :func:`torch.nn.functional.cross_entropy`.

    Args:
        input: Logits, of shape (C), (N, C) or (N, C, d1, ..., dk); float32, float64, bfloat16 or
            float16.
        target: Class indices in [0, C) or ``ignore_index``, of shape (), (N) or (N, d1, ..., dk),
            int64 or uint8; or class probabilities of the input's shape and a floating dtype.
        weight: One factor for each class, of shape (C); of the input's dtype for class indices.
        size_average: Deprecated, see ``reduction``.
        ignore_index: The class index of rows that count for nothing: their loss and gradient are
            zero, and the mean is over the others.
        reduce: Deprecated, see ``reduction``.
        reduction: ``"none"``: one loss a row; ``"sum"``; ``"mean"``: the sum divided by the weight
            of the targets that count, or by the number of rows with class probabilities.
        label_smoothing: The share, 0.0 to 1.0, of the target that is spread over all classes.
        gamma: Of class indices without smoothing, the loss of a row is multiplied by
            ``(1 - p) ** gamma``, with ``p`` the probability of its class, so that rows that are
            right already count less: focal loss (Lin et al. 2017, arXiv 1708.02002). torch has no
            such argument; in its terms, with ``log_p = log_softmax(input, 1)``::

                nll_loss(log_p * (-log_p.expm1()) ** gamma, target, weight)

        z_loss: ``z_loss * lse ** 2`` is added to the loss of a row, which keeps the logits from
            drifting (Chowdhery et al. 2022, arXiv 2204.02311). Here and in what follows torch has
            no such argument.
        scale: What the logits are multiplied by, such as the 64 or so of losses of cosines
            (:func:`additive_margin`). No scaled copy of the logits is made.
        softcap: The logits are ``softcap * tanh(input / softcap)`` before that, as :func:`softcap`
            makes them, without a capped copy. ``inplace`` has no effect beside it.
        temperature: What the logits are divided by, so that ``scale`` is its inverse.
        token_weight: What the loss of each row is multiplied by, of the shape of class indices.
            The mean then divides by the sum of ``token_weight * weight[target]``.
        denominator: What ``"mean"`` divides the sum by, in place of the weight of the targets that
            count: of all micro-batches, or all processes, together. A positive number, or a tensor
            of one element, of which 0 makes the mean NaN. None for another reduction.
        loss_dtype: The dtype of the loss. ``torch.float32`` with logits of half precision gives
            the loss of ``input.float()``, which is not rounded to steps of 0.25 at a loss of 36,
            without that copy of the logits.
        inplace: Let the gradient take the memory of ``input``, which saves as much as the logits
            take. Do not use ``input`` afterwards: it holds the gradient, from the forward pass on
            if the loss is a scalar. Autograd raises where an operation had saved ``input`` before;
            other uses give wrong numbers silently. There is one backward pass then, without
            ``create_graph``. torch has no such argument; without a gradient, or where torch's
            operator runs, nothing is overwritten.
        shard: The classes of this process, where each process of a group has the logits of some
            classes, as a :class:`pyfused.VocabShard`. All of them make the call, with the same
            targets and a ``weight`` of all classes; each has the loss of all classes, and the
            gradient of its own logits. That takes class indices without ``gamma``.

    Returns:
        The loss in nats, of the input's dtype, or float32 under autocast, or ``loss_dtype``: a
        scalar, or of the shape of class indices for ``"none"``. NaN for a mean over nothing.

    Raises:
        IndexError: A class index is out of range; the message names it and its position. On a GPU,
            which would have to be waited for, its loss is NaN and its gradient zero instead.
        RuntimeError, ValueError: Shapes, dtypes or options do not fit, or ``inplace`` with an
            ``input`` that is a leaf or overlaps itself; the message names the argument, what was
            expected and what was got.
        TypeError: ``input`` or ``target`` is no tensor.
    """
    options = CrossEntropyOptions(  # by position: keywords take 0.2 us longer
        ignore_index,
        reduction_of(size_average, reduce, reduction),
        token_weight,
        denominator,
        softcap,
        temperature,
        label_smoothing,
        gamma,
        z_loss,
        scale,
        loss_dtype,
    )
    arguments = input, target, weight, options
    if shard is not None:
        return CROSS_ENTROPY.of_shard(arguments, shard)  # type: ignore[no-any-return]
    return call(CROSS_ENTROPY, arguments, inplace)


def cross_entropy_with_metrics(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    gamma: float = 0.0,
    inplace: bool = False,
    shard: VocabShard | None = None,
    **options: Unpack[FusedOptions],
) -> tuple[Tensor, Metrics]:
    """:func:`cross_entropy`, and metrics of each target from the same pass over the logits.

    Args:
        input, target, weight, ignore_index, reduction, label_smoothing, gamma, inplace, shard: As
            in :func:`cross_entropy`.
        options: Its other keywords.

    Returns:
        The loss, and the :class:`~pyfused.ops.metrics.Metrics`: log-probability, log-sum-exp,
        prediction, whether it is correct, and entropy, of the capped and scaled logits.

    Raises:
        IndexError, RuntimeError, TypeError, ValueError: As :func:`cross_entropy`.
    """
    checks.keywords("cross_entropy_with_metrics", options)
    given = CrossEntropyOptions(
        ignore_index,
        reduction,
        label_smoothing=label_smoothing,
        gamma=gamma,
        with_metrics=True,
        **options,
    )
    arguments = input, target, weight, given
    if shard is not None:
        return CROSS_ENTROPY.of_shard(arguments, shard)  # type: ignore[no-any-return]
    return call(CROSS_ENTROPY, arguments, inplace)  # type: ignore[return-value]


def additive_margin(
    input: Tensor, target: Tensor, margin: float = 0.35, kind: MarginKind = "cosface"
) -> Tensor:
    """Cosines with that of the target lowered by a margin, so that classes stay apart.

    To be composed with a loss, here as CosFace::

        cross_entropy(additive_margin(cosines, target), target, scale=64.0)

    torch has no such function.

    Args:
        input: Cosines of the angles between embeddings and classes, of shape (C), (N, C) or
            (N, C, d1, ..., dk) and a floating dtype.
        target: Class indices, of shape (), (N) or (N, d1, ..., dk), int64 or uint8. Where an index
            is not in [0, C), such as an ``ignore_index``, nothing is lowered.
        margin: From 0.0 up; an angle in radians for ``"arcface"``.
        kind: ``"cosface"`` for ``cosine - margin`` (Wang et al. 2018, arXiv 1801.09414),
            ``"arcface"`` for ``cos(angle + margin)`` (Deng et al. 2019, arXiv 1801.07698).

    Returns:
        A new tensor like ``input``.

    Raises:
        RuntimeError, ValueError: Shapes, dtypes or options do not fit.
        TypeError: ``input`` or ``target`` is no tensor, or ``margin`` no number.
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
    filter_eps: float = 0.0,
    z_loss: float = 0.0,
    scale: float = 1.0,
    temperature: float = 1.0,
    token_weight: Tensor | None = None,
    denominator: float | Tensor | None = None,
    loss_dtype: torch.dtype | None = None,
    shard: VocabShard | None = None,
) -> Tensor:
    """:func:`cross_entropy` of a linear layer's output, which never exists as a whole.

    A language model's logits are what it needs most memory for. Here some rows of them at a time go
    through matrix product, cross-entropy and the products of the gradients, while they are in
    cache; with little memory, or half precision that a CPU has no instructions for, some classes at
    a time, and the backward pass recomputes the logits. The result is that of torch's function of
    this name::

        cross_entropy(linear(input, linear_weight, linear_bias), target, ...)

    Weight gradients are summed up in float32 whatever the dtype. Rows whose target is ignored are
    left out before the matrix product on CPUs.

    Args:
        input: What the layer is given, of shape (..., D) with any leading dimensions, as torch's
            (D) and (N, D) or a model's (B, T, D); float32, float64, bfloat16 or float16.
        linear_weight: The layer's weight, of shape (C, D), or (C, d1, ..., dk, D) where each row of
            the input has logits of shape (C, d1, ..., dk); of the input's dtype.
        target: Class indices in [0, C) or ``ignore_index``, of shape (...) or (..., d1, ..., dk),
            with the input's leading dimensions, int64 or uint8; or class probabilities of the
            logits' shape, (..., C) or (..., C, d1, ..., dk), and a floating dtype.
        linear_bias: The layer's bias, of shape (C) or (C, d1, ..., dk) and the input's dtype.
        weight: One factor for each class, of shape (C).
        reduction: ``"none"``: one loss a row, whose gradients take the logits once more;
            ``"sum"``; ``"mean"``: as in :func:`cross_entropy`.
        ignore_index: The class index of rows that count for nothing; None stands for -100.
        label_smoothing: The share, 0.0 to 1.0, of the target that is spread over all classes.
        options: torch's ``LinearCrossEntropyOptions``, for calls that go to torch's
            operator. Here nothing is chosen by it: the logits are taken apart in any case.
        memory_budget: Bytes for the logits that exist at once and what they are made of. None
            takes up to 512 rows, no more than a quarter of them or 16 MiB; of bfloat16 on a CPU
            with AMX, whose products are faster than sums, all rows up to a 32nd of the machine's
            memory. The result depends on it by rounding alone.
        softcap, z_loss, scale, temperature, token_weight, denominator, loss_dtype: As in
            :func:`cross_entropy`.
        filter_eps: Classes are left out of a block's products for the gradients where the gradient
            of every logit of theirs is below ``filter_eps`` times the loss's own gradient (divided
            by what a mean divides by). The input's gradient is off by less than that times the sum
            of ``linear_weight.abs()`` over the classes, the weight's by less than that times the
            sum of ``input.abs()`` over the rows: little for a model that is sure of its
            predictions, much for one that is not, as small probabilities add up. Wijmans et al.
            2024 (arXiv 2411.09009) take 2 ** -12, what bfloat16 can tell from 1. 0.0 leaves out
            nothing. On a GPU each block waits to know which classes these are.
        shard: As in :func:`cross_entropy`, where each process has ``linear_weight`` and
            ``linear_bias`` of some classes, and the same ``input``, whose gradient is added up over
            the processes. ``filter_eps`` leaves out nothing then.

    Returns:
        The loss in nats: a scalar, or of the shape of class indices for ``"none"``; of the input's
        dtype, or float32 under autocast, or ``loss_dtype``.

    Raises:
        IndexError: A class index is out of range; as in :func:`cross_entropy`.
        RuntimeError, ValueError: Shapes, dtypes or options do not fit; the message names the
            argument, what was expected and what was got.
        TypeError: What should be a tensor is none.
    """
    given = HeadOptions(
        -100 if ignore_index is None else ignore_index,
        reduction,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        scale=scale,
        temperature=temperature,
        token_weight=token_weight,
        denominator=denominator,
        loss_dtype=loss_dtype,
        softcap=softcap,
        memory_budget=memory_budget,
        filter_eps=filter_eps,
    )
    arguments = input, linear_weight, linear_bias, target, weight, given, options
    if shard is not None:
        return LINEAR_CROSS_ENTROPY.of_shard(arguments, shard)  # type: ignore[no-any-return]
    return call(LINEAR_CROSS_ENTROPY, arguments)


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
    filter_eps: float = 0.0,
    shard: VocabShard | None = None,
    **options: Unpack[FusedOptions],
) -> tuple[Tensor, Metrics]:
    """:func:`linear_cross_entropy`, and metrics of each target from the same pass.

    Args:
        input, linear_weight, target, linear_bias, weight, ignore_index, reduction: As in
            :func:`linear_cross_entropy`.
        label_smoothing, memory_budget, filter_eps, shard: Likewise.
        options: Its other keywords.

    Returns:
        The loss, and the :class:`~pyfused.ops.metrics.Metrics` of the layer's capped and scaled
        output, as of :func:`cross_entropy_with_metrics`.

    Raises:
        IndexError, RuntimeError, TypeError, ValueError: As :func:`linear_cross_entropy`.
    """
    checks.keywords("linear_cross_entropy_with_metrics", options)
    given = HeadOptions(
        ignore_index,
        reduction,
        label_smoothing=label_smoothing,
        with_metrics=True,
        memory_budget=memory_budget,
        filter_eps=filter_eps,
        **options,
    )
    arguments = input, linear_weight, linear_bias, target, weight, given, None
    if shard is not None:
        return LINEAR_CROSS_ENTROPY.of_shard(arguments, shard)  # type: ignore[no-any-return]
    return call(LINEAR_CROSS_ENTROPY, arguments)  # type: ignore[return-value]


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
    shard: VocabShard | None = None,
) -> LogProbs:
    """Returns each target's log-probability and, where wanted, its row's entropy and log-sum-exp.

    All three are differentiable, alone and together, and come from one pass over the logits. With
    ``x = softcap * tanh(logits / softcap) / temperature``, or ``logits / temperature``, they are
    ``x[target] - lse``, ``lse - sum_c p_c x_c`` and ``lse = log sum_c exp(x_c)``, where
    ``p = exp(x - lse)``. On CPUs the results of a row have the same bits whatever the other rows,
    the number of threads, and whether gradients are wanted. torch has no such function.

    Args:
        logits: Of shape (C) or (N, C), or of any with a ``dim``; float32, float64, bfloat16 or
            float16.
        target: Class indices in [0, C) or ``ignore_index``, of the logits' shape without the
            dimension of the classes, int64 or uint8.
        dim: The dimension of the classes, which has to be given where logits have more than two:
            -1 for those of language models, (B, T, C), and 1 for those of torch's cross-entropy,
            (N, C, d1, ..., dk).
        ignore_index: The class index of rows whose results and gradient are 0.
        softcap: The logits are ``softcap * tanh(logits / softcap)``; None for no such bound.
        temperature: What they are divided by after that.
        return_entropy, return_lse: Whether the result has the entropy, and the log-sum-exp.
        shard: The classes of this process, as in :func:`cross_entropy`.

    Returns:
        A :class:`~pyfused.ops.log_probs.LogProbs`, in nats, of the target's shape; float32, or
        float64 of float64.

    Raises:
        IndexError: A class index is out of range. On a GPU its log-probability is NaN instead.
        RuntimeError, ValueError: Shapes, dtypes or options do not fit.
        TypeError: ``logits`` or ``target`` is no tensor, or an option no number.
    """
    alone = not (return_entropy or return_lse)
    options = LogProbsOptions(ignore_index, softcap=softcap, temperature=temperature, alone=alone)
    logits = checks.classes_at(1, "logits", logits, dim)
    op, arguments = LOG_PROBS, (logits, target, options)
    values = call(op, arguments) if shard is None else op.of_shard(arguments, shard)
    return LogProbs(values) if options.alone else named(values, return_entropy, return_lse)


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
    memory_budget: int | None = None,
    deterministic_rows: bool = False,
    shard: VocabShard | None = None,
) -> LogProbs:
    """:func:`log_probs` of a linear layer's output, which never exists as a whole.

    Some logits at a time are made, by the forward pass for the results and by the backward pass
    for the gradients. Rows whose target is ignored are left out on CPUs.

    Args:
        input, linear_weight: As in :func:`linear_cross_entropy`.
        target: Class indices as there.
        linear_bias: The layer's bias, of shape (C) or (C, d1, ..., dk).
        ignore_index, softcap, temperature, return_entropy, return_lse: As in :func:`log_probs`.
        memory_budget: Bytes for the logits that exist at once, as in :func:`linear_cross_entropy`.
            Logits of the first rows may stay, within it, until the backward pass.
        deterministic_rows: A library's matrix product may give a row other bits in a batch of
            another size, or at another place of one. True makes logits by products of 96 rows,
            padded with zeros, which takes memory for so many rows of logits whatever the budget.
            Whether a product computes all its rows alike is tried when a layer's size is first
            met; where it does not, rows are multiplied one at a time, which is slower. The bits
            are those of one number of threads.
        shard: The classes of this process, as in :func:`linear_cross_entropy`.

    Returns:
        A :class:`~pyfused.ops.log_probs.LogProbs`, in nats, of the target's shape; float32, or
        float64 of float64.

    Raises:
        IndexError, RuntimeError, TypeError, ValueError: As :func:`log_probs`.
    """
    options = LogProbsOptions(
        ignore_index,
        softcap=softcap,
        temperature=temperature,
        alone=not (return_entropy or return_lse),
        memory_budget=memory_budget,
        deterministic_rows=deterministic_rows,
    )
    arguments = input, linear_weight, linear_bias, target, options
    op = LINEAR_LOG_PROBS
    values = call(op, arguments) if shard is None else op.of_shard(arguments, shard)
    return LogProbs(values) if options.alone else named(values, return_entropy, return_lse)


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

    With p and q the softmax of the student's and of the teacher's logits divided by the
    temperature, and m = beta q + (1 - beta) p, the loss of a token is

    - for ``beta=0.0``, forward KL(q || p), the sum of ``q (log q - log p)`` over the classes
      (Hinton et al. 2015, arXiv 1503.02531),
    - for ``beta=1.0``, reverse KL(p || q), the sum of ``p (log p - log q)``,
    - in between, ``beta KL(q || m) + (1 - beta) KL(p || m)``, the generalised Jensen-Shannon
      divergence of GKD (Agarwal et al. 2024, arXiv 2306.13649), in which KL(q || p) and KL(p || q)
      stand for its limits, which are 0.

    0 log 0 is 0. The loss is not multiplied by the temperature's square, which would keep gradients
    as large as at temperature 1. torch computes the first as ``kl_div(log_softmax(logits /
    temperature, -1), log_softmax(teacher_logits / temperature, -1), log_target=True,
    reduction="none").sum(-1)``.

    Args:
        logits: The student's, of shape (C) or (N, C), or of any with a ``dim``.
        teacher_logits: Of the same shape, of any floating dtype.
        dim: The dimension of the classes, which has to be given where logits have more than two:
            -1 for those of language models, (B, T, C), and 1 for those of torch's cross-entropy,
            (N, C, d1, ..., dk). The other dimensions are those of the tokens.
        beta: 0.0 to 1.0.
        softcap, teacher_softcap: The student's and the teacher's logits are
            ``softcap * tanh(logits / softcap)``; None for no such bound.
        temperature: What all logits are divided by after that.
        reduction: ``"none"``: one loss a token; ``"sum"``; ``"mean"``: the sum, divided by the
            number of tokens or the sum of their weights, as ``"batchmean"`` of :func:`kl_div` for
            logits (N, C).
        token_weight: A factor from 0.0 up for the loss of each token, or a mask, of the tokens'
            shape. A token of weight 0 is not read, and has no gradient whatever its logits are.
        denominator: What ``"mean"`` divides the sum by instead, as in :func:`cross_entropy`.
        teacher_requires_grad: The teacher is a constant and gets no gradient, even if its tensors
            require grad. True gives it one: if they do, torch's operators compute the loss.

    Returns:
        The loss in nats: a scalar, or of the tokens' shape for ``"none"``; float32, or float64 of
        float64.

    Raises:
        RuntimeError, ValueError: Shapes, dtypes or options do not fit; the message names the
            argument, what was expected and what was got.
        TypeError: What should be a tensor is none.
    """
    arguments = KL_DIV_WITH_LOGITS.bind(
        logits=logits,
        teacher_logits=teacher_logits,
        dim=dim,
        beta=beta,
        softcap=softcap,
        teacher_softcap=teacher_softcap,
        temperature=temperature,
        reduction=reduction,
        token_weight=token_weight,
        denominator=denominator,
        teacher_requires_grad=teacher_requires_grad,
    )
    return call(KL_DIV_WITH_LOGITS, arguments)


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
    """:func:`kl_div_with_logits` of two linear layers' outputs, which never exist as a whole.

    The logits of some rows at a time are made, of both models, and turned into gradients. Weight
    gradients are summed up in float32 whatever the dtype.

    Args:
        input, linear_weight, linear_bias: The student's layer and what it is given, of shapes
            (..., D), (C, D) and (C); float32, float64, bfloat16 or float16.
        teacher_input, teacher_linear_weight, teacher_linear_bias: The teacher's, of shapes
            (..., E), (C, E) and (C). Neither E nor the dtype need be the student's.
        beta, softcap, teacher_softcap, temperature, reduction, denominator: As in
            :func:`kl_div_with_logits`.
        token_weight: Likewise, of shape (...). Tokens of weight 0 are left out of the products on
            CPUs.
        teacher_requires_grad: The teacher is a constant and gets no gradient, even if its tensors
            require grad, as a head's weight does by default. True gives it one: if they do, torch's
            operators compute the loss from all logits.
        memory_budget: Bytes for the logits of both models that exist at once, one row of each at
            least. None stands for as many as in :func:`linear_cross_entropy`.

    Returns:
        The loss in nats: a scalar, or of the tokens' shape for ``"none"``; float32, or float64 of
        float64.

    Raises:
        RuntimeError, ValueError, TypeError: As :func:`kl_div_with_logits`.
    """
    arguments = LINEAR_KL_DIV.bind(
        input=input,
        linear_weight=linear_weight,
        linear_bias=linear_bias,
        teacher_input=teacher_input,
        teacher_linear_weight=teacher_linear_weight,
        teacher_linear_bias=teacher_linear_bias,
        beta=beta,
        softcap=softcap,
        teacher_softcap=teacher_softcap,
        temperature=temperature,
        reduction=reduction,
        token_weight=token_weight,
        denominator=denominator,
        memory_budget=memory_budget,
        teacher_requires_grad=teacher_requires_grad,
    )
    return call(LINEAR_KL_DIV, arguments)


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
    """:func:`linear_kl_div` from the k most probable classes of a teacher, as saved beforehand.

    Args:
        teacher_indices: k different classes for each token, of shape (..., k) and dtype int64.
        teacher_log_probs: Their log-probabilities at the temperature, of shape (..., k); any
            floating dtype. What their sum lacks of 1 is the probability of all other classes.
        beta: As in :func:`kl_div_with_logits`; 0.0 where the remainder is ignored.
        softcap, temperature: The student's logits are ``softcap * tanh(logits / softcap)``, and are
            divided by the temperature.
        remainder: ``"bucket"``: all other classes count as one, whose probability is what is left
            of 1, for student and teacher; with ``beta=1.0`` nothing left for the teacher makes the
            loss infinite. ``"ignore"``: the sum of ``q (log q - log p)`` goes over the k classes
            alone, which may be negative; p is of all classes.
        input, linear_weight, linear_bias, reduction, token_weight: As in :func:`linear_kl_div`.
        denominator, memory_budget, teacher_requires_grad: Likewise.

    Returns:
        The loss in nats: a scalar, or of the tokens' shape for ``"none"``; float32, or float64 of
        float64.

    Raises:
        IndexError, ValueError: A class index is out of range, or there twice in a token's k; or
            ``teacher_log_probs`` are no logarithms of probabilities: above 0, or of a sum above 1,
            by more than they may be rounded. On a GPU, where an error would have to wait, the loss
            of a token with such indices is NaN instead.
        RuntimeError, ValueError, TypeError: As :func:`kl_div_with_logits`.
    """
    arguments = LINEAR_TOPK_KL_DIV.bind(
        input=input,
        linear_weight=linear_weight,
        linear_bias=linear_bias,
        teacher_indices=teacher_indices,
        teacher_log_probs=teacher_log_probs,
        beta=beta,
        softcap=softcap,
        temperature=temperature,
        remainder=remainder,
        reduction=reduction,
        token_weight=token_weight,
        denominator=denominator,
        memory_budget=memory_budget,
        teacher_requires_grad=teacher_requires_grad,
    )
    return call(LINEAR_TOPK_KL_DIV, arguments)


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Returns the negative log-likelihood of class indices: ``-weight[target] * input[target]``.

    :func:`cross_entropy` is this of :func:`log_softmax`, in one kernel.

    Args:
        input: Log-probabilities, of shape (C), (N, C) or (N, C, d1, ..., dk); float32, float64,
            bfloat16 or float16.
        target: Class indices in [0, C) or ``ignore_index``, of shape (), (N) or (N, d1, ..., dk),
            int64, or uint8 where the input has two dimensions.
        weight: One factor for each class, of shape (C) and the input's dtype.
        size_average: Deprecated, see ``reduction``.
        ignore_index: The class index of rows that count for nothing: their loss and gradient are
            zero, and the mean is over the others.
        reduce: Deprecated, see ``reduction``.
        reduction: ``"none"``: one loss a row; ``"sum"``; ``"mean"``: the sum divided by the weight
            of the targets that count.

    Returns:
        The loss in nats, of the input's dtype, or float32 under autocast: a scalar, or of the
        target's shape for ``"none"``. NaN for a mean over nothing.

    Raises:
        IndexError: A class index is out of range; on a GPU, its loss is NaN instead.
        RuntimeError, ValueError: Shapes, dtypes or options do not fit; the message names the
            argument, what was expected and what was got.
        TypeError: ``input`` or ``target`` is no tensor.
    """
    return call(NLL_LOSS, (input, target, weight, size_average, ignore_index, reduce, reduction))


def multi_margin_loss(
    input: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Returns how far other classes come within a margin of the target's score, as in an SVM.

    With ``z_c = max(0, margin - input_target + input_c)``, the loss of a row is
    ``weight_target / C`` times the sum of ``z_c ** p`` over all classes but the target, as defined
    by :func:`torch.nn.functional.multi_margin_loss`.

    Args:
        input: Scores, of shape (C) or (N, C); float32, float64, bfloat16 or float16.
        target: Class indices in [0, C), int64, of shape (), (1) or (N).
        p: 1 or 2.
        margin: The distance between scores from which on nothing is lost.
        weight: One factor for each class, of shape (C) and the input's dtype.
        size_average, reduce: Deprecated, see ``reduction``.
        reduction: ``"none"``: one loss a row; ``"sum"``; ``"mean"``: the sum divided by N.

    Returns:
        The loss, of the input's dtype, or float32 under autocast: a scalar, or of the target's
        shape for ``"none"``.

    Raises:
        RuntimeError: A class index is out of range; on a GPU, its loss is NaN instead.
        RuntimeError, ValueError: Shapes, dtypes or options do not fit; the message names the
            argument, what was expected and what was got.
        TypeError: ``input`` or ``target`` is no tensor.
    """
    return call(
        MULTI_MARGIN_LOSS,
        (input, target, p, margin, weight, size_average, reduce, reduction),
    )


def multilabel_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Returns how far other classes come within a margin of the score of each target of a row.

    The loss of a row is ``1 / C`` times the sum of ``max(0, 1 - input_t + input_c)`` over its
    targets t and over the classes c that are none of them, as defined by
    :func:`torch.nn.functional.multilabel_margin_loss`. It takes time for each pair of these.

    Args:
        input: Scores, of shape (C) or (N, C); float32, float64, bfloat16 or float16.
        target: Class indices in [0, C), int64, of the input's shape. The targets of a row end at
            its first -1.
        size_average, reduce: Deprecated, see ``reduction``.
        reduction: ``"none"``: one loss a row; ``"sum"``; ``"mean"``: the sum divided by N.

    Returns:
        The loss, of the input's dtype, or float32 under autocast: a scalar, or of shape () or (N)
        for ``"none"``.

    Raises:
        RuntimeError: A class index is out of range; on a GPU, the loss of its row is NaN instead.
        RuntimeError, ValueError: Shapes, dtypes or options do not fit; the message names the
            argument, what was expected and what was got.
        TypeError: ``input`` or ``target`` is no tensor.
    """
    return call(MULTILABEL_MARGIN_LOSS, (input, target, size_average, reduce, reduction))


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
    """Returns how far the negative is from being farther than the positive by a margin.

    With ``d(x, y) = ||x - y + eps||_p``, the loss of a row is ``max(0, margin + d(anchor, positive)
    - d(anchor, negative))``, as defined by :func:`torch.nn.functional.triplet_margin_loss`.
    Distances of another ``p`` than 1 and 2 are left to torch.

    Args:
        anchor: Embeddings, of shape (D) or (N, D), or of more dimensions before the features;
            float32, float64, bfloat16 or float16.
        positive: Embeddings of the same kind, of as many dimensions, which broadcast.
        negative: Embeddings of another kind, likewise.
        margin: A positive number: how much farther the negative is to be.
        p: The norm's exponent.
        eps: Is added to every difference.
        swap: The negative's distance is the smaller one of that to the anchor and that to the
            positive.
        size_average, reduce: Deprecated, see ``reduction``.
        reduction: ``"none"``: one loss a row; ``"sum"``; ``"mean"``: the sum divided by their
            number.

    Returns:
        The loss, of the inputs' dtype, or float32 under autocast: a scalar, or of the shape of the
        inputs without the features for ``"none"``.

    Raises:
        RuntimeError, ValueError: Shapes, dtypes or options do not fit; the message names the
            argument, what was expected and what was got.
        TypeError: An embedding is no tensor.
    """
    return call(
        TRIPLET_MARGIN_LOSS,
        (anchor, positive, negative, margin, p, eps, swap, size_average, reduce, reduction),
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
    """Returns how far the angle of two embeddings is from what the target says of it.

    The loss of a row is ``1 - cos`` for a target of 1, ``max(0, cos - margin)`` for -1, and 0 for
    others, with ``cos = x1 . x2 / sqrt((x1 . x1 + 1e-12) (x2 . x2 + 1e-12))``, as defined by
    :func:`torch.nn.functional.cosine_embedding_loss`.

    Args:
        input1: Embeddings, of shape (D) or (N, D); float32, float64, bfloat16 or float16.
        input2: Embeddings, of as many dimensions, which broadcast.
        target: 1 or -1 for each row, of shape () or (N), of any dtype.
        margin: The cosine up to which embeddings that are to differ lose nothing.
        size_average, reduce: Deprecated, see ``reduction``.
        reduction: ``"none"``: one loss a row; ``"sum"``; ``"mean"``: the sum divided by N.

    Returns:
        The loss, of the inputs' dtype, or float32 under autocast: a scalar, or of the target's
        shape for ``"none"``.

    Raises:
        RuntimeError, ValueError: Shapes, dtypes or options do not fit; the message names the
            argument, what was expected and what was got.
        TypeError: An input or the target is no tensor.
    """
    return call(
        COSINE_EMBEDDING_LOSS,
        (input1, input2, target, margin, size_average, reduce, reduction),
    )


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """Squared difference between input and target, element by element.

    The loss of an element is ``weight * (input - target) ** 2``, as defined by
    :func:`torch.nn.functional.mse_loss`.

    Args:
        input: Predictions, of any shape; float32, float64, bfloat16 or float16.
        target: Ground truth, of a shape that broadcasts with the input's; a difference in shape is
            warned of. Differing dtypes are promoted.
        size_average, reduce: Deprecated, see ``reduction``.
        reduction: ``"none"``: one loss an element; ``"sum"``; ``"mean"``: the sum divided by the
            number of elements, or by the sum of ``weight``.
        weight: One factor for each element, of the input's shape.

    Returns:
        The loss in the squared unit of the input, of the promoted dtype, or float32 under autocast:
        a scalar, or of the broadcast shape for ``"none"``. NaN for a mean over nothing.

    Raises:
        RuntimeError, ValueError: Shapes or options do not fit; the message names the argument, what
            was expected and what was got.
        TypeError: ``input`` or ``target`` is no tensor.
    """
    return call(MSE_LOSS, (input, target, size_average, reduce, reduction, weight))


def l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """Absolute difference between input and target, element by element.

    The loss of an element is ``weight * |input - target|``, as defined by
    :func:`torch.nn.functional.l1_loss`; where they are equal the gradient is 0.

    Args:
        input, target, size_average, reduce, reduction, weight: As in :func:`mse_loss`.

    Returns:
        The loss in the unit of the input, of the promoted dtype, or float32 under autocast: a
        scalar, or of the broadcast shape for ``"none"``. NaN for a mean over nothing.

    Raises:
        RuntimeError, ValueError: Shapes or options do not fit; the message names the argument, what
            was expected and what was got.
        TypeError: ``input`` or ``target`` is no tensor.
    """
    return call(L1_LOSS, (input, target, size_average, reduce, reduction, weight))


def smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
    beta: float = 1.0,
) -> Tensor:
    """Difference of input and target, squared where it is small, element by element.

    With ``d = |input - target|``, the loss of an element is ``d ** 2 / (2 * beta)`` where
    ``d < beta``, else ``d - beta / 2``, as defined by :func:`torch.nn.functional.smooth_l1_loss`.

    Args:
        input, target, size_average, reduce: As in :func:`mse_loss`.
        reduction: ``"none"``: one loss an element; ``"sum"``; ``"mean"``: the sum divided by the
            number of elements.
        beta: The difference up to which it is squared, in the unit of the input; 0.0 for none.

    Returns:
        The loss in the unit of the input, of the promoted dtype, or float32 under autocast: a
        scalar, or of the broadcast shape for ``"none"``. NaN for a mean over nothing.

    Raises:
        RuntimeError, ValueError: As :func:`mse_loss`, or ``beta`` is negative.
        TypeError: ``input`` or ``target`` is no tensor, or ``beta`` no number.
    """
    return call(SMOOTH_L1_LOSS, (input, target, size_average, reduce, reduction, beta))


def huber_loss(
    input: Tensor,
    target: Tensor,
    reduction: Reduction = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> Tensor:
    """Difference of input and target, squared where it is small, element by element.

    With ``d = |input - target|``, the loss of an element is ``weight`` times ``d ** 2 / 2`` where
    ``d < delta``, else ``delta * (d - delta / 2)``, as defined by
    :func:`torch.nn.functional.huber_loss`. It is ``delta`` times :func:`smooth_l1_loss`'s.

    Args:
        input, target: As in :func:`mse_loss`.
        reduction: ``"none"``: one loss an element; ``"sum"``; ``"mean"``: the sum divided by the
            number of elements, with or without ``weight``.
        delta: The difference up to which it is squared, in the unit of the input; more than 0.
        weight: One factor for each element, of the input's shape.

    Returns:
        The loss in the squared unit of the input, of the promoted dtype, or float32 under autocast:
        a scalar, or of the broadcast shape for ``"none"``. NaN for a mean over nothing.

    Raises:
        RuntimeError, ValueError: Shapes or options do not fit, or ``delta`` is not positive; the
            message names the argument, what was expected and what was got.
        TypeError: ``input`` or ``target`` is no tensor, or ``delta`` no number.
    """
    return call(HUBER_LOSS, (input, target, reduction, delta, weight))


def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Cross-entropy between probabilities of two classes, element by element.

    The loss of an element is ``-weight * (target * log(input) + (1 - target) * log(1 - input))``,
    each logarithm being at least -100, as defined by
    :func:`torch.nn.functional.binary_cross_entropy`.

    Args:
        input: Probabilities of the positive class, 0.0 to 1.0, of any shape; float32, float64,
            bfloat16 or float16.
        target: The same, as they should be, of the input's shape.
        weight: One factor for each element, of a shape that broadcasts to the input's.
        size_average, reduce: Deprecated, see ``reduction``.
        reduction: ``"none"``: one loss an element; ``"sum"``; ``"mean"``: the sum divided by the
            number of elements, with or without ``weight``.

    Returns:
        The loss in nats, of the input's dtype: a scalar, or of the input's shape for ``"none"``.
        NaN for a mean over nothing, and of what is no probability on a GPU, which would have to be
        waited for.

    Raises:
        RuntimeError, ValueError: A probability is out of range, shapes or options do not fit, or a
            weight requires grad; the message names the argument, what was expected and what was
            got. Under autocast: torch's advice to take logits.
        TypeError: ``input`` or ``target`` is no tensor.
    """
    return call(BINARY_CROSS_ENTROPY, (input, target, weight, size_average, reduce, reduction))


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    """Cross-entropy between logits and probabilities of two classes, element by element.

    With ``p = pos_weight``, the loss of an element is
    ``weight * -(p * target * log_sigmoid(input) + (1 - target) * log_sigmoid(-input))``, as defined
    by :func:`torch.nn.functional.binary_cross_entropy_with_logits`.

    Args:
        input: Logits, of any shape; float32, float64, bfloat16 or float16.
        target: Probabilities of the positive class, 0.0 to 1.0, of the input's shape.
        weight: One factor for each element, of a shape that broadcasts to the input's.
        size_average, reduce: Deprecated, see ``reduction``.
        reduction: ``"none"``: one loss an element; ``"sum"``; ``"mean"``: the sum divided by the
            number of elements, with or without ``weight``.
        pos_weight: How much more the positive class counts, of a shape that broadcasts to the
            input's.

    Returns:
        The loss in nats, of the target's dtype, or float32 under autocast: a scalar, or of the
        input's shape for ``"none"``. NaN for a mean over nothing.

    Raises:
        RuntimeError, ValueError: Shapes or options do not fit, or a weight requires grad; the
            message names the argument, what was expected and what was got.
        TypeError: ``input`` or ``target`` is no tensor.
    """
    return call(
        BINARY_CROSS_ENTROPY_WITH_LOGITS,
        (input, target, weight, size_average, reduce, reduction, pos_weight),
    )


def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: ReductionOfKlDiv = "mean",
    log_target: bool = False,
) -> Tensor:
    """Kullback-Leibler divergence of a distribution's logarithms from a target, element by element.

    The term of an element is ``target * (log(target) - input)``, or 0 where the target is 0, as
    defined by :func:`torch.nn.functional.kl_div`.

    Args:
        input: Logarithms of probabilities, of any shape; float32, float64, bfloat16 or float16.
        target: Probabilities, or their logarithms, of a shape that broadcasts with the input's.
            Differing dtypes are promoted.
        size_average, reduce: Deprecated, see ``reduction``.
        reduction: ``"none"``: one term an element; ``"sum"``; ``"batchmean"``: the sum divided by
            the first dimension, which is the divergence's mean; ``"mean"``: the sum divided by the
            number of elements, of which torch warns.
        log_target: ``target`` holds logarithms.

    Returns:
        The divergence in nats, of the promoted dtype, or float32 under autocast: a scalar, or of
        the broadcast shape for ``"none"``. NaN for a mean over nothing.

    Raises:
        RuntimeError, ValueError: Shapes or options do not fit; the message names the argument, what
            was expected and what was got.
        TypeError: ``input`` or ``target`` is no tensor.
    """
    return call(KL_DIV, (input, target, size_average, reduce, reduction, log_target))


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
    """Negative log-likelihood of counts drawn from Poisson distributions, element by element.

    The loss of an element is ``exp(input) - target * input``, or
    ``input - target * log(input + eps)`` without ``log_input``, as defined by
    :func:`torch.nn.functional.poisson_nll_loss`.

    Args:
        input: Logarithms of the rates, or the rates, of any shape; float32, float64, bfloat16 or
            float16.
        target: Counts, of a shape that broadcasts with the input's. Differing dtypes are promoted.
        log_input: ``input`` holds logarithms.
        full: Add Stirling's approximation of ``log(target!)`` where the target is more than 1.
        size_average: Deprecated, see ``reduction``.
        eps: What is added to a rate before its logarithm is taken.
        reduce: Deprecated, see ``reduction``.
        reduction: ``"none"``: one loss an element; ``"sum"``; ``"mean"``: the sum divided by the
            number of elements.

    Returns:
        The loss in nats, of the promoted dtype, or float32 under autocast: a scalar, or of the
        broadcast shape for ``"none"``. NaN for a mean over nothing.

    Raises:
        RuntimeError, ValueError: Shapes or options do not fit; the message names the argument, what
            was expected and what was got.
        TypeError: ``input`` or ``target`` is no tensor, or ``eps`` no number.
    """
    return call(
        POISSON_NLL_LOSS,
        (input, target, log_input, full, size_average, eps, reduce, reduction),
    )


def gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: Reduction = "mean",
) -> Tensor:
    """Negative log-likelihood of targets drawn from Gaussian distributions, element by element.

    With ``v = max(var, eps)``, the loss of an element is
    ``(log(v) + (input - target) ** 2 / v) / 2``, as defined by
    :func:`torch.nn.functional.gaussian_nll_loss`; the gradient to ``var`` is that to ``v``.

    Args:
        input: Expectations, of any shape; float32, float64, bfloat16 or float16.
        target: Samples, of a shape that broadcasts with the input's. Differing dtypes are promoted.
        var: Variances, in the squared unit of the input: of its shape, or of it without the last
            dimension, or with a single dimension of size 1; or a float for all.
        full: Add the constant ``log(2 * pi) / 2``.
        eps: The least variance, for stability.
        reduction: ``"none"``: one loss an element; ``"sum"``; ``"mean"``: the sum divided by the
            number of elements.

    Returns:
        The loss in nats, of the promoted dtype: a scalar, or of the broadcast shape for ``"none"``.
        NaN for a mean over nothing.

    Raises:
        ValueError: A variance is negative (on a GPU, which would have to be waited for, it counts
            as ``eps``), or its shape or the reduction does not fit.
        RuntimeError: The target's shape does not fit.
        TypeError: ``input`` or ``target`` is no tensor, or ``var`` neither that nor a float.
    """
    return call(GAUSSIAN_NLL_LOSS, (input, target, var, full, eps, reduction))


def soft_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Logistic loss of two classes, -1 and 1, element by element.

    The loss of an element is ``log(1 + exp(-target * input))``, as defined by
    :func:`torch.nn.functional.soft_margin_loss`, but finite where torch's exponential overflows.

    Args:
        input: Scores, of any shape; float32, float64, bfloat16 or float16.
        target: The classes, -1 or 1, of the input's shape.
        size_average, reduce: Deprecated, see ``reduction``.
        reduction: ``"none"``: one loss an element; ``"sum"``; ``"mean"``: the sum divided by the
            number of elements.

    Returns:
        The loss in nats, of the input's dtype, or float32 under autocast: a scalar, or of the
        input's shape for ``"none"``. NaN for a mean over nothing.

    Raises:
        RuntimeError, ValueError: Shapes or options do not fit; the message names the argument, what
            was expected and what was got.
        TypeError: ``input`` or ``target`` is no tensor.
    """
    return call(SOFT_MARGIN_LOSS, (input, target, size_average, reduce, reduction))


def hinge_embedding_loss(
    input: Tensor,
    target: Tensor,
    margin: float = 1.0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Distance of what is alike, and closeness of what is not, element by element.

    The loss of an element is ``input`` where the target is 1 and ``max(0, margin - input)`` where
    it is -1, as defined by :func:`torch.nn.functional.hinge_embedding_loss`.

    Args:
        input: Distances, of any shape; float32, float64, bfloat16 or float16.
        target: 1 for what is alike and -1 for what is not, of a shape that broadcasts with the
            input's. Another value counts as both.
        margin: The distance from which on what is not alike costs nothing.
        size_average, reduce: Deprecated, see ``reduction``.
        reduction: ``"none"``: one loss an element; ``"sum"``; ``"mean"``: the sum divided by the
            number of elements.

    Returns:
        The loss in the unit of the input, of the promoted dtype, or float32 under autocast: a
        scalar, or of the broadcast shape for ``"none"``. NaN for a mean over nothing.

    Raises:
        RuntimeError, ValueError: Shapes or options do not fit; the message names the argument, what
            was expected and what was got.
        TypeError: ``input`` or ``target`` is no tensor, or ``margin`` no number.
    """
    return call(HINGE_EMBEDDING_LOSS, (input, target, margin, size_average, reduce, reduction))


def margin_ranking_loss(
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Returns how far the lower of two scores is from being lower by a margin, element by element.

    The loss of an element is ``max(0, -target * (input1 - input2) + margin)``, as defined by
    :func:`torch.nn.functional.margin_ranking_loss`.

    Args:
        input1, input2: Scores, of shapes that broadcast and have as many dimensions; float32,
            float64, bfloat16 or float16.
        target: 1 where ``input1`` should be the higher one, -1 where ``input2`` should, of a shape
            that broadcasts with theirs.
        margin: By how much.
        size_average, reduce: Deprecated, see ``reduction``.
        reduction: ``"none"``: one loss an element; ``"sum"``; ``"mean"``: the sum divided by the
            number of elements.

    Returns:
        The loss in the unit of the scores, of the promoted dtype, or float32 under autocast: a
        scalar, or of the broadcast shape for ``"none"``. NaN for a mean over nothing.

    Raises:
        RuntimeError, ValueError: Shapes or options do not fit; the message names the argument, what
            was expected and what was got.
        TypeError: One of the tensors is none, or ``margin`` is no number.
    """
    return call(
        MARGIN_RANKING_LOSS, (input1, input2, target, margin, size_average, reduce, reduction)
    )


def quantile_loss(
    input: Tensor, target: Tensor, quantile: float = 0.5, reduction: Reduction = "mean"
) -> Tensor:
    """Difference of input and target that costs more on one side, element by element.

    The loss of an element is ``max(quantile * (target - input), (quantile - 1) * (target -
    input))``: its mean is least at that quantile of the targets (Koenker and Bassett 1978). Where
    the two are equal the gradient is the mean of theirs, as of :func:`torch.maximum`. torch has no
    such loss; in its terms::

        d = target - input
        torch.maximum(quantile * d, (quantile - 1) * d)

    Args:
        input: Predictions, of any shape; float32, float64, bfloat16 or float16.
        target: Ground truth, of a shape that broadcasts with the input's. Differing dtypes are
            promoted.
        quantile: The share of the targets that is to lie below, 0.0 to 1.0.
        reduction: ``"none"``: one loss an element; ``"sum"``; ``"mean"``: the sum divided by the
            number of elements.

    Returns:
        The loss in the unit of the input, of the promoted dtype: a scalar, or of the broadcast
        shape for ``"none"``. NaN for a mean over nothing.

    Raises:
        RuntimeError, ValueError: Shapes or options do not fit; the message names the argument, what
            was expected and what was got.
        TypeError: ``input`` or ``target`` is no tensor, or ``quantile`` no number.
    """
    return call(QUANTILE_LOSS, (input, target, quantile, reduction))


def log_cosh_loss(input: Tensor, target: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Logarithm of the hyperbolic cosine of the difference, element by element.

    Half of the difference's square where it is small, its size less log(2) where it is large, and
    smooth in between. torch has no such loss; in its terms::

        d = (input - target).abs()
        d + F.softplus(-2 * d) - math.log(2)

    Args:
        input, target, reduction: As in :func:`quantile_loss`.

    Returns:
        The loss in the unit of the input, of the promoted dtype: a scalar, or of the broadcast
        shape for ``"none"``. NaN for a mean over nothing.

    Raises:
        RuntimeError, ValueError: Shapes or options do not fit.
        TypeError: ``input`` or ``target`` is no tensor.
    """
    return call(LOG_COSH_LOSS, (input, target, reduction))


def hinge_loss(
    input: Tensor,
    target: Tensor,
    margin: float = 1.0,
    squared: bool = False,
    reduction: Reduction = "mean",
) -> Tensor:
    """Returns how far a score is from its side of zero by a margin, element by element.

    The loss of support vector machines. torch has no such loss; in its terms::

        (margin - target * input).clamp(min=0)  # ** 2 if squared

    Args:
        input: Scores, of any shape; float32, float64, bfloat16 or float16.
        target: The classes, -1 or 1, of a shape that broadcasts with the input's.
        margin: The distance from zero on the right side from which on nothing is lost.
        squared: The square of that.
        reduction: ``"none"``: one loss an element; ``"sum"``; ``"mean"``: the sum divided by the
            number of elements.

    Returns:
        The loss, of the promoted dtype: a scalar, or of the broadcast shape for ``"none"``. NaN for
        a mean over nothing.

    Raises:
        RuntimeError, ValueError: Shapes or options do not fit.
        TypeError: ``input`` or ``target`` is no tensor, or ``margin`` no number.
    """
    return call(HINGE_LOSS, (input, target, margin, squared, reduction))


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
    """Cross-entropy of two classes, where what is right already counts less, element by element.

    With ``p = sigmoid(inputs)`` and ``u = p * (1 - targets) + (1 - p) * targets``, the loss of an
    element is its binary cross-entropy times ``u ** gamma``, and times ``alpha`` for the positive
    class and ``1 - alpha`` for the negative one (Lin et al. 2017, arXiv 1708.02002). Signature and
    results are those of ``torchvision.ops.sigmoid_focal_loss``; torch has no such loss.

    Args:
        inputs: Logits, of any shape; float32, float64, bfloat16 or float16.
        targets: Probabilities of the positive class, as a rule 0.0 or 1.0, of the inputs' shape and
            dtype.
        alpha: The share of the positive class, 0.0 to 1.0; below 0 for no shares.
        gamma: From 0.0, which makes it a cross-entropy, up.
        reduction: ``"none"``: one loss an element; ``"sum"``; ``"mean"``: the sum divided by the
            number of elements that are not ignored.
        weight: One factor for each element, of a shape that broadcasts to the inputs'.
        ignore_index: The target of elements that count for nothing.

    Returns:
        The loss in nats, of the inputs' dtype: a scalar, or of the inputs' shape for ``"none"``.
        NaN for a mean over nothing.

    Raises:
        RuntimeError, ValueError: Shapes or options do not fit; the message names the argument, what
            was expected and what was got.
        TypeError: ``inputs`` or ``targets`` is no tensor, or ``alpha`` or ``gamma`` no number.
    """
    return call(
        SIGMOID_FOCAL_LOSS, (inputs, targets, alpha, gamma, reduction, weight, ignore_index)
    )


def rmse_loss(
    input: Tensor,
    target: Tensor,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Returns the square root of the mean squared error, in the target's own unit.

    torch has no such loss; in its terms::

        (mse_loss(input, target, reduction=reduction, weight=weight) + eps).sqrt()

    Args:
        input: Predictions, of any shape; float32, float64, bfloat16 or float16.
        target: What they are compared with, of a shape that broadcasts with the input's.
        reduction: Of the squares: ``"none"``, ``"sum"`` or ``"mean"``, see :func:`mse_loss`.
        weight: One factor for each element, of the input's shape.
        eps: Added before the root, whose gradient is NaN where nothing is lost and this is 0.

    Returns:
        The loss, of the promoted dtype: a scalar, or of the broadcast shape for ``"none"``. NaN for
        a mean over nothing.

    Raises:
        RuntimeError, ValueError: Shapes or options do not fit.
        TypeError: ``input`` or ``target`` is no tensor, or ``eps`` no number.
    """
    return call(RMSE_LOSS, (input, target, reduction, weight, eps))


def multilabel_soft_margin_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Binary cross-entropy with logits of each class, one mean over the classes a row.

    Args:
        input: Logits, of shape (C), (N, C) or (N, d1, ..., C); float32, float64, bfloat16 or
            float16.
        target: Probabilities of the classes, as a rule 0.0 or 1.0, of the input's shape.
        weight: One factor for each class, of shape (C), or for each element.
        size_average, reduce: Deprecated, see ``reduction``.
        reduction: ``"none"``: one loss a row; ``"sum"``; ``"mean"``: the sum divided by the number
            of rows.

    Returns:
        The loss in nats, of the promoted dtype: a scalar, or of the input's shape without its last
        dimension for ``"none"``. NaN for a mean over nothing.

    Raises:
        RuntimeError, ValueError: Shapes or options do not fit.
        TypeError: ``input`` or ``target`` is no tensor.
    """
    return call(
        MULTILABEL_SOFT_MARGIN_LOSS, (input, target, weight, size_average, reduce, reduction)
    )


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """Returns the larger of each element and zero; NaN passes.

    Args:
        input: Of any shape; float32, float64, bfloat16 or float16.
        inplace: Write the result over the input.

    Returns:
        A tensor of the input's shape and dtype; the input itself where ``inplace``.

    Raises:
        RuntimeError: ``inplace``, and the input is a leaf that requires grad, or overlaps itself.
        TypeError: ``input`` is no tensor.
    """
    return call(RELU, (input,), inplace)


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """Returns the elements above zero, and ``negative_slope`` times the others.

    Args:
        input: Of any shape; float32, float64, bfloat16 or float16.
        negative_slope: What the others are multiplied by.
        inplace: Write the result over the input.

    Returns:
        A tensor of the input's shape and dtype; the input itself where ``inplace``.

    Raises:
        RuntimeError: As :func:`relu`.
        TypeError: ``input`` is no tensor, or ``negative_slope`` no number.
    """
    return call(LEAKY_RELU, (input, negative_slope), inplace)


def tanh(input: Tensor) -> Tensor:
    """Returns the hyperbolic tangent, element by element.

    Args:
        input: Of any shape; float32, float64, bfloat16 or float16.

    Returns:
        A tensor of the input's shape and dtype, between -1.0 and 1.0.

    Raises:
        TypeError: ``input`` is no tensor.
    """
    return call(TANH, (input,))


def softcap(input: Tensor, cap: float = 30.0) -> Tensor:
    """``cap * tanh(input / cap)``: values between ``-cap`` and ``cap``, alike where they are small.

    As language models cap their logits (Gemma 2, arXiv 2408.00118); torch has no such function.

    Args:
        input: Any shape and strides; float32, float64, bfloat16 or float16.
        cap: More than 0.

    Returns:
        A tensor like ``input``.

    Raises:
        ValueError: ``cap`` is not more than 0.
        TypeError: ``input`` is no tensor, or ``cap`` no number.
    """
    return call(SOFTCAP, (input, cap))


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """``input * sigmoid(input)``, element by element; also known as swish.

    Args:
        input: Of any shape; float32, float64, bfloat16 or float16.
        inplace: Write the result over the input. Where a gradient follows it takes a copy of the
            input, in torch.

    Returns:
        A tensor of the input's shape and dtype; the input itself where ``inplace``.

    Raises:
        RuntimeError: As :func:`relu`.
        TypeError: ``input`` is no tensor.
    """
    return call(SILU, (input,), inplace)


def gelu(input: Tensor, *, approximate: Approximate = "none") -> Tensor:
    """``input`` times the share of the standard normal distribution below it, for each element.

    At infinity it is this product: inf of inf, NaN of -inf, with a gradient of NaN at both. oneDNN,
    which computes torch's on x86 in float32 and bfloat16 without approximation, returns NaN of inf,
    too, and inf from half of the largest number on; it takes small calls and those without a
    gradient.

    Args:
        input: Of any shape; float32, float64, bfloat16 or float16.
        approximate: ``"none"``, or ``"tanh"`` for the approximation
            ``input * (1 + tanh(sqrt(2 / pi) * (input + 0.044715 * input ** 3))) / 2``.

    Returns:
        A tensor of the input's shape and dtype.

    Raises:
        RuntimeError: ``approximate`` is neither.
        TypeError: ``input`` is no tensor.
    """
    checks.approximate(approximate)
    return call(GELU, (input, approximate))


def sigmoid(input: Tensor) -> Tensor:
    """``1 / (1 + exp(-input))``, element by element.

    Args:
        input: Of any shape; float32, float64, bfloat16 or float16.

    Returns:
        A tensor of the input's shape and dtype, between 0.0 and 1.0.

    Raises:
        TypeError: ``input`` is no tensor.
    """
    return call(SIGMOID, (input,))


def threshold(input: Tensor, threshold: float, value: float, inplace: bool = False) -> Tensor:
    """The elements above a threshold, and ``value`` in the place of the others; NaN passes.

    Args:
        input: Of any shape; float32, float64, bfloat16 or float16.
        threshold: What an element has to be above.
        value: What the others become.
        inplace: Write the result over the input.

    Returns:
        A tensor of the input's shape and dtype; the input itself where ``inplace``.

    Raises:
        RuntimeError: As :func:`relu`.
        TypeError: ``input`` is no tensor, or a number is none.
    """
    return call(THRESHOLD, (input, threshold, value), inplace)


def prelu(input: Tensor, weight: Tensor) -> Tensor:
    """The elements above zero, and the others times a slope that is learnt.

    Args:
        input: Of shape (N, C, ...), or any other beside one slope; float32, float64, bfloat16 or
            float16.
        weight: The slope of each channel, of shape (C), or a single one, of shape (1) or ();
            of the input's dtype.

    Returns:
        A tensor of the input's shape and dtype.

    Raises:
        RuntimeError: ``weight`` has another shape or dtype.
        TypeError: ``input`` or ``weight`` is no tensor.
    """
    return call(PRELU, (input, weight))


def relu6(input: Tensor, inplace: bool = False) -> Tensor:
    """Returns the elements between 0 and 6, and the nearer bound for others.

    Args:
        input: Of any shape; float32, float64, bfloat16 or float16.
        inplace: Write the result over the input.

    Returns:
        A tensor of the input's shape and dtype; the input itself where ``inplace``.

    Raises:
        RuntimeError: As :func:`relu`.
        TypeError: ``input`` is no tensor.
    """
    return call(RELU6, (input,), inplace)


def hardtanh(
    input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Tensor:
    """Returns the elements between two bounds, and the nearer bound for others.

    Args:
        input: Of any shape; float32, float64, bfloat16 or float16.
        min_val: The lower bound.
        max_val: The upper bound.
        inplace: Write the result over the input.

    Returns:
        A tensor of the input's shape and dtype; the input itself where ``inplace``.

    Raises:
        RuntimeError: As :func:`relu`.
        ValueError: ``min_val`` is above ``max_val``.
        TypeError: ``input`` is no tensor, or a number is none.
    """
    return call(HARDTANH, (input, min_val, max_val), inplace)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """``input / 6 + 1 / 2`` between -3 and 3, 0 below and 1 above.

    Args:
        input: Of any shape; float32, float64, bfloat16 or float16.
        inplace: Write the result over the input.

    Returns:
        A tensor of the input's shape and dtype; the input itself where ``inplace``.

    Raises:
        RuntimeError: As :func:`relu`.
        TypeError: ``input`` is no tensor.
    """
    return call(HARDSIGMOID, (input,), inplace)


def hardswish(input: Tensor, inplace: bool = False) -> Tensor:
    """``input`` times :func:`hardsigmoid` of it.

    Args:
        input: Of any shape; float32, float64, bfloat16 or float16.
        inplace: Write the result over the input.

    Returns:
        A tensor of the input's shape and dtype; the input itself where ``inplace``.

    Raises:
        RuntimeError: As :func:`relu`.
        TypeError: ``input`` is no tensor.
    """
    return call(HARDSWISH, (input,), inplace)


def hardshrink(input: Tensor, lambd: float = 0.5) -> Tensor:
    """Returns the elements beyond ``-lambd`` and ``lambd``, and 0 for those between.

    Args:
        input: Of any shape; float32, float64, bfloat16 or float16.
        lambd: 0 or more.

    Returns:
        A tensor of the input's shape and dtype.

    Raises:
        TypeError: ``input`` is no tensor, or a number is none.
    """
    return call(HARDSHRINK, (input, lambd))


def softshrink(input: Tensor, lambd: float = 0.5) -> Tensor:
    """Returns elements beyond ``-lambd`` and ``lambd``, nearer to 0 by ``lambd``; 0 between.

    Args:
        input: Of any shape; float32, float64, bfloat16 or float16.
        lambd: 0 or more.

    Returns:
        A tensor of the input's shape and dtype.

    Raises:
        RuntimeError: ``lambd`` is below 0.
        TypeError: ``input`` is no tensor, or a number is none.
    """
    return call(SOFTSHRINK, (input, lambd))


def elu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """Returns the elements above 0, and ``alpha * (exp(input) - 1)`` for others.

    Args:
        input: Of any shape; float32, float64, bfloat16 or float16.
        alpha: What the others approach, negated.
        inplace: Write the result over the input.

    Returns:
        A tensor of the input's shape and dtype; the input itself where ``inplace``.

    Raises:
        RuntimeError: As :func:`relu`.
        TypeError: ``input`` is no tensor, or a number is none.
    """
    return call(ELU, (input, alpha), inplace)


def selu(input: Tensor, inplace: bool = False) -> Tensor:
    """1.0507 times :func:`elu` with an ``alpha`` of 1.6733, which keep mean and variance.

    Args:
        input: Of any shape; float32, float64, bfloat16 or float16.
        inplace: Write the result over the input.

    Returns:
        A tensor of the input's shape and dtype; the input itself where ``inplace``.

    Raises:
        RuntimeError: As :func:`relu`.
        TypeError: ``input`` is no tensor.
    """
    return call(SELU, (input,), inplace)


def celu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """Returns the elements above 0, and ``alpha * (exp(input / alpha) - 1)`` for others.

    Args:
        input: Of any shape; float32, float64, bfloat16 or float16.
        alpha: What the others approach, negated; not 0.
        inplace: Write the result over the input.

    Returns:
        A tensor of the input's shape and dtype; the input itself where ``inplace``.

    Raises:
        RuntimeError: As :func:`relu`.
        TypeError: ``input`` is no tensor, or a number is none.
    """
    return call(CELU, (input, alpha), inplace)


def mish(input: Tensor, inplace: bool = False) -> Tensor:
    """``input * tanh(log(1 + exp(input)))``, element by element.

    Args:
        input: Of any shape; float32, float64, bfloat16 or float16.
        inplace: Write the result over the input.

    Returns:
        A tensor of the input's shape and dtype; the input itself where ``inplace``.

    Raises:
        RuntimeError: As :func:`relu`.
        TypeError: ``input`` is no tensor.
    """
    return call(MISH, (input,), inplace)


def softplus(input: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """``log(1 + exp(beta * input)) / beta``, element by element.

    Args:
        input: Of any shape; float32, float64, bfloat16 or float16.
        beta: How sharp the bend is.
        threshold: Where ``beta * input`` is above it, the result is ``input``.

    Returns:
        A tensor of the input's shape and dtype.

    Raises:
        TypeError: ``input`` is no tensor, or a number is none.
    """
    return call(SOFTPLUS, (input, beta, threshold))


def logsigmoid(input: Tensor) -> Tensor:
    """``-log(1 + exp(-input))``, element by element.

    Args:
        input: Of any shape; float32, float64, bfloat16 or float16.

    Returns:
        A tensor of the input's shape and dtype.

    Raises:
        TypeError: ``input`` is no tensor.
    """
    return call(LOGSIGMOID, (input,))


def softsign(input: Tensor) -> Tensor:
    """``input / (1 + abs(input))``, element by element.

    Args:
        input: Of any shape; float32, float64, bfloat16 or float16.

    Returns:
        A tensor of the input's shape and dtype.

    Raises:
        TypeError: ``input`` is no tensor.
    """
    return call(SOFTSIGN, (input,))


def tanhshrink(input: Tensor) -> Tensor:
    """``input - tanh(input)``, element by element.

    Args:
        input: Of any shape; float32, float64, bfloat16 or float16.

    Returns:
        A tensor of the input's shape and dtype.

    Raises:
        TypeError: ``input`` is no tensor.
    """
    return call(TANHSHRINK, (input,))


def glu(input: Tensor, dim: int = -1) -> Tensor:
    """The first half of a tensor times the :func:`sigmoid` of the second.

    Args:
        input: Its size along ``dim`` is even; float32, float64, bfloat16 or float16.
        dim: The dimension along which the two halves lie.

    Returns:
        A tensor with half the size along ``dim``, of the input's dtype.

    Raises:
        IndexError: The input has no such dimension.
        RuntimeError: The size along ``dim`` is odd, or the input has no dimension.
        TypeError: ``input`` is no tensor.
    """
    return call(GLU, (input, dim))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, the gated activation of most language models; not in torch.

    Backward reads both inputs, and nothing else is saved: ``silu(gate)`` is computed again.

    Args:
        gate, up: Tensors that broadcast; float32, float64, bfloat16 or float16.

    Returns:
        A tensor of the broadcast shape and of the dtype that the two have together.

    Raises:
        RuntimeError: The shapes do not broadcast.
        TypeError: ``gate`` is no tensor.
    """
    return call(SWIGLU, (gate, up))


def geglu(gate: Tensor, up: Tensor, approximate: Approximate = "none") -> Tensor:
    """``gelu(gate, approximate) * up``; not in torch.

    Backward reads both inputs, and nothing else is saved: ``gelu(gate)`` is computed again.

    Args:
        gate, up: Tensors that broadcast; float32, float64, bfloat16 or float16.
        approximate: As :func:`gelu`'s.

    Returns:
        A tensor of the broadcast shape and of the dtype that the two have together.

    Raises:
        RuntimeError: The shapes do not broadcast, or ``approximate`` is neither word.
        TypeError: ``gate`` is no tensor.
    """
    checks.approximate(approximate)
    return call(GEGLU, (gate, up, approximate))


def reglu(gate: Tensor, up: Tensor) -> Tensor:
    """``relu(gate) * up``; not in torch.

    Backward reads both inputs, and nothing else is saved: ``relu(gate)`` is computed again.

    Args:
        gate, up: Tensors that broadcast; float32, float64, bfloat16 or float16.

    Returns:
        A tensor of the broadcast shape and of the dtype that the two have together.

    Raises:
        RuntimeError: The shapes do not broadcast.
        TypeError: ``gate`` is no tensor.
    """
    return call(REGLU, (gate, up))


def softmax(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``exp(input)`` divided by its sum along ``dim``, without overflow.

    Args:
        input: Of any shape; float32, float64, bfloat16 or float16.
        dim: The dimension along which the results add up to one. To leave it out is deprecated.
        _stacklevel: torch's own, for that warning.
        dtype: What the input is converted to before.

    Returns:
        A contiguous tensor of the input's shape, between 0.0 and 1.0; NaN along ``dim`` where all
        is -inf or something inf.

    Raises:
        IndexError: The input has no such dimension.
        TypeError: ``input`` is no tensor, or ``dim`` no int.
    """
    return call(SOFTMAX, (input, dim, _stacklevel, dtype))


def log_softmax(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``input`` less its log-sum-exp along ``dim``: the logarithm of :func:`softmax`, exactly.

    Args:
        input: Of any shape; float32, float64, bfloat16 or float16.
        dim: The dimension along which probabilities add up to one. To leave it out is deprecated.
        _stacklevel: torch's own, for that warning.
        dtype: What the input is converted to before.

    Returns:
        A contiguous tensor of the input's shape, up to 0.0; NaN as :func:`softmax`.

    Raises:
        IndexError: The input has no such dimension.
        TypeError: ``input`` is no tensor, or ``dim`` no int.
    """
    return call(LOG_SOFTMAX, (input, dim, _stacklevel, dtype))
