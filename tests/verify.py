"""Compares the kernels of formulas with their functions, at random and special values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from compare import assert_accurate
from torch import Tensor
from torch.utils._pytree import tree_map

from pyfused.backends import cpu
from pyfused.ops.pointwise_loss import PointwiseLoss
from pyfused.torch_internals import DispatchMode, is_mutable
from pyfused.types import Outputs

Function = Callable[[Sequence[Tensor]], Tensor]


def _points(op: PointwiseLoss, cases: tuple[Any, ...], dtype: torch.dtype) -> list[Tensor]:
    """Returns operands: random values, ties, literals, the largest number, infinities and NaN."""
    ((_, e, _),) = op.source.trace(cases).kernel.methods
    literals = [float(arguments[0]) for name, arguments in e.nodes if name == "literal"]
    generator, n, info = torch.Generator().manual_seed(0), 256, torch.finfo(dtype)
    special = [0.0, 0.5, 1.0, 2.0, info.max, info.tiny, math.inf, *literals]
    values = torch.tensor([*special, *[-x for x in special], math.nan], dtype=torch.float64)
    count = len(op.variables)
    chosen = values[torch.randint(len(values), (count, 4 * n), generator=generator)]
    normal = torch.randn(count, 3, n, generator=generator)
    normal *= torch.tensor([1.0, 30.0, 1e-5])[:, None]
    ties = torch.randn(n, generator=generator).expand(count, n)
    uniform = torch.rand(count, n, generator=generator)
    points = torch.cat([normal.flatten(1), ties, uniform, chosen], 1).to(dtype)
    for k in op.masks:
        points[k].copy_(torch.randint(2, points[k].shape, generator=generator))
    return [*points]


def _value_and_gradients(function: Function, operands: Sequence[Tensor]) -> Tensor:
    """Returns a function's value and its gradients with respect to each operand, as float64."""
    leaves = [operand.detach().requires_grad_() for operand in operands]
    value, found = function(leaves), list[Tensor]()
    if value.requires_grad:
        found += torch.autograd.grad(value.sum(), leaves, materialize_grads=True)
    found = found or [torch.zeros_like(x) for x in leaves]
    return torch.stack([value.detach(), *found]).double()


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


def _errors(
    function: Function, points: Sequence[Tensor], masks: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the exact value and gradients at test points, their errors, and torch's results.

    The error at each point follows from the function's values at nearby points and with perturbed
    roundings, so it is large next to discontinuities and where terms cancel. torch's results are
    NaN where any of these values is.
    """
    dtype, wide = points[0].dtype, [x.double() for x in points]
    expected = _value_and_gradients(function, wide)
    digits, generator = torch.finfo(dtype).eps ** 0.5, torch.Generator().manual_seed(1)
    nearby = [expected, _value_and_gradients(function, points)]
    for _ in range(8):
        steps = [torch.randn(x.shape, generator=generator) * digits / 16 for x in points]
        moved = [x + s * x.abs() + s * 1e-20 for x, s in zip(wide, steps, strict=True)]
        pairs = enumerate(zip(wide, moved, strict=True))
        near = [x if k in masks else torch.where(x.isinf(), x, y) for k, (x, y) in pairs]
        with _Roundings(dtype, generator):
            each = [[x.to(kind) for x in near] for kind in {torch.float64, dtype}]
            nearby += [_value_and_gradients(function, x) for x in each]
    bounds = torch.stack(nearby)
    undefined = bounds.isnan()
    low = bounds.masked_fill(undefined, torch.inf).amin(0)
    high = bounds.masked_fill(undefined, -torch.inf).amax(0)
    exact = expected.where(~expected.isnan() | (low > high), low)
    error = torch.fmax(high - exact, exact - low) + 4 * (high - low)
    error += digits * torch.fmax(low.abs(), high.abs()) + digits**1.5
    # Kernels may round once where the function's intermediate results overflow.
    overflows = ~expected.to(dtype).isfinite()
    overflows &= (torch.stack(wide).abs() == torch.finfo(dtype).max).any(0)
    error = error.masked_fill(overflows, torch.inf)
    return exact, error, expected.masked_fill(undefined.any(0) | overflows, torch.nan)


def check(
    op: PointwiseLoss, numbers: Any, kernels: Any = cpu.pointwise_loss, dtype: Any = torch.float64
) -> None:
    """Compares the kernel's results with the function's, and its gradients for any grad_output."""
    options = op.options(*numbers, "none")
    assert not (problem := op.invalid_options(*options)), problem
    cases = op.source.cases_of(options)
    points, names = _points(op, cases, dtype), [variable.name for variable in op.variables]
    grad_output = torch.tensor([2.0, math.nan, -0.0, math.inf], dtype=dtype)
    grad_output = grad_output.repeat(len(points[0]) // 4)

    def run(outputs: Outputs, grad_output: Tensor | None) -> list[Tensor]:
        program, parameters = op.source.find(cases, len(points), outputs)
        call = program, points, None, parameters(options), "none", outputs, None, grad_output
        value, gradients = kernels(*call)
        return [value, *gradients]

    named = dict(zip(names, points, strict=True))
    results = torch.stack(run(op.source.outputs, None))
    function = partial(op._unreduced, options=options)
    exact, error, native = _errors(function, points, op.masks)
    text = f"{op.name}: kernel's value and gradients"
    assert_accurate(results.double(), exact, error.numpy(), 0, native, text, **named)
    _, *gradients = run(op.source.outputs._replace(loss=False), grad_output)
    scaled, tiny = torch.stack([results[0], *gradients]), torch.finfo(dtype).tiny
    product = torch.stack([results[0], *results[1:] * grad_output])
    text = f"{op.name}: gradients times grad_output"
    assert_accurate(scaled, product, tiny, 4, None, text, **named, grad_output=grad_output)
