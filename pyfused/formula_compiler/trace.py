"""Traces a Python function of tensors to expressions of its value and its gradients.

The function runs once on 0-d tensors. The ATen operators that it and its backward pass call are
recorded as expressions. The operands of a call may have any shape, so what needs dimensions, or
depends on them, is refused: torch has to tag functions and ATen operators as pointwise, or the
tables below have to list them. Functions are checked, too, because some of them, such as
``torch.inner``, call pointwise operators for 0-d tensors only. Numbers are also 0-d tensors, and
reading their values raises an error, so the function depends on them only through the recorded
operators. Operators whose arguments are all constants are computed by torch.

Floating-point operands are float64 and masks bool, so torch's functions take and return masks as in
any call.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyfused.formula_compiler.program import Expressions
from pyfused.torch_internals import DispatchMode, decomposition_table, is_mutable, tree_leaves
from pyfused.types import NUMBER

# Takes the operands, the arguments and the scale of the gradients.
Function = Callable[[list[Tensor], list[Any], Tensor], Sequence[Tensor | None]]

_REDUCED = "; to reduce a loss, pass reduction= to its calls"
_CONDITION = "; an 'if' cannot depend on tensors: select elements with torch.where"
_SHAPE = (
    ", whose result may differ between calls; use torch's functions, such as torch.zeros_like and "
    "Tensor.type_as, instead of shapes and dtypes"
)
_OF_CLASSES = "; for a function of log-probabilities, call log_probs or linear_log_probs"
_OVER_CLASSES = "cross_entropy", "gather", "log_softmax", "logsumexp", "nll_loss", "softmax"
_HINTS = {
    **dict.fromkeys(_OVER_CLASSES, _OF_CLASSES),
    **dict.fromkeys(("sum", "mean"), _REDUCED),
    **dict.fromkeys(("any", "all"), _CONDITION),
    **dict.fromkeys(("device", "dim", "dtype", "len", "ndim", "numel", "shape", "size"), _SHAPE),
}
_NOT_READ = ("dtype", "layout", "device", "pin_memory", "memory_format", "implicit", "non_blocking")
_HALVES = (torch.float16, torch.bfloat16)
_SMALL_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32)
_trace = threading.local()  # the recorder of the trace that runs in a thread of its own


@cache
def clamp_is_inclusive() -> bool:
    """Returns whether torch's derivative of clamp is 1 at a bound; from torch 2.14 on it is 0."""
    return bool(torch.__version__ < "2.14")


# ---- recording of ATen operators -----------------------------------------------------------------


class RefusedError(RuntimeError):
    """Raised if a function is not elementwise, or uses what kernels do not support.

    It is not a TypeError, which Python's operators would replace with another error.
    """


class _Tracked(NamedTuple):
    """A tensor of the trace.

    Attributes:
        storage: Its storage; holding it keeps the id from being reused.
        expression: Its expression.
        is_number: Whether it is 0-d in all calls, so that its shape does not depend on an operand.
    """

    storage: torch.UntypedStorage
    expression: int
    is_number: bool


class Recorder(DispatchMode):
    """Records ATen operators as expressions.

    Tensors are identified by their storages, which aliases and tensors saved for backward share.

    Attributes:
        tracked: The tensors that depend on inputs, keyed by the id of the storage.
        inputs: The names of the function's inputs, keyed by the id of the storage.
        function: The function of torch that the user's function has called, "" for none.
        outer: The operator that is being decomposed, "" for none.
        refusal: The last error, which the user's function may have caught.
    """

    def __init__(self, exact: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.e, self.function, self.outer = Expressions(exact), "", ""
        self.tracked: dict[int, _Tracked] = {}
        self.inputs: dict[int, str] = {}
        self.refusal: RefusedError | None = None

    def track(self, tensor: Tensor, expression: int, is_number: bool) -> None:
        storage = tensor.untyped_storage()
        self.tracked[id(storage)] = _Tracked(storage, expression, is_number)

    def input(self, tensor: Tensor, kind: str, k: int, name: str) -> Tensor:
        """Tracks an input of the function, and returns it."""
        expression = self.e.input(kind, k)
        self.track(tensor, expression, kind != "operand")
        self.inputs[_id(tensor)] = name
        self.e.masks[expression] = tensor.dtype is torch.bool
        return tensor

    def is_number(self, value: Any) -> bool:
        """Returns whether a value has no dimensions, whatever the operands' shapes are."""
        tracked = self.tracked.get(_id(value)) if isinstance(value, Tensor) else None
        return tracked is None or tracked.is_number

    def read(self, argument: Any) -> Any:
        """Returns the expression of a tensor or a number; returns other arguments unchanged."""
        if isinstance(argument, Tensor):
            if (tracked := self.tracked.get(_id(argument))) is not None:
                return tracked.expression
            argument = argument.item()
        return self.e.literal(argument) if type(argument) in (bool, int, float) else argument

    def refused(self, op: str, reason: str = "") -> RefusedError:
        """Returns the error for an operator that kernels do not support."""
        name = self.function or self.outer or op
        return RefusedError(f"no kernel supports {name}{reason or _HINTS.get(name, '')}")

    def __torch_dispatch__(self, op: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = op.name().removeprefix("aten::").partition(".")[0]  # without the overload's name
        if name == "_is_any_true":  # anomaly detection looks for NaN
            return torch.zeros((), dtype=torch.bool)
        if name == "_local_scalar_dense":
            return self.value(args[0])
        if name == "_efficientzerotensor":  # a derivative without memory, which kernels cannot read
            return torch.zeros(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        tracked = [x for x in tensors if _id(x) in self.tracked]
        is_random = torch.Tag.nondeterministic_seeded in op.tags
        if is_random or any(x.dim() for x in tensors):
            raise self.refused(name)
        if is_mutable(op):
            self.check_mutation(name, args[0], tensors)
        base = name.removesuffix("_")  # in-place operators
        base = next((x for x in (op.name().removeprefix("aten::"), name, base) if x in ATEN), base)
        position = _VALUES.get(base)
        if position is not None and not self.is_number(args[position]):
            raise self.refused(name, " with a value that is not a number")
        if tracked and base not in ATEN:
            return self.decompose(op, name, args, kwargs)
        result = op(*args, **kwargs)
        if any(x.dim() for x in tree_leaves(result) if isinstance(x, Tensor)):
            raise self.refused(name, ", which makes a tensor with dimensions")
        if tracked:
            self.check_dtypes(base, args, result)
            self.record(base, args, kwargs, result)
        return result

    def record(self, name: str, args: Any, kwargs: Any, result: Any) -> None:
        """Tracks the results of an operator."""
        is_number = name in _NEW or all(map(self.is_number, tree_leaves((args, kwargs))))
        named = {k: self.read(v) for k, v in kwargs.items() if k not in _NOT_READ}
        made = ATEN[name](self.e, *map(self.read, args), **named)
        pairs = zip(result, made, strict=True) if type(result) is tuple else [(result, made)]
        for tensor, expression in pairs:
            is_mask = tensor.dtype is torch.bool
            self.track(tensor, self.e.mask(expression) if is_mask else expression, is_number)

    def decompose(self, op: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Calls an operator as the operators that it consists of."""
        is_elementwise = torch.Tag.pointwise in op.tags or name.removesuffix("_") in _ELEMENTWISE
        if not (is_elementwise or self.outer):
            raise self.refused(name)
        if not is_mutable(op):
            op(*args, **kwargs)  # raises errors that its decomposition lacks
        outer, self.outer = self.outer, self.outer or name
        with self:
            result = decomposition_table.get(op, op.decompose)(*args, **kwargs)
        if result is NotImplemented:
            raise self.refused(name)
        self.outer = outer
        return result

    def check_mutation(self, name: str, target: Any, tensors: Sequence[Tensor]) -> None:
        """Raises an error if an operator changes an input, or writes a tensor into a number."""
        if (changed := self.inputs.get(_id(target))) is not None:
            raise RefusedError(f"{name} changes {changed} in place")
        if self.is_number(target) and not all(map(self.is_number, tensors)):
            raise self.refused(name, ", which writes a tensor into a number")

    def value(self, tensor: Tensor) -> Any:
        """Returns the value of a constant."""
        if _id(tensor) not in self.tracked:
            return tensor.item()
        kind = "a number that is computed from parameters" if self.is_number(tensor) else "a tensor"
        name = self.inputs.get(_id(tensor), kind)
        raise RefusedError(
            f"the value of {name} is read, but floats are tensors in a formula: use torch.where "
            "instead of 'if', torch's functions instead of math's, and operators instead of "
            "functions whose arguments cannot be tensors; a parameter whose default is an int, a "
            "bool or a str may be read"
        )

    def check_dtypes(self, name: str, args: Sequence[Any], result: Any) -> None:
        """Raises an error for changes of dtype, because all values of a program have one dtype."""
        sources = {x.dtype for x in args if isinstance(x, Tensor) and _id(x) in self.tracked}
        dtype = result.dtype if isinstance(result, Tensor) else torch.float64
        narrows = dtype is not torch.bool and _bits(dtype) < max(map(_bits, sources), default=0)
        problem = ""
        if dtype in _HALVES or narrows:
            problem = (
                f"{self.function or name} casts to {dtype}; the kernels compute in float32, or in "
                "float64 for float64 operands, so remove the cast"
            )
        elif name.startswith("bitwise") and sources - {torch.bool}:
            problem = f"{name} on integers"
        elif not sources.isdisjoint(_SMALL_INTEGERS) and name not in _COPIES:
            problem = f"{name} on integers of less than 64 bits, which may overflow"
        elif name == "add" and dtype is torch.bool:
            problem = "a sum of bool tensors; use torch.logical_or"
        if problem:
            raise RefusedError(problem)


def _id(tensor: Tensor) -> int:
    """Returns the id of a tensor's storage, which has one Python object while it is referenced."""
    return id(tensor.untyped_storage())


def _bits(dtype: torch.dtype) -> int:
    """Returns the bits of a floating-point dtype, 0 for others."""
    return torch.finfo(dtype).bits if dtype.is_floating_point else 0


class _Functions(TorchFunctionMode):
    """Records the function of torch that a formula calls, and refuses it if not elementwise."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        caller = str(sys._getframe(1).f_globals.get("__name__"))
        if caller.startswith("pyfused.") or func is torch.autograd.grad:
            return func(*args, **(kwargs or {}))
        try:
            return self.called(func, args, kwargs or {})
        except RefusedError as error:
            self.recorder.refusal = error
            raise

    def called(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Returns the result of a function that the user's function calls."""
        name = func.__name__
        if name in ("__get__", "__set__"):  # of an attribute
            name = getattr(func.__self__, "__name__", "a property")
        if func is Tensor.__getitem__:
            raise RefusedError("no kernel supports an index or a slice of a tensor")
        outer, self.recorder.function = self.recorder.function, name.strip("_") or name
        try:
            if not is_elementwise(name):
                raise self.recorder.refused(name)
            result = self.assign(*args) if func is Tensor.__setitem__ else func(*args, **kwargs)
        except RefusedError:
            raise
        except (IndexError, RuntimeError, TypeError, ValueError) as error:  # of torch
            raise RefusedError(f"no kernel supports {self.recorder.function}: {error}") from error
        finally:
            self.recorder.function = outer
        results = result if isinstance(result, (tuple, list)) else (result,)
        if not all(isinstance(x, (Tensor, NoneType)) for x in results):
            raise RefusedError(f"no kernel supports {name}{_SHAPE}")
        return result

    @staticmethod
    def assign(tensor: Tensor, index: Any, value: Any) -> None:
        """Assigns a number where a mask is true."""
        if not isinstance(index, Tensor) or index.dtype is not torch.bool:
            raise RefusedError("no kernel supports an index that is not a mask")
        tensor.masked_fill_(index, value)


@cache
def is_elementwise(name: str) -> bool:
    """Returns whether the functions of torch with this name are elementwise, for some arguments.

    The recorder refuses others, such as reductions by ``max``. Functions that read the value of a
    tensor are included, as the recorder refuses them with an explanation.
    """
    if name in _READ_VALUES:
        return True
    if name == "detach_":  # changes an operand, which the recorder does not see
        return False
    name = name.strip("_").removeprefix("special_")
    packet = getattr(torch.ops.aten, name, None)
    overloads = [getattr(packet, x) for x in packet.overloads()] if packet is not None else []
    is_tagged = any(torch.Tag.pointwise in x.tags for x in overloads)
    return is_tagged or name in _FUNCTIONS or (name in ATEN and name != "expand")


def expressions_of(
    function: Function, dtypes: Sequence[torch.dtype], case: Mapping[str, Any], exact: bool
) -> tuple[Expressions, list[int]]:
    """Traces a function in a new thread.

    A formula may be defined or first called under any grad mode, dispatch mode or saved-tensor
    hooks, which are thread-local.

    Args:
        dtypes: The dtypes of the operands, float64 or bool.
        case: The arguments by name. The function receives a tensor for each NUMBER, and others
            unchanged.
        exact: Whether to omit the rewrites that avoid overflows and cancellations of the formula.

    Returns:
        The expressions, and the indices of the results in them; None becomes the literal 0.

    Raises:
        RuntimeError: The function uses an operator that kernels do not support.
        Exception: Another error of the function.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_expressions_of, function, dtypes, case, exact).result()


def refuse(message: str) -> None:
    """Raises an error if a trace runs in this thread, which fails even if the error is caught."""
    if (recorder := getattr(_trace, "recorder", None)) is not None:
        recorder.refusal = RefusedError(message)
        raise recorder.refusal


def _expressions_of(
    function: Function, dtypes: Sequence[torch.dtype], case: Mapping[str, Any], exact: bool
) -> tuple[Expressions, list[int]]:
    recorder = _trace.recorder = Recorder(exact)

    def number(value: float, kind: str, k: int, name: str) -> Tensor:
        tensor = torch.full((), value, dtype=torch.float64, device="cpu")
        return recorder.input(tensor, kind, k, name)

    leaves, arguments, count = list[Tensor](), list[Any](), 0
    for k, dtype in enumerate(dtypes):
        leaf = torch.ones((), dtype=dtype, device="cpu", requires_grad=dtype.is_floating_point)
        leaves.append(recorder.input(leaf, "operand", k, "an operand"))
    for name, value in case.items():
        is_number = value is NUMBER
        arguments.append(number(0.5, "parameter", count, name) if is_number else value)
        count += is_number
    scale = number(1.0, "scale", 0, "the scale")
    with recorder, _Functions(recorder):
        results = function(leaves, arguments, scale)
    if recorder.refusal is not None:
        raise recorder.refusal
    if recorder.is_number(results[0]):
        raise RefusedError("expected an elementwise formula, got one number for all elements")
    return recorder.e, [recorder.read(0.0 if each is None else each) for each in results]


def broadcasts(
    functions: Sequence[Callable[..., Any]],
    shapes: Sequence[Sequence[int]],
    dtypes: Sequence[torch.dtype],
    numbers: Sequence[float],
) -> bool:
    """Returns whether functions broadcast all operands; the first one's result has their shape.

    Calls the functions in a new thread. They may not use all operands, change a smaller one in
    place, or take a mask as an index.

    Args:
        shapes: Small shapes that broadcast.
    """

    def call() -> bool:
        pairs = zip(shapes, dtypes, strict=True)
        operands = [torch.ones(shape, dtype=dtype, device="cpu") for shape, dtype in pairs]
        try:
            value, *_ = [function(*operands, *numbers) for function in functions]
        except (IndexError, RuntimeError, ValueError, UserWarning):
            return False
        return bool(value.shape == torch.broadcast_shapes(*shapes))

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(call).result()


def elementwise(value: Any) -> Tensor:
    """Returns the result of a traced formula.

    Raises:
        RuntimeError: It is not a floating-point tensor.
    """
    if value is None:
        raise RefusedError("expected the function to return a tensor, got None; add a return")
    if not isinstance(value, Tensor):
        kind = type(value).__name__
        raise RefusedError(f"expected the function to return one tensor, got {kind}")
    if not value.dtype.is_floating_point:
        raise RefusedError(f"expected a floating-point result, got {value.dtype}")
    return value


def gradients_of(
    value: Tensor, leaves: Sequence[Tensor], grad_output: Tensor
) -> list[Tensor | None]:
    """Returns the gradients of the leaves by torch's rules, None for unused leaves."""
    if not value.requires_grad:
        return [None] * len(leaves)
    inputs = [leaf for leaf in leaves if leaf.requires_grad]
    # grad_outputs= would import sympy, which takes 0.4 s.
    gradients = iter(torch.autograd.grad(value * grad_output, inputs, allow_unused=True))
    return [next(gradients) if leaf.requires_grad else None for leaf in leaves]


# ---- ATen's operators as expressions -------------------------------------------------------------
# torch decomposes other operators, such as masked_fill and clamp_min, into these.

E = Expressions


def _scaled(op: str) -> Callable[..., int]:
    return lambda e, a, b, alpha=None: e.make(op, a, b if alpha is None else e.mul(b, alpha))


def _div(e: E, a: int, b: int, rounding_mode: str | None = None) -> int:
    if rounding_mode is not None:
        raise RefusedError(f"no kernel supports div with rounding_mode={rounding_mode!r}")
    return e.div(a, b)


def _clamp(e: E, a: int, low: int | None = None, high: int | None = None) -> int:
    a = a if low is None else e.maximum(a, low)
    return a if high is None else e.minimum(a, high)


def _nan_to_num(
    e: E, a: int, nan: int | None = None, posinf: int | None = None, neginf: int | None = None
) -> int:
    if posinf is None or neginf is None:
        raise RefusedError("nan_to_num: posinf and neginf depend on the dtype; pass both")
    a = e.where(e.eq(a, a), a, e.literal(0) if nan is None else nan)
    a = e.where(e.eq(a, e.literal(math.inf)), posinf, a)
    return e.where(e.eq(a, e.literal(-math.inf)), neginf, a)


def _softplus(e: E, a: int, beta: int | None = None, threshold: int | None = None) -> int:
    beta = e.literal(1) if beta is None else beta
    threshold = e.literal(20) if threshold is None else threshold
    scaled = e.mul(a, beta)
    return e.where(e.lt(threshold, scaled), a, e.div(e.softplus(scaled), beta))


def _softplus_backward(e: E, g: int, a: int, beta: int, threshold: int) -> int:
    scaled = e.mul(a, beta)
    return e.where(e.lt(threshold, scaled), g, e.mul(g, e.sigmoid(scaled)))


def _pow_by_number(e: E, a: int, b: int) -> int:
    """Returns a power; torch squares before it takes the reciprocal if the exponent is a number."""
    return e.reciprocal(e.mul(a, a)) if e.value(b) == -2 else e.pow(a, b)


def _pow_of_tensors(e: E, a: int, b: int) -> int:
    """Returns a power, which differs from the square root at -0.0 and -infinity."""
    power, exponent = e.pow(a, b), e.value(b) or 0
    if abs(exponent) != 0.5:
        return power
    of_infinity = e.literal(math.inf if exponent > 0 else 0)
    return e.where(e.eq(a, e.literal(-math.inf)), of_infinity, e.abs(power))


def _smooth_l1_loss_backward(e: E, g: int, a: int, b: int, reduction: int, beta: int) -> int:
    if e.value(reduction) != 0:
        raise RefusedError("no kernel supports smooth_l1_loss with a reduction")
    d = e.sub(a, b)
    return e.mul(g, e.where(e.le(beta, e.abs(d)), e.sign(d), e.div(d, beta)))  # NaN at NaN


def _hypot(e: E, a: int, b: int) -> int:
    a, b = e.abs(a), e.abs(b)
    large, ratio = e.maximum(a, b), e.div(e.minimum(a, b), e.maximum(a, b))
    root = e.mul(large, e.sqrt(e.add(e.mul(ratio, ratio), e.literal(1))))
    infinity = e.literal(math.inf)
    is_infinite = e.maximum(e.eq(a, infinity), e.eq(b, infinity))
    return e.where(is_infinite, infinity, e.where(e.eq(large, e.literal(0)), large, root))


def _logaddexp(e: E, a: int, b: int) -> int:
    different = e.add(e.maximum(a, b), e.softplus(e.neg(e.abs(e.sub(a, b)))))
    return e.where(e.eq(a, b), e.add(a, e.literal(math.log(2))), different)  # inf - inf is NaN


def _operation(op: str) -> Callable[..., int]:
    return lambda e, *arguments: e.make(op, *arguments)


def _on_masks(op: str) -> Callable[..., int]:
    return lambda e, *arguments: e.make(op, *map(e.mask, arguments))


def _constant(value: float) -> Callable[..., int]:
    return lambda e, *_, **__: e.literal(value)


def _argument(position: int) -> Callable[..., Any]:
    return lambda _, *arguments, **__: arguments[position]


_SAME_NAME = (
    *("abs", "cos", "eq", "erf", "exp", "expm1", "floor", "le", "log", "log1p", "lt"),
    *("maximum", "minimum", "mul", "neg", "reciprocal", "rsqrt", "sigmoid", "sign", "sin", "sqrt"),
    *("tanh", "where"),
)
_COPIES = ("alias", "clone", "detach", "expand", "_to_copy")
_ZEROS = ("zeros_like", "new_zeros", "empty_like", "zero")
_ONES = ("ones_like", "new_ones")
_COPIES_OF_SECOND = ("full_like", "fill", "copy")
_READ_VALUES = ("__bool__", "__complex__", "__float__", "__index__", "__int__", "item", "tolist")
_NEW = ("new_zeros", "new_ones", "new_full")  # the results have shapes of their own
_VALUES = {"fill": 1, "masked_fill": 2}  # the arguments that have to be numbers
# Elementwise operators without torch's tag; those of losses can also reduce.
_ELEMENTWISE = (
    *("binary_cross_entropy", "binary_cross_entropy_with_logits", "elu_backward"),
    *("hardsigmoid_backward", "hardswish", "hardswish_backward", "hardtanh_backward"),
    *("huber_loss", "huber_loss_backward", "leaky_relu", "leaky_relu_backward", "masked_fill"),
    *("mish_backward", "mse_loss", "mse_loss_backward", "smooth_l1_loss", "soft_margin_loss"),
    *("soft_margin_loss_backward",),
)
# Functions and methods of torch that consist of elementwise operators, or return the same elements.
_FUNCTIONS = frozenset((
    *_ELEMENTWISE,
    *(a + b for a in ("", "r", "i") for b in ("add", "and", "div", "mul", "or", "pow", "sub")),
    *(a + b for a in ("", "r", "i") for b in ("truediv", "xor")),
    *("invert", "pos", "setitem"),
    *("absolute", "broadcast_tensors", "divide", "expit", "greater", "greater_equal", "isclose"),
    *("isreal", "less", "less_equal", "multiply", "ndtr", "negative", "not_equal", "subtract"),
    *("hinge_embedding_loss", "kl_div", "l1_loss", "margin_ranking_loss", "poisson_nll_loss"),
    *("log_sigmoid", "softsign", "tanhshrink"),
    *("bfloat16", "bool", "conj", "contiguous", "data", "double", "float", "half", "long"),
    *("real", "resolve_conj", "resolve_neg", "to", "type", "type_as"),
    *("full", "ones", "scalar_tensor", "set_grad_enabled", "tensor", "zeros"),
))  # fmt: skip
ATEN: dict[str, Callable[..., Any]] = {
    **{name: _operation(name) for name in _SAME_NAME},
    **dict.fromkeys(_COPIES, _argument(0)),
    **dict.fromkeys(_ZEROS, _constant(0)),
    **dict.fromkeys(_ONES, _constant(1)),
    **dict.fromkeys(_COPIES_OF_SECOND, _argument(1)),
    "new_full": _argument(2),
    "pow": _pow_by_number,
    "pow.Scalar": _operation("pow"),
    **dict.fromkeys(("pow.Tensor_Tensor", "pow_.Tensor"), _pow_of_tensors),
    "hypot": _hypot,
    "logaddexp": _logaddexp,
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
    "isinf": lambda e, a: e.eq(e.abs(a), e.literal(math.inf)),
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
    "smooth_l1_loss_backward": _smooth_l1_loss_backward,
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
