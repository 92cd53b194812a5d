"""The operators, each declared once. What is known of one, here or in tests, is asked of these."""

from __future__ import annotations

import torch
from torch import Tensor

from pyfused import checks
from pyfused.ops.activation import Activation
from pyfused.ops.cross_entropy import CrossEntropy
from pyfused.ops.declaration import Operand, Operator, Parameter
from pyfused.ops.pointwise_loss import PointwiseLoss, weight_or_elements

INPUT, TARGET = Operand("input"), Operand("target")
WEIGHT = Operand("weight", low=0.0, differentiated=False, optional=True)

# ---- losses over classes -------------------------------------------------------------------------

CROSS_ENTROPY = CrossEntropy(
    name="cross_entropy",
    module="CrossEntropyLoss",
    operands=(INPUT, Operand("target", indices=True), WEIGHT),
    against=lambda input, *_: "one class" if input.dim() > 1 and input.shape[1] == 1 else None,
)

# ---- pointwise losses ----------------------------------------------------------------------------

MSE_LOSS = PointwiseLoss(
    name="mse_loss",
    module="MSELoss",
    operands=(INPUT, TARGET, WEIGHT),
    weight_shape=checks.weight_of_inputs_shape,
    denominators={"mean": weight_or_elements},
)

SMOOTH_L1_LOSS = PointwiseLoss(
    name="smooth_l1_loss",
    module="SmoothL1Loss",
    operands=(INPUT, TARGET),
    parameters=(Parameter("beta", low=0.0),),
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
    parameters=(Parameter("full", flag=True), Parameter("eps")),
    shapes=checks.mean_and_variance,
    warns=False,
    arrange=_as_gaussian_nll_loss_has_it,
)

# ---- activations ---------------------------------------------------------------------------------

RELU = Activation(
    name="relu",
    module="ReLU",
    gradient=lambda grad_output, output: torch.ops.aten.threshold_backward(grad_output, output, 0),
)

SIGMOID = Activation(
    name="sigmoid",
    module="Sigmoid",
    gradient=lambda grad_output, output: torch.ops.aten.sigmoid_backward(grad_output, output),
)

OPERATORS: dict[str, Operator] = {
    op.name: op
    for op in (
        CROSS_ENTROPY,
        MSE_LOSS,
        SMOOTH_L1_LOSS,
        BINARY_CROSS_ENTROPY_WITH_LOGITS,
        GAUSSIAN_NLL_LOSS,
        RELU,
        SIGMOID,
    )
}
