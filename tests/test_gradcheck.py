"""gradcheck and gradgradcheck in float64 over every combination of the options."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from compare import Operator
from conftest import KernelCalls
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from pyfused.functional import cross_entropy, mse_loss, relu

BROADCAST = pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")
REDUCTIONS = ["none", "mean", "sum"]
CE_SHAPES = [(5,), (4, 5), (2, 5, 3), (2, 3, 2, 2)]
SMOOTHINGS = [0.0, 0.2, 1.0]
IGNORED = [-100, 1, 9]  # none of the targets, a class, a number that is no class

INDEX_OPTIONS = list(product(CE_SHAPES, [False, True], SMOOTHINGS, IGNORED, REDUCTIONS))
PROBABILITY_OPTIONS = list(
    product(CE_SHAPES, [False, True], SMOOTHINGS, REDUCTIONS, ["input", "target", "both"])
)
MSE_SHAPES = [((), ()), ((7,), (7,)), ((2, 3), (2, 3)), ((2, 3), (3,)), ((3,), (2, 3))]
MSE_OPTIONS = list(product(MSE_SHAPES, [False, True], REDUCTIONS, ["input", "target", "both"]))


def name(options: tuple[Any, ...]) -> str:
    return "-".join(str(option).replace(" ", "") for option in options)


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


def mse_case(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], weighted: bool, reduction: str, requiring: str
) -> tuple[Operator, tuple[Tensor, ...]]:
    weight = torch.rand(shapes[0], dtype=torch.float64) + 0.1 if weighted else None
    input, target = double(*shapes[0]), double(*shapes[1])
    input.requires_grad_(requiring in ("input", "both"))
    target.requires_grad_(requiring in ("target", "both"))
    return lambda x, t: mse_loss(x, t, reduction=reduction, weight=weight), (input, target)


def relu_case(size: int, inplace: bool) -> tuple[Operator, tuple[Tensor, ...]]:
    # Away from zero, where the difference quotient would straddle the kink.
    x = double(size)
    x = (x + 0.1 * x.sign()).requires_grad_()
    return (lambda x: relu(x.clone(), inplace)), (x,)


Case = Callable[..., tuple[Operator, tuple[Tensor, ...]]]
ALL_CASES: list[Any] = [
    *(pytest.param(index_case, o, id=f"index-{name(o)}") for o in INDEX_OPTIONS),
    *(pytest.param(probability_case, o, id=f"probability-{name(o)}") for o in PROBABILITY_OPTIONS),
    *(pytest.param(mse_case, o, id=f"mse-{name(o)}") for o in MSE_OPTIONS),
    *(pytest.param(relu_case, o, id=f"relu-{name(o)}") for o in product([1, 9], [False, True])),
]
SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65]


@BROADCAST
@pytest.mark.parametrize(("case", "options"), ALL_CASES)
def test_gradcheck(case: Case, options: tuple[Any, ...], isa: str) -> None:
    function, inputs = case(*options)
    assert gradcheck(function, inputs)


@BROADCAST
@pytest.mark.parametrize(("case", "options"), ALL_CASES)
def test_gradgradcheck(case: Case, options: tuple[Any, ...], kernel_calls: KernelCalls) -> None:
    function, inputs = case(*options)
    assert gradgradcheck(function, inputs)
    assert kernel_calls.total(), "the double backward of torch's own forward says nothing"


@pytest.mark.parametrize("size", [*SIZES, 127, 128, 129, 1023, 1025], ids="C{}".format)
def test_gradcheck_across_vectors_of_classes(size: int, isa: str) -> None:
    """Fast mode: one random direction, as the full Jacobian of 1025 classes takes minutes."""
    target = torch.randint(size, (3,))
    logits, weight = double(3, size).requires_grad_(), torch.rand(size, dtype=torch.float64)
    for smoothing, reduction in product((0.0, 0.1), REDUCTIONS):
        options: dict[str, Any] = {"label_smoothing": smoothing, "reduction": reduction}
        function = lambda x, o=options: cross_entropy(x, target, weight, **o)  # noqa: E731
        assert gradcheck(function, (logits,), fast_mode=True)
        assert gradcheck(
            lambda x, t, o=options: cross_entropy(x, t, weight, **o),
            (logits, double(3, size).softmax(1).requires_grad_()),
            fast_mode=True,
        )


@pytest.mark.parametrize("size", SIZES, ids="d{}".format)
def test_gradcheck_across_vectors_of_positions(size: int, isa: str) -> None:
    target = torch.randint(3, (2, size))
    target[0, 0] = -100
    for smoothing, reduction in product((0.0, 0.1), REDUCTIONS):
        options: dict[str, Any] = {"label_smoothing": smoothing, "reduction": reduction}
        function = lambda x, o=options: cross_entropy(x, target, **o)  # noqa: E731
        assert gradcheck(function, (double(2, 3, size).requires_grad_(),), fast_mode=True)


@pytest.mark.parametrize("size", SIZES, ids="n{}".format)
def test_gradcheck_across_vectors_of_elements(size: int, isa: str) -> None:
    inputs = (double(size).requires_grad_(), double(size).requires_grad_())
    weight = torch.rand(size, dtype=torch.float64)
    for weight_, reduction in product((None, weight), REDUCTIONS):
        options: dict[str, Any] = {"weight": weight_, "reduction": reduction}
        assert gradcheck(lambda x, t, o=options: mse_loss(x, t, **o), inputs, fast_mode=True)
    function, x = relu_case(size, inplace=False)
    assert gradcheck(function, x, fast_mode=True)
