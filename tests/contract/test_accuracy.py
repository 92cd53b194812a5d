"""Errors against a more exact reference are at most torch's errors plus one rounding.

`compare.Errors` computes this over the calls of a test. The reference is float64 for float32 and
half precision, and NumPy's long double for float64. Inputs are standard normal, confident (logits
of +-30), extreme (+-1e4), and close together but far from zero; long rows also have their largest
logits last.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compare import (
    FLOATS,
    HALF,
    Errors,
    Outcome,
    evaluate,
    exactly,
    extended,
    largest,
    random_grad_output,
    torch_function,
)
from conftest import ISAS, KernelCalls
from grid import grid
from samples import ACTIVATIONS, GATED, LOSSES, SAMPLES, Loss, target_indices, target_probabilities
from torch import Tensor

from pyfused import functional
from pyfused.dispatch.operator import Operator
from pyfused.functional import cross_entropy
from pyfused.ops.activation import Activation
from pyfused.ops.pointwise_loss import PointwiseLoss

# Sizes around vector, tile and chunk boundaries, and vocabulary sizes in use.
CLASSES = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 48, 64, 65, 129]
CLASSES += [1000, 1023, 1025, 2048, 4096, 5000, 32_000, 50_257, 200_000]
POSITIONS = [1, 2, 7, 8, 9, 15, 16, 17, 33, 64, 65, 100, 129]

LOGITS = {
    "normal": lambda shape: torch.randn(shape),
    "confident": lambda shape: 30.0 * torch.randn(shape).sign(),
    "extreme": lambda shape: 1e4 * torch.randn(shape).sign(),
    "far_from_zero": lambda shape: 1e4 + 8 * torch.randn(shape).round(decimals=1),
}
LATE = {
    "rising": lambda shape: torch.randn(shape) + torch.linspace(-20, 20, shape[1]),
    "peaked": lambda shape: (
        torch.randn(shape) + 9.0 * F.one_hot(torch.tensor(max(shape[1] - 5, 0)), shape[1])
    ),
}


def make(kind: str, shape: tuple[int, ...], dtype: torch.dtype, targets: str) -> tuple[Any, ...]:
    logits = (LOGITS | LATE)[kind](shape).to(dtype).requires_grad_()
    is_soft = targets == "probabilities"
    return logits, target_probabilities(shape, dtype) if is_soft else target_indices(shape, False)


# (target, weighted, smoothing, reduction), in all pairwise combinations.
OPTIONS = [
    ("index", False, 0.0, "mean"),
    ("index", True, 0.1, "none"),
    ("index", True, 0.0, "sum"),
    ("index", False, 0.1, "mean"),
    ("probabilities", False, 0.0, "sum"),
    ("probabilities", True, 0.1, "mean"),
    ("probabilities", False, 0.1, "none"),
]


def check_options(kind: str, shapes: list[Any], dtype: torch.dtype, choices: list[Any]) -> None:
    errors = Errors()
    for shape, (targets, weighted, smoothing, reduction) in product(shapes, choices):
        logits, target = make(kind, shape, dtype, targets)
        weight = torch.rand(shape[1]).to(dtype) if weighted else None
        call = logits, target, weight
        options: dict[str, Any] = {"label_smoothing": smoothing, "reduction": reduction}
        got = evaluate(cross_entropy, *call, **options)
        of_torch = evaluate(F.cross_entropy, *call, **options)
        if dtype == torch.float64:
            value, gradient = extended_cross_entropy(*call, smoothing, reduction)
            exact = Outcome(value, [gradient])
        else:
            exact = evaluate(F.cross_entropy, *call, convert=exactly, **options)
        errors.add_outcome(got, of_torch, exact, gradient_term(target, weight, reduction))
    errors.check()


def gradient_term(target: Tensor, weight: Tensor | None, reduction: str) -> float:
    """Returns the largest term that the softmax is subtracted from: weight times target, scaled."""
    rows = target.numel() if not target.is_floating_point() else target[:, 0].numel()
    grad_output = random_grad_output((rows,) if reduction == "none" else ()).abs().max().item()
    term = target.max().item() if target.is_floating_point() else 1.0
    term *= weight.max().item() if weight is not None else 1.0
    return term * grad_output / (rows if reduction == "mean" else 1)


def extended_cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None, smoothing: float, reduction: str
) -> tuple[Any, Any]:
    """Computes value and gradient for (N, C) from the closed forms in long double.

    With W = sum_c weight_c q_c:  d loss / d logits_c = softmax_c W - weight_c q_c
    """
    rows, classes = logits.shape
    index = not target.is_floating_point()
    hard = F.one_hot(target, classes) if index else target
    s = np.longdouble(smoothing)
    w = extended(torch.ones(classes) if weight is None else weight)
    weighted = w * ((1 - s) * extended(hard) + s / classes)
    denominator: Any = np.longdouble(1)
    if reduction == "mean":
        denominator = w[target.numpy()].sum() if index else np.longdouble(rows)
    shifted = extended(logits) - extended(logits).max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    loss = -(weighted * log_p).sum(-1) / denominator
    gradient = np.exp(log_p) * weighted.sum(-1, keepdims=True) - weighted
    grad_output = extended(random_grad_output((rows,) if reduction == "none" else ()))
    gradient *= grad_output[..., None] / denominator
    return loss if reduction == "none" else loss.sum(), gradient


def skip_without_reference(dtype: torch.dtype, op: Operator | None = None) -> None:
    if dtype == torch.float64 and op is not None and not SAMPLES[op.name].beyond_float64:
        pytest.skip("the reference is not more accurate than float64")
    if dtype == torch.float64 and np.finfo(np.longdouble).eps >= np.finfo(np.float64).eps:
        pytest.skip("this platform's long double is no wider than float64")


@grid(classes=CLASSES, dtype=FLOATS, kind=[*LOGITS, *LATE, "normal"], isa=ISAS)
def test_cross_entropy(
    classes: int, kind: str, dtype: torch.dtype, isa: str, kernel_calls: KernelCalls
) -> None:
    skip_without_reference(dtype)
    rows = 65 if classes < 1000 else 5 if classes < 32_000 else 2
    options = OPTIONS if rows > 2 else OPTIONS[2:5]
    check_options(kind, [(rows, classes)], dtype, options)
    assert kernel_calls["cross_entropy"] >= len(options) or classes == 1  # torch is exact


@grid(classes=[1, 2, 3, 21, 33, 130], dtype=[torch.float32, *HALF], kind=LOGITS, isa=ISAS)
def test_classes_not_last(classes: int, dtype: torch.dtype, kind: str, isa: str) -> None:
    options = [
        ("index", False, 0.0, "mean"),
        ("index", False, 0.1, "none"),
        ("probabilities", False, 0.0, "sum"),
    ]
    shapes = [(2, classes, positions) for positions in POSITIONS]
    check_options(kind, shapes, dtype, options)


@grid(classes=[10, 65, 1000, 32000], kind=["normal", "confident", "far_from_zero", *LATE])
def test_small_probabilities_keep_their_relative_precision(kind: str, classes: int) -> None:
    """Checks the relative error of each element; a common tolerance hides small elements."""
    logits, target = make(kind, (9, classes), torch.float32, "index")
    got = evaluate(cross_entropy, logits, target, reduction="sum").gradients[0].double()
    of_torch = evaluate(F.cross_entropy, logits, target, reduction="sum").gradients[0].double()
    exact = evaluate(F.cross_entropy, logits, target, convert=exactly, reduction="sum")
    best = exact.gradients[0]
    judged = (best.abs() > torch.finfo(torch.float32).tiny) & ~F.one_hot(target, classes).bool()
    error = ((got - best) / best)[judged].abs().max()
    torchs_error = ((of_torch - best) / best)[judged].abs().max()
    # One rounding each of exp, its argument, the sum, the factor and the product.
    assert error <= torchs_error + 4 * torch.finfo(torch.float32).eps


SIZES = (1, 7, 9, 31, 33, 65, 256, 257, 4097)


@grid(loss=LOSSES, dtype=FLOATS, large=[False, False, True, True], weighted=[False, True], isa=ISAS)
def test_pointwise_losses(loss: Loss, dtype: Any, large: bool, weighted: bool, isa: str) -> None:
    skip_without_reference(dtype, loss.op)
    if large and dtype == torch.float16:
        pytest.skip("the squares overflow, in torch earlier than necessary")
    scale = SAMPLES[loss.op.name].large if large else 1.0
    errors = Errors()
    many = (100_001,) if loss is LOSSES[0] else ()  # the sums of all losses are alike
    for size, reduction in product((*SIZES, *many), ("none", "mean", "sum")):
        given = loss.draw((size,), dtype, scale=scale)
        if weighted and loss.takes_weight:
            given["weight"] = loss.weight((size,), dtype)
        options = loss.parameters | {"reduction": reduction}
        got = evaluate(loss.ours, **given, **options)
        of_torch = evaluate(loss.reference, **given, **options)
        grad_output = random_grad_output(got.value.shape).to(dtype)
        errors.add_outcome(got, of_torch, *loss.exact(given, reduction, grad_output))
    errors.check(roundings=2 if SAMPLES[loss.op.name].heavy else 1)


@grid(op=[*ACTIVATIONS, *GATED], dtype=FLOATS, scale=[0.1, 1.0, 10.0, 1e4], isa=ISAS)
def test_activations(
    op: Activation | PointwiseLoss, dtype: torch.dtype, scale: float, isa: str
) -> None:
    skip_without_reference(dtype, op)
    errors = Errors()
    for size, options in product(SIZES, SAMPLES[op.name].tried):
        inputs = [(scale * torch.randn(size)).to(dtype).requires_grad_() for _ in op.operands]
        functions = getattr(functional, op.name), torch_function(op)
        ours, theirs = (evaluate(f, *inputs, **options) for f in functions)
        value, *derivatives = SAMPLES[op.name].define(*map(extended, inputs), **options)
        grad_output = extended(random_grad_output((size,)).to(dtype))
        cancels = largest(inputs[0]) if SAMPLES[op.name].cancels else 0.0
        exact = Outcome(value, [derivative * grad_output for derivative in derivatives])
        errors.add_outcome(ours, theirs, exact, largest(grad_output), cancels)
    errors.check()
