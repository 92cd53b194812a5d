"""Cross-entropy of logits, with the options that torch lacks; `row_state.py` has the equation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from pyfused import checks
from pyfused.backends import backend_of
from pyfused.dispatch.operator import FACTORS, REDUCTIONS, Options, Tensors, grad_enabled
from pyfused.dispatch.originals import F
from pyfused.dispatch.plan import Forward, Plan
from pyfused.dispatch.reasons import SMALL
from pyfused.dispatch.run import fall_back, is_compiled
from pyfused.layout import accumulate_dtype, common_dtype, loss_shape
from pyfused.ops import definitions, metrics, shards
from pyfused.ops.class_loss import ClassLoss
from pyfused.ops.collectives import LocalShard
from pyfused.ops.row_state import metrics_state
from pyfused.ops.shards import ShardedOperator
from pyfused.torch_internals import built_in
from pyfused.types import CrossEntropyOptions

UINT8_TARGET = "target has dtype torch.uint8, which torch does not support here"


@dataclass(eq=False, kw_only=True, repr=False)
class CrossEntropy(ClassLoss, ShardedOperator):
    """Cross-entropy of logits and class indices, or probabilities of the classes."""

    factors = FACTORS

    def __post_init__(self) -> None:
        super().__post_init__()
        self.fast = self.compute_small
        self.built_in_loss = built_in("cross_entropy_loss", F.cross_entropy)

    def compute_small(
        self,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        token_weight: Tensor | None,
        denominator: Tensor | None,
        options: CrossEntropyOptions,
    ) -> Any:
        """Returns the result of a small call: torch's, unless options that torch lacks are set."""
        number = REDUCTIONS.get(options.reduction)
        if options.inplace:
            prepare_inplace(input)
        if (
            not token_weight is denominator is None
            or not options.is_plain()
            or number is None
            or type(target) is not Tensor
        ):
            tensors = input, target, weight, token_weight, denominator
            return fall_back(self, SMALL, tensors, options)
        smoothing = options.label_smoothing
        return self.built_in_loss(input, target, weight, number, options.ignore_index, smoothing)

    def definition_loss(self, input: Tensor, target: Tensor, *others: Any) -> Tensor:
        *tensors, options = others
        if options.is_plain():  # the definition of other options masks ignored rows itself
            input = definitions.without_ignored(input, target, options.ignore_index)
        loss: Tensor = self.torch(input, target, *tensors, options._replace(with_metrics=False))
        return loss

    def plan(self, tensors: Tensors, options: Options) -> Any:
        if options.softcap is not None:
            self.check_arguments(*tensors, options)
            plan: Any = shards.cross_entropy_plan(tensors[:2], options, None)
        else:
            plan = super().plan(tensors, options)
            plan = self._with_metrics(plan, tensors[0], options) if options.with_metrics else plan
        if not options.inplace:
            return plan
        arranged = plan.arrange

        def arrange(tensors: Tensors, options: Options) -> Tensors:
            prepare_inplace(tensors[0])
            return tensors if arranged is None else arranged(tensors, options)

        return replace(plan, arrange=arrange)

    def _with_metrics(self, plan: Plan, input: Any, options: CrossEntropyOptions) -> Plan:
        """Returns the plan with the state of rows as a second output, from which metrics follow."""
        dtype = accumulate_dtype(input.dtype)

        def forward(tensors: Tensors, options: Options) -> Forward:
            state = metrics_state(plan.backend, tensors[0], tensors[1], options)
            loss, saved, gradients = plan.forward(tensors, options)
            return (loss, state), saved, gradients

        def finish(results: Any, tensors: Tensors) -> tuple[Tensor, metrics.Metrics]:
            (loss, state), target = results, tensors[1]
            if not target.is_floating_point():  # for probabilities it would copy the logits
                _, target, _ = self.arranged(tensors[:3])
            return loss, metrics.of_state(state, target, options.ignore_index, dtype)

        return replace(plan, forward=forward, finish=finish)

    def arrange_of(self, tensors: Tensors) -> Any:
        return self.kernel_tensors if any(x is not None for x in tensors[3:]) else None

    def kernel_tensors(self, tensors: Tensors, _: Options = ()) -> Tensors:
        return *tensors[:3], *checks.factors(*tensors[3:])

    def compute_shard(self, tensors: Tensors, options: Options, shard: LocalShard) -> Any:
        return shards.cross_entropy_plan(tensors[:2], options, shard)(tensors, options)

    def compiled(self, tensors: Tensors, options: Options) -> Tensor:
        self.check_arguments(*tensors, options)
        arranged = *self.arranged(tensors[:3]), *tensors[3:]
        dtype = self.result_dtype(tensors[0], options, arranged[0].dtype)
        # The operator runs without autocast, on which the dtype of the result may depend.
        options = options._replace(loss_dtype=accumulate_dtype(arranged[0].dtype), inplace=False)
        loss: Tensor = self.custom_operator(arranged, checks.normalized(options))
        return loss if loss.dtype is dtype else loss.to(dtype)

    def fake(self, tensors: Tensors, options: Options) -> Tensor:
        input = tensors[0]
        shape = loss_shape(input, options.reduction)
        dtype = self.result_dtype(input, options, input.dtype)
        empty: Tensor = input.new_empty(shape, dtype=dtype)
        return empty

    def result_dtype(self, input: Tensor, options: Any, dtype: torch.dtype) -> torch.dtype:
        return options.loss_dtype or super().result_dtype(input, options, dtype)

    def arranged(self, tensors: Tensors) -> Tensors:
        input, target, weight = tensors
        if not target.is_floating_point():
            return super().arranged(tensors)
        common = common_dtype(input, target, weight)
        return input.to(common), target.to(common), weight

    def local_shard_of(self, tensors: Tensors, options: Options) -> Any:
        return None if options.gamma != 0 else super().local_shard_of(tensors, options)

    def strategy_of(self, tensors: Tensors, options: Options) -> str:  # noqa: ARG002
        rows = backend_of(tensors[0]).supports_rows(tensors[0])
        return "row by row" if rows else "several rows at a time"


def prepare_inplace(input: Tensor) -> None:
    """Increments the version of logits that their gradient may overwrite."""
    if grad_enabled() and input.requires_grad:
        checks.overwritable(input)
        increment_version(input)


def cross_entropy_fallback_reason(
    input: Tensor, target: Tensor, weight: Tensor | None, *others: Any
) -> str | None:
    """Returns why torch's operator has to compute these arguments, None if a kernel can."""
    options = others[-1]
    if input.dim() > 1 and input.shape[1] == 1:
        return "one class"
    smoothes = weight is not None and options.label_smoothing != 0
    if target.dtype is torch.uint8 and (input.dim() > 2 or smoothes):
        return UINT8_TARGET
    if options.with_metrics and is_compiled(input):
        return "torch.compile: Inductor fuses the metrics"
    if options.softcap is not None:
        if is_compiled(input):
            return "torch.compile: Inductor fuses the softcap"
        if options.gamma != 0 or target.is_floating_point():
            return "softcap with gamma or class probabilities"
    return None
