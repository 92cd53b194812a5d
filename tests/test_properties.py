"""hypothesis draws shapes, strides, dtypes, values and options together.

The float64 reference judges: each element is right to within a few roundings of the result's dtype
at the scale of the largest one. That torch's own error is not exceeded is test_accuracy.py's part.
`HYPOTHESIS_PROFILE=search pytest tests/test_properties.py` looks further than the suite does.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import reference
import torch
from compare import FLOATS, Outcome, evaluate, exactly
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS, Layout
from samples import BROADCASTING, SAMPLES, Loss, every_activation, every_loss
from torch import Tensor

from pyfused.functional import cross_entropy
from pyfused.ops.activation import Activation
from pyfused.ops.dispatch import call

pytestmark = pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")
# The fixtures only set what stays the same for every example.
properties = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

layouts = st.sampled_from(list(LAYOUTS.values()))
dtypes = st.sampled_from(FLOATS)
reductions = st.sampled_from(["none", "mean", "sum"])
scales = st.sampled_from([0.0, 1.0, 30.0, 1e4])
seeds = st.integers(0, 2**32 - 1)
sizes = st.one_of(
    st.integers(1, 20), st.sampled_from([31, 32, 33, 47, 48, 63, 64, 65, 127, 128, 129, 1023, 1025])
)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    """(C), (N, C) or (N, C, d1, ...), at most some 100,000 elements."""
    classes = draw(sizes)
    if draw(st.integers(0, 9)) == 0:
        return (classes,)
    batch = draw(st.one_of(st.integers(0, 5), sizes))
    batch = min(batch, 100_000 // classes)
    inner = draw(st.lists(st.integers(1, 9), max_size=3))
    while inner and batch * classes * torch.tensor(inner).prod().item() > 100_000:
        inner.pop()
    return (batch, classes, *inner)


def values(shape: tuple[int, ...], scale: float, dtype: torch.dtype, layout: Layout) -> Tensor:
    return (
        layout((torch.randn(shape) * scale).to(dtype))
        if 0 not in shape
        else torch.zeros(shape, dtype=dtype)
    )


def assert_near(
    got: Outcome, exact: Outcome, dtype: torch.dtype, term: float = 0.0, least: float = 0.0
) -> None:
    """`term` is the size of what is subtracted within a gradient: where all of it cancels, as for
    one class or for equal logits, roundings of that size are what is left. `least` is such a size
    where some of it may."""
    pairs = [(got.value, exact.value), *zip(got.gradients, exact.gradients, strict=True)]
    for ours, wanted in pairs:
        assert ours.dtype == dtype
        assert ours.shape == wanted.shape
        finite = wanted[wanted.isfinite()].abs()
        scale = finite.max().item() if finite.numel() else 0.0
        scale = max(term if scale < 1e-3 * term else scale, least)
        if scale > torch.finfo(dtype).max:
            continue  # the overflow itself is compared with torch elsewhere
        eps = torch.finfo(dtype).eps
        tolerance = {"rtol": 16 * eps, "atol": 16 * eps * scale + 8 * torch.finfo(dtype).tiny}
        torch.testing.assert_close(ours.double(), wanted, equal_nan=True, **tolerance)


@properties
@given(
    shape=shapes(),
    dtype=dtypes,
    layout=layouts,
    target_layout=layouts,
    scale=scales,
    reduction=reductions,
    smoothing=st.sampled_from([0.0, 0.1, 0.9, 1.0]),
    weighted=st.booleans(),
    ignored=st.sampled_from([-100, -1, 0, 3, 255]),
    seed=seeds,
)
def test_cross_entropy_with_indices(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: Layout,
    target_layout: Layout,
    scale: float,
    reduction: str,
    smoothing: float,
    weighted: bool,
    ignored: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    class_dim = min(len(shape) - 1, 1)
    logits = values(shape, scale, dtype, layout).requires_grad_()
    target = torch.randint(shape[class_dim], shape[:class_dim] + shape[class_dim + 1 :])
    target[torch.rand(target.shape) < 0.2] = ignored
    if target.numel():
        target = target_layout(target)
    weight = torch.rand(shape[class_dim]).to(dtype) + 0.1 if weighted else None
    options: dict[str, Any] = {
        "ignore_index": ignored,
        "reduction": reduction,
        "label_smoothing": smoothing,
    }
    event(f"{len(shape)} dimensions")
    got = evaluate(cross_entropy, logits, target, weight, **options)
    exact = evaluate(reference.cross_entropy, logits, target, weight, convert=exactly, **options)
    rows = max(logits.numel() // shape[class_dim], 1) if reduction == "mean" else 1
    assert_near(got, exact, dtype, term=1 / rows)


@properties
@given(
    shape=shapes(),
    dtype=dtypes,
    layout=layouts,
    target_layout=layouts,
    scale=scales,
    reduction=reductions,
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    weighted=st.booleans(),
    requiring=st.sampled_from(["input", "target", "both"]),
    seed=seeds,
)
def test_cross_entropy_with_probabilities(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: Layout,
    target_layout: Layout,
    scale: float,
    reduction: str,
    smoothing: float,
    weighted: bool,
    requiring: str,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    class_dim = min(len(shape) - 1, 1)
    logits = values(shape, scale, dtype, layout)
    target = values(shape, 1.0, dtype, target_layout).abs()
    logits.requires_grad_(requiring != "target")
    target = target.detach().requires_grad_(requiring != "input")
    weight = torch.rand(shape[class_dim]).to(dtype) + 0.1 if weighted else None
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}
    got = evaluate(cross_entropy, logits, target, weight, **options)
    exact = evaluate(reference.cross_entropy, logits, target, weight, convert=exactly, **options)
    rows = max(logits.numel() // shape[class_dim], 1) if reduction == "mean" else 1
    assert_near(got, exact, dtype, term=1 / rows)


@st.composite
def broadcast_shapes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    shape = draw(st.lists(st.one_of(st.integers(0, 4), sizes), max_size=3))
    while shape and torch.tensor(shape).prod().item() > 100_000:
        shape.pop()
    kept = [draw(st.integers(0, 4)) > 0 for _ in shape]
    other = [n if keep else 1 for n, keep in zip(shape, kept, strict=True)]
    other = other[draw(st.integers(0, len(other))) if draw(st.integers(0, 4)) == 0 else 0 :]
    pair = (tuple(shape), tuple(other))
    return pair if draw(st.booleans()) else pair[::-1]


@every_loss
@properties
@given(
    pair=broadcast_shapes(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    layout=layouts,
    target_layout=layouts,
    scale=scales,
    reduction=reductions,
    weighted=st.booleans(),
    asked=st.integers(1, 7),
    seed=seeds,
)
def test_pointwise_losses(
    loss: Loss,
    pair: tuple[tuple[int, ...], tuple[int, ...]],
    dtype: torch.dtype,
    layout: Layout,
    target_layout: Layout,
    scale: float,
    reduction: str,
    weighted: bool,
    asked: int,
    seed: int,
) -> None:
    """Of shapes that broadcast where the loss takes them, asked for some of the gradients."""
    torch.manual_seed(seed)
    shapes = pair if loss in BROADCASTING else (pair[0], pair[0])
    scale = min(scale, SAMPLES[loss.op.name].large)
    given = loss.draw([*shapes, shapes[0]], dtype, scale=scale, requiring=())
    layouts = (layout, target_layout, target_layout)
    for bit, (name, lay) in enumerate(zip(given, layouts, strict=False)):
        tensor = given[name]
        given[name] = (lay(tensor) if tensor.numel() else tensor).requires_grad_(
            bool(asked >> bit & 1) and name in loss.differentiated
        )
    options: dict[str, Any] = loss.parameters | {"reduction": reduction}
    if weighted and loss.takes_weight:
        options["weight"] = loss.weight(shapes[0], dtype)
    got = evaluate(loss.ours, **given, **options)
    exact = evaluate(loss.reference, convert=exactly, **given, **options)
    term = 0.0
    if SAMPLES[loss.op.name].cancels or reduction != "none" or shapes[0] != shapes[1]:
        each = loss.reference(**given, **options | {"reduction": "none"}).detach()
        sizes = [x.detach().abs().max().item() for x in (each, *given.values()) if x.numel()]
        added = each.numel() / max(min(x.numel() for x in given.values()), 1)  # to one gradient
        term = max(sizes, default=0.0) * max(added, 1.0)
        term /= max(each.numel(), 1) if reduction == "mean" else 1
    assert_near(got, exact, dtype, least=term)


@every_activation
@properties
@given(
    shape=shapes(),
    dtype=dtypes,
    layout=layouts,
    upstream_layout=layouts,
    special=st.lists(
        st.sampled_from([float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e-45, -3e38]),
        max_size=4,
    ),
    inplace=st.booleans(),
    seed=seeds,
)
def test_activations(
    op: Activation,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: Layout,
    upstream_layout: Layout,
    special: list[float],
    inplace: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    inplace = inplace and op.overwrites
    of_input = op.saves == "input"  # torch's vectors take gelu of infinity for NaN, of -0.0 for 0.0
    if of_input:
        special = [value for value in special if not math.isinf(value)]
    x = torch.randn(shape).to(dtype)
    if x.numel():
        for value in special:
            x.view(-1)[torch.randint(x.numel(), ())] = value
        x = layout(x)
    x.requires_grad_()
    grad_output = values(shape, 1.0, dtype, upstream_layout)
    results = []
    arguments = op.defaults
    for operator, above in (
        (lambda *a: call(op, a, inplace), grad_output),
        (
            op.aten_ if inplace else op.aten,
            grad_output.contiguous(),
        ),  # gelu cannot describe windows
    ):
        y = operator(x * 1 if inplace else x, *arguments)
        results.append((y.detach(), torch.autograd.grad(y, x, above)[0]))
    sample, limits = SAMPLES[op.name], torch.finfo(dtype)
    rtol = 4 * limits.eps if sample.rounds else 0
    atol = 16 * limits.eps if sample.cancels else limits.tiny if sample.rounds else 0
    for got, expected in zip(*results, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got, expected, rtol=rtol, atol=atol, equal_nan=True)
        told = ~got.isnan() & (((expected == 0) & (not of_input)) | (expected.abs() > atol))
        assert torch.equal(got.signbit() & told, expected.signbit() & told)
