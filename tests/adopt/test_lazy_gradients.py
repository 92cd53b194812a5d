"""Gradients of lazy logits: hooks, readers, autograd functions and repeated backward passes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import KernelCalls
from language_models import PLACES, Model, X, are_computed, converted, stepped
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

import pyfused

pytestmark = pytest.mark.usefixtures("reset_warnings")
Hook = Callable[[Tensor], Any]


class Function(torch.autograd.Function):
    """Calls a function without autograd, and scales the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Any) -> Tensor:  # noqa: ARG004
        return function(x)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:  # noqa: ARG004
        return 0.5 * grad_output, None


def models() -> list[Any]:
    """Returns a model in float64 and its conversion."""
    plain = Model().double()
    return [plain, pyfused.convert(copy.deepcopy(plain), head="head")]


def loss_of(logits: Tensor) -> Tensor:
    """Returns a loss of scaled, capped logits in another layout."""
    return F.cross_entropy(2 * torch.tanh(logits / 2)[:, 1:].mT * 0.7, PLACES[:, 1:])


def gradients(model: Any) -> list[Tensor]:
    """Returns the gradients of the parameters, and forgets them."""
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    return found


# ---- hooks ---------------------------------------------------------------------------------------


def without_result(change: Hook) -> Hook:
    return lambda grad: change(grad) is None or None


def masked(grad: Tensor) -> Tensor:
    grad = grad.clone()
    grad[..., :3] = 0
    return grad


# Hooks, and whether they read the gradient.
HOOKS: dict[str, tuple[Hook, bool]] = {
    "doubled": (lambda g: 2 * g, False),
    "divided": (lambda g: -(g / 3), False),
    "scaled by a tensor": (lambda g: torch.tensor(0.3) * g, False),
    "added": (lambda g: g + g.clone(), False),
    "shape": (without_result(lambda g: g.new_zeros(g.shape) + torch.zeros_like(g)), False),
    "noisy": (lambda g: g + torch.linspace(0, 0.1, 40, dtype=g.dtype).expand_as(g), False),
    "infinite": (lambda g: (g * torch.inf).nan_to_num(1.0, 2.0, 3.0), True),
    "norm": (without_result(torch.norm), True),
    "numpy": (lambda g: torch.from_numpy(g.numpy()) * 3, True),
    "clipped": (lambda g: g.clamp(-0.01, 0.01), True),
    "masked": (masked, True),
    "changed": (without_result(lambda g: g.mul_(0.5)), True),
    "view changed": (without_result(lambda g: g[..., 2:4].zero_()), True),
    "detached view changed": (without_result(lambda g: g.detach().view(-1)[5:9].fill_(1)), True),
    "data changed": (without_result(lambda g: g.data.mul_(2)), True),
    "moved": (lambda g: g.flip(0), True),
    "transposed": (lambda g: g[:, :4].transpose(0, 1).repeat(1, 4, 1), True),
    "rounded": (lambda g: g.bfloat16().double(), True),
}


@pytest.mark.parametrize("after_loss", [False, True])
@pytest.mark.parametrize(("hook", "reads"), HOOKS.values(), ids=HOOKS)
def test_hooks(hook: Hook, reads: bool, after_loss: bool) -> None:
    """They change the gradients of the parameters as without the conversion."""
    found = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for model in models():
            logits = model(X)
            if not after_loss:
                logits.register_hook(hook)
            loss = loss_of(logits)
            if after_loss:
                logits.register_hook(hook)
            loss.backward(retain_graph=True)
            loss.backward()
            found.append([loss, *gradients(model)])
    assert_close(found[1], found[0])
    assert reads == any("the gradient of its logits is read by" in str(w.message) for w in caught)
    assert reads or not are_computed(logits)


def test_hooks_run_in_the_order_of_the_graph() -> None:
    model, order = converted(), list[str]()
    logits = model(X)
    logits[0].register_hook(lambda _: order.append("removed")).remove()
    logits.register_hook(lambda _: order.append("logits"))
    logits.grad_fn.register_prehook(lambda _: order.append("head"))
    logits.grad_fn.register_hook(lambda *_: order.append("after head"))
    model.head.weight.register_hook(lambda _: order.append("weight"))
    torch.autograd.graph.register_multi_grad_hook((logits,), lambda _: order.append("all"))
    loss = loss_of(logits)
    loss.grad_fn.register_hook(lambda *_: order.append("loss"))
    for _ in range(2):
        loss.backward(retain_graph=True)
        assert order == ["loss", "logits", "all", "head", "after head", "weight"]
        order.clear()
    assert not are_computed(logits)


# ---- autograd functions --------------------------------------------------------------------------

# Functions without autograd, and whether a loss of their result reads the logits: those that move
# rows, scale or cap may have any gradient.
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "same": (lambda x: x, False),
    "view": (lambda x: x.view_as(x), False),
    "clone": (torch.clone, False),
    "scaled": (lambda x: 3 * x, True),
    "capped": (torch.tanh, True),
    "moved": (lambda x: x[torch.arange(3, -1, -1)], True),
}


@pytest.mark.filterwarnings("ignore:pyfused.convert")
@pytest.mark.parametrize(("function", "reads"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_autograd_functions(function: Any, reads: bool) -> None:
    found = []
    for model in models():
        logits = model(X)
        loss_of(Function.apply(logits, function)).backward()  # type: ignore[no-untyped-call]
        found.append(gradients(model))
    assert_close(found[1], found[0])
    assert are_computed(logits) == reads


# ---- readers -------------------------------------------------------------------------------------


def retained(logits: Tensor, loss: Tensor) -> Tensor | None:
    logits.retain_grad()
    loss.backward(retain_graph=True)
    loss.backward()
    return logits.grad


def collected(logits: Tensor, loss: Tensor) -> tuple[Tensor, ...]:
    found: list[Tensor] = []
    logits.register_hook(found.append)
    loss.backward()
    return tuple(found)


# Programs that return gradients of logits.
READERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "grad": lambda logits, loss: torch.autograd.grad(loss, logits),
    "backward": lambda logits, loss: loss.backward(inputs=[logits]) or logits.grad,
    "retain_grad": retained,
    "hook": collected,
    "create_graph": lambda logits, loss: torch.autograd.grad(loss, logits, create_graph=True),
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_gradients_of_logits(reader: Callable[[Tensor, Tensor], Any]) -> None:
    """They are computed before the backward pass ends, as the weight may change afterwards."""

    def outcome(model: Any) -> list[Tensor]:
        logits = model(X)
        result = reader(logits, loss_of(logits))
        stepped(model, fused=True)
        return [torch.stack([x]) for x in (result if type(result) is tuple else [result])]

    plain, model = models()
    with pytest.warns(RuntimeWarning, match="Model computes all of its logits: the"):
        found = outcome(model)
    assert_close(found, outcome(plain))


# ---- several uses of the same rows ---------------------------------------------------------------


def test_kept_gradients_of_logits_are_added_before_the_products(kernel_calls: KernelCalls) -> None:
    """A loss of fewer rows than features keeps the gradient of its logits; a target is ignored."""
    found, ignoring = [], PLACES[0, :8].clone()
    ignoring[4] = -100
    for model in models():
        logits = model(X[0, :8])
        loss = 2 * F.cross_entropy(3 * logits[3:], ignoring[3:])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = loss - F.log_softmax(logits, -1).gather(1, PLACES[0, :8, None]).mean()
        logits.register_hook(lambda grad: 0.5 * grad)
        loss.backward(retain_graph=True)
        loss.backward()
        found.append([loss, *gradients(model)])
    assert_close(found[1], found[0])
    assert kernel_calls["cross_entropy"] == 1
    assert kernel_calls["add_product"] == 0


def test_logits_that_an_unreduced_loss_has_kept_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in Co-teaching, which trains with the samples of the smallest losses."""
    found, products = [], list[Tensor]()
    linear = F.linear
    for model in models():
        logits = model(X[0, :8])
        each = F.cross_entropy(logits, PLACES[0, :8], reduction="none")
        chosen = each.detach().argsort()[:5]
        monkeypatch.setattr(F, "linear", lambda *a: products.append(linear(*a)) or products[-1])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = F.cross_entropy(logits[chosen], PLACES[0, :8][chosen]) + each[2]
        monkeypatch.undo()
        loss.backward()
        found.append([loss, *gradients(model)])
    assert_close(found[1], found[0])
    assert not products
