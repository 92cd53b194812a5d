"""Compares the kernels of formulas with their functions, at random and special values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pyfused.backends import cpu
from pyfused.formula import FormulaOperator
from pyfused.formula_compiler.kernel import Kernel
from pyfused.torch_internals import DispatchMode, is_mutable
from pyfused.types import Outputs


def _points(
    operands: int, masks: Sequence[int], literals: Sequence[float], dtype: torch.dtype
) -> list[Tensor]:
    """Returns test operands: random values, ties, literals, the largest number, infinities and NaN.

    Args:
        masks: The indices of the operands that are masks, which are 0 or 1.
        dtype: The dtype of the result.
    """
    generator, n, info = torch.Generator().manual_seed(0), 256, torch.finfo(dtype)
    special = [0.0, 0.5, 1.0, 2.0, info.max, info.tiny, float("inf"), *map(float, literals)]
    special += [-value for value in special]
    values = torch.tensor([*special, float("nan")], dtype=torch.float64)
    chosen = values[torch.randint(len(values), (operands, 4 * n), generator=generator)]
    normal = torch.randn(operands, 3, n, generator=generator)
    normal *= torch.tensor([1.0, 30.0, 1e-5])[:, None]
    ties = torch.randn(n, generator=generator).expand(operands, n)
    uniform = torch.rand(operands, n, generator=generator)
    points = torch.cat([normal.flatten(1), ties, uniform, chosen], 1).to(dtype)
    for k in masks:
        points[k].copy_(torch.randint(2, points[k].shape, generator=generator))
    return [*points]


def _value_and_gradients(
    function: Callable[[Sequence[Tensor]], Tensor], operands: Sequence[Tensor]
) -> Tensor:
    """Returns a function's value and its gradients with respect to each operand, as float64."""
    leaves = [operand.detach().requires_grad_() for operand in operands]
    value = function(leaves)
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


def _compare(
    results: Tensor,
    function: Callable[[Sequence[Tensor]], Tensor],
    points: Sequence[Tensor],
    masks: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Compares a value and its gradients at test points with a function's.

    The tolerance at each point follows from the function's values at nearby points and with
    perturbed roundings, so it is wide next to discontinuities and where terms cancel.

    Args:
        results: As `_value_and_gradients` returns them.
        masks: The indices of the operands that are masks.

    Returns:
        The function's value and gradients, and whether each result is right.
    """
    dtype, wide = points[0].dtype, [x.double() for x in points]
    expected = _value_and_gradients(function, wide)
    digits, generator = torch.finfo(dtype).eps ** 0.5, torch.Generator().manual_seed(1)
    nearby = [expected, _value_and_gradients(function, points)]
    for _ in range(8):
        steps = [torch.randn(x.shape, generator=generator) * digits / 16 for x in points]
        near = [x + s * x.abs() + s * 1e-20 for x, s in zip(wide, steps, strict=True)]
        near = [
            x if k in masks else torch.where(x.isinf(), x, y)
            for k, (x, y) in enumerate(zip(wide, near, strict=True))
        ]
        with _Roundings(dtype, generator):
            nearby += [
                _value_and_gradients(function, [x.to(kind) for x in near])
                for kind in {torch.float64, dtype}
            ]
    bounds = torch.stack(nearby)
    undefined = bounds.isnan()
    low = bounds.masked_fill(undefined, torch.inf).amin(0)
    high = bounds.masked_fill(undefined, -torch.inf).amax(0)
    slack = digits * torch.fmax(low.abs(), high.abs()) + 4 * (high - low) + digits**1.5
    right = (results >= low - slack) & (results <= high + slack)
    right |= (results == expected) | (undefined.any(0) & results.isnan())
    # Kernels may round once where the function's intermediate results overflow.
    right |= ~expected.to(dtype).isfinite() & (
        torch.stack(wide).abs() == torch.finfo(dtype).max
    ).any(0)
    return expected, right


def check(
    op: FormulaOperator,
    numbers: tuple[Any, ...],
    kernels: Callable[..., Any] = cpu.pointwise_loss,
    dtype: torch.dtype = torch.float64,
) -> None:
    """Compares the kernel's results with the function's, and its gradients for any grad_output."""
    options = op.options(*numbers, "none")
    assert not (problem := op.invalid_options(*options)), problem
    cases = op.cases_of(options)
    points = _points_of(op, cases, dtype)

    def run(outputs: Outputs, grad_output: Tensor | None) -> list[Tensor]:
        program, parameters = op.kernel(cases, len(points), outputs)
        call = program, points, None, parameters(options), "none", outputs, None, grad_output
        value, gradients = kernels(*call)
        return [value, *gradients]

    results = torch.stack(run(op.all_outputs, None))
    function = partial(op.unreduced, options=options)
    expected, right = _compare(results.double(), function, points, op.masks)
    ones = torch.ones_like(points[0])
    _raise_for_differences(op, results, expected, right, [*points, ones])
    grad_output = torch.tensor([2.0, math.nan, -0.0, math.inf], dtype=dtype).repeat(len(ones) // 4)
    _, *gradients = run(op.all_outputs._replace(loss=False), grad_output)
    scaled, info = torch.stack([results[0], *gradients]), torch.finfo(dtype)
    product = torch.stack([results[0], *results[1:] * grad_output])
    right = (scaled - product).abs() <= 4 * info.eps * product.abs() + info.tiny
    right |= (scaled == product) | (scaled.isnan() & product.isnan())
    _raise_for_differences(op, scaled, product, right, [*points, grad_output])


def _points_of(op: FormulaOperator, cases: tuple[Any, ...], dtype: torch.dtype) -> list[Tensor]:
    """Returns the test points of an operator's kernel."""
    kernel = op.traced(cases)
    assert isinstance(kernel, Kernel)
    ((_, e, _),) = kernel.methods
    literals = [arguments[0] for op, arguments in e.nodes if op == "literal"]
    return _points(len(op.variables), op.masks, literals, dtype)


def _raise_for_differences(
    op: FormulaOperator,
    results: Tensor,
    expected: Tensor,
    right: Tensor,
    inputs: Sequence[Tensor],
) -> None:
    """Raises an error that describes the first result that is not right.

    Args:
        inputs: The operands and grad_output.
    """
    if right.all():
        return
    wrong = (~right).nonzero()
    k, i = map(int, wrong[0])
    names = [variable.name for variable in op.variables]
    of_result = ["value", *(f"gradient of {name}" for name in names)][k]
    named = zip([*names, "grad_output"], inputs, strict=True)
    at = ", ".join(f"{name}={x[i].item():.6g}" for name, x in named)
    raise AssertionError(
        f"{op.name}: its kernel computes {results[k, i].item():.9g} for the {of_result} at {at}, "
        f"the function {expected[k, i].item():.9g}; {len(wrong)} of {right.numel()} values differ"
    )
