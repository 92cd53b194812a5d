"""Converted heads and models keep what they do: copies, options, modes, metrics and compilation."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from compare import Recording
from head_model import TARGET, Model, X
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import register_parametrization
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import pyfused
from pyfused.adopt import lazy_logits
from pyfused.adopt.lazy_logits import LazyLogits
from pyfused.dispatch import reasons

pytestmark = pytest.mark.usefixtures("reset_warnings")


# ---- heads and models ----------------------------------------------------------------------------


def results(model: nn.Module) -> tuple[Tensor, ...]:
    """Returns the loss and the gradients of a batch."""
    model.zero_grad()
    torch.manual_seed(1)
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
    plain, before, after = Model(), Model(), pyfused.convert(Model(), head="head")
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


def test_unsupported_weights() -> None:
    """Tries a weight without elements, as in ZeRO-3, of another class, or on meta."""

    class Quantised(Tensor):
        pass

    model = pyfused.convert(Model(), head="head")
    weight = model.head.weight.detach()
    problems = "has no elements", "is a Quantised", "is on meta, its input on cpu"
    weights = weight[:0], weight.as_subclass(Quantised), weight.to("meta")
    for other, problem in zip(weights, problems, strict=True):
        model.head.weight = nn.Parameter(other)
        warned = pytest.warns(RuntimeWarning, match=f"weight of its head {problem}")
        with warned, contextlib.suppress(RuntimeError):  # raised by torch, because of the bias
            model(X)


@pytest.mark.thresholds
def test_a_head_of_few_logits_computes_them() -> None:
    model = pyfused.convert(Model(), head="head")
    assert type(model(X, TARGET)[0]) is Tensor


def test_print_does_not_compute_logits() -> None:
    model = pyfused.convert(Model(), head="head")
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


def test_a_report_names_heads_that_were_never_called() -> None:
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


def test_a_head_that_was_replaced_after_the_conversion() -> None:
    model: Any = pyfused.convert(Model(), head="head")
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
def test_a_parametrized_weight_is_read_as_often_as_by_torch() -> None:
    reads = list[int]()

    class Counted(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            reads.append(1)
            return weight

    for converts in (False, True):
        model = pyfused.convert(Model(), head="head") if converts else Model()
        register_parametrization(model.head, "weight", Counted())
        reads.clear()
        model(X, TARGET)
        assert len(reads) == 1


class Checkpointed(Model):
    """Recomputes head and loss in the backward pass; test_lazy_logits.py checkpoints models."""

    def forward(self, x: Tensor, target: Tensor) -> Any:  # type: ignore[override]
        def loss_of(hidden: Tensor) -> Tensor:
            return F.cross_entropy(self.head(hidden).flatten(0, 1), target)

        return None, checkpoint(loss_of, self.emb(x), use_reentrant=True)


COPIES: dict[str, tuple[type[Model], Callable[[Any], Any]]] = {
    "itself": (Model, lambda model: model),
    "checkpoint": (Checkpointed, lambda model: model),
    "copy": (Model, copy.copy),
    "deepcopy": (Model, copy.deepcopy),
    "pickle": (Model, lambda model: pickle.loads(pickle.dumps(model))),
}


@pytest.mark.parametrize("name", COPIES)
def test_steps_of_a_model_and_of_copies(name: str, losses: list[Tensor]) -> None:
    kind, copied = COPIES[name]
    plain, model = kind(), copied(pyfused.convert(kind(), head="head"))
    assert_close(results(model), results(plain))
    assert losses
    losses.clear()
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert pyfused.revert(model) == (".",)
    assert_close(results(model), results(plain), rtol=0, atol=0)
    assert not losses


class Finalised(Model):
    """A model that pickles and copies itself, and whose deletion closes its file."""

    used: Any = None
    fused, closed = 0, False

    def __reduce__(self) -> Any:
        self.used(X, TARGET)  # as another thread may do meanwhile
        self.fused += self.used.pyfused_metrics is not None
        return type(self), (), self.state_dict()

    def __setstate__(self, state: Any) -> None:
        self.load_state_dict(state)

    def __del__(self) -> None:
        self.closed = True


def test_a_model_that_is_used_while_it_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = pyfused.convert(Finalised(), head="head", metrics=True)
    monkeypatch.setattr(Finalised, "used", model)
    copies = copy.copy(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert (model.fused, model.closed) == (3, False)
    assert {*map(type, copies)} == {type(model)}


@pytest.mark.filterwarnings("ignore:pyfused.convert")
@pytest.mark.usefixtures("switching")
def test_threads_that_read_the_logits_of_one_call() -> None:
    model = pyfused.convert(Model(), head="head")
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
    model = pyfused.convert(Model(), head="head")
    with pyfused.patch() if patched else contextlib.nullcontext(), pyfused.report() as report:
        RECEIVERS[name](model(X).flatten(0, 1))
    assert report.to_dict()["left_to_torch"] == {}
    assert [*report.to_dict()["operators"]] == ["linear_cross_entropy"]
    explanation = pyfused.explain("cross_entropy", model(X).flatten(0, 1), TARGET)
    assert explanation.op == "linear_cross_entropy"


@pytest.mark.filterwarnings("ignore:pyfused.convert")
def test_reports_of_calls_that_are_left_to_torch() -> None:
    """A call under a mode counts once, and one of an operator that torch lacks has its reason."""
    model = pyfused.convert(Model(), head="head")
    logits = model(X).flatten(0, 1)
    with Recording(), pyfused.report() as report:
        pyfused.functional.cross_entropy(logits, TARGET)
    (counts,) = report.to_dict()["left_to_torch"].values()
    assert [*counts.values()] == [1]
    explanation = pyfused.explain("softcap", model(X), 3.0)
    assert explanation.reason == "input is a LazyLogits"


def test_a_call_keeps_no_references() -> None:
    """Logits, hidden states and the model are freed without garbage collection."""
    model: Any = pyfused.convert(Model(), head="head")
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
    model = pyfused.convert(Model(), head="head", evaluation=evaluation).train(training)
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
    model = pyfused.convert(Model(), head="head", **options).to("meta").train(mode != "eval")
    with MODES.get(mode, torch.enable_grad)(), torch.autocast("cpu", torch.bfloat16):
        logits, loss = model(X.to("meta"), TARGET.to("meta"))
    assert (logits.device, logits.shape) == (loss.device, (4, 16, 40))
    assert (loss.is_meta, loss.shape) == (True, ())
    if loss.requires_grad:
        loss.backward()
        assert model.head.weight.grad.shape == (40, 8)


def test_metrics() -> None:
    """The metrics equal the function's, for the model's last call."""
    plain = Model()
    model: Any = pyfused.convert(Model(), head="head", evaluation=True, metrics=True)
    _, expected = pyfused.functional.linear_cross_entropy_with_metrics(
        plain.emb(X).flatten(0, 1), plain.head.weight, TARGET, linear_bias=plain.head.bias
    )
    for each in (model, copy.deepcopy(model), model.eval()):
        with torch.no_grad() if not each.training else torch.enable_grad():
            each(X, TARGET)
        assert_close(each.pyfused_metrics, expected)
        assert not any(x.requires_grad for x in each.pyfused_metrics)
    assert_close(results(model), results(Model()))
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
    model: Any = pyfused.convert(Model(), head="head", metrics=True)
    assert_close(results(model), results(Model()))
    assert model.pyfused_metrics is not None
    logits = model(X).flatten(0, 1)
    F.cross_entropy(logits[:2], TARGET[:2])
    assert len(model.pyfused_metrics[0]) == 2
    with pytest.warns(RuntimeWarning, match="an earlier loss of the same rows"):
        F.cross_entropy(logits, TARGET)
    assert model.pyfused_metrics is None


def test_memory_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget of the last call of convert reaches every loss, and changes no results."""
    budgets: list[int | None] = []
    run = lazy_logits.run

    def recorded(op: Any, tensors: Any, options: Any, any_size: bool) -> Any:
        budgets.append(options.memory_budget)
        return run(op, tensors, options, any_size)

    monkeypatch.setattr(lazy_logits, "run", recorded)
    expected, model = results(Model()), Model()
    for budget in (1000, 1, None):
        pyfused.convert(model, head="head", memory_budget=budget)
        assert_close(results(model), expected)
    assert budgets == [1000, 1, None]
    for invalid, error in ((1.5, TypeError), (0, ValueError)):
        with pytest.raises(error, match="memory_budget: expected"):
            pyfused.convert(Model(), head="head", memory_budget=invalid)


# ---- torch.compile -------------------------------------------------------------------------------


class BrokenBody(Model):
    """A model whose graph breaks before the head, whose forward is then compiled separately."""

    def forward(self, x: Tensor, target: Tensor) -> Any:  # type: ignore[override]
        hidden = self.emb(x)
        torch._dynamo.graph_break()
        logits = self.head(hidden)
        return logits, F.cross_entropy(logits.flatten(0, 1), target)


@pytest.mark.filterwarnings("ignore")  # raised by Dynamo
@pytest.mark.parametrize("kind", [Model, BrokenBody])
def test_a_compiled_model_is_that_of_torch(kind: type[Model]) -> None:
    """Conversion does not change the graphs, logits, loss and gradients of a compiled model."""
    found: list[Any] = []
    for convert in (False, True):
        torch.compiler.reset()
        graphs: list[int] = []

        def backend(program: Any, _: Any, graphs: list[int] = graphs) -> Any:
            graphs.append(sum(node.op == "call_function" for node in program.graph.nodes))
            return program.forward

        model: Any = kind()
        if convert:
            pyfused.convert(model, head="head", metrics=True)
            model(X, TARGET)
            assert model.pyfused_metrics is not None
        logits, loss = torch.compile(model, backend=backend, fullgraph=kind is Model)(X, TARGET)
        assert type(logits) is Tensor
        gradients = torch.autograd.grad(loss, [*model.parameters()])
        found.append((logits.detach(), loss.detach(), gradients, graphs))
    assert model.pyfused_metrics is None
    assert_close(found[1], found[0], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the attribute `hidden`
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_model_is_that_of_torch(strict: bool) -> None:
    plain, model = Model(), pyfused.convert(Model(), head="head")
    programs = [torch.export.export(m, (X, TARGET), strict=strict) for m in (plain, model)]
    assert programs[0].graph_module.code == programs[1].graph_module.code
    found = [program.module()(X, TARGET) for program in programs]
    assert_close(found[1], found[0], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")
def test_torch_jit_trace() -> None:
    traced = torch.jit.trace(pyfused.convert(Model(), head="head"), (X,))
    assert_close(traced(X), Model()(X))
