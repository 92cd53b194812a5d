"""The autograd function of all operators, and gradients from torch's definitions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from pyfused import memory
from pyfused.backends import backend_of
from pyfused.dispatch import report
from pyfused.dispatch.reasons import layout_reason, log_once
from pyfused.layout import is_dense
from pyfused.torch_internals import (
    active_mode,
    apply_of,
    graph_is_retained,
    never_traced,
    save_apart,
    saved_tensors_hooks,
    without_transforms,
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
    needs = [False] * student
    if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        for i, x in enumerate(tensors[:student]):
            needs[i] = x is not None and x.requires_grad
        if True in needs:
            return apply((op, options, tuple(needs), shard), *tensors)
    return op.forward(tensors, options, tuple(needs), shard)[0]


class Fused(torch.autograd.Function):
    """The autograd function of all operators, which calls their `forward` and `backward`.

    Operands are saved by ``save_for_backward``. Tensors that backward may overwrite, such as the
    gradients that the forward pass has computed, are saved apart: reading them does not check
    whether user code has modified the operands. Copies are overwritten if the graph is retained,
    because another pass may read the tensors, even concurrently, and if hooks have returned them.
    ``create_graph`` frees gradients of the forward pass; later passes compute them again.
    """

    @staticmethod
    def forward(ctx: Any, call: tuple[Any, ...], *tensors: Tensor | None) -> Any:
        op, options, needs, shard = ctx.call = call
        output, saved, own = op.forward(tensors, options, needs, shard)
        in_forward, index = bool(own), None
        if op.overwritten is not None:
            index = op.overwritten(saved, options, shard)
            if index is not None and not in_forward:
                own, saved = (saved[index],), [*saved[:index], None, *saved[index + 1 :]]
        kept: list[Tensor] = []  # without None, as tools that draw graphs read saved tensors
        missing: Any = []  # the indices of None; None if backward cannot read the operands
        for i, x in enumerate(saved):
            if x is None:
                missing.append(i)
            elif not x.is_inference() or x.requires_grad:
                kept.append(x)
            elif not in_forward:  # autograd cannot save inference tensors
                kept.append(x.clone())
            else:
                kept, missing = [], None
                break
        ctx.save_for_backward(*kept)
        ctx.own = []
        for x in own:
            ctx.own.append(x if x is None else save_apart(x, False))
        ctx.state = in_forward, index, missing, saved_tensors_hooks(True) is not None
        if index == 0:
            ctx.input_is_overwritten = in_forward
        if type(output) is tuple:
            ctx.mark_non_differentiable(*[x for x in output[1:] if x is not None])
        return output

    @staticmethod
    @never_traced  # torch's compiled autograd traces backward passes
    def backward(ctx: Any, grad_output: Tensor, *_: Any) -> Any:
        """Returns a gradient for each argument of `forward`."""
        start = report.clock() if report.active else None
        in_forward, index, missing, is_hooked = ctx.state
        create_graph, retained, inplace = torch.is_grad_enabled(), graph_is_retained(), index == 0
        # Kernels support plain tensors only, and their gradients cannot be differentiated again.
        second_order = (
            (create_graph and "create_graph")
            or active_mode()
            or layout_reason("gradient", grad_output)
        )
        own = () if second_order and in_forward else ctx.own
        if second_order and missing is None:
            expected = "operands created outside of inference mode"
            raise RuntimeError(f"{second_order}: expected {expected}")
        overwrites = inplace and (second_order or not in_forward)
        if overwrites and ctx.input_is_overwritten:
            raise RuntimeError(
                "inplace: expected False for create_graph=True or a second backward pass, got "
                "True, and the gradient has overwritten the logits"
            )
        if not retained or (create_graph and not inplace):
            ctx.own = ()
            if second_order:
                memory.release()  # torch's operators do not reuse it
        copies = is_hooked or (retained and not overwrites)
        gradients: Any = []
        if not own or not in_forward:
            gradients = _gradients_of_saved(ctx, own, grad_output, copies, second_order)
        else:
            for saved in own:
                gradients.append(gradient := None if saved is None else saved.unpack())
                if gradient is not None:
                    dense = gradient.is_contiguous() or is_dense(gradient)
                    if copies or not (dense or inplace):
                        gradients[-1] = gradient = gradient.clone()
                        dense = True
                    if dense:
                        backend_of(gradient).scale_(gradient, grad_output)
                    else:  # it has overwritten a part of a tensor
                        gradient.mul_(grad_output)
        constants = len(ctx.needs_input_grad) - 1 - len(gradients)
        if start is not None:
            report.count_seconds(report.clock() - start)
        return None, *gradients, *(None,) * constants


def _gradients_of_saved(
    ctx: Any, own: Sequence[Any], grad_output: Tensor, copies: bool, second_order: Any
) -> Gradients:
    """Computes the gradients of a call from its saved tensors.

    Args:
        own: The tensor that a kernel overwrites, if it was saved apart.
        copies: Whether to copy it.
        second_order: Why torch's definition computes them, False if a kernel does.

    Raises:
        RuntimeError: A saved tensor was changed in place.
    """
    (op, options, needs, shard), (_, index, missing, _) = ctx.call, ctx.state
    try:
        saved = [*ctx.saved_tensors]
        overwritten = own[0].unpack() if own and own[0] is not None else None
    except RuntimeError as error:
        raise _with_hint(error, op.name) from None
    for i in missing:
        saved.insert(i, None)
    if overwritten is not None:
        saved[index] = overwritten.clone() if copies and not second_order else overwritten
    if second_order:
        log_once(f"backward of {op.name}", second_order)
        gradients: Gradients = op.define(saved, options, needs, grad_output, shard)
        return in_graph(gradients, saved) if torch.is_grad_enabled() else gradients
    if index == 0:
        increment_version(saved[0])
        ctx.input_is_overwritten = True
    return op.backward(saved, options, needs, grad_output, shard)  # type: ignore[no-any-return]


def _with_hint(error: RuntimeError, name: str) -> RuntimeError:
    """Returns the error of reading saved tensors; if one was changed in place, with what to do."""
    if "modified by an inplace operation" not in str(error):
        return error
    return RuntimeError(
        f"{error}\n{name}: a tensor that backward reads was changed in place after the call. "
        "Pass a clone to the call, or change the tensor after backward()"
    )


def in_graph(gradients: Gradients, saved: Sequence[Any]) -> Gradients:
    """Makes every gradient differentiable, including constants, like torch's gradients."""
    inputs = [x for x in saved if x is not None and x.requires_grad]
    return tuple(
        [
            x if x is None or x.requires_grad or not inputs else _minus_nothing(x, inputs)
            for x in gradients
        ]
    )


def _minus_nothing(gradient: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """Returns a gradient as a function of the inputs, with derivative 0.

    Sums of no elements, unlike an autograd function, can be differentiated in every transform.
    """
    for x in inputs:
        gradient = gradient - x.unsqueeze(0)[:0].sum().to(gradient.dtype)  # -0.0 stays -0.0
    return gradient


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
    with without_transforms(), torch.enable_grad():  # like the graph of torch's operators
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
