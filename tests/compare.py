"""Runs operators, and compares their results with torch's and with exact results."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

Extended = npt.NDArray[np.longdouble]
Operator = Callable[..., Tensor]
DEVICE = os.environ.get("PYFUSED_TEST_DEVICE", "cpu")
HALF = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass
class Outcome:
    """A value, and the gradients of the arguments that require grad, in argument order."""

    value: Tensor
    gradients: list[Tensor]


def like_argument(argument: Any, convert: Callable[[Tensor], Tensor]) -> Any:
    """Returns a tensor argument as a new leaf, converted, with the same strides."""
    if not isinstance(argument, Tensor):
        return argument
    return convert(argument.detach()).requires_grad_(argument.requires_grad)


def evaluate(
    operator: Operator, *args: Any, convert: Callable[[Tensor], Tensor] = lambda x: x, **kwargs: Any
) -> Outcome:
    """Returns the value, and the gradients for a grad_output with fixed random values."""
    args = tuple(like_argument(a, convert) for a in args)
    kwargs = {name: like_argument(a, convert) for name, a in kwargs.items()}
    leaves = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.requires_grad]
    value = operator(*args, **kwargs)
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


def extended(x: Tensor) -> Extended:
    return x.detach().double().cpu().numpy().astype(np.longdouble)


def assert_matches_torch(
    ours: Operator, of_torch: Operator, *args: Any, widened: bool = True, **kwargs: Any
) -> Outcome:
    """Compares dtypes, shapes and values of results and gradients with torch, including NaN and
    infinities.

    For half precision, torch's reference is computed in float32, because torch's half-precision
    operators round intermediate results. Gradients that are computed from a rounded output must not
    be `widened`.
    """
    got = evaluate(ours, *args, **kwargs)
    native = evaluate(of_torch, *args, **kwargs)
    wide = evaluate(of_torch, *args, convert=widen, **kwargs) if widened else native
    assert_same(got.value, native.value, wide.value)
    assert len(got.gradients) == len(native.gradients)
    for ours_, theirs, wider in zip(got.gradients, native.gradients, wide.gradients, strict=True):
        assert_same(ours_, theirs, wider)
    return got


def assert_same(got: Tensor, native: Tensor, wide: Tensor) -> None:
    assert got.dtype == native.dtype
    assert got.shape == native.shape
    tolerance = {}
    if got.dtype in HALF:
        tolerance = {"rtol": 2 * torch.finfo(got.dtype).eps, "atol": 1e-6}
    torch.testing.assert_close(got, wide.to(got.dtype), equal_nan=True, **tolerance)


def outcome(call: Callable[[], Any]) -> Any:
    """Returns what a call returns, or the error that it raises."""
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


def rounding(largest: float, dtype: torch.dtype) -> float:
    """Returns the spacing of numbers in `dtype` at a magnitude, the cost of a rounding."""
    info = torch.finfo(dtype)
    return 2.0 ** math.floor(math.log2(max(largest, info.tiny))) * info.eps


class Errors:
    """The largest errors of our results and of torch's, over several calls.

    Errors are in units of the spacing of the result's dtype at its largest magnitude, and are kept
    separately for each kind of result, such as value and gradient.
    """

    def __init__(self) -> None:
        self.luck = 1.75
        self.ours: dict[str, float] = defaultdict(float)
        self.reference: dict[str, float] = defaultdict(float)
        self.where: dict[str, str] = {}
        self.products: dict[str, float] = defaultdict(float)

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

        Where the exact value overflows the dtype, both results must be equal.
        """
        assert got.dtype == native.dtype
        self.luck = 2.0 if got.dtype == torch.float64 else 1.75
        if got.dtype not in HALF:
            self.products[result] = max(self.products[result], 2 * math.sqrt(products))
        exact = extended(exact) if isinstance(exact, Tensor) else exact
        assert got.shape == native.shape == exact.shape
        fits = np.abs(exact) <= torch.finfo(got.dtype).max
        ours, theirs = extended(got), extended(native)
        assert np.array_equal(ours[~fits], theirs[~fits])
        if not fits.any():
            return
        unit = rounding(max(float(np.abs(exact[fits]).max()), term), got.dtype)
        error = np.abs(ours - exact)[fits] / unit
        torchs_error = np.abs(theirs - exact)[fits] / unit
        # torch returns NaN for more than 65504 smoothed classes in float16; ignore these errors.
        largest = np.nan_to_num(torchs_error, posinf=0).max()
        self.reference[result] = max(self.reference[result], largest)
        if not error.max() <= self.ours[result]:  # NaN is larger than any error
            worst = int(np.argmax(error))
            self.ours[result] = float(error[worst])
            self.where[result] = f"{ours[fits][worst]!r} for {exact[fits][worst]!r}"

    def add_outcome(self, got: Outcome, of_torch: Outcome, exact: Outcome) -> None:
        """Adds a value and its gradients; results of torch may have a wider dtype."""
        first, second, best = ([o.value, *o.gradients] for o in (got, of_torch, exact))
        for i, (mine, theirs, wide) in enumerate(zip(first, second, best, strict=True)):
            self.add("gradient" if i else "value", mine, theirs.to(mine.dtype), wide)

    def check(self, roundings: int = 1) -> None:
        """Asserts that our errors are at most torch's largest, plus `roundings` and a library's.

        The maximum over a few random draws varies: of two equally accurate results, one may have an
        error that is 1.75 times the other's, and twice in float64, where no wider dtype is used for
        sums.
        """
        for result, error in self.ours.items():
            allowed = self.luck * self.reference[result] + roundings + self.products[result]
            assert error <= allowed, (
                f"{result} is {error:.2f} roundings off ({self.where[result]}), "
                f"the reference in the same dtype at most {self.reference[result]:.2f}"
            )
