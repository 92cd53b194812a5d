"""log_probs and linear_log_probs compared with torch's operators, and independence of rows."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import interpreter
import pytest
import torch
from compare import FLOATS, Errors, evaluate, exactly, products
from conftest import backend
from grid import FULL, grid
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_map

from pyfused import functional as fused
from pyfused.backends import cpu

every_operator = pytest.mark.parametrize("op", ["log_probs", "linear_log_probs"])
# Combinations of log-probability, entropy and log-sum-exp that have a gradient.
CHOICES = [c for n in (1, 2, 3) for c in itertools.combinations(range(3), n)]
CHOICES = CHOICES[::3] if interpreter.ON else CHOICES  # (0), (0, 1), (0, 1, 2)
SHAPES: dict[str, tuple[int, ...]] = {"rows": (12, 70), "one": (70,), "kdim": (5, 9, 3, 2)}
if backend is cpu:
    SHAPES |= {"rows": (150, 70), "kdim": (25, 9, 3, 2), "many": (40, 2600)}
FEATURES = 6


def of_logits(
    logits: Tensor,
    target: Tensor,
    ignore_index: int = -100,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> list[Tensor]:
    """Computes the results with torch's operators, from logits in a wider dtype."""
    dim, x = min(logits.dim() - 1, 1), logits if logits.dtype is torch.float64 else logits.float()
    x = (x if softcap is None else softcap * torch.tanh(x / softcap)) / temperature
    log_p, counted = x.log_softmax(dim), target != ignore_index
    at_target = log_p.gather(dim, target.where(counted, 0).long().unsqueeze(dim)).squeeze(dim)
    found = at_target, -(log_p.exp() * log_p).sum(dim), x.logsumexp(dim)
    return [x.where(counted, 0) for x in found]


def of_head(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    **options: Any,
) -> list[Tensor]:
    logits = torch.tensordot(input, linear_weight, ([-1], [-1]))
    logits = logits if linear_bias is None else logits + linear_bias
    return of_logits(logits, target, **options)


TORCH: dict[str, Callable[..., list[Tensor]]] = {
    "log_probs": of_logits,
    "linear_log_probs": of_head,
}


def draw(
    op: str,
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, ...] = (12, 70),
    bias: bool = True,
) -> dict[str, Tensor]:
    """Returns the tensors of a call with logits of this shape; ignores a third of the targets."""
    rows, (classes, *positions) = shape[: len(shape) > 1], shape[len(shape) > 1 :]
    target = torch.randint(0, classes, (*rows, *positions))
    target.view(-1)[1::3] = -100
    if op == "log_probs":
        return {"logits": (3 * torch.randn(shape)).to(dtype).requires_grad_(), "target": target}
    found = {"input": torch.randn(*rows, FEATURES), "target": target}
    found["linear_weight"] = torch.randn(classes, *positions, FEATURES) / FEATURES**0.5
    if bias:
        found["linear_bias"] = torch.randn(classes, *positions)
    return {
        name: x if name == "target" else x.to(dtype).requires_grad_() for name, x in found.items()
    }


def all_results(op: str, **given: Any) -> fused.LogProbs:
    if op == "log_probs" and given["logits"].dim() > 2:
        given = {"dim": 1} | given
    return getattr(fused, op)(**given, return_entropy=True, return_lse=True)


def check(errors: Errors, op: str, tensors: dict[str, Tensor], **options: Any) -> None:
    """Adds the errors of the results, and of the gradients of several combinations of results."""
    beyond = {n: options.pop(n) for n in ("memory_budget", "deterministic_rows") if n in options}
    for chosen in CHOICES:

        def ours(chosen: tuple[int, ...] = chosen, **given: Any) -> Tensor:
            return torch.stack([all_results(op, **given, **beyond)[i] for i in chosen])

        def theirs(chosen: tuple[int, ...] = chosen, **given: Any) -> Tensor:
            return torch.stack([TORCH[op](**given)[i] for i in chosen])

        got = evaluate(ours, **tensors, **options)
        of_torch = evaluate(theirs, **tensors, **options)
        exact = evaluate(theirs, convert=exactly, **tensors, **options)
        features, (rows, columns) = 0, (0, 0)  # sizes of products, for linear_log_probs
        if op == "linear_log_probs":
            features = FEATURES
            columns = tensors["linear_weight"].numel() // features
            rows = tensors["input"].numel() // features
        for i, name in enumerate(chosen):
            of = got.value[i], of_torch.value[i], exact.value[i]
            errors.add(f"result {name}", *of, products=features)
        for i, gradient in enumerate(got.gradients):
            of = gradient, of_torch.gradients[i], exact.gradients[i]
            errors.add(f"gradient {i} of {chosen}", *of, products=rows if i else columns)


@grid(kind=SHAPES, op=["log_probs", "linear_log_probs"], dtype=FLOATS)
def test_as_accurate_as_torch(op: str, kind: str, dtype: torch.dtype) -> None:
    errors = Errors()
    shaping: dict[str, Any] = {"softcap": 4.0, "temperature": 0.7}
    for options in ({}, {"temperature": 1.7}, shaping) if backend is cpu else (shaping,):
        for _ in range(10 if kind == "one" else 1):
            check(errors, op, draw(op, dtype, SHAPES[kind]), **options)
    few = 3 if kind == "one" else 1  # one element, for which torch's error may be 0
    errors.check(roundings=128 if dtype is torch.float64 else few)  # no wider dtype for sums


@grid(dtype=FLOATS, budget=[5000] if interpreter.ON else [1, 5000, 1 << 17, 1 << 22])
def test_budgets_and_fixed_products(budget: int, dtype: torch.dtype) -> None:
    errors, shape = Errors(), (40, 2100) if backend is cpu else (12, 70)
    for more in ({}, {"deterministic_rows": True}):
        tensors = draw("linear_log_probs", dtype, shape, bias=bool(more))
        check(errors, "linear_log_probs", tensors, memory_budget=budget, **more)
    errors.check(roundings=128 if dtype is torch.float64 else 1)


@every_operator
def test_results_that_were_not_requested(op: str) -> None:
    found = getattr(fused, op)(**draw(op))
    assert found[1:] == (None, None)
    for name, option in (
        ("entropy", "return_entropy=True"),
        ("log_sum_exp", "return_lse=True"),
        ("is_top1", "return_metrics=True"),
        ("mean_logit", "return_metrics=True"),
    ):
        with pytest.raises(AttributeError, match=f"{name}: expected a call with {option}"):
            getattr(found, name)
    assert getattr(fused, op)(**draw(op), return_lse=True).log_sum_exp is not None


@pytest.mark.interpreted
@grid(kind=SHAPES, op=["log_probs", "linear_log_probs"], dtype=FLOATS)
def test_metrics(op: str, kind: str, dtype: torch.dtype) -> None:
    """Metrics are exact, have no gradient, and do not change other results."""
    tensors, options = draw(op, dtype, SHAPES[kind]), {"softcap": 4.0, "temperature": 0.7}
    logits, target = tensors.get("logits"), tensors["target"]
    if logits is None:
        x, weight = tensors["input"].double(), tensors["linear_weight"].double()
        logits = torch.tensordot(x, weight, ([-1], [-1])) + tensors["linear_bias"]
    dim = min(logits.dim() - 1, 1)
    target.view(-1)[:4] = logits.argmax(dim).view(-1)[:4]
    target.view(-1)[1::3] = -100
    counted, x = target != -100, 4 * (logits.double() / 4).tanh() / 0.7
    plain = all_results(op, **tensors, **options)
    found = all_results(op, **tensors, **options, return_metrics=True)
    assert torch.equal(torch.stack(found[:3]), torch.stack(plain))
    if op == "log_probs" or dtype in (torch.float32, torch.float64):  # others round the logits
        assert found.is_top1.tolist() == ((logits.argmax(dim) == target) & counted).tolist()
    assert found.is_top1.any()
    exact = x.mean(dim).where(counted, 0).to(found.mean_logit.dtype)
    rounding = 0.02 if op == "linear_log_probs" and exact.dtype is torch.float32 else 1e-6
    torch.testing.assert_close(found.mean_logit, exact, rtol=rounding, atol=rounding)
    assert not found.mean_logit.requires_grad
    leaves = [x for x in tensors.values() if x.requires_grad]
    gradients = [torch.autograd.grad(sum(x.sum() for x in r), leaves) for r in (found[:3], plain)]
    assert all(map(torch.equal, *gradients))


@pytest.mark.interpreted
@pytest.mark.parametrize("ignore_index", [0, -100])
def test_metrics_of_ties_and_ignored_rows(ignore_index: int) -> None:
    """The first of equal logits is the largest, and NaN precedes all numbers, as in torch."""
    logits = torch.tensor([[1.0, 2, 2], [1, 2, 2], [math.nan, 5, 0], [3, 1, 2], [0, 0, 0]])
    target = torch.tensor([1, 2, 0, ignore_index, ignore_index])
    found = fused.log_probs(logits, target, ignore_index=ignore_index, return_metrics=True)
    expected = [True, False, ignore_index != 0, False, False]
    assert found.is_top1.tolist() == expected
    means = torch.tensor([5 / 3, 5 / 3, math.nan if ignore_index else 0, 0, 0])
    torch.testing.assert_close(found.mean_logit, means, equal_nan=True)


@every_operator
def test_metrics_stay_in_copies(op: str) -> None:
    with torch.no_grad():
        found = all_results(op, **draw(op), return_metrics=True)
    copies = [copy.deepcopy(found), pickle.loads(pickle.dumps(found)), found._replace()]
    for other in (*copies, tree_map(lambda x: x if x is None else x.clone(), found)):
        assert torch.equal(other.mean_logit, found.mean_logit)
        assert torch.equal(other.is_top1, found.is_top1)


def test_the_dimension_of_the_classes() -> None:
    """Language models' logits (B, T, C) require dim; the results equal those of rows."""
    tensors = draw("log_probs")
    logits, target = tensors["logits"].detach().view(3, 4, 70), tensors["target"].view(3, 4)
    told = r"dim: expected .* logits of shape \(3, 4, 70\).*dim=-1 .* 70 .*dim=1 for 4 classes"
    with pytest.raises(ValueError, match=told):
        fused.log_probs(logits, target)
    expected = [x.view(3, 4) for x in all_results("log_probs", **tensors)]
    for moved, dim in ((logits, -1), (logits.movedim(-1, 0), 0)):
        got = all_results("log_probs", logits=moved, target=target, dim=dim)
        torch.testing.assert_close([*got], expected)


# ---- ignored, empty, special values --------------------------------------------------------------


@pytest.mark.cpu
def test_ignored_rows_have_no_products() -> None:
    with products() as found:
        log_probs = fused.linear_log_probs(**draw("linear_log_probs", shape=(90, 70)))
        log_probs.log_probability.sum().backward()
    assert found.count((60, FEATURES, 70)) == 1  # these logits are kept for backward
    assert not any(90 in sizes for sizes in found)


def test_a_layer_without_features() -> None:
    x, weight, target = torch.randn(3, 0), torch.randn(5, 0), torch.tensor([4, 0, -100])
    found = fused.linear_log_probs(x, weight, target)
    expected = torch.tensor([-math.log(5), -math.log(5), 0])
    torch.testing.assert_close(found.log_probability, expected)


@every_operator
def test_log_probabilities_are_never_above_0(op: str) -> None:
    """The target has all probability except what is rounded away."""
    n, classes = 50, 130
    logits = torch.randn(n, classes) * torch.logspace(-3, 3, n)[:, None]
    logits[:, 7] = logits.amax(1) + torch.linspace(0, 40, n)
    target = torch.full((n,), 7)
    tensors = {"logits": logits}
    if op != "log_probs":
        tensors = {"input": logits, "linear_weight": torch.eye(classes)}
    found = all_results(op, **tensors, target=target)
    assert (found.log_probability <= 0).all()
    assert (found.log_probability > -10).all()
    assert (found.entropy >= 0).all()


@pytest.mark.interpreted
def test_infinite_logits(isa: str) -> None:
    """Classes with probability 0 do not contribute to entropy and gradients, which are not NaN."""
    logits = torch.randn(4, 300)
    logits[:, 5] = -math.inf
    logits[3, 6:] = -1e4
    leaf, target = logits.requires_grad_(), torch.tensor([1, 2, 5, 4])
    found = all_results("log_probs", logits=leaf, target=target)
    exact = leaf.detach().double()
    log_p = exact.log_softmax(1)
    terms = (log_p.exp() * log_p).nan_to_num(0.0)
    torch.testing.assert_close(found.entropy, -terms.sum(1).float())
    assert found.log_probability[2] == -math.inf
    (gradient,) = torch.autograd.grad(found.entropy.sum(), leaf)
    expected = log_p.exp() * terms.sum(1, keepdim=True) - terms
    torch.testing.assert_close(gradient, expected.float(), rtol=1e-4, atol=1e-6)
    assert gradient.any()


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_an_infinite_probability_is_nan(dtype: torch.dtype, isa: str) -> None:
    """In rows with +inf or NaN, all results and gradients are NaN, as in torch."""
    logits = torch.randn(5, 300, dtype=dtype)
    logits[1, 7] = logits[2, 1] = math.inf
    logits[4, 7] = math.nan
    leaf, target = logits.requires_grad_(), torch.tensor([1, 2, 1, 4, 7])
    found = all_results("log_probs", logits=leaf, target=target)
    for value in found[:2]:
        (gradient,) = torch.autograd.grad(value.sum(), leaf, retain_graph=True)
        assert value.isnan().tolist() == [False, True, True, False, True]
        assert gradient.isnan().all(1).tolist() == [False, True, True, False, True]
        assert not gradient[[0, 3]].isnan().any()
    (expected,) = torch.autograd.grad(logits.log_softmax(1)[range(5), target].sum(), leaf)
    (gradient,) = torch.autograd.grad(found.log_probability.sum(), leaf)
    torch.testing.assert_close(gradient, expected, equal_nan=True)
    assert found.log_sum_exp.isnan().tolist()[3:] == [False, True]


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("name", "sizes"),
    [("input", [(8, 70, FEATURES)]), ("linear_weight", [(70, 8, FEATURES)]), ("linear_bias", [])],
)
def test_no_products_for_unneeded_gradients(name: str, sizes: list[tuple[int, int, int]]) -> None:
    tensors = draw("linear_log_probs")
    frozen = {n: x.detach() for n, x in tensors.items()} | {name: tensors[name]}
    with products() as found:
        results = all_results("linear_log_probs", **frozen)
        gradient = torch.autograd.grad(sum(x.sum() for x in results), tensors[name])
    expected = torch.autograd.grad(sum(x.sum() for x in of_head(**frozen)), tensors[name])
    torch.testing.assert_close(gradient, expected)
    assert found == [(8, FEATURES, 70), *sizes]


# ---- independence of rows ------------------------------------------------------------------------

ROWS, CLASSES = (9, 150) if interpreter.ON else (9, 3500)


def bits(results: Any) -> Tensor:
    return torch.stack([x.detach() for x in results]).view(torch.int32)


@pytest.mark.cpu
@settings(max_examples=40 if FULL else 15)
@given(
    classes=st.integers(1, CLASSES),
    rows=st.integers(1, ROWS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    shaping=st.sampled_from([{}, {"temperature": 0.6}, {"softcap": 5.0}]),
    threads=st.integers(1, 4),
    shift=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_a_row_does_not_depend_on_other_rows(
    classes: int,
    rows: int,
    dtype: torch.dtype,
    shaping: dict[str, Any],
    threads: int,
    shift: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    logits = (torch.randn(rows, classes) * torch.rand(rows, 1) * 30).to(dtype)
    target = torch.randint(0, classes, (rows,))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = bits(all_results("log_probs", logits=logits, target=target, **shaping))
    finally:
        torch.set_num_threads(before)
    memory = torch.empty(rows * classes + shift, dtype=dtype)[shift:].view(rows, classes)
    order = torch.randperm(rows)
    leaf = memory.copy_(logits[order]).requires_grad_()  # other memory, with gradients
    moved = bits(all_results("log_probs", logits=leaf, target=target[order], **shaping))
    assert torch.equal(moved, whole[:, order])
    row = int(order[0])
    alone = all_results("log_probs", logits=logits[row], target=target[row], **shaping)
    assert torch.equal(bits(alone), whole[:, row])


@pytest.mark.cpu
@settings(max_examples=30 if FULL else 10)
@given(
    classes=st.integers(1, 2600),
    rows=st.integers(1, 40),
    budget=st.sampled_from([None, 1, 20_000, 300_000, 40_000_000]),
    fixed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_chunks_are_bitwise_identical(
    classes: int, rows: int, budget: int | None, fixed: bool, seed: int
) -> None:
    """Matrix products with one feature of 1 are exact."""
    torch.manual_seed(seed)
    head = (torch.randn(classes, 1) * 8).requires_grad_()
    input, target = torch.ones(rows, 1), torch.randint(0, classes, (rows,))
    target[torch.rand(rows) < 0.3] = -100
    expected = bits(all_results("log_probs", logits=input @ head.t(), target=target))
    chunks: dict[str, Any] = {"memory_budget": budget, "deterministic_rows": fixed}
    found = all_results(
        "linear_log_probs", input=input, linear_weight=head, target=target, **chunks
    )
    assert torch.equal(bits(found), expected)


@pytest.mark.cpu
@settings(max_examples=40 if FULL else 15)
@given(
    features=st.integers(1, 300),
    classes=st.integers(2, 2600),
    rows=st.integers(1, 300),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_deterministic_rows(features: int, classes: int, rows: int, bias: bool, seed: int) -> None:
    """A row has the same bits in any batch, at any index, with any other results."""
    torch.manual_seed(seed)
    tensors = {"linear_weight": torch.randn(classes, features)}
    if bias:
        tensors["linear_bias"] = torch.randn(classes)
    input, target = torch.randn(rows, features), torch.randint(0, classes, (rows,))

    def found(rows_of: Tensor, **more: Any) -> Tensor:
        given: dict[str, Any] = tensors | {"deterministic_rows": True} | more
        results = all_results(
            "linear_log_probs", input=input[rows_of], target=target[rows_of], **given
        )
        return bits(results)

    order = torch.randperm(rows)
    whole = found(order)
    subset = order[: 1 + rows // 3]
    leaf = {"linear_weight": tensors["linear_weight"].clone().requires_grad_()}
    assert torch.equal(
        found(subset.flip(0), memory_budget=1, **leaf), whole[:, : len(subset)].flip(1)
    )
    assert torch.equal(found(order[-1:]), whole[:, -1:])


@pytest.mark.cpu
@pytest.mark.parametrize(("group", "alike"), [(6, True), (7, False)])
def test_rows_whose_products_are_summed_in_a_different_order(
    group: int, alike: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MKL sums groups of rows in one order, and the remaining rows in another."""
    mm, sizes = torch.mm, []

    def by_groups(x: Tensor, weight: Tensor, out: Tensor) -> None:
        sizes.append(len(x))
        whole = len(x) // group * group
        mm(x[:whole], weight, out=out[:whole])
        mm(x[whole:].flip(1), weight.flip(0), out=out[whole:])

    monkeypatch.setattr(torch, "mm", by_groups)
    features, classes = 16 * group, 31  # sizes that no other test uses, because probes are cached
    input, target = torch.randn(150, features), torch.randint(0, classes, (150,))
    head = {"linear_weight": torch.randn(classes, features), "deterministic_rows": True}

    def found(of: slice) -> Tensor:
        return bits(all_results("linear_log_probs", input=input[of], target=target[of], **head))

    whole = found(slice(None))
    assert (sizes[-1] > 1) == alike
    for first in (1, 5, 64, 127, 149):
        assert torch.equal(found(slice(first, None)), whole[:, first:])


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.cpu
def test_rows_beyond_2_31_elements() -> None:
    """The last row starts there; the memory before it is not touched."""
    classes, stride = 1000, (1 << 31) + 8
    memory = torch.empty(stride + classes, dtype=torch.bfloat16)
    logits = memory.as_strided((2, classes), (stride, 1))
    logits.copy_(torch.randn(2, classes))
    target = torch.tensor([3, 999])
    found = all_results("log_probs", logits=logits, target=target)
    torch.testing.assert_close([*found], of_logits(logits.clone(), target))


# ---- arguments -----------------------------------------------------------------------------------


@pytest.mark.interpreted
@every_operator
@pytest.mark.parametrize("label", [70, -1])
def test_a_class_index_out_of_range(op: str, label: int) -> None:
    tensors = draw(op)
    tensors["target"][3] = label
    if backend is not cpu:  # the device is asynchronous
        found = getattr(fused, op)(**tensors).log_probability
        assert found.isnan().tolist() == [i == 3 for i in range(12)]
        return
    with pytest.raises(IndexError, match=rf"target: .*\[0, 70\).*got {label} at position \(3,\)"):
        getattr(fused, op)(**tensors)
    frozen = {name: x.detach() for name, x in tensors.items()}
    with pytest.raises(IndexError), torch.autograd.forward_ad.dual_level():  # the definition
        getattr(fused, op)(**frozen)
