"""A plan runs the calls of one signature: what it checks and prepares is done once for all of them.

An operator makes a plan from the signature of a call and passes it five functions. So there is one
class of plans and one autograd function, and what differs between families is in these functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyfused.backends import Backend
from pyfused.dispatch.autograd import apply
from pyfused.layout import layouts
from pyfused.types import Gradients, Outputs

Arguments = tuple[Any, ...]  # of a call, by position
Tensors = Sequence[Any]  # each a Tensor or None
# Takes the tensors of a call and the loss's gradient; returns the loss and the gradients.
Launch = Callable[..., tuple[Any, Gradients]]
# What the forward pass returns: its output, what backward reads, and gradients it has computed.
Forward = tuple[Any, Tensors, Gradients]


@dataclass(eq=False, kw_only=True)
class Plan:
    """Runs the calls of one signature.

    Attributes:
        name: The operator's name.
        needs: Whether each of the first tensors needs a gradient.
        arrange: Returns the tensors that the other functions take, given the call's arguments.
        forward: Returns the output, the tensors to save, and the gradients of the first tensors if
            it has computed them, otherwise (). Of several outputs only the first has a gradient.
        backward: Returns the gradients of the first tensors, given the saved ones and grad_output.
        define: Returns the same from torch's definition, so that they can be differentiated.
        finish: Returns the result, given the output and the call's arguments; None if that is the
            output itself.
        inplace: What takes the input's memory: "" for nothing, "output" or "gradient".
    """

    name: str
    backend: Backend
    needs: tuple[bool, ...]
    arrange: Callable[[Arguments], Tensors]
    forward: Callable[[Tensors], Forward]
    backward: Callable[[Tensors, Tensor], Gradients]
    define: Callable[[Tensors, Tensor], Gradients]
    finish: Callable[[Any, Arguments], Any] | None = None
    inplace: str = ""

    def __call__(self, arguments: Arguments) -> Any:
        tensors = self.arrange(arguments)
        output = apply(self, *tensors) if True in self.needs else self.forward(tensors)[0]
        return output if self.finish is None else self.finish(output, arguments)


def needs_grad(tensors: Tensors) -> tuple[bool, ...]:
    """Returns whether each tensor of a call needs a gradient."""
    grad = torch.is_grad_enabled()
    return tuple([grad and getattr(x, "requires_grad", False) for x in tensors])


def gradients_in_forward(reduction: str, dtype: torch.dtype) -> bool:
    """Returns whether a loss's forward pass computes the gradients, to be scaled by backward.

    That is when the operands are in the cache. Not for float16: without grad_output, which
    GradScaler makes large, its gradients underflow.
    """
    return reduction != "none" and dtype is not torch.float16


def loss_passes(
    prepare: Callable[[Tensors, Outputs, Tensor | None], Launch],
    needs: tuple[bool, ...],
    in_forward: bool,
    inplace: bool = False,
) -> tuple[Callable[[Tensors], Forward], Callable[[Tensors, Tensor], Gradients]]:
    """Returns the forward and the backward pass of a loss.

    Kernels are prepared when they are first needed and kept: one for the forward pass, and one for
    each layout of the tensors in backward, as hooks for saved tensors may change it.

    Args:
        prepare: Returns the kernel for tensors of these layouts, the outputs and grad_output.
        in_forward: The forward pass computes the gradients.
        inplace: The gradient of the input takes its memory.
    """
    launches: dict[Any, Launch] = {}
    in_forward = in_forward and True in needs

    def forward(tensors: Tensors) -> Forward:
        launch = launches.get(None)
        if launch is None:
            outputs = Outputs(True, needs if in_forward else (), inplace)
            launch = launches[None] = prepare(tensors, outputs, None)
        loss, gradients = launch(tensors)
        return loss, tensors, gradients if in_forward else ()

    def backward(tensors: Tensors, grad_output: Tensor) -> Gradients:
        key = layouts(*tensors, grad_output)
        launch = launches.get(key)
        if launch is None:
            outputs = Outputs(False, needs, inplace)
            launch = launches[key] = prepare(tensors, outputs, grad_output)
        return launch(tensors, grad_output)[1]

    return forward, backward
