"""Log-probabilities of targets, entropies and log-sum-exps, of logits or of a linear layer:

    log_probability = x[target] - lse,  entropy = -sum_c p_c log p_c,  lse = log sum_c exp(x_c)

These are the first fields of the state of a row. A call returns them as one tensor with one
gradient, and ``functional.py`` splits the tensor. With metrics, a call returns a tuple of this
tensor, is_top1 and the mean logit. The last two are computed from other fields and have no
gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from pyfused import checks
from pyfused.backends import backend_of
from pyfused.dispatch.autograd import in_autocast_dtype
from pyfused.dispatch.operator import FIRST_DIM, LEADING_DIMS, Operand, Options, Tensors
from pyfused.ops.chunk_sizes import state_block_size
from pyfused.ops.collectives import LocalShard
from pyfused.ops.heads import HeadRows
from pyfused.ops.rows import LogitRows, Passes, Planned, StateLoss
from pyfused.ops.shards import ShardedRows, class_range, sharded_results
from pyfused.types import (
    INDEX,
    LOG_P,
    RESULTS,
    SMOOTH,
    SMOOTHING_FIELDS,
    STATE_FIELDS,
    Head,
)


class _Values(NamedTuple):
    log_probability: Tensor
    entropy: Tensor | None = None
    log_sum_exp: Tensor | None = None


class _ValuesWithMetrics(NamedTuple):
    log_probability: Tensor
    entropy: Tensor | None
    log_sum_exp: Tensor | None
    is_top1: Tensor
    mean_logit: Tensor


def _result(index: int, name: str, option: str) -> Any:
    """Returns a property that raises if the call did not return this result."""

    def value(results: tuple[Tensor | None, ...]) -> Tensor:
        found = results[index] if index < len(results) else None
        if found is None:
            raise AttributeError(f"{name}: expected a call with {option}=True")
        return found

    return property(value)


class _Results:
    entropy: Tensor = _result(1, "entropy", "return_entropy")
    log_sum_exp: Tensor = _result(2, "log_sum_exp", "return_lse")
    is_top1: Tensor = _result(3, "is_top1", "return_metrics")
    mean_logit: Tensor = _result(4, "mean_logit", "return_metrics")


class LogProbs(_Results, _Values):
    """Results of each target: float32, or float64 for float64 inputs; 0 for ignored targets.

    Attributes:
        log_probability: ``log p_target``, in nats, at most 0.
        entropy: ``-sum_c p_c log p_c``.
        log_sum_exp: ``log sum_c exp(logit_c)``; NaN if a logit is inf.

    Raises:
        AttributeError: The attribute was not requested in the call; its item is None.
    """


class LogProbsWithMetrics(_Results, _ValuesWithMetrics):
    """The results of `LogProbs`, followed by two metrics without gradients.

    Attributes:
        is_top1: Whether the target is the first class with the largest logit; False for ignored
            targets.
        mean_logit: The mean of the logits of all classes, after softcap and temperature.
    """


def named(
    results: Any, alone: bool, return_entropy: bool, return_lse: bool, return_metrics: bool
) -> LogProbs | LogProbsWithMetrics:
    """Names the results of a call.

    Args:
        alone: Whether the results are log-probabilities without entropy and log-sum-exp.
    """
    values, *metrics = results if return_metrics else (results,)
    if alone:
        log_p, entropy, lse = values, None, None
    else:
        # Views that unbind returns cannot be changed in place.
        log_p, entropy, lse = [x.clone() for x in values.unbind()]
    entropy, lse = entropy if return_entropy else None, lse if return_lse else None
    if metrics:
        return LogProbsWithMetrics(log_p, entropy, lse, *metrics)
    return LogProbs(log_p, entropy, lse)


# ---- the operators -------------------------------------------------------------------------------


@dataclass(eq=False, kw_only=True, repr=False)
class LogProbsOperator(StateLoss):
    """Log-probabilities, entropies and log-sum-exps of logits, or of a linear layer's output."""

    factors: ClassVar[tuple[Operand, ...]] = ()
    strategy = "row by row"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.dynamic = LEADING_DIMS if self.is_linear else FIRST_DIM

    def arrangement(self, call: Planned) -> Any:
        tensors, _, shard, *_ = call
        total = class_range(tensors[:-1], shard).total
        check = None if is_dynamo_compiling() else backend_of(tensors[0]).check_class_indices
        casts = tensors[0].dtype is not self.input_dtype(tensors)

        def arrange(tensors: Tensors, options: Options) -> Tensors:
            input, *parameters, target = tensors
            input = in_autocast_dtype(input) if casts else input
            target = target if target.dtype is torch.int64 else target.to(torch.int64)
            if check is not None:
                check(target, total, options.ignore_index)
            return input, *parameters, target

        return arrange

    def passes(self, call: Planned) -> Passes:
        tensors, options, shard, needs, _ = call
        *layer, target = tensors
        backend, classes = backend_of(target), class_range(layer, shard)
        source: Any = LogitRows(backend, classes)
        if self.is_linear:
            head = Head._make((in_autocast_dtype(layer[0]), *layer[1:], target, None))
            dtype = self.product_dtype(tensors)
            size = state_block_size(head, dtype, options.memory_budget, backend)
            source = HeadRows(backend, head, dtype, classes, size, needs)
        if shard is not None:
            source = ShardedRows(source, shard, layer, True, needs)
        return self.state_passes(source, call, 1 if options.alone else len(RESULTS))

    def state_fields(self, options: Options) -> int:
        return SMOOTHING_FIELDS if options.with_metrics else STATE_FIELDS

    def of_state(self, state: Tensor, _: Tensors, options: Options, _classes: int) -> Tensor:
        return state[LOG_P] if options.alone else state[: len(RESULTS)]

    def define(
        self,
        tensors: Tensors,
        options: Options,
        shard: LocalShard | None,
        state: Tensor | None,
    ) -> Tensor:
        if shard is None or state is None:
            result: Tensor = self.torch(*tensors, options._replace(with_metrics=False))
            return result
        results = sharded_results((*tensors, None), options, shard, state)
        return results[LOG_P] if options.alone else results[: len(RESULTS)]

    def loss_shape(self, tensors: Tensors) -> tuple[int, ...]:
        return tensors[-1].shape  # type: ignore[no-any-return]

    def fake(self, tensors: Tensors, options: Options) -> Tensor:
        shape = self.loss_shape(tensors) if options.alone else (len(RESULTS), *tensors[-1].shape)
        empty: Tensor = tensors[0].new_empty(shape, dtype=self.loss_dtype(tensors, options))
        return empty

    def check(self, tensors: Tensors, options: Options) -> None:
        """Raises for invalid arguments; class indices are not read if that synchronises."""
        super().check(tensors, options)
        *layer, target = tensors
        if not backend_of(target).ASYNCHRONOUS:
            checks.class_indices(class_range(layer).total, target, options.ignore_index)

    def finish(self, call: Planned) -> Any:
        tensors, options, shard, *_ = call
        if not options.with_metrics:
            return None
        ignore_index, classes = options.ignore_index, class_range(tensors[:-1], shard).total

        def finish(results: Any, tensors: Tensors) -> tuple[Tensor, Tensor, Tensor]:
            values, state = results
            target, state = tensors[-1], state.detach()
            is_top1 = (state[INDEX] == target) & (target != ignore_index)
            return values, is_top1, (state[SMOOTH] / classes).to(values.dtype)

        return finish
