"""The table of operators, and the declarations of all operators that are not elementwise."""

from __future__ import annotations

from pyfused import checks
from pyfused.dispatch.operator import FACTORS, Operand, Operator
from pyfused.dispatch.originals import F
from pyfused.dispatch.sizes import set_least
from pyfused.ops import definitions, distillation, elementwise
from pyfused.ops.cross_entropy import (
    CrossEntropy,
    CrossEntropyLoss,
    HeadCrossEntropyLoss,
    NllLoss,
    cross_entropy_pass,
    cross_entropy_reason,
    extends_head_of_torch,
    head_reason,
    linear_cross_entropy_pass,
    linear_cross_entropy_reason,
    nll_loss_pass,
    nll_loss_reason,
)
from pyfused.ops.custom_operators import CustomOperator
from pyfused.ops.distillation import (
    DivergenceLoss,
    TopKLoss,
    divergence_pass,
    linear_divergence_pass,
)
from pyfused.ops.elementwise import INPUT
from pyfused.ops.embedding import EmbeddingLoss, cosine_reason, triplet_reason
from pyfused.ops.log_probs import LogProbsLoss, log_probs_pass
from pyfused.ops.rows import RowLoss, RowOperator
from pyfused.ops.softmax import Softmax
from pyfused.types import Choice, CrossEntropyOptions, DivergenceOptions, LogProbsOptions, Scalar

CLASSES = Operand("target", differentiated=False, indices=True)
WEIGHT = elementwise.WEIGHT._replace(has_rows=False)
HEAD = (
    INPUT,
    Operand("linear_weight", has_rows=False),
    Operand("linear_bias", optional=True, has_rows=False),
)

# ---- losses over classes -------------------------------------------------------------------------

CROSS_ENTROPY = CrossEntropy(
    name="cross_entropy",
    module="CrossEntropyLoss",
    check_shapes=checks.cross_entropy,
    operands=(INPUT, Operand("target", indices=True), WEIGHT),
    options=CrossEntropyOptions,
    factors=FACTORS,
    loss=CrossEntropyLoss(),
    choose_pass=cross_entropy_pass,
    reason=cross_entropy_reason,
    torch=definitions.cross_entropy,
    extends_torch=lambda _x, _y, _w, token_weight, denominator, options: (
        not (token_weight is denominator is None and options.is_plain())
    ),
    reference=definitions.masked_cross_entropy,
)

LINEAR_CROSS_ENTROPY = RowOperator(
    name="linear_cross_entropy",
    module="LinearCrossEntropyLoss",
    check_shapes=checks.linear_cross_entropy,
    operands=(*HEAD, Operand("target", indices=True), WEIGHT),
    options=CrossEntropyOptions,
    factors=FACTORS,
    flattens=True,
    loss=HeadCrossEntropyLoss(),
    choose_pass=linear_cross_entropy_pass,
    reason=linear_cross_entropy_reason,
    torch=definitions.linear_cross_entropy,
    extends_torch=extends_head_of_torch,
    reference=definitions.head_cross_entropy,
)

LOG_PROBS = RowOperator(
    name="log_probs",
    module="LogProbs",
    check_shapes=checks.log_probs,
    operands=(Operand("logits"), CLASSES),
    options=LogProbsOptions,
    loss=LogProbsLoss(),
    choose_pass=log_probs_pass,
    torch=definitions.log_probs,
)

LINEAR_LOG_PROBS = RowOperator(
    name="linear_log_probs",
    module="LinearLogProbs",
    check_shapes=checks.linear_log_probs,
    operands=(*HEAD, CLASSES),
    options=LogProbsOptions,
    loss=LogProbsLoss(),
    choose_pass=log_probs_pass,
    reason=head_reason,
    torch=definitions.linear_log_probs,
)

NLL_LOSS = NllLoss(
    name="nll_loss",
    module="NLLLoss",
    check_shapes=checks.nll_loss,
    operands=(INPUT, CLASSES, WEIGHT),
    choices=("ignore_index", "reduction"),
    loss=RowLoss(),
    choose_pass=nll_loss_pass,
    torch=lambda x, y, weight, options: F.nll_loss(
        x, y, weight, None, options.ignore_index, None, options.reduction
    ),
    reason=nll_loss_reason,
)


# ---- losses of embeddings ------------------------------------------------------------------------

TRIPLET_MARGIN_LOSS = EmbeddingLoss(
    name="triplet_margin_loss",
    module="TripletMarginLoss",
    operands=(
        Operand("anchor"),
        Operand("positive"),
        Operand("negative"),
    ),
    numbers=(
        Scalar("margin", positive=True),
        Scalar("p", special=(1.0, 2.0)),
        Scalar("eps"),
    ),
    choices=(Choice("swap", (False, True)), "reduction"),
    torch=lambda a, p, n, options: F.triplet_margin_loss(
        a, p, n, *options[:-1], None, None, options.reduction
    ),
    reason=triplet_reason,
)

COSINE_EMBEDDING_LOSS = EmbeddingLoss(
    name="cosine_embedding_loss",
    module="CosineEmbeddingLoss",
    operands=(
        Operand("input1"),
        Operand("input2"),
        CLASSES._replace(sign=True),
    ),
    numbers=(Scalar("margin"),),
    choices=("reduction",),
    torch=lambda x1, x2, y, options: F.cosine_embedding_loss(
        x1, x2, y, options.margin, None, None, options.reduction
    ),
    reason=cosine_reason,
)

# ---- distillation --------------------------------------------------------------------------------

KL_DIV_WITH_LOGITS = RowOperator(
    name="kl_div_with_logits",
    module="KLDivWithLogitsLoss",
    check_shapes=checks.kl_div_with_logits,
    operands=(Operand("logits"), Operand("teacher_logits", differentiated=False)),
    options=DivergenceOptions,
    factors=FACTORS,
    flattens=True,
    loss=DivergenceLoss(),
    choose_pass=divergence_pass,
    torch=distillation.kl_div_with_logits,
)

LINEAR_KL_DIV = RowOperator(
    name="linear_kl_div",
    module="LinearKLDivLoss",
    check_shapes=checks.linear_kl_div,
    operands=(
        *HEAD,
        Operand("teacher_input", differentiated=False),
        Operand("teacher_linear_weight", differentiated=False, has_rows=False),
        Operand("teacher_linear_bias", differentiated=False, optional=True, has_rows=False),
    ),
    options=DivergenceOptions,
    factors=FACTORS,
    flattens=True,
    loss=DivergenceLoss(),
    choose_pass=linear_divergence_pass,
    torch=distillation.linear_kl_div,
)

LINEAR_TOPK_KL_DIV = RowOperator(
    name="linear_topk_kl_div",
    module="LinearTopKKLDivLoss",
    check_shapes=checks.linear_topk_kl_div,
    operands=(
        *HEAD,
        Operand("teacher_indices", differentiated=False, indices=True),
        Operand("teacher_log_probs", high=0.0, differentiated=False),
    ),
    options=DivergenceOptions,
    factors=FACTORS,
    flattens=True,
    loss=TopKLoss(),
    choose_pass=linear_divergence_pass,
    torch=distillation.linear_topk_kl_div,
)

# ---- along one dimension -------------------------------------------------------------------------

SOFTMAX = Softmax(name="softmax", module="Softmax")
LOG_SOFTMAX = Softmax(name="log_softmax", module="LogSoftmax")

# ---- heads in compiled programs ------------------------------------------------------------------

for _head in (LINEAR_CROSS_ENTROPY, LINEAR_LOG_PROBS, LINEAR_KL_DIV, LINEAR_TOPK_KL_DIV):
    CustomOperator(_head)

_declared = [value for value in globals().values() if isinstance(value, Operator)]
OPERATORS: dict[str, Operator] = {op.name: op for op in (*_declared, *elementwise.OPERATORS)}
for _op in OPERATORS.values():
    set_least(_op)
