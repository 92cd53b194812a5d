"""Pointwise losses mean what torch's mean: values, shapes, dtypes, warnings, NaN and infinities."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compare import (
    FLOATS,
    Errors,
    assert_matches_torch,
    evaluate,
    evaluate_upstream,
    exactly,
)
from conftest import KernelCalls
from samples import (
    BROADCASTING,
    FIRST,
    SAMPLES,
    Loss,
    each_loss_once,
    every,
    every_loss,
    with_and_without_weight,
)
from torch import Tensor

from pyfused import functional
from pyfused.functional import gaussian_nll_loss, mse_loss
from pyfused.ops.dispatch import call
from pyfused.ops.operators import MSE_LOSS

INF, NAN = float("inf"), float("nan")
SHAPES = [(), (1,), (7,), (8,), (3, 5), (2, 3, 17), (2, 1, 3, 2)]
BROADCAST = pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")
by_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
close = torch.testing.assert_close


def weight_of(
    loss: Loss, weighted: bool, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    return {"weight": loss.weight(shape, dtype)} if weighted else {}


# ---- values and gradients ------------------------------------------------------------------------


@with_and_without_weight
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@by_dtype
def test_shapes_and_options_against_torch(
    loss: Loss,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    weighted: bool,
    reduction: str,
    kernel_calls: KernelCalls,
) -> None:
    given = loss.draw(shape, dtype) | weight_of(loss, weighted, shape, dtype)
    options = loss.parameters | {"reduction": reduction}
    assert_matches_torch(loss.ours, loss.reference, **given, **options)
    assert kernel_calls[loss.kernel]


@with_and_without_weight
def test_gradients_to_those_that_ask(
    loss: Loss, weighted: bool, reduction: str, kernel_calls: KernelCalls
) -> None:
    weight = weight_of(loss, weighted, (3, 5))
    for asked in product((False, True), repeat=len(loss.differentiated)):
        requiring = tuple(name for name, ask in zip(loss.differentiated, asked, strict=True) if ask)
        given = loss.draw((3, 5), requiring=requiring) | weight
        options = loss.parameters | {"reduction": reduction}
        got = assert_matches_torch(loss.ours, loss.reference, **given, **options)
        assert len(got.gradients) == len(requiring)
    assert kernel_calls[loss.kernel]


@each_loss_once
def test_the_same_tensor_for_each_that_is_differentiated(loss: Loss, reduction: str) -> None:
    def twice(operator: Any, x: Tensor) -> Tensor:
        given = loss.draw((3, 5), requiring=()) | dict.fromkeys(loss.differentiated, x)
        return operator(**given, reduction=reduction)

    x = torch.rand(3, 5, requires_grad=True)
    for operator in (loss.ours, loss.reference):
        torch.manual_seed(1)
        x.grad = None
        twice(operator, x).sum().backward()
        if operator is loss.ours:
            got = x.grad
    close(got, x.grad)


def test_four_rows_by_hand() -> None:
    predicted = torch.tensor([[2.5], [7.0], [10.0], [16.0]], requires_grad=True)
    wanted = torch.tensor([[3.0], [7.0], [11.0], [15.0]])
    assert torch.equal(
        mse_loss(predicted, wanted, reduction="none"), torch.tensor([[0.25], [0], [1], [1]])
    )
    assert mse_loss(predicted, wanted, reduction="sum").item() == 2.25
    loss = mse_loss(predicted, wanted)
    assert loss.item() == 2.25 / 4
    loss.backward()
    by_hand = 2 * (predicted.detach().numpy() - wanted.numpy()) / 4
    assert predicted.grad is not None
    np.testing.assert_array_equal(predicted.grad.numpy(), by_hand)


# ---- shapes --------------------------------------------------------------------------------------

BROADCASTS = [
    ((3, 5), (5,)),
    ((5,), (3, 5)),
    ((3, 1), (1, 5)),
    ((3, 5), ()),
    ((), (3, 5)),
    ((2, 3, 17), (3, 1)),
    ((4, 1), (4,)),
    ((0, 3), (1, 3)),
    ((1, 3), (0, 3)),
]
by_shapes = pytest.mark.parametrize("shapes", BROADCASTS, ids=str)
Shapes = tuple[tuple[int, ...], tuple[int, ...]]


@BROADCAST
@every(BROADCASTING)
@by_shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_broadcasting(loss: Loss, shapes: Shapes, dtype: torch.dtype, reduction: str) -> None:
    given = loss.draw(list(shapes), dtype)
    options = loss.parameters | {"reduction": reduction}
    assert_matches_torch(loss.ours, loss.reference, **given, **options)
    if loss.takes_weight:
        given["weight"] = loss.weight(shapes[0], dtype)
        assert_matches_torch(loss.ours, loss.reference, **given, **options)


@BROADCAST
@every(BROADCASTING)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("shapes", BROADCASTS[:-2], ids=str)
def test_broadcasting_in_half_precision(loss: Loss, shapes: Shapes, dtype: torch.dtype) -> None:
    """Differences of one sign, so that summing over the expanded dimensions cancels nothing."""
    input = (torch.rand(shapes[0]) + 2).to(dtype).requires_grad_()
    target = torch.rand(shapes[1]).to(dtype).requires_grad_("target" in loss.differentiated)
    got = evaluate(loss.ours, input, target)
    exact = evaluate(loss.reference, input, target, convert=exactly)
    for ours, expected in zip(
        (got.value, *got.gradients), (exact.value, *exact.gradients), strict=True
    ):
        assert ours.dtype == dtype
        close(ours, expected.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=0.0)


@every(loss for loss in BROADCASTING if loss.op.warns)
def test_broadcasting_warns_as_torch_does_at_the_callers_line(loss: Loss) -> None:
    given = loss.draw([(3, 5), (5,)])
    caught = []
    for function in (loss.ours, loss.reference):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always", UserWarning)
            function(**given)
        assert len(seen) == 1
        caught.append((seen[0].category, str(seen[0].message), seen[0].filename))
    assert caught[0] == caught[1]
    assert caught[0][2] == __file__


@with_and_without_weight
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0, 2)], ids=str)
def test_no_elements(loss: Loss, shape: tuple[int, ...], weighted: bool, reduction: str) -> None:
    given = loss.draw(shape) | weight_of(loss, weighted, shape)
    assert_matches_torch(loss.ours, loss.reference, **given, **loss.parameters, reduction=reduction)


# ---- dtypes --------------------------------------------------------------------------------------

PROMOTED = [*FLOATS, torch.int64, torch.uint8, torch.bool]
DIFFERENTIATED = pytest.mark.skipif(
    torch.__version__ < "2.12", reason="torch 2.11 has no gradient of mse_loss across dtypes"
)


def outcome_or_error(operator: Any, given: dict[str, Any], **options: Any) -> Any:
    try:
        return evaluate(operator, **given, **options)
    except Exception as error:
        return type(error)


@DIFFERENTIATED
@each_loss_once
@pytest.mark.parametrize("other", PROMOTED, ids=lambda dtype: str(dtype)[6:])
@by_dtype
@pytest.mark.parametrize("swapped", [False, True], ids=["", "swapped"])
def test_type_promotion(
    loss: Loss,
    dtype: torch.dtype,
    other: torch.dtype,
    swapped: bool,
    reduction: str,
    kernel_calls: KernelCalls,
) -> None:
    """torch's dtype or error; nearer to the exact value than torch, which rounds on the way."""
    values = loss.draw((60, 5), torch.float64, requiring=())
    first_two = [operand.name for operand in loss.operands[:2]]
    dtypes = dict(zip(first_two[:: -1 if swapped else 1], (dtype, other), strict=True))
    given = {name: x.abs().to(dtypes.get(name, torch.float32)) for name, x in values.items()}
    for name, tensor in given.items():
        tensor.requires_grad_(tensor.is_floating_point() and name in loss.differentiated)
    weights: list[dict[str, Tensor]] = [{}]
    if loss.takes_weight:
        weight = torch.tensor([1, 0, 2, 1, 3]).expand(60, 5)
        weights += [{"weight": weight.to(dtype)} for dtype in (*FLOATS, torch.int64)]
    for weight_ in weights:
        got = outcome_or_error(loss.ours, given | weight_, reduction=reduction)
        of_torch = outcome_or_error(loss.reference, given | weight_, reduction=reduction)
        if isinstance(of_torch, type):
            assert isinstance(got, type)
            assert issubclass(got, of_torch)
            continue
        grad_output = evaluate_upstream(got.value.shape).to(got.value.dtype)
        if not kernel_calls[loss.kernel]:
            assert got.value.dtype is of_torch.value.dtype
            continue
        exact = loss.exact(given | weight_, reduction, grad_output)
        errors = Errors()
        errors.add("value", got.value, of_torch.value, exact.value, exact.terms)
        asked = [name for name in loss.differentiated if given[name].requires_grad]
        for name, ours, theirs in zip(asked, got.gradients, of_torch.gradients, strict=True):
            expected = exact.gradients[name]
            errors.add(f"gradient to the {name}", ours, theirs, expected, exact.gradients_terms)
        errors.check(roundings=4 if got.value.dtype == torch.float64 else 2)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@with_and_without_weight
@by_dtype
def test_autocast_gives_torchs_dtypes(
    autocast: torch.dtype, loss: Loss, dtype: torch.dtype, weighted: bool, reduction: str
) -> None:
    given = loss.draw((4, 5), dtype) | weight_of(loss, weighted, (4, 5), dtype)
    options = loss.parameters | {"reduction": reduction}
    with torch.autocast("cpu", dtype=autocast):
        got = evaluate(loss.ours, **given, **options)
        expected = evaluate(loss.reference, **given, **options)
    assert got.value.dtype == expected.value.dtype
    grad_output = evaluate_upstream(got.value.shape).to(got.value.dtype)
    exact = loss.exact(given, reduction, grad_output)
    assert_rounded(got.value, exact.value, exact.terms)
    for ours, name in zip(got.gradients, loss.differentiated, strict=True):
        assert ours.dtype == dtype
        assert_rounded(ours, exact.gradients[name], exact.gradients_terms)


def assert_rounded(got: Tensor, exact: Any, size_of_terms: float = 0.0) -> None:
    expected = torch.tensor(np.asarray(exact, np.float64))
    eps = torch.finfo(got.dtype).eps
    scale = max(expected.abs().max().item(), size_of_terms)
    close(got.double(), expected, rtol=2 * eps, atol=4 * eps * scale)


@every(BROADCASTING)
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64], ids=["float64", "int64"])
@BROADCAST
@DIFFERENTIATED
def test_a_scalar_target_promotes_as_in_torch(
    loss: Loss, dtype: torch.dtype, reduction: str
) -> None:
    given = loss.draw((3, 5)) | {"target": torch.tensor(2, dtype=dtype)}
    options = loss.parameters | {"reduction": reduction}
    of_torch = outcome_or_error(loss.reference, given, **options)
    if isinstance(of_torch, type):
        assert outcome_or_error(loss.ours, given, **options) is of_torch
    else:
        assert_matches_torch(loss.ours, loss.reference, **given, **options)


@pytest.mark.parametrize("weight_dtype", [torch.int64, torch.bool], ids=["int64", "bool"])
def test_integers_with_a_weight(weight_dtype: torch.dtype, reduction: str) -> None:
    input, target = torch.randint(9, (3, 5)), torch.randint(9, (3, 5))
    weight = torch.randint(1, 3, (3, 5)).to(weight_dtype)
    options = {"weight": weight, "reduction": reduction}
    assert_matches_torch(mse_loss, F.mse_loss, input, target, **options)


# ---- values at the edges -------------------------------------------------------------------------


@every_loss
@by_dtype
@pytest.mark.parametrize("size", [6, 6 * 7, 6 * 50])
def test_special_values_come_out_as_torchs(
    loss: Loss, dtype: torch.dtype, size: int, reduction: str
) -> None:
    special = torch.tensor(SAMPLES[loss.op.name].special).to(dtype)
    given = loss.draw((size,), dtype)
    values = (special.repeat(size // 6), special.repeat_interleave(size // 6))
    for operand, value in zip(loss.operands[:2], values, strict=True):
        if not operand.sign:
            given[operand.name] = value.requires_grad_(operand.name in loss.differentiated)
    if "full" in loss.choices:  # torch's gradient is NaN where the approximation is masked
        given["target"] = given["target"].detach()
    if "pos_weight" in given:  # torch's gradient is NaN where their product overflows
        given["pos_weight"] /= 2
    options = loss.parameters | {"reduction": reduction}
    assert_matches_torch(loss.ours, loss.reference, **given, **options)


@every(loss for loss in FIRST if loss.takes_weight and loss.op.definition is None)
@pytest.mark.parametrize("value", [0.0, -1.0, NAN, INF], ids=str)
def test_unusual_weights(loss: Loss, value: float, reduction: str) -> None:
    given = loss.draw((3, 5)) | weight_of(loss, True, (3, 5))
    for where in ((1, slice(2, None)), slice(None)):
        given["weight"][where] = value
        assert_matches_torch(loss.ours, loss.reference, **given, reduction=reduction)


@by_dtype
def test_variances_below_eps(dtype: torch.dtype, reduction: str, kernel_calls: KernelCalls) -> None:
    """They count as eps, and the gradient passes as if they had been."""
    x, t = (torch.randn(40).to(dtype).requires_grad_() for _ in range(2))
    var = torch.linspace(0, 1, 40).to(dtype).requires_grad_()
    options = {"eps": 0.5, "reduction": reduction}
    assert_matches_torch(gaussian_nll_loss, F.gaussian_nll_loss, x, t, var, **options)
    assert kernel_calls["gaussian_nll_loss"]


@pytest.mark.parametrize("shape", [(2, 3), (2, 1), (1, 3), (2,)], ids=str)
def test_variances_for_several_elements(
    shape: tuple[int, ...], reduction: str, kernel_calls: KernelCalls
) -> None:
    x, t = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    var = (torch.rand(shape) + 0.1).requires_grad_()
    options = {"full": True, "reduction": reduction}
    assert_matches_torch(gaussian_nll_loss, F.gaussian_nll_loss, x, t, var, **options)
    assert_matches_torch(gaussian_nll_loss, F.gaussian_nll_loss, x, t, 0.7, **options)
    assert kernel_calls["gaussian_nll_loss"] >= 2


@pytest.mark.parametrize("shape", [(2, 3), (2, 1), (3,), (), (1, 1)], ids=str)
def test_weights_that_broadcast(
    shape: tuple[int, ...], reduction: str, kernel_calls: KernelCalls
) -> None:
    x, t = torch.randn(2, 3, requires_grad=True), torch.rand(2, 3, requires_grad=True)
    weight, name = torch.rand(shape), "binary_cross_entropy_with_logits"
    for given in ({"weight": weight}, {"pos_weight": weight}):
        options = given | {"reduction": reduction}
        assert_matches_torch(getattr(functional, name), getattr(F, name), x, t, **options)
    assert kernel_calls[name]
    assert kernel_calls[f"{name}_pos_weight"]


@pytest.mark.parametrize("value", [0.3, torch.tensor(0.3), torch.tensor([0.3])], ids=str)
def test_a_parameter_may_be_a_tensor_of_one_element(value: Any, kernel_calls: KernelCalls) -> None:
    x, t = (torch.randn(20, requires_grad=True) for _ in range(2))
    got = evaluate(functional.smooth_l1_loss, x, t, beta=value)
    close(got.gradients, evaluate(F.smooth_l1_loss, x, t, beta=0.3).gradients)
    assert kernel_calls["smooth_l1_loss"]


# ---- arguments -----------------------------------------------------------------------------------

LEGACY = [(a, b) for a in (None, True, False) for b in (None, True, False) if (a, b) != (None,) * 2]


@every(loss for loss in FIRST if "reduce" in loss.op.arguments)
@pytest.mark.parametrize(("size_average", "reduce"), LEGACY)
@pytest.mark.parametrize("shape", [(4, 5), (0, 5)], ids=["", "empty"])
def test_size_average_and_reduce_warn_and_work(
    loss: Loss, size_average: bool | None, reduce: bool | None, shape: tuple[int, ...]
) -> None:
    given = loss.draw(shape)
    options: dict[str, Any] = {"size_average": size_average, "reduce": reduce}
    results = []
    for operator in (loss.ours, loss.reference):
        with pytest.warns(UserWarning, match="size_average and reduce args will be") as warned:
            results.append(operator(**given, **options))
        assert len(warned) == 1
    close(*results, equal_nan=True)


@every_loss
def test_the_arguments_by_position(loss: Loss) -> None:
    defaults = {n: p.default for n, p in inspect.signature(loss.ours).parameters.items()}
    named = defaults | loss.draw((6, 5)) | loss.parameters | {"reduction": "sum"}
    if loss.takes_weight:
        named["weight"] = loss.weight((6, 5))
    kinds = inspect.signature(loss.ours).parameters
    by_place = [n for n in loss.op.arguments if kinds[n].kind is not inspect.Parameter.KEYWORD_ONLY]
    arguments = [named[name] for name in by_place]
    assert_matches_torch(loss.ours, loss.reference, *arguments)


@every(loss for loss in FIRST if loss.takes_weight)
def test_a_gradient_to_the_weight_is_torchs_business(loss: Loss, reduction: str) -> None:
    given = loss.draw((3, 5)) | weight_of(loss, True, (3, 5))
    given["weight"].requires_grad_()
    expected = outcome_or_error(loss.reference, given, reduction=reduction)
    got = outcome_or_error(loss.ours, given, reduction=reduction)
    if isinstance(expected, type):
        assert got is expected
    else:
        close(got.gradients, expected.gradients)


@pytest.mark.thresholds
@every_loss
@pytest.mark.parametrize("shape", [(), (1,), (100,), (5000,), (300, 500)], ids=str)
def test_where_small_inputs_may_go_to_torch(
    loss: Loss, shape: tuple[int, ...], reduction: str
) -> None:
    options = loss.parameters | {"reduction": reduction}
    assert_matches_torch(loss.ours, loss.reference, **loss.draw(shape), **options)


# ---- what a declaration may say ------------------------------------------------------------------


def test_a_reduction_and_a_definition_of_its_own(kernel_calls: KernelCalls) -> None:
    """A mean over the rows, of a loss that is defined in torch's terms."""

    def definition(input: Tensor, target: Tensor, reduction: str = "batchmean") -> Tensor:
        each = (input - target) ** 2
        return each.sum() / len(input) if reduction == "batchmean" else each

    op = replace(
        MSE_LOSS,
        operands=MSE_LOSS.operands[:2],
        weight_shape=None,
        denominators={"batchmean": lambda operands, *_: float(len(operands[0]))},
        definition=definition,
    )
    x, t = (torch.randn(4, 5, requires_grad=True) for _ in range(2))
    ours = lambda x, t: call(op, (x, t, "batchmean"))  # noqa: E731
    assert_matches_torch(ours, definition, x, t)
    assert torch.autograd.gradgradcheck(ours, (x.double(), t.double()))
    assert kernel_calls["mse_loss"]
    with pytest.raises(ValueError, match="expected 'none', 'batchmean' or 'sum', got 'mean'"):
        call(op, (x, t, "mean"))
    close(call(op, (x.to("meta"), t.to("meta"), "batchmean")), x.sum().to("meta"))
