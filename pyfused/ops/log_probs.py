"""Log-probabilities of targets, entropies and log-sum-exps, of logits or of a linear layer:

    log_probability = x[target] - lse,  entropy = -sum_c p_c log p_c,  lse = log sum_c exp(x_c)

These are the first fields of the state of a row. A call returns them as one tensor with one
gradient, and ``functional.py`` splits the tensor. With metrics, a call returns a tuple of this
tensor, is_top1 and the mean logit. The last two are computed from other fields and have no
gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfused import checks
from pyfused.backends import backend_of
from pyfused.dispatch.autograd import in_autocast_dtype, without_autocast
from pyfused.dispatch.operator import Options, Tensors
from pyfused.dispatch.plan import Plan
from pyfused.dispatch.run import is_compiled
from pyfused.layout import accumulate_dtype
from pyfused.ops.collectives import LocalShard
from pyfused.ops.row_state import state_metrics, state_results
from pyfused.ops.shards import ShardedOperator, class_range, is_dtensor, state_plan
from pyfused.types import (
    RESULTS,
    SMOOTHING_FIELDS,
    STATE_FIELDS,
    LogProbsOptions,
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


class _Results:
    """Raises if a result is read that the call did not return."""

    @property
    def entropy(self) -> Tensor:
        return self._returned(1, "entropy: expected a call with return_entropy=True")

    @property
    def log_sum_exp(self) -> Tensor:
        return self._returned(2, "log_sum_exp: expected a call with return_lse=True")

    def _returned(self: Any, index: int, message: str) -> Tensor:
        value: Tensor | None = self[index]
        if value is None:
            raise AttributeError(message)
        return value


class LogProbs(_Results, _Values):
    """Results of each target: float32, or float64 for float64 inputs; 0 for ignored targets.

    Attributes:
        log_probability: ``log p_target``, in nats, at most 0.
        entropy: ``-sum_c p_c log p_c``.
        log_sum_exp: ``log sum_c exp(logit_c)``; NaN if a logit is inf.

    Raises:
        AttributeError: The attribute was not requested in the call; its item is None.
    """

    @property
    def is_top1(self) -> Tensor:
        raise AttributeError("is_top1: expected a call with return_metrics=True")

    @property
    def mean_logit(self) -> Tensor:
        raise AttributeError("mean_logit: expected a call with return_metrics=True")


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
    elif is_dtensor(values):
        # The backward of unbind makes plain zeros for unused results; DTensors reject these.
        log_p, entropy, lse = values[0], values[1], values[2]
    else:
        log_p, entropy, lse = values.unbind()
    entropy, lse = entropy if return_entropy else None, lse if return_lse else None
    if metrics:
        return LogProbsWithMetrics(log_p, entropy, lse, *metrics)
    return LogProbs(log_p, entropy, lse)


# ---- the operators -------------------------------------------------------------------------------


@dataclass(eq=False, kw_only=True, repr=False)
class LogProbsOperator(ShardedOperator):
    """Log-probabilities, entropies and log-sum-exps of logits, or of a linear layer's output."""

    check_arguments: Callable[..., None]
    strategy = "row by row"
    has_state = True  # the result of the custom operator

    def dynamic_dims(self, input: Tensor, options: Options) -> int:  # noqa: ARG002
        return input.dim() - 1 if self.is_linear else int(input.dim() > 1)

    def plan(
        self,
        tensors: Tensors,
        options: Options,
        shard: LocalShard | None = None,
        results: int | None = None,
    ) -> Plan:
        """Checks a call, and returns the plan of its signature.

        Args:
            shard: The classes of this process, for arguments that have been checked.
            results: As in `state_plan`; None for the results that the options select.
        """
        if shard is None:
            self.check_arguments(*tensors, options)
        *layer, target = tensors
        if self.is_linear:
            layer[0] = in_autocast_dtype(layer[0])
        classes, ignore_index = class_range(layer, shard), options.ignore_index
        check = backend_of(layer[0]).check_class_indices
        results = _count(options) if results is None else results

        def arrange(tensors: Tensors, _: Options) -> Tensors:
            *tensors, target = tensors
            if self.is_linear:
                tensors[0] = in_autocast_dtype(tensors[0])
            target = target if target.dtype is torch.int64 else target.to(torch.int64)
            check(target, classes.total, ignore_index)
            return *tensors, target, target, None

        def finish(outputs: tuple[Tensor, Tensor], tensors: Tensors) -> Any:
            return _with_metrics(*outputs, tensors[-1], ignore_index, classes.total)

        return state_plan(
            self.name,
            (*layer, target),
            options,
            _fields(options),
            shard,
            results=results,
            arrange=arrange,
            finish=finish if results and options.with_metrics else None,
        )

    def compiled(self, tensors: Tensors, options: Options) -> Any:
        *layer, target = tensors
        if self.is_linear:  # all tensors are cast, as custom operators check dtypes
            layer = [in_autocast_dtype(x) for x in layer]
        with without_autocast(target.device.type):
            self.check((*layer, target), options)
            state: Tensor = self.custom_operator((*layer, target.to(torch.int64)), options)
            results = state_results(state, _count(options)).to(accumulate_dtype(layer[0].dtype))
            if not options.with_metrics:
                return results
            classes = class_range(layer).total
            return _with_metrics(results, state, target, options.ignore_index, classes)

    def compiled_plan(self, tensors: Tensors, options: Options) -> Plan:
        return self.plan(tensors, options, results=0)

    def saved(self, tensors: Tensors, state: Any) -> Tensors:
        return *tensors, state, None  # without the logits of the forward pass

    def fake(self, tensors: Tensors, options: Options) -> Tensor:
        """Returns an empty tensor like the state that the custom operator returns."""
        target = tensors[-1]
        empty: Tensor = target.new_empty((_fields(options), *target.shape), dtype=torch.float64)
        return empty

    def compute_shard(self, tensors: Tensors, options: Options, shard: LocalShard) -> Any:
        return self.plan(tensors, options, shard)(tensors, options)

    def check(self, tensors: Tensors, options: Options) -> None:
        """Raises for invalid arguments; class indices are not read if that synchronises."""
        *layer, target = tensors
        self.check_tensors(tensors)
        self.check_arguments(*tensors, options)
        if not (is_compiled(layer[0]) or backend_of(target).ASYNCHRONOUS):
            checks.class_indices(class_range(layer).total, target, options.ignore_index)

    def check_shapes(self, tensors: Tensors, options: Options, classes: int) -> None:
        if self.is_linear:
            self.check_arguments(*tensors, options, classes=classes)
        else:
            super().check_shapes(tensors, options, classes)


def _fields(options: LogProbsOptions) -> int:
    """Returns the number of fields of the state."""
    return SMOOTHING_FIELDS if options.with_metrics else STATE_FIELDS


def _count(options: LogProbsOptions) -> int:
    """Returns the number of results that a call returns."""
    return 1 if options.alone else len(RESULTS)


def _with_metrics(
    results: Tensor, state: Tensor, target: Tensor, ignore_index: int, classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    is_top1, mean_logit = state_metrics(state, target, ignore_index, classes)
    return results, is_top1, mean_logit.to(results.dtype)
