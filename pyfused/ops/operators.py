"""The operators, each declared once. What is known of one, here or in tests, is asked of these."""

from __future__ import annotations

import torch

from pyfused import checks
from pyfused.ops.activation import Activation
from pyfused.ops.cross_entropy import CrossEntropy
from pyfused.ops.declaration import Operand, Operator
from pyfused.ops.pointwise_loss import PointwiseLoss, weight_or_elements

INPUT, TARGET = Operand("input"), Operand("target")
WEIGHT = Operand("weight", low=0.0, differentiated=False, optional=True)

# ---- losses over classes -------------------------------------------------------------------------

CROSS_ENTROPY = CrossEntropy(
    name="cross_entropy",
    module="CrossEntropyLoss",
    operands=(INPUT, Operand("target", indices=True), WEIGHT),
    against=lambda input, *_: "one class" if input.shape[1:2] == (1,) else None,
)

# ---- pointwise losses ----------------------------------------------------------------------------

MSE_LOSS = PointwiseLoss(
    name="mse_loss",
    module="MSELoss",
    operands=(INPUT, TARGET, WEIGHT),
    weight_shape=checks.weight_of_inputs_shape,
    denominators={"mean": weight_or_elements},
)

# ---- activations ---------------------------------------------------------------------------------

RELU = Activation(
    name="relu",
    module="ReLU",
    gradient=lambda grad_output, output: torch.ops.aten.threshold_backward(grad_output, output, 0),
)

OPERATORS: dict[str, Operator] = {op.name: op for op in (CROSS_ENTROPY, MSE_LOSS, RELU)}
