"""From a Python function of tensors to expressions: its value, and its gradients by torch's rules.

torch.fx records the function, with numbers as they are, so that it may do with its parameters what
Python can. make_fx then records the ATen operators of the function and of its derivatives. Literals
that depend on parameters are inputs there, so that other parameters take no other trace.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Sequence
from itertools import chain, count, repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.nn import functional as F

from pyfused.ops.program import POWERS, Expressions

Number = int | float


class UntraceableError(TypeError):
    """A formula that no kernel can run, and why."""


# ---- torch.fx: the function as it is written -----------------------------------------------------

_POW = (operator.pow, torch.pow, Tensor.pow, "pow", "__pow__", "__rpow__")
_SHAPES = ("shape", "size", "numel", "ndim", "dim", "dtype", "device", "__len__", "item", "tolist")


class _Tracer(fx.Tracer):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.root, self.graph = torch.nn.Module(), fx.Graph(tracer_cls=_Tracer)
        self.tensor_attrs = {}
        self.file = function.__code__.co_filename

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, *args, **kwargs)
        frame = sys._getframe(1)
        while frame and frame.f_code.co_filename != self.file:
            frame = frame.f_back  # type: ignore[assignment]
        if frame:
            node.stack_trace = f"line {frame.f_lineno} of {self.file}"
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
        structure: All but the numbers in it.
        literals: The numbers.
        exponents: Which of these are exponents with a program of their own.
    """

    graph: fx.Graph
    structure: list[Any]
    literals: tuple[Number, ...]
    exponents: frozenset[int]


def record(
    function: Callable[..., Any], operands: Sequence[str], parameters: dict[str, Any]
) -> Recorded:
    """
    Raises:
        UntraceableError: The function does what depends on values or shapes.
    """
    tracer = _Tracer(function)
    inputs = [tracer.create_proxy("placeholder", name, (), {}) for name in operands]
    try:
        output = function(*inputs, **parameters)
    except UntraceableError:
        raise
    except Exception as error:
        raise UntraceableError(
            f"{_line_of(error, tracer.file)}: {error}; use torch.where instead of 'if' and "
            "torch's functions instead of math's on tensors"
        ) from error
    if not isinstance(output, fx.Proxy):
        raise UntraceableError(f"expected it to return one tensor, got {type(output).__name__}")
    tracer.create_node("output", "output", (output.node,), {})
    return _read(tracer.graph)


def _line_of(error: Exception, file: str) -> str:
    line, step = 0, error.__traceback__
    while step:
        if step.tb_frame.f_code.co_filename == file:
            line = step.tb_lineno
        step = step.tb_next
    return f"line {line} of {file}"


def _read(graph: fx.Graph) -> Recorded:
    places = {node: i for i, node in enumerate(graph.nodes)}
    structure: list[Any] = []
    literals: list[Number] = []
    exponents = []
    for node in graph.nodes:

        def leaf(argument: Any, node: fx.Node = node) -> Any:
            if isinstance(argument, fx.Node):
                return places[argument]
            if type(argument) not in (int, float):
                return argument
            if node.target in _POW and argument in POWERS:
                exponents.append(len(literals))
            literals.append(argument)
            return Number

        found = [map_aggregate(part, leaf) for part in (node.args, node.kwargs)]
        structure.append((node.op, node.target, *found))
    return Recorded(graph, structure, tuple(literals), frozenset(exponents))


def dependent(
    function: Callable[..., Any],
    operands: Sequence[str],
    parameters: dict[str, Any],
    recorded: Recorded,
) -> frozenset[int]:
    """The literals that move with a parameter: another value of it makes the same graph but these.

    A parameter that another value of makes another graph, or an error, is no input.
    """
    found: set[int] = set()
    for name, value in parameters.items():
        if type(value) not in (int, float):
            continue
        try:
            other = record(function, operands, parameters | {name: value * 1.0009765625 + 2.0**-12})
        except UntraceableError:
            continue
        if other.structure == recorded.structure:
            pairs = zip(recorded.literals, other.literals, strict=True)
            found |= {i for i, (one, another) in enumerate(pairs) if one != another}
    return frozenset(found - recorded.exponents)


def with_inputs(recorded: Recorded, lifted: Sequence[int]) -> fx.GraphModule:
    """The graph with some literals as inputs, which follow the operands."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    nodes = list(recorded.graph.nodes)
    operands = [node for node in nodes if node.op == "placeholder"]
    for node in operands:
        copies[node] = graph.node_copy(node)
    inputs = {i: graph.placeholder(f"parameter_{k}") for k, i in enumerate(lifted)}
    places = count()

    def leaf(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return copies[argument]
        if type(argument) not in (int, float):
            return argument
        return inputs.get(next(places), argument)

    for node in nodes[len(operands) :]:
        args, kwargs = (map_aggregate(part, leaf) for part in (node.args, node.kwargs))
        copies[node] = graph.create_node(node.op, node.target, args, kwargs)
        copies[node].meta = dict(node.meta)
    return fx.GraphModule(torch.nn.Module(), graph)


# ---- make_fx: operators of ATen ------------------------------------------------------------------


def _stable_bce(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    """Of torch's own the derivatives by its parts overflow."""
    if weight is not None or size_average is not None or reduce is not None or reduction != "none":
        return F.binary_cross_entropy_with_logits(
            input, target, weight, size_average, reduce, reduction, pos_weight
        )
    tail = F.softplus(-input)
    if pos_weight is not None:
        tail = tail * (1 + (pos_weight - 1) * target)
    return (1 - target) * input + tail


class _Interpreter(fx.Interpreter):
    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if getattr(target, "__name__", "") == "binary_cross_entropy_with_logits":
            target = _stable_bce
        return super().call_function(target, args, kwargs)


@torch.inference_mode(False)
@torch.enable_grad()
def derive(module: fx.GraphModule, operands: int, literals: Sequence[Number]) -> fx.Graph:
    """ATen's operators of the value and of the gradient of each operand, times a first input.

    Raises:
        UntraceableError: The function is not elementwise.
    """
    # Imported where a formula is defined: they are slow to import.
    from torch._decomp import core_aten_decompositions
    from torch.fx.experimental.proxy_tensor import make_fx

    decompositions = {
        op: f
        for op, f in core_aten_decompositions().items()
        if op._schema.name.removeprefix("aten::") not in ATEN
    }
    shape = 2, 3
    values = torch.linspace(0.25, 0.75, 6, dtype=torch.float64, device="cpu").view(shape)
    inputs = [values + 0.1 * k for k in range(operands)]
    numbers = [values.new_tensor(float(literal)) for literal in literals]

    def value_and_gradients(scale: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        rest = given[operands:]
        value, vjp, *_ = torch.func.vjp(
            lambda *inputs: _Interpreter(module).run(*inputs, *rest), *given[:operands]
        )
        if value.shape != shape or not value.dtype.is_floating_point:
            raise UntraceableError(
                f"expected an elementwise formula, got a {value.dtype} tensor of shape "
                f"{tuple(value.shape)} from operands of shape {shape}; leave reductions to "
                "'reduction'"
            )
        return value, *vjp(scale.to(value.dtype).expand(shape))

    try:
        with fx.traceback.preserve_node_meta(), torch.autocast("cpu", enabled=False):
            function = torch.func.functionalize(value_and_gradients, remove="mutations_and_views")
            return make_fx(function, decomposition_table=decompositions)(
                values.new_ones(()), *inputs, *numbers
            ).graph
    except UntraceableError:
        raise
    except Exception as error:
        raise UntraceableError(f"torch's derivatives of it: {error}") from error


def expressions(graph: fx.Graph, operands: int) -> tuple[Expressions, int, tuple[int, ...]]:
    """The expressions of the value and of the gradients.

    Raises:
        UntraceableError: An operator that the kernels do not have.
    """
    e, found = Expressions(), dict[fx.Node, Any]()
    inputs = chain(
        [("scale", 0)], zip(repeat("operand", operands), count()), zip(repeat("parameter"), count())
    )

    def read(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return found[argument]
        return e.literal(argument) if type(argument) in (int, float) else argument

    for node in graph.nodes:
        if node.op == "placeholder":
            found[node] = e.input(*next(inputs))
        elif node.op == "output":
            value, *gradients = node.args[0]
            return e, found[value], tuple(found[each] for each in gradients)
        elif node.target is operator.getitem:
            found[node] = found[node.args[0]][node.args[1]]
        else:
            name = getattr(node.target, "_schema", node.target).name.removeprefix("aten::")
            make = ATEN.get(name)
            if make is None:
                where = f"{node.stack_trace}: " if node.stack_trace else ""
                raise UntraceableError(
                    f"{where}{name}, which is not one of the elementwise operations that the "
                    "kernels have; write it with those"
                )
            _check_dtypes(node, name)
            args = [read(argument) for argument in node.args]
            kwargs = {k: read(v) for k, v in node.kwargs.items() if k not in _NOT_READ}
            found[node] = make(e, *args, **kwargs)
    raise AssertionError("a graph without an output")


_NOT_READ = ("dtype", "layout", "device", "pin_memory", "memory_format", "implicit", "non_blocking")


def _check_dtypes(node: fx.Node, name: str) -> None:
    """Numbers are kept in one floating-point dtype; masks and integers made of them are exact."""
    value = node.meta.get("val")
    sources = [
        a.meta["val"].dtype for a in node.args if isinstance(a, fx.Node) and a.meta["val"].dim()
    ]
    of_numbers = torch.float64 in sources
    dtype = value.dtype if isinstance(value, Tensor) and value.dim() else torch.float64
    if of_numbers and dtype not in (torch.float64, torch.bool):
        raise UntraceableError(
            f"{node.stack_trace or 'a derivative'}: {name} makes {dtype} of numbers; the "
            "kernels compute in float32, or in float64 of float64, so leave casts out"
        )
    of_masks = not of_numbers and bool(sources)
    if name.startswith("bitwise") and of_masks and any(s is not torch.bool for s in sources):
        raise UntraceableError(f"{node.stack_trace}: {name} of integers")
    if name == "add" and dtype is torch.bool:
        raise UntraceableError(f"{node.stack_trace}: a sum of masks; write torch.logical_or")


# ---- what expressions ATen's operators are -------------------------------------------------------

E = Expressions


def _same(_e: E, a: Any, *_: Any, **__: Any) -> Any:
    return a


def _scaled(op: str) -> Callable[..., int]:
    def make(e: E, a: int, b: int, alpha: int | None = None) -> int:
        b = b if alpha is None else e.mul(b, alpha)
        return e.make(op, a, b)

    return make


def _div(e: E, a: int, b: int, rounding_mode: str | None = None) -> int:
    if rounding_mode is not None:
        raise UntraceableError(f"div with rounding_mode={rounding_mode!r}")
    return e.div(a, b)


def _clamp(e: E, a: int, low: int | None = None, high: int | None = None) -> int:
    a = a if low is None else e.maximum(a, low)
    return a if high is None else e.minimum(a, high)


def _softplus(e: E, a: int, beta: int | None = None, threshold: int | None = None) -> int:  # noqa: ARG001 exact where torch's is linear
    return e.softplus(a) if beta is None else e.div(e.softplus(e.mul(a, beta)), beta)


def _softplus_backward(e: E, g: int, a: int, beta: int, threshold: int) -> int:  # noqa: ARG001
    return e.mul(g, e.sigmoid(e.mul(a, beta)))


def _log_sigmoid(e: E, a: int) -> tuple[int, int]:
    return e.neg(e.softplus(e.neg(a))), a


def _sigmoid_backward(e: E, g: int, y: int) -> int:
    return e.mul(e.mul(g, y), e.sub(e.literal(1), y))


def _silu_backward(e: E, g: int, a: int) -> int:
    y = e.sigmoid(a)
    return e.mul(g, e.mul(y, e.add(e.mul(a, e.sub(e.literal(1), y)), e.literal(1))))


_NORMAL = 0.3989422804014327  # density of the standard normal distribution at 0


def _gelu(e: E, a: int, approximate: str = "none") -> int:
    return e.mul(a, _gelu_parts(e, a, approximate)[0])


def _gelu_backward(e: E, g: int, a: int, approximate: str = "none") -> int:
    gate, slope = _gelu_parts(e, a, approximate)
    return e.mul(g, e.add(gate, e.mul(a, slope)))


def _gelu_parts(e: E, a: int, approximate: str) -> tuple[int, int]:
    """What the input is multiplied by, and its derivative."""
    square = e.mul(a, a)
    if approximate == "none":
        below = _half(e, e.add(e.erf(e.mul(a, e.literal(0.7071067811865476))), e.literal(1)))
        return below, e.mul(e.exp(e.mul(square, e.literal(-0.5))), e.literal(_NORMAL))
    twice, cubic = e.literal(4 * _NORMAL), e.literal(0.044715)
    gate = e.sigmoid(e.mul(twice, e.add(a, e.mul(e.mul(square, a), cubic))))
    inner = e.mul(twice, e.add(e.mul(square, e.literal(3 * 0.044715)), e.literal(1)))
    return gate, e.mul(e.mul(gate, e.sub(e.literal(1), gate)), inner)


def _leaky(e: E, g: int, a: int, slope: int | None = None, *_: Any) -> int:
    slope = e.literal(0.01) if slope is None else slope
    return e.where(e.lt(e.literal(0), a), g, e.mul(g, slope))


def _elu(e: E, a: int, alpha: int | None = None, *scales: int) -> int:
    one = e.literal(1)
    scale, input_scale = (*scales, one, one)[:2]
    below = e.mul(e.expm1(e.mul(a, input_scale)), e.mul(one if alpha is None else alpha, scale))
    return e.where(e.lt(e.literal(0), a), e.mul(a, scale), below)


def _elu_backward(
    e: E, g: int, alpha: int, scale: int, input_scale: int, is_result: bool, a: int
) -> int:
    most = e.mul(alpha, scale)
    below = e.add(a, most) if is_result else e.mul(e.exp(e.mul(a, input_scale)), most)
    below = e.mul(e.mul(g, input_scale), below)
    return e.where(e.le(a, e.literal(0)), below, e.mul(g, scale))


def _hardtanh_backward(e: E, g: int, a: int, low: int, high: int) -> int:
    outside = e.maximum(e.le(a, low), e.le(high, a))
    return e.where(outside, e.literal(0), g)


def _to(e: E, a: int, dtype: torch.dtype | None = None, **_: Any) -> int:
    return e.make("not", e.eq(a, e.literal(0))) if dtype is torch.bool else a


def _log_base(base: float) -> Callable[..., int]:
    return lambda e, a: e.mul(e.log(a), e.literal(base))


def _half(e: E, a: int) -> int:
    return e.mul(a, e.literal(0.5))


def _constant(place: int, default: float | None = None) -> Callable[..., int]:
    def make(e: E, *args: Any, **_: Any) -> int:
        return e.literal(default) if default is not None else args[place]

    return make


def _own(op: str) -> Callable[..., int]:
    return lambda e, *arguments: e.make(op, *arguments)


_SAME_IN_BOTH = (
    *("abs", "cos", "eq", "erf", "exp", "expm1", "le", "log", "log1p", "lt", "maximum", "minimum"),
    *("mul", "neg", "pow", "reciprocal", "rsqrt", "sigmoid", "sign", "sin", "sqrt", "tanh"),
    "where",
)
_COPIES = "alias", "clone", "contiguous", "detach", "expand", "expand_copy", "lift_fresh_copy"

ATEN: dict[str, Callable[..., Any]] = {
    **{name: _own(name) for name in _SAME_IN_BOTH},
    **dict.fromkeys(_COPIES, _same),
    "add": _scaled("add"),
    "sub": _scaled("sub"),
    "rsub": lambda e, a, b, alpha=None: e.sub(b, a if alpha is None else e.mul(a, alpha)),
    "div": _div,
    "square": lambda e, a: e.mul(a, a),
    "sgn": _own("sign"),
    "log2": _log_base(1.4426950408889634),
    "log10": _log_base(0.4342944819032518),
    "exp2": lambda e, a: e.pow(e.literal(2), a),
    "gt": lambda e, a, b: e.lt(b, a),
    "ge": lambda e, a, b: e.le(b, a),
    "ne": lambda e, a, b: e.make("not", e.eq(a, b)),
    "isnan": lambda e, a: e.make("not", e.eq(a, a)),
    "logical_not": lambda e, a: e.make("not", a),
    "bitwise_not": lambda e, a: e.make("not", a),
    **dict.fromkeys(("logical_and", "bitwise_and"), _own("mul")),
    **dict.fromkeys(("logical_or", "bitwise_or"), _own("maximum")),
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": lambda e, a, high: e.minimum(a, high),
    "relu": lambda e, a: e.maximum(a, e.literal(0)),
    "threshold_backward": lambda e, g, a, low: e.where(e.le(a, low), e.literal(0), g),
    "masked_fill": lambda e, a, mask, value: e.where(mask, value, a),
    "softplus": _softplus,
    "softplus_backward": _softplus_backward,
    "log_sigmoid_forward": _log_sigmoid,
    "log_sigmoid_backward": lambda e, g, a, _: e.mul(g, e.sigmoid(e.neg(a))),
    "sigmoid_backward": _sigmoid_backward,
    "tanh_backward": lambda e, g, y: e.mul(g, e.sub(e.literal(1), e.mul(y, y))),
    "silu": lambda e, a: e.mul(a, e.sigmoid(a)),
    "silu_backward": _silu_backward,
    "gelu": _gelu,
    "gelu_backward": _gelu_backward,
    "leaky_relu": lambda e, a, *slope: _leaky(e, a, a, *slope),
    "leaky_relu_backward": _leaky,
    "elu": _elu,
    "elu_backward": _elu_backward,
    "hardtanh": lambda e, a, low=None, high=None: _clamp(
        e, a, e.literal(-1) if low is None else low, e.literal(1) if high is None else high
    ),
    "hardtanh_backward": _hardtanh_backward,
    **dict.fromkeys(
        ("softshrink_backward", "hardshrink_backward"),
        lambda e, g, a, bound: e.where(e.le(e.abs(a), bound), e.literal(0), g),
    ),
    "_to_copy": _to,
    "zeros_like": _constant(0, 0.0),
    "ones_like": _constant(0, 1.0),
    "empty_like": _constant(0, 0.0),
    "new_zeros": _constant(0, 0.0),
    "new_ones": _constant(0, 1.0),
    "zeros": _constant(0, 0.0),
    "ones": _constant(0, 1.0),
    "full_like": _constant(1),
    "full": _constant(1),
    "fill": _constant(1),
    "scalar_tensor": _constant(0),
}  # fmt: skip
