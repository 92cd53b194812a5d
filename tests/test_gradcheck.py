"""gradcheck and gradgradcheck in float64 over every combination of the options."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from compare import Operator
from conftest import KernelCalls
from samples import ACTIVATIONS, BROADCASTING, LOSSES, Loss, every_activation, every_loss
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from pyfused.functional import cross_entropy
from pyfused.ops.activation import Activation
from pyfused.ops.dispatch import call

BROADCAST = pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")
REDUCTIONS = ["none", "mean", "sum"]
CE_SHAPES = [(5,), (4, 5), (2, 5, 3), (2, 3, 2, 2)]
SMOOTHINGS = [0.0, 0.2, 1.0]
IGNORED = [-100, 1, 9]  # none of the targets, a class, a number that is no class

INDEX_OPTIONS = list(product(CE_SHAPES, [False, True], SMOOTHINGS, IGNORED, REDUCTIONS))
PROBABILITY_OPTIONS = list(
    product(CE_SHAPES, [False, True], SMOOTHINGS, REDUCTIONS, ["input", "target", "both"])
)
SHAPES = [[()], [(7,)], [(2, 3)], [(2, 3), (3,)], [(3,), (2, 3)]]


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


def loss_case(
    loss: Loss, shapes: list[tuple[int, ...]], weighted: bool, reduction: str, requiring: str
) -> tuple[Operator, tuple[Tensor, ...]]:
    names = loss.differentiated if requiring == "all" else (requiring,)
    each = shapes if len(shapes) > 1 else shapes[0]
    given = loss.draw(each, torch.float64, requiring=names)
    options: dict[str, Any] = loss.parameters | {"reduction": reduction}
    if weighted:
        options["weight"] = loss.weight(shapes[0], torch.float64)

    def function(*tensors: Tensor) -> Tensor:
        return loss.ours(**dict(zip(given, tensors, strict=True)), **options)

    return function, tuple(given.values())


def loss_options() -> list[tuple[Any, ...]]:
    """Every combination; of shapes, the broadcast ones where a loss takes them."""
    found: list[tuple[Any, ...]] = []
    for loss in LOSSES:
        shapes = SHAPES if loss in BROADCASTING else SHAPES[:3]
        weights = [False, True] if loss.takes_weight else [False]
        requiring = [*loss.differentiated, "all"]
        found += [(loss, *rest) for rest in product(shapes, weights, REDUCTIONS, requiring)]
    return found


def activation_case(
    op: Activation, size: int, inplace: bool
) -> tuple[Operator, tuple[Tensor, ...]]:
    # Away from zero, where the difference quotient would straddle a kink.
    x = double(size)
    x = (x + 0.1 * x.sign()).requires_grad_()
    return (lambda x: call(op, (x.clone(), *op.defaults), inplace)), (x,)


Case = Callable[..., tuple[Operator, tuple[Tensor, ...]]]
ALL_CASES: list[Any] = [
    *(pytest.param(index_case, o, id=f"index-{name(o)}") for o in INDEX_OPTIONS),
    *(pytest.param(probability_case, o, id=f"probability-{name(o)}") for o in PROBABILITY_OPTIONS),
    *(pytest.param(loss_case, o, id=f"{o[0].id}-{name(o[1:])}") for o in loss_options()),
    *(
        pytest.param(activation_case, o, id=f"{o[0].name}-{name(o[1:])}")
        for o in product(ACTIVATIONS, [1, 9], [False, True])
        if o[0].saves == "output" or not o[2]
    ),
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


@every_loss
@pytest.mark.parametrize("size", SIZES, ids="n{}".format)
def test_gradcheck_across_vectors_of_elements(loss: Loss, size: int, isa: str) -> None:
    for weighted, reduction in product({False, loss.takes_weight}, REDUCTIONS):
        function, inputs = loss_case(loss, [(size,)], weighted, reduction, "all")
        assert gradcheck(function, inputs, fast_mode=True)


@every_activation
@pytest.mark.parametrize("size", SIZES, ids="n{}".format)
def test_gradcheck_of_activations(op: Activation, size: int, isa: str) -> None:
    function, x = activation_case(op, size, inplace=False)
    assert gradcheck(function, x, fast_mode=True)
