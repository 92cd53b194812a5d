"""explain() describes how a call is computed, and the logger reports fallbacks."""

from __future__ import annotations

import contextlib
import logging
import re
from typing import Any

import pytest
import torch
from conftest import KernelCalls
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import BaseTorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import pyfused
from pyfused import functional as fused
from pyfused.dispatch import reasons

X, TARGET = torch.linspace(-2, 2, 30).view(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])

GRAD = torch.ones(5, requires_grad=True)
FEATURES = "the inputs differ in the number of features"
DIMENSIONS = "the inputs differ in the number of dimensions, or have none"
IN_PLACE = "torch computes activations in place"
DEPRECATED = "some of the arguments are deprecated or invalid"


class Mine(Tensor):
    """A subclass that propagates through torch's operators."""


# op, arguments, options, and the reason; None if a kernel computes the call.
CALLS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any], str | None]] = {
    "cross_entropy": ("cross_entropy", (X, TARGET), {"label_smoothing": 0.1}, None),
    "empty": ("relu", (X[:0],), {}, reasons.SMALL),
    "inplace": ("relu", (X.clone(),), {"inplace": True}, IN_PLACE),
    "deprecated": ("mse_loss", (X, X), {"reduce": False}, DEPRECATED),
    "no dim": ("softmax", (X,), {}, "dim is not given"),
    "integers": ("relu", (TARGET,), {}, "input has dtype torch.int64"),
    "sparse": ("relu", (X.to_sparse(),), {}, "input has layout torch.sparse_coo"),
    "meta": ("mse_loss", (X.to("meta"), X.to("meta")), {}, "input is on meta"),
    "target": ("mse_loss", (X, TARGET[:, None]), {}, "target has dtype torch.int64"),
    "weight": ("cross_entropy", (X, X.softmax(1)), {"weight": GRAD}, "weight requires grad"),
    "one class": ("cross_entropy", (X[:, :1], TARGET * 0), {}, "one class"),
    "metrics": ("cross_entropy_with_metrics", (X, TARGET), {"z_loss": 0.1}, None),
    "metrics of one class": ("cross_entropy_with_metrics", (X[:, :1], TARGET * 0), {}, "one class"),
    "root": ("rmse_loss", (X, X), {}, None),
    "margin": ("additive_margin", (X, TARGET), {}, "a composition of torch's operators"),
    "p": ("triplet_margin_loss", (X, X, X), {"p": 3}, "p is neither 1 nor 2"),
    "features": ("triplet_margin_loss", (X, X[:, :1], X), {}, FEATURES),
    "no dimension": ("triplet_margin_loss", (torch.ones(()),) * 3, {}, DIMENSIONS),
    "subclass": ("relu", (X.as_subclass(Mine),), {}, "input is a Mine"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("op", "args", "kwargs", "reason"), CALLS.values(), ids=CALLS.keys())
def test_explanations_match_the_calls(
    op: str, args: Any, kwargs: Any, reason: str | None, kernel_calls: KernelCalls
) -> None:
    explanation = pyfused.explain(op, *args, **kwargs)
    assert bool(kernel_calls) == (reason is None)
    assert explanation.op == ("mse_loss" if op == "rmse_loss" else op.removesuffix("_with_metrics"))
    if reason:
        assert explanation[1:] == ("torch", reason, None)
        assert reason in str(explanation)
    else:
        assert explanation[1:] == ("cpu", None, None)
        assert str(explanation) == f"{explanation.op}: cpu"


def test_functions_of_torch_are_torchs_unless_patched() -> None:
    for function in (torch.relu, F.relu, F.tanh):
        for context in (contextlib.nullcontext, pyfused.patch):
            with context():
                backend, reason, _ = pyfused.explain(function, X)[1:]
            assert backend == "torch"
            assert f"pass '{function.__name__}' to explain" in str(reason)
    assert pyfused.explain(F.mse_loss, X, X).backend == "torch"
    with pyfused.patch():
        assert pyfused.explain(F.mse_loss, X, X).backend == "cpu"
    assert pyfused.explain(pyfused.functional.mse_loss, X, X).backend == "cpu"
    with pytest.raises(TypeError, match="must be Tensor"):
        pyfused.explain(torch.relu, 1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_active_modes() -> None:
    def reason() -> str:
        return pyfused.explain("relu", X).reason

    found = list[str]()
    torch.func.vmap(lambda x: (found.append(reason()), x)[1])(X)
    torch.jit.trace(lambda x: (found.append(reason()), x)[1], X, check_trace=False)
    for mode in (forward_ad.dual_level(), BaseTorchFunctionMode(), FlopCounterMode(display=False)):
        with mode:
            found.append(reason())
    modes = ["a torch dispatch or function mode"] * 2
    assert found == ["torch.func", "torch.jit.trace", "forward-mode AD", *modes]
    with torch.device("cpu"):  # a mode that affects only new tensors
        assert pyfused.explain("relu", X).backend == "cpu"


@pytest.mark.thresholds
def test_each_fallback_is_logged_but_no_small_call(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reasons, "_reported", {})
    meta = torch.empty(1 << 22, 8, device="meta")
    with caplog.at_level(logging.INFO, "pyfused"):
        for _ in range(3):
            fused.relu(X)
            fused.relu(TARGET.expand(1 << 22, 6))
            fused.mse_loss(meta, meta)
            x = torch.randn(1 << 10, 1 << 10, requires_grad=True)
            loss = fused.cross_entropy(x, torch.zeros(1 << 10).long())
            torch.autograd.grad(loss, x, create_graph=True)
    lines = [record.getMessage() for record in caplog.records]
    for words, line in zip(
        ("relu.*int64", "mse_loss.*meta", "cross_entropy.*create_graph"), lines, strict=True
    ):
        assert re.search(words, line)


OTHERS = "torch computes all others"
UNKNOWN: list[tuple[Any, str]] = [
    *(("rellu", "mean relu"), ("crossentropy", "mean cross_entropy or"), ("mse", "mean mse_loss")),
    *(("layer_norm", OTHERS), (nn.functional.layer_norm, OTHERS), (nn.Linear(2, 2), OTHERS)),
    *((len, OTHERS), (torch.celu_, OTHERS), (3, OTHERS)),
]


@pytest.mark.parametrize(("op", "hint"), UNKNOWN)
def test_an_unknown_operator(op: Any, hint: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s)op: expected a function .*, got .*{hint}"):
        pyfused.explain(op, X)


def test_errors_of_the_call_pass_through() -> None:
    with pytest.raises(RuntimeError):
        pyfused.explain("mse_loss", X, X.to("meta"))
