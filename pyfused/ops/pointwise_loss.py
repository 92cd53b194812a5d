"""Pointwise losses: their declaration, and what computes them."""

from __future__ import annotations

import inspect
import math
import sys
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial, reduce
from itertools import product
from operator import itemgetter
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import Parameter
from torch.nn import functional as F

from pyfused import checks
from pyfused.backends import Backend, backend_of
from pyfused.dispatch.autograd import differentiate
from pyfused.dispatch.operator import (
    REDUCTIONS,
    Arguments,
    Operand,
    Operator,
    Scalar,
    reduction_of,
)
from pyfused.dispatch.plan import (
    Forward,
    Launch,
    Plan,
    gradients_in_forward,
    loss_passes,
    needs_grad,
)
from pyfused.formulas import trace
from pyfused.formulas.kernel import Kernel, Method
from pyfused.formulas.program import Program
from pyfused.layout import accumulate_dtype
from pyfused.ops.custom_operators import PACKAGE, custom_operator
from pyfused.torch_internals import built_in
from pyfused.types import TENSORS, Gradients, Outputs

_OF_PYTHON = ("size_average", "reduce", "weight")  # which those do not take

Denominator = Callable[[Sequence[Tensor], Tensor | None, Sequence[Any]], float | Tensor]


def reduced(each: Tensor, reduction: str, weight: Tensor | None = None) -> Tensor:
    """Returns the losses, their sum or their mean, which divides by the sum of the weights."""
    if weight is not None:
        checks.tensor("weight", weight)
        checks.weight_that_broadcasts(each, weight)
    if reduction == "none":
        return each if weight is None else each * weight
    checks.reduction(reduction)
    if weight is None:
        return each.mean() if reduction == "mean" else each.sum()
    total = (each * weight).sum()
    return total / weight.expand_as(each).sum() if reduction == "mean" else total


def elements(operands: Sequence[Tensor], *_: Any) -> float:
    return float(operands[0].numel())


def weight_or_elements(
    operands: Sequence[Tensor], weight: Tensor | None, *_: Any
) -> float | Tensor:
    return elements(operands) if weight is None else weight.sum(dtype=torch.float64)


@dataclass(eq=False, kw_only=True, repr=False)
class TensorLoss(Operator):
    """A loss of several tensors that broadcast, multiplied by ``weight``, and reduced.

    Attributes:
        shapes: Raises where shapes of the operands do not go together.
        warns: Whether torch warns of an input and a target that broadcast. Beside that, and
            weights, its function does no more than call the built-in one of its name.
        warning: What torch warns of in a call with a reduction, None where of nothing.
        nan_on_invalid: An operand out of its bounds makes the loss NaN, so no check comes before.
        weight_shape: Raises where ``weight`` does not go with the input.
        denominators: What the sum is divided by in each reduction but none and sum, from the
            expanded operands, the weight and the scalars.
        arrange: What torch makes of the operands before they broadcast.
        variables: The operands that the loss of an element is computed from: all but the weight.
        enforces: Whether torch raises for values of an operand.
        reduces: Whether it is a loss, rather than an activation of several tensors.
        asks_dtype: Whether the result of operands of one dtype may have another.
    """

    shapes: Callable[..., None] = checks.broadcasting
    warns: bool = False
    warning: Callable[[Arguments], str | None] | None = None
    nan_on_invalid: bool = False
    weight_shape: Callable[[Tensor, Tensor], None] | None = None
    denominators: Mapping[str, Denominator] = field(default_factory=lambda: {"mean": elements})
    arrange: Callable[..., Sequence[Tensor]] | None = None
    variables: tuple[Operand, ...] = field(init=False)
    enforces: bool = field(init=False)
    reduces: ClassVar[bool] = True
    asks_dtype: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.variables = tuple(o for o in self.operands if o.name != "weight" or not o.optional)
        place = self.arguments.index
        places = [place(variable.name) for variable in self.variables]
        self._values: Callable[[Arguments], Sequence[Any]] = itemgetter(
            *places if len(places) > 1 else [slice(1)]
        )
        self.enforces = any(v.enforced is not None for v in self.variables)
        self.broadcast = tuple(places[1:]) if self.arrange is None else ()
        self._weight = place("weight") if self.weight_shape is not None else None
        legacy = [name for name in ("size_average", "reduce") if name in self.arguments]
        self._legacy = itemgetter(*map(place, legacy)) if legacy else None

    def plan(
        self,
        arguments: Arguments,
        inplace: bool,  # noqa: ARG002
        needs: tuple[bool, ...] | None = None,
    ) -> Plan:
        """Checks a call, and returns the plan of its signature.

        The plan's tensors are the operands, the weight, and the divisor of the sum if that depends
        on values.

        Args:
            needs: Whether each of the first operands needs a gradient; None to ask autograd.
        """
        operands, weight, reduction = self._read(arguments)
        self._check(arguments, operands, weight, reduction)
        dtype, result = self._dtypes(arguments, operands[0], reduction)
        if needs is None:
            needs = needs_grad(operands)
        needs += (False,) * (len(operands) - len(needs))
        backend, numbers = backend_of(operands[0]), self.numbers(arguments)
        warning = None if self.warning is None else self.warning(arguments)
        shape = getattr(operands[0], "shape", None)
        fits = self.arrange is None and weight is None
        for operand in operands:
            fits = fits and isinstance(operand, TENSORS) and operand.shape == shape
            fits = fits and operand.dtype is dtype
        broadcasts = self.warns and operands[1].shape != shape
        denominator, divisor = self.denominators.get(reduction), 1.0

        def divisor_of(operands: Sequence[Tensor], weight: Tensor | None) -> Tensor | None:
            """Returns the divisor if it depends on values; else the first call keeps it."""
            nonlocal denominator, divisor
            if denominator is None:
                return None
            found = denominator(operands, weight, numbers)
            if isinstance(found, Tensor):
                return found
            denominator, divisor = None, found
            return None

        def arrange(arguments: Arguments) -> Sequence[Any]:
            operands, weight = self._values(arguments), None
            if operands[-1] is None:
                operands = operands[:-1]
            if self._weight is not None:
                weight = arguments[self._weight]
            if self.enforces and not self.nan_on_invalid:
                self._bounds(operands)
            if broadcasts:
                _warn_of_broadcasting(operands)
            if warning is not None:
                warnings.warn(warning, stacklevel=_stacklevel())
            given = weight  # torch's mean divides by its sum before it broadcasts
            if not fits:
                operands, weight = self.arranged(operands, weight, dtype)
            tensor = None if denominator is None else divisor_of(operands, given)
            return *operands, weight, tensor

        def prepare(tensors: Sequence[Any], outputs: Outputs, grad_output: Any) -> Launch:
            return self.prepared(
                backend, tensors, numbers, reduction, outputs, divisor, grad_output
            )

        def define(tensors: Sequence[Any], grad_output: Tensor) -> Gradients:
            *operands, weight, tensor = tensors

            def definition(*operands: Tensor) -> Tensor:
                each = self.of_each(operands, numbers)
                loss = (each / (divisor if tensor is None else tensor)).to(each.dtype)
                return loss if weight is None else loss * weight

            return differentiate(definition, operands, needs, self.expanded(grad_output, operands))

        def finish(loss: Tensor, arguments: Arguments) -> Tensor:
            if self.nan_on_invalid and not backend.ASYNCHRONOUS and loss.sum().isnan():
                self._bounds(self._values(arguments))
            return loss if loss.dtype is result else loss.to(result)

        forward, of_expanded = loss_passes(prepare, needs, gradients_in_forward(reduction, dtype))
        in_result_dtype = dtype is accumulate_dtype(dtype) and dtype is result
        return Plan(
            name=self.name,
            backend=backend,
            needs=needs,
            arrange=arrange,
            forward=forward,
            backward=lambda tensors, grad_output: of_expanded(
                tensors, self.expanded(grad_output, tensors)
            ),
            define=define,
            finish=None if in_result_dtype and not self.nan_on_invalid else finish,
        )

    def arranged(
        self, operands: Sequence[Any], weight: Tensor | None, dtype: torch.dtype
    ) -> tuple[Sequence[Tensor], Tensor | None]:
        """Returns the operands in one shape and dtype, and the weight beside them."""
        if self.arrange is not None:
            operands = self.arrange(*operands)
        # Cast first: the gradient of what broadcasts is then added up before it is rounded.
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
        numbers: tuple[Any, ...],
        reduction: str,
        outputs: Outputs,
        divisor: float,
        grad_output: Tensor | None,
    ) -> Launch:
        """Returns the kernel for tensors of these layouts."""

    def expanded(self, grad_output: Tensor, operands: Sequence[Tensor]) -> Tensor:
        """Returns the gradient of each loss before these are reduced."""
        return grad_output.expand_as(operands[0])

    def compiled(self, arguments: Arguments) -> Any:
        return custom_operator(self.name)(*arguments)

    def fake(self, arguments: Arguments) -> Tensor:
        """Returns an empty tensor like the result of the custom operator, which is reduced."""
        empty: Tensor = arguments[0].new_empty(())
        return empty

    def numbers(self, arguments: Arguments) -> tuple[Any, ...]:
        """Returns the values of the scalars, which can be hashed."""
        return tuple([_number(arguments[place], s) for place, s in self.scalar_places])

    def of_each(self, operands: Sequence[Tensor], numbers: tuple[Any, ...]) -> Tensor:
        """Returns the losses in torch's terms."""
        given = zip(self.scalars, numbers, strict=True)
        named = {s.name: bool(number) if s.flag else number for s, number in given}
        for scalar in self.scalars:
            if scalar.optional and named[scalar.name] != named[scalar.name]:
                named[scalar.name] = None  # for which NaN stood
        names = [variable.name for variable in self.variables]
        if self.reduces:
            named["reduction"] = "none"
        return self.reference(**dict(zip(names, operands, strict=False)), **named)

    def check(self, arguments: Arguments) -> None:
        for place, operand in ((0, self.operands[0]), *self.others):
            if arguments[place] is not None or not operand.optional:
                number = float if operand.number else None
                checks.tensor(operand.name, arguments[place], number)
        operands, weight, reduction = self._read(arguments)
        self._check(arguments, operands, weight, reduction)
        self._bounds(operands)

    def _bounds(self, operands: Sequence[Any]) -> None:
        for operand, value in zip(self.variables, operands, strict=False):
            if operand.enforced is not None:
                checks.values(operand.name, value, operand.low, operand.high, operand.enforced)

    def _read(self, arguments: Arguments) -> tuple[Sequence[Any], Tensor | None, str]:
        operands, reduction = self._values(arguments), "none"
        if self._reduction is not None:
            reduction = arguments[self._reduction]
        if operands[-1] is None:
            operands = operands[:-1]
        if self._legacy is not None:
            size_average, reduce = self._legacy(arguments)
            reduction = reduction_of(size_average, reduce, reduction)
        return operands, None if self._weight is None else arguments[self._weight], reduction

    def _check(
        self,
        arguments: Arguments,
        operands: Sequence[Any],
        weight: Tensor | None,
        reduction: str,
    ) -> None:
        """Raises for options and shapes of tensors that do not fit."""
        if reduction not in self.denominators:
            checks.reduction(reduction, ("none", *self.denominators, "sum"))
        self.check_scalars(arguments)
        if operands[1].shape != operands[0].shape or len(operands) > 2 or self.arrange is not None:
            self.shapes(*operands)
        if self.weight_shape is not None and weight is not None:
            self.weight_shape(operands[0], weight)

    def _dtypes(
        self, arguments: Arguments, input: Tensor, reduction: str
    ) -> tuple[torch.dtype, torch.dtype]:
        """Returns what the kernel computes the loss of, and what the loss is returned in."""
        dtype, device, alike = input.dtype, input.device, True
        for place, _ in self.others:
            alike = alike and getattr(arguments[place], "dtype", dtype) is dtype
        autocast = torch.is_autocast_enabled(device.type)
        if alike and not autocast and not self.asks_dtype:
            return dtype, dtype
        to = torch.get_autocast_dtype(device.type) if autocast else None
        given = [(o.name, arguments[i]) for i, o in ((0, self.operands[0]), *self.others)]
        tensors = [(name, value) for name, value in given if isinstance(value, TENSORS)]
        kinds = tuple([(name, tensor.dtype, min(tensor.dim(), 1)) for name, tensor in tensors])
        result = result_dtype(self, kinds, device, to, reduction == "none")
        return reduce(torch.promote_types, [kind[1] for kind in kinds], result), result


@dataclass(eq=False, kw_only=True, repr=False)
class PointwiseLoss(TensorLoss):
    """A loss that is a formula of each element of the operands.

    Where the last operand is optional and given, the kernel is another one, named after both.

    Attributes:
        formula: The loss of each element in torch's terms, from the operands and the scalars.
        gradient: The loss's derivative by each operand, None for none, from the same arguments;
            or None for what torch's rules make of the formula.
    """

    formula: Callable[..., Tensor]
    gradient: Callable[..., Gradients] | None = None

    def __post_init__(self) -> None:
        if self.definition is None and not hasattr(F, self.name):
            self.definition = self._definition()
        super().__post_init__()
        if self.warns:
            self.aten = self._built_in()

    @cached_property
    def kernels(self) -> dict[str, Kernel]:
        """Returns the kernels by name: one for each choice of flags, words and last operand."""
        kernels = {}
        required = sum(not variable.optional for variable in self.variables)
        for values in product(*(scalar.cases for scalar in self.scalars)):
            stem, _ = self.kernel_of(values)
            case = dict(zip([scalar.name for scalar in self.scalars], values, strict=True))
            for operands in range(required, len(self.variables) + 1):
                name = self._kernel_name(stem, operands)
                kernels[name] = Kernel(name, case, partial(self._trace_kernel, operands))
        return kernels

    def kernel(
        self,
        numbers: tuple[Any, ...],
        operands: int,
        outputs: Outputs,  # noqa: ARG002
    ) -> tuple[Kernel | Program, tuple[Any, ...]]:
        """Returns the kernel and its numbers."""
        stem, numbers = self.kernel_of(numbers)
        return self.kernels[self._kernel_name(stem, operands)], numbers

    def _kernel_name(self, stem: str, operands: int) -> str:
        last = self.variables[operands - 1]
        return f"{stem}_{last.name}" if last.optional else stem

    def _trace_kernel(self, operands: int, kernel: Kernel) -> list[Method]:
        """Traces the loss of an element and its gradients."""
        variables = self.variables[:operands]

        def run(leaves: list[Tensor], numbers: list[Tensor], scale: Tensor) -> list[Tensor | None]:
            scalars = kernel.scalars(numbers)
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
        numbers: tuple[Any, ...],
        reduction: str,
        outputs: Outputs,
        divisor: float,
        grad_output: Tensor | None,
    ) -> Launch:
        *operands, weight, _ = tensors
        formula, numbers = self.kernel(numbers, len(operands), outputs)
        layouts = tuple(operands), weight, grad_output
        prepare: Callable[..., Launch] = backend.pointwise_loss
        return prepare(formula, layouts, numbers, reduction, outputs, divisor)

    def _definition(self) -> Callable[..., Tensor]:
        """Returns the function that torch does not have: operands, scalars, reduction."""
        names = [*(operand.name for operand in self.operands), *(s.name for s in self.scalars)]
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter(operand.name, kind) for operand in self.operands]
        defaults = {scalar.name: scalar.default for scalar in self.scalars}
        defaults |= {"reduction": "mean"} if self.reduces else {}
        parameters += [inspect.Parameter(n, kind, default=v) for n, v in defaults.items()]

        signature = inspect.Signature(parameters)

        def definition(*arguments: Any, **by_name: Any) -> Tensor:
            given = defaults | dict(zip(self.arguments, arguments, strict=False)) | by_name
            for operand in self.operands:
                checks.tensor(operand.name, given.get(operand.name))
            self.check_scalars(tuple([given[name] for name in self.arguments]))
            each = self.formula(*[given[name] for name in names])
            return reduced(each, given.get("reduction", "none"))

        definition.__signature__ = signature  # type: ignore[attr-defined]
        return definition

    def _built_in(self) -> Callable[..., Tensor]:
        """torch's function without most of its cost, whose warning names the caller's line."""
        reference = self.reference
        of_torch = built_in(self.name, reference)
        of_python = [i for i, name in enumerate(self.arguments) if name in _OF_PYTHON]
        scalars = [place for place, _ in self.scalar_places]
        reduction_place = self.arguments.index("reduction")

        def aten(*arguments: Any) -> Tensor:
            input, target = arguments[:2]
            reduction = REDUCTIONS.get(arguments[reduction_place])
            if reduction is None or type(target) not in (Tensor, Parameter):
                return reference(*arguments)
            for place in of_python:
                if arguments[place] is not None:
                    return reference(*arguments)
            if input.shape != target.shape:
                if is_dynamo_compiling():  # which cannot trace a warning
                    return reference(*arguments)
                _warn_of_broadcasting((input, target))
                input, target = torch.broadcast_tensors(input, target)
            loss: Tensor = of_torch(input, target, reduction, *[arguments[i] for i in scalars])
            return loss

        return aten


class Gated(PointwiseLoss):
    """An activation of several tensors, such as one that another is a gate of.

    It is computed as a loss is, and not reduced.
    """

    reduces = False

    def takes_second_limit(self, arguments: Arguments, few: int) -> bool:  # noqa: ARG002
        return self.is_forward_alone(arguments)

    def of_each(self, operands: Sequence[Tensor], numbers: tuple[Any, ...]) -> Tensor:
        return self.formula(*operands, *numbers)


class Halves(Gated):
    """An activation of the halves of one tensor along ``dim``, to which the formula applies."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.variables = Operand("first"), Operand("second")
        self._values = lambda arguments: arguments[0].chunk(2, arguments[1])

    def check(self, arguments: Arguments) -> None:
        checks.halves(*arguments)

    def plan(
        self,
        arguments: Arguments,
        inplace: bool,  # noqa: ARG002
        needs: tuple[bool, ...] | None = None,
    ) -> Plan:
        """Returns the plan of a signature: to autograd the halves are one tensor."""
        input, dim = arguments
        needs, dim = needs_grad((input,)) if needs is None else needs, dim % input.dim()
        backend: Backend = backend_of(input)

        def prepare(tensors: Sequence[Any], outputs: Outputs, grad_output: Any) -> Launch:
            formula, numbers = self.kernel((), 2, outputs)
            layouts = tuple(tensors[:2]), None, grad_output
            launch: Launch = backend.pointwise_loss(
                formula, layouts, numbers, "none", outputs, 1.0, dim
            )
            return launch

        of_halves, gradients = loss_passes(prepare, needs * 2, False)

        def forward(tensors: Sequence[Any]) -> Forward:
            output, *_ = of_halves((*tensors[0].chunk(2, dim), None, None))
            return output, tensors, ()

        def backward(tensors: Sequence[Any], grad_output: Tensor) -> Gradients:
            halves = tensors[0].contiguous().chunk(2, dim)
            if any(grad_output.stride()):
                grad_output = grad_output.contiguous()
            return gradients((*halves, None, None), grad_output)

        def define(tensors: Sequence[Any], grad_output: Tensor) -> Gradients:
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


def _number(value: Any, scalar: Scalar) -> Any:
    """Returns a scalar as the kernels take it."""
    if scalar.words:
        return value
    if scalar.flag:
        return bool(value)
    if scalar.optional and value is None:
        return math.nan
    return float(value)


@cache
def result_dtype(
    op: TensorLoss,
    kinds: tuple[tuple[str, torch.dtype, int], ...],
    device: torch.device,
    autocast: torch.dtype | None,  # noqa: ARG001 a key
    each: bool,
) -> torch.dtype:
    """Returns the dtype of torch's result for such tensors, asked of it with one element.

    Its answer follows no rule: of a loss made of several operators autocast may widen some, and
    an operand may be overwritten with what is of another dtype.

    Args:
        kinds: For each tensor its name, its dtype, and its number of dimensions, 0 or 1.
    """
    ones: dict[str, Any] = {operand.name: 1.0 for operand in op.operands if operand.number}
    for name, dtype, dim in kinds:
        ones[name] = torch.ones([1] * dim, dtype=dtype, device=device)
    with torch.no_grad():
        reduction = {"reduction": "none" if each else "sum"} if op.reduces else {}
        return op.reference(**ones, **reduction).dtype


def _warn_of_broadcasting(operands: Sequence[Tensor]) -> None:
    input, target = operands[:2]
    if input.shape != target.shape:
        warnings.warn(
            f"Using a target size ({target.shape}) that is different to the input size "
            f"({input.shape}). This will likely lead to incorrect results due to broadcasting. "
            "Please ensure they have the same size.",
            stacklevel=_stacklevel(),
        )


def _stacklevel() -> int:
    """Whose line a warning of the caller names: the first outside pyfused and torch's modules."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals["__name__"].startswith((f"{PACKAGE}.", "torch.")):
        frame, level = frame.f_back, level + 1
    return level
