"""Elementwise operators: pointwise losses and activations, each with its formula.

A formula is a torch function of the operands, the numbers and the choices. Numbers are tensors
while the formula is traced; choices are bools or strings. ``make formulas`` prints it as C++, and
the first call on a GPU prints it as Triton. Gradients are derived by torch's rules, except where a
written gradient is more accurate or shorter, or where torch's operator defines another one.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyfused.dispatch.operator import Operand, Operator, Options
from pyfused.dispatch.originals import F
from pyfused.dispatch.reasons import stacklevel
from pyfused.formula_compiler.kernel import Kernel
from pyfused.layout import broadcast_with
from pyfused.ops import definitions
from pyfused.ops.activation import Activation
from pyfused.ops.pointwise_loss import (
    Divisor,
    PointwiseLoss,
    elements,
    weight_or_elements,
)
from pyfused.types import Choice, Gradients, Scalar

BOTH = (False, True)
APPROXIMATE = Choice("approximate", ("none", "tanh"))
INPUT, TARGET = Operand("input"), Operand("target")
PROBABILITY = Operand("target", low=0.0, high=1.0)
SIGNS = Operand("target", differentiated=False, sign=True)
WEIGHT = Operand("weight", low=0.0, differentiated=False, optional=True)
_TWICE = 2 * math.sqrt(2 / math.pi)


def _softplus(x: Tensor) -> Tensor:
    """Returns log(1 + exp(x)), where F.softplus is linear from 20 on."""
    return -F.logsigmoid(-x)  # type: ignore[no-any-return]


# ---- pointwise losses ----------------------------------------------------------------------------


def _differ_in_shape(input: Tensor, target: Tensor, *_: Any) -> str | None:
    return "input and target differ in shape" if input.shape != target.shape else None


def _differ_in_dtype(input: Tensor, other: Tensor, *_: Any) -> str | None:
    return "the operands differ in dtype" if input.dtype is not other.dtype else None


def _differ_in_dtype_or_shape(input: Tensor, target: Tensor, *_: Any) -> str | None:
    return _differ_in_dtype(input, target) or _differ_in_shape(input, target)


def _differ_in_dimensions(*call: Any) -> str | None:
    equal = len({x.dim() for x in call[:-1]}) == 1
    return None if equal else "the operands differ in the number of dimensions"


def _any_differs_in_shape(input: Tensor, *others: Any) -> str | None:
    """Returns a reason if torch's function broadcasts, which it warns about, or raises."""
    shape, tensors = input.shape, others[:-1]
    equal = all([x is None or x.shape == shape for x in tensors])  # noqa: C419 a generator is slower
    return None if equal else "the operands differ in shape"


def _rows(operands: Sequence[Tensor], *_: Any) -> Divisor:
    return operands[0].shape[0] if operands[0].dim() else 1


def _counted_elements(
    operands: Sequence[Tensor], _weight: Tensor | None, options: Options
) -> Divisor:
    ignored = options.ignore_index
    if ignored is None:
        return elements(operands)
    return operands[1].ne(ignored).sum(dtype=torch.float64)


MSE_LOSS = PointwiseLoss(
    name="mse_loss",
    module="MSELoss",
    choices=("reduction",),
    torch=lambda x, y, weight, options: F.mse_loss(x, y, None, None, options.reduction, weight),
    operands=(INPUT, TARGET, WEIGHT),
    denominators={"mean": weight_or_elements},
    reason=_any_differs_in_shape,
    formula=lambda input, target: (input - target) ** 2,
    torch_backward=lambda grad, operands, _: torch.ops.aten.mse_loss_backward(grad, *operands, 0),
)


L1_LOSS = PointwiseLoss(
    name="l1_loss",
    module="L1Loss",
    choices=("reduction",),
    torch=lambda x, y, weight, options: F.l1_loss(x, y, None, None, options.reduction, weight),
    operands=(INPUT, TARGET, WEIGHT),
    denominators={"mean": weight_or_elements},
    reason=_any_differs_in_shape,
    formula=lambda input, target: (input - target).abs(),
    torch_backward=lambda grad, operands, _: grad * (operands[0] - operands[1]).sign(),
)


def _smooth_l1_loss(input: Tensor, target: Tensor, beta: Tensor) -> Tensor:
    size = (input - target).abs()
    return torch.where(size < beta, 0.5 * size * (size / beta), size - 0.5 * beta)


def _gradient_of_smooth_l1_loss(input: Tensor, target: Tensor, beta: Tensor) -> Gradients:
    d = input - target  # at NaN, the gradient is NaN, or 0 if beta is 0
    size = d.abs()
    slope = d.sign() * torch.where((size >= beta) | (beta == 0), 1, size / beta)
    return slope, -slope


SMOOTH_L1_LOSS = PointwiseLoss(
    name="smooth_l1_loss",
    module="SmoothL1Loss",
    choices=("reduction",),
    torch=lambda x, y, options: F.smooth_l1_loss(x, y, None, None, options.reduction, options.beta),
    operands=(INPUT, TARGET),
    numbers=(Scalar("beta", low=0.0),),
    reason=_any_differs_in_shape,
    formula=_smooth_l1_loss,
    gradient=_gradient_of_smooth_l1_loss,
    torch_backward=lambda grad, operands, options: torch.ops.aten.smooth_l1_loss_backward(
        grad, *operands, 0, options.beta
    ),
)


def _huber_loss(input: Tensor, target: Tensor, delta: Tensor) -> Tensor:
    size = (input - target).abs()
    return torch.where(size < delta, 0.5 * size * size, delta * (size - 0.5 * delta))


def _gradient_of_huber_loss(input: Tensor, target: Tensor, delta: Tensor) -> Gradients:
    d = input - target
    slope = torch.where(d <= -delta, -delta, torch.where(d >= delta, delta, d))
    return slope, -slope


HUBER_LOSS = PointwiseLoss(
    name="huber_loss",
    module="HuberLoss",
    choices=("reduction",),
    torch=lambda x, y, weight, options: F.huber_loss(
        x, y, options.reduction, options.delta, weight
    ),
    operands=(INPUT, TARGET, WEIGHT),
    numbers=(Scalar("delta", positive=True),),
    reason=lambda *call: _differ_in_dtype(*call) or _any_differs_in_shape(*call),
    formula=_huber_loss,
    gradient=_gradient_of_huber_loss,
    torch_backward=lambda grad, operands, options: torch.ops.aten.huber_loss_backward(
        grad, *operands, 0, options.delta
    ),
)


def _binary_cross_entropy(input: Tensor, target: Tensor) -> Tensor:
    """Logarithms are at least -100. The loss of a target outside of [0, 1] is NaN."""
    no, yes = torch.log1p(-input).clamp(min=-100), input.log().clamp(min=-100)
    return torch.where((target >= 0) & (target <= 1), (target - 1) * no - target * yes, math.nan)


def _gradient_of_binary_cross_entropy(input: Tensor, target: Tensor) -> Gradients:
    variance = ((1 - input) * input).clamp(min=1e-12)
    return (input - target) / variance, torch.log1p(-input) - input.log()


BINARY_CROSS_ENTROPY = PointwiseLoss(
    name="binary_cross_entropy",
    module="BCELoss",
    choices=("reduction",),
    torch=lambda x, y, weight, options: F.binary_cross_entropy(
        x, y, weight, None, None, options.reduction
    ),
    operands=(PROBABILITY._replace(name="input"), PROBABILITY, WEIGHT),
    nan_on_invalid=True,
    reason=_differ_in_dtype_or_shape,
    formula=_binary_cross_entropy,
    gradient=_gradient_of_binary_cross_entropy,
)


def _binary_cross_entropy_with_logits(
    input: Tensor, target: Tensor, pos_weight: Tensor | None = None
) -> Tensor:
    softplus = _softplus(-input)
    if pos_weight is not None:
        softplus = ((pos_weight - 1) * target + 1) * softplus
    return (1 - target) * input + softplus


def _slope_of_binary_cross_entropy_with_logits(
    input: Tensor, target: Tensor, pos_weight: Tensor | None = None
) -> Tensor:
    if pos_weight is None:
        return input.sigmoid() - target
    positive = pos_weight * target
    return (positive + 1 - target) * input.sigmoid() - positive


def _gradient_of_binary_cross_entropy_with_logits(
    input: Tensor, target: Tensor, pos_weight: Tensor | None = None
) -> Gradients:
    of_input = _slope_of_binary_cross_entropy_with_logits(input, target, pos_weight)
    if pos_weight is None:
        return of_input, -input
    return of_input, pos_weight * _softplus(-input) - _softplus(input), None


BINARY_CROSS_ENTROPY_WITH_LOGITS = PointwiseLoss(
    name="binary_cross_entropy_with_logits",
    module="BCEWithLogitsLoss",
    choices=("reduction",),
    torch=lambda x, y, weight, pos_weight, options: F.binary_cross_entropy_with_logits(
        x, y, weight, None, None, options.reduction, pos_weight
    ),
    operands=(
        INPUT,
        PROBABILITY,
        WEIGHT,
        WEIGHT._replace(name="pos_weight"),
    ),
    reason=_differ_in_shape,
    formula=_binary_cross_entropy_with_logits,
    gradient=_gradient_of_binary_cross_entropy_with_logits,
    torch_backward=lambda grad, operands, _: (
        grad * _slope_of_binary_cross_entropy_with_logits(*operands)
    ),
)


def _kl_div(input: Tensor, target: Tensor, log_target: bool) -> Tensor:
    if log_target:
        return target.exp() * (target - input)
    return torch.where(target == 0, 0, target * target.log()) - target * input


def _gradient_of_kl_div(input: Tensor, target: Tensor, log_target: bool) -> Gradients:
    if log_target:
        p = target.exp()
        return -p, p * (target - input) + p
    return -target, target.log() + target / target - input  # NaN if the target is 0


_MEAN_OF_KL_DIV = (  # torch's warning
    "reduction: 'mean' divides the total loss by both the batch size and the support size."
    "'batchmean' divides only by the batch size, and aligns with the KL div math definition."
    "'mean' will be changed to behave the same as 'batchmean' in the next major release."
)


def _warn_about_mean(loss: Tensor, _inputs: Any, options: Options, _leading: Any) -> Tensor:
    if options.reduction == "mean":
        warnings.warn(_MEAN_OF_KL_DIV, stacklevel=stacklevel())
    return loss


def _reference_of_kl_div(input: Tensor, target: Tensor, options: Options) -> Tensor:
    """Returns torch's loss without the warning."""
    log_target, reduction = options
    is_mean = reduction == "mean"
    loss: Tensor = F.kl_div(input, target, None, None, "none" if is_mean else reduction, log_target)
    return loss.mean() if is_mean else loss


KL_DIV = PointwiseLoss(
    name="kl_div",
    module="KLDivLoss",
    choices=(Choice("log_target", BOTH), "reduction"),
    torch=lambda x, y, options: F.kl_div(x, y, None, None, options.reduction, options.log_target),
    reference=_reference_of_kl_div,
    finish=_warn_about_mean,
    operands=(INPUT, TARGET._replace(low=0.0)),
    denominators={"mean": elements, "batchmean": _rows},
    reason=_differ_in_shape,
    formula=_kl_div,
    gradient=_gradient_of_kl_div,
)


def _poisson_nll_loss(
    input: Tensor, target: Tensor, eps: Tensor, log_input: bool, full: bool
) -> Tensor:
    loss = input.exp() - target * input if log_input else input - target * (input + eps).log()
    if full:  # Stirling's approximation of log(target!)
        log, log_two_pi = target.log(), math.log(2 * math.pi)
        approximated = target * log - target + 0.5 * (log_two_pi + log)
        loss = loss + torch.where(target <= 1, 0, approximated)
    return loss


def _slope_of_poisson_nll_loss(
    input: Tensor, target: Tensor, eps: Tensor, log_input: bool
) -> Tensor:
    return input.exp() - target if log_input else 1 - target / (input + eps)


def _gradient_of_poisson_nll_loss(
    input: Tensor, target: Tensor, eps: Tensor, log_input: bool, full: bool
) -> Gradients:
    of_input = _slope_of_poisson_nll_loss(input, target, eps, log_input)
    of_target = -input if log_input else -(input + eps).log()
    if full:
        of_target = of_target + torch.where(target <= 1, 0, target.log() + 0.5 / target)
    return of_input, of_target


POISSON_NLL_LOSS = PointwiseLoss(
    name="poisson_nll_loss",
    module="PoissonNLLLoss",
    choices=(Choice("log_input", BOTH), Choice("full", BOTH), "reduction"),
    torch=lambda x, y, options: F.poisson_nll_loss(
        x, y, options.log_input, options.full, None, options.eps, None, options.reduction
    ),
    operands=(INPUT, TARGET._replace(low=0.0)),
    numbers=(Scalar("eps"),),
    formula=_poisson_nll_loss,
    gradient=_gradient_of_poisson_nll_loss,
    torch_backward=lambda grad, operands, options: (
        grad * _slope_of_poisson_nll_loss(operands[0], operands[1], options.eps, options.log_input)
    ),
)


def _with_variance_tensor(
    input: Tensor, target: Tensor, var: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    if not isinstance(var, Tensor):
        var = input.new_full((), var)
    elif var.shape != input.shape and var.shape == input.shape[:-1]:
        var = var.unsqueeze(-1)
    return input, target, var


def _shape_reason(input: Tensor, target: Tensor, var: Any, _: Any) -> str | None:
    """Returns why no kernel takes the shapes: there may be one variance per row."""
    if not broadcast_with(target.shape, input.shape):
        return "input and target do not broadcast"
    if not isinstance(var, Tensor) or var.shape in (input.shape, input.shape[:-1]):
        return None
    pairs = zip(input.shape, var.shape, strict=False)
    fits = var.dim() == input.dim() and [b for a, b in pairs if a is not b and a != b] == [1]
    return None if fits else "var has neither the input's shape nor one element per row"


def _gaussian_nll_loss(
    input: Tensor, target: Tensor, var: Tensor, eps: Tensor, full: bool
) -> Tensor:
    """Returns the loss; it is NaN for a negative variance."""
    v, d = torch.where(var < eps, eps, var), input - target
    constant = 0.5 * math.log(2 * math.pi) if full else 0.0
    return torch.where(var < 0, math.nan, 0.5 * (v.log() + d * d / v) + constant)


def _gradient_of_gaussian_nll_loss(
    input: Tensor, target: Tensor, var: Tensor, eps: Tensor, _: bool
) -> Gradients:
    """Returns the gradients, including the variance's gradient where it is below eps, as torch."""
    v, d = torch.where(var < eps, eps, var), input - target
    of_input = 2 * d * (0.5 / v)  # overflows for the same inputs as torch's gradient
    return of_input, -of_input, (1 - d * d / v) / v * 0.5


GAUSSIAN_NLL_LOSS = PointwiseLoss(
    name="gaussian_nll_loss",
    module="GaussianNLLLoss",
    choices=(Choice("full", BOTH), "reduction"),
    torch=lambda x, y, var, options: F.gaussian_nll_loss(
        x, y, var, options.full, options.eps, options.reduction
    ),
    operands=(INPUT, TARGET, Operand("var", low=0.0, number=True)),
    numbers=(Scalar("eps"),),
    arrange=_with_variance_tensor,
    nan_on_invalid=True,
    reason=_shape_reason,
    formula=_gaussian_nll_loss,
    gradient=_gradient_of_gaussian_nll_loss,
)

SOFT_MARGIN_LOSS = PointwiseLoss(
    name="soft_margin_loss",
    module="SoftMarginLoss",
    choices=("reduction",),
    torch=lambda x, y, options: F.soft_margin_loss(x, y, None, None, options.reduction),
    operands=(INPUT, SIGNS),
    reason=_differ_in_dtype_or_shape,
    formula=lambda input, target: _softplus(-target * input),
)


def _hinge_embedding_loss(input: Tensor, target: Tensor, margin: Tensor) -> Tensor:
    """Returns the loss; a target that is neither 1 nor -1 counts as both."""
    unlike = torch.where(target != 1, (margin - input).clamp(min=0), 0)
    return unlike + torch.where(target != -1, input, 0)


HINGE_EMBEDDING_LOSS = PointwiseLoss(
    name="hinge_embedding_loss",
    module="HingeEmbeddingLoss",
    choices=("reduction",),
    torch=lambda x, y, options: F.hinge_embedding_loss(
        x, y, options.margin, None, None, options.reduction
    ),
    operands=(INPUT, SIGNS),
    numbers=(Scalar("margin"),),
    clamps=True,
    formula=_hinge_embedding_loss,
)

MARGIN_RANKING_LOSS = PointwiseLoss(
    name="margin_ranking_loss",
    module="MarginRankingLoss",
    choices=("reduction",),
    torch=lambda x1, x2, y, options: F.margin_ranking_loss(
        x1, x2, y, options.margin, None, None, options.reduction
    ),
    operands=(Operand("input1"), Operand("input2"), Operand("target", sign=True)),
    numbers=(Scalar("margin"),),
    clamps=True,
    reason=_differ_in_dimensions,
    formula=lambda input1, input2, target, margin: (margin - target * (input1 - input2)).clamp(
        min=0
    ),
)


def _gradient_of_quantile_loss(input: Tensor, target: Tensor, quantile: Tensor) -> Gradients:
    """Returns the gradients; at a tie, the mean of both slopes; for NaN, their sum, as in torch."""
    d = target - input
    equal = torch.where(d == 0, 0.5 - quantile, 1 - 2 * quantile)
    slope = torch.where(d > 0, -quantile, torch.where(d < 0, 1 - quantile, equal))
    return slope, -slope


QUANTILE_LOSS = PointwiseLoss(
    name="quantile_loss",
    module="QuantileLoss",
    choices=("reduction",),
    operands=(INPUT, TARGET),
    numbers=(Scalar("quantile", low=0.0, high=1.0),),
    formula=lambda input, target, quantile: torch.maximum(
        quantile * (target - input), (quantile - 1) * (target - input)
    ),
    gradient=_gradient_of_quantile_loss,
)


def _log_cosh_loss(input: Tensor, target: Tensor) -> Tensor:
    size = (input - target).abs()
    return size + (_softplus(-2 * size) - math.log(2))


LOG_COSH_LOSS = PointwiseLoss(
    name="log_cosh_loss",
    module="LogCoshLoss",
    choices=("reduction",),
    operands=(INPUT, TARGET),
    formula=_log_cosh_loss,
    gradient=lambda input, target: ((input - target).tanh(), (target - input).tanh()),
)


def _hinge_loss(input: Tensor, target: Tensor, margin: Tensor, squared: bool) -> Tensor:
    slack = (margin - target * input).clamp(min=0)
    return slack * slack if squared else slack


HINGE_LOSS = PointwiseLoss(
    name="hinge_loss",
    module="HingeLoss",
    choices=(Choice("squared", BOTH), "reduction"),
    operands=(INPUT, SIGNS),
    numbers=(Scalar("margin"),),
    clamps=True,
    formula=_hinge_loss,
)


def _parts_of_focal_loss(
    x: Tensor, t: Tensor, alpha: Tensor, gamma: Tensor, _: Tensor
) -> list[Tensor]:
    p, q = x.sigmoid(), (-x).sigmoid()
    u = p * (1 - t) + q * t
    if isinstance(gamma, float):  # 2, which has a kernel without log and exp
        power, slope = u * u, u * (p * q)
    else:
        power = torch.where(gamma == 0, 1, (gamma * u.log()).exp())
        slope = power * torch.where(u > 0, p * q / u, 1)
    negative, positive = torch.where(alpha < 0, 1, 1 - alpha), torch.where(alpha < 0, 1, alpha)
    factor = positive * t + negative * (1 - t)
    return [p, (1 - t) * x + _softplus(-x), factor, power, slope]


def _sigmoid_focal_loss(input: Tensor, target: Tensor, *numbers: Any) -> Tensor:
    """With p = sigmoid(x) and u = p (1 - t) + (1 - p) t,

    loss = a c u^gamma,  a = alpha t + (1 - alpha) (1 - t), or 1,  c = (1 - t) x + softplus(-x)
    dloss/dx = a (u^gamma (p - t) + gamma c u^(gamma - 1) p (1 - p) (1 - 2 t))
    """
    _, entropy, factor, power, _ = _parts_of_focal_loss(input, target, *numbers)
    return torch.where(target == numbers[2], 0, factor * (entropy * power))


def _gradient_of_sigmoid_focal_loss(input: Tensor, target: Tensor, *numbers: Any) -> Gradients:
    p, entropy, factor, power, slope = _parts_of_focal_loss(input, target, *numbers)
    _, gamma, ignored = numbers
    slope = factor * (power * (p - target) + gamma * entropy * slope * (1 - 2 * target))
    return torch.where(target == ignored, 0, slope), None


SIGMOID_FOCAL_LOSS = PointwiseLoss(
    name="sigmoid_focal_loss",
    module="SigmoidFocalLoss",
    choices=("reduction",),
    operands=(
        Operand("inputs"),
        Operand("targets", low=0.0, high=1.0, differentiated=False),
        WEIGHT,
    ),
    numbers=(
        Scalar("alpha", high=1.0),
        Scalar("gamma", low=0.0, special=(2.0,)),
        Scalar("ignore_index", optional=True, compared_with="targets"),
    ),
    denominators={"mean": _counted_elements},
    reads_values=True,
    torch=definitions.sigmoid_focal_loss,
    reason=_differ_in_shape,
    formula=_sigmoid_focal_loss,
    gradient=_gradient_of_sigmoid_focal_loss,
)

# ---- activations ---------------------------------------------------------------------------------

RELU = Activation(
    name="relu",
    module="ReLU",
    saves="output",
    gradient=lambda grad_output, output: torch.ops.aten.threshold_backward(grad_output, output, 0),
    formula=lambda input: torch.where(input < 0, 0, input),
)

LEAKY_RELU = Activation(
    name="leaky_relu",
    module="LeakyReLU",
    numbers=(Scalar("negative_slope", low=0.0),),
    formula=lambda input, slope: torch.where(input > 0, input, slope * input),
    gradient=lambda grad_output, output, slope: torch.where(
        output > 0, grad_output, slope * grad_output
    ),
)

SIGMOID = Activation(
    name="sigmoid",
    module="Sigmoid",
    saves="output",
    gradient=lambda grad_output, output: torch.ops.aten.sigmoid_backward(grad_output, output),
    formula=torch.sigmoid,
)

TANH = Activation(
    name="tanh",
    module="Tanh",
    saves="output",
    gradient=lambda grad_output, output: torch.ops.aten.tanh_backward(grad_output, output),
    formula=torch.tanh,
)

SOFTCAP = Activation(
    name="softcap",
    module="Softcap",
    torch=lambda input, options: definitions.softcap(input, options.cap),
    numbers=(Scalar("cap", positive=True),),
    formula=lambda input, cap: cap * (input / cap).tanh(),
    gradient=lambda grad_output, input, cap: grad_output * (1 - (input / cap).tanh() ** 2),
)


def _gradient_of_silu(grad_output: Tensor, input: Tensor) -> Tensor:
    y = input.sigmoid()
    return grad_output * (y * (1 + input * (1 - y)))


SILU = Activation(
    name="silu",
    module="SiLU",
    formula=lambda input: input * input.sigmoid(),
    gradient=_gradient_of_silu,
)


def _cdf(x: Tensor, approximate: str) -> Tensor:
    """Returns the normal distribution, or (1 + tanh(u)) / 2 = sigmoid(2 u)."""
    if approximate == "none":
        below: Tensor = torch.special.ndtr(x)
        return below
    return (_TWICE * (x + 0.044715 * x * x * x)).sigmoid()


def _sigmoid_and_slope(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns y = sigmoid(x) and its derivative y (1 - y)."""
    e = (-x.abs()).exp()
    d = 1 / (1 + e)
    return torch.where(x < 0, e * d, d), e * d * d


def _gradient_of_gelu(grad_output: Tensor, input: Tensor, approximate: str) -> Tensor:
    if approximate == "none":
        below = _cdf(input, approximate)
        density = (input * input * -0.5).exp() * (1 / math.sqrt(2 * math.pi))
        return grad_output * (below + input * density)
    y, slope = _sigmoid_and_slope(_TWICE * (input + 0.044715 * input * input * input))
    slope = slope * (_TWICE * (1 + 0.134145 * input * input))
    return grad_output * (y + input * slope)


GELU = Activation(
    name="gelu",
    module="GELU",
    torch=lambda input, options: F.gelu(input, approximate=options.approximate),
    choices=(APPROXIMATE,),
    formula=lambda input, approximate: input * _cdf(input, approximate),
    gradient=_gradient_of_gelu,
)

# ---- further smooth activations ------------------------------------------------------------------

ELU = Activation(
    name="elu",
    module="ELU",
    numbers=(Scalar("alpha"),),
    formula=lambda input, alpha: torch.where(input < 0, alpha * input.expm1(), input),
    gradient=lambda grad_output, input, alpha: torch.where(
        input > 0, grad_output, grad_output * (alpha * input.exp())
    ),
)

_SELU_SCALE = 1.0507009873554804934193349852946
_SELU_ALPHA = 1.6732632423543772848170429916717 * _SELU_SCALE

SELU = Activation(
    name="selu",
    module="SELU",
    formula=lambda input: torch.where(input < 0, _SELU_ALPHA * input.expm1(), _SELU_SCALE * input),
    gradient=lambda grad_output, input: (
        grad_output * torch.where(input > 0, _SELU_SCALE, _SELU_ALPHA * input.exp())
    ),
)

CELU = Activation(
    name="celu",
    module="CELU",
    numbers=(Scalar("alpha", positive=True),),
    formula=lambda input, alpha: torch.where(input < 0, alpha * (input / alpha).expm1(), input),
    gradient=lambda grad_output, input, alpha: torch.where(
        input > 0, grad_output, grad_output * (input / alpha).exp()
    ),
)


def _parts_of_mish(input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With e = exp(x): e, n = e (e + 2), and tanh(softplus(x)) = n / (n + 2)."""
    e = input.clamp(max=25).exp()
    n = e * (e + 2)
    return e, n, n / (n + 2)


def _gradient_of_mish(grad_output: Tensor, input: Tensor) -> Tensor:
    e, n, t = _parts_of_mish(input)
    rest = torch.where(input > 25, 0, 2 / (n + 2))  # 1 - t
    return grad_output * (t + input * (e / (1 + e) * (rest * (1 + t))))


MISH = Activation(
    name="mish",
    module="Mish",
    formula=lambda input: input * _parts_of_mish(input)[2],
    gradient=_gradient_of_mish,
)

SOFTPLUS = Activation(
    name="softplus",
    module="Softplus",
    numbers=(Scalar("beta"), Scalar("threshold")),
    formula=lambda input, beta, threshold: torch.where(
        input * beta > threshold, input, _softplus(input * beta) / beta
    ),
    gradient=lambda grad_output, input, beta, threshold: torch.where(
        input * beta > threshold, grad_output, grad_output * (input * beta).sigmoid()
    ),
)

LOGSIGMOID = Activation(
    name="logsigmoid",
    module="LogSigmoid",
    contiguous=True,
    formula=lambda input: 0 - _softplus(-input),  # 0.0 rather than -0.0 at infinity
    gradient=lambda grad_output, input: grad_output * (-input).sigmoid(),
)

SOFTSIGN = Activation(
    name="softsign",
    module="Softsign",
    formula=lambda input: input / (1 + input.abs()),
)

TANHSHRINK = Activation(
    name="tanhshrink",
    module="Tanhshrink",
    formula=lambda input: input - input.tanh(),
)

# ---- gated activations: act(gate) * up -----------------------------------------------------------


GATED = (Operand("gate"), Operand("up"))

SWIGLU = PointwiseLoss(
    family="Gated",
    reduces=False,
    name="swiglu",
    module="SwiGLU",
    operands=GATED,
    formula=lambda gate, up: gate * gate.sigmoid() * up,
    torch=lambda gate, up, _: F.silu(gate) * up,
    gradient=lambda gate, up: (_gradient_of_silu(up, gate), gate * gate.sigmoid()),
)

GEGLU = PointwiseLoss(
    family="Gated",
    reduces=False,
    name="geglu",
    module="GEGLU",
    operands=GATED,
    choices=(APPROXIMATE,),
    formula=lambda gate, up, approximate: gate * _cdf(gate, approximate) * up,
    torch=lambda gate, up, options: F.gelu(gate, approximate=options.approximate) * up,
    gradient=lambda gate, up, approximate: (
        _gradient_of_gelu(up, gate, approximate),
        gate * _cdf(gate, approximate),
    ),
)

REGLU = PointwiseLoss(
    family="Gated",
    reduces=False,
    name="reglu",
    module="ReGLU",
    operands=GATED,
    formula=lambda gate, up: torch.where(gate < 0, 0, gate) * up,
    torch=lambda gate, up, _: torch.relu(gate) * up,
    gradient=lambda gate, up: (torch.where(gate <= 0, 0, up), torch.where(gate < 0, 0, gate)),
)

OPERATORS = tuple([value for value in globals().values() if isinstance(value, Operator)])


def kernels() -> dict[str, Kernel]:
    """Returns the kernels of all formulas by name."""
    formulas = [op for op in OPERATORS if isinstance(op, (Activation, PointwiseLoss))]
    return {name: kernel for op in formulas for name, kernel in op.kernels.items()}
