"""Options that torch lacks, compared with closed forms in float64.

Rows are drawn with masked classes, a certain class, an infinite logit, a target that is ignored, or
a weight of 0; logits, teachers and probabilities of rows that do not count may be NaN. Weights,
masks and divisors have any dtype, operands any strides, and heads any memory budget. Each call runs
as a small one, by the kernels and by the definition, and its backward pass runs twice. With
``HYPOTHESIS_PROFILE=search``, 1,500 calls of each function are drawn.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

import interpreter
import pytest
import torch
from compare import FLOATS
from conftest import fused_always, fused_by_size
from layouts import SAME_VALUES
from torch import Tensor
from torch_reference import defined_by_torch

from pyfused import functional as fused

INF, NAN = math.inf, math.nan
SEARCHES = os.environ.get("HYPOTHESIS_PROFILE") == "search"
CALLS = 1500 if SEARCHES else 3 if interpreter.ON else 40
CLASSES = (2, 5, 19) if interpreter.ON else (2, 5, 19, 91, 300, 1100)
ROWS = (0, 1, 2, 5) if interpreter.ON else (0, 1, 2, 5, 5, 37, 130)


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

    @property
    def entropy(self) -> Tensor:
        return -product(self.p, self.log_p).sum(1)


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
    log_p, entropy = s.at(target), s.entropy
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
    s, teacher = Logits(z, given), Logits(given["teacher"].double(), given, "teacher_softcap")
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


# ---- calls ---------------------------------------------------------------------------------------


def draw_logits(rng: Random, rows: int, classes: int) -> Tensor:
    z = 3 * torch.randn(rows, classes)
    for row in z:
        kind, at = rng.choice(["usual", "masked", "certain", "infinite", "empty"]), rng.random()
        if kind == "masked":
            row[torch.rand(classes) < at] = -INF
        elif kind == "certain":
            row[int(at * classes)] += rng.choice([20.0, 60.0, 150.0])
        elif at < 0.3 and kind == "infinite":
            row[int(at * classes)] = INF
        elif at < 0.3 and kind == "empty":
            row[:] = -INF
    return z


def draw_numbers(rng: Random, **values: list[Any]) -> dict[str, Any]:
    """Draws some of the numbers; a few are tensors of another dtype."""
    found = {name: rng.choice(x) for name, x in values.items() if rng.random() < 0.4}
    for name, x in found.items():
        if rng.random() < 0.2:
            found[name] = torch.tensor(x, dtype=torch.float64)
    return found


def draw_options(rng: Random, name: str, rows: int, classes: int) -> dict[str, Any]:
    of_logits = name.removeprefix("linear_")
    given = draw_numbers(rng, softcap=[2.0, 30.0], temperature=[0.5, 2.0])
    given.setdefault("temperature", 1.0 if name in ("log_probs", "linear_log_probs") else 1.5)
    if "log_probs" not in name:
        given["reduction"] = rng.choice(["none", "mean", "sum"])
        if given["reduction"] == "mean" and rng.random() < 0.3:
            shape, dtype = rng.choice([(), (1,)]), rng.choice(FACTOR_DTYPES)
            given["denominator"] = rng.choice([2.5, torch.full(shape, 2.5).to(dtype)])
        if rng.random() < 0.5:
            weight = (torch.rand(rows) - rng.choice([0.3, 0.3, 0.3, 1.0])).clamp(min=0)
            dtype = rng.choice(FACTOR_DTYPES)
            given["token_weight"] = (weight if dtype.is_floating_point else weight > 0).to(dtype)
    if name.startswith("linear"):
        row = classes * 8
        given["memory_budget"] = rng.choice([None, None, 1, row, 3 * row, rows * row // 2 + 1])
    if of_logits == "log_probs":
        given |= {"return_entropy": True, "return_lse": True}
        given["return_metrics"] = "softcap" not in given  # rounded, capped logits may tie
    if of_logits in ("cross_entropy", "log_probs"):
        given["ignore_index"] = rng.choice([-100, 0])
        given["target"] = torch.randint(classes, (rows,))
        given["target"][torch.rand(rows) < 0.2] = given["ignore_index"]
    if of_logits == "cross_entropy":
        given |= draw_numbers(rng, z_loss=[0.1], scale=[0.5, 3.0])
        kind = rng.choice(["plain", "focal", "smooth", "soft"])
        if kind == "focal" and name == "cross_entropy":
            given |= {"gamma": 2.0} | draw_numbers(rng, gamma=[0.5, 1.0, 1.5])
            given["label_smoothing"] = rng.choice([0.0, -0.5])
        elif kind != "plain":
            given["label_smoothing"] = rng.choice([0.1, 0.9, -0.5])
        if kind == "soft":
            given |= {"target": torch.rand(rows, classes).softmax(1), "ignore_index": -100}
        if rng.random() < 0.3:
            given["weight"] = torch.rand(classes) + 0.1
    if of_logits == "cross_entropy" and rng.random() < 0.1:
        given["loss_dtype"] = rng.choice([torch.float32, torch.float64])
    if "kl_div" in name:
        given |= {"beta": rng.choice([0.0, 0.5, 1.0])}
        if "topk" not in name:
            given |= draw_numbers(rng, teacher_softcap=[2.0])
        elif given["beta"] == 0 and rng.random() < 0.3:
            given["remainder"] = "ignore"
    return given


def counted(given: dict[str, Any], rows: int) -> Tensor:
    """Returns whether the logits of each row count."""
    counts = given.get("token_weight", torch.ones(rows)) != 0
    target = given.get("target")
    if target is None or target.is_floating_point():
        return counts
    return counts & (target != given["ignore_index"])


FACTOR_DTYPES = *FLOATS, torch.bool, torch.uint8, torch.int32, torch.int64

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
OF_ROWS = "target", "token_weight", "teacher_logits", "teacher_input"
OF_ROWS += "teacher_indices", "teacher_log_probs"


def check(name: str, seed: int, shift: float = 0.0) -> None:
    """Compares a call.

    Args:
        shift: Logits are this number plus a few steps that their dtype can represent.
    """
    rng, is_linear = Random(seed), name.startswith("linear")
    torch.manual_seed(seed)
    rows, classes, features = rng.choice(ROWS), rng.choice(CLASSES), 4
    rounds = is_linear and not shift  # logits in half precision
    dtype = rng.choice(FLOATS[:2] if rounds else [x for x in FLOATS if fits(shift, x)])
    given = draw_options(rng, name, rows, classes)
    if shift:  # products with other scales would be rounded
        given |= {"temperature": 2.0} | ({"scale": 0.5} if "scale" in given else {})
        if "gamma" not in given and "log_probs" not in name:
            given["label_smoothing"] = 0.1
        if is_linear:
            given["memory_budget"] = rng.choice([None, 1])
    if abs(shift) > 1e16:  # sums of squares overflow
        given.pop("z_loss", None)
    for option in ("weight", "target"):
        if option in given and given[option].is_floating_point():
            given[option] = given[option].to(dtype)
    z, teacher = (draw_logits(rng, rows, classes).to(dtype) for _ in range(2))
    if shift:
        steps = math.copysign(1, -shift) * (4 * z).round().abs().clamp(max=90)
        z = torch.tensor(shift).to(dtype) + step(shift, dtype) * steps.where(z > -INF, z)
        z = z.to(dtype)
    leaves, operands = {"logits": z}, dict[str, Tensor]()
    if is_linear:
        input, weight = torch.randn(rows, features).to(dtype), torch.randn(classes, features)
        input[torch.rand(rows) < 0.2] *= 10
        bias = torch.full((classes,), shift).double()
        if shift:
            input, weight = input.clamp(-2, 2).round(), weight.clamp(-3, 3).round()
            weight = weight.double() * step(shift, dtype)
        if not shift or rng.random() < 0.3:
            bias = bias.masked_fill(torch.rand(classes) < rng.random() / 2, -INF)
        leaves = {"input": input, "linear_weight": weight.to(dtype), "linear_bias": bias.to(dtype)}
    counts = counted(given, rows)
    next(iter(leaves.values()))[~counts] = rng.choice([NAN, 1.0])
    if "topk" in name:
        log_q = teacher.where(teacher < INF, 0).log_softmax(1).nan_to_num(nan=-INF, neginf=-INF)
        log_q, indices = log_q.topk(rng.randint(1, classes), 1)
        operands = {"teacher_indices": indices, "teacher_log_probs": log_q}
    elif name == "linear_kl_div":
        operands = {"teacher_input": torch.randn(rows, features).to(dtype)}
        operands["teacher_linear_weight"] = torch.randn(classes, features).to(dtype)
    elif "kl_div" in name:
        operands = {"teacher_logits": teacher}
    for operand in ("teacher_logits", "teacher_input", "teacher_log_probs", "target"):
        x = (operands | given).get(operand)
        if x is not None and x.is_floating_point():
            x[~counts] = rng.choice([NAN, 0.5])
    if name == "linear_kl_div":
        teacher = operands["teacher_input"].double() @ operands["teacher_linear_weight"].double().T
    wide = {leaf: x.double() for leaf, x in leaves.items()}
    if is_linear:
        z = wide["input"] @ wide["linear_weight"].T + wide["linear_bias"]
    results, gradient_of = FORMS[name](z.double(), given | operands | {"teacher": teacher})
    grad_results = [torch.randn(x.shape).to(dtype) for x in results]
    exact = [gradient_of(*[x.double() for x in grad_results])]
    layout = rng.choice([*SAME_VALUES.values()])
    if is_linear:
        input = wide["input"].where(counts[:, None], 0)
        exact = [exact[0] @ wide["linear_weight"], exact[0].T @ input, exact[0].sum(0)]
    dtypes, flat = set[Any](), rows == 1 and rng.random() < 0.5  # without a dimension of rows
    for way, (context, function_of) in WAYS.items():
        if shift and way != "by kernels":  # torch's logsumexp and mean are less exact
            continue
        copies = [layout(x.clone()).requires_grad_() for x in leaves.values()]
        named = dict(zip([*leaves][1:], copies[1:], strict=True)) | operands | given
        input = copies[0]
        if flat:
            input = input[0]
            named = {n: x[0] if n in OF_ROWS and n in named else x for n, x in named.items()}
        with context():
            found = function_of(name)(input, **named)
            found = [found] if isinstance(found, Tensor) else [x for x in found if x is not None]
            dtypes.add(tuple(x.dtype for x in found))
            pairs = zip(found, grad_results, strict=True)
            pairs = [(x, g.to(x.dtype).view_as(x)) for x, g in pairs if x.requires_grad]
            graph = [x for x, _ in pairs], copies, [g for _, g in pairs]
            gradients = torch.autograd.grad(*graph, retain_graph=True)
            again = torch.autograd.grad(*graph)
        for x, y in zip(found, results, strict=True):
            assert_near(x.detach().reshape(y.shape), y, dtype, False, way)
        for x, y in zip((*gradients, *again), exact * 2, strict=True):
            assert_near(x, y, dtype, True, way)
    assert len(dtypes) == 1, dtypes


def fits(shift: float, dtype: torch.dtype) -> bool:
    """Returns whether logits can be near a number, and float32 can add up their differences."""
    return abs(shift) < torch.finfo(dtype).max and step(shift, dtype) < 1e34


def step(shift: float, dtype: torch.dtype) -> float:
    """Returns the distance of logits near a number; it is at least 1/4."""
    return max(0.25, 2.0 ** math.frexp(shift)[1] * torch.finfo(dtype).eps / 2)


def assert_near(got: Tensor, exact: Tensor, dtype: Any, is_gradient: bool, way: str) -> None:
    exact = exact.double()
    tolerance = {torch.float64: 1e-9, torch.float32: 5e-4}.get(dtype, 4 * torch.finfo(dtype).eps)
    size = exact[exact.isfinite()].abs().amax().item() if exact.isfinite().any() else 0.0
    near = (got.double() - exact).abs() <= tolerance * (exact.abs() + 0.1 * size + 0.03)
    expected = exact.to(got.dtype)
    same = (got == expected) | (got.isnan() & expected.isnan())
    if is_gradient:
        same |= ~expected.isfinite() & (~got.isfinite() | (got == 0))
    assert (near | same).all(), (way, is_gradient, got, exact)


@pytest.mark.interpreted
@pytest.mark.parametrize("name", FORMS)
def test_values_and_gradients(name: str) -> None:
    for seed in range(CALLS):
        check(name, seed)


@pytest.mark.interpreted
@pytest.mark.parametrize("name", [*FORMS][:4])
@pytest.mark.parametrize("shift", [1e4, 1e6, -1e8, 1e12, -1e16, 1e30, 3e38, -3e38])
def test_logits_far_from_zero(name: str, shift: float) -> None:
    for seed in range(CALLS // 3):
        check(name, seed, shift)
