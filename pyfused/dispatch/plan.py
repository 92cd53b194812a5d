"""The plan of a loss: what calls of one signature share, kept and run again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyfused.backends import Backend
from pyfused.layout import layouts
from pyfused.types import Gradients, Outputs

# Takes the tensors of a call and the loss's gradient; returns the loss and the gradients.
Launch = Callable[..., tuple[Tensor | None, Gradients]]


@dataclass(eq=False, kw_only=True)
class LossPlan(ABC):
    """Computes the calls of one signature.

    Gradients of a scalar loss are computed by the forward pass, while the operands are in cache.
    Exceptions are float16, which keeps them from underflowing only with grad_output, and a gradient
    that is to take memory with gaps, which could not be scaled later.

    Attributes:
        result: The dtype of the loss.
        needs: Whether each operand needs a gradient.
        now: The forward pass computes the gradients.
        inplace: The gradient of the input takes its memory.
        launches: The prepared kernels: that of the forward pass by None, and those of the backward
            pass by the layouts of the tensors, which hooks for saved tensors may change.
    """

    op: Any
    backend: Backend
    result: torch.dtype
    needs: tuple[bool, ...]
    now: bool
    inplace: bool = False
    launches: dict[Any, Launch] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.name = self.op.name

    @abstractmethod
    def prepared(
        self, tensors: Sequence[Any], outputs: Outputs, grad_output: Tensor | None
    ) -> Launch:
        """Returns the kernel for tensors of these layouts."""

    @abstractmethod
    def define(self, ctx: Any, grad_output: Tensor) -> Gradients:
        """Returns the gradients from torch's definition, which can be differentiated."""

    def forward(self, ctx: Any, tensors: Sequence[Any]) -> Tensor:
        launch = self.launches.get(None)
        if launch is None:
            outputs = Outputs(True, self.needs if ctx and self.now else (), self.inplace)
            launch = self.launches[None] = self.prepared(tensors, outputs, None)
        loss, gradients = launch(tensors)
        if ctx is not None:
            ctx.overwritten = self.inplace and self.now
            if self.now:
                ctx.first_gradient = len(tensors)
                tensors = *tensors, *gradients
            ctx.save_for_backward(*tensors)
        assert loss is not None
        return loss

    def backward(self, ctx: Any, grad_output: Tensor) -> Gradients:
        return self.gradients(ctx.saved_tensors, grad_output)

    def gradients(self, tensors: Sequence[Any], grad_output: Tensor) -> Gradients:
        """Returns the gradients of the operands, where they are needed."""
        key = layouts(*tensors, grad_output)
        launch = self.launches.get(key)
        if launch is None:
            outputs = Outputs(False, self.needs, self.inplace)
            launch = self.launches[key] = self.prepared(tensors, outputs, grad_output)
        return launch(tensors, grad_output)[1]
