"""Invalid arguments raise torch's type of error, and name argument, expected and got."""

from __future__ import annotations

import builtins
import math
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from catalogue import EXAMPLES, Example
from catalogue import TORCH as F
from samples import FIRST, Loss
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointError
from torch_reference import torch_function

import pyfused
from pyfused import functional as fused
from pyfused.dispatch import sizes
from pyfused.dispatch.operator import Operator
from pyfused.ops.operators import LINEAR_CROSS_ENTROPY, OPERATORS

X, Y = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
P = X.softmax(1)
NAN, GRAD = float("nan"), torch.ones(5, requires_grad=True)
K, KY = torch.randn(2, 3, 4), torch.zeros(2, 4, dtype=torch.int64)
W, B, LAYER = torch.randn(7, 5), torch.ones(7), torch.nn.Linear(5, 7)
META = torch.device("meta")
TOP, LOGP = torch.arange(3).expand(4, 3), torch.full((4, 3), -2.0)


# Calls, and strings in the message: the argument, the expected value, the value passed.
Wrong = dict[str, str]

CROSS_ENTROPY: Wrong = {
    "cross_entropy(X, Y[:, None])": "target|(4,)|(4, 1)",
    "cross_entropy(X[0], Y[:2])": "target|(2,)",
    "cross_entropy(K, KY[:, :3])": "target|(2, 4)|(2, 3)",
    "cross_entropy(X, P[:, :4])": "target|(4, 5)|(4, 4)",
    "cross_entropy(X, Y.float())": "target|int64|float32|Pass target.long()",
    "cross_entropy(X, Y.view(2, 2))": "target|(4,)|(2, 2)|Pass target.flatten()",
    "cross_entropy(X, P.cfloat())": "target|complex64",
    "cross_entropy(X, Y, torch.ones(4))": "weight|(5,)|(4,)",
    "cross_entropy(X, Y, torch.ones(5).double())": "weight|float32|float64",
    "cross_entropy(X, Y, [1.0] * 5)": "weight|Tensor|list",
    'cross_entropy(X, Y, reduction="avg")': "reduction|none|mean|sum|avg",
    "cross_entropy(X, Y, label_smoothing=1.1)": "label_smoothing|0.0|1.0|1.1",
    'cross_entropy(X, Y, label_smoothing="a")': "label_smoothing|float|str",
    "cross_entropy(X, P, ignore_index=1)": "ignore_index|target|1",
    "cross_entropy(X, Y, ignore_index=1.5)": "ignore_index|int|float",
    "cross_entropy(X, Y, ignore_index=True)": "ignore_index|int|bool",
    "cross_entropy([1.0], Y)": "input|Tensor|list",
    "cross_entropy(X, [0, 1])": "target|Tensor|list",
    "cross_entropy(torch.tensor(1.0), Y[0])": "input|()",
    "cross_entropy(K[:, :0], KY)": "input|one class|(2, 0, 4)",
    "cross_entropy(X.long(), Y)": "input|floating|int64",
    "cross_entropy(Y, X)": "input|int64|target swapped?",
    'cross_entropy(X, Y.to("meta"))': "target|cpu|meta",
    'cross_entropy(X, Y, torch.ones(5, device="meta"))': "weight|cpu|meta",
    "cross_entropy(K.mT, KY)": "target|(2, 3)|(2, 4)|movedim(-1, 1)|flatten(0, -2)",
    "cross_entropy(X)": "target",
    "cross_entropy(X, Y, weights=None)": "weights",
}
BOUNDS: Wrong = {
    "cross_entropy(X, torch.tensor([0, 1, 5, 2]))": "target|[0, 5)|5|(2,)",
    "cross_entropy(X, torch.tensor([0, -1, 4, 2]))": "target|[0, 5)|-1|(1,)",
    "cross_entropy(X, torch.tensor([0, 2**62, 0, 0]))": "4611686018427387904|(1,)",
    "cross_entropy(X, torch.tensor([-100, -1, -1, 0]), ignore_index=-1)": "-100|(0,)|ignore_index",
    "cross_entropy(K, torch.tensor([[0, 1, 2, 0], [0, 1, 3, 0]]))": "[0, 3)|3|(1, 2)",
    "cross_entropy(X, torch.tensor([0, 1, 255, 2]).to(torch.uint8))": "[0, 5)|255|(2,)",
}
OTHERS: Wrong = {
    "smooth_l1_loss(X, X, beta=P)": "beta|one number|(4, 5)|@pyfused.loss|beta as a tensor",
    "mse_loss(X, X[:3])": "target|(4, 5)|(3, 5)",
    "swiglu(X, X[:3])": "up|gate|(4, 5)|(3, 5)",
    "mse_loss(X, X, weight=torch.ones(5))": "weight|(4, 5)|(5,)",
    'mse_loss(X, X, reduction="avg", weight=X)': "reduction|none|mean|sum|avg",
    "binary_cross_entropy_with_logits(X, P, torch.ones(4))": "weight|(4, 5)|(4,)",
    "binary_cross_entropy_with_logits(X, P, pos_weight=torch.ones(4))": "pos_weight|(4, 5)|(4,)",
    "binary_cross_entropy_with_logits(X, P, GRAD)": "weight",
    "gaussian_nll_loss(X, X, torch.ones(5))": "var|(4, 5)|(5,)",
    "gaussian_nll_loss(X, X, -1.0)": "var|0.0|-1.0",
    "smooth_l1_loss(X, X, beta=NAN)": "beta|0.0|nan",
    'mse_loss(X, X.to("meta"))': "target|cpu|meta",
    "mse_loss(X.long(), X.long())": "input|floating|int64",
    "binary_cross_entropy(P, P.long())": "target|floating|int64|Pass target.float()",
    "linear_cross_entropy(X, W, torch.ones(4, 7) / 7, ignore_index=-100)": "ignore_index",
    "linear_cross_entropy(torch.ones(9, 5), X, Y)": "(9,)|Pass input, linear_weight, target",
    "gelu(X.long())": "input|floating|int64",
    'gelu(X, approximate="foo")': "approximate|'none' or 'tanh'|'foo'",
    "binary_cross_entropy(P, P.cfloat())": "target|floating|complex64",
    "binary_cross_entropy(X, P)": "input|[0.0, 1.0]|call binary_cross_entropy_with_logits",
    "binary_cross_entropy(P, P + 1)": "target: expected values in [0.0, 1.0], got",
    "relu(X.bool())": "input|floating|bool",
    # classes
    "nll_loss(X[0, 0], Y[0])": "input: expected shape",
    "nll_loss(X, Y[:3])": "target: expected class indices of shape (4,)",
    "nll_loss(X, Y.int())": "target: |got torch.int32",
    "nll_loss(X, Y + 2)": "target: |got 5 at position (3,)",
    "nll_loss(X, Y, torch.ones(4))": "weight: expected shape (5,)",
    'nll_loss(X, Y, reduction="avg")': "reduction: expected 'none'",
    "softmax(X, 2)": "dim: expected -2 to 1 for an input of shape (4, 5), got 2",
    "softmax(X, 1.0)": "dim: expected an int, got float 1.0",
    "softmax(X, True)": "dim: expected an int, got bool True",
    "nll_loss(X, Y, ignore_index=True)": "ignore_index|int|bool",
    # gates and embeddings
    "triplet_margin_loss(X, X, X, margin=0.0)": "margin: expected a positive",
    "triplet_margin_loss(X, X[0], X)": "positive: expected as many dimensions",
    "triplet_margin_loss(X, X, X[:, :2])": "negative: expected a shape that",
    "cosine_embedding_loss(X, X, X)": "target: expected shape",
    "cosine_embedding_loss(X, X[:, :2], X[:, 0])": "input2: expected a shape that",
    'cosine_embedding_loss(X, X, X[:, 0], reduction="max")': "reduction: ",
}
# Functions and options that torch lacks: calls, the type of error, and strings in the message.
OWN: Wrong = {
    'cross_entropy(X, Y, z_loss="1")': "TypeError|z_loss: expected a float, got str '1'",
    "cross_entropy(X, Y, scale=0.0)": "ValueError|scale: expected a positive number, got 0.0",
    "cross_entropy(X, Y, scale=torch.ones(2))": "ValueError|scale: expected one number|(2,)",
    "cross_entropy(X, Y, softcap=0.0)": "ValueError|softcap: expected a positive number",
    "cross_entropy(X, Y, gamma=-1.0)": "ValueError|gamma: expected a number of at least 0.0, got",
    "cross_entropy(X, Y, gamma=2.0, label_smoothing=0.1)": "ValueError|gamma: expected 0.0 with",
    "cross_entropy(X, Y, denominator=-1.5)": "ValueError|denominator: expected a positive|-1.5",
    "cross_entropy(X, Y, denominator=torch.ones(2))": "ValueError|denominator: expected one|(2,)",
    'cross_entropy(X, Y, denominator=2, reduction="sum")': "ValueError|with reduction 'sum', got a",
    "cross_entropy(X, Y, token_weight=torch.ones(5))": "ValueError|token_weight: expected shape",
    "cross_entropy(X, Y, token_weight=-torch.ones(4))": "ValueError|token_weight: |[0.0, inf]",
    "cross_entropy(X, Y, loss_dtype=torch.int32)": "ValueError|loss_dtype: expected a floating",
    "cross_entropy(X, Y, softcap=9.0, ignore_index=True)": "TypeError|ignore_index: |got bool True",
    # linear layers
    "linear_cross_entropy(X, W, Y, memory_budget=0)": "ValueError|memory_budget: |of bytes, got 0",
    "linear_cross_entropy(X, W, Y, memory_budget=True)": "TypeError|memory_budget: |got bool True",
    "linear_cross_entropy(X, W, Y, filter_eps=-0.5)": "ValueError|filter_eps: expected",
    "linear_cross_entropy(X, W, Y, token_weight=W[:3, 0])": "ValueError|token_weight: |shape (4,)",
    "linear_cross_entropy(X, W, Y, linear_bias=W[:3, 0])": "RuntimeError|linear_bias|(7,)|(3,)",
    "linear_cross_entropy(X, W[:, :4], Y)": "RuntimeError|linear_weight",
    "linear_cross_entropy(X, W.double(), Y)": "RuntimeError|dtype",
    "linear_cross_entropy(X, LAYER, Y)": "TypeError|linear_weight: |got Linear; pass head.weight",
    "log_probs(X, Y, temperature=0.0)": "ValueError|temperature: expected a positive number",
    "log_probs(X, P[0])": "RuntimeError|target: expected|int64|(4,)|got torch.float32|(5,)",
    "log_probs(X[0, 0], Y[0])": "RuntimeError|logits",
    "log_probs(X.long(), Y)": "RuntimeError|logits|floating dtype",
    "log_probs(X, Y[:3])": "ValueError|target|(4,)|(3,)",
    "linear_log_probs(X, W, Y.view(2, 2))": "ValueError|(4,)|(2, 2)|Pass target.flatten",
    "linear_log_probs(X, W.T, Y)": "RuntimeError|Is it transposed",
    "linear_log_probs(X, W.double(), Y)": "RuntimeError|linear_weight: expected the input's dtype",
    # another device: torch multiplies CPU tensors with meta tensors, and returns unwritten memory
    "linear_cross_entropy(X, W.to(META), Y)": "RuntimeError|linear_weight: |device cpu, got meta",
    "linear_cross_entropy(X, W, Y, linear_bias=B.to(META))": "RuntimeError|linear_bias: |got meta",
    "linear_kl_div(X, W, X, W.to(META))": "RuntimeError|teacher_linear_weight: |got meta",
    "cross_entropy(X.to(META), Y.to(META), denominator=B[0])": "RuntimeError|input's device meta",
    # divergences
    "kl_div_with_logits(X, X, beta=1.5)": "ValueError|beta: |[0.0, 1.0], got 1.5",
    'kl_div_with_logits(X, X, reduction="max")': "ValueError|reduction: expected 'none'",
    "kl_div_with_logits(X, X[:, :3])": "RuntimeError|teacher_logits",
    "kl_div_with_logits(X, X, token_weight=torch.ones(3))": "ValueError|token_weight|(4,)",
    "kl_div_with_logits(X.long(), X)": "RuntimeError|logits|floating",
    "linear_kl_div(X, W[:, :3], X, W)": "RuntimeError|linear_weight|C, ..., 5",
    "linear_kl_div(X, W, X[:2], W)": "RuntimeError|teacher_input|(4, 5)",
    "linear_kl_div(X, W, X, W[:6])": "RuntimeError|teacher_linear_weight: expected shape (7, 5)",
    "linear_topk_kl_div(X, W, TOP[:, :0], LOGP[:, :0])": "RuntimeError|expected 1 to 7 classes",
    'linear_topk_kl_div(X, W, TOP, LOGP, remainder="drop")': "ValueError|remainder: expected 'buck",
    'linear_topk_kl_div(X, W, TOP, LOGP, remainder="ignore", beta=0.5)': "ValueError|beta: |ignore",
    "linear_topk_kl_div(X, W, TOP.float(), LOGP)": "RuntimeError|teacher_indices: |torch.int64",
    "linear_topk_kl_div(X, W, TOP, LOGP[:, :2])": "RuntimeError|teacher_indices: |(4, 2)",
    # others
    "contrastive_loss(X[0], X)": "RuntimeError|a: expected shape",
    "contrastive_loss(X, X[:3])": "RuntimeError|b: expected the shape of a, (4, 5), got (3, 5)",
    "contrastive_loss(X[:3], X)": "RuntimeError|linear_cross_entropy(scale * a, b, target)",
    "contrastive_loss(X, X.double())": "RuntimeError|b: expected the dtype and device of a",
    "contrastive_loss(X, X, X)": "ValueError|scale: expected one number",
    'contrastive_loss(X, X, 1.0, "x")': "TypeError|bias: expected a Tensor or a float, got str 'x'",
    'contrastive_loss(X, X, reduction="max")': "ValueError|reduction: expected",
    "additive_margin(P, Y, margin=-0.1)": "ValueError|margin: expected a number of at least 0.0",
    'additive_margin(P, Y, kind="sphere")': "ValueError|kind: expected 'cosface' or 'arcface', got",
    "additive_margin(P, P)": "ValueError|target: expected class indices, got torch.float32",
    "additive_margin(P, Y[:3])": "ValueError|target: expected class indices of shape (4,)",
    'geglu(X, X, "tan")': "RuntimeError|approximate: expected 'none' or 'tanh', got 'tan'",
    "reglu(X, torch.ones(4))": "RuntimeError|",
    "rmse_loss(X, X, eps=-1.0)": "RuntimeError|eps: expected",
}


def wrong_of_every_loss() -> Iterator[tuple[Loss, dict[str, Any], list[str]]]:
    """Yields invalid arguments of pointwise losses, and strings in the message."""
    for loss in FIRST:
        drawn = EXAMPLES[loss.op.name].call(shape=(4, 5)).tensors
        given = {name: x.detach() for name, x in drawn.items()} | loss.parameters
        yield loss, given | {"reduction": "avg"}, ["avg"]
        for convert in (torch.Tensor.long, torch.Tensor.cfloat):
            yield loss, given | {name: convert(x.detach()) for name, x in drawn.items()}, []
        yield loss, {loss.operands[0].name: X}, ["target"]
        for parameter in loss.op.numbers:
            name, low = parameter.name, parameter.low
            yield loss, given | {name: "a"}, [name, "float", "str"]
            if math.isfinite(low):
                yield loss, given | {name: low - 1}, [name, str(low), str(low - 1)]


def parametrize(wrong: Wrong) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("code", "words"), wrong.items(), ids=wrong.keys())


def called(code: str, functional: Any = fused) -> Any:
    return eval(f"f.{code}", globals() | {"f": functional})


def error(call: Callable[[], Any]) -> Exception:
    """Returns the error of a call, whose only traceback has at most four frames of pyfused."""
    with pytest.raises(Exception) as raised:  # noqa: PT011 the caller looks at the type
        call()
    shown = "".join(traceback.format_exception(raised.value))
    assert shown.count("Traceback (most recent call last)") == 1
    assert shown.count(f'File "{Path(pyfused.__file__).parent}') <= 4, shown
    return raised.value


def check_error(call: Callable[[Any], Any], words: Sequence[str]) -> None:
    """Compares the error with torch's; if torch raises none, compares the results."""
    try:
        expected = call(F)
    except Exception as raised:
        theirs = raised
    else:  # an option of this loss
        torch.testing.assert_close(call(fused), expected)
        return
    ours = error(lambda: call(fused))
    assert isinstance(ours, type(theirs)), ours
    missing = [word for word in words if word not in str(ours)]
    assert not missing, f"{missing} missing in: {ours}"


@pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")
@parametrize(CROSS_ENTROPY | BOUNDS | OTHERS)
def test_errors_have_torchs_type_and_a_helpful_message(code: str, words: str) -> None:
    check_error(lambda f: called(code, f), words.split("|"))


@parametrize(OWN)
def test_errors_of_functions_and_options_that_torch_lacks(code: str, words: str) -> None:
    kind, *words = words.split("|")
    with pytest.raises(getattr(builtins, kind)) as raised:
        called(code)
    missing = [word for word in words if word not in str(raised.value)]
    assert not missing, f"{missing} missing in: {raised.value}"


@pytest.mark.thresholds
@parametrize(OWN)
def test_errors_of_small_calls(code: str, words: str) -> None:
    test_errors_of_functions_and_options_that_torch_lacks(code, words)


@pytest.mark.parametrize(("loss", "given", "words"), [*wrong_of_every_loss()])
def test_errors_of_every_loss(loss: Loss, given: dict[str, Any], words: list[str]) -> None:
    check_error(lambda f: getattr(f, loss.op.name)(**given), words)


NO_TENSORS: dict[str, tuple[Any, str]] = {
    "list": ([1.0], "list"),
    "None": (None, "NoneType"),
    "int": (1, "int"),
    "ndarray": (X.numpy(), "ndarray"),
}


@pytest.mark.parametrize("op", OPERATORS.values(), ids=OPERATORS.keys())
@pytest.mark.parametrize(("wrong", "got"), NO_TENSORS.values(), ids=NO_TENSORS.keys())
def test_arguments_that_are_not_tensors(op: Operator, wrong: Any, got: str) -> None:
    """Raises a TypeError; torch may raise others by accident, such as AttributeError for a list."""
    for operand in op.operands:
        if operand.optional and wrong is None:
            continue
        tensors: dict[str, Any] = {
            o.name: 0.5 if o.number else P for o in op.operands if not o.optional
        }
        given = tensors | {operand.name: wrong}
        try:
            torch_function(op)(**given)
        except Warning:  # raised by NumPy for an array minus a tensor
            continue
        except Exception:
            raised = error(lambda given=given: getattr(fused, op.name)(**given))
        else:
            getattr(fused, op.name)(**given)
            continue
        assert isinstance(raised, TypeError), raised
        assert operand.name in str(raised)
        assert got in str(raised)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_an_out_of_range_target_has_no_side_effects(reduction: str) -> None:
    """It returns nothing, does not modify arguments, and does not affect later calls."""
    logits, target = torch.randn(100, 7, requires_grad=True), torch.zeros(100, dtype=torch.int64)
    target[99] = 7
    tensors = logits, target, torch.ones(7)
    before = [(t._version, t.detach().clone()) for t in tensors]
    for smoothing in (0.0, 0.1):
        with pytest.raises(IndexError):
            fused.cross_entropy(*tensors, reduction=reduction, label_smoothing=smoothing)
    assert logits.grad is None
    for tensor, (version, copy) in zip(tensors, before, strict=True):
        assert tensor._version == version
        assert torch.equal(tensor, copy)
    torch.testing.assert_close(fused.cross_entropy(X, Y), F.cross_entropy(X, Y))


OUTSIDE, NEGATIVE = torch.tensor([0, 1, 2, 5]), torch.tensor([1.0, 1, 1, -1])


@pytest.mark.thresholds
@parametrize(CROSS_ENTROPY | BOUNDS)
def test_errors_of_small_calls_of_torchs_functions(code: str, words: str) -> None:
    """A small call of torch's function raises torch's error; others name the argument."""
    raised = error(lambda: called(code))
    try:
        called(code, torch.nn.functional)
    except Exception as expected:
        if (type(raised), str(raised)) == (type(expected), str(expected)):
            return
    assert not [word for word in words.split("|") if word not in str(raised)], raised


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, CheckpointError])
def test_errors_with_other_causes_are_not_explained(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checking the arguments might allocate memory, or synchronise a GPU."""

    def fail(*_: Any) -> Tensor:
        raise kind("of a hook")

    checked: list[Any] = []
    monkeypatch.setattr(OPERATORS["mse_loss"], "check", lambda *call: checked.append(call))
    x = torch.ones(3, requires_grad=True)
    with saved_tensors_hooks(fail, fail), pytest.raises(kind, match=r"^of a hook$"):
        fused.mse_loss(x, X.flatten()[:3])
    assert not checked


# ---- shapes --------------------------------------------------------------------------------------


def reshaped(x: Tensor) -> Iterator[Tensor]:
    """Yields a tensor in other shapes: a dimension more, one less, and other sizes."""
    yield from (x.unsqueeze(0), x.unsqueeze(-1), x.flatten(), x.mT if x.dim() > 1 else x[None])
    for dim in range(x.dim()):
        size = x.shape[dim]
        yield from (x.select(dim, 0), x.narrow(dim, 0, size - 1), x.narrow(dim, 0, 1))
        yield torch.cat([x, x.narrow(dim, 0, 1)], dim)


def outcome(call: Callable[[], Any]) -> Any:
    """Returns the error of a call, or the shapes of its results."""
    try:
        found = call()
    except Exception as raised:
        return raised
    return [x.shape for x in (found if isinstance(found, tuple) else (found,)) if x is not None]


def calls_of_other_shapes(example: Example) -> Iterator[dict[str, Any]]:
    """Yields arguments, each with another operand than the first in another shape."""
    for shape in ((6, 5), (4, 3, 2)):
        call = example.call(shape=shape)
        given = {n: x.detach() if isinstance(x, Tensor) else x for n, x in call.given.items()}
        first, *others = call.tensors
        for operand in others or (first,):
            yield from (given | {operand: x} for x in reshaped(given[operand]))


def check_shapes(example: Example) -> None:
    """Compares results and errors with torch's, without and with `pyfused.patch`."""
    name, calls = example.op.name, [*calls_of_other_shapes(example)]
    outcomes = [outcome(partial(getattr(fused, name), **given)) for given in calls]
    functions = torch.nn.functional
    is_own = not hasattr(functions, name) or example.op is LINEAR_CROSS_ENTROPY
    if is_own or "token_weight" in calls[0]:
        for error in outcomes:
            if isinstance(error, Exception):
                assert type(error) in (IndexError, RuntimeError, ValueError), repr(error)
                is_torchs = example.op is LINEAR_CROSS_ENTROPY and not sizes.FORCED  # a small call
                assert is_torchs or re.match("[a-z_0-9]+: expected ", str(error)), repr(error)
        return
    expected = [outcome(partial(getattr(functions, name), **given)) for given in calls]
    with pyfused.patch():
        patched = [outcome(partial(getattr(functions, name), **given)) for given in calls]
    assert [*map(repr, patched)] == [*map(repr, expected)]
    for ours, theirs in zip(outcomes, expected, strict=True):
        if isinstance(theirs, Exception):
            assert isinstance(ours, type(theirs)), f"{ours!r}, {theirs!r}"
        else:
            assert ours == theirs


SHAPED = {e.id: e for e in EXAMPLES.values() if e.name in ("", "probabilities", "none_of_all")}
every_shaped = pytest.mark.parametrize("example", SHAPED.values(), ids=SHAPED)
ignore_warnings = pytest.mark.filterwarnings("ignore")


@every_shaped
@ignore_warnings
def test_errors_of_shapes(example: Example) -> None:
    check_shapes(example)


@pytest.mark.thresholds
@every_shaped
@ignore_warnings
def test_errors_of_shapes_of_small_calls(example: Example) -> None:
    check_shapes(example)
