"""Calls that torch has raise its errors; others name the argument, what was expected and got."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from catalogue import EXAMPLES, SHAPE, TORCH, Example
from compare import outcome
from samples import DEPRECATED, is_divergence, options
from torch import Tensor

import pyfused
from pyfused import functional as fused
from pyfused.dispatch.operator import Operator
from pyfused.dispatch.originals import F

X, Y = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
P = X.softmax(1)
NAN, HALF, GRAD = float("nan"), Fraction(1, 2), torch.ones(5, requires_grad=True)
K, KY = torch.randn(2, 3, 4), torch.zeros(2, 4, dtype=torch.int64)
W, B, LAYER = torch.randn(7, 5), torch.ones(7), torch.nn.Linear(5, 7)
META = torch.device("meta")
TOP, LOGP, ROW = torch.arange(3).expand(4, 3), torch.full((4, 3), -2.0), Y[:, None]


def call(name: str, *args: Any, **given: Any) -> Any:
    """Returns a call of torch's or pyfused's function, whose id in a test shows the arguments."""

    def function(functional: Any) -> Any:
        return getattr(functional, name)(*args, **given)

    texts = [*map(shown, args), *(f"{option}={shown(x)}" for option, x in given.items())]
    function.__name__ = f"{name}({', '.join(texts)})"
    return function


def shown(x: Any) -> str:
    return f"{x.dtype}{[*x.shape]}" if hasattr(x, "shape") else str(x)[:20]


loss, head = partial(call, "cross_entropy"), partial(call, "linear_cross_entropy")
head_log_probs = partial(call, "linear_log_probs")
topk_kl_div = partial(call, "linear_topk_kl_div", X, W)
# Calls of torch's functions with arguments that are wrong, or that few kernels support; one wrong
# argument of each type is tried by test_wrong_arguments.
TORCHS = [
    call("binary_cross_entropy", X, P), call("binary_cross_entropy", P, P - 1, reduction="sum"),
    call("binary_cross_entropy", P, P + 1, reduction="none"),
    call("binary_cross_entropy", P, P, P * NAN),
    call("binary_cross_entropy_with_logits", X, P, GRAD), loss(X, Y, torch.ones(5).double()),
    loss(X, Y, [1.0] * 5), loss(X, P, ignore_index=1), loss(X, Y, ignore_index=True),
    loss(K[:, :0], KY), loss(X.bfloat16(), Y, torch.ones(5)),
    call("gaussian_nll_loss", X, X, -1.0), call("gaussian_nll_loss", X, X, -P, reduction="none"),
    call("gaussian_nll_loss", X * NAN, X, P), head(X, W, Y, linear_bias=B[:3]),
    head(X, W, Y, ignore_index=torch.ones(2)), head(X, W, Y, ignore_index=np.ones(2)),
    head(X, W.double(), Y), call("margin_ranking_loss", X, X[0], Y.float()),
    call("mse_loss", X, X, reduction="avg", weight=X), call("nll_loss", X[0, 0], Y[0]),
    call("nll_loss", X, Y.int()), call("leaky_relu", X, 10**400), call("leaky_relu", X, HALF),
    call("celu", X, torch.ones(1)), call("relu", GRAD, inplace=True),
    call("smooth_l1_loss", X, X, beta=P), call("softmax", X, True),
]  # fmt: skip
# Class indices that are out of range, and strings in the message of the kernels.
BOUNDS = [
    (loss(X, torch.tensor([0, -1, 4, 2])), "target|[0, 5)|-1|(1,)"),
    (loss(X, torch.tensor([0, 2**62, 0, 0])), "4611686018427387904|(1,)"),
    (loss(X, torch.tensor([-100, -1, -1, 0]), ignore_index=-1), "-100|(0,)|ignore_index"),
    (loss(K, torch.tensor([[0, 1, 2, 0], [0, 1, 3, 0]])), "[0, 3)|3|(1, 2)"),
    (loss(X, torch.tensor([0, 1, 255, 2]).to(torch.uint8)), "[0, 5)|255|(2,)"),
]  # fmt: skip
# Calls with functions and options that torch lacks, the type of error, and strings in the message;
# test_wrong_arguments tries other values of single arguments.
OWN = [
    (loss(X, Y, scale=torch.ones(1)), "ValueError|scale: expected a number|(1,)"),
    (call("softcap", X, HALF), "TypeError|cap: expected a float, got Fraction"),
    (loss(X, Y, gamma=2.0, label_smoothing=0.1), "ValueError|gamma: expected 0.0 with"),
    (loss(X, Y, denominator=2, reduction="sum"), "ValueError|with reduction 'sum', got a"),
    (loss(X, Y, token_weight=-torch.ones(4)), "ValueError|token_weight: |0, got -1"),
    (loss(X, Y, loss_dtype=torch.int32), "ValueError|loss_dtype: expected a floating"),
    (loss(X, Y, softcap=9.0, ignore_index=True), "TypeError|ignore_index: |got bool True"),
    # linear layers
    (head(X, W, Y, memory_budget=0), "ValueError|memory_budget: |of bytes, got 0"),
    (head(X, LAYER, Y), "TypeError|linear_weight: |got Linear; pass head.weight"),
    (call("linear_kl_div", X, W, X, W, memory_budget=2**63),
     "ValueError|memory_budget: expected an int"),
    (call("log_probs", X, P[0]), "RuntimeError|target: expected|int64|(4,)|got torch.float32|(5,)"),
    (call("log_probs", X[0, 0], Y[0]), "RuntimeError|logits"),
    (head_log_probs(X, W, Y.view(2, 2)), "ValueError|(4,)|(2, 2)|Pass target.flatten"),
    (head_log_probs(X, W.T, Y), "RuntimeError|Is it transposed"),
    (head_log_probs(X, W.double(), Y), "RuntimeError|linear_weight: expected the input's dtype"),
    # another device: torch multiplies CPU tensors with meta tensors, and returns unwritten memory
    (head(X, W.to(META), Y), "RuntimeError|linear_weight: |device cpu, got meta"),
    (loss(X.to(META), Y.to(META), denominator=B[0]), "RuntimeError|input's device meta"),
    # divergences
    (topk_kl_div(TOP, LOGP, remainder="ignore", beta=0.5), "ValueError|beta: |ignore"),
    (topk_kl_div(TOP + 5 * (ROW == 1), LOGP), "IndexError|[0, 7), got 7 in row 1"),
    (topk_kl_div(TOP * (ROW != 1), LOGP), "ValueError|got 0 twice in row 1"),
    (topk_kl_div(TOP, LOGP.exp()), "ValueError|at most 1, |largest logarithm is 0.1"),
    (call("kl_div_with_logits", K, K),
     "ValueError|dim: |(2, 3, 4)|dim=-1 for 4|dim=1 for 3 classes"),
    (call("kl_div_with_logits", X, X, beta=torch.zeros((), requires_grad=True)),
     "ValueError|beta: expected a number in (0.0, 1.0) to be learned"),
    # others
    (call("additive_margin", P, Y, margin=-0.1),
     "ValueError|margin: expected a number of at least 0.0"),
    (call("additive_margin", P, Y, kind="sphere"),
     "ValueError|kind: expected 'cosface' or 'arcface', got"),
    (call("additive_margin", P, P),
     "RuntimeError|target: expected class indices|got torch.float32"),
    (call("rmse_loss", X, X, eps=-1.0), "ValueError|eps: expected"),
    (call("rmse_loss", X, X, weight=1.0), "TypeError|weight: expected a Tensor, got float"),
]  # fmt: skip


small = pytest.param("small", marks=pytest.mark.thresholds)
every_size = pytest.mark.parametrize("size", ["any size", small])


def _text(error: Exception) -> str:
    return re.sub(r" \(position \d+\)", "", str(error))  # of arguments without keyword


def check_outcome(call: Callable[[Any], Any]) -> None:
    """Compares the error or the result of a call with torch's, without and with the patch."""
    expected, ours = outcome(lambda: call(F)), outcome(lambda: call(fused))
    with pyfused.patch():
        patched = outcome(lambda: call(torch.nn.functional))
    for found in (ours, patched):
        if isinstance(expected, Exception):
            assert type(found) is type(expected)
            assert found.__context__ is None
            by_kernel = "target: expected class indices in [0, "
            assert _text(found) == _text(expected) or str(found).startswith(by_kernel)
        else:  # torch takes the arguments
            torch.testing.assert_close(found, expected, equal_nan=True)


@every_size
@pytest.mark.parametrize("call", TORCHS)
@pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")
def test_errors_of_torchs_functions_are_torchs(call: Any, size: str) -> None:
    if not hasattr(F, call.__name__.partition("(")[0]):
        pytest.skip("this torch lacks it")
    check_outcome(call)


def missing_words(error: Exception, words: str) -> list[str]:
    return [word for word in words.split("|") if word not in f"{type(error).__name__}: {error}"]


@pytest.mark.parametrize(("call", "words"), BOUNDS)
def test_class_indices_out_of_range(call: Any, words: str) -> None:
    """The type is torch's; the message has the index and its position."""
    with pytest.raises(IndexError):
        call(F)
    raised = outcome(lambda: call(fused))
    assert missing_words(raised, f"IndexError|{words}") == [], raised


@every_size
@pytest.mark.parametrize(("call", "words"), OWN)
def test_errors_of_functions_that_torch_lacks(call: Any, words: str, size: str) -> None:
    error = outcome(lambda: call(fused))
    assert missing_words(error, words) == [], error


# ---- each argument of every operator in turn ----------------------------------------------------


def wrong_values(value: Any) -> Iterator[Any]:
    """Yields a tensor in other shapes, or values of other types, dtypes and devices."""
    if not isinstance(value, Tensor):
        yield from ("a", ["mean"], None, 1.5, 0.0, -1.0, -(2**70), NAN)
        return
    yield from (value.long() if value.is_floating_point() else value.float(), value.cfloat())
    yield from (value > 0, [1.0], None, 1, value.numpy(), value.to("meta"))
    yield from (value.unsqueeze(0), value.unsqueeze(-1), value.flatten())
    yield value.mT if value.dim() > 1 else value[None]
    for dim, size in enumerate(value.shape):
        parts = value.select(dim, 0), value.narrow(dim, 0, size - 1), value.narrow(dim, 0, 1)
        yield from (*parts, torch.cat([value, parts[-1]], dim))


def arguments(example: Example, shape: tuple[int, ...] = SHAPE) -> dict[str, Any]:
    call = example.call(shape=shape)
    given = call.given | {name: x.detach() for name, x in call.tensors.items()}
    if options(example.op).get("dim", 0) is None:
        given.setdefault("dim", -1 if is_divergence(example.op) else 1)
    return given


def wrong_calls(example: Example, name: str) -> Iterator[dict[str, Any]]:
    """Yields arguments, of which one may be wrong."""
    for shape in (SHAPE, (4, 3, 2)):
        given = arguments(example, shape)
        value = (options(example.op) | given)[name]
        yield from (given | {name: wrong} for wrong in wrong_values(value))


ERRORS = IndexError, OverflowError, RuntimeError, TypeError, ValueError
ARGUMENTS = {
    f"{example.id}-{name}": (example, name)
    for example in EXAMPLES.values()
    if example.name in ("", "probabilities", "none_of_all")
    for name in options(example.op) | arguments(example)
    if name not in (*DEPRECATED, "dtype", "inplace", "with_metrics")
}
BUILT_IN = (*("gelu", "logsigmoid", "softplus"),)  # without a signature


@every_size
@pytest.mark.parametrize(("example", "name"), ARGUMENTS.values(), ids=ARGUMENTS)
@pytest.mark.filterwarnings("ignore")
def test_wrong_arguments(example: Example, name: str, size: str) -> None:
    """Errors are torch's; if torch lacks an argument, calls raise where the definition does."""
    op, of_torch = example.op, getattr(F, example.op.name, None)
    numbers = {number.name for number in op.numbers}
    known = None if op.name in BUILT_IN or not of_torch else inspect.signature(of_torch).parameters
    for given in wrong_calls(example, name):
        wrong = given[name]
        is_meta = isinstance(wrong, Tensor) and wrong.is_meta
        no_layer = op.is_linear and name in op.names[:2] and not isinstance(wrong, Tensor)
        if of_torch and not no_layer and (known is None or given.keys() <= known.keys()):
            # A head takes inputs of more shapes than torch's, and no layer on another device, for
            # which torch returns memory that was not written.
            if not (op.is_linear and (is_meta or (name == "input" and isinstance(wrong, Tensor)))):
                check_outcome(lambda f, given=given: getattr(f, op.name)(**given))
            continue
        found = outcome(partial(getattr(fused, op.name), **given))
        if not isinstance(found, Exception):
            expected = outcome(partial(getattr(TORCH, op.name), **given))
            assert not isinstance(expected, Exception)
            assert not is_out_of_bounds(op, name, wrong), (name, wrong)
            continue
        kind = TypeError if isinstance(wrong, str) and name in numbers else ERRORS
        assert isinstance(found, kind), repr(found)
        is_tensor = isinstance(wrong, Tensor) and name in example.call().tensors
        if not is_tensor or (wrong.dtype is example.call().given[name].dtype and not is_meta):
            named = "[a-z_0-9]+" if is_tensor or name == "reduction" else name
            words = f"{named}: expected .*got " if type(wrong) is not int else ""
            assert re.match(words, str(found), re.DOTALL), (name, wrong, found)


def is_out_of_bounds(op: Operator, name: str, value: Any) -> bool:
    number = next((x for x in op.numbers if x.name == name and not x.clamped), None)
    if number is None or not isinstance(value, float):
        return False
    return value < number.low or value > number.high or (number.positive and value <= 0)
