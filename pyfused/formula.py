"""Compiles a user's elementwise losses and activations, written in Python, to fused kernels."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial, update_wrapper
from itertools import product
from numbers import Integral, Real
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from pyfused import checks, nn
from pyfused.backends import cpu
from pyfused.backends.protocol import Parameters
from pyfused.dispatch import run as dispatch
from pyfused.dispatch.explanation import Explanation, path_of
from pyfused.dispatch.operator import Arguments, Case, Numbers, Operand, Tensors
from pyfused.dispatch.signature import PLAIN
from pyfused.dispatch.sizes import is_small
from pyfused.formula_compiler import trace
from pyfused.formula_compiler.program import (
    EXPONENTS,
    OPERANDS,
    Expressions,
    Program,
    UntraceableError,
    compiled,
    is_moderate,
)
from pyfused.layout import broadcast_numel
from pyfused.ops.pointwise_loss import PointwiseLoss, elements, reduced
from pyfused.torch_internals import DispatchMode, is_mutable, tree_map
from pyfused.types import Outputs, Scalar

_LONG = 16  # a formula is long from this many instructions on, including its gradients
_MOST_VALUES = 1024  # combinations of parameter values whose programs a formula caches
_MOST_TRACES = 32  # traces per formula
_CALL_OPTIONS = ("reduction", "weight")  # keywords of losses, in addition to the parameters
_PARAMETER_TYPES = (float, int, bool, str, type(None))


@dataclass(eq=False)
class Traced:
    """Holds a formula's programs for all parameters that lead to the same operations.

    Attributes:
        run: The run of the function that was traced.
        inputs: The literals that are inputs of the programs: index to value.
        outputs: The expressions of the value and of the gradients.
        symbolic: The run of the function with symbols instead of floats, None if the function may
            depend on their values other than through inputs.
        constants: The parameters that are not floats, as returned by `constants_of`.
        difference: The error that describes how the kernel's results differ from the function's,
            or None.
    """

    name: str
    run: trace.Run
    inputs: dict[int, float]
    expressions: Expressions
    outputs: list[int]
    symbolic: trace.Run | None = None
    constants: Any = None
    difference: RuntimeError | None = None

    def __post_init__(self) -> None:
        self.program = cache(self._program)
        self.program(Outputs(True, (True,) * (len(self.outputs) - 1)))  # raises if it is too large

    def values(self, run: trace.Run) -> tuple[float, ...] | None:
        """Returns the programs' inputs for another run, None if operations or constants differ."""
        pairs = enumerate(zip(self.run.literals, run.literals, strict=False))
        if run.structure != self.run.structure or any(
            i not in self.inputs and repr(traced) != repr(new) for i, (traced, new) in pairs
        ):
            return None
        return tuple([run.literals[i] for i in self.inputs])

    def applies_to(self, parameters: Sequence[Any]) -> bool:
        """Returns whether the programs are known to be for parameters with the same constants."""
        if self.symbolic is None or self.difference is not None:
            return False
        for i in self.inputs:
            try:
                value = self.symbolic.symbols[i].compute(parameters)
            except ArithmeticError:
                return False
            is_special = i in self.symbolic.exponents and value in EXPONENTS
            if type(value) is not float or is_special or not is_moderate(value):
                return False
        return True

    def _program(self, outputs: Outputs) -> Program:
        return compiled(self.name, self.expressions, self.outputs, outputs, len(self.inputs))


class FormulaOperator(PointwiseLoss):
    """The operator of a user's formula; an activation is a loss without reduction.

    Attributes:
        dtypes: The dtypes of the operands, float64 for all that are floating-point.
    """

    infers_dtype = True  # float32 masks promote half precision
    number_types = (Real, str)
    strategy = "a program, element by element"

    def __init__(
        self,
        function: Callable[..., Tensor],
        loss: bool,
        slopes: Callable[..., Any] | None = None,
        dtypes: tuple[torch.dtype, ...] = (),
    ) -> None:
        operands, self.defaults = _read_signature(function)
        self.dtypes = dtypes or (torch.float64,) * len(operands)
        self.user = trace.UserFunction(function, slopes, self.dtypes)
        if slopes is not None:
            function = _differentiated(function, slopes, operands)
        self.function, self.loss, self.long = function, loss, False
        self.traces: list[Traced] = []
        self._traced = lru_cache(_MOST_VALUES)(
            lambda _, numbers: trace.isolated(self._trace, numbers)
        )
        options = dict(zip(_CALL_OPTIONS, ("mean" if loss else "none", None), strict=True))
        self.keywords, count = self.defaults | options, len(operands)

        def compute(*arguments: Any) -> Tensor:
            *tensors, weight = arguments[: count + 1]
            numbers = dict(zip(self.defaults, arguments[count + 1 : -1], strict=True))
            return reduced(function(*tensors, **numbers), arguments[-1], weight)

        weight = Operand("weight", differentiated=False, optional=True, converts=True)
        super().__init__(
            name=f"{function.__module__ or '__main__'}.{function.__qualname__}",
            module="",
            operands=(*[Operand(name, converts=True) for name in operands], weight),
            fallback_reason=self._reason_of_shapes,
            numbers=tuple(map(Scalar, self.defaults)),
            case=("reduction",),
            torch=compute,
            formula=function,
            denominators={"mean": _mean_of_weights},
        )
        self.known = lru_cache(_MOST_VALUES)(self._symbolic_trace)
        self.cases = self._cases_of_values
        self.all_outputs = Outputs(True, (True,) * len(operands))

    def to_number(self, value: Any) -> Any:
        """Converts a tensor or a NumPy number; the types of Python's numbers may matter."""
        if isinstance(value, Tensor):
            return value.item()
        if type(value) in _PARAMETER_TYPES:
            return value
        return int(value) if isinstance(value, Integral) else float(value)

    def examples(self) -> Numbers:
        return tuple(self.defaults.values())

    def _cases_of_values(self, numbers: tuple[Any, ...]) -> tuple[Any, ...] | str:
        """Returns the trace for each parameter, on which plans depend, or why there is none."""
        traced = self.known(numbers, *map(type, numbers))  # as 1 and True are equal
        if traced is None:
            try:
                traced, _ = self.traced(numbers)
            except (UntraceableError, RuntimeError) as error:
                return str(error)
        return (traced,) * len(numbers)

    def _symbolic_trace(self, numbers: tuple[Any, ...], *_types: type) -> Traced | None:
        """Returns a trace that is known to apply to numbers, without running the function."""
        constants = constants_of(numbers)
        for traced in self.traces:
            if traced.constants == constants and traced.applies_to(numbers):
                return traced
        return None

    def kernel(
        self,
        cases: tuple[Any, ...],
        operands: int,  # noqa: ARG002
        outputs: Outputs,
    ) -> tuple[Program, Parameters | None]:
        traced = cases[0] if cases else self.traced(())[0]
        program, symbolic = traced.program(outputs), traced.symbolic
        if not cases:
            return program, None
        if symbolic is None:
            return program, lambda numbers: self.traced(numbers)[1]
        computed = [symbolic.symbols[i].compute for i in traced.inputs]
        return program, lambda numbers: [compute(numbers) for compute in computed]

    def _reason_of_shapes(self, *arguments: Any) -> str | None:
        shapes = {x.shape for x in arguments[: len(self.variables)]}
        if len(shapes) > 1 and any(traced.expressions.indexed for traced in self.traces):
            return "a mask is an index, and the operands differ in shape"
        return None

    def _dtypes(
        self, arguments: Arguments, input: Tensor, reduction: str
    ) -> tuple[torch.dtype, torch.dtype]:
        dtype, result = super()._dtypes(arguments, input, reduction)
        if dtype.itemsize == 2 and any(
            kind.itemsize > 1 and not kind.is_floating_point for kind in self.dtypes
        ):
            dtype = torch.float32  # half precision has too few digits for integers
        return dtype, result

    def unreduced(self, operands: Sequence[Tensor], parameters: tuple[Any, ...]) -> Tensor:
        pairs = zip(operands, self.dtypes, strict=True)
        operands = [x if dtype.is_floating_point else x.to(dtype) for x, dtype in pairs]
        return self.function(*operands, **dict(zip(self.defaults, parameters, strict=True)))

    @property
    def family(self) -> str:
        """Returns the key into the table of sizes, which depends on the number of instructions."""
        return "LongFormula" if self.long else "Formula"

    def _check(
        self,
        arguments: Arguments,  # noqa: ARG002
        operands: Sequence[Any],
        weight: Tensor | None,
        reduction: str,
    ) -> None:
        checks.reduction(reduction)
        if weight is not None:
            shape = torch.broadcast_shapes(*[operand.shape for operand in operands])
            checks.expands("weight", weight.shape, "input", shape)

    def traced(self, numbers: tuple[Any, ...]) -> tuple[Traced, tuple[float, ...]]:
        """Returns the programs for the parameters, and the values of the programs' inputs.

        Raises:
            UntraceableError: The function cannot be compiled.
            RuntimeError: The program's results differ from the function's.
        """
        # Keyed by repr because 2 and 2.0, 1 and True, 0.0 and -0.0 compare equal but lead to
        # different operations.
        traced = self._traced(repr(numbers), numbers)
        if isinstance(traced, Exception):
            raise type(traced)(str(traced))
        return traced

    def _trace(self, numbers: tuple[Any, ...]) -> tuple[Traced, tuple[float, ...]] | Exception:
        parameters = dict(zip(self.defaults, numbers, strict=True))

        def derived(inputs: dict[int, float]) -> Traced:
            return Traced(self.name, run, inputs, *self.user.derive(parameters, inputs))

        try:
            run = self.user.run(parameters)
            for traced in self.traces:
                if (values := traced.values(run)) is not None:
                    return traced.difference or (traced, values)
            if len(self.traces) >= _MOST_TRACES:
                return UntraceableError(
                    f"its parameters caused {_MOST_TRACES} traces: an operation without a tensor "
                    "uses a parameter, so each new value is traced again"
                )
            symbolic = self.user.symbolic_run(parameters, run)
            indices = self.user.dependent(parameters, run) if symbolic is None else symbolic.symbols
            inputs = {i: run.literals[i] for i in indices}
            try:
                traced = derived(inputs)
                traced.symbolic, traced.constants = symbolic, constants_of(numbers)
            except UntraceableError:
                # An operator takes a number but no tensor, so each value needs its own trace.
                traced = derived({})
            check(self, numbers, traced)
        except UntraceableError as error:
            return UntraceableError(str(error))  # cached, so without the traceback
        except RuntimeError as error:
            traced.difference = RuntimeError(str(error))
        self.traces.append(traced)
        return traced.difference or (traced, tuple(traced.inputs.values()))


def constants_of(numbers: Sequence[Any]) -> list[Any]:
    """Returns the parameters that are not floats, with their types, and None instead of floats."""
    return [None if type(x) is float else (type(x), x) for x in numbers]


def _differentiated(
    function: Callable[..., Tensor], slopes: Callable[..., Any], operands: Sequence[str]
) -> Callable[..., Tensor]:
    """Returns the function as a torch.autograd.Function that uses the user's gradient."""

    class Differentiated(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(named: dict[str, Any], *operands: Tensor) -> Tensor:
            return function(*operands, **named)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
            ctx.named, *operands = inputs
            ctx.save_for_backward(*operands)
            ctx.save_for_forward(*operands)

        @staticmethod
        def backward(ctx: Any, grad_output: Tensor) -> Any:
            values = trace.slopes_of(slopes, ctx.saved_tensors, ctx.named)
            return None, *[None if slope is None else grad_output * slope for slope in values]

    class WithTangents(Differentiated):  # separate, as torch.compile cannot trace jvp
        @staticmethod
        def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Any:
            values = trace.slopes_of(slopes, ctx.saved_for_forward, ctx.named)
            pairs = zip(values, tangents, strict=True)
            parts = [s * t for s, t in pairs if s is not None and t is not None]
            return sum(parts[1:], parts[0]) if parts else None

    def differentiated(*tensors: Tensor, **named: Any) -> Tensor:
        if len(tensors) < len(operands):  # some operands are passed by keyword
            named = inspect.signature(function).bind(*tensors, **named).arguments
            tensors = tuple([named.pop(name) for name in operands])
        kind = Differentiated if is_dynamo_compiling() else WithTangents
        value: Tensor = kind.apply(named, *tensors)  # type: ignore[no-untyped-call]
        return value

    return update_wrapper(differentiated, function)


def _mean_of_weights(operands: Sequence[Tensor], weight: Tensor | None, *_: Any) -> float | Tensor:
    if weight is None:
        return elements(operands)
    return weight.sum(dtype=torch.float64) * (operands[0].numel() / max(weight.numel(), 1))


def _read_signature(function: Callable[..., Any]) -> tuple[list[str], dict[str, Any]]:
    """Returns the names of a formula's operands, and its parameters with their defaults."""
    name, operands, parameters = function.__name__, [], {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name in _CALL_OPTIONS:
            raise TypeError(f"{name}: pyfused adds the parameter {parameter.name}; rename yours")
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TypeError(f"{name}: expected named parameters, got {parameter}")
        if parameter.default is not parameter.empty:
            parameters[parameter.name] = parameter.default
        elif parameter.kind is parameter.KEYWORD_ONLY:
            raise TypeError(f"{name}: expected a default for the parameter {parameter.name}")
        else:
            operands.append(parameter.name)
    if not 1 <= len(operands) <= OPERANDS:
        raise TypeError(f"{name}: expected 1 to {OPERANDS} tensor operands, got {len(operands)}")
    return operands, parameters


Function = TypeVar("Function", bound=Callable[..., Any])


class Formula:
    """An elementwise function with fused forward and backward; see :func:`pyfused.loss`.

    Attributes:
        written: The user's function.
        function: The user's function with the gradient of :meth:`gradient`. It runs without
            kernels: for small tensors, double backward, forward mode, ``torch.func``, tensor
            subclasses, ``torch.compile`` and other devices.
        op: The operator that dispatches calls.
        variants: Operators for other dtypes of the operands.
    """

    __name__: str
    __qualname__: str

    def __init__(self, function: Callable[..., Tensor], loss: bool, strict: bool) -> None:
        if not hasattr(function, "__name__"):
            raise TypeError(f"function: expected a function with a name, got {function!r}")
        self.written, self.strict = function, strict
        update_wrapper(self, function)
        op = self.op = FormulaOperator(function, loss)
        self.__signature__ = inspect.signature(function)
        if loss:
            kind, parameters = (
                inspect.Parameter.KEYWORD_ONLY,
                self.__signature__.parameters.values(),
            )
            added = [inspect.Parameter(n, kind, default=op.keywords[n]) for n in _CALL_OPTIONS]
            self.__signature__ = self.__signature__.replace(parameters=[*parameters, *added])
        self.keywords = {*op.defaults, *(_CALL_OPTIONS if loss else ())}
        self._declare(partial(FormulaOperator, function, loss, None))

    def gradient(self, slopes: Function) -> Function:
        """Replaces the derivative that torch's rules give; use it as a decorator.

        Use it if that derivative is unstable or slow, or to define another one, such as a
        straight-through gradient.

        Args:
            slopes: Takes the formula's arguments, and returns the derivative with respect to each
                operand: a tensor of the operand's shape, computed by elementwise operations, or
                None for 0.

        Returns:
            ``slopes``, unchanged.

        Raises:
            TypeError, RuntimeError: As :func:`pyfused.loss`.
        """
        expected, names = (list(inspect.signature(f).parameters) for f in (self.written, slopes))
        if names != expected:
            raise TypeError(f"{slopes.__name__}: expected the parameters {expected}, got {names}")
        self._declare(partial(FormulaOperator, self.written, self.op.loss, slopes))
        return slopes

    def _declare(self, make: Callable[..., FormulaOperator]) -> None:
        """Sets the operator, and compiles it for the default parameters.

        If the function does not support float operands, tries masks for some of them.

        Args:
            make: Returns the operator for the dtypes of the operands.

        Raises:
            TypeError, RuntimeError: ``strict`` is True, and no kernel can compute the function.
        """

        def made(dtypes: tuple[torch.dtype, ...]) -> FormulaOperator:
            op = make(dtypes)
            traced, _ = op.traced(tuple(op.defaults.values()))
            op.long = len(traced.program(op.all_outputs).body) >= _LONG
            return op

        self.op = make(())
        self.variants: dict[tuple[torch.dtype, ...], FormulaOperator] = {}
        self.make, self.function = make, self.op.function
        floats, *masked, _ = sorted(
            product((torch.float64, torch.bool), repeat=len(self.op.variables)),
            key=lambda dtypes: dtypes.count(torch.bool),
        )
        try:
            try:
                self.op = made(floats)
            except UntraceableError:
                for dtypes in masked:
                    with contextlib.suppress(UntraceableError):
                        self.op = made(dtypes)
                        return
                raise
        except (UntraceableError, RuntimeError) as error:
            if self.strict:
                message = f"{self.__name__}: {error}. Pass strict=False to run it unfused"
                raise type(error)(message) from None

    def variant(self, tensors: Tensors) -> FormulaOperator:
        """Returns the operator for the dtypes of the operands, which may be masks and integers."""
        operands = tensors[: len(self.op.dtypes)]
        if not all(isinstance(operand, Tensor) for operand in operands):
            return self.op
        dtypes = tuple([torch.float64 if x.is_floating_point() else x.dtype for x in operands])
        if dtypes == self.op.dtypes:
            return self.op
        if dtypes not in self.variants:
            op: FormulaOperator = self.make(dtypes)
            op.long = self.op.long
            self.variants[dtypes] = op
        return self.variants[dtypes]

    def __call__(self, *operands: Tensor, **named: Any) -> Tensor:
        if is_dynamo_compiling() or (
            operands
            and type(operands[0]) in PLAIN
            and is_small(
                self.op,
                operands,
                (named.get("reduction", "mean"),),
                broadcast_numel((*operands, *named.values())),
            )
        ):
            if not self.op.loss:
                return self.function(*operands, **named)
            if "reduction" not in named and "weight" not in named:  # saves 0.2 us
                return self.function(*operands, **named).mean()
            reduction, weight = named.pop("reduction", "mean"), named.pop("weight", None)
            return reduced(self.function(*operands, **named), reduction, weight)
        tensors, numbers, case = self.call_of(operands, named)
        op = self.op
        for operand, dtype in zip(tensors, op.dtypes, strict=False):
            if isinstance(operand, Tensor) and operand.dtype is not dtype:
                if operand.is_floating_point() and dtype.is_floating_point:
                    continue
                op = self.variant(tensors)
                break
        return dispatch.run(op, tensors, numbers, case)

    def call_of(
        self, operands: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[Tensors, Numbers, Case]:
        """Returns the tensors, numbers and case of a call.

        Raises:
            TypeError: The arguments do not match the formula's signature.
        """
        if len(operands) != len(self.op.variables) or not named.keys() <= self.keywords:
            try:
                named = self.__signature__.bind(*operands, **named).arguments  # slow: microseconds
            except TypeError as error:
                raise TypeError(f"{self.__name__}: {error}") from None
            operands = tuple([named.pop(variable.name) for variable in self.op.variables])
        *numbers, reduction, weight = (self.op.keywords | named).values()
        return (*operands, weight), tuple(numbers), (reduction,)

    def module(self, **named: Any) -> FormulaModule:
        """Returns a module that calls the formula with these parameters.

        Tensors among them become parameters or buffers of the module. A loss also takes
        ``reduction``, but not ``weight``.

        Raises:
            TypeError: The formula has no such parameter.
        """
        return FormulaModule(self, named)

    def explain(self, *operands: Any, **named: Any) -> Explanation | str:
        """Explains how a call with these arguments is computed; see :func:`pyfused.explain`.

        Without arguments, returns a listing of the program for the default parameters: its
        instructions, and the bytes read and written per element.
        """
        if operands or named:
            call = self.call_of(operands, named)
            return path_of(self.variant(call[0]), *call)
        names = [variable.name for variable in self.op.variables]
        try:
            traced, values = self.op.traced(tuple(self.op.defaults.values()))
        except (UntraceableError, RuntimeError) as error:
            return f"{self.__name__}: torch: {error}"
        needed = tuple([dtype.is_floating_point for dtype in self.op.dtypes])
        program = traced.program(Outputs(True, needed))
        read, written = len(names), sum(needed) + (not self.op.loss)
        tensors = "1 tensor" if read == 1 else f"{read} tensors"
        return "\n  ".join([
            (f"{self.__name__}: {len(program.body)} instructions for an element and its gradients; "
            f"{tensors} read, {written} written: {4 * (read + written)} bytes of float32"),
            *program.lines(names, values),
        ])  # fmt: skip

    def __reduce__(self) -> str:
        return self.__qualname__

    def __repr__(self) -> str:
        return f"<pyfused.{'loss' if self.op.loss else 'activation'} {self.__name__}>"


class FormulaModule(torch.nn.Module):
    """A module that calls a formula with its keyword options; see :meth:`Formula.module`."""

    def __init__(self, formula: Formula, named: dict[str, Any]) -> None:
        super().__init__()
        allowed = formula.keywords - {"weight"}
        if unknown := named.keys() - allowed:
            raise TypeError(
                f"{formula.__name__}: expected keywords from {sorted(allowed)}, "
                f"got {sorted(unknown)}"
            )
        self.formula = formula
        nn.set_options(self, named)

    def forward(self, *operands: Tensor) -> Tensor:
        return self.formula(*operands, **nn.options_of(self))

    def extra_repr(self) -> str:
        return f"{self.formula.__name__}, {nn.shown(nn.options_of(self))}".removesuffix(", ")


# ---- comparison of kernels with the function -----------------------------------------------------


def _points(
    dtypes: Sequence[torch.dtype], literals: Sequence[float], dtype: torch.dtype
) -> list[Tensor]:
    """Returns test operands: random, large and small values, literals, ties, infinities and NaN.

    Args:
        dtypes: The dtypes of the operands; bool and integer operands take small integers.
        dtype: The dtype of the result.
    """
    operands = len(dtypes)
    generator, n = torch.Generator().manual_seed(0), 256
    special = [0.0, 0.5, 1.0, 2.0, float("inf"), *map(float, literals)]
    special += [-value for value in special]
    values = torch.tensor([*special, float("nan")], dtype=torch.float64)
    chosen = values[torch.randint(len(values), (operands, 4 * n), generator=generator)]
    normal = torch.randn(operands, 3, n, generator=generator)
    normal *= torch.tensor([1.0, 30.0, 1e-5])[:, None]
    ties = torch.randn(n, generator=generator).expand(operands, n)
    uniform = torch.rand(operands, n, generator=generator)
    points = torch.cat([normal.flatten(1), ties, uniform, chosen], 1).to(dtype)
    for x, kind in zip(points, dtypes, strict=True):
        if not kind.is_floating_point:
            x.copy_(torch.randint(-2, 6, x.shape, generator=generator).to(kind))
    return [*points]


def _run(op: FormulaOperator, numbers: tuple[Any, ...], operands: Sequence[Tensor]) -> Tensor:
    """Returns the function's value and gradients, converted to float64."""
    leaves = [operand.detach().requires_grad_() for operand in operands]
    value = op.unreduced(leaves, numbers)
    gradients: Sequence[Tensor | None] = [None] * len(leaves)
    if value.requires_grad:
        gradients = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
    pairs = zip(gradients, leaves, strict=True)
    each = [value.detach(), *(torch.zeros_like(x) if g is None else g for g, x in pairs)]
    return torch.stack(each).double()


class _Roundings(DispatchMode):
    """Perturbs each result by a random rounding error, and flushes subnormal results to 0."""

    def __init__(self, dtype: torch.dtype, generator: torch.Generator) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.limits, self.generator = torch.finfo(dtype), generator

    def __torch_dispatch__(self, op: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        return result if op.is_view or is_mutable(op) else tree_map(self.rounded, result)

    def rounded(self, result: Any) -> Any:
        if not isinstance(result, Tensor) or not result.is_floating_point():
            return result
        steps = torch.randn(result.shape, dtype=torch.float64, generator=self.generator)
        eps = max(self.limits.eps, torch.finfo(result.dtype).eps)  # integers promote to float32
        rounded = (result * (1 + eps * steps)).to(result.dtype)
        return rounded.masked_fill_(result.abs() < self.limits.tiny, 0)


def check(
    op: FormulaOperator,
    numbers: tuple[Any, ...],
    traced: Traced,
    kernels: Callable[..., Any] = cpu.pointwise_loss,
    dtype: torch.dtype = torch.float64,
) -> None:
    """Compares the kernel's results with the function's.

    The tolerance at each point follows from the function's values at nearby points and with
    perturbed roundings, so it is wide next to discontinuities and where terms cancel.

    Raises:
        RuntimeError: The results differ.
    """
    if kernels is cpu.pointwise_loss and cpu.MISSING:
        return
    points = _points(op.dtypes, traced.run.literals, dtype)
    tensors, outputs = (tuple(points), None, None), op.all_outputs
    values = tuple(traced.inputs.values())
    launch = kernels(traced.program(outputs), tensors, None, "none", outputs)
    value, gradients = launch((*points, None, None), values)
    results = torch.stack([value, *gradients]).double()
    wide = [x.double() for x in points]
    varied = [kind.is_floating_point for kind in op.dtypes]
    expected = _run(op, numbers, wide)
    digits, generator = torch.finfo(dtype).eps ** 0.5, torch.Generator().manual_seed(1)
    nearby = [expected, _run(op, numbers, points)]
    for _ in range(8):
        steps = [torch.randn(x.shape, generator=generator) * digits / 16 for x in points]
        near = [x + s * x.abs() + s * 1e-20 for x, s in zip(wide, steps, strict=True)]
        near = [
            torch.where(x.isinf(), x, y) if varies else x
            for x, y, varies in zip(wide, near, varied, strict=True)
        ]
        with _Roundings(dtype, generator):
            nearby += [
                _run(op, numbers, [x.to(kind) for x in near]) for kind in {torch.float64, dtype}
            ]
    bounds = torch.stack(nearby)
    undefined = bounds.isnan()
    low = bounds.masked_fill(undefined, torch.inf).amin(0)
    high = bounds.masked_fill(undefined, -torch.inf).amax(0)
    slack = digits * torch.fmax(low.abs(), high.abs()) + 4 * (high - low) + digits**1.5
    right = (results >= low - slack) & (results <= high + slack)
    right |= (results == expected) | (undefined.any(0) & results.isnan())
    if traced.expressions.stabilized:
        # The function is unstable where its float32 result is inaccurate; the kernel may be more
        # accurate. Where the function returns NaN for operands that are not NaN, the kernel may
        # return the limit.
        error = (_run(op, numbers, [x.float() for x in points]) - expected).abs()
        without_nan = [torch.where(x.isnan(), 0.5, x) for x in wide]
        lost = expected.isnan() & _run(op, numbers, without_nan).isnan()
        stable = results.isfinite() & ~((results - expected).abs() > 1e-6 * error)
        right |= ~results.isnan() & torch.where(expected.isnan(), lost, stable)
    if not right.all():
        wrong = (~right).nonzero()
        k, i = map(int, wrong[0])
        names = ["value", *(f"gradient of {operand.name}" for operand in op.variables)]
        where = zip(op.variables, points, strict=True)
        at = ", ".join(f"{variable.name}={x[i].item():.6g}" for variable, x in where)
        raise RuntimeError(
            f"its kernel computes {results[k, i].item():.9g} for the {names[k]} at {at}, the "
            f"function {expected[k, i].item():.9g}; {len(wrong)} of {right.numel()} values differ"
        )


# ---- decorators ----------------------------------------------------------------------------------


def loss(function: Callable[..., Tensor] | None = None, *, strict: bool = True) -> Any:
    """Compiles an elementwise formula to a fused loss; use it as a decorator.

    Args:
        function: Takes one to four positional tensors, which broadcast, and parameters with
            defaults, which are numbers, bools or strings. Returns the loss of each element,
            computed by torch's elementwise operations. The function is called for tracing, and
            for calls that no kernel supports. Kernels keep the values that global variables and
            closures had during tracing, so pass numbers that change as parameters.
        strict: Raise an error if the function cannot be compiled, or if the kernel's results
            differ from the function's. If False, the function then runs unfused.

    Returns:
        A function that takes the operands, the parameters by keyword, and two more keywords:
        ``reduction``, which is ``"none"``, ``"mean"`` or ``"sum"``, and ``weight``, a tensor that
        broadcasts with the loss; a mean is divided by the sum of the weights. Operands may be
        float32, float64, bfloat16 or float16. The result has the shape and dtype that torch's
        operators return. ``.module(...)`` makes a :class:`torch.nn.Module`, and ``.explain()``
        returns the kernel's program as text.

    Raises:
        TypeError: The function's signature is not supported, or, with ``strict``, the function
            uses control flow on values, reductions, random numbers or shapes.
        RuntimeError: With ``strict``, the kernel's results differ from the function's at random
            or special values.
    """
    return partial(loss, strict=strict) if function is None else Formula(function, True, strict)


def activation(function: Callable[..., Tensor] | None = None, *, strict: bool = True) -> Any:
    """Compiles an elementwise formula to a fused activation; use it as a decorator.

    Args:
        function: Takes one to four tensors, and parameters with defaults; see :func:`loss`.
        strict: See :func:`loss`.

    Returns:
        A function of the same arguments. The result has the operands' broadcast shape and the
        dtype that torch's operators return. The function has the methods described in
        :func:`loss`.

    Raises:
        TypeError, RuntimeError: As :func:`loss`.
    """
    made = partial(activation, strict=strict)
    return made if function is None else Formula(function, False, strict)
