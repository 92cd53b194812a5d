"""The autograd function of all operators, and what their plans share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._C import _is_cow_tensor as is_lazy_clone  # type: ignore[attr-defined]

from pyfused.ops.reasons import say_once
from pyfused.types import Gradients


def autocast_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Returns the dtype that torch computes a loss in: autocast widens the half precisions."""
    halves = (torch.bfloat16, torch.float16)
    return torch.float32 if dtype in halves and torch.is_autocast_enabled(device.type) else dtype


def in_autocast_dtype(
    device: str, tensors: Sequence[Tensor | None]
) -> tuple[AbstractContextManager[Any], list[Any]]:
    """Returns the inputs of linear layers as autocast casts them, and a context without autocast.

    The layers stay as they are. Chunks cast them, and their gradients are not rounded on the way.
    """
    if not torch.is_autocast_enabled(device):
        return nullcontext(), list(tensors)
    dtype = torch.get_autocast_dtype(device)
    cast = [None if tensor is None else tensor.to(dtype) for tensor in tensors]
    return torch.autocast(device, enabled=False), cast


def gradients_in_forward(reduction: str, input: Tensor) -> bool:
    """Returns whether a loss's forward pass computes the gradients, to be scaled by backward.

    Not for float16: without grad_output, which GradScaler makes large, it underflows.
    """
    return reduction != "none" and input.dtype is not torch.float16


def wanted_in_forward(reduction: str, tensors: Sequence[Tensor | None]) -> list[bool]:
    """Returns for each tensor whether a compiled call computes its gradient with the loss."""
    input = tensors[0]
    assert input is not None
    now = torch.is_grad_enabled() and gradients_in_forward(reduction, input)
    return [now and tensor is not None and tensor.requires_grad for tensor in tensors]


def second_order(op: str, grad_output: Tensor) -> bool:
    """Returns whether torch's definition computes a backward pass: differentiated, or in vmap."""
    reason = (
        (torch.is_grad_enabled() and "create_graph")
        or (torch._C._are_functorch_transforms_active() and "torch.func")
        or (torch._C._functorch.is_legacy_batchedtensor(grad_output) and "is_grads_batched")
        or (type(grad_output) is not Tensor and f"gradient is a {type(grad_output).__name__}")
        or (grad_output.layout is not torch.strided and f"gradient is {grad_output.layout}")
        or ((grad_output.is_neg() or grad_output._is_zerotensor()) and "gradient is lazy")
        or (is_lazy_clone(grad_output) and "gradient is a lazy clone")
    )
    if reason:
        say_once(f"backward of {op}", reason)
    return bool(reason)


class Fused(torch.autograd.Function):
    """The one autograd function: a plan computes its outputs and its gradients.

    A plan has these methods. ``forward(ctx, tensors)`` saves what the backward pass reads, and
    returns the outputs. ``backward(ctx, grad_output)`` returns a gradient for each tensor, or for
    the first ones. ``define(ctx, grad_output)`` returns the same from torch's definition, so that
    they can be differentiated. Gradients that ``forward`` leaves in ``ctx.gradients`` are only
    scaled, and only once: they are handed over, so that nobody else holds them.
    """

    @staticmethod
    def forward(ctx: Any, plan: Any, *tensors: Tensor | None) -> Any:
        ctx.plan, ctx.gradients = plan, None
        return plan.forward(ctx, tensors)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Any) -> Gradients:
        plan, gradients = ctx.plan, ctx.gradients
        if second_order(plan.name, grad_output):
            gradients = plan.define(ctx, grad_output)
        elif gradients is None:
            gradients = plan.backward(ctx, grad_output)
        else:
            ctx.gradients = None
            for gradient in gradients:
                if gradient is not None:
                    dtype = torch.float64 if gradient.dtype is torch.float64 else torch.float32
                    factor = grad_output if grad_output.dtype is dtype else grad_output.to(dtype)
                    plan.backend.scale_(gradient, factor)
        missing = len(ctx.needs_input_grad) - 1 - len(gradients)
        return None, *gradients, *(None,) * missing


def without_functorch(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply``, which looks for functorch first; dispatch has left its calls to torch.

    That takes 1.8 of 4.3 us.
    """
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply


apply = without_functorch(Fused)


def save(ctx: Any, options: Any, *tensors: Tensor | None) -> None:
    """Saves what a backward pass reads, the tensors among the options with the others.

    So an in-place change of one raises, hooks for saved tensors see all of them, and the graph
    holds no other reference to them. Only `saved` gives them back.
    """
    among = options.tensors()
    ctx.save_for_backward(*tensors, *among.values())
    ctx.options = replace(options, **dict.fromkeys(among)) if among else options
    ctx.tensors_in_options = tuple(among)


def saved(ctx: Any) -> tuple[Sequence[Any], Any]:
    """Returns the tensors and the options that `save` was given."""
    tensors, names = ctx.saved_tensors, ctx.tensors_in_options
    if not names:
        return tensors, ctx.options
    among = dict(zip(names, tensors[-len(names) :], strict=True))
    return tensors[: -len(names)], replace(ctx.options, **among)


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
