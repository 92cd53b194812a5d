"""Runs operators and torch's functions, and compares their results."""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from pyfused import functional as fused
from pyfused.dispatch.operator import Operator, Options, Tensors
from pyfused.dispatch.originals import F

Extended = npt.NDArray[np.longdouble]
Function = Callable[..., Tensor]
DEVICE = os.environ.get("PYFUSED_TEST_DEVICE", "cpu")
HALF = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass
class Outcome:
    """A value, and the gradients of the arguments that require grad, in argument order."""

    value: Any  # a tensor, or an array in long double
    gradients: list[Any]

    @property
    def results(self) -> list[Any]:
        return [self.value, *self.gradients]


def like_argument(argument: Any, convert: Callable[[Tensor], Tensor]) -> Any:
    """Returns a tensor argument as a new leaf, converted, with the same strides."""
    if not isinstance(argument, Tensor):
        return argument
    return convert(argument.detach()).requires_grad_(argument.requires_grad)


def evaluate(
    function: Function, *args: Any, convert: Callable[[Tensor], Tensor] = lambda x: x, **kwargs: Any
) -> Outcome:
    """Returns the value, and the gradients for a grad_output with fixed random values."""
    args = tuple(like_argument(a, convert) for a in args)
    kwargs = {name: like_argument(a, convert) for name, a in kwargs.items()}
    leaves = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.requires_grad]
    value = function(*args, **kwargs)
    if not leaves:
        return Outcome(value, [])
    grad_output = random_grad_output(value.shape).to(value)
    gradients = torch.autograd.grad(value, leaves, grad_output)
    return Outcome(value.detach(), list(gradients))


def random_grad_output(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), device="cpu")


def widen(x: Tensor) -> Tensor:
    """Converts half precision to float32, where torch's intermediate roundings are negligible."""
    return x.float() if x.dtype in HALF else x


def exactly(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def extended(x: Tensor | Extended) -> Extended:
    array = x.detach().double().cpu().numpy() if isinstance(x, Tensor) else x
    return np.asarray(array, np.longdouble)


def assert_matches_torch(ours: Function, of_torch: Function, *args: Any, **kwargs: Any) -> None:
    """Compares dtypes, shapes and values of results and gradients with torch, including NaN and
    infinities.

    For half precision, torch's reference is computed in float32, because torch's half-precision
    operators round intermediate results.
    """
    got, native = (evaluate(f, *args, **kwargs) for f in (ours, of_torch))
    wide = evaluate(of_torch, *args, convert=widen, **kwargs)
    expected = [x.to(y.dtype) for x, y in zip(wide.results, native.results, strict=True)]
    torch.testing.assert_close(got.results, expected, equal_nan=True)


def outcome(call: Callable[[], Any]) -> Any:
    """Returns the result of a call, or the exception that it raises."""
    try:
        return call()
    except Exception as error:
        return error


def flattened(results: Any) -> list[Tensor]:
    """Returns the tensors of nested tuples, without None."""
    if isinstance(results, Tensor):
        return [results]
    return [x for each in results if each is not None for x in flattened(each)]


class Recording(TorchDispatchMode):
    """Collects the names of the operators that run. Under a mode, no kernel runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, op: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(op))
        return op(*args, **(kwargs or {}))


@contextlib.contextmanager
def operators_of_torch(*names: str) -> Iterator[list[list[Any]]]:
    """Collects the shapes of the inputs of these torch operators in the context."""
    shapes: list[list[Any]] = []
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        yield shapes
    shapes += [event.input_shapes for event in profiler.events() if event.name in names]


@contextlib.contextmanager
def products() -> Iterator[list[tuple[int, int, int]]]:
    """Collects the sizes (m, k, n) of the matrix products in the context."""
    sizes: list[tuple[int, int, int]] = []
    with operators_of_torch("aten::mm", "aten::addmm") as found:
        yield sizes
    for shapes in found:  # addmm's factors follow an operand
        (m, k), (_, n) = shapes[len(shapes) > 3 :][:2]
        sizes.append((m, k, n))


def python_calls(step: Callable[[], Any], package: str = "") -> int:
    """Returns the number of Python functions that a step calls, the same on every machine.

    Args:
        package: Counts only the functions of this package.
    """
    count = 0

    def profile(frame: Any, event: str, _argument: Any) -> None:
        nonlocal count
        module = str(frame.f_globals.get("__name__"))
        count += event == "call" and module.startswith(package)

    for _ in range(3):
        step()
    sys.setprofile(profile)
    try:
        step()
    finally:
        sys.setprofile(None)
    return count


# ---- comparison with exact results ---------------------------------------------------------------


def rounding(largest: float, dtype: torch.dtype) -> float:
    """Returns the spacing of numbers in `dtype` at a magnitude, the cost of a rounding."""
    info = torch.finfo(dtype)
    return 2.0 ** math.floor(math.log2(max(largest, info.tiny))) * info.eps


def largest(x: Tensor | Extended) -> float:
    """Returns the largest finite magnitude."""
    magnitudes = np.abs(extended(x))
    return float(magnitudes[np.isfinite(magnitudes)].max(initial=0))


def assert_accurate(
    got: Tensor,
    exact: Tensor | Extended,
    error: Any,
    roundings: float = 0,
    native: Tensor | None = None,
    result: str = "result",
    **operands: Tensor,
) -> None:
    """Asserts that each element is off by at most an error and a number of roundings.

    Args:
        exact: The result in a wider dtype.
        error: The error that torch has in the dtype of the call, for all elements or for each one.
        roundings: How many roundings of each element are allowed.
        native: torch's result, which an element may equal; both may overflow.
        operands: Tensors whose elements an error shows.
    """
    assert got.shape == exact.shape
    info, ours, best = torch.finfo(got.dtype), extended(got), extended(exact)
    with np.errstate(invalid="ignore", over="ignore"):
        allowed = error + roundings * info.eps * (np.abs(best) + info.smallest_normal)
        right = (np.abs(ours - best) <= allowed) | (ours == best)
        right |= np.isnan(ours) & np.isnan(best)
        right |= np.isinf(ours) & (np.abs(best) > info.max) & (ours * best > 0)
    if native is not None:
        assert got.dtype == native.dtype
        theirs = extended(native)
        right |= (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
        right |= ~(np.isfinite(ours) | np.isfinite(theirs) | ~np.isfinite(best))
    if not right.all():
        index = tuple(int(i) for i in np.argwhere(~right)[0])
        at = [
            f"{n}={np.broadcast_to(extended(x), ours.shape)[index]:.6g}"
            for n, x in operands.items()
        ]
        raise AssertionError(
            f"{result}: {(~right).sum()} of {right.size} elements are wrong, got {ours[index]:.9g} "
            f"instead of {best[index]:.9g} +- {np.broadcast_to(allowed, ours.shape)[index]:.3g} "
            f"at {', '.join(at or [str(index)])}"
        )


class Errors:
    """Compares results of several calls with exact results.

    Errors are at most torch's largest error in any of the calls, in units of the spacing of the
    result's dtype at its largest magnitude, plus roundings. Each kind of result, such as value and
    gradient, is compared separately.
    """

    def __init__(self) -> None:
        self.calls: dict[str, list[tuple[Tensor, Extended, float, float]]] = defaultdict(list)
        self.of_torch: dict[str, float] = defaultdict(float)

    def add(
        self, result: str, got: Tensor, native: Tensor, exact: Any, term: Any = 0, products: int = 0
    ) -> None:
        """Adds a result.

        `term` is the largest term of the sum that gives the result, if terms may cancel.

        If the result is a matrix product, `products` is the number of products in the sum of each
        element. A library adds them up in an unspecified order, with an error of up to half a
        rounding in each partial sum. The error of n partial sums is typically sqrt(n / 12)
        roundings, and seven times as much is allowed. Half precision is accumulated in a wider
        dtype.
        """
        assert (got.dtype, got.shape) == (native.dtype, native.shape)
        exact = extended(exact)
        fits = np.abs(exact) <= torch.finfo(got.dtype).max
        unit = rounding(max(float(np.abs(exact[fits]).max(initial=0)), term), got.dtype)
        # torch returns NaN for more than 65504 smoothed classes in float16; ignore these errors.
        error = largest((extended(native) - exact)[fits]) / unit
        self.of_torch[result] = max(self.of_torch[result], error)
        of_products = 0 if got.dtype in HALF else 2 * math.sqrt(products)
        self.calls[result].append((got, exact, unit, of_products))

    def add_outcome(
        self, got: Outcome, of_torch: Outcome, exact: Outcome, term: Any = 0, value_term: Any = 0
    ) -> None:
        """Adds a value and its gradients, with the largest terms of the gradients and of the value.

        Results of torch may have a wider dtype.
        """
        three = zip(got.results, of_torch.results, exact.results, strict=True)
        for i, (mine, theirs, best) in enumerate(three):
            name = f"gradient {i - 1}" if i else "value"
            self.add(name, mine, theirs.to(mine.dtype), best, term if i else value_term)

    def check(self, roundings: int = 1) -> None:
        """Asserts that our errors are at most torch's largest, plus `roundings` and a library's.

        The maximum over a few random draws varies: of two equally accurate results, one may have an
        error that is 1.75 times the other's, and twice in float64, where no wider dtype is used for
        sums.
        """
        for result, calls in self.calls.items():
            for got, exact, unit, of_products in calls:
                luck = 2.0 if got.dtype == torch.float64 else 1.75
                error = luck * self.of_torch[result] + roundings + of_products
                assert_accurate(got, exact, error * unit, result=result)


# ---- torch's functions, and definitions of functions that torch lacks ----------------------------


def by_torch(op: Operator, tensors: Tensors, options: Options, *_: Any, **__: Any) -> Any:
    """Replaces `pyfused.dispatch.run.run` by an operator's definition in torch's operators."""
    return op.by_torch(tensors, options)


def torch_function(op: Operator, name: str = "") -> Callable[..., Any]:
    """Returns torch's function, or pyfused's function running torch's operators.

    Args:
        name: The name of a function that torch lacks, if it differs from the operator's.
    """
    lost = DEVICE != "cpu" and op.name == "l1_loss"  # its weight, if a default device is set
    if hasattr(F, op.name) and not name and not lost:
        return getattr(F, op.name)  # type: ignore[no-any-return]
    return defined_by_torch(name or op.name)


def defined_by_torch(name: str) -> Callable[..., Any]:
    """Returns pyfused's function of this name, running definitions in torch's operators."""
    function = getattr(fused, name)
    names = {**vars(fused), "run": by_torch}
    copy = FunctionType(function.__code__, names, name, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def parameters(op: Operator) -> dict[str, Any]:
    """Returns the parameters of pyfused's function with their defaults."""
    given = inspect.signature(getattr(fused, op.name)).parameters.values()
    return {parameter.name: parameter.default for parameter in given}
