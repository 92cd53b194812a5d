"""Traces a Python function of tensors to expressions of its value and its gradients.

The function runs once on example tensors. The ATen operators that it and its backward pass call
are recorded as expressions. A user's function receives parameters as Python numbers, because it
may compute with them in Python. When a number that depends on a parameter is passed to torch, it
is replaced by a tensor, which makes it an input of the program. Other values of the parameter then
need no new trace.

Operands keep their dtypes, so torch's functions take and return masks and integers as in any call;
floating-point operands are float64. Kernels convert masks and integers to floats, which rounds
integers of 2**24 or more, so integers may only be selected, compared where rounding does not change
the result, and converted to floating point.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from traceback import extract_tb
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode

from pyfused.formula_compiler.program import EXPONENTS, Expressions, UntraceableError, is_moderate
from pyfused.torch_internals import DispatchMode, decomposition_table, is_mutable, tree_map

# ---- recording of ATen operators -----------------------------------------------------------------


class Recorder(DispatchMode):
    """Records ATen operators as expressions; tensors are identified by their addresses."""

    def __init__(self, stabilize: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.e = Expressions(stabilize)
        # Keyed by address. Holding the tensors keeps their addresses from being reused.
        self.expressions: dict[int, tuple[Tensor, int]] = {}
        self.operands = set[int]()  # addresses
        self.integers = set[int]()  # expressions: integer operands and selections of these

    def track(self, tensor: Tensor, expression: int) -> None:
        self.expressions[tensor.data_ptr()] = tensor, expression

    def track_operand(self, tensor: Tensor, expression: int) -> None:
        self.track(tensor, expression)
        self.operands.add(tensor.data_ptr())
        self.e.masks[expression] = tensor.dtype is torch.bool
        if is_integer(tensor):
            self.integers.add(expression)

    def read(self, argument: Any) -> Any:
        """Returns the expression of a tensor or a number; returns other arguments unchanged."""
        if isinstance(argument, Tensor):
            if (tracked := self.expressions.get(argument.data_ptr())) is not None:
                return tracked[1]
            if argument.dim():
                raise UntraceableError("a tensor that is not an operand; pass it as an operand")
            argument = argument.item()
        if type(argument) is list:
            return [*map(self.read, argument)]
        return self.e.literal(argument) if type(argument) in (bool, int, float) else argument

    def __torch_dispatch__(self, op: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = op.name().removeprefix("aten::").partition(".")[0]  # without the overload's name
        if is_mutable(op) and args[0].data_ptr() in self.operands:
            raise UntraceableError(f"{name} changes an operand in place")
        name = name if name in ATEN else name.removesuffix("_")  # in-place operators
        if name in ATEN:
            result = op(*args, **kwargs)
            self.check_dtypes(name, args, result)
            selects = self.check_integers(name, args, result)
            named = {k: self.read(v) for k, v in kwargs.items() if k not in _NOT_READ}
            made = ATEN[name](self.e, *map(self.read, args), **named)
            pairs = zip(result, made, strict=True) if type(result) is tuple else [(result, made)]
            for tensor, expression in pairs:
                is_mask = tensor.dtype is torch.bool
                self.track(tensor, self.e.mask(expression) if is_mask else expression)
            if selects:
                self.integers.add(made)
            return result
        with self:
            result = decomposition_table.get(op, op.decompose)(*args, **kwargs)
        if result is NotImplemented:
            raise UntraceableError(
                f"no kernel supports {name}; use elementwise operations, and for a sum or mean "
                "of a loss, pass reduction= to its calls"
            )
        return result

    def check_dtypes(self, name: str, args: Sequence[Any], result: Any) -> None:
        """Raises an error for changes of dtype, because all values of a program have one dtype.

        The error is not a TypeError, which Python's operators would replace with another.
        """
        sources = {a.dtype for a in args if isinstance(a, Tensor) and a.dim()}
        dtype = result.dtype if isinstance(result, Tensor) and result.dim() else torch.float64
        problem = ""
        if torch.float64 in sources and dtype not in (torch.float64, torch.bool):
            problem = (
                f"{name} casts to {dtype}; the kernels compute in float32, or in float64 for "
                "float64 operands, so remove the cast"
            )
        elif name.startswith("bitwise") and sources - {torch.bool}:
            problem = f"{name} on integers"
        elif name == "index_put" and (
            [x.dtype for x in args[1]] != [torch.bool] or args[2].dim() or len(args) > 3
        ):
            problem = "an index that is not a mask, or values that are not a number"
        elif name == "add" and dtype is torch.bool:
            problem = "a sum of bool tensors; use torch.logical_or"
        if problem:
            raise RuntimeError(problem)

    def check_integers(self, name: str, args: Sequence[Any], result: Any) -> bool:
        """Raises an error if the rounding of integer operands could change the result.

        Returns:
            Whether the result is a selection of integer operands.
        """
        integers = [x for x in args if is_integer(x) and self.read(x) in self.integers]
        if not integers:
            return False
        dtype, problem, limits = result.dtype, "", torch.iinfo(integers[0].dtype)
        numbers: list[float] = []
        if name in (*_COMPARISONS, *_SELECTIONS, "full_like") and name not in _COPIES:
            numbers = [x for x in args if type(x) in (int, float)]
            numbers += [x.item() for x in args if isinstance(x, Tensor) and not x.dim()]
        if not all(limits.min <= number <= limits.max for number in numbers):
            problem = f"{numbers} with {integers[0].dtype}"  # torch would wrap them around
        elif name in _COMPARISONS:
            problem = "" if self.is_exact(args, integers) else f"{name} on integers above 2**24"
        elif name == "_to_copy" and dtype.is_floating_point:
            problem = f"a cast to {dtype}" if dtype in (torch.float16, torch.bfloat16) else ""
        elif is_integer(result) and name not in (*_SELECTIONS, *_CONSTANTS):
            problem = f"{name} on integers"
        elif name == "_to_copy" and torch.promote_types(dtype, args[0].dtype) is not dtype:
            problem = "" if dtype is torch.bool else f"a cast to {dtype}"
        if problem:
            raise RuntimeError(f"{problem}; call float() on integer operands first")
        return is_integer(result) and name in _SELECTIONS

    def is_exact(self, compared: Sequence[Any], integers: Sequence[Tensor]) -> bool:
        """Returns whether a comparison of integer operands has the same result after rounding.

        Rounding preserves the order of integers, and integers below 2**24. If the other side is
        floating-point, torch also rounds the integers.
        """
        if len(integers) == 2:
            return all(x.dtype in (torch.uint8, torch.int8, torch.int16) for x in integers)
        (other,) = [x for x in compared if x is not integers[0]]
        if isinstance(other, Tensor) and other.dim() and other.is_floating_point():
            return True
        index = self.read(other)
        value = self.e.value(index)
        return self.e.masks[index] or (value is not None and abs(value) < 2**24)


# Takes the operands, the parameters and the scale of the gradients.
Function = Callable[[list[Tensor], list[Tensor], Tensor], Sequence[Tensor | None]]
Result = TypeVar("Result")

_SHAPE = (2, 3)  # shape of the example tensors
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
_NOT_READ = ("dtype", "layout", "device", "pin_memory", "memory_format", "implicit", "non_blocking")


def isolated(function: Callable[..., Result], *arguments: Any) -> Result:
    """Calls a function in a new thread, with anomaly detection disabled.

    A formula may be defined or first called under any grad mode, dispatch mode or saved-tensor
    hooks. These are thread-local, but anomaly detection is global.
    """
    with torch.autograd.set_detect_anomaly(False), ThreadPoolExecutor(1) as thread:
        return thread.submit(function, *arguments).result()


def clamp_is_inclusive() -> bool:
    """Returns whether torch's derivative of clamp is 1 at a bound; from torch 2.14 on it is 0."""
    return bool(torch.__version__ < "2.14")


def is_integer(argument: Any) -> bool:
    """Returns whether an argument is an integer tensor with dimensions."""
    if not isinstance(argument, Tensor) or argument.is_floating_point() or not argument.dim():
        return False
    return argument.dtype is not torch.bool


def _operands(dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    values = torch.linspace(0.25, 0.75, 6, dtype=torch.float64, device="cpu").view(_SHAPE)
    return [
        values + 0.1 * k if dtype.is_floating_point else (6 * values).to(dtype)
        for k, dtype in enumerate(dtypes)
    ]


def expressions_of(
    function: Function,
    dtypes: Sequence[torch.dtype],
    parameters: Sequence[float],
    stabilize: bool = True,
) -> tuple[Expressions, list[int]]:
    """Traces a function.

    Args:
        dtypes: The dtypes of the operands.

    Returns:
        The expressions, and the indices of the results in them; None becomes the literal 0.

    Raises:
        UntraceableError: The function uses an operator that kernels do not support.
    """
    recorder = Recorder(stabilize)
    # Parameters have the operands' shape, because torch reads the values of 0-d tensors.
    tensors = {
        "operand": _operands(dtypes),
        "parameter": [torch.full(_SHAPE, x, dtype=torch.float64, device="cpu") for x in parameters],
        "scale": [torch.ones((), dtype=torch.float64, device="cpu")],
    }
    for kind, each in tensors.items():
        for k, tensor in enumerate(each):
            track = recorder.track_operand if kind == "operand" else recorder.track
            track(tensor, recorder.e.input(kind, k))
    leaves, numbers, (scale,) = tensors.values()
    with recorder:
        leaves = [x.requires_grad_(x.is_floating_point()) for x in leaves]
        results = function(leaves, numbers, scale)
    return recorder.e, [recorder.read(0.0 if each is None else each) for each in results]


class _Weighted(torch.autograd.Function):
    """Returns a scalar whose gradient with respect to the values is ``grad_output``.

    Passing grad_outputs to torch.autograd.grad would import sympy, which takes 0.4 s.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, grad_output: Tensor) -> Tensor:
        ctx.save_for_backward(grad_output)
        ctx.shape = values.shape
        return values.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        return ctx.saved_tensors[0].expand(ctx.shape), None


def gradients_of(
    value: Tensor, leaves: Sequence[Tensor], grad_output: Tensor
) -> list[Tensor | None]:
    """Returns the gradients of the leaves by torch's rules, None for unused leaves."""
    if not value.requires_grad:
        return [None] * len(leaves)
    weighted = _Weighted.apply(value, grad_output)
    inputs = [leaf for leaf in leaves if leaf.requires_grad]
    gradients = iter(torch.autograd.grad(weighted, inputs, allow_unused=True))
    return [next(gradients) if leaf.requires_grad else None for leaf in leaves]


# ---- a user's function ---------------------------------------------------------------------------


class Symbol:
    """A float parameter of a user's function, or a float computed from parameters.

    A function that can run with symbols computes with all values alike: it passes them to torch, or
    adds, multiplies, divides or exponentiates them. Anything else raises an error.

    Attributes:
        value: The value for the parameters of the trace.
        compute: Returns the value for other parameters, which it takes as a sequence.
    """

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, value: float, compute: Callable[[Sequence[Any]], float]) -> None:
        self.value, self.compute = value, compute

    @classmethod
    def __torch_function__(cls, *_: Any) -> Any:  # makes torch accept symbols
        raise UntraceableError("a parameter outside of the trace")


def _refuse(*_: Any) -> Any:
    raise UntraceableError("the value of a parameter is used")


def _arithmetic(op: Callable[..., float], swapped: bool = False) -> Callable[..., Any]:
    def method(symbol: Symbol, *others: Any) -> Any:
        if not all(type(other) in (int, float, Symbol) for other in others):
            return NotImplemented
        operands = (symbol, *others)[:: -1 if swapped else 1]

        def compute(parameters: Sequence[Any]) -> float:
            return op(*[x.compute(parameters) if isinstance(x, Symbol) else x for x in operands])

        return Symbol(op(*[x.value if isinstance(x, Symbol) else x for x in operands]), compute)

    return method


for _name in ("add", "sub", "mul", "truediv", "pow", "neg", "abs"):
    _op: Any = getattr(operator, _name)
    setattr(Symbol, f"__{_name}__", _arithmetic(_op))
    setattr(Symbol, f"__r{_name}__", _arithmetic(_op, swapped=True))
for _name in (
    *("bool", "float", "int", "index", "complex", "round", "trunc", "floor", "ceil", "str"),
    *("format", "repr", "eq", "ne", "lt", "le", "gt", "ge"),
):
    setattr(Symbol, f"__{_name}__", _refuse)


class UserFunction(NamedTuple):
    """A user's function, its gradient, and the dtypes of its operands."""

    function: Callable[..., Any]
    gradient: Callable[..., Any] | None
    dtypes: tuple[torch.dtype, ...]

    def run(self, parameters: dict[str, Any]) -> Run:
        return Run(self, _operands(self.dtypes), parameters, {})

    def symbolic_run(self, parameters: dict[str, Any], run: Run) -> Run | None:
        """Returns a run with symbols instead of floats, None if it differs from the run.

        Then the function can depend on the values of parameters in other ways than by literals.
        """
        symbols = {
            name: Symbol(value, operator.itemgetter(i)) if type(value) is float else value
            for i, (name, value) in enumerate(parameters.items())
        }
        try:
            symbolic = self.run(symbols)
        except UntraceableError:
            return None
        is_same = (symbolic.structure, symbolic.literals) == (run.structure, run.literals)
        return symbolic if is_same else None

    def dependent(self, parameters: dict[str, Any], run: Run) -> list[int]:
        """Returns the indices of the literals that depend on parameters.

        Ignores a parameter if another value of it changes the structure or raises an error.
        """
        indices = set[int]()
        for name, value in parameters.items():
            if type(value) not in (int, float):
                continue
            try:
                other = self.run(parameters | {name: value * 1.0009765625 + 2.0**-12})
            except UntraceableError:
                continue
            if other.structure == run.structure:
                pairs = zip(run.literals, other.literals, strict=True)
                indices |= {i for i, (old, new) in enumerate(pairs) if old != new}
        return sorted(indices)

    def derive(
        self, parameters: dict[str, Any], inputs: Mapping[int, float]
    ) -> tuple[Expressions, list[int]]:
        """Traces the value and the gradient of each operand; see :func:`expressions_of`.

        Args:
            inputs: The literals that are inputs: index to value.
        """

        def run(leaves: list[Tensor], numbers: list[Tensor], scale: Tensor) -> list[Tensor | None]:
            tensors = dict(zip(inputs, numbers, strict=True))
            value, *slopes = Run(self, leaves, parameters, tensors).results
            if value.shape != _SHAPE or not value.dtype.is_floating_point:
                raise UntraceableError(
                    f"expected an elementwise formula, got a {value.dtype} tensor of shape "
                    f"{tuple(value.shape)} from operands of shape {_SHAPE}; remove reductions "
                    "and pass reduction="
                )
            try:
                return [value, *(slopes or gradients_of(value, leaves, scale))]
            except Exception as error:
                raise UntraceableError(f"the derivative uses {error}") from error

        e, (value, *gradients) = expressions_of(run, self.dtypes, [*inputs.values()])
        return e, [value, *(map(e.scaled, gradients) if self.gradient else gradients)]


class Run(TorchFunctionMode):
    """Runs a user's function and gradient, and collects the numbers passed to torch.

    Args:
        inputs: Tensors that replace literals: index of the literal to tensor.

    Attributes:
        results: The value, and the derivatives if the user has written a gradient.
        literals: The numbers passed to torch's functions, which may be inputs of a program.
        symbols: The literals that are symbols, by index.
        exponents: The indices of literals that are exponents.
        structure: The dtypes of the operands, and the calls of torch's functions, with their
            arguments except the literals.

    Raises:
        UntraceableError: The function depends on values or shapes.
    """

    def __init__(
        self,
        user: UserFunction,
        operands: Sequence[Tensor],
        parameters: dict[str, Any],
        inputs: Mapping[int, Tensor],
    ) -> None:
        super().__init__()
        self.inputs, self.literals, self.structure = inputs, list[float](), [[*user.dtypes]]
        self.symbols, self.exponents = dict[int, Symbol](), set[int]()
        # Keyed by address. Holding the tensors keeps their addresses from being reused.
        self.sources: dict[int, tuple[Tensor, tuple[int, int]]] = {}
        self.track(operands)
        try:
            with self:
                self.results = [user.function(*operands, **parameters)]
                if user.gradient is not None:
                    self.results += slopes_of(user.gradient, operands, parameters)
            if not isinstance(self.results[0], Tensor):
                kind = type(self.results[0]).__name__
                raise UntraceableError(f"expected the function to return one tensor, got {kind}")
            self.structure.append(sources := list[Any]())
            tree_map(partial(self.read, sources), self.results)
        except Exception as error:
            file = user.function.__code__.co_filename
            lines = [f.lineno for f in extract_tb(error.__traceback__) if f.filename == file]
            message = f"line {[0, *lines][-1]} of {file}: {error}"
            if "Boolean value" in message or "converted to" in message:
                message += "; use torch.where instead of 'if' and torch's functions instead of "
                message += "math's on tensors"
            raise UntraceableError(message) from error

    def track(self, tensors: Sequence[Tensor]) -> None:
        """Identifies each result of a call by the index of the call and its own index."""
        for k, tensor in enumerate(tensors):
            self.sources[tensor.data_ptr()] = tensor, (len(self.structure), k)

    def __torch_function__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        if name == "__get__":
            name = getattr(func.__self__, "__name__", "a property")
        call = [func, torch.is_grad_enabled(), *(kwargs or {})]
        self.structure.append(call)
        try:
            bounds = [*args[1:], *(kwargs or {}).values()]
            counts = any(map(is_integer, (*args, *(kwargs or {}).values())))
            read = partial(self.read, call, is_structural=counts)
            args, kwargs = tree_map(read, (args, kwargs or {}))
            if name in _CLAMPS and not clamp_is_inclusive() and Tensor not in map(type, bounds):
                func = _CLAMPS[name]
            made = func(*args, **kwargs)
        except TypeError as error:  # Python's operators would raise another TypeError instead
            raise RuntimeError(f"{name}: {error}") from error
        results = made if isinstance(made, (tuple, list)) else () if made is None else (made,)
        if all(isinstance(result, Tensor) for result in results):
            self.track(results)
        elif not str(sys._getframe(1).f_globals.get("__name__")).startswith("pyfused."):
            raise UntraceableError(
                f"the result of {name.strip('_')} may differ between calls; pass it as a "
                "parameter, or use torch's functions: torch.where instead of 'if', "
                "torch.zeros_like and Tensor.type_as instead of shapes and dtypes"
            )
        return made

    def read(self, call: list[Any], argument: Any, is_structural: bool = False) -> Any:
        """Adds an argument to the structure of a call; returns it, or the tensor that replaces it.

        Numbers that rewrites depend on are part of the structure: exponents for which pow is
        rewritten, and very large and very small numbers. So are numbers that torch.tensor rounds,
        and numbers that are compared or computed with integers.
        """
        if isinstance(argument, Tensor):
            if argument.data_ptr() not in self.sources:
                raise UntraceableError("a tensor that is not an operand; pass it as an operand")
            if isinstance(argument.grad_fn, BackwardCFunction):  # may use a parameter untraced
                raise UntraceableError(
                    "an autograd.Function; define its gradient with @formula.gradient instead"
                )
            call.append(self.sources[argument.data_ptr()][1])
            return argument
        if isinstance(argument, Symbol):
            self.symbols[len(self.literals)] = argument
            argument = argument.value
        if isinstance(argument, bool) or not isinstance(argument, (int, float)):
            call.append(argument)
            return argument
        index, is_exponent = len(self.literals), call[0].__name__.strip("_") in ("pow", "rpow")
        if (
            is_structural
            or not is_moderate(argument)
            or call[0].__name__ in ("tensor", "as_tensor", "asarray")
            or (is_exponent and argument in EXPONENTS)
        ):
            if self.symbols.get(index) is not None:
                raise UntraceableError("the value of a parameter is used")
            call.append(repr(float(argument)))
            return argument
        call.append(float)
        self.literals.append(float(argument))
        self.exponents |= {index} if is_exponent else set()
        return self.inputs.get(index, argument)


def _clamp_to_numbers(x: Tensor, low: Any = None, high: Any = None, **named: Any) -> Tensor:
    low, high = named.get("min", low), named.get("max", high)
    x = x if low is None else torch.where(x <= low, low, x)
    return x if high is None else torch.where(x >= high, high, x)


# Clamps whose derivative at a bound is 0, as torch's from 2.14 on. When tensors replace numbers,
# torch's own clamps would divide the gradient between the input and the bound.
_CLAMPS: dict[str, Callable[..., Tensor]] = {
    **dict.fromkeys(("clamp", "clip", "clamp_min"), _clamp_to_numbers),
    "clamp_max": lambda x, high=None, **named: _clamp_to_numbers(x, None, high, **named),
}


def slopes_of(
    gradient: Callable[..., Any], operands: Sequence[Any], parameters: dict[str, Any]
) -> tuple[Any, ...]:
    """Calls a user's gradient; returns a derivative for each operand, a tensor or None for 0.

    Raises:
        TypeError: The gradient returns something else.
    """
    result = gradient(*operands, **parameters)
    slopes = result if isinstance(result, (tuple, list)) else (result,)
    valid = all(each is None or isinstance(each, Tensor) for each in slopes)
    if len(slopes) != len(operands) or not valid:
        raise TypeError(
            f"{gradient.__name__}: expected a tensor or None for each of {len(operands)} operands, "
            f"got {[type(each).__name__ for each in slopes]}"
        )
    return tuple(slopes)


# ---- ATen's operators as expressions -------------------------------------------------------------
# torch decomposes other operators, such as masked_fill and clamp_min, into these.

E = Expressions


def _scaled(op: str) -> Callable[..., int]:
    return lambda e, a, b, alpha=None: e.make(op, a, b if alpha is None else e.mul(b, alpha))


def _div(e: E, a: int, b: int, rounding_mode: str | None = None) -> int:
    if rounding_mode is not None:
        raise UntraceableError(f"div with rounding_mode={rounding_mode!r}")
    return e.div(a, b)


def _clamp(e: E, a: int, low: int | None = None, high: int | None = None) -> int:
    a = a if low is None else e.maximum(a, low)
    return a if high is None else e.minimum(a, high)


def _nan_to_num(
    e: E, a: int, nan: int | None = None, posinf: int | None = None, neginf: int | None = None
) -> int:
    if posinf is None or neginf is None:
        raise UntraceableError("posinf and neginf depend on the dtype by default; pass both")
    a = e.where(e.eq(a, a), a, e.literal(0) if nan is None else nan)
    a = e.where(e.eq(a, e.literal(math.inf)), posinf, a)
    return e.where(e.eq(a, e.literal(-math.inf)), neginf, a)


def _softplus(e: E, a: int, beta: int | None = None, threshold: int | None = None) -> int:
    beta, threshold = (
        e.literal(default) if value is None else value
        for value, default in ((beta, 1), (threshold, 20))
    )
    scaled = e.mul(a, beta)
    return e.where(e.lt(threshold, scaled), a, e.div(e.softplus(scaled), beta))


def _softplus_backward(e: E, g: int, a: int, beta: int, threshold: int) -> int:
    scaled = e.mul(a, beta)
    return e.where(e.lt(threshold, scaled), g, e.mul(g, e.sigmoid(scaled)))


def _index_put(e: E, a: int, indices: list[int], values: int) -> int:
    e.indexed = True
    return e.where(indices[0], values, a)


def _operation(op: str) -> Callable[..., int]:
    return lambda e, *arguments: e.make(op, *arguments)


def _on_masks(op: str) -> Callable[..., int]:
    return lambda e, *arguments: e.make(op, *map(e.mask, arguments))


def _constant(value: float) -> Callable[..., int]:
    return lambda e, *_, **__: e.literal(value)


def _argument(position: int) -> Callable[..., Any]:
    return lambda _, *arguments, **__: arguments[position]


_SAME_NAME = (
    *("abs", "cos", "eq", "erf", "exp", "expm1", "le", "log", "log1p", "lt"),
    *("maximum", "minimum", "mul", "neg", "pow", "reciprocal", "rsqrt", "sigmoid", "sign", "sin"),
    *("sqrt", "tanh", "where"),
)
_COPIES = (
    *("alias", "clone", "detach", "expand", "lift_fresh", "scalar_tensor", "view", "_to_copy"),
)
_ZEROS = ("zeros", "zeros_like", "new_zeros", "empty_like", "zero")
_ONES = ("ones", "ones_like", "new_ones")
_COPIES_OF_SECOND = ("full", "full_like", "fill", "copy")
_CONSTANTS = (*_ZEROS, *_ONES, "full_like")
_SELECTIONS = (*_COPIES, "where", "maximum", "minimum", "clamp", "relu")
ATEN: dict[str, Callable[..., Any]] = {
    **{name: _operation(name) for name in _SAME_NAME},
    **dict.fromkeys(_COPIES, _argument(0)),
    **dict.fromkeys(_ZEROS, _constant(0)),
    **dict.fromkeys(_ONES, _constant(1)),
    **dict.fromkeys(_COPIES_OF_SECOND, _argument(1)),
    "index_put": _index_put,
    "add": _scaled("add"),
    "sub": _scaled("sub"),
    "div": _div,
    "sgn": _operation("sign"),
    "log2": lambda e, a: e.mul(e.log(a), e.literal(1.4426950408889634)),
    "log10": lambda e, a: e.mul(e.log(a), e.literal(0.4342944819032518)),
    "exp2": lambda e, a: e.pow(e.literal(2), a),
    "gt": lambda e, a, b: e.lt(b, a),
    "ge": lambda e, a, b: e.le(b, a),
    "ne": lambda e, a, b: e.logical_not(e.eq(a, b)),
    "isnan": lambda e, a: e.logical_not(e.eq(a, a)),
    **dict.fromkeys(("logical_not", "bitwise_not"), _on_masks("logical_not")),
    **dict.fromkeys(("logical_and", "bitwise_and"), _on_masks("mul")),
    **dict.fromkeys(("logical_or", "bitwise_or"), _on_masks("maximum")),
    **dict.fromkeys(
        ("logical_xor", "bitwise_xor"), lambda e, a, b: e.logical_not(e.eq(e.mask(a), e.mask(b)))
    ),
    "clamp": _clamp,
    "nan_to_num": _nan_to_num,
    "relu": lambda e, a: e.maximum(a, e.literal(0)),
    "softplus": _softplus,
    "softplus_backward": _softplus_backward,
    "log_sigmoid_forward": lambda e, a: (e.neg(e.softplus(e.neg(a))), a),
    "log_sigmoid_backward": lambda e, g, a, _: e.mul(g, e.sigmoid(e.neg(a))),
    "sigmoid_backward": lambda e, g, y: e.mul(e.mul(g, e.sub(e.literal(1), y)), y),
    "tanh_backward": lambda e, g, y: e.mul(g, e.sub(e.literal(1), e.mul(y, y))),
    **dict.fromkeys(
        ("softshrink_backward", "hardshrink_backward"),
        lambda e, g, a, bound: e.where(e.le(e.abs(a), bound), e.literal(0), g),
    ),
}
