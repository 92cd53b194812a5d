"""The autograd function of all operators, and gradients from torch's definitions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from pyfused import memory
from pyfused.backends import backend_of
from pyfused.dispatch import report
from pyfused.dispatch.operator import Operand
from pyfused.dispatch.reasons import log_once, unsupported
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

SAVED = (Operand("gradient"),)


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


def compute(
    op: Any,
    tensors: Sequence[Any],
    options: Any,
    output_of: Callable[..., Any] | None = None,
) -> Any:
    """Returns the result of a call from its kernel, with an autograd graph if it needs one.

    Args:
        output_of: Computes the output, given the operator, the options and the inputs of a kernel,
            in another autograd function; None to make a node of `Fused`.
    """
    inputs = op.prepare(tensors, options)
    needs = [False] * op.num_differentiable
    if output_of is None and torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        for i, x in enumerate(inputs[: op.num_differentiable]):
            needs[i] = x is not None and x.requires_grad
    if output_of is not None:
        output = output_of(op, options, inputs)
    elif True in needs:
        output = apply((op, options, tuple(needs)), *inputs)
    else:
        output = op.forward(inputs, options, tuple(needs))[0]
    if op.finish is None:
        return output
    return op.finish(output, inputs, options, tensors[0].shape[:-1])


class Fused(torch.autograd.Function):
    """The autograd function of all operators, which calls their `forward` and `backward`.

    A call saves the tensors from which `Operator.backward` and `Operator.reference_backward`
    compute gradients. If its forward pass has computed the gradients, it saves them, too, and
    backward scales them without reading the other tensors, which may have been changed.
    """

    @staticmethod
    def forward(ctx: Any, call: tuple[Any, ...], *tensors: Tensor | None) -> Any:
        op, options, needs = ctx.call = call
        output, saved, gradients = op.forward(tensors, options, needs)
        kept: list[Tensor] = []  # without None, as tools that draw graphs read saved tensors
        ctx.missing = missing = list[int]()  # the indices of None
        for i, x in enumerate(saved):
            if x is None:
                missing.append(i)
            elif not x.is_inference() or x.requires_grad:
                kept.append(x)
            elif not gradients:  # autograd cannot save inference tensors
                kept.append(x.clone())
            else:
                kept, ctx.missing = [], None  # gradients can be scaled, but not computed again
                break
        ctx.save_for_backward(*kept)
        ctx.gradients = []
        for x in gradients:
            ctx.gradients.append(x if x is None else save_apart(x, False))
        ctx.formats = None  # without hooks for saved tensors, autograd returns what was saved
        if saved_tensors_hooks(True) is not None:
            ctx.formats = [*map(_format, saved)], [*map(_format, gradients)]
        if type(output) is tuple:
            ctx.mark_non_differentiable(*[x for x in output[1:] if x is not None])
            ctx.set_materialize_grads(False)  # no zeros for the other outputs
        return output

    @staticmethod
    @never_traced  # torch's compiled autograd traces backward passes
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        """Returns a gradient for each argument of `forward`."""
        if grad_output is None:
            return (None,) * len(ctx.needs_input_grad)
        start = report.clock() if report.active else None
        # Kernels support plain tensors only, and their gradients cannot be differentiated again.
        reason = (
            (torch.is_grad_enabled() and "create_graph")
            or active_mode()
            or unsupported(SAVED, (grad_output,))
        )
        gradients: Gradients | None = None
        if not reason and ctx.gradients:
            gradients = _scaled_gradients(ctx, grad_output)
        if gradients is None:
            gradients = _computed_gradients(ctx, grad_output, reason)
        constants = len(ctx.needs_input_grad) - 1 - len(gradients)
        if start is not None:
            report.count_seconds(report.clock() - start)
        return None, *gradients, *(None,) * constants


def _format(x: Tensor | None) -> Any:
    """Returns what kernels assume of a saved tensor, whose strides they read."""
    return None if x is None else (unsupported(SAVED, (x,)), x.dtype, x.device, x.shape)


def _changed_by_hooks(ctx: Any, saved: Sequence[Any]) -> bool:
    """Returns whether saved tensors have another format than those that were saved.

    Raises:
        RuntimeError: One has another shape.
    """
    formats: list[Any] = [*map(_format, saved)]
    for before, after in zip(ctx.formats[0], formats, strict=True):
        if before is not None and after[-1] != before[-1]:
            expected = f"hooks for saved tensors to return shape {tuple(before[-1])}"
            raise RuntimeError(f"{ctx.call[0].name}: expected {expected}, got {tuple(after[-1])}")
    changed: bool = formats != ctx.formats[0]
    return changed


def _scaled_gradients(ctx: Any, grad_output: Tensor) -> Gradients | None:
    """Returns the gradients of the forward pass times grad_output.

    They are scaled in place, unless the graph is retained, because another pass may read them, even
    concurrently, or hooks have returned them, which may keep them. Returns None if hooks have
    changed them, or if grad_output is infinite or NaN.
    """
    gradients, retained = ctx.gradients, graph_is_retained()
    if not retained:
        ctx.gradients = ()
    scaled = list[Tensor | None]()
    for i, saved in enumerate(gradients):
        gradient = None if saved is None else saved.unpack()
        if ctx.formats is not None and _format(gradient) != ctx.formats[1][i]:
            return None
        if gradient is not None:
            is_shared = retained or ctx.formats is not None
            if is_shared or not (gradient.is_contiguous() or is_dense(gradient)):
                gradient = gradient.clone()
            if not backend_of(gradient).scale_(gradient, grad_output):
                if ctx.missing is not None:
                    return None
                gradient.mul_(grad_output)
        scaled.append(gradient)
    return tuple(scaled)


def _computed_gradients(ctx: Any, grad_output: Tensor, reason: str | None) -> Gradients:
    """Returns the gradients from the saved tensors.

    ``create_graph`` frees the gradients of the forward pass; later passes compute them again.

    Args:
        reason: Why torch's definition computes them, which can be differentiated again. If it is
            None, a kernel does, unless hooks have changed the saved tensors.

    Raises:
        RuntimeError: A tensor of the call was created in inference mode, or was changed in place;
            or an earlier backward pass has freed the tensors.
    """
    op, options, needs = ctx.call
    if ctx.missing is None:
        message = "expected operands created outside of inference mode"
        raise RuntimeError(f"{reason or 'hooks that change saved tensors'}: {message}")
    try:
        saved = [*ctx.saved_tensors]
    except RuntimeError as error:
        raise _with_hint(error, op.name) from None
    for i in ctx.missing:
        saved.insert(i, None)
    if ctx.formats is not None and _changed_by_hooks(ctx, saved):
        reason = reason or "hooks have changed the dtype, device or layout of saved tensors"
    if not reason:
        return op.backward(saved, options, needs, grad_output)  # type: ignore[no-any-return]
    create_graph = torch.is_grad_enabled()
    if create_graph or not graph_is_retained():
        ctx.gradients = ()
        memory.release()  # torch's operators do not reuse it
    log_once(f"backward of {op.name}", reason)
    gradients: Gradients = op.reference_backward(saved, options, needs, grad_output)
    return in_graph(gradients, saved) if create_graph else gradients


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
            x if x is None or x.requires_grad or not inputs else _keep_in_graph(x, inputs)
            for x in gradients
        ]
    )


def _keep_in_graph(gradient: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """Returns a gradient that depends on the inputs, with derivative 0.

    It subtracts sums of no elements, which can be differentiated in every transform.
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
