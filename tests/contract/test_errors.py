"""Calls that torch has raise its errors; others name the argument, what was expected and got."""

from __future__ import annotations

import builtins
import inspect
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from typing import Any

import pytest
import torch
from catalogue import EXAMPLES, TORCH, Example
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


Wrong = dict[str, str]

# Calls of torch's functions with arguments that are wrong, or that few kernels support; one wrong
# argument of each type is tried by test_wrong_arguments.
TORCHS = [
    "binary_cross_entropy(X, P)", "binary_cross_entropy(P, P + 1)",
    'binary_cross_entropy(X, P, reduction="none")',
    'binary_cross_entropy(P, P - 1, reduction="sum")', "binary_cross_entropy(P, P, P * NAN)",
    "binary_cross_entropy_with_logits(X, P, GRAD)", "cross_entropy(X[0], Y[:2])",
    "cross_entropy(X, Y, torch.ones(4))", "cross_entropy(X, Y, torch.ones(5).double())",
    "cross_entropy(X, Y, [1.0] * 5)", "cross_entropy(X, P, ignore_index=1)",
    "cross_entropy(X, Y, ignore_index=True)", "cross_entropy(torch.tensor(1.0), Y[0])",
    "cross_entropy(K[:, :0], KY)", "cross_entropy(Y, X)",
    'cross_entropy(X, Y, torch.ones(5, device="meta"))', "cross_entropy(K.mT, KY)",
    "cross_entropy(X)", "cross_entropy(X, Y, weights=None)",
    "cross_entropy(X.bfloat16(), Y, torch.ones(5))", "gaussian_nll_loss(X, X, -1.0)",
    'gaussian_nll_loss(X, X, -P, reduction="none")', "gaussian_nll_loss(X, X, -P)",
    "gaussian_nll_loss(X * NAN, X, P)", "huber_loss(X, X, delta=0.0)",
    "linear_cross_entropy(X, W, Y.view(2, 2))", "linear_cross_entropy(X, W, Y, linear_bias=B[:3])",
    "linear_cross_entropy(X, W, torch.ones(4, 7) / 7, ignore_index=-100)",
    "linear_cross_entropy(X, W.double(), Y)", "margin_ranking_loss(X, X[0], Y.float())",
    'mse_loss(X, X, reduction="avg", weight=X)', "mse_loss(X, X, factor=2)",
    "nll_loss(X[0, 0], Y[0])", "nll_loss(X, Y.int())", "nll_loss(X, Y, torch.ones(4))",
    "nll_loss(X, Y, ignore_index=True)", "nll_loss(X, Y, ignore_index=-2**63 - 1)",
    "leaky_relu(X, 10**400)", "leaky_relu(X, HALF)", "celu(X, torch.ones(1))",
    "relu(GRAD, inplace=True)", "smooth_l1_loss(X, X, beta=P)",
    "softmax(X, 2)", "softmax(X, True)", "softmax(X, -3)",
    "triplet_margin_loss(X, X, X, margin=0.0)", 'triplet_margin_loss(X, X, X, p=0.5, swap="x")',
]  # fmt: skip
# Class indices that are out of range, and strings in the message of the kernels.
BOUNDS: Wrong = {
    "cross_entropy(X, torch.tensor([0, 1, 5, 2]))": "target|[0, 5)|5|(2,)",
    "cross_entropy(X, torch.tensor([0, -1, 4, 2]))": "target|[0, 5)|-1|(1,)",
    "cross_entropy(X, torch.tensor([0, 2**62, 0, 0]))": "4611686018427387904|(1,)",
    "cross_entropy(X, torch.tensor([-100, -1, -1, 0]), ignore_index=-1)": "-100|(0,)|ignore_index",
    "cross_entropy(K, torch.tensor([[0, 1, 2, 0], [0, 1, 3, 0]]))": "[0, 3)|3|(1, 2)",
    "cross_entropy(X, torch.tensor([0, 1, 255, 2]).to(torch.uint8))": "[0, 5)|255|(2,)",
    "nll_loss(X, Y + 2)": "target: |got 5 at position (3,)",
}
# Calls with functions and options that torch lacks, the type of error, and strings in the message;
# test_wrong_arguments tries other values of single arguments.
OWN: Wrong = {
    "cross_entropy(X, Y, scale=torch.ones(1))": "ValueError|scale: expected a number|(1,)",
    "softcap(X, HALF)": "TypeError|cap: expected a float, got Fraction",
    "cross_entropy(X, Y, gamma=2.0, label_smoothing=0.1)": "ValueError|gamma: expected 0.0 with",
    "cross_entropy(X, Y, denominator=-1.5)": "ValueError|denominator: expected a positive|-1.5",
    "cross_entropy(X, Y, denominator=torch.ones(2))": "ValueError|denominator: expected a|(2,)",
    'cross_entropy(X, Y, denominator=2, reduction="sum")': "ValueError|with reduction 'sum', got a",
    "cross_entropy(X, Y, token_weight=-torch.ones(4))": "ValueError|token_weight: |0, got -1",
    "cross_entropy(X, Y, loss_dtype=torch.int32)": "ValueError|loss_dtype: expected a floating",
    "cross_entropy(X, Y, softcap=9.0, ignore_index=True)": "TypeError|ignore_index: |got bool True",
    # linear layers
    "linear_cross_entropy(X, W, Y, memory_budget=0)": "ValueError|memory_budget: |of bytes, got 0",
    "linear_cross_entropy(X, W, Y, memory_budget=True)": "TypeError|memory_budget: |got bool True",
    "linear_cross_entropy(X, W.double(), Y)": "RuntimeError|dtype",
    "linear_cross_entropy(X, LAYER, Y)": "TypeError|linear_weight: |got Linear; pass head.weight",
    "linear_cross_entropy(X.numpy(), W, Y)": "TypeError|input: expected a Tensor, got ndarray",
    "linear_log_probs(X, LAYER, Y)": "TypeError|linear_weight: |got Linear; pass head.weight",
    "log_probs(X, Y, ignore_index=2**70)": "ValueError|ignore_index: expected an int of 64 bits",
    "linear_log_probs(X, W, Y, ignore_index=-2**70)": "ValueError|ignore_index: |got -118059162",
    "linear_kl_div(X, W, X, W, memory_budget=2**63)": "ValueError|memory_budget: expected an int",
    "sigmoid_focal_loss(P, P, alpha=NAN)": "ValueError|alpha: expected a number of at most 1.0",
    "log_probs(X, P[0])": "RuntimeError|target: expected|int64|(4,)|got torch.float32|(5,)",
    "log_probs(X[0, 0], Y[0])": "RuntimeError|logits",
    "log_probs(X.long(), Y)": "RuntimeError|logits|floating dtype",
    "linear_log_probs(X, W, Y.view(2, 2))": "ValueError|(4,)|(2, 2)|Pass target.flatten",
    "linear_log_probs(X, W.T, Y)": "RuntimeError|Is it transposed",
    "linear_kl_div(X, W, X, W.T)": "RuntimeError|Pass teacher_linear_weight.t()",
    "linear_log_probs(X, W.double(), Y)": "RuntimeError|linear_weight: expected the input's dtype",
    # another device: torch multiplies CPU tensors with meta tensors, and returns unwritten memory
    "linear_cross_entropy(X, W.to(META), Y)": "RuntimeError|linear_weight: |device cpu, got meta",
    "linear_cross_entropy(X, W, Y, linear_bias=B.to(META))": "RuntimeError|linear_bias: |got meta",
    "linear_kl_div(X, W, X, W.to(META))": "RuntimeError|teacher_linear_weight: |got meta",
    "cross_entropy(X.to(META), Y.to(META), denominator=B[0])": "RuntimeError|input's device meta",
    # divergences
    "kl_div_with_logits(X.long(), X)": "RuntimeError|logits|floating",
    "linear_topk_kl_div(X, W, TOP[:, :0], LOGP[:, :0])": "RuntimeError|expected 1 to 7 classes",
    'linear_topk_kl_div(X, W, TOP, LOGP, remainder="ignore", beta=0.5)': "ValueError|beta: |ignore",
    "linear_topk_kl_div(X, W, TOP.float(), LOGP)": "RuntimeError|teacher_indices: |torch.int64",
    "linear_topk_kl_div(X, W, TOP + 5 * (ROW == 1), LOGP)": "IndexError|[0, 7), got 7 in row 1",
    "linear_topk_kl_div(X, W, TOP - (ROW == 1).long(), LOGP)": "IndexError|[0, 7), got -1 in row 1",
    "linear_topk_kl_div(X, W, TOP * (ROW != 1), LOGP)": "ValueError|got 0 twice in row 1",
    "linear_topk_kl_div(X, W, TOP, LOGP.exp())": "ValueError|at most 1, |largest logarithm is 0.1",
    "linear_topk_kl_div(X, W, TOP, -LOGP)": "ValueError|in row 0, whose largest logarithm is 2",
    "linear_topk_kl_div(X, W, TOP, LOGP.clamp(min=-1))": "ValueError|largest logarithm is -1",
    "kl_div_with_logits(K, K)": "ValueError|dim: |(2, 3, 4)|dim=-1 for 4|dim=1 for 3 classes",
    "kl_div_with_logits(K, K, dim=3)": "IndexError|dim: expected -3 to 2",
    "log_probs(K, KY)": "ValueError|dim: |(2, 3, 4)|dim=-1|dim=1 for 3 classes",
    # others
    "additive_margin(P, Y, margin=-0.1)": "ValueError|margin: expected a number of at least 0.0",
    'additive_margin(P, Y, kind="sphere")': "ValueError|kind: expected 'cosface' or 'arcface', got",
    "additive_margin(P, P)": "RuntimeError|target: expected class indices|got torch.float32",
    "additive_margin(P, Y[:3])": "ValueError|target: expected class indices|shape (4,)",
    "softcap(X, 0.0)": "ValueError|cap: expected a positive number, got 0.0",
    "rmse_loss(X, X, eps=-1.0)": "ValueError|eps: expected",
    "rmse_loss(X, X, weight=1.0)": "TypeError|weight: expected a Tensor, got float",
}


def parametrize(wrong: Wrong) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("code", "words"), wrong.items(), ids=wrong.keys())


small = pytest.param("small", marks=pytest.mark.thresholds)
every_size = pytest.mark.parametrize("size", ["any size", small])


def called(code: str, functional: Any = fused) -> Any:
    return eval(f"f.{code}", globals() | {"f": functional})


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
@pytest.mark.parametrize("code", TORCHS)
@pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")
def test_errors_of_torchs_functions_are_torchs(code: str, size: str) -> None:
    if not hasattr(F, code.partition("(")[0]):
        pytest.skip("this torch lacks it")
    check_outcome(lambda f: called(code, f))


@parametrize(BOUNDS)
def test_class_indices_out_of_range(code: str, words: str) -> None:
    """The type is torch's; the message has the index and its position."""
    with pytest.raises(IndexError):
        called(code, F)
    with pyfused.patch():
        found = outcome(lambda: called(code, torch.nn.functional))
    for raised in (found, outcome(lambda: called(code))):
        assert isinstance(raised, IndexError)
        assert not [word for word in words.split("|") if word not in str(raised)]


@every_size
@parametrize(OWN)
def test_errors_of_functions_that_torch_lacks(code: str, words: str, size: str) -> None:
    kind, *words = words.split("|")
    with pytest.raises(getattr(builtins, kind)) as raised:
        called(code)
    missing = [word for word in words if word not in str(raised.value)]
    assert not missing, f"{missing} missing in: {raised.value}"


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


def wrong_calls(example: Example) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields arguments, with the name of the one that may be wrong."""
    for shape in ((6, 5), (4, 3, 2)):
        call = example.call(shape=shape)
        given = {n: x.detach() if isinstance(x, Tensor) else x for n, x in call.given.items()}
        if options(example.op).get("dim", 0) is None:
            given.setdefault("dim", -1 if is_divergence(example.op) else 1)
        for name, value in (options(example.op) | given).items():
            if name not in (*DEPRECATED, "dtype", "inplace", "with_metrics"):
                yield from ((name, given | {name: wrong}) for wrong in wrong_values(value))


ERRORS = IndexError, OverflowError, RuntimeError, TypeError, ValueError
TRIED = {e.id: e for e in EXAMPLES.values() if e.name in ("", "probabilities", "none_of_all")}
BUILT_IN = (*("gelu", "logsigmoid", "softplus"),)  # without a signature


@every_size
@pytest.mark.parametrize("example", TRIED.values(), ids=TRIED)
@pytest.mark.filterwarnings("ignore")
def test_wrong_arguments(example: Example, size: str) -> None:
    """Errors are torch's; if torch lacks an argument, calls raise where the definition does."""
    op, of_torch = example.op, getattr(F, example.op.name, None)
    numbers = {number.name for number in op.numbers}
    known = None if op.name in BUILT_IN or not of_torch else inspect.signature(of_torch).parameters
    for name, given in wrong_calls(example):
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
