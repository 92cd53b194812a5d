"""The sources of rows: logits, and the output of a linear layer.

A source belongs to one pass of a call. It computes the state of each row and, from the state and
the gradients of its results, the gradients of the source. A state is a float64 tensor
(fields, rows); ``types.py`` names the fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyfused.backends import backend_of
from pyfused.layout import feature_rows
from pyfused.ops.head_loop import HeadLoop, Layer, hooks_are_active, memory_of, rows_that_count
from pyfused.types import STATE_FIELDS, ClassRange, Gradients, RowBlock, RowOptions

# The state, of shape (fields, *target.shape); its first fields in the accumulation dtype, or None;
# and logits that the backward pass may overwrite, or None.
RowState = tuple[Tensor, Tensor | None, Tensor | None]


def class_range(layer: Sequence[Any]) -> ClassRange:
    """Returns the classes of logits, or of the input, weight and bias of a layer."""
    if len(layer) > 1:
        return ClassRange(0, layer[1].shape[0])
    return ClassRange(0, layer[0].shape[min(layer[0].dim() - 1, 1)])


class LogitRows(RowBlock):
    """A source of rows: logits (C), (N, C) or (N, C, d1, ..., dk).

    Other sources have the same methods.
    """

    def __init__(
        self,
        input: Tensor,
        target: Tensor | None,
        weight: Tensor | None,
        options: RowOptions,
        classes: ClassRange,
    ) -> None:
        is_matrix = input.dim() == 2 and input.stride(1) == 1
        self.input, self.logits = input, input if is_matrix else as_rows(input)
        # Hooks for saved tensors may have changed its layout.
        self.target = None if target is None else target.contiguous()
        self.weight, self.options, self.classes = weight, options, classes

    def state(
        self,
        fields: int = STATE_FIELDS,
        results: int = 0,
        keeps_logits: bool = False,  # noqa: ARG002 only layers keep logits
    ) -> RowState:
        """Computes the state of each row.

        Args:
            fields: The number of fields of a state.
            results: How many of the first fields are also returned in the accumulation dtype, if
                the kernel computes the logits of all classes at once. One has the target's shape.
            keeps_logits: Whether logits that have been computed may be returned; see `HeadRows`.
        """
        rows, out = self.logits, None
        shape: Any = rows.shape[:1] if self.target is None else self.target.shape
        state = rows.new_empty((fields, *shape), dtype=torch.float64)
        if results:
            shape = (results, *shape) if results > 1 else shape
            dtype = torch.float64 if rows.dtype is torch.float64 else torch.float32
            out = rows.new_empty(shape, dtype=dtype)
        backend_of(rows).row_state(self, state, out)
        return state, out, None

    def gradients(
        self, state: Tensor, grad_results: Tensor, logits: Tensor | None = None
    ) -> Gradients:
        """Computes the gradients of the logits, or of the input, weight and bias of a layer.

        Args:
            state: The state over all classes.
            grad_results: The gradients of the first 1, 3 or 4 of the log-probability, the entropy,
                the log-sum-exp and the field SMOOTH, of shape (results, *target.shape).
            logits: The logits that `state` returned; they are overwritten, unless the graph is
                retained.
        """
        input, rows, out = self.input, self.logits, logits
        if rows is not input:
            leading = grad_results.shape[: grad_results.dim() + 1 - state.dim()]
            grad_results = grad_results.reshape(*leading, -1)
            out = rows if rows.data_ptr() != input.data_ptr() else None
        gradient = backend_of(rows).row_gradients(self, state.contiguous(), grad_results, out)
        if rows is not input:
            dim = min(input.dim() - 1, 1)
            gradient = gradient.view(input.movedim(dim, -1).shape).movedim(-1, dim)
        return (gradient,)


def as_rows(logits: Tensor) -> Tensor:
    """Returns logits (C), (N, C) or (N, C, d1, ..., dk) as rows of contiguous classes."""
    return feature_rows(logits if logits.dim() < 3 else logits.movedim(1, -1))


class HeadRows:
    """The rows of a layer's logits; see `LogitRows`.

    The logits are computed in blocks. On CPUs, rows without a valid target are skipped.
    """

    def __init__(
        self,
        loop: HeadLoop,
        layer: Sequence[Any],
        target: Tensor,
        weight: Tensor | None,
        options: RowOptions,
        classes: ClassRange,
    ) -> None:
        input, *parameters = layer
        self.shape, self.leading = target.shape, input.shape[:-1]
        input = input.reshape(self.leading.numel(), input.shape[-1])
        target = target.flatten()
        self.rows = rows = rows_that_count(target != options.ignore_index, loop.backend)
        if rows.indices is not None:
            input, target = rows.take(input), rows.take(target)
        self.layer, self.target = Layer(input, *parameters), target.contiguous()
        self.loop, self.weight, self.options, self.classes = loop, weight, options, classes

    def block(self, logits: Tensor, rows: slice, classes: slice) -> RowBlock:
        """Returns a block of the logits."""
        first, total = self.classes
        range_ = ClassRange(first + classes.start, total)
        return RowBlock(logits, self.target[rows], self.weight, self.options, range_)

    def state(self, fields: int, _results: int, keeps_logits: bool) -> RowState:
        all_classes, backend = self.layer.weight.shape[0], self.loop.backend
        state = self.target.new_empty((fields, self.target.shape[0]), dtype=torch.float64)
        keeps_logits = keeps_logits and not hooks_are_active()
        saved: Tensor | None = None

        def step(logits: Tensor, rows: slice, classes: slice) -> None:
            nonlocal saved
            if keeps_logits and logits.shape[1] == all_classes:
                saved = memory_of(logits)
            block = self.block(logits, rows, classes)
            backend.row_state(block, state[:, rows], preceding=classes.start)

        self.loop.run(self.layer, step, backwards=True)  # the logits of the first rows come last
        if self.rows.indices is not None:
            state = self.rows.spread(state, 1)
        return state.view(fields, *self.shape), None, saved

    def gradients(
        self, state: Tensor, grad_results: Tensor, logits: Tensor | None = None
    ) -> Gradients:
        rows, backend, n = self.rows, self.loop.backend, self.leading.numel()
        state, grad_results = state.reshape(-1, n), grad_results.reshape(-1, n)
        if rows.indices is not None:
            state, grad_results = rows.take(state, 1), rows.take(grad_results, 1)
        state, grad_results = state.contiguous(), grad_results.contiguous()

        def step(logits: Tensor, rows: slice, classes: slice) -> Tensor:
            block = self.block(logits, rows, classes)
            return backend.row_gradients(block, state[:, rows], grad_results[:, rows], logits)

        grad_input, *others = self.loop.run(self.layer, step, counts=rows.counts, logits=logits)
        if grad_input is not None:
            grad_input = rows.spread(grad_input).view(*self.leading, grad_input.shape[-1])
        return grad_input, *others
