"""Cross-entropy of logits, with the options that torch lacks; `row_state.py` has the equation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.compiler import is_dynamo_compiling
from torch.nn import functional as F

from pyfused import checks
from pyfused.backends import backend_of, cpu
from pyfused.dispatch.call import decide, is_compiled
from pyfused.dispatch.operator import (
    REDUCTIONS,
    Arguments,
    Numbers,
    grad_enabled,
    parameters_of,
    reduction_of,
)
from pyfused.dispatch.plan import Forward, Plan, Tensors
from pyfused.layout import accumulate_dtype, common_dtype, loss_shape
from pyfused.ops import definitions, metrics, shards
from pyfused.ops.class_loss import ClassLoss
from pyfused.ops.collectives import LocalShard
from pyfused.ops.custom_operators import custom_operator
from pyfused.ops.row_state import metrics_state
from pyfused.ops.shards import ShardedOperator
from pyfused.torch_internals import (
    built_in,
    dispatch_modes,
    fell_back_in_checkpoint,
    is_functorch_wrapped,
)
from pyfused.types import CrossEntropyOptions

_TORCH_PARAMETERS = tuple(parameters_of(F.cross_entropy))


@dataclass(eq=False, kw_only=True, repr=False)
class CrossEntropy(ClassLoss, ShardedOperator):
    """Cross-entropy of logits and class indices, or probabilities of the classes."""

    options = CrossEntropyOptions

    def __post_init__(self) -> None:
        super().__post_init__()
        reference = self.reference
        built_in_loss = built_in("cross_entropy_loss", reference)

        def builtin(
            input: Tensor, target: Tensor, weight: Tensor | None, options: CrossEntropyOptions
        ) -> Any:
            reduction = REDUCTIONS.get(options.reduction)
            if reduction is None or type(target) is not Tensor or not options.is_plain():
                return reference(input, target, weight, options)
            is_index = target.dtype is torch.int64
            if (
                is_index
                and input.requires_grad
                and _ignores_rows(input, target, options.ignore_index)
            ):
                arguments = input, target, weight, options
                _, run, numbers = decide(self, arguments, False)
                if run is not None:  # a kernel is faster than masking by torch's operators
                    return run(arguments, numbers)
                input = definitions.without_ignored(input, target, options.ignore_index)
            index, smoothing = options.ignore_index, options.label_smoothing
            return built_in_loss(input, target, weight, reduction, index, smoothing)

        self.builtin = self.builtin_ = builtin

    def runs_small_call(self, arguments: Arguments) -> bool:
        input, target, _, options = arguments
        has_gradient = type(target) is Tensor and input.requires_grad and options.is_plain()
        is_index = has_gradient and target.dtype is torch.int64
        return is_index and _ignores_rows(input, target, options.ignore_index)

    def bind(self, *args: Any, **kwargs: Any) -> Arguments:
        kwargs |= dict(zip(_TORCH_PARAMETERS, args, strict=False))
        legacy = kwargs.pop("size_average", None), kwargs.pop("reduce", None)
        reduction = reduction_of(*legacy, kwargs.pop("reduction", "mean"))
        tensors = kwargs.pop("input"), kwargs.pop("target"), kwargs.pop("weight", None)
        return *tensors, CrossEntropyOptions(reduction=reduction, **kwargs)

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
        return self.reference(input, target, weight, options)

    def plan(self, arguments: Arguments, inplace: bool) -> Any:
        options = arguments[-1]
        if options.softcap is not None:
            self.checked(arguments)
            return self._softcap_loss
        plan = super().plan(arguments, inplace)
        return self._with_metrics(plan, arguments) if options.with_metrics else plan

    def _with_metrics(self, plan: Plan, arguments: Arguments) -> Plan:
        """Adds the metrics to a plan, which follow from the state of rows, a second output."""
        *_, options = self.checked(arguments)
        dtype = accumulate_dtype(arguments[0].dtype)

        def forward(tensors: Tensors, numbers: Numbers) -> Forward:
            scaled = self.options_of_call(options, numbers, *tensors[3:])
            state = metrics_state(plan.backend, tensors[0], tensors[1], scaled)
            loss, saved, gradients = plan.forward(tensors, numbers)
            return (loss, state), saved, gradients

        def finish(results: Any, arguments: Arguments) -> tuple[Tensor, metrics.Metrics]:
            (loss, state), target = results, arguments[1]
            if not target.is_floating_point():  # probabilities need no copy of the logits here
                _, target, _ = self.arranged(arguments[:3])
            return loss, metrics.of_state(state, target, options.ignore_index, dtype)

        return replace(plan, forward=forward, finish=finish)

    def tensors(self, arguments: Arguments) -> Tensors:
        *operands, options = arguments
        if options.token_weight is None and options.denominator is None:  # the common case
            return *operands, None, None
        return *operands, *checks.option_tensors(options)

    def compute_shard(self, arguments: Arguments, shard: LocalShard | None) -> Any:
        input, target, weight, options = arguments
        return shards.cross_entropy((input, target), weight, options, shard)

    def _softcap_loss(self, arguments: Arguments, _numbers: Numbers) -> Any:
        """Returns the loss of capped logits, computed from the state of rows."""
        input, target, weight, *_ = self.tensors(arguments)
        target = target.reshape(loss_shape(input, "none"))
        return self.compute_shard((input, target, weight, arguments[-1]), None)

    def compiled(self, arguments: Arguments) -> Tensor:
        *operands, options = self.checked(arguments)
        options = replace(checks.normalized(options), with_metrics=False)
        operator, tensors = custom_operator(self.name), self.arranged(operands)
        dtype = self.result_dtype(operands[0], options, tensors[0].dtype)
        # The operator runs without autocast, on which the dtype of the result may depend.
        options = replace(options, loss_dtype=accumulate_dtype(tensors[0].dtype))
        loss: Tensor = operator(*tensors, *options.values())
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

    def prepare_inplace(self, input: Tensor) -> None:
        """Increments the version of logits that their gradient may overwrite."""
        if grad_enabled() and input.requires_grad:
            checks.overwritable(input)
            increment_version(input)

    def local_shard_of(self, arguments: Arguments) -> Any:
        return None if arguments[-1].gamma != 0 else super().local_shard_of(arguments)

    def strategy_of(self, arguments: Arguments) -> str:
        rows = backend_of(arguments[0]).supports_rows(arguments[0])
        return "row by row" if rows else "several rows at a time"


def _ignores_rows(input: Tensor, target: Tensor, ignore_index: int) -> bool:
    """Returns whether rows of a CPU call are ignored, for which torch's gradient may be NaN.

    False in compiled programs and under modes, which expect torch's operators.
    """
    if is_dynamo_compiling() or is_functorch_wrapped(target) or not target.is_cpu:
        return False
    if not (input.dim() and input.numel() and target.is_contiguous()):
        return False
    classes = input.shape[input.dim() > 1]
    if target.numel() * classes != input.numel():
        return False  # torch raises
    if not 0 <= ignore_index < classes and cpu.all_in_range(target, classes):
        return False
    return not (dispatch_modes() or fell_back_in_checkpoint())


def cross_entropy_fallback_reason(
    input: Tensor, target: Tensor, _weight: Tensor | None, options: CrossEntropyOptions
) -> str | None:
    """Returns why torch's operator has to compute these arguments, None if a kernel can."""
    if input.dim() > 1 and input.shape[1] == 1:
        return "one class"
    if options.with_metrics and is_compiled(input):
        return "torch.compile: Inductor fuses the metrics"
    if options.softcap is not None:
        if is_compiled(input):
            return "torch.compile: Inductor fuses the softcap"
        if options.gamma != 0 or target.is_floating_point():
            return "softcap with gamma or class probabilities"
    return None
