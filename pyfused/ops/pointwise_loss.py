"""Pointwise losses, f(input, target, ...) of each element, and activations of several tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache, partial, reduce
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from pyfused import checks
from pyfused.backends import backend_of
from pyfused.backends.protocol import Parameters
from pyfused.dispatch.autograd import differentiate
from pyfused.dispatch.operator import (
    Forward,
    Needs,
    Operand,
    Operator,
    Options,
    Tensors,
    gradients_in_forward,
)
from pyfused.formula_compiler import trace
from pyfused.formula_compiler.kernel import Kernel, Method, variant_name, variants
from pyfused.formula_compiler.program import Program
from pyfused.layout import common_dtype, have_one_order
from pyfused.torch_internals import any_autocast
from pyfused.types import NUMBER, Gradients, Outputs, Scalar, outputs_of

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


def in_tensors(numbers: Sequence[Any], operands: Sequence[Any]) -> Sequence[Any]:
    """Returns numbers as formulas take them: floats as 0-d tensors, others as they are.

    They are float64 if an operand is, else float32, and on the operands' device.
    """
    tensors = [x for x in operands if isinstance(x, Tensor)]
    if not tensors:
        return numbers
    is_double = any(x.dtype is torch.float64 for x in tensors)
    dtype = torch.float64 if is_double else torch.float32
    number = partial(torch.full, (), dtype=dtype, device=tensors[0].device)

    def converted(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(dtype)
        return number(value) if isinstance(value, float) else value

    return [converted(value) for value in numbers]


# ---- kernels -------------------------------------------------------------------------------------


class DeclaredKernels:
    """The kernels of a declared formula, one for each combination of special parameters.

    Attributes:
        find: Takes the cases of the parameters, the number of operands and the outputs, and returns
            a kernel, and a function from the options of a call to the kernel's parameters.
    """

    def __init__(self, op: PointwiseLoss) -> None:
        self.op = op
        parameters = op.parameters
        self.special = [x.special if isinstance(x, Scalar) else x.values for x in parameters]
        self.find = lru_cache(maxsize=256)(self._find)

    @cached_property
    def kernels(self) -> dict[str, Kernel]:
        """Returns the kernels by name, for all choices, with and without an optional operand."""
        kernels, op = {}, self.op
        required = sum(not variable.optional for variable in op.variables)
        for stem, case in variants(op.name, op.parameters):
            for operands in range(required, len(op.variables) + 1):
                name = self._name(stem, operands)
                kernels[name] = Kernel(name, case, partial(trace_loss, op, operands))
        return kernels

    def cases_of(self, options: Options) -> tuple[Any, ...]:
        """Returns the values of the formula's parameters that have their own kernel, or NUMBER."""
        return tuple([
            x if x in special else NUMBER
            for special, x in zip(self.special, options, strict=False)
        ])  # fmt: skip

    def _find(
        self, cases: tuple[Any, ...], operands: int, outputs: Outputs
    ) -> tuple[Kernel | Program, Parameters]:
        op = self.op
        kernel = self.kernels[self._name(variant_name(op.name, op.parameters, cases), operands)]
        if op.clamps and not trace.clamp_is_inclusive():  # the C++ kernels are inclusive
            return kernel.program(outputs), parameters_of(op, kernel)
        return kernel, parameters_of(op, kernel)

    def _name(self, stem: str, operands: int) -> str:
        last = self.op.variables[operands - 1]
        return f"{stem}_{last.name}" if last.optional else stem


def parameters_of(op: PointwiseLoss, kernel: Kernel) -> Parameters:
    """Returns the function from a call's options, numbers first, to the kernel's parameters."""
    needed = [i for i, x in enumerate(op.numbers) if kernel.case.get(x.name) is NUMBER]
    if len(needed) == len(op.numbers) and not any(x.optional for x in op.numbers):
        return itemgetter(slice(len(needed)))
    nan = math.nan
    return lambda options: tuple([nan if (x := options[i]) is None else x for i in needed])


def trace_loss(op: PointwiseLoss, operands: int, kernel: Kernel) -> list[Method]:
    """Traces the loss of one element, and the gradients of the first operands."""
    variables = op.variables[:operands]
    missing = [None] * (len(op.variables) - operands)

    def run(leaves: list[Tensor], case: list[Any], scale: Tensor) -> list[Tensor | None]:
        parameters = [*missing, *case]
        value = trace.elementwise(op.formula(*leaves, *parameters))
        if op.gradient is None:
            gradients = trace.gradients_of(value, leaves, scale)
        else:
            gradients = [*op.gradient(*leaves, *parameters)]
        pairs = zip(gradients, variables, strict=True)
        return [value, *(g if variable.differentiated else None for g, variable in pairs)]

    e, (value, *gradients) = kernel.expressions(run, traced_dtypes(op, operands))
    if op.gradient is not None:
        gradients = [e.scaled(gradient) for gradient in gradients]
    return [Method([variable.name for variable in variables], e, [value, *gradients])]


def traced_dtypes(op: PointwiseLoss, operands: int) -> list[torch.dtype]:
    """Returns the dtypes of the first operands in a trace."""
    return [torch.bool if k in op.masks else torch.float64 for k in range(operands)]


# ---- the operator --------------------------------------------------------------------------------


@dataclass(eq=False, kw_only=True, repr=False)
class PointwiseLoss(Operator):
    """A loss that applies a formula to each element of the operands, with an optional weight.

    If an optional last operand is passed, another kernel runs, with the operand's name appended.
    Otherwise the formula receives None for it, and the gradient omits its derivative.

    Attributes:
        formula: Computes the loss of an element by torch's operators, from the operands, the
            numbers and the choices that have their own kernels.
        gradient: Takes the same arguments, and returns the derivative by each operand, or None for
            no derivative. If it is None, derivatives are derived from the formula.
        kernels_of: Takes the operator, and returns what finds its kernels: `source`.
        torch_backward: Takes the gradient of the unreduced loss, the operands and the options, and
            returns the gradient of the input in torch's operators, for second derivatives. None
            differentiates `reference` twice, which takes longer.
        clamps: Whether the formula's derivative depends on torch's derivative of clamp at a bound.
        masks: The indices of the operands that are bool in the formula.
        nan_on_invalid: Whether the formula is NaN for values that torch's function refuses. If a
            kernel on a CPU reports NaN, torch's function is called, and raises its error.
        denominators: A function for each reduction except none and sum, which takes the broadcast
            operands, the weight and the options, and returns the divisor of the sum: a tensor, or a
            number if it depends only on the shape of the operands.
        reads_values: Whether a denominator depends on the values of operands.
        arrange: Transforms the operands as torch does before broadcasting.
        reduces: Whether the result is reduced: True for losses, False for activations.
        infers_dtype: Whether the result's dtype may differ even if all operands have one dtype.
        variables: The operands of the formula: all except the weight.
        uniform: The number of tensors of a call that kernels take as they are, if all have one
            shape and one dtype; 0 if they always have to be arranged.
    """

    formula: Callable[..., Tensor]
    gradient: Callable[..., Gradients] | None = None
    kernels_of: Callable[..., Any] = DeclaredKernels
    torch_backward: Callable[..., Tensor] | None = None
    clamps: bool = False
    masks: tuple[int, ...] = ()
    nan_on_invalid: bool = False
    denominators: Mapping[str, Denominator] = field(default_factory=lambda: {"mean": elements})
    reads_values: bool = False
    arrange: Callable[..., Sequence[Tensor]] | None = None
    reduces: bool = True
    infers_dtype: bool = False
    variables: tuple[Operand, ...] = field(init=False)
    uniform: int = field(init=False)

    def __post_init__(self) -> None:
        if self.torch is None:
            self.torch = self._by_formula
        super().__post_init__()
        self.check_shapes = self._check_shapes
        self.variables = tuple(o for o in self.operands if o.name != "weight" or not o.optional)
        self.num_differentiable = len(self.variables)
        self._indices = [self.names.index(variable.name) for variable in self.variables]
        has_weight = len(self.variables) < len(self.operands)
        self._weight = self.names.index("weight") if has_weight else None
        required = [i for i, x in zip(self._indices, self.variables, strict=True) if not x.optional]
        self.broadcast = () if self.arrange is not None else tuple(required[1:])
        is_arranged = self.arrange is not None or self.reads_values or bool(self.masks)
        in_order = required == [*range(len(required))]
        self.uniform = len(required) if in_order and not is_arranged else 0
        self.source = self.kernels_of(self)
        self._cached_dtypes = cache(self._inferred_dtypes)
        self._cached_keeps_dtype = cache(self._keeps_dtype)

    @property
    def kernels(self) -> dict[str, Kernel]:
        """Returns the kernels of the declaration by name."""
        return self.source.kernels  # type: ignore[no-any-return]

    # ---- calls -----------------------------------------------------------------------------------

    def unsupported(self, tensors: Tensors, options: Options) -> str | None:
        is_unreduced = not self.reduces or options.reduction == "none"
        if is_unreduced and not have_one_order([x for x in tensors if isinstance(x, Tensor)]):
            return "the operands have different memory orders"
        if self._is_uniform(tensors):
            return None
        if reason := super().unsupported(tensors, options):
            return reason
        dtype, result = self._dtypes(tensors, options)
        return None if result is dtype else f"the result has dtype {result}, an operand a wider one"

    def prepare(self, tensors: Tensors, options: Options) -> Tensors:
        """Returns the operands, the weight, and the divisor of the sum.

        They have one dtype and one shape. The weight may be None. The divisor is None unless it
        depends on values.
        """
        if self._is_uniform(tensors):
            return *tensors[: self.uniform], None, None
        (operands, weight), (dtype, _) = self._split(tensors), self._dtypes(tensors, options)
        if self.arrange is not None:
            operands = self.arrange(*operands)
        # Operands are cast before broadcasting: gradients are then summed before rounding.
        operands = [x if x.dtype is dtype else x.to(dtype) for x in operands]
        shape = operands[0].shape
        if any([x.shape != shape for x in operands]):  # noqa: C419 a generator is slower
            operands = torch.broadcast_tensors(*operands)
        # torch's mean divides by the sum of the weight before it is broadcast.
        divisor = self._divisor(operands, weight, options)
        if weight is not None:
            weight = weight.to(dtype).expand_as(operands[0])
        return *operands, weight, divisor if isinstance(divisor, Tensor) else None

    def forward(self, inputs: Tensors, options: Options, needs: Needs) -> Forward:
        dtype, reduction = inputs[0].dtype, options.reduction if self.reduces else "none"
        needed: Needs = ()
        if True in needs and gradients_in_forward(reduction, dtype):
            needed = needs
        loss, gradients = self._launch(inputs, options, True, needed)
        loss = loss if loss.dtype is dtype else loss.to(dtype)
        return loss, inputs, gradients if needed else ()

    def backward(
        self, saved: Tensors, options: Options, needs: Needs, grad_output: Tensor
    ) -> Gradients:
        grad_output = grad_output.expand_as(saved[0])
        gradients: Gradients = self._launch(saved, options, False, needs, grad_output)[1]
        return gradients

    def reference_backward(
        self, saved: Tensors, options: Options, needs: Needs, grad_output: Tensor
    ) -> Gradients:
        *operands, weight, divisor = saved
        needs = needs[: len(operands)]
        if divisor is None:
            divisor = self._divisor(operands, None, options)
        is_wide = operands[0].dtype in (torch.float32, torch.float64)
        if self.torch_backward is not None and is_wide and True not in needs[1:]:
            if divisor is not None:
                grad_output = (grad_output / divisor).to(grad_output.dtype)
            grad_output = grad_output.expand_as(operands[0])
            grad_output = grad_output if weight is None else grad_output * weight
            return self.torch_backward(grad_output, operands, options), *[None] * (len(needs) - 1)
        is_torchs = weight is saved[-1] is None

        def definition(*operands: Tensor) -> Tensor:
            if is_torchs:
                return self._defined(operands, options)
            loss = self._unreduced(operands, options)
            loss = loss if divisor is None else (loss / divisor).to(loss.dtype)
            return loss if weight is None else loss * weight

        grad_output = grad_output if is_torchs else grad_output.expand_as(operands[0])
        return differentiate(definition, operands, needs, grad_output)

    def _launch(
        self,
        inputs: Tensors,
        options: Options,
        loss: bool,
        needs: Needs,
        grad_output: Tensor | None = None,
    ) -> Any:
        """Runs the kernel, and returns the loss and the gradients of the operands.

        Args:
            loss: Whether to compute the loss.
            needs: Whether each operand needs a gradient; () to compute none.
        """
        *operands, weight, divisor = inputs
        count, dtype, reduction = len(operands), operands[0].dtype, "none"
        if self.reduces:
            reduction = options.reduction
            if divisor is None and reduction in self.denominators:
                divisor = self.denominators[reduction](operands, None, options)
        outputs = outputs_of(loss, tuple(needs[:count]), False, dtype if loss else None)
        cases = self.source.cases_of(options) if self.parameters else ()
        kernel, parameters = self.source.find(cases, count, outputs)
        on_nan = partial(self._unreduced, operands, options) if self.nan_on_invalid else None
        arguments = operands, weight, parameters(options), reduction, outputs, divisor, grad_output
        return backend_of(operands[0]).pointwise_loss(kernel, *arguments, on_nan)

    # ---- the tensors of a call -------------------------------------------------------------------

    def _is_uniform(self, tensors: Tensors) -> bool:
        """Returns whether kernels take the tensors as they are.

        They have one shape and one dtype, which is the result's, and no weight is passed.
        """
        dtype, shape, count = tensors[0].dtype, tensors[0].shape, self.uniform
        if not count or any_autocast():
            return False
        for x in tensors[1:count]:
            if x.dtype is not dtype or x.shape != shape:
                return False
        for x in tensors[count:]:
            if x is not None:
                return False
        if not self.infers_dtype:
            return True
        return bool(shape) and self._cached_keeps_dtype(dtype, torch.get_default_dtype())

    def _split(self, tensors: Sequence[Any]) -> tuple[Sequence[Any], Any]:
        """Returns the operands without a missing one, and the weight or None."""
        operands = [tensors[i] for i in self._indices]
        if operands[-1] is None:
            operands.pop()
        return operands, None if self._weight is None else tensors[self._weight]

    def _divisor(
        self, operands: Sequence[Tensor], weight: Tensor | None, options: Options
    ) -> Divisor | None:
        """Returns the divisor of the sum, None if the reduction has none."""
        denominator = self.denominators.get(options.reduction) if self.reduces else None
        return None if denominator is None else denominator(operands, weight, options)

    def check_choices(self, options: Options) -> None:
        super().check_choices(options)
        words = "none", *self.denominators, "sum"
        if self.reduces and options.reduction not in words:
            checks.one_of("reduction", options.reduction, words)

    def _check_shapes(self, *call: Any) -> None:
        """Checks that the operands broadcast, and that optional ones expand to the input."""
        (operands, weight), first = self._split(call[:-1]), self.variables[0].name
        if self.arrange is None:
            for k, (operand, x) in enumerate(zip(self.variables, operands, strict=False)):
                for earlier in operands[:k]:
                    checks.broadcasts(operand.name, x, first, earlier, expands=operand.optional)
        if weight is not None:
            checks.broadcasts("weight", weight, first, operands[0], expands=True)

    def _dtypes(self, tensors: Tensors, options: Options) -> tuple[torch.dtype, torch.dtype]:
        """Returns the dtype in which kernels take the operands, and the dtype of the result."""
        dtype, device = tensors[0].dtype, tensors[0].device
        to = None
        if torch.is_autocast_enabled(device.type):
            to = torch.get_autocast_dtype(device.type)
        kinds = tuple([
            (x.dtype, x.dim() > 0) if isinstance(x, Tensor) else None for x in tensors
        ])  # fmt: skip
        if to is None and not self.infers_dtype and {kind[0] for kind in kinds if kind} == {dtype}:
            return dtype, dtype
        reduction = options.reduction if self.reduces else "none"
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
            result: torch.dtype = self.reference(*ones, options).dtype
        return reduce(torch.promote_types, dtypes, result), result

    def _keeps_dtype(self, dtype: torch.dtype, default: torch.dtype) -> bool:
        """Returns whether the result has the dtype of the operands, if all have this one."""
        kinds = [(dtype, True) if i < self.uniform else None for i in range(len(self.operands))]
        modes = None, default
        return self._inferred_dtypes(tuple(kinds), torch.device("cpu"), modes, "none")[1] is dtype

    # ---- definitions -----------------------------------------------------------------------------

    def _defined(self, operands: Sequence[Tensor], options: Options) -> Tensor:
        """Computes the loss by torch's operators, from the variables of the formula."""
        by_name = {v.name: x for v, x in zip(self.variables, operands, strict=False)}
        loss: Tensor = self.reference(*[by_name.get(x.name) for x in self.operands], options)
        return loss

    def _unreduced(self, operands: Sequence[Tensor], options: Options) -> Tensor:
        options = options._replace(reduction="none") if self.reduces else options
        return self._defined(operands, options)

    def _by_formula(self, *arguments: Any) -> Tensor:
        """Returns the result, for an operator that torch lacks."""
        *tensors, options = arguments
        operands, count = [tensors[i] for i in self._indices], len(self.numbers)
        numbers = [float(x) if isinstance(x, int) else x for x in options[:count]]
        choices = options[count : len(self.parameters)]
        result = self.formula(*operands, *in_tensors(numbers, operands), *choices)
        if not result.dim():  # float32 numbers promote operands of half precision
            result = result.to(common_dtype(*operands))
        if not self.reduces:
            return result
        weight = None if self._weight is None else tensors[self._weight]
        return reduced(result, options.reduction, weight)
