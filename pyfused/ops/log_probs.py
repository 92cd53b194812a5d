"""Log-probabilities of class indices, entropies and log-sum-exps, of logits or of a linear layer.

The three are the first fields of the state of a row, one tensor, so that a call has one result and
one gradient; ``functional.py`` takes it apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfused import checks
from pyfused.backends import Backend, backend_of
from pyfused.layout import accumulate_dtype
from pyfused.ops import TORCH_OPS, vocab_parallel
from pyfused.ops.chunked import (
    StateOptions,
    gradient_of_logits,
    gradients_of,
    state_of,
)
from pyfused.ops.declaration import Arguments, Operator
from pyfused.ops.dispatch import is_compiled
from pyfused.ops.gradients import apply, differentiate, in_autocast_dtype
from pyfused.ops.row_state import results_of, state_of_logits
from pyfused.types import ClassRange, Gradients, LogProbsOptions


class _Values(NamedTuple):
    log_probability: Tensor
    entropy: Tensor | None = None
    log_sum_exp: Tensor | None = None


class LogProbs(_Values):
    """Results of each target: float32, or float64 of float64; 0 where the target is ignored.

    Attributes:
        log_probability: ``log p_target``, in nats; never above 0.
        entropy: ``-sum_c p_c log p_c``.
        log_sum_exp: ``log sum_c exp(logit_c)``.

    Raises:
        AttributeError: An attribute that was not asked for is read; as an item it is None.
    """

    @property
    def entropy(self) -> Tensor:
        return self._asked(1, "entropy: expected a call with return_entropy=True")

    @property
    def log_sum_exp(self) -> Tensor:
        return self._asked(2, "log_sum_exp: expected a call with return_lse=True")

    def _asked(self, index: int, message: str) -> Tensor:
        value: Tensor | None = self[index]
        if value is None:
            raise AttributeError(message)
        return value


def named(values: Tensor, return_entropy: bool, return_lse: bool) -> LogProbs:
    """Returns the results by name, of log-probabilities alone or of all three."""
    if not (return_entropy or return_lse):
        return LogProbs(values)
    # For unused results unbind's gradient makes plain zeros, which do not mix with DTensors.
    if vocab_parallel.is_dtensor(values):
        log_p, entropy, lse = values[0], values[1], values[2]
    else:
        log_p, entropy, lse = (values if values.shape[0] == 3 else values[:3]).unbind()
    return LogProbs(log_p, entropy if return_entropy else None, lse if return_lse else None)


# ---- of logits -----------------------------------------------------------------------------------


@dataclass(eq=False, kw_only=True, repr=False)
class LogProbsOfLogits(Operator):
    """Log-probabilities, entropies and log-sum-exps of the rows of logits."""

    def bind(self, *_: Any, **by_name: Any) -> Arguments:
        names = LogProbsOptions.__dataclass_fields__.keys() & by_name.keys()
        options = LogProbsOptions(**{name: by_name[name] for name in names})
        tensors: list[Any] = [by_name.get(operand.name) for operand in self.operands]
        if len(tensors) == 2:
            tensors[0] = checks.classes_at(1, "logits", tensors[0], by_name.get("dim"))
        return *tensors, options

    def plan(self, arguments: Arguments, inplace: bool) -> Callable[[Arguments], Tensor]:  # noqa: ARG002
        if self.local_of(arguments) is not None:
            return self._over_shards
        if is_compiled(arguments[0]):
            return self._compiled
        self.check_shapes(arguments)
        *tensors, _, options = arguments
        needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors]
        return LogProbsPlan(
            self,
            self.name,
            backend_of(tensors[0]),
            self.state_options(tensors, options),
            options,
            accumulate_dtype(tensors[0].dtype),
            needs,
        )

    def _over_shards(self, arguments: Arguments) -> Tensor:
        """Returns the results of DTensors, of which every process has some classes."""
        local = self.local_of(arguments)
        assert local is not None
        *tensors, options = local.arguments
        found = vocab_parallel.log_probs(tensors, options, local.shard)
        return local.whole(found)  # type: ignore[no-any-return]

    def _compiled(self, arguments: Arguments) -> Tensor:
        self.check(arguments)
        *tensors, target, options = arguments
        operator = getattr(TORCH_OPS, self.name)
        state: Tensor = operator(*tensors, target.to(torch.int64), *options.values())
        return results_of(state, options, accumulate_dtype(tensors[0].dtype))

    def local_of(self, arguments: Arguments) -> vocab_parallel.LocalShard | None:
        return vocab_parallel.local_of(self, arguments)

    def check(self, arguments: Arguments) -> None:
        """Raises for bad input; class indices are read only where that does not synchronise."""
        *tensors, target, options = arguments
        self.check_shapes(arguments)
        if not (is_compiled(tensors[0]) or backend_of(target).ASYNCHRONOUS):
            checks.class_indices(self.classes(tensors), target, options.ignore_index)

    def check_shapes(self, arguments: Arguments) -> None:
        checks.log_probs(*arguments)

    def classes(self, tensors: Sequence[Tensor]) -> int:
        return checks.classes_of(tensors[0])

    def strategy(self, input: Tensor) -> str:  # noqa: ARG002
        return "row by row"

    def state_options(self, tensors: Sequence[Any], options: LogProbsOptions) -> StateOptions:
        return StateOptions(
            options.rows,
            ClassRange(0, self.classes(tensors)),
            memory_budget=options.memory_budget,
            fixed_sizes=options.deterministic_rows,
        )

    def define(
        self,
        tensors: Sequence[Any],
        options: LogProbsOptions,
        needs: Sequence[bool],
        grad_output: Tensor,
    ) -> Gradients:
        """Returns the gradients in torch's own terms, themselves differentiable."""
        *differentiated, target = tensors

        def definition(*given: Tensor | None) -> Tensor:
            wide = (None if tensor is None else tensor.to(grad_output.dtype) for tensor in given)
            return self.reference(*wide, target, options)

        return differentiate(definition, differentiated, needs, grad_output)


@dataclass(eq=False)
class LogProbsPlan:
    """Computes the calls of one signature.

    Attributes:
        state_options: What the states are computed by.
        dtype: The dtype of the results.
        needs: The tensors that need a gradient.
    """

    op: LogProbsOfLogits
    name: str
    backend: Backend
    state_options: StateOptions
    options: LogProbsOptions
    dtype: torch.dtype
    needs: Sequence[bool]

    def __call__(self, arguments: Arguments) -> Tensor:
        *tensors, target, _ = arguments
        target = target if target.dtype is torch.int64 else target.to(torch.int64)
        classes = self.state_options.classes.total
        self.backend.check_class_indices(target, classes, self.options.ignore_index)
        if True in self.needs:
            results: Tensor = apply(self, *tensors, target)
            return results
        return self.forward(None, (*tensors, target))

    def forward(self, ctx: Any, tensors: Sequence[Any]) -> Tensor:
        options, kept = self.state_options, None
        if len(tensors) == 2:
            logits, target = tensors
            state = state_of_logits(self.backend, logits, target, options.rows, options.classes)
            state = state if target.dim() == 1 else state.view(-1, *target.shape)
        else:
            state, kept = state_of(tensors, options, keeps=ctx is not None)
        if ctx is not None:
            ctx.kept = kept
            ctx.save_for_backward(*tensors, state)
        return results_of(state, self.options, self.dtype)

    def backward(self, ctx: Any, grad_output: Tensor) -> Gradients:
        *tensors, state = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, None
        grad_results = grad_output.double()
        grad_results = grad_results.unsqueeze(0) if self.options.alone else grad_results
        options = self.state_options
        if len(tensors) == 2:
            logits, target = tensors
            given = self.backend, logits, target, options, state, grad_results
            return (gradient_of_logits(*given),)
        return gradients_of(tensors, options, self.needs, state, grad_results, kept)

    def define(self, ctx: Any, grad_output: Tensor) -> Gradients:
        tensors = ctx.saved_tensors[:-1]
        needs = self.needs[: len(tensors) - 1]
        return self.op.define(tensors, self.options, needs, grad_output.double())


# ---- of a linear layer ---------------------------------------------------------------------------


@dataclass(eq=False, kw_only=True, repr=False)
class LinearLogProbs(LogProbsOfLogits):
    """Log-probabilities, entropies and log-sum-exps of a linear layer's output.

    The logits of the first rows stay for the backward pass, which recomputes the others.
    """

    def plan(self, arguments: Arguments, inplace: bool) -> Callable[[Arguments], Tensor]:
        if not torch.is_autocast_enabled(arguments[-2].device.type):
            return super().plan(arguments, inplace)

        def run(arguments: Arguments) -> Tensor:
            *tensors, target, options = arguments
            count = 3 if is_compiled(target) else 1  # a custom operator checks what it is given
            without_autocast, cast = in_autocast_dtype(target.device.type, tensors[:count])
            given = *cast, *tensors[count:], target, options
            plan = super(LinearLogProbs, self).plan(given, inplace)
            with without_autocast:
                return plan(given)

        return run

    def check_shapes(self, arguments: Arguments) -> None:
        checks.linear_log_probs(*arguments)

    def classes(self, tensors: Sequence[Tensor]) -> int:
        return len(tensors[1])

    def strategy(self, input: Tensor) -> str:  # noqa: ARG002
        return "some logits at a time"
