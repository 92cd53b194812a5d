"""A converted head gives what the model gives without it, whatever its forward does with logits.

`python tests/test_converted_heads.py 5000` compares that many drawn forwards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import pyfused
from pyfused import deferred
from pyfused.subclass import is_fused

CLASSES, FEATURES = 23, 6


class Doubled(torch.autograd.Function):
    """A function of somebody else's, which torch shows to no ``__torch_function__``."""

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


class Drawn(nn.Module):
    """A model whose forward is drawn: views, changes in place, reads, and losses of its logits."""

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
        self.program = draw.getrandbits(60)
        self.seen: list[Tensor] = []

    def forward(self, tokens: Tensor) -> Any:
        draw = random.Random(self.program)
        self.seen, losses = [], []
        logits = self.head(self.emb(tokens).tanh())
        family = [logits]
        steps = draw.choice([0, 1, 2, 3, 5, 8])
        kinds = PROVEN if draw.random() < 0.5 else PROVEN + ANY
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
        losses += [
            loss_of(draw.choice(family), draw, kinds is not PROVEN)
            for _ in range(draw.choice([1, 1, 2]))
        ]
        loss = torch.stack([each.double() for each in losses]).sum()
        kept, kind = draw.choice(family), draw.randrange(5)
        if kind == 0:
            self.kept = kept
        output: list[Any] = [
            (kept, loss),
            {"logits": kept, "loss": loss},
            Output(kept, loss),
            [kept, loss],
            (None, loss),
        ]
        return output[kind]


def number(draw: random.Random) -> float:
    return draw.choice([2, 0.5, 3.0, 1.25, 1, 0.1])


def view(x: Tensor, draw: random.Random, seen: list[Tensor]) -> Tensor:  # noqa: ARG001
    classes = x.shape[-1:]
    return draw.choice(
        [
            lambda: x.view(-1, *classes),
            lambda: x.view(size=(-1, *classes)),
            lambda: x.reshape(*x.shape[:-1], -1) if x.numel() else x,
            lambda: x.reshape((-1, *classes)),
            lambda: torch.reshape(x, (-1, *classes)),
            lambda: x.flatten(0, -2) if x.dim() > 1 else x,
            lambda: x.flatten(start_dim=0, end_dim=-2) if x.dim() > 1 else x,
            lambda: x.unsqueeze(0),
            lambda: x.squeeze(0),
            lambda: x.contiguous(),
            lambda: x.view(x.shape),
        ]
    )()


def sliced(x: Tensor, draw: random.Random, seen: list[Tensor]) -> Tensor:  # noqa: ARG001
    if x.dim() < 2 or min(x.shape) < 2:
        return x
    return draw.choice(
        [
            lambda: x[..., :-1, :],
            lambda: x[1:],
            lambda: x[:, :-1],
            lambda: x[:, :2, ...],
            lambda: x[0],
            lambda: x[-1:, ...],
            lambda: x[..., :, :],
            lambda: x[:],
            lambda: x[::2],
        ]
    )()


def scaled(x: Tensor, draw: random.Random, seen: list[Tensor]) -> Tensor:  # noqa: ARG001
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


def cast(x: Tensor, draw: random.Random, seen: list[Tensor]) -> Tensor:  # noqa: ARG001
    return draw.choice(
        [
            lambda: x.float(),
            lambda: x.to(torch.float32),
            lambda: x.to(dtype=torch.float32),
            lambda: x.to(x.device),
            lambda: x.to(x.dtype),
            lambda: x.double(),
        ]
    )()


def in_place(x: Tensor, draw: random.Random, seen: list[Tensor]) -> Tensor:  # noqa: ARG001
    by = number(draw)

    def index(x: Tensor) -> Tensor:
        x[..., 0] = -1.5
        return x

    def by_operator(x: Tensor) -> Tensor:
        x *= by
        return x

    def without_gradient(x: Tensor) -> Tensor:
        with torch.no_grad():
            x.mul_(by)
        return x

    return draw.choice(
        [
            lambda: x.mul_(by),
            lambda: x.add_(by),
            lambda: x.div_(by),
            lambda: x.clamp_(-2, 2),
            lambda: x.masked_fill_(x > 1, 0.5),
            lambda: torch.nn.functional.relu_(x),
            lambda: index(x),
            lambda: by_operator(x),
            lambda: without_gradient(x),
        ]
    )()


def read(x: Tensor, draw: random.Random, seen: list[Tensor]) -> Tensor:  # noqa: ARG001
    def hooked(x: Tensor) -> Tensor:
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


def without_gradient(x: Tensor, draw: random.Random, seen: list[Tensor]) -> Tensor:  # noqa: ARG001
    change = draw.choice(PROVEN + ANY[:2])
    with torch.no_grad() if draw.random() < 0.7 else torch.inference_mode():
        seen.append(change(x, draw, seen).clone())
    return x


PROVEN: list[Callable[..., Tensor]] = [view, view, sliced, scaled, cast]
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
    if anything and draw.random() < 0.5:
        weight = torch.linspace(0.5, 1.5, classes, dtype=rows.dtype)
        return draw.choice(
            [
                lambda: F.cross_entropy(rows, index, weight=weight),
                lambda: F.cross_entropy(rows.t()[None], index[None], **options).sum(),
                lambda: F.nll_loss(rows.log_softmax(-1), index.clamp(min=0)),
                lambda: rows.logsumexp(-1).sum(),
                lambda: F.cross_entropy(rows, rows.detach().softmax(-1)),
                lambda: F.cross_entropy(rows[0], index[0].clamp(min=0)),
                lambda: pyfused.functional.cross_entropy(rows, index, z_loss=0.1),
                lambda: checkpoint(F.cross_entropy, rows, index, use_reentrant=draw.random() < 0.5),
            ]
        )()
    return draw.choice(
        [
            lambda: F.cross_entropy(rows, index, **options).sum(),
            lambda: nn.CrossEntropyLoss(**options)(rows, index).sum(),
            lambda: F.cross_entropy(input=rows, target=index, **options).sum(),
            lambda: pyfused.functional.cross_entropy(rows, index, **options).sum(),
        ]
    )()


def step(model: Drawn, draw: random.Random) -> tuple[Any, list[Any]]:
    """The error of a step, or its loss, outputs and gradients."""
    tokens = torch.arange(12).view(3, 4) % 11
    autocast = draw.random() < 0.1
    outer = draw.random() < 0.1
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if outer:
                output = checkpoint(model, tokens, use_reentrant=False)
            else:
                output = model(tokens)
        if isinstance(output, Output):
            output = output.logits, output.loss
        logits, loss = output.values() if isinstance(output, dict) else output
        seen = [loss, logits, getattr(model, "kept", None), *model.seen]
        if getattr(model, "kept", None) is not None and model.kept.requires_grad:
            loss = loss + model.kept.square().mean()
        loss.backward()
    except Exception as error:
        return error, []
    leaves = [p.grad for p in model.parameters()]
    seen += [x.grad for x in model.seen if x.requires_grad and not x.is_leaf]
    return None, [autocast, leaves, seen]


def compare(seed: int) -> str:
    """Compares a drawn model with itself converted, and says how its loss was computed."""
    model = Drawn(seed)
    expected_error, expected = step(model, random.Random(seed))
    again = pyfused.convert(Drawn(seed), head="head")
    fused: list[deferred.Family] = []
    loss = deferred._Node.loss

    def counted(node: Any, *args: Any) -> Tensor:
        fused.append(node.family)
        return loss(node, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deferred._Node, "loss", counted)
        error, found = step(again, random.Random(seed))
    if str(error).startswith("pyfused.convert: expected register_hook"):
        return "refused"
    where = f"seed {seed}: {expected_error!r} became {error!r}"
    if "modified by an inplace operation" in str(expected_error) and error is None:
        return "error"  # a fused loss has saved less than torch's
    assert type(error) is type(expected_error), where
    if error is not None:
        return "error"
    assert is_fused(again), where  # it has found no difference itself
    coarse = found[0] or any(p.dtype is torch.float32 for p in again.parameters())
    rtol, atol = (0.05, 0.02) if found[0] else (1e-3, 1e-4) if coarse else (1e-4, 1e-5)
    for ours, theirs in zip(found[1] + found[2], expected[1] + expected[2], strict=True):
        if ours is None and theirs is not None and theirs.shape[-1:] == (CLASSES,):
            continue  # logits of which the loss alone was asked, or a gradient of zeros
        if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
            assert ours.dtype is theirs.dtype, where
            assert ours.requires_grad == theirs.requires_grad, where
        torch.testing.assert_close(
            ours, theirs, rtol=rtol, atol=atol, equal_nan=True, msg=lambda text: f"{where}: {text}"
        )
    return "without logits" if any(not family.computed for family in fused) else "with logits"


@pytest.mark.filterwarnings("ignore:pyfused.convert")
@pytest.mark.parametrize("first", range(0, 300, 50))
def test_drawn_forwards(first: int) -> None:
    found = Counter(compare(seed) for seed in range(first, first + 50))
    assert found["without logits"] >= 5, found
    assert found["with logits"] >= 20, found
    assert found["error"] + found["refused"] <= 10, found


# ---- a head that is more than its weight and bias ------------------------------------------------

X, TARGET = torch.arange(64).view(4, 16) % 50, torch.arange(64) % 40


class Model(nn.Module):
    """A model whose forward calls what is given of itself and its logits."""

    factor = 1.25

    def __init__(self, change: Callable[..., Any] = lambda _, logits: logits) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.emb, self.head = nn.Embedding(50, 8), nn.Linear(8, 40)
        self.change = change

    def embedded(self, x: Tensor) -> Tensor:
        result: Tensor = self.emb(x)
        return result

    def forward(self, x: Tensor, target: Tensor | None = None) -> Any:
        logits = self.change(self, self.head(self.embedded(x)))
        if target is None:
            return logits
        return logits, F.cross_entropy(logits.reshape(-1, logits.shape[-1]), target)


def results(model: nn.Module) -> tuple[Tensor, ...]:
    """The loss and the gradients of a batch."""
    model.zero_grad()
    loss = model(X, TARGET)[1]
    loss.backward()
    return loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)


def offloaded(head: nn.Linear) -> None:
    """What accelerate does: another forward of the instance, and a weight without memory."""
    kept = {name: parameter.detach() for name, parameter in head.named_parameters()}
    for name in kept:
        setattr(head, name, nn.Parameter(torch.empty_like(kept[name], device="meta")))
    head.forward = lambda x: F.linear(x, kept["weight"], kept["bias"])


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
    "offloaded": (offloaded, "forward of its head was replaced"),
    "forward": (lambda h: setattr(h, "forward", lambda x: 9 * x @ h.weight.t()), "replaced"),
    "hook": (lambda h: h.register_forward_hook(lambda *a: 2 * a[-1]), "hooks"),
    "pre-hook": (lambda h: h.register_forward_pre_hook(lambda _, a: (2 * a[0],)), "hooks"),
    "backward": (lambda h: h.register_full_backward_hook(lambda *a: (3 * a[1][0],)), "hooks"),
    "backward pre": (lambda h: h.register_full_backward_pre_hook(other_gradient), "hooks"),
    "global": (globally, "hooks"),
    "parametrised": (
        lambda h: nn.utils.parametrizations.weight_norm(h),
        "is a ParametrizedLinear, and no plain torch.nn.Linear",
    ),
    "pruned": (lambda h: nn.utils.prune.l1_unstructured(h, "weight", 0.5), "hooks"),
    "class": (lambda h: setattr(h, "__class__", Twice), "is a Twice, and no plain"),
    "compiled": (lambda h: h.compile(backend="eager"), "compiled by itself"),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_head_that_is_more_than_its_weight(name: str, when: str) -> None:
    if (name, when) == ("compiled", "before"):
        pytest.skip("convert refuses a model with a compiled part")
    import torch.nn.utils.prune  # noqa: F401

    change, reason = CHANGES[name]
    plain, model = Model(), Model()
    remove = [change(plain.head)]
    expected = results(plain)
    if name == "global":
        remove[0].remove()
    try:
        if when == "before":
            remove.append(change(model.head))
            if name in ("parametrised", "class"):
                with pytest.raises(ValueError, match="expected the name of a Linear"):
                    pyfused.convert(model, head="head")
                return
            (left,) = pyfused.plan_conversion(model, head="head").left
            assert reason in left.reason
            pyfused.convert(model, head="head")
        else:
            pyfused.convert(model, head="head")
            results(model)
            remove.append(change(model.head))
            with pytest.warns(RuntimeWarning, match=f"Model computes all of its logits:.*{reason}"):
                results(model)
        found = results(model)  # without a second warning
    finally:
        if name == "global":
            remove[-1].remove()
    torch.testing.assert_close(found, expected)


def test_a_head_without_elements_or_of_another_class() -> None:
    """What ZeRO-3 leaves of a weight, and a subclass put there later."""

    class Quantised(Tensor):
        pass

    model = pyfused.convert(Model(), head="head")
    weight = model.head.weight
    model.head.weight = nn.Parameter(torch.empty(0, 8))
    with pytest.warns(RuntimeWarning, match="weight of its head has no elements"):
        assert model(X).shape == (4, 16, 0) if model.head.bias is None else True
    model.head.weight = nn.Parameter(weight.detach().as_subclass(Quantised))
    with pytest.warns(RuntimeWarning, match="weight of its head is a Quantised"):
        model(X)
    model.head.weight = nn.Parameter(weight.detach().to("meta"))
    with pytest.warns(RuntimeWarning, match="weight of its head is on meta, and its input on cpu"):
        model(X)


if __name__ == "__main__":
    from pyfused.ops import sizes

    sizes.FORCED = "every size"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    count, first = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    found: Counter[str] = Counter()
    for seed in range(first, first + count):
        try:
            found[compare(seed)] += 1
        except AssertionError as error:
            found["differs"] += 1
            print(str(error)[:400], flush=True)
    print(f"{count} forwards from {first}: {dict(found)}")
