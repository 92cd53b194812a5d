"""A converted head does not change results, whatever a model's forward does with its logits."""

from __future__ import annotations

import copy
import operator
import pickle
import random
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compare import FLOATS
from language_models import PLACES, TARGET, Model, X, are_computed, converted, stepped
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import pyfused
from pyfused.adopt import lazy_logits
from pyfused.adopt.lazy_logits import LazyLogits

pytestmark = pytest.mark.usefixtures("reset_warnings")


class Doubled(torch.autograd.Function):
    """An autograd function of another library, which ``__torch_function__`` does not see."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:  # noqa: ARG004
        return 3 * grad_output


# ---- sequences of calls, reads, losses, backward passes and changes ------------------------------

CLASS, ROWS = PLACES.unsqueeze(-1), torch.arange(4).unsqueeze(-1)
INDEX = torch.tensor([1, 0, 1])
FACTORS = 2, 0.5, 3.0, 1.25, 1, 0.1


def unless_small(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor, float], Tensor]:
    """Returns an operator that leaves tensors of few elements or one dimension as they are."""
    return lambda x, _: change(x) if x.dim() > 1 and min(x.shape) > 1 else x


def mask_of(x: Tensor, dimensions: int) -> Tensor:
    return torch.arange(x.shape[:dimensions].numel()).view(x.shape[:dimensions]) % 4 != 1


# Operators that keep the logits of three dimensions lazy.
LAZY: dict[str, Callable[[Tensor, float], Tensor]] = {
    "view": lambda x, _: x.view(-1, *x.shape[-1:]),
    "reshape": lambda x, _: x.reshape(*x.shape[:-1], -1) if x.numel() else x,
    "flatten": lambda x, _: x.flatten(start_dim=0, end_dim=-2) if x.dim() > 1 else x,
    "unsqueeze": lambda x, _: x.unsqueeze(0),
    "squeeze": lambda x, _: x.unsqueeze(1).squeeze(1),
    "contiguous": lambda x, _: x.contiguous(),
    "clone": lambda x, _: x.clone(),
    "transpose": unless_small(lambda x: x.transpose(0, -1)),
    "t": unless_small(lambda x: x.flatten(0, -2).t()),
    "movedim": unless_small(lambda x: x.movedim(-1, 1)),
    "permute": unless_small(lambda x: x.permute(*range(x.dim())[::-1])),
    "mT": unless_small(lambda x: x.mT),
    "slice": unless_small(lambda x: x[1:, ..., :40]),
    "slices": unless_small(lambda x: x[:, :2, ...]),
    "select": unless_small(lambda x: x[0]),
    "slice of positions": unless_small(lambda x: x.mT[..., -9:]),
    "chunk": unless_small(lambda x: x.chunk(2)[-1]),
    "split": unless_small(lambda x: x.split([1, len(x) - 1])[1]),
    "mask": unless_small(lambda x: x[mask_of(x, 1)]),
    "mask of all rows": unless_small(lambda x: x[mask_of(x, x.dim() - 1)]),
    "index": unless_small(lambda x: x[INDEX, INDEX] if x.dim() > 2 else x[(INDEX,)]),
    "index of two dimensions": unless_small(lambda x: x[INDEX.view(1, 3).expand(2, 3)]),
    "index_select": unless_small(lambda x: x.index_select(0, INDEX)),
    "add": lambda x, _: x + torch.linspace(-1, 2, x.shape[-1], dtype=x.dtype),
    "mul": lambda x, by: by * x,
    "div": lambda x, by: x / by,
    "cap": lambda x, by: torch.tanh(x / by) * by,
    "tanh": lambda x, _: x.tanh(),
    "log_softmax": lambda x, _: x.log_softmax(-1),
    "log_softmax of moved logits": unless_small(lambda x: x.mT.log_softmax(1)),
    "float": lambda x, _: x.float(),
    "to": lambda x, _: x.to(x.device, x.dtype),
    "unbind": lambda x, by: by * [*x][-1] if x.dim() > 2 else x,
}
READERS: list[Callable[[Tensor], Tensor]] = [
    lambda x: x.argmax(-1),
    lambda x: x * torch.tensor(1.5),
    lambda x: x.detach() * -2,
    lambda x: x.double() * 3,
    lambda x: x[..., -9:] * 4,
    lambda x: x[None, ..., None],
    lambda x: x[..., torch.tensor([0, 2])],
    lambda x: torch.from_numpy(x.detach().numpy()),
    lambda x: pickle.loads(pickle.dumps(x.detach())),
    lambda x: 1 * Doubled.apply(x),
    lambda x: torch.func.vmap(torch.sigmoid)(x),
]
IN_PLACE: list[Callable[[Tensor], Any]] = [
    lambda x: x.mul_(0.5),
    lambda x: F.relu_(x),
    lambda x: operator.setitem(x, (..., 0), -1.5) or x,
]


def drawn_loss(x: Tensor, draw: random.Random) -> Tensor:
    if 40 in x.shape and draw.random() < 0.9:
        x = x.movedim(x.shape.index(40), -1)
    classes = x.shape[-1]
    rows = x.reshape(-1, classes)
    generator = torch.Generator().manual_seed(draw.getrandbits(30))
    index = torch.randint(classes, (len(rows),), generator=generator)
    options: dict[str, Any] = {"reduction": draw.choice(["mean", "mean", "sum", "none"])}
    if draw.random() < 0.5:
        options["ignore_index"] = draw.choice([-100, 0])
        index[1::3] = options["ignore_index"]
    if draw.random() < 0.3:
        options["label_smoothing"] = 0.1
    if draw.random() < 0.2:
        options["weight"] = torch.linspace(0.5, 1.5, classes, dtype=rows.dtype)
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
        ]
    if x.dim() > 2:
        places = index.view(x.shape[:-1])
        losses += [lambda: F.cross_entropy(x.movedim(-1, 1), places, **options)] * 2
    if draw.random() < 0.2:
        valid = index.clamp(min=0)
        losses = [
            lambda: F.cross_entropy(rows.t()[None], index[None], **options),
            lambda: rows.gather(-1, valid[:, None]) - Doubled.apply(rows).logsumexp(-1),
            lambda: F.log_softmax(rows, -1)[torch.arange(len(rows)), valid],
            lambda: sum(map(F.nll_loss, rows.log_softmax(-1), valid)),
            lambda: F.cross_entropy(rows, rows.detach().softmax(-1)),
            lambda: F.cross_entropy(rows[0], valid[0]),
            lambda: pyfused.functional.cross_entropy(rows, index, z_loss=0.1),
            lambda: checkpoint(F.cross_entropy, rows, index, use_reentrant=False),
        ]
    return draw.choice(losses)().sum()


# Backward passes of a loss, of which some parameters need gradients.
BACKWARDS: list[Callable[[Tensor, Any, bool], Any]] = [
    lambda loss, _, keep: loss.backward(retain_graph=keep),
    lambda loss, p, keep: loss.backward(inputs=p[-1:], retain_graph=keep),
    lambda loss, p, keep: torch.autograd.grad(loss, p[0], retain_graph=keep),
    lambda loss, p, keep: torch.autograd.grad(loss, p, retain_graph=keep, create_graph=True),
    lambda loss, _, keep: ThreadPoolExecutor(1).submit(loss.backward, retain_graph=keep).result(),
    lambda loss, _, keep: (2 * loss).div_(3).backward(retain_graph=keep),
]


def fused_step(model: Any) -> None:
    """Changes the weights without a new version, like every fused optimizer."""
    stepped(model, fused=True)


CHANGES_IN_PLACE: list[Callable[[Any], Any]] = [
    lambda model: model.hidden.mul_(2),
    lambda model: model.head.weight[0, 0].zero_(),
    lambda model: model.head.bias.add_(0),
    lambda model: stepped(model, foreach=False),
    lambda model: stepped(model, foreach=True),
    lambda model: model.load_state_dict({k: 0.9 * x for k, x in model.state_dict().items()}),
    fused_step,
]
REFUSED = (
    r"pyfused.convert: expected the logits of Model to be read before .*{}.* after it. Move the "
    r"line with .+ up, or call pyfused.revert\(model\)"
)


class Sequence:
    """Calls of a model and its conversion, whose logits and losses are kept for later actions."""

    def __init__(self, seed: int) -> None:
        draw = self.draw = random.Random(seed)
        dtype = draw.choice([torch.float64, torch.float32])
        self.models: list[Any] = [Model().to(dtype), Model().to(dtype)]
        options = {"evaluation": draw.random() < 0.3, "metrics": draw.random() < 0.3}
        pyfused.convert(self.models[1], head="head", **options)
        frozen = draw.choice(["emb", "head", "", ""])
        for model in self.models if frozen else ():
            model.get_submodule(frozen).requires_grad_(False)
        self.parameters = [[p for p in m.parameters() if p.requires_grad] for m in self.models]
        rtol, atol = (1e-7, 1e-9) if dtype is torch.float64 else (1e-3, 1e-4)
        self.assert_close = partial(assert_close, rtol=rtol, atol=atol, equal_nan=True)
        self.calls: list[Any] = []
        # Losses whose backward pass may run, and whether it ends the logits of their call.
        self.losses: list[Any] = []
        self.outcomes = Counter[str]()

    def call(self) -> None:
        with torch.set_grad_enabled(self.draw.random() < 0.8):
            if recomputed := torch.is_grad_enabled() and self.draw.random() < 0.2:
                whole = [checkpoint(m, X, TARGET, use_reentrant=False) for m in self.models]
                logits = [logits for logits, _ in whole]
            else:
                logits = [model(X) for model in self.models]
        plain = self.models[0]
        watched = [(x, x._version) for x in (plain.hidden, *plain.head.parameters())]
        computed = SimpleNamespace(computed=True)
        head_call = logits[1].value.call if isinstance(logits[1], LazyLogits) else computed
        call = SimpleNamespace(logits=[logits], watched=watched, head_call=head_call)
        call.ended = call.freed = False
        self.calls.append(call)
        if recomputed:
            self.losses.append((call, [loss for _, loss in whole], True))

    def change(self) -> None:
        change = self.draw.choice(CHANGES_IN_PLACE)
        with torch.no_grad():
            for model in self.models if self.calls else ():
                change(model)
        self.losses = []
        if change is fused_step:  # which nothing notices if there was no backward pass
            self.calls = [call for call in self.calls if call.ended or call.head_call.computed]

    def backward(self) -> None:
        if self.losses:
            call, pair, bypasses = self.losses.pop(self.draw.randrange(len(self.losses)))
            backward, keep = self.draw.choice(BACKWARDS), self.draw.random() < 0.5
            try:
                found = [backward(pair[0], self.parameters[0], keep)]
            except RuntimeError:  # a saved tensor was modified in place
                with pytest.raises(RuntimeError):
                    backward(pair[1], self.parameters[1], keep)
                call.freed, self.losses = True, []
                return
            found.append(backward(pair[1], self.parameters[1], keep))
            found += [[p.grad for p in each] for each in self.parameters]
            self.assert_close(found[1::2], found[::2])
            call.ended, call.freed = call.ended or bypasses, not keep
            self.losses = [each for each in self.losses if not each[0].freed]
            self.outcomes["backward"] += 1

    def use(self) -> None:
        """Reads logits, changes them in place, or computes a loss, after operators on them."""
        if not self.calls:
            return
        call = self.draw.choice(self.calls)
        pair, seed = self.draw.choice(call.logits), self.draw.getrandbits(60)
        kinds = ["read", "read", "loss", "loss", "loss", "change"]
        kind = self.draw.choice(kinds + ["loss"] * 3 * (not call.head_call.computed))
        mode = self.draw.choice([torch.enable_grad] * 5 + [torch.no_grad] * (kind != "change"))

        def result(logits: Tensor) -> tuple[Tensor, Tensor]:
            draw = random.Random(seed)
            with mode():
                for _ in range(draw.choice([0, 0, 1, 2, 4])):
                    logits = draw.choice([*LAZY.values()])(logits, draw.choice(FACTORS))
                if kind == "loss":
                    return logits, drawn_loss(logits, draw)
                return logits, draw.choice(READERS if kind == "read" else IN_PLACE)(logits) + 0

        was_computed = call.head_call.computed
        changed = any(x._version != version for x, version in call.watched)
        if kind == "change":  # tensors that were saved for a backward pass
            self.losses = [each for each in self.losses if each[0] is not call]
        try:
            others, expected = result(pair[0])
        except (RuntimeError, IndexError) as error:
            with pytest.raises((type(error), RuntimeError)):  # the second if it is too late
                result(pair[1])
            self.calls = [each for each in self.calls if each is not call]
            return
        if not was_computed and (changed or call.ended):
            outcome = "the backward pass" if call.ended else "a change"
            try:
                found = result(pair[1])[1]
            except RuntimeError as error:
                assert re.search(REFUSED.format(outcome), str(error))  # noqa: PT017
                if kind == "change":  # which torch has made
                    self.calls = [each for each in self.calls if each is not call]
            else:  # the pass over a loss has recorded the predictions
                assert found.dtype is torch.int64
                indices = [x.unsqueeze(-1).expand_as(others) for x in (found, expected)]
                self.assert_close(*[others.gather(-1, index) for index in indices])
        else:
            logits, found = result(pair[1])
            lazy = not call.head_call.computed
            outcome = f"{kind} of {'lazy' if lazy else 'read' if was_computed else 'new'} logits"
            assert found.requires_grad == expected.requires_grad
            self.assert_close(found, expected)
            if mode is torch.enable_grad and self.draw.random() < 0.3:
                call.logits.append((others, logits))
            # If all targets are ignored, the loss is NaN, and the kernel's gradient is 0.
            has_backward = kind == "loss" and found.requires_grad and not found.isnan()
            if has_backward and not (changed or call.freed):
                self.losses.append((call, (expected, found), lazy))
        self.outcomes[outcome] += 1


SEEDS = range(200)


@cache
def outcomes_of(seed: int) -> Counter[str]:
    """Runs a sequence, which fails if a result differs from torch's."""
    sequence = Sequence(seed)
    sequence.call()
    actions = [sequence.call, sequence.change, *[sequence.backward] * 2, *[sequence.use] * 4]
    for _ in range(30):
        sequence.draw.choice(actions)()
    return sequence.outcomes


@pytest.mark.filterwarnings("ignore:pyfused.convert")
@pytest.mark.parametrize("seed", SEEDS)
def test_drawn_sequences(seed: int) -> None:
    """Logits are equal to torch's, or their read is an error because it comes too late."""
    outcomes_of(seed)


@pytest.mark.filterwarnings("ignore:pyfused.convert")
def test_drawn_sequences_have_every_outcome() -> None:
    outcomes = sum(map(outcomes_of, SEEDS), Counter[str]())
    del outcomes["read of lazy logits"]  # predictions, which are rare
    assert len(outcomes) == 10, outcomes
    assert min(outcomes.values()) >= 10, outcomes


# ---- operators -----------------------------------------------------------------------------------


class Other(Tensor):
    """A subclass of another library."""


@pytest.mark.parametrize("change", LAZY.values(), ids=LAZY)
def test_operators_that_keep_logits_lazy(change: Callable[[Tensor, float], Tensor]) -> None:
    """Drawn sequences compare their results."""
    assert not are_computed(change(converted()(X), 2.0))


# The names in the warning, and functions that read logits in float64.
READ: list[tuple[str, Callable[[Any, Tensor], Tensor]]] = [
    ("mul", lambda _, x: 2 * x.log_softmax(-1)),
    ("expand", lambda _, x: x[3].expand(4, 16, 40)),
    ("add", lambda m, x: x.view(-1, 40)[:40].t() + m.bias[0]),
    ("add", lambda m, x: torch.add(x, m.bias, alpha=2)),
    ("add", lambda m, x: x + m.emb.weight[:40, 0]),
    ("div", lambda _, x: x.div(2.0, rounding_mode="trunc") + x),
    ("unbind", lambda _, x: x.unbind(-1)[0]),
    ("split", lambda _, x: x.split(20, -1)[1]),
    ("nll_loss", lambda _, x: F.nll_loss(x.view(-1, 40), TARGET)),
    ("cross_entropy", lambda _, x: F.cross_entropy(x.log_softmax(-1).view(-1, 40), TARGET)),
    ("cross_entropy", lambda _, x: F.cross_entropy(x[0, 0], TARGET[0])),
    ("log_softmax", lambda _, x: x.log_softmax(1)),
    ("view", lambda _, x: x.view(torch.int64).view(torch.float64)),
    ("as_subclass", lambda _, x: x.as_subclass(Other).as_subclass(Tensor)),
    ("index", lambda _, x: x.log_softmax(-1)[ROWS, ROWS.t(), PLACES[:, :4] - 40]),
]


@pytest.mark.parametrize(("reader", "change"), READ)
def test_operators_that_read_logits(reader: str, change: Callable[[Any, Tensor], Tensor]) -> None:
    """Results and gradients are torch's, and one warning names the operator."""

    def outcome(model: Any) -> list[Tensor]:
        total = change(model, model(X)).square().sum() + model.head.weight.sum()
        return [total, *torch.autograd.grad(total, [*model.parameters()], allow_unused=True)]

    plain = Model().double()
    model = pyfused.convert(copy.deepcopy(plain), head="head")
    with pytest.warns(RuntimeWarning, match=f"logits are read by {reader}") as warned:
        found = outcome(model)
    assert [each.filename for each in warned] == [__file__]
    for each in (found, outcome(model)):
        assert_close(each, outcome(plain), rtol=1e-9, atol=1e-9)


# Losses of logits, given a weight of each class.
LOSSES_OF_DTYPES: dict[str, Callable[[Tensor, Any], list[Tensor]]] = {
    "cross_entropy": lambda x, weight: [F.cross_entropy(x, TARGET, weight)],
    "nll_loss": lambda x, weight: [F.nll_loss(x.log_softmax(-1), TARGET, weight)],
    "of parts": lambda x, weight: [
        F.cross_entropy(x[:9] / 2, TARGET[:9], weight),
        F.cross_entropy(x[9:], TARGET[9:], weight),
    ],
}


@pytest.mark.parametrize("losses_of", LOSSES_OF_DTYPES.values(), ids=LOSSES_OF_DTYPES)
@pytest.mark.parametrize("casts", [False, True])
@pytest.mark.parametrize("of_loss", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_weight", [None, *FLOATS])
@pytest.mark.parametrize("of_model", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:pyfused.convert")
def test_dtypes(
    dtype: Any, of_model: Any, of_weight: Any, of_loss: Any, casts: bool, losses_of: Any,
    losses: list[Tensor],
) -> None:  # fmt: skip
    """Compares dtypes, values and errors; the model and its loss may be in autocast."""
    autocasts = [torch.autocast("cpu", d or torch.half, d is not None) for d in (of_model, of_loss)]
    weight = None if of_weight is None else torch.linspace(0.5, 1.5, 40).to(of_weight)

    def outcome(model: Any) -> Any:
        with autocasts[0]:
            logits = model(X).view(-1, 40)
        with autocasts[1]:
            try:
                results = losses_of(logits.float() if casts else logits, weight)
            except RuntimeError as error:
                return str(error)
        return results, torch.autograd.grad(results, [*model.parameters()])

    found, expected = outcome(converted().to(dtype)), outcome(Model().to(dtype))
    if isinstance(expected, str):
        assert found == expected
    else:
        assert_close(found, expected, rtol=2e-2, atol=1e-2)
    dtype_of_loss = torch.float32 if casts or of_loss else of_model or dtype
    assert bool(losses) == (of_weight in (None, dtype_of_loss))


# Wrong arguments of losses and of an operator, whose errors are torch's.
WRONG: dict[str, Callable[[Tensor], Any]] = {
    "target": lambda x: F.cross_entropy(x, TARGET[1:]),
    "weight": lambda x: F.cross_entropy(x, TARGET, torch.ones(1, 40)),
    "label_smoothing": lambda x: F.cross_entropy(x, TARGET, label_smoothing=2.0),
    "reduction": lambda x: F.cross_entropy(x, TARGET, reduction="average"),
    "ignore_index": lambda x: F.cross_entropy(x, TARGET, ignore_index=None),  # type: ignore[arg-type]
    "index": lambda x: x[torch.tensor([1, 64])],  # test_every_method tries other operators
}


@pytest.mark.filterwarnings("ignore:pyfused.convert")
@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_torchs_errors(call: Callable[[Tensor], Any]) -> None:
    """An error leaves nothing behind: the logits can be read, and have a loss, afterwards."""
    errors, results = [], []
    for model in (Model(), converted()):
        logits = model(X).flatten(0, 1)
        kinds = RuntimeError, TypeError, IndexError, ValueError
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # an error of the arguments is not preceded by a warning
            with pytest.raises(kinds) as raised:
                call(logits)
        errors.append((raised.type, str(raised.value).partition("\n")[0]))
        results.append([F.cross_entropy(logits, TARGET), logits * torch.tensor(2.0)])
    assert errors[0] == errors[1]
    assert_close(results[1], results[0])


@pytest.mark.parametrize(("wrong", "options"), [(40, {}), (-1, {"ignore_index": 3})])
def test_class_indices_out_of_range(wrong: int, options: Any, losses: list[Tensor]) -> None:
    """The error names the first index and its position; the loss can be computed afterwards."""
    logits, target = converted()(X), PLACES.clone()
    target[1:, 2] = wrong
    with pytest.raises(IndexError, match=rf"target: .*\[0, 40\).* got {wrong} .*\(1, 2\)"):
        F.cross_entropy(logits.mT, target, **options)
    losses.clear()
    assert_close(F.cross_entropy(logits.mT, PLACES), Model()(X, TARGET)[1])
    assert losses


@pytest.mark.parametrize("options", [{"memory_budget": 1 << 20}, {"metrics": True}])
def test_losses_of_few_rows_in_limited_memory(options: Any, losses: list[Tensor]) -> None:
    logits = converted(**options)(X).flatten(0, 1)
    for rows, target in zip(logits.split(8), TARGET.split(8), strict=True):
        F.cross_entropy(rows, target)
    assert len(losses) == 8


REASONS: dict[str, Callable[[Tensor], Any]] = {
    "target holds class probabilities": lambda x: F.cross_entropy(x, torch.full((64, 40), 0.025)),
    "target is not a plain int64 tensor": lambda x: F.cross_entropy(x, TARGET.byte()),
    "an earlier loss": lambda x: F.cross_entropy(x, TARGET) + F.cross_entropy(x[5:], TARGET[5:]),
    "several losses of few": lambda x: [*map(F.cross_entropy, x.split(8), TARGET.split(8))],
    "size_average and reduce are deprecated": lambda x: F.cross_entropy(x, TARGET, reduce=True),
    "it has no rows": lambda x: F.cross_entropy(x[:0], TARGET[:0]),
    "no kernels": lambda x: F.cross_entropy(x, TARGET),
}


@pytest.mark.filterwarnings("ignore:size_average")
@pytest.mark.parametrize("reason", REASONS)
def test_warnings_say_why_a_loss_is_not_fused(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason == "no kernels":
        monkeypatch.setattr("pyfused.backends.cpu.MISSING", reason)
    logits = converted()(X).flatten(0, 1)
    warning = f"by cross_entropy, because .*{reason}"
    with pyfused.report() as report, pytest.warns(RuntimeWarning, match=warning) as warned:
        REASONS[reason](logits)
    assert "needs no logits" not in str(warned[0].message)
    assert reason in str(report)


# ---- every method of a tensor --------------------------------------------------------------------

OTHER, EVERY = torch.linspace(-1, 1, 40), torch.linspace(-1, 1, 2560).view(4, 16, 40)
POSITIONAL = [
    *((), (0,), (1,), (-1,), (2.0,), (OTHER,), (EVERY,), (X % 3 == 0,), (-1, CLASS), (7,)),
    *((EVERY > 0, 1.5), (0, 1), (-1, True), (1, -1), (OTHER, EVERY), (-1, INDEX), ([64, 40],)),
    *((torch.float64,), (-1, 40)),
]
KEYWORDS: list[dict[str, Any]] = [
    *({"dim": -1}, {"dim": 2, "keepdim": True}, {"axis": -1}, {"axis": 2, "keepdims": True}),
    *({"other": OTHER}, {"other": 2.0}, {"k": 1}, {"k": 1, "largest": False}, {"copy": True}),
    *({"dtype": torch.float32}, {"dtype": torch.float64}, {"k": 2, "dim": -1}, {"axis": 1}),
]
ARGUMENTS: list[Any] = [(x, {}) for x in POSITIONAL] + [((), x) for x in KEYWORDS]
# Their results are addresses, huge (diagflat) or undefined (gradients of lu, as the rank is low),
# they belong to a node of autograd or need other devices, or they change the shape, an error.
EXCLUDED = (
    "backward register_hook retain_grad register_post_accumulate_grad_hook share_memory_ map_"
    " map2_ apply_ new type pin_memory record_stream storage untyped_storage data_ptr"
    " const_data_ptr set_ module_load cuda xpu ipu hpu mtia to_mkldnn rename rename_ align_to"
    " align_as refine_names names real imag volatile as_subclass storage_type is_shared resize"
    " resize_as resize_ has_names resize_as_ resize_as_sparse_ to_sparse sparse_resize_"
    " sparse_resize_and_clear_ is_set_to new_empty new_empty_strided detach_ dequantize"
    " unsqueeze_ transpose_ swapdims_ swapaxes_ t_ squeeze_ to_dense to_sparse_csr to_sparse_csc"
    " to_sparse_bsr to_sparse_bsc to_sparse_coo lu diagflat"
)
PYTHONS = "getitem add radd mul rmul truediv rtruediv sub pow matmul eq lt neg iter contains bool"
METHODS = [f"__{name}__" for name in PYTHONS.split()]
METHODS += [x for x in dir(Tensor) if x[0] != "_" and callable(getattr(Tensor, x))]


def outcome(model: Any, after_loss: bool, call: Callable[[Tensor], Any]) -> tuple[Any, Any]:
    """Returns the error of a call, or what is known about its results, and their numbers."""
    logits = model(X)
    total = F.cross_entropy(logits.mT, PLACES).double() if after_loss else 0
    torch.manual_seed(0)
    try:
        found = call(logits)
    except Exception as error:
        text = str(error).replace(LazyLogits.__name__, "Tensor").partition("\n")[0]
        return (type(error), text[:150]), []
    results = [*found] if isinstance(found, (tuple, list, Iterator)) else [found]
    tensors = [x for x in results if isinstance(x, Tensor)]
    numbers: list[Any] = [torch.stack([x])[0].detach() for x in tensors]  # they may be lazy
    numbers += [x for x in results if isinstance(x, float)]
    known = [(x.dtype, x.stride(), x.requires_grad) for x in tensors]
    known += [x for x in results if not isinstance(x, (Tensor, float))]
    total = total + sum(x.double().square().sum() for x in tensors if x.requires_grad)
    if isinstance(total, Tensor) and total.requires_grad:
        try:
            numbers += torch.autograd.grad(total, [*model.parameters()])
        except RuntimeError as error:  # an operator without a derivative
            known.append(type(error))
    return known, numbers


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted({*METHODS} - {*EXCLUDED.split()}))
def test_every_method(name: str) -> None:
    """A method, and the functions of its name, give torch's results for drawn arguments."""
    draw, model, plain = random.Random(name), converted(), Model()
    functions = [*filter(callable, (getattr(owner, name, None) for owner in (torch, F)))]
    for args, kwargs in [((), {}), *draw.sample(ARGUMENTS, 5)]:
        calls = [operator.methodcaller(name, *args, **kwargs)]
        for function in functions:
            calls.append(lambda x, f=function, a=args, k=kwargs: f(x, *a, **k))
            calls.append(lambda x, f=function, k=kwargs: f(input=x, **k))
        for call in calls:
            after_loss = draw.random() < 0.5
            found, expected = (outcome(m, after_loss, call) for m in (model, plain))
            described = f"{name} of {args}, {kwargs}, {after_loss=}"
            assert found[0] == expected[0], described
            tolerances: Any = {"rtol": 1e-3, "atol": 1e-4, "equal_nan": True}
            assert_close(found[1], expected[1], **tolerances, msg=described)


def test_the_table_of_operators_is_current() -> None:
    page = (Path(__file__).parents[2] / "docs" / "transformers.md").read_text("utf-8")
    names = {operator.__name__.partition(".")[0].strip("_") for operator in lazy_logits._RULES}
    known = {name.__name__.partition(".")[0] for name in lazy_logits._LARGEST}
    names = {"to" if name == "to_copy" else name for name in names - known}
    for row in (names, known):
        assert f"\n| {', '.join(f'`{name}`' for name in sorted(row))} |" in page


# Attributes, methods and functions that a meta tensor answers without logits.
MEMBERS = (
    "_base dense_dim device dim dtype element_size get_device grad is_contiguous is_inference"
    " is_leaf is_nested is_pinned is_sparse layout nbytes ndim numel output_nr requires_grad"
    " retains_grad shape size sparse_dim storage_offset stride type __len__"
)
QUESTIONS: list[Any] = [
    *MEMBERS.split(),
    *(torch.empty_like, torch.zeros_like, torch.is_floating_point),
    *(lambda x: x.is_same_size(EVERY), lambda x: torch.is_same_size(x, EVERY)),
    *(lambda x: torch.full_like(x, 1), lambda x: x.new_zeros((2, 3))),
]


@pytest.mark.filterwarnings("ignore", "error:pyfused.convert")
@pytest.mark.parametrize("after_loss", [False, True])
@pytest.mark.parametrize("question", QUESTIONS)
def test_metadata_reads_nothing(question: Any, after_loss: bool) -> None:
    def answer(logits: Tensor) -> Any:
        found = question(logits) if callable(question) else getattr(logits, question)
        found = found() if callable(found) else found
        return (found.shape, found.stride(), found.dtype) if isinstance(found, Tensor) else found

    logits = converted()(X)
    if after_loss:
        F.cross_entropy(logits.mT, PLACES).backward()
    assert answer(logits) == answer(1 * Model()(X))
    assert not logits.value.call.computed


def test_addresses() -> None:
    """Lazy logits have no memory: their address is an error, and torch's functions compute them."""
    logits = converted()(X).detach()
    with pytest.raises(RuntimeError, match="Cannot access data pointer"):
        torch.utils.dlpack.to_dlpack(logits)
    with pytest.warns(RuntimeWarning, match="logits are read by dlpack"):
        assert_close(torch.from_dlpack(logits), Model()(X).detach())


# ---- when logits can be read ---------------------------------------------------------------------


def test_tensors_that_change_after_their_use() -> None:
    """A constant or an index may change; a freed weight ends the logits."""
    model, mask, index = converted(), X % 3 == 0, INDEX.clone()
    logits = [model(X)[mask], model(X)[index], model(X) + model.bias]
    expected = [Model()(X)[mask], Model()(X)[index], Model()(X) + model.bias]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.bias.mul_(2), index.zero_(), mask.logical_not_()
        assert_close([x.detach() * 1.0 for x in logits], [x.detach() for x in expected])
    logits, storage = model(X), model.head.weight.untyped_storage()
    storage.resize_(0)
    with pytest.raises(RuntimeError, match=REFUSED.format("a change")):
        logits.argmax(-1)


@pytest.mark.filterwarnings("ignore:pyfused.convert")
@pytest.mark.parametrize("read", [False, True])
@pytest.mark.parametrize(
    ("problem", "change"),
    [
        ("the shape of a model's", lambda logits: logits.unsqueeze_(0)),
        ("the memory of a model's", lambda logits: setattr(logits, "data", logits.detach() * 2)),
    ],
)
def test_unsupported_changes(problem: str, change: Callable[[Any], Any], read: bool) -> None:
    logits, _ = converted()(X, TARGET)
    if read:
        logits.argmax()
    with pytest.raises(RuntimeError, match=f"pyfused.convert: .*{problem}.* pyfused.revert"):
        change(logits)


def test_a_prior() -> None:
    """A loss of logits + prior records the predictions of this sum, not of the logits."""
    model: Any = converted()
    logits, prior = model(X), torch.linspace(3, -3, 40)
    F.cross_entropy((logits + prior).mT, PLACES).backward()
    expected = (Model()(X) + prior).argmax(-1)
    assert_close((logits + prior.clone()).argmax(-1), expected)
    for other in (logits, logits + 2 * prior):
        with pytest.raises(RuntimeError, match=r"topk\(1\) of logits \+ prior are known, where"):
            other.argmax(-1)


# Predictions, which are known after a loss.
PREDICTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "argmax": lambda x: x.argmax(-1),
    "torch.argmax": lambda x: torch.argmax(input=x, dim=2, keepdim=True),
    "torch.max of rows": lambda x: torch.max(x.view(-1, 40), 1)[1],
    "torch.max": lambda x: torch.max(input=x, dim=-1, keepdim=True).values,
    "torch.topk": lambda x: torch.topk(input=x, k=1, dim=2)[0],
    "topk": lambda x: x.topk(1, -1, True, False).indices,
    "copied": lambda x: x.detach().requires_grad_(False).cpu().clone().argmax(-1),
    "sliced": lambda x: x[1:, :-1].argmax(-1),
    "selected": lambda x: x[X % 3 == 0].argmax(1),
    "unpacked": lambda x: torch.stack([row.argmax() for row in x[0]]),
    "moved": lambda x: x.mT.argmax(1),
    "capped": lambda x: (3 * (x / 3).tanh()).max(-1).values,
    "log_softmax": lambda x: x.log_softmax(-1).argmax(-1),
}
# Losses of all rows, after which the largest logits are known.
LOSSES_OF_ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: F.cross_entropy(x.flatten(0, 1), TARGET),
    "temperatures": lambda x: (
        F.cross_entropy(x[0] * 1e-9, PLACES[0]) + F.cross_entropy(x[1:].mT / 3, PLACES[1:])
    ),
    "capped": lambda x: F.cross_entropy(0.3 * torch.tanh(x.mT / 0.3), PLACES),
    "smoothed": lambda x: F.cross_entropy(x.mT * 5, PLACES, label_smoothing=0.1),
    "sequences": lambda x: (
        F.nll_loss(x.log_softmax(-1)[:, ::2].mT, PLACES[:, ::2])
        + F.cross_entropy(x.mT[..., 1::2], PLACES[:, 1::2])
    ),
}


@pytest.mark.parametrize("metrics", [False, True])
@pytest.mark.parametrize("loss_of", LOSSES_OF_ROWS.values(), ids=LOSSES_OF_ROWS)
@pytest.mark.parametrize("predict", PREDICTIONS.values(), ids=PREDICTIONS)
def test_predictions_after_the_step(predict: Any, loss_of: Any, metrics: bool) -> None:
    """The pass over the loss has recorded them."""
    found: list[Any] = []
    for model in (Model().double(), converted(metrics=metrics).double()):
        logits = model(X)
        loss, predicted = loss_of(logits), predict(logits)
        (loss + predicted.square().sum() * predicted.requires_grad).backward()
        found.append([predicted, *[p.grad for p in model.parameters()]])
        stepped(model)
        found[-1].append(predict(logits))
    assert_close(found[1], found[0])
    assert [x.requires_grad for x in found[1]] == [x.requires_grad for x in found[0]]


UNKNOWN: list[tuple[str, Callable[[Tensor], Any]]] = [
    ("argmax", lambda x: x.argmax(1)),
    ("argmax", lambda x: x.argmax()),
    ("max", lambda x: x.max()),
    ("maximum", lambda x: torch.max(x, torch.zeros(40))),
    ("max", lambda x: x.log_softmax(-1).max(-1)),
    ("topk", lambda x: x.topk(2)),
    ("topk", lambda x: x.topk(1, largest=False)),
    ("argmin", lambda x: x.argmin(-1)),
    ("argmax", lambda x: (x + torch.linspace(-3, 3, 40)).argmax(-1)),
]


@pytest.mark.parametrize(("reader", "read"), UNKNOWN)
def test_other_predictions_are_unknown(reader: str, read: Callable[[Tensor], Any]) -> None:
    logits, loss = converted()(X, TARGET)
    loss.backward()
    with pytest.raises(RuntimeError, match=f"got {reader} after it. Move the line"):
        read(logits)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("classes", [40, 1000, 1024, 5000])
def test_predictions_of_a_kernel(classes: int, dtype: torch.dtype) -> None:
    """They have the largest logit, wherever it is; in the first rows it is NaN or infinite."""
    head: Any = nn.Linear(8, classes)
    with torch.no_grad():
        head.weight[:, 7] = 1.0
        head.bias[:] = -torch.inf
        head.bias[::7] = 0
    head, hidden = head.to(dtype), torch.randn(300, 8, dtype=dtype)
    hidden[:3] = torch.tensor([[torch.nan], [torch.inf], [-torch.inf]])
    hidden[3, 7] = -torch.inf  # so are all logits of this row
    model = pyfused.convert(nn.Sequential(copy.deepcopy(head)), head="0")
    logits, expected = model(hidden), head(hidden)
    F.cross_entropy(logits, torch.arange(300) % classes).backward()
    values, prediction = logits[4:].max(-1)
    tolerance = 2e-2 if dtype.itemsize == 2 else 1e-5
    assert_close(values, expected[4:].amax(1), rtol=tolerance, atol=tolerance)
    at_prediction = expected[4:].gather(1, prediction[:, None]).squeeze(1)
    assert_close(at_prediction, expected[4:].amax(1), rtol=tolerance, atol=tolerance)
    assert_close(logits[:4].argmax(1), expected[:4].argmax(1))


@pytest.mark.parametrize("cap", [None, 1e-2])
@pytest.mark.parametrize("dtype", FLOATS)
def test_predictions_of_logits_that_a_loss_rounds_to_one(
    dtype: torch.dtype, cap: float | None
) -> None:
    """The largest logit is that before the scale, or the cap, which makes others equal to it."""
    head: Any = nn.Linear(8, 1000, dtype=dtype)
    with torch.no_grad():
        head.bias.fill_(1.9)
        head.bias[700] = torch.nextafter(head.bias[0], torch.tensor(3.0, dtype=dtype))
    hidden = torch.zeros(4, 16, 8, dtype=dtype)
    model = pyfused.convert(nn.Sequential(copy.deepcopy(head)), head="0")
    logits = model(hidden)
    x = logits if cap is None else cap * (logits / cap).tanh()
    F.cross_entropy(0.3 * x.flatten(0, 1), TARGET).backward()
    assert (logits.argmax(-1) == 700).all()
    assert_close(logits.max(-1).values, head(hidden).amax(-1), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:pyfused.convert")
@pytest.mark.parametrize("metrics", [False, True])
def test_predictions_of_some_rows(metrics: bool) -> None:
    """They are known of rows that count in a loss."""
    model = converted(metrics=metrics)
    expected = Model()(X)
    logits, ignoring = model(X), PLACES.masked_fill(X % 5 == 0, -100)
    losses = [F.cross_entropy(logits[:, i::2].mT, ignoring[:, i::2]) for i in (0, 1)]
    values, classes = logits[ignoring >= 0].max(-1)
    assert_close([values, classes], [*expected[ignoring >= 0].max(-1)])
    (sum(losses) + values.sum()).backward()  # type: ignore[union-attr]
    (F.cross_entropy(expected.mT, ignoring) * 0).backward()
    with pytest.raises(RuntimeError, match="got argmax after it"):
        logits.argmax(-1)
    with torch.no_grad():
        model.head.weight[3] = torch.nan
    logits, loss = model(X, TARGET)
    assert (logits.argmax(-1) == 3).all()
    loss.backward()
