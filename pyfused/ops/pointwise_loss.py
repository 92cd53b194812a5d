"""Pointwise losses: one autograd function over the fused kernels."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, reduce
from operator import itemgetter
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from pyfused import checks
from pyfused.backends import Backend, backend_of
from pyfused.ops.declaration import Arguments, Operand, Operator, Scalar, reduction_of
from pyfused.ops.gradients import backward, differentiate, gradients_in_forward, without_functorch
from pyfused.types import Gradients, Want

if TYPE_CHECKING:
    from pyfused.ops.program import Program

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}  # as torch's built-in functions count them
_OF_PYTHON = ("size_average", "reduce", "weight")  # which those do not take

Denominator = Callable[[Sequence[Tensor], Tensor | None, Sequence[Any]], float | Tensor]


def elements(operands: Sequence[Tensor], *_: Any) -> float:
    return float(operands[0].numel())


def weight_or_elements(
    operands: Sequence[Tensor], weight: Tensor | None, *_: Any
) -> float | Tensor:
    return elements(operands) if weight is None else weight.sum(dtype=torch.float64)


@dataclass(eq=False, kw_only=True, repr=False)
class PointwiseLoss(Operator):
    """A formula of each element of the operands, multiplied by ``weight``, and reduced.

    Where the last operand is optional and given, the formula is another one, named after both.

    Attributes:
        shapes: Raises where shapes of the formula's operands do not go together.
        warns: Whether torch warns of an input and a target that broadcast. Beside that, and
            weights, its function does no more than call the built-in one of its name.
        warning: What torch warns of in a call with a reduction, None where of nothing.
        nan_on_invalid: An operand out of its bounds makes the loss NaN, so no check comes before.
        weight_shape: Raises where ``weight`` does not go with the input.
        denominators: What the sum is divided by in each reduction but none and sum, from the
            expanded operands, the weight and the scalars.
        arrange: What torch makes of the formula's operands before they broadcast.
        variables: The formula's operands: all but the weight.
        chooses: Whether a scalar chooses the formula.
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
    chooses: bool = field(init=False)
    asks_dtype: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.variables = tuple(o for o in self.operands if o.name != "weight")
        place = self.arguments.index
        self._values = itemgetter(*[place(variable.name) for variable in self.variables])
        self.chooses = any(scalar.chooses for scalar in self.scalars)
        self._weight = place("weight") if self.weight_shape is not None else None
        self._reduction = place("reduction")
        legacy = [name for name in ("size_average", "reduce") if name in self.arguments]
        self._legacy = itemgetter(*map(place, legacy)) if legacy else None
        if self.warns:
            self.aten = self._built_in()

    def _built_in(self) -> Callable[..., Tensor]:
        """torch's function without most of its cost, whose warning names the caller's line."""
        reference, built_in = self.reference, getattr(torch._C._nn, self.name)
        of_python = [i for i, name in enumerate(self.arguments) if name in _OF_PYTHON]
        scalars = [place for place, _ in self.scalar_places]

        def aten(*arguments: Any) -> Tensor:
            input, target = arguments[:2]
            reduction = _REDUCTIONS.get(arguments[self._reduction])
            if reduction is None or type(target) not in (Tensor, Parameter):
                return reference(*arguments)
            for place in of_python:
                if arguments[place] is not None:
                    return reference(*arguments)
            if input.shape != target.shape:
                _warn_of_broadcasting(input, target)
                input, target = torch.broadcast_tensors(input, target)
            loss: Tensor = built_in(input, target, reduction, *[arguments[i] for i in scalars])
            return loss

        return aten

    def size_key(self, arguments: Arguments) -> tuple[str, int]:
        return self.name + "_none" * (arguments[self._reduction] == "none"), 1

    def fused(self, arguments: Arguments, inplace: bool) -> Tensor:  # noqa: ARG002
        operands, weight, reduction = self._read(arguments)
        self._check(arguments, operands, weight, reduction)
        dtype, result = self._dtypes(arguments, operands[0], reduction)
        if self.warning is not None and (message := self.warning(arguments)):
            warnings.warn(message, stacklevel=_stacklevel())
        if self.arrange is not None:
            operands = self.arrange(*operands)
        shape = operands[0].shape
        if self.warns and operands[1].shape != shape:
            _warn_of_broadcasting(operands[0], operands[1])
        if any(operand.shape != shape for operand in operands):
            operands = torch.broadcast_tensors(*operands)
        operands = [o if o.dtype is dtype else o.to(dtype) for o in operands]
        numbers = self.numbers(arguments)
        denominator: float | Tensor = 1.0
        if reduction in self.denominators:
            denominator = self.denominators[reduction](operands, weight, numbers)
        if weight is not None:
            weight = weight.to(dtype).expand_as(operands[0])
        call = PointwiseCall(self, backend_of(operands[0]), numbers, reduction, denominator)
        if torch.is_grad_enabled() and any(operand.requires_grad for operand in operands):
            loss: Tensor | None = _apply(call, weight, *operands)
        else:
            loss, _ = call.kernel(operands, weight, Want())
        assert loss is not None
        if self.nan_on_invalid and not call.backend.ASYNCHRONOUS and loss.sum().isnan():
            self._bounds(operands)
        return loss if loss.dtype is result else loss.to(result)

    def numbers(self, arguments: Arguments) -> tuple[Any, ...]:
        """What is beside the tensors, hashable."""
        return tuple([_number(arguments[place], s) for place, s in self.scalar_places])

    def formula(
        self,
        numbers: tuple[Any, ...],
        operands: int,
        want: Want,  # noqa: ARG002
    ) -> tuple[str | Program, tuple[Any, ...]]:
        """The kernel and its numbers."""
        name, last = self.name, self.variables[operands - 1]
        if self.chooses:
            given = list(zip(self.scalars, numbers, strict=True))
            name = "_".join([name, *(s.name for s, number in given if s.chooses and number)])
            numbers = tuple([number for s, number in given if not s.chooses])
        return f"{name}_{last.name}" if last.optional else name, numbers

    def of_each(self, operands: Sequence[Tensor], numbers: tuple[Any, ...]) -> Tensor:
        """The losses in torch's terms."""
        given = zip(self.scalars, numbers, strict=True)
        named = {s.name: bool(number) if s.flag else number for s, number in given}
        for scalar in self.scalars:
            if scalar.optional and named[scalar.name] != named[scalar.name]:
                named[scalar.name] = None  # for which NaN stood
        names = [variable.name for variable in self.variables]
        return self.reference(**dict(zip(names, operands, strict=False)), **named, reduction="none")

    def check(self, arguments: Arguments) -> None:
        for place, operand in ((0, self.operands[0]), *self.others):
            if arguments[place] is not None or not operand.optional:
                number = float if operand.number else None
                checks.tensor(operand.name, arguments[place], number)
        operands, weight, reduction = self._read(arguments)
        self._check(arguments, operands, weight, reduction)
        if self.nan_on_invalid:
            self._bounds(operands)

    def _bounds(self, operands: Sequence[Any]) -> None:
        for operand, value in zip(self.variables, operands, strict=False):
            if operand.enforced is not None:
                checks.values(operand.name, value, operand.low, operand.high, operand.enforced)

    def _read(self, arguments: Arguments) -> tuple[Sequence[Any], Tensor | None, str]:
        operands, reduction = self._values(arguments), arguments[self._reduction]
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
        """Options, shapes and values, of tensors."""
        if reduction not in self.denominators:
            checks.reduction(reduction, ("none", *self.denominators, "sum"))
        self.check_scalars(arguments)
        if operands[1].shape != operands[0].shape or len(operands) > 2:
            self.shapes(*operands)
        if self.weight_shape is not None and weight is not None:
            self.weight_shape(operands[0], weight)
        if not self.nan_on_invalid:
            self._bounds(operands)

    def _dtypes(
        self, arguments: Arguments, input: Tensor, reduction: str
    ) -> tuple[torch.dtype, torch.dtype]:
        """What the kernel computes the loss of, and what the loss is returned in."""
        dtype, device, alike = input.dtype, input.device, True
        for place, _ in self.others:
            alike = alike and getattr(arguments[place], "dtype", dtype) is dtype
        autocast = torch.is_autocast_enabled(device.type)
        if alike and not autocast and not self.asks_dtype:
            return dtype, dtype
        to = torch.get_autocast_dtype(device.type) if autocast else None
        given = [(o.name, arguments[i]) for i, o in ((0, self.operands[0]), *self.others)]
        tensors = [(name, value) for name, value in given if isinstance(value, Tensor)]
        kinds = tuple([(name, tensor.dtype, min(tensor.dim(), 1)) for name, tensor in tensors])
        result = result_dtype(self, kinds, device, to, reduction == "none")
        return reduce(torch.promote_types, [kind[1] for kind in kinds], result), result


def _number(value: Any, scalar: Scalar) -> Any:
    """A scalar as a number, but for a tensor that would have to be waited for."""
    if scalar.flag:
        value = bool(value)
    if scalar.optional and value is None:
        return math.nan
    return value if isinstance(value, Tensor) and not value.is_cpu else float(value)


@cache
def result_dtype(
    op: PointwiseLoss,
    kinds: tuple[tuple[str, torch.dtype, int], ...],
    device: torch.device,
    autocast: torch.dtype | None,  # noqa: ARG001 a key
    each: bool,
) -> torch.dtype:
    """What torch's operator returns for tensors of these dtypes, asked of it with one element.

    Its answer follows no rule: of a loss made of several operators autocast may widen some, and
    an operand may be overwritten with what is of another dtype.

    Args:
        kinds: For each tensor its name, its dtype, and its number of dimensions, 0 or 1.
    """
    ones: dict[str, Any] = {operand.name: 1.0 for operand in op.operands if operand.number}
    for name, dtype, dim in kinds:
        ones[name] = torch.ones([1] * dim, dtype=dtype, device=device)
    with torch.no_grad():
        return op.reference(**ones, reduction="none" if each else "sum").dtype


class PointwiseCall(NamedTuple):
    """What a kernel takes beside tensors."""

    op: PointwiseLoss
    backend: Backend
    numbers: tuple[Any, ...]  # a flag that chooses the formula among them
    reduction: str
    denominator: float | Tensor

    def kernel(
        self,
        operands: Sequence[Tensor],
        weight: Tensor | None,
        want: Want,
        grad_output: Tensor | None = None,
    ) -> tuple[Tensor | None, Gradients]:
        formula, numbers = self.op.formula(self.numbers, len(operands), want)
        return self.backend.pointwise_loss(
            formula,
            tuple(operands),
            numbers,
            weight,
            self.reduction,
            self.denominator,
            want,
            grad_output,
        )


class PointwiseLossFunction(torch.autograd.Function):
    """The gradients are computed by the forward pass, while the operands are in cache.

    Except where grad_output is needed first: one that differs from element to element,
    or one that keeps float16 gradients from underflowing.
    """

    @staticmethod
    def forward(
        ctx: Any, call: PointwiseCall, weight: Tensor | None, *operands: Tensor
    ) -> Tensor | None:
        ctx.call, ctx.backend = call, call.backend
        ctx.save_for_backward(weight, *operands)
        now = gradients_in_forward(call.reduction, operands[0])
        want = Want(True, ctx.needs_input_grad[2:] if now else ())
        loss, gradients = call.kernel(operands, weight, want)
        ctx.gradients = gradients if now else None
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Gradients:
        return None, None, *backward(ctx.call.op.name, ctx, grad_output, _kernel, _definition)


_apply = without_functorch(PointwiseLossFunction)


def _kernel(ctx: Any, grad_output: Tensor) -> Gradients:
    weight, *operands = ctx.saved_tensors
    want = Want(False, ctx.needs_input_grad[2:])
    call: PointwiseCall = ctx.call
    return call.kernel(operands, weight, want, grad_output.expand_as(operands[0]))[1]


def _definition(ctx: Any, grad_output: Tensor) -> Gradients:
    weight, *operands = ctx.saved_tensors
    call: PointwiseCall = ctx.call

    def definition(*operands: Tensor) -> Tensor:
        each = call.op.of_each(operands, call.numbers)
        loss: Tensor = (each / call.denominator).to(each.dtype)
        return loss if weight is None else loss * weight

    grad_output = grad_output.expand_as(operands[0])
    return differentiate(definition, operands, ctx.needs_input_grad[2:], grad_output)


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
    while frame.f_back and frame.f_globals["__name__"].startswith(("pyfused.", "torch.")):
        frame, level = frame.f_back, level + 1
    return level
