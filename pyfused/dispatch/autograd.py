"""The autograd function of all operators, and gradients from torch's definitions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from pyfused.dispatch.originals import torch_alone
from pyfused.dispatch.reasons import say_once
from pyfused.layout import is_dense
from pyfused.torch_internals import (
    functorch_is_active,
    graph_is_retained,
    is_batched,
    is_lazy_clone,
    is_zero_tensor,
)
from pyfused.types import Gradients


def autocast_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Returns the dtype that torch computes a loss in: autocast widens the half precisions."""
    halves = (torch.bfloat16, torch.float16)
    return torch.float32 if dtype in halves and torch.is_autocast_enabled(device.type) else dtype


def in_autocast_dtype(device: str, *inputs: Tensor) -> list[Tensor]:
    """Returns the inputs of linear layers as autocast casts them; it leaves float64 alone.

    The layers stay as they are. Their loops cast them block by block, so that their gradients are
    not rounded on the way.
    """
    if not torch.is_autocast_enabled(device):
        return [*inputs]
    dtype = torch.get_autocast_dtype(device)
    return [x if x.dtype is torch.float64 else x.to(dtype) for x in inputs]


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Returns a context in which autocast casts nothing on a device."""
    enabled = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if enabled else nullcontext()


def second_order(op: str, grad_output: Tensor) -> bool:
    """Returns whether torch's definition computes a backward pass: differentiated, or in vmap."""
    reason = (
        (torch.is_grad_enabled() and "create_graph")
        or (functorch_is_active() and "torch.func")
        or (is_batched(grad_output) and "is_grads_batched")
        or (type(grad_output) is not Tensor and f"gradient is a {type(grad_output).__name__}")
        or (grad_output.layout is not torch.strided and f"gradient is {grad_output.layout}")
        or ((grad_output.is_neg() or is_zero_tensor(grad_output)) and "gradient is lazy")
        or (is_lazy_clone(grad_output) and "gradient is a lazy clone")
    )
    if reason:
        say_once(f"backward of {op}", reason)
    return bool(reason)


class Fused(torch.autograd.Function):
    """The autograd function of all operators, which runs the functions of a plan.

    Gradients that the forward pass has computed are saved tensors from ``ctx.first_gradient`` on.
    Backward scales them, in their memory unless the graph is retained: then another pass reads it,
    maybe at the same time.
    """

    @staticmethod
    def forward(ctx: Any, plan: Any, *tensors: Tensor | None) -> Any:
        output, saved, gradients = plan.forward(tensors)
        ctx.plan, ctx.first_gradient = plan, len(saved) if gradients else None
        ctx.save_for_backward(*saved, *gradients)
        if plan.inplace:
            ctx.input_is_overwritten = bool(gradients)
            if plan.inplace == "output":
                ctx.mark_dirty(tensors[0])
        if type(output) is tuple:
            ctx.mark_non_differentiable(*[x for x in output[1:] if x is not None])
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Any) -> Gradients:
        plan, first = ctx.plan, ctx.first_gradient
        differentiable = second_order(plan.name, grad_output)
        overwrites = plan.inplace == "gradient" and (differentiable or first is None)
        if overwrites and ctx.input_is_overwritten:
            raise RuntimeError(
                "inplace: expected False for create_graph=True or a second backward pass, got "
                "True, and the gradient has taken the logits' memory"
            )
        saved: Any = ctx.saved_tensors
        gradients: Any
        if overwrites and not differentiable:
            increment_version(saved[0])
            ctx.input_is_overwritten = True
        if differentiable:
            with torch_alone:
                gradients = plan.define(saved[:first], grad_output)
            if torch.is_grad_enabled():
                gradients = in_graph(gradients, saved)
        elif first is None:
            gradients = plan.backward(saved, grad_output)
        else:
            copies, gradients = graph_is_retained(), list(saved[first:])
            for i, gradient in enumerate(gradients):
                if gradient is not None:
                    if copies or not (gradient.is_contiguous() or is_dense(gradient)):
                        gradients[i] = gradient = gradient.clone()
                    dtype = torch.float64 if gradient.dtype is torch.float64 else torch.float32
                    factor = grad_output if grad_output.dtype is dtype else grad_output.to(dtype)
                    plan.backend.scale_(gradient, factor)
        missing = len(ctx.needs_input_grad) - 1 - len(gradients)
        return None, *gradients, *(None,) * missing


class _InGraph(torch.autograd.Function):
    """A gradient that does not depend on the inputs, as a function of them: its slopes are 0."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        return grad_output, *map(torch.zeros_like, ctx.saved_tensors)


def in_graph(gradients: Gradients, saved: Sequence[Any]) -> Gradients:
    """Returns gradients of which each can be differentiated, constant ones too, as torch's can."""
    inputs = [x for x in saved if x is not None and x.requires_grad]
    return tuple(
        [
            x if x is None or x.requires_grad or not inputs else _InGraph.apply(x, *inputs)
            for x in gradients
        ]
    )


# `Fused.apply` looks for functorch first, which takes 1.8 of 4.3 us; dispatch has left its calls to
# torch.
apply: Callable[..., Any] = super(torch.autograd.Function, Fused).apply


def differentiate(
    definition: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    wanted: Sequence[bool],
    grad_output: Tensor,
) -> Gradients:
    """Returns the gradients of torch's definition, which can be differentiated themselves.

    They are None where they are not wanted.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # One of them may be computed from another: of each its own part alone is asked.
        parts = [tensor if tensor is None else tensor.view_as(tensor) for tensor in inputs]
        loss = definition(*parts)
    found = iter(
        torch.autograd.grad(
            loss,
            [part for part, want in zip(parts, wanted, strict=True) if want and part is not None],
            grad_output,
            create_graph=create_graph,
        )
    )
    return tuple(next(found) if want else None for want in wanted)
