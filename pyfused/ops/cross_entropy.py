"""Cross-entropy of logits, with the options that torch lacks; `row_state.py` has the equation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from pyfused import checks
from pyfused.backends import backend_of
from pyfused.dispatch.operator import REDUCTIONS, Arguments, Numbers, Tensors, grad_enabled
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

# The defaults of the numbers that torch's function lacks, and their types.
DEFAULTS = CrossEntropyOptions().numbers()[:-2]
TYPES = frozenset(map(type, DEFAULTS))
UINT8_TARGET = "target has dtype torch.uint8, which torch does not support here"


@dataclass(eq=False, kw_only=True, repr=False)
class CrossEntropy(ClassLoss, ShardedOperator):
    """Cross-entropy of logits and class indices, or probabilities of the classes."""

    options = CrossEntropyOptions

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
        tensor: Tensor | None,
        *rest: Any,
    ) -> Any:
        """Returns the result of a small call: torch's, unless options that torch lacks are set.

        Args:
            tensor: The denominator, if it is a tensor.
        """
        added = rest[:-8]
        smoothing, _, ignore_index, reduction, _, loss_dtype, with_metrics, inplace = rest[-8:]
        number = REDUCTIONS.get(reduction)
        if inplace:
            prepare_inplace(input)
        if (
            not token_weight is tensor is loss_dtype is None
            or not TYPES.issuperset(map(type, added))
            or added != DEFAULTS
            or with_metrics
            or number is None
            or type(target) is not Tensor
        ):
            call = input, target, weight, token_weight, tensor, *rest
            return fall_back(self, SMALL, *self.split(call))
        return self.built_in_loss(input, target, weight, number, ignore_index, smoothing)

    def options_of(self, arguments: Arguments) -> CrossEntropyOptions:
        options: CrossEntropyOptions = arguments[-1]
        return options

    def options_of_call(self, options: Any, numbers: Numbers, *tensors: Tensor | None) -> Any:
        return replace(checks.normalized(options.of_call(numbers, *tensors)), with_metrics=False)

    def definition_loss(
        self, input: Tensor, target: Tensor, weight: Tensor | None, options: Any
    ) -> Tensor:
        if options.is_plain():  # the definition of other options masks ignored rows itself
            input = definitions.without_ignored(input, target, options.ignore_index)
        loss: Tensor = self.definition(input, target, weight, options)
        return loss

    def plan(self, arguments: Arguments) -> Any:
        options = arguments[-1]
        if options.softcap is not None:
            input, target, *_ = self.checked(arguments)
            plan: Any = shards.cross_entropy_plan((input, target), options, None)
        else:
            plan = super().plan(arguments)
            plan = self._with_metrics(plan, arguments) if options.with_metrics else plan
        if not options.inplace:
            return plan
        arranged = plan.arrange

        def arrange(tensors: Tensors, numbers: Numbers) -> Tensors:
            prepare_inplace(tensors[0])
            return tensors if arranged is None else arranged(tensors, numbers)

        return replace(plan, arrange=arrange)

    def _with_metrics(self, plan: Plan, arguments: Arguments) -> Plan:
        """Returns the plan with the state of rows as a second output, from which metrics follow."""
        *_, options = self.checked(arguments)
        dtype = accumulate_dtype(arguments[0].dtype)

        def forward(tensors: Tensors, numbers: Numbers) -> Forward:
            scaled = self.options_of_call(options, numbers, *tensors[3:])
            state = metrics_state(plan.backend, tensors[0], tensors[1], scaled)
            loss, saved, gradients = plan.forward(tensors, numbers)
            return (loss, state), saved, gradients

        def finish(results: Any, tensors: Tensors) -> tuple[Tensor, metrics.Metrics]:
            (loss, state), target = results, tensors[1]
            if not target.is_floating_point():  # for probabilities it would copy the logits
                _, target, _ = self.arranged(tensors[:3])
            return loss, metrics.of_state(state, target, options.ignore_index, dtype)

        return replace(plan, forward=forward, finish=finish)

    def arrange_of(self, arguments: Arguments) -> Any:
        has_factors = any(x is not None for x in arguments[-1].plan_tensors())
        return self.kernel_tensors if has_factors else None

    def kernel_tensors(self, tensors: Tensors, _: Numbers = ()) -> Tensors:
        return *tensors[:3], *checks.factors(*tensors[3:])

    def compute_shard(self, arguments: Arguments, shard: LocalShard) -> Any:
        *tensors, options = arguments
        plan = shards.cross_entropy_plan(tensors[:2], options, shard)
        return plan((*tensors, *options.plan_tensors()), options.numbers())

    def compiled(self, arguments: Arguments) -> Tensor:
        *operands, options = self.checked(arguments)
        options = replace(checks.normalized(options), with_metrics=False, inplace=False)
        tensors = self.arranged(operands)
        dtype = self.result_dtype(operands[0], options, tensors[0].dtype)
        # The operator runs without autocast, on which the dtype of the result may depend.
        options = replace(options, loss_dtype=accumulate_dtype(tensors[0].dtype))
        tensors, numbers, case = self.call_of(tensors, options)
        loss: Tensor = self.custom_operator(*tensors, *numbers, *case)
        return loss if loss.dtype is dtype else loss.to(dtype)

    def fake(self, arguments: Arguments) -> Tensor:
        input, *_, options = arguments
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

    def local_shard_of(self, arguments: Arguments) -> Any:
        return None if arguments[-1].gamma != 0 else super().local_shard_of(arguments)

    def strategy_of(self, arguments: Arguments) -> str:
        rows = backend_of(arguments[0]).supports_rows(arguments[0])
        return "row by row" if rows else "several rows at a time"


def prepare_inplace(input: Tensor) -> None:
    """Increments the version of logits that their gradient may overwrite."""
    if grad_enabled() and input.requires_grad:
        checks.overwritable(input)
        increment_version(input)


def cross_entropy_fallback_reason(
    input: Tensor, target: Tensor, weight: Tensor | None, options: CrossEntropyOptions
) -> str | None:
    """Returns why torch's operator has to compute these arguments, None if a kernel can."""
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
