"""A call is planned once for its signature, and replayed."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
import weakref
from collections.abc import Callable
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from catalogue import EXAMPLES, Example
from conftest import KernelCalls
from processes import python
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from pyfused import functional as fused
from pyfused.backends import cpu
from pyfused.dispatch import call as dispatch
from pyfused.ops.elementwise import MSE_LOSS
from pyfused.ops.operators import CROSS_ENTROPY
from pyfused.types import CrossEntropyOptions, Options

CLASSES = torch.tensor([1, 0, 4, -100, 2, 2])
OTHER = torch.linspace(-3, 1, 30).reshape(6, 5)


def mse(input: Tensor, target: Tensor = OTHER) -> Any:
    return dispatch.plan_of(MSE_LOSS, (input, target, None, None, "mean", None), False)


def cross_entropy(input: Tensor, **options: Any) -> Any:
    arguments = input, CLASSES, None, CrossEntropyOptions(**options)
    return dispatch.plan_of(CROSS_ENTROPY, arguments, False)


def test_a_signature_has_one_plan() -> None:
    assert mse(torch.randn(6, 5)) is mse(torch.randn(6, 5))
    assert cross_entropy(torch.randn(6, 5), z_loss=0.5) is cross_entropy(
        torch.randn(6, 5), z_loss=0.5
    )


@pytest.mark.parametrize(
    "other",
    [
        lambda x: x.double(),
        lambda x: x[:1],
        lambda x: x.t().contiguous().t(),
        lambda x: x.clone().requires_grad_(),
        lambda x: x.to_sparse(),
        lambda x: x._neg_view(),
        lambda x: torch._lazy_clone(x),
    ],
    ids=["dtype", "shape", "strides", "requires_grad", "layout", "negated", "lazy_clone"],
)
def test_tensors_of_another_kind_have_another_plan(other: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(6, 5)
    assert mse(x, x) is not mse(other(x), x)
    assert mse(x, x) is not mse(x, other(x))


def test_modes_are_in_the_signature() -> None:
    x = torch.randn(6, 5, requires_grad=True)
    plan = mse(x)
    with torch.no_grad():
        assert mse(x) is not plan
    with torch.autocast("cpu", torch.bfloat16):
        of_bfloat16 = mse(x)
        assert of_bfloat16 is not plan
    with torch.autocast("cpu", torch.float16):
        assert mse(x) is not of_bfloat16
    with torch.device("cpu"):  # what torch.set_default_device does
        assert mse(x) is plan
    assert mse(x) is plan


@pytest.mark.parametrize(
    ("one", "another"),
    [
        ({"z_loss": 0.0}, {"z_loss": -0.0}),
        ({"label_smoothing": 0.0}, {"label_smoothing": 0.1}),
        ({"label_smoothing": 1}, {"label_smoothing": True}),
        ({"label_smoothing": 1}, {"label_smoothing": 1.0}),
        ({"reduction": "mean"}, {"reduction": "sum"}),
        ({"loss_dtype": None}, {"loss_dtype": torch.float64}),
        ({"token_weight": None}, {"token_weight": torch.ones(6)}),
        ({"denominator": 2.0}, {"denominator": torch.tensor(2.0)}),
    ],
    ids=str,
)
def test_options_are_in_the_signature(one: dict[str, Any], another: dict[str, Any]) -> None:
    x = torch.randn(6, 5)
    assert cross_entropy(x, **one) is not cross_entropy(x, **another)


def test_a_number_in_a_tensor_is_read_for_each_call() -> None:
    x, beta = torch.zeros(6, 5), torch.tensor(1.0)
    for value in (1.0, 0.25):
        beta.fill_(value)
        got = fused.smooth_l1_loss(x, OTHER, beta=beta)  # type: ignore[arg-type]
        assert got == pytest.approx(float(F.smooth_l1_loss(x, OTHER, beta=value)))


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_a_plan_is_made_without_tensors(example: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    kind, plan = type(example.op), type(example.op).plan
    monkeypatch.setattr(kind, "plan", lambda op, *a: (given.append(a[0]), plan(op, *a))[1])
    call = example.call()
    call.ours()
    for arguments in given:
        options = vars(arguments[-1]).values() if isinstance(arguments[-1], Options) else ()
        assert not any(isinstance(value, Tensor) for value in (*arguments, *options))


def test_nan_is_one_value() -> None:
    for _ in range(5):
        fused.quantile_loss(torch.randn(6, 5), OTHER, 0.5)
        with contextlib.suppress(RuntimeError):
            fused.softplus(torch.randn(6, 5), beta=float("nan"))
    plans = len(dispatch._plans)
    with contextlib.suppress(RuntimeError):
        fused.softplus(torch.randn(6, 5), beta=float("nan"))
    assert len(dispatch._plans) == plans


def test_wrong_arguments_raise_each_time() -> None:
    for _ in range(3):
        with pytest.raises(RuntimeError, match="beta"):
            fused.smooth_l1_loss(torch.randn(6, 5), OTHER, beta=-1.0)
        with pytest.raises(IndexError, match="target"):
            fused.cross_entropy(torch.randn(6, 5), torch.full((6,), 7))


def test_the_number_of_threads_is_the_one_of_the_call(
    threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []
    kernel = cpu.native.relu
    monkeypatch.setattr(cpu, "native", SimpleNamespace(**vars(cpu.native)))
    monkeypatch.setattr(cpu.native, "relu", lambda *a: (given.append(a[-1]), kernel(*a)))
    for number in (1, 2):
        threads(number)
        fused.relu(torch.randn(6, 5))
    assert given == [1, 2]


def test_a_plan_holds_no_tensor() -> None:
    x, target = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5)
    token_weight = torch.rand(6)
    fused.mse_loss(x, target).backward()
    fused.cross_entropy(x, CLASSES, token_weight=token_weight, reduction="none").sum().backward()
    fused.gelu(x).sum().backward()
    held = [weakref.ref(tensor) for tensor in (x, target, token_weight)]
    del x, target, token_weight
    gc.collect()
    assert [tensor() for tensor in held] == [None] * 3


def test_plans_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "MOST_PLANS", 8)
    for n in range(1, 40):
        assert fused.mse_loss(torch.ones(n), torch.zeros(n)) == 1
        assert len(dispatch._plans) <= 8


def test_threads_share_plans() -> None:
    expected = {n: float(F.gelu(torch.arange(n) / n).sum()) for n in range(1, 9)}
    wrong: list[Any] = []

    def work() -> None:
        for i in range(200):
            n = i % 8 + 1
            x = (torch.arange(n) / n).requires_grad_()
            total = fused.gelu(x).sum()
            total.backward()
            if abs(float(total.detach()) - expected[n]) > 1e-5 or x.grad is None:
                wrong.append(n)
            if i % 50 == 0:
                dispatch.forget_plans()

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


# ---- what a call costs ---------------------------------------------------------------------------


def python_calls(step: Callable[[], Any]) -> int:
    """The number of Python functions that a step calls, the same on every machine."""
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


# For each call the most functions of a step, beyond those of autograd itself.
CALLS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "mse_loss": (lambda x: fused.mse_loss(x, OTHER), 19),
    "cross_entropy": (lambda x: fused.cross_entropy(x, CLASSES), 23),
    "nll_loss": (lambda x: fused.nll_loss(x, CLASSES), 27),
    "gelu": (lambda x: fused.gelu(x).sum(), 24),
    "softmax": (lambda x: fused.softmax(x, 1).sum(), 20),
    "log_probs": (lambda x: fused.log_probs(x, CLASSES)[0].sum(), 26),
}


@pytest.mark.cpu
@pytest.mark.parametrize("name", CALLS)
def test_a_step_calls_few_python_functions(name: str) -> None:
    call, most = CALLS[name]
    x = torch.randn(6, 5, requires_grad=True)
    of_autograd = python_calls(lambda: x.sum().backward())
    assert python_calls(lambda: call(x).backward()) - of_autograd <= most


@pytest.mark.cpu
@pytest.mark.filterwarnings("ignore")
def test_the_first_call_of_no_operator_imports_a_compiler() -> None:
    """torch's Python definitions, which run for meta tensors, would import sympy for 0.4 s."""
    found = python("""
        import sys
        from catalogue import EXAMPLES
        from conftest import fused_always

        with fused_always():
            for example in EXAMPLES.values():
                example.call().ours().sum().backward()
        print("sympy" in sys.modules)
        """)
    assert found.stdout == "False\n", found.stderr


def test_a_checkpoint_decides_once(kernel_calls: KernelCalls) -> None:
    """The forward pass runs under a mode, so by torch's operator; the recomputation does not."""
    x = torch.randn(6, 5, requires_grad=True)
    step = lambda x: fused.cross_entropy(2 * x, CLASSES)  # noqa: E731
    (expected,) = torch.autograd.grad(step(x), x)
    ran = kernel_calls["cross_entropy"]
    with FlopCounterMode(display=False):
        loss = checkpoint(step, x, use_reentrant=False)
    loss.backward()
    assert kernel_calls["cross_entropy"] == ran
    torch.testing.assert_close(x.grad, expected)
    checkpoint(step, x, use_reentrant=False).backward()  # without the mode
    assert kernel_calls["cross_entropy"] == ran + 2
