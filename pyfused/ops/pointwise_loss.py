"""Pointwise losses, f(input, target, ...) of each element, and activations of several tensors."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial, reduce
from operator import is_, itemgetter
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import Parameter
from torch.nn import functional as F

from pyfused import checks
from pyfused.backends import Backend, backend_of
from pyfused.backends.protocol import LossKernel, Parameters
from pyfused.dispatch.autograd import differentiate
from pyfused.dispatch.operator import REDUCTIONS, Arguments, Numbers, Operand, Operator
from pyfused.dispatch.plan import (
    Forward,
    Plan,
    gradients_in_forward,
    loss_passes,
    needs_grad,
)
from pyfused.dispatch.reasons import stacklevel
from pyfused.formula_compiler import trace
from pyfused.formula_compiler.kernel import Kernel, Method
from pyfused.formula_compiler.program import Program
from pyfused.layout import accumulate_dtype
from pyfused.ops.custom_operators import custom_operator
from pyfused.torch_internals import built_in
from pyfused.types import NUMBER, TENSORS, Gradients, Outputs, TensorSpec

# Parameters of torch's Python functions that the built-in ones lack.
_PYTHON_PARAMETERS = ("size_average", "reduce", "weight")

_BROADCASTING = (
    "Using a target size ({}) that is different to the input size ({}). This will likely lead to "
    "incorrect results due to broadcasting. Please ensure they have the same size."
)

_SCALAR = torch.empty((), device="meta")  # the layout of an operand that is a number

Denominator = Callable[[Sequence[Tensor], Tensor | None, Sequence[Any]], float | Tensor]


def reduced(loss: Tensor, reduction: str, weight: Tensor | None = None) -> Tensor:
    """Reduces losses; a weighted mean divides by the sum of the weights."""
    if weight is not None:
        checks.tensor("weight", weight)
        checks.weight_that_broadcasts(loss, weight)
    if reduction == "none":
        return loss if weight is None else loss * weight
    checks.reduction(reduction)
    if weight is None:
        return loss.mean() if reduction == "mean" else loss.sum()
    total = (loss * weight).sum()
    return total / weight.expand_as(loss).sum() if reduction == "mean" else total


def elements(operands: Sequence[Tensor], *_: Any) -> float:
    return float(operands[0].numel())


def weight_or_elements(
    operands: Sequence[Tensor], weight: Tensor | None, *_: Any
) -> float | Tensor:
    return elements(operands) if weight is None else weight.sum(dtype=torch.float64)


@dataclass(eq=False, kw_only=True, repr=False)
class TensorLoss(Operator):
    """A loss of several tensors, which are broadcast, with an optional weight and a reduction.

    Attributes:
        shapes: Raises for incompatible shapes of the operands, which are passed by name.
        warns: Whether torch warns if the target's shape differs from the input's. Apart from this
            and weights, torch's Python function only calls the built-in one of its name.
        warning: Returns the warning that torch issues for the arguments, or None.
        nan_on_invalid: Whether operands out of bounds make the loss NaN, so that bounds need to be
            checked only then.
        weight_shape: Raises if the shape of ``weight`` is incompatible with the input.
        denominators: For each reduction but none and sum, returns the divisor of the sum, given the
            broadcast operands, the weight and the scalars.
        arrange: Transforms the operands as torch does before broadcasting.
        variables: The operands of the formula: all but the weight.
        checks_bounds: Whether each call checks the bounds of values, as torch does.
        reduces: Whether the result is reduced: True for losses, False for activations.
        infers_dtype: Whether the result may have another dtype than operands of equal dtypes.
    """

    shapes: Callable[..., None] = checks.broadcasting
    warns: bool = False
    warning: Callable[[Arguments], str | None] | None = None
    nan_on_invalid: bool = False
    weight_shape: Callable[..., None] | None = None
    denominators: Mapping[str, Denominator] = field(default_factory=lambda: {"mean": elements})
    arrange: Callable[..., Sequence[Tensor]] | None = None
    variables: tuple[Operand, ...] = field(init=False)
    checks_bounds: bool = field(init=False)
    reduces: ClassVar[bool] = True
    infers_dtype: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.variables = tuple(o for o in self.operands if o.name != "weight" or not o.optional)
        index = self.arguments.index
        indices = [index(variable.name) for variable in self.variables]
        self._values: Callable[[Arguments], Sequence[Any]] = itemgetter(
            *indices if len(indices) > 1 else [slice(1)]
        )
        enforces = any(variable.enforced is not None for variable in self.variables)
        self.checks_bounds = enforces and not self.nan_on_invalid
        self.broadcast = tuple(indices[1:]) if self.arrange is None else ()
        self._weight = index("weight") if self.weight_shape is not None else None

    def plan(self, arguments: Arguments, inplace: bool) -> Plan:  # noqa: ARG002
        """Checks a call, and returns the plan of its signature.

        The plan's tensors are the operands, the weight or None, and the divisor of the sum, None if
        it does not depend on values.
        """
        operands, weight, reduction = self.checked(arguments)
        dtype, result = self._dtypes(arguments, operands[0], reduction)
        needs, cases = needs_grad(operands), self.cases_of(arguments)
        backend = backend_of(operands[0])
        warning = None if self.warning is None else self.warning(arguments)
        *layouts, layout_of_weight = [
            x.empty() if isinstance(x, TensorSpec) else _SCALAR if x is NUMBER else x
            for x in (*operands, weight)
        ]
        arranged, _ = self.arranged(layouts, None, dtype)
        is_arranged = weight is None and all(map(is_, layouts, arranged))
        denominator, divisor = self.denominators.get(reduction), 1.0
        if denominator is not None:
            value = denominator(arranged, layout_of_weight, cases)
            if not isinstance(value, Tensor):  # it does not depend on the values of tensors
                denominator, divisor = None, value

        def arrange(arguments: Arguments) -> Sequence[Any]:
            operands, weight, tensor = self._values(arguments), None, None
            if operands[-1] is None:
                operands = operands[:-1]
            if self._weight is not None:
                weight = arguments[self._weight]
            if self.checks_bounds:
                self._bounds(operands)
            if warning is not None:
                warnings.warn(warning, stacklevel=stacklevel())
            unexpanded = weight  # torch's mean divides by its sum before broadcasting
            if not is_arranged:
                operands, weight = self.arranged(operands, weight, dtype)
            if denominator is not None:
                tensor = denominator(operands, unexpanded, self.cases_of(arguments))
            return *operands, weight, tensor

        def prepare(tensors: Sequence[Any], outputs: Outputs, grad_output: Any) -> LossKernel:
            return self.prepared(backend, tensors, cases, reduction, outputs, divisor, grad_output)

        def define(tensors: Sequence[Any], numbers: Numbers, grad_output: Tensor) -> Gradients:
            *operands, weight, tensor = tensors
            values = self.with_numbers(cases, numbers)

            def definition(*operands: Tensor) -> Tensor:
                loss = self.unreduced(operands, values)
                loss = (loss / (divisor if tensor is None else tensor)).to(loss.dtype)
                return loss if weight is None else loss * weight

            return differentiate(definition, operands, needs, self.expanded(grad_output, operands))

        def finish(loss: Tensor, arguments: Arguments) -> Tensor:
            if self.nan_on_invalid and not backend.ASYNCHRONOUS and loss.sum().isnan():
                self._bounds(self._values(arguments))
            return loss if loss.dtype is result else loss.to(result)

        in_forward, each = gradients_in_forward(reduction, dtype), reduction == "none"
        casts = accumulate_dtype(dtype) is not result
        loss_dtype = result if casts and not each else None
        passes = loss_passes(prepare, needs, in_forward, loss_dtype=loss_dtype)
        forward, expanded_backward = passes
        is_result_dtype = not each or dtype is result is accumulate_dtype(dtype)
        return Plan(
            name=self.name,
            backend=backend,
            needs=needs,
            arrange=arrange,
            forward=forward,
            backward=lambda tensors, numbers, grad_output: expanded_backward(
                tensors, numbers, self.expanded(grad_output, tensors)
            ),
            define=define,
            finish=None if is_result_dtype and not self.nan_on_invalid else finish,
        )

    def arranged(
        self, operands: Sequence[Any], weight: Tensor | None, dtype: torch.dtype
    ) -> tuple[Sequence[Tensor], Tensor | None]:
        """Converts the operands and the weight to one shape and dtype."""
        if self.arrange is not None:
            operands = self.arrange(*operands)
        # Operands are cast before broadcasting, so that gradients are summed before rounding.
        operands = [x if x.dtype is dtype else x.to(dtype) for x in operands]
        if any(operand.shape != operands[0].shape for operand in operands):
            operands = torch.broadcast_tensors(*operands)
        if weight is not None:
            weight = weight.to(dtype).expand_as(operands[0])
        return operands, weight

    @abstractmethod
    def prepared(
        self,
        backend: Backend,
        tensors: Sequence[Any],
        cases: tuple[Any, ...],
        reduction: str,
        outputs: Outputs,
        divisor: float,
        grad_output: Tensor | None,
    ) -> LossKernel:
        """Prepares the kernel for the layouts of these tensors."""

    def expanded(self, grad_output: Tensor, operands: Sequence[Tensor]) -> Tensor:
        """Expands grad_output to the shape of the unreduced loss."""
        return grad_output.expand_as(operands[0])

    def compiled(self, arguments: Arguments) -> Any:
        return custom_operator(self.name)(*arguments)

    def cases_of(self, arguments: Arguments) -> tuple[Any, ...]:
        """Returns the cases of the scalars, given the arguments for planning."""
        pairs = [(arguments[index], scalar) for index, scalar in self.indexed_scalars]
        return tuple([bool(value) if scalar.flag else value for value, scalar in pairs])

    def with_numbers(self, cases: tuple[Any, ...], numbers: Numbers) -> tuple[Any, ...]:
        """Returns the values of the scalars in a call."""
        by_name = {scalar.name: value for scalar, value in zip(self.numbers, numbers, strict=True)}
        pairs = zip(self.scalars, cases, strict=True)
        return tuple([by_name.get(scalar.name, case) for scalar, case in pairs])

    def unreduced(self, operands: Sequence[Tensor], scalars: tuple[Any, ...]) -> Tensor:
        """Computes the unreduced loss by torch's operator."""
        given: dict[str, Any] = {"reduction": "none"} if self.reduces else {}
        given |= {s.name: value for s, value in zip(self.scalars, scalars, strict=True)}
        given |= {v.name: x for v, x in zip(self.variables, operands, strict=False)}
        return self.reference(**given)

    def check(self, arguments: Arguments) -> None:
        super().check(arguments)
        operands, *_ = self.checked(arguments)
        self._bounds(operands)

    def _bounds(self, operands: Sequence[Any]) -> None:
        for operand, value in zip(self.variables, operands, strict=False):
            if operand.enforced is not None:
                checks.values(operand.name, value, operand.low, operand.high, operand.enforced)

    def checked(self, arguments: Arguments) -> tuple[Sequence[Any], Any, str]:
        """Returns the operands, the weight or None, and the reduction, after checking them."""
        operands = self._values(arguments)
        if operands[-1] is None:
            operands = operands[:-1]
        weight = None if self._weight is None else arguments[self._weight]
        reduction = self.reduction(arguments)
        self._check(arguments, operands, weight, reduction)
        return operands, weight, reduction

    def _check(
        self,
        arguments: Arguments,
        operands: Sequence[Any],
        weight: Tensor | None,
        reduction: str,
    ) -> None:
        """Raises for invalid options and incompatible shapes."""
        checks.one_of("reduction", reduction, ("none", *self.denominators, "sum"))
        self.check_scalars(arguments)
        self.shapes(**{v.name: x for v, x in zip(self.variables, operands, strict=False)})
        if self.weight_shape is not None and weight is not None:
            self.weight_shape(input=operands[0], weight=weight)

    def _dtypes(
        self, arguments: Arguments, input: Tensor, reduction: str
    ) -> tuple[torch.dtype, torch.dtype]:
        """Returns the dtype in which kernels take the operands, and the dtype of the result."""
        dtype, device = input.dtype, input.device
        values = [(operand.name, arguments[i]) for i, operand in self.indexed_operands]
        tensors = [(name, value) for name, value in values if isinstance(value, TENSORS)]
        is_equal = all(tensor.dtype is dtype for _, tensor in tensors)
        autocast = torch.is_autocast_enabled(device.type)
        if is_equal and not autocast and not self.infers_dtype:
            return dtype, dtype
        to = torch.get_autocast_dtype(device.type) if autocast else None
        kinds = tuple([(name, tensor.dtype, min(tensor.dim(), 1)) for name, tensor in tensors])
        modes = to, torch.get_default_dtype()
        result = result_dtype(self, kinds, device, modes, reduction == "none")
        return reduce(torch.promote_types, [kind[1] for kind in kinds], result), result


@dataclass(eq=False, kw_only=True, repr=False)
class PointwiseLoss(TensorLoss):
    """A loss that applies a formula to each element of the operands.

    If an optional last operand is passed, another kernel runs, with the operand's name appended.
    Otherwise the formula receives None for it, and the gradient omits its derivative.

    Attributes:
        formula: The loss of an element in torch's operators, given the operands and the scalars.
        gradient: The derivative for each operand, None for no derivative, given the same arguments.
            None derives them from the formula.
        clamps: Whether the formula's derivative depends on torch's derivative of clamp at a bound.
    """

    formula: Callable[..., Tensor]
    gradient: Callable[..., Gradients] | None = None
    clamps: bool = False

    def __post_init__(self) -> None:
        if self.definition is None and not hasattr(F, self.name):
            last = {"reduction": "mean"} if self.reduces else {}
            self.definition = self.definition_of(self._by_formula, **last)
        super().__post_init__()
        names = [operand.name for operand in self.variables] + [s.name for s in self.scalars]
        self._formula_arguments = itemgetter(*map(self.arguments.index, names))
        if self.warns:
            self.warning, self.builtin = _broadcasting_warning, self._built_in()

    @cached_property
    def kernels(self) -> dict[str, Kernel]:
        """Returns the kernels by name, one for each flag, word and optional last operand."""
        kernels = {}
        required = sum(not variable.optional for variable in self.variables)
        for stem, case in self.kernel_cases():
            for operands in range(required, len(self.variables) + 1):
                name = self._kernel_name(stem, operands)
                kernels[name] = Kernel(name, case, partial(self._trace_kernel, operands))
        return kernels

    def kernel(
        self, cases: tuple[Any, ...], operands: int, outputs: Outputs
    ) -> tuple[Kernel | Program, Parameters | None]:
        """Returns the kernel for cases of the scalars, and the function of its parameters."""
        kernel = self.kernels[self._kernel_name(self.kernel_of(cases), operands)]
        parameters = self._parameters(kernel)
        if self.clamps and not trace.clamp_is_inclusive():  # the C++ kernels are
            return kernel.program(outputs), parameters
        return kernel, parameters

    def _parameters(self, kernel: Kernel) -> Parameters | None:
        """Returns the function of a kernel's parameters, None if these are the call's numbers."""
        needed = [i for i, x in enumerate(self.numbers) if kernel.case.get(x.name) is NUMBER]
        if len(needed) == len(self.numbers) and not any(x.optional for x in self.numbers):
            return None
        nan = math.nan
        return lambda numbers: tuple([nan if (x := numbers[i]) is None else x for i in needed])

    def _kernel_name(self, stem: str, operands: int) -> str:
        last = self.variables[operands - 1]
        return f"{stem}_{last.name}" if last.optional else stem

    def _trace_kernel(self, operands: int, kernel: Kernel) -> list[Method]:
        """Traces the loss of one element and its gradients."""
        variables = self.variables[:operands]
        missing = [None] * (len(self.variables) - operands)

        def run(leaves: list[Tensor], numbers: list[Tensor], scale: Tensor) -> list[Tensor | None]:
            scalars = [*missing, *kernel.scalars(numbers)]
            value = self.formula(*leaves, *scalars)
            if self.gradient is None:
                gradients = trace.gradients_of(value, leaves, scale)
            else:
                gradients = [*self.gradient(*leaves, *scalars)]
            pairs = zip(gradients, variables, strict=True)
            return [value, *(g if variable.differentiated else None for g, variable in pairs)]

        e, (value, *gradients) = kernel.expressions(run, operands)
        if self.gradient is not None:
            gradients = [e.scaled(gradient) for gradient in gradients]
        return [Method([variable.name for variable in variables], e, [value, *gradients])]

    def prepared(
        self,
        backend: Backend,
        tensors: Sequence[Any],
        cases: tuple[Any, ...],
        reduction: str,
        outputs: Outputs,
        divisor: float,
        grad_output: Tensor | None,
    ) -> LossKernel:
        *operands, weight, _ = tensors
        formula, parameters = self.kernel(cases, len(operands), outputs)
        layouts = tuple(operands), weight, grad_output
        return backend.pointwise_loss(formula, layouts, parameters, reduction, outputs, divisor)

    def _by_formula(self, *arguments: Any) -> Tensor:
        result = self.formula(*self._formula_arguments(arguments))
        if self._reduction is None:
            return result
        weight = None if self._weight is None else arguments[self._weight]
        return reduced(result, arguments[self._reduction], weight)

    def _built_in(self) -> Callable[..., Tensor]:
        """Returns a faster variant of torch's function, whose warning names the caller's line."""
        reference = self.reference
        built_in_loss = built_in(self.name, reference)
        python_only = [i for i, name in enumerate(self.arguments) if name in _PYTHON_PARAMETERS]
        scalars = [index for index, _ in self.indexed_scalars]
        reduction_index = self.arguments.index("reduction")

        def builtin(*arguments: Any) -> Tensor:
            input, target = arguments[:2]
            reduction = REDUCTIONS.get(arguments[reduction_index])
            if reduction is None or type(target) not in (Tensor, Parameter):
                return reference(*arguments)
            for index in python_only:
                if arguments[index] is not None:
                    return reference(*arguments)
            if input.shape != target.shape:
                if is_dynamo_compiling():  # Dynamo cannot trace a warning
                    return reference(*arguments)
                message = _BROADCASTING.format(target.shape, input.shape)
                warnings.warn(message, stacklevel=stacklevel())
                input, target = torch.broadcast_tensors(input, target)
            numbers = [arguments[index] for index in scalars]
            # smooth_l1_loss calls l1_loss if beta is 0; a compiler cannot compare a tensor.
            if numbers and (isinstance(numbers[0], Tensor) or numbers[0] == 0.0):
                return reference(input, target, *arguments[2:])
            loss: Tensor = built_in_loss(input, target, reduction, *numbers)
            return loss

        return builtin


class Gated(PointwiseLoss):
    """An activation of several tensors, such as a gate, computed as an unreduced loss."""

    reduces = False

    def takes_second_limit(self, arguments: Arguments, few: int) -> bool:  # noqa: ARG002
        return self.needs_no_gradient(arguments)

    def unreduced(self, operands: Sequence[Tensor], scalars: tuple[Any, ...]) -> Tensor:
        return self.formula(*operands, *scalars)


class Halves(Gated):
    """An activation whose formula applies to the two halves of a tensor along ``dim``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.variables = Operand("first"), Operand("second")

    def check(self, arguments: Arguments) -> None:
        checks.halves(*arguments)

    def plan(self, arguments: Arguments, inplace: bool) -> Plan:  # noqa: ARG002
        """Returns the plan of a signature. Autograd sees one tensor rather than the halves."""
        input, dim = arguments
        needs, dim = needs_grad((input,)), dim % input.dim()
        backend: Backend = backend_of(input)

        def prepare(tensors: Sequence[Any], outputs: Outputs, grad_output: Any) -> LossKernel:
            formula, _ = self.kernel((), 2, outputs)
            layouts = tuple(tensors[:2]), None, grad_output
            return backend.pointwise_loss(formula, layouts, None, "none", outputs, 1.0, dim)

        halves_forward, halves_backward = loss_passes(prepare, needs * 2, False)

        def forward(tensors: Sequence[Any], numbers: Numbers) -> Forward:
            output, *_ = halves_forward((*tensors[0].chunk(2, dim), None, None), numbers)
            return output, tensors, ()

        def backward(tensors: Sequence[Any], numbers: Numbers, grad_output: Tensor) -> Gradients:
            halves = tensors[0].contiguous().chunk(2, dim)
            if any(grad_output.stride()):
                grad_output = grad_output.contiguous()
            return halves_backward((*halves, None, None), numbers, grad_output)

        def define(tensors: Sequence[Any], _: Numbers, grad_output: Tensor) -> Gradients:
            definition = lambda input: self.reference(input, dim)  # noqa: E731
            return differentiate(definition, tensors, (True,), grad_output)

        return Plan(
            name=self.name,
            backend=backend,
            needs=needs,
            arrange=lambda arguments: arguments[:1],
            forward=forward,
            backward=backward,
            define=define,
        )


@cache
def result_dtype(
    op: TensorLoss,
    kinds: tuple[tuple[str, torch.dtype, int], ...],
    device: torch.device,
    modes: tuple[torch.dtype | None, torch.dtype],  # noqa: ARG001 part of the key
    unreduced: bool,
) -> torch.dtype:
    """Returns the dtype of torch's result, from a call of torch's operator with one element.

    No rule predicts it: autocast may widen some of the operators that a loss consists of, and
    torch may overwrite an operand in another dtype.

    Args:
        kinds: The name, the dtype and the number of dimensions, 0 or 1, of each tensor.
        modes: The dtype of autocast, None if it is disabled, and the default dtype.
    """
    ones: dict[str, Any] = {operand.name: 1.0 for operand in op.operands if operand.number}
    for name, dtype, dim in kinds:
        ones[name] = torch.ones([1] * dim, dtype=dtype, device=device)
    with torch.no_grad():
        reduction = {"reduction": "none" if unreduced else "sum"} if op.reduces else {}
        return op.reference(**ones, **reduction).dtype


def _broadcasting_warning(arguments: Arguments) -> str | None:
    input, target = arguments[:2]
    same = input.shape == target.shape
    return None if same else _BROADCASTING.format(target.shape, input.shape)
