"""The operators, each declared once. What is known of one, here or in tests, is asked of these."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from pyfused import checks
from pyfused.ops import definitions, distillation
from pyfused.ops.activation import Activation
from pyfused.ops.class_loss import MultiMarginLoss, NllLoss
from pyfused.ops.composed import Composed
from pyfused.ops.cross_entropy import CrossEntropy, cross_entropy_fallback_reason
from pyfused.ops.declaration import Arguments, Operand, Operator, Scalar, reduction_of
from pyfused.ops.distillation import Divergence
from pyfused.ops.linear_cross_entropy import (
    LinearCrossEntropy,
    linear_cross_entropy_fallback_reason,
)
from pyfused.ops.log_probs import LinearLogProbs, LogProbsOfLogits
from pyfused.ops.pointwise_loss import PointwiseLoss, elements, weight_or_elements
from pyfused.ops.softmax import Softmax, not_along_one_dimension

INPUT, TARGET = Operand("input"), Operand("target")
CLASSES = Operand("target", differentiated=False, indices=True)
SIGNS = Operand("target", differentiated=False, sign=True)
WEIGHT = Operand("weight", low=0.0, differentiated=False, optional=True)
HEAD = (INPUT, Operand("linear_weight"), Operand("linear_bias", optional=True))

# ---- losses over classes -------------------------------------------------------------------------

CROSS_ENTROPY = CrossEntropy(
    name="cross_entropy",
    module="CrossEntropyLoss",
    operands=(INPUT, Operand("target", indices=True), WEIGHT),
    fallback_reason=cross_entropy_fallback_reason,
    definition=definitions.cross_entropy,
)

LINEAR_CROSS_ENTROPY = LinearCrossEntropy(
    name="linear_cross_entropy",
    module="LinearCrossEntropyLoss",
    operands=(
        INPUT,
        Operand("linear_weight"),
        Operand("target", indices=True),
        Operand("linear_bias", optional=True),
        WEIGHT,
    ),
    fallback_reason=linear_cross_entropy_fallback_reason,
    definition=definitions.linear_cross_entropy,
)

LOG_PROBS = LogProbsOfLogits(
    name="log_probs",
    module="LogProbs",
    operands=(Operand("logits"), CLASSES),
    definition=definitions.log_probs,
)

LINEAR_LOG_PROBS = LinearLogProbs(
    name="linear_log_probs",
    module="LinearLogProbs",
    operands=(*HEAD, CLASSES),
    definition=definitions.linear_log_probs,
)

NLL_LOSS = NllLoss(
    name="nll_loss",
    module="NLLLoss",
    operands=(INPUT, CLASSES, WEIGHT),
)

MULTI_MARGIN_LOSS = MultiMarginLoss(
    name="multi_margin_loss",
    module="MultiMarginLoss",
    operands=(INPUT, CLASSES, WEIGHT),
    fallback_reason=lambda input, *_: (
        "neither (C) nor (N, C)" if input.dim() not in (1, 2) else None
    ),
)

# ---- distillation --------------------------------------------------------------------------------

KL_DIV_WITH_LOGITS = Divergence(
    name="kl_div_with_logits",
    module="KLDivWithLogitsLoss",
    operands=(Operand("logits"), Operand("teacher_logits", differentiated=False)),
    student=1,
    kernels=distillation.of_logits,
    fallback_reason=distillation.fallback_reason,
    definition=distillation.kl_div_with_logits,
)

LINEAR_KL_DIV = Divergence(
    name="linear_kl_div",
    module="LinearKLDivLoss",
    operands=(
        *HEAD,
        Operand("teacher_input", differentiated=False),
        Operand("teacher_linear_weight", differentiated=False),
        Operand("teacher_linear_bias", differentiated=False, optional=True),
    ),
    student=3,
    kernels=distillation.of_layers,
    fallback_reason=distillation.fallback_reason,
    definition=distillation.linear_kl_div,
)

LINEAR_TOPK_KL_DIV = Divergence(
    name="linear_topk_kl_div",
    module="LinearTopKKLDivLoss",
    operands=(
        *HEAD,
        Operand("teacher_indices", differentiated=False, indices=True),
        Operand("teacher_log_probs", high=0.0, differentiated=False),
    ),
    student=3,
    kernels=distillation.of_topk,
    fallback_reason=distillation.fallback_reason,
    definition=distillation.linear_topk_kl_div,
)

# ---- pointwise losses ----------------------------------------------------------------------------


def _differ_in_shape(input: Tensor, target: Tensor, *_: Any) -> str | None:
    return "input and target differ in shape" if input.shape != target.shape else None


def _differ_in_dtype(input: Tensor, target: Tensor, *_: Any) -> str | None:
    return "input and target differ in dtype" if input.dtype is not target.dtype else None


def _differ(input: Tensor, target: Tensor, *_: Any) -> str | None:
    return _differ_in_dtype(input, target) or _differ_in_shape(input, target)


def _kl_div_fallback_reason(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    *_: Any,
) -> str | None:
    if reduction == "batchmean" and not (size_average is None and reduce is None):
        return "reduction is 'batchmean' beside size_average or reduce"  # torch divides by both
    return _differ_in_shape(input, target)


def _mean_of_kl_div(arguments: Arguments) -> str | None:
    _, _, size_average, reduce, reduction, _ = arguments
    if reduction != "mean" or size_average is not None or reduce is not None:
        return None
    return (
        "reduction: 'mean' divides the total loss by both the batch size and the support size."
        "'batchmean' divides only by the batch size, and aligns with the KL div math definition."
        "'mean' will be changed to behave the same as 'batchmean' in the next major release."
    )


def _rows(operands: Sequence[Tensor], *_: Any) -> float:
    return float(len(operands[0]) if operands[0].dim() else 1)


def _counted(
    operands: Sequence[Tensor], _weight: Tensor | None, numbers: Sequence[Any]
) -> float | Tensor:
    ignored = numbers[-1]
    if isinstance(ignored, float) and math.isnan(ignored):
        return elements(operands)
    return operands[1].ne(ignored).sum(dtype=torch.float64)


MSE_LOSS = PointwiseLoss(
    name="mse_loss",
    module="MSELoss",
    warns=True,
    operands=(INPUT, TARGET, WEIGHT),
    weight_shape=checks.weight_of_inputs_shape,
    denominators={"mean": weight_or_elements},
)

L1_LOSS = PointwiseLoss(
    name="l1_loss",
    module="L1Loss",
    warns=True,
    operands=(INPUT, TARGET, WEIGHT),
    weight_shape=checks.weight_of_inputs_shape,
    denominators={"mean": weight_or_elements},
)

SMOOTH_L1_LOSS = PointwiseLoss(
    name="smooth_l1_loss",
    module="SmoothL1Loss",
    warns=True,
    operands=(INPUT, TARGET),
    scalars=(Scalar("beta", low=0.0),),
)

HUBER_LOSS = PointwiseLoss(
    name="huber_loss",
    module="HuberLoss",
    warns=True,
    operands=(INPUT, TARGET, WEIGHT),
    scalars=(Scalar("delta", positive=True),),
    weight_shape=checks.weight_of_inputs_shape,
    fallback_reason=_differ_in_dtype,
)

KL_DIV = PointwiseLoss(
    name="kl_div",
    module="KLDivLoss",
    operands=(INPUT, Operand("target", low=0.0)),
    scalars=(Scalar("log_target", flag=True, chooses=True),),
    warning=_mean_of_kl_div,
    denominators={"mean": elements, "batchmean": _rows},
    fallback_reason=_kl_div_fallback_reason,
)

POISSON_NLL_LOSS = PointwiseLoss(
    name="poisson_nll_loss",
    module="PoissonNLLLoss",
    operands=(INPUT, Operand("target", low=0.0)),
    scalars=(
        Scalar("log_input", flag=True, chooses=True),
        Scalar("full", flag=True, chooses=True),
        Scalar("eps"),
    ),
)

SOFT_MARGIN_LOSS = PointwiseLoss(
    name="soft_margin_loss",
    module="SoftMarginLoss",
    operands=(INPUT, SIGNS),
    shapes=partial(checks.same_shape, error=RuntimeError),
    fallback_reason=_differ,
)

HINGE_EMBEDDING_LOSS = PointwiseLoss(
    name="hinge_embedding_loss",
    module="HingeEmbeddingLoss",
    operands=(INPUT, SIGNS),
    scalars=(Scalar("margin"),),
)

MARGIN_RANKING_LOSS = PointwiseLoss(
    name="margin_ranking_loss",
    module="MarginRankingLoss",
    operands=(Operand("input1"), Operand("input2"), Operand("target", sign=True)),
    scalars=(Scalar("margin"),),
    shapes=checks.of_one_dimension_and_broadcasting,
)

BINARY_CROSS_ENTROPY = PointwiseLoss(
    name="binary_cross_entropy",
    module="BCELoss",
    operands=(
        Operand("input", low=0.0, high=1.0, enforced=RuntimeError),
        Operand("target", low=0.0, high=1.0, enforced=RuntimeError),
        WEIGHT,
    ),
    shapes=checks.same_shape,
    weight_shape=checks.weight_that_broadcasts,
    nan_on_invalid=True,
    fallback_reason=_differ,
)

BINARY_CROSS_ENTROPY_WITH_LOGITS = PointwiseLoss(
    name="binary_cross_entropy_with_logits",
    module="BCEWithLogitsLoss",
    operands=(
        INPUT,
        Operand("target", low=0.0, high=1.0),
        WEIGHT,
        Operand("pos_weight", low=0.0, differentiated=False, optional=True),
    ),
    shapes=checks.logits_and_labels,
    weight_shape=checks.weight_that_broadcasts,
)


def _as_gaussian_nll_loss_has_it(
    input: Tensor, target: Tensor, var: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    if isinstance(var, float):
        var = input.new_full((), var)
    elif var.shape != input.shape and var.shape == input.shape[:-1]:
        var = var.unsqueeze(-1)
    return input, target, var


GAUSSIAN_NLL_LOSS = PointwiseLoss(
    name="gaussian_nll_loss",
    module="GaussianNLLLoss",
    operands=(INPUT, TARGET, Operand("var", low=0.0, number=True, enforced=ValueError)),
    scalars=(Scalar("full", flag=True), Scalar("eps")),
    shapes=checks.mean_and_variance,
    arrange=_as_gaussian_nll_loss_has_it,
)

QUANTILE_LOSS = PointwiseLoss(
    name="quantile_loss",
    module="QuantileLoss",
    operands=(INPUT, TARGET),
    scalars=(Scalar("quantile", low=0.0, high=1.0),),
    definition=definitions.quantile_loss,
)

LOG_COSH_LOSS = PointwiseLoss(
    name="log_cosh_loss",
    module="LogCoshLoss",
    operands=(INPUT, TARGET),
    definition=definitions.log_cosh_loss,
)

HINGE_LOSS = PointwiseLoss(
    name="hinge_loss",
    module="HingeLoss",
    operands=(INPUT, SIGNS),
    scalars=(Scalar("margin"), Scalar("squared", flag=True, chooses=True)),
    definition=definitions.hinge_loss,
)

SIGMOID_FOCAL_LOSS = PointwiseLoss(
    name="sigmoid_focal_loss",
    module="SigmoidFocalLoss",
    operands=(
        Operand("inputs"),
        Operand("targets", low=0.0, high=1.0, differentiated=False),
        WEIGHT,
    ),
    scalars=(
        Scalar("alpha", high=1.0),
        Scalar("gamma", low=0.0),
        Scalar("ignore_index", optional=True),
    ),
    shapes=partial(checks.same_shape, name="targets"),
    weight_shape=checks.weight_that_broadcasts,
    denominators={"mean": _counted},
    definition=definitions.sigmoid_focal_loss,
)

RMSE_LOSS = Composed(
    name="rmse_loss",
    module="RMSELoss",
    operands=(INPUT, TARGET, WEIGHT),
    scalars=(Scalar("eps", low=0.0),),
    of=MSE_LOSS,
    given=lambda input, target, reduction, weight, _: (
        input,
        target,
        None,
        None,
        reduction,
        weight,
    ),
    finish=lambda loss, *arguments: (loss + arguments[-1]).sqrt(),
    definition=definitions.rmse_loss,
)


def _no_row_of_labels(input: Tensor, target: Tensor, weight: Tensor | None, *_: Any) -> str | None:
    if not input.dim():
        return "input has no dimension"
    if weight is not None and weight.shape not in (input.shape, input.shape[-1:]):
        return "weight is neither of the input's shape nor one for each class"
    return _differ_in_shape(input, target)


def _common_dtype(*tensors: Tensor | None) -> torch.dtype:
    return reduce(torch.promote_types, [t.dtype for t in tensors if isinstance(t, Tensor)])


def _in_common_dtype(input: Tensor, target: Tensor, weight: Any, *rest: Any) -> tuple[Any, ...]:
    """The arguments of binary_cross_entropy_with_logits, which computes in its target's dtype."""
    if isinstance(input, Tensor) and isinstance(target, Tensor):  # else an error to come
        dtype = _common_dtype(input, target, weight)
        input, target = input.to(dtype), target.to(dtype)
    return input, target, weight, *rest, None


def _mean_of_rows(loss: Tensor, *arguments: Any) -> Tensor:
    input, target, weight, size_average, reduce, reduction = arguments
    reduction = reduction_of(size_average, reduce, reduction, warn=False)  # the loss did
    if reduction == "none":
        loss = loss.mean(-1)
    elif reduction == "sum":
        loss = loss / input.shape[-1]
    return loss.to(_common_dtype(input, target, weight))


MULTILABEL_SOFT_MARGIN_LOSS = Composed(
    name="multilabel_soft_margin_loss",
    module="MultiLabelSoftMarginLoss",
    operands=(INPUT, Operand("target", low=0.0, high=1.0), WEIGHT),
    of=BINARY_CROSS_ENTROPY_WITH_LOGITS,
    given=_in_common_dtype,
    finish=_mean_of_rows,
    fallback_reason=_no_row_of_labels,
)

# ---- activations ---------------------------------------------------------------------------------

RELU = Activation(
    name="relu",
    module="ReLU",
    gradient=lambda grad_output, output: torch.ops.aten.threshold_backward(grad_output, output, 0),
)

LEAKY_RELU = Activation(
    name="leaky_relu",
    module="LeakyReLU",
    formula=lambda negative_slope: ("leaky_relu", (float(negative_slope),)),
    fallback_reason=lambda _, negative_slope: (
        None
        if isinstance(negative_slope, (int, float)) and negative_slope >= 0
        else "negative_slope is not 0 or more"
    ),
    gradient=lambda grad_output, output, negative_slope: torch.ops.aten.leaky_relu_backward(
        grad_output, output, negative_slope, True
    ),
)

TANH = Activation(
    name="tanh",
    module="Tanh",
    gradient=lambda grad_output, output: torch.ops.aten.tanh_backward(grad_output, output),
)


SOFTCAP = Activation(
    name="softcap",
    module="Softcap",
    saves="input",
    formula=lambda cap: ("softcap", (float(cap),)),
    fallback_reason=lambda _, cap: (
        None if isinstance(cap, (int, float)) and cap > 0 else "cap is no positive number"
    ),
    definition=definitions.softcap,
    gradient=lambda grad_output, input, cap: grad_output * (1 - (input / cap).tanh() ** 2),
)


def _gradient_of_silu(grad_output: Tensor, input: Tensor) -> Tensor:
    share = input.sigmoid()
    return grad_output * (share * (1 + input * (1 - share)))


SILU = Activation(
    name="silu",
    module="SiLU",
    saves="input",
    gradient=_gradient_of_silu,
)


def _gelu(input: Tensor, approximate: str = "none") -> Tensor:
    if approximate == "none":  # reading an argument takes 0.2 us
        return torch._C._nn.gelu(input)
    return torch._C._nn.gelu(input, approximate=approximate)


GELU = Activation(
    name="gelu",
    module="GELU",
    saves="input",
    formula=lambda approximate: ("gelu" if approximate == "none" else "gelu_tanh", ()),
    fallback_reason=lambda _, approximate: (
        None if approximate in ("none", "tanh") else "approximate is neither 'none' nor 'tanh'"
    ),
    definition=_gelu,
    gradient=lambda grad_output, input, approximate: torch.ops.aten.gelu_backward(
        grad_output, input, approximate=approximate
    ),
)

SIGMOID = Activation(
    name="sigmoid",
    module="Sigmoid",
    gradient=lambda grad_output, output: torch.ops.aten.sigmoid_backward(grad_output, output),
)

# ---- along one dimension -------------------------------------------------------------------------

SOFTMAX = Softmax(name="softmax", module="Softmax", fallback_reason=not_along_one_dimension)
LOG_SOFTMAX = Softmax(
    name="log_softmax", module="LogSoftmax", fallback_reason=not_along_one_dimension
)

OPERATORS: dict[str, Operator] = {
    op.name: op
    for op in (
        CROSS_ENTROPY,
        LINEAR_CROSS_ENTROPY,
        LOG_PROBS,
        LINEAR_LOG_PROBS,
        KL_DIV_WITH_LOGITS,
        LINEAR_KL_DIV,
        LINEAR_TOPK_KL_DIV,
        NLL_LOSS,
        MULTI_MARGIN_LOSS,
        MSE_LOSS,
        L1_LOSS,
        SMOOTH_L1_LOSS,
        HUBER_LOSS,
        BINARY_CROSS_ENTROPY,
        BINARY_CROSS_ENTROPY_WITH_LOGITS,
        KL_DIV,
        POISSON_NLL_LOSS,
        GAUSSIAN_NLL_LOSS,
        SOFT_MARGIN_LOSS,
        HINGE_EMBEDDING_LOSS,
        MARGIN_RANKING_LOSS,
        QUANTILE_LOSS,
        LOG_COSH_LOSS,
        HINGE_LOSS,
        SIGMOID_FOCAL_LOSS,
        RMSE_LOSS,
        MULTILABEL_SOFT_MARGIN_LOSS,
        RELU,
        LEAKY_RELU,
        SIGMOID,
        TANH,
        SOFTCAP,
        SILU,
        GELU,
        SOFTMAX,
        LOG_SOFTMAX,
    )
}
