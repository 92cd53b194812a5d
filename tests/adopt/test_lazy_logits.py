"""A converted head does not change results, whatever a model's forward does with its logits."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import operator
import pickle
import random
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.utils.prune
from compare import FLOATS
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import pyfused
from pyfused.adopt import lazy_logits
from pyfused.adopt.lazy_logits import HeadCall, LazyLogits
from pyfused.dispatch import reasons

CLASSES, FEATURES = 23, 6


class Doubled(torch.autograd.Function):
    """An autograd function of another library, which ``__torch_function__`` does not see."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:  # noqa: ARG004
        return 3 * grad_output


# ---- drawn models --------------------------------------------------------------------------------


class Drawn(nn.Module):
    """A model with random forwards: views, in-place changes, reads, and losses of its logits."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        torch.manual_seed(seed)
        self.emb = nn.Embedding(11, FEATURES)
        self.head = nn.Linear(FEATURES, CLASSES, bias=draw.random() < 0.5)
        if draw.random() < 0.15:
            self.head.requires_grad_(False)
        elif draw.random() < 0.1:
            self.emb.requires_grad_(False)
        self.to(draw.choice([torch.float64, torch.float64, torch.float32]))
        self.reads = draw.random() < 0.4

    def forward(self, tokens: Tensor, seed: int) -> tuple[Tensor, list[Tensor], Tensor]:
        """Returns the loss, what was read, and some of the logits."""
        draw, seen, losses = random.Random(seed), [], []
        if self.head.bias is not None:
            # For more dimensions, the reference is a view. If it is changed in place, torch drops
            # its hooks, and parts of its gradient.
            tokens = tokens.flatten()
        family = [self.head(self.emb(tokens).tanh())]
        for _ in range(draw.choice([0, 1, 2, 3, 5, 8])):
            place = draw.randrange(len(family))
            x = family[place]
            if self.reads and draw.random() < 0.33:
                family.append(read(x, draw, seen))
            else:
                family.append(draw.choice(draw.choice(LAZY))(x, draw.choice(FACTORS)))
            if draw.random() < 0.3:
                family[place] = family[-1]
            if draw.random() < 0.1:
                family.append(self.head(self.emb(tokens)))
            if draw.random() < 0.2:
                losses.append(loss_of(draw.choice(family), draw, False))
        number = draw.choice([1, 1, 2])
        losses += [loss_of(draw.choice(family), draw, self.reads) for _ in range(number)]
        return torch.stack([x.double() for x in losses]).sum(), seen, draw.choice(family)


def of_many(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor, float], Tensor]:
    """Returns an operator that leaves tensors of few elements or one dimension as they are."""
    return lambda x, _: change(x) if x.dim() > 1 and min(x.shape) > 1 else x


def mask_of(x: Tensor, dimensions: int) -> Tensor:
    leading = x.shape[:dimensions]
    return torch.arange(leading.numel()).view(leading) % 4 != 1


def constant(x: Tensor) -> Tensor:
    return torch.linspace(-1, 2, x.shape[-1], dtype=x.dtype)


INDEX = torch.tensor([1, 0, 1])
FACTORS = 2, 0.5, 3.0, 1.25, 1, 0.1
VIEWS: list[Callable[[Tensor, float], Tensor]] = [
    lambda x, _: x.view(-1, *x.shape[-1:]),
    lambda x, _: x.view(size=(-1, *x.shape[-1:])),
    lambda x, _: x.reshape(*x.shape[:-1], -1) if x.numel() else x,
    lambda x, _: torch.reshape(x, (-1, *x.shape[-1:])),
    lambda x, _: x.flatten(start_dim=0, end_dim=-2) if x.dim() > 1 else x,
    lambda x, _: x.unsqueeze(0),
    lambda x, _: x.squeeze(0),
    lambda x, _: x.contiguous(),
]
# Operators that keep logits lazy, at least in some calls.
LAZY: list[list[Callable[[Tensor, float], Tensor]]] = [
    VIEWS,
    VIEWS,
    [
        of_many(lambda x: x.transpose(0, -1)),
        of_many(lambda x: x.movedim(-1, 1)),
        of_many(lambda x: x.permute(*range(x.dim())[::-1])),
        of_many(lambda x: torch.swapaxes(x, -1, -2)),
        of_many(lambda x: x.mT),
    ],
    [
        of_many(lambda x: x[..., :-1, :]),
        of_many(lambda x: x[1:]),
        of_many(lambda x: x[:, :2, ...]),
        of_many(lambda x: x[0]),
        of_many(lambda x: x[-1:, ...]),
        of_many(lambda x: x[::2]),
        of_many(lambda x: x[:, :, 1:] if x.dim() > 2 else x[..., :, :]),
        of_many(lambda x: x[..., :-1]),
    ],
    [
        of_many(lambda x: x[mask_of(x, 1)]),
        of_many(lambda x: x[mask_of(x, x.dim() - 1)]),
        of_many(lambda x: x[mask_of(x, x.dim() - 1).nonzero(as_tuple=True)]),
        of_many(lambda x: x[INDEX]),
        of_many(lambda x: x[INDEX, INDEX] if x.dim() > 2 else x[(INDEX,)]),
        of_many(lambda x: x[INDEX.view(1, 3).expand(2, 3)]),
    ],
    [
        lambda x, _: x + constant(x),
        lambda x, _: torch.add(x, constant(x).view((1,) * (x.dim() - 1) + x.shape[-1:])),
    ],
    [
        lambda x, by: by * x,
        lambda x, by: x / by,
        lambda x, by: torch.div(x, by),
        lambda x, by: torch.mul(x, by),
        lambda x, by: torch.tanh(x / by) * by,
        lambda x, _: x.tanh(),
    ],
    [
        lambda x, _: x.float(),
        lambda x, _: x.to(dtype=torch.float32),
        lambda x, _: x.to(x.device),
        lambda x, _: x.double(),
    ],
]
IN_PLACE: list[Callable[[Tensor, float], Any]] = [
    lambda x, by: x.mul_(by),
    lambda x, _: x.masked_fill_(x > 1, 0.5),
    lambda x, _: F.relu_(x),
    lambda x, _: operator.setitem(x, (..., 0), -1.5) or x,
    operator.imul,
    lambda x, by: torch.no_grad()(x.mul_)(by),
]


def hooked(x: Tensor) -> Tensor:
    if x.grad_fn is not None:  # torch crashes for views changed under no_grad
        x.register_hook(lambda grad: grad * 2)
    return x


READS: list[Callable[[Tensor], Tensor]] = [
    lambda x: x.argmax(-1),
    lambda x: x.detach().sum(),
    lambda x: x.clone(),
    lambda x: x * torch.tensor(1.5),
    lambda x: -x,
    lambda x: x * -2,
    lambda x: x.log_softmax(-1),
    lambda x: x[None, ..., None],
    lambda x: x[..., torch.tensor([0, 2])],
    lambda x: torch.cat([x, x]),
    Doubled.apply,
    lambda x: checkpoint(torch.sigmoid, x, use_reentrant=x.dim() > 2),
    lambda x: torch.func.vmap(torch.sigmoid)(x),
    hooked,
]


def read(x: Tensor, draw: random.Random, seen: list[Tensor]) -> Tensor:
    """Returns the result of an operator that reads logits, or of a change in place."""
    kind = draw.randrange(5)
    if kind == 0:
        return draw.choice(IN_PLACE)(x, draw.choice(FACTORS))  # type: ignore[no-any-return]
    if kind == 1:
        with torch.no_grad() if draw.random() < 0.7 else torch.inference_mode():
            change = draw.choice([*draw.choice(LAZY), lambda x, _: draw.choice(READS)(x)])
            seen.append(change(x, 2).clone())
        return x
    if kind == 2 and draw.random() < 0.3:
        x.retain_grad()
        result = x
    else:
        result = draw.choice(READS)(x)
        if result.requires_grad:
            return result
    seen.append(result)
    return x


def loss_of(x: Tensor, draw: random.Random, anything: bool) -> Tensor:
    if CLASSES in x.shape and draw.random() < 0.9:
        x = x.movedim(x.shape.index(CLASSES), -1)
    classes = x.shape[-1]
    rows = x.reshape(-1, classes)
    generator = torch.Generator().manual_seed(draw.getrandbits(30))
    index = torch.randint(classes, (len(rows),), generator=generator)
    options: dict[str, Any] = {"reduction": draw.choice(["mean", "mean", "sum", "none"])}
    if draw.random() < 0.5:
        options["ignore_index"] = draw.choice([-100, 0])
        index[::3] = options["ignore_index"]
    if draw.random() < 0.3:
        options["label_smoothing"] = 0.1
    weight = torch.linspace(0.5, 1.5, classes, dtype=rows.dtype)
    if draw.random() < 0.2:
        options["weight"] = weight
    losses: list[Callable[[], Tensor]] = [
        lambda: F.cross_entropy(rows, index, **options),
        lambda: nn.CrossEntropyLoss(**options)(rows, index),
        lambda: F.cross_entropy(input=rows, target=index, **options),
        lambda: pyfused.functional.cross_entropy(rows, index, **options),
    ]
    if "label_smoothing" not in options:
        losses += [
            lambda: F.nll_loss(F.log_softmax(rows, -1), index, **options),
            lambda: nn.NLLLoss(**options)(nn.LogSoftmax(-1)(rows), index),
            lambda: F.nll_loss(x.log_softmax(-1).view(-1, classes), index, **options),
        ]
    if x.dim() > 2:
        places = index.view(x.shape[:-1])
        losses += [lambda: F.cross_entropy(x.movedim(-1, 1), places, **options)] * 2
    if anything and draw.random() < 0.5:
        losses = [
            lambda: F.cross_entropy(rows, index, weight=weight),
            lambda: F.cross_entropy(rows.t()[None], index[None], **options),
            lambda: rows.logsumexp(-1),
            lambda: F.cross_entropy(rows, rows.detach().softmax(-1)),
            lambda: F.cross_entropy(rows[0], index[0].clamp(min=0)),
            lambda: pyfused.functional.cross_entropy(rows, index, z_loss=0.1),
            lambda: checkpoint(F.cross_entropy, rows, index, use_reentrant=draw.random() < 0.5),
        ]
    return draw.choice(losses)().sum()


@contextlib.contextmanager
def drawn_modes(draw: random.Random, model: Drawn) -> Any:
    """Draws the modes of a call: training, gradients, autocast and hooks of saved tensors."""
    model.train(draw.random() < 0.8)
    mode = draw.choice([torch.enable_grad] * 3 + [torch.no_grad, torch.inference_mode])
    saved = torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach().clone(), lambda x: x)
    without = torch.autograd.graph.disable_saved_tensors_hooks("disabled")
    nothing = contextlib.nullcontext()
    hooked = draw.choice([nothing] * 10 + [saved, without])
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=draw.random() < 0.1)
    with mode() if not model.training else nothing, hooked, autocast:
        yield hooked is nothing


def step(model: Drawn, draw: random.Random, is_reference: bool) -> tuple[Any, list[Any]]:
    """Returns the error of a call, or whether it was in autocast, and its results and gradients."""
    model.zero_grad()
    tokens = torch.arange(12).view(3, 4) % draw.choice([7, 11])
    # A checkpoint hides from torch that a saved tensor was changed in place.
    checkpointed = draw.random() < 0.1 and not is_reference
    gradients: list[Any] = []
    try:
        with drawn_modes(draw, model) as unhooked:
            autocast = torch.is_autocast_enabled("cpu")
            whole: Any = partial(checkpoint, model, use_reentrant=False)
            call = whole if checkpointed and unhooked else model
            loss, read, kept = call(tokens, draw.getrandbits(60))
            total = loss.square()
            if draw.random() < 0.3:
                total = total + kept.double().square().mean()
            if draw.random() < 0.1 and total.requires_grad and kept.grad_fn is not None:
                gradients += torch.autograd.grad(total, kept, retain_graph=True, allow_unused=True)
        results = [x.clone() for x in (loss, *read, *([kept] if draw.random() < 0.5 else []))]
        if total.requires_grad:
            total.backward()
    except Exception as error:
        return error, []
    gradients += [p.grad for p in model.parameters()]
    gradients += [x.grad for x in read if x.requires_grad and not x.is_leaf]
    return None, [autocast, *results, *gradients]


def compare(seed: int, calls: int = 4) -> Counter[str]:
    """Compares calls of a drawn model with its conversion; counts how losses were computed."""
    plain, model = Drawn(seed), Drawn(seed)
    pyfused.convert(model, head="head", evaluation=seed % 3 > 0, metrics=seed % 4 == 0)
    return Counter(compare_call(plain, model, 1000 * seed + number) for number in range(calls))


def compare_call(plain: Drawn, model: Drawn, seed: int) -> str:
    """Compares one call; returns how its loss was computed."""
    fused: list[HeadCall] = []
    loss = HeadCall.loss

    def counted(call: HeadCall, *args: Any, **options: Any) -> Tensor:
        fused.append(call)
        return loss(call, *args, **options)

    expected_error, expected = step(plain, random.Random(seed), True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeadCall, "loss", counted)
        error, found = step(model, random.Random(seed), False)
    if str(error).startswith("pyfused.convert: expected"):
        return "refused"  # unsupported uses of logits
    where = f"call {seed}: {expected_error!r} became {error!r}"
    if expected and expected[1].isnan():
        return "error"  # all targets are ignored; the kernel's gradient is 0
    if "modified by an inplace operation" in str(expected_error) and error is None:
        return "error"  # a fused loss saves fewer tensors than torch's
    assert type(error) is type(expected_error), where
    if error is not None:
        return "error"
    autocast = found.pop(0)
    assert autocast == expected.pop(0)
    coarse = autocast or model.head.weight.dtype is torch.float32
    rtol, atol = (0.05, 0.02) if autocast else (1e-3, 1e-4) if coarse else (1e-4, 1e-5)
    for ours, theirs in zip(found, expected, strict=True):
        if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
            assert ours.requires_grad == theirs.requires_grad, where
            largest = float(theirs.detach().abs().max()) if theirs.numel() else 0.0
            scaled = atol * max(1.0, largest if autocast else 1.0)  # bfloat16 rounds terms
            torch.testing.assert_close(
                *(ours.detach().clone(), theirs.detach().clone()),
                rtol=rtol,
                atol=scaled,
                equal_nan=True,
                msg=lambda text: f"{where}: {text}",
            )
        else:
            assert ours is theirs is None, where
    return "without logits" if any(not call.computed for call in fused) else "with logits"


@pytest.mark.filterwarnings("ignore:pyfused.convert")
@pytest.mark.parametrize("first", range(0, 120, 40))
def test_drawn_forwards(first: int) -> None:
    found = sum((compare(seed) for seed in range(first, first + 40)), Counter())
    assert found["without logits"] >= 15, found
    assert found["with logits"] >= 40, found
    assert found["refused"] <= 40, found


# ---- heads and models ----------------------------------------------------------------------------

X, TARGET = torch.arange(64).view(4, 16) % 50, torch.arange(64) % 40
PLACES = TARGET.view(4, 16)


def _keep(_: Any, logits: Tensor) -> Tensor:
    return logits


class Model(nn.Module):
    """A model whose forward calls the given function with itself and its logits."""

    def __init__(self, change: Any = _keep) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.emb, self.head = nn.Embedding(50, 8), nn.Linear(8, 40)
        self.bias, self.change = nn.Buffer(torch.linspace(-1, 1, 40)[None]), change

    def forward(self, x: Tensor, target: Tensor | None = None) -> Any:
        self.hidden: Tensor = 1 * self.emb(x)
        logits = self.change(self, self.head(self.hidden))
        if target is None:
            return logits
        return logits, F.cross_entropy(logits.reshape(-1, logits.shape[-1]), target)


@pytest.fixture(autouse=True)
def untold() -> None:
    """Lets each test receive the warnings that other tests have received."""
    reasons._reported.clear()


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Counts the losses that were computed without logits."""
    found: list[Tensor] = []
    loss = HeadCall.loss
    monkeypatch.setattr(
        HeadCall, "loss", lambda *args, **options: found.append(loss(*args, **options)) or found[-1]
    )
    return found


def results(model: nn.Module) -> tuple[Tensor, ...]:
    """Returns the loss and the gradients of a batch."""
    model.zero_grad()
    torch.manual_seed(1)
    loss = model(X, TARGET)[1]
    loss.backward()
    return loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)


class DropConnect(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return F.dropout(weight, 0.5)


class Twice(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def parametrised(head: Any) -> None:
    nn.utils.parametrize.register_parametrization(head, "weight", DropConnect())


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "forward": (lambda h: setattr(h, "forward", lambda x: 9 * x @ h.weight.t()), "replaced"),
    "hook": (lambda h: h.register_forward_hook(lambda *a: 2 * a[-1]), "hooks"),
    "pre-hook": (lambda h: h.register_forward_pre_hook(lambda _, a: (2 * a[0],)), "hooks"),
    "backward": (lambda h: h.register_full_backward_hook(lambda *a: (3 * a[1][0],)), "hooks"),
    "pruned": (lambda h: nn.utils.prune.l1_unstructured(h, "weight", 0.5), "hooks"),
    "class": (lambda h: setattr(h, "__class__", Twice), f"is a {__name__}.Twice, not a plain"),
    "parametrised": (parametrised, "ParametrizedLinear, not a plain torch.nn.Linear"),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_head_with_a_modified_forward(name: str, when: str) -> None:
    change, reason = CHANGES[name]
    plain, model = Model(), Model()
    change(plain.head)
    # A subclass replaces the forward or its weight, an attribute the call of the forward.
    silent = name in ("parametrised", "class") or (name, when) == ("forward", "after")
    warned = pytest.warns(RuntimeWarning, match=f"Model computes all of its logits:.*{reason}")
    if when == "after":
        pyfused.convert(model, head="head")
        change(model.head)
        with contextlib.nullcontext() if silent else warned:
            results(model)
    elif silent:
        change(model.head)
        with pytest.raises(ValueError, match=r"name of a torch\.nn\.Linear, .* none, got"):
            pyfused.convert(model, head="head")
    else:
        change(model.head)
        assert reason in pyfused.plan_conversion(model, head="head").left[0].reason
        with warned:
            pyfused.convert(model, head="head")
    torch.testing.assert_close(results(model), results(plain))  # without a second warning


def test_a_global_hook() -> None:
    plain, model = Model(), pyfused.convert(Model(), head="head")
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, _, output: 2 * output if isinstance(module, nn.Linear) else None
    )
    try:
        torch.testing.assert_close(results(model), results(plain))
    finally:
        hook.remove()


def test_unsupported_weights() -> None:
    """Tries a weight without elements, as in ZeRO-3, of another class, or on meta."""

    class Quantised(Tensor):
        pass

    model = pyfused.convert(Model(), head="head")
    weight = model.head.weight.detach()
    for other, reason in (
        (weight[:0], "has no elements"),
        (weight.as_subclass(Quantised), "is a Quantised"),
        (weight.to("meta"), "is on meta, its input on cpu"),
    ):
        model.head.weight = nn.Parameter(other)
        warned = pytest.warns(RuntimeWarning, match=f"weight of its head {reason}")
        with warned, contextlib.suppress(RuntimeError):  # raised by torch, because of the bias
            model(X)


@pytest.mark.thresholds
def test_a_head_of_few_logits_computes_them() -> None:
    model = pyfused.convert(Model(), head="head")
    assert type(model(X, TARGET)[0]) is Tensor


def test_converting_again_changes_the_options() -> None:
    model: Any = Model()
    with pytest.raises(ValueError, match=r"head: expected the name .* one of \['head'\], got 'x'"):
        pyfused.convert(model, head="x")
    assert pyfused.plan_conversion(model).swapped == ()
    assert pyfused.plan_conversion(model, head="head").swapped == (".",)
    pyfused.convert(model, head="head")
    pyfused.convert(model)
    pyfused.convert(model, evaluation=True, metrics=True)
    assert type(model.eval()(X, TARGET)[0]) is LazyLogits
    assert model.pyfused_metrics is not None
    assert pyfused.plan_conversion(model).left[0] == (".", "Model", "is already converted")
    pyfused.convert(model, head="head")
    assert type(model(X, TARGET)[0]) is Tensor
    assert pyfused.revert(model) == (".",)
    assert type(model.head) is nn.Linear
    assert vars(model).keys() == vars(Model()).keys() | {"hidden"}
    assert vars(model.head).keys() == vars(Model().head).keys()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint(reentrant: bool, losses: list[Tensor]) -> None:
    class Checkpointed(Model):
        def forward(self, x: Tensor, target: Tensor) -> Any:  # type: ignore[override]
            def loss_of(hidden: Tensor) -> Tensor:
                return F.cross_entropy(self.head(hidden).flatten(0, 1), target)

            return None, checkpoint(loss_of, self.emb(x), use_reentrant=reentrant)

    expected, model = results(Checkpointed()), pyfused.convert(Checkpointed(), head="head")
    torch.testing.assert_close(results(model), expected)
    assert losses


COPIES: dict[str, Callable[[Any], Any]] = {
    "itself": lambda model: model,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies(name: str, losses: list[Tensor]) -> None:
    plain, model = Model(), pyfused.convert(Model(), head="head")
    model = COPIES[name](model)
    torch.testing.assert_close(results(model), results(plain))
    assert losses
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert pyfused.revert(model) == (".",)
    assert type(model(X, TARGET)[0]) is Tensor


# Calls of pyfused that receive lazy logits.
RECEIVERS: dict[str, Callable[..., Any]] = {
    "cross_entropy": lambda x: F.cross_entropy(x, TARGET),
    "nll_loss of log_softmax": lambda x: F.nll_loss(F.log_softmax(x, -1), TARGET),
    "module": lambda x: pyfused.nn.CrossEntropyLoss()(x, TARGET),
    "modules": lambda x: pyfused.nn.NLLLoss()(pyfused.nn.LogSoftmax(-1)(x), TARGET),
    "explain": lambda x: str(pyfused.explain("cross_entropy", x, TARGET)),
}


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("name", RECEIVERS)
def test_reports_of_fused_losses(name: str, patched: bool) -> None:
    model = pyfused.convert(Model(), head="head")
    with pyfused.patch() if patched else contextlib.nullcontext(), pyfused.report() as report:
        explained = RECEIVERS[name](model(X).flatten(0, 1))
    assert report.to_dict()["left_to_torch"] == {}
    assert [*report.to_dict()["operators"]] == ["linear_cross_entropy"]
    if name == "explain":
        assert explained.startswith("linear_cross_entropy: cpu")


def test_a_call_keeps_no_references() -> None:
    """Logits, hidden states and the model are freed without garbage collection."""
    kept: list[Any] = []

    def keep(model: Any, logits: Tensor) -> Tensor:
        kept.extend((weakref.ref(logits), weakref.ref(model.hidden)))
        del model.hidden
        return logits.view(-1, 40)

    model = pyfused.convert(Model(keep), head="head")
    gc.disable()
    try:
        results(model)
        assert [each() for each in kept] == [None, None]
        freed = weakref.ref(model)
        del model
        assert freed() is None
    finally:
        gc.enable()


# ---- operators -----------------------------------------------------------------------------------


def of_rows(change: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda m, x: F.cross_entropy(change(m, x).reshape(-1, 40), TARGET)


# Ways to move the classes of logits (B, T, C) behind the first dimension.
CHANNELS: list[Callable[[Tensor], Tensor]] = [
    lambda x: x.transpose(1, 2),
    lambda x: torch.permute(x, (0, 2, 1)),
    lambda x: x.mT,
    lambda x: x.movedim(-1, 1).contiguous(),
    lambda x: x.view(4, 4, 4, 40).permute(0, 3, 1, 2),
    lambda x: x.view(4, 4, 4, 40).transpose(1, 3).transpose(2, 3),
    lambda x: x.view(4, 4, 4, 40).movedim(3, 1).flatten(2),
    lambda x: x.transpose(0, 1).transpose(1, 2).permute(2, 1, 0),
    lambda x: x.view(-1, 40).t().unsqueeze(0),
]


def of_channels(move: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """Returns the losses of each position, by their shape, with all options."""

    def loss_of(model: Any, logits: Tensor) -> Tensor:
        moved = move(logits)
        target = PLACES.reshape(moved.shape[0], *moved.shape[2:])
        options = {"weight": 1.5 + model.bias[0], "ignore_index": 3, "label_smoothing": 0.1}
        losses = F.cross_entropy(moved, target, **options, reduction="none")
        assert losses.shape == target.shape
        factors = torch.linspace(0, 1, 64, dtype=losses.dtype).view(losses.shape)
        return (losses * factors).sum() + F.cross_entropy(moved, target)

    return loss_of


# Losses of a model's logits, and the operator that reads the logits; None if the loss is fused.
OPERATORS: dict[str, tuple[Callable[..., Tensor], str | None]] = {
    "bias": (of_rows(lambda m, x: x + m.bias), None),
    "class weights": (
        lambda m, x: F.cross_entropy(
            x.view(-1, 40), TARGET, 1.5 + m.bias[0], ignore_index=3, label_smoothing=0.1
        ),
        None,
    ),
    "mask": (lambda m, x: F.cross_entropy(x[X % 3 == 0], PLACES[X % 3 == 0]), None),
    "rows": (lambda m, x: F.cross_entropy(x[torch.arange(4), TARGET[:4]], TARGET[:4]), None),
    "log_softmax": (lambda m, x: F.nll_loss(x.log_softmax(-1).view(-1, 40), TARGET), None),
    "mul": (of_rows(lambda m, x: x.mul(other=0.5)), None),
    "div": (of_rows(lambda m, x: torch.true_divide(x, other=2.0)), None),
    "to": (of_rows(lambda m, x: x.to(x.device, x.dtype, non_blocking=True)), None),
    **{f"moved {i}": (of_channels(each), None) for i, each in enumerate(CHANNELS)},
    "moved log_softmax": (
        lambda m, x: F.nll_loss(x.mT.log_softmax(1), PLACES, ignore_index=3),
        None,
    ),
    "moved, sliced": (lambda m, x: F.cross_entropy(x.mT[..., :-1], PLACES[:, 1:]), None),
    "moved bias": (
        lambda m, x: F.cross_entropy((x.view(-1, 40)[:40].t() + m.bias[0]).t(), TARGET[:40]),
        "add",
    ),
    "chunk": (of_rows(lambda m, x: torch.cat(x.chunk(2, 1), 1)), "chunk"),
    "split": (of_rows(lambda m, x: torch.cat(x.split(8, 1), 1)), "split"),
    "unbind": (of_rows(lambda m, x: torch.stack(x.unbind(1), 1)), "unbind"),
    "mul of keywords": (of_rows(lambda m, x: torch.mul(input=x, other=0.5)), "mul"),
    "rounded": (of_rows(lambda m, x: x.div(2.0, rounding_mode="trunc") + x), "div"),
    "alpha": (of_rows(lambda m, x: torch.add(x, m.bias, alpha=2)), "add"),
    "NumPy": (of_rows(lambda m, x: np.float32(0.5) * x), "r?mul"),
    "unpacked": (of_rows(lambda m, x: torch.cat([*x])), "unbind"),
    "add of a gradient": (of_rows(lambda m, x: x + m.emb.weight[:40, 0]), "add"),
    "nll_loss": (lambda m, x: F.nll_loss(x.view(-1, 40), TARGET), "nll_loss"),
    "cross_entropy": (of_rows(lambda m, x: x.log_softmax(-1)), "cross_entropy"),
    "log_softmax of positions": (of_rows(lambda m, x: x.log_softmax(1)), "log_softmax"),
    "view": (of_rows(lambda m, x: x.view(torch.int64).view(torch.float64)), "view"),
    "indexing": (of_rows(lambda m, x: x[:, :, None][:, :, 0] + x[..., :40]), "indexing"),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name: str, losses: list[Tensor]) -> None:
    """An operator keeps the logits lazy, or reads them, which one warning reports."""
    change, reader = OPERATORS[name]

    def loss_of(model: Any) -> list[Tensor]:
        loss = change(model, model(X)) + model.head.weight.sum()
        leaves = [*model.parameters()]
        return [loss, *torch.autograd.grad(loss, leaves, allow_unused=True)]

    plain = Model().double()
    model = pyfused.convert(copy.deepcopy(plain), head="head")
    for number in range(2):
        warns = reader is not None and number == 0
        warned: Any = contextlib.nullcontext([])
        if warns:
            warned = pytest.warns(RuntimeWarning, match=f"its logits are read by {reader}")
        with warned as messages:
            found = loss_of(model)
        torch.testing.assert_close(found, loss_of(plain), rtol=1e-9, atol=1e-9)
        assert not warns or messages[0].filename == __file__
    assert bool(losses) == (reader is None)


def autocast(dtype: torch.dtype | None) -> Any:
    return torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)


@pytest.mark.parametrize("casts", [False, True])
@pytest.mark.parametrize("of_loss", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_model", [None, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:pyfused.convert")
def test_class_weights_of_any_dtype(
    of_model: torch.dtype | None,
    of_loss: torch.dtype | None,
    casts: bool,
    losses: list[Tensor],
) -> None:
    """Compares dtypes, values and errors; the model and its loss may be in autocast."""

    def outcome(model: Any, weight: Tensor, logs: bool) -> Any:
        with autocast(of_model):
            logits = model(X).view(-1, 40)
        logits = logits.float() if casts else logits
        with autocast(of_loss):
            try:
                if logs:
                    return F.nll_loss(logits.log_softmax(-1), TARGET, weight)
                return F.cross_entropy(logits, TARGET, weight)
            except RuntimeError as error:
                return str(error)

    for dtype, of_weight in itertools.product((torch.float32, torch.bfloat16), FLOATS):
        weight = torch.linspace(0.5, 1.5, 40).to(of_weight)
        models = Model().to(dtype), pyfused.convert(Model().to(dtype), head="head")
        found = [outcome(model, weight, logs) for model in models for logs in (False, True)]
        for expected, ours in zip(found[:2], found[2:], strict=True):
            if isinstance(expected, Tensor):
                torch.testing.assert_close(ours, expected, rtol=2e-2, atol=1e-2)
            else:
                assert ours == expected
        if of_weight is torch.float32 and (casts or of_loss is not None):
            assert losses
        losses.clear()


@pytest.mark.parametrize("options", [{}, {"ignore_index": None}], ids=["dtype", "ignore_index"])
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
@pytest.mark.filterwarnings("ignore:pyfused.convert")
def test_torchs_errors(options: dict[str, Any], dtype: torch.dtype) -> None:
    errors = []
    for model in (Model(), pyfused.convert(Model(), head="head")):
        with pytest.raises((RuntimeError, TypeError)) as raised:
            F.cross_entropy(model(X).flatten(0, 1), TARGET.to(dtype), **options)
        errors.append((raised.type, str(raised.value)))
    assert errors[0] == errors[1]


# ---- when logits can be read ---------------------------------------------------------------------

ADVICE = (
    r"before `backward\(\)`, pass metrics=True to pyfused.convert, or call pyfused.revert\(model\)"
)


def fused_loss(logits: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), TARGET, **options)


READERS: list[Callable[[Tensor], Any]] = [
    lambda logits: logits.argmax(-1),
    lambda logits: (logits[:, :2].detach() * 2).argmax(-1),
    lambda logits: logits[X % 3 == 0],
    lambda logits: logits.detach().numpy(),
    lambda logits: pickle.dumps(logits),
    lambda logits: Doubled.apply(logits).sum(),
    lambda logits: logits.mul_(2),
    fused_loss,
    lambda logits: F.cross_entropy(logits.mT, PLACES),
]


def assert_refused(logits: Tensor, problem: str) -> None:
    """Checks that views and metadata are available, and that a read of values is an error."""
    assert logits.flatten(0, 1).float().shape == (64, 40)
    for read in READERS:
        with pytest.raises(RuntimeError, match=f"logits of Model .*, got {problem}.*{ADVICE}"):
            read(logits)


def in_a_thread(function: Callable[[], Any]) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def twice(_: Any, loss: Tensor) -> None:
    loss.backward(retain_graph=True)
    loss.backward()


# Backward passes of a loss of a model with a trained parameter `leaf`.
BACKWARDS: dict[str, Callable[[Any, Tensor], Any]] = {
    "backward": lambda _, loss: loss.backward(),
    "retain_graph": lambda _, loss: loss.backward(retain_graph=True),
    "twice": twice,
    "grad": lambda model, loss: torch.autograd.grad(loss, model.leaf),
    "create_graph": lambda model, loss: torch.autograd.grad(loss, model.leaf, create_graph=True),
    "inputs": lambda model, loss: loss.backward(inputs=[model.leaf]),
    "thread": lambda _, loss: in_a_thread(loss.backward),
    "sum": lambda model, loss: (loss / 2 + fused_loss(model(X))).backward(),
    "in place": lambda _, loss: loss.div_(2).backward(),
}


@pytest.mark.parametrize("trained", ["", "emb", "head"])
@pytest.mark.parametrize("name", BACKWARDS)
def test_the_backward_pass_of_a_loss_ends_its_logits(name: str, trained: str) -> None:
    """Neither hidden states nor the weight have to need a gradient; other calls do not end."""
    model: Any = pyfused.convert(Model(), head="head", metrics=len(name) % 2 == 0)
    model.requires_grad_(False).get_submodule(trained).requires_grad_(True)
    model.leaf = next(p for p in model.parameters() if p.requires_grad)
    logits, other = model(X), model(X)
    loss = fused_loss(logits)
    fused_loss(logits)  # without a backward pass
    BACKWARDS[name](model, loss)
    assert_refused(logits, "a read after it")
    with pytest.warns(RuntimeWarning, match="logits are read by clone"):
        torch.testing.assert_close(other.clone(), Model()(X))


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "vector": lambda x: fused_loss(x, reduction="none").sum(),
    "view": lambda x: F.cross_entropy(x[:, :4].mT, PLACES[:, :4]),
    "rows": lambda x: F.cross_entropy(x[X % 3 == 0], PLACES[X % 3 == 0]),
    "nll_loss": lambda x: F.nll_loss(x.log_softmax(-1).flatten(0, 1), TARGET),
    "autocast": lambda x: torch.autocast("cpu")(fused_loss)(x),
}


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_ends_its_logits(name: str) -> None:
    logits = pyfused.convert(Model(), head="head")(X)
    LOSSES[name](logits).backward()
    assert_refused(logits, "a read after it")


def test_a_checkpoint_ends_its_logits() -> None:
    """The logits of the forward pass end, whose loss the backward pass recomputes."""
    model = pyfused.convert(Model(), head="head")
    logits, loss = checkpoint(model, X, TARGET, use_reentrant=False)
    loss.backward()
    assert_refused(logits, "a read after it")


# Backward passes that do not end the logits.
OTHERS: dict[str, Callable[[Any, Tensor], Any]] = {
    "hidden states": lambda model, _: model.hidden.sum().backward(),
    "logits": lambda _, logits: logits.sum().backward(),
    "loss of another call": lambda model, _: fused_loss(model(X)).backward(),
    "read before": lambda _, x: (x.argmax(), fused_loss(x).backward()),
    "read after the loss": lambda _, x: (fused_loss(x), x.argmax())[0].backward(),
    "without a gradient": lambda _, x: torch.no_grad()(fused_loss)(x),
    "checkpoint of the loss": lambda _, x: checkpoint(
        fused_loss, x, use_reentrant=False
    ).backward(),
    "backward pass without the loss": lambda model, x: torch.autograd.grad(
        fused_loss(x) + model.head.bias.sum(), model.unused, allow_unused=True
    ),
}


@pytest.mark.filterwarnings("ignore:pyfused.convert")
@pytest.mark.parametrize("name", OTHERS)
def test_other_backward_passes_do_not_end_logits(name: str) -> None:
    model: Any = pyfused.convert(Model(), head="head")
    model.unused = nn.Parameter(torch.ones(1))
    logits = model(X)
    OTHERS[name](model, logits)
    torch.testing.assert_close(logits.detach().clone(), Model()(X).detach())


def stepped(model: Any, **options: Any) -> None:
    """Runs an optimizer without a backward pass of the logits' loss."""
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(model.parameters(), 0.1, **options).step()


def loaded(model: Any) -> None:
    model.load_state_dict({name: 0.9 * x for name, x in model.state_dict().items()})


CHANGES_OF_VERSIONS: dict[str, Callable[[Any], Any]] = {
    "hidden": lambda model: model.hidden.mul_(2),
    "weight": lambda model: model.head.weight[0, 0].zero_(),
    "bias": lambda model: model.head.bias.add_(0),
    "step": lambda model: stepped(model, foreach=False),
    "foreach": lambda model: stepped(model, foreach=True),
    "load_state_dict": loaded,
    "freed": lambda model: model.head.weight.untyped_storage().resize_(0),
}


@pytest.mark.parametrize("evaluation", [False, True])
@pytest.mark.parametrize("name", CHANGES_OF_VERSIONS)
def test_changes_before_the_logits_are_read(name: str, evaluation: bool) -> None:
    """Without a backward pass, a change in place is an error, and computed logits stay."""
    model = pyfused.convert(Model(), head="head", evaluation=evaluation).train(not evaluation)
    with torch.set_grad_enabled(not evaluation), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        computed = model(X)
        expected = computed + 0
        logits = model(X)
    with torch.no_grad():
        CHANGES_OF_VERSIONS[name](model)
    assert_refused(logits, "a change of the head's input, weight or bias")
    assert torch.equal(computed + 0, expected)


def test_changes_of_tensors_that_were_added_or_selected_rows() -> None:
    model, mask = pyfused.convert(Model(), head="head"), X % 3 == 0
    for changed, logits in ((model.bias, model(X) + model.bias), (mask, model(X)[mask])):
        changed.copy_(~changed if changed is mask else 2 * changed)
        with pytest.raises(RuntimeError, match="tensor that was added to the logits"):
            logits.argmax(-1)


def compare_sequence(seed: int) -> Counter[str]:
    """Compares calls, reads, losses, backward passes and steps, in any order; counts outcomes."""
    draw, outcomes = random.Random(seed), Counter[str]()
    models: list[Any] = [Model().double(), Model().double()]
    pyfused.convert(models[1], head="head", evaluation=seed % 3 == 0, metrics=seed % 4 == 0)
    frozen = draw.choice(["", "", "emb", "head"])
    for model in models if frozen else ():
        model.get_submodule(frozen).requires_grad_(False)
    fused = draw.random() < 0.5
    optimizers = [torch.optim.SGD(model.parameters(), 0.1, fused=fused) for model in models]
    weight = models[0].head.weight
    calls: list[Any] = []
    losses: list[Any] = []  # those whose backward pass may still run
    for _ in range(40):
        action = draw.choice(["call", "read", "loss", "loss", "backward", "backward", "step"])
        if action == "call":
            with torch.set_grad_enabled(draw.random() < 0.8):
                logits = [model(X) for model in models]
            computed = type(logits[1]) is Tensor
            call = SimpleNamespace(logits=logits, version=weight._version, computed=computed)
            call.ended = call.freed = False
            calls.append(call)
        elif action == "step":
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            losses = []
            if fused:  # does not change the version
                calls = [call for call in calls if call.computed or call.ended]
        elif action == "backward" and losses:
            call, pair, bypasses = losses.pop(draw.randrange(len(losses)))
            call.freed = draw.random() < 0.5
            for loss in pair:
                loss.backward(retain_graph=not call.freed)
            call.ended |= bypasses
            losses = [each for each in losses if not each[0].freed]
            gradients = [[p.grad for p in model.parameters()] for model in models]
            torch.testing.assert_close(gradients[1], gradients[0])
        elif calls and action in ("read", "loss"):
            call = draw.choice(calls)
            read = (
                draw.choice(READERS[:3])
                if action == "read"
                else draw.choice([*LOSSES.values()][:4])
            )
            changed = weight._version != call.version
            expected = read(call.logits[0])
            if not call.computed and (call.ended or changed):
                problem = "a read after it" if call.ended else "a change"
                with pytest.raises(RuntimeError, match=f"got {problem}"):
                    read(call.logits[1])
                outcomes["after the backward pass" if call.ended else "after a change"] += 1
                continue
            found = read(call.logits[1]) + 0
            torch.testing.assert_close(found, expected)
            outcomes[action + " of logits" * call.computed] += 1
            if action == "read":
                call.computed = True
            elif found.requires_grad and not changed and not call.freed:
                losses.append((call, (expected, found), not call.computed))
    return outcomes


@pytest.mark.filterwarnings("ignore:pyfused.convert")
def test_drawn_sequences() -> None:
    """Logits are equal to torch's, or their read is an error if it comes too late."""
    outcomes = sum((compare_sequence(seed) for seed in range(60)), Counter())
    assert len(outcomes) == 6, outcomes
    assert min(outcomes.values()) >= 20, outcomes


# ---- gradients of logits, and changes in place ---------------------------------------------------

all_of = torch.autograd.graph.register_multi_grad_hook
GRADIENTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "register_hook": lambda logits, _: logits.register_hook(print),
    "retain_grad": lambda logits, _: logits.retain_grad(),
    "grad": lambda logits, loss: torch.autograd.grad(loss, logits),
    "grad of a sum": lambda logits, loss: torch.autograd.grad(loss + logits.sum(), [logits]),
    "backward": lambda logits, loss: (loss.backward(inputs=[logits]), logits.grad),
    "multi-grad hook": lambda logits, _: all_of((logits,), print),
    "edge": lambda logits, _: torch.autograd.graph.get_gradient_edge(logits),
}


@pytest.mark.filterwarnings("ignore:pyfused.convert")
@pytest.mark.parametrize("read", [False, True])
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_of_logits_after_their_loss(name: str, read: bool) -> None:
    logits, loss = pyfused.convert(Model(), head="head")(X, TARGET)
    if read:
        logits.argmax()
    with pytest.raises(RuntimeError, match=r"pyfused.convert: .* before their loss, got it after"):
        GRADIENTS[name](logits, loss)


@pytest.mark.filterwarnings("ignore:pyfused.convert")
def test_changes_of_the_shape_or_the_memory() -> None:
    model = pyfused.convert(Model(), head="head")
    changes: list[Callable[[Tensor], Any]] = [
        lambda x: x.unsqueeze_(0),
        lambda x: setattr(x, "data", x.detach() * 2),
    ]
    for change in changes:
        with pytest.raises(RuntimeError, match=r"pyfused.convert: .* of a model's logits in place"):
            change(model(X))


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
        torch.testing.assert_close(loss, expected[1])
        if losses:
            logits = logits + 0
        for p in model.parameters():
            p.data = 0.9 * p.data
        torch.testing.assert_close(logits, expected[0])


@pytest.mark.parametrize("options", [{}, {"evaluation": True, "metrics": True}])
@pytest.mark.parametrize("mode", [*MODES, "eval"])
def test_meta(mode: str, options: dict[str, bool]) -> None:
    model = pyfused.convert(Model(), head="head", **options).to("meta").train(mode != "eval")
    with MODES.get(mode, torch.enable_grad)(), torch.autocast("cpu", torch.bfloat16):
        logits, loss = model(X.to("meta"), TARGET.to("meta"))
    assert logits.is_meta
    assert logits.shape == (4, 16, 40)
    assert loss.is_meta
    assert loss.shape == ()
    if loss.requires_grad:
        loss.backward()
        assert model.head.weight.grad.shape == (40, 8)


@pytest.mark.parametrize("outside", [False, True])
def test_autocast(outside: bool, losses: list[Tensor]) -> None:
    """The loss may be computed after autocast, as accelerate wraps the model's forward."""
    found = []
    for model in (Model(), pyfused.convert(Model(), head="head")):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(X)
            assert logits.dtype is torch.bfloat16
            loss = F.cross_entropy(logits.flatten(0, 1), TARGET)
        if outside:
            loss = F.cross_entropy(logits.float().flatten(0, 1), TARGET)
        assert loss.dtype is torch.float32
        found.append([loss, *torch.autograd.grad(loss, [*model.parameters()])])
    torch.testing.assert_close(found[1], found[0], rtol=0.02, atol=2e-3)
    assert len(losses) == 1 + outside


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
        torch.testing.assert_close(each.pyfused_metrics, expected)
        assert not any(x.requires_grad for x in each.pyfused_metrics)
    torch.testing.assert_close(results(model), results(Model()))
    model(X)
    assert model.pyfused_metrics is None  # without a loss
    assert model.state_dict().keys() == plain.state_dict().keys()
    pyfused.revert(model)
    assert not hasattr(model, "pyfused_metrics")


@pytest.mark.parametrize("metrics", [False, True])
def test_memory_budget(metrics: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget of the last call of convert reaches every loss, and changes no results."""
    budgets: list[int | None] = []
    name = "linear_cross_entropy_with_metrics" if metrics else "linear_cross_entropy"
    function = getattr(pyfused.functional, name)

    def recorded(*args: Any, **options: Any) -> Any:
        budgets.append(options["memory_budget"])
        return function(*args, **options)

    monkeypatch.setattr(lazy_logits, name, recorded)
    expected, model = results(Model()), Model()
    for budget in (1000, 1, None):
        pyfused.convert(model, head="head", metrics=metrics, memory_budget=budget)
        torch.testing.assert_close(results(model), expected)
    assert budgets == [1000, 1, None]


@pytest.mark.parametrize(("budget", "error"), [(1.5, TypeError), ("1", TypeError), (0, ValueError)])
def test_invalid_memory_budgets(budget: Any, error: type[Exception]) -> None:
    """The errors are those of linear_cross_entropy, and the model stays as it is."""
    model = Model()
    with pytest.raises(error, match="memory_budget: expected ") as raised:
        pyfused.convert(model, head="head", memory_budget=budget)
    with pytest.raises(error) as of_function:
        pyfused.functional.linear_cross_entropy(
            torch.ones(2, 3), torch.ones(4, 3), torch.ones(2).long(), memory_budget=budget
        )
    assert str(raised.value) == str(of_function.value)
    assert type(model.head) is nn.Linear


# ---- torch.compile -------------------------------------------------------------------------------


def broken(_: Any, logits: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return 2 * logits


class BrokenBody(Model):
    """A model whose graph breaks before the head, whose forward is then compiled separately."""

    def forward(self, x: Tensor, target: Tensor) -> Any:  # type: ignore[override]
        hidden = self.emb(x)
        torch._dynamo.graph_break()
        logits = self.head(hidden)
        return logits, F.cross_entropy(logits.flatten(0, 1), target)


COMPILED = {"": Model, "a break after the head": partial(Model, broken), "before": BrokenBody}


@pytest.mark.filterwarnings("ignore")  # raised by Dynamo
@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_model_is_that_of_torch(name: str) -> None:
    """The graphs, logits, loss and gradients are those of the model before its conversion."""
    found: list[Any] = []
    for convert in (False, True):
        torch.compiler.reset()
        graphs: list[str] = []

        def backend(program: Any, _: Any, graphs: list[str] = graphs) -> Any:
            graphs.append(str([(node.op, str(node.target)) for node in program.graph.nodes]))
            return program.forward

        model: Any = COMPILED[name]()
        if convert:
            pyfused.convert(model, head="head", metrics=True)
            model(X, TARGET)
            assert model.pyfused_metrics is not None
        logits, loss = torch.compile(model, backend=backend, fullgraph=not name)(X, TARGET)
        assert type(logits) is Tensor
        gradients = torch.autograd.grad(loss, [*model.parameters()])
        calls = [graph.count("call_function") for graph in graphs]
        found.append((logits.detach(), loss.detach(), gradients, calls))
    assert model.pyfused_metrics is None
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the attribute `hidden`
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_model_is_that_of_torch(strict: bool) -> None:
    plain, model = Model(), pyfused.convert(Model(), head="head")
    programs = [torch.export.export(m, (X, TARGET), strict=strict) for m in (plain, model)]
    assert programs[0].graph_module.code == programs[1].graph_module.code
    found = [program.module()(X, TARGET) for program in programs]
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_a_compiled_loss(compiler: None, losses: list[Tensor]) -> None:
    """The loss of lazy logits is fused outside of the compiled program, without a warning."""
    model = pyfused.convert(Model(), head="head")
    loss_of = torch.compile(lambda x: F.cross_entropy(x.flatten(0, 1), TARGET), backend="eager")
    loss = loss_of(model(X))
    assert losses
    expected = Model()
    plain = F.cross_entropy(expected(X).flatten(0, 1), TARGET)
    gradients = [
        torch.autograd.grad(x, [*m.parameters()]) for x, m in ((loss, model), (plain, expected))
    ]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_torch_jit_trace() -> None:
    model = pyfused.convert(Model(), head="head")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, (X,))
    torch.testing.assert_close(traced(X), Model()(X))
