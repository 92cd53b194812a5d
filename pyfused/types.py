"""The options of calls and groups of tensors that all layers of the package share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]  # one for each operand
Kernels = tuple[Callable[..., Tensor], Callable[..., Tensor]]  # forward, backward
Reduction = Literal["none", "mean", "sum"]
ReductionOfKlDiv = Literal["none", "mean", "sum", "batchmean"]
Approximate = Literal["none", "tanh"]
MarginKind = Literal["cosface", "arcface"]
Remainder = Literal["bucket", "ignore"]


class UnknownSizeError(AssertionError):
    """A plan depends on a size that it does not know."""


class UnknownSize:
    """Stands for a product of sizes in a plan, which cannot depend on it. It is more than 1."""

    def __eq__(self, other: object) -> bool:
        return False if type(other) is int and other <= 1 else self._unknown()

    def _unknown(self, *_: Any) -> Any:
        raise UnknownSizeError("a plan cannot depend on a dynamic size")

    __hash__ = object.__hash__
    __bool__ = __index__ = __lt__ = __le__ = __gt__ = __ge__ = _unknown
    __add__ = __sub__ = __floordiv__ = _unknown

    def __mul__(self, other: object) -> Any:
        return 0 if type(other) is int and other == 0 else UnknownSize()

    __rmul__ = __mul__

    def __repr__(self) -> str:
        return "any"


class DynamicSize(UnknownSize):
    """Stands for a size in a plan. Different sizes of a call have different objects.

    Attributes:
        stand_in: A size that no other dimension of the call has.
    """

    def __init__(self, stand_in: int = 0) -> None:
        self.stand_in = stand_in

    def __eq__(self, other: object) -> bool:
        return self is other if type(other) is DynamicSize else super().__eq__(other)

    __hash__ = object.__hash__


@dataclass(frozen=True)
class TensorSpec:
    """Describes a tensor without its values.

    It has a tensor's attributes, and checks accept either.

    Attributes:
        shape: A torch.Size, or a tuple with dynamic sizes.
        strides: The strides. None if the kernels read them, or if the tensor is contiguous.
    """

    dtype: torch.dtype
    shape: Any
    strides: tuple[int, ...] | None
    device: torch.device
    requires_grad: bool

    @property
    def dynamic_dims(self) -> int:
        """Returns the number of leading dimensions that include all dynamic sizes."""
        dims = [dim for dim, size in enumerate(self.shape, 1) if type(size) is DynamicSize]
        return max(dims, default=0)

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
        return int(self.shape[0])

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> Any:
        return math.prod(self.shape)

    def stride(self, dim: int | None = None) -> Any:
        strides = self.strides
        if strides is None:
            strides = tuple([math.prod(self.shape[i + 1 :]) for i in range(self.dim())])
        return strides if dim is None else strides[dim]

    def reshape(self, *shape: Any) -> TensorSpec:
        """Returns the spec of a tensor with another shape."""
        return replace(self, shape=shape, strides=None)

    def element_size(self) -> int:
        return self.dtype.itemsize

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def is_contiguous(self) -> bool:
        return self.strides is None or (not self.dynamic_dims and self.empty().is_contiguous())

    def to(self, dtype: torch.dtype) -> TensorSpec:
        return replace(self, dtype=dtype)

    def empty(self) -> Tensor:
        """Returns a meta tensor of this layout, whose dynamic sizes are their stand-ins."""
        if self.strides is None:
            shape = [x.stand_in if type(x) is DynamicSize else x for x in self.shape]
            return torch.empty(shape, dtype=self.dtype, device="meta")
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="meta")


TENSORS: Any = (Tensor, TensorSpec)


class Number:
    """Stands for a number of a call in its plan, which cannot depend on the number's value."""

    def __bool__(self) -> bool:
        raise AssertionError("a plan cannot depend on the value of a number")

    def __truediv__(self, _: Any) -> Number:
        return self

    __rtruediv__ = __truediv__

    def __repr__(self) -> str:
        return "NUMBER"


NUMBER = Number()


class Scalar(NamedTuple):
    """A number of a call, which users may also pass as a tensor of one element.

    Attributes:
        low, high: The bounds of valid values, inclusive.
        positive: Whether 0 is excluded.
        clamped: Whether values below ``low``, and NaN, count as ``low``.
        optional: Whether it may be None, which kernels of formulas receive as NaN.
        special: Values with their own, faster kernels.
        error: The type of the error for a number out of bounds.
    """

    name: str
    low: float = -math.inf
    high: float = math.inf
    positive: bool = False
    clamped: bool = False
    optional: bool = False
    special: tuple[float, ...] = ()
    error: type[Exception] = RuntimeError

    @property
    def cases(self) -> tuple[Any, ...]:
        """Returns the values that have their own kernel; NUMBER stands for all others."""
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
_option = partial(Scalar, error=ValueError)
OPTIONS = {
    scalar.name: scalar
    for scalar in (
        _option("denominator", positive=True, optional=True),
        _option("softcap", positive=True, optional=True),
        _option("temperature", positive=True, special=(1.0,)),
        Scalar("label_smoothing", low=0.0, high=1.0, clamped=True, special=(0.0,)),
        _option("gamma", low=0.0, special=(0.0,)),
        _option("z_loss", low=0.0, special=(0.0,)),
        _option("scale", positive=True, special=(1.0,)),
        _option("filter_eps", low=0.0, special=(0.0,)),
        _option("beta", low=0.0, high=1.0, special=(0.0, 1.0)),
        _option("teacher_softcap", positive=True, optional=True),
    )
}

# The options of a call over a vocabulary, one class for each family. Floats come first: they are
# arguments of a launch, and no part of a plan. The fields are arguments of the custom operators.


class RowOptions(NamedTuple):
    """Options of the state of rows.

    Attributes:
        softcap: Replaces the logits with softcap * tanh(logits / softcap); None for no cap.
        temperature: The divisor of the logits, after the softcap.
        ignore_index: The target of rows that are ignored.
    """

    softcap: float | None = None
    temperature: float = 1.0
    ignore_index: int = -100


class CrossEntropyOptions(NamedTuple):
    """Options of cross-entropy, of logits or of a linear layer's output.

    Attributes:
        denominator: The divisor of a mean, unless a tensor is passed; None for the total weight of
            the valid targets.
        softcap, temperature, ignore_index: As in `RowOptions`.
        scale: The factor of the logits, after the softcap.
        filter_eps: Matrix products of a head skip gradients of logits below this.
        reduction: The reduction over rows (tokens): "none", "mean" or "sum".
        memory_budget: Bytes for the logits in memory at once, None for the default.
        loss_dtype: The dtype of the loss, None for torch's.
        with_metrics: Whether the call returns a tuple of the loss and the metrics of each target;
            PREDICTION for a tuple of the loss and the prediction, which may be -1 if a logit of the
            row is not finite.
        inplace: Whether the gradient of the logits overwrites them.
        torch_options: The options of torch's linear_cross_entropy, which kernels ignore.
    """

    denominator: float | None = None
    softcap: float | None = None
    temperature: float = 1.0
    gamma: float = 0.0
    z_loss: float = 0.0
    scale: float = 1.0
    label_smoothing: float = 0.0
    filter_eps: float = 0.0
    ignore_index: int = -100
    reduction: str = "mean"
    memory_budget: int | None = None
    loss_dtype: torch.dtype | None = None
    with_metrics: bool | str = False
    inplace: bool = False
    torch_options: Any = None

    def of_rows(self) -> RowOptions:
        """Returns the options of row states, whose temperature includes the scale."""
        temperature = self.temperature / self.scale
        temperature = temperature if temperature != 0 else math.nan  # of an infinite scale
        return RowOptions(self.softcap, temperature, self.ignore_index)

    def is_plain(self) -> bool:
        """Returns whether torch's function supports these options.

        It does not support numbers in tensors, which may require grad.
        """
        numbers = self.temperature, self.scale, self.gamma, self.z_loss
        return (
            self.denominator is self.softcap is None is self.loss_dtype
            and not self.with_metrics
            and _NUMBERS.issuperset(map(type, numbers))
            and numbers == (1, 1, 0, 0)
        )


PREDICTION = "prediction"
_NUMBERS = frozenset((float, int))


class LogProbsOptions(NamedTuple):
    """Options of log-probabilities.

    Attributes:
        softcap, temperature, ignore_index: As in `RowOptions`.
        memory_budget: As in `CrossEntropyOptions`.
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
        denominator, reduction, memory_budget: As in `CrossEntropyOptions`.
        softcap, temperature: As in `RowOptions`.
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


class ClassRange(NamedTuple):
    """The range of classes that logits cover.

    Attributes:
        first: The index of the first class.
        total: The number of all classes.
    """

    first: int
    total: int


class VocabShard(NamedTuple):
    """The classes of this process, if a group of processes shards the vocabulary.

    Processes may have different numbers of classes, or none. Tensors have to be plain: pass
    ``dtensor.to_local()`` for a DTensor. Logits are not gathered. For each row, the processes
    reduce three numbers: the largest logit, the sum of exponentials, and the target logit. Label
    smoothing adds a fourth number, log-probabilities and metrics another. For metrics, two more
    numbers are gathered from each process. The gradient of logits needs no communication.

    All processes have to make the same calls, with the same targets, options, shapes and modes, and
    their shards have to cover each class once. Each process checks its own arguments and raises an
    error if they are invalid, whatever the other processes pass. Mismatches between processes are
    undefined, as for torch's collectives: results may be wrong, and processes may hang. With the
    environment variable ``TORCH_DISTRIBUTED_DEBUG=DETAIL``, torch raises an error for collectives
    that differ in kind or shape.

    In grad mode, the result requires grad in all processes, and all of them have to call backward;
    use ``torch.no_grad()`` for evaluation. With ``create_graph=True`` torch's operators compute the
    gradients, from all logits of a process in float64, and they can be differentiated any number of
    times. Each of these passes communicates, so every process of the group has to take part.

    In a torch dispatch or function mode, torch's operators compute calls; metrics raise an error.
    Programs that are compiled break their graph at a call.

    Attributes:
        first: The index of the first class of this process.
        classes: The number of all classes; None for the sum over the processes, which synchronises
            a GPU, unless the call has class weights. It is None in all processes, or in none.
        group: A process group of :mod:`torch.distributed`, None for all processes.
    """

    first: int
    classes: int | None = None
    group: Any = None


class FusedOptions(TypedDict, total=False):
    """The keyword arguments that pyfused adds to every cross-entropy."""

    z_loss: float
    scale: float
    softcap: float | None
    temperature: float
    token_weight: Tensor | None
    denominator: float | Tensor | None
    loss_dtype: torch.dtype | None


class ModuleOptions(FusedOptions, total=False):
    """The keyword arguments of cross-entropy modules, including ``shard``."""

    shard: VocabShard | None


class EmbeddingOptions(NamedTuple):
    """Options of losses over embeddings.

    Attributes:
        euclidean: Whether the norm of distances has exponent 2 rather than 1.
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
        loss_dtype: The dtype of the loss. A backend may return the dtype of None instead, the
            accumulation dtype.
    """

    loss: bool = True
    gradients: tuple[bool, ...] = ()
    inplace: bool = False
    loss_dtype: torch.dtype | None = None


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
