"""What a call is made of: options, and tensors that belong together; every layer passes them on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]  # one for each operand
Kernels = tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]  # and backward's
Reduction = Literal["none", "mean", "sum"]
ReductionOfKlDiv = Literal["none", "mean", "sum", "batchmean"]
Approximate = Literal["none", "tanh"]
MarginKind = Literal["cosface", "arcface"]
Remainder = Literal["bucket", "ignore"]


NONNEGATIVE, POSITIVE = {"positive": False}, {"positive": True}  # of numbers; `checks` looks here


@dataclass(frozen=True)
class TensorSpec:
    """What a plan may know of a tensor: its layout, and nothing of its values.

    The attributes are those of a tensor, so that checks take either.

    Attributes:
        is_leaf_or_view: Known of an input that a call is to overwrite, None of any other tensor.
    """

    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]
    device: torch.device
    requires_grad: bool
    is_leaf_or_view: bool | None = None

    @property
    def is_cpu(self) -> bool:
        return self.device.type == "cpu"

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def is_meta(self) -> bool:
        return self.device.type == "meta"

    def __len__(self) -> int:
        return self.shape[0]

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return self.shape.numel()

    def stride(self) -> tuple[int, ...]:
        return self.strides

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def is_contiguous(self) -> bool:
        return self.empty().is_contiguous()

    def to(self, dtype: torch.dtype) -> TensorSpec:
        return replace(self, dtype=dtype)

    def empty(self) -> Tensor:
        """Returns a tensor of this layout without memory."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="meta")


TENSORS: Any = (Tensor, TensorSpec)


@dataclass(eq=False)
class Options:
    def values(self) -> tuple[Any, ...]:
        """Returns the fields' values, in their order."""
        return tuple([getattr(self, name) for name in self.__dataclass_fields__])

    def tensors(self) -> dict[str, Tensor]:
        """Returns the fields that hold tensors, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, TENSORS)}


@dataclass(eq=False)
class VocabOptions(Options):
    """The options that all functions of a vocabulary have, built once from a call's keywords.

    The custom operators that torch.compile sees take the fields as their arguments. A function that
    lacks one of these options leaves it at its default.

    Attributes:
        ignore_index: The target of rows that count for nothing.
        reduction: Of the losses of all rows, or tokens.
        token_weight: What each loss is multiplied by, None for ones.
        denominator: What a mean divides by; None for the weight of the targets that count.
        softcap: The logits are softcap * tanh(logits / softcap); None for no such bound.
        temperature: What the logits are divided by after that.
    """

    ignore_index: int = -100
    reduction: str = "mean"
    token_weight: Tensor | None = None
    denominator: float | Tensor | None = field(default=None, metadata=POSITIVE)
    softcap: float | None = field(default=None, metadata=POSITIVE)
    temperature: float = field(default=1.0, metadata=POSITIVE)

    @property
    def rows(self) -> RowOptions:
        return RowOptions(self.ignore_index, 1 / self.temperature, self.softcap)


@dataclass(eq=False)
class CrossEntropyOptions(VocabOptions):
    """The arguments of cross-entropy beside its tensors.

    Attributes:
        scale: What the logits are multiplied by, as a temperature divides them.
        loss_dtype: That of the loss; None for torch's.
        with_metrics: The call returns a tuple of the loss and the metrics of each target.
    """

    label_smoothing: float = 0.0
    gamma: float = field(default=0.0, metadata=NONNEGATIVE)
    z_loss: float = field(default=0.0, metadata=NONNEGATIVE)
    scale: float = field(default=1.0, metadata=POSITIVE)
    loss_dtype: torch.dtype | None = None
    with_metrics: bool = False

    @property
    def rows(self) -> RowOptions:
        return RowOptions(self.ignore_index, self.scale / self.temperature, self.softcap)

    def is_plain(self) -> bool:
        """Returns whether torch's function of this name has all that is asked for."""
        return (
            self.gamma == self.z_loss == 0
            and self.scale == self.temperature == 1
            and self.softcap is None
            and self.token_weight is None
            and self.denominator is None
            and self.loss_dtype is None
            and not self.with_metrics
        )


@dataclass(eq=False)
class HeadOptions(CrossEntropyOptions):
    """Options of cross-entropy of a linear layer's output.

    Attributes:
        memory_budget: Bytes for the logits that exist at once; None for the default.
        filter_eps: Below which gradients of logits are left out of products.
    """

    memory_budget: int | None = None
    filter_eps: float = field(default=0.0, metadata=NONNEGATIVE)


@dataclass(eq=False)
class LogProbsOptions(VocabOptions):
    """Options of log-probabilities.

    Attributes:
        alone: The result is the log-probabilities alone, without entropy and log-sum-exp.
        memory_budget: Bytes for the logits that exist at once; None for the default.
        deterministic_rows: Logits come from matrix products of one size.
    """

    reduction: str = "none"
    alone: bool = False
    memory_budget: int | None = None
    deterministic_rows: bool = False


@dataclass(eq=False)
class DivergenceOptions(VocabOptions):
    """Options of a student's divergence from a teacher.

    Attributes:
        teacher_softcap: As the softcap, of the teacher's logits.
        memory_budget: Bytes for the logits of both that exist at once; None for the default.
        remainder: What is made of the probability outside of a teacher's top k.
    """

    beta: float = 0.0
    teacher_softcap: float | None = field(default=None, metadata=POSITIVE)
    memory_budget: int | None = None
    remainder: str = "bucket"

    def __post_init__(self) -> None:
        if isinstance(self.token_weight, Tensor) and not self.token_weight.is_floating_point():
            self.token_weight = self.token_weight.to(torch.float32)  # a mask


class RowOptions(NamedTuple):
    """How a row of logits is read, and which targets count.

    Attributes:
        ignore_index: The target of rows whose state and gradient are 0.
        scale: What the logits are multiplied by.
        softcap: The logits are softcap * tanh(logits / softcap) before that; None for no bound.
    """

    ignore_index: int = -100
    scale: float = 1.0
    softcap: float | None = None


# The fields of the state of a row of logits, in float64; csrc/row_state.h says what they are. A
# state has the first STATE_FIELDS, or METRICS_FIELDS, or all SMOOTHING_FIELDS.
LOG_P, ENTROPY, LSE, PIVOT, SUM, WEIGHTED, TARGET_LOGIT, MAXIMUM, INDEX, SMOOTH = range(10)
STATE_FIELDS, METRICS_FIELDS, SMOOTHING_FIELDS = MAXIMUM, SMOOTH, SMOOTH + 1
# What has a gradient: the first three fields, and SMOOTH.
RESULTS = (LOG_P, ENTROPY, LSE)


class ClassRange(NamedTuple):
    """The logits' classes among all classes.

    Attributes:
        first: The first of them.
        total: The number of all classes.
    """

    first: int
    total: int


class VocabShard(NamedTuple):
    """The classes that this process has, of those that a group of processes has together.

    Processes may have different numbers of classes, or none. They exchange three numbers for each
    row of logits, which are not gathered: the largest logit, the sum of exponentials, and the
    target's logit; another with label smoothing; another for log-probabilities or metrics, and for
    metrics each process sends two more to the others. The gradient of logits takes none.

    Before that, each call gathers seven numbers from each process, which synchronises a GPU. All
    processes raise the same error if shards overlap, leave gaps or exceed the classes, or if the
    targets, options or shapes differ. If one process refuses its own arguments, the others raise,
    too. DTensors skip this exchange, as their placements are the same in every process.

    If anything requires grad in one process, the result requires grad in all of them, and all have
    to call backward. With ``create_graph=True`` gradients are computed in torch's terms, from all
    logits of a process in float64, and can be differentiated any number of times. Each of these
    passes communicates, so that every process of the group takes part.

    Attributes:
        first: The first of this process' classes among all.
        classes: The number of all classes. None adds up those of the processes.
        group: A process group of :mod:`torch.distributed`; None for all processes.
    """

    first: int
    classes: int | None = None
    group: Any = None


class FusedOptions(TypedDict, total=False):
    """The keywords beyond torch's of every kind of cross-entropy, as modules pass them on."""

    z_loss: float
    scale: float
    softcap: float | None
    temperature: float
    token_weight: Tensor | None
    denominator: float | Tensor | None
    loss_dtype: torch.dtype | None


class ModuleOptions(FusedOptions, total=False):
    """Keyword arguments of a module, whose logits may be those of some classes."""

    shard: VocabShard | None


class NllOptions(NamedTuple):
    """Options of the negative log-likelihood."""

    ignore_index: int
    reduction: str


class MarginOptions(NamedTuple):
    """Options of the multi-class margin loss."""

    p: int
    margin: float
    reduction: str


class EmbeddingOptions(NamedTuple):
    """Options of losses of embeddings.

    Attributes:
        euclidean: Distances are those of p = 2, and not of p = 1.
    """

    margin: float
    eps: float = 0.0
    euclidean: bool = True
    swap: bool = False


class Outputs(NamedTuple):
    """The outputs that a call of a loss kernel computes.

    Attributes:
        gradients: Of each operand, or () for none.
        inplace: Cross-entropy's first gradient takes the input's memory.
    """

    loss: bool = True
    gradients: tuple[bool, ...] = ()
    inplace: bool = False


class Head(NamedTuple):
    """A linear layer, its input, and the targets of its logits.

    Attributes:
        input: (..., D); the kernels take (N, D).
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

    @property
    def columns(self) -> int:
        return self.linear_weight[..., 0].numel()

    def as_rows(self, options: HeadOptions) -> tuple[Head, HeadOptions]:
        """Returns inputs (..., D), and what goes with them, as rows (N, D)."""
        input, target, token_weight = self.input, self.target, options.token_weight
        if input.dim() == 2:
            return self, options
        rows, positions = input.shape[:-1].numel(), self.linear_weight.shape[1:-1]
        classes = self.linear_weight.shape[: target.is_floating_point()]
        head = self._replace(
            input=input.reshape(rows, -1), target=target.reshape(rows, *classes, *positions)
        )
        if token_weight is not None:
            options = replace(options, token_weight=token_weight.reshape(rows, *positions))
        return head, options

    def takes_blocks(self) -> bool:
        """Returns whether the logits can be computed for some classes at a time."""
        return self.linear_weight.dim() == 2 and not self.target.is_floating_point()
