"""One module per kind of device, each a set of kernels that take and return tensors."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class Want(NamedTuple):
    """The outputs that a call of a loss kernel computes."""

    loss: bool = True
    gradients: tuple[bool, ...] = ()  # one for each operand, or () for none
    inplace: bool = False  # cross-entropy's first gradient takes the input's memory


class CrossEntropyOptions(NamedTuple):
    """The arguments of cross-entropy that are no tensors, as in ``torch.nn.functional``."""

    ignore_index: int
    reduction: str
    label_smoothing: float
    gamma: float = 0.0


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
