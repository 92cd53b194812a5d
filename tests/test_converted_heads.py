"""A converted head does not change results, whatever a model's forward does with its logits.

`python tests/test_converted_heads.py 5000` compares 5000 random forwards.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import logging
import math
import operator
import pickle
import random
import sys
import warnings
import weakref
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.utils.prune
from compare import products
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import pyfused
import pyfused.nn
from pyfused.adopt import causal_lm, deferred
from pyfused.adopt.subclass import is_fused
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
    """Changes the head's input or weight in place; a change of ``data`` has no version."""
    changed = model.head.weight if kind.startswith("weight") else hidden
    with torch.no_grad():
        (changed.data if kind.endswith("data") else changed).mul_(0.97)


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
        self.disturbed = draw.choice([""] * 16 + ["hidden", "hidden.data", "weight", "weight.data"])
        self.programs = [draw.getrandbits(60) for _ in range(3)]
        self.kinds = PROVEN if draw.random() < 0.6 else PROVEN + ANY
        self.seen: list[Any] = []
        self.kept: Any = None

    def forward(self, tokens: Tensor, program: int = 0) -> Any:
        draw = random.Random(self.programs[program])
        self.seen, losses, self.kept = [], [], None
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
            lambda: x.transpose(-1, -2) if x.dim() > 1 else x,
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


PROVEN: list[Callable[..., Tensor]] = [view, view, sliced, selected, shifted, scaled, cast]
ANY: list[Callable[..., Tensor]] = [read, read, in_place, without_gradient]


def loss_of(x: Tensor, draw: random.Random, anything: bool) -> Tensor:
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
    saved = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
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
            seen = [loss, logits, *model.seen, model.kept]
            kept = model.kept
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
    except Exception as error:
        return error, []
    leaves = [p.grad for p in model.parameters()]
    seen += [x.grad for x in model.seen if x.requires_grad and not x.is_leaf]
    return None, [autocast, leaves, seen]


def compare(seed: int, calls: int = 4) -> Counter[str]:
    """Compares calls of a drawn model with its conversion; counts how losses were computed."""
    plain, model = Drawn(seed), Drawn(seed)
    options = {"evaluation": seed % 3 > 0, "metrics": seed % 4 == 0}
    pyfused.convert(model, head="head", **options)
    found: Counter[str] = Counter()
    for number in range(calls):
        found[compare_call(plain, model, 1000 * seed + number)] += 1
        model.load_state_dict(plain.state_dict())
    return found


def compare_call(plain: Drawn, model: Drawn, seed: int) -> str:
    """Compares one call; returns how its loss was computed."""
    fused: list[deferred.Family] = []
    loss = deferred.Family.loss

    def counted(family: Any, *args: Any) -> Tensor:
        if not family.recorded:
            fused.append(family)
        return loss(family, *args)

    expected_error, expected = step(plain, random.Random(seed), True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deferred.Family, "loss", counted)
        error, found = step(model, random.Random(seed), False)
    if str(error).startswith("pyfused.convert: expected"):
        return "refused"  # unsupported uses of logits
    where = f"call {seed}: {expected_error!r} became {error!r}"
    if "modified by an inplace operation" in str(expected_error) and error is None:
        return "error"  # a fused loss saves fewer tensors than torch's
    assert type(error) is type(expected_error), where
    if error is not None:
        return "error"
    assert is_fused(model), where  # the model's comparison with torch has passed
    coarse = found[0] or any(p.dtype is torch.float32 for p in model.parameters())
    rtol, atol = (0.05, 0.02) if found[0] else (1e-3, 1e-4) if coarse else (1e-4, 1e-5)
    for ours, theirs in zip(found[1] + found[2], expected[1] + expected[2], strict=True):
        if ours is None and theirs is not None and CLASSES in theirs.shape:
            continue  # unused logits, or a gradient of zeros
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
    return "without logits" if any(not family.computed for family in fused) else "with logits"


@pytest.mark.filterwarnings("ignore:pyfused.convert")
@pytest.mark.parametrize("first", range(0, 120, 40))
def test_drawn_forwards(first: int) -> None:
    found = sum((compare(seed) for seed in range(first, first + 40)), Counter())
    assert found["without logits"] >= 10, found
    assert found["with logits"] >= 40, found
    assert found["refused"] <= 8, found


# ---- modified heads ------------------------------------------------------------------------------

X, TARGET = torch.arange(64).view(4, 16) % 50, torch.arange(64) % 40
PLACES = TARGET.view(4, 16)


class Model(nn.Module):
    """A model whose forward calls the given functions with itself and its logits."""

    factor = 1.25

    def __init__(self, change: Any = lambda _, logits: logits) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.emb, self.head = nn.Embedding(50, 8), nn.Linear(8, 40)
        self.change = change

    def embedded(self, x: Tensor) -> Tensor:
        self.hidden: Tensor = 1 * self.emb(x)
        return self.hidden

    def forward(self, x: Tensor, target: Tensor | None = None) -> Any:
        logits = self.change(self, self.head(self.embedded(x)))
        if target is None:
            return logits
        return logits, F.cross_entropy(logits.reshape(-1, logits.shape[-1]), target)


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


def other_gradient(*grads: Any) -> Any:
    return tuple(3 * each for each in grads[-1])


def globally(head: nn.Linear) -> Any:
    return torch.nn.modules.module.register_module_forward_hook(
        lambda module, _, output: 2 * output if module is head else None
    )


class Twice(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "forward": (lambda h: setattr(h, "forward", lambda x: 9 * x @ h.weight.t()), "replaced"),
    "hook": (lambda h: h.register_forward_hook(lambda *a: 2 * a[-1]), "hooks"),
    "pre-hook": (lambda h: h.register_forward_pre_hook(lambda _, a: (2 * a[0],)), "hooks"),
    "backward": (lambda h: h.register_full_backward_hook(lambda *a: (3 * a[1][0],)), "hooks"),
    "backward pre": (lambda h: h.register_full_backward_pre_hook(other_gradient), "hooks"),
    "global": (globally, "hooks"),
    "parametrised": (
        lambda h: nn.utils.parametrize.register_parametrization(h, "weight", DropConnect()),
        "parametrize.ParametrizedLinear, not a plain torch.nn.Linear",
    ),
    "pruned": (lambda h: nn.utils.prune.l1_unstructured(h, "weight", 0.5), "hooks"),
    "class": (lambda h: setattr(h, "__class__", Twice), f"is a {__name__}.Twice, not a plain"),
    "compiled": (lambda h: h.compile(backend="eager"), "compiled separately"),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # raised by torch's compiler from 2.14 on
def test_a_head_with_a_modified_forward(name: str, when: str) -> None:
    """A parametrised weight, which draws random numbers, is computed as often as by torch."""
    if (name, when) == ("compiled", "before"):
        pytest.skip("convert refuses a model with a compiled part")
    change, reason = CHANGES[name]
    warned = pytest.warns(RuntimeWarning, match=f"Model computes all of its logits:.*{reason}")
    plain, model = Model(), Model()
    with contextlib.ExitStack() as hooks:
        added = change(plain.head)
        expected = results(plain), torch.rand(())
        if name == "global":
            added.remove()
        if when == "before":
            added = change(model.head)
            if name in ("parametrised", "class"):
                with pytest.raises(ValueError, match=r"name of a torch\.nn\.Linear, .* none, got"):
                    pyfused.convert(model, head="head")
                return
            hooks.callback(added.remove if name == "global" else list)
            (left,) = pyfused.plan_conversion(model, head="head").left
            assert reason in left.reason
            with warned:
                pyfused.convert(model, head="head")
        else:
            pyfused.convert(model, head="head")
            results(model)
            added = change(model.head)
            hooks.callback(added.remove if name == "global" else list)
            with warned:
                results(model)
        found = results(model), torch.rand(())  # without a second warning
    torch.testing.assert_close(found, expected)


UNFUSED: dict[str, Callable[..., Any]] = {
    "its forward computes no cross-entropy": lambda model, x, _: (model.head(model.emb(x)),),
    "does not call its head": lambda model, x, target: (
        F.cross_entropy(F.linear(model.emb(x), model.head.weight).view(-1, 40), target),
    ),
}


@pytest.mark.parametrize("reason", UNFUSED)
def test_a_head_without_a_fused_loss(reason: str) -> None:
    class Unfused(Model):
        forward: Any = UNFUSED[reason]

    model = pyfused.convert(Unfused(), head="head")
    with torch.no_grad():
        model(X, TARGET)
    model.eval()(X, TARGET)
    with pytest.warns(RuntimeWarning, match=f"Unfused computes all of its logits: .*{reason}"):
        model.train()(X, TARGET)
    model(X, TARGET)  # a second warning would be an error


@pytest.mark.filterwarnings("ignore:pyfused.convert")
def test_converting_again_changes_the_options() -> None:
    model: Any = Model()
    with pytest.raises(ValueError, match=r"head: expected the name .* one of \['head'\], got 'x'"):
        pyfused.convert(model, head="x")
    assert pyfused.plan_conversion(model).swapped == ()
    assert pyfused.plan_conversion(model, head="head").swapped == (".",)
    results(pyfused.convert(model, head="head"))
    kind = type(model)
    pyfused.convert(model, head="head")
    pyfused.convert(model)
    assert type(model) is kind
    pyfused.convert(model, evaluation=True, metrics=True)
    assert model.eval()(X, TARGET)[0] is None
    assert model.pyfused_metrics is not None
    assert pyfused.plan_conversion(model).left[0] == (".", "Model", "is already converted")
    pyfused.convert(model, head="head")
    assert model(X, TARGET)[0] is not None
    assert pyfused.revert(model) == (".",)
    assert type(model) is Model


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


def test_a_checkpoint_around_the_head() -> None:
    """Recomputation calls the head after the model's call has ended."""

    class Checkpointed(Model):
        def forward(self, x: Tensor, target: Tensor) -> Any:  # type: ignore[override]
            def loss_of(hidden: Tensor) -> Tensor:
                return F.cross_entropy(self.head(hidden).flatten(0, 1), target)

            hidden = self.embedded(x)
            return None, checkpoint(loss_of, hidden, use_reentrant=self.change == "reentrant")

    for kind in ("reentrant", "not reentrant"):
        expected = results(Checkpointed(kind))
        model = pyfused.convert(Checkpointed(kind), head="head")
        with pytest.warns(RuntimeWarning, match="a checkpoint in its forward calls its head"):
            results(model)
        torch.testing.assert_close(results(model), expected)


# ---- changes of a model --------------------------------------------------------------------------


class Sub(Model):
    """A model that checks its class and changes its attributes."""

    def embedded(self, x: Tensor) -> Tensor:
        assert isinstance(self, Sub)
        assert isinstance(self.head, nn.Linear)
        self.calls = getattr(self, "calls", 0) + 1
        self._modules["emb"] = self.emb
        return self.__class__.factor * super().embedded(x)


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Counts the losses that were computed without logits."""
    found: list[Tensor] = []
    loss = deferred.Family.loss

    def counted(*args: Any) -> Tensor:
        found.append(loss(*args))
        return found[-1]

    monkeypatch.setattr(deferred.Family, "loss", counted)
    return found


COPIES: dict[str, Callable[[Any], Any]] = {
    "itself": lambda model: model,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "replica": lambda model: model._replicate_for_data_parallel(),
}


def _keep(_: Any, logits: Tensor) -> Tensor:
    return logits


class Rebuilt(Model):
    """Copies are built by the constructor, which also registers each subclass."""

    def __init_subclass__(cls) -> None:
        raise TypeError("registered twice")

    def __reduce__(self) -> Any:
        return rebuilt, (type(self), self.state_dict())


class Created(Model):
    def __new__(cls, *_: Any) -> Any:
        return super().__new__(cls)

    def __getnewargs__(self) -> Any:
        return (_keep,)


def rebuilt(kind: Any, state: Any) -> Model:
    model: Model = kind(_keep)
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize(
    ("kind", "name"),
    [(Sub, name) for name in COPIES]
    + [(kind, name) for kind in (Rebuilt, Created) for name in ("copy", "deepcopy", "pickle")],
)
def test_copies(kind: Any, name: str, losses: list[Tensor]) -> None:
    plain, model = kind(_keep), kind(_keep)
    state, expected, description = plain.state_dict(), results(plain), repr(model)
    model = COPIES[name](pyfused.convert(model, head="head"))
    if name == "replica":  # a replica's parameters are plain tensors
        for place in ("emb", "head"):
            part = getattr(model, place)._replicate_for_data_parallel()
            for each, value in getattr(plain, place).named_parameters():
                setattr(part, each, value)
            model._modules[place] = part
        torch.testing.assert_close(model(X, TARGET)[1].detach(), expected[0])
    else:
        torch.testing.assert_close(results(model), expected)
        assert (repr(model), type(model).__name__) == (description, kind.__name__)
        assert model.state_dict().keys() == state.keys()
        plain.load_state_dict(model.state_dict())
    assert losses
    assert model(X, TARGET)[0] is None
    assert getattr(model, "calls", 2) == 2
    assert "." in pyfused.revert(model)
    assert (type(model), type(model.head)) == (kind, nn.Linear)
    assert model(X, TARGET)[0] is not None


def test_a_head_that_is_replaced_later(losses: list[Tensor]) -> None:
    model, plain = pyfused.convert(Model(), head="head"), Model()
    torch.manual_seed(9)
    model.head = nn.Linear(8, 40)
    plain.head = copy.deepcopy(model.head)
    torch.testing.assert_close(results(model), results(plain))
    assert losses


def test_several_threads_call_one_model(losses: list[Tensor]) -> None:
    model, expected = pyfused.convert(Model(), head="head"), Model()(X, TARGET)[1].detach()
    model(X, TARGET)
    losses.clear()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: model(X, TARGET)[1].detach(), range(80)))
    torch.testing.assert_close(torch.stack(found), expected.expand(80))
    assert len(losses) >= 80


def test_logits_that_outlive_the_forward_are_computed() -> None:
    """They keep the values of the forward, even after a step of the optimiser."""

    def keep(model: Any, logits: Tensor) -> Tensor:
        model.last = logits[:, :3]
        return logits

    plain, model = Model(keep), pyfused.convert(Model(keep), head="head")
    with pytest.warns(RuntimeWarning, match="are read by code after its forward"):
        results(model)
    results(plain)
    with torch.no_grad():
        model.head.weight.mul_(2)
    assert type(model.last) is Tensor
    torch.testing.assert_close(model.last, plain.last)


def test_a_call_keeps_no_references() -> None:
    """Logits, hidden states and the model are freed without garbage collection."""
    kept: list[Any] = []

    def keep(_: Any, logits: Tensor) -> Tensor:
        kept.append(weakref.ref(logits))
        return logits.view(-1, 40)

    model = pyfused.convert(Model(keep), head="head")
    model.emb.register_forward_hook(lambda *a: kept.append(weakref.ref(a[-1])))
    gc.disable()
    try:
        results(model)
        assert [each() for each in kept] == [None, None]
        freed = weakref.ref(model)
        del model
        assert freed() is None
    finally:
        gc.enable()


# ---- calls that differ from the first call -------------------------------------------------------


class Unusual(Model):
    """A model whose forward returns the result of ``change``, or in a usual call its loss."""

    usual = False

    def forward(self, x: Tensor, target: Tensor) -> Any:  # type: ignore[override]
        self.hidden = self.embedded(x).tanh()
        logits = self.head(self.hidden).flatten(0, 1)
        if self.usual:
            return F.cross_entropy(logits, target)
        return self.change(self, logits, target)


def learned(model: Any) -> Any:
    """Returns a converted model after a call whose logits only the loss has read."""
    model = pyfused.convert(model, head="head")
    model.usual = True
    model(X, TARGET)
    model.usual = False
    return model


class InCpp(torch.autograd.Function):
    """An autograd function whose operators are called by C++."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        with torch._C.DisableTorchFunctionSubclass():
            return 2 * x

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:  # noqa: ARG004
        return 2 * grad_output


class Dirty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:  # noqa: ARG004
        return 2 * grad_output


def changed(change: Callable[[Any], Any]) -> Callable[..., Tensor]:
    def loss(model: Any, logits: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            change(model)
        return F.cross_entropy(logits, target)

    return loss


def operand(name: str) -> Callable[..., Tensor]:
    def loss(_: Any, logits: Tensor, target: Tensor) -> Tensor:
        bias, index = torch.linspace(-1, 1, 40), torch.arange(64)
        rows = (logits + bias)[index]
        (bias if name == "bias" else index).mul_(0)
        return F.cross_entropy(rows, target)

    return loss


def through(function: Any) -> Callable[..., Any]:
    def gradients(model: Any, logits: Tensor, target: Tensor) -> Any:
        model.zero_grad()
        F.cross_entropy(function.apply(logits), target).backward()
        return [p.grad for p in model.parameters()]

    return gradients


def values(compiled: Callable[[], Any]) -> Callable[..., Any]:
    def both(_: Any, logits: Tensor, target: Tensor) -> Any:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            found = compiled()(logits)
        return found, F.cross_entropy(logits, target)

    return both


def in_cpp(x: Tensor) -> Tensor:
    return (x * 3).amax(-1)


def late(of: Callable[[Tensor, Tensor], Any], read: bool = False) -> Callable[..., Any]:
    def gradients(_: Any, logits: Tensor, target: Tensor) -> Any:
        loss = F.cross_entropy(logits, target)
        if read:
            logits.argmax()
        return of(logits, loss)

    return gradients


def hooked(register: Callable[..., Any]) -> Callable[[Tensor, Tensor], Any]:
    def gradients(logits: Tensor, loss: Tensor) -> list[Any]:
        seen: list[Any] = []
        register(logits, seen.append)
        loss.backward(retain_graph=True)
        return seen

    return gradients


def retained(logits: Tensor, loss: Tensor, **options: Any) -> Tensor | None:
    if not options:
        logits.retain_grad()
    loss.backward(retain_graph=True, **options)
    return logits.grad


all_of = torch.autograd.graph.register_multi_grad_hook
LATE: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "register_hook": hooked(Tensor.register_hook),
    "retain_grad": retained,
    "grad": lambda logits, loss: torch.autograd.grad(loss, logits, retain_graph=True),
    "grad of a sum": lambda logits, loss: torch.autograd.grad(loss + logits.sum(), logits),
    "backward": lambda logits, loss: retained(logits, loss, inputs=[logits]),
    "multi-grad hook, all": hooked(lambda x, call: all_of((x,), call, mode="all")),
    "multi-grad hook, any": hooked(lambda x, call: all_of((x,), call, mode="any")),
    "edge": lambda logits, loss: torch.autograd.grad(
        loss + logits.sum(), torch.autograd.graph.get_gradient_edge(logits)
    ),
}
CHANGED, IN_CPP = r"stay the same .* got one changed in place", r"got one\. Call pyfused.revert"
UNUSUAL: dict[str, tuple[Callable[..., Any], str | None]] = {
    "hidden": (changed(lambda model: model.hidden.mul_(2)), CHANGED),
    "weight": (changed(lambda model: model.head.weight.mul_(2)), CHANGED),
    # These changes do not increment a version counter.
    "hidden.data": (changed(lambda model: model.hidden.data.mul_(1.001)), None),
    "weight.data": (changed(lambda model: model.head.weight.data.mul_(0.999)), None),
    "numpy": (changed(lambda model: model.hidden.detach().numpy().fill(0)), None),
    "bias": (operand("bias"), CHANGED),
    "index": (operand("index"), CHANGED),
    "autograd.Function": (through(Doubled), IN_CPP),
    "autograd.Function in C++": (through(InCpp), IN_CPP),
    "dirty": (through(Dirty), "leaf Variable"),
    "script": (values(lambda: torch.jit.script(in_cpp)), ""),
    "vmap": (values(lambda: torch.vmap(torch.sin)), ""),
    **{name: (late(of), "Call it before the loss") for name, of in LATE.items()},
    **{f"{name}, read": (late(of, True), "Call it before the loss") for name, of in LATE.items()},
}


@pytest.mark.filterwarnings("ignore:pyfused.convert")
@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_calls(name: str) -> None:
    """Results equal torch's if all calls are unusual; if only a later one is, it may raise."""
    change, error = UNUSUAL[name]
    plain, model = Unusual(change), pyfused.convert(Unusual(change), head="head")
    expected = plain(X, TARGET)
    changes = pytest.warns(RuntimeWarning, match="after a change of its head's input or parameters")
    with changes if error is None else contextlib.nullcontext():
        torch.testing.assert_close(model(X, TARGET), expected)
    for _ in range(2):
        torch.testing.assert_close(model(X, TARGET), plain(X, TARGET))
    if error:
        with pytest.raises(RuntimeError, match=error):
            learned(Unusual(change))(X, TARGET)
    elif error == "":
        torch.testing.assert_close(learned(Unusual(change))(X, TARGET), plain(X, TARGET))


@pytest.mark.filterwarnings("ignore:pyfused.convert")
def test_logits_that_are_returned_after_a_fused_loss() -> None:
    """They can be read and pickled. Their gradient would lack the loss's, so it raises."""

    def reads(_: Any, logits: Tensor, target: Tensor) -> Any:
        loss = F.cross_entropy(logits, target)
        return logits.argmax(), logits, loss

    _, logits, loss = learned(Unusual(reads))(X, TARGET)
    torch.testing.assert_close(pickle.loads(pickle.dumps(logits)), logits * 1)
    total = loss + logits.sum()
    with pytest.raises(RuntimeError, match="Call it before the loss"):
        torch.autograd.grad(total, logits)


# ---- recorded operators --------------------------------------------------------------------------


class Masked(nn.Module):
    """A masked language model, whose head is two levels down."""

    def __init__(self, change: Any = lambda _, logits: logits) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.emb, self.predictions = nn.Embedding(50, 8), nn.Module()
        self.predictions.decoder = nn.Linear(8, 40)
        self.bias, self.change = nn.Buffer(torch.linspace(-1, 1, 40)[None]), change

    def forward(self, x: Tensor) -> Any:
        return self.change(self, self.predictions.decoder(self.emb(x).tanh()))


def of_rows(change: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda m, x: F.cross_entropy(change(m, x).reshape(-1, 40), TARGET)


# Losses of a model's logits, and the operator that reads the logits; None if the loss is fused.
OPERATORS: dict[str, tuple[Callable[..., Tensor], str | None]] = {
    "bias": (of_rows(lambda m, x: x + m.bias), None),
    "class weights": (
        lambda m, x: F.cross_entropy(
            x.view(-1, 40), TARGET, 1.5 + m.bias[0], ignore_index=3, label_smoothing=0.1
        ),
        None,
    ),
    "channels": (
        lambda m, x: F.cross_entropy(x.permute(0, 2, 1), PLACES, reduction="none").norm(),
        None,
    ),
    "mask": (lambda m, x: F.cross_entropy(x[X % 3 == 0], PLACES[X % 3 == 0]), None),
    "rows": (lambda m, x: F.cross_entropy(x[torch.arange(4), TARGET[:4]], TARGET[:4]), None),
    "log_softmax": (lambda m, x: F.nll_loss(x.log_softmax(-1).view(-1, 40), TARGET), None),
    "log_softmax of channels": (
        lambda m, x: nn.NLLLoss()(nn.LogSoftmax(2)(x).transpose(1, 2), PLACES),
        None,
    ),
    "mul": (of_rows(lambda m, x: x.mul(other=0.5)), None),
    "div": (of_rows(lambda m, x: torch.true_divide(x, other=2.0)), None),
    "add": (of_rows(lambda m, x: torch.add(x, other=m.bias)), None),
    "mul of keywords": (of_rows(lambda m, x: torch.mul(input=x, other=0.5)), "mul"),
    "rounded": (of_rows(lambda m, x: x.div(2.0, rounding_mode="trunc") + x), "div"),
    "alpha": (of_rows(lambda m, x: torch.add(x, m.bias, alpha=2)), "add"),
    "NumPy": (of_rows(lambda m, x: np.float32(0.5) * x), ""),
    "unpacked": (of_rows(lambda m, x: torch.cat([*x])), ""),
    "iteration": (of_rows(lambda m, x: torch.stack([row + 1 for row in x])), ""),
    "add of a gradient": (of_rows(lambda m, x: x + m.emb.weight[:40, 0]), "add"),
    "nll_loss": (lambda m, x: F.nll_loss(x.view(-1, 40), TARGET), "nll_loss"),
    "cross_entropy": (of_rows(lambda m, x: x.log_softmax(-1)), "cross_entropy"),
    "log_softmax of positions": (of_rows(lambda m, x: x.log_softmax(1)), "log_softmax"),
    "transpose": (of_rows(lambda m, x: x.transpose(0, 1)), "transpose"),
    "view": (of_rows(lambda m, x: x.view(torch.int64).view(torch.float64)), "view"),
    "indexing": (of_rows(lambda m, x: x[:, :, None][:, :, 0] + x[..., :40]), "indexing"),
}


def with_gradients(loss: Tensor, model: nn.Module) -> tuple[Tensor, ...]:
    return loss, *torch.autograd.grad(
        loss + model.predictions.decoder.weight.sum(), [*model.parameters()], allow_unused=True
    )


@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name: str, losses: list[Tensor]) -> None:
    """An operator is recorded, or reads the logits, which one warning reports."""
    change, reader = OPERATORS[name]
    plain = Masked(change).double()
    model = pyfused.convert(copy.deepcopy(plain), head="predictions.decoder")
    expected = with_gradients(plain(X), plain)
    for number in range(2):
        if reader is not None and number == 0:
            with pytest.warns(RuntimeWarning, match=f"are read by {reader}") as warned:
                loss = model(X)
            assert warned[0].filename == __file__
        else:
            loss = model(X)
        torch.testing.assert_close(with_gradients(loss, model), expected, rtol=1e-9, atol=1e-9)
    assert losses or reader is not None


@pytest.mark.parametrize("options", [{}, {"ignore_index": None}], ids=["dtype", "ignore_index"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_torchs_errors(options: dict[str, Any], dtype: torch.dtype) -> None:
    model = Masked(lambda _, x: F.cross_entropy(x.mT, PLACES.to(dtype), **options))
    errors = []
    for convert in (lambda m, **_: m, pyfused.convert):
        with pytest.raises((RuntimeError, TypeError)) as raised:
            convert(copy.deepcopy(model), head="predictions.decoder")(X)
        errors.append((raised.type, str(raised.value)))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("exact", [True, False])
def test_a_bias_under_autocast(exact: bool, losses: list[Tensor]) -> None:
    """A float32 bias is fused if bfloat16 represents it exactly."""
    plain, model = Masked(OPERATORS["bias"][0]), Masked(OPERATORS["bias"][0])
    for each in (plain, model):
        each.bias = each.bias.bfloat16().float() if exact else 10 * each.bias
    pyfused.convert(model, head="predictions.decoder")
    warned = contextlib.nullcontext() if exact else pytest.warns(RuntimeWarning, match="by add")
    with torch.autocast("cpu", torch.bfloat16), warned:
        torch.testing.assert_close(model(X), plain(X), rtol=0.02, atol=0.02)
    assert bool(losses) == exact
    model.bias.mul_(1.2345)  # its values are compared again
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(X)
    assert len(losses) <= 2 * exact


# ---- evaluation and metrics ----------------------------------------------------------------------

MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("evaluation", [False, True])
def test_evaluation(mode: str, evaluation: bool, losses: list[Tensor]) -> None:
    model = pyfused.convert(Model(), head="head", evaluation=evaluation).eval()
    for _ in range(2):  # the first loss is compared
        with MODES[mode]():
            expected, (logits, loss) = Model()(X, TARGET), model(X, TARGET)
            logits_alone = model(X)
        assert (logits is None, bool(losses)) == (evaluation, evaluation)
        assert loss.requires_grad == (mode == "grad")
        torch.testing.assert_close(loss.clone(), expected[1].clone())
        torch.testing.assert_close(logits_alone.clone(), expected[0].clone())
    if evaluation and mode == "grad":
        torch.testing.assert_close(results(model), results(Model()))


@pytest.mark.filterwarnings("ignore")  # raised by Dynamo
def test_evaluation_and_metrics_compiled() -> None:
    model: Any = pyfused.convert(Model(), head="head", evaluation=True, metrics=True)
    compiled, expected = torch.compile(model, backend="aot_eager"), Model()(X, TARGET)[1]
    for training in (True, False):
        model.train(training)
        with torch.set_grad_enabled(training):
            torch.testing.assert_close(compiled(X, TARGET)[1], expected)
        assert model.pyfused_metrics.correct.shape == TARGET.shape


def test_metrics() -> None:
    """The metrics equal the function's, for the model's last call."""
    plain = Model()
    model: Any = pyfused.convert(Model(), head="head", evaluation=True, metrics=True)
    hidden = plain.emb(X).flatten(0, 1)
    _, expected = pyfused.functional.linear_cross_entropy_with_metrics(
        hidden, plain.head.weight, TARGET, linear_bias=plain.head.bias
    )
    for each in (model, copy.deepcopy(model), model.eval()):
        with torch.no_grad() if not each.training else torch.enable_grad():
            assert each(X, TARGET)[0] is None
        torch.testing.assert_close(each.pyfused_metrics, expected)
        assert not any(x.requires_grad for x in each.pyfused_metrics)
    torch.testing.assert_close(results(model), results(Model()))
    model(X)
    assert model.pyfused_metrics is None  # without a loss
    assert model.state_dict().keys() == plain.state_dict().keys()
    pyfused.revert(model)
    assert not hasattr(model, "pyfused_metrics")


# ---- the first loss ------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_first_loss_that_is_rounded_or_nan_does_not_warn(
    reduction: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Large(Model):
        def forward(self, x: Tensor, target: Tensor) -> Any:
            logits = 8 * self.head(self.emb(x)).flatten(0, 1).float()
            return None, F.cross_entropy(logits, target, reduction=reduction, ignore_index=3).sum()

    monkeypatch.setattr(causal_lm, "ROWS_BYTES", 4 * 40 * 7)  # seven rows at a time
    for first in (TARGET, torch.full_like(TARGET, 3)):
        model = pyfused.convert(Large().to(dtype), head="head")
        sizes = []
        for target in (first, TARGET, TARGET):
            with products() as found:
                model(X, target)[1].backward()
            sizes.append(len(found))
        assert is_fused(model)
        assert sizes[2] < sizes[0] or first is not TARGET  # only the first loss is compared


@pytest.mark.parametrize("wrong", ["loss", "gradient", "finite"])
def test_a_model_whose_first_loss_differs_is_reverted(
    wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = deferred.linear_cross_entropy

    def other(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        loss = right(input, *args, **kwargs)
        if wrong == "finite":
            return loss + math.nan
        return loss * 1.01 if wrong == "loss" else loss + 0.001 * (input - input.detach()).sum()

    expected = results(Model())
    monkeypatch.setattr(deferred, "linear_cross_entropy", other)
    model = pyfused.convert(Model(), head="head")
    named = "gradient" if wrong == "gradient" else "loss"
    with pytest.warns(RuntimeWarning, match=f"its {named} differs from torch's by .* Later calls"):
        found = results(model)
    torch.testing.assert_close(found, expected)
    assert type(model) is Model
    torch.testing.assert_close(results(model), expected)


# ---- torch.compile -------------------------------------------------------------------------------


def view_first(_: Any, logits: Tensor) -> Tensor:
    view = logits.view(-1, 40)
    logits.mul_(9.0)
    return view


def alias(_: Any, logits: Tensor) -> Tensor:
    logits.float().masked_fill_(torch.arange(40) > 30, -1e9)
    return logits


def without_gradient_first(_: Any, logits: Tensor) -> Tensor:
    with torch.no_grad():
        view = logits.view(-1, 40)
        logits.argmax(-1)
    return view + 2 * logits.view(-1, 40)


def broken(_: Any, logits: Tensor) -> Tensor:
    view = 2 * logits
    torch._dynamo.graph_break()
    logits.mul_(3)
    return view + logits


def residual(model: Any, logits: Tensor) -> Tensor:
    """Changes the head's input in place, for another call of the head."""
    model.hidden += 2.0
    return logits + 0 * model.head(model.hidden).sum()


def bias_changes(_: Any, logits: Tensor) -> Tensor:
    bias = torch.arange(40.0)
    logits = logits + bias
    bias.zero_()
    return logits


COMPILED: list[tuple[Callable[..., Tensor], bool]] = [
    (_keep, True),
    (lambda _, x: 3 * torch.tanh(x.float().view(size=(-1, 40)) / 3), True),
    (lambda model, x: x[:, 1:].reshape(-1, 40).repeat(2, 1)[:64] * model.factor, False),
    (view_first, False),
    (alias, False),
    (without_gradient_first, False),
    (broken, False),
    (lambda _, x: torch.add(x, torch.arange(40), alpha=2), False),
]


def compiled_steps(model: Model, fullgraph: bool = True) -> tuple[tuple[Tensor, ...], list[str]]:
    """Returns the loss and gradients of two compiled steps, and the operators of the forwards."""
    from torch._dynamo.backends.common import aot_autograd

    names: list[str] = []

    def forward(program: Any, _: Any) -> Any:
        names.extend(str(node.target) for node in program.graph.nodes)
        return program

    backend = aot_autograd(fw_compiler=forward, bw_compiler=lambda program, _: program)
    compiled = torch.compile(model, backend=backend, fullgraph=fullgraph)
    compiled(X, TARGET)[1].backward()
    loss = compiled(X, TARGET)[1].detach()
    return (loss, *(p.grad for p in model.parameters())), names


@pytest.mark.filterwarnings("ignore")  # raised by Dynamo
@pytest.mark.parametrize(("change", "is_fused"), COMPILED)
def test_a_compiled_model(change: Callable[..., Tensor], is_fused: bool) -> None:
    expected = results(Model(change))
    model = pyfused.convert(Model(change), head="head")
    found, names = compiled_steps(model, fullgraph=change is not broken)
    torch.testing.assert_close(found, expected)
    assert any("linear_cross_entropy" in name for name in names) == is_fused
    assert not (is_fused and any("addmm" in name for name in names)), names


@pytest.mark.filterwarnings("ignore")  # raised by Dynamo
@pytest.mark.parametrize(
    "change",
    [residual, bias_changes, lambda _, x: np.float32(0.5) * x, lambda _, x: torch.cat([*x])],
)
def test_a_compiled_model_that_may_break_its_graph(change: Any) -> None:
    """The loss uses the operands' values at the head's call, even if they change later."""
    compiled = torch.compile(pyfused.convert(Model(change), head="head"), backend="aot_eager")
    torch.testing.assert_close(compiled(X, TARGET)[1], Model(change)(X, TARGET)[1])


@pytest.mark.filterwarnings("ignore")  # raised by Dynamo
def test_a_graph_break_does_not_affect_compiled_models_of_other_classes() -> None:
    """Dynamo does not retry code that it failed to compile, and code objects may be shared."""

    class Other(Model):
        pass

    compiled_steps(pyfused.convert(Model(broken), head="head"), fullgraph=False)
    _, names = compiled_steps(pyfused.convert(Other(_keep), head="head"))
    assert any("linear_cross_entropy" in name for name in names)


def test_torch_jit_trace() -> None:
    model = pyfused.convert(Model(), head="head")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, (X,))
    torch.testing.assert_close(traced(X), Model()(X))


# ---- outputs -------------------------------------------------------------------------------------


class Named(dict):  # type: ignore[type-arg]
    def __init__(self, name: str, entries: Any) -> None:
        super().__init__(entries)
        self.name = name


class Pair(tuple):  # type: ignore[type-arg]
    loss = property(lambda self: self[1])


class Fields(NamedTuple):
    logits: Any
    loss: Any


OUTPUTS: dict[str, tuple[Callable[..., Any], Callable[[Any], Any]]] = {
    "numbered": (lambda a, b: OrderedDict([(0, a), (1, b)]), lambda o: (o[0], o[1])),
    "default": (
        lambda a, b: defaultdict(float, logits=a, loss=b),
        lambda o: (o["logits"], o["loss"] + o["auxiliary loss"]),
    ),
    "named": (
        lambda a, b: Named("batch", {"logits": a, "loss": b}),
        lambda o: (o["logits"], o["loss"] * (o.name == "batch")),
    ),
    "tuple": (lambda a, b: Pair((a, b)), lambda o: (o[0], o.loss)),
    "namedtuple": (Fields, lambda o: (o.logits, o.loss)),
    "nested": (lambda a, b: ({"all": (a,)}, [b]), lambda o: (o[0]["all"][0], o[1][0])),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_of_a_model(name: str) -> None:
    output, parts = OUTPUTS[name]

    class Returns(Model):
        def forward(self, x: Tensor, target: Tensor) -> Any:  # type: ignore[override]
            logits = self.head(self.embedded(x)).flatten(0, 1)
            return output(logits, F.cross_entropy(logits, target))

    expected, model = Returns()(X, TARGET), pyfused.convert(Returns(), head="head")
    for _ in range(2):
        found = model(X, TARGET)
        assert type(found) is type(expected)
        assert parts(found)[0] is None
        torch.testing.assert_close(parts(found)[1], parts(expected)[1])


# ---- warnings and logs ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:pyfused.convert")
def test_logs_contain_no_internal_names(
    caplog: pytest.LogCaptureFixture, losses: list[Tensor]
) -> None:
    class Own(Model):
        def forward(self, x: Tensor, target: Tensor) -> Any:
            logits = self.head(self.emb(x)).flatten(0, 1)
            loss = pyfused.functional.cross_entropy(logits, target)
            return None, loss + pyfused.nn.ReLU()(logits).sum()

    reasons._reported.clear()
    with caplog.at_level(logging.INFO, "pyfused"):
        results(pyfused.convert(Own(), head="head"))
    assert losses
    assert not any("Logits" in record.getMessage() for record in caplog.records)


def test_a_compiled_model_warns_once() -> None:
    reasons._reported.clear()
    model = pyfused.convert(Model(_keep), head="head")
    model.head.register_forward_hook(lambda *_: None)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.warns(RuntimeWarning, match="Model computes all of its logits: its head has hooks"):
        compiled(X, TARGET)
    torch.compiler.reset()
    compiled(X, TARGET)  # a second warning would be an error


if __name__ == "__main__":
    from pyfused.dispatch import sizes

    sizes.FORCED = "every size"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    count, first = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    found: Counter[str] = Counter()
    for seed in range(first, first + count):
        try:
            found += compare(seed)
        except AssertionError as difference:  # noqa: PERF203
            print(f"seed {seed} differs: {str(difference)[:300]}", flush=True)
    print(f"{count} models from {first}: {dict(found)}")
