"""gradcheck and gradgradcheck in float64 over the options, and across the lengths of vectors."""

from __future__ import annotations

from typing import Any

import interpreter
import torch
from compare import Operator
from conftest import ISAS, KernelCalls
from grid import grid
from samples import ACTIVATIONS, LOSSES, Loss, arguments
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from pyfused.functional import cross_entropy
from pyfused.ops.activation import Activation
from pyfused.ops.dispatch import call

WEIGHTED, TWICE = [False, False, True, True], [False, True]
REDUCTIONS = ["none", "mean", "sum"]
CE_SHAPES = [(5,), (4, 5), (2, 5, 3), (2, 3, 2, 2)]
SMOOTHINGS = [0.0, 0.2, 1.0]
IGNORED = [-100, 1, 9]  # none of the targets, a class, a number that is no class


def double(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def index_case(
    shape: tuple[int, ...], weighted: bool, smoothing: float, ignored: int, reduction: str
) -> tuple[Operator, tuple[Tensor, ...]]:
    class_dim = min(len(shape) - 1, 1)
    classes = shape[class_dim]
    target = torch.randint(classes, shape[:class_dim] + shape[class_dim + 1 :])
    if ignored == 9 and target.dim():
        target.view(-1)[0] = 9
    if ignored == 1:
        target.view(-1)[-1] = 0  # so that a mean is not over nothing
    weight = torch.rand(classes, dtype=torch.float64) + 0.1 if weighted else None

    def loss(logits: Tensor) -> Tensor:
        return cross_entropy(
            logits,
            target,
            weight,
            ignore_index=ignored,
            reduction=reduction,
            label_smoothing=smoothing,
        )

    return loss, (double(*shape).requires_grad_(),)


def probability_case(
    shape: tuple[int, ...], weighted: bool, smoothing: float, reduction: str, requiring: str
) -> tuple[Operator, tuple[Tensor, ...]]:
    class_dim = min(len(shape) - 1, 1)
    weight = torch.rand(shape[class_dim], dtype=torch.float64) + 0.1 if weighted else None

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        options: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}
        return cross_entropy(logits, target, weight, **options)

    logits, target = double(*shape), double(*shape).softmax(class_dim)
    logits.requires_grad_(requiring in ("input", "both"))
    target.requires_grad_(requiring in ("target", "both"))
    return loss, (logits, target)


def loss_case(
    loss: Loss, shapes: list[tuple[int, ...]], requiring: int, reduction: str, weighted: bool
) -> tuple[Operator, tuple[Tensor, ...]]:
    """With gradients to all operands, or to one by its place."""
    names = loss.differentiated
    names = names if requiring < 0 else (names[requiring % len(names)],)
    each = shapes if len(shapes) > 1 else shapes[0]
    given = loss.draw(each, torch.float64, requiring=names)
    options: dict[str, Any] = loss.parameters | {"reduction": reduction}
    if weighted and loss.takes_weight:
        options["weight"] = loss.weight(shapes[0], torch.float64)

    def function(*tensors: Tensor) -> Tensor:
        return loss.ours(**dict(zip(given, tensors, strict=True)), **options)

    return function, tuple(given.values())


def activation_case(
    op: Activation, size: int, inplace: bool
) -> tuple[Operator, tuple[Tensor, ...]]:
    # Away from zero, where the difference quotient would straddle a kink.
    x = double(size)
    x = (x + 0.1 * x.sign()).requires_grad_()
    return (lambda x: call(op, arguments(op, x.clone()), inplace)), (x,)


SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65]
ACROSS_CHUNKS = [1023, 1025]
if interpreter.ON:
    SIZES, ACROSS_CHUNKS = [1, 5, 33], []


def check(function: Operator, inputs: Any, kernel_calls: KernelCalls, twice: bool) -> None:
    assert (gradgradcheck if twice else gradcheck)(function, inputs)
    assert kernel_calls.total(), "torch's own forward says nothing"


@grid(
    shape=CE_SHAPES,
    smoothing=SMOOTHINGS,
    ignored=IGNORED,
    reduction=REDUCTIONS,
    weighted=WEIGHTED,
    isa=ISAS,
    twice=TWICE,
)
def test_class_indices(
    shape: tuple[int, ...],
    smoothing: float,
    ignored: int,
    reduction: str,
    weighted: bool,
    twice: bool,
    isa: str,
    kernel_calls: KernelCalls,
) -> None:
    check(*index_case(shape, weighted, smoothing, ignored, reduction), kernel_calls, twice)


@grid(
    shape=CE_SHAPES,
    smoothing=SMOOTHINGS,
    requiring=["input", "target", "both"],
    reduction=REDUCTIONS,
    weighted=WEIGHTED,
    isa=ISAS,
    twice=TWICE,
)
def test_probabilities(
    shape: tuple[int, ...],
    smoothing: float,
    requiring: str,
    reduction: str,
    weighted: bool,
    twice: bool,
    isa: str,
    kernel_calls: KernelCalls,
) -> None:
    check(*probability_case(shape, weighted, smoothing, reduction, requiring), kernel_calls, twice)


@grid(size=[*SIZES, *ACROSS_CHUNKS], isa=ISAS, smoothing=[0.0, 0.1], reduction=REDUCTIONS)
def test_across_vectors_of_classes(size: int, smoothing: float, reduction: str, isa: str) -> None:
    """Fast mode: one random direction, as the full Jacobian of 1025 classes takes minutes."""
    target, weight = torch.randint(size, (3,)), torch.rand(size, dtype=torch.float64)
    logits, probabilities = double(3, size), double(3, size).softmax(1).requires_grad_()
    options: dict[str, Any] = {"label_smoothing": smoothing, "reduction": reduction}

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(logits, target, weight, **options)

    logits.requires_grad_()
    for targets in (target, probabilities):
        assert gradcheck(loss, (logits, targets), fast_mode=True)


@grid(size=SIZES, isa=ISAS, smoothing=[0.0, 0.1], reduction=REDUCTIONS)
def test_across_vectors_of_positions(size: int, smoothing: float, reduction: str, isa: str) -> None:
    target = torch.randint(3, (2, size))
    target[0, 0] = -100
    options: dict[str, Any] = {"label_smoothing": smoothing, "reduction": reduction}
    function = lambda x: cross_entropy(x, target, **options)  # noqa: E731
    assert gradcheck(function, (double(2, 3, size).requires_grad_(),), fast_mode=True)


@grid(loss=LOSSES, isa=ISAS, reduction=REDUCTIONS, weighted=WEIGHTED)
def test_across_vectors_of_elements(loss: Loss, weighted: bool, reduction: str, isa: str) -> None:
    for size in SIZES:
        function, inputs = loss_case(loss, [(size,)], -1, reduction, weighted)
        assert gradcheck(function, inputs, fast_mode=True)


@grid(op=ACTIVATIONS, isa=ISAS)
def test_activations_across_vectors(op: Activation, isa: str) -> None:
    for size in SIZES:
        function, x = activation_case(op, size, inplace=False)
        assert gradcheck(function, x, fast_mode=True)
