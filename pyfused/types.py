"""Types of options, kernel arguments and results that all layers of the package share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]  # one for each operand
Reduction = Literal["none", "mean", "sum"]
ReductionOfKlDiv = Literal["none", "mean", "sum", "batchmean"]
Approximate = Literal["none", "tanh"]
MarginKind = Literal["cosface", "arcface"]
Remainder = Literal["bucket", "ignore"]


class Number(Enum):
    """Stands for the numbers that a kernel takes as parameters; others have their own kernels."""

    NUMBER = "number"
    __hash__ = object.__hash__  # Enum's is a Python function

    def __repr__(self) -> str:
        return "NUMBER"


NUMBER = Number.NUMBER


class Scalar(NamedTuple):
    """A numeric option of a call.

    Attributes:
        low, high: The bounds of valid values, inclusive.
        positive: Whether 0 is excluded.
        clamped: Whether values below ``low``, and NaN, count as ``low``.
        optional: Whether it may be None, which kernels of formulas receive as NaN.
        special: Values with their own, faster kernels.
        compared_with: The operand that it is compared with; like torch, kernels first round it to
            the operand's dtype.
    """

    name: str
    low: float = -math.inf
    high: float = math.inf
    positive: bool = False
    clamped: bool = False
    optional: bool = False
    special: tuple[float, ...] = ()
    compared_with: str | None = None

    @property
    def has_bounds(self) -> bool:
        return self.positive or self.low > -math.inf or self.high < math.inf

    def expected(self) -> str:
        """Describes the valid values."""
        if self.positive:
            return "a positive number"
        if self.high == math.inf:
            return f"a number of at least {self.low}"
        if self.low == -math.inf:
            return f"a number of at most {self.high}"
        return f"a number in [{self.low}, {self.high}]"

    @property
    def cases(self) -> tuple[Any, ...]:
        """The values that have their own kernel; NUMBER stands for all others."""
        return NUMBER, *self.special


class Choice(NamedTuple):
    """An option that is not a number, such as the reduction.

    Attributes:
        values: The values that have their own kernel of a formula; () if all share one.
        of_torch: Whether it is an option of torch's function, which kernels ignore.
    """

    name: str
    values: tuple[Any, ...] = ()
    of_torch: bool = False


# The numeric options of functions over a vocabulary.
OPTIONS = {
    scalar.name: scalar
    for scalar in (
        Scalar("denominator", positive=True, optional=True),
        Scalar("softcap", positive=True, optional=True),
        Scalar("temperature", positive=True, special=(1.0,)),
        Scalar("label_smoothing", low=0.0, high=1.0, clamped=True, special=(0.0,)),
        Scalar("gamma", low=0.0, special=(0.0,)),
        Scalar("z_loss", low=0.0, special=(0.0,)),
        Scalar("scale", positive=True, special=(1.0,)),
        Scalar("beta", low=0.0, high=1.0, special=(0.0, 1.0)),
        Scalar("teacher_softcap", positive=True, optional=True),
    )
}

# The options of a call over a vocabulary, one class for each family, floats first. The fields are
# arguments of the custom operators.


class RowOptions(NamedTuple):
    """Options of the state of rows.

    Attributes:
        softcap: Replaces the logits with softcap * tanh(logits / softcap); None for no cap.
        scale: The factor of the logits, after the softcap.
        ignore_index: The target of rows that are ignored.
    """

    softcap: float | None = None
    scale: float = 1.0
    ignore_index: int = -100


class CrossEntropyOptions(NamedTuple):
    """Options of cross-entropy, of logits or of a linear layer's output.

    Attributes:
        denominator: The divisor of a mean, unless a tensor is passed; None for the total weight of
            the valid targets.
        softcap, scale, ignore_index: As in `RowOptions`.
        temperature: The divisor of the logits, after the softcap.
        reduction: The reduction over rows (tokens): "none", "mean" or "sum".
        memory_budget: Bytes for the logits in memory at once, None for the default.
        loss_dtype: The dtype of the loss, None for torch's.
        with_metrics: Whether the call returns a tuple of the loss and the metrics of each target.
        with_prediction: Whether a call of a layer returns a `heads.HeadResult`.
        torch_options: The options of torch's linear_cross_entropy, which kernels ignore.
    """

    denominator: float | None = None
    softcap: float | None = None
    temperature: float = 1.0
    gamma: float = 0.0
    z_loss: float = 0.0
    scale: float = 1.0
    label_smoothing: float = 0.0
    ignore_index: int = -100
    reduction: str = "mean"
    memory_budget: int | None = None
    loss_dtype: torch.dtype | None = None
    with_metrics: bool = False
    with_prediction: bool = False
    torch_options: Any = None

    def row_options(self) -> RowOptions:
        """Returns the options of row states, whose scale includes the temperature."""
        return RowOptions(self.softcap, self.scale / self.temperature, self.ignore_index)

    def is_plain(self) -> bool:
        """Returns whether torch's function supports these options; it has none that are tensors."""
        numbers = self.temperature, self.scale, self.gamma, self.z_loss
        return (
            self.denominator is self.softcap is None is self.loss_dtype
            and not self.with_metrics
            and _NUMBERS.issuperset(map(type, numbers))
            and numbers == (1, 1, 0, 0)
        )


_NUMBERS = frozenset((float, int))


class LogProbsOptions(NamedTuple):
    """Options of log-probabilities.

    Attributes:
        softcap, temperature, ignore_index, memory_budget: As in `CrossEntropyOptions`.
        alone: Whether only the log-probabilities are returned, without entropy and log-sum-exp.
        with_metrics: Whether the call returns a tuple of these and the metrics of each target.
    """

    softcap: float | None = None
    temperature: float = 1.0
    ignore_index: int = -100
    memory_budget: int | None = None
    alone: bool = False
    with_metrics: bool = False


class DivergenceOptions(NamedTuple):
    """Options of a student's divergence from a teacher.

    Attributes:
        denominator, softcap, temperature, reduction, memory_budget: As in `CrossEntropyOptions`.
        beta: The weight of the teacher in the mixture of a generalised Jensen-Shannon divergence;
            0 for KL(teacher || student), 1 for KL(student || teacher).
        teacher_softcap: The softcap of the teacher's logits.
        remainder: "bucket" treats the classes outside the teacher's top k as one class, "ignore"
            drops them.
    """

    denominator: float | None = None
    softcap: float | None = None
    temperature: float = 1.0
    beta: float = 0.0
    teacher_softcap: float | None = None
    reduction: str = "mean"
    memory_budget: int | None = None
    remainder: str = "bucket"


# The fields of a row's state, in float64; csrc/row_state.h defines them. A state has the first
# STATE_FIELDS or METRICS_FIELDS fields, or all SMOOTHING_FIELDS.
LOG_P, ENTROPY, LSE, PIVOT, SUM, WEIGHTED, TARGET_LOGIT, MAXIMUM, INDEX, SMOOTH = range(10)
STATE_FIELDS, METRICS_FIELDS, SMOOTHING_FIELDS = MAXIMUM, SMOOTH, SMOOTH + 1
# The differentiable fields, in addition to SMOOTH.
RESULTS = (LOG_P, ENTROPY, LSE)
METRICS = (*RESULTS, INDEX)  # the fields that metrics are computed from


class ClassRange(NamedTuple):
    """The range of classes that logits cover.

    Attributes:
        first: The index of the first class.
        total: The number of all classes.
    """

    first: int
    total: int


@dataclass(eq=False)
class RowBlock:
    """Logits of some rows and of a range of classes, from which kernels compute row states.

    Attributes:
        logits: (N, C) with contiguous classes.
        target: Contiguous int64 indices into all classes, in range or ``ignore_index``; None if
            no target is in this range of classes. The state for other indices has NaN.
        weight: Contiguous weights of all classes, in the accumulation dtype, or None.
        options: The options; rows whose target is ``ignore_index`` have state and gradient 0.
        classes: The range of classes that the logits belong to.
    """

    logits: Tensor
    target: Tensor | None
    weight: Tensor | None
    options: RowOptions
    classes: ClassRange


class FusedOptions(TypedDict, total=False):
    """The keyword arguments that pyfused adds to every cross-entropy."""

    z_loss: float
    scale: float
    softcap: float | None
    temperature: float
    token_weight: Tensor | None
    denominator: float | Tensor | None
    loss_dtype: torch.dtype | None


class EmbeddingOptions(NamedTuple):
    """Options of losses over embeddings.

    Attributes:
        euclidean: Whether the norm of distances has exponent 2 rather than 1.
        swap: Whether the positive replaces the anchor if it is closer to the negative.
        inclusive: Whether the derivative of max(0, x) at 0 is 1 rather than 0.
    """

    euclidean: bool = True
    swap: bool = False
    inclusive: bool = True


class Outputs(NamedTuple):
    """The outputs that a loss kernel computes.

    Attributes:
        loss: Whether the loss is computed.
        gradients: Whether the gradient of each operand is computed; () for none.
        inplace: Whether the gradient of the input overwrites the input.
        loss_dtype: The dtype of the loss, None for the accumulation dtype, which a backend may
            return in any case.
    """

    loss: bool = True
    gradients: tuple[bool, ...] = ()
    inplace: bool = False
    loss_dtype: torch.dtype | None = None


outputs_of = lru_cache(maxsize=256)(Outputs)  # making a NamedTuple takes longer


class Head(NamedTuple):
    """A linear layer, its input, and the targets of its logits.

    Attributes:
        input: (..., D); kernels take two dimensions.
        linear_weight: (C, D), or (C, d1, ..., dk, D).
        linear_bias: (C), or (C, d1, ..., dk), or None.
        target: int64 class indices (...) or (..., d1, ..., dk), or probabilities of the logits'
            shape, (..., C) or (..., C, d1, ..., dk).
        weight: (C), or None.
    """

    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    target: Tensor
    weight: Tensor | None

    def as_rows(self, token_weight: Tensor | None) -> tuple[Head, Tensor | None]:
        """Flattens inputs (..., D) to rows (N, D), and targets and token weights accordingly."""
        input, target = self.input, self.target
        if input.dim() == 2:
            return self, token_weight
        rows, positions = math.prod(input.shape[:-1]), self.linear_weight.shape[1:-1]
        classes = self.linear_weight.shape[: target.is_floating_point()]
        head = self._replace(
            input=input.reshape(rows, input.shape[-1]),
            target=target.reshape(rows, *classes, *positions),
        )
        weight = None if token_weight is None else token_weight.reshape(rows, *positions)
        return head, weight
