"""One module per kind of device, each a set of kernels that take and return tensors."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Measures(NamedTuple):
    """What cross-entropy's kernel returns of the logits of each position, beside its loss.

    Attributes:
        log_sum_exp: float64; 0 where the target is ignored.
        entropy: Of their probabilities, float64, or None; 0 where the target is ignored.
        prediction: The first class with the largest logit, int64, or None with ``entropy``;
            ignore_index where the target is ignored.
    """

    log_sum_exp: Tensor
    entropy: Tensor | None = None
    prediction: Tensor | None = None


class Want(NamedTuple):
    """The outputs that a call of a loss kernel computes.

    Attributes:
        gradients: Of each operand, or () for none.
        inplace: Cross-entropy's first gradient takes the input's memory.
        measures: Where they are written, one a position, None where they are not wanted.
    """

    loss: bool = True
    gradients: tuple[bool, ...] = ()
    inplace: bool = False
    measures: Measures | None = None


class CrossEntropyOptions(NamedTuple):
    """The arguments of cross-entropy beside the logits, the target and the class weights.

    Attributes:
        token_weight: What each loss is multiplied by, None for ones.
        denominator: What a mean divides by; None for the weight of the targets that count.
        loss_dtype: That of the loss; None for torch's.
    """

    ignore_index: int
    reduction: str
    label_smoothing: float
    gamma: float = 0.0
    z_loss: float = 0.0
    token_weight: Tensor | None = None
    denominator: float | Tensor | None = None
    loss_dtype: torch.dtype | None = None


class VocabShard(NamedTuple):
    """The logits' classes as a shard of all classes.

    Attributes:
        first: The first of them.
        classes: The number of all.
        lse: The log-sum-exp of all, float64, one a position; None where it is that of the logits'
            classes, and where something is measured.
    """

    first: int
    classes: int
    lse: Tensor | None = None


class Shaping(NamedTuple):
    """What is done to logits before their loss, in the order margin, scale, softcap.

    Attributes:
        softcap: What they are capped at, or None.
        margin: What the target's cosine, or angle, is worsened by.
        margin_kind: ``"cosface"`` or ``"arcface"``.
        scale: What they are multiplied by.
    """

    softcap: float | None = None
    margin: float = 0.0
    margin_kind: str = "cosface"
    scale: float = 1.0


class Head(NamedTuple):
    """A linear layer, what goes into it, and the targets of its logits.

    Attributes:
        input: (N, D).
        linear_weight: (C, D), or (C, d1, ..., dk, D).
        linear_bias: (C), or (C, d1, ..., dk), or None.
        target: int64 class indices (N) or (N, d1, ..., dk), or probabilities of the logits' shape.
        weight: (C), or None.
    """

    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    target: Tensor
    weight: Tensor | None
    shaping: Shaping = Shaping()

    @property
    def columns(self) -> int:
        return self.linear_weight[..., 0].numel()

    def takes_blocks(self) -> bool:
        """Whether the classes can be taken apart."""
        return self.linear_weight.dim() == 2 and not self.target.is_floating_point()


class NllOptions(NamedTuple):
    """Those of the negative log-likelihood."""

    ignore_index: int
    reduction: str


class MarginOptions(NamedTuple):
    """Those of the multi-class margin loss."""

    p: int
    margin: float
    reduction: str


ClassLossOptions = CrossEntropyOptions | NllOptions | MarginOptions
Gradients = tuple[Tensor | None, ...]  # one for each operand


class Backend(Protocol):
    """The functions of a module of this package. `cpu.py` says what they take and return."""

    def cross_entropy(
        self,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: CrossEntropyOptions,
        want: Want,
        grad_output: Tensor | None = None,
        vocab_shard: VocabShard | None = None,
    ) -> tuple[Tensor | None, Gradients]: ...

    def nll_loss(
        self,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: NllOptions,
        want: Want,
        grad_output: Tensor | None = None,
    ) -> tuple[Tensor | None, Gradients]: ...

    def multi_margin_loss(
        self,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: MarginOptions,
        want: Want,
        grad_output: Tensor | None = None,
    ) -> tuple[Tensor | None, Gradients]: ...

    def pointwise_loss(
        self,
        formula: str,
        operands: tuple[Tensor, ...],
        parameters: tuple[float, ...],
        weight: Tensor | None,
        reduction: str,
        denominator: float | Tensor,
        want: Want,
        grad_output: Tensor | None = None,
    ) -> tuple[Tensor | None, Gradients]: ...

    def softmax(self, formula: str, input: Tensor, dim: int) -> Tensor: ...

    def softmax_backward(
        self, formula: str, grad_output: Tensor, output: Tensor, dim: int
    ) -> Tensor: ...

    def activation(
        self,
        formula: str,
        input: Tensor,
        parameter: float = 0.0,
        *,
        inplace: bool = False,
    ) -> Tensor: ...

    def activation_backward(
        self,
        formula: str,
        grad_output: Tensor,
        saved: Tensor,
        parameter: float = 0.0,
    ) -> Tensor: ...

    def scale_(self, tensor: Tensor, factor: Tensor) -> None: ...
