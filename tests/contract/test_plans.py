"""A call is planned once for its signature; later calls reuse the plan."""

from __future__ import annotations

import functools
import gc
import sys
import tracemalloc
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from catalogue import EXAMPLES, Example
from conftest import KernelCalls
from processes import python
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import pyfused
from pyfused import functional as fused
from pyfused.dispatch import run as dispatch
from pyfused.dispatch.plan import Plan
from pyfused.ops.operators import OPERATORS
from pyfused.types import NUMBER, DynamicSize, UnknownSizeError

CLASSES = torch.tensor([1, 0, 4, -100, 2, 2])
OTHER = torch.linspace(-3, 1, 30).reshape(6, 5)


NUMBERS: dict[str, Callable[[Tensor, float], Any]] = {
    **{
        name: lambda x, value, name=name: fused.cross_entropy(x, CLASSES, **{name: value})
        for name in ("denominator", "gamma", "label_smoothing", "scale", "temperature", "z_loss")
    },
    "softcap": lambda x, value: fused.cross_entropy(
        x, CLASSES, softcap=value, temperature=value, label_smoothing=value
    ),
    "log_probs": lambda x, value: fused.log_probs(x, CLASSES, temperature=value)[0].sum(),
    "divergence": lambda x, value: fused.kl_div_with_logits(x, OTHER, beta=value),
    "head": lambda x, value: fused.linear_cross_entropy(x, OTHER, CLASSES % 5, z_loss=value),
    "huber_loss": lambda x, value: fused.huber_loss(x, OTHER, delta=value),
    "gaussian": lambda x, value: fused.gaussian_nll_loss(x, OTHER, value, eps=value),
    "focal": lambda x, value: fused.sigmoid_focal_loss(x, OTHER.sigmoid(), gamma=value).sum(),
    "triplet": lambda x, value: fused.triplet_margin_loss(x, OTHER, OTHER + 1, margin=value),
    "elu": lambda x, value: fused.elu(x, value).sum(),
    "rmse_loss": lambda x, value: fused.rmse_loss(x, OTHER, eps=value),
    "formula": lambda x, value: robust_loss(x, OTHER, c=value, sign=-1),
}


@pyfused.loss
def robust_loss(input: Tensor, target: Tensor, *, c: float = 1.0, sign: int = 1) -> Tensor:
    return torch.log1p(((sign * input + target) / (2 * c)) ** 2) ** c


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_changes_is_not_planned_anew(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results of a later number equal those of a process that has seen no other number."""
    call, leaf = NUMBERS[name], torch.randn(6, 5, requires_grad=True)
    results = []
    for value in (0.3, 0.7, 0.55):
        loss = call(leaf, value)
        results.append((loss, *torch.autograd.grad(loss, leaf)))
        if value == 0.3:
            monkeypatch.setattr(Plan, "__init__", lambda *_, **__: pytest.fail("another plan"))
    monkeypatch.undo()
    for result, value in zip(results, (0.3, 0.7, 0.55), strict=True):
        dispatch.forget_plans()
        loss = call(leaf, value)
        assert loss.equal(result[0])
        assert torch.autograd.grad(loss, leaf)[0].equal(result[1])
    assert len({loss.item() for loss, _ in results}) == 3


def test_a_plan_cannot_read_a_number() -> None:
    with pytest.raises(AssertionError, match="a plan cannot depend on the value"):
        bool(NUMBER)
    with pytest.raises(TypeError):
        NUMBER > 0  # noqa: B015
    with pytest.raises(TypeError):
        float(NUMBER)  # type: ignore[arg-type]


PLAIN = {e.id: e for e in EXAMPLES.values() if not e.name}


@pytest.mark.parametrize("example", PLAIN.values(), ids=PLAIN)
def test_numbers_of_rows_share_a_plan(example: Example) -> None:
    dispatch.forget_plans()
    for rows in (2, 3, 17, 130):
        call = example.call(shape=(rows, 5))
        got, expected = call.ours(), call.reference()
        torch.testing.assert_close(got, expected, equal_nan=True)
    assert len(example.op.plans) == 1


LENGTHS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "mse_loss": lambda f, x: f.mse_loss(x, x.detach()[0]),
    "binary_cross_entropy_with_logits": lambda f, x: f.binary_cross_entropy_with_logits(
        x, x.detach().sigmoid().flip(0).contiguous(), x.detach()[:1, :, :1].square()
    ),
    "gelu": lambda f, x: f.gelu(x[:, ::2]),
    "softmax": lambda f, x: f.softmax(x, 1),
    "cross_entropy": lambda f, x: f.cross_entropy(x, x.detach().argmin(1)),
    "nll_loss": lambda f, x: f.nll_loss(x, x.detach().argmin(1), ignore_index=2),
}


@pytest.mark.cpu
@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")
def test_lengths_share_a_plan(name: str) -> None:
    """CPU kernels read sizes and strides when they start."""
    dispatch.forget_plans()
    for n in range(6, 40):
        whole = torch.linspace(-3, 3, 30 * n).sin().view(3, n, 10)[..., :5]
        for x in (whole.mT, whole.mT.contiguous()):
            x = x.detach().requires_grad_()
            got, expected = (LENGTHS[name](f, x).sum() for f in (fused, F))
            torch.testing.assert_close(got, expected)
            grads = [torch.autograd.grad(result, x)[0] for result in (got, expected)]
            torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    assert len(OPERATORS[name].plans) == 1


def test_a_plan_cannot_read_a_dynamic_size() -> None:
    size = DynamicSize()
    assert (size, 5) == (size, 5) != (DynamicSize(), 5)
    assert size not in (0, 1)
    assert 2 * size * 0 == 0
    reads: list[Callable[[Any], Any]] = [int, bool, range, lambda x: x == 5, lambda x: x > 1]
    for read in (*reads, lambda x: x * x == DynamicSize()):
        with pytest.raises(UnknownSizeError):
            read(size)


def test_plans_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory does not grow with the number of shapes, beyond the plans that are cached."""
    monkeypatch.setattr(dispatch, "MOST_PLANS", 8)

    def calls_of(sizes: range) -> int:
        for n in sizes:
            assert fused.hinge_embedding_loss(torch.ones(1, n), torch.ones(2, n)) == 1
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        assert calls_of(range(20, 320)) - calls_of(range(1, 20)) < 1 << 16
    finally:
        tracemalloc.stop()
    plans = OPERATORS["hinge_embedding_loss"].plans
    newest = [*plans][-1]
    calls_of(range(320, 320 + dispatch.MOST_PLANS // 2))
    assert newest in plans  # a full cache drops its older half
    assert len(plans) <= dispatch.MOST_PLANS


# ---- overhead of a call --------------------------------------------------------------------------


def python_calls(step: Callable[[], Any]) -> int:
    """Returns the number of Python functions that a step calls, the same on every machine."""
    count = 0

    def profile(_frame: FrameType, event: str, _argument: Any) -> None:
        nonlocal count
        count += event == "call"

    for _ in range(3):
        step()
    sys.setprofile(profile)
    try:
        step()
    finally:
        sys.setprofile(None)
    return count


# The maximum number of functions per step, without autograd's.
CALLS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "mse_loss": (lambda x: fused.mse_loss(x, OTHER), 22),
    "cross_entropy": (lambda x: fused.cross_entropy(x, CLASSES), 22),
    "softcap": (lambda x: fused.cross_entropy(x, CLASSES, softcap=5.0), 44),
    "nll_loss": (lambda x: fused.nll_loss(x, CLASSES), 24),
    "gelu": (lambda x: fused.gelu(x).sum(), 24),
    "softmax": (lambda x: fused.softmax(x, 1).sum(), 24),
    "log_probs": (lambda x: fused.log_probs(x, CLASSES)[0].sum(), 26),
    "kl_div_with_logits": (lambda x: fused.kl_div_with_logits(x, OTHER), 38),
    "linear_cross_entropy": (lambda x: fused.linear_cross_entropy(x, OTHER, CLASSES), 53),
    "linear_log_probs": (lambda x: fused.linear_log_probs(x, OTHER, CLASSES)[0].sum(), 58),
}


@pytest.mark.cpu
@pytest.mark.parametrize("name", CALLS)
def test_a_step_calls_few_python_functions(name: str) -> None:
    call, most = CALLS[name]
    x = torch.randn(6, 5, requires_grad=True)
    of_autograd = python_calls(lambda: x.sum().backward())
    assert python_calls(lambda: call(x).backward()) - of_autograd <= most


@pytest.mark.cpu
@pytest.mark.thresholds
@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch lacks the function")
def test_a_small_head_calls_few_python_functions() -> None:
    x, bias = torch.randn(6, 5, requires_grad=True), torch.zeros(6)
    call = functools.partial(fused.linear_cross_entropy, x, OTHER, CLASSES, linear_bias=bias)
    assert python_calls(call) <= 11


@pytest.mark.cpu
@pytest.mark.slow
def test_first_calls_do_not_import_the_compiler() -> None:
    """torch's Python definitions for meta tensors would import sympy, which takes 0.4 s."""
    found = python("""
        import sys
        from catalogue import EXAMPLES
        from conftest import fused_always
        from pyfused.ops.elementwise import SOFTSIGN

        SOFTSIGN.kernels["softsign"].programs  # traces
        with fused_always():
            for example in EXAMPLES.values():
                example.call().ours().sum().backward()
        print("sympy" in sys.modules)
        """)
    assert found.stdout == "False\n", found.stderr


def test_recomputation_uses_the_same_path(kernel_calls: KernelCalls) -> None:
    """The forward pass falls back because of a mode, which is not active in the recomputation."""
    x = torch.randn(6, 5, requires_grad=True)
    step = lambda x: fused.cross_entropy(2 * x, CLASSES)  # noqa: E731
    (expected,) = torch.autograd.grad(step(x), x)
    ran = kernel_calls["cross_entropy"]
    with FlopCounterMode(display=False):
        loss = checkpoint(step, x, use_reentrant=False)
    loss.backward()
    assert kernel_calls["cross_entropy"] == ran
    torch.testing.assert_close(x.grad, expected)
    checkpoint(step, x, use_reentrant=False).backward()  # runs without the mode
    assert kernel_calls["cross_entropy"] == ran + 2
