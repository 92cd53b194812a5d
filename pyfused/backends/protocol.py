"""Declares the interface of a backend, which ``cpu.py`` and ``triton.py`` implement.

Most functions prepare a kernel for the layouts of tensors and return a function that launches it.
Later calls of the same signature only launch it. Preparation takes a TensorSpec for a tensor whose
sizes differ between these calls. It reads no values of tensors and keeps no references to tensors.
It may depend on whether a number is None or a special value such as 0; other numbers are read from
the options of a launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from pyfused.types import ClassRange, EmbeddingOptions, Gradients, Kernels, Outputs

if TYPE_CHECKING:
    from pyfused.formula_compiler.kernel import Kernel
    from pyfused.formula_compiler.program import Program

LossResult = tuple[Tensor | None, Gradients]
Options = Any  # the NamedTuple of an operator, or one with the fields that a function reads
Parameters = Callable[[Options], Sequence[float]]
# Returns the divisor of the sum of losses, given the first operand, of which it reads the shape.
Divisor = Callable[[Tensor], int]
# Takes the tensors and the options of a call, and grad_output, where None (the default) means ones.
LossKernel = Callable[..., LossResult]


class Backend(Protocol):
    """The functions of a backend. Tensors have a dtype of ``DTYPES`` unless stated otherwise.

    Attributes:
        ASYNCHRONOUS: Whether reading a value of a tensor synchronises with the device.
    """

    ASYNCHRONOUS: bool

    def describe(self, input: Tensor, strategy: str) -> tuple[str, str, str | None, int | None]:
        """Returns the backend's name, its strategy, the instruction set and the thread count."""

    def supports_rows(self, logits: Tensor) -> bool:
        """Returns whether ``cross_entropy`` computes logits of this layout row by row."""

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
    ) -> LossKernel:
        """Prepares the loss, and the gradients of input and target.

        Args:
            tensors: Logits of shape (C), (N, C) or (N, C, d1, ..., dk); int64 class indices, or
                probabilities of the logits' shape and dtype; weight (C); token_weight; and the
                denominator if it is a tensor. The last three may be None.
            options: `CrossEntropyOptions`, whose numbers are not used.
            grad_output: The gradient of the loss, of the loss's shape; None means ones. Without
                reduction, a call computes either the loss, or gradients given a grad_output.

        Returns:
            A function that takes tensors, the options of a call, and grad_output. It returns the
            loss, in the accumulation dtype, and the gradients. For a class index out of range,
            it raises an IndexError before it computes anything. On an asynchronous backend, the
            loss of the row is NaN and its gradient 0 instead.
        """

    def kl_div_with_logits(
        self,
        tensors: Sequence[Any],
        options: Options,
        outputs: Outputs,
        grad_output: Tensor | None = None,
    ) -> LossKernel:
        """Prepares the divergence of logits (N, C) from the teacher's, and the input's gradient.

        The kernel takes tensors and the options of a call. The loss has the accumulation dtype.

        Args:
            tensors: Logits; the teacher's, of their dtype and shape; token_weight; and the
                denominator if it is a tensor. The last two may be None.
        """

    def embedding_loss(
        self,
        name: str,
        inputs: tuple[Tensor, ...],
        options: EmbeddingOptions,
        reduction: str,
        outputs: Outputs,
        divisor: Divisor | None,
    ) -> LossKernel:
        """Prepares a loss of rows of features.

        Args:
            name: ``"triplet_margin_loss"`` or ``"cosine_embedding_loss"``.
            inputs: Three tensors (..., D) of one dtype; or two, and a target (..., 1) of the
                accumulation dtype.
            divisor: Returns the divisor of the sum of the losses, and of the gradients; None for 1.

        Returns:
            A function that takes tensors, inputs first; the options of a call, with margin and eps;
            and the gradient of each row's loss; None means ones. It returns the loss of each row or
            their sum, in the accumulation dtype, and the gradients of the inputs.
        """

    def row_state(
        self,
        options: Options,
        logits: Tensor,
        target: Tensor | None,
        weight: Tensor | None,
        state: Tensor,
        classes: ClassRange,
        results: Tensor | None = None,
        continues: bool = False,
    ) -> None:
        """Computes the state of each row of logits.

        Args:
            options: `RowOptions`. The state and the gradient of rows whose target is
                ``ignore_index`` are 0.
            logits: (N, C) with contiguous classes.
            target: Contiguous int64 indices into all classes, in range or ``ignore_index``; None if
                no target is in this range of classes. The state for other indices has NaN.
            weight: Contiguous weights of all classes, in the accumulation dtype, or None.
            state: (fields, ...), float64, each field contiguous; it is overwritten.
            classes: The range of classes that the logits belong to.
            results: (N) or (results, N), contiguous, in the accumulation dtype; receives the first
                fields of the state.
            continues: Whether to continue from the state of the preceding classes.
        """

    def row_gradients(
        self,
        options: Options,
        logits: Tensor,
        target: Tensor | None,
        weight: Tensor | None,
        state: Tensor,
        classes: ClassRange,
        grad_results: Tensor,
        out: Tensor | None = None,
    ) -> Tensor:
        """Returns the gradient of logits, which has their shape and dtype.

        It is 0 in rows whose target is out of range.

        Args:
            options, logits, target, weight, classes: See ``row_state``.
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
        tensors: tuple[tuple[Tensor, ...], Tensor | None, Tensor | None],
        parameters: Parameters,
        reduction: str,
        outputs: Outputs,
        divisor: Divisor | None = None,
        on_nan: Callable[[Sequence[Tensor], Options], Any] | None = None,
    ) -> LossKernel:
        """Prepares a pointwise loss.

        Args:
            formula: The kernel of a declared formula, or the program of a user's formula.
            tensors: The operands, of one shape and dtype, possibly with strides of 0; the weight,
                of their shape and dtype, or None; and the gradient of the loss, of their shape, or
                None for ones.
            parameters: Returns the parameters of the formula, at most three for a declared formula,
                given the options of a call.
            divisor: Returns the divisor of the sum of the losses, and of the gradients, if it is a
                number; None for 1.
            on_nan: Called with the tensors and the options of a call whose loss has a NaN, unless
                reading it would synchronise a device.

        Returns:
            A function that takes tensors (the operands, the weight, and the divisor if it is a
            tensor, else None), the options of the call, and the gradient of the loss. It returns
            the loss of each element in the input's dtype, or the sum in the accumulation dtype, and
            the gradients of the operands.
        """

    def softmax(self, formula: str, input: Tensor, dim: int) -> Kernels:
        """Prepares ``"softmax"`` or ``"log_softmax"`` along a nonnegative dimension.

        Returns:
            Two functions: forward takes the input and returns the output; backward takes
            grad_output and the output, and returns the gradient of the input. Both return
            contiguous tensors. Their last argument, the options, is not used.
        """

    def activation(self, formula: Kernel, input: Tensor) -> Kernels:
        """Prepares an activation for inputs of this layout.

        Returns:
            Two functions: forward takes the input and the options of the call, the parameters of
            the formula first, at most three, and returns the output, in the input's layout;
            backward takes grad_output, the saved tensor (the output or the input) and the options,
            and returns the gradient of the input.
        """

    def scale_(self, tensor: Tensor, factor: Tensor) -> None:
        """Multiplies a dense tensor in place by a scalar tensor."""
