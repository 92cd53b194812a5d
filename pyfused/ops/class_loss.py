"""The negative log-likelihood, ``-w_y x_y``, and its base class, which cross-entropy shares."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyfused import checks
from pyfused.backends import backend_of, takes_triton
from pyfused.backends.protocol import LossKernel
from pyfused.dispatch.autograd import autocast_dtype, differentiate
from pyfused.dispatch.operator import Options, Tensors
from pyfused.dispatch.plan import Plan, gradients_in_forward, loss_passes, needs_grad
from pyfused.layout import accumulate_dtype, is_dense
from pyfused.ops.custom_operators import CompiledOperator
from pyfused.types import Gradients, Outputs


@dataclass(eq=False, kw_only=True, repr=False)
class ClassLoss(CompiledOperator):
    """A loss of rows of scores, given a class index or class probabilities for each row.

    Attributes:
        check_arguments: Raises for invalid shapes, dtypes and options.
    """

    check_arguments: Callable[..., None]

    def contiguous_classes(self, tensors: Tensors, options: Options) -> int:  # noqa: ARG002
        return checks.classes_of(tensors[0])

    def dynamic_dims(self, input: Tensor, options: Options) -> int:  # noqa: ARG002
        return int(input.dim() > 1)

    def kernel_tensors(self, tensors: Tensors, _: Options = ()) -> Tensors:
        """Returns the input, the target, and weight, token_weight and denominator or None."""
        return *tensors[:3], None, None

    def arrange_of(self, tensors: Tensors) -> Any:  # noqa: ARG002
        """Returns the function `arrange` of a plan, given the tensors for planning."""
        return self.kernel_tensors

    def plan(self, tensors: Tensors, options: Options) -> Plan:
        """Checks a call, and returns the plan of its signature."""
        self.check_arguments(*tensors, options)
        inplace = getattr(options, "inplace", False)
        input, target, _ = operands = tensors[:3]
        layouts: list[Any] = [None if x is None else x.empty() for x in operands]
        arranged = self.arranged(layouts)
        converts = any(x is not y for x, y in zip(layouts, arranged, strict=True))
        dtype, needs = arranged[0].dtype, needs_grad((input, target))
        backend, result_dtype = backend_of(input), self.result_dtype(input, options, dtype)
        in_forward = gradients_in_forward(options.reduction, dtype)
        if inplace and not is_dense(layouts[0]):  # backward could not scale the gradient
            in_forward = False

        def arrange(tensors: Tensors, _: Options) -> Tensors:
            tensors = self.kernel_tensors(tensors)
            return *self.arranged(tensors[:3]), *tensors[3:]

        def prepare(tensors: Tensors, outputs: Outputs, grad_output: Any) -> LossKernel:
            kernel: LossKernel = getattr(backend, self.name)(tensors, options, outputs, grad_output)
            return kernel

        def define(tensors: Tensors, options: Options, grad_output: Tensor) -> Gradients:
            input, target, weight, *factors = tensors
            dtype = kernel_dtype if grad_output.dtype is result_dtype else grad_output.dtype

            def definition(input: Tensor, target: Tensor) -> Tensor:
                wide_target = target.to(dtype) if target.is_floating_point() else target
                wide_weight = None if weight is None else weight.to(dtype)
                tensors = input.to(dtype), wide_target, wide_weight
                loss = self.definition_loss(*tensors, *factors, options)
                return loss.reshape(grad_output.shape)

            return differentiate(definition, (input, target), needs, grad_output.to(dtype))

        kernel_dtype = accumulate_dtype(dtype)
        loss_dtype = None if kernel_dtype is result_dtype else result_dtype
        forward, backward = loss_passes(
            prepare, needs, in_forward, inplace, loss_dtype, tensors[0].dynamic_dims
        )
        return Plan(
            name=self.name,
            backend=backend,
            needs=needs,
            arrange=arrange if converts else self.arrange_of(tensors),
            forward=forward,
            backward=backward,
            define=define,
            inplace=inplace,
        )

    def result_dtype(
        self,
        input: Tensor,
        options: Any,  # noqa: ARG002
        dtype: torch.dtype,
    ) -> torch.dtype:
        """Returns the dtype of the result, given the dtype in which kernels take the input."""
        return autocast_dtype(dtype, input.device)

    def arranged(self, tensors: Tensors) -> Tensors:
        """Converts the target to int64 indices of the loss's shape."""
        input, target, weight = tensors
        target = target.to(torch.int64)
        return input, target.reshape(()) if input.dim() == 1 else target, weight

    @abstractmethod
    def definition_loss(self, input: Tensor, target: Tensor, *others: Any) -> Tensor:
        """Returns the loss, computed by torch's operators.

        Args:
            others: The weight, token_weight and denominator or None, and the options.
        """

    def check(self, tensors: Tensors, options: Options) -> None:
        self.check_tensors(tensors)
        self.check_arguments(*tensors, options)
        input, target, *_ = tensors
        checks.class_indices(checks.classes_of(input), target, options.ignore_index)


def nll_loss_fallback_reason(input: Tensor, *_: Any) -> str | None:
    return "torch's kernel for GPUs moves as few bytes" if takes_triton(input) else None


@dataclass(eq=False, kw_only=True, repr=False)
class NllLoss(ClassLoss):
    """The negative log-likelihood of log-probabilities."""

    strategy = "one element of a row"

    def definition_loss(self, input: Tensor, target: Tensor, *others: Any) -> Tensor:
        weight, *_, options = others
        loss: Tensor = self.torch(input, target, weight, options)
        return loss
