"""From a Python function of tensors to expressions: its value, and its gradients by torch's rules.

torch.fx records the function, with numbers as they are, so that it may do with its parameters what
Python can. It then runs once, on tensors that stand for the operands, and the ATen operators of the
function and of its derivatives become expressions. Literals that depend on parameters are inputs
there, so that other parameters take no other trace.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from traceback import extract_tb, walk_stack
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, fx
from torch._decomp import decomposition_table
from torch.fx.node import map_aggregate
from torch.utils._python_dispatch import TorchDispatchMode

from pyfused.ops.program import EXPONENTS, Expressions, UntraceableError, is_moderate

# ---- torch.fx: the function as it is written -----------------------------------------------------

_POW = (operator.pow, torch.pow, Tensor.pow, "pow", "__pow__", "__rpow__")
_SHAPES = ("shape", "size", "numel", "ndim", "dim", "dtype", "device", "__len__", "item", "tolist")


class _Tracer(fx.Tracer):
    def __init__(self, file: str) -> None:
        super().__init__()
        self.root, self.graph = torch.nn.Module(), fx.Graph(tracer_cls=_Tracer)
        self.tensor_attrs, self.file = {}, file

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, *args, **kwargs)
        for frame, line in walk_stack(None):
            if frame.f_code.co_filename == self.file:
                node.stack_trace = f"line {line} of {self.file}"
                break
        asked = args[1][1] if args[0] is getattr else args[0]
        if kind == "get_attr":
            raise UntraceableError(f"{node.stack_trace}: a tensor of its own; make it an operand")
        if asked in _SHAPES:
            raise UntraceableError(
                f"{node.stack_trace}: {asked}, which is not the same for every call; make it a "
                "parameter, or use operations like torch.zeros_like and Tensor.type_as"
            )
        return node


class Recorded(NamedTuple):
    """A function as torch.fx sees it with some parameters.

    Attributes:
        graph: Of the operands, and then of the numbers in it.
        literals: These numbers.
        exponents: Which of these are exponents with a program of their own.
        differentiated: Whether the graph has a gradient for each operand, too.
    """

    graph: fx.Graph
    structure: str
    literals: list[float]
    exponents: set[int]
    differentiated: bool


def record(
    function: Callable[..., Any],
    operands: Sequence[str],
    parameters: dict[str, Any],
    gradient: Callable[..., Any] | None = None,
) -> Recorded:
    """Records a function, and its gradient if one is given, which returns one for each operand.

    Raises:
        UntraceableError: The function does what depends on values or shapes.
    """
    tracer = _Tracer(function.__code__.co_filename)
    inputs = [tracer.create_proxy("placeholder", name, (), {}) for name in operands]
    try:
        output = function(*inputs, **parameters)
        slopes = () if gradient is None else slopes_of(gradient, inputs, parameters)
    except UntraceableError:
        raise
    except Exception as error:
        lines = [f.lineno for f in extract_tb(error.__traceback__) if f.filename == tracer.file]
        message = f"line {[0, *lines][-1]} of {tracer.file}: {error}"
        if isinstance(error, (fx.proxy.TraceError, TypeError)):
            message += "; use torch.where instead of 'if' and torch's functions instead of math's "
            message += "on tensors"
        raise UntraceableError(message) from error
    if not isinstance(output, fx.Proxy):
        raise UntraceableError(f"expected it to return one tensor, got {type(output).__name__}")
    outputs = tuple([x.node if isinstance(x, fx.Proxy) else x for x in (output, *slopes)])
    tracer.create_node("output", "output", (outputs,), {})
    graph, literals, exponents = tracer.graph, list[float](), set[int]()
    nodes = list(graph.nodes)

    def leaf(argument: Any) -> Any:
        if type(argument) not in (int, float):
            return argument
        if node.target in _POW and argument in EXPONENTS:
            exponents.add(len(literals))
        literals.append(argument)
        return graph.placeholder("literal")

    with graph.inserting_before(nodes[len(inputs)]):
        for node in nodes:
            node.args, node.kwargs = (map_aggregate(x, leaf) for x in (node.args, node.kwargs))
    return Recorded(graph, str(graph), literals, exponents, gradient is not None)


def slopes_of(
    gradient: Callable[..., Any], operands: Sequence[Any], parameters: dict[str, Any]
) -> tuple[Any, ...]:
    """Returns what a gradient of a user's returns for each operand: a tensor, or None for 0.

    Raises:
        TypeError: It returns something else.
    """
    found = gradient(*operands, **parameters)
    slopes = found if isinstance(found, (tuple, list)) else (found,)
    kinds = (Tensor, fx.Proxy, type(None))
    if len(slopes) != len(operands) or not all(isinstance(each, kinds) for each in slopes):
        raise TypeError(
            f"{gradient.__name__}: expected a tensor or None for each of {len(operands)} operands, "
            f"got {found!r}"
        )
    return tuple(slopes)


def dependent(
    function: Callable[..., Any],
    operands: Sequence[str],
    parameters: dict[str, Any],
    recorded: Recorded,
    gradient: Callable[..., Any] | None = None,
) -> list[int]:
    """Returns the literals that move with a parameter: another value of it changes these alone.

    A parameter that another value of makes another graph, or an error, is no input. Nor are very
    large and very small literals, which the rewrites have to know.
    """
    found: set[int] = set()
    for name, value in parameters.items():
        if type(value) not in (int, float):
            continue
        try:
            moved = parameters | {name: value * 1.0009765625 + 2.0**-12}
            other = record(function, operands, moved, gradient)
        except UntraceableError:
            continue
        if other.structure == recorded.structure:
            pairs = zip(recorded.literals, other.literals, strict=True)
            found |= {i for i, (one, another) in enumerate(pairs) if one != another}
    immoderate = {i for i, value in enumerate(recorded.literals) if not is_moderate(value)}
    return sorted(found - recorded.exponents - immoderate)


# ---- operators of ATen: expressions --------------------------------------------------------------


class Mode(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler, which takes a second


class Recorder(Mode):
    """Makes expressions of the ATen operators that it sees; a tensor is known by its memory."""

    def __init__(self, left_out: str = "") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.e, self.line = Expressions(left_out), ""
        self.known: dict[int, tuple[Tensor, int]] = {}  # the tensors, so that no memory is reused

    def know(self, tensor: Tensor, place: int) -> Tensor:
        self.known[tensor.data_ptr()] = tensor, place
        return tensor

    def read(self, argument: Any) -> Any:
        if isinstance(argument, Tensor) and argument.data_ptr() in self.known:
            return self.known[argument.data_ptr()][1]
        if isinstance(argument, Tensor) and argument.dim() == 0:
            argument = argument.item()
        return self.e.literal(argument) if type(argument) in (bool, int, float) else argument

    def __torch_dispatch__(self, op: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = op._schema.name.removeprefix("aten::")
        name = name if name in ATEN else name.removesuffix("_")  # in place
        if name in ATEN:
            made = op(*args, **kwargs)
            self.check_dtypes(name, args, made)
            named = {k: self.read(v) for k, v in kwargs.items() if k not in _NOT_READ}
            places = ATEN[name](self.e, *map(self.read, args), **named)
            pairs = zip(made, places, strict=True) if type(made) is tuple else [(made, places)]
            for tensor, place in pairs:
                self.know(tensor, self.e.mask(place) if tensor.dtype is torch.bool else place)
            return made
        with self:
            made = decomposition_table.get(op, op.decompose)(*args, **kwargs)
        if made is NotImplemented:
            raise UntraceableError(
                f"{name}, which is not one of the elementwise operations that the kernels have; "
                "write it with those"
            )
        return made

    def check_dtypes(self, name: str, args: Sequence[Any], made: Any) -> None:
        """Numbers are of one floating-point dtype; masks and integers made of them are exact."""
        sources = {a.dtype for a in args if isinstance(a, Tensor) and a.dim()}
        dtype = made.dtype if isinstance(made, Tensor) and made.dim() else torch.float64
        problem = ""
        if torch.float64 in sources and dtype not in (torch.float64, torch.bool):
            problem = (
                f"{name} makes {dtype} of numbers; the kernels compute in float32, or in float64 "
                "of float64, so leave casts out"
            )
        elif name.startswith("bitwise") and sources - {torch.bool}:
            problem = f"{name} of integers"
        elif name == "add" and dtype is torch.bool:
            problem = "a sum of masks; write torch.logical_or"
        if problem:
            raise UntraceableError(problem)


# What is recorded: a function of operands, parameters and the scale of the gradients.
Function = Callable[[list[Tensor], list[Tensor], Tensor], Sequence[Tensor | None]]
Result = TypeVar("Result")

_SHAPE = (2, 3)  # of the operands that a function is traced with
_NOT_READ = ("dtype", "layout", "device", "pin_memory", "memory_format", "implicit", "non_blocking")


class _Interpreter(fx.Interpreter):
    recorder: Recorder

    def run_node(self, n: fx.Node) -> Any:
        self.recorder.line = f"{n.stack_trace}, {n.name}"
        return super().run_node(n)


def isolated(function: Callable[..., Result], *arguments: Any) -> Result:
    """Calls a function in a thread of its own, and without anomaly detection.

    A formula is traced and checked wherever it is defined or first called. torch's grad modes,
    other modes and hooks of saved tensors belong to a thread, but anomaly detection to a process.
    """
    with torch.autograd.set_detect_anomaly(False), ThreadPoolExecutor(1) as thread:
        return thread.submit(function, *arguments).result()


def expressions_of(
    function: Function, operands: int, parameters: Sequence[float], recorder: Recorder
) -> tuple[Expressions, list[int]]:
    """Runs a function of so many operands and with these parameters, and records it.

    Returns:
        Expressions, and which of them the function's results are; None counts as 0.

    Raises:
        UntraceableError: The function is not elementwise, or the kernels lack an operator.
    """
    values = torch.linspace(0.25, 0.75, 6, dtype=torch.float64, device="cpu").view(_SHAPE)

    def input(kind: str, k: int, value: Tensor) -> Tensor:
        return recorder.know(value, recorder.e.input(kind, k))

    leaves = [input("operand", k, values + 0.1 * k).requires_grad_() for k in range(operands)]
    # A parameter is of the operands' shape: torch takes the number out of a scalar.
    pairs = enumerate(parameters)
    numbers = [input("parameter", k, values.new_full(_SHAPE, value)) for k, value in pairs]
    scale = input("scale", 0, values.new_ones(()))
    try:
        with recorder:
            results = function(leaves, numbers, scale)
    except Exception as error:
        raise UntraceableError(f"{recorder.line}: {error}") from error
    return recorder.e, [recorder.read(0.0 if each is None else each) for each in results]


class _Weighted(torch.autograd.Function):
    """A number whose gradient by the values is ``grad_output``.

    torch.autograd.grad imports sympy, for 0.4 s, where it is given a tensor of that.
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
    """Returns the gradients of the leaves by torch's rules, None of those that do not count."""
    if not value.requires_grad:
        return [None] * len(leaves)
    weighted = _Weighted.apply(value, grad_output)
    return [*torch.autograd.grad(weighted, leaves, allow_unused=True)]


def derive(
    recorded: Recorded, operands: int, lifted: Sequence[int]
) -> tuple[Expressions, list[int]]:
    """Returns expressions of the value and of each operand's gradient, as `expressions_of`."""
    recorder = Recorder()
    interpreter = _Interpreter(torch.nn.Module(), graph=recorded.graph)
    interpreter.recorder, interpreter.extra_traceback = recorder, False

    def run(leaves: list[Tensor], numbers: list[Tensor], scale: Tensor) -> list[Tensor | None]:
        literals: list[Any] = [*recorded.literals]
        for i, number in zip(lifted, numbers, strict=True):
            literals[i] = number
        value, *slopes = interpreter.run(*leaves, *literals)
        if value.shape != _SHAPE or not value.dtype.is_floating_point:
            raise UntraceableError(
                f"expected an elementwise formula, got a {value.dtype} tensor of shape "
                f"{tuple(value.shape)} from operands of shape {_SHAPE}; leave reductions to "
                "'reduction'"
            )
        recorder.line = "a derivative"
        return [value, *(slopes or gradients_of(value, leaves, scale))]

    parameters = [recorded.literals[i] for i in lifted]
    e, (value, *gradients) = expressions_of(run, operands, parameters, recorder)
    if recorded.differentiated:
        gradients = [e.scaled(gradient) for gradient in gradients]
    return e, [value, *gradients]


# ---- what expressions ATen's operators are -------------------------------------------------------

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


def _softplus(e: E, a: int, beta: int | None = None, threshold: int | None = None) -> int:
    beta, threshold = (
        e.literal(default) if given is None else given
        for given, default in ((beta, 1), (threshold, 20))
    )
    scaled = e.mul(a, beta)
    return e.where(e.lt(threshold, scaled), a, e.div(e.softplus(scaled), beta))


def _softplus_backward(e: E, g: int, a: int, beta: int, threshold: int) -> int:
    scaled = e.mul(a, beta)
    return e.where(e.lt(threshold, scaled), g, e.mul(g, e.sigmoid(scaled)))


def _own(op: str) -> Callable[..., int]:
    return lambda e, *arguments: e.make(op, *arguments)


def _of_masks(op: str) -> Callable[..., int]:
    return lambda e, *arguments: e.make(op, *map(e.mask, arguments))


def _constant(value: float) -> Callable[..., int]:
    return lambda e, *_, **__: e.literal(value)


def _argument(place: int) -> Callable[..., Any]:
    return lambda _, *arguments, **__: arguments[place]


_SAME_IN_BOTH = (
    *("abs", "cos", "eq", "erf", "exp", "expm1", "le", "log", "log1p", "lt"),
    *("maximum", "minimum", "mul", "neg", "pow", "reciprocal", "rsqrt", "sigmoid", "sign", "sin"),
    *("sqrt", "tanh", "where"),
)
_COPIES = (
    *("alias", "clone", "conj_physical", "contiguous", "detach", "expand", "expand_copy"),
    *("lift_fresh", "lift_fresh_copy", "scalar_tensor", "view", "view_as", "_to_copy"),
)
ATEN: dict[str, Callable[..., Any]] = {
    **{name: _own(name) for name in _SAME_IN_BOTH},
    **dict.fromkeys(_COPIES, _argument(0)),
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros", "empty_like", "zero"), _constant(0)),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), _constant(1)),
    **dict.fromkeys(("full", "full_like", "new_full", "fill", "copy"), _argument(1)),
    "add": _scaled("add"),
    "sub": _scaled("sub"),
    "rsub": lambda e, a, b, alpha=None: e.sub(b, a if alpha is None else e.mul(a, alpha)),
    "div": _div,
    "sgn": _own("sign"),
    "square": lambda e, a: e.mul(a, a),
    "log2": lambda e, a: e.mul(e.log(a), e.literal(1.4426950408889634)),
    "log10": lambda e, a: e.mul(e.log(a), e.literal(0.4342944819032518)),
    "exp2": lambda e, a: e.pow(e.literal(2), a),
    "gt": lambda e, a, b: e.lt(b, a),
    "ge": lambda e, a, b: e.le(b, a),
    "ne": lambda e, a, b: e.logical_not(e.eq(a, b)),
    "isnan": lambda e, a: e.logical_not(e.eq(a, a)),
    **dict.fromkeys(("logical_not", "bitwise_not"), _of_masks("logical_not")),
    **dict.fromkeys(("logical_and", "bitwise_and"), _of_masks("mul")),
    **dict.fromkeys(("logical_or", "bitwise_or"), _of_masks("maximum")),
    **dict.fromkeys(
        ("logical_xor", "bitwise_xor"), lambda e, a, b: e.logical_not(e.eq(e.mask(a), e.mask(b)))
    ),
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": lambda e, a, high: e.minimum(a, high),
    "relu": lambda e, a: e.maximum(a, e.literal(0)),
    "threshold_backward": lambda e, g, a, low: e.where(e.le(a, low), e.literal(0), g),
    "masked_fill": lambda e, a, mask, value: e.where(mask, value, a),
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
