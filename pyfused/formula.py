"""Compiles a user's elementwise losses and activations, written in Python, to fused kernels."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache, partial, update_wrapper
from itertools import combinations, product
from numbers import Integral, Real
from traceback import extract_tb
from types import NoneType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from pyfused import checks, nn
from pyfused.backends.protocol import Parameters
from pyfused.dispatch import run as dispatch
from pyfused.dispatch.explanation import Explanation, explanation_of
from pyfused.dispatch.operator import Operand, Options, grad_enabled, requires_grad
from pyfused.dispatch.reasons import SMALL
from pyfused.dispatch.report import recorded
from pyfused.dispatch.sizes import torch_computes
from pyfused.formula_compiler import trace
from pyfused.formula_compiler.capture import Capture
from pyfused.formula_compiler.kernel import Kernel
from pyfused.formula_compiler.program import (
    EXPONENTS,
    OPERANDS,
    Program,
    UntraceableError,
)
from pyfused.layout import broadcast_with
from pyfused.ops.pointwise_loss import (
    Divisor,
    PointwiseLoss,
    in_tensors,
    parameters_of,
    reduced,
    trace_loss,
    traced_dtypes,
)
from pyfused.torch_internals import never_traced
from pyfused.types import NUMBER, Outputs, Scalar

_LONG = 16  # a formula is long from this many instructions on, including its gradients
_MOST_TRACES = 32  # traces of a formula for static parameters, and of an operator for exponents
_CALL_OPTIONS = ("reduction", "weight")  # keywords of losses, in addition to the parameters
_KINDS = frozenset((bool, int, str, NoneType))  # of static parameters
_INTEGERS = frozenset((torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64))


class Trace(NamedTuple):
    """A kernel of a user's formula, and why it cannot be compiled; None if it can."""

    kernel: Kernel
    problem: str | None


class TracedKernels:
    """The kernels of a user's formula, traced for some values of the parameters.

    Attributes:
        problem: Why the formula is not traced, None if it is.
        trace: Takes the cases of the numbers, and returns their `Trace`.
        find: As in `DeclaredKernels`.
    """

    def __init__(self, formula: Formula, problem: str | None, op: PointwiseLoss) -> None:
        self.formula, self.problem, self.op = formula, problem, op
        self.any_numbers: tuple[Any, ...] = (NUMBER,) * len(op.numbers)
        self.outputs = Outputs(True, (True,) * len(op.variables))
        self.trace = lru_cache(_MOST_TRACES)(self._trace)
        self.find = lru_cache(256)(self._find)
        self.broadcasts = lru_cache(_MOST_TRACES)(self._broadcasts)

    @cached_property
    def exponents(self) -> set[int]:
        """The indices of the numbers that exponents are computed from."""
        ((_, e, _),) = self.trace(self.any_numbers).kernel.methods
        todo = [a[1] for op, a in e.nodes if op == "pow" and e.scalars[a[1]]]
        found = set[int]()
        while todo:
            op, arguments = e.nodes[todo.pop()]
            if op == "parameter":
                found.add(arguments[0])
            elif op not in ("literal", "scale"):
                todo += arguments
        return found

    def cases_of(self, options: Options) -> tuple[Any, ...]:
        """Returns the case of each number: itself if it has its own kernel, else NUMBER."""
        special = self.exponents
        if not special:
            return self.any_numbers
        return tuple([
            x if k in special and x in EXPONENTS and (x or math.copysign(1.0, x) > 0) else NUMBER
            for k, x in enumerate(options[: len(self.any_numbers)])  # -0.0 is not special
        ])  # fmt: skip

    def _find(
        self, cases: tuple[Any, ...], _operands: int, outputs: Outputs
    ) -> tuple[Program, Parameters]:
        kernel, _ = self.trace(cases)
        return kernel.program(outputs), parameters_of(self.op, kernel)

    def reason_of_options(self, *options: Any) -> str | None:
        """Returns why no kernel takes the options, None if one does."""
        generic = self.problem or self.trace(self.any_numbers).problem
        if generic or (problem := self.trace(self.cases_of(options)).problem):
            return generic or problem
        if any(map(math.isnan, options[:-1])):
            return "a parameter is NaN"
        return None if options[-1] in checks.REDUCTIONS else f"reduction is {options[-1]!r}"

    def _trace(self, cases: tuple[Any, ...]) -> Trace:
        names = [scalar.name for scalar in self.op.numbers]
        method = partial(trace_loss, self.op, len(self.op.variables))
        kernel = Kernel(self.op.name, dict(zip(names, cases, strict=True)), method, exact=True)
        try:
            kernel.program(self.outputs)
        except Exception as error:  # the user's function may raise anything; torch then runs it
            return Trace(kernel, _located(error, self.formula))
        return Trace(kernel, None)

    def reason_of_shapes(self, *arguments: Any) -> str | None:
        """Returns why a kernel, which broadcasts all operands, cannot compute the result."""
        *operands, weight, _ = arguments
        shapes = [x.shape for x in operands]
        if shapes.count(shapes[0]) < len(shapes):
            if not all(broadcast_with(x, y) for x, y in combinations(shapes, 2)):
                return "the operands do not broadcast"
            # Sizes other than 1 are replaced, so batch sizes share a trace.
            small = [[1 if n == 1 else len(x) - i + 1 for i, n in enumerate(x)] for x in shapes]
            if not self.broadcasts(tuple(map(tuple, small))):
                return "the function does not broadcast all operands"
        if weight is None:
            return None
        fits = broadcast_with(weight.shape, torch.broadcast_shapes(*shapes), expands=True)
        return None if fits else "weight does not expand to the shape of the losses"

    def _broadcasts(self, shapes: tuple[tuple[int, ...], ...]) -> bool:
        """Returns whether the function broadcasts operands of these shapes."""
        functions = [f for f in (self.op.formula, self.op.gradient) if f is not None]
        numbers, dtypes = (0.5,) * len(self.op.numbers), traced_dtypes(self.op, len(shapes))
        return trace.broadcasts(functions, shapes, dtypes, numbers)


def formula_operator(
    formula: Formula, masks: tuple[bool, ...], static: dict[str, Any], problem: str | None
) -> PointwiseLoss:
    """Returns the operator of a user's formula; an activation is a loss without reduction.

    A formula has an operator for each choice of masks among its operands, and for each value of its
    static parameters. Its numbers are the other parameters.

    Args:
        problem: Why the formula is not traced, None if it is.
    """
    numbers = [name for name in formula.defaults if name not in static]
    count = len(formula.operands)

    def named(values: Sequence[Any]) -> dict[str, Any]:
        return static | dict(zip(numbers, values, strict=True))

    def evaluate(function: Any, *arguments: Any) -> Any:
        operands, values = arguments[:count], named(arguments[count:])
        return function(*operands, **formula.with_tensors(operands, values))

    def by_torch(*arguments: Any) -> Tensor:
        *tensors, weight, options = arguments
        value = formula.by_torch(tensors, named(options[:-1]))
        return reduced(value, options.reduction, weight)

    def reference(*arguments: Any) -> Tensor:
        pairs = zip(arguments, masks, strict=False)
        operands = [x.bool() if is_mask else x for x, is_mask in pairs]
        return by_torch(*operands, *arguments[count:])

    operands = zip(formula.operands, masks, strict=True)
    op = PointwiseLoss(
        name=f"{formula.__module__ or '__main__'}.{formula.__qualname__}",
        module="",
        family=formula.family,
        operands=(
            *[Operand(x, converts=True, differentiated=not is_mask) for x, is_mask in operands],
            Operand("weight", differentiated=False, optional=True, converts=True),
        ),
        numbers=tuple(map(Scalar, numbers)),
        choices=("reduction",),
        torch=by_torch,
        reference=reference,
        formula=partial(evaluate, formula.captured),
        gradient=partial(evaluate, formula.slopes_of) if formula.slopes is not None else None,
        denominators={"mean": _mean_of_weights},
        masks=tuple([k for k, is_mask in enumerate(masks) if is_mask]),
        infers_dtype=True,  # float32 masks promote half precision
        kernels_of=partial(TracedKernels, formula, problem),
    )
    op.asks_size, op.check_shapes, op.reason = False, None, op.source.reason_of_shapes
    op.invalid_options = op.source.reason_of_options  # not cached by numbers, as 0.0 == -0.0
    return op


def _located(error: Exception, formula: Formula) -> str:
    """Returns an error's message, with the line of the formula that raised it."""
    functions = [x for x in (formula.written, formula.slopes) if x is not None]
    codes = [inspect.unwrap(function).__code__ for function in functions]
    files = [code.co_filename for code in codes]
    lines = [(x.lineno, x.filename) for x in extract_tb(error.__traceback__) if x.filename in files]
    # Its result or its derivative may be wrong.
    line, file = [(codes[0].co_firstlineno, files[0]), *lines][-1]
    return f"line {line} of {file}: {error}"


def _returning_slopes(slopes: Any, operands: int) -> Callable[..., tuple[Any, ...]]:
    """Returns a user's gradient as a function that checks its result.

    It returns a derivative for each operand, a tensor or None for 0.

    Raises:
        TypeError: The gradient returns something else.
    """

    def checked(*arguments: Any, **named: Any) -> tuple[Any, ...]:
        result = slopes(*arguments, **named)
        each = result if isinstance(result, (tuple, list)) else (result,)
        if len(each) != operands or not all(x is None or isinstance(x, Tensor) for x in each):
            raise TypeError(
                f"{slopes.__name__}: expected a tensor or None for each of {operands} operands, "
                f"got {[type(x).__name__ for x in each]}"
            )
        return tuple(each)

    return checked


def _differentiated(function: Callable[..., Tensor], slopes: Any) -> tuple[Any, Any]:
    """Returns the function with the user's gradient, for torch.compile and for other calls."""

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
            values = slopes(*ctx.saved_tensors, **ctx.named)
            return None, *[None if slope is None else grad_output * slope for slope in values]

    class WithTangents(Differentiated):  # separate, as torch.compile cannot trace jvp
        @staticmethod
        def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Any:
            values = slopes(*ctx.saved_for_forward, **ctx.named)
            pairs = zip(values, tangents, strict=True)
            parts = [s * t for s, t in pairs if s is not None and t is not None]
            return sum(parts[1:], parts[0]) if parts else None

    return Differentiated, WithTangents


def _mean_of_weights(operands: Sequence[Tensor], weight: Tensor | None, *_: Any) -> Divisor:
    if weight is None:
        return operands[0].numel()
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
        captured: The copy of it that is traced, and that torch computes.
        slopes: The user's gradient, None for torch's derivative.
        op: The operator for the default parameters.
        is_called: Whether another formula calls this one.
    """

    __name__: str
    __qualname__: str

    def __init__(self, function: Callable[..., Tensor], loss: bool) -> None:
        if not hasattr(function, "__name__"):
            raise TypeError(f"function: expected a function with a name, got {function!r}")
        self.written, self.loss, self.is_called = function, loss, False
        self.slopes: Callable[..., Any] | None = None
        update_wrapper(self, function)
        self.operands, self.defaults = _read_signature(function)
        self.defaults = {name: self._checked(name, x) for name, x in self.defaults.items()}
        options = zip(_CALL_OPTIONS, ("mean" if loss else "none", None), strict=True)
        self.arguments = self.defaults | dict(options)
        self.keywords = {*self.defaults, *(_CALL_OPTIONS if loss else ())}
        self.__signature__ = inspect.signature(function)
        if loss:
            kind = inspect.Parameter.KEYWORD_ONLY
            parameters = self.__signature__.parameters.values()
            added = [inspect.Parameter(n, kind, default=self.arguments[n]) for n in _CALL_OPTIONS]
            self.__signature__ = self.__signature__.replace(parameters=[*parameters, *added])
        self._declare()

    @never_traced
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
            TypeError: The parameters of ``slopes`` are not the formula's, or as for
                :func:`pyfused.loss`.
            RuntimeError: Another formula, which calls this one, is defined already.
        """
        if self.is_called:
            raise RuntimeError(
                f"{self.__name__}.gradient: expected no other formula that calls {self.__name__}; "
                "define the gradient first"
            )
        expected, names = (list(inspect.signature(f).parameters) for f in (self.written, slopes))
        if names != expected:
            raise TypeError(f"{slopes.__name__}: expected the parameters {expected}, got {names}")
        before = self.__dict__.copy()
        self.slopes = slopes
        try:
            self._declare()
        except TypeError:
            self.__dict__.update(before)
            raise
        return slopes

    def _declare(self) -> None:
        """Sets the operator, and compiles it for the default parameters.

        If the function does not support float operands, tries masks for some of them.

        Raises:
            TypeError: A default is not a number, bool, str or None.
            UntraceableError: The function reads an object that it may not read, or no kernel can
                compute it.
        """
        self.kinds: tuple[Any, ...] = ()
        capture = Capture(Formula)
        self.captured = capture.copy(self.written)
        if self.slopes is not None:
            self.slopes_of = _returning_slopes(capture.copy(self.slopes), len(self.operands))
            self.kinds = _differentiated(self.captured, self.slopes_of)
        self.operators: dict[Any, PointwiseLoss] = {}
        self.family = "Formula"
        floats, *masked, _ = sorted(product((False, True), repeat=len(self.operands)), key=sum)
        _, static = self._split(self.defaults)
        for name, value in static.items():
            if type(value) not in _KINDS:
                raise TypeError(
                    f"{self.__name__}: {name}: expected a default that is a number, a bool, a str "
                    f"or None, got a {type(value).__name__}"
                )
        self.op = self.operator(floats, static)
        for masks in (floats, *masked):
            op = self.operator(masks, static)
            kernel, problem = op.source.trace(op.source.any_numbers)
            if problem is None:
                self.op = op
                for formula in capture.formulas:
                    formula.is_called = True
                if len(kernel.program(op.source.outputs).body) >= _LONG:
                    op.family = self.family = "LongFormula"
                return
        source = self.op.source
        raise UntraceableError(f"{self.__name__}: {source.trace(source.any_numbers).problem}")

    def operator(self, masks: tuple[bool, ...], static: dict[str, Any]) -> PointwiseLoss:
        """Returns the operator for a choice of masks and static parameters."""
        kinds = tuple(map(type, static.values()))
        if not _KINDS.issuperset(kinds):
            name, kind = next(x for x in zip(static, kinds, strict=True) if x[1] not in _KINDS)
            return formula_operator(self, masks, static, f"{name} is a {kind.__name__}")
        key = masks, kinds, *static.items()  # a parameter with the default None may be a number
        if (op := self.operators.get(key)) is None:
            if len(self.operators) >= _MOST_TRACES:
                problem = (
                    f"its static parameters have had {_MOST_TRACES} values; pass numbers that "
                    "change as float parameters"
                )
                return formula_operator(self, masks, static, problem)
            op = self.operators.setdefault(key, formula_operator(self, masks, static, None))
        return op

    @staticmethod
    def _split(parameters: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Returns the numbers, and the static parameters by name."""
        numbers, static = list[Any](), dict[str, Any]()
        for name, value in parameters.items():
            if isinstance(value, (float, Tensor)):
                numbers.append(value)
            else:
                static[name] = value
        return numbers, static

    # ---- calls -----------------------------------------------------------------------------------

    def __call__(self, *operands: Tensor, **named: Any) -> Tensor:
        operands, parameters, reduction, weight = self._bind(operands, named)
        tensors = *operands, weight
        is_tensor = is_dynamo_compiling() or isinstance(operands[0], Tensor)
        if is_tensor and torch_computes(self.op, tensors):
            return reduced(self.by_torch(operands, parameters), reduction, weight)
        masks = tuple([getattr(x, "dtype", None) is torch.bool for x in operands])
        numbers, static = self._split(parameters)
        op = self.operator(masks, static)
        result: Tensor = dispatch.run(op, tensors, op.options(*numbers, reduction))
        return result

    def function(self, *operands: Tensor, **named: Any) -> Tensor:
        """Returns the loss of each element, computed by torch's operators without kernels.

        It computes small tensors, double backward, forward mode, ``torch.func``, tensor subclasses,
        ``torch.compile`` and other devices. The user's function receives floats as 0-d tensors on
        the operands' device, in float64 if an operand is, else in float32.
        """
        operands, parameters, *_ = self._bind(operands, named)
        return self.by_torch(operands, parameters)

    def by_torch(self, operands: Sequence[Any], parameters: dict[str, Any]) -> Tensor:
        """Returns the loss of each element, given all parameters by name."""
        if parameters:
            parameters = self.with_tensors(operands, parameters)
        is_compiled = is_dynamo_compiling()
        if not self.kinds or (is_compiled and not any(map(requires_grad, operands))):
            value: Tensor = self.captured(*operands, **parameters)
            return value
        for name, value in parameters.items():
            if torch.is_grad_enabled() and getattr(value, "requires_grad", False):
                raise TypeError(
                    f"{self.__name__}: {name}: expected a number without a gradient, which "
                    f"{self.__name__}.gradient does not compute, got a Tensor that requires grad; "
                    "make it an operand"
                )
        kind = self.kinds[0 if is_compiled else 1]
        result: Tensor = kind.apply(parameters, *operands)
        return result

    def with_tensors(self, operands: Sequence[Any], parameters: dict[str, Any]) -> dict[str, Any]:
        """Returns the parameters with tensors instead of numbers."""
        values = in_tensors([*parameters.values()], operands)
        return dict(zip(parameters, values, strict=True))

    def _bind(
        self, operands: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], str, Tensor | None]:
        """Returns the operands, the parameters, the reduction and the weight of a call."""
        if len(operands) != len(self.operands) or not named.keys() <= self.keywords:
            try:
                named = self.__signature__.bind(*operands, **named).arguments  # slow: microseconds
            except TypeError as error:
                values = self.__signature__.parameters.values()
                expected = inspect.Signature([x.replace(annotation=x.empty) for x in values])
                raise TypeError(
                    f"{self.__name__}: {error}: expected {self.__name__}{expected}, got "
                    f"{len(operands)} positional arguments and the keywords {[*named]}"
                ) from None
            operands = tuple([named.pop(name) for name in self.operands])
        for name, x in zip(self.operands, operands, strict=True):
            if isinstance(x, Tensor) and x.dtype in _INTEGERS:
                raise TypeError(
                    f"{name}: expected a floating-point tensor or a bool mask, got {x.dtype}; "
                    f"convert it by {name}.to(dtype), or compare it, such as {name} == 1"
                )
        parameters = self.arguments | named
        for name in named:
            if name in self.defaults:
                parameters[name] = self._checked(name, named[name])
        return operands, parameters, parameters.pop("reduction"), parameters.pop("weight")

    def _checked(self, name: str, value: Any) -> Any:
        """Returns the value of a parameter: a number as a float, a tensor of one element as 0-d.

        Raises:
            TypeError: It is a tensor of several elements, or no number and its default is a float.
        """
        has_float_default = isinstance(self.defaults[name], float)
        if type(value) is float or value is None:
            return value
        if isinstance(value, Tensor):
            if value.numel() == 1:
                return (value if grad_enabled() else value.detach()).reshape(())
            got = f"a Tensor of shape {tuple(value.shape)}; make it an operand"
        elif isinstance(value, Real) and (has_float_default or not isinstance(value, Integral)):
            return float(value)
        elif has_float_default:
            got = f"{value!r}{'; make it an operand' * isinstance(value, (list, tuple))}"
        else:
            return value
        raise TypeError(
            f"{self.__name__}: {name}: expected a number or a tensor of one element, got {got}"
        )

    def module(self, **named: Any) -> FormulaModule:
        """Returns a module that calls the formula with these parameters.

        Tensors among them become parameters or buffers of the module. A loss also takes
        ``reduction``, but not ``weight``.

        Raises:
            TypeError: The formula has no such parameter.
        """
        return FormulaModule(self, named)

    def explain(self, *operands: Any, **named: Any) -> Explanation | str:
        """Makes a call, and explains how it was computed; see :func:`pyfused.explain`.

        Without arguments, returns a listing of the program for the default parameters: its
        instructions, and the bytes read and written per element.
        """
        if operands or named:
            with recorded() as calls:
                self(*operands, **named)
            return explanation_of(*calls[-1]) if calls else self.explain_small(operands, named)
        numbers, _ = self._split(self.defaults)
        if problem := self.op.invalid_options(*numbers, "none"):
            return f"{self.__name__}: torch: {problem}"
        needed = tuple([variable.differentiated for variable in self.op.variables])
        cases, outputs = self.op.source.cases_of(numbers), Outputs(True, needed)
        program, parameters = self.op.source.find(cases, len(needed), outputs)
        read, written = len(needed), sum(needed) + (not self.loss)
        tensors = "1 tensor" if read == 1 else f"{read} tensors"
        return "\n  ".join([
            (f"{self.__name__}: {len(program.body)} instructions for an element and its gradients; "
            f"{tensors} read, {written} written: {4 * (read + written)} bytes of float32"),
            *program.lines(self.operands, parameters(numbers)),
        ])  # fmt: skip

    def explain_small(self, operands: tuple[Any, ...], named: dict[str, Any]) -> Explanation:
        """Explains a call that was not dispatched, because it is small."""
        return explanation_of(self.op, self._bind(operands, named)[0], (), SMALL)

    def __reduce__(self) -> str:
        """Pickles the formula by name, like a function."""
        return self.__qualname__

    def __repr__(self) -> str:
        return f"<pyfused.{'loss' if self.loss else 'activation'} {self.__name__}>"


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


# ---- decorators ----------------------------------------------------------------------------------


@never_traced
def loss(function: Callable[..., Tensor]) -> Any:
    """Compiles an elementwise formula to a fused loss; use it as a decorator.

    The function reads its arguments, numbers, strings, tuples of these, and elementwise functions
    of torch and math. It may call other formulas, and Python functions that follow the same rule.
    It keeps what names stand for now, even if they are bound to other objects later: after
    ``ALPHA = 0.5``, define the formula again, or make ``alpha`` a parameter. It runs for tracing,
    and for calls that no kernel supports. It is pickled by name, like a function.

    Args:
        function: Takes one to four positional tensors, which broadcast, and parameters with
            defaults. Floats, and ints for a parameter whose default is a float, are 0-d tensors
            inside the function, float64 if an operand is, else float32; bools, other ints, strings
            and None are unchanged. Returns the loss of each element.

    Returns:
        A function that takes the operands, the parameters by keyword, and two more keywords:
        ``reduction``, which is ``"none"``, ``"mean"`` or ``"sum"``, and ``weight``, a tensor that
        broadcasts with the loss; a mean is divided by the sum of the weights. Operands may be
        float32, float64, bfloat16, float16 or bool; an integer operand is a TypeError. The result
        has the shape and dtype that torch's operators return. ``.module(...)`` makes a
        :class:`torch.nn.Module`, and ``.explain()`` returns the kernel's program as text.

    Raises:
        TypeError: The function's signature is not supported; it reads an object that may change,
            such as a list, a tensor, an attribute of an object or the grad mode, or the value of an
            operand or a float parameter; or it uses reductions, random numbers or shapes. Use the
            function without the decorator then.
    """
    return Formula(function, True)


@never_traced
def activation(function: Callable[..., Tensor]) -> Any:
    """Compiles an elementwise formula to a fused activation; use it as a decorator.

    Args:
        function: Takes one to four tensors, and parameters with defaults; see :func:`loss`.

    Returns:
        A function of the same arguments. The result has the operands' broadcast shape and the
        dtype that torch's operators return. The function has the methods described in
        :func:`loss`.

    Raises:
        TypeError: As :func:`loss`.
    """
    return Formula(function, False)
