"""Declares the interface of a backend, which ``cpu.py`` and ``triton.py`` implement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from pyfused.types import EmbeddingOptions, Gradients, Outputs, RowBlock

if TYPE_CHECKING:
    from pyfused.formula_compiler.kernel import Kernel
    from pyfused.formula_compiler.program import Program

LossResult = tuple[Tensor | None, Gradients]
Options = Any  # the NamedTuple of an operator, or one with the fields that a function reads
Parameters = Callable[[Options], Sequence[float]]


class Backend(Protocol):
    """The functions of a backend. Tensors have a dtype of ``DTYPES`` unless stated otherwise.

    Attributes:
        ASYNCHRONOUS: Whether reading a value of a tensor synchronises with the device.
    """

    ASYNCHRONOUS: bool

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
        """Returns an uninitialized tensor on the device of ``like``."""

    def product_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Returns the dtype to which matrices are converted before they are multiplied."""

    def add_product(self, out: Tensor, a: Tensor, b: Tensor, beta: float) -> None:
        """Writes ``beta * out + a @ b`` to ``out``, which may be float32 if a and b are not.

        Args:
            beta: 0 or 1.
        """

    def predicts(self, logits: Tensor) -> bool:
        """Returns whether ``cross_entropy`` can return predictions of logits of this layout."""

    def check_class_indices(self, target: Tensor, classes: int, ignore_index: int) -> None:
        """Raises an IndexError for the first int64 class index out of range.

        An asynchronous backend does nothing; the results of such a row are NaN.
        """

    def cross_entropy(
        self,
        tensors: Sequence[Any],
        options: Options,
        outputs: Outputs,
        grad_output: Tensor | None = None,
        prediction: Tensor | None = None,
        metrics: Sequence[Tensor] = (),
    ) -> LossResult:
        """Computes the loss, and the gradients of input and target.

        Without reduction, a call computes either the loss, or gradients given a grad_output. For a
        class index out of range, it raises an IndexError before it computes anything; on an
        asynchronous backend, the loss of the row is NaN and its gradient 0 instead.

        Args:
            tensors: Logits of shape (C), (N, C) or (N, C, d1, ..., dk); int64 class indices, or
                probabilities of the logits' shape and dtype; weight (C); token_weight; and the
                denominator if it is a tensor. The last three may be None.
            options: `CrossEntropyOptions`.
            grad_output: The gradient of the loss, of the loss's shape; None means ones.
            prediction: A float64 tensor (2, N) for the largest logit of each row, before the
                scale, and its class, if ``predicts`` is true for the logits. NaN is the largest.
                The class is -1 for a row that is ignored.
            metrics: Contiguous tensors for the fields of ``Metrics``, for class indices and a scale
                of 1. Where a logit is NaN or inf, or all are -inf, the log-sum-exp is NaN and the
                others are undefined. Asynchronous backends take none.

        Returns:
            The loss, in the accumulation dtype or ``outputs.loss_dtype``, and the gradients.
        """

    def kl_div_with_logits(
        self,
        tensors: Sequence[Any],
        options: Options,
        outputs: Outputs,
        grad_output: Tensor | None = None,
    ) -> LossResult:
        """Computes the divergence of logits (N, C) from the teacher's, and the input's gradient.

        The loss has the accumulation dtype.

        Args:
            tensors: Logits; the teacher's, of their dtype and shape; token_weight; and the
                denominator if it is a tensor. The last two may be None.
        """

    def embedding_loss(
        self,
        name: str,
        inputs: tuple[Tensor, ...],
        numbers: tuple[float, float],
        options: EmbeddingOptions,
        reduction: str,
        outputs: Outputs,
        divisor: int | None,
        grad_output: Tensor | None = None,
    ) -> LossResult:
        """Computes a loss of rows of features, and the gradients of the inputs.

        Args:
            name: ``"triplet_margin_loss"`` or ``"cosine_embedding_loss"``.
            inputs: Three tensors (..., D) of one dtype; or two, and a target (..., 1) of the
                accumulation dtype.
            numbers: The margin, and the eps of the triplet loss.
            divisor: The divisor of the sum of the losses, and of the gradients; None for 1.
            grad_output: The gradient of each row's loss; None means ones.

        Returns:
            The loss of each row or their sum, in the accumulation dtype, and the gradients.
        """

    def row_state(
        self,
        block: RowBlock,
        state: Tensor,
        results: Tensor | None = None,
        preceding: int = 0,
    ) -> None:
        """Computes the state of each row of a block.

        Args:
            state: (fields, ...), float64, each field contiguous; it is overwritten.
            results: (N) or (results, N), contiguous, in the accumulation dtype; receives the first
                fields of the state.
            preceding: The number of classes directly before these whose state is continued.
        """

    def row_gradients(
        self, block: RowBlock, state: Tensor, grad_results: Tensor, out: Tensor | None = None
    ) -> Tensor:
        """Returns the gradient of a block's logits, which has their shape and dtype.

        It is 0 in rows whose target is out of range.

        Args:
            state: The state over all classes.
            grad_results: The gradients of the first 1, 3 or 4 results: log-probability, entropy,
                log-sum-exp, and the weighted sum of the logits. (N) or (results, N), in the
                accumulation dtype or float64, with any strides.
            out: A tensor for the gradient, with contiguous classes, possibly the logits; None to
                allocate one.
        """

    def pointwise_loss(
        self,
        formula: Kernel | Program,
        operands: Sequence[Tensor],
        weight: Tensor | None,
        parameters: Sequence[float],
        reduction: str,
        outputs: Outputs,
        divisor: Tensor | int | None = None,
        grad_output: Tensor | None = None,
        on_nan: Callable[[], Any] | None = None,
    ) -> LossResult:
        """Computes a pointwise loss, and the gradients of the operands.

        Args:
            formula: The kernel of a declared formula, or the program of a user's formula.
            operands: Tensors of one shape and dtype, possibly with strides of 0.
            weight: A tensor of their shape and dtype, or None.
            parameters: The parameters of the formula, at most three for a declared formula.
            divisor: The divisor of the sum of the losses, and of the gradients; None for 1.
            grad_output: The gradient of the loss, of their shape; None for ones.
            on_nan: Called if the loss has a NaN, unless reading it would synchronise a device.

        Returns:
            The loss of each element in the operands' dtype, or the sum in the accumulation dtype,
            and the gradients.
        """

    def softmax(self, formula: str, input: Tensor, dim: int) -> Tensor:
        """Computes ``"softmax"`` or ``"log_softmax"`` along a nonnegative dimension.

        The output is contiguous, and so is the gradient of ``softmax_backward``.
        """

    def softmax_backward(
        self, formula: str, grad_output: Tensor, output: Tensor, dim: int
    ) -> Tensor:
        """Computes the gradient of the input of ``softmax``."""

    def activation(
        self, formula: Kernel, input: Tensor, options: Options, out: Tensor | None = None
    ) -> Tensor:
        """Computes an activation, in the input's layout.

        Args:
            options: The parameters of the formula first, at most three.
            out: The memory of the result, of the same layout, which may be the input.
        """

    def activation_backward(
        self,
        formula: Kernel,
        grad_output: Tensor,
        saved: Tensor,
        options: Options,
        out: Tensor | None = None,
    ) -> Tensor:
        """Computes the gradient of an activation's input.

        Args:
            saved: The output or the input.
            out: The memory of the result, of the same layout, which may be ``saved``.
        """

    def scale_(self, gradient: Tensor, factor: Tensor) -> bool:
        """Multiplies a dense gradient in place by a scalar tensor.

        0 times NaN or infinity is NaN, but masked gradients have to remain 0. For these factors, a
        CPU kernel returns False and changes nothing. A GPU's, which are not read, keep all zeros.
        """
