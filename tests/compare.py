"""Running an operator and comparing what came out with torch and with the reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Operator = Callable[..., Tensor]
HALF = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass
class Outcome:
    """A value and its gradients to those arguments that require one, in argument order."""

    value: Tensor
    gradients: list[Tensor]


def like_argument(argument: Any, convert: Callable[[Tensor], Tensor]) -> Any:
    """The same argument as a leaf of its own, converted; strides stay as they are."""
    if not isinstance(argument, Tensor):
        return argument
    return convert(argument.detach()).requires_grad_(argument.requires_grad)


def evaluate(
    operator: Operator, *args: Any, convert: Callable[[Tensor], Tensor] = lambda x: x, **kwargs: Any
) -> Outcome:
    """Value, and gradients for a random upstream gradient that is the same in every call."""
    args = tuple(like_argument(a, convert) for a in args)
    kwargs = {name: like_argument(a, convert) for name, a in kwargs.items()}
    leaves = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.requires_grad]
    value = operator(*args, **kwargs)
    if not leaves:
        return Outcome(value, [])
    upstream = torch.randn(value.shape, generator=torch.Generator().manual_seed(5))
    gradients = torch.autograd.grad(value, leaves, upstream.to(value.dtype))
    return Outcome(value.detach(), list(gradients))


def widen(x: Tensor) -> Tensor:
    """Half-precision values as float32, where torch's own rounding on the way is negligible."""
    return x.float() if x.dtype in HALF else x


def exactly(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def assert_matches_torch(ours: Operator, torchs: Operator, *args: Any, **kwargs: Any) -> Outcome:
    """Same dtype, shape and values (NaN and infinities included), and so for the gradients.

    For half precision the values of torch are those that it computes in float32: its own
    half-precision results carry roundings on the way that are no part of what is asked.
    """
    got = evaluate(ours, *args, **kwargs)
    native = evaluate(torchs, *args, **kwargs)
    wide = evaluate(torchs, *args, convert=widen, **kwargs)
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


def rounding(exact: Tensor, dtype: torch.dtype) -> float:
    """The distance between neighbours in `dtype` at the largest magnitude: one rounding of it."""
    largest = exact.abs().max().clamp_min(torch.finfo(dtype).tiny)
    return 2.0 ** math.floor(math.log2(largest.item())) * torch.finfo(dtype).eps


def assert_as_accurate(got: Tensor, torchs: Tensor, exact: Tensor) -> None:
    """The worst error is no more than torch's worst, plus one rounding of the result's dtype.

    Where the exact value does not fit the dtype, both must say so alike.
    """
    assert got.dtype == torchs.dtype
    assert got.shape == torchs.shape == exact.shape
    fits = exact.abs() <= torch.finfo(got.dtype).max
    assert torch.equal(got[~fits], torchs[~fits])
    exact = exact[fits].double()
    if not exact.numel():
        return
    error = (got[fits].double() - exact).abs()
    # In float16 torch gives NaN for more than 65504 smoothed classes: that excuses nothing.
    torchs_error = (torchs[fits].double() - exact).abs().nan_to_num(nan=0.0).max().item()
    allowed = torchs_error + rounding(exact, got.dtype)
    worst = int(error.argmax())
    assert bool((error <= allowed).all()), (
        f"element {worst}: {got[fits][worst].item()!r} is {error[worst].item():.3e} from "
        f"{exact[worst].item()!r}, allowed {allowed:.3e} (torch's worst error {torchs_error:.3e})"
    )
