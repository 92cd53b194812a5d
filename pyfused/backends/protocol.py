"""The interface of a backend, which the modules ``cpu.py`` and ``triton.py`` implement.

Most functions prepare a kernel for tensors of some layouts and return a function that launches it,
so that later calls of the same signature launch it at once. Preparation reads the layouts of
tensors only, and what is prepared keeps none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from pyfused.types import (
    ClassRange,
    CrossEntropyOptions,
    DivergenceOptions,
    EmbeddingOptions,
    Gradients,
    Kernels,
    MarginOptions,
    NllOptions,
    Outputs,
    RowOptions,
)

if TYPE_CHECKING:
    from pyfused.formulas.kernel import Kernel
    from pyfused.formulas.program import Program

LossResult = tuple[Tensor | None, Gradients]
# Takes the tensors of a call and grad_output, which is None by default and stands for ones.
LossKernel = Callable[..., LossResult]


class Backend(Protocol):
    """The functions of a backend. Tensors have a dtype of ``DTYPES`` unless stated otherwise.

    Attributes:
        ASYNCHRONOUS: Whether reading a value of a tensor would wait for the device.
    """

    ASYNCHRONOUS: bool

    def describe(self, input: Tensor, strategy: str) -> tuple[str, str, str | None, int | None]:
        """Returns the backend's name, how it computes, its instruction set and its threads."""

    def supports_rows(self, logits: Tensor) -> bool:
        """Returns whether ``cross_entropy`` computes whole rows of logits of this layout."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
        """Returns an uninitialized tensor on the device of ``like``."""

    def product_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Returns the dtype in which matrices of a dtype are multiplied."""

    def add_product(self, out: Tensor, a: Tensor, b: Tensor, beta: float) -> None:
        """Writes ``beta * out + a @ b`` to ``out``, which may be float32 where a and b are not.

        Args:
            beta: 0 or 1.
        """

    def check_class_indices(self, target: Tensor, classes: int, ignore_index: int) -> None:
        """Raises an IndexError for the first int64 class index out of range.

        Does nothing where the backend is asynchronous: the results of such a row are NaN.
        """

    def cross_entropy(
        self,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: CrossEntropyOptions,
        outputs: Outputs,
        grad_output: Tensor | None = None,
    ) -> LossKernel:
        """Prepares the loss, and the gradients of input and target.

        Args:
            input: Logits of shape (C), (N, C) or (N, C, d1, ..., dk).
            target: int64 class indices, or probabilities of the input's shape and dtype.
            weight: (C), or None.
            options: Only the layouts of its tensors count.
            grad_output: The gradient of the loss, of the loss's shape; None stands for ones. A
                call without reduction asks for the loss, or for gradients with a grad_output.

        Returns:
            A function of tensors of these layouts (input, target, weight, token_weight and the
            denominator, None where that is a number or not given) and of grad_output. It returns
            the loss, in the accumulation dtype, and the gradients. For a class index out of range
            it raises an IndexError before it computes anything, or, where the backend is
            asynchronous, the loss of the row is NaN and its gradient 0.
        """

    def nll_loss(
        self,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: NllOptions,
        outputs: Outputs,
        grad_output: Tensor | None = None,
    ) -> LossKernel:
        """Prepares the loss of log-probabilities and class indices, as ``cross_entropy`` does."""

    def multi_margin_loss(
        self,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: MarginOptions,
        outputs: Outputs,
        grad_output: Tensor | None = None,
    ) -> LossKernel:
        """Prepares the loss of scores (N, C) and class indices (N), as ``cross_entropy`` does."""

    def multilabel_margin_loss(
        self,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: MarginOptions,
        outputs: Outputs,
        grad_output: Tensor | None = None,
    ) -> LossKernel:
        """Prepares the loss of scores (N, C) and class indices (N, C), as ``cross_entropy`` does.

        The targets of a row end at the first -1.
        """

    def kl_div_with_logits(
        self,
        input: Tensor,
        teacher: Tensor,
        options: DivergenceOptions,
        outputs: Outputs,
        grad_output: Tensor | None = None,
    ) -> LossResult:
        """Returns the divergence of each row of logits (N, C) from the teacher's, or their sum.

        Args:
            teacher: Of the input's dtype and shape.
            options: A mean is computed as a sum, which the caller divides.
            grad_output: The gradient of the loss, of the loss's shape; None stands for ones.

        Returns:
            The loss, in the accumulation dtype, and the gradient of the input.
        """

    def embedding_loss(
        self,
        name: str,
        inputs: tuple[Tensor, ...],
        options: EmbeddingOptions,
        reduction: str,
        outputs: Outputs,
        denominator: float,
    ) -> LossKernel:
        """Prepares a loss of rows of features.

        Args:
            name: ``"triplet_margin_loss"`` or ``"cosine_embedding_loss"``.
            inputs: Three tensors (..., D) of one dtype; or two, and a target (..., 1) of the
                accumulation dtype.
            denominator: What the sum of the losses and the gradients are divided by.

        Returns:
            A function of tensors, which begin with the inputs, and of the gradient of the loss, one
            for each row; None stands for ones. It returns the loss in the accumulation dtype, one
            for each row or their sum, and the gradients of the inputs.
        """

    def row_state(
        self,
        logits: Tensor,
        options: RowOptions,
        classes: ClassRange,
        fields: int,
        results: int = 0,
        continues: bool = False,
    ) -> Callable[..., None]:
        """Prepares the state of each row of logits.

        Args:
            logits: (N, C) with contiguous classes.
            classes: Which of all classes the logits are of.
            fields: How many fields a state has.
            results: How many of its first fields are also written in the accumulation dtype.
            continues: Continues from the state of the classes before these.

        Returns:
            A function of

            - logits of this layout;
            - target: contiguous int64 class indices among all classes, in range or
              ``ignore_index``; None for targets that are none of these classes;
            - weight: contiguous, a factor for each of all classes, in the accumulation dtype, or
              None;
            - state: (fields, ...), float64, each field contiguous, which it writes;
            - out: (results, ...), contiguous, which it writes, of the classes up to these.

            For an index out of range the state has a NaN.
        """

    def row_gradients(
        self, logits: Tensor, options: RowOptions, classes: ClassRange, results: int
    ) -> Callable[..., Tensor]:
        """Prepares the gradient of logits, which has their shape and dtype.

        Args:
            logits, options, classes: As in ``row_state``.
            results: How many results have a gradient: the first of log-probability, entropy,
                log-sum-exp and the weighted sum of the logits; one, three or four.

        Returns:
            A function of logits, target and weight as in ``row_state``, and of

            - state: that of all classes;
            - grad_results: the gradients of the results, (N) or (results, N), in the accumulation
              dtype or float64, of any strides;
            - out: contiguous memory for the gradient, or the logits; None for new memory.

            It returns the gradient, which is 0 for an index out of range.
        """

    def pointwise_loss(
        self,
        formula: Kernel | Program,
        tensors: tuple[tuple[Tensor, ...], Tensor | None, Tensor | None],
        parameters: tuple[float, ...],
        reduction: str,
        outputs: Outputs,
        divisor: float = 1.0,
        halves: int | None = None,
    ) -> LossKernel:
        """Prepares a pointwise loss.

        Args:
            formula: The kernel of a declared formula, or a user's program.
            tensors: The operands, of one shape, strides of 0 included, and one dtype; the weight,
                of their shape and dtype, or None; and the gradient of the loss, of their shape,
                None for ones.
            parameters: The numbers in the formula, at most three where it is declared.
            divisor: What the sum of the losses and the gradients are divided by, where that is a
                number.
            halves: The dimension along which the gradients of both operands become one tensor.

        Returns:
            A function of tensors (the operands, the weight, and the divisor where it is a tensor,
            else None) and of the gradient of the loss. It returns the loss, one for each element in
            the input's dtype or one sum in the accumulation dtype, and the gradients of the
            operands.
        """

    def softmax(self, formula: str, input: Tensor, dim: int) -> Kernels:
        """Prepares ``"softmax"`` or ``"log_softmax"`` along a dimension, counted from 0.

        Returns:
            A function of the input, which returns the output; and a function of the output's
            gradient and of the output, which returns the input's gradient. Both return contiguous
            tensors.
        """

    def activation(
        self,
        formula: Kernel,
        input: Tensor,
        parameters: tuple[float, ...] = (),
        inplace: bool = False,
    ) -> Kernels:
        """Prepares an activation for inputs of this layout.

        Args:
            parameters: The numbers in the formula, at most three.
            inplace: The output takes the input's memory, which has to be dense.

        Returns:
            A function of the input, which returns the output in the input's layout; and a function
            of the output's gradient and of what is saved (the output or the input), which returns
            the input's gradient.
        """

    def scale_(self, tensor: Tensor, factor: Tensor) -> None:
        """Multiplies a dense tensor in place by one element of the accumulation dtype."""
