"""Losses and activations of one's own: one elementwise formula in Python becomes fused kernels.

.. code-block:: python

    @pyfused.loss
    def wing_loss(input, target, *, omega=10.0, epsilon=2.0):
        d = (input - target).abs()
        constant = omega - omega * math.log1p(omega / epsilon)
        return torch.where(d < omega, omega * torch.log1p(d / epsilon), d - constant)

    loss = wing_loss(prediction, labels, omega=5.0)
    criterion = wing_loss.module(omega=5.0)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial, update_wrapper
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import Parameter

from pyfused import checks
from pyfused.backends import FORCED, cpu
from pyfused.ops import dispatch, trace
from pyfused.ops.declaration import Arguments, Operand
from pyfused.ops.pointwise_loss import PointwiseLoss, elements, result_dtype
from pyfused.ops.program import OPERANDS, Lowered, Program, TooLargeError
from pyfused.ops.trace import UntraceableError
from pyfused.types import Want

if TYPE_CHECKING:
    from pyfused.explain import Explanation

# Elements below which torch's own operators are faster: a call of a kernel costs as much as 10 to
# 20 of them, of which a long formula has more.
SMALL_BELOW = 0 if FORCED else 1 << 14
_SMALL_BELOW_OF_LONG, _LONG = 1 << 10, 16  # instructions, gradients' included
_MOST_VALUES = 1024  # of parameters whose programs are kept
_MOST_TRACES = 32  # of a formula
_OF_CALLS = ("reduction", "weight")
_KINDS_OF_PARAMETERS = (float, int, bool, str, type(None))


class Traced:
    """A formula's programs for all parameters that make the same graph.

    Attributes:
        lifted: The literals that are inputs of the programs.
    """

    def __init__(
        self, name: str, recorded: trace.Recorded, lifted: Sequence[int], operands: int
    ) -> None:
        self.name, self.recorded, self.lifted = name, recorded, tuple(lifted)
        module = trace.with_inputs(recorded, self.lifted)
        graph = trace.derive(module, operands, self.values(recorded))
        self.expressions, value, gradients = trace.expressions(graph, operands)
        self.lowered = Lowered(self.expressions, value, gradients)
        self.programs: dict[tuple[bool, tuple[bool, ...]], Program] = {}
        self.program(Want(True, (True,) * operands))  # raises where it is too large

    def values(self, recorded: trace.Recorded) -> tuple[float, ...]:
        return tuple([float(recorded.literals[i]) for i in self.lifted])

    def fits(self, recorded: trace.Recorded) -> bool:
        mine = self.recorded
        return (
            recorded.exponents == mine.exponents
            and recorded.structure == mine.structure
            and all(
                i in self.lifted or one == other or (one != one and other != other)
                for i, (one, other) in enumerate(zip(mine.literals, recorded.literals, strict=True))
            )
        )

    def program(self, want: Want) -> Program:
        key = want.loss, want.gradients
        found = self.programs.get(key)
        if found is None:
            found = self.lowered.program(self.name, len(self.lifted), *key)
            self.programs[key] = found
        return found


class FormulaOperator(PointwiseLoss):
    """A formula of a user's, declared at run time; an activation is a loss that is not reduced."""

    def __init__(self, function: Callable[..., Tensor], loss: bool) -> None:
        signature = inspect.signature(function)
        operands, self.parameters = _read_signature(function.__name__, signature)
        self.function, self.loss, self.title = function, loss, function.__name__
        self.traces: list[Traced] = []
        self._found: dict[tuple[Any, ...], tuple[Traced, tuple[float, ...]] | str] = {}
        weight = Operand("weight", differentiated=False, optional=True)
        super().__init__(
            name=f"{function.__module__}.{function.__qualname__}",  # no name of torch's
            module="",
            operands=(*map(Operand, operands), weight),
            fallback_reason=self._untraceable,
            definition=_Definition(self, operands),
            weight_shape=checks.weight_that_broadcasts,
            denominators={"mean": _mean_of_weights},
        )
        self.small_below = SMALL_BELOW
        self.places = slice(len(operands), len(operands) + len(self.parameters))

    # ---- as every operator ----------------------------------------------------------------------

    def numbers(self, arguments: Arguments) -> tuple[Any, ...]:
        return arguments[self.places]

    def formula(
        self,
        numbers: tuple[Any, ...],
        operands: int,  # noqa: ARG002
        want: Want,
    ) -> tuple[Program, tuple[float, ...]]:
        traced, values = self.traced(numbers)
        return traced.program(want), values

    def of_each(self, operands: Sequence[Tensor], numbers: tuple[Any, ...]) -> Tensor:
        return self.function(*operands, **dict(zip(self.parameters, numbers, strict=True)))

    def strategy(self, input: Tensor) -> str:  # noqa: ARG002
        return "a program of its formula, element by element"

    def _read(self, arguments: Arguments) -> tuple[Sequence[Any], Tensor | None, str]:
        return arguments[: self.places.start], arguments[-1], arguments[-2]

    def _check(
        self,
        arguments: Arguments,  # noqa: ARG002
        operands: Sequence[Any],
        weight: Tensor | None,
        reduction: str,
    ) -> None:
        if reduction not in self.denominators:
            checks.reduction(reduction)
        if weight is not None:
            shape = torch.broadcast_shapes(*[operand.shape for operand in operands])
            self.weight_shape(torch.empty(shape, device="meta"), weight)  # type: ignore[misc]

    def _dtypes(
        self, arguments: Arguments, input: Tensor, reduction: str
    ) -> tuple[torch.dtype, torch.dtype]:
        """Asked of torch's operators always: a mask, as a float32 tensor, widens half precision."""
        device = input.device
        autocast = torch.is_autocast_enabled(device.type)
        to = torch.get_autocast_dtype(device.type) if autocast else None
        tensors = [(o.name, v) for o, v in zip(self.variables, arguments, strict=False)]
        if arguments[-1] is not None:
            tensors.append(("weight", arguments[-1]))
        kinds = tuple([(name, tensor.dtype, min(tensor.dim(), 1)) for name, tensor in tensors])
        result = result_dtype(self, kinds, device, to, reduction == "none")
        dtype = result
        for kind in kinds:
            dtype = torch.promote_types(dtype, kind[1])
        return dtype, result

    # ---- tracing --------------------------------------------------------------------------------

    def traced(self, numbers: tuple[Any, ...]) -> tuple[Traced, tuple[float, ...]]:
        """The programs for some parameters, and their inputs.

        Raises:
            UntraceableError: There is none.
        """
        found = self._found.get(numbers)
        if found is None:
            if len(self._found) >= _MOST_VALUES:
                self._found.clear()
            try:
                found = self._trace(numbers)
            except (UntraceableError, TooLargeError) as error:
                found = str(error)
            self._found[numbers] = found
        if isinstance(found, str):
            raise UntraceableError(found)
        return found

    def _trace(self, numbers: tuple[Any, ...]) -> tuple[Traced, tuple[float, ...]]:
        parameters = dict(zip(self.parameters, numbers, strict=True))
        names = [operand.name for operand in self.variables]
        recorded = trace.record(self.function, names, parameters)
        for traced in self.traces:
            if traced.fits(recorded):
                return traced, traced.values(recorded)
        if len(self.traces) >= _MOST_TRACES:
            raise UntraceableError(
                f"its parameters have needed {_MOST_TRACES} traces: each new value takes another, "
                "as an operator of torch's that is no arithmetic takes one of them"
            )
        lifted = trace.dependent(self.function, names, parameters, recorded)
        make = partial(Traced, self.name, recorded, operands=len(names))
        try:
            traced = make(sorted(lifted))
        except UntraceableError:  # an operator takes no tensor there; then each value has a trace
            traced = make(())
        self.traces.append(traced)
        return traced, traced.values(recorded)

    def _untraceable(self, *arguments: Any) -> str | None:
        """Why torch's operators take a call."""
        for name, value in zip(self.parameters, self.numbers(arguments), strict=True):
            if type(value) not in _KINDS_OF_PARAMETERS:
                return f"{name} is a {type(value).__name__}"
        if arguments[0].numel() < min(SMALL_BELOW, self.small_below):
            return dispatch.SMALL
        try:
            self.traced(self.numbers(arguments))
        except UntraceableError as error:
            return str(error)
        return None


class _Definition:
    """The formula in torch's terms with a reduction, of arguments by position or by name."""

    def __init__(self, op: FormulaOperator, operands: Sequence[str]) -> None:
        self.op = op
        named = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter(name, named) for name in operands]
        defaults = {**op.parameters, "reduction": "mean" if op.loss else "none", "weight": None}
        parameters += [inspect.Parameter(n, named, default=v) for n, v in defaults.items()]
        self.__signature__ = inspect.Signature(parameters)
        self.names, self.defaults = [*operands, *defaults], defaults

    def __call__(self, *arguments: Any, **named: Any) -> Tensor:
        values = self.defaults | dict(zip(self.names, arguments, strict=False)) | named
        reduction, weight = values.pop("reduction"), values.pop("weight")
        operands = [values.pop(variable.name) for variable in self.op.variables]
        each: Tensor = self.op.function(*operands, **values)
        if reduction == "none":
            return each if weight is None else each * weight
        checks.reduction(reduction)
        if weight is None:
            return each.mean() if reduction == "mean" else each.sum()
        total: Tensor = (each * weight).sum()
        return total if reduction == "sum" else total / weight.expand_as(each).sum()


def _mean_of_weights(operands: Sequence[Tensor], weight: Tensor | None, *_: Any) -> float | Tensor:
    if weight is None:
        return elements(operands)
    return weight.sum(dtype=torch.float64) * (operands[0].numel() / max(weight.numel(), 1))


def _read_signature(name: str, signature: inspect.Signature) -> tuple[list[str], dict[str, Any]]:
    """The names of the operands, and the parameters with their defaults."""
    operands, parameters = [], {}
    for parameter in signature.parameters.values():
        if parameter.name in _OF_CALLS:
            raise TypeError(f"{name}: {parameter.name} is added to a formula; take another name")
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TypeError(f"{name}: expected operands and keywords, got {parameter}")
        if parameter.default is parameter.empty:
            if parameter.kind is parameter.KEYWORD_ONLY:
                raise TypeError(f"{name}: expected a default of the parameter {parameter.name}")
            operands.append(parameter.name)
        else:
            parameters[parameter.name] = parameter.default
    if not 1 <= len(operands) <= OPERANDS:
        raise TypeError(f"{name}: expected 1 to {OPERANDS} tensor operands, got {len(operands)}")
    return operands, parameters


def is_small(op: FormulaOperator, operands: tuple[Any, ...]) -> bool:
    """Whether the function itself is the faster way; ``run`` replaces this one, to count calls."""
    return (
        bool(operands)
        and type(operands[0]) in (Tensor, Parameter)
        and operands[0].numel() < min(SMALL_BELOW, op.small_below)
    )


class Formula:
    """An elementwise function whose forward and backward are fused; see :func:`pyfused.loss`.

    Attributes:
        function: As it was written. It runs where no kernel does: small tensors, double backward,
            forward mode, ``torch.func``, tensor subclasses, ``torch.compile``, other devices.
        op: What the rest of pyfused knows of it.
    """

    __name__: str
    __qualname__: str

    def __init__(self, function: Callable[..., Tensor], loss: bool, strict: bool) -> None:
        self.function, self.op = function, FormulaOperator(function, loss)
        update_wrapper(self, function)
        signature = inspect.signature(function)
        added = {"reduction": "mean", "weight": None} if loss else {}
        named = [
            inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=v)
            for n, v in added.items()
        ]
        self.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *named])
        self._count, self.is_loss = len(self.op.variables), loss
        try:
            check(self.op)
        except UntraceableError as error:
            if strict:
                raise UntraceableError(
                    f"{function.__name__}: {error}; or pass strict=False, and it runs unfused"
                ) from error

    def __call__(self, *operands: Tensor, **named: Any) -> Tensor:
        if is_dynamo_compiling() or is_small(self.op, operands):
            return self._unfused(operands, named)
        return dispatch.call(self.op, self.arguments(operands, named))

    def _unfused(self, operands: tuple[Tensor, ...], named: dict[str, Any]) -> Tensor:
        if not self.is_loss:
            return self.function(*operands, **named)
        reduction, weight = named.pop("reduction", "mean"), named.pop("weight", None)
        if weight is None and reduction == "mean":
            return self.function(*operands, **named).mean()
        named |= {"reduction": reduction, "weight": weight}
        return self.op.reference(*self.arguments(operands, named))

    def arguments(self, operands: tuple[Any, ...], named: dict[str, Any]) -> Arguments:
        """Those of the operator.

        Raises:
            TypeError: The formula does not take these.
        """
        defaults = self.op.reference.defaults  # type: ignore[attr-defined]
        bad = not self.is_loss and not named.keys().isdisjoint(_OF_CALLS)
        if bad or len(operands) != self._count or not named.keys() <= defaults.keys():
            bound = self.__signature__.bind(*operands, **named).arguments
            operands = tuple([bound.pop(variable.name) for variable in self.op.variables])
            named = bound
        return (*operands, *(defaults | named).values())

    def module(self, **named: Any) -> FormulaModule:
        """A module with these parameters, and of a loss its ``reduction`` and no ``weight``.

        Raises:
            TypeError: The formula does not take these.
        """
        return FormulaModule(self, named)

    def explain(self, *operands: Any, **named: Any) -> Explanation | str:
        """Of a call's arguments the way it would go, as :func:`pyfused.explain` says it.

        Without any the program for the defaults: its instructions for each element, and the bytes
        that it reads and writes, in words.
        """
        if operands or named:
            from pyfused.explain import explain  # which imports this module

            return explain(self, *operands, **named)
        try:
            traced, values = self.op.traced(tuple(self.op.parameters.values()))
        except UntraceableError as error:
            return f"{self.__name__}: torch: {error}"
        names = [variable.name for variable in self.op.variables]
        program = traced.program(Want(True, (True,) * len(names)))
        lines = program.lines(names, [f"{value:g}" for value in values])
        tensors = 2 * len(names) + (not self.is_loss)
        return "\n".join([
            (f"{self.__name__}: {len(program.body)} instructions for an element and its gradients, "
            f"{program.registers} registers; {len(names)} tensors read, "
            f"{tensors - len(names)} written: {4 * tensors} bytes of float32"),
            *(f"  {line}" for line in lines),
        ])  # fmt: skip

    def __reduce__(self) -> str:
        return self.__qualname__

    def __repr__(self) -> str:
        return f"<pyfused.{'loss' if self.is_loss else 'activation'} {self.__name__}>"


class FormulaModule(torch.nn.Module):
    """A formula with some of its keywords, as :meth:`Formula.module` makes it."""

    def __init__(self, formula: Formula, named: dict[str, Any]) -> None:
        super().__init__()
        allowed = {*formula.op.parameters, *(("reduction",) if formula.is_loss else ())}
        if unknown := named.keys() - allowed:
            raise TypeError(
                f"{formula.__name__}: expected keywords of {sorted(allowed)}, got {sorted(unknown)}"
            )
        self.formula, self.named = formula, named

    def forward(self, *operands: Tensor) -> Tensor:
        return self.formula(*operands, **self.named)

    def extra_repr(self) -> str:
        given = [f"{name}={value!r}" for name, value in self.named.items()]
        return ", ".join([self.formula.__name__, *given])


# ---- the check of a definition -------------------------------------------------------------------


def _points(op: FormulaOperator, traced: Traced) -> list[Tensor]:
    """Values of the operands: random, large, small, zeros, literals, ties, infinities and NaN."""
    generator = torch.Generator().manual_seed(0)
    n, count = 256, len(op.variables)

    def normal(scale: float) -> list[Tensor]:
        return [
            torch.randn(n, dtype=torch.float64, generator=generator) * scale for _ in range(count)
        ]

    special = [0.0, -0.0, 0.5, 1.0, -1.0, 2.0, float("nan"), float("inf"), -float("inf")]
    special += [sign * float(value) for value in traced.recorded.literals for sign in (1, -1)]
    values = torch.tensor(special, dtype=torch.float64)
    chosen = torch.randint(len(special), (count, 4 * n), generator=generator)
    ties = torch.randn(n, dtype=torch.float64, generator=generator)
    uniform = [torch.rand(n, dtype=torch.float64, generator=generator) for _ in range(count)]
    parts = [normal(1.0), normal(30.0), normal(1e-5), [ties] * count, uniform]
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    return [torch.cat([column, values[pick]]) for column, pick in zip(columns, chosen, strict=True)]


def _run(op: FormulaOperator, numbers: tuple[Any, ...], operands: Sequence[Tensor]) -> list[Tensor]:
    """The function's value and gradients."""
    leaves = [operand.detach().requires_grad_() for operand in operands]
    with torch.enable_grad():
        value = op.of_each(leaves, numbers)
    gradients: Sequence[Tensor | None] = [None] * len(leaves)
    if value.requires_grad:
        gradients = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
    pairs = zip(gradients, leaves, strict=True)
    return [value.detach(), *(torch.zeros_like(x) if g is None else g for g, x in pairs)]


def check(op: FormulaOperator) -> None:
    """Compares the kernel for the default parameters with the function, in float64.

    Where the function itself moves by more, as it does next to a jump, it is asked for its values
    nearby.

    Raises:
        UntraceableError: There is no kernel.
        RuntimeError: They differ.
    """
    numbers = tuple(op.parameters.values())
    traced, values = op.traced(numbers)
    operands = _points(op, traced)
    want = Want(True, (True,) * len(operands))
    program = traced.program(want)
    if len(program.body) >= _LONG:
        op.small_below = _SMALL_BELOW_OF_LONG
    value, gradients = cpu.pointwise_loss(program, tuple(operands), values, None, "none", 1.0, want)
    expected = _run(op, numbers, operands)
    of_float32 = _run(op, numbers, [x.float() for x in operands])
    names = ["value", *(f"gradient of {operand.name}" for operand in op.variables)]
    for k, (name, found) in enumerate(zip(names, (value, *gradients), strict=True)):
        assert found is not None
        low = high = expected[k]
        generator = torch.Generator().manual_seed(1)
        for _ in range(6):
            signs = [torch.randint(-1, 2, x.shape, generator=generator) for x in operands]
            near = [x + s * (x.abs() * 1e-9 + 1e-30) for x, s in zip(operands, signs, strict=True)]
            beside = _run(op, numbers, near)[k]
            low, high = torch.fmin(low, beside), torch.fmax(high, beside)
        slack = 1e-8 * torch.fmax(low.abs(), high.abs()) + 4 * (high - low) + 1e-12
        within = (found >= low - slack) & (found <= high + slack)
        same = (found == expected[k]) | (expected[k].isnan() & found.isnan())
        if traced.expressions.stabilized:  # float32 says where the function itself is unstable
            error = (of_float32[k] - expected[k]).abs()
            same |= found.isfinite() & ~((found - expected[k]).abs() > 1e-6 * error)
        if bool((wrong := ~(within | same)).any()):
            i = int(wrong.nonzero()[0])
            where = zip(op.variables, operands, strict=True)
            at = ", ".join(f"{variable.name}={x[i].item():.6g}" for variable, x in where)
            raise RuntimeError(
                f"{op.title}: its kernel's {name} is {found[i].item():.9g} at {at}, and the "
                f"function's {expected[k][i].item():.9g}; {int(wrong.sum())} of {wrong.numel()} "
                "values differ"
            )


# ---- decorators ----------------------------------------------------------------------------------


def loss(function: Callable[..., Tensor] | None = None, *, strict: bool = True) -> Any:
    """Makes a loss of an elementwise formula: a decorator.

    Args:
        function: Takes one to four tensors by position, which broadcast, and parameters with
            defaults, numbers, flags or words; returns a tensor of one loss for each element, made
            of torch's elementwise operations. It runs once to be traced, and where no kernel does.
        strict: Raise where no kernel can run the function; False: it runs unfused then.

    Returns:
        A function of the same operands, the parameters by keyword, and the keywords ``reduction``,
        ``"none"``, ``"mean"`` or ``"sum"``, and ``weight``, a tensor that broadcasts with the loss
        and divides a mean by its sum. Operands are float32, float64, bfloat16 or float16; the
        result's shape and dtype are those of the function with torch's operators. ``.module(...)``
        makes a :class:`torch.nn.Module` and ``.explain()`` prints the kernel's program.

    Raises:
        TypeError: The function's arguments are of another kind, or, with ``strict``, it does what
            kernels cannot: control flow on values, reductions, random numbers, shapes.
        RuntimeError: The kernels' results differ from the function's, at random and special values.
    """
    return partial(loss, strict=strict) if function is None else Formula(function, True, strict)


def activation(function: Callable[..., Tensor] | None = None, *, strict: bool = True) -> Any:
    """Makes an activation of an elementwise formula: a decorator, as :func:`loss`, but unreduced.

    Args:
        function: Takes one to four tensors and parameters with defaults.
        strict: Raise where no kernel can run the function; False: it runs unfused then.

    Returns:
        A function of the same arguments, which returns a tensor of the operands' broadcast shape
        and of torch's dtype.

    Raises:
        TypeError, RuntimeError: As :func:`loss`.
    """
    return (
        partial(activation, strict=strict) if function is None else Formula(function, False, strict)
    )
