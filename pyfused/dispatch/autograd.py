"""The autograd function of all operators, and gradients from torch's definitions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from pyfused.backends import backend_of
from pyfused.dispatch import report
from pyfused.dispatch.reasons import log_once
from pyfused.layout import is_dense
from pyfused.torch_internals import (
    apply_of,
    functorch_is_active,
    graph_is_retained,
    is_batched,
    is_lazy_clone,
    is_zero_tensor,
    never_traced,
    saved_tensors_from,
)
from pyfused.types import Gradients


def autocast_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Returns the dtype in which torch computes a loss: float32 for half precision in autocast."""
    is_half = dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if is_half and torch.is_autocast_enabled(device.type) else dtype


def in_autocast_dtype(tensor: Any) -> Any:
    """Casts the input or a parameter of a linear layer as autocast does; None stays None.

    Autocast leaves float64 unchanged. Loops over blocks cast weights and biases block by block, and
    accumulate their gradients without rounding.
    """
    if tensor is None or tensor.dtype is torch.float64:
        return tensor
    device = tensor.device.type
    enabled = torch.is_autocast_enabled(device)
    return tensor.to(torch.get_autocast_dtype(device)) if enabled else tensor


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Returns a context in which autocast is disabled on a device."""
    enabled = device != "meta" and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if enabled else nullcontext()


def compute(op: Any, tensors: Sequence[Any], options: Any, student: int, shard: Any = None) -> Any:
    """Returns the output of an operator's kernel, with an autograd graph if it needs one.

    Args:
        tensors, options, shard: As in `Operator.forward`.
        student: The number of tensors that may need a gradient; they come first.
    """
    needs = (False,) * student
    if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        needs = tuple([x is not None and x.requires_grad for x in tensors[:student]])
    if True in needs:
        return apply((op, options, needs, shard), *tensors)
    return op.forward(tensors, options, needs, shard)[0]


class Fused(torch.autograd.Function):
    """The autograd function of all operators, which calls their `forward` and `backward`.

    Gradients computed by the forward pass are saved after the operator's tensors, starting at index
    ``ctx.first_gradient``. Backward unpacks only these and scales them by grad_output: in place, or
    in copies if the graph is retained, because another backward pass may read them, even
    concurrently. Only ``create_graph`` unpacks the operator's tensors, so user code may modify them
    before backward.
    """

    @staticmethod
    def forward(ctx: Any, call: tuple[Any, ...], *tensors: Tensor | None) -> Any:
        op, options, needs, shard = ctx.call = call
        output, saved, gradients = op.forward(tensors, options, needs, shard)
        ctx.define = op.define
        ctx.first_gradient = len(saved) if gradients else None
        for x in saved:
            if x is not None and x.is_inference() and not x.requires_grad:
                saved = _normal_tensors(saved, bool(gradients))
                ctx.define = _inference_error if gradients else op.define
                break
        ctx.save_for_backward(*saved, *gradients)
        ctx.overwrites = getattr(options, "inplace", False) and op.overwrites(options, shard)
        ctx.input_is_overwritten = ctx.overwrites and bool(gradients)
        if type(output) is tuple:
            ctx.mark_non_differentiable(*[x for x in output[1:] if x is not None])
        return output

    @staticmethod
    @never_traced  # torch's compiled autograd traces backward passes
    def backward(ctx: Any, grad_output: Tensor, *_: Any) -> Any:
        """Returns a gradient for each argument of `forward`."""
        start = report.clock() if report.active else None
        (op, options, needs, shard), first_gradient = ctx.call, ctx.first_gradient
        # Kernels support plain tensors only, and their gradients cannot be differentiated again.
        second_order = (
            (torch.is_grad_enabled() and "create_graph")
            or (functorch_is_active() and "torch.func")
            or (is_batched(grad_output) and "is_grads_batched")
            or (type(grad_output) is not Tensor and f"gradient is a {type(grad_output).__name__}")
            or (grad_output.layout is not torch.strided and f"gradient is {grad_output.layout}")
            or (
                (grad_output.is_neg() or is_zero_tensor(grad_output))
                and "gradient is lazily negated or zero"
            )
            or (is_lazy_clone(grad_output) and "gradient is a lazy clone")
        )
        if second_order:
            log_once(f"backward of {op.name}", second_order)
        overwrites = ctx.overwrites and (second_order or first_gradient is None)
        if overwrites and ctx.input_is_overwritten:
            raise RuntimeError(
                "inplace: expected False for create_graph=True or a second backward pass, got "
                "True, and the gradient has overwritten the logits"
            )
        gradients: Any
        if first_gradient is not None and not second_order:
            copies, gradients = graph_is_retained(), saved_tensors_from(ctx, first_gradient)
            for i, gradient in enumerate(gradients):
                if gradient is not None:
                    dense = gradient.is_contiguous() or is_dense(gradient)
                    if copies or not (dense or ctx.overwrites):
                        gradients[i] = gradient = gradient.clone()
                        dense = True
                    if dense:
                        backend_of(gradient).scale_(gradient, grad_output)
                    else:  # it has overwritten a part of a tensor
                        gradient.mul_(grad_output)
        else:
            try:
                saved = ctx.saved_tensors
            except RuntimeError as error:
                raise _with_hint(error, op.name) from None
            if second_order:
                saved = saved[:first_gradient]
                gradients = ctx.define(saved, options, needs, grad_output, shard)
                if torch.is_grad_enabled():
                    gradients = in_graph(gradients, saved)
            else:
                if overwrites:
                    increment_version(saved[0])
                    ctx.input_is_overwritten = True
                gradients = op.backward(saved, options, needs, grad_output, shard)
        constants = len(ctx.needs_input_grad) - 1 - len(gradients)
        if start is not None:
            report.count_seconds(report.clock() - start)
        return None, *gradients, *(None,) * constants


def _with_hint(error: RuntimeError, name: str) -> RuntimeError:
    """Returns the error of reading saved tensors; if one was changed in place, with what to do."""
    if "modified by an inplace operation" not in str(error):
        return error
    return RuntimeError(
        f"{error}\n{name}: a tensor that backward reads was changed in place after the call. "
        "Pass a clone to the call, or change the tensor after backward()"
    )


def _normal_tensors(saved: Sequence[Any], unread: bool) -> Sequence[Any]:
    """Replaces inference tensors, which autograd cannot save, by None if unread, else by copies."""
    pairs = [(x, x is not None and x.is_inference() and not x.requires_grad) for x in saved]
    return [(None if unread else x.clone()) if is_inference else x for x, is_inference in pairs]


def _inference_error(*_: Any) -> Gradients:
    raise RuntimeError("create_graph: expected operands created outside of inference mode")


class _InGraph(torch.autograd.Function):
    """Makes a constant gradient a differentiable function of the inputs, with derivative 0."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        return grad_output, *map(torch.zeros_like, ctx.saved_tensors)


def in_graph(gradients: Gradients, saved: Sequence[Any]) -> Gradients:
    """Makes every gradient differentiable, including constants, like torch's gradients."""
    inputs = [x for x in saved if x is not None and x.requires_grad]
    return tuple(
        [
            x if x is None or x.requires_grad or not inputs else _InGraph.apply(x, *inputs)
            for x in gradients
        ]
    )


# Calls under functorch have already been dispatched to torch.
apply: Callable[..., Any] = apply_of(Fused)


def differentiate(
    definition: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    grad_output: Tensor,
) -> Gradients:
    """Returns the gradients of a definition in torch's operators, differentiable in grad mode.

    The gradient is None for an input that needs none, and 0 if the definition is constant in it.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views exclude paths through other inputs, because one input may be computed from another.
        views = [x if x is None else x.view_as(x) for x in inputs]
        loss = definition(*views)
    differentiated = [x for x, need in zip(views, needs, strict=True) if need and x is not None]
    gradients: Sequence[Tensor | None] = [None] * len(differentiated)
    if loss.requires_grad:
        gradients = torch.autograd.grad(
            loss, differentiated, grad_output, create_graph=create_graph, allow_unused=True
        )
    pairs = zip(gradients, differentiated, strict=True)
    remaining = iter([torch.zeros_like(x) if g is None else g for g, x in pairs])
    return tuple(next(remaining) if need else None for need in needs)
