"""Invalid arguments raise torch's type of error, and name argument, expected and got."""

from __future__ import annotations

import math
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from catalogue import EXAMPLES
from catalogue import TORCH as F
from samples import FIRST, Loss
from torch import Tensor

import pyfused
from pyfused import functional as fused
from pyfused.dispatch import reasons
from pyfused.dispatch.operator import Operator
from pyfused.ops.operators import OPERATORS

X, Y = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
P = X.softmax(1)
NAN, GRAD = float("nan"), torch.ones(5, requires_grad=True)
K, KY = torch.randn(2, 3, 4), torch.zeros(2, 4, dtype=torch.int64)


def indices(*values: int) -> Tensor:
    return torch.tensor(values)


# name: (call, strings in the message: the argument, what was expected, what was got)
Wrong = dict[str, tuple[Callable[[Any], Any], list[str]]]

CROSS_ENTROPY: Wrong = {
    "fewer_targets": (lambda f: f.cross_entropy(X, Y[:3]), ["target", "4", "3"]),
    "more_targets": (lambda f: f.cross_entropy(X[:3], Y), ["target", "3", "4"]),
    "target_2d": (lambda f: f.cross_entropy(X, Y[:, None]), ["target", "(4,)", "(4, 1)"]),
    "target_0d": (lambda f: f.cross_entropy(X, Y[0]), ["target", "(4,)", "()"]),
    "indices_in_the_inputs_shape": (
        lambda f: f.cross_entropy(X, torch.zeros(4, 5, dtype=torch.int64)),
        ["target", "(4,)", "(4, 5)"],
    ),
    "unbatched_with_two_targets": (lambda f: f.cross_entropy(X[0], Y[:2]), ["target", "(2,)"]),
    "unbatched_with_fewer_probabilities": (
        lambda f: f.cross_entropy(X[0], P[0, :4]),
        ["target", "(5,)", "(4,)"],
    ),
    "positions": (lambda f: f.cross_entropy(K, KY[:, :3]), ["target", "(2, 4)", "(2, 3)"]),
    "positions_missing": (lambda f: f.cross_entropy(K, KY[:, 0]), ["target", "(2, 4)", "(2,)"]),
    "batch_of_positions": (lambda f: f.cross_entropy(K, KY[:1]), ["target", "(2, 4)", "(1, 4)"]),
    "probabilities_for_fewer_classes": (
        lambda f: f.cross_entropy(X, P[:, :4]),
        ["target", "(4, 5)", "(4, 4)"],
    ),
    "probabilities_for_fewer_rows": (
        lambda f: f.cross_entropy(X, P[:3]),
        ["target", "(4, 5)", "(3, 5)"],
    ),
    "probabilities_for_one_row": (lambda f: f.cross_entropy(X, P[0]), ["target", "(5,)"]),
    "float_indices": (lambda f: f.cross_entropy(X, Y.float()), ["target", "int64", "float32"]),
    "float_pass_long": (lambda f: f.cross_entropy(X, Y.float()), ["Pass target.long()"]),
    "float_pass_long_unbatched": (
        lambda f: f.cross_entropy(X[0], Y[0].float()),
        ["Pass target.long()"],
    ),
    "int32_indices": (lambda f: f.cross_entropy(X, Y.int()), ["target", "int64", "int32"]),
    "batch_not_flattened": (
        lambda f: f.cross_entropy(X, Y.view(2, 2)),
        ["target", "(4,)", "(2, 2)", "Pass target.flatten()"],
    ),
    "int32_pass_long": (lambda f: f.cross_entropy(X, Y.int()), ["Pass target.long()"]),
    "int8_indices": (lambda f: f.cross_entropy(X, Y.to(torch.int8)), ["target", "int64", "int8"]),
    "bool_indices": (lambda f: f.cross_entropy(X, Y.bool()), ["target", "int64", "bool"]),
    "complex_target": (lambda f: f.cross_entropy(X, P.cfloat()), ["target", "complex64"]),
    "weight_too_short": (
        lambda f: f.cross_entropy(X, Y, torch.ones(4)),
        ["weight", "(5,)", "(4,)"],
    ),
    "weight_too_short_for_probabilities": (
        lambda f: f.cross_entropy(X, P, torch.ones(4)),
        ["weight", "(5,)", "(4,)"],
    ),
    "weight_2d": (lambda f: f.cross_entropy(X, Y, torch.ones(1, 5)), ["weight", "(5,)", "(1, 5)"]),
    "weight_0d": (lambda f: f.cross_entropy(X, Y, torch.ones(())), ["weight", "(5,)", "()"]),
    "weight_float64": (
        lambda f: f.cross_entropy(X, Y, torch.ones(5).double()),
        ["weight", "float32", "float64"],
    ),
    "weight_float32_for_bfloat16": (
        lambda f: f.cross_entropy(X.bfloat16(), Y, torch.ones(5)),
        ["weight", "bfloat16", "float32"],
    ),
    "weight_int64": (
        lambda f: f.cross_entropy(X, Y, torch.ones(5).long()),
        ["weight", "float32", "int64"],
    ),
    "weight_a_list": (lambda f: f.cross_entropy(X, Y, [1.0] * 5), ["weight", "Tensor", "list"]),
    "reduction_unknown": (
        lambda f: f.cross_entropy(X, Y, reduction="avg"),
        ["reduction", "none", "mean", "sum", "avg"],
    ),
    "reduction_none": (
        lambda f: f.cross_entropy(X, Y, reduction=None),
        ["reduction", "none", "mean", "sum", "None"],
    ),
    "smoothing_above_1": (
        lambda f: f.cross_entropy(X, Y, label_smoothing=1.1),
        ["label_smoothing", "0.0", "1.0", "1.1"],
    ),
    "smoothing_above_1_for_probabilities": (
        lambda f: f.cross_entropy(X, P, label_smoothing=1.1),
        ["label_smoothing", "0.0", "1.0", "1.1"],
    ),
    "smoothing_text": (
        lambda f: f.cross_entropy(X, Y, label_smoothing="a"),
        ["label_smoothing", "float", "str"],
    ),
    "smoothing_none": (
        lambda f: f.cross_entropy(X, Y, label_smoothing=None),
        ["label_smoothing", "float", "NoneType"],
    ),
    "ignore_index_with_probabilities": (
        lambda f: f.cross_entropy(X, P, ignore_index=1),
        ["ignore_index", "target", "1"],
    ),
    "ignore_index_a_fraction": (
        lambda f: f.cross_entropy(X, Y, ignore_index=1.5),
        ["ignore_index", "int", "float"],
    ),
    "ignore_index_none": (
        lambda f: f.cross_entropy(X, Y, ignore_index=None),
        ["ignore_index", "int", "NoneType"],
    ),
    "input_a_list": (lambda f: f.cross_entropy([1.0], Y), ["input", "Tensor", "list"]),
    "input_numpy": (lambda f: f.cross_entropy(np.ones((4, 5)), Y), ["input", "Tensor", "ndarray"]),
    "target_a_list": (lambda f: f.cross_entropy(X, [0, 1]), ["target", "Tensor", "list"]),
    "target_none": (lambda f: f.cross_entropy(X, None), ["target", "Tensor", "NoneType"]),
    "input_0d": (lambda f: f.cross_entropy(torch.tensor(1.0), Y[0]), ["input", "()"]),
    "input_0d_probability": (
        lambda f: f.cross_entropy(torch.tensor(1.0), torch.tensor(1.0)),
        ["input", "()"],
    ),
    "no_classes": (lambda f: f.cross_entropy(K[:, :0], KY), ["input", "one class", "(2, 0, 4)"]),
    "no_classes_smoothed": (
        lambda f: f.cross_entropy(K[:, :0], KY, label_smoothing=0.1),
        ["input", "one class", "(2, 0, 4)"],
    ),
    "input_int64": (lambda f: f.cross_entropy(X.long(), Y), ["input", "floating", "int64"]),
    "input_complex": (lambda f: f.cross_entropy(X.cfloat(), Y), ["input", "floating", "complex64"]),
    "swapped": (lambda f: f.cross_entropy(Y, X), ["input", "int64", "target swapped?"]),
    "target_elsewhere": (
        lambda f: f.cross_entropy(X, Y.to("meta")),
        ["target", "cpu", "meta"],
    ),
    "weight_elsewhere": (
        lambda f: f.cross_entropy(X, Y, torch.ones(5, device="meta")),
        ["weight", "cpu", "meta"],
    ),
    "classes_last": (
        lambda f: f.cross_entropy(K.mT, KY),
        ["target", "(2, 3)", "(2, 4)", "movedim(-1, 1)", "flatten(0, -2)"],
    ),
    "no_target": (lambda f: f.cross_entropy(X), ["target"]),
    "unknown_argument": (lambda f: f.cross_entropy(X, Y, weights=None), ["weights"]),
}
BOUNDS: Wrong = {
    "beyond": (
        lambda f: f.cross_entropy(X, indices(0, 1, 5, 2)),
        ["target", "[0, 5)", "5", "(2,)"],
    ),
    "negative": (
        lambda f: f.cross_entropy(X, indices(0, -1, 4, 2)),
        ["target", "[0, 5)", "-1", "(1,)"],
    ),
    "last": (lambda f: f.cross_entropy(X, indices(0, 1, 4, 7)), ["[0, 5)", "7", "(3,)"]),
    "first_of_several": (
        lambda f: f.cross_entropy(X, indices(0, 9, 8, -3)),
        ["[0, 5)", "9", "(1,)"],
    ),
    "far": (lambda f: f.cross_entropy(X, indices(0, 2**62, 0, 0)), [str(2**62), "(1,)"]),
    "low": (lambda f: f.cross_entropy(X, indices(0, -(2**63), 0, 0)), [str(-(2**63)), "(1,)"]),
    "not_the_ignored": (
        lambda f: f.cross_entropy(X, indices(-100, -1, -100, 0), ignore_index=-1),
        ["-100", "(0,)", "ignore_index", "-1"],
    ),
    "unbatched": (lambda f: f.cross_entropy(X[0], torch.tensor(5)), ["[0, 5)", "5"]),
    "positions": (
        lambda f: f.cross_entropy(K, torch.tensor([[0, 1, 2, 0], [0, 1, 3, 0]])),
        ["[0, 3)", "3", "(1, 2)"],
    ),
    "two_dimensions": (
        lambda f: f.cross_entropy(K[..., None], torch.tensor([[0] * 4, [0, 0, 0, 3]])[..., None]),
        ["[0, 3)", "3", "(1, 3, 0)"],
    ),
    "smoothed": (
        lambda f: f.cross_entropy(X, indices(0, 1, 5, 2), label_smoothing=0.1),
        ["[0, 5)", "5", "(2,)"],
    ),
    "weighted": (
        lambda f: f.cross_entropy(X, indices(0, 1, 5, 2), torch.ones(5)),
        ["[0, 5)", "5", "(2,)"],
    ),
    "uint8": (
        lambda f: f.cross_entropy(X, indices(0, 1, 255, 2).to(torch.uint8)),
        ["[0, 5)", "255", "(2,)"],
    ),
    "strided": (
        lambda f: f.cross_entropy(X, indices(0, 9, 1, 9, 5, 9, 2, 9)[::2]),
        ["[0, 5)", "5", "(2,)"],
    ),
}
OTHERS: Wrong = {
    "beta of each element": (
        lambda f: f.smooth_l1_loss(X, X, beta=torch.rand(X.shape)),
        ["beta", "one number", "(4, 5)", "@pyfused.loss", "beta as a tensor"],
    ),
    "several deltas": (
        lambda f: f.huber_loss(X, X, delta=[0.5, 1.0]),
        ["delta", "one number", "[0.5, 1.0]", "@pyfused.loss", "delta as a tensor"],
    ),
    "mse_shapes": (lambda f: f.mse_loss(X, X[:3]), ["target", "(4, 5)", "(3, 5)"]),
    "swiglu_shapes": (lambda f: f.swiglu(X, X[:3]), ["up", "gate", "(4, 5)", "(3, 5)"]),
    "mse_weight_shape": (
        lambda f: f.mse_loss(X, X, weight=torch.ones(5)),
        ["weight", "(4, 5)", "(5,)"],
    ),
    "mse_reduction_weighted": (
        lambda f: f.mse_loss(X, X, reduction="avg", weight=X),
        ["reduction", "none", "mean", "sum", "avg"],
    ),
    "bce_shape": (
        lambda f: f.binary_cross_entropy_with_logits(X, P[:, :1]),
        ["target", "(4, 5)", "(4, 1)"],
    ),
    "bce_weight_shape": (
        lambda f: f.binary_cross_entropy_with_logits(X, P, torch.ones(4)),
        ["weight", "(4, 5)", "(4,)"],
    ),
    "bce_weight_of_more_dimensions": (
        lambda f: f.binary_cross_entropy_with_logits(X, P, torch.ones(2, 4, 5)),
        ["weight", "(4, 5)", "(2, 4, 5)"],
    ),
    "bce_pos_weight_shape": (
        lambda f: f.binary_cross_entropy_with_logits(X, P, pos_weight=torch.ones(4)),
        ["pos_weight", "(4, 5)", "(4,)"],
    ),
    "bce_weight_requires_grad": (
        lambda f: f.binary_cross_entropy_with_logits(X, P, GRAD),
        ["weight"],
    ),
    "gaussian_variances": (
        lambda f: f.gaussian_nll_loss(X, X, torch.ones(5)),
        ["var", "(4, 5)", "(5,)"],
    ),
    "gaussian_two_single_dimensions": (
        lambda f: f.gaussian_nll_loss(X, X, torch.ones(1, 1)),
        ["var", "(4, 5)", "(1, 1)"],
    ),
    "gaussian_negative": (lambda f: f.gaussian_nll_loss(X, X, X), ["var", "0.0"]),
    "gaussian_negative_beside_nan": (
        lambda f: f.gaussian_nll_loss(X[0], X[0], torch.tensor([NAN, 1, 1, -2.0, 1])),
        ["var", "0.0", "-2.0"],
    ),
    "gaussian_negative_number": (
        lambda f: f.gaussian_nll_loss(X, X, -1.0),
        ["var", "0.0", "-1.0"],
    ),
    "gaussian_target": (
        lambda f: f.gaussian_nll_loss(X, X[:3], P),
        ["target", "(4, 5)", "(3, 5)"],
    ),
    "smooth_l1_nan": (lambda f: f.smooth_l1_loss(X, X, beta=NAN), ["beta", "0.0", "nan"]),
    "smooth_l1_two_betas": (
        lambda f: f.smooth_l1_loss(X, X, beta=torch.ones(2)),
        ["beta", "(2,)"],
    ),
    "mse_target_elsewhere": (
        lambda f: f.mse_loss(X, X.to("meta")),
        ["target", "cpu", "meta"],
    ),
    "mse_integers": (lambda f: f.mse_loss(X.long(), X.long()), ["input", "floating", "int64"]),
    "bce_integers": (
        lambda f: f.binary_cross_entropy(P, P.long()),
        ["target", "floating", "int64", "Pass target.float()"],
    ),
    "bce_with_logits_integers": (
        lambda f: f.binary_cross_entropy_with_logits(X, P.long()),
        ["target", "floating", "int64", "Pass target.float()"],
    ),
    "bce_with_logits_integers_for_bfloat16": (
        lambda f: f.binary_cross_entropy_with_logits(X.bfloat16(), P.long()),
        ["target", "floating", "int64", "Pass target.to(torch.bfloat16)"],
    ),
    "soft_margin_shape": (
        lambda f: f.soft_margin_loss(X, X[:3]),
        ["target", "(4, 5)", "(3, 5)"],
    ),
    "nll_float_indices": (
        lambda f: f.nll_loss(X, Y.float()),
        ["target", "int64", "float32", "Pass target.long()"],
    ),
    "multi_margin_float_indices": (
        lambda f: f.multi_margin_loss(X, Y.float()),
        ["target", "int64", "float32", "Pass target.long()"],
    ),
    "linear_in_the_order_of_liger": (
        lambda f: f.linear_cross_entropy(torch.ones(9, 5), X, Y),
        ["target", "(9,)", "(4,)", "Pass input, linear_weight, target in this order"],
    ),
    "nll_integers": (lambda f: f.nll_loss(X.long(), Y), ["input", "floating", "int64"]),
    "nll_swapped": (lambda f: f.nll_loss(Y, X), ["target", "(4, 5)", "target swapped?"]),
    "nll_classes_last": (
        lambda f: f.nll_loss(K.mT, KY),
        ["target", "(2, 3)", "(2, 4)", "movedim(-1, 1)", "flatten(0, -2)"],
    ),
    "nll_target_elsewhere": (lambda f: f.nll_loss(X, Y.to("meta")), ["target", "cpu", "meta"]),
    "multi_margin_swapped": (lambda f: f.multi_margin_loss(Y, X), ["target", "swapped?"]),
    "labels_swapped": (
        lambda f: f.multilabel_margin_loss(X.long(), X),
        ["target", "int64", "swapped?"],
    ),
    "gelu_integers": (lambda f: f.gelu(X.long()), ["input", "floating", "int64"]),
    "gelu_approximate": (
        lambda f: f.gelu(X, approximate="foo"),
        ["approximate", "'none' or 'tanh'", "'foo'"],
    ),
    "gelu_approximate_a_number": (
        lambda f: f.gelu(X, approximate=3),
        ["approximate", "'none' or 'tanh'", "3"],
    ),
    "binary_cross_entropy_complex_target": (
        lambda f: f.binary_cross_entropy(P, P.cfloat()),
        ["target", "floating", "complex64"],
    ),
    "relu_bool": (lambda f: f.relu(X.bool()), ["input", "floating", "bool"]),
    "relu_complex": (lambda f: f.relu(X.cfloat()), ["input", "floating", "complex64"]),
    "relu_inplace_leaf": (
        lambda f: f.relu(torch.ones(3, requires_grad=True), inplace=True),
        ["leaf"],
    ),
    "relu_inplace_expanded": (
        lambda f: f.relu(torch.ones(1).expand(3), inplace=True),
        ["single memory location"],
    ),
    "relu_inplace_view_of_leaf": (
        lambda f: f.relu(torch.ones(3, requires_grad=True)[:2], inplace=True),
        ["leaf"],
    ),
}


def wrong_of_every_loss() -> Wrong:
    """Yields invalid calls of any pointwise loss."""
    found: Wrong = {}
    for loss in FIRST:
        drawn = EXAMPLES[loss.op.name].call(shape=(4, 5)).tensors
        given = {name: x.detach() for name, x in drawn.items()}
        first = given.pop(loss.operands[0].name)

        def call(f: Any, loss: Loss = loss, given: Any = given, **wrong: Any) -> Any:
            arguments = given | loss.parameters | wrong
            return getattr(f, loss.op.name)(**arguments)

        given[loss.operands[0].name] = first
        name, tensors = loss.op.name, given
        found[f"{name}_reduction"] = (partial(call, reduction="avg"), ["avg"])
        found[f"{name}_integers"] = (
            partial(call, **{n: t.long() for n, t in tensors.items()}),
            [],
        )
        found[f"{name}_complex"] = (
            partial(call, **{n: t.cfloat() for n, t in tensors.items()}),
            [],
        )
        missing = lambda f, name=name: getattr(f, name)(X)  # noqa: E731
        found[f"{name}_no_target"] = (missing, ["target"])
        for parameter in loss.op.scalars:
            if not parameter.flag:
                wrong = {parameter.name: "a"}
                words = [parameter.name, "float", "str"]
                found[f"{name}_{parameter.name}_text"] = (partial(call, **wrong), words)
            if math.isfinite(parameter.low):
                wrong = {parameter.name: parameter.low - 1}
                words = [parameter.name, str(parameter.low), str(parameter.low - 1)]
                found[f"{name}_{parameter.name}_low"] = (partial(call, **wrong), words)
    return found


def parametrize(wrong: Wrong) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("call", "words"), wrong.values(), ids=wrong.keys())


def error(call: Callable[[], Any]) -> Exception:
    """Returns the error of a call, whose only traceback has at most three frames of pyfused."""
    with pytest.raises(Exception) as raised:  # noqa: PT011 the caller looks at the type
        call()
    shown = "".join(traceback.format_exception(raised.value))
    assert shown.count("Traceback (most recent call last)") == 1
    assert shown.count(f'File "{Path(pyfused.__file__).parent}') <= 3, shown
    return raised.value


@pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")
@parametrize(CROSS_ENTROPY | BOUNDS | OTHERS | wrong_of_every_loss())
def test_errors_have_torchs_type_and_a_helpful_message(
    call: Callable[[Any], Any], words: list[str]
) -> None:
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


@pytest.mark.parametrize("op", OPERATORS.values(), ids=OPERATORS.keys())
def test_types_list_the_accepted_strings(op: Operator) -> None:
    hints = get_type_hints(getattr(fused, op.name))
    if "reduction" in hints:
        batchmean = {"batchmean"} if op.name == "kl_div" else set()
        assert set(get_args(hints["reduction"])) == {"none", "mean", "sum"} | batchmean
    if "approximate" in hints:
        assert set(get_args(hints["approximate"])) == {"none", "tanh"}


NO_TENSORS: dict[str, tuple[Any, str]] = {
    "list": ([1.0], "list"),
    "None": (None, "NoneType"),
    "int": (1, "int"),
    "ndarray": (X.numpy(), "ndarray"),
}


@pytest.mark.parametrize("op", OPERATORS.values(), ids=OPERATORS.keys())
@pytest.mark.parametrize(("wrong", "got"), NO_TENSORS.values(), ids=NO_TENSORS.keys())
def test_arguments_that_are_not_tensors(op: Operator, wrong: Any, got: str) -> None:
    """A TypeError; torch may raise others by accident, such as AttributeError for a list."""
    for operand in op.operands:
        if operand.optional and wrong is None:
            continue
        given: dict[str, Any] = op.required
        tensors = {o.name: 0.5 if o.number else P for o in op.operands if not o.optional}
        given |= tensors | {operand.name: wrong}
        try:
            op.reference(**given)
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


@parametrize(BOUNDS)
def test_out_of_range_without_gradients(call: Callable[[Any], Any], words: list[str]) -> None:
    assert not X.requires_grad
    for reduction in (torch.no_grad, torch.enable_grad):
        with reduction():
            assert isinstance(error(lambda: call(fused)), IndexError)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_an_out_of_range_target_has_no_side_effects(reduction: str) -> None:
    """Returns no value and no gradient, and does not modify arguments."""
    logits = torch.randn(100, 7, requires_grad=True)
    target = torch.zeros(100, dtype=torch.int64)
    target[99] = 7
    weight = torch.ones(7)
    tensors = (logits, target, weight)
    before = [t.detach().clone() for t in tensors]
    versions = [t._version for t in tensors]
    for smoothing in (0.0, 0.1):
        with pytest.raises(IndexError):
            fused.cross_entropy(
                logits, target, weight, reduction=reduction, label_smoothing=smoothing
            )
    assert logits.grad is None
    assert [t._version for t in tensors] == versions
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor, copy)


OUTSIDE, NEGATIVE = torch.tensor([0, 1, 2, 5]), torch.tensor([1.0, 1, 1, -1])
VALUES: dict[str, tuple[Callable[[], Any], type[Exception]]] = {
    "target": (lambda: fused.cross_entropy(X, OUTSIDE), IndexError),
    "labels": (lambda: fused.multi_margin_loss(X, OUTSIDE), RuntimeError),
    "token_weight": (lambda: fused.cross_entropy(X, Y, token_weight=NEGATIVE), ValueError),
    "var": (lambda: fused.gaussian_nll_loss(X, X, -1.0), ValueError),
    "probabilities": (lambda: fused.binary_cross_entropy(X.abs() + 2, X.sigmoid()), RuntimeError),
}


def test_a_denominator_on_another_device() -> None:
    x, target, count = X.to("meta"), Y.to("meta"), torch.tensor(3.0)
    for call in (
        lambda: fused.cross_entropy(x, target, denominator=count),
        lambda: fused.linear_cross_entropy(x, x, target, denominator=count),
        lambda: fused.kl_div_with_logits(x, x, denominator=count),
    ):
        with pytest.raises(RuntimeError, match="denominator: expected the input's device meta"):
            call()


@pytest.mark.parametrize(("call", "expected"), VALUES.values(), ids=VALUES)
def test_a_default_device_does_not_change_errors(
    call: Callable[[], Any], expected: type[Exception]
) -> None:
    raised = error(call)
    assert isinstance(raised, expected)
    with torch.device("meta"):
        assert repr(error(call)) == repr(raised)


def test_calls_after_an_error_are_correct() -> None:
    with pytest.raises(IndexError):
        fused.cross_entropy(X, indices(0, 1, 2, 5))
    torch.testing.assert_close(fused.cross_entropy(X, Y), F.cross_entropy(X, Y))


@pytest.mark.thresholds
@parametrize(CROSS_ENTROPY | BOUNDS)
def test_errors_are_the_same_in_calls_that_fall_back(
    call: Callable[[Any], Any], words: list[str]
) -> None:
    raised = error(lambda: call(fused))
    assert not [word for word in words if word not in str(raised)], raised


# exec(code, globals) and timeit run code whose globals have no __name__.
WARNING_OR_FAILING = {
    "a small call that broadcasts": "F.mse_loss(x[:3, :1], x[:3, 0])",
    "a large call that broadcasts": "F.l1_loss(x, x[:, :1])",
    "a mean of divergences": "F.kl_div(x, x)",
    "a linear layer on a mode": "F.linear_cross_entropy(x, w, t, denominator=w.sum())",
    "a missing dimension": "F.softmax(x)",
    "a formula": "pyfused.activation(lambda input: 2 * input)(x)",
    "an unsupported formula": "pyfused.loss(lambda x, y: x if x.is_leaf else y)(x, x)",
}


@pytest.mark.thresholds
@pytest.mark.parametrize("code", WARNING_OR_FAILING.values(), ids=WARNING_OR_FAILING.keys())
def test_code_whose_globals_have_no_name(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"x": torch.rand(1 << 19, 2), "w": GRAD.new_ones(30, 2, requires_grad=True)}
    tensors["t"] = torch.zeros(1 << 19, dtype=torch.int64)
    outcomes = []
    for name in ({"__name__": "user"}, {}):
        monkeypatch.setattr(reasons, "_reported", set())
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            try:
                exec(code, name | tensors | {"F": fused, "pyfused": pyfused})
            except Exception as raised:
                seen.append(raised)  # type: ignore[arg-type]
        outcomes.append([str(each) for each in seen])
    assert outcomes[0] == outcomes[1]
    assert bool(outcomes[0]) == (code != WARNING_OR_FAILING["a formula"])
