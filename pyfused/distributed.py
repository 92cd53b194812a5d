"""Cross-entropy over a vocabulary that is shared out among processes, some classes each.

No logits are gathered. A row takes three numbers of communication: the largest of the processes'
log-sum-exps, and the sums of their exponentials and of q_c x_c. The gradient of logits
takes none. Metrics take five more numbers of each process.

With ``create_graph=True`` gradients are computed in torch's terms, from all logits of a process in
float64, and can be differentiated any number of times. Each of these passes communicates, so every
process of the group takes part.

The functions of :mod:`pyfused.functional` go this way by themselves with DTensors of logits, or of
a layer's weight and bias, that are sharded by classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from pyfused import checks
from pyfused.ops import vocab_parallel
from pyfused.ops.log_probs import LogProbs, named
from pyfused.ops.metrics import Metrics
from pyfused.types import CrossEntropyOptions, FusedOptions, HeadOptions, LogProbsOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "vocab_parallel_cross_entropy",
    "vocab_parallel_cross_entropy_with_metrics",
    "vocab_parallel_linear_cross_entropy",
    "vocab_parallel_linear_cross_entropy_with_metrics",
    "vocab_parallel_linear_log_probs",
    "vocab_parallel_log_probs",
]


def vocab_parallel_cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    vocab_start: int,
    vocab_size: int | None = None,
    group: Any = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    **options: Unpack[FusedOptions],
) -> Tensor:
    """:func:`pyfused.functional.cross_entropy` of logits of which each process has some classes.

    Every process of the group calls it, with its own classes and the same targets, and has the loss
    of all. Its gradient is that of its own logits.

    Args:
        input: Logits of this process' classes, of shape (N, C_own) or (N, C_own, d1, ..., dk). The
            shares may differ.
        target: Class indices in [0, C) or ``ignore_index``, of shape (N) or (N, d1, ..., dk).
        vocab_start: The first of this process' classes among all.
        vocab_size: C, the number of all classes. None adds up the shares, with a number more of
            communication.
        group: A process group of :mod:`torch.distributed`; None for all processes.
        weight: One factor for each of all classes, of shape (C).
        ignore_index, reduction, label_smoothing: As in :func:`pyfused.functional.cross_entropy`.
        options: Its other keywords, but for ``gamma`` and ``inplace``.

    Returns:
        The loss in nats, the same in every process.

    Raises:
        IndexError: A class index is out of range.
        ValueError: The share of classes does not lie within all of them, or an option does not fit.
        RuntimeError: Shapes or dtypes do not fit, or no kernel takes such tensors.
    """
    checks.keywords("vocab_parallel_cross_entropy", options)
    given = CrossEntropyOptions(ignore_index, reduction, label_smoothing, **options)
    shard = _shard_of_logits("input", input, vocab_start, vocab_size, group)
    loss: Tensor = vocab_parallel.cross_entropy((input, target), weight, given, shard)
    return loss


def vocab_parallel_cross_entropy_with_metrics(
    input: Tensor,
    target: Tensor,
    *,
    vocab_start: int,
    vocab_size: int | None = None,
    group: Any = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    **options: Unpack[FusedOptions],
) -> tuple[Tensor, Metrics]:
    """:func:`vocab_parallel_cross_entropy`, and metrics of each target from the same pass.

    Args:
        input, target, vocab_start, vocab_size, group, weight: As in
            :func:`vocab_parallel_cross_entropy`.
        ignore_index, reduction, label_smoothing, options: Likewise.

    Returns:
        As :func:`pyfused.functional.cross_entropy_with_metrics` of all classes: the loss, and the
        :class:`~pyfused.ops.metrics.Metrics`, whose bits are the same in every process.

    Raises:
        IndexError, RuntimeError, ValueError: As in :func:`vocab_parallel_cross_entropy`.
    """
    checks.keywords("vocab_parallel_cross_entropy_with_metrics", options)
    given = CrossEntropyOptions(
        ignore_index, reduction, label_smoothing, with_metrics=True, **options
    )
    shard = _shard_of_logits("input", input, vocab_start, vocab_size, group)
    found: Any = vocab_parallel.cross_entropy((input, target), weight, given, shard)
    return found  # type: ignore[no-any-return]


def vocab_parallel_linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    vocab_start: int,
    vocab_size: int | None = None,
    group: Any = None,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    memory_budget: int | None = None,
    softcap: float | None = None,
    **options: Unpack[FusedOptions],
) -> Tensor:
    """:func:`pyfused.functional.linear_cross_entropy` with some rows of the weight a process.

    Every process of the group calls it with the same input and targets. The input's gradient is
    added up over the processes, so that each has all of it.

    Args:
        input: (N, D).
        linear_weight: The weight of this process' classes, of shape (C_own, D).
        linear_bias: Their bias, of shape (C_own), or None.
        memory_budget, softcap: As in :func:`pyfused.functional.linear_cross_entropy`.
        target, vocab_start, vocab_size, group, weight: As in :func:`vocab_parallel_cross_entropy`.
        ignore_index, reduction, label_smoothing, options: Likewise.

    Returns:
        The loss in nats, the same in every process.

    Raises:
        IndexError, RuntimeError, ValueError: As in :func:`vocab_parallel_cross_entropy`.
    """
    checks.keywords("vocab_parallel_linear_cross_entropy", options)
    given = HeadOptions(
        ignore_index,
        reduction,
        label_smoothing,
        softcap=softcap,
        memory_budget=memory_budget,
        **options,
    )
    shard = _shard_of_layer(linear_weight, vocab_start, vocab_size, group)
    tensors = input, linear_weight, linear_bias, target
    loss: Tensor = vocab_parallel.cross_entropy(tensors, weight, given, shard)
    return loss


def vocab_parallel_linear_cross_entropy_with_metrics(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    vocab_start: int,
    vocab_size: int | None = None,
    group: Any = None,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    memory_budget: int | None = None,
    softcap: float | None = None,
    **options: Unpack[FusedOptions],
) -> tuple[Tensor, Metrics]:
    """:func:`vocab_parallel_linear_cross_entropy`, and metrics of each target from the same pass.

    Args:
        input, linear_weight, target, vocab_start, vocab_size, group, linear_bias, weight: As in
            :func:`vocab_parallel_linear_cross_entropy`.
        ignore_index, reduction, label_smoothing, memory_budget, softcap, options: Likewise.

    Returns:
        As :func:`vocab_parallel_cross_entropy_with_metrics`, of the layer's capped output.

    Raises:
        IndexError, RuntimeError, ValueError: As in :func:`vocab_parallel_cross_entropy`.
    """
    checks.keywords("vocab_parallel_linear_cross_entropy_with_metrics", options)
    given = HeadOptions(
        ignore_index,
        reduction,
        label_smoothing,
        with_metrics=True,
        softcap=softcap,
        memory_budget=memory_budget,
        **options,
    )
    shard = _shard_of_layer(linear_weight, vocab_start, vocab_size, group)
    tensors = input, linear_weight, linear_bias, target
    found: Any = vocab_parallel.cross_entropy(tensors, weight, given, shard)
    return found  # type: ignore[no-any-return]


def vocab_parallel_log_probs(
    logits: Tensor,
    target: Tensor,
    *,
    vocab_start: int,
    vocab_size: int | None = None,
    group: Any = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    temperature: float = 1.0,
    return_entropy: bool = False,
    return_lse: bool = False,
) -> LogProbs:
    """:func:`pyfused.functional.log_probs` of logits of which each process has some classes.

    A row takes four numbers of communication.

    Args:
        logits: As the input of :func:`vocab_parallel_cross_entropy`.
        target, vocab_start, vocab_size, group: Likewise.
        ignore_index, softcap, temperature: As in :func:`pyfused.functional.log_probs`.
        return_entropy, return_lse: Likewise.

    Returns:
        A :class:`~pyfused.ops.log_probs.LogProbs`, the same in every process.

    Raises:
        IndexError, RuntimeError, ValueError: As in :func:`vocab_parallel_cross_entropy`.
    """
    shard = _shard_of_logits("logits", logits, vocab_start, vocab_size, group)
    options = LogProbsOptions(ignore_index, softcap, temperature)
    values = vocab_parallel.log_probs((logits, target), options, shard)
    return named(values, return_entropy, return_lse)


def vocab_parallel_linear_log_probs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    vocab_start: int,
    vocab_size: int | None = None,
    group: Any = None,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    temperature: float = 1.0,
    return_entropy: bool = False,
    return_lse: bool = False,
    memory_budget: int | None = None,
    deterministic_rows: bool = False,
) -> LogProbs:
    """:func:`pyfused.functional.linear_log_probs` with some rows of the weight a process.

    Args:
        input, linear_weight, linear_bias: As in :func:`vocab_parallel_linear_cross_entropy`.
        target, vocab_start, vocab_size, group: As in :func:`vocab_parallel_cross_entropy`.
        ignore_index, softcap, temperature: As in :func:`pyfused.functional.linear_log_probs`.
        return_entropy, return_lse, memory_budget, deterministic_rows: Likewise.

    Returns:
        A :class:`~pyfused.ops.log_probs.LogProbs`, the same in every process.

    Raises:
        IndexError, RuntimeError, ValueError: As in :func:`vocab_parallel_cross_entropy`.
    """
    shard = _shard_of_layer(linear_weight, vocab_start, vocab_size, group)
    options = LogProbsOptions(ignore_index, softcap, temperature, memory_budget, deterministic_rows)
    tensors = input, linear_weight, linear_bias, target
    values = vocab_parallel.log_probs(tensors, options, shard)
    return named(values, return_entropy, return_lse)


def _shard_of_logits(
    name: str, logits: Tensor, first: int, classes: int | None, group: Any
) -> vocab_parallel.Shard:
    checks.tensor(name, logits)
    if logits.dim() < 2:
        raise RuntimeError(f"{name}: expected shape (N, C, ...), got {tuple(logits.shape)}")
    return vocab_parallel.shard_of(group, first, classes, logits.shape[1], logits.device)


def _shard_of_layer(
    linear_weight: Tensor, first: int, classes: int | None, group: Any
) -> vocab_parallel.Shard:
    checks.tensor("linear_weight", linear_weight)
    return vocab_parallel.shard_of(group, first, classes, len(linear_weight), linear_weight.device)
