"""Pointwise losses: their declaration, and what computes them."""

from __future__ import annotations

import inspect
import math
import sys
import warnings
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
from pyfused.backends import backend_of
from pyfused.dispatch.autograd import apply, differentiate, gradients_in_forward
from pyfused.dispatch.custom_operators import PACKAGE
from pyfused.dispatch.operator import (
    REDUCTIONS,
    Arguments,
    Operand,
    Operator,
    Scalar,
    reduction_of,
)
from pyfused.dispatch.plan import Launch, LossPlan
from pyfused.formulas import trace
from pyfused.formulas.kernel import Kernel, Method
from pyfused.formulas.program import Program
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
        needs: Sequence[bool] | None = None,
    ) -> PointwisePlan:
        """Checks a call, and returns what computes it.

        Args:
            needs: The operands that need a gradient, where that is not for autograd to say.
        """
        operands, weight, reduction = self._read(arguments)
        self._check(arguments, operands, weight, reduction)
        dtype, result = self._dtypes(arguments, operands[0], reduction)
        if needs is None:
            grad = torch.is_grad_enabled()
            needs = [grad and isinstance(o, TENSORS) and o.requires_grad for o in operands]
        shape = getattr(operands[0], "shape", None)
        alike = all(
            isinstance(o, TENSORS) and o.shape == shape and o.dtype is dtype for o in operands
        )
        return self.plan_type(
            op=self,
            backend=backend_of(operands[0]),
            numbers=self.numbers(arguments),
            reduction=reduction,
            dtype=dtype,
            result=result,
            needs=tuple(needs),
            now=gradients_in_forward(reduction, dtype),
            as_they_are=alike and self.arrange is None and weight is None,
            warning=None if self.warning is None else self.warning(arguments),
            denominator=self.denominators.get(reduction),
        )

    @property
    def plan_type(self) -> type[PointwisePlan]:
        return PointwisePlan

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
                _warn_of_broadcasting(input, target)
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
        needs: Sequence[bool] | None = None,
    ) -> PointwisePlan:
        input, dim = arguments
        if needs is None:
            needs = (torch.is_grad_enabled() and input.requires_grad,) * 2
        return HalvesPlan(
            op=self,
            backend=backend_of(input),
            numbers=(),
            reduction="none",
            dtype=input.dtype,
            result=input.dtype,
            needs=tuple(needs),
            now=False,
            halves=dim % input.dim(),
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


@dataclass(eq=False, kw_only=True)
class PointwisePlan(LossPlan):
    """Computes the calls of one signature.

    The tensors are the operands, the weight, and the divisor where it depends on values.

    Attributes:
        numbers: The values of the scalars, a flag that chooses the formula among them.
        dtype: What the operands are computed in.
        as_they_are: The kernel takes the operands without a cast or an expansion, and no weight.
        warning: What every call warns of, None for nothing.
        denominator: What computes the divisor of the sum for each call, None where that is a number
            that follows from the signature.
        divisor: That number.
        halves: The dimension along which the operands are one tensor, None where they are several.
    """

    op: TensorLoss
    numbers: tuple[Any, ...]
    reduction: str
    dtype: torch.dtype
    as_they_are: bool = True
    warning: str | None = None
    denominator: Denominator | None = None
    divisor: float = 1.0
    halves: int | None = None

    def __call__(self, arguments: Arguments) -> Tensor:
        op = self.op
        operands, weight = op._values(arguments), None
        if operands[-1] is None:
            operands = operands[:-1]
        if op._weight is not None:
            weight = arguments[op._weight]
        if op.enforces and not op.nan_on_invalid:
            op._bounds(operands)
        if self.warning is not None:
            warnings.warn(self.warning, stacklevel=_stacklevel())
        given = weight  # torch's mean divides by its sum before it broadcasts
        if not self.as_they_are:
            operands, weight = self.arranged(operands, weight)
        divisor = self.divisor_of(operands, given) if self.denominator is not None else None
        tensors = *operands, weight, divisor
        loss: Tensor = apply(self, *tensors) if True in self.needs else self.forward(None, tensors)
        if op.nan_on_invalid and not self.backend.ASYNCHRONOUS and loss.sum().isnan():
            op._bounds(operands)
        return loss if loss.dtype is self.result else loss.to(self.result)

    def arranged(
        self, operands: Sequence[Any], weight: Tensor | None
    ) -> tuple[Sequence[Tensor], Tensor | None]:
        """Returns the operands in one shape and dtype, and the weight beside them."""
        op, dtype = self.op, self.dtype
        if op.arrange is not None:
            operands = op.arrange(*operands)
        shape = operands[0].shape
        if op.warns and operands[1].shape != shape:
            _warn_of_broadcasting(operands[0], operands[1])
        # Cast first: the gradient of what broadcasts is then added up before it is rounded.
        operands = [o if o.dtype is dtype else o.to(dtype) for o in operands]
        if any(operand.shape != shape for operand in operands):
            operands = torch.broadcast_tensors(*operands)
        if weight is not None:
            weight = weight.to(dtype).expand_as(operands[0])
        return operands, weight

    def divisor_of(self, operands: Sequence[Tensor], weight: Tensor | None) -> Tensor | None:
        """Returns the divisor where it depends on values, and otherwise None, once it is known."""
        if self.denominator is None:
            return None
        divisor = self.denominator(operands, weight, self.numbers)
        if isinstance(divisor, Tensor):
            return divisor
        self.divisor, self.denominator = divisor, None
        return None

    def gradients(self, tensors: Sequence[Any], grad_output: Tensor) -> Gradients:
        return super().gradients(tensors, self.expanded(grad_output, tensors))

    def prepared(
        self, tensors: Sequence[Any], outputs: Outputs, grad_output: Tensor | None
    ) -> Launch:
        *operands, weight, _ = tensors
        assert isinstance(self.op, PointwiseLoss)
        formula, numbers = self.op.kernel(self.numbers, len(operands), outputs)
        layouts = tuple(operands), weight, grad_output
        prepare: Callable[..., Any] = self.backend.pointwise_loss
        launch: Launch = prepare(
            formula, layouts, numbers, self.reduction, outputs, self.divisor, self.halves
        )
        return launch

    def define(self, ctx: Any, grad_output: Tensor) -> Gradients:
        *operands, weight, divisor = ctx.saved_tensors[: ctx.first_gradient]

        def definition(*operands: Tensor) -> Tensor:
            each = self.op.of_each(operands, self.numbers)
            loss = (each / (self.divisor if divisor is None else divisor)).to(each.dtype)
            return loss if weight is None else loss * weight

        grad_output = self.expanded(grad_output, operands)
        return differentiate(definition, operands, self.needs, grad_output)

    def expanded(self, grad_output: Tensor, operands: Sequence[Tensor]) -> Tensor:
        """Returns the gradient of each loss before these are reduced."""
        return grad_output.expand_as(operands[0])


class HalvesPlan(PointwisePlan):
    """Computes an activation of halves: autograd sees one input, and its gradient is one tensor."""

    def __call__(self, arguments: Arguments) -> Tensor:
        if not self.needs[0]:
            return self.forward(None, arguments[:1])
        output: Tensor = apply(self, arguments[0])
        return output

    def forward(self, ctx: Any, tensors: Sequence[Any]) -> Tensor:
        assert self.halves is not None
        output = super().forward(None, (*tensors[0].chunk(2, self.halves), None, None))
        if ctx is not None:
            ctx.save_for_backward(*tensors)
        return output

    def gradients(self, tensors: Sequence[Any], grad_output: Tensor) -> Gradients:
        assert self.halves is not None
        operands = tensors[0].contiguous().chunk(2, self.halves)
        if any(grad_output.stride()):
            grad_output = grad_output.contiguous()
        return super().gradients((*operands, None, None), grad_output)

    def define(self, ctx: Any, grad_output: Tensor) -> Gradients:
        definition = lambda input: self.op.reference(input, self.halves)  # noqa: E731
        return differentiate(definition, ctx.saved_tensors, (True,), grad_output)


def _warn_of_broadcasting(input: Tensor, target: Tensor) -> None:
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
