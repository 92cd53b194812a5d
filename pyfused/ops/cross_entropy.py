"""Cross-entropy: what it has beyond other losses over classes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.compiler import is_dynamo_compiling
from torch.nn import functional as F

from pyfused import checks
from pyfused.backends import backend_of
from pyfused.layout import accumulate_dtype, loss_shape
from pyfused.ops import vocab_parallel
from pyfused.ops.class_loss import ClassLoss, Given
from pyfused.ops.declaration import TOKEN_WEIGHT, Arguments, parameters_of, reduction_of
from pyfused.ops.dispatch import is_compiled, unsupported
from pyfused.ops.metrics import RowStatistics
from pyfused.types import CrossEntropyOptions, Want

_OF_TORCH = tuple(parameters_of(F.cross_entropy))


@dataclass(eq=False, kw_only=True, repr=False)
class CrossEntropy(ClassLoss):
    """Of logits, beside class indices or probabilities of the classes."""

    def bind(self, *arguments: Any, **by_name: Any) -> Arguments:
        given = dict(zip(_OF_TORCH, arguments, strict=False)) | by_name
        legacy = given.pop("size_average", None), given.pop("reduce", None)
        reduction = reduction_of(*legacy, given.pop("reduction", "mean"))
        tensors = given.pop("input"), given.pop("target"), given.pop("weight", None)
        return *tensors, CrossEntropyOptions(reduction=reduction, **given)

    def read(self, arguments: Arguments) -> Given:
        return Given(*arguments)

    def checked(self, arguments: Arguments) -> Given:
        given = super().checked(arguments)
        return given._replace(options=checks.normalized(given.options))

    def define(self, given: Given) -> Tensor:
        return self.reference(*given)

    def fused(self, arguments: Arguments, inplace: bool) -> Any:
        local = None if type(arguments[0]) is Tensor else self.local_of(arguments)
        if local is not None:
            given = Given(*local.arguments)
            return local.whole(vocab_parallel.cross_entropy(*given, local.shard))
        given = self.arranged(self.checked(arguments))
        input, target, _, options = given
        if not options.with_metrics:
            return self.finished(given, self.run(given, Want(inplace=inplace)))
        given = given._replace(options=replace(options, with_metrics=False))
        rows = RowStatistics.empty(math.prod(loss_shape(input, "none")), input)
        statistics = rows.before(backend_of(input), input, target, options)
        loss = self.run(given, Want(inplace=inplace, statistics=statistics))
        metrics = rows.metrics(target, options.ignore_index, accumulate_dtype(arguments[0].dtype))
        return self.finished(given, loss), metrics

    def dtype_of(self, given: Given) -> torch.dtype:
        return given.options.loss_dtype or super().dtype_of(given)

    def arranged(self, given: Given) -> Given:
        input, target, weight, _ = given
        if not target.is_floating_point():
            return super().arranged(given)
        common = torch.promote_types(input.dtype, target.dtype)
        if weight is not None:
            common = torch.promote_types(common, weight.dtype)
        return given._replace(input=input.to(common), target=target.to(common))

    def run(self, given: Given, want: Want) -> Tensor:
        input, target, weight, options = given
        if is_compiled(input):
            loss: Tensor = torch.ops.pyfused.cross_entropy(input, target, weight, *options.values())
            return loss
        return super().run(given, want)

    def give_up(self, input: Tensor) -> None:
        """Marks logits whose gradient may overwrite them as changed, for whoever saved them."""
        compiling = is_dynamo_compiling()  # whose gradient has memory of its own
        if torch.is_grad_enabled() and input.requires_grad and not compiling:
            checks.overwritable(input)
            increment_version(input)

    def local_of(self, arguments: Arguments) -> vocab_parallel.Local | None:
        return None if arguments[-1].gamma else vocab_parallel.local_of(self, arguments)

    def strategy(self, input: Tensor) -> str:
        rows = backend_of(input).supports_rows(input)
        return "row by row" if rows else "several rows at a time"


def cross_entropy_fallback_reason(
    input: Tensor, _target: Tensor, _weight: Tensor | None, options: CrossEntropyOptions
) -> str | None:
    """Why torch's operator is the one for these arguments."""
    if input.dim() > 1 and input.shape[1] == 1:
        return "one class"
    if options.with_metrics and is_compiled(input):
        return "torch.compile: Inductor fuses the metrics"
    return options_fallback_reason(input, options)


def options_fallback_reason(input: Tensor, options: CrossEntropyOptions) -> str | None:
    compiled = is_compiled(input)
    if isinstance(options.denominator, Tensor):
        if compiled:
            return "torch.compile: denominator is a tensor"
        if options.denominator.requires_grad:
            return "denominator requires grad"
    if options.token_weight is None:
        return None
    return unsupported(TOKEN_WEIGHT, options.token_weight, input, compiled)
