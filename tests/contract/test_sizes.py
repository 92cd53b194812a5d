"""The sizes from which kernels are used."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import python_calls
from torch.testing import assert_close as close

import pyfused
from pyfused import functional as fused
from pyfused.backends import cpu
from pyfused.dispatch import sizes
from pyfused.dispatch.reasons import SMALL
from pyfused.dispatch.sizes import limits_of
from pyfused.ops.operators import OPERATORS

pytestmark = [pytest.mark.cpu, pytest.mark.thresholds]
FIRST, SECOND = 1 << 10, 1 << 12


def runs_torch(op: str, *arguments: Any, **options: Any) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OPERATORS[op], "least", (0, 0))
        return pyfused.explain(op, *arguments, **options).backend == "torch"


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The columns of a row that are set have another limit."""

    def other(name: str, family: str, *_: Any) -> sizes.Limits:
        row = sizes._row(sizes.ON_CPU, name, family, sizes.DEFAULT_ON_CPU)
        return sizes.Limits(FIRST, *[x and SECOND for x in row[1:]])

    monkeypatch.setattr(sizes, "limits_of", other)


@pytest.mark.parametrize(("reduction", "limit"), [("mean", FIRST), ("none", SECOND)])
def test_unreduced_losses(reduction: str, limit: int) -> None:
    for elements in (limit - 1, limit):
        x = torch.zeros(elements)
        assert runs_torch("l1_loss", x, x, reduction=reduction) == (elements < limit)


@pytest.mark.parametrize("is_few", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_classes(is_few: bool, dtype: torch.dtype) -> None:
    classes = sizes.VECTOR // dtype.itemsize - is_few
    x = torch.zeros(-(-FIRST // classes), classes, dtype=dtype)
    columns, target = x.t().contiguous(), torch.zeros(len(x), dtype=torch.int64)
    assert runs_torch("cross_entropy", x, target) == is_few
    assert runs_torch("softmax", x, 1) == is_few
    assert not runs_torch("cross_entropy", columns.t(), target)  # torch vectorises
    slow = dtype is torch.bfloat16 and cpu.capability == "x86-64-v3"
    assert runs_torch("softmax", columns, -2) == slow


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_what_has_no_few_classes() -> None:
    x = torch.zeros(6, 5)
    nested = torch.nested.nested_tensor([x, x])
    assert sizes._are_few(x, -1)
    for input, dim in ((x, 2), (x, -3), (x, None), (x, True), (x.to_sparse(), 1), (nested, 1)):
        assert not sizes._are_few(input, dim)


@pytest.mark.parametrize(("reduction", "limit"), [("mean", FIRST), ("none", SECOND)])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_few_classes_of_images(
    order: torch.memory_format, reduction: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch vectorises them; the reduction decides in the function and in dispatch."""
    monkeypatch.setattr(OPERATORS["cross_entropy"], "least", (0, 0))
    for rows in (limit // 64 - 1, limit // 64):
        x = torch.zeros(1, 2, 32, rows).to(memory_format=order)
        target = torch.zeros(1, 32, rows, dtype=torch.int64)
        by_torch = rows * 64 < limit
        assert runs_torch("cross_entropy", x, target, reduction=reduction) is by_torch
        loss = fused.cross_entropy(x.requires_grad_(), target, reduction=reduction)
        assert ("Fused" not in type(loss.grad_fn).__name__) is by_torch


@pytest.mark.parametrize("needs_grad", [False, True])
def test_calls_without_gradients(needs_grad: bool) -> None:
    x = torch.zeros(FIRST, requires_grad=needs_grad)
    rows, target = x.view(-1, 64), torch.zeros(FIRST // 64, dtype=torch.int64)
    assert runs_torch("silu", x) != needs_grad
    assert runs_torch("nll_loss", rows, target) != needs_grad
    with torch.no_grad():
        assert runs_torch("silu", x)
        assert runs_torch("nll_loss", rows, target)


def test_heads_gain_earlier_where_half_precision_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    def limits(dtype: torch.dtype) -> sizes.Limits:
        head = OPERATORS["linear_cross_entropy"]
        return limits_of.__wrapped__(head.name, head.family, dtype, torch.device("cpu"), 2)

    in_float32 = limits(torch.float32)
    for dtype, factor in sizes.HALVES.items():
        monkeypatch.setattr(cpu, "HALF_PRODUCTS", "float32")
        assert limits(dtype) == in_float32
        monkeypatch.setattr(cpu, "HALF_PRODUCTS", "half")
        assert limits(dtype).from_elements == factor * in_float32.from_elements


def test_limits_grow_with_threads(threads: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    row = sizes.Limits(sizes.MEDIUM, sizes.SMALL, sizes.LOGITS, sizes.NEVER)
    assert row.scaled(1, threads=1) == row.scaled(1, threads=2) == row
    assert row.scaled(1, threads=8) == row._replace(from_elements=4 * sizes.MEDIUM)
    assert row.scaled(2, threads=8)[:2] == (8 * sizes.MEDIUM, 2 * sizes.SMALL)
    assert row.scaled(8, threads=1 << 10)[:3] == (sizes.LOGITS, 8 * sizes.SMALL, sizes.LOGITS)
    x = torch.zeros(sizes.MEDIUM)
    for number, by_torch in ((2, False), (8, True), (2, False)):
        threads(number)
        assert runs_torch("l1_loss", x, x) is by_torch
        assert sizes.torch_computes(OPERATORS["l1_loss"], (x, x)) is by_torch


def test_columns_are_larger_sizes() -> None:
    """The smallest size is compared first, and a call of the largest size asks nothing else."""
    for table in (sizes.ON_CPU, sizes.ON_CPU_OF_HALVES, sizes.ON_GPU):
        for name, row in table.items():
            assert row.from_elements >= max(row.few_classes, 1), name
            others = row.without_gradient, row.unreduced
            assert all(x == 0 or x > row.from_elements for x in others), name


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 1])
def test_kernels_compute_small_calls_with_options_that_torch_lacks(
    reduction: str, rows: int
) -> None:
    """torch computes empty calls, for which kernels would divide by 0."""
    x, target = torch.zeros(rows, 5), torch.zeros(rows, dtype=torch.int64)
    call = partial(fused.cross_entropy, x, target, reduction=reduction)
    assert (pyfused.explain(call.func, *call.args, scale=2.0).backend == "torch") == (not rows)
    for options in ({"scale": 2.0}, {"gamma": 0.0}, {"token_weight": torch.ones(rows)}):
        close(call(**options), call(), equal_nan=True)
    loss, metrics = fused.cross_entropy_with_metrics(x, target, reduction=reduction)
    close(loss, call(), equal_nan=True)
    assert metrics.prediction.tolist() == [0] * rows


# ---- GPUs ----------------------------------------------------------------------------------------


def test_explain_names_the_numbers_that_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(sizes, "HOST_US", 20.0)
    monkeypatch.setattr(sizes, "gb_per_s", lambda _: 100.0)
    x = torch.empty(100, 65, device="meta")  # neither CPU nor GPU, but dispatched like a GPU's
    assert pyfused.explain("relu", x).reason == "input is on meta"
    monkeypatch.setattr(sizes, "unsupported_device", lambda *_: None)
    limits_of.cache_clear()
    target = torch.empty(100, dtype=torch.int64, device="meta")
    by_numbers = "(20 us for a call on the host, 100 GB/s on the GPU)"
    for logits, limit in ((x, 65_536), (x[:, :64], 16_384)):
        reason = pyfused.explain("cross_entropy", logits, target).reason
        assert reason == f"{SMALL}: kernels run from {limit:,} elements {by_numbers}"
    reason = pyfused.explain("margin_ranking_loss", x, x, x).reason
    assert reason == f"{SMALL}: kernels run from 16,384 elements"
    assert pyfused.explain("relu", x).reason == SMALL


@pytest.mark.parametrize(("found", "expected"), [(819.0, 819.0), (0.0, 3000.0)])
def test_the_bandwidth_of_a_gpu(
    found: float, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    testing, bandwidth = pytest.importorskip("triton.testing"), sizes.gb_per_s.__wrapped__
    monkeypatch.setattr(sizes, "without_triton", lambda _: None)
    monkeypatch.setattr(testing, "get_dram_gbps", lambda _: found)
    assert bandwidth(torch.device("cuda", 0)) == expected
    assert bandwidth(torch.device("meta")) == 3000.0


# ---- small calls ---------------------------------------------------------------------------------

X, TARGET = torch.linspace(-2, 2, 30).view(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
SMALL_CALLS: dict[str, Callable[[Any], torch.Tensor]] = {
    "relu": lambda f: f.relu(X),
    "gelu": lambda f: f.gelu(X, approximate="tanh"),
    "softmax": lambda f: f.softmax(X, -1),
    "mse_loss": lambda f: f.mse_loss(X, X + 1, weight=X),
    "kl_div": lambda f: f.kl_div(X, X.exp(), reduction="sum"),
    "cross_entropy": lambda f: f.cross_entropy(X, TARGET, label_smoothing=0.1),
    "linear_cross_entropy": lambda f: f.linear_cross_entropy(X, X[:5], TARGET),
}


@pytest.mark.parametrize("name", SMALL_CALLS)
def test_a_small_call_by_torch(name: str) -> None:
    """It adds the call of pyfused's function and of the comparison, which asks the compiler."""
    if not hasattr(F, name):
        pytest.skip("this version of torch lacks the function")
    call = SMALL_CALLS[name]
    assert call(fused).equal(call(F))
    added = python_calls(lambda: call(fused)) - python_calls(lambda: call(F))
    assert added == (5 if name == "linear_cross_entropy" else 3)
    with pyfused.patch():
        assert call(F).equal(call(fused))
        if name in ("softmax", "mse_loss", "kl_div", "cross_entropy"):  # these are patched
            assert python_calls(lambda: call(F)) == python_calls(lambda: call(fused))


@pytest.mark.filterwarnings("ignore:size_average and reduce:UserWarning")
@pytest.mark.parametrize("size", [6, 60_000])
@pytest.mark.parametrize("given", [{"size_average": False}, {"reduce": False}, {"reduce": True}])
def test_deprecated_arguments_are_torchs(size: int, given: dict[str, bool]) -> None:
    x, y = X[:1].expand(size, 5).contiguous(), TARGET[:1].expand(size)
    assert fused.mse_loss(x, x + 1, **given).equal(F.mse_loss(x, x + 1, **given))
    assert fused.cross_entropy(x, y, **given).equal(F.cross_entropy(x, y, **given))
    assert fused.kl_div(x, x.exp(), **given).equal(F.kl_div(x, x.exp(), **given))
    with pytest.raises(TypeError, match=r"size_average, reduce: expected None .*; pass reduction"):
        fused.cross_entropy(x, y, **given, gamma=2.0)
