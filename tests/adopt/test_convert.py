"""convert() replaces modules and heads in place, which keep what they do; revert() undoes it."""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import pickle
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from compare import Recording
from conftest import KernelCalls
from language_models import TARGET, Model, X, converted
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import register_parametrization
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import pyfused
from pyfused.adopt import heads, lazy_logits
from pyfused.adopt.lazy_logits import LazyLogits
from pyfused.dispatch import reasons

pytestmark = pytest.mark.usefixtures("reset_warnings")


# ---- modules -------------------------------------------------------------------------------------


class MyReLU(nn.ReLU):
    """A subclass, which is not converted, because it may behave differently."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.activation = nn.ReLU(inplace=True)
        self.layers = nn.Sequential(
            nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 5), MyReLU(), self.activation
        )
        self.criterion = nn.CrossEntropyLoss(torch.linspace(0.5, 1.5, 5), label_smoothing=0.1)
        self.other = nn.MSELoss(reduction="sum")

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        output = self.layers(x)
        return self.criterion(output, target) + self.other(output, x)


ROWS, CLASSES = torch.linspace(-2, 2, 5 << 13).view(-1, 5), torch.arange(1 << 13) % 5
SWAPPED = ("activation", "layers.1", "criterion", "other")  # layers.4 is the activation


def types(model: nn.Module) -> list[type[nn.Module]]:
    return [type(module) for module in model.modules()]


@pytest.mark.thresholds
def test_converted_and_unconverted_modules(kernel_calls: KernelCalls) -> None:
    model = Net()
    expected = model(ROWS, CLASSES)
    modules = list(model.modules())
    plan = pyfused.plan_conversion(model)
    assert plan.swapped == SWAPPED
    assert plan.left == (("layers.3", "MyReLU", "is a subclass of torch.nn.ReLU"),)
    assert str(plan).splitlines() == [
        "activation  ReLU              replaced by pyfused.nn.ReLU, but torch computes it in place",
        "layers.1    ReLU              replaced by pyfused.nn.ReLU",
        "layers.3    MyReLU            left: is a subclass of torch.nn.ReLU",
        "criterion   CrossEntropyLoss  replaced by pyfused.nn.CrossEntropyLoss",
        "other       MSELoss           replaced by pyfused.nn.MSELoss",
    ]
    assert types(model) == types(Net())
    assert pyfused.convert(model) is model
    assert all(now is then for now, then in zip(model.modules(), modules, strict=True))
    for name in SWAPPED:
        assert type(model.get_submodule(name)).__module__ == "pyfused.nn"
    assert_close(model(ROWS, CLASSES), expected)
    assert kernel_calls == {"cross_entropy": 1}  # torch is faster at the others' sizes


def test_attributes_are_preserved() -> None:
    model, seen = Net().double().eval(), []
    model.criterion.register_forward_hook(lambda *_: seen.append("hook"))
    model.criterion.note = "mine"
    before = [dict(vars(module)) for module in model.modules()]
    names = [name for name, _ in model.named_modules()]
    description, state = repr(model), copy.deepcopy(model.state_dict())
    pyfused.convert(model)
    for kind in ("CrossEntropyLoss(", "MSELoss(", " ReLU("):
        description = description.replace(kind, f" pyfused.{kind.strip()}".replace("  ", " "))
    assert repr(model).split() == description.split()
    assert [name for name, _ in model.named_modules()] == names
    assert not model.criterion.training
    assert model.criterion.weight.dtype == torch.float64
    model.load_state_dict(state)
    Net().double().load_state_dict(model.state_dict())
    model(ROWS.double(), CLASSES)
    assert seen == ["hook"]
    pyfused.revert(model)
    for module, was in zip(model.modules(), before, strict=True):
        assert vars(module).keys() == was.keys()
        assert all(vars(module)[key] is value for key, value in was.items())


def test_convert_is_idempotent_and_revert_only_undoes_it(caplog: pytest.LogCaptureFixture) -> None:
    model = Net()
    model.mine = pyfused.nn.ReLU()
    before = types(model)
    plan = pyfused.plan_conversion(model)
    assert ("mine", "ReLU", "is already a module of pyfused.nn") in plan.left
    with caplog.at_level(logging.INFO, "pyfused"):
        converted = types(pyfused.convert(model))
    assert f"replaced {len(SWAPPED)} modules (2 ReLU" in caplog.text
    again = pyfused.plan_conversion(model)
    assert again.swapped == ()
    assert {name for name, *_ in again.left} == {*SWAPPED, "layers.3", "mine"}
    assert "Nothing" not in str(again)
    assert types(pyfused.convert(model)) == converted  # a warning would be an error
    assert pyfused.revert(model) == plan.swapped == SWAPPED
    assert types(model) == before
    assert pyfused.revert(model) == ()


def with_forward(module: nn.Module) -> nn.Module:
    module.forward = torch.sigmoid  # type: ignore[method-assign]
    return module


OfTimm = type("GELU", (nn.Module,), {"__module__": "timm.layers.activations"})
WITHOUT = "has no counterpart in pyfused.nn"
LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "RReLU": (nn.RReLU, WITHOUT),
    "Mine": (type("Mine", (nn.modules.loss._Loss,), {}), WITHOUT),
    "GELU": (OfTimm, "is a class of timm.layers.activations, not torch.nn.GELU"),
    "ReLU": (lambda: with_forward(nn.ReLU()), "its forward was replaced"),
    "Tanh": (nn.Tanh, "its forward was replaced"),
    "RecursiveScriptModule": (lambda: torch.jit.script(nn.ReLU()), "is compiled by torch.jit"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", LEFT)
def test_losses_and_activations_that_are_left(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, reason = LEFT[name]
    monkeypatch.setattr(nn.Tanh, "forward", lambda _, x: x)
    others = nn.MultiheadAttention(2, 1), torch.jit.script(nn.Linear(2, 2))
    model = nn.Sequential(*others, make(), nn.ReLU())
    plan = pyfused.plan_conversion(model)
    assert plan.swapped == ("3",)
    assert [(left.name, left.reason) for left in plan.left] == [("2", reason)]
    assert str(plan).splitlines()[0].split()[2:] == ["left:", *reason.split()]
    before = types(model)[:-1]
    assert types(pyfused.convert(model))[:-1] == before


def test_options_without_a_language_model() -> None:
    with pytest.warns(RuntimeWarning, match="memory_budget have no effect"):
        pyfused.convert(Net(), metrics=True)


def test_linear_layers_that_may_be_heads() -> None:
    """A possible head is the last layer, the only one of its size, or as long as an embedding."""
    layers = {
        "tokens": nn.EmbeddingBag(2000, 8),
        "tied": nn.Linear(8, 2000),
        "wide": nn.Linear(8, 5000),
        "narrow": nn.Linear(5000, 8),
        "recurrent": nn.Sequential(nn.Linear(8, 3000), nn.LSTM(3000, 8)),
        "projections": nn.Sequential(nn.Linear(8, 6000), nn.Linear(8, 6000)),
        "scores": nn.Linear(9, 6000),
        "body": nn.Sequential(nn.ReLU(), nn.Linear(8, 32000)),
    }
    plan = pyfused.plan_conversion(nn.ModuleDict(layers))
    assert str(plan).splitlines() == [
        "tied    Linear(8 -> 2000)   pass head='tied' to fuse it with its loss",
        "scores  Linear(9 -> 6000)   pass head='scores' to fuse it with its loss",
        "body.0  ReLU                replaced by pyfused.nn.ReLU",
        "body.1  Linear(8 -> 32000)  pass head='body.1' to fuse it with its loss",
    ]
    assert plan.left[2] == ("body.1", "Linear", "pass head='body.1' to fuse it with its loss")
    with pytest.warns(RuntimeWarning, match="tied may compute logits: pass head='tied'"):
        pyfused.convert(nn.ModuleDict(layers))
    layers["body"][1] = nn.Linear(8, 1000)
    assert "body.1" not in str(pyfused.plan_conversion(nn.ModuleDict(layers)))
    model = nn.Sequential(nn.Embedding(9000, 8), nn.Linear(8, 9000))
    row = "1  Linear(8 -> 9000)  pass head='1' to fuse it with its loss"
    assert str(pyfused.plan_conversion(model)) == row  # without "Nothing to convert"
    plan = pyfused.plan_conversion(model, head="1")
    assert str(plan) == ".  Sequential  replaced by linear_cross_entropy(8 -> 9000)"


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_are_converted_and_can_be_reverted(copied: Any) -> None:
    model = pyfused.convert(Net())
    again = copied(model)
    assert types(again) == types(model)
    assert torch.equal(again(ROWS, CLASSES), model(ROWS, CLASSES))
    pyfused.revert(again)
    assert types(again) == types(Net())
    assert type(model.activation) is pyfused.nn.ReLU


# ---- unsupported models --------------------------------------------------------------------------

every_function = pytest.mark.parametrize(
    "function", [pyfused.convert, pyfused.plan_conversion, pyfused.revert]
)


@every_function
@pytest.mark.parametrize("wrong", [None, nn.ReLU, torch.ones(2)])
def test_an_argument_that_is_not_a_module(wrong: Any, function: Any) -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got \w+"):
        function(wrong)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("head", ["head", None])
def test_a_converted_model_is_not_scripted(head: Any) -> None:
    model = nn.Sequential()
    model.add_module("head", nn.Linear(8, 40) if head else nn.ReLU())
    pyfused.convert(model, head=head)
    with pytest.raises(RuntimeError, match=r"torch.jit.script: expected .* pyfused.revert\(model"):
        torch.jit.script(model)
    pyfused.revert(model)
    torch.jit.script(model)


def compiled() -> Any:
    return torch.compile(Net(), backend="eager")


COMPILED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "whole": (compiled, r"at '\.'.*was compiled, model\._orig_mod"),
    "part": (lambda: nn.Sequential(compiled()), r"at '0'.*was compiled, model\.0\._orig_mod"),
    "in place": (
        lambda: (net := Net()).compile(backend="eager") or net,
        "at '.'.*before compiling or sharding it",
    ),
}


@every_function
@pytest.mark.parametrize(("make", "message"), COMPILED.values(), ids=COMPILED)
def test_a_compiled_model_is_not_changed(make: Any, message: str, function: Any) -> None:
    model = make()
    before = types(model)
    with pytest.raises(ValueError, match=f"is not compiled yet, got .* {message}$"):
        function(model)
    assert types(model) == before


# ---- heads and models ----------------------------------------------------------------------------


def results(model: nn.Module) -> tuple[Tensor, ...]:
    """Returns the loss and the gradients of a batch."""
    model.zero_grad()
    loss = model(X, TARGET)[1]
    loss.backward()
    return loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "forward": (lambda h: setattr(h, "forward", lambda x: 9 * x @ h.weight.t()), "replaced"),
    "hook": (lambda h: h.register_forward_hook(lambda *a: 2 * a[-1]), "hooks"),
    "pre-hook": (lambda h: h.register_forward_pre_hook(lambda _, a: (2 * a[0],)), "hooks"),
    "backward": (lambda h: h.register_full_backward_hook(lambda *a: (3 * a[1][0],)), "hooks"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_head_with_a_modified_forward(name: str) -> None:
    """A change before or after the conversion keeps its effect; one warning says why."""
    change, reason = CHANGES[name]
    plain, before, after = Model(), Model(), converted()
    for model in (plain, before, after):
        change(model.head)
    assert reason in pyfused.plan_conversion(before, head="head").left[0].reason
    warning = f"Model computes all of its logits:.*{reason}"
    with pytest.warns(RuntimeWarning, match=warning):
        pyfused.convert(before, head="head")
    reasons._reported.clear()
    # A forward that is an attribute of the head replaces the one that would warn.
    warned = pytest.warns(RuntimeWarning, match=warning)
    with contextlib.nullcontext() if name == "forward" else warned:
        results(after)
    for model in (before, after):
        assert_close(results(model), results(plain))


class Quantised(Tensor):
    pass


UNSUPPORTED: dict[str, Callable[[Tensor], Tensor]] = {
    "has no elements": lambda weight: weight[:0],  # as in ZeRO-3
    "is a Quantised": lambda weight: weight.as_subclass(Quantised),
    "is on meta, its input on cpu": lambda weight: weight.to("meta"),
}


@pytest.mark.parametrize("problem", UNSUPPORTED)
def test_unsupported_weights(problem: str) -> None:
    model = converted()
    model.head.weight = nn.Parameter(UNSUPPORTED[problem](model.head.weight.detach()))
    warned = pytest.warns(RuntimeWarning, match=f"weight of its head {problem}")
    with warned, contextlib.suppress(RuntimeError):  # raised by torch, because of the bias
        model(X)


@pytest.mark.parametrize(("limit", "kind"), [(64 * 40, LazyLogits), (64 * 40 + 1, Tensor)])
def test_a_head_of_few_logits_computes_them(
    limit: int, kind: type[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "converted_limit", lambda *_: limit)
    assert type(converted()(X)) is kind


def test_print_does_not_compute_logits() -> None:
    model = converted()
    logits = model(X)
    shown = "LazyLogits(shape=(4, 16, 40), dtype=torch.float32, device=cpu, not computed)"
    assert repr(logits) == str(logits) == f"{logits}" == shown
    name = "torch.nn.modules.linear.Linear (converted by pyfused)"
    assert str(type(model.head)) == f"<class '{name}'>"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the logits are read
        logits.sum()
    assert repr(logits) == repr(pyfused.revert(model) and model(X).detach())


def test_converting_again_changes_the_options() -> None:
    model: Any = Model()
    with pytest.raises(ValueError, match=r"head: expected the name .* one of \['head'\], got 'x'"):
        pyfused.convert(model, head="x")
    with pytest.raises(ValueError, match=r"got 'emb', a torch\.nn\.modules\.sparse\.Embedding$"):
        pyfused.convert(model, head="emb")
    assert pyfused.plan_conversion(model, head="head").swapped == (".",)
    pyfused.convert(model, head="head")
    pyfused.convert(model)
    pyfused.convert(model, evaluation=True, metrics=True)
    assert type(model.eval()(X, TARGET)[0]) is LazyLogits
    assert model.pyfused_metrics is not None
    plan = pyfused.plan_conversion(model, head="head")
    assert plan.left[0] == (".", "Model", "is already converted")
    assert "head  Linear  left: is already fused with its loss: linear_cross" in str(plan)
    pyfused.convert(model)
    assert type(model(X, TARGET)[0]) is Tensor
    assert pyfused.revert(model) == (".",)
    assert type(model.head) is nn.Linear
    assert vars(model.head).keys() == vars(Model().head).keys()


def test_heads_that_cannot_be_converted() -> None:
    model = Model()
    register_parametrization(model.head, "weight", nn.Identity())
    with pytest.raises(ValueError, match=r"but Model has none, got 'head', a subclass, torch"):
        pyfused.convert(model, head="head")


def test_a_report_names_heads_that_were_never_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "_uncalled", {})  # without those of other tests

    class Uncalled(Model):
        def forward(self, x: Tensor) -> Any:  # type: ignore[override]
            return F.linear(self.emb(x), self.head.weight)

    model = pyfused.convert(Uncalled(), head="head")
    with pyfused.report() as report:
        model(X)
    assert "never called, unless by compiled programs: head of Uncalled" in str(report)
    pyfused.revert(model)
    assert "never called" not in str(report)
    pyfused.convert(model, head="head").head(model.emb(X))
    assert "never called" not in str(report)


class Heads(nn.Module):
    """Several heads of one body, as of models that predict several tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 16)
        self.heads = nn.ModuleList([nn.Linear(16, 30 + i) for i in range(3)])

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.body(x)
        return [head(x) for head in self.heads]


HEADS = [f"heads.{i}" for i in range(3)]


@pytest.mark.parametrize(
    "restore", [lambda x: x, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_several_heads(restore: Any, kernel_calls: KernelCalls) -> None:
    """Each of them has losses and metrics of its own."""
    torch.manual_seed(0)
    plain = Heads()
    x, targets = torch.randn(40, 8), torch.randint(30, (3, 40))
    plan = pyfused.plan_conversion(plain, head=HEADS)
    assert plan.swapped == (".",)
    assert "linear_cross_entropy(16 -> 32) for heads.2" in str(plan)
    model = restore(pyfused.convert(copy.deepcopy(plain), head=HEADS, metrics=True))
    assert pyfused.plan_conversion(model, head=HEADS).left[0].reason == "is already converted"
    gradients = []
    for each in (plain, model):
        losses = [F.cross_entropy(*pair) for pair in zip(each(x), targets, strict=True)]
        sum(losses).backward()  # type: ignore[union-attr]
        gradients.append([*losses, *[parameter.grad for parameter in each.parameters()]])
    assert kernel_calls["row_state"] == 3
    assert_close(gradients[1], gradients[0])
    assert list(model.pyfused_metrics) == HEADS
    for metrics, logits in zip(model.pyfused_metrics.values(), plain(x), strict=True):
        assert torch.equal(metrics.prediction, logits.argmax(1))
    assert pyfused.revert(model) == (".",)
    assert types(model) == types(plain)


def test_some_of_several_heads() -> None:
    """The options of an earlier call's heads change, and others can follow."""
    model: Any = pyfused.convert(Heads(), head=HEADS[:2])
    assert [type(logits) is LazyLogits for logits in model(torch.randn(4, 8))] == [
        True,
        True,
        False,
    ]
    pyfused.convert(model, evaluation=True)
    with torch.no_grad():
        kinds = [type(logits) is LazyLogits for logits in model(torch.randn(4, 8))]
    assert kinds == [True, True, False]
    pyfused.convert(model, head=HEADS)
    assert all(type(logits) is LazyLogits for logits in model(torch.randn(4, 8)))


def test_messages_tell_several_heads_apart() -> None:
    model: Any = Heads()
    for names, got in (([*HEADS, "heads.3"], "'heads.3'"), (["heads.0", "body.0"], "'body.0'")):
        with pytest.raises(ValueError, match=rf"head: expected the name .* got {got}"):
            pyfused.convert(model, head=names)
    with pytest.raises(ValueError, match=r"head: expected None or at least one name, got \[\]"):
        pyfused.convert(model, head=[])
    assert types(model) == types(Heads())
    model.heads[1].register_forward_hook(lambda *_: None)
    with pytest.warns(RuntimeWarning, match=r"Heads computes all .*: heads\.1: its head has hooks"):
        pyfused.convert(model, head=HEADS)
    assert types(model) == types(Heads())
    model = pyfused.convert(Heads(), head=HEADS)
    with pyfused.report() as report:
        model.heads[1](model.body(X.new_zeros(4, 8, dtype=torch.float32)))
    assert "heads.0 of Heads" in str(report)
    assert "heads.1 of Heads" not in str(report)
    model.heads[2].register_forward_hook(lambda *_: None)
    with pytest.warns(RuntimeWarning, match=r"heads\.2 of Heads computes all of its logits"):
        model(torch.randn(4, 8))


def test_a_head_that_was_replaced_after_the_conversion() -> None:
    model: Any = converted()
    base = model.head
    model.head = nn.Linear(8, 40)
    assert pyfused.plan_conversion(model).swapped == (".",)
    pyfused.convert(model)
    assert type(model(X)) is LazyLogits
    model.head = nn.Sequential(base)
    model.head.base_layer = base  # as an adapter of PEFT
    with pytest.warns(RuntimeWarning, match="Model computes all of its logits: its head has an ad"):
        pyfused.convert(model)
    assert type(model.head) is nn.Sequential


@pytest.mark.thresholds
def test_a_parametrized_weight_is_read_once() -> None:
    model, reads = converted(), list[Tensor]()
    register_parametrization(model.head, "weight", nn.Identity())
    model.head.parametrizations.weight[0].register_forward_hook(lambda *a: reads.append(a[-1]))
    model(X, TARGET)
    assert len(reads) == 1


@pytest.mark.parametrize("copied", [nn.Module.train, copy.copy, *COPIES.values()])
def test_steps_of_a_model_and_of_copies(copied: Any, losses: list[Tensor]) -> None:
    plain, model = Model(), copied(converted())
    assert_close(results(model), results(plain))
    assert losses
    losses.clear()
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert pyfused.revert(model) == (".",)
    assert_close(results(model), results(plain), rtol=0, atol=0)
    assert not losses


def test_a_checkpointed_head(losses: list[Tensor]) -> None:
    """Head and loss are recomputed in the backward pass; test_lazy_logits.py checkpoints models."""
    plain, model = Model(), converted()
    for each in (plain, model):
        loss_of = lambda x, head=each.head: F.cross_entropy(head(x).flatten(0, 1), TARGET)  # noqa: E731
        checkpoint(loss_of, each.emb(X), use_reentrant=True).backward()
    assert_close([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])
    assert losses


class Finalised(Model):
    """A model whose deletion closes its file."""

    closed = False

    def __del__(self) -> None:
        self.closed = True


def test_a_model_is_not_finalised_while_it_is_copied() -> None:
    model: Any = pyfused.convert(Finalised(), head="head")
    copies = copy.copy(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert not model.closed
    assert {*map(type, copies)} == {type(model)}


@pytest.mark.filterwarnings("ignore:pyfused.convert")
@pytest.mark.usefixtures("switching")
def test_threads_that_read_the_logits_of_one_call() -> None:
    model = converted()
    readers: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.argmax(-1),
        lambda x: (2.0 * x).view(-1, 40).sum(0),
        lambda x: F.cross_entropy(x.flatten(0, 1), TARGET),
        lambda x: x.transpose(0, 1).float().max(-1).values,
    ]
    expected = [read(Model()(X)) for read in readers]
    with ThreadPoolExecutor(len(readers)) as threads:
        for _ in range(50):
            logits = model(X)
            assert_close([*threads.map(lambda read, x=logits: read(x), readers)], expected)


# Calls of pyfused that receive lazy logits.
RECEIVERS: dict[str, Callable[..., Any]] = {
    "cross_entropy": lambda x: F.cross_entropy(x, TARGET),
    "nll_loss of log_softmax": lambda x: F.nll_loss(F.log_softmax(x, -1), TARGET),
    "modules": lambda x: pyfused.nn.NLLLoss()(pyfused.nn.LogSoftmax(-1)(x), TARGET),
}


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("name", RECEIVERS)
def test_reports_of_fused_losses(name: str, patched: bool) -> None:
    model = converted()
    with pyfused.patch() if patched else contextlib.nullcontext(), pyfused.report() as report:
        RECEIVERS[name](model(X).flatten(0, 1))
    assert report.to_dict()["left_to_torch"] == {}
    assert [*report.to_dict()["operators"]] == ["linear_cross_entropy"]
    explanation = pyfused.explain("cross_entropy", model(X).flatten(0, 1), TARGET)
    assert explanation.op == "linear_cross_entropy"


@pytest.mark.filterwarnings("ignore:pyfused.convert")
def test_reports_of_calls_that_are_left_to_torch() -> None:
    """A call under a mode counts once, and one of an operator that torch lacks has its reason."""
    model = converted()
    logits = model(X).flatten(0, 1)
    with Recording(), pyfused.report() as report:
        pyfused.functional.cross_entropy(logits, TARGET)
    (counts,) = report.to_dict()["left_to_torch"].values()
    assert [*counts.values()] == [1]
    explanation = pyfused.explain("softcap", model(X), 3.0)
    assert explanation.reason == "input is a LazyLogits"


def test_a_call_keeps_no_references() -> None:
    """Logits, hidden states and the model are freed without garbage collection."""
    model: Any = converted()
    gc.disable()
    try:
        logits, loss = model(X, TARGET)
        references = [weakref.ref(x) for x in (logits, model.hidden, logits.value.call, model)]
        loss.backward()
        del logits, model.hidden
        assert [each() for each in references[:3]] == [None] * 3  # the loss keeps nothing
        del model, loss
        assert references[3]() is None
    finally:
        gc.enable()


# ---- modes, metrics and warnings -----------------------------------------------------------------

MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("mode", [*MODES, "frozen"])
@pytest.mark.parametrize("evaluation", [False, True])
def test_evaluation(mode: str, evaluation: bool, training: bool, losses: list[Tensor]) -> None:
    """Without evaluation=True, logits without a gradient are constants, also after a step."""
    model = converted(evaluation=evaluation).train(training)
    model.requires_grad_(mode != "frozen")
    with MODES.get(mode, torch.enable_grad)(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected, (logits, loss) = Model()(X, TARGET), model(X, TARGET)
        assert bool(losses) == (evaluation or (training and mode == "grad"))
        assert loss.requires_grad == (mode == "grad")
        assert_close(loss, expected[1])
        if mode == "inference":  # its tensors have no version
            model.hidden.zero_()
        if losses:
            logits = logits + 0
        for p in model.parameters():
            p.data = 0.9 * p.data
        assert_close(logits, expected[0])


@pytest.mark.parametrize("options", [{}, {"evaluation": True, "metrics": True}])
@pytest.mark.parametrize("mode", [*MODES, "eval"])
def test_meta(mode: str, options: dict[str, bool]) -> None:
    model = converted(**options).to("meta").train(mode != "eval")
    with MODES.get(mode, torch.enable_grad)(), torch.autocast("cpu", torch.bfloat16):
        logits, loss = model(X.to("meta"), TARGET.to("meta"))
    assert (logits.device, logits.shape) == (loss.device, (4, 16, 40))
    assert (loss.is_meta, loss.shape) == (True, ())
    if loss.requires_grad:
        loss.backward()
        assert model.head.weight.grad.shape == (40, 8)


@pytest.mark.parametrize("changed", [nn.Module.train, copy.deepcopy, nn.Module.eval])
def test_metrics(changed: Callable[[Any], Any]) -> None:
    """The metrics equal the function's, for the model's last call."""
    plain, model = Model(), changed(converted(evaluation=True, metrics=True))
    _, expected = pyfused.functional.linear_cross_entropy_with_metrics(
        plain.emb(X).flatten(0, 1), plain.head.weight, TARGET, linear_bias=plain.head.bias
    )
    with torch.set_grad_enabled(model.training):
        model(X, TARGET)
    assert_close(model.pyfused_metrics, expected)
    assert not any(x.requires_grad for x in model.pyfused_metrics)
    assert_close(results(model), results(plain))
    logits = model(X)
    assert model.pyfused_metrics is None  # without a loss
    F.cross_entropy(logits.flatten(0, 1), TARGET)
    assert_close(model.pyfused_metrics, expected)
    assert model.state_dict().keys() == plain.state_dict().keys()
    pyfused.revert(model)
    assert not hasattr(model, "pyfused_metrics")


@pytest.mark.thresholds
def test_metrics_of_few_logits() -> None:
    """A loss with metrics is fused at every size, also of a few rows; others have no metrics."""
    model: Any = converted(metrics=True)
    assert_close(results(model), results(Model()))
    assert model.pyfused_metrics is not None
    logits = model(X).flatten(0, 1)
    F.cross_entropy(logits[:2], TARGET[:2])
    assert len(model.pyfused_metrics[0]) == 2
    with pytest.warns(RuntimeWarning, match="an earlier loss of the same rows"):
        F.cross_entropy(logits, TARGET)
    assert model.pyfused_metrics is None


@pytest.mark.parametrize("budget", [1000, 1, None])
def test_memory_budget(budget: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget of the last call of convert reaches the loss, and changes no results."""
    run = Mock(wraps=lazy_logits.run)
    monkeypatch.setattr(lazy_logits, "run", run)
    model = pyfused.convert(converted(memory_budget=7), memory_budget=budget)
    assert_close(results(model), results(Model()))
    run.assert_called_once()
    assert run.call_args.args[2].memory_budget == budget


@pytest.mark.parametrize(("budget", "error"), [(1.5, TypeError), (0, ValueError)])
def test_invalid_memory_budgets(budget: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="memory_budget: expected"):
        converted(memory_budget=budget)


# ---- torch.compile -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the attribute `hidden`
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_model_is_that_of_torch(strict: bool) -> None:
    plain, model = Model(), converted()
    programs = [torch.export.export(m, (X, TARGET), strict=strict) for m in (plain, model)]
    assert programs[0].graph_module.code == programs[1].graph_module.code
    found = [program.module()(X, TARGET) for program in programs]
    assert_close(found[1], found[0], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")
def test_torch_jit_trace() -> None:
    traced = torch.jit.trace(converted(), (X,))
    assert_close(traced(X), Model()(X))
