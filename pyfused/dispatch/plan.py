"""A plan runs all calls of one signature; checks and preparations are done once, when it is made.

An operator makes a plan from the signature of a call. All families share the class `Plan` and one
autograd function, and differ in the functions that they pass to the plan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyfused.backends import takes_triton
from pyfused.backends.protocol import Backend, LossKernel
from pyfused.dispatch.autograd import apply
from pyfused.dispatch.operator import Options, Tensors, requires_grad
from pyfused.layout import accumulate_dtype, layouts, specs_of_layouts
from pyfused.types import Gradients, Outputs

# The result of a forward pass: the output, the tensors to save, and the gradients, () if backward
# computes them.
Forward = tuple[Any, Tensors, Gradients]
MOST_LAYOUTS = 64  # of the tensors of one plan in backward


@dataclass(eq=False, kw_only=True)
class Plan:
    """Runs the calls of one signature.

    Attributes:
        name: The operator's name.
        needs: Whether each of the first tensors needs a gradient.
        arrange: Takes the call's tensors and options, and returns the tensors that the other
            functions take; None for no conversion.
        forward: Computes the output, the tensors to save, and the gradients of the first tensors,
            or () to leave them to backward, from the tensors and the options of a call. If the
            output is a tuple, only its first item is differentiable.
        backward: Computes the gradients of the first tensors from the saved ones, the options and
            grad_output.
        define: Computes the same gradients from torch's definition, which is differentiable.
        finish: Takes the output and the call's tensors, and returns the result of the call; None to
            return the output itself.
        inplace: Whether the gradient of the input overwrites the input.
        overwrites: The index of the saved tensor that `backward` may overwrite, or None.
    """

    name: str
    backend: Backend
    needs: tuple[bool, ...]
    arrange: Callable[[Tensors, Options], Tensors] | None
    forward: Callable[[Tensors, Options], Forward]
    backward: Callable[[Tensors, Options, Tensor], Gradients]
    define: Callable[[Tensors, Options, Tensor], Gradients]
    finish: Callable[[Any, Tensors], Any] | None = None
    inplace: bool = False
    overwrites: int | None = None

    def __call__(self, tensors: Tensors, options: Options) -> Any:
        arranged = tensors if self.arrange is None else self.arrange(tensors, options)
        if True in self.needs:
            output = apply(self, options, *arranged)
        else:
            output = self.forward(arranged, options)[0]
        return output if self.finish is None else self.finish(output, tensors)


def needs_grad(tensors: Tensors) -> tuple[bool, ...]:
    """Returns whether each tensor of a call needs a gradient."""
    return tuple(map(requires_grad, tensors))


def gradients_in_forward(reduction: str, dtype: torch.dtype) -> bool:
    """Returns whether the forward pass of a loss computes the gradients, which backward scales.

    The operands are in the cache then. float16 is excluded, as its gradients underflow without the
    factor of GradScaler in grad_output.
    """
    return reduction != "none" and dtype is not torch.float16


def dynamic_dims(input: Any) -> int | None:
    """Returns the argument of `loss_passes` for the spec of an input."""
    return input.dynamic_dims if takes_triton(input) else None


def loss_passes(
    prepare: Callable[[Tensors, Outputs, Tensor | None], LossKernel],
    needs: tuple[bool, ...],
    in_forward: bool,
    inplace: bool = False,
    loss_dtype: torch.dtype | None = None,
    dynamic_dims: int | None = 0,
) -> tuple[Callable[[Tensors, Options], Forward], Callable[[Tensors, Options, Tensor], Gradients]]:
    """Returns the forward and the backward pass of a loss.

    Kernels are prepared at their first use and cached: one for the forward pass, and one for each
    layout of the tensors in backward, as saved-tensor hooks may change layouts.

    Args:
        prepare: Prepares the kernel for the layouts of tensors, the outputs and grad_output.
        in_forward: Whether the forward pass computes the gradients.
        inplace: Whether the gradient of the input overwrites the input.
        loss_dtype: The dtype of the loss, None for the kernels' accumulation dtype.
        dynamic_dims: The number of leading dimensions whose sizes are no part of the signature;
            None if a kernel reads all sizes and strides when it starts, so that one is enough.
    """
    launches: dict[Any, LossKernel] = {}
    launch_forward: LossKernel | None = None
    in_forward = in_forward and True in needs

    def prepared(tensors: Tensors, outputs: Outputs, grad_output: Tensor | None) -> LossKernel:
        if dynamic_dims is None:
            return prepare(tensors, outputs, grad_output)
        layouts = *tensors, grad_output
        *specs, grad_spec = specs_of_layouts(layouts, dynamic_dims)
        if dynamic_dims and grad_output is None and specs[0] is tensors[0]:
            raise RuntimeError("expected contiguous tensors in a plan for any sizes")
        return prepare(specs, outputs, grad_spec)

    def forward(tensors: Tensors, options: Options) -> Forward:
        nonlocal launch_forward
        if launch_forward is None:
            outputs = Outputs(True, needs if in_forward else (), inplace, loss_dtype)
            launch_forward = prepared(tensors, outputs, None)
        loss, gradients = launch_forward(tensors, options)
        if loss_dtype is not None and loss is not None and loss.dtype is not loss_dtype:
            loss = loss.to(loss_dtype)
        return loss, tensors, gradients if in_forward else ()

    def backward(tensors: Tensors, options: Options, grad_output: Tensor) -> Gradients:
        if loss_dtype is not None:
            grad_output = grad_output.to(accumulate_dtype(tensors[0].dtype))
        key = None if dynamic_dims is None else layouts((*tensors, grad_output), dynamic_dims)
        launch = launches.get(key)
        if launch is None:
            outputs = Outputs(False, needs, inplace)
            if len(launches) > MOST_LAYOUTS:
                launches.clear()
            launch = launches[key] = prepared(tensors, outputs, grad_output)
        return launch(tensors, options, grad_output)[1]

    return forward, backward
