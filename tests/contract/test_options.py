"""Options that torch lacks, compared with closed forms in float64, and with finite differences.

`catalogue.call_of_rows` draws the calls. Each runs as a small one, by the kernels and by the
definition, and its backward pass runs twice. With ``HYPOTHESIS_PROFILE=search``, 1,500 calls of
each function are drawn.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import interpreter
import pytest
import torch
from catalogue import EXAMPLES, OF_ROWS, SHAPE, Call, Example, call_of_rows, ours, reference
from check_calls import check_call, of_reference, run
from compare import FLOATS, HALF, assert_accurate, defined_by_torch, flattened, largest, outcome
from conftest import KernelCalls, fused_always, fused_by_size
from grid import grid
from samples import OPTIONS, declared
from torch import Tensor

from pyfused import functional as fused
from pyfused.dispatch.operator import Operator
from pyfused.ops.operators import CROSS_ENTROPY, LINEAR_CROSS_ENTROPY, NLL_LOSS, OPERATORS

INF, NAN = math.inf, math.nan
SEARCHES = os.environ.get("HYPOTHESIS_PROFILE") == "search"
CALLS = 1500 if SEARCHES else 3 if interpreter.ON else 40


class Logits:
    """Logits in float64, softcapped and scaled, and the softmax of each row."""

    def __init__(self, z: Tensor, given: dict[str, Any], cap: str = "softcap") -> None:
        cap, scale = given.get(cap), given.get("scale", 1.0) / given.get("temperature", 1.0)
        bounded = z if cap is None else (z / cap).tanh()
        self.slope = scale * (torch.ones_like(z) if cap is None else 1 - bounded**2)
        self.x = scale * (bounded if cap is None else cap * bounded)
        self.lse = self.x.where(self.x < INF, NAN).logsumexp(1)
        self.log_p = self.x.log_softmax(1)  # the log-sum-exp may have rounded large logits
        self.p = self.log_p.exp()

    def at(self, target: Tensor) -> Tensor:
        return self.log_p.gather(1, target[:, None])[:, 0]


def product(p: Tensor, log: Tensor) -> Tensor:
    """Returns the product, 0 where the probability is 0."""
    return (p * log).where(p != 0, 0)


def one_hot(target: Tensor, classes: int) -> Tensor:
    return torch.nn.functional.one_hot(target, classes).double()


# ---- closed forms --------------------------------------------------------------------------------
# Each takes the logits and returns the results of rows, and a function from the gradients of the
# results to the gradient of the logits.

RowResults = tuple[list[Tensor], Callable[..., Tensor]]


def cross_entropy(z: Tensor, given: dict[str, Any]) -> RowResults:
    s, target, classes = Logits(z, given), given["target"], z.shape[1]
    weight = given.get("weight", torch.ones(classes)).double()
    smoothing = max(given.get("label_smoothing", 0.0), 0.0)
    if target.is_floating_point():
        counts = torch.ones(len(z), dtype=torch.bool)
        q = ((1 - smoothing) * target.double() + smoothing / classes) * weight
        total_weight = torch.ones(len(z)).double()
    else:
        counts = target != given.get("ignore_index", -100)
        target = target.where(counts, 0)
        q = ((1 - smoothing) * one_hot(target, classes) + smoothing / classes) * weight
        total_weight = weight[target]
    soft = given["target"].is_floating_point() or smoothing > 0
    loss = (q * -s.log_p).sum(1) if soft else -s.at(target) * weight[target]
    factor, gamma = torch.ones(len(z)).double(), given.get("gamma", 0.0)
    if gamma:
        nll = -s.at(target)
        miss = -torch.expm1(-nll)
        loss = weight[target] * product(miss**gamma, nll)
        steep = product((-nll).exp(), nll / miss).where(miss > 0, 1)
        factor = miss**gamma * (1 + gamma * steep)
    slope = factor[:, None] * (s.p * q.sum(1, keepdim=True) - q)
    z_loss = given.get("z_loss", 0.0)
    if z_loss:
        loss = loss + z_loss * s.lse**2
        slope = slope + 2 * z_loss * s.lse[:, None] * s.p
    of_row = given.get("token_weight", torch.ones(len(z))).double()
    counts = counts & (of_row != 0)
    total_weight = (total_weight * of_row).where(counts, 0)  # float64
    loss, slope = (loss * of_row).where(counts, 0), slope * of_row[:, None]
    return reduced(loss, slope * s.slope, counts, total_weight.sum(), given)


def reduced(loss: Tensor, slope: Tensor, counts: Tensor, total: Tensor, given: Any) -> RowResults:
    reduction, divisor = given.get("reduction", "mean"), 1.0
    if reduction == "mean":
        divisor = total if given.get("denominator") is None else float(given["denominator"])
    value = loss if reduction == "none" else loss.sum() / divisor

    def gradient(grad: Tensor) -> Tensor:
        each = (grad / divisor).expand(len(loss))
        return (each[:, None] * slope).where(counts[:, None], 0)

    return [value], gradient


def log_probs(z: Tensor, given: dict[str, Any]) -> RowResults:
    s, target = Logits(z, given), given["target"]
    counts = target != given.get("ignore_index", -100)
    target = target.where(counts, 0)
    log_p, entropy = s.at(target), -product(s.p, s.log_p).sum(1)
    results = [log_p, entropy, s.lse]
    if given["return_metrics"]:
        results += [(s.x.argmax(1) == target).double(), s.x.mean(1)]

    def gradient(*grads: Tensor) -> Tensor:
        of_log_p, of_entropy, of_lse, *_ = grads
        slope = of_log_p[:, None] * (one_hot(target, z.shape[1]) - s.p) + of_lse[:, None] * s.p
        slope = slope - of_entropy[:, None] * product(s.p, s.log_p + entropy[:, None])
        return (slope * s.slope).where(counts[:, None], 0)

    return [x.where(counts, 0) for x in results], gradient


def divergence(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Returns the divergence of p from q, and its derivative by the logarithms of p, times p."""
    p, q = log_p.exp(), log_q.exp()
    if beta == 0:
        return product(q, log_q - log_p).sum(1), -q
    if beta == 1:
        return product(p, log_p - log_q).sum(1), product(p, log_p - log_q + 1)
    log_m = (beta * q + (1 - beta) * p).log()
    value = beta * product(q, log_q - log_m) + (1 - beta) * product(p, log_p - log_m)
    return value.sum(1), (1 - beta) * product(p, log_p - log_m)


def kl_div(z: Tensor, given: dict[str, Any]) -> RowResults:
    s, teacher = Logits(z, given), Logits(given["teacher"], given, "teacher_softcap")
    loss, of_log_p = divergence(s.log_p, teacher.log_p, given.get("beta", 0.0))
    return of_teacher(s, loss, of_log_p, given)


def of_teacher(s: Logits, loss: Tensor, of_log_p: Tensor, given: dict[str, Any]) -> RowResults:
    slope = (of_log_p - s.p * of_log_p.sum(1, keepdim=True)) * s.slope
    of_row = given.get("token_weight", torch.ones(len(loss))).double()
    counts = of_row != 0
    loss = (loss * of_row).where(counts, 0)
    return reduced(loss, slope * of_row[:, None], counts, of_row.sum(), given)


def topk_kl_div(z: Tensor, given: dict[str, Any]) -> RowResults:
    s, indices, log_q = Logits(z, given), given["teacher_indices"], given["teacher_log_probs"]
    log_p, log_q = s.log_p.gather(1, indices), log_q.double()
    rest = s.p.scatter(1, indices, 0)
    p_rest = rest.sum(1, keepdim=True)
    buckets = given.get("remainder", "bucket") == "bucket" and indices.shape[1] < z.shape[1]
    if buckets:
        q_rest = (1 - log_q.exp().sum(1, keepdim=True)).clamp(min=0)
        log_p, log_q = torch.cat((log_p, p_rest.log()), 1), torch.cat((log_q, q_rest.log()), 1)
    loss, of_pair = divergence(log_p, log_q, given.get("beta", 0.0))
    of_log_p = torch.zeros_like(z)
    if buckets:
        of_log_p = (of_pair[:, -1:] * rest / p_rest).where(rest != 0, 0)
    of_log_p = of_log_p.scatter(1, indices, of_pair[:, : indices.shape[1]])
    return of_teacher(s, loss, of_log_p, given)


# ---- values and gradients ------------------------------------------------------------------------


FORMS: dict[str, Callable[..., RowResults]] = {
    "cross_entropy": cross_entropy,
    "linear_cross_entropy": cross_entropy,
    "log_probs": log_probs,
    "linear_log_probs": log_probs,
    "kl_div_with_logits": kl_div,
    "linear_kl_div": kl_div,
    "linear_topk_kl_div": topk_kl_div,
}
# The context of a call, and the function of a name.
WAYS: dict[str, tuple[Callable[[], Any], Callable[[str], Any]]] = {
    "small": (fused_by_size, partial(getattr, fused)),
    "by kernels": (fused_always, partial(getattr, fused)),
    "by definition": (contextlib.nullcontext, defined_by_torch),
}


def logits_of(input: Tensor, weight: Any = None, bias: Any = 0.0) -> Tensor:
    return input.double() if weight is None else input.double() @ weight.double().T + bias


def closed_form(call: Call) -> tuple[Tensor, list[Tensor], Callable[..., list[Tensor]]]:
    """Returns the scaled logits, the results, and a function that returns the gradients."""
    leaves = [x.detach().double() for x in call.leaves.values()]
    given = {name: x for name, x in call.given.items() if name not in call.leaves}
    teacher = [x for name, x in given.items() if name in TEACHERS]
    given |= {"teacher": logits_of(*teacher)} if teacher else {}
    z = logits_of(*leaves)
    results, gradient_of = FORMS[call.op.name](z, given)

    def gradients(grad_outputs: list[Tensor]) -> list[Tensor]:
        of_logits = gradient_of(*[x.double() for x in grad_outputs])
        if not call.op.is_linear:
            return [of_logits]
        input = leaves[0].where((of_logits != 0).any(1, keepdim=True), 0)
        return [of_logits @ leaves[1], of_logits.T @ input, of_logits.sum(0)]

    return Logits(z, given).x, results, gradients


def computed(call: Call, way: str, grad_outputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the results, and the gradients of two backward passes."""
    arguments = dict(call.given)
    if len(next(iter(call.leaves.values()))) == 1 and call.seed % 2:  # without a dimension of rows
        of_rows = *OF_ROWS, call.op.operands[0].name
        arguments = {name: x[0] if name in of_rows else x for name, x in arguments.items()}
    context, function_of = WAYS[way]
    with context():
        found = flattened(function_of(call.op.name)(**arguments))
        pairs = zip(found, grad_outputs, strict=True)
        pairs = [(x, grad.to(x.dtype).view_as(x)) for x, grad in pairs if x.requires_grad]
        graph = [x for x, _ in pairs], [*call.leaves.values()], [grad for _, grad in pairs]
        first = torch.autograd.grad(*graph, retain_graph=True)
        return found, [*first, *torch.autograd.grad(*graph)]


def compare_with_closed_form(call: Call, way: str, rounded: bool = True) -> None:
    """Compares results and gradients.

    Rounding the logits of a row changes their differences by a part of the largest one. This
    is the absolute error of a logarithm, and the relative error of a probability. The logits
    themselves are rounded, too, unless `rounded` is False.
    """
    dtype = next(iter(call.leaves.values())).dtype
    in_float32 = dtype in HALF and way == "by kernels" and not call.op.is_linear
    eps = torch.finfo(torch.float32 if in_float32 else dtype).eps
    roundings = 32 if dtype is torch.float64 else 4  # no wider dtype for sums
    x, results, gradients_of = closed_form(call)
    finite = x.where(x.isfinite(), -INF).amax(1), x.where(x.isfinite(), INF).amin(1)
    size, width = largest(x) if rounded else 0, largest(finite[0] - finite[1])
    grad_outputs = [torch.randn(y.shape).to(dtype) for y in results]
    found, gradients = computed(call, way, grad_outputs)
    defined = flattened(defined_by_torch(call.op.name)(**call.given))
    assert [x.dtype for x in found] == [x.dtype for x in defined]
    for got, best in zip(found, results, strict=True):
        got = got if got.is_floating_point() else got.double()
        error = roundings * eps * (size + width + largest(best))
        assert_accurate(got.reshape(best.shape), best, error, roundings, result=f"{call}: result")
    exact = gradients_of(grad_outputs)
    for got, best in zip(gradients, exact * 2, strict=True):
        is_free = ~best.to(got.dtype).isfinite() & (~got.isfinite() | (got == 0))
        error = roundings * eps * (1 + size + min(width, 100)) * (1 + largest(best))
        best = best.where(~is_free, got.double())
        assert_accurate(got, best, error, roundings, result=f"{call}: gradient")


TEACHERS = "teacher_logits", "teacher_input", "teacher_linear_weight"


@pytest.mark.interpreted
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", range(CALLS))
@pytest.mark.parametrize("name", FORMS)
def test_values_and_gradients(name: str, seed: int, way: str) -> None:
    compare_with_closed_form(call_of_rows(OPERATORS[name], seed), way)


@pytest.mark.interpreted
@pytest.mark.parametrize("seed", range(CALLS // 3))
@pytest.mark.parametrize("name", [*FORMS][:4])
@pytest.mark.parametrize("shift", [1e4, 1e6, -1e8, 1e12, -1e16, 1e30, 3e38, -3e38])
def test_logits_far_from_zero(name: str, shift: float, seed: int) -> None:
    """torch's logsumexp and mean are less exact."""
    compare_with_closed_form(call_of_rows(OPERATORS[name], seed, shift), "by kernels", False)


# ---- options that are tensors --------------------------------------------------------------------


LEARNED = {
    *("beta", "denominator", "gamma", "margin", "scale", "softcap", "teacher_softcap"),
    *("temperature", "token_weight", "z_loss"),
}


def learned_options() -> Iterator[tuple[str, str, float]]:
    """Yields functions, options and values.

    A default, such as a temperature of 1, must not select a path without gradient.
    """
    for name in (*FORMS, "additive_margin"):
        for option, parameter in inspect.signature(getattr(fused, name)).parameters.items():
            if option in LEARNED:
                numbers = [x for x in OPTIONS.get(option, [0.7])[:3] if isinstance(x, float)]
                yield name, option, numbers[-1]
                if isinstance(parameter.default, float) and option not in ("beta", "margin"):
                    yield name, option, parameter.default


@pytest.mark.parametrize(("name", "option", "value"), [*learned_options()])
def test_options_that_are_tensors(
    name: str, option: str, value: float, kernel_calls: KernelCalls
) -> None:
    """Compares the gradient with a one-sided difference, as some options must not be negative."""
    of_margin = name == "additive_margin"
    call = EXAMPLES["cross_entropy" if of_margin else name].call(torch.float64)
    given = {name: x.detach() for name, x in call.tensors.items()}
    if of_margin:
        given["input"].tanh_()

    def loss(x: Tensor | float) -> Tensor:
        result = flattened(getattr(fused, name)(**given | {option: x}))[0]
        return (result * torch.linspace(1, 2, result.numel()).double().view_as(result)).sum()

    shape, step = SHAPE[:1] if option == "token_weight" else (), 1e-6
    x = torch.full(shape, value, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(x), x)
    kernel_calls.clear()
    losses = [loss(x.detach() + k * step) for k in range(3)]
    assert bool(kernel_calls) == (option in ("token_weight", "denominator"))
    slope = (4 * losses[1] - 3 * losses[0] - losses[2]) / (2 * step)
    torch.testing.assert_close(gradient.sum(), slope, rtol=1e-6, atol=1e-6)
    assert gradient.any()
    if not shape:
        torch.testing.assert_close(losses[0], loss(value))


# ---- weights of rows and of elements -------------------------------------------------------------


ROUNDED_DTYPES = *HALF, torch.bool, torch.uint8  # their sums are rounded, or overflow


def weights() -> Iterator[Any]:
    for op in OPERATORS.values():
        for name in sorted({"token_weight", "weight"} & declared(op).keys()):
            of_classes = name == "weight" and any(o.indices for o in op.operands)
            converts = next(o for o in op.all_operands if o.name == name).converts
            dtypes = ROUNDED_DTYPES if converts else HALF  # others are torch's
            for dtype in [torch.float32] if of_classes else dtypes:  # that of the logits
                yield pytest.param(op, name, dtype, False, id=f"{op.name}-{name}-{dtype}")
        if op.factors and any(o.indices and o.differentiated for o in op.operands):
            for dtype in ROUNDED_DTYPES:
                yield pytest.param(op, "token_weight", dtype, True, id=f"{op.name}-soft-{dtype}")


@pytest.mark.cpu  # large for the interpreter
@pytest.mark.parametrize(("op", "name", "dtype", "soft"), [*weights()])
def test_means_of_many_rows(op: Operator, name: str, dtype: torch.dtype, soft: bool) -> None:
    """The mean divides by a sum of 70,000 weights, which is infinite or rounded in half precision.

    Half of the weights of rows are 0, others are 1.
    """
    call = Example(op, "", {"reduction": "mean"}, (name,), soft).call(torch.float32, (70_000, 3))
    weight = call.given[name]
    call.given[name] = (torch.arange(weight.numel()).view(weight.shape) % 2).to(dtype)
    exact = of_reference(call, torch.float64)
    functions = [ours, reference] if name == "token_weight" else [ours]  # torch lacks token_weight
    for function in functions:
        for got, best in zip(run(call, function), exact, strict=True):
            assert_accurate(got, best, 1e-5 * largest(best))


@pytest.mark.cpu
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_rows_of_weight_0_may_be_nan_if_metrics_are_computed(
    softcap: float | None, reduction: str
) -> None:
    """Metrics read all rows, but the loss of a row of weight 0 is 0."""
    logits, weight = torch.randn(5, 7), torch.tensor([0.0, 1, 0, 1, 1])
    logits[0] = math.nan
    target, given = torch.arange(5), {"softcap": softcap, "reduction": reduction}
    loss, _ = fused.cross_entropy_with_metrics(logits, target, token_weight=weight, **given)
    expected = fused.cross_entropy(logits.nan_to_num(), target, token_weight=weight, **given)
    torch.testing.assert_close(loss, expected)


# ---- dtypes of class weights ---------------------------------------------------------------------


every_size = pytest.mark.parametrize(
    "size", [(60, 30), pytest.param((6, 20), marks=pytest.mark.thresholds, id="small")]
)
HEAD_AND_LOSS = CROSS_ENTROPY, LINEAR_CROSS_ENTROPY
TARGETS = [
    *itertools.product(HEAD_AND_LOSS, FLOATS),
    *itertools.product((*HEAD_AND_LOSS, NLL_LOSS), [torch.int64]),
]


@pytest.mark.cpu
@every_size
@grid(
    case=TARGETS,
    dtypes=[*itertools.product(FLOATS, [*FLOATS, None])],
    autocast=[False, True, True, False],
)
def test_dtypes_of_class_weights(case: Any, dtypes: Any, autocast: bool, size: Any) -> None:
    (op, of_target), (dtype, of_weight) = case, dtypes
    soft, optional = of_target is not torch.int64, ("weight",) if of_weight else ()
    call = Example(op, "", {}, optional, soft).call(dtype, size)
    for name, kind in (("target", of_target), ("weight", of_weight)):
        if kind is not None:
            x = call.given[name]
            call.given[name] = x.detach().to(kind).requires_grad_(x.requires_grad)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        check_call(call)


@pytest.mark.cpu
@every_size
@grid(op=HEAD_AND_LOSS, dtypes=[*itertools.product(FLOATS, repeat=3)])
def test_class_weights_are_at_most_as_wide_as_the_loss(
    op: Operator, dtypes: Any, size: Any
) -> None:
    dtype, of_weight, loss_dtype = dtypes
    call = Example(op, "", {"loss_dtype": loss_dtype}, ("weight",)).call(dtype, size)
    call.given["weight"] = call.given["weight"].to(of_weight)
    is_between = torch.promote_types(dtype, of_weight) is of_weight
    is_between &= torch.promote_types(of_weight, loss_dtype) is loss_dtype
    loss = outcome(call.ours)
    if dtype is of_weight or is_between:
        assert loss.dtype is loss_dtype
    else:
        assert isinstance(loss, RuntimeError)
    check_call(call)
