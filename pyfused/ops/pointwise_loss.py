"""Pointwise losses, f(input, target, ...) of each element, and activations of several tensors."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache, partial, reduce
from operator import itemgetter
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyfused import checks
from pyfused.backends import backend_of
from pyfused.backends.protocol import Parameters
from pyfused.dispatch.autograd import compute, differentiate
from pyfused.dispatch.operator import (
    Forward,
    Needs,
    Operand,
    Options,
    SpecializedOperator,
    Tensors,
    gradients_in_forward,
)
from pyfused.formula_compiler import trace
from pyfused.formula_compiler.kernel import Kernel, Method
from pyfused.formula_compiler.program import Program
from pyfused.torch_internals import any_autocast
from pyfused.types import NUMBER, Gradients, Outputs, outputs_of

# Weights of these dtypes are converted to float32, because half precision would round them.
_INTEGERS = frozenset((torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64))

Divisor = Tensor | int
Denominator = Callable[[Sequence[Tensor], Tensor | None, Options], Divisor]


def reduced(loss: Tensor, reduction: str, weight: Tensor | None = None) -> Tensor:
    """Reduces losses; a weighted mean divides by the sum of the weights.

    The weights are summed in float64. Half precision is weighted and summed in float32, and rounded
    once. The result has the dtype of torch's ``(loss * weight).sum() / weight.sum()``.
    """
    if weight is not None:
        checks.tensor("weight", weight)
        checks.broadcasts("weight", weight, "input", loss, expands=True)
    if reduction == "none":
        return loss if weight is None else loss * weight
    checks.reduction(reduction)
    if weight is None:
        return loss.mean() if reduction == "mean" else loss.sum()
    mean, wide, result = reduction == "mean", loss, loss.dtype
    if weight.dtype is not result or result not in (torch.float32, torch.float64):
        # Empty tensors give torch's dtypes; torch.compile cannot trace torch.result_type.
        product = loss.new_empty((0,) * min(loss.dim(), 1)) * weight.new_empty((0,) * weight.dim())
        wide = loss.float() if product.dtype in (torch.float16, torch.bfloat16) else loss
        total = product.sum()
        result = (total / weight.new_empty(()).sum() if mean else total).dtype
    total = (wide * weight).sum()
    if mean:
        exact = torch.float32 if weight.device.type == "mps" else torch.float64  # it lacks float64
        dtype = torch.promote_types(weight.dtype, exact)
        total = total / weight.expand_as(loss).sum(dtype=dtype)
    return total.to(result)


def elements(operands: Sequence[Tensor], *_: Any) -> Divisor:
    return operands[0].numel()


def weight_or_elements(operands: Sequence[Tensor], weight: Tensor | None, *_: Any) -> Divisor:
    return operands[0].numel() if weight is None else weight.sum(dtype=torch.float64)


@dataclass(eq=False, kw_only=True, repr=False)
class TensorLoss(SpecializedOperator):
    """A loss of several tensors, which are broadcast, with an optional weight and a reduction.

    Attributes:
        nan_on_invalid: Whether the formula is NaN for values that torch's function refuses. If a
            kernel on a CPU reports NaN, torch's function is called, and raises its error.
        denominators: A function for each reduction except none and sum, which takes the broadcast
            operands, the weight and the options, and returns the divisor of the sum: a tensor, or a
            number if it depends only on the shape of the operands.
        reads_values: Whether a denominator depends on the values of operands.
        arrange: Transforms the operands as torch does before broadcasting.
        variables: The operands of the formula: all except the weight.
        reduces: Whether the result is reduced: True for losses, False for activations.
        infers_dtype: Whether the result's dtype may differ even if all operands have one dtype.
        uniform: The number of tensors that kernels take as they are, if they have one shape and one
            dtype and no others are passed; 0 if there are no such calls.
    """

    nan_on_invalid: bool = False
    denominators: Mapping[str, Denominator] = field(default_factory=lambda: {"mean": elements})
    reads_values: bool = False
    arrange: Callable[..., Sequence[Tensor]] | None = None
    variables: tuple[Operand, ...] = field(init=False)
    uniform: int = field(init=False, default=0)
    reduces: ClassVar[bool] = True
    infers_dtype: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_shapes = self._check_shapes
        self.variables = tuple(o for o in self.operands if o.name != "weight" or not o.optional)
        indices = [self.names.index(variable.name) for variable in self.variables]
        self._indices = indices
        if self.arrange is None:  # optional operands expand to the others
            pairs = zip(indices[1:], self.variables[1:], strict=True)
            self.broadcast = tuple(i for i, variable in pairs if not variable.optional)
        has_weight = len(self.variables) < len(self.operands)
        self._weight = self.names.index("weight") if has_weight else None
        self._cached_dtypes = cache(self._inferred_dtypes)
        converts = self.arrange is not None or self.infers_dtype or self.reads_values
        required = [i for i, x in zip(indices, self.variables, strict=True) if not x.optional]
        in_order = required == [*range(len(required))]
        self.uniform = len(required) if in_order and not converts else 0

    # ---- calls -----------------------------------------------------------------------------------

    def method_of(self, tensors: Tensors, options: Options) -> Any:
        dtype, shape, count = tensors[0].dtype, tensors[0].shape, self.uniform
        is_uniform = count > 0 and not any_autocast()
        for i, x in enumerate(tensors):
            if x is not None and (i >= count or x.dtype is not dtype or x.shape != shape):
                is_uniform = False
                break
        return self.fused_uniform if is_uniform else super().method_of(tensors, options)

    def fused_uniform(self, tensors: Tensors, options: Options) -> Tensor:
        """Returns the result of a call whose tensors kernels take as they are."""
        inputs, count = (*tensors[: self.uniform], None, None), self.uniform
        result: Tensor = compute(self, inputs, options, count)
        return result

    def fused(self, tensors: Tensors, options: Options) -> Tensor:
        reduction = options.reduction if self.reduces else "none"
        operands, weight = self.operands_and_weight(tensors)
        dtype, result_dtype = self._dtypes(tensors, operands[0], reduction)
        unexpanded = weight  # torch's mean divides by its sum before broadcasting
        operands, weight = self.arranged(operands, weight, dtype)
        divisor, denominator = None, self.denominators.get(reduction)
        if denominator is not None:
            divisor = denominator(operands, unexpanded, options)
        inputs = *operands, weight, divisor if isinstance(divisor, Tensor) else None
        result: Tensor = compute(self, inputs, options, len(operands))
        return result if result.dtype is result_dtype else result.to(result_dtype)

    def forward(self, tensors: Tensors, options: Options, needs: Needs) -> Forward:
        """Computes a loss.

        The tensors are the operands, the weight, and the divisor of the sum if it depends on
        values. The last two may be None.
        """
        dtype, reduction = tensors[0].dtype, options.reduction if self.reduces else "none"
        needed = tuple(needs)
        if True not in needs or not gradients_in_forward(reduction, dtype):
            needed = ()
        loss, gradients = self.launch(tensors, options, outputs_of(True, needed, False, dtype))
        if loss.dtype is not dtype and reduction != "none":
            loss = loss.to(dtype)
        return loss, tensors, gradients if needed else ()

    def backward(
        self, saved: Tensors, options: Options, needs: Needs, grad_output: Tensor
    ) -> Gradients:
        outputs, grad_output = outputs_of(False, tuple(needs)), self.expanded(grad_output, saved)
        gradients: Gradients = self.launch(saved, options, outputs, grad_output)[1]
        return gradients

    def define(
        self, saved: Tensors, options: Options, needs: Needs, grad_output: Tensor
    ) -> Gradients:
        *operands, weight, by = saved
        by_torch = weight is by is None

        def definition(*operands: Tensor) -> Tensor:
            if by_torch:
                return self.by_operands(operands, options)
            loss, divisor = self.unreduced(operands, options), by
            reduction = options.reduction if self.reduces else "none"
            if divisor is None and reduction in self.denominators:
                divisor = self.denominators[reduction](operands, None, options)
            loss = loss if divisor is None else (loss / divisor).to(loss.dtype)
            return loss if weight is None else loss * weight

        grad_output = grad_output if by_torch else self.expanded(grad_output, operands)
        return differentiate(definition, operands, needs, grad_output)

    @abstractmethod
    def launch(
        self, tensors: Tensors, options: Options, outputs: Outputs, grad_output: Any = None
    ) -> Any:
        """Computes the outputs of a kernel: the loss and the gradients of the operands."""

    def arranged(
        self, operands: Sequence[Any], weight: Tensor | None, dtype: torch.dtype
    ) -> tuple[Sequence[Tensor], Tensor | None]:
        """Converts the operands and the weight to one shape and dtype."""
        if self.arrange is not None:
            operands = self.arrange(*operands)
        # Operands are cast before broadcasting: gradients are then summed before rounding.
        operands = [x if x.dtype is dtype else x.to(dtype) for x in operands]
        shape = operands[0].shape
        if any([x.shape != shape for x in operands]):  # noqa: C419 a generator is slower
            operands = torch.broadcast_tensors(*operands)
        if weight is not None:
            weight = weight.to(dtype).expand_as(operands[0])
        return operands, weight

    def expanded(self, grad_output: Tensor, operands: Sequence[Tensor]) -> Tensor:
        """Expands grad_output to the shape of the unreduced loss."""
        return grad_output.expand_as(operands[0])

    def _values(self, tensors: Sequence[Any]) -> Sequence[Any]:
        """Returns the variables of the formula among the tensors of a call."""
        return [tensors[i] for i in self._indices]

    def unreduced(self, operands: Sequence[Tensor], options: Options) -> Tensor:
        """Computes the unreduced loss by torch's operator."""
        options = options._replace(reduction="none") if self.reduces else options
        return self.by_operands(operands, options)

    def by_operands(self, operands: Sequence[Tensor], options: Options) -> Tensor:
        """Computes the loss by torch's operator, from the variables of the formula."""
        by_name = {v.name: x for v, x in zip(self.variables, operands, strict=False)}
        loss: Tensor = self.torch(*[by_name.get(x.name) for x in self.operands], options)
        return loss

    def operands_and_weight(self, tensors: Sequence[Any]) -> tuple[Sequence[Any], Any]:
        """Returns the operands without a missing one, and the weight or None."""
        operands = self._values(tensors)
        if operands[-1] is None:
            operands = operands[:-1]
        return operands, None if self._weight is None else tensors[self._weight]

    def check_choices(self, options: Options) -> None:
        super().check_choices(options)
        words = "none", *self.denominators, "sum"
        if self.reduces and options.reduction not in words:
            checks.one_of("reduction", options.reduction, words)

    def _check_shapes(self, *call: Any) -> None:
        """Checks that the operands broadcast, and that optional ones expand to the input."""
        (operands, weight), first = self.operands_and_weight(call[:-1]), self.variables[0].name
        if self.arrange is None:
            for k, (operand, x) in enumerate(zip(self.variables, operands, strict=False)):
                for earlier in operands[:k]:
                    checks.broadcasts(operand.name, x, first, earlier, expands=operand.optional)
        if weight is not None:
            checks.broadcasts("weight", weight, first, operands[0], expands=True)

    def _dtypes(
        self, tensors: Tensors, input: Tensor, reduction: str
    ) -> tuple[torch.dtype, torch.dtype]:
        """Returns the dtype in which kernels take the operands, and the dtype of the result."""
        dtype, device = input.dtype, input.device
        to = None
        if torch.is_autocast_enabled(device.type):
            to = torch.get_autocast_dtype(device.type)
        kinds = tuple([
            (x.dtype, x.dim() > 0) if isinstance(x, Tensor) else None for x in tensors
        ])  # fmt: skip
        if to is None and not self.infers_dtype and {kind[0] for kind in kinds if kind} == {dtype}:
            return dtype, dtype
        return self._cached_dtypes(kinds, device, (to, torch.get_default_dtype()), reduction)

    def _inferred_dtypes(
        self,
        kinds: tuple[tuple[torch.dtype, bool] | None, ...],
        device: torch.device,
        modes: tuple[torch.dtype | None, torch.dtype],  # noqa: ARG002 part of the key
        reduction: str,
    ) -> tuple[torch.dtype, torch.dtype]:
        """Returns the dtypes of the operands and of torch's result.

        It calls torch's operator with one element. No simple rule predicts the result's dtype:
        autocast may widen some of the operators that a loss consists of, and torch may overwrite an
        operand in another dtype.

        Args:
            kinds: The dtype of each tensor, and whether it has dimensions.
            modes: The dtype of autocast, None if it is disabled, and the default dtype.
        """
        ones: list[Any] = [1.0 if operand.number else None for operand in self.operands]
        dtypes = []
        for i, kind in enumerate(kinds):
            if kind is not None:
                dtype, has_dimensions = kind
                ones[i] = torch.ones([1] * has_dimensions, dtype=dtype, device=device)
                is_integer_weight = i == self._weight and dtype in _INTEGERS
                dtypes.append(torch.float32 if is_integer_weight else dtype)
        numbers = [None if number.optional else 1.0 for number in self.numbers]
        flags = [choice.values[0] for choice in self.choices if choice.values]
        with torch.no_grad():
            options = self.options(*numbers, *flags, *([reduction] if self.reduces else ()))
            result: torch.dtype = self.torch(*ones, options).dtype
        return reduce(torch.promote_types, dtypes, result), result


@dataclass(eq=False, kw_only=True, repr=False)
class PointwiseLoss(TensorLoss):
    """A loss that applies a formula to each element of the operands.

    If an optional last operand is passed, another kernel runs, with the operand's name appended.
    Otherwise the formula receives None for it, and the gradient omits its derivative.

    Attributes:
        formula: Computes the loss of an element by torch's operators, from the operands, the
            numbers and the choices that have their own kernels.
        gradient: Takes the same arguments, and returns the derivative by each operand, or None for
            no derivative. If it is None, derivatives are derived from the formula.
        torch_backward: Takes the gradient of the unreduced loss, the operands and the options, and
            returns the gradient of the input in torch's operators, for second derivatives. None
            calls torch's function and differentiates it twice, which takes longer.
        clamps: Whether the formula's derivative depends on torch's derivative of clamp at a bound.
        masks: The indices of the operands that are bool in the formula.
        ordered_like: The index of the operand whose memory order torch's unreduced loss has.
    """

    formula: Callable[..., Tensor]
    gradient: Callable[..., Gradients] | None = None
    torch_backward: Callable[..., Tensor] | None = None
    clamps: bool = False
    masks: tuple[int, ...] = ()
    ordered_like: int = 0

    def __post_init__(self) -> None:
        if self.torch is None:
            self.torch = self._by_formula
        super().__post_init__()
        self.cached_kernel = lru_cache(maxsize=256)(self.kernel)

    @cached_property
    def kernels(self) -> dict[str, Kernel]:
        """Returns the kernels by name, for all choices, with and without an optional operand."""
        kernels = {}
        required = sum(not variable.optional for variable in self.variables)
        for stem, case in self.kernel_cases():
            for operands in range(required, len(self.variables) + 1):
                name = self._kernel_name(stem, operands)
                kernels[name] = Kernel(name, case, partial(self._trace_kernel, operands))
        return kernels

    def cases_of(self, options: Options) -> tuple[Any, ...]:
        """Returns the values of the formula's parameters that have their own kernel, or NUMBER."""
        return tuple([
            x if x in special else NUMBER
            for special, x in zip(self.special, options, strict=False)
        ])  # fmt: skip

    def kernel(
        self, cases: tuple[Any, ...], operands: int, outputs: Outputs
    ) -> tuple[Kernel | Program, Parameters]:
        """Returns the kernel for cases of the parameters, and the function of `_parameters`."""
        kernel = self.kernels[self._kernel_name(self.kernel_of(cases), operands)]
        parameters = self._parameters(kernel)
        if self.clamps and not trace.clamp_is_inclusive():  # the C++ kernels are inclusive
            return kernel.program(outputs), parameters
        return kernel, parameters

    def _parameters(self, kernel: Kernel) -> Parameters:
        """Returns the function from a call's options, numbers first, to the kernel's parameters."""
        needed = [i for i, x in enumerate(self.numbers) if kernel.case.get(x.name) is NUMBER]
        if len(needed) == len(self.numbers) and not any(x.optional for x in self.numbers):
            return itemgetter(slice(len(needed)))
        nan = math.nan
        return lambda options: tuple([nan if (x := options[i]) is None else x for i in needed])

    def _kernel_name(self, stem: str, operands: int) -> str:
        last = self.variables[operands - 1]
        return f"{stem}_{last.name}" if last.optional else stem

    def _trace_kernel(self, operands: int, kernel: Kernel) -> list[Method]:
        """Traces the loss of one element and its gradients."""
        variables = self.variables[:operands]
        missing = [None] * (len(self.variables) - operands)

        def run(leaves: list[Tensor], case: list[Any], scale: Tensor) -> list[Tensor | None]:
            parameters = [*missing, *case]
            value = trace.elementwise(self.formula(*leaves, *parameters))
            if self.gradient is None:
                gradients = trace.gradients_of(value, leaves, scale)
            else:
                gradients = [*self.gradient(*leaves, *parameters)]
            pairs = zip(gradients, variables, strict=True)
            return [value, *(g if variable.differentiated else None for g, variable in pairs)]

        e, (value, *gradients) = kernel.expressions(run, self.dtypes(operands))
        if self.gradient is not None:
            gradients = [e.scaled(gradient) for gradient in gradients]
        return [Method([variable.name for variable in variables], e, [value, *gradients])]

    def dtypes(self, operands: int) -> list[torch.dtype]:
        """Returns the dtypes of the first operands in a trace."""
        return [torch.bool if k in self.masks else torch.float64 for k in range(operands)]

    def launch(
        self, tensors: Tensors, options: Options, outputs: Outputs, grad_output: Any = None
    ) -> Any:
        *operands, weight, divisor = tensors
        reduction = options.reduction if self.reduces else "none"
        if divisor is None and reduction in self.denominators:
            divisor = self.denominators[reduction](operands, None, options)
        cases = self.cases_of(options) if self.parameters else ()
        kernel, parameters = self.cached_kernel(cases, len(operands), outputs)
        on_nan = partial(self.unreduced, operands, options) if self.nan_on_invalid else None
        inputs = operands, weight, parameters(options), reduction
        return backend_of(operands[0]).pointwise_loss(
            kernel, *inputs, outputs, divisor, grad_output, on_nan, self.ordered_like
        )

    def define(
        self, saved: Tensors, options: Options, needs: Needs, grad_output: Tensor
    ) -> Gradients:
        *operands, weight, divisor = saved
        is_wide = operands[0].dtype in (torch.float32, torch.float64)
        if self.torch_backward is None or not is_wide or True in needs[1:]:
            return super().define(saved, options, needs, grad_output)
        if divisor is None and options.reduction in self.denominators:
            divisor = self.denominators[options.reduction](operands, None, options)
        if divisor is not None:
            grad_output = (grad_output / divisor).to(grad_output.dtype)
        grad_output = self.expanded(grad_output, operands)
        grad_output = grad_output if weight is None else grad_output * weight
        return self.torch_backward(grad_output, operands, options), *[None] * (len(operands) - 1)

    def _by_formula(self, *arguments: Any) -> Tensor:
        """Returns the result, for an operator that torch lacks."""
        *tensors, options = arguments
        result = self.formula(*self._values(tensors), *options[: len(self.parameters)])
        if not self.reduces:
            return result
        weight = None if self._weight is None else tensors[self._weight]
        return reduced(result, options.reduction, weight)


class Gated(PointwiseLoss):
    """An activation of several tensors, such as a gate, computed as an unreduced loss."""

    reduces = False

    def by_operands(self, operands: Sequence[Tensor], options: Options) -> Tensor:
        return self.formula(*operands, *options)
