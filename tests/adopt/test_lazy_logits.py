"""A converted head does not change results, whatever a model's forward does with its logits.

`python tests/adopt/test_lazy_logits.py 2500` compares 2500 random models, in four calls each.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import itertools
import operator
import pickle
import random
import sys
import warnings
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable
from functools import partial
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


@dataclasses.dataclass
class Output:
    logits: Tensor
    loss: Tensor


class Stop(Exception):  # noqa: N818
    """Raised by a forward that has computed what it needs."""


def disturb(model: Any, hidden: Tensor, kind: str) -> None:
    """Changes the head's input or weight in place."""
    with torch.no_grad():
        (model.head.weight if kind == "weight" else hidden).mul_(0.97)


def averaged(model: nn.Module) -> None:
    """Exchanges the weights for averages, as libraries do for an evaluation."""
    for p in model.parameters():
        p.data = 0.9 * p.data


def written(model: nn.Module) -> None:
    """Changes the weights without a new version, as the optimizers of other libraries do."""
    for p in model.parameters():
        p.data.mul_(0.9)


def step_of(kind: Any, **options: Any) -> Callable[[nn.Module], Any]:
    return lambda model: kind(model.parameters(), 0.1, **options).step()


def loaded(model: nn.Module) -> None:
    model.load_state_dict({name: 0.9 * x for name, x in model.state_dict().items()})


# Changes of all weights between two steps.
UPDATES: dict[str, Callable[[nn.Module], Any]] = {
    "fused": step_of(torch.optim.AdamW, fused=True),
    "foreach": step_of(torch.optim.AdamW, foreach=True),
    "plain": step_of(torch.optim.SGD, foreach=False),
    ".data": written,
    "average": averaged,
    "load_state_dict": loaded,
}


class Drawn(nn.Module):
    """A model with random forwards: views, in-place changes, reads, and losses of its logits.

    Most calls run the same forward.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = self.draw = random.Random(seed)
        torch.manual_seed(seed)
        self.emb = nn.Embedding(11, FEATURES)
        self.head = nn.Linear(FEATURES, CLASSES, bias=draw.random() < 0.5)
        if draw.random() < 0.15:
            self.head.requires_grad_(False)
        elif draw.random() < 0.1:
            self.emb.requires_grad_(False)
        self.to(draw.choice([torch.float64, torch.float64, torch.float32]))
        self.disturbed = draw.choice([""] * 16 + ["hidden", "weight"])
        self.programs = [draw.getrandbits(60) for _ in range(3)]
        self.kinds = PROVEN if draw.random() < 0.6 else PROVEN + ANY
        self.seen: list[Any] = []
        self.kept: Any = None

    def forward(self, tokens: Tensor, program: int = 0) -> Any:
        draw = random.Random(self.programs[program])
        self.seen, losses, self.kept = [], [], None
        if self.head.bias is not None:
            # For more dimensions, the reference is a view. If it is changed in place, torch drops
            # its hooks, and parts of its gradient.
            tokens = tokens.flatten()
        hidden = self.emb(tokens).tanh()
        logits = self.head(hidden)
        if self.disturbed:
            disturb(self, hidden, self.disturbed)
        family = [logits]
        steps = draw.choice([0, 1, 2, 3, 5, 8])
        kinds = self.kinds
        for _ in range(steps):
            place = draw.randrange(len(family))
            change = draw.choice(kinds)
            family.append(change(family[place], draw, self.seen))
            if draw.random() < 0.3:
                family[place] = family[-1]
            if draw.random() < 0.1:
                family.append(self.head(self.emb(tokens)))
            if draw.random() < 0.2:
                losses.append(loss_of(draw.choice(family), draw, False))
            if draw.random() < 0.01:
                self.kept = draw.choice(family)
                raise Stop
        losses += [
            loss_of(draw.choice(family), draw, kinds is not PROVEN)
            for _ in range(draw.choice([1, 1, 2]))
        ]
        loss = torch.stack([each.double() for each in losses]).sum()
        kept, kind = draw.choice(family), draw.randrange(12)
        if kind < 2:
            self.kept = kept
        output: list[Any] = [
            {"logits": kept, "loss": loss},
            Output(kept, loss),
            [kept, loss],
            OrderedDict(logits=kept, loss=loss),
        ]
        return output[kind] if kind < len(output) else (kept if kind < 8 else None, loss)


def number(draw: random.Random) -> float:
    return draw.choice([2, 0.5, 3.0, 1.25, 1, 0.1])


def one_of(*changes: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x, draw, _: draw.choice(changes)(x)


view = one_of(
    lambda x: x.view(-1, *x.shape[-1:]),
    lambda x: x.view(size=(-1, *x.shape[-1:])),
    lambda x: x.reshape(*x.shape[:-1], -1) if x.numel() else x,
    lambda x: x.reshape((-1, *x.shape[-1:])),
    lambda x: torch.reshape(x, (-1, *x.shape[-1:])),
    lambda x: x.flatten(0, -2) if x.dim() > 1 else x,
    lambda x: x.flatten(start_dim=0, end_dim=-2) if x.dim() > 1 else x,
    lambda x: x.unsqueeze(0),
    lambda x: x.squeeze(0),
    lambda x: x.contiguous(),
    lambda x: x.view(x.shape),
)
cast = one_of(
    lambda x: x.float(),
    lambda x: x.to(torch.float32),
    lambda x: x.to(dtype=torch.float32),
    lambda x: x.to(x.device),
    lambda x: x.to(x.dtype),
    lambda x: x.double(),
)
moved = one_of(
    lambda x: x.transpose(0, -1) if x.dim() else x,
    lambda x: x.movedim(-1, min(1, x.dim() - 1)) if x.dim() else x,
    lambda x: x.permute(*range(x.dim())[::-1]),
    lambda x: torch.swapaxes(x, -1, -2) if x.dim() > 1 else x,
    lambda x: x.mT if x.dim() > 1 else x,
)
rows = one_of(
    lambda x: x[..., :-1, :],
    lambda x: x[1:],
    lambda x: x[:, :-1],
    lambda x: x[:, :2, ...],
    lambda x: x[0],
    lambda x: x[-1:, ...],
    lambda x: x[..., :, :],
    lambda x: x[:],
    lambda x: x[::2],
    lambda x: x[:, :, 1:] if x.dim() > 2 else x,
    lambda x: x[..., :-1],
)


def sliced(x: Tensor, draw: random.Random, seen: list[Tensor]) -> Tensor:
    return x if x.dim() < 2 or min(x.shape) < 2 else rows(x, draw, seen)


def selected(x: Tensor, draw: random.Random, seen: list[Tensor]) -> Tensor:
    if x.dim() < 2 or min(x.shape) < 2:
        return x
    leading = x.shape[: draw.randrange(1, x.dim())]
    mask = torch.arange(leading.numel()).view(leading) % 4 != 1
    index = torch.tensor([1, 0, 1])
    return draw.choice(
        [
            lambda: x[mask],
            lambda: x[index],
            lambda: x[index, index] if x.dim() > 2 else x[(index,)],
            lambda: x[index.view(1, 3).expand(2, 3)],
            lambda: x[mask.nonzero(as_tuple=True)],
        ]
    )()


def shifted(x: Tensor, draw: random.Random, seen: list[Tensor]) -> Tensor:
    bias = torch.linspace(-1, 2, x.shape[-1], dtype=x.dtype)
    bias = bias.view((1,) * draw.randrange(x.dim()) + bias.shape)
    return draw.choice([lambda: x + bias, lambda: x.add(bias), lambda: torch.add(x, bias)])()


def scaled(x: Tensor, draw: random.Random, seen: list[Tensor]) -> Tensor:
    by = number(draw)
    return draw.choice(
        [
            lambda: x * by,
            lambda: by * x,
            lambda: x / by,
            lambda: x.mul(by),
            lambda: torch.div(x, by),
            lambda: torch.mul(x, by),
            lambda: torch.tanh(x / by) * by,
            lambda: (x / by).tanh() * by,
            lambda: torch.tanh(x),
        ]
    )()


def in_place(x: Tensor, draw: random.Random, seen: list[Tensor]) -> Tensor:
    by = number(draw)
    changes: list[Callable[[], Any]] = [
        lambda: x.mul_(by),
        lambda: x.add_(by),
        lambda: x.div_(by),
        lambda: x.clamp_(-2, 2),
        lambda: x.masked_fill_(x > 1, 0.5),
        lambda: torch.nn.functional.relu_(x),
        lambda: operator.setitem(x, (..., 0), -1.5) or x,
        lambda: operator.imul(x, by),
        lambda: torch.no_grad()(x.mul_)(by),
    ]
    return draw.choice(changes)()


def read(x: Tensor, draw: random.Random, seen: list[Tensor]) -> Tensor:
    def hooked(x: Tensor) -> Tensor:
        if x.grad_fn is not None:  # torch crashes for views changed under no_grad
            x.register_hook(lambda grad: grad * 2)
        return x

    def kept(x: Tensor) -> Tensor:
        x.retain_grad()
        seen.append(x)
        return x

    result: Tensor = draw.choice(
        [
            lambda: x.argmax(-1),
            lambda: x.detach().sum(),
            lambda: x.clone(),
            lambda: x[..., :-2],
            lambda: x * torch.tensor(1.5),
            lambda: -x,
            lambda: x * -2,
            lambda: x + 1,
            lambda: x.log_softmax(-1),
            lambda: x[None, ..., None],
            lambda: x[..., torch.tensor([0, 2])],
            lambda: torch.cat([x, x]),
            lambda: Doubled.apply(x),
            lambda: checkpoint(torch.sigmoid, x, use_reentrant=draw.random() < 0.5),
            lambda: torch.func.vmap(torch.sigmoid)(x),
            lambda: hooked(x),
            lambda: kept(x),
        ]
    )()
    if result.requires_grad:
        return result
    seen.append(result)
    return x


def without_gradient(x: Tensor, draw: random.Random, seen: list[Tensor]) -> Tensor:
    change = draw.choice(PROVEN + ANY[:2])
    with torch.no_grad() if draw.random() < 0.7 else torch.inference_mode():
        seen.append(change(x, draw, seen).clone())
    return x


PROVEN: list[Callable[..., Tensor]] = [view, view, moved, sliced, selected, shifted, scaled, cast]
ANY: list[Callable[..., Tensor]] = [read, read, in_place, without_gradient]


def loss_of(x: Tensor, draw: random.Random, anything: bool) -> Tensor:
    if CLASSES in x.shape and draw.random() < 0.9:
        x = x.movedim(x.shape.index(CLASSES), -1)
    rows = x.reshape(-1, x.shape[-1])
    classes = x.shape[-1]
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
    if anything and draw.random() < 0.5:
        return draw.choice(
            [
                lambda: F.cross_entropy(rows, index, weight=weight),
                lambda: F.cross_entropy(rows.t()[None], index[None], **options).sum(),
                lambda: rows.logsumexp(-1).sum(),
                lambda: F.cross_entropy(rows, rows.detach().softmax(-1)),
                lambda: F.cross_entropy(rows[0], index[0].clamp(min=0)),
                lambda: pyfused.functional.cross_entropy(rows, index, z_loss=0.1),
                lambda: checkpoint(F.cross_entropy, rows, index, use_reentrant=draw.random() < 0.5),
            ]
        )()
    more: list[Callable[[], Tensor]] = []
    if "label_smoothing" not in options:
        more += [
            lambda: F.nll_loss(F.log_softmax(rows, -1), index, **options).sum(),
            lambda: nn.NLLLoss(**options)(nn.LogSoftmax(-1)(rows), index).sum(),
            lambda: F.nll_loss(x.log_softmax(-1).view(-1, classes), index, **options).sum(),
        ]
    if x.dim() > 2:
        places = index.view(x.shape[:-1])
        more += [
            lambda: F.cross_entropy(x.movedim(-1, 1), places, **options).sum(),
            lambda: (
                (F.cross_entropy(x.transpose(1, 2), places, **options) * 2).sum()
                if x.dim() == 3
                else x.sum()
            ),
        ]
    return draw.choice(
        [
            lambda: F.cross_entropy(rows, index, **options).sum(),
            lambda: nn.CrossEntropyLoss(**options)(rows, index).sum(),
            lambda: F.cross_entropy(input=rows, target=index, **options).sum(),
            lambda: pyfused.functional.cross_entropy(rows, index, **options).sum(),
            *more,
        ]
    )()


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
    """Returns the error of a call, or its loss, outputs and gradients."""
    model.zero_grad()
    tokens = torch.arange(12).view(3, 4) % draw.choice([7, 11])
    program = draw.choice([0, 0, 0, 1, 2])
    # A checkpoint hides from torch that a saved tensor was changed in place.
    outer = draw.random() < 0.1 and not is_reference
    total: Any = None
    try:
        with drawn_modes(draw, model) as unhooked:
            autocast = torch.is_autocast_enabled("cpu")
            try:
                whole = partial(checkpoint, model, use_reentrant=False)
                call = whole if outer and unhooked and not model.disturbed else model
                output = call(tokens, program)
                if isinstance(output, Output):
                    output = output.logits, output.loss
                logits, loss = output.values() if isinstance(output, dict) else output
            except Stop:
                logits = loss = None
            read, kept = model.seen, model.kept  # a checkpoint's recomputation replaces them
            seen = [loss, logits, *read, kept]
            terms = [x for x in (loss, kept) if x is not None and x.requires_grad]
            total = sum(x.double().square().mean() for x in terms) if terms else None
            if total is not None and kept is not None and kept.grad_fn is not None:
                if draw.random() < 0.5:
                    seen += torch.autograd.grad(total, kept, retain_graph=True, allow_unused=True)
                elif draw.random() < 0.5:
                    total.backward(inputs=[kept], retain_graph=True)
                    seen.append(kept.grad)
        if total is not None:
            total.backward()
            if draw.random() < 0.25:
                seen += [p.grad.clone() for p in model.parameters() if p.grad is not None]
                UPDATES[draw.choice([*UPDATES])](model)
        seen = [x if x is None else x.clone() for x in seen]  # a read after backward
    except Exception as error:
        return error, []
    leaves = [p.grad for p in model.parameters()]
    seen += [x.grad for x in read if x.requires_grad and not x.is_leaf]
    return None, [autocast, leaves, seen]


def compare(seed: int, calls: int = 4) -> Counter[str]:
    """Compares calls of a drawn model with its conversion; counts how losses were computed."""
    plain, model = Drawn(seed), Drawn(seed)
    options = {"evaluation": seed % 3 > 0, "metrics": seed % 4 == 0}
    pyfused.convert(model, head="head", **options)
    found, state = Counter[str](), copy.deepcopy(plain.state_dict())
    for number in range(calls):
        found[compare_call(plain, model, 1000 * seed + number)] += 1
        plain.load_state_dict(state)
        model.load_state_dict(state)
    return found


def compare_call(plain: Drawn, model: Drawn, seed: int) -> str:
    """Compares one call; returns how its loss was computed."""
    fused: list[HeadCall] = []
    loss = HeadCall.loss

    def counted(call: HeadCall, *args: Any) -> Tensor:
        fused.append(call)
        return loss(call, *args)

    expected_error, expected = step(plain, random.Random(seed), True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeadCall, "loss", counted)
        error, found = step(model, random.Random(seed), False)
    if str(error).startswith("pyfused.convert: expected"):
        return "refused"  # unsupported uses of logits
    where = f"call {seed}: {expected_error!r} became {error!r}"
    if expected and expected[2][0] is not None and expected[2][0].isnan():
        return "error"  # all targets are ignored; the kernel's gradient is 0
    if "modified by an inplace operation" in str(expected_error) and error is None:
        return "error"  # a fused loss saves fewer tensors than torch's
    assert type(error) is type(expected_error), where
    if error is not None:
        return "error"
    coarse = found[0] or any(p.dtype is torch.float32 for p in model.parameters())
    rtol, atol = (0.05, 0.02) if found[0] else (1e-3, 1e-4) if coarse else (1e-4, 1e-5)
    for ours, theirs in zip(found[1] + found[2], expected[1] + expected[2], strict=True):
        if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
            assert ours.dtype is theirs.dtype, where
            assert ours.requires_grad == theirs.requires_grad, where
            largest = float(theirs.detach().abs().max()) if theirs.numel() else 0.0
            scaled = atol * max(1.0, largest if found[0] else 1.0)  # bfloat16 rounds terms
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
    monkeypatch.setattr(HeadCall, "loss", lambda *args: found.append(loss(*args)) or found[-1])
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
}


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("name", RECEIVERS)
def test_reports_of_fused_losses(name: str, patched: bool) -> None:
    model = pyfused.convert(Model(), head="head")
    with pyfused.patch() if patched else contextlib.nullcontext(), pyfused.report() as report:
        RECEIVERS[name](model(X).flatten(0, 1))
    assert report.to_dict()["left_to_torch"] == {}
    assert [*report.to_dict()["operators"]] == ["linear_cross_entropy"]
    reason = pyfused.explain("cross_entropy", model(X).flatten(0, 1), TARGET).reason
    assert reason == "input is a LazyLogits, which calls another function: see pyfused.report()"


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
    "chunk": (of_rows(lambda m, x: torch.cat(x.chunk(2, 1), 1)), "chunk.* Index or slice them"),
    "split": (of_rows(lambda m, x: torch.cat(x.split(8, 1), 1)), "split.* Index or slice them"),
    "unbind": (of_rows(lambda m, x: torch.stack(x.unbind(1), 1)), "unbind.* Index or slice them"),
    "mul of keywords": (of_rows(lambda m, x: torch.mul(input=x, other=0.5)), "mul"),
    "rounded": (of_rows(lambda m, x: x.div(2.0, rounding_mode="trunc") + x), "div"),
    "alpha": (of_rows(lambda m, x: torch.add(x, m.bias, alpha=2)), "add"),
    "NumPy": (of_rows(lambda m, x: np.float32(0.5) * x), "r?mul"),
    "unpacked": (of_rows(lambda m, x: torch.cat([*x])), "unbind.* Index or slice them"),
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


# ---- reads of logits after their loss ------------------------------------------------------------


READS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "pickle": lambda logits, _: pickle.loads(pickle.dumps(logits)).detach(),
    "NumPy": lambda logits, _: torch.from_numpy(logits.detach().numpy()),
    "after backward": lambda logits, loss: (loss.backward(), logits.argmax(-1))[1],
}


@pytest.mark.filterwarnings("ignore:pyfused.convert")
@pytest.mark.parametrize("name", READS)
def test_reads_after_the_loss(name: str) -> None:
    found = []
    for model in (Model(), pyfused.convert(Model(), head="head")):
        result = READS[name](*model(X, TARGET)) * 1
        found.append([result])
        if result.requires_grad:
            found[-1] += torch.autograd.grad(result.sum(), [*model.parameters()])
    torch.testing.assert_close(found[1], found[0])


def test_a_read_after_the_loss_warns_once() -> None:
    model = pyfused.convert(Model(), head="head")
    with pytest.warns(RuntimeWarning, match=r"read by argmax after their loss.* metrics=True"):
        model(X, TARGET)[0].argmax(-1)
    model(X, TARGET)[0].argmax(-1)


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


CHANGED: dict[str, Callable[[Any], Any]] = {
    "hidden": lambda model: model.hidden.mul_(2),
    "freed": lambda model: model.head.weight.untyped_storage().resize_(0),
}


@pytest.mark.parametrize("name", CHANGED)
def test_changes_before_the_logits_are_read(name: str) -> None:
    model = pyfused.convert(Model(), head="head")
    for read in (lambda x: F.cross_entropy(x.flatten(0, 1), TARGET), Tensor.argmax):
        logits = model(X)
        with torch.no_grad():
            CHANGED[name](model)
        with pytest.raises(RuntimeError, match=r"pyfused.convert: .* got one changed"):
            read(logits)
        if name == "freed":
            return


def one_element(model: Any) -> None:
    """Changes an element that is not compared."""
    weight = model.head.weight
    weight.grad = torch.zeros_like(weight)
    weight.grad[0, 1] = 1.0
    torch.optim.SGD([weight], 0.1, fused=True).step()


UPDATED: dict[str, Callable[[Any], Any]] = {
    **UPDATES,
    "bias": lambda model: model.head.bias.data.mul_(2),
    "one element": one_element,
    "one column": lambda model: model.head.weight.data[:, 3].mul_(2),
}
READERS: list[Callable[[Tensor], Any]] = [
    lambda logits: logits.argmax(-1),
    lambda logits: F.cross_entropy(logits.flatten(0, 1), TARGET),
    lambda logits: (logits.detach() * 2).argmax(-1),
]


@pytest.mark.filterwarnings("ignore:pyfused.convert")
@pytest.mark.parametrize("name", UPDATED)
def test_reads_after_the_weights_have_changed(name: str) -> None:
    """Logits that were not computed before an optimizer's step raise an error after it."""
    model = pyfused.convert(Model(), head="head")
    logits, loss = model(X, TARGET)
    computed, _ = model(X, TARGET)
    expected = computed.argmax(-1)
    loss.backward()
    UPDATED[name](model)
    for reader in READERS:
        error = r"pyfused.convert: .* got one changed.* metrics=True"
        with pytest.raises(RuntimeError, match=error):
            reader(logits)
    assert torch.equal(computed.argmax(-1), expected)
    model(X, TARGET)[0].argmax(-1)


def test_a_call_in_the_closure_of_an_optimizer() -> None:
    model = pyfused.convert(Model(), head="head")
    optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=True)
    outputs: list[Tensor] = []

    def closure() -> float:
        outputs.append(model(X))
        return 0.0

    optimizer.step(closure)
    with pytest.raises(RuntimeError, match="changed by an optimizer's step"):
        outputs[0].argmax()


@pytest.mark.filterwarnings("ignore:pyfused.convert")
def test_the_step_of_another_model_and_frozen_weights() -> None:
    """The logits stay readable if their weights have not changed, even if they are NaN."""
    model, other = (pyfused.convert(Model(), head="head") for _ in range(2))
    model.head.weight.data[0] = float("nan")
    logits = model(X)
    for each in (other, model.emb):
        torch.optim.SGD(each.parameters(), 0.1, fused=True).step()
    torch.testing.assert_close(
        logits.detach().clone(), F.linear(model.hidden, *model.head.parameters()), equal_nan=True
    )


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
        averaged(model)
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


if __name__ == "__main__":
    from pyfused.dispatch import sizes

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    count, first = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    total: Counter[str] = Counter()
    with sizes.every_size():
        for seed in range(first, first + count):
            try:
                total += compare(seed)
            except AssertionError as difference:  # noqa: PERF203
                print(f"seed {seed} differs: {str(difference)[:300]}", flush=True)
    print(f"{count} models from {first}: {dict(total)}")
