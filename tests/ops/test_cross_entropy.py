"""cross_entropy: NaN and infinities as in torch, options that torch lacks, and metrics."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from catalogue import Call, Example
from check_calls import check_valid_call
from compare import FLOATS, HALF, assert_matches_torch, evaluate, exactly, torch_function
from conftest import ISAS, KernelCalls, backend
from grid import grid
from samples import SAME_VALUES, target_indices, target_probabilities

from pyfused import functional as fused
from pyfused.backends import cpu
from pyfused.functional import cross_entropy, log_probs
from pyfused.ops.operators import CROSS_ENTROPY

INF, NAN = float("inf"), float("nan")
KINDS = ["index", "probabilities"]
REDUCTIONS = ["none", "mean", "sum"]
SHAPES = [(5,), (6, 5), (3, 5, 4), (2, 5, 3, 4), (2, 3, 2, 1, 5)]
assert_matches = partial(assert_matches_torch, cross_entropy, F.cross_entropy)
close = torch.testing.assert_close


def problem(shape: tuple[int, ...], kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """Draws logits that require grad, and a target of the given kind."""
    logits = torch.randn(shape, dtype=dtype) * 4
    if kind == "probabilities":
        return logits.requires_grad_(), target_probabilities(shape, dtype)
    return logits.requires_grad_(), target_indices(shape, ignored=False)


@pytest.mark.parametrize("factor", [INF, NAN])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ignored_rows_get_no_gradient(reduction: str, dtype: torch.dtype, factor: float) -> None:
    """grad_output scales the gradients of the forward pass, but 0 times NaN is NaN."""
    logits, target = problem((6, 5), "index", dtype)
    target[::2] = -100
    loss = cross_entropy(logits, target, reduction=reduction)
    for _ in range(2):
        (grad,) = torch.autograd.grad((factor * loss).sum(), logits, retain_graph=True)
        assert torch.equal(grad[::2], torch.zeros(3, 5, dtype=dtype))
        assert not grad[1::2].isfinite().any()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_mean_of_targets_whose_classes_have_weight_zero(smoothing: float) -> None:
    logits, target = problem((6, 5), "index")
    weight = torch.ones(5).index_fill(0, target, 0)
    assert_matches(logits, target, weight=weight, label_smoothing=smoothing)
    options: Any = {"weight": weight, "label_smoothing": 0.1}
    assert fused.linear_cross_entropy(logits, torch.eye(5), target, **options).isnan()


@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize("smoothing", [0.5, 1.0])
def test_smoothed_probabilities_of_huge_logits(smoothing: float, shape: tuple[int, ...]) -> None:
    """The sum of all log-probabilities overflows, but not their mean."""
    logits = torch.zeros(shape)
    logits[:, ::2] = -1e38
    target = target_probabilities(shape)
    assert_matches(logits.requires_grad_(), target, label_smoothing=smoothing, reduction="none")
    assert cross_entropy(logits, target, label_smoothing=smoothing).isfinite()


@pytest.mark.interpreted
@grid(classes=[40, 300, 1100], dtype=FLOATS)
def test_losses_of_confident_rows_are_not_negative(classes: int, dtype: torch.dtype) -> None:
    """Their true losses are below 1e-15, so a rounding error decides about the sign."""
    target = torch.randint(classes, (8,))
    logits = torch.randn(8, classes).scatter_(1, target[:, None], 50 + torch.rand(8, 1)).to(dtype)
    soft_target = torch.softmax(logits + torch.rand(8, classes).to(dtype), 1)
    inputs = [logits, logits.float().view(2, 4, classes).movedim(-1, 1).contiguous()]
    losses = [cross_entropy(x, target.view(x[:, 0].shape), reduction="none") for x in inputs]
    losses += [cross_entropy(logits, soft_target, reduction="none"), -fused.log_softmax(logits, 1)]
    found = log_probs(logits, target, return_entropy=True)
    head = torch.eye(classes).to(dtype)
    of_head = fused.linear_log_probs(logits, head, target, return_entropy=True)
    losses += [-found[0], found.entropy, -of_head[0], of_head.entropy]
    assert min(loss.min() for loss in losses) >= 0


@pytest.mark.interpreted
@pytest.mark.parametrize("low", [-1e4, -3e38])
def test_entropy_of_a_row_whose_maximum_comes_last(low: float) -> None:
    """Of the classes before it, the sum of the differences to the maximum overflows."""
    logits = torch.full((1, 4200), low)
    logits[:, -1] = 3e38
    logits.requires_grad_()
    found = log_probs(logits, torch.zeros(1, dtype=torch.int64), return_entropy=True)
    (gradient,) = torch.autograd.grad(found.entropy.sum(), logits)
    assert not found.entropy.any()
    assert not gradient.any()


SPECIAL_ROWS = {
    "one_minus_infinity": [-INF, 0.5, 1.0, -2.0, 3.0],
    "only_one_finite": [-INF, 0.5, -INF, -INF, -INF],
    "all_minus_infinity": [-INF] * 5,
    "one_infinity": [0.5, INF, 1.0, -2.0, 3.0],
    "two_infinities": [INF, INF, 1.0, -2.0, 3.0],
    "both_infinities": [INF, -INF, 1.0, -2.0, 3.0],
    "one_nan": [0.5, NAN, 1.0, -2.0, 3.0],
    "nan_and_infinities": [INF, NAN, -INF, -2.0, 3.0],
    "all_nan": [NAN] * 5,
    "largest": [3e38, -3e38, 0.0, 1.0, 3e38],
    "equal": [7.0] * 5,
    "ties": [3.0, 50.0, 1.0, 50.0, -2.0],
    "certain": [0.5, 1.0, 1e4, -2.0, 3.0],
}


@pytest.mark.interpreted
@grid(row=SPECIAL_ROWS, dtype=FLOATS, reduction=REDUCTIONS)
@pytest.mark.parametrize("padding", [0, 3, 12, 60, 300])  # about a vector, and folded
@pytest.mark.parametrize("classes_last", [True, False])
def test_special_values(
    row: str, dtype: Any, reduction: str, padding: int, classes_last: bool
) -> None:
    logits = torch.zeros(5, padding + 5)
    logits[:, padding:] = torch.tensor(SPECIAL_ROWS[row])
    logits, target = logits.to(dtype), torch.arange(5) + padding
    if not classes_last:
        logits, target = logits.T[None].contiguous(), target[None]
    assert_matches(logits.requires_grad_(), target, reduction=reduction)


@pytest.mark.interpreted
@grid(row=SPECIAL_ROWS, reduction=REDUCTIONS, smoothing=[0.0, 0.1], kind=KINDS * 2)
@pytest.mark.parametrize("weight", [None, torch.tensor([0.5, 0.0, 2.0, 1.0, 3.0])], ids=str)
def test_special_values_with_options(
    row: str, smoothing: float, kind: str, reduction: str, weight: Any
) -> None:
    logits = torch.tensor([SPECIAL_ROWS[row]] * 5).requires_grad_()
    target = torch.eye(5) if kind == "probabilities" else torch.arange(5)
    assert_matches(logits, target, weight, reduction=reduction, label_smoothing=smoothing)


@pytest.mark.cpu
@grid(
    shape=[(1, 2500, 2), (2, 301, 3), (1, 3001, 5), (1, 1100, 16), (1, 700, 44), (3, 40, 50)],
    dtype=FLOATS,
    layout=SAME_VALUES,
    soft=[False, True],
    isa=ISAS,
)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("moved", ["input", "target"])
def test_few_positions_beside_many_classes(
    shape: Any, dtype: Any, layout: str, soft: bool, isa: str, reduction: str, moved: str
) -> None:
    """Several classes of a position share a vector, whichever the layout of each tensor is."""
    weight = () if reduction == "none" else ("weight",)
    options = {"reduction": reduction, "label_smoothing": 0.0 if reduction == "sum" else 0.1}
    call = Example(CROSS_ENTROPY, "", options, weight, soft).call(dtype, shape)
    call.given["input"].data[0, 5:7, -1] = -1e4  # masked
    x = call.given[moved]
    call.given[moved] = SAME_VALUES[layout](x.detach()).requires_grad_(x.requires_grad)
    check_valid_call(call)


JUMPS = [5, 7, 10, 50, 87, 88, 89, 100, 130, 200, 300, 700, 750, 1500, 1e4, 1e9, 1e10, 1e30, 3e38]


@pytest.mark.cpu
@grid(isa=ISAS, dtype=[torch.float32, torch.float64], smoothing=[0.0, 0.0, 0.1, 0.1])
@pytest.mark.parametrize("first", [0, 2000])  # far from the largest, and near it
def test_a_much_larger_logit_late_in_a_row(
    smoothing: float, dtype: torch.dtype, isa: str, first: int
) -> None:
    """The difference to earlier logits may overflow the exponent."""
    jumps = [jump for jump in JUMPS if jump < 1e9 or not smoothing]  # 1e9 is rounded too much
    logits = torch.randn(len(jumps), 3000, dtype=dtype)
    logits[:, 2000:2500] += torch.tensor(jumps, dtype=dtype)[:, None]
    target = torch.randint(first, first + 500, (len(jumps),))
    assert_matches(logits.requires_grad_(), target, reduction="none", label_smoothing=smoothing)


@pytest.mark.cpu
@pytest.mark.parametrize("classes", [5000, 5008], ids="C{}".format)
def test_a_large_gradient_in_new_and_in_recycled_memory(classes: int) -> None:
    """Non-temporal stores are used if the pages are mapped and rows start at a cache line."""
    logits = torch.randn(840, classes, requires_grad=True)
    target = torch.randint(classes, (840,))
    expected = evaluate(F.cross_entropy, logits, target, convert=exactly)
    for _ in range(3):
        got = evaluate(cross_entropy, logits, target)
        gradient = got.gradients[0].double()
        close(gradient, expected.gradients[0], rtol=1e-5, atol=0)


@grid(value=[NAN, INF, -INF, 0.0, -1.0, 5.0], reduction=REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("unusual", ["probability", "weight of index", "weight of probabilities"])
def test_unusual_probabilities_and_weights(
    value: float, reduction: str, smoothing: float, unusual: str
) -> None:
    logits, target = problem((4, 5), "index" if "index" in unusual else "probabilities")
    weight = torch.ones(5)
    if unusual == "probability":
        target[1, 2] = value
        target.requires_grad_()
    else:
        weight[2] = value
    assert_matches(logits, target, weight, reduction=reduction, label_smoothing=smoothing)


@grid(path=["kernels", "torch"], name=["cross_entropy", "linear_cross_entropy", "linear_log_probs"])
def test_classes_in_uint8_are_not_ignored(name: str, path: str) -> None:
    """In uint8, -100 is 156, which is a class."""
    index, options = torch.arange(150, 160), dict[str, Any](temperature=2.0)
    if path == "torch":  # torch's operators compute the call
        options["temperature"] = torch.tensor(2.0, requires_grad=True)
    args = torch.randn(10, 256), torch.randn(256, 256)
    args = args if name.startswith("linear") else args[:1]
    found = [getattr(fused, name)(*args, x, **options) for x in (index, index.to(torch.uint8))]
    torch.testing.assert_close(found[1], found[0])


# ---- options that torch lacks --------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.5, 1.0, torch.tensor(2.0, requires_grad=True)], ids=str)
def test_focal_loss_of_a_certain_row(gamma: Any) -> None:
    """The probability is 1, where factors of the derivative are infinite."""
    x = torch.tensor([[200.0, 0.0]], requires_grad=True)
    loss = fused.cross_entropy(x, torch.tensor([0]), gamma=gamma)
    assert (loss, *torch.autograd.grad(loss, x)[0][0]) == (0, 0, 0)


@grid(
    shape=[(6, 5), (6, 300), (6, 5000), (2, 150, 3)],
    dtype=HALF,
    probabilities=[False, False, True, True],
    isa=ISAS,
)
@pytest.mark.parametrize("metrics", [{}, {"with_metrics": True}])
def test_scaled_logits_are_unrounded(
    shape: Any, dtype: Any, probabilities: bool, isa: str, metrics: dict[str, Any]
) -> None:
    """Scaled logits are float32 for any input dtype; so is the loss if loss_dtype is float32."""
    options: dict[str, Any] = {"scale": 30.0, "reduction": "none", "loss_dtype": torch.float32}
    call = Example(CROSS_ENTROPY, "", options | metrics, (), probabilities).call(dtype, shape)
    check_valid_call(call)


@pytest.mark.cpu
@pytest.mark.thresholds
def test_the_size_of_a_head_is_its_number_of_logits(kernel_calls: KernelCalls) -> None:
    x, target = torch.randn(8, 4), torch.arange(8)
    for classes in (10, 70_000):
        assert not kernel_calls
        fused.linear_cross_entropy(x, torch.randn(classes, 4), target)
    assert kernel_calls


@pytest.mark.thresholds
@pytest.mark.parametrize("rows", [4, 8000])  # computed by torch and by a kernel
def test_an_ignored_row_with_an_infinite_factor(rows: int) -> None:
    x, target, factor = torch.randn(rows, 5), torch.arange(rows) % 5, torch.ones(rows)
    target[1], factor[1] = -100, torch.inf
    loss = fused.cross_entropy(x, target, token_weight=factor, denominator=3.0)
    close(loss, F.cross_entropy(x, target, reduction="sum") / 3)


@pytest.mark.interpreted
@pytest.mark.parametrize("denominator", [3.5, 2.0**63, 2.0**64, 1e30])
def test_denominators_of_any_size(denominator: float) -> None:
    """A whole number may exceed 64 bits."""
    x, target = torch.randn(6, 5), torch.arange(6) % 5
    loss = fused.cross_entropy(x, target, denominator=denominator)
    exact = F.cross_entropy(x.double(), target, reduction="sum") / denominator
    close(loss.double(), exact, rtol=1e-5, atol=0)


# ---- metrics -------------------------------------------------------------------------------------

MANY = 40_000 if backend is cpu else 2_000  # more classes than a tile, in several programs


# Differences of the largest numbers overflow, after which Triton's kernel has no entropy.
OF_METRICS = [name for name in SPECIAL_ROWS if backend is cpu or name != "largest"]


@pytest.mark.interpreted
@grid(name=OF_METRICS, classes=[6, 91, 400, 3000, MANY], isa=ISAS)
def test_special_logits(name: str, classes: int, isa: str, kernel_calls: KernelCalls) -> None:
    """Metrics follow torch's argmax and logsumexp: the first of ties, and NaN above all numbers."""
    input = torch.full((2, classes), -INF if name == "all_minus_infinity" else -3.0)
    input[0], input[1, -5:] = -3.0, torch.tensor(SPECIAL_ROWS[name])
    target = torch.tensor([0, classes - 3])
    _, metrics = fused.cross_entropy_with_metrics(input, target, z_loss=0.125)
    assert kernel_calls["cross_entropy"] == 1
    exact = input.double()
    lse, log_p = exact.logsumexp(1).float(), exact.log_softmax(1)
    entropy = torch.special.entr(log_p.exp()).sum(1).float()
    assert metrics.prediction.equal(input.argmax(1))
    assert metrics.correct.equal(input.argmax(1) == target)
    if not input.isposinf().any():  # else it is NaN, like the loss
        close(metrics.log_sum_exp, lse, equal_nan=True)
    found = metrics.log_probability, metrics.entropy
    close(found, (log_p[[0, 1], target].float(), entropy), equal_nan=True)


@pytest.mark.parametrize("small", [False, pytest.param(True, marks=pytest.mark.thresholds)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_metrics_of_ignored_rows(dtype: torch.dtype, small: bool) -> None:
    input, target = torch.randn(6, 5).to(dtype), torch.tensor([0, 1, 2, -100, 4, 0])
    input[3, 0] = 5.0  # the prediction is the class that stands for an ignored target
    found = fused.cross_entropy_with_metrics(input, target, temperature=0.7)[1]
    assert [x[3].item() for x in found] == [0, 0, -100, False, 0]
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    assert [x.dtype for x in found if x.is_floating_point()] == [wide] * 3
    assert not any(x.requires_grad for x in found)
    exact = fused.cross_entropy_with_metrics(input.double(), target, temperature=0.7)[1]
    by_definition = torch_function(CROSS_ENTROPY, "cross_entropy_with_metrics")
    for metrics in (found, by_definition(input, target, temperature=0.7)[1]):
        for x, y in zip(metrics, exact, strict=True):  # scaled logits are not rounded
            close(x, y.to(x.dtype), rtol=3e-6, atol=3e-6)


METRICS_LAYOUTS: dict[str, Callable[[], torch.Tensor]] = {
    "few classes": lambda: torch.randn(203, 10),
    "short rows": lambda: torch.randn(203, 67),
    "short sliced rows": lambda: torch.randn(203, 256)[:, 3:115],
    "columns": lambda: torch.randn(10, 203).t(),
    "images": lambda: torch.randn(3, 50, 7, 9),
    "few positions": lambda: torch.randn(1, 701, 2),
    "one position": lambda: torch.randn(2000, 1).t()[:, :1001],
    "sliced rows": lambda: torch.randn(9, 800)[:, ::2],
}


@pytest.mark.interpreted
@grid(name=METRICS_LAYOUTS, dtype=FLOATS, isa=ISAS)
def test_metrics_of_layouts(name: str, dtype: torch.dtype, isa: str) -> None:
    """One kernel computes the loss and the metrics; of ties, the first class counts."""
    input = METRICS_LAYOUTS[name]().mul(4).round().div(4).to(dtype)  # with ties
    target = torch.randint(-1, input.shape[1], input.select(1, 0).shape)
    if target.numel() > 1:  # NaN of a row that is ignored
        target.view(-1)[0] = -1
        input[(0, slice(None), *[0] * (input.dim() - 2))] = torch.nan
    given = {"input": input, "target": target, "ignore_index": -1, "with_metrics": True}
    check_valid_call(Call(CROSS_ENTROPY, given))
