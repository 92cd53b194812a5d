"""Log-probabilities of targets, entropies and log-sum-exps, of logits or of a linear layer:

    log_probability = x[target] - lse,  entropy = -sum_c p_c log p_c,  lse = log sum_c exp(x_c)

These are the first fields of the state of a row. A call returns them as one tensor with one
gradient, and ``functional.py`` splits the tensor. With metrics, a call returns a tuple of this
tensor, is_top1 and the mean logit. The last two are computed from other fields and have no
gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from pyfused.dispatch.operator import Needs, Options, Tensors
from pyfused.ops.head_loop import HeadLoop
from pyfused.ops.row_sources import class_range
from pyfused.ops.rows import RowLoss, RowOperator, StatePass
from pyfused.types import (
    INDEX,
    LOG_P,
    PIVOT,
    RESULTS,
    SMOOTH,
    SMOOTHING_FIELDS,
    STATE_FIELDS,
    RowOptions,
)


class LogProbs(NamedTuple):
    """Results of each target: float32, or float64 for float64 inputs; 0 for ignored targets.

    Items that the call did not request are None.

    Attributes:
        log_probability: ``log p_target``, in nats, at most 0.
        entropy: ``-sum_c p_c log p_c``, with ``return_entropy``.
        log_sum_exp: ``log sum_c exp(logit_c)``, with ``return_lse``; NaN if a logit is inf.
        is_top1: Whether the target is the first class with the largest logit, with
            ``return_metrics``; False for ignored targets. It has no gradient.
        mean_logit: The mean of the logits of all classes, after softcap and temperature, with
            ``return_metrics``. It has no gradient.
    """

    # Not `Tensor | None`: a caller knows which items the call has requested.
    log_probability: Tensor
    entropy: Tensor = None  # type: ignore[assignment]
    log_sum_exp: Tensor = None  # type: ignore[assignment]
    is_top1: Tensor = None  # type: ignore[assignment]
    mean_logit: Tensor = None  # type: ignore[assignment]


def named(
    results: Any, alone: bool, return_entropy: bool, return_lse: bool, return_metrics: bool
) -> LogProbs:
    """Names the results of a call.

    Args:
        alone: Whether the results are log-probabilities without entropy and log-sum-exp.
    """
    values, *metrics = results if return_metrics else (results,)
    log_p, entropy, lse = values, None, None
    if not alone:  # views that unbind returns cannot be changed in place
        log_p, entropy, lse = [x.clone() for x in values.unbind()]
    requested: Any = entropy if return_entropy else None, lse if return_lse else None
    return LogProbs(log_p, *requested, *metrics)


# ---- the operators -------------------------------------------------------------------------------


class LogProbsLoss(RowLoss):
    """Log-probabilities, entropies and log-sum-exps from states of rows; see `rows.StatePass`.

    The tensors of a call are the logits, or a layer's input, weight and bias; and the target.
    """

    def fields(self, options: Options) -> int:
        return SMOOTHING_FIELDS if options.with_metrics else STATE_FIELDS

    def inputs(
        self, tensors: Tensors, options: Options, _all_rows: bool
    ) -> tuple[Tensor, None, RowOptions]:
        row_options = RowOptions(options.softcap, 1 / options.temperature, options.ignore_index)
        return tensors[-1], None, row_options

    def result_from(self, state: Tensor, _: Tensors, options: Options, _classes: int) -> Tensor:
        return state[LOG_P] if options.alone else state[: len(RESULTS)]

    def grad_results(
        self, _state: Tensor, _: Tensors, _options: Options, _classes: int, grad_output: Tensor
    ) -> Tensor:
        return grad_output

    def fake_shapes(self, inputs: Tensors, options: Options) -> tuple[Sequence[Any], Sequence[Any]]:
        rows = inputs[-1].shape
        result = rows if options.alone else (len(RESULTS), *rows)
        return result, (self.fields(options), *rows)

    def finish(self, output: Any, inputs: Tensors, options: Options, _: Sequence[int]) -> Any:
        if not options.with_metrics:
            return output
        (values, state), (*layer, target) = output, inputs
        state, classes = state.detach(), class_range(layer).total
        valid = target != options.ignore_index
        mean = state[PIVOT].nan_to_num(0, 0, 0) + state[SMOOTH] / classes
        return values, (state[INDEX] == target) & valid, mean.where(valid, 0).to(values.dtype)


def log_probs_pass(op: RowOperator, inputs: Tensors, options: Options, needs: Needs) -> StatePass:
    results, loop = 1 if options.alone else len(RESULTS), None
    if op.is_linear:
        sizes = op.head_sizes(inputs, options, inputs[0].dtype)
        loop = HeadLoop(sizes.backend, sizes.dtype, sizes.state_blocks, needs)
    return StatePass(op, results=results, loop=loop, keeps_logits=True)
