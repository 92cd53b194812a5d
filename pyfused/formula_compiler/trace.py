"""Traces a Python function of tensors to expressions of its value and its gradients.

The function runs once on example tensors. The ATen operators that it and its backward pass call
are recorded as expressions. Numbers are 0-d tensors in the trace, so the function cannot depend on
their values other than through the recorded operators; reading one raises an error.

Floating-point operands are float64 and masks bool, so torch's functions take and return masks as in
any call.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyfused.formula_compiler.program import Expressions
from pyfused.torch_internals import DispatchMode, decomposition_table, is_mutable
from pyfused.types import NUMBER

# Takes the operands, the arguments and the scale of the gradients.
Function = Callable[[list[Tensor], list[Any], Tensor], Sequence[Tensor | None]]

_SHAPE = (5, 1, 7)  # of the example operands; formulas hardly have these sizes in their code
_REDUCTIONS = ("sum", "mean")  # of losses
_NOT_READ = ("dtype", "layout", "device", "pin_memory", "memory_format", "implicit", "non_blocking")


def clamp_is_inclusive() -> bool:
    """Returns whether torch's derivative of clamp is 1 at a bound; from torch 2.14 on it is 0."""
    return bool(torch.__version__ < "2.14")


# ---- recording of ATen operators -----------------------------------------------------------------


class Recorder(DispatchMode):
    """Records ATen operators as expressions; tensors are identified by their addresses.

    Errors are not TypeErrors, which Python's operators would replace with others.

    Attributes:
        expressions: The tensors and their expressions, keyed by address. Holding the tensors keeps
            their addresses from being reused.
        inputs: The names of the function's inputs, keyed by address.
        outer: The operator that is being decomposed, "" for none.
    """

    def __init__(self, stabilize: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.e, self.outer = Expressions(stabilize), ""
        self.expressions: dict[int, tuple[Tensor, int]] = {}
        self.inputs: dict[int, str] = {}

    def track(self, tensor: Tensor, expression: int) -> None:
        self.expressions[tensor.data_ptr()] = tensor, expression

    def input(self, tensor: Tensor, expression: int, name: str) -> Tensor:
        """Tracks an input of the function, and returns it."""
        self.track(tensor, expression)
        self.inputs[tensor.data_ptr()] = name
        self.e.masks[expression] = tensor.dtype is torch.bool
        return tensor

    def read(self, argument: Any) -> Any:
        """Returns the expression of a tensor or a number; returns other arguments unchanged."""
        if isinstance(argument, Tensor):
            if (tracked := self.expressions.get(argument.data_ptr())) is not None:
                return tracked[1]
            if argument.dim():
                raise RuntimeError("a tensor that is not an operand; pass it as an operand")
            argument = argument.item()
        if type(argument) is list:
            return [*map(self.read, argument)]
        return self.e.literal(argument) if type(argument) in (bool, int, float) else argument

    def __torch_dispatch__(self, op: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = op.name().removeprefix("aten::").partition(".")[0]  # without the overload's name
        if name == "_is_any_true":  # anomaly detection looks for NaN
            return torch.zeros((), dtype=torch.bool)
        if name == "_local_scalar_dense":
            return self.value(args[0])
        if is_mutable(op) and args[0].data_ptr() in self.inputs:
            raise RuntimeError(f"{name} changes {self.inputs[args[0].data_ptr()]} in place")
        name = name if name in ATEN else name.removesuffix("_")  # in-place operators
        if name in ATEN:
            result = op(*args, **kwargs)
            self.check_dtypes(name, args, result)
            named = {k: self.read(v) for k, v in kwargs.items() if k not in _NOT_READ}
            made = ATEN[name](self.e, *map(self.read, args), **named)
            pairs = zip(result, made, strict=True) if type(result) is tuple else [(result, made)]
            for tensor, expression in pairs:
                is_mask = tensor.dtype is torch.bool
                self.track(tensor, self.e.mask(expression) if is_mask else expression)
            return result
        outer, self.outer = self.outer, self.outer or name
        with self:
            result = decomposition_table.get(op, op.decompose)(*args, **kwargs)
        if result is NotImplemented:
            hint = "; to reduce a loss, pass reduction= to its calls"
            raise RuntimeError(
                f"no kernel supports {self.outer}{hint if self.outer in _REDUCTIONS else ''}"
            )
        self.outer = outer
        return result

    def value(self, tensor: Tensor) -> Any:
        """Returns the value of a tensor of one element that depends on no input."""
        if tensor.data_ptr() not in self.expressions:
            return tensor.item()
        name = self.inputs.get(tensor.data_ptr(), "a number that is computed from parameters")
        raise RuntimeError(
            f"the value of {name} is read, but floats are tensors in a formula: use torch.where "
            "instead of 'if', torch's functions instead of math's, and operators instead of "
            "functions whose arguments cannot be tensors; a parameter whose default is an int, a "
            "bool or a str may be read"
        )

    def check_dtypes(self, name: str, args: Sequence[Any], result: Any) -> None:
        """Raises an error for changes of dtype, because all values of a program have one dtype."""
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


class _TensorsOnly(TorchFunctionMode):
    """Refuses functions and attributes of tensors whose results are not tensors."""

    def __torch_function__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        results, name = result if isinstance(result, (tuple, list)) else (result,), func.__name__
        accepted = Tensor if name == "__get__" else (Tensor, NoneType)  # input.grad is None
        if not all(isinstance(x, accepted) for x in results):
            caller = str(sys._getframe(1).f_globals.get("__name__"))
            if not caller.startswith("pyfused."):
                if name == "__get__":
                    name = getattr(func.__self__, "__name__", "a property")
                raise RuntimeError(
                    f"the result of {name.strip('_')} may differ between calls; use torch's "
                    "functions, such as torch.zeros_like and Tensor.type_as, instead of shapes and "
                    "dtypes"
                )
        return result


def expressions_of(
    function: Function, dtypes: Sequence[torch.dtype], case: Mapping[str, Any], stabilize: bool
) -> tuple[Expressions, list[int]]:
    """Traces a function in a new thread.

    A formula may be defined or first called under any grad mode, dispatch mode or saved-tensor
    hooks, which are thread-local.

    Args:
        dtypes: The dtypes of the operands, float64 or bool.
        case: The arguments by name. The function receives a tensor for each NUMBER, and others
            unchanged.
        stabilize: Apply the rewrites for numerical stability.

    Returns:
        The expressions, and the indices of the results in them; None becomes the literal 0.

    Raises:
        RuntimeError: The function uses an operator that kernels do not support.
        Exception: Another error of the function.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_expressions_of, function, dtypes, case, stabilize).result()


def _expressions_of(
    function: Function, dtypes: Sequence[torch.dtype], case: Mapping[str, Any], stabilize: bool
) -> tuple[Expressions, list[int]]:
    recorder, count = Recorder(stabilize), 0
    e = recorder.e
    values = torch.linspace(0.25, 0.75, 35, dtype=torch.float64, device="cpu").view(_SHAPE)
    leaves, arguments = list[Tensor](), list[Any]()
    for k, dtype in enumerate(dtypes):
        is_float = dtype.is_floating_point
        leaf = (values + 0.1 * k if is_float else values > 0.5).requires_grad_(is_float)
        leaves.append(recorder.input(leaf, e.input("operand", k), "an operand"))
    for name, value in case.items():
        if value is NUMBER:
            arguments.append(
                recorder.input(
                    torch.full((), 0.5, dtype=torch.float64, device="cpu"),
                    e.input("parameter", count),
                    name,
                )
            )
            count += 1
        else:
            arguments.append(value)
    scale = recorder.input(
        torch.ones((), dtype=torch.float64, device="cpu"), e.input("scale", 0), "the scale"
    )
    with recorder, _TensorsOnly():
        results = function(leaves, arguments, scale)
    return e, [recorder.read(0.0 if each is None else each) for each in results]


def broadcasts(
    functions: Sequence[Callable[..., Any]],
    shapes: Sequence[Sequence[int]],
    dtypes: Sequence[torch.dtype],
    numbers: Sequence[float],
) -> bool:
    """Returns whether functions broadcast all operands; the first one's result has their shape.

    Calls the functions in a new thread, with small operands that broadcast in the same way. They
    may not use all operands, change a smaller one in place, or take a mask as an index.
    """
    small = [[1 if n == 1 else len(x) - dim + 1 for dim, n in enumerate(x)] for x in shapes]

    def call() -> bool:
        pairs = zip(small, dtypes, strict=True)
        operands = [torch.ones(shape, dtype=dtype, device="cpu") for shape, dtype in pairs]
        try:
            torch.broadcast_shapes(*shapes)
            value, *_ = [function(*operands, *numbers) for function in functions]
        except (IndexError, RuntimeError, ValueError, UserWarning):
            return False
        return bool(value.shape == torch.broadcast_shapes(*small))

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(call).result()


def elementwise(value: Any) -> Tensor:
    """Returns the result of a traced formula.

    Raises:
        RuntimeError: It is not a floating-point tensor of the operands' shape.
    """
    if value is None:
        raise RuntimeError("expected the function to return a tensor, got None; add a return")
    if not isinstance(value, Tensor):
        kind = type(value).__name__
        raise RuntimeError(f"expected the function to return one tensor, got {kind}")
    if value.shape != _SHAPE:
        raise RuntimeError(
            f"expected an elementwise formula, got a tensor of shape {tuple(value.shape)} from "
            f"operands of shape {_SHAPE}"
        )
    if not value.dtype.is_floating_point:
        raise RuntimeError(f"expected a floating-point result, got {value.dtype}")
    return value


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


# ---- ATen's operators as expressions -------------------------------------------------------------
# torch decomposes other operators, such as masked_fill and clamp_min, into these.

E = Expressions


def _scaled(op: str) -> Callable[..., int]:
    return lambda e, a, b, alpha=None: e.make(op, a, b if alpha is None else e.mul(b, alpha))


def _div(e: E, a: int, b: int, rounding_mode: str | None = None) -> int:
    if rounding_mode is not None:
        raise RuntimeError(f"div with rounding_mode={rounding_mode!r}")
    return e.div(a, b)


def _clamp(e: E, a: int, low: int | None = None, high: int | None = None) -> int:
    a = a if low is None else e.maximum(a, low)
    return a if high is None else e.minimum(a, high)


def _nan_to_num(
    e: E, a: int, nan: int | None = None, posinf: int | None = None, neginf: int | None = None
) -> int:
    if posinf is None or neginf is None:
        raise RuntimeError("nan_to_num: posinf and neginf depend on the dtype; pass both")
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
